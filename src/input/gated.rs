//! Queries, keys and values with log decays.

use crate::input::declare::input;

input! {
    /// Queries, keys and values with one log decay a token.
    ///
    /// ```
    /// use attention_kernels::{Input, Qkv, linear::TokenGated};
    /// use ndarray::{Array3, Array4};
    ///
    /// let x = Array4::<f32>::ones((1, 4, 10, 16));
    /// let log_decay = Array3::from_elem((1, 4, 10), -0.1);
    /// let qkv = Qkv::new(x.view(), x.view(), x.view());
    /// let x = TokenGated::new(qkv, log_decay.view());
    /// assert_eq!(x.out_dim()?, (1, 4, 10, 16));
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    TokenGated(qkv) {
        /// Logarithms of what each token leaves of the state: 0 for
        /// everything, `-inf` for nothing.
        log_decay: f32 [batch, heads/, len],
    }
}

input! {
    /// Queries, keys and values with log decays for each channel of the keys.
    ///
    /// ```
    /// use attention_kernels::{Input, Qkv, linear::ChannelGated};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::<f32>::ones((1, 4, 10, 16));
    /// let log_decay = Array4::from_elem((1, 4, 10, 16), -0.1);
    /// let qkv = Qkv::new(x.view(), x.view(), x.view());
    /// let x = ChannelGated::new(qkv, log_decay.view());
    /// assert_eq!(x.out_dim()?, (1, 4, 10, 16));
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    ChannelGated(qkv) {
        /// Logarithms of what each token leaves of each row of the state: 0
        /// for everything, `-inf` for nothing.
        log_decay: f32 [batch, heads/, len, head_dim],
    }
}
