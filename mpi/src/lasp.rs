//! LASP-2: a recurrence over a sequence that is cut over ranks, with one all-gather of
//! states.
//!
//! ```text
//! every rank   M_r = state after its own tokens, from zero      P_r = what they make of a state before
//! gather       (M_r, P_r)
//! every rank   S = P_{r-1} (... (P_1 M_0 + M_1) ...) + M_{r-1}  and the outputs of its tokens, from S
//! ```
//!
//! "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid" (arXiv
//! 2502.07563), which has no decay: `P` is 1 there. With decays it is a number for each
//! channel, with a delta rule a matrix; both are the recurrence itself over values of 0,
//! from ones and from the identity. States are folded from the first rank on, never by
//! differences, so that a log decay of -inf forgets exactly.
//!
//! A rank sends `4 (ranks - 1) heads state_dim (value_dim + 1)` bytes a sequence, with a
//! matrix `4 (ranks - 1) heads state_dim (value_dim + state_dim)`, however long the sequence
//! is. The state of its own tokens takes a rank [less than half](Recurrent::advance_into) of
//! what these take once more for outputs, and with fixed decays only the tokens that a state
//! still has anything of: the longer the sequence, the less. Backwards it is the same with
//! the [gradient of the state](BackwardState::backward_state_into).

use attention_kernels::linear::{
    Carried, ChannelGated, CombaQkv, DeltaProductInput, DeltaQkv, GatedDelta2Qkv, GatedDeltaQkv, Hgrn2Input,
    KdaQkv, Mamba2Input, Rwkv7Input, S6Input, State, TokenGated,
};
use attention_kernels::{Backward, BackwardState, Input, Qkv, Recurrent};
use ndarray::{Array4, ArrayView4, ShapeBuilder, s};

use crate::error::Result;
use crate::ring::same;
use crate::stored::{Stored, pack, unpack};
use crate::wire::Group;

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
}

/// Zeros in place of an array `[batch, heads, len, value_dim]`, or that array if they are
/// more than can be counted.
fn zeros<'a, T: Stored>(of: ArrayView4<'a, T>, value_dim: usize) -> ArrayView4<'a, T> {
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
    Qkv: v;
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

impl<T: Stored> Silenced for S6Input<'_, T> {
    /// Its steps have the same dimension: `value_dim` is theirs.
    fn silenced(self, _: usize) -> Self {
        Self { u: zeros(self.u, self.u.dim().3), ..self }
    }
}

/// Tokens as a map of states: `S -> P S + M`.
struct Segment {
    m: Array4<f32>,
    p: Option<Array4<f32>>,
    /// Whether anything of `S` is left: no sequence ends among the tokens.
    passes: bool,
}

impl Segment {
    /// The state after these tokens, given that before; or the gradient of the one before,
    /// given that after.
    fn apply(&self, s: &Array4<f32>, transition: Transition, transposed: bool) -> Array4<f32> {
        if !self.passes {
            return self.m.clone();
        }
        carry(self.p.as_ref(), s, transition, transposed) + &self.m
    }
}

/// `P S`, or its transpose times a gradient.
fn carry(p: Option<&Array4<f32>>, s: &Array4<f32>, transition: Transition, transposed: bool) -> Array4<f32> {
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

/// What a rank has of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed<T> {
    /// `[batch, heads, held, value_dim]`.
    pub out: Array4<T>,
    /// The states before the first tokens of this rank: what [`backward`] starts from.
    pub before: State,
    /// The state after the last token of all, the same on every rank.
    pub last: State,
}

/// Outputs of this rank's tokens, which follow those of all lower ranks: causal, the masked
/// form of the paper. Any number of tokens, none too.
///
/// `transition` says what there is besides addition: one that says too little gives another
/// result, one that says too much costs bytes. Mechanisms whose state has a column for the
/// sum of weights are `Additive`.
///
/// # Errors
/// The same on all ranks: the lowest one whose input does not fit, or whose tokens leave a
/// state that is not finite.
pub fn forward<T, X, M>(group: &Group, mechanism: &M, x: X, transition: Transition) -> Result<Mixed<T>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: Recurrent<X, State = State>,
{
    run(group, mechanism, x, transition, Borders::None)
}

