//! Token by token: decoding, and whatever chunks are not for.
//!
//! The additive rule reads and changes the state in one pass. Corrections have
//! to read all of it first; the second pass finds it in the cache. Meanwhile
//! the next state is prefetched, so that a step costs what moving the
//! states costs.

use crate::engine::recur::chunk::{Geometry, Work, decay_of, dot, skip_at};
use crate::engine::recur::{Decay, Read, Rule, Spec};
use crate::simd::mem::{Ahead, LINE};
use crate::simd::tile::{drop_rest, negligible};
use crate::simd::{Kernel, Simd};

/// Some tokens of one head, loaded, on some columns of its state.
pub(crate) struct Walk<'a, 'b> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) g: Geometry,
    pub(crate) work: &'a mut Work<'b>,
    pub(crate) bonus: &'a [f32],
    /// As [`Source::skip`](crate::engine::recur::Source::skip) has it.
    pub(crate) skip: &'a [f32],
    pub(crate) len: usize,
    /// Rows `stride` apart.
    pub(crate) state: &'a mut [f32],
    pub(crate) stride: usize,
    /// The first of the columns among all of them, and how many.
    pub(crate) first: usize,
    pub(crate) cols: usize,
    /// What is read after these tokens.
    pub(crate) ahead: &'a mut Ahead,
}

/// Writes outputs to `work.out`, in the columns that it is given.
impl Kernel for Walk<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        if self.spec.joined {
            return self.joined(s);
        }
        for t in 0..self.len {
            self.decays(s, t);
            let mut col = 0;
            while col < self.cols {
                let left = self.cols - col;
                col += match left / S::LANES {
                    0 => self.columns::<S, 1, true>(s, t, col),
                    1..4 => self.columns::<S, 1, false>(s, t, col),
                    4..8 => self.columns::<S, 4, false>(s, t, col),
                    _ => self.columns::<S, 8, false>(s, t, col),
                };
            }
        }
    }
}

/// What a token's row weighs each row of the state with.
#[derive(Clone, Copy)]
struct Row<'a> {
    q: &'a [f32],
    k: &'a [f32],
    a: &'a [f32],
    b: &'a [f32],
    decay: &'a [f32],
}

impl Walk<'_, '_> {
    /// Tokens of several steps, whose queries read the state that has them all.
    #[inline(always)]
    fn joined<S: Simd>(&mut self, s: S) {
        for t in (0..self.len).step_by(self.spec.steps) {
            self.decays(s, t);
            let mut col = 0;
            while col < self.cols {
                col += match (self.cols - col) / S::LANES {
                    0 => self.steps::<S, 1, true>(s, t, col),
                    1 => self.steps::<S, 1, false>(s, t, col),
                    _ => self.steps::<S, 2, false>(s, t, col),
                };
            }
        }
    }

    /// [`columns`](Self::columns) of the token whose steps start at `t`, four at once.
    #[inline(always)]
    fn steps<S: Simd, const NV: usize, const TAIL: bool>(&mut self, s: S, t: usize, col: usize) -> usize {
        let end = t + self.spec.steps;
        let width = if TAIL { self.cols - col } else { NV * S::LANES };
        // Each pass over the columns prefetches its share of what follows.
        let passes = 2 * self.spec.steps.div_ceil(4);
        let lines = if end == self.len { (width * size_of::<f32>()).div_ceil(passes * LINE) } else { 0 };
        for writes in [false, true] {
            for first in (t..end).step_by(4) {
                let steps = first..(first + 4).min(end);
                match steps.len() {
                    1 => self.some::<S, NV, TAIL, 1>(s, (t, first), col, writes, lines),
                    2 => self.some::<S, NV, TAIL, 2>(s, (t, first), col, writes, lines),
                    3 => self.some::<S, NV, TAIL, 3>(s, (t, first), col, writes, lines),
                    _ => self.some::<S, NV, TAIL, 4>(s, (t, first), col, writes, lines),
                }
            }
        }
        width
    }

