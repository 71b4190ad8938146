//! Selective Self-Attention: temperatures of queries and of values.
//!
//! ```text
//! s_ij = temperature_q(i) * scale * q_i . k_j
//! o_i  = sum_j softmax_j(s_ij) temperature_v(j) v_j
//! ```
//!
//! "Selective Attention: Enhancing Transformer through Principled Context
//! Control" (arXiv 2411.12892). A temperature is a number that the model
//! computes from a token and its position: [`token_temperature`] is the
//! paper's, [`position_temperature`] the released code's, which leaves values
//! alone.
//!
//! Cost: as [`Dense`](super::Dense), with two more factors a row.

use ndarray::{Array3, Array4, ArrayView3, ArrayViewMut3, ArrayViewMut4, Axis};

use crate::attention::{Attention, Cost, Input, Mergeable, TopWeights, Weights};
use crate::dense::config::{Config, Options, check_lse, check_out, common_options};
use crate::dense::reference::{Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::{Call, Gains, Norm};
use crate::engine::workspace::Workspace;
use crate::engine::{self, weights};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::mask::{Mask, Unmasked};
use crate::score::{Plain, Score};

/// Queries, keys and values with temperatures.
#[derive(Clone, Copy, Debug)]
pub struct Tempered<'a, T> {
    /// Queries, keys and values.
    pub qkv: Qkv<'a, T>,
    /// Temperatures of queries, `[batch, q_heads, q_len]`.
    pub query: ArrayView3<'a, f32>,
    /// Temperatures of values, `[batch, kv_heads, kv_len]`.
    pub value: ArrayView3<'a, f32>,
}

impl<'a, T> Tempered<'a, T> {
    /// The same for a shorter while.
    pub fn reborrow<'b>(self) -> Tempered<'b, T>
    where
        'a: 'b,
    {
        Tempered { qkv: self.qkv.reborrow(), query: self.query.reborrow(), value: self.value.reborrow() }
    }

    fn gains(&self) -> Gains<'_> {
        Gains { query: self.query.reborrow(), value: self.value.reborrow() }
    }
}

impl<T> Input for Tempered<'_, T> {
    fn dims(&self) -> Result<Dims> {
        let dims = self.qkv.dims()?;
        let (batch, q_heads, q_len, _) = self.qkv.q.dim();
        let (_, kv_heads, kv_len, _) = self.qkv.v.dim();
        if self.query.dim() != (batch, q_heads, q_len) {
            let expected = format!("[batch, q_heads, q_len] = [{batch}, {q_heads}, {q_len}]");
            return Err(Error::shape("query temperatures", expected, self.query.shape()));
        }
        if self.value.dim() != (batch, kv_heads, kv_len) {
            let expected = format!("[batch, kv_heads, kv_len] = [{batch}, {kv_heads}, {kv_len}]");
            return Err(Error::shape("value temperatures", expected, self.value.shape()));
        }
        for (argument, x) in [("query temperatures", &self.query), ("value temperatures", &self.value)] {
            if let Some(x) = x.iter().find(|x| !x.is_finite()) {
                return Err(Error::value(argument, "finite numbers", x));
            }
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        self.dims()?;
        self.qkv.out_dim()
    }
}

/// Selective Self-Attention.
///
/// ```
/// use attention_kernels::{Attention, dense::{Selective, Tempered}, input::Qkv};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::<f32>::ones((1, 2, 4, 16));
/// let ones = Array3::<f32>::ones((1, 2, 4));
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = Selective::builder()
///     .causal()
///     .build()?
///     .forward(Tempered { qkv, query: ones.view(), value: ones.view() })?;
/// assert_eq!(out.dim(), (1, 2, 4, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Selective<M = Unmasked, F = Plain> {
    config: Config<M, F>,
}

/// Builds a [`Selective`].
#[derive(Clone, Debug, Default)]
pub struct SelectiveBuilder<M = Unmasked, F = Plain> {
    options: Options<M, F>,
}

impl Selective {
    /// Everything visible, scores as they are.
    pub fn builder() -> SelectiveBuilder {
        SelectiveBuilder::default()
    }
}

common_options!(SelectiveBuilder {});

