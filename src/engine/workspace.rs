//! Scratch memory: counted, caller-owned, reusable.

use ndarray::ArrayViewMut4;

use crate::error::{Error, Result};
use crate::simd::mem::{Arena, Buffer};

/// Scratch memory for kernels.
///
/// Any workspace serves any call: one that is too small grows. After one call,
/// or when made [`with_capacity`](Self::with_capacity) of what the mechanism
/// asks for, further calls of the same sizes allocate nothing.
#[derive(Debug, Default, Clone)]
pub struct Workspace(Buffer);

impl Workspace {
    /// An empty workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// A workspace of at least `bytes`; an empty one if memory has no room for
    /// them, which whatever needs them then refuses.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut workspace = Self::new();
        workspace.0.grow(bytes);
        workspace
    }

    /// Bytes that it holds.
    pub fn capacity(&self) -> usize {
        self.0.len()
    }

    /// Fills it with NaN, for tests: no output depends on what it held.
    #[doc(hidden)]
    pub fn poison(&mut self) {
        self.0.fill(u64::MAX);
    }

    /// At least `bytes` of memory to cut up.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is not as much.
    pub(crate) fn arena(&mut self, bytes: usize) -> Result<Arena<'_>> {
        if !self.0.grow(bytes) {
            return Err(Error::too_large("workspace", format_args!("{bytes} bytes")));
        }
        Ok(self.0.arena())
    }
}

/// Declares what a thread works in: slices, a line each with how many elements,
/// and after a semicolon other rooms and what these are made for.
///
/// ```text
/// room! {
///     /// What a thread works in.
///     Scratch<'a>(d: usize, n: usize) {
///         sums: f32 = d.saturating_mul(n),
///         bits: u64 = n.div_ceil(64);
///         probe: probe::Room<'a> = (d, n)
///     }
/// }
/// ```
macro_rules! room {
    (
        $(#[$meta:meta])*
        $name:ident<$lt:lifetime>($($arg:ident: $arg_type:ty),*) {
            $($field:ident: $type:ty = $n:expr),+ $(; $($sub:ident: $sub_type:ty = ($($given:expr),*)),+)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub(crate) struct $name<$lt> {
            $($field: &$lt mut [$type],)+
            $($($sub: $sub_type,)+)?
        }

        impl<$lt> $name<$lt> {
            pub(crate) fn bytes($($arg: $arg_type),*) -> usize {
                let parts = [
                    $($crate::simd::mem::bytes_for::<$type>($n),)+
                    $($(<$sub_type>::bytes($($given),*),)+)?
                ];
                parts.into_iter().fold(0, usize::saturating_add)
            }

            pub(crate) fn take(arena: &mut $crate::simd::mem::Arena<$lt>, $($arg: $arg_type),*) -> Self {
                Self {
                    $($field: arena.take($n),)+
                    $($($sub: <$sub_type>::take(arena, $($given),*),)+)?
                }
            }
        }
    };
}
pub(crate) use room;
/// An array cut off an arena, with whatever was in it.
pub(crate) fn take_array<'a>(
    arena: &mut Arena<'a>,
    shape: (usize, usize, usize, usize),
) -> ArrayViewMut4<'a, f32> {
    let (a, b, c, d) = shape;
    ArrayViewMut4::from_shape(shape, arena.take(a * b * c * d)).expect("as many elements")
}
