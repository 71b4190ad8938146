//! Layer norms of rows.

use ndarray::{Array1, ArrayView1, Ix1};

use crate::definition::number::Real;
use crate::error::{Error, Result};
use crate::input::laid::Laid;
use crate::simd::Simd;
use crate::stages::row::{RowMap, add};

/// What is added to a variance.
pub(crate) const EPSILON: f32 = 1e-5;

/// A layer norm: rows of mean 0 and variance 1, times factors, plus shifts. `1e-5` is
/// added to a variance.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNorm {
    /// Factors, `[dim]`.
    pub gain: Array1<f32>,
    /// What is added then, `[dim]`.
    pub shift: Array1<f32>,
}

impl LayerNorm {
    /// The same, if it is of rows of so many elements and finite.
    pub(crate) fn checked(&self, argument: &'static str, dim: usize) -> Result<Self> {
        for x in [&self.gain, &self.shift] {
            if x.len() != dim {
                return Err(Error::shape(argument, format!("[dim] = [{dim}] twice"), x.shape()));
            }
            if let Some(x) = x.iter().find(|x| !x.is_finite()) {
                return Err(Error::value(argument, "finite numbers", x));
            }
        }
        let [gain, shift] = [&self.gain, &self.shift].map(|x| Array1::from(x.to_vec()));
        Ok(Self { gain, shift })
    }
}

/// A mask of the lanes that a slice has.
#[inline(always)]
fn inside<S: Simd>(s: S, x: &[f32]) -> S::M {
    s.mask(1u64.checked_shl(x.len() as u32).map_or(u64::MAX, |bit| bit - 1))
}

impl RowMap for LayerNorm {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        let [gain, shift] = [&self.gain, &self.shift].map(|x| x.as_slice().unwrap_or_default());
        let (n, mut sum) = (row.len() as f32, s.splat(0.0));
        for x in row.chunks(S::LANES) {
            sum = s.add(sum, s.load_tail(x));
        }
        let mean = s.splat(s.reduce_add(sum) / n);
        let mut squares = s.splat(0.0);
        for x in row.chunks(S::LANES) {
            let apart = s.select(inside(s, x), s.sub(s.load_tail(x), mean), s.splat(0.0));
            squares = s.mul_add(apart, apart, squares);
        }
        let deviation = s.splat((s.reduce_add(squares) / n + EPSILON).sqrt());
        let affine = gain.chunks(S::LANES).zip(shift.chunks(S::LANES));
        for (x, (gain, shift)) in row.chunks_mut(S::LANES).zip(affine) {
            let y = s.div(s.sub(s.load_tail(x), mean), deviation);
            s.store_tail(x, s.mul_add(y, s.load_tail(gain), s.load_tail(shift)));
        }
    }

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R> {
        let of = |x: &Array1<f32>, c: usize| R::of(f64::from(x[c]));
        let n = R::of(x.len() as f64);
        let mean = R::dot(x.iter().map(|&x| (x, R::of(1.0)))) / n;
        let variance = R::dot(x.iter().map(|&x| (x - mean, x - mean))) / n;
        let deviation = (variance + R::of(f64::from(EPSILON))).sqrt();
        let normed = |(c, &x): (usize, &R)| (x - mean) / deviation * of(&self.gain, c) + of(&self.shift, c);
        x.iter().enumerate().map(normed).map(R::stored).collect()
    }
}

/// Rows of a hidden layer: what is added, a layer norm, and nothing below 0.
#[derive(Clone, Debug)]
pub(crate) struct Rectified {
    pub(crate) bias: Laid<Ix1>,
    pub(crate) norm: LayerNorm,
}

impl RowMap for Rectified {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        add(s, row, self.bias.numbers());
        self.norm.apply(s, row);
        for x in row.chunks_mut(S::LANES) {
            let y = s.max(s.splat(0.0), s.load_tail(x));
            s.store_tail(x, y);
        }
    }

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R> {
        let sums = x.iter().zip(self.bias.numbers()).map(|(&x, &bias)| x + R::of(f64::from(bias)));
        let sums: Array1<R> = sums.collect();
        self.norm.define(sums.view()).into_iter().map(|x| x.max(R::of(0.0))).collect()
    }
}
