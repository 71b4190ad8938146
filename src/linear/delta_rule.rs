//! What the mechanisms of the delta rule share: the recurrence, and queries
//! and keys of unit length.

use crate::element::Element;
use crate::engine::recur::{Arrays, Decay, Keys, Place, Read, Rule, Source, Spec};
use crate::input::{Dims, Lengths, Qkv};
use crate::linear::config::Config;
use crate::linear::reference::{Token, Update, number, row};
use crate::simd::{Isa, Kernel, Simd};

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
    pub(crate) fn spec<'a>(&self, dims: Dims, lengths: Lengths<'a>, decay: Decay) -> Spec<'a> {
        Spec {
            dims,
            lengths,
            state_dim: dims.head_dim,
            decay,
            rule: Rule::Delta,
            read: Read::After,
            scale: self.config.scale_or_sqrt(&dims),
            normaliser: None,
            form: self.config.form,
            isa: self.config.isa,
        }
    }

    /// Calls `run` with these operands, queries and keys normalised if that is
    /// asked for.
    pub(crate) fn with_source<R>(
        &self,
        arrays: Arrays<'_>,
        head_dim: usize,
        run: impl FnOnce(&dyn Source) -> R,
    ) -> R {
        if self.normalize { run(&Normalized { arrays, head_dim }) } else { run(&arrays) }
    }

    /// A token, but for its decay: `decay` says what is left of each channel.
    pub(crate) fn token<T: Element>(
        &self,
        qkv: &Qkv<'_, T>,
        beta: &ndarray::ArrayView3<'_, f32>,
        at: &Place,
        decay: Vec<f64>,
    ) -> Token {
        let heads = heads(qkv);
        let unit = |x: Vec<f64>| {
            // x / sqrt(|x|^2 + 1e-6)
            let norm = (x.iter().map(|x| x * x).sum::<f64>() + NORM_EPSILON).sqrt();
            if self.normalize { x.iter().map(|x| x / norm).collect() } else { x }
        };
        Token {
            q: unit(row(&qkv.q, at, heads)),
            k: unit(row(&qkv.k, at, heads)),
            v: row(&qkv.v, at, heads),
            decay,
            update: Update::Delta { beta: number(beta, at, heads) },
            bonus: Vec::new(),
        }
    }
}

/// Heads with a state: as many as the array with the most of them has.
pub(crate) fn heads<T>(x: &Qkv<'_, T>) -> usize {
    x.q.dim().1.max(x.k.dim().1).max(x.v.dim().1)
}

/// Bytes of queries, keys and values.
pub(crate) fn bytes<T>(x: &Qkv<'_, T>) -> usize {
    (x.q.len() + x.k.len() + x.v.len()) * size_of::<T>()
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
}

/// Divides rows by their norms: `x / sqrt(|x|^2 + 1e-6)`.
struct Normalize<'a> {
    /// `[len, dim]`, `stride` apart.
    rows: &'a mut [f32],
    len: usize,
    dim: usize,
    stride: usize,
}

impl Kernel for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows.chunks_exact_mut(self.stride.max(1)).take(self.len) {
            let row = &mut row[..self.dim];
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
            let factor = s.splat(1.0 / (sum + NORM_EPSILON as f32 * (shrink * shrink)).sqrt());
            for x in row.chunks_mut(S::LANES) {
                let scaled = s.mul(s.mul(s.load_tail(x), s.splat(shrink)), factor);
                s.store_tail(x, scaled);
            }
        }
    }
}

#[cfg(test)]
mod tests;
