//! Plans: lists of the keys that each block of queries visits.
//!
//! A plan restricts what a [mask](crate::mask) leaves: a query sees a key if
//! the mask says so *and* the plan lists it. It is data: made once (by a
//! caller, from a mask, by a selection), kept, and handed in again.
//!
//! | plan | lists |
//! |---|---|
//! | [`Keys::Mask`] | none: all keys that the mask leaves |
//! | [`BlockLists`] | blocks of [`ATOM`] keys, in compressed rows (CSR) |
//! | [`TokenLists`] | runs of neighbouring keys, of any length and place |
//!
//! Lists belong to blocks of `q_block` neighbouring queries, and are per query
//! head, per group of heads that share keys, or per sequence: see [`Layout`].

use ndarray::{Array4, ArrayView4};

use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Site, check_increasing};
use crate::mask::{Coverage, Mask};

/// Keys of a block that a [`BlockLists`] names: atom `a` is keys `a * ATOM..(a
/// + 1) * ATOM` of its sequence, the last one perhaps shorter.
pub const ATOM: usize = 64;

/// Which query heads share a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Per {
    /// Each query head has its own.
    Head,
    /// Query heads that share a key/value head share lists.
    Group,
    /// All heads of a sequence share lists.
    Sequence,
}

/// Which lists a plan has: one for each sequence, head (as [`Per`] says) and
/// block of queries, in this order, the blocks of queries innermost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Which heads share lists.
    pub per: Per,
    /// Sequences: the batch, or the parts of a packed batch.
    pub sequences: usize,
    /// Heads of the queries.
    pub q_heads: usize,
    /// Heads of the keys and values; divides `q_heads`.
    pub kv_heads: usize,
    /// Queries of the longest sequence.
    pub queries: usize,
    /// Neighbouring queries that share a list; at least 1. The last block of a
    /// sequence may be shorter.
    pub q_block: usize,
    /// Keys of the longest sequence.
    pub keys: usize,
}

impl Layout {
    /// The layout for a call of these sizes whose sequences use all rows.
    pub fn new(per: Per, q_block: usize, dims: &Dims) -> Self {
        let &Dims { batch, q_heads, kv_heads, q_len, kv_len, .. } = dims;
        Self { per, sequences: batch, q_heads, kv_heads, queries: q_len, q_block, keys: kv_len }
    }

