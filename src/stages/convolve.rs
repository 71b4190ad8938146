//! Depthwise convolutions over a grid of tokens: channel by channel, with 0
//! outside the grid.

use std::ops::Range;

use ndarray::{Array1, Array2, Array3, ArrayView4, ArrayViewMut4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::simd::any::{AnyRows, AnyRowsMut};
use crate::simd::exp::gelu;
use crate::simd::mem::{Heads, OutRows, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// What becomes of what a convolution gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    Nothing,
    Gelu,
}

/// Neighbours of a line that are convolved at once, under the same taps.
const AT_ONCE: usize = 4;

/// A kernel of odd sides, correlated and not flipped, with a bias; the grid
/// lies in the order of the tokens, row by row.
#[derive(Clone, Debug)]
pub(crate) struct Convolution {
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
    /// Rows and columns of the kernel.
    sides: [usize; 2],
    /// `[taps + 1, channels + MAX_LANES]`: the taps, then the bias. So many
    /// zeros at the end of a row that whole vectors can be loaded.
    weights: Vec<f32>,
}

impl Convolution {
    /// `weights` are `[channels, rows, columns]` of these odd sides, and `bias`
    /// is `[channels]`.
    pub(crate) fn new(
        [height, width]: [usize; 2],
        sides: [usize; 2],
        weights: &Array3<f32>,
        bias: &Array1<f32>,
    ) -> Result<Self> {
        if height == 0 || width == 0 {
            let got = format_args!("{height} x {width}").to_string();
            return Err(Error::value("convolution", "a grid of at least 1 x 1", got));
        }
        let (channels, rows, columns) = weights.dim();
        if [rows, columns] != sides {
            let expected = format!("[heads * value_dim, {}, {}]", sides[0], sides[1]);
            return Err(Error::shape("weights", expected, weights.shape()));
        }
        if bias.len() != channels {
            let expected = format!("[heads * value_dim] = [{channels}] as the weights have it");
            return Err(Error::shape("bias", expected, bias.shape()));
        }
        for (argument, x) in [
            ("weights", weights.iter().find(|x| !x.is_finite())),
            ("bias", bias.iter().find(|x| !x.is_finite())),
        ] {
            if let Some(x) = x {
                return Err(Error::value(argument, "finite numbers", x));
            }
        }
        let mut convolution = Self { height, width, channels, sides, weights: Vec::new() };
        let row = convolution.row();
        convolution.weights = vec![0.0; (rows * columns + 1) * row];
        for ((channel, y, x), &weight) in weights.indexed_iter() {
            convolution.weights[(columns * y + x) * row + channel] = weight;
        }
        for (channel, &bias) in bias.iter().enumerate() {
            convolution.weights[rows * columns * row + channel] = bias;
        }
        Ok(convolution)
    }

    /// Refuses queries and values that are not tokens of the grid.
    pub(crate) fn check<T>(&self, dims: &Dims, x: &Qkv<'_, T>) -> Result<()> {
        check_grid("q", &x.q, [self.height, self.width], "the grid of the convolution")?;
        check_grid("v", &x.v, [self.height, self.width], "the grid of the convolution")?;
        if Some(self.channels) != dims.q_heads.checked_mul(dims.value_dim) {
            let [rows, columns] = self.sides;
            let (heads, dim) = (dims.q_heads, dims.value_dim);
            let expected =
                format!("[heads * value_dim, {rows}, {columns}] = [{heads} * {dim}, {rows}, {columns}]");
            return Err(Error::shape("weights", expected, &[self.channels, rows, columns]));
        }
        if matches!(x.lengths, Lengths::Keys(_)) {
            let reason = "the grid has a value for each token";
            return Err(Error::Conflict { option: "key_lengths", with: "a convolution", reason });
        }
        Ok(())
    }

    /// Bytes of the weights and of what is added.
    pub(crate) fn bytes(&self) -> usize {
        (self.sides[0] * self.sides[1] + 1) * self.channels * size_of::<f32>()
    }

    /// From one tap to the next.
    fn row(&self) -> usize {
        self.channels + MAX_LANES
    }

    /// The tap of a channel that lies at a row and column of the kernel.
    fn tap<R: Real>(&self, row: usize, column: usize, channel: usize) -> R {
        R::of(f64::from(self.weights[(row * self.sides[1] + column) * self.row() + channel]))
    }

    /// Writes `sums` and the convolution of `x`, whose heads neighbours share.
    /// Nothing is left of `sums`; without any they are 0, and heads are those of
    /// `x`.
    pub(crate) fn run<T: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        x: ArrayView4<'_, T>,
        mut sums: Option<Scratch<'_>>,
        then: Then,
        out: Option<ArrayViewMut4<'_, O>>,
    ) {
        let (batch, heads, _, dim) = sums.as_ref().map_or(x.dim(), Scratch::dim);
        let stride = dim.next_multiple_of(MAX_LANES);
        let &Self { height, width, sides: [rows, columns], .. } = self;
        let (tasks, workers) = (batch * heads * height, parallel::threads());
        // Tokens of the lines under the kernel, and the sums of one line.
        let rooms = [rows * width * stride, width * stride];
        let room = rooms.iter().sum();
        let bytes = bytes_for::<u64>(claim_words(tasks))
            + bytes_for::<u64>(claim_words(tasks * width))
            + bytes_for_shares(workers, bytes_for::<f32>(room));
        // Taps over a side that lie within the grid.
        let taps = |len: usize, side: usize| (0..len).map(|at| under(at, len, side).0.len()).sum::<usize>();
        let flops = || 2 * (batch * heads * taps(height, rows) * taps(width, columns) * dim) as u64;
        pass.stage(flops, bytes, |mut arena| {
            let Some(out) = out else { return };
            let claims = arena.take(claim_words(tasks));
            let sums = sums.as_mut().map(|sums| Parts::new(sums.numbers_mut(), width * stride, claims));
            let out = O::any_out(OutRows::new(out, arena.take(claim_words(tasks * width))));
            let group = heads.checked_div(x.dim().1).unwrap_or(1);
            let x = T::any(Heads::new(x));
            let shares = arena.shares(workers, bytes_for::<f32>(room));
            let start = |worker| shares.take(worker).take::<f32>(room);
            parallel::for_each(workers, tasks, start, |room, task| {
                let (copy, own) = room.split_at_mut(rooms[0]);
                own.fill(0.0);
                let (b, h, y) = (task / height / heads, task / height % heads, task % height);
                let (lines, taps) = under(y, height, rows);
                isa.dispatch(Line {
                    of: self,
                    x: x.rows(b, h / group, &(lines.start * width..lines.end * width)),
                    taps,
                    weights: &self.weights[h * dim..],
                    copy,
                    sums: sums.as_ref().map_or(own, |sums| sums.take(task)),
                    stride,
                    then,
                    out: out.take(b, h, y * width..(y + 1) * width),
                });
            });
        });
    }

    /// The definition: adds the convolution of the rows of a head, whose
    /// channels start at `first`.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>, sums: &Array2<R>, first: usize) -> Array2<R> {
        let [rows, columns] = self.sides;
        Array2::from_shape_fn(sums.dim(), |(token, c)| {
            let (lines, row) = under(token / self.width, self.height, rows);
            let (places, column) = under(token % self.width, self.width, columns);
            let one = R::of(1.0);
            let mut terms = vec![(sums[[token, c]], one), (self.tap(rows, 0, first + c), one)];
            for (line, row) in lines.zip(row) {
                for (place, column) in places.clone().zip(column.clone()) {
                    terms.push((x[[line * self.width + place, c]], self.tap(row, column, first + c)));
                }
            }
            R::dot(terms)
        })
    }
}

