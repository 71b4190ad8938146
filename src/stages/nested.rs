//! Softmax in two levels: keys in groups, the weight of a group by a logit of
//! its own, and inside it a softmax over its keys.
//!
//! ```text
//! w_j = softmax(own scores, lambda)_g  exp(s_j) / sum_{l in g} exp(s_l)
//!     = softmax(own scores, s_j + lambda_g - ln sum_{l in g} exp(s_l))_j
//! ```
//!
//! It is one softmax over scores that are shifted group by group, and so runs
//! on the attention engines once the shifts are known.

use std::ops::Range;
use std::sync::Mutex;

use ndarray::ArrayView4;

use crate::cache::{Cache, Cached};
use crate::definition::softmax::{Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Sequence, Site};
use crate::keys::source::{At, Kv, Slots};
use crate::keys::{Keys, TokenLists};
use crate::score::{Plain, Score, define_shift, shift};
use crate::select::score::{Candidates, FEW, ROWS, Scores, room};
use crate::simd::any::AnyArray;
use crate::simd::exp::exp2_flush;
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::attend::Config;
use crate::stages::listed::Order;

/// Groups of keys, and where their logits come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups {
    /// Keys from the start of a group to that of the next.
    pub(crate) unit: usize,
    /// Whether the group of a query's own position is none: its keys count for
    /// themselves, and later ones are hidden.
    pub(crate) own: bool,
}

impl Groups {
    /// The group of a query's own position.
    #[inline(always)]
    fn first_hidden(&self, site: &Site, query: usize) -> usize {
        (query + site.kv_len).checked_sub(site.q_len).map_or(0, |position| position / self.unit)
    }

    /// The groups that a query sees, of those that its list names keys of, with
    /// these keys.
    fn of<'a>(
        &self,
        index: &'a TokenLists,
        site: &Site,
        query: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<'a> {
        let Self { unit, own, .. } = *self;
        let end = if own { self.first_hidden(site, query) * unit } else { site.kv_len };
        let runs = index.runs(site.batch, site.head, query / index.layout().q_block);
        runs.iter().map(move |run| run.start as usize..run.range().end.min(end)).flat_map(move |run| {
            let groups = if run.is_empty() { 0..0 } else { run.start / unit..run.end.div_ceil(unit) };
            groups.map(move |g| (g, run.start.max(g * unit)..run.end.min((g + 1) * unit)))
        })
    }
}

/// Logits of groups: products of rows of queries with one row a group, `[batch,
/// heads or a divisor, len, dim]`, of as many heads as `heads`.
#[derive(Clone, Copy)]
pub(crate) struct Logits<'a> {
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: Kv<'a>,
    pub(crate) heads: usize,
    pub(crate) scale: f32,
}

/// What is added to the scores of each group, for each query.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shifts<X> {
    unit: usize,
    heads: usize,
    queries: usize,
    /// One list a sequence, head and query: groups, ascending, and shifts.
    offsets: Vec<usize>,
    groups: Vec<u32>,
    shifts: Vec<X>,
}

impl<X: Copy> Shifts<X> {
    #[inline(always)]
    fn list(&self, site: &Site, query: usize) -> (&[u32], &[X]) {
        let list = (site.batch * self.heads + site.head) * self.queries + query;
        let range = self.offsets[list]..self.offsets[list + 1];
        (&self.groups[range.clone()], &self.shifts[range])
    }
}

impl Score for Shifts<f32> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let (groups, shifts) = self.list(site, query);
        groups
            .binary_search(&((key / self.unit) as u32))
            .map_or(score, |at| define_shift(score, f64::from(shifts[at])))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        let (groups, shifts) = self.list(site, query);
        let from = groups.partition_point(|&g| (g as usize + 1) * self.unit <= first);
        for (&g, &by) in groups[from..].iter().zip(&shifts[from..]) {
            let start = (g as usize * self.unit).max(first) - first;
            let end = ((g as usize + 1) * self.unit - first).min(scores.len());
            if start >= scores.len() {
                break;
            }
            for score in &mut scores[start..end] {
                *score = shift(*score, by);
            }
        }
    }
}

