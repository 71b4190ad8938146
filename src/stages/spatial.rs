//! One map over the pixels of an image, of the channels of a head: what is
//! largest around a pixel, weighed, and a softmax over all pixels.

use std::ops::Range;

use ndarray::{Array2, ArrayView4};

use crate::definition::number::{Real, softmax};
use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::simd::any::AnyRows;
use crate::simd::exp::exp;
use crate::simd::mem::{Heads, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Vectors of a sum of its own.
const BLOCK: usize = 32;

/// `softmax_p(max(0, w . max_{3 x 3 around p} max(0, scale x + shift) + bias))`, of
/// each head.
#[derive(Clone, Debug)]
pub(crate) struct Spatial {
    pub(crate) shape: [usize; 2],
    /// `[heads, dim]` each.
    pub(crate) scale: Array2<f32>,
    pub(crate) shift: Array2<f32>,
    pub(crate) weights: Array2<f32>,
    /// `[heads]`
    pub(crate) bias: Vec<f32>,
}

/// Places next to one of `len`, and itself.
fn around(at: usize, len: usize) -> Range<usize> {
    at.saturating_sub(1)..(at + 2).min(len)
}

impl Spatial {
    /// The map `[batch, heads, 1, pixels]` of an array of such pixels.
    pub(crate) fn run<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        x: ArrayView4<'_, T>,
    ) -> Result<Scratch<'a>> {
        let ((batch, heads, len, dim), [height, width]) = (x.dim(), self.shape);
        let mut map = pass.rows((batch, heads, 1, len))?;
        // Scores of a line are neighbours, and lines a task each.
        let scores = pass.take(batch * heads * len)?;
        let (units, stride, workers) = (batch * heads, dim.next_multiple_of(MAX_LANES), parallel::threads());
        let room = 2 * width * stride;
        let bytes =
            bytes_for::<u64>(claim_words(units * height)) + bytes_for_shares(workers, bytes_for::<f32>(room));
        let flops = || (14 * units * len) as u64 * dim as u64;
        pass.stage(flops, bytes, |mut arena| {
            let to = Parts::new(&mut *scores, width, arena.take(claim_words(units * height)));
            let x = T::any(Heads::new(x));
            let shares = arena.shares(workers, bytes_for::<f32>(room));
            let start = |worker| shares.take(worker).take::<f32>(room);
            parallel::for_each(workers, units * height, start, |copy, task| {
                let (unit, y) = (task / height, task % height);
                let lines = around(y, height);
                let x = x.rows(unit / heads, unit % heads, &(lines.start * width..lines.end * width));
                let (head, own) = (unit % heads, y - lines.start);
                isa.dispatch(Line { of: self, head, x, own, copy, stride, to: to.take(task) });
            });
        });
        let wide = map.stride();
        pass.stage(
            || (2 * units * len) as u64,
            bytes_for::<u64>(claim_words(units)),
            |mut arena| {
                let to = Parts::new(map.numbers_mut(), wide, arena.take(claim_words(units)));
                let start = |_| ();
                parallel::for_each(workers, units, start, |(), unit| {
                    let scores = &scores[unit * len..(unit + 1) * len];
                    isa.dispatch(Softmax { scores, to: &mut to.take(unit)[..len] });
                });
            },
        );
        Ok(map)
    }

    /// The definition, of one head.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>, head: usize) -> Vec<R> {
        let ([height, width], zero) = (self.shape, R::of(0.0));
        let of = |x: &Array2<f32>, c: usize| R::of(f64::from(x[[head, c]]));
        let near =
            x.indexed_iter().map(|((_, c), &x)| (x * of(&self.scale, c) + of(&self.shift, c)).max(zero));
        let near = Array2::from_shape_vec(x.dim(), near.collect()).expect("as many");
        let score = |t: usize| {
            let (y, at) = (t / width, t % width);
            let largest = |c: usize| {
                let places = around(y, height).flat_map(|y| around(at, width).map(move |x| y * width + x));
                places.map(|t| near[[t, c]]).fold(near[[t, c]], R::max)
            };
            let dot = (0..x.dim().1).map(|c| (largest(c), of(&self.weights, c)));
            R::dot(dot.chain([(R::of(f64::from(self.bias[head])), R::of(1.0))])).max(zero)
        };
        softmax(&(0..x.dim().0).map(score).collect::<Vec<_>>())
    }
}

/// The scores of a line.
struct Line<'a, 'b> {
    of: &'a Spatial,
    head: usize,
    /// The pixels of the line and of those next to it.
    x: AnyRows<'a>,
    /// Which of the lines it is.
    own: usize,
    copy: &'a mut &'b mut [f32],
    stride: usize,
    to: &'a mut [f32],
}

impl Kernel for Line<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, head, x, own, copy, stride, to } = self;
        let (width, zero) = (to.len(), s.splat(0.0));
        let [scale, shift, weights] = [&of.scale, &of.shift, &of.weights].map(|x| x.row(head));
        let [scale, shift, weights] = [&scale, &shift, &weights].map(|x| x.as_slice().unwrap_or_default());
        // What is no number shows, whatever is larger than it.
        let nothing = |x: S::F| {
            let bounded = s.min(s.splat(f32::MAX), x);
            s.sub(bounded, bounded)
        };
        let lines = x.len() / width.max(1);
        for c in (0..x.cols()).step_by(S::LANES) {
            let (scale, shift) = (s.load_tail(&scale[c..]), s.load_tail(&shift[c..]));
            for at in 0..width {
                let mut most = zero;
                for line in 0..lines {
                    let x = s.max(zero, s.mul_add(x.load(s, line * width + at, c), scale, shift));
                    most = s.max(most, x);
                    if line == own {
                        s.store(&mut copy[(width + at) * stride + c..], nothing(x));
                    }
                }
                s.store(&mut copy[at * stride + c..], most);
            }
        }
        for (at, to) in to.iter_mut().enumerate() {
            let mut sum = zero;
            for c in (0..x.cols()).step_by(S::LANES) {
                let mut most = zero;
                for place in around(at, width) {
                    most = s.max(most, s.load(&copy[place * stride + c..]));
                }
                sum = s.mul_add(most, s.load_tail(&weights[c..]), sum);
                sum = s.add(sum, s.load(&copy[(width + at) * stride + c..]));
            }
            let score = s.reduce_add(sum) + of.bias[head];
            *to = if score < 0.0 { 0.0 } else { score };
        }
    }
}

/// The softmax of the scores of an image.
struct Softmax<'a> {
    scores: &'a [f32],
    to: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, to } = self;
        let most = s.splat(scores.iter().copied().fold(0.0, f32::max));
        let mut total = s.splat(0.0);
        for (scores, to) in scores.chunks(BLOCK * S::LANES).zip(to.chunks_mut(BLOCK * S::LANES)) {
            let mut sum = s.splat(0.0);
            for (x, to) in scores.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
                let weight = exp(s, s.sub(s.load_tail(x), most));
                s.store_tail(to, weight);
                // What fills a vector up is no pixel.
                sum = s.add(sum, s.load_tail(to));
            }
            total = s.add(total, sum);
        }
        let total = s.splat(s.reduce_add(total));
        for x in to.chunks_mut(S::LANES) {
            let weight = s.div(s.load_tail(x), total);
            s.store_tail(x, weight);
        }
    }
}
