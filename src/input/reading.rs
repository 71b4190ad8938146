//! Latents and tokens that they read, and tokens that read latents.

use ndarray::{ArrayView3, ArrayView4};

use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::views::views;

views! {
    /// Latents, and the tokens that they read.
    ///
    /// ```
    /// use attention_kernels::{Input, latent::Reading};
    /// use ndarray::{Array3, Array4};
    ///
    /// // The same 16 latents for both sequences: a stride of 0.
    /// let (latents, tokens) = (Array4::<f32>::ones((1, 1, 16, 64)), Array3::ones((2, 1000, 48)));
    /// let latents = latents.broadcast((2, 1, 16, 64)).unwrap();
    /// let x = Reading::new(latents, tokens.view()).lengths(&[1000, 17]);
    /// assert_eq!((x.out_dim()?, x.pooled().out_dim()?), ((2, 1, 16, 64), (2, 1, 1, 64)));
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    Reading<'a, T> {
        /// `[batch, heads, latents, dim]`; elements of a latent are those of all heads,
        /// one after the other.
        latents: array ArrayView4<'a, T>,
        /// `[batch, tokens, width]`
        tokens: array ArrayView3<'a, T>,
        /// How many of the tokens of each sequence there are; the others are padding.
        lengths: shared Option<&'a [usize]>,
        /// Whether the output is one row, the mean of what latents become, of unit
        /// length.
        pooled: shared bool,
    }
    lengths(_) crate::input::Lengths::Full;
    dims(x) {
        let ((batch, heads, rows, dim), (sequences, tokens, _)) = (x.latents.dim(), x.tokens.dim());
        if sequences != batch {
            return Err(Error::shape("tokens", format!("[batch, tokens, width] with a batch of {batch}"), x.tokens.shape()));
        }
        check_lengths(x.lengths, batch, tokens)?;
        sizes([batch, heads, rows, tokens, dim], x.pooled)
    }
}

impl<'a, T> Reading<'a, T> {
    /// Of these arrays, all tokens of every sequence.
    pub fn new(latents: ArrayView4<'a, T>, tokens: ArrayView3<'a, T>) -> Self {
        Self { latents, tokens, lengths: None, pooled: false }
    }

    /// Only the first `lengths[b]` tokens of sequence `b`.
    pub fn lengths(self, lengths: &'a [usize]) -> Self {
        Self { lengths: Some(lengths), ..self }
    }

    /// The mean of what the latents become, of unit length, `[batch, heads, 1, dim]`.
    pub fn pooled(self) -> Self {
        Self { pooled: true, ..self }
    }
}

views! {
    /// Tokens that are to be pooled.
    Embeddings<'a, T> {
        /// `[batch, heads, len, dim]`; elements of a token are those of all heads, one
        /// after the other.
        tokens: array ArrayView4<'a, T>,
        /// How many of the tokens of each sequence are pooled; the others are padding.
        lengths: shared Option<&'a [usize]>,
        /// Whether the output is one row, the mean of what tokens become, of unit length.
        pooled: shared bool,
    }
    lengths(_) crate::input::Lengths::Full;
    dims(x) {
        let (batch, heads, len, dim) = x.tokens.dim();
        check_lengths(x.lengths, batch, len)?;
        sizes([batch, heads, len, len, dim], x.pooled)
    }
}

impl<'a, T> Embeddings<'a, T> {
    /// What each of these tokens becomes, `[batch, heads, len, dim]`.
    pub fn new(tokens: ArrayView4<'a, T>) -> Self {
        Self { tokens, lengths: None, pooled: false }
    }

    /// The mean of the first `lengths[b]` tokens of sequence `b` after that, of unit
    /// length, `[batch, heads, 1, dim]`; 0 where there are none.
    pub fn pooled(self, lengths: &'a [usize]) -> Self {
        Self { lengths: Some(lengths), pooled: true, ..self }
    }
}

views! {
    /// Tokens that are to be pooled, and what asks for them.
    Pooling<'a, T> {
        /// `[batch, heads, len, dim]`; elements of a token are those of all heads, one
        /// after the other.
        tokens: array ArrayView4<'a, T>,
        /// `[batch, n, width]`: a row of the output each. Without any it has one row.
        queries: maybe Option<ArrayView3<'a, T>>,
        /// How many of the tokens of each sequence are pooled; the others are padding.
        lengths: shared Option<&'a [usize]>,
    }
    lengths(_) crate::input::Lengths::Full;
    dims(x) {
        let (batch, heads, len, dim) = x.tokens.dim();
        let rows = match &x.queries {
            Some(queries) if queries.dim().0 != batch => {
                let expected = format!("[batch, n, width] with a batch of {batch}");
                return Err(Error::shape("queries", expected, queries.shape()));
            }
            Some(queries) => queries.dim().1,
            None => 1,
        };
        check_lengths(x.lengths, batch, len)?;
        sizes([batch, heads, rows, len, dim], false)
    }
}

impl<'a, T> Pooling<'a, T> {
    /// All tokens of every sequence.
    pub fn new(tokens: ArrayView4<'a, T>) -> Self {
        Self { tokens, queries: None, lengths: None }
    }

    /// With queries `[batch, n, width]`; those of all sequences are a broadcast.
    pub fn queries(self, queries: ArrayView3<'a, T>) -> Self {
        Self { queries: Some(queries), ..self }
    }

    /// Only the first `lengths[b]` tokens of sequence `b`.
    pub fn lengths(self, lengths: &'a [usize]) -> Self {
        Self { lengths: Some(lengths), ..self }
    }
}

fn check_lengths(lengths: Option<&[usize]>, batch: usize, most: usize) -> Result<()> {
    match lengths {
        Some(lengths) if lengths.len() != batch || lengths.iter().any(|&n| n > most) => {
            let expected = format!("{batch} lengths of at most {most}");
            Err(Error::value("lengths", expected, format_args!("{lengths:?}")))
        }
        _ => Ok(()),
    }
}

fn sizes([batch, heads, rows, tokens, dim]: [usize; 5], pooled: bool) -> Result<Dims> {
    let all = Dims {
        batch,
        q_heads: heads,
        kv_heads: heads,
        q_len: rows,
        kv_len: tokens,
        head_dim: dim,
        value_dim: dim,
        packed: false,
    };
    all.checked()?;
    Ok(Dims { q_len: if pooled { 1 } else { rows }, ..all })
}
