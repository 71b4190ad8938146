//! Sigmoid attention (FlashSigmoid).

use ndarray::ArrayView4;

use crate::attention::Cost;
use crate::card::{carded, exhibit};
use crate::definition::softmax::{Normalisation, Reference};
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::mask::{Causal, Mask, Unmasked};
use crate::score::smooth::AnySmooth;
use crate::score::{self, Plain, Score};
use crate::stages::attend::{Attending, Config, Options, attending, common_options};
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, shapes, smooth};

/// Sigmoid attention (FlashSigmoid).
///
/// ```text
/// o_i = sum_j sigmoid(score(scale * q_i . k_j) + bias) v_j      for visible keys j
/// ```
///
/// "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (arXiv
/// 2409.04431). Weights of a row do not compete, so parts over disjoint keys
/// simply add up and there is no LSE. The paper recommends a bias of `-ln n`
/// with the sequence length `n`, which is the default; models are trained with
/// fixed ones too.
///
/// Cost: as [`Dense`](super::Dense).
///
/// Sigmoid attention: each weight by itself.
///
/// ```
/// use attention_kernels::{Attention, dense::Sigmoid, input::Qkv};
/// use ndarray::Array4;
///
/// // All scores 0 and a bias of -ln 3: each of 3 weights is 1 / 4.
/// let q = Array4::<f32>::zeros((1, 1, 3, 16));
/// let v = Array4::<f32>::ones((1, 1, 3, 16));
/// let out = Sigmoid::builder().build()?.forward(Qkv::new(q.view(), q.view(), v.view()))?;
/// assert!(out.iter().all(|x| (x - 0.75).abs() < 1e-6));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sigmoid<M = Unmasked, F = Plain> {
    config: Config<M, F>,
    bias: Option<f32>,
}

/// Builds a [`Sigmoid`].
#[derive(Clone, Debug, Default)]
pub struct SigmoidBuilder<M = Unmasked, F = Plain> {
    options: Options<M, F>,
    bias: Option<f32>,
}

impl Sigmoid {
    /// Everything visible, scores as they are, bias `-ln kv_len`.
    pub fn builder() -> SigmoidBuilder {
        SigmoidBuilder::default()
    }
}

common_options!(SigmoidBuilder { bias });

impl<M: Mask, F: Score> SigmoidBuilder<M, F> {
    /// What is added to every score. Default: `-ln kv_len` of the sequence.
    pub fn bias(self, bias: f32) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale or bias that is not finite,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Sigmoid<M, F>> {
        if let Some(bias) = self.bias.filter(|bias| !bias.is_finite()) {
            return Err(Error::value("bias", "a finite number", bias));
        }
        Ok(Sigmoid { config: self.options.build()?, bias: self.bias })
    }
}

impl<Q: Element, K: Element, O: Element, M: Mask, F: Score> Attending<Qkv<'_, Q, K, O>> for Sigmoid<M, F> {
    fn with_call<R>(&self, x: Qkv<'_, Q, K, O>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        Ok(run(&self.config.call(x.reborrow(), Norm::Sigmoid { bias: self.bias }, None)?))
    }

    fn define(&self, x: Qkv<'_, Q, K, O>) -> Result<Reference> {
        let normalisation = Normalisation::Sigmoid { bias: self.bias };
        self.config.definition(x.reborrow(), normalisation, None)?.compute()
    }

    fn price(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        self.config.cost(&x)
    }
}

attending!(Sigmoid<M, F> where [M: Mask, F: Score], [Q, K, O] Qkv);

impl<Q: Element, K: Element, O: Element, M: Mask, F: score::Smooth> Smooth<Qkv<'_, Q, K, O>>
    for Sigmoid<M, F>
{
    fn with_smooth<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        self.with_call(x, |call| run(call, self.config.smooth()))
    }

    fn define_back(
        &self,
        x: Qkv<'_, Q, K, O>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        let normalisation = Normalisation::Sigmoid { bias: self.bias };
        let definition = self.config.definition(x.reborrow(), normalisation, None)?;
        softmax_backward::gradients(&definition, self.config.smooth(), d_out, saved.softmax)
    }

    fn shapes(&self, x: Qkv<'_, Q, K, O>) -> Result<Shapes> {
        Ok(shapes(&x).of_score(self.config.smooth()))
    }
}

smooth!(Sigmoid<M, F> where [M: Mask, F: score::Smooth], [Q, K, O] Qkv);

exhibit! {
    SigmoidExhibit of Sigmoid<Causal>, "dense", "sigmoid", "arXiv 2409.04431";
    "causal, each weight by itself through a logistic function";
    not "with models trained with a softmax";
    tokens false;
    build(_, _) { Sigmoid::builder().causal() }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Sigmoid<M, F> where [M: Mask, F: Score], SigmoidExhibit);

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::attention::{Attention, Bounded, Weights};
    use crate::testing::{array, within};

    /// The bias is that of each sequence's own length, padded or packed.
    #[test]
    fn the_bias_is_of_each_sequence() {
        let (q, k, v) = (array([2, 4, 30, 8], 1), array([2, 2, 90, 8], 2), array([2, 2, 90, 5], 3));
        let sigmoid = Sigmoid::builder().build().unwrap();
        let (all, lengths) = (Qkv::new(q.view(), k.view(), v.view()), [70, 9]);
        let padded = all.key_lengths(&lengths);
        let (out, reference) = (sigmoid.forward(padded).unwrap(), sigmoid.reference(padded).unwrap());
        within("padded", &out, &reference, &sigmoid.error_bound(padded).unwrap());
        let weights = sigmoid.weights(padded).unwrap();
        for (b, &len) in lengths.iter().enumerate() {
            let (k, v) = (k.slice(s![b..=b, .., ..len, ..]), v.slice(s![b..=b, .., ..len, ..]));
            let alone = Qkv::new(q.slice(s![b..=b, .., .., ..]), k, v);
            assert_eq!(sigmoid.forward(alone).unwrap(), out.slice(s![b..=b, .., .., ..]));
            assert_eq!(sigmoid.reference(alone).unwrap(), reference.slice(s![b..=b, .., .., ..]));
            assert_eq!(sigmoid.weights(alone).unwrap(), weights.slice(s![b..=b, .., .., ..len]));
        }
        let first = |x: &ndarray::Array4<f32>| x.slice(s![..1, .., .., ..]).to_owned();
        let (q, k, v) = (first(&q), first(&k), first(&v));
        let packed = Qkv::new(q.view(), k.view(), v.view()).packed(&[0, 20, 30], &[0, 15, 88]);
        let bound = sigmoid.error_bound(packed).unwrap();
        let (out, reference) = (sigmoid.forward(packed).unwrap(), sigmoid.reference(packed).unwrap());
        within("packed", &out, &reference, &bound);
        let q = q.slice(s![.., .., 20..30, ..]);
        let alone = Qkv::new(q, k.slice(s![.., .., 15..88, ..]), v.slice(s![.., .., 15..88, ..]));
        assert_eq!(sigmoid.reference(alone).unwrap(), reference.slice(s![.., .., 20.., ..]));
    }
}