/// Shifts by definition; no kernel reads them.
impl Score for Shifts<f64> {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let (groups, shifts) = self.list(site, query);
        groups.binary_search(&((key / self.unit) as u32)).map_or(score, |at| define_shift(score, shifts[at]))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        for (t, score) in scores.iter_mut().enumerate() {
            *score = self.define(site, query, first + t, f64::from(*score)) as f32;
        }
    }
}

/// A call whose keys are in groups.
pub(crate) struct Nested<'a> {
    pub(crate) isa: Isa,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    /// The sequences of a cache.
    pub(crate) slots: Option<Slots<'a>>,
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: Kv<'a>,
    pub(crate) scale: f32,
    pub(crate) groups: Groups,
    pub(crate) logits: Logits<'a>,
    pub(crate) index: &'a TokenLists,
}

/// The groups of every query, without shifts.
fn lists<X>(dims: &Dims, lengths: &Lengths<'_>, groups: &Groups, index: &TokenLists) -> Result<Shifts<X>> {
    let queries = index.layout().queries;
    let too_large = || Error::too_large("index", format_args!("{queries} queries"));
    let lists = dims.batch.checked_mul(dims.q_heads).and_then(|n| n.checked_mul(queries));
    let (mut offsets, mut named) = (Vec::new(), Vec::<u32>::new());
    offsets.try_reserve_exact(lists.ok_or_else(too_large)? + 1).map_err(|_| too_large())?;
    offsets.push(0);
    for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
        for site in (0..dims.q_heads).map(|head| sequence.site(head)) {
            for query in 0..queries {
                if query < site.q_len {
                    let first = named.len();
                    for (g, _) in groups.of(index, &site, query) {
                        if named[first..].last() != Some(&(g as u32)) {
                            named.try_reserve(1).map_err(|_| too_large())?;
                            named.push(g as u32);
                        }
                    }
                }
                offsets.push(named.len());
            }
        }
    }
    let unit = groups.unit;
    Ok(Shifts { unit, heads: dims.q_heads, queries, offsets, groups: named, shifts: Vec::new() })
}

impl Nested<'_> {
    fn sequence(&self, index: usize) -> Sequence {
        match &self.slots {
            Some(slots) => slots.sequence(&self.dims, index),
            None => self.lengths.sequence(&self.dims, index),
        }
    }

    /// From the scores of one query to those of the next.
    fn stride(&self) -> usize {
        self.groups.unit.min(self.dims.kv_len).next_multiple_of(64).max(64)
    }

    /// What is added to scores. Tasks are queries of a head that share a list.
    pub(crate) fn shifts(&self) -> Result<Shifts<f32>> {
        let dims = &self.dims;
        let mut shifts = lists::<f32>(dims, &self.lengths, &self.groups, self.index)?;
        let tile = self.index.layout().q_block.min(ROWS);
        // Tiles of a list do not cross into the next.
        let each = self.index.layout().q_block.div_ceil(tile);
        let tiles = self.index.layout().blocks() * each;
        let tasks = dims.batch * dims.q_heads * tiles;
        let mut found = Vec::<Mutex<Vec<f32>>>::new();
        let too_large = |_| Error::too_large("index", format_args!("{tasks} tasks"));
        found.try_reserve_exact(tasks).map_err(too_large)?;
        found.resize_with(tasks, Mutex::default);
        let start = |_| Work::new(self, tile);
        parallel::for_each(parallel::threads(), tasks, start, |work, task| {
            let (list, at) = (task / tiles, task % tiles);
            let sequence = self.sequence(list / dims.q_heads);
            let site = sequence.site(list % dims.q_heads);
            let start = at / each * self.index.layout().q_block;
            let end = (start + self.index.layout().q_block).min(site.q_len);
            let rows = (start + at % each * tile).min(end)..(start + (at % each + 1) * tile).min(end);
            if rows.is_empty() {
                return;
            }
            let of_rows: Vec<usize> = rows.clone().map(|query| shifts.list_of(&site, query).len()).collect();
            let mut to = vec![0.0; of_rows.iter().sum()];
            self.isa.dispatch(Tile { call: self, sequence: &sequence, site: &site, rows, work, to: &mut to });
            if let Ok(mut found) = found[task].lock() {
                *found = to;
            }
        });
        let numbers = found.into_iter().filter_map(|x| x.into_inner().ok());
        let total = shifts.groups.len();
        let too_large = |_| Error::too_large("index", format_args!("{total} groups"));
        shifts.shifts.try_reserve_exact(total).map_err(too_large)?;
        numbers.for_each(|x| shifts.shifts.extend_from_slice(&x));
        Ok(shifts)
    }
}

