//! A recurrence whose past is cut up into segments like the sums of a Fenwick tree,
//! each with a state of its own, which queries read with weights of their own.
//!
//! Before token `i` there is a state for each bit of `i` that is set: that of bit `b` has the
//! `2^b` tokens before `i` without its lower bits. Token `i` and the states of the bits
//! that `i + 1` clears become that of the bit which it sets.
//!
//! Tokens go one by one up to a multiple of [`CHUNK`], and then in chunks: pairs within
//! a chunk weigh what the highest bit that differs says, and the states of lower bits are
//! never made. States decay by factors, which are multiplied into them when they merge.

use ndarray::{Array2, ArrayView3, ArrayViewMut4};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::{Form, Place, copy_rows, copy_tokens, decay_of, product};
use crate::input::{Dims, Lengths};
use crate::simd::any::{AnyArray, AnyRows, AnyRowsMut};
use crate::simd::mem::{Ahead, Arena, OutRows, Parts, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::{self, NEGLIGIBLE, Update};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::Pass;
use crate::stages::slots::left;

/// Tokens of a chunk, and the bits of their places in it.
const CHUNK: usize = 1 << BITS;
const BITS: usize = 6;

/// A log decay that leaves nothing, of which sums and differences are exact.
const NOTHING: f32 = -1024.0;

/// Queries, keys and values with log decays, and weights of levels.
#[derive(Clone, Copy)]
pub(crate) struct Levels<'a> {
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: AnyArray<'a>,
    pub(crate) v: AnyArray<'a>,
    /// `[batch, heads, len]`
    pub(crate) decay: ArrayView3<'a, f32>,
    /// `[batch, heads, len, levels]`: of the token itself, and of the states of bits.
    pub(crate) weights: AnyArray<'a>,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    pub(crate) scale: f32,
    pub(crate) form: Form,
}

#[derive(Clone, Copy)]
struct Geometry {
    dim: usize,
    stride: usize,
    value_dim: usize,
    width: usize,
    levels: usize,
    weights: usize,
}

impl Geometry {
    /// Numbers of a state.
    fn state(&self) -> usize {
        self.dim * self.width
    }
}

/// What one thread works in: rows of a chunk, scores, and the states with what they
/// have decayed by since they were merged.
struct Room<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    weights: &'a mut [f32],
    decay: &'a mut [f32],
    /// Keys as columns, `[dim, CHUNK]`.
    columns: &'a mut [f32],
    scaled: &'a mut [f32],
    scores: &'a mut [f32],
    out: &'a mut [f32],
    states: &'a mut [f32],
    factors: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn sizes(g: Geometry) -> [usize; 11] {
        let Geometry { dim, stride, width, weights, levels, .. } = g;
        let [rows, values] = [CHUNK * stride, CHUNK * width];
        let states = levels.saturating_mul(g.state());
        [rows, rows, values, CHUNK * weights, CHUNK, dim * CHUNK, rows, CHUNK * CHUNK, values, states, levels]
    }

    fn take(mut arena: Arena<'a>, g: Geometry) -> Self {
        let [q, k, v, weights, decay, columns, scaled, scores, out, states, factors] =
            Self::sizes(g).map(|n| {
                let x = arena.take::<f32>(n);
                // What fills rows up stays 0.
                x.fill(0.0);
                x
            });
        Self { q, k, v, weights, decay, columns, scaled, scores, out, states, factors }
    }
}

