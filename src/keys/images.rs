//! Images of their own shapes in one batch: which rows of the arrays are the
//! tokens of each.

use crate::error::{Error, Result};
use crate::input::Dims;
use crate::keys::grid::{AXES, Grid, Order};

/// The images of a batch.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    grids: Vec<Grid>,
    lie: Lie,
    /// An image of no tokens.
    empty: Grid,
    /// Rows of the arrays.
    len: usize,
}

/// How images lie in the rows.
#[derive(Clone, Debug)]
enum Lie {
    /// In every batch entry one after the other, each from this row on.
    Packed(Vec<usize>),
    /// In each batch entry one, in the first places of a grid of this size.
    Padded(Grid),
}

/// Where a row lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) image: usize,
    /// The sizes of the image, and a place of it.
    pub(crate) sizes: [usize; AXES],
    pub(crate) place: [usize; AXES],
}

impl Images {
    /// One image in every batch entry.
    pub(crate) fn one(grid: Grid) -> Self {
        Self { grids: vec![grid], lie: Lie::Packed(vec![0]), empty: grid.none(), len: grid.len() }
    }

    /// Images of these shapes, one after the other in the rows; of none, as many
    /// `axes`.
    pub(crate) fn packed(shapes: &[Vec<usize>], axes: usize) -> Result<Self> {
        let (mut grids, mut starts, mut len) = (Vec::new(), Vec::new(), 0usize);
        let axes = shapes.first().map_or(axes, Vec::len);
        for (image, shape) in shapes.iter().enumerate() {
            if shape.len() != axes {
                let got = format_args!("{} of image {image}", shape.len());
                return Err(Error::value("shapes", format!("{axes} axes as image 0 has them"), got));
            }
            let grid = Grid::new(shape)?;
            grids.push(grid);
            starts.push(len);
            len = len.saturating_add(grid.len());
        }
        if u32::try_from(len).is_err() {
            return Err(Error::value("shapes", "fewer than 2^32 tokens", len));
        }
        let empty = Grid::new(&vec![0; axes])?;
        Ok(Self { grids, lie: Lie::Packed(starts), empty, len })
    }

    /// One image in each batch entry, which fills so many of the first places of a
    /// shape on each axis.
    pub(crate) fn padded(shape: &[usize], extents: &[Vec<usize>]) -> Result<Self> {
        let (outer, mut grids) = (Grid::new(shape)?, Vec::new());
        for (entry, extent) in extents.iter().enumerate() {
            let fits = extent.len() == shape.len() && extent.iter().zip(shape).all(|(own, all)| own <= all);
            if !fits {
                let got = format_args!("{extent:?} for batch entry {entry}");
                return Err(Error::value("extents", format!("at most {shape:?}"), got));
            }
            grids.push(Grid::new(extent)?);
        }
        Ok(Self { grids, lie: Lie::Padded(outer), empty: outer.none(), len: outer.len() })
    }

    pub(crate) fn grids(&self) -> &[Grid] {
        &self.grids
    }

    /// Axes of each.
    pub(crate) fn axes(&self) -> usize {
        self.empty.axes()
    }

    /// Rows of the arrays.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether there is one, in all rows of every batch entry.
    pub(crate) fn is_one(&self) -> bool {
        matches!(self.lie, Lie::Packed(_)) && self.grids.len() == 1
    }

    /// The batch entry of each image, if each entry has one of its own.
    pub(crate) fn entries(&self) -> Option<Vec<u32>> {
        match self.lie {
            Lie::Packed(_) => None,
            Lie::Padded(_) => Some((0..self.grids.len() as u32).collect()),
        }
    }

    /// Batch entry and row of what is padding.
    pub(crate) fn rest(&self) -> Vec<(u32, u32)> {
        let entries = self.entries().map_or(0, |entries| entries.len());
        let rows = (0..entries).flat_map(|entry| (0..self.len).map(move |row| (entry, row)));
        let padding = rows.filter(|&(entry, row)| self.spot(entry, row).is_none());
        padding.map(|(entry, row)| (entry as u32, row as u32)).collect()
    }

    /// Tokens of a batch of so many entries.
    pub(crate) fn tokens(&self, batch: usize) -> usize {
        match self.lie {
            Lie::Packed(_) => batch * self.len,
            Lie::Padded(_) => self.grids.iter().map(Grid::len).sum(),
        }
    }

    /// The row of the arrays in which a token of an image lies, given its number in
    /// the image alone.
    pub(crate) fn row(&self, image: usize, token: usize) -> usize {
        match &self.lie {
            Lie::Packed(starts) => starts[image] + token,
            Lie::Padded(outer) => outer.row(self.grids[image].place(token)),
        }
    }

