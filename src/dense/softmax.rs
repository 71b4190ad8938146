//! Scaled dot-product attention: multi-head, grouped, multi-query.

use ndarray::{Array3, ArrayView4};

use crate::attention::Cost;
use crate::cache::{Cache, Cached};
use crate::card::{carded, exhibit};
use crate::definition::softmax::{Normalisation, Reference};
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::mask::{Mask, Unmasked};
use crate::score::smooth::AnySmooth;
use crate::score::{self, Plain, Score};
use crate::stages::attend::{Attending, Config, Options, attending, common_options, mergeable};
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, shapes, smooth};

/// Scaled dot-product attention: multi-head, grouped, multi-query.
///
/// ```text
/// s_ij = score(scale * q_i . k_j)            for visible keys j
/// o_i  = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(sink))
/// ```
///
/// Query head `h` reads key/value head `h / (q_heads / kv_heads)`. From
/// "Attention Is All You Need" (arXiv 1706.03762), grouped heads from "GQA"
/// (arXiv 2305.13245), the tiled evaluation from "FlashAttention" (arXiv
/// 2205.14135) and "Online normalizer calculation for softmax" (arXiv
/// 1805.02867).
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair; memory linear in
/// the lengths. Where most weights are known to be near zero, the sparse
/// mechanisms do less work.
///
/// ```
/// use attention_kernels::{Attention, dense::Dense, input::Qkv};
/// use ndarray::Array4;
///
/// let q = Array4::<f32>::ones((1, 8, 5, 64)); // batch, query heads, queries, head_dim
/// let k = Array4::<f32>::ones((1, 2, 9, 64)); // batch, key/value heads, keys, head_dim
/// let v = Array4::<f32>::ones((1, 2, 9, 32)); // batch, key/value heads, keys, value_dim
/// let dense = Dense::builder().causal().build()?;
/// let out = dense.forward(Qkv::new(q.view(), k.view(), v.view()))?;
/// assert_eq!(out.dim(), (1, 8, 5, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Semantics
/// - A query with no visible key gives 0, and an LSE of -inf. A score is a
///   number of `f32`; one that is finite is visible, however low: where all
///   are `f32::MIN`, the output is the mean of the values.
/// - What is masked cannot matter, NaN and infinity included; a NaN that is
///   visible shows.
/// - The bits of a row depend on its own sequence and that sequence's
///   lengths, not on the number of threads nor on what else is in the batch.
/// - The error against exact arithmetic is bounded:
///   [`ERROR_CONSTANT`](crate::attention::ERROR_CONSTANT).
#[doc(alias = "sdpa")]
#[doc(alias = "scaled_dot_product_attention")]
#[doc(alias = "flash")]
#[doc(alias = "gqa")]
#[doc(alias = "mha")]
#[derive(Clone, Debug)]
pub struct Dense<M = Unmasked, F = Plain> {
    config: Config<M, F>,
    sinks: Option<Vec<f32>>,
}

/// Builds a [`Dense`].
#[derive(Clone, Debug, Default)]
pub struct DenseBuilder<M = Unmasked, F = Plain> {
    options: Options<M, F>,
    sinks: Option<Vec<f32>>,
}

impl Dense {
    /// Everything visible, scores as they are, no sinks.
    pub fn builder() -> DenseBuilder {
        DenseBuilder::default()
    }
}

common_options!(DenseBuilder { sinks });

impl<M: Mask, F: Score> DenseBuilder<M, F> {
    /// A logit for each query head that takes part in the normalisation but
    /// has no value ("attention sink"); -inf is none. The LSE leaves it out,
    /// so that partial results merge: compute them without sinks and apply
    /// [`merge::apply_sinks`](crate::merge::apply_sinks) in the end.
    pub fn sinks(self, sinks: impl Into<Vec<f32>>) -> Self {
        Self { sinks: Some(sinks.into()), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is not finite or a sink that is NaN
    /// or +inf, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Dense<M, F>> {
        if let Some(sink) = self.sinks.iter().flatten().find(|sink| sink.is_nan() || **sink == f32::INFINITY)
        {
            return Err(Error::value("sinks", "finite logits or -inf", sink));
        }
        Ok(Dense { config: self.options.build()?, sinks: self.sinks })
    }
}

impl<M: Mask, F: Score> Dense<M, F> {
    /// The sinks that it was built with.
    pub fn sinks(&self) -> Option<&[f32]> {
        self.sinks.as_deref()
    }

    fn check_sinks(&self, heads: usize) -> Result<()> {
        match &self.sinks {
            Some(sinks) if sinks.len() != heads => {
                Err(Error::value("sinks", format!("one for each of the {heads} query heads"), sinks.len()))
            }
            _ => Ok(()),
        }
    }

    /// The definition's LSE, `[batch, q_heads, q_len]`.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn reference_lse<Q: Element, K: Element, O: Element>(
        &self,
        x: Qkv<'_, Q, K, O>,
    ) -> Result<Array3<f64>> {
        Ok(self.define(x)?.lse)
    }
}

