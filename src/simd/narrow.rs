//! Products for few rows, whose other operand is read once, in its storage
//! type, where it lies.

use super::mem;
use super::storage::Storage;
use super::table::{AnyTable, RowsAhead, TableRows};
use super::{Kernel, MAX_LANES, Simd};

/// `out[r * stride + key] = queries[r] . keys[key]` for every row and key,
/// while as many rows of `ahead` are prefetched, as far as a key reaches.
///
/// `queries` is `[rows, cols]` with `cols` the keys' rounded up to vectors and
/// the rest zero.
pub(crate) struct Dots<'a, T> {
    pub(crate) rows: usize,
    pub(crate) queries: &'a [f32],
    pub(crate) keys: TableRows<'a, T>,
    pub(crate) ahead: &'a RowsAhead,
    pub(crate) out: &'a mut [f32],
    pub(crate) stride: usize,
}

impl<T: Storage> Kernel for Dots<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let cols = self.keys.cols().next_multiple_of(S::LANES);
        assert!(self.queries.len() >= self.rows * cols);
        assert!(self.keys.len() <= self.stride && self.out.len() >= self.rows * self.stride);
        let mut r = 0;
        while r < self.rows {
            // SAFETY: rows r.. exist in queries and out, by the assertions.
            unsafe {
                match self.rows - r {
                    1 => self.rows::<S, 1>(s, r, cols),
                    2 | 3 => self.rows::<S, 2>(s, r, cols),
                    _ => self.rows::<S, 4>(s, r, cols),
                }
            }
            r += match self.rows - r {
                1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
        }
    }
}

impl<T: Storage> Dots<'_, T> {
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize>(&mut self, s: S, r: usize, cols: usize) {
        // As many keys as leave room in the register file.
        // SAFETY: the caller's.
        unsafe {
            if S::LANES == 8 { self.keys::<S, R, 2>(s, r, cols) } else { self.keys::<S, R, 4>(s, r, cols) }
        }
    }

    /// Rows `r..r + R`, `K` keys at once.
    #[inline(always)]
    unsafe fn keys<S: Simd, const R: usize, const K: usize>(&mut self, s: S, r: usize, cols: usize) {
        let n = self.keys.len();
        let last = n.saturating_sub(1);
        // Sums of whole vectors come by the vector: as many keys as fill one.
        let at_once = K.max(S::LANES / R);
        let mut first = 0;
        while first < n {
            let mut acc = [s.splat(0.0); MAX_LANES];
            for group in (0..at_once).step_by(K) {
                let mut key = [std::ptr::null::<T>(); K];
                let mut ahead = [std::ptr::null::<u8>(); K];
                for t in 0..K {
                    // Keys that are not there are read as the last one.
                    let at = (first + group + t).min(last);
                    // SAFETY: the row exists.
                    key[t] = unsafe { self.keys.row_ptr(at) };
                    ahead[t] = self.ahead.row(first + group + t);
                }
                // SAFETY: queries have R more rows of `cols`; keys have their
                // own columns, of which the last vector may be partial.
                let sums = unsafe {
                    let queries = self.queries.as_ptr().add(r * cols);
                    if r == 0 {
                        let bytes = self.ahead.bytes;
                        dots::<S, T, R, K, true>(s, queries, cols, key, self.keys.cols(), ahead, bytes)
                    } else {
                        dots::<S, T, R, K, false>(s, queries, cols, key, self.keys.cols(), ahead, 0)
                    }
                };
                for (r, sums) in sums.iter().enumerate() {
                    acc[r * at_once + group..][..K].copy_from_slice(sums);
                }
            }
            let mut sums = [0.0; MAX_LANES];
            for part in (0..R * at_once).step_by(S::LANES) {
                let mut block = [s.splat(0.0); MAX_LANES];
                block[..S::LANES].copy_from_slice(&acc[part..part + S::LANES]);
                s.store(&mut sums[part..], s.reduce_add_each(&block));
            }
            let found = at_once.min(n - first);
            for i in 0..R {
                let out = &mut self.out[(r + i) * self.stride + first..];
                if found == 4 {
                    out[..4].copy_from_slice(&sums[i * at_once..i * at_once + 4]);
                } else {
                    out[..found].copy_from_slice(&sums[i * at_once..][..found]);
                }
            }
            first += at_once;
        }
    }
}

