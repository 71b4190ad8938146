//! Copies of queries, keys and values in the order in which the register
//! tile reads them, widened to `f32`.

use crate::element::Element;
use crate::simd::mem::Rows;
use crate::simd::{Kernel, MAX_LANES, Simd};

/// Keys of a slice: what one product over values covers, and what one
/// finiteness flag stands for.
pub(crate) const SLICE: usize = 128;

/// Loads `LANES` elements of a row from `col` on; missing ones are zero.
#[inline(always)]
pub(crate) fn load<S: Simd, T: Element>(s: S, x: &Rows<'_, T>, row: usize, col: usize) -> S::F {
    let n = (x.cols() - col).min(S::LANES);
    match x.row(row) {
        Some(row) if n == S::LANES => T::load(s, &row[col..]),
        Some(row) => T::load_tail(s, &row[col..]),
        None => {
            let mut lanes = [0.0; MAX_LANES];
            for (t, lane) in lanes[..n].iter_mut().enumerate() {
                *lane = x.at(row, col + t).to_f32();
            }
            s.load(&lanes)
        }
    }
}

/// Queries row by row: `[rows, cols]`.
pub(crate) struct PackRows<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
}

impl<T: Element> Kernel for PackRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.from.cols();
        for i in 0..self.from.len() {
            let to = &mut self.to[i * cols..][..cols];
            let mut j = 0;
            while j < cols {
                let x = load(s, &self.from, i, j);
                s.store_tail(&mut to[j..], x);
                j += S::LANES;
            }
        }
    }
}

/// Keys transposed into panels `[panels][cols][panel]`, keys in lanes; keys
/// past the last, up to a whole vector, are zero.
pub(crate) struct PackKeys<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
}

impl<T: Element> Kernel for PackKeys<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let panel = S::LANES * S::TILE_VECTORS;
        let (keys, cols) = (self.from.len(), self.from.cols());
        let mut first = 0;
        while first < keys {
            let to = &mut self.to[first / panel * panel * cols..][..panel * cols];
            let mut col = 0;
            while col < cols {
                let mut block = [s.splat(0.0); MAX_LANES];
                for (t, x) in block[..S::LANES].iter_mut().enumerate() {
                    if first + t < keys {
                        *x = load(s, &self.from, first + t, col);
                    }
                }
                s.transpose(&mut block);
                let n = (cols - col).min(S::LANES);
                for (t, &x) in block[..n].iter().enumerate() {
                    s.store(&mut to[(col + t) * panel + first % panel..], x);
                }
                col += S::LANES;
            }
            first += S::LANES;
        }
    }
}

/// Values in panels of columns `[panels][stride][panel]`, values as rows;
/// columns past the last, up to a whole vector, are zero. `finite` says of
/// each slice of keys whether all its values are.
pub(crate) struct PackValues<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
    /// Rows from one panel to the next.
    pub(crate) stride: usize,
    pub(crate) finite: &'a mut [u8],
}

impl<T: Element> Kernel for PackValues<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let panel = S::LANES * S::TILE_VECTORS;
        let (keys, cols) = (self.from.len(), self.from.cols());
        for (slice, finite) in self.finite.iter_mut().enumerate() {
            // x * 0 is 0 for finite x and NaN otherwise.
            let mut zero = s.splat(0.0);
            for key in (slice * SLICE).min(keys)..((slice + 1) * SLICE).min(keys) {
                let mut col = 0;
                while col < cols {
                    let x = load(s, &self.from, key, col);
                    zero = s.mul_add(x, s.splat(0.0), zero);
                    s.store(&mut self.to[(col / panel * self.stride + key) * panel + col % panel..], x);
                    col += S::LANES;
                }
            }
            *finite = u8::from(s.reduce_add(zero) == 0.0);
        }
    }
}
