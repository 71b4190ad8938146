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
use crate::engine::scores::{Geometry, KEY_TILE, Scratch, Span};
use crate::simd::amx::{Amx, BLOCK, DEPTH, Product, TILE, TILE_LEN, Tiles};
use crate::simd::pack::{SLICE, class};
use crate::simd::tile::TILE_ROWS;
use crate::simd::{Kernel, MAX_LANES, Simd};

/// One tile of queries of one head against all its keys.
pub(crate) struct Pipeline<'a, 'b, 'c> {
    pub(crate) amx: Amx,
    pub(crate) tile: QueryTile<'a, 'b, 'c>,
}

/// Some rows of the tile of queries against a tile of keys.
#[derive(Clone, Debug)]
struct Unit {
    tile: usize,
    rows: Range<usize>,
    /// The keys of the tile that some row looks at, in whole steps.
    span: Range<usize>,
}

impl Unit {
    /// Steps of a product of weights and values.
    fn steps(&self) -> usize {
        self.span.len() / DEPTH
    }
}

/// The units that are left.
struct Walk {
    tiles: Range<usize>,
    tile: usize,
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
        self.tile.finish(s);
    }
}

impl Pipeline<'_, '_, '_> {
    #[inline(always)]
    fn walk<S: Simd, const PARTS: usize>(&mut self, s: S) {
        let mut walk = Walk { tiles: self.tile.tile.key_tiles(), tile: 0, row: self.tile.tile.rows.len() };
        let mut unit = self.next(&mut walk);
        let mut before = None;
        let mut slot = 0;
        self.turn::<S, PARTS>(s, 1, None, unit.as_ref(), None);
        while let Some(current) = unit {
            let factors = self.finish_scores(s, &current, slot);
            let next = self.next(&mut walk);
            self.turn::<S, PARTS>(s, slot, Some((&current, &factors)), next.as_ref(), before.as_ref());
            (before, unit, slot) = (Some(current), next, 1 - slot);
        }
        self.turn::<S, PARTS>(s, slot, None, None, before.as_ref());
    }

    /// The next unit in which something is visible.
    #[inline(always)]
    fn next(&mut self, walk: &mut Walk) -> Option<Unit> {
        let tile = &mut self.tile.tile;
        let n = tile.rows.len();
        loop {
            if walk.row >= n {
                walk.tile = walk.tiles.next()?;
                walk.row = if tile.plan(tile.keys(walk.tile)) { 0 } else { n };
                continue;
            }
            let rows = walk.row..(walk.row + BLOCK).min(n);
            walk.row = rows.end;
            let (mut start, mut end) = (KEY_TILE, 0);
            for group in rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS) {
                let span = Span::get(tile.scratch.spans, group);
                if span.start < span.end {
                    (start, end) = (start.min(span.start), end.max(span.end));
                }
            }
            if start < end {
                let span = start / DEPTH * DEPTH..end.next_multiple_of(DEPTH);
                return Some(Unit { tile: walk.tile, rows, span });
            }
        }
    }

    /// Makes the scores of a unit final, up to a factor for each row.
    #[inline(always)]
    fn finish_scores<S: Simd>(&mut self, s: S, unit: &Unit, slot: usize) -> [f32; BLOCK] {
        self.repair_scores(unit, slot);
        let tile = &mut self.tile.tile;
        let keys = tile.keys(unit.tile);
        let mut factors = [1.0; BLOCK];
        for (r, i) in unit.rows.clone().enumerate() {
            let place = slot * BLOCK + r;
            let seen = match tile.finish_row(s, &keys, i, place) {
                Some((factor, whole)) => {
                    factors[r] = factor;
                    whole
                }
                None => unit.span.end..unit.span.end,
            };
            let row = &mut tile.scratch.scores[place * KEY_TILE..][..KEY_TILE];
            row[unit.span.start..seen.start].fill(f32::NEG_INFINITY);
            row[seen.end..unit.span.end].fill(f32::NEG_INFINITY);
        }
        factors
    }

    /// Computes anew the scores that tiles may have got wrong: those of pairs
    /// where a subnormal number may have met a huge one.
    #[inline(always)]
    fn repair_scores(&mut self, unit: &Unit, slot: usize) {
        let tile = &mut self.tile.tile;
        let (g, keys) = (tile.g, tile.keys(unit.tile));
        let flags = &self.tile.packed.flags[unit.tile * g.flags()..][g.slices()..g.flags()];
        let seen = unit.span.start..unit.span.end.min(keys.len());
        let any = flags[seen.clone()].iter().fold(0, |any, class| any | class);
        for (r, i) in unit.rows.clone().enumerate() {
            let of_query = tile.scratch.classes[i];
            if !class::clash(of_query, any) {
                continue;
            }
            let queries = tile.call.queries(&tile.sequence, tile.site.head);
            let rows = tile.call.keys(&tile.sequence, tile.site.head / tile.call.group());
            for j in seen.clone().filter(|&j| class::clash(of_query, flags[j])) {
                let score = queries.dot(tile.rows.start + i, &rows, keys.start + j);
                tile.scratch.scores[(slot * BLOCK + r) * KEY_TILE + j] = score;
            }
        }
    }

    /// Weighs one unit, in the half of the scratch that `slot` says, while
    /// the next one is scored and the values of the one before are added.
    #[inline(always)]
    fn turn<S: Simd, const PARTS: usize>(
        &mut self,
        s: S,
        slot: usize,
        current: Option<(&Unit, &[f32; BLOCK])>,
        next: Option<&Unit>,
        before: Option<&Unit>,
    ) {
        let tile = &mut self.tile.tile;
        let g = tile.g;
        let Scratch { queries, scores, out, max, sum, parts, .. } = &mut *tile.scratch;
        let (scores, ahead) = halves(scores, slot);
        let (parts, weights) = halves(parts, slot);
        if g.key_steps() == 0 {
            ahead.fill(0.0);
        }
        // No code of a caller's runs from here to the end.
        let mut work = Work::<PARTS> {
            tiles: self.amx.tiles(),
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
            let flags = &self.tile.packed.flags[unit.tile * g.flags()..][..g.slices()];
            let all_kept = flags.iter().all(|&kept| kept != 0);
            let first = work.done;
            let rows = unit.rows.len();
            for (r, i) in unit.rows.clone().enumerate() {
                work.advance(first + (all - first) * (r + 1) / rows, ahead, out);
                let row = &mut scores[r * KEY_TILE..][unit.span.clone()];
                let mut figures = Figures { max: max[i], sum: sum[i] };
                let out = &mut out[i * g.out_cols..][..g.out_cols];
                let exponent = Exponent::of_row(s, row, factors[r], &mut figures, out);
                let parts = &mut parts[r / TILE * unit.steps() * PARTS * TILE_LEN + r % TILE * TILE..];
                figures.sum += weigh::<S, PARTS>(s, exponent, row, parts);
                (max[i], sum[i]) = (figures.max, figures.sum);
                if !all_kept {
                    let values = tile.call.values(&tile.sequence, tile.site.head / tile.call.group());
                    for j in (0..row.len()).step_by(S::LANES) {
                        let key = unit.span.start + j;
                        if flags[key / SLICE] != 0 {
                            continue;
                        }
                        let mut weights = [0.0; MAX_LANES];
                        s.store(&mut weights, exponent.weight(s, s.load(&row[j..])));
                        for t in 0..S::LANES {
                            // What scores -inf is masked: its value must not matter.
                            if row[j + t] != f32::NEG_INFINITY {
                                values.add_lost(s, unit.tile * KEY_TILE + key + t, weights[t], out);
                            }
                        }
                    }
                }
            }
        }
        work.advance(all, ahead, out);
    }
}

