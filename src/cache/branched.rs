//! Queries over caches, and what branches have of their own.

use ndarray::ArrayView4;

use super::{Cache, Cached};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input};

/// Queries over a cache, the gates of the branches, and caches of what branches have of
/// their own: [`Branches`](crate::sparse::Branches) whose keys and values lie in caches.
///
/// A step of decoding appends its token, and a compressed key and value where the token
/// ends a pool; then one query attends.
#[derive(Debug)]
pub struct CachedBranches<'a, Q, C: ?Sized, O = Q> {
    /// What the selected blocks are of.
    pub cached: Cached<'a, Q, C, O>,
    /// `[batch, q_heads, q_len, 3]` as the queries have it: of pools, blocks and window.
    pub gates: ArrayView4<'a, f32>,
    /// Compressed keys and values of the same sequences, one for each pool that is whole.
    pub compressed: Option<&'a (dyn Cache + 'a)>,
    /// Keys and values of the window, of the same tokens.
    pub window: Option<&'a (dyn Cache + 'a)>,
}

impl<Q, C: ?Sized, O> Clone for CachedBranches<'_, Q, C, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, C: ?Sized, O> Copy for CachedBranches<'_, Q, C, O> {}

impl<'a, Q, C: Cache + ?Sized, O> CachedBranches<'a, Q, C, O> {
    /// With means as pools, which every call makes of all keys and values, and the same
    /// keys and values for all.
    pub fn new(cached: Cached<'a, Q, C, O>, gates: ArrayView4<'a, f32>) -> Self {
        Self { cached, gates, compressed: None, window: None }
    }

    /// With a cache of compressed keys and values.
    pub fn compressed(self, compressed: &'a (dyn Cache + 'a)) -> Self {
        Self { compressed: Some(compressed), ..self }
    }

    /// With a cache of the keys and values of the window.
    pub fn window(self, window: &'a (dyn Cache + 'a)) -> Self {
        Self { window: Some(window), ..self }
    }
}

impl<'a, Q: Element, C: Cache + ?Sized, O: Element> CachedBranches<'a, Q, C, O> {
    /// Refuses another cache that has not the rows for these sequences: of one that has so
    /// many keys as many as `want` gives, or, unless `exact`, more.
    pub(crate) fn check_other(
        &self,
        name: &'static str,
        other: &'a (dyn Cache + 'a),
        exact: bool,
        want: impl Fn(usize) -> usize,
    ) -> Result<()> {
        let (dims, shape) = (self.cached.dims()?, other.shape());
        let Dims { kv_heads, head_dim, value_dim, .. } = dims;
        if (shape.kv_heads, shape.head_dim, shape.value_dim) != (kv_heads, head_dim, value_dim) {
            let expected = format!("{kv_heads} heads of {head_dim} and {value_dim}, as the cache has them");
            let got = format_args!("{} of {} and {}", shape.kv_heads, shape.head_dim, shape.value_dim);
            return Err(Error::value(name, expected, got));
        }
        self.cached.over(self.cached.q, other).check_alike()?;
        let slots = self.cached.slots();
        for slot in (0..dims.batch).map(|i| slots.slot(i)) {
            let (want, got) = (want(slots.lengths[slot]), other.lengths().get(slot).copied());
            if got.is_none_or(|got| got < want || exact && got > want) {
                let more = if exact { "" } else { " or more" };
                let expected = format!("{want} rows{more} of sequence {slot}, as the cache asks for");
                return Err(Error::value(name, expected, got.unwrap_or(0)));
            }
        }
        Ok(())
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Input for CachedBranches<'_, Q, C, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        let dims = self.cached.dims()?;
        self.cached.check_alike()?;
        let (entries, q_heads, q_len, _) = self.cached.q.dim();
        if self.gates.dim() != (entries, q_heads, q_len, 3) {
            let expected = format!("[batch, q_heads, q_len, 3] = [{entries}, {q_heads}, {q_len}, 3]");
            return Err(Error::shape("gates", expected, self.gates.shape()));
        }
        if let Some(window) = self.window {
            self.check_other("window", window, true, |n| n)?;
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.cached)
    }
}
