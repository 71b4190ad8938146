//! Pages of a pool that sequences of different lengths share.
//!
//! PagedAttention ("Efficient Memory Management for Large Language Model
//! Serving with PagedAttention", arXiv 2309.06180). A sequence is a table of
//! pages and a length: token `t` lies in page `table[t / len]`, slot `t % len`.
//! A fork copies the table and counts its pages once more; whoever appends to
//! a page that others hold copies it first (copy on write), which only the
//! last page of a sequence can need. A page goes back to the pool when nobody
//! holds it.
//!
//! Layout: `[kv_heads, pages, page_len, dim]`, keys and values apart, so that
//! pages which follow each other in the pool follow each other in memory for
//! every head. A sequence gets the page after its last one where that is free:
//! such runs are read where they lie, and others a page at a time, copied into
//! the first-level cache.
//!
//! Cost of a token: `kv_heads * (head_dim + value_dim)` elements; less than a
//! page of each sequence is unused.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::ArrayView4;

use super::format::Format;
use super::rows::{self, Placed, Planes};
use super::{Append, Cache, KvShape, check_sequence, check_truncation};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::keys::source::KvSource;
use crate::simd::Isa;

/// The size of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pages {
    /// Pages of the pool.
    pub count: usize,
    /// Tokens of a page: 1 or more. 16 is common, and multiples of 64 are read
    /// without a copy wherever they lie.
    pub len: usize,
}

/// A cache of pages that sequences share, keys in format `K` and values in
/// format `V`.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, KvShape, Paged, Pages};
/// use ndarray::Array3;
///
/// let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64 };
/// let mut cache = Paged::<f32>::new(shape, 3, Pages { count: 8, len: 16 })?;
/// let prompt = Array3::<f32>::ones((2, 40, 64));
/// cache.append(0, prompt.view(), prompt.view())?; // three pages
/// cache.fork(0, 1)?; // the same three
/// assert_eq!((cache.free_pages(), cache.table(1)?), (5, &[0, 1, 2][..]));
///
/// let token = Array3::<f32>::zeros((2, 1, 64));
/// cache.append(1, token.view(), token.view())?; // its own copy of the last page
/// assert_eq!((cache.lengths(), cache.table(1)?), (&[40, 41, 0][..], &[0, 1, 3][..]));
/// cache.truncate(0, 0)?; // what only sequence 0 held is free again
/// assert_eq!(cache.free_pages(), 5);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Paged<K: Format = f32, V: Format = K> {
    shape: KvShape,
    pages: Pages,
    tables: Vec<Vec<usize>>,
    lengths: Vec<usize>,
    /// Sequences that hold each page.
    holders: Vec<usize>,
    /// Slots of each page that have been written since it was taken.
    written: Vec<usize>,
    free: BTreeSet<usize>,
    planes: Planes<K::Keys, V::Values>,
    isa: Isa,
}

