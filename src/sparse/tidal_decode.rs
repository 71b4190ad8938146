//! TidalDecode: two layers of a decoding step choose the keys for those after them.

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

/// TidalDecode: two layers of a decoding step choose the keys for those after them.
///
/// ```text
/// layers before the first that selects   o_h = softmax attention of q_h on all keys
/// layers that select                     likewise, and
///                                        S_h = the k keys with the largest q_h . k_j,
///                                              the lower one of equals
/// layers after them                      o_h = softmax attention of q_h on the last S_h
/// ```
///
/// From "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse
/// Attention" (arXiv 2410.05076). Each query head has its own set unless
/// [`per`](TidalBuilder::per) says otherwise; then a key counts with its largest
/// score. The token of the step competes like the others: see
/// [`force_last`](TidalBuilder::force_last). Prompts are for dense attention. No
/// learned parameters.
///
/// Cost of a step: `2 (head_dim + value_dim)` flops a key for a dense layer, `2
/// head_dim` more for one that selects, `2 k (head_dim + value_dim)` for another,
/// which reads `k` keys and values.
///
/// ```
/// use attention_kernels::select::Reused;
/// use attention_kernels::sparse::TidalDecode;
/// use attention_kernels::{Qkv, Reuses};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 300, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let tidal = TidalDecode::builder(64, 8).selecting(&[2, 5]).build()?;
/// let mut kept = Reused::new();
/// for n in [299, 300] {
///     let keys = x.slice(s![.., .., ..n, ..]);
///     for layer in 0..8 { // of which each has its own queries, keys and values
///         let out = tidal.step(Qkv::new(x.slice(s![.., .., n - 1..n, ..]), keys, keys), &mut kept)?;
///     }
/// }
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TidalDecode {
    config: Config<Order, Plain>,
    k: usize,
    per: Per,
    last: bool,
    reuse: Reuse,
}

/// Builds a [`TidalDecode`].
#[derive(Clone, Debug)]
pub struct TidalBuilder {
    options: Options<Order, Plain>,
    k: usize,
    per: Per,
    last: bool,
    layers: usize,
    selecting: Vec<usize>,
}

impl TidalDecode {
    /// `k` keys in most of `layers`, which layers 2 and 13 choose, those that there
    /// are.
    pub fn builder(k: usize, layers: usize) -> TidalBuilder {
        let selecting = [2, 13].into_iter().filter(|&layer| layer < layers).collect();
        TidalBuilder { options: Options::default(), k, per: Per::Head, last: false, layers, selecting }
    }
}

sparse_options!(TidalBuilder);

impl TidalBuilder {
    /// The layers that select, counted from 0, ascending: all before the first are
    /// dense.
    pub fn selecting(self, layers: &[usize]) -> Self {
        Self { selecting: layers.to_vec(), ..self }
    }

    /// Which heads share keys. Default: each query head has its own.
    pub fn per(self, per: Per) -> Self {
        Self { per, ..self }
    }