/// What queries read, from and to `kept` or from nothing: states `[sequences, heads,
/// levels * head_dim, value_dim]`, and how many tokens each sequence has had. The tokens of a
/// head are one thread's work.
pub(crate) fn run<'a, T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: &Levels<'a>,
    kept: Option<(&mut [f32], &[usize])>,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let Dims { batch, q_heads: heads, q_len: len, head_dim: dim, value_dim, packed, .. } = x.dims;
    let [stride, width] = [dim, value_dim].map(|n| n.next_multiple_of(MAX_LANES));
    let levels = x.weights.dim().3;
    let g = Geometry { dim, stride, value_dim, width, levels, weights: levels.next_multiple_of(MAX_LANES) };
    let (rows, units, workers) = (if packed { 1 } else { batch } * heads, batch * heads, parallel::threads());
    let room = Room::sizes(g).iter().map(|&n| bytes_for::<f32>(n)).fold(0, usize::saturating_add);
    let words = [rows * len, units].map(claim_words);
    let bytes = words.iter().map(|&n| bytes_for::<u64>(n)).sum::<usize>() + bytes_for_shares(workers, room);
    // Half of the bits of a place are set.
    let each = || CHUNK * (dim + value_dim) + dim * value_dim * (4 + levels.saturating_sub(BITS + 1));
    pass.stage(
        || (rows * len).saturating_mul(each()) as u64,
        bytes,
        |mut arena| {
            let Some(out) = out.filter(|out| !out.is_empty()) else { return };
            let [a, b] = words.map(|n| arena.take::<u64>(n));
            let out = T::any_out(OutRows::new(out, a));
            let (kept, positions) = kept.map_or((None, &[][..]), |(kept, at)| (Some(kept), at));
            let size = levels * dim * value_dim;
            let kept = kept.filter(|_| size > 0).map(|kept| Parts::new(kept, size, b));
            let shares = arena.shares(workers, room);
            let start = |worker| Room::take(shares.take(worker), g);
            parallel::for_each(workers, rows, start, |room, row| {
                let head = row % heads;
                let own = if packed { 0..batch } else { row / heads..row / heads + 1 };
                for sequence in own.map(|i| x.lengths.sequence(&x.dims, i)) {
                    let start = positions.get(sequence.index).copied().unwrap_or(0);
                    let mut kept = kept.as_ref().map(|kept| kept.take(sequence.index * heads + head));
                    if let Some(kept) = &kept {
                        room.load(g, start, kept);
                    }
                    let mut to = out.take(sequence.batch, head, sequence.queries.clone());
                    let (mut at, mut first) = (start, sequence.queries.start);
                    while first < sequence.queries.end {
                        let end = (first + CHUNK - at % CHUNK).min(sequence.queries.end);
                        let place = Place::new(&sequence, head, first..end);
                        let rows = |of: AnyArray<'a>| {
                            of.rows(place.batch, place.head_of(of.heads(), heads), &place.tokens)
                        };
                        copy_rows(isa, rows(x.q), room.q, stride);
                        copy_rows(isa, rows(x.k), room.k, stride);
                        copy_rows(isa, rows(x.v), room.v, width);
                        copy_rows(isa, rows(x.weights), room.weights, g.weights);
                        copy_tokens(&x.decay, heads, &place, room.decay);
                        let len = end - first;
                        let whole = len == CHUNK && dim > 0 && x.form != Form::Recurrent;
                        let (keys, to) = (rows(x.k), &mut to);
                        let past = first - sequence.queries.start;
                        isa.dispatch(Block { g, room, keys, at, len, whole, scale: x.scale, to, past });
                        (at, first) = (at + len, end);
                    }
                    if let Some(kept) = &mut kept {
                        isa.dispatch(Store { g, room, start, end: at, kept });
                    }
                }
            });
        },
    );
}

impl Room<'_> {
    /// The states of the bits of `at`, as the caller has them.
    fn load(&mut self, g: Geometry, at: usize, kept: &[f32]) {
        let size = g.dim * g.value_dim;
        for bit in (0..g.levels).filter(|bit| at >> bit & 1 == 1) {
            self.factors[bit] = 1.0;
            let to = self.states[bit * g.state()..][..g.state()].chunks_exact_mut(g.width);
            for (to, from) in to.zip(kept[bit * size..][..size].chunks_exact(g.value_dim)) {
                to[..g.value_dim].copy_from_slice(from);
            }
        }
    }
}

/// The other way, for the bits of `end`; those of `start` alone become 0.
struct Store<'a, 'b> {
    g: Geometry,
    room: &'a Room<'b>,
    start: usize,
    end: usize,
    kept: &'a mut [f32],
}

