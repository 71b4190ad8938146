//! Inputs that are declared: an array a line, with named axes that all arrays
//! have to agree on.

use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, check_lengths, check_offsets};

/// An axis of an array, as it is declared.
#[derive(Debug)]
pub(crate) struct Axis {
    name: &'static str,
    /// Of the name: what is compared.
    hash: u64,
    /// Whether the array may have any divisor of the axis' size, neighbours
    /// sharing what there is less of.
    divides: bool,
}

/// FNV-1a.
const fn hash(name: &str) -> u64 {
    let (bytes, mut hash, mut i) = (name.as_bytes(), 0xcbf2_9ce4_8422_2325, 0);
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash
}

impl Axis {
    pub(crate) const fn new(name: &'static str) -> Self {
        Self { name, hash: hash(name), divides: false }
    }

    pub(crate) const fn dividing(name: &'static str) -> Self {
        Self { name, hash: hash(name), divides: true }
    }
}

/// An array that came for a declared one.
pub(crate) struct Given<'a> {
    pub(crate) name: &'static str,
    pub(crate) axes: &'static [Axis],
    pub(crate) shape: &'a [usize],
}

/// Axes of an input.
const MOST: usize = 8;

/// The sizes of the axes of an input.
#[derive(Debug)]
pub(crate) struct Sizes {
    axes: [(u64, usize); MOST],
    len: usize,
}

impl Sizes {
    fn find(&self, hash: u64) -> Option<usize> {
        self.axes[..self.len].iter().find(|axis| axis.0 == hash).map(|axis| axis.1)
    }

    /// The size of an axis, 0 if there is none.
    pub(crate) fn of(&self, axis: &Axis) -> usize {
        self.find(axis.hash).unwrap_or_default()
    }

    /// The sizes of a call over tokens, each in its own axis.
    pub(crate) fn dims(&self, head_dim: &Axis, value_dim: &Axis) -> Dims {
        const BATCH: Axis = Axis::new("batch");
        const HEADS: Axis = Axis::new("heads");
        const LEN: Axis = Axis::new("len");
        let (heads, len) = (self.of(&HEADS), self.of(&LEN));
        Dims {
            batch: self.of(&BATCH),
            q_heads: heads,
            kv_heads: heads,
            q_len: len,
            kv_len: len,
            head_dim: self.of(head_dim),
            value_dim: self.of(value_dim),
            packed: false,
        }
    }
}

