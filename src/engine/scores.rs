//! Scores of a tile of queries with a tile of keys: where they are computed,
//! which of them, and how they become final.
//!
//! Rows come in groups of [`TILE_ROWS`]; a group computes only the span of
//! keys that its mask bits leave.

use std::ops::Range;

use crate::engine::call::Call;
use crate::engine::row::mask_row;
use crate::input::{Sequence, Site};
use crate::mask::{Block, Coverage};
use crate::score::Seen;
use crate::simd::amx::{self, Amx, Move, Order};
use crate::simd::mem::{Arena, Rows, bytes_for};
use crate::simd::pack::SLICE;
use crate::simd::tile::{Product, TILE_ROWS, Update};
use crate::simd::{Isa, Simd};

/// Keys of a tile. Fixed, because sums are cut here.
pub(crate) const KEY_TILE: usize = 256;
/// Query rows of a task, and with AMX up to twice as many.
pub(crate) const QUERY_TILE: usize = 192;
/// Query rows whose scores are held at once.
pub(crate) const BLOCK: usize = 48;

/// Sizes that follow from the call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) head_dim: usize,
    /// Columns of the register tile.
    pub(crate) panel: usize,
    /// `value_dim` rounded up to vectors.
    pub(crate) out_cols: usize,
    /// Panels of value columns.
    pub(crate) value_panels: usize,
    /// Query rows of a task.
    pub(crate) query_tile: usize,
    /// Keys that a packed tile has room for.
    pub(crate) key_room: usize,
    /// Key tiles of the longest sequence.
    pub(crate) key_tiles: usize,
    /// Where products are those of AMX tiles: all operands are then packed
    /// for them, as pairs of `bf16`.
    pub(crate) amx: Option<Amx>,
    /// Parts that queries, keys and values are split into for them.
    pub(crate) parts: usize,
}

impl Geometry {
    pub(crate) fn new(isa: Isa, head_dim: usize, value_dim: usize, longest: usize) -> Self {
        let panel = isa.panel();
        Self {
            head_dim,
            panel,
            out_cols: value_dim.next_multiple_of(isa.lanes()),
            value_panels: value_dim.div_ceil(panel),
            query_tile: QUERY_TILE,
            key_room: longest.next_multiple_of(panel).min(KEY_TILE),
            key_tiles: longest.div_ceil(KEY_TILE),
            amx: None,
            parts: 0,
        }
    }

    /// The same for AMX tiles, where the longest sequence has `q_len` queries.
    /// Tiles multiply so fast that keys and values have to be read less often:
    /// where there are tasks enough all the same, they are larger.
    pub(crate) fn with_amx(self, amx: Amx, call: &Call<'_>, q_len: usize) -> Self {
        const TASKS: usize = 16;
        let d = &call.dims;
        let tiles = q_len.div_ceil(2 * QUERY_TILE);
        let even = q_len.div_ceil(tiles.max(1)).next_multiple_of(amx::BLOCK);
        let many = d.batch * d.q_heads * tiles >= TASKS;
        Self {
            query_tile: if many { even } else { self.query_tile },
            out_cols: d.value_dim.next_multiple_of(amx::BLOCK),
            amx: Some(amx),
            parts: call.parts(),
            ..self
        }
    }

    /// Steps of a product of queries and keys with AMX tiles.
    pub(crate) fn key_steps(&self) -> usize {
        self.head_dim.div_ceil(amx::DEPTH)
    }

    /// Parts that the weights are split into for AMX tiles. Two keep 17 bits:
    /// what that may cost is 128 units of the error bound, which has twice
    /// `head_dim`. Three keep all.
    pub(crate) fn weight_parts(&self) -> usize {
        if self.parts < amx::MAX_PARTS && self.head_dim >= 64 { 2 } else { 3 }
    }

