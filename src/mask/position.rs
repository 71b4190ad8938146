//! Masks that know positions alone: causal, window, prefix.

use std::ops::Range;

use super::{Coverage, Mask, cut, range_bits};
use crate::input::Site;

/// What a query sees that is a range of keys which moves up with the query.
trait Moving {
    /// The range, before it is cut to the keys that there are.
    fn range(&self, site: &Site, query: usize) -> Range<isize>;
}

macro_rules! moving_mask {
    ($mask:ty) => {
        moving_mask!($mask, |_| true);
    };
    ($mask:ty, |$this:pat_param| $shared:expr) => {
        impl Mask for $mask {
            #[inline(always)]
            fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
                self.range(site, query).contains(&(key as isize))
            }
            #[inline(always)]
            fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
                let (first, last) = (queries.start, queries.end.saturating_sub(1));
                cut(self.range(site, first).start..self.range(site, last).end, site.kv_len)
            }
            #[inline(always)]
            fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
                let first = self.range(site, queries.start);
                let last = self.range(site, queries.end.saturating_sub(1));
                let (start, end) = (keys.start as isize, keys.end as isize);
                if start >= last.end || end <= first.start {
                    Coverage::Empty
                } else if start >= last.start && end <= first.end {
                    Coverage::Full
                } else {
                    Coverage::Partial
                }
            }
            #[inline(always)]
            fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
                range_bits(self.range(site, query), first)
            }
            fn is_shared(&self) -> bool {
                let $this = self;
                $shared
            }
        }
    };
}

/// Where keys are pools of tokens, [`width`](Self::width) of them every
/// [`stride`](Self::stride): a query sees those of which it sees every token.
#[derive(Clone, Debug)]
pub(crate) struct WholePools {
    pub(crate) width: usize,
    pub(crate) stride: usize,
    /// Tokens of each sequence, at the last of which its last query sits.
    pub(crate) tokens: Vec<usize>,
}

impl Moving for WholePools {
    #[inline(always)]
    fn range(&self, site: &Site, query: usize) -> Range<isize> {
        let seen = (query + self.tokens[site.batch] + 1).saturating_sub(site.q_len);
        0..seen.checked_sub(self.width).map_or(0, |last| last / self.stride + 1) as isize
    }
}
moving_mask!(WholePools, |pools| pools.tokens.windows(2).all(|pair| pair[0] == pair[1]));

/// A query sees the last `near` keys up to its own position, and those before that make no
/// whole group of `group` keys, counted from the first key on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recent {
    pub(crate) group: usize,
    pub(crate) near: usize,
}

impl Recent {
    /// Keys in whole groups that a position does not see.
    #[inline(always)]
    pub(crate) fn far(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.near) / self.group * self.group
    }
}

impl Moving for Recent {
    #[inline(always)]
    fn range(&self, site: &Site, query: usize) -> Range<isize> {
        let position = (query + site.kv_len).checked_sub(site.q_len);
        position.map_or(0..0, |position| self.far(position) as isize..position as isize + 1)
    }
}
moving_mask!(Recent);

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
}

impl Moving for Causal {
    #[inline(always)]
    fn range(&self, site: &Site, query: usize) -> Range<isize> {
        0..site.position(self.q_start, query).saturating_add(1)
    }
}
moving_mask!(Causal);

/// Queries and keys in as many groups of neighbours each: a query sees the keys
/// of its own, and `before` those of all earlier ones. Lengths are multiples of
/// the number of groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Groups {
    pub(crate) groups: usize,
    pub(crate) before: bool,
}

impl Moving for Groups {
    #[inline(always)]
    fn range(&self, site: &Site, query: usize) -> Range<isize> {
        let [queries, keys] = [site.q_len, site.kv_len].map(|len| len / self.groups);
        let group = query / queries.max(1);
        let start = if self.before { 0 } else { group * keys };
        start as isize..((group + 1) * keys) as isize
    }
}
moving_mask!(Groups);

/// A query sees the keys from `left` before its own position to `right`
/// after it (sliding window; Longformer, arXiv 2004.05150).
///
/// `p(i) - left <= j <= p(i) + right`, where query `i` sits at position `p(i)
/// = i + q_start`, by default with the last query at the last key. `None`
/// means no limit on that side: `Window::new(None, Some(0))` is [`Causal`].
///
/// ```text
/// q_len 3, kv_len 5      Window::new(Some(1), Some(0))     Window::new(Some(1), Some(1)).at(0)
///                        . x x . .                         x x . . .
///                        . . x x .                         x x x . .
///                        . . . x x                         . x x x .
/// ```
///
/// A window of `w` keys that ends at the query, as models count it, is
/// `Window::new(Some(w - 1), Some(0))`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    left: Option<usize>,
    right: Option<usize>,
    q_start: Option<isize>,
}

impl Window {
    /// `left` keys before the query's position, the position, and `right`
    /// after it.
    pub const fn new(left: Option<usize>, right: Option<usize>) -> Self {
        Self { left, right, q_start: None }
    }

    /// Query 0 sits at position `q_start`, which may be negative.
    #[must_use]
    pub const fn at(self, q_start: isize) -> Self {
        Self { q_start: Some(q_start), ..self }
    }
}

impl Moving for Window {
    #[inline(always)]
    fn range(&self, site: &Site, query: usize) -> Range<isize> {
        let p = site.position(self.q_start, query);
        let start = self.left.map_or(isize::MIN, |left| p.saturating_sub_unsigned(left));
        let end = self.right.map_or(isize::MAX, |right| p.saturating_add_unsigned(right).saturating_add(1));
        start..end
    }
}
moving_mask!(Window);

/// A query sees the first `prefix_len` keys, and keys at its own position
/// and before: attention in both directions inside the prefix, causal after
/// it (prefix language model; T5, arXiv 1910.10683).
///
/// Query `i` sits at position `i + q_start`, by default with the last query
/// at the last key.
///
/// ```text
/// q_len 5, kv_len 5      Prefix::new(3)
///                        x x x . .
///                        x x x . .
///                        x x x . .
///                        x x x x .
///                        x x x x x
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    prefix_len: usize,
    q_start: Option<isize>,
}

impl Prefix {
    /// A prefix of `prefix_len` keys in every sequence; it may be longer than
    /// the sequence.
    pub const fn new(prefix_len: usize) -> Self {
        Self { prefix_len, q_start: None }
    }

    /// Query 0 sits at position `q_start`, which may be negative.
    #[must_use]
    pub const fn at(self, q_start: isize) -> Self {
        Self { q_start: Some(q_start), ..self }
    }
}

impl Moving for Prefix {
    #[inline(always)]
    fn range(&self, site: &Site, query: usize) -> Range<isize> {
        let causal = site.position(self.q_start, query).saturating_add(1);
        0..causal.max(self.prefix_len.min(isize::MAX as usize) as isize)
    }
}
moving_mask!(Prefix);
