//! Memory that several threads share safely: strided rows to read, pieces of
//! an output that can be taken once, aligned scratch.

use std::alloc::{Layout, alloc_zeroed};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::{ArrayView2, ArrayView4, ArrayViewMut4};

/// Asks for the cache line of an address, valid or not, to be brought into
/// the first-level cache if `NEAR`, else into the second-level one.
#[inline(always)]
fn prefetch<const NEAR: bool>(x: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if NEAR { _mm_prefetch::<_MM_HINT_T0>(x.cast()) } else { _mm_prefetch::<_MM_HINT_T1>(x.cast()) }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        if NEAR {
            std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) x, options(nostack, readonly, preserves_flags));
        } else {
            std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) x, options(nostack, readonly, preserves_flags));
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = x;
}

/// Asks for a line to be brought into the first-level cache.
#[inline(always)]
pub(crate) fn prefetch_l1(x: *const u8) {
    prefetch::<true>(x);
}

/// Asks for a line to be brought into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_l2(x: *const u8) {
    prefetch::<false>(x);
}

/// Rows of bytes that will be read or written soon: addresses for
/// [`prefetch_l2`], valid or not.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    base: *const u8,
    rows: usize,
    bytes: usize,
    stride: isize,
}

// SAFETY: nothing is read or written through it.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// Of nothing.
    pub(crate) const NONE: Self = Self { base: std::ptr::null(), rows: 0, bytes: 0, stride: 0 };

    /// Lines of a row.
    pub(crate) fn lines(&self) -> usize {
        if self.rows == 0 { 0 } else { self.bytes.div_ceil(LINE) }
    }

    /// Prefetches all of its lines: for few.
    #[inline(always)]
    pub(crate) fn prefetch(&self) {
        for row in 0..self.rows {
            let row = self.base.wrapping_offset(row as isize * self.stride);
            (0..self.bytes).step_by(LINE).for_each(|byte| prefetch_l2(row.wrapping_add(byte)));
        }
    }
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Concurrent streams that a piece of memory is read or prefetched in: requests all
/// over several pages are answered faster than those along one.
pub(crate) const CONCURRENT_STREAMS: usize = 8;

/// The most streams of an [`Ahead`].
pub(crate) const STREAMS: usize = 13;

/// Streams whose cache lines are prefetched one by one between other work: in
/// a burst they would stall the loads.
#[derive(Debug)]
pub(crate) struct Ahead {
    streams: [Stream; STREAMS],
    stream: usize,
    row: usize,
    byte: usize,
}

impl Ahead {
    /// Of nothing.
    pub(crate) fn nothing() -> Self {
        Self { streams: [Stream::NONE; STREAMS], stream: STREAMS, row: 0, byte: 0 }
    }

    pub(crate) fn new(streams: [Stream; STREAMS]) -> Self {
        Self { streams, stream: 0, row: 0, byte: 0 }
    }

    /// Prefetches the next few lines, one of each row of a stream in turn.
    #[inline(always)]
    pub(crate) fn prefetch(&mut self, lines: usize) {
        for _ in 0..lines {
            while self.stream < STREAMS {
                let x = &self.streams[self.stream];
                if self.row == x.rows {
                    (self.row, self.byte) = (0, self.byte + LINE);
                }
                if x.rows > 0 && self.byte < x.bytes {
                    prefetch_l2(x.base.wrapping_offset(self.row as isize * x.stride).wrapping_add(self.byte));
                    self.row += 1;
                    break;
                }
                (self.stream, self.row, self.byte) = (self.stream + 1, 0, 0);
            }
        }
    }

    /// Prefetches the next few lines in the order of [`take`](Self::take).
    #[inline(always)]
    pub(crate) fn prefetch_along(&mut self, lines: usize) {
        for _ in 0..lines {
            let line = self.take(1);
            if !line.is_null() {
                prefetch_l2(line);
            }
        }
    }

    /// Prefetches all that are left: where there is little else to do meanwhile.
    #[inline(always)]
    pub(crate) fn prefetch_rest(&mut self) {
        while self.stream < STREAMS {
            self.prefetch_along(1);
        }
    }

