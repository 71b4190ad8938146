//! CLEAR: tokens of an image that are near each other, and text.

use std::sync::Arc;

use ndarray::{Array2, ArrayView3, ArrayView4, ShapeBuilder, s};

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::definition::softmax::{Definition, Normalisation};
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::{Call, Sight, Virtual};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::grid::{AXES, Grid, Order};
use crate::mask::disc::Disc;
use crate::mask::mask_fn;
use crate::score::Plain;
use crate::score::smooth::AnySmooth;
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::attend::Options;
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, shapes, smooth};
use crate::stages::grid::{OnGrid, image, orders};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::shrink::Shrink;

/// CLEAR: tokens of an image that are near each other, and text.
///
/// ```text
/// i sees j    if one of them is text, or (y_i - y_j)^2 + (x_i - x_j)^2 < radius^2
/// K_c = sum_{a, b} w[a, b] k[f c + (a, b)]        V_c likewise, for the cells c of f x f pixels
/// o_i = softmax attention over what i sees, and for pixels over all K_c, too
/// ```
///
/// Tokens of the text come first, then the pixels row by row. Discs are cut at
/// the borders of the image, not moved inside. The tokens that stand for cells
/// are optional; text does not see them. "CLEAR: Conv-Like Linearization Revs
/// Pre-Trained Diffusion Transformers Up" (arXiv 2412.16112), and its code.
///
/// Cost: `2 (head_dim + value_dim)` flops for each key that a query sees, of
/// which `pi radius^2` are pixels.
///
/// A disc of pixels and all of the text.
///
/// [`Backward`](crate::Backward) gives the gradients, without tokens of cells.
///
/// Arrays are `[batch, heads, text + height * width, dim]`.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::Clear};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 2, 10 + 24 * 32, 16));
/// let clear = Clear::builder([24, 32], 8).text(10).build()?;
/// let out = clear.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 2, 778, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Clear {
    on_grid: OnGrid<Plain, Disc>,
    shape: [usize; 2],
    text: usize,
    radius: usize,
    pooled: Option<Pooled>,
}

/// Tokens that stand for cells.
#[derive(Clone, Debug)]
struct Pooled {
    shrink: Shrink,
    /// The position from which each is seen.
    from: Vec<isize>,
}

impl Clear {
    /// Pixels of an image of `shape`, height and width, that are less than
    /// `radius` apart.
    pub fn builder(shape: [usize; 2], radius: usize) -> ClearBuilder {
        ClearBuilder::with(shape, radius)
    }

    /// The scale for images that are larger than those of the training:
    /// `sqrt(log_4608(kv_len) / head_dim)`, where 4608 were 64 x 64 pixels and
    /// 512 tokens of text. The released code takes ten times as many keys where
    /// there are tokens for cells.
    pub fn proportional_scale(kv_len: usize, head_dim: usize) -> f32 {
        ((kv_len as f64).ln() / 4608f64.ln() / head_dim as f64).sqrt() as f32
    }
}

options! {
    /// Builds a [`Clear`].
    ClearBuilder of Clear, isa;
    given { shape: [usize; 2]; radius: usize; }
    own {
        text: usize = 0;
        pooled: Option<Array2<f32>> = None;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let ClearBuilder { shape, radius, text, pooled, scale, .. } = builder;
        let grid = Grid::new(&shape)?;
        if radius == 0 {
            return Err(Error::value("radius", "at least 1", radius));
        }
        let tokens = grid.len().checked_add(text).and_then(|n| u32::try_from(n).ok());
        let tokens = tokens.ok_or_else(|| Error::value("text", "fewer than 2^32 tokens with the image", text))?;
        let orders = orders(grid, [1; AXES]);
        let rows = |order: &Arc<Order>| -> Arc<[u32]> {
            let image = tokens - grid.len() as u32;
            (0..image).chain(order.rows().iter().map(|row| image + row)).collect()
        };
        let rows = orders.each_ref().map(rows);
        let options = Options { mask: Disc::new(orders, text, radius), score: Plain, scale, isa: Some(config.isa) };
        let pooled = pooled.map(|weights| {
            let (high, wide) = weights.dim();
            let divides = |size: usize, cell: usize| cell > 0 && size.is_multiple_of(cell);
            if !divides(shape[0], high) || !divides(shape[1], wide) {
                let expected = format!("[f, f] where f divides an image of {shape:?}");
                return Err(Error::shape("pooled", expected, weights.shape()));
            }
            let shrink = Shrink::shared(shape, &weights)?;
            Ok(Pooled { from: vec![text as isize; shrink.cells().iter().product()], shrink })
        });
        let on_grid = OnGrid::masked(rows, options)?;
        Ok(Clear { on_grid, shape, text, radius, pooled: pooled.transpose()? })
    }
}

