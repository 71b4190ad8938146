//! Few queries against many keys.
//!
//! Reading keys and values is what costs, so each is read once, in its
//! storage type, for all query rows that visit it. Keys are cut into chunks at
//! fixed multiples of [`CHUNK`]; a task is one chunk of one key/value head (or
//! several where they are short), and the states of the chunks are merged in
//! order, so the bits depend on nothing but the lengths. Chunks outside of the
//! mask's hull are not there: they are neither visited nor counted. Of lists of
//! atoms or runs the chunks are cut at multiples of as many listed keys.
//!
//! Where many queries have lists of runs of their own, keys are read more than once.
//! A task is then some of these queries, which go together from one region of the
//! keys to the next, so that what they read is in the second-level cache.

use std::ops::Range;

use crate::engine::call::{Call, Output};
use crate::engine::parallel;
use crate::engine::row::{RowState, SoftmaxSum, mask_row, visible_of_row};
use crate::input::{Sequence, Site};
use crate::keys::plan::{Keys, Per, Run};
use crate::keys::source::{At, Kv, KvSource};
use crate::mask::{Block, Coverage};
use crate::score::Seen;
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::mem::{Arena, CONCURRENT_STREAMS, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::table::{RowsAhead, TABLE_ROWS, Table};
use crate::simd::{Kernel, Simd};

/// Keys of a chunk. Fixed, because sums are cut here.
const CHUNK: usize = 1024;
/// Keys whose scores are held at once: one word of mask bits.
const BLOCK: usize = TABLE_ROWS;
/// Bytes of keys and values that are prefetched while as many are read, and the
/// most blocks of keys that they are.
const AHEAD: usize = 128 << 10;
const MOST_AHEAD: usize = 4;
/// Nanoseconds of a task below which it is made of several chunks.
const TASK: usize = 20_000;

/// Bytes of the keys and values of a region, and of the states of a task that goes
/// through regions.
const REGION: usize = 1 << 20;
const STATES: usize = 1 << 19;

/// How queries that have lists of runs go through keys together.
#[derive(Clone, Copy, Debug)]
struct Regions {
    /// Keys of a region. Sums are cut here.
    keys: usize,
    /// Units of a task, and tasks of a head that has lists.
    each: usize,
    tasks: usize,
}

impl Regions {
    /// None if no sequence is read in regions.
    fn new(call: &Call<'_>, workers: usize, state: usize) -> Option<Self> {
        let (keys, units) = (region(call), Units::new(call));
        let is_some = (0..call.dims.batch).any(|i| in_regions(call, &call.sequence(i)));
        if !is_some || units.each() == 0 {
            return None;
        }
        let most = STATES / units.rows(call).saturating_mul(state).saturating_mul(size_of::<f32>()).max(1);
        let even = units.count(call).div_ceil(4 * workers).max(16);
        let each = most.clamp(1, even);
        Some(Self { keys, each, tasks: units.blocks.div_ceil(each) })
    }
}

/// Keys of a region.
fn region(call: &Call<'_>) -> usize {
    let bytes = match call.x.kv {
        Kv::Arrays { k, v } => k.row_bytes() + v.row_bytes(),
        Kv::Cache(cache) | Kv::CacheKeys(cache) => cache.row_bytes().iter().sum::<usize>(),
    };
    (REGION / bytes.max(1)).next_multiple_of(BLOCK)
}

/// Whether a sequence is read in regions: depends on its sizes alone.
fn in_regions(call: &Call<'_>, sequence: &Sequence) -> bool {
    const MANY: usize = 64;
    let many = matches!(call.keys, Keys::Tokens(_)) && sequence.queries.len() >= MANY;
    many && call.is_decode(sequence) && sequence.keys.len() > region(call)
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    workers: usize,
    regions: Option<Regions>,
    units: usize,
    /// Chunks of all units.
    pieces: usize,
    /// Chunks of a task.
    grain: usize,
    /// Rows of states that are kept to be merged.
    kept: usize,
    /// The most rows of a unit.
    rows: usize,
    /// `head_dim` and `value_dim` rounded up to vectors.
    key_cols: usize,
    out_cols: usize,
}

impl Plan {
    pub(crate) fn new(call: &Call<'_>) -> Self {
        let lanes = call.isa.lanes();
        let (mut pieces, mut kept, mut rows, mut time) = (0, 0usize, 0, 0usize);
        each_unit(call, |unit| {
            pieces += unit.chunks();
            kept = kept.saturating_add(unit.kept());
            rows = rows.max(unit.rows);
            time = time.saturating_add(unit.nanoseconds(call));
        });
        let out_cols = call.dims.value_dim.next_multiple_of(lanes);
        let regions = Regions::new(call, parallel::threads(), out_cols + 2);
        if regions.is_some() {
            (rows, time) = (rows.max(Units::new(call).rows(call)), usize::MAX);
        }
        let workers = parallel::threads_for(time);
        let piece = time / pieces.max(1);
        Self {
            workers,
            regions,
            units: Units::new(call).count(call),
            pieces,
            grain: (TASK / piece.max(1)).clamp(1, (pieces / (8 * workers)).max(1)),
            kept,
            rows,
            key_cols: call.dims.head_dim.next_multiple_of(lanes),
            out_cols,
        }
    }

    /// Threads that the call is worth.
    pub(crate) fn workers(&self) -> usize {
        self.workers
    }

    /// Elements of a row's state: the output, the maximum and the sum.
    fn state(&self) -> usize {
        self.out_cols + 2
    }

    /// Elements of the keys of a block, or of its values.
    fn room(&self) -> usize {
        BLOCK.saturating_mul(self.key_cols.max(self.out_cols))
    }

    fn share_bytes(&self) -> usize {
        let parts = [
            bytes_for::<f32>(self.rows.saturating_mul(self.key_cols)),
            bytes_for::<f32>(self.rows * BLOCK),
            bytes_for::<u64>(self.rows),
            bytes_for::<f32>(self.room()),
            bytes_for::<f32>(self.rows.saturating_mul(self.state())),
            bytes_for::<f32>(self.together().saturating_mul(self.rows).saturating_mul(self.state())),
            bytes_for::<u64>(2 * self.together()),
        ];
        parts.into_iter().fold(0, usize::saturating_add)
    }

    /// Units that go through regions together.
    fn together(&self) -> usize {
        self.regions.map_or(0, |regions| regions.each)
    }

    /// Bytes of scratch.
    pub(crate) fn bytes(&self) -> usize {
        let parts = [
            2 * bytes_for::<u64>(self.units + 1),
            bytes_for::<f32>(self.kept.saturating_mul(self.state())),
            bytes_for::<u64>(claim_words(self.kept)),
            bytes_for_shares(self.workers, self.share_bytes()),
        ];
        parts.into_iter().fold(0, usize::saturating_add)
    }
}

/// What a unit visits.
#[derive(Clone, Debug)]
enum Visited<'a> {
    /// What the mask's hull leaves.
    Span(Range<usize>),
    /// Blocks of keys, of which the mask's hull leaves something.
    Atoms(&'a [u32]),
    /// Runs of keys, and how many keys they are.
    Runs(&'a [Run], usize),
}

/// How much there is to do for a unit: rows that visit the same keys.
#[derive(Clone, Debug)]
struct Extent<'a> {
    rows: usize,
    keys: Visited<'a>,
}

impl Extent<'_> {
    /// One at least, where there are rows: they have to be written.
    fn chunks(&self) -> usize {
        if self.rows == 0 {
            return 0;
        }
        let chunks = match &self.keys {
            Visited::Span(keys) => keys.end.div_ceil(CHUNK) - keys.start / CHUNK,
            Visited::Atoms(atoms) => atoms.len().div_ceil(CHUNK / BLOCK),
            Visited::Runs(_, keys) => keys.div_ceil(CHUNK),
        };
        chunks.max(1)
    }

    /// Rows of states that are kept to be merged: those of a single chunk are
    /// written at once.
    fn kept(&self) -> usize {
        match self.chunks() {
            0 | 1 => 0,
            chunks => chunks.saturating_mul(self.rows),
        }
    }

    /// About how long it takes one thread.
    fn nanoseconds(&self, call: &Call<'_>) -> usize {
        const BYTES: usize = 12;
        const PRODUCTS: usize = 32;
        if self.rows == 0 {
            return 0;
        }
        let keys = match &self.keys {
            Visited::Span(keys) => keys.len(),
            Visited::Atoms(atoms) => atoms.len() * BLOCK,
            Visited::Runs(_, keys) => *keys,
        };
        let products = keys.saturating_mul(call.dims.head_dim.saturating_add(call.dims.value_dim));
        let read = (products / BYTES).saturating_mul(size_of::<f32>());
        read.max(self.rows.saturating_mul(products / PRODUCTS)).saturating_add(200)
    }
}

