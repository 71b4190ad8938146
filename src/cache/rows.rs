//! Rows of a cache: how they are stored, where the tokens of a sequence lie
//! among them, and how both together are read and written.

use std::ops::Range;

use ndarray::{ArrayView4, Axis, s};

use super::{KvShape, check_sequence};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::keys::source::{At, KvSource};
use crate::math::rope::Turns;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Aligned, Rows, cast_mut};
use crate::simd::quant::StoreRows;
use crate::simd::{Isa, Kernel, Simd};

/// Memory of rows of equal length, each written once and read often.
pub trait RowStore: Clone + std::fmt::Debug + Send + Sync + 'static {
    /// So many rows; `None` where there is no memory for them.
    fn zeroed(rows: usize, cols: usize) -> Option<Self>;

    /// Stores rows from `first` on.
    fn write<T: Element>(&mut self, isa: Isa, first: usize, from: Rows<'_, T>);

    /// Copies `n` rows, bit for bit.
    fn copy(&mut self, from: usize, to: usize, n: usize);

    /// The first `cols` columns of some rows where they lie, if they can be
    /// read there.
    fn in_place(&self, rows: Range<usize>, cols: usize) -> Option<AnyRows<'_>>;

    /// Whether they can.
    const IN_PLACE: bool;

    /// Copies or unpacks the first `cols` columns of some rows into `room`,
    /// after `before` other ones.
    fn collect(&self, isa: Isa, rows: Range<usize>, cols: usize, room: &mut [f32], before: usize);

    /// Codes of 8 bits of some rows with a scale each, if they are stored so.
    fn codes(&self, rows: Range<usize>) -> Option<(Rows<'_, i8>, &[f32])> {
        let _ = rows;
        None
    }

    /// So many rows that were [collected](Self::collect), of the same type as
    /// those that are read in place.
    fn collected(room: &mut [f32], rows: usize, cols: usize) -> AnyRows<'_>;

    /// The address of a row, valid or not, and from it to the next one.
    fn address(&self, row: usize) -> (*const u8, isize);

    /// Bytes of a row.
    fn row_bytes(&self) -> usize;

    /// Bytes of all rows.
    fn bytes(&self) -> usize;
}

/// Rows of an element type.
#[derive(Clone, Debug)]
pub struct Elements<F> {
    x: Aligned<F>,
    rows: usize,
    cols: usize,
}

impl<F: Element> Elements<F> {
    /// Some rows in `f32`.
    pub(super) fn collect_wide(&self, isa: Isa, rows: Range<usize>, to: &mut [f32]) {
        let from = F::any_rows(self.rows().part(rows, 0..self.cols));
        isa.dispatch(Widen { from, to, cols: self.cols });
    }

    pub(super) fn rows(&self) -> Rows<'_, F> {
        Rows::of_slice(self.x.as_slice(), self.rows, self.cols, self.cols)
    }
}

impl<F: Element> RowStore for Elements<F> {
    const IN_PLACE: bool = true;

    fn zeroed(rows: usize, cols: usize) -> Option<Self> {
        Some(Self { x: Aligned::zeroed(rows.checked_mul(cols)?)?, rows, cols })
    }

    fn write<T: Element>(&mut self, isa: Isa, first: usize, from: Rows<'_, T>) {
        let to = &mut self.x.as_mut_slice()[first * self.cols..][..from.len() * self.cols];
        isa.dispatch(StoreRows { from, to });
    }

    fn copy(&mut self, from: usize, to: usize, n: usize) {
        self.x.as_mut_slice().copy_within(from * self.cols..(from + n) * self.cols, to * self.cols);
    }

    fn in_place(&self, rows: Range<usize>, cols: usize) -> Option<AnyRows<'_>> {
        Some(F::any_rows(self.rows().part(rows, 0..cols)))
    }

    fn collect(&self, _: Isa, rows: Range<usize>, cols: usize, room: &mut [f32], before: usize) {
        if cols == 0 {
            return;
        }
        let from = &self.x.as_slice()[rows.start * self.cols..rows.end * self.cols];
        let to = &mut cast_mut::<F>(room)[before * cols..][..rows.len() * cols];
        if cols == self.cols {
            to.copy_from_slice(from);
            return;
        }
        for (to, from) in to.chunks_exact_mut(cols).zip(from.chunks_exact(self.cols)) {
            to.copy_from_slice(&from[..cols]);
        }
    }

    fn collected(room: &mut [f32], rows: usize, cols: usize) -> AnyRows<'_> {
        F::any_rows(Rows::of_slice(cast_mut::<F>(room), rows, cols, cols))
    }

    fn address(&self, row: usize) -> (*const u8, isize) {
        self.rows().address(row)
    }

    fn row_bytes(&self) -> usize {
        self.cols * size_of::<F>()
    }

    fn bytes(&self) -> usize {
        self.x.bytes()
    }
}

/// Keys and values of a cache as rows of memory.
pub trait Placed: Send + Sync + std::fmt::Debug {
    /// How keys are stored.
    type Keys: RowStore;

    /// How values are stored.
    type Values: RowStore;

    /// Whether values are the first columns of the keys.
    const LATENT: bool = false;

