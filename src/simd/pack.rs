//! Copies of queries, keys and values in the order in which the register
//! tile reads them, widened to `f32`.

use super::amx::{BLOCK, DEPTH, PAIRS, TILE, TILE_LEN};
use super::mem::{Rows, RowsMut, prefetch_l1, prefetch_l2};
use super::storage::Storage;
use super::{Kernel, MAX_LANES, Simd};

/// Keys of a slice: what one product over values covers, and what one
/// finiteness flag stands for.
pub(crate) const SLICE: usize = 128;

/// Loads `LANES` elements of a row from `col` on; missing ones are zero.
#[inline(always)]
pub(crate) fn load<S: Simd, T: Storage>(s: S, x: &Rows<'_, T>, row: usize, col: usize) -> S::F {
    let n = (x.cols() - col).min(S::LANES);
    match x.row(row) {
        Some(row) if n == S::LANES => T::load(s, &row[col..]),
        Some(row) => T::load_tail(s, &row[col..]),
        None => {
            let mut lanes = [0.0; MAX_LANES];
            for (lane, x) in lanes.iter_mut().zip(x.elements(row, col..col + n)) {
                *lane = x.widen();
            }
            s.load(&lanes)
        }
    }
}

/// How many rows ahead of a copy the memory is prefetched.
const AHEAD: usize = 16;

/// Asks for the line of element `(row, col)`, which need not exist.
#[inline(always)]
fn prefetch<T: Copy>(x: &Rows<'_, T>, row: usize, col: usize) {
    let at = row as isize * x.row_stride() + col as isize;
    prefetch_l1(x.as_ptr().wrapping_offset(at).cast());
}

/// Rows one after the other: `[rows, cols]`, `stride` apart. What lies
/// between them is left as it is.
pub(crate) struct PackRows<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
    pub(crate) stride: usize,
}

impl<T: Storage> Kernel for PackRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (rows, cols) = (self.from.len(), self.from.cols());
        if cols == 0 {
            return;
        }
        for (i, to) in self.to.chunks_mut(self.stride).take(rows).enumerate() {
            let (row, mut col) = (self.from.row(i).unwrap_or_default(), 0);
            for (to, x) in to[..cols].chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
                // What follows these rows may be far away, and nobody prefetches it.
                if i + AHEAD < rows {
                    prefetch(&self.from, i + AHEAD, col);
                }
                s.store(to, T::load(s, x));
                col += S::LANES;
            }
            for (v, to) in to[col..cols].chunks_mut(S::LANES).enumerate() {
                if i + AHEAD < rows {
                    prefetch(&self.from, i + AHEAD, col);
                }
                s.store_tail(to, load(s, &self.from, i, col + v * S::LANES));
            }
        }
    }
}

/// Keys transposed into panels `[panels][cols][panel]`, keys in lanes; keys
/// past the last, up to a whole vector, are zero.
pub(crate) struct PackKeys<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
}

impl<T: Storage> Kernel for PackKeys<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let panel = S::LANES * S::TILE_VECTORS;
        let (keys, cols) = (self.from.len(), self.from.cols());
        for first in (0..keys).step_by(S::LANES) {
            let to = &mut self.to[first / panel * panel * cols..][..panel * cols];
            for col in (0..cols).step_by(S::LANES) {
                let mut block = [s.splat(0.0); MAX_LANES];
                if self.from.is_unit() && first + S::LANES <= keys && col + S::LANES <= cols {
                    for t in 0..S::LANES {
                        prefetch(&self.from, first + t + S::LANES, col);
                        // SAFETY: the row and its columns exist and are neighbours.
                        block[t] = unsafe { T::load_ptr(s, self.from.row_ptr(first + t).add(col)) };
                    }
                } else {
                    for t in 0..S::LANES.min(keys - first) {
                        block[t] = load(s, &self.from, first + t, col);
                    }
                }
                s.transpose(&mut block);
                let n = (cols - col).min(S::LANES);
                let to = &mut to[col * panel..(col + n) * panel];
                for (to, &x) in to.chunks_exact_mut(panel).zip(&block) {
                    s.store(&mut to[first % panel..], x);
                }
            }
        }
    }
}

