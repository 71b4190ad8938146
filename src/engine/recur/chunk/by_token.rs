//! Scores of a chunk whose decays are the same for all channels.

use crate::engine::recur::chunk::*;
use crate::engine::recur::{Decay, Read, Rule};
use crate::simd::Simd;
use crate::simd::mem::Rows;
use crate::simd::tile::Update;

impl Prepare<'_, '_> {
    /// Without decay, or with the same for all channels: products first,
    /// decays afterwards.
    #[inline(always)]
    pub(in crate::engine::recur) fn by_token<S: Simd>(&mut self, s: S) {
        let (g, len, spec) = (self.g, self.at.tokens.len(), self.spec);
        self.columns(s, 0, len, 0);
        let sums = if g.decay == Decay::Scalar { sums(&self.work.decay[..len]) } else { [0.0; COLUMNS + 1] };
        let total = sums[len];
        // Reads of the query see its own token or not; a token's correction
        // depends on the state that it finds, decayed by the delta rule.
        let read = usize::from(spec.read == Read::After);
        if self.read {
            self.score(s, false, &sums, read, 0);
        }
        match g.rule {
            Rule::Add => {}
            Rule::Delta => self.score(s, true, &sums, 1, 0),
            Rule::LowRank => {
                if self.read {
                    self.score(s, false, &sums, read, g.chunk);
                }
                self.score(s, true, &sums, 0, 0);
                self.score(s, true, &sums, 0, g.chunk);
            }
        }
        if self.read && spec.read == Read::Before {
            for t in 0..len {
                self.to.scores[t * g.columns + t] = self.own_score(s, t);
            }
        }
        // Queries and corrections from the chunk's start, keys to its end.
        let mut factors = [0f32; COLUMNS];
        for t in 0..len {
            factors[t] = sums[t + read] as f32;
        }
        decays(s, &mut factors);
        let Prepared { reads, probes, keys, decay, .. } = &mut self.to;
        for t in 0..if self.read { len } else { 0 } {
            let from = &self.work.q[t * g.stride..][..g.stride];
            scale_row(s, from, factors[t] * spec.scale as f32, &mut reads[t * g.stride..][..g.stride]);
        }
        if g.rule != Rule::Add {
            let delta = g.rule == Rule::Delta;
            for t in 0..len {
                factors[t] = sums[t + usize::from(delta)] as f32;
            }
            decays(s, &mut factors);
            for t in 0..len {
                let from = if delta { &self.work.k } else { &self.work.a };
                let from = &from[t * g.stride..][..g.stride];
                let sign = if delta { -self.work.beta[t] } else { 1.0 };
                scale_row(s, from, factors[t] * sign, &mut probes[t * g.stride..][..g.stride]);
            }
        }
        decay.fill(total as f32);
        decays(s, decay);
        if g.decay == Decay::None {
            return;
        }
        let mut factors = [0f32; COLUMNS];
        for t in 0..len {
            factors[t] = (total - sums[t + 1]) as f32;
        }
        decays(s, &mut factors);
        let bases = if g.rule == Rule::LowRank { 0..=1 } else { 0..=0 };
        for row in keys.chunks_exact_mut(g.columns) {
            for base in bases.clone() {
                let row = &mut row[base * g.chunk..];
                for (row, factors) in row
                    .chunks_exact_mut(S::LANES)
                    .zip(factors.chunks_exact(S::LANES))
                    .take(len.div_ceil(S::LANES))
                {
                    s.store(row, s.mul(s.load(row), s.load(factors)));
                }
            }
        }
    }

    /// Scores of queries (or of what corrections depend on, if `solve`) with
    /// the keys whose columns start at `base`, decayed; 0 for later tokens.
    /// With `own` 1 the decay of the row's token counts, and its own key for
    /// queries.
    #[inline(always)]
    pub(in crate::engine::recur) fn score<S: Simd>(
        &mut self,
        s: S,
        solve: bool,
        sums: &[f64],
        own: usize,
        base: usize,
    ) {
        let (g, len) = (self.g, self.at.tokens.len());
        let Work { q, k, a, beta, .. } = &mut *self.work;
        let left = match (solve, g.rule) {
            (false, _) => &**q,
            (true, Rule::LowRank) => &**a,
            (true, _) => &**k,
        };
        let out = if solve { &mut *self.to.coefficients } else { &mut *self.to.scores };
        let spec = self.spec;
        for first in (0..len).step_by(BLOCK) {
            let end = (first + BLOCK).min(len);
            let cols = if solve { end } else { spec.seen(end - 1) }.next_multiple_of(S::LANES);
            product(
                s,
                Rows::of_slice(&left[first * g.stride..], end - first, g.rows, g.stride),
                (&self.to.keys[base.min(g.rows * g.columns)..], g.columns),
                cols,
                (&mut out[first * g.columns + base..], g.columns),
                Update::Set,
                self.ahead,
            );
            for i in first..end {
                // A correction never depends on itself.
                let seen = if solve || own == 0 { i } else { spec.seen(i) };
                let factor = match (solve, g.rule) {
                    (false, _) => spec.scale as f32,
                    (true, Rule::Delta) => -beta[i],
                    (true, _) => 1.0,
                };
                let row = &mut out[i * g.columns + base..][..cols];
                row[seen..].fill(0.0);
                decay_scores(s, row, (g.decay == Decay::Scalar).then_some((sums, i + own)), seen, factor);
            }
        }
    }

    /// What a query that reads before the update sees of its own token.
    #[inline(always)]
    pub(in crate::engine::recur) fn own_score<S: Simd>(&self, s: S, t: usize) -> f32 {
        let g = self.g;
        let (q, k) = (&self.work.q[t * g.stride..][..g.rows], &self.work.k[t * g.stride..][..g.rows]);
        self.spec.scale as f32 * dot(s, q, k, Some(self.source.bonus(self.at.head)))
    }
}
