//! What models compute around a mechanism, and mechanisms for their kernels.

pub(crate) mod algebra;
pub mod delta_gates;
pub mod features;
pub mod gates;
pub mod random;
pub mod rope;
