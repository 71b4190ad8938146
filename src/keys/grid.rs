//! Tokens on a grid: sequences, images and volumes, and the orders in which an
//! engine takes them.
//!
//! A row order sorts the tokens so that those which are near each other on the
//! grid are near each other in the order: the window of a query is then a few
//! long runs of keys. First come residue classes (of a dilation, where only
//! tokens of the same class meet), then columns: tiles of the last axes that
//! run along the whole first axis. Inside a column tokens go row by row.
//!
//! ```text
//! 4 x 6, columns of width 4:       0  1  2  3 | 16 17
//!                                  4  5  6  7 | 18 19
//!                                  8  9 10 11 | 20 21
//!                                 12 13 14 15 | 22 23
//! ```

use std::ops::Range;

use crate::error::{Error, Result};

/// The most axes that a grid has.
pub(crate) const AXES: usize = 3;

/// Sizes of a sequence, an image or a volume, the innermost axis last.
///
/// Token `(y, x)` of an image of width `w` is row `y * w + x` of the arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Of one axis `[1, 1, n]`, of two `[n, 1, m]`: columns run along the
    /// first, and rows of tokens along the last.
    sizes: [usize; AXES],
    axes: usize,
}

impl Grid {
    /// A grid of 1, 2 or 3 axes.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of axes, and for 2^32 tokens or
    /// more.
    pub fn new(shape: &[usize]) -> Result<Self> {
        let tokens = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        if shape.is_empty() || shape.len() > AXES || tokens.is_none_or(|n| u32::try_from(n).is_err()) {
            return Err(Error::shape("shape", "1 to 3 axes with fewer than 2^32 tokens", shape));
        }
        Ok(Self { sizes: Self::spread(shape, 1), axes: shape.len() })
    }

    /// The sizes of the squarest image of so many tokens.
    pub(crate) fn squarest(tokens: usize) -> [usize; 2] {
        let height = (1..=tokens.isqrt()).rev().find(|n| tokens.is_multiple_of(*n)).unwrap_or(1);
        [height, tokens / height]
    }

    /// The largest window of at most so many places that divides an axis.
    pub(crate) fn divisor(size: usize, most: usize) -> usize {
        (1..=most).rev().find(|window| size.is_multiple_of(*window)).unwrap_or(1)
    }

    /// Puts what belongs to the axes of a shape where the grid has them, and
    /// `other` where it has none.
    pub(crate) fn spread<T: Copy>(of_axes: &[T], other: T) -> [T; AXES] {
        match *of_axes {
            [c] => [other, other, c],
            [a, c] => [a, other, c],
            [a, b, c] => [a, b, c],
            _ => [other; AXES],
        }
    }

    /// How many axes it has.
    pub fn axes(&self) -> usize {
        self.axes
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A grid of as many axes without tokens.
    pub(crate) fn none(&self) -> Self {
        Self { sizes: [0; AXES], axes: self.axes }
    }

    pub(crate) fn sizes(&self) -> [usize; AXES] {
        self.sizes
    }

    /// Where a row of the arrays lies.
    #[inline(always)]
    pub(crate) fn place(&self, row: usize) -> [usize; AXES] {
        let [_, b, c] = self.sizes;
        [row / (b * c), row / c % b, row % c]
    }

    /// The row of the arrays at a place.
    #[inline(always)]
    pub(crate) fn row(&self, at: [usize; AXES]) -> usize {
        let [_, b, c] = self.sizes;
        (at[0] * b + at[1]) * c + at[2]
    }
}

/// Tokens of a residue class: its places `at` are places `at * step + offset`
/// of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    /// The first of its tokens in the order.
    pub(crate) start: usize,
    pub(crate) offset: [usize; AXES],
    pub(crate) sizes: [usize; AXES],
}

/// Some places of a class: all that lie between two on every axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cuboid {
    pub(crate) class: usize,
    pub(crate) axes: [Range<usize>; AXES],
}

/// A column of a class.
#[derive(Clone, Debug)]
pub(crate) struct Column {
    /// The first of its tokens in the order.
    pub(crate) start: usize,
    /// Places on the second and on the third axis.
    pub(crate) axes: [Range<usize>; 2],
}

impl Column {
    /// Tokens of one place on the first axis: neighbours in the order.
    #[inline(always)]
    pub(crate) fn period(&self) -> usize {
        self.axes[0].len() * self.axes[1].len()
    }
}

/// An order of the tokens of a grid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    grid: Grid,
    step: [usize; AXES],
    tile: [usize; 2],
    classes: Vec<Class>,
    /// The row of the arrays of each token of the order.
    rows: Vec<u32>,
    /// The class of each token of the order, and its place there.
    spots: Vec<(u32, [u32; AXES])>,
}

