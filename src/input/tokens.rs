//! Checks of arrays whose queries and keys are the same tokens.

use crate::element::Element;
use crate::error::Result;
use crate::input::declare::{Axis, Given, axes, unify, with_lengths};
use crate::input::{Dims, Input, Lengths, Qkv};

/// An input whose queries and keys are the same tokens.
pub trait Tokens: Input {
    /// Bytes of all arrays.
    fn bytes(&self) -> usize;

    /// [`dims`](Input::dims), where queries and keys must be the same tokens.
    ///
    /// # Errors
    /// As `dims`.
    fn token_dims(&self) -> Result<Dims> {
        self.dims()
    }
}

impl<T: Element> Tokens for Qkv<'_, T> {
    fn bytes(&self) -> usize {
        bytes(self)
    }

    fn token_dims(&self) -> Result<Dims> {
        of_tokens(self)
    }
}

/// The sizes of queries, keys and values that are those of the same tokens.
pub(crate) fn of_tokens<Q, K, O>(x: &Qkv<'_, Q, K, O>) -> Result<Dims> {
    let lengths = match x.lengths {
        Lengths::Tokens(_) => Lengths::Full,
        others => others,
    };
    Qkv { lengths, ..*x }.dims()?;
    token_dims(x)
}

/// Bytes of an array.
pub(crate) fn size<A, D: ndarray::Dimension>(x: &ndarray::ArrayView<'_, A, D>) -> usize {
    x.len().saturating_mul(size_of::<A>())
}

/// The sizes of queries, keys and values whose tokens are the same, and which
/// may have different numbers of heads: each must divide the largest, and
/// heads of an array that has fewer are shared by neighbours.
pub(crate) fn token_dims<Q, K, O>(x: &Qkv<'_, Q, K, O>) -> Result<Dims> {
    const HEAD_DIM: Axis = Axis::new("head_dim");
    const VALUE_DIM: Axis = Axis::new("value_dim");
    let keys = axes!([batch, heads/, len, head_dim]);
    let values = axes!([batch, heads/, len, value_dim]);
    let q = Given { name: "q", axes: keys, shape: x.q.shape() };
    let k = Given { name: "k", axes: keys, shape: x.k.shape() };
    let v = Given { name: "v", axes: values, shape: x.v.shape() };
    let sizes = unify(&[q, k, v])?;
    let q = Given { name: "q", axes: keys, shape: x.q.shape() };
    with_lengths(sizes.dims(&HEAD_DIM, &VALUE_DIM), &x.lengths, &q)
}

/// Heads that have a state: the largest number.
pub(crate) fn heads<T>(x: &Qkv<'_, T>) -> usize {
    match x.q.dim().1 {
        0 => 0,
        heads => heads.max(x.k.dim().1).max(x.v.dim().1),
    }
}

/// The same of arrays that have been checked, where any of them may have most.
pub(crate) fn all_heads(x: &impl Tokens) -> usize {
    x.token_dims().map_or(0, |dims| dims.q_heads)
}

/// Bytes of queries, keys and values.
pub(crate) fn bytes<T>(x: &Qkv<'_, T>) -> usize {
    let arrays = [x.q.len(), x.k.len(), x.v.len()];
    arrays.into_iter().fold(0, usize::saturating_add).saturating_mul(size_of::<T>())
}