    /// What `N` steps from `first` on read of the state as it decays, and of all steps of
    /// their token from `t` on; or what they write.
    #[inline(always)]
    fn some<S: Simd, const NV: usize, const TAIL: bool, const N: usize>(
        &mut self,
        s: S,
        (t, first): (usize, usize),
        col: usize,
        writes: bool,
        lines: usize,
    ) {
        let (g, spec) = (self.g, self.spec);
        let width = if TAIL { self.cols - col } else { NV * S::LANES };
        let Work { q, k, v, coming, out, own, .. } = &mut *self.work;
        let load = |x: &[f32], v: usize| {
            if TAIL { s.load_tail(&x[..width]) } else { s.load(&x[v * S::LANES..]) }
        };
        let state = &mut self.state[col.min(g.rows * self.stride)..];
        let at = |step: usize| step * g.width + self.first + col;
        let row = |x: &[f32], step: usize, d: usize| s.splat(x[step * g.stride + d]);
        let zero = [[s.splat(0.0); NV]; N];
        if writes {
            let mut written = zero;
            for (n, written) in written.iter_mut().enumerate() {
                for c in 0..NV {
                    written[c] = load(&v[at(first + n)..], c);
                }
            }
            for d in 0..g.rows {
                self.ahead.prefetch(lines);
                let decay = if first == t { coming[d] } else { 1.0 };
                let limit = s.splat(negligible(decay, false));
                let line = &mut state[d * self.stride..];
                for c in 0..NV {
                    let old = load(line, c);
                    let mut sum = s.mul(old, s.splat(decay));
                    for (n, written) in written.iter().enumerate() {
                        sum = s.mul_add(row(k, first + n, d), written[c], sum);
                    }
                    let sum = drop_rest(s, sum, old, limit);
                    if TAIL {
                        s.store_tail(&mut line[..width], sum)
                    } else {
                        s.store(&mut line[c * S::LANES..], sum)
                    }
                }
            }
            return;
        }
        let mut read = zero;
        for d in 0..g.rows {
            self.ahead.prefetch(lines);
            let (decay, line) = (s.splat(coming[d]), &state[d * self.stride..]);
            for c in 0..NV {
                let line = s.mul(load(line, c), decay);
                for (n, read) in read.iter_mut().enumerate() {
                    read[c] = s.mul_add(row(q, first + n, d), line, read[c]);
                }
            }
        }
        let of = |step: usize| step * g.stride..step * g.stride + g.rows;
        for (n, read) in read.iter_mut().enumerate() {
            let step = first + n;
            // A query of no elements reads nothing, not even of a value that is NaN.
            for other in if g.rows == 0 { t..t } else { t..t + spec.steps } {
                let weight = own[other] * dot(s, &q[of(step)], &k[of(other)], None);
                for c in 0..NV {
                    read[c] = s.mul_add(s.splat(weight), load(&v[at(other)..], c), read[c]);
                }
            }
            for c in 0..NV {
                let mut o = s.mul(read[c], s.splat(spec.scale as f32));
                if !self.skip.is_empty() {
                    let skip = skip_at(s, self.skip, self.first + col + c * S::LANES);
                    o = s.mul_add(skip, load(&v[at(step)..], c), o);
                }
                let to = &mut out[at(step) + c * S::LANES..];
                if TAIL { s.store_tail(&mut to[..width], o) } else { s.store(to, o) }
            }
        }
    }

