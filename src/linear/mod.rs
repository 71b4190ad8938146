//! Linear attention: a state of fixed size instead of all keys.
//!
//! Each token decays, corrects and adds to a matrix, which its query reads.
//! The kernels take tokens in chunks, so that nearly all work is matrix
//! products; [`Recurrent`](crate::Recurrent) carries the state from call to
//! call, and makes one [`step`](crate::Recurrent::step) for one token.
//!
//! | mechanism | the state forgets | and takes |
//! |---|---|---|
//! | [`Based`] | nothing, beside a window of exact softmax attention | products of pairs of elements of `k`, times `v^T` |
//! | [`EcoFormer`] | nothing | hash codes of `k`, times `v^T` |
//! | [`Flowformer`] | nothing | features of `k`, times `v^T`, weighed by what flows through the token |
//! | [`Lightning`] | at a fixed rate a head | `k v^T` |
//! | [`LinearAttention`] | nothing | features of `k`, times `v^T` |
//! | [`Performer`] | nothing | random features of `k`, times `v^T` |
//!
//! # Error bound
//!
//! An element of an `f32` output is off the definition by at most
//! [`ERROR_CONSTANT`](crate::attention::ERROR_CONSTANT) `* 2^-24 * (state_dim
//! + tokens + 64) * size`, where `tokens` counts those that the row sees and
//! `size` is what the row would be at most if nothing cancelled: `scale * sum_j
//! sum_c |q_c k_jc| decay * max|v_j|`. Mechanisms that correct their state (the
//! delta rule) have `|q|` times the largest norm that the state had as `size`
//! at least. A row that is divided by the sum of its weights has the errors of
//! both.

mod based;
pub(crate) mod config;
mod ecoformer;
mod flowformer;
mod kernelized;
mod lightning;
mod performer;
mod recurrence;
pub(crate) mod reference;
mod state;
#[cfg(test)]
mod testing;

pub use based::{Based, BasedBuilder, BasedInput, BasedState};
pub use config::Form;
pub use ecoformer::{EcoFormer, EcoFormerBuilder};
pub use flowformer::{Flowformer, FlowformerBuilder, FlowformerState};
pub use kernelized::{LinearAttention, LinearAttentionBuilder};
pub use lightning::{Lightning, LightningBuilder};
pub use performer::{Performer, PerformerBuilder};
pub use state::State;
