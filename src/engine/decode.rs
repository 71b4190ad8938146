//! Few queries against many keys.
//!
//! Reading keys and values is what costs, so each is read once, in its
//! storage type, for all query rows of all heads that share it. Keys are cut
//! into chunks at fixed multiples of [`CHUNK`]; a task is one chunk of one
//! key/value head, and the states of the chunks are merged in order, so the
//! bits depend on nothing but the lengths.

use ndarray::{ArrayViewMut3, ArrayViewMut4, Axis};

use crate::element::Element;
use crate::engine::call::{Call, Sequence};
use crate::engine::pack::PackRows;
use crate::engine::parallel;
use crate::engine::row::{Figures, RowState, mask_row, visible_of_row, write_row};
use crate::engine::workspace::Workspace;
use crate::mask::{Coverage, Mask};
use crate::score::Score;
use crate::simd::mem::{Arena, OutRows, Parts, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Kernel, MAX_LANES, Simd};

/// Keys of a task. Fixed, because sums are cut here.
const CHUNK: usize = 1024;
/// Keys whose scores are held at once: one word of mask bits.
const BLOCK: usize = 64;

#[derive(Clone, Copy, Debug)]
struct Plan {
    workers: usize,
    units: usize,
    /// Chunks of the longest sequence.
    chunks: usize,
    /// Query rows of the longest sequence, heads of a group together.
    rows: usize,
    /// `head_dim` and `value_dim` rounded up to vectors.
    key_cols: usize,
    out_cols: usize,
    /// Rows of the output.
    out_rows: usize,
}

impl Plan {
    fn new<T: Element, M, F>(call: &Call<'_, T, M, F>) -> Self {
        let (q_len, kv_len) = call.longest();
        let lanes = call.isa.lanes();
        Self {
            workers: parallel::threads(),
            units: call.dims.batch * call.dims.kv_heads,
            chunks: kv_len.div_ceil(CHUNK),
            rows: call.group() * q_len,
            key_cols: call.dims.head_dim.next_multiple_of(lanes),
            out_cols: call.dims.value_dim.next_multiple_of(lanes),
            out_rows: call.out_rows(),
        }
    }

    /// Elements of the state of one chunk: for each row the output, then the
    /// maxima, then the sums.
    fn state(&self) -> usize {
        self.rows * (self.out_cols + 2)
    }

    fn share_bytes(&self) -> usize {
        bytes_for::<f32>(self.rows * self.key_cols)
            + bytes_for::<f32>(self.rows * BLOCK)
            + bytes_for::<u64>(self.rows)
            + bytes_for::<f32>(BLOCK * self.key_cols)
            + bytes_for::<f32>(BLOCK * self.out_cols)
    }

    fn bytes(&self) -> usize {
        let pieces = self.units * self.chunks;
        bytes_for::<f32>(pieces * self.state())
            + bytes_for::<u64>(claim_words(pieces))
            + 2 * bytes_for::<u64>(claim_words(self.out_rows))
            + bytes_for_shares(self.workers, self.share_bytes())
    }
}

/// Bytes of scratch that a call needs.
pub(crate) fn workspace_bytes<T: Element, M, F>(call: &Call<'_, T, M, F>) -> usize {
    Plan::new(call).bytes()
}

/// What one thread works in.
struct Scratch<'a> {
    queries: &'a mut [f32],
    scores: &'a mut [f32],
    bits: &'a mut [u64],
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn take(arena: &mut Arena<'a>, plan: &Plan) -> Self {
        Self {
            queries: arena.take(plan.rows * plan.key_cols),
            scores: arena.take(plan.rows * BLOCK),
            bits: arena.take(plan.rows),
            keys: arena.take(BLOCK * plan.key_cols),
            values: arena.take(BLOCK * plan.out_cols),
        }
    }
}

