//! Few queries against many keys.
//!
//! Reading keys and values is what costs, so each is read once, in its
//! storage type, for all query rows of all heads that share it. Keys are cut
//! into chunks at fixed multiples of [`CHUNK`]; a task is one chunk of one
//! key/value head, and the states of the chunks are merged in order, so the
//! bits depend on nothing but the lengths.

use std::ops::Range;

use crate::engine::call::Call;
use crate::engine::row::{Figures, RowState, mask_row, visible_of_row};
use crate::engine::{Output, is_decode, parallel};
use crate::input::Sequence;
use crate::mask::{Block, Coverage};
use crate::simd::any::{AnyRows, DotsCall, GatherCall};
use crate::simd::mem::{Arena, PLACES, Parts, RowsAhead, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Kernel, Simd};

/// Keys of a task. Fixed, because sums are cut here.
const CHUNK: usize = 1024;
/// Keys whose scores are held at once: one word of mask bits.
const BLOCK: usize = 64;
/// Bytes of keys and values that are asked for while as many are read, and the
/// most blocks of keys that they are.
const AHEAD: usize = 128 << 10;
const MOST_AHEAD: usize = 4;

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
}

impl Plan {
    fn new(call: &Call<'_>) -> Self {
        let (q_len, kv_len) = call.longest(|sequence| is_decode(call, sequence));
        let lanes = call.isa.lanes();
        Self {
            workers: parallel::threads(),
            units: call.dims.batch * call.dims.kv_heads,
            chunks: kv_len.div_ceil(CHUNK),
            rows: call.group() * q_len,
            key_cols: call.dims.head_dim.next_multiple_of(lanes),
            out_cols: call.dims.value_dim.next_multiple_of(lanes),
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
            + bytes_for_shares(self.workers, self.share_bytes())
    }
}

/// Bytes of scratch that a call needs.
pub(crate) fn workspace_bytes(call: &Call<'_>) -> usize {
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

/// Output and figures of a call.
pub(crate) fn decode(call: &Call<'_>, output: &Output<'_>, mut arena: Arena<'_>) {
    let plan = Plan::new(call);
    let pieces = plan.units * plan.chunks;
    let states = arena.take::<f32>(pieces * plan.state());
    let claims = arena.take(claim_words(pieces));
    {
        let parts = Parts::new(states, plan.state(), claims);
        let shares = arena.reborrow().shares(plan.workers, plan.share_bytes());
        let start = |worker: usize| Scratch::take(&mut shares.take(worker), &plan);
        let source_of = |piece: usize| {
            let (unit, chunk) = (piece / plan.chunks, piece % plan.chunks);
            let sequence = call.sequence(unit / call.dims.kv_heads);
            let there = chunk * CHUNK < sequence.keys.len() && is_decode(call, &sequence);
            there.then_some(Source { call, sequence, kv_head: unit % call.dims.kv_heads, chunk })
        };
        parallel::for_each_ahead(plan.workers, pieces, start, |scratch, piece, next| {
            if let Some(source) = source_of(piece) {
                let (state, next) = (parts.take(piece), next.and_then(source_of));
                call.isa.dispatch(Chunk { source, next, plan, state, scratch });
            }
        });
    }
    let states = &*states;
    let shares = arena.shares(plan.workers, plan.share_bytes());
    let start = |worker: usize| shares.take(worker).take::<f32>(plan.out_cols);
    parallel::for_each(plan.workers, plan.units, start, |row, unit| {
        let sequence = call.sequence(unit / call.dims.kv_heads);
        if !is_decode(call, &sequence) {
            return;
        }
        let states = &states[unit * plan.chunks * plan.state()..][..plan.chunks * plan.state()];
        let kv_head = unit % call.dims.kv_heads;
        call.isa.dispatch(Finish { call, plan, sequence, kv_head, states, row, output });
    });
}

/// One chunk of keys of one key/value head.
struct Source<'a, 'c> {
    call: &'a Call<'c>,
    sequence: Sequence,
    kv_head: usize,
    chunk: usize,
}

impl<'a> Source<'a, '_> {
    /// All keys of the head, and all values.
    #[inline(always)]
    fn rows(&self) -> [AnyRows<'a>; 2] {
        [self.call.keys(&self.sequence, self.kv_head), self.call.values(&self.sequence, self.kv_head)]
    }

    /// Query rows: those of all heads of the group.
    fn queries(&self) -> usize {
        self.call.group() * self.sequence.queries.len()
    }

    /// The query head and the query of one of them.
    #[inline(always)]
    fn place(&self, r: usize) -> (usize, usize) {
        place(&self.sequence, self.kv_head, self.call.group(), r)
    }

    /// The keys of the chunk.
    fn keys(&self) -> Range<usize> {
        self.chunk * CHUNK..((self.chunk + 1) * CHUNK).min(self.sequence.keys.len())
    }
}

/// The state of a chunk.
struct Chunk<'a, 'b, 'c> {
    source: Source<'a, 'c>,
    /// What the same thread reads next.
    next: Option<Source<'a, 'c>>,
    plan: Plan,
    state: &'a mut [f32],
    scratch: &'a mut Scratch<'b>,
}

