//! ZeroTuning: the weight of the first token, or of a span of tokens, multiplied for each
//! head.

use std::ops::Range;

use crate::attention::Cost;
use crate::card::{carded, exhibit};
use crate::definition::softmax::Reference;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::mask::Causal;
use crate::score::{Score, define_shift, shift};
use crate::simd::Simd;
use crate::stages::attend::{Attending, Config, Options, attending, mergeable};
use crate::stages::options::{EPSILON, options};
use crate::stages::over::Over;

/// ZeroTuning: the weight of the first token, or of a span of tokens, multiplied for each
/// head.
///
/// ```text
/// A = softmax(scale q_i . k_j)                                causal
/// A'_ij = gamma_h A_ij / sum  for j in [a, b),  A_ij / sum  for others      a sum of 1
/// o_i = sum_j A'_ij v_j
/// ```
///
/// "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models
/// Without Training" (arXiv 2505.11739). It is `ln gamma` added to the scores of the span.
/// A gamma of 0 hides the span. Queries in a span that starts at 0 see nothing else, and
/// stay as they are. Layers and gammas are found by trying them out.
///
/// Cost: that of causal attention, and an addition a score of the span. Where all gammas
/// are 1, [`Dense`](super::Dense) does the same.
///
/// Causal attention in which the weights of a span are multiplied, over arrays and
/// caches.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::ZeroTuning};
/// use ndarray::{Array4, s};
///
/// // Equal scores, and a value for the first token alone.
/// let x = Array4::<f32>::zeros((1, 2, 5, 16));
/// let mut v = x.clone();
/// v.slice_mut(s![.., .., 0, ..]).fill(1.0);
/// let tuned = ZeroTuning::builder(vec![1.0, 3.0]).build()?;
/// let out = tuned.forward(Qkv::new(x.view(), x.view(), v.view()))?;
/// assert!((out[[0, 0, 4, 0]] - 1.0 / 5.0).abs() < 1e-6);
/// assert!((out[[0, 1, 4, 0]] - 3.0 / 7.0).abs() < 1e-6);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ZeroTuning {
    config: Config<Causal, Tuned>,
}

impl ZeroTuning {
    /// One gamma for each query head, of 0 at least.
    pub fn builder(gammas: Vec<f32>) -> ZeroTuningBuilder {
        ZeroTuningBuilder::with(gammas)
    }
}

options! {
    /// Builds a [`ZeroTuning`].
    ZeroTuningBuilder of ZeroTuning, isa;
    given { gammas: Vec<f32>, in EPSILON; }
    set {
        /// The keys whose weights are multiplied, counted from the start of a sequence.
        /// Default: the first.
        span: Range<usize> = 0..1;
    }
    build(this, config) {
        let (gammas, span) = (this.gammas, this.span);
        if span.start > span.end {
            return Err(Error::value("span", "a start that is not after its end", format_args!("{span:?}")));
        }
        let score = Tuned { logs: gammas.iter().map(|gamma| gamma.ln()).collect(), gammas, span };
        let options = Options { mask: Causal::new(), score, scale: config.scale, isa: Some(config.isa) };
        Ok(ZeroTuning { config: options.build()? })
    }
}

impl ZeroTuningBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

/// Adds `ln gamma` to the scores of a span.
#[derive(Clone, Debug)]
struct Tuned {
    gammas: Vec<f32>,
    logs: Vec<f32>,
    span: Range<usize>,
}

impl Tuned {
    /// Whether a query sees keys that are not of the span.
    #[inline(always)]
    fn sees_others(&self, site: &Site, query: usize) -> bool {
        let position = usize::try_from(site.position(None, query));
        self.span.start > 0 || position.is_ok_and(|position| position >= self.span.end)
    }
}

impl Score for Tuned {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        if !self.sees_others(site, query) || !self.span.contains(&key) {
            return score;
        }
        define_shift(score, f64::from(self.gammas[site.head]).ln())
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        let [start, end] =
            [self.span.start, self.span.end].map(|key| key.saturating_sub(first).min(scores.len()));
        if self.sees_others(site, query) {
            let log = self.logs[site.head];
            scores[start..end].iter_mut().for_each(|score| *score = shift(*score, log));
        }
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        if self.gammas.len() == dims.q_heads {
            return Ok(());
        }
        let expected = format!("one for each of the {} query heads", dims.q_heads);
        Err(Error::value("gammas", expected, self.gammas.len()))
    }
}

impl<X: Over> Attending<X> for ZeroTuning {
    fn with_call<R>(&self, x: X, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        x.in_order("span")?;
        x.over(&self.config, run)
    }

    fn define(&self, x: X) -> Result<Reference> {
        x.in_order("span")?;
        x.defined(&self.config)
    }

    fn price(&self, x: X) -> Result<Cost> {
        x.in_order("span")?;
        x.priced(&self.config)
    }
}

attending!(ZeroTuning, [Q, K, O] Qkv);
mergeable!(ZeroTuning, [Q, K, O] Qkv);
attending!(ZeroTuning, caches);
mergeable!(ZeroTuning, caches);

