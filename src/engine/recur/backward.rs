//! Gradients of a recurrence, chunk by chunk from the last to the first.
//!
//! Within a chunk `c_i` sums the log decays up to and with token `i`, `S` is
//! the state at its start and `c` the sum over all its tokens. What is written
//! under key `j` is `e_j`, the value or its correction:
//!
//! ```text
//! o_i   = sum_{j <= i} P_ij e_j + scale (q_i exp(c_i))^T S     P_ij = scale sum_c q_i k_j exp(c_i - c_j)
//! S_out = exp(c) S + sum_j (k_j exp(c - c_j)) e_j^T
//! e_j   = beta_j r_j    r_i = v_i - (k_i exp(c_i))^T S - sum_{j < i} G_ij e_j
//!                                                             G_ij = sum_c k_i k_j exp(c_i - c_j)
//! ```
//!
//! With `do` the gradient of the outputs and `D` that of `S_out`:
//!
//! ```text
//! de_j = sum_{i >= j} P_ij do_i + D^T (k_j exp(c - c_j)) - sum_{i > j} G_ij dr_i
//! dr_i = beta_i de_i    dbeta_i = de_i . r_i    dv = dr; without corrections dv = de
//! dP_ij = do_i . e_j    dG_ij = -dr_i . e_j
//! dq_i = scale sum_{j <= i} dP_ij exp(c_i - c_j) k_j + scale exp(c_i) S do_i
//! dk_j = scale sum_{i >= j} dP_ij exp(c_i - c_j) q_i + exp(c - c_j) D e_j
//!      + sum_{i > j} dG_ij exp(c_i - c_j) k_i + sum_{i < j} dG_ji exp(c_j - c_i) k_i - exp(c_j) S dr_j
//! dS   = exp(c) D + sum_i scale (q_i exp(c_i)) do_i^T - sum_i (k_i exp(c_i)) dr_i^T
//! ```
//!
//! `de` solves the transpose of the triangular system that `r` solves, and
//! nothing is divided by `beta` or by a decay. A log decay `g_t` scales
//! whatever goes from tokens before `t` to `t` and later ones, so that its
//! gradient is the sum of what these pairs add to the loss: pairs of tokens of
//! the chunk (`dP P` and `dG G`, rows less columns from `t` on: what is inside
//! cancels; a token with itself never counts), the state with tokens from `t`
//! on, tokens before `t` with the state at the end, and the one state with the
//! other. Where decays are of channels, so are the sums. The gradient of a log
//! decay that leaves nothing is 0.
//!
//! The states at the starts of chunks come from a run over the values
//! beforehand. [`KEEP`] of them are kept; of longer sequences every so many,
//! and the others are computed once more.
//!
//! A NaN or infinity in a sequence shows in the gradients of the tokens before
//! it that it depends on, and may show in others of the sequence.

use std::ops::Range;

use ndarray::ArrayViewMut4;

use crate::engine::parallel;
use crate::engine::recur::chunk::{
    BLOCK, COLUMNS, Geometry, Prepare, Prepared, SUB, Work, decay_of, decay_scores, decays, dot,
    multiply_in_place, product, scale_row, sums, triangular,
};
use crate::engine::recur::source::{Side, copy_rows};
use crate::engine::recur::{Decay, Place, Rule, Source, Spec};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::simd::any::AnyArray;
use crate::simd::mem::{
    self, Ahead, Arena, OutRows, Rows, RowsMut, Stream, bytes_for, bytes_for_shares, claim_words,
};
use crate::simd::pack::{PackColumns, WriteRow};
use crate::simd::tile::{Update, flush};
use crate::simd::{Kernel, MAX_LANES, Simd};

/// States that a thread keeps of a sequence.
const KEEP: usize = 64;
/// A log decay below it leaves nothing.
const NOTHING: f32 = -87.0;

/// What gradients there are, one for each array of the input: `[batch, heads,
/// len, dim]`, where `dim` is 1 for one number a token, and the state's.
#[derive(Clone, Copy, Debug)]
pub struct Gradients<X> {
    pub(crate) q: X,
    pub(crate) k: X,
    pub(crate) v: X,
    pub(crate) decay: Option<X>,
    pub(crate) beta: Option<X>,
    /// `[sequences, heads, state_dim, columns]`
    pub(crate) state: X,
}

