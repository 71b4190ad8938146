//! DSA: DeepSeek sparse attention, with its lightning indexer.

use ndarray::{Array1, ArrayView1, Axis, s};

use crate::card::{Extras, carded, exhibit};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::keys::{Per, TokenLists};
use crate::score::Plain;
use crate::select::{Forced, IndexBranch, Indexed, Pick, Reduce, Rule, Scheme, Scored, Summary};
use crate::stages::attend::{Config, Options};
use crate::stages::codes;
use crate::stages::listed::Order;
use crate::stages::selecting::{Branched, selecting, sparse_options};

/// DSA: DeepSeek sparse attention, with its lightning indexer.
///
/// ```text
/// I_tj = sum_h w_th max(qI_th . kI_j, 0)            over the heads of the index
/// S_t  = the k keys j <= t with the largest I_tj, the lower one of equals
/// o_t  = softmax attention of q_t on the keys of S_t, the same for all heads
/// ```
///
/// From the report of DeepSeek-V3.2-Exp. The index is an [`IndexBranch`]: queries
/// `qI` of many heads, one key `kI` a token and weights `w`, after normalisation
/// and rotation and with constant factors in the weights. A rotation by Hadamard
/// changes no score, so it is left out.
///
/// Variants: GLM-5 lets layers share an index: [`select`](crate::Selects::select)
/// once, then [`forward_on`](crate::Selects::forward_on) in every layer.
/// GLM-5.3-Flash keeps one index key a pool of keys ([`pool`](DsaBuilder::pool));
/// whole pools are picked, `k / pool` of them, and the keys after the last whole
/// one come on top. LongCat forces sinks and a window, inside `k`.
///
/// DeepSeek keeps index keys in 8 bits with a scale a token, and rounds queries
/// likewise: [`int8`](DsaBuilder::int8) does, for any index keys, and reads those of a
/// cache in [`Int8`](crate::cache::Int8) as they lie. Whole numbers are then
/// multiplied where the CPU can (AVX-512 VNNI), exactly:
/// ```text
/// x' = s round(x / s),  s = max_c |x_c| / 127      x = qI_th, kI_j
/// ```
/// A score is off from that of exact numbers by at most
/// `sum_h |w_h| (s_k |qI_h|_1 + s_q |kI|_1 + D s_q s_k / 2) / 2`.
///
/// Over a latent cache, with absorbed queries, it is what DeepSeek runs: keys
/// are latents with rotary keys, values the latents.
///
/// Cost: `2 index_heads index_dim` flops a visible pair (or pool) for the index,
/// and `2 (head_dim + value_dim)` a selected one of each head. A step of
/// decoding reads the index keys once and `k` rows.
///
/// ```
/// use attention_kernels::select::{IndexBranch, Indexed};
/// use attention_kernels::{Attention, Qkv, Selects, sparse::Dsa};
/// use ndarray::{Array3, Array4, s};
///
/// let x = Array4::from_shape_fn((1, 4, 300, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let weights = Array3::<f32>::ones((1, 4, 300));
/// let branch = IndexBranch::new(x.view(), x.slice(s![.., ..1, .., ..])).weighted(weights.view());
/// let x = Indexed::new(Qkv::new(x.view(), x.view(), x.view()), branch);
/// let dsa = Dsa::builder(64).build()?;
/// let index = dsa.select(x)?;
/// assert_eq!(index.keys(0, 0, 299), 64);
/// let out = dsa.forward_on(x, &index)?; // and in the layers that share the index
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Dsa {
    config: Config<Order, Plain>,
    builder: DsaBuilder,
}

/// Builds a [`Dsa`].
#[derive(Clone, Debug)]
pub struct DsaBuilder {
    options: Options<Order, Plain>,
    k: usize,
    pool: usize,
    sink: usize,
    local: usize,
    int8: bool,
}

impl Dsa {
    /// `k` keys a query, causal.
    pub fn builder(k: usize) -> DsaBuilder {
        DsaBuilder { options: Options::default(), k, pool: 1, sink: 0, local: 0, int8: false }.causal()
    }
}

sparse_options!(DsaBuilder);

impl DsaBuilder {
    /// Keys that an index key stands for. Default: 1.
    pub fn pool(self, pool: usize) -> Self {
        Self { pool, ..self }
    }

    /// The first so many keys are always read, as some of the `k`. Default: 0.
    pub fn sink(self, sink: usize) -> Self {
        Self { sink, ..self }
    }

    /// The last so many keys up to the query likewise. Default: 0.
    pub fn local(self, local: usize) -> Self {
        Self { local, ..self }
    }

