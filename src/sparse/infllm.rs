//! InfLLM-V2: blocks by pooled keys, without parameters.

use ndarray::{ArrayView1, ArrayView2};

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::{ATOM, BlockLists, Per};
use crate::score::Plain;
use crate::select::{
    Fold, Forced, Pick, Pools, Reduce, Rule, Scheme, Scored, Summarised, Summary, kept_summaries,
};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::selecting::{Schemed, selecting, sparse_options};

/// InfLLM-V2: blocks by pooled keys, without parameters.
///
/// ```text
/// fine_w = mean of keys 16 w .. 16 w + 32,   coarse_u = mean of keys 64 u .. 64 u + 128
/// p_w = sum_h exp(scale q_h . fine_w) / sum_u exp(scale q_h . coarse_u)     h in a group
/// score of block b = max of p_w over the fine pools that share keys with it
/// S_t = the first block, the query's own and the 32 before it, and those with
///       the highest scores, 96 together
/// o_t = softmax attention of q_t on the keys of S_t up to its position
/// ```
///
/// where a query sees pools of which it sees every key. `p_w` is no
/// probability, for its normaliser is an estimate on a coarser grid. From
/// "InfLLM-V2: Dense-Sparse Switchable Attention" (arXiv 2509.24663) and the code
/// of MiniCPM4. That code ranks blocks after the query too, with a score of 0,
/// and drops them later; here they are never ranked. And where it switches by the
/// length of the sequence, [`dense_below`](InfLlmBuilder::dense_below) goes by a
/// query's position, so that nothing depends on later keys.
///
/// Cost: `2 head_dim / 16` flops a visible pair for the scores, of which those of
/// pools are means; `2 (head_dim + value_dim)` a selected pair. With kept
/// [`Summaries`](crate::select::Summaries) a step of decoding reads `1 / 16` of the keys and the blocks.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::InfLlm};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 900, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let infllm = InfLlm::builder(8).local(2).dense_below(0).build()?;
/// let out = infllm.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct InfLlm {
    config: Config<Order, Plain>,
    k: usize,
    first: usize,
    local: usize,
    dense: usize,
    exact: bool,
}

/// Builds an [`InfLlm`].
#[derive(Clone, Debug)]
pub struct InfLlmBuilder {
    options: Options<Order, Plain>,
    k: usize,
    first: usize,
    local: usize,
    dense: usize,
    exact: bool,
}

/// Keys of a block, and from one fine pool to the next.
const BLOCK: usize = ATOM;
const STRIDE: usize = 16;

impl InfLlm {
    /// `k` blocks of 64 keys a query, those that are always read among them (96
    /// in MiniCPM4); causal.
    pub fn builder(k: usize) -> InfLlmBuilder {
        let options = Options::default();
        InfLlmBuilder { options, k, first: 1, local: 33, dense: 8192, exact: false }.causal()
    }
}

kept_summaries!(InfLlm, Summary::Mean, |_| STRIDE);
sparse_options!(InfLlmBuilder);