    /// The layout for a call whose sequences have these lengths.
    pub(crate) fn of(per: Per, q_block: usize, dims: &Dims, lengths: &Lengths<'_>) -> Self {
        let (mut queries, mut keys) = (0, 0);
        for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
            (queries, keys) = (queries.max(sequence.queries.len()), keys.max(sequence.keys.len()));
        }
        Self { queries, keys, ..Self::new(per, q_block, dims) }
    }

    /// Lists of a sequence and a block of queries.
    pub fn heads(&self) -> usize {
        match self.per {
            Per::Head => self.q_heads,
            Per::Group => self.kv_heads,
            Per::Sequence => self.q_heads.min(1),
        }
    }

    /// Blocks of queries of the longest sequence.
    pub fn blocks(&self) -> usize {
        self.queries.div_ceil(self.q_block.max(1))
    }

    /// Atoms of the longest sequence.
    pub fn atoms(&self) -> usize {
        self.keys.div_ceil(ATOM)
    }

    /// How many lists there are.
    ///
    /// # Errors
    /// [`Error::Value`] for a `q_block` of 0 and for sizes of which no memory
    /// could hold the lists, [`Error::Heads`] for heads that do not divide.
    pub fn lists(&self) -> Result<usize> {
        if self.q_block == 0 {
            return Err(Error::value("q_block", "at least 1 query", 0));
        }
        let (q_heads, kv_heads) = (self.q_heads, self.kv_heads);
        if (kv_heads == 0 && q_heads > 0) || (kv_heads > 0 && !q_heads.is_multiple_of(kv_heads)) {
            return Err(Error::Heads { q_heads, kv_heads });
        }
        if u32::try_from(self.keys).is_err() {
            return Err(Error::value("keys", "fewer than 2^32 keys in a sequence", self.keys));
        }
        let product = self.sequences.checked_mul(self.heads()).and_then(|n| n.checked_mul(self.blocks()));
        product.filter(|&n| n < isize::MAX as usize / size_of::<usize>()).ok_or_else(|| {
            let got = format_args!(
                "{} sequences x {} heads x {} blocks of queries",
                self.sequences,
                self.heads(),
                self.blocks()
            )
            .to_string();
            Error::value("layout", "few enough lists to be held in memory", got)
        })
    }

    /// The number of a list.
    #[inline(always)]
    fn list(&self, sequence: usize, head: usize, block: usize) -> usize {
        let head = match self.per {
            Per::Head => head,
            Per::Group => head / (self.q_heads / self.kv_heads),
            Per::Sequence => 0,
        };
        (sequence * self.heads() + head) * self.blocks() + block
    }

    /// The first query head that list `index` is for, its sequence and its
    /// block of queries.
    fn place(&self, index: usize) -> (usize, usize, usize) {
        let (row, block) = (index / self.blocks(), index % self.blocks());
        let (sequence, head) = (row / self.heads(), row % self.heads());
        (sequence, head * (self.q_heads / self.heads()), block)
    }

    fn check_offsets(&self, offsets: &[usize], total: usize) -> Result<()> {
        let lists = self.lists()?;
        if offsets.len() != lists + 1 {
            let expected = format!("{} offsets, one more than there are lists", lists + 1);
            return Err(Error::value("offsets", expected, format_args!("{} offsets", offsets.len())));
        }
        let expected = || format!("non-decreasing offsets from 0 to {total}, one more than there are lists");
        check_increasing("offsets", offsets, expected, |last| last == total)
    }

    /// Whether the plan has a list for every query of a call. Its sequences
    /// are as many, with no more queries.
    fn check(&self, dims: &Dims, lengths: &Lengths<'_>) -> Result<()> {
        let have = [self.sequences, self.q_heads, self.kv_heads];
        let want = [dims.batch, dims.q_heads, dims.kv_heads];
        if have != want {
            let expected = format!("[sequences, q_heads, kv_heads] = {want:?}");
            return Err(Error::shape("keys", expected, &have));
        }
        for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
            let rows = sequence.queries.len();
            if rows > self.queries {
                let got = format_args!("{} queries", self.queries).to_string();
                let expected = format!("lists for the {rows} queries of sequence {}", sequence.index);
                return Err(Error::value("keys", expected, got));
            }
        }
        Ok(())
    }
}

/// Refuses a list that names keys past the end of a sequence; `end` is where
/// the keys of a list end.
fn check_ends(
    layout: &Layout,
    dims: &Dims,
    lengths: &Lengths<'_>,
    end: impl Fn(usize) -> usize,
) -> Result<()> {
    let lists = layout.heads() * layout.blocks();
    for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
        let len = sequence.keys.len();
        let last = (0..lists).map(|i| end(sequence.index * lists + i)).max().unwrap_or(0);
        if last > len {
            let expected = format!("lists of the {len} keys of sequence {}", sequence.index);
            return Err(Error::value("keys", expected, format_args!("key {}", last - 1)));
        }
    }
    Ok(())
}

/// For each block of queries a list of [atoms](ATOM), ascending, in compressed
/// rows: list `l` is `atoms[offsets[l]..offsets[l + 1]]`.
///
/// Memory: a word a list and 4 bytes an atom.
///
/// ```
/// use attention_kernels::keys::{BlockLists, Layout, Per};
///
/// // One head, two blocks of 64 queries, 192 keys: the first block sees the
/// // first atom, the second one the first and the last.
/// let layout = Layout {
///     per: Per::Sequence, sequences: 1, q_heads: 1, kv_heads: 1, queries: 128, q_block: 64, keys: 192,
/// };
/// let plan = BlockLists::new(layout, vec![0, 1, 3], vec![0, 0, 2])?;
/// assert_eq!(plan.atoms(0, 0, 1), [0, 2]);
/// assert!(BlockLists::new(layout, vec![0, 1, 3], vec![0, 2, 0]).is_err(), "descending");
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockLists {
    layout: Layout,
    offsets: Vec<usize>,
    atoms: Vec<u32>,
}

