//! A grid cut into regions: neighbouring queries, and the keys that one of them
//! or another sees.
//!
//! Where windows are small, the keys of a few neighbouring queries are few, and
//! their mask is that of many other regions: all but those at a border have the
//! same. So a region is a sequence of its own, whose keys are gathered into one
//! packed tile, and its mask is looked up instead of found.
//!
//! A query sees a range on each axis that depends on its place on that axis
//! alone, and so regions are products of pieces of axes, and kinds of regions
//! those of kinds of pieces.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::keys::grid::{AXES, Grid, Order};
use crate::keys::images::{Each, Images};

/// Keys that all regions may list together, for each token: lists beyond it cost
/// more than they save.
const MOST: usize = 32;

/// What a place sees of an axis: of the axis, the place and the size of its
/// residue class.
pub(crate) type Reach<'a> = &'a dyn Fn(usize, usize, usize) -> Range<usize>;

/// What regions of one kind have in common. Queries and keys are counted from
/// the first of the region.
#[derive(Clone, Debug)]
pub(crate) struct Kind {
    /// Whether every query sees every key.
    pub(crate) whole: bool,
    /// Bits of the keys that each query sees, `words` for each.
    bits: Vec<u64>,
    pub(crate) words: usize,
    /// Places of its queries and keys in the first region of the kind.
    pub(crate) places: [Vec<[usize; AXES]>; 2],
}

impl Kind {
    /// The bits of a query.
    #[inline(always)]
    pub(crate) fn row(&self, query: usize) -> &[u64] {
        &self.bits[query * self.words..][..self.words]
    }
}

/// Regions of a grid of queries and a grid of keys, or of several images.
#[derive(Clone, Debug, Default)]
pub(crate) struct Regions {
    /// Rows of the arrays, region by region.
    pub(crate) queries: Vec<u32>,
    pub(crate) keys: Vec<u32>,
    /// Where regions start in these lists, and where the last one ends.
    pub(crate) query_cuts: Vec<usize>,
    pub(crate) key_cuts: Vec<usize>,
    /// The batch entry of each, where entries have regions of their own.
    pub(crate) entries: Option<Vec<u32>>,
    /// The kind of each region.
    pub(crate) of: Vec<u32>,
    pub(crate) kinds: Vec<Kind>,
}

/// A piece of an axis of a residue class.
#[derive(Clone, Debug)]
struct Piece {
    queries: Range<usize>,
    keys: Range<usize>,
    /// Equal where what its queries see, counted from its first key, and how far
    /// that is from the first query, are equal.
    kind: usize,
}

/// Pieces of `side` queries of an axis, with the kinds that there are so far.
fn pieces(
    kinds: &mut Vec<(isize, Vec<Range<usize>>)>,
    queries: usize,
    side: usize,
    reach: impl Fn(usize) -> Range<usize>,
) -> Vec<Piece> {
    let piece = |start: usize| {
        let queries = start..(start + side).min(queries);
        let seen: Vec<_> = queries.clone().map(&reach).collect();
        let first = seen.iter().map(|range| range.start).min().unwrap_or(0);
        let end = seen.iter().map(|range| range.end).max().unwrap_or(0).max(first);
        let seen: Vec<_> = seen.iter().map(|range| range.start - first..range.end - first).collect();
        let kind = (first as isize - start as isize, seen);
        let known = kinds.iter().position(|other| *other == kind);
        let kind = known.unwrap_or_else(|| {
            kinds.push(kind);
            kinds.len() - 1
        });
        Piece { queries, keys: first..end, kind }
    };
    (0..queries).step_by(side.max(1)).map(piece).collect()
}

/// Every place of a box, the last axis innermost.
fn places(axes: &[Range<usize>; AXES]) -> impl Iterator<Item = [usize; AXES]> + '_ {
    let [a, b, c] = axes;
    a.clone().flat_map(move |a| b.clone().flat_map(move |b| c.clone().map(move |c| [a, b, c])))
}

impl Regions {
    /// Regions of `sides` queries, in the orders in which tokens have their places;
    /// `None` where lists of their keys would be too long. Both ends of what
    /// places see never fall when the place rises.
    pub(crate) fn new(
        queries: &Arc<Order>,
        keys: &Arc<Order>,
        reach: Reach<'_>,
        sides: [usize; AXES],
    ) -> Option<Self> {
        let images = Images::one(*queries.grid());
        Self::of_images(&images, &Each::one([queries.clone(), keys.clone()]), reach, |_| Some(sides))
    }

