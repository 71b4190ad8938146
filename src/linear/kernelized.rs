//! Kernelised linear attention: weights that are dot products of features.

use crate::card::{carded, exhibit};
use crate::engine::recur::Form;
use crate::engine::recur::Normaliser;
use crate::error::Result;
use crate::input::Qkv;
use crate::math::features::{EluPlusOne, FeatureMap};
use crate::simd::Isa;
use crate::stages::mapped::{Mapped, mapped};
use crate::stages::options::{EPSILON, check};
use crate::stages::recur::{Config, Options};

/// Kernelised linear attention: weights that are dot products of features.
///
/// ```text
/// w_ij = phi(q_i) . phi(k_j)
/// o_i  = sum_j w_ij v_j / (sum_j w_ij + epsilon)
///      = phi(q_i)^T S / (phi(q_i)^T z + epsilon)     S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j)
/// ```
///
/// "Transformers are RNNs" (arXiv 2006.16236). The second line makes the cost
/// linear in the lengths; where it is causal, `S` and `z` are the sums up to
/// the query's own token, a state that goes from token to token. The paper's
/// feature map is [`EluPlusOne`]; others are in
/// [`math::features`](crate::math::features).
///
/// Cost, for `f` features: `4 f (value_dim + 1)` flops a token and head, and
/// `32 (f + value_dim)` more where it is causal. A sum over all past tokens
/// weighs them nearly alike: where single keys must stand out, softmax
/// attention or a state that forgets does better.
///
/// Unless it is [causal](LinearAttentionBuilder::causal), every query sees all
/// keys, of which there may be another number than of queries. As
/// [`Recurrent`](crate::Recurrent), queries then see the keys of their own
/// call and those that the state has from earlier ones.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::LinearAttention};
/// use ndarray::Array4;
///
/// let q = Array4::<f32>::ones((1, 4, 10, 32)); // batch, heads, queries, head_dim
/// let k = Array4::<f32>::ones((1, 2, 100, 32)); // batch, key/value heads, keys, head_dim
/// let v = Array4::<f32>::ones((1, 2, 100, 16));
/// let out = LinearAttention::builder().build()?.forward(Qkv::new(q.view(), k.view(), v.view()))?;
/// assert_eq!(out.dim(), (1, 4, 10, 16));
/// assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-5)); // a mean of values
///
/// let causal = LinearAttention::builder().causal().build()?;
/// let out = causal.forward(Qkv::new(k.view(), k.view(), v.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LinearAttention<F = EluPlusOne> {
    config: Config,
    features: F,
    causal: bool,
    normaliser: Option<f32>,
}

/// Builds a [`LinearAttention`].
#[derive(Clone, Debug)]
pub struct LinearAttentionBuilder<F = EluPlusOne> {
    options: Options,
    features: F,
    causal: bool,
    normaliser: Option<f32>,
}

impl LinearAttention {
    /// [`EluPlusOne`], everything visible, divided by the sum of the weights
    /// plus 1e-6.
    pub fn builder() -> LinearAttentionBuilder {
        LinearAttentionBuilder {
            options: Options::default(),
            features: EluPlusOne,
            causal: false,
            normaliser: Some(1e-6),
        }
    }
}

impl<F> LinearAttentionBuilder<F> {
    /// Another feature map. Weights of maps that give negative features may
    /// sum to nearly 0: see [`unnormalised`](Self::unnormalised).
    pub fn features<G: FeatureMap>(self, features: G) -> LinearAttentionBuilder<G> {
        let Self { options, causal, normaliser, .. } = self;
        LinearAttentionBuilder { options, features, causal, normaliser }
    }

    /// Queries see the keys at their own position and before; queries and
    /// keys are of the same tokens.
    pub fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    /// What is added to the sum of the weights before it divides. Default:
    /// 1e-6. A sum of exactly 0 gives 0.
    pub fn epsilon(mut self, epsilon: f32) -> Self {
        self.normaliser = Some(epsilon);
        self
    }

    /// Leaves the division out.
    pub fn unnormalised(mut self) -> Self {
        self.normaliser = None;
        self
    }

    /// The factor of the weights. Default: `1`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Forces a form. Default: [`Form::Auto`].
    pub fn form(mut self, form: Form) -> Self {
        self.options.form = form;
        self
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.options.isa = Some(isa);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for an epsilon that is negative or not finite and for
    /// a scale that is not finite, [`Error::Isa`](crate::Error::Isa) for an instruction set that
    /// the CPU lacks.
    pub fn build(self) -> Result<LinearAttention<F>> {
        check("epsilon", &self.normaliser, &EPSILON)?;
        let Self { options, features, causal, normaliser } = self;
        Ok(LinearAttention { config: options.build()?, features, causal, normaliser })
    }
}

impl<F: FeatureMap> LinearAttention<F> {
    fn mapped(&self) -> Mapped<'_> {
        Mapped {
            config: &self.config,
            query: &self.features,
            key: &self.features,
            causal: self.causal,
            normaliser: self.normaliser.map(|epsilon| Normaliser::Sum { epsilon }),
        }
    }
}

mapped!(LinearAttention<F> where [F: FeatureMap]);