    /// Index queries and keys count as 8-bit codes, each row with a scale of its own.
    /// Default: as they are.
    pub fn int8(self) -> Self {
        Self { int8: true, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a pool of 0 keys, `k` less than a pool and a scale
    /// that is not finite, [`Error::Conflict`] for forced keys of pools,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Dsa> {
        let Self { k, pool, sink, local, .. } = self;
        if pool == 0 {
            return Err(Error::value("pool", "at least 1 key", 0));
        }
        if k < pool {
            return Err(Error::value("k", format!("at least a pool, {pool}"), k));
        }
        if pool > 1 && (sink > 0 || local > 0) {
            let reason = "whole pools are picked, and the keys after the last one are read in any case";
            return Err(Error::Conflict { option: "pool", with: "forced keys", reason });
        }
        Ok(Dsa { config: self.options.clone().build()?, builder: self })
    }
}

impl Branched for Dsa {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self) -> Scheme {
        let DsaBuilder { k, pool, sink, local, int8, .. } = self.builder;
        Scheme {
            unit: pool,
            summary: Summary::First,
            per: Per::Group,
            q_block: 1,
            shares: None,
            reduce: if int8 { Reduce::RectifiedCodes } else { Reduce::Rectified },
            pick: Pick {
                rule: Rule::TopK(k / pool),
                forced: Forced { first: sink, last: local, inside: true },
            },
            causal: self.config.mask().causal,
            scored: Scored::Whole,
        }
    }

    fn per(&self) -> Per {
        Per::Sequence
    }

    fn score(&self, query: ArrayView1<'_, f64>, weight: f64, key: ArrayView1<'_, f64>) -> f64 {
        let dot = |q: ArrayView1<'_, f64>, k: ArrayView1<'_, f64>| q.iter().zip(k).map(|(q, k)| q * k).sum();
        let dot: f64 =
            if self.builder.int8 { dot(coded(query).view(), coded(key).view()) } else { dot(query, key) };
        weight * if dot < 0.0 { 0.0 } else { dot }
    }
}

/// The numbers that the codes of a row stand for.
fn coded(x: ArrayView1<'_, f64>) -> Array1<f64> {
    codes::define(&x.insert_axis(Axis(0)).mapv(|x| x as f32)).index_axis_move(Axis(0), 0)
}

selecting!(Dsa, TokenLists, branches);

