//! EcoFormer: linear attention whose weights count equal bits of hash codes.

use ndarray::{Array2, Array3, ArrayView4, s};

use crate::card::{Field, carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::recur::{Normaliser, Spec};
use crate::error::{Error, Result};
use crate::input::state::State;
use crate::input::tokens::{self, Tokens};
use crate::input::{Qkv, Sequence};
use crate::math::features::HashSigns;
use crate::stages::linear::{self, Memory};
use crate::stages::map;
use crate::stages::mapped::Mapped;
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

/// EcoFormer: linear attention whose weights count equal bits of hash codes.
///
/// ```text
/// w_ij = bits + 1 + h(q_i) . h(k_j) = 2 bits + 1 - 2 hamming(h(q_i), h(k_j))
/// o_i  = sum_j w_ij v_j / sum_j w_ij                                                    Paper
/// o_i  = (sum_j (h(q_i) . h(k_j)) v_j + (bits + 1) v_i) / sum_j w_ij                    Released
/// ```
///
/// "EcoFormer: Energy-Saving Attention with Linear Complexity" (arXiv
/// 2209.09004). Queries and keys are hashed by a learned kernel hash into
/// codes of some bits, 16 in the paper, which shares one projection between
/// them: give the same array as `q` and `k`. [`HashSigns`] has the formula of
/// a code.
///
/// The kernel's variance is the mean of the squared distances of all keys of a
/// sequence to all anchors, unless it is given. Causal attention must be given
/// one, or a token would depend on later ones; give one too where a state is
/// carried from call to call, or each call hashes with its own.
///
/// The second formula is that of the authors' code; [`EcoFormerVariant`] says which to
/// use when. It gives `bits + 1` to the query's own value alone, but divides by
/// as much for every key: weights do not sum to 1, those of other keys may be
/// negative, and a token that is like no other comes out near 0.
///
/// Cost: `4 (bits + 1) (value_dim + 1)` flops a token and head, `32 (bits +
/// value_dim)` more where it is causal, and `2 anchors (head_dim + bits)` for
/// each code. The saving in energy that the paper is about, signs instead of
/// products, is one of hardware; here the products are those of other linear
/// attention, with few features. Weights differ by a factor of `2 bits + 1` at
/// most: no key can stand out more.
///
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
    fn spec<'a, T: Element>(&self, x: &'a Qkv<'_, T>, state: Option<&State>) -> Result<Spec<'a>> {
        if self.variant == EcoFormerVariant::Released {
            x.token_dims()?;
        }
        let normaliser = Some(match self.variant {
            EcoFormerVariant::Paper => Normaliser::Sum { epsilon: 0.0 },
            EcoFormerVariant::Released => Normaliser::Shares { share: (self.key.bits() + 1) as f32 },
        });
        let Self { config, query, key, causal, .. } = self;
        let spec = Mapped { config, query, key, causal: *causal, normaliser }.spec(x)?;
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
        self.key.spread(head, keys.outer_iter().map(|key| key.into_iter().map(|x| x.to_f64())))
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
        let variances = map::numbers(pass, units, |unit| {
            self.variance(&x, &lengths.sequence(&dims, unit / heads), unit % heads)
        })?;
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
        let source = linear::arrays([q.view(), k.view()], x.v.reborrow(), heads);
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

/// For inputs of these sizes, with numbers from a seed.
fn exhibited<T>(x: &Qkv<'_, T>, field: &Field) -> EcoFormerBuilder {
    let (_, heads, _, dim) = x.q.dim();
    let anchors = Array3::from_shape_fn((heads, 5, dim), |(h, r, c)| field.at(1, h, r, c));
    let weights = Array3::from_shape_fn((heads, 8, 5), |(h, b, r)| field.at(2, h, b, r));
    EcoFormer::builder(anchors, weights, Array2::from_elem((heads, 5), 0.5)).variance(1.0)
}

exhibit! {
    EcoFormerExhibit of EcoFormer, "linear", "EcoFormer", "arXiv 2209.09004";
    "weights count equal bits of hash codes";
    not "on hardware whose multiplications cost what additions cost: accuracy is given up for nothing";
    tokens false;
    build(x, field) { exhibited(x, field) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(EcoFormer, EcoFormerExhibit);

#[cfg(test)]
exhibit! {
    CausalEcoFormerExhibit of EcoFormer, "linear", "causal EcoFormer", "arXiv 2209.09004";
    "the same over the keys so far";
    not "as EcoFormer";
    tokens true, forms form, variants 2;
    build(x, field) { exhibited(x, field).causal().variant(tests::VARIANTS[field.variant]) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

#[cfg(test)]
mod tests;
