//! Scores of a tile of queries with a tile of keys: where they are computed,
//! which of them, and how they become final.
//!
//! Rows come in groups of [`TILE_ROWS`]; a group computes only the span of
//! keys that its mask bits leave.

use std::ops::Range;

use ndarray::s;

use crate::engine::call::{Call, set_ones};
use crate::engine::row::mask_row;
use crate::input::{Sequence, Site};
use crate::keys::plan::{ATOM, Keys, Run};
use crate::mask::{Block, Coverage};
use crate::score::{Seen, shift};
use crate::simd::amx::{self, Amx, Order, TileOp};
use crate::simd::dots::{BESIDE, CodeProduct};
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

/// Columns of queries and keys that are multiplied at once.
const LONGEST_SUM: usize = 128;

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
    /// Query rows of a task, at most.
    pub(crate) query_tile: usize,
    /// Keys that a packed tile has room for.
    pub(crate) key_room: usize,
    /// Key tiles of a head that somebody sees, at most.
    pub(crate) key_tiles: usize,
    /// Where products are those of AMX tiles: all operands are then packed
    /// for them, as pairs of `bf16`.
    pub(crate) amx: Option<Amx>,
    /// Parts that queries, keys and values are split into for them.
    pub(crate) parts: usize,
    /// Pieces of a key tile, at most.
    pub(crate) pieces: usize,
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
            pieces: 1,
        }
    }

    /// The same for tiles that are joined from what a plan names.
    pub(crate) fn with_pieces(self, keys: Keys<'_>) -> Self {
        let pieces = match keys {
            Keys::Mask => return self,
            Keys::Blocks(_) => KEY_TILE / ATOM,
            Keys::Tokens(_) => KEY_TILE,
        };
        Self { pieces, ..self }
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

    /// TileOps of the products with keys, and of those with values for each
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
    /// Room for the bits of a piece, where pieces start anywhere.
    piece_bits: &'a mut [u64],
    /// [`PIECE`] numbers each.
    pieces: &'a mut [u64],
    pub(crate) spans: &'a mut [u32],
    /// With AMX, of each query whether it is huge.
    pub(crate) huge: &'a mut [u8],
    /// The same: room for the moves of its products.
    pub(crate) moves: &'a mut [TileOp],
}

pub(crate) const WORDS: usize = KEY_TILE / 64;
/// Blocks of rows that are under way at once with AMX.
pub(crate) const UNITS: usize = 3;

