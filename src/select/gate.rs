//! Gates: rows that stand for queries or for blocks of keys, projected, normalised
//! and rotated.

use ndarray::{ArrayView1, ArrayView2};

use super::finding::Place;
use super::score::{self, Candidates, ROWS, Scores};
use super::{Source, Summary, Unpack, rows_of, summaries};
use crate::engine::parallel;
use crate::engine::workspace::room;
use crate::input::Dims;
use crate::keys::source::At;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Arena, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, MAX_LANES};

/// What becomes of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate<'a> {
    pub(crate) isa: Isa,
    /// `[width of a row, columns]`
    pub(crate) weights: ArrayView2<'a, f32>,
    /// Divides by the root of the mean square, and multiplies by these.
    pub(crate) norm: Option<ArrayView1<'a, f32>>,
    /// Rotates by position, with this base.
    pub(crate) theta: Option<f64>,
}

room! {
    /// What [`Gate::rows`] works in.
    Room<'a>(width: usize, columns: usize) {
        rows: f32 = ROWS.saturating_mul(width.saturating_add(MAX_LANES)),
        room: f32 = score::room(width),
        products: f32 = (ROWS + 1).saturating_mul(stride(columns))
    }
}

/// Elements that products of a row are apart.
fn stride(columns: usize) -> usize {
    columns.saturating_add(63) / 64 * 64
}

/// Added to the mean square.
pub(crate) const EPSILON: f32 = 1e-6;

/// Rotates the pairs of channel `c` and `c + dim / 2` by `position * theta^(-2 c
/// / dim)`.
pub(crate) fn rotate(row: &mut [f32], position: usize, theta: f64) {
    let (dim, half) = (row.len() as f64, row.len() / 2);
    let (first, second) = row.split_at_mut(half);
    for (c, (a, b)) in first.iter_mut().zip(second).enumerate() {
        let (sin, cos) = (position as f64 * theta.powf(-2.0 * c as f64 / dim)).sin_cos();
        let (sin, cos) = (sin as f32, cos as f32);
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

impl Gate<'_> {
    /// `n` rows, one after the other in `out`: `fill` gives a row as it comes,
    /// `position` where it is rotated to.
    pub(crate) fn rows(
        &self,
        n: usize,
        mut fill: impl FnMut(usize, &mut [f32]),
        position: impl Fn(usize) -> usize,
        room: &mut Room<'_>,
        out: &mut [f32],
    ) {
        let (width, columns) = self.weights.dim();
        let (apart, stride) = (width.next_multiple_of(self.isa.lanes()), stride(columns));
        let Room { rows, room, products } = room;
        for first in (0..n).step_by(ROWS) {
            let count = ROWS.min(n - first);
            rows[..count * apart].fill(0.0);
            for i in 0..count {
                fill(first + i, &mut rows[i * apart..][..width]);
            }
            if columns > 0 {
                self.isa.dispatch(Scores {
                    queries: rows,
                    rows: count,
                    width,
                    candidates: Candidates::Rows(AnyRows::F32(self.weights.reversed_axes().into())),
                    few: false,
                    room,
                    out: products,
                    stride,
                });
            }
            for i in 0..count {
                let row = &mut out[(first + i) * columns..][..columns];
                row.copy_from_slice(&products[i * stride..][..columns]);
                if let Some(norm) = self.norm {
                    let square = row.iter().map(|x| x * x).sum::<f32>() / columns as f32;
                    let factor = 1.0 / (square + EPSILON).sqrt();
                    row.iter_mut().zip(norm).for_each(|(x, norm)| *x *= factor * norm);
                }
                if let Some(theta) = self.theta {
                    rotate(row, position(first + i), theta);
                }
            }
        }
    }
}

room! {
    /// What a thread of [`of_values`] works in: rows of values of all heads.
    ValuesRoom<'a>(dims: &Dims, columns: usize) {
        value: f32 = dims.value_dim;
        gate: Room<'a> = (dims.kv_heads.saturating_mul(dims.value_dim), columns)
    }
}

/// Keys of a task.
const STEP: usize = 192;

/// Tokens in whole tasks, at least so many.
pub(crate) fn padded(tokens: usize) -> usize {
    tokens.div_ceil(STEP).saturating_mul(STEP)
}

/// Bytes that [`of_values`] takes from an arena.
pub(crate) fn of_values_bytes(dims: &Dims, columns: usize, padded: usize) -> usize {
    let claims = bytes_for::<u64>(claim_words(dims.batch.saturating_mul(padded / STEP)));
    let shares = bytes_for_shares(parallel::threads(), ValuesRoom::bytes(dims, columns));
    claims.saturating_add(shares)
}