/// Refuses an array whose tokens are not those of a grid.
pub(crate) fn check_grid<T>(
    argument: &'static str,
    x: &ArrayView4<'_, T>,
    [height, width]: [usize; 2],
    grid: &str,
) -> Result<()> {
    if Some(x.dim().2) == height.checked_mul(width) {
        return Ok(());
    }
    let expected = format!("[batch, heads, len, dim] with len = {height} x {width}, {grid}");
    Err(Error::shape(argument, expected, x.shape()))
}

/// What lies under `side` taps in the middle of which is `at`, of `len`, and
/// which of the taps these are.
fn under(at: usize, len: usize, side: usize) -> (Range<usize>, Range<usize>) {
    let half = side / 2;
    let rows = at.saturating_sub(half)..(at + half + 1).min(len);
    (rows.clone(), rows.start + half - at..rows.end + half - at)
}

/// One line of a grid, convolved and written.
struct Line<'a, 'b> {
    of: &'a Convolution,
    /// The tokens of the lines under the kernel.
    x: AnyRows<'a>,
    /// Rows of the kernel that lie above them.
    taps: Range<usize>,
    /// Weights from the head's first channel on.
    weights: &'a [f32],
    copy: &'a mut [f32],
    /// What is there without the convolution, `[width, stride]`.
    sums: &'a mut [f32],
    stride: usize,
    then: Then,
    out: AnyRowsMut<'b>,
}

impl Line<'_, '_> {
    /// The `N` tokens from `at` on, under which the same taps lie. Taps are added
    /// in their order, however many tokens there are.
    #[inline(always)]
    fn convolve<S: Simd, const N: usize>(&mut self, s: S, at: usize) {
        let &mut Self { of, ref taps, weights, stride, then, .. } = self;
        let (width, row, [rows, columns]) = (of.width, of.row(), of.sides);
        let (places, column) = under(at, width, columns);
        for c in (0..stride).step_by(S::LANES) {
            let bias = s.load(&weights[rows * columns * row + c..]);
            let mut sums = [bias; N];
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = s.add(s.load(&self.sums[(at + n) * stride + c..]), bias);
            }
            for (i, tap) in taps.clone().enumerate() {
                for (place, column) in places.clone().zip(column.clone()) {
                    let weight = s.load(&weights[(columns * tap + column) * row + c..]);
                    let from = &self.copy[(i * width + place) * stride + c..];
                    for (n, sum) in sums.iter_mut().enumerate() {
                        *sum = s.mul_add(weight, s.load(&from[n * stride..]), *sum);
                    }
                }
            }
            for (n, &sum) in sums.iter().enumerate() {
                let sum = if then == Then::Gelu { gelu(s, sum) } else { sum };
                s.store(&mut self.sums[(at + n) * stride + c..], sum);
            }
        }
        for at in at..at + N {
            self.out.write(s, at, &self.sums[at * stride..][..stride], 1.0);
        }
    }
}

