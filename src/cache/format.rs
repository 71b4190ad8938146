//! How a cache stores a row.

use half::{bf16, f16};

use super::rows::{Elements, RowStore};
use crate::element::Element;

/// How a cache stores the key or value of a token in a head: rounded to an
/// [`Element`] type, or quantised to [`Int8`](super::Int8). Sealed.
pub trait Format: Copy + std::fmt::Debug + Send + Sync + 'static {
    /// Memory of such rows.
    #[doc(hidden)]
    type Rows: RowStore;
}

macro_rules! elements {
    ($($element:ty),*) => {$(
        /// Rows of this type, which attention reads where they lie.
        impl Format for $element {
            type Rows = Elements<$element>;
        }
        const _: () = assert!(<$element as Element>::ROUNDING > 0.0);
    )*};
}
elements!(f32, f16, bf16);