/// [`forward`] of packed sequences, wherever ranks are cut: `x` is packed with this rank's
/// part of the offsets, as [`Cut::sequences`](crate::plan::Cut::sequences) has them, and
/// `continues` says whether its first sequence is the last one of the tokens before.
/// [`Mixed::before`] is 0 for the others, and [`Mixed::last`] that of the last sequence.
///
/// # Errors
/// As [`forward`].
pub fn forward_packed<T, X, M>(
    group: &Group,
    mechanism: &M,
    x: X,
    transition: Transition,
    continues: bool,
) -> Result<Mixed<T>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: Recurrent<X, State = State>,
{
    run(group, mechanism, x, transition, Borders::Packed { continues })
}

/// Which states of a rank's sequences come from the rank before and go to the one after.
#[derive(Clone, Copy)]
enum Borders {
    /// All: no sequence begins or ends here.
    None,
    /// That of the first sequence, if it has begun before, and that of the last.
    Packed { continues: bool },
}

impl Borders {
    /// Whether a state goes through, of so many sequences.
    fn passes(self, sequences: usize) -> bool {
        match self {
            Self::None => true,
            Self::Packed { continues } => continues && sequences == 1,
        }
    }

    /// The state that comes in, or goes out at the `end`.
    fn of(self, states: ArrayView4<'_, f32>, end: bool) -> Array4<f32> {
        let sequences = states.dim().0;
        match self {
            Self::None => states.to_owned(),
            Self::Packed { .. } => states.slice(s![self.at(sequences, end), .., .., ..]).to_owned(),
        }
    }

    fn at(self, sequences: usize, end: bool) -> std::ops::Range<usize> {
        match self {
            Self::None => 0..sequences,
            Self::Packed { .. } if end => sequences.saturating_sub(1)..sequences,
            Self::Packed { .. } => 0..sequences.min(1),
        }
    }

    /// States of 0 but for the one that comes in, or out at the `end`.
    fn put(self, state: &Array4<f32>, zero: &State, end: bool) -> Array4<f32> {
        let mut states = zero.view().to_owned();
        let taken = end || !matches!(self, Self::Packed { continues: false });
        if taken {
            let at = self.at(states.dim().0, end);
            states.slice_mut(s![at, .., .., ..]).assign(state);
        }
        states
    }
}

fn run<T, X, M>(
    group: &Group,
    mechanism: &M,
    x: X,
    transition: Transition,
    borders: Borders,
) -> Result<Mixed<T>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: Recurrent<X, State = State>,
{
    const CALL: &str = "LASP-2 forward";
    let zero = mechanism.initial_state(x).map_err(|error| error.to_string());
    let passes = agree(group, CALL, &zero, transition, borders)?;
    let zero = zero.unwrap_or_else(|_| unreachable_state());
    let (me, last) = (group.rank(), group.size() - 1);
    let mut said = Ok(());
    let mut state = zero.clone();
    // The last rank has nobody after it: it only waits.
    if me < last {
        said = mechanism.advance(x, &mut state).map_err(|error| error.to_string());
        said = said.and_then(|()| finite(state.view()));
    }
    let p = if me == 0 || me == last || !passes[me] {
        Ok(None)
    } else {
        transition_of(mechanism, x, &zero, transition)
    };
    let mine = borders.of(state.view(), true);
    let segments = all(group, mine, transition, p, &passes, &mut said);
    let mut before = borders.of(zero.view(), false);
    for segment in segments.iter().take(me) {
        before = segment.apply(&before, transition, false);
    }
    let done = said.and_then(|()| {
        let before = State::new(borders.put(&before, &zero, false)).map_err(|error| error.to_string())?;
        let mut after = before.clone();
        let out = mechanism.prefill(x, &mut after).map_err(|error| error.to_string())?;
        finite(after.view())?;
        Ok((out, before, after))
    });
    let (out, before, after) = group.close(CALL, done)?;
    let last = share_last(group, borders.of(after.view(), true))?;
    Ok(Mixed { out, before, last })
}

