//! Cascaded group attention (EfficientViT): every head has channels of its own
//! and what the head before made of its.

use std::sync::Arc;

use ndarray::{Array1, Array2, Array3, Axis, s};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::pixels::Pixels;
use crate::input::{Dims, Qkv};
use crate::keys::grid::{AXES, Grid, Order};
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::score::grid::Offsets;
use crate::stages::attend::{Config, Options};
use crate::stages::convolve::{Convolution, Then};
use crate::stages::lay::Lay;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::project::Project;
use crate::stages::{scale, sum};

/// Cascaded group attention (EfficientViT): every head has channels of its own
/// and what the head before made of its.
///
/// ```text
/// f_h = x_h + y_{h-1}                                       y_{-1} = 0
/// [q, k, v] = W_h f_h + b_h             q = depthwise convolution of q, over the window
/// y_h = softmax attention of q over k and v, scores + table[h, |dy| w + |dx|]
/// ```
///
/// An entry of the batch is a window: larger images are cut into windows before,
/// as in the released model, which pads the image before it projects. Batch norms
/// are part of `W`. "EfficientViT: Memory Efficient Vision Transformer with
/// Cascaded Group Attention" (arXiv 2305.07027). What mixes the heads afterwards,
/// ReLU and a projection, is the caller's.
///
/// Cost: `2 dim (2 key_dim + dim)` flops a token and head for the projections,
/// `2 (key_dim + dim)` a pair.
///
/// Heads one after the other.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{Cascaded, Pixels}};
/// use ndarray::{Array1, Array2, Array3, Array4};
///
/// // Windows of 7 x 7 pixels, 4 heads of 32 channels, queries and keys of 16.
/// let weights = Array3::from_elem((4, 2 * 16 + 32, 32), 0.1);
/// let kernels = vec![(Array3::from_elem((16, 5, 5), 0.04), Array1::zeros(16)); 4];
/// let cascaded = Cascaded::builder([7, 7], weights, kernels).build()?;
/// let x = Array4::<f32>::ones((3, 4, 49, 32));
/// assert_eq!(cascaded.forward(Pixels::new(x.view()))?.dim(), (3, 4, 49, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cascaded {
    config: Config<Unmasked, Plain>,
    shape: [usize; 2],
    /// `[heads, dim + 1, 2 key_dim + dim]`, what is added in the last row.
    weights: Array3<f32>,
    kernels: Vec<Convolution>,
    bias: Option<Array2<f32>>,
    /// The same of each head, by offsets.
    offsets: Vec<Offsets>,
    key_dim: usize,
}

impl Cascaded {
    /// Windows of `shape`, height and width; projections `[heads, 2 key_dim +
    /// dim, dim]`, queries first, then keys; for each head a depthwise kernel
    /// `[key_dim, rows, columns]` of odd sides for its queries, and what is added
    /// to them.
    pub fn builder(
        shape: [usize; 2],
        weights: Array3<f32>,
        kernels: Vec<(Array3<f32>, Array1<f32>)>,
    ) -> CascadedBuilder {
        CascadedBuilder::with(shape, weights, kernels)
    }
}

