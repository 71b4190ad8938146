//! Differential attention: what two softmaxes agree on is cancelled.

use ndarray::{Array3, Array4, ArrayView3, ArrayViewMut4};

use crate::attention::{Attention, Bounded, Cost, Input, Mechanism};
use crate::card::{Card, Exhibit, Extras, exhibit};
use crate::definition::difference::difference;
use crate::dense::{Dense, DenseBuilder};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Lengths, Qkv};
use crate::mask::Causal;
use crate::simd::Isa;
use crate::stages::attend::{Attending, check_out};
use crate::stages::difference::{RmsNorm, Subtracting};

/// Two inputs of attention, arrays or caches, and what the second is subtracted
/// with.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a, X> {
    /// The signal, whose query heads are those of the output.
    pub signal: X,
    /// The noise: as many query heads, or a divisor of them.
    pub noise: X,
    /// `[batch, q_heads, q_len]`, of the output's heads.
    pub lambda: ArrayView3<'a, f32>,
}

impl<X: Input> Input for Pair<'_, X> {
    type Out = X::Out;

    fn lengths(&self) -> Lengths<'_> {
        self.signal.lengths()
    }

    fn dims(&self) -> Result<Dims> {
        let (dims, noise) = (self.signal.dims()?, self.noise.dims()?);
        let (batch, heads, len, dim) = self.signal.out_dim()?;
        let other = self.noise.out_dim()?;
        let divides = if other.1 == 0 { heads == 0 } else { heads.is_multiple_of(other.1) };
        if (other.0, other.2, other.3) != (batch, len, dim) || noise.batch != dims.batch || !divides {
            let expected = format!("outputs [{batch}, {heads} or a divisor, {len}, {dim}] as the signal's");
            return Err(Error::shape("noise", expected, &[other.0, other.1, other.2, other.3]));
        }
        if self.lambda.dim() != (batch, heads, len) {
            let expected = format!("[batch, q_heads, q_len] = [{batch}, {heads}, {len}]");
            return Err(Error::shape("lambda", expected, self.lambda.shape()));
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        self.signal.out_dim()
    }
}

/// Differential attention: what two softmaxes agree on is cancelled.
///
/// ```text
/// o_h = softmax(q1_h K1^T) V - lambda_h softmax(q2_(h / r) K2^T) V
/// ```
///
/// | form | signal `q1, k1` | noise `q2, k2` | lambda | after it |
/// |---|---|---|---|---|
/// | V1 | even rows of the pairs | odd rows | one number a layer | RMS norm over all of `V`'s columns, times `1 - lambda_init` |
/// | V2 | even query heads | odd query heads, same keys | `sigmoid`, a logit a token and head | |
/// | grouped | `r` heads a group | one head a group, keys of its own | as V1 | as V1 |
/// | grouped latent | `r` heads a group | one head a group, same keys | as V2 | |
///
/// From "Differential Transformer" (arXiv 2410.05258), its second version, and
/// "Grouped Differential Attention" (arXiv 2510.06949). Heads that alternate in one
/// array are strided views of it; nothing is copied. The two parts are calls of the
/// attention engine, each with an LSE of its own.
///
/// Cost: that of both attentions, and one pass over their outputs in `f32`.
///
/// The difference of two attentions of one kind.
///
/// ```
/// use attention_kernels::dense::{Dense, Differential, Pair};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array3, Array4, s};
///
/// // V2: heads 0 and 1 are a pair, 2 and 3 another, on the same keys and values.
/// let q = Array4::<f32>::ones((1, 4, 5, 16));
/// let kv = Array4::<f32>::ones((1, 2, 5, 16));
/// let logits = Array3::zeros((1, 2, 5));
/// let half = |first: usize| Qkv::new(q.slice(s![.., first..;2, .., ..]), kv.view(), kv.view());
/// let differential = Differential::new(Dense::builder().causal().build()?).logits();
/// let out = differential.forward(Pair { signal: half(0), noise: half(1), lambda: logits.view() })?;
/// assert!((out[[0, 0, 0, 0]] - 0.5).abs() < 1e-6);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Differential<A> {
    attention: A,
    subtracting: Subtracting,
}

