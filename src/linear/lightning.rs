//! Lightning Attention: causal linear attention whose heads forget at fixed
//! rates.
//!
//! ```text
//! S_t = exp(-slope) S_{t-1} + k_t v_t^T
//! o_t = q_t^T S_t = sum_{j <= t} exp(-slope (t - j)) (q_t . k_j) v_j
//! ```
//!
//! No softmax, no scale, no denominator. "TransNormerLLM" (arXiv 2307.14995)
//! evaluates the second form, all pairs tile by tile: Lightning Attention 1.
//! "Lightning Attention-2" (arXiv 2401.04658) and "Various Lengths, Constant
//! Speed" (arXiv 2405.17381) split it into pairs within a block and a state
//! between blocks, so that a token costs the same however long the sequence
//! is: that is what the kernel does.
//!
//! Cost: `32 (head_dim + value_dim) + 4 head_dim value_dim` flops a token and
//! head. Below some hundred tokens softmax attention is as fast; it also
//! recalls what a state of fixed size has no room for.

use crate::card::{carded, exhibit};
use crate::definition::recurrence::{Token, Update, row};
use crate::element::Element;
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Arrays, Decay, Gate, Place, Read, Rule, Source, Spec};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::input::tokens::token_dims;
use crate::score::Alibi;
use crate::stages::differentiate::{Differentiable, QkvGradients, differentiable, qkv_dims};
use crate::stages::recur::{Config, Options, linear_options};
use crate::stages::recur::{Recurrence, recurrent};

/// Lightning Attention.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::Lightning};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, head_dim
/// let lightning = Lightning::builder(4).build()?;
/// let out = lightning.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lightning {
    config: Config,
    /// Log decays, one a head.
    decays: Vec<f32>,
}

/// Builds a [`Lightning`].
#[derive(Clone, Debug)]
pub struct LightningBuilder {
    options: Options,
    slopes: Vec<f32>,
}

impl Lightning {
    /// Slopes of ALiBi for that many heads, as TransNormerLLM's first layer
    /// has them: a geometric series.
    pub fn builder(heads: usize) -> LightningBuilder {
        Self::from_slopes(Alibi::new(heads).slopes())
    }

    /// The slopes of layer `layer` of `layers` of TransNormerLLM: those of the
    /// first layer times `1 - layer / (layers - 1) + 1e-5`.
    pub fn of_layer(heads: usize, layer: usize, layers: usize) -> LightningBuilder {
        let depth = layer as f64 / layers.saturating_sub(1).max(1) as f64;
        let factor = (1.0 - depth + 1e-5) as f32;
        let slopes: Vec<f32> = Alibi::new(heads).slopes().iter().map(|slope| slope * factor).collect();
        Self::from_slopes(&slopes)
    }

    /// The slopes of flash-linear-attention, `8 / heads (1 - layer / layers)
    /// head`: those of the first head are 0. It also scales by `1 /
    /// sqrt(head_dim)`, which is left to [`LightningBuilder::scale`].
    pub fn linear_slopes(heads: usize, layer: usize, layers: usize) -> LightningBuilder {
        let step = 8.0 / heads.max(1) as f64 * (1.0 - layer as f64 / layers.max(1) as f64);
        let slopes: Vec<f32> = (0..heads).map(|head| (step * head as f64) as f32).collect();
        Self::from_slopes(&slopes)
    }

    /// Slopes of your own, one a head: how fast it forgets. 0 forgets nothing,
    /// infinity everything but the token itself.
    pub fn from_slopes(slopes: &[f32]) -> LightningBuilder {
        LightningBuilder { options: Options::default(), slopes: slopes.to_vec() }
    }
}

linear_options!(LightningBuilder, scale "1");

impl LightningBuilder {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a slope that is negative or NaN and for a scale
    /// that is not finite, [`Error::Isa`] for an instruction set that the CPU
    /// lacks.
    pub fn build(self) -> Result<Lightning> {
        if let Some(slope) = self.slopes.iter().find(|slope| slope.is_nan() || **slope < 0.0) {
            return Err(Error::value("slopes", "numbers of at least 0", slope));
        }
        let decays = self.slopes.iter().map(|slope| -slope).collect();
        Ok(Lightning { config: self.options.build()?, decays })
    }
}

recurrent!(Lightning, Qkv);

impl Recurrence for Lightning {
    type Operands<'a, T: Element> = Qkv<'a, T>;

    fn spec<'a, T: Element>(&'a self, x: &'a Qkv<'_, T>) -> Result<Spec<'a>> {
        let dims = token_dims(x)?;
        if self.decays.len() != dims.q_heads {
            let expected = format!("one for each of the {} heads", dims.q_heads);
            return Err(Error::value("slopes", expected, self.decays.len()));
        }
        Ok(Spec {
            dims,
            lengths: x.lengths,
            state_dim: dims.head_dim,
            decay: Decay::Scalar,
            rule: Rule::Add,
            read: Read::After,
            scale: self.config.scale_or_one(),
            normaliser: None,
            form: self.config.form,
            isa: self.config.isa,
        })
    }

    fn with_source<T: Element, R>(&self, x: &Qkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        run(&Arrays { decay: Gate::Constant(&self.decays), ..Arrays::new(x, self.decays.len()) })
    }

    fn token<T: Element>(&self, x: &Qkv<'_, T>, at: &Place) -> Token {
        let heads = self.decays.len();
        let q = row(&x.q, at, heads);
        Token {
            k: row(&x.k, at, heads),
            v: row(&x.v, at, heads),
            // exp(-slope)
            decay: vec![f64::from(self.decays[at.head]).exp(); q.len()],
            update: Update::Add,
            bonus: Vec::new(),
            q,
        }
    }

    fn bytes<T: Element>(&self, x: &Qkv<'_, T>) -> usize {
        (x.q.len() + x.k.len() + x.v.len()) * size_of::<T>()
    }
}

differentiable!(Lightning, Qkv, QkvGradients);

impl Differentiable for Lightning {
    type Gradients<A> = QkvGradients<A>;

    fn dims<T: Element>(&self, x: &Qkv<'_, T>) -> Gradients<Dim> {
        qkv_dims(x)
    }
}

exhibit! {
    LightningExhibit of Lightning, "linear", "lightning", "arXiv 2401.04658, 2405.17381";
    "every head forgets at a fixed rate";
    not "below some hundred tokens, where softmax attention is as fast, and where single keys must be recalled exactly";
    tokens true;
    build(x, _) {
        let (_, heads, _, dim) = x.q.dim();
        // So that outputs are in the range of half precision.
        let builder = Lightning::builder(heads).scale(1.0 / dim.max(1) as f32);
builder
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}
carded!(Lightning, LightningExhibit);
