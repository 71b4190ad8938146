//! AVX-512: F, BW, DQ and VL.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::{Isa, Kernel, MAX_LANES, Sealed, Simd};

/// Proof that the CPU has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

impl Sealed for Avx512 {}

impl Avx512 {
    /// The token, if the CPU has the instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        // Asked for in every task: one load after the first time.
        static HAS: OnceLock<bool> = OnceLock::new();
        let has = *HAS.get_or_init(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt")
        });
        has.then_some(Self(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
fn with_features<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
    kernel.run(s)
}

// SAFETY, for every block below: a token exists only where `detect` found the
// features that the intrinsic needs; pointers are valid by the contract of
// the method.
/// The upper halves of two vectors in pairs, and what they leave of `x`.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn upper_halves(x: [__m512; 2], [low, high]: [__m512i; 2]) -> (__m512, [__m512; 2]) {
    // SAFETY: the caller's.
    unsafe {
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        // One choice of bits, since shuffles of two vectors take a port twice.
        const CHOOSE: i32 = 0xe2;
        let pairs = _mm512_ternarylogic_epi32::<CHOOSE>(high, upper, _mm512_srli_epi32::<16>(low));
        let low = _mm512_castsi512_ps(_mm512_and_si512(low, upper));
        let high = _mm512_castsi512_ps(_mm512_and_si512(high, upper));
        (_mm512_castsi512_ps(pairs), [_mm512_sub_ps(x[0], low), _mm512_sub_ps(x[1], high)])
    }
}

impl Simd for Avx512 {
    type F = __m512;
    type M = __mmask16;
    const ISA: Isa = Isa::Avx512;
    const LANES: usize = 16;
    const TILE_VECTORS: usize = 4;

