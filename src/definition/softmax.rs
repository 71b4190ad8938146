//! The definition of dense attention in `f64`, from the papers: scores,
//! weights, weighted sums, one after the other.

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, s};

use crate::attention::ERROR_CONSTANT;
use crate::element::Element;
use crate::error::Result;
use crate::input::{Dims, Lengths, Qkv, Site, filled};
use crate::mask::Mask;
use crate::score::Score;

/// The lowest score that is finite.
const LEAST: f64 = f32::MIN as f64;

/// How scores become weights.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Normalisation<'a> {
    /// `exp(s_j) / (sum_k exp(s_k) + exp(sink))`
    Softmax { sinks: Option<&'a [f32]> },
    /// `1 / (1 + exp(-(s_j + bias)))`, where no bias is `-ln kv_len`.
    Sigmoid { bias: Option<f32> },
}

/// What is to be computed.
pub(crate) struct Definition<'a, Q, K, O, M, F> {
    pub(crate) x: Qkv<'a, Q, K, O>,
    pub(crate) dims: Dims,
    pub(crate) mask: &'a M,
    pub(crate) score: &'a F,
    pub(crate) scale: f64,
    pub(crate) normalisation: Normalisation<'a>,
    /// Factors of queries `[batch, q_heads, q_len]` and of values `[batch,
    /// kv_heads, kv_len]`.
    pub(crate) gains: Option<(ArrayView3<'a, f32>, ArrayView3<'a, f32>)>,
    /// One more key that every query of a sequence sees.
    pub(crate) extra: Option<Extra<'a>>,
}

/// A key that stands for others, of each sequence and head: `[sequences,
/// kv_heads, dim]`, and `[sequences, kv_heads]` what is added to its score.
#[derive(Clone, Copy)]
pub(crate) struct Extra<'a> {
    pub(crate) k: ArrayView3<'a, f32>,
    pub(crate) v: ArrayView3<'a, f32>,
    pub(crate) log_weights: ArrayView2<'a, f32>,
}

/// What the definition gives.
#[derive(Clone, Debug)]
pub(crate) struct Reference {
    /// `[batch, q_heads, q_len, value_dim]`
    pub(crate) out: Array4<f64>,
    /// `[batch, q_heads, q_len]`, without the sink.
    pub(crate) lse: Array3<f64>,
    /// `[batch, q_heads, q_len, kv_len]`, along the rows of the arrays; -inf
    /// where hidden.
    pub(crate) scores: Array4<f64>,
    /// As `scores`; 0 where hidden.
    pub(crate) weights: Array4<f64>,
    /// How far a kernel may be off, `[batch, q_heads, q_len]`: see
    /// [`ERROR_CONSTANT`].
    pub(crate) bound: Array3<f64>,
}

impl<Q: Element, K: Element, O, M: Mask, F: Score> Definition<'_, Q, K, O, M, F> {
    pub(crate) fn compute(&self) -> Result<Reference> {
        let x = &self.x;
        define(&Erased {
            head: &|b, h, g| {
                let q = x.q.slice(s![b, h, .., ..]).mapv(Element::to_f64);
                let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![b, g, .., ..]).mapv(Element::to_f64));
                [q, k, v]
            },
            batch: x.q.dim().0,
            lengths: &x.lengths,
            dims: &self.dims,
            visible: &|site, i, j| self.mask.visible(site, i, j),
            score: &|site, i, j, score| self.score.define(site, i, j, score),
            scale: self.scale,
            normalisation: self.normalisation,
            gains: self.gains,
            extra: self.extra,
        })
    }
}

/// A [`Definition`] without its types, so that it is compiled once and not for
/// every mask and every score over every storage type.
struct Erased<'r, 'a> {
    /// Queries of a sequence and a head, keys and values of its group.
    head: &'r dyn Fn(usize, usize, usize) -> [Array2<f64>; 3],
    batch: usize,
    lengths: &'r Lengths<'a>,
    dims: &'r Dims,
    visible: &'r dyn Fn(&Site, usize, usize) -> bool,
    score: &'r dyn Fn(&Site, usize, usize, f64) -> f64,
    scale: f64,
    normalisation: Normalisation<'a>,
    gains: Option<(ArrayView3<'a, f32>, ArrayView3<'a, f32>)>,
    extra: Option<Extra<'a>>,
}

