//! Queries, keys and values with log decays.

use ndarray::{ArrayView3, ArrayView4};

use crate::attention::Input;
use crate::element::Element;
use crate::error::Result;
use crate::input::tokens::{check_channels, check_tokens, token_dims};
use crate::input::{Dims, Lengths, Qkv};

/// Queries, keys and values with one log decay a token.
///
/// The number of heads is the largest among queries, keys and values; the
/// others' numbers, that of the decays too, divide it, and neighbouring heads
/// share what there is less of.
///
/// ```
/// use attention_kernels::{Input, Qkv, linear::TokenGated};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::<f32>::ones((1, 4, 10, 16));
/// let log_decay = Array3::from_elem((1, 4, 10), -0.1);
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let x = TokenGated { qkv, log_decay: log_decay.view() };
/// assert_eq!(x.out_dim()?, (1, 4, 10, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TokenGated<'a, T> {
    /// Queries, keys and values.
    pub qkv: Qkv<'a, T>,
    /// Logarithms of what each token leaves of the state, `[batch, heads,
    /// len]`: 0 for everything, `-inf` for nothing.
    pub log_decay: ArrayView3<'a, f32>,
}

impl<'a, T> TokenGated<'a, T> {
    /// The same for a shorter while.
    pub fn reborrow<'b>(self) -> TokenGated<'b, T>
    where
        'a: 'b,
    {
        TokenGated { qkv: self.qkv.reborrow(), log_decay: self.log_decay.reborrow() }
    }
}

impl<T: Element> Input for TokenGated<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

    fn dims(&self) -> Result<Dims> {
        let dims = token_dims(&self.qkv)?;
        check_tokens("log_decay", &self.log_decay, self.qkv.q.dim().0, &dims)?;
        Ok(dims)
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        let dims = self.dims()?;
        Ok((self.qkv.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

/// Queries, keys and values with log decays for each channel of the keys.
///
/// Heads are shared as in [`TokenGated`].
///
/// ```
/// use attention_kernels::{Input, Qkv, linear::ChannelGated};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 4, 10, 16));
/// let log_decay = Array4::from_elem((1, 4, 10, 16), -0.1);
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let x = ChannelGated { qkv, log_decay: log_decay.view() };
/// assert_eq!(x.out_dim()?, (1, 4, 10, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ChannelGated<'a, T> {
    /// Queries, keys and values.
    pub qkv: Qkv<'a, T>,
    /// Logarithms of what each token leaves of each row of the state, `[batch,
    /// heads, len, head_dim]`: 0 for everything, `-inf` for nothing.
    pub log_decay: ArrayView4<'a, f32>,
}

impl<'a, T> ChannelGated<'a, T> {
    /// The same for a shorter while.
    pub fn reborrow<'b>(self) -> ChannelGated<'b, T>
    where
        'a: 'b,
    {
        ChannelGated { qkv: self.qkv.reborrow(), log_decay: self.log_decay.reborrow() }
    }
}

impl<T: Element> Input for ChannelGated<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

    fn dims(&self) -> Result<Dims> {
        let dims = token_dims(&self.qkv)?;
        check_channels("log_decay", &self.log_decay, self.qkv.q.dim().0, &dims, dims.head_dim)?;
        Ok(dims)
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        let dims = self.dims()?;
        Ok((self.qkv.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}
