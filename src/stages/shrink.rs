//! Cells of an image that do not overlap, each made one token: a weighted sum
//! of its pixels, normalised or not.

use ndarray::{Array1, Array2, Array3, ArrayView3, ArrayView4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::simd::any::AnyArray;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// What is added to a variance.
const EPSILON: f32 = 1e-5;

/// How the tokens of an image become fewer. What the cells leave of the image
/// on its right and below is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Shrink {
    image: [usize; 2],
    cell: [usize; 2],
    /// Pixels of a cell that count.
    pixels: Vec<[usize; 2]>,
    /// Channels of all heads, unless weights are the same for each.
    channels: Option<usize>,
    /// For each pixel, and then what is added: a number for each channel, and
    /// zeros so that whole vectors can be loaded.
    weights: Vec<f32>,
    /// Factors and sums of a layer norm over the channels of all heads.
    norm: Option<[Vec<f32>; 2]>,
}

/// Numbers with zeros behind them.
fn padded(x: impl IntoIterator<Item = f32>) -> Vec<f32> {
    x.into_iter().chain([0.0; MAX_LANES]).collect()
}

impl Shrink {
    fn checked(image: [usize; 2], cell: [usize; 2]) -> Result<()> {
        if cell.contains(&0) || cell[0].saturating_mul(cell[1]) > 1 << 20 {
            return Err(Error::value("ratio", "from 1 x 1 to 2^20 pixels", format_args!("{cell:?}")));
        }
        match image[0].checked_mul(image[1]) {
            Some(_) => Ok(()),
            None => Err(Error::shape("shape", "an image whose pixels can be counted", &image)),
        }
    }

    /// The same weights for every channel, `[height, width]` of a cell; the sum
    /// is over the pixels whose weight is not 0.
    pub(crate) fn shared(image: [usize; 2], weights: &Array2<f32>) -> Result<Self> {
        let cell = weights.dim().into();
        Self::checked(image, cell)?;
        let counting = || weights.indexed_iter().filter(|(_, weight)| **weight != 0.0);
        let pixels = counting().map(|((y, x), _)| [y, x]).collect();
        let weights = counting().map(|(_, &weight)| weight).chain([0.0]).collect();
        Ok(Self { image, cell, pixels, channels: None, weights, norm: None })
    }

    /// Means.
    pub(crate) fn mean(image: [usize; 2], cell: [usize; 2]) -> Result<Self> {
        Self::checked(image, cell)?;
        Self::shared(image, &Array2::from_elem(cell, 1.0 / (cell[0] * cell[1]) as f32))
    }

    /// A depthwise convolution by strides as large as its kernels, `[channels,
    /// height, width]`, and what it adds.
    pub(crate) fn depthwise(image: [usize; 2], kernels: &Array3<f32>, bias: &Array1<f32>) -> Result<Self> {
        let (channels, height, width) = kernels.dim();
        Self::checked(image, [height, width])?;
        if bias.len() != channels {
            let expected = format!("[channels] = [{channels}] as the kernels have it");
            return Err(Error::shape("bias", expected, bias.shape()));
        }
        let pixels: Vec<_> = (0..height).flat_map(|y| (0..width).map(move |x| [y, x])).collect();
        let of_pixel = |&[y, x]: &[usize; 2]| padded((0..channels).map(move |c| kernels[[c, y, x]]));
        let weights = pixels.iter().flat_map(of_pixel).chain(padded(bias.iter().copied())).collect();
        let channels = Some(channels);
        Ok(Self { image, cell: [height, width], pixels, channels, weights, norm: None })
    }

    /// With a layer norm of these factors and sums.
    pub(crate) fn norm(self, gain: &Array1<f32>, shift: &Array1<f32>) -> Result<Self> {
        for (argument, x) in [("gain", gain), ("shift", shift)] {
            if self.channels.is_some_and(|channels| channels != x.len()) || gain.len() != x.len() {
                let expected = format!("[channels] = [{}]", self.channels.unwrap_or(gain.len()));
                return Err(Error::shape(argument, expected, x.shape()));
            }
        }
        let norm = Some([gain, shift].map(|x| padded(x.iter().copied())));
        Ok(Self { channels: Some(gain.len()), norm, ..self })
    }