impl Order {
    /// Classes of the residues of `step`, columns of `tile` on the last two
    /// axes, and the grid rolled: place `p` of the order is place `p + roll` of
    /// the grid, past the end from the start on.
    pub(crate) fn new(grid: Grid, step: [usize; AXES], tile: [usize; 2], roll: [usize; AXES]) -> Self {
        let sizes = grid.sizes;
        let tile = tile.map(|width| width.max(1));
        let step: [usize; AXES] = std::array::from_fn(|axis| step[axis].clamp(1, sizes[axis].max(1)));
        let mut order = Self { grid, step, tile, classes: Vec::new(), rows: Vec::new(), spots: Vec::new() };
        let residues = Grid { sizes: step, axes: AXES };
        for class in 0..residues.len() {
            let offset = residues.place(class);
            let sizes =
                std::array::from_fn(|axis| sizes[axis].saturating_sub(offset[axis]).div_ceil(step[axis]));
            order.classes.push(Class { start: order.rows.len(), offset, sizes });
            let columns = order.columns(class, [0..sizes[1], 0..sizes[2]]);
            for column in columns.collect::<Vec<_>>() {
                for a in 0..sizes[0] {
                    for b in column.axes[0].clone() {
                        for c in column.axes[1].clone() {
                            let at = [a, b, c];
                            let place = std::array::from_fn(|axis| {
                                let place = at[axis] * step[axis] + offset[axis] + roll[axis];
                                place % grid.sizes[axis]
                            });
                            order.rows.push(grid.row(place) as u32);
                            order.spots.push((class as u32, at.map(|x| x as u32)));
                        }
                    }
                }
            }
        }
        order
    }

    /// The order in which the arrays lie, for definitions: places are those of
    /// the rolled grid, and it has no columns that are.
    pub(crate) fn plain(grid: Grid, roll: [usize; AXES]) -> Self {
        let [_, b, c] = grid.sizes;
        let mut order = Self::new(grid, [1; AXES], [b, c], [0; AXES]);
        for (row, (_, at)) in order.spots.iter_mut().enumerate() {
            let place = grid.place(row);
            *at = std::array::from_fn(|axis| {
                ((place[axis] + grid.sizes[axis] - roll[axis]) % grid.sizes[axis]) as u32
            });
        }
        order
    }

    /// The same of rows that lie at any places: there are neither columns nor
    /// neighbours.
    pub(crate) fn of_places(axes: usize, places: impl Iterator<Item = [usize; AXES]>) -> Self {
        let spots: Vec<_> = places.map(|at| (0, at.map(|x| x as u32))).collect();
        let sizes = [1, 1, spots.len()];
        let classes = vec![Class { start: 0, offset: [0; AXES], sizes }];
        let rows = (0..spots.len() as u32).collect();
        Self { grid: Grid { sizes, axes }, step: [1; AXES], tile: [1, 1], classes, rows, spots }
    }

    pub(crate) fn grid(&self) -> &Grid {
        &self.grid
    }

    pub(crate) fn step(&self) -> [usize; AXES] {
        self.step
    }

    /// The row of the arrays of each token of the order.
    pub(crate) fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// How many classes there are.
    pub(crate) fn classes(&self) -> usize {
        self.classes.len()
    }

    pub(crate) fn class(&self, class: usize) -> &Class {
        &self.classes[class]
    }

    /// The class of a token of the order, and its place there.
    #[inline(always)]
    pub(crate) fn spot(&self, token: usize) -> (usize, [usize; AXES]) {
        let (class, at) = self.spots[token];
        (class as usize, at.map(|x| x as usize))
    }

    /// The place of a token of the order on the grid, before it is rolled.
    #[inline(always)]
    pub(crate) fn place(&self, token: usize) -> [usize; AXES] {
        let (class, at) = self.spot(token);
        let offset = self.classes[class].offset;
        std::array::from_fn(|axis| at[axis] * self.step[axis] + offset[axis])
    }

    /// How many tokens from this one on are neighbours on the last axis: at
    /// least 1.
    #[inline(always)]
    pub(crate) fn neighbours(&self, token: usize) -> usize {
        let (class, at) = self.spot(token);
        let end = (at[2] / self.tile[1] + 1) * self.tile[1];
        end.min(self.classes[class].sizes[2]) - at[2]
    }

