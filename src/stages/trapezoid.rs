//! Angles that add up from token to token, the rotations by them, and the
//! weights of keys whose tokens write with the next one, too: what Mamba-3
//! makes of its steps.

use ndarray::{Array2, ArrayView1, ArrayView3};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::{Arrays, Keys, Made, Place, Spec, copy_rows, copy_tokens};
use crate::error::Result;
use crate::input::state::State;
use crate::input::{Dims, Lengths};
use crate::simd::any::AnyArray;
use crate::simd::exp::{sigmoid, sin_cos, tanh};
use crate::simd::mem::{Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::linear;
use crate::stages::pass::{Out, Pass, Scratch};

/// Tokens whose rates are loaded at once.
const CHUNK: usize = 32;

/// What [`Mamba3`](crate::linear::Mamba3) carries from token to token.
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba3State {
    /// `[sequences, heads, head_dim, value_dim]`
    pub(crate) state: State,
    /// `[sequences, heads, 2, pairs]`: numbers that add up to an angle.
    pub(crate) angles: State,
    /// `[sequences, heads, 1, dim]` of the last token, turned.
    pub(crate) key: State,
    pub(crate) value: State,
}

impl Mamba3State {
    /// A state of these parts, for instance one that was saved.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for parts of other sequences, heads or sizes.
    pub fn new(state: State, angles: State, key: State, value: State) -> Result<Self> {
        let ((a, b, dim, value_dim), pairs) = (state.view().dim(), angles.view().dim().3);
        angles.check((a, b, 2, pairs))?;
        key.check((a, b, 1, dim))?;
        value.check((a, b, 1, value_dim))?;
        Ok(Self { state, angles, key, value })
    }

    /// The matrix, `[sequences, heads, head_dim, value_dim]`.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Angles, `[sequences, heads, 2, pairs]`, each the sum of two numbers; key
    /// and value of the last token, `[sequences, heads, 1, dim]`.
    pub fn rest(&self) -> [&State; 3] {
        [&self.angles, &self.key, &self.value]
    }
}

/// The row of a head, or none.
pub(crate) fn of_head(bias: Option<&Array2<f32>>, head: usize) -> &[f32] {
    let Some(bias) = bias else { return &[] };
    let dim = bias.dim().1;
    &bias.as_slice().unwrap_or_default()[head * dim..][..dim]
}

/// Steps, and what goes with them.
#[derive(Clone, Copy)]
pub(crate) struct Steps<'a> {
    /// `[batch, heads, len]`
    pub(crate) step: ArrayView3<'a, f32>,
    /// Logits, `[batch, heads, len]`.
    pub(crate) trap: ArrayView3<'a, f32>,
    /// `[batch, heads, len, pairs]`
    pub(crate) rates: AnyArray<'a>,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
}

/// One number a token for each head of each entry of the batch.
struct Weights<'a> {
    /// Of what a token writes, with the next one: `sigmoid(trap) step`, and
    /// `sigmoid(-trap) step` of the token after it.
    keys: &'a mut [f32],
    /// The first of them as a share of both.
    own: &'a mut [f32],
    /// `sigmoid(-trap) step`
    carried: &'a mut [f32],
}