impl<A> Differential<A> {
    /// Lambda as it is, and nothing after the difference.
    pub fn new(attention: A) -> Self {
        Self { attention, subtracting: Subtracting::default() }
    }

    /// Lambda goes through a logistic function (V2).
    #[must_use]
    pub fn logits(self) -> Self {
        Self { subtracting: Subtracting { logits: true, ..self.subtracting }, ..self }
    }

    /// Each row is divided by its root mean square, `sqrt(mean y^2 + epsilon)`,
    /// and multiplied by `weight`, one number a value column: of V1 the norm's
    /// weights times `1 - lambda_init`, with an epsilon of 1e-5.
    ///
    /// # Errors
    /// [`Error::Value`] for a weight that is not finite, and an epsilon that is
    /// not above 0.
    pub fn norm(self, weight: Vec<f32>, epsilon: f32) -> Result<Self> {
        let norm = Some(RmsNorm::new(weight, epsilon)?);
        Ok(Self { subtracting: Subtracting { norm, ..self.subtracting }, ..self })
    }

    fn check<X: Input>(&self, x: &Pair<'_, X>) -> Result<()> {
        self.subtracting.check(x.out_dim()?)
    }
}

/// V1's `lambda_init` of a layer, counted from 0: `0.8 - 0.6 exp(-0.3 layer)`.
pub fn lambda_init(layer: usize) -> f32 {
    0.8 - 0.6 * (-0.3 * layer as f32).exp()
}

impl<X: Input, A: Attending<X> + Send + Sync> Attention<Pair<'_, X>> for Differential<A> {
    fn workspace_bytes(&self, x: Pair<'_, X>) -> Result<usize> {
        self.check(&x)?;
        self.subtracting.workspace_bytes(&self.attention, [x.signal, x.noise])
    }

    fn forward_into(
        &self,
        x: Pair<'_, X>,
        out: ArrayViewMut4<'_, X::Out>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check(&x)?;
        check_out(&x, &out)?;
        self.subtracting.run(&self.attention, [x.signal, x.noise], x.lambda, out, workspace)
    }

    fn reference(&self, x: Pair<'_, X>) -> Result<Array4<f64>> {
        Ok(self.define(x)?.0)
    }

    fn cost(&self, x: Pair<'_, X>) -> Result<Cost> {
        self.check(&x)?;
        let (a, b) = (self.attention.price(x.signal)?, self.attention.price(x.noise)?);
        Ok(Cost {
            flops: a.flops + b.flops,
            bytes: a.bytes + b.bytes + (x.lambda.len() * size_of::<f32>()) as u64,
        })
    }
}

impl<X: Input, A: Attending<X> + Send + Sync> Bounded<Pair<'_, X>> for Differential<A> {
    fn error_bound(&self, x: Pair<'_, X>) -> Result<Array3<f64>> {
        Ok(self.define(x)?.1)
    }
}

impl<A> Differential<A> {
    /// The definition, and how far the kernel may be off it.
    fn define<X: Input>(&self, x: Pair<'_, X>) -> Result<(Array4<f64>, Array3<f64>)>
    where
        A: Attending<X>,
    {
        self.check(&x)?;
        let (signal, noise) = (self.attention.define(x.signal)?, self.attention.define(x.noise)?);
        let Subtracting { logits, norm } = &self.subtracting;
        let norm = norm.as_ref().map(|norm| (&norm.weight[..], norm.epsilon));
        let found = difference(signal, &noise, x.lambda, *logits, norm);
        Ok((found.out, found.bound))
    }
}

impl<A: Send + Sync> Mechanism for Differential<A> {
    fn card(&self) -> &'static Card {
        DifferentialExhibit::CARD
    }
}

/// What the exhibit is built by.
struct Causally(DenseBuilder<Causal>);

impl Causally {
    fn isa(self, isa: Isa) -> Self {
        Self(self.0.isa(isa))
    }
    fn build(self) -> Result<Differential<Dense<Causal>>> {
        Ok(Differential::new(self.0.build()?).logits())
    }
}