impl ClearBuilder {
    /// How many tokens of text come before the image. Default: none.
    pub fn text(self, text: usize) -> Self {
        Self { text, ..self }
    }

    /// Adds a token for each cell: weights `[f, f]` of its pixels, which models
    /// start at `1 / f^2`. Default: none.
    pub fn pooled(self, weights: Array2<f32>) -> Self {
        Self { pooled: Some(weights), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Clear {
    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let tokens = [1, self.text + self.shape[0] * self.shape[1]];
        image(x, [tokens, tokens])
    }

    /// Whether a token sees another.
    fn sees(&self, query: usize, key: usize) -> bool {
        let place = |token: usize| {
            let pixel = token.checked_sub(self.text)?;
            Some([pixel / self.shape[1], pixel % self.shape[1]].map(|at| at as f64))
        };
        match (place(query), place(key)) {
            (Some([a, b]), Some([c, d])) => (a - c).powi(2) + (b - d).powi(2) < (self.radius as f64).powi(2),
            _ => true,
        }
    }

    /// Refuses tokens of cells, of which there are no gradients.
    fn unpooled<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let reason = "those of what tokens of cells are made of are not there";
        let refusal = Error::Conflict { option: "pooled", with: "gradients", reason };
        if self.pooled.is_some() { Err(refusal) } else { self.check(x) }
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Clear {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.check(&x)?;
        let Some(Pooled { shrink, from }) = &self.pooled else {
            return self.on_grid.attend(pass, x.reborrow(), None, out);
        };
        let pixels = |x| shrink.run(pass, self.on_grid.isa(), x);
        let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., .., self.text.., ..])).map(pixels);
        let (k, v) = (k?, v?);
        let dim = (dims.batch, dims.kv_heads, from.len());
        let log_weights = ArrayView3::from_shape(dim.strides((0, 0, 0)), &[0f32]).expect("all the same");
        let any = |x| f32::any(Heads::new(x));
        let (k, v) =
            (any(k.of_heads(dims.kv_heads, dims.head_dim)), any(v.of_heads(dims.kv_heads, dims.value_dim)));
        let extra = Virtual { k, v, log_weights, seen: Sight::From(from), q_start: Some(0) };
        self.on_grid.attend(pass, x.reborrow(), Some(extra).filter(|extra| extra.len() > 0), out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let n = dims.kv_len;
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows(&x.q, &head.queries);
            let [k, v] = [&x.k, &x.v].map(|x| {
                let rows = head.rows::<R, T>(x, &head.keys);
                let Some(Pooled { shrink, .. }) = &self.pooled else { return rows };
                let cells = shrink.define(x.slice(s![head.batch, .., self.text.., ..]));
                let cells = cells.index_axis_move(ndarray::Axis(0), head.of(dims.kv_heads));
                ndarray::concatenate![ndarray::Axis(0), rows, cells]
            });
            let sees = |i, j| if j >= n { i >= self.text } else { self.sees(i, j) };
            attend([&q, &k, &v], self.on_grid.scale(&dims), sees, |_, _, score| score)
        });
        Ok((out, ()))
    }
}

composite!(Clear, Qkv);

impl<T: Element> Smooth<Qkv<'_, T>> for Clear {
    fn with_smooth<R>(&self, x: Qkv<'_, T>, run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R) -> Result<R> {
        self.unpooled(&x)?;
        Ok(run(&self.on_grid.call(x.reborrow())?, &Plain))
    }

    fn define_back(
        &self,
        x: Qkv<'_, T>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        let dims = self.unpooled(&x)?;
        let (x, mask) = (x.reborrow(), mask_fn(|_, i, j| self.sees(i, j)));
        let normalisation = Normalisation::Softmax { sinks: None };
        let (score, scale) = (&Plain, self.on_grid.scale(&dims));
        let definition =
            Definition { x, dims, mask: &mask, score, scale, normalisation, gains: None, extra: None };
        softmax_backward::gradients(&definition, &Plain, d_out, saved.softmax)
    }

    fn shapes(&self, x: Qkv<'_, T>) -> Result<Shapes> {
        self.unpooled(&x)?;
        Ok(shapes(&x))
    }
}

