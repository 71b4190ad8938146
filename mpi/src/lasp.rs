//! LASP-2: a recurrence over a sequence that is cut over ranks, with one all-gather of
//! states.
//!
//! ```text
//! every rank   M_r = state after its own tokens, from zero      P_r = what they make of a state before
//! gather       (M_r, P_r)
//! every rank   S = P_{r-1} (... (P_1 M_0 + M_1) ...) + M_{r-1}  and its tokens once more, from S
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
//! is. The first rank and the last one work their tokens off once, those between twice: for
//! their state, and again from that of the tokens before. So two ranks are no faster than
//! one, whose second rank waits for the first; what grows is how long a sequence may be.

use attention_kernels::linear::{Carried, ChannelGated, DeltaQkv, GatedDeltaQkv, KdaQkv, State, TokenGated};
use attention_kernels::{Backward, Input, Qkv, Recurrent};
use ndarray::{Array4, ArrayView4, Axis, ShapeBuilder};

use crate::error::Result;
use crate::ring::same;
use crate::stored::{Stored, pack, unpack};
use crate::wire::Group;

/// What the tokens of a rank make of a state that comes before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Nothing: states add up. Mechanisms without decay.
    Additive,
    /// A factor for each row of the state. Decays, of heads, tokens or channels.
    Rows,
    /// A matrix. Delta rules.
    Matrix,
}

/// Inputs of recurrences whose values can be set to 0.
pub trait Silenced: Input {
    /// The same with values of 0, of another dimension.
    fn silenced(self, value_dim: usize) -> Self;
}

impl<'a, T: Stored> Silenced for Qkv<'a, T> {
    fn silenced(self, value_dim: usize) -> Self {
        let (batch, heads, len, _) = self.v.dim();
        let dim = (batch, heads, len, value_dim).strides((0, 0, 0, 0));
        // One number stands for all of them.
        let Ok(zeros) = ArrayView4::<'a, T>::from_shape(dim, T::zero()) else { return self };
        Self { v: zeros, ..self }
    }
}

macro_rules! silenced {
    ($($input:ident),+) => {$(
        impl<T: Stored> Silenced for $input<'_, T> {
            fn silenced(self, value_dim: usize) -> Self {
                Self { qkv: self.qkv.silenced(value_dim), ..self }
            }
        }
    )+};
}
silenced!(TokenGated, ChannelGated, DeltaQkv, GatedDeltaQkv, KdaQkv);

/// A rank's tokens as a map of states: `S -> P S + M`.
struct Segment {
    m: Array4<f32>,
    p: Option<Array4<f32>>,
}

impl Segment {
    /// The state after these tokens, given that before.
    fn after(&self, before: &Array4<f32>) -> Array4<f32> {
        let mut after = carry(self.p.as_ref(), before, false);
        after += &self.m;
        after
    }
}

/// `P S`, or its transpose times a gradient.
fn carry(p: Option<&Array4<f32>>, s: &Array4<f32>, transposed: bool) -> Array4<f32> {
    let Some(p) = p else { return s.clone() };
    if p.dim().3 == 1 {
        // A factor of 0 forgets whatever there is.
        let mut out = s.clone();
        ndarray::Zip::from(out.rows_mut()).and(p.index_axis(Axis(3), 0)).for_each(|mut row, &p| {
            row.mapv_inplace(|x| if p == 0.0 { 0.0 } else { p * x });
        });
        return out;
    }
    let mut out = Array4::zeros(s.dim());
    for (b, h) in ndarray::indices((s.dim().0, s.dim().1)) {
        let p = p.slice(ndarray::s![b, h, .., ..]);
        let s = s.slice(ndarray::s![b, h, .., ..]);
        let product = if transposed { p.t().dot(&s) } else { p.dot(&s) };
        out.slice_mut(ndarray::s![b, h, .., ..]).assign(&product);
    }
    out
}

/// What a rank has of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed<T> {
    /// `[batch, heads, held, value_dim]`.
    pub out: Array4<T>,
    /// The state before the first token of this rank: what [`backward`] starts from.
    pub before: State,
    /// The state after the last token of all, the same on every rank.
    pub last: State,
}

