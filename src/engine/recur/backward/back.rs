//! A chunk backwards.

use crate::engine::recur::backward::*;
use crate::engine::recur::chunk::{
    COLUMNS, Prepared, decay_scores, decays, dot, multiply_in_place, product, scale_row, sums,
};
use crate::engine::recur::source::Side;
use crate::engine::recur::{Decay, Rule};
use crate::simd::mem::{OutRows, Rows};
use crate::simd::tile::Update;
use crate::simd::{Kernel, Simd};

/// The gradients of a chunk. `scratch.d_state` is that of the state at its end
/// and becomes that of the state at its start.
pub(super) struct Back<'a, 'b> {
    pub(super) task: Task<'a>,
    pub(super) scratch: &'a mut Scratch<'b>,
    /// The state at the start.
    pub(super) state: &'a [f32],
    pub(super) out: &'a Gradients<OutRows<'a, f32>>,
}

impl<'a> Kernel for Back<'a, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, scratch, state, out } = self;
        let Task { call, plan, at, .. } = &task;
        let take = |out: &OutRows<'a, f32>| out.take(at.batch, at.head, at.tokens.clone());
        let (mut to_q, mut to_k, mut to_v) = (take(&out.q), take(&out.k), take(&out.v));
        let ahead = &mut task.ahead([
            to_q.stream(0..at.tokens.len()),
            to_k.stream(0..at.tokens.len()),
            to_v.stream(0..at.tokens.len()),
        ]);
        let (g, len, spec, stride) = (plan.g, at.tokens.len(), call.spec, plan.stride);
        let (delta, channel) = (g.rule == Rule::Delta, g.decay == Decay::Channel);
        task.prepare(s, scratch, ahead);
        task.correct(s, scratch, state, ahead);
        if g.width != g.cols {
            scratch.d_out.fill(0.0);
        }
        call.d_out.rows(at.batch, at.head, &at.tokens).pack_rows(s, scratch.d_out, g.width);
        let Scratch { work, piece, beta, keys, r, e, e_turned, d_out, d_v, d_beta, weights, turned, .. } =
            scratch;
        let Scratch { moving, part, d_q, d_k, d_read, columns, state_turned, d_state_turned, .. } = scratch;
        let Scratch { d_state, d_decay, gain, decays: channels, .. } = scratch;
        let from = Prepared::of_ready(piece, &g);
        let e = if delta { &**e } else { &*work.v };
        let q = &*work.q;

        // Of what is written: later queries of the chunk, and the state.
        turn(s, (from.keys, COLUMNS), g.rows, len, (moving, g.stride));
        let decayed = Rows::of_slice(moving, len, g.rows, g.stride);
        product(s, decayed, (d_state, stride), g.width, (d_v, g.width), Update::Set, ahead);
        turn(s, (from.scores, COLUMNS), len, len, (turned, COLUMNS));
        upper(s, turned, (d_out, g.width), (g.width, len), (d_v, g.width), Update::Add, ahead);
        if delta {
            // Of what corrects it, which solves the transposed system.
            for t in 0..len {
                let row = t * COLUMNS..(t + 1) * COLUMNS;
                scale_row(s, &from.coefficients[row.clone()], beta[t], &mut weights[row]);
            }
            turn(s, (weights, COLUMNS), len, len, (turned, COLUMNS));
            transposed(s, turned, d_v, g.width, len, ahead);
            for t in 0..len {
                let row = &mut d_v[t * g.width..][..g.width];
                d_beta[t] = dot(s, row, &r[t * g.width..][..g.width], None);
                scale_in_place(s, row, beta[t]);
            }
        }

        // Factors of decays from the start of the chunk and to its end.
        let sums = if g.decay == Decay::Scalar { sums(&work.decay[..len]) } else { [0.0; COLUMNS + 1] };
        let by_token = (g.decay == Decay::Scalar).then_some(&sums[..]);
        let (mut from_start, mut to_end) = ([0f32; COLUMNS], [0f32; COLUMNS]);
        for t in 0..len {
            from_start[t] = sums[t + 1] as f32;
            to_end[t] = (sums[len] - sums[t + 1]) as f32;
        }
        decays(s, &mut from_start);
        decays(s, &mut to_end);
        if channel {
            channels.fill(s, &g, &work.decay[..len * g.stride]);
        }
        let tell = out.decay.is_some();
        // Of one log decay a token: what sums up from the end, and from the
        // start. In f64, in which pairs cancel.
        let (mut later, mut earlier) = ([0f64; COLUMNS], [0f64; COLUMNS]);

        // Pairs of a query and a key.
        turn(s, (e, g.width), len, g.cols, (e_turned, COLUMNS));
        lower_products(s, (d_out, g.width), g.cols, e_turned, len, weights, ahead);
        if tell && by_token.is_some() {
            pair_sums(weights, from.scores, len, &mut later);
        }
        let mut own = [0f32; COLUMNS];
        for t in 0..len {
            let row = &mut weights[t * COLUMNS..][..COLUMNS];
            row[t + 1..].fill(0.0);
            let cols = (t + 1).next_multiple_of(S::LANES);
            decay_scores(s, &mut row[..cols], by_token.map(|sums| (sums, t + 1)), t + 1, spec.scale as f32);
            if channel {
                own[t] = std::mem::take(&mut row[t]);
            }
        }
        let pairs = Pairs { g, len, decays: &*channels };
        pairs.spread(s, weights, (q, keys), [turned, moving, part], (d_q, d_k, Update::Set), ahead);
        if delta {
            // Pairs of keys.
            lower_products(s, (d_v, g.width), g.cols, e_turned, len, weights, ahead);
            if tell && by_token.is_some() {
                pair_sums(weights, from.coefficients, len, &mut later);
            }
            for t in 0..len {
                let row = &mut weights[t * COLUMNS..][..COLUMNS];
                row[t..].fill(0.0);
                let cols = t.next_multiple_of(S::LANES);
                decay_scores(s, &mut row[..cols], by_token.map(|sums| (sums, t + 1)), t, -1.0);
            }
            pairs.spread(s, weights, (keys, keys), [turned, moving, part], (d_read, d_k, Update::Add), ahead);
        }
        let rows = len * g.stride;
        let gains = channel && tell;
        if gains {
            gain[..rows].fill(0.0);
            add_products(s, gain, &q[..rows], d_q, 1.0);
            add_products(s, gain, &keys[..rows], d_k, -1.0);
            if delta {
                add_products(s, gain, &keys[..rows], d_read, 1.0);
            }
        }
        if channel {
            // Each token with itself, which no decay is between.
            for t in 0..len {
                let row = t * g.stride..(t + 1) * g.stride;
                add_scaled(s, &mut d_q[row.clone()], &keys[row.clone()], own[t]);
                add_scaled(s, &mut d_k[row.clone()], &q[row], own[t]);
            }
        }

        // Tokens and states.
        turn(s, (state, stride), g.rows, g.cols, (state_turned, plan.turned));
        turn(s, (d_state, stride), g.rows, g.cols, (d_state_turned, plan.turned));
        let terms = [
            (Some(&**d_out), &*state_turned, spec.scale as f32, q, &mut **d_q, false),
            (delta.then_some(&**d_v), &*state_turned, -1.0, keys, &mut **d_read, false),
            (Some(e), &*d_state_turned, 1.0, keys, &mut **d_k, true),
        ];
        for (values, state, factor, with, to, to_the_end) in terms {
            let Some(values) = values else { continue };
            let values = Rows::of_slice(values, len, g.cols, g.width);
            product(s, values, (state, plan.turned), g.stride, (part, g.stride), Update::Set, ahead);
            let (each, all) = match to_the_end {
                false => (&from_start, &channels.from_start),
                true => (&to_end, &channels.to_end),
            };
            for t in 0..len {
                let row = t * g.stride..(t + 1) * g.stride;
                let part = &mut part[row.clone()];
                scale_in_place(s, part, if channel { factor } else { factor * each[t] });
                if channel {
                    multiply_in_place(s, part, &all[row.clone()]);
                }
                add_scaled(s, &mut to[row.clone()], part, 1.0);
                if tell && !channel {
                    let sum = f64::from(dot(s, &with[row.clone()][..g.rows], &part[..g.rows], None));
                    if to_the_end {
                        earlier[t] = sum;
                    } else {
                        later[t] += sum;
                    }
                } else if tell && !to_the_end {
                    add_products(s, &mut gain[row.clone()], &with[row], part, 1.0);
                }
            }
        }
        if tell {
            // The state at the start with that at the end.
            let kept = &mut *work.coming;
            for r in 0..g.rows {
                let row = r * stride..r * stride + g.cols;
                kept[r] = from.decay[r] * dot(s, &state[row.clone()], &d_state[row], None);
            }
            if channel {
                // The last part is what keys give to the state.
                sum_gains(s, &g, &work.decay[..rows], kept, keys, part, gain, d_decay);
            } else {
                let kept = kept[..g.rows].iter().map(|&x| f64::from(x)).sum::<f64>();
                sum_up(&work.decay[..len], kept, &earlier, &mut later);
            }
        }

        // The state.
        turn(s, (from.reads, g.stride), len, g.rows, (columns, COLUMNS));
        let reads = Rows::of_slice(columns, g.rows, len, COLUMNS);
        product(s, reads, (d_out, g.width), g.width, (d_state, stride), g.update(from.decay), ahead);
        if delta {
            turn(s, (from.probes, g.stride), len, g.rows, (columns, COLUMNS));
            let reads = Rows::of_slice(columns, g.rows, len, COLUMNS);
            product(s, reads, (d_v, g.width), g.width, (d_state, stride), Update::Add, ahead);
            add_scaled(s, &mut d_k[..rows], d_read, 1.0);
        }

        call.source.back(spec.isa, at, Side::Queries, (q, d_q), part, g.stride);
        call.source.back(spec.isa, at, Side::Keys, (keys, d_k), part, g.stride);
        WriteRows { from: d_q, stride: g.stride, to: &mut to_q }.run(s);
        WriteRows { from: d_k, stride: g.stride, to: &mut to_k }.run(s);
        WriteRows { from: d_v, stride: g.width, to: &mut to_v }.run(s);
        if let Some(to) = &out.decay {
            let to = &mut take(to);
            if channel {
                WriteRows { from: d_decay, stride: g.stride, to }.run(s);
            } else {
                for t in 0..len {
                    to.set(t, 0, later[t] as f32);
                }
            }
        }
        if let Some(to) = &out.beta {
            let mut to = take(to);
            for t in 0..len {
                to.set(t, 0, d_beta[t]);
            }
        }
    }
}
