//! Slices with a shape and strides: inputs and outputs for callers that have no
//! [`ndarray`], or another version of it.
//!
//! ```
//! use attention_kernels::raw::{View, ViewMut};
//! use attention_kernels::{Attention, Qkv, Workspace, dense::Dense};
//!
//! let (heads, len, dim) = (2, 5, 16);
//! let x = vec![1f32; heads * len * dim];
//! // [batch, len, heads, dim] in memory, as projections leave it.
//! let q = View::rows(&x, [1, len, heads, dim])?;
//! // The same by strides, along which anything may lie.
//! let kv = View::strided(&x, [1, heads, len, dim], [heads * len * dim, dim, heads * dim, 1])?;
//!
//! let mut out = vec![0f32; heads * len * dim];
//! let to = ViewMut::new(&mut out, [1, heads, len, dim])?;
//! let dense = Dense::builder().causal().build()?;
//! dense.forward_raw_into(Qkv::of_raw(q, kv, kv), to, &mut Workspace::new())?;
//! assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6));
//! # Ok::<(), attention_kernels::Error>(())
//! ```

use ndarray::{ArrayView4, ArrayViewMut4, ShapeBuilder};

use crate::error::{Error, Result};

/// A slice as an array `[batch, heads, len, dim]` to read.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T>(pub(crate) ArrayView4<'a, T>);

impl<'a, T> View<'a, T> {
    /// An array whose elements lie one after the other, the last axis
    /// innermost.
    ///
    /// # Errors
    /// [`Error::Value`] for a slice of another length than the shape has.
    pub fn new(data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        if number_of(shape) != Some(data.len()) {
            let expected = format!("as many elements as the shape {shape:?} has");
            return Err(Error::value("data", expected, data.len()));
        }
        ArrayView4::from_shape(shape, data).map(Self).map_err(|error| unfit(shape, &error))
    }

    /// An array that lies as `[batch, len, heads, dim]`, which is the shape to give here.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn rows(data: &'a [T], [batch, len, heads, dim]: [usize; 4]) -> Result<Self> {
        let Self(rows) = Self::new(data, [batch, len, heads, dim])?;
        Ok(Self(rows.permuted_axes([0, 2, 1, 3])))
    }

    /// An array whose neighbours along axis `i` lie `strides[i]` elements
    /// apart. A stride of 0 repeats an axis. The slice may be longer.
    ///
    /// # Errors
    /// [`Error::Value`] for strides that lead out of the slice.
    pub fn strided(data: &'a [T], shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        let with = shape.strides(strides);
        ArrayView4::from_shape(with, data).map(Self).map_err(|error| unfit(shape, &error))
    }
}

/// A slice as an array `[batch, heads, len, dim]` to write.
#[derive(Debug)]
pub struct ViewMut<'a, T>(pub(crate) ArrayViewMut4<'a, T>);

impl<'a, T> ViewMut<'a, T> {
    /// As [`View::new`].
    ///
    /// # Errors
    /// As there.
    pub fn new(data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        if number_of(shape) != Some(data.len()) {
            let expected = format!("as many elements as the shape {shape:?} has");
            return Err(Error::value("data", expected, data.len()));
        }
        ArrayViewMut4::from_shape(shape, data).map(Self).map_err(|error| unfit(shape, &error))
    }

    /// As [`View::rows`].
    ///
    /// # Errors
    /// As there.
    pub fn rows(data: &'a mut [T], [batch, len, heads, dim]: [usize; 4]) -> Result<Self> {
        let Self(rows) = Self::new(data, [batch, len, heads, dim])?;
        Ok(Self(rows.permuted_axes([0, 2, 1, 3])))
    }

    /// As [`View::strided`], but no two elements may share a place.
    ///
    /// # Errors
    /// As there, and for strides that lead two elements to one place.
    pub fn strided(data: &'a mut [T], shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        let with = shape.strides(strides);
        ArrayViewMut4::from_shape(with, data).map(Self).map_err(|error| unfit(shape, &error))
    }
}

/// Elements of an array, if so many can be counted.
fn number_of(shape: [usize; 4]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &len| n.checked_mul(len))
}

fn unfit(shape: [usize; 4], error: &ndarray::ShapeError) -> Error {
    Error::value("strides", format!("strides of an array {shape:?} that lies within the slice"), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused() {
        let data = [0f32; 24];
        assert!(View::new(&data, [1, 2, 3, 4]).is_ok());
        assert!(View::new(&data, [1, 2, 3, 3]).is_err());
        assert!(View::new(&data, [1 << 32, 1 << 32, 2, 3]).is_err());
        assert!(View::strided(&data, [1, 2, 3, 4], [0, 12, 4, 1]).is_ok());
        assert!(View::strided(&data, [1, 2, 3, 4], [0, 13, 4, 1]).is_err());
        assert!(View::strided(&data, [1, 2, 3, 1 << 62], [0, 12, 4, 0]).is_err());
        let mut out = [0f32; 24];
        assert!(ViewMut::new(&mut out, [1, 2, 3, 5]).is_err());
        assert!(ViewMut::strided(&mut out, [1, 2, 3, 4], [24, 4, 8, 1]).is_ok());
        let error = ViewMut::strided(&mut out, [1, 2, 3, 4], [24, 0, 4, 1]).unwrap_err();
        assert!(error.to_string().starts_with("strides: "), "{error}");
    }

    #[test]
    fn elements_are_where_strides_say() {
        let data: Vec<f32> = (0..24).map(|x| x as f32).collect();
        let view = View::strided(&data, [1, 2, 3, 4], [24, 4, 8, 1]).unwrap();
        assert_eq!(view.0[[0, 1, 2, 3]], 4.0 + 16.0 + 3.0);
    }
}
