//! Means over the cells of a grid of tokens (adaptive average pooling).

use std::ops::Range;

use ndarray::{Array2, ArrayView4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::simd::any::AnyRows;
use crate::simd::mem::{Heads, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// The most cells a side.
const MAX_SIDE: usize = 1024;

/// A grid of tokens, row by row, and how many cells it has a side. Cells
/// overlap where these do not divide the sides of the grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pool {
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) side: usize,
}

impl Pool {
    pub(crate) fn check(&self) -> Result<()> {
        let Self { height, width, side } = *self;
        if height > 0 && width > 0 && (1..=MAX_SIDE).contains(&side) {
            return Ok(());
        }
        let expected = format!("a grid of at least 1 x 1 and 1 to {MAX_SIDE} agents a side");
        Err(Error::value("pool", expected, format_args!("{height} x {width} and {side}")))
    }

    /// What cell `i` of `side` has of `len` rows or columns.
    fn cell(&self, i: usize, len: usize) -> Range<usize> {
        i * len / self.side..((i + 1) * len).div_ceil(self.side)
    }

    /// Rows and columns of a cell.
    fn cells(&self, cell: usize) -> [Range<usize>; 2] {
        [self.cell(cell / self.side, self.height), self.cell(cell % self.side, self.width)]
    }

    /// The means of all cells, `[batch, heads, side * side, dim]`.
    pub(crate) fn run<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        x: ArrayView4<'_, T>,
    ) -> Result<Scratch<'a>> {
        let (batch, heads, len, dim) = x.dim();
        let cells = self.side * self.side;
        let mut means = pass.rows((batch, heads, cells, dim))?;
        let (stride, tasks, workers) = (means.stride(), batch * heads * cells, parallel::threads());
        // A row of a cell.
        let room = (self.width / self.side + 2) * stride;
        let bytes = bytes_for::<u64>(claim_words(tasks)) + bytes_for_shares(workers, bytes_for::<f32>(room));
        let tokens = |len| (0..self.side).map(|i| self.cell(i, len).len()).sum::<usize>();
        let flops = || (batch * heads * tokens(self.height) * tokens(self.width) * dim) as u64;
        pass.stage(flops, bytes, |mut arena| {
            let means = Parts::new(means.numbers_mut(), stride, arena.take(claim_words(tasks)));
            let x = T::any(Heads::new(x));
            let shares = arena.shares(workers, bytes_for::<f32>(room));
            let start = |worker| shares.take(worker).take::<f32>(room);
            parallel::for_each(workers, tasks, start, |copy, task| {
                let head = task / cells;
                let x = x.rows(head / heads, head % heads, &(0..len));
                let (cell, width) = (self.cells(task % cells), self.width);
                isa.dispatch(Mean { x, cell, width, copy, to: means.take(task) });
            });
        });
        Ok(means)
    }

    /// The definition, of one head.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>) -> Array2<R> {
        Array2::from_shape_fn((self.side * self.side, x.dim().1), |(cell, c)| {
            let [rows, cols] = self.cells(cell);
            let count = R::of((rows.len() * cols.len()) as f64);
            let tokens = rows.flat_map(|y| cols.clone().map(move |x| y * self.width + x));
            R::sum(tokens.map(|t| x[[t, c]])) / count
        })
    }
}

/// The mean of a cell.
struct Mean<'a> {
    /// All tokens of the grid.
    x: AnyRows<'a>,
    cell: [Range<usize>; 2],
    width: usize,
    copy: &'a mut [f32],
    to: &'a mut [f32],
}

impl Kernel for Mean<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [rows, cols] = self.cell;
        let (stride, count) = (self.to.len(), s.splat((rows.len() * cols.len()) as f32));
        self.to.fill(0.0);
        for row in rows {
            let first = row * self.width;
            self.x.part(first + cols.start..first + cols.end).pack_rows(s, self.copy, stride);
            for (v, to) in self.to.chunks_exact_mut(S::LANES).enumerate() {
                // By itself first: sums of sums are of few numbers.
                let mut sum = s.splat(0.0);
                for i in 0..cols.len() {
                    sum = s.add(sum, s.load(&self.copy[i * stride + v * S::LANES..]));
                }
                s.store(to, s.add(s.load(to), sum));
            }
        }
        for to in self.to.chunks_exact_mut(S::LANES) {
            s.store(to, s.div(s.load(to), count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::number::Running;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::s;

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (height, width, side) in [(1, 1, 1), (5, 7, 3), (6, 4, 2), (2, 3, 4), (14, 15, 7), (1, 90, 4)] {
            let pool = Pool { height, width, side };
            for (dim, isa) in
                [1, 12, 16, 33].into_iter().flat_map(|dim| Isa::available().map(move |isa| (dim, isa)))
            {
                let x = array(dim as u64, (2, 3, height * width, dim));
                let got = alone(|pass| Ok(pool.run(pass, isa, x.view())?.view().to_owned()));
                for (b, h) in [(0, 0), (1, 2)] {
                    let want = pool
                        .define::<Running>(&x.slice(s![b, h, .., ..]).map(|&x| Running::of(f64::from(x))));
                    for (got, want) in got.slice(s![b, h, .., ..]).iter().zip(&want) {
                        let share = (f64::from(*got) - want.value()).abs() / want.off().max(1e-300);
                        assert!(share <= 1.0, "{isa} {pool:?}, {dim} columns: {got}, not {want:?}");
                        worst = worst.max(share);
                    }
                }
            }
        }
        println!("pool: {worst:.3} of the bound");
    }

    #[test]
    fn cells_are_those_of_adaptive_pooling() {
        let pool = |len, side| {
            let pool = Pool { height: len, width: 1, side };
            (0..side).map(|i| pool.cell(i, len)).collect::<Vec<_>>()
        };
        assert_eq!(pool(5, 3), [0..2, 1..4, 3..5]);
        assert_eq!(pool(6, 3), [0..2, 2..4, 4..6]);
        assert_eq!(pool(3, 4), [0..1, 0..2, 1..3, 2..3]);
        assert_eq!(pool(10, 4), [0..3, 2..5, 5..8, 7..10]);
        // A token is in every cell that it has a part of.
        for (height, width, side) in [(5, 7, 3), (6, 4, 2), (2, 3, 4), (14, 15, 7)] {
            let pool = Pool { height, width, side };
            let within =
                |row: usize, y: usize, len: usize| row * len < (y + 1) * side && y * side < (row + 1) * len;
            for (cell, y, x) in ndarray::indices((side * side, height, width)) {
                let [rows, cols] = pool.cells(cell);
                let has = within(cell / side, y, height) && within(cell % side, x, width);
                assert_eq!(rows.contains(&y) && cols.contains(&x), has);
            }
        }
    }
}
