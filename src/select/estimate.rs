//! Weights that are estimated with 4 bits, held against the exact ones of some keys.
//!
//! With means taken off, numbers of a row are rounded to whole multiples from -7 to
//! 7 of a number of its own. Products of these are exact in `f32`.

use std::ops::Range;

use half::bf16;

use super::finding::Place;
use super::probe::{self, Probe};
use super::quantise::{Exceeding, LogSum, Quantise};
use super::score::Candidates;
use super::{Source, Summary, Unpack, rows_of, summaries};
use crate::engine::workspace::room;
use crate::input::Sequence;
use crate::keys::source::At;
use crate::simd::any::AnyRows;
use crate::simd::mem::Rows;

room! {
    /// What an estimate of up to `queries` queries at once, for all keys, works in.
    Room<'a>(d: usize, n: usize, queries: usize, tile: usize) {
        held: f32 = d,
        row: f32 = d,
        keys: bf16 = n.saturating_mul(d),
        scales: f32 = n,
        offsets: f32 = n,
        mean_q: f32 = d,
        mean_k: f32 = d,
        queries: f32 = queries.saturating_mul(d),
        factors: f32 = queries,
        limits: f32 = queries,
        bits: u64 = n.div_ceil(64 * tile);
        means: summaries::Room<'a> = (d),
        probe: probe::Room<'a> = (d, n)
    }
}

/// The estimates of a key/value head.
pub(crate) struct Estimate<'a> {
    source: &'a Source<'a>,
    of: &'a Sequence,
    kv_head: usize,
    scale: f32,
    tile: usize,
}

/// Which weights are estimated: causal ones, where the last query sits at the last key.
pub(crate) struct Part {
    pub(crate) head: usize,
    pub(crate) rows: Range<usize>,
    /// The tiles whose weights are estimated. Those of the first tile, and after these,
    /// are exact.
    pub(crate) middle: Range<usize>,
    /// By how much the logarithm of an estimate is to exceed that of the exact sum.
    pub(crate) above: f32,
}

impl<'a> Estimate<'a> {
    /// With a factor of products, and tiles of so many keys, a multiple of the lanes.
    pub(crate) fn at(source: &'a Source<'a>, place: &Place<'a>, scale: f32, tile: usize) -> Self {
        Self { source, of: place.of, kv_head: place.kv_head, scale, tile }
    }

    /// Takes in the keys.
    pub(crate) fn keys(&self, room: &mut Room<'_>) {
        let &Self { source, of: sequence, kv_head, .. } = self;
        let (d, n) = (source.dims.head_dim, sequence.keys.len());
        summaries::summarise(source, (sequence, kv_head), (Summary::Mean, n), room.mean_k, &mut room.means);
        for (j, to) in room.keys.chunks_exact_mut(d.max(1)).take(n).enumerate() {
            let from = source.kv.keys(source.isa, &At { sequence, kv_head, keys: j..j + 1 }, room.held);
            source.isa.dispatch(Unpack { from, to: room.row });
            room.scales[j] = source.isa.dispatch(Quantise { row: room.row, mean: room.mean_k });
            to.iter_mut().zip(&*room.row).for_each(|(to, &x)| *to = bf16::from_f32(x));
        }
    }

    /// Takes in what the queries of a head have in common: `scale mean q . (k - mean k)`.
    pub(crate) fn queries(&self, head: usize, room: &mut Room<'_>) {
        let &Self { source, of, kv_head, scale, .. } = self;
        let (queries, d) = (source.queries(of, head), source.dims.head_dim);
        room.means.rows(source.isa, (Summary::Mean, queries.len()), queries, room.mean_q);
        let shift: f32 = room.mean_q.iter().zip(&*room.mean_k).map(|(q, k)| q * k).sum();
        let probe = Probe { isa: source.isa, queries: rows_of(room.mean_q, 1, d), scale };
        let (n, offsets) = (of.keys.len(), &mut *room.offsets);
        let all = |n| source.candidates(of, kv_head, n);
        let each =
            |_, row: &mut [f32]| offsets.iter_mut().zip(row).for_each(|(to, x)| *to = scale * (*x - shift));
        probe.products(|_| n, all, &mut room.probe, each);
    }

    /// The tiles in the middle, counted from the first of them, in which a weight
    /// exceeds, as bits.
    pub(crate) fn exceeding<'r>(&self, part: &Part, room: &'r mut Room<'_>) -> &'r [u64] {
        let &Self { source, of, kv_head, scale, tile } = self;
        let (isa, d, count) = (source.isa, source.dims.head_dim, part.rows.len());
        let (from, last) = (part.middle.start * tile, part.middle.end * tile);
        let queries = source.queries(of, part.head).part(part.rows.clone());
        let (probe, limits) = (Probe { isa, queries, scale }, &mut room.limits[..count]);
        let exact = |n| source.candidates(of, kv_head, n);
        probe.products(
            |_| from,
            exact,
            &mut room.probe,
            |i, row| limits[i] = isa.dispatch(LogSum { row, scale }),
        );
        let seen = |i: usize| part.rows.start + i + 1 + of.keys.len() - of.queries.len() - last;
        let exact = |n| source.candidates_in(of, kv_head, last..last + n);
        probe.products(seen, exact, &mut room.probe, |i, row| {
            let (a, b) = (limits[i], isa.dispatch(LogSum { row, scale }));
            let most = a.max(b);
            limits[i] = most + ((a - most).exp() + (b - most).exp()).ln();
        });
        let mean = |n| Candidates::Rows(rows_of(room.mean_k, n, d));
        probe.products(|_| 1, mean, &mut room.probe, |i, row| limits[i] += part.above - scale * row[0]);

        for (i, to) in room.queries.chunks_exact_mut(d.max(1)).take(count).enumerate() {
            isa.dispatch(Unpack { from: queries.part(i..i + 1), to: &mut *to });
            room.factors[i] = scale * isa.dispatch(Quantise { row: to, mean: room.mean_q });
        }
        let bits = &mut room.bits[..part.middle.len().div_ceil(64)];
        bits.fill(0);
        let probe = Probe { isa, queries: rows_of(room.queries, count, d), scale };
        let keys = |n| Candidates::Rows(AnyRows::Bf16(Rows::of_slice(&room.keys[from * d..], n, d, d)));
        probe.products(
            |_| last - from,
            keys,
            &mut room.probe,
            |i, row| {
                let (scales, offsets) = (&room.scales[from..], &room.offsets[from..]);
                let (factor, limit) = (room.factors[i], limits[i]);
                isa.dispatch(Exceeding { row, scales, offsets, factor, limit, tile, bits: &mut *bits });
            },
        );
        bits
    }
}
