//! FFNified attention (MetaMixer): keys and values are depthwise convolutions, and
//! GELU stands where a softmax would.

use ndarray::{Array1, Array2, Array3, s};

use crate::card::{Extras, carded, exhibit};
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::pixels::Pixels;
use crate::keys::grid::Grid;
use crate::simd::Isa;
use crate::stages::affine::Affine;
use crate::stages::convolve::{Convolution, Then};
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::side;

/// A kernel `[channels, rows, columns]` of odd sides, and what is added.
type Depthwise = (Array3<f32>, Array1<f32>);

/// FFNified attention (MetaMixer): keys and values are depthwise convolutions, and
/// GELU stands where a softmax would.
///
/// ```text
/// q = W x + b           pixel by pixel
/// a = gelu(K_1 * q)     K_1, K_2 depthwise convolutions, each with what it adds
/// y = K_2 * a           0 outside the image
/// ```
///
/// "MetaMixer: A Versatile Mixer for Vision" (arXiv 2406.02021), and its code. Batch
/// norms are part of the weights; where training has a smaller kernel beside one of
/// 7 x 7, the two are added up ([`branches`](MetaMixerBuilder::branches)). Residuals
/// and the mixer of channels that follows are the caller's.
///
/// Cost: `2 channels + 4 taps` flops for each element. A window of as many pixels
/// costs neighborhood attention `4 taps` for each element, and a softmax.
///
/// Two depthwise convolutions of projected pixels, with GELU between.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{MetaMixer, Pixels}};
/// use ndarray::{Array1, Array2, Array3, Array4};
///
/// let kernel = || (Array3::from_elem((32, 7, 7), 0.02), Array1::zeros(32));
/// let mixer = MetaMixer::builder([14, 14], (Array2::eye(32), Array1::zeros(32)), [kernel(), kernel()]);
/// let x = Array4::<f32>::ones((2, 1, 14 * 14, 32));
/// assert_eq!(mixer.build()?.forward(Pixels::new(x.view()))?.dim(), (2, 1, 196, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MetaMixer {
    isa: Isa,
    shape: [usize; 2],
    query: Affine,
    kernels: [Convolution; 2],
}

impl MetaMixer {
    /// Images of `shape`, height and width; the projection of pixels, `[channels,
    /// channels]` and what it adds; and two depthwise kernels `[channels, rows,
    /// columns]` of odd sides and what they add. Channels are those of all heads.
    pub fn builder(
        shape: [usize; 2],
        query: (Array2<f32>, Array1<f32>),
        kernels: [(Array3<f32>, Array1<f32>); 2],
    ) -> MetaMixerBuilder {
        MetaMixerBuilder::with(shape, query, kernels)
    }
}

options! {
    /// Builds a [`MetaMixer`].
    MetaMixerBuilder of MetaMixer, isa;
    given { shape: [usize; 2]; query: (Array2<f32>, Array1<f32>); kernels: [Depthwise; 2]; }
    own { branches: Option<[Depthwise; 2]> = None; }
    build(builder, config) {
        let MetaMixerBuilder { shape, query, kernels, branches, .. } = builder;
        Grid::new(&shape)?;
        let channels = query.0.dim().0;
        if query.0.dim().1 != channels {
            return Err(Error::shape("query", "[channels, channels]", query.0.shape()));
        }
        let kernels = match branches {
            None => kernels,
            Some(branches) => {
                let [first, second] = kernels;
                let [one, two] = branches;
                [folded(first, &one)?, folded(second, &two)?]
            }
        };
        let convolution = |(kernel, bias): &Depthwise| {
            odd("kernels", channels, kernel)?;
            let (_, rows, columns) = kernel.dim();
            Convolution::new(shape.map(|size| size.max(1)), [rows, columns], kernel, bias)
        };
        let [first, second] = &kernels;
        Ok(MetaMixer {
            isa: config.isa,
            shape,
            query: Affine::new("query", &query.0, Some(&query.1))?,
            kernels: [convolution(first)?, convolution(second)?],
        })
    }
}

impl MetaMixerBuilder {
    /// A smaller kernel beside each of the two, and what it adds, as training has
    /// them: their middles lie on each other. Default: none.
    pub fn branches(self, branches: [(Array3<f32>, Array1<f32>); 2]) -> Self {
        Self { branches: Some(branches), ..self }
    }
}