impl BlockLists {
    /// Lists from their offsets and what they name.
    ///
    /// # Errors
    /// [`Error::Value`] that names `offsets` if they are not one more than
    /// there are lists, or do not ascend from 0 to the number of atoms;
    /// `atoms` if those of a list do not ascend strictly or lie past the keys;
    /// and what [`Layout::lists`] refuses.
    pub fn new(layout: Layout, offsets: Vec<usize>, atoms: Vec<u32>) -> Result<Self> {
        layout.check_offsets(&offsets, atoms.len())?;
        for (list, ends) in offsets.windows(2).enumerate() {
            let atoms = &atoms[ends[0]..ends[1]];
            if let Some(i) = atoms.windows(2).position(|pair| pair[0] >= pair[1]) {
                let got = format_args!("{} after {} in list {list}", atoms[i + 1], atoms[i]).to_string();
                return Err(Error::value("atoms", "each list ascending, without duplicates", got));
            }
            if let Some(last) = atoms.last().filter(|&&last| last as usize >= layout.atoms()) {
                let expected = format!("atoms below {}, of {} keys", layout.atoms(), layout.keys);
                return Err(Error::value("atoms", expected, format_args!("{last} in list {list}")));
            }
        }
        Ok(Self { layout, offsets, atoms })
    }

    /// Lists from `map[sequence, list of the sequence, block of queries, block
    /// of keys]`, where a block of keys is `k_block` of them, a multiple of
    /// [`ATOM`].
    ///
    /// # Errors
    /// [`Error::Shape`] for a map that does not fit the layout, [`Error::Value`]
    /// for a `k_block` that is no multiple, and what [`Layout::lists`] refuses.
    pub fn from_map(layout: Layout, k_block: usize, map: ArrayView4<'_, bool>) -> Result<Self> {
        if k_block == 0 || !k_block.is_multiple_of(ATOM) {
            return Err(Error::value("k_block", format!("a multiple of {ATOM} keys"), k_block));
        }
        layout.lists()?;
        let want = [layout.sequences, layout.heads(), layout.blocks(), layout.keys.div_ceil(k_block)];
        if map.shape() != want {
            let expected = format!("[sequences, lists, query blocks, key blocks] = {want:?}");
            return Err(Error::shape("map", expected, map.shape()));
        }
        Self::collect(layout, |sequence, head, block, atom| {
            let head = match layout.per {
                Per::Head => head,
                Per::Group => head / (layout.q_heads / layout.kv_heads),
                Per::Sequence => 0,
            };
            map[[sequence, head, block, atom / (k_block / ATOM)]]
        })
    }

    /// Lists of the atoms in which a mask leaves something to some query of a
    /// block and some head that shares the list, where all sequences have the
    /// lengths of the layout. Asks the mask about every atom.
    ///
    /// # Errors
    /// What [`Layout::lists`] refuses.
    pub fn from_mask(layout: Layout, mask: &dyn Mask) -> Result<Self> {
        layout.lists()?;
        let heads = layout.q_heads / layout.heads().max(1);
        let (q_len, kv_len) = (layout.queries, layout.keys);
        Self::collect(layout, |batch, head, block, atom| {
            let queries = block * layout.q_block..((block + 1) * layout.q_block).min(q_len);
            let keys = atom * ATOM..((atom + 1) * ATOM).min(kv_len);
            let valid = u64::MAX >> (ATOM - keys.len());
            (head..head + heads).any(|head| {
                let site = Site { batch, head, q_len, kv_len };
                match mask.coverage(&site, queries.clone(), keys.clone()) {
                    Coverage::Empty => false,
                    Coverage::Full => true,
                    Coverage::Partial => {
                        queries.clone().any(|query| mask.bits(&site, query, keys.start) & valid != 0)
                    }
                }
            })
        })
    }

