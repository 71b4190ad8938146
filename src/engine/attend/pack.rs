//! Packs keys and values of a head in the order in which products read them.

use std::ops::Range;

use crate::engine::call::Call;
use crate::engine::parallel;
use crate::engine::scores::{Geometry, KEY_TILE, KeyTile, ScoreTile};
use crate::input::Sequence;
use crate::keys::plan::{ATOM, Keys};
use crate::keys::source::At;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Arena, Parts, Rows, bytes_for, claim_words};
use crate::simd::pack::SLICE;
use crate::simd::{Kernel, Simd};

/// The packed keys and values of one head of one sequence, tile by tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed<'a> {
    pub(crate) keys: &'a [f32],
    pub(crate) values: &'a [f32],
    /// [`Geometry::flags`]
    pub(crate) flags: &'a [u8],
    /// The first tile of the sequence that is packed.
    pub(crate) first: usize,
}

/// Memory for them.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    pub(crate) keys: &'a mut [f32],
    pub(crate) values: &'a mut [f32],
    pub(crate) flags: &'a mut [u8],
}

impl<'a> Room<'a> {
    pub(crate) fn bytes(g: &Geometry, tiles: usize) -> usize {
        bytes_for::<f32>(tiles * g.packed_keys())
            + bytes_for::<f32>(tiles * g.packed_values())
            + bytes_for::<u8>(tiles * g.flags())
    }

    pub(crate) fn take(arena: &mut Arena<'a>, g: &Geometry, tiles: usize) -> Self {
        Self {
            keys: arena.take(tiles * g.packed_keys()),
            values: arena.take(tiles * g.packed_values()),
            flags: arena.take(tiles * g.flags()),
        }
    }

    /// One tile of it.
    pub(crate) fn tile(&mut self, g: &Geometry, tile: usize) -> Room<'_> {
        Room {
            keys: &mut self.keys[tile * g.packed_keys()..][..g.packed_keys()],
            values: &mut self.values[tile * g.packed_values()..][..g.packed_values()],
            flags: &mut self.flags[tile * g.flags()..][..g.flags()],
        }
    }

    /// What has been packed, from a tile of the sequence on.
    pub(crate) fn packed(&self, first: usize) -> Packed<'_> {
        Packed { keys: self.keys, values: self.values, flags: self.flags, first }
    }
}

/// Room for the rows of a tile on their way into it, where they do not lie as
/// a source gives them.
#[derive(Debug)]
pub(crate) struct Rooms<'a> {
    /// Rows one after the other.
    rows: &'a mut [f32],
    /// Rows that a cache unpacks.
    unpacked: &'a mut [f32],
}

impl<'a> Rooms<'a> {
    fn sizes(call: &Call<'_>) -> [usize; 2] {
        let dim = call.dims.head_dim.max(call.dims.value_dim);
        let unpacks = call.x.kv.unpacks();
        let gathers = call.order.is_some() || unpacks || matches!(call.keys, Keys::Tokens(_));
        [gathers, unpacks].map(|needed| if needed { KEY_TILE * dim } else { 0 })
    }

    pub(crate) fn bytes(call: &Call<'_>) -> usize {
        Self::sizes(call).map(bytes_for::<f32>).iter().sum()
    }

    /// Room for the rows of a slice.
    pub(crate) fn unpacked(&mut self) -> &mut [f32] {
        self.unpacked
    }

    pub(crate) fn take(arena: &mut Arena<'a>, call: &Call<'_>) -> Self {
        let [rows, unpacked] = Self::sizes(call);
        Self { rows: arena.take(rows), unpacked: arena.take(unpacked) }
    }
}

/// Where a thread packs what it needs for itself.
pub(crate) struct Own<'a, 'b> {
    pub(crate) room: &'a mut Room<'b>,
    pub(crate) rooms: &'a mut Rooms<'b>,
}

/// Which of a head's rows are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Keys,
    Values,
}

/// Rows of a source.
#[inline(always)]
fn rows<'r>(call: &'r Call<'_>, what: What, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
    match what {
        What::Keys => call.x.kv.keys(call.isa, at, room),
        What::Values => call.x.kv.values(call.isa, at, room),
    }
}

/// Copies pieces, in the order of the call, one after the other into `to`.
#[inline(always)]
fn gather<'r, S: Simd>(
    s: S,
    call: &Call<'_>,
    what: What,
    (sequence, kv_head): (&Sequence, usize),
    pieces: impl Iterator<Item = (usize, Range<usize>)>,
    len: usize,
    rooms: &'r mut Rooms<'_>,
) -> AnyRows<'r> {
    let dim = if what == What::Keys { call.dims.head_dim } else { call.dims.value_dim };
    let Rooms { rows: to, unpacked } = rooms;
    // Rows of an order are counted from the first of the arrays.
    let all = Sequence { keys: 0..call.dims.kv_len, ..sequence.clone() };
    for (column, keys) in pieces {
        let mut copy = |column: usize, sequence: &Sequence, keys: Range<usize>| {
            let from = rows(call, what, &At { sequence, kv_head, keys: keys.clone() }, unpacked);
            from.pack_rows(s, &mut to[column * dim..][..keys.len() * dim], dim);
        };
        if call.order.is_none() {
            copy(column, sequence, keys);
            continue;
        }
        call.key_runs(sequence, keys).for_each(|(i, rows)| copy(column + i, &all, rows));
    }
    AnyRows::F32(Rows::of_slice(to, len, dim, dim))
}

