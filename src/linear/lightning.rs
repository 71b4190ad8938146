//! Lightning Attention: causal linear attention whose heads forget at fixed
//! rates.

use crate::card::{carded, exhibit};
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate};
use crate::error::Result;
use crate::input::{Dims, Qkv};
use crate::score::Alibi;
use crate::stages::differentiate::{QkvGradients, differentiable};
use crate::stages::options::{Range, options};
use crate::stages::recur::{Config, Recurrence, check_heads, recurrent};

/// Lightning Attention: causal linear attention whose heads forget at fixed
/// rates.
///
/// ```text
/// S_t = exp(-slope) S_{t-1} + k_t v_t^T
/// o_t = q_t^T S_t = sum_{j <= t} exp(-slope (t - j)) (q_t . k_j) v_j
/// ```
///
/// No softmax, no scale, no denominator. "TransNormerLLM" (arXiv 2307.14995)
/// evaluates the second form, all pairs tile by tile: Lightning Attention 1.
/// "Lightning Attention-2" (arXiv 2401.04658) and "Various Lengths, Constant
/// Speed" (arXiv 2405.17381) split it into pairs within a block and a state
/// between blocks, so that a token costs the same however long the sequence
/// is: that is what the kernel does.
///
/// Cost: `32 (head_dim + value_dim) + 4 head_dim value_dim` flops a token and
/// head. Below some hundred tokens softmax attention is as fast; it also
/// recalls what a state of fixed size has no room for.
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
        LightningBuilder::with(slopes.to_vec())
    }
}

const SLOPES: Range = Range::new(["numbers of at least 0"; 2], |x| x >= 0.0);

options! {
    /// Builds a [`Lightning`].
    LightningBuilder of Lightning, form scale "1";
    given { slopes: Vec<f32>, in SLOPES; }
    build(this, config) {
        Ok(Lightning { config, decays: this.slopes.iter().map(|slope| -slope).collect() })
    }
}

impl Recurrence for Lightning {
    type Operands<'a, T: Element> = Qkv<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a Qkv<'_, T>) -> Arrays<'a> {
        Arrays { decay: Gate::Constant(&self.decays), ..Arrays::new(&x.reborrow(), self.decays.len()) }
    }

    fn check<T: Element>(&self, _: &Qkv<'_, T>, dims: &Dims) -> Result<()> {
        check_heads("slopes", self.decays.len(), dims)
    }
}
recurrent!(Lightning, Qkv);
differentiable!(Lightning, Qkv, QkvGradients);

exhibit! {
    LightningExhibit of Lightning, "linear", "lightning", "arXiv 2401.04658, 2405.17381";
    "every head forgets at a fixed rate";
    not "below some hundred tokens, where softmax attention is as fast, and where single keys must be recalled exactly";
    tokens true, forms form, variants 2;
    build(x, field) {
        let (_, heads, _, dim) = x.q.dim();
        // So that outputs are in the range of half precision.
        let slopes: Vec<f32> = (0..heads).map(|h| [0.0, 0.01, 0.3, f32::INFINITY][h % 4]).collect();
        let builder = if field.variant == 0 { Lightning::builder(heads) } else { Lightning::from_slopes(&slopes) };
        builder.scale(1.0 / dim.max(1) as f32)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}
carded!(Lightning, LightningExhibit);
