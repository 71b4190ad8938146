//! Where the keys and values of a call live: in strided arrays, or in a cache
//! that unpacks them a block at a time.

use std::ops::Range;

use crate::element::DType;
use crate::input::{Dims, Sequence};
use crate::simd::Isa;
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::mem::Rows;

/// Some keys of one head of one sequence.
#[derive(Clone, Debug)]
pub struct At<'a> {
    pub(crate) sequence: &'a Sequence,
    pub(crate) kv_head: usize,
    /// Counted from the start of the sequence.
    pub(crate) keys: Range<usize>,
}

/// A cache that engines read. Attention never knows which one.
///
/// Engines ask for any number of rows, from any row on.
pub trait KvSource: Sync {
    /// Keys, `[rows, head_dim]`: where they lie if they are evenly strided and
    /// their elements neighbours, else unpacked into the front of `room`, which
    /// holds `rows * head_dim` numbers.
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r>;

    /// Values, `[rows, value_dim]`, likewise.
    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r>;

    /// Codes of 8 bits of some keys, from the first on, with a scale each, where keys
    /// are stored so: of all of them, or up to the end of a page. Of no keys it says
    /// whether they are.
    fn codes(&self, at: &At<'_>) -> Option<(Rows<'_, i8>, &[f32])> {
        let _ = at;
        None
    }

    /// How many of some keys, from the first on, [`keys`](Self::keys) and
    /// [`values`](Self::values) give at once without unpacking them: up to the
    /// end of a page. Engines that read in place ask for no more.
    fn stretch(&self, at: &At<'_>) -> usize {
        at.keys.len()
    }

    /// Addresses of the row of one key and of its value, valid or not, and
    /// from them to the next ones: for prefetching.
    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2];

    /// Bytes of a key and of a value as they are stored.
    fn row_bytes(&self) -> [usize; 2];
}

/// Keys and values of a call.
#[derive(Clone, Copy)]
pub(crate) enum Kv<'a> {
    /// Arrays `[batch, kv_heads, len, dim]`, which engines read in place.
    Arrays { k: AnyArray<'a>, v: AnyArray<'a> },
    /// A cache.
    Cache(&'a dyn KvSource),
    /// The keys of a cache, with values of no elements.
    CacheKeys(&'a dyn KvSource),
}

impl<'a> Kv<'a> {
    /// The keys of a block: see [`KvSource::keys`].
    #[inline(always)]
    pub(crate) fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        match self {
            Self::Arrays { k, .. } => k.rows(at.sequence.batch, at.kv_head, &at.rows()),
            Self::Cache(cache) | Self::CacheKeys(cache) => cache.keys(isa, at, room),
        }
    }

    /// The values of a block: see [`KvSource::values`].
    #[inline(always)]
    pub(crate) fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        match self {
            Self::Arrays { v, .. } => v.rows(at.sequence.batch, at.kv_head, &at.rows()),
            Self::Cache(cache) => cache.values(isa, at, room),
            Self::CacheKeys(_) => AnyRows::F32(Rows::of_slice(&[], at.keys.len(), 0, 0)),
        }
    }

    /// Codes of keys: see [`KvSource::codes`].
    pub(crate) fn codes(&self, at: &At<'_>) -> Option<(Rows<'_, i8>, &[f32])> {
        match self {
            Self::Arrays { .. } => None,
            Self::Cache(cache) | Self::CacheKeys(cache) => cache.codes(at),
        }
    }

    /// The same with values of no elements.
    pub(crate) fn without_values(&self) -> Self {
        match *self {
            Self::Arrays { k, v } => Self::Arrays { k, v: v.without_columns() },
            Self::Cache(cache) | Self::CacheKeys(cache) => Self::CacheKeys(cache),
        }
    }

    /// The arrays, where keys and values are read in place.
    pub(crate) fn arrays(&self) -> Option<[AnyArray<'a>; 2]> {
        match *self {
            Self::Arrays { k, v } => Some([k, v]),
            Self::Cache(_) | Self::CacheKeys(_) => None,
        }
    }

    /// Numbers of `bf16` that add up to an element of the keys, and of the
    /// values. What a cache gives may be of several types: it is widened.
    pub(crate) fn parts(&self) -> [usize; 2] {
        match self {
            Self::Arrays { k, v } => [k.parts(), v.parts()],
            Self::Cache(_) | Self::CacheKeys(_) => [DType::F32.parts(); 2],
        }
    }

    /// Whether rows may need room to be unpacked in.
    pub(crate) fn unpacks(&self) -> bool {
        self.arrays().is_none()
    }
}

impl At<'_> {
    /// The rows of arrays in which they lie.
    fn rows(&self) -> Range<usize> {
        self.sequence.keys.start + self.keys.start..self.sequence.keys.start + self.keys.end
    }
}

/// The sequences of a call over a cache: which of the cache's they are, and
/// where their queries lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots<'a> {
    /// Their numbers in the cache; `None` is all of them.
    pub(crate) slots: Option<&'a [usize]>,
    /// Offsets of packed queries.
    pub(crate) offsets: Option<&'a [usize]>,
    /// Keys of each sequence of the cache.
    pub(crate) lengths: &'a [usize],
}

impl Slots<'_> {
    pub(crate) fn slot(&self, index: usize) -> usize {
        self.slots.map_or(index, |slots| slots[index])
    }

    /// Keys of sequence `index` of the call.
    pub(crate) fn len(&self, index: usize) -> usize {
        self.lengths[self.slot(index)]
    }

    /// Sequence `index` of the call.
    pub(crate) fn sequence(&self, dims: &Dims, index: usize) -> Sequence {
        let (batch, queries) = match self.offsets {
            Some(offsets) => (0, offsets[index]..offsets[index + 1]),
            None => (index, 0..dims.q_len),
        };
        Sequence { index, batch, slot: self.slot(index), queries, keys: 0..self.len(index) }
    }
}