    /// The address of the next few lines, up to `lines`, one after the other;
    /// null where there are none left.
    #[inline(always)]
    pub(crate) fn take(&mut self, lines: usize) -> *const u8 {
        while self.stream < STREAMS {
            let x = &self.streams[self.stream];
            if self.row >= x.rows || x.bytes == 0 {
                (self.stream, self.row, self.byte) = (self.stream + 1, 0, 0);
                continue;
            }
            let line = x.base.wrapping_offset(self.row as isize * x.stride).wrapping_add(self.byte);
            if x.stride == x.bytes as isize {
                // Rows follow each other: lines run on.
                self.byte += LINE * lines;
                self.row += self.byte / x.bytes;
                self.byte %= x.bytes;
            } else {
                self.byte += LINE * lines;
                if self.byte >= x.bytes {
                    (self.row, self.byte) = (self.row + 1, 0);
                }
            }
            return line;
        }
        std::ptr::null()
    }
}

/// A matrix to read, of any strides.
#[derive(Debug)]
pub struct Rows<'a, T> {
    base: *const T,
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
    owner: PhantomData<&'a [T]>,
}

impl<T> Clone for Rows<'_, T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Rows<'_, T> {}

// SAFETY: it is a shared view; nothing is written through it.
unsafe impl<T: Sync> Send for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Rows<'_, T> {}

impl<'a, T> From<ArrayView2<'a, T>> for Rows<'a, T> {
    #[inline]
    fn from(view: ArrayView2<'a, T>) -> Self {
        let (rows, cols) = view.dim();
        let strides = view.strides();
        Self {
            base: view.as_ptr(),
            rows,
            cols,
            row_stride: strides[0],
            col_stride: strides[1],
            owner: PhantomData,
        }
    }
}

impl<'a, T: Copy> Rows<'a, T> {
    /// `rows` rows of `cols` elements, each `stride` after the one before.
    #[inline(always)]
    pub(crate) fn of_slice(x: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || spans(rows, stride, cols) <= x.len());
        Self { base: x.as_ptr(), rows, cols, row_stride: stride as isize, col_stride: 1, owner: PhantomData }
    }

    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    pub(crate) fn row_stride(&self) -> isize {
        self.row_stride
    }

    /// Whether the elements of a row are neighbours.
    #[inline(always)]
    pub(crate) fn is_unit(&self) -> bool {
        self.col_stride == 1 || self.cols <= 1
    }

    /// All elements, if they lie one row after the other.
    #[inline(always)]
    pub(crate) fn as_slice(&self) -> Option<&'a [T]> {
        let dense = self.is_unit() && (self.rows <= 1 || self.row_stride == self.cols as isize);
        // SAFETY: the elements exist and are neighbours, none where there are no rows or columns.
        dense.then(|| unsafe { std::slice::from_raw_parts(self.base, self.rows * self.cols) })
    }

    /// Where they lie, if their elements are neighbours.
    pub(crate) fn stream(&self) -> Stream {
        let (bytes, stride) = (self.cols * size_of::<T>(), self.row_stride * size_of::<T>() as isize);
        let rows = if self.is_unit() { self.rows } else { 0 };
        Stream { base: self.base.cast(), rows, bytes, stride }
    }

    /// The address of the first element. Rows and columns are `row_stride`
    /// and one element apart where `is_unit`.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *const T {
        self.base
    }

    /// The transpose.
    #[inline(always)]
    pub(crate) fn transposed(&self) -> Self {
        let Self { rows, cols, row_stride, col_stride, .. } = *self;
        Self { rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride, ..*self }
    }

    /// A part of the matrix.
    #[inline(always)]
    pub(crate) fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        // An empty part may start past the end: keep the base then.
        let base = if rows.is_empty() || cols.is_empty() {
            self.base
        } else {
            // SAFETY: the element (rows.start, cols.start) exists.
            unsafe {
                self.base
                    .offset(rows.start as isize * self.row_stride + cols.start as isize * self.col_stride)
            }
        };
        Self { base, rows: rows.len(), cols: cols.len(), ..*self }
    }

    /// Row `i`, if its elements are neighbours.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> Option<&'a [T]> {
        assert!(i < self.rows);
        if !self.is_unit() {
            return None;
        }
        // SAFETY: row i exists and its elements are neighbours.
        Some(unsafe { std::slice::from_raw_parts(self.base.offset(i as isize * self.row_stride), self.cols) })
    }

    /// Bytes of a row's elements.
    #[inline(always)]
    pub(crate) fn row_bytes(&self) -> usize {
        self.cols() * size_of::<T>()
    }

    /// The address of row `i`, valid or not, and from it to the next one.
    #[inline(always)]
    pub(crate) fn address(&self, i: usize) -> (*const u8, isize) {
        let stride = self.row_stride().wrapping_mul(size_of::<T>() as isize);
        (self.as_ptr().cast::<u8>().wrapping_offset((i as isize).wrapping_mul(stride)), stride)
    }

    /// The address of row `i`.
    ///
    /// # Safety
    /// The row must exist.
    #[inline(always)]
    pub(crate) unsafe fn row_ptr(&self, i: usize) -> *const T {
        debug_assert!(i < self.rows);
        // SAFETY: the caller's.
        unsafe { self.base.offset(i as isize * self.row_stride) }
    }

    /// Some elements of row `i`.
    #[inline(always)]
    pub(crate) fn elements(&self, i: usize, cols: Range<usize>) -> impl Iterator<Item = T> + use<'a, T> {
        assert!(i < self.rows && cols.start <= cols.end && cols.end <= self.cols);
        let Self { base, row_stride, col_stride, .. } = *self;
        // SAFETY: the elements exist.
        cols.map(move |j| unsafe { *base.offset(i as isize * row_stride + j as isize * col_stride) })
    }

    /// Element `(i, j)`.
    #[inline(always)]
    pub(crate) fn at(&self, i: usize, j: usize) -> T {
        assert!(i < self.rows && j < self.cols);
        // SAFETY: the element exists.
        unsafe { *self.base.offset(i as isize * self.row_stride + j as isize * self.col_stride) }
    }
}

