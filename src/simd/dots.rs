//! Products of rows of 8-bit codes with sums in `i32`: AVX-512 VNNI.
//!
//! To everything that moves them rows of codes are rows of `f32`: four codes
//! have the bits of one. After the [`words`] of a row come a scale, which what
//! the codes stand for is a multiple of, and the bits of an offset, an `i32`.
//! The left operand of an instruction has no sign: its codes have 128 added,
//! and the offset of a row of the right operand is -128 times its sum.

use super::mem::Rows;

/// Codes in a word.
pub(crate) const CODES: usize = 4;
/// Numbers of a row behind its words.
pub(crate) const BESIDE: usize = 2;
/// The longest row whose sums fit `i32`, and its offset exactly `f32`.
pub(crate) const LONGEST: usize = 1 << 16;

/// Words of a row of so many codes.
pub(crate) const fn words(codes: usize) -> usize {
    codes.div_ceil(CODES)
}

/// Scores: `c = scales of a * scales of b * (A B)` for up to a panel of columns.
/// Both operands have [`words`] and what is beside them: `a` as rows, `b` as
/// columns, as many as whole vectors.
#[derive(Debug)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "nothing multiplies there"))]
pub(crate) struct CodeProduct<'a> {
    pub(crate) a: Rows<'a, f32>,
    pub(crate) b: Rows<'a, f32>,
    pub(crate) c: &'a mut [f32],
    pub(crate) ldc: usize,
}

/// Columns of a panel of codes.
pub(crate) const PANEL: usize = 64;

/// Rectified scores, summed over the rows of each list while sums are whole
/// numbers: `out[list][c] = scales[c] * sum_r factors of r * max((A B)[r][c], 0)`.
///
/// Here the right operand has no sign: its codes have 128 added.
#[derive(Debug)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "nothing multiplies there"))]
pub(crate) struct Rectified<'a> {
    /// Rows of [`words`] and what is beside them: a factor, and the bits of -128
    /// times the sum of the codes.
    pub(crate) a: Rows<'a, f32>,
    /// Rows of a list.
    pub(crate) each: usize,
    /// `[words, PANEL]`
    pub(crate) b: &'a [f32],
    pub(crate) scales: &'a [f32; PANEL],
    /// [`PANEL`] numbers of each list, which are `apart`.
    pub(crate) out: &'a mut [f32],
    pub(crate) apart: usize,
}

#[cfg(target_arch = "x86_64")]
mod available {
    use std::arch::x86_64::*;
    use std::sync::OnceLock;

    use super::{BESIDE, CodeProduct, PANEL, Rectified};
    use crate::simd::avx512::Avx512;
    use crate::simd::mem::spans;
    use crate::simd::tile::tile_height;

    /// Lanes of a vector, and vectors of a panel.
    const LANES: usize = 16;
    const VECTORS: usize = 4;

    /// Proof that the CPU has AVX-512 VNNI.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Vnni(());

    impl Vnni {
        /// The token, if the CPU has the instructions.
        pub(crate) fn detect() -> Option<Self> {
            static HAS: OnceLock<bool> = OnceLock::new();
            let has = || Avx512::detect().is_some() && is_x86_feature_detected!("avx512vnni");
            HAS.get_or_init(has).then_some(Self(()))
        }

        /// Runs a product.
        pub(crate) fn multiply(self, x: CodeProduct<'_>) {
            let (m, k, n) = (x.a.len(), x.a.cols(), x.b.cols());
            if m == 0 || n == 0 {
                return;
            }
            assert!(x.a.is_unit() && x.b.is_unit() && x.b.len() == k && k >= BESIDE);
            assert!(n.is_multiple_of(LANES) && n <= LANES * VECTORS);
            assert!(n <= x.ldc && spans(m, x.ldc, n) <= x.c.len());
            // SAFETY: a token exists only where the instructions do, and the
            // assertions above say that the operands are there.
            unsafe { product(x) }
        }

