//! Products and sums of rows.

use crate::engine::recur::backward::*;
use crate::engine::recur::chunk::{BLOCK, COLUMNS, Geometry, PART, SUB, product};
use crate::simd::Simd;
use crate::simd::mem::{Ahead, Rows};
use crate::simd::pack::PackColumns;
use crate::simd::tile::{Update, flush};

/// Rows as columns.
#[inline(always)]
pub(super) fn turn<S: Simd>(
    s: S,
    (from, stride): (&[f32], usize),
    rows: usize,
    cols: usize,
    (to, to_stride): (&mut [f32], usize),
) {
    let from = Rows::of_slice(from, rows, cols, stride);
    s.vectorize(PackColumns { from, to, stride: to_stride });
}

/// `C (+)= A B` for an upper triangular `A` of pairs of `len` tokens.
#[inline(always)]
pub(super) fn upper<S: Simd>(
    s: S,
    a: &[f32],
    (b, ldb): (&[f32], usize),
    (cols, len): (usize, usize),
    (c, ldc): (&mut [f32], usize),
    update: Update<'_>,
    ahead: &mut Ahead,
) {
    for first in (0..len).step_by(BLOCK) {
        let end = (first + BLOCK).min(len);
        let a = Rows::of_slice(&a[first * COLUMNS + first..], end - first, len - first, COLUMNS);
        product(s, a, (&b[first * ldb..], ldb), cols, (&mut c[first * ldc..], ldc), update, ahead);
    }
}

/// Products of rows of `a`, `lda` apart, with the columns of `b` up to the
/// row's own.
#[inline(always)]
pub(super) fn lower_products<S: Simd>(
    s: S,
    (a, lda): (&[f32], usize),
    k: usize,
    b: &[f32],
    len: usize,
    to: &mut [f32],
    ahead: &mut Ahead,
) {
    for first in (0..len).step_by(BLOCK) {
        let end = (first + BLOCK).min(len);
        let a = Rows::of_slice(&a[first * lda..], end - first, k, lda);
        let to = (&mut to[first * COLUMNS..], COLUMNS);
        product(s, a, (b, COLUMNS), end.next_multiple_of(S::LANES), to, Update::Set, ahead);
    }
}

/// `X = R + N X` in place, with `N` strictly upper triangular.
#[inline(always)]
pub(super) fn transposed<S: Simd>(
    s: S,
    n: &[f32],
    x: &mut [f32],
    width: usize,
    len: usize,
    ahead: &mut Ahead,
) {
    for first in (0..len).step_by(SUB).rev() {
        let end = (first + SUB).min(len);
        if end < len {
            let (x, done) = x.split_at_mut(end * width);
            let a = Rows::of_slice(&n[first * COLUMNS + end..], end - first, len - end, COLUMNS);
            product(s, a, (done, width), width, (&mut x[first * width..], width), Update::Add, ahead);
        }
        // Rows of a part take the parts after it all at once.
        for part in (first..end).step_by(PART).rev() {
            let after = (part + PART).min(end);
            if after < end {
                let (x, done) = x.split_at_mut(after * width);
                let a = Rows::of_slice(&n[part * COLUMNS + after..], after - part, end - after, COLUMNS);
                product(s, a, (done, width), width, (&mut x[part * width..], width), Update::Add, ahead);
            }
            for i in (part..after - 1).rev() {
                let (x, done) = x.split_at_mut((i + 1) * width);
                let a = Rows::of_slice(&n[i * COLUMNS + i + 1..], 1, after - i - 1, COLUMNS);
                product(s, a, (done, width), width, (&mut x[i * width..], width), Update::Add, ahead);
            }
        }
    }
}

/// Adds the products of pairs of different tokens, rows less columns; rows
/// that do not meet their own token's decay count for the token before.
#[inline(always)]
pub(super) fn pair_sums(a: &[f32], b: &[f32], len: usize, before: bool, sums: &mut [f64; COLUMNS]) {
    for i in 0..len {
        let (mut row, at) = (0.0, i * COLUMNS);
        for j in 0..i {
            let x = f64::from(a[at + j]) * f64::from(b[at + j]);
            row += x;
            sums[j] -= x;
        }
        sums[i.saturating_sub(usize::from(before))] += row;
    }
}

/// Gradients of one log decay a token in place of what sums up from the end:
/// with what sums up from the start before it, and what all have.
#[inline(always)]
pub(super) fn sum_up(decay: &[f32], all: f64, earlier: &[f64], later: &mut [f64]) {
    let mut sum = 0.0;
    for later in later[..decay.len()].iter_mut().rev() {
        sum += *later;
        *later = sum;
    }
    let mut sum = all;
    for ((later, earlier), &decay) in later.iter_mut().zip(earlier).zip(decay) {
        *later = if decay < NOTHING { 0.0 } else { *later + sum };
        sum += earlier;
    }
}

/// The same for log decays of channels: `gain` sums up from the end, `given`
/// from the start.
#[inline(always)]
pub(super) fn sum_gains<S: Simd>(
    s: S,
    g: &Geometry,
    decay: &[f32],
    all: &[f32],
    given: &[f32],
    gain: &[f32],
    to: &mut [f32],
) {
    let len = decay.len() / g.stride;
    for col in (0..g.stride).step_by(S::LANES) {
        let mut sum = s.load(&all[col..]);
        for t in 0..len {
            let at = t * g.stride + col;
            s.store(&mut to[at..], sum);
            sum = s.add(sum, s.load(&given[at..]));
        }
        let mut sum = s.splat(0.0);
        for t in (0..len).rev() {
            let at = t * g.stride + col;
            sum = s.add(sum, s.load(&gain[at..]));
            let x = s.add(s.load(&to[at..]), sum);
            let nothing = s.lt(s.load(&decay[at..]), s.splat(NOTHING));
            s.store(&mut to[at..], s.select(nothing, s.splat(0.0), x));
        }
    }
}

#[inline(always)]
pub(super) fn scale_in_place<S: Simd>(s: S, x: &mut [f32], factor: f32) {
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(x, s.mul(s.load(x), s.splat(factor)));
    }
}

#[inline(always)]
pub(super) fn divide_in_place<S: Simd>(s: S, x: &mut [f32], by: &[f32]) {
    for (x, by) in x.chunks_exact_mut(S::LANES).zip(by.chunks_exact(S::LANES)) {
        s.store(x, s.div(s.load(x), s.load(by)));
    }
}

/// `to += factor * from`
#[inline(always)]
pub(super) fn add_scaled<S: Simd>(s: S, to: &mut [f32], from: &[f32], factor: f32) {
    for (to, from) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
        s.store(to, s.mul_add(s.load(from), s.splat(factor), s.load(to)));
    }
}

/// `to += factor * a * b`
#[inline(always)]
pub(super) fn add_products<S: Simd>(s: S, to: &mut [f32], a: &[f32], b: &[f32], factor: f32) {
    for ((to, a), b) in
        to.chunks_exact_mut(S::LANES).zip(a.chunks_exact(S::LANES)).zip(b.chunks_exact(S::LANES))
    {
        let a = s.mul(s.load(a), s.splat(factor));
        s.store(to, s.mul_add(a, s.load(b), s.load(to)));
    }
}

/// `x *= by`, never subnormal.
#[inline(always)]
pub(super) fn decay_in_place<S: Simd>(s: S, x: &mut [f32], by: &[f32]) {
    for (x, by) in x.chunks_exact_mut(S::LANES).zip(by.chunks_exact(S::LANES)) {
        s.store(x, flush(s, s.mul(s.load(x), s.load(by))));
    }
}