/// Unreduced dot products of `R` rows with `K` keys. The first `ahead_bytes` of
/// `ahead` are prefetched line by line in between: in a burst they would stall
/// the loads.
#[inline(always)]
unsafe fn dots<S: Simd, T: Storage, const R: usize, const K: usize, const AHEAD: bool>(
    s: S,
    queries: *const f32,
    stride: usize,
    keys: [*const T; K],
    cols: usize,
    ahead: [*const u8; K],
    ahead_bytes: usize,
) -> [[S::F; K]; R] {
    let mut acc = [[s.splat(0.0); K]; R];
    let whole = cols / S::LANES * S::LANES;
    // Vectors that share a cache line take turns.
    let turns = (64 / (S::LANES * size_of::<T>())).max(1);
    // SAFETY: the caller's.
    unsafe {
        let mut j = 0;
        let mut turn = 0;
        while j < whole {
            let mut q = [s.splat(0.0); R];
            for r in 0..R {
                q[r] = s.load_ptr(queries.add(r * stride + j));
            }
            for t in 0..K {
                let k = T::load_ptr(s, keys[t].add(j));
                for r in 0..R {
                    acc[r][t] = s.mul_add(q[r], k, acc[r][t]);
                }
                if AHEAD && j * size_of::<T>() < ahead_bytes && (turns == 1 || t % turns == turn) {
                    mem::prefetch_l2(ahead[t].wrapping_add(j * size_of::<T>()));
                }
            }
            turn = (turn + 1) % turns;
            j += S::LANES;
        }
        if whole < cols {
            for t in 0..K {
                let k = T::load_tail(s, std::slice::from_raw_parts(keys[t].add(whole), cols - whole));
                for r in 0..R {
                    acc[r][t] = s.mul_add(s.load_ptr(queries.add(r * stride + whole)), k, acc[r][t]);
                }
            }
        }
    }
    acc
}

/// `out[r] += sum over keys of weights[r * stride + key] * values[key]`, while
/// as many rows of `ahead` are prefetched, as far as a value reaches. The sum is
/// taken by itself first.
///
/// `out` is `[rows, cols]` with `cols` the values' rounded up to vectors.
pub(crate) struct Gather<'a, T> {
    pub(crate) rows: usize,
    pub(crate) weights: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) values: TableRows<'a, T>,
    pub(crate) ahead: &'a RowsAhead,
    pub(crate) out: &'a mut [f32],
}

impl<T: Storage> Kernel for Gather<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let cols = self.values.cols().next_multiple_of(S::LANES);
        assert!(self.out.len() >= self.rows * cols);
        assert!(self.values.len() <= self.stride && self.weights.len() >= self.rows * self.stride);
        let mut r = 0;
        while r < self.rows {
            // SAFETY: rows r.. exist in weights and out, by the assertions.
            unsafe {
                r += match self.rows - r {
                    1 => self.rows::<S, 1>(s, r, cols),
                    2 | 3 => self.rows::<S, 2>(s, r, cols),
                    4..8 => self.rows::<S, 4>(s, r, cols),
                    // A register file of 16 has no room for more.
                    _ if S::LANES == 8 => self.rows::<S, 4>(s, r, cols),
                    _ => self.rows::<S, 8>(s, r, cols),
                };
            }
        }
    }
}

