//! Tiled online softmax over a key plan: many queries against many keys.
//!
//! Keys are packed once per key/value head into panels with keys in lanes,
//! values into panels of columns. A task is one tile of query rows: it walks
//! the key tiles that mask and plan leave, scores them with the register tile,
//! turns scores into weights while they are near, and multiplies by the
//! values. Key tiles start at fixed multiples of [`KEY_TILE`], of the sequence
//! or of a list of the plan, so a row's bits depend on its own sequence and
//! list alone: not on threads, batch or the rows around it.
//!
//! Where all query rows of a key/value head fit one tile and the keys are
//! many, a task is a chunk of the keys instead, which it packs tile by tile as
//! it goes; the states of the chunks are merged in order.
//!
//! Where few rows share a list of blocks, tiles are made of [rows that meet](met) in a
//! block.

mod amx;
mod met;
mod pack;
mod tile;

#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::engine::call::{Call, Output};
use crate::engine::parallel;
use crate::engine::row::{RowState, SoftmaxSum};
use crate::engine::scores::{
    Geometry, KEY_TILE, QUERY_TILE, ScoreTile, Scratch, classify, hull, queries_of, tiles_of,
};
use crate::input::{Lengths, Sequence};
use crate::keys::plan::Keys;
use crate::simd::mem::{Arena, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::TILE_ROWS;
use crate::simd::{Kernel, Simd, amx as tiles};
use amx::Pipeline;
pub(crate) use pack::{Own, Room, Rooms, pack_now};
use pack::{Packed, Wave, name_atoms, pack_tile};
use tile::{QueryTile, Store, Target};

/// Bytes of packed keys and values below which a thread packs them for itself.
const PRIVATE: usize = 512 << 10;
/// Bytes of packed keys and values that are shared at once: few stay in the last-level
/// cache, more are needed where there are more threads than a head has tiles for.
const SHARED: usize = 16 << 20;
const MOST_SHARED: usize = 64 << 20;
/// Tiles of a thread at once, at least, where there is room.
const TILES: usize = 8;
/// Keys of a task where tasks are chunks of keys. Fixed, because sums are cut
/// here.
const CHUNK: usize = 2048;
/// Queries of a list, or of a sequence, up to which rows of all heads of a
/// group share tiles.
const FEW: usize = QUERY_TILE / 2;

/// Whether a sequence of many queries is cut along its keys: depends on its
/// sizes alone, whatever else is in the batch.
fn is_split(call: &Call<'_>, sequence: &Sequence) -> bool {
    let rows = call.group() * sequence.queries.len();
    matches!(call.keys, Keys::Mask)
        && call.order.is_none()
        && rows <= QUERY_TILE
        && sequence.keys.len() >= 2 * CHUNK
        && !call.is_decode(sequence)
}

/// Whether it is cut along its queries.
fn is_tiled(call: &Call<'_>, sequence: &Sequence) -> bool {
    !call.is_decode(sequence) && !is_split(call, sequence)
}

/// Query heads of a key/value head.
fn group_of(call: &Call<'_>, kv_head: usize) -> Range<usize> {
    kv_head * call.group()..(kv_head + 1) * call.group()
}

/// The keys of a head that some query may see.
fn seen(call: &Call<'_>, sequence: &Sequence, kv_head: usize) -> Range<usize> {
    hull(call, sequence, group_of(call, kv_head), 0..sequence.queries.len())
}

/// Threads that a call is worth.
pub(crate) fn workers(call: &Call<'_>) -> usize {
    // Nanoseconds of a head, and multiply-adds in one, about.
    const HEAD: usize = 500;
    const PRODUCTS: usize = 32;
    let cols = call.dims.head_dim.saturating_add(call.dims.value_dim);
    let mut time = 0usize;
    for sequence in (0..call.dims.batch).map(|i| call.sequence(i)) {
        if !call.is_decode(&sequence) {
            let pairs = sequence.queries.len().saturating_mul(sequence.keys.len());
            let head = (pairs.saturating_mul(cols) / PRODUCTS).saturating_add(HEAD);
            time = time.saturating_add(head.saturating_mul(call.dims.q_heads));
        }
        if parallel::threads_for(time) == parallel::threads() {
            break;
        }
    }
    parallel::threads_for(time)
}

/// How the rows of a key/value head are cut into tiles.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// Heads whose rows take turns in a tile.
    heads: usize,
    /// Queries of a block: those of a list, or all.
    block: usize,
    /// Blocks of the longest sequence.
    blocks: usize,
    /// Rows of a tile, and tiles of a block.
    rows: usize,
    tiles: usize,
}

