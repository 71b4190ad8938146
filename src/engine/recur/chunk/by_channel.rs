//! Scores of a chunk whose channels decay at rates of their own.

use crate::engine::recur::chunk::*;
use crate::engine::recur::{Read, Rule};
use crate::simd::mem::Rows;
use crate::simd::pack::PackColumns;
use crate::simd::tile::{self, Update, flush};
use crate::simd::{MAX_LANES, Simd};

impl Prepare<'_, '_> {
    /// With decays of their own for channels: sub-block by sub-block, or the
    /// chunk as one if its decays are within reach. Rows of queries are decayed
    /// from the start of their sub-block; columns of earlier keys have come
    /// along to there; keys of the sub-block itself are divided by their decays
    /// from there, and so are within reach of the same product. Channels that
    /// this would overflow are multiplied up pair by pair instead.
    #[inline(always)]
    pub(in crate::engine::recur) fn by_channel<S: Simd>(&mut self, s: S, whole: bool) {
        let (g, len, spec) = (self.g, self.at.tokens.len(), self.spec);
        self.to.decay.fill(1.0);
        let bases = [0, g.chunk];
        let bases = &bases[..if g.rule == Rule::LowRank { 2 } else { 1 }];
        let sides = [false, true];
        let sides = &sides[usize::from(!self.read)..if g.rule == Rule::Add { 1 } else { 2 }];
        let sub = if whole { g.chunk } else { SUB };
        for first in (0..len).step_by(sub) {
            let end = (first + sub).min(len);
            let own = self.own_scores(s, first, end);
            let strong = self.decay_rows(s, first, end, whole);
            self.columns(s, first, end, first);
            if strong {
                self.strong_columns(s, first, end, false);
            }
            for &solve in sides {
                let Prepared { reads, probes, scores, coefficients, keys, .. } = &mut self.to;
                let (left, out) =
                    if solve { (&**probes, &mut **coefficients) } else { (&**reads, &mut **scores) };
                for &base in bases {
                    product(
                        s,
                        Rows::of_slice(&left[first * g.stride..], end - first, g.rows, g.stride),
                        (&keys[base.min(g.rows * g.columns)..], g.columns),
                        end.next_multiple_of(S::LANES),
                        (&mut out[first * g.columns + base..], g.columns),
                        Update::Set,
                        self.ahead,
                    );
                }
            }
            if strong {
                for &solve in sides {
                    for &base in bases {
                        self.pairs(s, solve, first, end, base);
                    }
                }
            }
            // Later tokens are not seen; a correction never depends on itself.
            for &solve in sides {
                let out = if solve { &mut *self.to.coefficients } else { &mut *self.to.scores };
                let seen = usize::from(!solve && spec.read == Read::After);
                for t in first..end {
                    for &base in bases {
                        out[t * g.columns + base..][t + seen..g.chunk].fill(0.0);
                    }
                }
            }
            if self.read && spec.read == Read::Before {
                for t in first..end {
                    self.to.scores[t * g.columns + t] = own[t - first];
                }
            }
            // Keys come along to the sub-block's end.
            let Prepared { reads, probes, keys, decay, .. } = &mut self.to;
            let last = &*self.work.last;
            for (row, &left) in keys.chunks_exact_mut(g.columns).zip(last) {
                for &base in bases {
                    for x in row[base..][..end.next_multiple_of(S::LANES)].chunks_exact_mut(S::LANES) {
                        s.store(x, tile::decay(s, s.load(x), s.splat(left)));
                    }
                }
            }
            // Rows, from the chunk's start.
            if first > 0 {
                for t in first..end {
                    let row = t * g.stride..(t + 1) * g.stride;
                    if self.read {
                        multiply_in_place(s, &mut reads[row.clone()], decay);
                    }
                    if g.rule != Rule::Add {
                        multiply_in_place(s, &mut probes[row], decay);
                    }
                }
            }
            multiply_in_place(s, decay, last);
            if strong {
                self.strong_columns(s, first, end, true);
            }
        }
    }

