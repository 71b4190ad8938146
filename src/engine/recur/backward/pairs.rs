//! Pairs of tokens of a chunk.

use std::ops::Range;

use crate::engine::recur::backward::*;
use crate::engine::recur::chunk::{BLOCK, COLUMNS, Geometry, SUB, decay_of, multiply_in_place, product};
use crate::simd::Simd;
use crate::simd::mem::{Ahead, Rows};
use crate::simd::tile::{Update, flush};

/// What is made of the log decays of a sub-block, row by row: factors token by
/// token, from its start up to and with each token, and from after each token
/// to its end.
#[inline(always)]
pub(super) fn sub_decays<S: Simd>(
    s: S,
    decay: &[f32],
    stride: usize,
    each: &mut [f32],
    since: &mut [f32],
    until: &mut [f32],
) {
    let len = decay.len() / stride.max(1);
    for col in (0..stride).step_by(S::LANES) {
        let mut past = s.splat(1.0);
        for t in 0..len {
            let left = decay_of(s, s.load(&decay[t * stride + col..]));
            s.store(&mut each[t * stride + col..], left);
            past = flush(s, s.mul(past, left));
            s.store(&mut since[t * stride + col..], past);
        }
        let mut left = s.splat(1.0);
        for t in (0..len).rev() {
            s.store(&mut until[t * stride + col..], left);
            left = flush(s, s.mul(left, s.load(&each[t * stride + col..])));
        }
    }
}

/// Pairs of tokens of a chunk.
pub(super) struct Pairs<'a> {
    pub(super) g: Geometry,
    pub(super) len: usize,
    pub(super) decays: &'a Decays<&'a mut [f32]>,
    /// Whether no decays are between: they are in the rows already.
    pub(super) plain: bool,
}

impl Pairs<'_> {
    /// Adds up, or sets,
    ///
    /// ```text
    /// d_left_i = sum_{j <= i} weights_ij decay_ij right_j
    /// d_right_j = sum_{i >= j} weights_ij decay_ij left_i
    /// ```
    ///
    /// where decays of channels are between `j` and `i`, that of `i` itself
    /// included unless left rows come `before` it, if they are not `plain`
    /// pairs; those of tokens are in the weights already, which are 0 for `j > i`.
    /// With decays of channels no token may go with itself.
    #[inline(always)]
    pub(super) fn spread<S: Simd>(
        &self,
        s: S,
        (weights, before): (&[f32], bool),
        (left, right): (&[f32], &[f32]),
        [turned, moving, part]: [&mut [f32]; 3],
        [(d_left, update_left), (d_right, update)]: [(&mut [f32], Update<'_>); 2],
        ahead: &mut Ahead,
    ) {
        let (g, len) = (self.g, self.len);
        turn(s, (weights, COLUMNS), len, len, (turned, COLUMNS));
        if self.plain {
            for first in (0..len).step_by(BLOCK) {
                let end = (first + BLOCK).min(len);
                let weights = Rows::of_slice(&weights[first * COLUMNS..], end - first, end, COLUMNS);
                let to = (&mut d_left[first * g.stride..], g.stride);
                product(s, weights, (right, g.stride), g.stride, to, update_left, ahead);
            }
            upper(s, turned, (left, g.stride), (g.stride, len), (d_right, g.stride), update, ahead);
            return;
        }
        let Decays { since, until, .. } = self.decays;
        // Left rows that come before a decay have that of the row before.
        let behind = if before { g.stride } else { 0 };
        // Queries come back to the end of each sub-block.
        for first in (0..len).step_by(SUB).rev() {
            let end = (first + SUB).min(len);
            let rows = first * g.stride..end * g.stride;
            let part = &mut part[rows.clone()];
            part.fill(0.0);
            if end < len {
                let weights =
                    Rows::of_slice(&turned[first * COLUMNS + end..], end - first, len - end, COLUMNS);
                let from = (&moving[end * g.stride..], g.stride);
                product(s, weights, from, g.stride, (part, g.stride), Update::Set, ahead);
                multiply_in_place(s, part, &until[rows.clone()]);
            }
            if update == Update::Set {
                d_right[rows.clone()].copy_from_slice(part);
            } else {
                add_scaled(s, &mut d_right[rows.clone()], part, 1.0);
            }
            let all = &since[rows.end - g.stride..rows.end];
            for row in moving[rows.end..len * g.stride].chunks_exact_mut(g.stride) {
                decay_in_place(s, row, all);
            }
            moving[rows.clone()].copy_from_slice(&left[rows.clone()]);
            decay_in_place(s, &mut moving[rows.start + behind..rows.end], &since[rows.start..]);
        }
        // Keys come along to the start of each sub-block.
        for first in (0..len).step_by(SUB) {
            let end = (first + SUB).min(len);
            let rows = first * g.stride..end * g.stride;
            let set = update_left == Update::Set;
            let to = if set { &mut d_left[rows.clone()] } else { &mut part[rows.clone()] };
            to.fill(0.0);
            if first > 0 {
                let weights = Rows::of_slice(&weights[first * COLUMNS..], end - first, first, COLUMNS);
                product(s, weights, (moving, g.stride), g.stride, (to, g.stride), Update::Set, ahead);
                decay_in_place(s, &mut to[behind..], &since[rows.start..]);
            }
            if !set {
                add_scaled(s, &mut d_left[rows.clone()], &part[rows.clone()], 1.0);
            }
            let all = &since[rows.end - g.stride..rows.end];
            for row in moving[..rows.start].chunks_exact_mut(g.stride) {
                decay_in_place(s, row, all);
            }
            moving[rows.clone()].copy_from_slice(&right[rows.clone()]);
            decay_in_place(s, &mut moving[rows.clone()], &until[rows]);
            if before {
                self.within::<S, true>(s, weights, (left, right), first..end, (d_left, d_right));
            } else {
                self.within::<S, false>(s, weights, (left, right), first..end, (d_left, d_right));
            }
        }
    }

    /// Adds what the pairs within a sub-block give, whose decays are
    /// multiplied up token by token.
    #[inline(always)]
    pub(super) fn within<S: Simd, const BEFORE: bool>(
        &self,
        s: S,
        weights: &[f32],
        (left, right): (&[f32], &[f32]),
        tokens: Range<usize>,
        (d_left, d_right): (&mut [f32], &mut [f32]),
    ) {
        let stride = self.g.stride;
        for col in (0..stride).step_by(S::LANES) {
            for j in tokens.clone() {
                let key = s.load(&right[j * stride + col..]);
                let mut decay = s.splat(1.0);
                let mut sum = s.load(&d_right[j * stride + col..]);
                for i in j + 1..tokens.end {
                    let at = i * stride + col;
                    let past = decay;
                    decay = flush(s, s.mul(decay, s.load(&self.decays.each[at..])));
                    let between = if BEFORE { past } else { decay };
                    let weight = s.mul(between, s.splat(weights[i * COLUMNS + j]));
                    sum = s.mul_add(weight, s.load(&left[at..]), sum);
                    let to = s.mul_add(weight, key, s.load(&d_left[at..]));
                    s.store(&mut d_left[at..], to);
                }
                s.store(&mut d_right[j * stride + col..], sum);
            }
        }
    }
}
