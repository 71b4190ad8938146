//! AttnRes, attention over depth: what a layer takes in is a mean of the states that a
//! token had in earlier layers, by a softmax over these, instead of their sum.

use ndarray::{Array1, Array2, Array4, ArrayView1, ArrayView2, ArrayView4, ArrayView5, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::number::{Real, softmax};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, countable};
use crate::stages::depth::Depth;
use crate::stages::difference::RmsNorm;
use crate::stages::options::{FINITE, POSITIVE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

views! {
    /// What tokens were in earlier layers.
    States<'a, T> {
        /// `[states, batch, heads, len, dim]`; the paper has one head.
        states: array ArrayView5<'a, T>,
    }
    lengths(_) crate::input::Lengths::Full;
    dims(x) {
        let [count, batch, heads, len, dim] = std::array::from_fn(|axis| x.states.len_of(Axis(axis)));
        if !countable(&[count, batch, heads, len, dim, 1 << 10]) {
            return Err(Error::too_large("states", format_args!("{:?}", x.states.shape())));
        }
        let all = Dims {
            batch,
            q_heads: heads,
            kv_heads: heads,
            q_len: len,
            kv_len: len,
            head_dim: dim,
            value_dim: dim,
            packed: false,
        };
        all.checked()
    }
}

impl<'a, T> States<'a, T> {
    /// States `[states, batch, len, dim]`, of one head.
    pub fn new(states: ArrayView4<'a, T>) -> Self {
        Self { states: states.insert_axis(Axis(2)) }
    }

    /// States `[states, batch, heads, len, dim]`, each head of which has a norm and
    /// weights of its own.
    pub fn of_heads(states: ArrayView5<'a, T>) -> Self {
        Self { states }
    }
}

/// AttnRes, attention over depth: what a layer takes in is a mean of the states that a
/// token had in earlier layers, by a softmax over these, instead of their sum.
///
/// ```text
/// k_l = r_l / sqrt(mean r_l^2 + epsilon) * gain
/// p_l = softmax_l(scale * w . k_l),    o = sum_l p_l r_l     then o / sqrt(mean o^2 + epsilon) * gain'
/// ```
///
/// "Attention Residuals" (arXiv 2603.15031): each sublayer has a learned query `w`, which
/// starts at 0. In its block form the states are the embedding, the sums of finished
/// blocks of sublayers, and the sum of the block that runs:
///
/// ```
/// use attention_kernels::{Attention, dense::{AttnRes, States}};
/// use ndarray::{Array2, Array4, s};
///
/// let (size, sublayers, tokens, dim) = (2, 4, 3, 8);
/// let mix = AttnRes::builder(Array2::zeros((1, dim)).view()).build()?;
/// // The embedding, and a sum for each block.
/// let mut states = Array4::<f32>::zeros((1 + sublayers / size, 1, tokens, dim));
/// states.slice_mut(s![0, .., .., ..]).fill(1.0);
/// for n in 0..sublayers {
///     // At the start of a block there is no sum of it yet.
///     let there = 1 + n.div_ceil(size);
///     let input = mix.forward(States::new(states.slice(s![..there, .., .., ..])))?;
///     let output = input.mapv(f32::tanh); // attention, or a feed-forward layer
///     let mut sum = states.slice_mut(s![1 + n / size, .., .., ..]);
///     sum += &output.slice(s![.., 0, .., ..]);
/// }
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// Cost: `6 L dim` flops a token with `L` states, each of which is read once: the speed
/// of memory.
///
/// ```
/// use attention_kernels::{Attention, dense::{AttnRes, States}};
/// use ndarray::{Array2, Array4};
///
/// let states = Array4::from_shape_fn((3, 1, 10, 16), |(l, _, t, c)| ((l + t * (c + 3)) as f32).sin());
/// let w = Array2::from_shape_fn((1, 16), |(_, c)| (c as f32).cos());
/// let out = AttnRes::builder(w.view()).build()?.forward(States::new(states.view()))?;
/// assert_eq!(out.dim(), (1, 1, 10, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AttnRes {
    /// `[heads | 1, dim]`
    query: Array2<f32>,
    gain: Option<Array1<f32>>,
    depth: Depth,
}

impl AttnRes {
    /// `w`, `[heads | 1, dim]`.
    pub fn builder(query: ArrayView2<'_, f32>) -> AttnResBuilder {
        AttnResBuilder::with(query.as_standard_layout().into_owned())
    }
}

options! {
    /// Builds an [`AttnRes`].
    AttnResBuilder of AttnRes, isa;
    given { query: Array2<f32>, in FINITE; }
    own {
        gain: Option<Array1<f32>> = None, in FINITE;
        norm: Option<Array1<f32>> = None, in FINITE;
    }
    numbers {
        /// What is added to a mean square. Default: `1e-6`.
        epsilon: f32 = 1e-6, in POSITIVE;
    }
    build(this, config) {
        let (dim, query, epsilon) = (this.query.dim().1, this.query, this.epsilon);
        for (argument, gain) in [("gain", &this.gain), ("norm", &this.norm)] {
            if let Some(gain) = gain.as_ref().filter(|gain| gain.len() != dim) {
                return Err(Error::shape(argument, format!("[dim] = [{dim}]"), gain.shape()));
            }
        }
        let weights = this.gain.as_ref().map_or(query.clone(), |gain| &query * gain);
        let norm = this.norm.map(|norm| RmsNorm { weight: norm.to_vec(), epsilon });
        let scale = config.scale_or_one() as f32;
        Ok(AttnRes { query, gain: this.gain, depth: Depth { isa: config.isa, weights, scale, epsilon, norm } })
    }
}

