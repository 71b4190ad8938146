//! Operands that are made of arrays when these have been loaded.

use crate::engine::recur::source::{Arrays, Back, Keys, Place, Source};
use crate::math::gates::{forget_of, softplus_of};
use crate::simd::exp::{exp, sigmoid, sigmoids};
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

    fn remembers(&self, head: usize) -> usize {
        self.arrays.remembers(head)
    }

    fn keep(&self, head: usize) -> f64 {
        self.arrays.keep(head)
    }
}

/// The same with gradients: `back` is [`Source::back`].
pub(crate) struct Undone<'a, Q, K, B> {
    pub(crate) made: Made<'a, Q, K>,
    pub(crate) back: B,
}

impl<Q, K, B> Source for Undone<'_, Q, K, B>
where
    Q: Fn(Isa, &Place, &mut [f32], usize) + Sync,
    K: Fn(Isa, &Place, Keys<'_>) + Sync,
    B: Fn(Isa, &Place, Back<'_>) + Sync,
{
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        self.made.queries(isa, at, to, stride);
    }

    fn keys(&self, isa: Isa, at: &Place, to: Keys<'_>) {
        self.made.keys(isa, at, to);
    }

    fn streams(&self, at: &Place) -> [Stream; 6] {
        self.made.streams(at)
    }

    fn bonus(&self, head: usize) -> &[f32] {
        self.made.bonus(head)
    }

    fn remembers(&self, head: usize) -> usize {
        self.made.remembers(head)
    }

    fn keep(&self, head: usize) -> f64 {
        self.made.keep(head)
    }

    fn skip(&self, head: usize) -> &[f32] {
        self.made.skip(head)
    }

    fn back(&self, isa: Isa, at: &Place, of: Back<'_>) {
        (self.back)(isa, at, of);
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

/// Gradients of [`Discretise`]: those of keys become those of keys before their
/// steps, those of log decays those of what steps are made of.
pub(crate) struct DiscretiseBack<'a> {
    /// Keys before their steps, `dim` of the `stride` columns.
    pub(crate) k: &'a [f32],
    pub(crate) d_k: &'a mut [f32],
    pub(crate) dim: usize,
    pub(crate) stride: usize,
    /// Log decays, one a token.
    pub(crate) decay: &'a [f32],
    pub(crate) d_decay: &'a mut [f32],
    /// What steps are made of, one a token.
    pub(crate) raw: &'a [f32],
    pub(crate) bias: f32,
    pub(crate) limits: (f32, f32),
    pub(crate) rate: f32,
    /// Of the logarithm of the rate, and of the bias.
    pub(crate) parameters: &'a mut [f64],
}

impl Kernel for DiscretiseBack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (least, most) = (s.splat(self.limits.0), s.splat(self.limits.1));
        let (bias, rate) = (s.splat(self.bias), s.splat(self.rate));
        let zero = s.splat(0.0);
        let (mut of_rate, mut of_bias) = (zero, zero);
        for first in (0..self.raw.len()).step_by(S::LANES) {
            let tokens = first..(first + S::LANES).min(self.raw.len());
            let raw = s.add(s.load_tail(&self.raw[tokens.clone()]), bias);
            let free = softplus_of(s, raw);
            let step = s.min(most, s.max(least, free));
            let (mut steps, mut along) = ([0f32; MAX_LANES], [0f32; MAX_LANES]);
            s.store(&mut steps, step);
            for t in tokens.clone() {
                let row = t * self.stride..t * self.stride + self.dim;
                let (k, d_k) = (&self.k[row.clone()], &mut self.d_k[row]);
                let factor = s.splat(steps[t - first]);
                let mut sum = zero;
                for (k, d) in k.chunks(S::LANES).zip(d_k.chunks_mut(S::LANES)) {
                    let old = s.load_tail(d);
                    sum = s.mul_add(s.load_tail(k), old, sum);
                    s.store_tail(d, s.mul(old, factor));
                }
                along[t - first] = s.reduce_add(sum);
            }
            let d_decay = &mut self.d_decay[tokens.clone()];
            let d_log = s.load_tail(d_decay);
            // A decay that leaves nothing has no gradient, whatever its logarithm is.
            let met = s.mul(d_log, s.load_tail(&self.decay[tokens.clone()]));
            let met = s.select(s.lt(s.abs(d_log), s.splat(f32::MIN_POSITIVE)), zero, met);
            of_rate = s.add(of_rate, met);
            let d_step = s.mul_add(rate, d_log, s.load(&along));
            let d_raw = s.mul(d_step, sigmoid(s, raw));
            // A step at a limit stays there.
            let d_raw = s.select(s.lt(free, least), zero, d_raw);
            let d_raw = s.select(s.lt(most, free), zero, d_raw);
            s.store_tail(d_decay, d_raw);
            of_bias = s.add(of_bias, s.load_tail(&self.d_decay[tokens]));
        }
        self.parameters[0] += f64::from(s.reduce_add(of_rate));
        self.parameters[1] += f64::from(s.reduce_add(of_bias));
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

/// Gradients of [`Forget`]: those of log decays become those of logits, to
/// which keys and log decays give.
pub(crate) struct ForgetBack<'a> {
    pub(crate) logits: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) d_k: &'a [f32],
    pub(crate) d_decay: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) len: usize,
    pub(crate) dim: usize,
    pub(crate) bound: &'a [f32],
}

