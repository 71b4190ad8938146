//! The attention of a decoder block, as models configure it.

use attention_kernels::dense::Dense;
use attention_kernels::mask::Window;
use attention_kernels::score::{Plain, Softcap};
use candle_core::{Result, Tensor};

use crate::arrays::refusal;
use crate::dense::attend;

/// What a model's configuration says of its attention. The default is that of Llama.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockOptions {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Keys that a query sees, its own the last of them: `sliding_window` of Mistral, Gemma
    /// and others. Default: all up to its own.
    pub window: Option<usize>,
    /// `c tanh(score / c)`: `attn_logit_softcapping` of Gemma 2. Default: none.
    pub softcap: Option<f32>,
    /// A logit a query head that takes weight and has no value: the sinks of gpt-oss. They
    /// are constants. Default: none.
    pub sinks: Option<Vec<f32>>,
}

/// The causal attention of a decoder block, in place of `matmul`, mask, `softmax`, `matmul`.
///
/// In `candle_transformers::models::llama`, between the rotation and `o_proj`,
///
/// ```text
/// let k = repeat_kv(k, groups)?;
/// let v = repeat_kv(v, groups)?;
/// let att = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
/// let att = masked_fill(&att, &mask, f32::NEG_INFINITY)?;
/// let att = candle_nn::ops::softmax_last_dim(&att)?;
/// let y = att.matmul(&v.contiguous()?)?;
/// ```
///
/// becomes `let y = block.forward(&q, &k, &v)?`, without `repeat_kv`, without the
/// conversion to [`f32`], and without the mask. A prompt after tokens that a cache has, and
/// one token, are the same call: the last query sits at the last key.
///
/// ```
/// use attention_kernels_candle::{BlockAttention, BlockOptions};
/// use candle_core::{DType, Device, Tensor};
///
/// let block = BlockAttention::new(BlockOptions { window: Some(4096), ..Default::default() })?;
/// let project = |heads: usize| -> candle_core::Result<_> {
///     Tensor::rand(-1f32, 1., (1, 100, heads * 64), &Device::Cpu)?
///         .to_dtype(DType::BF16)?.reshape((1, 100, heads, 64))?.transpose(1, 2)
/// };
/// let y = block.forward(&project(32)?, &project(8)?, &project(8)?)?;
/// let y = y.transpose(1, 2)?.reshape((1, 100, 32 * 64))?; // nothing is copied
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct BlockAttention(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Plain(Dense<Window, Plain>),
    Capped(Dense<Window, Softcap>),
}

impl BlockAttention {
    /// Of these options.
    ///
    /// # Errors
    /// For a window of no keys, a scale that is not finite, a softcap that is not finite and
    /// above 0, and sinks that are NaN or infinite.
    pub fn new(options: BlockOptions) -> Result<Self> {
        let BlockOptions { scale, window, softcap, sinks } = options;
        if window == Some(0) {
            return Err(crate::arrays::unfit("window", "at least 1 key", 0));
        }
        let builder = Dense::builder().mask(Window::new(window.map(|keys| keys - 1), Some(0)));
        let builder = match scale {
            Some(scale) => builder.scale(scale),
            None => builder,
        };
        let builder = match sinks {
            Some(sinks) => builder.sinks(sinks),
            None => builder,
        };
        Ok(Self(match softcap {
            None => Kind::Plain(builder.build().map_err(refusal)?),
            Some(cap) => {
                let cap = Softcap::new(cap).map_err(refusal)?;
                Kind::Capped(builder.score(cap).build().map_err(refusal)?)
            }
        }))
    }

    /// Queries `[batch, heads, len, dim]`, keys and values `[batch, kv_heads, kv_len, dim]`, as
    /// `candle-transformers` has them; gives `[batch, heads, len, dim]` in their type, with
    /// gradients. Strides, memory and cost: see [`attend`].
    ///
    /// # Errors
    /// As [`attend`], and for a number of sinks other than that of the heads.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Kind::Plain(dense) => attend(q, k, v, dense),
            Kind::Capped(dense) => attend(q, k, v, dense),
        }
    }
}
