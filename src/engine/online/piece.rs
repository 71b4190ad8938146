//! A head of a sequence, piece by piece.

use std::ops::Range;

use super::layer::{Layer, Room, Shares, times, turned};
use super::learn::{
    activate, descend, divide, dots, gelu, multiply, normalise, residual, residual_back, soften,
};
use super::{Geometry, Online, Retention, Work, apart, pad};
use crate::engine::recur::{Place, copy_tokens};
use crate::input::Sequence;
use crate::simd::any::{AnyArray, AnyRows, AnyRowsMut};
use crate::simd::mem::{Ahead, STREAMS, Stream};
use crate::simd::tile::Update;
use crate::simd::{Kernel, Simd};

/// All tokens of a head of a sequence.
pub(super) struct Head<'a, 'b, 'c> {
    pub(super) x: &'a Online<'c>,
    pub(super) g: Geometry,
    pub(super) sequence: Sequence,
    pub(super) head: usize,
    pub(super) state: Option<&'a mut [f32]>,
    pub(super) out: &'a mut AnyRowsMut<'b>,
    pub(super) work: &'a mut Work<'b>,
    /// What is prefetched during the products of a piece.
    pub(super) ahead: Ahead,
}

/// Where a head is.
struct At {
    /// Tokens of the chunk so far.
    past: usize,
    /// What queries divide by.
    whole: [f32; 2],
}

impl Kernel for Head<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (x, g) = (self.x, self.g);
        match &self.state {
            Some(state) => self.work.unit.copy_from_slice(state),
            None => x.start(self.head, self.work.unit),
        }
        let mut at = self.load();
        let tokens = self.sequence.queries.clone();
        let mut t = tokens.start;
        while t < tokens.end {
            let alone = at.past == 0 && x.rules.retention == Retention::Softmax;
            let most = if alone { 1 } else { g.piece.min(x.rules.chunk - at.past) };
            let piece = t..(t + most).min(tokens.end);
            self.ahead = self.ahead(&piece, tokens.end);
            if !self.piece(s, &mut at, piece.clone()) {
                // What a later token is not must not reach an earlier one.
                for t in piece.clone() {
                    self.piece(s, &mut at, t..t + 1);
                }
            }
            t = piece.end;
        }
        self.store(&at);
    }
}

/// The rows of a place in an array that may have fewer heads.
fn rows<'a>(x: AnyArray<'a>, at: &Place, heads: usize) -> AnyRows<'a> {
    x.rows(at.batch, at.head_of(x.heads(), heads), &at.tokens)
}

/// Whether all of these numbers are finite.
#[inline(always)]
fn finite<S: Simd>(s: S, x: &[f32]) -> bool {
    let mut zero = s.splat(0.0);
    for x in x.chunks_exact(S::LANES) {
        zero = s.mul_add(s.load(x), s.splat(0.0), zero);
    }
    s.reduce_add(zero) == 0.0
}