/// Elements from the first of `rows` rows to the end of the last one, of
/// `cols`, each `stride` after the one before; the most there can be if that
/// cannot be counted.
#[inline(always)]
pub(super) fn spans(rows: usize, stride: usize, cols: usize) -> usize {
    (rows - 1).saturating_mul(stride).saturating_add(cols)
}

/// An array `[batch, heads, len, dim]` to read, of any strides.
#[derive(Debug)]
pub struct Heads<'a, T> {
    base: *const T,
    dim: [usize; 4],
    strides: [isize; 4],
    owner: PhantomData<&'a [T]>,
}

impl<T> Clone for Heads<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Heads<'_, T> {}

// SAFETY: it is a shared view; nothing is written through it.
unsafe impl<T: Sync> Send for Heads<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Heads<'_, T> {}

impl<'a, T: Copy> Heads<'a, T> {
    pub(crate) fn new(view: ArrayView4<'a, T>) -> Self {
        let ((b, h, n, d), strides) = (view.dim(), view.strides());
        let strides = [strides[0], strides[1], strides[2], strides[3]];
        Self { base: view.as_ptr(), dim: [b, h, n, d], strides, owner: PhantomData }
    }

    pub(crate) fn heads(&self) -> usize {
        self.dim[1]
    }

    pub(crate) fn dim(&self) -> (usize, usize, usize, usize) {
        self.dim.into()
    }

    /// The same with rows of no elements.
    pub(crate) fn without_columns(&self) -> Self {
        let [b, h, n, _] = self.dim;
        Self { dim: [b, h, n, 0], ..*self }
    }

