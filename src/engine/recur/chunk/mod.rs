//! One chunk of tokens of one head, as matrix products.

mod advance;
mod by_channel;
mod by_token;
mod geometry;
mod prepare;
mod read;
mod rows;
mod work;

pub(crate) use advance::*;
pub(crate) use geometry::*;
pub(crate) use prepare::*;
pub(crate) use read::*;
pub(crate) use rows::*;
pub(crate) use work::*;
