//! Tiled online softmax over a key plan: many queries against many keys.
//!
//! Keys are packed once per key/value head into panels with keys in lanes,
//! values into panels of columns. A task is one tile of queries of one head:
//! it walks the key tiles that the mask leaves, scores them with the register
//! tile, turns scores into weights while they are near, and multiplies by
//! the values. Key tiles start at fixed multiples of [`KEY_TILE`], so a row's
//! bits depend on its own sequence alone: not on threads, batch or the rows
//! around it.
//!
//! Within a tile, rows come in groups of [`TILE_ROWS`]; a group computes only
//! the span of keys that its mask bits leave.

use std::ops::Range;

use ndarray::{ArrayViewMut3, ArrayViewMut4, Axis};

use crate::element::Element;
use crate::engine::call::{Call, Sequence};
use crate::engine::pack::{PackKeys, PackRows, PackValues, SLICE};
use crate::engine::parallel;
use crate::engine::row::{Figures, RowState, mask_row, visible_of_row, write_row};
use crate::engine::workspace::Workspace;
use crate::input::Site;
use crate::mask::{Coverage, Mask};
use crate::score::Score;
use crate::simd::mem::{Arena, OutRows, Parts, Rows, RowsMut, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::{Product, TILE_ROWS, Update};
use crate::simd::{Isa, Kernel, Simd};

/// Keys of a tile. Fixed, because sums are cut here.
pub(crate) const KEY_TILE: usize = 256;
/// Query rows of a task.
const QUERY_TILE: usize = 192;
/// Query rows whose scores are held at once.
const BLOCK: usize = 48;
/// Bytes of packed keys and values below which a thread packs them for itself.
const PRIVATE: usize = 512 << 10;
/// Bytes of packed keys and values that are shared at once.
const SHARED: usize = 64 << 20;

/// Sizes that follow from the call.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    head_dim: usize,
    value_dim: usize,
    /// Columns of the register tile.
    panel: usize,
    /// `value_dim` rounded up to vectors.
    out_cols: usize,
    /// Panels of value columns.
    value_panels: usize,
    /// Keys that a packed tile has room for.
    key_room: usize,
    /// Key tiles of the longest sequence.
    key_tiles: usize,
}

impl Geometry {
    fn new(isa: Isa, head_dim: usize, value_dim: usize, longest: usize) -> Self {
        let panel = isa.panel();
        Self {
            head_dim,
            value_dim,
            panel,
            out_cols: value_dim.next_multiple_of(isa.lanes()),
            value_panels: value_dim.div_ceil(panel),
            key_room: longest.next_multiple_of(panel).min(KEY_TILE),
            key_tiles: longest.div_ceil(KEY_TILE),
        }
    }

    fn packed_keys(&self) -> usize {
        self.key_room * self.head_dim
    }

    fn packed_values(&self) -> usize {
        self.value_panels * self.key_room * self.panel
    }

    fn slices(&self) -> usize {
        self.key_room.div_ceil(SLICE)
    }

    /// Bytes of the packed keys and values of one head of one sequence.
    fn unit_bytes(&self) -> usize {
        self.key_tiles
            * (bytes_for::<f32>(self.packed_keys())
                + bytes_for::<f32>(self.packed_values())
                + bytes_for::<u8>(self.slices()))
    }
}

/// The packed keys and values of one head of one sequence, tile by tile.
#[derive(Clone, Copy, Debug)]
struct Packed<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    finite: &'a [u8],
}

/// What one thread works in.
struct Scratch<'a> {
    queries: &'a mut [f32],
    scores: &'a mut [f32],
    out: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    bits: &'a mut [u64],
    spans: &'a mut [u32],
}

const WORDS: usize = KEY_TILE / 64;
const GROUPS: usize = QUERY_TILE / TILE_ROWS;

impl<'a> Scratch<'a> {
    fn sizes(g: &Geometry) -> [usize; 7] {
        [
            QUERY_TILE * g.head_dim,
            BLOCK * KEY_TILE,
            QUERY_TILE * g.out_cols,
            QUERY_TILE,
            QUERY_TILE,
            QUERY_TILE * WORDS,
            GROUPS * 3,
        ]
    }