impl<Q: Element, K: Element, O: Element, M: Mask, F: Score> Attending<Qkv<'_, Q, K, O>> for Dense<M, F> {
    fn with_call<R>(&self, x: Qkv<'_, Q, K, O>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        self.check_sinks(x.q.dim().1)?;
        let norm = Norm::Softmax { sinks: self.sinks.as_deref() };
        Ok(run(&self.config.call(x.reborrow(), norm, None)?))
    }

    fn define(&self, x: Qkv<'_, Q, K, O>) -> Result<Reference> {
        self.check_sinks(x.q.dim().1)?;
        let normalisation = Normalisation::Softmax { sinks: self.sinks.as_deref() };
        self.config.definition(x.reborrow(), normalisation, None)?.compute()
    }

    fn price(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        self.check_sinks(x.q.dim().1)?;
        self.config.cost(&x)
    }
}

impl<Q, C, O, M, F> Attending<Cached<'_, Q, C, O>> for Dense<M, F>
where
    Q: Element,
    C: Cache + ?Sized,
    O: Element,
    M: Mask,
    F: Score,
{
    fn with_call<R>(&self, x: Cached<'_, Q, C, O>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        self.check_sinks(x.q.dim().1)?;
        let norm = Norm::Softmax { sinks: self.sinks.as_deref() };
        self.config.with_whole_cache(x.reborrow(), norm, run)
    }

    fn define(&self, x: Cached<'_, Q, C, O>) -> Result<Reference> {
        self.check_sinks(x.q.dim().1)?;
        let normalisation = Normalisation::Softmax { sinks: self.sinks.as_deref() };
        self.config.define_whole_cache(x.reborrow(), normalisation)
    }

    fn price(&self, x: Cached<'_, Q, C, O>) -> Result<Cost> {
        self.check_sinks(x.q.dim().1)?;
        self.config.cost_cached(&x)
    }
}

attending!(Dense<M, F> where [M: Mask, F: Score], [Q, K, O] Qkv);
mergeable!(Dense<M, F> where [M: Mask, F: Score], [Q, K, O] Qkv);
attending!(Dense<M, F> where [M: Mask, F: Score], caches);
mergeable!(Dense<M, F> where [M: Mask, F: Score], caches);

impl<Q: Element, K: Element, O: Element, M: Mask, F: score::Smooth> Smooth<Qkv<'_, Q, K, O>> for Dense<M, F> {
    fn with_smooth<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        self.with_call(x, |call| run(call, self.config.smooth()))
    }

    fn define_back(
        &self,
        x: Qkv<'_, Q, K, O>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        let normalisation = Normalisation::Softmax { sinks: self.sinks.as_deref() };
        let definition = self.config.definition(x.reborrow(), normalisation, None)?;
        softmax_backward::gradients(&definition, self.config.smooth(), d_out, saved.softmax)
    }

    fn shapes(&self, x: Qkv<'_, Q, K, O>) -> Result<Shapes> {
        let sinks = self.sinks.as_ref().map(Vec::len);
        Ok(Shapes { sinks, ..shapes(&x) }.of_score(self.config.smooth()))
    }
}

smooth!(Dense<M, F> where [M: Mask, F: score::Smooth], [Q, K, O] Qkv);

exhibit! {
    DenseExhibit of Dense, "dense", "dense", "arXiv 1706.03762, 2305.13245";
    "scaled dot-product attention: multi-head, grouped, multi-query";
    not "where most weights are known to be near zero: sparse mechanisms do less work";
    tokens false;
    build(_, _) { Dense::builder() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Dense<M, F> where [M: Mask, F: Score], DenseExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Bounded, Weights};
    use crate::definition::cascade::{one_pass, three_passes, two_passes};
    use crate::testing::qkv::Qkvs;
    use ndarray::s;

    /// FuseMax's cascades agree with the definition that reference and bound come from,
    /// and the kernel keeps to its bound against each.
    #[test]
    fn cascades_are_softmax_attention() {
        // Scores of some thousands, and many keys before a query that nobody sees.
        let mut x = Qkvs::new([1, 2, 1, 70, 150, 12, 9], 1);
        x.q.slice_mut(s![.., .., 3, ..]).mapv_inplace(|x| 1e3 * x);
        let dense = Dense::builder().causal().build().unwrap();
        let (got, bound) = (dense.forward(x.qkv()).unwrap(), dense.error_bound(x.qkv()).unwrap());
        let (want, scores) = (dense.reference(x.qkv()).unwrap(), dense.reference_scores(x.qkv()).unwrap());
        let v = x.v.mapv(f64::from);
        for tile in [1, 64, 7, 150] {
            for (h, i) in ndarray::indices((2, 70)) {
                let (scores, v) = (scores.slice(s![0, h, i, ..]), v.slice(s![0, 0, .., ..]));
                let cascades =
                    [three_passes(scores, v), two_passes(scores, v, tile), one_pass(scores, v, tile)];
                for cascade in cascades {
                    for (c, x) in cascade.out.iter().enumerate() {
                        assert!((x - want[[0, h, i, c]]).abs() < 1e-13, "{} passes", cascade.passes);
                        assert!((f64::from(got[[0, h, i, c]]) - x).abs() <= bound[[0, h, i]]);
                    }
                }
            }
        }
    }
}