impl Steps<'_> {
    fn rows(&self) -> usize {
        let Dims { batch, q_heads, packed, .. } = self.dims;
        if packed { q_heads } else { batch * q_heads }
    }

    fn pairs(&self) -> usize {
        self.rates.dim().3
    }

    /// Columns of cosines of a row of turns, and of sines.
    fn width(&self) -> usize {
        (2 * self.pairs()).next_multiple_of(MAX_LANES)
    }

    /// The sequences of a row of the batch and head, and its head.
    fn sequences(&self, row: usize) -> (usize, std::ops::Range<usize>) {
        let heads = self.dims.q_heads;
        let own = if self.dims.packed { 0..self.dims.batch } else { row / heads..row / heads + 1 };
        (row % heads, own)
    }

    /// Angles `sum pi tanh(rate) step` as turns: cosines of both channels of
    /// each pair, and sines by which each is multiplied with the other, `[batch,
    /// heads, len, 2 width]`. From and to `kept`, `[sequences, heads, 2, pairs]`:
    /// two numbers that add up to an angle.
    fn turns(&self, pass: &mut Pass<'_>, isa: Isa, kept: Option<&mut [f32]>, to: &mut Scratch<'_>) {
        let (pairs, len, heads, width) = (self.pairs(), self.dims.q_len, self.dims.q_heads, self.width());
        let (rows, workers) = (self.rows(), parallel::threads());
        let units = self.dims.batch * heads;
        let stride = pairs.next_multiple_of(MAX_LANES);
        let room = bytes_for::<f32>(CHUNK * stride) + bytes_for::<f32>(CHUNK) + bytes_for::<f32>(2 * stride);
        let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for::<u64>(claim_words(units));
        let flops = || (rows * len).saturating_mul(64 * pairs) as u64;
        pass.stage(flops, bytes + bytes_for_shares(workers, room), |mut arena| {
            if pairs == 0 {
                return;
            }
            let [a, b] = [rows, units].map(|n| arena.take::<u64>(claim_words(n)));
            let to = Parts::new(to.numbers_mut(), len * 2 * width, a);
            let kept = kept.map(|kept| Parts::new(kept, 2 * pairs, b));
            let shares = arena.shares(workers, room);
            let start = |worker| {
                let mut arena = shares.take(worker);
                [CHUNK * stride, CHUNK, 2 * stride].map(|n| arena.take::<f32>(n))
            };
            parallel::for_each(workers, rows, start, |[rates, steps, sums], row| {
                let (to, (head, own)) = (to.take(row), self.sequences(row));
                for sequence in own.map(|i| self.lengths.sequence(&self.dims, i)) {
                    sums.fill(0.0);
                    let mut kept = kept.as_ref().map(|kept| kept.take(sequence.index * heads + head));
                    if let Some(kept) = &kept {
                        sums.chunks_exact_mut(stride).zip(kept.chunks_exact(pairs)).for_each(
                            |(sums, kept)| {
                                sums[..pairs].copy_from_slice(kept);
                            },
                        );
                    }
                    for at in sequence.queries.clone().step_by(CHUNK) {
                        let tokens = at..(at + CHUNK).min(sequence.queries.end);
                        let to = &mut to[tokens.start * 2 * width..tokens.end * 2 * width];
                        let place = Place::new(&sequence, head, tokens);
                        let own = place.head_of(self.rates.heads(), heads);
                        copy_rows(isa, self.rates.rows(place.batch, own, &place.tokens), rates, stride);
                        copy_tokens(&self.step, heads, &place, steps);
                        let steps = &steps[..place.tokens.len()];
                        isa.dispatch(Turn { rates, steps, pairs, stride, width, sums, to });
                    }
                    if let Some(kept) = &mut kept {
                        kept.chunks_exact_mut(pairs).zip(sums.chunks_exact(stride)).for_each(
                            |(kept, sums)| {
                                kept.copy_from_slice(&sums[..pairs]);
                            },
                        );
                    }
                }
            });
        });
    }

    /// The weights of tokens.
    fn weights(&self, pass: &mut Pass<'_>, isa: Isa, to: &mut Weights<'_>) {
        let (rows, len, heads) = (self.rows(), self.dims.q_len, self.dims.q_heads);
        let words = claim_words(rows);
        pass.stage(
            || 16 * (rows * len) as u64,
            3 * bytes_for::<u64>(words),
            |mut arena| {
                let [a, b, c] = std::array::from_fn(|_| arena.take::<u64>(words));
                let (keys, own) = (Parts::new(&mut *to.keys, len, a), Parts::new(&mut *to.own, len, b));
                let carried = Parts::new(&mut *to.carried, len, c);
                parallel::for_each(
                    parallel::threads(),
                    rows,
                    |_| (),
                    |(), row| {
                        let (keys, own, carried) = (keys.take(row), own.take(row), carried.take(row));
                        let (head, sequences) = self.sequences(row);
                        for sequence in sequences.map(|i| self.lengths.sequence(&self.dims, i)) {
                            let tokens = sequence.queries.clone();
                            let place = Place::new(&sequence, head, tokens.clone());
                            let [keys, own, carried] =
                                [&mut *keys, &mut *own, &mut *carried].map(|x| &mut x[tokens.clone()]);
                            copy_tokens(&self.step, heads, &place, keys);
                            copy_tokens(&self.trap, heads, &place, own);
                            isa.dispatch(Weigh { keys, own, carried });
                        }
                    },
                );
            },
        );
    }
}