impl<M: Mask, F: Score> SelectiveBuilder<M, F> {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is not finite, [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<Selective<M, F>> {
        Ok(Selective { config: self.options.build()? })
    }
}

impl<M: Mask, F: Score> Selective<M, F> {
    fn call<'a, T: Element>(&'a self, x: &'a Tempered<'a, T>) -> Result<Call<'a>> {
        x.dims()?;
        self.config.call(x.qkv.reborrow(), Norm::Softmax { sinks: None }, Some(x.gains()))
    }

    fn compute<T: Element>(&self, x: &Tempered<'_, T>) -> Result<Reference> {
        x.dims()?;
        let normalisation = Normalisation::Softmax { sinks: None };
        Ok(self.config.definition(x.qkv.reborrow(), normalisation, Some(x.gains()))?.compute())
    }
}

impl<T: Element, M: Mask, F: Score> Attention<T> for Selective<M, F> {
    type Input<'a>
        = Tempered<'a, T>
    where
        Self: 'a;

    fn name(&self) -> &'static str {
        "selective"
    }

    fn workspace_bytes(&self, x: Tempered<'_, T>) -> Result<usize> {
        let x = x.reborrow();
        Ok(engine::workspace_bytes(&self.call(&x)?))
    }

    fn forward_into(
        &self,
        x: Tempered<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let x = x.reborrow();
        let call = self.call(&x)?;
        check_out(&x.qkv, &out)?;
        engine::run(&call, out, None, workspace);
        Ok(())
    }

    fn reference(&self, x: Tempered<'_, T>) -> Result<Array4<f64>> {
        Ok(self.compute(&x.reborrow())?.out)
    }

    fn error_bound(&self, x: Tempered<'_, T>) -> Result<Array3<f64>> {
        Ok(self.compute(&x.reborrow())?.bound)
    }

    fn cost(&self, x: Tempered<'_, T>) -> Result<Cost> {
        x.dims()?;
        self.config.cost(&x.qkv)
    }
}

impl<T: Element, M: Mask, F: Score> Mergeable<T> for Selective<M, F> {
    fn forward_with_lse_into(
        &self,
        x: Tempered<'_, T>,
        out: ArrayViewMut4<'_, T>,
        lse: ArrayViewMut3<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let x = x.reborrow();
        let call = self.call(&x)?;
        check_out(&x.qkv, &out)?;
        check_lse(&x.qkv, &lse)?;
        engine::run(&call, out, Some(lse.insert_axis(Axis(3))), workspace);
        Ok(())
    }
}

impl<T: Element, M: Mask, F: Score> Weights<T> for Selective<M, F> {
    /// The weights before the temperatures of values.
    fn weights(&self, x: Tempered<'_, T>) -> Result<Array4<f32>> {
        let x = x.reborrow();
        Ok(weights::materialize(&self.call(&x)?))
    }

    fn key_weights(&self, x: Tempered<'_, T>) -> Result<Array3<f32>> {
        let x = x.reborrow();
        Ok(weights::sum_over_queries(&self.call(&x)?))
    }

    fn top_weights(&self, x: Tempered<'_, T>, count: usize) -> Result<TopWeights> {
        let x = x.reborrow();
        weights::top(&self.call(&x)?, count)
    }

    fn reference_weights(&self, x: Tempered<'_, T>) -> Result<Array4<f64>> {
        Ok(self.compute(&x.reborrow())?.weights)
    }
}

/// The paper's temperature of a token: `tanh(feature) + 1 + sigmoid(alpha) ln
/// n`, where `feature` is what the model's small network says of the token,
/// `alpha` a learned number and `n` the token's position counted from 1 (its
/// absolute position: while decoding, not its place in the batch).
pub fn token_temperature(feature: f32, alpha: f32, n: usize) -> f32 {
    feature.tanh() + 1.0 + (n.max(1) as f32).ln() / (1.0 + (-alpha).exp())
}

/// The released code's temperature of a query: `1 + exp(-exp(beta)) ln n`,
/// where `beta` is learned (it starts at 1.5 or 2) and `n` is the position
/// counted from 1.
pub fn position_temperature(beta: f32, n: usize) -> f32 {
    1.0 + (-beta.exp()).exp() * (n.max(1) as f32).ln()
}
