//! What is done to one row of scores and to one row of output: shared by the
//! engines.

use ndarray::s;

use crate::engine::call::{Call, Norm};
use crate::input::{Sequence, Site};
use crate::score::Seen;
use crate::simd::Simd;
use crate::simd::exp::{exp2_flush, sigmoid};
use crate::simd::mem::RowsMut;

/// Base-2 logarithms beyond which `f32` has no fractions.
const LARGE: f32 = 16_777_216.0;
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// A sum of exponentials: `e^max * sum`. The maximum is a score as it is, for
/// the largest have no base-2 logarithm in `f32`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SoftmaxSum {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

/// What an output is multiplied by: two factors one after the other, since
/// their product may be less than `f32` can hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factor {
    first: f32,
    second: f32,
}

impl Factor {
    const ONE: Self = Self { first: 1.0, second: 1.0 };

    fn new(x: f64) -> Self {
        const SMALL: f64 = f32::MIN_POSITIVE as f64;
        let small = x > 0.0 && x < SMALL;
        let (first, second) = if small { (x / SMALL, SMALL) } else { (x, 1.0) };
        Self { first: first as f32, second: second as f32 }
    }

    /// Multiplies a row of whole vectors by the first of two factors; returns
    /// the one that is left.
    #[inline(always)]
    pub(crate) fn start<S: Simd>(self, s: S, row: &mut [f32]) -> f32 {
        if self.second == 1.0 {
            return self.first;
        }
        for x in row.chunks_exact_mut(S::LANES) {
            s.store(x, s.mul(s.load(x), s.splat(self.first)));
        }
        self.second
    }
}

impl SoftmaxSum {
    /// The sum of nothing.
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// The base-2 logarithm of what weights are relative to.
    #[inline(always)]
    fn base(self) -> f64 {
        let base = self.max * LOG2_E;
        if base.abs() > LARGE { f64::from(self.max) * std::f64::consts::LOG2_E } else { f64::from(base) }
    }

    /// Its natural logarithm.
    #[inline(always)]
    pub(crate) fn lse(self) -> f32 {
        if self.sum == 0.0 {
            return f32::NEG_INFINITY;
        }
        ((self.base() + f64::from(self.sum).log2()) * std::f64::consts::LN_2) as f32
    }
}

impl SoftmaxSum {
    /// What weights are multiplied by that become relative to a larger maximum.
    #[inline(always)]
    fn share(self, top: Self) -> f32 {
        if self.max == top.max { 1.0 } else { ((self.base() - top.base()) as f32).exp2() }
    }

    /// The sum, relative to a larger maximum.
    #[inline(always)]
    pub(crate) fn relative_to(self, top: Self) -> f32 {
        if self.sum == 0.0 { 0.0 } else { self.sum * self.share(top) }
    }

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
    pub(crate) figures: SoftmaxSum,
    pub(crate) out: &'a mut [f32],
}

impl RowState<'_> {
    /// Adds the state of other keys.
    #[inline(always)]
    pub(crate) fn merge<S: Simd>(&mut self, s: S, other: SoftmaxSum, out: &[f32]) {
        let top = if self.figures.max > other.max { self.figures } else { other };
        let (keep, take) = (self.figures.share(top), other.share(top));
        self.figures = SoftmaxSum { max: top.max, sum: self.figures.sum * keep + other.sum * take };
        for j in (0..out.len()).step_by(S::LANES) {
            let x = s.mul(s.load(&self.out[j..]), s.splat(keep));
            s.store(&mut self.out[j..], s.mul_add(s.load(&out[j..]), s.splat(take), x));
        }
    }
}

impl Call<'_> {
    /// Dot products that are infinite though all their factors are finite
    /// become the largest whose score is finite: what is visible must not look
    /// like what an infinite factor hides. For rows of which it matters, since
    /// some value is no number.
    #[inline(always)]
    pub(crate) fn saturate(
        &self,
        sequence: &Sequence,
        (head, query): (usize, usize),
        scores: &mut [f32],
        finite: impl Fn(usize) -> bool,
    ) {
        let most = f32::MAX / self.scale_of(sequence, head, query).abs().max(1.0);
        for (j, score) in scores.iter_mut().enumerate() {
            if score.is_infinite() && finite(j) {
                *score = most.copysign(*score);
            }
        }
    }

    /// Makes final scores of dot products with the keys from `first` on, up
    /// to a factor that is returned. Where some are hidden, `seen` says which
    /// are not.
    #[inline(always)]
    pub(crate) fn finish_scores(
        &self,
        sequence: &Sequence,
        site: &Site,
        query: usize,
        first: usize,
        scores: &mut [f32],
        seen: Option<Seen<'_>>,
    ) -> f32 {
        let scale = self.scale_of(sequence, site.head, query);
        if self.score.is_identity() && scale > 0.0 {
            return scale;
        }
        for score in &mut *scores {
            *score *= scale;
        }
        self.score.apply_row(self.isa, site, query, first, scores, seen);
        1.0
    }

    /// What dot products with a query are multiplied by.
    #[inline(always)]
    pub(crate) fn scale_of(&self, sequence: &Sequence, head: usize, query: usize) -> f32 {
        match &self.gains {
            Some(gains) => {
                let row = self.query_row(sequence, query);
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
                *weight *= gains[self.key_row(sequence, key)];
            }
        }
    }
}

