//! *Read*: the outputs of a chunk, and their epilogue.

use crate::engine::recur::chunk::*;
use crate::engine::recur::{Normaliser, Read, Rule, Spec};
use crate::simd::any::AnyRowsMut;
use crate::simd::mem::{Ahead, Rows};
use crate::simd::tile::Update;
use crate::simd::{Kernel, Simd};

/// What the queries of a chunk read of its values and of the state at its
/// start, as rows `[chunk, width]`: one panel.
pub(crate) struct Reads<'a> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) g: Geometry,
    pub(crate) len: usize,
    pub(crate) from: &'a Prepared<&'a [f32]>,
    pub(crate) panel: usize,
    /// `[columns, panel]`
    pub(crate) values: &'a [f32],
    /// `[rows, panel]`
    pub(crate) state: &'a [f32],
    /// As [`Source::skip`] has it.
    pub(crate) skip: &'a [f32],
    pub(crate) out: &'a mut [f32],
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for Reads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (g, len, values) = (self.g, self.len, self.values);
        let (width, col) = (g.panel_width(self.panel), self.panel * g.panel);
        let total = self.spec.read == Read::Total;
        if !total {
            for first in (0..len).step_by(BLOCK) {
                let end = (first + BLOCK).min(len);
                let scores = &self.from.scores[first * g.columns..];
                let out = &mut self.out[first * g.width + col..];
                let a = Rows::of_slice(scores, end - first, self.spec.seen(end - 1), g.columns);
                product(s, a, (values, g.panel), width, (out, g.width), Update::Set, self.ahead);
                if g.rule == Rule::LowRank {
                    let a = Rows::of_slice(&scores[g.chunk..], end - first, end, g.columns);
                    let values = (&values[g.chunk * g.panel..], g.panel);
                    product(s, a, values, width, (out, g.width), Update::Add, self.ahead);
                }
            }
        }
        let a = Rows::of_slice(self.from.reads, len, g.rows, g.stride);
        let update = if total { Update::Set } else { Update::Add };
        let out = (&mut self.out[col..], g.width);
        product(s, a, (self.state, g.panel), width, out, update, self.ahead);
        if !self.skip.is_empty() {
            for t in 0..len {
                let out = &mut self.out[t * g.width + col..][..width];
                for c in (0..width).step_by(S::LANES) {
                    let value = s.load(&values[t * g.panel + c..]);
                    let sum = s.mul_add(skip_at(s, self.skip, col + c), value, s.load(&out[c..]));
                    s.store(&mut out[c..], sum);
                }
            }
        }
    }
}

/// A vector of [`Source::skip`] from column `col` on; columns that round up to
/// a vector have none.
#[inline(always)]
pub(crate) fn skip_at<S: Simd>(s: S, skip: &[f32], col: usize) -> S::F {
    match skip {
        [all] => s.splat(*all),
        each => s.load_tail(each.get(col..).unwrap_or_default()),
    }
}

/// Keys that a row of outputs has seen, as far as they have not decayed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count {
    /// Before the first row.
    pub(crate) before: f64,
    /// What each row leaves of them, and adds.
    pub(crate) keep: f64,
    pub(crate) add: f64,
}

/// Writes rows of outputs, divided by their [`Normaliser`] if they have one.
pub(crate) struct Finish<'a, 'b> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) width: usize,
    pub(crate) rows: &'a [f32],
    pub(crate) to: &'a mut AnyRowsMut<'b>,
    /// The first row of `to`, and steps of its token that are past.
    pub(crate) first: usize,
    pub(crate) past: usize,
    pub(crate) len: usize,
    pub(crate) count: Count,
}

impl Kernel for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Count { before: mut count, keep, add } = self.count;
        for (t, row) in self.rows.chunks_exact(self.width.max(1)).take(self.len).enumerate() {
            count = keep * count + add;
            // Steps before the last write nothing.
            let (token, rest) =
                ((self.past + t + 1) / self.spec.steps, (self.past + t + 1) % self.spec.steps);
            if rest != 0 {
                continue;
            }
            let sum = row.get(self.spec.dims.value_dim).copied().unwrap_or_default();
            let whole = match self.spec.normaliser {
                None => 1.0,
                Some(Normaliser::Sum { epsilon }) => sum + epsilon,
                // The column has the share of the row's own token.
                Some(Normaliser::Shares { share }) => sum + share * (count - 1.0) as f32,
                Some(Normaliser::Bounded) => {
                    let (sum, least) = (sum.abs(), count.sqrt() as f32);
                    // A NaN stays.
                    if sum < least { least } else { sum }
                }
            };
            // No weight at all gives 0.
            let factor = if whole == 0.0 { 0.0 } else { 1.0 / whole };
            self.to.write(s, self.first + token - 1, row, factor);
        }
    }
}