        /// Rectified scores of lists.
        pub(crate) fn rectify(self, x: Rectified<'_>) {
            let (m, k) = (x.a.len(), x.a.cols());
            if m == 0 {
                return;
            }
            assert!(x.a.is_unit() && k >= BESIDE && x.b.len() >= (k - BESIDE) * PANEL);
            assert!(x.each > 0 && m.is_multiple_of(x.each) && x.apart >= PANEL);
            assert!(spans(m / x.each, x.apart, PANEL) <= x.out.len());
            // SAFETY: a token exists only where the instructions do, and the
            // assertions above say that the operands are there.
            unsafe { rectified(x) }
        }
    }

    /// Where the sums of a list are while its rows go on in the next tile.
    struct Sums {
        list: usize,
        /// Rows of the list that are left.
        left: usize,
        sums: [__m512; VECTORS],
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn rectified(mut x: Rectified<'_>) {
        let m = x.a.len();
        let mut sums = Sums { list: 0, left: x.each, sums: [_mm512_setzero_ps(); VECTORS] };
        let mut i = 0;
        while i < m {
            let rows = tile_height(m - i);
            // SAFETY: the caller's.
            unsafe {
                match rows {
                    6 => rectified_tile::<6>(&mut x, i, &mut sums),
                    5 => rectified_tile::<5>(&mut x, i, &mut sums),
                    4 => rectified_tile::<4>(&mut x, i, &mut sums),
                    3 => rectified_tile::<3>(&mut x, i, &mut sums),
                    2 => rectified_tile::<2>(&mut x, i, &mut sums),
                    _ => rectified_tile::<1>(&mut x, i, &mut sums),
                }
            }
            i += rows;
        }
    }

