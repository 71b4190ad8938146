//! An index branch: queries and keys of its own by which a mechanism selects.

use ndarray::{ArrayView3, ArrayView4};

use super::Scheme;
use crate::attention::{Dim4, Input};
use crate::cache::Cache;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths};
use crate::keys::source::Kv;
use crate::simd::mem::Heads;

/// Index queries of some heads, and index keys of one head that all of them
/// share: one for each key of the call, or one for each pool of keys.
#[derive(Debug)]
pub struct IndexBranch<'a, I> {
    /// `[batch, index_heads, q_len, index_dim]`
    pub q: ArrayView4<'a, I>,
    /// Weights of the heads, `[batch, index_heads, q_len]`, where scores are
    /// weighted.
    pub weights: Option<ArrayView3<'a, f32>>,
    keys: IndexKeys<'a, I>,
}

#[derive(Debug)]
enum IndexKeys<'a, I> {
    Array(ArrayView4<'a, I>),
    Cache(&'a (dyn Cache + 'a)),
}

impl<I> Clone for IndexBranch<'_, I> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<I> Copy for IndexBranch<'_, I> {}
impl<I> Clone for IndexKeys<'_, I> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<I> Copy for IndexKeys<'_, I> {}

impl<'a, I: Element> IndexBranch<'a, I> {
    /// With index keys `[batch, 1, keys, index_dim]`, as many as the call has
    /// keys (or whole pools) or more. They lie as the keys of arrays do; beside
    /// a cache entry `b` of the batch belongs to sequence `b` of the call.
    pub fn new(q: ArrayView4<'a, I>, k: ArrayView4<'a, I>) -> Self {
        Self { q, weights: None, keys: IndexKeys::Array(k) }
    }

    /// With the index keys that a cache holds for the same sequences: one of
    /// one head, such as [`Latent`](crate::cache::Latent) without a rotary part.
    pub fn cached(q: ArrayView4<'a, I>, keys: &'a (dyn Cache + 'a)) -> Self {
        Self { q, weights: None, keys: IndexKeys::Cache(keys) }
    }

    /// With weights of the heads.
    pub fn weighted(self, weights: ArrayView3<'a, f32>) -> Self {
        Self { weights: Some(weights), ..self }
    }

    /// Reborrows for a shorter lifetime.
    pub fn reborrow<'b>(self) -> IndexBranch<'b, I>
    where
        'a: 'b,
    {
        let keys = match self.keys {
            IndexKeys::Array(k) => IndexKeys::Array(k.reborrow()),
            IndexKeys::Cache(cache) => IndexKeys::Cache(cache),
        };
        IndexBranch { q: self.q.reborrow(), weights: self.weights.map(|w| w.reborrow()), keys }
    }

    /// What is scored.
    pub(super) fn source(&self) -> Kv<'a> {
        match self.keys {
            IndexKeys::Array(k) => {
                let k = I::any(Heads::new(k));
                Kv::Arrays { k, v: k.without_columns() }
            }
            IndexKeys::Cache(cache) => Kv::CacheKeys(cache.source()),
        }
    }

