//! Masks of sparse mechanisms: what comes before a position, and what a plan
//! lists.

use std::ops::Range;

use crate::error::Result;
use crate::input::{Dims, Site};
use crate::keys::Keys;
use crate::mask::{Causal, Coverage, Mask};

/// All keys, or those at a query's position and before, where the last query
/// sits at the last key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) causal: bool,
}

impl Mask for Order {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        !self.causal || Causal::new().visible(site, query, key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        if self.causal { Causal::new().hull(site, queries) } else { 0..site.kv_len }
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        if self.causal { Causal::new().coverage(site, queries, keys) } else { Coverage::Full }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        if self.causal { Causal::new().bits(site, query, first) } else { u64::MAX }
    }
    fn is_shared(&self) -> bool {
        true
    }
}

/// What a mask leaves of a plan, for definitions and for counting: engines read
/// both by themselves.
#[derive(Clone, Debug)]
pub(crate) struct Listed<'a, M> {
    pub(crate) mask: M,
    pub(crate) keys: Keys<'a>,
}

impl<M: Mask> Mask for Listed<'_, M> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.mask.visible(site, query, key) && self.keys.visible(site, query, key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        self.mask.hull(site, queries)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        match self.mask.coverage(site, queries, keys) {
            Coverage::Empty => Coverage::Empty,
            _ => Coverage::Partial,
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        self.mask.bits(site, query, first) & self.keys.bits(site, query, first)
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.mask.check(dims)
    }
}
