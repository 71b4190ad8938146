//! Random-feature attention: random matrices weigh keys for values that are trained.

use ndarray::{Array2, ArrayView3, ArrayView4, Axis, concatenate, s};

use crate::attention::Mechanism;
use crate::card::Card;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input as _, Lengths};
use crate::simd::Isa;
use crate::stages::bilinear::Bilinear;
use crate::stages::options::{EPSILON, FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

views! {
    /// What [`RandomFeatureAttention`] takes.
    RandomFeatureInput<'a, T> {
        /// Queries `[batch, heads, q_len, head_dim]`.
        q: array ArrayView4<'a, T>,
        /// Keys `[batch, kv_heads, kv_len, head_dim]`. Heads may be fewer.
        k: array ArrayView4<'a, T>,
        /// What is trained, `V`: `[heads, features, head_dim + 1, value_dim]`.
        values: array ArrayView4<'a, f32>,
    }
    lengths(_) Lengths::Full;
    dims(x) {
        let (batch, q_heads, q_len, head_dim) = x.q.dim();
        let (k_batch, kv_heads, kv_len, k_dim) = x.k.dim();
        if (k_batch, k_dim) != (batch, head_dim) {
            let axes = "[batch, kv_heads, kv_len, head_dim]";
            let expected = format!("{axes} = [{batch}, _, _, {head_dim}] as q has it");
            return Err(Error::shape("k", expected, x.k.shape()));
        }
        if (kv_heads == 0 && q_heads > 0) || (kv_heads > 0 && !q_heads.is_multiple_of(kv_heads)) {
            return Err(Error::Heads { q_heads, kv_heads });
        }
        let (heads, _, rows, value_dim) = x.values.dim();
        if heads != q_heads || Some(rows) != head_dim.checked_add(1) {
            let expected = format!("{VALUES} = [{q_heads}, _, {head_dim} + 1, _] as q has it");
            return Err(Error::shape("values", expected, x.values.shape()));
        }
        Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed: false }.checked()
    }
}

const VALUES: &str = "[heads, features, head_dim + 1, value_dim]";

/// Random-feature attention: a layer whose weights of queries and keys are
/// random and stay as they are, and whose values are all that is trained.
///
/// ```text
/// o_i = 1 / kv_len sum_j sum_r relu(x_i^T W_r y_j) V_r^T y_j      x_i = [q_i; 1], y_j = [k_j; 1]
/// ```
///
/// "What can a Single Attention Layer Learn? A Study Through the Random
/// Features Lens" (arXiv 2307.11353): `W_r` are `features` random matrices of
/// independent normal elements, `V_r` is `[head_dim + 1, value_dim]`, and the
/// paper's scalar function has a `value_dim` of 1. It calls features heads.
/// Here a head is a layer of its own, with its own `V_r`; the random matrices
/// are those of all heads. Weights are divided by the number of keys and not by
/// their sum, so they do not add up to 1.
///
/// The layer is linear in what is trained, so that `V` is found by least
/// squares, and it does not depend on the order of the keys. In the biased
/// variant of the paper the mean of `W_r` is `diag(1, .., 1, 0)`, which favours
/// keys like the query: such functions are then learnt from fewer examples.
///
/// Cost: `features (2 (head_dim + 1)^2 + 4 kv_len (head_dim + 1) + 2 (head_dim +
/// 1) value_dim)` flops a query and head: `features` times as long as
/// [`Dense`](crate::dense::Dense). It is a model to study attention with. To
/// approximate a softmax at low cost use [`Performer`](super::Performer).
///
/// See [`RandomFeatureInput`] for what it takes. Not causal.
///
/// ```
/// use attention_kernels::{Attention, linear::{RandomFeatureAttention, RandomFeatureInput}};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let values = Array4::from_shape_fn((2, 40, 17, 1), |(h, r, c, _)| ((h + r * c) as f32).cos());
/// let layer = RandomFeatureAttention::builder(16, 40).biased().seed(7).build()?;
/// let all = RandomFeatureInput { q: x.view(), k: x.view(), values: values.view() };
/// let out = layer.forward(all)?;
/// assert_eq!(out.dim(), (1, 2, 50, 1));
///
/// // The order of the keys is nothing to it.
/// let reversed = RandomFeatureInput { k: x.slice(s![.., .., ..;-1, ..]), ..all };
/// let same = layer.forward(reversed)?;
/// assert!(out.iter().zip(&same).all(|(a, b)| (a - b).abs() < 1e-3));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// With no key the output is 0. A NaN in a key shows in all outputs of its
/// head, one in a query in all of its row. The error bound runs along with the
/// definition: every operation adds its rounding.
#[derive(Clone, Debug)]
pub struct RandomFeatureAttention {
    isa: Isa,
    head_dim: usize,
    random: Bilinear,
}