impl<X> Gradients<X> {
    pub(crate) fn map<Y>(self, mut f: impl FnMut(X) -> Y) -> Gradients<Y> {
        Gradients {
            q: f(self.q),
            k: f(self.k),
            v: f(self.v),
            decay: self.decay.map(&mut f),
            beta: self.beta.map(&mut f),
            state: f(self.state),
        }
    }

    fn each_mut(&mut self) -> Gradients<&mut X> {
        Gradients {
            q: &mut self.q,
            k: &mut self.k,
            v: &mut self.v,
            decay: self.decay.as_mut(),
            beta: self.beta.as_mut(),
            state: &mut self.state,
        }
    }
}

/// `[batch, heads, len, dim]`
pub(crate) type Dim = (usize, usize, usize, usize);

/// What gradients are computed from.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) source: &'a dyn Source,
    /// The state at the start; 0 if there is none.
    pub(crate) state: Option<AnyArray<'a>>,
    /// Of the outputs.
    pub(crate) d_out: AnyArray<'a>,
    /// Of the state at the end; 0 if there is none.
    pub(crate) d_state: Option<AnyArray<'a>>,
}

/// Rows of `n` elements that start in different sets of a cache.
fn apart(n: usize) -> usize {
    (n.div_ceil(MAX_LANES) | 1) * MAX_LANES
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
struct Plan {
    g: Geometry,
    /// From one row of a state to the next, and of a state transposed.
    stride: usize,
    turned: usize,
    workers: usize,
    units: usize,
    /// States that are kept of a unit, and stretches of as many chunks.
    kept: usize,
    stretches: usize,
}

impl Plan {
    fn new(spec: &Spec<'_>) -> Self {
        // States of chunks are kept: long ones.
        let g = Geometry { chunk: COLUMNS, columns: COLUMNS, ..Geometry::new(spec) };
        let longest =
            (0..spec.dims.batch).map(|i| spec.lengths.sequence(&spec.dims, i).keys.len()).max().unwrap_or(0);
        let chunks = longest.div_ceil(g.chunk);
        Self {
            g,
            stride: apart(g.cols),
            turned: apart(g.rows),
            workers: parallel::threads(),
            units: spec.dims.batch * spec.dims.q_heads,
            kept: chunks.min(KEEP),
            stretches: chunks.div_ceil(KEEP).max(1),
        }
    }

    /// Elements of a state.
    fn state(&self) -> usize {
        self.g.rows * self.stride
    }

    /// Bytes for each thread.
    fn share(&self) -> usize {
        Desk::bytes(self) + bytes_for::<f32>((self.kept + self.stretches) * self.state())
    }

    fn bytes(&self, heads: usize, gradients: &Gradients<Dim>) -> usize {
        let mut bytes = bytes_for_shares(self.workers, self.share());
        gradients.map(|dim| bytes += Sink::bytes(heads, dim));
        bytes
    }
}

/// Bytes of scratch that [`run`] needs for gradients of these sizes.
pub(crate) fn workspace_bytes(spec: &Spec<'_>, gradients: &Gradients<Dim>) -> usize {
    Plan::new(spec).bytes(spec.dims.q_heads, gradients)
}

/// An array of gradients on its way: rows of heads, or where heads share the
/// array rows of all heads, which are added up in the end.
struct Sink<'a> {
    to: ArrayViewMut4<'a, f32>,
    parts: Option<&'a mut [f32]>,
    claims: &'a mut [u64],
    heads: usize,
}

impl<'a> Sink<'a> {
    fn bytes(heads: usize, (batch, own, len, dim): Dim) -> usize {
        let parts = if own == heads { 0 } else { batch * heads * len * dim };
        bytes_for::<u64>(claim_words(batch * heads * len)) + bytes_for::<f32>(parts)
    }

    fn new(to: ArrayViewMut4<'a, f32>, heads: usize, arena: &mut Arena<'a>) -> Self {
        let (batch, own, len, dim) = to.dim();
        let claims = arena.take(claim_words(batch * heads * len));
        let parts = (own != heads).then(|| arena.take(batch * heads * len * dim));
        Self { to, parts, claims, heads }
    }