    /// Some rows of one head.
    #[inline]
    pub(crate) fn rows(&self, batch: usize, head: usize, rows: &Range<usize>) -> Rows<'a, T> {
        let ([b, h, n, d], strides) = (self.dim, self.strides);
        assert!(batch < b && head < h && rows.start <= rows.end && rows.end <= n);
        let offset =
            batch as isize * strides[0] + head as isize * strides[1] + rows.start as isize * strides[2];
        let base = if rows.is_empty() || d == 0 {
            self.base
        } else {
            // SAFETY: the first element of the first row exists.
            unsafe { self.base.offset(offset) }
        };
        let (row_stride, col_stride) = (strides[2], strides[3]);
        Rows { base, rows: rows.len(), cols: d, row_stride, col_stride, owner: PhantomData }
    }
}

/// One bit a piece: set once the piece has been handed out.
#[derive(Debug)]
struct Claims<'a>(&'a [AtomicU64]);

impl<'a> Claims<'a> {
    fn new(words: &'a mut [u64], bits: usize) -> Self {
        let words = &mut words[..bits.div_ceil(64)];
        words.fill(0);
        // SAFETY: AtomicU64 has the layout of u64, and the borrow is exclusive.
        Self(unsafe { std::slice::from_raw_parts(words.as_mut_ptr().cast(), words.len()) })
    }

    /// Claims every bit of the range; panics if one was claimed before.
    fn take(&self, bits: Range<usize>) {
        let mut at = bits.start;
        while at < bits.end {
            let end = bits.end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
            let before = self.0[at / 64].fetch_or(mask, Ordering::Relaxed);
            assert!(before & mask == 0, "a piece of memory was claimed twice");
            at = end;
        }
    }
}

/// Words that [`Parts`] and [`OutRows`] need to keep count of `pieces`.
pub(crate) const fn claim_words(pieces: usize) -> usize {
    pieces.div_ceil(64)
}

/// A buffer cut into pieces of equal length, each to be taken by one thread.
#[derive(Debug)]
pub(crate) struct Parts<'a, T> {
    base: *mut T,
    len: usize,
    piece: usize,
    claims: Claims<'a>,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: each piece is handed out once.
unsafe impl<T: Send> Sync for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    /// Cuts `x` into pieces of `piece` elements, the last perhaps shorter.
    pub(crate) fn new(x: &'a mut [T], piece: usize, claims: &'a mut [u64]) -> Self {
        let piece = piece.max(1);
        let claims = Claims::new(claims, x.len().div_ceil(piece));
        Self { base: x.as_mut_ptr(), len: x.len(), piece, claims, owner: PhantomData }
    }

    /// Where piece `i` lies, if there is one, as [`CONCURRENT_STREAMS`] rows.
    pub(crate) fn stream(&self, i: usize) -> Stream {
        let start = (i * self.piece).min(self.len);
        let bytes = self.piece.min(self.len - start) * size_of::<T>();
        let base = self.base.wrapping_add(start).cast_const().cast();
        let bytes = bytes.div_ceil(CONCURRENT_STREAMS);
        Stream { base, rows: CONCURRENT_STREAMS, bytes, stride: bytes as isize }
    }

    /// Piece `i`. Panics if it was taken before.
    pub(crate) fn take(&self, i: usize) -> &'a mut [T] {
        self.take_run(i..i + 1)
    }

    /// Some pieces that follow each other. Panics if one was taken before.
    pub(crate) fn take_run(&self, pieces: Range<usize>) -> &'a mut [T] {
        let start = (pieces.start * self.piece).min(self.len);
        let end = (pieces.end * self.piece).min(self.len);
        if start < end {
            self.claims.take(pieces.start..end.div_ceil(self.piece));
        }
        // SAFETY: within the buffer, and claimed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), end - start) }
    }
}

/// An output `[batch, heads, len, dim]` whose rows, or blocks of columns of
/// rows, are each taken by one thread.
#[derive(Debug)]
pub struct OutRows<'a, T> {
    base: *mut T,
    dim: (usize, usize, usize, usize),
    strides: [isize; 4],
    /// Columns of a block.
    width: usize,
    claims: Claims<'a>,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: each row is handed out once.
unsafe impl<T: Send> Sync for OutRows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for OutRows<'_, T> {}

