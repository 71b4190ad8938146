//! What the mechanisms of the delta rule share: the recurrence, and queries
//! and keys of unit length.

use crate::definition::recurrence::{Token, row};
use crate::definition::recurrence_backward::Found;
use crate::element::Element;
use crate::engine::recur::{Arrays, Back, Keys, Place, Source};
use crate::input::Qkv;
use crate::simd::mem::Stream;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::recur::Config;

/// What is added to the sum of squares before its root.
const NORM_EPSILON: f64 = 1e-6;

/// The options of a delta rule, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeltaRule {
    pub(crate) config: Config,
    /// Whether queries and keys are divided by their norms.
    pub(crate) normalize: bool,
}

impl DeltaRule {
    /// Calls `run` with these operands, queries and keys normalised if that is
    /// asked for.
    pub(crate) fn with_source<R>(&self, arrays: Arrays<'_>, run: impl FnOnce(&dyn Source) -> R) -> R {
        if self.normalize { run(&Normalized { head_dim: arrays.q.dim().3, arrays }) } else { run(&arrays) }
    }

    /// A token of these operands: `x / sqrt(|x|^2 + 1e-6)` of its query and
    /// key where that is asked for.
    pub(crate) fn token(&self, arrays: &Arrays<'_>, at: &Place) -> Token {
        let mut token = Token::of(arrays, at);
        if self.normalize {
            [&mut token.q, &mut token.k].into_iter().for_each(|x| unit(x));
        }
        token
    }

    /// Divides loaded rows by their norms, if that is asked for.
    pub(crate) fn loaded(&self, isa: Isa, rows: &mut [f32], len: usize, dim: usize, stride: usize) {
        if self.normalize {
            normalize(isa, rows, len, dim, stride);
        }
    }

    /// Gradients of what [`loaded`](Self::loaded) divided, in place of which come
    /// those of queries and keys as they are in the arrays.
    pub(crate) fn loaded_back(&self, isa: Isa, arrays: &Arrays<'_>, at: &Place, of: &mut Back<'_>) {
        if self.normalize {
            normalize_back(isa, arrays, at, of);
        }
    }

    /// The same of a query and a key, by definition.
    pub(crate) fn token_back<T: Element>(&self, x: &Qkv<'_, T>, at: &Place, of: usize, found: &mut Found) {
        if !self.normalize {
            return;
        }
        for (x, d) in [(&x.q, &mut found.q), (&x.k, &mut found.k)] {
            // d / n - x (x . d) / n^3, with n = sqrt(|x|^2 + 1e-6)
            let x = row(x, at, of);
            let n = (x.iter().map(|x| x * x).sum::<f64>() + NORM_EPSILON).sqrt();
            let along = x.iter().zip(&*d).map(|(x, d)| x * d).sum::<f64>();
            d.iter_mut().zip(&x).for_each(|(d, x)| *d = *d / n - x * along / n.powi(3));
        }
    }
}

/// `x / sqrt(|x|^2 + 1e-6)`, by definition.
pub(crate) fn unit(x: &mut [f64]) {
    let norm = (x.iter().map(|x| x * x).sum::<f64>() + NORM_EPSILON).sqrt();
    x.iter_mut().for_each(|x| *x /= norm);
}

/// The same of loaded rows.
pub(crate) fn normalize(isa: Isa, rows: &mut [f32], len: usize, dim: usize, stride: usize) {
    isa.dispatch(Normalize { rows, len, dim, stride });
}

/// Arrays whose queries and keys are divided by their norms while they are
/// loaded.
struct Normalized<'a> {
    arrays: Arrays<'a>,
    head_dim: usize,
}

impl Source for Normalized<'_> {
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        self.arrays.queries(isa, at, to, stride);
        isa.dispatch(Normalize { rows: to, len: at.tokens.len(), dim: self.head_dim, stride });
    }

    fn keys(&self, isa: Isa, at: &Place, mut to: Keys<'_>) {
        self.arrays.keys(isa, at, to.reborrow());
        isa.dispatch(Normalize { rows: to.k, len: at.tokens.len(), dim: self.head_dim, stride: to.stride });
    }

    fn streams(&self, at: &Place) -> [Stream; 6] {
        self.arrays.streams(at)
    }

    fn back(&self, isa: Isa, at: &Place, mut of: Back<'_>) {
        normalize_back(isa, &self.arrays, at, &mut of);
    }
}

/// Gradients of queries and keys as they are in the arrays, in place of those of
/// unit length.
fn normalize_back(isa: Isa, arrays: &Arrays<'_>, at: &Place, of: &mut Back<'_>) {
    let (len, dim, stride) = (at.tokens.len(), arrays.q.dim().3, of.stride);
    let raw = &mut *of.scratch;
    arrays.queries(isa, at, raw, stride);
    isa.dispatch(NormalizeBack { raw, given: of.q, gradients: of.d_q, len, dim, stride });
    arrays.key_rows(isa, at, raw, stride);
    isa.dispatch(NormalizeBack { raw, given: of.k, gradients: of.d_k, len, dim, stride });
}

