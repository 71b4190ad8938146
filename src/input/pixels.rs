//! One array of pixels, for what gates or convolves them.

use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::{Dims, Input};

input! {
    /// Pixels, row by row; channels are those of all heads, one after the
    /// other.
    ///
    /// ```
    /// use attention_kernels::{Input, neighborhood::Pixels};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::<f32>::ones((1, 2, 14 * 14, 24)); // 48 channels
    /// assert_eq!(Pixels::new(x.view()).out_dim()?, (1, 2, 196, 24));
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    Pixels {
        /// What is gated or convolved.
        x: T [batch, heads, len, dim]
    }
    head_dim dim, value_dim dim;
}

impl<T: crate::element::Element> Pixels<'_, T> {
    /// The sizes, of images of `shape`.
    pub(crate) fn image(&self, shape: [usize; 2]) -> Result<Dims> {
        let dims = self.dims()?;
        if dims.packed {
            return Err(Error::packed("a spatial shape"));
        }
        let pixels = shape[0].saturating_mul(shape[1]);
        if dims.q_len != pixels {
            let expected = format!("one row for each of the {pixels} pixels of the shape");
            return Err(Error::value("x", expected, dims.q_len));
        }
        Ok(dims)
    }
}
