//! Images with zeros around them: keys and values of models that pad after
//! they project.

use ndarray::{Array2, Array4, ArrayView4, s};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::copy_rows;
use crate::error::Result;
use crate::simd::Isa;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::stages::pass::{Pass, Scratch};

/// Where an image lies in a larger one, height and width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Border {
    pub(crate) image: [usize; 2],
    /// Zeros above and left.
    pub(crate) before: [usize; 2],
    /// The larger image.
    pub(crate) padded: [usize; 2],
}

impl Border {
    /// The place in the image of a token of the larger one, if it has one.
    fn inside(&self, token: usize) -> Option<usize> {
        let place = [token / self.padded[1], token % self.padded[1]];
        let [y, x] = [0, 1].map(|i| place[i].checked_sub(self.before[i]).filter(|&at| at < self.image[i]));
        Some(y? * self.image[1] + x?)
    }

    /// The tokens of the larger image, `[batch, heads, height * width, dim]`.
    pub(crate) fn run<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        x: ArrayView4<'_, T>,
    ) -> Result<Scratch<'a>> {
        let Self { image, before, padded: [height, width] } = *self;
        let (batch, heads, _, dim) = x.dim();
        let mut to = pass.rows((batch, heads, height * width, dim))?;
        let (lines, stride) = (batch * heads * height, to.stride());
        let bytes = bytes_for::<u64>(claim_words(lines));
        pass.stage(
            || 0,
            bytes,
            |mut arena| {
                let to = Parts::new(to.numbers_mut(), width * stride, arena.take(claim_words(lines)));
                let x = T::any(Heads::new(x));
                let start = |_| ();
                parallel::for_each(parallel::threads(), lines, start, |(), line| {
                    let (unit, y) = (line / height, line % height);
                    let to = to.take(line);
                    to.fill(0.0);
                    if let Some(y) = y.checked_sub(before[0]).filter(|&y| y < image[0] && !to.is_empty()) {
                        let from = x.rows(unit / heads, unit % heads, &(y * image[1]..(y + 1) * image[1]));
                        copy_rows(isa, from, &mut to[before[1] * stride..], stride);
                    }
                });
            },
        );
        Ok(to)
    }

    /// What lies inside of rows of the larger image is added to rows of the image.
    pub(crate) fn add_inside(&self, from: ArrayView4<'_, f32>, to: &mut Array4<f32>) {
        let wide = self.image[1];
        for y in 0..self.image[0] {
            let first = (self.before[0] + y) * self.padded[1] + self.before[1];
            let from = from.slice(s![.., .., first..first + wide, ..]);
            to.slice_mut(s![.., .., y * wide..(y + 1) * wide, ..]).zip_mut_with(&from, |to, x| *to += x);
        }
    }

    /// The same by definition.
    pub(crate) fn define_inside(&self, from: &Array4<f64>) -> Array4<f64> {
        let (batch, heads, padded, dim) = from.dim();
        let mut to = Array4::zeros((batch, heads, self.image[0] * self.image[1], dim));
        for (token, at) in (0..padded).filter_map(|token| self.inside(token).map(|at| (token, at))) {
            to.slice_mut(s![.., .., at, ..]).assign(&from.slice(s![.., .., token, ..]));
        }
        to
    }

    /// The definition, of one head.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>) -> Array2<R> {
        Array2::from_shape_fn((self.padded[0] * self.padded[1], x.dim().1), |(token, c)| {
            self.inside(token).map_or(R::of(0.0), |at| x[[at, c]])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;

    #[test]
    fn zeros_are_all_around() {
        for (image, before, padded) in [
            ([2, 3], [1, 2], [4, 7]),
            ([4, 1], [0, 0], [4, 1]),
            ([3, 5], [0, 1], [3, 6]),
            ([0, 2], [1, 1], [2, 4]),
        ] {
            let border = Border { image, before, padded };
            for (dim, isa) in
                [0, 5, 16, 20].into_iter().flat_map(|dim| Isa::available().map(move |isa| (dim, isa)))
            {
                let x = array(dim as u64, (2, 3, image[0] * image[1], dim));
                let got = alone(|pass| Ok(border.run(pass, isa, x.view())?.view().to_owned()));
                for (b, h) in [(0, 0), (1, 2)] {
                    let want = border.define(&x.slice(s![b, h, .., ..]).mapv(f64::from));
                    assert_eq!(got.slice(s![b, h, .., ..]).mapv(f64::from), want, "{image:?} {before:?}");
                }
                assert_eq!(got.iter().filter(|x| **x != 0.0).count(), x.len());
                let mut back = 0.5 * &x;
                border.add_inside(got.view(), &mut back);
                assert_eq!(back, 1.5 * &x);
                assert_eq!(border.define_inside(&got.mapv(f64::from)), x.mapv(f64::from));
            }
        }
    }
}