/// How the rows of a sequence are cut into units: by the key/value head or,
/// where each has its own list, the query head, and by the block of queries.
#[derive(Clone, Copy, Debug)]
struct Units {
    heads: usize,
    blocks: usize,
    /// Queries of a block.
    queries: usize,
}

impl Units {
    fn new(call: &Call<'_>) -> Self {
        let layout = match call.keys {
            Keys::Mask => return Self { heads: call.dims.kv_heads, blocks: 1, queries: usize::MAX },
            Keys::Blocks(lists) => lists.layout(),
            Keys::Tokens(lists) => lists.layout(),
        };
        let heads = if layout.per == Per::Head { call.dims.q_heads } else { call.dims.kv_heads };
        Self { heads, blocks: layout.blocks(), queries: layout.q_block }
    }

    /// Those of a sequence.
    fn each(&self) -> usize {
        self.heads * self.blocks
    }

    /// Rows of one, at most.
    fn rows(&self, call: &Call<'_>) -> usize {
        call.dims.q_heads / self.heads.max(1) * self.queries
    }

    /// Those of a call.
    fn count(&self, call: &Call<'_>) -> usize {
        if call.out_rows() == 0 { 0 } else { call.dims.batch * self.each() }
    }

    fn unit(&self, call: &Call<'_>, index: usize) -> Unit {
        let sequence = call.sequence(index / self.each());
        let (head, block) = (index / self.blocks % self.heads, index % self.blocks);
        let each = call.dims.q_heads / self.heads;
        let len = sequence.queries.len();
        let start = block.saturating_mul(self.queries).min(len);
        Unit {
            kv_head: (head * each).checked_div(call.group()).unwrap_or(0),
            heads: head * each..(head + 1) * each,
            queries: start..start.saturating_add(self.queries).min(len),
            block,
            sequence,
        }
    }
}

/// Rows that visit the same keys.
#[derive(Clone, Debug)]
struct Unit {
    sequence: Sequence,
    kv_head: usize,
    /// Query heads.
    heads: Range<usize>,
    /// Queries of the sequence.
    queries: Range<usize>,
    /// The number of this block of queries.
    block: usize,
}

