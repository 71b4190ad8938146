//! Dense attention: every visible key counts.
//!
//! | mechanism | weights |
//! |---|---|
//! | [`Dense`] | `softmax(score)`: multi-head, grouped and multi-query attention, with masks, biases and sinks |
//! | [`Sigmoid`] | `sigmoid(score + bias)`, not normalised over keys |
//! | [`Act`] | those of a softmax, of which sinks give some to others |
//! | [`Additive`] | those of a softmax of scores that a small network gives |
//! | [`Differential`] | those of one attention less a share of another's |
//! | [`Gated`] | those of any other, whose output goes through a gate of the query |
//! | [`Moh`] | those of a softmax, whose outputs have gains; heads without are left out |
//! | [`RelativePositions`] | `softmax(score + query . embedding of the distance)` |
//! | [`Selective`] | `softmax(temperature * score)`, over values with temperatures of their own |
//! | [`TokenFormer`] | `gelu(score)`, scores divided by their norm over keys |
//! | [`Var`] | those of a softmax, of which sinks give some to an image |

pub(crate) mod act;
pub(crate) mod additive;
pub(crate) mod differential;
pub(crate) mod gated;
pub(crate) mod moh;
pub(crate) mod relative;
pub(crate) mod selective;
pub(crate) mod sigmoid;
pub(crate) mod softmax;
pub(crate) mod token_former;
pub(crate) mod var;

pub use crate::stages::attend_backward::{SavedForward, SoftmaxGradients};
pub use act::{Act, ActBuilder, act_sinks};
pub use additive::{Additive, AdditiveBuilder};
pub use differential::{Differential, Pair, lambda_init};
pub use gated::{Gated, WithGate};
pub use moh::{Moh, MohBuilder, WithGains, moh_gains};
pub use relative::{RelativePositions, RelativePositionsBuilder};
pub use selective::{Selective, SelectiveBuilder, Tempered, position_temperature, token_temperature};
pub use sigmoid::{Sigmoid, SigmoidBuilder};
pub use softmax::{Dense, DenseBuilder};
pub use token_former::{TokenFormer, TokenFormerBuilder, TokenWeights};
pub use var::{Var, VarBuilder, visual_sinks};
