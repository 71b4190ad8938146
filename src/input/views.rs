//! Inputs of several parts, whose sizes are found by hand.

/// Declares one: a struct of views, a line each.
///
/// ```text
/// views! {
///     /// What it is.
///     Input<'a, T> {
///         /// What each is.
///         qkv: array Qkv<'a, T>,
///         agents: maybe Option<ArrayView4<'a, T>>,
///         bias: shared Option<&'a Bias<'a>>,      // what a call is told: counts for nothing
///     }
///     lengths(x) x.qkv.lengths;
///     dims(x) { .. }                              // of all arrays, checked
/// }
/// ```
///
/// The struct gets `reborrow`, [`Input`](crate::Input) and the bytes of its arrays.
macro_rules! views {
    (
        $(#[$meta:meta])*
        $input:ident<'a, T> { $($(#[$doc:meta])* $field:ident: $kind:ident $type:ty),+ $(,)? }
        lengths($lx:pat) $lengths:expr;
        dims($x:ident) $dims:block
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        pub struct $input<'a, T> {
            $($(#[$doc])* pub $field: $type,)+
        }

        impl<'a, T> $input<'a, T> {
            /// Reborrows for a shorter lifetime.
            pub fn reborrow<'b>(self) -> $input<'b, T>
            where
                'a: 'b,
            {
                $input { $($field: $crate::input::views::views!(@again $kind self.$field)),+ }
            }
        }

        impl<T: $crate::element::Element> $crate::input::Input for $input<'_, T> {
            type Out = T;

            fn lengths(&self) -> $crate::input::Lengths<'_> {
                let $lx = self;
                $lengths
            }

            fn dims(&self) -> $crate::error::Result<$crate::input::Dims> {
                let $x = self;
                $dims
            }

            fn out_dim(&self) -> $crate::error::Result<$crate::input::Dim4> {
                let dims = self.dims()?;
                let batch = if dims.packed { 1 } else { dims.batch };
                Ok((batch, dims.q_heads, dims.q_len, dims.value_dim))
            }
        }

        impl<T: $crate::element::Element> $crate::input::tokens::Tokens for $input<'_, T> {
            fn bytes(&self) -> usize {
                0 $(+ $crate::input::views::views!(@bytes $kind self.$field))+
            }
        }
    };
    (@again array $x:expr) => { $x.reborrow() };
    (@again maybe $x:expr) => { $x.map(|x| x.reborrow()) };
    (@again shared $x:expr) => { $x };
    (@bytes array $x:expr) => { $crate::input::views::Bytes::of(&$x) };
    (@bytes maybe $x:expr) => { $x.as_ref().map_or(0, $crate::input::views::Bytes::of) };
    (@bytes shared $x:expr) => { 0 };
}
pub(crate) use views;

use crate::input::{Qkv, tokens};

/// How many an array has.
pub(crate) trait Bytes {
    fn of(&self) -> usize;
}

impl<T> Bytes for Qkv<'_, T> {
    fn of(&self) -> usize {
        tokens::bytes(self)
    }
}

impl<T, D: ndarray::Dimension> Bytes for ndarray::ArrayView<'_, T, D> {
    fn of(&self) -> usize {
        tokens::size(self)
    }
}
