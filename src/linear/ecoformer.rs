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

use ndarray::{Array2, Array3, s};

use crate::card::{carded, exhibit};
use crate::definition::recurrence::Token;
use crate::element::Element;
use crate::engine::recur::{Arrays, Keys, Normaliser, Place, Source, Spec, copy_rows};
use crate::error::{Error, Result};
use crate::input::tokens::token_dims;
use crate::input::{Lengths, Qkv};
use crate::math::features::{FeatureMap, HashSigns};
use crate::simd::Isa;
use crate::stages::mapped::{Mapped, MappedArrays};
use crate::stages::recur::{Config, Options, linear_options};
use crate::stages::recur::{Recurrence, recurrent};

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

/// Builds an [`EcoFormer`].
#[derive(Clone, Debug)]
pub struct EcoFormerBuilder {
    options: Options,
    anchors: Array3<f32>,
    weights: Array3<f32>,
    mean: Array2<f32>,
    causal: bool,
    variance: Option<f32>,
    variant: EcoFormerVariant,
}

impl EcoFormer {
    /// The hash of each head: anchors `[heads, anchors, head_dim]`, weights
    /// `[heads, bits, anchors]` and means of the kernel `[heads, anchors]`.
    /// Everything is visible.
    pub fn builder(anchors: Array3<f32>, weights: Array3<f32>, mean: Array2<f32>) -> EcoFormerBuilder {
        let options = Options::default();
        let (causal, variance, variant) = (false, None, EcoFormerVariant::default());
        EcoFormerBuilder { options, anchors, weights, mean, causal, variance, variant }
    }
}

linear_options!(EcoFormerBuilder);

impl EcoFormerBuilder {
    /// Queries see the keys at their own position and before; queries and
    /// keys are of the same tokens. Needs a [`variance`](Self::variance).
    pub fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    /// The variance of the kernel, instead of one from the keys of each
    /// sequence.
    pub fn variance(mut self, variance: f32) -> Self {
        self.variance = Some(variance);
        self
    }

