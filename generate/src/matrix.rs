//! Matrices as GGUF stores them, and products with them.
//!
//! Weights stay as they are in the file; a product unpacks a few rows at a time
//! into the first-level cache and multiplies all tokens with them. This is the
//! plain part of the program: a loop over rows that the compiler vectorises for
//! each instruction set, and rayon over blocks of rows.

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

/// How elements are stored: GGML's formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Format {
    pub fn of_gguf(kind: u32) -> Option<Self> {
        use Format::*;
        let known = [
            (0, F32),
            (1, F16),
            (2, Q4_0),
            (3, Q4_1),
            (6, Q5_0),
            (7, Q5_1),
            (8, Q8_0),
            (12, Q4_K),
            (13, Q5_K),
            (14, Q6_K),
            (30, BF16),
        ];
        known.into_iter().find(|(id, _)| *id == kind).map(|(_, format)| format)
    }

    /// Elements and bytes of a block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
        }
    }
}

/// The two bytes from `at` on as a number.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Blocks of 32 elements: in byte `j` of `codes` lie elements `j` and `j + 16`,
/// and their fifth bits in bits `j` and `j + 16` of `high`.
#[inline(always)]
fn unpack_32(codes: &[u8], high: u32, scale: f32, least: f32, out: &mut [f32; 32]) {
    let (low_half, high_half) = out.split_at_mut(16);
    for j in 0..16 {
        let [a, b] = [high >> j, high >> (j + 16)].map(|x| x << 4 & 16);
        low_half[j] = scale * ((u32::from(codes[j]) & 15) | a) as f32 + least;
        high_half[j] = scale * ((u32::from(codes[j]) >> 4) | b) as f32 + least;
    }
}

/// Blocks of 256 elements in 8 groups, whose scales and least elements are six
/// bits each of 12 bytes, with a fifth bit an element or without.
#[inline(always)]
fn unpack_256(block: &[u8], high: Option<&[u8]>, codes: &[u8], out: &mut [f32; 256]) {
    let (scale, least, six) = (half(block, 0), half(block, 2), &block[4..16]);
    for (g, out) in out.chunks_exact_mut(32).enumerate() {
        let (a, b) = match g {
            0..4 => (six[g] & 63, six[g + 4] & 63),
            _ => ((six[g + 4] & 15) | (six[g - 4] >> 6 << 4), (six[g + 4] >> 4) | (six[g] >> 6 << 4)),
        };
        let (scale, least) = (scale * f32::from(a), least * f32::from(b));
        let (codes, shift) = (&codes[g / 2 * 32..][..32], g % 2 * 4);
        for j in 0..32 {
            let fifth = high.map_or(0, |high| (high[j] >> g & 1) << 4);
            out[j] = scale * f32::from((codes[j] >> shift & 15) | fifth) - least;
        }
    }
}

/// Six bits an element: four in `block[..128]`, two in the next 64 bytes; then a
/// scale for each 16 elements and one for all.
#[inline(always)]
fn unpack_six(block: &[u8; 210], out: &mut [f32; 256]) {
    let scale = half(block, 208);
    for (h, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&block[h * 64..], &block[128 + h * 32..], &block[192 + h * 8..]);
        for (g, out) in out.chunks_exact_mut(32).enumerate() {
            for j in 0..32 {
                let four = low[g % 2 * 32 + j] >> (g / 2 * 4) & 15;
                let code = four | (high[j] >> (2 * g) & 3) << 4;
                let part = f32::from(scales[2 * g + j / 16] as i8);
                out[j] = scale * part * (f32::from(code) - 32.0);
            }
        }
    }
}

/// Does something with each block of so many bytes and the elements that it has. No function:
/// a closure would be compiled without its caller's instruction set.
macro_rules! blocks {
    ($bytes:ident, $elements:ident: $b:literal => $e:literal, |$x:ident, $out:ident| $unpack:expr) => {{
        let ((bytes, _), (elements, _)) = ($bytes.as_chunks::<$b>(), $elements.as_chunks_mut::<$e>());
        for ($x, $out) in bytes.iter().zip(elements) {
            $unpack
        }
    }};
}

