//! Windows of an image that are moved and scaled, each sampled at as many
//! points as a window has pixels.

use ndarray::{Array2, ArrayView2, ArrayView4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// An image and its windows, the last of which may reach beyond it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) image: [usize; 2],
    pub(crate) window: [usize; 2],
}

impl Sample {
    /// Rows and columns of windows.
    pub(crate) fn windows(&self) -> [usize; 2] {
        std::array::from_fn(|i| self.image[i].div_ceil(self.window[i]))
    }

    /// How far an offset of 1 moves a window, in pixels: half of the padded
    /// image, shared by as many windows as the image has whole ones.
    fn step(&self, axis: usize) -> f64 {
        let padded = (self.windows()[axis] * self.window[axis]).saturating_sub(1);
        padded as f64 / 2.0 / (self.image[axis] / self.window[axis]).max(1) as f64
    }

    /// Where a window begins on an axis, its middle and the distance of a point
    /// from that.
    fn point(&self, axis: usize, window: usize, at: usize) -> [f64; 2] {
        let half = (self.window[axis] - 1) as f64 / 2.0;
        [(window * self.window[axis]) as f64 + half, at as f64 - half]
    }

    /// The points of all windows, `[batch, heads, windows * window, dim]`. Each
    /// window has `[offset x, offset y, scale x, scale y]` in `by`, `[batch,
    /// heads, windows, 4]`, whose heads neighbours share.
    pub(crate) fn run<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        x: ArrayView4<'_, T>,
        by: ArrayView4<'_, f32>,
    ) -> Result<Scratch<'a>> {
        let (batch, heads, len, dim) = x.dim();
        let (windows, points) = (self.windows(), self.window[0] * self.window[1]);
        let count = windows[0] * windows[1];
        let mut to = pass.rows((batch, heads, count * points, dim))?;
        let (tasks, stride) = (batch * heads * count, to.stride());
        let flops = || (8 * tasks * points * dim) as u64;
        pass.stage(flops, bytes_for::<u64>(claim_words(tasks)), |mut arena| {
            let to = Parts::new(to.numbers_mut(), points * stride, arena.take(claim_words(tasks)));
            let (x, group, start) = (T::any(Heads::new(x)), (heads / by.dim().1.max(1)).max(1), |_| ());
            parallel::for_each(parallel::threads(), tasks, start, |(), task| {
                let (unit, window) = (task / count, task % count);
                let (b, h) = (unit / heads, unit % heads);
                let by = std::array::from_fn(|i| by[[b, h / group, window, i]]);
                let (x, to) = (x.rows(b, h, &(0..len)), to.take(task));
                isa.dispatch(Window { of: self, window, by, x, to, stride });
            });
        });
        Ok(to)
    }

    /// The definition, of one head: the weight of a pixel falls linearly with
    /// its distance, to 0 at 1.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>, by: ArrayView2<'_, f32>) -> Array2<R> {
        let ([_, wide], [high, width]) = (self.windows(), self.window);
        Array2::from_shape_fn((by.dim().0 * high * width, x.dim().1), |(point, c)| {
            let (window, at) = (point / (high * width), point % (high * width));
            let windows = [window / wide, window % wide];
            let weights = |axis: usize| -> Vec<(usize, R, bool)> {
                let [middle, from] = self.point(axis, windows[axis], [at / width, at % width][axis]);
                let [offset, scale] = [1 - axis, 3 - axis].map(|i| R::of(f64::from(by[[window, i]])));
                let at = R::of(middle)
                    + R::of(from) * (R::of(1.0) + scale)
                    + offset * R::rounded(self.step(axis), 1.0);
                let first = at.value().floor() as isize;
                let near = (first.saturating_sub(1)..=first.saturating_add(2)).filter_map(|pixel| {
                    let pixel = usize::try_from(pixel).ok().filter(|&pixel| pixel < self.image[axis])?;
                    let apart = at - R::of(pixel as f64);
                    let between = pixel as isize == first || pixel as isize == first + 1;
                    Some((pixel, (R::of(1.0) - apart.max(-apart)).max(R::of(0.0)), between))
                });
                near.collect()
            };
            let (rows, cols) = (weights(0), weights(1));
            let pixels = rows.iter().flat_map(|row| cols.iter().map(move |col| (row, col)));
            // Pixels that a kernel may reach by rounding alone count for its bound,
            // and NaN there for nothing.
            R::dot(pixels.filter_map(|(row, col)| {
                let x = x[[row.0 * self.image[1] + col.0, c]];
                ((row.2 && col.2) || x.value().is_finite()).then_some((row.1 * col.1, x))
            }))
        })
    }
}

/// One window of a head.
struct Window<'a> {
    of: &'a Sample,
    window: usize,
    by: [f32; 4],
    x: AnyRows<'a>,
    to: &'a mut [f32],
    stride: usize,
}

impl Kernel for Window<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, window, by, x, to, stride } = self;
        let ([_, wide], [_, width]) = (of.windows(), of.window);
        let windows = [window / wide, window % wide];
        for (at, to) in to.chunks_exact_mut(stride.max(1)).enumerate() {
            to.fill(0.0);
            // On each axis two pixels, of which either may be outside.
            let corners: [[(Option<usize>, f32); 2]; 2] = std::array::from_fn(|axis| {
                let [middle, from] = of.point(axis, windows[axis], [at / width, at % width][axis]);
                let moved = by[1 - axis] * of.step(axis) as f32;
                let place = middle as f32 + from as f32 * (1.0 + by[3 - axis]) + moved;
                let first = place.floor();
                let share = place - first;
                let pixel = |i: isize| {
                    let pixel = usize::try_from((first as isize).saturating_add(i)).ok()?;
                    Some(pixel).filter(|&pixel| pixel < of.image[axis])
                };
                [(pixel(0), 1.0 - share), (pixel(1), share)]
            });
            for (row, high) in corners[0] {
                for (col, wide) in corners[1] {
                    let (Some(row), Some(col)) = (row, col) else { continue };
                    let weight = s.splat(high * wide);
                    for c in (0..x.cols()).step_by(S::LANES) {
                        let x = x.load(s, row * of.image[1] + col, c);
                        let sum = s.mul_add(weight, x, s.load(&to[c..]));
                        s.store(&mut to[c..], sum);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::number::Running;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::{Array4, s};

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (image, window, dim) in
            [([6, 9], [3, 3], 20), ([5, 7], [2, 3], 3), ([1, 4], [1, 4], 16), ([7, 7], [7, 7], 5)]
        {
            let sample = Sample { image, window };
            let windows = sample.windows().iter().product();
            let x = array(1, (2, 4, image[0] * image[1], dim));
            let by: Array4<f32> = array(2, (2, 2, windows, 4)) * 1.5;
            for isa in Isa::available() {
                let got = alone(|pass| Ok(sample.run(pass, isa, x.view(), by.view())?.view().to_owned()));
                for (b, h) in [(0, 0), (1, 3)] {
                    let head = x.slice(s![b, h, .., ..]).map(|&x| Running::of(f64::from(x)));
                    let want = sample.define(&head, by.slice(s![b, h / 2, .., ..]));
                    for (got, want) in got.slice(s![b, h, .., ..]).iter().zip(&want) {
                        let share = (f64::from(*got) - want.value()).abs() / want.off().max(1e-300);
                        assert!(share <= 1.0, "{isa} {image:?}: {got}, not {want:?}");
                        worst = worst.max(share);
                    }
                }
            }
        }
        println!("sample: {worst:.3} of the bound");
    }
}
