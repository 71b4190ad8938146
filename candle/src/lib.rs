//! The mechanisms of [`attention-kernels`](attention_kernels) on candle's CPU tensors.
//!
//! Tensors are read where they lie, whatever their strides: transposed, narrowed and
//! broadcast ones too. Outputs are written once, into the memory of the tensor that
//! comes back. No unsafe code.
//!
//! ```
//! use attention_kernels_candle::{BlockAttention, BlockOptions};
//! use candle_core::{Device, Tensor};
//!
//! // As projections leave them: [batch, len, heads, dim], transposed.
//! let q = Tensor::rand(-1f32, 1., (1, 100, 32, 64), &Device::Cpu)?.transpose(1, 2)?;
//! let kv = Tensor::rand(-1f32, 1., (1, 100, 8, 64), &Device::Cpu)?.transpose(1, 2)?;
//! let llama = BlockAttention::new(BlockOptions::default())?;
//! let y = llama.forward(&q, &kv, &kv)?; // no repeat_kv, no mask, no scores in memory
//! assert_eq!(y.dims(), [1, 32, 100, 64]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | | gradients |
//! |---|---|
//! | [`BlockAttention`]: causal attention as configurations of models have it | yes |
//! | [`attend`], [`attend_with_sinks`]: softmax attention, any mask and smooth change of scores | yes |
//! | [`attend_with_lse`], [`merge_parts`]: attention over parts of the keys | no |
//! | [`mix`]: recurrences over whole sequences; [`mamba2`] with its parameters | yes |
//! | [`mix_from`], [`mamba2`] from a state | no |
//! | [`append`], [`attend_cached`]: contiguous, paged and quantised caches | no |
//! | [`latent_attend`], [`append_latents`], [`latent_attend_cached`]: MLA | no |
//! | [`read`], [`forward`], [`prefill`]: any other mechanism of `attention-kernels` | no |
//!
//! Where there are no gradients, asking candle for them is an error, except behind
//! [`forward`] and [`prefill`], whose outputs are constants to it.
//!
//! # Types and devices
//!
//! [`f32`], [`half::f16`] and [`half::bf16`] on the CPU; arithmetic is [`f32`]. Anything else
//! is refused with a message that names the argument, what was expected and what came.
//! Errors of the kernels come as [`candle_core::Error`].
//!
//! # Threads
//!
//! Kernels run on the current thread pool of rayon, as candle's matrix products do; within
//! [`Device::with_context`](candle_core::Device::with_context) it is candle's. Without the
//! feature `rayon` they run on the caller's thread. Products with quantised weights have
//! threads of candle's own, which wait actively for a moment after each: where they slow
//! down what follows, `CANDLE_BARRIER_POOL_SPIN_LIMIT` shortens it.
#![deny(unsafe_code, missing_docs)]

mod arrays;
mod block;
mod cache;
mod dense;
mod graph;
mod latent;
mod mamba;
mod recurrent;

pub use arrays::{Reading, Stored, read};
pub use block::{BlockAttention, BlockOptions};
pub use cache::{append, attend_cached};
pub use dense::{attend, attend_with_lse, attend_with_sinks, forward, merge_parts, prefill};
pub use latent::{LatentCache, append_latents, latent_attend, latent_attend_cached};
pub use mamba::{Mamba2Tensors, mamba2};
pub use recurrent::{Mixes, mix, mix_from, state_from_tensor, state_to_tensor};

/// Runs the code of the README with the tests of the docs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
