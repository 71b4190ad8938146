//! Linear attention: a state of fixed size instead of all keys.
//!
//! Each token decays, corrects and adds to a matrix, which its query reads.
//! The kernels take tokens in chunks, so that nearly all work is matrix
//! products; [`Recurrent`](crate::Recurrent) carries the state from call to
//! call, and makes one [`step`](crate::Recurrent::step) for one token.
//!
//! | mechanism | the state forgets | and takes |
//! |---|---|---|
//! | [`Aaren`] | nothing, but in proportion to a softmax over the prefix | a softmax state: `exp(s) v` |
//! | [`Agent`] | nothing, and has a row for each of a few agent tokens | softmax weights of `k` for each agent, times `v^T` |
//! | [`Based`] | nothing, beside a window of exact softmax attention | products of pairs of elements of `k`, times `v^T` |
//! | [`Comba`] | at a rate a token | `v` less what another key finds before |
//! | [`DeltaNet`] | nothing | `v` in place of what was under `k` |
//! | [`DeltaProduct`] | nothing, or at a rate a token | some values, each in place of what was under its key |
//! | [`EcoFormer`] | nothing | hash codes of `k`, times `v^T` |
//! | [`Flowformer`] | nothing | features of `k`, times `v^T`, weighed by what flows through the token |
//! | [`GatedDeltaNet`] | at a rate a token | `v` in place of what was under `k` |
//! | [`GatedDeltaNet2`] | at a rate a token and channel | a gated `v` in place of a gated share of what was under `k` |
//! | [`GatedSlotAttention`] | at a rate a token and slot, of two states | `k` and `v` in each slot, which queries attend to |
//! | [`Gla`] | at a rate for each token and channel | `k v^T` |
//! | [`Hgrn2`] | at a rate for each token and channel | `(1 - rate) v^T` |
//! | [`Kda`] | at a rate a token and channel | `v` in place of what was under `k` |
//! | [`Lightning`] | at a fixed rate a head | `k v^T` |
//! | [`LinearAttention`] | nothing | features of `k`, times `v^T` |
//! | [`LogLinear`] | at a rate for each token, of a state for each power of two of the past | `k v^T`, and merges what is old enough |
//! | [`Mamba2`] | at a rate for each token, of its step | `step k v^T` |
//! | [`Mamba3`] | at a rate for each token, while channels turn | shares of `k v^T` of this token and the one before |
//! | [`Mamba3Mimo`] | at a rate for each token, while channels turn | shares of some `k v^T` at once |
//! | [`Memora`] | at a rate a token, of its logarithm | a step of descent; weights are softmaxes |
//! | [`MesaNet`] | at a rate for each token, of two states | `k k^T` and `k v^T`, from which queries solve for the best fit |
//! | [`Moneta`] | at a rate a token | a step of descent of a power of the error |
//! | [`Performer`] | nothing | random features of `k`, times `v^T` |
//! | [`RandomFeatureAttention`] | has no state: all keys are read | random features of `q` and `k`, times trained values |
//! | [`RetNet`] | at a fixed rate a head | `k v^T` |
//! | [`Rwkv6`] | at a rate for each token and channel | `k v^T`, after the query has read |
//! | [`Rwkv7`] | at a rate a token and channel, and under a removal key | `k v^T` |
//! | [`S6`] | each element by itself, as the token says | `delta B u` of each channel |
//! | [`SimpleGla`] | at a rate for each token | `k v^T` |
//! | [`Titans`] | at a rate a token | a step of descent with momentum |
//! | [`Yaad`] | at a rate a token | a step of descent, bounded for outliers |
//!
//! # Gradients
//!
//! [`Lightning`], [`RetNet`], [`SimpleGla`], [`Gla`], [`Hgrn2`], [`Mamba2`],
//! [`Rwkv6`], [`Rwkv7`], [`S6`], [`DeltaNet`], [`GatedDeltaNet`] and [`Kda`] have
//! [`Backward`](crate::Backward): the gradients of a loss with respect to all
//! arrays that they are given and to the state at the start, and to the
//! parameters of tokens (Mamba's `A`, `D` and bias, the bonus of RWKV-6). With
//! noise as input they are off the
//! definition by less than 2e-6 of their root mean square, those of mechanisms
//! that correct their state (with keys of unit length) by less than 5e-5.
//!
//! # ONNX
//!
//! [`onnx::LinearAttention`](crate::onnx::LinearAttention) is the operator LinearAttention
//! (opset 27) with its own arguments. Each `update_rule` has its mechanism here:
//!
//! | `update_rule` | `decay` | mechanism |
//! |---|---|---|
//! | `linear` | none | [`Lightning::from_slopes`] of zeros |
//! | `gated` | `[B, T, Hkv]` | [`SimpleGla`] |
//! | `gated` | `[B, T, Hkv * dk]` | [`Gla`] |
//! | `delta` | none | [`DeltaNet`] |
//! | `gated_delta` | `[B, T, Hkv]` | [`GatedDeltaNet`] |
//! | `gated_delta` | `[B, T, Hkv * dk]` | [`Kda`] |
//!
//! Its arrays `[B, T, H * d]` are these mechanisms' `[batch, heads, len, dim]` without a
//! copy: `into_shape_with_order((B, T, H, d))`, then `permuted_axes([0, 2, 1, 3])`; `decay`
//! and `beta` of heads by `permuted_axes([0, 2, 1])`. `beta` may have one head for all.
//! Keys are taken as they are: `normalize_qk` stays off. `scale` 0 is `1 / sqrt(dk)`, the
//! default of all but [`Lightning`], and positive decays need `allow_growth`. With
//! `erase_gate`, of later drafts, a delta rule is [`GatedDeltaNet2`], which erases `beta *
//! erase_gate` and writes `beta`.
//!
//! Query heads of a group share a state there, and have one each here: repeat `past_state`
//! for every head of a group, and of the state afterwards take the first of each group as
//! `present_state`. `tests/onnx.rs` holds all of it against the operator.
//!
//! # Error bound
//!
//! An element of an `f32` output of a recurrence is off the definition by at
//! most
//!
//! ```text
//! ERROR_CONSTANT * 2^-24 * (state_dim + tokens + 64) * size + 2^-24 * stretch
//! ```
//!
//! with [`ERROR_CONSTANT`], where `tokens` counts those that the row sees and
//! `size` is what the row would be at most if nothing cancelled: `scale * sum_j
//! sum_c |q_c k_jc| decay * max|v_j|`; `stretch` is the same sum with each term
//! times the sum of `1 + |log decay|` over the tokens that have decayed it.
//! Mechanisms that correct their state (the
//! delta rule) have `|q|` times the largest norm that the state had as `size`
//! at least, as long as their transitions do not let it grow. A row that is
//! divided by the sum of its weights has the errors of both. Mechanisms that are
//! not plain recurrences say what theirs is. What decays (or is corrected) below
//! `2^-100` counts as 0, in the state and on the way to it, which the bound
//! counts too: subnormal numbers would cost hundreds of times as much. Where
//! nothing decays, nothing is dropped.

