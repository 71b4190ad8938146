//! The tile of queries on AMX tiles.
//!
//! Tiles multiply beside the vector units, which turn scores into weights.
//! Therefore three blocks of rows are under way at once: while one is
//! weighed, row by row, the next one's scores are computed and the weights of
//! the one before multiplied by the values.
//!
//! Products take `bf16`: queries, keys, values and weights come in parts that
//! add up to them.

use std::ops::Range;

use crate::engine::attend::pack::Packed;
use crate::engine::attend::tile::{QueryTile, Store};
use crate::engine::row::{Exponent, SoftmaxSum};
use crate::engine::scores::{Geometry, KEY_TILE, Scratch, Span, UNITS, WORDS, tiles_of};
use crate::keys::source::At;
use crate::simd::amx::{Amx, BLOCK, DEPTH, Operands, PAIRS, Product, TILE, TILE_LEN, TileOp, TileOps, Tiles};
use crate::simd::any::AnyRows;
use crate::simd::mem::{self, CONCURRENT_STREAMS, prefetch_l2};
use crate::simd::pack::SLICE;
use crate::simd::tile::TILE_ROWS;
use crate::simd::{Kernel, MAX_LANES, Simd};

/// One tile of queries of one head against all its keys.
pub(crate) struct Pipeline<'a, 'b, 'c> {
    amx: Amx,
    tile: QueryTile<'a, 'b, 'c>,
    packed: Packed<'a>,
    /// Given back before code of a caller's runs, which may use tiles too.
    tiles: Option<Tiles>,
}

impl<'a, 'b, 'c> Pipeline<'a, 'b, 'c> {
    pub(crate) fn new(amx: Amx, tile: QueryTile<'a, 'b, 'c>) -> Self {
        let packed = match tile.store {
            Store::Shared(packed) => packed,
            // Of calls that pack as they go none is for tiles.
            Store::Nothing => Packed { keys: &[], values: &[], flags: &[], first: 0 },
        };
        Self { amx, tile, packed, tiles: None }
    }
}

/// Some rows of the tile of queries against a slice of keys.
#[derive(Clone, Debug)]
struct Unit {
    /// The tile of keys.
    tile: usize,
    /// The slice of the tile's keys.
    slice: usize,
    rows: Range<usize>,
    /// The keys of the slice that some row looks at, in whole steps.
    span: Range<usize>,
    /// Whether every row sees all of those that exist.
    full: bool,
}

impl Unit {
    /// Steps of a product of weights and values.
    fn steps(&self) -> usize {
        self.span.len() / DEPTH
    }

    /// The slice among the keys of the tile.
    fn part(&self) -> Range<usize> {
        self.slice * SLICE..(self.slice + 1) * SLICE
    }
}

/// The moves of all products.
struct Program<'a> {
    /// With keys.
    score: TileOps<'a>,
    /// With values, of so many steps and one more.
    gather: [TileOps<'a>; SLICE / DEPTH],
}

impl<'a> Program<'a> {
    fn new(g: &Geometry, room: &'a mut [TileOp]) -> Self {
        let (score, mut rest) = room.split_at_mut(g.score_order().count(g.key_steps()));
        let score = g.score_order().moves(g.key_steps(), TILE_LEN, score);
        let gather = std::array::from_fn(|i| {
            let (list, after) = std::mem::take(&mut rest).split_at_mut(g.value_order().count(i + 1));
            rest = after;
            g.value_order().moves(i + 1, PAIRS, list)
        });
        Self { score, gather }
    }
}

/// The units that are left, from the last keys to the first.
struct Walk {
    tiles: Range<usize>,
    tile: usize,
    /// Slices of the tile that are left, and the next row.
    slices: usize,
    row: usize,
}

impl Kernel for Pipeline<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let tile = &mut self.tile.tile;
        for head in tile.heads.clone() {
            let (queries, first) = tile.rows_of_head(head);
            if !queries.is_empty() {
                let rows = tile.call.queries(&tile.sequence, head).part(queries);
                rows.pack_left(s, (first, tile.heads.len()), tile.scratch.queries, tile.scratch.huge);
            }
        }
        // Taken out for a while, as they are read while the rest is written.
        let room = std::mem::take(&mut tile.scratch.moves);
        let program = Program::new(&tile.g, room);
        self.tile.start();
        match self.tile.tile.g.weight_parts() {
            2 => self.walk::<S, 2>(s, &program),
            _ => self.walk::<S, 3>(s, &program),
        }
        self.tiles = None;
        self.tile.tile.scratch.moves = room;
        self.tile.finish(s);
    }
}