    /// How queries and keys are multiplied with AMX tiles.
    pub(crate) fn score_order(&self) -> &'static Order {
        Order::of_scores(self.parts)
    }

    /// How weights and values are multiplied with AMX tiles.
    pub(crate) fn value_order(&self) -> &'static Order {
        Order::of_values(self.weight_parts(), self.parts)
    }

    /// Moves of the products with keys, and of those with values for each
    /// number of steps that a slice may take.
    fn moves(&self) -> usize {
        let values = (1..=SLICE / amx::DEPTH).map(|steps| self.value_order().count(steps));
        self.score_order().count(self.key_steps()) + values.sum::<usize>()
    }

    /// `f32` that a row of scores with a slice of keys and then their weights
    /// in parts take up, with AMX.
    pub(crate) fn unit_row(&self) -> usize {
        SLICE / 2 * self.weight_parts()
    }

    /// The same for a block of rows.
    pub(crate) fn unit_scores(&self) -> usize {
        amx::BLOCK * self.unit_row()
    }

    /// `f32` that the packed keys of a slice take up, with AMX.
    pub(crate) fn slice_keys(&self) -> usize {
        SLICE / amx::TILE * self.key_steps() * self.parts * amx::TILE_LEN
    }

    /// The same of values.
    pub(crate) fn slice_values(&self) -> usize {
        SLICE / 2 * self.out_cols * self.parts
    }

    pub(crate) fn packed_keys(&self) -> usize {
        match self.amx {
            None => self.key_room * self.head_dim,
            Some(_) => self.key_room / amx::TILE * self.key_steps() * self.parts * amx::TILE_LEN,
        }
    }

    pub(crate) fn packed_values(&self) -> usize {
        match self.amx {
            None => self.value_panels * self.key_room * self.panel,
            Some(_) => self.slices() * self.slice_values(),
        }
    }

    pub(crate) fn slices(&self) -> usize {
        self.key_room.div_ceil(SLICE)
    }

    /// Bytes that say of the slices of a packed tile whether its values are
    /// as they should be, and with AMX of each key whether it is huge.
    pub(crate) fn flags(&self) -> usize {
        self.slices() + if self.amx.is_some() { self.key_room } else { 0 }
    }

    /// Bytes of the packed keys and values of one head of one sequence.
    pub(crate) fn unit_bytes(&self) -> usize {
        self.key_tiles
            * (bytes_for::<f32>(self.packed_keys())
                + bytes_for::<f32>(self.packed_values())
                + bytes_for::<u8>(self.flags()))
    }
}

/// What one thread works in.
pub(crate) struct Scratch<'a> {
    pub(crate) queries: &'a mut [f32],
    pub(crate) scores: &'a mut [f32],
    pub(crate) out: &'a mut [f32],
    pub(crate) max: &'a mut [f32],
    pub(crate) sum: &'a mut [f32],
    pub(crate) bits: &'a mut [u64],
    pub(crate) spans: &'a mut [u32],
    /// With AMX, of each query whether it is huge.
    pub(crate) huge: &'a mut [u8],
    /// The same: room for the moves of its products.
    pub(crate) moves: &'a mut [Move],
}

pub(crate) const WORDS: usize = KEY_TILE / 64;
/// Blocks of rows that are under way at once with AMX.
pub(crate) const UNITS: usize = 3;

impl<'a> Scratch<'a> {
    fn sizes(g: &Geometry) -> [usize; 9] {
        let queries = match g.amx {
            None => g.query_tile * g.head_dim,
            Some(_) => g.query_tile / amx::TILE * g.key_steps() * g.parts * amx::TILE_LEN,
        };
        let scores = match g.amx {
            None => BLOCK * KEY_TILE,
            Some(_) => UNITS * g.unit_scores(),
        };
        [
            queries,
            scores,
            g.query_tile * g.out_cols,
            g.query_tile,
            g.query_tile,
            g.query_tile * WORDS,
            g.query_tile.div_ceil(TILE_ROWS) * 3,
            if g.amx.is_some() { g.query_tile } else { 0 },
            if g.amx.is_some() { g.moves() } else { 0 },
        ]
    }

    pub(crate) fn bytes(g: &Geometry) -> usize {
        let [q, s, o, m, l, b, p, huge, moves] = Self::sizes(g);
        bytes_for::<f32>(q)
            + bytes_for::<f32>(s)
            + bytes_for::<f32>(o)
            + bytes_for::<f32>(m)
            + bytes_for::<f32>(l)
            + bytes_for::<u64>(b)
            + bytes_for::<u32>(p)
            + bytes_for::<u8>(huge)
            + bytes_for::<Move>(moves)
    }

    pub(crate) fn take(arena: &mut Arena<'a>, g: &Geometry) -> Self {
        let [q, s, o, m, l, b, p, huge, moves] = Self::sizes(g);
        Self {
            queries: arena.take(q),
            scores: arena.take(s),
            out: arena.take(o),
            max: arena.take(m),
            sum: arena.take(l),
            bits: arena.take(b),
            spans: arena.take(p),
            huge: arena.take(huge),
            moves: arena.take(moves),
        }
    }
}

/// The keys that a group of rows looks at in a key tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Whether some pair inside is masked.
    pub(crate) holes: bool,
}

