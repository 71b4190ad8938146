//! Every so many-th key of the sequences of a cache, as keys of their own.

use crate::keys::arrays::Unpack;
use crate::keys::source::{At, KvSource};
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::Rows;

/// Key `i` is key `first + i step` of the same sequence; there are no values.
pub(crate) struct Every<'a> {
    pub(crate) source: &'a dyn KvSource,
    pub(crate) first: usize,
    pub(crate) step: usize,
    pub(crate) head_dim: usize,
}

impl Every<'_> {
    fn at<'s>(&self, at: &At<'s>, i: usize) -> At<'s> {
        let key = self.first + i * self.step;
        At { keys: key..key + 1, ..at.clone() }
    }
}

impl KvSource for Every<'_> {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let (n, dim) = (at.keys.len(), self.head_dim);
        let rows = &mut room[..n * dim];
        for (i, row) in at.keys.clone().zip(rows.chunks_exact_mut(dim.max(1))) {
            let (at, place) = (self.at(at, i), row.as_ptr().cast::<u8>());
            if self.source.keys(isa, &at, &mut *row).address(0).0 != place {
                // It lies where it is kept, for which no room is needed.
                isa.dispatch(Unpack { from: self.source.keys(isa, &at, &mut []), to: &mut *row, dim });
            }
        }
        AnyRows::F32(Rows::of_slice(room, n, dim, dim))
    }

    fn values<'r>(&'r self, _: Isa, at: &At<'_>, _: &'r mut [f32]) -> AnyRows<'r> {
        AnyRows::F32(Rows::of_slice(&[], at.keys.len(), 0, 0))
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        let [(key, step), (value, _)] = self.source.ahead(&self.at(at, at.keys.start));
        [(key, step.wrapping_mul(self.step as isize)), (value, 0)]
    }

    fn row_bytes(&self) -> [usize; 2] {
        [self.source.row_bytes()[0], 0]
    }
}
