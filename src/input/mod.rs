//! What goes into a mechanism, and the only checks of shapes.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array, ArrayView4, ArrayViewMut4, Axis, Dimension, IntoDimension, ShapeBuilder, s};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::raw;
use crate::simd::mem::Rows;

pub(crate) mod branched;
pub(crate) mod declare;
pub(crate) mod features;
pub(crate) mod gate;
pub(crate) mod gated;
pub(crate) mod global;
pub(crate) mod keyed;
pub(crate) mod laid;
pub(crate) mod pixels;
pub(crate) mod reading;
pub(crate) mod retained;
pub(crate) mod state;
pub(crate) mod tokens;
pub(crate) mod views;

#[cfg(test)]
mod tests;

/// Sizes of an array `[batch, heads, len, dim]`.
pub type Dim4 = (usize, usize, usize, usize);

/// An input of a mechanism: arrays, or a cache, that know their sizes. It is
/// [`Copy`]: a few views, which every call takes by value.
pub trait Input: Copy {
    /// The type that outputs are stored in: mostly that of the arrays.
    type Out: Element;

    /// The sizes, if the arrays agree.
    ///
    /// # Errors
    /// An error that names the array that does not fit.
    fn dims(&self) -> Result<Dims>;

    /// How rows of the arrays belong to sequences.
    fn lengths(&self) -> Lengths<'_> {
        Lengths::Full
    }

    /// The shape of the output, `[batch, q_heads, q_len, value_dim]`.
    ///
    /// # Errors
    /// As [`dims`](Self::dims).
    fn out_dim(&self) -> Result<Dim4>;
}

impl<Q: Element, K: Element, O: Element> Input for Qkv<'_, Q, K, O> {
    type Out = O;

    fn lengths(&self) -> Lengths<'_> {
        self.lengths
    }

    fn dims(&self) -> Result<Dims> {
        match self.lengths {
            Lengths::Tokens(_) => tokens::of_tokens(self),
            _ => Qkv::dims(self),
        }
    }

    fn out_dim(&self) -> Result<Dim4> {
        let dims = Input::dims(self)?;
        Ok((self.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

/// The sizes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dims {
    /// Sequences: the batch, or the parts of a packed batch.
    pub batch: usize,
    /// Heads of the queries.
    pub q_heads: usize,
    /// Heads of the keys and values; divides `q_heads`.
    pub kv_heads: usize,
    /// Queries of a sequence; in a packed batch, of all sequences together.
    pub q_len: usize,
    /// Keys of a sequence; in a packed batch, of all sequences together.
    pub kv_len: usize,
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value and of an output row.
    pub value_dim: usize,
    /// Whether the batch is packed, so that `q_len` and `kv_len` are totals
    /// and say nothing about the lengths of a sequence.
    pub packed: bool,
}

/// Whether a product of sizes, each at least 1, is one that can be counted in
/// bytes.
pub(crate) fn countable(sizes: &[usize]) -> bool {
    // As floating-point numbers: none overflows.
    const MOST: f64 = (1u64 << 62) as f64;
    sizes.iter().map(|&n| n.max(1) as f64).product::<f64>() < MOST
}

/// An array of equal elements, if memory has room for it.
///
/// # Errors
/// [`Error::TooLarge`] if not.
pub(crate) fn filled<T: Clone, S: IntoDimension>(
    argument: &'static str,
    shape: S,
    x: T,
) -> Result<Array<T, S::Dim>> {
    let dim = shape.into_dimension();
    let refusal = || Error::too_large(argument, format_args!("{:?}", dim.slice()));
    let count = |at_least: usize| {
        dim.slice().iter().try_fold(size_of::<T>().max(1), |all, &n| all.checked_mul(n.max(at_least)))
    };
    // An array whose axes without those of size 0 are too long is none either.
    count(1).filter(|&bytes| isize::try_from(bytes).is_ok()).ok_or_else(refusal)?;
    let bytes = count(0).ok_or_else(refusal)?;
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| refusal())?;
    Ok(Array::from_elem(dim, x))
}

impl Dims {
    /// The same, unless an engine would count beyond what bytes can be: what
    /// they multiply is less than any of these products.
    ///
    /// # Errors
    /// [`Error::TooLarge`]
    pub(crate) fn checked(self) -> Result<Self> {
        // Bytes of an element and its copies, and elements of a column of what
        // all threads work in.
        const BYTES: usize = 1 << 6;
        const SHARES: usize = 1 << 26;
        let Self { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed } = self;
        let (heads, long) = (q_heads.max(kv_heads), |n: usize| n.saturating_add(256));
        let (tiles, dims) = (|n: usize| n / 128 + 2, head_dim.saturating_add(value_dim).saturating_add(128));
        let counts = [
            // As if all sequences were as long as the longest.
            countable(&[batch, heads, long(q_len.max(kv_len)), dims, BYTES]),
            countable(&[dims, SHARES]),
            // The lengths of packed sequences are together those of the arrays.
            countable(&[if packed { 1 } else { batch }, heads, long(q_len), long(kv_len)]),
            countable(&[batch, tiles(q_len), tiles(kv_len), BYTES]),
        ];
        if counts.iter().all(|&countable| countable) {
            return Ok(self);
        }
        let got = format!(
            "batch {batch}, heads {q_heads} and {kv_heads}, lengths {q_len} and {kv_len}, dims {head_dim} and {value_dim}"
        );
        Err(Error::too_large("q", got))
    }
}

/// One (sequence, head) pair: where a mask or a score is asked about.
///
/// Queries and keys are counted from the start of the sequence. Where key
/// lengths are given, `kv_len` is this sequence's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// The sequence.
    pub batch: usize,
    /// The query head.
    pub head: usize,
    /// Queries of this sequence.
    pub q_len: usize,
    /// Keys of this sequence.
    pub kv_len: usize,
}

