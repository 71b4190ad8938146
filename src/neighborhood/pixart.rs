//! Key/value token compression (PixArt-Sigma): attention over fewer keys and
//! values, of which one stands for a cell of pixels.

use ndarray::{Array1, Array2, Array3, ArrayView4, Axis, s};

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
use crate::stages::grid::image;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::shrink::Shrink;

/// What stands for a cell of `R x R` pixels.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Sampling {
    /// The mean of its pixels.
    #[default]
    Mean,
    /// Its first pixel. Released code calls this `uniform`, and `ave`.
    First,
    /// Every R-th token of the sequence, from the first one on: no cells.
    Every,
    /// A depthwise convolution and a layer norm.
    Convolution(Box<Convolved>),
}

/// A depthwise convolution of cells, and a layer norm of what comes out.
#[derive(Clone, Debug)]
pub struct Convolved {
    /// `[channels, R, R]`, the channels of all heads.
    pub kernels: Array3<f32>,
    /// `[channels]`
    pub bias: Array1<f32>,
    /// Factors and sums of the norm, `[channels]` each, if there is one.
    pub norm: Option<[Array1<f32>; 2]>,
}

/// Key/value token compression (PixArt-Sigma): attention over fewer keys and
/// values, of which one stands for a cell of pixels.
///
/// ```text
/// k'_c = LN(bias + sum_p weight_p * k_p)     over the R x R pixels p of cell c, channel by channel
/// v'_c = likewise
/// o_i  = sum_c softmax_c(scale q_i . k'_c) v'_c
/// ```
///
/// The layer norm is over the channels of all heads; weights start as means. Or
/// one pixel stands for its cell, or every R-th token for those up to the next.
/// What is left of an image that cells do not divide is dropped. "PixArt-Sigma:
/// Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image
/// Generation" (arXiv 2403.04692), and its code, whose keys and values share
/// the convolution and the norm.
///
/// Cost: `2 (head_dim + value_dim)` flops a query and a cell.
///
/// Attention over compressed keys and values.
///
/// Arrays are `[batch, heads, height * width, dim]`, row by row.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::Compressed};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 2, 32 * 32, 16));
/// let out = Compressed::builder([32, 32], 2).build()?.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 2, 1024, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Compressed {
    config: Config<Unmasked, Plain>,
    shape: [usize; 2],
    /// Of keys and of values; `None` is every so many tokens.
    shrinks: Option<[Shrink; 2]>,
    ratio: usize,
}

impl Compressed {
    /// Cells of `ratio x ratio` pixels of an image of `shape`, height and
    /// width.
    pub fn builder(shape: [usize; 2], ratio: usize) -> CompressedBuilder {
        CompressedBuilder::with(shape, ratio)
    }
}

options! {
    /// Builds a [`Compressed`].
    CompressedBuilder of Compressed, isa;
    given { shape: [usize; 2]; ratio: usize; }
    own {
        sampling: Sampling = Sampling::Mean;
        values: Option<Convolved> = None;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let CompressedBuilder { shape, ratio, sampling, values, scale, .. } = builder;
        Grid::new(&shape)?;
        if ratio == 0 {
            return Err(Error::value("ratio", "at least 1", ratio));
        }
        let convolved = |x: &Convolved| {
            if x.kernels.dim() != (x.kernels.dim().0, ratio, ratio) {
                let expected = format!("[channels, R, R] = [channels, {ratio}, {ratio}]");
                return Err(Error::shape("kernels", expected, x.kernels.shape()));
            }
            let shrink = Shrink::depthwise(shape, &x.kernels, &x.bias)?;
            match &x.norm {
                Some([gain, shift]) => shrink.norm(gain, shift),
                None => Ok(shrink),
            }
        };
        let first = || {
            let mut weights = Array2::zeros((ratio, ratio));
            weights[[0, 0]] = 1.0;
            Shrink::shared(shape, &weights)
        };
        let shrink = match &sampling {
            Sampling::Every => None,
            // Cells of one pixel are the pixels.
            Sampling::Mean | Sampling::First if ratio == 1 => None,
            Sampling::Mean => Some(Shrink::mean(shape, [ratio; 2])?),
            Sampling::First => Some(first()?),
            Sampling::Convolution(x) => Some(convolved(x)?),
        };
        let values = values.as_ref().map(convolved).transpose()?;
        let shrinks = shrink.map(|keys| [keys.clone(), values.unwrap_or(keys)]);
        let config = Options { scale, isa: Some(config.isa), ..Options::default() }.build()?;
        Ok(Compressed { config, shape, shrinks, ratio })
    }
}

impl CompressedBuilder {
    /// What stands for a cell. Default: the mean of its pixels.
    pub fn sampling(self, sampling: Sampling) -> Self {
        Self { sampling, ..self }
    }