impl<T: Storage> Gather<'_, T> {
    /// Rows `r..r + R`; returns how many they are.
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize>(&mut self, s: S, r: usize, cols: usize) -> usize {
        // As many vectors as leave room in the register file. Many rows share what
        // it costs to load and widen a value.
        let wide = if S::LANES == 8 || R == 8 { 2 } else { 4 };
        let mut col = 0;
        while col < cols {
            let ahead = r == 0 && col * size_of::<T>() < self.ahead.bytes;
            // SAFETY: the caller's; the columns exist.
            unsafe {
                if col + wide * S::LANES > self.values.cols() {
                    self.cols::<S, R, 1>(s, r, cols, col, ahead);
                    col += S::LANES;
                } else if wide == 2 {
                    self.cols::<S, R, 2>(s, r, cols, col, ahead);
                    col += wide * S::LANES;
                } else {
                    self.cols::<S, R, 4>(s, r, cols, col, ahead);
                    col += wide * S::LANES;
                }
            }
        }
        R
    }

    /// Rows `r..r + R`, `C` vectors of columns from `col` on.
    #[inline(always)]
    unsafe fn cols<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        r: usize,
        cols: usize,
        col: usize,
        ahead: bool,
    ) {
        let mut acc = [[s.splat(0.0); C]; R];
        let left = self.values.cols() - col;
        // SAFETY: the caller's.
        unsafe {
            let weights = self.weights.as_ptr().add(r * self.stride);
            for key in 0..self.values.len() {
                if ahead {
                    let line = self.ahead.row(key).wrapping_add(col * size_of::<T>());
                    for c in (0..C * S::LANES * size_of::<T>()).step_by(64) {
                        mem::prefetch_l2(line.wrapping_add(c));
                    }
                }
                let row = self.values.row_ptr(key).add(col);
                let mut v = [s.splat(0.0); C];
                for c in 0..C {
                    v[c] = if C == 1 && left < S::LANES {
                        T::load_tail(s, std::slice::from_raw_parts(row, left))
                    } else {
                        T::load_ptr(s, row.add(c * S::LANES))
                    };
                }
                for i in 0..R {
                    let w = s.splat(*weights.add(i * self.stride + key));
                    for c in 0..C {
                        acc[i][c] = s.mul_add(w, v[c], acc[i][c]);
                    }
                }
            }
            for i in 0..R {
                for c in 0..C {
                    let out = self.out.as_mut_ptr().add((r + i) * cols + col + c * S::LANES);
                    s.store_ptr(out, s.add(s.load_ptr(out), acc[i][c]));
                }
            }
        }
    }
}

/// `out += sum of weights[t] * row t` over the rows `t` of which bit `t` is
/// set, summed by itself first as [`Gather`] does: where all values are finite
/// the bits are its.
pub(crate) struct GatherVisible<'a, T> {
    pub(crate) weights: &'a [f32],
    pub(crate) visible: u64,
    pub(crate) values: TableRows<'a, T>,
    pub(crate) out: &'a mut [f32],
}

impl<T: Storage> Kernel for GatherVisible<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let weights = &self.weights[..self.values.len()];
        for col in (0..self.values.cols()).step_by(S::LANES) {
            let mut sum = s.splat(0.0);
            for (t, &weight) in weights.iter().enumerate() {
                if self.visible >> t & 1 == 1 {
                    sum = s.mul_add(s.splat(weight), T::load_tail(s, &self.values.row(t)[col..]), sum);
                }
            }
            let out = &mut self.out[col..];
            s.store(out, s.add(s.load(out), sum));
        }
    }
}

/// Evaluates an expression for whichever type the rows are.
macro_rules! each_type {
    ($rows:expr, $x:ident => $body:expr) => {
        match $rows {
            AnyTable::F32($x) => $body,
            AnyTable::F16($x) => $body,
            AnyTable::Bf16($x) => $body,
        }
    };
}

impl AnyTable<'_> {
    /// [`Dots`] of `rows` queries with these keys, which lie `stride` apart in
    /// `out`.
    #[inline(always)]
    pub(crate) fn dots<S: Simd>(
        self,
        s: S,
        (rows, queries): (usize, &[f32]),
        ahead: &RowsAhead,
        out: &mut [f32],
        stride: usize,
    ) {
        each_type!(self, keys => s.vectorize(Dots { rows, queries, keys, ahead, out, stride }));
    }

    /// [`Gather`] of these values into `rows` rows of `out`, with weights
    /// `stride` apart.
    #[inline(always)]
    pub(crate) fn gather<S: Simd>(
        self,
        s: S,
        (rows, weights): (usize, &[f32]),
        ahead: &RowsAhead,
        out: &mut [f32],
        stride: usize,
    ) {
        each_type!(self, values => s.vectorize(Gather { rows, weights, stride, values, ahead, out }));
    }

    /// [`GatherVisible`] of these values.
    #[inline(always)]
    pub(crate) fn gather_visible<S: Simd>(self, s: S, weights: &[f32], visible: u64, out: &mut [f32]) {
        each_type!(self, values => s.vectorize(GatherVisible { weights, visible, values, out }));
    }
}