impl RandomFeatureAttention {
    /// Queries and keys of `head_dim` elements, `features` random matrices of
    /// mean 0 and variance 1/4 from seed 0.
    pub fn builder(head_dim: usize, features: usize) -> RandomFeatureAttentionBuilder {
        RandomFeatureAttentionBuilder::with(head_dim, features)
    }

    /// The random matrices, `[features, head_dim + 1, head_dim + 1]`: rows
    /// for elements of a query, columns for those of a key.
    pub fn weights(&self) -> ArrayView3<'_, f32> {
        self.random.matrices()
    }

    fn check<T: Element>(&self, x: &RandomFeatureInput<'_, T>) -> Result<Dims> {
        let (dims, d, n) = (x.dims()?, self.head_dim, self.random.features);
        if dims.head_dim != d {
            let expected = format!("[batch, heads, q_len, head_dim] = [_, _, _, {d}] as the layer has it");
            return Err(Error::shape("q", expected, x.q.shape()));
        }
        if x.values.dim().1 != n {
            let expected = format!("{VALUES} = [_, {n}, _, _] as the layer has it");
            return Err(Error::shape("values", expected, x.values.shape()));
        }
        Ok(dims)
    }
}

options! {
    /// Builds a [`RandomFeatureAttention`].
    RandomFeatureAttentionBuilder of RandomFeatureAttention, isa;
    given { head_dim: usize; features: usize; }
    own { seed: u64 = 0; }
    numbers {
        /// The mean of the first `head_dim` elements of the diagonal; that of
        /// all others is 0. Default: 0.
        mean: f32 = 0.0, in FINITE;
        /// The variance of each element. Default: 1/4.
        variance: f32 = 0.25, in EPSILON;
    }
    build(builder, config) {
        let RandomFeatureAttentionBuilder { head_dim, features, seed, mean, variance, .. } = builder;
        let random = Bilinear::normal(head_dim, features, seed, (mean, variance)).ok_or_else(|| {
            let got = format!("{features} of {head_dim} elements");
            Error::value("features", "at least one, and as many as memory has room for", got)
        })?;
        Ok(RandomFeatureAttention { isa: config.isa, head_dim, random })
    }
}

impl RandomFeatureAttentionBuilder {
    /// What the matrices are drawn from. Default: 0.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// The biased variant: a [`mean`](Self::mean) of 1.
    pub fn biased(self) -> Self {
        self.mean(1.0)
    }
}

impl<T: Element> Pipeline<RandomFeatureInput<'_, T>> for RandomFeatureAttention {
    type State = ();

    fn parameters(&self) -> usize {
        self.random.matrices().len() * size_of::<f32>()
    }

    fn flow(
        &self,
        x: RandomFeatureInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        self.check(&x)?;
        self.random.run(pass, self.isa, [x.q.reborrow(), x.k.reborrow()], x.values, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: RandomFeatureInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let with_one =
            |rows: Array2<R>| concatenate![Axis(1), rows, Array2::from_elem((rows.dim().0, 1), R::of(1.0))];
        let out = of_heads(&dims, &Lengths::Full, |head| {
            let [q, k] = [head.rows(&x.q, &head.queries), head.rows(&x.k, &head.keys)].map(with_one);
            self.random.define([&q, &k], x.values.slice(s![head.head, .., .., ..]))
        });
        Ok((out, ()))
    }
}

composite!(RandomFeatureAttention, RandomFeatureInput);

/// The card.
pub(crate) const RANDOM_FEATURES: &Card = &Card {
    name: "random-feature attention",
    family: "linear",
    mechanism: "RandomFeatureAttention",
    source: "arXiv 2307.11353",
    summary: "random matrices weigh keys for values that are parameters",
    when_not: "where values must come from the tokens: here they are trained once for all",
};