impl Kernel for Line<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.x.pack_rows(s, self.copy, self.stride);
        let (width, half) = (self.of.width, self.of.sides[1] / 2);
        let mut at = 0;
        while at < width {
            // Under all of them lies the whole of the kernel.
            if at >= half && at + AT_ONCE + half <= width {
                self.convolve::<S, AT_ONCE>(s, at);
                at += AT_ONCE;
            } else {
                self.convolve::<S, 1>(s, at);
                at += 1;
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
        for (sides, height, width, dim) in [
            ([3, 3], 1, 1, 5),
            ([3, 3], 6, 7, 20),
            ([1, 5], 3, 9, 16),
            ([7, 3], 5, 2, 33),
            ([3, 3], 2, 30, 1),
            ([7, 7], 8, 19, 18),
        ] {
            let (weights, bias) = (array(1, (4 * dim, sides[0], sides[1])), array(2, 4 * dim));
            let convolution = Convolution::new([height, width], sides, &weights, &bias).unwrap();
            let (x, given) = (array(3, (2, 2, height * width, dim)), array(4, (2, 4, height * width, dim)));
            for isa in Isa::available() {
                let mut out = Array4::<f32>::zeros(given.dim());
                let mut bent = Array4::<f32>::zeros(x.dim());
                let to = std::cell::RefCell::new((&mut out, &mut bent));
                alone(|pass| {
                    let mut sums = pass.rows(given.dim())?;
                    let (out, bent) = &mut *to.borrow_mut();
                    let wet = sums.view_mut().map(|mut sums| sums.assign(&given)).is_some();
                    let out = wet.then(|| out.view_mut());
                    convolution.run(pass, isa, x.view(), Some(sums), Then::Nothing, out);
                    let bent = wet.then(|| bent.view_mut());
                    convolution.run(pass, isa, x.view(), None, Then::Gelu, bent);
                    Ok(())
                });
                for (b, h) in [(0, 0), (1, 1), (1, 3)] {
                    let head: Array2<Running> =
                        x.slice(s![b, h / 2, .., ..]).map(|&x| Running::of(f64::from(x)));
                    let sums = given.slice(s![b, h, .., ..]).map(|&x| Running::of(f64::from(x)));
                    let want = convolution.define(&head, &sums, h * dim);
                    for (got, want) in out.slice(s![b, h, .., ..]).iter().zip(&want) {
                        let share = (f64::from(*got) - want.value()).abs() / want.off();
                        assert!(share <= 1.0, "{isa} {sides:?}: {got}, not {want:?}");
                        worst = worst.max(share);
                    }
                    // Heads of the rows alone, and nothing to begin with.
                    let want = convolution.define(&head, &sums.mapv(|_| Running::of(0.0)), h / 2 * dim);
                    for (got, want) in bent.slice(s![b, h / 2, .., ..]).iter().zip(&want) {
                        let want = want.gelu();
                        assert!((f64::from(*got) - want.value()).abs() <= want.off(), "{isa} {sides:?}");
                    }
                }
            }
        }
        println!("convolve: {worst:.3} of the bound");
    }

    #[test]
    fn the_definition_is_a_sum_of_shifted_grids() {
        let (height, width, dim) = (4, 6, 5);
        let (weights, bias) = (array(70, (2 * dim, 3, 3)), array(71, 2 * dim));
        let convolution = Convolution::new([height, width], [3, 3], &weights, &bias).unwrap();
        let (x, sums) =
            (array(72, (height * width, dim)).mapv(f64::from), Array2::zeros((height * width, dim)));
        // Each value is sent to where it counts.
        let mut want = Array2::from_shape_fn(sums.dim(), |(_, c)| f64::from(bias[dim + c]));
        for (y, at, c, row, column) in ndarray::indices((height, width, dim, 3, 3)) {
            let (to_y, to_x) = ((y + 1).checked_sub(row), (at + 1).checked_sub(column));
            if let (Some(to_y @ 0..4), Some(to_x @ 0..6)) = (to_y, to_x) {
                let weight = f64::from(weights[[dim + c, row, column]]);
                want[[to_y * width + to_x, c]] += weight * x[[y * width + at, c]];
            }
        }
        let got = convolution.define(&x, &sums, dim);
        assert!(got.iter().zip(&want).all(|(a, b): (&f64, &f64)| (a - b).abs() < 1e-13));
    }
}
