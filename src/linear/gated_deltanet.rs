//! Gated DeltaNet: the delta rule on a state that also forgets.

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::Token;
use crate::definition::recurrence_backward::Found;
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate, Place, Source};
use crate::error::Result;
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::tokens::all_heads;
use crate::stages::delta_rule::DeltaRule;
use crate::stages::differentiate::{Differentiable, GatedDeltaGradients, backward_pass};
use crate::stages::options::options;
use crate::stages::recur::{Config, Recurrence, recurrent};

input! {
    /// Queries, keys and values with a log decay and the weight of the correction
    /// for each token: what [`GatedDeltaNet`] takes.
    GatedDeltaQkv(qkv) {
        /// Natural logarithms of what a token leaves of the state: at most 0,
        /// `-inf` to forget everything.
        log_decay: f32 [batch, heads/, len],
        /// How much of what is stored under its key a token replaces: from 0
        /// to 1, or to 2 where models let it turn around what is stored.
        beta: f32 [batch, heads/, len],
    }
}

/// Gated DeltaNet: the delta rule on a state that also forgets.
///
/// ```text
/// S'_t = exp(g_t) S_{t-1}
/// S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T
/// o_t  = scale * q_t^T S_t
/// ```
///
/// "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv
/// 2412.06464). `g_t` is one log decay a token and head, of at most 0: models
/// compute it as [`log_decay`](crate::math::delta_gates::log_decay) and `beta`
/// as [`beta`](crate::math::delta_gates::beta). With `g = 0` it is
/// [`DeltaNet`](crate::linear::DeltaNet). Values may have more heads than
/// queries and keys, as models of Qwen3-Next's kind have them: neighbours
/// share.
///
/// Cost: as [`DeltaNet`](crate::linear::DeltaNet). Where channels are to
/// forget at rates of their own, [`Kda`](crate::linear::Kda).
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

impl GatedDeltaNet {
    /// Queries and keys as they are.
    pub fn builder() -> GatedDeltaNetBuilder {
        GatedDeltaNetBuilder::with()
    }
}

options! {
    /// Builds a [`GatedDeltaNet`].
    GatedDeltaNetBuilder of GatedDeltaNet, form growth scale "1 / sqrt(head_dim)";
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
    }
    build(this, config) {
        Ok(GatedDeltaNet { rule: DeltaRule { config, normalize: this.normalize_qk } })
    }
}

impl Recurrence for GatedDeltaNet {
    type Operands<'a, T: Element> = GatedDeltaQkv<'a, T>;

    fn config(&self) -> &Config {
        &self.rule.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a GatedDeltaQkv<'_, T>) -> Arrays<'a> {
        let qkv = x.qkv.reborrow();
        Arrays {
            decay: Gate::Token(x.log_decay.reborrow()),
            beta: Some(x.beta.reborrow()),
            ..Arrays::new(&qkv, all_heads(x))
        }
    }

    fn check<T: Element>(&self, x: &GatedDeltaQkv<'_, T>, _: &Dims) -> Result<()> {
        self.rule.config.check_decays("log_decay", x.log_decay)
    }

    fn with_source<T: Element, R>(&self, x: &GatedDeltaQkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        self.rule.with_source(self.arrays(x), run)
    }

    fn token<T: Element>(&self, x: &GatedDeltaQkv<'_, T>, at: &Place) -> Token {
        self.rule.token(&self.arrays(x), at)
    }
}
recurrent!(GatedDeltaNet, GatedDeltaQkv);

impl Differentiable for GatedDeltaNet {
    type Gradients<A> = GatedDeltaGradients<A>;

    fn token_back<T: Element>(&self, x: &GatedDeltaQkv<'_, T>, at: &Place, found: &mut Found) {
        self.rule.token_back(&x.qkv, at, all_heads(x), found);
    }
}
backward_pass!(GatedDeltaNet, GatedDeltaQkv, GatedDeltaGradients);

exhibit! {
    GatedDeltaNetExhibit of GatedDeltaNet, "linear", "Gated DeltaNet", "arXiv 2412.06464";
    "a value replaces what was under its key, and every token says how much is forgotten";
    not "where channels must forget at rates of their own: use KDA";
    tokens true, forms form, variants 2;
    build(_, field) {
        let builder = GatedDeltaNet::builder().normalize_qk();
        // Keys of other lengths could let the state grow.
        if field.variant == 0 { builder } else { builder.scale(0.3) }
    }
    extras(x, field) {
        Extras { decays: field.token_decays(x), betas: field.tokens(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> GatedDeltaQkv<'a, T> {
        GatedDeltaQkv { qkv: x, log_decay: extras.decays.view(), beta: extras.betas.view() }
    }
}
carded!(GatedDeltaNet, GatedDeltaNetExhibit);