impl Pipeline<'_, '_, '_> {
    #[inline(always)]
    fn walk<S: Simd, const PARTS: usize>(&mut self, s: S, program: &Program<'_>) {
        let (seen, within) = (self.tile.tile.key_tiles(), tiles_of(&self.tile.within));
        let tiles = seen.start.max(within.start)..seen.end.min(within.end);
        let mut walk = Walk { tiles, tile: 0, slices: 0, row: 0 };
        let mut place = 0;
        let (mut before, mut unit) = (None, self.next(&mut walk));
        self.turn::<S, PARTS>(s, program, UNITS - 1, None, unit.as_ref(), None);
        loop {
            let factors = unit.as_ref().map(|unit| self.finish_scores(s, unit, place));
            let next = if unit.is_some() { self.next(&mut walk) } else { None };
            let current = unit.as_ref().zip(factors.as_ref());
            self.turn::<S, PARTS>(s, program, place, current, next.as_ref(), before.as_ref());
            if unit.is_none() {
                break;
            }
            (before, unit, place) = (unit, next, (place + 1) % UNITS);
        }
    }

    /// The next unit in which something is visible.
    #[inline(always)]
    fn next(&mut self, walk: &mut Walk) -> Option<Unit> {
        let tile = &mut self.tile.tile;
        let n = tile.rows.len();
        loop {
            if walk.row >= n {
                (walk.row, walk.slices) = (0, walk.slices - 1);
            }
            if walk.slices == 0 {
                walk.tile = walk.tiles.next_back()?;
                self.tiles = None;
                tile.set_tile(walk.tile);
                // Of a tile that nobody sees no slice is left.
                walk.slices = if tile.plan() { tile.len.div_ceil(SLICE) } else { 0 };
                continue;
            }
            let rows = walk.row..(walk.row + BLOCK).min(n);
            walk.row = rows.end;
            // Empty, and the hull of nothing.
            let span = Range { start: SLICE, end: 0 };
            let mut unit = Unit { tile: walk.tile, slice: walk.slices - 1, rows, span, full: true };
            let whole = unit.part().start..unit.part().end.min(tile.len);
            for group in unit.rows.start / TILE_ROWS..unit.rows.end.div_ceil(TILE_ROWS) {
                let span = Span::get(tile.scratch.spans, group);
                let mut seen = span.within(&unit.part());
                unit.full &= !span.holes && seen == whole;
                if span.holes && !seen.is_empty() {
                    let rows = group * TILE_ROWS..((group + 1) * TILE_ROWS).min(n);
                    seen = hull_of_bits(tile.scratch.bits, rows, seen);
                }
                if !seen.is_empty() {
                    unit.span.start = unit.span.start.min(seen.start % SLICE / DEPTH * DEPTH);
                    unit.span.end = unit.span.end.max((seen.end - unit.part().start).next_multiple_of(DEPTH));
                }
            }
            if !unit.span.is_empty() {
                return Some(unit);
            }
        }
    }

    /// Makes the scores of a unit final, up to a factor for each row.
    #[inline(always)]
    fn finish_scores<S: Simd>(&mut self, s: S, unit: &Unit, place: usize) -> [f32; BLOCK] {
        self.repair_scores(s, unit, place);
        let tile = &mut self.tile.tile;
        let len = tile.tile_keys(unit.tile).len();
        if !tile.call.score.is_identity() {
            self.tiles = None;
        } else if unit.full && tile.call.scale > 0.0 {
            // Nothing is changed: what is left is the factor.
            let end = unit.span.end.min(len - unit.part().start);
            if end < unit.span.end {
                for r in 0..unit.rows.len() {
                    let at = scores_at(&tile.g, place, r);
                    tile.scratch.scores[at + end..at + unit.span.end].fill(f32::NEG_INFINITY);
                }
            }
            let site = tile.sequence.site(tile.heads.start);
            let factor = tile.call.finish_scores(&tile.sequence, &site, 0, 0, &mut [], None);
            return [factor; BLOCK];
        }
        let mut factors = [1.0; BLOCK];
        for (r, i) in unit.rows.clone().enumerate() {
            let at = scores_at(&tile.g, place, r);
            let seen = match tile.finish_row(s, &unit.part(), i, at) {
                Some((factor, whole)) => {
                    factors[r] = factor;
                    whole
                }
                None => unit.span.end..unit.span.end,
            };
            let row = &mut tile.scratch.scores[at..][..SLICE];
            // What the row sees may reach further than what is computed, where
            // all that is beyond is hidden.
            row[unit.span.start..seen.start.max(unit.span.start)].fill(f32::NEG_INFINITY);
            row[seen.end.min(unit.span.end)..unit.span.end].fill(f32::NEG_INFINITY);
        }
        factors
    }

    /// Computes anew the scores that tiles may have got wrong.
    #[inline(always)]
    fn repair_scores<S: Simd>(&mut self, s: S, unit: &Unit, place: usize) {
        let tile = &mut self.tile.tile;
        let (g, keys) = (tile.g, tile.tile_keys(unit.tile));
        let first = unit.part().start;
        let seen = unit.span.start..unit.span.end.min(keys.len() - first);
        let flags = &self.packed.flags[(unit.tile - self.packed.first) * g.flags()..][g.slices()..g.flags()];
        let of_keys = &flags[first..][..seen.end];
        let of_queries = &tile.scratch.huge[unit.rows.clone()];
        // A sum is taken many at a time; a search that may end is not.
        let any = |flags: &[u8]| flags.iter().fold(0, |any, &huge| any | huge) != 0;
        if !any(&of_keys[seen.start..]) && !any(of_queries) {
            return;
        }
        let (kv_head, start) = (tile.kv_head, keys.start + first);
        let at = At { sequence: &tile.sequence, kv_head, keys: start..start + seen.end };
        let rows = tile.call.x.kv.keys(tile.call.isa, &at, self.tile.own.rooms.unpacked());
        for (r, i) in unit.rows.clone().enumerate() {
            let (head, query) = tile.place(i);
            let row = tile.call.query(&tile.sequence, head, query);
            for j in seen.clone() {
                if tile.scratch.huge[i] | of_keys[j] != 0 {
                    let score = &mut tile.scratch.scores[scores_at(&g, place, r) + j];
                    *score = row.dot(s, 0, &rows, j);
                    let finite = |_| row.is_finite(0) && rows.is_finite(j);
                    let score = std::slice::from_mut(score);
                    tile.call.saturate(&tile.sequence, (head, query), score, finite);
                }
            }
        }
    }

    /// Weighs one unit, in the place of the scratch that is named, while the
    /// next one is scored in the place after it and the values of the one
    /// before are added, whose weights are in the place before.
    #[inline(always)]
    fn turn<S: Simd, const PARTS: usize>(
        &mut self,
        s: S,
        program: &Program<'_>,
        place: usize,
        current: Option<(&Unit, &[f32; BLOCK])>,
        next: Option<&Unit>,
        before: Option<&Unit>,
    ) {
        let tile = &mut self.tile.tile;
        let g = tile.g;
        let Scratch { queries, scores, out, max, sum, .. } = &mut *tile.scratch;
        let (first, rest) = scores.split_at_mut(g.unit_scores());
        let (second, third) = rest.split_at_mut(g.unit_scores());
        let (weights, scores, ahead) = match place {
            0 => (third, first, second),
            1 => (first, second, third),
            _ => (second, third, first),
        };
        if g.key_steps() == 0 {
            ahead.fill(0.0);
        }
        // No code of a caller's runs from here to the end.
        let amx = self.amx;
        let tiles = self.tiles.get_or_insert_with(|| amx.tiles());
        let packed = &self.packed;
        let mut work = Work::new(tiles, &g, program, packed, (weights, before), (queries, next));
        if let Some((unit, factors)) = current {
            if before.is_some_and(|before| before.rows == unit.rows) {
                // What follows may change the scale of these rows' output.
                work.advance(work.gather.left(), ahead, out);
            }
            let kept = packed.flags[(unit.tile - packed.first) * g.flags() + unit.slice] != 0;
            // Products are made after each step of a row, evenly.
            let steps = unit.span.start / DEPTH..unit.span.end / DEPTH;
            let rate = (work.left() << 16).div_ceil(unit.rows.len() * steps.len());
            let mut due = 0;
            let mut fetch = Fetch::new(packed, &g, unit, tile.rows.len());
            for (r, i) in unit.rows.clone().enumerate() {
                fetch.some();
                let row = &mut scores[r * g.unit_row()..][..g.unit_row()];
                let at = scores_at(&g, 0, 0);
                let mut figures = SoftmaxSum { max: max[i], sum: sum[i] };
                let row_out = &mut out[i * g.out_cols..][..g.out_cols];
                let seen = &mut row[at..][unit.span.clone()];
                let exponent = Exponent::of_row(s, seen, factors[r], &mut figures, row_out);
                if !kept {
                    let first = unit.tile * KEY_TILE + unit.part().start + unit.span.start;
                    let keys = first..(first + unit.span.len()).min(tile.sequence.keys.len());
                    let at = At { sequence: &tile.sequence, kv_head: tile.kv_head, keys };
                    let values = tile.call.x.kv.values(tile.call.isa, &at, self.tile.own.rooms.unpacked());
                    add_lost_values(s, exponent, seen, &values, row_out);
                }
                let mut total = s.splat(0.0);
                for step in steps.clone() {
                    total = s.add(total, weigh::<S, PARTS>(s, exponent, row, step));
                    due += rate;
                    if due >> 16 > 0 {
                        work.advance(due >> 16, ahead, out);
                        due &= 0xffff;
                    }
                }
                figures.sum += s.reduce_add(total);
                (max[i], sum[i]) = (figures.max, figures.sum);
            }
        }
        work.advance(work.left(), ahead, out);
    }
}