fn finite(state: ArrayView4<'_, f32>) -> Result<(), String> {
    match state.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(format!("x: expected tokens that leave a finite state, got {x} in it")),
        None => Ok(()),
    }
}

/// The unmasked form: every token reads the state after all tokens, of all ranks. For
/// mechanisms that add and neither decay nor divide by the sum of their weights.
///
/// # Errors
/// As [`forward`].
pub fn forward_unmasked<T, X, M>(group: &Group, mechanism: &M, x: X) -> Result<Array4<T>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: Recurrent<X, State = State>,
{
    const CALL: &str = "LASP-2 unmasked";
    let zero = mechanism.initial_state(x).map_err(|error| error.to_string());
    let passes = agree(group, CALL, &zero, Transition::Additive, Borders::None)?;
    let zero = zero.unwrap_or_else(|_| unreachable_state());
    let mut state = zero.clone();
    let mut said = mechanism.advance(x, &mut state).map_err(|error| error.to_string());
    said = said.and_then(|()| finite(state.view()));
    let segments = all(group, state.into_inner(), Transition::Additive, Ok(None), &passes, &mut said);
    let mut sum = zero.into_inner();
    for segment in &segments {
        sum = segment.apply(&sum, Transition::Additive, false);
    }
    let value_dim = sum.dim().3;
    let out = said.and_then(|()| {
        let mut state = State::new(sum).map_err(|error| error.to_string())?;
        // Values of 0 add nothing: queries read.
        mechanism.prefill(x.silenced(value_dim), &mut state).map_err(|error| error.to_string())
    });
    group.close(CALL, out)
}

/// Gradients of this rank's input, given that of its output and the state before its first
/// token, [`Mixed::before`]; one more all-gather, of gradients of states.
///
/// # Errors
/// As [`forward`], and for what the mechanism refuses.
pub fn backward<T, X, M>(
    group: &Group,
    mechanism: &M,
    x: X,
    transition: Transition,
    d_out: ArrayView4<'_, f32>,
    before: &State,
) -> Result<<M as Backward<X>>::Gradients<f32>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: BackwardState<X> + for<'c> Backward<X, Carried<'c> = Carried<'c>>,
{
    run_back(group, mechanism, x, transition, (d_out, before), Borders::None)
}

/// [`backward`] of what [`forward_packed`] gave.
///
/// # Errors
/// As [`backward`].
pub fn backward_packed<T, X, M>(
    group: &Group,
    mechanism: &M,
    x: X,
    transition: Transition,
    continues: bool,
    d_out: ArrayView4<'_, f32>,
    before: &State,
) -> Result<<M as Backward<X>>::Gradients<f32>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: BackwardState<X> + for<'c> Backward<X, Carried<'c> = Carried<'c>>,
{
    run_back(group, mechanism, x, transition, (d_out, before), Borders::Packed { continues })
}

