//! Gaussian adaptive attention (GAAM): features times a product of Gaussians of
//! themselves.

use ndarray::{Array2, ArrayView1};

use crate::card::{Extras, carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::pixels::Pixels;
use crate::input::{Dims, Input};
use crate::simd::exp::exp;
use crate::simd::{Isa, Simd};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::row::{RowMap, run};

/// Gaussian adaptive attention (GAAM): features times a product of Gaussians of
/// themselves.
///
/// ```text
/// y_k = (x - mean - offset_k) / sqrt(variance + 1e-8)        over a chunk of the channels
/// w   = prod_k exp(-y_k^2 / (2 c_k^2)) / sqrt(2 pi c_k^2)
/// o   = x w / max(sum w, 1e-8)
/// ```
///
/// The channels of a row are cut into chunks, each with Gaussians of its own; the
/// last has the rest. The variance divides by one less than there are channels;
/// that of one channel is 0. Another axis than the last is a view with its axes
/// permuted. "Gaussian Adaptive Attention is All You Need: Robust Contextual
/// Representations Across Multiple Modalities" (arXiv 2401.11143), and its code.
///
/// Cost: `4 K` flops for each element, in one pass.
///
/// A product of Gaussians as a gate.
///
/// ```
/// use attention_kernels::{Attention, neighborhood::{Gaam, Pixels}};
/// use ndarray::{Array2, Array4};
///
/// // 4 chunks with 2 Gaussians each.
/// let gaam = Gaam::builder(Array2::zeros((4, 2)), Array2::ones((4, 2))).build()?;
/// let x = Array4::<f32>::ones((1, 1, 10, 64));
/// assert!(gaam.forward(Pixels::new(x.view()))?.iter().all(|x| (x - 1.0 / 16.0).abs() < 1e-6));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Gaam {
    isa: Isa,
    offsets: Array2<f32>,
    /// `1 / (2 c^2)`
    sharpness: Array2<f32>,
    /// Of each chunk, the logarithm of the product's factor.
    logs: Vec<f32>,
}

impl Gaam {
    /// Offsets and widths `c` of the Gaussians, `[chunks, K]` each.
    pub fn builder(offsets: Array2<f32>, widths: Array2<f32>) -> GaamBuilder {
        GaamBuilder::with(offsets, widths)
    }
}

options! {
    /// Builds a [`Gaam`].
    GaamBuilder of Gaam, isa;
    given { offsets: Array2<f32>, in FINITE; widths: Array2<f32>, in FINITE; }
    build(builder, config) {
        let GaamBuilder { offsets, widths, .. } = builder;
        if offsets.dim() != widths.dim() || offsets.dim().0 == 0 {
            let expected = format!("[chunks, K] with at least one chunk = {:?}", offsets.dim());
            return Err(Error::shape("widths", expected, widths.shape()));
        }
        if let Some(width) = widths.iter().find(|width| width.abs() < 1e-12) {
            return Err(Error::value("widths", "numbers that are not 0", width));
        }
        let sharpness = widths.mapv(|c| (0.5 / f64::from(c).powi(2)) as f32);
        let log = |c: &f32| -0.5 * (std::f64::consts::TAU * f64::from(*c).powi(2)).ln();
        let logs = widths.outer_iter().map(|row| row.iter().map(log).sum::<f64>() as f32).collect();
        Ok(Gaam { isa: config.isa, offsets, sharpness, logs })
    }
}

/// What is added to a variance, and the least sum that is divided by.
const LEAST: f32 = 1e-8;

impl Gaam {
    fn check<T: Element>(&self, x: &Pixels<'_, T>) -> Result<Dims> {
        x.dims()
    }

    /// Where a chunk of a row begins and ends.
    fn chunk(&self, chunk: usize, cols: usize) -> std::ops::Range<usize> {
        let (chunks, len) = (self.logs.len(), cols / self.logs.len());
        chunk * len..if chunk + 1 == chunks { cols } else { (chunk + 1) * len }
    }
}