impl Cut {
    /// The rows of one of the tiles.
    fn rows(&self, q_len: usize, tile: usize) -> Range<usize> {
        let (block, tile) = (tile / self.tiles, tile % self.tiles);
        let end = ((block + 1) * self.block).min(q_len) * self.heads;
        let start = (block * self.block * self.heads + tile * self.rows).min(end);
        start..(start + self.rows).min(end)
    }

    /// Tiles of the longest sequence.
    fn len(&self) -> usize {
        self.blocks * self.tiles
    }
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
struct Plan {
    geometry: Geometry,
    workers: usize,
    /// Pairs of sequence and key/value head.
    units: usize,
    /// Whether a task is a whole unit, packed by the thread that runs it.
    private: bool,
    /// Units that are packed and attended to at once otherwise.
    wave: usize,
    cut: Cut,
    /// Sequences for which it is found out first what the mask leaves of each
    /// tile: none unless the mask cannot tell and says the same for every
    /// head, one where all sequences have the same lengths.
    scanned: usize,
    /// Rows of the largest unit that is cut along its keys, if there is one.
    split_rows: usize,
    /// Chunks of all units that are.
    chunks: usize,
    /// Tiles that a thread packs as it goes.
    own_tiles: usize,
}

impl Plan {
    fn new(call: &Call<'_>) -> Self {
        let d = &call.dims;
        let (q_len, _) = call.longest(|sequence| is_tiled(call, sequence));
        let (split_len, _) = call.longest(|sequence| is_split(call, sequence));
        let (_, kv_len) = call.longest(|sequence| !call.is_decode(sequence));
        let sequences = || (0..d.batch).map(|i| call.sequence(i));
        let extra = call.extra.map_or(0, |extra| extra.len());
        let longest = kv_len.max(extra.min(KEY_TILE));
        let geometry = Geometry::new(call.isa, d.head_dim, d.value_dim, longest).with_pieces(call.keys);
        let geometry = match call.amx() {
            Some(amx) => geometry.with_amx(amx, call, q_len),
            None => geometry,
        };
        let (workers, units) = (workers(call), d.batch * d.kv_heads);
        let split_rows = call.group() * split_len;
        let chunks_of = |sequence: &Sequence| {
            if is_split(call, sequence) { sequence.keys.len().div_ceil(CHUNK) } else { 0 }
        };
        let chunks = d.kv_heads * sequences().map(|sequence| chunks_of(&sequence)).sum::<usize>();

        let block = call.keys.q_block().map_or(q_len, |q_block| q_block.min(q_len)).max(1);
        let blocks = q_len.div_ceil(block);
        let heads = if call.keys.is_per_head() || block > FEW { 1 } else { call.group().max(1) };
        // Tiles of whole sequences are as large as they can be, others even,
        // and as many as there are threads.
        let align = if geometry.amx.is_some() { tiles::BLOCK } else { TILE_ROWS };
        let rows = if heads == 1 && call.keys.q_block().is_none() {
            geometry.query_tile
        } else {
            let (rows, most) = (block * heads, geometry.query_tile.min(QUERY_TILE));
            let others = units * (call.group() / heads) * blocks;
            let wanted = (2 * workers).div_ceil(others.max(1)).min(rows.div_ceil(most / 4));
            rows.div_ceil(rows.div_ceil(most).max(wanted).max(1)).next_multiple_of(align).min(most)
        };
        let cut = Cut { heads, block, blocks, rows, tiles: (block * heads).div_ceil(rows) };
        let query_tile = rows.max(split_rows.next_multiple_of(align));

        let on_demand = matches!(call.keys, Keys::Tokens(_));
        let key_tiles = if on_demand {
            0
        } else {
            let own = if call.mask.is_shared() { d.kv_heads.min(1) } else { d.kv_heads };
            let alike = matches!(call.x.lengths, Lengths::Full) && call.mask.is_shared();
            let tiles = |sequence: Sequence| {
                (0..own).map(|head| tiles_of(&seen(call, &sequence, head)).len()).max().unwrap_or(0)
            };
            let tiled = sequences().filter(|sequence| is_tiled(call, sequence));
            tiled.take(if alike { 1 } else { usize::MAX }).map(tiles).max().unwrap_or(0)
        };
        let geometry = Geometry { key_tiles, query_tile, ..geometry };
        let unit = geometry.unit_bytes().max(1);
        let tiles_of_unit = (call.group() / heads).saturating_mul(cut.len()).max(1);
        let busy = workers.saturating_mul(TILES).div_ceil(tiles_of_unit);
        let wave = (SHARED / unit).max(busy.min(MOST_SHARED / unit));
        let own_tiles = match (split_rows > 0, geometry.amx) {
            (true, Some(_)) => CHUNK / KEY_TILE,
            (split, _) => usize::from(split || on_demand || call.extra.is_some()),
        };
        Self {
            geometry,
            workers,
            units,
            private: unit <= PRIVATE && (workers == 1 || units >= 4 * workers),
            wave: wave.clamp(1, units.max(1)),
            cut,
            scanned: match call.x.lengths {
                _ if !(call.mask.is_opaque() && call.mask.is_shared()) => 0,
                _ if !matches!(call.keys, Keys::Mask) || q_len == 0 => 0,
                Lengths::Full => d.batch.min(1),
                Lengths::Keys(_) | Lengths::Packed { .. } | Lengths::Tokens(_) => d.batch,
            },
            split_rows,
            chunks,
            own_tiles,
        }
    }

