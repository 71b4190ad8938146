//! Convolutions over an image whose weights are given for each pixel and head,
//! with 0 outside the image.

use ndarray::{Array2, ArrayView4, ArrayViewMut4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyRows, AnyRowsMut, IntoAny};
use crate::simd::mem::{Heads, OutRows, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// An image and the odd sides of the neighborhoods.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dynamic {
    pub(crate) image: [usize; 2],
    pub(crate) sides: [usize; 2],
}

impl Dynamic {
    /// The pixels around a pixel that lie in the image, each with the number
    /// of its weight.
    #[inline(always)]
    pub(crate) fn around(&self, pixel: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Self { image: [height, width], sides: [high, wide] } = *self;
        let (y, x) = (pixel / width, pixel % width);
        let at = move |i: usize, from: usize, side: usize, size: usize| {
            (from + i).checked_sub(side / 2).filter(|&at| at < size)
        };
        (0..high).flat_map(move |i| {
            (0..wide).filter_map(move |j| {
                let (row, col) = (at(i, y, high, height)?, at(j, x, wide, width)?);
                Some((i * wide + j, row * width + col))
            })
        })
    }

    /// Writes `sums[n] + sum_m (weights[n, m] + bias[h, m]) x[neighbor m of
    /// n]`, for the heads of the weights; neighbours share heads of `x`, and no
    /// bias or sums are 0. Nothing is left of `sums`.
    pub(crate) fn run<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        (x, weights, bias): (ArrayView4<'_, T>, ArrayView4<'_, f32>, &[f32]),
        mut sums: Option<Scratch<'_>>,
        out: Option<ArrayViewMut4<'_, T>>,
    ) {
        let ((batch, heads, len, taps), dim) = (weights.dim(), x.dim().3);
        let [stride, weight_stride] = [dim, taps].map(|n| n.next_multiple_of(MAX_LANES));
        let Self { image: [height, width], sides: [high, wide] } = *self;
        let lines = if width == 0 { 0 } else { height };
        let (tasks, workers) = (batch * heads * lines, parallel::threads());
        // Pixels of the lines, weights of one of them, and its sums.
        let rooms = [high * width * stride, width * weight_stride, width * stride];
        let room = rooms.iter().sum();
        let bytes = bytes_for::<u64>(claim_words(tasks))
            + bytes_for::<u64>(claim_words(tasks * width))
            + bytes_for_shares(workers, bytes_for::<f32>(room));
        let flops = || (2 * batch * heads * len * high * wide * dim) as u64;
        pass.stage(flops, bytes, |mut arena| {
            let Some(out) = out else { return };
            let claims = arena.take(claim_words(tasks));
            let sums = sums.as_mut().map(|sums| Parts::new(sums.numbers_mut(), width * stride, claims));
            let out = T::any_out(OutRows::new(out, arena.take(claim_words(tasks * width))));
            let group = heads.checked_div(x.dim().1).unwrap_or(1);
            let (x, weights) = (T::any(Heads::new(x)), f32::any(Heads::new(weights)));
            let shares = arena.shares(workers, bytes_for::<f32>(room));
            let start = |worker| shares.take(worker).take::<f32>(room);
            parallel::for_each(workers, tasks, start, |room, task| {
                let (copy, rest) = room.split_at_mut(rooms[0]);
                let (weight, own) = rest.split_at_mut(rooms[1]);
                own.fill(0.0);
                let (b, h, y) = (task / height / heads, task / height % heads, task % height);
                let lines = y.saturating_sub(high / 2)..(y + high / 2 + 1).min(height);
                let pixels = y * width..(y + 1) * width;
                isa.dispatch(Line {
                    of: self,
                    x: x.rows(b, h / group, &(lines.start * width..lines.end * width)),
                    first: lines.start,
                    y,
                    from: weights.rows(b, h, &pixels),
                    weights: weight,
                    weight_stride,
                    bias: bias.get(h * high * wide..(h + 1) * high * wide),
                    copy,
                    sums: sums.as_ref().map_or(own, |sums| sums.take(task)),
                    stride,
                    out: out.take(b, h, pixels),
                });
            });
        });
    }

    /// The definition, of one head.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>, weights: &Array2<R>, sums: &Array2<R>) -> Array2<R> {
        Array2::from_shape_fn(sums.dim(), |(n, c)| {
            let terms = self.around(n).map(|(m, at)| (weights[[n, m]], x[[at, c]]));
            R::dot(terms.chain([(sums[[n, c]], R::of(1.0))]))
        })
    }
}