exhibit! {
    LinearExhibit of LinearAttention, "linear", "linear", "arXiv 2006.16236";
    "every query reads the sum over all keys, through elu(x) + 1";
    not "where single keys must stand out: a sum over all keys weighs them nearly alike";
    tokens false;
    build(_, _) {
        LinearAttention::builder()
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}
carded!(LinearAttention<F> where [F: FeatureMap], LinearExhibit);

exhibit! {
    CausalLinearExhibit of LinearAttention, "linear", "causal linear", "arXiv 2006.16236";
    "the sum over the keys so far, through elu(x) + 1";
    not "where single keys must stand out: use a state that forgets, or softmax attention";
    tokens true, forms form, variants 3;
    build(_, field) {
        let builder = LinearAttention::builder().causal();
        match field.variant {
            0 => builder,
            1 => builder.epsilon(0.5),
            _ => builder.unnormalised().scale(0.25),
        }
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::math::features::{Identity, Relu, Sigmoid, Taylor};
    use crate::testing::qkv::{self, Qkvs, close, cuts, held};
    use crate::{Attention, Recurrent};

    fn causal<F: FeatureMap>(features: F) -> LinearAttention<F> {
        LinearAttention::builder().features(features).causal().build().unwrap()
    }

    /// All pairs, from the features of their own.
    fn quadratic(x: &Qkvs, causal: bool, epsilon: f64, phi: impl Fn(&[f64]) -> Vec<f64>) -> Array4<f64> {
        qkv::quadratic(x, causal, Some(epsilon), |q, k| phi(q).iter().zip(phi(k)).map(|(a, b)| a * b).sum())
    }

    #[test]
    fn every_feature_map_keeps_to_the_definition() {
        for len in [33, 130] {
            let x = Qkvs::new([2, 4, 2, len, len, 16, 20], 1);
            held(
                &LinearAttention::builder().features(Sigmoid).epsilon(0.0).causal().build().unwrap(),
                x.qkv(),
            );
            held(&LinearAttention::builder().features(Relu).build().unwrap(), x.qkv());
            held(&causal(Taylor), x.qkv());
            let raw = LinearAttention::builder().features(Identity).causal().unnormalised().scale(0.25);
            held(&raw.build().unwrap(), x.qkv());
        }
    }

    #[test]
    fn definition_is_the_sum_over_all_pairs() {
        let x = Qkvs::new([1, 2, 1, 70, 70, 8, 5], 3);
        let elu = |x: &[f64]| x.iter().map(|x| if *x > 0.0 { x + 1.0 } else { x.exp() }).collect::<Vec<_>>();
        for is_causal in [true, false] {
            let builder = LinearAttention::builder().epsilon(0.5);
            let builder = if is_causal { builder.causal() } else { builder };
            let out = builder.build().unwrap().reference(x.qkv()).unwrap();
            close(&out, &quadratic(&x, is_causal, 0.5, elu), 1e-12);
        }
        // 1 + t + t^2 / 2, however the features are packed.
        let out = causal(Taylor).reference(x.qkv()).unwrap();
        let pairs = qkv::quadratic(&x, true, Some(1e-6), |q, k| {
            let t = q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / 8f64.sqrt();
            1.0 + t + t * t / 2.0
        });
        close(&out, &pairs, 1e-9);
        // Without the division.
        let raw = LinearAttention::builder().features(Identity).unnormalised().scale(0.5).causal();
        let out = raw.build().unwrap().reference(x.qkv()).unwrap();
        let pairs =
            qkv::quadratic(&x, true, None, |q, k| 0.5 * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>());
        close(&out, &pairs, 1e-12);
    }

    #[test]
    fn state_carries_over_any_cuts() {
        let x = Qkvs::new([2, 2, 2, 203, 203, 16, 16], 4);
        cuts(&causal(Taylor), &x, &[0, 64, 128, 203]);
        // Not causal: keys first, then queries of none of their own.
        let all = LinearAttention::builder().build().unwrap();
        let mut state = all.initial_state(x.qkv()).unwrap();
        for part in [0..50, 50..203] {
            all.prefill(x.slice(0..0, part).qkv(), &mut state).unwrap();
        }
        let late = all.prefill(x.slice(0..203, 0..0).qkv(), &mut state).unwrap();
        let once = all.forward(x.qkv()).unwrap();
        assert!(late.iter().zip(&once).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn refusals() {
        let error = |epsilon| LinearAttention::builder().epsilon(epsilon).build().unwrap_err().to_string();
        assert_eq!(error(-1.0), "epsilon: expected a finite number of at least 0, got -1");
        assert_eq!(error(f32::NAN), "epsilon: expected a finite number of at least 0, got NaN");
        let x = Qkvs::new([1, 1, 1, 3, 4, 8, 8], 7);
        let error = causal(EluPlusOne).forward(x.qkv()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "k: expected shape [batch, heads, len, head_dim] = [1, 1 or a divisor, 3, 8], got [1, 1, 4, 8]"
        );
        let x = Array4::<f32>::zeros((1, 1, 1, 4097));
        let error = causal(EluPlusOne).forward(Qkv::new(x.view(), x.view(), x.view())).unwrap_err();
        assert_eq!(error.to_string(), "q: expected a head_dim of at most 4096, got 4097");
    }
}
