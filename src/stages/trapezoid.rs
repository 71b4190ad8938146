//! Angles that add up from token to token, the rotations by them, and the
//! weights of keys whose tokens write with the next one, too: what Mamba-3
//! makes of its steps.

use ndarray::ArrayView3;

use crate::engine::parallel;
use crate::engine::recur::{Place, copy_rows, copy_tokens};
use crate::input::{Dims, Lengths};
use crate::simd::any::AnyArray;
use crate::simd::exp::{sigmoid, sin_cos, tanh};
use crate::simd::mem::{Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Tokens whose rates are loaded at once.
const CHUNK: usize = 32;

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
pub(crate) struct Weights<'a> {
    /// Of what a token writes, with the next one: `sigmoid(trap) step`, and
    /// `sigmoid(-trap) step` of the token after it.
    pub(crate) keys: &'a mut [f32],
    /// The first of them as a share of both.
    pub(crate) own: &'a mut [f32],
    /// `sigmoid(-trap) step`
    pub(crate) carried: &'a mut [f32],
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
    pub(crate) fn width(&self) -> usize {
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
    pub(crate) fn turns(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        kept: Option<&mut [f32]>,
        to: &mut Scratch<'_>,
    ) {
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
    pub(crate) fn weights(&self, pass: &mut Pass<'_>, isa: Isa, to: &mut Weights<'_>) {
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
pub(crate) struct Turned<'a> {
    /// `[tokens, 2 width]`
    pub(crate) turns: &'a [f32],
    pub(crate) width: usize,
    /// Rows `stride` apart, of `dim` columns.
    pub(crate) rows: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) dim: usize,
    /// Added before, a number a column or none.
    pub(crate) bias: &'a [f32],
    /// What rows are multiplied by, a number each or none.
    pub(crate) weights: &'a [f32],
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
pub(crate) struct AddOuter<'a> {
    pub(crate) to: &'a mut [f32],
    pub(crate) key: &'a [f32],
    pub(crate) value: &'a [f32],
    pub(crate) share: f32,
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