    fn bytes(g: &Geometry) -> usize {
        let [q, s, o, m, l, b, p] = Self::sizes(g);
        bytes_for::<f32>(q)
            + bytes_for::<f32>(s)
            + bytes_for::<f32>(o)
            + bytes_for::<f32>(m)
            + bytes_for::<f32>(l)
            + bytes_for::<u64>(b)
            + bytes_for::<u32>(p)
    }

    fn take(arena: &mut Arena<'a>, g: &Geometry) -> Self {
        let [q, s, o, m, l, b, p] = Self::sizes(g);
        Self {
            queries: arena.take(q),
            scores: arena.take(s),
            out: arena.take(o),
            max: arena.take(m),
            sum: arena.take(l),
            bits: arena.take(b),
            spans: arena.take(p),
        }
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
    /// Query tiles of the longest sequence.
    query_tiles: usize,
    /// Rows of the output.
    rows: usize,
}

impl Plan {
    fn new<T: Element, M, F>(call: &Call<'_, T, M, F>) -> Self {
        let d = &call.dims;
        let (q_len, kv_len) = call.longest();
        let geometry = Geometry::new(call.isa, d.head_dim, d.value_dim, kv_len);
        let workers = parallel::threads();
        let units = d.batch * d.kv_heads;
        let unit = geometry.unit_bytes().max(1);
        Self {
            geometry,
            workers,
            units,
            private: unit <= PRIVATE && (workers == 1 || units >= 4 * workers),
            wave: (SHARED / unit).clamp(1, units.max(1)),
            query_tiles: q_len.div_ceil(QUERY_TILE),
            rows: call.out_rows(),
        }
    }

    fn share_bytes(&self) -> usize {
        Scratch::bytes(&self.geometry) + if self.private { self.geometry.unit_bytes() } else { 0 }
    }

