//! Small mathematics that models put around a mechanism: plain functions.

pub mod delta_gates;
