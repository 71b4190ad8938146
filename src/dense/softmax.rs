//! Scaled dot-product attention: multi-head, grouped, multi-query.
//!
//! ```text
//! s_ij = score(scale * q_i . k_j)            for visible keys j
//! o_i  = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(sink))
//! ```
//!
//! Query head `h` reads key/value head `h / (q_heads / kv_heads)`. From
//! "Attention Is All You Need" (arXiv 1706.03762), grouped heads from "GQA"
//! (arXiv 2305.13245), the tiled evaluation from "FlashAttention" (arXiv
//! 2205.14135) and "Online normalizer calculation for softmax" (arXiv
//! 1805.02867).
//!
//! Cost: `2 (head_dim + value_dim)` flops a visible pair; memory linear in
//! the lengths. Where most weights are known to be near zero, the sparse
//! mechanisms do less work.

use ndarray::{Array3, Array4, ArrayViewMut3, ArrayViewMut4, Axis};

use crate::attention::{Attention, Cost, Mergeable, TopWeights, Weights};
use crate::dense::config::{Config, Options, check_lse, check_out, common_options};
use crate::dense::reference::{Definition, Normalisation};
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::engine::workspace::Workspace;
use crate::engine::{self, weights};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::mask::{Mask, Unmasked};
use crate::score::{Plain, Score};

/// Scaled dot-product attention; see the [module](crate::dense) for its kin.
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
/// - A query with no visible key gives 0, and an LSE of -inf.
/// - What is masked cannot matter, NaN and infinity included; a NaN that is
///   visible shows.
/// - The bits of a row depend on its own sequence and that sequence's
///   lengths, not on the number of threads nor on what else is in the batch.
/// - The error against exact arithmetic is bounded:
///   [`ERROR_CONSTANT`](crate::attention::ERROR_CONSTANT).
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
    /// The call of an engine.
    pub(crate) fn call<'a, T: Element>(&'a self, x: Qkv<'a, T>) -> Result<Call<'a>> {
        self.check_sinks(&x)?;
        self.config.call(x, Norm::Softmax { sinks: self.sinks.as_deref() }, None)
    }

    fn definition<'a, T: Element>(&'a self, x: Qkv<'a, T>) -> Result<Definition<'a, T, M, F>> {
        self.check_sinks(&x)?;
        self.config.definition(x, Normalisation::Softmax { sinks: self.sinks.as_deref() }, None)
    }

    fn check_sinks<T>(&self, x: &Qkv<'_, T>) -> Result<()> {
        let heads = x.q.dim().1;
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
    pub fn reference_lse<T: Element>(&self, x: Qkv<'_, T>) -> Result<Array3<f64>> {
        Ok(self.definition(x.reborrow())?.compute().lse)
    }
}

impl<T: Element, M: Mask, F: Score> Attention<T> for Dense<M, F> {
    type Input<'a>
        = Qkv<'a, T>
    where
        Self: 'a;

    fn name(&self) -> &'static str {
        "dense"
    }

    fn workspace_bytes(&self, x: Qkv<'_, T>) -> Result<usize> {
        Ok(engine::workspace_bytes(&self.call(x.reborrow())?))
    }

    fn forward_into(
        &self,
        x: Qkv<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let call = self.call(x.reborrow())?;
        check_out(&x, &out)?;
        engine::run(&call, out, None, workspace);
        Ok(())
    }

    fn reference(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        Ok(self.definition(x.reborrow())?.compute().out)
    }

    fn error_bound(&self, x: Qkv<'_, T>) -> Result<Array3<f64>> {
        Ok(self.definition(x.reborrow())?.compute().bound)
    }

    fn cost(&self, x: Qkv<'_, T>) -> Result<Cost> {
        self.check_sinks(&x)?;
        self.config.cost(&x)
    }
}

impl<T: Element, M: Mask, F: Score> Mergeable<T> for Dense<M, F> {
    fn forward_with_lse_into(
        &self,
        x: Qkv<'_, T>,
        out: ArrayViewMut4<'_, T>,
        lse: ArrayViewMut3<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let call = self.call(x.reborrow())?;
        check_out(&x, &out)?;
        check_lse(&x, &lse)?;
        engine::run(&call, out, Some(lse.insert_axis(Axis(3))), workspace);
        Ok(())
    }
}

impl<T: Element, M: Mask, F: Score> Weights<T> for Dense<M, F> {
    fn weights(&self, x: Qkv<'_, T>) -> Result<Array4<f32>> {
        Ok(weights::materialize(&self.call(x.reborrow())?))
    }

    fn key_weights(&self, x: Qkv<'_, T>) -> Result<Array3<f32>> {
        Ok(weights::sum_over_queries(&self.call(x.reborrow())?))
    }

    fn top_weights(&self, x: Qkv<'_, T>, count: usize) -> Result<TopWeights> {
        weights::top(&self.call(x.reborrow())?, count)
    }

    fn reference_weights(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        Ok(self.definition(x.reborrow())?.compute().weights)
    }
}
