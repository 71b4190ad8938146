//! Adversarial training of attention: scores that are moved to where the loss grows.

use ndarray::{Array2, Array4, ArrayView2, ArrayView4, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::weighed;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, Qkv};
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::along::{self, Step};
use crate::stages::options::{FINITE, Range, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::whole;

views! {
    /// Queries, keys and values, and the gradient of the output.
    WithGradient<'a, T> {
        /// What is attended to.
        qkv: array Qkv<'a, T>,
        /// `[batch, q_heads, q_len, value_dim]`
        d_out: array ArrayView4<'a, f32>,
    }
    lengths(x) x.qkv.lengths;
    dims(x) {
        let (dims, want) = (x.qkv.dims()?, x.qkv.out_dim()?);
        if x.d_out.dim() != want {
            let expected = format!("[batch, q_heads, q_len, value_dim] = {:?}", <[usize; 4]>::from(want));
            return Err(Error::shape("d_out", expected, x.d_out.shape()));
        }
        Ok(dims)
    }
}

/// What the gradients of scores, `[batch, q_heads, q_len, kv_len]`, move scores by: each
/// row is as long as `epsilon`, in the direction of its gradient; 0 where there is none.
///
/// ```
/// use attention_kernels::dense::{Dense, adversarial_scores};
/// use attention_kernels::{Attention, Qkv, ScoreGradients, score::Bias};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 10, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let (qkv, d_out) = (Qkv::new(x.view(), x.view(), x.view()), Array4::ones((1, 2, 10, 16)));
/// let causal = Dense::builder().causal();
/// let gradients = causal.clone().build()?.score_gradients(qkv, d_out.view())?;
/// let step = adversarial_scores(gradients.view(), 0.5);
/// let moved = causal.clone().score(Bias::new(step.view())).build()?.forward(qkv)?;
/// let gain = (&moved - &causal.build()?.forward(qkv)?).sum();
/// assert!(gain > 0.0);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn adversarial_scores(gradients: ArrayView4<'_, f32>, epsilon: f32) -> Array4<f32> {
    let mut step = gradients.to_owned();
    for mut row in step.lanes_mut(Axis(3)) {
        let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        if length > 0.0 {
            row.mapv_inplace(|x| (f64::from(epsilon) * f64::from(x) / length) as f32);
        }
    }
    step
}

/// Adversarial training of attention: scores that are moved to where the loss grows.
///
/// ```text
/// g_j = w_j (d . v_j - sum_k w_k d . v_k)       the gradient of the scores s of a query
/// o   = sum_j softmax_j(s + e g / |g|) v_j      d: that of its output;  |g| = 0: s alone
/// ```
///
/// "Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial
/// Training" (arXiv 2009.12064). The paper's attention is [additive](super::Additive) and
/// has one query for each text. Its interpretable form moves score `t` by `a_t . n_t`, with
/// `n_t` the differences of score `t` from all scores, divided by their length, and `a = e
/// h / |h|`, where `h_t = g_t n_t` is the gradient of `a`. For `n_t . n_t` is 1 that is the
/// step above, unless all scores are the same: then there is none. Released code takes
/// other differences, across the texts of a batch, and another step.
///
/// [`adversarial_scores`] is the step for whatever has
/// [`ScoreGradients`](crate::ScoreGradients), with masks, and a
/// [`Bias`](crate::score::Bias) for the second pass.
///
/// Where all that a query sees says the same of the loss, the gradient is rounding, and so
/// is the direction of the step; the error bound knows.
///
/// Cost: as dense attention, `2 value_dim` flops a pair more; a thread holds the scores of
/// 48 queries with all keys, and as many products.
///
/// Attention whose scores are moved along the gradient of the loss.
///
/// ```
/// use attention_kernels::dense::{Adversarial, WithGradient};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 10, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let (qkv, d_out) = (Qkv::new(x.view(), x.view(), x.view()), Array4::ones((1, 2, 10, 16)));
/// let [plain, moved] = [0.0, 1.0].map(|epsilon| {
///     let attention = Adversarial::builder().epsilon(epsilon).build()?;
///     attention.forward(WithGradient { qkv, d_out: d_out.view() })
/// });
/// assert!((moved? - plain?).sum() > 0.0, "the loss grows");
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Adversarial {
    config: Config,
    epsilon: f32,
    /// `[heads | 1, head_dim]`
    additive: Option<Array2<f32>>,
}

const STEP: Range = Range::new(["a number from 0 to 32"; 2], |x| (0.0..=32.0).contains(&x));