    /// Lists of the atoms for which `named(sequence, first head, block of
    /// queries, atom)`. The layout has been checked.
    fn collect(layout: Layout, named: impl Fn(usize, usize, usize, usize) -> bool) -> Result<Self> {
        let (mut offsets, mut atoms) = (vec![0], Vec::new());
        for list in 0..layout.lists()? {
            let (sequence, head, block) = layout.place(list);
            atoms.extend(
                (0..layout.atoms())
                    .filter(|&atom| named(sequence, head, block, atom))
                    .map(|atom| atom as u32),
            );
            offsets.push(atoms.len());
        }
        Ok(Self { layout, offsets, atoms })
    }

    /// Which lists there are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The atoms that a block of queries of a query head visits, ascending.
    ///
    /// # Panics
    /// If there is no such list.
    #[inline(always)]
    pub fn atoms(&self, sequence: usize, head: usize, block: usize) -> &[u32] {
        let list = self.layout.list(sequence, head, block);
        &self.atoms[self.offsets[list]..self.offsets[list + 1]]
    }

    /// Atoms of all lists together.
    pub fn len(&self) -> usize {
        self.atoms.len()
    }

    /// Whether no list names anything.
    pub fn is_empty(&self) -> bool {
        self.atoms.is_empty()
    }

    /// Whether the list of a query names the atom of a key.
    #[inline(always)]
    pub fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        let atoms = self.atoms(site.batch, site.head, query / self.layout.q_block);
        atoms.binary_search(&((key / ATOM) as u32)).is_ok()
    }
}

/// Some neighbouring keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first key, counted from the start of the sequence.
    pub start: u32,
    /// How many; at least 1.
    pub len: u32,
}

impl Run {
    /// The keys.
    #[inline(always)]
    pub fn range(self) -> std::ops::Range<usize> {
        self.start as usize..self.start as usize + self.len as usize
    }
}

/// For each block of queries (each query, where `q_block` is 1) a list of
/// [runs](Run) of keys, ascending: list `l` is `runs[offsets[l]..offsets[l +
/// 1]]`.
///
/// Memory: a word a list and 8 bytes a run.
///
/// ```
/// use attention_kernels::keys::{Layout, Per, Run, TokenLists};
///
/// let layout = Layout {
///     per: Per::Sequence, sequences: 1, q_heads: 1, kv_heads: 1, queries: 2, q_block: 1, keys: 9,
/// };
/// let plan = TokenLists::from_keys(layout, &[0, 1, 5], &[7, 0, 4, 5, 6])?;
/// assert_eq!(plan.runs(0, 0, 1), [Run { start: 0, len: 1 }, Run { start: 4, len: 3 }]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenLists {
    layout: Layout,
    offsets: Vec<usize>,
    runs: Vec<Run>,
    /// Keys of the lists before each.
    keys: Vec<usize>,
}

impl TokenLists {
    /// Lists from their offsets and runs.
    ///
    /// # Errors
    /// [`Error::Value`] that names `offsets` if they are not one more than
    /// there are lists, or do not ascend from 0 to the number of runs; `runs`
    /// if one is empty, starts before the end of the one before it or ends
    /// past the keys; and what [`Layout::lists`] refuses.
    pub fn new(layout: Layout, offsets: Vec<usize>, runs: Vec<Run>) -> Result<Self> {
        layout.check_offsets(&offsets, runs.len())?;
        let (mut keys, mut total) = (vec![0], 0usize);
        for (list, ends) in offsets.windows(2).enumerate() {
            let mut end = 0;
            for run in &runs[ends[0]..ends[1]] {
                let range = run.range();
                if range.is_empty() || range.start < end || range.end > layout.keys {
                    let expected = format!(
                        "runs of at least 1 of {} keys, each list ascending, without duplicates",
                        layout.keys
                    );
                    let got = format_args!("keys {range:?} after key {end} in list {list}").to_string();
                    return Err(Error::value("runs", expected, got));
                }
                end = range.end;
                total = total
                    .checked_add(range.len())
                    .ok_or_else(|| Error::value("runs", "a number of keys that can be counted", "more"))?;
            }
            keys.push(total);
        }
        Ok(Self { layout, offsets, runs, keys })
    }

