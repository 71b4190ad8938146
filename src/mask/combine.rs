//! Masks of masks.

use std::ops::{self, Range};

use super::{Boolean, Causal, Documents, MaskFn, MaskFnPerHead, Prefix, Tree, Trees, Unmasked, Window};
use super::{Coverage, Mask, existing};
use crate::error::Result;
use crate::input::{Dims, Site};

/// What both masks let a query see; see [`Mask::and`]. The second is asked
/// about pairs that the first lets see each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct And<A, B>(pub A, pub B);

impl<A: Mask, B: Mask> Mask for And<A, B> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.0.visible(site, query, key) && self.1.visible(site, query, key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let (a, b) = (self.0.hull(site, queries.clone()), self.1.hull(site, queries));
        let end = a.end.min(b.end);
        a.start.max(b.start).min(end)..end
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        match self.0.coverage(site, queries.clone(), keys.clone()) {
            Coverage::Empty => Coverage::Empty,
            Coverage::Full => self.1.coverage(site, queries, keys),
            Coverage::Partial => match self.1.coverage(site, queries, keys) {
                Coverage::Empty => Coverage::Empty,
                _ => Coverage::Partial,
            },
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        self.bits_among(site, query, first, existing(site.kv_len, first))
    }
    #[inline(always)]
    fn bits_among(&self, site: &Site, query: usize, first: usize, among: u64) -> u64 {
        match self.0.bits_among(site, query, first, among) {
            0 => 0,
            some => self.1.bits_among(site, query, first, some),
        }
    }
    fn is_shared(&self) -> bool {
        self.0.is_shared() && self.1.is_shared()
    }
    fn is_opaque(&self) -> bool {
        self.0.is_opaque() || self.1.is_opaque()
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.0.check(dims)?;
        self.1.check(dims)
    }
    fn check_sequence(&self, site: &Site) -> Result<()> {
        self.0.check_sequence(site)?;
        self.1.check_sequence(site)
    }
}

/// What either mask lets a query see; see [`Mask::or`]. The second is asked
/// about pairs that the first hides from each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Or<A, B>(pub A, pub B);

impl<A: Mask, B: Mask> Mask for Or<A, B> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.0.visible(site, query, key) || self.1.visible(site, query, key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let (a, b) = (self.0.hull(site, queries.clone()), self.1.hull(site, queries));
        match (a.is_empty(), b.is_empty()) {
            (true, _) => b,
            (_, true) => a,
            _ => a.start.min(b.start)..a.end.max(b.end),
        }
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        match self.0.coverage(site, queries.clone(), keys.clone()) {
            Coverage::Full => Coverage::Full,
            Coverage::Empty => self.1.coverage(site, queries, keys),
            Coverage::Partial => match self.1.coverage(site, queries, keys) {
                Coverage::Full => Coverage::Full,
                _ => Coverage::Partial,
            },
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        self.bits_among(site, query, first, existing(site.kv_len, first))
    }
    #[inline(always)]
    fn bits_among(&self, site: &Site, query: usize, first: usize, among: u64) -> u64 {
        let some = self.0.bits_among(site, query, first, among);
        match among & !some {
            0 => some,
            rest => some | self.1.bits_among(site, query, first, rest),
        }
    }
    fn is_shared(&self) -> bool {
        self.0.is_shared() && self.1.is_shared()
    }
    fn is_opaque(&self) -> bool {
        self.0.is_opaque() || self.1.is_opaque()
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.0.check(dims)?;
        self.1.check(dims)
    }
    fn check_sequence(&self, site: &Site) -> Result<()> {
        self.0.check_sequence(site)?;
        self.1.check_sequence(site)
    }
}

/// What a mask hides; see [`Mask::not`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Not<A>(pub A);

impl<A: Mask> Mask for Not<A> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        !self.0.visible(site, query, key)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        match self.0.coverage(site, queries, keys) {
            Coverage::Empty => Coverage::Full,
            Coverage::Full => Coverage::Empty,
            Coverage::Partial => Coverage::Partial,
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        !self.0.bits(site, query, first)
    }
    #[inline(always)]
    fn bits_among(&self, site: &Site, query: usize, first: usize, among: u64) -> u64 {
        among & !self.0.bits_among(site, query, first, among)
    }
    fn is_shared(&self) -> bool {
        self.0.is_shared()
    }
    fn is_opaque(&self) -> bool {
        self.0.is_opaque()
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.0.check(dims)
    }
    fn check_sequence(&self, site: &Site) -> Result<()> {
        self.0.check_sequence(site)
    }
}

/// `a & b`, `a | b` and `!a` are [`Mask::and`], [`Mask::or`] and [`Mask::not`].
macro_rules! operators {
    ($([$($generic:tt)*] $mask:ty),+ $(,)?) => {$(
        impl<$($generic)* M: Mask> ops::BitAnd<M> for $mask {
            type Output = And<Self, M>;

            fn bitand(self, other: M) -> And<Self, M> {
                And(self, other)
            }
        }

        impl<$($generic)* M: Mask> ops::BitOr<M> for $mask {
            type Output = Or<Self, M>;

            fn bitor(self, other: M) -> Or<Self, M> {
                Or(self, other)
            }
        }

        impl<$($generic)*> ops::Not for $mask {
            type Output = Not<Self>;

            fn not(self) -> Not<Self> {
                Not(self)
            }
        }
    )+};
}
operators! {
    [] Unmasked,
    [] Causal,
    [] Window,
    [] Prefix,
    [] Documents,
    [] Tree,
    [] Trees,
    ['a,] Boolean<'a>,
    [F,] MaskFn<F>,
    [F,] MaskFnPerHead<F>,
    [A, B,] And<A, B>,
    [A, B,] Or<A, B>,
    [A,] Not<A>,
}
