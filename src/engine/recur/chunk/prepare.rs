//! *Prepare*: the queries and keys of a chunk, without any state.

use std::ops::Range;

use crate::engine::recur::chunk::*;
use crate::engine::recur::source::{Place, Source};
use crate::engine::recur::{Decay, Normaliser, Read, Rule, Spec};
use crate::simd::mem::{Ahead, Rows};
use crate::simd::pack::PackColumns;
use crate::simd::tile::Update;
use crate::simd::{Kernel, Simd};

/// The queries and keys of a chunk, without any state.
pub(crate) struct Prepare<'a, 'b> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) g: Geometry,
    pub(crate) source: &'a dyn Source,
    pub(crate) at: Place,
    pub(crate) to: Prepared<&'a mut [f32]>,
    /// Panels `[panels][columns][panel]` of the values, and of what the
    /// low-rank rule's corrections read of them.
    pub(crate) values: &'a mut [f32],
    /// Whether queries read: without, there are neither scores nor reads.
    pub(crate) read: bool,
    pub(crate) work: &'a mut Work<'b>,
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for Prepare<'_, '_> {
    /// Whether the chunk is finite. If not, nothing is prepared.
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> bool {
        let (g, len) = (self.g, self.at.tokens.len());
        self.work.load_keys(self.spec, &g, self.source, &self.at);
        let whole = self.fits_whole(s);
        let finite = self.work.put_values(s, &g, len, self.values, self.ahead) && self.is_finite(s, whole);
        if !finite && self.spec.read != Read::Total {
            return false;
        }
        if self.spec.read == Read::Total {
            self.ahead.prefetch_rest();
            self.columns(s, 0, len, 0);
            self.to.decay.fill(1.0);
            return true;
        }
        self.weigh(s, whole);
        if g.rule == Rule::LowRank {
            self.correct(s);
        }
        true
    }
}

impl Prepare<'_, '_> {
    /// Scores, coefficients, and operands with their decays, of keys that have
    /// been loaded, and fit as a [whole](Self::fits_whole) or not.
    #[inline(always)]
    pub(in crate::engine::recur) fn weigh<S: Simd>(&mut self, s: S, whole: bool) {
        let (g, len) = (self.g, self.at.tokens.len());
        if self.read {
            self.work.load_queries(self.spec, &g, self.source, &self.at);
        }
        if g.rule == Rule::LowRank {
            // Between the keys and the corrections.
            for row in self.to.keys.chunks_exact_mut(g.columns) {
                row[len.next_multiple_of(S::LANES).min(g.chunk)..g.chunk].fill(0.0);
            }
        }
        if g.decay == Decay::Channel {
            self.by_channel(s, whole)
        } else {
            self.by_token(s)
        }
        if self.read && g.rule == Rule::Add && self.spec.read == Read::After {
            for t in 0..len {
                let seen = self.spec.seen(t);
                let first = if self.spec.joined { seen - self.spec.steps } else { t };
                let row = &mut self.to.scores[t * g.columns..][first..seen];
                row.iter_mut().zip(&self.work.own[first..]).for_each(|(score, own)| *score *= own);
            }
        }
    }

    /// Whether no operand but the values can reach tokens that must not depend
    /// on it: 0 times infinity is not 0. Of keys that fit as a `whole` this is
    /// known.
    #[inline(always)]
    pub(in crate::engine::recur) fn is_finite<S: Simd>(&self, s: S, whole: bool) -> bool {
        let (g, len) = (self.g, self.at.tokens.len());
        let Work { k, decay, beta, a, b, .. } = &*self.work;
        let mut zero = s.splat(0.0);
        let (keys, low_rank) = (!whole, g.rule == Rule::LowRank);
        for (x, unknown) in [(k, keys), (a, low_rank), (b, keys && low_rank)] {
            for row in x.chunks_exact(g.stride.max(1)).take(if unknown { len } else { 0 }) {
                zero = s.add(zero, zeros(s, row));
            }
        }
        let mut finite = s.reduce_add(zero) == 0.0;
        if g.rule == Rule::Delta {
            finite &= beta[..len].iter().all(|x| x.is_finite());
        }
        // A log decay may be -inf.
        match g.decay {
            Decay::None => {}
            Decay::Scalar => finite &= decay[..len].iter().all(|x| *x < f32::INFINITY),
            Decay::Channel if whole => {}
            Decay::Channel => {
                let mut bad = s.splat(0.0);
                for x in decay[..len * g.stride].chunks_exact(S::LANES) {
                    // 0 for what is below infinity, 1 for infinity and NaN.
                    let x = s.load(x);
                    let one = s.select(s.lt(x, s.splat(f32::INFINITY)), s.splat(0.0), s.splat(1.0));
                    bad = s.add(bad, one);
                }
                finite &= s.reduce_add(bad) == 0.0;
            }
        }
        finite
    }