/// `out` and, if asked for, the natural logarithm of each row's sum of
/// exponentials `[batch, q_heads, q_len]`.
pub(crate) fn decode<T: Element, M: Mask, F: Score>(
    call: &Call<'_, T, M, F>,
    out: ArrayViewMut4<'_, T>,
    lse: Option<ArrayViewMut3<'_, f32>>,
    workspace: &mut Workspace,
) {
    let plan = Plan::new(call);
    let mut arena = workspace.arena(plan.bytes());
    let pieces = plan.units * plan.chunks;
    let states = arena.take::<f32>(pieces * plan.state());
    let claims = arena.take(claim_words(pieces));
    {
        let parts = Parts::new(states, plan.state(), claims);
        let shares = arena.reborrow().shares(plan.workers, plan.share_bytes());
        let start = |worker: usize| Scratch::take(&mut shares.take(worker), &plan);
        parallel::for_each(plan.workers, pieces, start, |scratch, piece| {
            let (unit, chunk) = (piece / plan.chunks, piece % plan.chunks);
            let sequence = call.sequence(unit / call.dims.kv_heads);
            if chunk * CHUNK < sequence.keys.len() {
                let (state, kv_head) = (parts.take(piece), unit % call.dims.kv_heads);
                call.isa.dispatch(Chunk { call, plan, sequence, kv_head, chunk, state, scratch });
            }
        });
    }
    let out = OutRows::new(out, arena.take(claim_words(plan.out_rows)));
    let claims = arena.take(claim_words(plan.out_rows));
    let lse = lse.map(|lse| OutRows::new(lse.insert_axis(Axis(3)), claims));
    let states = &*states;
    let shares = arena.shares(plan.workers, plan.share_bytes());
    let start = |worker: usize| shares.take(worker).take::<f32>(plan.out_cols);
    parallel::for_each(plan.workers, plan.units, start, |row, unit| {
        let sequence = call.sequence(unit / call.dims.kv_heads);
        let states = &states[unit * plan.chunks * plan.state()..][..plan.chunks * plan.state()];
        let kv_head = unit % call.dims.kv_heads;
        call.isa.dispatch(Finish { call, plan, sequence, kv_head, states, row, out: &out, lse: lse.as_ref() });
    });
}

/// One chunk of keys of one key/value head: its state.
struct Chunk<'a, 'b, 'c, T, M, F> {
    call: &'a Call<'c, T, M, F>,
    plan: Plan,
    sequence: Sequence,
    kv_head: usize,
    chunk: usize,
    state: &'a mut [f32],
    scratch: &'a mut Scratch<'b>,
}

impl<T: Element, M: Mask, F: Score> Kernel for Chunk<'_, '_, '_, T, M, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let rows = self.rows();
        let cols = self.plan.key_cols;
        self.scratch.queries[..rows * cols].fill(0.0);
        for r in 0..rows {
            let (head, query) = place(&self.sequence, self.kv_head, self.call.group(), r);
            let from = self.call.queries(&self.sequence, head);
            let to = &mut self.scratch.queries[r * cols..][..self.call.dims.head_dim];
            s.vectorize(PackRows { from: from.part(query..query + 1, 0..from.cols()), to });
        }
        // A masked key's value takes part with weight 0, which NaN and
        // infinity survive. Seldom: so look afterwards, and leave masked
        // values out if it happened.
        let (masked, finite) = self.pass(s, false);
        if masked && !finite {
            self.pass(s, true);
        }
    }
}

