//! What mechanisms are made of: configured calls of engines, and the code that
//! turns such a configuration into the traits of the crate.

pub(crate) mod attend;