/// The half of a buffer that `slot` says, and the other one.
#[inline(always)]
fn halves(x: &mut [f32], slot: usize) -> (&mut [f32], &mut [f32]) {
    let (low, high) = x.split_at_mut(x.len() / 2);
    if slot == 0 { (low, high) } else { (high, low) }
}

/// Weights of a row of scores, in parts that lie a tile apart. Returns their
/// sum.
#[inline(always)]
fn weigh<S: Simd, const PARTS: usize>(
    s: S,
    exponent: Exponent<S>,
    row: &[f32],
    parts: &mut [f32],
) -> f32 {
    let mut total = s.splat(0.0);
    for (step, row) in row.chunks_exact(DEPTH).enumerate() {
        for j in (0..TILE).step_by(S::LANES) {
            let mut low = exponent.weight(s, s.load(&row[j..]));
            let mut high = exponent.weight(s, s.load(&row[TILE + j..]));
            total = s.add(total, s.add(low, high));
            for part in 0..PARTS {
                (low, high) = s.store_pairs(&mut parts[(step * PARTS + part) * TILE_LEN + j..], low, high);
            }
        }
    }
    s.reduce_add(total)
}

/// The products of a turn, which are made a step at a time.
struct Work<'a, const PARTS: usize> {
    tiles: Tiles,
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
        let column = |tile| (tile * (g.key_room / DEPTH) + unit.span.start / DEPTH) * TILE_LEN;
        let mut product = Product::<PARTS> {
            a: self.weights,
            b: [0, 1].map(|tile| &values[column(2 * self.block + tile)..]),
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
        let mut product = Product::<1> {
            a: &self.queries[unit.rows.start / TILE * steps * TILE_LEN..],
            b: [0, TILE].map(|key| &keys[(first + key) / TILE * steps * TILE_LEN..]),
            b_stride: TILE_LEN,
            steps,
            c: &mut scores[first..],
            ldc: KEY_TILE,
            rows: unit.rows.len(),
            add: false,
        };
        self.tiles.step(&mut product, self.step);
        self.done += 1;
        (steps, unit.steps())
    }
}