    /// The same of several images, each in orders of its own and with regions of its
    /// own sides.
    pub(crate) fn of_images(
        images: &Images,
        orders: &Each<[Arc<Order>; 2]>,
        reach: Reach<'_>,
        sides: impl Fn(Grid) -> Option<[usize; AXES]>,
    ) -> Option<Self> {
        let mut making = Making::default();
        let (mut ends, entries) = (Vec::new(), images.entries());
        for (image, &grid) in images.grids().iter().enumerate() {
            let orders = orders.at(image).each_ref().map(|order| &**order);
            let tokens = orders.iter().map(|order| order.grid().len()).sum::<usize>();
            let row = |token: u32| images.row(image, token as usize) as u32;
            making.add(making.to.keys.len() + MOST * tokens, orders, reach, sides(grid)?, row)?;
            ends.push(making.to.len());
        }
        let image = |region| ends.partition_point(|&end| end <= region);
        let of = |entries: Vec<u32>| (0..making.to.len()).map(|region| entries[image(region)]).collect();
        Some(Self { entries: entries.map(of), ..making.to })
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.of.len()
    }

    /// The kind of a sequence's region, by its number in a batch.
    #[inline(always)]
    pub(crate) fn kind(&self, sequence: usize) -> (usize, &Kind) {
        let kind = self.of[sequence % self.len()] as usize;
        (kind, &self.kinds[kind])
    }
}

/// Regions, and the kinds that there are so far.
#[derive(Default)]
struct Making {
    to: Regions,
    /// Of each axis, and of regions the kind that three of those are.
    axis_kinds: [Vec<(isize, Vec<Range<usize>>)>; AXES],
    known: HashMap<[usize; AXES], u32>,
}

impl Making {
    /// Adds those of an image, whose tokens lie where `row` says, if all together
    /// list no more than so many keys.
    fn add(
        &mut self,
        most: usize,
        [queries, keys]: [&Order; 2],
        reach: Reach<'_>,
        sides: [usize; AXES],
        row: impl Fn(u32) -> u32,
    ) -> Option<()> {
        let Self { to, axis_kinds, known } = self;
        if to.query_cuts.is_empty() {
            (to.query_cuts, to.key_cuts) = (vec![0], vec![0]);
        }
        for class in 0..queries.classes() {
            let [own, other] = [queries, keys].map(|order| order.class(class));
            let pieces: [Vec<Piece>; AXES] = std::array::from_fn(|axis| {
                let of = |at| reach(axis, at, other.sizes[axis]);
                pieces(&mut axis_kinds[axis], own.sizes[axis], sides[axis].max(1), of)
            });
            let count = pieces.each_ref().map(|pieces| 0..pieces.len());
            for at in places(&count) {
                let pieces: [&Piece; AXES] = std::array::from_fn(|axis| &pieces[axis][at[axis]]);
                let (here, there) = (pieces.map(|x| x.queries.clone()), pieces.map(|x| x.keys.clone()));
                if to.keys.len() + there.iter().map(Range::len).product::<usize>() > most {
                    return None;
                }
                let row = |order: &Order, at| row(order.rows()[order.token(class, at)]);
                to.queries.extend(places(&here).map(|at| row(queries, at)));
                to.keys.extend(places(&there).map(|at| row(keys, at)));
                to.query_cuts.push(to.queries.len());
                to.key_cuts.push(to.keys.len());
                let kind = pieces.map(|piece| piece.kind);
                let index = *known.entry(kind).or_insert_with(|| {
                    let seen = std::array::from_fn(|axis| &axis_kinds[axis][kind[axis]].1[..]);
                    to.kinds.push(Kind::new(&seen, &there, [queries, keys], class, &here));
                    to.kinds.len() as u32 - 1
                });
                to.of.push(index);
            }
        }
        Some(())
    }
}

