//! Small mathematics that models put around a mechanism.

pub mod features;
pub mod random;