impl<T: Element, M: Mask, F: Score> Chunk<'_, '_, '_, T, M, F> {
    fn rows(&self) -> usize {
        self.call.group() * self.sequence.queries.len()
    }


    /// Computes the state; says whether anything was masked and whether the
    /// output is finite. `careful` leaves out the values of masked keys.
    #[inline(always)]
    fn pass<S: Simd>(&mut self, s: S, careful: bool) -> (bool, bool) {
        let (rows, plan) = (self.rows(), self.plan);
        let (out, figures) = self.state.split_at_mut(plan.rows * plan.out_cols);
        let (max, sum) = figures.split_at_mut(plan.rows);
        out[..rows * plan.out_cols].fill(0.0);
        max[..rows].fill(Figures::EMPTY.max);
        sum[..rows].fill(Figures::EMPTY.sum);
        let all_keys = self.call.keys(&self.sequence, self.kv_head);
        let all_values = self.call.values(&self.sequence, self.kv_head);
        let kv_len = all_keys.len();
        let mut any_masked = !F::IDENTITY;
        let end = ((self.chunk + 1) * CHUNK).min(kv_len);
        for first in (self.chunk * CHUNK..end).step_by(BLOCK) {
            let n = (end - first).min(BLOCK);
            // Which rows see which of these keys.
            let (mut some, mut all) = (0, u64::MAX);
            let valid = u64::MAX >> (64 - n);
            for r in 0..rows {
                let (head, query) = place(&self.sequence, self.kv_head, self.call.group(), r);
                let site = self.sequence.site(head);
                let bits = match self.call.mask.coverage(&site, query..query + 1, first..first + n) {
                    Coverage::Empty => 0,
                    Coverage::Full => valid,
                    Coverage::Partial => self.call.mask.bits(&site, query, first) & valid,
                };
                self.scratch.bits[r] = bits;
                some |= bits;
                all &= bits;
            }
            if some == 0 {
                continue;
            }
            any_masked |= all != valid;
            let keys = all_keys.part(first..first + n, 0..all_keys.cols());
            let values = all_values.part(first..first + n, 0..all_values.cols());
            let next = all_keys.part((first + n).min(kv_len)..(first + 2 * BLOCK).min(kv_len), 0..all_keys.cols());
            let Scratch { queries, scores, bits, keys: key_copy, values: value_copy } = &mut *self.scratch;
            // Rows whose elements are not neighbours are copied first.
            if keys.is_unit() {
                score_block(s, &keys, &values, queries, plan.key_cols, scores, rows);
            } else {
                s.vectorize(PackRows { from: keys, to: key_copy });
                let keys = Rows::of_slice(key_copy, n, keys.cols(), keys.cols());
                score_block(s, &keys, &values, queries, plan.key_cols, scores, rows);
            }
            for r in 0..rows {
                let (head, query) = place(&self.sequence, self.kv_head, self.call.group(), r);
                let site = self.sequence.site(head);
                let row = &mut scores[r * BLOCK..][..BLOCK];
                let factor = self.call.finish_scores(s, &site, query, first, &mut row[..n]);
                if bits[r] != u64::MAX {
                    mask_row(s, row, &bits[r..=r]);
                }
                if careful {
                    visible_of_row(s, row, &mut bits[r..=r]);
                }
                let mut figures = Figures { max: max[r], sum: sum[r] };
                let out = &mut out[r * plan.out_cols..][..plan.out_cols];
                self.call.norm.weigh(s, row, factor, &site, &mut figures, out);
                (max[r], sum[r]) = (figures.max, figures.sum);
            }
            let weights = Weights { scores, bits, rows, careful };
            if values.is_unit() {
                gather_block(s, &values, &next, weights, out, plan.out_cols);
            } else {
                s.vectorize(PackRows { from: values, to: value_copy });
                let values = Rows::of_slice(value_copy, n, values.cols(), values.cols());
                gather_block(s, &values, &next, weights, out, plan.out_cols);
            }
        }
        let mut zero = s.splat(0.0);
        for j in (0..rows * plan.out_cols).step_by(S::LANES) {
            zero = s.mul_add(s.load(&out[j..]), s.splat(0.0), zero);
        }
        (any_masked, s.reduce_add(zero) == 0.0)
    }
}

/// The query head and the query of row `r` of a group.
#[inline(always)]
fn place(sequence: &Sequence, kv_head: usize, group: usize, r: usize) -> (usize, usize) {
    let q_len = sequence.queries.len();
    (kv_head * group + r / q_len, r % q_len)
}

/// Asks for the cache lines of a row.
#[inline(always)]
fn prefetch_row<S: Simd, T: Copy>(s: S, rows: &Rows<'_, T>, i: usize) {
    if i < rows.len() && let Some(row) = rows.row(i) {
        for j in (0..row.len()).step_by(64 / size_of::<T>()) {
            s.prefetch(row, j);
        }
    }
}

