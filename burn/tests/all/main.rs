//! Outputs and gradients held against burn's own operators.

mod attend;
mod attention;
mod multi_head;
mod refusals;
mod support;
