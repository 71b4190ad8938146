//! The gradient of the state alone: what earlier tokens are told.

use ndarray::ArrayViewMut4;

use crate::engine::parallel;
use crate::engine::recur::backward::*;
use crate::engine::recur::chunk::{COLUMNS, Prepared, dot, product, scale_row};
use crate::engine::recur::source::copy_rows;
use crate::engine::recur::{Place, Rule};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::simd::mem::{Ahead, OutRows, Rows, Stream, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::Update;
use crate::simd::{Kernel, Simd};

impl Task<'_> {
    /// Loads the gradients of the outputs of a chunk.
    #[inline(always)]
    pub(super) fn load_d_out<S: Simd>(&self, s: S, scratch: &mut Scratch<'_>) {
        let (g, at) = (self.plan.g, &self.at);
        if g.width != g.cols {
            scratch.d_out.fill(0.0);
        }
        self.call.d_out.rows(at.batch, at.head, &at.tokens).pack_rows(s, scratch.d_out, g.width);
    }

    /// The gradients of what is written, of a chunk that has been prepared, and those of
    /// what corrects it; of beta too, where values have been corrected: those that
    /// `corrected` has, or else the scratch.
    #[inline(always)]
    pub(super) fn written_back<S: Simd>(
        &self,
        s: S,
        scratch: &mut Scratch<'_>,
        corrected: Option<&[f32]>,
        ahead: &mut Ahead,
    ) {
        let (g, len, stride) = (self.plan.g, self.at.tokens.len(), self.plan.stride);
        let (delta, low_rank) = (g.rule == Rule::Delta, g.rule == Rule::LowRank);
        let Scratch { piece, beta, r, d_out, d_v, d_e, d_beta, .. } = scratch;
        let Scratch { weights, turned, moving, d_state, .. } = scratch;
        let (from, r) = (Prepared::of_ready(piece, &g), corrected.unwrap_or(r));
        // Of what is written: later queries of the chunk, and the state.
        for side in 0..if low_rank { 2 } else { 1 } {
            let (base, d_v) = (side * g.chunk, if side == 0 { &mut **d_v } else { &mut **d_e });
            turn(s, (&from.keys[base..], COLUMNS), g.rows, len, (moving, g.stride));
            let decayed = Rows::of_slice(moving, len, g.rows, g.stride);
            product(s, decayed, (d_state, stride), g.width, (d_v, g.width), Update::Set, ahead);
            turn(s, (&from.scores[base..], COLUMNS), len, len, (turned, COLUMNS));
            upper(s, turned, (d_out, g.width), (g.width, len), (d_v, g.width), Update::Add, ahead);
        }
        // Of what corrects it, which solves the transposed system.
        if delta {
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
        if low_rank {
            turn(s, (&from.coefficients[g.chunk..], COLUMNS), len, len, (turned, COLUMNS));
            transposed(s, turned, d_e, g.width, len, ahead);
            turn(s, (from.coefficients, COLUMNS), len, len, (turned, COLUMNS));
            upper(s, turned, (d_e, g.width), (g.width, len), (d_v, g.width), Update::Add, ahead);
        }
    }
}

/// The gradient of the state at the start of a chunk in place of that at its end: `read`
/// are the gradients of what queries and corrections have read.
#[inline(always)]
pub(super) fn state_back<S: Simd>(
    s: S,
    plan: &Plan,
    len: usize,
    from: &Prepared<&[f32]>,
    (columns, read): (&mut [f32], [&[f32]; 2]),
    d_state: &mut [f32],
    ahead: &mut Ahead,
) {
    let g = plan.g;
    let mut update = g.update(from.decay);
    let readers = if g.rule == Rule::Add { 1 } else { 2 };
    for (reads, values) in [from.reads, from.probes].into_iter().zip(read).take(readers) {
        turn(s, (reads, g.stride), len, g.rows, (columns, COLUMNS));
        let reads = Rows::of_slice(columns, g.rows, len, COLUMNS);
        product(s, reads, (values, g.width), g.width, (d_state, plan.stride), update, ahead);
        update = Update::Add;
    }
}

/// A chunk backwards, `scratch.d_state` alone.
struct BackState<'a, 'b> {
    task: Task<'a>,
    scratch: &'a mut Scratch<'b>,
}

impl Kernel for BackState<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, scratch } = self;
        let (g, len) = (task.plan.g, task.at.tokens.len());
        let ahead = &mut task.ahead(Some([Stream::NONE; 6]));
        task.prepare(s, scratch, true, ahead);
        task.load_d_out(s, scratch);
        if g.rule != Rule::Add {
            task.written_back(s, scratch, None, ahead);
        }
        let Scratch { piece, columns, d_out, d_v, d_e, d_state, .. } = scratch;
        let read = [&**d_out, if g.rule == Rule::LowRank { &**d_e } else { &**d_v }];
        state_back(s, task.plan, len, &Prepared::of_ready(piece, &g), (columns, read), d_state, ahead);
    }
}

/// Sizes of a call that has no other gradients.
fn plan(call: &Call<'_>, to: Dim) -> Plan {
    let nothing = (0, 0, 0, 0);
    let plan = Plan::new(call.spec, &Gradients::of_all(nothing, nothing, to));
    // No state is kept, for none is read.
    Plan { kept: 0, segments: 0, ..plan }
}

/// Writes the gradient of the state at the start, as [`run`](super::run) does. The state
/// itself is not asked for.
pub(crate) fn run_state(
    call: &Call<'_>,
    mut to: ArrayViewMut4<'_, f32>,
    workspace: &mut Workspace,
) -> Result<()> {
    let (plan, spec) = (&plan(call, to.dim()), call.spec);
    if plan.g.cols == 0 {
        to.fill(0.0);
        return Ok(());
    }
    let (sequences, heads, rows, _) = to.dim();
    let words = claim_words(sequences * heads * rows);
    let mut arena =
        workspace.arena(bytes_for::<u64>(words) + bytes_for_shares(plan.workers, plan.share()))?;
    let out = OutRows::new(to, arena.take(words));
    let shares = arena.shares(plan.workers, plan.share());
    let start = |worker| Share::take(shares.take(worker), plan);
    let unit = |Share { scratch, .. }: &mut Share<'_>, unit: usize| {
        let (index, head) = (unit / heads, unit % heads);
        let sequence = spec.lengths.sequence(&spec.dims, index);
        let keys = &sequence.keys;
        // What a head forgets of the state before it gets to a token, this token's
        // gradient has nothing to say to.
        let end = keys.start + keys.len().min(call.source.remembers(head));
        scratch.d_state.fill(0.0);
        if let Some(from) = call.d_state.filter(|_| end == keys.end) {
            copy_rows(spec.isa, from.rows(index, head, &(0..spec.state_dim)), scratch.d_state, plan.stride);
        }
        let chunks = (end - keys.start).div_ceil(plan.g.chunk);
        let place = |chunk: usize| {
            let first = keys.start + chunk * plan.g.chunk;
            Place::new(&sequence, head, first..(first + plan.g.chunk).min(keys.end))
        };
        for chunk in (0..chunks).rev() {
            let following = chunk.checked_sub(1).map(place);
            let task = Task { call, plan, at: place(chunk), following };
            spec.isa.dispatch(BackState { task, scratch });
        }
        let to = &mut out.take(index, head, 0..spec.state_dim);
        spec.isa.dispatch(WriteRows { from: scratch.d_state, stride: plan.stride, to });
    };
    parallel::for_each(plan.workers, plan.units, start, unit);
    Ok(())
}