/// One line of an image.
struct Line<'a, 'b> {
    of: &'a Dynamic,
    /// The pixels of the lines that neighborhoods have, from line `first` on.
    x: AnyRows<'a>,
    first: usize,
    y: usize,
    /// The weights as they come, and room for them.
    from: AnyRows<'a>,
    weights: &'a mut [f32],
    weight_stride: usize,
    bias: Option<&'a [f32]>,
    copy: &'a mut [f32],
    sums: &'a mut [f32],
    stride: usize,
    out: AnyRowsMut<'b>,
}

impl Kernel for Line<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, x, first, y, from, weights, weight_stride, bias, copy, sums, stride, mut out } = self;
        let ([_, width], [high, wide]) = (of.image, of.sides);
        x.pack_rows(s, copy, stride);
        from.pack_rows(s, weights, weight_stride);
        let lines = x.len() / width;
        // Rows of the neighborhood above the first line.
        let above = (first + high / 2).saturating_sub(y);
        for at in 0..width {
            let places = at.saturating_sub(wide / 2)..(at + wide / 2 + 1).min(width);
            let left = (places.start + wide / 2).saturating_sub(at);
            let weights = &weights[at * weight_stride..][..weight_stride];
            let to = &mut sums[at * stride..][..stride];
            for c in (0..x.cols()).step_by(S::LANES) {
                let mut sum = s.load(&to[c..]);
                for line in 0..lines {
                    let from = (above + line) * wide + left;
                    for (place, m) in places.clone().zip(from..) {
                        let weight = weights[m] + bias.map_or(0.0, |bias| bias[m]);
                        let x = s.load(&copy[(line * width + place) * stride + c..]);
                        sum = s.mul_add(s.splat(weight), x, sum);
                    }
                }
                s.store(&mut to[c..], sum);
            }
            out.write(s, at, to, 1.0);
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
        for (image, sides, dim) in [
            ([5, 6], [3, 3], 10),
            ([1, 9], [3, 5], 16),
            ([8, 4], [7, 7], 33),
            ([3, 3], [1, 1], 2),
            ([2, 3], [3, 3], 0),
        ] {
            let (dynamic, n) = (Dynamic { image, sides }, image[0] * image[1]);
            let (x, given) = (array(1, (2, 2, n, dim)), array(2, (2, 4, n, dim)));
            let weights = array(3, (2, 4, n, sides[0] * sides[1]));
            for isa in Isa::available() {
                let mut out = Array4::<f32>::zeros(given.dim());
                let to = std::cell::RefCell::new(&mut out);
                alone(|pass| {
                    let mut sums = pass.rows(given.dim())?;
                    let mut to = to.borrow_mut();
                    let out = sums.view_mut().map(|mut sums| sums.assign(&given)).map(|()| to.view_mut());
                    dynamic.run(pass, isa, (x.view(), weights.view(), &[]), Some(sums), out);
                    Ok(())
                });
                for (b, h) in [(0, 0), (1, 3)] {
                    let rows = |x: &Array4<f32>, h: usize| {
                        x.slice(s![b, h, .., ..]).map(|&x| Running::of(f64::from(x)))
                    };
                    let want = dynamic.define(&rows(&x, h / 2), &rows(&weights, h), &rows(&given, h));
                    for (got, want) in out.slice(s![b, h, .., ..]).iter().zip(&want) {
                        assert!(
                            (f64::from(*got) - want.value()).abs() <= want.off(),
                            "{isa} {image:?} {sides:?}"
                        );
                    }
                }
            }
        }
    }
}