smooth!(@backward [T: Element] Qkv<'_, T>, Clear);

exhibit! {
    ClearExhibit of Clear, "neighborhood", "CLEAR", "arXiv 2412.16112";
    "pixels less than 5 apart, text, and a token for each cell of pixels";
    not "where the model was not adapted to it: what is far is a mean at best";
    tokens true;
    build(x, _) {
        let len = x.q.dim().2;
        let text = len.min(9);
        let shape = Grid::squarest(len - text);
        let cell = shape.map(|size| Grid::divisor(size, 4));
        let weights = Array2::from_elem(cell, 1.0 / (cell[0] * cell[1]) as f32);
        Clear::builder(shape, 5).text(text).pooled(weights)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Clear, ClearExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::mask::mask_fn;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};

    fn tokens(n: usize) -> Qkvs {
        Qkvs::new([2, 4, 2, n, n, 10, 7], 1)
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, radius, text, cell) in [
            ([8, 12], 4, 5, [2, 3]),
            ([7, 30], 9, 0, [7, 1]),
            ([14, 13], 2, 70, [1, 1]),
            ([4, 4], 1, 1, [4, 4]),
            ([0, 3], 3, 8, [1, 3]),
            ([40, 41], 7, 3, [8, 1]),
        ] {
            let x = tokens(shape[0] * shape[1] + text);
            let clear = Clear::builder(shape, radius).text(text);
            let mut weights = array(3, cell);
            weights[[0, 0]] = 1.0;
            for clear in [clear.clone(), clear.pooled(weights).scale(0.4)] {
                held(&clear.build().unwrap(), x.qkv());
            }
        }
    }

    #[test]
    fn a_disc_around_everything_is_dense() {
        let x = tokens(6 * 7 + 3);
        let dense = Dense::builder().build().unwrap().reference(x.qkv()).unwrap();
        let clear = Clear::builder([6, 7], 9).text(3).build().unwrap();
        close(&clear.reference(x.qkv()).unwrap(), &dense, 1e-12);
    }

    #[test]
    fn a_radius_of_1_is_the_pixel_itself_and_text() {
        let x = tokens(5 * 9 + 2);
        let sees = mask_fn(|_, i, j| i < 2 || j < 2 || i == j);
        let want = Dense::builder().mask(sees).build().unwrap().reference(x.qkv()).unwrap();
        close(&Clear::builder([5, 9], 1).text(2).build().unwrap().reference(x.qkv()).unwrap(), &want, 1e-12);
    }

    /// One cell is the mean of all pixels, which pixels see and text does not.
    #[test]
    fn one_cell_is_one_more_key() {
        let (shape, text) = ([4, 6], 2);
        let x = tokens(26);
        let mut more = x.clone();
        for (all, x) in [(&mut more.k, &x.k), (&mut more.v, &x.v)] {
            let mean = x.slice(s![.., .., text.., ..]).mean_axis(ndarray::Axis(2)).unwrap();
            all.append(ndarray::Axis(2), mean.insert_axis(ndarray::Axis(2)).view()).unwrap();
        }
        let near = |i: usize, j: usize| {
            let [a, b] = [i - text, j - text].map(|t| [t / 6, t % 6]);
            a[0].abs_diff(b[0]).pow(2) + a[1].abs_diff(b[1]).pow(2) < 9
        };
        let sees =
            mask_fn(move |_, i, j| if j == 26 { i >= text } else { i < text || j < text || near(i, j) });
        let want = Dense::builder().mask(sees).build().unwrap().reference(more.qkv()).unwrap();
        let clear = Clear::builder(shape, 3).text(text).pooled(Array2::from_elem(shape, 1.0 / 24.0));
        close(&clear.build().unwrap().reference(x.qkv()).unwrap(), &want, 1e-6);
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let refusal = |builder: ClearBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Clear::builder([4, 6], 0)), "radius: expected at least 1, got 0");
        let pooled = "pooled: expected shape [f, f] where f divides an image of [4, 6], got [2, 4]";
        assert_eq!(refusal(Clear::builder([4, 6], 3).pooled(Array2::zeros((2, 4)))), pooled);
        let clear = Clear::builder([4, 6], 3).text(1).build().unwrap();
        let q = "q: expected one row for each of the 25 tokens of the shape, got 24";
        assert_eq!(clear.forward(tokens(24).qkv()).unwrap_err().to_string(), q);
        assert!((Clear::proportional_scale(4608, 16) - 0.25).abs() < 1e-7);
    }
}
