//! Efficient probing (EP): learned queries pool tokens, each its own slice of
//! the values.

use ndarray::{Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut4, Axis, s};

use crate::attention::{Attention, Bounded, Cost, ERROR_CONSTANT, TopWeights, Weights};
use crate::card::{Extras, carded, exhibit};
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::weights;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dim4, Dims, Input, Lengths, filled};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::simd::Isa;
use crate::stages::attend::Options;
use crate::stages::latent::{Form, LatentHeads, Latents};

/// Tokens, and the queries that pool them.
#[derive(Clone, Copy, Debug)]
pub struct Pooled<'a, T> {
    /// Learned queries, `[queries, n, C]`: one in the paper, or several that
    /// share a slice of the values.
    pub queries: ArrayView3<'a, T>,
    /// Slices of the projection of values, `[queries, d, C]`.
    pub w_v: ArrayView3<'a, T>,
    /// Tokens, `[batch, len, C]`.
    pub tokens: ArrayView3<'a, T>,
    lengths: Option<&'a [usize]>,
}

impl<'a, T: Element> Pooled<'a, T> {
    /// All tokens of every sequence.
    pub fn new(tokens: ArrayView3<'a, T>, queries: ArrayView3<'a, T>, w_v: ArrayView3<'a, T>) -> Self {
        Self { queries, w_v, tokens, lengths: None }
    }

    /// Only the first `lengths[b]` tokens of sequence `b`.
    pub fn lengths(self, lengths: &'a [usize]) -> Self {
        Self { lengths: Some(lengths), ..self }
    }

    /// Hands `run` the same as latents.
    fn with_latents<R>(&self, run: impl FnOnce(Latents<'_, T>) -> Result<R>) -> Result<R> {
        let (queries, n, c) = self.queries.dim();
        let (batch, _, width) = self.tokens.dim();
        let one = self.queries.view().insert_axis(ndarray::Axis(0));
        // What has no queries for each sequence fits no memory either.
        let q: ArrayView4<'_, T> = one
            .broadcast((batch, queries, n, c))
            .ok_or_else(|| Error::too_large("tokens", format_args!("{batch} sequences")))?;
        if (self.w_v.dim().0, self.w_v.dim().2) != (queries, c) {
            let expected = format!("[queries, d, C] = [{queries}, _, {c}] as queries have it");
            return Err(Error::shape("w_v", expected, self.w_v.shape()));
        }
        if width != c {
            let expected = format!("[batch, len, C] = [_, _, {c}] as queries have it");
            return Err(Error::shape("tokens", expected, self.tokens.shape()));
        }
        let x = Latents::taken_up(q, self.tokens.view(), self.w_v.view());
        run(match self.lengths {
            Some(lengths) => x.lengths(Lengths::Keys(lengths)),
            None => x,
        })
    }
}

impl<T: Element> Input for Pooled<'_, T> {
    type Out = T;

    fn dims(&self) -> Result<Dims> {
        self.with_latents(|x| x.dims())
    }

    /// `[batch, queries, n, d]`
    fn out_dim(&self) -> Result<Dim4> {
        self.with_latents(|x| x.out_dim())
    }
}

