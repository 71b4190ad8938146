//! Options that are declared: a line each, with its docs and its range.

use ndarray::{ArrayBase, Data, Dimension};

use crate::error::{Error, Result};

/// What numbers of an option must be.
pub(crate) struct Range {
    /// For one number, and for several.
    expected: [&'static str; 2],
    holds: fn(f64) -> bool,
}

impl Range {
    pub(crate) const fn new(expected: [&'static str; 2], holds: fn(f64) -> bool) -> Self {
        Self { expected, holds }
    }
}

pub(crate) const FINITE: Range = Range::new(["a finite number", "finite numbers"], |x| x.is_finite());

pub(crate) const POSITIVE: Range = Range::new(["a finite number above 0"; 2], |x| x.is_finite() && x > 0.0);

/// What may be added to a sum of weights.
pub(crate) const EPSILON: Range =
    Range::new(["a finite number of at least 0"; 2], |x| x.is_finite() && x >= 0.0);

/// The numbers of an option.
pub(crate) trait Numbers {
    /// Whether there may be several.
    const SEVERAL: bool;

    /// The first that does not hold.
    fn offender(&self, holds: fn(f64) -> bool) -> Option<String>;
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Numbers for $number {
            const SEVERAL: bool = false;

            fn offender(&self, holds: fn(f64) -> bool) -> Option<String> {
                (!holds(f64::from(*self))).then(|| self.to_string())
            }
        }
    )*};
}
numbers!(f32, f64);

impl<N: Numbers> Numbers for Option<N> {
    const SEVERAL: bool = N::SEVERAL;

    fn offender(&self, holds: fn(f64) -> bool) -> Option<String> {
        self.as_ref().and_then(|x| x.offender(holds))
    }
}

impl<N: Numbers> Numbers for Vec<N> {
    const SEVERAL: bool = true;

    fn offender(&self, holds: fn(f64) -> bool) -> Option<String> {
        self.iter().find_map(|x| x.offender(holds))
    }
}

impl<N: Numbers, S: Data<Elem = N>, D: Dimension> Numbers for ArrayBase<S, D> {
    const SEVERAL: bool = true;

    fn offender(&self, holds: fn(f64) -> bool) -> Option<String> {
        self.iter().find_map(|x| x.offender(holds))
    }
}

/// Refuses an option outside its range.
pub(crate) fn check<N: Numbers>(argument: &'static str, numbers: &N, range: &Range) -> Result<()> {
    match numbers.offender(range.holds) {
        Some(x) => Err(Error::value(argument, range.expected[usize::from(N::SEVERAL)], x)),
        None => Ok(()),
    }
}

