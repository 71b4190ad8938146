//! Which keys a query may see.
//!
//! A mask is a type that answers three questions: is this key visible
//! ([`Mask::visible`], the definition), where could visible keys be
//! ([`Mask::hull`]), and is a whole block full or empty
//! ([`Mask::coverage`]). Engines skip what is empty, test nothing in what is
//! full, and ask for [`Mask::bits`] only in between.
//!
//! | mask | a query sees |
//! |---|---|
//! | [`Unmasked`] | every key |
//! | [`Causal`] | keys at its position and before |
//! | [`Window`] | keys near its position |
//! | [`Prefix`] | a prefix, and keys at its position and before |
//! | [`Documents`] | keys of its own document |
//! | [`Tree`], [`Trees`] | a context, its ancestors in a tree, and itself; a tree for each sequence |
//! | [`Boolean`] | what an array says |
//! | [`mask_fn`], [`mask_fn_per_head`] | what a closure says |
//! | [`And`], [`Or`], [`Not`] | what other masks say, combined |
//!
//! [`Mask::and`], [`Mask::or`] and [`Mask::not`] combine, as `&`, `|` and `!` do:
//!
//! ```
//! use attention_kernels::mask::{Causal, Documents, Mask};
//!
//! let packed_documents = Causal::new().and(Documents::new(&[0, 0, 0, 1, 1]));
//! let the_same = Causal::new() & Documents::new(&[0, 0, 0, 1, 1]);
//! ```
//!
//! Which mask it is may be known only at run time, and may borrow: engines know no
//! mask by its type, so that a box costs nothing.
//!
//! ```
//! use attention_kernels::dense::Dense;
//! use attention_kernels::mask::{Boolean, Causal, Mask, Unmasked};
//! use ndarray::array;
//!
//! let tokens = array![[true, true, false]];
//! let (is_causal, padded) = (true, true); // from a model's configuration
//! let mut mask: Box<dyn Mask + '_> = if is_causal { Box::new(Causal::new()) } else { Box::new(Unmasked) };
//! if padded {
//!     mask = Box::new(mask.and(Boolean::of_keys(tokens.view())));
//! }
//! let dense = Dense::builder().mask(mask).build()?;
//! # Ok::<(), attention_kernels::Error>(())
//! ```

use std::ops::Range;
use std::sync::Arc;

use ndarray::Array4;

use crate::error::Result;
use crate::input::{Dims, Site};
use crate::simd::{Isa, Kernel, Simd};

pub(crate) mod beside;
mod boolean;
mod closure;
mod combine;
pub(crate) mod disc;
mod documents;
pub(crate) mod frames;
pub(crate) mod grid;
pub(crate) mod images;
pub(crate) mod interval;
mod position;
mod regions;
pub(crate) mod routed;
mod tree;

#[cfg(test)]
mod tests;

pub use boolean::Boolean;
pub use closure::{MaskFn, MaskFnPerHead, mask_fn, mask_fn_per_head};
pub use combine::{And, Not, Or};
pub use documents::Documents;
pub use position::{Causal, Prefix, Window};
pub(crate) use position::{Groups, Recent, WholePools};
pub use tree::{Tree, Trees};

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

/// Some queries and keys of a site.
#[doc(hidden)]
#[derive(Clone, Debug)]
pub struct Block<'a> {
    pub site: &'a Site,
    pub queries: Range<usize>,
    pub keys: Range<usize>,
}

impl Block<'_> {
    /// For each word of bits of the keys: its first key, and the bits that
    /// stand for keys.
    #[inline(always)]
    fn words(&self) -> impl Iterator<Item = (usize, u64)> + use<> {
        let end = self.keys.end;
        self.keys.clone().step_by(64).map(move |first| (first, u64::MAX >> (64 - (end - first).min(64))))
    }
}

struct FillBits<'a, M: ?Sized> {
    mask: &'a M,
    block: &'a Block<'a>,
    words: &'a mut [u64],
    stride: usize,
}