    /// The columns of a class that have some of these places of the second and
    /// the third axis.
    #[inline(always)]
    pub(crate) fn columns(&self, class: usize, axes: [Range<usize>; 2]) -> impl Iterator<Item = Column> {
        let Class { start, sizes: [a, b, c], .. } = self.classes[class];
        let tile = self.tile;
        let [high, wide] = axes.map(|axis| if axis.is_empty() { 0..0 } else { axis });
        (high.start / tile[0]..high.end.div_ceil(tile[0])).flat_map(move |i| {
            let rows = i * tile[0]..((i + 1) * tile[0]).min(b);
            (wide.start / tile[1]..wide.end.div_ceil(tile[1])).map(move |j| {
                let cols = j * tile[1]..((j + 1) * tile[1]).min(c);
                let before = rows.start * c + rows.len() * cols.start;
                Column { start: start + a * before, axes: [rows.clone(), cols] }
            })
        })
    }

    /// The token of the order at a place of a class.
    #[inline(always)]
    pub(crate) fn token(&self, class: usize, at: [usize; AXES]) -> usize {
        let Class { start, sizes: [a, b, c], .. } = self.classes[class];
        let [rows, cols] = [(at[1], self.tile[0], b), (at[2], self.tile[1], c)]
            .map(|(at, tile, size)| at / tile * tile..(at / tile * tile + tile).min(size));
        let column = start + a * (rows.start * c + rows.len() * cols.start);
        column + (at[0] * rows.len() + at[1] - rows.start) * cols.len() + at[2] - cols.start
    }

    /// Cuboids that hold the tokens of a range, one for each column.
    pub(crate) fn cuboids(&self, tokens: Range<usize>) -> impl Iterator<Item = Cuboid> {
        let mut next = tokens.start;
        std::iter::from_fn(move || {
            if next >= tokens.end {
                return None;
            }
            let (class, at) = self.spot(next);
            let column = self.columns(class, [at[1]..at[1] + 1, at[2]..at[2] + 1]).next()?;
            let end = column.start + self.classes[class].sizes[0] * column.period();
            let last = self.spot(tokens.end.min(end) - 1).1;
            next = end;
            let [high, wide] = column.axes;
            Some(Cuboid { class, axes: [at[0]..last[0] + 1, high, wide] })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_permutations_that_know_their_places() {
        for shape in [&[0][..], &[1], &[7], &[2, 5], &[5, 0], &[4, 9], &[3, 4, 5], &[2, 1, 6]] {
            let grid = Grid::new(shape).unwrap();
            assert_eq!(grid.axes(), shape.len());
            assert_eq!(grid.is_empty(), shape.contains(&0));
            for (step, tile, roll) in
                [([1, 1, 1], [1, 4], [0; 3]), ([1, 2, 3], [2, 2], [0; 3]), ([2, 1, 1], [9, 3], [1, 0, 2])]
            {
                let order = Order::new(grid, step, tile, roll);
                let mut seen = vec![false; grid.len()];
                for token in 0..grid.len() {
                    let (class, at) = order.spot(token);
                    assert_eq!(order.token(class, at), token, "{shape:?} {step:?} {tile:?}");
                    let row = order.rows()[token] as usize;
                    let offset = order.class(class).offset;
                    let place: [usize; AXES] = std::array::from_fn(|axis| {
                        (at[axis] * order.step()[axis] + offset[axis] + roll[axis]) % grid.sizes()[axis]
                    });
                    assert_eq!(place, grid.place(row));
                    assert!(!std::mem::replace(&mut seen[row], true), "each row once");
                }
                for (start, end) in (0..=grid.len()).flat_map(|i| (i..=grid.len()).map(move |j| (i, j))) {
                    let cuboids: Vec<_> = order.cuboids(start..end).collect();
                    for token in start..end {
                        let (class, at) = order.spot(token);
                        let holds = |cuboid: &&Cuboid| {
                            cuboid.class == class
                                && cuboid.axes.iter().zip(at).all(|(axis, x)| axis.contains(&x))
                        };
                        assert_eq!(cuboids.iter().filter(holds).count(), 1, "{token} of {start}..{end}");
                    }
                }
            }
            let plain = Order::plain(grid, [0; AXES]);
            assert!(plain.rows().iter().enumerate().all(|(token, &row)| token == row as usize));
        }
    }

    #[test]
    fn grids_that_cannot_be_are_refused() {
        for shape in [&[][..], &[1, 1, 1, 1], &[1 << 16, 1 << 16], &[usize::MAX, 2]] {
            assert!(
                Grid::new(shape).unwrap_err().to_string().starts_with("shape: expected shape 1 to 3 axes")
            );
        }
    }
}
