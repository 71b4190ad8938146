//! Softmax attention of one query a head over every prefix of the keys: a
//! scan of softmax states.
//!
//! Tokens are taken in blocks at fixed multiples of [`BLOCK`]. Within a block
//! a state of its own goes from token to token, relative to the largest score
//! so far; an output is that state merged with the state of the blocks
//! before. Where there are fewer heads than threads, the blocks' states are
//! worked out first, all at once, and their outputs then: by the same
//! operations, so that bits do not depend on threads.

use ndarray::{ArrayView3, ArrayViewMut4};

use crate::element::Element;
use crate::engine::kept::{Kept, Slots};
use crate::engine::parallel;
use crate::engine::recur::Place;
use crate::engine::row::{RowState, SoftmaxSum};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::{Dims, Lengths, Sequence};
use crate::score::shift;
use crate::simd::any::{AnyArray, AnyOut, AnyRows};
use crate::simd::mem::{Arena, OutRows, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

/// Tokens of a task. Fixed, because sums are cut here.
const BLOCK: usize = 256;
/// Tokens that are loaded at once: whole vectors of scores.
const CHUNK: usize = 2 * MAX_LANES;

/// One call. Shapes have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefix<'a> {
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    /// `[batch, heads, 1, head_dim]`
    pub(crate) q: AnyArray<'a>,
    /// `[batch, heads or a divisor, len, head_dim]`
    pub(crate) k: AnyArray<'a>,
    /// `[batch, heads or a divisor, len, value_dim]`
    pub(crate) v: AnyArray<'a>,
    /// Added to scores, `[batch, heads or a divisor, len]`; -inf hides.
    pub(crate) bias: Option<ArrayView3<'a, f32>>,
    pub(crate) scale: f32,
    pub(crate) isa: Isa,
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// `head_dim` and `value_dim` rounded up to vectors.
    key_cols: usize,
    out_cols: usize,
    /// Pairs of sequence and head.
    units: usize,
    /// Blocks of the longest sequence.
    blocks: usize,
    workers: usize,
    /// Whether threads share units.
    shared: bool,
    /// Rows of the output.
    rows: usize,
}

impl Plan {
    fn new(call: &Prefix<'_>) -> Self {
        let d = &call.dims;
        let (units, workers) = (d.batch * d.q_heads, parallel::threads());
        let longest = (0..d.batch).map(|i| call.lengths.sequence(d, i).keys.len()).max().unwrap_or(0);
        let blocks = longest.div_ceil(BLOCK);
        let batch = if d.packed { 1 } else { d.batch };
        Self {
            key_cols: d.head_dim.next_multiple_of(MAX_LANES),
            out_cols: d.value_dim.next_multiple_of(MAX_LANES),
            units,
            blocks,
            workers,
            shared: units < workers && blocks > 1,
            rows: batch * d.q_heads * d.q_len,
        }
    }

    /// Elements of a state: the sum of values, that of weights, the largest
    /// score.
    fn state(&self) -> usize {
        self.out_cols + 2
    }

    /// States of blocks, where threads share units.
    fn pieces(&self) -> usize {
        if self.shared { self.units * self.blocks } else { 0 }
    }

    fn bytes(&self) -> usize {
        let claims = [self.rows, self.units, self.pieces()].map(|n| bytes_for::<u64>(claim_words(n)));
        claims.iter().sum::<usize>()
            + bytes_for::<f32>(self.pieces() * self.state())
            + bytes_for_shares(self.workers, Work::bytes(self))
    }
}

/// Bytes of scratch that [`run`] needs.
pub(crate) fn workspace_bytes(call: &Prefix<'_>) -> usize {
    Plan::new(call).bytes()
}

/// What a thread works in.
struct Work<'a> {
    query: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    scores: &'a mut [f32],
    row: &'a mut [f32],
    /// The state of a block's tokens so far, and of all blocks before.
    own: &'a mut [f32],
    before: &'a mut [f32],
}