    /// The last key that a query sees is one of the `k`. Default: only if it is.
    pub fn force_last(self) -> Self {
        Self { last: true, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` of 0, layers that select which do not ascend, do not
    /// exist or are none, and a scale that is not finite; [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<TidalDecode> {
        let Self { options, k, per, last, layers, selecting } = self;
        if k == 0 {
            return Err(Error::value("k", "at least 1 key", 0));
        }
        let policy = Policy::PerLayerPlan { layers, selecting };
        policy.check()?;
        let reuse = Reuse { policy, dense: true, tail: Tail::Nothing };
        Ok(TidalDecode { config: options.build()?, k, per, last, reuse })
    }
}

impl Schemed for TidalDecode {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn scheme(&self, _: &Dims) -> Scheme {
        let forced = Forced { first: 0, last: usize::from(self.last), inside: true };
        Scheme {
            unit: 1,
            summary: Summary::First,
            per: self.per,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(self.k), forced },
            causal: self.config.mask().causal,
            scored: crate::select::Scored::Begun,
        }
    }

    fn score(&self, query: ArrayView1<'_, f64>, keys: ArrayView2<'_, f64>) -> f64 {
        dot(query, &keys)
    }
}

impl Reusing for TidalDecode {
    fn reuse(&self) -> &Reuse {
        &self.reuse
    }
}

selecting!(TidalDecode, TokenLists, [Q, K, O] Qkv);
selecting!(TidalDecode, TokenLists, caches);
reusing!(TidalDecode);

exhibit! {
    TidalExhibit of TidalDecode, "sparse", "TidalDecode", "arXiv 2410.05076";
    "a layer on the 32 keys with the highest scores in an earlier layer, its last key among them, causal";
    not "where layers look at different keys: those between two selections see what the first one saw";
    tokens false;
    build(_, _) { TidalDecode::builder(32, 32).force_last().causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(TidalDecode, TidalExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Reuses, Selects};
    use crate::dense::Dense;
    use crate::select::Reused;
    use crate::sparse::TopK;
    use crate::sparse::testing::{self, Arrays};

    fn tidal(k: usize) -> TidalBuilder {
        TidalDecode::builder(k, 6).selecting(&[1, 3]).causal()
    }

    #[test]
    fn identities() {
        let force = |k| tidal(k).force_last().per(Per::Group).build().unwrap();
        testing::identities_of_causal(&force(1000), &force(20));
        testing::exact_scores_give_equal_lists(&force(20));
    }

    /// Layers with queries, keys and values of their own, over two steps.
    #[test]
    fn layers_see_what_the_last_selection_chose() {
        let layers: Vec<_> = (0..6).map(|i| Arrays::integers([2, 4, 2, 90, 90, 24, 12], i)).collect();
        let (dense, top) =
            (Dense::builder().causal().build().unwrap(), TopK::builder(9).causal().build().unwrap());
        for (k, per) in [(9, Per::Head), (9, Per::Group), (1000, Per::Head)] {
            let (tidal, mut kept) = (tidal(k).per(per).build().unwrap(), Reused::new());
            for n in 60..63 {
                let mut index = None;
                for (layer, x) in layers.iter().enumerate() {
                    let x = testing::token(x, n);
                    let (want, next) = tidal.reference_step(x, &kept).unwrap();
                    let out = tidal.step(x, &mut kept).unwrap();
                    assert_eq!(kept, next, "layer {layer}");
                    testing::near("definition", &out, &want.mapv(|x| x as f32));
                    if [1, 3].contains(&layer) {
                        index = Some(tidal.select(x).unwrap());
                    }
                    let dense = dense.forward(x).unwrap();
                    match &index {
                        Some(index) if ![1, 3].contains(&layer) => {
                            assert!(k == 1000 || out != dense);
                            testing::near("sparse", &out, &tidal.forward_on(x, index).unwrap());
                        }
                        _ => testing::near("dense", &out, &dense),
                    }
                    if k == 1000 {
                        testing::near("all keys", &out, &dense);
                    } else if per == Per::Head {
                        assert_eq!(tidal.select(x).unwrap(), top.select(x).unwrap());
                    }
                }
            }
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: TidalBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(tidal(0)), "k: expected at least 1 key, got 0");
        assert!(
            refusal(tidal(1).selecting(&[3, 1])).starts_with("selecting: expected some of the layers 0..6")
        );
        assert!(refusal(TidalDecode::builder(4, 2)).starts_with("selecting: "), "too few layers");
        // A key more in the middle of a step, and none more at the next.
        let (x, mut kept) = (Arrays::normal([1, 2, 1, 20, 20, 8, 8], 1), Reused::new());
        let tidal = tidal(4).build().unwrap();
        for _ in 0..6 {
            tidal.step(testing::token(&x, 10), &mut kept).unwrap();
            let before = kept.clone();
            let wrong = if kept.calls() == 6 { 10 } else { 11 };
            let refusal = tidal.step(testing::token(&x, wrong), &mut kept).unwrap_err().to_string();
            assert!(refusal.starts_with("reused: expected ["), "{refusal}");
            assert_eq!(kept, before);
        }
        tidal.step(testing::token(&x, 11), &mut kept).unwrap();
    }
}
