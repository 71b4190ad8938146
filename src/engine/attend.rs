//! Tiled online softmax over a key plan: many queries against many keys.
//!
//! Keys are packed once per key/value head into panels with keys in lanes,
//! values into panels of columns. A task is one tile of queries of one head:
//! it walks the key tiles that the mask leaves, scores them with the register
//! tile, turns scores into weights while they are near, and multiplies by
//! the values. Key tiles start at fixed multiples of [`KEY_TILE`], so a row's
//! bits depend on its own sequence alone: not on threads, batch or the rows
//! around it.

use std::ops::Range;

use crate::engine::attend_amx::Pipeline;
use crate::engine::call::Call;
use crate::engine::row::{Figures, visible_of_row};
use crate::engine::scores::{Geometry, KEY_TILE, ScoreTile, Scratch, Span, WORDS, classify, runs};
use crate::engine::{Output, is_decode, parallel};
use crate::input::{Lengths, Sequence};
use crate::simd::any::{AnyRows, AnyRowsMut};
use crate::simd::mem::{Arena, Parts, Rows, RowsMut, bytes_for, bytes_for_shares, claim_words};
use crate::simd::pack::{SLICE, gather_visible};
use crate::simd::tile::{Product, TILE_ROWS, Update};
use crate::simd::{Kernel, Simd};

/// Bytes of packed keys and values below which a thread packs them for itself.
const PRIVATE: usize = 512 << 10;
/// Bytes of packed keys and values that are shared at once.
const SHARED: usize = 64 << 20;

/// The packed keys and values of one head of one sequence, tile by tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed<'a> {
    pub(crate) keys: &'a [f32],
    pub(crate) values: &'a [f32],
    /// [`Geometry::flags`]
    pub(crate) flags: &'a [u8],
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
    /// Sequences for which it is found out first what the mask leaves of each
    /// tile: none unless the mask cannot tell and says the same for every
    /// head, one where all sequences have the same lengths.
    scanned: usize,
}

impl Plan {
    fn new(call: &Call<'_>) -> Self {
        let d = &call.dims;
        let (q_len, kv_len) = call.longest(|sequence| !is_decode(call, sequence));
        let geometry = Geometry::new(call.isa, d.head_dim, d.value_dim, kv_len);
        let geometry = match call.amx() {
            Some(amx) => geometry.with_amx(amx, call, q_len),
            None => geometry,
        };
        let workers = parallel::threads();
        let units = d.batch * d.kv_heads;
        let unit = geometry.unit_bytes().max(1);
        Self {
            geometry,
            workers,
            units,
            private: unit <= PRIVATE && (workers == 1 || units >= 4 * workers),
            wave: (SHARED / unit).clamp(1, units.max(1)),
            query_tiles: q_len.div_ceil(geometry.query_tile),
            scanned: match call.x.lengths {
                _ if !(call.mask.is_opaque() && call.mask.is_shared()) => 0,
                Lengths::Full => d.batch.min(1),
                Lengths::Keys(_) | Lengths::Packed { .. } => d.batch,
            },
        }
    }

    fn share_bytes(&self) -> usize {
        Scratch::bytes(&self.geometry) + if self.private { self.geometry.unit_bytes() } else { 0 }
    }

    /// Tiles of the sequences that are scanned.
    fn coverage(&self) -> usize {
        self.scanned * self.query_tiles * self.geometry.key_tiles
    }

    fn bytes(&self) -> usize {
        let pieces = self.wave * self.geometry.key_tiles;
        let packed = self.wave * self.geometry.unit_bytes() + 3 * bytes_for::<u64>(claim_words(pieces));
        bytes_for_shares(self.workers, self.share_bytes())
            + bytes_for::<u8>(self.coverage())
            + bytes_for::<u64>(claim_words(self.scanned * self.query_tiles))
            + if self.private { 0 } else { packed }
    }
}

/// Bytes of scratch that a call needs.
pub(crate) fn workspace_bytes(call: &Call<'_>) -> usize {
    Plan::new(call).bytes()
}

