//! Sparse attention: exact attention on some of the keys.
//!
//! | mechanism | a query sees |
//! |---|---|
//! | [`BiFormer`] | of an image the regions whose mean keys its own region's mean query scores highest |
//! | [`BlockSparse`] | the blocks of keys that a map of the caller's names |
//! | [`Bottleneck`] | the few elements of a state that selectors choose for all readers |
//! | [`Cca`] | the near past, and the far one in groups that are merged into one key each |
//! | [`Combiner`] | its own segment, and of the others one key each that stands for them |
//! | [`Hcam`] | chunks of a memory whose summaries score highest, each by itself |
//! | [`Landmark`] | its own block, and the earlier ones whose landmark tokens score highest, gated by these |
//! | [`DynamicMask`] | the keys with the largest biases, which their values say |
//! | [`FlexPrefill`] | columns, diagonals or a map of blocks, as the last queries of each head show |
//! | [`Hip`] | blocks of keys found by halving ranges, sinks and a window |
//! | [`Csa`] | a window, and the pools of tokens to which an index gives most |
//! | [`Dsa`] | the keys to which a weighted index of many heads gives most |
//! | [`Hca`] | a window, and all pools of tokens before |
//! | [`HyperAttention`] | the tokens that hash alike, and drawn ones that stand for the others |
//! | [`InfLlm`] | local blocks, and those whose pooled keys score highest |
//! | [`LongHeads`] | chunks by their attended keys, put together as near as they were in training |
//! | [`LongLora`] | its group, which for half of the heads lies half a group later, and sinks |
//! | [`MoA`] | a sink and a window, of another length for each head |
//! | [`Moba`] | its own block, and earlier ones whose mean keys score highest |
//! | [`Msa`] | its own block, and those that hold the keys with the highest index scores |
//! | [`Nsa`] | pooled keys, the blocks that these point to, and a window, gated |
//! | [`Qsa`] | groups of keys by a pooled index, and what follows the last group |
//! | [`Quest`] | the pages of keys with the highest bounds of their scores |
//! | [`Radial`] | of a frame of a video the less the further it is |
//! | [`RecycledAttention`] | the keys most attended to in an earlier step, and those since |
//! | [`RetrievalAttention`] | the first keys, the last ones, and those that a search by product finds |
//! | [`Routing`] | the keys that the centroids take which have taken the query |
//! | [`S2Attention`] | a window of blocks and strided ones, at another phase for each head |
//! | [`Sale`] | the first keys, the last, and tiles whose weights, estimated with 4 bits, may count |
//! | [`Sea`] | the keys under the pixels of an estimate that all heads want most, and the mean of all |
//! | [`SeerAttention`] | the blocks that a learned gate over pooled queries and keys opens |
//! | [`SeerAttentionR`] | the same in decoding: each query asks a gate over pooled keys |
//! | [`Tksa`] | channels see the most similar ones (DRSformer) |
//! | [`SlidingTile`] | a window of 3-D tiles of a video |
//! | [`SqueezedAttention`] | the clusters of a prefix whose keys are estimated to weigh enough, and what comes after |
//! | [`TidalDecode`] | the keys with the highest scores in an earlier layer |
//! | [`TokenSelect`] | sinks, the last keys, and those that all heads vote for, for steps alike |
//! | [`Sparsifiner`] | the tokens of an image that a low-rank attention points at |
//! | [`TopK`] | the keys with the highest scores |
//!
//! # Blocks, and how long a sequence is
//!
//! A block, page, chunk, pool, segment or group of no tokens is refused by the name of its
//! argument, when a mechanism is built. One that is longer than a sequence is refused where
//! the mechanism is built for tokens of one number, the grid of an image or of a video
//! ([`Radial`], [`SlidingTile`]): there it is a mistake. Everywhere else lengths come with
//! each call, and are below a block while a cache fills, in short prompts, and for the
//! shorter ones of a ragged batch. Such a sequence has one block, which ends where the
//! sequence does, and no pool, landmark or core yet, since those are of whole ones.
//!
//! # Choices
//!
//! What has no score because it is NaN is never chosen: lists are shorter then, or empty,
//! and a query whose list is empty gives 0 and an LSE of -inf. Where scores are shares of
//! a softmax, one that is NaN makes all of them NaN. What a query must see, its
//! own block, sinks or a window, it sees whatever is in it.
//!
//! Mechanisms that select keys have [`Selects`](crate::Selects): the choice is
//! an index, which is data. A row of which a selection keeps the share `p` of
//! dense attention's weights is off dense attention by at most `2 (1 - p)
//! max|v|`.

pub(crate) mod biformer;
pub(crate) mod block_sparse;
pub(crate) mod bottleneck;
pub(crate) mod cca;
pub(crate) mod combiner;
pub(crate) mod csa;
pub(crate) mod dsa;
pub(crate) mod dynamic_mask;
pub(crate) mod flex_prefill;
pub(crate) mod hca;
pub(crate) mod hcam;
pub(crate) mod hip;
pub(crate) mod hyper;
pub(crate) mod infllm;
pub(crate) mod landmark;
pub(crate) mod long_heads;
pub(crate) mod long_lora;
pub(crate) mod moa;
pub(crate) mod moba;
pub(crate) mod msa;
pub(crate) mod nsa;
pub(crate) mod qsa;
pub(crate) mod quest;
pub(crate) mod radial;
pub(crate) mod recycled;
pub(crate) mod retrieval;
pub(crate) mod routing;
pub(crate) mod s2;
pub(crate) mod sale;
pub(crate) mod sea;
pub(crate) mod seer;
pub(crate) mod seer_r;
pub(crate) mod sliding_tile;
pub(crate) mod sparsifiner;
pub(crate) mod squeezed;
pub(crate) mod tidal_decode;
pub(crate) mod tksa;
pub(crate) mod token_select;
pub(crate) mod top_k;

