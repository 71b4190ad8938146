//! What the weights of two attentions have in common, without either in memory: losses of
//! distillation, and which layers may share theirs.
//!
//! MiniLM (arXiv 2002.10957, 2012.15828) trains a student to attend as its teacher does:
//!
//! ```text
//! KL_i = sum_j p_ij (s_ij - s'_ij) - lse_i + lse'_i      p, s of the teacher, s' of the student
//! ```
//!
//! of queries and keys, and of relations, whose queries and keys are both values (or
//! both queries, or both keys, in heads of any number). Scores are linear in keys: their
//! mean by the teacher's weights is the score of the mean of keys, and so one attention
//! whose values are the keys of both gives it. EchoAtt (arXiv 2409.14595) lets layers use
//! the weights of an earlier one that are nearly theirs: products of two weights are the
//! exponential of the sum of their scores, which is a score of queries and keys side by
//! side.
//!
//! Cost: two attentions for each divergence, with values of both heads' sizes, and five
//! for the likeness of two layers; memory for keys side by side, but for no weights.

use std::ops::Range;

use ndarray::{Array2, Array3, Array4, ArrayView1, ArrayView2, ArrayView4, Axis, concatenate, s};

use super::Dense;
use crate::attention::Mergeable;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::mask::Mask;

/// Queries and keys, `[batch, heads, len, head_dim]`.
type Pair<'a> = [ArrayView4<'a, f32>; 2];

/// `x` with keys in place of values.
fn pair<'a>([q, k]: Pair<'a>, lengths: Option<&'a [usize]>) -> Qkv<'a, f32> {
    let x = Qkv::new(q, k, k);
    lengths.map_or(x, |lengths| x.key_lengths(lengths))
}

/// Refuses two of other numbers of sequences, heads or tokens.
fn alike(argument: &'static str, a: Dims, b: Dims) -> Result<()> {
    let of = |dims: Dims| [dims.batch, dims.q_heads, dims.kv_heads, dims.q_len, dims.kv_len];
    if of(a) == of(b) {
        return Ok(());
    }
    let expected = format!("[batch, q_heads, kv_heads, q_len, kv_len] = {:?}", of(a));
    Err(Error::shape(argument, expected, &of(b)))
}

/// How far the weights of a student are from those of its teacher, for each query: `[batch,
/// heads, len]`, in nats. Both are queries and keys of the same tokens, in as many
/// heads, of any sizes; scales are `1 / sqrt(head_dim)`. Of the first `lengths` tokens of
/// each sequence, if they are given: rows after them are 0.
///
/// # Errors
/// Whatever does not fit.
///
/// ```
/// use attention_kernels::dense::divergences;
/// use ndarray::Array4;
///
/// let of = |seed: usize, dim: usize| {
///     let at = |(_, h, i, c): (usize, usize, usize, usize)| ((seed + h + i * (c + 3)) as f32).sin();
///     Array4::from_shape_fn((1, 2, 50, dim), at)
/// };
/// let (teacher, student) = ([of(0, 16), of(1, 16)], [of(2, 8), of(3, 8)]);
/// let [teacher, student] = [&teacher, &student].map(|x| x.each_ref().map(|x| x.view()));
/// assert!(divergences(teacher, student, None)?.iter().all(|&x| x > 1e-4));
/// assert!(divergences(teacher, teacher, None)?.iter().all(|&x| x < 1e-5));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn divergences(teacher: Pair<'_>, student: Pair<'_>, lengths: Option<&[usize]>) -> Result<Array3<f64>> {
    let (x, other) = (pair(teacher, lengths), pair(student, lengths));
    let (dims, other_dims) = (x.dims()?, other.dims()?);
    if dims.q_len != dims.kv_len {
        return Err(Error::value("teacher", "a key for each query", dims.kv_len));
    }
    alike("student", dims, other_dims)?;
    let dense = Dense::builder().build()?;
    let keys = beside(teacher[1], student[1])?;
    let (means, lse) = dense.forward_with_lse(Qkv { v: keys.view(), ..x.reborrow() })?;
    let (_, other_lse) = dense.forward_with_lse(Qkv { v: student[1].slice(s![.., .., .., ..0]), ..other })?;
    let score = |q: ArrayView1<'_, f32>, k: ArrayView1<'_, f32>| {
        let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
        dot / (q.len().max(1) as f64).sqrt()
    };
    Ok(Array3::from_shape_fn(lse.dim(), |(b, h, i)| {
        if lengths.is_some_and(|lengths| i >= lengths[b]) {
            return 0.0;
        }
        let row = |x: &ArrayView4<'_, f32>| x.slice(s![b, h, i, ..]).to_owned();
        let mean = means.slice(s![b, h, i, ..]);
        let (mean, other_mean) = mean.split_at(Axis(0), dims.head_dim);
        let scores = score(row(&teacher[0]).view(), mean) - score(row(&student[0]).view(), other_mean);
        let divergence = scores - f64::from(lse[[b, h, i]]) + f64::from(other_lse[[b, h, i]]);
        // Rounding may leave less than nothing; a NaN stays.
        if divergence < 0.0 { 0.0 } else { divergence }
    }))
}

