//! Probes: the weights that a few queries of a head give to all keys.

use super::UnpackRows;
use super::reduce::Shares;
use super::score::{self, Candidates, ROWS, Scores};
use crate::engine::workspace::room;
use crate::simd::any::AnyRows;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

room! {
    /// What a probe works in.
    Room<'a>(head_dim: usize, keys: usize) {
        queries: f32 = ROWS.saturating_mul(head_dim.saturating_add(MAX_LANES)),
        room: f32 = score::room(head_dim),
        scores: f32 = (ROWS + 1).saturating_mul(stride(keys))
    }
}

/// Elements that each row of scores is apart.
fn stride(keys: usize) -> usize {
    keys.next_multiple_of(64).max(64)
}

/// Some queries of a head.
#[derive(Clone, Copy)]
pub(crate) struct Probe<'a> {
    pub(crate) isa: Isa,
    pub(crate) queries: AnyRows<'a>,
    pub(crate) scale: f32,
}

impl Probe<'_> {
    /// Calls `each` with the number of a query and its products with the keys that
    /// it sees: the first `seen(i)`, never fewer than the query before;
    /// `keys(n)` is the first `n` of them.
    pub(crate) fn products<'k>(
        &self,
        seen: impl Fn(usize) -> usize,
        keys: impl Fn(usize) -> Candidates<'k>,
        room: &mut Room<'_>,
        mut each: impl FnMut(usize, &mut [f32]),
    ) {
        let (isa, width, rows) = (self.isa, self.queries.cols(), self.queries.len());
        let apart = width.next_multiple_of(isa.lanes());
        for first in (0..rows).step_by(ROWS) {
            let part = first..(first + ROWS).min(rows);
            let (n, most) = (part.len(), seen(part.end - 1));
            let stride = stride(most);
            if most > 0 {
                room.queries[..n * apart].fill(0.0);
                isa.dispatch(UnpackRows { from: self.queries.part(part), to: room.queries, apart });
                let candidates = keys(most);
                let Room { queries, room, scores } = &mut *room;
                let out = &mut scores[..(n + 1) * stride];
                isa.dispatch(Scores { queries, rows: n, width, candidates, few: false, room, out, stride });
            }
            for i in 0..n {
                each(first + i, &mut room.scores[i * stride..][..seen(first + i)]);
            }
        }
    }

    /// The same with the softmax of the products.
    pub(crate) fn run<'k>(
        &self,
        seen: impl Fn(usize) -> usize,
        keys: impl Fn(usize) -> Candidates<'k>,
        room: &mut Room<'_>,
        mut each: impl FnMut(usize, &mut [f32]),
    ) {
        self.products(seen, keys, room, |i, row| {
            if !row.is_empty() {
                self.isa.dispatch(Shares { row: &mut *row, scale: self.scale });
            }
            each(i, row);
        });
    }

    /// For each key, and for each distance of a key from a query, what all
    /// queries give: the mean over them. Distance `d` stands at `keys - 1 - d`;
    /// the last query sits at the last key.
    pub(crate) fn sums<'k>(
        &self,
        keys: impl Fn(usize) -> Candidates<'k>,
        room: &mut Room<'_>,
        columns: &mut [f32],
        diagonals: &mut [f32],
    ) {
        columns.fill(0.0);
        diagonals.fill(0.0);
        let (n, rows) = (columns.len(), self.queries.len());
        let seen = |i: usize| n - rows + i + 1;
        self.run(seen, keys, room, |i, row| {
            let (diagonals, share) = (&mut diagonals[n - seen(i)..], 1.0 / rows as f32);
            self.isa.dispatch(Accumulate { row, columns, diagonals, share });
        });
    }
}

/// `x += share * row`, for two of them.
struct Accumulate<'a> {
    row: &'a [f32],
    columns: &'a mut [f32],
    diagonals: &'a mut [f32],
    share: f32,
}

impl Kernel for Accumulate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { row, columns, diagonals, share } = self;
        for ((&x, column), diagonal) in row.iter().zip(columns).zip(diagonals) {
            let x = x * share;
            *column += x;
            *diagonal += x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::workspace::Workspace;
    use crate::simd::mem::Rows;

    #[test]
    fn sums_are_those_of_the_softmax() {
        let (d, n, rows) = (5, 130, 70);
        let x: Vec<f32> = (0..n * d).map(|i| ((i * 37) % 23) as f32 / 11.0 - 1.0).collect();
        let q: Vec<f32> = (0..rows * d).map(|i| ((i * 29) % 19) as f32 / 5.0 - 1.5).collect();
        let (mut columns, mut diagonals) = (vec![0f64; n], vec![0f64; n]);
        for i in 0..rows {
            let position = n - rows + i;
            let dot = |j: usize| (0..d).map(|c| f64::from(q[i * d + c] * x[j * d + c])).sum::<f64>();
            let weights: Vec<f64> = (0..=position).map(|j| (0.5 * dot(j)).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (j, weight) in weights.iter().enumerate() {
                columns[j] += weight / sum / rows as f64;
                diagonals[n - 1 - (position - j)] += weight / sum / rows as f64;
            }
        }
        for isa in Isa::available() {
            let queries = AnyRows::F32(Rows::of_slice(&q, rows, d, d));
            let keys = |n: usize| Candidates::Rows(AnyRows::F32(Rows::of_slice(&x, n, d, d)));
            let probe = Probe { isa, queries, scale: 0.5 };
            let mut workspace = Workspace::new();
            let mut room = Room::take(&mut workspace.arena(Room::bytes(d, n)).unwrap(), d, n);
            let (mut a, mut b) = (vec![f32::NAN; n], vec![f32::NAN; n]);
            probe.sums(keys, &mut room, &mut a, &mut b);
            for (got, want) in a.iter().chain(&b).zip(columns.iter().chain(&diagonals)) {
                assert!((f64::from(*got) - want).abs() < 1e-6, "{isa}: {got}, {want}");
            }
        }
    }
}
