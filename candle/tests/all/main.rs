//! Outputs and gradients held against candle's own operators.

mod block;
mod cache;
mod dense;
mod latent;
mod recurrent;
mod refusals;
mod support;