/// The slice of keys and values before that of a unit, which is prefetched a
/// little at a time, for it comes from far away: a share with each row of the
/// units of a slice, in several concurrent streams.
struct Fetch<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    /// Lines to prefetch at a time.
    each: usize,
    next: usize,
}

/// `f32` of a cache line.
const LINE: usize = mem::LINE / size_of::<f32>();

impl<'a> Fetch<'a> {
    #[inline(always)]
    fn new(packed: &Packed<'a>, g: &Geometry, unit: &Unit, rows: usize) -> Self {
        let (keys, values) = (g.slice_keys(), g.slice_values());
        let slice = (unit.tile - packed.first) * (KEY_TILE / SLICE) + unit.slice;
        let before = |len: usize| slice.saturating_sub(1) * len..slice * len;
        let each = ((keys + values) / LINE).div_ceil(rows);
        Self {
            keys: &packed.keys[before(keys)],
            values: &packed.values[before(values)],
            each,
            next: unit.rows.start * each,
        }
    }

    #[inline(always)]
    fn some(&mut self) {
        let part = (self.keys.len() + self.values.len()) / LINE / CONCURRENT_STREAMS;
        for i in self.next..self.next + self.each {
            let at = (i % CONCURRENT_STREAMS * part + i / CONCURRENT_STREAMS) * LINE;
            if at < self.keys.len() {
                prefetch_l2(self.keys[at..].as_ptr().cast());
            } else if at - self.keys.len() < self.values.len() {
                prefetch_l2(self.values[at - self.keys.len()..].as_ptr().cast());
            }
        }
        self.next += self.each;
    }
}

