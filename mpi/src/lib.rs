//! Attention over sequences that are cut over the ranks of an MPI communicator, with the
//! kernels of [`attention-kernels`](attention_kernels).
//!
//! What crosses the wire is a state: of a recurrence its matrix, of softmax attention
//! output and LSE. Both merge, so that no rank ever needs the whole.
//!
//! | | what travels | bytes that a rank sends a layer |
//! |---|---|---|
//! | [`ring`] | keys and values, once around | `(ranks - 1) (head_dim + value_dim) kv_heads len / ranks`, times the size of an element |
//! | [`gathered`] | keys and values, to everyone: distributed multi-head attention, softmax layers of LASP-2H | as many, in one step |
//! | [`lasp`] | one state of a recurrence, to everyone: LASP-2 | whatever the length, `4 (ranks - 1) heads head_dim (value_dim + 1)` |
//! | [`heads`] | tokens against heads, and back: all-to-all | `(ranks - 1) / ranks^2 len` rows of all heads |
//! | [`spread`] | queries to a cache, output and LSE back: DistAttention | `(head_dim + value_dim + 1) q_heads q_len` a rank |
//! | [`plan`] | nothing: who holds which tokens and blocks | |
//! | [`model`] | nothing: what layers would take on other machines | |
//!
//! Every call is a collective one: all ranks of a [`Group`] make the same calls in the same
//! order. Before a call sends anything large, ranks tell each other what they have: where
//! one of them is wrong, or does not come within the [patience](Group::patience) of the
//! group, every other gets an [`Error`] that names it.
//!
//! The same cut gives the same bits, whatever arrives first.
#![deny(unsafe_code, missing_docs)]

mod error;
mod stored;
mod wire;

pub mod gathered;
pub mod heads;
pub mod lasp;
pub mod model;
pub mod plan;
pub mod ring;
pub mod spread;

pub use attention_kernels;
pub use error::{Error, Result};
pub use mpi;
pub use stored::Stored;
pub use wire::{Group, Traffic};

/// Runs the code of the README with the tests of the docs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
