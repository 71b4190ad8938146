//! Masks from closures.

use super::{Mask, existing, pack};
use crate::input::{Extent, Site};

/// A mask from a closure of `(extent, query, key)`; see [`mask_fn`].
#[derive(Clone, Copy, Debug)]
pub struct MaskFn<F>(F);

/// A mask from a closure of `(site, query, key)`; see [`mask_fn_per_head`].
#[derive(Clone, Copy, Debug)]
pub struct MaskFnPerHead<F>(F);

/// A mask from a closure that says whether a query sees a key, by position
/// alone: the same for every sequence and head. It is given the lengths of the
/// sequence, and counts from its start.
///
/// It is asked about every pair, once a call, and what turns out empty is
/// skipped as for a built-in mask. It costs what built-in masks cost. As the
/// second of two masks it is asked about those pairs alone that the first
/// leaves open ([`Mask::and`], [`Mask::or`]).
///
/// ```
/// use attention_kernels::mask::mask_fn;
///
/// let block = 16;
/// let mask = mask_fn(move |extent, query, key| {
///     let position = query as isize + extent.q_start();
///     key as isize <= position && (key % 64 == 0 || position as usize / block == key / block)
/// });
/// ```
///
/// A closure that takes what it captures by `move` and compares without
/// looking things up in a slice is turned into vector code.
pub fn mask_fn<F: Fn(&Extent, usize, usize) -> bool + Send + Sync>(visible: F) -> MaskFn<F> {
    MaskFn(visible)
}

/// Like [`mask_fn`] for a closure that looks at the sequence or head, which
/// the site has besides the lengths: it is asked about every pair of every head.
pub fn mask_fn_per_head<F: Fn(&Site, usize, usize) -> bool + Send + Sync>(visible: F) -> MaskFnPerHead<F> {
    MaskFnPerHead(visible)
}

/// Bits of keys that exist, asked about one by one unless there are 64.
#[inline(always)]
fn ask(among: u64, visible: impl Fn(usize) -> bool) -> u64 {
    if among == u64::MAX {
        return pack(64, visible);
    }
    let (mut left, mut bits) = (among, 0);
    while left != 0 {
        let t = left.trailing_zeros() as usize;
        bits |= u64::from(visible(t)) << t;
        left &= left - 1;
    }
    bits
}

impl<F: Fn(&Extent, usize, usize) -> bool + Send + Sync> Mask for MaskFn<F> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        (self.0)(&site.extent(), query, key)
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        self.bits_among(site, query, first, existing(site.kv_len, first))
    }
    #[inline(always)]
    fn bits_among(&self, site: &Site, query: usize, first: usize, among: u64) -> u64 {
        let extent = site.extent();
        ask(among, |t| (self.0)(&extent, query, first + t))
    }
    fn is_opaque(&self) -> bool {
        true
    }
    fn is_shared(&self) -> bool {
        true
    }
}

impl<F: Fn(&Site, usize, usize) -> bool + Send + Sync> Mask for MaskFnPerHead<F> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        (self.0)(site, query, key)
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        self.bits_among(site, query, first, existing(site.kv_len, first))
    }
    #[inline(always)]
    fn bits_among(&self, site: &Site, query: usize, first: usize, among: u64) -> u64 {
        ask(among, |t| (self.0)(site, query, first + t))
    }
    fn is_opaque(&self) -> bool {
        true
    }
}