/// The values of all heads of a token, one after the other, times weights `[kv_heads value_dim,
/// columns]`: `[sequences, padded, columns]`, where what follows a sequence's last token is of
/// any value.
pub(crate) fn of_values(
    source: &Source<'_>,
    weights: ArrayView2<'_, f32>,
    padded: usize,
    arena: &mut Arena<'_>,
    to: &mut [f32],
) {
    let (isa, dims, columns) = (source.isa, &source.dims, weights.ncols());
    let (d, workers, steps) = (dims.value_dim, parallel::threads(), padded / STEP);
    let pieces = Parts::new(to, STEP * columns, arena.take(claim_words(dims.batch * steps)));
    let shares = arena.shares(workers, ValuesRoom::bytes(dims, columns));
    let start = |worker: usize| ValuesRoom::take(&mut shares.take(worker), dims, columns);
    let gate = Gate { isa, weights, norm: None, theta: None };
    let tasks = if columns == 0 { 0 } else { dims.batch * steps };
    parallel::for_each(workers, tasks, start, |room, task| {
        let (sequence, first) = (&source.sequence(task / steps), task % steps * STEP);
        let n = sequence.keys.len().saturating_sub(first).min(STEP);
        let fill = |i: usize, row: &mut [f32]| {
            for kv_head in 0..dims.kv_heads {
                let at = At { sequence, kv_head, keys: first + i..first + i + 1 };
                let to = &mut row[kv_head * d..][..d];
                isa.dispatch(Unpack { from: source.kv.values(isa, &at, room.value), to });
            }
        };
        gate.rows(n, fill, |_| 0, &mut room.gate, pieces.take(task));
    });
}

room! {
    /// Pooled keys of a head: what they are made of, and what a gate makes of
    /// them.
    Pooled<'a>(d: usize, columns: usize, blocks: usize) {
        extremes: f32 = blocks.saturating_mul(2).saturating_mul(d),
        means: f32 = blocks.saturating_mul(d),
        keys: f32 = blocks.saturating_mul(columns);
        summaries: summaries::Room<'a> = (d),
        gate: Room<'a> = (d.saturating_mul(3), columns)
    }
}

impl Pooled<'_> {
    /// Takes in the keys of a place, in blocks of `unit`.
    pub(crate) fn pool(&mut self, source: &Source<'_>, place: &Place<'_>, unit: usize) {
        let from = (place.of, place.kv_head);
        summaries::summarise(source, from, (Summary::MinMax, unit), self.extremes, &mut self.summaries);
        summaries::summarise(source, from, (Summary::Mean, unit), self.means, &mut self.summaries);
    }

    /// The first `n` rows that were made, of so many columns.
    pub(crate) fn rows(&self, n: usize, columns: usize) -> Candidates<'_> {
        Candidates::Rows(rows_of(self.keys, n, columns))
    }

    /// Makes rows of `n` blocks, each of the maxima, minima and means of its
    /// channels, rotated to its first key.
    pub(crate) fn project(&mut self, gate: &Gate<'_>, n: usize, unit: usize) {
        let Self { extremes, means, keys, gate: room, .. } = self;
        let d = gate.weights.nrows() / 3;
        let fill = |i: usize, row: &mut [f32]| {
            row[..2 * d].copy_from_slice(&extremes[2 * i * d..][..2 * d]);
            row[2 * d..].copy_from_slice(&means[i * d..][..d]);
        };
        gate.rows(n, fill, |i| i * unit, room, keys);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::workspace::Workspace;
    use ndarray::Array2;

    #[test]
    fn rows_are_projected_normalised_and_rotated() {
        let (n, width, columns) = (101, 7, 6);
        let weights = Array2::from_shape_fn((width, columns), |(i, j)| ((i * 5 + j * 3) % 7) as f32 - 3.0);
        let x = |i: usize, c: usize| ((i * 3 + c) % 5) as f32 - 1.5;
        let norm = [1.0, 0.5, 2.0, 1.0, 1.5, 1.0];
        for isa in Isa::available() {
            let gate = Gate {
                isa,
                weights: weights.view(),
                norm: Some(ArrayView1::from(&norm)),
                theta: Some(100.0),
            };
            let mut workspace = Workspace::new();
            let arena = &mut workspace.arena(Room::bytes(width, columns)).unwrap();
            let (mut room, mut out) = (Room::take(arena, width, columns), vec![f32::NAN; n * columns]);
            let fill = |i: usize, row: &mut [f32]| row.iter_mut().enumerate().for_each(|(c, y)| *y = x(i, c));
            gate.rows(n, fill, |i| 3 * i, &mut room, &mut out);
            for i in 0..n {
                let dot = |j: usize| (0..width).map(|c| f64::from(x(i, c) * weights[[c, j]])).sum::<f64>();
                let square = (0..columns).map(|j| dot(j).powi(2)).sum::<f64>() / columns as f64;
                let normed = |j: usize| dot(j) / (square + 1e-6).sqrt() * f64::from(norm[j]);
                for c in 0..columns / 2 {
                    let angle = (3 * i) as f64 * 100f64.powf(-2.0 * c as f64 / columns as f64);
                    let (a, b) = (normed(c), normed(c + columns / 2));
                    let want = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()];
                    for (j, want) in [c, c + columns / 2].into_iter().zip(want) {
                        let got = f64::from(out[i * columns + j]);
                        assert!((got - want).abs() < 1e-5, "{isa}, {i}, {j}: {got}, {want}");
                    }
                }
            }
        }
    }
}
