//! Attentive pooling: a few rows for all tokens of a sequence.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView4, Axis, s};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::number::{Likely, Real};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::reading::Pooling;
use crate::input::{Input, Lengths, Qkv, countable};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::stages::affine::Affine;
use crate::stages::attend::{Config, Options};
use crate::stages::norm::LayerNorm;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::reading::Linear;
use crate::stages::row::{self, Activation, RowMap};
use crate::stages::{side, sum};

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

impl AbMilp {
    /// With these layers before the last, each followed by the activation.
    pub fn builder(layers: Vec<Linear>) -> AbMilpBuilder {
        AbMilpBuilder::with(layers)
    }
}

impl SimPool {
    /// A norm of tokens, and the projections `W_Q` and `W_K`. A bias of the latter
    /// changes nothing.
    pub fn builder(norm: LayerNorm, query: Linear, key: Linear) -> SimPoolBuilder {
        SimPoolBuilder::with(norm, query, key)
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

/// Refuses tokens of another width than `dim`, if that is known, and queries of another
/// than `width`.
fn check<T: Element>(x: &Pooling<'_, T>, dim: Option<usize>, width: usize) -> Result<()> {
    let (dims, (batch, heads, len, part)) = (x.dims()?, x.tokens.dim());
    let own = heads.checked_mul(part);
    if own.is_none() || dim.is_some_and(|dim| own != Some(dim)) {
        let expected = format!("heads and dim of {} elements together", dim.unwrap_or(usize::MAX));
        return Err(Error::shape("tokens", expected, x.tokens.shape()));
    }
    if let Some(queries) = x.queries.as_ref().filter(|queries| queries.dim().2 != width) {
        return Err(Error::shape("queries", format!("[batch, n, {width}]"), queries.shape()));
    }
    let wide = own.unwrap_or(0).saturating_add(width);
    if countable(&[batch, len.saturating_add(dims.q_len), wide, 1 << 10]) {
        return Ok(());
    }
    Err(Error::too_large("tokens", format_args!("{:?}", x.tokens.shape())))
}

/// Queries pool values `[batch, 1, len, dim]`, whose keys have scores.
fn pool<Q: Element, T: Element>(
    attend: &Config<Unmasked, Plain>,
    pass: &mut Pass<'_>,
    x: &Pooling<'_, T>,
    [k, v]: [ArrayView4<'_, f32>; 2],
    q: ArrayView4<'_, Q>,
    out: Out<'_, T>,
) -> Result<()> {
    let (_, heads, _, part) = x.tokens.dim();
    let mut read = pass.rows((v.dim().0, 1, q.dim().2, v.dim().3))?;
    let lengths = x.lengths.map_or(Lengths::Full, Lengths::Keys);
    let call = Qkv { lengths, ..Qkv::<Q, f32>::new(q, k, v) };
    attend.attend(pass, call.widened(), read.view_mut())?;
    sum::of(pass, attend.isa(), &[read.of_heads(heads, part)], out);
    Ok(())
}

/// The definition of one sequence at a time: what `define` makes of its tokens and queries.
fn define<R: Real, T: Element>(
    x: &Pooling<'_, T>,
    define: impl Fn(&Array2<R>, Option<Array2<R>>) -> Array2<R>,
) -> Result<Array4<R>> {
    let mut out = Array4::from_elem(x.out_dim()?, R::of(0.0));
    for (b, mut out) in out.outer_iter_mut().enumerate() {
        let len = x.lengths.map_or(x.tokens.dim().2, |lengths| lengths[b]);
        let queries = x.queries.as_ref().map(|q| q.index_axis(Axis(0), b).map(|x| R::of(x.to_f64())));
        side::spread(&define(&side::define(x.tokens.slice(s![b, .., ..len, ..])), queries), &mut out);
    }
    Ok(out)
}

/// What becomes of rows.
fn rows<R: Real>(map: &impl RowMap, x: &Array2<R>) -> Array2<R> {
    let made: Vec<Vec<R>> = x.rows().into_iter().map(|row| map.define(row)).collect();
    Array2::from_shape_fn(x.dim(), |(t, c)| made[t][c])
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
        pool(&self.attend, pass, &x, [keys.view(), tokens.view()], queries, out)
    }

    fn define<R: Real>(&self, x: Pooling<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.checked(&x)?;
        let out = define(&x, |tokens, queries| {
            let layer = |x: Array2<R>, layer: &Affine| rows(&self.activation, &layer.define(&x));
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

impl AbMilp {
    fn checked<'a, T: Element>(&self, x: &'a Pooling<'_, T>) -> Result<ArrayView4<'a, T>> {
        let dim = x.tokens.dim().1.saturating_mul(x.tokens.dim().3);
        let width = self.layers.last().map_or(dim, |last| last.sides()[1]);
        check(x, self.layers.first().map(|first| first.sides()[0]), width)?;
        let queries = x.queries.as_ref().map(|queries| queries.view().insert_axis(Axis(1)));
        queries.ok_or_else(|| Error::value("queries", "rows of the last layer", "none"))
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
        check(&x, Some(dim), dim)?;
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
        pool(&self.attend, pass, &x, [values.view(), values.view()], q.view(), out)
    }

    fn define<R: Real>(&self, x: Pooling<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dim = self.norm.gain.len();
        check(&x, Some(dim), dim)?;
        let out = define(&x, |tokens, queries| {
            let (values, count) = (rows(&self.norm, tokens), R::of(tokens.dim().0.max(1) as f64));
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

composite!(AbMilp, Pooling);
composite!(SimPool, Pooling);

/// A layer of an exhibit, and values of all heads as tokens with queries for them.
fn layer(field: &crate::card::Field, which: u64, [out, of]: [usize; 2]) -> Linear {
    let root = 1.0 / (of.max(1) as f32).sqrt();
    let weights = Array2::from_shape_fn((out, of), |(a, b)| root * field.at(which, a, b, 0));
    (weights, Some(Array1::from_shape_fn(out, |c| 0.3 * field.at(which, c, 0, 1))))
}

fn arrays<T: Element>(x: &Qkv<'_, T>, field: &crate::card::Field, width: usize) -> Extras<T> {
    let (batch, _, rows, _) = x.q.dim();
    // Counted from the last, so that the last queries alone are what they were.
    let at = |(_, i, c): (usize, usize, usize)| T::from_f32(2.0 * field.at(3, 0, rows - i, c));
    let latents = Array3::from_shape_fn((batch, rows, width), at);
    Extras { values: Extras::pixels(x), latents, ..Extras::default() }
}

exhibit! {
    AbMilpExhibit of AbMilp, "latent", "AbMILP", "arXiv 1802.04712";
    "values of all heads are pooled as a small network of them and some queries says";
    not "where the network of each token costs more than projections: SimPool";
    tokens false;
    build(x, field) {
        x.dims()?;
        AbMilp::builder(vec![layer(field, 1, [24, x.q.dim().1.saturating_mul(x.v.dim().3)])])
    }
    extras(x, field) { arrays(x, field, 24) }
    input<'a, T>(_, extras) -> Pooling<'a, T> { Pooling::new(extras.values.view()).queries(extras.latents.view()) }
}
carded!(AbMilp, AbMilpExhibit);

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
        SimPool::builder(norm, layer(field, 1, [24, dim]), layer(field, 2, [24, dim]))
    }
    extras(x, field) { arrays(x, field, x.q.dim().1 * x.v.dim().3) }
    input<'a, T>(_, extras) -> Pooling<'a, T> { Pooling::new(extras.values.view()).queries(extras.latents.view()) }
}
carded!(SimPool, SimPoolExhibit);

#[cfg(test)]
mod tests;
