//! FIT: tokens in groups with local attention, and a few latents for each group
//! with global attention.

use ndarray::ArrayView4;

use crate::attention::Cost;
use crate::card::{carded, exhibit};
use crate::definition::softmax::{Definition, Normalisation, Reference};
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::keys::grid::Grid;
use crate::mask::{Groups, mask_fn};
use crate::score::Plain;
use crate::score::smooth::AnySmooth;
use crate::stages::attend::{Attending, Config, Options, attending, mergeable};
use crate::stages::attend_backward::{
    SavedForward, Shapes, Smooth, define_back, shapes, smooth, with_smooth,
};
use crate::stages::options::{FINITE, options};

/// FIT: tokens in groups with local attention, and a few latents for each group
/// with global attention.
///
/// ```text
/// local    x_g <- attention of x_g over x_g                       for each group g
/// read     z_g <- attention of z_g over x_g
/// global   z_g <- attention of z_g over all z, or z_1 .. z_g
/// write    x_g <- attention of x_g over z_g
/// ```
///
/// "FIT: Far-reaching Interleaved Transformers" (arXiv 2305.12689) has `t`
/// groups of `n` tokens and `m` latents, and repeats these four, with
/// projections, layer norms and residuals of the model around each. All are
/// attention between groups of neighbours: of queries and of keys as many, and
/// of any sizes.
///
/// Cost: `2 (head_dim + value_dim)` flops for each key of a query's group, or of
/// all up to it.
///
/// Attention between groups of queries and groups of keys.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::Fit};
/// use ndarray::Array4;
///
/// // 16 groups of 64 tokens, each with 4 latents.
/// let (x, z) = (Array4::<f32>::ones((1, 2, 16 * 64, 16)), Array4::<f32>::ones((1, 2, 16 * 4, 16)));
/// let fit = Fit::builder(16).build()?;
/// let local = fit.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// let read = fit.forward(Qkv::new(z.view(), local.view(), local.view()))?;
/// let global = Fit::builder(16).earlier().build()?.forward(Qkv::new(z.view(), read.view(), read.view()))?;
/// let write = fit.forward(Qkv::new(x.view(), global.view(), global.view()))?;
/// assert_eq!(write.dim(), x.dim());
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Fit {
    config: Config<Groups, Plain>,
}

impl Fit {
    /// So many groups: a query sees the keys of its own.
    pub fn builder(groups: usize) -> FitBuilder {
        FitBuilder::with(groups)
    }
}

options! {
    /// Builds a [`Fit`].
    FitBuilder of Fit, isa;
    given { groups: usize; }
    own { scale: Option<f32> = None, in FINITE; }
    flags {
        /// A query sees the keys of earlier groups, too: the global layers of a
        /// causal model.
        earlier;
    }
    build(builder, config) {
        let FitBuilder { groups, earlier: before, scale, .. } = builder;
        if groups == 0 {
            return Err(Error::value("groups", "at least 1", groups));
        }
        let mask = Groups { groups, before };
        Ok(Fit { config: Options { mask, score: Plain, scale, isa: Some(config.isa) }.build()? })
    }
}

impl FitBuilder {
    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Fit {
    fn check<Q: Element, K: Element, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<()> {
        let (dims, groups) = (x.dims()?, self.config.mask().groups);
        for sequence in (0..dims.batch).map(|i| x.lengths.sequence(&dims, i)) {
            for (argument, len) in [("q", sequence.queries.len()), ("k", sequence.keys.len())] {
                if !len.is_multiple_of(groups) {
                    return Err(Error::value(argument, format!("a multiple of the {groups} groups"), len));
                }
            }
        }
        Ok(())
    }
}

impl<Q: Element, K: Element, O: Element> Attending<Qkv<'_, Q, K, O>> for Fit {
    fn with_call<R>(&self, x: Qkv<'_, Q, K, O>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        self.check(&x)?;
        Ok(run(&self.config.call(x.reborrow(), Norm::Softmax { sinks: None }, None)?))
    }