/// Outputs of this rank's tokens, which follow those of all lower ranks: causal, the masked
/// form of the paper. Any number of tokens, none too.
///
/// `transition` says what there is besides addition: one that says too little gives another
/// result, one that says too much costs bytes. Mechanisms whose state has a column for the
/// sum of weights, or whose tokens look at neighbours, are `Additive` at most if both hold
/// across calls: whatever [`Recurrent`] says with a state of [`State`].
///
/// # Errors
/// The same on all ranks: the lowest one whose input does not fit.
pub fn forward<T, X, M>(group: &Group, mechanism: &M, x: X, transition: Transition) -> Result<Mixed<T>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: Recurrent<X, State = State>,
{
    const CALL: &str = "LASP-2 forward";
    let zero = mechanism.initial_state(x).map_err(|error| error.to_string());
    agree(group, CALL, &zero, transition)?;
    let zero = zero.unwrap_or_else(|_| unreachable_state());
    let (me, last) = (group.rank(), group.size() - 1);
    let mut said = Ok(());
    let mut early = None;
    let mut mine = zero.view().to_owned();
    // The last rank has nobody after it: it only waits.
    if me < last || me == 0 {
        let mut state = zero.clone();
        match mechanism.prefill(x, &mut state) {
            Ok(out) => early = Some(out),
            Err(error) => said = Err(error.to_string()),
        }
        mine = state.into_inner();
    }
    let p = if me == 0 || me == last { Ok(None) } else { transition_of(mechanism, x, &zero, transition) };
    let segments = all(group, &zero, transition, mine, p, &mut said);
    let mut before = zero.view().to_owned();
    for segment in segments.iter().take(me) {
        before = segment.after(&before);
    }
    let before = State::new(before).map_err(|error| error.to_string());
    let done = said.and(before).and_then(|before| {
        let (mut after, out) = (before.clone(), early.filter(|_| me == 0));
        let out = match out {
            Some(out) => {
                after = State::new(segments[0].m.clone()).map_err(|error| error.to_string())?;
                out
            }
            None => mechanism.prefill(x, &mut after).map_err(|error| error.to_string())?,
        };
        Ok((out, before, after))
    });
    let (out, before, after) = group.close(CALL, done)?;
    let last = share_last(group, after.into_inner())?;
    Ok(Mixed { out, before, last })
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
    agree(group, CALL, &zero, Transition::Additive)?;
    let zero = zero.unwrap_or_else(|_| unreachable_state());
    let (mut said, mut state) = (Ok(()), zero.clone());
    if let Err(error) = mechanism.prefill(x, &mut state) {
        said = Err(error.to_string());
    }
    let segments = all(group, &zero, Transition::Additive, state.into_inner(), Ok(None), &mut said);
    let mut sum = zero.into_inner();
    for segment in &segments {
        sum = segment.after(&sum);
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
/// `state` takes the gradient of the state at the start out of the mechanism's gradients:
/// `|gradients| gradients.state.clone()`.
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
    state: impl Fn(&<M as Backward<X>>::Gradients<f32>) -> Array4<f32>,
) -> Result<<M as Backward<X>>::Gradients<f32>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: Recurrent<X, State = State> + for<'c> Backward<X, Carried<'c> = Carried<'c>>,
{
    const CALL: &str = "LASP-2 backward";
    let zero = mechanism.initial_state(x).map_err(|error| error.to_string());
    agree(group, CALL, &zero, transition)?;
    let zero = zero.unwrap_or_else(|_| unreachable_state());
    let run = |d_state: Option<ArrayView4<'_, f32>>| {
        let carried = Carried { state: Some(before), d_state };
        mechanism.backward(x, d_out, carried).map_err(|error| error.to_string())
    };
    let (me, mut said) = (group.rank(), Ok(()));
    let (mine, early) = match run(None) {
        Ok(gradients) => (state(&gradients), Some(gradients)),
        Err(message) => {
            said = Err(message);
            (zero.view().to_owned(), None)
        }
    };
    let p = transition_of(mechanism, x, &zero, transition);
    let segments = all(group, &zero, transition, mine, p, &mut said);
    let mut d_after = zero.into_inner();
    for segment in segments.iter().skip(me + 1).rev() {
        d_after = carry(segment.p.as_ref(), &d_after, true) + &segment.m;
    }
    let last = me + 1 == group.size();
    let done = said.and_then(|()| match early.filter(|_| last) {
        Some(gradients) => Ok(gradients),
        None => run(Some(d_after.view())),
    });
    group.close(CALL, done)
}

