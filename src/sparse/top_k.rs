//! Exact top-k attention.

use ndarray::{ArrayView1, ArrayView2};

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::{Per, TokenLists};
use crate::score::Plain;
use crate::select::{Forced, Pick, Reduce, Rule, Scheme, Scored, Summary};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::selecting::{Schemed, dot, selecting, sparse_options};

/// Exact top-k attention.
///
/// ```text
/// S_i = the k visible keys with the largest q_i . k_j, the lower one of equals
/// o_i = sum_{j in S_i} exp(scale q_i . k_j) v_j / sum_{j in S_i} exp(scale q_i . k_j)
/// ```
///
/// From "Memory-efficient Transformers via Top-k Attention" (arXiv 2106.06899);
/// among mechanisms that read `k` keys it keeps the most weight. Where heads of
/// a group share a list, a key's score is the largest that it has in one of
/// them.
///
/// Cost: `2 head_dim` flops a visible pair for the scores, `2 (head_dim +
/// value_dim)` a selected one. In decoding it reads all keys and `k` values;
/// the selection itself reads a row of scores three times.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Selects, sparse::TopK};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 200, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let top = TopK::builder(8).causal().build()?;
/// let index = top.select(x)?;
/// assert_eq!(index.keys(0, 1, 199), 8, "keys of the last query of head 1");
/// assert_eq!(index.keys(0, 1, 3), 4, "the fourth query sees four");
/// let out = top.forward_on(x, &index)?;
/// # assert_eq!(out, top.forward(x)?);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// DARE ("Long-Sequence Recommendation Models Need Decoupled Embeddings", arXiv
/// 2410.02604) is this attention of target items to a user's behaviours, with small
/// embeddings `q_a` and `k_a` that score and large ones `q_r` and `v_r` that are read:
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::TopK};
/// use ndarray::Array4;
///
/// // 8 users with 300 and less behaviours, and 5 targets for each.
/// let (q_a, q_r) = (Array4::<f32>::ones((8, 1, 5, 16)), Array4::ones((8, 1, 5, 64)));
/// let (k_a, v_r) = (Array4::<f32>::ones((8, 1, 300, 16)), Array4::<f32>::ones((8, 1, 300, 64)));
/// let lengths = [300, 12, 0, 7, 300, 290, 1, 33];
/// let x = Qkv::new(q_a.view(), k_a.view(), v_r.view()).key_lengths(&lengths);
/// let u = TopK::builder(20).build()?.forward(x)?;
/// let features = [&q_r, &u, &(&q_r * &u)];
/// # assert!((features[2][[0, 0, 0, 0]] - 1.0).abs() < 1e-6 && u[[2, 0, 0, 0]] == 0.0);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// Where its scores have a part for times, `q_s . k_s / sqrt(d_s) + q_t . k_t /
/// sqrt(d_t)`, these are one dot product of what lies side by side, queries divided
/// already, with a [`scale`](TopKBuilder::scale) of 1.
#[derive(Clone, Debug)]
pub struct TopK {
    config: Config<Order, Plain>,
    k: usize,
    per: Per,
}

/// Builds a [`TopK`].
#[derive(Clone, Debug)]
pub struct TopKBuilder {
    options: Options<Order, Plain>,
    k: usize,
    per: Per,
}

impl TopK {
    /// `k` keys a query.
    pub fn builder(k: usize) -> TopKBuilder {
        TopKBuilder { options: Options::default(), k, per: Per::Head }
    }
}

sparse_options!(TopKBuilder);

impl TopKBuilder {
    /// Which heads share a list. Default: each query head has its own.
    pub fn per(self, per: Per) -> Self {
        Self { per, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` of 0 or a scale that is not finite,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<TopK> {
        if self.k == 0 {
            return Err(Error::value("k", "at least 1 key", 0));
        }
        Ok(TopK { config: self.options.build()?, k: self.k, per: self.per })
    }
}

impl Schemed for TopK {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self, _: &Dims) -> Scheme {
        Scheme {
            unit: 1,
            summary: Summary::First,
            per: self.per,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(self.k), forced: Forced::default() },
            causal: self.config.mask().causal,
            scored: Scored::Begun,
        }
    }

    fn score(&self, query: ArrayView1<'_, f64>, keys: ArrayView2<'_, f64>) -> f64 {
        dot(query, &keys)
    }
}

selecting!(TopK, TokenLists, [Q, K, O] Qkv);
selecting!(TopK, TokenLists, caches);

exhibit! {
    TopKExhibit of TopK, "sparse", "top-k", "arXiv 2106.06899";
    "exact attention on the 32 keys with the highest scores, causal";
    not "beyond some ten thousand keys: all of them are scored";
    tokens false;
    build(_, _) { TopK::builder(32).causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(TopK, TopKExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::sparse::testing::{self, Arrays};

    #[test]
    fn identities() {
        for per in [Per::Head, Per::Group, Per::Sequence] {
            let top = |k| TopK::builder(k).per(per).causal().build().unwrap();
            testing::all_keys_are_dense(&top(1000), true);
            testing::chunks_are_the_whole(&top(20));
            testing::last_row_is_decoding(&top(20));
            testing::never_ahead(&top(20));
            testing::kept_mass_bounds_the_error(&top(20), true);
            testing::exact_scores_give_equal_lists(&top(20));
        }
        testing::all_keys_are_dense(&TopK::builder(1000).build().unwrap(), false);
        testing::kept_mass_bounds_the_error(&TopK::builder(5).build().unwrap(), false);
        testing::caches_are_arrays(&TopK::builder(20).causal().build().unwrap());
        testing::heads_permute(&TopK::builder(20).causal().build().unwrap());
    }

    #[test]
    fn one_key_is_the_best_one() {
        let x = Arrays::integers([1, 2, 1, 5, 40, 8, 4], 3);
        let out = TopK::builder(1).build().unwrap().forward(x.qkv()).unwrap();
        for h in 0..2 {
            for i in 0..5 {
                let score = |j: usize| (0..8).map(|c| x.q[[0, h, i, c]] * x.k[[0, 0, j, c]]).sum::<f32>();
                let best = (1..40).fold(0, |best, j| if score(j) > score(best) { j } else { best });
                assert!((0..4).all(|c| (out[[0, h, i, c]] - x.v[[0, 0, best, c]]).abs() < 1e-6));
            }
        }
    }

    #[test]
    fn refusals() {
        let none = TopK::builder(0).build().unwrap_err();
        assert_eq!(none.to_string(), "k: expected at least 1 key, got 0");
        let (a, b) =
            (Arrays::integers([1, 2, 1, 5, 40, 8, 4], 3), Arrays::integers([1, 2, 1, 5, 39, 8, 4], 3));
        let top = TopK::builder(40).build().unwrap();
        let index = top.select(a.qkv()).unwrap();
        let refusal = top.forward_on(b.qkv(), &index).unwrap_err();
        assert!(refusal.to_string().starts_with("keys: "), "{refusal}");
    }
}