mod aaren;
mod agent;
mod based;
mod comba;
mod delta_product;
mod deltanet;
mod ecoformer;
mod flowformer;
mod gated_deltanet;
mod gated_deltanet2;
mod gated_slot;
mod gla;
mod hgrn2;
mod kda;
mod kernelized;
mod lightning;
mod log_linear;
mod mamba2;
mod mamba3;
mod mamba3_mimo;
mod memora;
mod mesa_net;
mod moneta;
mod performer;
mod random_features;
#[cfg(test)]
mod recurrent_tests;
mod retnet;
mod rwkv6;
mod rwkv7;
mod s6;
mod simple_gla;
mod titans;
mod yaad;

/// The mechanisms of the family in the catalogue.
#[cfg(any(test, feature = "catalog"))]
#[cfg_attr(test, expect(unused_imports, reason = "unit tests take those that carry a state"))]
pub(crate) mod exhibits {
    pub(crate) use super::aaren::AarenExhibit;
    pub(crate) use super::agent::AgentExhibit;
    pub(crate) use super::based::BasedExhibit;
    pub(crate) use super::comba::CombaExhibit;
    pub(crate) use super::delta_product::DeltaProductExhibit;
    pub(crate) use super::deltanet::DeltaNetExhibit;
    #[cfg(test)]
    pub(crate) use super::ecoformer::CausalEcoFormerExhibit;
    pub(crate) use super::ecoformer::EcoFormerExhibit;
    pub(crate) use super::flowformer::{CausalFlowformerExhibit, FlowformerExhibit};
    pub(crate) use super::gated_deltanet::GatedDeltaNetExhibit;
    pub(crate) use super::gated_deltanet2::GatedDeltaNet2Exhibit;
    pub(crate) use super::gated_slot::GatedSlotExhibit;
    pub(crate) use super::gla::GlaExhibit;
    pub(crate) use super::hgrn2::Hgrn2Exhibit;
    pub(crate) use super::kda::KdaExhibit;
    pub(crate) use super::kernelized::{CausalLinearExhibit, LinearExhibit};
    pub(crate) use super::lightning::LightningExhibit;
    pub(crate) use super::log_linear::LogLinearExhibit;
    pub(crate) use super::mamba2::Mamba2Exhibit;
    pub(crate) use super::mamba3::Mamba3Exhibit;
    pub(crate) use super::mamba3_mimo::Mamba3MimoExhibit;
    pub(crate) use super::memora::MemoraExhibit;
    pub(crate) use super::mesa_net::MesaNetExhibit;
    pub(crate) use super::moneta::MonetaExhibit;
    pub(crate) use super::performer::{CausalPerformerExhibit, PerformerExhibit};
    pub(crate) use super::retnet::RetNetExhibit;
    pub(crate) use super::rwkv6::Rwkv6Exhibit;
    pub(crate) use super::rwkv7::Rwkv7Exhibit;
    pub(crate) use super::s6::S6Exhibit;
    pub(crate) use super::simple_gla::SimpleGlaExhibit;
    pub(crate) use super::titans::{TitansExhibit, TitansMlpExhibit};
    pub(crate) use super::yaad::YaadExhibit;
}