/// Unpacks whole blocks.
#[inline(always)]
fn unpack(format: Format, bytes: &[u8], to: &mut [f32]) {
    match format {
        Format::F32 => blocks!(bytes, to: 4 => 1, |x, out| *out = [f32::from_le_bytes(*x)]),
        Format::F16 => blocks!(bytes, to: 2 => 1, |x, out| *out = [half(x, 0)]),
        Format::BF16 => blocks!(bytes, to: 2 => 1, |x, out| *out = [bf16::from_le_bytes(*x).to_f32()]),
        Format::Q4_0 => blocks!(bytes, to: 18 => 32, |x, out| {
            let scale = half(x, 0);
            unpack_32(&x[2..], 0, scale, -8.0 * scale, out);
        }),
        Format::Q4_1 => {
            blocks!(bytes, to: 20 => 32, |x, out| unpack_32(&x[4..], 0, half(x, 0), half(x, 2), out))
        }
        Format::Q5_0 => blocks!(bytes, to: 22 => 32, |x, out| {
            let (scale, high) = (half(x, 0), u32::from_le_bytes([x[2], x[3], x[4], x[5]]));
            unpack_32(&x[6..], high, scale, -16.0 * scale, out);
        }),
        Format::Q5_1 => blocks!(bytes, to: 24 => 32, |x, out| {
            let high = u32::from_le_bytes([x[4], x[5], x[6], x[7]]);
            unpack_32(&x[8..], high, half(x, 0), half(x, 2), out);
        }),
        Format::Q8_0 => blocks!(bytes, to: 34 => 32, |x, out| {
            let scale = half(x, 0);
            for (out, x) in out.iter_mut().zip(&x[2..]) {
                *out = scale * f32::from(*x as i8);
            }
        }),
        Format::Q4_K => blocks!(bytes, to: 144 => 256, |x, out| unpack_256(x, None, &x[16..], out)),
        Format::Q5_K => {
            blocks!(bytes, to: 176 => 256, |x, out| unpack_256(x, Some(&x[16..48]), &x[48..], out))
        }
        Format::Q6_K => blocks!(bytes, to: 210 => 256, |x, out| unpack_six(x, out)),
    }
}

/// Lanes of a running sum: one vector of AVX-512.
const LANES: usize = 16;
/// Rows of the matrix that are unpacked together, and tokens that meet them.
const TILE: usize = 4;
/// Rows of a task.
const TASK: usize = 32;

/// A matrix in a file.
#[derive(Clone, Debug)]
pub struct Matrix {
    data: Arc<Vec<u8>>,
    start: usize,
    rows: usize,
    cols: usize,
    format: Format,
}

impl Matrix {
    /// One that starts at a byte; `None` if it ends beyond the data.
    pub fn new(data: Arc<Vec<u8>>, start: usize, rows: usize, cols: usize, format: Format) -> Option<Self> {
        let (elements, bytes) = format.block();
        let size = rows.checked_mul(cols / elements)?.checked_mul(bytes)?;
        (start.checked_add(size)? <= data.len()).then_some(Self { data, start, rows, cols, format })
    }

    fn bytes(&self, rows: Range<usize>) -> &[u8] {
        let (elements, bytes) = self.format.block();
        let size = self.cols / elements * bytes;
        &self.data[self.start..][rows.start * size..rows.end * size]
    }

    pub fn row(&self, row: usize, out: &mut [f32]) {
        unpack(self.format, self.bytes(row..row + 1), out);
    }

