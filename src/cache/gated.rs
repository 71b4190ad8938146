//! Queries over a cache, and the cache that a gate looks at.

use ndarray::ArrayView4;

use super::{Cache, Cached};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input};

/// Queries over a cache, and what a gate looks at: queries of the same shape and
/// another cache with keys of the same sequences, before the rotation by position.
///
/// The gate's cache has the heads, the `head_dim` and the lengths of the other; its
/// values are not read and may have no elements.
#[derive(Debug)]
pub struct GatedCache<'a, Q, C: ?Sized, G: ?Sized, O = Q> {
    /// What is attended to.
    pub cached: Cached<'a, Q, C, O>,
    /// The gate's queries, of the shape of the others.
    pub q: ArrayView4<'a, Q>,
    /// The gate's keys.
    pub keys: &'a G,
}

impl<Q, C: ?Sized, G: ?Sized, O> Clone for GatedCache<'_, Q, C, G, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, C: ?Sized, G: ?Sized, O> Copy for GatedCache<'_, Q, C, G, O> {}

impl<'a, Q, C: Cache + ?Sized, G: Cache + ?Sized, O> GatedCache<'a, Q, C, G, O> {
    /// The gate's queries over its cache.
    pub(crate) fn looked_at(self) -> Cached<'a, Q, G, O> {
        self.cached.over(self.q, self.keys)
    }

    fn dims(&self) -> Result<Dims> {
        let (q, want) = (self.q.shape(), self.cached.q.shape());
        if q != want {
            return Err(Error::shape("gate q", format!("that of what is attended to, {want:?}"), q));
        }
        let dims = self.cached.dims()?;
        let shape = self.keys.shape();
        if (shape.kv_heads, shape.head_dim) != (dims.kv_heads, dims.head_dim) {
            let expected = format!("{} heads of {}, as the cache has them", dims.kv_heads, dims.head_dim);
            let got = format_args!("{} of {}", shape.kv_heads, shape.head_dim);
            return Err(Error::value("gate keys", expected, got));
        }
        let slots = self.cached.slots();
        for slot in (0..dims.batch).map(|i| slots.slot(i)) {
            let (want, got) = (slots.lengths[slot], self.keys.lengths().get(slot).copied());
            if got != Some(want) {
                let expected = format!("{want} keys of sequence {slot}, as the cache has them");
                return Err(Error::value("gate keys", expected, got.unwrap_or(0)));
            }
        }
        Ok(dims)
    }
}

impl<Q: Element, C: Cache + ?Sized, G: Cache + ?Sized, O: Element> Input for GatedCache<'_, Q, C, G, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        GatedCache::dims(self)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.cached)
    }
}
