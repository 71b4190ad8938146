//! Loads and stores of the storage types, chosen by type.

use half::{bf16, f16};

use super::Simd;
use super::any::{AnyArray, AnyOut};
use super::mem::{Heads, OutRows};

/// Loads that widen to `f32` and stores that round from it. Sealed.
pub trait Storage: Copy + 'static {
    /// Numbers of `bf16` that add up to one of this type.
    const PARTS: usize;

    /// Loads and widens `LANES` elements.
    ///
    /// # Safety
    /// They must be readable at `src`.
    unsafe fn load_ptr<S: Simd>(s: S, src: *const Self) -> S::F;

    /// Loads and widens the first `LANES` elements of `src`.
    fn load<S: Simd>(s: S, src: &[Self]) -> S::F;

    /// Loads and widens up to `LANES` elements; the missing ones are zero.
    fn load_tail<S: Simd>(s: S, src: &[Self]) -> S::F;

    /// Rounds and stores `x` to the first `LANES` elements of `dst`.
    fn store<S: Simd>(s: S, dst: &mut [Self], x: S::F);

    /// Rounds and stores as many lanes as `dst` has room for.
    fn store_tail<S: Simd>(s: S, dst: &mut [Self], x: S::F);

    /// An array as one of any type.
    fn any(x: Heads<'_, Self>) -> AnyArray<'_>;

    /// An output as one of any type.
    fn any_out(x: OutRows<'_, Self>) -> AnyOut<'_>;
}

impl Storage for f32 {
    const PARTS: usize = 3;

    #[inline(always)]
    unsafe fn load_ptr<S: Simd>(s: S, src: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_ptr(src) }
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, src: &[Self]) -> S::F {
        s.load(src)
    }
    #[inline(always)]
    fn load_tail<S: Simd>(s: S, src: &[Self]) -> S::F {
        s.load_tail(src)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, dst: &mut [Self], x: S::F) {
        s.store(dst, x);
    }
    #[inline(always)]
    fn store_tail<S: Simd>(s: S, dst: &mut [Self], x: S::F) {
        s.store_tail(dst, x);
    }
    fn any(x: Heads<'_, Self>) -> AnyArray<'_> {
        AnyArray::F32(x)
    }
    fn any_out(x: OutRows<'_, Self>) -> AnyOut<'_> {
        AnyOut::F32(x)
    }
}

impl Storage for f16 {
    const PARTS: usize = 2;

    #[inline(always)]
    unsafe fn load_ptr<S: Simd>(s: S, src: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_f16_ptr(src) }
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, src: &[Self]) -> S::F {
        s.load_f16(src)
    }
    #[inline(always)]
    fn load_tail<S: Simd>(s: S, src: &[Self]) -> S::F {
        s.load_f16_tail(src)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, dst: &mut [Self], x: S::F) {
        s.store_f16(dst, x);
    }
    #[inline(always)]
    fn store_tail<S: Simd>(s: S, dst: &mut [Self], x: S::F) {
        s.store_f16_tail(dst, x);
    }
    fn any(x: Heads<'_, Self>) -> AnyArray<'_> {
        AnyArray::F16(x)
    }
    fn any_out(x: OutRows<'_, Self>) -> AnyOut<'_> {
        AnyOut::F16(x)
    }
}

impl Storage for bf16 {
    const PARTS: usize = 1;

    #[inline(always)]
    unsafe fn load_ptr<S: Simd>(s: S, src: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_bf16_ptr(src) }
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, src: &[Self]) -> S::F {
        s.load_bf16(src)
    }
    #[inline(always)]
    fn load_tail<S: Simd>(s: S, src: &[Self]) -> S::F {
        s.load_bf16_tail(src)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, dst: &mut [Self], x: S::F) {
        s.store_bf16(dst, x);
    }
    #[inline(always)]
    fn store_tail<S: Simd>(s: S, dst: &mut [Self], x: S::F) {
        s.store_bf16_tail(dst, x);
    }
    fn any(x: Heads<'_, Self>) -> AnyArray<'_> {
        AnyArray::Bf16(x)
    }
    fn any_out(x: OutRows<'_, Self>) -> AnyOut<'_> {
        AnyOut::Bf16(x)
    }
}
