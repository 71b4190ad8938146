//! Attention between tokens of an image, a sequence or a volume that are near
//! each other.
//!
//! | mechanism | a query sees |
//! |---|---|
//! | [`Neighborhood`] | the nearest keys on each axis (NATTEN) |
//! | [`Swin`] | the keys of its window, which may be shifted |

pub(crate) mod natten;
pub(crate) mod swin;

pub use crate::keys::grid::Grid;
pub use natten::{Neighborhood, NeighborhoodBuilder};
pub use swin::{Padding, Swin, SwinBuilder};
