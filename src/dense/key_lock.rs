//! Perfusion's key lock: projections of keys and values that are changed for a few
//! concepts, and cross-attention to a text.
//!
//! ```text
//! s_c = e . C^-1 i_c,   E_c = i_c . C^-1 i_c,   g_c = sigmoid((s_c / E_c - b) / t)
//! h   = W e' + sum_c g_c o_c       e' = e - what lies in the span of all i_c, by C^-1
//! o_n = sum_e softmax_e(scale q_n . h_e^K) h_e^V
//! ```
//!
//! "Key-Locked Rank One Editing for Text-to-Image Personalization" (arXiv 2305.01644). `e`
//! are encodings of tokens and `C` is what encodings of many texts have as second
//! moments ([`inverse_moments`]); of concepts at right angles by `C^-1`, `e' = e - sum_c
//! (s_c / E_c) i_c`. A concept's key is locked to that of its superclass; its
//! value is learned. Models are trained with `b` 0.75 and `t` 0.1; for pictures, `b` is
//! from 0.6 to 0.75 and `t` 0.15.
//!
//! A token that has nothing of a concept still lets `sigmoid(-b / t)` of it through: 0.009
//! by default. Where a concept's gate is open for its own encoding, that becomes `o`.
//!
//! Cost: the projections of a text, `2 C (head_dim + value_dim)` flops a token and
//! key/value head, and attention. The change is of a few columns: `e'` is in the matrix.

use std::marker::PhantomData;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayView3, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, Lengths, Qkv, check_lengths};
use crate::mask::Unmasked;
use crate::math::algebra::{eigen, solve};
use crate::score::Plain;
use crate::simd::Simd;
use crate::simd::exp::sigmoid;
use crate::stages::affine::Affine;
use crate::stages::attend::{Config, Options};
use crate::stages::options::{FINITE, POSITIVE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, Scratch, composite};
use crate::stages::row::{self, RowMap};
use crate::stages::sum;