/// The lengths of a sequence: what a mask is asked about that is the same for
/// every sequence of these lengths and every head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Queries of this sequence.
    pub q_len: usize,
    /// Keys of this sequence.
    pub kv_len: usize,
}

impl Extent {
    /// The position among the keys at which query 0 sits unless a mask says
    /// otherwise: the last query is aligned with the last key.
    #[inline(always)]
    pub fn q_start(&self) -> isize {
        self.kv_len as isize - self.q_len as isize
    }
}

impl Site {
    /// Its lengths.
    #[inline(always)]
    pub fn extent(&self) -> Extent {
        Extent { q_len: self.q_len, kv_len: self.kv_len }
    }

    /// [`Extent::q_start`]
    #[inline(always)]
    pub fn q_start(&self) -> isize {
        self.extent().q_start()
    }

    /// The position of a query among the keys, given that of query 0.
    #[inline(always)]
    pub(crate) fn position(&self, q_start: Option<isize>, query: usize) -> isize {
        q_start.unwrap_or(self.q_start()).saturating_add(query as isize)
    }
}

/// One value for each pair of a query and a key: a view `[batch, q_heads,
/// q_len, kv_len]` in which an axis of size 1 stands for any size.
#[derive(Clone, Debug)]
pub(crate) struct Pairs<'a, T> {
    shape: [usize; 4],
    /// One matrix for each (sequence, head) that has its own: none of the two
    /// counts where all of an axis are the same.
    matrices: Vec<Rows<'a, T>>,
    sequences: usize,
    heads: usize,
}

/// The values of one query.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PairRow<'a, T> {
    /// The same for every key.
    Same(T),
    /// The values of neighbouring keys are neighbours.
    Slice(&'a [T]),
    /// A row of a matrix whose columns lie anyhow.
    Strided(&'a Rows<'a, T>, usize),
}

impl<'a, T: Copy> Pairs<'a, T> {
    pub(crate) fn new(view: ArrayView4<'a, T>) -> Self {
        let (batch, heads, q_len, kv_len) = view.dim();
        let own = |axis: usize| {
            let len = view.len_of(Axis(axis));
            if view.strides()[axis] == 0 { len.min(1) } else { len }
        };
        let (sequences, own_heads) = (own(0), own(1));
        let matrix = |i: usize| {
            view.index_axis_move(Axis(0), i / own_heads).index_axis_move(Axis(0), i % own_heads).into()
        };
        let matrices = (0..sequences * own_heads).map(matrix).collect();
        Self { shape: [batch, heads, q_len, kv_len], matrices, sequences, heads: own_heads }
    }

    /// Whether the values are the same for every sequence and head.
    pub(crate) fn is_shared(&self) -> bool {
        self.sequences == 1 && self.heads == 1
    }

