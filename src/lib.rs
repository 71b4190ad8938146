//! Attention mechanisms on the CPU: tiled SIMD kernels, each with its
//! definition in `f64`, behind one trait.
//!
//! ```
//! use attention_kernels::{Attention, Qkv, dense::Dense};
//! use ndarray::Array4;
//!
//! let q = Array4::<f32>::ones((1, 8, 100, 64)); // [batch, heads, len, dim]
//! let k = Array4::<f32>::ones((1, 2, 100, 64)); // 8 query heads share 2
//! let v = Array4::<f32>::ones((1, 2, 100, 64));
//! let x = Qkv::new(q.view(), k.view(), v.view());
//!
//! let attention = Dense::builder().causal().build()?;
//! let out = attention.forward(x)?; // the kernel
//! let exact = attention.reference(x)?; // the definition
//! assert!(out.iter().zip(&exact).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6));
//! # Ok::<(), attention_kernels::Error>(())
//! ```
//!
//! # The map of the house
//!
//! What you call:
//!
//! | | |
//! |---|---|
//! | [`Attention`] | the trait: kernel, definition, cost |
//! | [`Bounded`], [`Mergeable`], [`Weights`], [`Recurrent`], [`Backward`], [`Selects`], [`Reuses`] | what some mechanisms can do besides |
//! | [`Mechanism`], [`Card`] | what a mechanism says of itself |
//! | [`dense`] | the mechanisms over all visible keys |
//! | [`neighborhood`] | the mechanisms between tokens of an image that are near each other |
//! | [`linear`] | the mechanisms that keep a state of fixed size |
//! | [`latent`] | the mechanisms over one small row a token |
//! | [`cache`] | where keys and values of growing sequences live |
//! | [`sparse`] | the mechanisms that look at some of the keys |
//! | [`mask`], [`score`] | which keys a query sees, and what may happen to scores; closures included |
//! | [`keys`] | plans: lists of the keys that blocks of queries visit |
//! | [`onnx`] | ONNX's operators with their own arguments |
//! | [`math`] | what models compute around a mechanism: gates, feature maps |
//! | [`merge`] | attention over parts of the keys, put together |
//! | [`Qkv`] | queries, keys and values: whole batches, padded ones, packed ones |
//! | [`raw`] | slices with shape and strides, for callers without ndarray |
//! | [`Workspace`] | scratch memory, so that calls allocate nothing |
//!
//! How it works: a mechanism is configuration. It hands its mask, its change
//! of scores and its arrays to one of few engines, the loop nests, which are
//! safe code over the vectors of `simd`. That module has all the unsafe code
//! of the crate, and one place that chooses the instruction set.
//!
//! # Which attention do I want?
//!
//! | you have | begin with |
//! |---|---|
//! | a trained model with softmax attention | [`dense::Dense`]: masks and changes of scores of the model are types or closures |
//! | its tokens one by one | the same over a cache: [`cache::Contiguous`], or [`cache::Paged`] for many sequences |
//! | prompts that share a beginning, drafts to verify, keys on several threads or machines | [`Mergeable`] and [`merge`], [`mask::Tree`] |
//! | too large a cache | [`cache::Int8`], [`cache::Int4`], [`cache::Kivi`]; [`cache::Ring`] for a window and sinks; [`select::SnapKv`] and [`select::HeavyHitters`] for what may be left out; latents if the model can be converted: [`latent::TransMla`] |
//! | a model with latents | [`latent::Mla`], expanded for prompts, absorbed for steps |
//! | a long prompt for a model that was trained dense | [`sparse::FlexPrefill`], [`sparse::HyperAttention`] |
//! | many steps over a long context, likewise | [`sparse::Quest`], [`sparse::TokenSelect`], [`sparse::RetrievalAttention`] |
//! | a model that was trained to choose its keys | its own mechanism: [`sparse::Dsa`], [`sparse::Msa`], [`sparse::Nsa`], [`sparse::Moba`], [`sparse::Csa`] |
//! | a stream without end, or memory that must not grow | a state: [`linear::GatedDeltaNet`], [`linear::Kda`], [`linear::Rwkv7`], [`linear::Mamba2`], or what the model has of [`linear`] |
//! | images and volumes | [`neighborhood::Neighborhood`], [`neighborhood::Swin`], and channels: [`neighborhood::Davit`] |
//! | many tokens that are to become few | [`latent::EfficientProbing`], [`latent::Perceiver`] |
//! | a model to train | what has [`Backward`] |
//! | a model in ONNX | [`onnx::Attention`], [`onnx::LinearAttention`] |
//! | a paper to understand | [`Attention::reference`], the docs of its type, and the example `atlas` |
//!
//! Without optimisation (`cargo run` in the profile `dev`) kernels are tens of times
//! slower. In the `Cargo.toml` of the program:
//!
//! ```toml
//! [profile.dev.package."*"]
//! opt-level = 3
//!
//! [profile.dev]
//! opt-level = 1 # masks and scores that are closures are compiled in your own crate
//! ```
//!
//! # Semantics
//!
//! - Logical axes are `[batch, heads, len, dim]`, of any strides: negative
//!   and zero ones too. `q_heads` is a multiple of `kv_heads`; values may be of
//!   another dimension than keys.
//! - Causality is about positions: query `i` sits at `i + q_start`, by default
//!   with the last query at the last key.
//! - A query that sees no key gives 0, and an LSE of -inf. LSEs are natural
//!   logarithms.
//! - What is masked cannot matter, NaN and infinity included. A NaN that is
//!   visible shows in every output that depends on it. A mechanism that chooses keys
//!   chooses none whose score is NaN, and sees none then: a query that is NaN gives 0.
//! - Arithmetic is `f32` for every storage type, and the output is rounded to
//!   its type once, to nearest even.
//! - The bits of a row depend on its own sequence and on the sizes of the
//!   call: not on the number of threads, nor on the rows around it.
//! - What does not fit is refused with an [`Error`] before anything is
//!   written. Empty batches, heads, queries and keys are valid.
//! - The error against the definition is bounded:
//!   [`ERROR_CONSTANT`](attention::ERROR_CONSTANT).
//!
//! # Features
//!
//! `rayon` (default): kernels run on the current thread pool of rayon.
//! Without it they run on the caller's thread.
#![deny(unsafe_code, missing_docs)]
// What shows a mechanism is read by the catalogue alone: dead code is looked for with it.
#![cfg_attr(any(test, not(feature = "catalog")), allow(dead_code))]

