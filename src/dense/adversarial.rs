//! Adversarial training of attention: scores that are moved to where the loss grows.
//!
//! ```text
//! g_j = w_j (d . v_j - sum_k w_k d . v_k)       the gradient of the scores s of a query
//! o   = sum_j softmax_j(s + e g / |g|) v_j      d: that of its output;  |g| = 0: s alone
//! ```
//!
//! "Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial
//! Training" (arXiv 2009.12064). The paper's attention is [additive](super::Additive) and
//! has one query for each text. Its interpretable form moves score `t` by `a_t . n_t`, with
//! `n_t` the differences of score `t` from all scores, divided by their length, and `a = e
//! h / |h|`, where `h_t = g_t n_t` is the gradient of `a`. For `n_t . n_t` is 1 that is the
//! step above, unless all scores are the same: then there is none. Released code takes
//! other differences, across the texts of a batch, and another step.
//!
//! [`adversarial_scores`] is the step for whatever has
//! [`ScoreGradients`](crate::ScoreGradients), with masks, and a
//! [`Bias`](crate::score::Bias) for the second pass.
//!
//! Where all that a query sees says the same of the loss, the gradient is rounding, and so
//! is the direction of the step; the error bound knows.
//!
//! Cost: as dense attention, `2 value_dim` flops a pair more; a thread holds the scores of
//! 48 queries with all keys, and as many products.

use ndarray::{Array2, Array4, ArrayView2, ArrayView4, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::weighed;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, Qkv, Site};
use crate::simd::Simd;
use crate::simd::any::{AnyArray, IntoAny};
use crate::simd::exp::{exp, tanh};
use crate::simd::mem::Heads;
use crate::stages::options::{FINITE, Range, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::whole::{self, RowFn};

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
/// let moved = causal.score(Bias::new(step.view())).build()?.forward(qkv)?;
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
    build(this, config) { Ok(Adversarial { config, epsilon: this.epsilon, additive: this.additive }) }
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

    #[inline(always)]
    fn weight(&self, head: usize, element: usize) -> f32 {
        self.additive.as_ref().map_or(0.0, |w| w[[if w.dim().0 == 1 { 0 } else { head }, element]])
    }
}

impl AdversarialBuilder {
    /// The factor of scores that are dot products. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Scores are `sum_c w_c tanh(q_c + k_c)`, with `w` `[q_heads | 1, head_dim]`.
    pub fn additive(self, weights: ArrayView2<'_, f32>) -> Self {
        Self { additive: Some(weights.as_standard_layout().into_owned()), ..self }
    }
}

/// The weights of a call.
struct Step<'a, const ADDITIVE: bool> {
    of: &'a Adversarial,
    d_out: AnyArray<'a>,
}

/// The sum of what `f` makes of the weights of a row and of what each says, which are
/// as many; see [`whole::sum`].
#[inline(always)]
fn total<S: Simd>(s: S, row: &[f32], says: &[f32], f: impl Fn(S::F, S::F) -> S::F) -> f32 {
    let block = 64 * S::LANES;
    let mut total = s.splat(0.0);
    for (row, says) in row.chunks(block).zip(says.chunks(block)) {
        let mut sum = s.splat(0.0);
        for (weight, says) in row.chunks(S::LANES).zip(says.chunks(S::LANES)) {
            sum = s.add(sum, f(s.load_tail(weight), s.load_tail(says)));
        }
        total = s.add(total, sum);
    }
    s.reduce_add(total)
}

