//! Eight bits an element: symmetric, one scale for each token and head.
//!
//! ```text
//! scale = max_c |x_c| / 127          at least 2^-126
//! code_c = round(x_c / scale)        ties to even, from -127 to 127
//! x_c ~ code_c * scale
//! ```
//!
//! The scheme of LLM.int8() (arXiv 2208.07339) and SmoothQuant (arXiv
//! 2211.10438) with the finest scale that a token by itself allows, so that it
//! needs no calibration and no token waits for another.
//!
//! Layout: codes as rows of their own, scales (`f32`) beside them. A token
//! takes `head_dim + value_dim + 8` bytes a head. Attention unpacks 64 rows at
//! a time, in decoding into the first-level cache, in prefill while packing.

use std::ops::Range;

use super::format::Format;
use super::rows::RowStore;
use crate::element::Element;
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Aligned, Rows};
use crate::simd::quant::{Dequantize, Quantize};

/// The format of eight bits an element, for any cache.
///
/// Each element of a token is off by at most `max|x| / 253.9`, where `max|x|` is
/// the largest magnitude of that token in that head, or by `2^-127` where that
/// is more. A token with a NaN or an infinity reads as NaN in all elements of
/// that head: what no code stands for shows. Zero stays zero.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, Contiguous, Int8, KvShape};
/// use ndarray::Array3;
///
/// let shape = KvShape { kv_heads: 8, head_dim: 128, value_dim: 128 };
/// let mut cache = Contiguous::<Int8>::new(shape, 1, 4096)?;
/// let k = Array3::<f32>::ones((8, 10, 128));
/// cache.append(0, k.view(), k.view())?;
/// assert_eq!(cache.token_bytes(), 8 * (128 + 4 + 128 + 4)); // f32: 8 * 1024
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Int8;

impl Format for Int8 {
    type Keys = Int8Rows;
    type Values = Int8Rows;
}

/// Codes and scales.
#[derive(Clone, Debug)]
pub struct Int8Rows {
    codes: Aligned<i8>,
    scales: Aligned<f32>,
    cols: usize,
}

impl Int8Rows {
    fn all_codes(&self) -> Rows<'_, i8> {
        Rows::of_slice(self.codes.as_slice(), self.scales.as_slice().len(), self.cols, self.cols)
    }
}

impl RowStore for Int8Rows {
    const IN_PLACE: bool = false;

    fn zeroed(rows: usize, cols: usize) -> Option<Self> {
        let codes = Aligned::zeroed(rows.checked_mul(cols)?)?;
        Some(Self { codes, scales: Aligned::zeroed(rows)?, cols })
    }

    fn write<T: Element>(&mut self, isa: Isa, first: usize, from: Rows<'_, T>) {
        let codes = &mut self.codes.as_mut_slice()[first * self.cols..][..from.len() * self.cols];
        let scales = &mut self.scales.as_mut_slice()[first..][..from.len()];
        isa.dispatch(Quantize { from, codes, scales });
    }

    fn copy(&mut self, from: usize, to: usize, n: usize) {
        self.codes.as_mut_slice().copy_within(from * self.cols..(from + n) * self.cols, to * self.cols);
        self.scales.as_mut_slice().copy_within(from..from + n, to);
    }

    fn in_place(&self, _: Range<usize>, _: usize) -> Option<AnyRows<'_>> {
        None
    }

    fn collect(&self, isa: Isa, rows: Range<usize>, cols: usize, room: &mut [f32], before: usize) {
        let to = &mut room[before * cols..][..rows.len() * cols];
        let scales = &self.scales.as_slice()[rows.clone()];
        isa.dispatch(Dequantize { codes: self.all_codes().part(rows, 0..cols), scales, to, stride: cols });
    }

    fn codes(&self, rows: Range<usize>) -> Option<(Rows<'_, i8>, &[f32])> {
        Some((self.all_codes().part(rows.clone(), 0..self.cols), &self.scales.as_slice()[rows]))
    }

    fn collected(room: &mut [f32], rows: usize, cols: usize) -> AnyRows<'_> {
        AnyRows::F32(Rows::of_slice(room, rows, cols, cols))
    }

    fn address(&self, row: usize) -> (*const u8, isize) {
        self.all_codes().address(row)
    }

    fn row_bytes(&self) -> usize {
        self.cols + size_of::<f32>()
    }

    fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.bytes()
    }
}
