//! QSA: groups of keys by a pooled, rectified index.

use ndarray::{Array1, ArrayView1, s};

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::keys::{Per, TokenLists};
use crate::math::rope::Rope;
use crate::score::Plain;
use crate::select::{Forced, IndexBranch, Indexed, Pick, Pooling, Reduce, Rule, Scheme, Scored, Summary};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::selecting::{Branched, selecting, sparse_options};

/// QSA: groups of keys by a pooled, rectified index.
///
/// ```text
/// I_tb = sum_h w_th max(qI_th . kI_b, 0)      groups b of 4 keys that t sees whole
/// S_t  = the k / 4 groups with the largest I_tb, the lower one of equals, and
///        the keys after the last whole group, up to t
/// o_t  = softmax attention of q_t on the keys of S_t, the same for all heads
/// ```
///
/// where `w_th` is 1, or the weight of an index head that the branch gives. From the code
/// of Qwen3.8-Flash-Next (`qwen4_exp`), which has none. An index key stands for a
/// group: the mean of its tokens' keys, then normalised, then rotated to the
/// group's first position, which [`Qsa::pooling`] makes, and continues while
/// decoding; index queries come normalised and rotated. A group that a query
/// has just completed competes with all others.
///
/// Cost: `2 index_heads index_dim / 4` flops a visible pair for the index, and `2
/// (head_dim + value_dim)` a selected one of each head. A step of decoding reads
/// `index_dim / 4` numbers a key, and `k` rows.
///
/// ```
/// use attention_kernels::math::rope::Rope;
/// use attention_kernels::select::{IndexBranch, Indexed};
/// use attention_kernels::{Attention, Qkv, sparse::Qsa};
/// use ndarray::{Array1, Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 203, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let raw = Array3::from_shape_fn((1, 203, 16), |(_, i, c)| ((i * (c + 1)) as f32).cos());
/// let qsa = Qsa::builder(64).build()?;
/// let pooling = qsa.pooling(Array1::ones(16), 1e-6, Rope::builder(8).theta(1e4).build()?)?;
/// let mut groups = pooling.start(1, 16)?;
/// pooling.extend(&mut groups, raw.view(), None)?;
/// let branch = IndexBranch::new(x.view(), groups.view());
/// let out = qsa.forward(Indexed::new(Qkv::new(x.view(), x.view(), x.view()), branch))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Qsa {
    config: Config<Order, Plain>,
    k: usize,
    group: usize,
}

/// Builds a [`Qsa`].
#[derive(Clone, Debug)]
pub struct QsaBuilder {
    options: Options<Order, Plain>,
    k: usize,
    group: usize,
}

impl Qsa {
    /// Groups of together `k` keys a query (2048 in the model), and the keys
    /// after them; causal.
    pub fn builder(k: usize) -> QsaBuilder {
        QsaBuilder { options: Options::default(), k, group: 4 }.causal()
    }

    /// How index keys of groups are made from those of tokens, with the weights
    /// of their normalisation.
    ///
    /// # Errors
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn pooling(&self, weight: Array1<f32>, epsilon: f32, rope: Rope) -> Result<Pooling> {
        Pooling::mean(self.group)?.norm(weight, epsilon).rope(rope).isa(self.config.isa())
    }
}

sparse_options!(QsaBuilder);

