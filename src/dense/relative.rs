//! Relative positions as embeddings of distances, which queries meet as they
//! meet keys: Shaw et al., Music Transformer and Transformer-XL.

use ndarray::{Array2, Array3, ArrayView2, ArrayView3, s};

use crate::card::{carded, exhibit};
use crate::definition::attend::{shifted, weights};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::mask::Window;
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::distances::{Distances, Over};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::whole;

/// Relative positions as embeddings of distances, which queries meet as they
/// meet keys: Shaw et al., Music Transformer and Transformer-XL.
///
/// ```text
/// s_ij = scale * ((q_i + u) . k_j + (q_i + w) . E[j - i])
/// o_i  = sum_j softmax_j(s_ij) (v_j + V[j - i])
/// ```
///
/// "Self-Attention with Relative Position Representations" (arXiv 1803.02155)
/// learns `E` and `V` for distances of both directions, those beyond some count
/// as the furthest. "Music Transformer" (arXiv 1809.04281) learns `E` for earlier
/// keys, for each head or for all, and its "skewing" computes the same.
/// "Transformer-XL" (arXiv 1901.02860) projects sinusoids for each head, and
/// learns `u` and `w` (its `u` and `v`); the memory is keys before the queries.
///
/// Cost: that of attention, and `2 reach head_dim` flops a query. The terms of
/// some queries are there at a time, an array of all pairs never is. With `V` a
/// thread holds the scores of 48 queries with all keys. [`Backward`](crate::Backward) takes the terms
/// of some queries at a time, too, and with `V` the forward pass twice besides.
///
/// Attention with relative positions.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::RelativePositions};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// // Distances 63 to 0, the same for all heads.
/// let table = Array3::from_shape_fn((1, 64, 16), |(_, d, c)| ((d * c) as f32).cos());
/// let attention = RelativePositions::builder(table.view()).build()?;
/// let out = attention.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RelativePositions {
    attend: Config<Window, Plain>,
    distances: Distances,
    causal: bool,
    /// `[q_heads, head_dim]`: `u` and `w`.
    biases: [Option<Array2<f32>>; 2],
    /// `[q_heads | 1, reach, value_dim]`
    values: Option<Array3<f32>>,
}

impl RelativePositions {
    /// Causal attention with embeddings `[q_heads | 1, reach, head_dim]` of
    /// distances, the furthest first, as the code of Music Transformer and
    /// Transformer-XL has them: the last is that of the query's own position.
    pub fn builder(table: ArrayView3<'_, f32>) -> RelativePositionsBuilder {
        RelativePositionsBuilder::with(table.to_owned(), false)
    }

    /// Attention in both directions, embeddings `[q_heads | 1, 2 reach + 1,
    /// head_dim]`: the middle one is that of the query's own position, those
    /// before it are of keys before the query.
    pub fn between(table: ArrayView3<'_, f32>) -> RelativePositionsBuilder {
        RelativePositionsBuilder::with(table.to_owned(), true)
    }
}

options! {
    /// Builds a [`RelativePositions`].
    RelativePositionsBuilder of RelativePositions, isa;
    given { table: Array3<f32>, in FINITE; both: bool; }
    own {
        content: Option<Array2<f32>> = None, in FINITE;
        position: Option<Array2<f32>> = None, in FINITE;
        values: Option<Array3<f32>> = None, in FINITE;
    }
    flags {
        /// Hides keys after the query: those of the middle embedding and before
        /// are left.
        causal;
    }
    build(this, config) {
        let options = Options { mask: Window::default(), score: Plain, scale: config.scale, isa: Some(config.isa) };
        let reach = this.table.dim().1;
        if this.both && reach.is_multiple_of(2) {
            let expected = "[q_heads | 1, 2 reach + 1, head_dim]";
            return Err(Error::shape("table", expected, this.table.shape()));
        }
        let own = if this.both { reach / 2 } else { reach.saturating_sub(1) };
        Ok(RelativePositions {
            attend: options.build()?,
            distances: Distances::new(&this.table, own)?,
            causal: this.causal || !this.both,
            biases: [this.content, this.position],
            values: this.values,
        })
    }
}

impl RelativePositionsBuilder {
    /// The factor of scores. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// `u`, `[q_heads, head_dim]`: added to queries that meet keys.
    pub fn content_bias(mut self, u: ArrayView2<'_, f32>) -> Self {
        self.content = Some(u.as_standard_layout().into_owned());
        self
    }

    /// `w`, `[q_heads, head_dim]`: added to queries that meet distances.
    pub fn position_bias(mut self, w: ArrayView2<'_, f32>) -> Self {
        self.position = Some(w.as_standard_layout().into_owned());
        self
    }

    /// `V`, `[q_heads | 1, .., value_dim]` of as many distances as the table
    /// has: added to values.
    pub fn values(mut self, table: ArrayView3<'_, f32>) -> Self {
        self.values = Some(table.as_standard_layout().into_owned());
        self
    }
}

