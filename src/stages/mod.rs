//! What mechanisms are made of: configured calls of engines, and the code that
//! turns such a configuration into the traits of the crate.

pub(crate) mod attend;
pub(crate) mod attend_backward;
pub(crate) mod delta_rule;
pub(crate) mod differentiate;
pub(crate) mod grid;
pub(crate) mod latent;
pub(crate) mod listed;
pub(crate) mod mapped;
pub(crate) mod nested;
pub(crate) mod options;
pub(crate) mod patterned;
pub(crate) mod planned;
pub(crate) mod project;
pub(crate) mod recur;
pub(crate) mod reusing;
pub(crate) mod searching;
pub(crate) mod selecting;
pub(crate) mod sourced;