/// Efficient probing (EP): learned queries pool tokens, each its own slice of
/// the values.
///
/// ```text
/// A_m = softmax_n(scale * u_m . x_n)
/// o_m = sum_n A_mn W_m x_n = W_m sum_n A_mn x_n      scale = C^-1/2
/// ```
///
/// From "Attention, Please! Revisiting Attentive Probing Through the Lens of
/// Efficiency" (arXiv 2506.10178): no projection of keys, and the rows of one
/// projection of values are shared out to the queries. The outputs of all
/// queries one after the other are the pooled token.
///
/// So is AIM's attention pooling ("Scalable Pre-training of Large Autoregressive Image
/// Models", arXiv 2401.08541), once queries have gone through the projection of keys of
/// their head and the norm of its tokens is in both projections; its output is the mean
/// over queries:
///
/// ```
/// use attention_kernels::{Attention, latent::{EfficientProbing, Pooled}};
/// use ndarray::{Array2, Array3, Axis, s};
///
/// let (heads, queries, dim, c) = (4, 2, 8, 32);
/// let (learned, tokens) = (Array3::<f32>::ones((heads, queries, dim)), Array3::ones((1, 50, c)));
/// let (w_k, w_v) = (Array2::<f32>::ones((c, c)), Array2::<f32>::ones((c, c)));
/// let mut absorbed = Array3::zeros((heads, queries, c));
/// for h in 0..heads {
///     let of_head = w_k.slice(s![h * dim..(h + 1) * dim, ..]);
///     absorbed.slice_mut(s![h, .., ..]).assign(&learned.slice(s![h, .., ..]).dot(&of_head));
/// }
/// let w_v = w_v.into_shape_with_order((heads, dim, c)).unwrap();
/// let aim = EfficientProbing::builder().scale((dim as f32).powf(-0.5)).build()?;
/// let pooled = aim.forward(Pooled::new(tokens.view(), absorbed.view(), w_v.view()))?;
/// let out = pooled.mean_axis(Axis(2)).unwrap(); // [batch, heads, dim]
/// # assert!((out[[0, 3, 7]] - 32.0).abs() < 1e-4);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// It is absorbed latent attention whose latents are the tokens: pooling comes
/// before the projection. Cost: `4 C` flops a query and token and `2 C d` a query
/// of `d` outputs, against `2 C^2` a token where values are projected first.
///
/// ```
/// use attention_kernels::Attention;
/// use attention_kernels::latent::{EfficientProbing, Pooled};
/// use ndarray::Array3;
///
/// // 32 queries over 196 tokens of 768 elements; each pools 24 of the values.
/// let (tokens, queries) = (Array3::<f32>::ones((2, 196, 768)), Array3::ones((32, 1, 768)));
/// let w_v = Array3::ones((32, 24, 768));
/// let x = Pooled::new(tokens.view(), queries.view(), w_v.view());
/// let out = EfficientProbing::builder().build()?.forward(x)?;
/// assert_eq!(out.dim(), (2, 32, 1, 24));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EfficientProbing {
    heads: LatentHeads<Unmasked>,
}

/// Builds an [`EfficientProbing`].
#[derive(Clone, Debug, Default)]
pub struct EfficientProbingBuilder {
    options: Options<Unmasked, Plain>,
}

impl EfficientProbing {
    /// With the scale of the paper.
    pub fn builder() -> EfficientProbingBuilder {
        EfficientProbingBuilder::default()
    }

    /// As the paper has it: values are projected, then pooled.
    fn define<T: Element>(&self, x: &Pooled<'_, T>) -> Result<Reference> {
        let dims = x.with_latents(|x| self.heads.dims(&x))?;
        let (batch, queries, n, d) = x.out_dim()?;
        let (len, c, scale) = (x.tokens.dim().1, x.tokens.dim().2, self.heads.config.scale(&dims));
        let mut out = filled("out", (batch, queries, n, d), 0.0)?;
        let mut lse = filled("lse", (batch, queries, n), f64::NEG_INFINITY)?;
        let mut all_scores = filled("scores", (batch, queries, n, len), f64::NEG_INFINITY)?;
        let mut weights = filled("weights", (batch, queries, n, len), 0.0)?;
        let mut bound = filled("out", (batch, queries, n), 0.0)?;
        for (b, m, i) in ndarray::indices((batch, queries, n)) {
            let len = x.lengths.map_or(len, |lengths| lengths[b]);
            let tokens = x.tokens.slice(s![b, ..len, ..]).mapv(Element::to_f64);
            let query = x.queries.slice(s![m, i, ..]).mapv(Element::to_f64);
            let w_v = x.w_v.slice(s![m, .., ..]).mapv(Element::to_f64);
            let scores = tokens.dot(&query) * scale;
            // A score of -inf hides its token.
            let seen: Vec<usize> = (0..len).filter(|&j| scores[j] != f64::NEG_INFINITY).collect();
            if seen.is_empty() {
                continue;
            }
            let (tokens, scores) = (tokens.select(Axis(0), &seen), scores.select(Axis(0), &seen));
            let max = scores.fold(f64::NEG_INFINITY, |max, x| max.max(*x));
            let exponentials = scores.mapv(|x| (x - max).exp());
            lse[[b, m, i]] = max + exponentials.sum().ln();
            let shares = &exponentials / exponentials.sum();
            for ((&j, &share), &score) in seen.iter().zip(&shares).zip(&scores) {
                (weights[[b, m, i, j]], all_scores[[b, m, i, j]]) = (share, score);
            }
            out.slice_mut(s![b, m, i, ..]).assign(&tokens.dot(&w_v.t()).t().dot(&shares));
            let largest = tokens.mapv(f64::abs).dot(&w_v.mapv(f64::abs).t()).fold(0.0, |a: f64, b| a.max(*b));
            let sizes =
                tokens.mapv(f64::abs).dot(&query.mapv(f64::abs)) * scale.abs() + scores.mapv(f64::abs);
            let near = sizes.iter().zip(&scores).filter(|(_, score)| max - **score < 25.0);
            let size = near.fold(0.0, |a: f64, (b, _)| a.max(*b));
            bound[[b, m, i]] = ERROR_CONSTANT * 2f64.powi(-24) * ((2 * c + len) as f64 + size) * largest;
        }
        Ok(Reference { out, lse, scores: all_scores, weights, bound })
    }
}

