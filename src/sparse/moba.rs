//! MoBA: mixture of block attention.

use ndarray::{ArrayView1, ArrayView2};

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::{ATOM, BlockLists, Per};
use crate::score::Plain;
use crate::select::{Forced, Pick, Reduce, Rule, Scheme, Scored, Summary};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::selecting::{Schemed, selecting, sparse_options};

/// MoBA: mixture of block attention.
///
/// ```text
/// g_b = q_i . mean_{j in b} k_j             for blocks b before the query's own
/// S_i = the query's own block, and the k - 1 earlier ones with the largest g_b
/// o_i = softmax attention of q_i on the keys of S_i up to its position
/// ```
///
/// From "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv
/// 2502.13189); `k` counts the query's own block, as in its code. Each query head
/// routes by itself, with the means of its key/value head. No learned
/// parameters; causal.
///
/// Cost: `2 head_dim / block` flops a visible pair for the gate, `2 (head_dim +
/// value_dim)` a selected one.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::Moba};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let out = Moba::builder(3).block(128).build()?.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Moba {
    config: Config<Order, Plain>,
    block: usize,
    k: usize,
}

/// Builds a [`Moba`].
#[derive(Clone, Debug)]
pub struct MobaBuilder {
    options: Options<Order, Plain>,
    block: usize,
    k: usize,
}

impl Moba {
    /// `k` blocks a query, its own among them, of 512 keys.
    pub fn builder(k: usize) -> MobaBuilder {
        MobaBuilder { options: Options::default(), block: 512, k }.causal()
    }
}

sparse_options!(MobaBuilder);

impl MobaBuilder {
    /// Keys of a block: a multiple of 64.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` of 0, a block that is no multiple of 64 or a
    /// scale that is not finite, [`Error::Isa`] for an instruction set that the
    /// CPU lacks.
    pub fn build(self) -> Result<Moba> {
        if self.k == 0 {
            return Err(Error::value("k", "at least 1 block", 0));
        }
        if self.block == 0 || !self.block.is_multiple_of(ATOM) {
            return Err(Error::value("block", format!("a multiple of {ATOM} keys"), self.block));
        }
        Ok(Moba { config: self.options.build()?, block: self.block, k: self.k })
    }
}

impl Schemed for Moba {
    type Index = BlockLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self, _: &Dims) -> Scheme {
        Scheme {
            unit: self.block,
            summary: Summary::Mean,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(self.k), forced: Forced { first: 0, last: 1, inside: true } },
            causal: true,
            scored: Scored::Begun,
        }
    }

    fn score(&self, query: ArrayView1<'_, f64>, keys: ArrayView2<'_, f64>) -> f64 {
        query.iter().zip(keys.columns()).map(|(q, k)| q * k.sum() / k.len() as f64).sum()
    }
}

selecting!(Moba, BlockLists, [Q, K, O] Qkv);
selecting!(Moba, BlockLists, caches);

exhibit! {
    MobaExhibit of Moba, "sparse", "MoBA", "arXiv 2502.13189";
    "the query's own block of 64 keys and the earlier one whose mean key it scores highest";
    not "where the model was not trained with it: means hide single keys";
    tokens false;
    build(_, _) { Moba::builder(2).block(64) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Moba, MobaExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Axis, s};

    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::mask::{Causal, Mask, mask_fn};
    use crate::sparse::testing::{self, Arrays};

    #[test]
    fn identities() {
        let moba = |k| Moba::builder(k).block(64).build().unwrap();
        testing::identities_of_causal(&moba(10), &moba(2));
        testing::exact_scores_give_equal_lists(&moba(2));
        testing::caches_are_arrays(&moba(2));
    }

    #[test]
    fn one_block_is_the_query_s_own() {
        let x = Arrays::normal([2, 4, 2, 200, 260, 24, 12], 1);
        let own = mask_fn(|site, query, key| (query as isize + site.q_start()) as usize / 64 == key / 64);
        let want = Dense::builder().mask(own.and(Causal::new())).build().unwrap().forward(x.qkv()).unwrap();
        let got = Moba::builder(1).block(64).build().unwrap().forward(x.qkv()).unwrap();
        testing::near("own block", &got, &want);
    }

    /// Whole past blocks may change places.
    #[test]
    fn past_blocks_permute() {
        let mut x = Arrays::integers([1, 2, 1, 1, 256, 16, 8], 2);
        let moba = Moba::builder(2).block(64).build().unwrap();
        let before = moba.forward(x.qkv()).unwrap();
        let order: Vec<usize> = (128..192).chain(0..128).chain(192..256).collect();
        (x.k, x.v) = (x.k.select(Axis(2), &order), x.v.select(Axis(2), &order));
        testing::near("permuted", &moba.forward(x.qkv()).unwrap(), &before);
        assert_ne!(before, moba.forward(Arrays::integers([1, 2, 1, 1, 256, 16, 8], 3).qkv()).unwrap());
    }

    /// A NaN in a past block hides the block, as nothing else of it is known.
    #[test]
    fn a_block_with_a_nan_is_not_chosen() {
        let mut x = Arrays::normal([1, 1, 1, 10, 256, 16, 8], 2);
        x.k.slice_mut(s![.., .., 70, 3]).fill(f32::NAN);
        let out = Moba::builder(2).block(64).build().unwrap().forward(x.qkv()).unwrap();
        assert!(out.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn refusals() {
        let refusal = |builder: MobaBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Moba::builder(0)), "k: expected at least 1 block, got 0");
        assert_eq!(refusal(Moba::builder(2).block(96)), "block: expected a multiple of 64 keys, got 96");
    }
}
