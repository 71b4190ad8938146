//! Sparse attention: exact attention on some of the keys.
//!
//! | mechanism | a query sees |
//! |---|---|
//! | [`BlockSparse`] | the blocks of keys that a map of the caller's names |
//! | [`Quest`] | the pages of keys with the highest bounds of their scores |
//! | [`TopK`] | the keys with the highest scores |
//!
//! Mechanisms that select keys have [`Selects`](crate::Selects): the choice is
//! an index, which is data. A row of which a selection keeps the share `p` of
//! dense attention's weights is off dense attention by at most `2 (1 - p)
//! max|v|`.

pub(crate) mod block_sparse;
pub(crate) mod quest;
pub(crate) mod top_k;

#[cfg(test)]
mod testing;

pub use block_sparse::{BlockPlan, BlockSparse, BlockSparseBuilder, block_map};
pub use quest::{Quest, QuestBuilder};
pub use top_k::{TopK, TopKBuilder};
