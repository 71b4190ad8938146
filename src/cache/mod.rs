//! Where the keys and values of growing sequences live: key/value caches.
//!
//! | cache | where a token goes | a full cache |
//! |---|---|---|
//! | [`Contiguous`] | the next row of a region of fixed size, one region a sequence | refuses |
//! | [`Paged`] | a page of a pool that all sequences share; forks share pages | refuses |
//! | [`Latent`] | either of them, one array that is keys and values | as that one |
//! | [`Ring`] | over the oldest one that is no sink: the first tokens and the last ones stay | forgets |
//! | [`Compacted`] | the next row, after those that a policy keeps | refuses |
//! | [`Kivi`] | full precision, and later a block of two bits an element | refuses |
//! | [`ByHead`] | each head's own cache, which is one of these | as that one |
//!
//! All but the last two store rows in a [`Format`], keys in one and values in the
//! same or another: [`f32`], [`half::f16`], [`half::bf16`], [`Int8`], [`Int4`],
//! GGML's [`Q8_0`] and [`Q4_0`], or [`Rotated`] codes. Attention does not know which cache it reads:
//! [`Cached`] is an input of queries and any cache, read where it lies or
//! unpacked a block at a time, and never copied whole.
//!
//! A cache has a fixed number of sequences (the slots of a batch), each of its
//! own length. A token is appended once, at the end; it may be anything of any
//! element type, and is rounded to the format when it is stored. Its row is a
//! function of the token alone: one token at a time or many at once give the
//! same bits. What is refused changes nothing.
//!
//! ```
//! use attention_kernels::cache::{Append, Cache, Cached, Contiguous, KvShape};
//! use attention_kernels::{Attention, dense::Dense};
//! use ndarray::Array4;
//!
//! let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64 };
//! let mut cache = Contiguous::<f32>::new(shape, 1, 1024)?; // one sequence, 1,024 tokens at most
//! let dense = Dense::builder().causal().build()?;
//!
//! let prompt = Array4::<f32>::ones((1, 2, 100, 64)); // [sequences, kv_heads, tokens, dim]
//! cache.append_each(&[0], prompt.view(), prompt.view())?;
//! let q = Array4::<f32>::ones((1, 8, 100, 64)); // [sequences, q_heads, queries, head_dim]
//! let prefilled = dense.forward(Cached::new(q.view(), &cache))?;
//!
//! let token = Array4::<f32>::ones((1, 2, 1, 64));
//! cache.append_each(&[0], token.view(), token.view())?;
//! let q = Array4::<f32>::ones((1, 8, 1, 64));
//! let next = dense.forward(Cached::new(q.view(), &cache))?; // over 101 keys
//! # assert_eq!((prefilled.dim(), next.dim()), ((1, 8, 100, 64), (1, 8, 1, 64)));
//! # assert_eq!(cache.lengths(), [101]);
//! # Ok::<(), attention_kernels::Error>(())
//! ```

mod branched;
mod by_head;
#[cfg(test)]
mod by_head_tests;
mod cached;
mod compacted;
mod contiguous;
pub(crate) mod cored;
mod format;
mod gated;
mod grouped;
mod int8;
mod kivi;
mod latent;
mod paged;
#[cfg(test)]
mod quantised_tests;
mod ring;
mod rotated;
mod rows;
#[cfg(test)]
mod tests;

pub use branched::CachedBranches;
pub use by_head::{ByHead, ByHeadBuilder};
pub use cached::Cached;
pub use compacted::Compacted;
pub use contiguous::Contiguous;
pub use format::Format;
pub use gated::GatedCache;
pub use grouped::{Int4, Q4_0, Q8_0};
pub use int8::Int8;
pub use kivi::Kivi;
pub use latent::Latent;
pub use paged::{Paged, Pages};
#[doc(hidden)]
pub use ring::Means;
pub use ring::Ring;
pub use rotated::Rotated;

use ndarray::{ArrayView3, ArrayView4, Axis};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::keys::source::KvSource;

/// What attention sees of a token in a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Heads of the keys and values.
    pub kv_heads: usize,
    /// Elements of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
}

