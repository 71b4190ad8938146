//! RCMHA, relative convolutional multi-head attention: queries, keys and values go
//! through short convolutions, and queries also meet an embedding of each distance.

use ndarray::{Array1, Array2, Array3, ArrayView2, ArrayView3};

use crate::card::{carded, exhibit};
use crate::definition::attend::{shifted, weights};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Sequence};
use crate::mask::Window;
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::distances::{Distances, Over};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::short::Short;

/// RCMHA, relative convolutional multi-head attention: queries, keys and values go
/// through short convolutions, and queries also meet an embedding of each distance.
///
/// ```text
/// q', k', v' = what convolutions of 3 taps up to each token make of q, k, v
/// s_ij = scale * ((q'_i + u) . k'_j + q'_i . E[j - i] + b[j - i])
/// o_i  = sum_j softmax_j(s_ij) v'_j
/// ```
///
/// "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling"
/// (arXiv 2308.03429). Heads share convolutions, one for each of queries, keys and
/// values. Keys before the queries are a memory; those of queries see the queries alone.
/// A key so far away that the table has no embedding of it is refused, which released
/// code is not asked for below 4,096.
///
/// Cost: that of attention, `2 reach head_dim` flops a query for the embeddings of
/// `reach` distances, and `6 dim` a token for each convolution of `dim` channels.
///
/// Attention with distances over what short convolutions give.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::Rcmha};
/// use ndarray::{Array1, Array2, Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// // Keys from 64 before a query to 63 after it, and the mean of three tokens.
/// let table = Array3::from_shape_fn((2, 128, 16), |(h, d, c)| ((h + d * c) as f32).cos());
/// let mean = Array2::from_elem((16, 3), 1.0 / 3.0);
/// let rcmha = Rcmha::builder(table.view())
///     .convolutions([(); 3].map(|()| (mean.clone(), Array1::zeros(16))))
///     .causal()
///     .build()?;
/// let out = rcmha.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 2, 50, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rcmha {
    attend: Config<Window, Plain>,
    distances: Distances,
    /// `[q_heads, 2 reach]`: `b`.
    offsets: Option<Array2<f32>>,
    /// `[q_heads, head_dim]`: `u`.
    content: Option<Array2<f32>>,
    convolutions: Option<[Short; 3]>,
    causal: bool,
}

impl Rcmha {
    /// Embeddings `[q_heads | 1, 2 P, head_dim]`: number `P + d` is of a key `d` after
    /// the query.
    pub fn builder(table: ArrayView3<'_, f32>) -> RcmhaBuilder {
        RcmhaBuilder::with(table.to_owned())
    }
}

options! {
    /// Builds a [`Rcmha`].
    RcmhaBuilder of Rcmha, isa;
    given { table: Array3<f32>, in FINITE; }
    own {
        offsets: Option<Array2<f32>> = None, in FINITE;
        content: Option<Array2<f32>> = None, in FINITE;
        convolutions: Option<[(Array2<f32>, Array1<f32>); 3]> = None;
    }
    flags {
        /// Hides keys after the query.
        causal;
    }
    build(this, config) {
        let options = Options { mask: Window::default(), score: Plain, scale: config.scale, isa: Some(config.isa) };
        let reach = this.table.dim().1;
        if reach % 2 == 1 {
            return Err(Error::shape("table", "[q_heads | 1, 2 P, head_dim]", this.table.shape()));
        }
        let convolutions = match this.convolutions {
            None => None,
            Some([q, k, v]) => {
                let of = |(weights, bias): &(Array2<f32>, Array1<f32>)| Short::new("convolutions", weights, bias);
                Some([of(&q)?, of(&k)?, of(&v)?])
            }
        };
        Ok(Rcmha {
            attend: options.build()?,
            distances: Distances::new(&this.table, reach / 2)?,
            offsets: this.offsets,
            content: this.content,
            convolutions,
            causal: this.causal,
        })
    }
}

impl RcmhaBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// `b`, `[q_heads, 2 P]`: added to scores by distance. Default: nothing.
    pub fn offsets(self, b: ArrayView2<'_, f32>) -> Self {
        Self { offsets: Some(b.as_standard_layout().into_owned()), ..self }
    }

    /// `u`, `[q_heads, head_dim]`: added to queries that meet keys. Default: nothing.
    pub fn content_bias(self, u: ArrayView2<'_, f32>) -> Self {
        Self { content: Some(u.as_standard_layout().into_owned()), ..self }
    }

    /// Convolutions of queries, keys and values: taps `[dim, taps]`, that of the token
    /// itself last, and what is added, `[dim]`. Default: none.
    pub fn convolutions(self, convolutions: [(Array2<f32>, Array1<f32>); 3]) -> Self {
        Self { convolutions: Some(convolutions), ..self }
    }
}