impl Unit {
    fn extent<'a>(&self, call: &Call<'a>) -> Extent<'a> {
        let sequence = &self.sequence;
        let rows = self.rows();
        if rows == 0 || !call.is_decode(sequence) || in_regions(call, sequence) {
            return Extent { rows: 0, keys: Visited::Span(0..0) };
        }
        let (index, head) = (sequence.index, self.heads.start);
        let keys = match call.keys {
            Keys::Mask => Visited::Span(self.hull(call)),
            Keys::Blocks(lists) => {
                let (hull, atoms) = (self.hull(call), lists.atoms(index, head, self.block));
                let start = atoms.partition_point(|&atom| (atom as usize + 1) * BLOCK <= hull.start);
                let end = atoms.partition_point(|&atom| atom as usize * BLOCK < hull.end);
                Visited::Atoms(&atoms[start..end.max(start)])
            }
            Keys::Tokens(lists) => {
                Visited::Runs(lists.runs(index, head, self.block), lists.keys(index, head, self.block))
            }
        };
        Extent { rows, keys }
    }

    /// A range outside of which the mask leaves nothing to any row.
    fn hull(&self, call: &Call<'_>) -> Range<usize> {
        let (sequence, len) = (&self.sequence, self.sequence.keys.len());
        let heads = if call.mask.is_shared() { 1 } else { self.heads.len() };
        let mut keys = len..0;
        for head in self.heads.clone().take(heads) {
            let hull = call.mask.hull(&sequence.site(head), self.queries.clone());
            if !hull.is_empty() {
                keys = keys.start.min(hull.start)..keys.end.max(hull.end.min(len));
            }
        }
        if keys.is_empty() { 0..0 } else { keys }
    }

    fn rows(&self) -> usize {
        self.heads.len() * self.queries.len()
    }

    /// The query head and the query of a row.
    #[inline(always)]
    fn place(&self, r: usize) -> (usize, usize) {
        let queries = self.queries.len();
        (self.heads.start + r / queries, self.queries.start + r % queries)
    }

    /// Some keys of it.
    #[inline(always)]
    fn at(&self, keys: Range<usize>) -> At<'_> {
        At { sequence: &self.sequence, kv_head: self.kv_head, keys }
    }
}

/// Calls `then` with what there is to do for each unit, in order.
fn each_unit<'a>(call: &Call<'a>, mut then: impl FnMut(&Extent<'a>)) {
    let units = Units::new(call);
    let shared = call.mask.is_shared() && matches!(call.keys, Keys::Mask);
    let mut last: Option<([usize; 2], Extent<'a>)> = None;
    for index in 0..units.count(call) {
        // What depends on the lengths alone is found out once.
        let sequence = call.sequence(index / units.each());
        let lengths = [sequence.queries.len(), sequence.keys.len()];
        last = last.filter(|last| shared && last.0 == lengths);
        then(&last.get_or_insert_with(|| (lengths, units.unit(call, index).extent(call))).1);
    }
}

/// What one thread works in.
struct Scratch<'a> {
    queries: &'a mut [f32],
    scores: &'a mut [f32],
    bits: &'a mut [u64],
    /// Keys of a block, and then its values: one room stays in the first-level cache.
    room: &'a mut [f32],
    state: &'a mut [f32],
    /// Of units that go through regions together.
    states: &'a mut [f32],
    /// How far each has come: a run, and keys of it that are passed.
    places: &'a mut [u64],
}

impl<'a> Scratch<'a> {
    fn take(arena: &mut Arena<'a>, plan: &Plan) -> Self {
        Self {
            queries: arena.take(plan.rows * plan.key_cols),
            scores: arena.take(plan.rows * BLOCK),
            bits: arena.take(plan.rows),
            room: arena.take(plan.room()),
            state: arena.take(plan.rows * plan.state()),
            states: arena.take(plan.together() * plan.rows * plan.state()),
            places: arena.take(2 * plan.together()),
        }
    }
}

/// Where the chunks of each unit start, and the rows of states that are kept.
struct Starts<'a> {
    pieces: &'a [u64],
    kept: &'a [u64],
}

/// A thread's place among the chunks: it only moves on.
struct Cursor<'a, 'c> {
    call: &'a Call<'c>,
    units: Units,
    starts: &'a Starts<'a>,
    unit: usize,
    /// Among the runs of a unit: how many keys are passed, the run that comes
    /// then, and how many of its keys are passed.
    keys: usize,
    run: usize,
    offset: usize,
}

impl<'a, 'c> Cursor<'a, 'c> {
    fn new(call: &'a Call<'c>, starts: &'a Starts<'a>) -> Self {
        Self { call, units: Units::new(call), starts, unit: 0, keys: 0, run: 0, offset: 0 }
    }

