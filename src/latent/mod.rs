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

mod grouped;
pub(crate) mod mla;
pub(crate) mod multi_layer;
pub(crate) mod nv_embed;
pub(crate) mod perceiver;
pub(crate) mod pooling;
pub(crate) mod probing;
#[cfg(test)]
mod tests;
mod trans_mla;
mod x_eco_mla;

pub use crate::input::reading::{Embeddings, Pooling, Reading};
pub use crate::stages::norm::LayerNorm;
pub use crate::stages::reading::{CrossAttention, FeedForward, Linear};
pub use crate::stages::row::Activation;
pub use grouped::GroupedWeights;
pub use mla::{Form, Latents, Mla, MlaBuilder};
pub use multi_layer::{MultiLayerPooling, MultiLayerPoolingBuilder};
pub use nv_embed::{NvEmbed, NvEmbedBuilder};
pub use perceiver::{Perceiver, PerceiverBuilder};
pub use pooling::{AbMilp, AbMilpBuilder, SimPool, SimPoolBuilder};
pub use probing::{EfficientProbing, EfficientProbingBuilder, Pooled};
pub use trans_mla::{Converted, TransMla, exact};
pub use x_eco_mla::{MlaWeights, Rank, x_eco_mla};