impl Rcmha {
    fn checked<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = self.attend.checked(x.dims()?)?;
        self.distances.check(&dims)?;
        let (reach, heads) = (self.distances.reach(), dims.q_heads);
        for (argument, bias, want) in [
            ("offsets", &self.offsets, [heads, reach]),
            ("content_bias", &self.content, [heads, dims.head_dim]),
        ] {
            if let Some(bias) = bias.as_ref().filter(|bias| bias.shape() != want) {
                return Err(Error::shape(argument, format!("{want:?}"), bias.shape()));
            }
        }
        let widths = [dims.head_dim, dims.head_dim, dims.value_dim];
        for (convolution, dim) in self.convolutions.iter().flatten().zip(widths) {
            if convolution.dim() != dim {
                let expected = format!("taps [dim, _] of queries, keys and values with dims {widths:?}");
                return Err(Error::shape("convolutions", expected, &[convolution.dim()]));
            }
        }
        // As far as the last query is from the first key, and the first from the last.
        let far = |x: Sequence| if x.keys.is_empty() { 0 } else { (x.keys.len() - 1).max(x.queries.len()) };
        let far = (0..dims.batch).map(|i| far(x.lengths.sequence(&dims, i))).max().unwrap_or(0);
        if reach / 2 < far {
            let expected = format!("embeddings of distances, 2 P of them with a P of at least {far}");
            return Err(Error::value("table", expected, reach));
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Rcmha {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let (dims, isa) = (self.checked(&x)?, self.attend.isa());
        let over = Over {
            config: &self.attend,
            causal: self.causal,
            biases: [self.content.as_ref().map(|u| u.view()), None],
            offsets: self.offsets.as_ref().map(|b| b.view()),
            values: None,
        };
        let Some(convolutions) = &self.convolutions else {
            return self.distances.attend(pass, &over, x, out);
        };
        let of = |i: usize| x.lengths.sequence(&dims, i);
        let queries = |i: usize| (of(i).batch, of(i).queries);
        let keys = |i: usize| (of(i).batch, of(i).keys);
        let q = convolutions[0].run(pass, isa, x.q.reborrow(), dims.batch, &queries)?;
        let k = convolutions[1].run(pass, isa, x.k.reborrow(), dims.batch, &keys)?;
        let v = convolutions[2].run(pass, isa, x.v.reborrow(), dims.batch, &keys)?;
        let out_type = std::marker::PhantomData::<T>;
        let made = Qkv { q: q.view(), k: k.view(), v: v.view(), lengths: x.lengths, out: out_type };
        self.distances.attend(pass, &over, made, out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.checked(&x)?;
        let (scale, of) = (self.attend.scale(&dims), |x: &f32| R::of(f64::from(*x)));
        let out = of_heads(&dims, &x.lengths, |head| {
            let rows = [(&x.q, &head.queries), (&x.k, &head.keys), (&x.v, &head.keys)];
            let mut rows = rows.map(|(x, tokens)| head.rows::<R, T>(x, tokens));
            for (convolution, rows) in self.convolutions.iter().flatten().zip(&mut rows) {
                *rows = convolution.define(rows);
            }
            let [q, k, v] = rows;
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            let behind = |i: usize, j: usize| (k.dim().0 + i) as isize - (q.dim().0 + j) as isize;
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let content: Array1<R> = match &self.content {
                    Some(u) => q.row(i).iter().zip(u.row(head.head)).map(|(&q, u)| q + of(u)).collect(),
                    None => q.row(i).to_owned(),
                };
                let term = |j, score| {
                    let embedding = self.distances.of(head.head, behind(i, j)).map(of);
                    let b = |b: &Array2<f32>| of(&b[[head.head, self.distances.column(behind(i, j))]]);
                    let b = self.offsets.as_ref().map(|offsets| (b(offsets), R::of(1.0)));
                    let terms = q.row(i).to_vec().into_iter().zip(embedding).chain(b);
                    shifted(score, R::dot(terms) * R::rounded(scale, 1.0))
                };
                let weights = weights(content.view(), &k, scale, |j| !self.causal || behind(i, j) >= 0, term);
                for (c, out) in out.iter_mut().enumerate() {
                    *out = R::total(weights.iter().map(|&(j, weight)| (weight, v[[j, c]])));
                }
            }
            out
        });
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        let biases: usize = self.offsets.iter().chain(&self.content).map(|x| x.len()).sum();
        let convolutions: usize = self.convolutions.iter().flatten().map(Short::bytes).sum();
        (self.distances.len() + biases) * size_of::<f32>() + convolutions
    }
}

composite!(Rcmha, Qkv);

exhibit! {
    RcmhaExhibit of Rcmha, "dense", "RCMHA", "arXiv 2308.03429";
    "causal, with embeddings of distances, over queries, keys and values that are convolved";
    not "where keys and values are in a cache already: those would be convolved again";
    tokens false;
    build(x, field) {
        let ((_, heads, len, dim), (_, _, keys, value_dim)) = (x.q.dim(), x.v.dim());
        let reach = len.max(keys).max(1);
        // Those of a distance are the same whatever the lengths.
        let at = |which, h: usize, d: usize, c: usize| field.at(which, h, d.wrapping_sub(reach), c);
        let table = Array3::from_shape_fn((heads.max(1), 2 * reach, dim), |(h, d, c)| at(3, h, d, c));
        let offsets = Array2::from_shape_fn((heads, 2 * reach), |(h, d)| at(4, h, d, 0));
        let convolution = |which, dim| {
            let taps = Array2::from_shape_fn((dim, 3), |(c, tap)| 0.5 * field.at(which, 0, tap, c));
            (taps, Array1::from_shape_fn(dim, |c| 0.1 * field.at(which, 1, 0, c)))
        };
        Rcmha::builder(table.view())
            .offsets(offsets.view())
            .content_bias(field.heads(5, x).view())
            .convolutions([convolution(6, dim), convolution(7, dim), convolution(8, value_dim)])
            .causal()
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Rcmha, RcmhaExhibit);

#[cfg(test)]
mod tests;
