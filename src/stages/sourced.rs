//! Inputs that keys are selected from: arrays and caches.

use ndarray::Array4;

use crate::cache::{Cache, Cached};
use crate::element::Element;
use crate::error::Result;
use crate::input::Qkv;
use crate::select::Source;
use crate::simd::Isa;
use crate::stages::selecting::{Attended, with_source};

/// An input that keys are selected from.
pub(crate) trait Sourced: Attended {
    /// Calls `run` with what is selected from.
    fn with_source<R>(self, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R>;

    /// The queries and the keys.
    fn exact(self) -> Result<[Array4<f64>; 2]>;
}

impl<Q: Element, K: Element, O: Element> Sourced for Qkv<'_, Q, K, O> {
    fn with_source<R>(self, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R> {
        run(&Source::new(isa, self.reborrow(), None)?)
    }

    fn exact(self) -> Result<[Array4<f64>; 2]> {
        Ok([self.q.mapv(Element::to_f64), self.k.mapv(Element::to_f64)])
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Sourced for Cached<'_, Q, C, O> {
    fn with_source<R>(self, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R> {
        with_source(isa, self, run)
    }

    fn exact(self) -> Result<[Array4<f64>; 2]> {
        Ok([self.q.mapv(Element::to_f64), self.held(&self.dims()?).k.mapv(f64::from)])
    }
}