/// Declares the builder of a mechanism that is a configuration of the
/// recurrence, or of a scan.
///
/// ```text
/// options! {
///     /// Builds a [`Mechanism`].
///     Builder of Mechanism, form scale "1" growth;
///     given { rates: Vec<f32>, in RANGE; }      // what Builder::with is given
///     own { seed: u64 = 0; }                    // with methods written by hand
///     set {                                     // of any value
///         /// What it is. Default: 64.
///         block: usize = 64;
///     }
///     maybe {                                   // `None` by default
///         /// What it is.
///         table: Array2<f32>;
///     }
///     flags {
///         /// What it does.
///         causal;
///     }
///     numbers {
///         /// What it is. Default: 0.
///         bias: f32 = 0.0, in FINITE;
///     }
///     build(builder, config) { Ok(Mechanism { .. }) }   // all in range by now
/// }
/// ```
macro_rules! options {
    (
        $(#[$meta:meta])*
        $builder:ident of $mechanism:ty, $($common:ident $($default:literal)?)+;
        $(given { $($given:ident: $given_type:ty $(, in $given_range:expr)?;)* })?
        $(own { $($(#[$own_doc:meta])* $own:ident: $own_type:ty = $own_value:expr $(, in $own_range:expr)?;)* })?
        $(set { $($(#[$set_doc:meta])* $set:ident: $set_type:ty = $set_value:expr;)* })?
        $(maybe { $($(#[$maybe_doc:meta])* $maybe:ident: $maybe_type:ty $(, in $maybe_range:expr)?;)* })?
        $(flags { $($(#[$flag_doc:meta])* $flag:ident;)* })?
        $(numbers { $($(#[$doc:meta])* $number:ident: $type:ty = $value:expr, in $range:expr;)* })?
        build($this:ident, $config:ident) $build:block
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        pub struct $builder {
            options: $crate::stages::recur::Options,
            $($($given: $given_type,)*)?
            $($($(#[$own_doc])* $own: $own_type,)*)?
            $($($set: $set_type,)*)?
            $($($maybe: Option<$maybe_type>,)*)?
            $($($flag: bool,)*)?
            $($($number: $type,)*)?
        }

        impl $builder {
            fn with($($($given: $given_type),*)?) -> Self {
                Self {
                    options: $crate::stages::recur::Options {
                        root: false $(|| $crate::stages::options::options!(@root $common $($default)?))+,
                        ..Default::default()
                    },
                    $($($given,)*)?
                    $($($own: $own_value,)*)?
                    $($($set: $set_value,)*)?
                    $($($maybe: None,)*)?
                    $($($flag: false,)*)?
                    $($($number: $value,)*)?
                }
            }

            $($(
                $(#[$set_doc])*
                pub fn $set(mut self, $set: $set_type) -> Self {
                    self.$set = $set;
                    self
                }
            )*)?

            $($(
                $(#[$maybe_doc])*
                pub fn $maybe(mut self, $maybe: $maybe_type) -> Self {
                    self.$maybe = Some($maybe);
                    self
                }
            )*)?

            $($(
                $(#[$flag_doc])*
                pub fn $flag(mut self) -> Self {
                    self.$flag = true;
                    self
                }
            )*)?

            $($(
                $(#[$doc])*
                pub fn $number(mut self, $number: $type) -> Self {
                    self.$number = $number;
                    self
                }
            )*)?

            /// Checks the options.
            ///
            /// # Errors
            /// [`Error::Value`](crate::Error::Value) for an option outside its
            /// range, [`Error::Isa`](crate::Error::Isa) for an instruction set
            /// that the CPU lacks.
            pub fn build(self) -> $crate::error::Result<$mechanism> {
                let $this = self;
                $($($($crate::stages::options::check(stringify!($given), &$this.$given, &$given_range)?;)?)*)?
                $($($($crate::stages::options::check(stringify!($own), &$this.$own, &$own_range)?;)?)*)?
                $($($($crate::stages::options::check(stringify!($maybe), &$this.$maybe, &$maybe_range)?;)?)*)?
                $($($crate::stages::options::check(stringify!($number), &$this.$number, &$range)?;)*)?
                let $config = $this.options.build()?;
                $build
            }
        }

        $($crate::stages::options::options!(@common $builder $common $($default)?);)+
        $crate::stages::options::options!(@isa $builder);
    };
    // A literal that was matched as one is no pattern any more.
    (@root scale $default:literal) => { $crate::stages::options::is_root($default) };
    (@root $($other:tt)*) => { false };
    (@common $builder:ident form) => {
        impl $builder {
            /// Forces a form. Default: [`Form::Auto`](crate::linear::Form::Auto).
            pub fn form(mut self, form: $crate::engine::recur::Form) -> Self {
                self.options.form = form;
                self
            }
        }
    };
    (@common $builder:ident isa) => {};
    (@isa $builder:ident) => {
        impl $builder {
            /// Forces an instruction set. Default: the best one of the CPU,
            /// or what [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
            pub fn isa(mut self, isa: $crate::simd::Isa) -> Self {
                self.options.isa = Some(isa);
                self
            }
        }
    };
    (@common $builder:ident scale $default:literal) => {
        impl $builder {
            #[doc = concat!("The factor of the outputs. Default: `", $default, "`.")]
            pub fn scale(mut self, scale: f32) -> Self {
                self.options.scale = Some(scale);
                self
            }
        }
    };
    (@common $builder:ident growth) => {
        impl $builder {
            /// Permits log decays above 0, which let the state grow without
            /// bounds.
            pub fn allow_growth(mut self) -> Self {
                self.options.growth = true;
                self
            }
        }
    };
}
pub(crate) use options;

/// Whether a default scale, as its docs have it, is `1 / sqrt(head_dim)`.
pub(crate) fn is_root(default: &str) -> bool {
    default == "1 / sqrt(head_dim)"
}
