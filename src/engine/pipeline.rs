//! [`attend`](super::attend)'s tile of queries on AMX tiles.
//!
//! Tiles multiply beside the vector units, which turn scores into weights.
//! Therefore three blocks of rows are under way at once: while one is
//! weighed, row by row, the next one's scores are computed and the weights of
//! the one before multiplied by the values.
//!
//! Products take `bf16`: queries, keys and values as they are, weights in
//! [`Geometry::parts`](super::scores::Geometry::parts) that add up to them.

use std::ops::Range;

use crate::engine::attend::{Packed, QueryTile};
use crate::engine::row::{Exponent, Figures};
use crate::engine::scores::{Geometry, KEY_TILE, Scratch, Span, UNITS};
use crate::simd::amx::{Amx, BLOCK, DEPTH, Left, PAIRS, Product, TILE, TILE_LEN, Tiles};
use crate::simd::pack::{SLICE, class};
use crate::simd::tile::TILE_ROWS;
use crate::simd::{Kernel, MAX_LANES, Simd};

/// One tile of queries of one head against all its keys.
pub(crate) struct Pipeline<'a, 'b, 'c> {
    amx: Amx,
    tile: QueryTile<'a, 'b, 'c>,
    /// Given back before code of a caller's runs, which may use tiles too.
    tiles: Option<Tiles>,
}

impl<'a, 'b, 'c> Pipeline<'a, 'b, 'c> {
    pub(crate) fn new(amx: Amx, tile: QueryTile<'a, 'b, 'c>) -> Self {
        Self { amx, tile, tiles: None }
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

/// The units that are left.
struct Walk {
    tiles: Range<usize>,
    tile: usize,
    slice: usize,
    row: usize,
}

impl Kernel for Pipeline<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let tile = &mut self.tile.tile;
        let queries = tile.call.queries(&tile.sequence, tile.site.head).part(tile.rows.clone());
        queries.pack_left(s, tile.scratch.queries, tile.scratch.classes);
        self.tile.start();
        match self.tile.tile.g.parts() {
            2 => self.walk::<S, 2>(s),
            _ => self.walk::<S, 3>(s),
        }
        self.tiles = None;
        self.tile.finish(s);
    }
}