/// LASP-2H: softmax layers of a hybrid. Keys and values of all ranks, gathered at once:
/// `(ranks - 1) (head_dim + value_dim) kv_heads held` elements a rank, in one step where
/// [`ring`](crate::ring) takes `ranks - 1`, but every rank holds them all.
///
/// `cut` says which tokens they are; the arrays come back in their order.
///
/// # Errors
/// The same on all ranks: the lowest one whose arrays do not fit.
pub fn gather<T: Stored>(
    group: &Group,
    cut: &crate::plan::Cut,
    name: &'static str,
    x: ArrayView4<'_, T>,
) -> Result<Array4<T>> {
    let (batch, heads, len, dim) = x.dim();
    let mine = if cut.ranks() != group.size() {
        Err(format!("cut: expected one for {} ranks, got {}", group.size(), cut.ranks()))
    } else if len != cut.held(group.rank()) {
        Err(format!("{name}: expected len {}, got {:?}", cut.held(group.rank()), x.shape()))
    } else {
        Ok(vec![batch as u64, heads as u64, dim as u64, T::ROUNDING.to_bits(), cut.fingerprint()])
    };
    same(&group.agree("LASP-2H gather", mine)?, &["batch", "heads", "dim", "type", "cut: fingerprint"])?;
    let mut out = Array4::from_elem((batch, heads, cut.tokens(), dim), T::default());
    let token = batch * heads * dim * size_of::<T>();
    let lengths: Vec<_> = (0..group.size()).map(|rank| cut.held(rank) * token).collect();
    let mut bytes = Vec::new();
    pack(x, &mut bytes);
    for (rank, bytes) in group.gather(&bytes, &lengths).iter().enumerate() {
        let part: Array4<T> = unpack(&mut &bytes[..], (batch, heads, cut.held(rank), dim));
        for (row, position) in cut.positions(rank).enumerate() {
            out.index_axis_mut(Axis(2), position).assign(&part.index_axis(Axis(2), row));
        }
    }
    Ok(out)
}

/// Stands for one that an agreement has refused.
fn unreachable_state() -> State {
    State::new(Array4::zeros((0, 0, 0, 0))).unwrap_or_else(|_| unreachable!("no numbers are finite"))
}

fn agree(
    group: &Group,
    call: &'static str,
    zero: &Result<State, String>,
    transition: Transition,
) -> Result<()> {
    let mine = zero.as_ref().map_err(Clone::clone).map(|zero| {
        let (sequences, heads, rows, columns) = zero.view().dim();
        [sequences, heads, rows, columns, transition as usize].map(|x| x as u64).to_vec()
    });
    let names = ["sequences", "heads", "k: state_dim", "v: value_dim", "transition"];
    same(&group.agree(call, mine)?, &names)
}

/// What the tokens make of a state before them.
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
    let (sequences, heads, rows, _) = zero.view().dim();
    let start = match transition {
        Transition::Additive => return Ok(None),
        Transition::Rows => Array4::ones((sequences, heads, rows, 1)),
        Transition::Matrix => {
            let one = |(_, _, i, j)| if i == j { 1.0 } else { 0.0 };
            Array4::from_shape_fn((sequences, heads, rows, rows), one)
        }
    };
    let columns = start.dim().3;
    let mut state = State::new(start).map_err(|error| error.to_string())?;
    mechanism.prefill(x.silenced(columns), &mut state).map_err(|error| error.to_string())?;
    Ok(Some(state.into_inner()))
}

/// The segments of all ranks.
fn all(
    group: &Group,
    zero: &State,
    transition: Transition,
    mine: Array4<f32>,
    p: Result<Option<Array4<f32>>, String>,
    said: &mut Result<(), String>,
) -> Vec<Segment> {
    let dim = zero.view().dim();
    let columns = match transition {
        Transition::Additive => 0,
        Transition::Rows => 1,
        Transition::Matrix => dim.2,
    };
    let p_dim = (dim.0, dim.1, dim.2, columns);
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
    let unpacked = |bytes: &Vec<u8>| {
        let mut bytes = &bytes[..];
        let m = unpack(&mut bytes, dim);
        Segment { m, p: (columns > 0).then(|| unpack(&mut bytes, p_dim)) }
    };
    group.gather(&bytes, &lengths).iter().map(unpacked).collect()
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