    /// What attention sees of a token.
    fn kv_shape(&self) -> KvShape;

    /// Tokens of each sequence.
    fn tokens(&self) -> &[usize];

    /// The instruction set that rows are written with.
    fn isa(&self) -> Isa;

    /// Rows of keys and rows of values.
    fn planes(&self) -> &Planes<Self::Keys, Self::Values>;

    /// The same to write.
    fn planes_mut(&mut self) -> &mut Planes<Self::Keys, Self::Values>;

    /// The row in which a token lies, and how many tokens from it on lie one
    /// after the other: as many as there are, or at least `enough`.
    fn run(&self, sequence: usize, head: usize, token: usize, enough: usize) -> (usize, usize);

    /// Refuses `n` more tokens of each of these sequences, which are there and named
    /// once, where there is no room for them.
    fn fits(&self, sequences: &[usize], n: usize) -> Result<()>;

    /// Gives rows to them; or refuses as [`fits`](Self::fits) does and changes
    /// nothing.
    fn grow(&mut self, sequences: &[usize], n: usize) -> Result<()>;

    /// Positions of tokens, where keys are turned as they are read: see
    /// [`Turns::turn`].
    fn turns(&self) -> Option<&Turns> {
        None
    }
}

/// Rows of keys and rows of values.
#[derive(Clone, Debug)]
pub struct Planes<K, V> {
    pub(super) keys: K,
    pub(super) values: V,
}

impl<K: RowStore, V: RowStore> Planes<K, V> {
    /// So many rows; `argument` is what asked for them.
    pub(super) fn zeroed(argument: &'static str, rows: Option<usize>, cols: [usize; 2]) -> Result<Self> {
        let [keys, values] = cols;
        let planes = rows.and_then(|rows| Some((K::zeroed(rows, keys)?, V::zeroed(rows, values)?)));
        match planes {
            Some((keys, values)) => Ok(Self { keys, values }),
            None => Err(Error::value(argument, "a number for which there is memory", "too much")),
        }
    }

    /// Copies `n` rows of both, bit for bit.
    pub(super) fn copy(&mut self, from: usize, to: usize, n: usize) {
        self.keys.copy(from, to, n);
        self.values.copy(from, to, n);
    }

    /// Bytes of a row of both.
    pub(super) fn row_bytes(&self) -> usize {
        self.keys.row_bytes() + self.values.row_bytes()
    }

    /// Bytes of all rows.
    pub(super) fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }
}

/// Some rows: where they lie if they follow each other, else copied run by run.
fn read<'r, R: RowStore>(
    rows: &'r R,
    cols: usize,
    isa: Isa,
    keys: &Range<usize>,
    run: impl Fn(usize) -> (usize, usize),
    room: &'r mut [f32],
) -> AnyRows<'r> {
    let (first, n) = if keys.is_empty() { (0, 0) } else { run(keys.start) };
    if n >= keys.len()
        && let Some(rows) = rows.in_place(first..first + keys.len(), cols)
    {
        return rows;
    }
    let mut token = keys.start;
    while token < keys.end {
        let (first, n) = run(token);
        let n = n.min(keys.end - token);
        rows.collect(isa, first..first + n, cols, room, token - keys.start);
        token += n;
    }
    R::collected(room, keys.len(), cols)
}

/// Rows in `f32`, each turned to the position of its token.
fn read_turned<'r, R: RowStore>(
    rows: &R,
    (cols, turns): (usize, &Turns),
    isa: Isa,
    keys: &Range<usize>,
    run: impl Fn(usize) -> (usize, usize),
    room: &'r mut [f32],
) -> AnyRows<'r> {
    let mut token = keys.start;
    while token < keys.end {
        let (first, n) = run(token);
        let n = n.min(keys.end - token);
        let (at, rows_of_run) = (token - keys.start, first..first + n);
        match rows.in_place(rows_of_run.clone(), cols) {
            Some(from) => isa.dispatch(Widen { from, to: &mut room[at * cols..], cols }),
            None => rows.collect(isa, rows_of_run, cols, room, at),
        }
        token += n;
    }
    isa.dispatch(Turn { rows: &mut room[..keys.len() * cols], cols, turns, first: keys.start });
    AnyRows::F32(Rows::of_slice(room, keys.len(), cols, cols))
}

struct Widen<'a, 'b> {
    from: AnyRows<'a>,
    to: &'b mut [f32],
    cols: usize,
}

impl Kernel for Widen<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.from.pack_rows(s, self.to, self.cols);
    }
}

struct Turn<'a> {
    rows: &'a mut [f32],
    cols: usize,
    turns: &'a Turns,
    first: usize,
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, row) in self.rows.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.turns.turn(s, row, self.first + i);
        }
    }
}

