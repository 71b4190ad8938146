//! EcoFormer: linear attention whose weights count equal bits of hash codes.
//!
//! ```text
//! w_ij = bits + 1 + h(q_i) . h(k_j) = 2 bits + 1 - 2 hamming(h(q_i), h(k_j))
//! o_i  = sum_j w_ij v_j / sum_j w_ij                                                    Paper
//! o_i  = (sum_j (h(q_i) . h(k_j)) v_j + (bits + 1) v_i) / sum_j w_ij                    Released
//! ```
//!
//! "EcoFormer: Energy-Saving Attention with Linear Complexity" (arXiv
//! 2209.09004). Queries and keys are hashed by a learned kernel hash into
//! codes of some bits, 16 in the paper, which shares one projection between
//! them: give the same array as `q` and `k`. [`HashSigns`] has the formula of
//! a code.
//!
//! The kernel's variance is the mean of the squared distances of all keys of a
//! sequence to all anchors, unless it is given. Causal attention must be given
//! one, or a token would depend on later ones; give one too where a state is
//! carried from call to call, or each call hashes with its own.
//!
//! The second formula is that of the authors' code; [`EcoFormerVariant`] says which to
//! use when. It gives `bits + 1` to the query's own value alone, but divides by
//! as much for every key: weights do not sum to 1, those of other keys may be
//! negative, and a token that is like no other comes out near 0.
//!
//! Cost: `4 (bits + 1) (value_dim + 1)` flops a token and head, `32 (bits +
//! value_dim)` more where it is causal, and `2 anchors (head_dim + bits)` for
//! each code. The saving in energy that the paper is about, signs instead of
//! products, is one of hardware; here the products are those of other linear
//! attention, with few features. Weights differ by a factor of `2 bits + 1` at
//! most: no key can stand out more.

use ndarray::{Array2, Array3, ArrayView4, s};

use crate::card::{carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::{Normaliser, Spec};
use crate::error::{Error, Result};
use crate::input::state::State;
use crate::input::tokens::{self, Tokens};
use crate::input::{Input, Qkv, Sequence};
use crate::math::features::{FeatureMap, HashSigns};
use crate::simd::mem::{Parts, bytes_for, claim_words};
use crate::stages::linear::{self, Memory, Weighed};
use crate::stages::map;
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;

/// Which of the two formulas that EcoFormer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EcoFormerVariant {
    /// The paper's: a mean of the values with positive weights that sum to 1.
    /// For what is trained with this crate, and for other keys than queries.
    #[default]
    Paper,
    /// That of the authors' code (`linear_attention_bias`), for models that were
    /// trained with it. Queries and keys are of the same tokens. The code knows
    /// no causal attention; here its sums, and the number of keys, are then
    /// those up to the query's own token.
    Released,
}

/// EcoFormer attention.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{EcoFormer, EcoFormerVariant}};
/// use ndarray::{Array2, Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let anchors = Array3::from_shape_fn((2, 25, 32), |(h, r, c)| ((h + 3 * r + c) as f32).cos() * 0.2);
/// let weights = Array3::from_shape_fn((2, 16, 25), |(h, b, r)| ((h + 5 * b * r) as f32).sin());
/// let mean = Array2::from_elem((2, 25), 0.6);
/// let builder = EcoFormer::builder(anchors, weights, mean);
/// let out = builder.clone().build()?.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 2, 50, 32));
///
/// // A model that was trained with the authors' code.
/// let released = builder.variant(EcoFormerVariant::Released).build()?;
/// let other = released.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_ne!(out, other);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EcoFormer {
    config: Config,
    /// What is made of queries, and of keys.
    query: HashSigns,
    key: HashSigns,
    causal: bool,
    variant: EcoFormerVariant,
    /// Whether the variance of the hash is given.
    fixed: bool,
}

impl EcoFormer {
    /// The hash of each head: anchors `[heads, anchors, head_dim]`, weights
    /// `[heads, bits, anchors]` and means of the kernel `[heads, anchors]`.
    /// Everything is visible.
    pub fn builder(anchors: Array3<f32>, weights: Array3<f32>, mean: Array2<f32>) -> EcoFormerBuilder {
        EcoFormerBuilder::with(anchors, weights, mean)
    }
}