    /// Lists of single keys, of which neighbours are joined to runs.
    ///
    /// # Errors
    /// As [`new`](Self::new), for `keys`.
    pub fn from_keys(layout: Layout, offsets: &[usize], keys: &[u32]) -> Result<Self> {
        layout.check_offsets(offsets, keys.len())?;
        let (mut ends, mut runs) = (vec![0], Vec::<Run>::new());
        for (list, range) in offsets.windows(2).enumerate() {
            let mut end = 0;
            for &key in &keys[range[0]..range[1]] {
                if u64::from(key) < end || key as usize >= layout.keys {
                    let expected =
                        format!("keys below {}, each list ascending, without duplicates", layout.keys);
                    let got = format_args!("{key} in list {list}").to_string();
                    return Err(Error::value("keys", expected, got));
                }
                // 0 is the end of no run of this list yet.
                match runs.last_mut().filter(|_| end > 0 && u64::from(key) == end) {
                    Some(run) => run.len += 1,
                    None => runs.push(Run { start: key, len: 1 }),
                }
                end = u64::from(key) + 1;
            }
            ends.push(runs.len());
        }
        Self::new(layout, ends, runs)
    }

    /// Lists of the keys that a mask leaves to some query of a block and some
    /// head that shares the list, where all sequences have the lengths of the
    /// layout. Asks the mask about every key.
    ///
    /// # Errors
    /// What [`Layout::lists`] refuses.
    pub fn from_mask(layout: Layout, mask: &dyn Mask) -> Result<Self> {
        let (mut offsets, mut runs) = (vec![0], Vec::<Run>::new());
        let heads = layout.q_heads / layout.heads().max(1);
        let (q_len, kv_len) = (layout.queries, layout.keys);
        for list in 0..layout.lists()? {
            let (batch, first_head, block) = layout.place(list);
            let queries = block * layout.q_block..((block + 1) * layout.q_block).min(q_len);
            let mut open = false;
            for key in 0..kv_len {
                let seen = (first_head..first_head + heads).any(|head| {
                    let site = Site { batch, head, q_len, kv_len };
                    queries.clone().any(|query| mask.visible(&site, query, key))
                });
                match runs.last_mut().filter(|_| open) {
                    Some(run) if seen => run.len += 1,
                    _ if seen => runs.push(Run { start: key as u32, len: 1 }),
                    _ => {}
                }
                open = seen;
            }
            offsets.push(runs.len());
        }
        Self::new(layout, offsets, runs)
    }

    /// Which lists there are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The runs that a block of queries of a query head visits, ascending.
    ///
    /// # Panics
    /// If there is no such list.
    #[inline(always)]
    pub fn runs(&self, sequence: usize, head: usize, block: usize) -> &[Run] {
        let list = self.layout.list(sequence, head, block);
        &self.runs[self.offsets[list]..self.offsets[list + 1]]
    }

    /// How many keys a list has.
    ///
    /// # Panics
    /// If there is no such list.
    #[inline(always)]
    pub fn keys(&self, sequence: usize, head: usize, block: usize) -> usize {
        let list = self.layout.list(sequence, head, block);
        self.keys[list + 1] - self.keys[list]
    }

    /// Keys of all lists together.
    pub fn len(&self) -> usize {
        self.keys.last().copied().unwrap_or(0)
    }