impl InfLlmBuilder {
    /// The first so many blocks are always read. Default: 1.
    pub fn first(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// So are the query's own and those before it, so many together. Default: 33.
    pub fn local(self, local: usize) -> Self {
        Self { local, ..self }
    }

    /// A query that sees fewer keys than these reads all. Default: 8192.
    pub fn dense_below(self, keys: usize) -> Self {
        Self { dense: keys, ..self }
    }

    /// Normalises over the fine pools themselves, so that `p_w` of a head sum to
    /// 1. Default: over coarse ones.
    pub fn exact(self) -> Self {
        Self { exact: true, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` of 0 or a scale that is not finite,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<InfLlm> {
        let Self { options, k, first, local, dense, exact } = self;
        if k == 0 {
            return Err(Error::value("k", "at least 1 block", 0));
        }
        Ok(InfLlm { config: options.build()?, k, first, local, dense, exact })
    }
}

impl Schemed for InfLlm {
    type Index = BlockLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self, dims: &Dims) -> Scheme {
        let coarse = (!self.exact).then_some([8 * STRIDE, 4 * STRIDE]);
        Scheme {
            unit: BLOCK,
            summary: Summary::Mean,
            per: Per::Group,
            q_block: 1,
            shares: Some(self.config.scale(dims) as f32),
            reduce: Reduce::Sum,
            pick: Pick {
                rule: Rule::TopK(self.k),
                forced: Forced { first: self.first, last: self.local, inside: true },
            },
            causal: self.config.mask().causal,
            scored: Scored::Pools(Pools {
                width: 2 * STRIDE,
                stride: STRIDE,
                fold: Fold::Max,
                coarse,
                dense: self.dense,
            }),
        }
    }

    fn score(&self, query: ArrayView1<'_, f64>, keys: ArrayView2<'_, f64>) -> f64 {
        query.iter().zip(keys.columns()).map(|(q, k)| q * k.sum() / k.len() as f64).sum()
    }
}

selecting!(InfLlm, BlockLists, [Q, K, O] Qkv);
selecting!(InfLlm, BlockLists, caches);
selecting!(InfLlm, BlockLists, summarised caches);
selecting!(InfLlm, BlockLists, [Q, K, O] Summarised);

exhibit! {
    InfLlmExhibit of InfLlm, "sparse", "InfLLM-V2", "arXiv 2509.24663";
    "the first block of 64 keys, the query's own and the one whose pooled keys it scores highest";
    not "below some thousand keys, and where single keys decide: means hide them";
    tokens false;
    build(_, _) { InfLlm::builder(3).local(1).dense_below(0) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(InfLlm, InfLlmExhibit);

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::sparse::testing::{self, Arrays};

    fn infllm(k: usize) -> InfLlmBuilder {
        InfLlm::builder(k).local(1).dense_below(0)
    }

    #[test]
    fn identities() {
        testing::all_keys_are_dense(&infllm(100).build().unwrap(), true);
        testing::all_keys_are_dense(&InfLlm::builder(1).build().unwrap(), true);
        for builder in [infllm(2), infllm(2).exact(), infllm(3).first(0).dense_below(150)] {
            let infllm = builder.build().unwrap();
            testing::chunks_are_the_whole(&infllm);
            testing::last_row_is_decoding(&infllm);
            testing::never_ahead(&infllm);
            testing::kept_mass_bounds_the_error(&infllm, true);
            testing::caches_are_arrays(&infllm);
            testing::heads_permute(&infllm);
        }
    }

    /// Of a query that is 0 all scores are equal: the lowest blocks are read.
    #[test]
    fn equal_scores_read_the_lowest_blocks() {
        let mut x = Arrays::normal([1, 4, 2, 1, 1000, 16, 8], 1);
        x.q.fill(0.0);
        let index = infllm(4).build().unwrap().select(x.qkv()).unwrap();
        assert_eq!(index.atoms(0, 0, 0), [0, 1, 2, 15]);
        let index = InfLlm::builder(6).local(3).dense_below(0).build().unwrap().select(x.qkv()).unwrap();
        assert_eq!(index.atoms(0, 3, 0), [0, 1, 2, 13, 14, 15]);
    }

    /// Before a query sees a coarse pool, and before it sees any.
    #[test]
    fn without_pools_the_lowest_blocks_are_read() {
        let x = Arrays::normal([1, 4, 2, 300, 300, 16, 8], 2);
        let index = infllm(2).build().unwrap().select(x.qkv()).unwrap();
        assert_eq!(index.atoms(0, 0, 20), [0]);
        assert_eq!(index.atoms(0, 0, 100), [0, 1]);
        let (want, margins) = infllm(3).build().unwrap().reference_select(x.qkv()).unwrap();
        let got = infllm(3).build().unwrap().select(x.qkv()).unwrap();
        assert_eq!(<InfLlm as Selects<Qkv<'_, f32>>>::difference(&got, &want, &margins), None);
    }

    #[test]
    fn kept_summaries_select_the_same() {
        let x = Arrays::normal([2, 4, 2, 1, 500, 24, 8], 9);
        let infllm = infllm(3).build().unwrap();
        let cut =
            |n: usize| Qkv::new(x.q.view(), x.k.slice(s![.., .., ..n, ..]), x.v.slice(s![.., .., ..n, ..]));
        let mut kept = infllm.summaries(cut(1)).unwrap();
        for n in [20, 33, 400, 499, 500] {
            infllm.extend(&mut kept, cut(n)).unwrap();
            let with = Summarised::new(cut(n), &kept);
            assert_eq!(infllm.select(with).unwrap(), infllm.select(cut(n)).unwrap());
            assert_eq!(infllm.forward(with).unwrap(), infllm.forward(cut(n)).unwrap());
        }
    }

    #[test]
    fn refusals() {
        let refused = InfLlm::builder(0).build().unwrap_err().to_string();
        assert_eq!(refused, "k: expected at least 1 block, got 0");
    }
}
