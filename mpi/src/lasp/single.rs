//! States of one matrix: their transitions are what the recurrence itself makes of them
//! over values of 0.

use attention_kernels::input::Lengths;
use attention_kernels::linear::{
    ChannelGated, CombaQkv, DeltaProductInput, DeltaQkv, GatedDelta2Qkv, GatedDeltaQkv, Hgrn2Input, KdaQkv,
    Mamba2Input, Rwkv7Input, S6Input, State, TokenGated,
};
use attention_kernels::{Input, Qkv, Recurrent};
use ndarray::{Array4, ArrayView4, ShapeBuilder, s};

use super::{Parts, Segment, Travels};
use crate::stored::Stored;

type Dim = (usize, usize, usize, usize);

/// What the tokens of a rank make of a state that comes before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Nothing: states add up. Mechanisms without decay.
    Additive,
    /// A factor for each row of the state. Decays, of heads, tokens or channels of keys.
    Rows,
    /// A factor for each number of the state. Scans whose channels have steps of their own.
    Elements,
    /// A matrix. Delta rules.
    Matrix,
}

/// Inputs of recurrences whose values can be set to 0.
pub trait Silenced: Input {
    /// The same with values of 0, of another dimension where nothing else has the old one.
    fn silenced(self, value_dim: usize) -> Self;

    /// The same queries without keys and values, for mechanisms that do not need one each.
    fn keyless(self) -> Option<Self> {
        None
    }
}

/// Zeros in place of an array `[batch, heads, len, value_dim]`, or that array if they are
/// more than can be counted.
pub(super) fn zeros<'a, T: Stored>(of: ArrayView4<'a, T>, value_dim: usize) -> ArrayView4<'a, T> {
    let (batch, heads, len, _) = of.dim();
    let dim = (batch, heads, len, value_dim).strides((0, 0, 0, 0));
    // One number stands for all of them.
    ArrayView4::from_shape(dim, T::zero()).unwrap_or(of)
}

macro_rules! silenced {
    ($($input:ident: $($array:ident)+;)+) => {$(
        impl<'a, T: Stored> Silenced for $input<'a, T> {
            fn silenced(self, value_dim: usize) -> Self {
                Self { $($array: zeros(self.$array, value_dim),)+ ..self }
            }
        }
    )+};
    (of $($input:ident: $qkv:ident $($array:ident)?;)+) => {$(
        impl<T: Stored> Silenced for $input<'_, T> {
            fn silenced(self, value_dim: usize) -> Self {
                Self {
                    $qkv: self.$qkv.silenced(value_dim),
                    $($array: zeros(self.$array, value_dim),)?
                    ..self
                }
            }
        }
    )+};
}
silenced! {
    Mamba2Input: x;
    Hgrn2Input: v;
    DeltaProductInput: v;
}
silenced! {
    of TokenGated: qkv;
    ChannelGated: qkv;
    DeltaQkv: qkv;
    GatedDeltaQkv: qkv;
    GatedDelta2Qkv: qkv write;
    KdaQkv: qkv;
    CombaQkv: qkv;
    Rwkv7Input: rkv;
}

impl<T: Stored> Silenced for Qkv<'_, T> {
    fn silenced(self, value_dim: usize) -> Self {
        Self { v: zeros(self.v, value_dim), ..self }
    }

    fn keyless(self) -> Option<Self> {
        let Self { k, v, lengths, .. } = self;
        if lengths != Lengths::Full {
            return None;
        }
        Some(Self { k: none(k), v: none(v), ..self })
    }
}

/// No rows.
fn none<T>(x: ArrayView4<'_, T>) -> ArrayView4<'_, T> {
    x.slice_move(s![.., .., ..0, ..])
}

impl<T: Stored> Silenced for S6Input<'_, T> {
    /// Its steps have the same dimension: `value_dim` is theirs.
    fn silenced(self, _: usize) -> Self {
        Self { u: zeros(self.u, self.u.dim().3), ..self }
    }
}

/// A mechanism with a transition.
pub(super) struct Single<'m, M> {
    pub(super) mechanism: &'m M,
    pub(super) transition: Transition,
}

