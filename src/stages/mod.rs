//! What mechanisms are made of: configured calls of engines, and the code that
//! turns such a configuration into the traits of the crate.

pub(crate) mod attend;
pub(crate) mod attend_backward;
pub(crate) mod bilinear;
pub(crate) mod border;
pub(crate) mod channels;
pub(crate) mod convolve;
pub(crate) mod delta_rule;
pub(crate) mod differentiate;
pub(crate) mod dynamic;
pub(crate) mod flow;
pub(crate) mod grid;
pub(crate) mod halo;
pub(crate) mod lay;
pub(crate) mod linear;
pub(crate) mod listed;
pub(crate) mod map;
pub(crate) mod mapped;
pub(crate) mod nested;
pub(crate) mod options;
pub(crate) mod pass;
pub(crate) mod patterned;
pub(crate) mod planned;
pub(crate) mod pool;
pub(crate) mod project;
pub(crate) mod recur;
pub(crate) mod relative;
pub(crate) mod rest;
pub(crate) mod reusing;
pub(crate) mod sample;
pub(crate) mod searching;
pub(crate) mod selecting;
pub(crate) mod shrink;
pub(crate) mod sourced;
pub(crate) mod sum;
pub(crate) mod window;