fn run_back<T, X, M>(
    group: &Group,
    mechanism: &M,
    x: X,
    transition: Transition,
    (d_out, before): (ArrayView4<'_, f32>, &State),
    borders: Borders,
) -> Result<<M as Backward<X>>::Gradients<f32>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: BackwardState<X> + for<'c> Backward<X, Carried<'c> = Carried<'c>>,
{
    const CALL: &str = "LASP-2 backward";
    let zero = mechanism.initial_state(x).map_err(|error| error.to_string());
    let passes = agree(group, CALL, &zero, transition, borders)?;
    let zero = zero.unwrap_or_else(|_| unreachable_state());
    let (me, last, mut said) = (group.rank(), group.size() - 1, Ok(()));
    let mut mine = borders.of(zero.view(), false);
    // The first rank has nobody before it, nor has a sequence that begins here.
    if me > 0 && !matches!(borders, Borders::Packed { continues: false }) {
        match mechanism.backward_state(x, d_out, None) {
            Ok(d_state) => mine = borders.of(d_state.view(), false),
            Err(error) => said = Err(error.to_string()),
        }
    }
    let p = if me == 0 || me == last || !passes[me] {
        Ok(None)
    } else {
        transition_of(mechanism, x, &zero, transition)
    };
    let segments = all(group, mine, transition, p, &passes, &mut said);
    let mut d_after = borders.of(zero.view(), true);
    for segment in segments.iter().skip(me + 1).rev() {
        d_after = segment.apply(&d_after, transition, true);
    }
    let d_after = borders.put(&d_after, &zero, true);
    let done = said.and_then(|()| {
        let carried = Carried { state: Some(before), d_state: Some(d_after.view()) };
        mechanism.backward(x, d_out, carried).map_err(|error| error.to_string())
    });
    group.close(CALL, done)
}

/// Stands for one that an agreement has refused.
fn unreachable_state() -> State {
    State::new(Array4::zeros((0, 0, 0, 0))).unwrap_or_else(|_| unreachable!("no numbers are finite"))
}

/// Whether all ranks are at the same call with states that go together; of each, whether a
/// state passes its tokens.
fn agree(
    group: &Group,
    call: &'static str,
    zero: &Result<State, String>,
    transition: Transition,
    borders: Borders,
) -> Result<Vec<bool>> {
    let mine = zero.as_ref().map_err(Clone::clone).and_then(|zero| {
        let (sequences, heads, rows, columns) = zero.view().dim();
        let (packed, on_the_wire) = match borders {
            Borders::None => (0, sequences),
            Borders::Packed { .. } if sequences == 0 => {
                return Err("offsets: expected a sequence, be it of no tokens, got none".to_owned());
            }
            Borders::Packed { .. } => (1, 1),
        };
        let passes = usize::from(borders.passes(sequences));
        let sizes = [on_the_wire, heads, rows, columns, transition as usize, packed, passes];
        Ok(sizes.map(|x| x as u64).to_vec())
    });
    let names = ["sequences", "heads", "k: state_dim", "v: value_dim", "transition", "packed"];
    let all = group.agree(call, mine)?;
    same(&all, &names)?;
    Ok(all.iter().map(|theirs| theirs.last() == Some(&1)).collect())
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

/// The segments of all ranks.
fn all(
    group: &Group,
    mine: Array4<f32>,
    transition: Transition,
    p: Result<Option<Array4<f32>>, String>,
    passes: &[bool],
    said: &mut Result<(), String>,
) -> Vec<Segment> {
    let dim = mine.dim();
    let p_dim = p_dim(dim, transition);
    let p = p.unwrap_or_else(|message| {
        if said.is_ok() {
            *said = Err(message);
        }
        None
    });
    let mut bytes = Vec::new();
    pack(mine.view(), &mut bytes);
    pack(p.unwrap_or_else(|| Array4::zeros(p_dim)).view(), &mut bytes);
    let lengths = vec![bytes.len(); group.size()];
    let unpacked = |(bytes, &passes): (&Vec<u8>, &bool)| {
        let mut bytes = &bytes[..];
        let m = unpack(&mut bytes, dim);
        let p = (transition != Transition::Additive).then(|| unpack(&mut bytes, p_dim));
        Segment { m, p, passes }
    };
    group.gather(&bytes, &lengths).iter().zip(passes).map(unpacked).collect()
}

/// The state of the last rank, on all.
fn share_last(group: &Group, mine: Array4<f32>) -> Result<State> {
    let (me, last) = (group.rank(), group.size() - 1);
    let mut bytes = Vec::new();
    pack(mine.view(), &mut bytes);
    let mut lengths = vec![0; group.size()];
    lengths[last] = bytes.len();
    let out: &[u8] = if me == last { &bytes } else { &[] };
    let all = group.gather(out, &lengths);
    let state = unpack(&mut &all[last][..], mine.dim());
    group.close("LASP-2 last state", State::new(state).map_err(|error| error.to_string()))
}