impl<X, M> Travels<X> for Single<'_, M>
where
    X: Silenced,
    M: Recurrent<X, State = State>,
{
    type Mechanism = M;

    fn mechanism(&self) -> &M {
        self.mechanism
    }

    fn sizes(&self, zero: &State) -> Vec<(&'static str, usize)> {
        let (_, heads, rows, columns) = zero.view().dim();
        let of = [("heads", heads), ("k: state_dim", rows), ("v: value_dim", columns)];
        of.into_iter().chain([("transition", self.transition as usize)]).collect()
    }

    fn parts(&self, state: &State) -> Parts {
        vec![state.view().to_owned()]
    }

    fn state(&self, parts: Parts) -> Result<State, String> {
        only(parts)
    }

    fn left(&self, x: X, zero: &State, needed: bool) -> Result<Parts, String> {
        if needed {
            return Ok(transition_of(self.mechanism, x, zero, self.transition)?.into_iter().collect());
        }
        let none = self.transition == Transition::Additive;
        Ok((!none).then(|| Array4::zeros(p_dim(zero.view().dim(), self.transition))).into_iter().collect())
    }

    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        vec![carry(tokens.left.first(), &before[0], self.transition, false) + &tokens.own[0]]
    }
}

/// The state of one part.
pub(super) fn only(mut parts: Parts) -> Result<State, String> {
    let part = parts.pop().unwrap_or_else(|| Array4::zeros((0, 0, 0, 0)));
    State::new(part).map_err(|error| error.to_string())
}

/// `P S`, or its transpose times a gradient.
pub(super) fn carry(
    p: Option<&Array4<f32>>,
    s: &Array4<f32>,
    transition: Transition,
    transposed: bool,
) -> Array4<f32> {
    let Some(p) = p else { return s.clone() };
    if transition != Transition::Matrix {
        let Some(p) = p.broadcast(s.dim()) else { return s.clone() };
        // A factor of 0 forgets whatever there is.
        return ndarray::Zip::from(s).and(p).map_collect(|&x, &p| if p == 0.0 { 0.0 } else { p * x });
    }
    let mut out = Array4::zeros(s.dim());
    for (b, h) in ndarray::indices((s.dim().0, s.dim().1)) {
        let p = p.slice(s![b, h, .., ..]);
        let s = s.slice(s![b, h, .., ..]);
        let product = if transposed { p.t().dot(&s) } else { p.dot(&s) };
        out.slice_mut(s![b, h, .., ..]).assign(&product);
    }
    out
}

/// What the tokens make of states before them.
fn transition_of<X, M>(
    mechanism: &M,
    x: X,
    zero: &State,
    transition: Transition,
) -> Result<Option<Array4<f32>>, String>
where
    X: Silenced,
    M: Recurrent<X, State = State>,
{
    let (sequences, heads, rows, columns) = zero.view().dim();
    let wanted = p_dim((sequences, heads, rows, columns), transition);
    // One column stands for all, unless the mechanism has parameters of columns.
    let ones = |columns| Array4::ones((sequences, heads, rows, columns));
    let (values, start) = match transition {
        Transition::Additive => return Ok(None),
        Transition::Rows if mechanism.initial_state(x.silenced(1)).is_ok() => (1, ones(1)),
        Transition::Rows | Transition::Elements => (columns, ones(columns)),
        Transition::Matrix => {
            let one = |(_, _, i, j)| if i == j { 1.0 } else { 0.0 };
            (rows, Array4::from_shape_fn(wanted, one))
        }
    };
    let mut state = State::new(start).map_err(|error| error.to_string())?;
    mechanism.advance(x.silenced(values), &mut state).map_err(|error| error.to_string())?;
    Ok(Some(state.into_inner().slice_move(s![.., .., .., ..wanted.3])))
}

/// Sizes of what tokens make of a state of these.
fn p_dim((sequences, heads, rows, columns): Dim, transition: Transition) -> Dim {
    let wide = match transition {
        Transition::Additive => 0,
        Transition::Rows => columns.min(1),
        Transition::Elements => columns,
        Transition::Matrix => rows,
    };
    (sequences, heads, rows, wide)
}