impl<'a> Scratch<'a> {
    fn sizes(g: &Geometry) -> [usize; 11] {
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
            if g.pieces > KEY_TILE / ATOM { g.query_tile * WORDS } else { 0 },
            g.pieces * PIECE,
            g.query_tile.div_ceil(TILE_ROWS) * 3,
            if g.amx.is_some() { g.query_tile } else { 0 },
            if g.amx.is_some() { g.moves() } else { 0 },
        ]
    }

    pub(crate) fn bytes(g: &Geometry) -> usize {
        let [q, s, o, m, l, b, piece_bits, pieces, p, huge, moves] = Self::sizes(g);
        bytes_for::<f32>(q)
            + bytes_for::<f32>(s)
            + bytes_for::<f32>(o)
            + bytes_for::<f32>(m)
            + bytes_for::<f32>(l)
            + bytes_for::<u64>(b)
            + bytes_for::<u64>(piece_bits)
            + bytes_for::<u64>(pieces)
            + bytes_for::<u32>(p)
            + bytes_for::<u8>(huge)
            + bytes_for::<TileOp>(moves)
    }

    pub(crate) fn take(arena: &mut Arena<'a>, g: &Geometry) -> Self {
        let [q, s, o, m, l, b, piece_bits, pieces, p, huge, moves] = Self::sizes(g);
        Self {
            queries: arena.take(q),
            scores: arena.take(s),
            out: arena.take(o),
            max: arena.take(m),
            sum: arena.take(l),
            bits: arena.take(b),
            piece_bits: arena.take(piece_bits),
            pieces: arena.take(pieces),
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

/// Finds out, pair by pair, what becomes of each key tile from `first` on for
/// some queries.
pub(crate) fn classify(
    call: &Call<'_>,
    site: &Site,
    queries: Range<usize>,
    first: usize,
    coverage: &mut [u8],
) {
    for (tile, coverage) in (first..).zip(coverage) {
        let keys = (tile * KEY_TILE).min(site.kv_len)..((tile + 1) * KEY_TILE).min(site.kv_len);
        let found = call.mask.scan(call.isa, &Block { site, queries: queries.clone(), keys });
        *coverage = COVERAGES.iter().position(|&c| c == found).unwrap_or(COVERAGES.len() - 1) as u8;
    }
}

/// The keys that some query of some heads may see, as far as the mask says.
pub(crate) fn hull(
    call: &Call<'_>,
    sequence: &Sequence,
    heads: Range<usize>,
    queries: Range<usize>,
) -> Range<usize> {
    if queries.is_empty() {
        return 0..0;
    }
    let mut union = sequence.keys.len()..0;
    for head in asked(call, heads) {
        let site = sequence.site(head);
        let hull = call.mask.hull(&site, queries.clone());
        if !hull.is_empty() {
            union = union.start.min(hull.start)..union.end.max(hull.end.min(site.kv_len));
        }
    }
    if union.start < union.end { union } else { 0..0 }
}

/// The heads for which a mask is asked: one where it says the same of all.
fn asked(call: &Call<'_>, heads: Range<usize>) -> Range<usize> {
    if call.mask.is_shared() { heads.start..heads.end.min(heads.start + 1) } else { heads }
}

/// Key tiles that hold some keys.
pub(crate) fn tiles_of(keys: &Range<usize>) -> Range<usize> {
    if keys.is_empty() { 0..0 } else { keys.start / KEY_TILE..keys.end.div_ceil(KEY_TILE) }
}

/// Neighbouring keys of a tile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The column of the tile that the first one takes.
    pub(crate) column: usize,
    /// Of the sequence.
    pub(crate) keys: Range<usize>,
}

/// Numbers that make up a [`Piece`].
const PIECE: usize = 3;

impl Piece {
    fn columns(&self) -> Range<usize> {
        self.column..self.column + self.keys.len()
    }
}

/// The keys that are scored next: columns of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyTile {
    /// Neighbouring keys, the `tile`-th [`KEY_TILE`] of the sequence. The plan
    /// decides pair by pair.
    Keys { tile: usize },
    /// Pieces that the plan names for every row.
    Pieces { count: usize },
    /// [Virtual](crate::engine::call::Virtual) keys from `first` on.
    Virtual { first: usize },
}

/// Where the packed keys and values of a tile are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// In the tile of this number, column by column.
    Tile(usize),
    /// Each atom where it lies in its sequence, of which tiles from this one
    /// on are packed.
    Atoms(usize),
}

/// Key tiles that are left, from the last one to the first: scores tend to be
/// highest near the end, by a mask or by biases, and a maximum that rises
/// means that all sums are scaled anew.
#[derive(Clone, Debug)]
pub(crate) enum Walk<'a> {
    /// Neighbouring keys.
    Tiles(Range<usize>),
    /// Atoms of a list, and which tiles of it.
    Atoms(&'a [u32], Range<usize>),
    /// Runs of a list, of which so many keys are left; of the last run so many
    /// have been taken.
    Runs { runs: &'a [Run], left: usize, taken: usize },
}

/// A row that visits a key tile: which atoms of it, in the highest bits, and the
/// number of the row. Rows that visit the same atoms sort next to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Visit {
    pub(crate) row: usize,
    /// A bit for each atom.
    pub(crate) atoms: u32,
}

impl Visit {
    const ROW_BITS: u32 = u32::BITS - (KEY_TILE / ATOM) as u32;
    /// Rows that have numbers.
    pub(crate) const ROWS: usize = 1 << Self::ROW_BITS;

    pub(crate) fn pack(self) -> u32 {
        self.atoms << Self::ROW_BITS | self.row as u32
    }