options! {
    /// Builds an [`EcoFormer`].
    EcoFormerBuilder of EcoFormer, form;
    given { anchors: Array3<f32>; weights: Array3<f32>; mean: Array2<f32>; }
    own {
        variance: Option<f32> = None;
        variant: EcoFormerVariant = EcoFormerVariant::default();
    }
    flags {
        /// Queries see the keys at their own position and before; queries and
        /// keys are of the same tokens. Needs a [`variance`](Self::variance).
        causal;
    }
    build(builder, config) {
        let EcoFormerBuilder { anchors, weights, mean, variance, variant, causal, .. } = builder;
        if causal && variance.is_none() {
            let reason = "the variance of later keys would change the codes of earlier ones";
            return Err(Error::Conflict { option: "causal", with: "a variance from the keys", reason });
        }
        let hash = HashSigns::new(anchors, weights, mean, variance.unwrap_or(0.0))?;
        let (query, key) = match variant {
            EcoFormerVariant::Paper => (hash.clone(), hash),
            // Keys are counted, and weigh what their codes do.
            EcoFormerVariant::Released => (hash.with_last(0.0), hash.with_last(1.0)),
        };
        Ok(EcoFormer { config, query, key, causal, variant, fixed: variance.is_some() })
    }
}

impl EcoFormerBuilder {
    /// The variance of the kernel, instead of one from the keys of each
    /// sequence.
    pub fn variance(self, variance: f32) -> Self {
        Self { variance: Some(variance), ..self }
    }

    /// Which formula. With [`EcoFormerVariant::Released`] each query needs a
    /// value of its own: other numbers of keys than of queries, and lengths of
    /// padded keys, are refused.
    pub fn variant(self, variant: EcoFormerVariant) -> Self {
        Self { variant, ..self }
    }
}

impl EcoFormer {
    fn spec<'a, T: Element>(&self, x: &Qkv<'a, T>, state: Option<&State>) -> Result<Spec<'a>> {
        let tokens = self.causal || self.variant == EcoFormerVariant::Released;
        let dims = if tokens { x.token_dims()? } else { Input::dims(x)? };
        self.key.check(dims.q_heads, dims.head_dim)?;
        let normaliser = Some(match self.variant {
            EcoFormerVariant::Paper => Normaliser::Sum { epsilon: 0.0 },
            EcoFormerVariant::Released => Normaliser::Shares { share: (self.key.bits() + 1) as f32 },
        });
        let of = (dims, x.lengths);
        let spec = linear::spec(&self.config, of, self.key.bits() + 1, self.causal, normaliser);
        state.map_or(Ok(()), |state| state.check(spec.state_shape()))?;
        Ok(spec)
    }

    fn empty<T: Element>(&self, x: &Qkv<'_, T>) -> Result<State> {
        State::zeros(self.spec(x, None)?.state_shape())
    }

    /// The variance for a head of a sequence: the mean of the squared distances
    /// of its keys, made unit vectors, to the anchors.
    fn variance<T: Element>(&self, x: &Qkv<'_, T>, sequence: &Sequence, head: usize) -> f32 {
        let own = head / (tokens::heads(x) / x.k.dim().1);
        let keys = x.k.slice(s![sequence.batch, own, sequence.keys.clone(), ..]);
        self.key.spread(head, keys.outer_iter().map(|key| key.iter().map(|x| x.to_f64()).collect()))
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for EcoFormer {
    type State = State;

    fn flow(
        &self,
        x: Qkv<'_, T>,
        state: Option<&mut State>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let spec = self.spec(&x, state.as_deref())?;
        let (isa, dims, heads, lengths) = (self.config.isa, spec.dims, spec.dims.q_heads, x.lengths);
        let units = if self.fixed { 0 } else { dims.batch * heads };
        let variances = pass.take(units)?;
        pass.stage(
            || 0,
            bytes_for::<u64>(claim_words(units)),
            |mut arena| {
                let to = Parts::new(&mut *variances, 1, arena.take(claim_words(units)));
                parallel::for_each(
                    parallel::threads(),
                    units,
                    |_| (),
                    |(), unit| {
                        let sequence = lengths.sequence(&dims, unit / heads);
                        to.take(unit).fill(self.variance(&x, &sequence, unit % heads));
                    },
                );
            },
        );
        let variances = &*variances;
        let mut codes =
            |x: ArrayView4<'_, T>, hash: &HashSigns, of: fn(Sequence) -> std::ops::Range<usize>| {
                map::map(pass, isa, (x, heads, spec.state_dim), |b, h, rows, run| {
                    for (i, rows) in map::sequences((dims, lengths), b, rows, of) {
                        match variances.get(i * heads + h) {
                            Some(&variance) => run(&hash.with_variance(variance), rows),
                            None => run(hash, rows),
                        }
                    }
                })
            };
        let q = codes(x.q.reborrow(), &self.query, |sequence| sequence.queries)?;
        let k = codes(x.k.reborrow(), &self.key, |sequence| sequence.keys)?;
        let source = Weighed::new([q.view(), k.view()], x.v.reborrow(), dims, [&[], &[]]);
        linear::run(pass, &spec, &source, state.map(State::as_mut_slice), out);
        Ok(())
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, state: Option<&State>) -> Result<Defined<R, State>> {
        let spec = self.spec(&x, state)?;
        let mut state = state.map_or_else(|| State::zeros(spec.state_shape()), |state| Ok(state.clone()))?;
        let out = of_heads(&spec.dims, &x.lengths, |head| {
            let (i, h) = (head.sequence, head.head);
            let hash = |hash: &HashSigns| match self.fixed {
                true => hash.clone(),
                false => hash.with_variance(self.variance(&x, &x.lengths.sequence(&spec.dims, i), h)),
            };
            let q = head.features::<R, T>(&hash(&self.query), &x.q, &head.queries);
            let k = head.features::<R, T>(&hash(&self.key), &x.k, &head.keys);
            let (v, share) = (head.rows(&x.v, &head.keys), R::of((self.key.bits() + 1) as f64));
            linear::on_state(&mut state, [i, h], |memory: &mut Memory<R>| {
                memory.define([&q, &k, &v], self.causal, |memory, t, q| match self.variant {
                    EcoFormerVariant::Paper => memory.mean(q, |_| R::of(0.0), R::of(0.0)),
                    EcoFormerVariant::Released => {
                        memory.mean(q, |c| share * v[[t, c]], share * memory.count())
                    }
                })
            })
        });
        Ok((out, state))
    }
}

