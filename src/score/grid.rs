//! A bias for each offset between two places of a grid.

use std::sync::Arc;

use ndarray::ArrayViewD;

use super::{Score, define_shift, shift_each};
use crate::error::{Error, Result};
use crate::input::{Dims, Site};
use crate::keys::grid::{AXES, Grid, Order};
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

    /// The entries of a head for offsets on the first two axes.
    #[inline(always)]
    fn row(&self, head: usize, query: &[usize; AXES], key: &[usize; AXES]) -> &[f32] {
        let [a, b] = [0, 1].map(|axis| self.index(axis, query[axis], key[axis]));
        let [high, wide, long] = self.extents;
        if a < 0 || b < 0 || a as usize >= high || b as usize >= wide {
            return &[];
        }
        let head = if self.heads == 1 { 0 } else { head };
        let start = ((head * high + a as usize) * wide + b as usize) * long;
        self.table.get(start..start + long).unwrap_or(&[])
    }
}

impl Score for Offsets {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let (query, key) = (self.queries.place(query), self.keys.place(key));
        let row = self.row(site.head, &query, &key);
        let column = self.index(2, query[2], key[2]);
        let by = usize::try_from(column).ok().and_then(|column| row.get(column));
        by.map_or(score, |&by| define_shift(score, f64::from(by)))
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        let query = self.queries.place(query);
        let mut t = 0;
        while t < scores.len() {
            // Tokens that are neighbours on the last axis have neighbouring
            // entries.
            let len = self.keys.neighbours(first + t).min(scores.len() - t);
            let key = self.keys.place(first + t);
            let row = self.row(site.head, &query, &key);
            let column = self.index(2, query[2], key[2]);
            let skip = column.saturating_neg().clamp(0, len as isize) as usize;
            let entries = row.get(column.max(0) as usize..).unwrap_or(&[]);
            shift_each(&mut scores[t + skip..t + len], entries);
            t += len;
        }
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        if self.heads == 1 || self.heads == dims.q_heads {
            return Ok(());
        }
        let expected = format!("[q_heads | 1, 2 window - 1, ..] with q_heads = {}", dims.q_heads);
        Err(Error::shape("bias", expected, &[self.heads]))
    }
}