impl Kernel for Store<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { g, room, start, end, kept } = self;
        let size = g.dim * g.value_dim;
        for bit in 0..g.levels {
            let to = &mut kept[bit * size..][..size];
            if end >> bit & 1 == 1 {
                let factor = s.splat(room.factors[bit]);
                let from = room.states[bit * g.state()..].chunks_exact(g.width);
                for (to, from) in to.chunks_exact_mut(g.value_dim).zip(from) {
                    for (to, from) in to.chunks_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
                        s.store_tail(to, tile::decay(s, s.load(from), factor));
                    }
                }
            } else if start >> bit & 1 == 1 {
                to.fill(0.0);
            }
        }
    }
}

/// Some tokens of a head, loaded, up to a multiple of [`CHUNK`] at most.
struct Block<'a, 'b, 'c, 'd> {
    g: Geometry,
    room: &'a mut Room<'b>,
    keys: AnyRows<'a>,
    /// The tokens before them.
    at: usize,
    len: usize,
    /// Whether they are a chunk that is to be taken at once.
    whole: bool,
    scale: f32,
    to: &'c mut AnyRowsMut<'d>,
    /// Rows of the output before them.
    past: usize,
}

impl Kernel for Block<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut each = [0f32; CHUNK];
        for (to, x) in each.chunks_exact_mut(S::LANES).zip(self.room.decay.chunks_exact(S::LANES)) {
            s.store(to, decay_of(s, s.load(x)));
        }
        // A value that is not finite must not reach earlier tokens.
        if self.whole && self.is_finite(s) {
            self.chunk(s);
        } else {
            for t in 0..self.len {
                self.token(s, t, each[t]);
            }
        }
        let Self { g, room, to, .. } = self;
        for (t, row) in room.out.chunks_exact(g.width).take(self.len).enumerate() {
            to.write(s, self.past + t, row, self.scale);
        }
    }
}

impl Block<'_, '_, '_, '_> {
    #[inline(always)]
    fn is_finite<S: Simd>(&self, s: S) -> bool {
        let mut nothing = s.splat(0.0);
        for x in self.room.v.chunks_exact(S::LANES) {
            nothing = s.mul_add(s.load(x), s.splat(0.0), nothing);
        }
        s.reduce_add(nothing) == 0.0 && !self.room.decay.iter().any(|x| x.is_nan())
    }

    /// Decays the states of the bits of `at`.
    #[inline(always)]
    fn decay(&mut self, at: usize, by: f32) {
        for (bit, factor) in self.room.factors.iter_mut().enumerate() {
            if at >> bit & 1 == 1 {
                let left = *factor * by;
                *factor = if left < NEGLIGIBLE { 0.0 } else { left };
            }
        }
    }

    #[inline(always)]
    fn token<S: Simd>(&mut self, s: S, t: usize, left: f32) {
        let (g, at) = (self.g, self.at + t);
        self.decay(at, left);
        let Room { q, k, v, weights, out, states, factors, .. } = &mut *self.room;
        let (q, k) = (&q[t * g.stride..][..g.stride], &k[t * g.stride..][..g.stride]);
        let (v, out) = (&v[t * g.width..][..g.width], &mut out[t * g.width..][..g.width]);
        let weights = &weights[t * g.weights..][..g.weights];
        let mut dot = s.splat(0.0);
        for (q, k) in q.chunks_exact(S::LANES).zip(k.chunks_exact(S::LANES)) {
            dot = s.mul_add(s.load(q), s.load(k), dot);
        }
        let own = s.splat(weights[0] * s.reduce_add(dot));
        for (out, v) in out.chunks_exact_mut(S::LANES).zip(v.chunks_exact(S::LANES)) {
            s.store(out, s.mul(own, s.load(v)));
        }
        for bit in (0..g.levels).filter(|bit| at >> bit & 1 == 1) {
            let weight = s.splat(weights[bit + 1] * factors[bit]);
            let state = &states[bit * g.state()..][..g.state()];
            let mut col = 0;
            while col < g.width {
                col += match (g.width - col) / S::LANES {
                    0..4 => read::<S, 1>(s, q, state, g, weight, &mut out[col..], col),
                    _ => read::<S, 4>(s, q, state, g, weight, &mut out[col..], col),
                };
            }
        }
        let merged = at.trailing_ones() as usize;
        let (before, to) = states.split_at_mut(merged * g.state());
        merge(s, g, before, &factors[..merged], to);
        for (line, &k) in to[..g.state()].chunks_exact_mut(g.width).zip(k) {
            for (line, v) in line.chunks_exact_mut(S::LANES).zip(v.chunks_exact(S::LANES)) {
                s.store(line, s.mul_add(s.splat(k), s.load(v), s.load(line)));
            }
        }
        factors[merged] = 1.0;
    }

