//! Angles that add up from token to token, the rotations by them, and the
//! weights of keys whose tokens write with the next one, too: what Mamba-3
//! makes of its steps.

use ndarray::{Array2, ArrayView3};

use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::{Arrays, Keys, Place, Source, Spec, copy_rows, copy_tokens};
use crate::error::{Error, Result};
use crate::input::state::State;
use crate::input::{Dim4, Dims, Lengths};
use crate::math::rope::Pairs;
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::exp::{sigmoid, sin_cos, tanh};
use crate::simd::mem::{Parts, Stream, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::linear;
use crate::stages::pass::{Out, Pass, Scratch};

mod define;
pub(crate) use define::Defining;

/// Tokens whose rates are loaded at once.
const CHUNK: usize = 32;

/// What [`Mamba3`](crate::linear::Mamba3) and
/// [`Mamba3Mimo`](crate::linear::Mamba3Mimo) carry from token to token.
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba3State {
    /// `[sequences, heads, head_dim, value_dim]`
    pub(crate) state: State,
    /// `[sequences, heads, 2, pairs]`: numbers that add up to an angle.
    pub(crate) angles: State,
    /// `[sequences, heads, ranks, dim]` of the last token, turned.
    pub(crate) key: State,
    /// `[sequences, heads, 1, value_dim]`
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
        key.check((a, b, key.view().dim().2, dim))?;
        value.check((a, b, 1, value_dim))?;
        Ok(Self { state, angles, key, value })
    }

    /// The matrix, `[sequences, heads, head_dim, value_dim]`.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Angles, `[sequences, heads, 2, pairs]`, each the sum of two numbers; keys
    /// (one, or one a rank) and value of the last token, `[sequences, heads, 1, dim]`.
    pub fn rest(&self) -> [&State; 3] {
        [&self.angles, &self.key, &self.value]
    }

    /// Of the parts.
    fn shapes(dims: &Dims, pairs: usize, ranks: usize) -> [Dim4; 4] {
        let Dims { batch, q_heads, head_dim, value_dim, .. } = *dims;
        [(head_dim, value_dim), (2, pairs), (ranks, head_dim), (1, value_dim)]
            .map(|(n, m)| (batch, q_heads, n, m))
    }

    pub(crate) fn zeros(dims: &Dims, pairs: usize, ranks: usize) -> Result<Self> {
        let [state, angles, key, value] = Self::shapes(dims, pairs, ranks).map(State::zeros);
        Ok(Self { state: state?, angles: angles?, key: key?, value: value? })
    }
}

/// Refuses angles, steps and a state that do not fit.
pub(crate) fn check(
    dims: &Dims,
    pairs: usize,
    ranks: usize,
    step: ArrayView3<'_, f32>,
    state: Option<&Mamba3State>,
) -> Result<()> {
    if pairs > dims.head_dim / 2 {
        let expected = format!("at most {} pairs of {} channels", dims.head_dim / 2, dims.head_dim);
        return Err(Error::value("angle", expected, pairs));
    }
    if let Some(step) = step.iter().find(|&&step| step < 0.0) {
        return Err(Error::value("step", "steps of at least 0", step));
    }
    if let Some(state) = state {
        let shapes = Mamba3State::shapes(dims, pairs, ranks);
        let parts = [&state.state, &state.angles, &state.key, &state.value];
        parts.into_iter().zip(shapes).try_for_each(|(part, shape)| part.check(shape))?;
    }
    Ok(())
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
    /// Which channels are a pair.
    pub(crate) layout: Pairs,
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

    /// Columns of cosines of a row of turns, and of sines: one a pair of halves, one a
    /// channel of neighbours.
    fn width(&self) -> usize {
        let copies = if self.layout == Pairs::Halves { 1 } else { 2 };
        (copies * self.pairs()).next_multiple_of(MAX_LANES)
    }

    /// The sequences of a row of the batch and head, and its head.
    fn sequences(&self, row: usize) -> (usize, std::ops::Range<usize>) {
        let heads = self.dims.q_heads;
        let own = if self.dims.packed { 0..self.dims.batch } else { row / heads..row / heads + 1 };
        (row % heads, own)
    }

    /// Angles `sum pi tanh(rate) step` as turns, `[batch, heads, len, 2 width]`:
    /// cosines and sines of pairs, or cosines of both channels of each pair of
    /// neighbours and sines by which each is multiplied with the other. From and to `kept`, `[sequences, heads, 2, pairs]`:
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
                        let layout = self.layout;
                        isa.dispatch(Turn { rates, steps, pairs, layout, stride, width, sums, to });
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

/// What tokens have of keys and queries where they have several, one after the
/// other along their length.
#[derive(Clone, Copy)]
pub(crate) struct Ranks<'a> {
    pub(crate) count: usize,
    /// By which the value of a token is multiplied for each, and their outputs
    /// before they add up: `[heads, ranks * value_dim]`.
    pub(crate) values: Option<&'a Array2<f32>>,
    pub(crate) outs: Option<&'a Array2<f32>>,
    /// What either is where it is not given.
    pub(crate) even: f32,
    /// What of outputs passes, `[batch, heads, len, value_dim]` before its SiLU,
    /// times as many weights or 1.
    pub(crate) gate: Option<(AnyArray<'a>, Option<&'a Array2<f32>>)>,
}

