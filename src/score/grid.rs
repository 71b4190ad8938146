//! A bias for each offset between two places of a grid.

use std::ops::Range;
use std::sync::Arc;

use ndarray::ArrayViewD;

use super::smooth::{Sums, add_each, total};
use super::{Score, Smooth, define_shift, shift, shift_each};
use crate::error::{Error, Result};
use crate::input::{Dims, Site};
use crate::keys::grid::{AXES, Grid, Order};
use crate::keys::regions::Regions;
use crate::simd::Simd;

/// Adds `table[head, (key - query) / step + reach - 1]`, one index for each
/// axis of the grid. What the table does not reach stays as it is: it must be
/// masked.
///
/// Queries and keys are counted in the orders that it is made with.
#[derive(Clone, Debug)]
pub(crate) struct Offsets {
    /// `[heads, extents]`
    table: Arc<[f32]>,
    heads: usize,
    extents: [usize; AXES],
    step: [usize; AXES],
    queries: Arc<Order>,
    keys: Arc<Order>,
}

impl Offsets {
    /// A table `[heads | 1, 2 reach - 1, ..]`, one axis for each of the grid.
    /// `step` is how far apart places are whose offset is 1.
    pub(crate) fn new(
        table: ArrayViewD<'_, f32>,
        reach: [usize; AXES],
        step: [usize; AXES],
        queries: Arc<Order>,
        keys: Arc<Order>,
    ) -> Result<Self> {
        let axes = keys.grid().axes();
        let extents = reach.map(|reach| (2 * reach).saturating_sub(1));
        let heads = table.shape().first().copied().unwrap_or(0);
        let shape = table.shape().get(1..).unwrap_or(&[]);
        if heads == 0 || shape.len() != axes || Grid::spread(shape, 1) != extents {
            let expected = format!("[heads | 1, 2 window - 1, ..] of {axes} axes of windows");
            return Err(Error::shape("bias", expected, table.shape()));
        }
        Ok(Self { table: table.iter().copied().collect(), heads, extents, step, queries, keys })
    }

    /// The same bias in other orders.
    pub(crate) fn in_orders(&self, queries: Arc<Order>, keys: Arc<Order>) -> Self {
        Self { queries, keys, ..self.clone() }
    }

    /// Where the offsets of an axis are in the table; past its end for those
    /// that it does not reach.
    #[inline(always)]
    fn index(&self, axis: usize, query: usize, key: usize) -> isize {
        (key as isize - query as isize) / self.step[axis] as isize + (self.extents[axis] / 2) as isize
    }

    /// Where the entries of a head for offsets on the first two axes are.
    #[inline(always)]
    fn row(&self, head: usize, query: &[usize; AXES], key: &[usize; AXES]) -> Range<usize> {
        let [a, b] = [0, 1].map(|axis| self.index(axis, query[axis], key[axis]));
        let [high, wide, long] = self.extents;
        if a < 0 || b < 0 || a as usize >= high || b as usize >= wide {
            return 0..0;
        }
        let head = if self.heads == 1 { 0 } else { head };
        let start = ((head * high + a as usize) * wide + b as usize) * long;
        start..start + long
    }

    /// What is added for a pair of places, if the table reaches it.
    fn entry(&self, head: usize, query: &[usize; AXES], key: &[usize; AXES]) -> Option<f32> {
        let row = &self.table[self.row(head, query, key)];
        let column = usize::try_from(self.index(2, query[2], key[2])).ok()?;
        row.get(column).copied()
    }

    /// Calls `run` with runs of `len` keys from `first` on and with their entries:
    /// tokens that are neighbours on the last axis have neighbouring ones.
    #[inline(always)]
    fn runs(
        &self,
        head: usize,
        query: usize,
        first: usize,
        len: usize,
        mut run: impl FnMut(Range<usize>, Range<usize>),
    ) {
        let query = self.queries.place(query);
        let mut t = 0;
        while t < len {
            let end = t + self.keys.neighbours(first + t).min(len - t);
            let key = self.keys.place(first + t);
            let (row, column) = (self.row(head, &query, &key), self.index(2, query[2], key[2]));
            let skip = column.saturating_neg().clamp(0, (end - t) as isize) as usize;
            let from = row.start + (column.max(0) as usize).min(row.len());
            let count = (end - t - skip).min(row.end - from);
            run(t + skip..t + skip + count, from..from + count);
            t = end;
        }
    }
}

