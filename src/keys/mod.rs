//! Which keys an engine visits, and where it finds them.

pub(crate) mod source;
