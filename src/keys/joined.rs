//! Two arrays of rows one after the other as the keys and values of one head:
//! pools, and the tokens after them; a reference, and what is drawn after it.

use std::ops::Range;

use crate::keys::source::{At, KvSource};
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::mem::Rows;
use crate::simd::{Isa, Kernel, Simd};

/// Rows `0..split` of a sequence are those of the first array, `[batch, kv_heads,
/// rows, dim]`, the others of the second.
pub(crate) struct Joined<'a> {
    pub(crate) k: [AnyArray<'a>; 2],
    pub(crate) v: [AnyArray<'a>; 2],
    pub(crate) split: usize,
}

impl<'a> Joined<'a> {
    /// What a range of rows has in each array.
    fn parts(&self, keys: &Range<usize>) -> [Range<usize>; 2] {
        let first = keys.start.min(self.split)..keys.end.min(self.split);
        let second = keys.start.max(self.split) - self.split..keys.end.max(self.split) - self.split;
        [first, second]
    }

    fn rows<'r>(
        &'r self,
        arrays: &[AnyArray<'a>; 2],
        isa: Isa,
        at: &At<'_>,
        room: &'r mut [f32],
    ) -> AnyRows<'r> {
        let (parts, dim) = (self.parts(&at.keys), arrays[0].dim().3);
        let rows = [0, 1].map(|side| arrays[side].rows(at.sequence.batch, at.kv_head, &parts[side]));
        // Engines hold rows of one type and stride at a time.
        let in_place = |rows: &AnyRows<'_>| matches!(rows, AnyRows::F32(_)) && rows.is_unit();
        match &rows {
            [first, second] if second.len() == 0 && in_place(first) => *first,
            [first, second] if first.len() == 0 && in_place(second) => *second,
            [first, second] => {
                let (to, rest) = room.split_at_mut(first.len() * dim);
                isa.dispatch(Unpack { from: *first, to, dim });
                isa.dispatch(Unpack { from: *second, to: rest, dim });
                AnyRows::F32(Rows::of_slice(room, at.keys.len(), dim, dim))
            }
        }
    }
}

impl KvSource for Joined<'_> {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(&self.k, isa, at, room)
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(&self.v, isa, at, room)
    }

    fn stretch(&self, at: &At<'_>) -> usize {
        let parts = self.parts(&at.keys);
        if parts[0].is_empty() { parts[1].len() } else { parts[0].len() }
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        let (side, row) = match at.keys.start.checked_sub(self.split) {
            Some(row) => (1, row),
            None => (0, at.keys.start),
        };
        [&self.k[side], &self.v[side]].map(|array| {
            if row >= array.dim().2 {
                return (std::ptr::null(), 0);
            }
            array.rows(at.sequence.batch, at.kv_head, &(row..row + 1)).address(0)
        })
    }

    fn row_bytes(&self) -> [usize; 2] {
        [&self.k, &self.v].map(|arrays| arrays[0].dim().3 * size_of::<f32>())
    }
}

/// Copies rows as `f32`.
struct Unpack<'a> {
    from: AnyRows<'a>,
    to: &'a mut [f32],
    dim: usize,
}

impl Kernel for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.from.pack_rows(s, self.to, self.dim);
    }
}
