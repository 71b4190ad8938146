//! Decays of scores and rows, and the triangular system of corrections.

use crate::engine::recur::chunk::*;
use crate::simd::Simd;
use crate::simd::exp::exp;
use crate::simd::mem::{Ahead, Rows};
use crate::simd::tile::{self, Product, ProductAhead, Update};

/// The sum of the elements times 0, lane by lane: 0 if they are finite, else NaN.
#[inline(always)]
pub(in crate::engine::recur) fn zeros<S: Simd>(s: S, x: &[f32]) -> S::F {
    let mut zero = s.splat(0.0);
    for x in x.chunks_exact(S::LANES) {
        zero = s.mul_add(s.load(x), s.splat(0.0), zero);
    }
    zero
}

/// `C (+)= A B` over any number of columns, panel by panel. Rows of `b` are
/// `ldb` apart. Meanwhile what comes next is prefetched.
#[inline(always)]
pub(crate) fn product<S: Simd>(
    s: S,
    a: Rows<'_, f32>,
    (b, ldb): (&[f32], usize),
    cols: usize,
    (c, ldc): (&mut [f32], usize),
    update: Update<'_>,
    ahead: &mut Ahead,
) {
    let panel = S::LANES * S::TILE_VECTORS;
    for col in (0..cols).step_by(panel) {
        let width = (cols - col).min(panel);
        // A product over no tokens has no rows of B to start from.
        let b = if a.cols() == 0 { &[] } else { &b[col..] };
        let b = Rows::of_slice(b, a.cols(), width, ldb);
        let product = Product { a, b, c: &mut c[col..], ldc, update };
        s.vectorize(ProductAhead { product, ahead });
    }
}

/// `X = R + N X` in place, for `len` rows of `x`.
#[inline(always)]
pub(in crate::engine::recur) fn triangular<S: Simd>(
    s: S,
    (n, ldn): (&[f32], usize),
    (x, ldx): (&mut [f32], usize),
    width: usize,
    len: usize,
    ahead: &mut Ahead,
) {
    for first in (0..len).step_by(SUB) {
        let end = (first + SUB).min(len);
        if first > 0 {
            let (done, x) = x.split_at_mut(first * ldx);
            let a = Rows::of_slice(&n[first * ldn..], end - first, first, ldn);
            product(s, a, (done, ldx), width, (x, ldx), Update::Add, ahead);
        }
        // Rows of a part take the parts before it all at once.
        for part in (first..end).step_by(PART) {
            let rows = (end - part).min(PART);
            let (done, x) = x.split_at_mut(part * ldx);
            let a = Rows::of_slice(&n[part * ldn + first..], rows, part - first, ldn);
            product(s, a, (&done[first * ldx..], ldx), width, (x, ldx), Update::Add, ahead);
            for i in 1..rows {
                let (done, x) = x.split_at_mut(i * ldx);
                let a = Rows::of_slice(&n[(part + i) * ldn + part..], 1, i, ldn);
                product(s, a, (done, ldx), width, (x, ldx), Update::Add, ahead);
            }
        }
    }
}

/// Sums of log decays from the chunk's start to before token `t`. In `f64`:
/// their differences count.
#[inline(always)]
pub(in crate::engine::recur) fn sums(decays: &[f32]) -> [f64; COLUMNS + 1] {
    let mut sums = [0f64; COLUMNS + 1];
    for (t, &decay) in decays.iter().enumerate() {
        sums[t + 1] = sums[t] + f64::from(if decay < FORGET { FORGET } else { decay });
    }
    sums
}

/// Multiplies a row of scores by `factor`, and by the decays from after each
/// of the `seen` keys up to where `sums[to]` is.
#[inline(always)]
pub(in crate::engine::recur) fn decay_scores<S: Simd>(
    s: S,
    row: &mut [f32],
    decay: Option<(&[f64], usize)>,
    seen: usize,
    factor: f32,
) {
    let mut factors = [0f32; COLUMNS];
    if let Some((sums, to)) = decay {
        for (j, factor) in factors[..seen].iter_mut().enumerate() {
            *factor = (sums[to] - sums[j + 1]) as f32;
        }
        decays(s, &mut factors[..row.len()]);
    } else {
        factors.fill(1.0);
    }
    for (row, factors) in row.chunks_exact_mut(S::LANES).zip(factors.chunks_exact(S::LANES)) {
        let factor = s.mul(s.load(factors), s.splat(factor));
        s.store(row, s.mul(s.load(row), factor));
    }
}

/// `e^x` of a log decay, exactly 0 rather than subnormal.
#[inline(always)]
pub(crate) fn decay_of<S: Simd>(s: S, x: S::F) -> S::F {
    s.select(s.lt(x, s.splat(-87.0)), s.splat(0.0), exp(s, x))
}

/// [`decay_of`] in place, for whole vectors.
#[inline(always)]
pub(in crate::engine::recur) fn decays<S: Simd>(s: S, x: &mut [f32]) {
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(x, decay_of(s, s.load(x)));
    }
}

#[inline(always)]
pub(in crate::engine::recur) fn scale_row<S: Simd>(s: S, from: &[f32], factor: f32, to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
        s.store(to, s.mul(s.load(from), s.splat(factor)));
    }
}

/// Products of decays, exactly 0 rather than subnormal, which is slow.
#[inline(always)]
pub(in crate::engine::recur) fn multiply_in_place<S: Simd>(s: S, x: &mut [f32], by: &[f32]) {
    for (x, by) in x.chunks_exact_mut(S::LANES).zip(by.chunks_exact(S::LANES)) {
        s.store(x, tile::decay(s, s.load(x), s.load(by)));
    }
}

/// `sum a b c`, where no `c` is 1.
#[inline(always)]
pub(in crate::engine::recur) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32], c: Option<&[f32]>) -> f32 {
    let mut sum = s.splat(0.0);
    for (i, (a, b)) in a.chunks(S::LANES).zip(b.chunks(S::LANES)).enumerate() {
        let (a, b) = (s.load_tail(a), s.load_tail(b));
        let a = match c {
            Some(c) => s.mul(a, s.load_tail(&c[i * S::LANES..][..S::LANES.min(c.len() - i * S::LANES)])),
            None => a,
        };
        sum = s.mul_add(a, b, sum);
    }
    s.reduce_add(sum)
}
