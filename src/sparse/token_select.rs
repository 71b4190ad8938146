//! TokenSelect: all heads vote for one set of keys, which serves while queries stay
//! alike.

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

/// TokenSelect: all heads vote for one set of keys, which serves while queries stay
/// alike.
///
/// ```text
/// m_h = mean of the queries of head h in a chunk
/// c_j = sum_h softmax_j(m_h . k_j)        for keys j between sinks and the last ones
/// S   = the first sinks, the last local, and the k keys with the largest c_j
/// o_i = softmax attention of q_i on S up to its position
/// ```
///
/// Votes are of unscaled scores: see [`vote_scale`](TokenSelectBuilder::vote_scale).
/// In steps, `S` is kept while the mean queries of all heads, as one vector, have a
/// cosine of at least 0.9 with those that it was chosen for; `local` moves on, and
/// keys that leave it are not added. From "TokenSelect: Efficient Long-Context
/// Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache
/// Selection" (arXiv 2411.02886). Its code keeps keys without positions, rotates
/// chosen ones by their place in the set and shares heads out in turn; here
/// positions are those of the caller's rows, and neighbouring query heads share a
/// key/value head. No learned parameters.
///
/// Cost of a chunk: `2 head_dim` flops a key and query head for the votes, a read of
/// all keys, and `2 (head_dim + value_dim)` flops a pair of a query and a key of `S`;
/// of a step that reuses `S` the last alone.
///
/// ```
/// use attention_kernels::select::Reused;
/// use attention_kernels::sparse::TokenSelect;
/// use attention_kernels::{Qkv, Reuses};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 400, 16), |(_, h, i, c)| ((h + i * c) as f32 / 50.0).sin());
/// let select = TokenSelect::builder(64).sinks(4).local(32).chunk(1).build()?;
/// let mut kept = Reused::new();
/// for n in 300..310 {
///     let keys = x.slice(s![.., .., ..n, ..]);
///     let out = select.step(Qkv::new(x.slice(s![.., .., n - 1..n, ..]), keys, keys), &mut kept)?;
/// }
/// assert!(kept.selected_at(0) < Some(309), "queries are alike: not all of the steps have selected");
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenSelect {
    config: Config<Order, Plain>,
    k: usize,
    chunk: usize,
    forced: Forced,
    vote_scale: f32,
    reuse: Reuse,
}

/// Builds a [`TokenSelect`].
#[derive(Clone, Debug)]
pub struct TokenSelectBuilder {
    options: Options<Order, Plain>,
    k: usize,
    chunk: usize,
    sinks: usize,
    local: usize,
    vote_scale: f32,
    cosine: f32,
}

impl TokenSelect {
    /// `k` keys besides the first 128 and the last 512 of a chunk of 512 queries.
    /// Causal.
    pub fn builder(k: usize) -> TokenSelectBuilder {
        let options = Options::default();
        TokenSelectBuilder { options, k, chunk: 512, sinks: 128, local: 512, vote_scale: 1.0, cosine: 0.9 }
            .causal()
    }
}

sparse_options!(TokenSelectBuilder);

impl TokenSelectBuilder {
    /// Queries that share a set. Default: 512.
    pub fn chunk(self, queries: usize) -> Self {
        Self { chunk: queries, ..self }
    }

    /// Keys at the start that are always seen. Default: 128.
    pub fn sinks(self, keys: usize) -> Self {
        Self { sinks: keys, ..self }
    }

    /// Keys up to the last query of a chunk that are always seen: at least those of
    /// the chunk. Default: 512.
    pub fn local(self, keys: usize) -> Self {
        Self { local: keys, ..self }
    }

    /// The factor of scores in votes. Default: 1, as in the released code.
    pub fn vote_scale(self, scale: f32) -> Self {
        Self { vote_scale: scale, ..self }
    }

