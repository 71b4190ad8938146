//! The definition of the gradients of dense attention in `f64`: all weights of a
//! row at once, term by term.

use ndarray::{Array, Array1, Array2, Array3, Array4, ArrayView3, ArrayView4, Dimension, s};

use crate::definition::softmax::{Definition, Normalisation};
use crate::element::Element;
use crate::error::Result;
use crate::mask::Mask;
use crate::score::Score;
use crate::score::smooth::{AnySmooth, slope};

/// Gradients of queries, keys, values, sinks, and the table and gates of the score.
pub(crate) struct Gradients {
    pub(crate) q: Array4<f64>,
    pub(crate) k: Array4<f64>,
    pub(crate) v: Array4<f64>,
    pub(crate) sinks: Option<Array1<f64>>,
    /// `[heads, entries]`
    pub(crate) table: Option<Array2<f64>>,
    /// Of the log gates that the score adds, `[batch, q_heads, kv_len]`.
    pub(crate) log_gates: Option<Array3<f64>>,
    /// Of the logits of gates, where there are any.
    pub(crate) gate: Option<Array4<f64>>,
    /// Of the scores that become weights, `[batch, q_heads, q_len, kv_len]`; 0
    /// where a key is hidden.
    pub(crate) scores: Array4<f64>,
}

impl Gradients {
    /// The sum of two.
    pub(crate) fn plus(self, other: Self) -> Self {
        fn both<D: Dimension>(a: Option<Array<f64, D>>, b: Option<Array<f64, D>>) -> Option<Array<f64, D>> {
            a.zip(b).map(|(a, b)| a + b)
        }
        Self {
            q: self.q + other.q,
            k: self.k + other.k,
            v: self.v + other.v,
            sinks: both(self.sinks, other.sinks),
            table: both(self.table, other.table),
            log_gates: both(self.log_gates, other.log_gates),
            gate: both(self.gate, other.gate),
            scores: self.scores + other.scores,
        }
    }
}

/// The output and the LSE of all keys, where the call has a part of them.
pub(crate) type Whole<'a> = (ArrayView4<'a, f32>, ArrayView3<'a, f32>);

/// What [`Definition`] loses by a unit of each array, for a loss whose gradient
/// with respect to the output is `d_out`.
pub(crate) fn gradients<Q: Element, K: Element, O, M: Mask, F: Score>(
    definition: &Definition<'_, Q, K, O, M, F>,
    smooth: &dyn AnySmooth,
    d_out: ArrayView4<'_, f32>,
    whole: Option<Whole<'_>>,
) -> Result<Gradients> {
    let Definition { x, dims, mask, score, scale, normalisation, .. } = definition;
    let reference = definition.compute()?;
    let (mut dq, mut dk, mut dv) =
        (Array4::<f64>::zeros(x.q.dim()), Array4::<f64>::zeros(x.k.dim()), Array4::<f64>::zeros(x.v.dim()));
    let sinks = match normalisation {
        Normalisation::Softmax { sinks } => *sinks,
        Normalisation::Sigmoid { .. } => None,
    };
    let mut d_sinks = sinks.map(|sinks| Array1::<f64>::zeros(sinks.len()));
    let [heads, entries] = smooth.table_of();
    let mut d_scores = Array4::<f64>::zeros(reference.weights.dim());
    let mut d_table = Array2::<f64>::zeros((heads, entries));
    let mut d_gates = Array3::<f64>::zeros((x.q.dim().0, dims.q_heads, dims.kv_len));
    for sequence in (0..dims.batch).map(|i| x.lengths.sequence(dims, i)) {
        let b = sequence.batch;
        for h in 0..dims.q_heads {
            let (site, g) = (sequence.site(h), h / (dims.q_heads / dims.kv_heads));
            for (i, row) in sequence.queries.clone().enumerate() {
                let d_row: Vec<f64> = d_out.slice(s![b, h, row, ..]).iter().map(|&x| f64::from(x)).collect();
                let out = |c: usize| match whole {
                    Some((out, _)) => f64::from(out[[b, h, row, c]]),
                    None => reference.out[[b, h, row, c]],
                };
                let delta: f64 = d_row.iter().enumerate().map(|(c, d)| d * out(c)).sum();
                // Of all keys a weight is less than of a part of them.
                let share = match whole {
                    Some((_, lse)) => (reference.lse[[b, h, row]] - f64::from(lse[[b, h, row]])).exp(),
                    None => 1.0,
                };
                if let (Some(d_sinks), Some(sinks)) = (&mut d_sinks, sinks) {
                    let lse =
                        whole.map_or(reference.lse[[b, h, row]], |(_, lse)| f64::from(lse[[b, h, row]]));
                    if lse != f64::NEG_INFINITY && sinks[h] != f32::NEG_INFINITY {
                        d_sinks[h] -= delta / (1.0 + (lse - f64::from(sinks[h])).exp());
                    }
                }
                for (j, at) in sequence.keys.clone().enumerate() {
                    if !mask.visible(&site, i, j) {
                        continue;
                    }
                    let dot: f64 = (0..dims.head_dim)
                        .map(|c| x.q[[b, h, row, c]].to_f64() * x.k[[b, g, at, c]].to_f64())
                        .sum();
                    let define = |s: f64| score.define(&site, i, j, s);
                    if define(scale * dot) == f64::NEG_INFINITY {
                        continue;
                    }
                    let weight =
                        reference.weights[[b, h, row, at]] * if sinks.is_none() { share } else { 1.0 };
                    let d_weight: f64 =
                        d_row.iter().enumerate().map(|(c, d)| d * x.v[[b, g, at, c]].to_f64()).sum();
                    let d_score = match normalisation {
                        Normalisation::Softmax { .. } => weight * (d_weight - delta),
                        Normalisation::Sigmoid { .. } => weight * (1.0 - weight) * d_weight,
                    };
                    d_scores[[b, h, row, at]] = d_score;
                    if let Some((entry, rate)) = smooth.entry_of(&site, i, j, scale * dot) {
                        d_table[[if heads == 1 { 0 } else { h }, entry]] += d_score * rate;
                    }
                    if let Some((gates, rate)) = smooth.gates_of(&site, i, j, scale * dot) {
                        d_gates.slice_mut(s![b, h, gates]).mapv_inplace(|sum| sum + d_score * rate);
                    }
                    let d_dot = d_score * slope(define, scale * dot) * scale;
                    for (c, d) in d_row.iter().enumerate() {
                        dv[[b, g, at, c]] += weight * d;
                    }
                    for c in 0..dims.head_dim {
                        dq[[b, h, row, c]] += d_dot * x.k[[b, g, at, c]].to_f64();
                        dk[[b, g, at, c]] += d_dot * x.q[[b, h, row, c]].to_f64();
                    }
                }
            }
        }
    }
    let table = (entries > 0).then_some(d_table);
    let log_gates = smooth.of_each_key().then_some(d_gates);
    Ok(Gradients { q: dq, k: dk, v: dv, sinks: d_sinks, table, log_gates, gate: None, scores: d_scores })
}
