//! An interval of keys for each query.

use std::ops::Range;

use super::{Coverage, Mask};
use crate::input::Site;

/// Each query sees the keys that a closure gives. Neither end falls from a query to
/// the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interval<F>(pub(crate) F);

impl<F: Fn(&Site, usize) -> Range<usize> + Send + Sync> Interval<F> {
    #[inline(always)]
    fn ends(&self, site: &Site, queries: &Range<usize>) -> [Range<usize>; 2] {
        [(self.0)(site, queries.start), (self.0)(site, queries.end - 1)]
    }
}

impl<F: Fn(&Site, usize) -> Range<usize> + Send + Sync> Mask for Interval<F> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        (self.0)(site, query).contains(&key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        let [first, last] = self.ends(site, &queries);
        first.start..last.end.max(first.start)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        coverage_of(&self.ends(site, &queries), &keys)
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        bits_of(&(self.0)(site, query), first)
    }
}

/// How much of `keys` queries see, of which the first and the last see these
/// intervals, and neither end falls between them.
#[inline(always)]
pub(crate) fn coverage_of([first, last]: &[Range<usize>; 2], keys: &Range<usize>) -> Coverage {
    if keys.start >= last.end || keys.end <= first.start {
        Coverage::Empty
    } else if keys.start >= last.start && keys.end <= first.end {
        Coverage::Full
    } else {
        Coverage::Partial
    }
}

/// Which of the 64 keys from `first` on an interval holds.
#[inline(always)]
pub(crate) fn bits_of(keys: &Range<usize>, first: usize) -> u64 {
    let below = |end: usize| match end.saturating_sub(first) {
        n if n >= 64 => u64::MAX,
        n => (1 << n) - 1,
    };
    below(keys.end) & !below(keys.start)
}