impl<X> Shifts<X> {
    fn list_of(&self, site: &Site, query: usize) -> Range<usize> {
        let list = (site.batch * self.heads + site.head) * self.queries + query;
        self.offsets[list]..self.offsets[list + 1]
    }
}

/// Calls `run` with the call of an engine, its arrays checked.
pub(crate) fn with_call<Q: Element, K: Element, O: Element, R>(
    config: &Config<Order, Plain>,
    x: Qkv<'_, Q, K, O>,
    nested: &Nested<'_>,
    run: impl FnOnce(&Call<'_>) -> R,
) -> Result<R> {
    let keys = Keys::Tokens(nested.index);
    keys.check(&x.dims()?, &x.lengths)?;
    let call = config.call(x.reborrow(), Norm::Softmax { sinks: None }, None)?;
    let score = &nested.shifts()?;
    Ok(run(&Call { keys, score, ..call }))
}

/// The same over a cache.
pub(crate) fn with_call_cached<Q: Element, C: Cache + ?Sized, O: Element, R>(
    config: &Config<Order, Plain>,
    x: Cached<'_, Q, C, O>,
    nested: &Nested<'_>,
    run: impl FnOnce(&Call<'_>) -> R,
) -> Result<R> {
    let keys = Keys::Tokens(nested.index);
    keys.check(&nested.dims, &nested.lengths)?;
    let call = config.call_cached(x.reborrow(), Norm::Softmax { sinks: None })?;
    let score = &nested.shifts()?;
    Ok(run(&Call { keys, score, ..call }))
}

/// Its definition, where the rows of logits lie by sequence. A score is made of three: its own, those of its group, and
/// the logit of that.
pub(crate) fn define_on<Q: Element, K: Element, O: Element>(
    config: &Config<Order, Plain>,
    x: Qkv<'_, Q, K, O>,
    index: &TokenLists,
    groups: &Groups,
    logits: (&ArrayView4<'_, Q>, &ArrayView4<'_, K>, f64),
) -> Result<Reference> {
    let (dims, keys) = (x.dims()?, Keys::Tokens(index));
    keys.check(&dims, &x.lengths)?;
    let shifts = define(&dims, &x.lengths, (&x.q, &x.k, config.scale(&dims)), logits, groups, index)?;
    let config = config.with_score(shifts).listed(keys);
    let mut reference =
        config.definition(x.reborrow(), Normalisation::Softmax { sinks: None }, None)?.compute()?;
    reference.bound *= 3.0;
    Ok(reference)
}

/// What a thread works in.
struct Work {
    queries: Vec<f32>,
    outer: Vec<f32>,
    room: Vec<f32>,
    scores: Vec<f32>,
    logits: Vec<f32>,
    /// Of each query the largest score of the group at hand, the sum relative to
    /// it, and where its next shift goes.
    state: Vec<(f32, f32, usize)>,
}

impl Work {
    fn new(call: &Nested<'_>, rows: usize) -> Self {
        let (d, f) = (call.dims.head_dim, call.logits.q.dim().3);
        let apart = |d: usize| rows * d.next_multiple_of(call.isa.lanes());
        Self {
            queries: vec![0.0; apart(d)],
            outer: vec![0.0; apart(f)],
            room: vec![0.0; room(d.max(f))],
            scores: vec![0.0; (rows + 1) * call.stride()],
            logits: vec![0.0; (rows + 1) * 64],
            state: vec![(0.0, 0.0, 0); rows],
        }
    }
}

/// The shifts of some queries that share a list, query by query.
struct Tile<'a, 'b> {
    call: &'a Nested<'b>,
    sequence: &'a Sequence,
    site: &'a Site,
    rows: Range<usize>,
    work: &'a mut Work,
    to: &'a mut [f32],
}

/// Some keys.
fn rows_at<'r>(kv: &'r Kv<'_>, at: At<'r>) -> Candidates<'r> {
    match kv.arrays() {
        Some(_) => Candidates::Rows(kv.keys(Isa::Scalar, &at, &mut [])),
        None => Candidates::Cache(kv, at),
    }
}