/// The sizes that arrays agree on: of each axis what the first array has that
/// has all of it, or the largest if each may have a divisor.
pub(crate) fn unify(arrays: &[Given<'_>]) -> Result<Sizes> {
    let mut sizes = Sizes { axes: [(0, 0); MOST], len: 0 };
    for divides in [false, true] {
        let fixed = sizes.len;
        for array in arrays {
            for (axis, &size) in
                array.axes.iter().zip(array.shape).filter(|(axis, _)| axis.divides == divides)
            {
                match sizes.axes[..sizes.len].iter().position(|known| known.0 == axis.hash) {
                    Some(at) if at >= fixed && divides => {
                        sizes.axes[at].1 = sizes.axes[at].1.max(size);
                    }
                    Some(_) => {}
                    None => {
                        sizes.axes[sizes.len] = (axis.hash, size);
                        sizes.len += 1;
                    }
                }
            }
        }
    }
    for array in arrays {
        let fits = |(axis, &size): (&Axis, &usize)| {
            let whole = sizes.of(axis);
            if axis.divides { divides(size, whole) } else { size == whole }
        };
        if !array.axes.iter().zip(array.shape).all(fits) {
            return Err(mismatch(array, &sizes));
        }
    }
    Ok(sizes)
}

fn divides(part: usize, whole: usize) -> bool {
    if part == 0 { whole == 0 } else { whole.is_multiple_of(part) }
}

#[cold]
fn mismatch(array: &Given<'_>, sizes: &Sizes) -> Error {
    let list = |each: &dyn Fn(&Axis) -> String| array.axes.iter().map(each).collect::<Vec<_>>().join(", ");
    let names = list(&|axis| axis.name.to_owned());
    let numbers = list(&|axis| {
        let size = sizes.of(axis);
        if axis.divides { format!("{size} or a divisor") } else { size.to_string() }
    });
    Error::shape(array.name, format!("[{names}] = [{numbers}]"), array.shape)
}

/// The sizes of an input whose queries and keys are the same tokens, once its
/// sequences are known; `first` is its first array.
pub(crate) fn with_lengths(mut dims: Dims, lengths: &Lengths<'_>, first: &Given<'_>) -> Result<Dims> {
    match lengths {
        Lengths::Full => {}
        Lengths::Keys(_) => {
            let reason = "queries and keys are the same tokens, which padded shortens";
            return Err(Error::Conflict { option: "key_lengths", with: "a recurrence", reason });
        }
        Lengths::Tokens(tokens) => check_lengths(("padded", tokens), dims.batch, ("len", dims.q_len))?,
        Lengths::Packed { queries, keys } => {
            if dims.batch != 1 {
                let names: Vec<_> = first.axes.iter().map(|axis| axis.name).collect();
                let expected = format!("[{}] with a batch of 1 in a packed batch", names.join(", "));
                return Err(Error::shape(first.name, expected, first.shape));
            }
            check_offsets("offsets", queries, dims.q_len)?;
            if queries != keys {
                let expected = "the offsets of the queries, which are the same tokens";
                return Err(Error::value("keys", expected, format_args!("{keys:?}")));
            }
            dims.batch = queries.len() - 1;
            dims.packed = true;
        }
    }
    dims.checked()
}

/// Axes as they are declared: `[batch, heads/, len]`, where `/` marks an axis
/// of which an array may have a divisor.
macro_rules! axes {
    (@list [$($done:expr,)*]) => { &[$($done),*] };
    (@list [$($done:expr,)*] $name:ident / $(, $($rest:tt)*)?) => {
        $crate::input::declare::axes!(@list
            [$($done,)* $crate::input::declare::Axis::dividing(stringify!($name)),] $($($rest)*)?)
    };
    (@list [$($done:expr,)*] $name:ident $(, $($rest:tt)*)?) => {
        $crate::input::declare::axes!(@list
            [$($done,)* $crate::input::declare::Axis::new(stringify!($name)),] $($($rest)*)?)
    };
    (@doc [$($done:tt)*] $name:ident / , $($rest:tt)+) => {
        $crate::input::declare::axes!(@doc [$($done)* stringify!($name), " or a divisor, ",] $($rest)+)
    };
    (@doc [$($done:tt)*] $name:ident , $($rest:tt)+) => {
        $crate::input::declare::axes!(@doc [$($done)* stringify!($name), ", ",] $($rest)+)
    };
    (@doc [$($done:tt)*] $name:ident) => { concat!($($done)* stringify!($name), "]`.") };
    (@view $lt:lifetime $type:ident [$($a:ident $(/)?),*]) => {
        $crate::input::declare::axes!(@of $lt $type ($($a)*))
    };
    (@of $lt:lifetime $type:ident ($a:ident $b:ident $c:ident)) => { ndarray::ArrayView3<$lt, $type> };
    (@of $lt:lifetime $type:ident ($a:ident $b:ident $c:ident $d:ident)) => { ndarray::ArrayView4<$lt, $type> };
    ([$($axes:tt)*]) => {
        const { $crate::input::declare::axes!(@list [] $($axes)*) as &'static [$crate::input::declare::Axis] }
    };
}
pub(crate) use axes;

/// Declares an input over tokens: a struct of views, one line an array.
///
/// ```text
/// input! {
///     /// What it is.
///     Input {
///         /// What the array is.
///         x: T [batch, heads, len, value_dim],
///         steps: f32 [batch, heads/, len];    // any divisor of the heads
///         /// With what it is.
///         gated by z: T [batch, heads, len, value_dim],   // may be left out
///     }
///     head_dim state_dim, value_dim value_dim;  // names of the axes
/// }
/// ```
///
/// `Input(qkv) { .. }` has queries, keys and values besides, of which each
/// array may have a divisor of the heads. The struct gets `new`, `packed`, a
/// setter for each array that may be left out, `reborrow`, and
/// [`Input`](crate::Input) with the checks.
macro_rules! input {
    (
        $(#[$meta:meta])*
        $input:ident ($qkv:ident) {
            $($(#[$doc:meta])* $field:ident: $type:ident $axes:tt),+ $(,)?
        }
    ) => {
        $(#[$meta])*
        pub struct $input<'a, T> {
            /// Queries and keys `[batch, heads or a divisor, len, head_dim]`,
            /// values `[batch, heads or a divisor, len, value_dim]`: the
            /// number of heads is the largest of all arrays, and neighbouring
            /// heads share what there is less of.
            pub $qkv: $crate::input::Qkv<'a, T>,
            $($(#[$doc])* #[doc = $crate::input::declare::input!(@doc $axes)]
            pub $field: $crate::input::declare::axes!(@view 'a $type $axes),)+
        }

        impl<'a, T> $input<'a, T> {
            /// Of these arrays.
            pub fn new(
                $qkv: $crate::input::Qkv<'a, T>,
                $($field: $crate::input::declare::axes!(@view 'a $type $axes)),+
            ) -> Self {
                Self { $qkv, $($field),+ }
            }

            /// Sequences of different lengths packed along the length axis of
            /// a batch of 1: sequence `s` has tokens `offsets[s]..offsets[s +
            /// 1]` (`cu_seqlens`). What lies after the last offset is never read and
            /// has outputs of 0.
            pub fn packed(self, offsets: &'a [usize]) -> Self {
                Self { $qkv: self.$qkv.packed(offsets, offsets), ..self }
            }

            /// Batch entry `b` has only the first `lengths[b]` tokens; what lies
            /// after them is padding, which is never read and has outputs of 0. The
            /// state is then the one after the last token.
            pub fn padded(self, lengths: &'a [usize]) -> Self {
                Self { $qkv: self.$qkv.padded(lengths), ..self }
            }

            /// Reborrows for a shorter lifetime.
            pub fn reborrow<'b>(self) -> $input<'b, T>
            where
                'a: 'b,
            {
                $input { $qkv: self.$qkv.reborrow(), $($field: self.$field.reborrow()),+ }
            }
        }

        $crate::input::declare::input!(@impl $input, |x| x.$qkv.lengths,
            head_dim head_dim, value_dim value_dim;
            (x.$qkv.q, "q", [batch, heads/, len, head_dim])
            (x.$qkv.k, "k", [batch, heads/, len, head_dim])
            (x.$qkv.v, "v", [batch, heads/, len, value_dim])
            $((x.$field, stringify!($field), $axes))+;
        );
    };
    (
        $(#[$meta:meta])*
        $input:ident {
            $($(#[$doc:meta])* $field:ident: $type:ident $axes:tt),+
            $(; $($(#[$odoc:meta])* $setter:ident by $option:ident: $otype:ident $oaxes:tt),+)? $(,)?
        }
        head_dim $head_dim:ident, value_dim $value_dim:ident;
    ) => {
        $(#[$meta])*
        pub struct $input<'a, T> {
            $($(#[$doc])* #[doc = $crate::input::declare::input!(@doc $axes)]
            pub $field: $crate::input::declare::axes!(@view 'a $type $axes),)+
            $($($(#[$odoc])* #[doc = $crate::input::declare::input!(@doc $oaxes)]
            pub $option: Option<$crate::input::declare::axes!(@view 'a $otype $oaxes)>,)+)?
            /// How rows belong to sequences.
            pub lengths: $crate::input::Lengths<'a>,
        }

        impl<'a, T> $input<'a, T> {
            /// One sequence a batch entry.
            pub fn new($($field: $crate::input::declare::axes!(@view 'a $type $axes)),+) -> Self {
                let lengths = $crate::input::Lengths::Full;
                Self { $($field,)+ $($($option: None,)+)? lengths }
            }

            $($(
                #[doc = concat!("With [`", stringify!($option), "`](Self::", stringify!($option), ").")]
                pub fn $setter(self, $option: $crate::input::declare::axes!(@view 'a $otype $oaxes)) -> Self {
                    Self { $option: Some($option), ..self }
                }
            )+)?

            /// Sequences of different lengths packed along the length axis of
            /// a batch of 1: sequence `s` has tokens `offsets[s]..offsets[s +
            /// 1]` (`cu_seqlens`). What lies after the last offset is never read and
            /// has outputs of 0.
            pub fn packed(self, offsets: &'a [usize]) -> Self {
                Self { lengths: $crate::input::Lengths::Packed { queries: offsets, keys: offsets }, ..self }
            }

            /// Batch entry `b` has only the first `lengths[b]` tokens; what lies
            /// after them is padding, which is never read and has outputs of 0. The
            /// state is then the one after the last token.
            pub fn padded(self, lengths: &'a [usize]) -> Self {
                Self { lengths: $crate::input::Lengths::Tokens(lengths), ..self }
            }

            /// Reborrows for a shorter lifetime.
            pub fn reborrow<'b>(self) -> $input<'b, T>
            where
                'a: 'b,
            {
                $input {
                    $($field: self.$field.reborrow(),)+
                    $($($option: self.$option.map(|x| x.reborrow()),)+)?
                    lengths: self.lengths,
                }
            }
        }

        $crate::input::declare::input!(@impl $input, |x| x.lengths,
            head_dim $head_dim, value_dim $value_dim;
            $((x.$field, stringify!($field), $axes))+;
            $($((x.$option, stringify!($option), $oaxes))+)?
        );
    };
    (@doc [$($axes:tt)*]) => { $crate::input::declare::axes!(@doc ["Of shape `[",] $($axes)*) };
    (
        @impl $input:ident, |$x:ident| $lengths:expr, head_dim $head_dim:ident, value_dim $value_dim:ident;
        ($first:expr, $first_name:expr, $first_axes:tt) $(($array:expr, $name:expr, $axes:tt))*;
        $(($option:expr, $oname:expr, $oaxes:tt))*
    ) => {
        // Types that are macros cannot be derived for.
        impl<T> Clone for $input<'_, T> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<T> Copy for $input<'_, T> {}

        impl<T: std::fmt::Debug> std::fmt::Debug for $input<'_, T> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let $x = self;
                f.debug_struct(stringify!($input))
                    .field($first_name, &$first)
                    $(.field($name, &$array))*
                    $(.field($oname, &$option))*
                    .field("lengths", &$lengths)
                    .finish()
            }
        }

        impl<T: $crate::element::Element> $crate::input::Input for $input<'_, T> {
            type Out = T;

            fn lengths(&self) -> $crate::input::Lengths<'_> {
                let $x = self;
                $lengths
            }

            fn dims(&self) -> $crate::error::Result<$crate::input::Dims> {
                use $crate::input::declare::{Axis, Given, axes, unify, with_lengths};
                const HEAD_DIM: Axis = Axis::new(stringify!($head_dim));
                const VALUE_DIM: Axis = Axis::new(stringify!($value_dim));
                let $x = self;
                let first = || Given { name: $first_name, axes: axes!($first_axes), shape: $first.shape() };
                let sizes = unify(&[
                    first(),
                    $(Given { name: $name, axes: axes!($axes), shape: $array.shape() },)*
                    $(match &$option {
                        Some(array) => Given { name: $oname, axes: axes!($oaxes), shape: array.shape() },
                        None => Given { name: $oname, axes: &[], shape: &[] },
                    },)*
                ])?;
                with_lengths(sizes.dims(&HEAD_DIM, &VALUE_DIM), &$lengths, &first())
            }

            fn out_dim(&self) -> $crate::error::Result<$crate::input::Dim4> {
                let dims = self.dims()?;
                let $x = self;
                Ok(($first.shape()[0], dims.q_heads, dims.q_len, dims.value_dim))
            }
        }

        impl<T: $crate::element::Element> $crate::input::tokens::Tokens for $input<'_, T> {
            fn bytes(&self) -> usize {
                use $crate::input::tokens::size;
                let $x = self;
                size(&$first) $(+ size(&$array))* $(+ $option.as_ref().map_or(0, size))*
            }
        }
    };
}
pub(crate) use input;