/// `scores[r][key] = queries[r] . keys[key]`, and asks for the values of the
/// same keys meanwhile. Scores of keys that are not there are 0.
#[inline(always)]
fn score_block<S: Simd, T: Element, U: Element>(
    s: S,
    keys: &Rows<'_, T>,
    values: &Rows<'_, U>,
    queries: &[f32],
    key_cols: usize,
    scores: &mut [f32],
    rows: usize,
) {
    scores[..rows * BLOCK].fill(0.0);
    let mut r = 0;
    while r < rows {
        let queries = &queries[r * key_cols..];
        let scores = &mut scores[r * BLOCK..];
        let ahead = (r == 0).then_some(values);
        match rows - r {
            1 => {
                score_rows::<S, T, U, 1>(s, keys, ahead, queries, key_cols, scores);
                r += 1;
            }
            2 | 3 => {
                score_rows::<S, T, U, 2>(s, keys, ahead, queries, key_cols, scores);
                r += 2;
            }
            _ => {
                score_rows::<S, T, U, 4>(s, keys, ahead, queries, key_cols, scores);
                r += 4;
            }
        }
    }
}

/// [`score_block`] for `R` rows: as many keys at once as make one vector of
/// sums.
#[inline(always)]
fn score_rows<S: Simd, T: Element, U: Element, const R: usize>(
    s: S,
    keys: &Rows<'_, T>,
    ahead: Option<&Rows<'_, U>>,
    queries: &[f32],
    key_cols: usize,
    scores: &mut [f32],
) {
    let at_once = S::LANES / R;
    let empty: &[T] = &[];
    for first in (0..keys.len()).step_by(at_once) {
        // Lane r * at_once + t is row r with key first + t. Keys that are not
        // there are read as the last one; nobody looks at their scores.
        let row: [&[T]; MAX_LANES] = std::array::from_fn(|t| {
            if t < at_once { keys.row((first + t).min(keys.len() - 1)).unwrap_or(empty) } else { empty }
        });
        if let Some(values) = ahead {
            for t in 0..at_once {
                prefetch_row(s, values, first + t);
            }
        }
        let mut acc = [s.splat(0.0); MAX_LANES];
        let whole = keys.cols() / S::LANES * S::LANES;
        for j in (0..whole).step_by(S::LANES) {
            let q: [S::F; R] = std::array::from_fn(|r| s.load(&queries[r * key_cols + j..]));
            for t in 0..at_once {
                let k = T::load(s, &row[t][j..]);
                for r in 0..R {
                    acc[r * at_once + t] = s.mul_add(q[r], k, acc[r * at_once + t]);
                }
            }
        }
        if whole < keys.cols() {
            let q: [S::F; R] = std::array::from_fn(|r| s.load(&queries[r * key_cols + whole..]));
            for t in 0..at_once {
                let k = T::load_tail(s, &row[t][whole..]);
                for r in 0..R {
                    acc[r * at_once + t] = s.mul_add(q[r], k, acc[r * at_once + t]);
                }
            }
        }
        let mut sums = [0.0; MAX_LANES];
        s.store(&mut sums, s.reduce_add_each(&acc));
        let n = at_once.min(keys.len() - first);
        for r in 0..R {
            scores[r * BLOCK + first..][..n].copy_from_slice(&sums[r * at_once..][..n]);
        }
    }
}

/// The weights of a block.
#[derive(Clone, Copy)]
struct Weights<'a> {
    scores: &'a [f32],
    bits: &'a [u64],
    rows: usize,
    /// Whether masked values must be left out.
    careful: bool,
}

/// `out[r] += sum over keys of weights[r][key] * values[key]`, and asks for
/// the keys of the next block meanwhile.
#[inline(always)]
fn gather_block<S: Simd, T: Element, U: Element>(
    s: S,
    values: &Rows<'_, T>,
    next: &Rows<'_, U>,
    weights: Weights<'_>,
    out: &mut [f32],
    out_cols: usize,
) {
    if weights.careful {
        for r in 0..weights.rows {
            let out = &mut out[r * out_cols..][..out_cols];
            for key in (0..values.len()).filter(|key| weights.bits[r] >> key & 1 == 1) {
                let weight = s.splat(weights.scores[r * BLOCK + key]);
                let row = values.row(key).unwrap_or(&[]);
                for j in (0..row.len()).step_by(S::LANES) {
                    let x = s.mul_add(weight, T::load_tail(s, &row[j..]), s.load(&out[j..]));
                    s.store(&mut out[j..], x);
                }
            }
        }
        return;
    }
    let mut r = 0;
    while r < weights.rows {
        let scores = &weights.scores[r * BLOCK..];
        let out = &mut out[r * out_cols..];
        let ahead = (r == 0).then_some(next);
        match weights.rows - r {
            1 => {
                gather_rows::<S, T, U, 1>(s, values, ahead, scores, out, out_cols);
                r += 1;
            }
            2 | 3 => {
                gather_rows::<S, T, U, 2>(s, values, ahead, scores, out, out_cols);
                r += 2;
            }
            _ => {
                gather_rows::<S, T, U, 4>(s, values, ahead, scores, out, out_cols);
                r += 4;
            }
        }
    }
}

