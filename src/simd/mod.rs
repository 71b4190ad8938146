//! The SIMD layer: the only folder with `unsafe` code and `core::arch`.
//!
//! A token type per instruction set (`Scalar`, `Avx2`, `Avx512`,
//! `Neon`) implements the [`Simd`] trait. A token can be had only from
//! detection, so holding one proves that the CPU has the instructions, and
//! its methods are safe: loads and stores take slices, tails are masked.
//!
//! Every method is `#[inline(always)]` and carries no target feature of its
//! own; the features come from [`Simd::vectorize`], the one function per
//! instruction set that is compiled with them and into which a [`Kernel`] is
//! inlined. Closures given to another thread do not inherit features, so
//! `Isa::dispatch` is called inside each task.

use crate::error::{Error, Result};

pub(crate) mod amx;
pub(crate) mod any;
pub(crate) mod dots;
pub(crate) mod exp;
pub(crate) mod mem;
pub(crate) mod narrow;
pub(crate) mod pack;
pub(crate) mod quant;
pub(crate) mod rotate;
pub(crate) mod scalar;
pub(crate) mod storage;
pub(crate) mod table;
pub(crate) mod tile;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;

#[cfg(test)]
mod tests;

use half::{bf16, f16};
use std::sync::OnceLock;

/// The environment variable that forces an instruction set for mechanisms
/// whose builder does not name one.
pub const ISA_VARIABLE: &str = "ATTENTION_KERNELS_ISA";

/// An upper bound on [`Simd::LANES`], for arrays of vectors on the stack.
pub const MAX_LANES: usize = 16;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on any CPU.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with AMX tiles of `bf16`, on Linux. They serve softmax
    /// attention of many queries, where queries, keys and values have one type:
    /// `f16` and `f32` are split into two and three numbers of `bf16` that add
    /// up to them. Everything else runs as on [`Avx512`](Self::Avx512). Tiles
    /// take subnormal numbers for zero: a dot product of a query with a key may
    /// be off by `2^-75 * head_dim`, which shows where a scale above `1e12` or
    /// a closure makes it large (such scales are left to AVX-512), and sums in
    /// an output that are smaller than `2^-126` may come out as zero.
    Amx,
    /// AArch64 Advanced SIMD.
    Neon,
}