impl<'a> Work<'a> {
    fn sizes(plan: &Plan) -> [usize; 7] {
        let (keys, values) = (CHUNK * plan.key_cols, CHUNK * plan.out_cols);
        [plan.key_cols, keys, values, CHUNK, plan.out_cols, plan.state(), plan.state()]
    }

    fn bytes(plan: &Plan) -> usize {
        Self::sizes(plan).iter().map(|&n| bytes_for::<f32>(n)).sum()
    }

    fn take(mut arena: Arena<'a>, plan: &Plan) -> Self {
        let [query, keys, values, scores, row, own, before] = Self::sizes(plan);
        let mut work = Self {
            query: arena.take(query),
            keys: arena.take(keys),
            values: arena.take(values),
            scores: arena.take(scores),
            row: arena.take(row),
            own: arena.take(own),
            before: arena.take(before),
        };
        // Columns past the last stay zero.
        for x in [&mut work.query, &mut work.keys, &mut work.values] {
            x.fill(0.0);
        }
        work
    }
}

/// Runs the scan from and to `state`, for each sequence and head `value_dim`
/// sums of values, the sum of weights (0 where there are none yet) and the
/// largest score; or from nothing.
pub(crate) fn run<T: Element>(
    call: &Prefix<'_>,
    state: Option<Kept<'_>>,
    mut out: ArrayViewMut4<'_, T>,
    workspace: &mut Workspace,
) -> Result<()> {
    let plan = Plan::new(call);
    let (heads, slots) = (call.dims.q_heads, state.as_ref().map_or(Slots::default(), |state| state.at));
    let mut arena = workspace.arena(plan.bytes() + slots.bytes(heads))?;
    call.lengths.fill_rest(&mut out, false, T::default());
    let [rows, states, blocks] =
        [plan.rows, slots.states(plan.units, heads), plan.pieces()].map(|n| arena.take(claim_words(n)));
    let out = T::any_out(OutRows::new(out, rows));
    let kept = state.map(|state| Parts::new(state.numbers, call.dims.value_dim + 2, states));
    let totals = arena.take::<f32>(plan.pieces() * plan.state());
    let unit =
        |unit: usize| (call.lengths.sequence(&call.dims, unit / call.dims.q_heads), unit % call.dims.q_heads);
    let block = |sequence: &Sequence, i: usize| {
        let start = (sequence.keys.start + i * BLOCK).min(sequence.keys.end);
        start..(start + BLOCK).min(sequence.keys.end)
    };
    if !plan.shared {
        let shares = arena.shares(plan.workers, Work::bytes(&plan));
        let start = |worker| Work::take(shares.take(worker), &plan);
        parallel::for_each(plan.workers, plan.units, start, |work, i| {
            let (sequence, head) = unit(i);
            let kept = kept.as_ref().map(|kept| kept.take(slots.state(i, heads)));
            load(&plan, kept.as_deref(), work.before);
            for i in 0..plan.blocks {
                let at = Place::new(&sequence, head, block(&sequence, i));
                call.isa.dispatch(Walk { call, plan, at, out: Some(&out), work });
                let Work { own, before, .. } = &mut *work;
                call.isa.dispatch(Merge { into: before, from: own });
            }
            store(work.before, kept);
        });
        return Ok(());
    }
    {
        let parts = Parts::new(totals, plan.state(), blocks);
        let mut arena = arena.reborrow();
        let shares = arena.shares(plan.workers, Work::bytes(&plan));
        let start = |worker| Work::take(shares.take(worker), &plan);
        parallel::for_each(plan.workers, plan.pieces(), start, |work, piece| {
            let (sequence, head) = unit(piece / plan.blocks);
            let at = Place::new(&sequence, head, block(&sequence, piece % plan.blocks));
            call.isa.dispatch(Walk { call, plan, at, out: None, work });
            parts.take(piece).copy_from_slice(work.own);
        });
    }
    // In place of each block's state comes that of all before it.
    {
        let mut arena = arena.reborrow();
        let shares = arena.shares(1, Work::bytes(&plan));
        let Work { own, before, .. } = Work::take(shares.take(0), &plan);
        for (i, totals) in totals.chunks_exact_mut(plan.blocks * plan.state()).enumerate() {
            let kept = kept.as_ref().map(|kept| kept.take(slots.state(i, heads)));
            load(&plan, kept.as_deref(), before);
            for total in totals.chunks_exact_mut(plan.state()) {
                own.copy_from_slice(total);
                total.copy_from_slice(before);
                call.isa.dispatch(Merge { into: before, from: own });
            }
            store(before, kept);
        }
    }
    let totals = &*totals;
    let shares = arena.shares(plan.workers, Work::bytes(&plan));
    let start = |worker| Work::take(shares.take(worker), &plan);
    parallel::for_each(plan.workers, plan.pieces(), start, |work, piece| {
        let (sequence, head) = unit(piece / plan.blocks);
        let at = Place::new(&sequence, head, block(&sequence, piece % plan.blocks));
        work.before.copy_from_slice(&totals[piece * plan.state()..][..plan.state()]);
        call.isa.dispatch(Walk { call, plan, at, out: Some(&out), work });
    });
    Ok(())
}