impl<'a, T> OutRows<'a, T> {
    pub(crate) fn new(out: ArrayViewMut4<'a, T>, claims: &'a mut [u64]) -> Self {
        let width = out.dim().3;
        Self::in_blocks(out, width, claims)
    }

    /// Rows of scratch that lie one after the other.
    pub(crate) fn of_slice(x: &'a mut [T], dim: (usize, usize, usize, usize), claims: &'a mut [u64]) -> Self {
        let (batch, heads, len, width) = dim;
        let rows = batch.checked_mul(heads).and_then(|n| n.checked_mul(len));
        assert!(rows.is_some_and(|rows| rows.checked_mul(width) == Some(x.len())));
        let strides = [heads * len * width, len * width, width, 1].map(|stride| stride as isize);
        let claims = Claims::new(claims, batch * heads * len);
        Self { base: x.as_mut_ptr(), dim, strides, width: width.max(1), claims, owner: PhantomData }
    }

    /// The same in blocks of `width` columns, the last perhaps narrower: each
    /// row has as many pieces as there are blocks.
    pub(crate) fn in_blocks(mut out: ArrayViewMut4<'a, T>, width: usize, claims: &'a mut [u64]) -> Self {
        let dim = out.dim();
        let width = width.max(1);
        let strides = [out.strides()[0], out.strides()[1], out.strides()[2], out.strides()[3]];
        let pieces = [dim.0, dim.1, dim.2, dim.3.div_ceil(width).max(1)];
        let pieces = pieces.iter().fold(1usize, |all, &n| all.saturating_mul(n));
        let claims = Claims::new(claims, pieces);
        Self { base: out.as_mut_ptr(), dim, strides, width, claims, owner: PhantomData }
    }

    /// Where rows of one head lie, if their elements are neighbours.
    pub(crate) fn stream(&self, batch: usize, head: usize, rows: Range<usize>) -> Stream {
        let at = [batch, head, rows.start];
        let first = at.iter().zip(&self.strides).map(|(&i, stride)| i as isize * stride).sum();
        let [.., row_stride, col_stride] = self.strides;
        Stream {
            base: self.base.cast_const().wrapping_offset(first).cast(),
            rows: if col_stride == 1 { rows.len() } else { 0 },
            bytes: self.dim.3 * size_of::<T>(),
            stride: row_stride * size_of::<T>() as isize,
        }
    }

    /// The rows of one head. Panics if one was taken before.
    pub(crate) fn take(&self, batch: usize, head: usize, rows: Range<usize>) -> RowsMut<'a, T> {
        self.take_block(batch, head, rows, 0)
    }

    /// Block `block` of the rows of one head. Panics if one was taken before.
    pub(crate) fn take_block(
        &self,
        batch: usize,
        head: usize,
        rows: Range<usize>,
        block: usize,
    ) -> RowsMut<'a, T> {
        let (b, h, n, d) = self.dim;
        assert!(batch < b && head < h && rows.start <= rows.end && rows.end <= n);
        let col = block * self.width;
        assert!(block == 0 || col < d);
        let cols = (d - col).min(self.width);
        let first = ((block * b + batch) * h + head) * n;
        self.claims.take(first + rows.start..first + rows.end);
        let [sb, sh, sn, sd] = self.strides;
        let base = if rows.is_empty() || cols == 0 {
            self.base
        } else {
            // SAFETY: the first element of the block's first row exists.
            unsafe {
                self.base.offset(
                    batch as isize * sb + head as isize * sh + rows.start as isize * sn + col as isize * sd,
                )
            }
        };
        RowsMut { base, rows: rows.len(), cols, row_stride: sn, col_stride: sd, owner: PhantomData }
    }
}

/// Rows of an output that one thread owns.
#[derive(Debug)]
pub struct RowsMut<'a, T> {
    base: *mut T,
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
    owner: PhantomData<&'a mut [T]>,
}

