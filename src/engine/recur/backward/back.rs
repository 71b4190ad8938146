//! A chunk backwards.

use crate::engine::recur::backward::*;
use crate::engine::recur::chunk::{
    COLUMNS, Prepared, decay_scores, decays, dot, multiply_in_place, product, scale_row, skip_at, sums,
};
use crate::engine::recur::source;
use crate::engine::recur::{Decay, Place, Read, Rule};
use crate::simd::mem::{OutRows, Rows, RowsMut, Stream};
use crate::simd::tile::Update;
use crate::simd::{Kernel, MAX_LANES, Simd};

/// The gradients of a chunk. `scratch.d_state` is that of the state at its end
/// and becomes that of the state at its start.
pub(super) struct Back<'a, 'b> {
    pub(super) task: Task<'a>,
    pub(super) scratch: &'a mut Scratch<'b>,
    /// The state at the start.
    pub(super) state: &'a [f32],
    /// What [`Forth`] has made of the chunk, if it went over it.
    pub(super) corrected: Option<&'a [f32]>,
    pub(super) out: &'a Gradients<OutRows<'a, f32>>,
}

/// The rows of a chunk.
fn take<'a>(out: &OutRows<'a, f32>, at: &Place) -> RowsMut<'a, f32> {
    out.take(at.batch, at.head, at.tokens.clone())
}

