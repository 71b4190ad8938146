//! Dense attention: every visible key counts.
//!
//! | mechanism | weights |
//! |---|---|
//! | [`Dense`] | `softmax(score)`: multi-head, grouped and multi-query attention, with masks, biases and sinks |
//! | [`Sigmoid`] | `sigmoid(score + bias)`, not normalised over keys |
//! | [`Act`] | those of a softmax, of which sinks give some to others |
//! | [`Additive`] | those of a softmax of scores that a small network gives |
//! | [`Adversarial`] | those of a softmax of scores that are moved to where a loss grows |
//! | [`AttnRes`] | those of a softmax over what one token was in earlier layers |
//! | [`Augmented`] | those of a softmax over own keys and those of a reference, scores of these corrected |
//! | [`Differential`] | those of one attention less a share of another's |
//! | [`Gated`] | those of any other, whose output goes through a gate of the query |
//! | [`Guidance`] | the mean of those of softmaxes over sets of keys, each over values of its own |
//! | [`KeyMask`] | those of a softmax, of which masked keys have scores near 0, or none |
//! | [`KeyLock`] | those of a softmax over a text, of which some concepts have keys and values of their own |
//! | [`Moh`] | those of a softmax, whose outputs have gains; heads without are left out |
//! | [`Pill`] | those of a softmax, over values of which those of images have gates |
//! | [`Rcmha`] | `softmax(score + query . embedding of the distance)` of what short convolutions give |
//! | [`PAdapter`] | those of a softmax times a power of the distance of features |
//! | [`Paint`] | those of a softmax, of which the last query's favour tokens of an image |
//! | [`Path`] | those of a softmax, whose keys each token between them and the query has turned |
//! | [`RelativePositions`] | `softmax(score + query . embedding of the distance)` |
//! | [`Sage`] | `softmax(score)`, scores of 8-bit codes |
//! | [`Selective`] | `softmax(temperature * score)`, over values with temperatures of their own |
//! | [`TokenFormer`] | `gelu(score)`, scores divided by their norm over keys |
//! | [`Var`] | those of a softmax, of which sinks give some to an image |
//! | [`Vhr`] | those of a softmax, whose heads have gains |
//! | [`ZeroTuning`] | those of a softmax, of which those of the first token are multiplied |
//! | [`VideoBooth`] | those of a softmax over the frame before and the first, which an exemplar spoke to |
//!
//! # What is a few calls
//!
//! KeNet's label attention (arXiv 2403.01767): queries are embeddings of labels, the
//! same for all documents, and a scale of 1. A document without tokens gives 0.
//!
//! ```
//! use attention_kernels::{Attention, Qkv, dense::Dense};
//! use ndarray::Array4;
//!
//! let (labels, states) = (Array4::<f32>::ones((1, 1, 500, 32)), Array4::<f32>::ones((2, 1, 80, 32)));
//! let labels = labels.broadcast((2, 1, 500, 32)).unwrap();
//! let x = Qkv::new(labels, states.view(), states.view()).key_lengths(&[80, 0]);
//! let read = Dense::builder().scale(1.0).build()?.forward(x)?;
//! assert!((read[[0, 0, 7, 0]] - 1.0).abs() < 1e-6 && read[[1, 0, 7, 0]] == 0.0);
//! # Ok::<(), attention_kernels::Error>(())
//! ```
//!
//! Its states of a document and those of what was looked up for it are two calls; where
//! nothing was, these have 0 tokens. What joins both is a layer of the model.
//!
//! EchoAtt (arXiv 2409.14595): a layer whose weights are nearly those of an earlier one
//! has no queries and keys of its own; it calls with those of its leader. Which layers
//! those are [`weight_similarity`] and [`layer_blocks`] say. MiniLM's distillation (arXiv
//! 2002.10957, 2012.15828) has [`minilm_losses`], [`relation_losses`] and, query by query,
//! [`divergences`].

pub(crate) mod act;
pub(crate) mod additive;
pub(crate) mod adversarial;
pub(crate) mod attn_res;
pub(crate) mod augmented;
pub(crate) mod dare;
pub(crate) mod differential;
pub(crate) mod gated;
pub(crate) mod guidance;
pub(crate) mod key_lock;
pub(crate) mod key_mask;
pub(crate) mod moh;
pub(crate) mod p_adapter;
pub(crate) mod paint;
pub(crate) mod path;
pub(crate) mod pill;
pub(crate) mod rcmha;
pub(crate) mod relations;
pub(crate) mod relative;
pub(crate) mod sage;
pub(crate) mod selective;
pub(crate) mod sigmoid;
pub(crate) mod softmax;
pub(crate) mod token_former;
pub(crate) mod var;
pub(crate) mod vhr;
pub(crate) mod video_booth;
pub(crate) mod zero_tuning;

pub use crate::stages::attend_backward::{SavedForward, SoftmaxGradients};
pub use act::{Act, ActBuilder, act_sinks};
pub use additive::{Additive, AdditiveBuilder};
pub use adversarial::{Adversarial, AdversarialBuilder, WithGradient, adversarial_scores};
pub use attn_res::{AttnRes, AttnResBuilder, States};
pub use augmented::{Augmented, AugmentedBuilder, WithReference};
pub use differential::{Differential, Pair, lambda_init};
pub use gated::{Gated, WithGate};
pub use guidance::{Guidance, GuidanceBuilder, Sets};
pub use key_lock::{Concept, KeyLock, KeyLockBuilder, Prompted, inverse_moments};
pub use key_mask::{KeyMask, KeyMaskBuilder, WithKeyMask, resized_mask};
pub use moh::{Moh, MohBuilder, WithGains, moh_gains};
pub use p_adapter::{PAdapter, PAdapterBuilder, WithFeatures};
pub use paint::{Paint, PaintBuilder, WithTags, paint_tags};
pub use path::{Path, PathBuilder, PathInput};
pub use pill::{Pill, PillBuilder, WithImages};
pub use rcmha::{Rcmha, RcmhaBuilder};
pub use relations::{divergences, layer_blocks, minilm_losses, relation_losses, weight_similarity};
pub use relative::backward::RelativeGradients;
pub use relative::{RelativePositions, RelativePositionsBuilder};
pub use sage::{Sage, SageBuilder};
pub use selective::{Selective, SelectiveBuilder, Tempered, position_temperature, token_temperature};
pub use sigmoid::{Sigmoid, SigmoidBuilder};
pub use softmax::{Dense, DenseBuilder};
pub use token_former::{TokenFormer, TokenFormerBuilder, TokenWeights};
pub use var::{Var, VarBuilder, visual_sinks};
pub use vhr::{Vhr, VhrBuilder, t_vhd, vhd, vhr_gains, vision_aware_heads};
pub use video_booth::{VideoBooth, VideoBoothBuilder, WithExemplar};
pub use zero_tuning::{ZeroTuning, ZeroTuningBuilder};