impl Mechanism for RandomFeatureAttention {
    fn card(&self) -> &'static Card {
        RANDOM_FEATURES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, error, held, refused};
    use crate::{Attention, Workspace};
    use ndarray::Array4;

    /// An input that owns its arrays.
    #[derive(Clone)]
    struct Case(Array4<f32>, Array4<f32>, Array4<f32>);

    impl Case {
        /// Sizes are batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim.
        fn new(sizes: [usize; 7], features: usize, seed: u64) -> Self {
            let Qkvs { q, k, .. } = Qkvs::new(sizes, seed);
            Self(q, k, array(seed + 1, (sizes[1], features, sizes[5] + 1, sizes[6])))
        }

        fn input(&self) -> RandomFeatureInput<'_, f32> {
            RandomFeatureInput { q: self.0.view(), k: self.1.view(), values: self.2.view() }
        }
    }

    fn builder(head_dim: usize, features: usize) -> RandomFeatureAttentionBuilder {
        RandomFeatureAttention::builder(head_dim, features).seed(5)
    }

    #[test]
    fn definition_is_the_sum_over_all_elements() {
        let case = Case::new([2, 2, 1, 3, 7, 4, 3], 6, 4);
        let layer = builder(4, 6).mean(0.5).variance(2.0).build().unwrap();
        let w = layer.weights();
        let at = |x: &Array4<f32>, b, h, t, c| if c == 4 { 1.0 } else { f64::from(x[[b, h, t, c]]) };
        let want = Array4::from_shape_fn((2, 2, 3, 3), |(b, h, i, v)| {
            let of_key = |j, r| {
                let (y, x) = (|c| at(&case.1, b, 0, j, c), |a| at(&case.0, b, h, i, a));
                let pairs = (0..5).flat_map(|a| (0..5).map(move |c| (a, c)));
                let score: f64 = pairs.map(|(a, c)| x(a) * f64::from(w[[r, a, c]]) * y(c)).sum();
                score.max(0.0) * (0..5).map(|c| f64::from(case.2[[h, r, c, v]]) * y(c)).sum::<f64>() / 7.0
            };
            (0..7).flat_map(|j| (0..6).map(move |r| (j, r))).map(|(j, r)| of_key(j, r)).sum()
        });
        close(&layer.reference(case.input()).unwrap(), &want, 1e-12);
        println!("random-feature attention: {:.4} of the bound", held(&layer, case.input()));
        let drawn = [1, 1, 2].map(|seed| builder(4, 6).seed(seed).build().unwrap());
        assert_eq!(drawn[0].weights(), drawn[1].weights());
        assert_ne!(drawn[0].weights(), drawn[2].weights());
        let [biased, mean] = [builder(4, 6).biased(), builder(4, 6).mean(1.0)].map(|of| of.build().unwrap());
        assert_eq!(biased.weights(), mean.weights());
    }

    #[test]
    fn it_is_linear_in_values_and_blind_to_the_order_of_keys() {
        let (case, layer) =
            (Case::new([1, 2, 1, 9, 40, 8, 5], 20, 6), builder(8, 20).biased().build().unwrap());
        let of = |k: &Array4<f32>, values: &Array4<f32>| {
            layer.reference(Case(case.0.clone(), k.clone(), values.clone()).input()).unwrap()
        };
        // Of few bits, so that their sums are exact.
        let few = |x: &Array4<f32>| x.mapv(|x| (x * 128.0).round() / 128.0);
        let (a, b) = (few(&case.2), few(&array(60, case.2.dim())));
        let parts = of(&case.1, &a) * 0.5 + of(&case.1, &b) * 4.0;
        close(&of(&case.1, &(&a * 0.5 + &b * 4.0)), &parts, 1e-12);
        let mut reversed = case.1.clone();
        reversed.invert_axis(Axis(2));
        let once = of(&case.1, &a);
        close(&of(&reversed, &a), &once, 1e-12);
        close(&of(&concatenate![Axis(2), case.1, case.1], &a), &once, 1e-12);
        assert!(once.iter().any(|x| x.abs() > 0.1));
    }

    #[test]
    fn nan_shows_where_it_is_seen() {
        let (case, layer) = (Case::new([1, 2, 2, 30, 70, 8, 5], 3, 7), builder(8, 3).build().unwrap());
        for (which, at) in [(0, [0, 0, 25, 7]), (1, [0, 1, 66, 2]), (2, [1, 2, 8, 3])] {
            let mut spoilt = case.clone();
            [&mut spoilt.0, &mut spoilt.1, &mut spoilt.2][which][at] = f32::NAN;
            for ((_, h, i, c), x) in layer.forward(spoilt.input()).unwrap().indexed_iter() {
                let seen = [h == 0 && i == 25, h == 1, h == 1 && c == 3][which];
                assert_eq!(x.is_nan(), seen, "array {which}: head {h}, query {i}, column {c}");
            }
            // Where there is no key, nothing is seen.
            let none = Case(case.0.clone(), Array4::zeros((1, 2, 0, 8)), spoilt.2);
            assert!(layer.forward(none.input()).unwrap().iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn refusals_and_costs() {
        for (head_dim, features) in [(8, 0), (usize::MAX, 1), (8, usize::MAX), (1 << 31, 1 << 10)] {
            let expected = "features: expected at least one, and as many as memory has room for";
            let got = format!("{expected}, got {features} of {head_dim} elements");
            assert_eq!(error(builder(head_dim, features).build()), got);
        }
        assert_eq!(error(builder(8, 1).mean(f32::NAN).build()), "mean: expected a finite number, got NaN");
        let expected = "variance: expected a finite number of at least 0, got -1";
        assert_eq!(error(builder(8, 1).variance(-1.0).build()), expected);

        let case = Case::new([1, 2, 1, 3, 4, 8, 5], 6, 9);
        let (k, heads) = (Array4::zeros((1, 1, 4, 9)), Array4::zeros((1, 3, 4, 8)));
        let (x, values) = (case.input(), Array4::zeros((2, 6, 8, 5)));
        let wants = [
            "q: expected shape [batch, heads, q_len, head_dim] = [_, _, _, 9] as the layer has it, got [1, 2, 3, 8]",
            "values: expected shape [heads, features, head_dim + 1, value_dim] = [_, 7, _, _] as the layer has it, got [2, 6, 9, 5]",
            "k: expected shape [batch, kv_heads, kv_len, head_dim] = [1, _, _, 8] as q has it, got [1, 1, 4, 9]",
            "q: expected a number of heads that is a multiple of the 3 key/value heads, got 2",
            "values: expected shape [heads, features, head_dim + 1, value_dim] = [2, _, 8 + 1, _] as q has it, got [2, 6, 8, 5]",
        ];
        let calls = [
            ([9, 6], x),
            ([8, 7], x),
            ([8, 6], RandomFeatureInput { k: k.view(), ..x }),
            ([8, 6], RandomFeatureInput { k: heads.view(), ..x }),
            ([8, 6], RandomFeatureInput { values: values.view(), ..x }),
        ];
        for (([head_dim, features], x), want) in calls.into_iter().zip(wants) {
            assert_eq!(refused(&builder(head_dim, features).build().unwrap(), x), want);
        }
        let (layer, mut out) = (builder(8, 6).build().unwrap(), Array4::from_elem((1, 2, 3, 4), 7.0));
        let expected = "out: expected shape [batch, heads, len, value_dim] = [1, 2, 3, 5], got [1, 2, 3, 4]";
        assert_eq!(error(layer.forward_into(x, out.view_mut(), &mut Workspace::new())), expected);
        assert!(out.iter().all(|&x| x == 7.0));
        let case = Case::new([2, 4, 2, 3, 7, 9, 5], 6, 8);
        let cost = builder(9, 6).build().unwrap().cost(case.input()).unwrap();
        assert_eq!(cost.flops, 2 * 4 * 3 * 6 * (2 * 100 + 4 * 7 * 10 + 2 * 10 * 5));
        let numbers = 2 * 4 * 3 * 9 + 2 * 2 * 7 * 9 + 2 * 4 * 3 * 5 + 6 * 100 + 4 * 6 * 10 * 5;
        assert_eq!(cost.bytes, 4 * numbers);
    }
}