/// [`Offsets`] of regions: for each kind of region and each head what is added for
/// every pair, row by row.
#[derive(Clone, Debug)]
pub(crate) struct RegionOffsets {
    regions: Arc<Regions>,
    /// `[heads, queries, keys]` of each kind, and where that of a kind starts.
    entries: Vec<f32>,
    starts: Vec<usize>,
    heads: usize,
}

impl RegionOffsets {
    /// Entries for all kinds together beyond which nothing is gained.
    const MOST: usize = 1 << 21;

    /// `None` where there would be too many.
    pub(crate) fn new(offsets: &Offsets, regions: Arc<Regions>) -> Option<Self> {
        let pairs =
            regions.kinds.iter().map(|kind| kind.places[0].len() * kind.places[1].len()).sum::<usize>();
        if pairs.saturating_mul(offsets.heads) > Self::MOST {
            return None;
        }
        let (mut entries, mut starts) = (Vec::with_capacity(pairs * offsets.heads), Vec::new());
        for kind in &regions.kinds {
            starts.push(entries.len());
            for head in 0..offsets.heads {
                for query in &kind.places[0] {
                    entries.extend(
                        kind.places[1].iter().map(|key| offsets.entry(head, query, key).unwrap_or(0.0)),
                    );
                }
            }
        }
        Some(Self { regions, entries, starts, heads: offsets.heads })
    }

    /// What is added to the scores of a query with the keys from `first` on.
    #[inline(always)]
    fn row(&self, site: &Site, query: usize, first: usize) -> &[f32] {
        let head = if self.heads == 1 { 0 } else { site.head };
        let (kind, _) = self.regions.kind(site.batch);
        let start = self.starts[kind] + (head * site.q_len + query) * site.kv_len;
        &self.entries[start..][first..site.kv_len]
    }
}

impl Score for RegionOffsets {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        define_shift(score, f64::from(self.row(site, query, key)[0]))
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        shift_each(scores, self.row(site, query, first));
    }
}

impl Smooth for Offsets {
    fn table(&self) -> [usize; 2] {
        [self.heads, self.extents.iter().product()]
    }

    fn define_entry(&self, _: &Site, query: usize, key: usize, _: f64) -> Option<(usize, f64)> {
        let (query, key) = (self.queries.place(query), self.keys.place(key));
        let row = self.row(0, &query, &key);
        let column = usize::try_from(self.index(2, query[2], key[2])).ok();
        column.filter(|&column| column < row.len()).map(|column| (row.start + column, 1.0))
    }

    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        _: S,
        _: &Site,
        query: usize,
        first: usize,
        _: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    ) {
        if !to.table.is_empty() {
            self.runs(0, query, first, gradients.len(), |keys, entries| {
                add_each(&mut to.table[entries], &gradients[keys]);
            });
        }
    }
}

impl Score for Offsets {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let (query, key) = (self.queries.place(query), self.keys.place(key));
        self.entry(site.head, &query, &key).map_or(score, |by| define_shift(score, f64::from(by)))
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        self.runs(site.head, query, first, scores.len(), |keys, entries| {
            shift_each(&mut scores[keys], &self.table[entries]);
        });
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        if self.heads == 1 || self.heads == dims.q_heads {
            return Ok(());
        }
        let expected = format!("[q_heads | 1, 2 window - 1, ..] with q_heads = {}", dims.q_heads);
        Err(Error::shape("bias", expected, &[self.heads]))
    }
}

/// Adds `factor * (rows[b, h, i, y_j - y_i + a - 1] + columns[b, h, i, x_j -
/// x_i + b - 1])`: terms of each query for the distances of an image's rows and
/// columns, `a` and `b` the reach on each axis. A query lies in the image of
/// the keys where `places` says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    /// `[batch, heads, len]` rows, `stride` apart, those of rows first.
    pub(crate) terms: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) heads: usize,
    pub(crate) extents: [usize; 2],
    pub(crate) factor: f32,
    pub(crate) queries: &'a Order,
    pub(crate) keys: &'a Order,
    /// For each place of a query on an axis, its place among the keys.
    pub(crate) places: &'a [Vec<u32>; 2],
}

