//! Softmax attention of [`attention-kernels`](attention_kernels) on burn's CPU tensors: one
//! operator forward and one backward, in memory linear in the lengths.
//!
//! Tensors are read where they lie, whatever their strides: transposed, narrowed, flipped and
//! expanded ones too. Outputs are written once, into the memory of the tensor that comes back.
//! No unsafe code.
//!
//! ```
//! use attention_kernels_burn::{AttentionOptions, attention};
//! use burn::tensor::{Device, Distribution, Tensor};
//!
//! let device = Device::flex().autodiff();
//! let project = |heads| {
//!     // As projections leave them: [batch, len, heads, dim], transposed.
//!     Tensor::<4>::random([1, 100, heads, 64], Distribution::Default, &device).require_grad().swap_dims(1, 2)
//! };
//! let (q, k, v) = (project(32), project(8), project(8));
//! let options = AttentionOptions { is_causal: true, ..Default::default() };
//! let y = attention(q.clone(), k, v, None, None, options)?;
//! assert_eq!(y.dims(), [1, 32, 100, 64]);
//! let gradients = y.sum().backward();
//! # Ok::<(), attention_kernels::Error>(())
//! ```
//!
//! | | |
//! |---|---|
//! | [`attention`] | with the arguments of [`burn::tensor::module::attention`], and windows and sinks |
//! | [`attend`] | with any mask and any smooth change of scores of `attention-kernels` |
//! | [`AttentionBackend`] | both on the primitives of a backend, for those who extend backends |
//!
//! `burn` stands for [`burn_core`](burn), whose tensors are those of the crate `burn`.
//!
//! # Types and devices
//!
//! [`f32`], [`half::f16`] and [`half::bf16`] on the backend [`Flex`](burn::backend::Flex), with
//! and without [`Autodiff`](burn::backend::Autodiff); arithmetic is [`f32`]. Anything else is
//! refused with an error that names the argument, what was expected and what came.
//!
//! # Threads
//!
//! Kernels run on the current thread pool of rayon, as those of `Flex` do. Without the feature
//! `rayon` they run on the caller's thread.
#![deny(unsafe_code, missing_docs)]

mod arrays;
mod backend;
mod mechanism;
mod tensor;

pub use backend::AttentionBackend;
pub use mechanism::AttentionOptions;
pub use tensor::{attend, attention};

/// Runs the code of the README with the tests of the docs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