    /// Whether no list names anything.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether the list of a query names a key.
    #[inline(always)]
    pub fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        let runs = self.runs(site.batch, site.head, query / self.layout.q_block);
        let after = runs.partition_point(|run| run.start as usize <= key);
        runs[..after].last().is_some_and(|run| run.range().contains(&key))
    }
}

/// Which keys a call visits.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum Keys<'a> {
    /// All that the mask leaves.
    #[default]
    Mask,
    /// What the mask leaves of the atoms of lists.
    Blocks(&'a BlockLists),
    /// What the mask leaves of the runs of lists.
    Tokens(&'a TokenLists),
}

impl Keys<'_> {
    /// Whether the plan leaves `key` to `query`.
    #[inline(always)]
    pub fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        match self {
            Self::Mask => true,
            Self::Blocks(lists) => lists.visible(site, query, key),
            Self::Tokens(lists) => lists.visible(site, query, key),
        }
    }

    /// Bit `t` says whether the plan leaves key `first + t` to `query`, where
    /// `first` is a multiple of [`ATOM`].
    #[inline(always)]
    pub(crate) fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        match self {
            Self::Mask => u64::MAX,
            Self::Blocks(lists) => {
                if lists.visible(site, query, first) {
                    u64::MAX
                } else {
                    0
                }
            }
            Self::Tokens(lists) => {
                let runs = lists.runs(site.batch, site.head, query / lists.layout.q_block);
                let from = runs.partition_point(|run| run.range().end <= first);
                let inside = runs[from..].iter().take_while(|run| (run.start as usize) < first + ATOM);
                inside.fold(0, |bits, run| {
                    let start = (run.start as usize).max(first) - first;
                    let end = run.range().end.min(first + ATOM) - first;
                    bits | (u64::MAX >> (ATOM - (end - start))) << start
                })
            }
        }
    }

    /// Neighbouring queries that share a list: those from which on block
    /// follows block. `None` where there are no lists.
    pub(crate) fn q_block(&self) -> Option<usize> {
        match self {
            Self::Mask => None,
            Self::Blocks(lists) => Some(lists.layout.q_block),
            Self::Tokens(lists) => Some(lists.layout.q_block),
        }
    }

    /// Whether each query head has lists of its own.
    pub(crate) fn is_per_head(&self) -> bool {
        match self {
            Self::Mask => false,
            Self::Blocks(lists) => lists.layout.per == Per::Head,
            Self::Tokens(lists) => lists.layout.per == Per::Head,
        }
    }

    /// The plan as an array `[batch, q_heads, q_len, kv_len]`, for a call of
    /// these sizes whose sequences use all rows. For reading and for tests.
    pub fn materialize(&self, dims: &Dims) -> Array4<bool> {
        let &Dims { batch, q_heads, q_len, kv_len, .. } = dims;
        Array4::from_shape_fn((batch, q_heads, q_len, kv_len), |(batch, head, query, key)| {
            self.visible(&Site { batch, head, q_len, kv_len }, query, key)
        })
    }

    /// Whether the plan fits a call.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of sequences or heads,
    /// [`Error::Value`] for queries without a list and for keys past the end
    /// of a sequence.
    pub fn check(&self, dims: &Dims, lengths: &Lengths<'_>) -> Result<()> {
        match self {
            Self::Mask => Ok(()),
            Self::Blocks(lists) => {
                lists.layout.check(dims, lengths)?;
                check_ends(&lists.layout, dims, lengths, |list| {
                    let atoms = &lists.atoms[lists.offsets[list]..lists.offsets[list + 1]];
                    // The last atom may be shorter, but not empty.
                    atoms.last().map_or(0, |&last| last as usize * ATOM + 1)
                })
            }
            Self::Tokens(lists) => {
                lists.layout.check(dims, lengths)?;
                check_ends(&lists.layout, dims, lengths, |list| {
                    let runs = &lists.runs[lists.offsets[list]..lists.offsets[list + 1]];
                    runs.last().map_or(0, |run| run.range().end)
                })
            }
        }
    }
}

#[cfg(test)]
mod tests;