impl EfficientProbingBuilder {
    /// The factor of the dot product. Default: `C^-1/2`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Forces an instruction set.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.options.isa = Some(isa);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is not finite, [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<EfficientProbing> {
        let heads = LatentHeads { config: self.options.build()?, form: Form::Absorbed };
        Ok(EfficientProbing { heads })
    }
}

impl<T: Element> Attention<Pooled<'_, T>> for EfficientProbing {
    fn workspace_bytes(&self, x: Pooled<'_, T>) -> Result<usize> {
        x.with_latents(|x| self.heads.workspace_bytes(&x))
    }

    fn forward_into(
        &self,
        x: Pooled<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        x.with_latents(|x| self.heads.run(x, out, None, workspace))
    }

    fn reference(&self, x: Pooled<'_, T>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.out)
    }

    fn cost(&self, x: Pooled<'_, T>) -> Result<Cost> {
        x.with_latents(|x| self.heads.cost(&x))
    }
}

/// That of [`Mla`](crate::latent::Mla) with tokens as latents.
impl<T: Element> Bounded<Pooled<'_, T>> for EfficientProbing {
    fn error_bound(&self, x: Pooled<'_, T>) -> Result<Array3<f64>> {
        Ok(self.define(&x)?.bound)
    }
}

impl<T: Element> Weights<Pooled<'_, T>> for EfficientProbing {
    fn scores(&self, x: Pooled<'_, T>) -> Result<Array4<f32>> {
        x.with_latents(|x| self.heads.with_weights(&x, weights::scores))
    }

    fn reference_scores(&self, x: Pooled<'_, T>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.scores)
    }

    fn weights(&self, x: Pooled<'_, T>) -> Result<Array4<f32>> {
        x.with_latents(|x| self.heads.with_weights(&x, weights::materialize))
    }

    fn key_weights(&self, x: Pooled<'_, T>) -> Result<Array3<f32>> {
        x.with_latents(|x| self.heads.with_weights(&x, weights::sum_over_queries))
    }

    fn top_weights(&self, x: Pooled<'_, T>, count: usize) -> Result<TopWeights> {
        x.with_latents(|x| self.heads.with_weights(&x, |call| weights::top(call, count)))
    }

    fn reference_weights(&self, x: Pooled<'_, T>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.weights)
    }
}