impl Terms<'_> {
    /// Rows and columns of a query's terms, from the one for its own place on.
    #[inline(always)]
    fn of(&self, site: &Site, query: usize) -> [(&[f32], usize); 2] {
        let row = (site.batch * self.heads + site.head) * site.q_len + self.queries.rows()[query] as usize;
        let (rows, cols) = self.terms[row * self.stride..][..self.stride].split_at(self.extents[0]);
        let [y, _, x] = self.queries.place(query);
        let own = |axis: usize, at: usize| {
            self.extents[axis] / 2 + self.keys.grid().sizes()[2 * axis] - self.places[axis][at] as usize
        };
        [(rows, own(0, y)), (cols, own(1, x))]
    }
}

impl Score for Terms<'_> {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let ([rows, cols], key) = (self.of(site, query), self.keys.place(key));
        let sizes = self.keys.grid().sizes();
        let term =
            |(terms, own): (&[f32], usize), axis: usize| f64::from(terms[key[axis] + own - sizes[axis]]);
        define_shift(score, f64::from(self.factor) * (term(rows, 0) + term(cols, 2)))
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        let [(rows, y), (cols, x)] = self.of(site, query);
        let [height, _, width] = self.keys.grid().sizes();
        let mut t = 0;
        while t < scores.len() {
            let len = self.keys.neighbours(first + t).min(scores.len() - t);
            let key = self.keys.place(first + t);
            let row = rows[key[0] + y - height];
            for (score, col) in scores[t..t + len].iter_mut().zip(&cols[key[2] + x - width..]) {
                *score = shift(*score, self.factor * (row + col));
            }
            t += len;
        }
    }
}

impl Smooth for Terms<'_> {
    fn of_queries(&self) -> [usize; 2] {
        [self.extents[0] + self.extents[1], 0]
    }

    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        _: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    ) {
        if to.query.is_empty() {
            return;
        }
        let [(_, y), (_, x)] = self.of(site, query);
        let (rows, cols) = to.query.split_at_mut(self.extents[0]);
        let [height, _, width] = self.keys.grid().sizes();
        // Keys between those that are seen may lie beyond: their gradients are 0.
        let index = |place: usize, own: usize, size: usize| (place + own) as isize - size as isize;
        let mut t = 0;
        while t < gradients.len() {
            let len = self.keys.neighbours(first + t).min(gradients.len() - t);
            let (key, run) = (self.keys.place(first + t), &gradients[t..t + len]);
            let row = usize::try_from(index(key[0], y, height)).ok();
            if let Some(to) = row.and_then(|row| rows.get_mut(row)) {
                *to += self.factor * total(s, run);
            }
            let column = index(key[2], x, width);
            let skip = column.saturating_neg().clamp(0, len as isize) as usize;
            let cols = cols.get_mut(column.max(0) as usize..).unwrap_or_default();
            cols.iter_mut().zip(&run[skip..]).for_each(|(to, by)| *to += self.factor * by);
            t += len;
        }
    }
}

/// A bias for each offset between places of a grid, and one for each query and
/// key beside the grid, which follow the others.
#[derive(Clone, Debug)]
pub(crate) struct OffsetsBeside {
    pub(crate) offsets: Option<Offsets>,
    /// Keys of the grid, and those beside it.
    pub(crate) known: usize,
    pub(crate) more: usize,
    /// `[heads, queries, more]`, queries as they lie; empty for none.
    pub(crate) table: Arc<[f32]>,
    pub(crate) queries: Arc<Order>,
}

impl OffsetsBeside {
    /// The biases of a query from a key beside the grid on.
    #[inline(always)]
    fn row(&self, site: &Site, query: usize, key: usize) -> &[f32] {
        let row = site.head * site.q_len + self.queries.rows()[query] as usize;
        let start = row * self.more;
        self.table.get(start + key..start + self.more).unwrap_or(&[])
    }
}

impl Score for OffsetsBeside {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        match (key.checked_sub(self.known), &self.offsets) {
            (Some(key), _) => {
                let by = self.row(site, query, key).first();
                by.map_or(score, |&by| define_shift(score, f64::from(by)))
            }
            (None, Some(offsets)) => offsets.define(site, query, key, score),
            (None, None) => score,
        }
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        let known = self.known.saturating_sub(first).min(scores.len());
        let (on, beside) = scores.split_at_mut(known);
        if let Some(offsets) = &self.offsets {
            offsets.apply(s, site, query, first, on);
        }
        if !beside.is_empty() {
            shift_each(beside, self.row(site, query, first + known - self.known));
        }
    }
}
