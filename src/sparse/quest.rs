//! Quest: query-aware sparsity for long caches.
//!
//! ```text
//! U_b = sum_c max(q_c min_{j in b} k_jc, q_c max_{j in b} k_jc)   for pages b
//! P_i = the last page that the query sees, and the budget / page - 1 others
//!       with the largest U_b, the lower one of equals
//! o_i = softmax attention of q_i on the keys of P_i
//! ```
//!
//! `U_b` bounds the scores of a page's keys from above. From "Quest:
//! Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv
//! 2406.10774), in the form of its kernels: the last page is always read. The
//! released evaluation code instead lets it compete, among at least 3 pages.
//!
//! Cost: `4 head_dim / page` flops a visible pair for the bounds, `2 (head_dim +
//! value_dim)` a selected one. A decoding step reads `2 / page` of the key bytes
//! (as `f32`) where
//! [`Summaries`](crate::select::Summaries) are kept, and the selected pages.

use ndarray::{ArrayView1, ArrayView2};

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::{Per, TokenLists};
use crate::score::Plain;
use crate::select::{Forced, Pick, Reduce, Rule, Scheme, Scored, Summarised, Summary, kept_summaries};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::selecting::{Schemed, selecting, sparse_options};

/// Quest; see the [module](crate::sparse) for its kin.
///
/// ```
/// use attention_kernels::{Attention, Qkv, select::Summarised, sparse::Quest};
/// use ndarray::{Array4, s};
///
/// let cache = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let quest = Quest::builder(128).build()?;
/// let at = |n: usize| {
///     let keys = cache.slice(s![.., .., ..n, ..]);
///     Qkv::new(cache.slice(s![.., .., n - 1..n, ..]), keys, keys)
/// };
/// let mut pages = quest.summaries(at(400))?;
/// for n in 401..410 {
///     quest.extend(&mut pages, at(n))?; // reads the new key alone
///     let kept = quest.forward(Summarised::new(at(n), &pages))?;
///     assert_eq!(kept, quest.forward(at(n))?);
/// }
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Quest {
    config: Config<Order, Plain>,
    page: usize,
    pages: usize,
    per: Per,
}

/// Builds a [`Quest`].
#[derive(Clone, Debug)]
pub struct QuestBuilder {
    options: Options<Order, Plain>,
    page: usize,
    budget: usize,
    per: Per,
}

impl Quest {
    /// As many pages a query as have `budget` keys, rounded down, at least one.
    pub fn builder(budget: usize) -> QuestBuilder {
        QuestBuilder { options: Options::default(), page: 16, budget, per: Per::Head }
    }
}

kept_summaries!(Quest, Summary::MinMax, |quest| quest.page);
sparse_options!(QuestBuilder);

impl QuestBuilder {
    /// Keys of a page. Default: 16.
    pub fn page(self, page: usize) -> Self {
        Self { page, ..self }
    }

    /// Which heads share pages: these then go by their largest bound. Default:
    /// each query head has its own.
    pub fn per(self, per: Per) -> Self {
        Self { per, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for pages or a budget of 0 keys or a scale that is not
    /// finite, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Quest> {
        let Self { options, page, budget, per } = self;
        for (name, keys) in [("page", page), ("budget", budget)] {
            if keys == 0 {
                return Err(Error::value(name, "at least 1 key", 0));
            }
        }
        Ok(Quest { config: options.build()?, page, pages: (budget / page).max(1), per })
    }
}

impl Schemed for Quest {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self, _: &Dims) -> Scheme {
        Scheme {
            unit: self.page,
            summary: Summary::MinMax,
            per: self.per,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(self.pages), forced: Forced { first: 0, last: 1, inside: true } },
            causal: self.config.mask().causal,
            scored: Scored::Begun,
        }
    }

    fn score(&self, query: ArrayView1<'_, f64>, keys: ArrayView2<'_, f64>) -> f64 {
        let bound = |(q, channel): (&f64, ArrayView1<'_, f64>)| {
            let least =
                channel.iter().copied().fold(f64::INFINITY, |a, b| if b < a || b.is_nan() { b } else { a });
            let most = channel
                .iter()
                .copied()
                .fold(f64::NEG_INFINITY, |a, b| if b > a || b.is_nan() { b } else { a });
            let (low, high) = (q * least, q * most);
            if low > high || low.is_nan() { low } else { high }
        };
        query.iter().zip(keys.columns()).map(bound).sum()
    }
}

selecting!(Quest, TokenLists, [Q, K, O] Qkv);
selecting!(Quest, TokenLists, caches);
selecting!(Quest, TokenLists, summarised caches);
selecting!(Quest, TokenLists, [Q, K, O] Summarised);