    /// Whether the view fits. `option` says what a view with a length axis
    /// is, for a packed batch refuses it.
    pub(crate) fn check(&self, argument: &'static str, option: &'static str, dims: &Dims) -> Result<()> {
        if dims.packed && (self.shape[2] != 1 || self.shape[3] != 1) {
            return Err(Error::packed(option));
        }
        let sizes = [dims.batch, dims.q_heads, dims.q_len, dims.kv_len];
        if self.shape.iter().zip(&sizes).any(|(&have, &want)| have != 1 && have != want) {
            let expected =
                format!("[batch, q_heads, q_len, kv_len] = {sizes:?} or 1 in place of any of them");
            return Err(Error::shape(argument, expected, &self.shape));
        }
        Ok(())
    }

    /// The values of a query; `None` outside the view, where
    /// [`check`](Self::check) lets no call come.
    #[inline(always)]
    pub(crate) fn row(&self, site: &Site, query: usize) -> Option<PairRow<'_, T>> {
        let at = |len: usize, i: usize| if len == 1 { 0 } else { i };
        let [_, _, q_len, kv_len] = self.shape;
        let (sequence, head, query) =
            (at(self.sequences, site.batch), at(self.heads, site.head), at(q_len, query));
        if head >= self.heads || query >= q_len || kv_len == 0 {
            return None;
        }
        let matrix = self.matrices.get(sequence * self.heads + head)?;
        Some(if kv_len == 1 {
            PairRow::Same(matrix.at(query, 0))
        } else if let Some(row) = matrix.row(query) {
            PairRow::Slice(row)
        } else {
            PairRow::Strided(matrix, query)
        })
    }
}

impl<T: Copy> PairRow<'_, T> {
    /// The value for a key, if there is one.
    #[inline(always)]
    pub(crate) fn get(&self, key: usize) -> Option<T> {
        match *self {
            Self::Same(value) => Some(value),
            Self::Slice(row) => row.get(key).copied(),
            Self::Strided(matrix, query) => (key < matrix.cols()).then(|| matrix.at(query, key)),
        }
    }
}

/// How the rows of the arrays belong to sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Lengths<'a> {
    /// Each batch entry is one sequence that uses all rows.
    #[default]
    Full,
    /// Batch entry `b` has only the first `keys[b]` keys.
    Keys(&'a [usize]),
    /// The batch axis is 1 and sequence `s` has rows `queries[s]..queries[s +
    /// 1]` of the queries and `keys[s]..keys[s + 1]` of the keys
    /// (`cu_seqlens`). Rows after the last offset belong to no sequence.
    Packed {
        /// Offsets into the query axis, of length `sequences + 1`.
        queries: &'a [usize],
        /// Offsets into the key axis, of length `sequences + 1`.
        keys: &'a [usize],
    },
    /// Batch entry `b` has only the first `tokens[b]` tokens, queries and keys:
    /// for recurrences, of which these are the same.
    Tokens(&'a [usize]),
}

/// One sequence: where it lies in the arrays.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// Its number among the sequences.
    pub(crate) index: usize,
    /// Its place on the batch axis.
    pub(crate) batch: usize,
    /// Its number in a cache.
    pub(crate) slot: usize,
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
}

impl Sequence {
    pub(crate) fn site(&self, head: usize) -> Site {
        Site { batch: self.index, head, q_len: self.queries.len(), kv_len: self.keys.len() }
    }
}

impl Lengths<'_> {
    /// Refuses sequences that are not as long as the arrays, `with` what is made of whole
    /// ones.
    pub(crate) fn check_full(&self, with: &'static str, reason: &'static str) -> Result<()> {
        match self {
            Self::Full => Ok(()),
            _ => Err(Error::Conflict { option: "sequences of other lengths", with, reason }),
        }
    }

    /// Sets the rows, `[batch, heads, len, dim]`, that belong to no sequence:
    /// what lies after the last offset, and padding. `keys` says whether they are keys.
    pub(crate) fn fill_rest<T: Copy>(&self, rows: &mut ArrayViewMut4<'_, T>, keys: bool, with: T) {
        let (batch, _, len, _) = rows.dim();
        for entry in 0..batch {
            let end = match *self {
                Self::Full | Self::Keys(_) => return,
                Self::Packed { queries, keys: offsets } => {
                    let offsets = if keys { offsets } else { queries };
                    offsets.last().copied().unwrap_or(0)
                }
                Self::Tokens(tokens) => tokens[entry],
            };
            rows.slice_mut(s![entry, .., end.min(len).., ..]).fill(with);
        }
    }

    /// Sequence `index` of arrays of these sizes.
    pub(crate) fn sequence(&self, dims: &Dims, index: usize) -> Sequence {
        let (q_len, kv_len) = (dims.q_len, dims.kv_len);
        match self {
            Self::Full => Sequence { index, batch: index, slot: index, queries: 0..q_len, keys: 0..kv_len },
            Self::Keys(keys) => {
                Sequence { index, batch: index, slot: index, queries: 0..q_len, keys: 0..keys[index] }
            }
            Self::Tokens(tokens) => Sequence {
                index,
                batch: index,
                slot: index,
                queries: 0..tokens[index],
                keys: 0..tokens[index],
            },
            Self::Packed { queries, keys } => Sequence {
                index,
                batch: 0,
                slot: index,
                queries: queries[index]..queries[index + 1],
                keys: keys[index]..keys[index + 1],
            },
        }
    }
}