/// The rows of both, side by side.
fn beside(a: ArrayView4<'_, f32>, b: ArrayView4<'_, f32>) -> Result<Array4<f32>> {
    concatenate(Axis(3), &[a, b]).map_err(|_| Error::shape("student", format!("{:?}", a.dim()), b.shape()))
}

/// The mean over heads and the tokens that count.
fn mean(rows: &Array3<f64>, lengths: Option<&[usize]>) -> f64 {
    let (batch, heads, len) = rows.dim();
    let tokens = lengths.map_or(batch * len, |lengths| lengths.iter().sum());
    let count = heads * tokens;
    if count == 0 { 0.0 } else { rows.sum() / count as f64 }
}

/// The losses of MiniLM, of queries, keys and values of both: that of weights, and that of
/// relations of values. What is minimised is their sum.
///
/// # Errors
/// Whatever does not fit.
pub fn minilm_losses(
    teacher: [ArrayView4<'_, f32>; 3],
    student: [ArrayView4<'_, f32>; 3],
    lengths: Option<&[usize]>,
) -> Result<[f64; 2]> {
    let loss = |a: [usize; 2]| {
        Ok(mean(&divergences(a.map(|i| teacher[i]), a.map(|i| student[i]), lengths)?, lengths))
    };
    Ok([loss([0, 1])?, loss([2, 2])?])
}

/// The losses of MiniLMv2: relations of queries, of keys and of values, each in so many
/// heads. What is minimised is their sum, with weights of its own.
///
/// # Errors
/// Whatever does not fit, and heads into which rows do not fall.
pub fn relation_losses(
    teacher: [ArrayView4<'_, f32>; 3],
    student: [ArrayView4<'_, f32>; 3],
    heads: usize,
    lengths: Option<&[usize]>,
) -> Result<[f64; 3]> {
    let mut losses = [0.0; 3];
    for ((loss, a), b) in losses.iter_mut().zip(teacher).zip(student) {
        let [a, b] = [relation_heads("teacher", a, heads)?, relation_heads("student", b, heads)?];
        *loss = mean(&divergences([a.view(); 2], [b.view(); 2], lengths)?, lengths);
    }
    Ok(losses)
}

/// The rows of all heads side by side, cut into other heads: `[batch, heads, len, dim]`.
fn relation_heads(argument: &'static str, x: ArrayView4<'_, f32>, heads: usize) -> Result<Array4<f32>> {
    let (batch, own, len, dim) = x.dim();
    let width = own.saturating_mul(dim);
    if heads == 0 || heads > width.max(own) || !width.is_multiple_of(heads) {
        let expected = format!("rows of all heads that {heads} have the same share of");
        return Err(Error::value(argument, expected, format_args!("{width} elements")));
    }
    let wide = width / heads;
    Ok(Array4::from_shape_fn((batch, heads, len, wide), |(b, h, i, c)| {
        let at = h * wide + c;
        x[[b, at / dim, i, at % dim]]
    }))
}

/// How alike the weights of two layers are: the cosine of the angle between them, all of a
/// head as one vector, averaged over sequences and heads. Each layer is its queries `[batch,
/// q_heads, len, head_dim]` and keys `[batch, kv_heads, len, head_dim]`; scales are
/// `1 / sqrt(head_dim)`. Layers that are much alike may share weights: see
/// [`layer_blocks`].
///
/// # Errors
/// Whatever does not fit.
pub fn weight_similarity<M: Mask + Clone>(mask: M, a: Pair<'_>, b: Pair<'_>) -> Result<f64> {
    let (dims, other) = (pair(a, None).dims()?, pair(b, None).dims()?);
    alike("b", dims, other)?;
    let dense = Dense::builder().mask(mask).scale(1.0).build()?;
    let lse = |q: &Array4<f32>, k: ArrayView4<'_, f32>| {
        Ok(dense.forward_with_lse(Qkv::new(q.view(), k, k.slice(s![.., .., .., ..0])))?.1)
    };
    let scaled = |[q, k]: Pair<'_>| {
        let scale = (1.0 / (q.dim().3.max(1) as f64).sqrt()) as f32;
        let q = q.mapv(|x| x * scale);
        Ok((lse(&q, k)?, q))
    };
    let ((lse_a, q_a), (lse_b, q_b)) = (scaled(a)?, scaled(b)?);
    // For each head, the sum over all pairs of the products of their weights.
    let common = |(lse_a, q_a, k_a): (&Array3<f32>, &Array4<f32>, _),
                  (lse_b, q_b, k_b): (&Array3<f32>, &Array4<f32>, _)| {
        let both: Array3<f32> = lse(&beside(q_a.view(), q_b.view())?, beside(k_a, k_b)?.view())?;
        let mut sums = Array2::<f64>::zeros((dims.batch, dims.q_heads));
        for ((b, h, i), &both) in both.indexed_iter() {
            let [x, y] = [lse_a[[b, h, i]], lse_b[[b, h, i]]].map(f64::from);
            // A row that sees nothing has no weights.
            if x != f64::NEG_INFINITY {
                sums[[b, h]] += (f64::from(both) - x - y).exp();
            }
        }
        Ok::<_, Error>(sums)
    };
    let [a, b] = [(&lse_a, &q_a, a[1]), (&lse_b, &q_b, b[1])];
    let (both, a, b) = (common(a, b)?, common(a, a)?, common(b, b)?);
    let length = a.iter().zip(&b).map(|(a, b)| (a * b).sqrt());
    let cosine =
        both.iter().zip(length).map(|(both, length)| if length == 0.0 { 0.0 } else { both / length });
    Ok(cosine.sum::<f64>() / (dims.batch * dims.q_heads).max(1) as f64)
}

/// Which layers share weights, given how alike each two are, `[layers, layers]`: runs of
/// layers, each of which is like the first of its run by `threshold` at least. The first
/// and the last layer stay by themselves.
///
/// # Errors
/// Similarities that are not square.
///
/// ```
/// use attention_kernels::dense::{layer_blocks, weight_similarity};
/// use attention_kernels::mask::Causal;
/// use ndarray::{Array2, Array4};
///
/// let at = |(_, h, i, c): (usize, usize, usize, usize)| ((h + i * (c + 3)) as f32).sin();
/// let x = Array4::from_shape_fn((1, 2, 50, 16), at);
/// let layers: Vec<Array4<f32>> = [1.0, 1.0, 0.9, 3.0, 1.0].map(|by| &x * by).into();
/// let mut alike = Array2::zeros((5, 5));
/// for ((l, m), to) in alike.indexed_iter_mut() {
///     *to = weight_similarity(Causal::new(), [layers[l].view(), x.view()], [layers[m].view(), x.view()])?;
/// }
/// assert_eq!(layer_blocks(alike.view(), 0.95)?, [0..1, 1..3, 3..4, 4..5]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn layer_blocks(similarities: ArrayView2<'_, f64>, threshold: f64) -> Result<Vec<Range<usize>>> {
    let (layers, columns) = similarities.dim();
    if layers != columns {
        return Err(Error::shape("similarities", format!("[{layers}, {layers}]"), similarities.shape()));
    }
    let mut blocks: Vec<Range<usize>> = Vec::new();
    for layer in 0..layers {
        match blocks.last_mut() {
            Some(block)
                if block.start > 0
                    && layer + 1 < layers
                    && similarities[[block.start, layer]] >= threshold =>
            {
                block.end = layer + 1;
            }
            _ => blocks.push(layer..layer + 1),
        }
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Weights;
    use crate::mask::{Causal, Unmasked};
    use crate::testing::arrays::array;
    use crate::testing::qkv::error;

    /// Weights in full, by definition.
    fn weights<M: Mask>(mask: M, x: Qkv<'_, f32>) -> Array4<f64> {
        Dense::builder().mask(mask).build().unwrap().reference_weights(x).unwrap()
    }

    #[test]
    fn divergences_are_those_of_weights() {
        let (t, u) = (
            [array(1, (2, 3, 40, 16)), array(2, (2, 3, 40, 16))],
            [array(3, (2, 3, 40, 8)), array(4, (2, 3, 40, 8))],
        );
        let [t, u] = [&t, &u].map(|x| x.each_ref().map(|x| x.view()));
        for lengths in [None, Some(&[40, 17][..])] {
            let got = divergences(t, u, lengths).unwrap();
            let [p, q] = [t, u].map(|x| weights(Unmasked, pair(x, lengths)));
            let mut total = 0.0;
            for ((b, h, i), &got) in got.indexed_iter() {
                let term = |(&p, &q): (&f64, &f64)| if p == 0.0 { 0.0 } else { p * (p / q).ln() };
                let (p, q) = (p.slice(s![b, h, i, ..]), q.slice(s![b, h, i, ..]));
                let counts = lengths.is_none_or(|lengths| i < lengths[b]);
                let want = if counts { p.iter().zip(&q).map(term).sum() } else { 0.0 };
                assert!((got - want).abs() < 1e-5, "{got}, not {want}");
                total += want;
            }
            let [loss, values] = minilm_losses([t[0], t[1], t[0]], [u[0], u[1], u[0]], lengths).unwrap();
            let tokens = lengths.map_or(80, |lengths| lengths.iter().sum());
            assert!((loss - total / (3 * tokens) as f64).abs() < 1e-5 && values > 0.0);
        }
        assert!(divergences(t, t, None).unwrap().iter().all(|&x| x < 1e-5));
    }

    /// In the heads that there are, relations are each head's own; in one, of all together.
    #[test]
    fn relations_in_other_heads() {
        let (t, u) = (array(1, (1, 4, 20, 8)), array(2, (1, 4, 20, 6)));
        let own = mean(&divergences([t.view(); 2], [u.view(); 2], None).unwrap(), None);
        let four = relation_losses([t.view(); 3], [u.view(); 3], 4, None).unwrap();
        assert_eq!(four, [own; 3]);
        let wide = |x: &Array4<f32>| {
            let dim = x.dim().3;
            Array4::from_shape_fn((1, 1, 20, 4 * dim), |(_, _, i, c)| x[[0, c / dim, i, c % dim]])
        };
        let (t_all, u_all) = (wide(&t), wide(&u));
        let want = mean(&divergences([t_all.view(); 2], [u_all.view(); 2], None).unwrap(), None);
        assert_eq!(relation_losses([t.view(); 3], [u.view(); 3], 1, None).unwrap(), [want; 3]);
        let none = relation_losses([t.view(); 3], [u.view(); 3], 5, None);
        assert!(error(none).starts_with("teacher: expected rows of all heads"));
        let empty = relation_losses([t.view(); 3], [u.view(); 3], 2, Some(&[0])).unwrap();
        assert_eq!(empty, [0.0; 3]);
    }

    #[test]
    fn similarity_is_the_cosine_of_weights() {
        let (a, b) = (
            [array(1, (2, 4, 30, 8)), array(2, (2, 2, 40, 8))],
            [array(3, (2, 4, 30, 5)), array(4, (2, 2, 40, 5))],
        );
        let [a, b] = [&a, &b].map(|x| x.each_ref().map(|x| x.view()));
        let [p, q] = [a, b].map(|x| weights(Causal::new(), pair(x, None)));
        let mut want = 0.0;
        for (b, h) in (0..2).flat_map(|b| (0..4).map(move |h| (b, h))) {
            let [p, q] = [&p, &q].map(|x| x.slice(s![b, h, .., ..]));
            want += (&p * &q).sum() / ((&p * &p).sum() * (&q * &q).sum()).sqrt() / 8.0;
        }
        let got = weight_similarity(Causal::new(), a, b).unwrap();
        assert!((got - want).abs() < 1e-5, "{got}, not {want}");
        assert!((weight_similarity(Causal::new(), a, a).unwrap() - 1.0).abs() < 1e-5);
        let few = [b[0].slice_move(s![.., .., ..29, ..]), b[1]];
        assert!(error(weight_similarity(Causal::new(), a, few)).starts_with("b: expected shape"));
    }

    #[test]
    fn heads_without_elements_are_refused() {
        let x = Array4::zeros((1, 1, 1, 0));
        let losses = relation_losses([x.view(); 3], [x.view(); 3], usize::MAX, None);
        assert!(error(losses).starts_with("teacher: expected rows of all heads"));
    }

    #[test]
    fn layers_in_runs() {
        let alike = Array2::from_shape_fn((7, 7), |(a, b)| 1.0 - 0.1 * (a as f64 - b as f64).abs());
        assert_eq!(layer_blocks(alike.view(), 0.75).unwrap(), [0..1, 1..4, 4..6, 6..7]);
        assert_eq!(layer_blocks(alike.view(), 2.0).unwrap().len(), 7);
        assert!(layer_blocks(Array2::zeros((0, 0)).view(), 0.5).unwrap().is_empty());
        assert!(layer_blocks(alike.slice(s![..3, ..]), 0.5).is_err());
    }
}
