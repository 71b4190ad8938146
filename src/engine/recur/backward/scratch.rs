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
    /// Keys as they came, and those of the low-rank rule's corrections.
    pub(super) keys: &'a mut [f32],
    pub(super) b: &'a mut [f32],
    /// Values less what the state has for their keys, and times beta.
    pub(super) r: &'a mut [f32],
    pub(super) e: &'a mut [f32],
    /// What is written as columns, `[columns, COLUMNS]`.
    pub(super) e_turned: &'a mut [f32],
    pub(super) d_out: &'a mut [f32],
    /// The gradient of what is written, and of values then.
    pub(super) d_v: &'a mut [f32],
    /// Of what the low-rank rule's corrections look up.
    pub(super) d_e: &'a mut [f32],
    pub(super) d_beta: &'a mut [f32],
    /// Of pairs.
    pub(super) weights: &'a mut [f32],
    pub(super) turned: &'a mut [f32],
    /// Keys or queries, decayed as far as a walk over sub-blocks has come.
    pub(super) moving: &'a mut [f32],
    pub(super) part: &'a mut [f32],
    pub(super) d_q: &'a mut [f32],
    pub(super) d_k: &'a mut [f32],
    pub(super) d_b: &'a mut [f32],
    /// Of keys where corrections read with them, or of `a`.
    pub(super) d_read: &'a mut [f32],
    /// Queries or keys as columns: `[rows, COLUMNS]`.
    pub(super) columns: &'a mut [f32],
    /// The state and its gradient as columns.
    pub(super) state_turned: &'a mut [f32],
    pub(super) d_state_turned: &'a mut [f32],
    pub(super) d_state: &'a mut [f32],
    /// Of log decays, and what of those of channels sums up from the end.
    pub(super) d_decay: &'a mut [f32],
    pub(super) gain: &'a mut [f32],
    pub(super) decays: Decays<&'a mut [f32]>,
    /// Sums over the tokens of a unit, in the order of [`Gradients`].
    pub(super) parameters: &'a mut [f64],
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
    pub(super) fn sizes(plan: &Plan) -> [usize; 30] {
        let g = &plan.g;
        let (rows, values, pairs) = (g.chunk * g.stride, g.chunk * g.width, g.chunk * COLUMNS);
        let if_ = |yes: bool, n: usize| if yes { n } else { 0 };
        let (delta, low_rank) = (g.rule == Rule::Delta, g.rule == Rule::LowRank);
        let (corrects, channel) = (delta || low_rank, g.decay == Decay::Channel);
        [
            g.piece(),
            g.chunk,
            rows,
            if_(low_rank, rows),
            if_(delta, values),
            if_(corrects, values),
            g.cols * COLUMNS,
            values,
            values,
            if_(low_rank, values),
            g.chunk,
            pairs,
            pairs,
            rows,
            rows,
            rows,
            rows,
            if_(low_rank, rows),
            if_(corrects, rows),
            g.rows * COLUMNS,
            g.cols * plan.turned,
            g.cols * plan.turned,
            plan.state(),
            if channel { rows } else { g.chunk },
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
            if_(channel, rows),
        ]
    }

    pub(super) fn bytes(plan: &Plan) -> usize {
        let parameters = bytes_for::<f64>(plan.parameters());
        Work::bytes(&plan.g)
            + parameters
            + Self::sizes(plan).iter().map(|&n| bytes_for::<f32>(n)).sum::<usize>()
    }

    /// What is written, under the keys and under those of corrections.
    pub(super) fn written(&self, g: &Geometry) -> [Option<&[f32]>; 2] {
        match g.rule {
            Rule::Add => [Some(self.work.v), None],
            Rule::Delta => [Some(self.e), None],
            Rule::LowRank => [Some(self.work.v), Some(self.e)],
        }
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
            b: next(),
            r: next(),
            e: next(),
            e_turned: next(),
            d_out: next(),
            d_v: next(),
            d_e: next(),
            d_beta: next(),
            weights: next(),
            turned: next(),
            moving: next(),
            part: next(),
            d_q: next(),
            d_k: next(),
            d_b: next(),
            d_read: next(),
            columns: next(),
            state_turned: next(),
            d_state_turned: next(),
            d_state: next(),
            d_decay: next(),
            gain: next(),
            decays: Decays { each: next(), since: next(), until: next(), from_start: next(), to_end: next() },
            parameters: arena.take(plan.parameters()),
        }
    }
}

impl Decays<&mut [f32]> {
    /// From the log decays of some tokens, rows as those of keys; those of
    /// sub-blocks unless the chunk goes as a whole.
    #[inline(always)]
    pub(super) fn fill<S: Simd>(&mut self, s: S, g: &Geometry, whole: bool, decay: &[f32]) {
        let (n, sub) = (decay.len(), SUB * g.stride);
        let Self { each, since, until, from_start, to_end } = self;
        if whole {
            sub_decays(s, decay, g.stride, each, from_start, to_end);
            return;
        }
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
