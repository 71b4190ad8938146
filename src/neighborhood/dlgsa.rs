//! Dynamic depthwise convolution (DLGSANet's MHDLSA): the weights of every
//! pixel's neighborhood are given.

use crate::card::{Extras, carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::{Dims, Input};
use crate::keys::grid::Grid;
use crate::simd::Isa;
use crate::stages::dynamic::Dynamic;
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};

input! {
    /// Pixels, and the weights of their neighborhoods.
    MhdlsaInput {
        /// Pixels, row by row.
        x: T [batch, heads, len, dim],
        /// Weights of a neighborhood, row by row.
        weights: f32 [batch, heads, len, taps]
    }
    head_dim dim, value_dim dim;
}

/// Dynamic depthwise convolution (DLGSANet's MHDLSA): the weights of every
/// pixel's neighborhood are given.
///
/// ```text
/// y[c, p] = sum_{u, v} weights[g(c), p, (u, v)] x[c, p + (u - 3, v - 3)]         0 outside the image
/// ```
///
/// Heads are groups of channels that share weights, 7 x 7 for each pixel. The
/// model makes them by a small network of 1 x 1 and depthwise convolutions; no
/// softmax follows. "Lightweight Dynamic Local and Global Self-Attention
/// Networks for Image Super-Resolution" (arXiv 2301.02031), and its code. Its
/// other attention is [`ChannelAttention`](super::ChannelAttention).
///
/// Cost: `2 taps` flops for each element.
///
/// A convolution whose weights differ from pixel to pixel.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{Mhdlsa, MhdlsaInput}};
/// use ndarray::Array4;
///
/// let (x, weights) = (Array4::<f32>::ones((1, 15, 8 * 8, 6)), Array4::ones((1, 15, 8 * 8, 49)));
/// let out = Mhdlsa::builder([8, 8]).build()?.forward(MhdlsaInput::new(x.view(), weights.view()))?;
/// assert_eq!(out.dim(), (1, 15, 64, 6));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mhdlsa {
    dynamic: Dynamic,
    isa: Isa,
}

impl Mhdlsa {
    /// Neighborhoods of 7 x 7 pixels of an image of `shape`, height and width.
    pub fn builder(shape: [usize; 2]) -> MhdlsaBuilder {
        MhdlsaBuilder::with(shape)
    }
}

options! {
    /// Builds a [`Mhdlsa`].
    MhdlsaBuilder of Mhdlsa, isa;
    given { shape: [usize; 2]; }
    own { window: [usize; 2] = [7, 7]; }
    build(builder, config) {
        let MhdlsaBuilder { shape, window, .. } = builder;
        Grid::new(&shape)?;
        if let Some(side) = window.into_iter().find(|side| side.is_multiple_of(2) || *side > 1 << 15) {
            return Err(Error::value("window", "odd numbers of pixels", side));
        }
        Ok(Mhdlsa { dynamic: Dynamic { image: shape, sides: window }, isa: config.isa })
    }
}

impl MhdlsaBuilder {
    /// The sides of a neighborhood, which are odd. Default: 7.
    pub fn window(self, window: [usize; 2]) -> Self {
        Self { window, ..self }
    }
}