/// Output and figures of a call.
pub(crate) fn attend(call: &Call<'_>, output: &Output<'_>, mut arena: Arena<'_>) {
    let plan = Plan::new(call);
    let g = plan.geometry;
    let (heads, group) = (call.dims.kv_heads, call.group());

    let query_rows = |sequence: &Sequence, tile: usize| {
        let start = (tile * g.query_tile).min(sequence.queries.len());
        start..(start + g.query_tile).min(sequence.queries.len())
    };

    let coverage = arena.take::<u8>(plan.coverage());
    let claims = arena.take(claim_words(plan.scanned * plan.query_tiles));
    {
        let parts = Parts::new(coverage, g.key_tiles, claims);
        parallel::for_each(
            plan.workers,
            plan.scanned * plan.query_tiles,
            |_| (),
            |(), i| {
                let sequence = call.sequence(i / plan.query_tiles);
                let (site, rows) = (sequence.site(0), query_rows(&sequence, i % plan.query_tiles));
                classify(call, &site, rows, parts.take(i));
            },
        );
    }
    let coverage = &*coverage;

    // One tile of queries: (unit, head of the group, tile).
    let attend_tile =
        |scratch: &mut Scratch<'_>, packed: Packed<'_>, unit: usize, member: usize, tile: usize| {
            let sequence = call.sequence(unit / heads);
            let head = unit % heads * group + member;
            let rows = query_rows(&sequence, tile);
            let known = sequence.index.min(plan.scanned.saturating_sub(1)) * plan.query_tiles + tile;
            let coverage = (plan.scanned > 0).then(|| &coverage[known * g.key_tiles..][..g.key_tiles]);
            if rows.is_empty() || is_decode(call, &sequence) {
                return;
            }
            let place = sequence.queries.start + rows.start..sequence.queries.start + rows.end;
            let batch = sequence.batch;
            let site = sequence.site(head);
            let tile = QueryTile {
                tile: ScoreTile { call, g, sequence, site, rows, coverage, scratch },
                packed,
                out: output.out.take(batch, head, place.clone()),
                figures: output.figures.as_ref().map(|x| x.take(batch, head, place)),
            };
            match g.amx {
                Some(amx) => amx.vectorize(Pipeline::new(amx, tile)),
                None => call.isa.dispatch(tile),
            }
        };

    if plan.private {
        let shares = arena.shares(plan.workers, plan.share_bytes());
        let start = |worker| {
            let mut arena = shares.take(worker);
            let scratch = Scratch::take(&mut arena, &g);
            let packed = (
                arena.take::<f32>(g.key_tiles * g.packed_keys()),
                arena.take::<f32>(g.key_tiles * g.packed_values()),
                arena.take::<u8>(g.key_tiles * g.flags()),
            );
            (scratch, packed)
        };
        parallel::for_each(plan.workers, plan.units, start, |(scratch, (keys, values, flags)), unit| {
            let sequence = call.sequence(unit / heads);
            if is_decode(call, &sequence) {
                return;
            }
            for tile in 0..sequence.keys.len().div_ceil(KEY_TILE) {
                pack_tile(
                    call,
                    &g,
                    &sequence,
                    unit % heads,
                    tile,
                    &mut keys[tile * g.packed_keys()..][..g.packed_keys()],
                    &mut values[tile * g.packed_values()..][..g.packed_values()],
                    &mut flags[tile * g.flags()..][..g.flags()],
                );
            }
            let packed = Packed { keys, values, flags };
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
    let flags = arena.take::<u8>(pieces * g.flags());
    let [key_claims, value_claims, flag_claims] = claims;
    for first in (0..plan.units).step_by(plan.wave) {
        let wave = plan.wave.min(plan.units - first);
        {
            let keys = Parts::new(keys, g.packed_keys(), key_claims);
            let values = Parts::new(values, g.packed_values(), value_claims);
            let flags = Parts::new(flags, g.flags(), flag_claims);
            parallel::for_each(
                plan.workers,
                wave * g.key_tiles,
                |_| (),
                |(), piece| {
                    let (unit, tile) = (first + piece / g.key_tiles, piece % g.key_tiles);
                    let sequence = call.sequence(unit / heads);
                    if tile * KEY_TILE < sequence.keys.len() && !is_decode(call, &sequence) {
                        let (keys, values, flags) = (keys.take(piece), values.take(piece), flags.take(piece));
                        pack_tile(call, &g, &sequence, unit % heads, tile, keys, values, flags);
                    }
                },
            );
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
                flags: &flags[unit * g.key_tiles * g.flags()..],
            };
            attend_tile(scratch, packed, first + unit, member, plan.query_tiles - 1 - tile);
        });
    }
}

/// Packs one tile of keys and values of one head.
#[expect(clippy::too_many_arguments, reason = "three outputs and where they come from")]
fn pack_tile(
    call: &Call<'_>,
    g: &Geometry,
    sequence: &Sequence,
    kv_head: usize,
    tile: usize,
    keys: &mut [f32],
    values: &mut [f32],
    flags: &mut [u8],
) {
    let range = tile * KEY_TILE..((tile + 1) * KEY_TILE).min(sequence.keys.len());
    struct PackTile<'a> {
        from: (AnyRows<'a>, AnyRows<'a>),
        to: (&'a mut [f32], &'a mut [f32]),
        stride: usize,
        finite: &'a mut [u8],
        huge: &'a mut [u8],
        amx: bool,
    }
    impl Kernel for PackTile<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            if self.amx {
                self.from.0.pack_key_pairs(s, self.to.0, self.huge);
                self.from.1.pack_value_pairs(s, self.to.1, self.finite);
                return;
            }
            self.from.0.pack_keys(s, self.to.0);
            self.from.1.pack_values(s, self.to.1, self.stride, self.finite);
        }
    }
    let from = (call.keys(sequence, kv_head).part(range.clone()), call.values(sequence, kv_head).part(range));
    let (finite, huge) = flags.split_at_mut(g.slices());
    let (to, amx) = ((keys, values), g.amx.is_some());
    call.isa.dispatch(PackTile { from, to, stride: g.key_room, finite, huge, amx });
}

