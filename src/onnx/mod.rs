//! ONNX's attention operators, with their own arguments: what a custom operator of a
//! runtime calls.
//!
//! | operator | opsets | here |
//! |---|---|---|
//! | `Attention` | 23 to 25 | [`Attention`] |
//! | `LinearAttention` | 27 | [`LinearAttention`] |
//!
//! Attributes are fields of their names, inputs and outputs are those of the operator in
//! their layouts: `[batch, len, heads * dim]` or `[batch, heads, len, dim]`. Arrays that lie
//! one element after the other are not copied; a packed one of other strides is. The
//! kernels are those of [`dense`](crate::dense) and [`linear`](crate::linear), in f32
//! inside: types of inputs are f32, f16 and bf16, the same for all of a call.

mod attention;
mod linear;

pub use attention::{Attention, AttentionInputs, AttentionMask, AttentionOutputs};
pub use linear::{LinearAttention, LinearAttentionInputs, UpdateRule};

use ndarray::{ArrayView3, ArrayViewMut3, ArrayViewMut4, CowArray, Ix4};

use crate::element::Element;
use crate::error::{Error, Result};

/// `[batch, len, heads * dim]` as `[batch, heads, len, dim]`.
fn unpacked<'a, T: Element>(
    argument: &'static str,
    x: ArrayView3<'a, T>,
    (attribute, heads): (&'static str, usize),
) -> Result<CowArray<'a, T, Ix4>> {
    let (batch, len, width) = x.dim();
    if heads == 0 {
        return Err(Error::value(attribute, "at least 1", heads));
    }
    if !width.is_multiple_of(heads) {
        let expected = format!("[batch, len, {heads} * dim] for {heads} heads");
        return Err(Error::shape(argument, expected, x.shape()));
    }
    let dim = (batch, len, heads, width / heads);
    let by_token: CowArray<'a, T, Ix4> = match x.into_shape_with_order(dim) {
        Ok(x) => x.into(),
        Err(_) => x
            .as_standard_layout()
            .into_owned()
            .into_shape_with_order(dim)
            .map_err(|_| Error::too_large(argument, format_args!("{dim:?}")))?
            .into(),
    };
    Ok(by_token.permuted_axes([0, 2, 1, 3]))
}

/// `[batch, len, heads * dim]` to write into as `[batch, heads, len, dim]`.
fn unpacked_mut<'a, T>(
    argument: &'static str,
    x: ArrayViewMut3<'a, T>,
    heads: usize,
) -> Result<ArrayViewMut4<'a, T>> {
    let (batch, len, width) = x.dim();
    let dim = (batch, len, heads, width / heads.max(1));
    let by_token = x.into_shape_with_order(dim);
    let by_token = by_token.map_err(|_| Error::too_large(argument, format_args!("{dim:?}")))?;
    Ok(by_token.permuted_axes([0, 2, 1, 3]))
}