/// [`gather_block`] for `R` rows, four vectors of columns at a time.
#[inline(always)]
fn gather_rows<S: Simd, T: Element, U: Element, const R: usize>(
    s: S,
    values: &Rows<'_, T>,
    ahead: Option<&Rows<'_, U>>,
    weights: &[f32],
    out: &mut [f32],
    out_cols: usize,
) {
    const WIDE: usize = 4;
    let cols = values.cols();
    let mut j = 0;
    while j < cols {
        let ahead = ahead.filter(|_| j == 0);
        if j + WIDE * S::LANES <= cols {
            gather_cols::<S, T, U, R, WIDE>(s, values, ahead, weights, out, out_cols, j);
            j += WIDE * S::LANES;
        } else {
            gather_cols::<S, T, U, R, 1>(s, values, ahead, weights, out, out_cols, j);
            j += S::LANES;
        }
    }
}

/// [`gather_rows`] for `C` vectors of columns. Sums of a block are added up
/// by themselves first.
#[inline(always)]
fn gather_cols<S: Simd, T: Element, U: Element, const R: usize, const C: usize>(
    s: S,
    values: &Rows<'_, T>,
    ahead: Option<&Rows<'_, U>>,
    weights: &[f32],
    out: &mut [f32],
    out_cols: usize,
    col: usize,
) {
    let mut acc = [[s.splat(0.0); C]; R];
    let whole = col + C * S::LANES <= values.cols();
    for key in 0..values.len() {
        if let Some(keys) = ahead {
            prefetch_row(s, keys, key);
        }
        let row = values.row(key).unwrap_or(&[]);
        let v: [S::F; C] = std::array::from_fn(|c| {
            if whole { T::load(s, &row[col + c * S::LANES..]) } else { T::load_tail(s, &row[col..]) }
        });
        for r in 0..R {
            let w = s.splat(weights[r * BLOCK + key]);
            for c in 0..C {
                acc[r][c] = s.mul_add(w, v[c], acc[r][c]);
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            let out = &mut out[r * out_cols + col + c * S::LANES..];
            s.store(out, s.add(s.load(out), acc[r][c]));
        }
    }
}

/// Merges the states of the chunks of one key/value head, in order, and
/// writes its rows.
struct Finish<'a, 'c, T, M, F> {
    call: &'a Call<'c, T, M, F>,
    plan: Plan,
    sequence: Sequence,
    kv_head: usize,
    states: &'a [f32],
    row: &'a mut [f32],
    out: &'a OutRows<'a, T>,
    lse: Option<&'a OutRows<'a, f32>>,
}

impl<T: Element, M: Mask, F: Score> Kernel for Finish<'_, '_, T, M, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, plan, sequence, kv_head, states, row, out, lse } = self;
        for r in 0..call.group() * sequence.queries.len() {
            let (head, query) = place(&sequence, kv_head, call.group(), r);
            row.fill(0.0);
            let mut state = RowState { figures: call.norm.start(head), out: row };
            for chunk in 0..sequence.keys.len().div_ceil(CHUNK) {
                let (out, figures) = states[chunk * plan.state()..][..plan.state()].split_at(plan.rows * plan.out_cols);
                let out = &out[r * plan.out_cols..][..plan.out_cols];
                state.merge(s, Figures { max: figures[r], sum: figures[plan.rows + r] }, out);
            }
            let place = sequence.queries.start + query;
            write_row(s, call.norm, &state, &mut out.take(sequence.batch, head, place..place + 1), 0);
            if let Some(lse) = lse {
                lse.take(sequence.batch, head, place..place + 1).set(0, 0, state.figures.lse());
            }
        }
    }
}
