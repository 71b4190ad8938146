//! Definitions in `f64` that several mechanisms share.

pub(crate) mod attend;
#[cfg(test)]
pub(crate) mod cascade;
pub(crate) mod difference;
pub(crate) mod hash;
pub(crate) mod heads;
pub(crate) mod number;
pub(crate) mod online;
pub(crate) mod recurrence;
pub(crate) mod recurrence_backward;
pub(crate) mod related_backward;
pub(crate) mod search;
pub(crate) mod select;
pub(crate) mod selective_scan;
pub(crate) mod softmax;
pub(crate) mod softmax_backward;
