//! How a cache stores a row.

use half::{bf16, f16};

use super::rows::{Elements, RowStore};
use crate::element::Element;

/// How a cache stores the key or value of a token in a head: rounded to an
/// [`Element`] type, or quantised to [`Int8`](super::Int8),
/// [`Int4`](super::Int4), a format of GGML ([`Q8_0`](super::Q8_0),
/// [`Q4_0`](super::Q4_0)) or [`Rotated`](super::Rotated) codes. Sealed.
pub trait Format: Copy + std::fmt::Debug + Send + Sync + 'static {
    /// Memory of such keys.
    #[doc(hidden)]
    type Keys: RowStore;

    /// Memory of such values.
    #[doc(hidden)]
    type Values: RowStore;
}

macro_rules! elements {
    ($($element:ty),*) => {$(
        /// Rows of this type, which attention reads where they lie.
        impl Format for $element {
            type Keys = Elements<$element>;
            type Values = Elements<$element>;
        }
        const _: () = assert!(<$element as Element>::ROUNDING > 0.0);
    )*};
}
elements!(f32, f16, bf16);
