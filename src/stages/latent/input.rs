//! Queries over latents: an input of mechanisms.

use std::marker::PhantomData;

use ndarray::{Array3, ArrayView3, ArrayView4, Axis, s};

use crate::cache::{Cache, Cached};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Lengths, Qkv, Sequence};

/// Queries over latents, and the matrices of the heads.
#[derive(Debug)]
pub struct Latents<'a, T, O = T> {
    /// Queries `[batch, heads, q_len, d_N + d_R]`, the rotary part last.
    pub q: ArrayView4<'a, T>,
    /// `W_UK`, `[heads, d_N, r]`: from a latent to the key of a head. None where
    /// queries have taken it up.
    pub w_uk: Option<ArrayView3<'a, T>>,
    /// `W_UV`, `[heads, d_V, r]`: from a latent to the value of a head.
    pub w_uv: ArrayView3<'a, T>,
    pub(super) tokens: Tokens<'a, T>,
    out: PhantomData<O>,
}

/// Where the latents are.
#[derive(Debug)]
pub(super) enum Tokens<'a, T> {
    /// `[batch, kv_len, r + d_R]`
    Array(ArrayView3<'a, T>, Lengths<'a>),
    Cache(Cached<'a, T, dyn Cache + 'a>),
}

impl<T> Clone for Tokens<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Tokens<'_, T> {}
impl<T, O> Clone for Latents<'_, T, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, O> Copy for Latents<'_, T, O> {}

impl<'a, T> Latents<'a, T> {
    /// Over an array `[batch, kv_len, r + d_R]`: latents and rotary keys.
    pub fn new(
        q: ArrayView4<'a, T>,
        latents: ArrayView3<'a, T>,
        w_uk: ArrayView3<'a, T>,
        w_uv: ArrayView3<'a, T>,
    ) -> Self {
        Self { q, w_uk: Some(w_uk), w_uv, tokens: Tokens::Array(latents, Lengths::Full), out: PhantomData }
    }

    /// The same for queries `[batch, heads, q_len, r + d_R]` that have taken up
    /// their matrix, or have none.
    pub fn taken_up(q: ArrayView4<'a, T>, latents: ArrayView3<'a, T>, w_uv: ArrayView3<'a, T>) -> Self {
        Self { q, w_uk: None, w_uv, tokens: Tokens::Array(latents, Lengths::Full), out: PhantomData }
    }

    /// Over a cache of [`Latent`](crate::cache::Latent) rows: the sequences and
    /// queries of `x`.
    pub fn cached<C: Cache>(x: Cached<'a, T, C>, w_uk: ArrayView3<'a, T>, w_uv: ArrayView3<'a, T>) -> Self {
        Self { q: x.q, w_uk: Some(w_uk), w_uv, tokens: Tokens::Cache(x.erased()), out: PhantomData }
    }
}

/// The sizes of the parts.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) latent: usize,
    pub(crate) value: usize,
}

impl<'a, T: Element, O: Element> Latents<'a, T, O> {
    /// The array's batch entries have different lengths: see
    /// [`Qkv::key_lengths`] and [`Qkv::packed`]. A cache knows its own.
    pub fn lengths(self, lengths: Lengths<'a>) -> Self {
        let tokens = match self.tokens {
            Tokens::Array(latents, _) => Tokens::Array(latents, lengths),
            cache @ Tokens::Cache(_) => cache,
        };
        Self { tokens, ..self }
    }

    /// The same with outputs in `f32`.
    pub fn widened(self) -> Latents<'a, T, f32> {
        Latents { q: self.q, w_uk: self.w_uk, w_uv: self.w_uv, tokens: self.tokens, out: PhantomData }
    }

    pub(crate) fn sizes(&self) -> Sizes {
        let (_, value, latent) = self.w_uv.dim();
        let (nope, latent) = self.w_uk.map_or((latent, latent), |w_uk| (w_uk.dim().1, w_uk.dim().2));
        Sizes { nope, latent, value, rope: self.q.dim().3.saturating_sub(nope) }
    }

    /// The latents as the definition reads them, and their sequences.
    pub(crate) fn held(&self, dims: &Dims) -> (Array3<f64>, Vec<Sequence>) {
        match &self.tokens {
            Tokens::Array(latents, lengths) => {
                let sequences = (0..dims.batch).map(|i| lengths.sequence(dims, i)).collect();
                (latents.mapv(Element::to_f64), sequences)
            }
            Tokens::Cache(x) => {
                let held =
                    x.held(&Dims { kv_heads: 1, head_dim: x.cache.shape().head_dim, value_dim: 0, ..*dims });
                let lengths = held.lengths(x);
                let sequences = (0..dims.batch).map(|i| lengths.sequence(dims, i)).collect();
                (held.k.index_axis(Axis(1), 0).mapv(f64::from), sequences)
            }
        }
    }
}

impl<T: Element, O: Element> Input for Latents<'_, T, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        let (batch, heads, _, query) = self.q.dim();
        let Sizes { nope, rope, latent, value } = self.sizes();
        if self.w_uk.is_some_and(|w_uk| w_uk.dim().0 != heads) || nope > query {
            return Err(match &self.w_uk {
                Some(w_uk) => {
                    let expected = format!("[heads, d_N, r] = [{heads}, at most {query}, _] as q has it");
                    Error::shape("w_uk", expected, w_uk.shape())
                }
                None => {
                    let expected = format!("[heads, d_V, r] = [{heads}, _, at most {query}] as q has it");
                    Error::shape("w_uv", expected, self.w_uv.shape())
                }
            });
        }
        if (self.w_uv.dim().0, self.w_uv.dim().2) != (heads, latent) {
            let expected = format!("[heads, d_V, r] = [{heads}, _, {latent}] as q and w_uk have it");
            return Err(Error::shape("w_uv", expected, self.w_uv.shape()));
        }
        let row = latent.saturating_add(rope);
        let dims = match &self.tokens {
            Tokens::Array(latents, lengths) => {
                if (latents.dim().0, latents.dim().2) != (batch, row) {
                    let expected =
                        format!("[batch, kv_len, r + d_R] = [{batch}, _, {row}] as q and w_uk have it");
                    return Err(Error::shape("latents", expected, latents.shape()));
                }
                // Lengths alone are left to be checked.
                let q = self.q.slice(s![.., .., .., ..0]);
                let k = latents.slice(s![.., .., ..0]).insert_axis(Axis(1));
                Qkv { q, k: k.view(), v: k.view(), lengths: *lengths, out: PhantomData::<O> }.dims()?
            }
            Tokens::Cache(x) => {
                let shape = x.cache.shape();
                if (shape.kv_heads, shape.head_dim, shape.value_dim) != (1, row, latent) {
                    let expected = format!("a cache of latents of {latent} + {rope} elements");
                    return Err(Error::value("cache", expected, format_args!("{shape:?}")));
                }
                x.dims_for(query)?
            }
        };
        Ok(Dims { head_dim: query, value_dim: value, ..dims })
    }

    fn out_dim(&self) -> Result<Dim4> {
        let dims = self.dims()?;
        Ok((self.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}
