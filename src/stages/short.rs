//! Short convolutions over the tokens of a sequence, up to each of them: channel by
//! channel, with nothing before the first.
//!
//! ```text
//! y_tc = b_c + sum_i w_ci x_(t - taps + 1 + i)c
//! ```

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::simd::any::{AnyRows, AnyRowsMut, IntoAny};
use crate::simd::mem::{Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Tokens of a task.
const TASK: usize = 64;

/// A convolution that all heads share.
#[derive(Clone, Debug)]
pub(crate) struct Short {
    /// `[taps + 1, stride]`: the taps, that of the token itself last, then what is added.
    weights: Vec<f32>,
    stride: usize,
    dim: usize,
    taps: usize,
}

impl Short {
    /// `weights` are `[dim, taps]`, and `bias` is `[dim]`; `argument` is what they are
    /// called.
    pub(crate) fn new(argument: &'static str, weights: &Array2<f32>, bias: &Array1<f32>) -> Result<Self> {
        let (dim, taps) = weights.dim();
        if bias.len() != dim || taps == 0 {
            let expected = format!("[dim, at least 1] and [dim] = [{dim}]");
            return Err(Error::shape(argument, expected, &[dim, taps, bias.len()]));
        }
        if let Some(x) = weights.iter().chain(bias).find(|x| !x.is_finite()) {
            return Err(Error::value(argument, "finite numbers", x));
        }
        let stride = dim.next_multiple_of(MAX_LANES);
        let mut packed = vec![0.0; (taps + 1) * stride];
        for ((c, tap), &weight) in weights.indexed_iter() {
            packed[tap * stride + c] = weight;
        }
        packed[taps * stride..].iter_mut().zip(bias).for_each(|(to, &bias)| *to = bias);
        Ok(Self { weights: packed, stride, dim, taps })
    }

    /// Elements of a row.
    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        (self.taps + 1) * self.dim * size_of::<f32>()
    }

    /// What tokens of so many sequences become, of each of which `of` says where on the
    /// batch axis it lies, and which rows it has. Other rows are of any value.
    pub(crate) fn run<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        x: ArrayView4<'_, T>,
        sequences: usize,
        of: &(dyn Fn(usize) -> (usize, Range<usize>) + Sync),
    ) -> Result<Scratch<'a>> {
        let (batch, heads, len, dim) = x.dim();
        let mut to = pass.rows(x.dim())?;
        let (workers, stride, claims) = (parallel::threads(), self.stride, claim_words(batch * heads * len));
        let longest = (0..sequences).map(|i| of(i).1.len()).max().unwrap_or(0);
        let room = bytes_for::<f32>((TASK + self.taps - 1) * stride) + bytes_for::<f32>(stride);
        let bytes = bytes_for::<u64>(claims) + bytes_for_shares(workers, room);
        let flops = || (2 * self.taps * batch * heads * len) as u64 * dim as u64;
        pass.stage(flops, bytes, |mut arena| {
            let Some(to) = to.view_mut() else { return };
            let to = f32::any_out(OutRows::new(to, arena.take(claims)));
            let (x, shares) = (T::any(Heads::new(x)), arena.shares(workers, room));
            let start = |worker| {
                let mut share = shares.take(worker);
                (share.take::<f32>((TASK + self.taps - 1) * stride), share.take::<f32>(stride))
            };
            let pieces = longest.div_ceil(TASK);
            parallel::for_each(workers, sequences * heads * pieces, start, |(copy, row), task| {
                let (sequence, head, at) =
                    (task / pieces / heads, task / pieces % heads, task % pieces * TASK);
                let (batch, rows) = of(sequence);
                let own = (rows.start + at).min(rows.end)..(rows.start + at + TASK).min(rows.end);
                let before = (own.start - rows.start).min(self.taps - 1);
                isa.dispatch(Piece {
                    of: self,
                    x: x.rows(batch, head, &(own.start - before..own.end)),
                    before,
                    copy,
                    row,
                    to: to.take(batch, head, own),
                });
            });
        });
        Ok(to)
    }

    /// The definition, of the rows of a sequence.
    pub(crate) fn define<R: Real>(&self, x: &Array2<R>) -> Array2<R> {
        let weight = |tap: usize, c: usize| R::of(f64::from(self.weights[tap * self.stride + c]));
        Array2::from_shape_fn(x.dim(), |(t, c)| {
            let row = |tap: usize| (t + tap + 1).checked_sub(self.taps);
            let terms = (0..self.taps).filter_map(|tap| row(tap).map(|row| (x[[row, c]], weight(tap, c))));
            R::dot(terms.chain([(weight(self.taps, c), R::of(1.0))])).stored()
        })
    }
}

