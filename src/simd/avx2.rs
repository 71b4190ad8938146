//! AVX2 with FMA and F16C.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::{Isa, Kernel, MAX_LANES, Sealed, Simd};

/// Proof that the CPU has AVX2, FMA, F16C and the bit counts that come with
/// them.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Sealed for Avx2 {}

impl Avx2 {
    /// The token, if the CPU has the instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        // Asked for in every task: one load after the first time.
        static HAS: OnceLock<bool> = OnceLock::new();
        let has = *HAS.get_or_init(|| {
            is_x86_feature_detected!("avx2")
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

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
fn with_features<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
    kernel.run(s)
}

// SAFETY, for every block below: a token exists only where `detect` found the
// features that the intrinsic needs; pointers are valid by the contract of
// the method.
impl Avx2 {
    /// `2^n` for an integral `n` from -126 to 127, inf for 128.
    #[inline(always)]
    fn power(self, n: __m256) -> __m256 {
        // 1.5 * 2^23 has no fraction bits, so that the biased exponent ends
        // up in the low bits of the sum.
        let biased = self.add(n, self.splat(12_582_912.0 + 127.0));
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(biased))) }
    }

    /// A mask of the first `n` lanes.
    #[inline(always)]
    fn first(self, n: usize) -> __m256i {
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lanes)
        }
    }
}

impl Simd for Avx2 {
    type F = __m256;
    // A lane is all ones or all zeros.
    type M = __m256;
    const ISA: Isa = Isa::Avx2;
    const LANES: usize = 8;
    const TILE_VECTORS: usize = 2;

