//! Queries, keys and values whose queries have features, as values are.

use ndarray::ArrayView4;

use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::tokens::{self, Tokens};
use crate::input::{Dim4, Dims, Input, Lengths, Qkv};

/// Queries, keys and values, and features of the queries.
#[derive(Clone, Copy, Debug)]
pub struct WithFeatures<'a, T> {
    /// What is attended to; values are features.
    pub qkv: Qkv<'a, T>,
    /// `[batch, q_heads, q_len, value_dim]`
    pub features: ArrayView4<'a, T>,
}

impl<T: Element> Input for WithFeatures<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

    fn dims(&self) -> Result<Dims> {
        let (dims, want) = (self.qkv.dims()?, self.qkv.out_dim()?);
        if self.features.dim() != want {
            let expected = format!("[batch, q_heads, q_len, value_dim] = {:?}", <[usize; 4]>::from(want));
            return Err(Error::shape("features", expected, self.features.shape()));
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        self.qkv.out_dim()
    }
}

impl<T: Element> Tokens for WithFeatures<'_, T> {
    fn bytes(&self) -> usize {
        tokens::bytes(&self.qkv) + tokens::size(&self.features)
    }
}