/// A call over tokens that write with the next one, too.
pub(crate) struct Trapezoid<'a> {
    pub(crate) steps: Steps<'a>,
    /// Queries, keys, values, decays and skips.
    pub(crate) arrays: Arrays<'a>,
    /// Added to queries and to keys before they turn, `[heads, ranks * head_dim]`.
    pub(crate) biases: [Option<&'a Array2<f32>>; 2],
    pub(crate) ranks: Ranks<'a>,
}

/// What the engine is told: keys and queries that have turned.
struct Turns<'a, 'b> {
    of: &'a Trapezoid<'b>,
    /// `[batch, heads, len, 2 width]`
    turns: &'a [f32],
    weights: &'a Weights<'a>,
}

impl Turns<'_, '_> {
    /// The tokens of some steps, as they are counted in `weights`.
    fn tokens(&self, at: &Place) -> std::ops::Range<usize> {
        let Dims { q_heads: heads, q_len: len, .. } = self.of.steps.dims;
        let row = (at.batch * heads + at.head) * len;
        let tokens = self.of.tokens(at).tokens;
        row + tokens.start..row + tokens.end
    }

    /// Turns rows of queries (`side` 0) or of keys, which `weights` multiply.
    fn turn(&self, isa: Isa, at: &Place, rows: &mut [f32], stride: usize, side: usize, weights: &[f32]) {
        let Trapezoid { steps, ranks, biases, .. } = self.of;
        let (width, tokens) = (steps.width(), self.tokens(at));
        isa.dispatch(Turned {
            turns: self.turns.get(tokens.start * 2 * width..tokens.end * 2 * width).unwrap_or_default(),
            width,
            pairs: steps.pairs(),
            layout: steps.layout,
            ranks: ranks.count,
            rows: &mut rows[..at.tokens.len() * stride],
            stride,
            dim: steps.dims.head_dim,
            bias: of_head(biases[side], at.head),
            weights,
        });
    }
}

