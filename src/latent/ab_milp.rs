//! Attention-based multiple-instance pooling: tokens are pooled as a network of each says.

use ndarray::{Array2, Array3, ArrayView4, Axis};

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::number::{Likely, Real};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::reading::Pooling;
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::stages::affine::Affine;
use crate::stages::attend::{Config, Options};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::pooling::{self, showing};
use crate::stages::reading::Linear;
use crate::stages::row::{self, Activation};
use crate::stages::side;

/// Attention-based multiple-instance pooling: a few rows for all tokens of a sequence, by
/// a network of each token.
///
/// ```text
/// score_n = w . f(.. f(W_1 x_n + b_1) ..)        f = tanh
/// o       = sum_n softmax_n(score_n) x_n
/// ```
///
/// "Attention-based Deep Multiple Instance Learning" (arXiv 1802.04712). A bias of the last
/// layer is the same for all tokens and changes nothing. [Queries](Pooling::queries),
/// `[batch, n, hidden]`, are the rows `w` of the last layer: one in the paper.
///
/// Cost: `4 C` flops a token of `C` elements and query, and that of the network, `2 C hidden`.
/// Error bounds are likely errors, as those of [`Perceiver`](super::Perceiver).
///
/// ```
/// use attention_kernels::{Attention, latent::{AbMilp, Pooling}};
/// use ndarray::{Array1, Array2, Array3, Array4};
///
/// let layer = (Array2::from_elem((16, 32), 0.1), Some(Array1::zeros(16)));
/// let (tokens, w) = (Array4::<f32>::ones((2, 1, 50, 32)), Array3::ones((1, 1, 16)));
/// let x = Pooling::new(tokens.view()).queries(w.broadcast((2, 1, 16)).unwrap());
/// let out = AbMilp::builder(vec![layer]).build()?.forward(x)?;
/// assert_eq!(out.dim(), (2, 1, 1, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AbMilp {
    attend: Config<Unmasked, Plain>,
    layers: Vec<Affine>,
    activation: Activation,
}

impl AbMilp {
    /// With these layers before the last, each followed by the activation.
    pub fn builder(layers: Vec<Linear>) -> AbMilpBuilder {
        AbMilpBuilder::with(layers)
    }
}

options! {
    /// Builds an [`AbMilp`].
    AbMilpBuilder of AbMilp, isa;
    given { layers: Vec<Linear>; }
    own { activation: Activation = Activation::Tanh; }
    build(this, config) {
        let layer = |(weights, bias): &Linear| Affine::new("layers", weights, bias.as_ref());
        let layers: Vec<Affine> = this.layers.iter().map(layer).collect::<Result<_>>()?;
        if let Some(pair) = layers.windows(2).find(|pair| pair[0].sides()[1] != pair[1].sides()[0]) {
            let ([_, made], [takes, out]) = (pair[0].sides(), pair[1].sides());
            return Err(Error::shape("layers", format!("[_, {made}]"), &[out, takes]));
        }
        let options = Options { scale: Some(1.0), isa: Some(config.isa), ..Options::default() };
        Ok(AbMilp { attend: options.build()?, layers, activation: this.activation })
    }
}

impl AbMilpBuilder {
    /// What follows each of the layers. Default: [`Activation::Tanh`].
    pub fn activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }
}

impl AbMilp {
    fn checked<'a, T: Element>(&self, x: &'a Pooling<'_, T>) -> Result<ArrayView4<'a, T>> {
        let dim = x.tokens.dim().1.saturating_mul(x.tokens.dim().3);
        let width = self.layers.last().map_or(dim, |last| last.sides()[1]);
        pooling::check(x, self.layers.first().map(|first| first.sides()[0]), width)?;
        let queries = x.queries.as_ref().map(|queries| queries.view().insert_axis(Axis(1)));
        queries.ok_or_else(|| Error::value("queries", "rows of the last layer", "none"))
    }
}

impl<T: Element> Pipeline<Pooling<'_, T>> for AbMilp {
    type State = ();

    fn flow(
        &self,
        x: Pooling<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let queries = self.checked(&x)?;
        let isa = self.attend.isa();
        let tokens = side::run(pass, isa, x.tokens.reborrow())?;
        let mut made = None;
        for layer in &self.layers {
            let from = made.as_ref().unwrap_or(&tokens);
            let to = layer.run(pass, isa, from.view())?;
            let mut bent = pass.rows(to.dim())?;
            row::run(pass, isa, to.view(), &self.activation, bent.view_mut());
            made = Some(bent);
        }
        let keys = made.as_ref().unwrap_or(&tokens);
        pooling::pool(&self.attend, pass, &x, [keys.view(), tokens.view()], queries, out)
    }

    fn define<R: Real>(&self, x: Pooling<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.checked(&x)?;
        let out = pooling::define(&x, |tokens, queries| {
            let layer = |x: Array2<R>, layer: &Affine| row::define(&self.activation, &layer.define(&x));
            let hidden = self.layers.iter().fold(tokens.clone(), layer);
            let queries = queries.unwrap_or_else(|| Array2::from_elem((0, hidden.dim().1), R::of(0.0)));
            attend([&queries, &hidden, tokens], self.attend.scale_of(1), |_, _| true, |_, _, score| score)
        })?;
        Ok((out, ()))
    }

    fn bound(&self, x: Pooling<'_, T>) -> Result<Array3<f64>> {
        self.bound_by::<Likely>(x)
    }

    fn parameters(&self) -> usize {
        self.layers.iter().map(Affine::bytes).sum()
    }
}