/// Refuses kernels without a middle, or of other channels.
fn odd(argument: &'static str, channels: usize, kernel: &Array3<f32>) -> Result<()> {
    let (own, rows, columns) = kernel.dim();
    if own == channels && rows % 2 == 1 && columns % 2 == 1 {
        return Ok(());
    }
    Err(Error::shape(argument, format!("[channels, rows, columns] = [{channels}, odd, odd]"), kernel.shape()))
}

/// A kernel and a smaller one in its middle.
fn folded((mut kernel, mut bias): Depthwise, (small, more): &Depthwise) -> Result<Depthwise> {
    let (channels, rows, columns) = kernel.dim();
    odd("branches", channels, small)?;
    let (_, high, wide) = small.dim();
    if high > rows || wide > columns || more.len() != bias.len() {
        let expected = format!("at most [{channels}, {rows}, {columns}], and {} to add", bias.len());
        return Err(Error::shape("branches", expected, small.shape()));
    }
    let (y, x) = ((rows - high) / 2, (columns - wide) / 2);
    let mut middle = kernel.slice_mut(s![.., y..y + high, x..x + wide]);
    middle += small;
    bias += more;
    Ok((kernel, bias))
}

impl MetaMixer {
    fn check<T: Element>(&self, x: &Pixels<'_, T>) -> Result<Dims> {
        let (dims, [channels, _]) = (x.image(self.shape)?, self.query.sides());
        if dims.q_heads.checked_mul(dims.head_dim) != Some(channels) {
            let expected = format!("heads and dim of {channels} channels together");
            return Err(Error::shape("x", expected, x.x.shape()));
        }
        Ok(dims)
    }
}

impl<T: Element> Pipeline<Pixels<'_, T>> for MetaMixer {
    type State = ();

    fn flow(&self, x: Pixels<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let Dims { batch, q_heads: heads, q_len: n, head_dim: dim, .. } = self.check(&x)?;
        if [batch, heads, n, dim].contains(&0) {
            return Ok(());
        }
        let (isa, [first, second]) = (self.isa, &self.kernels);
        let rows = side::run(pass, isa, x.x)?;
        let q = self.query.run(pass, isa, rows.view())?;
        let mut a = pass.rows((batch, heads, n, dim))?;
        first.run(pass, isa, q.of_heads(heads, dim), None, Then::Gelu, a.view_mut());
        second.run(pass, isa, a.view(), None, Then::Nothing, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: Pixels<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        self.check(&x)?;
        let mut out = x.x.mapv(|_| R::of(0.0));
        for (x, mut out) in x.x.outer_iter().zip(out.outer_iter_mut()) {
            let pixels = side::define(x);
            let (q, zero) = (self.query.define(&pixels), pixels.mapv(|_| R::of(0.0)));
            let a = self.kernels[0].define(&q, &zero, 0).mapv(|x| x.gelu());
            let y = self.kernels[1].define(&a, &zero, 0);
            side::spread(&y, &mut out);
        }
        Ok((out, ()))
    }

    fn parameters(&self) -> usize {
        self.query.bytes() + self.kernels.iter().map(Convolution::bytes).sum::<usize>()
    }
}

composite!(MetaMixer, Pixels);

