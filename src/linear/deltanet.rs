//! DeltaNet: linear attention that replaces the value stored under a key.
//!
//! ```text
//! S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
//! o_t = scale * q_t^T S_t
//! ```
//!
//! "Parallelizing Linear Transformers with the Delta Rule over Sequence
//! Length" (arXiv 2406.06484). With keys of unit length and `beta` 1 a token
//! overwrites what was under its key; with `beta` 0 it leaves the state alone.
//! Models normalise keys (and mostly queries):
//! [`normalize_qk`](DeltaNetBuilder::normalize_qk) does it in the kernel. Keys
//! with `beta |k|^2 > 2` make the state grow without bounds.
//!
//! Cost: `32 (3 head_dim + 2 value_dim) + 6 head_dim value_dim` flops a token
//! and head, about twice those of linear attention without corrections: where
//! keys are not written twice, [`Lightning`](crate::linear::Lightning) is
//! cheaper.

use ndarray::{Array4, ArrayView3};

use crate::attention::Input;
use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::Token;
use crate::element::Element;
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Arrays, Decay, Place, Source, Spec};
use crate::error::Result;
use crate::input::tokens::{bytes, heads};
use crate::input::tokens::{check_tokens, token_dims};
use crate::input::{Dims, Lengths, Qkv};
use crate::stages::delta_rule::DeltaRule;
use crate::stages::differentiate::{DeltaGradients, Differentiable, differentiable, qkv_dims, token_dim};
use crate::stages::recur::{Options, linear_options};
use crate::stages::recur::{Recurrence, recurrent};

/// Queries, keys and values with the weights of the corrections: what
/// [`DeltaNet`] takes.
#[derive(Clone, Copy, Debug)]
pub struct DeltaQkv<'a, T> {
    /// Queries and keys `[batch, heads, len, head_dim]`, values `[batch,
    /// heads, len, value_dim]`. The arrays may have different numbers of
    /// heads, each a divisor of the largest.
    pub qkv: Qkv<'a, T>,
    /// How much of what is stored under its key a token replaces: `[batch,
    /// heads, len]`, from 0 to 1, or to 2 where models let it turn around what
    /// is stored.
    pub beta: ArrayView3<'a, f32>,
}

impl<'a, T> DeltaQkv<'a, T> {
    /// The same for a shorter while.
    pub fn reborrow<'b>(self) -> DeltaQkv<'b, T>
    where
        'a: 'b,
    {
        DeltaQkv { qkv: self.qkv.reborrow(), beta: self.beta.reborrow() }
    }
}

impl<T: Element> Input for DeltaQkv<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        self.qkv.lengths
    }

    fn dims(&self) -> Result<Dims> {
        let dims = token_dims(&self.qkv)?;
        check_tokens("beta", &self.beta, self.qkv.q.dim().0, &dims)?;
        Ok(dims)
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        let dims = self.dims()?;
        Ok((self.qkv.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

/// DeltaNet.
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

/// Builds a [`DeltaNet`].
#[derive(Clone, Debug, Default)]
pub struct DeltaNetBuilder {
    options: Options,
    normalize: bool,
}

impl DeltaNet {
    /// Queries and keys as they are.
    pub fn builder() -> DeltaNetBuilder {
        DeltaNetBuilder::default()
    }
}

linear_options!(DeltaNetBuilder, scale "1 / sqrt(head_dim)");

impl DeltaNetBuilder {
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
    pub fn build(self) -> Result<DeltaNet> {
        Ok(DeltaNet { rule: DeltaRule { config: self.options.build()?, normalize: self.normalize } })
    }
}

recurrent!(DeltaNet, DeltaQkv);

impl Recurrence for DeltaNet {
    type Operands<'a, T: Element> = DeltaQkv<'a, T>;

    fn spec<'a, T: Element>(&'a self, x: &'a DeltaQkv<'_, T>) -> Result<Spec<'a>> {
        Ok(self.rule.spec(x.dims()?, x.qkv.lengths, Decay::None))
    }

    fn with_source<T: Element, R>(&self, x: &DeltaQkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let arrays = Arrays { beta: Some(x.beta), ..Arrays::new(&x.qkv, heads(&x.qkv)) };
        self.rule.with_source(arrays, x.qkv.q.dim().3, run)
    }

    fn token<T: Element>(&self, x: &DeltaQkv<'_, T>, at: &Place) -> Token {
        self.rule.token(&x.qkv, &x.beta, at, vec![1.0; x.qkv.q.dim().3])
    }

    fn bytes<T: Element>(&self, x: &DeltaQkv<'_, T>) -> usize {
        bytes(&x.qkv) + x.beta.len() * size_of::<f32>()
    }
}

differentiable!(DeltaNet, DeltaQkv, DeltaGradients);

impl Differentiable for DeltaNet {
    type Gradients<A> = DeltaGradients<A>;

    fn dims<T: Element>(&self, x: &DeltaQkv<'_, T>) -> Gradients<Dim> {
        Gradients { beta: Some(token_dim(&x.beta)), ..qkv_dims(&x.qkv) }
    }

    fn definition_back<T: Element>(&self, x: &DeltaQkv<'_, T>, gradients: &mut Gradients<Array4<f64>>) {
        self.rule.definition_back(&x.qkv, gradients);
    }
}

exhibit! {
    DeltaNetExhibit of DeltaNet, "linear", "DeltaNet", "arXiv 2406.06484";
    "a value replaces what was under its key";
    not "where old content should fade by itself: use its gated form";
    tokens true;
    build(_, _) {
        DeltaNet::builder().normalize_qk()
    }
    extras(x, field) {
        Extras { betas: field.tokens(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> DeltaQkv<'a, T> {
        DeltaQkv { qkv: x, beta: extras.betas.view() }
    }
}
carded!(DeltaNet, DeltaNetExhibit);
