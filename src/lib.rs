//! Attention mechanisms on the CPU.
#![deny(unsafe_code)]

pub mod attention;
pub mod dense;
pub mod element;
pub(crate) mod engine;
pub mod error;
pub mod input;
pub mod limits;
pub mod mask;
pub mod score;
#[allow(unsafe_code)]
pub mod simd;

pub use attention::{Attention, Mergeable};
pub use engine::workspace::Workspace;
