//! Rows of a cache: written in their storage type, quantised to `int8` with
//! one scale a row, and unpacked.

use super::mem::Rows;
use super::pack::load;
use super::storage::Storage;
use super::{Kernel, Simd};

/// `to`, `[rows, cols]` without gaps, are the rows of `from`, rounded to the
/// type `U`.
pub(crate) struct StoreRows<'a, T, U> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [U],
}

impl<T: Storage, U: Storage> Kernel for StoreRows<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.from.cols();
        if cols == 0 {
            return;
        }
        for (i, to) in self.to.chunks_exact_mut(cols).enumerate() {
            for (v, to) in to.chunks_mut(S::LANES).enumerate() {
                U::store_tail(s, to, load(s, &self.from, i, v * S::LANES));
            }
        }
    }
}

/// The smallest scale of a row: what is smaller than half of it is 0, and no
/// product of a code with a scale is subnormal.
pub(crate) const SMALLEST_SCALE: f32 = f32::MIN_POSITIVE;
/// The largest scale whose product with the largest code is finite.
pub(crate) const LARGEST_SCALE: f32 = f32::from_bits(0x7c01_0203);

/// The largest code.
pub(crate) const LARGEST_CODE: f32 = 127.0;

/// Each row of `from` as `codes`, `[rows, cols]` without gaps, and one scale:
/// `scale = max|x| / 127`, at least [`SMALLEST_SCALE`]; `code = round(x /
/// scale)`, ties to even. The scale of a row with a NaN or an infinity is NaN.
///
/// Every operation is exact or correctly rounded, so that all instruction sets
/// give the same codes.
pub(crate) struct Quantize<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) codes: &'a mut [i8],
    pub(crate) scales: &'a mut [f32],
}

impl<T: Storage> Kernel for Quantize<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.from.cols();
        assert_eq!(self.codes.len(), self.scales.len() * cols);
        for (i, scale) in self.scales.iter_mut().enumerate() {
            let (mut max, mut zero) = (s.splat(0.0), s.splat(0.0));
            for col in (0..cols).step_by(S::LANES) {
                let x = load(s, &self.from, i, col);
                max = s.max(s.abs(x), max);
                // NaN and infinity times 0 are NaN, and stay.
                zero = s.mul_add(x, s.splat(0.0), zero);
            }
            *scale = if s.reduce_add(zero) == 0.0 {
                // Of the largest numbers the scale is rounded up, and its
                // product with the largest code would be infinite.
                (s.reduce_max(max) / LARGEST_CODE).clamp(SMALLEST_SCALE, LARGEST_SCALE)
            } else {
                f32::NAN
            };
            for (v, to) in self.codes[i * cols..][..cols].chunks_mut(S::LANES).enumerate() {
                let x = s.div(load(s, &self.from, i, v * S::LANES), s.splat(*scale));
                // The bounds take NaN for a number.
                let x = s.max(s.min(x, s.splat(LARGEST_CODE)), s.splat(-LARGEST_CODE));
                s.store_i8_tail(to, x);
            }
        }
    }
}

/// `to[i * stride + c] = codes[i][c] * scales[i]` for every row.
pub(crate) struct Dequantize<'a> {
    pub(crate) codes: Rows<'a, i8>,
    pub(crate) scales: &'a [f32],
    pub(crate) to: &'a mut [f32],
    pub(crate) stride: usize,
}

impl Kernel for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.codes.cols();
        if cols == 0 {
            return;
        }
        for (i, &scale) in self.scales[..self.codes.len()].iter().enumerate() {
            let scale = s.splat(scale);
            let row = self.codes.row(i).expect("codes of a row are neighbours");
            let to = &mut self.to[i * self.stride..][..cols];
            let whole = cols / S::LANES * S::LANES;
            for (to, x) in to.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
                s.store(to, s.mul(s.load_i8(x), scale));
            }
            if whole < cols {
                s.store_tail(&mut to[whole..], s.mul(s.load_i8_tail(&row[whole..]), scale));
            }
        }
    }
}
