//! Functions that models feed to mechanisms, and mechanisms to kernels.

pub mod delta_gates;
pub mod gates;