    /// The token's log decays become factors, one a channel, in its own place.
    #[inline(always)]
    fn decays<S: Simd>(&mut self, s: S, t: usize) {
        let g = &self.g;
        match self.spec.decay {
            Decay::None => self.work.coming.fill(1.0),
            Decay::Scalar => {
                let factor = decay_of(s, s.splat(self.work.decay[t]));
                for x in self.work.coming.chunks_exact_mut(S::LANES) {
                    s.store(x, factor);
                }
            }
            Decay::Channel => {
                let from = &self.work.decay[t * g.stride..][..g.stride];
                for (x, from) in self.work.coming.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES))
                {
                    s.store(x, decay_of(s, s.load(from)));
                }
            }
        }
    }

    /// `NV` vectors of columns from `col` on, or a part of one if `TAIL`;
    /// returns how many columns.
    #[inline(always)]
    fn columns<S: Simd, const NV: usize, const TAIL: bool>(&mut self, s: S, t: usize, col: usize) -> usize {
        let (g, spec) = (self.g, self.spec);
        let width = if TAIL { self.cols - col } else { NV * S::LANES };
        let row = t * g.stride..t * g.stride + g.rows;
        let low_rank = if spec.rule == Rule::LowRank { row.clone() } else { 0..0 };
        let Work { q, k, a, b, v, coming, out, beta, own, .. } = &mut *self.work;
        let x = Row {
            q: &q[row.clone()],
            k: &k[row],
            a: &a[low_rank.clone()],
            b: &b[low_rank],
            decay: &coming[..g.rows],
        };
        let load = |x: &[f32], v: usize| {
            if TAIL { s.load_tail(&x[..width]) } else { s.load(&x[v * S::LANES..]) }
        };
        // What follows is as large, and each pass over the columns prefetches its
        // share of it, row by row.
        let passes = if spec.rule == Rule::Add { 1 } else { 2 };
        let last = t + 1 == self.len;
        let lines = if last { (width * size_of::<f32>()).div_ceil(passes * LINE) } else { 0 };
        // What corrections and what queries read.
        let mut seen = [s.splat(0.0); NV];
        let mut read = [s.splat(0.0); NV];
        // What is written under the key.
        let at = t * g.width + self.first + col;
        let mut written = [s.splat(0.0); NV];
        for c in 0..NV {
            written[c] = load(&v[at..], c);
        }
        // A state without rows has no columns either.
        let state = &mut self.state[col.min(g.rows * self.stride)..];
        if spec.rule != Rule::Add {
            for d in 0..g.rows {
                self.ahead.prefetch(lines);
                let line = &state[d * self.stride..];
                let decayed = if spec.read == Read::Before { x.q[d] } else { x.q[d] * x.decay[d] };
                let correction = if spec.rule == Rule::Delta { x.k[d] * x.decay[d] } else { x.a[d] };
                for v in 0..NV {
                    let line = load(line, v);
                    read[v] = s.mul_add(s.splat(decayed), line, read[v]);
                    seen[v] = s.mul_add(s.splat(correction), line, seen[v]);
                }
            }
        }
        if spec.rule == Rule::Delta {
            for c in 0..NV {
                written[c] = s.mul(s.splat(beta[t]), s.sub(written[c], seen[c]));
            }
        }
        let corrects = spec.rule != Rule::Add;
        for d in 0..g.rows {
            self.ahead.prefetch(lines);
            let limit = s.splat(negligible(x.decay[d], corrects));
            let line = &mut state[d * self.stride..];
            for v in 0..NV {
                let old = load(line, v);
                let mut sum = s.mul(old, s.splat(x.decay[d]));
                if spec.rule == Rule::Add {
                    let line = if spec.read == Read::Before { old } else { sum };
                    read[v] = s.mul_add(s.splat(x.q[d]), line, read[v]);
                }
                sum = s.mul_add(s.splat(x.k[d]), written[v], sum);
                if spec.rule == Rule::LowRank {
                    sum = s.mul_add(s.splat(x.b[d]), seen[v], sum);
                }
                let sum = drop_rest(s, sum, old, limit);
                if TAIL {
                    s.store_tail(&mut line[..width], sum)
                } else {
                    s.store(&mut line[v * S::LANES..], sum)
                }
            }
        }
        let own = match spec.read {
            Read::Before => dot(s, x.q, x.k, Some(self.bonus)),
            Read::After => own[t] * dot(s, x.q, x.k, None),
            Read::Total => dot(s, x.q, x.k, None),
        };
        let corrected = if spec.rule == Rule::LowRank { dot(s, x.q, x.b, None) } else { 0.0 };
        for c in 0..NV {
            // A query of no elements reads nothing, not even of a value that is NaN.
            let nothing = g.rows == 0 && spec.read != Read::Before;
            let mut o = if nothing { read[c] } else { s.mul_add(s.splat(own), written[c], read[c]) };
            if spec.rule == Rule::LowRank {
                o = s.mul_add(s.splat(corrected), seen[c], o);
            }
            let mut o = s.mul(o, s.splat(spec.scale as f32));
            if !self.skip.is_empty() {
                let skip = skip_at(s, self.skip, self.first + col + c * S::LANES);
                o = s.mul_add(skip, written[c], o);
            }
            let to = &mut out[at + c * S::LANES..];
            if TAIL { s.store_tail(&mut to[..width], o) } else { s.store(to, o) }
        }
        width
    }
}
