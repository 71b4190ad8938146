//! Which keys an engine visits, and where it finds them.

pub mod plan;
pub(crate) mod source;

pub use plan::{ATOM, BlockLists, Keys, Layout, Per, Run, TokenLists};
