//! What a thread works in.

use crate::engine::recur::backward::*;
use crate::engine::recur::chunk::{COLUMNS, Geometry, SUB, Work};
use crate::engine::recur::{Decay, Rule};
use crate::simd::Simd;
use crate::simd::mem::{Arena, bytes_for};

/// What one thread works in. Rows are those of [`Work`]: `[chunk, stride]` for
/// keys, `[chunk, width]` for values, `[chunk, COLUMNS]` for pairs of tokens.
pub(super) struct Scratch<'a> {
    pub(super) work: Work<'a>,
    /// What a chunk is prepared into.
    pub(super) piece: &'a mut [f32],
    pub(super) beta: &'a mut [f32],
    /// Keys as they came.
    pub(super) keys: &'a mut [f32],
    /// Values less what the state has for their keys, and times beta.
    pub(super) r: &'a mut [f32],
    pub(super) e: &'a mut [f32],
    /// `e` as columns, `[columns, COLUMNS]`.
    pub(super) e_turned: &'a mut [f32],
    pub(super) d_out: &'a mut [f32],
    /// The gradient of what is written, and of values then.
    pub(super) d_v: &'a mut [f32],
    pub(super) d_beta: &'a mut [f32],
    /// Of pairs.
    pub(super) weights: &'a mut [f32],
    pub(super) turned: &'a mut [f32],
    /// Keys or queries, decayed as far as a walk over sub-blocks has come.
    pub(super) moving: &'a mut [f32],
    pub(super) part: &'a mut [f32],
    pub(super) d_q: &'a mut [f32],
    pub(super) d_k: &'a mut [f32],
    /// Of keys where corrections read with them.
    pub(super) d_read: &'a mut [f32],
    /// Queries or keys as columns: `[rows, COLUMNS]`.
    pub(super) columns: &'a mut [f32],
    /// The state and its gradient as columns.
    pub(super) state_turned: &'a mut [f32],
    pub(super) d_state_turned: &'a mut [f32],
    pub(super) d_state: &'a mut [f32],
    /// Of log decays of channels, and what of them sums up from the end.
    pub(super) d_decay: &'a mut [f32],
    pub(super) gain: &'a mut [f32],
    pub(super) decays: Decays<&'a mut [f32]>,
}

/// What is made of log decays of channels, rows as those of keys.
#[derive(Debug)]
pub(super) struct Decays<X> {
    /// Token by token, from the start of its sub-block, to the end of its
    /// sub-block.
    pub(super) each: X,
    pub(super) since: X,
    pub(super) until: X,
    /// From the start of the chunk, to the end of the chunk.
    pub(super) from_start: X,
    pub(super) to_end: X,
}

impl<'a> Scratch<'a> {
    pub(super) fn sizes(plan: &Plan) -> [usize; 27] {
        let g = &plan.g;
        let (rows, values, pairs) = (g.chunk * g.stride, g.chunk * g.width, g.chunk * COLUMNS);
        let if_ = |yes: bool, n: usize| if yes { n } else { 0 };
        let (delta, channel) = (g.rule == Rule::Delta, g.decay == Decay::Channel);
        [
            g.piece(),
            g.chunk,
            rows,
            if_(delta, values),
            if_(delta, values),
            g.cols * COLUMNS,
            values,
            values,
            g.chunk,
            pairs,
            pairs,
            rows,
            rows,
            rows,
            rows,
            if_(delta, rows),
            g.rows * COLUMNS,
            g.cols * plan.turned,
            g.cols * plan.turned,
            plan.state(),
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
        ]
    }

    pub(super) fn bytes(plan: &Plan) -> usize {
        Work::bytes(&plan.g) + Self::sizes(plan).iter().map(|&n| bytes_for::<f32>(n)).sum::<usize>()
    }

    pub(super) fn take(arena: &mut Arena<'a>, plan: &Plan) -> Self {
        let work = Work::take(arena, &plan.g);
        let mut sizes = Self::sizes(plan).into_iter();
        let mut next = || arena.take(sizes.next().unwrap_or_default());
        Self {
            work,
            piece: next(),
            beta: next(),
            keys: next(),
            r: next(),
            e: next(),
            e_turned: next(),
            d_out: next(),
            d_v: next(),
            d_beta: next(),
            weights: next(),
            turned: next(),
            moving: next(),
            part: next(),
            d_q: next(),
            d_k: next(),
            d_read: next(),
            columns: next(),
            state_turned: next(),
            d_state_turned: next(),
            d_state: next(),
            d_decay: next(),
            gain: next(),
            decays: Decays { each: next(), since: next(), until: next(), from_start: next(), to_end: next() },
        }
    }
}

impl Decays<&mut [f32]> {
    /// From the log decays of some tokens, rows as those of keys.
    #[inline(always)]
    pub(super) fn fill<S: Simd>(&mut self, s: S, g: &Geometry, decay: &[f32]) {
        let (n, sub) = (decay.len(), SUB * g.stride);
        let Self { each, since, until, from_start, to_end } = self;
        for first in (0..n).step_by(sub) {
            let rows = first..(first + sub).min(n);
            let (each, since) = (&mut each[rows.clone()], &mut since[rows.clone()]);
            sub_decays(s, &decay[rows.clone()], g.stride, each, since, &mut until[rows.clone()]);
            let (before, from_start) = from_start.split_at_mut(first);
            for (t, row) in from_start[..rows.len()].chunks_exact_mut(g.stride).enumerate() {
                row.copy_from_slice(&since[t * g.stride..][..g.stride]);
                if first > 0 {
                    decay_in_place(s, row, &before[first - g.stride..]);
                }
            }
        }
        for first in (0..n).step_by(sub).rev() {
            let end = (first + sub).min(n);
            let (to_end, after) = to_end.split_at_mut(end);
            for (row, until) in
                to_end[first..].chunks_exact_mut(g.stride).zip(until[first..].chunks_exact(g.stride))
            {
                row.copy_from_slice(until);
                if end < n {
                    decay_in_place(s, row, after);
                    decay_in_place(s, row, &each[end..]);
                }
            }
        }
    }
}
