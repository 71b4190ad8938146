//! One array that is keys and values.
//!
//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) keeps one row a
//! token for all heads: a latent, from which keys and values are made, and
//! after it the rotary part of the key. In its absorbed form the whole row is
//! the key of one key/value head and the latent its value, so a cache has one
//! plane of `latent_dim + rope_dim` columns and values are the first
//! `latent_dim` of them.
//!
//! Layout and cost are those of the cache inside, without values: 576 elements
//! a token for 512 + 64, all heads together.

use ndarray::{ArrayView2, ArrayView3, Axis};

use super::contiguous::Contiguous;
use super::format::Format;
use super::paged::{Paged, Pages};
use super::rows::{self, Placed, Planes};
use super::{Cache, KvShape};
use crate::element::Element;
use crate::error::Result;
use crate::keys::source::KvSource;
use crate::simd::Isa;

/// A cache of latents: [`Contiguous`] or [`Paged`], in any [`Format`].
///
/// ```
/// use attention_kernels::cache::{Cache, Latent};
/// use half::bf16;
/// use ndarray::Array2;
///
/// // One sequence of at most 1,024 tokens, each 512 + 64 elements.
/// let mut cache = Latent::contiguous::<bf16>(512, 64, 1, 1024)?;
/// let latents = Array2::<f32>::ones((10, 576)); // after normalisation; after rotation
/// cache.append(0, latents.view())?;
/// assert_eq!((cache.lengths(), cache.token_bytes()), (&[10][..], 1152));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Latent<C>(C);

/// One head, whose values are the first columns of its keys.
fn latent_shape(latent_dim: usize, rope_dim: usize) -> Result<KvShape> {
    let head_dim = latent_dim.checked_add(rope_dim);
    let head_dim = head_dim
        .ok_or_else(|| crate::Error::value("rope_dim", "a number for which there is memory", rope_dim))?;
    Ok(KvShape { kv_heads: 1, head_dim, value_dim: latent_dim })
}

impl Latent<()> {
    /// Latents in one region of fixed size for each sequence.
    ///
    /// # Errors
    /// As [`Contiguous::new`].
    pub fn contiguous<F: Format>(
        latent_dim: usize,
        rope_dim: usize,
        sequences: usize,
        capacity: usize,
    ) -> Result<Latent<Contiguous<F>>> {
        let shape = latent_shape(latent_dim, rope_dim)?;
        Ok(Latent(Contiguous::with_value_columns(shape, 0, sequences, capacity)?))
    }

    /// Latents in pages.
    ///
    /// # Errors
    /// As [`Paged::new`].
    pub fn paged<F: Format>(
        latent_dim: usize,
        rope_dim: usize,
        sequences: usize,
        pages: Pages,
    ) -> Result<Latent<Paged<F>>> {
        let shape = latent_shape(latent_dim, rope_dim)?;
        Ok(Latent(Paged::with_value_columns(shape, 0, sequences, pages)?))
    }
}

impl<C> Latent<C> {
    /// The cache inside, for what is its own: the tables of pages.
    pub fn inner(&self) -> &C {
        &self.0
    }
}

impl<C: Cache + Placed> Latent<C> {
    /// Appends tokens to one sequence, `[tokens, latent_dim + rope_dim]`:
    /// latents after their normalisation, and the rotary part after its
    /// rotation.
    ///
    /// # Errors
    /// As [`Append::append`](super::Append::append).
    pub fn append<T: Element>(&mut self, sequence: usize, latents: ArrayView2<'_, T>) -> Result<()> {
        self.append_each(&[sequence], latents.insert_axis(Axis(0)))
    }

    /// Appends equally many tokens to each of `sequences`, `[sequences, tokens,
    /// latent_dim + rope_dim]`. Either all of them grow or none does.
    ///
    /// # Errors
    /// As [`Append::append_each`](super::Append::append_each).
    pub fn append_each<T: Element>(&mut self, sequences: &[usize], latents: ArrayView3<'_, T>) -> Result<()> {
        let k = latents.insert_axis(Axis(1));
        let v = k.slice(ndarray::s![.., .., .., ..0]);
        rows::append(self, sequences, k.view(), v)
    }
}

impl<C: Placed> Placed for Latent<C> {
    type Keys = C::Keys;
    type Values = C::Values;
    const LATENT: bool = true;

    fn kv_shape(&self) -> KvShape {
        self.0.kv_shape()
    }
    fn tokens(&self) -> &[usize] {
        self.0.tokens()
    }
    fn isa(&self) -> Isa {
        self.0.isa()
    }
    fn planes(&self) -> &Planes<C::Keys, C::Values> {
        self.0.planes()
    }
    fn planes_mut(&mut self) -> &mut Planes<C::Keys, C::Values> {
        self.0.planes_mut()
    }
    fn run(&self, sequence: usize, head: usize, token: usize, enough: usize) -> (usize, usize) {
        self.0.run(sequence, head, token, enough)
    }
    fn fits(&self, sequences: &[usize], n: usize) -> Result<()> {
        self.0.fits(sequences, n)
    }
    fn grow(&mut self, sequences: &[usize], n: usize) -> Result<()> {
        self.0.grow(sequences, n)
    }
}

impl<C: Cache + Placed> Cache for Latent<C> {
    fn source(&self) -> &dyn KvSource {
        self
    }
    fn shape(&self) -> KvShape {
        self.0.shape()
    }
    fn lengths(&self) -> &[usize] {
        self.0.lengths()
    }
    fn capacity(&self) -> usize {
        self.0.capacity()
    }
    fn bytes(&self) -> usize {
        self.0.bytes()
    }
    fn token_bytes(&self) -> usize {
        self.0.token_bytes()
    }
    fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        self.0.truncate(sequence, len)
    }
    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.0.fork(from, to)
    }
}