    fn rows(&mut self) -> OutRows<'_, f32> {
        let (batch, _, len, dim) = self.to.dim();
        match &mut self.parts {
            None => OutRows::new(self.to.view_mut(), self.claims),
            Some(parts) => OutRows::of_slice(parts, (batch, self.heads, len, dim), self.claims),
        }
    }

    /// Adds up what shares a head, in order.
    fn sum(self, workers: usize) {
        let Some(parts) = self.parts else { return };
        let (_, own, len, dim) = self.to.dim();
        let group = self.heads / own.max(1);
        let tasks = self.to.dim().0 * own;
        let to = OutRows::new(self.to, self.claims);
        parallel::for_each(
            workers,
            tasks,
            |_| (),
            |(), task| {
                let mut to = to.take(task / own, task % own, 0..len);
                let parts = &parts[task * group * len * dim..][..group * len * dim];
                for t in 0..len {
                    let mut heads = parts.chunks_exact(len * dim).map(|head| &head[t * dim..][..dim]);
                    match (to.row(t), heads.next()) {
                        (Some(row), Some(first)) => {
                            row.copy_from_slice(first);
                            for head in heads {
                                row.iter_mut().zip(head).for_each(|(sum, x)| *sum += x);
                            }
                        }
                        _ => {
                            for c in 0..dim {
                                let sum = parts
                                    .chunks_exact(len * dim)
                                    .fold(0.0, |sum, head| sum + head[t * dim + c]);
                                to.set(t, c, sum);
                            }
                        }
                    }
                }
            },
        );
    }
}

/// Writes the gradients. For [`Rule::Add`] and [`Rule::Delta`] that read after
/// the update, without a normaliser.
pub(crate) fn run(
    call: &Call<'_>,
    mut to: Gradients<ArrayViewMut4<'_, f32>>,
    workspace: &mut Workspace,
) -> Result<()> {
    let plan = Plan::new(call.spec);
    if plan.g.rows == 0 || plan.g.cols == 0 {
        // Nothing depends on anything.
        to.map(|mut to| to.fill(0.0));
        return Ok(());
    }
    let dims = to.each_mut().map(|to| to.dim());
    let mut arena = workspace.arena(plan.bytes(call.spec.dims.q_heads, &dims))?;
    let heads = call.spec.dims.q_heads;
    let mut sinks = to.map(|to| Sink::new(to, heads, &mut arena));
    {
        let out = sinks.each_mut().map(|sink| sink.rows());
        let run = Run { call, plan: &plan, out: &out };
        let shares = arena.shares(plan.workers, plan.share());
        let start = |worker| Share::take(shares.take(worker), &plan);
        parallel::for_each(plan.workers, plan.units, start, |share, unit| run.unit(share, unit));
    }
    sinks.map(|sink| sink.sum(plan.workers));
    Ok(())
}

struct Run<'a> {
    call: &'a Call<'a>,
    plan: &'a Plan,
    out: &'a Gradients<OutRows<'a, f32>>,
}

/// What a thread works in.
struct Share<'a> {
    desk: Desk<'a>,
    /// The states at the starts of the chunks of a stretch.
    states: &'a mut [f32],
    /// The states at the starts of stretches.
    marks: &'a mut [f32],
}

impl<'a> Share<'a> {
    fn take(mut arena: Arena<'a>, plan: &Plan) -> Self {
        Self {
            desk: Desk::take(&mut arena, plan),
            states: arena.take(plan.kept * plan.state()),
            marks: arena.take(plan.stretches * plan.state()),
        }
    }
}

