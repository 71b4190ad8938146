//! Queries, keys and values, and what branches have of their own.

use ndarray::ArrayView4;

use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Qkv};

/// Queries, keys and values, the gates of the branches, and what branches have
/// of their own.
#[derive(Clone, Copy, Debug)]
pub struct Branches<'a, T> {
    /// What the selected blocks are of.
    pub qkv: Qkv<'a, T>,
    /// `[batch, q_heads, q_len, 3]`: of pools, blocks and window.
    pub gates: ArrayView4<'a, f32>,
    /// Compressed keys and values, `[batch, kv_heads, pools, dim]`, one for each
    /// pool that is whole.
    pub compressed: Option<[ArrayView4<'a, T>; 2]>,
    /// Keys and values of the window, of the shapes of the others.
    pub window: Option<[ArrayView4<'a, T>; 2]>,
}

impl<'a, T> Branches<'a, T> {
    /// With means as pools, and the same keys and values for all.
    pub fn new(qkv: Qkv<'a, T>, gates: ArrayView4<'a, f32>) -> Self {
        Self { qkv, gates, compressed: None, window: None }
    }

    /// With compressed keys and values.
    pub fn compressed(self, k: ArrayView4<'a, T>, v: ArrayView4<'a, T>) -> Self {
        Self { compressed: Some([k, v]), ..self }
    }

    /// With keys and values of the window.
    pub fn window(self, k: ArrayView4<'a, T>, v: ArrayView4<'a, T>) -> Self {
        Self { window: Some([k, v]), ..self }
    }
}

impl<T: Element> Input for Branches<'_, T> {
    type Out = T;

    fn dims(&self) -> Result<Dims> {
        let dims = self.qkv.dims()?;
        let Dims { batch, q_heads, kv_heads, q_len, head_dim, value_dim, .. } = dims;
        if dims.packed {
            return Err(Error::packed("NSA"));
        }
        if self.gates.dim() != (batch, q_heads, q_len, 3) {
            let expected = format!("[batch, q_heads, q_len, 3] = [{batch}, {q_heads}, {q_len}, 3]");
            return Err(Error::shape("gates", expected, self.gates.shape()));
        }
        if let Some([k, v]) = &self.compressed {
            let n = k.dim().2;
            for (name, x, dim) in [("compressed k", k, head_dim), ("compressed v", v, value_dim)] {
                if x.dim() != (batch, kv_heads, n, dim) {
                    let expected =
                        format!("[batch, kv_heads, pools, dim] = [{batch}, {kv_heads}, {n}, {dim}]");
                    return Err(Error::shape(name, expected, x.shape()));
                }
            }
        }
        if let Some([k, v]) = &self.window {
            for (name, x, want) in [("window k", k, &self.qkv.k), ("window v", v, &self.qkv.v)] {
                if x.dim() != want.dim() {
                    let expected = format!("that of the other branches, {:?}", want.shape());
                    return Err(Error::shape(name, expected, x.shape()));
                }
            }
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.qkv)
    }
}
