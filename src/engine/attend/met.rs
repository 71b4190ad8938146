//! Rows that have lists of blocks of their own: those that visit a key tile are
//! attended together.
//!
//! A task is some hundreds of rows of a key/value head, whose states stay in the
//! second-level cache. It goes through the key tiles, from the last one to the first.
//! Rows that visit one, those that visit the same atoms of it next to each other, are
//! gathered into tiles of query rows with the states that they are in, see it, and go
//! back. Each row sees its own atoms in one order, at places that depend on the
//! sequence alone: its bits do not depend on the rows that it meets.

use std::ops::Range;

use super::pack::{Own, Room, Rooms, Wave};
use super::tile::{QueryTile, Store, Target};
use crate::engine::call::{Call, MOST_MEETING, Output};
use crate::engine::parallel;
use crate::engine::row::SoftmaxSum;
use crate::engine::scores::{Geometry, KEY_TILE, QUERY_TILE, ScoreTile, Scratch, Visit, hull, tiles_of};
use crate::input::Sequence;
use crate::keys::plan::{ATOM, BlockLists, Keys};
use crate::simd::mem::{Ahead, Arena, bytes_for, bytes_for_shares};
use crate::simd::{Kernel, Simd};

/// Bytes of the states of a task.
const STATES: usize = 1 << 20;
/// Queries of a task, at least, where its states may be as many.
const LEAST: usize = 32;
/// Bytes of packed keys and values that are shared at once.
const SHARED: usize = 64 << 20;
const _: () = assert!(MOST_MEETING <= Visit::ROWS);

/// Query heads of a key/value head.
fn heads_of(call: &Call<'_>, kv_head: usize) -> Range<usize> {
    kv_head * call.group()..(kv_head + 1) * call.group()
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a> {
    lists: &'a BlockLists,
    g: Geometry,
    workers: usize,
    /// Pairs of sequence and key/value head, and how many are packed at once.
    units: usize,
    wave: usize,
    /// Queries of a task, and tasks of the longest sequence.
    queries: usize,
    tasks: usize,
    /// What the rows of a task visit, at most.
    visits: usize,
}

impl<'a> Plan<'a> {
    /// None if no rows meet.
    pub(crate) fn new(call: &Call<'a>, workers: usize) -> Option<Self> {
        let Keys::Blocks(lists) = call.keys else { return None };
        let (q_len, kv_len) = call.longest(|sequence| call.meets(sequence));
        if q_len == 0 || call.group() == 0 {
            return None;
        }
        let d = &call.dims;
        let g = Geometry::new(call.isa, d.head_dim, d.value_dim, kv_len);
        let units = d.batch * d.kv_heads;
        let state = (g.out_cols + 2).saturating_mul(size_of::<f32>()).saturating_mul(call.group());
        // What meets does not change a row: the more tasks, the more even.
        let even = (units * q_len).div_ceil(4 * workers).max(LEAST);
        let queries = (STATES / state.max(1)).clamp(1, even).next_multiple_of(lists.layout().q_block);
        let tasks = q_len.div_ceil(queries);
        let mut plan = Self { lists, g, workers, units, wave: 1, queries, tasks, visits: 0 };
        for sequence in (0..d.batch).map(|i| call.sequence(i)).filter(|sequence| call.meets(sequence)) {
            for task in 0..d.kv_heads * tasks {
                plan.visits = plan.visits.max(plan.atoms(call, &sequence, task / tasks, task % tasks));
            }
        }
        let wave = (SHARED / g.unit_bytes().max(1)).clamp(1, units.max(1));
        Some(Self { wave, ..plan })
    }

    /// Queries of a task.
    fn task(&self, sequence: &Sequence, task: usize) -> Range<usize> {
        let end = sequence.queries.len();
        (task * self.queries).min(end)..((task + 1) * self.queries).min(end)
    }

    /// Atoms that the rows of a task visit, each row by itself.
    fn atoms(&self, call: &Call<'_>, sequence: &Sequence, kv_head: usize, task: usize) -> usize {
        let q_block = self.lists.layout().q_block;
        let of = |query: usize| {
            let of = |head| self.lists.atoms(sequence.index, head, query / q_block).len();
            heads_of(call, kv_head).map(of).sum::<usize>()
        };
        self.task(sequence, task).map(of).sum()
    }

    /// Calls `then` with the key tiles that each row of some queries visits.
    fn visits(
        &self,
        call: &Call<'_>,
        sequence: &Sequence,
        kv_head: usize,
        queries: Range<usize>,
        mut then: impl FnMut(usize, Visit),
    ) {
        const EACH: usize = KEY_TILE / ATOM;
        let (heads, q_block) = (heads_of(call, kv_head), self.lists.layout().q_block);
        for query in queries {
            for (i, head) in heads.clone().enumerate() {
                let row = query * heads.len() + i;
                let mut atoms = self.lists.atoms(sequence.index, head, query / q_block);
                while let Some(&first) = atoms.first() {
                    let (tile, mut visit) = (first as usize / EACH, Visit { row, atoms: 0 });
                    while let Some((&atom, rest)) = atoms.split_first()
                        && atom as usize / EACH == tile
                    {
                        (visit.atoms, atoms) = (visit.atoms | 1 << (atom as usize % EACH), rest);
                    }
                    then(tile, visit);
                }
            }
        }
    }

    /// Rows of a task.
    fn rows(&self, call: &Call<'_>) -> usize {
        self.queries * call.group()
    }

    fn share_bytes(&self, call: &Call<'_>) -> usize {
        Scratch::bytes(&self.g)
            + Rooms::bytes(call)
            + bytes_for::<f32>(self.rows(call) * (self.g.out_cols + 2))
            + bytes_for::<u32>(self.visits)
            + bytes_for::<u32>(self.g.key_tiles + 1)
    }

    /// Bytes of scratch.
    pub(crate) fn bytes(&self, call: &Call<'_>) -> usize {
        Wave::bytes(&self.g, self.wave) + bytes_for_shares(self.workers, self.share_bytes(call))
    }
}

/// What one thread works in.
struct Worker<'a> {
    scratch: Scratch<'a>,
    rooms: Rooms<'a>,
    states: &'a mut [f32],
    visits: &'a mut [u32],
    /// Where those of each key tile end.
    ends: &'a mut [u32],
}