exhibit! {
    DsaExhibit of Dsa, "sparse", "DSA", "DeepSeek-V3.2-Exp";
    "the 32 keys to which a weighted, rectified index of many heads gives most, causal";
    not "without its trained index, and for short sequences: the index reads all keys";
    tokens false;
    build(_, _) { Dsa::builder(32) }
    extras(x, field) { Extras { betas: field.tokens(1, x, |x| 0.5 + x), ..Extras::default() } }
    input<'a, T>(x, extras) -> Indexed<'a, Qkv<'a, T>, T> {
        let keys = x.k.slice_move(s![.., ..x.k.dim().1.min(1), .., ..]);
        Indexed::new(x, IndexBranch::new(x.q, keys).weighted(extras.betas.view()))
    }
}
carded!(Dsa, DsaExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Array3, Array4, Axis};

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::cache::{Cached, Latent, Pages};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays, ByKeys};

    #[test]
    fn identities() {
        for (pool, sink, local) in [(1, 0, 0), (1, 3, 9), (4, 0, 0)] {
            let dsa = |k| {
                let dsa = Dsa::builder(k).pool(pool).sink(sink).local(local).build().unwrap();
                ByKeys { mechanism: dsa, pool, heads: Some(4) }
            };
            testing::all_keys_are_dense(&dsa(1000), true);
            testing::chunks_are_the_whole(&dsa(20));
            testing::last_row_is_decoding(&dsa(20));
            testing::never_ahead(&dsa(20));
            testing::kept_mass_bounds_the_error(&dsa(20), true);
            if pool == 1 {
                testing::exact_scores_give_equal_lists(&dsa(20));
            }
        }
        let int8 = |k| {
            let dsa = Dsa::builder(k).int8().build().unwrap();
            ByKeys { mechanism: dsa, pool: 1, heads: Some(4) }
        };
        testing::all_keys_are_dense(&int8(1000), true);
        testing::chunks_are_the_whole(&int8(20));
        testing::last_row_is_decoding(&int8(20));
        testing::never_ahead(&int8(20));
        testing::caches_are_arrays(&int8(20));
        for pool in [1, 4] {
            let mechanism = Dsa::builder(20).pool(pool).build().unwrap();
            testing::caches_are_arrays(&ByKeys { mechanism, pool, heads: Some(4) });
        }
        let whole = Dsa { config: Options::default().build().unwrap(), ..Dsa::builder(900).build().unwrap() };
        testing::all_keys_are_dense(&ByKeys { mechanism: whole, pool: 1, heads: Some(4) }, false);
    }

    /// Rectified scores are often exactly equal: the lowest keys are picked.
    #[test]
    fn scores_of_nothing_pick_the_lowest_keys() {
        let x = Arrays::normal([1, 4, 2, 1, 100, 16, 8], 1);
        let (q, k) = (Array4::<f32>::ones((1, 3, 1, 8)), Array4::<f32>::from_elem((1, 1, 100, 8), -1.0));
        let index = Dsa::builder(7)
            .build()
            .unwrap()
            .select(Indexed::new(x.qkv(), IndexBranch::new(q.view(), k.view())));
        assert_eq!(index.unwrap().runs(0, 3, 0), [crate::keys::Run { start: 0, len: 7 }]);
        // A negative weight makes large products bad ones.
        let k = Array4::from_shape_fn((1, 1, 100, 8), |(_, _, j, _)| (j % 10) as f32);
        let weights = Array3::from_elem((1, 3, 1), -1.0);
        let branch = IndexBranch::new(q.view(), k.view()).weighted(weights.view());
        let index = Dsa::builder(3).build().unwrap().select(Indexed::new(x.qkv(), branch)).unwrap();
        assert!([0, 10, 20].iter().all(|&j| index.visible(
            &crate::input::Site { batch: 0, head: 0, q_len: 1, kv_len: 100 },
            0,
            j
        )));
    }

    /// Keys are latents with rotary keys, values the latents, in pages; index
    /// keys lie in pages too, or in 8 bits.
    #[test]
    fn latent_caches_are_arrays() {
        let x = Arrays::integers([2, 4, 1, 3, 150, 24, 16], 3);
        let mut latents = Latent::paged::<f32>(16, 8, 2, Pages { count: 40, len: 16 }).unwrap();
        let mut keys = Latent::paged::<f32>(24, 0, 2, Pages { count: 40, len: 16 }).unwrap();
        for b in 0..2 {
            let rows = x.k.index_axis(Axis(0), b).index_axis_move(Axis(0), 0);
            latents.append(b, rows).unwrap();
            keys.append(b, rows).unwrap();
        }
        let v = x.k.slice(s![.., .., .., ..16]);
        let dsa = Dsa::builder(40).build().unwrap();
        let arrays =
            Indexed::new(Qkv::new(x.q.view(), x.k.view(), v), IndexBranch::new(x.q.view(), x.k.view()));
        let cached = |branch| Indexed::new(Cached::new(x.q.view(), &latents), branch);
        let want = (dsa.select(arrays).unwrap(), dsa.forward(arrays).unwrap());
        for branch in [IndexBranch::new(x.q.view(), x.k.view()), IndexBranch::cached(x.q.view(), &keys)] {
            assert_eq!(dsa.select(cached(branch)).unwrap(), want.0);
            assert_eq!(dsa.reference_select(cached(branch)).unwrap().0, want.0);
            testing::near("latents", &dsa.forward(cached(branch)).unwrap(), &want.1);
        }
        let dense = Dense::builder().causal().build().unwrap().forward(arrays.x).unwrap();
        let all = Dsa::builder(150).build().unwrap();
        testing::near("all", &all.forward(cached(IndexBranch::cached(x.q.view(), &keys))).unwrap(), &dense);
    }

    #[test]
    fn refusals() {
        let refusal = |builder: DsaBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Dsa::builder(0)), "k: expected at least a pool, 1, got 0");
        assert_eq!(refusal(Dsa::builder(8).pool(0)), "pool: expected at least 1 key, got 0");
        assert!(refusal(Dsa::builder(8).pool(4).sink(1)).starts_with("pool cannot be combined"));
        let dsa = Dsa::builder(8).build().unwrap();
        let x = Arrays::normal([1, 2, 1, 10, 20, 16, 8], 3);
        let refusal = |branch| dsa.forward(Indexed::new(x.qkv(), branch)).unwrap_err().to_string();
        let (few, other) = (x.k.slice(s![.., .., ..19, ..]), x.k.slice(s![.., .., .., ..8]));
        assert!(refusal(IndexBranch::new(x.q.view(), few)).starts_with("index k: expected 20 index keys"));
        assert!(refusal(IndexBranch::new(x.q.view(), other)).starts_with("index k: "));
        assert!(refusal(IndexBranch::new(x.k.view(), x.k.view())).starts_with("index q: "));
        let weights = Array3::ones((1, 1, 10));
        let branch = IndexBranch::new(x.q.view(), x.k.view()).weighted(weights.view());
        assert!(refusal(branch).starts_with("index weights: "));
    }
}
