//! Queries, keys and values, and what a gate looks at.

use ndarray::ArrayView4;

use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Qkv};

/// Queries, keys and values, and what the gate looks at: queries and keys of the
/// same shapes, before the rotation by position.
#[derive(Debug)]
pub struct Gated<'a, Q, K = Q, O = Q> {
    /// What is attended to.
    pub qkv: Qkv<'a, Q, K, O>,
    /// `[batch, q_heads, q_len, head_dim]`
    pub q: ArrayView4<'a, Q>,
    /// `[batch, kv_heads, kv_len, head_dim]`
    pub k: ArrayView4<'a, K>,
}

impl<Q, K, O> Gated<'_, Q, K, O> {
    /// The gate's queries and keys in place of the others.
    pub(crate) fn looked_at(&self) -> Qkv<'_, Q, K, O> {
        Qkv { q: self.q.reborrow(), k: self.k.reborrow(), ..self.qkv.reborrow() }
    }
}

impl<Q, K, O> Clone for Gated<'_, Q, K, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, K, O> Copy for Gated<'_, Q, K, O> {}

impl<Q: Element, K: Element, O: Element> Input for Gated<'_, Q, K, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        for (name, got, want) in
            [("gate q", self.q.shape(), self.qkv.q.shape()), ("gate k", self.k.shape(), self.qkv.k.shape())]
        {
            if got != want {
                return Err(Error::shape(name, format!("that of what is attended to, {want:?}"), got));
            }
        }
        self.qkv.dims()
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.qkv)
    }
}
