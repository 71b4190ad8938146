//! What is done to one row of scores and to one row of output: shared by the
//! engines.

use ndarray::s;

use crate::engine::call::{Call, Norm};
use crate::input::{Sequence, Site};
use crate::simd::Simd;
use crate::simd::exp::{exp2_flush, sigmoid};
use crate::simd::mem::RowsMut;

/// A sum of exponentials: `2^max * sum`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

impl Figures {
    /// The sum of nothing.
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Its natural logarithm.
    #[inline(always)]
    pub(crate) fn lse(self) -> f32 {
        if self.sum == 0.0 {
            return f32::NEG_INFINITY;
        }
        ((f64::from(self.max) + f64::from(self.sum).log2()) * std::f64::consts::LN_2) as f32
    }
}

impl Figures {
    /// Writes them as row `i`: the logarithm where there is one column, the
    /// maximum and the sum where there are two.
    #[inline(always)]
    pub(crate) fn write(self, to: &mut RowsMut<'_, f32>, i: usize) {
        if to.cols() == 1 {
            to.set(i, 0, self.lse());
        } else {
            to.set(i, 0, self.max);
            to.set(i, 1, self.sum);
        }
    }
}

/// The state of one row: its figures and its output so far.
pub(crate) struct RowState<'a> {
    pub(crate) figures: Figures,
    pub(crate) out: &'a mut [f32],
}

impl RowState<'_> {
    /// Adds the state of other keys.
    #[inline(always)]
    pub(crate) fn merge<S: Simd>(&mut self, s: S, other: Figures, out: &[f32]) {
        let top = if self.figures.max > other.max { self.figures.max } else { other.max };
        let share = |max: f32| if max == top { 1.0 } else { (max - top).exp2() };
        let (keep, take) = (share(self.figures.max), share(other.max));
        self.figures = Figures { max: top, sum: self.figures.sum * keep + other.sum * take };
        for j in (0..out.len()).step_by(S::LANES) {
            let x = s.mul(s.load(&self.out[j..]), s.splat(keep));
            s.store(&mut self.out[j..], s.mul_add(s.load(&out[j..]), s.splat(take), x));
        }
    }
}

impl Call<'_> {
    /// Makes final scores of dot products with the keys from `first` on, up
    /// to a factor that is returned: scores times it are in base-2 units.
    #[inline(always)]
    pub(crate) fn finish_scores(
        &self,
        sequence: &Sequence,
        site: &Site,
        query: usize,
        first: usize,
        scores: &mut [f32],
    ) -> f32 {
        let scale = self.scale_of(sequence, site.head, query);
        if self.score.is_identity() && scale > 0.0 {
            return scale * std::f32::consts::LOG2_E;
        }
        for score in &mut *scores {
            *score *= scale;
        }
        self.score.apply_row(self.isa, site, query, first, scores);
        std::f32::consts::LOG2_E
    }

    /// What dot products with a query are multiplied by.
    #[inline(always)]
    pub(crate) fn scale_of(&self, sequence: &Sequence, head: usize, query: usize) -> f32 {
        match &self.gains {
            Some(gains) => {
                let row = sequence.queries.start + self.query_row(query);
                self.scale * gains.query[[sequence.batch, head, row]]
            }
            None => self.scale,
        }
    }

    /// Whether [`finish_scores`](Self::finish_scores) leaves scores as they
    /// are and tells a factor of the row.
    #[inline(always)]
    pub(crate) fn leaves_scores(&self) -> bool {
        self.score.is_identity() && self.scale > 0.0 && self.gains.is_none()
    }

    /// Multiplies the weights of the keys from `first` on by the gains of
    /// their values.
    #[inline(always)]
    pub(crate) fn gain_weights(&self, sequence: &Sequence, head: usize, first: usize, weights: &mut [f32]) {
        if let Some(gains) = &self.gains {
            let gains = gains.value.slice(s![sequence.batch, head / self.group(), ..]);
            for (key, weight) in (first..).zip(weights) {
                *weight *= gains[sequence.keys.start + self.key_row(key)];
            }
        }
    }
}