/// Output and figures of the sequences whose rows meet.
pub(crate) fn attend(call: &Call<'_>, plan: &Plan<'_>, output: &Output<'_>, mut arena: Arena<'_>) {
    let (g, heads) = (plan.g, call.dims.kv_heads);
    let unit_of = |unit: usize| (call.sequence(unit / heads), unit % heads);
    let mut store = Wave::take(&mut arena, &g, plan.wave);
    for first in (0..plan.units).step_by(plan.wave) {
        let wave = plan.wave.min(plan.units - first);
        let of = |unit: usize| {
            let (sequence, kv_head) = unit_of(unit);
            let (heads, queries) = (heads_of(call, kv_head), 0..sequence.queries.len());
            let queries = if call.meets(&sequence) { queries } else { 0..0 };
            let tiles = tiles_of(&hull(call, &sequence, heads, queries));
            (sequence, kv_head, tiles)
        };
        store.pack((call, &g, plan.workers), first..first + wave, of, arena.reborrow());
        let store = &store;
        let mut arena = arena.reborrow();
        let shares = arena.shares(plan.workers, plan.share_bytes(call));
        let start = |worker: usize| {
            let mut arena = shares.take(worker);
            Worker {
                scratch: Scratch::take(&mut arena, &g),
                rooms: Rooms::take(&mut arena, call),
                states: arena.take(plan.rows(call) * (g.out_cols + 2)),
                visits: arena.take(plan.visits),
                ends: arena.take(g.key_tiles + 1),
            }
        };
        // Late queries first: under a causal mask they visit most.
        parallel::for_each(plan.workers, wave * plan.tasks, start, |worker, task| {
            let (unit, task) = (task % wave, plan.tasks - 1 - task / wave);
            let (sequence, kv_head, tiles) = of(first + unit);
            let queries = plan.task(&sequence, task);
            if queries.is_empty() || !call.meets(&sequence) {
                return;
            }
            sort(call, plan, (&sequence, kv_head), queries.clone(), worker);
            let Worker { scratch, rooms, states, visits, ends } = worker;
            let (visits, ends) = (&**visits, &**ends);
            let heads = heads_of(call, kv_head);
            let rows = queries.start * heads.len()..queries.end * heads.len();
            let tile = ScoreTile::new(call, g, sequence, heads, 0..0, scratch);
            let mut spare = Room { keys: &mut [], values: &mut [], flags: &mut [] };
            let (within, own) = (0..0, Own { room: &mut spare, rooms });
            let store = Store::Shared(store.packed(&g, unit, tiles.start));
            let target = Target::Output(output);
            let tile = QueryTile { tile, store, own, within, extra: false, target };
            call.isa.dispatch(Meet { tile, tiles, rows, visits, ends, states });
        });
    }
}