impl<const ADDITIVE: bool> RowFn for Step<'_, ADDITIVE> {
    const PAIRS: bool = ADDITIVE;
    const PRODUCTS: bool = true;

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, head: usize, element: usize, q: S::F, k: S::F) -> S::F {
        s.mul(s.splat(self.of.weight(head, element)), tanh(s, s.add(q, k)))
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, _: &Site, _: usize, row: &mut [f32], _: &mut [f32]) {
        whole::softmax(s, row);
    }

    fn features(&self) -> Option<AnyArray<'_>> {
        Some(self.d_out)
    }

    #[inline(always)]
    fn spread<S: Simd>(&self, s: S, _: &Site, _: usize, row: &mut [f32], products: &[f32]) {
        // Without columns an output has no gradient.
        if products.is_empty() || self.of.epsilon == 0.0 {
            return;
        }
        // Of what is hidden nothing shows.
        let shown = |weight: S::F| s.lt(s.splat(0.0), s.div(s.splat(1.0), weight));
        let open = |weight: S::F, x: S::F| s.select(shown(weight), x, s.splat(0.0));
        let product = |weight: S::F, says: S::F| open(weight, s.mul(weight, says));
        let mean = s.splat(total(s, row, products, product));
        let pull = |weight: S::F, says: S::F| open(weight, s.mul(weight, s.sub(says, mean)));
        let mut most = s.splat(0.0);
        for (weight, says) in row.chunks(S::LANES).zip(products.chunks(S::LANES)) {
            most = s.max(most, s.abs(pull(s.load_tail(weight), s.load_tail(says))));
        }
        let most = s.reduce_max(most);
        if most == 0.0 {
            return;
        }
        // Squares of what is small would be 0.
        let share = s.splat(1.0 / most.max(1e-37));
        let square = |weight: S::F, says: S::F| {
            let pull = s.mul(share, pull(weight, says));
            s.mul(pull, pull)
        };
        let step = s.splat(self.of.epsilon / total(s, row, products, square).sqrt());
        for (row, says) in row.chunks_mut(S::LANES).zip(products.chunks(S::LANES)) {
            let weight = s.load_tail(row);
            let by = s.mul(step, s.mul(share, pull(weight, s.load_tail(says))));
            s.store_tail(row, s.select(shown(weight), s.mul(weight, exp(s, by)), weight));
        }
        let all = whole::sum(s, row, 0.0, |x| x);
        for x in row.chunks_mut(S::LANES) {
            let weight = s.mul(s.load_tail(x), s.splat(1.0 / all));
            s.store_tail(x, weight);
        }
    }
}

/// What a softmax of moved scores makes of weights and what each says of the loss.
fn moved<R: Real>(weights: &[(usize, R)], says: &[R], epsilon: f64) -> Vec<(usize, R)> {
    let mean = R::total(weights.iter().zip(says).map(|(&(_, weight), &d)| (weight, d)));
    let pull: Vec<R> = weights.iter().zip(says).map(|(&(_, weight), &d)| weight * (d - mean)).collect();
    let length = R::total(pull.iter().map(|&g| (g, g))).sqrt();
    let grown = weights.iter().zip(&pull).map(|(&(j, weight), &g)| {
        let flat = length.value() == 0.0;
        let step = R::of(epsilon) * g / if flat { R::of(1.0) } else { length };
        // Whatever the direction, no score is moved farther.
        let known = step.off() <= 2.0 * epsilon && !(flat && length.off() > 0.0);
        let step = if known || step.value().is_nan() {
            step
        } else {
            R::of(step.value()).at_most(|x| x, 0.0, 2.0 * epsilon * f64::from(1 << 24))
        };
        (j, weight * step.exp())
    });
    let grown: Vec<(usize, R)> = grown.collect();
    let all = R::sum(grown.iter().map(|x| x.1));
    grown.into_iter().map(|(j, weight)| (j, weight / all)).collect()
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
        if self.additive.is_some() {
            whole::run(pass, isa, (x.qkv, &dims), 1.0, &Step::<true> { of: self, d_out }, None, out);
        } else {
            whole::run(pass, isa, (x.qkv, &dims), scale, &Step::<false> { of: self, d_out }, None, out);
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
                    Some(_) => {
                        let weight = |c| R::of(f64::from(self.weight(head.head, c)));
                        R::dot((0..q.dim().1).map(|c| (weight(c), (q[[i, c]] + k[[j, c]]).tanh())))
                    }
                };
                let weights = weighed((0..k.dim().0).map(|j| (j, score(j))));
                let says: Vec<R> = weights.iter().map(|&(j, _)| dot(&d_out, &v, j)).collect();
                let weights = moved(&weights, &says, f64::from(self.epsilon));
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