/// A call over tokens that write with the next one, too.
pub(crate) struct Trapezoid<'a> {
    pub(crate) steps: Steps<'a>,
    /// Queries, keys, values, decays and skips.
    pub(crate) arrays: Arrays<'a>,
    /// Added to queries and to keys before they turn, `[heads, head_dim]`.
    pub(crate) biases: [Option<&'a Array2<f32>>; 2],
}

impl Trapezoid<'_> {
    /// Runs it from and to a state, or from zero.
    pub(crate) fn run<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        spec: &Spec<'_>,
        mut state: Option<&mut Mamba3State>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (steps, width) = (&self.steps, self.steps.width());
        let Dims { q_heads: heads, q_len: len, head_dim: dim, .. } = steps.dims;
        let rows = steps.rows();
        let mut turns = pass.rows((rows, 1, len, 2 * width))?;
        let (keys, own, carried) = (pass.take(rows * len)?, pass.take(rows * len)?, pass.take(rows * len)?);
        let mut weights = Weights { keys, own, carried };
        let kept = state.as_deref_mut().map(|state| state.angles.as_mut_slice());
        steps.turns(pass, isa, kept, &mut turns);
        steps.weights(pass, isa, &mut weights);
        let (turns, weights) = (turns.numbers(), &weights);
        let first = |at: &Place| (at.batch * heads + at.head) * len + at.tokens.start;
        // What becomes of rows of queries or keys.
        let turned = |at: &Place, rows: &mut [f32], stride: usize, side: usize, weights: &[f32]| {
            let (first, n) = (first(at), at.tokens.len());
            let turns = turns.get(first * 2 * width..(first + n) * 2 * width).unwrap_or_default();
            let bias = of_head(self.biases[side], at.head);
            isa.dispatch(Turned { turns, width, rows: &mut rows[..n * stride], stride, dim, bias, weights });
        };
        let queries = |_: Isa, at: &Place, to: &mut [f32], stride: usize| turned(at, to, stride, 0, &[]);
        let keys = |_: Isa, at: &Place, to: Keys<'_>| {
            let all = first(at)..first(at) + at.tokens.len();
            turned(at, to.k, to.stride, 1, &weights.keys[all.clone()]);
            to.own[..all.len()].copy_from_slice(&weights.own[all]);
        };
        if let Some(state) = state.as_deref_mut() {
            self.take_in(pass, isa, weights, state);
        }
        let source = Made { arrays: self.arrays, queries, keys };
        linear::run(pass, spec, &source, state.as_deref_mut().map(|state| state.state.as_mut_slice()), out);
        if let Some(Mamba3State { key, value, .. }) = state {
            let (keys, values) = (key.as_mut_slice(), value.as_mut_slice());
            self.leave(pass, (keys, values), |at, key| turned(at, key, dim, 1, &[]));
        }
        Ok(())
    }

    /// The first token takes its share of the last one of the call before.
    fn take_in(&self, pass: &mut Pass<'_>, isa: Isa, weights: &Weights<'_>, state: &mut Mamba3State) {
        let Steps { dims, lengths, .. } = self.steps;
        let Dims { q_heads: heads, q_len: len, head_dim: dim, value_dim, .. } = dims;
        let units = dims.batch * heads;
        let Mamba3State { state, key, value, .. } = state;
        let (key, value) = (key.as_mut_slice(), value.as_mut_slice());
        let flops = || (2 * units * dim * value_dim) as u64;
        pass.stage(flops, bytes_for::<u64>(claim_words(units)), |mut arena| {
            let claims = arena.take(claim_words(units));
            let state = Parts::new(state.as_mut_slice(), dim * value_dim, claims);
            let add = |(): &mut (), unit: usize| {
                let of = lengths.sequence(&dims, unit / heads);
                let at = (of.batch * heads + unit % heads) * len + of.queries.start;
                if let Some(&share) = weights.carried.get(at).filter(|_| !of.queries.is_empty()) {
                    let (key, value) = (&key[unit * dim..][..dim], &value[unit * value_dim..][..value_dim]);
                    isa.dispatch(AddOuter { to: state.take(unit), key, value, share });
                }
            };
            parallel::for_each(parallel::threads(), units, |_| (), add);
        });
    }

    /// The last token leaves its key, `turned`, and its value to the next call.
    fn leave(
        &self,
        pass: &mut Pass<'_>,
        (keys, values): (&mut [f32], &mut [f32]),
        turned: impl Fn(&Place, &mut [f32]),
    ) {
        let Steps { dims, lengths, .. } = self.steps;
        let Dims { q_heads: heads, head_dim: dim, value_dim, .. } = dims;
        pass.stage(
            || 0,
            0,
            |_| {
                for unit in 0..dims.batch * heads {
                    let of = lengths.sequence(&dims, unit / heads);
                    let Some(last) = of.queries.clone().last() else { continue };
                    let at = Place::new(&of, unit % heads, last..last + 1);
                    let key = &mut keys[unit * dim..][..dim];
                    let value = &mut values[unit * value_dim..][..value_dim];
                    for (from, to) in [(self.arrays.k, &mut *key), (self.arrays.v, value)] {
                        let row = self.arrays.rows(from, &at);
                        to.iter_mut().enumerate().for_each(|(c, to)| *to = row.at(0, c));
                    }
                    turned(&at, key);
                }
            },
        );
    }
}

