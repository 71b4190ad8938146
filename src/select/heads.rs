//! What heads do, from weights that were seen: which of them park their weight on a first
//! token, which copy from far back, and which lie far from the others. Caches and
//! selections then treat them as they are ([`ByHead`](crate::cache::ByHead)).

use std::collections::HashSet;
use std::ops::Range;

use ndarray::{Array2, Array3, ArrayView2, ArrayView3};

use crate::attention::TopWeights;
use crate::error::{Error, Result};
use crate::input::filled;

/// The mean weight that keys get from the queries that see them, `[batch, heads, kv_len]`,
/// of what they [receive](crate::Weights::key_weights) from `q_len` queries. `causal`
/// queries, the last of which is at the last key, see no key after their own; others see
/// all.
///
/// ```
/// use attention_kernels::dense::Dense;
/// use attention_kernels::select::{key_importance, sink_share};
/// use attention_kernels::{Qkv, Weights};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::zeros((2, 3, 4, 8)); // every query spreads its weight evenly
/// let received = Dense::builder().causal().build()?.key_weights(Qkv::new(x.view(), x.view(), x.view()))?;
/// let importance = key_importance(received.view(), 4, true);
/// // (1 + 1/2 + 1/3 + 1/4) / 4
/// assert!((importance[[0, 0, 0]] - 0.520833).abs() < 1e-6);
/// assert_eq!(sink_share(importance.view(), 0, 0.3)?, 1.0);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn key_importance(received: ArrayView3<'_, f32>, q_len: usize, causal: bool) -> Array3<f32> {
    let kv_len = received.dim().2;
    Array3::from_shape_fn(received.dim(), |(b, h, j)| {
        let queries = if causal { q_len.min(kv_len - j) } else { q_len };
        if queries == 0 { 0.0 } else { received[[b, h, j]] / queries as f32 }
    })
}

/// `Sink_k(epsilon)`: the share of sequences and heads whose key `k` has an
/// [importance](key_importance) above `epsilon`. "When Attention Sink Emerges in Language
/// Models" (arXiv 2410.10781) has the first key, 0.3 and texts of 64 tokens, and averages
/// over layers.
///
/// # Errors
/// A key that is not there.
pub fn sink_share(importance: ArrayView3<'_, f32>, key: usize, epsilon: f32) -> Result<f64> {
    let (batch, heads, kv_len) = importance.dim();
    if key >= kv_len {
        return Err(Error::value("key", format!("one of {kv_len} keys"), key));
    }
    let sinks = importance.index_axis(ndarray::Axis(2), key).iter().filter(|&&x| x > epsilon).count();
    Ok(sinks as f64 / (batch * heads).max(1) as f64)
}

/// Where in a prompt a needle is: the first window of as many tokens that has more than
/// nine tenths of its different tokens, in any order; windows at the end of a prompt are
/// shorter. Tokens at a border may come out
/// otherwise in a longer text.
///
/// ```
/// use attention_kernels::select::needle_span;
/// assert_eq!(needle_span(&[5, 1, 9, 2, 3, 7], &[2, 3, 7]), Some(3..6));
/// assert_eq!(needle_span(&[5, 1, 9, 2, 3, 8], &[2, 3, 7]), None);
/// ```
pub fn needle_span(prompt: &[u32], needle: &[u32]) -> Option<Range<usize>> {
    let wanted: HashSet<u32> = needle.iter().copied().collect();
    let enough = |window: &[u32]| {
        let found: HashSet<u32> = window.iter().copied().filter(|token| wanted.contains(token)).collect();
        10 * found.len() > 9 * wanted.len()
    };
    let windows = (0..prompt.len()).map(|start| start..(start + needle.len()).min(prompt.len()));
    windows.into_iter().find(|window| enough(&prompt[window.clone()]))
}