    #[inline(always)]
    pub(crate) fn unpack(x: u32) -> Self {
        Self { row: x as usize % Self::ROWS, atoms: x >> Self::ROW_BITS }
    }
}

/// A tile of query rows of one key/value head, to be scored with tiles of keys.
///
/// Rows are numbered query by query; the heads of a query are neighbours, so
/// that what a causal mask leaves of a tile stays narrow.
pub(crate) struct ScoreTile<'a, 'b, 'c> {
    pub(crate) call: &'a Call<'c>,
    pub(crate) g: Geometry,
    pub(crate) sequence: Sequence,
    pub(crate) kv_head: usize,
    /// Query heads whose rows take turns.
    pub(crate) heads: Range<usize>,
    pub(crate) rows: Range<usize>,
    /// Rows that do not follow each other, in place of these: each [`Visit`] one.
    pub(crate) list: Option<&'a [u32]>,
    /// What becomes of each key tile from some tile on, where that was found
    /// out before.
    pub(crate) coverage: Option<(&'a [u8], usize)>,
    /// The keys that are scored.
    pub(crate) keys: KeyTile,
    /// Columns that they take.
    pub(crate) len: usize,
    pub(crate) scratch: &'a mut Scratch<'b>,
}

impl<'a, 'b, 'c> ScoreTile<'a, 'b, 'c> {
    /// Rows of some query heads of one key/value head, at no keys yet.
    pub(crate) fn new(
        call: &'a Call<'c>,
        g: Geometry,
        sequence: Sequence,
        heads: Range<usize>,
        rows: Range<usize>,
        scratch: &'a mut Scratch<'b>,
    ) -> Self {
        let kv_head = heads.start.checked_div(call.group()).unwrap_or(0);
        let keys = KeyTile::Pieces { count: 0 };
        Self { call, g, sequence, kv_head, heads, rows, list: None, coverage: None, keys, len: 0, scratch }
    }

    /// The query head and the query of row `i` of the tile.
    #[inline(always)]
    pub(crate) fn place(&self, i: usize) -> (usize, usize) {
        let row = self.list.map_or(self.rows.start + i, |list| Visit::unpack(list[i]).row);
        match self.heads.len() {
            1 => (self.heads.start, row),
            heads => (self.heads.start + row % heads, row / heads),
        }
    }

    /// The queries that have rows in the tile.
    #[inline(always)]
    pub(crate) fn queries(&self) -> Range<usize> {
        let Some(list) = self.list else { return queries_of(&self.rows, self.heads.len()) };
        let queries = list.iter().map(|&x| Visit::unpack(x).row / self.heads.len());
        let (first, last) = queries.fold((usize::MAX, 0), |(a, b), query| (a.min(query), b.max(query)));
        first.min(last)..last + usize::from(!list.is_empty())
    }

    /// The queries whose rows of one of the heads are in the tile, and the
    /// first such row. The next ones are as many rows apart as there are heads.
    #[inline(always)]
    pub(crate) fn rows_of_head(&self, head: usize) -> (Range<usize>, usize) {
        rows_of_head(&self.rows, &self.heads, head)
    }