    /// Refuses an array of other channels.
    pub(crate) fn check<T>(&self, argument: &'static str, x: &ArrayView4<'_, T>) -> Result<()> {
        let have = x.dim().1 * x.dim().3;
        match self.channels {
            Some(channels) if channels != have => {
                let expected = format!("heads and dim of {channels} channels together");
                Err(Error::shape(argument, expected, x.shape()))
            }
            _ => Ok(()),
        }
    }

    /// Rows and columns of cells.
    pub(crate) fn cells(&self) -> [usize; 2] {
        std::array::from_fn(|i| self.image[i] / self.cell[i])
    }

    /// Whether each channel has weights of its own.
    fn is_depthwise(&self) -> bool {
        self.weights.len() > self.pixels.len() + 1
    }

    /// Where the weights of a pixel begin.
    #[inline(always)]
    fn weight(&self, pixel: usize) -> usize {
        if self.is_depthwise() { pixel * (self.channels.unwrap_or(0) + MAX_LANES) } else { pixel }
    }

    /// The row of a pixel of a cell.
    #[inline(always)]
    fn row(&self, cell: usize, [y, x]: [usize; 2]) -> usize {
        let wide = self.image[1] / self.cell[1];
        (cell / wide * self.cell[0] + y) * self.image[1] + cell % wide * self.cell[1] + x
    }

    /// The tokens `[batch, 1, cells, heads * dim]`: see [`Scratch::of_heads`].
    pub(crate) fn run<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        x: ArrayView4<'_, T>,
    ) -> Result<Scratch<'a>> {
        let (batch, heads, len, dim) = x.dim();
        let cells = self.cells().iter().product::<usize>();
        let mut to = pass.rows((batch, 1, cells, heads * dim))?;
        let (tasks, stride) = (batch * cells, to.stride());
        let flops = || (2 * tasks * self.pixels.len() * heads * dim) as u64;
        pass.stage(flops, bytes_for::<u64>(claim_words(tasks)), |mut arena| {
            let to = Parts::new(to.numbers_mut(), stride, arena.take(claim_words(tasks)));
            let (x, start) = (T::any(Heads::new(x)), |_| ());
            parallel::for_each(parallel::threads(), tasks, start, |(), task| {
                let (batch, cell) = (task / cells, task % cells);
                isa.dispatch(Cell { of: self, x, len, batch, cell, to: to.take(task) });
            });
        });
        Ok(to)
    }

    /// The definition, of all heads of an entry of the batch.
    pub(crate) fn define<R: Real, T: Element>(&self, x: ArrayView3<'_, T>) -> Array3<R> {
        let (heads, _, dim) = x.dim();
        let cells = self.cells().iter().product::<usize>();
        let mut out = Array3::from_shape_fn((heads, cells, dim), |(h, cell, c)| {
            let channel = if self.is_depthwise() { h * dim + c } else { 0 };
            let weight = |pixel: usize| R::of(f64::from(self.weights[self.weight(pixel) + channel]));
            let pixels = self.pixels.iter().enumerate();
            let terms = pixels.map(|(i, &at)| (R::of(x[[h, self.row(cell, at), c]].to_f64()), weight(i)));
            R::dot(terms.chain([(weight(self.pixels.len()), R::of(1.0))]))
        });
        let Some([gain, shift]) = &self.norm else { return out };
        let n = R::of((heads * dim) as f64);
        for cell in 0..cells {
            let mean = R::sum(out.index_axis(ndarray::Axis(1), cell).iter().copied()) / n;
            let square = |&x: &R| (x - mean) * (x - mean);
            let variance = R::sum(out.index_axis(ndarray::Axis(1), cell).iter().map(square)) / n;
            let deviation = (variance + R::of(f64::from(EPSILON))).sqrt();
            for ((h, c), x) in out.index_axis_mut(ndarray::Axis(1), cell).indexed_iter_mut() {
                let [gain, shift] = [gain, shift].map(|x| R::of(f64::from(x[h * dim + c])));
                *x = (*x - mean) / deviation * gain + shift;
            }
        }
        out
    }
}

/// One cell of all heads.
struct Cell<'a> {
    of: &'a Shrink,
    x: AnyArray<'a>,
    len: usize,
    batch: usize,
    cell: usize,
    to: &'a mut [f32],
}

