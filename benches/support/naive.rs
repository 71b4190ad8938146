//! Attention as one writes it first: two matrix products with all the scores
//! in memory between them.

use ndarray::{Array4, ArrayView4, Axis, s};

/// `softmax(q k^T / sqrt(head_dim)) v`, head by head.
pub fn attention(
    q: ArrayView4<'_, f32>,
    k: ArrayView4<'_, f32>,
    v: ArrayView4<'_, f32>,
    causal: bool,
) -> Array4<f32> {
    let (batch, q_heads, q_len, head_dim) = q.dim();
    let (_, kv_heads, kv_len, value_dim) = v.dim();
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut out = Array4::zeros((batch, q_heads, q_len, value_dim));
    for b in 0..batch {
        for h in 0..q_heads {
            let g = h / (q_heads / kv_heads);
            let mut scores = q.slice(s![b, h, .., ..]).dot(&k.slice(s![b, g, .., ..]).t());
            for (i, mut row) in scores.axis_iter_mut(Axis(0)).enumerate() {
                if causal {
                    row.slice_mut(s![(i + 1 + kv_len - q_len).min(kv_len)..]).fill(f32::NEG_INFINITY);
                }
                let most = row.fold(f32::NEG_INFINITY, |most, &score| most.max(score));
                row.mapv_inplace(|score| (scale * (score - most)).exp());
                let sum = row.sum();
                row /= sum;
            }
            out.slice_mut(s![b, h, .., ..]).assign(&scores.dot(&v.slice(s![b, g, .., ..])));
        }
    }
    out
}
