//! Selective Self-Attention: temperatures of queries and of values.

use ndarray::{Array3, ArrayView3};

use crate::attention::{Cost, Input};
use crate::card::{Extras, carded, exhibit};
use crate::definition::softmax::{Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::{Call, Gains, Norm};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::mask::{Causal, Mask, Unmasked};
use crate::score::{Plain, Score};
use crate::stages::attend::{Attending, Config, Options, attending, common_options, mergeable};

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
    /// Reborrows.
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

impl<T: Element> Input for Tempered<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

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

/// Selective Self-Attention: temperatures of queries and of values.
///
/// ```text
/// s_ij = temperature_q(i) * scale * q_i . k_j
/// o_i  = sum_j softmax_j(s_ij) temperature_v(j) v_j
/// ```
///
/// "Selective Attention: Enhancing Transformer through Principled Context
/// Control" (arXiv 2411.12892). A temperature is a number that the model
/// computes from a token and its position: [`token_temperature`] is the
/// paper's, [`position_temperature`] the released code's, which leaves values
/// alone.
///
/// Cost: as [`Dense`](super::Dense), with two more factors a row.
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

impl<T: Element, M: Mask, F: Score> Attending<Tempered<'_, T>> for Selective<M, F> {
    fn with_call<R>(&self, x: Tempered<'_, T>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        x.dims()?;
        let x = x.reborrow();
        Ok(run(&self.config.call(x.qkv, Norm::Softmax { sinks: None }, Some(x.gains()))?))
    }

    fn define(&self, x: Tempered<'_, T>) -> Result<Reference> {
        x.dims()?;
        let x = x.reborrow();
        let normalisation = Normalisation::Softmax { sinks: None };
        self.config.definition(x.qkv, normalisation, Some(x.gains()))?.compute()
    }

    fn price(&self, x: Tempered<'_, T>) -> Result<Cost> {
        x.dims()?;
        self.config.cost(&x.qkv)
    }
}

// Weights are those before the temperatures of values.
attending!(Selective<M, F> where [M: Mask, F: Score], [T] Tempered);
mergeable!(Selective<M, F> where [M: Mask, F: Score], [T] Tempered);

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

exhibit! {
    SelectiveExhibit of Selective<Causal>, "dense", "selective", "arXiv 2411.12892";
    "causal, with a temperature for each query and each value";
    not "where the model has no temperatures: dense attention is the same without them";
    tokens false;
    build(_, _) { Selective::builder().causal() }
    extras(x, field) {
        let ((batch, heads, len, _), (_, kv_heads, kv_len, _)) = (x.q.dim(), x.v.dim());
        let temperatures = |which, heads, len| {
            let at = |(_, h, i): (usize, usize, usize)| token_temperature(field.at(which, h, i, 0), -2.0, i + 1);
            Array3::from_shape_fn((batch, heads, len), at)
        };
        let (decays, betas) = (temperatures(1, heads, len), temperatures(2, kv_heads, kv_len));
        Extras { decays, betas, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> Tempered<'a, T> {
        Tempered { qkv: x, query: extras.decays.view(), value: extras.betas.view() }
    }
}
carded!(Selective<M, F> where [M: Mask, F: Score], SelectiveExhibit);