exhibit! {
    ZeroTuningExhibit of ZeroTuning, "dense", "ZeroTuning", "arXiv 2505.11739";
    "causal, weights of the first tokens times a gamma of each head";
    not "where the first token matters as much as the model has it: causal alone";
    tokens false;
    build(x, field) {
        // Some heads hide the span.
        let gamma = |h: usize| (1.5 + 2.0 * field.at(1, h, 0, 0)).max(0.0);
        ZeroTuning::builder((0..x.q.dim().1).map(gamma).collect()).span(0..3)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(ZeroTuning, ZeroTuningExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{Append, ByHead, Cached, Contiguous, KvShape, Ring};
    use crate::dense::Dense;
    use crate::mask::{Mask, mask_fn};
    use crate::testing::qkv::{Qkvs, close, error, held, refused};
    use crate::{Attention, Weights};
    use ndarray::s;

    fn tuned(gammas: &[f32], span: Range<usize>) -> ZeroTuning {
        ZeroTuning::builder(gammas.to_vec()).span(span).build().unwrap()
    }

    /// Few queries and many, each on its engine, over arrays and a cache.
    #[test]
    fn kernels_keep_to_the_definition() {
        for (q_len, kv_len) in [(1, 300), (60, 130), (70, 3)] {
            let x = Qkvs::new([2, 4, 2, q_len, kv_len, 12, 17], 1);
            let shape = KvShape { kv_heads: 2, head_dim: 12, value_dim: 17 };
            let mut cache = Contiguous::<f32>::new(shape, 2, kv_len).unwrap();
            cache.append_each(&[0, 1], x.k.view(), x.v.view()).unwrap();
            for span in [0..1, 0..4000, 2..70, 5..5, 400..401] {
                let tuned = tuned(&[0.3, 0.0, 7.0, 1e-40], span);
                held(&tuned, x.qkv());
                held(&tuned, Cached::new(x.q.view(), &cache));
                let (a, b) = (tuned.forward(x.qkv()), tuned.forward(Cached::new(x.q.view(), &cache)));
                assert_eq!(a.unwrap(), b.unwrap());
            }
            held(&tuned(&[0.0; 4], 1..3), x.qkv().key_lengths(&[kv_len.min(2), kv_len]));
        }
    }

    #[test]
    fn weights_are_multiplied_and_sum_to_1_again() {
        let x = Qkvs::new([1, 2, 1, 40, 40, 12, 17], 2);
        let dense = Dense::builder().causal().build().unwrap();
        for (span, gammas) in [(0..1, [0.5f32, 3.0]), (0..7, [2.0, 0.0]), (3..9, [0.1, 1.0])] {
            let mut want = dense.reference_weights(x.qkv()).unwrap();
            for (h, i) in ndarray::indices((2, 40)) {
                let mut row = want.slice_mut(s![0, h, i, ..]);
                if span.start > 0 || i >= span.end {
                    row.slice_mut(s![span.clone()]).mapv_inplace(|x| f64::from(gammas[h]) * x);
                    let sum = row.sum();
                    row /= sum;
                }
            }
            close(&tuned(&gammas, span).reference_weights(x.qkv()).unwrap(), &want, 1e-12);
        }
    }

    #[test]
    fn a_gamma_of_1_is_causal_and_one_of_0_hides() {
        let mut x = Qkvs::new([1, 2, 2, 40, 40, 12, 17], 3);
        let plain = Dense::builder().causal().build().unwrap();
        assert_eq!(tuned(&[1.0; 2], 0..1).reference(x.qkv()), plain.reference(x.qkv()));
        let hidden = Causal::new().and(mask_fn(|_, query, key| query < 4 || key >= 4));
        let want = Dense::builder().mask(hidden).build().unwrap().reference(x.qkv()).unwrap();
        close(&tuned(&[0.0; 2], 0..4).reference(x.qkv()).unwrap(), &want, 1e-12);
        // What is hidden does not matter, whatever it is.
        let hides = tuned(&[0.0; 2], 0..4);
        let of = |x: &Qkvs| hides.forward(x.qkv()).unwrap().slice_move(s![.., .., 4.., ..]);
        let before = of(&x);
        x.k.slice_mut(s![.., .., ..4, ..]).fill(f32::NAN);
        x.v.slice_mut(s![.., .., ..4, ..]).fill(f32::NAN);
        assert_eq!(of(&x), before);
    }

    /// Of heads that hold other tokens the first key is another one for each.
    #[test]
    fn heads_with_tokens_of_their_own_are_refused() {
        let x = Qkvs::new([1, 2, 2, 1, 40, 8, 8], 8);
        let shape = KvShape { kv_heads: 1, head_dim: 8, value_dim: 8 };
        let all = Contiguous::<f32>::new(shape, 1, 50).unwrap();
        let last = Ring::<f32>::new(shape, 1, 2, 10).unwrap();
        let mut cache = ByHead::builder().heads(&[0], all).heads(&[1], last).build().unwrap();
        let of = |cache: &ByHead| tuned(&[1.0, 3.0], 0..1).forward(Cached::<f32, _>::new(x.q.view(), cache));
        let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., .., ..5, ..]));
        cache.append_each(&[0], k, v).unwrap();
        assert!(of(&cache).is_ok());
        let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., .., 5.., ..]));
        cache.append_each(&[0], k, v).unwrap();
        let want = "span cannot be combined with heads that hold other tokens";
        assert!(of(&cache).unwrap_err().to_string().starts_with(want));
    }

    #[test]
    fn refusals() {
        let x = Qkvs::new([1, 2, 1, 3, 3, 8, 8], 8);
        let few = refused(&tuned(&[1.0], 0..1), x.qkv());
        assert_eq!(few, "gammas: expected one for each of the 2 query heads, got 1");
        for (gamma, got) in [(-0.5, "-0.5"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let message = error(ZeroTuning::builder(vec![1.0, gamma]).build());
            assert_eq!(message, format!("gammas: expected a finite number of at least 0, got {got}"));
        }
        let span = error(ZeroTuning::builder(vec![]).span(Range { start: 3, end: 2 }).build());
        assert_eq!(span, "span: expected a start that is not after its end, got 3..2");
    }
}