composite!(AbMilp, Pooling);

exhibit! {
    AbMilpExhibit of AbMilp, "latent", "AbMILP", "arXiv 1802.04712";
    "values of all heads are pooled as a small network of them and some queries says";
    not "where the network of each token costs more than projections: SimPool";
    tokens false;
    build(x, field) {
        x.dims()?;
        AbMilp::builder(vec![showing::layer(field, 1, [24, x.q.dim().1.saturating_mul(x.v.dim().3)])])
    }
    extras(x, field) { showing::arrays(x, field, 24) }
    input<'a, T>(_, extras) -> Pooling<'a, T> { Pooling::new(extras.values.view()).queries(extras.latents.view()) }
}
carded!(AbMilp, AbMilpExhibit);

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::attention::Attention;
    use crate::testing::arrays::{array, linear};
    use crate::testing::qkv::{close, error, held, refused};

    #[test]
    fn kernels_keep_to_the_definition() {
        for (batch, heads, len, dim, n) in
            [(2, 2, 130, 9, 3), (3, 1, 1, 20, 1), (2, 1, 0, 5, 2), (0, 1, 4, 5, 1)]
        {
            let c = heads * dim;
            let lengths: Vec<usize> = (0..batch).map(|b| len / (b + 1)).collect();
            let (tokens, q, wide) =
                (array(1, (batch, heads, len, dim)), array(2, (batch, n, 16)), array(3, (batch, n, c)));
            let x = Pooling::new(tokens.view());
            for layers in [vec![linear(4, [16, c])], vec![linear(4, [30, c]), linear(5, [16, 30])]] {
                for activation in [Activation::Tanh, Activation::Relu] {
                    let abmilp = AbMilp::builder(layers.clone()).activation(activation).build().unwrap();
                    held(&abmilp, x.queries(q.view()).lengths(&lengths));
                }
            }
            held(&AbMilp::builder(vec![]).build().unwrap(), x.queries(wide.view()));
        }
    }

    /// Scorers of 0 pool the mean.
    #[test]
    fn no_scores_are_a_mean() {
        let tokens = array(1, (2, 1, 30, 8));
        let x = Pooling::new(tokens.view());
        let mean = tokens.mapv(f64::from).mean_axis(Axis(2)).unwrap().insert_axis(Axis(2));
        let zeros = Array3::zeros((2, 1, 16));
        let abmilp = AbMilp::builder(vec![linear(4, [16, 8])]).build().unwrap();
        close(&abmilp.reference(x.queries(zeros.view())).unwrap(), &mean, 1e-12);
    }

    /// Padding, NaN or not, is not pooled; what is not there at all is 0.
    #[test]
    fn padding_is_not_pooled() {
        let (mut tokens, q) = (array(1, (2, 1, 30, 8)), array(2, (2, 3, 16)));
        tokens.slice_mut(s![.., .., 20.., ..]).fill(f32::NAN);
        let abmilp = AbMilp::builder(vec![linear(4, [16, 8])]).build().unwrap();
        let part = tokens.slice(s![.., .., ..20, ..]);
        let (padded, part) = (Pooling::new(tokens.view()).lengths(&[20, 0]), Pooling::new(part));
        let [got, want] = [padded, part].map(|x| abmilp.forward(x.queries(q.view())).unwrap());
        assert!(
            got.slice(s![0, .., .., ..])
                .iter()
                .zip(want.slice(s![0, .., .., ..]))
                .all(|(a, b)| (a - b).abs() < 1e-6)
        );
        assert!(got.slice(s![1, .., .., ..]).iter().all(|&x| x == 0.0));
    }

    #[test]
    fn refusals() {
        let (tokens, q) = (array(1, (2, 2, 30, 8)), array(2, (2, 3, 16)));
        let x = Pooling::new(tokens.view());
        let abmilp = |layers| AbMilp::builder(layers);
        let of = abmilp(vec![linear(4, [16, 15])]).build().unwrap();
        let want = "tokens: expected shape heads and dim of 15 elements together, got [2, 2, 30, 8]";
        assert_eq!(refused(&of, x.queries(q.view())), want);
        let of = abmilp(vec![linear(4, [15, 16])]).build().unwrap();
        let want = "queries: expected shape [batch, n, 15], got [2, 3, 16]";
        assert_eq!(refused(&of, x.queries(q.view())), want);
        assert_eq!(refused(&of, x), "queries: expected rows of the last layer, got none");
        let layers = error(abmilp(vec![linear(4, [15, 16]), linear(4, [3, 14])]).build());
        assert_eq!(layers, "layers: expected shape [_, 15], got [3, 14]");
    }
}