impl Kernel for Cell<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, x, len, batch, cell, to } = self;
        let (_, heads, _, dim) = x.dim();
        let (own, last) = (of.is_depthwise(), of.weight(of.pixels.len()));
        to.fill(0.0);
        for h in 0..heads {
            let x = x.rows(batch, h, &(0..len));
            for c in (0..dim).step_by(S::LANES) {
                let channel = h * dim + c;
                let mut sum = if own { s.load(&of.weights[last + channel..]) } else { s.splat(0.0) };
                for (pixel, &at) in of.pixels.iter().enumerate() {
                    let first = of.weight(pixel);
                    let weight =
                        if own { s.load(&of.weights[first + channel..]) } else { s.splat(of.weights[first]) };
                    sum = s.mul_add(weight, x.load(s, of.row(cell, at), c), sum);
                }
                s.store_tail(&mut to[channel..(channel + S::LANES).min((h + 1) * dim)], sum);
            }
        }
        let Some([gain, shift]) = &of.norm else { return };
        let width = heads * dim;
        let mut sum = s.splat(0.0);
        for x in to.chunks_exact(S::LANES) {
            sum = s.add(sum, s.load(x));
        }
        let mean = s.splat(s.reduce_add(sum) / width as f32);
        let mut squares = s.splat(0.0);
        for (v, x) in to.chunks_exact(S::LANES).enumerate() {
            // Nothing of what fills the last vector.
            let left = width.saturating_sub(v * S::LANES).min(S::LANES) as u32;
            let inside = s.mask(1u64.checked_shl(left).map_or(u64::MAX, |bit| bit - 1));
            let apart = s.select(inside, s.sub(s.load(x), mean), s.splat(0.0));
            squares = s.mul_add(apart, apart, squares);
        }
        let factor = s.splat(1.0 / (s.reduce_add(squares) / width as f32 + EPSILON).sqrt());
        for c in (0..width).step_by(S::LANES) {
            let x = s.mul(s.sub(s.load(&to[c..]), mean), factor);
            s.store(&mut to[c..], s.mul_add(x, s.load(&gain[c..]), s.load(&shift[c..])));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::number::Running;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::s;

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (image, cell, dim) in
            [([4, 6], [2, 2], 5), ([7, 5], [3, 2], 20), ([3, 3], [1, 1], 16), ([2, 9], [4, 2], 3)]
        {
            let channels = 3 * dim;
            let own = Shrink::depthwise(image, &array(1, (channels, cell[0], cell[1])), &array(2, channels))
                .unwrap();
            let mut one = array(3, (cell[0], cell[1]));
            one[[0, 0]] = 0.0;
            let shared = Shrink::shared(image, &one).unwrap();
            let norm = own.clone().norm(&array(4, channels), &array(5, channels)).unwrap();
            for (shrink, isa) in
                [own, shared, norm].iter().flat_map(|shrink| Isa::available().map(move |isa| (shrink, isa)))
            {
                let x = array(dim as u64, (2, 3, image[0] * image[1], dim));
                let got = alone(|pass| Ok(shrink.run(pass, isa, x.view())?.of_heads(3, dim).to_owned()));
                for b in 0..2 {
                    let want = shrink.define::<Running, f32>(x.slice(s![b, .., .., ..]));
                    for (got, want) in got.slice(s![b, .., .., ..]).iter().zip(&want) {
                        let share = (f64::from(*got) - want.value()).abs() / want.off().max(1e-300);
                        assert!(share <= 1.0, "{isa} {image:?} {cell:?}: {got}, not {want:?}");
                        worst = worst.max(share);
                    }
                }
            }
        }
        println!("shrink: {worst:.3} of the bound");
    }

    /// A constant image stays what it is, and what does not count is not seen.
    #[test]
    fn means_of_what_counts() {
        let mut x = array(1, (1, 1, 5 * 7, 4));
        x.fill(1.5);
        let mean = |pass: &mut Pass<'_>, x: &ndarray::Array4<f32>| {
            Ok(Shrink::mean([5, 7], [2, 2])?.run(pass, Isa::Scalar, x.view())?.of_heads(1, 4).to_owned())
        };
        let got = alone(|pass| mean(pass, &x));
        assert!(got.dim() == (1, 1, 6, 4) && got.iter().all(|&x| x == 1.5));
        x.slice_mut(s![.., .., 1, ..]).fill(f32::NAN);
        let corner = ndarray::arr2(&[[2.0, 0.0], [0.0, 0.0]]);
        let got = alone(|pass| {
            Ok(Shrink::shared([5, 7], &corner)?.run(pass, Isa::Scalar, x.view())?.of_heads(1, 4).to_owned())
        });
        assert!(got.iter().all(|&x| x == 3.0));
    }
}