views! {
    /// Queries of an image, and encodings of a text.
    Prompted<'a, T> {
        /// `[batch, q_heads, q_len, head_dim]`
        q: array ndarray::ArrayView4<'a, T>,
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

/// A concept.
#[derive(Clone, Debug, PartialEq)]
pub struct Concept {
    /// `i`, its encoding, `[C]`.
    pub input: Array1<f32>,
    /// `o` of keys, `[kv_heads * head_dim]`: what the superclass has.
    pub key: Array1<f32>,
    /// `o` of values, `[kv_heads * value_dim]`.
    pub value: Array1<f32>,
}

/// `C^-1` of encodings, `[n, C]`, with `C` the mean of their squares, not centred.
///
/// # Errors
/// Where they do not span all of `C`.
pub fn inverse_moments(encodings: ArrayView2<'_, f32>) -> Result<Array2<f64>> {
    let x = encodings.mapv(f64::from);
    let (values, vectors) = eigen((x.t().dot(&x) / x.dim().0.max(1) as f64).view());
    let [most, least] = [values.first(), values.last()].map(|x| x.copied().unwrap_or(1.0));
    if !(least > 1e-12 * most) {
        let expected = format!("finite ones that span all of {} dimensions", x.dim().1);
        return Err(Error::value("encodings", expected, format_args!("{} of them", x.dim().0)));
    }
    Ok((&vectors / &values).dot(&vectors.t()))
}

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
    weights: [Array2<f32>; 2],
    metric: Array2<f64>,
    concepts: Vec<Concept>,
    gate: Gate,
    /// `s_c / E_c`, of all concepts.
    shares: Affine,
    /// `W` of `e'`, and `o`.
    edited: [[Affine; 2]; 2],
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
        let (sides, n) = ([keys.dim(), values.dim()], concepts.len());
        let width = sides[0].1;
        for (argument, (rows, columns)) in [("keys", sides[0]), ("values", sides[1])] {
            if columns != width || !rows.is_multiple_of(kv_heads) {
                let expected = format!("[kv_heads * dim, C] of {kv_heads} heads, with C {width}");
                return Err(Error::shape(argument, expected, &[rows, columns]));
            }
        }
        if n > 0 && metric.dim() != (width, width) {
            return Err(Error::shape("metric", format!("[C, C] = [{width}, {width}]"), metric.shape()));
        }
        let most = metric.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        if let Some(x) = (&metric - &metric.t()).iter().find(|x| x.abs() > 1e-6 * most) {
            return Err(Error::value("metric", "a symmetric matrix", format_args!("{x} from row to column")));
        }
        for concept in &concepts {
            let parts = [&concept.input, &concept.key, &concept.value];
            if parts.map(|x| x.len()) != [width, sides[0].0, sides[1].0] {
                let expected = format!("input, key and value of {width}, {} and {}", sides[0].0, sides[1].0);
                return Err(Error::shape("concepts", expected, &parts.map(|x| x.len())));
            }
            if let Some(x) = parts.into_iter().flatten().find(|x| !x.is_finite()) {
                return Err(Error::value("concepts", "finite numbers", x));
            }
        }
        // Rows are C^-1 i_c, and the products of the concepts by C^-1.
        let inputs = Array2::from_shape_fn((n, width), |(c, d)| f64::from(concepts[c].input[d]));
        let seen = if n > 0 { inputs.dot(&metric.t()) } else { inputs.clone() };
        let products = seen.dot(&inputs.t());
        if let Some(energy) = products.diag().iter().find(|x| !(**x > 0.0 && x.is_finite())) {
            return Err(Error::value("metric", "a positive product of each concept with itself", energy));
        }
        let mut within = Array2::<f64>::zeros((n, width));
        for (d, mut column) in within.columns_mut().into_iter().enumerate() {
            column.assign(&Array1::from(solve(products.clone(), &seen.column(d).to_vec())));
        }
        let near = within.iter().all(|x| x.is_finite());
        if !near || basis(&inputs, &metric).is_none() {
            return Err(Error::value("concepts", "concepts none of which is made of others", n));
        }
        let shares = Array2::from_shape_fn((n, width), |(c, d)| (seen[[c, d]] / products[[c, c]]) as f32);
        let edit = |argument, weights: &Array2<f32>, of: fn(&Concept) -> &Array1<f32>| {
            let wide = weights.mapv(f64::from);
            let rest = (&wide - &wide.dot(&inputs.t()).dot(&within)).mapv(|x| x as f32);
            let outputs = Array2::from_shape_fn((wide.dim().0, n), |(r, c)| of(&concepts[c])[r]);
            Ok([Affine::new(argument, &rest, None)?, Affine::new("concepts", &outputs, None)?])
        };
        let edited = [edit("keys", &keys, |x| &x.key)?, edit("values", &values, |x| &x.value)?];
        let options = Options { mask: Unmasked, score: Plain, scale: config.scale, isa: Some(config.isa) };
        Ok(KeyLock {
            attend: options.build()?,
            kv_heads,
            weights: [keys, values],
            metric,
            concepts,
            gate: Gate { bias, temperature },
            shares: Affine::new("concepts", &shares, None)?,
            edited,
        })
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

/// Rows at right angles by the metric, of length 1, that span those of `inputs`; none
/// where these do not span as many dimensions.
fn basis(inputs: &Array2<f64>, metric: &Array2<f64>) -> Option<Array2<f64>> {
    let mut basis = inputs.clone();
    let product = |a: ArrayView1<'_, f64>, b: ArrayView1<'_, f64>| a.dot(&metric.dot(&b));
    for c in 0..inputs.dim().0 {
        let mut row = inputs.row(c).to_owned();
        let energy = product(row.view(), row.view());
        // Twice, for what rounding leaves of the first time.
        for before in (0..2).flat_map(|_| 0..c) {
            let by = product(row.view(), basis.row(before));
            row.scaled_add(-by, &basis.row(before));
        }
        let left = product(row.view(), row.view());
        if !(left > 1e-12 * energy) {
            return None;
        }
        basis.row_mut(c).assign(&(row / left.sqrt()));
    }
    Some(basis)
}

/// How far a concept is let in, of its share.
#[derive(Clone, Copy, Debug)]
struct Gate {
    bias: f32,
    temperature: f32,
}

impl RowMap for Gate {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        for x in row.chunks_mut(S::LANES) {
            let above = s.sub(s.load_tail(x), s.splat(self.bias));
            s.store_tail(x, sigmoid(s, s.div(above, s.splat(self.temperature))));
        }
    }

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R> {
        let [bias, temperature] = [self.bias, self.temperature].map(|x| R::of(f64::from(x)));
        x.iter().map(|&x| ((x - bias) / temperature).sigmoid().stored()).collect()
    }
}

