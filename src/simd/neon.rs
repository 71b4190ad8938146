//! AArch64 Advanced SIMD.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use super::{Isa, Kernel, MAX_LANES, Sealed, Simd};

/// Proof that the CPU has Advanced SIMD.
#[derive(Clone, Copy, Debug)]
pub struct Neon(());

impl Sealed for Neon {}

impl Neon {
    /// The token, if the CPU has the instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

#[target_feature(enable = "neon")]
fn with_features<K: Kernel>(s: Neon, kernel: K) -> K::Output {
    kernel.run(s)
}

// SAFETY, for every block below: a token exists only where `detect` found the
// features that the intrinsic needs; pointers are valid by the contract of
// the method.
impl Neon {
    /// `2^n` for an integral `n` from -126 to 127, inf for 128.
    #[inline(always)]
    fn power(self, n: float32x4_t) -> float32x4_t {
        // 1.5 * 2^23 has no fraction bits, so that the biased exponent ends
        // up in the low bits of the sum.
        let biased = self.add(n, self.splat(12_582_912.0 + 127.0));
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(biased))) }
    }

    /// Bit `i` in lane `i`.
    #[inline(always)]
    fn bit(self) -> uint32x4_t {
        const BIT: [u32; 4] = [1, 2, 4, 8];
        unsafe { vld1q_u32(BIT.as_ptr()) }
    }
}

impl Simd for Neon {
    type F = float32x4_t;
    // A lane is all ones or all zeros.
    type M = uint32x4_t;
    const ISA: Isa = Isa::Neon;
    const LANES: usize = 4;
    const TILE_VECTORS: usize = 4;