    /// Piece `index`, which is none before one that was found.
    fn find(&mut self, index: usize) -> Piece<'a, 'c> {
        let Starts { pieces, kept } = self.starts;
        while pieces[self.unit + 1] as usize <= index {
            self.unit += 1;
            (self.keys, self.run, self.offset) = (0, 0, 0);
        }
        let call = self.call;
        let unit = self.units.unit(call, self.unit);
        let extent = unit.extent(call);
        let chunk = index - pieces[self.unit] as usize;
        let single = pieces[self.unit + 1] - pieces[self.unit] == 1;
        let first = kept[self.unit] as usize + chunk * extent.rows;
        let rows = first..if single { first } else { first + extent.rows };
        let walk = match extent.keys {
            Visited::Span(keys) => {
                let start = keys.start / CHUNK + chunk;
                let first = (start * CHUNK).max(keys.start / BLOCK * BLOCK);
                Walk::Span(first..((start + 1) * CHUNK).min(keys.end))
            }
            Visited::Atoms(atoms) => {
                let atoms = &atoms[chunk * (CHUNK / BLOCK)..];
                Walk::Atoms(&atoms[..atoms.len().min(CHUNK / BLOCK)], unit.sequence.keys.len())
            }
            Visited::Runs(runs, keys) => {
                let first = chunk * CHUNK;
                while self.keys < first {
                    let n = (runs[self.run].len as usize - self.offset).min(first - self.keys);
                    (self.keys, self.offset) = (self.keys + n, self.offset + n);
                    if self.offset == runs[self.run].len as usize {
                        (self.run, self.offset) = (self.run + 1, 0);
                    }
                }
                Walk::Runs { runs: &runs[self.run..], offset: self.offset, left: (keys - first).min(CHUNK) }
            }
        };
        let from = Where::new(call, &unit);
        Piece { call, unit, walk, from, rows }
    }
}

/// Output and figures of a call.
pub(crate) fn decode(call: &Call<'_>, plan: Plan, output: &Output<'_>, mut arena: Arena<'_>) {
    let (pieces, kept) = (arena.take::<u64>(plan.units + 1), arena.take::<u64>(plan.units + 1));
    let (mut unit, mut piece, mut row) = (0, 0, 0);
    (pieces[0], kept[0]) = (0, 0);
    each_unit(call, |extent| {
        unit += 1;
        piece += extent.chunks();
        row += extent.kept();
        (pieces[unit], kept[unit]) = (piece as u64, row as u64);
    });
    let starts = &Starts { pieces, kept };
    if let Some(regions) = plan.regions {
        let (units, mut arena) = (Units::new(call), arena.reborrow());
        let shares = arena.shares(plan.workers, plan.share_bytes());
        let start = |worker: usize| Scratch::take(&mut shares.take(worker), &plan);
        let heads = call.dims.batch * units.heads;
        // Late queries first: under a causal mask they see most.
        parallel::for_each(plan.workers, heads * regions.tasks, start, |scratch, task| {
            let (head, task) = (task % heads, regions.tasks - 1 - task / heads);
            let blocks = task * regions.each..((task + 1) * regions.each).min(units.blocks);
            let first = head * units.blocks;
            if in_regions(call, &call.sequence(head / units.heads)) {
                let units = first + blocks.start..first + blocks.end;
                call.isa.dispatch(Together { call, units, plan, keys: regions.keys, scratch, output });
            }
        });
    }
    let states = arena.take::<f32>(plan.kept * plan.state());
    let claims = arena.take(claim_words(plan.kept));
    {
        let parts = Parts::new(states, plan.state(), claims);
        let shares = arena.reborrow().shares(plan.workers, plan.share_bytes());
        let start = |worker: usize| {
            let scratch = Scratch::take(&mut shares.take(worker), &plan);
            (scratch, Cursor::new(call, starts), None::<Piece<'_, '_>>)
        };
        let tasks = plan.pieces.div_ceil(plan.grain);
        parallel::for_each_ahead(plan.workers, tasks, start, |(scratch, cursor, found), task, next| {
            for index in task * plan.grain..((task + 1) * plan.grain).min(plan.pieces) {
                let piece = found.take().unwrap_or_else(|| cursor.find(index));
                let inside = index + 1 < ((task + 1) * plan.grain).min(plan.pieces);
                let following = if inside { Some(index + 1) } else { next.map(|task| task * plan.grain) };
                *found = following.map(|index| cursor.find(index));
                let state =
                    if piece.rows.is_empty() { None } else { Some(parts.take_run(piece.rows.clone())) };
                call.isa.dispatch(Chunk { piece, next: found.as_ref(), plan, state, scratch, output });
            }
        });
    }
    if plan.kept == 0 {
        return;
    }
    let states = &*states;
    let (units, shares) = (Units::new(call), arena.shares(plan.workers, plan.share_bytes()));
    let start = |worker: usize| shares.take(worker).take::<f32>(plan.out_cols);
    parallel::for_each(plan.workers, plan.units, start, |row, index| {
        let rows = starts.kept[index] as usize..starts.kept[index + 1] as usize;
        if !rows.is_empty() {
            let unit = units.unit(call, index);
            let states = &states[rows.start * plan.state()..rows.end * plan.state()];
            call.isa.dispatch(Finish { call, plan, unit, states, row, output });
        }
    });
}

