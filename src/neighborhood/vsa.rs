//! Varied-size window attention (VSA): the keys and values of a window are
//! sampled where the model says.

use std::sync::Arc;

use ndarray::{Array2, s};

use crate::card::{Extras, carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::{Dims, Input, Qkv};
use crate::keys::grid::{AXES, Grid, Order};
use crate::mask::grid::Local;
use crate::score::grid::Offsets;
use crate::score::{Plain, Score as _};
use crate::stages::attend::Options;
use crate::stages::grid::{OnGrid, image, window_bias};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::sample::Sample;

input! {
    /// Queries, keys and values of pixels, and how windows are sampled.
    VsaInput(qkv) {
        /// For each window, row by row, `offset x, offset y, scale x, scale y`.
        samples: f32 [batch, heads/, windows, four],
    }
}

/// Varied-size window attention (VSA): the keys and values of a window are
/// sampled where the model says.
///
/// ```text
/// x_m  = middle of the window + u_m (1 + scale) + offset (W - 1) / (2 floor(width / w))     likewise y_m
/// k'_m = bilinear sample of k at (y_m, x_m), 0 outside the image                v'_m likewise
/// o_i  = sum_m softmax_m(s q_i . k'_m + table[t(i, m), h]) v'_m      for the w x w points m of i's window
/// ```
///
/// `u_m` are the pixels of a window, counted from its middle; `W` is the image
/// padded to whole windows. Offsets and scales come from a small network for
/// each window and head, and are given: nothing moves where they are 0. Points
/// outside the image take their share of the weights. "VSA: Learning
/// Varied-Size Window Attention in Vision Transformers" (arXiv 2204.08446), and
/// its code; table and index as in [`Swin`](super::Swin).
///
/// Cost: `2 (head_dim + value_dim) w^2` flops a query and 8 for each element that
/// is sampled.
///
/// Windows whose keys are sampled.
///
/// Arrays are `[batch, heads, height * width, dim]`, row by row.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::{Vsa, VsaInput}};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 3, 16 * 16, 32));
/// let samples = Array4::zeros((1, 3, 3 * 3, 4)); // 16 pixels are 3 windows of 7
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = Vsa::builder([16, 16], [7, 7]).build()?.forward(VsaInput::new(qkv, samples.view()))?;
/// assert_eq!(out.dim(), (1, 3, 256, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Vsa {
    on_grid: OnGrid<Plain>,
    sample: Sample,
    bias: Option<(Array2<f32>, Offsets)>,
}

impl Vsa {
    /// Windows of `window` pixels, height and width, of an image of `shape`.
    pub fn builder(shape: [usize; 2], window: [usize; 2]) -> VsaBuilder {
        VsaBuilder::with(shape, window)
    }
}

options! {
    /// Builds a [`Vsa`].
    VsaBuilder of Vsa, isa;
    given { shape: [usize; 2]; window: [usize; 2]; }
    own {
        bias: Option<Array2<f32>> = None;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let VsaBuilder { shape, window, bias, scale, .. } = builder;
        let pixels = Grid::new(&shape)?;
        for (axis, (size, window)) in shape.into_iter().zip(window).enumerate() {
            if window == 0 || (!pixels.is_empty() && window > size) {
                return Err(Error::value("window", format!("from 1 to {size} pixels on axis {axis}"), window));
            }
        }
        let sample = Sample { image: shape, window };
        let windows = sample.windows();
        let padded = Grid::new(&[windows[0].saturating_mul(window[0]), windows[1].saturating_mul(window[1])])?;
        let order = |grid| Arc::new(Order::new(grid, [1; AXES], [1, window[1]], [0; AXES]));
        let (queries, keys) = (order(pixels), order(padded));
        let sides = Grid::spread(&window, 1);
        let reach = |axis: usize, at: usize, _: usize| {
            let window = at / sides[axis];
            window * sides[axis]..(window + 1) * sides[axis]
        };
        // Points lie window by window.
        let point = |token: usize| {
            let [y, _, x] = keys.place(token);
            let of_window = y / window[0] * windows[1] + x / window[1];
            ((of_window * window[0] + y % window[0]) * window[1] + x % window[1]) as u32
        };
        let rows = [queries.rows().into(), (0..padded.len()).map(point).collect()];
        let mask = Local::new(queries.clone(), keys.clone(), reach);
        let on_grid = OnGrid::masked(rows, Options { mask, score: Plain, scale, isa: Some(config.isa) })?;
        let bias = bias.map(|table| {
            let offsets = window_bias(&table, window, queries.clone(), keys.clone())?;
            Ok((table, offsets))
        });
        Ok(Vsa { on_grid, sample, bias: bias.transpose()? })
    }
}