fn define(x: &Erased<'_, '_>) -> Result<Reference> {
    let &Dims { q_heads, kv_heads, q_len, kv_len, value_dim, .. } = x.dims;
    let batch = x.batch;
    let mut out = filled("out", (batch, q_heads, q_len, value_dim), 0f64)?;
    let mut lse = filled("lse", (batch, q_heads, q_len), f64::NEG_INFINITY)?;
    let mut all_scores = filled("scores", (batch, q_heads, q_len, kv_len), f64::NEG_INFINITY)?;
    let mut weights = filled("weights", (batch, q_heads, q_len, kv_len), 0f64)?;
    let mut bound = filled("out", (batch, q_heads, q_len), 0f64)?;
    for sequence in (0..x.dims.batch).map(|i| x.lengths.sequence(x.dims, i)) {
        let b = sequence.batch;
        for h in 0..q_heads {
            let site = sequence.site(h);
            let g = h / (q_heads / kv_heads);
            let [q, k, v] = (x.head)(b, h, g);
            for (i, row) in sequence.queries.clone().enumerate() {
                // Scores of the visible keys. One of -inf hides its key.
                let mut keys = Vec::new();
                let mut scores = Vec::new();
                let mut sizes = Vec::new();
                // What the logistic function adds to a score.
                let offset = match x.normalisation {
                    Normalisation::Softmax { .. } => 0.0,
                    Normalisation::Sigmoid { bias } => bias.map_or(-(site.kv_len as f64).ln(), f64::from),
                };
                for (j, at) in sequence.keys.clone().enumerate() {
                    if !(x.visible)(&site, i, j) {
                        continue;
                    }
                    let gain = x.gains.map_or(1.0, |(query, _)| f64::from(query[[b, h, row]]));
                    let dot = q.row(row).iter().zip(k.row(at)).map(|(q, k)| q * k).sum::<f64>();
                    // A score is a number of `f32`, which ends there.
                    let score = x.scale * gain * dot;
                    let score = if score.is_finite() { score.clamp(LEAST, -LEAST) } else { score };
                    let score = (x.score)(&site, i, j, score);
                    if score != f64::NEG_INFINITY {
                        all_scores[[b, h, row, at]] = score;
                        keys.push(Some(at));
                        scores.push(score);
                        let size = q.row(row).iter().zip(k.row(at)).map(|(q, k)| (q * k).abs()).sum::<f64>();
                        sizes.push((x.scale * gain).abs() * size + score.abs() + offset.abs());
                    }
                }
                if let Some(Extra { k, log_weights, .. }) = x.extra {
                    let gain = x.gains.map_or(1.0, |(query, _)| f64::from(query[[b, h, row]]));
                    let k = k.slice(s![sequence.index, g, ..]).mapv(f64::from);
                    let products = &q.row(row) * &k;
                    let score = x.scale * gain * products.sum();
                    let score = score + f64::from(log_weights[[sequence.index, g]]);
                    if score != f64::NEG_INFINITY {
                        keys.push(None);
                        scores.push(score);
                        let size = products.mapv(f64::abs).sum();
                        sizes.push((x.scale * gain).abs() * size + score.abs());
                    }
                }
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum = scores.iter().map(|s| (s - max).exp()).sum::<f64>();
                lse[[b, h, row]] = max + sum.ln();
                if keys.is_empty() {
                    lse[[b, h, row]] = f64::NEG_INFINITY;
                }
                // What the bound is made of: the size of the scores that
                // count, the largest value, the sum of the weights.
                let near = |(score, _): &(&f64, &f64)| max - **score < 25.0;
                let size = scores.iter().zip(&sizes).filter(near).map(|(_, &size)| size).fold(0.0, f64::max);
                let (mut largest, mut total) = (0f64, 0.0);
                for (&at, score) in keys.iter().zip(&scores) {
                    let weight = match x.normalisation {
                        Normalisation::Softmax { sinks: None } => (score - max).exp() / sum,
                        Normalisation::Softmax { sinks: Some(sinks) } => {
                            let sink = f64::from(sinks[h]);
                            let top = max.max(sink);
                            (score - top).exp() / (sum * (max - top).exp() + (sink - top).exp())
                        }
                        Normalisation::Sigmoid { .. } => 1.0 / (1.0 + (-(score + offset)).exp()),
                    };
                    let gain = match (at, x.gains) {
                        (Some(at), Some((_, value))) => f64::from(value[[b, g, at]]),
                        _ => 1.0,
                    };
                    if let Some(at) = at {
                        weights[[b, h, row, at]] = weight;
                    }
                    for c in 0..value_dim {
                        let value = match (at, x.extra) {
                            (Some(at), _) => v[[at, c]],
                            (None, Some(extra)) => f64::from(extra.v[[sequence.index, g, c]]),
                            (None, None) => 0.0,
                        };
                        out[[b, h, row, c]] += weight * gain * value;
                        largest = largest.max((gain * value).abs());
                    }
                    total += weight;
                }
                let terms = x.dims.head_dim as f64 + keys.len() as f64 + size;
                bound[[b, h, row]] = ERROR_CONSTANT * 2f64.powi(-24) * terms * largest * total;
            }
        }
    }
    Ok(Reference { out, lse, scores: all_scores, weights, bound })
}