    #[inline]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        unsafe { with_features(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn mul_sub(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmsub_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn fract(self, a: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, _mm256_floor_ps(a)) }
    }
    #[inline(always)]
    fn ldexp(self, a: __m256, n: __m256) -> __m256 {
        unsafe {
            // In this order the bounds let NaN through.
            let clamped = self.min(self.splat(254.0), self.max(self.splat(-252.0), _mm256_floor_ps(n)));
            // What goes beyond one factor comes first: where that step
            // rounds, the last one gives 0 anyway, so the result is rounded
            // once.
            let last = self.min(self.splat(127.0), self.max(self.splat(-126.0), clamped));
            let first = self.sub(clamped, last);
            let scaled = self.mul(self.mul(a, self.power(first)), self.power(last));
            // All ones is a NaN.
            _mm256_or_ps(scaled, _mm256_cmp_ps::<_CMP_UNORD_Q>(n, n))
        }
    }
    #[inline(always)]
    fn ldexp_flush(self, a: __m256, n: __m256, least: f32) -> __m256 {
        unsafe {
            let keep = _mm256_cmp_ps::<_CMP_NLT_UQ>(n, self.splat(least));
            let power = self.power(self.min(self.splat(128.0), _mm256_floor_ps(n)));
            _mm256_and_ps(keep, self.mul(a, power))
        }
    }
    #[inline(always)]
    fn lt(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, m: __m256, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_blendv_ps(b, a, m) }
    }
    #[inline(always)]
    fn mask(self, bits: u64) -> __m256 {
        unsafe {
            let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_and_si256(_mm256_set1_epi32(bits as i32), bit);
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit))
        }
    }
    #[inline(always)]
    fn bits(self, m: __m256) -> u64 {
        unsafe { _mm256_movemask_ps(m) as u64 }
    }
    #[inline(always)]
    fn reduce_add(self, a: __m256) -> f32 {
        unsafe {
            let fours = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
            _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        unsafe {
            let fours = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let twos = _mm_max_ps(fours, _mm_movehl_ps(fours, fours));
            _mm_cvtss_f32(_mm_max_ss(twos, _mm_movehdup_ps(twos)))
        }
    }

    #[inline(always)]
    fn swap(self, a: __m256, distance: usize) -> __m256 {
        unsafe {
            match distance {
                1 => _mm256_permute_ps::<0xb1>(a),
                2 => _mm256_permute_ps::<0x4e>(a),
                _ => _mm256_permute2f128_ps::<0x01>(a, a),
            }
        }
    }

    #[inline(always)]
    fn lookup(self, table: &[f32; 16], i: __m256) -> __m256 {
        unsafe {
            let i = _mm256_cvtps_epi32(i);
            let half = |first| _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr().add(first)), i);
            // Bit 3 of an index is that of the half: its sign once shifted.
            _mm256_blendv_ps(half(0), half(8), _mm256_castsi256_ps(_mm256_slli_epi32::<28>(i)))
        }
    }

    #[inline(always)]
    fn load_digits(self, src: &[i8], bits: u32, place: u32) -> __m256 {
        let src = &src[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        let bytes = unsafe { _mm_loadl_epi64(src.as_ptr().cast()) };
        unsafe {
            let x = _mm256_cvtepu8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(i8::MIN)));
            let x = _mm256_srl_epi32(x, _mm_cvtsi32_si128((bits * place) as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32((1 << bits) - 1)))
        }
    }

    #[inline(always)]
    fn transpose(self, block: &mut [__m256; MAX_LANES]) {
        unsafe {
            // Pairs, then fours within 128-bit groups.
            let mut t = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(block[2 * i], block[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(block[2 * i], block[2 * i + 1]);
            }
            let mut u = [_mm256_setzero_ps(); 8];
            for i in 0..2 {
                let (a, b, c, d) = (t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]);
                u[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
                u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
            }
            // u[4 i + r] holds, in group g, column 4 g + r of rows 4 i .. 4 i + 4.
            for r in 0..4 {
                block[r] = _mm256_permute2f128_ps::<0x20>(u[r], u[4 + r]);
                block[4 + r] = _mm256_permute2f128_ps::<0x31>(u[r], u[4 + r]);
            }
        }
    }

    #[inline(always)]
    fn reduce_add_each(self, block: &[__m256; MAX_LANES]) -> __m256 {
        unsafe {
            // Each step halves the vectors: sums of pairs within 128-bit
            // groups first, then across the groups.
            let mut fours = [_mm256_setzero_ps(); 2];
            for (i, four) in fours.iter_mut().enumerate() {
                let (a, b, c, d) = (block[4 * i], block[4 * i + 1], block[4 * i + 2], block[4 * i + 3]);
                let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                *four = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
            }
            _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(fours[0], fours[1]),
                _mm256_permute2f128_ps::<0x31>(fours[0], fours[1]),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_ptr(self, src: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(src) }
    }
    #[inline(always)]
    unsafe fn load_f16_ptr(self, src: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(self, src: *const bf16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_i8_ptr(self, src: *const i8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(src.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, dst: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(dst, x) }
    }
    #[inline(always)]
    unsafe fn store_f16_ptr(self, dst: *mut f16, x: __m256) {
        unsafe { _mm_storeu_si128(dst.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_ptr(self, dst: *mut bf16, x: __m256) {
        unsafe {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            // Rounding could carry a NaN's payload into infinity: keep it quiet instead.
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let bits = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let (low, high) = (_mm256_castsi256_si128(bits), _mm256_extracti128_si256::<1>(bits));
            _mm_storeu_si128(dst.cast(), _mm_packus_epi32(low, high));
        }
    }
    #[inline(always)]
    unsafe fn store_i8_ptr(self, dst: *mut i8, x: __m256) {
        unsafe {
            let wide = _mm256_cvtps_epi32(x);
            let words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storel_epi64(dst.cast(), _mm_packs_epi16(words, words));
        }
    }
    #[inline(always)]
    fn load_tail(self, src: &[f32]) -> __m256 {
        let n = src.len().min(Self::LANES);
        // SAFETY: only the first n lanes are read, and the slice has them.
        unsafe { _mm256_maskload_ps(src.as_ptr(), self.first(n)) }
    }
    #[inline(always)]
    fn store_tail(self, dst: &mut [f32], x: __m256) {
        let n = dst.len().min(Self::LANES);
        // SAFETY: only the first n lanes are written, and the slice has them.
        unsafe { _mm256_maskstore_ps(dst.as_mut_ptr(), self.first(n), x) }
    }
}
