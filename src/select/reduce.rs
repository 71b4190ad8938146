//! Reductions: how the scores of several queries and heads become one row.

use crate::simd::exp::exp2_flush;
use crate::simd::{Kernel, Simd};

/// How a list that several rows share is scored. Rows in which a candidate is
/// hidden have no say about it; one that is NaN makes it NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reduce {
    /// The largest score.
    Max,
    /// Their sum.
    Sum,
    /// Their sum over the number of rows, also of those that do not see it.
    Mean,
    /// The sum over heads of what the mean of a head's queries scores, which sits
    /// where the last one does. Shares are those among what is not forced. For
    /// summaries that are linear: no extremes.
    Votes,
    /// `sum_h w_h max(s_h, 0)` with the weights of an
    /// [`IndexBranch`](super::IndexBranch), for lists of one query.
    Rectified,
    /// The same of queries and rows as codes of 8 bits, each a multiple of a scale of
    /// its row: `x' = s round(x / s)` with `s = max_c |x_c| / 127`.
    RectifiedCodes,
}

impl Reduce {
    /// Whether scores are rectified, with weights of heads.
    pub(crate) fn is_rectified(self) -> bool {
        matches!(self, Self::Rectified | Self::RectifiedCodes)
    }
}

/// Takes one more row into a reduction: the first `filled` candidates have
/// been seen by a row before.
pub(crate) struct Combine<'a> {
    pub(crate) reduce: Reduce,
    pub(crate) row: &'a [f32],
    pub(crate) filled: usize,
    pub(crate) into: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { reduce, row, filled, into } = self;
        let both = filled.min(row.len());
        match reduce {
            Reduce::Max => {
                for (most, &x) in into[..both].iter_mut().zip(row) {
                    // NaN stays and comes through.
                    *most = if x > *most || x.is_nan() { x } else { *most };
                }
            }
            Reduce::Sum | Reduce::Mean | Reduce::Votes | Reduce::Rectified | Reduce::RectifiedCodes => {
                for (sum, &x) in into[..both].iter_mut().zip(row) {
                    *sum += x;
                }
            }
        }
        into[both..row.len()].copy_from_slice(&row[both..]);
    }
}

/// `exp(scale x_i) / sum_j exp(scale x_j)`, in place.
pub(crate) struct Shares<'a> {
    pub(crate) row: &'a mut [f32],
    pub(crate) scale: f32,
}

impl Kernel for Shares<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, scale } = self;
        let lowest = s.splat(f32::NEG_INFINITY);
        let mut most = lowest;
        for part in row.chunks(S::LANES) {
            let valid = s.mask(u64::MAX >> (64 - part.len()));
            let x = s.mul(s.load_tail(part), s.splat(scale));
            // NaN is not the larger: it comes through in the sum.
            most = s.max(s.select(valid, x, lowest), most);
        }
        let most = s.reduce_max(most);
        let (base, log2_e) = (s.splat(most), s.splat(std::f32::consts::LOG2_E));
        let mut sum = s.splat(0.0);
        for part in row.chunks_mut(S::LANES) {
            let valid = s.mask(u64::MAX >> (64 - part.len()));
            let x = s.sub(s.mul(s.load_tail(part), s.splat(scale)), base);
            let x = s.select(valid, exp2_flush(s, s.mul(x, log2_e)), s.splat(0.0));
            sum = s.add(sum, x);
            s.store_tail(part, x);
        }
        let share = s.splat(1.0 / s.reduce_add(sum));
        for part in row.chunks_mut(S::LANES) {
            let x = s.mul(s.load_tail(part), share);
            s.store_tail(part, x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[test]
    fn shares_sum_to_one() {
        for n in [1usize, 5, 16, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
            let exact: Vec<f64> = x.iter().map(|&x| (0.5 * f64::from(x)).exp()).collect();
            let sum: f64 = exact.iter().sum();
            for isa in Isa::available() {
                let mut row = x.clone();
                isa.dispatch(Shares { row: &mut row, scale: 0.5 });
                for (got, want) in row.iter().zip(&exact) {
                    assert!((f64::from(*got) - want / sum).abs() < 1e-6, "{isa}: {got}, {}", want / sum);
                }
            }
        }
    }

    #[test]
    fn a_candidate_that_one_row_does_not_see_is_scored_by_the_others() {
        for (reduce, want) in [(Reduce::Max, [3.0, 5.0, 2.0]), (Reduce::Sum, [4.0, 5.0, 2.0])] {
            for isa in Isa::available() {
                let mut row = [0.0; 3];
                isa.dispatch(Combine { reduce, row: &[1.0, 5.0], filled: 0, into: &mut row });
                isa.dispatch(Combine { reduce, row: &[3.0], filled: 2, into: &mut row });
                isa.dispatch(Combine { reduce, row: &[-9.0, -9.0, 2.0], filled: 2, into: &mut row });
                let want = if reduce == Reduce::Max { want } else { [-5.0, -4.0, 2.0] };
                assert_eq!(row, want, "{isa} {reduce:?}");
                isa.dispatch(Combine { reduce, row: &[f32::NAN], filled: 3, into: &mut row });
                isa.dispatch(Combine { reduce, row: &[1.0], filled: 3, into: &mut row });
                assert!(row[0].is_nan() && row[1] == want[1]);
            }
        }
    }
}
