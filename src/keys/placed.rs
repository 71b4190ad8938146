//! One head of one sequence of a cache, by itself; its keys turned on the way.

use crate::keys::arrays::Unpack;
use crate::keys::source::{At, KvSource};
use crate::math::rope::Turns;
use crate::simd::any::AnyRows;
use crate::simd::mem::Rows;
use crate::simd::{Isa, Kernel, Simd};

use crate::input::Sequence;

/// What the call of one sequence and one key/value head reads.
pub(crate) struct Placed<'a> {
    pub(crate) source: &'a dyn KvSource,
    /// The sequence and the head, as the source counts them.
    pub(crate) sequence: &'a Sequence,
    pub(crate) kv_head: usize,
    /// The key that counts as the first.
    pub(crate) first: usize,
    /// A table of turns, and the first element of a key that turns.
    pub(crate) turns: Option<(&'a Turns, usize)>,
    /// Key `j` is turned to `j` modulo this.
    pub(crate) chunk: usize,
    pub(crate) head_dim: usize,
}

impl Placed<'_> {
    fn at(&self, at: &At<'_>) -> At<'_> {
        let keys = self.first + at.keys.start..self.first + at.keys.end;
        At { sequence: self.sequence, kv_head: self.kv_head, keys }
    }
}

impl KvSource for Placed<'_> {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let (at, dim) = (self.at(at), self.head_dim);
        let Some((turns, start)) = self.turns else { return self.source.keys(isa, &at, room) };
        let first = room.as_ptr().cast::<u8>();
        let there = self.source.keys(isa, &at, &mut *room).address(0).0 == first;
        if !there {
            // They lie where they are kept, for which no room is needed.
            isa.dispatch(Unpack { from: self.source.keys(isa, &at, &mut []), to: &mut *room, dim });
        }
        let n = at.keys.len();
        isa.dispatch(Turn {
            rows: &mut room[..n * dim],
            dim,
            turns,
            start,
            first: at.keys.start,
            chunk: self.chunk,
        });
        AnyRows::F32(Rows::of_slice(room, n, dim, dim))
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.source.values(isa, &self.at(at), room)
    }

    fn stretch(&self, at: &At<'_>) -> usize {
        self.source.stretch(&self.at(at))
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        self.source.ahead(&self.at(at))
    }

    fn row_bytes(&self) -> [usize; 2] {
        self.source.row_bytes()
    }
}

struct Turn<'a> {
    rows: &'a mut [f32],
    dim: usize,
    turns: &'a Turns,
    start: usize,
    first: usize,
    chunk: usize,
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, dim, turns, start, first, chunk } = self;
        for (i, row) in rows.chunks_exact_mut(dim.max(1)).enumerate() {
            turns.turn(s, &mut row[start..], (first + i) % chunk);
        }
    }
}
