//! Groups of tokens that are merged once and kept, and what attends to them.

use std::ops::Range;

use ndarray::{Array4, ArrayView4, s};

use super::{Cache, Cached};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::tokens::{self, Tokens};
use crate::input::{Dim4, Dims, Input, Qkv, filled};

/// Groups of tokens merged, `[batch, q_heads, groups, dim]` keys and values, kept
/// while decoding: of batch entries, or of the sequences of a cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Cores {
    pub(crate) k: Array4<f32>,
    pub(crate) v: Array4<f32>,
    pub(crate) counts: Vec<usize>,
}

impl Cores {
    pub(crate) fn none([entries, heads]: [usize; 2], [head_dim, value_dim]: [usize; 2]) -> Result<Self> {
        let none = |dim| filled("cores", (entries, heads, 0, dim), 0f32);
        let (k, v) = (none(head_dim)?, none(value_dim)?);
        Ok(Self { k, v, counts: vec![0; entries] })
    }

    /// How many groups are merged, of the sequence that has most.
    pub fn len(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(0)
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many groups of each sequence are merged.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.k.len() + self.v.len()) * size_of::<f32>()
    }

    pub(crate) fn views(&self) -> [ArrayView4<'_, f32>; 2] {
        [self.k.view(), self.v.view()]
    }

    /// Refuses those of other sizes.
    pub(crate) fn fit(&self, [entries, heads]: [usize; 2], dims: [usize; 2]) -> Result<()> {
        for (array, dim) in [&self.k, &self.v].into_iter().zip(dims) {
            let want = (entries, heads, array.dim().2, dim);
            if array.dim() != want {
                let expected = format!("[batch, q_heads, groups, dim] = {want:?}");
                return Err(Error::shape("cores", expected, array.shape()));
            }
        }
        Ok(())
    }

    /// Makes room for so many groups of each sequence.
    pub(crate) fn reserve(&mut self, groups: usize) -> Result<()> {
        let more = |x: &Array4<f32>| {
            let (entries, heads, n, dim) = x.dim();
            let mut more = filled("cores", (entries, heads, groups.max(n), dim), 0f32)?;
            more.slice_mut(s![.., .., ..n, ..]).assign(x);
            Ok(more)
        };
        if groups > self.k.dim().2 {
            (self.k, self.v) = (more(&self.k)?, more(&self.v)?);
        }
        Ok(())
    }

    /// Writes groups of some sequences, for which there is room.
    pub(crate) fn put(
        &mut self,
        entries: Range<usize>,
        groups: Range<usize>,
        merged: [ArrayView4<'_, f32>; 2],
    ) {
        for (to, from) in [&mut self.k, &mut self.v].into_iter().zip(merged) {
            to.slice_mut(s![entries.clone(), .., groups.clone(), ..]).assign(&from);
        }
        self.counts[entries].fill(groups.end);
    }
}

/// Queries, keys and values with [`Cores`] that were kept: the queries are
/// those of the last tokens.
#[derive(Debug)]
pub struct Cored<'a, T> {
    /// The arrays.
    pub qkv: Qkv<'a, T>,
    /// Of all groups that the queries see as such; more do no harm.
    pub cores: &'a Cores,
}

impl<'a, T> Cored<'a, T> {
    /// Both together.
    pub fn new<'b: 'a>(qkv: Qkv<'b, T>, cores: &'a Cores) -> Self {
        Self { qkv: qkv.reborrow(), cores }
    }
}

impl<T> Clone for Cored<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Cored<'_, T> {}

impl<T: Element> Input for Cored<'_, T> {
    type Out = T;

    fn dims(&self) -> Result<Dims> {
        self.qkv.dims()
    }

    fn out_dim(&self) -> Result<Dim4> {
        Input::out_dim(&self.qkv)
    }
}

impl<T: Element> Tokens for Cored<'_, T> {
    fn bytes(&self) -> usize {
        self.qkv.bytes() + self.cores.bytes()
    }
}

/// Queries over a cache, and the [`Cores`] of its sequences.
#[derive(Debug)]
pub struct CoredCache<'a, Q, C: ?Sized, O = Q> {
    /// Queries, and the keys and values of their sequences.
    pub cached: Cached<'a, Q, C, O>,
    /// Entry `s` of sequence `s` of the cache, as
    /// [`extend_cached`](crate::sparse::Cca::extend_cached) makes it.
    pub cores: &'a Cores,
}

impl<'a, Q, C: ?Sized, O> CoredCache<'a, Q, C, O> {
    /// Both together.
    pub fn new(cached: Cached<'a, Q, C, O>, cores: &'a Cores) -> Self {
        Self { cached, cores }
    }
}

impl<Q, C: ?Sized, O> Clone for CoredCache<'_, Q, C, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, C: ?Sized, O> Copy for CoredCache<'_, Q, C, O> {}

impl<Q: Element, C: Cache + ?Sized, O: Element> Input for CoredCache<'_, Q, C, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        let dims = self.cached.dims()?;
        self.cached.check_alike()?;
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.cached)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Tokens for CoredCache<'_, Q, C, O> {
    fn bytes(&self) -> usize {
        let tokens: usize = self.cached.cache.lengths().iter().sum();
        tokens::size(&self.cached.q) + tokens * self.cached.cache.token_bytes() + self.cores.bytes()
    }
}
