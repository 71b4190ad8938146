//! Perfusion's key lock: projections of keys and values that are changed for a few
//! concepts, and cross-attention to a text.

use std::marker::PhantomData;

use ndarray::{Array1, Array2, ArrayView2, ArrayView3, ArrayView4, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, Lengths, Qkv, check_lengths};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
pub use crate::stages::edit::{Concept, inverse_moments};
use crate::stages::edit::{Edits, Gate};
use crate::stages::options::{FINITE, POSITIVE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

views! {
    /// Queries of an image, and encodings of a text.
    Prompted<'a, T> {
        /// `[batch, q_heads, q_len, head_dim]`
        q: array ArrayView4<'a, T>,
        /// `[batch, len, C]`
        text: array ArrayView3<'a, T>,
        /// Tokens of each text; `Full` for all.
        lengths: shared Lengths<'a>,
        /// Elements of a value.
        value_dim: shared usize,
    }
    lengths(x) x.lengths;
    dims(x) {
        let ((batch, heads, q_len, head_dim), (texts, kv_len, _)) = (x.q.dim(), x.text.dim());
        if texts != batch {
            return Err(Error::shape("text", format!("[batch, len, C] = [{batch}, _, _]"), x.text.shape()));
        }
        match x.lengths {
            Lengths::Full => {}
            Lengths::Keys(lengths) => check_lengths(("lengths", lengths), batch, ("len", kv_len))?,
            _ => return Err(Error::packed("a text for each image")),
        }
        let (kv_heads, value_dim) = (heads, x.value_dim);
        Dims { batch, q_heads: heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed: false }.checked()
    }
}

/// Perfusion's key lock: projections of keys and values that are changed for a few
/// concepts, and cross-attention to a text.
///
/// ```text
/// s_c = e . C^-1 i_c,   E_c = i_c . C^-1 i_c,   g_c = sigmoid((s_c / E_c - b) / t)
/// h   = W e' + sum_c g_c o_c       e' = e - what lies in the span of all i_c, by C^-1
/// o_n = sum_e softmax_e(scale q_n . h_e^K) h_e^V
/// ```
///
/// "Key-Locked Rank One Editing for Text-to-Image Personalization" (arXiv 2305.01644). `e`
/// are encodings of tokens and `C` is what encodings of many texts have as second
/// moments ([`inverse_moments`]); of concepts at right angles by `C^-1`, `e' = e - sum_c
/// (s_c / E_c) i_c`. A concept's key is locked to that of its superclass; its
/// value is learned. Models are trained with `b` 0.75 and `t` 0.1; for pictures, `b` is
/// from 0.6 to 0.75 and `t` 0.15.
///
/// A token that has nothing of a concept still lets `sigmoid(-b / t)` of it through: 0.009
/// by default. Where a concept's gate is open for its own encoding, that becomes `o`.
///
/// Cost: the projections of a text, `2 C (head_dim + value_dim)` flops a token and
/// key/value head, and attention. The change is of a few columns: `e'` is in the matrix.
///
/// Cross-attention to a text with changed concepts.
///
/// ```
/// use attention_kernels::Attention;
/// use attention_kernels::dense::{Concept, KeyLock, Prompted};
/// use attention_kernels::input::Lengths;
/// use ndarray::{Array1, Array2, Array3, Array4};
///
/// let at = |r: usize, c: usize| ((r + 1) as f32 * (c + 2) as f32).sin();
/// // Encodings of 8 numbers; 2 heads of 4.
/// let (keys, values) = (Array2::from_shape_fn((8, 8), |(r, c)| at(r, c)), Array2::<f32>::eye(8));
/// let teddy = Concept {
///     input: Array1::from_shape_fn(8, |c| at(3, c)),
///     key: Array1::from_shape_fn(8, |c| at(5, c)),
///     value: Array1::from_elem(8, 2.0),
/// };
/// let lock = KeyLock::builder(keys.view(), values.view(), 2).concepts(Array2::eye(8).view(), &[teddy]);
/// let (q, text) = (Array4::<f32>::ones((1, 2, 64, 4)), Array3::ones((1, 7, 8)));
/// let x = Prompted { q: q.view(), text: text.view(), lengths: Lengths::Full, value_dim: 4 };
/// assert_eq!(lock.build()?.forward(x)?.dim(), (1, 2, 64, 4));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KeyLock {
    attend: Config<Unmasked, Plain>,
    kv_heads: usize,
    edits: Edits,
}

impl KeyLock {
    /// Of projections `[kv_heads * head_dim, C]` and `[kv_heads * value_dim, C]`.
    pub fn builder(
        keys: ArrayView2<'_, f32>,
        values: ArrayView2<'_, f32>,
        kv_heads: usize,
    ) -> KeyLockBuilder {
        let [keys, values] = [keys, values].map(|x| x.as_standard_layout().into_owned());
        KeyLockBuilder::with(keys, values, kv_heads)
    }
}