    /// What queries that read before the update see of the tokens of a
    /// sub-block themselves.
    #[inline(always)]
    pub(in crate::engine::recur) fn own_scores<S: Simd>(
        &self,
        s: S,
        first: usize,
        end: usize,
    ) -> [f32; COLUMNS] {
        let mut own = [0.0; COLUMNS];
        if self.read && self.spec.read == Read::Before {
            for t in first..end {
                own[t - first] = self.own_score(s, t);
            }
        }
        own
    }

    /// Decays the rows of a sub-block from its start, and divides its keys by
    /// the same decays: all of them if it is known that they `fit`. Returns
    /// whether there are strong channels, of which the keys stay as they are.
    #[inline(always)]
    pub(in crate::engine::recur) fn decay_rows<S: Simd>(
        &mut self,
        s: S,
        first: usize,
        end: usize,
        fit: bool,
    ) -> bool {
        let (g, spec) = (self.g, self.spec);
        let mut any = false;
        for (group, col) in (0..g.stride).step_by(S::LANES).enumerate() {
            let strong = !fit && !self.fits(s, first..end, col);
            any |= strong;
            self.work.strong[group] = if strong { 1.0 } else { 0.0 };
            let Prepared { reads, probes, .. } = &mut self.to;
            let Work { q, k, a, b, beta, decay, each, until, last, .. } = &mut *self.work;
            let scale = s.splat(spec.scale as f32);
            let mut past = s.splat(1.0);
            for t in first..end {
                let at = t * g.stride + col;
                let before = past;
                let left = decay_of(s, s.load(&decay[at..]));
                past = s.mul(past, left);
                if strong {
                    past = flush(s, past);
                    s.store(&mut each[at - first * g.stride..], left);
                }
                if self.read {
                    let of_query = if spec.read == Read::After { past } else { before };
                    s.store(&mut reads[at..], s.mul(s.mul(s.load(&q[at..]), scale), of_query));
                }
                match g.rule {
                    Rule::Add => {}
                    Rule::Delta => {
                        let key = s.mul(s.load(&k[at..]), s.splat(-beta[t]));
                        s.store(&mut probes[at..], s.mul(key, past));
                    }
                    Rule::LowRank => s.store(&mut probes[at..], s.mul(s.load(&a[at..]), before)),
                }
                if !strong {
                    let key = s.div(s.load(&k[at..]), past);
                    s.store(&mut k[at..], key);
                    if g.rule == Rule::LowRank {
                        let key = s.div(s.load(&b[at..]), past);
                        s.store(&mut b[at..], key);
                    }
                }
            }
            s.store(&mut last[col..], past);
            if strong {
                let mut left = s.splat(1.0);
                for t in (first..end).rev() {
                    let at = (t - first) * g.stride + col;
                    s.store(&mut until[at..], left);
                    left = flush(s, s.mul(left, s.load(&each[at..])));
                }
            }
        }
        any
    }

    /// Columns of the keys of strong channels: decayed to the end of their
    /// sub-block, or 0 before that.
    #[inline(always)]
    pub(in crate::engine::recur) fn strong_columns<S: Simd>(
        &mut self,
        s: S,
        first: usize,
        end: usize,
        decayed: bool,
    ) {
        let g = self.g;
        let Work { k, b, until, strong, .. } = &mut *self.work;
        let low_rank = (g.rule == Rule::LowRank).then_some((&mut **b, g.chunk));
        for (rows, base) in std::iter::once((&mut **k, 0)).chain(low_rank) {
            for col in (0..g.rows).step_by(S::LANES).filter(|col| strong[col / S::LANES] != 0.0) {
                let width = (g.rows - col).min(S::LANES);
                let to = &mut self.to.keys[col * g.columns + base + first..];
                if decayed {
                    for t in first..end {
                        let row = &mut rows[t * g.stride + col..][..S::LANES];
                        multiply_in_place(s, row, &until[(t - first) * g.stride + col..][..S::LANES]);
                    }
                    let from = &rows[first * g.stride + col..];
                    let from = Rows::of_slice(from, end - first, width, g.stride);
                    s.vectorize(PackColumns { from, to, stride: g.columns });
                } else {
                    for row in to.chunks_mut(g.columns).take(width) {
                        row[..(end - first).next_multiple_of(S::LANES)].fill(0.0);
                    }
                }
            }
        }
    }