impl Span {
    pub(crate) fn get(spans: &[u32], group: usize) -> Self {
        let x = &spans[3 * group..][..3];
        Self { start: x[0] as usize, end: x[1] as usize, holes: x[2] != 0 }
    }

    pub(crate) fn put(self, spans: &mut [u32], group: usize) {
        spans[3 * group..][..3].copy_from_slice(&[self.start as u32, self.end as u32, u32::from(self.holes)]);
    }

    /// What of it lies in a range.
    pub(crate) fn within(self, range: &Range<usize>) -> Range<usize> {
        self.start.max(range.start)..self.end.min(range.end)
    }
}

/// Splits groups into runs of neighbours whose `what` is equal, and calls
/// `then` with the rows and the value of each run. `rows` rows are left from
/// the first group on.
#[inline(always)]
pub(crate) fn runs<P: PartialEq + Clone>(
    groups: Range<usize>,
    rows: usize,
    what: impl Fn(usize) -> P,
    mut then: impl FnMut(Range<usize>, P),
) {
    let first = groups.start;
    let mut start = first;
    while start < groups.end {
        let value = what(start);
        let mut end = start + 1;
        while end < groups.end && what(end) == value {
            end += 1;
        }
        then((start - first) * TILE_ROWS..((end - first) * TILE_ROWS).min(rows), value);
        start = end;
    }
}

const COVERAGES: [Coverage; 3] = [Coverage::Empty, Coverage::Full, Coverage::Partial];

/// Finds out, pair by pair, what becomes of each key tile for some queries.
pub(crate) fn classify(call: &Call<'_>, site: &Site, queries: Range<usize>, coverage: &mut [u8]) {
    for (tile, coverage) in coverage.iter_mut().enumerate() {
        let keys = (tile * KEY_TILE).min(site.kv_len)..((tile + 1) * KEY_TILE).min(site.kv_len);
        let found = call.mask.scan(call.isa, &Block { site, queries: queries.clone(), keys });
        *coverage = COVERAGES.iter().position(|&c| c == found).unwrap_or(COVERAGES.len() - 1) as u8;
    }
}

/// A tile of queries of one head, to be scored with tiles of keys.
pub(crate) struct ScoreTile<'a, 'b, 'c> {
    pub(crate) call: &'a Call<'c>,
    pub(crate) g: Geometry,
    pub(crate) sequence: Sequence,
    pub(crate) site: Site,
    /// Queries of the sequence.
    pub(crate) rows: Range<usize>,
    /// What becomes of each key tile, where that was found out before.
    pub(crate) coverage: Option<&'a [u8]>,
    pub(crate) scratch: &'a mut Scratch<'b>,
}