    /// `MR` rows from `first` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn rectified_tile<const MR: usize>(x: &mut Rectified<'_>, first: usize, to: &mut Sums) {
        let (words, stride) = (x.a.cols() - BESIDE, x.a.row_stride());
        // SAFETY: the caller's: A has MR rows of words and two numbers from
        // `first` on, B has as many rows of words, and each list has its sums.
        unsafe {
            let row = |r: usize| x.a.as_ptr().offset((first + r) as isize * stride);
            let b = x.b.as_ptr();
            let mut acc = [[_mm512_setzero_si512(); VECTORS]; MR];
            for r in 0..MR {
                let offset = _mm512_set1_epi32(*row(r).add(words + 1).cast());
                acc[r] = [offset; VECTORS];
            }
            for w in 0..words {
                let mut columns = [_mm512_setzero_si512(); VECTORS];
                for v in 0..VECTORS {
                    columns[v] = _mm512_loadu_si512(b.add(w * PANEL + v * LANES).cast());
                }
                for r in 0..MR {
                    let word = _mm512_set1_epi32(*row(r).add(w).cast());
                    for v in 0..VECTORS {
                        acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], columns[v], word);
                    }
                }
            }
            for r in 0..MR {
                let factor = _mm512_set1_ps(*row(r).add(words));
                for v in 0..VECTORS {
                    let positive = _mm512_max_epi32(acc[r][v], _mm512_setzero_si512());
                    to.sums[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(positive), factor, to.sums[v]);
                }
                to.left -= 1;
                if to.left == 0 {
                    let out = x.out.as_mut_ptr().add(to.list * x.apart);
                    for v in 0..VECTORS {
                        let scales = _mm512_loadu_ps(x.scales.as_ptr().add(v * LANES));
                        _mm512_storeu_ps(out.add(v * LANES), _mm512_mul_ps(to.sums[v], scales));
                    }
                    *to = Sums { list: to.list + 1, left: x.each, sums: [_mm512_setzero_ps(); VECTORS] };
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn product(x: CodeProduct<'_>) {
        let (m, vectors) = (x.a.len(), x.b.cols() / LANES);
        let mut i = 0;
        while i < m {
            let rows = tile_height(m - i);
            // SAFETY: the caller's.
            unsafe {
                let at = Operands {
                    a: x.a.as_ptr().offset(i as isize * x.a.row_stride()),
                    lda: x.a.row_stride(),
                    b: x.b.as_ptr(),
                    ldb: x.b.row_stride(),
                    words: x.a.cols() - BESIDE,
                    c: x.c.as_mut_ptr().add(i * x.ldc),
                    ldc: x.ldc,
                };
                match vectors {
                    4 => by_height::<4>(rows, at),
                    3 => by_height::<3>(rows, at),
                    2 => by_height::<2>(rows, at),
                    _ => by_height::<1>(rows, at),
                }
            }
            i += rows;
        }
    }

    #[derive(Clone, Copy)]
    struct Operands {
        a: *const f32,
        lda: isize,
        b: *const f32,
        ldb: isize,
        words: usize,
        c: *mut f32,
        ldc: usize,
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn by_height<const NV: usize>(rows: usize, x: Operands) {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                6 => tile::<6, NV>(x),
                5 => tile::<5, NV>(x),
                4 => tile::<4, NV>(x),
                3 => tile::<3, NV>(x),
                2 => tile::<2, NV>(x),
                _ => tile::<1, NV>(x),
            }
        }
    }

    /// `MR` rows by `NV` vectors of sums. No sum is rounded before it is scaled.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn tile<const MR: usize, const NV: usize>(x: Operands) {
        // SAFETY: the caller's: A has MR rows of words and two numbers, B as
        // many rows of NV vectors, C has MR rows of NV vectors.
        unsafe {
            let column = |w: usize, v: usize| x.b.offset(w as isize * x.ldb).add(v * LANES);
            let mut acc = [[_mm512_setzero_si512(); NV]; MR];
            for v in 0..NV {
                let offsets = _mm512_loadu_si512(column(x.words + 1, v).cast());
                for r in 0..MR {
                    acc[r][v] = offsets;
                }
            }
            let mut w = 0;
            while w + 2 <= x.words {
                step(&mut acc, &x, w);
                step(&mut acc, &x, w + 1);
                w += 2;
            }
            if w < x.words {
                step(&mut acc, &x, w);
            }
            let most = _mm512_set1_ps(f32::MAX);
            for r in 0..MR {
                let row = _mm512_set1_ps(*x.a.offset(r as isize * x.lda).add(x.words));
                for v in 0..NV {
                    let scales = _mm512_mul_ps(row, _mm512_loadu_ps(column(x.words, v)));
                    // Infinity times a sum of 0 would be NaN. A NaN stays.
                    let scales = _mm512_min_ps(most, scales);
                    let score = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][v]), scales);
                    _mm512_storeu_ps(x.c.add(r * x.ldc + v * LANES), score);
                }
            }
        }
    }

    /// One word of each row of A times those of B.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn step<const MR: usize, const NV: usize>(acc: &mut [[__m512i; NV]; MR], x: &Operands, w: usize) {
        // SAFETY: the caller's.
        unsafe {
            let mut row = [_mm512_setzero_si512(); NV];
            for v in 0..NV {
                row[v] = _mm512_loadu_si512(x.b.offset(w as isize * x.ldb).add(v * LANES).cast());
            }
            for r in 0..MR {
                let word = _mm512_set1_epi32(*x.a.offset(r as isize * x.lda).add(w).cast());
                for v in 0..NV {
                    acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], word, row[v]);
                }
            }
        }
    }
}
#[cfg(target_arch = "x86_64")]
pub(crate) use available::Vnni;

/// Where there are no such instructions.
#[cfg(not(target_arch = "x86_64"))]
mod missing {
    use super::{CodeProduct, Rectified};

    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Vnni {}

    impl Vnni {
        pub(crate) fn detect() -> Option<Self> {
            None
        }

        pub(crate) fn multiply(self, _: CodeProduct<'_>) {
            match self {}
        }