exhibit! {
    QuestExhibit of Quest, "sparse", "Quest", "arXiv 2406.10774";
    "exact attention on the pages of 16 keys that may hold the highest scores: 64 keys a query, causal";
    not "where a query needs many keys that lie far apart: each costs a page";
    tokens false;
    build(_, _) { Quest::builder(64).causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Quest, QuestExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Array4, s};

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::cache::{Append, Cached, KvShape, Paged, Pages};
    use crate::select::SummarisedCache;
    use crate::sparse::TopK;
    use crate::sparse::testing::{self, Arrays};

    #[test]
    fn identities() {
        for (page, per) in [(16, Per::Head), (32, Per::Group), (64, Per::Sequence), (5, Per::Head)] {
            let quest = |budget| Quest::builder(budget).page(page).per(per).causal().build().unwrap();
            testing::all_keys_are_dense(&quest(1000), true);
            testing::chunks_are_the_whole(&quest(130));
            testing::last_row_is_decoding(&quest(130));
            testing::never_ahead(&quest(130));
            testing::kept_mass_bounds_the_error(&quest(130), true);
            testing::exact_scores_give_equal_lists(&quest(130));
        }
        testing::caches_are_arrays(&Quest::builder(64).causal().build().unwrap());
        testing::heads_permute(&Quest::builder(64).causal().build().unwrap());
        testing::all_keys_are_dense(&Quest::builder(1000).build().unwrap(), false);
    }

    /// With pages of one key the bound is the score; the last key is in both.
    #[test]
    fn pages_of_one_key_are_the_highest_scores() {
        let mut x = Arrays::integers([2, 4, 2, 1, 70, 16, 8], 5);
        // Make the last key the best of each query: forced or not, it is chosen.
        for b in 0..2 {
            for g in 0..2 {
                for h in 0..2 {
                    x.q.slice_mut(s![b, 2 * g + h, 0, ..]).fill(1.0);
                }
                x.k.slice_mut(s![b, g, 69, ..]).fill(100.0);
            }
        }
        let quest = Quest::builder(9).page(1).build().unwrap();
        let top = TopK::builder(9).build().unwrap();
        assert_eq!(quest.select(x.qkv()).unwrap(), top.select(x.qkv()).unwrap());
    }

    #[test]
    fn the_bound_is_one_and_a_product_of_signs() {
        let x = Arrays::integers([1, 1, 1, 3, 40, 16, 8], 6);
        let quest = Quest::builder(16).build().unwrap();
        let (q, k) = (x.q.mapv(f64::from), x.k.mapv(f64::from));
        for i in 0..3 {
            let query = q.slice(s![0, 0, i, ..]);
            for page in 0..3 {
                let keys = k.slice(s![0, 0, 16 * page..(16 * page + 16).min(40), ..]);
                let bound = quest.score(query, keys);
                assert!(keys.rows().into_iter().all(|key| key.dot(&query) <= bound));
                let sign = |c: usize| query[c].signum();
                let most = |c: usize| keys.column(c).iter().map(|k| sign(c) * k).fold(f64::MIN, f64::max);
                assert_eq!(bound, (0..16).map(|c| query[c].abs() * most(c)).sum::<f64>());
            }
        }
    }

    #[test]
    fn kept_summaries_select_the_same_and_are_checked() {
        let x = Arrays::normal([2, 4, 2, 1, 150, 24, 8], 9);
        let quest = Quest::builder(64).build().unwrap();
        let cut =
            |n: usize| Qkv::new(x.q.view(), x.k.slice(s![.., .., ..n, ..]), x.v.slice(s![.., .., ..n, ..]));
        let mut kept = quest.summaries(cut(1)).unwrap();
        for n in [2, 3, 16, 17, 40, 149, 150] {
            let refusal = quest.select(Summarised::new(cut(n), &kept)).unwrap_err();
            assert!(refusal.to_string().starts_with("summaries: "), "{refusal}");
            quest.extend(&mut kept, cut(n)).unwrap();
            assert_eq!(kept, quest.summaries(cut(n)).unwrap());
            let index = quest.select(Summarised::new(cut(n), &kept)).unwrap();
            assert_eq!(index, quest.select(cut(n)).unwrap());
        }
        assert!(quest.extend(&mut kept, cut(149)).is_err(), "fewer keys than are known");
        let other: Array4<f32> = Array4::zeros((2, 3, 150, 24));
        let other = Qkv::new(other.view(), other.view(), other.view());
        assert!(quest.extend(&mut kept, other).is_err(), "other heads");
    }

    #[test]
    fn summaries_of_a_cache_are_those_of_its_keys() {
        let x = Arrays::normal([1, 4, 2, 1, 150, 24, 8], 9);
        let quest = Quest::builder(64).build().unwrap();
        let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 8 };
        let mut cache = Paged::<f32>::new(shape, 1, Pages { count: 20, len: 16 }).unwrap();
        let first = Cached::new(x.q.view(), &cache);
        let mut kept = quest.summaries_of(first).unwrap();
        let mut from = 0;
        for n in [1, 16, 17, 100, 150] {
            cache.append(0, x.k.slice(s![0, .., from..n, ..]), x.v.slice(s![0, .., from..n, ..])).unwrap();
            from = n;
            let cached = Cached::new(x.q.view(), &cache);
            assert!(quest.select(SummarisedCache::new(cached, &kept)).is_err(), "a key is missing");
            quest.extend_from(&mut kept, cached).unwrap();
            let (k, v) = (x.k.slice(s![.., .., ..n, ..]), x.v.slice(s![.., .., ..n, ..]));
            assert_eq!(kept, quest.summaries(Qkv::new(x.q.view(), k, v)).unwrap());
            let with = SummarisedCache::new(cached, &kept);
            assert_eq!(quest.select(with).unwrap(), quest.select(cached).unwrap());
            assert_eq!(quest.forward(with).unwrap(), quest.forward(cached).unwrap());
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: QuestBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Quest::builder(0)), "budget: expected at least 1 key, got 0");
        assert_eq!(refusal(Quest::builder(64).page(0)), "page: expected at least 1 key, got 0");
        assert!(refusal(Quest::builder(64).scale(f32::NAN)).starts_with("scale: "));
    }
}
