//! Gated DeltaNet: the delta rule on a state that also forgets.
//!
//! ```text
//! S'_t = exp(g_t) S_{t-1}
//! S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T
//! o_t  = scale * q_t^T S_t
//! ```
//!
//! "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv
//! 2412.06464). `g_t` is one log decay a token and head, of at most 0: models
//! compute it as [`log_decay`](crate::math::delta_gates::log_decay) and `beta`
//! as [`beta`](crate::math::delta_gates::beta). With `g = 0` it is
//! [`DeltaNet`](crate::linear::DeltaNet). Values may have more heads than
//! queries and keys, as models of Qwen3-Next's kind have them: neighbours
//! share.
//!
//! Cost: as [`DeltaNet`](crate::linear::DeltaNet). Where channels are to
//! forget at rates of their own, [`Kda`](crate::linear::Kda).

use ndarray::{Array4, ArrayView3};

use crate::attention::Input;
use crate::card::{Extras, carded, exhibit, mild, share};
use crate::definition::recurrence::{Token, number};
use crate::element::Element;
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Arrays, Decay, Gate, Place, Source, Spec};
use crate::error::Result;
use crate::input::tokens::{bytes, heads};
use crate::input::tokens::{check_tokens, token_dims};
use crate::input::{Dims, Lengths, Qkv};
use crate::stages::delta_rule::DeltaRule;
use crate::stages::differentiate::{
    Differentiable, GatedDeltaGradients, differentiable, qkv_dims, token_dim,
};
use crate::stages::recur::{Options, linear_options};
use crate::stages::recur::{Recurrence, recurrent};

/// Queries, keys and values with a log decay and the weight of the correction
/// for each token: what [`GatedDeltaNet`] takes.
#[derive(Clone, Copy, Debug)]
pub struct GatedDeltaQkv<'a, T> {
    /// Queries and keys `[batch, heads, len, head_dim]`, values `[batch,
    /// heads, len, value_dim]`. The arrays may have different numbers of
    /// heads, each a divisor of the largest.
    pub qkv: Qkv<'a, T>,
    /// Natural logarithms of what a token leaves of the state, `[batch, heads,
    /// len]`: at most 0, -inf to forget everything.
    pub log_decay: ArrayView3<'a, f32>,
    /// How much of what is stored under its key a token replaces, `[batch,
    /// heads, len]`: as in [`DeltaQkv`](crate::linear::DeltaQkv).
    pub beta: ArrayView3<'a, f32>,
}

impl<'a, T> GatedDeltaQkv<'a, T> {
    /// The same for a shorter while.
    pub fn reborrow<'b>(self) -> GatedDeltaQkv<'b, T>
    where
        'a: 'b,
    {
        GatedDeltaQkv {
            qkv: self.qkv.reborrow(),
            log_decay: self.log_decay.reborrow(),
            beta: self.beta.reborrow(),
        }
    }
}

