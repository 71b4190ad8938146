//! Rows of a cache: how they are stored, where the tokens of a sequence lie
//! among them, and how both together are read and written.

use std::ops::Range;

use ndarray::{ArrayView4, Axis, s};

use super::{KvShape, check_sequence};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::keys::source::{At, KvSource};
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Aligned, Rows, cast_mut};
use crate::simd::quant::StoreRows;

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
    fn rows(&self) -> Rows<'_, F> {
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
    /// How rows are stored.
    type Rows: RowStore;

    /// Whether values are the first columns of the keys.
    const LATENT: bool = false;

    /// What attention sees of a token.
    fn kv_shape(&self) -> KvShape;

    /// Tokens of each sequence.
    fn tokens(&self) -> &[usize];

    /// The instruction set that rows are written with.
    fn isa(&self) -> Isa;

    /// Rows of keys and rows of values.
    fn planes(&self) -> &[Self::Rows; 2];

    /// The same to write.
    fn planes_mut(&mut self) -> &mut [Self::Rows; 2];

    /// The row in which a token lies, and how many tokens from it on lie one
    /// after the other: as many as there are, or at least `enough`.
    fn run(&self, sequence: usize, head: usize, token: usize, enough: usize) -> (usize, usize);

    /// Gives rows to `n` more tokens of each of these sequences, which are
    /// there and named once; or refuses and changes nothing.
    fn grow(&mut self, sequences: &[usize], n: usize) -> Result<()>;

    /// Index of the plane that values are read from.
    fn value_plane(&self) -> usize {
        usize::from(!Self::LATENT)
    }
}

/// Some rows of one plane: where they lie if they follow each other, else
/// copied run by run.
fn read<'r, C: Placed>(
    cache: &'r C,
    plane: usize,
    cols: usize,
    isa: Isa,
    at: &At<'_>,
    room: &'r mut [f32],
) -> AnyRows<'r> {
    let (rows, keys) = (&cache.planes()[plane], at.keys.clone());
    let run = |token| cache.run(at.sequence.slot, at.kv_head, token, keys.end - token);
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
    C::Rows::collected(room, keys.len(), cols)
}

impl<C: Placed> KvSource for C {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        read(self, 0, self.kv_shape().head_dim, isa, at, room)
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        read(self, self.value_plane(), self.kv_shape().value_dim, isa, at, room)
    }

    fn stretch(&self, at: &At<'_>) -> usize {
        if !C::Rows::IN_PLACE || at.keys.is_empty() {
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
        [0, self.value_plane()].map(|plane| self.planes()[plane].address(row))
    }

    fn row_bytes(&self) -> [usize; 2] {
        [0, self.value_plane()].map(|plane| self.planes()[plane].row_bytes())
    }
}

/// Bytes of the rows of a token.
pub(super) fn token_bytes<C: Placed>(cache: &C) -> usize {
    cache.kv_shape().kv_heads * cache.planes().iter().map(RowStore::row_bytes).sum::<usize>()
}

/// Bytes of all rows.
pub(super) fn bytes<C: Placed>(cache: &C) -> usize {
    cache.planes().iter().map(RowStore::bytes).sum()
}

/// So many rows of keys and of values; `argument` is what asked for them.
pub(super) fn planes<R: RowStore>(
    argument: &'static str,
    rows: Option<usize>,
    cols: [usize; 2],
) -> Result<[R; 2]> {
    let plane = |cols| rows.and_then(|rows| R::zeroed(rows, cols));
    match cols.map(plane) {
        [Some(keys), Some(values)] => Ok([keys, values]),
        _ => Err(Error::value(argument, "a number for which there is memory", "too much")),
    }
}

/// Appends to each of `sequences`, or refuses and changes nothing. Values that
/// are columns of the keys have no columns of their own here.
pub(super) fn append<C: Placed, T: Element>(
    cache: &mut C,
    sequences: &[usize],
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
) -> Result<()> {
    let KvShape { kv_heads, head_dim, value_dim } = cache.kv_shape();
    let n = k.dim().2;
    let value_dim = if C::LATENT { 0 } else { value_dim };
    for (argument, x, dim) in [("k", &k, head_dim), ("v", &v, value_dim)] {
        let want = (sequences.len(), kv_heads, n, dim);
        if x.dim() != want {
            let expected = format!("[sequences, kv_heads, tokens, dim] = {want:?}");
            return Err(Error::shape(argument, expected, x.shape()));
        }
    }
    let mut seen = vec![false; cache.tokens().len()];
    for &sequence in sequences {
        check_sequence("sequences", sequence, cache.tokens())?;
        if std::mem::replace(&mut seen[sequence], true) {
            return Err(Error::value("sequences", "each sequence once", format!("{sequence} twice")));
        }
    }
    let isa = cache.isa();
    cache.grow(sequences, n)?;
    for (i, &sequence) in sequences.iter().enumerate() {
        let before = cache.tokens()[sequence] - n;
        for head in 0..kv_heads {
            let mut done = 0;
            while done < n {
                let (first, run) = cache.run(sequence, head, before + done, n - done);
                let rows = done..done + run.min(n - done);
                for (plane, x) in cache.planes_mut().iter_mut().zip([&k, &v]) {
                    let x = x.index_axis(Axis(0), i).index_axis_move(Axis(0), head);
                    plane.write(isa, first, x.slice(s![rows.clone(), ..]).reborrow().into());
                }
                done = rows.end;
            }
        }
    }
    Ok(())
}