/// Rows as columns: `[cols, rows]` with rows of the result `stride` apart;
/// columns past the last, up to a whole vector, are zero.
pub(crate) struct PackColumns<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
    pub(crate) stride: usize,
}

impl<T: Storage> PackColumns<'_, T> {
    /// With `AHEAD` the elements that follow in the rows are prefetched, as
    /// many as these: nobody else prefetches lines that lie a row apart.
    #[inline(always)]
    fn pack<S: Simd, const AHEAD: bool>(self, s: S) {
        let (rows, cols) = (self.from.len(), self.from.cols());
        for first in (0..rows).step_by(S::LANES) {
            for col in (0..cols).step_by(S::LANES) {
                let mut block = [s.splat(0.0); MAX_LANES];
                if self.from.is_unit() && first + S::LANES <= rows && col + S::LANES <= cols {
                    for t in 0..S::LANES {
                        // SAFETY: the row and its columns exist and are neighbours.
                        let at = unsafe { self.from.row_ptr(first + t).add(col) };
                        if AHEAD {
                            prefetch_l2(at.wrapping_add(cols).cast());
                        }
                        // SAFETY: as above.
                        block[t] = unsafe { T::load_ptr(s, at) };
                    }
                } else {
                    for t in 0..S::LANES.min(rows - first) {
                        block[t] = load(s, &self.from, first + t, col);
                    }
                }
                s.transpose(&mut block);
                let n = (cols - col).min(S::LANES);
                for (t, &x) in block[..n].iter().enumerate() {
                    s.store(&mut self.to[(col + t) * self.stride + first..], x);
                }
            }
        }
    }
}

impl<T: Storage> Kernel for PackColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.pack::<S, false>(s);
    }
}

/// [`PackColumns`] of a block of a long matrix, of which the next block is
/// prefetched.
pub(crate) struct PackBlock<'a, T>(pub(crate) PackColumns<'a, T>);

impl<T: Storage> Kernel for PackBlock<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.pack::<S, true>(s);
    }
}

/// Values in panels of columns `[panels][stride][panel]`, values as rows;
/// columns past the last, up to a whole vector, are zero. `finite` says of
/// each slice of keys whether all its values are.
pub(crate) struct PackValues<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
    /// Rows from one panel to the next.
    pub(crate) stride: usize,
    pub(crate) finite: &'a mut [u8],
}

impl<T: Storage> Kernel for PackValues<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let panel = S::LANES * S::TILE_VECTORS;
        let (keys, cols) = (self.from.len(), self.from.cols());
        for (slice, finite) in self.finite.iter_mut().enumerate() {
            // x * 0 is 0 for finite x and NaN otherwise.
            let mut zero = s.splat(0.0);
            for key in (slice * SLICE).min(keys)..((slice + 1) * SLICE).min(keys) {
                for first in (0..cols).step_by(panel) {
                    let to = &mut self.to[(first / panel * self.stride + key) * panel..][..panel];
                    let cols = first..(first + panel).min(cols);
                    for (col, to) in cols.step_by(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
                        prefetch(&self.from, key + AHEAD, col);
                        let x = load(s, &self.from, key, col);
                        zero = s.mul_add(x, s.splat(0.0), zero);
                        s.store(to, x);
                    }
                }
            }
            *finite = u8::from(s.reduce_add(zero) == 0.0);
        }
    }
}

/// `2^50`
const HUGE: f32 = 1_125_899_906_842_624.0;

/// Loads `LANES` elements of a row from `col` on and as many that lie half a
/// step further; missing ones are zero. Also says whether products of them
/// with tiles may go wrong: where one is so large, infinite or NaN that its
/// parts or its products overflow, or that subnormal parts of the other factor
/// matter, which tiles take for zero.
#[inline(always)]
fn load_pair<S: Simd, T: Storage>(s: S, x: &Rows<'_, T>, row: usize, col: usize) -> ([S::F; 2], u8) {
    let (mut pair, mut ordinary) = ([s.splat(0.0); 2], u64::MAX >> (64 - S::LANES));
    for (half, to) in pair.iter_mut().enumerate() {
        let col = col + half * PAIRS;
        if col < x.cols() {
            prefetch(x, row + AHEAD, col);
            *to = load(s, x, row, col);
            ordinary &= s.bits(s.lt(s.abs(*to), s.splat(HUGE)));
        }
    }
    (pair, u8::from(ordinary != u64::MAX >> (64 - S::LANES)))
}

