//! PILL's modality attention gating: what tokens of an image say counts as much as a
//! gate of each head lets it.

use ndarray::{Array2, ArrayView2, ArrayView3, Axis, s};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Qkv};
use crate::mask::Causal;
use crate::score::Plain;
use crate::stages::affine::Affine;
use crate::stages::attend::{Config, Options};
use crate::stages::gate;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::row::{self, Activation};

views! {
    /// Queries, keys and values, the tokens that they come from, and which of these are
    /// of images.
    WithImages<'a, T> {
        /// What is attended to.
        qkv: array Qkv<'a, T>,
        /// `[batch, kv_len, C]`
        tokens: array ArrayView3<'a, T>,
        /// `[batch, kv_len]`
        images: array ArrayView2<'a, bool>,
    }
    lengths(x) x.qkv.lengths;
    dims(x) {
        let (dims, (batch, _, len, _)) = (x.qkv.dims()?, x.qkv.k.dim());
        if (x.tokens.dim().0, x.tokens.dim().1) != (batch, len) {
            let expected = format!("[batch, kv_len, C] = [{batch}, {len}, _]");
            return Err(Error::shape("tokens", expected, x.tokens.shape()));
        }
        if x.images.dim() != (batch, len) {
            let expected = format!("[batch, kv_len] = [{batch}, {len}]");
            return Err(Error::shape("images", expected, x.images.shape()));
        }
        Ok(dims)
    }
}

/// PILL's modality attention gating: what tokens of an image say counts as much as a
/// gate of each head lets it.
///
/// ```text
/// g_j = tanh(w . x_j)  where token j is of an image,  1 elsewhere
/// o_i = sum_j softmax_j(scale q_i . k_j) g_j v_j       causal
/// ```
///
/// "PILL: Plug Into LLM with Adapter Expert and Attention Gate" (arXiv 2311.02126). `w`
/// starts at 0: images then say nothing, but they take their share of the weight, for
/// keys have no gate. Queries and keys come with their rotary positions.
///
/// Gates belong to values: a cache keeps values that have been gated, and what decodes
/// over it is causal attention alone.
///
/// Cost: that of causal attention, `2 C` flops a token and head for the gates of `C`
/// elements, and a copy of the values.
///
/// Causal attention with gates of values of images.
///
/// ```
/// use attention_kernels::dense::{Pill, WithImages};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array2, Array3, Array4};
///
/// let (x, tokens) = (Array4::<f32>::ones((1, 2, 50, 16)), Array3::ones((1, 50, 32)));
/// // The first 20 tokens are of an image; gates of both heads, as they start.
/// let images = Array2::from_shape_fn((1, 50), |(_, j)| j < 20);
/// let pill = Pill::builder(Array2::zeros((2, 32)).view()).build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = pill.forward(WithImages { qkv, tokens: tokens.view(), images: images.view() })?;
/// assert_eq!(out[[0, 0, 10, 0]], 0.0);
/// assert!((out[[0, 0, 39, 0]] - 0.5).abs() < 1e-6, "half of what it sees is an image");
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pill {
    attend: Config<Causal, Plain>,
    /// `[kv_heads, C]`
    weights: Array2<f32>,
    gates: Affine,
}

impl Pill {
    /// Gates of each key/value head, `[kv_heads, C]`.
    pub fn builder(gates: ArrayView2<'_, f32>) -> PillBuilder {
        PillBuilder::with(gates.as_standard_layout().into_owned())
    }
}

options! {
    /// Builds a [`Pill`].
    PillBuilder of Pill, isa;
    given { gates: Array2<f32>, in FINITE; }
    build(this, config) {
        let options = Options { mask: Causal::new(), score: Plain, scale: config.scale, isa: Some(config.isa) };
        let gates = Affine::new("gates", &this.gates, None)?;
        Ok(Pill { attend: options.build()?, weights: this.gates, gates })
    }
}

impl PillBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl Pill {
    fn checked<T: Element>(&self, x: &WithImages<'_, T>) -> Result<Dims> {
        let (dims, width) = (self.attend.checked(crate::input::Input::dims(x)?)?, x.tokens.dim().2);
        if self.weights.dim() == (dims.kv_heads, width) {
            return Ok(dims);
        }
        let expected = format!("[kv_heads, C] = [{}, {width}]", dims.kv_heads);
        Err(Error::shape("gates", expected, self.weights.shape()))
    }
}

impl<T: Element> Pipeline<WithImages<'_, T>> for Pill {
    type State = ();

    fn flow(
        &self,
        x: WithImages<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        self.checked(&x)?;
        let (isa, (_, heads, len, _)) = (self.attend.isa(), x.qkv.v.dim());
        let logits = self.gates.run(pass, isa, x.tokens.reborrow().insert_axis(Axis(1)))?;
        let mut gates = pass.rows(logits.dim())?;
        row::run(pass, isa, logits.view(), &Activation::Tanh, gates.view_mut());
        let mut v = pass.rows(x.qkv.v.dim())?;
        let gate = |row: usize| {
            let (b, head, j) = (row / len / heads, row / len % heads, row % len);
            if x.images[[b, j]] { gates.numbers()[(b * len + j) * gates.stride() + head] } else { 1.0 }
        };
        gate::run(pass, isa, x.qkv.v.reborrow(), &[], gate, v.view_mut());
        self.attend.attend_to(pass, x.qkv, v.view(), out)
    }

    fn define<R: Real>(&self, x: WithImages<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, x) = (self.checked(&x)?, x.reborrow());
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let q = head.rows::<R, T>(&x.qkv.q, &head.queries);
            let [k, mut v] = [&x.qkv.k, &x.qkv.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let weights = self.weights.row(head.of(dims.kv_heads));
            for (mut v, j) in v.outer_iter_mut().zip(head.keys.clone()) {
                if x.images[[head.batch, j]] {
                    let token = x.tokens.slice(s![head.batch, j, ..]);
                    let terms = token.into_iter().zip(weights);
                    let logit = R::dot(terms.map(|(x, &w)| (R::of(x.to_f64()), R::of(f64::from(w)))));
                    let gate = logit.stored().tanh();
                    v.mapv_inplace(|v| gate * v);
                }
            }
            let sees = |i: usize, j: usize| j + q.dim().0 <= k.dim().0 + i;
            attend([&q, &k, &v], self.attend.scale(&dims), sees, |_, _, score| score)
        });
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        self.gates.bytes()
    }
}

composite!(Pill, WithImages);

exhibit! {
    PillExhibit of Pill, "dense", "PILL", "arXiv 2311.02126";
    "causal, values of image tokens times a gate of their token and head";
    not "where images are in the text as trained tokens: causal alone";
    tokens false;
    build(x, field) {
        let (heads, width) = (x.k.dim().1, x.k.dim().1.saturating_mul(x.k.dim().3));
        Pill::builder(Array2::from_shape_fn((heads, width), |(h, c)| field.at(1, h, 0, c)).view())
    }
    extras(x, field) {
        // Two of three tokens.
        let images = Array2::from_shape_fn((x.k.dim().0, x.k.dim().2), |(_, j)| field.at(2, 0, j, 0) < 0.33);
        Extras { latents: Extras::tokens(x), images, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> WithImages<'a, T> {
        WithImages { qkv: x, tokens: extras.latents.view(), images: extras.images.view() }
    }
}
carded!(Pill, PillExhibit);

#[cfg(test)]
mod tests;
