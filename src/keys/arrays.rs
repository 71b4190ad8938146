//! Arrays as what engines read a cache through: rows that are made beside a cache, and
//! parts of [joined](super::joined) rows.

use crate::keys::source::{At, KvSource};
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::mem::Rows;
use crate::simd::{Isa, Kernel, Simd};

/// Keys and values `[sequences, kv_heads, rows, dim]`: entry `i` is of sequence `i` of the
/// call, wherever its queries lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Laid<'a> {
    pub(crate) k: AnyArray<'a>,
    pub(crate) v: AnyArray<'a>,
}

fn rows<'r>(array: &AnyArray<'r>, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
    let rows = array.rows(at.sequence.index, at.kv_head, &at.keys);
    if rows.is_unit() {
        return rows;
    }
    let dim = array.dim().3;
    isa.dispatch(Unpack { from: rows, to: room, dim });
    AnyRows::F32(Rows::of_slice(room, at.keys.len(), dim, dim))
}

impl KvSource for Laid<'_> {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        rows(&self.k, isa, at, room)
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        rows(&self.v, isa, at, room)
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        let row = at.keys.start;
        [&self.k, &self.v].map(|array| match row < array.dim().2 {
            true => array.rows(at.sequence.index, at.kv_head, &(row..row + 1)).address(0),
            false => (std::ptr::null(), 0),
        })
    }

    fn row_bytes(&self) -> [usize; 2] {
        [&self.k, &self.v].map(|array| match array {
            AnyArray::F32(_) => array.dim().3 * size_of::<f32>(),
            AnyArray::F16(_) | AnyArray::Bf16(_) => array.dim().3 * 2,
        })
    }
}

/// Copies rows as `f32`.
pub(super) struct Unpack<'a> {
    pub(super) from: AnyRows<'a>,
    pub(super) to: &'a mut [f32],
    pub(super) dim: usize,
}

impl Kernel for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.from.pack_rows(s, self.to, self.dim);
    }
}
