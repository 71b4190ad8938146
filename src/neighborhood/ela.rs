//! Efficient local attention (ELA): gates for rows and for columns of an image,
//! from their means.

use ndarray::{Array1, Array2, Array3, Axis};

use crate::card::{Extras, carded, exhibit};
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
use crate::stages::strips::{StripGate, define_means, means};
use crate::stages::window::join;

/// Efficient local attention (ELA): gates for rows and for columns of an image,
/// from their means.
///
/// ```text
/// z_y  = mean of row y over its pixels            z_x = mean of column x
/// g    = sigmoid(group norm(convolution of z along the rows, or the columns))
/// o_yx = v_yx g_y g_x                             channel by channel
/// ```
///
/// One convolution and one norm serve rows and columns; the norm is over the
/// channels of a group and all rows, or all columns. There is 0 outside the
/// image. "ELA: Efficient Local Attention for Deep Convolutional Neural
/// Networks" (arXiv 2403.01123), whose variants differ in taps, groups of the
/// convolution and groups of the norm.
///
/// Cost: two reads of the pixels and a write; `2 taps (channels of a group)` flops
/// for each channel, row and column besides.
///
/// Gates of strips.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{Ela, Pixels}};
/// use ndarray::{Array3, Array4};
///
/// // 32 channels, each convolved by 7 taps with the 7 others of its group.
/// let ela = Ela::builder([14, 14], Array3::zeros((32, 8, 7)), 16).build()?;
/// let x = Array4::<f32>::ones((1, 1, 14 * 14, 32));
/// assert!(ela.forward(Pixels::new(x.view()))?.iter().all(|x| *x == 0.25));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ela {
    isa: Isa,
    shape: [usize; 2],
    gate: StripGate,
}

impl Ela {
    /// Images of `shape`, height and width; a kernel `[channels, channels of a
    /// group, taps]` of odd taps, channels those of all heads; and how many groups
    /// of channels are normalised.
    pub fn builder(shape: [usize; 2], kernel: Array3<f32>, norms: usize) -> ElaBuilder {
        ElaBuilder::with(shape, kernel, norms)
    }
}

options! {
    /// Builds an [`Ela`].
    ElaBuilder of Ela, isa;
    given { shape: [usize; 2]; kernel: Array3<f32>, in FINITE; norms: usize; }
    own { norm: Option<(Array1<f32>, Array1<f32>)> = None; }
    build(builder, config) {
        let ElaBuilder { shape, kernel, norms, norm, .. } = builder;
        Grid::new(&shape)?;
        let (channels, own, taps) = kernel.dim();
        let divides = |part: usize| part > 0 && channels.is_multiple_of(part);
        if (channels > 0 && !divides(own)) || taps.is_multiple_of(2) {
            let expected = "[channels, a divisor of them, odd taps]";
            return Err(Error::shape("kernel", expected, kernel.shape()));
        }
        if norms == 0 || !channels.is_multiple_of(norms) {
            return Err(Error::value("norms", format!("a divisor of the {channels} channels"), norms));
        }
        let (gain, shift) = norm.unwrap_or_else(|| (Array1::ones(channels), Array1::zeros(channels)));
        for (argument, x) in [("gain", &gain), ("shift", &shift)] {
            if x.len() != channels {
                return Err(Error::shape(argument, format!("[channels] = [{channels}]"), x.shape()));
            }
            if let Some(x) = x.iter().find(|x| !x.is_finite()) {
                return Err(Error::value(argument, "finite numbers", x));
            }
        }
        Ok(Ela { isa: config.isa, shape, gate: StripGate { kernel, norms, gain, shift } })
    }
}

impl ElaBuilder {
    /// Factors and sums of the norm, `[channels]` each. Default: 1 and 0.
    pub fn norm(self, gain: Array1<f32>, shift: Array1<f32>) -> Self {
        Self { norm: Some((gain, shift)), ..self }
    }
}