impl Source for Turns<'_, '_> {
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        self.of.arrays.queries(isa, at, to, stride);
        self.turn(isa, at, to, stride, 0, &[]);
    }

    fn keys(&self, isa: Isa, at: &Place, to: Keys<'_>) {
        let Trapezoid { arrays, ranks, .. } = self.of;
        let (own, tokens) = (self.of.tokens(at), self.tokens(at));
        arrays.key_rows(isa, at, to.k, to.stride);
        self.turn(isa, at, to.k, to.stride, 1, &self.weights.keys[tokens.clone()]);
        arrays.gates(isa, &own, to.decay, 1);
        copy_rows(isa, arrays.rows(arrays.v, &own), to.v, ranks.count * to.value_stride);
        let (values, gains) =
            (&mut to.v[..at.tokens.len() * to.value_stride], of_head(ranks.values, at.head));
        if ranks.count > 1 || !gains.is_empty() {
            let dim = self.of.steps.dims.value_dim;
            let (stride, even, ranks) = (to.value_stride, ranks.even, ranks.count);
            isa.dispatch(Spread { rows: values, stride, dim, ranks, gains, even });
        }
        // From the last on, for decays of tokens become those of their first steps.
        for (step, own) in to.own[..at.tokens.len()].iter_mut().enumerate().rev() {
            let (token, rest) = (step / ranks.count, step % ranks.count);
            *own = self.weights.own[tokens.start + token];
            to.decay[step] = if rest == 0 { to.decay[token] } else { 0.0 };
        }
    }

    fn streams(&self, at: &Place) -> [Stream; 6] {
        let arrays = &self.of.arrays;
        let [q, k] = [arrays.q, arrays.k].map(|x| arrays.rows(x, at).stream());
        let v = arrays.rows(arrays.v, &self.of.tokens(at)).stream();
        [k, v, q, Stream::NONE, Stream::NONE, Stream::NONE]
    }

    fn skip(&self, head: usize) -> &[f32] {
        self.of.arrays.skip(head)
    }

    fn join(&self, isa: Isa, at: &Place, rows: &mut [f32], stride: usize) {
        let Trapezoid { arrays, ranks, steps, .. } = self.of;
        let gate = ranks
            .gate
            .map(|(gate, weights)| (arrays.rows(gate, &self.of.tokens(at)), of_head(weights, at.head)));
        let (rows, outs) = (&mut rows[..at.tokens.len() * stride], of_head(ranks.outs, at.head));
        let (dim, even, ranks) = (steps.dims.value_dim, ranks.even, ranks.count);
        isa.dispatch(Join { rows, stride, dim, ranks, outs, even, gate });
    }
}

