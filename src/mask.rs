//! Which keys a query may see.
//!
//! A mask is a type that answers three questions: is this key visible
//! ([`Mask::visible`], the definition), where could visible keys be
//! ([`Mask::hull`]), and is a whole block full or empty
//! ([`Mask::coverage`]). Engines skip what is empty, test nothing in what is
//! full, and ask for [`Mask::bits`] only in between.

use std::ops::Range;

use crate::error::Result;
use crate::input::{Dims, Site};

/// What a mask leaves of a block of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Nothing is visible.
    Empty,
    /// Everything is visible.
    Full,
    /// Some pairs may be visible and some not: ask for the bits.
    Partial,
}

/// Which keys a query may see. Object safe.
pub trait Mask: Send + Sync {
    /// Whether `query` sees `key`: the definition. Both are below the
    /// lengths of the site.
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool;

    /// A range outside which no query of the block sees a key.
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let _ = queries;
        0..site.kv_len
    }

    /// What is left of a block that is not empty.
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let _ = (site, queries, keys);
        Coverage::Partial
    }

    /// Bit `t` says whether `query` sees key `first + t`, for as many of 64
    /// keys as there are; bits beyond the last key may be anything.
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let n = site.kv_len.saturating_sub(first).min(64);
        (0..n).fold(0, |bits, t| bits | u64::from(self.visible(site, query, first + t)) << t)
    }

    /// Whether the answers are the same for every sequence and head.
    fn is_shared(&self) -> bool {
        false
    }

    /// Whether the mask fits a call of these sizes.
    ///
    /// # Errors
    /// An error that names the mask's array or parameter that does not.
    fn check(&self, dims: &Dims) -> Result<()> {
        let _ = dims;
        Ok(())
    }
}

/// Every query sees every key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmasked;

impl Mask for Unmasked {
    #[inline(always)]
    fn visible(&self, _: &Site, _: usize, _: usize) -> bool {
        true
    }
    #[inline(always)]
    fn coverage(&self, _: &Site, _: Range<usize>, _: Range<usize>) -> Coverage {
        Coverage::Full
    }
    #[inline(always)]
    fn bits(&self, _: &Site, _: usize, _: usize) -> u64 {
        u64::MAX
    }
    fn is_shared(&self) -> bool {
        true
    }
}

/// The bits `range` of 64 that start at `first`.
#[inline(always)]
fn range_bits(range: Range<isize>, first: usize) -> u64 {
    let low = (range.start - first as isize).clamp(0, 64) as u32;
    let high = (range.end - first as isize).clamp(low as isize, 64) as u32;
    let below = |n: u32| if n == 64 { u64::MAX } else { (1 << n) - 1 };
    below(high) & !below(low)
}

/// A query sees the keys at its own position and before.
///
/// Query `i` sits at position `i + q_start`. By default the last query is
/// aligned with the last key (`q_start = kv_len - q_len`), which is what a
/// cache of past keys needs:
///
/// ```text
/// q_len 3, kv_len 5      Causal::new()     Causal::at(0)
///                        x x x . .         x . . . .
///                        x x x x .         x x . . .
///                        x x x x x         x x x . .
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Causal {
    q_start: Option<isize>,
}

impl Causal {
    /// The last query sits at the last key.
    pub const fn new() -> Self {
        Self { q_start: None }
    }

    /// Query 0 sits at position `q_start`, which may be negative: the first
    /// queries then see nothing.
    pub const fn at(q_start: isize) -> Self {
        Self { q_start: Some(q_start) }
    }

    #[inline(always)]
    fn end(&self, site: &Site, query: usize) -> isize {
        self.q_start.unwrap_or(site.q_start()).saturating_add(query as isize).saturating_add(1)
    }
}

impl Mask for Causal {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        (key as isize) < self.end(site, query)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let last = self.end(site, queries.end.saturating_sub(1));
        0..last.clamp(0, site.kv_len as isize) as usize
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        if keys.end as isize <= self.end(site, queries.start) { Coverage::Full } else { Coverage::Partial }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        range_bits(0..self.end(site, query), first)
    }
    fn is_shared(&self) -> bool {
        true
    }
}

/// A mask from a closure of `(site, query, key)`; see [`mask_fn`].
#[derive(Clone, Copy, Debug)]
pub struct MaskFn<F> {
    visible: F,
    shared: bool,
}

/// A mask from a closure that says whether a query sees a key, by position
/// alone: the same for every sequence and head.
///
/// It is asked about every pair, once a call, and what turns out empty is
/// skipped as for a built-in mask. It costs what built-in masks cost.
pub fn mask_fn<F: Fn(&Site, usize, usize) -> bool + Send + Sync>(visible: F) -> MaskFn<F> {
    MaskFn { visible, shared: true }
}

/// Like [`mask_fn`] for a closure that looks at the site's sequence or head:
/// it is asked about every pair of every head.
pub fn mask_fn_per_head<F: Fn(&Site, usize, usize) -> bool + Send + Sync>(visible: F) -> MaskFn<F> {
    MaskFn { visible, shared: false }
}

impl<F: Fn(&Site, usize, usize) -> bool + Send + Sync> Mask for MaskFn<F> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        (self.visible)(site, query, key)
    }
    fn is_shared(&self) -> bool {
        self.shared
    }
}