    /// Whether it fits a call whose queries are `[entries, _, q_len, _]`.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub(crate) fn check(&self, (entries, q_heads, q_len, _): Dim4) -> Result<()> {
        let (batch, heads, len, dim) = self.q.dim();
        if (batch, len) != (entries, q_len) || (heads == 0) != (q_heads == 0) {
            let expected = format!(
                "[batch, index_heads, q_len, index_dim] = [{entries}, at least 1, {q_len}, _] as q has it"
            );
            return Err(Error::shape("index q", expected, self.q.shape()));
        }
        if let Some(weights) = self.weights.filter(|weights| weights.dim() != (batch, heads, len)) {
            let expected =
                format!("[batch, index_heads, q_len] = [{batch}, {heads}, {len}] as index q has it");
            return Err(Error::shape("index weights", expected, weights.shape()));
        }
        match self.keys {
            IndexKeys::Array(k) if k.dim().1 != heads.min(1) || k.dim().3 != dim => {
                let expected =
                    format!("[batch, 1, keys, index_dim] with index_dim = {dim} as index q has it");
                Err(Error::shape("index k", expected, k.shape()))
            }
            IndexKeys::Cache(cache) if (cache.shape().kv_heads, cache.shape().head_dim) != (1, dim) => {
                let expected = format!("a cache of one head of {dim} as index q has it");
                Err(Error::value("index k", expected, format_args!("{:?}", cache.shape())))
            }
            _ => Ok(()),
        }
    }

    /// Whether there is an index key for whatever is scored. With `slots` the
    /// call is over a cache, where sequence `i` is that with number `slots(i)`.
    ///
    /// # Errors
    /// [`Error::Value`] if not, and [`Error::Conflict`] where pools cannot be
    /// told from each other.
    pub(crate) fn check_keys(
        &self,
        scheme: &Scheme,
        dims: &Dims,
        lengths: &Lengths<'_>,
        slots: Option<&dyn Fn(usize) -> usize>,
    ) -> Result<()> {
        let array = matches!(self.keys, IndexKeys::Array(_)) && slots.is_none();
        if array && dims.packed && scheme.cell() > 1 {
            return Err(Error::packed("pools of keys in an array"));
        }
        for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
            let (entry, start, slot) = match slots {
                Some(slot) => (sequence.index, 0, slot(sequence.index)),
                None => (sequence.batch, sequence.keys.start, sequence.index),
            };
            let have = match self.keys {
                IndexKeys::Array(k) if entry < k.dim().0 => k.dim().2.saturating_sub(start),
                IndexKeys::Array(_) => 0,
                IndexKeys::Cache(cache) => cache.lengths().get(slot).copied().unwrap_or(0),
            };
            let want = scheme.rows(sequence.keys.len(), true);
            if have < want && self.q.dim().1 > 0 {
                let expected = format!("{want} index keys or more for sequence {}", sequence.index);
                return Err(Error::value("index k", expected, have));
            }
        }
        Ok(())
    }

    /// An index key, as definitions read it: of an entry of the batch, or of a
    /// sequence of the cache.
    pub(crate) fn row(&self, batch: usize, slot: usize, j: usize) -> Vec<f64> {
        use crate::input::Sequence;
        use crate::keys::source::At;
        use crate::simd::Isa;
        match self.keys {
            IndexKeys::Array(k) => k.slice(ndarray::s![batch, 0, j, ..]).iter().map(|x| x.to_f64()).collect(),
            IndexKeys::Cache(cache) => {
                let sequence = Sequence { index: slot, batch, slot, queries: 0..0, keys: 0..j + 1 };
                let mut room = vec![0.0; self.q.dim().3];
                let at = At { sequence: &sequence, kv_head: 0, keys: j..j + 1 };
                let row = cache.source().keys(Isa::Scalar, &at, &mut room);
                (0..self.q.dim().3).map(|c| f64::from(row.at(0, c))).collect()
            }
        }
    }
}

/// What is attended to (arrays or a cache), with an index branch.
#[derive(Clone, Copy, Debug)]
pub struct Indexed<'a, X, I> {
    /// Queries, keys and values.
    pub x: X,
    /// What selects among the keys.
    pub branch: IndexBranch<'a, I>,
}

impl<'a, X, I> Indexed<'a, X, I> {
    /// Both together.
    pub fn new(x: X, branch: IndexBranch<'a, I>) -> Self {
        Self { x, branch }
    }
}

impl<X: Input, I: Element> Input for Indexed<'_, X, I> {
    type Out = X::Out;

    fn dims(&self) -> Result<Dims> {
        let dims = self.x.dims()?;
        self.branch.check(self.x.out_dim()?)?;
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        self.x.out_dim()
    }
}