/// Queries `[batch, q_heads, q_len, head_dim]`, keys `[batch, kv_heads,
/// kv_len, head_dim]` and values `[batch, kv_heads, kv_len, value_dim]`, of
/// any strides.
///
/// Keys and values may be of another storage type than queries (`f32` queries
/// over an `f16` cache), and the output of a third: that of the queries,
/// unless it is [widened](Self::widened).
#[derive(Debug)]
pub struct Qkv<'a, T, K = T, O = T> {
    /// Queries.
    pub q: ArrayView4<'a, T>,
    /// Keys.
    pub k: ArrayView4<'a, K>,
    /// Values.
    pub v: ArrayView4<'a, K>,
    /// How rows belong to sequences.
    pub lengths: Lengths<'a>,
    /// The type of the output.
    pub out: PhantomData<O>,
}

impl<T, K, O> Clone for Qkv<'_, T, K, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, K, O> Copy for Qkv<'_, T, K, O> {}

impl<'a, T, K> Qkv<'a, T, K> {
    /// One sequence a batch entry, of views or of references to arrays.
    ///
    /// ```
    /// use attention_kernels::Qkv;
    /// use ndarray::Array4;
    ///
    /// let (q, kv) = (Array4::<f32>::ones((1, 8, 5, 64)), Array4::<f32>::ones((1, 2, 9, 64)));
    /// let x = Qkv::new(&q, &kv, kv.view());
    /// ```
    pub fn new(
        q: impl Into<ArrayView4<'a, T>>,
        k: impl Into<ArrayView4<'a, K>>,
        v: impl Into<ArrayView4<'a, K>>,
    ) -> Self {
        Self { q: q.into(), k: k.into(), v: v.into(), lengths: Lengths::Full, out: PhantomData }
    }

    /// The same of arrays `[batch, len, heads, dim]`, as projections leave them. Nothing
    /// is copied. Outputs are `[batch, q_heads, q_len, value_dim]` still: one that lies as
    /// the rows do is written through `out.view_mut().permuted_axes([0, 2, 1, 3])`.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, Workspace, dense::Dense};
    /// use ndarray::Array4;
    ///
    /// let (q, kv) = (Array4::<f32>::ones((1, 5, 8, 64)), Array4::<f32>::ones((1, 9, 2, 64)));
    /// let x = Qkv::from_rows(&q, &kv, &kv);
    /// let mut out = Array4::zeros((1, 5, 8, 64));
    /// let to = out.view_mut().permuted_axes([0, 2, 1, 3]);
    /// Dense::builder().build()?.forward_into(x, to, &mut Workspace::new())?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn from_rows(
        q: impl Into<ArrayView4<'a, T>>,
        k: impl Into<ArrayView4<'a, K>>,
        v: impl Into<ArrayView4<'a, K>>,
    ) -> Self {
        let Self { q, k, v, lengths, out } = Self::new(q, k, v);
        let heads_first = [0, 2, 1, 3];
        let (q, k, v) =
            (q.permuted_axes(heads_first), k.permuted_axes(heads_first), v.permuted_axes(heads_first));
        Self { q, k, v, lengths, out }
    }

    /// The same from slices; see [`raw`].
    pub fn of_raw(q: raw::View<'a, T>, k: raw::View<'a, K>, v: raw::View<'a, K>) -> Self {
        Self::new(q.0, k.0, v.0)
    }
}