impl Run<'_> {
    /// One head of one sequence.
    fn unit(&self, share: &mut Share<'_>, unit: usize) {
        let (call, plan) = (self.call, self.plan);
        let (spec, g, size) = (call.spec, plan.g, plan.state());
        let (index, head) = (unit / spec.dims.q_heads, unit % spec.dims.q_heads);
        let sequence = spec.lengths.sequence(&spec.dims, index);
        let Share { desk, states, marks } = share;
        let load = |from: Option<AnyArray<'_>>, to: &mut [f32]| {
            to.fill(0.0);
            if let Some(from) = from {
                copy_rows(spec.isa, from.rows(index, head, &(0..g.rows)), to, plan.stride);
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
        load(call.state, &mut marks[..size]);
        for stretch in 1..chunks.div_ceil(KEEP) {
            let (before, after) = marks[(stretch - 1) * size..].split_at_mut(size);
            let after = &mut after[..size];
            after.copy_from_slice(before);
            for chunk in (stretch - 1) * KEEP..stretch * KEEP {
                spec.isa.dispatch(Forth { task: task(chunk, Some(chunk + 1)), desk, state: after });
            }
        }
        load(call.d_state, desk.d_state);
        for stretch in (0..chunks.div_ceil(KEEP)).rev() {
            let first = stretch * KEEP;
            let end = (first + KEEP).min(chunks);
            states[..size].copy_from_slice(&marks[stretch * size..][..size]);
            for chunk in first..end - 1 {
                let (before, after) = states[(chunk - first) * size..].split_at_mut(size);
                let after = &mut after[..size];
                after.copy_from_slice(before);
                spec.isa.dispatch(Forth { task: task(chunk, Some(chunk + 1)), desk, state: after });
            }
            for chunk in (first..end).rev() {
                let state = &states[(chunk - first) * size..][..size];
                spec.isa.dispatch(Back {
                    task: task(chunk, chunk.checked_sub(1)),
                    desk,
                    state,
                    out: self.out,
                });
            }
        }
        let to = &mut self.out.state.take(index, head, 0..g.rows);
        spec.isa.dispatch(WriteRows { from: desk.d_state, stride: plan.stride, to });
    }
}

/// Writes as many rows as there are.
struct WriteRows<'a, 'b> {
    from: &'a [f32],
    stride: usize,
    to: &'a mut RowsMut<'b, f32>,
}

impl Kernel for WriteRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for i in 0..self.to.len() {
            let row = &self.from[i * self.stride..][..self.stride];
            s.vectorize(WriteRow { row, factor: 1.0, to: self.to, i });
        }
    }
}

/// What one thread works in. Rows are those of [`Work`]: `[chunk, stride]` for
/// keys, `[chunk, width]` for values, `[chunk, COLUMNS]` for pairs of tokens.
struct Desk<'a> {
    work: Work<'a>,
    /// What a chunk is prepared into.
    piece: &'a mut [f32],
    beta: &'a mut [f32],
    /// Keys as they came.
    keys: &'a mut [f32],
    /// Values less what the state has for their keys, and times beta.
    r: &'a mut [f32],
    e: &'a mut [f32],
    /// `e` as columns, `[columns, COLUMNS]`.
    e_turned: &'a mut [f32],
    d_out: &'a mut [f32],
    /// The gradient of what is written, and of values then.
    d_v: &'a mut [f32],
    d_beta: &'a mut [f32],
    /// Of pairs.
    weights: &'a mut [f32],
    turned: &'a mut [f32],
    /// Keys or queries, decayed as far as a walk over sub-blocks has come.
    moving: &'a mut [f32],
    part: &'a mut [f32],
    d_q: &'a mut [f32],
    d_k: &'a mut [f32],
    /// Of keys where corrections read with them.
    d_read: &'a mut [f32],
    /// Queries or keys as columns: `[rows, COLUMNS]`.
    columns: &'a mut [f32],
    /// The state and its gradient as columns.
    state_turned: &'a mut [f32],
    d_state_turned: &'a mut [f32],
    d_state: &'a mut [f32],
    /// Of log decays of channels, and what of them sums up from the end.
    d_decay: &'a mut [f32],
    gain: &'a mut [f32],
    decays: Decays<&'a mut [f32]>,
}

/// What is made of log decays of channels, rows as those of keys.
#[derive(Debug)]
struct Decays<X> {
    /// Token by token, from the start of its sub-block, to the end of its
    /// sub-block.
    each: X,
    since: X,
    until: X,
    /// From the start of the chunk, to the end of the chunk.
    from_start: X,
    to_end: X,
}

