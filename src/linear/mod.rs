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
//! | [`Lightning`] | at a fixed rate a head | `k v^T` |
//! | [`S6`] | each element by itself, as the token says | `delta B u` of each channel |
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

mod aaren;
pub(crate) mod config;
mod lightning;
mod recurrence;
pub(crate) mod reference;
mod s6;
mod state;
#[cfg(test)]
pub(crate) mod testing;

pub use aaren::{Aaren, AarenBuilder, AarenInput};
pub use config::Form;
pub use lightning::{Lightning, LightningBuilder};
pub use s6::{S6, S6Builder, S6Input};
pub use state::State;
