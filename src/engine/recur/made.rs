//! Operands that are made of arrays when these have been loaded.

use crate::engine::recur::source::{Arrays, Keys, Place, Source};
use crate::math::gates::{forget_of, softplus_of};
use crate::simd::exp::sigmoid;
use crate::simd::mem::Stream;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

/// Arrays of which operands are made when they have been loaded: of queries
/// and of keys with what belongs to them.
pub(crate) struct Made<'a, Q, K> {
    pub(crate) arrays: Arrays<'a>,
    pub(crate) queries: Q,
    pub(crate) keys: K,
}

impl<Q, K> Source for Made<'_, Q, K>
where
    Q: Fn(Isa, &Place, &mut [f32], usize) + Sync,
    K: Fn(Isa, &Place, Keys<'_>) + Sync,
{
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        self.arrays.queries(isa, at, to, stride);
        (self.queries)(isa, at, to, stride);
    }

    fn keys(&self, isa: Isa, at: &Place, mut to: Keys<'_>) {
        self.arrays.keys(isa, at, to.reborrow());
        (self.keys)(isa, at, to);
    }

    fn streams(&self, at: &Place) -> [Stream; 6] {
        self.arrays.streams(at)
    }

    fn bonus(&self, head: usize) -> &[f32] {
        self.arrays.bonus(head)
    }

    fn skip(&self, head: usize) -> &[f32] {
        self.arrays.skip(head)
    }

    fn keep(&self, head: usize) -> f64 {
        self.arrays.keep(head)
    }
}

/// Queries as they are loaded.
pub(crate) fn as_loaded(_: Isa, _: &Place, _: &mut [f32], _: usize) {}

/// Makes log decays of what steps are made of, and scales rows of keys by
/// steps.
pub(crate) struct Discretise<'a> {
    pub(crate) k: &'a mut [f32],
    /// One a token.
    pub(crate) decay: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) bias: f32,
    pub(crate) limits: (f32, f32),
    pub(crate) rate: f32,
}

impl Kernel for Discretise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (least, most) = (s.splat(self.limits.0), s.splat(self.limits.1));
        let (bias, rate) = (s.splat(self.bias), s.splat(self.rate));
        let mut steps = [0f32; MAX_LANES];
        for (i, decay) in self.decay.chunks_mut(S::LANES).enumerate() {
            let step = softplus_of(s, s.add(s.load_tail(decay), bias));
            // The order of the operands keeps NaN.
            let step = s.min(most, s.max(least, step));
            s.store(&mut steps, step);
            s.store_tail(decay, s.mul(step, rate));
            for (j, step) in steps[..decay.len()].iter().enumerate() {
                let row = &mut self.k[(i * S::LANES + j) * self.stride..][..self.stride];
                for x in row.chunks_exact_mut(S::LANES) {
                    s.store(x, s.mul(s.load(x), s.splat(*step)));
                }
            }
        }
    }
}

/// Makes rows of keys and of log decays of rows of logits.
pub(crate) struct Forget<'a> {
    pub(crate) k: &'a mut [f32],
    /// The logits.
    pub(crate) decay: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) len: usize,
    pub(crate) dim: usize,
    pub(crate) bound: &'a [f32],
}

impl Kernel for Forget<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for t in 0..self.len {
            let k = &mut self.k[t * self.stride..][..self.dim];
            let decay = &mut self.decay[t * self.stride..][..self.dim];
            for col in (0..self.dim).step_by(S::LANES) {
                let end = (col + S::LANES).min(self.dim);
                let bound = match self.bound {
                    [all] => s.splat(*all),
                    each => s.load_tail(&each[col..end]),
                };
                let (forgotten, kept) = forget_of(s, s.load_tail(&decay[col..end]), bound);
                s.store_tail(&mut k[col..end], forgotten);
                s.store_tail(&mut decay[col..end], kept);
            }
        }
    }
}

/// Makes rows of log decays of rows of raw numbers: `bound sigmoid(rate (raw +
/// bias))`.
pub(crate) struct Bound<'a> {
    pub(crate) decay: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) len: usize,
    pub(crate) dim: usize,
    pub(crate) bound: f32,
    pub(crate) rate: f32,
    /// One a channel, or none.
    pub(crate) bias: &'a [f32],
}

impl Kernel for Bound<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (bound, rate) = (s.splat(self.bound), s.splat(self.rate));
        for row in self.decay.chunks_exact_mut(self.stride.max(1)).take(self.len) {
            for col in (0..self.dim).step_by(S::LANES) {
                let row = &mut row[col..self.dim];
                let bias = s.load_tail(self.bias.get(col..).unwrap_or_default());
                let gate = sigmoid(s, s.mul(rate, s.add(s.load_tail(row), bias)));
                s.store_tail(row, s.mul(bound, gate));
            }
        }
    }
}

/// `a = -kappa` and `b = kappa * rate`, in place.
pub(crate) struct Remove<'a> {
    pub(crate) kappa: &'a mut [f32],
    pub(crate) rate: &'a mut [f32],
}

impl Kernel for Remove<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // Rows are whole vectors.
        for (a, b) in self.kappa.chunks_exact_mut(S::LANES).zip(self.rate.chunks_exact_mut(S::LANES)) {
            let kappa = s.load(a);
            s.store(a, s.sub(s.splat(0.0), kappa));
            s.store(b, s.mul(kappa, s.load(b)));
        }
    }
}
