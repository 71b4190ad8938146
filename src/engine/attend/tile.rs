//! A tile of query rows against all its keys: the running softmax.

use std::ops::Range;

use crate::engine::attend::pack::{Own, Packed, pack_now};
use crate::engine::call::Output;
use crate::engine::row::{SoftmaxSum, visible_of_row};
use crate::engine::scores::{KEY_TILE, KeyTile, ScoreTile, Scratch, Span, Stored, WORDS, Walk, runs};
use crate::keys::plan::ATOM;
use crate::simd::mem::{Ahead, Rows, STREAMS, Stream};
use crate::simd::pack::{SLICE, gather_visible};
use crate::simd::tile::{Product, TILE_ROWS, Update};
use crate::simd::{Kernel, Simd};

/// Where a tile of queries finds packed keys and values.
pub(crate) enum Store<'a> {
    /// Packed before.
    Shared(Packed<'a>),
    /// Nowhere: each tile is packed when it is needed.
    Nothing,
}

/// What becomes of the rows in the end.
pub(crate) enum Target<'a> {
    /// They are normalised and written.
    Output(&'a Output<'a>),
    /// They are part of the rows: `[rows, out_cols]`, then the maxima, then
    /// the sums.
    State(&'a mut [f32]),
}

/// One tile of query rows against all its keys.
pub(crate) struct QueryTile<'a, 'b, 'c> {
    pub(crate) tile: ScoreTile<'a, 'b, 'c>,
    pub(crate) store: Store<'a>,
    pub(crate) own: Own<'a, 'b>,
    /// Keys of the sequence that count, from one tile to another.
    pub(crate) within: Range<usize>,
    /// Whether virtual keys do.
    pub(crate) extra: bool,
    pub(crate) target: Target<'a>,
}

impl Kernel for QueryTile<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.tile.load(s);
        self.start();
        let extra = self.tile.call.extra.filter(|_| self.extra).map_or(0, |extra| extra.len());
        let mut walk = self.tile.walk(self.within.clone());
        let mut ahead = self.ahead(&walk);
        for first in (0..extra).step_by(KEY_TILE).rev() {
            self.tile.keys = KeyTile::Virtual { first };
            self.tile.len = (extra - first).min(KEY_TILE);
            self.turn(s, &mut ahead);
        }
        while self.tile.next(&mut walk) {
            self.turn(s, &mut ahead);
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
        self.tile.scratch.max[..n].fill(SoftmaxSum::EMPTY.max);
        self.tile.scratch.sum[..n].fill(SoftmaxSum::EMPTY.sum);
    }

    /// What is prefetched meanwhile: where the rows are written, and the queries after
    /// them. Where there are many keys, that is little beside these.
    fn ahead(&self, walk: &Walk<'_>) -> (Ahead, usize) {
        const FEW: usize = 2;
        let ScoreTile { call, sequence, heads, rows, .. } = &self.tile;
        let (Walk::Tiles(tiles), Target::Output(output)) = (walk, &self.target) else {
            return (Ahead::nothing(), 0);
        };
        if tiles.len() > FEW || heads.len() > 1 || call.order.is_some() {
            return (Ahead::nothing(), 0);
        }
        let (start, head) = (sequence.queries.start, heads.start);
        let own = start + rows.start..start + rows.end;
        let next = own.end..(own.end + rows.len()).min(sequence.queries.end);
        let mut streams = [Stream::NONE; STREAMS];
        streams[0] = output.out.stream(sequence.batch, head, own);
        streams[1] = call.query_rows_of(sequence, head, &next).stream();
        let lines = streams[0].lines() + streams[1].lines();
        (Ahead::new(streams), lines)
    }

    /// Takes in the keys that the tile is at.
    #[inline(always)]
    pub(super) fn turn<S: Simd>(&mut self, s: S, ahead: &mut (Ahead, usize)) {
        if !self.tile.plan() {
            return;
        }
        let Self { tile, store, own, .. } = self;
        let (packed, stored) = match (store, tile.keys) {
            (Store::Shared(packed), KeyTile::Keys { tile }) => (*packed, Stored::Tile(tile - packed.first)),
            (Store::Shared(packed), KeyTile::Pieces { .. }) => (*packed, Stored::Atoms(packed.first)),
            _ => {
                pack_now(s, tile, own.room, own.rooms);
                (own.room.packed(0), Stored::Tile(0))
            }
        };
        for rows in tile.blocks() {
            tile.score(s, packed.keys, stored, rows.clone());
            weigh(s, tile, &packed, stored, &rows, ahead);
            gather(s, tile, &packed, stored, rows);
        }
    }

    /// Normalises and writes the rows, or hands them on.
    #[inline(always)]
    pub(crate) fn finish<S: Simd>(&mut self, s: S) {
        let Self { tile, target, .. } = self;
        let (g, call, n) = (tile.g, tile.call, tile.rows.len());
        let Scratch { out, max, sum, .. } = &mut *tile.scratch;
        let output = match target {
            Target::State(state) => {
                let rows = state.len() / (g.out_cols + 2);
                let (to, figures) = state.split_at_mut(rows * g.out_cols);
                to[..n * g.out_cols].copy_from_slice(&out[..n * g.out_cols]);
                figures[..n].copy_from_slice(&max[..n]);
                figures[rows..rows + n].copy_from_slice(&sum[..n]);
                return;
            }
            Target::Output(output) => output,
        };
        let batch = tile.sequence.batch;
        let figures_of = |i: usize| SoftmaxSum { max: max[i], sum: sum[i] };
        if tile.heads.len() == 1 {
            let head = tile.heads.start;
            for (start, rows) in call.query_runs(&tile.sequence, tile.rows.clone()) {
                let mut to = output.out.take(batch, head, rows.clone());
                let mut to_figures = output.figures.as_ref().map(|x| x.take(batch, head, rows.clone()));
                for (i, place) in rows.enumerate() {
                    let figures = figures_of(start + i);
                    let row = &mut out[(start + i) * g.out_cols..][..g.out_cols];
                    let factor = call.epilogue(s, (batch, head, place), figures, row);
                    to.write(s, i, row, factor);
                    if let Some(to) = &mut to_figures {
                        figures.write(to, i);
                    }
                }
            }
            return;
        }
        for i in 0..n {
            let (head, query) = tile.place(i);
            let row = call.query_row(&tile.sequence, query);
            let Scratch { out, max, sum, .. } = &mut *tile.scratch;
            let figures = SoftmaxSum { max: max[i], sum: sum[i] };
            let out = &mut out[i * g.out_cols..][..g.out_cols];
            let factor = call.epilogue(s, (batch, head, row), figures, out);
            output.out.take(batch, head, row..row + 1).write(s, 0, out, factor);
            if let Some(to) = &output.figures {
                figures.write(&mut to.take(batch, head, row..row + 1), 0);
            }
        }
    }
}