options! {
    /// Builds a [`Cascaded`].
    CascadedBuilder of Cascaded, isa;
    given { shape: [usize; 2]; weights: Array3<f32>, in FINITE; kernels: Vec<(Array3<f32>, Array1<f32>)>; }
    own {
        shift: Option<Array2<f32>> = None;
        bias: Option<Array2<f32>> = None;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let CascadedBuilder { shape, weights, kernels, shift, bias, scale, .. } = builder;
        let grid = Grid::new(&shape)?;
        let pixels = grid.len();
        let (heads, width, dim) = weights.dim();
        let twice = width.checked_sub(dim).filter(|twice| twice.is_multiple_of(2));
        let Some(key_dim) = twice.map(|twice| twice / 2) else {
            return Err(Error::shape("weights", "[heads, 2 key_dim + dim, dim]", weights.shape()));
        };
        if kernels.len() != heads {
            return Err(Error::value("kernels", format!("one for each of the {heads} heads"), kernels.len()));
        }
        let convolution = |(kernel, bias): &(Array3<f32>, Array1<f32>)| {
            let (channels, rows, cols) = kernel.dim();
            if channels != key_dim || rows.is_multiple_of(2) || cols.is_multiple_of(2) {
                let expected = format!("[key_dim, rows, columns] = [{key_dim}, odd, odd]");
                return Err(Error::shape("kernels", expected, kernel.shape()));
            }
            Convolution::new(shape.map(|size| size.max(1)), [rows, cols], kernel, bias)
        };
        let kernels = kernels.iter().map(convolution).collect::<Result<_>>()?;
        let expected = |argument, x: &Option<Array2<f32>>, entries: usize| match x {
            Some(x) if x.dim() != (heads, entries) => {
                Err(Error::shape(argument, format!("[heads, entries] = [{heads}, {entries}]"), x.shape()))
            }
            _ => Ok(()),
        };
        expected("shift", &shift, width).and_then(|()| expected("bias", &bias, pixels))?;
        let mut all = Array3::zeros((heads, dim + 1, width));
        all.slice_mut(s![.., ..dim, ..]).assign(&weights.permuted_axes([0, 2, 1]));
        if let Some(shift) = shift {
            all.slice_mut(s![.., dim, ..]).assign(&shift);
        }
        let order = Arc::new(Order::plain(grid, [0; AXES]));
        let [high, wide] = shape;
        let table = |row: ndarray::ArrayView1<'_, f32>| {
            let extents = (1, (2 * high).saturating_sub(1), (2 * wide).saturating_sub(1));
            let apart = |(_, y, x): (usize, usize, usize)| row[y.abs_diff(high - 1) * wide + x.abs_diff(wide - 1)];
            let table = Array3::from_shape_fn(extents, apart).into_dyn();
            Offsets::new(table.view(), Grid::spread(&shape, 1), [1; AXES], order.clone(), order.clone())
        };
        let offsets = bias.iter().flat_map(|bias| bias.outer_iter()).map(table).collect::<Result<_>>()?;
        let scale = scale.unwrap_or(1.0 / (key_dim.max(1) as f32).sqrt());
        let config = Options { scale: Some(scale), isa: Some(config.isa), ..Options::default() }.build()?;
        Ok(Cascaded { config, shape, weights: all, kernels, bias, offsets, key_dim })
    }
}

impl CascadedBuilder {
    /// What is added to projections, `[heads, 2 key_dim + dim]`.
    pub fn shift(self, shift: Array2<f32>) -> Self {
        Self { shift: Some(shift), ..self }
    }

