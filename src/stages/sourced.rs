//! Inputs that keys are selected from: arrays and caches.

use ndarray::Array4;

use crate::attention::{Cost, Input};
use crate::cache::{Cache, Cached};
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::error::Result;
use crate::input::Qkv;
use crate::keys::Keys;
use crate::score::Plain;
use crate::select::Source;
use crate::simd::Isa;
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::selecting::{define, price, with_call, with_source};

/// An input that keys are selected from.
pub(crate) trait Sourced: Input {
    /// Calls `run` with what is selected from.
    fn with_source<R>(self, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R>;

    /// The queries and the keys.
    fn exact(self) -> Result<[Array4<f64>; 2]>;

    /// The call of an engine on a plan.
    fn with_call<R>(
        self,
        config: &Config<Order, Plain>,
        keys: Keys<'_>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R>;

    /// Its definition.
    fn define(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Reference>;

    /// What it costs.
    fn price(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Cost>;
}

impl<Q: Element, K: Element, O: Element> Sourced for Qkv<'_, Q, K, O> {
    fn with_source<R>(self, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R> {
        run(&Source::new(isa, self.reborrow(), None)?)
    }

    fn exact(self) -> Result<[Array4<f64>; 2]> {
        Ok([self.q.mapv(Element::to_f64), self.k.mapv(Element::to_f64)])
    }

    fn with_call<R>(
        self,
        config: &Config<Order, Plain>,
        keys: Keys<'_>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        with_call(config, self, keys, run)
    }

    fn define(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Reference> {
        define(config, self, keys)
    }

    fn price(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Cost> {
        price(config, &self, keys)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Sourced for Cached<'_, Q, C, O> {
    fn with_source<R>(self, isa: Isa, run: impl FnOnce(&Source<'_>) -> Result<R>) -> Result<R> {
        with_source(isa, self, run)
    }

    fn exact(self) -> Result<[Array4<f64>; 2]> {
        Ok([self.q.mapv(Element::to_f64), self.held(&self.dims()?).k.mapv(f64::from)])
    }

    fn with_call<R>(
        self,
        config: &Config<Order, Plain>,
        keys: Keys<'_>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        with_source(config.isa(), self, |source| keys.check(&source.dims, &source.lengths))?;
        let call = config.call_cached(self.reborrow(), Norm::Softmax { sinks: None })?;
        Ok(run(&Call { keys, ..call }))
    }

    fn define(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Reference> {
        let held = self.held(&self.dims()?);
        let lengths = held.lengths(&self);
        define(
            config,
            Qkv { q: self.q.reborrow(), k: held.k.view(), v: held.v.view(), lengths, out: self.out },
            keys,
        )
    }

    fn price(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Cost> {
        with_source(config.isa(), self, |source| keys.check(&source.dims, &source.lengths))?;
        config.listed(keys).cost_cached(&self)
    }
}