impl Kernel for ForgetBack<'_> {
    type Output = ();

    /// With `f` what remains and `k` what is forgotten, `df/dx = -dk/dx = k
    /// sigmoid(x)`, and `sigmoid(x) / f = 1 / (1 + bound e^-x)`.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (zero, one) = (s.splat(0.0), s.splat(1.0));
        for t in 0..self.len {
            for col in (0..self.dim).step_by(S::LANES) {
                let end = (col + S::LANES).min(self.dim);
                let at = t * self.stride + col..t * self.stride + end;
                let bound = match self.bound {
                    [all] => s.splat(*all),
                    each => s.load_tail(&each[col..end]),
                };
                let x = s.load_tail(&self.logits[at.clone()]);
                // Not so large that 0 times it is no number; NaN stays.
                let grown = exp(s, s.min(s.splat(80.0), s.sub(zero, x)));
                let share = s.div(one, s.mul_add(bound, grown, one));
                let of_decay = s.mul(share, s.load_tail(&self.d_decay[at.clone()]));
                let of_key = s.mul(sigmoid(s, x), s.load_tail(&self.d_k[at.clone()]));
                let d = s.mul(s.load_tail(&self.k[at.clone()]), s.sub(of_decay, of_key));
                s.store_tail(&mut self.d_decay[at], d);
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

/// Gradients of [`Bound`]: those of log decays become those of raw numbers.
pub(crate) struct BoundBack<'a> {
    /// Raw numbers.
    pub(crate) raw: &'a [f32],
    pub(crate) d_decay: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) len: usize,
    pub(crate) dim: usize,
    pub(crate) bound: f32,
    pub(crate) rate: f32,
    /// One a channel, or none.
    pub(crate) bias: &'a [f32],
    /// Of the logarithm of the rate, and of biases: each there or not.
    pub(crate) of_rate: &'a mut [f64],
    pub(crate) of_bias: &'a mut [f64],
}

impl Kernel for BoundBack<'_> {
    type Output = ();

    /// With `x = rate (raw + bias)`, `dg/dx = bound sigmoid(x) sigmoid(-x)`.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { raw, d_decay, stride, len, dim, bias, of_rate, of_bias, .. } = self;
        let (bound, rate, zero) = (s.splat(self.bound), s.splat(self.rate), s.splat(0.0));
        for col in (0..dim).step_by(S::LANES) {
            let end = (col + S::LANES).min(dim);
            let bias = s.load_tail(bias.get(col..).unwrap_or_default());
            let (mut by_rate, mut by_bias) = (zero, zero);
            for t in 0..len {
                let at = t * stride + col..t * stride + end;
                let x = s.mul(rate, s.add(s.load_tail(&raw[at.clone()]), bias));
                let (open, shut) = sigmoids(s, x);
                let slope = s.mul(s.mul(bound, open), shut);
                let d_x = s.mul(slope, s.load_tail(&d_decay[at.clone()]));
                // At either end nothing moves, however far it is.
                let flat = s.lt(s.abs(slope), s.splat(f32::MIN_POSITIVE));
                by_rate = s.add(by_rate, s.select(flat, zero, s.mul(d_x, x)));
                let d_raw = s.select(flat, zero, s.mul(d_x, rate));
                by_bias = s.add(by_bias, d_raw);
                s.store_tail(&mut d_decay[at], d_raw);
            }
            if let [of_rate] = of_rate {
                *of_rate += f64::from(s.reduce_add(by_rate));
            }
            let mut each = [0f32; MAX_LANES];
            s.store(&mut each, by_bias);
            for (to, x) in of_bias.iter_mut().skip(col).zip(&each) {
                *to += f64::from(*x);
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

/// Gradients of [`Remove`]: those of `a` and `b` become those of `kappa` and
/// the rate.
pub(crate) struct RemoveBack<'a> {
    /// `-kappa`
    pub(crate) a: &'a [f32],
    pub(crate) rate: &'a [f32],
    pub(crate) d_a: &'a mut [f32],
    pub(crate) d_b: &'a mut [f32],
}

impl Kernel for RemoveBack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let given = self.a.chunks_exact(S::LANES).zip(self.rate.chunks_exact(S::LANES));
        let gradients = self.d_a.chunks_exact_mut(S::LANES).zip(self.d_b.chunks_exact_mut(S::LANES));
        for ((a, rate), (d_a, d_b)) in given.zip(gradients) {
            let of_b = s.load(d_b);
            s.store(d_a, s.sub(s.mul(of_b, s.load(rate)), s.load(d_a)));
            s.store(d_b, s.sub(s.splat(0.0), s.mul(of_b, s.load(a))));
        }
    }
}