/// How often heads look at what is copied: "Retrieval Head Mechanistically Explains
/// Long-Context Factuality" (arXiv 2404.15574). While a model repeats a needle of its
/// prompt, a head has a hit where the key that it weighs most lies in the needle and is the
/// token that was generated.
///
/// Of tests that a model answers, scores are averaged; heads of at least 0.1 are retrieval
/// heads.
///
/// ```
/// use attention_kernels::dense::Dense;
/// use attention_kernels::select::RetrievalScores;
/// use attention_kernels::{Qkv, Weights};
/// use ndarray::Array4;
///
/// let (prompt, span) = ([8, 4, 6, 2, 9], 1..4);
/// let mut scores = RetrievalScores::new(&prompt, span, 2)?;
/// // The first head looks at token 2, the second at token 0.
/// let q = Array4::<f32>::ones((1, 2, 1, 1));
/// let at = |(_, h, j, _): (usize, usize, usize, usize)| if j == 2 - 2 * h { 9.0 } else { 0.0 };
/// let k = Array4::from_shape_fn((1, 2, 5, 1), at);
/// let top = Dense::builder().build()?.top_weights(Qkv::new(q.view(), k.view(), k.view()), 1)?;
/// scores.step(&top, 6)?;
/// assert_eq!(scores.of_tokens(), [1.0 / 3.0, 0.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RetrievalScores {
    prompt: Vec<u32>,
    span: Range<usize>,
    /// `[heads, tokens of the span]`: how often each was hit.
    hits: Array2<usize>,
}

impl RetrievalScores {
    /// Of a prompt, the span of its needle, and so many heads.
    ///
    /// # Errors
    /// A span that is empty or not in the prompt, and more heads than memory has room for.
    pub fn new(prompt: &[u32], span: Range<usize>, heads: usize) -> Result<Self> {
        if span.is_empty() || span.end > prompt.len() {
            let expected = format!("some of {} tokens", prompt.len());
            return Err(Error::value("span", expected, format_args!("{span:?}")));
        }
        let hits = filled("heads", (heads, span.len()), 0)?;
        Ok(Self { prompt: prompt.to_vec(), hits, span })
    }

    /// One step of the answer: the largest weights of its query, and the token that came of
    /// it. Of several sequences or queries the first sequence's last query counts.
    ///
    /// # Errors
    /// Weights of another number of heads, or of no query.
    pub fn step(&mut self, top: &TopWeights, token: u32) -> Result<()> {
        let ((batch, heads, queries, count), own) = (top.keys.dim(), self.hits.dim().0);
        if batch == 0 || heads != own || queries == 0 || count == 0 {
            let expected =
                format!("[batch, heads, queries, count] of {own} heads and at least 1 of the others");
            return Err(Error::shape("top", expected, top.keys.shape()));
        }
        for (head, mut hits) in self.hits.outer_iter_mut().enumerate() {
            let key = top.keys[[0, head, queries - 1, 0]];
            if self.span.contains(&key) && self.prompt[key] == token {
                hits[key - self.span.start] += 1;
            }
        }
        Ok(())
    }

    /// The paper's scores: the share of the needle's tokens that each head has copied, once
    /// or more.
    pub fn of_tokens(&self) -> Vec<f64> {
        self.scores(|hits| hits.min(1))
    }

    /// The scores of released code: steps with a hit for each token of the needle, in which a
    /// token may count several times.
    pub fn of_steps(&self) -> Vec<f64> {
        self.scores(|hits| hits)
    }

    fn scores(&self, count: impl Fn(usize) -> usize) -> Vec<f64> {
        let score = |hits: ndarray::ArrayView1<'_, usize>| {
            hits.iter().map(|&hits| count(hits)).sum::<usize>() as f64 / self.span.len() as f64
        };
        self.hits.outer_iter().map(score).collect()
    }
}

