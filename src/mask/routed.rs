//! Queries that a head leaves out.

use std::ops::Range;

use ndarray::ArrayView3;

use super::{Coverage, Mask};
use crate::input::{Lengths, Site};

/// What another mask lets queries see whose gain, `[batch, q_heads, q_len]`, is
/// not 0; others see nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Routed<'a, M> {
    pub(crate) mask: M,
    pub(crate) gains: ArrayView3<'a, f32>,
    pub(crate) lengths: Lengths<'a>,
}

impl<M> Routed<'_, M> {
    /// Whether a query counts. A NaN does.
    #[inline(always)]
    fn counts(&self, site: &Site, query: usize) -> bool {
        let at = match self.lengths {
            Lengths::Packed { queries, .. } => [0, site.head, queries[site.batch] + query],
            _ => [site.batch, site.head, query],
        };
        self.gains[at] != 0.0
    }
}

impl<M: Mask> Mask for Routed<'_, M> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.counts(site, query) && self.mask.visible(site, query, key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let mut counting = queries.filter(|&query| self.counts(site, query));
        match (counting.next(), counting.last()) {
            (None, _) => 0..0,
            (Some(first), last) => self.mask.hull(site, first..last.unwrap_or(first) + 1),
        }
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let count = queries.clone().filter(|&query| self.counts(site, query)).count();
        match self.mask.coverage(site, queries.clone(), keys) {
            _ if count == 0 => Coverage::Empty,
            Coverage::Full if count < queries.len() => Coverage::Partial,
            coverage => coverage,
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        if self.counts(site, query) { self.mask.bits(site, query, first) } else { 0 }
    }
}
