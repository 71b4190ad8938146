//! Scores: products of a few queries with the rows of all candidates.

use std::ops::Range;

use crate::keys::source::{At, Kv};
use crate::simd::any::AnyRows;
use crate::simd::mem::Rows;
use crate::simd::quant::Dequantize;
use crate::simd::table::{RowsAhead, TABLE_ROWS, Table};
use crate::simd::tile::{Product, Update};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

/// Rows of queries that are scored at once.
pub(crate) const ROWS: usize = 48;
/// As few rows as these read candidates where they lie; for more they are
/// packed, a panel at a time.
pub(crate) const FEW: usize = 12;
/// Where the rows of candidates lie.
pub(crate) enum Candidates<'a> {
    Rows(AnyRows<'a>),
    /// Keys of a head in a cache.
    Cache(&'a Kv<'a>, At<'a>),
    /// Codes with a scale each.
    Codes {
        codes: Rows<'a, i8>,
        scales: &'a [f32],
    },
    /// Keys of a head that lie anywhere, counted from the start of `at`: few rows
    /// alone are scored with them.
    Listed {
        kv: &'a Kv<'a>,
        at: At<'a>,
        ids: &'a [u32],
    },
}

impl Candidates<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Rows(rows) => rows.len(),
            Self::Cache(_, at) => at.keys.len(),
            Self::Codes { codes, .. } => codes.len(),
            Self::Listed { ids, .. } => ids.len(),
        }
    }

    /// Some of them.
    pub(super) fn stretch(&self, part: Range<usize>) -> Candidates<'_> {
        match self {
            Self::Rows(rows) => Candidates::Rows(rows.part(part)),
            Self::Cache(kv, at) => {
                let keys = at.keys.start + part.start..at.keys.start + part.end;
                Candidates::Cache(kv, At { keys, ..at.clone() })
            }
            Self::Codes { codes, scales } => {
                Candidates::Codes { codes: codes.part(part.clone(), 0..codes.cols()), scales: &scales[part] }
            }
            Self::Listed { kv, at, ids } => Candidates::Listed { kv, at: at.clone(), ids: &ids[part] },
        }
    }

    /// Some of them: where they lie, or unpacked into `room`.
    #[inline(always)]
    pub(super) fn part<'r>(&'r self, isa: Isa, part: Range<usize>, room: &'r mut [f32]) -> AnyRows<'r> {
        match self {
            Self::Rows(rows) => rows.part(part),
            Self::Cache(kv, at) => {
                let keys = at.keys.start + part.start..at.keys.start + part.end;
                kv.keys(isa, &At { keys, ..at.clone() }, room)
            }
            Self::Codes { codes, scales } => {
                let (cols, n) = (codes.cols(), part.len());
                let (codes, scales) = (codes.part(part.clone(), 0..cols), &scales[part]);
                isa.dispatch(Dequantize { codes, scales, to: &mut *room, stride: cols });
                AnyRows::F32(Rows::of_slice(room, n, cols, cols))
            }
            Self::Listed { .. } => unreachable!("keys that lie anywhere are no rows"),
        }
    }

    /// Puts some of them into a table: rows as they lie, or copied to the two rooms.
    #[inline(always)]
    fn fill<'r, S: Simd>(
        &'r self,
        s: S,
        part: Range<usize>,
        width: usize,
        held: &'r mut [f32],
        copy: &'r mut [f32],
        table: &mut Table<'r>,
    ) {
        let apart = width.next_multiple_of(S::LANES);
        let Self::Listed { kv, at, ids } = self else {
            let part = self.part(S::ISA, part, held);
            return table.push(if part.is_unit() { part } else { part.copied(s, copy, apart) });
        };
        let rooms = held.chunks_mut(width).zip(copy.chunks_mut(apart));
        for (&id, (held, copy)) in ids[part].iter().zip(rooms) {
            let key = at.keys.start + id as usize;
            let row = kv.keys(S::ISA, &At { keys: key..key + 1, ..at.clone() }, held);
            table.push(if row.is_unit() { row } else { row.copied(s, copy, apart) });
        }
    }

    /// The rows after some, to be prefetched.
    #[inline(always)]
    fn ahead(&self, first: usize) -> RowsAhead {
        let mut ahead = RowsAhead::nothing();
        match self {
            Self::Rows(rows) => {
                ahead.bytes = rows.row_bytes();
                for (i, row) in ahead.rows.iter_mut().enumerate() {
                    *row = rows.address(first + i).0;
                }
            }
            Self::Listed { kv, at, ids } => {
                let Some([keys, _]) = kv.arrays() else { return ahead };
                let keys = keys.rows(at.sequence.batch, at.kv_head, &at.sequence.keys);
                ahead.bytes = keys.row_bytes();
                for (row, &id) in ahead.rows.iter_mut().zip(ids.get(first..).unwrap_or_default()) {
                    *row = keys.address(at.keys.start + id as usize).0;
                }
            }
            Self::Cache(..) | Self::Codes { .. } => {}
        }
        ahead
    }
}