    fn share_bytes(&self, call: &Call<'_>) -> usize {
        let g = &self.geometry;
        let private = Room::bytes(g, g.key_tiles) + bytes_for::<u8>(g.key_tiles);
        Scratch::bytes(g)
            + Rooms::bytes(call)
            + Room::bytes(g, self.own_tiles)
            + bytes_for::<f32>(g.out_cols)
            + if self.private { private } else { 0 }
    }

    /// Tiles of the sequences that are scanned.
    fn coverage(&self) -> usize {
        self.scanned * self.cut.len() * self.geometry.key_tiles
    }

    /// Elements of the state of a chunk: for each row the output, then the
    /// maxima, then the sums.
    fn state(&self) -> usize {
        self.split_rows * (self.geometry.out_cols + 2)
    }

    fn bytes(&self, call: &Call<'_>) -> usize {
        let packed = Wave::bytes(&self.geometry, self.wave);
        let split = bytes_for::<f32>(self.chunks * self.state())
            + bytes_for::<u64>(claim_words(self.chunks))
            + bytes_for::<u64>(call.dims.batch + 1);
        bytes_for_shares(self.workers, self.share_bytes(call))
            + bytes_for::<u8>(self.coverage())
            + bytes_for::<u64>(claim_words(self.scanned * self.cut.len()))
            + if self.chunks > 0 { split } else { 0 }
            + if self.private { 0 } else { packed }
    }
}

/// Bytes of scratch that a call needs.
pub(crate) fn workspace_bytes(call: &Call<'_>) -> usize {
    met::Plan::new(call, workers(call)).map_or_else(|| Plan::new(call).bytes(call), |plan| plan.bytes(call))
}

/// What one thread works in.
struct Worker<'a> {
    scratch: Scratch<'a>,
    own: Room<'a>,
    rooms: Rooms<'a>,
    row: &'a mut [f32],
}

impl<'a> Worker<'a> {
    fn take(arena: &mut Arena<'a>, call: &Call<'_>, plan: &Plan) -> Self {
        let g = &plan.geometry;
        Self {
            scratch: Scratch::take(arena, g),
            own: Room::take(arena, g, plan.own_tiles),
            rooms: Rooms::take(arena, call),
            row: arena.take(g.out_cols),
        }
    }
}

