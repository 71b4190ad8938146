//! Two sources of rows one after the other as the keys and values of one head:
//! pools, and the tokens after them; a reference, and what is drawn after it.

use crate::keys::arrays::Unpack;
use crate::keys::source::{At, KvSource};
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::Rows;

/// Rows `0..split` of a sequence are those of the first part, the others of the second.
pub(crate) struct Joined<'a> {
    pub(crate) parts: [&'a dyn KvSource; 2],
    pub(crate) split: usize,
    /// Elements of a key and of a value.
    pub(crate) dims: [usize; 2],
}

impl Joined<'_> {
    /// What a range of rows has in each part.
    fn parts<'b>(&self, at: &At<'b>) -> [At<'b>; 2] {
        let (keys, split) = (&at.keys, self.split);
        let first = keys.start.min(split)..keys.end.min(split);
        let second = keys.start.max(split) - split..keys.end.max(split) - split;
        [first, second].map(|keys| At { keys, ..*at })
    }

    fn give<'r>(
        &'r self,
        (part, side): (usize, usize),
        isa: Isa,
        at: &At<'_>,
        room: &'r mut [f32],
    ) -> AnyRows<'r> {
        let part = self.parts[part];
        if side == 0 { part.keys(isa, at, room) } else { part.values(isa, at, room) }
    }

    /// Rows of one part, written to `room` where they did not lie as `f32`: engines hold
    /// rows of one type at a time.
    fn one<'r>(&'r self, of: (usize, usize), isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let start = room.as_ptr().cast::<u8>();
        let rows = self.give(of, isa, at, &mut *room);
        let (wide, there) = (matches!(rows, AnyRows::F32(_)), rows.address(0).0 == start);
        if wide && !there {
            return self.give(of, isa, at, room);
        }
        let dim = self.dims[of.1];
        if !there {
            // They lie where they are kept, for which no room is needed.
            isa.dispatch(Unpack { from: self.give(of, isa, at, &mut []), to: &mut *room, dim });
        }
        AnyRows::F32(Rows::of_slice(room, at.keys.len(), dim, dim))
    }

    fn rows<'r>(&'r self, side: usize, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let (parts, dim) = (self.parts(at), self.dims[side]);
        let [first, second] = [0, 1].map(|part| parts[part].keys.is_empty());
        if first || second {
            let part = usize::from(first);
            return self.one((part, side), isa, &parts[part], room);
        }
        let (to, rest) = room.split_at_mut(parts[0].keys.len() * dim);
        for (part, to) in [to, rest].into_iter().enumerate() {
            let start = to.as_ptr().cast::<u8>();
            let there = self.give((part, side), isa, &parts[part], &mut *to).address(0).0 == start;
            if !there {
                let from = self.give((part, side), isa, &parts[part], &mut []);
                isa.dispatch(Unpack { from, to, dim });
            }
        }
        AnyRows::F32(Rows::of_slice(room, at.keys.len(), dim, dim))
    }
}

impl KvSource for Joined<'_> {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(0, isa, at, room)
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(1, isa, at, room)
    }

    fn stretch(&self, at: &At<'_>) -> usize {
        let parts = self.parts(at);
        let part = usize::from(parts[0].keys.is_empty());
        self.parts[part].stretch(&parts[part])
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        let part = usize::from(at.keys.start >= self.split);
        self.parts[part].ahead(&self.parts(at)[part])
    }

    fn row_bytes(&self) -> [usize; 2] {
        self.dims.map(|dim| dim * size_of::<f32>())
    }
}

/// A source whose keys are its values.
pub(crate) struct Shared<'a>(pub(crate) &'a dyn KvSource);

impl KvSource for Shared<'_> {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.0.keys(isa, at, room)
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.0.keys(isa, at, room)
    }

    fn stretch(&self, at: &At<'_>) -> usize {
        self.0.stretch(at)
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        let [key, _] = self.0.ahead(at);
        [key; 2]
    }

    fn row_bytes(&self) -> [usize; 2] {
        let [key, _] = self.0.row_bytes();
        [key; 2]
    }
}