    /// Which formula. Default: [`EcoFormerVariant::Paper`]. With [`EcoFormerVariant::Released`]
    /// each query needs a value of its own: other numbers of keys than of
    /// queries, and lengths of padded keys, are refused.
    pub fn variant(mut self, variant: EcoFormerVariant) -> Self {
        self.variant = variant;
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Shape`] for parameters that do not agree, [`Error::Value`] for
    /// numbers that are not finite and a negative variance,
    /// [`Error::Conflict`] for causal attention without a variance,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<EcoFormer> {
        if self.causal && self.variance.is_none() {
            let reason = "the variance of later keys would change the codes of earlier ones";
            return Err(Error::Conflict { option: "causal", with: "a variance from the keys", reason });
        }
        let variance = self.variance.unwrap_or(0.0);
        let hash = HashSigns::new(self.anchors, self.weights, self.mean, variance)?;
        let (query, key) = match self.variant {
            EcoFormerVariant::Paper => (hash.clone(), hash),
            // Keys are counted, and weigh what their codes do.
            EcoFormerVariant::Released => (hash.with_last(0.0), hash.with_last(1.0)),
        };
        Ok(EcoFormer {
            config: self.options.build()?,
            query,
            key,
            causal: self.causal,
            variant: self.variant,
            fixed: self.variance.is_some(),
        })
    }
}

impl EcoFormer {
    fn mapped<'a>(&'a self, query: &'a HashSigns, key: &'a HashSigns) -> Mapped<'a> {
        let normaliser = Some(match self.variant {
            EcoFormerVariant::Paper => Normaliser::Sum { epsilon: 0.0 },
            EcoFormerVariant::Released => Normaliser::Shares { share: (self.key.bits() + 1) as f32 },
        });
        Mapped { config: &self.config, query, key, causal: self.causal, normaliser }
    }

    /// The mean of the squared distances of the keys of a sequence, made unit
    /// vectors, to the anchors of a head of `heads`.
    fn variance<T: Element>(&self, x: &Qkv<'_, T>, sequence: usize, head: usize, heads: usize) -> f32 {
        let Ok(dims) = x.dims() else { return 0.0 };
        let sequence = x.lengths.sequence(&dims, sequence);
        let place = Place::new(&sequence, head, sequence.keys.clone());
        let kv_head = place.head_of(x.k.dim().1, heads);
        let mut sum = 0.0;
        for t in sequence.keys.clone() {
            // |z - a|^2 = |z|^2 - 2 z.a + |a|^2
            let key = x.k.slice(s![sequence.batch, kv_head, t, ..]);
            let norm = key.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>().sqrt();
            if norm != 0.0 {
                sum += 1.0 - 2.0 * self.key.with_centre(head, key.iter().map(|x| x.to_f64() / norm));
            }
        }
        (sum / sequence.keys.len().max(1) as f64 + self.key.mean_square(head)).max(0.0) as f32
    }

    /// A hash with the variance of a sequence and head.
    fn hash<T: Element>(&self, of: &HashSigns, x: &Qkv<'_, T>, sequence: usize, head: usize) -> HashSigns {
        if self.fixed {
            return of.clone();
        }
        of.with_variance(self.variance(x, sequence, head, x.q.dim().1))
    }
}

/// The sequence that token `t` on the axis with these offsets belongs to.
fn sequence_of(offsets: &[usize], t: usize) -> usize {
    offsets.partition_point(|&offset| offset <= t).saturating_sub(1).min(offsets.len().saturating_sub(2))
}

/// The same for queries and for keys at a place.
fn sequences_of(lengths: &Lengths<'_>, at: &Place) -> (usize, usize) {
    match lengths {
        Lengths::Full | Lengths::Keys(_) => (at.batch, at.batch),
        Lengths::Packed { queries, keys } => {
            (sequence_of(queries, at.tokens.start), sequence_of(keys, at.tokens.start))
        }
    }
}

/// Hashes with the variances of sequences and heads.
struct Hashed<'a> {
    arrays: Arrays<'a>,
    head_dim: usize,
    lengths: Lengths<'a>,
    query: &'a HashSigns,
    key: &'a HashSigns,
    /// `[sequences, heads]`
    variances: &'a [f32],
}

impl Hashed<'_> {
    /// Operands with the hash of a sequence.
    fn with<R>(&self, sequence: usize, head: usize, run: impl FnOnce(&dyn Source) -> R) -> R {
        let variance = self.variances[sequence * self.arrays.heads + head];
        let (query, key) = (self.query.with_variance(variance), self.key.with_variance(variance));
        let (query, key): (&dyn FeatureMap, &dyn FeatureMap) = (&query, &key);
        run(&MappedArrays { arrays: self.arrays, head_dim: self.head_dim, query, key })
    }
}

impl Source for Hashed<'_> {
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        let (sequence, _) = sequences_of(&self.lengths, at);
        self.with(sequence, at.head, |source| source.queries(isa, at, to, stride));
    }

    fn keys(&self, isa: Isa, at: &Place, to: Keys<'_>) {
        let (_, sequence) = sequences_of(&self.lengths, at);
        self.with(sequence, at.head, |source| source.keys(isa, at, to));
    }

    fn values(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        copy_rows(isa, self.arrays.rows(self.arrays.v, at), to, stride);
    }
}

recurrent!(EcoFormer, Qkv);

impl Recurrence for EcoFormer {
    type Operands<'a, T: Element> = Qkv<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a Qkv<'_, T>) -> Arrays<'a> {
        Arrays::new(&x.reborrow(), x.q.dim().1)
    }

    fn spec<'a, T: Element>(&'a self, x: &'a Qkv<'_, T>) -> Result<Spec<'a>> {
        if self.variant == EcoFormerVariant::Released {
            token_dims(x)?;
        }
        self.mapped(&self.query, &self.key).spec(x)
    }

    fn with_source<T: Element, R>(&self, x: &Qkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        run(&self.mapped(&self.query, &self.key).source(x))
    }

    fn scratch<T: Element>(&self, x: &Qkv<'_, T>) -> usize {
        match x.dims() {
            Ok(dims) if !self.fixed => dims.batch * dims.q_heads,
            _ => 0,
        }
    }

    fn with_scratch<T: Element, R>(
        &self,
        x: &Qkv<'_, T>,
        scratch: &mut [f32],
        run: impl FnOnce(&dyn Source) -> R,
    ) -> R {
        if self.fixed {
            return self.with_source(x, run);
        }
        let heads = x.q.dim().1;
        for (unit, variance) in scratch.iter_mut().enumerate() {
            *variance = self.variance(x, unit / heads, unit % heads, heads);
        }
        run(&Hashed {
            arrays: Arrays::new(&x.reborrow(), heads),
            head_dim: x.q.dim().3,
            lengths: x.lengths,
            query: &self.query,
            key: &self.key,
            variances: scratch,
        })
    }

    fn token<T: Element>(&self, x: &Qkv<'_, T>, at: &Place) -> Token {
        let (query, key) = sequences_of(&x.lengths, at);
        let query = self.hash(&self.query, x, query, at.head);
        let key = self.hash(&self.key, x, key, at.head);
        self.mapped(&query, &key).token(x, at)
    }

    fn bytes<T: Element>(&self, x: &Qkv<'_, T>) -> usize {
        (x.q.len() + x.k.len() + x.v.len()) * size_of::<T>()
    }
}

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
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}
carded!(EcoFormer, EcoFormerExhibit);

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::linear::Form;
    use crate::math::random::Normal;
    use crate::testing::LENGTHS;
    use crate::testing::qkv::{Qkvs, close, cuts, held};
    use crate::{Attention, Bounded, Recurrent};

    const BITS: usize = 16;
    const ANCHORS: usize = 25;

    fn builder(heads: usize, dim: usize) -> EcoFormerBuilder {
        let mut normal = Normal::new(11);
        let mut next = || normal.next().unwrap() as f32;
        let anchors = Array3::from_shape_simple_fn((heads, ANCHORS, dim), || next() / (dim as f32).sqrt());
        let weights = Array3::from_shape_simple_fn((heads, BITS, ANCHORS), &mut next);
        let mean = Array2::from_shape_simple_fn((heads, ANCHORS), || 0.6 + 0.02 * next());
        EcoFormer::builder(anchors, weights, mean)
    }

    /// Codes as bit masks, by the formula.
    fn code(ecoformer: &EcoFormerBuilder, h: usize, variance: f64, x: &[f64]) -> u32 {
        let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut code = 0;
        for b in 0..BITS {
            let mut sum = 0.0;
            for r in 0..ANCHORS {
                let d: f64 = (0..x.len())
                    .map(|c| (x[c] / norm - f64::from(ecoformer.anchors[[h, r, c]])).powi(2))
                    .sum();
                let kappa = (-d / (2.0 * variance)).exp() - f64::from(ecoformer.mean[[h, r]]);
                sum += f64::from(ecoformer.weights[[h, b, r]]) * kappa;
            }
            code |= u32::from(sum > 0.0) << b;
        }
        code
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for len in LENGTHS {
            let x = Qkvs::new([2, 4, 2, len, len, 16, 20], 1);
            worst = worst.max(held(&builder(4, 16).build().unwrap(), x.qkv()));
            let causal = builder(4, 16).causal().variance(1.9).build().unwrap();
            worst = worst.max(held(&causal, x.qkv()));
        }
        // Sequences of other lengths, each with its own variance; a long one,
        // so that some sums are near 0.
        let x = Qkvs::new([1, 2, 1, 300, 200, 33, 8], 2);
        let (queries, keys) = ([0, 0, 100, 300], [0, 5, 5, 200]);
        worst = worst.max(held(&builder(2, 33).build().unwrap(), x.qkv().packed(&queries, &keys)));
        let x = Qkvs::new([2, 2, 2, 7, 90, 16, 8], 2);
        worst = worst.max(held(&builder(2, 16).build().unwrap(), x.qkv().key_lengths(&[40, 90])));
        println!("ecoformer: {worst:.3} of the bound");
    }

    fn released(heads: usize, dim: usize) -> EcoFormerBuilder {
        builder(heads, dim).variant(EcoFormerVariant::Released)
    }

    #[test]
    fn released_kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        // Many heads, and one that threads share.
        for sizes in LENGTHS.map(|len| [2, 4, 2, len, len, 16, 20]).into_iter().chain(
            // Sums in the first and in the last column of a panel, and alone in one.
            [15, 16, 31, 32, 63, 64, 0].map(|value_dim| [1, 1, 1, 197, 197, 8, value_dim]),
        ) {
            let x = Qkvs::new(sizes, 8);
            let make = || released(sizes[1], sizes[5]);
            for isa in Isa::available() {
                worst = worst.max(held(&make().isa(isa).build().unwrap(), x.qkv()));
                for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
                    let causal = make().isa(isa).causal().variance(1.9).form(form).build().unwrap();
                    worst = worst.max(held(&causal, x.qkv()));
                }
            }
        }
        // Packed sequences, each with its own variance and its own number of keys.
        let x = Qkvs::new([1, 2, 1, 200, 200, 16, 8], 9);
        let offsets = [0, 0, 5, 130, 200];
        let packed = x.qkv().packed(&offsets, &offsets);
        worst = worst.max(held(&released(2, 16).build().unwrap(), packed));
        let causal = released(2, 16).causal().variance(1.9).build().unwrap();
        worst = worst.max(held(&causal, packed));
        println!("ecoformer, released: {worst:.3} of the bound");
    }

    #[test]
    fn weights_count_equal_bits() {
        let x = Qkvs::new([1, 2, 2, 30, 30, 8, 5], 3);
        for (causal, variant) in [false, true].into_iter().flat_map(|causal| {
            [EcoFormerVariant::Paper, EcoFormerVariant::Released].map(|variant| (causal, variant))
        }) {
            let make = || builder(2, 8).variant(variant);
            let ecoformer = if causal { make().causal().variance(1.7) } else { make() };
            let out = ecoformer.build().unwrap().reference(x.qkv()).unwrap();
            let mut want = Array4::<f64>::zeros(out.dim());
            for h in 0..2 {
                let row = |x: &Array4<f32>, t: usize| -> Vec<f64> {
                    x.slice(s![0, h, t, ..]).iter().map(|&x| f64::from(x)).collect()
                };
                // All distances, one by one.
                let mut sum = 0.0;
                for t in 0..30 {
                    let k = row(&x.k, t);
                    let norm = k.iter().map(|x| x * x).sum::<f64>().sqrt();
                    for anchor in make().anchors.index_axis(ndarray::Axis(0), h).outer_iter() {
                        sum += (0..8).map(|c| (k[c] / norm - f64::from(anchor[c])).powi(2)).sum::<f64>();
                    }
                }
                let variance = if causal { f64::from(1.7f32) } else { sum / (30 * ANCHORS) as f64 };
                let codes = |x: &Array4<f32>| -> Vec<u32> {
                    (0..30).map(|t| code(&make(), h, variance, &row(x, t))).collect()
                };
                let (q, k) = (codes(&x.q), codes(&x.k));
                for i in 0..30 {
                    let keys = if causal { i + 1 } else { 30 };
                    let weight = |j: usize| f64::from(2 * BITS as u32 + 1 - 2 * (q[i] ^ k[j]).count_ones());
                    let total: f64 = (0..keys).map(weight).sum();
                    // What every key has, and in the released code the query's own.
                    let shared = BITS as f64 + 1.0;
                    let of_value = |j: usize| match variant {
                        EcoFormerVariant::Paper => weight(j),
                        EcoFormerVariant::Released if j == i => weight(j),
                        EcoFormerVariant::Released => weight(j) - shared,
                    };
                    for c in 0..5 {
                        let sum: f64 = (0..keys).map(|j| of_value(j) * f64::from(x.v[[0, h, j, c]])).sum();
                        want[[0, h, i, c]] = sum / total;
                    }
                }
            }
            close(&out, &want, 1e-12);
        }
    }

    #[test]
    fn codes_depend_on_directions_alone() {
        let x = Qkvs::new([1, 2, 2, 40, 40, 8, 5], 4);
        let longer = Qkvs { q: &x.q * 8.0, k: &x.k * 0.25, v: x.v.clone() };
        let ecoformer = builder(2, 8).build().unwrap();
        let (a, b) = (ecoformer.forward(x.qkv()).unwrap(), ecoformer.forward(longer.qkv()).unwrap());
        assert_eq!(a, b);
        // Tokens that are all the same get the mean of the values, and zeros
        // are as good as others.
        for fill in [0.0, 1.5] {
            let mut same = x.clone();
            same.q.fill(fill);
            same.k.fill(fill);
            let out = ecoformer.forward(same.qkv()).unwrap();
            for ((_, h, _, c), out) in out.indexed_iter() {
                let mean = x.v.slice(s![0, h, .., c]).mean().unwrap();
                assert!((out - mean).abs() < 1e-6, "{out}, not {mean}");
            }
            // As released: all equal bits of every key, and the own value.
            let out = released(2, 8).build().unwrap().forward(same.qkv()).unwrap();
            let (bits, all) = (BITS as f32, (2 * BITS + 1) as f32);
            for ((_, h, t, c), out) in out.indexed_iter() {
                let mean = x.v.slice(s![0, h, .., c]).mean().unwrap();
                let want = (bits * mean + (bits + 1.0) * x.v[[0, h, t, c]] / 40.0) / all;
                assert!((out - want).abs() < 1e-6, "{out}, not {want}");
            }
        }
    }

    #[test]
    fn nan_shows() {
        let mut x = Qkvs::new([1, 1, 1, 70, 70, 8, 5], 5);
        x.k[[0, 0, 66, 2]] = f32::NAN;
        for builder in [builder(1, 8), released(1, 8)] {
            let causal = builder.causal().variance(1.9).build().unwrap();
            for ((_, _, t, _), x) in causal.forward(x.qkv()).unwrap().indexed_iter() {
                assert_eq!(x.is_nan(), t >= 66, "token {t}");
            }
        }
    }

    #[test]
    fn state_carries_over_any_cuts() {
        let x = Qkvs::new([1, 2, 1, 150, 150, 16, 16], 6);
        for builder in [builder(2, 16), released(2, 16)] {
            cuts(&builder.causal().variance(2.0).build().unwrap(), &x, &[0, 1, 2, 66, 66, 130, 150]);
        }
    }

    #[test]
    fn released_counts_the_keys_of_earlier_calls() {
        let x = Qkvs::new([1, 2, 1, 150, 150, 16, 8], 10);
        let ecoformer = released(2, 16).variance(1.9).build().unwrap();
        let mut state = ecoformer.initial_state(x.qkv()).unwrap();
        let (first, second) = (x.slice(0..70, 0..70), x.slice(70..150, 70..150));
        ecoformer.prefill(first.qkv(), &mut state).unwrap();
        let out = ecoformer.prefill(second.qkv(), &mut state).unwrap();
        // Their queries see all keys, as in one call.
        let want = ecoformer.reference(x.qkv()).unwrap();
        let bound = ecoformer.error_bound(x.qkv()).unwrap();
        for ((b, h, t, c), &got) in out.indexed_iter() {
            let (want, bound) = (want[[b, h, 70 + t, c]], bound[[b, h, 70 + t]]);
            assert!((f64::from(got) - want).abs() <= bound, "token {t} is {got:e}, not {want:e}");
        }
        // The last number of a head's state.
        assert_eq!(state.view()[[0, 1, BITS, 8]], 150.0);
    }

    #[test]
    fn refusals() {
        let error = builder(1, 8).causal().build().unwrap_err().to_string();
        assert_eq!(
            error,
            "causal cannot be combined with a variance from the keys: the variance of later keys would change the codes of earlier ones"
        );
        let error = builder(1, 8).variance(-1.0).build().unwrap_err().to_string();
        assert_eq!(error, "variance: expected a finite number of at least 0, got -1");
        let mut odd = builder(2, 8);
        odd.mean = Array2::zeros((2, 24));
        let error = odd.build().unwrap_err().to_string();
        assert_eq!(error, "mean: expected shape [heads, anchors] = [2, 25], got [2, 24]");
        let x = Qkvs::new([1, 1, 1, 3, 3, 8, 5], 7);
        let error = builder(2, 8).build().unwrap().forward(x.qkv()).unwrap_err().to_string();
        assert_eq!(error, "anchors: expected shape [heads, anchors, head_dim] = [1, _, 8], got [2, 25, 8]");
        // Queries without values of their own.
        let released = released(1, 8).build().unwrap();
        let error = |x: Qkv<'_, f32>| released.forward(x).unwrap_err().to_string();
        let fewer = Qkvs::new([1, 1, 1, 2, 3, 8, 5], 7);
        assert_eq!(
            error(fewer.qkv()),
            "k: expected shape [batch, heads, len, head_dim] = [1, 1 or a divisor, 2, 8], got [1, 1, 3, 8]"
        );
        assert_eq!(
            error(x.qkv().key_lengths(&[2])),
            "key_lengths cannot be combined with a recurrence: queries and keys are the same tokens; pack sequences of different lengths instead"
        );
        assert_eq!(
            error(x.qkv().packed(&[0, 1, 3], &[0, 2, 3])),
            "keys: expected the offsets of the queries, which are the same tokens, got [0, 2, 3]"
        );
    }
}