/// Rows as tiles of the left operand, `[tiles][steps][parts]`, each [`TILE`]
/// rows of [`DEPTH`] columns, of which one and that half a step later are a
/// pair; columns past the last are zero.
pub(crate) struct PackLeft<'a, T> {
    pub(crate) from: Rows<'a, T>,
    /// Which row of the tiles the first one becomes, and how many rows further
    /// the next one.
    pub(crate) first: usize,
    pub(crate) step: usize,
    pub(crate) to: &'a mut [f32],
    /// Of each row of the tiles whether products with it may go wrong.
    pub(crate) huge: &'a mut [u8],
}

impl<T: Storage> Kernel for PackLeft<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (rows, steps) = (self.from.len(), self.from.cols().div_ceil(DEPTH));
        for from in 0..rows {
            let row = self.first + from * self.step;
            self.huge[row] = 0;
            // A step's pairs in vectors.
            for at in (0..steps * PAIRS).step_by(S::LANES) {
                let (step, j) = (at / PAIRS, at % PAIRS);
                let (mut rest, huge) = load_pair(s, &self.from, from, step * DEPTH + j);
                self.huge[row] |= huge;
                let tile = (row / TILE * steps + step) * T::PARTS;
                for part in 0..T::PARTS {
                    let (pairs, left) = s.pairs(rest[0], rest[1]);
                    s.store(&mut self.to[(tile + part) * TILE_LEN + row % TILE * PAIRS + j..], pairs);
                    rest = left;
                }
            }
        }
    }
}

/// Keys as tiles of the right operand, `[blocks][steps][parts][2]`, each
/// [`TILE`] keys of [`DEPTH`] columns, paired as in [`PackLeft`]; columns past
/// the last and keys past the last, up to a whole block, are zero.
pub(crate) struct PackKeyPairs<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
    /// Of each key whether products with it may go wrong.
    pub(crate) huge: &'a mut [u8],
}

impl<T: Storage> Kernel for PackKeyPairs<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (keys, steps) = (self.from.len(), self.from.cols().div_ceil(DEPTH));
        self.huge[..keys].fill(0);
        for first in (0..keys.next_multiple_of(BLOCK)).step_by(S::LANES) {
            // A step's pairs in vectors.
            for at in (0..steps * PAIRS).step_by(S::LANES) {
                let (step, j) = (at / PAIRS, at % PAIRS);
                let [mut low, mut high] = [[s.splat(0.0); MAX_LANES]; 2];
                for t in 0..S::LANES.min(keys.saturating_sub(first)) {
                    let (pair, huge) = load_pair(s, &self.from, first + t, step * DEPTH + j);
                    [low[t], high[t]] = pair;
                    self.huge[first + t] |= huge;
                }
                s.transpose(&mut low);
                s.transpose(&mut high);
                let tile = (first / BLOCK * steps + step) * T::PARTS * 2 + first % BLOCK / TILE;
                for t in 0..S::LANES {
                    let mut rest = [low[t], high[t]];
                    for part in 0..T::PARTS {
                        let (pairs, left) = s.pairs(rest[0], rest[1]);
                        let at = (tile + 2 * part) * TILE_LEN + (j + t) * TILE + first % TILE;
                        s.store(&mut self.to[at..], pairs);
                        rest = left;
                    }
                }
            }
        }
    }
}

/// Values as tiles of the right operand, `[slices][blocks][steps][parts][2]`,
/// each [`TILE`] columns of [`DEPTH`] values, where a value and the one half a
/// step later are a pair. Columns past the last, up to a whole block, and
/// values past the last, up to a whole step, are zero. So is what products with tiles
/// would not get right, and [`add_lost`] adds: see [`lost`]. `kept` says
/// of each slice of keys whether there is none of it.
pub(crate) struct PackValuePairs<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [f32],
    pub(crate) kept: &'a mut [u8],
}

