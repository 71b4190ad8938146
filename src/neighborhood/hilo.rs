//! HiLo attention (LITv2): some heads in small windows, the others over pooled
//! windows.

use ndarray::{Axis, s};

use crate::card::{carded, exhibit};
use crate::definition::attend::attend;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::grid::Grid;
use crate::mask::Unmasked;
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::grid::{OnGrid, image, windows};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::shrink::Shrink;

/// HiLo attention (LITv2): some heads in small windows, the others over pooled
/// windows.
///
/// ```text
/// Hi heads:  o_i = softmax attention of q_i over the keys of its window
/// Lo heads:  o_i = softmax attention of q_i over the means of the keys of all windows
/// ```
///
/// The Lo heads come last. "Fast Vision Transformers with HiLo Attention"
/// (arXiv 2205.13213). Its code pools the tokens before it projects keys and
/// values, which is the same, since both are linear. A window of one pixel
/// makes every head a Lo head, and that is plain attention.
///
/// Cost: with `n` pixels and windows of `w`, `2 (head_dim + value_dim)` flops
/// times `w` a query of a Hi head, `n / w` of a Lo head.
///
/// Heads of high frequencies in windows, heads of low ones over their means.
///
/// Arrays are `[batch, heads, height * width, dim]`, row by row.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::HiLo};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 8, 14 * 14, 32));
/// let out = HiLo::builder([14, 14], 4).build()?.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 8, 196, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HiLo {
    windows: OnGrid<Plain>,
    all: Config<Unmasked, Plain>,
    shrink: Shrink,
    shape: [usize; 2],
    window: [usize; 2],
    lo: usize,
}

impl HiLo {
    /// `lo` of the query heads are Lo heads, on an image of `shape`, height and
    /// width; windows of 2 x 2 pixels.
    pub fn builder(shape: [usize; 2], lo: usize) -> HiLoBuilder {
        HiLoBuilder::with(shape, lo)
    }
}

options! {
    /// Builds a [`HiLo`].
    HiLoBuilder of HiLo, isa;
    given { shape: [usize; 2]; lo: usize; }
    own {
        window: [usize; 2] = [2, 2];
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let HiLoBuilder { shape, lo, window, scale, .. } = builder;
        for (axis, (size, window)) in shape.into_iter().zip(window).enumerate() {
            if window == 0 || !size.is_multiple_of(window) {
                let expected = format!("a divisor of {size} pixels on axis {axis}");
                return Err(Error::value("window", expected, window));
            }
        }
        let windows = windows(shape, window, scale, config.isa)?;
        let all = Options { scale, isa: Some(config.isa), ..Options::default() }.build()?;
        Ok(HiLo { windows, all, shrink: Shrink::mean(shape, window)?, shape, window, lo })
    }
}

impl HiLoBuilder {
    /// The pixels of a window, which divide the image.
    pub fn window(self, window: [usize; 2]) -> Self {
        Self { window, ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl HiLo {
    /// Sizes, and how many query and key/value heads are Hi heads.
    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<(Dims, [usize; 2])> {
        let dims = image(x, [self.shape; 2])?;
        let group = dims.q_heads / dims.kv_heads.max(1);
        let lo = if self.window == [1, 1] { dims.q_heads } else { self.lo };
        if lo > dims.q_heads || (group > 0 && !lo.is_multiple_of(group)) {
            let expected =
                format!("at most {} heads, a multiple of the {group} over one key/value head", dims.q_heads);
            return Err(Error::value("lo", expected, lo));
        }
        let hi = dims.q_heads - lo;
        Ok((dims, [hi, hi.checked_div(group).unwrap_or(0)]))
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for HiLo {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let (dims, [q_heads, kv_heads]) = self.check(&x)?;
        let (hi, lo) = out.map(|out| out.split_at(Axis(1), q_heads)).unzip();
        let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., ..kv_heads, .., ..]));
        self.windows.attend(pass, Qkv::<T>::new(x.q.slice(s![.., ..q_heads, .., ..]), k, v), None, hi)?;
        let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., kv_heads.., .., ..]));
        let q = x.q.slice(s![.., q_heads.., .., ..]);
        if self.window == [1, 1] {
            return self.all.attend(pass, Qkv::<T>::new(q, k, v), lo);
        }
        let k = self.shrink.run(pass, self.all.isa(), k)?;
        let v = self.shrink.run(pass, self.all.isa(), v)?;
        let heads = dims.kv_heads - kv_heads;
        let (k, v) = (k.of_heads(heads, dims.head_dim), v.of_heads(heads, dims.value_dim));
        self.all.attend(pass, Qkv::<T, f32>::new(q, k, v), lo)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, [hi, _]) = self.check(&x)?;
        let scale = self.all.scale(&dims);
        let out = of_heads(&dims, &x.lengths, |head| {
            let q = head.rows(&x.q, &head.queries);
            if head.head >= hi {
                let pooled = |x: &ndarray::ArrayView4<'_, T>| {
                    let cells = self.shrink.define::<R, T>(x.index_axis(Axis(0), head.batch));
                    cells.index_axis_move(Axis(0), head.of(dims.kv_heads))
                };
                return attend([&q, &pooled(&x.k), &pooled(&x.v)], scale, |_, _| true, |_, _, score| score);
            }
            let window = |t: usize| {
                let wide = self.shape[1];
                [t / wide / self.window[0], t % wide / self.window[1]]
            };
            let (k, v) = (head.rows(&x.k, &head.keys), head.rows(&x.v, &head.keys));
            attend([&q, &k, &v], scale, |i, j| window(i) == window(j), |_, _, score| score)
        });
        Ok((out, ()))
    }
}