impl Kernel for Back<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, scratch, state, corrected, out } = self;
        let Task { call, plan, at, .. } = &task;
        let (g, len, spec, stride) = (plan.g, at.tokens.len(), call.spec, plan.stride);
        let wide = if g.decay == Decay::Channel { &out.decay } else { &None };
        let (mut to_q, mut to_v) = (take(&out.q, at), take(&out.v, at));
        let others = [&out.k, wide, &out.a, &out.b];
        let mut others = others.map(|out| out.as_ref().map(|out| take(out, at)));
        let stream = |to: &Option<RowsMut<'_, f32>>| to.as_ref().map_or(Stream::NONE, |to| to.stream(0..len));
        let [k, decay, a, b] = others.each_ref().map(stream);
        let ahead = &mut task.ahead(Some([to_q.stream(0..len), k, to_v.stream(0..len), decay, a, b]));
        let (delta, low_rank) = (g.rule == Rule::Delta, g.rule == Rule::LowRank);
        let (corrects, channel) = (delta || low_rank, g.decay == Decay::Channel);
        let whole = task.prepare(s, scratch, true, ahead);
        match corrected {
            None => task.correct(s, scratch, state, ahead),
            Some(r) if delta => {
                for t in 0..len {
                    let row = t * g.width..(t + 1) * g.width;
                    scale_row(s, &r[row.clone()], scratch.beta[t], &mut scratch.e[row]);
                }
            }
            Some(_) => {}
        }
        task.load_d_out(s, scratch);
        task.written_back(s, scratch, corrected, ahead);
        let Scratch { work, piece, keys, b, e, e_turned, d_out, d_v, d_e, d_beta, .. } = scratch;
        let Scratch { weights, turned, moving, part, d_q, d_k, d_b, d_read, columns, .. } = scratch;
        let Scratch { state_turned, d_state_turned, d_state, d_decay, gain, decays: channels, .. } = scratch;
        let from = Prepared::of_ready(piece, &g);
        let rows = len * g.stride;
        let e = if low_rank { corrected.unwrap_or(e) } else { e };

        // What is written, and under which keys; what reads, and before its own
        // token's decay or after.
        let written = [if delta { e } else { &*work.v }, e];
        let (rights, lefts) = (if low_rank { 2 } else { 1 }, if corrects { 2 } else { 1 });
        let (q, a) = (&*work.q, if low_rank { &*work.a } else { &**keys });
        let (under, readers) = ([&**keys, &**b], [q, a]);
        let (matrices, factors) =
            ([from.scores, from.coefficients], [spec.scale as f32, if delta { -1.0 } else { 1.0 }]);
        let before = [spec.read == Read::Before, low_rank];

        let read = [&**d_out, if low_rank { &**d_e } else { &**d_v }];

        // Factors of decays from the start of the chunk and to its end.
        let sums = if g.decay == Decay::Scalar { sums(&work.decay[..len]) } else { [0.0; COLUMNS + 1] };
        let by_token = (g.decay == Decay::Scalar).then_some(&sums[..]);
        let (mut from_start, mut to_end) = ([[0f32; COLUMNS]; 2], [0f32; COLUMNS]);
        for t in 0..len {
            for (to, before) in from_start.iter_mut().zip(before) {
                to[t] = sums[t + usize::from(!before)] as f32;
            }
            to_end[t] = (sums[len] - sums[t + 1]) as f32;
        }
        decays(s, &mut from_start[0]);
        decays(s, &mut from_start[1]);
        decays(s, &mut to_end);
        if channel {
            channels.fill(s, &g, whole, &work.decay[..rows]);
        }
        let tell = out.decay.is_some();
        let gains = channel && tell;
        // Of one log decay a token: what sums up from the end, and from the
        // start. In f64, in which pairs cancel.
        let (mut later, mut earlier) = ([0f64; COLUMNS], [0f64; COLUMNS]);

        // Pairs of a token that reads and one that is written. Those that no decay
        // is between stay out of the sums for log decays: a token with itself,
        // and, where it reads before its decay, with the one before it.
        let mut own = [[0f32; COLUMNS]; 2];
        let mut next = [[[0f32; COLUMNS]; 2]; 2];
        let pairs = Pairs { g, len, decays: &*channels, plain: whole || !channel };
        // As a whole, rows of readers are decayed from the start of the chunk with
        // their factors, and those of keys divided by what they have decayed.
        let operands =
            if whole { ([from.reads, from.probes], [&*work.k, &*work.b]) } else { (readers, under) };
        for side in 0..rights {
            turn(s, (written[side], g.width), len, g.cols, (e_turned, COLUMNS));
            for reader in 0..lefts {
                let (before, factor) = (before[reader], factors[reader]);
                lower_products(s, (read[reader], g.width), g.cols, e_turned, len, weights, ahead);
                if tell && by_token.is_some() {
                    pair_sums(weights, &matrices[reader][side * g.chunk..], len, before, &mut later);
                }
                // Corrections do not see their own token. Queries do, by a
                // weight that no decay or one of its own is in.
                let apart = reader > 0 || channel || before;
                for t in 0..len {
                    let row = &mut weights[t * COLUMNS..][..COLUMNS];
                    if reader == 0 && apart {
                        own[side][t] = factor * row[t];
                    }
                    let seen = t + usize::from(!apart);
                    row[seen..].fill(0.0);
                    if channel && before && t > 0 {
                        next[reader][side][t] = factor * std::mem::take(&mut row[t - 1]);
                    }
                    let cols = seen.next_multiple_of(S::LANES);
                    let decay = by_token.map(|sums| (sums, t + usize::from(!before)));
                    decay_scores(s, &mut row[..cols], decay, seen, if whole { 1.0 } else { factor });
                }
                let set = |first: bool| if first { Update::Set } else { Update::Add };
                let d_left = (if reader == 0 { &mut **d_q } else { &mut **d_read }, set(side == 0));
                let d_right = (if side == 0 { &mut **d_k } else { &mut **d_b }, set(reader == 0));
                let operands = (operands.0[reader], operands.1[side]);
                pairs.spread(
                    s,
                    (weights, before),
                    operands,
                    [turned, moving, part],
                    [d_left, d_right],
                    ahead,
                );
            }
        }
        if whole {
            for reader in 0..lefts {
                let d_left = if reader == 0 { &mut **d_q } else { &mut **d_read };
                let behind = if before[reader] { g.stride } else { 0 };
                scale_in_place(s, &mut d_left[..rows], factors[reader]);
                multiply_in_place(s, &mut d_left[behind..rows], channels.from_start);
            }
            for side in 0..rights {
                let d_right = if side == 0 { &mut **d_k } else { &mut **d_b };
                divide_in_place(s, &mut d_right[..rows], channels.from_start);
            }
        }
        if gains {
            gain[..rows].fill(0.0);
            for reader in 0..lefts {
                let d_left = if reader == 0 { &**d_q } else { &**d_read };
                let behind = if before[reader] { g.stride } else { 0 };
                let (x, d_left) = (&readers[reader][behind..rows], &d_left[behind..rows]);
                add_products(s, &mut gain[..rows - behind], x, d_left, 1.0);
            }
            add_products(s, gain, &keys[..rows], d_k, -1.0);
            if low_rank {
                add_products(s, gain, &b[..rows], d_b, -1.0);
            }
        }
        for (reader, next) in next.iter().enumerate().filter(|(reader, _)| channel && before[*reader]) {
            for (side, next) in next.iter().enumerate().take(rights) {
                let d_left = if reader == 0 { &mut **d_q } else { &mut **d_read };
                let d_right = if side == 0 { &mut **d_k } else { &mut **d_b };
                for t in 1..len {
                    let (row, last) = (t * g.stride..(t + 1) * g.stride, (t - 1) * g.stride..t * g.stride);
                    add_scaled(s, &mut d_left[row.clone()], &under[side][last.clone()], next[t]);
                    add_scaled(s, &mut d_right[last], &readers[reader][row], next[t]);
                }
            }
        }
        if before[0] {
            let [.., skip] = plan.parameters;
            let sums = &mut scratch.parameters[plan.parameters() - skip - plan.parameters[2]..];
            let bonus = call.source.bonus(at.head);
            let gradients = (&mut **d_q, &mut **d_k);
            own_with_bonus(s, &own[0][..len], (bonus, g.stride), (q, keys), gradients, sums);
        } else if channel {
            for t in 0..len {
                let row = t * g.stride..(t + 1) * g.stride;
                add_scaled(s, &mut d_q[row.clone()], &keys[row.clone()], own[0][t]);
                add_scaled(s, &mut d_k[row.clone()], &q[row.clone()], own[0][t]);
                if low_rank {
                    add_scaled(s, &mut d_q[row.clone()], &b[row.clone()], own[1][t]);
                    add_scaled(s, &mut d_b[row.clone()], &q[row], own[1][t]);
                }
            }
        }

        // Tokens and states.
        turn(s, (state, stride), g.rows, g.cols, (state_turned, plan.turned));
        turn(s, (d_state, stride), g.rows, g.cols, (d_state_turned, plan.turned));
        for reader in 0..lefts {
            let values = Rows::of_slice(read[reader], len, g.cols, g.width);
            product(s, values, (state_turned, plan.turned), g.stride, (part, g.stride), Update::Set, ahead);
            let to = if reader == 0 { &mut **d_q } else { &mut **d_read };
            let behind = usize::from(before[reader]);
            for t in 0..len {
                let row = t * g.stride..(t + 1) * g.stride;
                let part = &mut part[row.clone()];
                let factor = factors[reader] * if channel { 1.0 } else { from_start[reader][t] };
                scale_in_place(s, part, factor);
                if channel && t >= behind {
                    multiply_in_place(s, part, &channels.from_start[(t - behind) * g.stride..]);
                }
                add_scaled(s, &mut to[row.clone()], part, 1.0);
                if !tell || t < behind {
                    continue;
                }
                let with = &readers[reader][row];
                if channel {
                    add_products(s, &mut gain[(t - behind) * g.stride..][..g.stride], with, part, 1.0);
                } else {
                    later[t - behind] += f64::from(dot(s, &with[..g.rows], &part[..g.rows], None));
                }
            }
        }
        if gains {
            moving[..rows].fill(0.0);
        }
        for side in 0..rights {
            let values = Rows::of_slice(written[side], len, g.cols, g.width);
            let turned = (&**d_state_turned, plan.turned);
            product(s, values, turned, g.stride, (part, g.stride), Update::Set, ahead);
            let to = if side == 0 { &mut **d_k } else { &mut **d_b };
            for t in 0..len {
                let row = t * g.stride..(t + 1) * g.stride;
                let part = &mut part[row.clone()];
                if channel {
                    multiply_in_place(s, part, &channels.to_end[row.clone()]);
                } else {
                    scale_in_place(s, part, to_end[t]);
                }
                add_scaled(s, &mut to[row.clone()], part, 1.0);
                let with = &under[side][row.clone()];
                if gains {
                    add_products(s, &mut moving[row], with, part, 1.0);
                } else if tell {
                    earlier[t] += f64::from(dot(s, &with[..g.rows], &part[..g.rows], None));
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
                sum_gains(s, &g, &work.decay[..rows], kept, moving, gain, d_decay);
            } else {
                let kept = kept[..g.rows].iter().map(|&x| f64::from(x)).sum::<f64>();
                sum_up(&work.decay[..len], kept, &earlier, &mut later);
                for (to, x) in d_decay.iter_mut().zip(&later[..len]) {
                    *to = *x as f32;
                }
            }
        }

        state_back(s, plan, len, &from, (columns, read), d_state, ahead);
        if delta {
            add_scaled(s, &mut d_k[..rows], d_read, 1.0);
        }
        let skip = call.source.skip(at.head);
        if !skip.is_empty() {
            let sums = &mut scratch.parameters[plan.parameters() - plan.parameters[3]..];
            skipped(s, skip, len, (&*work.v, &**d_out, &mut **d_v), g.width, sums);
        }

        let [rate, bias, ..] = plan.parameters;
        let operands = source::Back {
            q,
            k: keys,
            a: work.a,
            decay: work.decay,
            d_q,
            d_k,
            d_decay,
            d_a: d_read,
            d_b,
            parameters: &mut scratch.parameters[..rate + bias],
            scratch: part,
            stride: g.stride,
        };
        call.source.back(spec.isa, at, operands);
        WriteRows { from: d_q, stride: g.stride, to: &mut to_q }.run(s);
        WriteRows { from: d_v, stride: g.width, to: &mut to_v }.run(s);
        for (from, to) in [d_k, d_decay, d_read, d_b].into_iter().zip(&mut others) {
            if let Some(to) = to {
                WriteRows { from, stride: g.stride, to }.run(s);
            }
        }
        let narrow = if channel { None } else { Some(&**d_decay) };
        for (from, out) in [(narrow, &out.decay), (Some(&**d_beta), &out.beta)] {
            if let (Some(from), Some(out)) = (from, out) {
                let mut to = take(out, at);
                for t in 0..len {
                    to.set(t, 0, from[t]);
                }
            }
        }
    }
}

