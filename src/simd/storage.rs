//! Loads and stores of the storage types, chosen by type.

use half::{bf16, f16};

use super::Simd;
use super::mem::Plain;

/// Loads that widen to `f32` and stores that round from it. Sealed.
pub trait Storage: Plain {
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

    /// Widens, exactly.
    fn widen(self) -> f32;

    /// Rounds to nearest even.
    fn narrow(x: f32) -> Self;
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
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
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
    #[inline(always)]
    fn widen(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
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
    #[inline(always)]
    fn widen(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }
}