impl Trapezoid<'_> {
    /// Where the tokens of some steps are.
    fn tokens(&self, at: &Place) -> Place {
        let ranks = self.ranks.count;
        Place { tokens: at.tokens.start / ranks..at.tokens.end / ranks, ..at.clone() }
    }

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
        let (len, rows) = (steps.dims.q_len, steps.rows());
        let mut turns = pass.rows((rows, 1, len, 2 * width))?;
        let (keys, own, carried) = (pass.take(rows * len)?, pass.take(rows * len)?, pass.take(rows * len)?);
        let mut weights = Weights { keys, own, carried };
        let kept = state.as_deref_mut().map(|state| state.angles.as_mut_slice());
        steps.turns(pass, isa, kept, &mut turns);
        steps.weights(pass, isa, &mut weights);
        if let Some(state) = state.as_deref_mut() {
            self.take_in(pass, isa, &weights, state);
        }
        let source = Turns { of: self, turns: turns.numbers(), weights: &weights };
        linear::run(pass, spec, &source, state.as_deref_mut().map(|state| state.state.as_mut_slice()), out);
        if let Some(Mamba3State { key, value, .. }) = state {
            self.leave(pass, isa, &source, (key.as_mut_slice(), value.as_mut_slice()));
        }
        Ok(())
    }

    /// The first token takes its share of the last one of the call before.
    fn take_in(&self, pass: &mut Pass<'_>, isa: Isa, weights: &Weights<'_>, state: &mut Mamba3State) {
        let Steps { dims, lengths, .. } = self.steps;
        let Dims { q_heads: heads, q_len: len, head_dim: dim, value_dim, .. } = dims;
        let (units, ranks) = (dims.batch * heads, self.ranks.count);
        let Mamba3State { state, key, value, .. } = state;
        let (keys, values) = (key.as_mut_slice(), value.as_mut_slice());
        let flops = || (2 * units * ranks * dim * value_dim) as u64;
        pass.stage(flops, bytes_for::<u64>(claim_words(units)), |mut arena| {
            let claims = arena.take(claim_words(units));
            let state = Parts::new(state.as_mut_slice(), dim * value_dim, claims);
            let add = |(): &mut (), unit: usize| {
                let of = lengths.sequence(&dims, unit / heads);
                let at = (of.batch * heads + unit % heads) * len + of.queries.start;
                let Some(&share) = weights.carried.get(at).filter(|_| !of.queries.is_empty()) else { return };
                let to = state.take(unit);
                let gains = of_head(self.ranks.values, unit % heads);
                let share = if gains.is_empty() { share * self.ranks.even } else { share };
                for rank in 0..ranks {
                    let key = &keys[(unit * ranks + rank) * dim..][..dim];
                    let value = &values[unit * value_dim..][..value_dim];
                    let gains = gains.get(rank * value_dim..).unwrap_or_default();
                    isa.dispatch(AddOuter { to: &mut *to, key, value, gains, share });
                }
            };
            parallel::for_each(parallel::threads(), units, |_| (), add);
        });
    }

    /// The last token leaves its keys, turned, and its value to the next call.
    fn leave(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        source: &Turns<'_, '_>,
        (keys, values): (&mut [f32], &mut [f32]),
    ) {
        let Steps { dims, lengths, .. } = self.steps;
        let Dims { q_heads: heads, head_dim: dim, value_dim, .. } = dims;
        let ranks = self.ranks.count;
        pass.stage(
            || 0,
            0,
            |_| {
                for unit in 0..dims.batch * heads {
                    let of = lengths.sequence(&dims, unit / heads);
                    let Some(last) = of.queries.clone().last() else { continue };
                    let token = Place::new(&of, unit % heads, last..last + 1);
                    let at = Place { tokens: last * ranks..(last + 1) * ranks, ..token.clone() };
                    let key = &mut keys[unit * ranks * dim..][..ranks * dim];
                    let value = &mut values[unit * value_dim..][..value_dim];
                    let (k, v) =
                        (self.arrays.rows(self.arrays.k, &at), self.arrays.rows(self.arrays.v, &token));
                    for (n, to) in key.iter_mut().enumerate() {
                        *to = k.at(n / dim, n % dim);
                    }
                    value.iter_mut().enumerate().for_each(|(c, to)| *to = v.at(0, c));
                    source.turn(isa, &at, key, dim, 1, &[]);
                }
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
    layout: Pairs,
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
        let Self { rates, steps, pairs, layout, stride, width, sums, to } = self;
        let halves = layout == Pairs::Halves;
        let used = if halves { pairs } else { 2 * pairs } / MAX_LANES * MAX_LANES;
        let (high, low) = sums.split_at_mut(stride);
        let (mut cosines, mut sines) = ([0f32; MAX_LANES], [0f32; MAX_LANES]);
        for row in to.chunks_exact_mut(width) {
            // Columns past the last pair stay as they are.
            row[used..].fill(0.0);
        }
        for row in to.chunks_exact_mut(2 * width) {
            row[used..width].fill(1.0);
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
                let n = S::LANES.min(pairs - col);
                if halves {
                    to_cosines[col..col + n].copy_from_slice(&cosines[..n]);
                    to_sines[col..col + n].copy_from_slice(&sines[..n]);
                    continue;
                }
                for i in 0..n {
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

/// Turns of some tokens of a head.
struct Turned<'a> {
    /// `[tokens, 2 width]`
    turns: &'a [f32],
    width: usize,
    pairs: usize,
    layout: Pairs,
    /// Rows of each token.
    ranks: usize,
    /// Rows `stride` apart, of `dim` columns.
    rows: &'a mut [f32],
    stride: usize,
    dim: usize,
    /// Added before, `[ranks, dim]` or none.
    bias: &'a [f32],
    /// What rows are multiplied by, a number a token or none.
    weights: &'a [f32],
}

impl Kernel for Turned<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { turns, width, pairs, layout, ranks, rows, stride, dim, bias, weights } = self;
        let halves = layout == Pairs::Halves;
        for (n, row) in rows.chunks_mut(stride.max(1)).enumerate() {
            let (t, rank) = (n / ranks, n % ranks);
            let weight = match weights.get(t) {
                Some(&weight) => weight,
                None if weights.is_empty() => 1.0,
                None => return,
            };
            let bias = bias.get(rank * dim..(rank + 1) * dim).unwrap_or_default();
            for col in (0..dim).step_by(S::LANES) {
                let to = &mut row[col..dim];
                let mut x = s.add(s.load_tail(to), s.load_tail(bias.get(col..).unwrap_or_default()));
                if !halves && col < width {
                    let turn = &turns[t * 2 * width + col..];
                    x = s.mul_add(s.load(&turn[width..]), s.swap(x, 1), s.mul(s.load(turn), x));
                }
                s.store_tail(to, s.mul(x, s.splat(weight)));
            }
            let (low, high) = row[..dim].split_at_mut(dim / 2);
            for col in (0..if halves { pairs } else { 0 }).step_by(S::LANES) {
                let turn = &turns[t * 2 * width + col..];
                let (cos, sin) = (s.load(turn), s.load(&turn[width..]));
                let end = pairs.min(col + S::LANES);
                let (low, high) = (&mut low[col..end], &mut high[col..end]);
                let (a, b) = (s.load_tail(low), s.load_tail(high));
                s.store_tail(low, s.sub(s.mul(cos, a), s.mul(sin, b)));
                s.store_tail(high, s.mul_add(sin, a, s.mul(cos, b)));
            }
        }
    }
}

/// The first row of each token, times the gains of each rank, becomes its rows.
struct Spread<'a> {
    /// Rows `stride` apart, of `dim` columns.
    rows: &'a mut [f32],
    stride: usize,
    dim: usize,
    ranks: usize,
    /// `[ranks, dim]`, or none and what stands for them.
    gains: &'a [f32],
    even: f32,
}

impl Kernel for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, stride, dim, ranks, gains, even } = self;
        for token in rows.chunks_exact_mut((ranks * stride).max(1)) {
            // The first row is overwritten last.
            for rank in (0..ranks).rev() {
                for col in (0..dim).step_by(S::LANES) {
                    let gain = match gains.get(rank * dim + col..(rank + 1) * dim) {
                        Some(gains) => s.load_tail(gains),
                        None => s.splat(even),
                    };
                    let x = s.mul(s.load_tail(&token[col..dim]), gain);
                    s.store_tail(&mut token[rank * stride + col..rank * stride + dim], x);
                }
            }
        }
    }
}

