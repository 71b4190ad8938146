//! Queries over a cache: an input of mechanisms.

use std::marker::PhantomData;

use ndarray::{Array2, Array3, Array4, ArrayView4, Axis};

use super::{Cache, check_sequence};
use crate::definition::softmax::Extra;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Lengths, check_offsets};
use crate::keys::source::{At, Slots};
use crate::simd::Isa;

/// Queries `[batch, q_heads, q_len, head_dim]` over the sequences of a cache,
/// each with the keys that it has there.
///
/// Batch entry `b` is sequence `b` of the cache, or the one that
/// [`sequences`](Self::sequences) names; [`packed`](Self::packed) takes
/// queries of different numbers. The queries may be of another type than the
/// cache's rows, and the output has theirs unless it is
/// [widened](Self::widened).
///
/// With the default alignment the last query of a sequence sits at its last
/// key: append a chunk of a prompt first, then let its queries attend, causal
/// or not. `Causal::at(q_start)` says otherwise.
///
/// ```
/// use attention_kernels::cache::{Append, Cached, KvShape, Paged, Pages};
/// use attention_kernels::{Attention, dense::Dense};
/// use ndarray::{Array3, Array4};
///
/// let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64 };
/// let mut cache = Paged::<f32>::new(shape, 8, Pages { count: 32, len: 16 })?;
/// for (sequence, len) in [(5, 40), (2, 3), (7, 17)] {
///     let x = Array3::<f32>::ones((2, len, 64));
///     cache.append(sequence, x.view(), x.view())?;
/// }
/// // One more query of sequence 5, three of 2, none of 7: one call.
/// let q = Array4::<f32>::ones((1, 8, 4, 64));
/// let x = Cached::new(q.view(), &cache).sequences(&[5, 2, 7]).packed(&[0, 1, 4, 4]);
/// let out = Dense::builder().causal().build()?.forward(x)?;
/// assert_eq!(out.dim(), (1, 8, 4, 64));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Debug)]
pub struct Cached<'a, T, C: ?Sized, O = T> {
    /// Queries.
    pub q: ArrayView4<'a, T>,
    /// Keys and values.
    pub cache: &'a C,
    slots: Option<&'a [usize]>,
    offsets: Option<&'a [usize]>,
    /// The type of the output.
    pub out: PhantomData<O>,
}

impl<T, C: ?Sized, O> Clone for Cached<'_, T, C, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, C: ?Sized, O> Copy for Cached<'_, T, C, O> {}

impl<'a, T, C: Cache + ?Sized> Cached<'a, T, C> {
    /// One batch entry for each sequence of the cache.
    pub fn new(q: ArrayView4<'a, T>, cache: &'a C) -> Self {
        Self { q, cache, slots: None, offsets: None, out: PhantomData }
    }
}

impl<'a, T, C: Cache + ?Sized, O> Cached<'a, T, C, O> {
    /// Only these sequences of the cache, in this order; one may be named more
    /// than once.
    pub fn sequences(self, sequences: &'a [usize]) -> Self {
        Self { slots: Some(sequences), ..self }
    }

    /// Queries of different numbers, packed along the length axis of a batch
    /// of 1: sequence `s` has queries `offsets[s]..offsets[s + 1]`
    /// (`cu_seqlens`).
    pub fn packed(self, offsets: &'a [usize]) -> Self {
        Self { offsets: Some(offsets), ..self }
    }