/// The definition of a row that has turned: with angles, and how far they have come.
pub(crate) fn define_turned<R: Real>(
    row: ArrayView1<'_, R>,
    bias: &[f32],
    angles: &[f64],
    way: &[f64],
) -> Vec<R> {
    let biased = |(d, &x): (usize, &R)| bias.get(d).map_or(x, |&bias| x + R::of(f64::from(bias)));
    let x: Vec<R> = row.iter().enumerate().map(biased).collect();
    let turned = |d: usize| {
        let Some(&angle) = angles.get(d / 2) else { return x[d] };
        // Angles are off by what their way was rounded to.
        let off = R::rounded(1.0, 8.0 + 8.0 * way[d / 2]) - R::of(1.0);
        let sign = if d.is_multiple_of(2) { -1.0 } else { 1.0 };
        let (cos, sin) = (R::of(angle.cos()) + off, R::of(sign * angle.sin()) + off);
        x[d] * cos + x[d ^ 1] * sin
    };
    (0..x.len()).map(turned).collect()
}

/// The angles of some tokens of a head.
struct Turn<'a> {
    /// `[tokens, stride]`
    rates: &'a [f32],
    steps: &'a [f32],
    pairs: usize,
    stride: usize,
    width: usize,
    /// The angles before them, `[2, stride]`.
    sums: &'a mut [f32],
    /// `[tokens, 2 width]`
    to: &'a mut [f32],
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        use std::f32::consts::{FRAC_1_PI, PI};
        let Self { rates, steps, pairs, stride, width, sums, to } = self;
        let (high, low) = sums.split_at_mut(stride);
        let (mut cosines, mut sines) = ([0f32; MAX_LANES], [0f32; MAX_LANES]);
        for row in to.chunks_exact_mut(width) {
            // Columns past the last pair stay as they are.
            row[2 * pairs / MAX_LANES * MAX_LANES..].fill(0.0);
        }
        for row in to.chunks_exact_mut(2 * width) {
            row[2 * pairs / MAX_LANES * MAX_LANES..width].fill(1.0);
        }
        for col in (0..pairs).step_by(S::LANES) {
            let (mut sum, mut rest) = (s.load(&high[col..]), s.load(&low[col..]));
            for (t, row) in to.chunks_exact_mut(2 * width).enumerate() {
                let step = s.mul(s.splat(steps[t]), s.splat(PI));
                let angle = s.mul(tanh(s, s.load(&rates[t * stride + col..])), step);
                // What rounding takes of the sum is summed too.
                let next = s.add(sum, angle);
                let taken = s.sub(next, sum);
                let lost = s.add(s.sub(sum, s.sub(next, taken)), s.sub(angle, taken));
                // Whole turns, 2 pi in two parts.
                let turns = s.round(s.mul(next, s.splat(0.5 * FRAC_1_PI)));
                sum = s.mul_add(turns, s.splat(-6.281_25), next);
                rest = s.mul_add(turns, s.splat(-1.935_307_2e-3), s.add(rest, lost));
                let [sin, cos] = sin_cos(s, s.add(sum, rest));
                s.store(&mut cosines, cos);
                s.store(&mut sines, sin);
                let (to_cosines, to_sines) = row.split_at_mut(width);
                for i in 0..S::LANES.min(pairs - col) {
                    let at = 2 * (col + i);
                    (to_cosines[at], to_cosines[at + 1]) = (cosines[i], cosines[i]);
                    (to_sines[at], to_sines[at + 1]) = (-sines[i], sines[i]);
                }
            }
            s.store(&mut high[col..], sum);
            s.store(&mut low[col..], rest);
        }
    }
}

