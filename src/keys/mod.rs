//! Which keys an engine visits, and where it finds them.

pub(crate) mod arrays;
pub(crate) mod every;
pub mod grid;
pub(crate) mod images;
pub(crate) mod joined;
pub(crate) mod maps;
pub(crate) mod marked;
pub(crate) mod placed;
pub mod plan;
pub(crate) mod regions;
pub(crate) mod source;
pub(crate) mod window;

pub use grid::Grid;
pub use plan::{ATOM, BlockLists, Keys, Layout, Per, Run, TokenLists};
