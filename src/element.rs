//! Storage types. Arithmetic is `f32` for every one of them; values are
//! rounded to the storage type once, to nearest even, when an output is
//! written.

use half::{bf16, f16};

use crate::simd::any::IntoAny;
use crate::simd::storage::Storage;

/// The storage types, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision: 11 bits of significand.
    F16,
    /// bfloat16: the range of `f32` with 8 bits of significand.
    Bf16,
}

impl DType {
    /// The name that frameworks use: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Numbers of `bf16` that add up to one of this type. No two have as many.
    pub(crate) const fn parts(self) -> usize {
        match self {
            Self::F32 => <f32 as Storage>::PARTS,
            Self::F16 => <f16 as Storage>::PARTS,
            Self::Bf16 => <bf16 as Storage>::PARTS,
        }
    }
}

/// A type that queries, keys, values and outputs may be stored in. Sealed:
/// [`f32`], [`half::f16`] and [`half::bf16`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no storage type of attention-kernels",
    note = "storage types are `f32`, `half::f16` and `half::bf16`; convert an array of others with `mapv`"
)]
pub trait Element: Copy + Default + Send + Sync + std::fmt::Debug + IntoAny + 'static {
    /// Which type this is.
    const DTYPE: DType;

    /// The largest relative error of rounding to this type.
    const ROUNDING: f64;

    /// 0, somewhere in memory.
    #[doc(hidden)]
    const ZERO: &'static Self;

    /// Widens, exactly.
    fn to_f32(self) -> f32;

    /// Rounds to nearest even.
    fn from_f32(x: f32) -> Self;

    /// Widens, exactly.
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    const ROUNDING: f64 = 1.0 / 16_777_216.0;
    const ZERO: &'static Self = &0.0;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    const ROUNDING: f64 = 1.0 / 2048.0;
    const ZERO: &'static Self = &f16::ZERO;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    const ROUNDING: f64 = 1.0 / 256.0;
    const ZERO: &'static Self = &bf16::ZERO;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}
