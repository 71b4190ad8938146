//! States of several parts.

use std::f64::consts::TAU;

use attention_kernels::Qkv;
use attention_kernels::input::Lengths;
use attention_kernels::linear::{
    Aaren, AarenInput, Based, BasedInput, BasedState, GatedSlotAttention, LevelQkv, LevelState, LogLinear,
    Mamba3, Mamba3Mimo, Mamba3MimoInput, Mamba3Qkv, Mamba3State, MesaNet, MesaQkv, MesaState, SlotQkv,
    SlotState, State,
};
use attention_kernels::math::rope::Pairs;
use ndarray::{Array4, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, Axis, concatenate, s};

use super::single::{only, zeros};
use super::{Parts, Segment, Travels, rows_of};
use crate::stored::Stored;

fn given(state: &State) -> Array4<f32> {
    state.view().to_owned()
}

fn states<const N: usize>(parts: Parts) -> Result<[State; N], String> {
    let states: Result<Vec<State>, String> = parts.into_iter().map(|part| only(vec![part])).collect();
    states?.try_into().map_err(|parts: Vec<State>| format!("state: expected {N} parts, got {}", parts.len()))
}

/// A number in two of half the size; integers below 2^48 exactly.
pub(super) fn halves(x: f64) -> [f32; 2] {
    let high = x as f32;
    [high, (x - f64::from(high)) as f32]
}

pub(super) fn joined([high, low]: [f32; 2]) -> f64 {
    f64::from(high) + f64::from(low)
}

/// What is left, if it is finite; nothing where nobody needs it.
fn checked(mut left: Array4<f32>, needed: bool) -> Result<Parts, String> {
    if let Some(x) = left.iter().find(|x| !x.is_finite()) {
        if needed {
            return Err(format!("log_decay: expected decays that leave a finite share of states, got {x}"));
        }
        left.fill(0.0);
    }
    Ok(vec![left])
}

/// `exp` of the sum of log decays `[batch, heads or a divisor, len, n]` of each sequence, in
/// rows `[sequences, heads, 1, n]`.
fn decays(
    log_decay: ArrayView4<'_, f32>,
    lengths: Lengths<'_>,
    (sequences, heads): (usize, usize),
) -> Array4<f32> {
    let (_, own, len, n) = log_decay.dim();
    Array4::from_shape_fn((sequences, heads, 1, n), |(i, h, _, c)| {
        let batch = if matches!(lengths, Lengths::Packed { .. }) { 0 } else { i };
        let h = h / (heads / own.max(1)).max(1);
        let of = log_decay.slice(s![batch, h, rows_of(lengths, len, i), c]);
        of.iter().map(|&x| f64::from(x)).sum::<f64>().exp() as f32
    })
}

/// Sequences and heads.
fn units(state: &State) -> (usize, usize) {
    let (sequences, heads, ..) = state.view().dim();
    (sequences, heads)
}

/// `before` times factors, and what is added.
fn decayed(before: &Array4<f32>, factors: ArrayView4<'_, f32>, own: &Array4<f32>) -> Array4<f32> {
    let Some(factors) = factors.broadcast(own.dim()) else { return own.clone() };
    let keep = |&x: &f32, &p: &f32, &own: &f32| if p == 0.0 { own } else { p.mul_add(x, own) };
    ndarray::Zip::from(before).and(factors).and(own).map_collect(keep)
}

impl<T: Stored> Travels<MesaQkv<'_, T>> for MesaNet {
    type Mechanism = Self;

    fn mechanism(&self) -> &Self {
        self
    }

    fn sizes(&self, zero: &MesaState) -> Vec<(&'static str, usize)> {
        let (_, heads, dim, value_dim) = zero.values().view().dim();
        vec![("heads", heads), ("k: head_dim", dim), ("v: value_dim", value_dim)]
    }

    fn parts(&self, state: &MesaState) -> Parts {
        vec![given(state.keys()), given(state.values())]
    }

    fn state(&self, parts: Parts) -> Result<MesaState, String> {
        let [keys, values] = states(parts)?;
        MesaState::new(keys, values).map_err(|error| error.to_string())
    }

    fn left(&self, x: MesaQkv<'_, T>, zero: &MesaState, needed: bool) -> Result<Parts, String> {
        let log_decay = x.log_decay.insert_axis(Axis(3));
        checked(decays(log_decay, x.qkv.lengths, units(zero.values())), needed)
    }

    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        let of = |part: usize| decayed(&before[part], tokens.left[0].view(), &tokens.own[part]);
        vec![of(0), of(1)]
    }

    /// The systems of queries of 0 are solved from the start.
    fn written<'a>(&self, x: MesaQkv<'a, T>) -> MesaQkv<'a, T> {
        let q = zeros(x.qkv.q, x.qkv.q.dim().3);
        MesaQkv { qkv: Qkv { q, ..x.qkv }, ..x }
    }
}