/// `out[r * stride + c] = queries[r] . candidates[c]`.
pub(crate) struct Scores<'a> {
    /// `[rows, width]`, each filled up to whole vectors with zeros.
    pub(crate) queries: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) candidates: Candidates<'a>,
    /// Whether candidates are read where they lie.
    pub(crate) few: bool,
    /// [`room`] `f32`.
    pub(crate) room: &'a mut [f32],
    /// One row longer than there are rows.
    pub(crate) out: &'a mut [f32],
    /// A multiple of 64.
    pub(crate) stride: usize,
}

/// `f32` that [`Scores`] works in.
pub(crate) fn room(width: usize) -> usize {
    TABLE_ROWS * (width + width.next_multiple_of(MAX_LANES))
}

impl Kernel for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, rows, width, candidates, few, room, out, stride } = self;
        let n = candidates.len();
        if width == 0 {
            out[..rows * stride].fill(0.0);
            return;
        }
        let (held, copy) = room.split_at_mut(TABLE_ROWS * width);
        if few {
            for first in (0..n).step_by(TABLE_ROWS) {
                let ahead = candidates.ahead(first + TABLE_ROWS);
                let mut table = Table::new();
                candidates.fill(s, first..(first + TABLE_ROWS).min(n), width, held, copy, &mut table);
                table.typed().dots(s, (rows, queries), &ahead, &mut out[first..], stride);
            }
            return;
        }
        let panel = S::LANES * S::TILE_VECTORS;
        let a = Rows::of_slice(queries, rows, width, width.next_multiple_of(S::LANES));
        for first in (0..n).step_by(panel) {
            let part = candidates.part(S::ISA, first..(first + panel).min(n), held);
            part.pack_keys(s, copy);
            let b = Rows::of_slice(copy, width, part.len().next_multiple_of(S::LANES), panel);
            let c = &mut out[first..];
            s.vectorize(Product { a, b, c, ldc: stride, update: Update::Set });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_rows_give_exact_products_of_small_integers() {
        for (rows, width, n) in
            [(1usize, 3usize, 5usize), (4, 20, 300), (7, 24, 64), (12, 128, 130), (48, 33, 257)]
        {
            let query = |r: usize, c: usize| ((r * 5 + c * 3) % 17) as f32 - 8.0;
            let x: Vec<f32> = (0..n * width).map(|i| ((i * 7) % 31) as f32 - 15.0).collect();
            let stride = n.next_multiple_of(64);
            let columns: Vec<f32> = (0..n * width).map(|i| x[i % n * width + i / n]).collect();
            let stored =
                [Rows::of_slice(&x, n, width, width), Rows::of_slice(&columns, width, n, n).transposed()];
            let ways = [(true, 0), (false, 0), (true, 1), (false, 1)];
            for (isa, (few, layout)) in Isa::available().flat_map(|isa| ways.map(|way| (isa, way))) {
                let (mut out, mut space) = (vec![f32::NAN; (rows + 1) * stride], vec![0.0; room(width)]);
                let apart = width.next_multiple_of(isa.lanes());
                let at = |i: usize| if i % apart < width { query(i / apart, i % apart) } else { 0.0 };
                let queries: Vec<f32> = (0..rows * apart).map(at).collect();
                isa.dispatch(Scores {
                    queries: &queries,
                    rows,
                    width,
                    candidates: Candidates::Rows(AnyRows::F32(stored[layout])),
                    few,
                    room: &mut space,
                    out: &mut out,
                    stride,
                });
                for r in 0..rows {
                    for j in 0..n {
                        let want: f32 = (0..width).map(|c| query(r, c) * x[j * width + c]).sum();
                        assert_eq!(out[r * stride + j], want, "{isa}, {few}, {layout}, {r}, {j}");
                    }
                }
            }
        }
    }
}