impl Mhdlsa {
    fn check<T: Element>(&self, x: &MhdlsaInput<'_, T>) -> Result<Dims> {
        let (dims, Dynamic { image: [height, width], sides: [high, wide] }) = (x.dims()?, self.dynamic);
        if dims.packed {
            return Err(Error::packed("a spatial shape"));
        }
        if dims.q_len != height * width {
            let expected = format!("one row for each of the {} pixels of the shape", height * width);
            return Err(Error::value("x", expected, dims.q_len));
        }
        if x.weights.dim().3 != high * wide {
            let expected = format!("[batch, heads, len, {high} * {wide}]");
            return Err(Error::shape("weights", expected, x.weights.shape()));
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<MhdlsaInput<'_, T>> for Mhdlsa {
    type State = ();

    fn flow(
        &self,
        x: MhdlsaInput<'_, T>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        self.check(&x)?;
        self.dynamic.run(pass, self.isa, (x.x, x.weights, &[]), None, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: MhdlsaInput<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let rows = head.rows::<R, T>(&x.x, &head.keys);
            let zero = rows.mapv(|_| R::of(0.0));
            self.dynamic.define(&rows, &head.rows(&x.weights, &head.keys), &zero)
        });
        Ok((out, ()))
    }
}

composite!(Mhdlsa, MhdlsaInput);

exhibit! {
    MhdlsaExhibit of Mhdlsa, "neighborhood", "MHDLSA", "arXiv 2301.02031";
    "7 x 7 pixels around, by weights that are given for each pixel";
    not "where weights should follow from scores of queries and keys: neighborhood attention";
    tokens true;
    build(x, _) { Mhdlsa::builder(Grid::squarest(x.q.dim().2)) }
    extras(x, field) {
        let (b, h, n, _) = x.q.dim();
        let weights = |(_, h, t, m): (usize, usize, usize, usize)| 0.1 * field.at(1, h, t, m);
        Extras {
            keys: Extras::pixels(x),
            channels: ndarray::Array4::from_shape_fn((b, h, n, 49), weights),
            ..Extras::default()
        }
    }
    input<'a, T>(_, extras) -> MhdlsaInput<'a, T> {
        MhdlsaInput::new(extras.keys.view(), extras.channels.view())
    }
}
carded!(Mhdlsa, MhdlsaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::stages::convolve::Convolution;
    use crate::testing::arrays::array;
    use crate::testing::qkv::held;
    use ndarray::{Array1, Array2, Array4, s};

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, window, dim) in
            [([8, 9], [7, 7], 6), ([3, 20], [3, 5], 17), ([1, 1], [7, 1], 3), ([0, 2], [3, 3], 4)]
        {
            let n = shape[0] * shape[1];
            let (x, weights) = (array(1, (2, 3, n, dim)), array(2, (2, 3, n, window[0] * window[1])));
            let mhdlsa = Mhdlsa::builder(shape).window(window).build().unwrap();
            held(&mhdlsa, MhdlsaInput::new(x.view(), weights.view()));
        }
    }

    /// The same weights for every pixel are a depthwise convolution.
    #[test]
    fn constant_weights_convolve() {
        let (x, taps) = (array(1, (1, 1, 5 * 6, 4)), array(2, (1, 1, 1, 49)));
        let weights = taps.broadcast((1, 1, 30, 49)).unwrap();
        let got =
            Mhdlsa::builder([5, 6]).build().unwrap().reference(MhdlsaInput::new(x.view(), weights)).unwrap();
        let kernels = taps.to_shape((1, 7, 7)).unwrap().broadcast((4, 7, 7)).unwrap().to_owned();
        let depthwise = Convolution::new([5, 6], [7, 7], &kernels, &Array1::zeros(4)).unwrap();
        let rows = x.slice(s![0, 0, .., ..]).mapv(f64::from);
        let want = depthwise.define(&rows, &Array2::zeros((30, 4)), 0);
        assert!(got.iter().zip(&want).all(|(a, b): (&f64, &f64)| (a - b).abs() < 1e-12));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let even = Mhdlsa::builder([4, 4]).window([7, 6]).build().unwrap_err().to_string();
        assert_eq!(even, "window: expected odd numbers of pixels, got 6");
        let (x, weights) = (Array4::<f32>::zeros((1, 2, 16, 3)), Array4::zeros((1, 2, 16, 48)));
        let mhdlsa = Mhdlsa::builder([4, 4]).build().unwrap();
        let refusal = mhdlsa.forward(MhdlsaInput::new(x.view(), weights.view())).unwrap_err().to_string();
        assert_eq!(refusal, "weights: expected shape [batch, heads, len, 7 * 7], got [1, 2, 16, 48]");
    }
}