exhibit! {
    ProbingExhibit of EfficientProbing, "latent", "efficient probing", "arXiv 2506.10178";
    "learned queries pool tokens as they are, each its own slice of the values";
    not "where keys need a projection of their own: attention pooling";
    tokens false;
    build(x, _) {
        x.dims()?;
        EfficientProbing::builder()
    }
    extras(x, _) {
        // A token is the keys and the values of all heads; queries are those of
        // the first sequence, and see the keys of their own.
        let ((batch, kv_heads, len, dim), value) = (x.k.dim(), x.v.dim().3);
        let ((_, heads, n, _), keys) = (x.q.dim(), kv_heads * dim);
        let latents = Array3::from_shape_fn((batch, len, keys + kv_heads * value), |(b, j, c)| {
            match c.checked_sub(keys) {
                None => x.k[[b, c / dim, j, c % dim]],
                Some(c) => x.v[[b, c / value, j, c % value]],
            }
        });
        let (group, width) = ((heads / kv_heads.max(1)).max(1), latents.dim().2);
        let queries = Array3::from_shape_fn((heads, n, width), |(h, i, c)| {
            let own = c >= h / group * dim && c < (h / group + 1) * dim && batch > 0;
            if own { x.q[[0, h, i, c - h / group * dim]] } else { T::default() }
        });
        let w_v = Array3::from_shape_fn((heads, value, width), |(h, c, l)| {
            T::from_f32(f32::from(l == keys + h / group * value + c))
        });
        Extras { latents, matrices: [queries, w_v], ..Extras::default() }
    }
    input<'a, T>(_, extras) -> Pooled<'a, T> {
        Pooled::new(extras.latents.view(), extras.matrices[0].view(), extras.matrices[1].view())
    }
}
carded!(EfficientProbing, ProbingExhibit);

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::testing::{noise, within};

    fn array<T: Element>(dim: (usize, usize, usize), seed: u64) -> Array3<T> {
        let mut next = noise(seed);
        Array3::from_shape_simple_fn(dim, || T::from_f32(next()))
    }

    fn keeps<T: Element>() {
        for [batch, len, c, queries, n, d] in [
            [2, 196, 40, 8, 1, 5],
            [1, 1, 3, 1, 1, 3],
            [3, 0, 8, 2, 2, 4],
            [0, 5, 8, 2, 1, 4],
            [2, 9, 0, 2, 1, 0],
        ] {
            let (tokens, u) = (array::<T>((batch, len, c), 1), array((queries, n, c), 2));
            let w_v = array((queries, d, c), 3);
            let x = Pooled::new(tokens.view(), u.view(), w_v.view());
            let lengths: Vec<usize> = (0..batch).map(|b| len / (b + 1)).collect();
            for isa in Isa::available() {
                let probing = EfficientProbing::builder().isa(isa).build().unwrap();
                for x in [x, x.lengths(&lengths)] {
                    let (want, bound) = (probing.reference(x).unwrap(), probing.error_bound(x).unwrap());
                    within("pooled", &probing.forward(x).unwrap(), &want, &bound);
                }
            }
        }
    }

    #[test]
    fn kernel_keeps_to_the_definition() {
        keeps::<f32>();
        keeps::<f16>();
    }

    /// Queries of 0 are mean pooling of projected values; queries may change
    /// places.
    #[test]
    fn no_queries_are_mean_pooling() {
        let (tokens, w_v) = (array::<f32>((1, 30, 6), 4), array::<f32>((3, 2, 6), 5));
        let none = Array3::<f32>::zeros((3, 1, 6));
        let probing = EfficientProbing::builder().build().unwrap();
        let out = probing.forward(Pooled::new(tokens.view(), none.view(), w_v.view())).unwrap();
        let mean = tokens.mean_axis(Axis(1)).unwrap();
        for ((_, m, _, c), got) in out.indexed_iter() {
            let want = w_v.slice(s![m, c, ..]).iter().zip(mean.row(0)).map(|(a, b)| a * b).sum::<f32>();
            assert!((got - want).abs() < 1e-6);
        }
        let u = array::<f32>((3, 1, 6), 6);
        let of = |order: [usize; 3]| {
            let (u, w_v) = (u.select(Axis(0), &order), w_v.select(Axis(0), &order));
            probing.forward(Pooled::new(tokens.view(), u.view(), w_v.view())).unwrap()
        };
        assert_eq!(of([2, 0, 1]), of([0, 1, 2]).select(Axis(1), &[2, 0, 1]));
    }

    #[test]
    fn refusals() {
        let (tokens, u) = (array::<f32>((2, 9, 6), 1), array::<f32>((3, 1, 6), 2));
        let probing = EfficientProbing::builder().build().unwrap();
        let refusal = |x| probing.forward(x).unwrap_err().to_string();
        let w_v = array::<f32>((3, 2, 5), 3);
        let message = refusal(Pooled::new(tokens.view(), u.view(), w_v.view()));
        assert!(message.starts_with("w_v: expected shape [queries, d, C] = [3, _, 6]"), "{message}");
        let w_v = array::<f32>((3, 2, 6), 3);
        let message = refusal(Pooled::new(tokens.slice(s![.., .., ..5]), u.view(), w_v.view()));
        assert!(message.starts_with("tokens: expected shape [batch, len, C] = [_, _, 6]"), "{message}");
        let x = Pooled::new(tokens.view(), u.view(), w_v.view());
        assert!(refusal(x.lengths(&[10, 0])).starts_with("key_lengths: "));
    }
}