impl<C: Placed> KvSource for C {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let (rows, cols) = (&self.planes().keys, self.kv_shape().head_dim);
        let run = |token| self.run(at.sequence.slot, at.kv_head, token, at.keys.end - token);
        match self.turns() {
            None => read(rows, cols, isa, &at.keys, run, room),
            Some(turns) => read_turned(rows, (cols, turns), isa, &at.keys, run, room),
        }
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let (planes, cols) = (self.planes(), self.kv_shape().value_dim);
        let run = |token| self.run(at.sequence.slot, at.kv_head, token, at.keys.end - token);
        if C::LATENT {
            read(&planes.keys, cols, isa, &at.keys, run, room)
        } else {
            read(&planes.values, cols, isa, &at.keys, run, room)
        }
    }

    fn codes(&self, at: &At<'_>) -> Option<(Rows<'_, i8>, &[f32])> {
        if self.turns().is_some() {
            return None;
        }
        let (rows, n) = (&self.planes().keys, at.keys.len());
        let run = |token| self.run(at.sequence.slot, at.kv_head, token, n);
        let (first, run) = if n == 0 { (0, 0) } else { run(at.keys.start) };
        rows.codes(first..first + run.min(n))
    }

    fn stretch(&self, at: &At<'_>) -> usize {
        let in_place = C::Keys::IN_PLACE && self.turns().is_none() || C::Values::IN_PLACE && !C::LATENT;
        if !in_place || at.keys.is_empty() {
            return at.keys.len();
        }
        let (_, n) = self.run(at.sequence.slot, at.kv_head, at.keys.start, at.keys.len());
        n.min(at.keys.len())
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        let sequence = at.sequence.slot;
        if at.keys.start >= self.tokens()[sequence] {
            return [(std::ptr::null(), 0); 2];
        }
        let (row, _) = self.run(sequence, at.kv_head, at.keys.start, 1);
        let (key, planes) = (self.planes().keys.address(row), self.planes());
        [key, if C::LATENT { key } else { planes.values.address(row) }]
    }

    fn row_bytes(&self) -> [usize; 2] {
        let (key, planes) = (self.planes().keys.row_bytes(), self.planes());
        [key, if C::LATENT { key } else { planes.values.row_bytes() }]
    }
}

/// Bytes of the rows of a token.
pub(super) fn token_bytes<C: Placed>(cache: &C) -> usize {
    cache.kv_shape().kv_heads * cache.planes().row_bytes()
}

/// Appends to each of `sequences`, or refuses and changes nothing. Values that
/// are columns of the keys have no columns of their own here.
pub(super) fn append<C: Placed, T: Element>(
    cache: &mut C,
    sequences: &[usize],
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
) -> Result<()> {
    let shape = cache.kv_shape();
    let value_dim = if C::LATENT { 0 } else { shape.value_dim };
    check_append(KvShape { value_dim, ..shape }, cache.tokens(), sequences, &k, &v)?;
    let (isa, n) = (cache.isa(), k.dim().2);
    cache.grow(sequences, n)?;
    for (i, &sequence) in sequences.iter().enumerate() {
        let before = cache.tokens()[sequence] - n;
        for head in 0..shape.kv_heads {
            let mut done = 0;
            while done < n {
                let (first, run) = cache.run(sequence, head, before + done, n - done);
                let rows = done..done + run.min(n - done);
                let [k, v] = [&k, &v].map(|x| {
                    x.index_axis(Axis(0), i).index_axis_move(Axis(0), head).slice_move(s![rows.clone(), ..])
                });
                let planes = cache.planes_mut();
                planes.keys.write(isa, first, k.reborrow().into());
                planes.values.write(isa, first, v.reborrow().into());
                done = rows.end;
            }
        }
    }
    Ok(())
}

/// Refuses sequences that are not there, and more tokens than they have room for.
pub(super) fn check_fits<C: Placed>(cache: &C, sequences: &[usize], n: usize) -> Result<()> {
    sequences.iter().try_for_each(|&sequence| check_sequence("sequences", sequence, cache.tokens()))?;
    cache.fits(sequences, n)
}

/// Refuses more tokens than a sequence has room for.
pub(super) fn check_room(sequence: usize, n: usize, free: usize) -> Result<()> {
    if n <= free {
        return Ok(());
    }
    let expected = format!("at most the {free} tokens that sequence {sequence} has room for");
    Err(Error::value("k", expected, format_args!("{n} tokens")))
}

/// Refuses tokens that do not fit the cache or that are for sequences which it
/// does not have.
pub(super) fn check_append<T>(
    shape: KvShape,
    lengths: &[usize],
    sequences: &[usize],
    k: &ArrayView4<'_, T>,
    v: &ArrayView4<'_, T>,
) -> Result<()> {
    let (kv_heads, n) = (shape.kv_heads, k.dim().2);
    for (argument, x, dim) in [("k", k, shape.head_dim), ("v", v, shape.value_dim)] {
        let want = (sequences.len(), kv_heads, n, dim);
        if x.dim() != want {
            let expected = format!("[sequences, kv_heads, tokens, dim] = {want:?}");
            return Err(Error::shape(argument, expected, x.shape()));
        }
    }
    let mut seen = vec![false; lengths.len()];
    for &sequence in sequences {
        check_sequence("sequences", sequence, lengths)?;
        if std::mem::replace(&mut seen[sequence], true) {
            return Err(Error::value("sequences", "each sequence once", format!("{sequence} twice")));
        }
    }
    Ok(())
}