    /// A whole chunk, of which all values are finite.
    #[inline(always)]
    fn chunk<S: Simd>(&mut self, s: S) {
        let (g, ahead) = (self.g, &mut Ahead::nothing());
        let mut sums = [0f64; CHUNK + 1];
        for t in 0..CHUNK {
            sums[t + 1] = sums[t] + f64::from(self.room.decay[t].max(NOTHING));
        }
        let Room { q, v, weights, columns, scaled, scores, out, states, factors, .. } = &mut *self.room;
        self.keys.pack_columns(s, columns, CHUNK);
        let queries = Rows::of_slice(q, CHUNK, g.dim, g.stride);
        product(s, queries, (&**columns, CHUNK), CHUNK, (&mut **scores, CHUNK), Update::Set, ahead);
        // Weights of the keys of a row, and what is left of them.
        let (mut weighs, mut gaps) = ([0f32; CHUNK], [0f32; CHUNK]);
        for (t, row) in scores.chunks_exact_mut(CHUNK).enumerate() {
            let weights = &weights[t * g.weights..][..g.weights];
            weighs[t] = weights[0];
            for bit in (0..BITS).filter(|bit| t >> bit & 1 == 1) {
                let end = t >> bit << bit;
                weighs[end - (1 << bit)..end].fill(weights[bit + 1]);
            }
            for (gap, sum) in gaps[..=t].iter_mut().zip(&sums[1..]) {
                *gap = (sums[t + 1] - sum) as f32;
            }
            for col in (0..=t).step_by(S::LANES) {
                let weight = s.mul(s.load(&weighs[col..]), decay_of(s, s.load(&gaps[col..])));
                let row = &mut row[col..];
                s.store(row, s.mul(s.load(row), weight));
            }
            row[t + 1..].fill(0.0);
        }
        let pairs = Rows::of_slice(scores, CHUNK, CHUNK, CHUNK);
        product(s, pairs, (&**v, g.width), g.width, (&mut **out, g.width), Update::Set, ahead);
        // What is left of the chunk's start at each token, and of each token at the end.
        let mut starts = [0f32; CHUNK];
        for (t, (start, gap)) in starts.iter_mut().zip(&mut gaps).enumerate() {
            (*start, *gap) = (sums[t + 1] as f32, (sums[CHUNK] - sums[t + 1]) as f32);
        }
        for x in starts.chunks_exact_mut(S::LANES).chain(gaps.chunks_exact_mut(S::LANES)) {
            s.store(x, decay_of(s, s.load(x)));
        }
        for bit in (BITS..g.levels).filter(|bit| self.at >> bit & 1 == 1) {
            for (t, (to, q)) in scaled.chunks_exact_mut(g.stride).zip(q.chunks_exact(g.stride)).enumerate() {
                let weight = s.splat(weights[t * g.weights + bit + 1] * (factors[bit] * starts[t]));
                for (to, q) in to.chunks_exact_mut(S::LANES).zip(q.chunks_exact(S::LANES)) {
                    s.store(to, s.mul(weight, s.load(q)));
                }
            }
            let queries = Rows::of_slice(scaled, CHUNK, g.dim, g.stride);
            let state = &states[bit * g.state()..][..g.state()];
            product(s, queries, (state, g.width), g.width, (&mut **out, g.width), Update::Add, ahead);
        }
        for row in columns.chunks_exact_mut(CHUNK) {
            for (row, gap) in row.chunks_exact_mut(S::LANES).zip(gaps.chunks_exact(S::LANES)) {
                s.store(row, s.mul(s.load(row), s.load(gap)));
            }
        }
        self.decay(self.at, starts[CHUNK - 1]);
        let Room { v, columns, states, factors, .. } = &mut *self.room;
        let merged = BITS + (self.at >> BITS).trailing_ones() as usize;
        let (before, to) = states.split_at_mut(merged * g.state());
        merge(s, g, &before[BITS * g.state()..], &factors[BITS..merged], to);
        let keys = Rows::of_slice(columns, g.dim, CHUNK, CHUNK);
        product(s, keys, (&**v, g.width), g.width, (to, g.width), Update::Add, ahead);
        factors[merged] = 1.0;
    }
}