impl Kind {
    /// `seen` are the keys that each query sees on each axis, from the first of
    /// `there` on.
    fn new(
        seen: &[&[Range<usize>]; AXES],
        there: &[Range<usize>; AXES],
        orders: [&Order; 2],
        class: usize,
        here: &[Range<usize>; AXES],
    ) -> Self {
        let sizes = there.each_ref().map(Range::len);
        let len = sizes.iter().product::<usize>();
        let words = len.div_ceil(64);
        let local = here.each_ref().map(|axis| 0..axis.len());
        let mut bits = Vec::new();
        for at in places(&local) {
            let mut row = vec![0u64; words];
            let inside: [_; AXES] = std::array::from_fn(|axis| seen[axis][at[axis]].clone());
            for [a, b, c] in places(&inside) {
                let key = (a * sizes[1] + b) * sizes[2] + c;
                row[key / 64] |= 1 << (key % 64);
            }
            bits.extend(row);
        }
        let count = bits.iter().map(|word| word.count_ones() as usize).sum::<usize>();
        let place = |order: &Order, at| order.place(order.token(class, at));
        let places = [
            places(here).map(|at| place(orders[0], at)).collect(),
            places(there).map(|at| place(orders[1], at)).collect(),
        ];
        let whole = count == here.iter().map(Range::len).product::<usize>() * len;
        Self { whole, bits, words, places }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::REACHES;

    #[test]
    fn regions_hold_each_visible_pair_once() {
        for shape in [&[0][..], &[7], &[150], &[2, 3], &[1, 5], &[13, 11], &[2, 2, 2], &[5, 3, 7]] {
            let grid = Grid::new(shape).unwrap();
            for (step, tile, roll) in
                [([1, 1, 1], [1, 4], [1, 0, 2]), ([2, 1, 3], [2, 3], [0; 3]), ([1, 2, 1], [9, 9], [0; 3])]
            {
                let [queries, keys] = [tile, [3, 2]].map(|tile| Order::new(grid, step, tile, roll));
                for (reach, sides) in
                    REACHES.iter().zip([[1, 1, 1], [2, 1, 3], [4, 3, 4], [9, 9, 9], [1, 2, 50]])
                {
                    let mut making = Making::default();
                    making.add(usize::MAX, [&queries, &keys], reach, sides, |row| row).unwrap();
                    let regions = making.to;
                    let mut seen = HashMap::new();
                    for region in 0..regions.len() {
                        let (_, kind) = regions.kind(region + 3 * regions.len());
                        let [own, other] = [
                            &regions.queries[regions.query_cuts[region]..regions.query_cuts[region + 1]],
                            &regions.keys[regions.key_cuts[region]..regions.key_cuts[region + 1]],
                        ];
                        assert!(own.len() <= sides.iter().product());
                        assert_eq!([own.len(), other.len()], kind.places.each_ref().map(Vec::len));
                        let mut hidden = 0;
                        for (i, &query) in own.iter().enumerate() {
                            for (j, &key) in other.iter().enumerate() {
                                let sees = kind.row(i)[j / 64] >> (j % 64) & 1 == 1;
                                hidden += usize::from(!sees);
                                let known = seen.insert((query, key), sees);
                                assert_eq!(known, None, "a pair in one region alone");
                                // Distances are those of the first region of the kind.
                                let apart = [(&queries, query), (&keys, key)].map(|(order, row)| {
                                    let token = order.rows().iter().position(|&other| other == row).unwrap();
                                    order.place(token)
                                });
                                for axis in 0..AXES {
                                    assert_eq!(
                                        apart[1][axis] as isize - apart[0][axis] as isize,
                                        kind.places[1][j][axis] as isize - kind.places[0][i][axis] as isize,
                                    );
                                }
                            }
                        }
                        assert_eq!(kind.whole, hidden == 0);
                    }
                    let tokens = 0..grid.len();
                    for (i, j) in tokens.clone().flat_map(|i| tokens.clone().map(move |j| (i, j))) {
                        let ((class, at), (other, place)) = (queries.spot(i), keys.spot(j));
                        let sizes = keys.class(class).sizes;
                        let inside =
                            (0..AXES).all(|axis| reach(axis, at[axis], sizes[axis]).contains(&place[axis]));
                        let pair = (queries.rows()[i], keys.rows()[j]);
                        let sees = seen.get(&pair).copied().unwrap_or(false);
                        assert_eq!(sees, class == other && inside, "{shape:?} {step:?} {sides:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn lists_that_are_too_long_are_refused() {
        let order = Arc::new(Order::plain(Grid::new(&[80, 80]).unwrap(), [0; AXES]));
        assert!(Regions::new(&order, &order, &|_, _, size| 0..size, [4, 1, 4]).is_none());
        assert!(Regions::new(&order, &order, &|_, at, _| at..at + 1, [4, 1, 4]).is_some());
    }
}
