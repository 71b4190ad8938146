//! What to compute: a mechanism of `attention-kernels`, or options with arrays.

use attention_kernels::Result;
use attention_kernels::dense::{Dense, DenseBuilder};
use attention_kernels::mask::{Boolean, Mask, Unmasked, Window};
use attention_kernels::score::{Bias, Plain, Smooth, Softcap};
use burn::backend::flex::FlexTensor;
use burn::tensor::ops::AttentionModuleOptions;

use crate::arrays::{bools, unfit, wide};

/// What [`attention`](crate::attention) is asked for. The default is scaled dot-product
/// attention that sees everything. burn's own options convert into it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionOptions {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
    /// `c tanh(score / c)`, before a bias is added. Default: none.
    pub softcap: Option<f64>,
    /// Whether a query sees keys up to its own position alone; the last query sits at the last
    /// key.
    pub is_causal: bool,
    /// A query sees the keys that are less than so many away from its position, its own
    /// among them. With [`is_causal`](Self::is_causal) these are the last so many up to its own.
    /// Default: all.
    pub window: Option<usize>,
    /// A logit a query head that takes weight and has no value. They are constants. Zeros make
    /// `exp(s) / (1 + sum exp(s))` of the softmax, which burn calls quiet. Default: none.
    pub sinks: Option<Vec<f32>>,
}

impl From<AttentionModuleOptions> for AttentionOptions {
    fn from(options: AttentionModuleOptions) -> Self {
        let AttentionModuleOptions { scale, softcap, is_causal } = options;
        Self { scale, softcap, is_causal, window: None, sinks: None }
    }
}

/// What is asked of a mechanism once its types are known.
pub(crate) trait Ask {
    type Answer;

    fn of<M: Mask, F: Smooth>(self, dense: &Dense<M, F>) -> Result<Self::Answer>;
}

/// What can be asked, forward and, later, backward.
pub(crate) trait Mechanism: Clone + Send + 'static {
    fn ask<A: Ask>(&self, ask: A) -> Result<A::Answer>;

    /// The array that is added to the scores.
    fn bias(&self) -> Option<&FlexTensor> {
        None
    }
}

impl<M: Mask + Clone + 'static, F: Smooth + Clone + 'static> Mechanism for Dense<M, F> {
    fn ask<A: Ask>(&self, ask: A) -> Result<A::Answer> {
        ask.of(self)
    }
}

/// Options with the arrays that came with a call.
#[derive(Clone)]
pub(crate) struct Optional {
    pub(crate) options: AttentionOptions,
    /// `true` hides.
    pub(crate) mask: Option<FlexTensor>,
    pub(crate) bias: Option<FlexTensor>,
}

impl Mechanism for Optional {
    fn ask<A: Ask>(&self, ask: A) -> Result<A::Answer> {
        let softcap = self.options.softcap.map(|cap| Softcap::new(cap as f32)).transpose()?;
        let bias = self.bias.as_ref().map(|bias| wide("bias", bias)).transpose()?;
        let bias = bias.as_ref().map(|bias| Bias::new(bias.view()));
        match (softcap, bias) {
            (None, None) => ask.of(&self.build(Plain)?),
            (Some(cap), None) => ask.of(&self.build(cap)?),
            (None, Some(bias)) => ask.of(&self.build(bias)?),
            (Some(cap), Some(bias)) => ask.of(&self.build((cap, bias))?),
        }
    }

    fn bias(&self) -> Option<&FlexTensor> {
        self.bias.as_ref()
    }
}

impl Optional {
    fn build<F: Smooth>(&self, score: F) -> Result<Dense<Box<dyn Mask + '_>, F>> {
        let AttentionOptions { scale, sinks, .. } = &self.options;
        let builder: DenseBuilder<_, F> = Dense::builder().mask(self.visible()?).score(score);
        let builder = match scale {
            Some(scale) => builder.scale(*scale as f32),
            None => builder,
        };
        match sinks {
            Some(sinks) => builder.sinks(&sinks[..]).build(),
            None => builder.build(),
        }
    }

    /// Engines know no mask by its type: a box costs nothing.
    fn visible(&self) -> Result<Box<dyn Mask + '_>> {
        let AttentionOptions { is_causal, window, .. } = self.options;
        let window = match window {
            Some(0) => return Err(unfit("window", "at least 1 key", "0")),
            Some(keys) => Some(Window::new(Some(keys - 1), Some(if is_causal { 0 } else { keys - 1 }))),
            None => is_causal.then(|| Window::new(None, Some(0))),
        };
        let hidden = self.mask.as_ref().map(|mask| bools("mask", mask)).transpose()?;
        let seen = hidden.map(|hidden| Boolean::new(hidden).not());
        Ok(match (window, seen) {
            (None, None) => Box::new(Unmasked),
            (Some(window), None) => Box::new(window),
            (None, Some(seen)) => Box::new(seen),
            (Some(window), Some(seen)) => Box::new(window.and(seen)),
        })
    }
}