/// Sorts what the rows of a task visit by key tile, by atoms, by row.
fn sort(
    call: &Call<'_>,
    plan: &Plan<'_>,
    (sequence, kv_head): (&Sequence, usize),
    queries: Range<usize>,
    worker: &mut Worker<'_>,
) {
    let Worker { visits, ends, .. } = worker;
    ends.fill(0);
    plan.visits(call, sequence, kv_head, queries.clone(), |tile, _| ends[tile + 1] += 1);
    for tile in 1..ends.len() {
        ends[tile] += ends[tile - 1];
    }
    // Where a tile starts moves to where it ends, which is where the next one started.
    plan.visits(call, sequence, kv_head, queries, |tile, visit| {
        visits[ends[tile] as usize] = visit.pack();
        ends[tile] += 1;
    });
    let mut start = 0;
    for &end in &ends[..ends.len() - 1] {
        visits[start..end as usize].sort_unstable();
        start = end as usize;
    }
}

/// The rows of a task and the key tiles that they visit.
struct Meet<'a, 'b, 'c> {
    tile: QueryTile<'a, 'b, 'c>,
    /// Key tiles that somebody sees.
    tiles: Range<usize>,
    /// As they are numbered in the key/value head.
    rows: Range<usize>,
    visits: &'a [u32],
    ends: &'a [u32],
    states: &'a mut [f32],
}

impl Kernel for Meet<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { mut tile, tiles, rows, visits, ends, states } = self;
        let cols = tile.tile.g.out_cols;
        let (out, figures) = states.split_at_mut(states.len() / (cols + 2) * cols);
        let (max, sum) = figures.split_at_mut(figures.len() / 2);
        out[..rows.len() * cols].fill(0.0);
        max.fill(SoftmaxSum::EMPTY.max);
        sum.fill(SoftmaxSum::EMPTY.sum);
        let row_of = |&visit: &u32| Visit::unpack(visit).row - rows.start;
        for at in tiles.rev() {
            let start = if at == 0 { 0 } else { ends[at - 1] as usize };
            tile.tile.set_tile(at);
            for list in visits[start..ends[at] as usize].chunks(QUERY_TILE) {
                tile.tile.list = Some(list);
                tile.tile.rows = 0..list.len();
                tile.tile.load(s);
                let Scratch { out: held, max: held_max, sum: held_sum, .. } = &mut *tile.tile.scratch;
                for (i, row) in list.iter().map(row_of).enumerate() {
                    held[i * cols..][..cols].copy_from_slice(&out[row * cols..][..cols]);
                    (held_max[i], held_sum[i]) = (max[row], sum[row]);
                }
                tile.turn(s, &mut (Ahead::nothing(), 0));
                let Scratch { out: held, max: held_max, sum: held_sum, .. } = &*tile.tile.scratch;
                for (i, row) in list.iter().map(row_of).enumerate() {
                    out[row * cols..][..cols].copy_from_slice(&held[i * cols..][..cols]);
                    (max[row], sum[row]) = (held_max[i], held_sum[i]);
                }
            }
        }
        tile.tile.list = None;
        for first in (0..rows.len()).step_by(QUERY_TILE) {
            let part = first..(first + QUERY_TILE).min(rows.len());
            let n = part.len();
            let Scratch { out: held, max: held_max, sum: held_sum, .. } = &mut *tile.tile.scratch;
            held[..n * cols].copy_from_slice(&out[first * cols..][..n * cols]);
            held_max[..n].copy_from_slice(&max[part.clone()]);
            held_sum[..n].copy_from_slice(&sum[part.clone()]);
            tile.tile.rows = rows.start + part.start..rows.start + part.end;
            tile.finish(s);
        }
    }
}