impl<M: Mask + ?Sized> Kernel for FillBits<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { mask, block, words, stride } = self;
        for (query, row) in block.queries.clone().zip(words.chunks_mut(stride)) {
            for ((first, valid), word) in block.words().zip(row) {
                *word = mask.bits(block.site, query, first) & valid;
            }
        }
    }
}

struct Scan<'a, M: ?Sized> {
    mask: &'a M,
    block: &'a Block<'a>,
}

impl<M: Mask + ?Sized> Kernel for Scan<'_, M> {
    type Output = Coverage;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Coverage {
        let (mut some, mut all) = (false, true);
        for query in self.block.queries.clone() {
            for (first, valid) in self.block.words() {
                let bits = self.mask.bits(self.block.site, query, first) & valid;
                some |= bits != 0;
                all &= bits == valid;
            }
            if some && !all {
                return Coverage::Partial;
            }
        }
        if some { Coverage::Full } else { Coverage::Empty }
    }
}

/// Which keys a query may see. Object safe.
#[doc(alias = "attn_mask")]
pub trait Mask: Send + Sync {
    /// Whether `query` sees `key`: the definition. Both are below the
    /// lengths of the site.
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool;

    /// A range outside which no query of the block sees a key. It lies in
    /// `0..site.kv_len`.
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let _ = queries;
        0..site.kv_len
    }

    /// What is left of a block that is not empty: [`Coverage::Empty`] only if
    /// no pair of it is visible, [`Coverage::Full`] only if all are.
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let _ = (site, queries, keys);
        Coverage::Partial
    }

    /// Bit `t` says whether `query` sees key `first + t`, for as many of 64
    /// keys as there are; bits beyond the last key may be anything.
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        pack(site.kv_len.saturating_sub(first), |t| self.visible(site, query, first + t))
    }

    /// [`bits`](Self::bits) of those keys alone that `among` has, none of
    /// which is beyond the last key; 0 for the others. A mask that may not be
    /// asked about pairs that another one hides asks about these alone.
    #[inline(always)]
    fn bits_among(&self, site: &Site, query: usize, first: usize, among: u64) -> u64 {
        self.bits(site, query, first) & among
    }

    /// [`bits`](Self::bits) of a block: for each query the words of the keys
    /// from `keys.start` on, `stride` words from one query to the next, bits
    /// beyond `keys.end` 0. One call for engines that know no mask by type.
    #[doc(hidden)]
    fn fill_bits(&self, isa: Isa, block: &Block<'_>, words: &mut [u64], stride: usize) {
        isa.dispatch(FillBits { mask: self, block, words, stride });
    }

    /// What is left of a block, found out pair by pair.
    #[doc(hidden)]
    fn scan(&self, isa: Isa, block: &Block<'_>) -> Coverage {
        isa.dispatch(Scan { mask: self, block })
    }

    /// Whether the answers depend on the lengths of the site alone, and not
    /// on its sequence or head.
    fn is_shared(&self) -> bool {
        false
    }

    /// Whether [`coverage`](Self::coverage) knows nothing, so that engines do
    /// well to find out once what becomes of each block.
    fn is_opaque(&self) -> bool {
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

    /// Whether the mask fits a sequence of a call that [`check`](Self::check) has
    /// let pass: sequences may differ in length. The head means nothing.
    ///
    /// # Errors
    /// As of [`check`](Self::check).
    fn check_sequence(&self, site: &Site) -> Result<()> {
        let _ = site;
        Ok(())
    }

    /// What both masks let a query see.
    fn and<M: Mask>(self, other: M) -> And<Self, M>
    where
        Self: Sized,
    {
        And(self, other)
    }

    /// What either mask lets a query see.
    fn or<M: Mask>(self, other: M) -> Or<Self, M>
    where
        Self: Sized,
    {
        Or(self, other)
    }

    /// What the mask hides.
    fn not(self) -> Not<Self>
    where
        Self: Sized,
    {
        Not(self)
    }

    /// The mask as an array `[batch, q_heads, q_len, kv_len]`, for sizes that
    /// [`check`](Self::check) accepts and sequences that use all rows. It is
    /// for reading and for tests: no kernel needs it.
    ///
    /// ```
    /// use attention_kernels::input::Dims;
    /// use attention_kernels::mask::{Mask, Window};
    /// use ndarray::s;
    ///
    /// let dims = Dims {
    ///     batch: 1, q_heads: 1, kv_heads: 1, q_len: 3, kv_len: 5,
    ///     head_dim: 64, value_dim: 64, packed: false,
    /// };
    /// let mask = Window::new(Some(1), Some(0)).materialize(&dims);
    /// let picture: Vec<String> = mask
    ///     .slice(s![0, 0, .., ..])
    ///     .rows()
    ///     .into_iter()
    ///     .map(|row| row.iter().map(|&visible| if visible { 'x' } else { '.' }).collect())
    ///     .collect();
    /// println!("{}", picture.join("\n"));
    /// assert_eq!(picture, [
    ///     ".xx..",
    ///     "..xx.",
    ///     "...xx",
    /// ]);
    /// ```
    fn materialize(&self, dims: &Dims) -> Array4<bool> {
        let &Dims { batch, q_heads, q_len, kv_len, .. } = dims;
        Array4::from_shape_fn((batch, q_heads, q_len, kv_len), |(batch, head, query, key)| {
            self.visible(&Site { batch, head, q_len, kv_len }, query, key)
        })
    }
}