/// Where the keys and the values of a unit lie.
#[derive(Clone, Copy)]
enum Where<'a> {
    /// All of them, in arrays.
    Arrays([AnyRows<'a>; 2]),
    Cache(&'a dyn KvSource),
}

impl<'a> Where<'a> {
    fn new(call: &Call<'a>, unit: &Unit) -> Self {
        match call.x.kv {
            Kv::Arrays { k, v } => {
                let rows = |x: AnyArray<'a>| x.rows(unit.sequence.batch, unit.kv_head, &unit.sequence.keys);
                Self::Arrays([rows(k), rows(v)])
            }
            Kv::Cache(cache) | Kv::CacheKeys(cache) => Self::Cache(cache),
        }
    }

    /// Bytes of a key and of a value.
    #[inline(always)]
    fn row_bytes(&self) -> [usize; 2] {
        match self {
            Self::Arrays(rows) => [rows[0].row_bytes(), rows[1].row_bytes()],
            Self::Cache(cache) => cache.row_bytes(),
        }
    }

    /// Whether what is prefetched is what is read: rows of neighbours.
    #[inline(always)]
    fn is_unit(&self) -> bool {
        match self {
            Self::Arrays(rows) => rows.iter().all(AnyRows::is_unit),
            Self::Cache(_) => true,
        }
    }

    /// Addresses of a key and of its value, valid or not, and from them to the
    /// next ones.
    #[inline(always)]
    fn ahead(&self, unit: &Unit, key: usize) -> [(*const u8, isize); 2] {
        match self {
            Self::Arrays([keys, values]) => [keys.address(key), values.address(key)],
            Self::Cache(cache) => cache.ahead(&unit.at(key..key + 1)),
        }
    }
}

/// The keys of a block: as many neighbours as there are, several times.
#[derive(Clone, Debug)]
struct BlockKeys {
    runs: [(usize, usize); BLOCK],
    count: usize,
    len: usize,
}

impl BlockKeys {
    fn none() -> Self {
        Self { runs: [(0, 0); BLOCK], count: 0, len: 0 }
    }

    #[inline(always)]
    fn push(&mut self, start: usize, len: usize) {
        self.runs[self.count] = (start, len);
        (self.count, self.len) = (self.count + 1, self.len + len);
    }

    /// For each run its place in the block and its keys.
    #[inline(always)]
    fn runs(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let mut at = 0;
        self.runs[..self.count].iter().map(move |&(start, len)| {
            at += len;
            (at - len, start..start + len)
        })
    }

    /// From the first key to the last one.
    #[inline(always)]
    fn hull(&self) -> Range<usize> {
        let (start, len) = self.runs[self.count.saturating_sub(1)];
        self.runs[0].0..start + len
    }
}

/// The keys of a chunk that are left to visit.
#[derive(Clone, Debug)]
enum Walk<'a> {
    Span(Range<usize>),
    /// With the number of keys that there are.
    Atoms(&'a [u32], usize),
    /// `left` keys of runs, of which some of the first one are passed.
    Runs {
        runs: &'a [Run],
        offset: usize,
        left: usize,
    },
}

impl Walk<'_> {
    /// Whether more than so many blocks are left.
    #[inline(always)]
    fn has_more_than(&self, blocks: usize) -> bool {
        match self {
            Self::Span(keys) => keys.len() > blocks * BLOCK,
            Self::Atoms(atoms, _) => atoms.len() > blocks,
            Self::Runs { left, .. } => *left > blocks * BLOCK,
        }
    }

    /// The key that many further on in a span or in atoms; about the last one
    /// where there are not so many.
    #[inline(always)]
    fn further(&self, keys: usize) -> usize {
        match self {
            Self::Span(span) => (span.start + keys).min(span.end.saturating_sub(1)),
            Self::Atoms(atoms, _) => {
                atoms.get(keys / BLOCK).or(atoms.last()).map_or(0, |&atom| atom as usize * BLOCK)
                    + keys % BLOCK
            }
            Self::Runs { .. } => 0,
        }
    }

    /// The next block, if there is one.
    #[inline(always)]
    fn next(&mut self, block: &mut BlockKeys) -> bool {
        (block.count, block.len) = (0, 0);
        match self {
            Self::Span(keys) => {
                let n = keys.len().min(BLOCK);
                if n > 0 {
                    block.push(keys.start, n);
                }
                keys.start += n;
            }
            Self::Atoms(atoms, len) => {
                let Some((&atom, rest)) = atoms.split_first() else { return false };
                let start = atom as usize * BLOCK;
                block.push(start, (*len - start).min(BLOCK));
                *atoms = rest;
            }
            Self::Runs { runs, offset, left } => {
                while block.len < BLOCK && *left > 0 {
                    let Some((run, rest)) = runs.split_first() else { break };
                    let n = (run.len as usize - *offset).min(BLOCK - block.len).min(*left);
                    block.push(run.start as usize + *offset, n);
                    (*offset, *left) = (*offset + n, *left - n);
                    if *offset == run.len as usize {
                        (*runs, *offset) = (rest, 0);
                    }
                }
            }
        }
        block.count > 0
    }
}

/// One chunk of the keys of a unit.
struct Piece<'a, 'c> {
    call: &'a Call<'c>,
    unit: Unit,
    walk: Walk<'c>,
    from: Where<'c>,
    /// Where its state is kept; nowhere where it is the only one of the unit.
    rows: Range<usize>,
}

impl<'a> Piece<'a, '_> {
    /// Takes in the queries.
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, plan: Plan, to: &mut [f32]) {
        let Self { call, unit, .. } = self;
        let (rows, cols, head_dim) = (unit.rows(), plan.key_cols, call.dims.head_dim);
        to[..rows * cols].fill(0.0);
        for r in 0..rows {
            let (head, query) = unit.place(r);
            let to = &mut to[r * cols..][..head_dim];
            call.queries(&unit.sequence, head).part(query..query + 1).pack_rows(s, to, head_dim);
        }
    }

    /// The keys of a block (`SIDE` 0) or its values (1): where they lie or, if
    /// they do not lie as rows of neighbours, in `room`.
    #[inline(always)]
    fn block<'r, S: Simd, const SIDE: usize>(
        &'r self,
        s: S,
        block: &BlockKeys,
        mut room: &'r mut [f32],
        cols: usize,
    ) -> Table<'r> {
        let mut table = Table::new();
        for (_, keys) in block.runs() {
            match &self.from {
                Where::Arrays(rows) => {
                    let rows = rows[SIDE].part(keys);
                    table.push(if rows.is_unit() {
                        rows
                    } else {
                        let (part, rest) = std::mem::take(&mut room).split_at_mut(rows.len() * cols);
                        room = rest;
                        rows.copied(s, part, cols)
                    });
                }
                Where::Cache(cache) => {
                    let (isa, mut start) = (self.call.isa, keys.start);
                    while start < keys.end {
                        let at = self.unit.at(start..keys.end);
                        let n = cache.stretch(&at).clamp(1, at.keys.len());
                        let at = self.unit.at(start..start + n);
                        let (part, rest) = std::mem::take(&mut room).split_at_mut(n * cols);
                        let rows =
                            if SIDE == 0 { cache.keys(isa, &at, part) } else { cache.values(isa, &at, part) };
                        table.push(rows);
                        (room, start) = (rest, start + n);
                    }
                }
            }
        }
        table
    }

    /// Addresses of the keys of a block, or of its values, to prefetch.
    #[inline(always)]
    fn addresses<const SIDE: usize>(&self, block: &BlockKeys) -> RowsAhead {
        let mut ahead = RowsAhead::nothing();
        if self.from.is_unit() {
            ahead.bytes = self.from.row_bytes()[SIDE];
            for (at, keys) in block.runs() {
                let (base, stride) = self.from.ahead(&self.unit, keys.start)[SIDE];
                for i in 0..keys.len() {
                    ahead.rows[at + i] = base.wrapping_offset((i as isize).wrapping_mul(stride));
                }
            }
        }
        ahead
    }

    /// Blocks of keys and values that are prefetched while as many are read:
    /// places far from each other are answered faster.
    #[inline(always)]
    fn blocks_ahead(&self) -> usize {
        let bytes: usize = self.from.row_bytes().iter().map(|bytes| BLOCK * bytes).sum();
        (AHEAD / bytes.max(1)).clamp(1, MOST_AHEAD)
    }
}