/// One tile of queries of one head against all its keys.
pub(crate) struct QueryTile<'a, 'b, 'c> {
    pub(crate) tile: ScoreTile<'a, 'b, 'c>,
    pub(crate) packed: Packed<'a>,
    out: AnyRowsMut<'a>,
    figures: Option<RowsMut<'a, f32>>,
}

impl Kernel for QueryTile<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let g = self.tile.g;
        self.tile.load(s);
        self.start();
        for tile in self.tile.key_tiles().rev() {
            let keys = self.tile.keys(tile);
            if self.tile.plan(keys.clone()) {
                for rows in self.tile.blocks() {
                    let packed = &self.packed.keys[tile * g.packed_keys()..][..g.packed_keys()];
                    self.tile.score(s, packed, keys.len(), rows.clone());
                    self.weigh(s, &keys, &rows);
                    self.gather(s, tile, keys.len(), rows);
                }
            }
        }
        self.finish(s);
    }
}

impl QueryTile<'_, '_, '_> {
    /// Nothing has been seen yet.
    #[inline(always)]
    pub(crate) fn start(&mut self) {
        let (g, n) = (self.tile.g, self.tile.rows.len());
        self.tile.scratch.out[..n * g.out_cols].fill(0.0);
        self.tile.scratch.max[..n].fill(Figures::EMPTY.max);
        self.tile.scratch.sum[..n].fill(Figures::EMPTY.sum);
    }

    /// Turns scores into weights, row by row.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, s: S, keys: &Range<usize>, rows: &Range<usize>) {
        let tile = &mut self.tile;
        let finite = &self.packed.flags[keys.start / KEY_TILE * tile.g.flags()..][..tile.g.slices()];
        let all_finite = finite.iter().all(|&f| f != 0);
        for i in rows.clone() {
            let at = (i - rows.start) * KEY_TILE;
            let Some((factor, whole)) = tile.finish_row(s, keys, &(0..KEY_TILE), i, at) else { continue };
            let Scratch { scores, out, max, sum, bits, .. } = &mut *tile.scratch;
            let row = &mut scores[at..][..KEY_TILE];
            if !all_finite {
                // What scores -inf is masked: its value must not matter.
                visible_of_row(s, &row[..whole.end], &mut bits[i * WORDS..][..WORDS]);
            }
            let mut figures = Figures { max: max[i], sum: sum[i] };
            let out = &mut out[i * tile.g.out_cols..][..tile.g.out_cols];
            tile.call.norm.weigh(s, &mut row[whole.clone()], factor, &tile.site, &mut figures, out);
            (max[i], sum[i]) = (figures.max, figures.sum);
            let inside = whole.start..whole.end.min(keys.len());
            tile.call.gain_weights(
                &tile.sequence,
                tile.site.head,
                keys.start + inside.start,
                &mut row[inside],
            );
        }
    }

    /// Adds weights times values to the output of a block of rows.
    #[inline(always)]
    fn gather<S: Simd>(&mut self, s: S, tile: usize, len: usize, rows: Range<usize>) {
        let g = self.tile.g;
        let Scratch { scores, out, spans, bits, .. } = &mut *self.tile.scratch;
        let weights = Rows::of_slice(scores, rows.len(), KEY_TILE, KEY_TILE);
        let values = &self.packed.values[tile * g.packed_values()..][..g.packed_values()];
        let groups = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        for (slice, first) in (0..len).step_by(SLICE).enumerate() {
            let range = first..(first + SLICE).min(len);
            let finite = self.packed.flags[tile * g.flags() + slice] != 0;
            let part = |group| Span::get(spans, group).within(&range);
            runs(groups.clone(), rows.len(), part, |run, keys| {
                if keys.is_empty() {
                    return;
                }
                for panel in 0..g.value_panels {
                    let col = panel * g.panel;
                    let width = (g.out_cols - col).min(g.panel);
                    let values = &values[panel * g.key_room * g.panel..];
                    let values =
                        Rows::of_slice(values, g.key_room, width, g.panel).part(keys.clone(), 0..width);
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
                            let visible = |t| {
                                let key = keys.start + t;
                                words[key / 64] >> (key % 64) & 1 == 1
                            };
                            let weights = &weights.row(i).unwrap_or(&[])[keys.clone()];
                            let out = &mut out[(i - run.start) * g.out_cols..][..width];
                            gather_visible(s, &values, weights, visible, out);
                        }
                    }
                }
            });
        }
    }

    /// Normalises and writes the rows.
    #[inline(always)]
    pub(crate) fn finish<S: Simd>(&mut self, s: S) {
        let (g, call) = (self.tile.g, self.tile.call);
        let Scratch { out, max, sum, .. } = &mut *self.tile.scratch;
        for i in 0..self.tile.rows.len() {
            let figures = Figures { max: max[i], sum: sum[i] };
            let row = &mut out[i * g.out_cols..][..g.out_cols];
            let factor = call.norm.factor(figures, self.tile.site.head).start(s, row);
            self.out.write(s, i, row, factor);
            if let Some(to) = &mut self.figures {
                figures.write(to, i);
            }
        }
    }
}
