//! Latent attention: keys and values of all heads come from one small row a
//! token.
//!
//! | mechanism | a token is |
//! |---|---|
//! | [`Mla`] | a latent, and a rotary key that all heads share |
//! | [`EfficientProbing`] | what learned queries pool, as it is |
//! | [`SimPool`] | what the mean of all pools, behind a norm |
//! | [`AbMilp`] | what is pooled as a small network of it says |
//!
//! Other latents are rows of their own, which are learned, and read tokens or are read by
//! them:
//!
//! | mechanism | what reads what |
//! |---|---|
//! | [`Perceiver`] | latents read tokens |
//! | [`MultiLayerPooling`] | latents read a token's states in all layers |
//! | [`NvEmbed`] | tokens read latents |
//!
//! Layers whose heads have keys and values of their own become such layers by
//! [`exact`] and [`TransMla`], or are where the training of one starts:
//! [`x_eco_mla`]. Both compute in `f64`, once.
//!
//! # What is a few calls
//!
//! Contextual memory reweaving (arXiv 2502.02046): tokens read states that were kept of
//! earlier layers or of an earlier text, and a gate blends what they find into their
//! own: `h + g (sum_j softmax_j(scale h . m_j) m_j - h)`. Which states are kept, and
//! the gate, are the model's; where none is kept tokens stay as they are.
//!
//! ```
//! use attention_kernels::{Attention, Qkv, dense::Dense};
//! use ndarray::{Array4, Zip};
//!
//! let state = |(_, h, i, c): (usize, usize, usize, usize)| ((h + i * (c + 3)) as f32).sin();
//! let (tokens, kept) = (Array4::from_shape_fn((1, 2, 9, 16), state), Array4::from_shape_fn((1, 2, 30, 16), state));
//! let reweave = |kept: &Array4<f32>, gate: f32| -> attention_kernels::Result<Array4<f32>> {
//!     if kept.dim().2 == 0 {
//!         return Ok(tokens.clone());
//!     }
//!     let mut found = Dense::builder().build()?.forward(Qkv::new(tokens.view(), kept.view(), kept.view()))?;
//!     Zip::from(&mut found).and(&tokens).for_each(|found, own| *found = own + gate * (*found - own));
//!     Ok(found)
//! };
//! assert_eq!(reweave(&kept, 0.0)?, tokens);
//! let one = kept.slice(ndarray::s![.., .., 4..5, ..]).to_owned();
//! assert!((&reweave(&one, 1.0)? - &one).iter().all(|x| x.abs() < 1e-6));
//! # Ok::<(), attention_kernels::Error>(())
//! ```

pub(crate) mod ab_milp;
mod grouped;
pub(crate) mod mla;
pub(crate) mod multi_layer;
pub(crate) mod nv_embed;
pub(crate) mod perceiver;
pub(crate) mod probing;
pub(crate) mod sim_pool;
#[cfg(test)]
mod tests;
mod trans_mla;
mod x_eco_mla;

pub use crate::input::reading::{Embeddings, Pooling, Reading};
pub use crate::stages::norm::LayerNorm;
pub use crate::stages::reading::{CrossAttention, FeedForward, Linear};
pub use crate::stages::row::Activation;
pub use ab_milp::{AbMilp, AbMilpBuilder};
pub use grouped::GroupedWeights;
pub use mla::{Form, Latents, Mla, MlaBuilder};
pub use multi_layer::{MultiLayerPooling, MultiLayerPoolingBuilder};
pub use nv_embed::{NvEmbed, NvEmbedBuilder};
pub use perceiver::{Perceiver, PerceiverBuilder};
pub use probing::{EfficientProbing, EfficientProbingBuilder, Pooled};
pub use sim_pool::{SimPool, SimPoolBuilder};
pub use trans_mla::{Converted, TransMla, exact};
pub use x_eco_mla::{MlaWeights, Rank, x_eco_mla};
