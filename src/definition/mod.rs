//! Definitions in `f64` that several mechanisms share.

pub(crate) mod softmax;
