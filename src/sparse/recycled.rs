//! Recycled attention: full attention in some steps of decoding, whose most
//! attended keys serve the steps between.

use ndarray::{ArrayView1, ArrayView2};

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::{Per, TokenLists};
use crate::score::Plain;
use crate::select::{Forced, Pick, Policy, Reduce, Reuse, Rule, Scheme, Summary, Tail};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::reusing::{Reusing, reusing};
use crate::stages::selecting::{Schemed, dot, selecting, sparse_options};

/// Recycled attention: full attention in some steps of decoding, whose most
/// attended keys serve the steps between.
///
/// ```text
/// p_h    = softmax_j(scale q_h . k_j)                 for the heads h of a group
/// R      = the k keys with the largest sum_h p_hj, the lower one of equals
/// full   o_h = sum_j p_hj v_j, and R is kept
/// other  o_h = softmax attention of q_h on R and the keys that have come since
/// ```
///
/// From "Recycled Attention: Efficient inference for long-context language models"
/// (arXiv 2411.05787; RefreshKV). How the heads of a group become one list and
/// when a step looks back are in its words, not in code of its authors, which is
/// not public: groups sum, and [`refresh_below`](RecycledBuilder::refresh_below)
/// compares queries by the mean of their heads' cosines. A call by itself is the
/// first step after a full one, with the same query. No learned parameters.
///
/// Cost: of a full step that of dense attention and `2 head_dim` flops a key
/// again for the selection; of others `2 (head_dim + value_dim)` a key of `R` and
/// since. A step reads on average `1 / every` of all keys and values, and `k`.
#[derive(Clone, Debug)]
pub struct RecycledAttention {
    config: Config<Order, Plain>,
    k: usize,
    reuse: Reuse,
}

/// Builds a [`RecycledAttention`].
#[derive(Clone, Debug)]
pub struct RecycledBuilder {
    options: Options<Order, Plain>,
    k: usize,
    policy: Policy,
}

impl RecycledAttention {
    /// `k` keys of every group, chosen in one of `every` steps.
    pub fn builder(k: usize, every: usize) -> RecycledBuilder {
        RecycledBuilder { options: Options::default(), k, policy: Policy::EveryN(every) }
    }
}

sparse_options!(RecycledBuilder);