pub mod attention;
pub mod cache;
pub(crate) mod card;
// Every mechanism in every storage type: half of what there would be to compile, which
// neither users nor unit tests need.
#[cfg(all(feature = "catalog", not(test)))]
#[doc(hidden)]
pub mod catalog;
pub(crate) mod definition;
pub mod dense;
pub mod element;
pub(crate) mod engine;
pub mod error;
pub mod input;
pub mod keys;
pub mod latent;
#[doc(hidden)]
pub mod limits;
pub mod linear;
pub mod mask;
pub mod math;
pub mod neighborhood;
pub mod onnx;
pub mod raw;
pub mod score;
pub mod select;
#[allow(unsafe_code)]
#[doc(hidden)]
pub mod simd;
pub mod sparse;
pub(crate) mod stages;
#[cfg(test)]
pub(crate) mod testing;

pub use attention::{
    Attention, Backward, BackwardState, Bounded, Cost, Input, Margins, Mechanism, Mergeable, Pooled,
    Recurrent, Reuses, ScoreGradients, Selects, TopWeights, Weights,
};
pub use card::Card;
pub use element::Element;
pub use engine::merge;
pub use engine::workspace::Workspace;
pub use error::{Error, Result};
pub use input::Qkv;
#[doc(inline)]
pub use simd::{ISA_VARIABLE, Isa};
pub use {half, ndarray};

/// Runs the code of the README with the tests of the docs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
