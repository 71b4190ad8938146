//! A chunk forwards: its operands, corrections, and the state after it.

use crate::engine::recur::backward::*;
use crate::engine::recur::chunk::{
    BLOCK, COLUMNS, Prepare, Prepared, multiply_in_place, product, scale_row, triangular,
};
use crate::engine::recur::{Place, Rule};
use crate::simd::mem::{self, Ahead, Rows, Stream};
use crate::simd::tile::Update;
use crate::simd::{Kernel, Simd};

/// A chunk of a head.
pub(super) struct Task<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) plan: &'a Plan,
    pub(super) at: Place,
    /// The chunk that comes next.
    pub(super) following: Option<Place>,
}

impl Task<'_> {
    /// What will be read for the next chunk, to be prefetched while this one is
    /// worked on, and where the gradients of this one go, if there are some.
    pub(super) fn ahead(&self, out: Option<[Stream; 6]>) -> Ahead {
        let mut streams = [Stream::NONE; mem::STREAMS];
        if let Some(out) = out {
            streams[..6].copy_from_slice(&out);
        }
        if let Some(at) = &self.following {
            let [k, v, q, decay, a, b] = self.call.source.streams(at);
            streams[6..11].copy_from_slice(&[k, v, decay, a, b]);
            if out.is_some() {
                let d_out = self.call.d_out.rows(at.batch, at.head, &at.tokens).stream();
                streams[11..].copy_from_slice(&[q, d_out]);
            }
        }
        Ahead::new(streams)
    }

    /// Loads a chunk and prepares what does not depend on a state, the
    /// coefficients of corrections without their beta; scores if queries `read`.
    /// Returns whether keys have been divided by their decays from the start of
    /// the chunk.
    #[inline(always)]
    pub(super) fn prepare<S: Simd>(
        &self,
        s: S,
        scratch: &mut Scratch<'_>,
        read: bool,
        ahead: &mut Ahead,
    ) -> bool {
        let (g, spec, len) = (self.plan.g, self.call.spec, self.at.tokens.len());
        let work = &mut scratch.work;
        work.load_keys(spec, &g, self.call.source, &self.at);
        scratch.keys[..len * g.stride].copy_from_slice(&work.k[..len * g.stride]);
        if g.rule == Rule::LowRank {
            scratch.b[..len * g.stride].copy_from_slice(&work.b[..len * g.stride]);
        }
        scratch.beta[..len].copy_from_slice(&work.beta[..len]);
        work.beta[..len].fill(1.0);
        let to = Prepared::of(scratch.piece, &g);
        let (source, at) = (self.call.source, self.at.clone());
        let mut prepare = Prepare { spec, g, source, at, to, values: &mut [], read, work, ahead };
        let whole = prepare.fits_whole(s);
        prepare.weigh(s, whole);
        // Of later tokens nothing is seen.
        let to = Prepared::of(scratch.piece, &g);
        for row in 0..len * COLUMNS / g.chunk {
            // Rows of both halves of the low-rank rule's columns.
            let (t, row) = (row * g.chunk / COLUMNS, row * g.chunk..(row + 1) * g.chunk);
            to.scores[row.clone()][t + 1..].fill(0.0);
            if g.rule != Rule::Add {
                to.coefficients[row][t..].fill(0.0);
            }
        }
        whole
    }

    /// What is written under the keys of a chunk that has been prepared.
    #[inline(always)]
    pub(super) fn correct<S: Simd>(&self, s: S, scratch: &mut Scratch<'_>, state: &[f32], ahead: &mut Ahead) {
        let (g, len) = (self.plan.g, self.at.tokens.len());
        if g.rule == Rule::Add {
            return;
        }
        let Scratch { work, piece, beta, r, e, weights, .. } = scratch;
        let from = Prepared::of_ready(piece, &g);
        if g.rule == Rule::LowRank {
            for first in (0..len).step_by(BLOCK) {
                let end = (first + BLOCK).min(len);
                let a = Rows::of_slice(&from.coefficients[first * COLUMNS..], end - first, end, COLUMNS);
                let e = (&mut e[first * g.width..], g.width);
                product(s, a, (work.v, g.width), g.width, e, Update::Set, ahead);
            }
            let reads = Rows::of_slice(from.probes, len, g.rows, g.stride);
            product(s, reads, (state, self.plan.stride), g.width, (e, g.width), Update::Add, ahead);
            let among = (&from.coefficients[g.chunk..], COLUMNS);
            triangular(s, among, (e, g.width), g.width, len, ahead);
            return;
        }
        r[..len * g.width].copy_from_slice(&work.v[..len * g.width]);
        let reads = Rows::of_slice(from.probes, len, g.rows, g.stride);
        product(s, reads, (state, self.plan.stride), g.width, (r, g.width), Update::Add, ahead);
        // r = r - G diag(beta) r
        let mut factors = [0f32; COLUMNS];
        factors[..len].copy_from_slice(&beta[..len]);
        weights[..len * COLUMNS].copy_from_slice(&from.coefficients[..len * COLUMNS]);
        for row in weights.chunks_exact_mut(COLUMNS).take(len) {
            multiply_in_place(s, row, &factors);
        }
        triangular(s, (weights, COLUMNS), (r, g.width), g.width, len, ahead);
        for t in 0..len {
            let row = t * g.width..(t + 1) * g.width;
            scale_row(s, &r[row.clone()], beta[t], &mut e[row]);
        }
    }
}

/// The state at the end of a chunk in place of that at its start, and, where there is
/// room, what [corrections](Task::correct) have made: `r` of the delta rule, `e` of the
/// low-rank one.
pub(super) struct Forth<'a, 'b> {
    pub(super) task: Task<'a>,
    pub(super) scratch: &'a mut Scratch<'b>,
    pub(super) state: &'a mut [f32],
    pub(super) corrected: &'a mut [f32],
}

impl Kernel for Forth<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, scratch, state, corrected } = self;
        let (g, len) = (task.plan.g, task.at.tokens.len());
        let ahead = &mut task.ahead(None);
        task.prepare(s, scratch, false, ahead);
        task.correct(s, scratch, state, ahead);
        if !corrected.is_empty() {
            let from = if g.rule == Rule::Delta { &scratch.r } else { &scratch.e };
            corrected[..len * g.width].copy_from_slice(&from[..len * g.width]);
        }
        let from = Prepared::of_ready(scratch.piece, &g);
        let mut update = g.update(from.decay);
        for (side, written) in scratch.written(&g).into_iter().flatten().enumerate() {
            let keys = Rows::of_slice(&from.keys[side * g.chunk..], g.rows, len, COLUMNS);
            product(s, keys, (written, g.width), g.width, (state, task.plan.stride), update, ahead);
            update = Update::Add;
        }
    }
}
