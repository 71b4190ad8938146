//! Scores of many heads that become those of candidates while they are near:
//! rows of a list are summed, and columns of a candidate folded, a block of keys
//! at a time, so that a row of products is never held.

use super::coded::encode;
use super::score::{Candidates, FEW};
use super::{Fold, Per, Range, Scheme, Scored, Scores, Task, choose};
use crate::keys::Layout;
use crate::simd::any::AnyArray;
use crate::simd::dots::{BESIDE, PANEL, Rectified, Vnni, words};
use crate::simd::mem::Rows;
use crate::simd::table::TABLE_ROWS;
use crate::simd::{Kernel, Simd};

/// Rows whose products with a block of keys are held, at most.
pub(super) const ROWS: usize = 256;
/// Scores that stay in the second-level cache until they are picked from.
pub(super) const HELD: usize = 1 << 19;
/// Keys of a block.
pub(super) const BLOCK: usize = 128;

/// Rows for which packing a block of keys is worth it.
pub(super) fn least(dots: Option<Vnni>) -> usize {
    if dots.is_some() { 32 } else { 96 }
}

impl Scheme {
    /// Whether this is how the lists of a layout are scored: each has the keys of
    /// one head, and so many rows.
    pub(super) fn is_fused(&self, layout: &Layout, rows: usize) -> bool {
        let one_head = self.per != Per::Sequence || layout.kv_heads <= 1;
        let one = one_head && self.q_block == 1 && self.shares.is_none();
        let apart = |scored| match scored {
            Scored::Pools(pools) => pools.width == pools.stride && pools.fold == Fold::Max,
            Scored::Begun | Scored::Whole => true,
        };
        let alone = rows == 1 && matches!(self.scored, Scored::Pools(_));
        one && apart(self.scored) && (self.reduce.is_rectified() || alone)
    }
}

/// The lists of a tile of queries.
pub(super) struct Lists {
    kv_head: usize,
    /// Rows of a list.
    rows: usize,
    /// Keys that the query of each list sees: by head, and by query.
    seen: Vec<usize>,
    /// Heads that have lists of their own, queries of each, and how many there
    /// would be in a whole tile.
    heads: usize,
    present: usize,
    tile: usize,
}

impl Lists {
    pub(super) fn len(&self) -> usize {
        self.seen.len()
    }
}

impl Task<'_, '_> {
    /// Loads the queries of a tile, and their weights.
    pub(super) fn gather(&mut self, kv_heads: Range<usize>, queries: Range<usize>) -> Lists {
        let layout = self.plan.layout;
        let group = layout.q_heads / layout.kv_heads.max(1);
        let heads = kv_heads.start * group..kv_heads.end * group;
        let rows = if layout.per == Per::Head { 1 } else { heads.len().max(1) };
        let (len, keys) = (self.sequence.queries.len(), self.sequence.keys.len());
        let present = queries.start.min(len)..queries.end.min(len);
        let (mut seen, apart) = (Vec::new(), heads.len() / rows);
        for list in heads.step_by(rows) {
            for query in present.clone() {
                for head in list..list + rows {
                    let at = seen.len() * rows + head - list;
                    self.load(head, query..query + 1, at);
                    let row = self.sequence.queries.start + query;
                    let weight =
                        |x: &AnyArray<'_>| x.rows(self.sequence.batch, head, &(row..row + 1)).at(0, 0);
                    let weight = self.source.weights.as_ref().map_or(1.0, weight);
                    self.scratch.weights[at] = weight;
                    if self.plan.dots.is_some() {
                        let apart = self.plan.apart;
                        let query = &mut self.scratch.queries[at * apart..][..apart];
                        encode(self.source.isa, query, self.plan.width, weight, self.scratch.room);
                    }
                }
                seen.push(self.scheme.seen(query, len, keys));
            }
        }
        Lists {
            kv_head: kv_heads.start,
            rows,
            seen,
            heads: apart,
            present: present.len(),
            tile: queries.len(),
        }
    }

    /// The scores of some candidates of each list, its first one in front.
    pub(super) fn score(&mut self, lists: &Lists, candidates: Range<usize>) {
        let Self { source, scheme, plan, made, sequence, scratch, .. } = self;
        let each = scheme.unit / scheme.cell();
        let most = lists.seen.iter().map(|&seen| scheme.scores(seen)).max().unwrap_or(0);
        let cells = (candidates.start * each).min(most)..(candidates.end * each).min(most);
        for (list, &seen) in lists.seen.iter().enumerate() {
            let [ranked, scored] = [scheme.ranked(seen), if each == 1 { scheme.scores(seen) } else { 0 }]
                .map(|n| n.min(candidates.end).saturating_sub(candidates.start));
            // The others are written once.
            scratch.folded[list * plan.row()..][scored.min(ranked)..ranked].fill(0.0);
        }
        if cells.is_empty() {
            return;
        }
        source.isa.dispatch(Fused {
            scheme,
            lists,
            queries: scratch.queries,
            width: plan.width,
            apart: plan.apart,
            dots: plan.dots,
            weights: scratch.weights,
            candidates: made.rows(source, sequence, lists.kv_head, cells.clone()),
            from: cells.start,
            each,
            room: scratch.room,
            tile: scratch.scores,
            out: scratch.folded,
            stride: plan.row(),
        });
    }