/// What is prefetched in one phase of block `block`, of `blocks` that are
/// prefetched while as many are read.
#[derive(Clone, Copy)]
struct Phase {
    block: usize,
    blocks: usize,
    phase: usize,
    /// 1 where there are only keys to read, else 2.
    sides: usize,
}

impl Phase {
    /// Rows of the blocks that follow those of which this is one: of `piece`,
    /// of which `walk` is left, or of what comes after it. As many as this
    /// block has `keys`.
    #[inline(always)]
    fn rows<'c>(
        &self,
        piece: &Piece<'_, 'c>,
        walk: &Walk<'c>,
        next: Option<&Piece<'_, 'c>>,
        keys: usize,
    ) -> RowsAhead {
        const RUN: usize = BLOCK / CONCURRENT_STREAMS;
        let &Self { block, blocks, phase, sides } = self;
        let runs = matches!(walk, Walk::Runs { .. });
        let skipped = if runs { 0 } else { blocks - 1 - block % blocks };
        let (piece, walk, skipped) = match next {
            _ if walk.has_more_than(skipped) => (piece, walk, skipped),
            Some(next) => (next, &next.walk, 0),
            None => return RowsAhead::nothing(),
        };
        if runs {
            let mut block = BlockKeys::none();
            walk.clone().next(&mut block);
            return if phase == 0 { piece.addresses::<0>(&block) } else { piece.addresses::<1>(&block) };
        }
        let mut ahead = RowsAhead::nothing();
        if !piece.from.is_unit() || !walk.has_more_than(0) {
            return ahead;
        }
        let bytes = piece.from.row_bytes();
        ahead.bytes = bytes[0].max(bytes[1]);
        let phase = sides * (block % blocks) + phase;
        for stream in (0..CONCURRENT_STREAMS).step_by(sides) {
            let key = walk.further(skipped * BLOCK + stream * blocks * RUN + phase * RUN);
            let from = piece.from.ahead(&piece.unit, key);
            for (side, (base, stride)) in from.into_iter().take(sides).enumerate() {
                for i in 0..keys.div_ceil(CONCURRENT_STREAMS).min(RUN) {
                    ahead.rows[stream + side + CONCURRENT_STREAMS * i] =
                        base.wrapping_offset((i as isize).wrapping_mul(stride));
                }
            }
        }
        ahead
    }
}

/// The state of a chunk.
struct Chunk<'a, 'b, 'c> {
    piece: Piece<'a, 'c>,
    /// What the same thread reads next.
    next: Option<&'a Piece<'a, 'c>>,
    plan: Plan,
    /// Where it is kept. If nowhere, its rows are written.
    state: Option<&'a mut [f32]>,
    scratch: &'a mut Scratch<'b>,
    output: &'a Output<'a>,
}

impl Kernel for Chunk<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { piece, next, plan, state, scratch, output } = self;
        let (call, unit) = (piece.call, &piece.unit);
        let rows = unit.rows();
        piece.load(s, plan, scratch.queries);
        let own = std::mem::take(&mut scratch.state);
        let written = state.is_none();
        let state = match state {
            Some(state) => state,
            None => &mut own[..rows * plan.state()],
        };
        let mut pass = Pass { piece: &piece, next, plan, state, scratch };
        // A masked key's value takes part with weight 0, which NaN and
        // infinity survive. Seldom: so look afterwards, and leave masked
        // values out if it happened.
        if !pass.run(s, false) {
            pass.run(s, true);
        }
        if written {
            let (out, figures) = own.split_at_mut(rows * plan.out_cols);
            for r in 0..rows {
                let figures = SoftmaxSum { max: figures[r], sum: figures[rows + r] };
                write(s, call, unit, r, figures, &mut out[r * plan.out_cols..][..plan.out_cols], output);
            }
        }
        scratch.state = own;
    }
}

