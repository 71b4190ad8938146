//! Operands of the low-rank rule for mechanisms that remove under another key
//! than they write under: loaded rows become `a`, `b` and the values that are
//! written.

use crate::engine::recur::{Keys, decay_of};
use crate::simd::any::AnyRows;
use crate::simd::{Isa, Kernel, Simd};

/// What the low-rank rule takes of erase gates, in the place of `a`: `a =
/// -(erase * k * exp(decay))`, `b = k`, and `v` times the `write` gates. Decays
/// are those of channels.
pub(crate) fn erase(isa: Isa, to: Keys<'_>, len: usize, write: AnyRows<'_>) {
    isa.dispatch(Erase { to, len, write });
}

struct Erase<'a> {
    to: Keys<'a>,
    len: usize,
    write: AnyRows<'a>,
}

impl Kernel for Erase<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Keys { k, v, decay, a, b, stride, value_stride, .. } = self.to;
        let zero = s.splat(0.0);
        // Rows are whole vectors, zero past their columns.
        let used = self.len * stride;
        for col in (0..used).step_by(S::LANES) {
            let key = s.load(&k[col..]);
            let gone = s.mul(s.mul(s.load(&a[col..]), key), decay_of(s, s.load(&decay[col..])));
            s.store(&mut a[col..], s.sub(zero, gone));
            s.store(&mut b[col..], key);
        }
        for t in 0..self.len {
            for col in (0..self.write.cols()).step_by(S::LANES) {
                let x = &mut v[t * value_stride + col..];
                let written = s.mul(s.load(x), self.write.load(s, t, col));
                s.store(x, written);
            }
        }
    }
}

/// What the low-rank rule takes of keys that predict, in the place of `a`: `a =
/// -beta p`, `b = k`, and values `beta v`. Weights are one a token, in
/// their place.
pub(crate) fn predict(isa: Isa, to: Keys<'_>, len: usize) {
    isa.dispatch(Predict { to, len });
}

struct Predict<'a> {
    to: Keys<'a>,
    len: usize,
}

impl Kernel for Predict<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Keys { k, v, beta, a, b, stride, value_stride, .. } = self.to;
        for (t, &beta) in beta.iter().enumerate().take(self.len) {
            let (less, beta) = (s.splat(-beta), s.splat(beta));
            let row = t * stride..(t + 1) * stride;
            let (k, a, b) = (&k[row.clone()], &mut a[row.clone()], &mut b[row]);
            for col in (0..stride).step_by(S::LANES) {
                let predicted = s.mul(s.load(&a[col..]), less);
                s.store(&mut a[col..], predicted);
                s.store(&mut b[col..], s.load(&k[col..]));
            }
            for x in v[t * value_stride..][..value_stride].chunks_exact_mut(S::LANES) {
                s.store(x, s.mul(s.load(x), beta));
            }
        }
    }
}

/// Rows less `factor` times others, in place.
pub(crate) fn less(isa: Isa, rows: &mut [f32], stride: usize, other: AnyRows<'_>, factor: f32) {
    isa.dispatch(Less { rows, stride, other, factor });
}

struct Less<'a> {
    rows: &'a mut [f32],
    stride: usize,
    other: AnyRows<'a>,
    factor: f32,
}

impl Kernel for Less<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(-self.factor);
        for t in 0..self.other.len() {
            for col in (0..self.other.cols()).step_by(S::LANES) {
                let x = &mut self.rows[t * self.stride + col..];
                let rest = s.mul_add(factor, self.other.load(s, t, col), s.load(x));
                s.store(x, rest);
            }
        }
    }
}
