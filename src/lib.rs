//! Attention mechanisms on the CPU.
#![deny(unsafe_code)]

pub mod attention;
pub mod catalog;
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

pub use attention::{Attention, Cost, Input, Mergeable, QkvAttention, TopWeights, Weights};
pub use element::Element;
pub use engine::merge;
pub use engine::workspace::Workspace;
pub use error::{Error, Result};
pub use input::Qkv;
