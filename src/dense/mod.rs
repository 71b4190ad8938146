//! Dense attention: every visible key counts.
//!
//! | mechanism | weights |
//! |---|---|
//! | [`Dense`] | `softmax(score)`: multi-head, grouped and multi-query attention, with masks, biases and sinks |
//! | [`Sigmoid`] | `sigmoid(score + bias)`, not normalised over keys |
//! | [`Act`] | those of a softmax, of which sinks give some to others |
//! | [`Additive`] | those of a softmax of scores that a small network gives |
//! | [`AttnRes`] | those of a softmax over what one token was in earlier layers |
//! | [`Differential`] | those of one attention less a share of another's |
//! | [`Gated`] | those of any other, whose output goes through a gate of the query |
//! | [`Guidance`] | the mean of those of softmaxes over sets of keys, each over values of its own |
//! | [`KeyMask`] | those of a softmax, of which masked keys have scores near 0, or none |
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
//! EchoAtt (arXiv 2409.14595): a layer whose weights are nearly those of an earlier one
//! has no queries and keys of its own; it calls with those of its leader. What weights of
//! two layers have in common needs no weights: products of two are the exponential of the
//! sum of their scores, which is a score of queries and keys side by side.
//!
//! ```
//! use attention_kernels::{Mergeable, Qkv, dense::Dense};
//! use ndarray::{Array3, Array4, Axis, concatenate, s};
//!
//! type Layer = (Array4<f32>, Array4<f32>); // queries and keys
//! let layer = |seed: usize| -> Layer {
//!     let at = |(_, h, i, c): (usize, usize, usize, usize)| ((seed + h + i * (c + 3)) as f32).sin();
//!     (Array4::from_shape_fn((1, 2, 50, 16), at), Array4::from_shape_fn((1, 2, 50, 16), at))
//! };
//! let dense = Dense::builder().causal().scale(0.25).build()?;
//! let lse = |(q, k): &Layer| -> attention_kernels::Result<Array3<f32>> {
//!     let nothing = k.slice(s![.., .., .., ..0]);
//!     Ok(dense.forward_with_lse(Qkv::new(q.view(), k.view(), nothing))?.1)
//! };
//! // The sum over all pairs of the products of their weights.
//! let common = |a: &Layer, b: &Layer| -> attention_kernels::Result<f32> {
//!     let beside = |a: &Array4<f32>, b: &Array4<f32>| concatenate(Axis(3), &[a.view(), b.view()]).unwrap();
//!     let both = lse(&(beside(&a.0, &b.0), beside(&a.1, &b.1)))?;
//!     Ok((both - lse(a)? - lse(b)?).mapv(f32::exp).sum())
//! };
//! let (a, b) = (layer(0), layer(1));
//! let cosine = common(&a, &b)? / (common(&a, &a)? * common(&b, &b)?).sqrt();
//! assert!(cosine > 0.0 && cosine < 1.0);
//! # Ok::<(), attention_kernels::Error>(())
//! ```
//!
//! MiniLM's distillation (arXiv 2002.10957, 2012.15828): how far weights `p` of a student
//! are from those of its teacher, `sum_j p_j (s_j - s'_j) - lse + lse'` for each query. Scores
//! are linear in keys, so that their mean by the teacher's weights is the score of the
//! mean of keys: those of both are values. Relations of values have these as queries
//! and keys.
//!
//! ```
//! use attention_kernels::{Mergeable, Qkv, dense::Dense};
//! use ndarray::{Array3, Array4, ArrayView1, Axis, concatenate, s};
//!
//! let of = |seed: usize, dim: usize| {
//!     let at = |(_, h, i, c): (usize, usize, usize, usize)| ((seed + h + i * (c + 3)) as f32).sin();
//!     Array4::from_shape_fn((1, 2, 50, dim), at)
//! };
//! let dense = Dense::builder().build()?;
//! let divergence = |[q, k]: [&Array4<f32>; 2], [q_s, k_s]: [&Array4<f32>; 2]| {
//!     let keys = concatenate(Axis(3), &[k.view(), k_s.view()]).unwrap();
//!     let (means, lse) = dense.forward_with_lse(Qkv::new(q.view(), k.view(), keys.view()))?;
//!     let (_, lse_s) = dense.forward_with_lse(Qkv::new(q_s.view(), k_s.view(), k_s.view()))?;
//!     let score = |q: ArrayView1<'_, f32>, k: ArrayView1<'_, f32>| q.dot(&k) / (q.len() as f32).sqrt();
//!     Ok(Array3::from_shape_fn(lse.dim(), |(b, h, i)| {
//!         let (mean, mean_s) = means.slice(s![b, h, i, ..]).split_at(Axis(0), k.dim().3);
//!         let scores = score(q.slice(s![b, h, i, ..]), mean) - score(q_s.slice(s![b, h, i, ..]), mean_s);
//!         scores - lse[[b, h, i]] + lse_s[[b, h, i]]
//!     }))
//! };
//! let (q, k, q_s, k_s) = (of(0, 16), of(1, 16), of(2, 8), of(3, 8));
//! assert!(divergence([&q, &k], [&q_s, &k_s])?.iter().all(|&x| x > 1e-4));
//! assert!(divergence([&q, &k], [&q, &k])?.iter().all(|&x| x.abs() < 1e-5));
//! # Ok::<(), attention_kernels::Error>(())
//! ```

