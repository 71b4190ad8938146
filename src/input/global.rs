//! Tokens of a grid with keys and values beside it.

use crate::input::declare::input;

input! {
    /// Queries, keys and values of a grid, and keys and values beside it that
    /// every query sees.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, neighborhood::{GlobalQkv, Neighborhood}};
    /// use ndarray::Array4;
    ///
    /// let (x, text) = (Array4::<f32>::ones((1, 2, 14 * 14, 16)), Array4::ones((1, 2, 20, 16)));
    /// let x = GlobalQkv::new(Qkv::new(x.view(), x.view(), x.view()), text.view(), text.view());
    /// let out = Neighborhood::builder(&[14, 14], &[7, 7]).global(20).build()?.forward(x)?;
    /// assert_eq!(out.dim(), (1, 2, 196, 16));
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    GlobalQkv(qkv) {
        /// Keys beside the grid.
        global_k: T [batch, heads/, global, head_dim],
        /// Their values.
        global_v: T [batch, heads/, global, value_dim],
    }
}
