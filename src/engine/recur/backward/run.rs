//! Units, sequences of a head, over threads.

use crate::engine::recur::Place;
use crate::engine::recur::backward::*;
use crate::engine::recur::source::copy_rows;
use crate::simd::any::AnyArray;
use crate::simd::mem::{Arena, OutRows};

pub(super) struct Run<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) plan: &'a Plan,
    pub(super) out: &'a Gradients<OutRows<'a, f32>>,
    /// Sums of parameters, `[units, 1, 1, parameters]`.
    pub(super) parameters: &'a OutRows<'a, f64>,
}

/// What a thread works in.
pub(super) struct Share<'a> {
    pub(super) scratch: Scratch<'a>,
    /// The states at the starts of the chunks of a segment.
    pub(super) states: &'a mut [f32],
    /// Checkpoints: the states at the starts of segments.
    pub(super) checkpoints: &'a mut [f32],
    /// What corrections of the chunks of a segment have made.
    pub(super) corrected: &'a mut [f32],
}

impl<'a> Share<'a> {
    pub(super) fn take(mut arena: Arena<'a>, plan: &Plan) -> Self {
        Self {
            scratch: Scratch::take(&mut arena, plan),
            states: arena.take(plan.kept * plan.state()),
            checkpoints: arena.take(plan.segments * plan.state()),
            corrected: arena.take(plan.kept * plan.corrected()),
        }
    }
}

impl Run<'_> {
    /// One head of one sequence.
    pub(super) fn unit(&self, share: &mut Share<'_>, unit: usize) {
        let (call, plan) = (self.call, self.plan);
        let (spec, g, size) = (call.spec, plan.g, plan.state());
        let (index, head) = (unit / spec.dims.q_heads, unit % spec.dims.q_heads);
        let sequence = spec.lengths.sequence(&spec.dims, index);
        let Share { scratch, states, checkpoints, corrected } = share;
        let load = |from: Option<AnyArray<'_>>, to: &mut [f32]| {
            to.fill(0.0);
            if let Some(from) = from {
                copy_rows(spec.isa, from.rows(index, head, &(0..spec.state_dim)), to, plan.stride);
            }
        };
        let chunks = sequence.keys.len().div_ceil(g.chunk);
        let place = |chunk: usize| {
            let first = sequence.keys.start + chunk * g.chunk;
            Place::new(&sequence, head, first..(first + g.chunk).min(sequence.keys.end))
        };
        // A chunk, and the one that comes after it.
        let task = |chunk: usize, next: Option<usize>| {
            let following = next.filter(|next| *next < chunks).map(place);
            Task { call, plan, at: place(chunk), following }
        };
        load(call.state, &mut checkpoints[..size]);
        for segment in 1..chunks.div_ceil(SEGMENT) {
            let (before, after) = checkpoints[(segment - 1) * size..].split_at_mut(size);
            let after = &mut after[..size];
            after.copy_from_slice(before);
            for chunk in (segment - 1) * SEGMENT..segment * SEGMENT {
                let task = task(chunk, Some(chunk + 1));
                spec.isa.dispatch(Forth { task, scratch, state: after, corrected: &mut [] });
            }
        }
        load(call.d_state, scratch.d_state);
        scratch.parameters.fill(0.0);
        for segment in (0..chunks.div_ceil(SEGMENT)).rev() {
            let first = segment * SEGMENT;
            let end = (first + SEGMENT).min(chunks);
            states[..size].copy_from_slice(&checkpoints[segment * size..][..size]);
            for chunk in first..end - 1 {
                let (before, after) = states[(chunk - first) * size..].split_at_mut(size);
                let after = &mut after[..size];
                after.copy_from_slice(before);
                let task = task(chunk, Some(chunk + 1));
                let corrected = &mut corrected[(chunk - first) * plan.corrected()..][..plan.corrected()];
                spec.isa.dispatch(Forth { task, scratch, state: after, corrected });
            }
            for chunk in (first..end).rev() {
                let state = &states[(chunk - first) * size..][..size];
                // Nothing has gone over the last one.
                let corrected = &corrected[(chunk - first) * plan.corrected()..][..plan.corrected()];
                let corrected = Some(corrected).filter(|x| !x.is_empty() && chunk + 1 < end);
                let task = task(chunk, chunk.checked_sub(1));
                spec.isa.dispatch(Back { task, scratch, state, corrected, out: self.out });
            }
        }
        let mut sums = self.parameters.take(unit, 0, 0..1);
        for (j, sum) in scratch.parameters.iter().enumerate() {
            sums.set(0, j, *sum);
        }
        let to = &mut self.out.state.take(index, head, 0..spec.state_dim);
        spec.isa.dispatch(WriteRows { from: scratch.d_state, stride: plan.stride, to });
    }
}