impl Kernel for Chunk<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Source { call, sequence, .. } = &self.source;
        let (rows, cols, head_dim) = (self.source.queries(), self.plan.key_cols, call.dims.head_dim);
        self.scratch.queries[..rows * cols].fill(0.0);
        for r in 0..rows {
            let (head, query) = self.source.place(r);
            let to = &mut self.scratch.queries[r * cols..][..head_dim];
            call.queries(sequence, head).part(query..query + 1).pack_rows(s, to, head_dim);
        }
        // A masked key's value takes part with weight 0, which NaN and
        // infinity survive. Seldom: so look afterwards, and leave masked
        // values out if it happened.
        if !self.pass(s, false) {
            self.pass(s, true);
        }
    }
}

impl Chunk<'_, '_, '_> {
    /// Computes the state; says whether the output is finite. `careful` leaves
    /// out the values of masked keys.
    #[inline(always)]
    fn pass<S: Simd>(&mut self, s: S, careful: bool) -> bool {
        let Self { source, next, plan, state, scratch } = self;
        let (Source { call, sequence, .. }, rows) = (&*source, source.queries());
        let (out, figures) = state.split_at_mut(plan.rows * plan.out_cols);
        let (max, sum) = figures.split_at_mut(plan.rows);
        out[..rows * plan.out_cols].fill(0.0);
        max[..rows].fill(Figures::EMPTY.max);
        sum[..rows].fill(Figures::EMPTY.sum);
        let all = source.rows();
        let chunk = source.keys();
        let next = next.as_ref().map(|next| (next.rows(), next.keys().start));
        let blocks = blocks_ahead(&all);
        for (block, first) in chunk.clone().step_by(BLOCK).enumerate() {
            let n = (chunk.end - first).min(BLOCK);
            // Which rows see which of these keys.
            let mut some = 0;
            let valid = u64::MAX >> (64 - n);
            for r in 0..rows {
                let (head, query) = source.place(r);
                let site = sequence.site(head);
                let block = Block { site: &site, queries: query..query + 1, keys: first..first + n };
                let mut bits = 0;
                match call.mask.coverage(&site, block.queries.clone(), block.keys.clone()) {
                    Coverage::Empty => {}
                    Coverage::Full => bits = valid,
                    Coverage::Partial => {
                        call.mask.fill_bits(call.isa, &block, std::slice::from_mut(&mut bits), 1);
                    }
                }
                scratch.bits[r] = bits;
                some |= bits;
            }
            if some == 0 {
                continue;
            }
            let [keys, values] = all.map(|rows| rows.part(first..first + n));
            // What comes after the blocks of which this is one.
            let after = chunk.start + (block / blocks + 1) * blocks * BLOCK;
            let (from, at) = match &next {
                _ if after < chunk.end => (&all, after),
                Some((rows, first)) => (rows, *first),
                // Nothing: what is near already.
                None => (&all, first),
            };
            let ahead = |phase: usize| rows_ahead(from, at, blocks, 2 * (block % blocks) + phase);
            let Scratch { queries, scores, bits, keys: key_copy, values: value_copy } = &mut **scratch;
            let found = &mut scores[..rows * BLOCK];
            let dots = DotsCall { rows, queries, ahead: ahead(0), out: found, stride: BLOCK };
            keys.dots(s, dots, key_copy);
            for r in 0..rows {
                let (head, query) = source.place(r);
                let site = sequence.site(head);
                let row = &mut scores[r * BLOCK..][..BLOCK];
                let factor = call.finish_scores(sequence, &site, query, first, &mut row[..n]);
                if bits[r] != u64::MAX {
                    mask_row(s, row, &bits[r..=r]);
                }
                if careful {
                    visible_of_row(s, row, &mut bits[r..=r]);
                }
                let mut figures = Figures { max: max[r], sum: sum[r] };
                let out = &mut out[r * plan.out_cols..][..plan.out_cols];
                call.norm.weigh(s, row, factor, &site, &mut figures, out);
                (max[r], sum[r]) = (figures.max, figures.sum);
                call.gain_weights(sequence, head, first, &mut row[..n]);
            }
            if careful {
                for r in 0..rows {
                    let out = &mut out[r * plan.out_cols..][..plan.out_cols];
                    values.gather_visible(s, &scores[r * BLOCK..][..BLOCK], bits[r], out);
                }
            } else {
                let weights = &scores[..rows * BLOCK];
                let gather = GatherCall { rows, weights, ahead: ahead(1), out, stride: BLOCK };
                values.gather(s, gather, value_copy);
            }
        }
        let mut zero = s.splat(0.0);
        for j in (0..rows * plan.out_cols).step_by(S::LANES) {
            zero = s.mul_add(s.load(&out[j..]), s.splat(0.0), zero);
        }
        s.reduce_add(zero) == 0.0
    }
}

