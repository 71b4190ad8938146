//! Dense attention: every visible key counts.
//!
//! | mechanism | weights |
//! |---|---|
//! | [`Dense`] | `softmax(score)`: multi-head, grouped and multi-query attention, with masks, biases and sinks |
//! | [`Sigmoid`] | `sigmoid(score + bias)`, not normalised over keys |
//! | [`Selective`] | `softmax(temperature * score)`, over values with temperatures of their own |

pub(crate) mod selective;
pub(crate) mod sigmoid;
pub(crate) mod softmax;

pub use crate::stages::attend_backward::{SavedForward, SoftmaxGradients};
pub use selective::{Selective, SelectiveBuilder, Tempered, position_temperature, token_temperature};
pub use sigmoid::{Sigmoid, SigmoidBuilder};
pub use softmax::{Dense, DenseBuilder};