/// Steps and logits, in the places of keys' and own weights, become weights.
struct Weigh<'a> {
    keys: &'a mut [f32],
    own: &'a mut [f32],
    carried: &'a mut [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { keys, own, carried } = self;
        let vectors =
            keys.chunks_mut(S::LANES).zip(own.chunks_mut(S::LANES)).zip(carried.chunks_mut(S::LANES));
        for ((keys, own), carried) in vectors {
            let (step, trap) = (s.load_tail(keys), s.load_tail(own));
            s.store_tail(carried, s.mul(step, sigmoid(s, s.sub(s.splat(0.0), trap))));
            s.store_tail(own, s.mul(step, sigmoid(s, trap)));
        }
        for t in 0..keys.len() {
            // What is not finite reaches its own token and later ones alone.
            let next = carried.get(t + 1).copied().filter(|x| x.is_finite()).unwrap_or(0.0);
            let whole = own[t] + next + 0.0 * carried[t];
            keys[t] = whole;
            own[t] = if whole == 0.0 { 1.0 } else { own[t] / whole };
        }
    }
}

/// Turns of some tokens of a head, of as many columns of cosines and of sines.
struct Turned<'a> {
    /// `[tokens, 2 width]`
    turns: &'a [f32],
    width: usize,
    /// Rows `stride` apart, of `dim` columns.
    rows: &'a mut [f32],
    stride: usize,
    dim: usize,
    /// Added before, a number a column or none.
    bias: &'a [f32],
    /// What rows are multiplied by, a number each or none.
    weights: &'a [f32],
}

impl Kernel for Turned<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { turns, width, rows, stride, dim, bias, weights } = self;
        for (t, row) in rows.chunks_mut(stride.max(1)).enumerate() {
            let weight = match weights.get(t) {
                Some(&weight) => weight,
                None if weights.is_empty() => 1.0,
                None => return,
            };
            for col in (0..dim).step_by(S::LANES) {
                let to = &mut row[col..dim];
                let mut x = s.add(s.load_tail(to), s.load_tail(bias.get(col..).unwrap_or_default()));
                if col < width {
                    let turn = &turns[t * 2 * width + col..];
                    x = s.mul_add(s.load(&turn[width..]), s.swap(x, 1), s.mul(s.load(turn), x));
                }
                s.store_tail(to, s.mul(x, s.splat(weight)));
            }
        }
    }
}

/// `S += share k v^T`, rows one after the other.
struct AddOuter<'a> {
    to: &'a mut [f32],
    key: &'a [f32],
    value: &'a [f32],
    share: f32,
}

impl Kernel for AddOuter<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (row, &key) in self.to.chunks_exact_mut(self.value.len().max(1)).zip(self.key) {
            let factor = s.splat(self.share * key);
            for (to, value) in row.chunks_mut(S::LANES).zip(self.value.chunks(S::LANES)) {
                let sum = s.mul_add(factor, s.load_tail(value), s.load_tail(to));
                s.store_tail(to, sum);
            }
        }
    }
}