/// A score as it is visible; NaN stays.
#[inline(always)]
fn saturated(x: f32) -> f32 {
    x.clamp(f32::MIN, f32::MAX)
}

impl Kernel for Tile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, sequence, site, rows, work, to } = self;
        let Work { queries, outer, room, scores, logits, state } = work;
        let n = rows.len();
        let of = |heads: usize| site.head / (call.dims.q_heads / heads.max(1)).max(1);
        let place = sequence.queries.start + rows.start..sequence.queries.start + rows.end;
        for (array, to) in [(&call.q, &mut *queries), (&call.logits.q, &mut *outer)] {
            let apart = array.dim().3.next_multiple_of(S::LANES);
            array.rows(sequence.batch, of(array.heads()), &place).pack_rows(s, to, apart);
        }
        // Where each query's shifts begin, and the group that none is of.
        let mut first = 0;
        for (r, state) in state[..n].iter_mut().enumerate() {
            *state = (f32::NEG_INFINITY, 0.0, first);
            let mut last = None;
            for (g, _) in call.groups.of(call.index, site, rows.start + r) {
                first += usize::from(last != Some(g));
                last = Some(g);
            }
        }
        // The last query sees all groups that the others do.
        let mut pieces = call.groups.of(call.index, site, rows.end - 1).peekable();
        while let Some((g, keys)) = pieces.next() {
            let (len, few, stride) = (keys.len(), n <= FEW, call.stride());
            let at = At { sequence, kv_head: of(call.dims.kv_heads), keys };
            let candidates = rows_at(&call.k, at);
            let width = call.dims.head_dim;
            s.vectorize(Scores { queries, rows: n, width, candidates, few, room, out: scores, stride });
            for ((most, sum, _), row) in state[..n].iter_mut().zip(scores.chunks_mut(stride)) {
                (*most, *sum) = joined(s, (*most, *sum), call.scale, &mut row[..len]);
            }
            if pieces.peek().is_some_and(|(next, _)| *next == g) {
                continue;
            }
            let Logits { q, k, heads, scale } = &call.logits;
            let candidates = rows_at(k, At { sequence, kv_head: of(*heads), keys: g..g + 1 });
            let width = q.dim().3;
            s.vectorize(Scores {
                queries: outer,
                rows: n,
                width,
                candidates,
                few,
                room,
                out: logits,
                stride: 64,
            });
            for (r, (most, sum, at)) in state[..n].iter_mut().enumerate() {
                if !call.groups.own || g < call.groups.first_hidden(site, rows.start + r) {
                    let logit = logits[r * 64];
                    // What is infinite shows: it hides the group, or takes all.
                    to[*at] = if logit.is_infinite() {
                        scale * logit
                    } else {
                        saturated(saturated(scale * logit) - *most - sum.ln())
                    };
                    *at += 1;
                }
                (*most, *sum) = (f32::NEG_INFINITY, 0.0);
            }
        }
    }
}

