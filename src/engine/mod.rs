//! Few loop nests, written once and generic over instruction set, mask and
//! score. Mechanisms are configurations of them.

pub(crate) mod attend;
pub(crate) mod call;
pub(crate) mod pack;
pub(crate) mod parallel;
pub(crate) mod workspace;
