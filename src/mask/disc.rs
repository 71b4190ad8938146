//! Masks of tokens on a grid that see each other within a distance.

use std::ops::Range;
use std::sync::Arc;

use super::grid::each_word;
use super::{Block, Coverage, Mask, range_bits};
use crate::error::Result;
use crate::input::{Dims, Site};
use crate::keys::grid::{Cuboid, Order};
use crate::keys::images::check_tokens;
use crate::simd::Isa;

/// A query sees the keys of an image that are nearer than a radius. Tokens
/// beside the image, which come first, see everything and are seen by
/// everything.
///
/// What is on the image is counted in the orders that the mask is made with,
/// which have one class.
#[derive(Clone, Debug)]
pub(crate) struct Disc {
    queries: Arc<Order>,
    keys: Arc<Order>,
    beside: usize,
    /// The square of the radius.
    squared: usize,
    /// For each distance of rows that is seen, the largest one of columns.
    half: Arc<[usize]>,
}

impl Disc {
    /// Distances below a radius of at least 1.
    pub(crate) fn new([queries, keys]: [Arc<Order>; 2], beside: usize, radius: usize) -> Self {
        let [height, _, width] = keys.grid().sizes();
        // Farther than anything is all the same.
        let radius = radius.min(height.saturating_add(width)).max(1);
        let squared = radius * radius;
        let half = (0..radius).map(|dy| (squared - 1 - dy * dy).isqrt()).collect();
        Self { queries, keys, beside, squared, half }
    }

    /// The rows and columns that places from one to another see.
    fn hulls(&self, axes: [&Range<usize>; 2]) -> [Range<usize>; 2] {
        let [height, _, width] = self.keys.grid().sizes();
        let reach = self.half.len() - 1;
        let [rows, cols] = axes.map(|axis| axis.start.saturating_sub(reach)..axis.end + reach);
        [rows.start..rows.end.min(height), cols.start..cols.end.min(width)]
    }

    /// Sets the bits of the keys of a range that a query sees; bit 0 is the
    /// first of them.
    #[inline(always)]
    fn fill(&self, query: usize, keys: &Range<usize>, words: &mut [u64]) {
        words.fill(0);
        let beside = if query < self.beside { keys.end } else { self.beside };
        let mut set = |tokens: Range<usize>| {
            each_word(tokens, keys.start, words, |word, _, inside| *word |= inside);
        };
        set(keys.start..keys.end.min(beside));
        if query < self.beside || keys.end <= self.beside {
            return;
        }
        let inside = keys.start.max(self.beside) - self.beside..keys.end - self.beside;
        let (_, [y, _, x]) = self.queries.spot(query - self.beside);
        let [rows, cols] = self.hulls([&(y..y + 1), &(x..x + 1)]);
        for column in self.keys.columns(0, [0..1, cols]) {
            let wide = &column.axes[1];
            // Rows of which the range has some.
            let first = inside.start.saturating_sub(column.start) / wide.len();
            let last = inside.end.saturating_sub(column.start).div_ceil(wide.len());
            for row in rows.start.max(first)..rows.end.min(last) {
                let half = self.half[row.abs_diff(y)];
                let (from, to) = (wide.start.max(x.saturating_sub(half)), wide.end.min(x + half + 1));
                if from < to {
                    let start = column.start + row * wide.len();
                    let seen = start + from - wide.start..start + to - wide.start;
                    let seen = seen.start.max(inside.start)..seen.end.min(inside.end);
                    set(seen.start + self.beside..seen.end + self.beside);
                }
            }
        }
    }
}

/// The squares of the smallest and of the largest distance of the places of
/// two cuboids.
fn distances(a: &Cuboid, b: &Cuboid) -> [usize; 2] {
    let axes = || a.axes.iter().zip(&b.axes);
    let gap = |a: &Range<usize>, b: &Range<usize>| (a.start + 1).saturating_sub(b.end);
    let near = axes().map(|(a, b)| gap(a, b).max(gap(b, a)).pow(2)).sum();
    let far = axes().map(|(a, b)| (a.end - 1).abs_diff(b.start).max((b.end - 1).abs_diff(a.start)).pow(2));
    [near, far.sum()]
}