/// What a query reads of `NV` vectors of a state, times a weight; returns how many
/// columns these are.
#[inline(always)]
fn read<S: Simd, const NV: usize>(
    s: S,
    q: &[f32],
    state: &[f32],
    g: Geometry,
    weight: S::F,
    out: &mut [f32],
    col: usize,
) -> usize {
    let mut sums = [s.splat(0.0); NV];
    for (line, &q) in state.chunks_exact(g.width).zip(q) {
        for v in 0..NV {
            sums[v] = s.mul_add(s.splat(q), s.load(&line[col + v * S::LANES..]), sums[v]);
        }
    }
    for v in 0..NV {
        let out = &mut out[v * S::LANES..];
        s.store(out, s.mul_add(weight, sums[v], s.load(out)));
    }
    NV * S::LANES
}

/// The sum of some states, each times its factor; 0 of none.
#[inline(always)]
fn merge<S: Simd>(s: S, g: Geometry, states: &[f32], factors: &[f32], to: &mut [f32]) {
    to[..g.state()].fill(0.0);
    for (state, &factor) in states.chunks_exact(g.state().max(1)).zip(factors) {
        for (to, x) in to.chunks_exact_mut(S::LANES).zip(state.chunks_exact(S::LANES)) {
            s.store(to, s.add(s.load(to), tile::decay(s, s.load(x), s.splat(factor))));
        }
    }
}

/// The definition of one head, after `at` tokens: what each query reads.
pub(crate) fn define<R: Real>(
    states: &mut [Array2<R>],
    mut at: usize,
    [q, k, v, weights]: [&Array2<R>; 4],
    log_decay: impl Fn(usize) -> f64,
) -> Array2<R> {
    let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
    for (t, mut out) in out.outer_iter_mut().enumerate() {
        let left = left(R::of(log_decay(t)));
        let set = |bit: usize| at >> bit & 1 == 1;
        for (_, state) in states.iter_mut().enumerate().filter(|(bit, _)| set(*bit)) {
            state.mapv_inplace(|x| x * left);
        }
        let own = weights[[t, 0]] * R::dot(q.row(t).iter().copied().zip(k.row(t).iter().copied()));
        for (c, out) in out.iter_mut().enumerate() {
            *out = own * v[[t, c]];
            for (bit, state) in states.iter().enumerate().filter(|(bit, _)| set(*bit)) {
                // Kernels sum a chunk's pairs, and then its states.
                let column = state.column(c).into_iter().map(|x| x.summed(2 * CHUNK));
                *out = *out + weights[[t, bit + 1]] * R::dot(q.row(t).iter().copied().zip(column));
            }
        }
        let merged = at.trailing_ones() as usize;
        let mut sum = Array2::from_shape_fn(states[merged].dim(), |(d, c)| k[[t, d]] * v[[t, c]]);
        for state in &mut states[..merged] {
            sum.zip_mut_with(state, |sum, x| *sum = *sum + *x);
            state.fill(R::of(0.0));
        }
        states[merged] = sum;
        at += 1;
    }
    out
}

/// Levels that so many tokens have.
pub(crate) fn levels_of(tokens: usize) -> usize {
    match tokens {
        0 => 0,
        n => (usize::BITS - (n - 1).leading_zeros()) as usize + 1,
    }
}