    /// Packs the queries.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(&mut self, s: S) {
        let (dim, heads) = (self.g.head_dim, self.heads.len());
        if let Some(list) = self.list {
            for i in 0..list.len() {
                let (head, query) = self.place(i);
                let row = self.call.query(&self.sequence, head, query);
                row.pack_rows(s, &mut self.scratch.queries[i * dim..], dim);
            }
            return;
        }
        for head in self.heads.clone() {
            let (queries, first) = self.rows_of_head(head);
            for (i, rows) in self.call.query_runs(&self.sequence, queries) {
                let rows = self.call.query_rows_of(&self.sequence, head, &rows);
                rows.pack_rows(s, &mut self.scratch.queries[(first + i * heads) * dim..], heads * dim);
            }
        }
    }

    /// The key tiles that may hold a visible key.
    #[inline(always)]
    pub(crate) fn key_tiles(&self) -> Range<usize> {
        tiles_of(&hull(self.call, &self.sequence, self.heads.clone(), self.queries()))
    }

    /// Goes through the keys of `within`, a range between tiles, that mask and
    /// plan may leave. All rows share a list.
    #[inline(always)]
    pub(crate) fn walk(&self, within: Range<usize>) -> Walk<'a> {
        let call = self.call;
        let hull = hull(call, &self.sequence, self.heads.clone(), self.queries());
        let hull = hull.start.max(within.start)..hull.end.min(within.end);
        let (sequence, head) = (self.sequence.index, self.heads.start);
        let block = call.keys.q_block().map_or(0, |q_block| self.queries().start / q_block);
        match call.keys {
            Keys::Mask => Walk::Tiles(tiles_of(&hull)),
            Keys::Blocks(lists) => {
                // Tiles are counted from the first atom of the list, whatever
                // the mask leaves: which keys share a tile depends on it alone.
                let atoms = lists.atoms(sequence, head, block);
                let start = atoms.partition_point(|&atom| (atom as usize + 1) * ATOM <= hull.start);
                let end = atoms.partition_point(|&atom| atom as usize * ATOM < hull.end);
                let each = KEY_TILE / ATOM;
                Walk::Atoms(atoms, if start < end { start / each..end.div_ceil(each) } else { 0..0 })
            }
            Keys::Tokens(lists) => {
                let runs = lists.runs(sequence, head, block);
                Walk::Runs { runs, left: lists.keys(sequence, head, block), taken: 0 }
            }
        }
    }

    /// Goes to the next key tile.
    #[inline(always)]
    pub(crate) fn next(&mut self, walk: &mut Walk<'_>) -> bool {
        match walk {
            Walk::Tiles(tiles) => match tiles.next_back() {
                Some(tile) => self.set_tile(tile),
                None => return false,
            },
            Walk::Atoms(atoms, tiles) => {
                let Some(tile) = tiles.next_back() else { return false };
                const EACH: usize = KEY_TILE / ATOM;
                let atoms = &atoms[tile * EACH..atoms.len().min((tile + 1) * EACH)];
                let kv_len = self.sequence.keys.len();
                self.len = 0;
                for (i, &atom) in atoms.iter().enumerate() {
                    let keys = atom as usize * ATOM..((atom as usize + 1) * ATOM).min(kv_len);
                    self.len = i * ATOM + keys.len();
                    self.put(i, &Piece { column: i * ATOM, keys });
                }
                self.keys = KeyTile::Pieces { count: atoms.len() };
            }
            Walk::Runs { runs, left, taken } => {
                if *left == 0 {
                    return false;
                }
                // As many as are over in the last tile, whole tiles before.
                self.len = (*left - 1) % KEY_TILE + 1;
                *left -= self.len;
                let (mut count, mut column) = (0, self.len);
                while column > 0 {
                    let Some((last, before)) = runs.split_last() else { break };
                    let keys = last.range();
                    let keys = keys.start..keys.end - *taken;
                    let more = keys.len().min(column);
                    column -= more;
                    self.put(count, &Piece { column, keys: keys.end - more..keys.end });
                    count += 1;
                    *taken += more;
                    if more == keys.len() {
                        (*runs, *taken) = (before, 0);
                    }
                }
                self.keys = KeyTile::Pieces { count };
            }
        }
        true
    }

    /// Goes to a tile of neighbouring keys.
    #[inline(always)]
    pub(crate) fn set_tile(&mut self, tile: usize) {
        self.keys = KeyTile::Keys { tile };
        self.len = self.tile_keys(tile).len();
    }

    /// The keys of a tile.
    #[inline(always)]
    pub(crate) fn tile_keys(&self, tile: usize) -> Range<usize> {
        tile * KEY_TILE..((tile + 1) * KEY_TILE).min(self.sequence.keys.len())
    }

    fn put(&mut self, i: usize, piece: &Piece) {
        let numbers = [piece.column, piece.keys.start, piece.keys.end].map(|x| x as u64);
        self.scratch.pieces[i * PIECE..][..PIECE].copy_from_slice(&numbers);
    }

    /// Pieces of the tile: none of virtual keys.
    #[inline(always)]
    pub(crate) fn pieces(&self) -> usize {
        match self.keys {
            KeyTile::Keys { .. } => 1,
            KeyTile::Pieces { count } => count,
            KeyTile::Virtual { .. } => 0,
        }
    }

    /// One of them.
    #[inline(always)]
    pub(crate) fn piece(&self, i: usize) -> Piece {
        if let KeyTile::Keys { tile } = self.keys {
            return Piece { column: 0, keys: self.tile_keys(tile) };
        }
        let x = &self.scratch.pieces[i * PIECE..][..PIECE];
        Piece { column: x[0] as usize, keys: x[1] as usize..x[2] as usize }
    }

    /// The rows of the tile, a block at a time.
    #[inline(always)]
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let n = self.rows.len();
        (0..n).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(n))
    }

    /// What the mask leaves of a piece.
    fn coverage_of(&self, piece: &Piece) -> Coverage {
        if let (KeyTile::Keys { tile }, Some((known, first))) = (self.keys, self.coverage) {
            return COVERAGES[usize::from(known[tile - first])];
        }
        let mut union = None;
        for head in asked(self.call, self.heads.clone()) {
            let site = self.sequence.site(head);
            let found = self.call.mask.coverage(&site, self.queries(), piece.keys.clone());
            if union.is_some_and(|union| union != found) {
                return Coverage::Partial;
            }
            union = Some(found);
        }
        union.unwrap_or(Coverage::Empty)
    }

    /// Writes the mask's bits of a piece, `WORDS` a row, from word `at` on.
    fn fill(&mut self, piece: &Piece, at: usize, apart: bool) {
        let heads = self.heads.len();
        let mut fill = |head: usize, queries: Range<usize>, first: usize| {
            if queries.is_empty() {
                return;
            }
            let site = self.sequence.site(head);
            let block = Block { site: &site, queries, keys: piece.keys.clone() };
            let bits = if apart { &mut *self.scratch.piece_bits } else { &mut *self.scratch.bits };
            self.call.mask.fill_bits(self.call.isa, &block, &mut bits[first * WORDS + at..], heads * WORDS);
        };
        if let Some(list) = self.list {
            for (i, &visit) in list.iter().enumerate() {
                let row = Visit::unpack(visit).row;
                fill(self.heads.start + row % heads, row / heads..row / heads + 1, i);
            }
            return;
        }
        for head in self.heads.clone() {
            let (queries, first) = rows_of_head(&self.rows, &self.heads, head);
            fill(head, queries, first);
        }
    }

    /// Bits of rows that see all of some columns.
    fn fill_ones(&mut self, columns: Range<usize>) {
        for row in self.scratch.bits.chunks_mut(WORDS).take(self.rows.len()) {
            set_ones(row, columns.clone());
        }
    }

    /// What mask and plan leave of the tile; the bits where that is
    /// [`Coverage::Partial`].
    fn visible(&mut self) -> Coverage {
        let n = self.rows.len();
        let whole = match self.keys {
            KeyTile::Virtual { first } => return self.visible_virtual(first),
            // One list names all pieces.
            KeyTile::Pieces { .. } => true,
            KeyTile::Keys { .. } => matches!(self.call.keys, Keys::Mask),
        };
        if let (KeyTile::Keys { tile }, None) = (self.keys, self.list)
            && !self.is_listed(tile)
        {
            return Coverage::Empty;
        }
        let count = self.pieces();
        let first = if count > 0 { self.coverage_of(&self.piece(0)) } else { Coverage::Empty };
        if count == 1 && first == Coverage::Empty {
            return first;
        }
        let same =
            (1..count).all(|i| first != Coverage::Partial && self.coverage_of(&self.piece(i)) == first);
        if whole && same && first != Coverage::Partial {
            return first;
        }
        // Rows that visit all atoms come last.
        let all = (1 << self.len.div_ceil(ATOM)) - 1;
        let visit_all = |list: &[u32]| list.first().is_some_and(|&x| Visit::unpack(x).atoms == all);
        if first == Coverage::Full && self.list.is_some_and(visit_all) {
            return first;
        }
        let words = self.len.div_ceil(64);
        let apart = !self.scratch.piece_bits.is_empty();
        if count > 1 || apart {
            self.scratch.bits[..n * WORDS].fill(0);
        }
        for i in 0..count {
            let piece = self.piece(i);
            let found = if same || count == 1 { first } else { self.coverage_of(&piece) };
            match found {
                Coverage::Empty => {}
                Coverage::Full => {
                    if count == 1 {
                        self.scratch.bits[..n * WORDS].fill(0);
                    }
                    self.fill_ones(piece.columns());
                }
                // Pieces then start at whole words.
                Coverage::Partial if !apart => self.fill(&piece, piece.column / 64, false),
                Coverage::Partial => {
                    self.fill(&piece, 0, true);
                    let Scratch { bits, piece_bits, .. } = &mut *self.scratch;
                    for (to, from) in bits.chunks_mut(WORDS).zip(piece_bits.chunks(WORDS)).take(n) {
                        shift_in(to, &from[..piece.keys.len().div_ceil(64)], piece.column);
                    }
                }
            }
        }
        if let (false, KeyTile::Keys { tile }) = (whole, self.keys) {
            for i in 0..n {
                if let Some(list) = self.list {
                    let atoms = Visit::unpack(list[i]).atoms;
                    for w in (0..words).filter(|w| atoms >> w & 1 == 0) {
                        self.scratch.bits[i * WORDS + w] = 0;
                    }
                    continue;
                }
                let (head, query) = self.place(i);
                let site = self.sequence.site(head);
                for w in 0..words {
                    let listed = self.call.keys.bits(&site, query, tile * KEY_TILE + w * 64);
                    self.scratch.bits[i * WORDS + w] &= listed;
                }
            }
        }
        Coverage::Partial
    }

    /// Whether the plan may name some key of a tile for some row.
    fn is_listed(&self, tile: usize) -> bool {
        let Some(q_block) = self.call.keys.q_block() else { return true };
        let (queries, keys) = (self.queries(), self.tile_keys(tile));
        let heads = if self.call.keys.is_per_head() {
            self.heads.clone()
        } else {
            self.heads.start..self.heads.start + 1
        };
        let blocks = queries.start / q_block..queries.end.div_ceil(q_block);
        heads.into_iter().any(|head| {
            let site = self.sequence.site(head);
            blocks.clone().any(|block| {
                keys.clone().step_by(ATOM).any(|key| self.call.keys.bits(&site, block * q_block, key) != 0)
            })
        })
    }

    /// [`visible`](Self::visible) of virtual keys.
    fn visible_virtual(&mut self, first: usize) -> Coverage {
        let Some(extra) = self.call.extra else { return Coverage::Empty };
        let (mut some, mut all) = (false, true);
        for i in 0..self.rows.len() {
            let (head, query) = self.place(i);
            let position = self.sequence.site(head).position(extra.q_start, query);
            let row = &mut self.scratch.bits[i * WORDS..][..WORDS];
            row.fill(0);
            extra.seen.fill(position, first, self.len, row);
            let count = row.iter().map(|word| word.count_ones() as usize).sum::<usize>();
            (some, all) = (some | (count > 0), all & (count == self.len));
        }
        match (some, all) {
            (false, _) => Coverage::Empty,
            (true, true) => Coverage::Full,
            (true, false) => Coverage::Partial,
        }
    }

    /// Finds the span of each group in the tile. False if nothing is visible.
    #[inline(always)]
    pub(crate) fn plan(&mut self) -> bool {
        let (n, len) = (self.rows.len(), self.len);
        let visible = self.visible();
        let Scratch { bits, spans, .. } = &mut *self.scratch;
        match visible {
            Coverage::Empty => return false,
            Coverage::Full => {
                for group in 0..n.div_ceil(TILE_ROWS) {
                    Span { start: 0, end: len, holes: false }.put(spans, group);
                }
                return true;
            }
            Coverage::Partial => {}
        }
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

    /// Where in the packed keys the panel of a column lies.
    #[inline(always)]
    fn panel(&self, stored: Stored, column: usize) -> usize {
        let g = self.g;
        let (tile, within) = self.stored_at(stored, column);
        // Of what is not packed nothing is read.
        tile.wrapping_mul(g.packed_keys()).wrapping_add(within * g.head_dim)
    }

    /// The packed tile in which a column is, and which of its keys it is.
    #[inline(always)]
    pub(crate) fn stored_at(&self, stored: Stored, column: usize) -> (usize, usize) {
        match stored {
            Stored::Tile(tile) => (tile, column),
            Stored::Atoms(first) => {
                let key = self.piece(column / ATOM).keys.start + column % ATOM;
                ((key / KEY_TILE).wrapping_sub(first), key % KEY_TILE)
            }
        }
    }

    /// Dot products of a block of rows with the packed keys of the tile.
    #[inline(always)]
    pub(crate) fn score<S: Simd>(&mut self, s: S, keys: &[f32], stored: Stored, rows: Range<usize>) {
        let (g, len, dots) = (self.g, self.len, self.call.dots);
        let groups = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        for first in (0..len).step_by(g.panel) {
            let width = (len - first).min(g.panel).next_multiple_of(S::LANES);
            let at = self.panel(stored, first);
            let Scratch { queries, scores, spans, .. } = &mut *self.scratch;
            let queries =
                Rows::of_slice(&queries[rows.start * g.head_dim..], rows.len(), g.head_dim, g.head_dim);
            let needed = |group| !Span::get(spans, group).within(&(first..first + width)).is_empty();
            runs(groups.clone(), rows.len(), needed, |rows_needed, needed| {
                if !needed {
                    return;
                }
                let panel = Rows::of_slice(&keys[at..], g.head_dim, width, g.panel);
                let to = &mut scores[rows_needed.start * KEY_TILE + first..];
                if let Some(dots) = dots {
                    let a = queries.part(rows_needed, 0..g.head_dim);
                    return dots.multiply(CodeProduct { a, b: panel, c: to, ldc: KEY_TILE });
                }
                // Shorter sums lose less to rounding than a long one, and parts of
                // a panel stay in the first-level cache.
                let sums = if g.head_dim < 64 { 1 } else { g.head_dim.div_ceil(LONGEST_SUM).max(2) };
                for i in 0..sums {
                    let end = if i + 1 == sums { g.head_dim } else { g.head_dim / sums * (i + 1) / 4 * 4 };
                    let part = g.head_dim / sums * i / 4 * 4..end;
                    s.vectorize(Product {
                        a: queries.part(rows_needed.clone(), part.clone()),
                        b: panel.part(part.clone(), 0..width),
                        c: &mut *to,
                        ldc: KEY_TILE,
                        update: if part.start == 0 { Update::Set } else { Update::Add },
                    });
                }
            });
        }
    }

    /// [`Call::saturate`] for the scores of row `i` with the packed keys of a
    /// tile, from element `at` of the scratch on.
    pub(crate) fn saturate(&mut self, keys: &[f32], stored: Stored, i: usize, at: usize) {
        let (g, span) = (self.g, Span::get(self.scratch.spans, i / TILE_ROWS));
        // Of codes the scale alone is a number.
        let numbers =
            if self.call.dots.is_some() { g.head_dim - BESIDE..g.head_dim - 1 } else { 0..g.head_dim };
        let query = &self.scratch.queries[i * g.head_dim..][numbers.clone()];
        if !query.iter().all(|x| x.is_finite()) {
            return;
        }
        let place = self.place(i);
        for key in span.start..span.end {
            let first = self.panel(stored, key / g.panel * g.panel) + key % g.panel;
            let finite = |_| numbers.clone().all(|c| keys[first + c * g.panel].is_finite());
            let score = std::slice::from_mut(&mut self.scratch.scores[at + key]);
            self.call.saturate(&self.sequence, place, score, finite);
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
        part: &Range<usize>,
        i: usize,
        at: usize,
    ) -> Option<(f32, Range<usize>)> {
        let span = Span::get(self.scratch.spans, i / TILE_ROWS);
        let columns = span.within(part);
        if columns.is_empty() {
            return None;
        }
        let seen = columns.start - part.start..columns.end - part.start;
        let whole = seen.start / S::LANES * S::LANES..seen.end.next_multiple_of(S::LANES);
        let (head, query) = self.place(i);
        let site = self.sequence.site(head);
        let mut factor = 1.0;
        if let KeyTile::Virtual { first } = self.keys {
            factor = self.finish_virtual(&site, query, first, at, seen.clone());
        }
        for p in 0..self.pieces() {
            let piece = self.piece(p);
            let inside = columns.start.max(piece.columns().start)..columns.end.min(piece.columns().end);
            if !inside.is_empty() {
                let first = piece.keys.start + inside.start - piece.column;
                let row = &mut self.scratch.scores[at..][inside.start - part.start..inside.end - part.start];
                let words = &self.scratch.bits[i * WORDS..][..WORDS];
                let seen = span.holes.then_some(Seen { words, first: inside.start });
                factor = self.call.finish_scores(&self.sequence, &site, query, first, row, seen);
                if self.call.leaves_scores() {
                    break;
                }
            }
        }
        let row = &mut self.scratch.scores[at..][..part.len()];
        row[whole.start..seen.start].fill(f32::NEG_INFINITY);
        row[seen.end..whole.end].fill(f32::NEG_INFINITY);
        if span.holes {
            let bits = &self.scratch.bits[i * WORDS..][..WORDS];
            mask_row(s, &mut row[..whole.end], &bits[part.start / 64..]);
        }
        Some((factor, whole))
    }

    /// Makes the scores of virtual keys final, up to the factor that is
    /// returned.
    fn finish_virtual(
        &mut self,
        site: &Site,
        query: usize,
        first: usize,
        at: usize,
        seen: Range<usize>,
    ) -> f32 {
        if let Some(extra) = &self.call.extra {
            let scale = self.call.scale_of(&self.sequence, site.head, query);
            let keys = first + seen.start..first + seen.end;
            let logs = extra.log_weights.slice(s![self.sequence.slot, self.kv_head, keys]);
            for (score, log) in self.scratch.scores[at..][seen].iter_mut().zip(logs) {
                *score = shift(*score * scale, *log);
            }
        }
        1.0
    }

    /// Multiplies the weights of some columns of row `i` by the gains of
    /// their values.
    #[inline(always)]
    pub(crate) fn gain_weights(&mut self, i: usize, columns: Range<usize>, at: usize) {
        if self.call.gains.is_none() {
            return;
        }
        let (head, _) = self.place(i);
        for p in 0..self.pieces() {
            let piece = self.piece(p);
            let inside = columns.start.max(piece.columns().start)..columns.end.min(piece.columns().end);
            if !inside.is_empty() {
                let first = piece.keys.start + inside.start - piece.column;
                self.call.gain_weights(&self.sequence, head, first, &mut self.scratch.scores[at..][inside]);
            }
        }
    }
}

/// The queries whose rows of one of some heads are among `rows`, and the first such row.
fn rows_of_head(rows: &Range<usize>, heads: &Range<usize>, head: usize) -> (Range<usize>, usize) {
    let (count, member) = (heads.len(), head - heads.start);
    let first = (rows.start + count - 1 - member) / count;
    let end = (rows.end + count - 1 - member) / count;
    (first..end, (first * count + member).saturating_sub(rows.start))
}

/// The queries that have rows among `rows` of so many heads.
pub(crate) fn queries_of(rows: &Range<usize>, heads: usize) -> Range<usize> {
    rows.start / heads..rows.end.div_ceil(heads)
}

/// Adds bits from `column` on.
fn shift_in(words: &mut [u64], bits: &[u64], column: usize) {
    for (w, &x) in bits.iter().enumerate() {
        let (word, shift) = (column / 64 + w, column % 64);
        if x != 0 {
            words[word] |= x << shift;
            if shift > 0 && x >> (64 - shift) != 0 {
                words[word + 1] |= x >> (64 - shift);
            }
        }
    }
}
