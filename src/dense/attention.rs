//! Scaled dot-product attention.

use ndarray::{Array4, ArrayViewMut3, ArrayViewMut4};

use crate::attention::{Attention, Cost, Input, Mergeable};
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Call, Norm};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::mask::{Causal, Mask, Unmasked};
use crate::score::{Plain, Score};
use crate::simd::Isa;

/// Scaled dot-product attention.
#[derive(Clone, Debug)]
pub struct Dense<M = Unmasked, F = Plain> {
    mask: M,
    score: F,
    scale: Option<f32>,
    sinks: Option<Vec<f32>>,
    isa: Isa,
}

/// Builds a [`Dense`].
#[derive(Clone, Debug, Default)]
pub struct DenseBuilder<M = Unmasked, F = Plain> {
    mask: M,
    score: F,
    scale: Option<f32>,
    sinks: Option<Vec<f32>>,
    isa: Option<Isa>,
}

impl Dense {
    /// Everything visible, scores as they are, scale `1 / sqrt(head_dim)`.
    pub fn builder() -> DenseBuilder {
        DenseBuilder::default()
    }
}

impl<M: Mask, F: Score> DenseBuilder<M, F> {
    /// Which keys a query may see.
    pub fn mask<N: Mask>(self, mask: N) -> DenseBuilder<N, F> {
        let Self { score, scale, sinks, isa, .. } = self;
        DenseBuilder { mask, score, scale, sinks, isa }
    }

    /// `mask(Causal::new())`
    pub fn causal(self) -> DenseBuilder<Causal, F> {
        self.mask(Causal::new())
    }

    /// What happens to scores.
    pub fn score<G: Score>(self, score: G) -> DenseBuilder<M, G> {
        let Self { mask, scale, sinks, isa, .. } = self;
        DenseBuilder { mask, score, scale, sinks, isa }
    }

    /// Forces an instruction set.
    pub fn isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// An instruction set that the CPU lacks.
    pub fn build(self) -> Result<Dense<M, F>> {
        let Self { mask, score, scale, sinks, isa } = self;
        Ok(Dense { mask, score, scale, sinks, isa: Isa::choose(isa)? })
    }
}

impl<M: Mask, F: Score> Dense<M, F> {
    fn call<'a, T: Element>(&'a self, x: Qkv<'a, T>) -> Result<Call<'a, T, M, F>> {
        let dims = x.dims()?;
        self.mask.check(&dims)?;
        self.score.check(&dims)?;
        let scale = self.scale.unwrap_or(1.0 / (dims.head_dim as f32).sqrt());
        let norm = Norm::Softmax { sinks: self.sinks.as_deref() };
        Ok(Call { x, dims, mask: &self.mask, score: &self.score, norm, scale, isa: self.isa })
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

    fn forward_into(&self, x: Qkv<'_, T>, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()> {
        let call = self.call(x.reborrow())?;
        engine::run(&call, out, None, workspace);
        Ok(())
    }

    fn reference(&self, x: Qkv<'_, T>) -> Result<Array4<f64>> {
        let call = self.call(x.reborrow())?;
        let mut out = Array4::zeros(x.out_dim()?);
        let group = call.group();
        for s in 0..call.dims.batch {
            let sequence = call.sequence(s);
            for h in 0..call.dims.q_heads {
                let (q, k, v) = (call.queries(&sequence, h), call.keys(&sequence, h / group), call.values(&sequence, h / group));
                let site = sequence.site(h);
                for i in 0..site.q_len {
                    let keys: Vec<_> = (0..site.kv_len).filter(|&j| self.mask.visible(&site, i, j)).collect();
                    let scores: Vec<f64> = keys.iter().map(|&j| {
                        let dot: f64 = (0..call.dims.head_dim).map(|c| q.at(i, c).to_f64() * k.at(j, c).to_f64()).sum();
                        self.score.define(&site, i, j, f64::from(call.scale) * dot)
                    }).collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    for c in 0..call.dims.value_dim {
                        let x: f64 = keys.iter().zip(&scores).map(|(&j, s)| (s - max).exp() * v.at(j, c).to_f64()).sum();
                        out[[sequence.batch, h, sequence.queries.start + i, c]] = if keys.is_empty() { 0.0 } else { x / sum };
                    }
                }
            }
        }
        Ok(out)
    }

    fn cost(&self, _: Qkv<'_, T>) -> Result<Cost> {
        Ok(Cost { flops: 0, bytes: 0 })
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
        engine::run(&call, out, Some(lse), workspace);
        Ok(())
    }
}
