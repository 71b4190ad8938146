//! SimPool: tokens are pooled by their mean, or by queries.

use ndarray::{Array1, Array3, ArrayView4, Axis};

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::number::{Likely, Real};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::reading::Pooling;
use crate::input::{Lengths, Qkv};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::stages::affine::Affine;
use crate::stages::attend::{Config, Options};
use crate::stages::norm::LayerNorm;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::pooling::{self, showing};
use crate::stages::reading::Linear;
use crate::stages::{row, side};

/// SimPool: a row for all tokens of a sequence, by their mean or by
/// [queries](Pooling::queries).
///
/// ```text
/// score_n = (W_Q mean x) . (W_K z_n) / sqrt(dim)        z_n = norm(x_n)
/// o       = sum_n softmax_n(score_n) z_n
/// ```
///
/// "Keep It SimPool: Who Said Supervised Transformers Suffer from Attention Deficit?"
/// (arXiv 2309.06891). The powers of values are left out, which subtract the least number
/// of a whole batch; a class token may be given for the mean.
///
/// Cost: `4 C` flops a token of `C` elements and query; queries go through both
/// projections, tokens through none. Error bounds are likely errors, as those of
/// [`Perceiver`](super::Perceiver).
///
/// ```
/// use attention_kernels::{Attention, latent::{LayerNorm, Pooling, SimPool}};
/// use ndarray::{Array1, Array2, Array4};
///
/// let w = || (Array2::from_elem((32, 32), 0.1), None);
/// let norm = LayerNorm { gain: Array1::ones(32), shift: Array1::zeros(32) };
/// let tokens = Array4::from_shape_fn((2, 1, 50, 32), |(_, _, n, c)| ((n * c) as f32).sin());
/// let out = SimPool::builder(norm, w(), w()).build()?.forward(Pooling::new(tokens.view()))?;
/// assert_eq!(out.dim(), (2, 1, 1, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SimPool {
    attend: Config<Unmasked, Plain>,
    norm: LayerNorm,
    /// For definitions.
    projections: [Affine; 2],
    /// `W_K^T W_Q`
    query: Affine,
}

impl SimPool {
    /// A norm of tokens, and the projections `W_Q` and `W_K`. A bias of the latter
    /// changes nothing.
    pub fn builder(norm: LayerNorm, query: Linear, key: Linear) -> SimPoolBuilder {
        SimPoolBuilder::with(norm, query, key)
    }
}

options! {
    /// Builds a [`SimPool`].
    SimPoolBuilder of SimPool, isa;
    given { norm: LayerNorm; query: Linear; key: Linear; }
    own { scale: Option<f32> = None, in FINITE; }
    build(this, config) {
        let ((query, bias), (key, key_bias)) = (&this.query, &this.key);
        let projections =
            [Affine::new("query", query, bias.as_ref())?, Affine::new("key", key, key_bias.as_ref())?];
        if projections[0].sides()[1] != projections[1].sides()[1] {
            let expected = format!("[{}, dim] as query has it", query.dim().0);
            return Err(Error::shape("key", expected, key.shape()));
        }
        let turned = key.t().mapv(f64::from);
        let absorbed = turned.dot(&query.mapv(f64::from)).mapv(|x| x as f32);
        let bias = bias.as_ref().map(|bias| turned.dot(&bias.mapv(f64::from)).mapv(|x| x as f32));
        let scale = this.scale.or(Some((query.dim().0.max(1) as f32).powf(-0.5)));
        let options = Options { scale, isa: Some(config.isa), ..Options::default() };
        let norm = this.norm.checked("norm", key.dim().1)?;
        let query = Affine::new("query", &absorbed, bias.as_ref())?;
        Ok(SimPool { attend: options.build()?, norm, projections, query })
    }
}

impl SimPoolBuilder {
    /// The factor of scores. Default: `1 / sqrt(dim)` of what projections make.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl<T: Element> Pipeline<Pooling<'_, T>> for SimPool {
    type State = ();

    fn flow(
        &self,
        x: Pooling<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dim = self.norm.gain.len();
        pooling::check(&x, Some(dim), dim)?;
        let (isa, (batch, _, len, _)) = (self.attend.isa(), x.tokens.dim());
        let tokens = side::run(pass, isa, x.tokens.reborrow())?;
        let mut values = pass.rows(tokens.dim())?;
        row::run(pass, isa, tokens.view(), &self.norm, values.view_mut());
        let q = match &x.queries {
            Some(queries) => self.query.run(pass, isa, queries.reborrow().insert_axis(Axis(1)))?,
            None => {
                // Scores of keys of no elements are 0: all weigh the same.
                let mut mean = pass.rows((batch, 1, 1, dim))?;
                let none = |len| ArrayView4::from_shape((batch, 1, len, 0), &[][..]).ok();
                let (Some(q), Some(k)) = (none(1), none(len)) else {
                    return Err(Error::too_large("tokens", format_args!("{batch} times {len}")));
                };
                let lengths = x.lengths.map_or(Lengths::Full, Lengths::Keys);
                let call = Qkv { lengths, ..Qkv::<f32>::new(q, k, tokens.view()) };
                self.attend.attend(pass, call, mean.view_mut())?;
                self.query.run(pass, isa, mean.view())?
            }
        };
        pooling::pool(&self.attend, pass, &x, [values.view(), values.view()], q.view(), out)
    }