    /// Where a row of a batch entry lies, unless it is padding.
    pub(crate) fn spot(&self, entry: usize, row: usize) -> Option<Spot> {
        let (image, place) = match &self.lie {
            Lie::Packed(starts) => {
                let image = starts.partition_point(|&start| start <= row).checked_sub(1)?;
                (image, self.grids[image].place(row - starts[image]))
            }
            Lie::Padded(outer) => (entry, outer.place(row)),
        };
        let sizes = self.grids.get(image)?.sizes();
        let inside = place.iter().zip(&sizes).all(|(at, size)| at < size);
        inside.then_some(Spot { image, sizes, place })
    }

    /// The rows as they lie, for definitions: places are those of each image.
    pub(crate) fn plain(&self) -> Order {
        match &self.lie {
            Lie::Padded(outer) => Order::plain(*outer, [0; AXES]),
            Lie::Packed(_) => {
                let places = self.grids.iter().flat_map(|grid| (0..grid.len()).map(|row| grid.place(row)));
                Order::of_places(self.axes(), places)
            }
        }
    }

    /// Refuses queries and keys that are not so many tokens, and a batch that does not
    /// have so many images.
    pub(crate) fn check(&self, dims: &Dims) -> Result<()> {
        check_tokens([self.len; 2], dims)?;
        match self.lie {
            Lie::Padded(_) if dims.batch != self.grids.len() => {
                let expected = format!("a batch of {}, one entry for each of the extents", self.grids.len());
                Err(Error::value("q", expected, dims.batch))
            }
            _ => Ok(()),
        }
    }
}

/// Refuses queries and keys that are not so many tokens.
pub(crate) fn check_tokens(tokens: [usize; 2], dims: &Dims) -> Result<()> {
    if dims.packed {
        return Err(Error::packed("a spatial shape"));
    }
    for ((argument, len), tokens) in [("q", dims.q_len), ("k", dims.kv_len)].into_iter().zip(tokens) {
        if len != tokens {
            let expected = format!("one row for each of the {tokens} tokens of the shape");
            return Err(Error::value(argument, expected, len));
        }
    }
    Ok(())
}

/// What belongs to the sequences of a batch, of which many may have the same.
#[derive(Clone, Debug)]
pub(crate) struct Each<T> {
    all: Vec<T>,
    of: Vec<u32>,
}

impl<T> Each<T> {
    /// The same for all.
    pub(crate) fn one(x: T) -> Self {
        Self { all: vec![x], of: vec![0] }
    }

    /// One for each of the images, made once for those of a shape.
    pub(crate) fn of_images(images: &Images, make: impl Fn(Grid) -> T) -> Self {
        let (mut known, mut all, mut of) = (std::collections::HashMap::new(), Vec::new(), Vec::new());
        for &grid in images.grids() {
            let index = *known.entry(grid).or_insert_with(|| {
                all.push(make(grid));
                all.len() - 1
            });
            of.push(index as u32);
        }
        if all.is_empty() {
            all.push(make(images.empty));
        }
        Self { all, of }
    }

    pub(crate) fn map<U>(&self, f: impl FnMut(&T) -> U) -> Each<U> {
        Each { all: self.all.iter().map(f).collect(), of: self.of.clone() }
    }

    /// All that there are, in no order of sequences.
    pub(crate) fn all(&self) -> &[T] {
        &self.all
    }

    /// Whether it is the same for all.
    pub(crate) fn is_shared(&self) -> bool {
        self.all.len() == 1
    }

    /// That of a sequence.
    #[inline(always)]
    pub(crate) fn at(&self, sequence: usize) -> &T {
        match &self.all[..] {
            [one] => one,
            all => &all[self.of[sequence % self.of.len()] as usize],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_its_row() {
        let shapes = [vec![3, 4], vec![0, 5], vec![1, 7], vec![2, 2]];
        for images in [Images::packed(&shapes, 2).unwrap(), Images::padded(&[4, 7], &shapes).unwrap()] {
            let mut seen = 0;
            for (image, grid) in images.grids().iter().enumerate() {
                for token in 0..grid.len() {
                    let (row, entry) = (images.row(image, token), images.entries().map_or(1, |_| image));
                    let spot = Spot { image, sizes: grid.sizes(), place: grid.place(token) };
                    assert_eq!(images.spot(entry, row), Some(spot));
                    seen += 1;
                }
            }
            assert_eq!(seen, images.tokens(1));
            let entries = images.entries().map_or(1, |entries| entries.len());
            let rows = (0..entries).flat_map(|b| (0..images.len()).map(move |row| (b, row)));
            assert_eq!(rows.clone().filter(|&(b, row)| images.spot(b, row).is_some()).count(), seen);
            assert_eq!(images.rest().len(), rows.count() - seen);
            assert_eq!(images.plain().rows().len(), images.len());
        }
    }
}