impl Norm<'_> {
    /// What the sum of weights times values is multiplied by in the end. The
    /// sink takes part here alone, so that sums without it can be merged.
    #[inline(always)]
    pub(crate) fn factor(self, figures: Figures, head: usize) -> f32 {
        let Figures { max, sum } = figures;
        match self {
            Self::Sigmoid { .. } => 1.0,
            Self::Softmax { .. } if sum == 0.0 => 0.0,
            Self::Softmax { sinks: None } => 1.0 / sum,
            Self::Softmax { sinks: Some(sinks) } => {
                let sink = sinks[head] * std::f32::consts::LOG2_E;
                if sink > max {
                    let share = (max - sink).exp2();
                    share / (sum * share + 1.0)
                } else {
                    1.0 / (sum + (sink - max).exp2())
                }
            }
        }
    }

    /// Turns the scores of a row into weights; figures and output follow.
    /// The row is whole vectors; masked scores are -inf.
    #[inline(always)]
    pub(crate) fn weigh<S: Simd>(
        self,
        s: S,
        row: &mut [f32],
        factor: f32,
        site: &Site,
        figures: &mut Figures,
        out: &mut [f32],
    ) {
        match self {
            Self::Softmax { .. } => softmax(s, row, factor, figures, out),
            Self::Sigmoid { bias } => {
                let bias = s.splat(bias.unwrap_or(-(site.kv_len as f32).ln()));
                let factor = s.splat(factor * std::f32::consts::LN_2);
                for j in (0..row.len()).step_by(S::LANES) {
                    let x = s.mul_add(s.load(&row[j..]), factor, bias);
                    s.store(&mut row[j..], sigmoid(s, x));
                }
            }
        }
    }
}

/// Weights are exponentials relative to a maximum that is raised only when
/// it must be.
#[inline(always)]
fn softmax<S: Simd>(s: S, row: &mut [f32], factor: f32, figures: &mut Figures, out: &mut [f32]) {
    let exponent = Exponent::of_row(s, row, factor, figures, out);
    let mut total = s.splat(0.0);
    for x in row.chunks_exact_mut(S::LANES) {
        let p = exponent.weight(s, s.load(x));
        s.store(x, p);
        total = s.add(total, p);
    }
    figures.sum += s.reduce_add(total);
}

/// How the weights of a row come from its scores.
#[derive(Clone, Copy)]
pub(crate) struct Exponent<S: Simd> {
    factor: S::F,
    base: S::F,
}

impl<S: Simd> Exponent<S> {
    /// For a row of whole vectors, of which the maximum may have to be
    /// raised: sum and output so far follow.
    #[inline(always)]
    pub(crate) fn of_row(s: S, row: &mut [f32], factor: f32, figures: &mut Figures, out: &mut [f32]) -> Self {
        // Weights stay below 2^SLACK, which costs no accuracy and saves most
        // changes of the maximum.
        const SLACK: f32 = 8.0;
        let factor = s.splat(factor);
        let mut top = s.splat(f32::NEG_INFINITY);
        for x in row.chunks_exact(S::LANES) {
            top = s.max(s.load(x), top);
        }
        let top = s.mul(top, factor);
        if s.bits(s.lt(s.splat(figures.max + SLACK), top)) != 0 {
            let raised = s.reduce_max(top);
            if figures.sum != 0.0 {
                let shrink = (figures.max - raised).exp2();
                figures.sum *= shrink;
                for j in (0..out.len()).step_by(S::LANES) {
                    let x = s.mul(s.load(&out[j..]), s.splat(shrink));
                    s.store(&mut out[j..], x);
                }
            }
            figures.max = raised;
        }
        // Before anything is visible -inf - -inf would be NaN.
        let base = if figures.max == f32::NEG_INFINITY { 0.0 } else { figures.max };
        // What rounding took from the maximum is part of a fused difference. Of
        // large scores it is large, and the weight of the maximum not 1 but 0 or
        // infinite: there the products are rounded before.
        const LARGE: f32 = 16_777_216.0;
        let factor = if base.abs() > LARGE {
            for x in row.chunks_exact_mut(S::LANES) {
                s.store(x, s.mul(s.load(x), factor));
            }
            s.splat(1.0)
        } else {
            factor
        };
        Self { factor, base: s.splat(base) }
    }

    /// The weights of a vector of scores.
    #[inline(always)]
    pub(crate) fn weight(&self, s: S, scores: S::F) -> S::F {
        exp2_flush(s, s.mul_sub(scores, self.factor, self.base))
    }
}

/// Makes the scores of invisible keys -inf. Bit `j` of the words is `row[j]`.
#[inline(always)]
pub(crate) fn mask_row<S: Simd>(s: S, row: &mut [f32], visible: &[u64]) {
    for j in (0..row.len()).step_by(S::LANES) {
        let x = s.load(&row[j..]);
        let x = s.select(s.mask(visible[j / 64] >> (j % 64)), x, s.splat(f32::NEG_INFINITY));
        s.store(&mut row[j..], x);
    }
}

/// Which scores of a row are not -inf.
#[inline(always)]
pub(crate) fn visible_of_row<S: Simd>(s: S, row: &[f32], visible: &mut [u64]) {
    visible.fill(0);
    for j in (0..row.len()).step_by(S::LANES) {
        let masked = s.bits(s.lt(s.load(&row[j..]), s.splat(f32::MIN)));
        visible[j / 64] |= (!masked & (u64::MAX >> (64 - S::LANES))) << (j % 64);
    }
}
