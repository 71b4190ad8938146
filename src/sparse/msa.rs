//! MSA: MiniMax sparse attention.

use ndarray::{ArrayView1, s};

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::{ATOM, BlockLists, Per};
use crate::score::Plain;
use crate::select::{Fold, Forced, IndexBranch, Indexed, Pick, Pools, Reduce, Rule, Scheme, Scored, Summary};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::selecting::{Branched, selecting, sparse_options};

/// MSA: MiniMax sparse attention.
///
/// ```text
/// B_tb = max_{j in block b, j <= t} qI_th . kI_j       index head h of a group
/// S_t  = the query's own block and those with the largest B_tb, k together
/// o_t  = softmax attention of q_t on the keys of S_t up to its position
/// ```
///
/// From MiniMax-M3 (arXiv 2606.13392). The index is an [`IndexBranch`] of one
/// head a key/value head and one key a token, after normalisation and rotation:
/// its scores have neither a factor nor weights. The query heads of a
/// key/value head share their blocks.
///
/// Cost: `2 index_dim` flops a visible pair of each key/value head for the
/// index, of which only the maxima of blocks are kept; `2 (head_dim +
/// value_dim)` a selected pair. A step of decoding reads the index keys once,
/// and `k` blocks.
///
/// ```
/// use attention_kernels::select::{IndexBranch, Indexed};
/// use attention_kernels::{Attention, Qkv, sparse::Msa};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 4, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let (k, v) = (x.slice(s![.., ..2, .., ..]), x.slice(s![.., 2.., .., ..]));
/// let branch = IndexBranch::new(k, x.slice(s![.., ..1, .., ..]));
/// let out = Msa::builder(3).build()?.forward(Indexed::new(Qkv::new(x.view(), k, v), branch))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Msa {
    config: Config<Order, Plain>,
    k: usize,
    block: usize,
    first: usize,
    local: usize,
}

/// Builds an [`Msa`].
#[derive(Clone, Debug)]
pub struct MsaBuilder {
    options: Options<Order, Plain>,
    k: usize,
    block: usize,
    first: usize,
    local: usize,
}

impl Msa {
    /// `k` blocks a query, its own among them, of 128 keys; causal.
    pub fn builder(k: usize) -> MsaBuilder {
        MsaBuilder { options: Options::default(), k, block: 128, first: 0, local: 1 }.causal()
    }
}

sparse_options!(MsaBuilder);