/// A state as the caller has it, or that of nothing.
fn load(plan: &Plan, from: Option<&[f32]>, to: &mut [f32]) {
    to.fill(0.0);
    let (values, figures) = to.split_at_mut(plan.out_cols);
    if let Some((from, &[sum, max])) = from.and_then(|from| from.split_last_chunk::<2>()) {
        values[..from.len()].copy_from_slice(from);
        figures.copy_from_slice(&[sum, max]);
    }
    if figures[0] == 0.0 {
        figures[1] = f32::NEG_INFINITY;
    }
}

/// The other way.
fn store(from: &[f32], to: Option<&mut [f32]>) {
    let (Some((values, &[sum, max])), Some(to)) = (from.split_last_chunk::<2>(), to) else { return };
    if let Some((to, figures)) = to.split_last_chunk_mut::<2>() {
        to.copy_from_slice(&values[..to.len()]);
        *figures = if sum == 0.0 { [0.0, 0.0] } else { [sum, max] };
    }
}

/// The sums of values of a state, and its figures.
#[inline(always)]
fn parts(state: &mut [f32]) -> (&mut [f32], SoftmaxSum) {
    let (out, figures) = state.split_at_mut(state.len() - 2);
    (out, SoftmaxSum { sum: figures[0], max: figures[1] })
}

#[inline(always)]
fn set(state: &mut [f32], figures: SoftmaxSum) {
    let at = state.len() - 2;
    (state[at], state[at + 1]) = (figures.sum, figures.max);
}

/// Adds the tokens of one state to another.
struct Merge<'a> {
    into: &'a mut [f32],
    from: &'a mut [f32],
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (other, figures) = parts(self.from);
        if figures.sum == 0.0 {
            return;
        }
        let (out, before) = parts(self.into);
        let mut state = RowState { figures: before, out };
        state.merge(s, figures, other);
        let figures = state.figures;
        set(self.into, figures);
    }
}

/// The tokens of a block of one head: their state, and their outputs if they
/// are asked for.
struct Walk<'a, 'b, 'c> {
    call: &'a Prefix<'c>,
    plan: Plan,
    at: Place,
    out: Option<&'a AnyOut<'a>>,
    work: &'a mut Work<'b>,
}

impl Kernel for Walk<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, plan, at, out, work } = self;
        let d = &call.dims;
        work.own.fill(0.0);
        set(work.own, SoftmaxSum::EMPTY);
        let query = Place { tokens: 0..1, ..at.clone() };
        rows(call.q, &query, d.q_heads).pack_rows(s, work.query, plan.key_cols);
        let mut out = out.map(|out| out.take(at.batch, at.head, at.tokens.clone()));
        for first in at.tokens.clone().step_by(CHUNK) {
            let chunk = Place { tokens: first..(first + CHUNK).min(at.tokens.end), ..at.clone() };
            rows(call.k, &chunk, d.q_heads).pack_rows(s, work.keys, plan.key_cols);
            rows(call.v, &chunk, d.q_heads).pack_rows(s, work.values, plan.out_cols);
            scores(s, call, &chunk, work, plan.key_cols);
            for t in 0..chunk.tokens.len() {
                let value = &work.values[t * plan.out_cols..][..plan.out_cols];
                push(s, work.own, work.scores[t], value);
                if let Some(out) = &mut out {
                    let factor = read(s, work.before, work.own, work.row);
                    out.write(s, first - at.tokens.start + t, work.row, factor);
                }
            }
        }
    }
}

