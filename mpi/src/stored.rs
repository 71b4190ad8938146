//! Arrays as bytes.

use attention_kernels::Element;
use attention_kernels::half::{bf16, f16};
use ndarray::{Array, ArrayView, Dimension, IntoDimension};

/// Numbers that travel in their own type: `f32`, `f16`, `bf16`.
pub trait Stored: Element {
    /// A zero that lives as long as is asked.
    #[doc(hidden)]
    fn zero() -> &'static [Self];
    #[doc(hidden)]
    fn put(self, to: &mut Vec<u8>);
    #[doc(hidden)]
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! stored {
    ($($t:ty: $zero:expr),+) => {$(
        impl Stored for $t {
            fn zero() -> &'static [Self] {
                const { &[$zero] }
            }
            #[inline]
            fn put(self, to: &mut Vec<u8>) {
                to.extend_from_slice(&self.to_ne_bytes());
            }
            #[inline]
            fn get(bytes: &[u8]) -> Self {
                Self::from_ne_bytes(std::array::from_fn(|i| bytes[i]))
            }
        }
    )+};
}
stored!(f32: 0.0, f16: f16::ZERO, bf16: bf16::ZERO);

/// Appends the numbers in the order of the axes.
pub(crate) fn pack<T: Stored, D: Dimension>(x: ArrayView<'_, T, D>, to: &mut Vec<u8>) {
    to.reserve(x.len() * size_of::<T>());
    for &x in x {
        x.put(to);
    }
}

/// Takes numbers off the front of `from`. Sizes were agreed on before: what is missing
/// would be 0.
pub(crate) fn unpack<T: Stored, S: IntoDimension>(from: &mut &[u8], shape: S) -> Array<T, S::Dim> {
    let mut out = Array::from_elem(shape, T::default());
    let bytes = (out.len() * size_of::<T>()).min(from.len());
    let (mine, rest) = from.split_at(bytes);
    for (x, bytes) in out.iter_mut().zip(mine.chunks_exact(size_of::<T>())) {
        *x = T::get(bytes);
    }
    *from = rest;
    out
}