impl RelativePositions {
    fn checked<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = self.attend.checked(x.dims()?)?;
        self.distances.check(&dims)?;
        for (argument, bias) in ["content_bias", "position_bias"].into_iter().zip(&self.biases) {
            let Some(bias) = bias else { continue };
            if bias.dim() != (dims.q_heads, dims.head_dim) {
                let expected = format!("[q_heads, head_dim] = [{}, {}]", dims.q_heads, dims.head_dim);
                return Err(Error::shape(argument, expected, bias.shape()));
            }
        }
        let (heads, reach, value_dim) = (dims.q_heads, self.distances.reach(), dims.value_dim);
        if let Some(values) = &self.values {
            whole::checked(dims)?;
            let fits = [1, heads].contains(&values.dim().0) && values.shape()[1..] == [reach, value_dim];
            if !fits {
                let expected =
                    format!("[q_heads | 1, reach, value_dim] = [{heads} | 1, {reach}, {value_dim}]");
                return Err(Error::shape("values", expected, values.shape()));
            }
        }
        Ok(dims)
    }

    fn over(&self) -> Over<'_> {
        let values = self.values.as_ref().map(|values| values.view());
        Over { config: &self.attend, causal: self.causal, biases: self.views(), offsets: None, values }
    }

    fn views(&self) -> [Option<ArrayView2<'_, f32>>; 2] {
        self.biases.each_ref().map(|bias| bias.as_ref().map(|bias| bias.view()))
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for RelativePositions {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        self.checked(&x)?;
        self.distances.attend(pass, &self.over(), x, out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.checked(&x)?;
        let (scale, of) = (self.attend.scale(&dims), |x: &f32| R::of(f64::from(*x)));
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows::<R, T>(&x.q, &head.queries);
            let [k, v] = [&x.k, &x.v].map(|x| head.rows::<R, T>(x, &head.keys));
            let [content, position] = self.biases.each_ref().map(|bias| {
                let plus =
                    |i, c| bias.as_ref().map_or(q[[i, c]], |bias| q[[i, c]] + of(&bias[[head.head, c]]));
                Array2::from_shape_fn(q.dim(), |(i, c)| plus(i, c))
            });
            let behind =
                |i: usize, j: usize| k.dim().0 as isize - q.dim().0 as isize + i as isize - j as isize;
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let term = |j, score| {
                    let embedding = self.distances.of(head.head, behind(i, j));
                    let dot = R::dot(position.row(i).iter().copied().zip(embedding.iter().map(of)));
                    shifted(score, dot * R::rounded(scale, 1.0))
                };
                let weights = weights(content.row(i), &k, scale, |j| !self.causal || behind(i, j) >= 0, term);
                for (c, out) in out.iter_mut().enumerate() {
                    *out = R::total(weights.iter().map(|&(j, weight)| (weight, v[[j, c]])));
                }
                let Some(values) = &self.values else { continue };
                let values = values.slice(s![if values.dim().0 == 1 { 0 } else { head.head }, .., ..]);
                let at = |r| weights.iter().filter(move |(j, _)| self.distances.column(behind(i, *j)) == r);
                let counts: Vec<R> = (0..values.dim().0).map(|r| R::sum(at(r).map(|x| x.1))).collect();
                for (c, out) in out.iter_mut().enumerate() {
                    *out = *out + R::dot(counts.iter().copied().zip(values.column(c).iter().map(of)));
                }
            }
            out
        });
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        let biases = self.biases.iter().flatten().map(|bias| bias.len()).sum::<usize>();
        size_of::<f32>() * (self.distances.len() + biases + self.values.as_ref().map_or(0, Array3::len))
    }
}

composite!(RelativePositions, Qkv);

/// Numbers of an exhibit.
fn table(field: &crate::card::Field, which: u64, (heads, reach, dim): (usize, usize, usize)) -> Array3<f32> {
    Array3::from_shape_fn((heads, reach, dim), |(h, d, c)| field.at(which, h, d, c))
}

exhibit! {
    ShawExhibit of RelativePositions, "dense", "Shaw", "arXiv 1803.02155";
    "queries also meet an embedding of the distance of each key, and values have one";
    not "where positions are in queries and keys already: use dense attention";
    tokens false;
    build(x, field) {
        let (dim, value_dim) = (x.q.dim().3, x.v.dim().3);
        let values = table(field, 4, (1, 33, value_dim));
        RelativePositions::between(table(field, 3, (1, 33, dim)).view()).values(values.view())
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    MusicExhibit of RelativePositions, "dense", "Music Transformer", "arXiv 1809.04281";
    "causal, queries also meet an embedding of the distance of each key";
    not "where positions are in queries and keys already: use dense attention";
    tokens false;
    build(x, field) { RelativePositions::builder(table(field, 3, (1, 40, x.q.dim().3)).view()) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(RelativePositions, MusicExhibit);

exhibit! {
    TransformerXlExhibit of RelativePositions, "dense", "Transformer-XL", "arXiv 1901.02860";
    "the same with distances of each head, and with a bias for keys and one for distances";
    not "where positions are in queries and keys already: use dense attention";
    tokens false;
    build(x, field) {
        let (heads, dim) = (x.q.dim().1, x.q.dim().3);
        let bias = |which| Array2::from_shape_fn((heads, dim), |(h, c)| field.at(which, h, 0, c));
        RelativePositions::builder(table(field, 3, (heads.max(1), 40, dim)).view())
            .content_bias(bias(4).view())
            .position_bias(bias(5).view())
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

pub(crate) mod backward;

#[cfg(test)]
mod backward_tests;
#[cfg(test)]
mod tests;