    fn define(&self, x: Qkv<'_, Q, K, O>) -> Result<Reference> {
        self.check(&x)?;
        let Groups { groups, before } = *self.config.mask();
        let mask = mask_fn(|site, query, key| {
            let (g, h) = (query * groups / site.q_len, key * groups / site.kv_len);
            g == h || (before && h < g)
        });
        let normalisation = Normalisation::Softmax { sinks: None };
        let Definition { x, dims, scale, .. } = self.config.definition(x.reborrow(), normalisation, None)?;
        Definition { x, dims, mask: &mask, score: &Plain, scale, normalisation, gains: None, extra: None }
            .compute()
    }

    fn price(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        self.check(&x)?;
        self.config.cost(&x)
    }
}

attending!(Fit, [Q, K, O] Qkv);
mergeable!(Fit, [Q, K, O] Qkv);

impl<Q: Element, K: Element, O: Element> Smooth<Qkv<'_, Q, K, O>> for Fit {
    fn with_smooth<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        self.check(&x)?;
        with_smooth(&self.config, x, run)
    }

    fn define_back(
        &self,
        x: Qkv<'_, Q, K, O>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        self.check(&x)?;
        define_back(&self.config, x, d_out, saved)
    }

    fn shapes(&self, x: Qkv<'_, Q, K, O>) -> Result<Shapes> {
        Ok(shapes(&x))
    }
}

smooth!(Fit, [Q, K, O] Qkv);

exhibit! {
    FitExhibit of Fit, "neighborhood", "FIT", "arXiv 2305.12689";
    "at most 8 groups of tokens, each attending to itself";
    not "without the latents that carry what is far: groups know nothing of each other";
    tokens true;
    build(x, _) { Fit::builder(Grid::divisor(x.q.dim().2, 8)) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Fit, FitExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Mergeable};
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, close, held};
    use ndarray::{Axis, concatenate};

    #[test]
    fn kernels_follow_the_definition() {
        for (groups, n, m) in [(4, 100, 8), (3, 6, 300), (1, 70, 50), (7, 7, 7), (5, 0, 5), (2, 260, 0)] {
            let x = Qkvs::new([2, 4, 2, n, m, 10, 7], 1);
            for fit in [Fit::builder(groups), Fit::builder(groups).earlier().scale(0.2)] {
                held(&fit.build().unwrap(), x.qkv());
            }
        }
    }

    #[test]
    fn groups_are_problems_of_their_own() {
        let x = Qkvs::new([1, 2, 2, 60, 15, 10, 7], 1);
        let (dense, fit) = (Dense::builder().build().unwrap(), Fit::builder(5).build().unwrap());
        let parts: Vec<_> = (0..5)
            .map(|g| dense.reference(x.slice(12 * g..12 * (g + 1), 3 * g..3 * (g + 1)).qkv()).unwrap())
            .collect();
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        close(&fit.reference(x.qkv()).unwrap(), &concatenate(Axis(2), &views).unwrap(), 1e-12);
        let one = Fit::builder(1).build().unwrap();
        close(&one.reference(x.qkv()).unwrap(), &dense.reference(x.qkv()).unwrap(), 1e-12);
        // Groups of one are causal attention, and none of the first sees another.
        let x = Qkvs::new([1, 2, 2, 20, 20, 10, 7], 1);
        let causal = Dense::builder().causal().build().unwrap().reference(x.qkv()).unwrap();
        close(&Fit::builder(20).earlier().build().unwrap().reference(x.qkv()).unwrap(), &causal, 1e-12);
        let (_, lse) = one.forward_with_lse(x.qkv()).unwrap();
        assert_eq!(lse, dense.forward_with_lse(x.qkv()).unwrap().1);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(Fit::builder(0).build().unwrap_err().to_string(), "groups: expected at least 1, got 0");
        let x = Qkvs::new([1, 1, 1, 8, 6, 10, 7], 1);
        let refusal = Fit::builder(4).build().unwrap().forward(x.qkv()).unwrap_err().to_string();
        assert_eq!(refusal, "k: expected a multiple of the 4 groups, got 6");
    }
}