macro_rules! forward {
    ($($pointer:ty),*) => {$(
        impl<M: Mask + ?Sized> Mask for $pointer {
            #[inline(always)]
            fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
                (**self).visible(site, query, key)
            }
            #[inline(always)]
            fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
                (**self).hull(site, queries)
            }
            #[inline(always)]
            fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
                (**self).coverage(site, queries, keys)
            }
            #[inline(always)]
            fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
                (**self).bits(site, query, first)
            }
            #[inline(always)]
            fn bits_among(&self, site: &Site, query: usize, first: usize, among: u64) -> u64 {
                (**self).bits_among(site, query, first, among)
            }
            fn fill_bits(&self, isa: Isa, block: &Block<'_>, words: &mut [u64], stride: usize) {
                (**self).fill_bits(isa, block, words, stride);
            }
            fn scan(&self, isa: Isa, block: &Block<'_>) -> Coverage {
                (**self).scan(isa, block)
            }
            fn is_shared(&self) -> bool {
                (**self).is_shared()
            }
            fn is_opaque(&self) -> bool {
                (**self).is_opaque()
            }
            fn check(&self, dims: &Dims) -> Result<()> {
                (**self).check(dims)
            }
            fn check_sequence(&self, site: &Site) -> Result<()> {
                (**self).check_sequence(site)
            }
        }
    )*};
}
forward!(&M, Box<M>, Arc<M>);

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
pub(crate) fn range_bits(range: Range<isize>, first: usize) -> u64 {
    let low = range.start.saturating_sub(first as isize).clamp(0, 64);
    let high = range.end.saturating_sub(first as isize).clamp(low, 64);
    let below = |n: isize| if n == 64 { u64::MAX } else { (1 << n) - 1 };
    below(high) & !below(low)
}

/// Bit `t` is `visible(t)`, for `t` below `n` and 64. A loop of 64 that the
/// compiler knows to be one costs less than half of one that may be shorter.
#[inline(always)]
pub(crate) fn pack(n: usize, visible: impl Fn(usize) -> bool) -> u64 {
    if n >= 64 { pack_below(64, visible) } else { pack_below(n, visible) }
}

#[inline(always)]
fn pack_below(n: usize, visible: impl Fn(usize) -> bool) -> u64 {
    (0..n).fold(0, |bits, t| bits | u64::from(visible(t)) << t)
}

/// The bits of the keys from `first` on that exist.
#[inline(always)]
fn existing(kv_len: usize, first: usize) -> u64 {
    match kv_len.saturating_sub(first) {
        0 => 0,
        n => u64::MAX >> (64 - n.min(64)),
    }
}

/// `range`, cut to `0..len`.
#[inline(always)]
pub(crate) fn cut(range: Range<isize>, len: usize) -> Range<usize> {
    let end = range.end.clamp(0, len as isize) as usize;
    range.start.clamp(0, end as isize) as usize..end
}