impl<T: Stored> Travels<SlotQkv<'_, T>> for GatedSlotAttention {
    type Mechanism = Self;

    fn mechanism(&self) -> &Self {
        self
    }

    fn sizes(&self, zero: &SlotState) -> Vec<(&'static str, usize)> {
        let (_, heads, slots, value_dim) = zero.values().view().dim();
        let dim = zero.keys().view().dim().2;
        vec![("heads", heads), ("k: head_dim", dim), ("write: slots", slots), ("v: value_dim", value_dim)]
    }

    fn parts(&self, state: &SlotState) -> Parts {
        vec![given(state.keys()), given(state.values())]
    }

    fn state(&self, parts: Parts) -> Result<SlotState, String> {
        let [keys, values] = states(parts)?;
        SlotState::new(keys, values).map_err(|error| error.to_string())
    }

    fn left(&self, x: SlotQkv<'_, T>, zero: &SlotState, needed: bool) -> Result<Parts, String> {
        checked(decays(x.log_decay, x.qkv.lengths, units(zero.values())), needed)
    }

    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        let slots = tokens.left[0].view();
        let keys = decayed(&before[0], slots, &tokens.own[0]);
        vec![keys, decayed(&before[1], slots.permuted_axes([0, 1, 3, 2]), &tokens.own[1])]
    }
}

impl<T: Stored> Travels<LevelQkv<'_, T>> for LogLinear {
    type Mechanism = Self;

    fn mechanism(&self) -> &Self {
        self
    }

    fn sizes(&self, zero: &LevelState) -> Vec<(&'static str, usize)> {
        let (_, heads, rows, value_dim) = zero.states().view().dim();
        vec![("heads", heads), ("weights: levels * head_dim", rows), ("v: value_dim", value_dim)]
    }

    /// Matrices, and counts in two numbers each.
    fn parts(&self, state: &LevelState) -> Parts {
        let tokens = state.tokens();
        let count = |(i, _, _, half): (usize, usize, usize, usize)| halves(tokens[i] as f64)[half];
        vec![given(state.states()), Array4::from_shape_fn((tokens.len(), 1, 1, 2), count)]
    }

    fn state(&self, mut parts: Parts) -> Result<LevelState, String> {
        let tokens: Vec<usize> =
            parts.split_off(1)[0].axis_iter(Axis(0)).map(|count| counted(count)).collect();
        LevelState::new(only(parts)?, &tokens).map_err(|error| error.to_string())
    }

    fn left(&self, x: LevelQkv<'_, T>, zero: &LevelState, needed: bool) -> Result<Parts, String> {
        let (dim, log_decay) = (x.qkv.k.dim().3, x.log_decay.insert_axis(Axis(3)));
        let mut left = checked(decays(log_decay, x.qkv.lengths, units(zero.states())), needed)?;
        // How many rows a level has goes along.
        left.push(Array4::from_elem((units(zero.states()).0, 1, 1, 1), dim as f32));
        Ok(left)
    }

    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        let mut own = tokens.own.clone();
        for (i, before_count) in before[1].axis_iter(Axis(0)).enumerate() {
            let (from, to) = (counted(before_count), counted(own[1].index_axis(Axis(0), i)));
            let dim = tokens.left[1][[i, 0, 0, 0]] as usize;
            for bit in (0..usize::BITS as usize).filter(|bit| from >> bit & 1 == 1) {
                // The first token of the node, and the node of later ones that it is in.
                let first = from >> bit >> 1 << bit << 1;
                let Some(level) = (first ^ to).checked_ilog2() else { continue };
                let rows = |level: usize| level * dim..(level + 1) * dim;
                let source = before[0].slice(s![i, .., rows(bit), ..]);
                let mut to = own[0].slice_mut(s![i, .., rows(level as usize), ..]);
                let factors = tokens.left[0].slice(s![i, .., .., ..]);
                for ((mut to, source), factor) in to.outer_iter_mut().zip(source.outer_iter()).zip(factors) {
                    if *factor != 0.0 {
                        to.zip_mut_with(&source, |to, &x| *to = factor.mul_add(x, *to));
                    }
                }
            }
        }
        own
    }

    fn check(&self, x: LevelQkv<'_, T>) -> Result<(), String> {
        match x.qkv.lengths {
            Lengths::Tokens(_) => Err("lengths: expected none, for levels hang on how many tokens all sequences have before those of a rank, got padding".to_owned()),
            _ => Ok(()),
        }
    }

    /// Levels are those of the whole sequence.
    fn begin(&self, parts: &mut Parts, tokens: usize) {
        let halves = halves(tokens as f64);
        parts[1].indexed_iter_mut().for_each(|((.., half), x)| *x = halves[half]);
    }
}