exhibit! {
    DifferentialExhibit of Differential<Dense<Causal>>, "dense", "differential", "arXiv 2410.05258, 2510.06949";
    "causal, less a share of a second attention, whose queries come from other tokens here";
    not "where the model was not trained with pairs of heads";
    tokens false;
    build(_, _) { Causally(Dense::builder().causal()) }
    extras(x, field) {
        let query = |(_, h, i, c): (usize, usize, usize, usize)| T::from_f32(field.at(2, h, i, c));
        Extras {
            decays: field.tokens(1, x, |logit| 2.0 * logit),
            keys: Array4::from_shape_fn(x.q.dim(), query),
            ..Extras::default()
        }
    }
    input<'a, T>(x, extras) -> Pair<'a, Qkv<'a, T>> {
        Pair { signal: x, noise: Qkv { q: extras.keys.view(), ..x }, lambda: extras.decays.view() }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use ndarray::{Array4, s};

    use super::*;

    fn random(dim: Dim4, seed: usize) -> Array4<f32> {
        let at =
            |(b, h, i, c): Dim4| ((b * 7 + h * 31 + i * 131 + c * 17 + seed * 1009) % 97) as f32 / 24.0 - 2.0;
        Array4::from_shape_fn(dim, at)
    }

    /// Few queries and many, each on its engine.
    const LENGTHS: [(usize, usize); 3] = [(1, 700), (3, 40), (90, 130)];

    /// Queries of both parts, keys of both, values, lambdas.
    fn arrays(q_len: usize, kv_len: usize) -> ([Array4<f32>; 5], Array3<f32>) {
        let (q, k) = ((2, 4, q_len, 24), (2, 2, kv_len, 24));
        let dims = [q, q, k, k, (2, 2, kv_len, 20)];
        let lambda = random((2, 4, q_len, 1), 9).index_axis_move(ndarray::Axis(3), 0);
        (std::array::from_fn(|i| random(dims[i], i)), lambda)
    }

    fn dense() -> Dense<Causal> {
        Dense::builder().causal().build().unwrap()
    }

    /// Against the formula on outputs of dense attention, grouped noise and norm
    /// included.
    #[test]
    fn definition() {
        for ((q_len, kv_len), noise_heads) in LENGTHS.into_iter().flat_map(|n| [4, 2].map(|heads| (n, heads)))
        {
            let ([q1, q2, k1, k2, v], lambda) = arrays(q_len, kv_len);
            let q2 = q2.slice(s![.., ..noise_heads, .., ..]);
            let (signal, noise) =
                (Qkv::new(q1.view(), k1.view(), v.view()), Qkv::new(q2, k2.view(), v.view()));
            let (a, b) = (dense().reference(signal).unwrap(), dense().reference(noise).unwrap());
            let x = Pair { signal, noise, lambda: lambda.view() };
            let of = |share: &dyn Fn(f64) -> f64| {
                Array4::from_shape_fn(a.dim(), |(n, h, i, c)| {
                    a[[n, h, i, c]] - share(f64::from(lambda[[n, h, i]])) * b[[n, h * noise_heads / 4, i, c]]
                })
            };
            let check = |mechanism: &Differential<Dense<Causal>>, want: &Array4<f64>| {
                let (got, own) = (mechanism.forward(x).unwrap(), mechanism.reference(x).unwrap());
                let bound = mechanism.error_bound(x).unwrap();
                for ((i, got), (own, want)) in got.indexed_iter().zip(own.iter().zip(want)) {
                    assert!((own - want).abs() < 1e-9, "{i:?}: {own}, not {want}");
                    assert!(
                        (f64::from(*got) - want).abs() <= bound[[i.0, i.1, i.2]],
                        "{i:?}: {got}, not {want}"
                    );
                }
            };
            check(&Differential::new(dense()), &of(&|x| x));
            check(&Differential::new(dense()).logits(), &of(&|x| 1.0 / (1.0 + (-x).exp())));
            let weight: Vec<f32> = (0..20).map(|c| 0.3 + c as f32 / 10.0).collect();
            let mut normed = of(&|x| x);
            for mut row in normed.rows_mut() {
                let root = (row.dot(&row) / 20.0 + 1e-5f32 as f64).sqrt();
                row.iter_mut().zip(&weight).for_each(|(y, w)| *y *= f64::from(*w) / root);
            }
            check(&Differential::new(dense()).norm(weight, 1e-5).unwrap(), &normed);
        }
    }

    #[test]
    fn identities() {
        for (q_len, kv_len) in LENGTHS {
            let ([q, _, k, k2, v], lambda) = arrays(q_len, kv_len);
            let (signal, noise) =
                (Qkv::new(q.view(), k.view(), v.view()), Qkv::new(q.view(), k2.view(), v.view()));
            let run = |noise, lambda: &Array3<f32>| {
                Differential::new(dense()).forward(Pair { signal, noise, lambda: lambda.view() }).unwrap()
            };
            let plain = dense().forward(signal).unwrap();
            assert_eq!(run(noise, &(&lambda * 0.0)), plain, "nothing is subtracted");
            assert!(run(signal, &(&lambda * 0.0 + 1.0)).iter().all(|&x| x == 0.0), "equal parts cancel");
            // Values column by column: each half of them is a run of its own.
            let whole = run(noise, &lambda);
            for columns in [0..9, 9..20] {
                let part = |x: Qkv<'_, f32>| x.v.slice(s![.., .., .., columns.clone()]).to_owned();
                let (v1, v2) = (part(signal), part(noise));
                let x = Pair {
                    signal: Qkv { v: v1.view(), ..signal },
                    noise: Qkv { v: v2.view(), ..noise },
                    lambda: lambda.view(),
                };
                let got = Differential::new(dense()).forward(x).unwrap();
                let want = whole.slice(s![.., .., .., columns.clone()]);
                assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5), "{columns:?}");
            }
        }
    }

    /// Half outputs are rounded once: both parts are `f32`.
    #[test]
    fn rounded_once() {
        let ([q1, q2, k1, k2, v], lambda) = arrays(90, 130);
        let [q1, q2, k1, k2, v] = [q1, q2, k1, k2, v].map(|x| x.mapv(f16::from_f32));
        let (signal, noise) =
            (Qkv::new(q1.view(), k1.view(), v.view()), Qkv::new(q2.view(), k2.view(), v.view()));
        let mechanism = Differential::new(dense());
        let narrow = mechanism.forward(Pair { signal, noise, lambda: lambda.view() }).unwrap();
        let wide = Pair { signal: signal.widened(), noise: noise.widened(), lambda: lambda.view() };
        assert_eq!(narrow, mechanism.forward(wide).unwrap().mapv(f16::from_f32));
    }

    #[test]
    fn refusals() {
        fn refused<'a>(
            mechanism: Differential<Dense<Causal>>,
            [signal, noise]: [Qkv<'a, f32>; 2],
            lambda: ArrayView3<'a, f32>,
        ) -> String {
            mechanism.forward(Pair { signal, noise, lambda }).unwrap_err().to_string()
        }
        let ([q, q2, k, _, v], lambda) = arrays(3, 40);
        let signal = Qkv::new(q.view(), k.view(), v.view());
        let plain = || Differential::new(dense());
        let less = Qkv::new(q2.slice(s![.., .., ..2, ..]), k.view(), v.view());
        let error = refused(plain(), [signal, less], lambda.view());
        assert!(error.starts_with("noise: expected shape outputs [2, 4 or a divisor, 3, 20]"), "{error}");
        let error = refused(plain(), [signal, signal], lambda.slice(s![.., ..3, ..]));
        assert!(error.starts_with("lambda: expected shape [batch, q_heads, q_len] = [2, 4, 3]"), "{error}");
        let narrow = plain().norm(vec![1.0; 19], 1e-5).unwrap();
        let error = refused(narrow, [signal, signal], lambda.view());
        assert!(error.starts_with("weight: expected one for each of the 20 value columns"), "{error}");
        assert!(plain().norm(vec![f32::NAN], 1e-5).is_err() && plain().norm(vec![1.0], 0.0).is_err());
    }

    #[test]
    fn initial_lambdas() {
        assert!((lambda_init(0) - 0.2).abs() < 1e-6 && (lambda_init(10) - 0.770_128).abs() < 1e-5);
    }
}