/// Output and figures of a call.
pub(crate) fn attend(call: &Call<'_>, output: &Output<'_>, mut arena: Arena<'_>) {
    if let Some(plan) = met::Plan::new(call, workers(call)) {
        return met::attend(call, &plan, output, arena);
    }
    let plan = Plan::new(call);
    if plan.chunks > 0 {
        split(call, &plan, output, arena.reborrow());
    }
    if plan.cut.blocks > 0 {
        tiled(call, &plan, output, arena);
    }
}

/// Prefetches what a unit reads: rows in another order than they lie come in runs
/// that are too short for the hardware to foresee.
fn prefetch_unit(call: &Call<'_>, sequence: &Sequence, kv_head: usize) {
    for head in group_of(call, kv_head) {
        for (_, rows) in call.query_runs(sequence, 0..sequence.queries.len()) {
            call.query_rows_of(sequence, head, &rows).stream().prefetch();
        }
    }
    for array in call.x.kv.arrays().into_iter().flatten() {
        for (_, rows) in call.key_runs(sequence, 0..sequence.keys.len()) {
            array.rows(sequence.batch, kv_head, &rows).stream().prefetch();
        }
    }
}

/// Runs a tile of query rows.
fn run_tile(call: &Call<'_>, g: &Geometry, tile: QueryTile<'_, '_, '_>) {
    match g.amx {
        Some(amx) => amx.vectorize(Pipeline::new(amx, tile)),
        None => call.isa.dispatch(tile),
    }
}