impl Ela {
    fn check<T: Element>(&self, x: &Pixels<'_, T>) -> Result<Dims> {
        let dims = x.image(self.shape)?;
        let (channels, (_, heads, _, dim)) = (self.gate.kernel.dim().0, x.x.dim());
        if heads.checked_mul(dim) != Some(channels) {
            return Err(Error::shape(
                "x",
                format!("heads and dim of {channels} channels together"),
                x.x.shape(),
            ));
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Pixels<'_, T>> for Ela {
    type State = ();

    fn flow(&self, x: Pixels<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let Dims { batch, q_heads, q_len, head_dim: dim, .. } = self.check(&x)?;
        if [batch, q_heads, q_len, dim].contains(&0) {
            return Ok(());
        }
        let (isa, [height, width]) = (self.isa, self.shape);
        let strips = means(pass, isa, self.shape, x.x.reborrow())?;
        let strips = join(pass, isa, q_heads, None, strips.view().permuted_axes([0, 1, 3, 2]))?;
        let gates = self.gate.run(pass, isa, self.shape, &strips)?;
        let gates = join(pass, isa, q_heads, None, gates.view().permuted_axes([0, 1, 3, 2]))?;
        let (row, column) = (|token: usize| token / width, |token: usize| height + token % width);
        let factors: [gate::Factors<'_>; 2] = [(gates.view(), &row), (gates.view(), &column)];
        gate::run(pass, isa, x.x, &factors, |_| 1.0, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: Pixels<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let [height, width] = self.shape;
        let mut out = x.x.mapv(|x| R::of(x.to_f64()));
        if out.is_empty() {
            return Ok((out, ()));
        }
        for mut image in out.outer_iter_mut() {
            let of_head = |head: ndarray::ArrayView2<'_, R>| define_means(self.shape, &head.to_owned());
            let strips: Vec<Array2<R>> = image.outer_iter().map(of_head).collect();
            let views: Vec<_> = strips.iter().map(|strips| strips.view()).collect();
            let strips = ndarray::concatenate(Axis(1), &views).expect("as many strips in each head");
            let gates = self.gate.define(self.shape, &strips);
            for ((h, t, c), x) in image.indexed_iter_mut() {
                let gate = |strip: usize| gates[[strip, h * dims.head_dim + c]];
                *x = *x * gate(t / width) * gate(height + t % width);
            }
        }
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        (self.gate.kernel.len() + 2 * self.gate.gain.len()) * size_of::<f32>()
    }
}

composite!(Ela, Pixels);

exhibit! {
    ElaExhibit of Ela, "neighborhood", "ELA", "arXiv 2403.01123";
    "pixels times gates of their row and of their column, made of the means of both";
    not "where what is in a row matters, beyond its mean";
    tokens true;
    build(x, field) {
        let channels = x.q.dim().1 * x.v.dim().3;
        let (own, norms) = (Grid::divisor(channels, 8).max(1), Grid::divisor(channels, 16).max(1));
        let kernel = Array3::from_shape_fn((channels, own, 7), |(c, i, tap)| field.at(1, c, i, tap));
        let of = |which: u64, around: f32| Array1::from_shape_fn(channels, |c| around + 0.5 * field.at(which, c, 0, 0));
        Ela::builder(Grid::squarest(x.q.dim().2), kernel, norms).norm(of(2, 1.0), of(3, 0.0))
    }
    extras(x, _) { Extras { keys: Extras::pixels(x), ..Extras::default() } }
    input<'a, T>(_, extras) -> Pixels<'a, T> { Pixels::new(extras.keys.view()) }
}
carded!(Ela, ElaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::testing::arrays::array;
    use crate::testing::qkv::held;
    use ndarray::{Array4, s};

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, heads, dim, own, norms, taps) in [
            ([14, 9], 2, 24, 8, 6, 7),
            ([3, 70], 1, 6, 1, 2, 5),
            ([1, 1], 1, 4, 4, 1, 3),
            ([40, 33], 3, 5, 3, 5, 1),
            ([2, 3], 1, 5, 5, 1, 9),
            ([0, 3], 1, 4, 2, 2, 3),
        ] {
            let channels = heads * dim;
            let x = array(2, (2, heads, shape[0] * shape[1], dim));
            let ela = Ela::builder(shape, array(1, (channels, own, taps)), norms);
            let with = ela.clone().norm(array(3, channels), array(4, channels));
            for ela in [ela, with] {
                held(&ela.build().unwrap(), Pixels::new(x.view()));
            }
        }
    }

    /// A gate of nothing is a half; an image that is the same along its rows has
    /// gates of rows that only know the ends of the convolution.
    #[test]
    fn identities() {
        let x: Array4<f32> = array(1, (1, 2, 20, 3));
        let ela = Ela::builder([4, 5], Array3::zeros((6, 1, 5)), 3).build().unwrap();
        let out = ela.reference(Pixels::new(x.view())).unwrap();
        assert!(out.iter().zip(&x).all(|(out, &x)| (out - 0.25 * f64::from(x)).abs() < 1e-12));
        // With one tap, rows that are turned around have gates that are.
        let one = Ela::builder([4, 5], array(3, (6, 2, 1)), 3).build().unwrap();
        let turned = x.slice(s![.., .., ..;-1, ..]);
        let (out, back) =
            (one.reference(Pixels::new(x.view())).unwrap(), one.reference(Pixels::new(turned)).unwrap());
        let back = back.slice(s![.., .., ..;-1, ..]);
        assert!(out.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-12));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |own, norms| {
            Ela::builder([4, 5], Array3::zeros((6, own, 5)), norms).build().unwrap_err().to_string()
        };
        assert_eq!(refusal(2, 4), "norms: expected a divisor of the 6 channels, got 4");
        assert!(refusal(4, 3).starts_with("kernel: expected shape [channels, a divisor of them, odd taps]"));
        let x: Array4<f32> = array(1, (1, 2, 20, 4));
        let ela = Ela::builder([4, 5], Array3::zeros((6, 1, 5)), 3).build().unwrap();
        let other = ela.forward(Pixels::new(x.view())).unwrap_err().to_string();
        assert_eq!(other, "x: expected shape heads and dim of 6 channels together, got [1, 2, 20, 4]");
    }
}