/// What is left of some runs up to a key, from a place on: the place moves there.
fn runs_before<'a>(runs: &'a [Run], place: &mut [u64], end: usize) -> Walk<'a> {
    let (first, offset) = (place[0] as usize, place[1] as usize);
    let (mut at, mut passed, mut left) = (first, offset, 0);
    while let Some(run) = runs.get(at) {
        let start = run.start as usize + passed;
        let n = end.saturating_sub(start).min(run.len as usize - passed);
        (left, passed) = (left + n, passed + n);
        if passed < run.len as usize {
            break;
        }
        (at, passed) = (at + 1, 0);
    }
    place.copy_from_slice(&[at as u64, passed as u64]);
    Walk::Runs { runs: &runs[first..], offset, left }
}

/// Units of a head, in order, that go through the regions of their keys together.
struct Together<'a, 'b, 'c> {
    call: &'a Call<'c>,
    units: Range<usize>,
    plan: Plan,
    /// Keys of a region.
    keys: usize,
    scratch: &'a mut Scratch<'b>,
    output: &'a Output<'a>,
}

impl Kernel for Together<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, units, plan, keys, scratch, output } = self;
        let (all, places) = (std::mem::take(&mut scratch.states), std::mem::take(&mut scratch.places));
        let (shape, Keys::Tokens(lists)) = (Units::new(call), call.keys) else { return };
        let piece = |index: usize, place: &mut [u64], end: usize| {
            let unit = shape.unit(call, index);
            let runs = lists.runs(unit.sequence.index, unit.heads.start, unit.block);
            let (walk, from) = (runs_before(runs, place, end), Where::new(call, &unit));
            Piece { call, unit, walk, from, rows: 0..0 }
        };
        let kv_len = shape.unit(call, units.start).sequence.keys.len();
        let size = plan.rows * plan.state();
        places.fill(0);
        for (index, state) in units.clone().zip(all.chunks_exact_mut(size.max(1))) {
            let rows = shape.unit(call, index).rows();
            start(state, rows, plan.out_cols);
        }
        for end in (0..kv_len).step_by(keys).map(|first| first + keys) {
            let mut next = Some(piece(units.start, &mut places[..2], end));
            for (i, index) in units.clone().enumerate() {
                let Some(here) = next.take() else { break };
                if index + 1 < units.end {
                    next = Some(piece(index + 1, &mut places[2 * (i + 1)..][..2], end));
                }
                if !here.walk.has_more_than(0) {
                    continue;
                }
                here.load(s, plan, scratch.queries);
                let state = &mut all[i * size..][..here.unit.rows() * plan.state()];
                Pass { piece: &here, next: next.as_ref(), plan, state, scratch: &mut *scratch }.go(s, false);
            }
        }
        for (index, state) in units.zip(all.chunks_exact_mut(size.max(1))) {
            let unit = shape.unit(call, index);
            let (rows, cols) = (unit.rows(), plan.out_cols);
            let state = &mut state[..rows * plan.state()];
            if !is_finite(s, &state[..rows * cols]) {
                // As of chunks: without the values of masked keys.
                start(state, rows, cols);
                let mut place = [0; 2];
                for end in (0..kv_len).step_by(keys).map(|first| first + keys) {
                    let here = piece(index, &mut place, end);
                    here.load(s, plan, scratch.queries);
                    Pass { piece: &here, next: None, plan, state: &mut *state, scratch: &mut *scratch }
                        .go(s, true);
                }
            }
            let (out, figures) = state.split_at_mut(rows * cols);
            for r in 0..rows {
                let figures = SoftmaxSum { max: figures[r], sum: figures[rows + r] };
                write(s, call, &unit, r, figures, &mut out[r * cols..][..cols], output);
            }
        }
        (scratch.states, scratch.places) = (all, places);
    }
}

/// The state of rows that have seen nothing.
fn start(state: &mut [f32], rows: usize, cols: usize) {
    let (out, figures) = state[..rows * (cols + 2)].split_at_mut(rows * cols);
    let (max, sum) = figures.split_at_mut(rows);
    out.fill(0.0);
    max.fill(SoftmaxSum::EMPTY.max);
    sum.fill(SoftmaxSum::EMPTY.sum);
}

/// Whether rows of whole vectors are finite.
#[inline(always)]
fn is_finite<S: Simd>(s: S, out: &[f32]) -> bool {
    let mut zero = s.splat(0.0);
    for x in out.chunks_exact(S::LANES) {
        zero = s.mul_add(s.load(x), s.splat(0.0), zero);
    }
    s.reduce_add(zero) == 0.0
}

/// Which keys of a block a query sees: bit `t` is that at place `t`.
#[inline(always)]
fn visible(call: &Call<'_>, site: &Site, query: usize, keys: &BlockKeys) -> u64 {
    match call.mask.coverage(site, query..query + 1, keys.hull()) {
        Coverage::Empty => 0,
        Coverage::Full => u64::MAX >> (BLOCK - keys.len),
        Coverage::Partial => {
            let mut all = 0;
            for (at, keys) in keys.runs() {
                let (block, mut bits) = (Block { site, queries: query..query + 1, keys }, 0);
                call.mask.fill_bits(call.isa, &block, std::slice::from_mut(&mut bits), 1);
                all |= bits << at;
            }
            all
        }
    }
}