/// Where in the scratch the scores of a unit's row are. Its weights start
/// with the row, and no part of them reaches scores that are still to be read.
#[inline(always)]
fn scores_at(g: &Geometry, place: usize, row: usize) -> usize {
    place * g.unit_scores() + (row + 1) * g.unit_row() - SLICE
}

/// What some rows see of a range of keys: the hull of their bits.
#[inline(always)]
fn hull_of_bits(bits: &[u64], rows: Range<usize>, range: Range<usize>) -> Range<usize> {
    let (mut start, mut end) = (range.end, range.start);
    for w in range.start / 64..range.end.div_ceil(64) {
        let word = rows.clone().fold(0, |word, i| word | bits[i * WORDS + w]);
        if word != 0 {
            start = start.min(64 * w + word.trailing_zeros() as usize);
            end = end.max(64 * w + 64 - word.leading_zeros() as usize);
        }
    }
    let (start, end) = (start.max(range.start), end.min(range.end));
    if start < end { start..end } else { range.start..range.start }
}

/// Adds what packed values leave out, for one row of scores.
#[inline(always)]
fn add_lost_values<S: Simd>(
    s: S,
    exponent: Exponent<S>,
    scores: &[f32],
    values: &AnyRows<'_>,
    out: &mut [f32],
) {
    for j in (0..scores.len()).step_by(S::LANES) {
        let mut weights = [0.0; MAX_LANES];
        s.store(&mut weights, exponent.weight(s, s.load(&scores[j..])));
        for t in 0..S::LANES {
            // What scores -inf is masked: its value must not matter.
            if scores[j + t] != f32::NEG_INFINITY {
                values.add_lost(s, j + t, weights[t], out);
            }
        }
    }
}