impl Head<'_, '_, '_> {
    /// Where the outputs of a piece go, and what the next one reads.
    fn ahead(&self, piece: &Range<usize>, end: usize) -> Ahead {
        let first = self.sequence.queries.start;
        let next = piece.end..(piece.end + piece.len()).min(end);
        let at = Place::new(&self.sequence, self.head, next);
        let [q, k, v] = [self.x.q, self.x.k, self.x.v].map(|x| rows(x, &at, self.x.dims.q_heads).stream());
        let mut streams = [Stream::NONE; STREAMS];
        streams[..4].copy_from_slice(&[self.out.stream(piece.start - first..piece.end - first), q, k, v]);
        Ahead::new(streams)
    }

    /// The state of this head, in rows of whole vectors.
    #[inline(always)]
    fn load(&mut self) -> At {
        let (g, Work { unit, weights, reference, momentum, gamma, .. }) = (self.g, &mut *self.work);
        for x in [&mut *weights, &mut *reference, &mut *momentum] {
            x.fill(0.0);
        }
        for (part, to) in [weights, reference, momentum].into_iter().enumerate().take(g.parts) {
            for layer in 0..g.layers {
                let from = &unit[part * g.row() + g.first(layer)..];
                let to = &mut to[g.lies(layer)..];
                for row in 0..g.n[layer] {
                    let m = g.m[layer];
                    to[row * apart(m)..][..m].copy_from_slice(&from[row * m..][..m]);
                }
            }
        }
        if let Some(rows) = &self.x.memory.gamma {
            gamma.iter_mut().zip(rows.row(self.head)).for_each(|(to, &x)| *to = x);
        }
        let rest = &unit[g.weights..g.row()];
        At { past: rest[0] as usize, whole: [rest[1], rest.get(2).copied().unwrap_or(1.0)] }
    }

    /// The state, back where it came from.
    #[inline(always)]
    fn store(&mut self, at: &At) {
        let (g, Work { weights, reference, momentum, .. }) = (self.g, &mut *self.work);
        let Some(unit) = &mut self.state else { return };
        // Where a chunk begins its weights are those that there are.
        let fresh = at.past == 0 && self.x.rules.retention == Retention::Linear;
        let reference = if fresh { &*weights } else { &*reference };
        for (part, from) in [&**weights, reference, momentum].into_iter().enumerate().take(g.parts) {
            for layer in 0..g.layers {
                let from = &from[g.lies(layer)..];
                let to = &mut unit[part * g.row() + g.first(layer)..];
                for row in 0..g.n[layer] {
                    let m = g.m[layer];
                    to[row * m..][..m].copy_from_slice(&from[row * apart(m)..][..m]);
                }
            }
        }
        let rest = &mut unit[g.weights..g.row()];
        rest[0] = at.past as f32;
        rest[1..].copy_from_slice(&at.whole[..g.layers]);
    }

    /// Some tokens of one chunk; false, and nothing done, where these are several and
    /// some are not finite.
    #[inline(always)]
    fn piece<S: Simd>(&mut self, s: S, at: &mut At, tokens: Range<usize>) -> bool {
        let (x, len) = (self.x, tokens.len());
        let linear = x.rules.retention == Retention::Linear;
        let ends = at.past + len == x.rules.chunk;
        // Of weights that have not been written to since no copy is needed.
        let fresh = linear && at.past == 0;
        self.fetch(s, tokens.clone());
        if !self.learn(s, len, fresh) {
            return false;
        }
        if fresh && !ends {
            let Work { weights, reference, .. } = &mut *self.work;
            reference.copy_from_slice(weights);
        }
        let carried = self.share(s, len);
        self.pass(s, len, carried);
        let softens = x.rules.retention == Retention::Softmax && (ends || at.past == 0);
        at.past = if ends { 0 } else { at.past + len };
        self.retain(s, at, len, ends || softens);
        self.finish(s, len, tokens);
        true
    }

    /// Loads the rows of some tokens, and what belongs to them.
    #[inline(always)]
    fn fetch<S: Simd>(&mut self, s: S, tokens: Range<usize>) {
        let (x, g, len) = (self.x, self.g, tokens.len());
        let Work { q, k, v, step, keep, carry, threshold, .. } = &mut *self.work;
        let heads = x.dims.q_heads;
        let place = Place::new(&self.sequence, self.head, tokens);
        let [d, w] = [g.n[0], g.m[g.layers - 1]].map(pad);
        rows(x.q, &place, heads).pack_rows(s, q, d);
        rows(x.k, &place, heads).pack_rows(s, k, d);
        rows(x.v, &place, heads).pack_rows(s, v, w);
        if let Some(prepare) = x.prepare {
            [q, k].into_iter().for_each(|rows| prepare(x.rules.isa, rows, len, g.n[0], d));
        }
        copy_tokens(&x.step, heads, &place, step);
        copy_tokens(&x.keep, heads, &place, keep);
        if x.forgets {
            keep[..len].iter_mut().for_each(|x| *x = 1.0 - *x);
        }
        for (from, to) in [(&x.momentum, carry), (&x.threshold, threshold)] {
            if let Some(from) = from {
                copy_tokens(from, heads, &place, to);
            }
        }
    }

    /// Descents of the outputs of both layers in `found` and `inner`, for the weights of
    /// the chunk's start; false where several tokens are not finite.
    #[inline(always)]
    fn learn<S: Simd>(&mut self, s: S, len: usize, fresh: bool) -> bool {
        let (x, g) = (self.x, self.g);
        let Work {
            weights,
            reference,
            back,
            k,
            v,
            found,
            normed,
            gamma,
            slopes,
            active,
            inner,
            threshold,
            ..
        } = &mut *self.work;
        let ahead = &mut self.ahead;
        let reference = if fresh { &**weights } else { &**reference };
        let (d, channels) = (pad(g.n[0]), g.m[g.layers - 1]);
        let w = pad(channels);
        let last = &reference[g.lies(g.layers - 1)..];
        if g.layers == 2 {
            let h = pad(g.n[1]);
            times(s, (k, len, d), (reference, g.n[0], apart(g.m[0])), (slopes, h), Update::Set, ahead);
            activate(s, &mut slopes[..len * h], active);
            times(s, (active, len, h), (last, g.n[1], apart(channels)), (found, w), Update::Set, ahead);
            if len > 1 {
                turned(s, (last, g.n[1], apart(channels)), g.m[1], h, back);
            }
        } else {
            times(s, (k, len, d), (last, g.n[0], apart(channels)), (found, w), Update::Set, ahead);
        }
        for t in 0..len {
            let at = t * w..(t + 1) * w;
            let (row, value) = (&mut found[at.clone()], &v[at.clone()]);
            if x.memory.gamma.is_some() {
                let normed = &mut normed[at];
                let inverse = residual(s, row, normed, [&k[t * d..][..d], gamma], channels);
                descend(s, x.rules.loss, channels, row, value, threshold[t]);
                residual_back(s, row, [normed, gamma], channels, inverse);
            } else {
                descend(s, x.rules.loss, channels, row, value, threshold[t]);
            }
        }
        if g.layers == 2 {
            let h = pad(g.n[1]);
            if len > 1 {
                times(s, (found, len, w), (back, g.m[1], h), (inner, h), Update::Set, ahead);
            } else {
                dots(s, (last, apart(channels)), &found[..w], &mut inner[..g.n[1]]);
            }
            multiply(s, &mut inner[..len * h], slopes);
            if len > 1 && !(finite(s, &active[..len * h]) && finite(s, &inner[..len * h])) {
                return false;
            }
        }
        len <= 1 || finite(s, &k[..len * d]) && finite(s, &found[..len * w])
    }

    /// What tokens leave, and find of each other; returns what they leave of the momentum.
    #[inline(always)]
    fn share<S: Simd>(&mut self, s: S, len: usize) -> f32 {
        let Work { shares, pushed, left, moved, step, keep, carry, .. } = &mut *self.work;
        let cols = pad(self.g.piece);
        let carries = self.x.momentum.is_some();
        let (mut kept, mut moving, mut carried) = (1.0, 0.0, 1.0);
        pushed.fill(0.0);
        for i in 0..len {
            let (before, row) = shares.split_at_mut(i * cols);
            let before = before.len().checked_sub(cols).map(|at| &before[at..]);
            kept *= keep[i];
            if carries {
                carried *= carry[i];
                moving = keep[i] * moving + carried;
                for x in pushed.chunks_exact_mut(S::LANES) {
                    s.store(x, s.mul(s.load(x), s.splat(carry[i])));
                }
                pushed[i] = step[i];
            }
            for (c, row) in row[..cols].chunks_exact_mut(S::LANES).enumerate() {
                let at = c * S::LANES;
                let mut share = s.splat(0.0);
                if let Some(before) = before {
                    share = s.mul(s.load(&before[at..]), s.splat(keep[i]));
                }
                s.store(row, if carries { s.add(share, s.load(&pushed[at..])) } else { share });
            }
            row[i] = step[i];
            (left[i], moved[i]) = (kept, moving);
        }
        carried
    }

    /// What queries read, in `out`, and what tokens write.
    #[inline(always)]
    fn pass<S: Simd>(&mut self, s: S, len: usize, carried: f32) {
        let (x, g) = (self.x, self.g);
        let work = &mut *self.work;
        let Work { weights, reference, momentum, q, k, found, out, gamma, normed, .. } = work;
        let (active, inner, read) = (&*work.active, &*work.inner, &mut *work.read);
        let [d, h, w] = [g.n[0], g.n[1], g.m[g.layers - 1]].map(pad);
        let of = Shares {
            len,
            columns: pad(g.piece),
            left: work.left,
            moved: work.moved,
            shares: work.shares,
            carried,
            pushed: work.pushed,
        };
        let held = match x.rules.retention {
            Retention::Linear => false,
            Retention::Norm { mirror, .. } => mirror,
            Retention::Softmax => true,
        };
        let mut room = Room {
            scaled: work.scaled,
            columns: work.columns,
            written: work.written,
            scores: work.scores,
            factors: work.factors,
            ahead: &mut self.ahead,
        };
        let (weights, second) = weights.split_at_mut(g.lies(1).min(weights.len()));
        let (momentum, second_momentum) = momentum.split_at_mut(g.lies(1).min(momentum.len()));
        let carries = x.momentum.is_some();
        let momentum = carries.then_some(momentum);
        let mut first = Layer { n: g.n[0], apart: apart(g.m[0]), stride: pad(g.m[0]), weights, momentum };
        let queries = (&**q, d);
        if g.layers == 2 {
            first.pass(s, &of, queries, (k, d), inner, None, &mut room, read);
            gelu(s, &mut read[..len * h]);
            let momentum = carries.then_some(second_momentum);
            let apart = apart(g.m[1]);
            let mut second = Layer { n: g.n[1], apart, stride: w, weights: second, momentum };
            second.pass(s, &of, (read, h), (active, h), found, None, &mut room, out);
        } else {
            let held = held.then_some(&**reference);
            first.pass(s, &of, queries, (k, d), found, held, &mut room, out);
        }
        if x.memory.gamma.is_some() {
            for t in 0..len {
                let (row, normed) = (&mut out[t * w..][..w], &mut normed[..w]);
                residual(s, row, normed, [&q[t * d..][..d], gamma], g.m[g.layers - 1]);
            }
        }
    }

    /// Weights at a chunk's end, which its last token reads.
    #[inline(always)]
    fn retain<S: Simd>(&mut self, s: S, at: &mut At, len: usize, changes: bool) {
        let g = self.g;
        let Work { weights, reference, q, out, .. } = &mut *self.work;
        let (d, w) = (pad(g.n[0]), pad(g.m[0]));
        let last = (len - 1) * w..len * w;
        match self.x.rules.retention {
            Retention::Linear => {}
            Retention::Norm { q, mirror: false } => {
                divide(s, &mut out[..last.start], at.whole[0]);
                if changes {
                    at.whole[0] = normalise(s, weights, q, false, reference);
                }
                divide(s, &mut out[last], at.whole[0]);
            }
            Retention::Norm { mirror: true, .. } | Retention::Softmax if !changes => {}
            other => {
                match other {
                    Retention::Norm { q, mirror } => {
                        at.whole[0] = normalise(s, weights, q, mirror, reference)
                    }
                    _ if w > 0 => soften(s, weights, reference, apart(g.m[0])),
                    _ => {}
                }
                let query = (&q[(len - 1) * d..], 1, d);
                let weights = (&**reference, g.n[0], apart(g.m[0]));
                times(s, query, weights, (&mut out[last], w), Update::Set, &mut self.ahead);
            }
        }
    }

    /// Writes the outputs of some tokens.
    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S, len: usize, tokens: Range<usize>) {
        let w = pad(self.g.m[self.g.layers - 1]);
        let first = tokens.start - self.sequence.queries.start;
        for t in 0..len {
            self.out.write(s, first + t, &self.work.out[t * w..][..w], 1.0);
        }
    }
}