    /// The least cosine at which a step reuses a set. Default: 0.9; above 1 it
    /// never does, and from -1 down it always does.
    pub fn reuse_from(self, cosine: f32) -> Self {
        Self { cosine, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` or chunks of 0, fewer local keys than a chunk has,
    /// a cosine that is NaN and scales that are not finite, [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<TokenSelect> {
        let Self { options, k, chunk, sinks, local, vote_scale, cosine } = self;
        for (name, n, least) in [("k", k, 1), ("chunk", chunk, 1), ("local", local, chunk)] {
            if n < least {
                return Err(Error::value(name, format!("at least {least}"), n));
            }
        }
        if !vote_scale.is_finite() {
            return Err(Error::value("vote_scale", "a finite number", vote_scale));
        }
        let policy = Policy::CosineAtLeast { cosine, every: 1, per_head: false };
        policy.check()?;
        let all = sinks.saturating_add(local).saturating_add(k);
        let reuse = Reuse { policy, dense: false, tail: Tail::Local { local, all } };
        let forced = Forced { first: sinks, last: local, inside: false };
        Ok(TokenSelect { config: options.build()?, k, chunk, forced, vote_scale, reuse })
    }
}

impl Schemed for TokenSelect {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self, dims: &Dims) -> Scheme {
        Scheme {
            unit: 1,
            summary: Summary::First,
            per: Per::Sequence,
            q_block: self.chunk.min(dims.q_len.max(1)),
            shares: Some(self.vote_scale),
            reduce: Reduce::Votes,
            pick: Pick { rule: Rule::TopK(self.k), forced: self.forced },
            causal: true,
            scored: crate::select::Scored::Begun,
        }
    }

    fn score(&self, query: ArrayView1<'_, f64>, keys: ArrayView2<'_, f64>) -> f64 {
        dot(query, &keys)
    }
}

impl Reusing for TokenSelect {
    fn reuse(&self) -> &Reuse {
        &self.reuse
    }
}

selecting!(TokenSelect, TokenLists, [Q, K, O] Qkv);
selecting!(TokenSelect, TokenLists, caches);
reusing!(TokenSelect);

exhibit! {
    TokenSelectExhibit of TokenSelect, "sparse", "TokenSelect", "arXiv 2411.02886";
    "4 sinks, the last 16 keys and the 32 that all heads vote for with a query, causal";
    not "where heads look at different keys: they share one set";
    tokens false;
    build(_, _) { TokenSelect::builder(32).sinks(4).local(16).chunk(1) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(TokenSelect, TokenSelectExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Reuses, Selects};
    use crate::dense::Dense;
    use crate::select::Reused;
    use crate::sparse::TopK;
    use crate::sparse::testing::{self, Arrays};

    fn select(k: usize) -> TokenSelectBuilder {
        TokenSelect::builder(k).sinks(3).local(12).chunk(1)
    }

    #[test]
    fn identities() {
        let of = |k| select(k).build().unwrap();
        testing::identities_of_causal(&of(1000), &of(20));
        testing::all_keys_are_dense(&select(1000).chunk(7).build().unwrap(), true);
        testing::kept_mass_bounds_the_error(&select(20).chunk(12).build().unwrap(), true);
        testing::caches_are_arrays(&of(20));
        testing::steps_are_their_definition(&of(20));
        testing::steps_are_their_definition(&select(20).reuse_from(0.1).build().unwrap());
        testing::steps_of_caches_are_those_of_arrays(&select(20).reuse_from(0.1).build().unwrap());
    }

    /// A set has as many keys as there are, up to sinks, k and local; a chunk's
    /// later queries see no more of it than their positions let them.
    #[test]
    fn sets_have_their_sizes() {
        let x = Arrays::normal([2, 4, 2, 90, 90, 24, 12], 1);
        for chunk in [1, 8, 12] {
            let index = select(20).chunk(chunk).build().unwrap().select(x.qkv()).unwrap();
            for block in 0..90usize.div_ceil(chunk) {
                let seen = ((block + 1) * chunk).min(90);
                assert_eq!(index.keys(1, 3, block), seen.min(35));
                let runs = index.runs(0, 0, block);
                assert_eq!((runs[0].start, runs[runs.len() - 1].range().end), (0, seen));
            }
        }
    }

    /// The vote of one head is its scores; a chunk's is that of its mean query.
    #[test]
    fn one_head_chooses_its_highest_scores() {
        let x = Arrays::integers([2, 1, 1, 4, 80, 16, 8], 2);
        let alone = TokenSelect::builder(9).sinks(0).local(1).chunk(1).build().unwrap();
        let top = TopK::builder(9).build().unwrap();
        let (got, n) = (alone.select(x.qkv()).unwrap(), 80);
        let before = Qkv::new(
            x.q.view(),
            x.k.slice(ndarray::s![.., .., ..n - 1, ..]),
            x.v.slice(ndarray::s![.., .., ..n - 1, ..]),
        );
        let want = top.select(before).unwrap();
        for b in 0..2 {
            let keys = |index: &TokenLists| -> Vec<usize> {
                index.runs(b, 0, 3).iter().flat_map(|run| run.range()).collect()
            };
            assert_eq!(keys(&got)[..9], keys(&want)[..]);
        }
        let chunk = TokenSelect::builder(9).sinks(0).local(4).chunk(4).build().unwrap();
        let mean = x.q.mean_axis(ndarray::Axis(2)).unwrap().insert_axis(ndarray::Axis(2));
        let (got, want) = (chunk.select(x.qkv()).unwrap(), select(9).sinks(0).local(4).build().unwrap());
        let want = want.select(Qkv::new(mean.view(), x.k.view(), x.v.view())).unwrap();
        assert!((0..2).all(|b| got.runs(b, 0, 0) == want.runs(b, 0, 0)));
    }

    #[test]
    fn cosines_decide() {
        let x = Arrays::normal([1, 4, 2, 90, 90, 24, 12], 3);
        let dense = Dense::builder().causal().build().unwrap();
        for (cosine, at) in [(1.1, 90), (-1.0, 61)] {
            let (select, mut kept) = (select(20).reuse_from(cosine).build().unwrap(), Reused::new());
            for n in 30..91 {
                let x = testing::token(&x, n);
                let out = select.step(x, &mut kept).unwrap();
                if n <= 35 {
                    assert_eq!(kept.selected_at(0), None, "all keys fit");
                    testing::near("few keys", &out, &dense.forward(x).unwrap());
                } else if cosine > 1.0 {
                    testing::near("by itself", &out, &select.forward(x).unwrap());
                }
            }
            assert_eq!(kept.selected_at(0), Some(if at == 61 { 36 } else { at }));
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: TokenSelectBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(select(0)), "k: expected at least 1, got 0");
        assert_eq!(refusal(select(4).chunk(0)), "chunk: expected at least 1, got 0");
        assert_eq!(refusal(select(4).chunk(13)), "local: expected at least 13, got 12");
        assert!(refusal(select(4).vote_scale(f32::INFINITY)).starts_with("vote_scale: "));
        assert!(refusal(select(4).reuse_from(f32::NAN)).starts_with("cosine: "));
        testing::steps_out_of_turn_are_refused(&select(4).build().unwrap());
    }
}