/// Turns scores into weights, row by row.
#[inline(always)]
fn weigh<S: Simd>(
    s: S,
    tile: &mut ScoreTile<'_, '_, '_>,
    packed: &Packed<'_>,
    stored: Stored,
    rows: &Range<usize>,
    (ahead, lines): &mut (Ahead, usize),
) {
    let all_finite = cuts(tile, stored).all(|cut| is_finite(tile, packed, stored, &cut));
    for i in rows.clone() {
        let at = (i - rows.start) * KEY_TILE;
        ahead.prefetch(*lines);
        if !all_finite {
            tile.saturate(packed.keys, stored, i, at);
        }
        let Some((factor, whole)) = tile.finish_row(s, &(0..KEY_TILE), i, at) else { continue };
        let head = tile.place(i).0;
        let site = tile.sequence.site(head);
        let Scratch { scores, out, max, sum, bits, .. } = &mut *tile.scratch;
        let row = &mut scores[at..][..KEY_TILE];
        if !all_finite {
            // What scores -inf is masked: its value must not matter.
            visible_of_row(s, &row[..whole.end], &mut bits[i * WORDS..][..WORDS]);
        }
        let mut figures = SoftmaxSum { max: max[i], sum: sum[i] };
        let out = &mut out[i * tile.g.out_cols..][..tile.g.out_cols];
        tile.call.norm.weigh(s, &mut row[whole.clone()], factor, &site, &mut figures, out);
        (max[i], sum[i]) = (figures.max, figures.sum);
        tile.gain_weights(i, whole.start..whole.end.min(tile.len), at);
    }
}

/// Where sums over keys are cut: ranges of columns whose values are stored one
/// after the other.
#[inline(always)]
fn cuts(tile: &ScoreTile<'_, '_, '_>, stored: Stored) -> impl Iterator<Item = Range<usize>> + use<> {
    let (len, step) = (tile.len, if let Stored::Atoms(_) = stored { ATOM } else { SLICE });
    (0..len).step_by(step).map(move |first| first..(first + step).min(len))
}

/// Whether the values of a cut are finite. Nobody sees those that are not
/// packed.
#[inline(always)]
fn is_finite(tile: &ScoreTile<'_, '_, '_>, packed: &Packed<'_>, stored: Stored, cut: &Range<usize>) -> bool {
    let (at, within) = tile.stored_at(stored, cut.start);
    let flag = at.checked_mul(tile.g.flags()).and_then(|at| packed.flags.get(at + within / SLICE));
    flag.is_none_or(|&finite| finite != 0)
}

/// Adds weights times values to the output of a block of rows.
#[inline(always)]
fn gather<S: Simd>(
    s: S,
    tile: &mut ScoreTile<'_, '_, '_>,
    packed: &Packed<'_>,
    stored: Stored,
    rows: Range<usize>,
) {
    let g = tile.g;
    let groups = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
    for range in cuts(tile, stored) {
        let finite = is_finite(tile, packed, stored, &range);
        let (at, within) = tile.stored_at(stored, range.start);
        let Scratch { scores, out, spans, bits, .. } = &mut *tile.scratch;
        let weights = Rows::of_slice(scores, rows.len(), KEY_TILE, KEY_TILE);
        let part = |group| Span::get(spans, group).within(&range);
        runs(groups.clone(), rows.len(), part, |run, keys| {
            if keys.is_empty() {
                return;
            }
            let values = &packed.values[at * g.packed_values()..][..g.packed_values()];
            let stored = within + keys.start - range.start..within + keys.end - range.start;
            for panel in 0..g.value_panels {
                let col = panel * g.panel;
                let width = (g.out_cols - col).min(g.panel);
                let values = &values[panel * g.key_room * g.panel..];
                let values =
                    Rows::of_slice(values, g.key_room, width, g.panel).part(stored.clone(), 0..width);
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