impl Pipeline<'_, '_, '_> {
    #[inline(always)]
    fn walk<S: Simd, const PARTS: usize>(&mut self, s: S) {
        let n = self.tile.tile.rows.len();
        let mut walk = Walk { tiles: self.tile.tile.key_tiles(), tile: 0, slice: KEY_TILE / SLICE, row: n };
        let mut place = 0;
        let (mut before, mut unit) = (None, self.next(&mut walk));
        self.turn::<S, PARTS>(s, UNITS - 1, None, unit.as_ref(), None);
        loop {
            let factors = unit.as_ref().map(|unit| self.finish_scores(s, unit, place));
            let next = if unit.is_some() { self.next(&mut walk) } else { None };
            let current = unit.as_ref().zip(factors.as_ref());
            self.turn::<S, PARTS>(s, place, current, next.as_ref(), before.as_ref());
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
                (walk.row, walk.slice) = (0, walk.slice + 1);
            }
            if walk.slice * SLICE >= tile.keys(walk.tile).len() {
                walk.tile = walk.tiles.next()?;
                walk.slice = 0;
                self.tiles = None;
                walk.row = if tile.plan(tile.keys(walk.tile)) { 0 } else { KEY_TILE };
                continue;
            }
            let rows = walk.row..(walk.row + BLOCK).min(n);
            walk.row = rows.end;
            let mut unit = Unit { tile: walk.tile, slice: walk.slice, rows, span: SLICE..0 };
            for group in unit.rows.start / TILE_ROWS..unit.rows.end.div_ceil(TILE_ROWS) {
                let seen = Span::get(tile.scratch.spans, group).within(&unit.part());
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
        self.repair_scores(unit, place);
        let tile = &mut self.tile.tile;
        if !tile.call.score.is_identity() {
            self.tiles = None;
        }
        let keys = tile.keys(unit.tile);
        let mut factors = [1.0; BLOCK];
        for (r, i) in unit.rows.clone().enumerate() {
            let at = scores_at(&tile.g, place, r);
            let seen = match tile.finish_row(s, &keys, &unit.part(), i, at) {
                Some((factor, whole)) => {
                    factors[r] = factor;
                    whole
                }
                None => unit.span.end..unit.span.end,
            };
            let row = &mut tile.scratch.scores[at..][..SLICE];
            row[unit.span.start..seen.start].fill(f32::NEG_INFINITY);
            row[seen.end..unit.span.end].fill(f32::NEG_INFINITY);
        }
        factors
    }

    /// Computes anew the scores that tiles may have got wrong: those of pairs
    /// where a subnormal number may have met a huge one.
    #[inline(always)]
    fn repair_scores(&mut self, unit: &Unit, place: usize) {
        let tile = &mut self.tile.tile;
        let (g, keys) = (tile.g, tile.keys(unit.tile));
        let flags = &self.tile.packed.flags[unit.tile * g.flags()..][g.slices()..g.flags()];
        let first = unit.part().start;
        let seen = unit.span.start..unit.span.end.min(keys.len() - first);
        let any = flags[first..][seen.clone()].iter().fold(0, |any, class| any | class);
        if any == 0 {
            return;
        }
        for (r, i) in unit.rows.clone().enumerate() {
            let of_query = tile.scratch.classes[i];
            let queries = tile.call.queries(&tile.sequence, tile.site.head);
            let rows = tile.call.keys(&tile.sequence, tile.site.head / tile.call.group());
            for j in seen.clone().filter(|&j| class::clash(of_query, flags[first + j])) {
                let score = queries.dot(tile.rows.start + i, &rows, keys.start + first + j);
                tile.scratch.scores[scores_at(&g, place, r) + j] = score;
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
        let mut work = Work::<PARTS> {
            tiles: self.tiles.get_or_insert_with(|| amx.tiles()),
            g,
            queries,
            packed: self.tile.packed,
            weights,
            score: next.filter(|_| g.key_steps() > 0),
            gather: before.filter(|_| g.out_cols > 0),
            block: 0,
            step: 0,
            done: 0,
        };
        let (all, gathered) = work.cost();
        if let Some((unit, factors)) = current {
            if before.is_some_and(|before| before.rows == unit.rows) {
                // What follows may change the scale of these rows' output.
                work.advance(gathered, ahead, out);
            }
            let kept = self.tile.packed.flags[unit.tile * g.flags() + unit.slice] != 0;
            let first = work.done;
            let rows = unit.rows.len();
            for (r, i) in unit.rows.clone().enumerate() {
                work.advance(first + (all - first) * (r + 1) / rows, ahead, out);
                let row = &mut scores[r * g.unit_row()..][..g.unit_row()];
                let at = scores_at(&g, 0, 0);
                let mut figures = Figures { max: max[i], sum: sum[i] };
                let out = &mut out[i * g.out_cols..][..g.out_cols];
                let seen = &mut row[at..][unit.span.clone()];
                let exponent = Exponent::of_row(s, seen, factors[r], &mut figures, out);
                if !kept {
                    let values = tile.call.values(&tile.sequence, tile.site.head / tile.call.group());
                    let first = unit.tile * KEY_TILE + unit.part().start + unit.span.start;
                    for j in (0..seen.len()).step_by(S::LANES) {
                        let mut weights = [0.0; MAX_LANES];
                        s.store(&mut weights, exponent.weight(s, s.load(&seen[j..])));
                        for t in 0..S::LANES {
                            // What scores -inf is masked: its value must not matter.
                            if seen[j + t] != f32::NEG_INFINITY {
                                values.add_lost(s, first + j + t, weights[t], out);
                            }
                        }
                    }
                }
                figures.sum += weigh::<S, PARTS>(s, exponent, row, at, &unit.span);
                (max[i], sum[i]) = (figures.max, figures.sum);
            }
        }
        work.advance(all, ahead, out);
    }
}

/// Where in the scratch the scores of a unit's row are. Its weights start
/// with the row, and no part of them reaches scores that are still to be read.
#[inline(always)]
fn scores_at(g: &Geometry, place: usize, row: usize) -> usize {
    place * g.unit_scores() + (row + 1) * g.unit_row() - SLICE
}

/// Turns a row of scores, which start at `at`, into weights, from the start
/// of the row on, each step's parts one after the other. Returns their sum.
#[inline(always)]
fn weigh<S: Simd, const PARTS: usize>(
    s: S,
    exponent: Exponent<S>,
    row: &mut [f32],
    at: usize,
    span: &Range<usize>,
) -> f32 {
    let mut total = s.splat(0.0);
    for step in span.start / DEPTH..span.end / DEPTH {
        for j in (0..TILE).step_by(S::LANES) {
            let from = at + step * DEPTH + j;
            let mut low = exponent.weight(s, s.load(&row[from..]));
            let mut high = exponent.weight(s, s.load(&row[from + TILE..]));
            total = s.add(total, s.add(low, high));
            for part in 0..PARTS {
                (low, high) = s.store_pairs(&mut row[(step * PARTS + part) * PAIRS + j..], low, high);
            }
        }
    }
    s.reduce_add(total)
}

/// The products of a turn, which are made a step at a time.
struct Work<'a, const PARTS: usize> {
    tiles: &'a Tiles,
    g: Geometry,
    queries: &'a [f32],
    packed: Packed<'a>,
    weights: &'a [f32],
    /// What is scored.
    score: Option<&'a Unit>,
    /// What values are added to, before anything is scored.
    gather: Option<&'a Unit>,
    block: usize,
    step: usize,
    /// Steps done, those of each part counted.
    done: usize,
}

impl<const PARTS: usize> Work<'_, PARTS> {
    /// What all steps cost, and what those with values do.
    #[inline(always)]
    fn cost(&self) -> (usize, usize) {
        let gather = self.gather.map_or(0, |unit| self.g.out_cols / BLOCK * unit.steps() * PARTS);
        (gather + self.score.map_or(0, |unit| unit.steps() * self.g.key_steps()), gather)
    }

    /// Makes steps until so much is done.
    #[inline(always)]
    fn advance(&mut self, until: usize, scores: &mut [f32], out: &mut [f32]) {
        while self.done < until {
            let (steps, blocks) = match (self.gather, self.score) {
                (Some(unit), _) => self.gather(unit, out),
                (None, Some(unit)) => self.score(unit, scores),
                (None, None) => return,
            };
            self.step += 1;
            if self.step == steps {
                (self.step, self.block) = (0, self.block + 1);
            }
            if self.block == blocks {
                self.block = 0;
                if self.gather.take().is_none() {
                    self.score = None;
                }
            }
        }
    }

    /// A step of weights times values; how many a block has, and how many
    /// blocks there are.
    #[inline(always)]
    fn gather(&mut self, unit: &Unit, out: &mut [f32]) -> (usize, usize) {
        let (g, steps) = (self.g, unit.steps());
        let values = &self.packed.values[unit.tile * g.packed_values()..][..g.packed_values()];
        let first = (unit.part().start + unit.span.start) / DEPTH;
        let column = |tile| (tile * (g.key_room / DEPTH) + first) * TILE_LEN;
        let row = g.unit_row();
        let mut product = Product::<PARTS> {
            a: Left {
                tiles: &self.weights[unit.span.start / DEPTH * PARTS * PAIRS..],
                row,
                lower: TILE * row,
                next: PAIRS,
            },
            b: [&values[column(2 * self.block)..], &values[column(2 * self.block + 1)..]],
            b_stride: TILE_LEN,
            steps,
            c: &mut out[unit.rows.start * g.out_cols + self.block * BLOCK..],
            ldc: g.out_cols,
            rows: unit.rows.len(),
            add: true,
        };
        self.tiles.step(&mut product, self.step);
        self.done += PARTS;
        (steps, g.out_cols / BLOCK)
    }

    /// A step of queries times keys; as above.
    #[inline(always)]
    fn score(&mut self, unit: &Unit, scores: &mut [f32]) -> (usize, usize) {
        let (g, steps) = (self.g, self.g.key_steps());
        let keys = &self.packed.keys[unit.tile * g.packed_keys()..][..g.packed_keys()];
        let first = unit.span.start + self.block * BLOCK;
        let tile = (unit.part().start + first) / TILE;
        let mut product = Product::<1> {
            a: Left {
                tiles: &self.queries[unit.rows.start / TILE * steps * TILE_LEN..],
                row: PAIRS,
                lower: steps * TILE_LEN,
                next: TILE_LEN,
            },
            b: [&keys[tile * steps * TILE_LEN..], &keys[(tile + 1) * steps * TILE_LEN..]],
            b_stride: TILE_LEN,
            steps,
            c: &mut scores[scores_at(&g, 0, 0) + first..],
            ldc: g.unit_row(),
            rows: unit.rows.len(),
            add: false,
        };
        self.tiles.step(&mut product, self.step);
        self.done += 1;
        (steps, unit.steps())
    }
}