impl<T> RowsMut<'_, T> {
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.rows
    }

    /// Where some of the rows lie, if their elements are neighbours.
    pub(crate) fn stream(&self, rows: Range<usize>) -> Stream {
        let (bytes, stride) = (self.cols * size_of::<T>(), self.row_stride * size_of::<T>() as isize);
        let base = self.base.cast_const().cast::<u8>().wrapping_offset(rows.start as isize * stride);
        let rows = if self.col_stride == 1 { rows.len() } else { 0 };
        Stream { base, rows, bytes, stride }
    }

    #[inline(always)]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`, if its elements are neighbours.
    #[inline(always)]
    pub(crate) fn row(&mut self, i: usize) -> Option<&mut [T]> {
        assert!(i < self.rows);
        if self.col_stride != 1 && self.cols > 1 {
            return None;
        }
        // SAFETY: the row exists, its elements are neighbours, and it is ours.
        Some(unsafe {
            std::slice::from_raw_parts_mut(self.base.offset(i as isize * self.row_stride), self.cols)
        })
    }

    /// Element `(i, j)`.
    #[inline(always)]
    pub(crate) fn at(&self, i: usize, j: usize) -> T
    where
        T: Copy,
    {
        assert!(i < self.rows && j < self.cols);
        // SAFETY: the element exists and is ours.
        unsafe { *self.base.offset(i as isize * self.row_stride + j as isize * self.col_stride) }
    }

    /// Writes element `(i, j)`.
    #[inline(always)]
    pub(crate) fn set(&mut self, i: usize, j: usize, x: T) {
        assert!(i < self.rows && j < self.cols);
        // SAFETY: the element exists and is ours.
        unsafe { *self.base.offset(i as isize * self.row_stride + j as isize * self.col_stride) = x }
    }
}

#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
struct Line([u64; 8]);

/// Types that any bit pattern is a value of.
pub trait Plain: Copy + Send + Sync + std::fmt::Debug + sealed::Sealed + 'static {}
mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for u64 {}
    impl Sealed for u32 {}
    impl Sealed for u8 {}
    impl Sealed for i8 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for crate::simd::amx::TileOp {}
}
impl Plain for f32 {}
impl Plain for f64 {}
impl Plain for u64 {}
impl Plain for u32 {}
impl Plain for u8 {}
impl Plain for i8 {}
impl Plain for half::f16 {}
impl Plain for half::bf16 {}
impl Plain for crate::simd::amx::TileOp {}

/// Zeroed memory aligned to cache lines.
#[derive(Debug, Default, Clone)]
pub(crate) struct Buffer(Vec<Line>);

impl Buffer {
    /// Bytes that it holds.
    pub(crate) fn len(&self) -> usize {
        self.0.len() * size_of::<Line>()
    }

    /// Makes it hold at least `bytes`; says whether memory has room for them.
    /// If not it holds nothing.
    pub(crate) fn grow(&mut self, bytes: usize) -> bool {
        let lines = bytes.div_ceil(size_of::<Line>());
        if self.0.len() < lines {
            // The old contents need not survive.
            self.0 = Vec::new();
            let Ok(layout) = Layout::array::<Line>(lines) else { return false };
            // Zero without being touched, in one allocation that may fail.
            // SAFETY: the layout has a size, for there are fewer lines now.
            let memory = unsafe { alloc_zeroed(layout) }.cast::<Line>();
            if memory.is_null() {
                return false;
            }
            // SAFETY: allocated with the layout of as many lines, and zeros are
            // lines.
            self.0 = unsafe { Vec::from_raw_parts(memory, lines, lines) };
        }
        true
    }

    /// Makes all of it this word.
    pub(crate) fn fill(&mut self, word: u64) {
        self.0.fill(Line([word; 8]));
    }

    /// The memory, to be cut up.
    pub(crate) fn arena(&mut self) -> Arena<'_> {
        Arena(&mut self.0)
    }
}

/// The same memory as numbers of another type, of at most four bytes.
pub(crate) fn cast_mut<T: Plain>(x: &mut [f32]) -> &mut [T] {
    const { assert!(size_of::<f32>().is_multiple_of(size_of::<T>()) && align_of::<T>() <= align_of::<f32>()) };
    let len = size_of_val(x) / size_of::<T>();
    // SAFETY: the memory holds len elements and is aligned for T, every bit
    // pattern is a T and an f32, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(x.as_mut_ptr().cast(), len) }
}