impl KeyLock {
    fn checked<T: Element>(&self, x: &Prompted<'_, T>) -> Result<Dims> {
        let (dims, heads) = (self.attend.checked(x.dims()?)?, self.kv_heads);
        if !dims.q_heads.is_multiple_of(heads) {
            return Err(Error::value("q", format!("heads for each of {heads}"), dims.q_heads));
        }
        let [keys, width] = <[usize; 2]>::from(self.weights[0].dim());
        if x.text.dim().2 != width {
            return Err(Error::shape("text", format!("[batch, len, C] with C {width}"), x.text.shape()));
        }
        let sides = [("q", keys, dims.head_dim), ("value_dim", self.weights[1].dim().0, dims.value_dim)];
        for (argument, rows, dim) in sides {
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
        let (dims, isa) = (self.checked(&x)?, self.attend.isa());
        let x = x.reborrow();
        let text = x.text.insert_axis(Axis(1));
        let shares = self.shares.run(pass, isa, text.reborrow())?;
        let mut gates = pass.rows(shares.dim())?;
        row::run(pass, isa, shares.view(), &self.gate, gates.view_mut());
        let mut project = |[rest, outputs]: &[Affine; 2]| -> Result<Scratch<'_>> {
            let parts = [rest.run(pass, isa, text.reborrow())?, outputs.run(pass, isa, gates.view())?];
            let mut rows = pass.rows(parts[0].dim())?;
            sum::of(pass, isa, &parts.each_ref().map(Scratch::view), rows.view_mut());
            Ok(rows)
        };
        let [keys, values] = [project(&self.edited[0])?, project(&self.edited[1])?];
        let (k, v) =
            (keys.of_heads(dims.kv_heads, dims.head_dim), values.of_heads(dims.kv_heads, dims.value_dim));
        let x = Qkv { q: x.q, k, v, lengths: x.lengths, out: PhantomData::<T> };
        self.attend.attend(pass, x, out)
    }

    fn define<R: Real>(&self, x: Prompted<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.checked(&x)?;
        let (n, width) = (self.concepts.len(), self.weights[0].dim().1);
        let inputs = Array2::from_shape_fn((n, width), |(c, d)| f64::from(self.concepts[c].input[d]));
        let basis = basis(&inputs, &self.metric).unwrap_or_default();
        // What products by the metric are products with.
        let seen = |rows: &Array2<f64>| {
            if n > 0 { rows.dot(&self.metric.t()) } else { rows.clone() }
        };
        let (seen, seen_basis) = (seen(&inputs), seen(&basis));
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows::<R, T>(&x.q, &head.queries);
            let text = x.text.index_axis(Axis(0), head.batch);
            let project = |weights: &Array2<f32>, dim: usize, of: fn(&Concept) -> &Array1<f32>| {
                let first = head.of(dims.kv_heads) * dim;
                let mut rows = Array2::from_elem((head.keys.len(), dim), R::of(0.0));
                for (e, mut row) in text.rows().into_iter().zip(rows.rows_mut()) {
                    let e = e.mapv(|x| R::of(x.to_f64()));
                    let product = |x: ArrayView1<'_, f64>| {
                        R::dot(e.iter().zip(x).map(|(&e, &x)| (e, R::rounded(x, 1.0))))
                    };
                    let energies = seen.rows().into_iter().zip(inputs.rows());
                    let shares = energies.map(|(x, i)| product(x) / R::rounded(x.dot(&i), 1.0));
                    let gates = self.gate.define(Array1::from_iter(shares).view());
                    let mut rest = e.clone();
                    for (x, u) in seen_basis.rows().into_iter().zip(basis.rows()) {
                        let by = product(x);
                        rest.iter_mut().zip(u).for_each(|(x, &u)| *x = *x - by * R::rounded(u, 1.0));
                    }
                    for (c, to) in row.iter_mut().enumerate() {
                        let weights = weights.row(first + c);
                        let own = weights.into_iter().zip(&rest).map(|(&w, &x)| (R::of(f64::from(w)), x));
                        let of = |concept: &Concept| R::of(f64::from(of(concept)[first + c]));
                        let edits = self.concepts.iter().map(of).zip(gates.iter().copied());
                        *to = R::dot(own.chain(edits)).stored();
                    }
                }
                rows
            };
            let k = project(&self.weights[0], dims.head_dim, |x| &x.key);
            let v = project(&self.weights[1], dims.value_dim, |x| &x.value);
            attend([&q, &k, &v], self.attend.scale(&dims), |_, _| true, |_, _, score| score)
        });
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        self.shares.bytes() + self.edited.iter().flatten().map(Affine::bytes).sum::<usize>()
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