impl<K: Format, V: Format> Paged<K, V> {
    /// A pool of pages for so many sequences, all of them empty.
    ///
    /// # Errors
    /// [`Error::Value`] for pages of no tokens and where there is no memory for
    /// the pool, [`Error::Isa`] where
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) names an instruction set
    /// that the CPU lacks.
    pub fn new(shape: KvShape, sequences: usize, pages: Pages) -> Result<Self> {
        Self::with_value_columns(shape, shape.value_dim, sequences, pages)
    }

    /// The same with rows of values that have so many columns.
    pub(super) fn with_value_columns(
        shape: KvShape,
        value_columns: usize,
        sequences: usize,
        pages: Pages,
    ) -> Result<Self> {
        if pages.len == 0 {
            return Err(Error::value("pages.len", "at least 1 token", 0));
        }
        let tokens = pages.count.checked_mul(pages.len);
        let rows = tokens.and_then(|tokens| tokens.checked_mul(shape.kv_heads));
        let planes = Planes::zeroed("pages", tokens.and(rows), [shape.head_dim, value_columns])?;
        Ok(Self {
            shape,
            pages,
            tables: super::empty("sequences", sequences, Vec::new())?,
            lengths: super::empty("sequences", sequences, 0)?,
            holders: super::empty("pages", pages.count, 0)?,
            written: super::empty("pages", pages.count, 0)?,
            free: (0..pages.count).collect(),
            planes,
            isa: Isa::choose(None)?,
        })
    }

    /// The size of the pool.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// The pages of a sequence, in order.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have.
    pub fn table(&self, sequence: usize) -> Result<&[usize]> {
        check_sequence("sequence", sequence, &self.lengths)?;
        Ok(&self.tables[sequence])
    }

    /// Makes a sequence of the first `len` tokens of pages that others hold,
    /// whatever it was before: a prefix that a table kept elsewhere names. It
    /// shares them; what is appended goes to pages of its own.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have, and for a
    /// table that has not as many pages as `len` tokens need or names a page
    /// that is not in the pool, that nobody holds, that has fewer tokens than
    /// are shared, or that is named twice.
    pub fn share(&mut self, sequence: usize, table: &[usize], len: usize) -> Result<()> {
        check_sequence("sequence", sequence, &self.lengths)?;
        let needed = len.div_ceil(self.pages.len);
        if table.len() != needed {
            let expected = format!("{needed} pages, which {len} tokens need in pages of {}", self.pages.len);
            return Err(Error::value("table", expected, format_args!("{} pages", table.len())));
        }
        let mut seen = BTreeSet::new();
        for (i, &page) in table.iter().enumerate() {
            let count = self.pages.count;
            if page >= count {
                return Err(Error::value(
                    "table",
                    format!("pages below {count}, the size of the pool"),
                    page,
                ));
            }
            if self.holders[page] == 0 {
                return Err(Error::value(
                    "table",
                    "pages that a sequence holds",
                    format_args!("free page {page}"),
                ));
            }
            let tokens = (len - i * self.pages.len).min(self.pages.len);
            if self.written[page] < tokens {
                let got = format!("page {page} with {}", self.written[page]);
                return Err(Error::value("table", format!("a page with {tokens} tokens at index {i}"), got));
            }
            if !seen.insert(page) {
                return Err(Error::value("table", "each page once", format_args!("page {page} twice")));
            }
        }
        self.adopt(sequence, table.to_vec(), len);
        Ok(())
    }

    /// Gives a sequence another table.
    fn adopt(&mut self, sequence: usize, table: Vec<usize>, len: usize) {
        for &page in &table {
            self.holders[page] += 1;
        }
        let before = std::mem::replace(&mut self.tables[sequence], table);
        self.lengths[sequence] = len;
        for page in before {
            self.release(page);
        }
    }

    /// One holder less.
    fn release(&mut self, page: usize) {
        self.holders[page] -= 1;
        if self.holders[page] == 0 {
            self.free.insert(page);
        }
    }

    /// A free page, if possible the one after `last`. There is one.
    fn take(&mut self, last: Option<usize>) -> usize {
        let next = last.map(|page| page + 1).filter(|page| self.free.contains(page));
        let page = next.or_else(|| self.free.first().copied()).expect("a free page");
        self.free.remove(&page);
        (self.holders[page], self.written[page]) = (1, 0);
        page
    }

    /// The row of a slot of a page.
    fn row(&self, head: usize, page: usize, slot: usize) -> usize {
        (head * self.pages.count + page) * self.pages.len + slot
    }

    /// The last page of a sequence, if it has room left that must not be
    /// written since others hold it too.
    fn shared_end(&self, sequence: usize) -> Option<usize> {
        let filled = !self.lengths[sequence].is_multiple_of(self.pages.len);
        self.tables[sequence].last().copied().filter(|&page| filled && self.holders[page] > 1)
    }
}

impl<K: Format, V: Format> Placed for Paged<K, V> {
    type Keys = K::Keys;
    type Values = V::Values;

    fn kv_shape(&self) -> KvShape {
        self.shape
    }
    fn tokens(&self) -> &[usize] {
        &self.lengths
    }
    fn isa(&self) -> Isa {
        self.isa
    }
    fn planes(&self) -> &Planes<K::Keys, V::Values> {
        &self.planes
    }
    fn planes_mut(&mut self) -> &mut Planes<K::Keys, V::Values> {
        &mut self.planes
    }