/// What queries see of their own tokens through a bonus, `own` the gradients of
/// their weights: adds to the gradients of queries, of keys and of the bonus.
#[inline(always)]
fn own_with_bonus<S: Simd>(
    s: S,
    own: &[f32],
    (bonus, stride): (&[f32], usize),
    (q, k): (&[f32], &[f32]),
    (d_q, d_k): (&mut [f32], &mut [f32]),
    sums: &mut [f64],
) {
    for col in (0..bonus.len()).step_by(S::LANES) {
        let weight = s.load_tail(&bonus[col..(col + S::LANES).min(bonus.len())]);
        let mut sum = s.splat(0.0);
        for (t, own) in own.iter().enumerate() {
            let at = t * stride + col;
            let (q, k, own) = (s.load(&q[at..]), s.load(&k[at..]), s.splat(*own));
            sum = s.mul_add(s.mul(own, q), k, sum);
            let weight = s.mul(own, weight);
            let (of_q, of_k) = (s.load(&d_q[at..]), s.load(&d_k[at..]));
            s.store(&mut d_q[at..], s.mul_add(weight, k, of_q));
            s.store(&mut d_k[at..], s.mul_add(weight, q, of_k));
        }
        add_lanes(s, sum, &mut sums[col..bonus.len()]);
    }
}