/// Blocks of keys and values that are asked for while as many are read: places
/// far from each other are answered faster.
#[inline(always)]
fn blocks_ahead(rows: &[AnyRows<'_>; 2]) -> usize {
    let bytes: usize = rows.iter().map(|rows| BLOCK * rows.row_bytes()).sum();
    (AHEAD / bytes.max(1)).clamp(1, MOST_AHEAD)
}

/// The share that one phase of a block has of so many blocks of keys and
/// values, the first key of which is `first`.
#[inline(always)]
fn rows_ahead(rows: &[AnyRows<'_>; 2], first: usize, blocks: usize, phase: usize) -> RowsAhead {
    let mut places = [(std::ptr::null(), 0); PLACES];
    for (i, place) in places.iter_mut().enumerate() {
        let at = i / 2 * (2 * blocks * BLOCK / PLACES) + phase * (BLOCK / PLACES);
        *place = rows[i % 2].address(first + at);
    }
    RowsAhead { places }
}

/// The query head and the query of row `r` of a group.
#[inline(always)]
fn place(sequence: &Sequence, kv_head: usize, group: usize, r: usize) -> (usize, usize) {
    let q_len = sequence.queries.len();
    (kv_head * group + r / q_len, r % q_len)
}

/// Merges the states of the chunks of one key/value head, in order, and
/// writes its rows.
struct Finish<'a, 'c> {
    call: &'a Call<'c>,
    plan: Plan,
    sequence: Sequence,
    kv_head: usize,
    states: &'a [f32],
    row: &'a mut [f32],
    output: &'a Output<'a>,
}

impl Kernel for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, plan, sequence, kv_head, states, row, output } = self;
        for r in 0..call.group() * sequence.queries.len() {
            let (head, query) = place(&sequence, kv_head, call.group(), r);
            row.fill(0.0);
            let mut state = RowState { figures: Figures::EMPTY, out: row };
            for chunk in 0..sequence.keys.len().div_ceil(CHUNK) {
                let (out, figures) =
                    states[chunk * plan.state()..][..plan.state()].split_at(plan.rows * plan.out_cols);
                let out = &out[r * plan.out_cols..][..plan.out_cols];
                state.merge(s, Figures { max: figures[r], sum: figures[plan.rows + r] }, out);
            }
            let place = sequence.queries.start + query;
            let factor = call.norm.factor(state.figures, head);
            output.out.take(sequence.batch, head, place..place + 1).write(s, 0, state.out, factor);
            if let Some(to) = &output.figures {
                state.figures.write(&mut to.take(sequence.batch, head, place..place + 1), 0);
            }
        }
    }
}