exhibit! {
    MetaMixerExhibit of MetaMixer, "neighborhood", "FFNified attention", "arXiv 2406.02021";
    "projected pixels, two depthwise convolutions of 7 x 7 and GELU between them";
    not "where weights should follow from what is compared: neighborhood attention";
    tokens true;
    build(x, field) {
        let channels = x.q.dim().1 * x.v.dim().3;
        let root = 1.0 / (channels.max(1) as f32).sqrt();
        let query = Array2::from_shape_fn((channels, channels), |(a, b)| root * field.at(1, a, b, 0));
        let row = |which: u64| Array1::from_shape_fn(channels, |c| 0.1 * field.at(which, c, 0, 0));
        let kernel = |which: u64, side: usize| {
            let taps = Array3::from_shape_fn((channels, side, side), |(c, y, x)| 0.3 * field.at(which, c, y, x));
            (taps, row(which))
        };
        let builder = MetaMixer::builder(Grid::squarest(x.q.dim().2), (query, row(2)), [kernel(3, 7), kernel(4, 7)]);
        builder.branches([kernel(5, 3), kernel(6, 3)])
    }
    extras(x, _) { Extras { keys: Extras::pixels(x), ..Extras::default() } }
    input<'a, T>(_, extras) -> Pixels<'a, T> { Pixels::new(extras.keys.view()) }
}
carded!(MetaMixer, MetaMixerExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::math::gates::exact::gelu;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{close, held};
    use ndarray::Array4;

    fn kernel(seed: u64, channels: usize, [rows, columns]: [usize; 2]) -> Depthwise {
        (array(seed, (channels, rows, columns)), array(seed + 100, channels))
    }

    fn mixer(shape: [usize; 2], channels: usize, sides: [usize; 2]) -> MetaMixerBuilder {
        let query = (array(1, (channels, channels)), array(2, channels));
        MetaMixer::builder(shape, query, [kernel(3, channels, sides), kernel(4, channels, sides)])
    }

    #[test]
    fn kernels_follow_the_definition() {
        for (shape, heads, dim, sides) in [
            ([9, 14], 2, 20, [7, 7]),
            ([3, 17], 1, 5, [3, 5]),
            ([1, 1], 3, 1, [1, 3]),
            ([0, 3], 1, 4, [3, 3]),
        ] {
            let x = array(5, (2, heads, shape[0] * shape[1], dim));
            held(&mixer(shape, heads * dim, sides).build().unwrap(), Pixels::new(x.view()));
        }
    }

    /// Kernels that are 1 in their middle leave GELU of the projection; and a smaller
    /// kernel beside one is what it is alone, for what lies between is linear.
    #[test]
    fn identities() {
        let x = array(5, (1, 2, 20, 3));
        let mut one = (Array3::zeros((6, 3, 3)), Array1::zeros(6));
        one.0.slice_mut(s![.., 1, 1]).fill(1.0);
        let (query, bias) = (array(1, (6, 6)), array(2, 6));
        let plain = MetaMixer::builder([4, 5], (query.clone(), bias.clone()), [one.clone(), one.clone()]);
        let out = plain.build().unwrap().reference(Pixels::new(x.view())).unwrap();
        let want = Array4::from_shape_fn((1, 2, 20, 3), |(_, h, t, c)| {
            let row = (0..6).map(|i| f64::from(query[[h * 3 + c, i]]) * f64::from(x[[0, i / 3, t, i % 3]]));
            gelu(row.sum::<f64>() + f64::from(bias[h * 3 + c]))
        });
        close(&out, &want, 1e-12);
        // The second convolution is linear: of the sum of two kernels it is the sum.
        let with = |second: Depthwise| {
            let mixer = MetaMixer::builder([4, 5], (query.clone(), bias.clone()), [one.clone(), second]);
            mixer.clone().build().unwrap().reference(Pixels::new(x.view())).unwrap()
        };
        let (large, small) = (kernel(6, 6, [7, 5]), kernel(7, 6, [3, 3]));
        let nothing = (one.0.mapv(|_| 0.0), one.1.clone());
        let both = MetaMixer::builder([4, 5], (query.clone(), bias.clone()), [one.clone(), large.clone()]);
        let both = both.branches([nothing, small.clone()]).build().unwrap();
        let sum = with(large) + with(small);
        close(&both.reference(Pixels::new(x.view())).unwrap(), &sum, 1e-6);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |mixer: MetaMixerBuilder| mixer.build().unwrap_err().to_string();
        let even = "kernels: expected shape [channels, rows, columns] = [6, odd, odd], got [6, 2, 3]";
        assert_eq!(refusal(mixer([4, 5], 6, [2, 3])), even);
        let large = mixer([4, 5], 6, [3, 3]).branches([kernel(1, 6, [5, 3]), kernel(1, 6, [3, 3])]);
        let expected = "branches: expected shape at most [6, 3, 3], and 6 to add, got [6, 5, 3]";
        assert_eq!(refusal(large), expected);
        let oblong =
            MetaMixer::builder([4, 5], (array(1, (6, 5)), array(2, 6)), [0, 1].map(|i| kernel(i, 6, [3, 3])));
        assert_eq!(refusal(oblong), "query: expected shape [channels, channels], got [6, 5]");
        let x = array(5, (1, 2, 20, 4));
        let other = mixer([4, 5], 6, [3, 3]).build().unwrap().forward(Pixels::new(x.view())).unwrap_err();
        assert_eq!(
            other.to_string(),
            "x: expected shape heads and dim of 6 channels together, got [1, 2, 20, 4]"
        );
    }
}