/// A count in two numbers.
fn counted(halves: ArrayView3<'_, f32>) -> usize {
    joined([halves[[0, 0, 0]], halves[[0, 0, 1]]]) as usize
}

impl<T: Stored> Travels<BasedInput<'_, T>> for Based {
    type Mechanism = Self;

    fn mechanism(&self) -> &Self {
        self
    }

    fn sizes(&self, zero: &BasedState) -> Vec<(&'static str, usize)> {
        let (_, heads, features, columns) = zero.global().view().dim();
        let ((_, k_heads, _, dim), (_, v_heads, _, value_dim)) = (zero.keys().dim(), zero.values().dim());
        vec![
            ("heads", heads),
            ("global: features", features),
            ("global: value_dim", columns),
            ("window: heads of keys", k_heads),
            ("window: heads of values", v_heads),
            ("window: head_dim", dim),
            ("window: value_dim", value_dim),
            ("left", self.left()),
        ]
    }

    fn parts(&self, state: &BasedState) -> Parts {
        vec![given(state.global()), state.keys().to_owned(), state.values().to_owned()]
    }

    fn state(&self, parts: Parts) -> Result<BasedState, String> {
        let [global, keys, values] = states(parts)?;
        BasedState::new(global, keys.into_inner(), values.into_inner()).map_err(|error| error.to_string())
    }

    fn left(&self, _: BasedInput<'_, T>, _: &BasedState, _: bool) -> Result<Parts, String> {
        Ok(Parts::new())
    }

    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        let window = |part: usize| {
            // The last rows are those of tokens.
            let own = tokens.own[part].view();
            let sent = own.dim().2;
            let own = own.slice_move(s![.., .., sent - tokens.tokens.min(sent).., ..]);
            let left = self.left().saturating_sub(own.dim().2).min(before[part].dim().2);
            let from = before[part].dim().2 - left;
            let kept = before[part].slice(s![.., .., from.., ..]);
            concatenate(Axis(2), &[kept, own]).unwrap_or_else(|_| own.to_owned())
        };
        vec![&before[0] + &tokens.own[0], window(1), window(2)]
    }

    /// Keys and values with rows before the first token, so that all ranks send as many.
    fn sent(&self, mut parts: Parts, _: &Parts, longest: usize) -> Parts {
        for part in &mut parts[1..] {
            let (batch, heads, kept, dim) = part.dim();
            let mut rows = Array4::zeros((batch, heads, self.left().min(longest).max(kept), dim));
            let first = rows.dim().2 - kept;
            rows.slice_mut(s![.., .., first.., ..]).assign(part);
            *part = rows;
        }
        parts
    }
}

/// Parts of a state that turns: its matrix, angles, last keys and value.
fn of_turning(state: &Mamba3State) -> Parts {
    let [angles, key, value] = state.rest();
    vec![given(state.state()), given(angles), given(key), given(value)]
}

