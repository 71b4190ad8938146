//! Arrays of any storage type. Engines work on these, so that they are
//! compiled once and not once a type; only the copies and products at the
//! bottom are.

use std::ops::Range;

use half::{bf16, f16};

use super::Simd;
use super::mem::{Heads, OutRows, Rows, RowsMut, Stream};
use super::pack::{
    PackBlock, PackColumns, PackKeyPairs, PackKeys, PackLeft, PackRows, PackValuePairs, PackValues, WriteRow,
    add_lost, load,
};
use super::storage::Storage;

/// Evaluates an expression for whichever type it is.
macro_rules! each_type {
    ($any:ident, $value:expr, $x:ident => $body:expr) => {
        match $value {
            $any::F32($x) => $body,
            $any::F16($x) => $body,
            $any::Bf16($x) => $body,
        }
    };
}

/// An array `[batch, heads, len, dim]` to read.
#[derive(Clone, Copy, Debug)]
pub enum AnyArray<'a> {
    F32(Heads<'a, f32>),
    F16(Heads<'a, f16>),
    Bf16(Heads<'a, bf16>),
}

impl<'a> AnyArray<'a> {
    /// Numbers of `bf16` that add up to an element. No two types have as many.
    pub(crate) fn parts(&self) -> usize {
        match self {
            Self::F32(_) => f32::PARTS,
            Self::F16(_) => f16::PARTS,
            Self::Bf16(_) => bf16::PARTS,
        }
    }

    /// Some rows of one head.
    #[inline]
    pub(crate) fn rows(&self, batch: usize, head: usize, rows: &Range<usize>) -> AnyRows<'a> {
        match self {
            Self::F32(x) => AnyRows::F32(x.rows(batch, head, rows)),
            Self::F16(x) => AnyRows::F16(x.rows(batch, head, rows)),
            Self::Bf16(x) => AnyRows::Bf16(x.rows(batch, head, rows)),
        }
    }

    /// Heads that the array has.
    pub(crate) fn heads(&self) -> usize {
        match self {
            Self::F32(x) => x.heads(),
            Self::F16(x) => x.heads(),
            Self::Bf16(x) => x.heads(),
        }
    }

    /// `[batch, heads, len, dim]`
    pub(crate) fn dim(&self) -> (usize, usize, usize, usize) {
        each_type!(AnyArray, self, x => x.dim())
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        fn bytes<T>(x: &Heads<'_, T>) -> usize
        where
            T: Copy,
        {
            x.dim().3 * size_of::<T>()
        }
        each_type!(AnyArray, self, x => bytes(x))
    }

    /// The same with rows of no elements.
    pub(crate) fn without_columns(&self) -> Self {
        match self {
            Self::F32(x) => Self::F32(x.without_columns()),
            Self::F16(x) => Self::F16(x.without_columns()),
            Self::Bf16(x) => Self::Bf16(x.without_columns()),
        }
    }
}

/// A storage type whose arrays come as ones of any type.
pub trait IntoAny: Storage {
    /// An array as one of any type.
    fn any(x: Heads<'_, Self>) -> AnyArray<'_>;

    /// Rows as ones of any type.
    fn any_rows(x: Rows<'_, Self>) -> AnyRows<'_>;

    /// An output as one of any type.
    fn any_out(x: OutRows<'_, Self>) -> AnyOut<'_>;
}

macro_rules! into_any {
    ($($type:ty => $variant:ident),*) => {$(
        impl IntoAny for $type {
            fn any(x: Heads<'_, Self>) -> AnyArray<'_> {
                AnyArray::$variant(x)
            }
            fn any_rows(x: Rows<'_, Self>) -> AnyRows<'_> {
                AnyRows::$variant(x)
            }
            fn any_out(x: OutRows<'_, Self>) -> AnyOut<'_> {
                AnyOut::$variant(x)
            }
        }
    )*};
}
into_any!(f32 => F32, f16 => F16, bf16 => Bf16);

/// Rows to read.
#[derive(Clone, Copy, Debug)]
pub enum AnyRows<'a> {
    F32(Rows<'a, f32>),
    F16(Rows<'a, f16>),
    Bf16(Rows<'a, bf16>),
}

impl<'a> AnyRows<'a> {
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        each_type!(AnyRows, self, x => x.len())
    }

    #[inline(always)]
    pub(crate) fn is_unit(&self) -> bool {
        each_type!(AnyRows, self, x => x.is_unit())
    }

    /// All elements, if they are `f32` and lie one row after the other.
    #[inline(always)]
    pub(crate) fn as_slice(&self) -> Option<&'a [f32]> {
        match self {
            Self::F32(x) => x.as_slice(),
            _ => None,
        }
    }

    /// Where they lie.
    pub(crate) fn stream(&self) -> Stream {
        each_type!(AnyRows, self, x => x.stream())
    }

    /// Some of the rows.
    #[inline(always)]
    pub(crate) fn part(&self, rows: Range<usize>) -> Self {
        match self {
            Self::F32(x) => Self::F32(x.part(rows, 0..x.cols())),
            Self::F16(x) => Self::F16(x.part(rows, 0..x.cols())),
            Self::Bf16(x) => Self::Bf16(x.part(rows, 0..x.cols())),
        }
    }

    /// Some of the columns.
    #[inline(always)]
    pub(crate) fn columns(&self, cols: Range<usize>) -> Self {
        match self {
            Self::F32(x) => Self::F32(x.part(0..x.len(), cols)),
            Self::F16(x) => Self::F16(x.part(0..x.len(), cols)),
            Self::Bf16(x) => Self::Bf16(x.part(0..x.len(), cols)),
        }
    }

    /// The transpose, where not the elements of a row but those of a column are
    /// neighbours.
    #[inline(always)]
    pub(crate) fn turned(&self) -> Option<Self> {
        Some(match self {
            Self::F32(x) if x.row_stride() == 1 && !x.is_unit() => Self::F32(x.transposed()),
            Self::F16(x) if x.row_stride() == 1 && !x.is_unit() => Self::F16(x.transposed()),
            Self::Bf16(x) if x.row_stride() == 1 && !x.is_unit() => Self::Bf16(x.transposed()),
            _ => return None,
        })
    }

    /// At most a panel of columns as rows a panel apart; columns past the
    /// last are zero, or as they were. Where not the elements of a row but
    /// those of a column are neighbours, blocks are transposed.
    #[inline(always)]
    pub(crate) fn pack_panel<S: Simd>(self, s: S, to: &mut [f32]) {
        each_type!(AnyRows, self, from => {
            if from.row_stride() == 1 && !from.is_unit() {
                s.vectorize(PackKeys { from: from.transposed(), to });
            } else {
                s.vectorize(PackRows { from, to, stride: S::LANES * S::TILE_VECTORS });
            }
        });
    }

    /// [`PackRows`]
    #[inline(always)]
    pub(crate) fn pack_rows<S: Simd>(self, s: S, to: &mut [f32], stride: usize) {
        each_type!(AnyRows, self, from => s.vectorize(PackRows { from, to, stride }));
    }

    /// [`PackColumns`]
    #[inline(always)]
    pub(crate) fn pack_columns<S: Simd>(self, s: S, to: &mut [f32], stride: usize) {
        each_type!(AnyRows, self, from => s.vectorize(PackColumns { from, to, stride }));
    }

    /// [`PackKeys`]
    #[inline(always)]
    pub(crate) fn pack_keys<S: Simd>(self, s: S, to: &mut [f32]) {
        each_type!(AnyRows, self, from => s.vectorize(PackKeys { from, to }));
    }

    /// [`PackValues`]
    #[inline(always)]
    pub(crate) fn pack_values<S: Simd>(self, s: S, to: &mut [f32], stride: usize, finite: &mut [u8]) {
        each_type!(AnyRows, self, from => s.vectorize(PackValues { from, to, stride, finite }));
    }

    /// [`PackLeft`]
    #[inline(always)]
    pub(crate) fn pack_left<S: Simd>(
        self,
        s: S,
        (first, step): (usize, usize),
        to: &mut [f32],
        huge: &mut [u8],
    ) {
        each_type!(AnyRows, self, from => s.vectorize(PackLeft { from, first, step, to, huge }));
    }

    /// [`PackKeyPairs`]
    #[inline(always)]
    pub(crate) fn pack_key_pairs<S: Simd>(self, s: S, to: &mut [f32], huge: &mut [u8]) {
        each_type!(AnyRows, self, from => s.vectorize(PackKeyPairs { from, to, huge }));
    }

    /// [`PackValuePairs`]
    #[inline(always)]
    pub(crate) fn pack_value_pairs<S: Simd>(self, s: S, to: &mut [f32], kept: &mut [u8]) {
        each_type!(AnyRows, self, from => s.vectorize(PackValuePairs { from, to, kept }));
    }

    /// [`add_lost`]
    #[inline(always)]
    pub(crate) fn add_lost<S: Simd>(&self, s: S, row: usize, weight: f32, out: &mut [f32]) {
        each_type!(AnyRows, self, x => add_lost(s, x, row, weight, out));
    }

    /// Loads `LANES` elements of a row from `col` on; missing ones are zero.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(&self, s: S, row: usize, col: usize) -> S::F {
        each_type!(AnyRows, self, x => load(s, x, row, col))
    }

    /// Whether all elements of a row are finite.
    pub(crate) fn is_finite(&self, row: usize) -> bool {
        each_type!(AnyRows, self, x => (0..x.cols()).all(|col| x.at(row, col).is_finite()))
    }

    /// The dot product of two rows of as many elements.
    #[inline(always)]
    pub(crate) fn dot<S: Simd>(&self, s: S, row: usize, other: &Self, other_row: usize) -> f32 {
        let cols = self.cols();
        let mut sum = s.splat(0.0);
        for col in (0..cols).step_by(S::LANES) {
            sum = s.mul_add(self.load(s, row, col), other.load(s, other_row, col), sum);
        }
        s.reduce_add(sum)
    }

    /// Row `i`, exactly.
    pub(crate) fn exact(&self, i: usize) -> Vec<f64> {
        each_type!(AnyRows, self, x => (0..x.cols()).map(|j| f64::from(x.at(i, j).widen())).collect())
    }

    /// Element `(i, j)`.
    pub(crate) fn at(&self, i: usize, j: usize) -> f32 {
        each_type!(AnyRows, self, x => x.at(i, j).widen())
    }

    /// Bytes of a row.
    #[inline(always)]
    pub(crate) fn row_bytes(&self) -> usize {
        each_type!(AnyRows, self, x => x.row_bytes())
    }

    /// The address of row `i`, valid or not, and from it to the next one.
    #[inline(always)]
    pub(crate) fn address(&self, i: usize) -> (*const u8, isize) {
        each_type!(AnyRows, self, x => x.address(i))
    }

    /// How many elements a row has.
    #[inline(always)]
    pub(crate) fn cols(&self) -> usize {
        each_type!(AnyRows, self, x => x.cols())
    }

    /// These rows in `f32`, `stride` apart in `to`, which holds whole vectors a
    /// row. Where the elements of a column are neighbours, blocks are
    /// transposed.
    #[inline(always)]
    pub(crate) fn copied<'b, S: Simd>(self, s: S, to: &'b mut [f32], stride: usize) -> AnyRows<'b> {
        each_type!(AnyRows, self, from => {
            if from.row_stride() == 1 && !from.is_unit() {
                s.vectorize(PackBlock(PackColumns { from: from.transposed(), to, stride }));
            } else {
                s.vectorize(PackRows { from, to, stride });
            }
        });
        AnyRows::F32(Rows::of_slice(to, self.len(), self.cols(), stride))
    }
}

/// An output `[batch, heads, len, dim]`, whose rows are each taken once.
#[derive(Debug)]
pub enum AnyOut<'a> {
    F32(OutRows<'a, f32>),
    F16(OutRows<'a, f16>),
    Bf16(OutRows<'a, bf16>),
}

impl<'a> AnyOut<'a> {
    /// Where rows of one head lie.
    pub(crate) fn stream(&self, batch: usize, head: usize, rows: Range<usize>) -> Stream {
        each_type!(AnyOut, self, x => x.stream(batch, head, rows))
    }

    /// The rows of one head. Panics if one was taken before.
    pub(crate) fn take(&self, batch: usize, head: usize, rows: Range<usize>) -> AnyRowsMut<'a> {
        match self {
            Self::F32(x) => AnyRowsMut::F32(x.take(batch, head, rows)),
            Self::F16(x) => AnyRowsMut::F16(x.take(batch, head, rows)),
            Self::Bf16(x) => AnyRowsMut::Bf16(x.take(batch, head, rows)),
        }
    }

    /// A block of columns of the rows of one head, where the output is made
    /// [in blocks](OutRows::in_blocks). Panics if one was taken before.
    pub(crate) fn take_block(
        &self,
        batch: usize,
        head: usize,
        rows: Range<usize>,
        block: usize,
    ) -> AnyRowsMut<'a> {
        match self {
            Self::F32(x) => AnyRowsMut::F32(x.take_block(batch, head, rows, block)),
            Self::F16(x) => AnyRowsMut::F16(x.take_block(batch, head, rows, block)),
            Self::Bf16(x) => AnyRowsMut::Bf16(x.take_block(batch, head, rows, block)),
        }
    }
}

/// Rows of an output that one thread owns.
#[derive(Debug)]
pub enum AnyRowsMut<'a> {
    F32(RowsMut<'a, f32>),
    F16(RowsMut<'a, f16>),
    Bf16(RowsMut<'a, bf16>),
}

impl AnyRowsMut<'_> {
    /// Where some of the rows lie.
    pub(crate) fn stream(&self, rows: Range<usize>) -> Stream {
        each_type!(AnyRowsMut, self, x => x.stream(rows))
    }

    /// Rounds `row * factor` to the type and writes it as row `i`.
    #[inline(always)]
    pub(crate) fn write<S: Simd>(&mut self, s: S, i: usize, row: &[f32], factor: f32) {
        each_type!(AnyRowsMut, self, to => s.vectorize(WriteRow { row, factor, to, i }));
    }
}
