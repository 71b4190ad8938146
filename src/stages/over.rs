//! Inputs over which a configured call runs: arrays, and queries over a cache.

use crate::attention::{Cost, Input};
use crate::cache::{Cache, Cached};
use crate::definition::softmax::{Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::mask::Mask;
use crate::score::Score;
use crate::stages::attend::Config;

const NORM: Norm<'static> = Norm::Softmax { sinks: None };
const NORMALISATION: Normalisation<'static> = Normalisation::Softmax { sinks: None };

/// What softmax attention of any configuration takes.
pub(crate) trait Over: Input {
    /// Hands `run` the call, which has been checked then.
    fn over<M: Mask, F: Score, R>(self, config: &Config<M, F>, run: impl FnOnce(&Call<'_>) -> R)
    -> Result<R>;

    /// The definition of the same.
    fn defined<M: Mask, F: Score>(self, config: &Config<M, F>) -> Result<Reference>;

    /// Refuses keys whose numbers are not those of tokens: where heads hold other tokens.
    fn in_order(&self, option: &'static str) -> Result<()> {
        let _ = option;
        Ok(())
    }

    /// What the call costs.
    fn priced<M: Mask, F: Score>(self, config: &Config<M, F>) -> Result<Cost>;
}

impl<Q: Element, K: Element, O: Element> Over for Qkv<'_, Q, K, O> {
    fn over<M: Mask, F: Score, R>(
        self,
        config: &Config<M, F>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        Ok(run(&config.call(self.reborrow(), NORM, None)?))
    }

    fn defined<M: Mask, F: Score>(self, config: &Config<M, F>) -> Result<Reference> {
        config.definition(self.reborrow(), NORMALISATION, None)?.compute()
    }

    fn priced<M: Mask, F: Score>(self, config: &Config<M, F>) -> Result<Cost> {
        config.cost(&self)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Over for Cached<'_, Q, C, O> {
    fn over<M: Mask, F: Score, R>(
        self,
        config: &Config<M, F>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        config.with_whole_cache(self.reborrow(), NORM, run)
    }

    fn defined<M: Mask, F: Score>(self, config: &Config<M, F>) -> Result<Reference> {
        config.define_whole_cache(self.reborrow(), NORMALISATION)
    }

    fn in_order(&self, option: &'static str) -> Result<()> {
        let reason = "a number of a key is then another token for each head";
        let conflict = Error::Conflict { option, with: "heads that hold other tokens", reason };
        let differ = |missing: &[usize]| missing.iter().any(|&n| n > 0);
        if self.cache.missing().is_some_and(differ) { Err(conflict) } else { Ok(()) }
    }

    fn priced<M: Mask, F: Score>(self, config: &Config<M, F>) -> Result<Cost> {
        config.cost_cached(&self)
    }
}