impl RowMap for Gaam {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        for chunk in 0..self.logs.len() {
            let range = self.chunk(chunk, row.len());
            let x = &mut row[range];
            let n = x.len();
            let inside = |x: &[f32]| s.mask(if x.len() >= 64 { u64::MAX } else { (1 << x.len()) - 1 });
            let mut sum = s.splat(0.0);
            for x in x.chunks(S::LANES) {
                sum = s.add(sum, s.load_tail(x));
            }
            let mean = s.splat(s.reduce_add(sum) / n as f32);
            let mut squares = s.splat(0.0);
            for x in x.chunks(S::LANES) {
                let apart = s.select(inside(x), s.sub(s.load_tail(x), mean), s.splat(0.0));
                squares = s.mul_add(apart, apart, squares);
            }
            let variance = if n > 1 { s.reduce_add(squares) / (n - 1) as f32 } else { 0.0 } + LEAST;
            let (offsets, sharpness) = (self.offsets.row(chunk), self.sharpness.row(chunk));
            let weight = |x: S::F| {
                let mut total = s.splat(self.logs[chunk]);
                for (&offset, &sharp) in offsets.iter().zip(&sharpness) {
                    let apart = s.sub(s.sub(x, mean), s.splat(offset));
                    total = s.mul_add(s.mul(apart, apart), s.splat(-sharp / variance), total);
                }
                exp(s, total)
            };
            let mut sum = s.splat(0.0);
            for x in x.chunks(S::LANES) {
                sum = s.add(sum, s.select(inside(x), weight(s.load_tail(x)), s.splat(0.0)));
            }
            let sum = s.reduce_add(sum);
            let sum = s.splat(if sum < LEAST { LEAST } else { sum });
            for x in x.chunks_mut(S::LANES) {
                let gated = s.div(s.mul(s.load_tail(x), weight(s.load_tail(x))), sum);
                s.store_tail(x, gated);
            }
        }
    }

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R> {
        let mut out = Vec::with_capacity(x.len());
        for chunk in 0..self.logs.len() {
            let x: Vec<R> = x.iter().copied().collect::<Vec<_>>()[self.chunk(chunk, x.len())].to_vec();
            let n = x.len();
            let mean = R::sum(x.iter().copied()) / R::of(n as f64);
            let squares = R::sum(x.iter().map(|&x| (x - mean) * (x - mean)));
            let variance =
                if n > 1 { squares / R::of((n - 1) as f64) } else { R::of(0.0) } + R::of(f64::from(LEAST));
            let weight = |x: R| {
                let terms = self.offsets.row(chunk).into_iter().zip(self.sharpness.row(chunk));
                let terms = terms.map(|(&offset, &sharp)| {
                    let apart = x - mean - R::of(f64::from(offset));
                    apart * apart * R::rounded(-f64::from(sharp), 1.0) / variance
                });
                terms.fold(R::rounded(f64::from(self.logs[chunk]), 1.0), |sum, x| sum + x).exp()
            };
            let sum = R::sum(x.iter().map(|&x| weight(x))).max(R::of(f64::from(LEAST)));
            out.extend(x.iter().map(|&x| x * weight(x) / sum));
        }
        out
    }
}

impl<T: Element> Pipeline<Pixels<'_, T>> for Gaam {
    type State = ();

    fn flow(&self, x: Pixels<'_, T>, _: Option<&mut ()>, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        self.check(&x)?;
        run(pass, self.isa, x.x, self, out);
        Ok(())
    }

    fn define<R: Real>(&self, x: Pixels<'_, T>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let dims = self.check(&x)?;
        let out = of_heads(&dims, &x.lengths, |head| {
            let mut rows = head.rows::<R, T>(&x.x, &head.keys);
            for mut row in rows.outer_iter_mut() {
                let gated = RowMap::define(self, row.view());
                row.iter_mut().zip(gated).for_each(|(x, gated)| *x = gated);
            }
            rows
        });
        Ok((out, ()))
    }
}

composite!(Gaam, Pixels);

exhibit! {
    GaamExhibit of Gaam, "neighborhood", "GAAM", "arXiv 2401.11143";
    "features times a product of Gaussians of themselves";
    not "where features should be weighed by others than those of their own row";
    tokens true;
    build(_, field) {
        let of = |which: u64, around: f32| {
            Array2::from_shape_fn((2, 3), |(chunk, k)| around + 0.5 * field.at(which, chunk, k, 0))
        };
        Gaam::builder(of(1, 0.0), of(2, 1.5))
    }
    extras(x, _) { Extras { keys: Extras::pixels(x), ..Extras::default() } }
    input<'a, T>(_, extras) -> Pixels<'a, T> { Pixels::new(extras.keys.view()) }
}
carded!(Gaam, GaamExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::testing::arrays::array;
    use crate::testing::qkv::held;
    use ndarray::Array4;

    #[test]
    fn kernels_follow_the_definition() {
        for (chunks, k, dim) in
            [(1, 1, 64), (4, 3, 37), (2, 2, 3), (3, 1, 2), (1, 2, 1), (2, 0, 20), (1, 1, 0)]
        {
            let x = array(1, (2, 3, 70, dim));
            let widths = array::<ndarray::Ix2, _>(3, (chunks, k)).mapv(|c| 1.2 + c);
            let gaam = Gaam::builder(array(2, (chunks, k)), widths).build().unwrap();
            held(&gaam, Pixels::new(x.view()));
        }
    }

    #[test]
    fn identities() {
        let wide = Gaam::builder(Array2::zeros((1, 1)), Array2::from_elem((1, 1), 1e6)).build().unwrap();
        let x: Array4<f32> = array(1, (1, 1, 5, 20));
        let out = wide.reference(Pixels::new(x.view())).unwrap();
        assert!(out.iter().zip(&x).all(|(out, x)| (out - f64::from(*x) / 20.0).abs() < 1e-9));
        let same = Array4::from_elem((1, 1, 5, 20), 3.0f32);
        let gaam = Gaam::builder(Array2::zeros((2, 3)), array(2, (2, 3)) + 2.0).build().unwrap();
        let out = gaam.reference(Pixels::new(same.view())).unwrap();
        assert!(out.iter().all(|out| (out - 0.3).abs() < 1e-6));
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let refusal = |widths| Gaam::builder(Array2::zeros((2, 2)), widths).build().unwrap_err().to_string();
        assert!(refusal(Array2::ones((2, 3))).starts_with("widths: expected shape [chunks, K]"));
        assert_eq!(refusal(Array2::zeros((2, 2))), "widths: expected numbers that are not 0, got 0");
    }
}