fn turning(parts: Parts) -> Result<Mamba3State, String> {
    let [state, angles, key, value] = states(parts)?;
    Mamba3State::new(state, angles, key, value).map_err(|error| error.to_string())
}

fn turning_sizes(zero: &Mamba3State) -> Vec<(&'static str, usize)> {
    let (_, heads, dim, value_dim) = zero.state().view().dim();
    let [angles, key, _] = zero.rest();
    let (pairs, ranks) = (angles.view().dim().3, key.view().dim().2);
    vec![
        ("heads", heads),
        ("k: head_dim", dim),
        ("v: value_dim", value_dim),
        ("angle: pairs", pairs),
        ("k: of a token", ranks),
    ]
}

/// Of each head what is left of a matrix, what of the last key and value is added to it, and
/// whether there are tokens at all.
fn left_of_turning(
    [log_decay, step, trap]: [ArrayView3<'_, f32>; 3],
    lengths: Lengths<'_>,
    zero: &Mamba3State,
    needed: bool,
) -> Result<Parts, String> {
    let (sequences, heads) = units(zero.state());
    let factors = decays(log_decay.insert_axis(Axis(3)), lengths, (sequences, heads));
    let left = Array4::from_shape_fn((sequences, heads, 1, 3), |(i, h, _, which)| {
        let rows = rows_of(lengths, step.dim().2, i);
        let batch = if matches!(lengths, Lengths::Packed { .. }) { 0 } else { i };
        let first =
            |x: ArrayView3<'_, f32>| f64::from(x[[batch, h / (heads / x.dim().1.max(1)).max(1), rows.start]]);
        match which {
            0 => factors[[i, h, 0, 0]],
            _ if rows.is_empty() => 0.0,
            1 => (first(step) / (1.0 + first(trap).exp()) * f64::from(factors[[i, h, 0, 0]])) as f32,
            _ => 1.0,
        }
    });
    let some = left.slice(s![.., .., .., 2..]).to_owned();
    let mut left = checked(left, needed)?;
    // Whether there are tokens is known whatever they are.
    left[0].slice_mut(s![.., .., .., 2..]).assign(&some);
    Ok(left)
}

/// Turns pairs of the rows of a matrix by angles, two numbers each.
fn turn(mut rows: ArrayViewMut2<'_, f32>, angles: ArrayView2<'_, f32>, layout: Pairs) {
    let half = rows.dim().0 / 2;
    for (p, angle) in angles.axis_iter(Axis(1)).enumerate() {
        let (a, b) = if layout == Pairs::Neighbours { (2 * p, 2 * p + 1) } else { (p, p + half) };
        let (sin, cos) = joined([angle[0], angle[1]]).sin_cos();
        for column in 0..rows.dim().1 {
            let (x, y) = (f64::from(rows[[a, column]]), f64::from(rows[[b, column]]));
            rows[[a, column]] = (x * cos - y * sin) as f32;
            rows[[b, column]] = (y * cos + x * sin) as f32;
        }
    }
}

/// The state after tokens, whose own one was made as if nothing had turned before.
fn turned(
    before: &Parts,
    tokens: &Segment,
    layout: Pairs,
    gain: impl Fn(usize, usize, usize) -> f32,
) -> Parts {
    let [mut state, mut angles, mut key, mut value] = [0, 1, 2, 3].map(|part| before[part].clone());
    for ((i, h), _) in ndarray::Array2::<()>::default((state.dim().0, state.dim().1)).indexed_iter() {
        let left = [0, 1, 2].map(|which| tokens.left[0][[i, h, 0, which]]);
        if left[2] == 0.0 {
            continue;
        }
        let at = s![i, h, .., ..];
        let mut sums = tokens.own[0].slice(at).to_owned();
        turn(sums.view_mut(), before[1].slice(at), layout);
        let keys = before[2].slice(at);
        for ((d, c), sum) in sums.indexed_iter_mut() {
            let last = before[3][[i, h, 0, c]];
            let share: f32 =
                keys.column(d).iter().enumerate().map(|(rank, key)| key * gain(h, rank, c) * last).sum();
            let stays = if left[0] == 0.0 { 0.0 } else { left[0] * before[0][[i, h, d, c]] };
            *sum += stays + left[1] * share;
        }
        state.slice_mut(at).assign(&sums);
        let mut keys = tokens.own[2].slice(at).reversed_axes().to_owned();
        turn(keys.view_mut(), before[1].slice(at), layout);
        key.slice_mut(at).assign(&keys.t());
        value.slice_mut(at).assign(&tokens.own[3].slice(at));
        for p in 0..angles.dim().3 {
            let of = |x: &Array4<f32>| joined([x[[i, h, 0, p]], x[[i, h, 1, p]]]);
            let angle = of(&before[1]) + of(&tokens.own[1]);
            let [high, low] = halves(angle - TAU * (angle / TAU).round());
            (angles[[i, h, 0, p]], angles[[i, h, 1, p]]) = (high, low);
        }
    }
    vec![state, angles, key, value]
}

impl<T: Stored> Travels<Mamba3Qkv<'_, T>> for Mamba3 {
    type Mechanism = Self;

    fn mechanism(&self) -> &Self {
        self
    }

    fn sizes(&self, zero: &Mamba3State) -> Vec<(&'static str, usize)> {
        turning_sizes(zero)
    }

    fn parts(&self, state: &Mamba3State) -> Parts {
        of_turning(state)
    }

    fn state(&self, parts: Parts) -> Result<Mamba3State, String> {
        turning(parts)
    }

    fn left(&self, x: Mamba3Qkv<'_, T>, zero: &Mamba3State, needed: bool) -> Result<Parts, String> {
        left_of_turning([x.log_decay, x.step, x.trap], x.qkv.lengths, zero, needed)
    }

    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        turned(before, tokens, Pairs::Neighbours, |_, _, _| 1.0)
    }
}