impl<T: Element> Input for GatedDeltaQkv<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

    fn dims(&self) -> Result<Dims> {
        let dims = token_dims(&self.qkv)?;
        let batch = self.qkv.q.dim().0;
        check_tokens("log_decay", &self.log_decay, batch, &dims)?;
        check_tokens("beta", &self.beta, batch, &dims)?;
        Ok(dims)
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        let dims = self.dims()?;
        Ok((self.qkv.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

/// Gated DeltaNet.
///
/// ```
/// use attention_kernels::math::delta_gates::{beta, log_decay};
/// use attention_kernels::{Attention, Qkv, linear::{GatedDeltaNet, GatedDeltaQkv}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let v = Array4::from_shape_fn((1, 4, 100, 64), |(_, h, t, c)| ((h * t + c) as f32).cos());
/// let raw = Array3::<f32>::zeros((1, 4, 100)); // what a projection gives
/// let (log_decay, beta) = (raw.mapv(|x| log_decay(x, -3.0, 0.0)), raw.mapv(|x| beta(x, false)));
///
/// let gated = GatedDeltaNet::builder().normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), v.view());
/// let out = gated.forward(GatedDeltaQkv { qkv, log_decay: log_decay.view(), beta: beta.view() })?;
/// assert_eq!(out.dim(), (1, 4, 100, 64)); // two value heads share each key
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GatedDeltaNet {
    rule: DeltaRule,
}

/// Builds a [`GatedDeltaNet`].
#[derive(Clone, Debug, Default)]
pub struct GatedDeltaNetBuilder {
    options: Options,
    normalize: bool,
}

impl GatedDeltaNet {
    /// Queries and keys as they are.
    pub fn builder() -> GatedDeltaNetBuilder {
        GatedDeltaNetBuilder::default()
    }
}

linear_options!(GatedDeltaNetBuilder, scale "1 / sqrt(head_dim)", growth);

impl GatedDeltaNetBuilder {
    /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
    pub fn normalize_qk(mut self) -> Self {
        self.normalize = true;
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for a scale that is not finite,
    /// [`Error::Isa`](crate::Error::Isa) for an instruction set that the CPU
    /// lacks.
    pub fn build(self) -> Result<GatedDeltaNet> {
        Ok(GatedDeltaNet { rule: DeltaRule { config: self.options.build()?, normalize: self.normalize } })
    }
}

recurrent!(GatedDeltaNet, GatedDeltaQkv);

impl Recurrence for GatedDeltaNet {
    type Operands<'a, T: Element> = GatedDeltaQkv<'a, T>;

    fn spec<'a, T: Element>(&'a self, x: &'a GatedDeltaQkv<'_, T>) -> Result<Spec<'a>> {
        let dims = x.dims()?;
        self.rule.config.check_decays("log_decay", x.log_decay)?;
        Ok(self.rule.spec(dims, x.qkv.lengths, Decay::Scalar))
    }

    fn with_source<T: Element, R>(&self, x: &GatedDeltaQkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let arrays = Arrays {
            decay: Gate::Token(x.log_decay),
            beta: Some(x.beta),
            ..Arrays::new(&x.qkv, heads(&x.qkv))
        };
        self.rule.with_source(arrays, x.qkv.q.dim().3, run)
    }

    fn token<T: Element>(&self, x: &GatedDeltaQkv<'_, T>, at: &Place) -> Token {
        let left = number(&x.log_decay, at, heads(&x.qkv)).exp();
        self.rule.token(&x.qkv, &x.beta, at, vec![left; x.qkv.q.dim().3])
    }

    fn bytes<T: Element>(&self, x: &GatedDeltaQkv<'_, T>) -> usize {
        bytes(&x.qkv) + (x.log_decay.len() + x.beta.len()) * size_of::<f32>()
    }
}

differentiable!(GatedDeltaNet, GatedDeltaQkv, GatedDeltaGradients);

impl Differentiable for GatedDeltaNet {
    type Gradients<A> = GatedDeltaGradients<A>;

    fn dims<T: Element>(&self, x: &GatedDeltaQkv<'_, T>) -> Gradients<Dim> {
        Gradients { decay: Some(token_dim(&x.log_decay)), beta: Some(token_dim(&x.beta)), ..qkv_dims(&x.qkv) }
    }

    fn definition_back<T: Element>(&self, x: &GatedDeltaQkv<'_, T>, gradients: &mut Gradients<Array4<f64>>) {
        self.rule.definition_back(&x.qkv, gradients);
    }
}

exhibit! {
    GatedDeltaNetExhibit of GatedDeltaNet, "linear", "Gated DeltaNet", "arXiv 2412.06464";
    "a value replaces what was under its key, and every token says how much is forgotten";
    not "where channels must forget at rates of their own: use KDA";
    tokens true;
    build(_, _) {
        GatedDeltaNet::builder().normalize_qk()
    }
    extras(x, field) {
        Extras { decays: field.tokens(1, x, mild), betas: field.tokens(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> GatedDeltaQkv<'a, T> {
        GatedDeltaQkv { qkv: x, log_decay: extras.decays.view(), beta: extras.betas.view() }
    }
}
carded!(GatedDeltaNet, GatedDeltaNetExhibit);