    fn run(&self, sequence: usize, head: usize, token: usize, enough: usize) -> (usize, usize) {
        let (table, len) = (&self.tables[sequence], self.pages.len);
        let (mut at, slot) = (token / len, token % len);
        let row = self.row(head, table[at], slot);
        let mut run = len - slot;
        while run < enough && at + 1 < table.len() && table[at + 1] == table[at] + 1 {
            (at, run) = (at + 1, run + len);
        }
        (row, run.min(self.lengths[sequence].saturating_sub(token)))
    }

    fn fits(&self, sequences: &[usize], n: usize) -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        // Pages to take. Of those who hold a page together and append to it,
        // the last one keeps it.
        let (mut needed, mut left) = (0usize, BTreeMap::new());
        for &sequence in sequences {
            if let Some(page) = self.shared_end(sequence) {
                let left = left.entry(page).or_insert(self.holders[page]);
                needed += usize::from(*left > 1);
                *left -= 1;
            }
            let pages = self.lengths[sequence].checked_add(n).map(|len| len.div_ceil(self.pages.len));
            let more = pages.map_or(usize::MAX, |pages| pages - self.tables[sequence].len());
            needed = needed.saturating_add(more);
        }
        if needed > self.free.len() {
            let (free, len) = (self.free.len(), self.pages.len);
            let expected = format!("tokens for which the {free} free pages of {len} tokens do");
            return Err(Error::value("k", expected, format_args!("{n} tokens, which need {needed} pages")));
        }
        Ok(())
    }

    fn grow(&mut self, sequences: &[usize], n: usize) -> Result<()> {
        self.fits(sequences, n)?;
        if n == 0 {
            return Ok(());
        }
        for &sequence in sequences {
            if let Some(page) = self.shared_end(sequence) {
                let place = self.tables[sequence].len() - 1;
                let before = place.checked_sub(1).map(|i| self.tables[sequence][i]);
                let own = self.take(before);
                let filled = self.lengths[sequence] % self.pages.len;
                for head in 0..self.shape.kv_heads {
                    let (from, to) = (self.row(head, page, 0), self.row(head, own, 0));
                    self.planes.copy(from, to, filled);
                }
                self.written[own] = filled;
                self.tables[sequence][place] = own;
                self.release(page);
            }
            let first = self.lengths[sequence] / self.pages.len;
            self.lengths[sequence] += n;
            while self.tables[sequence].len() * self.pages.len < self.lengths[sequence] {
                let page = self.take(self.tables[sequence].last().copied());
                self.tables[sequence].push(page);
            }
            for (i, &page) in self.tables[sequence].iter().enumerate().skip(first) {
                let tokens = (self.lengths[sequence] - i * self.pages.len).min(self.pages.len);
                self.written[page] = self.written[page].max(tokens);
            }
        }
        Ok(())
    }
}

impl<K: Format, V: Format> Cache for Paged<K, V> {
    fn source(&self) -> &dyn KvSource {
        self
    }
    fn shape(&self) -> KvShape {
        self.shape
    }
    fn lengths(&self) -> &[usize] {
        &self.lengths
    }
    /// All tokens of the pool.
    fn capacity(&self) -> usize {
        self.pages.count * self.pages.len
    }
    fn bytes(&self) -> usize {
        self.planes.bytes()
    }
    fn token_bytes(&self) -> usize {
        rows::token_bytes(self)
    }

    fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        check_truncation(sequence, len, &self.lengths)?;
        self.lengths[sequence] = len;
        for page in self.tables[sequence].split_off(len.div_ceil(self.pages.len)) {
            self.release(page);
        }
        Ok(())
    }

    /// Copies the table, and no token.
    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        check_sequence("from", from, &self.lengths)?;
        check_sequence("to", to, &self.lengths)?;
        self.adopt(to, self.tables[from].clone(), self.lengths[from]);
        Ok(())
    }
}

impl<K: Format, V: Format> Append for Paged<K, V> {
    fn append_each<T: Element>(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
    ) -> Result<()> {
        rows::append(self, sequences, k, v)
    }

    fn check_room(&self, sequences: &[usize], tokens: usize) -> Result<()> {
        rows::check_fits(self, sequences, tokens)
    }
}