/// Which elements of values tiles cannot take: what is not finite, for it
/// would show where its weight is zero because it is masked, what is so large
/// that parts or sums overflow, and what is so small that its parts or its
/// products underflow, which tiles take for zero.
#[inline(always)]
fn lost<S: Simd>(s: S, x: S::F) -> u64 {
    let size = s.abs(x);
    let ordinary = s.bits(s.lt(size, s.splat(MOST))) & !s.bits(s.lt(size, s.splat(LEAST)));
    let zero = s.bits(s.lt(size, s.splat(f32::from_bits(1))));
    !(ordinary | zero) & (u64::MAX >> (64 - S::LANES))
}

/// `2^-90`
const LEAST: f32 = 8.077_936e-28;
/// `2^100`
const MOST: f32 = 1.267_650_6e30;

impl<T: Storage> Kernel for PackValuePairs<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (values, cols) = (self.from.len(), self.from.cols());
        self.kept.fill(1);
        for first in (0..values.next_multiple_of(DEPTH)).step_by(DEPTH) {
            for col in (0..cols.next_multiple_of(BLOCK)).step_by(S::LANES) {
                let block = first / SLICE * cols.div_ceil(BLOCK) + col / BLOCK;
                let step = block * (SLICE / DEPTH) + first % SLICE / DEPTH;
                for row in 0..PAIRS {
                    let mut pair = [s.splat(0.0); 2];
                    for (half, x) in pair.iter_mut().enumerate() {
                        let value = first + half * PAIRS + row;
                        if value >= values || col >= cols {
                            continue;
                        }
                        prefetch(&self.from, value + DEPTH, col);
                        *x = load(s, &self.from, value, col);
                        let lost = lost(s, *x);
                        if lost != 0 {
                            *x = s.select(s.mask(lost), s.splat(0.0), *x);
                            self.kept[value / SLICE] = 0;
                        }
                    }
                    for part in 0..T::PARTS {
                        let (pairs, rest) = s.pairs(pair[0], pair[1]);
                        let tile = (step * T::PARTS + part) * 2 + col % BLOCK / TILE;
                        s.store(&mut self.to[tile * TILE_LEN + row * TILE + col % TILE..], pairs);
                        pair = rest;
                    }
                }
            }
        }
    }
}

/// `out += weight * row`, of the elements that [`PackValuePairs`] left out.
#[inline(always)]
pub(crate) fn add_lost<S: Simd, T: Storage>(
    s: S,
    rows: &Rows<'_, T>,
    row: usize,
    weight: f32,
    out: &mut [f32],
) {
    for col in (0..rows.cols()).step_by(S::LANES) {
        let x = load(s, rows, row, col);
        let lost = lost(s, x);
        if lost != 0 {
            let sum = s.load(&out[col..]);
            let added = s.mul_add(s.splat(weight), x, sum);
            s.store(&mut out[col..], s.select(s.mask(lost), added, sum));
        }
    }
}

/// `row * factor`, rounded to the type of an output, as its row `i`.
pub(crate) struct WriteRow<'a, 'b, T> {
    pub(crate) row: &'a [f32],
    pub(crate) factor: f32,
    pub(crate) to: &'a mut RowsMut<'b, T>,
    pub(crate) i: usize,
}

impl<T: Storage> Kernel for WriteRow<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.to.cols();
        match self.to.row(self.i) {
            Some(to) => {
                for (to, x) in to.chunks_mut(S::LANES).zip(self.row.chunks_exact(S::LANES)) {
                    T::store_tail(s, to, s.mul(s.load(x), s.splat(self.factor)));
                }
            }
            None => {
                for (j, &x) in self.row[..cols].iter().enumerate() {
                    self.to.set(self.i, j, T::narrow(x * self.factor));
                }
            }
        }
    }
}

/// `out += sum of weights[t] * row t` over the rows that are visible, summed
/// by itself first as the tiles do: where all values are finite the bits are
/// theirs.
#[inline(always)]
pub(crate) fn gather_visible<S: Simd, T: Storage>(
    s: S,
    rows: &Rows<'_, T>,
    weights: &[f32],
    visible: impl Fn(usize) -> bool,
    out: &mut [f32],
) {
    for (v, out) in out.chunks_exact_mut(S::LANES).enumerate() {
        let mut sum = s.splat(0.0);
        for (t, &weight) in weights[..rows.len()].iter().enumerate() {
            if visible(t) {
                sum = s.mul_add(s.splat(weight), load(s, rows, t, v * S::LANES), sum);
            }
        }
        s.store(out, s.add(s.load(out), sum));
    }
}