        pub(crate) fn rectify(self, _: Rectified<'_>) {
            match self {}
        }
    }
}
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use missing::Vnni;

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums are exact up to the largest codes, whatever shape a tile has.
    #[test]
    fn code_products_are_exact() {
        let Some(vnni) = Vnni::detect() else { return };
        for (m, n, codes) in [(1, 16, 4), (7, 48, 9), (13, 64, 64), (6, 32, 130), (3, 16, 0)] {
            let code = |i: usize, c: usize| match (i * 7 + c * 5) % 11 {
                0 => 127,
                1 => -127,
                x => (x as i32 - 5) * 20,
            };
            let (words, width) = (words(codes), words(codes) + BESIDE);
            let pack = |i: usize, w: usize, flip: u8| {
                let byte = |b: usize| {
                    let c = w * CODES + b;
                    (if c < codes { code(i, c) as i8 as u8 } else { 0 }) ^ flip
                };
                f32::from_bits(u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]))
            };
            let (mut a, mut b) = (vec![0.0; m * width], vec![0.0; width * n]);
            for i in 0..m {
                (0..words).for_each(|w| a[i * width + w] = pack(i, w, 0x80));
                a[i * width + words] = 0.5;
            }
            for j in 0..n {
                (0..words).for_each(|w| b[w * n + j] = pack(j + 3, w, 0));
                b[words * n + j] = 2f32.powi(j as i32 - 8);
                let sum: i32 = (0..codes).map(|c| code(j + 3, c)).sum();
                b[(words + 1) * n + j] = f32::from_bits((-128 * sum) as u32);
            }
            let mut c = vec![f32::NAN; m * 64];
            let (a, b) = (Rows::of_slice(&a, m, width, width), Rows::of_slice(&b, width, n, n));
            vnni.multiply(CodeProduct { a, b, c: &mut c, ldc: 64 });
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let dot: i32 = (0..codes).map(|c| code(i, c) * code(j + 3, c)).sum();
                assert_eq!(c[i * 64 + j], dot as f32 * 0.5 * 2f32.powi(j as i32 - 8), "{i} {j} {codes}");
            }
        }
    }

    /// Lists end anywhere in a tile, and go on in the next one.
    #[test]
    fn rectified_sums_are_exact() {
        let Some(vnni) = Vnni::detect() else { return };
        for (lists, each, codes) in [(1, 1, 4), (3, 2, 9), (1, 64, 128), (5, 7, 13), (4, 6, 32), (2, 3, 0)] {
            let code = |i: usize, c: usize| match (i * 7 + c * 5) % 11 {
                0 => 127,
                1 => -127,
                x => (x as i32 - 5) * 20,
            };
            let (words, rows) = (words(codes), lists * each);
            let pack = |i: usize, w: usize, flip: u8| {
                let byte = |b: usize| {
                    let c = w * CODES + b;
                    (if c < codes { code(i, c) as i8 as u8 } else { 0 }) ^ flip
                };
                f32::from_bits(u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]))
            };
            let width = words + BESIDE;
            let (mut a, mut b) = (vec![0.0; rows * width], vec![0.0; words * PANEL]);
            let factor = |r: usize| [0.5, -1.0, 2.0][r % 3];
            for r in 0..rows {
                (0..words).for_each(|w| a[r * width + w] = pack(r, w, 0));
                a[r * width + words] = factor(r);
                let sum: i32 = (0..codes).map(|c| code(r, c)).sum();
                a[r * width + words + 1] = f32::from_bits((-128 * sum) as u32);
            }
            for (j, w) in (0..PANEL).flat_map(|j| (0..words).map(move |w| (j, w))) {
                b[w * PANEL + j] = pack(j + 3, w, 0x80);
            }
            let scales: [f32; PANEL] = std::array::from_fn(|j| [1.0, 0.25][j % 2]);
            let (a, mut out) = (Rows::of_slice(&a, rows, width, width), vec![f32::NAN; lists * 70]);
            vnni.rectify(Rectified { a, each, b: &b, scales: &scales, out: &mut out, apart: 70 });
            for (list, j) in (0..lists).flat_map(|list| (0..PANEL).map(move |j| (list, j))) {
                let of_row = |r: usize| {
                    let dot: i32 = (0..codes).map(|c| code(r, c) * code(j + 3, c)).sum();
                    factor(r) * dot.max(0) as f32
                };
                let want: f32 = (list * each..(list + 1) * each).map(of_row).sum::<f32>() * scales[j];
                assert_eq!(out[list * 70 + j], want, "{lists} {each} {codes} {list} {j}");
            }
        }
    }
}