/// Some tokens of a head, after those `before` them.
struct Piece<'a, 'b> {
    of: &'a Short,
    x: AnyRows<'a>,
    before: usize,
    copy: &'a mut [f32],
    row: &'a mut [f32],
    to: AnyRowsMut<'b>,
}

impl Kernel for Piece<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of: Short { weights, stride, taps, .. }, x, before, copy, row, mut to } = self;
        let (stride, taps) = (*stride, *taps);
        x.pack_rows(s, copy, stride);
        for t in before..x.len() {
            // Taps before the first token have none.
            let first = (taps - 1).saturating_sub(t);
            for c in (0..stride).step_by(S::LANES) {
                let mut sum = s.load(&weights[taps * stride + c..]);
                for tap in first..taps {
                    let x = s.load(&copy[(t + tap + 1 - taps) * stride + c..]);
                    sum = s.mul_add(s.load(&weights[tap * stride + c..]), x, sum);
                }
                s.store(&mut row[c..], sum);
            }
            to.write(s, t - before, row, 1.0);
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
        for (taps, dim, ends) in [
            (3, 5, vec![0, 1, 70, 70, 200]),
            (1, 16, vec![0, 3]),
            (4, 33, vec![0, 2, 140]),
            (2, 0, vec![0, 3]),
        ] {
            let len = ends[ends.len() - 1];
            let (x, short) = (
                array(1, (1, 2, len, dim)),
                Short::new("taps", &array(2, (dim, taps)), &array(3, dim)).unwrap(),
            );
            let of = |i: usize| (0, ends[i]..ends[i + 1]);
            for isa in Isa::available() {
                let run = |pass: &mut Pass<'_>| {
                    Ok(short.run(pass, isa, x.view(), ends.len() - 1, &of)?.view().to_owned())
                };
                let got = alone(run);
                for (h, rows) in (0..2).flat_map(|h| ends.windows(2).map(move |x| (h, x[0]..x[1]))) {
                    let part = s![0, h, rows, ..];
                    let want = short.define(&x.slice(part).map(|&x| Running::of(f64::from(x))));
                    for (got, want) in got.slice(part).iter().zip(&want) {
                        assert!((f64::from(*got) - want.value()).abs() <= want.off(), "{isa}: {got}");
                    }
                }
            }
        }
        let two = Short::new("taps", &array(2, (3, 2)), &array(3, 2)).unwrap_err().to_string();
        assert_eq!(two, "taps: expected shape [dim, at least 1] and [dim] = [3], got [3, 2, 2]");
    }

    /// What comes later, and what another sequence has, does not matter; taps are those
    /// of a convolution of PyTorch that is padded on the left.
    #[test]
    fn taps_end_at_their_token() {
        let short = Short::new("taps", &ndarray::array![[1.0, 10.0, 100.0]], &ndarray::array![0.5]).unwrap();
        let x = Array2::from_shape_vec((4, 1), vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(short.define::<f64>(&x).into_raw_vec_and_offset().0, [100.5, 210.5, 321.5, 432.5]);
        let x = ArrayView4::from_shape((1, 1, 4, 1), &[1.0f32, f32::NAN, 3.0, 4.0]).unwrap();
        let run = |pass: &mut Pass<'_>| {
            let of = |i: usize| (0, [0..1, 2..4][i].clone());
            Ok(short.run(pass, Isa::Scalar, x, 2, &of)?.view().to_owned())
        };
        let got = alone(run);
        assert_eq!([0, 2, 3].map(|t| got[[0, 0, t, 0]]), [100.5, 300.5, 430.5]);
    }
}
