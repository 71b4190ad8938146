//! Few loop nests, written once and generic over instruction set, mask and
//! score. Mechanisms are configurations of them.

pub(crate) mod attend;
pub(crate) mod attend_backward;
pub(crate) mod call;
pub(crate) mod decode;
pub(crate) mod kept;
pub mod merge;
pub(crate) mod online;
pub(crate) mod parallel;
pub(crate) mod recur;
pub(crate) mod row;
mod run;
pub(crate) mod scores;
pub(crate) mod selective_scan;
pub(crate) mod softmax_scan;
pub(crate) mod weights;
pub(crate) mod workspace;

pub(crate) use run::{run, run_in, workspace_bytes};