options! {
    /// Builds a [`KeyLock`].
    KeyLockBuilder of KeyLock, isa;
    given { keys: Array2<f32>, in FINITE; values: Array2<f32>, in FINITE; kv_heads: usize; }
    own {
        metric: Array2<f64> = Array2::zeros((0, 0)), in FINITE;
        concepts: Vec<Concept> = Vec::new();
    }
    numbers {
        /// `b`, the share from which on a token counts as the concept. Default: 0.7.
        bias: f32 = 0.7, in FINITE;
        /// `t`. Default: 0.15.
        temperature: f32 = 0.15, in POSITIVE;
    }
    build(this, config) {
        let KeyLockBuilder { keys, values, kv_heads, metric, concepts, bias, temperature, .. } = this;
        let width = keys.dim().1;
        for (argument, (rows, columns)) in [("keys", keys.dim()), ("values", values.dim())] {
            if columns != width || !rows.is_multiple_of(kv_heads) {
                let expected = format!("[kv_heads * dim, C] of {kv_heads} heads, with C {width}");
                return Err(Error::shape(argument, expected, &[rows, columns]));
            }
        }
        let edits = Edits::new([keys, values], &metric, &concepts, Gate { bias, temperature })?;
        let options = Options { mask: Unmasked, score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(KeyLock { attend: options.build()?, kv_heads, edits })
    }
}

impl KeyLockBuilder {
    /// `C^-1`, `[C, C]`, and what is changed.
    pub fn concepts(self, metric: ArrayView2<'_, f64>, concepts: &[Concept]) -> Self {
        Self { metric: metric.to_owned(), concepts: concepts.to_vec(), ..self }
    }

    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }
}

impl KeyLock {
    fn checked<T: Element>(&self, x: &Prompted<'_, T>) -> Result<Dims> {
        let (dims, heads) = (self.attend.checked(x.dims()?)?, self.kv_heads);
        if !dims.q_heads.is_multiple_of(heads) {
            return Err(Error::value("q", format!("heads for each of {heads}"), dims.q_heads));
        }
        let [keys, values, width] = self.edits.sides();
        if x.text.dim().2 != width {
            return Err(Error::shape("text", format!("[batch, len, C] with C {width}"), x.text.shape()));
        }
        for (argument, rows, dim) in [("q", keys, dims.head_dim), ("value_dim", values, dims.value_dim)] {
            if let Some(own) = rows.checked_div(heads).filter(|&own| own != dim) {
                return Err(Error::value(argument, format!("rows of {own}"), dim));
            }
        }
        Ok(Dims { kv_heads: heads, ..dims })
    }
}

impl<T: Element> Pipeline<Prompted<'_, T>> for KeyLock {
    type State = ();

    fn flow(
        &self,
        x: Prompted<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (dims, x) = (self.checked(&x)?, x.reborrow());
        let [keys, values] = self.edits.run(pass, self.attend.isa(), x.text.insert_axis(Axis(1)))?;
        let k = keys.of_heads(dims.kv_heads, dims.head_dim);
        let v = values.of_heads(dims.kv_heads, dims.value_dim);
        self.attend.attend(pass, Qkv { q: x.q, k, v, lengths: x.lengths, out: PhantomData::<T> }, out)
    }

    fn define<R: Real>(&self, x: Prompted<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, x) = (self.checked(&x)?, x.reborrow());
        let text = x.text.insert_axis(Axis(1));
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows::<R, T>(&x.q, &head.queries);
            let (e, own) = (head.rows::<R, T>(&text, &head.keys), head.of(dims.kv_heads));
            let k = self.edits.define(&e, 0, own, dims.head_dim);
            let v = self.edits.define(&e, 1, own, dims.value_dim);
            attend([&q, &k, &v], self.attend.scale(&dims), |_, _| true, |_, _, score| score)
        });
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        self.edits.bytes()
    }
}

composite!(KeyLock, Prompted);

exhibit! {
    KeyLockExhibit of KeyLock, "dense", "key lock", "arXiv 2305.01644";
    "cross-attention to a text, of which a few concepts have keys and values of their own";
    not "where nothing is personalised: dense attention on the projections";
    tokens false;
    build(x, field) {
        let ((_, heads, _, dim), value_dim) = (x.k.dim(), x.v.dim().3);
        let width = heads.saturating_mul(dim);
        let matrix = |which, rows| Array2::from_shape_fn((rows, width), |(r, c)| field.at(which, r, 0, c));
        let row = |which, n: usize, c: usize| Array1::from_shape_fn(n, |d| field.at(which, c, 0, d));
        // As many as there is room for.
        let concepts: Vec<Concept> = (0..width.min(2))
            .map(|c| Concept { input: row(3, width, c), key: row(4, width, c), value: row(5, heads * value_dim, c) })
            .collect();
        let (keys, values) = (matrix(1, width), matrix(2, heads * value_dim));
        KeyLock::builder(keys.view(), values.view(), heads).concepts(Array2::eye(width).view(), &concepts)
    }
    extras(x, _) { Extras { latents: Extras::tokens(x), ..Extras::default() } }
    input<'a, T>(x, extras) -> Prompted<'a, T> {
        Prompted { q: x.q, text: extras.latents.view(), lengths: x.lengths, value_dim: x.v.dim().3 }
    }
}
carded!(KeyLock, KeyLockExhibit);

#[cfg(test)]
mod tests;