impl Mask for Disc {
    #[inline(always)]
    fn visible(&self, _: &Site, query: usize, key: usize) -> bool {
        if query < self.beside || key < self.beside {
            return true;
        }
        let (_, [a, _, b]) = self.queries.spot(query - self.beside);
        let (_, [c, _, d]) = self.keys.spot(key - self.beside);
        a.abs_diff(c).pow(2) + b.abs_diff(d).pow(2) < self.squared
    }

    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        if queries.start < self.beside && !queries.is_empty() {
            return 0..site.kv_len;
        }
        let (mut start, mut end) = (usize::MAX, 0);
        for cuboid in self.queries.cuboids(queries.start - self.beside..queries.end - self.beside) {
            let [rows, cols] = self.hulls([&cuboid.axes[0], &cuboid.axes[2]]);
            let first = self.keys.token(0, [rows.start, 0, cols.start]);
            let last = self.keys.token(0, [rows.end - 1, 0, cols.end - 1]);
            (start, end) = (start.min(first + self.beside), end.max(last + 1 + self.beside));
        }
        if end > 0 && self.beside > 0 { 0..end } else { start.min(end)..end }
    }

    fn coverage(&self, _: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        if queries.end <= self.beside || keys.end <= self.beside {
            return if queries.is_empty() || keys.is_empty() { Coverage::Empty } else { Coverage::Full };
        }
        let (mut some, mut all) = (queries.start < self.beside || keys.start < self.beside, true);
        let on =
            |tokens: &Range<usize>| tokens.start.max(self.beside) - self.beside..tokens.end - self.beside;
        for here in self.queries.cuboids(on(&queries)) {
            for there in self.keys.cuboids(on(&keys)) {
                let [near, far] = distances(&here, &there);
                some |= near < self.squared;
                all &= far < self.squared;
                if some && !all {
                    return Coverage::Partial;
                }
            }
        }
        if some { Coverage::Full } else { Coverage::Empty }
    }

    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let mut word = [0];
        self.fill(query, &(first..site.kv_len.min(first + 64)), &mut word);
        word[0] & range_bits(first as isize..site.kv_len as isize, first)
    }

    fn fill_bits(&self, _: Isa, block: &Block<'_>, words: &mut [u64], stride: usize) {
        let len = block.keys.len().div_ceil(64);
        for (query, row) in block.queries.clone().zip(words.chunks_mut(stride)) {
            self.fill(query, &block.keys, &mut row[..len]);
        }
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        let tokens = [&self.queries, &self.keys].map(|order| order.grid().len().saturating_add(self.beside));
        check_tokens(tokens, dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::grid::{AXES, Grid};

    #[test]
    fn what_is_said_of_ranges_is_what_is_said_of_pairs() {
        for (shape, radius) in [([1, 9], 3), ([7, 11], 1), ([7, 11], 4), ([12, 5], 6), ([5, 6], 90)] {
            let grid = Grid::new(&shape).unwrap();
            let [queries, keys] =
                [3, 4].map(|wide| Arc::new(Order::new(grid, [1; AXES], [1, wide], [0; AXES])));
            for beside in [0, 1, 70] {
                let mask = Disc::new([queries.clone(), keys.clone()], beside, radius);
                let n = grid.len() + beside;
                let site = Site { batch: 0, head: 0, q_len: n, kv_len: n };
                let place =
                    |order: &Order, token: usize| order.grid().place(order.rows()[token - beside] as usize);
                for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let sees = i < beside || j < beside || {
                        let [[a, _, b], [c, _, d]] = [place(&queries, i), place(&keys, j)];
                        (a as f64 - c as f64).hypot(b as f64 - d as f64) < radius as f64
                    };
                    assert_eq!(mask.visible(&site, i, j), sees);
                    let bit = mask.bits(&site, i, j / 5 * 5) >> (j % 5) & 1 == 1;
                    assert_eq!(bit, sees, "{shape:?} {radius} {beside}: {i} {j}");
                    assert!(!sees || mask.hull(&site, i..i + 1).contains(&j));
                }
                for (a, b, c, d) in
                    (0..n).step_by(3).flat_map(|i| (0..n).step_by(7).map(move |j| (i, i + 5, j, j + 9)))
                {
                    let (rows, cols) = (a..b.min(n), c..d.min(n));
                    let seen = rows.clone().flat_map(|i| cols.clone().map(move |j| (i, j)));
                    let count = seen.filter(|&(i, j)| mask.visible(&site, i, j)).count();
                    match mask.coverage(&site, rows.clone(), cols.clone()) {
                        Coverage::Empty => assert_eq!(count, 0),
                        Coverage::Full => assert_eq!(count, rows.len() * cols.len()),
                        Coverage::Partial => {}
                    }
                }
            }
        }
    }
}