impl VsaBuilder {
    /// The relative position bias as models store it, `[(2 height - 1) (2 width
    /// - 1), heads]` of the window.
    pub fn bias(self, table: Array2<f32>) -> Self {
        Self { bias: Some(table), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Vsa {
    fn check<T: Element>(&self, x: &VsaInput<'_, T>) -> Result<Dims> {
        x.dims()?;
        let dims = image(&x.qkv, [self.sample.image; 2])?;
        let windows = self.sample.windows().iter().product::<usize>();
        let (batch, heads, count, four) = x.samples.dim();
        if (count, four) != (windows, 4) || (heads > 0 && !dims.kv_heads.is_multiple_of(heads)) {
            let want = format!(
                "[batch, heads, windows, 4] = [{batch}, {} or a divisor, {windows}, 4]",
                dims.kv_heads
            );
            return Err(Error::shape("samples", want, x.samples.shape()));
        }
        self.bias.as_ref().map_or(Ok(()), |(_, bias)| bias.check(&dims))?;
        Ok(dims)
    }
}

impl<T: Element> Pipeline<VsaInput<'_, T>> for Vsa {
    type State = ();

    fn flow(
        &self,
        x: VsaInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        self.check(&x)?;
        let isa = self.on_grid.isa();
        let k = self.sample.run(pass, isa, x.qkv.k.reborrow(), x.samples.reborrow())?;
        let v = self.sample.run(pass, isa, x.qkv.v.reborrow(), x.samples.reborrow())?;
        let around = Qkv::<T, f32>::new(x.qkv.q.reborrow(), k.view(), v.view());
        match &self.bias {
            None => self.on_grid.attend(pass, around, None, out),
            Some((_, bias)) => self.on_grid.with_score(bias).attend(pass, around, None, out),
        }
    }

    fn define<R: Real>(&self, x: VsaInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let (Sample { image: [_, width], window: [m, n] }, [_, wide]) = (self.sample, self.sample.windows());
        // The window of a query and its place there.
        let place = |i: usize| {
            let (y, x) = (i / width, i % width);
            (y / m * wide + x / n, [y % m, x % n])
        };
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let q = head.rows(&x.qkv.q, &head.queries);
            let by = x.samples.slice(s![head.batch, head.of(x.samples.dim().1), .., ..]);
            let [k, v] =
                [&x.qkv.k, &x.qkv.v].map(|x| self.sample.define(&head.rows::<R, T>(x, &head.keys), by));
            let score = |i: usize, j: usize, score: R| {
                let Some((table, _)) = &self.bias else { return score };
                let ((_, [a, b]), [c, d]) = (place(i), [j % (m * n) / n, j % n]);
                let index = (a + m - 1 - c) * (2 * n - 1) + b + n - 1 - d;
                let column = if table.dim().1 == 1 { 0 } else { head.head };
                score + R::of(f64::from(table[[index, column]]))
            };
            attend([&q, &k, &v], self.on_grid.scale(&dims), |i, j| place(i).0 == j / (m * n), score)
        });
        Ok((out, ()))
    }
}

composite!(Vsa, VsaInput);

exhibit! {
    VsaExhibit of Vsa, "neighborhood", "VSA", "arXiv 2204.08446";
    "windows of 7 x 7 pixels over as many points where the model samples";
    not "where the samples would be near the pixels: plain windows do not copy keys";
    tokens true;
    build(x, field) {
        let shape = Grid::squarest(x.q.dim().2);
        let window = shape.map(|size| size.clamp(1, 7));
        let entries = (2 * window[0] - 1) * (2 * window[1] - 1);
        let bias = |(t, h): (usize, usize)| 2.0 * field.at(1, h, t, 0);
        Vsa::builder(shape, window).bias(Array2::from_shape_fn((entries, x.q.dim().1.max(1)), bias))
    }
    extras(x, field) {
        let shape = Grid::squarest(x.q.dim().2);
        let windows = Sample { image: shape, window: shape.map(|size| size.clamp(1, 7)) }.windows();
        let dim = (x.q.dim().0, x.k.dim().1, windows[0] * windows[1], 4);
        let samples = ndarray::Array4::from_shape_fn(dim, |(_, h, w, i)| 0.5 * field.at(2, h, w, i));
        Extras { channels: samples, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> VsaInput<'a, T> { VsaInput::new(x, extras.channels.view()) }
}
carded!(Vsa, VsaExhibit);

#[cfg(test)]
mod tests;