    #[inline]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        unsafe { with_features(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn mul_sub(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmsub_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<0x08>(a) }
    }
    #[inline(always)]
    fn fract(self, a: __m512) -> __m512 {
        // Immediate 9: no fraction bits kept, round down, no exceptions.
        unsafe { _mm512_reduce_ps::<0x09>(a) }
    }
    #[inline(always)]
    fn ldexp(self, a: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn ldexp_flush(self, a: __m512, n: __m512, least: f32) -> __m512 {
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(n, _mm512_set1_ps(least));
            _mm512_maskz_scalef_ps(keep, a, n)
        }
    }
    #[inline(always)]
    fn lt(self, a: __m512, b: __m512) -> __mmask16 {
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, m: __mmask16, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(m, b, a) }
    }
    #[inline(always)]
    fn mask(self, bits: u64) -> __mmask16 {
        bits as __mmask16
    }
    #[inline(always)]
    fn bits(self, m: __mmask16) -> u64 {
        u64::from(m)
    }
    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn swap(self, a: __m512, distance: usize) -> __m512 {
        unsafe {
            match distance {
                1 => _mm512_permute_ps::<0xb1>(a),
                2 => _mm512_permute_ps::<0x4e>(a),
                4 => _mm512_shuffle_f32x4::<0xb1>(a, a),
                _ => _mm512_shuffle_f32x4::<0x4e>(a, a),
            }
        }
    }

    #[inline(always)]
    fn lookup(self, table: &[f32; 16], i: __m512) -> __m512 {
        unsafe { _mm512_permutexvar_ps(_mm512_cvtps_epi32(i), _mm512_loadu_ps(table.as_ptr())) }
    }

    #[inline(always)]
    fn load_digits(self, src: &[i8], bits: u32, place: u32) -> __m512 {
        let src = &src[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        let bytes = unsafe { _mm_loadu_si128(src.as_ptr().cast()) };
        unsafe {
            let x = _mm512_cvtepu8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(i8::MIN)));
            let x = _mm512_srl_epi32(x, _mm_cvtsi32_si128((bits * place) as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32((1 << bits) - 1)))
        }
    }

    #[inline(always)]
    fn transpose(self, block: &mut [__m512; MAX_LANES]) {
        unsafe {
            // Pairs, then fours within 128-bit groups.
            let mut t = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(block[2 * i], block[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(block[2 * i], block[2 * i + 1]);
            }
            let mut u = [_mm512_setzero_ps(); 16];
            for i in 0..4 {
                let (a, b, c, d) = (t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]);
                u[4 * i] = _mm512_shuffle_ps::<0x44>(a, c);
                u[4 * i + 1] = _mm512_shuffle_ps::<0xee>(a, c);
                u[4 * i + 2] = _mm512_shuffle_ps::<0x44>(b, d);
                u[4 * i + 3] = _mm512_shuffle_ps::<0xee>(b, d);
            }
            // u[4 i + r] holds, in group g, column 4 g + r of rows 4 i .. 4 i + 4.
            for r in 0..4 {
                let (a, b, c, d) = (u[r], u[4 + r], u[8 + r], u[12 + r]);
                let ab_even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let ab_odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
                let cd_even = _mm512_shuffle_f32x4::<0x88>(c, d);
                let cd_odd = _mm512_shuffle_f32x4::<0xdd>(c, d);
                block[r] = _mm512_shuffle_f32x4::<0x88>(ab_even, cd_even);
                block[8 + r] = _mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even);
                block[4 + r] = _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd);
                block[12 + r] = _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd);
            }
        }
    }

    #[inline(always)]
    fn reduce_add_each(self, block: &[__m512; MAX_LANES]) -> __m512 {
        unsafe {
            // Each step halves the vectors: sums of pairs within 128-bit
            // groups first, then across the groups.
            let mut fours = [_mm512_setzero_ps(); 4];
            for (i, four) in fours.iter_mut().enumerate() {
                let (a, b, c, d) = (block[4 * i], block[4 * i + 1], block[4 * i + 2], block[4 * i + 3]);
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                *four = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            }
            let low = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x88>(fours[0], fours[1]),
                _mm512_shuffle_f32x4::<0xdd>(fours[0], fours[1]),
            );
            let high = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x88>(fours[2], fours[3]),
                _mm512_shuffle_f32x4::<0xdd>(fours[2], fours[3]),
            );
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(low, high), _mm512_shuffle_f32x4::<0xdd>(low, high))
        }
    }

    #[inline(always)]
    fn pairs(self, a: __m512, b: __m512) -> (__m512, [__m512; 2]) {
        unsafe {
            let half = _mm512_set1_epi32(0x8000);
            let low = _mm512_add_epi32(_mm512_castps_si512(a), half);
            let high = _mm512_add_epi32(_mm512_castps_si512(b), half);
            upper_halves([a, b], [low, high])
        }
    }

    #[inline(always)]
    fn cut_pairs(self, a: __m512, b: __m512) -> (__m512, [__m512; 2]) {
        unsafe { upper_halves([a, b], [_mm512_castps_si512(a), _mm512_castps_si512(b)]) }
    }

    #[inline(always)]
    unsafe fn load_ptr(self, src: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(src) }
    }
    #[inline(always)]
    unsafe fn load_f16_ptr(self, src: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(self, src: *const bf16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_i8_ptr(self, src: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(src.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, dst: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(dst, x) }
    }
    #[inline(always)]
    unsafe fn store_f16_ptr(self, dst: *mut f16, x: __m512) {
        unsafe { _mm256_storeu_si256(dst.cast(), _mm512_cvtps_ph::<0x08>(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_ptr(self, dst: *mut bf16, x: __m512) {
        unsafe {
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            // Rounding could carry a NaN's payload into infinity: keep it quiet instead.
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let bits = _mm512_mask_blend_epi32(nan, rounded, quiet);
            _mm256_storeu_si256(dst.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits)));
        }
    }
    #[inline(always)]
    unsafe fn store_i8_ptr(self, dst: *mut i8, x: __m512) {
        unsafe { _mm_storeu_si128(dst.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))) }
    }
    #[inline(always)]
    fn load_tail(self, src: &[f32]) -> __m512 {
        let n = src.len().min(Self::LANES);
        // SAFETY: only the first n lanes are read, and the slice has them.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, src.as_ptr()) }
    }
    #[inline(always)]
    fn store_tail(self, dst: &mut [f32], x: __m512) {
        // A masked store costs several plain ones.
        if dst.len() >= Self::LANES {
            return self.store(dst, x);
        }
        let n = dst.len();
        // SAFETY: only the first n lanes are written, and the slice has them.
        unsafe { _mm512_mask_storeu_ps(dst.as_mut_ptr(), ((1u32 << n) - 1) as __mmask16, x) }
    }
}