    /// Picks for each list, whose scores are `width` apart.
    pub(super) fn choose_each(&mut self, lists: &Lists, scores: Option<(&[f32], usize)>) {
        let Self { source, scheme, plan, scratch, found, .. } = self;
        let (scores, width) = scores.unwrap_or((scratch.folded, plan.row()));
        for head in 0..lists.heads {
            for list in head * lists.present..(head + 1) * lists.present {
                let seen = lists.seen[list];
                let scores = &scores[list * width..][..scheme.ranked(seen)];
                choose(scheme, source.isa, (scores, seen), scratch.bits, &mut scratch.pick, found);
            }
            for _ in lists.present..lists.tile {
                found.ends.push(found.candidates.len());
            }
        }
    }
}

/// A stretch of scored rows against all lists of a tile.
struct Fused<'a> {
    scheme: &'a Scheme,
    lists: &'a Lists,
    queries: &'a [f32],
    width: usize,
    apart: usize,
    dots: Option<Vnni>,
    weights: &'a [f32],
    candidates: Candidates<'a>,
    /// The number of the first, and how many a candidate has.
    from: usize,
    each: usize,
    room: &'a mut [f32],
    tile: &'a mut [f32],
    out: &'a mut [f32],
    stride: usize,
}

impl Kernel for Fused<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scheme, lists, queries, width, apart, dots, weights, candidates, .. } = self;
        let Self { from, each, room, tile, out, stride, .. } = self;
        let (n, rows) = (candidates.len(), lists.rows);
        let few = rows * lists.len() <= FEW;
        for first in (0..n).step_by(BLOCK) {
            let end = (first + BLOCK).min(n);
            if let Some(dots) = dots {
                let (held, panel) = room.split_at_mut(TABLE_ROWS * width);
                let words = words(width);
                let a = Rows::of_slice(queries, rows * lists.len(), words + BESIDE, apart);
                for at in (first..end).step_by(PANEL) {
                    let scales = &candidates.pack_codes(s, at..(at + PANEL).min(end), width, held, panel);
                    let (out, apart) = if each == 1 {
                        (&mut out[at..], stride)
                    } else {
                        (&mut tile[at - first..], rows * BLOCK)
                    };
                    dots.rectify(Rectified { a, each: rows, b: panel, scales, out, apart });
                }
                if each == 1 {
                    continue;
                }
            } else {
                Scores {
                    queries,
                    rows: rows * lists.len(),
                    width,
                    candidates: candidates.stretch(first..end),
                    few,
                    room: &mut *room,
                    out: &mut *tile,
                    stride: BLOCK,
                }
                .run(s);
            }
            for (list, &seen) in lists.seen.iter().enumerate() {
                let len = scheme.scores(seen).saturating_sub(from + first).min(end - first);
                let tile = &mut tile[list * rows * BLOCK..][..rows * BLOCK];
                if dots.is_none() && scheme.reduce.is_rectified() {
                    rectify(s, tile, &weights[list * rows..][..rows], len);
                }
                let out = &mut out[list * stride..][..stride];
                if each == 1 {
                    out[first..first + len].copy_from_slice(&tile[..len]);
                    continue;
                }
                let mut at = 0;
                while at < len {
                    let (candidate, within) = ((first + at) / each, (first + at) % each);
                    let part = &tile[at..(at + each - within).min(len)];
                    let most = largest(s, part);
                    let to = &mut out[candidate];
                    // NaN stays and comes through.
                    if within == 0 || most > *to || most.is_nan() {
                        *to = most;
                    }
                    at += part.len();
                }
            }
        }
    }
}

/// The sum of positive parts of rows, [`BLOCK`] apart, times weights, in the
/// first `len` columns of the first row.
#[inline(always)]
fn rectify<S: Simd>(s: S, rows: &mut [f32], weights: &[f32], len: usize) {
    for at in (0..len).step_by(S::LANES) {
        let mut sum = s.splat(0.0);
        for (row, &weight) in rows.chunks(BLOCK).zip(weights) {
            // NaN comes through.
            let positive = s.max(s.splat(0.0), s.load(&row[at..]));
            sum = s.mul_add(positive, s.splat(weight), sum);
        }
        s.store(&mut rows[at..], sum);
    }
}

/// The largest of some numbers, NaN if one is.
#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut most = s.splat(f32::NEG_INFINITY);
    let mut numbers = u64::MAX;
    for part in x.chunks(S::LANES) {
        let lanes = u64::MAX >> (64 - part.len());
        let x = s.select(s.mask(lanes), s.load_tail(part), s.splat(f32::NEG_INFINITY));
        numbers &= s.bits(s.lt(x, s.splat(f32::INFINITY))) | s.bits(s.lt(s.splat(f32::MAX), x)) | !lanes;
        most = s.max(x, most);
    }
    if numbers == u64::MAX { s.reduce_max(most) } else { f32::NAN }
}