#[cfg(all(feature = "catalog", not(test)))]
pub(crate) use random_features::RANDOM_FEATURES;

pub use crate::definition::recurrence::ERROR_CONSTANT;
pub use crate::engine::recur::Form;
pub use crate::input::gated::{ChannelGated, TokenGated};
pub use crate::input::retained::MirasQkv;
pub use crate::input::state::{State, StatePool};
pub use crate::stages::differentiate::{
    Carried, ChannelGatedGradients, DeltaGradients, GatedDeltaGradients, Hgrn2Gradients, KdaGradients,
    Mamba2Gradients, QkvGradients, Rwkv6Gradients, Rwkv7Gradients, TokenGatedGradients,
};
pub use aaren::{Aaren, AarenBuilder, AarenInput};
pub use agent::{Agent, AgentBuilder, AgentInput};
pub use based::{Based, BasedBuilder, BasedInput, BasedState};
pub use comba::{Comba, CombaBuilder, CombaQkv};
pub use delta_product::{DeltaProduct, DeltaProductBuilder, DeltaProductInput};
pub use deltanet::{DeltaNet, DeltaNetBuilder, DeltaQkv};
pub use ecoformer::{EcoFormer, EcoFormerBuilder, EcoFormerVariant};
pub use flowformer::{Flowformer, FlowformerBuilder, FlowformerState};
pub use gated_deltanet::{GatedDeltaNet, GatedDeltaNetBuilder, GatedDeltaQkv};
pub use gated_deltanet2::{GatedDelta2Qkv, GatedDeltaNet2, GatedDeltaNet2Builder};
pub use gated_slot::{GatedSlotAttention, GatedSlotAttentionBuilder, SlotQkv, SlotState};
pub use gla::{Gla, GlaBuilder};
pub use hgrn2::{Hgrn2, Hgrn2Builder, Hgrn2Input};
pub use kda::{Kda, KdaBuilder, KdaQkv};
pub use kernelized::{LinearAttention, LinearAttentionBuilder};
pub use lightning::{Lightning, LightningBuilder};
pub use log_linear::{LevelQkv, LevelState, LogLinear, LogLinearBuilder};
pub use mamba2::{Mamba2, Mamba2Builder, Mamba2Input};
pub use mamba3::{Mamba3, Mamba3Builder, Mamba3Qkv, Mamba3State};
pub use mamba3_mimo::{Mamba3Mimo, Mamba3MimoBuilder, Mamba3MimoInput};
pub use memora::{Memora, MemoraBuilder};
pub use mesa_net::{MesaNet, MesaNetBuilder, MesaQkv, MesaState};
pub use moneta::{Moneta, MonetaBuilder};
pub use performer::{Performer, PerformerBuilder};
pub use random_features::{RandomFeatureAttention, RandomFeatureAttentionBuilder, RandomFeatureInput};
pub use retnet::{RetNet, RetNetBuilder};
pub use rwkv6::{Rwkv6, Rwkv6Builder};
pub use rwkv7::{Rwkv7, Rwkv7Builder, Rwkv7Input};
pub use s6::{S6, S6Builder, S6Gradients, S6Input};
pub use simple_gla::{SimpleGla, SimpleGlaBuilder};
pub use titans::{Titans, TitansBuilder, TitansQkv};
pub use yaad::{Yaad, YaadBuilder, YaadQkv};