    /// What is added to scores, `[heads, height * width]`: entry `|dy| width +
    /// |dx|` for pixels that far apart.
    pub fn bias(self, bias: Array2<f32>) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(key_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Cascaded {
    fn check<T: Element>(&self, x: &Pixels<'_, T>) -> Result<Dims> {
        let dims = x.image(self.shape)?;
        let (heads, dim, _) = self.weights.dim();
        if (dims.q_heads, dims.head_dim + 1) != (heads, dim) {
            let expected = format!("[batch, heads, len, dim] = [_, {heads}, _, {}]", dim - 1);
            return Err(Error::shape("x", expected, x.x.shape()));
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Pixels<'_, T>> for Cascaded {
    type State = ();

    fn flow(
        &self,
        x: Pixels<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        mut out: Out<'_, T>,
    ) -> Result<()> {
        let Dims { batch, q_heads, q_len: n, head_dim: dim, .. } = self.check(&x)?;
        let (isa, key_dim, width) = (self.config.isa(), self.key_dim, 2 * self.key_dim + dim);
        if n == 0 {
            return Ok(());
        }
        let mut fed = pass.rows((batch, 1, n, dim + 1))?;
        let mut made = pass.rows((batch, 1, n, dim))?;
        let mut all = pass.rows((batch, 1, n, width))?;
        let mut q = pass.rows((batch, 1, n, key_dim))?;
        pass.stage(
            || 0,
            0,
            |_| {
                made.numbers_mut().fill(0.0);
                fed.numbers_mut().fill(1.0);
            },
        );
        let project = Project { isa, batch, heads: 1, len: n, inner: dim + 1, width };
        for h in 0..q_heads {
            let mut own = pass.rows((batch, 1, n, dim))?;
            let slice = x.x.slice(s![.., h..h + 1, .., ..]);
            Lay::default().run(pass, isa, slice, (&mut own, 0), |_, _| 1.0)?;
            let to = fed.view_mut().map(|fed| fed.slice_move(s![.., .., .., ..dim]));
            sum::run(pass, isa, own, &made, to);
            let weights = self.weights.slice(s![h..h + 1, .., ..]);
            let flops = || (2 * batch * n * (dim + 1) * width) as u64;
            pass.stage(flops, project.bytes(), |arena| {
                if let Some(to) = all.view_mut() {
                    project.run(fed.view(), weights, to, arena);
                }
            });
            let part = |from: usize, to: usize| all.view().slice_move(s![.., .., .., from..to]);
            self.kernels[h].run(pass, isa, part(0, key_dim), None, Then::Nothing, q.view_mut());
            let call = Qkv::<f32>::new(q.view(), part(key_dim, 2 * key_dim), part(2 * key_dim, width));
            match self.offsets.get(h) {
                None => self.config.attend(pass, call, made.view_mut())?,
                Some(offsets) => self.config.with_score(offsets).attend(pass, call, made.view_mut())?,
            }
            let to = out.as_mut().map(|out| out.slice_mut(s![.., h..h + 1, .., ..]));
            scale::run(pass, isa, &made, |_| 1.0, to);
        }
        Ok(())
    }

    fn define<R: Real>(&self, x: Pixels<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let Dims { batch, q_heads, q_len: n, head_dim: dim, value_dim, .. } = self.check(&x)?;
        let mut out = ndarray::Array4::from_elem((batch, q_heads, n, value_dim), R::of(0.0));
        for b in 0..batch {
            let mut made = Array2::from_elem((n, dim), R::of(0.0));
            for h in 0..q_heads {
                let fed = Array2::from_shape_fn((n, dim), |(t, c)| {
                    made[[t, c]] + R::of(x.x[[b, h, t, c]].to_f64())
                });
                let all = Array2::from_shape_fn((n, 2 * self.key_dim + dim), |(t, row)| {
                    let weight = |c: usize| R::of(f64::from(self.weights[[h, c, row]]));
                    R::dot((0..dim).map(|c| (fed[[t, c]], weight(c))).chain([(R::of(1.0), weight(dim))]))
                });
                let part = |from: usize, to: usize| all.slice(s![.., from..to]).to_owned();
                let q = part(0, self.key_dim);
                let q = self.kernels[h].define(&q, &q.mapv(|_| R::of(0.0)), 0);
                let (k, v) = (part(self.key_dim, 2 * self.key_dim), part(2 * self.key_dim, all.dim().1));
                let wide = self.shape[1];
                let by = |i: usize, j: usize| {
                    let apart = (i / wide).abs_diff(j / wide) * wide + (i % wide).abs_diff(j % wide);
                    self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[[h, apart]]))
                };
                let scale = self.config.scale(&Dims { head_dim: self.key_dim, ..self.check(&x)? });
                made = attend([&q, &k, &v], scale, |_, _| true, |i, j, score| score + R::of(by(i, j)));
                out.index_axis_mut(Axis(0), b).index_axis_mut(Axis(0), h).assign(&made);
            }
        }
        Ok((out, ()))
    }
}

composite!(Cascaded, Pixels);

exhibit! {
    CascadedExhibit of Cascaded, "neighborhood", "cascaded group attention", "arXiv 2305.07027";
    "each head adds what the one before made to its channels, projects and attends";
    not "where heads should run side by side: they wait for each other";
    tokens true;
    build(x, field) {
        let (shape, heads, dim, key_dim) = (Grid::squarest(x.q.dim().2), x.q.dim().1, x.v.dim().3, 4);
        let at = |which: u64, (h, a, b): (usize, usize, usize)| field.at(which, h, a, b);
        let root = 1.0 / (dim.max(1) as f32).sqrt();
        let weights = Array3::from_shape_fn((heads, 2 * key_dim + dim, dim), |i| root * at(1, i));
        let kernel = |h: usize| {
            let kernel = Array3::from_shape_fn((key_dim, 3, 5), |(c, a, b)| 0.3 * at(2, (h, c, 5 * a + b)));
            (kernel, Array1::from_shape_fn(key_dim, |c| 0.1 * at(3, (h, c, 0))))
        };
        let bias = Array2::from_shape_fn((heads, shape[0] * shape[1]), |(h, t)| at(4, (h, t, 0)));
        let shift = Array2::from_shape_fn((heads, 2 * key_dim + dim), |(h, c)| 0.1 * at(5, (h, c, 0)));
        Cascaded::builder(shape, weights, (0..heads).map(kernel).collect()).bias(bias).shift(shift)
    }
    extras(x, _) { Extras { keys: Extras::pixels(x), ..Extras::default() } }
    input<'a, T>(_, extras) -> Pixels<'a, T> { Pixels::new(extras.keys.view()) }
}
carded!(Cascaded, CascadedExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{close, held};

    fn with(shape: [usize; 2], heads: usize, dim: usize, side: usize) -> CascadedBuilder {
        let weights = array(1, (heads, 6 + dim, dim)) * 0.3;
        let kernels = (0..heads).map(|h| (array(h as u64, (3, side, side)), array(7, 3))).collect();
        Cascaded::builder(shape, weights, kernels)
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, heads, dim, side) in
            [([7, 7], 3, 20, 5), ([4, 9], 2, 3, 1), ([1, 1], 1, 5, 3), ([0, 3], 2, 4, 3)]
        {
            let n = shape[0] * shape[1];
            let x = array(2, (2, heads, n, dim));
            let cascaded = with(shape, heads, dim, side);
            let more =
                cascaded.clone().shift(array(3, (heads, 6 + dim))).bias(array(4, (heads, n))).scale(0.4);
            for cascaded in [cascaded, more] {
                held(&cascaded.build().unwrap(), Pixels::new(x.view()));
            }
        }
    }

    /// The first head knows of no other, and is attention of what is projected.
    #[test]
    fn the_first_head_is_plain_attention() {
        let mut kernel = Array3::zeros((3, 3, 3));
        kernel.slice_mut(s![.., 1, 1]).fill(1.0);
        let weights = array(1, (1, 6 + 5, 5));
        let cascaded = Cascaded::builder([4, 5], weights.clone(), vec![(kernel, Array1::zeros(3))]);
        let x = array(2, (1, 1, 20, 5));
        let (rows, matrix) = (x.slice(s![0, 0, .., ..]), weights.index_axis(Axis(0), 0));
        let rows: Array2<f32> = ndarray::linalg::Dot::dot(&rows, &matrix.t());
        let part =
            |from, to| rows.slice(s![.., from..to]).to_owned().insert_axis(Axis(0)).insert_axis(Axis(0));
        let (q, k, v) = (part(0, 3), part(3, 6), part(6, 11));
        let want =
            Dense::builder().build().unwrap().reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
        close(&cascaded.build().unwrap().reference(Pixels::new(x.view())).unwrap(), &want, 1e-5);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |builder: CascadedBuilder| builder.build().unwrap_err().to_string();
        let bias = "bias: expected shape [heads, entries] = [2, 12], got [2, 11]";
        assert_eq!(refusal(with([3, 4], 2, 5, 3).bias(Array2::zeros((2, 11)))), bias);
        let even = "kernels: expected shape [key_dim, rows, columns] = [3, odd, odd], got [3, 2, 2]";
        assert_eq!(refusal(with([3, 4], 2, 5, 2)), even);
        let x = array(1, (1, 3, 12, 5));
        let other = with([3, 4], 2, 5, 3).build().unwrap().forward(Pixels::new(x.view())).unwrap_err();
        assert_eq!(
            other.to_string(),
            "x: expected shape [batch, heads, len, dim] = [_, 2, _, 5], got [1, 3, 12, 5]"
        );
    }
}