/// The rows of a place in an array that may have fewer heads.
fn rows<'a>(x: AnyArray<'a>, at: &Place, heads: usize) -> AnyRows<'a> {
    x.rows(at.batch, at.head_of(x.heads(), heads), &at.tokens)
}

/// Scores; -inf for tokens that are hidden.
#[inline(always)]
fn scores<S: Simd>(s: S, call: &Prefix<'_>, at: &Place, work: &mut Work<'_>, cols: usize) {
    for (group, to) in work.scores.chunks_exact_mut(S::LANES).enumerate() {
        let mut dots = [s.splat(0.0); MAX_LANES];
        for i in 0..S::LANES {
            let key = &work.keys[(group * S::LANES + i) * cols..][..cols];
            for (key, query) in key.chunks_exact(S::LANES).zip(work.query.chunks_exact(S::LANES)) {
                dots[i] = s.mul_add(s.load(key), s.load(query), dots[i]);
            }
        }
        s.store(to, s.mul(s.reduce_add_each(&dots), s.splat(call.scale)));
    }
    for (i, score) in work.scores[..at.tokens.len()].iter_mut().enumerate() {
        if let Some(bias) = &call.bias {
            let head = at.head_of(bias.dim().1, call.dims.q_heads);
            let bias = bias[[at.batch, head, at.tokens.start + i]];
            *score = shift(*score, bias);
        }
    }
}

/// Adds a token to a state.
#[inline(always)]
fn push<S: Simd>(s: S, state: &mut [f32], score: f32, value: &[f32]) {
    if score == f32::NEG_INFINITY {
        return;
    }
    let (out, SoftmaxSum { max, sum }) = parts(state);
    // Infinity minus itself, as in every softmax.
    let whole = if score.is_finite() { 1.0 } else { f32::NAN };
    let (keep, take, top) = if sum == 0.0 {
        (0.0, whole, score)
    } else if score > max {
        (share(max - score), whole, score)
    } else {
        (1.0, share(score - max), max)
    };
    for (out, value) in out.chunks_exact_mut(S::LANES).zip(value.chunks_exact(S::LANES)) {
        let kept = s.mul(s.load(out), s.splat(keep));
        s.store(out, s.mul_add(s.load(value), s.splat(take), kept));
    }
    set(state, SoftmaxSum { max: top, sum: sum * keep + take });
}

/// `e^x`, or 0 rather than a subnormal number.
#[inline(always)]
fn share(x: f32) -> f32 {
    let x = x * std::f32::consts::LOG2_E;
    if x < -126.0 { 0.0 } else { x.exp2() }
}

/// The sum of values of two states together, and the factor that makes an
/// output of it.
#[inline(always)]
fn read<S: Simd>(s: S, before: &mut [f32], own: &mut [f32], row: &mut [f32]) -> f32 {
    let ((a, before), (b, own)) = (parts(before), parts(own));
    let top = if before.max > own.max { before.max } else { own.max };
    let weight = |x: SoftmaxSum| {
        if x.sum == 0.0 {
            0.0
        } else if x.max == top {
            1.0
        } else {
            share(x.max - top)
        }
    };
    let (keep, take) = (weight(before), weight(own));
    for ((row, a), b) in
        row.chunks_exact_mut(S::LANES).zip(a.chunks_exact(S::LANES)).zip(b.chunks_exact(S::LANES))
    {
        let kept = s.mul(s.load(a), s.splat(keep));
        s.store(row, s.mul_add(s.load(b), s.splat(take), kept));
    }
    let sum = before.sum * keep + own.sum * take;
    if sum == 0.0 { 0.0 } else { 1.0 / sum }
}