    /// Rows of `x`, one a token, times the transpose: `[tokens, rows]`.
    pub fn of(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        let n = x.nrows();
        // Tokens and rows with zeros up to whole vectors.
        let width = self.cols.next_multiple_of(LANES);
        let mut tokens = vec![0.0; n * width];
        for (to, from) in tokens.chunks_exact_mut(width.max(1)).zip(x.rows()) {
            to.iter_mut().zip(from).for_each(|(to, x)| *to = *x);
        }
        let mut out = Array2::zeros((self.rows, n));
        let all = out.as_slice_mut().expect("an array that was just made");
        all.par_chunks_mut((TASK * n).max(1)).enumerate().for_each_init(
            || vec![0.0; TILE * width],
            |tile, (task, out)| {
                let rows = task * TASK..task * TASK + out.len() / n;
                product(self, rows, (&tokens, width), tile, out);
            },
        );
        if n == 1 { out.into_shape_with_order((1, self.rows)).expect("one row") } else { transposed(&out) }
    }
}

/// The transpose, in squares that stay in the cache.
fn transposed(x: &Array2<f32>) -> Array2<f32> {
    let (rows, cols) = x.dim();
    let mut out = Array2::zeros((cols, rows));
    for first in (0..rows).step_by(64) {
        let block = first..rows.min(first + 64);
        out.slice_mut(s![.., block.clone()]).assign(&x.slice(s![block, ..]).t());
    }
    out
}

/// Fetches every line of a task's weights: loads that follow each other at once, where a loop
/// that unpacks has room for few and waits for memory at each.
#[inline(always)]
fn touch(bytes: &[u8]) {
    let mut any = 0;
    for byte in bytes.iter().step_by(64) {
        any |= byte;
    }
    black_box(any);
}

/// Some rows times all tokens, `[rows, tokens]`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma", "aarch64+neon"))]
fn product(m: &Matrix, rows: Range<usize>, (x, width): (&[f32], usize), tile: &mut [f32], out: &mut [f32]) {
    const FUSED: bool =
        target_cfg_f!(any(target_feature = "fma", target_feature = "avx512f", target_feature = "neon"));
    let n = x.len() / width.max(1);
    touch(m.bytes(rows.clone()));
    for first in rows.clone().step_by(TILE) {
        let count = TILE.min(rows.end - first);
        for (i, tile) in tile.chunks_exact_mut(width).take(count).enumerate() {
            unpack(m.format, m.bytes(first + i..first + i + 1), &mut tile[..m.cols]);
        }
        let out = &mut out[(first - rows.start) * n..];
        let mut t = 0;
        while t < n {
            let x = &x[t * width..];
            if n - t >= TILE {
                let sums: [[f32; TILE]; TILE] = dots::<TILE, FUSED>(tile, x, width);
                (0..count).for_each(|r| out[r * n + t..][..TILE].copy_from_slice(&sums[r]));
                t += TILE;
            } else {
                let sums: [[f32; 1]; TILE] = dots::<1, FUSED>(tile, x, width);
                (0..count).for_each(|r| out[r * n + t] = sums[r][0]);
                t += 1;
            }
        }
    }
}

/// Dot products of the rows of a tile and `T` tokens.
#[inline(always)]
fn dots<const T: usize, const FUSED: bool>(tile: &[f32], x: &[f32], width: usize) -> [[f32; T]; TILE] {
    let rows: [&[f32]; TILE] = std::array::from_fn(|r| &tile[r * width..][..width]);
    let tokens: [&[f32]; T] = std::array::from_fn(|t| &x[t * width..][..width]);
    let mut sums = [[[0.0f32; LANES]; T]; TILE];
    for at in (0..width).step_by(LANES) {
        for r in 0..TILE {
            for t in 0..T {
                let (a, b) = (&rows[r][at..at + LANES], &tokens[t][at..at + LANES]);
                for l in 0..LANES {
                    let sum = &mut sums[r][t][l];
                    *sum = if FUSED { a[l].mul_add(b[l], *sum) } else { *sum + a[l] * b[l] };
                }
            }
        }
    }
    sums.map(|row| {
        row.map(|mut lanes| {
            for half in [8, 4, 2, 1] {
                (0..half).for_each(|l| lanes[l] += lanes[l + half]);
            }
            lanes[0]
        })
    })
}