    /// Keys and values have convolutions of their own: `keys`, and `values`.
    /// Models share one.
    pub fn convolutions(self, keys: Convolved, values: Convolved) -> Self {
        Self { sampling: Sampling::Convolution(Box::new(keys)), values: Some(values), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Compressed {
    fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = image(x, [self.shape; 2])?;
        if let Some([keys, values]) = &self.shrinks {
            keys.check("k", &x.k).and_then(|()| values.check("v", &x.v))?;
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Qkv<'_, T>> for Compressed {
    type State = ();

    fn flow(&self, x: Qkv<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let (dims, isa) = (self.check(&x)?, self.config.isa());
        let Some([keys, values]) = &self.shrinks else {
            let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., .., ..;self.ratio, ..]));
            return self.config.attend(pass, Qkv::<T>::new(x.q.reborrow(), k, v), out);
        };
        let (k, v) = (keys.run(pass, isa, x.k.reborrow())?, values.run(pass, isa, x.v.reborrow())?);
        let (k, v) = (k.of_heads(dims.kv_heads, dims.head_dim), v.of_heads(dims.kv_heads, dims.value_dim));
        self.config.attend(pass, Qkv::<T, f32>::new(x.q.reborrow(), k, v), out)
    }

    fn define<R: Real>(&self, x: Qkv<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let fewer = |x: &ArrayView4<'_, T>, which: usize| match &self.shrinks {
                None => {
                    head.rows(&x.slice(s![.., .., ..;self.ratio, ..]), &(0..dims.kv_len.div_ceil(self.ratio)))
                }
                Some(shrinks) => {
                    let cells = shrinks[which].define::<R, T>(x.index_axis(Axis(0), head.batch));
                    cells.index_axis_move(Axis(0), head.of(dims.kv_heads))
                }
            };
            let (q, k, v) = (head.rows(&x.q, &head.queries), fewer(&x.k, 0), fewer(&x.v, 1));
            attend([&q, &k, &v], self.config.scale(&dims), |_, _| true, |_, _, score| score)
        });
        Ok((out, ()))
    }
}

composite!(Compressed, Qkv);

exhibit! {
    CompressedExhibit of Compressed, "neighborhood", "key/value compression", "arXiv 2403.04692";
    "keys and values of cells of 2 x 2 pixels, by a depthwise convolution and a layer norm";
    not "where single pixels matter, or keys are so few that attention is not what takes time";
    tokens true;
    build(x, field) {
        let shape = Grid::squarest(x.q.dim().2);
        let ratio = shape[0].clamp(1, 2);
        let convolved = |which: u64, channels: usize| {
            let of = |shift: u64, around: f32| {
                Array1::from_shape_fn(channels, |c| around + 0.2 * field.at(which + shift, 0, c, 0))
            };
            let weight = |(c, a, b)| 0.25 + 0.1 * field.at(which, a, c, b);
            let kernels = Array3::from_shape_fn((channels, ratio, ratio), weight);
            Convolved { kernels, bias: of(1, 0.0), norm: Some([of(2, 1.0), of(3, 0.0)]) }
        };
        let [keys, values] = [x.k.dim(), x.v.dim()].map(|(_, heads, _, dim)| heads * dim);
        Compressed::builder(shape, ratio).convolutions(convolved(1, keys), convolved(5, values))
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Compressed, CompressedExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};

    fn image(shape: [usize; 2]) -> Qkvs {
        let n = shape[0] * shape[1];
        Qkvs::new([2, 4, 2, n, n, 10, 10], 1)
    }

    fn convolved(ratio: usize, norm: bool) -> Convolved {
        let norm = norm.then(|| [array(3, 20), array(4, 20)]);
        Convolved { kernels: array(1, (20, ratio, ratio)), bias: array(2, 20), norm }
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, ratio) in [([8, 12], 2), ([7, 11], 3), ([5, 5], 1), ([3, 4], 4), ([0, 4], 2)] {
            for sampling in [
                Sampling::Mean,
                Sampling::First,
                Sampling::Every,
                Sampling::Convolution(Box::new(convolved(ratio, false))),
                Sampling::Convolution(Box::new(convolved(ratio, true))),
            ] {
                let compressed = Compressed::builder(shape, ratio).sampling(sampling).build().unwrap();
                held(&compressed, image(shape).qkv());
            }
        }
    }

    #[test]
    fn what_it_is_made_of() {
        let (shape, x) = ([6, 8], image([6, 8]));
        let with = |ratio, sampling| {
            let compressed = Compressed::builder(shape, ratio).sampling(sampling).build().unwrap();
            compressed.reference(x.qkv()).unwrap()
        };
        let dense = |x: &Qkvs| Dense::builder().build().unwrap().reference(x.qkv()).unwrap();
        close(&with(1, Sampling::Mean), &dense(&x), 1e-12);
        // Weights as they start are means.
        let kernels = Array3::from_elem((20, 2, 2), 0.25);
        let start = Convolved { kernels, bias: Array1::zeros(20), norm: None };
        close(&with(2, Sampling::Convolution(Box::new(start))), &with(2, Sampling::Mean), 1e-12);
        let pick = |rows: &[usize]| Qkvs {
            q: x.q.clone(),
            k: x.k.select(Axis(2), rows),
            v: x.v.select(Axis(2), rows),
        };
        let corners: Vec<usize> =
            (0..6).step_by(2).flat_map(|y| (0..8).step_by(2).map(move |x| 8 * y + x)).collect();
        close(&with(2, Sampling::First), &dense(&pick(&corners)), 1e-12);
        close(&with(5, Sampling::Every), &dense(&pick(&(0..48).step_by(5).collect::<Vec<_>>())), 1e-12);
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let refusal = |builder: CompressedBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Compressed::builder([4, 4], 0)), "ratio: expected at least 1, got 0");
        let other =
            Compressed::builder([4, 4], 2).sampling(Sampling::Convolution(Box::new(convolved(3, false))));
        let kernels = "kernels: expected shape [channels, R, R] = [channels, 2, 2], got [20, 3, 3]";
        assert_eq!(refusal(other), kernels);
        let few =
            Compressed::builder([4, 4], 2).sampling(Sampling::Convolution(Box::new(convolved(2, true))));
        let x = Qkvs::new([1, 2, 1, 16, 16, 10, 10], 1);
        let refusal = few.build().unwrap().forward(x.qkv()).unwrap_err().to_string();
        assert_eq!(refusal, "k: expected shape heads and dim of 20 channels together, got [1, 1, 16, 10]");
    }
}
