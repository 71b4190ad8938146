//! Two to four bits an element of rows that are rotated at random.
//!
//! ```text
//! y = D^1/2 R x / |x|        R = D^-1/2 H diag(+-1), H the Walsh-Hadamard matrix
//! code_c = the level nearest to y_c       x ~ norm / D^1/2 R^T levels[code]
//! ```
//!
//! Rotated coordinates are nearly normal whatever the row was, outliers
//! included, so that one table of levels (Lloyd-Max of the normal distribution)
//! serves all. TurboQuant ("Online Vector Quantization with Near-optimal
//! Distortion Rate", arXiv 2504.19874), as OpenVINO and llama.cpp have it: the
//! signs are fixed, one transform for each power of two of a row.
//!
//! The norm of a key is such that its dot product with what it became is its
//! own square, `|x|^2`, so that scores are not too low on average; that of a
//! value is the row's. Mean squared errors are 0.117, 0.0345 and 0.0095 of the
//! row's mean square for 2, 3 and 4 bits.
//!
//! Layout: codes of each block in planes, norms (`f32`) beside them: `D bits /
//! 8 + 4` bytes for a power of two. Rows are unpacked 64 at a time and rotated
//! back, `D log2 D` additions each. Keys are rotated after RoPE.

use std::ops::Range;

use super::format::Format;
use super::rows::RowStore;
use crate::element::Element;
use crate::math::random::signs;
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Aligned, Rows};
use crate::simd::rotate::{PackRotated, UnpackRotated, blocks, code_bytes};

/// The format of `BITS` bits an element, 2, 3 or 4, of rotated rows.
///
/// Keys of a real model with values in `f16` (as [`Kivi`](super::Kivi) says): outputs are
/// 6, 13 and 18 % off with four bits, where plain ones ([`Int4`](super::Int4)) are 8, 17
/// and 25 % off, and 11, 25 and 28 % with three: take four for keys. A rotation spreads
/// what stands out, and pays where much does.
///
/// A block with a NaN or an infinity reads as NaN. A row of zeros stays one.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, Contiguous, KvShape, Rotated};
/// use ndarray::Array3;
///
/// let shape = KvShape { kv_heads: 8, head_dim: 128, value_dim: 128 };
/// // Keys of 3 bits, values of 4.
/// let mut cache = Contiguous::<Rotated<3>, Rotated<4>>::new(shape, 1, 4096)?;
/// let k = Array3::<f32>::ones((8, 10, 128));
/// cache.append(0, k.view(), k.view())?;
/// assert_eq!(cache.token_bytes(), 8 * (52 + 68)); // f32: 8 * 1024
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rotated<const BITS: u32>;

macro_rules! formats {
    ($($bits:literal),*) => {$(
        impl Format for Rotated<$bits> {
            type Keys = RotatedRows<$bits, true>;
            type Values = RotatedRows<$bits, false>;
        }
    )*};
}
formats!(2, 3, 4);

/// Codes and norms.
#[derive(Clone, Debug)]
pub struct RotatedRows<const BITS: u32, const UNBIASED: bool> {
    codes: Aligned<i8>,
    norms: Aligned<f32>,
    signs: Vec<f32>,
    /// Two rows, to work in.
    room: Vec<f32>,
}

impl<const BITS: u32, const UNBIASED: bool> RotatedRows<BITS, UNBIASED> {
    fn row(&self) -> [usize; 2] {
        [code_bytes(BITS, self.signs.len()), blocks(self.signs.len()).count()]
    }
}

impl<const BITS: u32, const UNBIASED: bool> RowStore for RotatedRows<BITS, UNBIASED> {
    const IN_PLACE: bool = false;

    fn zeroed(rows: usize, cols: usize) -> Option<Self> {
        // Before anything is counted: rows that no memory holds.
        Vec::<f32>::new().try_reserve_exact(cols.checked_mul(3)?).ok()?;
        let codes = Aligned::zeroed(rows.checked_mul(code_bytes(BITS, cols))?)?;
        let norms = Aligned::zeroed(rows.checked_mul(blocks(cols).count())?)?;
        Some(Self { codes, norms, signs: signs(cols), room: vec![0.0; 2 * cols] })
    }

    fn write<T: Element>(&mut self, isa: Isa, first: usize, from: Rows<'_, T>) {
        let ([bytes, norms], n) = (self.row(), from.len());
        let codes = &mut self.codes.as_mut_slice()[first * bytes..][..n * bytes];
        let norms = &mut self.norms.as_mut_slice()[first * norms..][..n * norms];
        let (signs, room) = (&self.signs, &mut self.room);
        isa.dispatch(PackRotated { from, bits: BITS, unbiased: UNBIASED, signs, codes, norms, room });
    }

    fn copy(&mut self, from: usize, to: usize, n: usize) {
        let [bytes, norms] = self.row();
        self.codes.as_mut_slice().copy_within(from * bytes..(from + n) * bytes, to * bytes);
        self.norms.as_mut_slice().copy_within(from * norms..(from + n) * norms, to * norms);
    }

    fn in_place(&self, _: Range<usize>, _: usize) -> Option<AnyRows<'_>> {
        None
    }

    fn collect(&self, isa: Isa, rows: Range<usize>, cols: usize, room: &mut [f32], before: usize) {
        let to = &mut room[before * cols..][..rows.len() * cols];
        let [bytes, norms] = self.row();
        let codes = &self.codes.as_slice()[rows.start * bytes..rows.end * bytes];
        let norms = &self.norms.as_slice()[rows.start * norms..rows.end * norms];
        isa.dispatch(UnpackRotated { codes, norms, bits: BITS, signs: &self.signs, cols, to });
    }

    fn collected(room: &mut [f32], rows: usize, cols: usize) -> AnyRows<'_> {
        AnyRows::F32(Rows::of_slice(room, rows, cols, cols))
    }

    fn address(&self, row: usize) -> (*const u8, isize) {
        let [bytes, _] = self.row();
        let rows = self.codes.as_slice().len().checked_div(bytes).unwrap_or(0);
        Rows::of_slice(self.codes.as_slice(), rows, bytes, bytes).address(row)
    }

    fn row_bytes(&self) -> usize {
        let [bytes, norms] = self.row();
        bytes + norms * size_of::<f32>()
    }

    fn bytes(&self) -> usize {
        self.codes.bytes() + self.norms.bytes()
    }
}