/// Packs keys at some columns of a tile: whole slices of them with AMX, whole
/// panels otherwise.
#[inline(always)]
fn pack_keys<S: Simd>(s: S, g: &Geometry, from: AnyRows<'_>, column: usize, to: &mut Room<'_>) {
    if g.amx.is_none() {
        from.pack_keys(s, &mut to.keys[column * g.head_dim..]);
        return;
    }
    let huge = &mut to.flags[g.slices() + column..];
    from.pack_key_pairs(s, &mut to.keys[column / SLICE * g.slice_keys()..], huge);
}

/// The same of values.
#[inline(always)]
fn pack_values<S: Simd>(s: S, g: &Geometry, from: AnyRows<'_>, column: usize, to: &mut Room<'_>) {
    if g.amx.is_some() {
        let kept = &mut to.flags[column / SLICE..g.slices()];
        from.pack_value_pairs(s, &mut to.values[column / SLICE * g.slice_values()..], kept);
        return;
    }
    let mut at = 0;
    while at < from.len() {
        let (start, slice) = (column + at, (column + at) / SLICE);
        let end = from.len().min((slice + 1) * SLICE - column);
        let mut finite = [1];
        let values = to.values.get_mut(start * g.panel..).unwrap_or_default();
        from.part(at..end).pack_values(s, values, g.key_room, &mut finite);
        to.flags[slice] &= finite[0];
        at = end;
    }
}

/// Packs neighbouring keys at some columns of a tile.
struct PackRun<'a, 'b, 'c> {
    call: &'a Call<'c>,
    g: &'a Geometry,
    sequence: &'a Sequence,
    kv_head: usize,
    keys: Range<usize>,
    column: usize,
    to: Room<'a>,
    rooms: &'a mut Rooms<'b>,
}

impl Kernel for PackRun<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Self { call, g, sequence, kv_head, keys, column, to, rooms: room } = &mut self;
        for what in [What::Keys, What::Values] {
            let from = if call.order.is_some() {
                let piece = std::iter::once((0, keys.clone()));
                gather(s, call, what, (sequence, *kv_head), piece, keys.len(), room)
            } else {
                let from =
                    rows(call, what, &At { sequence, kv_head: *kv_head, keys: keys.clone() }, room.unpacked);
                // Tiles know of one type alone.
                let cols = from.cols();
                if g.amx.is_some() && call.x.kv.unpacks() { from.copied(s, room.rows, cols) } else { from }
            };
            match what {
                What::Keys => pack_keys(s, g, from, *column, to),
                What::Values => pack_values(s, g, from, *column, to),
            }
        }
    }
}

/// Packs one tile of keys and values of one head: the slices of which some atom
/// is `named`, one bit each.
#[expect(clippy::too_many_arguments, reason = "what is packed and where it goes")]
pub(crate) fn pack_tile(
    call: &Call<'_>,
    g: &Geometry,
    sequence: &Sequence,
    kv_head: usize,
    tile: usize,
    named: u8,
    to: &mut Room<'_>,
    rooms: &mut Rooms<'_>,
) {
    const SLICES: usize = KEY_TILE / SLICE;
    to.flags[..g.slices()].fill(1);
    let is_named = |slice: usize| named >> (slice * SLICE / ATOM) & ((1 << (SLICE / ATOM)) - 1) != 0;
    let len = sequence.keys.len();
    let mut slice = 0;
    while slice < SLICES {
        let first = slice;
        while slice < SLICES && is_named(slice) {
            slice += 1;
        }
        let keys = (tile * KEY_TILE + first * SLICE).min(len)..(tile * KEY_TILE + slice * SLICE).min(len);
        if !keys.is_empty() {
            let to = to.tile(g, 0);
            call.isa.dispatch(PackRun { call, g, sequence, kv_head, keys, column: first * SLICE, to, rooms });
        }
        slice += 1;
    }
}

/// Packs the keys that a tile of queries is at, column by column.
#[inline(always)]
pub(crate) fn pack_now<S: Simd>(s: S, tile: &ScoreTile<'_, '_, '_>, to: &mut Room<'_>, room: &mut Rooms<'_>) {
    let (call, g, len, head) = (tile.call, &tile.g, tile.len, (&tile.sequence, tile.kv_head));
    to.flags[..g.slices()].fill(1);
    for what in [What::Keys, What::Values] {
        let from = match tile.keys {
            KeyTile::Virtual { first } => match &call.extra {
                Some(extra) => {
                    let array = if what == What::Keys { &extra.k } else { &extra.v };
                    array.rows(tile.sequence.slot, tile.kv_head, &(first..first + len))
                }
                None => return,
            },
            KeyTile::Keys { .. } if call.order.is_none() => {
                let at = At { sequence: head.0, kv_head: head.1, keys: tile.piece(0).keys };
                rows(call, what, &at, room.unpacked)
            }
            _ => {
                let pieces =
                    (0..tile.pieces()).map(|i| tile.piece(i)).map(|piece| (piece.column, piece.keys));
                gather(s, call, what, head, pieces, len, room)
            }
        };
        match what {
            What::Keys => pack_keys(s, g, from, 0, to),
            What::Values => pack_values(s, g, from, 0, to),
        }
    }
}

