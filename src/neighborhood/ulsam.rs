//! Ultra-lightweight subspace attention (ULSAM): the channels of each group are
//! weighed by one map over the pixels.

use ndarray::{Array1, Array2};

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::pixels::Pixels;
use crate::keys::grid::Grid;
use crate::simd::Isa;
use crate::stages::gate;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::spatial::Spatial;

/// Ultra-lightweight subspace attention (ULSAM): the channels of each group are
/// weighed by one map over the pixels.
///
/// ```text
/// u_p = max over 3 x 3 pixels around p of max(0, scale x + shift)        channel by channel
/// A   = softmax over all pixels of max(0, weights . u_p + bias)
/// o_p = x_p + A_p x_p
/// ```
///
/// Groups of channels are heads. The batch norms of both pointwise convolutions
/// are part of their numbers. "ULSAM: Ultra-Lightweight Subspace Attention Module
/// for Compact Convolutional Neural Networks" (arXiv 2006.15102), and its code.
///
/// Cost: 14 flops for each element, which is read twice and written once.
///
/// A map over pixels for each group of channels.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{Pixels, Ulsam}};
/// use ndarray::{Array1, Array2, Array4};
///
/// // 4 groups of 16 channels; weights of 0 see all pixels alike.
/// let (ones, zeros) = (Array2::ones((4, 16)), Array2::zeros((4, 16)));
/// let ulsam = Ulsam::builder([8, 8], ones, zeros.clone(), zeros, Array1::zeros(4)).build()?;
/// let x = Array4::<f32>::ones((1, 4, 64, 16));
/// assert!(ulsam.forward(Pixels::new(x.view()))?.iter().all(|x| (x - 65.0 / 64.0).abs() < 1e-6));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ulsam {
    isa: Isa,
    spatial: Spatial,
}

impl Ulsam {
    /// Images of `shape`, height and width; for each channel what it is multiplied
    /// by and what is added, and its weight in the map, `[heads, dim]` each; and
    /// what is added to the map, `[heads]`.
    pub fn builder(
        shape: [usize; 2],
        scale: Array2<f32>,
        shift: Array2<f32>,
        weights: Array2<f32>,
        bias: Array1<f32>,
    ) -> UlsamBuilder {
        UlsamBuilder::with(shape, scale, shift, weights, bias)
    }
}

options! {
    /// Builds an [`Ulsam`].
    UlsamBuilder of Ulsam, isa;
    given {
        shape: [usize; 2];
        scale: Array2<f32>, in FINITE;
        shift: Array2<f32>, in FINITE;
        weights: Array2<f32>, in FINITE;
        bias: Array1<f32>, in FINITE;
    }
    build(builder, config) {
        let UlsamBuilder { shape, scale, shift, weights, bias, .. } = builder;
        Grid::new(&shape)?;
        let (heads, dim) = scale.dim();
        for (argument, x) in [("shift", &shift), ("weights", &weights)] {
            if x.dim() != scale.dim() {
                return Err(Error::shape(argument, format!("[heads, dim] = [{heads}, {dim}]"), x.shape()));
            }
        }
        if bias.len() != heads {
            return Err(Error::shape("bias", format!("[heads] = [{heads}]"), bias.shape()));
        }
        let [scale, shift, weights] = [scale, shift, weights].map(|x| x.as_standard_layout().into_owned());
        let spatial = Spatial { shape, scale, shift, weights, bias: bias.to_vec() };
        Ok(Ulsam { isa: config.isa, spatial })
    }
}

