//! Quest: query-aware sparsity for long caches.

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

/// Quest: query-aware sparsity for long caches.
///
/// ```text
/// U_b = sum_c max(q_c min_{j in b} k_jc, q_c max_{j in b} k_jc)   for pages b
/// P_i = the last page that the query sees, and the budget / page - 1 others
///       with the largest U_b, the lower one of equals
/// o_i = softmax attention of q_i on the keys of P_i
/// ```
///
/// `U_b` bounds the scores of a page's keys from above. From "Quest:
/// Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv
/// 2406.10774), in the form of its kernels: the last page is always read. The
/// released evaluation code instead lets it compete, among at least 3 pages.
///
/// Cost: `4 head_dim / page` flops a visible pair for the bounds, `2 (head_dim +
/// value_dim)` a selected one. A decoding step reads `2 / page` of the key bytes
/// (as `f32`) where [`Summaries`](crate::select::Summaries) are kept, and the selected pages.
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
        // NaN, where there is one, is both.
        let further = |a: f64, b: f64, up: bool| {
            let beyond = if up { b > a } else { b < a };
            if beyond || b.is_nan() { b } else { a }
        };
        let bound = |(q, channel): (&f64, ArrayView1<'_, f64>)| {
            let least = channel.iter().fold(f64::INFINITY, |a, &b| further(a, b, false));
            let most = channel.iter().fold(f64::NEG_INFINITY, |a, &b| further(a, b, true));
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
            testing::identities_of_causal(&quest(1000), &quest(130));
            testing::exact_scores_give_equal_lists(&quest(130));
        }
        testing::caches_are_arrays(&Quest::builder(64).causal().build().unwrap());
        testing::all_keys_are_dense(&Quest::builder(1000).build().unwrap(), false);
    }

    /// With pages of one key the bound is the score; the last key is in both.
    #[test]
    fn pages_of_one_key_are_the_highest_scores() {
        let mut x = Arrays::integers([2, 4, 2, 1, 70, 16, 8], 5);
        // The last key is the best of each query: forced or not, it is chosen.
        x.q.fill(1.0);
        x.k.slice_mut(s![.., .., 69, ..]).fill(100.0);
        let want = TopK::builder(9).build().unwrap().select(x.qkv()).unwrap();
        assert_eq!(Quest::builder(9).page(1).build().unwrap().select(x.qkv()).unwrap(), want);
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

    /// Of arrays and of a cache that grow; those of a step are an eighth of the keys.
    #[test]
    fn kept_summaries_select_the_same_and_are_checked() {
        let x = Arrays::normal([1, 4, 2, 1, 150, 24, 8], 9);
        let quest = Quest::builder(64).build().unwrap();
        let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 8 };
        let mut cache = Paged::<f32>::new(shape, 1, Pages { count: 20, len: 16 }).unwrap();
        let cut =
            |n: usize| Qkv::new(x.q.view(), x.k.slice(s![.., .., ..n, ..]), x.v.slice(s![.., .., ..n, ..]));
        let mut kept =
            [quest.summaries(cut(0)).unwrap(), quest.summaries_of(Cached::new(x.q.view(), &cache)).unwrap()];
        let mut from = 0;
        for n in [1, 2, 3, 16, 17, 40, 149, 150] {
            cache.append(0, x.k.slice(s![0, .., from..n, ..]), x.v.slice(s![0, .., from..n, ..])).unwrap();
            from = n;
            let cached = Cached::new(x.q.view(), &cache);
            let refusal = quest.select(Summarised::new(cut(n), &kept[0])).unwrap_err();
            assert!(refusal.to_string().starts_with("summaries: "), "{refusal}");
            assert!(quest.select(SummarisedCache::new(cached, &kept[1])).is_err(), "a key is missing");
            quest.extend(&mut kept[0], cut(n)).unwrap();
            quest.extend_from(&mut kept[1], cached).unwrap();
            assert!(kept[0] == kept[1] && kept[0] == quest.summaries(cut(n)).unwrap());
            let index = quest.select(cut(n)).unwrap();
            assert_eq!(index, quest.select(Summarised::new(cut(n), &kept[0])).unwrap());
            let with = SummarisedCache::new(cached, &kept[1]);
            assert_eq!(index, quest.select(with).unwrap());
            assert_eq!(quest.forward(with).unwrap(), quest.forward(cached).unwrap());
            assert_eq!(8 * kept[0].row(0, 1, 0).len(), 16 * 24);
        }
        assert!(quest.extend(&mut kept[0], cut(149)).is_err(), "fewer keys than are known");
        let other = Array4::<f32>::zeros((1, 3, 150, 24));
        assert!(quest.extend(&mut kept[0], Qkv::new(x.q.view(), other.view(), other.view())).is_err());
    }

    #[test]
    fn refusals() {
        let refusal = |builder: QuestBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Quest::builder(0)), "budget: expected at least 1 key, got 0");
        assert_eq!(refusal(Quest::builder(64).page(0)), "page: expected at least 1 key, got 0");
        assert!(refusal(Quest::builder(64).scale(f32::NAN)).starts_with("scale: "));
    }
}