impl<'a> Desk<'a> {
    fn sizes(plan: &Plan) -> [usize; 27] {
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

    fn bytes(plan: &Plan) -> usize {
        Work::bytes(&plan.g) + Self::sizes(plan).iter().map(|&n| bytes_for::<f32>(n)).sum::<usize>()
    }

    fn take(arena: &mut Arena<'a>, plan: &Plan) -> Self {
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

/// A chunk of a head.
struct Task<'a> {
    call: &'a Call<'a>,
    plan: &'a Plan,
    at: Place,
    /// The chunk that comes next.
    following: Option<Place>,
}

impl Task<'_> {
    /// What will be read for the next chunk, to be asked for while this one is
    /// worked on, and where the gradients of this one go.
    fn ahead(&self, out: [Stream; 3]) -> Ahead {
        let mut streams = [Stream::NONE; mem::STREAMS];
        streams[..3].copy_from_slice(&out);
        if let Some(at) = &self.following {
            streams[3] = self.call.d_out.rows(at.batch, at.head, &at.tokens).stream();
            for (to, from) in streams[4..].iter_mut().zip(self.call.source.streams(at)) {
                *to = from;
            }
        }
        Ahead::new(streams)
    }

    /// Loads a chunk and prepares what does not depend on a state, the
    /// coefficients of corrections without their beta.
    #[inline(always)]
    fn prepare<S: Simd>(&self, s: S, desk: &mut Desk<'_>, ahead: &mut Ahead) {
        let (g, spec, len) = (self.plan.g, self.call.spec, self.at.tokens.len());
        let work = &mut desk.work;
        work.load_keys(spec, &g, self.call.source, &self.at);
        desk.keys[..len * g.stride].copy_from_slice(&work.k[..len * g.stride]);
        desk.beta[..len].copy_from_slice(&work.beta[..len]);
        work.beta[..len].fill(1.0);
        let to = Prepared::of(desk.piece, &g);
        let (source, at) = (self.call.source, self.at.clone());
        let mut prepare = Prepare { spec, g, source, at, to, values: &mut [], work, ahead };
        let whole = prepare.fits_whole(s);
        prepare.weigh(s, whole);
        // Of later tokens nothing is seen.
        let to = Prepared::of(desk.piece, &g);
        for t in 0..len {
            to.scores[t * COLUMNS..][t + 1..COLUMNS].fill(0.0);
        }
        if g.rule == Rule::Delta {
            for t in 0..len {
                to.coefficients[t * COLUMNS..][t..COLUMNS].fill(0.0);
            }
        }
    }

    /// What is written under the keys of a chunk that has been prepared.
    #[inline(always)]
    fn correct<S: Simd>(&self, s: S, desk: &mut Desk<'_>, state: &[f32], ahead: &mut Ahead) {
        let (g, len) = (self.plan.g, self.at.tokens.len());
        if g.rule != Rule::Delta {
            return;
        }
        let Desk { work, piece, beta, r, e, weights, .. } = desk;
        let from = Prepared::of_ready(piece, &g);
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

/// The state at the end of a chunk in place of that at its start.
struct Forth<'a, 'b> {
    task: Task<'a>,
    desk: &'a mut Desk<'b>,
    state: &'a mut [f32],
}

impl Kernel for Forth<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, desk, state } = self;
        let (g, len) = (task.plan.g, task.at.tokens.len());
        let ahead = &mut task.ahead([Stream::NONE; 3]);
        task.prepare(s, desk, ahead);
        task.correct(s, desk, state, ahead);
        let from = Prepared::of_ready(desk.piece, &g);
        let e = if g.rule == Rule::Delta { &*desk.e } else { &*desk.work.v };
        let a = Rows::of_slice(from.keys, g.rows, len, COLUMNS);
        product(s, a, (e, g.width), g.width, (state, task.plan.stride), g.update(from.decay), ahead);
    }
}

/// The gradients of a chunk. `desk.d_state` is that of the state at its end
/// and becomes that of the state at its start.
struct Back<'a, 'b> {
    task: Task<'a>,
    desk: &'a mut Desk<'b>,
    /// The state at the start.
    state: &'a [f32],
    out: &'a Gradients<OutRows<'a, f32>>,
}

