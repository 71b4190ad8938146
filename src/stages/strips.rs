//! Strips of an image: the means of its rows and of its columns, and a
//! convolution along them, normalised in groups of channels, as gates.

use ndarray::{Array1, Array2, Array3, ArrayView4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::simd::any::AnyRows;
use crate::simd::exp::sigmoid;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Lines of a task, and pixels of a sum of its own. Fixed, because sums are cut
/// here.
const CHUNK: usize = 32;

/// What is added to a variance.
const EPSILON: f32 = 1e-5;

/// The means of the rows of an image of `shape`, and then those of its columns:
/// `[batch, heads, height + width, dim]`.
pub(crate) fn means<'a, T: Element>(
    pass: &mut Pass<'a>,
    isa: Isa,
    [height, width]: [usize; 2],
    x: ArrayView4<'_, T>,
) -> Result<Scratch<'a>> {
    let (batch, heads, _, dim) = x.dim();
    let (units, chunks, rows) = (batch * heads, height.div_ceil(CHUNK), height + width);
    let mut means = pass.rows((batch, heads, rows, dim))?;
    // Of each chunk of lines the sums of columns.
    let mut sums = pass.rows((batch, heads, chunks * width, dim))?;
    let (stride, workers, start) = (means.stride(), parallel::threads(), |_| ());
    let claims = [claim_words(units * rows), claim_words(units * chunks)];
    let flops = || (2 * units * height * width) as u64 * dim as u64;
    pass.stage(flops, bytes_for::<u64>(claims[0]) + bytes_for::<u64>(claims[1]), |mut arena| {
        let lines = Parts::new(means.numbers_mut(), stride, arena.take(claims[0]));
        let columns = Parts::new(sums.numbers_mut(), width * stride, arena.take(claims[1]));
        let x = T::any(Heads::new(x));
        parallel::for_each(workers, units * chunks, start, |(), task| {
            let (unit, first) = (task / chunks, task % chunks * CHUNK);
            let end = (first + CHUNK).min(height);
            let x = x.rows(unit / heads, unit % heads, &(first * width..end * width));
            let lines = lines.take_run(unit * rows + first..unit * rows + end);
            isa.dispatch(Lines { x, width, stride, lines, columns: columns.take(task) });
        });
    });
    pass.stage(
        || 0,
        bytes_for::<u64>(claims[0]),
        |mut arena| {
            let to = Parts::new(means.numbers_mut(), stride, arena.take(claims[0]));
            parallel::for_each(workers, units * width, start, |(), task| {
                let (unit, column) = (task / width, task % width);
                let from = &sums.numbers()[(unit * chunks * width + column) * stride..];
                let place = unit * rows + height + column;
                let to = to.take_run(place..place + 1);
                isa.dispatch(Column { from, step: width * stride, height, to });
            });
        },
    );
    Ok(means)
}

/// The definition, of one head.
pub(crate) fn define_means<R: Real>([height, width]: [usize; 2], x: &Array2<R>) -> Array2<R> {
    Array2::from_shape_fn((height + width, x.dim().1), |(at, c)| {
        let line = |n: usize, token: &dyn Fn(usize) -> usize| {
            R::sum((0..n).map(|i| x[[token(i), c]])) / R::of(n as f64)
        };
        match at.checked_sub(height) {
            None => line(width, &|i| at * width + i),
            Some(column) => line(height, &|i| i * width + column),
        }
    })
}

/// The means of some lines, and the sums of columns over them.
struct Lines<'a> {
    x: AnyRows<'a>,
    width: usize,
    stride: usize,
    lines: &'a mut [f32],
    columns: &'a mut [f32],
}