composite!(HiLo, Qkv);

exhibit! {
    HiLoExhibit of HiLo, "neighborhood", "HiLo", "arXiv 2205.13213";
    "half of the heads in windows of 2 x 2 pixels, the others over the means of all windows";
    not "where a single far pixel matters: it is seen as a part of a mean";
    tokens true;
    build(x, _) {
        let (heads, shape) = ([x.q.dim().1, x.k.dim().1], Grid::squarest(x.q.dim().2));
        let group = heads[0].checked_div(heads[1]).unwrap_or(0);
        HiLo::builder(shape, heads[1].div_ceil(2) * group).window(shape.map(|size| Grid::divisor(size, 2)))
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(HiLo, HiLoExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::neighborhood::Swin;
    use crate::testing::qkv::{Qkvs, close, held};

    fn image(shape: [usize; 2]) -> Qkvs {
        let n = shape[0] * shape[1];
        Qkvs::new([2, 4, 2, n, n, 10, 7], 1)
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, lo, window) in [
            ([8, 12], 2, [2, 2]),
            ([6, 9], 4, [3, 3]),
            ([9, 14], 0, [3, 7]),
            ([5, 5], 2, [1, 1]),
            ([0, 4], 2, [2, 2]),
        ] {
            held(&HiLo::builder(shape, lo).window(window).build().unwrap(), image(shape).qkv());
        }
    }

    #[test]
    fn what_it_is_made_of() {
        let x = image([6, 8]);
        let hilo = |lo, window| {
            HiLo::builder([6, 8], lo).window(window).build().unwrap().reference(x.qkv()).unwrap()
        };
        let dense = Dense::builder().build().unwrap().reference(x.qkv()).unwrap();
        close(&hilo(0, [1, 1]), &dense, 1e-12);
        close(&hilo(0, [6, 8]), &dense, 1e-12);
        let swin = Swin::builder([6, 8], [3, 2]).build().unwrap().reference(x.qkv()).unwrap();
        close(&hilo(0, [3, 2]), &swin, 1e-12);
        // All pixels in one mean: every query is given the mean value.
        let mean = x.v.mean_axis(Axis(2)).unwrap().mapv(f64::from);
        for ((b, h, _, c), out) in hilo(4, [6, 8]).indexed_iter() {
            assert!((out - mean[[b, h / 2, c]]).abs() < 1e-6);
        }
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let refusal = HiLo::builder([8, 9], 2).build().unwrap_err().to_string();
        assert_eq!(refusal, "window: expected a divisor of 9 pixels on axis 1, got 2");
        let odd = HiLo::builder([4, 4], 1).build().unwrap().forward(image([4, 4]).qkv()).unwrap_err();
        assert_eq!(
            odd.to_string(),
            "lo: expected at most 4 heads, a multiple of the 2 over one key/value head, got 1"
        );
    }
}