impl<'a> Kernel for Back<'a, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { task, desk, state, out } = self;
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
        task.prepare(s, desk, ahead);
        task.correct(s, desk, state, ahead);
        if g.width != g.cols {
            desk.d_out.fill(0.0);
        }
        call.d_out.rows(at.batch, at.head, &at.tokens).pack_rows(s, desk.d_out, g.width);
        let Desk { work, piece, beta, keys, r, e, e_turned, d_out, d_v, d_beta, weights, turned, .. } = desk;
        let Desk { moving, part, d_q, d_k, d_read, columns, state_turned, d_state_turned, .. } = desk;
        let Desk { d_state, d_decay, gain, decays: channels, .. } = desk;
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

impl Decays<&mut [f32]> {
    /// From the log decays of some tokens, rows as those of keys.
    #[inline(always)]
    fn fill<S: Simd>(&mut self, s: S, g: &Geometry, decay: &[f32]) {
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

/// What is made of the log decays of a sub-block, row by row: factors token by
/// token, from its start up to and with each token, and from after each token
/// to its end.
#[inline(always)]
fn sub_decays<S: Simd>(
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
struct Pairs<'a> {
    g: Geometry,
    len: usize,
    decays: &'a Decays<&'a mut [f32]>,
}

impl Pairs<'_> {
    /// Adds up, or sets,
    ///
    /// ```text
    /// d_left_i = sum_{j <= i} weights_ij decay_ij right_j
    /// d_right_j = sum_{i >= j} weights_ij decay_ij left_i
    /// ```
    ///
    /// where decays of channels are between `j` and `i`; those of tokens are in
    /// the weights already, which are 0 for `j > i`. `d_left` is set, and
    /// `d_right` updated. With decays of channels no token may go with itself.
    #[inline(always)]
    fn spread<S: Simd>(
        &self,
        s: S,
        weights: &[f32],
        (left, right): (&[f32], &[f32]),
        [turned, moving, part]: [&mut [f32]; 3],
        (d_left, d_right, update): (&mut [f32], &mut [f32], Update<'_>),
        ahead: &mut Ahead,
    ) {
        let (g, len) = (self.g, self.len);
        turn(s, (weights, COLUMNS), len, len, (turned, COLUMNS));
        if g.decay != Decay::Channel {
            for first in (0..len).step_by(BLOCK) {
                let end = (first + BLOCK).min(len);
                let weights = Rows::of_slice(&weights[first * COLUMNS..], end - first, end, COLUMNS);
                let to = (&mut d_left[first * g.stride..], g.stride);
                product(s, weights, (right, g.stride), g.stride, to, Update::Set, ahead);
            }
            upper(s, turned, (left, g.stride), (g.stride, len), (d_right, g.stride), update, ahead);
            return;
        }
        let Decays { since, until, .. } = self.decays;
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
            decay_in_place(s, &mut moving[rows.clone()], &since[rows]);
        }
        // Keys come along to the start of each sub-block.
        for first in (0..len).step_by(SUB) {
            let end = (first + SUB).min(len);
            let rows = first * g.stride..end * g.stride;
            let to = &mut d_left[rows.clone()];
            to.fill(0.0);
            if first > 0 {
                let weights = Rows::of_slice(&weights[first * COLUMNS..], end - first, first, COLUMNS);
                product(s, weights, (moving, g.stride), g.stride, (to, g.stride), Update::Set, ahead);
                multiply_in_place(s, to, &since[rows.clone()]);
            }
            let all = &since[rows.end - g.stride..rows.end];
            for row in moving[..rows.start].chunks_exact_mut(g.stride) {
                decay_in_place(s, row, all);
            }
            moving[rows.clone()].copy_from_slice(&right[rows.clone()]);
            decay_in_place(s, &mut moving[rows.clone()], &until[rows]);
            self.within(s, weights, (left, right), first..end, (d_left, d_right));
        }
    }

    /// Adds what the pairs within a sub-block give, whose decays are
    /// multiplied up token by token.
    #[inline(always)]
    fn within<S: Simd>(
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
                    decay = flush(s, s.mul(decay, s.load(&self.decays.each[at..])));
                    let weight = s.mul(decay, s.splat(weights[i * COLUMNS + j]));
                    sum = s.mul_add(weight, s.load(&left[at..]), sum);
                    let to = s.mul_add(weight, key, s.load(&d_left[at..]));
                    s.store(&mut d_left[at..], to);
                }
                s.store(&mut d_right[j * stride + col..], sum);
            }
        }
    }
}