impl Kernel for Lines<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, width, stride, lines, columns } = self;
        columns.fill(0.0);
        let count = s.splat(1.0 / width as f32);
        for (y, line) in lines.chunks_exact_mut(stride.max(1)).enumerate() {
            for c in (0..stride).step_by(S::LANES) {
                if c >= x.cols() {
                    s.store(&mut line[c..], s.splat(0.0));
                    continue;
                }
                let mut sum = s.splat(0.0);
                for first in (0..width).step_by(CHUNK) {
                    let mut part = s.splat(0.0);
                    for at in first..(first + CHUNK).min(width) {
                        let (x, to) = (x.load(s, y * width + at, c), &mut columns[at * stride + c..]);
                        part = s.add(part, x);
                        s.store(to, s.add(s.load(to), x));
                    }
                    sum = s.add(sum, part);
                }
                s.store(&mut line[c..], s.mul(sum, count));
            }
        }
    }
}

/// The mean of a column, from sums.
struct Column<'a> {
    from: &'a [f32],
    step: usize,
    height: usize,
    to: &'a mut [f32],
}

impl Kernel for Column<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, step, height, to } = self;
        let count = s.splat(1.0 / height as f32);
        for (v, to) in to.chunks_exact_mut(S::LANES).enumerate() {
            let mut sum = s.splat(0.0);
            for chunk in 0..height.div_ceil(CHUNK) {
                sum = s.add(sum, s.load(&from[chunk * step + v * S::LANES..]));
            }
            s.store(to, s.mul(sum, count));
        }
    }
}

/// A convolution along strips, a group norm of what it gives, and the logistic
/// function of that.
#[derive(Clone, Debug)]
pub(crate) struct StripGate {
    /// `[channels, channels of a group, taps]`, of odd taps.
    pub(crate) kernel: Array3<f32>,
    /// Groups of channels that are normalised together.
    pub(crate) norms: usize,
    pub(crate) gain: Array1<f32>,
    pub(crate) shift: Array1<f32>,
}

impl StripGate {
    /// The channels that a channel's kernel reads, from the first on.
    fn inputs(&self, channel: usize) -> usize {
        let own = self.kernel.dim().1;
        channel / own.max(1) * own
    }

    /// Gates `[batch, heads, dim, height + width]` of strips `[batch, heads,
    /// dim, height + width]`.
    pub(crate) fn run<'a>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        [height, width]: [usize; 2],
        strips: &Scratch<'_>,
    ) -> Result<Scratch<'a>> {
        let ((batch, heads, dim, _), stride) = (strips.dim(), strips.stride());
        let (channels, tasks) = (heads * dim, batch * self.norms);
        let mut gates = pass.rows(strips.dim())?;
        let (_, own, taps) = self.kernel.dim();
        let flops = || (2 * batch * (height + width) * channels) as u64 * (own * taps) as u64;
        pass.stage(flops, bytes_for::<u64>(claim_words(tasks)), |mut arena| {
            let piece = channels / self.norms * stride;
            let to = Parts::new(gates.numbers_mut(), piece, arena.take(claim_words(tasks)));
            let start = |_| ();
            parallel::for_each(parallel::threads(), tasks, start, |(), task| {
                let (batch, norm) = (task / self.norms, task % self.norms);
                let x = &strips.numbers()[batch * channels * stride..][..channels * stride];
                let (first, to) = (norm * (channels / self.norms), to.take(task));
                for strip in [0..height, height..height + width] {
                    isa.dispatch(Gate { of: self, x, first, stride, strip, to: &mut *to });
                }
            });
        });
        Ok(gates)
    }

    /// The definition, of the strips `[height + width, channels]` of all heads.
    pub(crate) fn define<R: Real>(&self, [height, width]: [usize; 2], x: &Array2<R>) -> Array2<R> {
        let (channels, own, taps) = self.kernel.dim();
        let mut out = Array2::from_elem(x.dim(), R::of(0.0));
        for strip in [0..height, height..height + width].into_iter().filter(|strip| !strip.is_empty()) {
            for norm in 0..self.norms {
                let group = norm * (channels / self.norms)..(norm + 1) * (channels / self.norms);
                let along = |t: usize, c: usize| {
                    let near = |tap: usize| (t + tap).checked_sub(taps / 2).filter(|t| strip.contains(t));
                    let terms = (0..taps).filter_map(|tap| Some((tap, near(tap)?)));
                    R::dot(terms.flat_map(|(tap, t)| {
                        let weight = move |i| R::of(f64::from(self.kernel[[c, i, tap]]));
                        (0..own).map(move |i| (x[[t, self.inputs(c) + i]], weight(i)))
                    }))
                };
                let y = Array2::from_shape_fn((strip.len(), group.len()), |(t, c)| {
                    along(strip.start + t, group.start + c)
                });
                let count = R::of(y.len() as f64);
                let mean = R::sum(y.iter().copied()) / count;
                let variance = R::sum(y.iter().map(|&y| (y - mean) * (y - mean))) / count;
                let deviation = (variance + R::of(f64::from(EPSILON))).sqrt();
                for ((t, c), &y) in y.indexed_iter() {
                    let [gain, shift] =
                        [&self.gain, &self.shift].map(|x| R::of(f64::from(x[group.start + c])));
                    let gate = ((y - mean) / deviation * gain + shift).sigmoid();
                    out[[strip.start + t, group.start + c]] = gate;
                }
            }
        }
        out
    }
}

