//! Masks from closures.

use super::Mask;
use crate::input::Site;

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
///
/// ```
/// use attention_kernels::mask::mask_fn;
///
/// let block = 16;
/// let mask = mask_fn(move |site, query, key| {
///     let position = query as isize + site.q_start();
///     key as isize <= position && (key % 64 == 0 || position as usize / block == key / block)
/// });
/// ```
///
/// A closure that takes what it captures by `move` and compares without
/// looking things up in a slice is turned into vector code.
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
    fn is_opaque(&self) -> bool {
        true
    }
    fn is_shared(&self) -> bool {
        self.shared
    }
}
