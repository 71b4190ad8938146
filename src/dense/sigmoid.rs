//! Sigmoid attention (FlashSigmoid).
//!
//! ```text
//! o_i = sum_j sigmoid(score(scale * q_i . k_j) + bias) v_j      for visible keys j
//! ```
//!
//! "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (arXiv
//! 2409.04431). Weights of a row do not compete, so parts over disjoint keys
//! simply add up and there is no LSE. The paper recommends a bias of `-ln n`
//! with the sequence length `n`, which is the default; models are trained with
//! fixed ones too.
//!
//! Cost: as [`Dense`](super::Dense).

use ndarray::{Array3, Array4, ArrayViewMut4};

use crate::attention::{Attention, Cost, TopWeights, Weights};
use crate::dense::config::{Config, Options, check_out, common_options};
use crate::dense::reference::{Definition, Normalisation};
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::engine::workspace::Workspace;
use crate::engine::{self, weights};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::mask::{Mask, Unmasked};
use crate::score::{Plain, Score};

/// Sigmoid attention: each weight by itself.
///
/// ```
/// use attention_kernels::{Attention, dense::Sigmoid, input::Qkv};
/// use ndarray::Array4;
///
/// // All scores 0 and a bias of -ln 3: each of 3 weights is 1 / 4.
/// let q = Array4::<f32>::zeros((1, 1, 3, 16));
/// let v = Array4::<f32>::ones((1, 1, 3, 16));
/// let out = Sigmoid::builder().build()?.forward(Qkv::new(q.view(), q.view(), v.view()))?;
/// assert!(out.iter().all(|x| (x - 0.75).abs() < 1e-6));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sigmoid<M = Unmasked, F = Plain> {
    config: Config<M, F>,
    bias: Option<f32>,
}

/// Builds a [`Sigmoid`].
#[derive(Clone, Debug, Default)]
pub struct SigmoidBuilder<M = Unmasked, F = Plain> {
    options: Options<M, F>,
    bias: Option<f32>,
}

impl Sigmoid {
    /// Everything visible, scores as they are, bias `-ln kv_len`.
    pub fn builder() -> SigmoidBuilder {
        SigmoidBuilder::default()
    }
}

common_options!(SigmoidBuilder { bias });

impl<M: Mask, F: Score> SigmoidBuilder<M, F> {
    /// What is added to every score. Default: `-ln kv_len` of the sequence.
    pub fn bias(self, bias: f32) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale or bias that is not finite,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Sigmoid<M, F>> {
        if let Some(bias) = self.bias.filter(|bias| !bias.is_finite()) {
            return Err(Error::value("bias", "a finite number", bias));
        }
        Ok(Sigmoid { config: self.options.build()?, bias: self.bias })
    }
}

impl<M: Mask, F: Score> Sigmoid<M, F> {
    fn call<'a, T: Element>(&'a self, x: Qkv<'a, T>) -> Result<Call<'a>> {
        self.config.call(x, Norm::Sigmoid { bias: self.bias }, None)
    }

    fn definition<'a, T: Element>(&'a self, x: Qkv<'a, T>) -> Result<Definition<'a, T, M, F>> {
        self.config.definition(x, Normalisation::Sigmoid { bias: self.bias }, None)
    }
}

impl<T: Element, M: Mask, F: Score> Attention<T> for Sigmoid<M, F> {
    type Input<'a>
        = Qkv<'a, T>
    where
        Self: 'a;

    fn name(&self) -> &'static str {
        "sigmoid"
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
        self.config.cost(&x)
    }
}

impl<T: Element, M: Mask, F: Score> Weights<T> for Sigmoid<M, F> {
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