/// Rows as columns.
#[inline(always)]
fn turn<S: Simd>(
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
fn upper<S: Simd>(
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
fn lower_products<S: Simd>(
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
fn transposed<S: Simd>(s: S, n: &[f32], x: &mut [f32], width: usize, len: usize, ahead: &mut Ahead) {
    for first in (0..len).step_by(SUB).rev() {
        let end = (first + SUB).min(len);
        if end < len {
            let (x, done) = x.split_at_mut(end * width);
            let a = Rows::of_slice(&n[first * COLUMNS + end..], end - first, len - end, COLUMNS);
            product(s, a, (done, width), width, (&mut x[first * width..], width), Update::Add, ahead);
        }
        for i in (first..end - 1).rev() {
            let (x, done) = x.split_at_mut((i + 1) * width);
            let a = Rows::of_slice(&n[i * COLUMNS + i + 1..], 1, end - i - 1, COLUMNS);
            product(s, a, (done, width), width, (&mut x[i * width..], width), Update::Add, ahead);
        }
    }
}

/// Adds the products of pairs of different tokens, rows less columns.
#[inline(always)]
fn pair_sums(a: &[f32], b: &[f32], len: usize, sums: &mut [f64; COLUMNS]) {
    for i in 0..len {
        let (mut row, at) = (0.0, i * COLUMNS);
        for j in 0..i {
            let x = f64::from(a[at + j]) * f64::from(b[at + j]);
            row += x;
            sums[j] -= x;
        }
        sums[i] += row;
    }
}

/// Gradients of one log decay a token in place of what sums up from the end:
/// with what sums up from the start before it, and what all have.
#[inline(always)]
fn sum_up(decay: &[f32], all: f64, earlier: &[f64], later: &mut [f64]) {
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

/// The same for log decays of channels: `gain` sums up from the end, `keys`
/// times `part` from the start.
#[expect(clippy::too_many_arguments, reason = "all of them are rows")]
#[inline(always)]
fn sum_gains<S: Simd>(
    s: S,
    g: &Geometry,
    decay: &[f32],
    all: &[f32],
    keys: &[f32],
    part: &[f32],
    gain: &[f32],
    to: &mut [f32],
) {
    let len = decay.len() / g.stride;
    for col in (0..g.stride).step_by(S::LANES) {
        let mut sum = s.load(&all[col..]);
        for t in 0..len {
            let at = t * g.stride + col;
            s.store(&mut to[at..], sum);
            sum = s.mul_add(s.load(&keys[at..]), s.load(&part[at..]), sum);
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
fn scale_in_place<S: Simd>(s: S, x: &mut [f32], factor: f32) {
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(x, s.mul(s.load(x), s.splat(factor)));
    }
}

/// `to += factor * from`
#[inline(always)]
fn add_scaled<S: Simd>(s: S, to: &mut [f32], from: &[f32], factor: f32) {
    for (to, from) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
        s.store(to, s.mul_add(s.load(from), s.splat(factor), s.load(to)));
    }
}

/// `to += factor * a * b`
#[inline(always)]
fn add_products<S: Simd>(s: S, to: &mut [f32], a: &[f32], b: &[f32], factor: f32) {
    for ((to, a), b) in
        to.chunks_exact_mut(S::LANES).zip(a.chunks_exact(S::LANES)).zip(b.chunks_exact(S::LANES))
    {
        let a = s.mul(s.load(a), s.splat(factor));
        s.store(to, s.mul_add(a, s.load(b), s.load(to)));
    }
}

/// `x *= by`, never subnormal.
#[inline(always)]
fn decay_in_place<S: Simd>(s: S, x: &mut [f32], by: &[f32]) {
    for (x, by) in x.chunks_exact_mut(S::LANES).zip(by.chunks_exact(S::LANES)) {
        s.store(x, flush(s, s.mul(s.load(x), s.load(by))));
    }
}

#[cfg(test)]
mod tests;