composite!(EcoFormer, Qkv, state State);

exhibit! {
    EcoFormerExhibit of EcoFormer, "linear", "EcoFormer", "arXiv 2209.09004";
    "weights count equal bits of hash codes";
    not "on hardware whose multiplications cost what additions cost: accuracy is given up for nothing";
    tokens false;
    build(x, field) {
        {
            let (_, heads, _, dim) = x.q.dim();
            let anchors = Array3::from_shape_fn((heads, 5, dim), |(h, r, c)| field.at(1, h, r, c));
            let weights = Array3::from_shape_fn((heads, 8, 5), |(h, b, r)| field.at(2, h, b, r));
            EcoFormer::builder(anchors, weights, Array2::from_elem((heads, 5), 0.5)).variance(1.0)
        }
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(EcoFormer, EcoFormerExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::Form;
    use crate::math::random::Normal;
    use crate::simd::Isa;
    use crate::testing::qkv::{Qkvs, close, cuts, held};
    use crate::{Attention, Bounded, Recurrent};
    use ndarray::Array4;

    const BITS: usize = 16;
    const ANCHORS: usize = 25;
    const VARIANTS: [EcoFormerVariant; 2] = [EcoFormerVariant::Paper, EcoFormerVariant::Released];

    fn builder(variant: EcoFormerVariant, heads: usize, dim: usize) -> EcoFormerBuilder {
        let mut normal = Normal::new(11);
        let mut next = || normal.next().unwrap() as f32;
        let anchors = Array3::from_shape_simple_fn((heads, ANCHORS, dim), || next() / (dim as f32).sqrt());
        let weights = Array3::from_shape_simple_fn((heads, BITS, ANCHORS), &mut next);
        let mean = Array2::from_shape_simple_fn((heads, ANCHORS), || 0.6 + 0.02 * next());
        EcoFormer::builder(anchors, weights, mean).variant(variant)
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        for variant in VARIANTS {
            let mut worst = 0f64;
            // Sums in the first and in the last column of a panel, and alone in one.
            for (len, value_dim) in [(1, 15), (9, 16), (70, 31), (197, 64), (197, 0), (64, 20)] {
                let x = Qkvs::new([1, 4, 2, len, len, 16, value_dim], 1);
                for isa in Isa::available() {
                    let make = || builder(variant, 4, 16).isa(isa);
                    worst = worst.max(held(&make().build().unwrap(), x.qkv()));
                    for form in [Form::Chunked, Form::Recurrent] {
                        let causal = make().causal().variance(1.9).form(form).build().unwrap();
                        worst = worst.max(held(&causal, x.qkv()));
                    }
                }
            }
            // Sequences each with their own variance and number of keys.
            let (x, offsets) = (Qkvs::new([1, 2, 1, 200, 200, 33, 8], 2), [0, 0, 5, 130, 200]);
            worst = worst
                .max(held(&builder(variant, 2, 33).build().unwrap(), x.qkv().packed(&offsets, &offsets)));
            println!("{variant:?}: {worst:.3} of the bound");
            let x = Qkvs::new([1, 2, 1, 150, 150, 16, 16], 6);
            cuts(
                &builder(variant, 2, 16).causal().variance(2.0).build().unwrap(),
                &x,
                &[0, 1, 2, 66, 66, 150],
            );
        }
        let x = Qkvs::new([1, 2, 1, 200, 120, 33, 8], 2);
        let paper = builder(EcoFormerVariant::Paper, 2, 33).build().unwrap();
        held(&paper, x.qkv().packed(&[0, 100, 200], &[0, 5, 120]));
        held(&paper, Qkvs::new([2, 2, 2, 7, 90, 33, 8], 2).qkv().key_lengths(&[40, 90]));
    }

    #[test]
    fn weights_count_equal_bits() {
        let x = Qkvs::new([1, 2, 2, 30, 30, 8, 5], 3);
        for (causal, variant) in [false, true].into_iter().flat_map(|c| VARIANTS.map(|v| (c, v))) {
            let make = || builder(variant, 2, 8);
            let EcoFormerBuilder { anchors, weights, mean, .. } = make();
            let ecoformer = if causal { make().causal().variance(1.7) } else { make() };
            let out = ecoformer.build().unwrap().reference(x.qkv()).unwrap();
            let mut want = Array4::<f64>::zeros(out.dim());
            for h in 0..2 {
                // All distances, one by one.
                let distances = |x: &Array4<f32>| {
                    Array2::from_shape_fn((30, ANCHORS), |(t, r)| {
                        let row: ndarray::Array1<f64> = x.slice(s![0, h, t, ..]).mapv(f64::from);
                        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                        (0..8).map(|c| (row[c] / norm - f64::from(anchors[[h, r, c]])).powi(2)).sum::<f64>()
                    })
                };
                let variance = if causal { f64::from(1.7f32) } else { distances(&x.k).mean().unwrap() };
                let codes = |x: &Array4<f32>| -> Vec<u32> {
                    let kappa = distances(x).mapv(|d| (-d / (2.0 * variance)).exp());
                    let bit = |t: usize, b: usize| {
                        let of =
                            |r| f64::from(weights[[h, b, r]]) * (kappa[[t, r]] - f64::from(mean[[h, r]]));
                        u32::from((0..ANCHORS).map(of).sum::<f64>() > 0.0) << b
                    };
                    (0..30).map(|t| (0..BITS).map(|b| bit(t, b)).sum()).collect()
                };
                let (q, k) = (codes(&x.q), codes(&x.k));
                for (i, c) in (0..30).flat_map(|i| (0..5).map(move |c| (i, c))) {
                    let keys = if causal { i + 1 } else { 30 };
                    let weight = |j: usize| f64::from(2 * BITS as u32 + 1 - 2 * (q[i] ^ k[j]).count_ones());
                    // The released code gives what every key has to the query's own.
                    let of_value = |j: usize| match variant {
                        EcoFormerVariant::Released if j != i => weight(j) - (BITS as f64 + 1.0),
                        _ => weight(j),
                    };
                    let sum: f64 = (0..keys).map(|j| of_value(j) * f64::from(x.v[[0, h, j, c]])).sum();
                    want[[0, h, i, c]] = sum / (0..keys).map(weight).sum::<f64>();
                }
            }
            close(&out, &want, 1e-12);
        }
    }

    #[test]
    fn codes_depend_on_directions_alone() {
        let x = Qkvs::new([1, 2, 2, 40, 40, 8, 5], 4);
        let longer = Qkvs { q: &x.q * 8.0, k: &x.k * 0.25, v: x.v.clone() };
        let [paper, released] = VARIANTS.map(|variant| builder(variant, 2, 8).build().unwrap());
        assert_eq!(paper.forward(x.qkv()).unwrap(), paper.forward(longer.qkv()).unwrap());
        // Tokens that are all the same get the mean of the values, and zeros
        // are as good as others; as released, of all equal bits, and their own.
        for fill in [0.0, 1.5] {
            let same = Qkvs { q: &x.q * 0.0 + fill, k: &x.k * 0.0 + fill, v: x.v.clone() };
            let outs = [&paper, &released].map(|of| of.forward(same.qkv()).unwrap());
            for ((_, h, t, c), v) in x.v.indexed_iter() {
                let (mean, bits) = (x.v.slice(s![0, h, .., c]).mean().unwrap(), BITS as f32);
                assert!((outs[0][[0, h, t, c]] - mean).abs() < 1e-6);
                let want = (bits * mean + (bits + 1.0) * v / 40.0) / (2.0 * bits + 1.0);
                assert!((outs[1][[0, h, t, c]] - want).abs() < 1e-6);
            }
        }
        for variant in VARIANTS {
            let mut x = x.clone();
            x.k.slice_mut(s![.., .., 36, 2]).fill(f32::NAN);
            let causal = builder(variant, 2, 8).causal().variance(1.9).build().unwrap();
            for ((_, _, t, _), x) in causal.forward(x.qkv()).unwrap().indexed_iter() {
                assert_eq!(x.is_nan(), t >= 36, "token {t}");
            }
        }
    }

    #[test]
    fn released_counts_the_keys_of_earlier_calls() {
        let x = Qkvs::new([1, 2, 1, 150, 150, 16, 8], 10);
        let ecoformer = builder(EcoFormerVariant::Released, 2, 16).variance(1.9).build().unwrap();
        let mut state = ecoformer.initial_state(x.qkv()).unwrap();
        ecoformer.prefill(x.slice(0..70, 0..70).qkv(), &mut state).unwrap();
        // A state can be saved. Later queries see all keys, as in one call.
        let mut state = State::new(state.into_inner()).unwrap();
        let out = ecoformer.prefill(x.slice(70..150, 70..150).qkv(), &mut state).unwrap();
        let (want, bound) = (ecoformer.reference(x.qkv()).unwrap(), ecoformer.error_bound(x.qkv()).unwrap());
        for ((b, h, t, c), &got) in out.indexed_iter() {
            assert!((f64::from(got) - want[[b, h, 70 + t, c]]).abs() <= bound[[b, h, 70 + t]], "token {t}");
        }
        assert_eq!(state.view()[[0, 1, BITS, 8]], 150.0);
    }

    #[test]
    fn refusals() {
        let [paper, released] = VARIANTS.map(|variant| move |heads| builder(variant, heads, 8));
        let error = |builder: EcoFormerBuilder| builder.build().unwrap_err().to_string();
        assert!(
            error(paper(1).causal()).starts_with("causal cannot be combined with a variance from the keys")
        );
        assert_eq!(
            error(paper(1).variance(-1.0)),
            "variance: expected a finite number of at least 0, got -1"
        );
        let odd = EcoFormerBuilder { mean: Array2::zeros((2, 24)), ..paper(2) };
        assert_eq!(error(odd), "mean: expected shape [heads, anchors] = [2, 25], got [2, 24]");
        let x = Qkvs::new([1, 1, 1, 3, 3, 8, 5], 7);
        let error = paper(2).build().unwrap().forward(x.qkv()).unwrap_err().to_string();
        assert_eq!(error, "anchors: expected shape [heads, anchors, head_dim] = [1, _, 8], got [2, 25, 8]");
        // Queries without values of their own.
        let error = |x: Qkv<'_, f32>| released(1).build().unwrap().forward(x).unwrap_err().to_string();
        assert!(error(Qkvs::new([1, 1, 1, 2, 3, 8, 5], 7).qkv()).starts_with("k: expected shape"));
        assert!(error(x.qkv().key_lengths(&[2])).starts_with("key_lengths cannot be combined"));
        assert!(error(x.qkv().packed(&[0, 1, 3], &[0, 2, 3])).starts_with("keys: expected the offsets"));
    }
}
