//! Up to a block of rows that lie anywhere: in an array, in pages of a cache,
//! scattered. Products read them where they are.

use std::marker::PhantomData;

use half::{bf16, f16};

use super::any::AnyRows;

/// The most rows of a [`Table`]: one word of mask bits.
pub(crate) const TABLE_ROWS: usize = 64;

/// The storage type of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    F32,
    F16,
    Bf16,
}

/// Addresses of rows of one type and width, whose elements are neighbours.
#[derive(Debug)]
pub(crate) struct Table<'a> {
    rows: [*const u8; TABLE_ROWS],
    len: usize,
    cols: usize,
    kind: Kind,
    owner: PhantomData<&'a [u8]>,
}

/// The same, where the type is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableRows<'a, T> {
    rows: &'a [*const u8],
    cols: usize,
    owner: PhantomData<&'a [T]>,
}

/// The rows of a [`Table`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum AnyTable<'a> {
    F32(TableRows<'a, f32>),
    F16(TableRows<'a, f16>),
    Bf16(TableRows<'a, bf16>),
}

/// Addresses of rows that will be read soon, valid or not, and how many bytes
/// of each are prefetched.
#[derive(Clone, Debug)]
pub(crate) struct RowsAhead {
    pub(crate) rows: [*const u8; TABLE_ROWS],
    pub(crate) bytes: usize,
}

impl RowsAhead {
    /// Nothing to prefetch.
    pub(crate) fn nothing() -> Self {
        Self { rows: [std::ptr::null(); TABLE_ROWS], bytes: 0 }
    }

    /// Address `i`.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> *const u8 {
        self.rows[i % TABLE_ROWS]
    }
}

impl<'a> Table<'a> {
    /// No rows.
    #[inline(always)]
    pub(crate) fn new() -> Self {
        let rows = [std::ptr::null(); TABLE_ROWS];
        Self { rows, len: 0, cols: 0, kind: Kind::F32, owner: PhantomData }
    }

    /// Adds rows. Panics if their elements are not neighbours, if they are not
    /// of the type and width of the others, or there are too many.
    #[inline(always)]
    pub(crate) fn push(&mut self, rows: AnyRows<'a>) {
        let kind = match rows {
            AnyRows::F32(_) => Kind::F32,
            AnyRows::F16(_) => Kind::F16,
            AnyRows::Bf16(_) => Kind::Bf16,
        };
        if self.len == 0 {
            (self.kind, self.cols) = (kind, rows.cols());
        }
        assert!(rows.is_unit() && kind == self.kind && rows.cols() == self.cols);
        let (base, stride) = rows.address(0);
        let to = &mut self.rows[self.len..][..rows.len()];
        for (i, to) in to.iter_mut().enumerate() {
            *to = base.wrapping_offset((i as isize).wrapping_mul(stride));
        }
        self.len += rows.len();
    }

    /// The rows.
    #[inline(always)]
    pub(crate) fn typed(&self) -> AnyTable<'_> {
        match self.kind {
            Kind::F32 => AnyTable::F32(self.rows()),
            Kind::F16 => AnyTable::F16(self.rows()),
            Kind::Bf16 => AnyTable::Bf16(self.rows()),
        }
    }

    /// The rows, which are of this type.
    #[inline(always)]
    fn rows<T>(&self) -> TableRows<'_, T> {
        TableRows { rows: &self.rows[..self.len], cols: self.cols, owner: PhantomData }
    }
}

impl AnyTable<'_> {
    /// Whether all elements of a row are finite.
    pub(crate) fn is_finite(&self, i: usize) -> bool {
        match self {
            Self::F32(x) => x.row(i).iter().all(|x| x.is_finite()),
            Self::F16(x) => x.row(i).iter().all(|x| x.is_finite()),
            Self::Bf16(x) => x.row(i).iter().all(|x| x.is_finite()),
        }
    }
}

impl<'a, T> TableRows<'a, T> {
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    #[inline(always)]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [T] {
        // SAFETY: a table is made of rows of this many elements of this type.
        unsafe { std::slice::from_raw_parts(self.rows[i].cast(), self.cols) }
    }

    /// The address of row `i`.
    ///
    /// # Safety
    /// The row must exist.
    #[inline(always)]
    pub(crate) unsafe fn row_ptr(&self, i: usize) -> *const T {
        debug_assert!(i < self.rows.len());
        // SAFETY: the caller's.
        unsafe { self.rows.get_unchecked(i).cast() }
    }
}