/// Which atoms of each tile from `first` on some list of a head names, one bit
/// each.
pub(crate) fn name_atoms(
    call: &Call<'_>,
    sequence: &Sequence,
    kv_head: usize,
    first: usize,
    named: &mut [u8],
) {
    const EACH: usize = KEY_TILE / ATOM;
    let Keys::Blocks(lists) = call.keys else {
        named.fill((1 << EACH) - 1);
        return;
    };
    named.fill(0);
    let group = call.group();
    let heads = kv_head * group..kv_head * group + if call.keys.is_per_head() { group } else { group.min(1) };
    for head in heads {
        for block in 0..sequence.queries.len().div_ceil(lists.layout().q_block) {
            for &atom in lists.atoms(sequence.index, head, block) {
                let (tile, bit) = (atom as usize / EACH, atom as usize % EACH);
                if let Some(named) = tile.checked_sub(first).and_then(|tile| named.get_mut(tile)) {
                    *named |= 1 << bit;
                }
            }
        }
    }
}

/// Packed keys and values of some units.
pub(crate) struct Wave<'a> {
    keys: &'a mut [f32],
    values: &'a mut [f32],
    flags: &'a mut [u8],
    /// Which atoms of each tile are named.
    named: &'a mut [u8],
    claims: [&'a mut [u64]; 4],
}

impl<'a> Wave<'a> {
    pub(crate) fn bytes(g: &Geometry, units: usize) -> usize {
        let pieces = units * g.key_tiles;
        units * g.unit_bytes()
            + 3 * bytes_for::<u64>(claim_words(pieces))
            + bytes_for::<u8>(pieces)
            + bytes_for::<u64>(claim_words(units))
    }

    pub(crate) fn take(arena: &mut Arena<'a>, g: &Geometry, units: usize) -> Self {
        let pieces = units * g.key_tiles;
        let claims = [pieces, pieces, pieces, units].map(|n| arena.take(claim_words(n)));
        Self {
            claims,
            named: arena.take(pieces),
            keys: arena.take(pieces * g.packed_keys()),
            values: arena.take(pieces * g.packed_values()),
            flags: arena.take(pieces * g.flags()),
        }
    }

    /// Packs units: `of` gives sequence and head of each, and its tiles.
    pub(crate) fn pack(
        &mut self,
        (call, g, workers): (&Call<'_>, &Geometry, usize),
        units: Range<usize>,
        of: impl Fn(usize) -> (Sequence, usize, Range<usize>) + Sync + Send,
        mut arena: Arena<'_>,
    ) {
        let [of_keys, of_values, of_flags, of_names] = self.claims.each_mut();
        if let Keys::Blocks(_) = call.keys {
            let parts = Parts::new(&mut *self.named, g.key_tiles, of_names);
            let units = if g.key_tiles > 0 { units.clone() } else { 0..0 };
            parallel::for_each(
                workers,
                units.len(),
                |_| (),
                |(), i| {
                    let (sequence, head, tiles) = of(units.start + i);
                    if !tiles.is_empty() {
                        name_atoms(call, &sequence, head, tiles.start, parts.take(i));
                    }
                },
            );
        } else {
            self.named.fill(u8::MAX);
        }
        let named = &*self.named;
        let keys = Parts::new(&mut *self.keys, g.packed_keys(), of_keys);
        let values = Parts::new(&mut *self.values, g.packed_values(), of_values);
        let flags = Parts::new(&mut *self.flags, g.flags(), of_flags);
        let shares = arena.shares(workers, Rooms::bytes(call));
        let start = |worker: usize| Rooms::take(&mut shares.take(worker), call);
        parallel::for_each(workers, units.len() * g.key_tiles, start, |rooms, piece| {
            let (unit, tile) = (units.start + piece / g.key_tiles, piece % g.key_tiles);
            let (sequence, kv_head, tiles) = of(unit);
            if tile < tiles.len() {
                let (keys, values, flags) = (keys.take(piece), values.take(piece), flags.take(piece));
                let to = &mut Room { keys, values, flags };
                pack_tile(call, g, &sequence, kv_head, tiles.start + tile, named[piece], to, rooms);
            }
        });
    }

    /// What has been packed of one of them, whose tiles start with this one.
    pub(crate) fn packed(&self, g: &Geometry, unit: usize, first: usize) -> Packed<'_> {
        Packed {
            keys: &self.keys[unit * g.key_tiles * g.packed_keys()..],
            values: &self.values[unit * g.key_tiles * g.packed_values()..],
            flags: &self.flags[unit * g.key_tiles * g.flags()..],
            first,
        }
    }
}