impl MsaBuilder {
    /// Keys of a block: a multiple of 64.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// The first so many blocks are always read, as some of the `k`. Default: 0.
    pub fn first(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// The query's own block and those before it, so many together, likewise.
    /// Default: 1.
    pub fn local(self, local: usize) -> Self {
        Self { local, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` of 0, a block that is no multiple of 64 or a
    /// scale that is not finite, [`Error::Isa`] for an instruction set that the
    /// CPU lacks.
    pub fn build(self) -> Result<Msa> {
        let Self { options, k, block, first, local } = self;
        if k == 0 {
            return Err(Error::value("k", "at least 1 block", 0));
        }
        if block == 0 || !block.is_multiple_of(ATOM) {
            return Err(Error::value("block", format!("a multiple of {ATOM} keys"), block));
        }
        Ok(Msa { config: options.build()?, k, block, first, local })
    }
}

impl Branched for Msa {
    type Index = BlockLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self) -> Scheme {
        Scheme {
            unit: self.block,
            summary: Summary::First,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick {
                rule: Rule::TopK(self.k),
                forced: Forced { first: self.first, last: self.local, inside: true },
            },
            causal: self.config.mask().causal,
            scored: Scored::Pools(Pools { width: 1, stride: 1, fold: Fold::Max, coarse: None, dense: 0 }),
        }
    }

    fn per(&self) -> Per {
        Per::Group
    }

    fn check(&self, dims: &Dims, heads: usize) -> Result<()> {
        if heads == dims.kv_heads {
            return Ok(());
        }
        Err(Error::value(
            "index q",
            format!("a head for each of the {} key/value heads", dims.kv_heads),
            heads,
        ))
    }

    fn score(&self, query: ArrayView1<'_, f64>, _: f64, key: ArrayView1<'_, f64>) -> f64 {
        query.iter().zip(key).map(|(q, k)| q * k).sum()
    }
}

selecting!(Msa, BlockLists, branches);

exhibit! {
    MsaExhibit of Msa, "sparse", "MSA", "arXiv 2606.13392";
    "the query's own block of 64 keys and the one that holds the key with the highest index score";
    not "without its trained index, and below some thousand keys";
    tokens false;
    build(_, _) { Msa::builder(2).block(64) }
    input<'a, T>(x, _) -> Indexed<'a, Qkv<'a, T>, T> {
        let heads = x.k.dim().1.min(x.q.dim().1);
        let (queries, keys) = (s![.., ..heads, .., ..], s![.., ..x.k.dim().1.min(1), .., ..]);
        Indexed::new(x, IndexBranch::new(x.q.slice_move(queries), x.k.slice_move(keys)))
    }
}
carded!(Msa, MsaExhibit);

#[cfg(test)]
mod tests {
    use ndarray::Axis;

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays, ByKeys};

    fn by_keys(builder: MsaBuilder) -> ByKeys<Msa> {
        ByKeys { mechanism: builder.block(64).build().unwrap(), pool: 1, heads: None }
    }

    #[test]
    fn identities() {
        for (first, local) in [(0, 1), (1, 2)] {
            let msa = |k| by_keys(Msa::builder(k).first(first).local(local));
            testing::all_keys_are_dense(&msa(10), true);
            testing::chunks_are_the_whole(&msa(2));
            testing::last_row_is_decoding(&msa(2));
            testing::never_ahead(&msa(2));
            testing::exact_scores_give_equal_lists(&msa(2));
        }
        testing::kept_mass_bounds_the_error(&by_keys(Msa::builder(2)), true);
        testing::caches_are_arrays(&ByKeys { heads: Some(2), ..by_keys(Msa::builder(2)) });
    }

    /// A block's score is the largest of its visible keys' products: that of
    /// the whole matrix, block by block.
    #[test]
    fn blocks_with_the_best_key_are_read() {
        let x = Arrays::integers([1, 2, 2, 30, 300, 16, 8], 1);
        let branch = IndexBranch::new(x.q.view(), x.k.slice(s![.., ..1, .., ..]));
        let index = Msa::builder(1).local(0).block(64).build().unwrap();
        let index = index.select(Indexed::new(x.qkv(), branch)).unwrap();
        for (h, i) in (0..2usize).flat_map(|h| (0..30usize).map(move |i| (h, i))) {
            let score = |j: usize| (0..16).map(|c| x.q[[0, h, i, c]] * x.k[[0, 0, j, c]]).sum::<f32>();
            let best = (1..=270 + i).fold(0, |best, j| if score(j) > score(best) { j } else { best });
            assert_eq!(index.atoms(0, h, i), [best as u32 / 64]);
        }
    }

    /// Keys of a whole past block may change places, with index keys and values.
    #[test]
    fn keys_of_a_past_block_permute() {
        let x = Arrays::integers([1, 4, 1, 20, 256, 16, 8], 2);
        let order: Vec<usize> = (0..64).rev().chain(64..256).collect();
        let permuted =
            Arrays { q: x.q.clone(), k: x.k.select(Axis(2), &order), v: x.v.select(Axis(2), &order) };
        let msa = by_keys(Msa::builder(3));
        let [a, b] = [&x, &permuted].map(|x| (msa.select(x.qkv()).unwrap(), msa.forward(x.qkv()).unwrap()));
        assert_eq!(a.0, b.0);
        testing::near("permuted", &b.1, &a.1);
        let dense = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        assert_ne!(dense, a.1);
    }

    #[test]
    fn refusals() {
        let refusal = |builder: MsaBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Msa::builder(0)), "k: expected at least 1 block, got 0");
        assert_eq!(refusal(Msa::builder(2).block(96)), "block: expected a multiple of 64 keys, got 96");
        let x = Arrays::normal([1, 4, 2, 10, 20, 16, 8], 3);
        let branch = IndexBranch::new(x.q.view(), x.k.slice(s![.., ..1, .., ..]));
        let refused = Msa::builder(2).build().unwrap().forward(Indexed::new(x.qkv(), branch)).unwrap_err();
        assert_eq!(refused.to_string(), "index q: expected a head for each of the 2 key/value heads, got 4");
    }
}
