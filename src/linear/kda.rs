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

use ndarray::Array4;

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::Token;
use crate::element::Element;
use crate::engine::recur::backward::Gradients;
use crate::engine::recur::{Arrays, Gate, Place, Source};
use crate::error::Result;
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::tokens::heads;
use crate::stages::delta_rule::DeltaRule;
use crate::stages::differentiate::{Differentiable, KdaGradients, backward_pass};
use crate::stages::options::options;
use crate::stages::recur::{Config, Recurrence, recurrent};

input! {
    /// Queries, keys and values with log decays of channels and the weight of the
    /// correction: what [`Kda`] takes.
    KdaQkv(qkv) {
        /// Natural logarithms of what a token leaves of each channel of the
        /// state: at most 0, `-inf` to forget everything.
        log_decay: f32 [batch, heads/, len, head_dim],
        /// How much of what is stored under its key a token replaces: from 0
        /// to 1, or to 2 where models let it turn around what is stored.
        beta: f32 [batch, heads/, len],
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

impl Kda {
    /// Queries and keys as they are.
    pub fn builder() -> KdaBuilder {
        KdaBuilder::with()
    }
}

options! {
    /// Builds a [`Kda`].
    KdaBuilder of Kda, form growth scale "1 / sqrt(head_dim)";
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
    }
    build(this, config) {
        Ok(Kda { rule: DeltaRule { config, normalize: this.normalize_qk } })
    }
}

impl Recurrence for Kda {
    type Operands<'a, T: Element> = KdaQkv<'a, T>;

    fn config(&self) -> &Config {
        &self.rule.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a KdaQkv<'_, T>) -> Arrays<'a> {
        let qkv = x.qkv.reborrow();
        Arrays {
            decay: Gate::Channel(x.log_decay.reborrow()),
            beta: Some(x.beta.reborrow()),
            ..Arrays::new(&qkv, heads(&qkv))
        }
    }

    fn check<T: Element>(&self, x: &KdaQkv<'_, T>, _: &Dims) -> Result<()> {
        self.rule.config.check_decays("log_decay", x.log_decay)
    }

    fn with_source<T: Element, R>(&self, x: &KdaQkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        self.rule.with_source(self.arrays(x), run)
    }

    fn token<T: Element>(&self, x: &KdaQkv<'_, T>, at: &Place) -> Token {
        self.rule.token(&self.arrays(x), at)
    }
}
recurrent!(Kda, KdaQkv);

impl Differentiable for Kda {
    type Gradients<A> = KdaGradients<A>;

    fn definition_back<T: Element>(&self, x: &KdaQkv<'_, T>, gradients: &mut Gradients<Array4<f64>>) {
        self.rule.definition_back(&x.qkv, gradients);
    }
}
backward_pass!(Kda, KdaQkv, KdaGradients);

exhibit! {
    KdaExhibit of Kda, "linear", "KDA", "arXiv 2510.26692";
    "the same, channel by channel";
    not "where one rate a token will do: Gated DeltaNet is faster";
    tokens true, forms form, variants 2;
    build(_, field) {
        let builder = Kda::builder().normalize_qk();
        // Keys of other lengths could let the state grow.
        if field.variant == 0 { builder } else { builder.scale(0.3) }
    }
    extras(x, field) {
        Extras { channels: field.channel_decays(x), betas: field.tokens(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> KdaQkv<'a, T> {
        KdaQkv { qkv: x, log_decay: extras.channels.view(), beta: extras.betas.view() }
    }
}
carded!(Kda, KdaExhibit);