/// The key/value heads that lie farthest from the mean of all, as Task-KV (arXiv 2501.15113)
/// has heads that need their whole cache: of `outputs`, `[q_heads, dim]`, what each query head
/// adds at the end of a prompt, the share `fraction` with the largest distance from their
/// mean, the first of equal ones; a key/value head is one if any of its queries is. The
/// paper's abstract does not say how the share is chosen: it is the caller's.
///
/// # Errors
/// A fraction that is not from 0 to 1, and heads that are not shared evenly.
///
/// ```
/// use attention_kernels::select::heterogeneous_heads;
/// let outputs = ndarray::array![[1.0, 0.0], [1.1, 0.0], [1.0, 0.1], [1.0, 5.0]];
/// assert_eq!(heterogeneous_heads(outputs.view(), 2, 0.25)?, [1]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn heterogeneous_heads(
    outputs: ArrayView2<'_, f32>,
    kv_heads: usize,
    fraction: f64,
) -> Result<Vec<usize>> {
    let (heads, _) = outputs.dim();
    if !(0.0..=1.0).contains(&fraction) {
        return Err(Error::value("fraction", "a number from 0 to 1", fraction));
    }
    if !heads.is_multiple_of(kv_heads) {
        return Err(Error::value("outputs", format!("heads for each of {kv_heads}"), heads));
    }
    let Some(mean) = outputs.mapv(f64::from).mean_axis(ndarray::Axis(0)) else { return Ok(Vec::new()) };
    let distance = |head: usize| -> f64 {
        let apart = outputs.row(head).into_iter().zip(&mean).map(|(&x, mean)| f64::from(x) - mean);
        apart.map(|x| x * x).sum()
    };
    let distances: Vec<f64> = (0..heads).map(distance).collect();
    let mut order: Vec<usize> = (0..heads).collect();
    order.sort_by(|&a, &b| distances[b].total_cmp(&distances[a]));
    let count = (fraction * heads as f64).ceil() as usize;
    let mut chosen: Vec<usize> =
        order[..count.min(heads)].iter().map(|head| head / (heads / kv_heads)).collect();
    chosen.sort_unstable();
    chosen.dedup();
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array4, array};

    use super::*;
    use crate::attention::Weights;
    use crate::dense::Dense;
    use crate::testing::qkv::{Qkvs, error};

    /// Means of columns of the weights by definition.
    #[test]
    fn importance_is_a_mean_over_the_queries_that_see_a_key() {
        for (q_len, kv_len) in [(30, 30), (5, 40)] {
            let x = Qkvs::new([2, 4, 2, q_len, kv_len, 8, 8], 1);
            let causal = Dense::builder().causal().build().unwrap();
            let all = Dense::builder().build().unwrap();
            let received = [causal.key_weights(x.qkv()), all.key_weights(x.qkv())].map(Result::unwrap);
            let weights =
                [causal.reference_weights(x.qkv()), all.reference_weights(x.qkv())].map(Result::unwrap);
            for (causal, (received, weights)) in [true, false].into_iter().zip(received.iter().zip(&weights))
            {
                let got = key_importance(received.view(), q_len, causal);
                let mut above = 0.0;
                for ((b, h, j), &got) in got.indexed_iter() {
                    let seen = (0..q_len).filter(|i| !causal || j + q_len <= kv_len + i);
                    let seen: Vec<f64> = seen.map(|i| weights[[b, h, i, j]]).collect();
                    let want = seen.iter().sum::<f64>() / seen.len() as f64;
                    assert!((f64::from(got) - want).abs() < 1e-6, "{got}, not {want}");
                    above += f64::from(u8::from(j == 2 && want > 0.05)) / 8.0;
                }
                assert_eq!(sink_share(got.view(), 2, 0.05).unwrap(), above);
            }
        }
        let none = Array3::zeros((1, 2, 3));
        assert_eq!(error(sink_share(none.view(), 3, 0.3)), "key: expected one of 3 keys, got 3");
    }

    /// Even weights of causal queries: harmonic numbers.
    #[test]
    fn even_weights() {
        let x = Array4::<f32>::zeros((1, 1, 64, 4));
        let qkv = crate::Qkv::new(x.view(), x.view(), x.view());
        let received = Dense::builder().causal().build().unwrap().key_weights(qkv).unwrap();
        let got = key_importance(received.view(), 64, true);
        let harmonic: f64 = (1..=64).map(|n| 1.0 / f64::from(n)).sum();
        assert!((f64::from(got[[0, 0, 0]]) - harmonic / 64.0).abs() < 1e-6);
        assert!((f64::from(got[[0, 0, 63]]) - 1.0 / 64.0).abs() < 1e-6);
    }

    /// What each head looks at, step by step.
    fn looks(keys: &[usize]) -> TopWeights {
        let keys = Array4::from_shape_vec((1, keys.len(), 1, 1), keys.to_vec()).unwrap();
        TopWeights { weights: keys.mapv(|_| 1.0), keys }
    }

    #[test]
    fn hits_of_steps_and_of_tokens() {
        let mut scores = RetrievalScores::new(&[8, 4, 6, 4, 9], 1..4, 3).unwrap();
        // Head 0 copies each token, head 1 one of them twice, head 2 others.
        for (keys, token) in [([1, 1, 0], 4), ([2, 1, 2], 6), ([3, 1, 4], 4), ([9, 9, usize::MAX], 9)] {
            scores.step(&looks(&keys), token).unwrap();
        }
        assert_eq!(scores.of_tokens(), [1.0, 1.0 / 3.0, 1.0 / 3.0]);
        assert_eq!(scores.of_steps(), [1.0, 2.0 / 3.0, 1.0 / 3.0]);
        let want = "top: expected shape [batch, heads, queries, count] of 3 heads and at least 1 of the others, \
                    got [1, 2, 1, 1]";
        assert_eq!(error(scores.step(&looks(&[0, 0]), 4)), want);
        let want = "span: expected some of 2 tokens, got 1..3";
        assert_eq!(error(RetrievalScores::new(&[8, 4], 1..3, 3)), want);
        assert!(error(RetrievalScores::new(&[8, 4], 0..2, usize::MAX)).starts_with("heads: "));
    }

    #[test]
    fn needles() {
        let prompt: Vec<u32> = (0..50).collect();
        let needle: Vec<u32> = (20..31).collect();
        // Of 11 tokens 10 are enough: a window that starts one early.
        assert_eq!(needle_span(&prompt, &needle), Some(19..30));
        assert_eq!(needle_span(&prompt, &needle[..5]), Some(20..25));
        assert_eq!(needle_span(&prompt, &[99]), None);
        assert_eq!(needle_span(&[], &[1]), None);
        assert_eq!(needle_span(&prompt, &[]), None);
    }

    #[test]
    fn heads_far_from_the_mean() {
        let finite = array![[0.0f32, 0.0], [9.0, 0.0], [1.0, 0.0], [0.0, 1.0]];
        assert_eq!(heterogeneous_heads(finite.view(), 4, 0.25).unwrap(), [1]);
        assert_eq!(heterogeneous_heads(finite.view(), 4, 0.5).unwrap(), [1, 3]);
        assert_eq!(heterogeneous_heads(finite.view(), 2, 0.25).unwrap(), [0]);
        assert_eq!(heterogeneous_heads(finite.view(), 2, 1.0).unwrap(), [0, 1]);
        assert!(heterogeneous_heads(finite.view(), 2, 0.0).unwrap().is_empty());
        // All alike: the first ones.
        assert_eq!(heterogeneous_heads(Array2::zeros((4, 3)).view(), 4, 0.5).unwrap(), [0, 1]);
        let want = "outputs: expected heads for each of 3, got 4";
        assert_eq!(error(heterogeneous_heads(finite.view(), 3, 0.5)), want);
        let want = "fraction: expected a number from 0 to 1, got 2";
        assert_eq!(error(heterogeneous_heads(finite.view(), 2, 2.0)), want);
    }
}