impl Call<'_> {
    /// The epilogue of row `row` of an output, whose sum of weighted values is
    /// `out`: gates it and returns the factor that is left, which is its head's gain
    /// where heads have some.
    #[inline(always)]
    pub(crate) fn epilogue<S: Simd>(
        &self,
        s: S,
        (batch, head, row): (usize, usize, usize),
        figures: SoftmaxSum,
        out: &mut [f32],
    ) -> f32 {
        if let Some(gate) = &self.gate {
            let gate = gate.rows(batch, head, &(row..row + 1));
            let all = (gate.cols() == 1).then(|| sigmoid(s, s.splat(gate.at(0, 0))));
            // What lies beyond the last column is not written.
            let vectors = self.dims.value_dim.div_ceil(S::LANES);
            for (j, x) in out.chunks_exact_mut(S::LANES).take(vectors).enumerate() {
                let share = all.unwrap_or_else(|| sigmoid(s, gate.load(s, 0, j * S::LANES)));
                s.store(x, s.mul(s.load(x), share));
            }
        }
        let mut factor = self.norm.factor(figures, head).start(s, out);
        // One after the other: the product of both may be less than `f32` can hold.
        if let Some(gains) = self.head_gains {
            for x in out.chunks_exact_mut(S::LANES) {
                s.store(x, s.mul(s.load(x), s.splat(factor)));
            }
            factor = gains[head];
        }
        let Some(plus) = &self.plus else { return factor };
        let plus = plus.rows(batch, head, &(row..row + 1));
        let vectors = self.dims.value_dim.div_ceil(S::LANES);
        for (j, x) in out.chunks_exact_mut(S::LANES).take(vectors).enumerate() {
            let own = s.mul(s.load(x), s.splat(factor));
            s.store(x, s.add(own, plus.load(s, 0, j * S::LANES)));
        }
        1.0
    }
}

impl Norm<'_> {
    /// What the sum of weights times values is multiplied by in the end. The
    /// sink takes part here alone, so that sums without it can be merged.
    #[inline(always)]
    pub(crate) fn factor(self, figures: SoftmaxSum, head: usize) -> Factor {
        let sum = figures.sum;
        match self {
            Self::Sigmoid { .. } => Factor::ONE,
            Self::Softmax { .. } if sum == 0.0 => Factor { first: 0.0, ..Factor::ONE },
            Self::Softmax { sinks: None } => Factor { first: 1.0 / sum, ..Factor::ONE },
            Self::Softmax { sinks: Some(sinks) } => {
                let (sum, base) = (f64::from(sum), figures.base());
                let sink = f64::from(sinks[head]) * std::f64::consts::LOG2_E;
                Factor::new(if sink > base {
                    let share = (base - sink).exp2();
                    share / (sum * share + 1.0)
                } else {
                    1.0 / (sum + (sink - base).exp2())
                })
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
        figures: &mut SoftmaxSum,
        out: &mut [f32],
    ) {
        match self {
            Self::Softmax { .. } => softmax(s, row, factor, figures, out),
            Self::Sigmoid { bias } => {
                let bias = s.splat(bias.unwrap_or(-(site.kv_len as f32).ln()));
                let factor = s.splat(factor);
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
fn softmax<S: Simd>(s: S, row: &mut [f32], factor: f32, figures: &mut SoftmaxSum, out: &mut [f32]) {
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
    pub(crate) fn of_row(
        s: S,
        row: &mut [f32],
        factor: f32,
        figures: &mut SoftmaxSum,
        out: &mut [f32],
    ) -> Self {
        // Weights stay below about 2^SLACK, which costs no accuracy and saves
        // most changes of the maximum.
        const SLACK: f32 = 8.0;
        let mut top = s.splat(f32::NEG_INFINITY);
        for x in row.chunks_exact(S::LANES) {
            top = s.max(s.load(x), top);
        }
        let below = s.lt(s.mul(top, s.splat(factor * LOG2_E)), s.splat(figures.max * LOG2_E + SLACK));
        // Asked this way round also where either is infinite.
        if s.bits(below) != u64::MAX >> (64 - S::LANES) {
            let top = s.reduce_max(top);
            let raised = if top.is_finite() { (top * factor).clamp(f32::MIN, f32::MAX) } else { top };
            if raised > figures.max {
                let before = *figures;
                figures.max = raised;
                if before.sum != 0.0 {
                    let shrink = ((before.base() - figures.base()) as f32).exp2();
                    figures.sum *= shrink;
                    for j in (0..out.len()).step_by(S::LANES) {
                        let x = s.mul(s.load(&out[j..]), s.splat(shrink));
                        s.store(&mut out[j..], x);
                    }
                }
            }
        }
        Self::relative_to(s, row, factor, *figures)
    }

    /// For a row of whole vectors whose weights are relative to a maximum that
    /// is known.
    #[inline(always)]
    pub(crate) fn relative_to(s: S, row: &mut [f32], factor: f32, figures: SoftmaxSum) -> Self {
        // Before anything is visible -inf - -inf would be NaN.
        let max = if figures.max == f32::NEG_INFINITY { 0.0 } else { figures.max };
        let (factor2, base) = (factor * LOG2_E, max * LOG2_E);
        if base.abs() <= LARGE && factor2.abs() < f32::INFINITY {
            return Self { factor: s.splat(factor2), base: s.splat(base) };
        }
        // What rounding took from the maximum is part of a fused difference. Of
        // large scores it is large, and the weight of the maximum not 1 but 0 or
        // infinite: there the products are rounded before, and differences are
        // those of the scores as they are, which stay finite.
        let (least, most) = (s.splat(f32::MIN), s.splat(f32::MAX));
        for x in row.chunks_exact_mut(S::LANES) {
            let score = s.load(x);
            let scaled = s.min(most, s.max(least, s.mul(score, s.splat(factor))));
            let scaled = s.select(s.lt(most, s.abs(score)), score, scaled);
            let apart = s.max(least, s.sub(scaled, s.splat(max)));
            s.store(x, s.select(s.lt(score, least), score, apart));
        }
        Self { factor: s.splat(LOG2_E), base: s.splat(0.0) }
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