/// The sequences that are cut along their queries.
fn tiled(call: &Call<'_>, plan: &Plan, output: &Output<'_>, mut arena: Arena<'_>) {
    let (g, cut) = (plan.geometry, plan.cut);
    let (heads, group, members) = (call.dims.kv_heads, call.group(), call.group() / cut.heads);
    // The sequence and the head of a unit. Sequences that are regions of the same
    // rows come one after the other: what neighbours share is near.
    let regions = call.regions_of_a_list();
    let unit_of = |unit: usize| {
        let (entry, within) = (unit / (heads * regions), unit % (heads * regions));
        (call.sequence(entry * regions + within % regions), within / regions)
    };
    let first_tile = |sequence: &Sequence, head: usize| tiles_of(&seen(call, sequence, head)).start;

    let coverage = arena.take::<u8>(plan.coverage());
    let claims = arena.take(claim_words(plan.scanned * cut.len()));
    {
        let parts = Parts::new(coverage, g.key_tiles, claims);
        parallel::for_each(
            plan.workers,
            if g.key_tiles > 0 { plan.scanned * cut.len() } else { 0 },
            |_| (),
            |(), i| {
                let sequence = call.sequence(i / cut.len());
                let rows = cut.rows(sequence.queries.len(), i % cut.len());
                if is_tiled(call, &sequence) && !rows.is_empty() {
                    let (site, first) = (sequence.site(0), first_tile(&sequence, 0));
                    classify(call, &site, queries_of(&rows, cut.heads), first, parts.take(i));
                }
            },
        );
    }
    let coverage = &*coverage;

    // One tile of rows: (unit, which heads of the group, tile).
    let attend_tile =
        |worker: &mut Worker<'_>, packed: Option<Packed<'_>>, unit: usize, member: usize, index: usize| {
            let (sequence, kv_head) = unit_of(unit);
            let rows = cut.rows(sequence.queries.len(), index);
            if rows.is_empty() || !is_tiled(call, &sequence) {
                return;
            }
            let first_head = kv_head * group + member * cut.heads;
            let known = sequence.index.min(plan.scanned.saturating_sub(1)) * cut.len() + index;
            let coverage = (plan.scanned > 0).then(|| {
                (&coverage[known * g.key_tiles..][..g.key_tiles], packed.map_or(0, |packed| packed.first))
            });
            let within = 0..sequence.keys.len();
            let Worker { scratch, own, rooms, .. } = worker;
            let heads = first_head..first_head + cut.heads;
            let tile = ScoreTile { coverage, ..ScoreTile::new(call, g, sequence, heads, rows, scratch) };
            let store = packed.map_or(Store::Nothing, Store::Shared);
            let own = Own { room: own, rooms };
            let target = Target::Output(output);
            run_tile(call, &g, QueryTile { tile, store, own, within, extra: true, target });
        };

    if matches!(call.keys, Keys::Tokens(_)) {
        let shares = arena.shares(plan.workers, plan.share_bytes(call));
        let start = |worker: usize| Worker::take(&mut shares.take(worker), call, plan);
        let tasks = plan.units * members * cut.len();
        parallel::for_each(plan.workers, tasks, start, |worker, task| {
            let (index, unit, member) =
                (task % cut.len(), task / cut.len() / members, task / cut.len() % members);
            attend_tile(worker, None, unit, member, index);
        });
        return;
    }

    if plan.private {
        let shares = arena.shares(plan.workers, plan.share_bytes(call));
        let start = |worker| {
            let mut arena = shares.take(worker);
            let worker = Worker::take(&mut arena, call, plan);
            (worker, Room::take(&mut arena, &g, g.key_tiles), arena.take::<u8>(g.key_tiles))
        };
        parallel::for_each_ahead(plan.workers, plan.units, start, |(worker, room, named), unit, next| {
            let (sequence, kv_head) = unit_of(unit);
            if !is_tiled(call, &sequence) {
                return;
            }
            if let (Some(next), Some(_)) = (next, call.order) {
                let (sequence, kv_head) = unit_of(next);
                prefetch_unit(call, &sequence, kv_head);
            }
            let tiles = tiles_of(&seen(call, &sequence, kv_head));
            name_atoms(call, &sequence, kv_head, tiles.start, named);
            for (i, tile) in tiles.clone().enumerate() {
                let (to, rooms) = (&mut room.tile(&g, i), &mut worker.rooms);
                pack_tile(call, &g, &sequence, kv_head, tile, named[i], to, rooms);
            }
            for member in 0..members {
                for tile in 0..cut.len() {
                    attend_tile(worker, Some(room.packed(tiles.start)), unit, member, tile);
                }
            }
        });
        return;
    }

    let mut store = Wave::take(&mut arena, &g, plan.wave);
    for first in (0..plan.units).step_by(plan.wave) {
        let wave = plan.wave.min(plan.units - first);
        let tiles_of_unit = |unit: usize| {
            let (sequence, kv_head) = unit_of(unit);
            let tiles =
                if is_tiled(call, &sequence) { tiles_of(&seen(call, &sequence, kv_head)) } else { 0..0 };
            (sequence, kv_head, tiles)
        };
        store.pack((call, &g, plan.workers), first..first + wave, tiles_of_unit, arena.reborrow());
        let mut arena = arena.reborrow();
        let shares = arena.shares(plan.workers, plan.share_bytes(call));
        let start = |worker: usize| Worker::take(&mut shares.take(worker), call, plan);
        // Late query tiles first: under a causal mask they are the largest.
        let tasks = wave * members * cut.len();
        parallel::for_each(plan.workers, tasks, start, |worker, task| {
            let (tile, unit, member) = (task / (wave * members), task / members % wave, task % members);
            let (sequence, kv_head) = unit_of(first + unit);
            let packed = store.packed(&g, unit, first_tile(&sequence, kv_head));
            attend_tile(worker, Some(packed), first + unit, member, cut.len() - 1 - tile);
        });
    }
}