    fn bytes(&self) -> usize {
        let pieces = self.wave * self.geometry.key_tiles;
        let packed = self.wave * self.geometry.unit_bytes() + 3 * bytes_for::<u64>(claim_words(pieces));
        2 * bytes_for::<u64>(claim_words(self.rows))
            + bytes_for_shares(self.workers, self.share_bytes())
            + if self.private { 0 } else { packed }
    }
}

/// Bytes of scratch that a call needs.
pub(crate) fn workspace_bytes<T: Element, M, F>(call: &Call<'_, T, M, F>) -> usize {
    Plan::new(call).bytes()
}

/// `out` and, if asked for, the natural logarithm of each row's sum of
/// exponentials `[batch, q_heads, q_len]`.
pub(crate) fn attend<T: Element, M: Mask, F: Score>(
    call: &Call<'_, T, M, F>,
    out: ArrayViewMut4<'_, T>,
    lse: Option<ArrayViewMut3<'_, f32>>,
    workspace: &mut Workspace,
) {
    let plan = Plan::new(call);
    let g = plan.geometry;
    let mut arena = workspace.arena(plan.bytes());
    let claims = arena.take(claim_words(plan.rows));
    let out = OutRows::new(out, claims);
    let claims = arena.take(claim_words(plan.rows));
    let lse = lse.map(|lse| OutRows::new(lse.insert_axis(Axis(3)), claims));
    let (heads, group) = (call.dims.kv_heads, call.group());

    // One tile of queries: (unit, head of the group, tile).
    let attend_tile = |scratch: &mut Scratch<'_>, packed: Packed<'_>, unit: usize, member: usize, tile: usize| {
        let sequence = call.sequence(unit / heads);
        let head = unit % heads * group + member;
        let start = tile * QUERY_TILE;
        let rows = start..(start + QUERY_TILE).min(sequence.queries.len());
        if rows.is_empty() {
            return;
        }
        let place = sequence.queries.start + rows.start..sequence.queries.start + rows.end;
        call.isa.dispatch(QueryTile {
            call,
            g,
            queries: call.queries(&sequence, head),
            site: sequence.site(head),
            rows,
            packed,
            scratch,
            out: out.take(sequence.batch, head, place.clone()),
            lse: lse.as_ref().map(|lse| lse.take(sequence.batch, head, place)),
        });
    };

    if plan.private {
        let shares = arena.shares(plan.workers, plan.share_bytes());
        let start = |worker| {
            let mut arena = shares.take(worker);
            let scratch = Scratch::take(&mut arena, &g);
            let packed = (
                arena.take::<f32>(g.key_tiles * g.packed_keys()),
                arena.take::<f32>(g.key_tiles * g.packed_values()),
                arena.take::<u8>(g.key_tiles * g.slices()),
            );
            (scratch, packed)
        };
        parallel::for_each(plan.workers, plan.units, start, |(scratch, (keys, values, finite)), unit| {
            let sequence = call.sequence(unit / heads);
            for tile in 0..sequence.keys.len().div_ceil(KEY_TILE) {
                pack_tile(
                    call,
                    &g,
                    &sequence,
                    unit % heads,
                    tile,
                    &mut keys[tile * g.packed_keys()..][..g.packed_keys()],
                    &mut values[tile * g.packed_values()..][..g.packed_values()],
                    &mut finite[tile * g.slices()..][..g.slices()],
                );
            }
            let packed = Packed { keys, values, finite };
            for member in 0..group {
                for tile in 0..plan.query_tiles {
                    attend_tile(scratch, packed, unit, member, tile);
                }
            }
        });
        return;
    }

    let pieces = plan.wave * g.key_tiles;
    let claims: [&mut [u64]; 3] = std::array::from_fn(|_| arena.take(claim_words(pieces)));
    let keys = arena.take::<f32>(pieces * g.packed_keys());
    let values = arena.take::<f32>(pieces * g.packed_values());
    let finite = arena.take::<u8>(pieces * g.slices());
    let [key_claims, value_claims, finite_claims] = claims;
    for first in (0..plan.units).step_by(plan.wave) {
        let wave = plan.wave.min(plan.units - first);
        {
            let keys = Parts::new(keys, g.packed_keys(), key_claims);
            let values = Parts::new(values, g.packed_values(), value_claims);
            let finite = Parts::new(finite, g.slices(), finite_claims);
            parallel::for_each(plan.workers, wave * g.key_tiles, |_| (), |(), piece| {
                let (unit, tile) = (first + piece / g.key_tiles, piece % g.key_tiles);
                let sequence = call.sequence(unit / heads);
                if tile * KEY_TILE < sequence.keys.len() {
                    let (keys, values, finite) = (keys.take(piece), values.take(piece), finite.take(piece));
                    pack_tile(call, &g, &sequence, unit % heads, tile, keys, values, finite);
                }
            });
        }
        let mut arena = arena.reborrow();
        let shares = arena.shares(plan.workers, plan.share_bytes());
        let start = |worker: usize| Scratch::take(&mut shares.take(worker), &g);
        // Late query tiles first: under a causal mask they are the largest.
        let tasks = wave * group * plan.query_tiles;
        parallel::for_each(plan.workers, tasks, start, |scratch, task| {
            let (tile, unit, member) = (task / (wave * group), task / group % wave, task % group);
            let packed = Packed {
                keys: &keys[unit * g.key_tiles * g.packed_keys()..],
                values: &values[unit * g.key_tiles * g.packed_values()..],
                finite: &finite[unit * g.key_tiles * g.slices()..],
            };
            attend_tile(scratch, packed, first + unit, member, plan.query_tiles - 1 - tile);
        });
    }
}

/// Packs one tile of keys and values of one head.
#[expect(clippy::too_many_arguments, reason = "three outputs and where they come from")]
fn pack_tile<T: Element, M, F>(
    call: &Call<'_, T, M, F>,
    g: &Geometry,
    sequence: &Sequence,
    kv_head: usize,
    tile: usize,
    keys: &mut [f32],
    values: &mut [f32],
    finite: &mut [u8],
) {
    let range = tile * KEY_TILE..((tile + 1) * KEY_TILE).min(sequence.keys.len());
    let from = call.keys(sequence, kv_head).part(range.clone(), 0..g.head_dim);
    call.isa.dispatch(PackKeys { from, to: keys });
    let from = call.values(sequence, kv_head).part(range, 0..g.value_dim);
    call.isa.dispatch(PackValues { from, to: values, stride: g.key_room, finite });
}

/// One tile of queries of one head against all its keys.
struct QueryTile<'a, 'b, 'c, T, M, F> {
    call: &'a Call<'c, T, M, F>,
    g: Geometry,
    queries: Rows<'a, T>,
    site: Site,
    rows: Range<usize>,
    packed: Packed<'a>,
    scratch: &'a mut Scratch<'b>,
    out: RowsMut<'a, T>,
    lse: Option<RowsMut<'a, f32>>,
}

/// The keys that a group of rows looks at in a key tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: usize,
    end: usize,
    /// Whether some pair inside is masked.
    holes: bool,
}