impl Ulsam {
    fn check<T: Element>(&self, x: &Pixels<'_, T>) -> Result<Dims> {
        let (dims, (heads, dim)) = (x.image(self.spatial.shape)?, self.spatial.scale.dim());
        if (dims.q_heads, dims.head_dim) != (heads, dim) {
            let expected = format!("[batch, heads, len, dim] = [_, {heads}, _, {dim}]");
            return Err(Error::shape("x", expected, x.x.shape()));
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Pixels<'_, T>> for Ulsam {
    type State = ();

    fn flow(&self, x: Pixels<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let dims = self.check(&x)?;
        if dims.q_len == 0 {
            return Ok(());
        }
        let map = self.spatial.run(pass, self.isa, x.x.reborrow())?;
        let (numbers, stride) = (map.numbers(), map.stride());
        let factor = |row: usize| 1.0 + numbers[row / dims.q_len * stride + row % dims.q_len];
        gate::run(pass, self.isa, x.x, &[], factor, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: Pixels<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let rows = head.rows::<R, T>(&x.x, &head.keys);
            let map = self.spatial.define(&rows, head.head);
            Array2::from_shape_fn(rows.dim(), |(t, c)| rows[[t, c]] * (R::of(1.0) + map[t]))
        });
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        3 * self.spatial.scale.len() * size_of::<f32>()
    }
}

composite!(Ulsam, Pixels);

exhibit! {
    UlsamExhibit of Ulsam, "neighborhood", "ULSAM", "arXiv 2006.15102";
    "pixels are weighed by one softmax over the image for each group of channels";
    not "on large images, where the weights of a softmax over all pixels vanish";
    tokens true;
    build(x, field) {
        let dim = (x.q.dim().1, x.v.dim().3);
        let of = |which: u64| Array2::from_shape_fn(dim, |(h, c)| field.at(which, h, c, 0));
        let bias = Array1::from_shape_fn(dim.0, |h| field.at(4, h, 0, 0));
        Ulsam::builder(Grid::squarest(x.q.dim().2), of(1).mapv(share), of(2), of(3), bias)
    }
    extras(x, _) { Extras { keys: Extras::pixels(x), ..Extras::default() } }
    input<'a, T>(_, extras) -> Pixels<'a, T> { Pixels::new(extras.keys.view()) }
}
carded!(Ulsam, UlsamExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::testing::arrays::array;
    use crate::testing::qkv::held;
    use ndarray::Array4;

    fn ulsam(shape: [usize; 2], heads: usize, dim: usize) -> Ulsam {
        let of = |seed| array::<ndarray::Ix2, _>(seed, (heads, dim));
        Ulsam::builder(shape, of(1), of(2), of(3), array(4, heads)).build().unwrap()
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, heads, dim) in [
            ([7, 9], 2, 20),
            ([1, 1], 3, 5),
            ([30, 1], 1, 16),
            ([4, 5], 2, 0),
            ([0, 5], 2, 3),
            ([40, 33], 1, 3),
        ] {
            let x = array(5, (2, heads, shape[0] * shape[1], dim));
            held(&ulsam(shape, heads, dim), Pixels::new(x.view()));
        }
    }

    /// Weights sum to 1, an image that is the same everywhere has the same ones, and
    /// a NaN shows in its whole group and in no other.
    #[test]
    fn identities() {
        let same = Array4::from_elem((1, 2, 30, 8), 2.0f32);
        let out = ulsam([5, 6], 2, 8).reference(Pixels::new(same.view())).unwrap();
        assert!(out.iter().all(|out| (out - 2.0 * 31.0 / 30.0).abs() < 1e-12));
        let mut x: Array4<f32> = array(6, (1, 2, 30, 8)).mapv(|x: f32| x + 3.0);
        let out = ulsam([5, 6], 2, 8).reference(Pixels::new(x.view())).unwrap();
        for h in 0..2 {
            let map = (0..30).map(|t| out[[0, h, t, 0]] / f64::from(x[[0, h, t, 0]]) - 1.0);
            assert!((map.sum::<f64>() - 1.0).abs() < 1e-9);
        }
        x[[0, 1, 7, 3]] = f32::NAN;
        let out = ulsam([5, 6], 2, 8).forward(Pixels::new(x.view())).unwrap();
        assert!(out.indexed_iter().all(|((_, h, ..), x)| x.is_nan() == (h == 1)));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let of = |dim| Array2::zeros((2, dim));
        let builder = |bias| Ulsam::builder([4, 5], of(3), of(3), of(4), Array1::zeros(bias));
        let refusal = builder(2).build().unwrap_err().to_string();
        assert_eq!(refusal, "weights: expected shape [heads, dim] = [2, 3], got [2, 4]");
        let x: Array4<f32> = array(1, (1, 2, 19, 3));
        let other = ulsam([4, 5], 2, 3).forward(Pixels::new(x.view())).unwrap_err().to_string();
        assert_eq!(other, "x: expected one row for each of the 20 pixels of the shape, got 19");
    }
}