/// Turns a step's keys in a row of scores into weights, whose parts lie one
/// after the other from the start of the row on; the scores end with it.
/// Returns a vector that adds up to the sum of the weights.
#[inline(always)]
fn weigh<S: Simd, const PARTS: usize>(s: S, exponent: Exponent<S>, row: &mut [f32], step: usize) -> S::F {
    let row = &mut row[..SLICE / 2 * PARTS];
    // Which is so, and saves the checks of what follows.
    let step = step.min(SLICE / DEPTH - 1);
    let mut total = s.splat(0.0);
    for j in (0..TILE).step_by(S::LANES) {
        let from = SLICE / 2 * PARTS - SLICE + step * DEPTH + j;
        let mut low = exponent.weight(s, s.load(&row[from..]));
        let mut high = exponent.weight(s, s.load(&row[from + TILE..]));
        total = s.add(total, s.add(low, high));
        for part in 0..PARTS {
            let (pairs, rest) = if PARTS == 3 { s.cut_pairs(low, high) } else { s.pairs(low, high) };
            s.store(&mut row[(step * PARTS + part) * PAIRS + j..], pairs);
            [low, high] = rest;
        }
    }
    total
}

/// The products of a turn, of which a part is made at a time.
struct Work<'a> {
    tiles: &'a Tiles,
    /// Those with values, which come first, and where their sums are.
    gather: Product<'a, true>,
    out: usize,
    /// Those with keys, and where the scores are.
    score: Product<'a, false>,
    scores: usize,
}

impl<'a> Work<'a> {
    /// Weights of one unit and queries of another.
    #[inline(always)]
    fn new(
        tiles: &'a Tiles,
        g: &Geometry,
        program: &Program<'a>,
        packed: &Packed<'a>,
        (weights, gather): (&'a [f32], Option<&Unit>),
        (queries, score): (&'a [f32], Option<&Unit>),
    ) -> Self {
        const NOTHING: Unit = Unit { tile: 0, slice: 0, rows: 0..0, span: 0..0, full: true };
        let gather = gather.filter(|_| g.out_cols > 0).unwrap_or(&NOTHING);
        let score = score.filter(|_| g.key_steps() > 0).unwrap_or(&NOTHING);
        let place = |unit: &Unit| unit.tile.saturating_sub(packed.first);
        let values = &packed.values[place(gather) * g.packed_values() + gather.slice * g.slice_values()..];
        let first = gather.span.start / DEPTH;
        let of_values = Operands {
            a: &weights[first * g.weight_parts() * PAIRS..],
            row: g.unit_row(),
            lower: TILE * g.unit_row(),
            b: &values[first * g.parts * 2 * TILE_LEN..],
            next_block: SLICE / DEPTH * g.parts * 2 * TILE_LEN,
            moves: program.gather[gather.steps().saturating_sub(1)],
            rows: gather.rows.len(),
            blocks: if gather.steps() == 0 { 0 } else { g.out_cols / BLOCK },
            ldc: g.out_cols,
        };
        let keys = &packed.keys[place(score) * g.packed_keys() + score.slice * g.slice_keys()..];
        let len = g.key_steps() * g.parts * TILE_LEN;
        let of_keys = Operands {
            a: &queries[score.rows.start / TILE * len..],
            row: PAIRS,
            lower: len,
            b: &keys[score.span.start / BLOCK * 2 * len..],
            next_block: 2 * len,
            moves: program.score,
            rows: score.rows.len(),
            blocks: score.steps(),
            ldc: g.unit_row(),
        };
        Self {
            tiles,
            gather: Product::new(of_values),
            out: gather.rows.start * g.out_cols,
            score: Product::new(of_keys),
            scores: scores_at(g, 0, 0) + score.span.start,
        }
    }

    #[inline(always)]
    fn left(&self) -> usize {
        self.gather.left() + self.score.left()
    }

    /// Makes so many halves of moves.
    #[inline(always)]
    fn advance(&mut self, count: usize, scores: &mut [f32], out: &mut [f32]) {
        let gathered = count.min(self.gather.left());
        self.gather.advance(self.tiles, gathered, &mut out[self.out..]);
        self.score.advance(self.tiles, count - gathered, &mut scores[self.scores..]);
    }
}
