//! Kimi Delta Attention: the delta rule on a state whose channels forget at
//! rates of their own.
//!
//! ```text
//! S'_t = diag(exp g_t) S_{t-1}
//! S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T
//! o_t  = scale * q_t^T S_t
//! ```
//!
//! "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv
//! 2510.26692). `g_t` is one log decay a token and channel of the keys, of at
//! most 0: models compute it as
//! [`log_decay`](crate::math::delta_gates::log_decay) or
//! [`bounded_log_decay`](crate::math::delta_gates::bounded_log_decay). Where
//! all channels have the same it is
//! [`GatedDeltaNet`](crate::linear::GatedDeltaNet), which is faster.
//!
//! Cost: as [`DeltaNet`](crate::linear::DeltaNet) by multiply-adds, and for the
//! decays as [`Gla`](crate::linear::Gla).

use ndarray::{Array4, ArrayView3, ArrayView4};

use crate::attention::Input;
use crate::card::{Extras, carded, exhibit, mild, share};
use crate::definition::recurrence::{Token, row};
use crate::element::Element;
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Arrays, Decay, Gate, Place, Source, Spec};
use crate::error::Result;
use crate::input::tokens::{bytes, heads};
use crate::input::tokens::{check_channels, check_tokens, token_dims};
use crate::input::{Dims, Lengths, Qkv};
use crate::stages::delta_rule::DeltaRule;
use crate::stages::differentiate::{Differentiable, KdaGradients, differentiable, qkv_dims, token_dim};
use crate::stages::recur::{Options, linear_options};
use crate::stages::recur::{Recurrence, recurrent};

/// Queries, keys and values with log decays of channels and the weights of the
/// corrections: what [`Kda`] takes.
#[derive(Clone, Copy, Debug)]
pub struct KdaQkv<'a, T> {
    /// Queries and keys `[batch, heads, len, head_dim]`, values `[batch,
    /// heads, len, value_dim]`. The arrays may have different numbers of
    /// heads, each a divisor of the largest.
    pub qkv: Qkv<'a, T>,
    /// Natural logarithms of what a token leaves of each channel of the
    /// state, `[batch, heads, len, head_dim]`: at most 0, -inf to forget the
    /// channel.
    pub log_decay: ArrayView4<'a, f32>,
    /// How much of what is stored under its key a token replaces, `[batch,
    /// heads, len]`: as in [`DeltaQkv`](crate::linear::DeltaQkv).
    pub beta: ArrayView3<'a, f32>,
}

impl<'a, T> KdaQkv<'a, T> {
    /// The same for a shorter while.
    pub fn reborrow<'b>(self) -> KdaQkv<'b, T>
    where
        'a: 'b,
    {
        KdaQkv { qkv: self.qkv.reborrow(), log_decay: self.log_decay.reborrow(), beta: self.beta.reborrow() }
    }
}

impl<T: Element> Input for KdaQkv<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

    fn dims(&self) -> Result<Dims> {
        let dims = token_dims(&self.qkv)?;
        let batch = self.qkv.q.dim().0;
        check_channels("log_decay", &self.log_decay, batch, &dims, dims.head_dim)?;
        check_tokens("beta", &self.beta, batch, &dims)?;
        Ok(dims)
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        let dims = self.dims()?;
        Ok((self.qkv.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

/// Kimi Delta Attention.
///
/// ```
/// use attention_kernels::math::delta_gates::bounded_log_decay;
/// use attention_kernels::{Attention, Qkv, linear::{Kda, KdaQkv}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let log_decay = x.mapv(|raw| bounded_log_decay(raw, 0.0, 0.0, -5.0));
/// let beta = Array3::from_elem((1, 2, 100), 0.5);
///
/// let kda = Kda::builder().normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = kda.forward(KdaQkv { qkv, log_decay: log_decay.view(), beta: beta.view() })?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Kda {
    rule: DeltaRule,
}

/// Builds a [`Kda`].
#[derive(Clone, Debug, Default)]
pub struct KdaBuilder {
    options: Options,
    normalize: bool,
}

impl Kda {
    /// Queries and keys as they are.
    pub fn builder() -> KdaBuilder {
        KdaBuilder::default()
    }
}

linear_options!(KdaBuilder, scale "1 / sqrt(head_dim)", growth);

impl KdaBuilder {
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
    pub fn build(self) -> Result<Kda> {
        Ok(Kda { rule: DeltaRule { config: self.options.build()?, normalize: self.normalize } })
    }
}

recurrent!(Kda, KdaQkv);

impl Recurrence for Kda {
    type Operands<'a, T: Element> = KdaQkv<'a, T>;

    fn spec<'a, T: Element>(&'a self, x: &'a KdaQkv<'_, T>) -> Result<Spec<'a>> {
        let dims = x.dims()?;
        self.rule.config.check_decays("log_decay", x.log_decay)?;
        Ok(self.rule.spec(dims, x.qkv.lengths, Decay::Channel))
    }

    fn with_source<T: Element, R>(&self, x: &KdaQkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let arrays = Arrays {
            decay: Gate::Channel(x.log_decay),
            beta: Some(x.beta),
            ..Arrays::new(&x.qkv, heads(&x.qkv))
        };
        self.rule.with_source(arrays, x.qkv.q.dim().3, run)
    }

    fn token<T: Element>(&self, x: &KdaQkv<'_, T>, at: &Place) -> Token {
        let left = row(&x.log_decay, at, heads(&x.qkv)).into_iter().map(f64::exp).collect();
        self.rule.token(&x.qkv, &x.beta, at, left)
    }

    fn bytes<T: Element>(&self, x: &KdaQkv<'_, T>) -> usize {
        bytes(&x.qkv) + (x.log_decay.len() + x.beta.len()) * size_of::<f32>()
    }
}

differentiable!(Kda, KdaQkv, KdaGradients);

impl Differentiable for Kda {
    type Gradients<A> = KdaGradients<A>;

    fn dims<T: Element>(&self, x: &KdaQkv<'_, T>) -> Gradients<Dim> {
        Gradients { decay: Some(x.log_decay.dim()), beta: Some(token_dim(&x.beta)), ..qkv_dims(&x.qkv) }
    }

    fn definition_back<T: Element>(&self, x: &KdaQkv<'_, T>, gradients: &mut Gradients<Array4<f64>>) {
        self.rule.definition_back(&x.qkv, gradients);
    }
}

exhibit! {
    KdaExhibit of Kda, "linear", "KDA", "arXiv 2510.26692";
    "the same, channel by channel";
    not "where one rate a token will do: Gated DeltaNet is faster";
    tokens true;
    build(_, _) {
        Kda::builder().normalize_qk()
    }
    extras(x, field) {
        Extras { channels: field.channels(1, x, mild), betas: field.tokens(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> KdaQkv<'a, T> {
        KdaQkv { qkv: x, log_decay: extras.channels.view(), beta: extras.betas.view() }
    }
}
carded!(Kda, KdaExhibit);