    /// Adds to the scores of the pairs within a sub-block what strong channels
    /// give, whose keys are multiplied by the decays of one token after the
    /// other.
    #[inline(always)]
    pub(in crate::engine::recur) fn pairs<S: Simd>(
        &mut self,
        s: S,
        solve: bool,
        first: usize,
        end: usize,
        base: usize,
    ) {
        let (g, n) = (self.g, end - first);
        let Work { q, k, a, b, beta, each, strong, .. } = &mut *self.work;
        let left = match (solve, g.rule) {
            (false, _) => &**q,
            (true, Rule::LowRank) => &**a,
            (true, _) => &**k,
        };
        // Whether the decay of the row's own token counts.
        let own = if solve { g.rule == Rule::Delta } else { self.spec.read == Read::After };
        let rights = if base > 0 { &**b } else { &**k };
        let out = if solve { &mut *self.to.coefficients } else { &mut *self.to.scores };
        let rows = first * g.stride..end * g.stride;
        let x = Pairs { left: &left[rows.clone()], rights: &rights[rows], each, strong, stride: g.stride };
        for j in 0..n {
            let sums = if own { x.sums::<S, true>(s, j, n) } else { x.sums::<S, false>(s, j, n) };
            let mut column = [0f32; MAX_LANES];
            for part in (0..MAX_LANES).step_by(S::LANES) {
                let mut block = [s.splat(0.0); MAX_LANES];
                block[..S::LANES].copy_from_slice(&sums[part..part + S::LANES]);
                s.store(&mut column[part..], s.reduce_add_each(&block));
            }
            for i in j..n {
                let factor = match (solve, g.rule) {
                    (false, _) => self.spec.scale as f32,
                    (true, Rule::Delta) => -beta[first + i],
                    (true, _) => 1.0,
                };
                out[(first + i) * g.columns + base + first + j] += factor * column[i];
            }
        }
    }
}

/// Pairs of the tokens of a sub-block in strong channels.
pub(in crate::engine::recur) struct Pairs<'a> {
    pub(in crate::engine::recur) left: &'a [f32],
    pub(in crate::engine::recur) rights: &'a [f32],
    pub(in crate::engine::recur) each: &'a [f32],
    pub(in crate::engine::recur) strong: &'a [f32],
    pub(in crate::engine::recur) stride: usize,
}

impl Pairs<'_> {
    /// For key `j` and each row from it on, the sum of the products of their
    /// elements and of the decays between them, lane by lane. With `OWN` the
    /// decay of the row's token counts.
    #[inline(always)]
    fn sums<S: Simd, const OWN: bool>(&self, s: S, j: usize, n: usize) -> [S::F; MAX_LANES] {
        let mut sums = [s.splat(0.0); MAX_LANES];
        for col in (0..self.stride).step_by(S::LANES) {
            if self.strong[col / S::LANES] == 0.0 {
                continue;
            }
            let mut key = s.load(&self.rights[j * self.stride + col..]);
            for i in j..n {
                let at = i * self.stride + col;
                let mut decayed = key;
                if i > j {
                    decayed = tile::decay(s, key, s.load(&self.each[at..]));
                }
                let seen = if OWN { decayed } else { key };
                sums[i] = s.mul_add(seen, s.load(&self.left[at..]), sums[i]);
                key = decayed;
            }
        }
        sums
    }
}