    /// The same with outputs in `f32`: what is merged later is rounded once.
    pub fn widened(self) -> Cached<'a, T, C, f32> {
        Cached { q: self.q, cache: self.cache, slots: self.slots, offsets: self.offsets, out: PhantomData }
    }

    /// Reborrows for a shorter lifetime.
    pub fn reborrow<'b>(self) -> Cached<'b, T, C, O>
    where
        'a: 'b,
    {
        let Self { q, cache, slots, offsets, out } = self;
        Cached { q: q.reborrow(), cache, slots, offsets, out }
    }

    /// Other queries of the same sequences, over another cache of them.
    pub(crate) fn over<G: ?Sized>(self, q: ArrayView4<'a, T>, cache: &'a G) -> Cached<'a, T, G, O> {
        Cached { q, cache, slots: self.slots, offsets: self.offsets, out: PhantomData }
    }

    /// The same over a cache of a type that is not known.
    pub(crate) fn erased(self) -> Cached<'a, T, dyn Cache + 'a, O>
    where
        C: Sized,
    {
        Cached { q: self.q, cache: self.cache, slots: self.slots, offsets: self.offsets, out: PhantomData }
    }

    /// Where its sequences lie.
    pub(crate) fn slots(&self) -> Slots<'a> {
        Slots { slots: self.slots, offsets: self.offsets, lengths: self.cache.lengths() }
    }

    /// The sizes, if queries and cache agree.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Heads`] where they do not, and
    /// [`Error::Value`] for sequences that the cache does not have and offsets
    /// that do not fit.
    pub fn dims(&self) -> Result<Dims> {
        self.dims_for(self.cache.shape().head_dim)
    }

    /// The same for queries of so many elements, which a mechanism projects to
    /// those of a key.
    pub(crate) fn dims_for(&self, query_dim: usize) -> Result<Dims> {
        let (entries, q_heads, q_len, head_dim) = self.q.dim();
        let shape = self.cache.shape();
        let lengths = self.cache.lengths();
        for &slot in self.slots.unwrap_or_default() {
            check_sequence("sequences", slot, lengths)?;
        }
        let batch = self.slots.map_or(lengths.len(), <[usize]>::len);
        let (want, packed) = (if self.offsets.is_some() { 1 } else { batch }, self.offsets.is_some());
        if entries != want || head_dim != query_dim {
            let dim = query_dim;
            let expected = if packed {
                format!("[1, q_heads, total_q, head_dim] = [1, _, _, {dim}] in a packed batch")
            } else {
                format!("[sequences, q_heads, q_len, head_dim] = [{batch}, _, _, {dim}] as the cache has it")
            };
            return Err(Error::shape("q", expected, self.q.shape()));
        }
        if let Some(offsets) = self.offsets {
            check_offsets("offsets", offsets, q_len)?;
            if offsets.len() - 1 != batch {
                let expected =
                    format!("one offset more than there are sequences, {}", batch.saturating_add(1));
                return Err(Error::value("offsets", expected, format_args!("{} offsets", offsets.len())));
            }
        }
        let kv_heads = shape.kv_heads;
        if (kv_heads == 0 && q_heads > 0) || (kv_heads > 0 && !q_heads.is_multiple_of(kv_heads)) {
            return Err(Error::Heads { q_heads, kv_heads });
        }
        let lengths = (0..batch).map(|i| self.slots().len(i));
        let kv_len = if packed { lengths.fold(0, usize::saturating_add) } else { lengths.max().unwrap_or(0) };
        let value_dim = shape.value_dim;
        Ok(Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed })
    }

    /// Refuses a cache whose heads do not hold the same tokens, or something that
    /// stands for others: for what chooses among tokens.
    pub(crate) fn check_alike(&self) -> Result<()> {
        let option = match (self.cache.summary(), self.cache.missing()) {
            (None, None) => return Ok(()),
            (_, Some(_)) => "a cache of caches",
            (Some(_), None) => "a compensated cache",
        };
        let reason = "it chooses among the tokens that are there";
        Err(Error::Conflict { option, with: "a selection of keys", reason })
    }

    /// What the cache holds of these sequences as arrays in `f32`, `[batch,
    /// kv_heads, kv_len, dim]`, for definitions: a copy.
    pub(crate) fn held(&self, dims: &Dims) -> Held {
        let slots = self.slots();
        let batch = if dims.packed { 1 } else { dims.batch };
        let mut arrays = [dims.head_dim, dims.value_dim]
            .map(|dim| Array4::<f32>::zeros((batch, dims.kv_heads, dims.kv_len, dim)));
        let lengths: Vec<usize> = (0..dims.batch).map(|i| slots.len(i)).collect();
        let mut keys = vec![0];
        keys.extend(lengths.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        }));
        let mut rooms = arrays.each_ref().map(|x| vec![0.0; x.dim().3]);
        for index in 0..dims.batch {
            let sequence = slots.sequence(dims, index);
            let (entry, first) = if dims.packed { (0, keys[index]) } else { (index, 0) };
            for (kv_head, j) in
                (0..dims.kv_heads).flat_map(|head| (0..lengths[index]).map(move |j| (head, j)))
            {
                let at = At { sequence: &sequence, kv_head, keys: j..j + 1 };
                for (side, (array, room)) in arrays.iter_mut().zip(&mut rooms).enumerate() {
                    let row = if side == 0 {
                        self.cache.keys(Isa::Scalar, &at, room)
                    } else {
                        self.cache.values(Isa::Scalar, &at, room)
                    };
                    for c in 0..array.dim().3 {
                        array[[entry, kv_head, first + j, c]] = row.at(0, c);
                    }
                }
            }
        }
        let [k, v] = arrays;
        let means = self.cache.summary().map(|means| {
            let slots: Vec<usize> = (0..dims.batch).map(|i| slots.sequence(dims, i).slot).collect();
            let of = |x: &Array4<f32>| x.select(Axis(0), &slots).index_axis_move(Axis(2), 0);
            let logs = means.log_weights.select(Axis(0), &slots).index_axis_move(Axis(2), 0);
            (of(&means.k), of(&means.v), logs)
        });
        Held { k, v, lengths, offsets: keys, means }
    }
}

impl<T: Element, C: Cache + ?Sized, O: Element> Input for Cached<'_, T, C, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        Cached::dims(self)
    }

    fn out_dim(&self) -> Result<Dim4> {
        let dims = self.dims()?;
        Ok((self.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

/// What [`Cached::held`] gives.
pub(crate) struct Held {
    pub(crate) k: Array4<f32>,
    pub(crate) v: Array4<f32>,
    lengths: Vec<usize>,
    offsets: Vec<usize>,
    /// What stands for dropped tokens.
    means: Option<(Array3<f32>, Array3<f32>, Array2<f32>)>,
}

impl Held {
    /// The key that stands for the tokens that the cache dropped.
    pub(crate) fn extra(&self) -> Option<Extra<'_>> {
        let (k, v, logs) = self.means.as_ref()?;
        Some(Extra { k: k.view(), v: v.view(), log_weights: logs.view() })
    }

    /// How the rows of the copies belong to sequences, where the queries are
    /// those of `x`.
    pub(crate) fn lengths<'a, T, C: ?Sized, O>(&'a self, x: &'a Cached<'_, T, C, O>) -> Lengths<'a> {
        match x.offsets {
            Some(queries) => Lengths::Packed { queries, keys: &self.offsets },
            None => Lengths::Keys(&self.lengths),
        }
    }
}