impl<T: Stored> Travels<Mamba3MimoInput<'_, T>> for Mamba3Mimo {
    type Mechanism = Self;

    fn mechanism(&self) -> &Self {
        self
    }

    fn sizes(&self, zero: &Mamba3State) -> Vec<(&'static str, usize)> {
        turning_sizes(zero)
    }

    fn parts(&self, state: &Mamba3State) -> Parts {
        of_turning(state)
    }

    fn state(&self, parts: Parts) -> Result<Mamba3State, String> {
        turning(parts)
    }

    fn left(&self, x: Mamba3MimoInput<'_, T>, zero: &Mamba3State, needed: bool) -> Result<Parts, String> {
        left_of_turning([x.log_decay, x.step, x.trap], x.lengths, zero, needed)
    }

    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        let (ranks, dim) = (before[2].dim().2, before[3].dim().3);
        let gains = self.value_weights();
        turned(before, tokens, self.pairs(), |h, rank, c| match &gains {
            Some(gains) => gains[[h, rank * dim + c]],
            None => 1.0 / ranks as f32,
        })
    }
}

impl<T: Stored> Travels<AarenInput<'_, T>> for Aaren {
    type Mechanism = Self;

    fn mechanism(&self) -> &Self {
        self
    }

    fn sizes(&self, zero: &State) -> Vec<(&'static str, usize)> {
        let (_, heads, _, columns) = zero.view().dim();
        vec![("heads", heads), ("v: value_dim", columns.saturating_sub(2))]
    }

    fn parts(&self, state: &State) -> Parts {
        vec![given(state)]
    }

    fn state(&self, parts: Parts) -> Result<State, String> {
        only(parts)
    }

    fn left(&self, _: AarenInput<'_, T>, _: &State, _: bool) -> Result<Parts, String> {
        Ok(Parts::new())
    }

    /// Two softmax states, relative to the larger of their largest scores.
    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        let mut all = before[0].clone();
        let n = all.dim().3.saturating_sub(2);
        for (mut all, own) in all.rows_mut().into_iter().zip(tokens.own[0].rows()) {
            if own[n] == 0.0 {
                continue;
            }
            if all[n] == 0.0 {
                all.assign(&own);
                continue;
            }
            let most = all[n + 1].max(own[n + 1]);
            let [old, new] = [all[n + 1], own[n + 1]].map(|score| (score - most).exp());
            all.zip_mut_with(&own, |x, own| *x = old * *x + new * own);
            all[n + 1] = most;
        }
        vec![all]
    }
}