/// A strip of the channels of a norm.
struct Gate<'a> {
    of: &'a StripGate,
    /// All channels of an entry of the batch.
    x: &'a [f32],
    first: usize,
    stride: usize,
    strip: std::ops::Range<usize>,
    to: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, x, first, stride, strip, to } = self;
        let ((_, own, taps), len) = (of.kernel.dim(), strip.len());
        if len == 0 || stride == 0 {
            return;
        }
        let mut total = 0.0;
        for (c, to) in to.chunks_exact_mut(stride).enumerate() {
            let to = &mut to[strip.clone()];
            to.fill(0.0);
            for i in 0..own {
                let x = &x[(of.inputs(first + c) + i) * stride..][strip.clone()];
                for tap in 0..taps {
                    // Where the tap lies inside.
                    let start = (taps / 2).saturating_sub(tap).min(len);
                    let end = (len + taps / 2).saturating_sub(tap).clamp(start, len);
                    let weight = s.splat(of.kernel[[first + c, i, tap]]);
                    let from = x.get((start + tap).saturating_sub(taps / 2)..).unwrap_or(&[]);
                    for (to, x) in
                        to[start..end].chunks_mut(S::LANES).zip(from[..end - start].chunks(S::LANES))
                    {
                        let sum = s.mul_add(weight, s.load_tail(x), s.load_tail(to));
                        s.store_tail(to, sum);
                    }
                }
            }
            total += sum_of(s, to, |x| x);
        }
        let count = (to.len() / stride * len) as f32;
        let (mean, mut squares) = (total / count, 0.0);
        for to in to.chunks_exact(stride) {
            let square = |x| {
                let apart = s.sub(x, s.splat(mean));
                s.mul(apart, apart)
            };
            // What fills a vector up is no distance from the mean.
            let strip = &to[strip.clone()];
            let whole = len / S::LANES * S::LANES;
            squares += sum_of(s, &strip[..whole], square);
            squares += strip[whole..].iter().map(|x| (x - mean) * (x - mean)).sum::<f32>();
        }
        let deviation = (squares / count + EPSILON).sqrt();
        for (c, to) in to.chunks_exact_mut(stride).enumerate() {
            let (gain, shift) = (s.splat(of.gain[first + c]), s.splat(of.shift[first + c]));
            for x in to[strip.clone()].chunks_mut(S::LANES) {
                let y = s.div(s.sub(s.load_tail(x), s.splat(mean)), s.splat(deviation));
                s.store_tail(x, sigmoid(s, s.mul_add(y, gain, shift)));
            }
        }
    }
}

#[inline(always)]
fn sum_of<S: Simd>(s: S, x: &[f32], of: impl Fn(S::F) -> S::F) -> f32 {
    let mut total = s.splat(0.0);
    for block in x.chunks(CHUNK * S::LANES) {
        let mut sum = s.splat(0.0);
        for x in block.chunks(S::LANES) {
            sum = s.add(sum, of(s.load_tail(x)));
        }
        total = s.add(total, sum);
    }
    s.reduce_add(total)
}