/// Normalises and writes a row.
#[inline(always)]
fn write<S: Simd>(
    s: S,
    call: &Call<'_>,
    unit: &Unit,
    r: usize,
    figures: SoftmaxSum,
    out: &mut [f32],
    output: &Output<'_>,
) {
    let (head, query) = unit.place(r);
    let (batch, at) = (unit.sequence.batch, unit.sequence.queries.start + query);
    let factor = call.epilogue(s, (batch, head, at), figures, out);
    output.out.take(batch, head, at..at + 1).write(s, 0, out, factor);
    if let Some(to) = &output.figures {
        figures.write(&mut to.take(batch, head, at..at + 1), 0);
    }
}

struct Pass<'a, 'b, 'c> {
    piece: &'a Piece<'a, 'c>,
    next: Option<&'a Piece<'a, 'c>>,
    plan: Plan,
    state: &'a mut [f32],
    scratch: &'a mut Scratch<'b>,
}

impl Pass<'_, '_, '_> {
    /// Computes the state; says whether the output is finite. `careful` leaves
    /// out the values of masked keys.
    #[inline(always)]
    fn run<S: Simd>(&mut self, s: S, careful: bool) -> bool {
        let (rows, cols) = (self.piece.unit.rows(), self.plan.out_cols);
        start(self.state, rows, cols);
        self.go(s, careful);
        is_finite(s, &self.state[..rows * cols])
    }

    /// Goes on from the state.
    #[inline(always)]
    fn go<S: Simd>(&mut self, s: S, careful: bool) {
        let Self { piece, next, plan, state, scratch } = self;
        let Piece { call, unit, .. } = *piece;
        let (sequence, rows, cols) = (&unit.sequence, unit.rows(), plan.out_cols);
        let (out, figures) = state.split_at_mut(rows * cols);
        let (max, sum) = figures.split_at_mut(rows);
        let (blocks, sides) = (piece.blocks_ahead(), if cols == 0 { 1 } else { 2 });
        let (mut walk, mut keys) = (piece.walk.clone(), BlockKeys::none());
        let mut count = 0;
        while walk.next(&mut keys) {
            let block = count;
            count += 1;
            // Which rows see which of these keys.
            let mut some = 0;
            for r in 0..rows {
                let (head, query) = unit.place(r);
                scratch.bits[r] = visible(call, &sequence.site(head), query, &keys);
                some |= scratch.bits[r];
            }
            if some == 0 {
                continue;
            }
            let phase = |phase| Phase { block, blocks, phase, sides }.rows(piece, &walk, *next, keys.len);
            let Scratch { queries, scores, bits, room, .. } = &mut **scratch;
            let found = &mut scores[..rows * BLOCK];
            let table = piece.block::<S, 0>(s, &keys, room, plan.key_cols);
            table.typed().dots(s, (rows, queries), &phase(0), found, BLOCK);
            for r in 0..rows {
                let (head, query) = unit.place(r);
                let site = sequence.site(head);
                let row = &mut scores[r * BLOCK..][..BLOCK];
                let asked = &queries[r * plan.key_cols..][..plan.key_cols];
                if careful && asked.iter().all(|x| x.is_finite()) {
                    let row = &mut row[..keys.len];
                    call.saturate(sequence, (head, query), row, |j| table.typed().is_finite(j));
                }
                let seen = |first| Some(Seen { words: &bits[r..=r], first });
                let mut factor = 0.0;
                if call.score.is_identity() {
                    // It does not matter which keys they are.
                    factor = call.finish_scores(sequence, &site, query, 0, &mut row[..keys.len], None);
                } else {
                    for (at, keys) in keys.runs() {
                        let part = &mut row[at..at + keys.len()];
                        factor = call.finish_scores(sequence, &site, query, keys.start, part, seen(at));
                    }
                }
                if bits[r] != u64::MAX {
                    mask_row(s, row, &bits[r..=r]);
                }
                if careful {
                    visible_of_row(s, row, &mut bits[r..=r]);
                }
                let mut figures = SoftmaxSum { max: max[r], sum: sum[r] };
                let out = &mut out[r * cols..][..cols];
                call.norm.weigh(s, row, factor, &site, &mut figures, out);
                (max[r], sum[r]) = (figures.max, figures.sum);
                for (at, keys) in keys.runs() {
                    call.gain_weights(sequence, head, keys.start, &mut row[at..at + keys.len()]);
                }
            }
            if cols == 0 {
                continue;
            }
            let table = piece.block::<S, 1>(s, &keys, room, cols);
            if careful {
                for r in 0..rows {
                    let out = &mut out[r * cols..][..cols];
                    table.typed().gather_visible(s, &scores[r * BLOCK..][..BLOCK], bits[r], out);
                }
            } else {
                table.typed().gather(s, (rows, &scores[..rows * BLOCK]), &phase(1), out, BLOCK);
            }
        }
    }
}

/// Merges the states of the chunks of a unit, in order, and writes its rows.
struct Finish<'a, 'c> {
    call: &'a Call<'c>,
    plan: Plan,
    unit: Unit,
    states: &'a [f32],
    row: &'a mut [f32],
    output: &'a Output<'a>,
}

impl Kernel for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, plan, unit, states, row, output } = self;
        let (rows, cols) = (unit.rows(), plan.out_cols);
        for r in 0..rows {
            row.fill(0.0);
            let mut state = RowState { figures: SoftmaxSum::EMPTY, out: row };
            for chunk in states.chunks_exact(rows * plan.state()) {
                let (out, figures) = chunk.split_at(rows * cols);
                let figures = SoftmaxSum { max: figures[r], sum: figures[rows + r] };
                state.merge(s, figures, &out[r * cols..][..cols]);
            }
            write(s, call, &unit, r, state.figures, state.out, output);
        }
    }
}

#[cfg(test)]
mod tests;