/// Divides rows by their norms: `x / sqrt(|x|^2 + 1e-6)`.
struct Normalize<'a> {
    /// `[len, dim]`, `stride` apart.
    rows: &'a mut [f32],
    len: usize,
    dim: usize,
    stride: usize,
}

/// What a row is multiplied with so that its norm becomes 1, in two steps.
#[inline(always)]
fn factors<S: Simd>(s: S, row: &[f32]) -> (f32, f32) {
    let mut largest = s.splat(0.0);
    let mut sum = s.splat(0.0);
    for x in row.chunks(S::LANES) {
        let x = s.load_tail(x);
        largest = s.max(largest, s.abs(x));
        sum = s.mul_add(x, x, sum);
    }
    let mut sum = s.reduce_add(sum);
    // Squares that would overflow are taken of smaller numbers.
    let shrink = if s.reduce_max(largest) > 1e18 { 2f32.powi(-80) } else { 1.0 };
    if shrink != 1.0 {
        let mut squares = s.splat(0.0);
        for x in row.chunks(S::LANES) {
            let x = s.mul(s.load_tail(x), s.splat(shrink));
            squares = s.mul_add(x, x, squares);
        }
        sum = s.reduce_add(squares);
    }
    (shrink, 1.0 / (sum + NORM_EPSILON as f32 * (shrink * shrink)).sqrt())
}

/// Lanes that add up to the squares of a row.
#[inline(always)]
fn squares<S: Simd>(s: S, row: &[f32]) -> S::F {
    let (whole, tail) = row.split_at(row.len() / S::LANES * S::LANES);
    let mut sum = s.splat(0.0);
    for x in whole.chunks_exact(S::LANES) {
        let x = s.load(x);
        sum = s.mul_add(x, x, sum);
    }
    if !tail.is_empty() {
        let x = s.load_tail(tail);
        sum = s.mul_add(x, x, sum);
    }
    sum
}

impl Kernel for Normalize<'_> {
    type Output = ();

    /// As many rows at a time as there are lanes, whose sums, roots and
    /// quotients are then those of one vector.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for first in (0..self.len).step_by(S::LANES) {
            let rows = &mut self.rows[first * self.stride..];
            let count = (self.len - first).min(S::LANES);
            let mut lanes = [s.splat(0.0); MAX_LANES];
            for t in 0..count {
                lanes[t] = squares(s, &rows[t * self.stride..][..self.dim]);
            }
            let (mut sums, mut each) = ([0f32; MAX_LANES], [0f32; MAX_LANES]);
            s.store(&mut sums, s.reduce_add_each(&lanes));
            for t in 0..MAX_LANES {
                each[t] = 1.0 / (sums[t] + NORM_EPSILON as f32).sqrt();
            }
            for t in 0..count {
                let row = &mut rows[t * self.stride..][..self.dim];
                // Squares that would overflow are taken of smaller numbers.
                let (shrink, factor) = if sums[t] > 1e36 { factors(s, row) } else { (1.0, each[t]) };
                let (whole, tail) = row.split_at_mut(self.dim / S::LANES * S::LANES);
                for x in whole.chunks_exact_mut(S::LANES) {
                    s.store(x, s.mul(s.mul(s.load(x), s.splat(shrink)), s.splat(factor)));
                }
                if !tail.is_empty() {
                    let scaled = s.mul(s.mul(s.load_tail(tail), s.splat(shrink)), s.splat(factor));
                    s.store_tail(tail, scaled);
                }
            }
        }
    }
}

/// Gradients of rows in place of those of the rows divided by their norms: `f
/// (d - y (y . d))`, where `y = f x`.
struct NormalizeBack<'a> {
    /// Rows as they came, and divided by their norms.
    raw: &'a [f32],
    given: &'a [f32],
    gradients: &'a mut [f32],
    len: usize,
    dim: usize,
    stride: usize,
}

impl Kernel for NormalizeBack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for t in 0..self.len {
            let row = t * self.stride..t * self.stride + self.dim;
            let (shrink, factor) = factors(s, &self.raw[row.clone()]);
            let (given, gradients) = (&self.given[row.clone()], &mut self.gradients[row]);
            let mut along = s.splat(0.0);
            for (y, d) in given.chunks(S::LANES).zip(gradients.chunks(S::LANES)) {
                along = s.mul_add(s.load_tail(y), s.load_tail(d), along);
            }
            let along = s.splat(-s.reduce_add(along));
            for (y, d) in given.chunks(S::LANES).zip(gradients.chunks_mut(S::LANES)) {
                let across = s.mul_add(s.load_tail(y), along, s.load_tail(d));
                s.store_tail(d, s.mul(s.mul(across, s.splat(shrink)), s.splat(factor)));
            }
        }
    }
}

#[cfg(test)]
mod tests;
