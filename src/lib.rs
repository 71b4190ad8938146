//! Attention mechanisms on the CPU.
#![deny(unsafe_code)]

pub mod element;
pub mod error;
#[allow(unsafe_code)]
pub mod simd;