impl<T: Element, K: Element> Qkv<'_, T, K> {
    /// Zeros of these sizes that take no memory: what
    /// [`workspace_bytes`](crate::Attention::workspace_bytes) and
    /// [`cost`](crate::Attention::cost) need to be asked before there is an input. A packed
    /// batch is one of 1, to which offsets [come](Self::packed).
    ///
    /// ```
    /// use attention_kernels::input::{Dims, Qkv};
    /// use attention_kernels::{Attention, Workspace, dense::Dense};
    ///
    /// let dims = Dims {
    ///     batch: 1, q_heads: 32, kv_heads: 8, q_len: 4096, kv_len: 4096,
    ///     head_dim: 128, value_dim: 128, packed: false,
    /// };
    /// let dense = Dense::builder().causal().build()?;
    /// let bytes = dense.workspace_bytes(Qkv::<f32>::of_dims(&dims)?)?;
    /// let workspace = Workspace::with_capacity(bytes);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::TooLarge`] for sizes that cannot be counted.
    pub fn of_dims(dims: &Dims) -> Result<Self> {
        let Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed } = dims.checked()?;
        let batch = if packed { 1 } else { batch };
        Ok(Self::new(
            zeros("q", [batch, q_heads, q_len, head_dim])?,
            zeros("k", [batch, kv_heads, kv_len, head_dim])?,
            zeros("v", [batch, kv_heads, kv_len, value_dim])?,
        ))
    }
}

/// The same zero everywhere.
fn zeros<'a, T: Element>(argument: &'static str, shape: [usize; 4]) -> Result<ArrayView4<'a, T>> {
    let one = std::slice::from_ref(T::ZERO);
    ArrayView4::from_shape(shape.strides([0; 4]), one)
        .map_err(|_| Error::too_large(argument, format_args!("{shape:?}")))
}

impl<'a, T, K, O> Qkv<'a, T, K, O> {
    /// The same with outputs in `f32`, whatever the arrays are stored in: what
    /// is merged or summed later is then rounded once.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, dense::Dense};
    /// use half::f16;
    /// use ndarray::Array4;
    ///
    /// let x = Array4::from_elem((1, 1, 8, 16), f16::ONE);
    /// let x = Qkv::new(x.view(), x.view(), x.view()).widened();
    /// let out: Array4<f32> = Dense::builder().build()?.forward(x)?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn widened(self) -> Qkv<'a, T, K, f32> {
        Qkv { q: self.q, k: self.k, v: self.v, lengths: self.lengths, out: PhantomData }
    }

    /// Batch entry `b` has only the first `lengths[b]` keys; what lies after
    /// them is never read. Positions count from this length: with the default
    /// alignment a causal query `i` sees keys up to `lengths[b] - q_len + i`,
    /// as for a cache that is filled to a different height in each entry.
    #[doc(alias = "seqlens")]
    #[doc(alias = "padding")]
    pub fn key_lengths(self, lengths: &'a [usize]) -> Self {
        Self { lengths: Lengths::Keys(lengths), ..self }
    }

    /// Sequences of different lengths packed along the length axis of a batch
    /// of 1: sequence `s` has queries `queries[s]..queries[s + 1]` and keys
    /// `keys[s]..keys[s + 1]` (`cu_seqlens`). Nothing crosses a boundary. Arrays
    /// may be longer than the last offset: what lies after it is never read, and
    /// has outputs of 0.
    #[doc(alias = "cu_seqlens")]
    #[doc(alias = "varlen")]
    pub fn packed(self, queries: &'a [usize], keys: &'a [usize]) -> Self {
        Self { lengths: Lengths::Packed { queries, keys }, ..self }
    }

    /// Batch entry `b` has only the first `lengths[b]` tokens; what lies after them
    /// is padding, which is never read and has outputs of 0. For recurrences, whose
    /// state is then the one after the last token; of others
    /// [`key_lengths`](Self::key_lengths) hides padding.
    pub fn padded(self, lengths: &'a [usize]) -> Self {
        Self { lengths: Lengths::Tokens(lengths), ..self }
    }

    /// Reborrows for a shorter lifetime (array views are invariant in theirs,
    /// so the compiler does not shorten it by itself).
    pub fn reborrow<'b>(self) -> Qkv<'b, T, K, O>
    where
        'a: 'b,
    {
        let Self { q, k, v, lengths, out } = self;
        Qkv { q: q.reborrow(), k: k.reborrow(), v: v.reborrow(), lengths, out }
    }

    /// The sizes of attention over pairs of queries and keys, if the arrays agree.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Heads`] where they do not,
    /// [`Error::Value`] for lengths that do not fit the arrays, and
    /// [`Error::Conflict`] where tokens are [padded](Self::padded).
    pub fn dims(&self) -> Result<Dims> {
        let (batch, q_heads, q_len, head_dim) = self.q.dim();
        let (_, kv_heads, kv_len, value_dim) = self.v.dim();
        if self.k.dim() != (batch, kv_heads, kv_len, head_dim) {
            return Err(Error::shape(
                "k",
                format!(
                    "[batch, kv_heads, kv_len, head_dim] = [{batch}, {kv_heads}, {kv_len}, {head_dim}] as q and v have it"
                ),
                self.k.shape(),
            ));
        }
        if self.v.dim().0 != batch {
            return Err(Error::shape(
                "v",
                format!("[batch, kv_heads, kv_len, value_dim] with batch = {batch} as q has it"),
                self.v.shape(),
            ));
        }
        if (kv_heads == 0 && q_heads > 0) || (kv_heads > 0 && !q_heads.is_multiple_of(kv_heads)) {
            return Err(Error::Heads { q_heads, kv_heads });
        }
        let mut dims = Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed: false };
        match self.lengths {
            Lengths::Full => {}
            Lengths::Keys(keys) => check_lengths(("key_lengths", keys), batch, ("kv_len", kv_len))?,
            Lengths::Tokens(_) => {
                let reason =
                    "key_lengths hides the keys of padding, and nothing reads the rows of its queries";
                return Err(Error::Conflict { option: "padded", with: "pairs of queries and keys", reason });
            }
            Lengths::Packed { queries, keys } => {
                if batch != 1 {
                    return Err(Error::shape(
                        "q",
                        "[1, q_heads, total_q, head_dim] in a packed batch",
                        self.q.shape(),
                    ));
                }
                check_offsets("queries", queries, q_len)?;
                check_offsets("keys", keys, kv_len)?;
                if queries.len() != keys.len() {
                    return Err(Error::value(
                        "keys",
                        format!("as many offsets as queries, {}", queries.len()),
                        format_args!("{} offsets", keys.len()),
                    ));
                }
                dims.batch = queries.len() - 1;
                dims.packed = true;
            }
        }
        dims.checked()
    }
}