    /// Rows `first..end` of the keys as columns from `base` on; of the
    /// corrections' keys too.
    #[inline(always)]
    pub(in crate::engine::recur) fn columns<S: Simd>(&mut self, s: S, first: usize, end: usize, base: usize) {
        let g = self.g;
        let Work { k, b, .. } = &*self.work;
        let low_rank = (g.rule == Rule::LowRank).then_some((b, g.chunk));
        for (from, column) in std::iter::once((k, 0)).chain(low_rank) {
            let from = Rows::of_slice(&from[first * g.stride..], end - first, g.rows, g.stride);
            let to = &mut self.to.keys[(column + base).min(g.rows * g.columns)..];
            s.vectorize(PackColumns { from, to, stride: g.columns });
        }
    }

    /// What the corrections of the low-rank rule read of the values.
    #[inline(always)]
    pub(in crate::engine::recur) fn correct<S: Simd>(&mut self, s: S) {
        let (g, len) = (self.g, self.at.tokens.len());
        let coefficients = &*self.to.coefficients;
        for (panel, values) in self.values.chunks_exact_mut(g.value_panel()).enumerate() {
            let width = g.panel_width(panel);
            let (keys, corrections) = values.split_at_mut(g.corrections() * g.panel);
            for first in (0..len).step_by(BLOCK) {
                let end = (first + BLOCK).min(len);
                let a = Rows::of_slice(&coefficients[first * g.columns..], end - first, end, g.columns);
                let c = (&mut corrections[first * g.panel..], g.panel);
                product(s, a, (keys, g.panel), width, c, Update::Set, self.ahead);
            }
        }
    }

    /// Whether all channels [fit](Self::fits) over the whole chunk. Without
    /// decays of their own they need not.
    #[inline(always)]
    pub(in crate::engine::recur) fn fits_whole<S: Simd>(&self, s: S) -> bool {
        let mut whole = self.g.decay == Decay::Channel;
        for col in (0..self.g.stride).step_by(S::LANES) {
            whole = whole && self.fits(s, 0..self.at.tokens.len(), col);
        }
        whole
    }

    /// Whether a vector of channels decays (or grows) little enough over some
    /// tokens for their keys to be divided by it. Then decays and keys are
    /// finite.
    #[inline(always)]
    pub(in crate::engine::recur) fn fits<S: Simd>(&self, s: S, tokens: Range<usize>, col: usize) -> bool {
        let Work { k, b, decay, .. } = &*self.work;
        let (mut sum, mut reach, mut squares) = (s.splat(0.0), s.splat(0.0), s.splat(0.0));
        for t in tokens {
            let at = t * self.g.stride + col;
            sum = s.add(sum, s.load(&decay[at..]));
            // A NaN stays in either.
            reach = s.max(reach, s.abs(sum));
            let key = s.load(&k[at..]);
            squares = s.mul_add(key, key, squares);
            if self.g.rule == Rule::LowRank {
                let key = s.load(&b[at..]);
                squares = s.mul_add(key, key, squares);
            }
        }
        let near = s.bits(s.lt(reach, s.splat(REACH))) & s.bits(s.lt(squares, s.splat(LARGE * LARGE)));
        near == u64::MAX >> (64 - S::LANES)
    }
}

/// Queries that read a state which has all tokens: nothing but their scale, and
/// their own values if their outputs have these.
pub(crate) struct PrepareTotal<'a, 'b> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) g: Geometry,
    pub(crate) source: &'a dyn Source,
    pub(crate) at: Place,
    pub(crate) to: Prepared<&'a mut [f32]>,
    /// As [`Prepare`] has them.
    pub(crate) values: &'a mut [f32],
    pub(crate) work: &'a mut Work<'b>,
}

impl Kernel for PrepareTotal<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.work.load_queries(self.spec, &self.g, self.source, &self.at);
        let len = self.at.tokens.len();
        let n = len * self.g.stride;
        scale_row(s, &self.work.q[..n], self.spec.scale as f32, &mut self.to.reads[..n]);
        if matches!(self.spec.normaliser, Some(Normaliser::Shares { .. })) {
            self.work.load_values(self.spec, &self.g, self.source, &self.at);
            self.work.put_values(s, &self.g, len, self.values, &mut Ahead::nothing());
        }
    }
}