impl Span {
    fn get(spans: &[u32], group: usize) -> Self {
        let x = &spans[3 * group..][..3];
        Self { start: x[0] as usize, end: x[1] as usize, holes: x[2] != 0 }
    }

    fn put(self, spans: &mut [u32], group: usize) {
        spans[3 * group..][..3].copy_from_slice(&[self.start as u32, self.end as u32, u32::from(self.holes)]);
    }

    /// What of it lies in a range.
    fn within(self, range: &Range<usize>) -> Range<usize> {
        self.start.max(range.start)..self.end.min(range.end)
    }
}

/// Splits groups into runs of neighbours whose `what` is equal, and calls
/// `then` with the rows and the value of each run. `rows` rows are left from
/// the first group on.
#[inline(always)]
fn runs<P: PartialEq + Clone>(
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

impl<T: Element, M: Mask, F: Score> Kernel for QueryTile<'_, '_, '_, T, M, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (g, n) = (self.g, self.rows.len());
        let from = self.queries.part(self.rows.clone(), 0..g.head_dim);
        s.vectorize(PackRows { from, to: self.scratch.queries });
        self.scratch.out[..n * g.out_cols].fill(0.0);
        let figures = self.call.norm.start(self.site.head);
        self.scratch.max[..n].fill(figures.max);
        self.scratch.sum[..n].fill(figures.sum);

        let hull = self.call.mask.hull(&self.site, self.rows.clone());
        let hull = hull.start..hull.end.min(self.site.kv_len);
        let mut tile = hull.start / KEY_TILE;
        while tile * KEY_TILE < hull.end {
            let keys = tile * KEY_TILE..((tile + 1) * KEY_TILE).min(self.site.kv_len);
            if self.plan(keys.clone()) {
                for start in (0..n).step_by(BLOCK) {
                    let rows = start..(start + BLOCK).min(n);
                    self.score(s, tile, keys.len(), rows.clone());
                    self.weigh(s, keys.clone(), rows.clone());
                    self.gather(s, tile, keys.len(), rows);
                }
            }
            tile += 1;
        }
        self.finish(s);
    }
}

