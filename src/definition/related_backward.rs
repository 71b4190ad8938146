//! The definition of the gradients of attention that knows relations of its pairs by
//! embeddings, which queries meet as they meet keys: pair by pair.

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayView3, ArrayView4};

use crate::definition::attend::{shifted, weighed};
use crate::definition::heads::{Head, heads};
use crate::element::Element;
use crate::input::{Dims, Lengths};

/// The relations of a query and a key that it sees.
pub(crate) type Relations<'a> = dyn Fn(&Head, usize, usize) -> Option<Vec<usize>> + 'a;

/// ```text
/// s_ij = scale (q_i + u) . k_j + factor sum_e (q_i + w) . E_e       e: the relations of i and j
/// o_i  = sum_j softmax_j(s_ij) (v_j + sum_e V_e)
/// ```
pub(crate) struct Related<'a> {
    pub(crate) scale: f64,
    pub(crate) factor: f64,
    /// `u` and `w`, `[heads, head_dim]`.
    pub(crate) biases: [Option<ArrayView2<'a, f32>>; 2],
    /// `E`, `[heads | 1, relations, head_dim]`.
    pub(crate) table: ArrayView3<'a, f32>,
    /// `V`, `[heads | 1, relations, value_dim]`.
    pub(crate) values: Option<ArrayView3<'a, f32>>,
    pub(crate) relations: &'a Relations<'a>,
}

/// Of each array, of its shape.
pub(crate) struct RelatedGradients {
    pub(crate) q: Array4<f64>,
    pub(crate) k: Array4<f64>,
    pub(crate) v: Array4<f64>,
    pub(crate) biases: [Option<Array2<f64>>; 2],
    pub(crate) table: Array3<f64>,
    pub(crate) values: Option<Array3<f64>>,
}

/// A number of a table that all heads share, or each has.
fn own(heads: usize, head: usize) -> usize {
    if heads == 1 { 0 } else { head }
}

impl Related<'_> {
    /// What a loss gains by a unit of each, whose gradient for the output is `d_out`.
    pub(crate) fn gradients(
        &self,
        dims: &Dims,
        lengths: &Lengths<'_>,
        [q, k, v]: [ArrayView4<'_, f64>; 3],
        d_out: ArrayView4<'_, f64>,
    ) -> RelatedGradients {
        let mut to = RelatedGradients {
            q: Array4::zeros(q.dim()),
            k: Array4::zeros(k.dim()),
            v: Array4::zeros(v.dim()),
            biases: self.biases.map(|bias| bias.map(|bias| Array2::zeros(bias.dim()))),
            table: Array3::zeros(self.table.dim()),
            values: self.values.map(|values| Array3::zeros(values.dim())),
        };
        let dot = |n: usize, a: &dyn Fn(usize) -> f64, b: &dyn Fn(usize) -> f64| -> f64 {
            (0..n).map(|c| a(c) * b(c)).sum()
        };
        for head in heads(dims, lengths) {
            let (b, h, g) = (head.batch, head.head, head.of(dims.kv_heads));
            let (embedding, value) = (
                |e: usize, c: usize| f64::from(self.table[[own(self.table.dim().0, h), e, c]]),
                |e: usize, c: usize| self.values.map_or(0.0, |x| f64::from(x[[own(x.dim().0, h), e, c]])),
            );
            for (i, row) in head.queries.clone().enumerate() {
                let query = |which: usize, c: usize| {
                    q[[b, h, row, c]] + self.biases[which].map_or(0.0, |bias| f64::from(bias[[h, c]]))
                };
                let seen: Vec<(usize, Vec<usize>)> = (head.keys.clone().enumerate())
                    .filter_map(|(j, at)| (self.relations)(&head, i, j).map(|of| (at, of)))
                    .collect();
                let scores = seen.iter().enumerate().map(|(n, (at, of))| {
                    let content = dot(dims.head_dim, &|c| query(0, c), &|c| k[[b, g, *at, c]]);
                    let terms =
                        of.iter().map(|&e| dot(dims.head_dim, &|c| query(1, c), &|c| embedding(e, c)));
                    (n, shifted(self.scale * content, self.factor * terms.sum::<f64>()))
                });
                let weights = weighed::<f64>(scores);
                let d = |c: usize| d_out[[b, h, row, c]];
                let d_weight = |n: usize| {
                    let (at, of) = &seen[n];
                    let met = |c| v[[b, g, *at, c]] + of.iter().map(|&e| value(e, c)).sum::<f64>();
                    dot(dims.value_dim, &d, &met)
                };
                let delta: f64 = weights.iter().map(|&(n, weight)| weight * d_weight(n)).sum();
                for &(n, weight) in &weights {
                    let (at, of) = &seen[n];
                    let d_score = weight * (d_weight(n) - delta);
                    for c in 0..dims.value_dim {
                        to.v[[b, g, *at, c]] += weight * d(c);
                        for &e in of {
                            if let Some(to) = &mut to.values {
                                let heads = to.dim().0;
                                to[[own(heads, h), e, c]] += weight * d(c);
                            }
                        }
                    }
                    let (content, terms) = (self.scale * d_score, self.factor * d_score);
                    for c in 0..dims.head_dim {
                        let of_key = content * k[[b, g, *at, c]];
                        let of_terms = terms * of.iter().map(|&e| embedding(e, c)).sum::<f64>();
                        to.q[[b, h, row, c]] += of_key + of_terms;
                        to.k[[b, g, *at, c]] += content * query(0, c);
                        for &e in of {
                            to.table[[own(self.table.dim().0, h), e, c]] += terms * query(1, c);
                        }
                        for (to, by) in to.biases.iter_mut().zip([of_key, of_terms]) {
                            if let Some(to) = to {
                                to[[h, c]] += by;
                            }
                        }
                    }
                }
            }
        }
        to
    }
}

/// An array of an input as the definition has it.
pub(crate) fn exact<T: Element>(x: &ArrayView4<'_, T>) -> Array4<f64> {
    x.map(|x| x.to_f64())
}