pub(crate) mod act;
pub(crate) mod additive;
pub(crate) mod attn_res;
pub(crate) mod dare;
pub(crate) mod differential;
pub(crate) mod gated;
pub(crate) mod guidance;
pub(crate) mod key_mask;
pub(crate) mod moh;
pub(crate) mod p_adapter;
pub(crate) mod paint;
pub(crate) mod path;
pub(crate) mod pill;
pub(crate) mod rcmha;
pub(crate) mod relative;
pub(crate) mod sage;
pub(crate) mod selective;
pub(crate) mod sigmoid;
pub(crate) mod softmax;
pub(crate) mod token_former;
pub(crate) mod var;
pub(crate) mod vhr;
pub(crate) mod zero_tuning;

pub use crate::stages::attend_backward::{SavedForward, SoftmaxGradients};
pub use act::{Act, ActBuilder, act_sinks};
pub use additive::{Additive, AdditiveBuilder};
pub use attn_res::{AttnRes, AttnResBuilder, States};
pub use differential::{Differential, Pair, lambda_init};
pub use gated::{Gated, WithGate};
pub use guidance::{Guidance, GuidanceBuilder, Sets};
pub use key_mask::{KeyMask, KeyMaskBuilder, WithKeyMask, resized_mask};
pub use moh::{Moh, MohBuilder, WithGains, moh_gains};
pub use p_adapter::{PAdapter, PAdapterBuilder, WithFeatures};
pub use paint::{Paint, PaintBuilder, WithTags, paint_tags};
pub use path::{Path, PathBuilder, PathInput};
pub use pill::{Pill, PillBuilder, WithImages};
pub use rcmha::{Rcmha, RcmhaBuilder};
pub use relative::{RelativePositions, RelativePositionsBuilder};
pub use sage::{Sage, SageBuilder};
pub use selective::{Selective, SelectiveBuilder, Tempered, position_temperature, token_temperature};
pub use sigmoid::{Sigmoid, SigmoidBuilder};
pub use softmax::{Dense, DenseBuilder};
pub use token_former::{TokenFormer, TokenFormerBuilder, TokenWeights};
pub use var::{Var, VarBuilder, visual_sinks};
pub use vhr::{Vhr, VhrBuilder, t_vhd, vhd, vhr_gains, vision_aware_heads};
pub use zero_tuning::{ZeroTuning, ZeroTuningBuilder};
