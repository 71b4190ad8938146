//! Four lanes of plain Rust: what runs where no other instruction set does,
//! and what the others are tested against.

use half::{bf16, f16};

use super::{Isa, Kernel, MAX_LANES, Sealed, Simd};

const LANES: usize = 4;

/// Plain Rust. Needs no proof: every CPU runs it.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

impl Sealed for Scalar {}

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// `a * 2^n` for an integral `n`. What goes beyond one factor comes first:
/// where that step rounds, the last one gives 0 anyway, so the result is
/// rounded once.
#[inline(always)]
fn scale(a: f32, n: f32) -> f32 {
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let n = n.clamp(-252.0, 254.0) as i32;
    let last = n.clamp(-126, 127);
    a * power(n - last) * power(last)
}

impl Simd for Scalar {
    type F = [f32; LANES];
    type M = [bool; LANES];
    const ISA: Isa = Isa::Scalar;
    const LANES: usize = LANES;
    const TILE_VECTORS: usize = 2;

    #[inline]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        fn outlined<K: Kernel>(s: Scalar, kernel: K) -> K::Output {
            kernel.run(s)
        }
        outlined(self, kernel)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    // Without the instruction a fused multiply-add is a library call.
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn mul_sub(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] - c[i])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn fract(self, a: Self::F) -> Self::F {
        a.map(|a| a - a.floor())
    }
    #[inline(always)]
    fn ldexp(self, a: Self::F, n: Self::F) -> Self::F {
        zip(a, n, |a, n| if n.is_nan() { n } else { scale(a, n.floor()) })
    }
    #[inline(always)]
    fn ldexp_flush(self, a: Self::F, n: Self::F, least: f32) -> Self::F {
        zip(a, n, |a, n| {
            if n < least {
                0.0
            } else if n.is_nan() {
                n
            } else {
                scale(a, n.floor())
            }
        })
    }
    #[inline(always)]
    fn lt(self, a: Self::F, b: Self::F) -> Self::M {
        std::array::from_fn(|i| a[i] < b[i])
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| if m[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn mask(self, bits: u64) -> Self::M {
        std::array::from_fn(|i| bits >> i & 1 == 1)
    }
    #[inline(always)]
    fn bits(self, m: Self::M) -> u64 {
        m.iter().rev().fold(0, |bits, &m| bits << 1 | u64::from(m))
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn swap(self, a: Self::F, distance: usize) -> Self::F {
        std::array::from_fn(|i| a[i ^ distance])
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16], i: Self::F) -> Self::F {
        i.map(|i| table[i as usize & 15])
    }

    #[inline(always)]
    fn transpose(self, block: &mut [Self::F; MAX_LANES]) {
        let t: [Self::F; LANES] = std::array::from_fn(|i| std::array::from_fn(|j| block[j][i]));
        block[..LANES].copy_from_slice(&t);
    }
    #[inline(always)]
    fn reduce_add_each(self, block: &[Self::F; MAX_LANES]) -> Self::F {
        std::array::from_fn(|i| self.reduce_add(block[i]))
    }

    #[inline(always)]
    unsafe fn load_ptr(self, src: *const f32) -> Self::F {
        // SAFETY: the caller's.
        unsafe { src.cast::<[f32; LANES]>().read() }
    }
    #[inline(always)]
    unsafe fn load_f16_ptr(self, src: *const f16) -> Self::F {
        // SAFETY: the caller's.
        unsafe { src.cast::<[f16; LANES]>().read() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(self, src: *const bf16) -> Self::F {
        // SAFETY: the caller's.
        unsafe { src.cast::<[bf16; LANES]>().read() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_i8_ptr(self, src: *const i8) -> Self::F {
        // SAFETY: the caller's.
        unsafe { src.cast::<[i8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn store_ptr(self, dst: *mut f32, x: Self::F) {
        // SAFETY: the caller's.
        unsafe { dst.cast::<[f32; LANES]>().write(x) }
    }
    #[inline(always)]
    unsafe fn store_f16_ptr(self, dst: *mut f16, x: Self::F) {
        // SAFETY: the caller's.
        unsafe { dst.cast::<[f16; LANES]>().write(x.map(f16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_ptr(self, dst: *mut bf16, x: Self::F) {
        // SAFETY: the caller's.
        unsafe { dst.cast::<[bf16; LANES]>().write(x.map(bf16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn store_i8_ptr(self, dst: *mut i8, x: Self::F) {
        // SAFETY: the caller's.
        unsafe { dst.cast::<[i8; LANES]>().write(x.map(|x| x.round_ties_even() as i8)) }
    }
}
