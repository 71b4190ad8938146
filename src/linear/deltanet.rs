//! DeltaNet: linear attention that replaces the value stored under a key.

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::Token;
use crate::definition::recurrence_backward::Found;
use crate::element::Element;
use crate::engine::recur::{Arrays, Place, Source};
use crate::input::declare::input;
use crate::input::tokens::all_heads;
use crate::stages::delta_rule::DeltaRule;
use crate::stages::differentiate::{DeltaGradients, Differentiable, backward_pass};
use crate::stages::options::options;
use crate::stages::recur::{Config, Recurrence, recurrent};

input! {
    /// Queries, keys and values with the weights of the corrections: what
    /// [`DeltaNet`] takes.
    DeltaQkv(qkv) {
        /// How much of what is stored under its key a token replaces: from 0
        /// to 1, or to 2 where models let it turn around what is stored.
        beta: f32 [batch, heads/, len],
    }
}

/// DeltaNet: linear attention that replaces the value stored under a key.
///
/// ```text
/// S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
/// o_t = scale * q_t^T S_t
/// ```
///
/// "Parallelizing Linear Transformers with the Delta Rule over Sequence
/// Length" (arXiv 2406.06484). With keys of unit length and `beta` 1 a token
/// overwrites what was under its key; with `beta` 0 it leaves the state alone.
/// Models normalise keys (and mostly queries):
/// [`normalize_qk`](DeltaNetBuilder::normalize_qk) does it in the kernel. Keys
/// with `beta |k|^2 > 2` make the state grow without bounds.
///
/// Cost: `32 (3 head_dim + 2 value_dim) + 6 head_dim value_dim` flops a token
/// and head, about twice those of linear attention without corrections: where
/// keys are not written twice, [`Lightning`](crate::linear::Lightning) is
/// cheaper.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{DeltaNet, DeltaQkv}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, head_dim
/// let v = Array4::from_shape_fn((1, 4, 100, 8), |(_, _, t, _)| t as f32);
/// let beta = Array3::ones((1, 4, 100));
/// let qkv = Qkv::new(x.view(), x.view(), v.view());
/// let delta = DeltaNet::builder().normalize_qk().scale(1.0).build()?;
/// let out = delta.forward(DeltaQkv { qkv, beta: beta.view() })?;
/// // All keys are the same: the last value is what is under it.
/// assert!((out[[0, 0, 99, 0]] - 99.0).abs() < 1e-3);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DeltaNet {
    rule: DeltaRule,
}

impl DeltaNet {
    /// Queries and keys as they are.
    pub fn builder() -> DeltaNetBuilder {
        DeltaNetBuilder::with()
    }
}

options! {
    /// Builds a [`DeltaNet`].
    DeltaNetBuilder of DeltaNet, form scale "1 / sqrt(head_dim)";
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
    }
    build(this, config) {
        Ok(DeltaNet { rule: DeltaRule { config, normalize: this.normalize_qk } })
    }
}

impl Recurrence for DeltaNet {
    type Operands<'a, T: Element> = DeltaQkv<'a, T>;

    fn config(&self) -> &Config {
        &self.rule.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a DeltaQkv<'_, T>) -> Arrays<'a> {
        let qkv = x.qkv.reborrow();
        Arrays { beta: Some(x.beta.reborrow()), ..Arrays::new(&qkv, all_heads(x)) }
    }

    fn with_source<T: Element, R>(&self, x: &DeltaQkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        self.rule.with_source(self.arrays(x), run)
    }

    fn token<T: Element>(&self, x: &DeltaQkv<'_, T>, at: &Place) -> Token {
        self.rule.token(&self.arrays(x), at)
    }
}
recurrent!(DeltaNet, DeltaQkv);

impl Differentiable for DeltaNet {
    type Gradients<A> = DeltaGradients<A>;

    fn token_back<T: Element>(&self, x: &DeltaQkv<'_, T>, at: &Place, found: &mut Found) {
        self.rule.token_back(&x.qkv, at, all_heads(x), found);
    }
}
backward_pass!(DeltaNet, DeltaQkv, DeltaGradients);

exhibit! {
    DeltaNetExhibit of DeltaNet, "linear", "DeltaNet", "arXiv 2406.06484";
    "a value replaces what was under its key";
    not "where old content should fade by itself: use its gated form";
    tokens true, forms form, variants 2;
    build(_, field) {
        let builder = DeltaNet::builder().normalize_qk();
        // Keys of other lengths could let the state grow.
        if field.variant == 0 { builder } else { builder.scale(0.3) }
    }
    extras(x, field) {
        Extras { betas: field.tokens(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> DeltaQkv<'a, T> {
        DeltaQkv { qkv: x, beta: extras.betas.view() }
    }
}
carded!(DeltaNet, DeltaNetExhibit);
