//! Attention between tokens of an image, a sequence or a volume that are near
//! each other.
//!
//! | mechanism | a query sees |
//! |---|---|
//! | [`Neighborhood`] | the nearest keys on each axis (NATTEN) |

pub(crate) mod natten;

pub use crate::keys::grid::Grid;
pub use natten::{Neighborhood, NeighborhoodBuilder};