options! {
    /// Builds an [`Adversarial`].
    AdversarialBuilder of Adversarial, isa;
    own { additive: Option<Array2<f32>> = None, in FINITE; }
    numbers {
        /// How far the scores of a query are moved, all together. Default: 1.
        epsilon: f32 = 1.0, in STEP;
    }
    build(this, config) {
        if this.additive.is_some() && config.scale.is_some() {
            let reason = "there is no dot product to be multiplied";
            return Err(Error::Conflict { option: "scale", with: "additive scores", reason });
        }
        Ok(Adversarial { config, epsilon: this.epsilon, additive: this.additive })
    }
}

impl Adversarial {
    /// Of scores that are dot products.
    pub fn builder() -> AdversarialBuilder {
        AdversarialBuilder::with()
    }

    fn checked<T: Element>(&self, x: &WithGradient<'_, T>) -> Result<Dims> {
        let dims = whole::checked(x.dims()?)?;
        match self.additive.as_ref().map(|weights| weights.dim()) {
            Some((heads, dim)) if ![1, dims.q_heads].contains(&heads) || dim != dims.head_dim => {
                let expected = format!("[q_heads | 1, head_dim] = [{} | 1, {}]", dims.q_heads, dims.head_dim);
                Err(Error::shape("additive", expected, &[heads, dim]))
            }
            _ => Ok(dims),
        }
    }
}

impl AdversarialBuilder {
    /// The factor of scores, which are dot products then. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Scores are `sum_c w_c tanh(q_c + k_c)`, with `w` `[q_heads | 1, head_dim]`.
    pub fn additive(self, weights: ArrayView2<'_, f32>) -> Self {
        Self { additive: Some(weights.as_standard_layout().into_owned()), ..self }
    }
}

impl<T: Element> Pipeline<WithGradient<'_, T>> for Adversarial {
    type State = ();

    fn flow(
        &self,
        x: WithGradient<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.checked(&x)?;
        let (scale, isa) = (self.config.scale_or_sqrt(&dims) as f32, self.config.isa);
        let d_out = f32::any(Heads::new(x.d_out.reborrow()));
        let (epsilon, additive) = (self.epsilon, self.additive.as_ref());
        if additive.is_some() {
            let step = Step::<true> { epsilon, additive, d_out };
            whole::run(pass, isa, (x.qkv, &dims), 1.0, &step, None, out);
        } else {
            let step = Step::<false> { epsilon, additive, d_out };
            whole::run(pass, isa, (x.qkv, &dims), scale, &step, None, out);
        }
        Ok(())
    }

    fn define<R: Real>(&self, x: WithGradient<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.checked(&x)?;
        let scale = R::rounded(self.config.scale_or_sqrt(&dims), 1.0);
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let q = head.rows::<R, T>(&x.qkv.q, &head.queries);
            let d_out = head.rows::<R, f32>(&x.d_out, &head.queries);
            let [k, v] = [&x.qkv.k, &x.qkv.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let dot = |a: &Array2<R>, b: &Array2<R>, j: usize| {
                    R::dot(a.row(i).iter().copied().zip(b.row(j).iter().copied()))
                };
                let score = |j: usize| match &self.additive {
                    None => dot(&q, &k, j) * scale,
                    Some(weights) => {
                        let weight = |c| R::of(f64::from(along::weight(Some(weights), head.head, c)));
                        R::dot((0..q.dim().1).map(|c| (weight(c), (q[[i, c]] + k[[j, c]]).tanh())))
                    }
                };
                let weights = weighed((0..k.dim().0).map(|j| (j, score(j))));
                let says: Vec<R> = weights.iter().map(|&(j, _)| dot(&d_out, &v, j)).collect();
                let weights = along::moved(&weights, &says, f64::from(self.epsilon));
                for (c, out) in out.iter_mut().enumerate() {
                    *out = R::total(weights.iter().map(|&(j, weight)| (weight, v[[j, c]])));
                }
            }
            out
        });
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        self.additive.as_ref().map_or(0, |weights| size_of::<f32>() * weights.len())
    }
}

composite!(Adversarial, WithGradient);

exhibit! {
    AdversarialExhibit of Adversarial, "dense", "attention AT", "arXiv 2009.12064";
    "scores moved along the gradient of the loss, for training that withstands it";
    not "but in training, once the gradients of a first pass are there";
    tokens false;
    build(_, _) { Adversarial::builder() }
    extras(x, field) {
        let ((batch, heads, len, _), dim) = (x.q.dim(), x.v.dim().3);
        let at = |(_, h, i, c): (usize, usize, usize, usize)| field.at(1, h, i, c);
        Extras { channels: Array4::from_shape_fn((batch, heads, len, dim), at), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithGradient<'a, T> { WithGradient { qkv: x, d_out: extras.channels.view() } }
}
carded!(Adversarial, AdversarialExhibit);

#[cfg(test)]
mod tests;