impl QsaBuilder {
    /// Keys of a group. Default: 4.
    pub fn group(self, group: usize) -> Self {
        Self { group, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a group of 0 keys, `k` that is no multiple of it or
    /// 0, or a scale that is not finite, [`Error::Isa`] for an instruction set
    /// that the CPU lacks.
    pub fn build(self) -> Result<Qsa> {
        let Self { options, k, group } = self;
        if group == 0 {
            return Err(Error::value("group", "at least 1 key", 0));
        }
        if k == 0 || !k.is_multiple_of(group) {
            return Err(Error::value("k", format!("a multiple of a group of {group} keys"), k));
        }
        Ok(Qsa { config: options.build()?, k, group })
    }
}

impl Branched for Qsa {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self) -> Scheme {
        Scheme {
            unit: self.group,
            summary: Summary::First,
            per: Per::Group,
            q_block: 1,
            shares: None,
            reduce: Reduce::Rectified,
            pick: Pick { rule: Rule::TopK(self.k / self.group), forced: Forced::default() },
            causal: self.config.mask().causal,
            scored: Scored::Whole,
        }
    }

    fn per(&self) -> Per {
        Per::Sequence
    }

    fn score(&self, query: ArrayView1<'_, f64>, weight: f64, key: ArrayView1<'_, f64>) -> f64 {
        let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
        weight * if dot < 0.0 { 0.0 } else { dot }
    }
}

selecting!(Qsa, TokenLists, branches);

exhibit! {
    QsaExhibit of Qsa, "sparse", "QSA", "Qwen3.8-Flash-Next";
    "the 8 groups of 4 keys with the largest rectified index, and the keys after the last group, causal";
    not "without its trained index, and for short sequences";
    tokens false;
    build(_, _) { Qsa::builder(32) }
    input<'a, T>(x, _) -> Indexed<'a, Qkv<'a, T>, T> {
        let keys = x.k.slice_move(s![.., ..x.k.dim().1.min(1), .., ..]);
        Indexed::new(x, IndexBranch::new(x.q, keys))
    }
}
carded!(Qsa, QsaExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Array3, Array4};

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::math::random::Normal;
    use crate::sparse::Dsa;
    use crate::sparse::testing::{self, Arrays, ByKeys};

    #[test]
    fn identities() {
        for group in [4, 1] {
            let qsa = |k| {
                let qsa = Qsa::builder(k).group(group).build().unwrap();
                ByKeys { mechanism: qsa, pool: group, heads: Some(4) }
            };
            testing::all_keys_are_dense(&qsa(1000), true);
            testing::chunks_are_the_whole(&qsa(20));
            testing::last_row_is_decoding(&qsa(20));
            testing::never_ahead(&qsa(20));
            testing::kept_mass_bounds_the_error(&qsa(20), true);
            testing::caches_are_arrays(&qsa(20));
        }
    }

    /// It is DSA with pools, without weights.
    #[test]
    fn without_weights_it_is_pooled_dsa() {
        let x = Arrays::integers([2, 4, 2, 40, 203, 16, 8], 1);
        let branch = IndexBranch::new(x.q.view(), x.k.slice(s![.., ..1, .., ..]));
        let x = Indexed::new(x.qkv(), branch);
        let (qsa, dsa) = (Qsa::builder(20).build().unwrap(), Dsa::builder(20).pool(4).build().unwrap());
        let index = qsa.select(x).unwrap();
        assert_eq!(index, dsa.select(x).unwrap());
        // The keys after the last whole group come on top.
        for i in 0..40 {
            let (seen, whole) = (164 + i, (164 + i) / 4 * 4);
            let tail = if seen > whole { 4.min(203 - whole) } else { 0 };
            assert_eq!(index.keys(0, 0, i), 20 + tail, "{i}");
        }
        let out = qsa.reference_on(x, &index).unwrap();
        assert!(out.iter().all(|x| x.is_finite()));
    }

    /// All products below 0: the lowest groups, and the tail.
    #[test]
    fn scores_of_nothing_pick_the_lowest_groups() {
        let x = Arrays::normal([1, 2, 1, 1, 102, 16, 8], 1);
        let (q, k) = (Array4::<f32>::ones((1, 3, 1, 8)), Array4::<f32>::from_elem((1, 1, 25, 8), -1.0));
        let branch = IndexBranch::new(q.view(), k.view());
        let index = Qsa::builder(8).build().unwrap().select(Indexed::new(x.qkv(), branch)).unwrap();
        let runs: Vec<_> = index.runs(0, 1, 0).iter().map(|run| run.range()).collect();
        assert_eq!(runs, [0..8, 100..102]);
    }

    /// Shifted by as many tokens as a group has, the rotated index is the same.
    #[test]
    fn positions_count_as_differences() {
        let (len, dim) = (80, 16);
        let mut random = Normal::new(5);
        let raw = Array3::from_shape_simple_fn((1, len, dim), || random.next().unwrap() as f32);
        let q = Array4::from_shape_simple_fn((1, 3, 1, dim), || random.next().unwrap() as f32);
        let rope = Rope::builder(8).theta(100.0).build().unwrap();
        let x = Arrays::normal([1, 2, 1, 1, len, dim, 8], 1);
        let qsa = Qsa::builder(16).build().unwrap();
        let groups = |shift: usize| {
            let rope = rope.clone();
            let pooling = qsa.pooling(Array1::from_elem(dim, 0.5), 1e-6, rope).unwrap();
            let mut pools = pooling.start(1, dim).unwrap();
            pooling.extend(&mut pools, Array3::zeros((1, shift, dim)).view(), None).unwrap();
            pooling.extend(&mut pools, raw.view(), None).unwrap();
            pools.view().slice(s![.., .., shift / 4.., ..]).to_owned()
        };
        let select = |shift: usize| {
            let mut q = q.clone();
            let angles: Vec<_> =
                rope.angles((len - 1 + shift) as f64).flat_map(|(s, c)| [s as f32, c as f32]).collect();
            q.rows_mut().into_iter().for_each(|mut row| rope.turn(&angles, row.as_slice_mut().unwrap()));
            let groups = groups(shift);
            qsa.select(Indexed::new(x.qkv(), IndexBranch::new(q.view(), groups.view()))).unwrap()
        };
        assert_eq!(select(0), select(40));
    }

    #[test]
    fn refusals() {
        let refusal = |builder: QsaBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Qsa::builder(0)), "k: expected a multiple of a group of 4 keys, got 0");
        assert_eq!(refusal(Qsa::builder(6)), "k: expected a multiple of a group of 4 keys, got 6");
        assert_eq!(refusal(Qsa::builder(6).group(0)), "group: expected at least 1 key, got 0");
        let x = Arrays::normal([1, 2, 1, 10, 20, 16, 8], 3);
        let branch = IndexBranch::new(x.q.view(), x.k.slice(s![.., .., ..4, ..]));
        let refused = Qsa::builder(8).build().unwrap().forward(Indexed::new(x.qkv(), branch)).unwrap_err();
        assert!(refused.to_string().starts_with("index k: expected 5 index keys"), "{refused}");
    }
}