/// What outputs have of their own values through a skip connection: adds to
/// the gradients of values and of the connection.
#[inline(always)]
fn skipped<S: Simd>(
    s: S,
    skip: &[f32],
    len: usize,
    (v, d_out, d_v): (&[f32], &[f32], &mut [f32]),
    width: usize,
    sums: &mut [f64],
) {
    for col in (0..width).step_by(S::LANES) {
        let weight = skip_at(s, skip, col);
        let mut sum = s.splat(0.0);
        for t in 0..len {
            let at = t * width + col;
            let (d, of_v) = (s.load(&d_out[at..]), s.load(&d_v[at..]));
            sum = s.mul_add(d, s.load(&v[at..]), sum);
            s.store(&mut d_v[at..], s.mul_add(weight, d, of_v));
        }
        if skip.len() == 1 {
            sums[0] += f64::from(s.reduce_add(sum));
        } else if col < skip.len() {
            add_lanes(s, sum, &mut sums[col..]);
        }
    }
}

/// Adds as many lanes as there are sums.
#[inline(always)]
fn add_lanes<S: Simd>(s: S, x: S::F, sums: &mut [f64]) {
    let mut lanes = [0f32; MAX_LANES];
    s.store(&mut lanes, x);
    for (sum, x) in sums.iter_mut().zip(&lanes[..S::LANES]) {
        *sum += f64::from(*x);
    }
}