impl ScoreTile<'_, '_, '_> {
    /// Packs the queries.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(&mut self, s: S) {
        let queries = self.call.queries(&self.sequence, self.site.head);
        queries.part(self.rows.clone()).pack_rows(s, self.scratch.queries, self.call.dims.head_dim);
    }

    /// The key tiles that may hold a visible key. Running sums go from the last one
    /// to the first: scores tend to be highest near the end, by a mask or by
    /// biases, and a maximum that rises means that all sums are scaled anew.
    #[inline(always)]
    pub(crate) fn key_tiles(&self) -> Range<usize> {
        let hull = self.call.mask.hull(&self.site, self.rows.clone());
        hull.start / KEY_TILE..hull.end.min(self.site.kv_len).div_ceil(KEY_TILE)
    }

    /// The keys of a tile.
    #[inline(always)]
    pub(crate) fn keys(&self, tile: usize) -> Range<usize> {
        tile * KEY_TILE..((tile + 1) * KEY_TILE).min(self.site.kv_len)
    }

    /// The rows of the tile, a block at a time.
    #[inline(always)]
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let n = self.rows.len();
        (0..n).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(n))
    }

    /// Finds the span of each group in a key tile. False if nothing is visible.
    #[inline(always)]
    pub(crate) fn plan(&mut self, keys: Range<usize>) -> bool {
        let (n, len) = (self.rows.len(), keys.len());
        let Scratch { bits, spans, .. } = &mut *self.scratch;
        let coverage = match self.coverage {
            Some(known) => COVERAGES[usize::from(known[keys.start / KEY_TILE])],
            None => self.call.mask.coverage(&self.site, self.rows.clone(), keys.clone()),
        };
        match coverage {
            Coverage::Empty => return false,
            Coverage::Full => {
                for group in 0..n.div_ceil(TILE_ROWS) {
                    Span { start: 0, end: len, holes: false }.put(spans, group);
                }
                return true;
            }
            Coverage::Partial => {}
        }
        let queries = self.rows.clone();
        let block = Block { site: &self.site, queries, keys: keys.clone() };
        self.call.mask.fill_bits(self.call.isa, &block, bits, WORDS);
        let mut any = false;
        for (group, rows) in (0..n).step_by(TILE_ROWS).map(|i| i..(i + TILE_ROWS).min(n)).enumerate() {
            let (mut some, mut all) = ([0; WORDS], [u64::MAX; WORDS]);
            for i in rows {
                for w in 0..len.div_ceil(64) {
                    some[w] |= bits[i * WORDS + w];
                    all[w] &= bits[i * WORDS + w];
                }
            }
            let first = some.iter().position(|&x| x != 0);
            let last = some.iter().rposition(|&x| x != 0);
            let mut span = Span { start: 0, end: 0, holes: false };
            if let (Some(first), Some(last)) = (first, last) {
                span.start = 64 * first + some[first].trailing_zeros() as usize;
                span.end = 64 * last + 64 - some[last].leading_zeros() as usize;
                let visible: u32 = all.iter().map(|x| x.count_ones()).sum();
                // Words of `all` past the last key are still ones.
                let unused = 64 * (WORDS - len.div_ceil(64)) as u32;
                span.holes = (visible - unused) as usize != span.end - span.start;
                any = true;
            }
            span.put(spans, group);
        }
        any
    }

    /// Dot products of a block of rows with the packed keys of a tile.
    #[inline(always)]
    pub(crate) fn score<S: Simd>(&mut self, s: S, keys: &[f32], len: usize, rows: Range<usize>) {
        let g = self.g;
        let Scratch { queries, scores, spans, .. } = &mut *self.scratch;
        let queries = Rows::of_slice(&queries[rows.start * g.head_dim..], rows.len(), g.head_dim, g.head_dim);
        let groups = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        for first in (0..len).step_by(g.panel) {
            let width = (len - first).min(g.panel).next_multiple_of(S::LANES);
            let panel = Rows::of_slice(&keys[first * g.head_dim..], g.head_dim, width, g.panel);
            let needed = |group| !Span::get(spans, group).within(&(first..first + width)).is_empty();
            runs(groups.clone(), rows.len(), needed, |rows, needed| {
                if !needed {
                    return;
                }
                // Two shorter sums lose less to rounding than a long one.
                let half = if g.head_dim < 64 { 0 } else { g.head_dim / 8 * 4 };
                let parts = [half..g.head_dim, 0..half];
                for part in parts.into_iter().rev().skip(usize::from(half == 0)) {
                    s.vectorize(Product {
                        a: queries.part(rows.clone(), part.clone()),
                        b: panel.part(part.clone(), 0..width),
                        c: &mut scores[rows.start * KEY_TILE + first..],
                        ldc: KEY_TILE,
                        update: if part.start == 0 { Update::Set } else { Update::Add },
                    });
                }
            });
        }
    }

    /// Makes the scores of row `i` of the tile with a part of the keys final,
    /// in place, from element `at` of the scratch on: changed, masked with
    /// -inf, up to the factor that is returned with the range of whole vectors
    /// that they take up. `None` if the row sees none of them. Parts start at
    /// multiples of 64 keys.
    #[inline(always)]
    pub(crate) fn finish_row<S: Simd>(
        &mut self,
        s: S,
        keys: &Range<usize>,
        part: &Range<usize>,
        i: usize,
        at: usize,
    ) -> Option<(f32, Range<usize>)> {
        let span = Span::get(self.scratch.spans, i / TILE_ROWS);
        let seen = span.within(part);
        if seen.is_empty() {
            return None;
        }
        let seen = seen.start - part.start..seen.end - part.start;
        let row = &mut self.scratch.scores[at..][..part.len()];
        let whole = seen.start / S::LANES * S::LANES..seen.end.next_multiple_of(S::LANES);
        let (query, first) = (self.rows.start + i, keys.start + part.start + seen.start);
        let inside = &mut row[seen.clone()];
        let words = &self.scratch.bits[i * WORDS..][..WORDS];
        let hidden = span.holes.then_some(Seen { words, first: part.start + seen.start });
        let factor = self.call.finish_scores(&self.sequence, &self.site, query, first, inside, hidden);
        row[whole.start..seen.start].fill(f32::NEG_INFINITY);
        row[seen.end..whole.end].fill(f32::NEG_INFINITY);
        if span.holes {
            let bits = &self.scratch.bits[i * WORDS..][..WORDS];
            mask_row(s, &mut row[..whole.end], &bits[part.start / 64..]);
        }
        Some((factor, whole))
    }
}
