//! Inputs with something of each key beside them.

use std::fmt::Display;

use ndarray::ArrayView2;

use crate::error::{Error, Result};
use crate::input::Dims;

/// Declares one: arrays or a cache, and an array `[batch, kv_len]`, the same for all
/// heads, of which each element must be one that holds.
///
/// ```text
/// keyed! {
///     /// What it is.
///     WithTags<'a, X> {
///         /// What each is.
///         tags: u8, "0, 1 or 2" |tag| tag <= 2
///     }
/// }
/// ```
macro_rules! keyed {
    (
        $(#[$meta:meta])*
        $input:ident<'a, X> { $(#[$doc:meta])* $keys:ident: $type:ty, $expected:literal $holds:expr }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        pub struct $input<'a, X> {
            /// What is attended to: arrays, or queries over a cache.
            pub x: X,
            $(#[$doc])*
            pub $keys: ndarray::ArrayView2<'a, $type>,
        }

        impl<X: $crate::input::Input> $crate::input::Input for $input<'_, X> {
            type Out = X::Out;

            fn lengths(&self) -> $crate::input::Lengths<'_> {
                self.x.lengths()
            }

            fn dims(&self) -> $crate::error::Result<$crate::input::Dims> {
                let dims = self.x.dims()?;
                $crate::input::keyed::check(stringify!($keys), &self.$keys, &dims, $expected, $holds)?;
                Ok(dims)
            }

            fn out_dim(&self) -> $crate::error::Result<$crate::input::Dim4> {
                self.dims()?;
                self.x.out_dim()
            }
        }
    };
}
pub(crate) use keyed;

/// Makes of the scores of a sequence's keys from `first` on what `f` says of each and its
/// key's own.
#[inline(always)]
pub(crate) fn each<T: Copy>(
    keys: &ArrayView2<'_, T>,
    sequence: usize,
    first: usize,
    scores: &mut [f32],
    f: impl Fn(f32, T) -> f32,
) {
    let row = keys.row(sequence);
    match row.to_slice().and_then(|row| row.get(first..)) {
        Some(row) => scores.iter_mut().zip(row).for_each(|(score, &of)| *score = f(*score, of)),
        None => scores.iter_mut().zip(first..row.len()).for_each(|(score, key)| *score = f(*score, row[key])),
    }
}

/// Refuses an array of keys that does not fit.
pub(crate) fn check<T: Copy + Display>(
    argument: &'static str,
    keys: &ArrayView2<'_, T>,
    dims: &Dims,
    expected: &str,
    holds: impl Fn(T) -> bool,
) -> Result<()> {
    if dims.packed {
        return Err(Error::packed(argument));
    }
    if keys.dim() != (dims.batch, dims.kv_len) {
        let expected = format!("[batch, kv_len] = [{}, {}]", dims.batch, dims.kv_len);
        return Err(Error::shape(argument, expected, keys.shape()));
    }
    match keys.iter().find(|&&x| !holds(x)) {
        Some(x) => Err(Error::value(argument, expected, x)),
        None => Ok(()),
    }
}