/// The sequences that are cut along their keys.
fn split(call: &Call<'_>, plan: &Plan, output: &Output<'_>, mut arena: Arena<'_>) {
    let (g, heads) = (plan.geometry, call.dims.kv_heads);
    // Chunks of a head in the sequences before each.
    let before = arena.take::<u64>(call.dims.batch + 1);
    before[0] = 0;
    for i in 0..call.dims.batch {
        let sequence = call.sequence(i);
        let chunks = if is_split(call, &sequence) { sequence.keys.len().div_ceil(CHUNK) } else { 0 };
        before[i + 1] = before[i] + chunks as u64;
    }
    let before = &*before;
    let chunks_of = |sequence: usize| (before[sequence + 1] - before[sequence]) as usize;
    let states = arena.take::<f32>(plan.chunks * plan.state());
    let claims = arena.take(claim_words(plan.chunks));
    {
        let parts = Parts::new(states, plan.state(), claims);
        let mut arena = arena.reborrow();
        let shares = arena.shares(plan.workers, plan.share_bytes(call));
        let start = |worker: usize| Worker::take(&mut shares.take(worker), call, plan);
        parallel::for_each(plan.workers, plan.chunks, start, |worker, piece| {
            // The sequence, then its heads, then their chunks.
            let index = before.partition_point(|&chunks| chunks as usize * heads <= piece) - 1;
            let sequence = call.sequence(index);
            let within = piece - before[index] as usize * heads;
            let (kv_head, chunk) = (within / chunks_of(index), within % chunks_of(index));
            let keys = chunk * CHUNK..((chunk + 1) * CHUNK).min(sequence.keys.len());
            let query_heads = group_of(call, kv_head);
            let seen = seen(call, &sequence, kv_head);
            let Worker { scratch, own, rooms, .. } = worker;
            let tiles = tiles_of(&(keys.start.max(seen.start)..keys.end.min(seen.end)));
            let mut spare = Room { keys: &mut [], values: &mut [], flags: &mut [] };
            let (store, own) = if g.amx.is_some() {
                for (i, tile) in tiles.clone().enumerate() {
                    pack_tile(call, &g, &sequence, kv_head, tile, u8::MAX, &mut own.tile(&g, i), rooms);
                }
                (Store::Shared(own.packed(tiles.start)), Own { room: &mut spare, rooms })
            } else {
                (Store::Nothing, Own { room: own, rooms })
            };
            let rows = 0..query_heads.len() * sequence.queries.len();
            let tile = ScoreTile::new(call, g, sequence, query_heads, rows, scratch);
            let (extra, target) = (chunk + 1 == chunks_of(index), Target::State(parts.take(piece)));
            run_tile(call, &g, QueryTile { tile, store, own, within: keys, extra, target });
        });
    }
    let states = &*states;
    let shares = arena.shares(plan.workers, plan.share_bytes(call));
    let start = |worker: usize| Worker::take(&mut shares.take(worker), call, plan);
    parallel::for_each(plan.workers, plan.units, start, |worker, unit| {
        let (index, kv_head) = (unit / heads, unit % heads);
        let chunks = chunks_of(index);
        if chunks > 0 {
            let first = before[index] as usize * heads + kv_head * chunks;
            let states = &states[first * plan.state()..][..chunks * plan.state()];
            let sequence = call.sequence(index);
            call.isa.dispatch(Merge { call, plan, sequence, kv_head, states, row: &mut *worker.row, output });
        }
    });
}

/// Merges the states of the chunks of one key/value head, in order, and writes
/// its rows.
struct Merge<'a, 'c> {
    call: &'a Call<'c>,
    plan: &'a Plan,
    sequence: Sequence,
    kv_head: usize,
    states: &'a [f32],
    row: &'a mut [f32],
    output: &'a Output<'a>,
}

impl Kernel for Merge<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, plan, sequence, kv_head, states, row, output } = self;
        let (rows, cols) = (plan.split_rows, plan.geometry.out_cols);
        let heads = group_of(call, kv_head);
        for r in 0..heads.len() * sequence.queries.len() {
            row.fill(0.0);
            let mut state = RowState { figures: SoftmaxSum::EMPTY, out: row };
            for chunk in states.chunks_exact(plan.state()) {
                let (out, figures) = chunk.split_at(rows * cols);
                let figures = SoftmaxSum { max: figures[r], sum: figures[rows + r] };
                state.merge(s, figures, &out[r * cols..][..cols]);
            }
            let head = heads.start + r % heads.len();
            let place = sequence.queries.start + r / heads.len();
            let factor = call.epilogue(s, (sequence.batch, head, place), state.figures, state.out);
            output.out.take(sequence.batch, head, place..place + 1).write(s, 0, state.out, factor);
            if let Some(to) = &output.figures {
                state.figures.write(&mut to.take(sequence.batch, head, place..place + 1), 0);
            }
        }
    }
}