impl<'a> Rows<'a, i8> {
    /// Rows of bytes as rows of words of four, if they lie so.
    pub(crate) fn words(&self) -> Option<Rows<'a, f32>> {
        const EACH: usize = size_of::<f32>();
        let whole = self.cols.is_multiple_of(EACH) && self.row_stride % EACH as isize == 0;
        if !(whole && self.col_stride == 1 && self.base.cast::<f32>().is_aligned()) {
            return None;
        }
        // The same memory, every bit pattern of which is an `f32`.
        Some(Rows {
            base: self.base.cast(),
            rows: self.rows,
            cols: self.cols / EACH,
            row_stride: self.row_stride / EACH as isize,
            col_stride: 1,
            owner: PhantomData,
        })
    }
}

/// Elements that start at a cache line: rows of a cache, which loads of whole
/// vectors would split otherwise. All bits are 0 at first.
#[derive(Clone, Debug)]
pub(crate) struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Plain> Aligned<T> {
    /// `None` where there is no memory for so many elements.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        let lines = len.checked_mul(size_of::<T>())?.div_ceil(size_of::<Line>());
        let mut memory = Vec::new();
        memory.try_reserve_exact(lines).ok()?;
        memory.resize(lines, Line([0; 8]));
        Some(Self { lines: memory, len, of: PhantomData })
    }

    /// Bytes that it holds.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: the lines hold len elements, are aligned for T, and every
        // bit pattern is a T.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Bytes that `n` elements take out of an [`Arena`]; the most there can be if
/// that cannot be counted.
pub(crate) const fn bytes_for<T>(n: usize) -> usize {
    n.saturating_mul(size_of::<T>()).div_ceil(size_of::<Line>()).saturating_mul(size_of::<Line>())
}

/// What is left of a [`Buffer`].
#[derive(Debug)]
pub(crate) struct Arena<'a>(&'a mut [Line]);

impl<'a> Arena<'a> {
    /// Reborrows the memory.
    pub(crate) fn reborrow(&mut self) -> Arena<'_> {
        Arena(self.0)
    }

    /// Cuts off `shares` arenas of `bytes` each, one a thread.
    pub(crate) fn shares(&mut self, shares: usize, bytes: usize) -> Shares<'a> {
        let claims = self.take::<u64>(claim_words(shares));
        let lines = bytes.div_ceil(size_of::<Line>());
        let (head, tail) = std::mem::take(&mut self.0).split_at_mut(lines.saturating_mul(shares));
        self.0 = tail;
        Shares(Parts::new(head, lines, claims))
    }

    /// Cuts off room for `n` elements, with whatever was in it.
    pub(crate) fn take<T: Plain>(&mut self, n: usize) -> &'a mut [T] {
        let lines = bytes_for::<T>(n) / size_of::<Line>();
        let (head, tail) = std::mem::take(&mut self.0).split_at_mut(lines);
        self.0 = tail;
        assert!(n <= size_of_val(head) / size_of::<T>());
        // SAFETY: the lines hold n elements, are aligned for T, and every bit
        // pattern is a T.
        unsafe { std::slice::from_raw_parts_mut(head.as_mut_ptr().cast(), n) }
    }
}

/// Bytes that [`Arena::shares`] takes.
pub(crate) const fn bytes_for_shares(shares: usize, bytes: usize) -> usize {
    let share = bytes.div_ceil(size_of::<Line>()).saturating_mul(size_of::<Line>());
    bytes_for::<u64>(claim_words(shares)).saturating_add(shares.saturating_mul(share))
}

/// Arenas of equal size, each to be taken by one thread.
#[derive(Debug)]
pub(crate) struct Shares<'a>(Parts<'a, Line>);

impl<'a> Shares<'a> {
    /// Share `i`. Panics if it was taken before.
    pub(crate) fn take(&self, i: usize) -> Arena<'a> {
        Arena(self.0.take(i))
    }
}