impl AttnResBuilder {
    /// Factors of the norm before scores, `[dim]`. Default: 1.
    pub fn gain(self, gain: ArrayView1<'_, f32>) -> Self {
        Self { gain: Some(gain.to_owned()), ..self }
    }

    /// The output goes through a norm with these factors, `[dim]`. Default: it does not.
    pub fn norm(self, gain: ArrayView1<'_, f32>) -> Self {
        Self { norm: Some(gain.to_owned()), ..self }
    }

    /// The factor of scores. Default: 1.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl AttnRes {
    fn check<T: Element>(&self, x: &States<'_, T>) -> Result<()> {
        let (dims, (heads, dim)) = (x.dims()?, self.query.dim());
        if [1, dims.q_heads].contains(&heads) && dim == dims.head_dim {
            return Ok(());
        }
        let expected = format!("[heads | 1, dim] = [{} | 1, {}]", dims.q_heads, dims.head_dim);
        Err(Error::shape("query", expected, &[heads, dim]))
    }
}

impl<T: Element> Pipeline<States<'_, T>> for AttnRes {
    type State = ();

    fn flow(&self, x: States<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        self.check(&x)?;
        self.depth.run(pass, x.states.reborrow(), out);
        Ok(())
    }

    fn define<R: Real>(&self, x: States<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.check(&x)?;
        let (count, Depth { scale, epsilon, norm, .. }) = (x.states.shape()[0], &self.depth);
        let of = |x: f32| R::of(f64::from(x));
        let length = |row: &[R]| {
            let squares = R::dot(row.iter().map(|&x| (x, x)));
            (squares / R::of(row.len().max(1) as f64) + of(*epsilon)).sqrt()
        };
        let mut out = Array4::from_elem(x.out_dim()?, R::of(0.0));
        let (batch, heads, len, dim) = out.dim();
        for (b, h, t) in ndarray::indices((batch, heads, len)) {
            let row = |l: usize| -> Vec<R> {
                (0..dim).map(|c| R::of(x.states[[l, b, h, t, c]].to_f64())).collect()
            };
            let states: Vec<Vec<R>> = (0..count).map(row).collect();
            let head = if self.query.dim().0 == 1 { 0 } else { h };
            let score = |r: &Vec<R>| {
                let length = length(r);
                let gain = |c: usize| self.gain.as_ref().map_or(R::of(1.0), |gain| of(gain[c]));
                let key = |c: usize| r[c] / length * gain(c);
                R::dot((0..dim).map(|c| (of(self.query[[head, c]]), key(c)))) * of(*scale)
            };
            let weights = softmax(&states.iter().map(score).collect::<Vec<_>>());
            // A mean that runs over the states has some roundings for each.
            let mean =
                |c: usize| R::dot(weights.iter().zip(&states).map(|(&p, r)| (p, r[c]))).summed(8 * count);
            let mut mean: Vec<R> = (0..dim).map(mean).collect();
            if let Some(norm) = norm {
                let length = length(&mean);
                mean.iter_mut().zip(&norm.weight).for_each(|(x, &gain)| *x = *x / length * of(gain));
            }
            mean.into_iter().enumerate().for_each(|(c, x)| out[[b, h, t, c]] = x);
        }
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        (self.query.len() + self.depth.norm.as_ref().map_or(0, |norm| norm.weight.len())) * size_of::<f32>()
    }
}

composite!(AttnRes, States);

exhibit! {
    AttnResExhibit of AttnRes, "dense", "AttnRes", "arXiv 2603.15031";
    "a token reads what it was in earlier layers, here five values from its place back";
    not "where layers were trained to add up: their sum is one addition a layer";
    tokens false;
    build(x, field) {
        x.dims()?;
        let (heads, dim) = (x.q.dim().1.max(1), x.v.dim().3);
        let gain = Array1::from_shape_fn(dim, |c| 1.0 + 0.5 * field.at(2, 0, 0, c));
        let query = Array2::from_shape_fn((heads, dim), |(h, c)| field.at(1, h, 0, c));
        AttnRes::builder(query.view()).gain(gain.view()).norm(gain.view())
    }
    extras(x, _) {
        let ((batch, heads, len, _), (_, own, n, dim)) = (x.q.dim(), x.v.dim());
        // Counted from the last, so that the last queries alone are what they were.
        let at = |(b, h, row, c): (usize, usize, usize, usize)| {
            let (l, t) = (row / len, row % len);
            x.v[[b, h * own / heads, n - 1 - (len - 1 - t + l) % n, c]]
        };
        Extras { values: Array4::from_shape_fn((batch, heads, n.min(5) * len, dim), at), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> States<'a, T> {
        let ((batch, heads, rows, dim), len) = (extras.values.dim(), x.q.dim().2);
        let count = rows.checked_div(len).unwrap_or(0);
        let states = extras.values.view().into_shape_with_order((batch, heads, count, len, dim));
        States::of_heads(states.expect("rows as they were made").permuted_axes([2, 0, 1, 3, 4]))
    }
}
carded!(AttnRes, AttnResExhibit);

#[cfg(test)]
mod tests;