/// A cache of keys and values, of several sequences. Sealed.
pub trait Cache: KvSource + Send + Sync + std::fmt::Debug {
    /// What engines read.
    #[doc(hidden)]
    fn source(&self) -> &dyn KvSource;

    /// What stands for the tokens that were dropped, if anything does.
    #[doc(hidden)]
    fn summary(&self) -> Option<&Means> {
        None
    }

    /// How many of a sequence's first tokens a head does not hold, `[sequences,
    /// kv_heads]`, if heads differ in that.
    #[doc(hidden)]
    fn missing(&self) -> Option<&[usize]> {
        None
    }

    /// What attention sees of a token.
    fn shape(&self) -> KvShape;

    /// Tokens of each sequence.
    fn lengths(&self) -> &[usize];

    /// The most tokens that a sequence can have.
    fn capacity(&self) -> usize;

    /// Bytes of memory that its rows take, filled or not.
    fn bytes(&self) -> usize;

    /// Bytes that one token of one sequence takes, all heads together.
    fn token_bytes(&self) -> usize;

    /// Forgets the tokens of a sequence from `len` on: drafts that were
    /// rejected, or with 0 all of them.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have or one
    /// that is shorter.
    fn truncate(&mut self, sequence: usize, len: usize) -> Result<()>;

    /// Whether [`truncate`](Self::truncate) can do this.
    ///
    /// # Errors
    /// What it refuses.
    fn check_truncate(&self, sequence: usize, len: usize) -> Result<()> {
        check_truncation(sequence, len, self.lengths())
    }

    /// Makes sequence `to` a copy of sequence `from`, whatever it was before:
    /// a beam, or a prompt that several requests share. From then on each goes
    /// its own way.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have.
    fn fork(&mut self, from: usize, to: usize) -> Result<()>;
}

/// Caches that grow by keys and values. Sealed, as [`Cache`] is.
pub trait Append: Cache + Sized {
    /// Appends tokens to one sequence: keys `[kv_heads, tokens, head_dim]` and
    /// values `[kv_heads, tokens, value_dim]`, of any strides and any element
    /// type, rounded to the cache's format.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have and for
    /// tokens that it has no room for, [`Error::Shape`] for arrays that do not
    /// fit. Nothing has changed then.
    fn append<T: Element>(
        &mut self,
        sequence: usize,
        k: ArrayView3<'_, T>,
        v: ArrayView3<'_, T>,
    ) -> Result<()> {
        self.append_each(&[sequence], k.insert_axis(Axis(0)), v.insert_axis(Axis(0)))
    }

    /// Appends equally many tokens to each of `sequences`: keys `[sequences,
    /// kv_heads, tokens, head_dim]` and values `[sequences, kv_heads, tokens,
    /// value_dim]`. Either all of them grow or none does.
    ///
    /// # Errors
    /// As [`append`](Self::append), and for a sequence that is named twice.
    fn append_each<T: Element>(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
    ) -> Result<()>;

    /// Whether there is room for so many tokens more in each of `sequences`, of which
    /// none is named twice.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have, and for tokens
    /// that [`append_each`](Self::append_each) would refuse.
    fn check_room(&self, sequences: &[usize], tokens: usize) -> Result<()>;
}

/// Refuses a sequence that is not there.
fn check_sequence(argument: &'static str, sequence: usize, lengths: &[usize]) -> Result<()> {
    if sequence < lengths.len() {
        return Ok(());
    }
    Err(Error::value(argument, format!("one of the {} sequences of the cache", lengths.len()), sequence))
}

/// Refuses to make a sequence longer by truncating it.
fn check_truncation(sequence: usize, len: usize, lengths: &[usize]) -> Result<()> {
    check_sequence("sequence", sequence, lengths)?;
    if len <= lengths[sequence] {
        return Ok(());
    }
    Err(Error::value("len", format!("at most the {} tokens of the sequence", lengths[sequence]), len))
}

/// So many of something in a cache without tokens.
fn empty<X: Clone>(argument: &'static str, n: usize, x: X) -> Result<Vec<X>> {
    let mut all = Vec::new();
    if all.try_reserve_exact(n).is_err() {
        return Err(Error::value(argument, "a number for which there is memory", n));
    }
    all.resize(n, x);
    Ok(all)
}
