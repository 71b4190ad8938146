//! Dense attention: every visible key counts.

mod attention;

pub use attention::{Dense, DenseBuilder};