impl Isa {
    const ALL: [Self; 5] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Amx, Self::Neon];

    /// The name that [`ISA_VARIABLE`] takes: `scalar`, `avx2`, `avx512`,
    /// `amx`, `neon`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
            Self::Neon => "neon",
        }
    }

    /// The instruction sets that this CPU has, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::detect().is_some(),
            Self::Amx => amx::Amx::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::Neon::detect().is_some(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The instruction set to run on: `requested`, or what
    /// [`ISA_VARIABLE`] says, or the best one that the CPU has.
    ///
    /// # Errors
    /// [`Error::Isa`] if the one asked for is unknown or not on this CPU.
    pub fn choose(requested: Option<Self>) -> Result<Self> {
        static BEST: OnceLock<Isa> = OnceLock::new();
        if let Some(isa) = requested {
            return Self::checked(isa.name(), "isa");
        }
        match std::env::var_os(ISA_VARIABLE) {
            Some(name) if !name.is_empty() => Self::named(&name.to_string_lossy()),
            _ => Ok(*BEST.get_or_init(|| Self::available().last().unwrap_or(Self::Scalar))),
        }
    }

    /// The one that [`ISA_VARIABLE`] names.
    fn named(name: &str) -> Result<Self> {
        Self::checked(name, ISA_VARIABLE)
    }

    fn checked(name: &str, by: &'static str) -> Result<Self> {
        Self::available().find(|isa| isa.name() == name).ok_or_else(|| {
            let available: Vec<_> = Self::available().map(Self::name).collect();
            Error::Isa { by, asked: name.to_owned(), available: available.join(", ") }
        })
    }

    /// Runs a kernel on this instruction set. Falls back to [`Isa::Scalar`]
    /// where the CPU lacks it, which a value from [`Isa::choose`] never does.
    #[inline]
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                if let Some(s) = avx2::Avx2::detect() {
                    return s.vectorize(kernel);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Amx => {
                if let Some(s) = avx512::Avx512::detect() {
                    return s.vectorize(kernel);
                }
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => {
                if let Some(s) = neon::Neon::detect() {
                    return s.vectorize(kernel);
                }
            }
            _ => {}
        }
        scalar::Scalar.vectorize(kernel)
    }

    /// Lanes of `f32` in a vector of this instruction set.
    pub(crate) fn lanes(self) -> usize {
        struct Lanes;
        impl Kernel for Lanes {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> usize {
                S::LANES
            }
        }
        self.dispatch(Lanes)
    }

    /// Width in columns of the register tile of this instruction set.
    pub(crate) fn panel(self) -> usize {
        struct Panel;
        impl Kernel for Panel {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> usize {
                S::LANES * S::TILE_VECTORS
            }
        }
        self.dispatch(Panel)
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A piece of code to be compiled for every instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// The code. Implementations carry `#[inline(always)]`: without it the
    /// body is compiled without the target features and runs 80 times slower.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

mod sealed {
    pub trait Sealed {}
}
use sealed::Sealed;

/// Vectors of `f32` of one instruction set.
///
/// Comparisons with NaN are false. Methods that take a slice panic where it
/// is shorter than documented.
pub trait Simd: Copy + Send + Sync + std::fmt::Debug + Sealed + 'static {
    /// A vector of [`LANES`](Self::LANES) `f32`.
    type F: Copy + std::fmt::Debug;
    /// One truth value a lane.
    type M: Copy;
    /// The instruction set.
    const ISA: Isa;
    /// Lanes of a vector.
    const LANES: usize;
    /// Vectors in a row of the register tile.
    const TILE_VECTORS: usize;

    /// Runs `kernel` compiled with this instruction set's features.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once; twice by `Scalar`.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b - c`, rounded as in [`mul_add`](Self::mul_add).
    fn mul_sub(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `|a|`
    fn abs(self, a: Self::F) -> Self::F;
    /// Rounds to the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `a - floor(a)`, from 0 to 1, rounded to nearest or down; NaN or 0 for
    /// an infinity.
    fn fract(self, a: Self::F) -> Self::F;
    /// `a * 2^floor(n)` for an `a` that is normal and at most `2^100` in
    /// magnitude: rounded once, right into the subnormals, 0 for `n = -inf`.
    /// NaN where `n` is NaN, or `a` is and `n` is finite.
    fn ldexp(self, a: Self::F, n: Self::F) -> Self::F;
    /// [`ldexp`](Self::ldexp) for `a` from 1 to 2, but exactly 0 where
    /// `n < least`, which is at least -126, so that no subnormal ever reaches a
    /// multiplication. NaN where `a` is NaN and `n` is from `least` or NaN too.
    fn ldexp_flush(self, a: Self::F, n: Self::F, least: f32) -> Self::F;
    /// `a < b`
    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    /// `m ? a : b`
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F;
    /// Lane `i` is bit `i` of `bits`.
    fn mask(self, bits: u64) -> Self::M;
    /// Bit `i` is lane `i` of `m`.
    fn bits(self, m: Self::M) -> u64;
    /// The sum of the lanes, in a fixed order.
    fn reduce_add(self, a: Self::F) -> f32;
    /// The largest lane; NaNs need not show.
    fn reduce_max(self, a: Self::F) -> f32;
    /// Transposes the block made of the first `LANES` vectors.
    fn transpose(self, block: &mut [Self::F; MAX_LANES]);
    /// Lanes exchanged with those at a distance of 1, 2, 4 or 8, which is less
    /// than there are lanes: lane `i` is that of `i ^ distance`.
    fn swap(self, a: Self::F, distance: usize) -> Self::F;
    /// `table[i]` for each lane `i`, an integer from 0 to 15.
    fn lookup(self, table: &[f32; 16], i: Self::F) -> Self::F;
    /// Lane `i` of the result is the sum of the lanes of `block[i]`, for the
    /// first `LANES` vectors.
    fn reduce_add_each(self, block: &[Self::F; MAX_LANES]) -> Self::F;

    /// Rounds both vectors to the nearest `bf16` and makes pairs of them: `a` in
    /// the lower half of the bits of each lane, `b` in the upper one. With them
    /// comes what rounding left over, which is exact. Ties go either way; NaN
    /// with a payload need not stay NaN.
    #[inline(always)]
    fn pairs(self, a: Self::F, b: Self::F) -> (Self::F, [Self::F; 2]) {
        let [mut low, mut high, mut pairs] = [[0.0; MAX_LANES]; 3];
        self.store(&mut low, a);
        self.store(&mut high, b);
        for ((low, high), pair) in low.iter_mut().zip(&mut high).zip(&mut pairs) {
            let (l, h) = (bf16::from_f32(*low), bf16::from_f32(*high));
            *pair = f32::from_bits(u32::from(h.to_bits()) << 16 | u32::from(l.to_bits()));
            (*low, *high) = (*low - l.to_f32(), *high - h.to_f32());
        }
        (self.load(&pairs), [self.load(&low), self.load(&high)])
    }

    /// [`pairs`](Self::pairs) that may be cut off instead of rounded, and leave
    /// up to four times as much: for numbers that are split three times, which
    /// keeps all of them in any case.
    #[inline(always)]
    fn cut_pairs(self, a: Self::F, b: Self::F) -> (Self::F, [Self::F; 2]) {
        self.pairs(a, b)
    }

    /// `x = m * 2^n` with `m` from 1 to 2 and a whole `n`, for normal `x` above 0; `m`
    /// is anything for others.
    #[inline(always)]
    fn split(self, x: Self::F) -> [Self::F; 2] {
        let [mut m, mut n] = [[0.0; MAX_LANES]; 2];
        self.store(&mut m, x);
        for (m, n) in m.iter_mut().zip(&mut n) {
            let bits = m.to_bits();
            *n = (bits >> 23) as i32 as f32 - 127.0;
            *m = f32::from_bits(bits & 0x7f_ffff | 0x3f80_0000);
        }
        [self.load(&m), self.load(&n)]
    }

    /// # Safety
    /// `LANES` elements must be readable at `src`.
    unsafe fn load_ptr(self, src: *const f32) -> Self::F;
    /// # Safety
    /// `LANES` elements must be readable at `src`.
    unsafe fn load_f16_ptr(self, src: *const f16) -> Self::F;
    /// # Safety
    /// `LANES` elements must be readable at `src`.
    unsafe fn load_bf16_ptr(self, src: *const bf16) -> Self::F;
    /// # Safety
    /// `LANES` elements must be readable at `src`.
    unsafe fn load_i8_ptr(self, src: *const i8) -> Self::F;
    /// # Safety
    /// `LANES` elements must be writable at `dst`.
    unsafe fn store_ptr(self, dst: *mut f32, x: Self::F);
    /// # Safety
    /// `LANES` elements must be writable at `dst`.
    unsafe fn store_f16_ptr(self, dst: *mut f16, x: Self::F);
    /// # Safety
    /// `LANES` elements must be writable at `dst`.
    unsafe fn store_bf16_ptr(self, dst: *mut bf16, x: Self::F);
    /// Rounds to the nearest integer, ties to even, for lanes from -128 to
    /// 127; any byte for others.
    ///
    /// # Safety
    /// `LANES` elements must be writable at `dst`.
    unsafe fn store_i8_ptr(self, dst: *mut i8, x: Self::F);

    /// The first `LANES` elements of `src`.
    #[inline(always)]
    fn load(self, src: &[f32]) -> Self::F {
        let src = &src[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { self.load_ptr(src.as_ptr()) }
    }

    /// The first `LANES` elements of `src`, widened.
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> Self::F {
        let src = &src[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { self.load_f16_ptr(src.as_ptr()) }
    }

    /// The first `LANES` elements of `src`, widened.
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> Self::F {
        let src = &src[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { self.load_bf16_ptr(src.as_ptr()) }
    }

    /// The first `LANES` elements of `src`, widened.
    #[inline(always)]
    fn load_i8(self, src: &[i8]) -> Self::F {
        let src = &src[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { self.load_i8_ptr(src.as_ptr()) }
    }

    /// Of each of the first `LANES` bytes, that were stored less by 128, digit
    /// `place` of those of `bits` bits, the lowest one first.
    #[inline(always)]
    fn load_digits(self, src: &[i8], bits: u32, place: u32) -> Self::F {
        let src = &src[..Self::LANES];
        let mut x = self.add(self.load_i8(src), self.splat(128.0));
        let above = self.mul(x, self.splat((0.5f32).powi((bits * place) as i32)));
        x = self.sub(above, self.fract(above));
        if bits * (place + 1) == 8 {
            return x;
        }
        let base = (1u32 << bits) as f32;
        self.mul(self.fract(self.mul(x, self.splat(1.0 / base))), self.splat(base))
    }

    /// Stores to the first `LANES` elements of `dst`.
    #[inline(always)]
    fn store(self, dst: &mut [f32], x: Self::F) {
        let dst = &mut dst[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { self.store_ptr(dst.as_mut_ptr(), x) }
    }

    /// Rounds and stores to the first `LANES` elements of `dst`.
    #[inline(always)]
    fn store_f16(self, dst: &mut [f16], x: Self::F) {
        let dst = &mut dst[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { self.store_f16_ptr(dst.as_mut_ptr(), x) }
    }

    /// Rounds and stores to the first `LANES` elements of `dst`.
    #[inline(always)]
    fn store_bf16(self, dst: &mut [bf16], x: Self::F) {
        let dst = &mut dst[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { self.store_bf16_ptr(dst.as_mut_ptr(), x) }
    }

    /// Rounds, as [`store_i8_ptr`](Self::store_i8_ptr) does, and stores to the
    /// first `LANES` elements of `dst`.
    #[inline(always)]
    fn store_i8(self, dst: &mut [i8], x: Self::F) {
        let dst = &mut dst[..Self::LANES];
        // SAFETY: the slice has LANES elements.
        unsafe { self.store_i8_ptr(dst.as_mut_ptr(), x) }
    }

    /// Up to `LANES` elements of `src`; the missing lanes are zero.
    #[inline(always)]
    fn load_tail(self, src: &[f32]) -> Self::F {
        if src.len() >= Self::LANES {
            return self.load(src);
        }
        let mut padded = [0.0; MAX_LANES];
        padded[..src.len()].copy_from_slice(src);
        self.load(&padded)
    }

    /// Up to `LANES` elements of `src`, widened; the missing lanes are zero.
    #[inline(always)]
    fn load_f16_tail(self, src: &[f16]) -> Self::F {
        if src.len() >= Self::LANES {
            return self.load_f16(src);
        }
        let mut padded = [f16::ZERO; MAX_LANES];
        padded[..src.len()].copy_from_slice(src);
        self.load_f16(&padded)
    }

    /// Up to `LANES` elements of `src`, widened; the missing lanes are zero.
    #[inline(always)]
    fn load_bf16_tail(self, src: &[bf16]) -> Self::F {
        if src.len() >= Self::LANES {
            return self.load_bf16(src);
        }
        let mut padded = [bf16::ZERO; MAX_LANES];
        padded[..src.len()].copy_from_slice(src);
        self.load_bf16(&padded)
    }

    /// Up to `LANES` elements of `src`, widened; the missing lanes are zero.
    #[inline(always)]
    fn load_i8_tail(self, src: &[i8]) -> Self::F {
        if src.len() >= Self::LANES {
            return self.load_i8(src);
        }
        let mut padded = [0; MAX_LANES];
        padded[..src.len()].copy_from_slice(src);
        self.load_i8(&padded)
    }

    /// Stores as many lanes as `dst` has room for.
    #[inline(always)]
    fn store_tail(self, dst: &mut [f32], x: Self::F) {
        if dst.len() >= Self::LANES {
            return self.store(dst, x);
        }
        let mut padded = [0.0; MAX_LANES];
        self.store(&mut padded, x);
        dst.copy_from_slice(&padded[..dst.len()]);
    }

    /// Rounds and stores as many lanes as `dst` has room for.
    #[inline(always)]
    fn store_f16_tail(self, dst: &mut [f16], x: Self::F) {
        if dst.len() >= Self::LANES {
            return self.store_f16(dst, x);
        }
        let mut padded = [f16::ZERO; MAX_LANES];
        self.store_f16(&mut padded, x);
        dst.copy_from_slice(&padded[..dst.len()]);
    }

    /// Rounds and stores as many lanes as `dst` has room for.
    #[inline(always)]
    fn store_bf16_tail(self, dst: &mut [bf16], x: Self::F) {
        if dst.len() >= Self::LANES {
            return self.store_bf16(dst, x);
        }
        let mut padded = [bf16::ZERO; MAX_LANES];
        self.store_bf16(&mut padded, x);
        dst.copy_from_slice(&padded[..dst.len()]);
    }

    /// Rounds, as [`store_i8_ptr`](Self::store_i8_ptr) does, and stores as many
    /// lanes as `dst` has room for.
    #[inline(always)]
    fn store_i8_tail(self, dst: &mut [i8], x: Self::F) {
        if dst.len() >= Self::LANES {
            return self.store_i8(dst, x);
        }
        let mut padded = [0; MAX_LANES];
        self.store_i8(&mut padded, x);
        dst.copy_from_slice(&padded[..dst.len()]);
    }
}