    fn define<R: Real>(&self, x: Pooling<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dim = self.norm.gain.len();
        pooling::check(&x, Some(dim), dim)?;
        let out = pooling::define(&x, |tokens, queries| {
            let (values, count) = (row::define(&self.norm, tokens), R::of(tokens.dim().0.max(1) as f64));
            let mean = || -> Array1<R> {
                tokens.columns().into_iter().map(|x| (R::sum(x.iter().copied()) / count).stored()).collect()
            };
            let from = queries.unwrap_or_else(|| mean().insert_axis(Axis(0)));
            let [q, k] =
                [(&self.projections[0], &from), (&self.projections[1], &values)].map(|(w, x)| w.define(x));
            attend([&q, &k, &values], self.attend.scale_of(1), |_, _| true, |_, _, score| score)
        })?;
        Ok((out, ()))
    }

    fn bound(&self, x: Pooling<'_, T>) -> Result<Array3<f64>> {
        self.bound_by::<Likely>(x)
    }

    fn parameters(&self) -> usize {
        self.query.bytes() + 2 * self.norm.gain.len() * size_of::<f32>()
    }
}

composite!(SimPool, Pooling);

exhibit! {
    SimPoolExhibit of SimPool, "latent", "SimPool", "arXiv 2309.06891";
    "values of all heads are pooled behind a norm by queries, or by their mean";
    not "where several queries must each pool a part of the values: efficient probing";
    tokens false;
    build(x, field) {
        x.dims()?;
        let dim = x.q.dim().1.saturating_mul(x.v.dim().3);
        let norm = |which| Array1::from_shape_fn(dim, |c| 0.3 * field.at(which, 0, 0, c));
        let norm = LayerNorm { gain: norm(4) + 1.0, shift: norm(5) };
        SimPool::builder(norm, showing::layer(field, 1, [24, dim]), showing::layer(field, 2, [24, dim]))
    }
    extras(x, field) { showing::arrays(x, field, x.q.dim().1 * x.v.dim().3) }
    input<'a, T>(_, extras) -> Pooling<'a, T> { Pooling::new(extras.values.view()).queries(extras.latents.view()) }
}
carded!(SimPool, SimPoolExhibit);

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::attention::Attention;
    use crate::testing::arrays::{array, linear};
    use crate::testing::qkv::{close, error, held, refused};

    fn norm(dim: usize) -> LayerNorm {
        LayerNorm { gain: array(7, dim) + 1.5, shift: array(8, dim) }
    }

    fn sim_pool(dim: usize) -> SimPool {
        SimPool::builder(norm(dim), linear(1, [12, dim]), linear(2, [12, dim])).build().unwrap()
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        for (batch, heads, len, dim, n) in
            [(2, 2, 130, 9, 3), (3, 1, 1, 20, 1), (2, 1, 0, 5, 2), (0, 1, 4, 5, 1)]
        {
            let c = heads * dim;
            let lengths: Vec<usize> = (0..batch).map(|b| len / (b + 1)).collect();
            let (tokens, wide) = (array(1, (batch, heads, len, dim)), array(3, (batch, n, c)));
            let x = Pooling::new(tokens.view());
            for x in [x, x.lengths(&lengths), x.queries(wide.view())] {
                held(&sim_pool(c), x);
            }
        }
    }

    /// A norm without a gain pools its shift; a bias of what makes keys changes nothing.
    #[test]
    fn no_scores_are_a_mean() {
        let tokens = array(1, (2, 1, 30, 8));
        let x = Pooling::new(tokens.view());
        let plain = LayerNorm { gain: Array1::zeros(8), shift: array(9, 8) };
        let constant = SimPool::builder(plain, linear(1, [12, 8]), linear(2, [12, 8])).build().unwrap();
        let shift: Array1<f64> = array(9, 8).mapv(f64::from);
        let out = constant.reference(x).unwrap();
        assert!(out.rows().into_iter().all(|row| row.iter().zip(&shift).all(|(a, b)| (a - b).abs() < 1e-12)));
        let (weights, _) = linear(2, [12, 8]);
        let without = SimPool::builder(norm(8), linear(1, [12, 8]), (weights, None)).build().unwrap();
        close(&without.reference(x).unwrap(), &sim_pool(8).reference(x).unwrap(), 1e-12);
        // The mean as a query that is given.
        let q = tokens.mean_axis(Axis(2)).unwrap();
        close(&sim_pool(8).reference(x.queries(q.view())).unwrap(), &sim_pool(8).reference(x).unwrap(), 1e-6);
    }

    /// Padding, NaN or not, is not pooled; what is not there at all is 0.
    #[test]
    fn padding_is_not_pooled() {
        let mut tokens = array(1, (2, 1, 30, 8));
        tokens.slice_mut(s![.., .., 20.., ..]).fill(f32::NAN);
        let got = sim_pool(8).forward(Pooling::new(tokens.view()).lengths(&[20, 0])).unwrap();
        assert!(got.iter().all(|x| x.is_finite()) && got.slice(s![1, .., .., ..]).iter().all(|&x| x == 0.0));
    }

    #[test]
    fn refusals() {
        let tokens = array(1, (2, 2, 30, 8));
        let want = "lengths: expected 2 lengths of at most 30, got [31, 0]";
        assert_eq!(refused(&sim_pool(16), Pooling::new(tokens.view()).lengths(&[31, 0])), want);
        let key = error(SimPool::builder(norm(8), linear(1, [12, 8]), linear(2, [11, 8])).build());
        assert_eq!(key, "key: expected shape [12, dim] as query has it, got [11, 8]");
    }
}