#[cfg(test)]
mod refusals;
#[cfg(test)]
mod testing;

pub use crate::cache::CachedBranches;
pub use crate::cache::cored::{Cored, CoredCache, Cores};
pub use crate::input::branched::Branches;
pub use crate::input::gate::Gated;
pub use crate::keys::maps::{BlockPlan, block_map};
pub use crate::mask::frames::Blocks;
pub use crate::stages::buckets::Buckets;
pub use crate::stages::compressed::{Compressed, CompressedCache};
pub use crate::stages::lived::DynamicKeys;
pub use biformer::{BiFormer, BiFormerBuilder};
pub use block_sparse::{BlockSparse, BlockSparseBuilder};
pub use bottleneck::{Bottleneck, BottleneckBuilder, BottleneckInput};
pub use cca::{Cca, CcaBuilder};
pub use combiner::{Combiner, CombinerBuilder, Pooling};
pub use csa::{Csa, CsaBuilder};
pub use dsa::{Dsa, DsaBuilder};
pub use dynamic_mask::{DynamicMask, DynamicMaskBuilder};
pub use flex_prefill::{FlexPrefill, FlexPrefillBuilder};
pub use hca::{Hca, HcaBuilder};
pub use hcam::{Hcam, HcamBuilder, HcamInput};
pub use hip::{Hip, HipBuilder};
pub use hyper::{HyperAttention, HyperBuilder};
pub use infllm::{InfLlm, InfLlmBuilder};
pub use landmark::{Landmark, LandmarkBuilder};
pub use long_heads::{LongCache, LongHeads, LongHeadsBuilder, LongInput};
pub use long_lora::{LongLora, LongLoraBuilder};
pub use moa::{MoA, MoABuilder};
pub use moba::{Moba, MobaBuilder};
pub use msa::{Msa, MsaBuilder};
pub use nsa::{Nsa, NsaBuilder};
pub use qsa::{Qsa, QsaBuilder};
pub use quest::{Quest, QuestBuilder};
pub use radial::{Radial, RadialBuilder};
pub use recycled::{RecycledAttention, RecycledBuilder};
pub use retrieval::{RetrievalAttention, RetrievalBuilder};
pub use routing::{Routed, Routing, RoutingBuilder};
pub use s2::{S2Attention, S2AttentionBuilder};
pub use sale::{Sale, SaleBuilder};
pub use sea::{Sea, SeaBuilder, SeaInput};
pub use seer::{SeerAttention, SeerBuilder};
pub use seer_r::{SeerAttentionR, SeerAttentionRBuilder};
pub use sliding_tile::{SlidingTile, SlidingTileBuilder};
pub use sparsifiner::{Sparsifiner, SparsifinerBuilder};
pub use squeezed::{SqueezedAttention, SqueezedBuilder};
pub use tidal_decode::{TidalBuilder, TidalDecode};
pub use tksa::{Tksa, TksaBuilder};
pub use token_select::{TokenSelect, TokenSelectBuilder};
pub use top_k::{TopK, TopKBuilder};

/// What the catalogue shows.
#[cfg(all(feature = "catalog", not(test)))]
pub(crate) mod exhibits {
    pub(crate) use super::biformer::BiFormerExhibit;
    pub(crate) use super::block_sparse::BlockSparseExhibit;
    pub(crate) use super::bottleneck::BottleneckExhibit;
    pub(crate) use super::cca::CcaExhibit;
    pub(crate) use super::combiner::CombinerExhibit;
    pub(crate) use super::csa::CsaExhibit;
    pub(crate) use super::dsa::DsaExhibit;
    pub(crate) use super::dynamic_mask::DynamicMaskExhibit;
    pub(crate) use super::flex_prefill::FlexPrefillExhibit;
    pub(crate) use super::hca::HcaExhibit;
    pub(crate) use super::hcam::HcamExhibit;
    pub(crate) use super::hip::HipExhibit;
    pub(crate) use super::hyper::{CausalHyperExhibit, HyperExhibit};
    pub(crate) use super::infllm::InfLlmExhibit;
    pub(crate) use super::landmark::LandmarkExhibit;
    pub(crate) use super::long_heads::LongHeadsExhibit;
    pub(crate) use super::long_lora::LongLoraExhibit;
    pub(crate) use super::moa::MoAExhibit;
    pub(crate) use super::moba::MobaExhibit;
    pub(crate) use super::msa::MsaExhibit;
    pub(crate) use super::nsa::NsaExhibit;
    pub(crate) use super::qsa::QsaExhibit;
    pub(crate) use super::quest::QuestExhibit;
    pub(crate) use super::radial::RadialExhibit;
    pub(crate) use super::recycled::RecycledExhibit;
    pub(crate) use super::retrieval::RetrievalExhibit;
    pub(crate) use super::routing::RoutingExhibit;
    pub(crate) use super::s2::S2Exhibit;
    pub(crate) use super::sale::SaleExhibit;
    pub(crate) use super::sea::{CausalSeaExhibit, SeaExhibit};
    pub(crate) use super::seer::SeerExhibit;
    pub(crate) use super::seer_r::SeerRExhibit;
    pub(crate) use super::sliding_tile::SlidingTileExhibit;
    pub(crate) use super::sparsifiner::SparsifinerExhibit;
    pub(crate) use super::squeezed::SqueezedExhibit;
    pub(crate) use super::tidal_decode::TidalExhibit;
    pub(crate) use super::tksa::TksaExhibit;
    pub(crate) use super::token_select::TokenSelectExhibit;
    pub(crate) use super::top_k::TopKExhibit;
}