    #[inline]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        unsafe { with_features(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn mul_sub(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(vnegq_f32(c), a, b) }
    }
    // FMAX and FMIN would give NaN where either is NaN.
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn abs(self, a: float32x4_t) -> float32x4_t {
        unsafe { vabsq_f32(a) }
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        unsafe { vrndnq_f32(a) }
    }
    #[inline(always)]
    fn fract(self, a: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, vrndmq_f32(a)) }
    }
    #[inline(always)]
    fn ldexp(self, a: float32x4_t, n: float32x4_t) -> float32x4_t {
        unsafe {
            // In this order the bounds let NaN through.
            let clamped = self.min(self.splat(254.0), self.max(self.splat(-252.0), vrndmq_f32(n)));
            // What goes beyond one factor comes first: where that step
            // rounds, the last one gives 0 anyway, so the result is rounded
            // once.
            let last = self.min(self.splat(127.0), self.max(self.splat(-126.0), clamped));
            let first = self.sub(clamped, last);
            let scaled = self.mul(self.mul(a, self.power(first)), self.power(last));
            vbslq_f32(vceqq_f32(n, n), scaled, n)
        }
    }
    #[inline(always)]
    fn ldexp_flush(self, a: float32x4_t, n: float32x4_t, least: f32) -> float32x4_t {
        unsafe {
            let flush = vcltq_f32(n, self.splat(least));
            let power = self.power(self.min(self.splat(128.0), vrndmq_f32(n)));
            vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(self.mul(a, power)), flush))
        }
    }
    #[inline(always)]
    fn lt(self, a: float32x4_t, b: float32x4_t) -> uint32x4_t {
        unsafe { vcltq_f32(a, b) }
    }
    #[inline(always)]
    fn select(self, m: uint32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(m, a, b) }
    }
    #[inline(always)]
    fn mask(self, bits: u64) -> uint32x4_t {
        unsafe { vtstq_u32(vdupq_n_u32(bits as u32), self.bit()) }
    }
    #[inline(always)]
    fn bits(self, m: uint32x4_t) -> u64 {
        unsafe { u64::from(vaddvq_u32(vandq_u32(m, self.bit()))) }
    }
    #[inline(always)]
    fn reduce_add(self, a: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(a) }
    }
    #[inline(always)]
    fn reduce_max(self, a: float32x4_t) -> f32 {
        unsafe { vmaxnmvq_f32(a) }
    }

    #[inline(always)]
    fn swap(self, a: float32x4_t, distance: usize) -> float32x4_t {
        unsafe { if distance == 1 { vrev64q_f32(a) } else { vextq_f32::<2>(a, a) } }
    }

    #[inline(always)]
    fn lookup(self, table: &[f32; 16], i: float32x4_t) -> float32x4_t {
        unsafe {
            let bytes = vld1q_u8_x4(table.as_ptr().cast());
            // The four bytes of element i start at 4 i; beyond 63 there is 0.
            let i = vmulq_n_u32(vandq_u32(vcvtq_u32_f32(i), vdupq_n_u32(15)), 0x0404_0404);
            let i = vreinterpretq_u8_u32(vaddq_u32(i, vdupq_n_u32(0x0302_0100)));
            vreinterpretq_f32_u8(vqtbl4q_u8(bytes, i))
        }
    }

    #[inline(always)]
    fn transpose(self, block: &mut [float32x4_t; MAX_LANES]) {
        unsafe {
            // Pairs of lanes, then pairs of pairs.
            let ab_even = vreinterpretq_f64_f32(vtrn1q_f32(block[0], block[1]));
            let ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(block[0], block[1]));
            let cd_even = vreinterpretq_f64_f32(vtrn1q_f32(block[2], block[3]));
            let cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(block[2], block[3]));
            block[0] = vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even));
            block[1] = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd));
            block[2] = vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even));
            block[3] = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
        }
    }

    #[inline(always)]
    fn reduce_add_each(self, block: &[float32x4_t; MAX_LANES]) -> float32x4_t {
        unsafe { vpaddq_f32(vpaddq_f32(block[0], block[1]), vpaddq_f32(block[2], block[3])) }
    }

    #[inline(always)]
    unsafe fn load_ptr(self, src: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(src) }
    }
    // The intrinsics for f16 need a newer compiler than this crate does; the
    // instructions are as old as AArch64.
    #[inline(always)]
    unsafe fn load_f16_ptr(self, src: *const f16) -> float32x4_t {
        unsafe {
            let narrow = vld1_u16(src.cast());
            let wide: float32x4_t;
            asm!(
                "fcvtl {wide:v}.4s, {narrow:v}.4h",
                wide = lateout(vreg) wide,
                narrow = in(vreg) narrow,
                options(pure, nomem, nostack, preserves_flags)
            );
            wide
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(self, src: *const bf16) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(src.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_i8_ptr(self, src: *const i8) -> float32x4_t {
        unsafe {
            let four = src.cast::<u32>().read_unaligned();
            let words = vget_low_s16(vmovl_s8(vcreate_s8(u64::from(four))));
            vcvtq_f32_s32(vmovl_s16(words))
        }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, dst: *mut f32, x: float32x4_t) {
        unsafe { vst1q_f32(dst, x) }
    }
    #[inline(always)]
    unsafe fn store_f16_ptr(self, dst: *mut f16, x: float32x4_t) {
        unsafe {
            let narrow: uint16x4_t;
            asm!(
                "fcvtn {narrow:v}.4h, {wide:v}.4s",
                narrow = lateout(vreg) narrow,
                wide = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags)
            );
            vst1_u16(dst.cast(), narrow);
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_ptr(self, dst: *mut bf16, x: float32x4_t) {
        unsafe {
            let bits = vreinterpretq_u32_f32(x);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            // Rounding could carry a NaN's payload into infinity: keep it quiet instead.
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
            let bits = vbslq_u32(vceqq_f32(x, x), rounded, quiet);
            vst1_u16(dst.cast(), vshrn_n_u32::<16>(bits));
        }
    }
    #[inline(always)]
    unsafe fn store_i8_ptr(self, dst: *mut i8, x: float32x4_t) {
        unsafe {
            let words = vqmovn_s32(vcvtnq_s32_f32(x));
            let bytes = vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(words, words)));
            dst.cast::<u32>().write_unaligned(vget_lane_u32::<0>(bytes));
        }
    }
}