impl<T: Element, M: Mask, F: Score> QueryTile<'_, '_, '_, T, M, F> {
    /// Finds the span of each group in a key tile. False if nothing is visible.
    #[inline(always)]
    fn plan(&mut self, keys: Range<usize>) -> bool {
        let (n, len) = (self.rows.len(), keys.len());
        let Scratch { bits, spans, .. } = &mut *self.scratch;
        match self.call.mask.coverage(&self.site, self.rows.clone(), keys.clone()) {
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
                    let valid = u64::MAX >> (64 - (len - 64 * w).min(64));
                    let x = self.call.mask.bits(&self.site, self.rows.start + i, keys.start + 64 * w) & valid;
                    bits[i * WORDS + w] = x;
                    some[w] |= x;
                    all[w] &= x;
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

    /// Scores of a block of rows with the keys of a tile.
    #[inline(always)]
    fn score<S: Simd>(&mut self, s: S, tile: usize, len: usize, rows: Range<usize>) {
        let g = self.g;
        let Scratch { queries, scores, spans, .. } = &mut *self.scratch;
        let queries = Rows::of_slice(&queries[rows.start * g.head_dim..], rows.len(), g.head_dim, g.head_dim);
        let keys = &self.packed.keys[tile * g.packed_keys()..][..g.packed_keys()];
        let groups = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        for first in (0..len).step_by(g.panel) {
            let width = (len - first).min(g.panel).next_multiple_of(S::LANES);
            let panel = Rows::of_slice(&keys[first * g.head_dim..], g.head_dim, width, g.panel);
            let needed = |group| !Span::get(spans, group).within(&(first..first + width)).is_empty();
            runs(groups.clone(), rows.len(), needed, |rows, needed| {
                if needed {
                    s.vectorize(Product {
                        a: queries.part(rows.clone(), 0..g.head_dim),
                        b: panel,
                        c: &mut scores[rows.start * KEY_TILE + first..],
                        ldc: KEY_TILE,
                        update: Update::Set,
                    });
                }
            });
        }
    }

    /// Turns scores into weights, row by row.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, s: S, keys: Range<usize>, rows: Range<usize>) {
        let finite = &self.packed.finite[keys.start / KEY_TILE * self.g.slices()..][..self.g.slices()];
        let all_finite = finite.iter().all(|&f| f != 0);
        for i in rows.clone() {
            let span = Span::get(self.scratch.spans, i / TILE_ROWS);
            if span.start == span.end {
                continue;
            }
            let row = &mut self.scratch.scores[(i - rows.start) * KEY_TILE..][..KEY_TILE];
            let words = &mut self.scratch.bits[i * WORDS..][..WORDS];
            let (low, high) = (span.start / S::LANES * S::LANES, span.end.next_multiple_of(S::LANES));
            let query = self.rows.start + i;
            let visible = &mut row[span.start..span.end];
            let factor = self.call.finish_scores(s, &self.site, query, keys.start + span.start, visible);
            row[low..span.start].fill(f32::NEG_INFINITY);
            row[span.end..high].fill(f32::NEG_INFINITY);
            if span.holes {
                mask_row(s, &mut row[..high], words);
            }
            if !all_finite {
                // What scores -inf is masked: its value must not matter.
                visible_of_row(s, &row[..high], words);
            }
            let mut figures = Figures { max: self.scratch.max[i], sum: self.scratch.sum[i] };
            let out = &mut self.scratch.out[i * self.g.out_cols..][..self.g.out_cols];
            self.call.norm.weigh(s, &mut row[low..high], factor, &self.site, &mut figures, out);
            (self.scratch.max[i], self.scratch.sum[i]) = (figures.max, figures.sum);
        }
    }

    /// Adds weights times values to the output of a block of rows.
    #[inline(always)]
    fn gather<S: Simd>(&mut self, s: S, tile: usize, len: usize, rows: Range<usize>) {
        let g = self.g;
        let Scratch { scores, out, spans, bits, .. } = &mut *self.scratch;
        let weights = Rows::of_slice(scores, rows.len(), KEY_TILE, KEY_TILE);
        let values = &self.packed.values[tile * g.packed_values()..][..g.packed_values()];
        let groups = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        for (slice, first) in (0..len).step_by(SLICE).enumerate() {
            let range = first..(first + SLICE).min(len);
            let finite = self.packed.finite[tile * g.slices() + slice] != 0;
            let part = |group| Span::get(spans, group).within(&range);
            runs(groups.clone(), rows.len(), part, |run, keys| {
                if keys.is_empty() {
                    return;
                }
                for panel in 0..g.value_panels {
                    let col = panel * g.panel;
                    let width = (g.out_cols - col).min(g.panel);
                    let values = &values[panel * g.key_room * g.panel..];
                    let values = Rows::of_slice(values, g.key_room, width, g.panel).part(keys.clone(), 0..width);
                    let out = &mut out[(rows.start + run.start) * g.out_cols + col..];
                    if finite {
                        s.vectorize(Product {
                            a: weights.part(run.clone(), keys.clone()),
                            b: values,
                            c: out,
                            ldc: g.out_cols,
                            update: Update::Add,
                        });
                    } else {
                        for i in run.clone() {
                            let words = &bits[(rows.start + i) * WORDS..][..WORDS];
                            let out = &mut out[(i - run.start) * g.out_cols..][..width];
                            for (t, key) in keys.clone().enumerate() {
                                if words[key / 64] >> (key % 64) & 1 == 1 {
                                    add_row(s, weights.at(i, key), values.row(t).unwrap_or(&[]), out);
                                }
                            }
                        }
                    }
                }
            });
        }
    }

    /// Normalises and writes the rows.
    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S) {
        for i in 0..self.rows.len() {
            let figures = Figures { max: self.scratch.max[i], sum: self.scratch.sum[i] };
            let out = &mut self.scratch.out[i * self.g.out_cols..][..self.g.out_cols];
            write_row(s, self.call.norm, &RowState { figures, out }, &mut self.out, i);
            if let Some(lse) = &mut self.lse {
                lse.set(i, 0, figures.lse());
            }
        }
    }
}

/// `out += weight * row`
#[inline(always)]
fn add_row<S: Simd>(s: S, weight: f32, row: &[f32], out: &mut [f32]) {
    for j in (0..row.len()).step_by(S::LANES) {
        let x = s.mul_add(s.splat(weight), s.load(&row[j..]), s.load(&out[j..]));
        s.store(&mut out[j..], x);
    }
}