/// The rows of each token, times weights and gates, add up in the last.
struct Join<'a> {
    /// Rows `stride` apart, of `dim` columns.
    rows: &'a mut [f32],
    stride: usize,
    dim: usize,
    ranks: usize,
    /// `[ranks, dim]`, or none and what stands for them.
    outs: &'a [f32],
    even: f32,
    /// Rows of tokens, and their weights `[ranks, dim]` or none.
    gate: Option<(AnyRows<'a>, &'a [f32])>,
}

impl Kernel for Join<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, stride, dim, ranks, outs, even, gate } = self;
        for (t, token) in rows.chunks_exact_mut((ranks * stride).max(1)).enumerate() {
            for col in (0..dim).step_by(S::LANES) {
                let mut sum = s.splat(0.0);
                for rank in 0..ranks {
                    let of = |x: &[f32], even: f32| match x.get(rank * dim + col..(rank + 1) * dim) {
                        Some(x) => s.load_tail(x),
                        None => s.splat(even),
                    };
                    let x = s.load_tail(&token[rank * stride + col..rank * stride + dim]);
                    let mut x = s.mul(x, of(outs, even));
                    if let Some((gate, weights)) = &gate {
                        let z = s.mul(gate.load(s, t, col), of(weights, 1.0));
                        x = s.mul(x, s.mul(z, sigmoid(s, z)));
                    }
                    sum = s.add(sum, x);
                }
                s.store_tail(&mut token[(ranks - 1) * stride + col..(ranks - 1) * stride + dim], sum);
            }
        }
    }
}

/// `S += share k (v gains)^T`, rows one after the other, or without gains.
struct AddOuter<'a> {
    to: &'a mut [f32],
    key: &'a [f32],
    value: &'a [f32],
    gains: &'a [f32],
    share: f32,
}

impl Kernel for AddOuter<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { to, key, value, gains, share } = self;
        for (row, &key) in to.chunks_exact_mut(value.len().max(1)).zip(key) {
            let factor = s.splat(share * key);
            for (n, (row, value)) in row.chunks_mut(S::LANES).zip(value.chunks(S::LANES)).enumerate() {
                let mut value = s.load_tail(value);
                if let Some(gains) = gains.get(n * S::LANES..).filter(|gains| !gains.is_empty()) {
                    value = s.mul(value, s.load_tail(gains));
                }
                let sum = s.mul_add(factor, value, s.load_tail(row));
                s.store_tail(row, sum);
            }
        }
    }
}