impl RecycledBuilder {
    /// A step is a full one where the queries' cosine with those of the last full
    /// one is below this, which one of so many steps looks at: those of the
    /// builder, which are no longer full by their number.
    pub fn refresh_below(mut self, cosine: f32) -> Self {
        let (Policy::EveryN(every) | Policy::CosineAtLeast { every, .. }) = self.policy else { return self };
        self.policy = Policy::CosineAtLeast { cosine, every, per_head: true };
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` or steps of 0, a cosine that is NaN or a scale that
    /// is not finite, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<RecycledAttention> {
        if self.k == 0 {
            return Err(Error::value("k", "at least 1 key", 0));
        }
        self.policy.check()?;
        let reuse = Reuse { policy: self.policy, dense: true, tail: Tail::Since };
        Ok(RecycledAttention { config: self.options.build()?, k: self.k, reuse })
    }
}

impl Schemed for RecycledAttention {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self, dims: &Dims) -> Scheme {
        Scheme {
            unit: 1,
            summary: Summary::First,
            per: Per::Group,
            q_block: 1,
            shares: Some(self.config.scale(dims) as f32),
            reduce: Reduce::Sum,
            pick: Pick { rule: Rule::TopK(self.k), forced: Forced::default() },
            causal: self.config.mask().causal,
            scored: crate::select::Scored::Begun,
        }
    }

    fn score(&self, query: ArrayView1<'_, f64>, keys: ArrayView2<'_, f64>) -> f64 {
        dot(query, &keys)
    }
}

impl Reusing for RecycledAttention {
    fn reuse(&self) -> &Reuse {
        &self.reuse
    }
}

selecting!(RecycledAttention, TokenLists, [Q, K, O] Qkv);
selecting!(RecycledAttention, TokenLists, caches);
reusing!(RecycledAttention);

exhibit! {
    RecycledExhibit of RecycledAttention, "sparse", "Recycled Attention", "arXiv 2411.05787";
    "a step on the 32 keys that the heads of a group attended to most in their last full step, causal";
    not "where what matters changes from token to token: a full step finds it only later";
    tokens false;
    build(_, _) { RecycledAttention::builder(32, 10).causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(RecycledAttention, RecycledExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Axis, s};

    use super::*;
    use crate::attention::{Attention, Reuses, Selects};
    use crate::dense::Dense;
    use crate::select::Reused;
    use crate::sparse::testing::{self, Arrays};

    fn recycled(k: usize, every: usize) -> RecycledAttention {
        RecycledAttention::builder(k, every).causal().build().unwrap()
    }

    #[test]
    fn identities() {
        testing::identities_of_causal(&recycled(1000, 1), &recycled(20, 1));
        testing::caches_are_arrays(&recycled(20, 1));
        testing::steps_are_their_definition(&recycled(20, 4));
        let turning = RecycledAttention::builder(20, 2).refresh_below(0.3).causal().build().unwrap();
        testing::steps_are_their_definition(&turning);
        testing::steps_of_caches_are_those_of_arrays(&recycled(20, 4));
    }

    /// With a full step each time, with a budget of all keys and with queries
    /// that have always turned away.
    #[test]
    fn all_that_is_full_is_dense() {
        let away = RecycledAttention::builder(9, 1).refresh_below(1.5).causal().build().unwrap();
        for recycled in [recycled(9, 1), recycled(1000, 5), away] {
            let (x, mut kept) = (Arrays::normal([2, 4, 2, 90, 90, 24, 12], 3), Reused::new());
            let dense = Dense::builder().causal().build().unwrap();
            for n in 60..90 {
                let x = testing::token(&x, n);
                testing::near("full", &recycled.step(x, &mut kept).unwrap(), &dense.forward(x).unwrap());
            }
        }
    }

    /// The same query again sees what a call by itself selects, and the new key;
    /// queries that never turn away never look again.
    #[test]
    fn a_recycled_step_is_on_what_was_selected() {
        let recycled = RecycledAttention::builder(20, 1).refresh_below(-1.0).causal().build().unwrap();
        let (mut x, mut kept) = (Arrays::normal([2, 4, 2, 90, 90, 24, 12], 4), Reused::new());
        let first = x.q.index_axis(Axis(2), 60).to_owned();
        recycled.step(testing::token(&x, 61), &mut kept).unwrap();
        let index = recycled.select(testing::token(&x, 61)).unwrap();
        for n in 61..90 {
            x.q.slice_mut(s![.., .., n, ..]).assign(&first);
            let out = recycled.step(testing::token(&x, n + 1), &mut kept).unwrap();
            assert_eq!(kept.selected_at(1), Some(61));
            // The keys of the list and those since, one after the other.
            for (b, h) in [(0, 0), (1, 3)] {
                let of = index.runs(b, h, 0).iter().flat_map(|run| run.range());
                let keys: Vec<usize> = of.chain(61..n + 1).collect();
                let row = |x: &ndarray::Array4<f32>| {
                    x.slice(s![b..b + 1, h / 2..h / 2 + 1, .., ..]).select(Axis(2), &keys)
                };
                let (k, v) = (row(&x.k), row(&x.v));
                let alone = Qkv::new(x.q.slice(s![b..b + 1, h..h + 1, n..n + 1, ..]), k.view(), v.view());
                let want = Dense::builder().build().unwrap().forward(alone).unwrap();
                testing::near("recycled", &out.slice(s![b..b + 1, h..h + 1, .., ..]).to_owned(), &want);
            }
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: RecycledBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(RecycledAttention::builder(0, 3)), "k: expected at least 1 key, got 0");
        assert_eq!(refusal(RecycledAttention::builder(3, 0)), "every: expected at least 1 step, got 0");
        assert!(refusal(RecycledAttention::builder(3, 3).refresh_below(f32::NAN)).starts_with("cosine: "));
        testing::steps_out_of_turn_are_refused(&recycled(9, 3));
    }
}