/// The largest of some scaled scores, and the sum of exponentials relative to
/// it, with those of others before.
#[inline(always)]
fn joined<S: Simd>(s: S, (most, sum): (f32, f32), scale: f32, row: &mut [f32]) -> (f32, f32) {
    let mut largest = s.splat(f32::NEG_INFINITY);
    for part in row.chunks_mut(S::LANES) {
        // The order keeps NaN.
        let x = s.mul(s.load_tail(part), s.splat(scale));
        let x = s.min(s.splat(f32::MAX), s.max(s.splat(f32::MIN), x));
        largest = s.max(s.select(s.mask(u64::MAX >> (64 - part.len())), x, largest), largest);
        s.store_tail(part, x);
    }
    let new = most.max(s.reduce_max(largest));
    let (base, log2_e) = (s.splat(new), s.splat(std::f32::consts::LOG2_E));
    let mut acc = s.splat(0.0);
    for part in row.chunks(S::LANES) {
        let weight = exp2_flush(s, s.mul(s.sub(s.load_tail(part), base), log2_e));
        acc = s.add(acc, s.select(s.mask(u64::MAX >> (64 - part.len())), weight, s.splat(0.0)));
    }
    let before = if sum == 0.0 { 0.0 } else { sum * (most - new).exp() };
    (new, before + s.reduce_add(acc))
}

/// The shifts by definition: all scores of a group, all exponentials, its
/// logit. Of the two products one is that of keys, the other that of logits.
fn define<Q: Element, K: Element>(
    dims: &Dims,
    lengths: &Lengths<'_>,
    (q, k, scale): (&ArrayView4<'_, Q>, &ArrayView4<'_, K>, f64),
    (outer_q, outer_k, outer_scale): (&ArrayView4<'_, Q>, &ArrayView4<'_, K>, f64),
    groups: &Groups,
    index: &TokenLists,
) -> Result<Shifts<f64>> {
    const MOST: f64 = f32::MAX as f64;
    let mut shifts = lists::<f64>(dims, lengths, groups, index)?;
    for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
        for site in (0..dims.q_heads).map(|head| sequence.site(head)) {
            let of = |heads: usize| site.head / (dims.q_heads / heads);
            for i in 0..site.q_len {
                let row = sequence.queries.start + i;
                let product = |q: &ArrayView4<'_, Q>, k: &ArrayView4<'_, K>, scale: f64, at: [usize; 2]| {
                    let (b, [entry, j]) = (sequence.batch, at);
                    let terms = (0..q.dim().3).map(|c| {
                        q[[b, of(q.dim().1), row, c]].to_f64() * k[[entry, of(k.dim().1), j, c]].to_f64()
                    });
                    let score = scale * terms.sum::<f64>();
                    if score.is_finite() { score.clamp(-MOST, MOST) } else { score }
                };
                let named: Vec<_> = groups.of(index, &site, i).collect();
                for at in shifts.list_of(&site, i) {
                    let g = shifts.groups[at];
                    let keys =
                        named.iter().filter(|(of, _)| *of == g as usize).flat_map(|(_, keys)| keys.clone());
                    let place = |j: usize| [sequence.batch, sequence.keys.start + j];
                    let scores: Vec<f64> = keys.map(|j| product(q, k, scale, place(j))).collect();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
                    let logit = product(outer_q, outer_k, outer_scale, [sequence.index, g as usize]);
                    // Where all keys are hidden, nothing is shifted.
                    let hidden = scores.iter().all(|&score| score == f64::NEG_INFINITY);
                    shifts.shifts.push(match logit {
                        _ if hidden => 0.0,
                        // It hides the group, whatever is in it.
                        f64::NEG_INFINITY => logit,
                        _ => logit - most - sum.ln(),
                    });
                }
            }
        }
    }
    Ok(shifts)
}