/// Refuses lengths that are not one for each entry of the batch, each at most
/// that of an axis.
pub(crate) fn check_lengths(
    (argument, lengths): (&'static str, &[usize]),
    batch: usize,
    (axis, most): (&'static str, usize),
) -> Result<()> {
    if lengths.len() != batch {
        let expected = format!("one length for each of the {batch} batch entries");
        return Err(Error::value(argument, expected, format_args!("{} lengths", lengths.len())));
    }
    match lengths.iter().enumerate().find(|&(_, &len)| len > most) {
        Some((b, len)) => {
            let expected = format!("at most {axis} = {most}");
            Err(Error::value(argument, expected, format_args!("{len} for batch entry {b}")))
        }
        None => Ok(()),
    }
}

/// Refuses what are not offsets of sequences that lie one after the other in an
/// axis of `total` rows, which may be longer.
pub(crate) fn check_offsets(argument: &'static str, offsets: &[usize], total: usize) -> Result<()> {
    let expected =
        || format!("non-decreasing offsets from 0 to at most {total}, one more than there are sequences");
    check_increasing(argument, offsets, expected, |last| last <= total)
}

/// Refuses offsets that do not start at 0, fall, or end where they may not.
pub(crate) fn check_increasing(
    argument: &'static str,
    offsets: &[usize],
    expected: impl Fn() -> String,
    ends: impl FnOnce(usize) -> bool,
) -> Result<()> {
    if offsets.first() != Some(&0) || offsets.last().is_some_and(|&last| !ends(last)) {
        let ends = format!("{} offsets from {:?} to {:?}", offsets.len(), offsets.first(), offsets.last());
        return Err(Error::value(argument, expected(), ends));
    }
    match offsets.windows(2).position(|w| w[0] > w[1]) {
        Some(i) => {
            let drop = format!("{} after {} at index {}", offsets[i + 1], offsets[i], i + 1);
            Err(Error::value(argument, expected(), drop))
        }
        None => Ok(()),
    }
}
