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
//! differences, so that a log decay of -inf forgets exactly. Every rank folds all of them,
//! and so has the state after the last token without another exchange.
//!
//! A rank sends `4 (ranks - 1) heads state_dim (value_dim + 1)` bytes a sequence, with a
//! matrix `4 (ranks - 1) heads state_dim (value_dim + state_dim)`, however long the sequence
//! is. The state of its own tokens takes a rank [less than half](Recurrent::advance_into) of
//! what these take once more for outputs, and with fixed decays only the tokens that a state
//! still has anything of: the longer the sequence, the less. Backwards it is the same with
//! the [gradient of the state](BackwardState::backward_state_into).
//!
//! # States of several parts
//!
//! Each part has a transition of its own, which the mechanism knows ([`Travels`]);
//! [`forward_parts`] and [`forward_parts_packed`] send all of them at once.
//!
//! | | parts | what tokens make of those before |
//! |---|---|---|
//! | MesaNet | `H`, `G` | both times a number a head |
//! | gated slots | keys, values | both times a number a slot |
//! | log-linear attention | a matrix a level, a count | times a number a head; matrices move to the levels that the count says, so that borders may be anywhere |
//! | Mamba-3 | matrix, angles, last keys and value | times a number a head, and the last token's share; what is added turns by the angles before |
//! | BASED | sums, the last keys and values | sums stay, keys and values move out of the window |
//! | Aaren | a softmax state | two of them merge |
//! | causal Flowformer | four sums, a tally and a matrix | all stay, but each is made with those before: four all-gathers |
//!
//! What cannot travel so: Flowformer that is not causal has no state, and its sums are made
//! with all tokens of both sides ([`heads`](crate::heads) has whole sequences). The memories
//! of Titans, Moneta, Yaad and Memora are not linear in what they were before (they divide by
//! norms, or take powers, thresholds or logarithms of their errors), so that what tokens make
//! of a memory is no smaller than the tokens.

use attention_kernels::input::Lengths;
use attention_kernels::linear::{Carried, QkvGradients, State};
use attention_kernels::{Backward, BackwardState, Input, Qkv, Recurrent};
use ndarray::{Array4, ArrayView4, s};

use crate::error::{Error, Result};
use crate::ring::same;
use crate::stored::{Stored, pack, unpack};
use crate::wire::Group;

mod flow;
mod parts;
mod single;

pub use single::{Silenced, Transition};
use single::{Single, carry};

/// Arrays `[sequences, heads, rows, columns]` that make up a state, or what tokens leave of
/// one.
pub type Parts = Vec<Array4<f32>>;

/// Mechanisms that know how their state travels.
pub trait Travels<X: Input> {
    /// What has the state: mostly the type itself.
    type Mechanism: Recurrent<X>;

    /// It.
    fn mechanism(&self) -> &Self::Mechanism;

    /// Sizes that all ranks must have in common, under the names that errors give them.
    fn sizes(&self, zero: &StateOf<Self, X>) -> Vec<(&'static str, usize)>;

    /// A state as arrays.
    fn parts(&self, state: &StateOf<Self, X>) -> Parts;

    /// And back.
    ///
    /// # Errors
    /// Numbers that are not finite.
    fn state(&self, parts: Parts) -> Result<StateOf<Self, X>, String>;

    /// What tokens leave of a state before them, in arrays whose sizes are those of states
    /// alone. Anything where it is not `needed`.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn left(&self, x: X, zero: &StateOf<Self, X>, needed: bool) -> Result<Parts, String>;

    /// The parts after tokens, given those before.
    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts;

    /// Refuses what only a single process can do.
    ///
    /// # Errors
    /// The argument, what was expected and what came.
    fn check(&self, _x: X) -> Result<(), String> {
        Ok(())
    }

    /// The same tokens for one who asks for their state alone: what does not matter for it
    /// may be left out.
    fn written(&self, x: X) -> X {
        x
    }

    /// Tells parts that are otherwise those before the first token how many tokens come
    /// before.
    fn begin(&self, _parts: &mut Parts, _tokens: usize) {}

    /// The parts of a rank's own tokens as they are sent, given those before the first token:
    /// of the same sizes on all ranks, of which none has more than `longest` tokens of a
    /// sequence that goes on.
    fn sent(&self, parts: Parts, _fresh: &Parts, _longest: usize) -> Parts {
        parts
    }

    /// In which all-gather a part is sent: parts of a later one are made with those of the
    /// earlier ones.
    fn round(&self, _part: usize) -> usize {
        0
    }
}

/// The state of what [`Travels`].
pub type StateOf<C, X> = <<C as Travels<X>>::Mechanism as Recurrent<X>>::State;

/// What ranks know of the tokens of one of them: a map of states.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The parts that they leave, from nothing.
    pub own: Parts,
    /// What they leave of parts before, as [`Travels::left`] has it.
    pub left: Parts,
    /// How many tokens the sequence has there that goes on.
    pub tokens: usize,
    /// Whether anything before them is left: no sequence ends among them.
    passes: bool,
}

/// What a rank has of the result.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed<T, S = State> {
    /// `[batch, heads, held, value_dim]`.
    pub out: Array4<T>,
    /// The states before the first tokens of this rank: what [`backward`] starts from.
    pub before: S,
    /// The state after the last token of all, the same on every rank.
    pub last: S,
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
    run(group, &Single { mechanism, transition }, x, Borders::None)
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
    run(group, &Single { mechanism, transition }, x, Borders::Packed { continues })
}

/// [`forward`] of mechanisms that know how their state travels: of several parts, with one
/// all-gather of all of them.
///
/// The state of a rank's own tokens is what a call without outputs leaves. Where the mechanism
/// has none of its own it takes as long as one with outputs.
///
/// # Errors
/// As [`forward`].
pub fn forward_parts<T, X, M>(group: &Group, mechanism: &M, x: X) -> Result<Mixed<T, StateOf<M, X>>>
where
    T: Stored,
    X: Input<Out = T>,
    M: Travels<X>,
{
    run(group, mechanism, x, Borders::None)
}

/// [`forward_parts`] of packed sequences, as [`forward_packed`] has them.
///
/// # Errors
/// As [`forward`].
pub fn forward_parts_packed<T, X, M>(
    group: &Group,
    mechanism: &M,
    x: X,
    continues: bool,
) -> Result<Mixed<T, StateOf<M, X>>>
where
    T: Stored,
    X: Input<Out = T>,
    M: Travels<X>,
{
    run(group, mechanism, x, Borders::Packed { continues })
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

    /// The parts of the state that comes in, or goes out at the `end`.
    fn of(self, mut parts: Parts, end: bool) -> Parts {
        for part in &mut parts {
            let at = self.at(part.dim().0, end);
            if at != (0..part.dim().0) {
                *part = part.slice(s![at, .., .., ..]).to_owned();
            }
        }
        parts
    }

    fn at(self, sequences: usize, end: bool) -> std::ops::Range<usize> {
        match self {
            Self::None => 0..sequences,
            Self::Packed { .. } if end => sequences.saturating_sub(1)..sequences,
            Self::Packed { .. } => 0..sequences.min(1),
        }
    }

    /// Those of states before the first token, but for the one that comes in, or goes out at
    /// the `end`.
    fn put(self, parts: &Parts, mut zero: Parts, end: bool) -> Parts {
        match self {
            Self::None => return parts.clone(),
            Self::Packed { continues: false } if !end => {}
            Self::Packed { .. } => {
                for (all, part) in zero.iter_mut().zip(parts) {
                    let at = self.at(all.dim().0, end);
                    all.slice_mut(s![at, .., .., ..]).assign(part);
                }
            }
        }
        zero
    }
}

/// What ranks have told each other.
struct Agreed {
    /// Of each, whether a state passes its tokens, and how many it has of the sequence that
    /// goes on.
    ranks: Vec<(bool, usize)>,
}

impl Agreed {
    /// Tokens of a sequence before those of a rank.
    fn before(&self, rank: usize) -> usize {
        let add = |sum: usize, &(passes, tokens): &(bool, usize)| if passes { sum + tokens } else { tokens };
        self.ranks.iter().take(rank).fold(0, add)
    }

    fn longest(&self) -> usize {
        self.ranks.iter().map(|&(_, tokens)| tokens).max().unwrap_or(0)
    }
}

/// Whether all ranks are at the same call with states that go together.
fn agree<X: Input, C: Travels<X>>(
    group: &Group,
    call: &'static str,
    (carry, x): (&C, X),
    borders: Borders,
) -> Result<(StateOf<C, X>, Agreed)> {
    let zero =
        carry.check(x).and_then(|()| carry.mechanism().initial_state(x).map_err(|error| error.to_string()));
    let mut names = vec!["sequences", "packed"];
    let mine = zero.as_ref().map_err(Clone::clone).and_then(|zero| {
        let sequences = carry.parts(zero).first().map_or(0, |part| part.dim().0);
        let (packed, on_the_wire) = match borders {
            Borders::None => (0, sequences),
            Borders::Packed { .. } if sequences == 0 => {
                return Err("offsets: expected a sequence, be it of no tokens, got none".to_owned());
            }
            Borders::Packed { .. } => (1, 1),
        };
        let of = carry.sizes(zero);
        names.extend(of.iter().map(|(name, _)| *name));
        let tokens = tokens_of(x, sequences.saturating_sub(1))?;
        let sizes = [on_the_wire, packed].into_iter().chain(of.iter().map(|&(_, size)| size));
        let rest = [usize::from(borders.passes(sequences)), tokens];
        Ok(sizes.chain(rest).map(|x| x as u64).collect())
    });
    let all = group.agree(call, mine)?;
    same(&all, &names)?;
    let rank = |theirs: &Vec<u64>| match theirs[..] {
        [.., passes, tokens] => (passes == 1, tokens as usize),
        _ => (false, 0),
    };
    let ranks = all.iter().map(rank).collect();
    let zero = zero.map_err(|message| Error::Argument { rank: group.rank(), message })?;
    Ok((zero, Agreed { ranks }))
}

/// Tokens of a sequence.
fn tokens_of<X: Input>(x: X, sequence: usize) -> Result<usize, String> {
    let len = x.dims().map_err(|error| error.to_string())?.q_len;
    Ok(rows_of(x.lengths(), len, sequence).len())
}

/// Rows of a sequence, of so many.
fn rows_of(lengths: Lengths<'_>, len: usize, sequence: usize) -> std::ops::Range<usize> {
    match lengths {
        Lengths::Packed { queries, .. } => match queries.get(sequence..sequence + 2) {
            Some(&[start, end]) => start..end,
            _ => 0..0,
        },
        Lengths::Tokens(tokens) => 0..tokens.get(sequence).copied().unwrap_or(0),
        _ => 0..len,
    }
}

fn run<T, X, C>(group: &Group, carry: &C, x: X, borders: Borders) -> Result<Mixed<T, StateOf<C, X>>>
where
    T: Stored,
    X: Input<Out = T>,
    C: Travels<X>,
{
    const CALL: &str = "LASP-2 forward";
    let (zero, agreed) = agree(group, CALL, (carry, x), borders)?;
    let (me, size, mechanism) = (group.rank(), group.size(), carry.mechanism());
    let nothing = carry.parts(&zero);
    let fresh = borders.of(nothing.clone(), false);
    let mut fold = Fold { carry, borders, agreed, fresh: fresh.clone(), segments: Vec::new() };
    let (mut said, mut before) = (Ok(()), fresh.clone());
    let rounds = (0..nothing.len()).map(|part| carry.round(part) + 1).max().unwrap_or(0);
    // One rank alone has nobody to tell.
    for round in (0..rounds).filter(|_| size > 1) {
        let mut own = Err(String::new());
        if said.is_ok() {
            // What is known by now.
            let mut start = fresh.clone();
            carry.begin(&mut start, fold.agreed.before(me));
            for (part, (start, known)) in start.iter_mut().zip(&before).enumerate() {
                if carry.round(part) < round {
                    start.clone_from(known);
                }
            }
            own = carry.state(borders.put(&start, nothing.clone(), false)).and_then(|mut state| {
                let tokens = carry.written(x);
                mechanism.advance(tokens, &mut state).map_err(|error| error.to_string())?;
                let parts = carry.parts(&state);
                finite(&parts).map(|()| parts)
            });
        }
        let needed = me > 0 && fold.agreed.ranks[me].0 && round == 0;
        let left = carry.left(x, &zero, needed && own.is_ok());
        if let Err(message) = own.as_ref().map(|_| ()).and(left.as_ref().map(|_| ()))
            && said.is_ok()
        {
            said = Err(message.clone());
        }
        // Ranks that have failed send nothing that others could stumble over.
        let own = own.unwrap_or_else(|_| nothing.clone());
        let left = left.or_else(|_| carry.left(x, &zero, false)).unwrap_or_default();
        fold.exchange::<X>(group, (own, left), round);
        before = fold.upto::<X>(me);
    }
    let done = said.and_then(|()| {
        let before = carry.state(borders.put(&before, nothing.clone(), false))?;
        let mut after = before.clone();
        let out = mechanism.prefill(x, &mut after).map_err(|error| error.to_string())?;
        let after = carry.parts(&after);
        finite(&after)?;
        let last = if size > 1 { fold.upto::<X>(size) } else { borders.of(after, true) };
        // What is not finite at the end is so for the last rank.
        let last = carry.state(last).or_else(|message| match me + 1 == size {
            true => Err(message),
            false => Ok(zero.clone()),
        })?;
        Ok(Mixed { out, before, last })
    });
    group.close(CALL, done)
}

fn finite(parts: &Parts) -> Result<(), String> {
    match parts.iter().flatten().find(|x| !x.is_finite()) {
        Some(x) => Err(format!("x: expected tokens that leave a finite state, got {x} in it")),
        None => Ok(()),
    }
}

/// The segments of all ranks.
struct Fold<'c, C> {
    carry: &'c C,
    borders: Borders,
    agreed: Agreed,
    /// What comes before the first token.
    fresh: Parts,
    segments: Vec<Segment>,
}

impl<C> Fold<'_, C> {
    /// Tells all ranks the parts of a round, and in the first one what is left of others.
    fn exchange<X: Input>(&mut self, group: &Group, (own, left): (Parts, Parts), round: usize)
    where
        C: Travels<X>,
    {
        let own = self.carry.sent(self.borders.of(own, true), &self.fresh, self.agreed.longest());
        let left = self.borders.of(left, true);
        self.tell::<X>(group, (own, left), round);
    }

    /// The same of the states at the other border of each rank, of which gradients go back.
    fn exchange_back<X: Input>(&mut self, group: &Group, (own, left): (Parts, Parts))
    where
        C: Travels<X>,
    {
        self.tell::<X>(group, (self.borders.of(own, false), self.borders.of(left, true)), 0);
    }

    fn tell<X: Input>(&mut self, group: &Group, (own, left): (Parts, Parts), round: usize)
    where
        C: Travels<X>,
    {
        let told = |part: usize| self.carry.round(part) == round;
        let mut bytes = Vec::new();
        for (_, part) in own.iter().enumerate().filter(|(part, _)| told(*part)) {
            pack(part.view(), &mut bytes);
        }
        left.iter().filter(|_| round == 0).for_each(|part| pack(part.view(), &mut bytes));
        let all = group.gather(&bytes, &vec![bytes.len(); group.size()]);
        if round == 0 {
            let zeros = |parts: &Parts| parts.iter().map(|part| Array4::zeros(part.dim())).collect();
            let segment = |&(passes, tokens): &(bool, usize)| Segment {
                own: zeros(&own),
                left: zeros(&left),
                tokens,
                passes,
            };
            self.segments = self.agreed.ranks.iter().map(segment).collect();
        }
        for (segment, bytes) in self.segments.iter_mut().zip(&all) {
            let mut bytes = &bytes[..];
            for (_, part) in segment.own.iter_mut().enumerate().filter(|(part, _)| told(*part)) {
                *part = unpack(&mut bytes, part.dim());
            }
            for part in segment.left.iter_mut().filter(|_| round == 0) {
                *part = unpack(&mut bytes, part.dim());
            }
        }
    }

    /// The parts after the tokens of so many ranks.
    fn upto<X: Input>(&self, ranks: usize) -> Parts
    where
        C: Travels<X>,
    {
        let mut parts = self.fresh.clone();
        for segment in self.segments.iter().take(ranks) {
            if !segment.passes {
                parts.clone_from(&self.fresh);
            }
            parts = self.carry.follow(&parts, segment);
        }
        parts
    }
}

/// The unmasked form: every token reads the state after all tokens, of all ranks, which is
/// both states of the result.
///
/// For mechanisms that see everything where they are not cut (linear attention, Performer,
/// EcoFormer with a variance, none of them causal), whatever they divide by; and for causal
/// ones that add and neither decay nor divide.
///
/// # Errors
/// As [`forward`].
pub fn forward_unmasked<T, X, M>(group: &Group, mechanism: &M, x: X) -> Result<Mixed<T>>
where
    T: Stored,
    X: Silenced<Out = T>,
    M: Recurrent<X, State = State>,
{
    const CALL: &str = "LASP-2 unmasked";
    let carry = Single { mechanism, transition: Transition::Additive };
    let (zero, agreed) = agree(group, CALL, (&carry, x), Borders::None)?;
    let nothing: Parts = vec![zero.view().to_owned()];
    let mut state = zero.clone();
    let mut said = mechanism.advance(x, &mut state).map_err(|error| error.to_string());
    let mut own = vec![state.into_inner()];
    said = said.and_then(|()| finite(&own));
    if said.is_err() {
        own.clone_from(&nothing);
    }
    let value_dim = zero.view().dim().3;
    let mut fold =
        Fold { carry: &carry, borders: Borders::None, agreed, fresh: nothing, segments: Vec::new() };
    fold.exchange::<X>(group, (own, Vec::new()), 0);
    let done = said.and_then(|()| {
        let total = single::only(fold.upto::<X>(group.size()))?;
        // Queries read: without keys, or if they have one each, with values of 0, which add
        // nothing.
        let without = x.keyless().filter(|&x| mechanism.initial_state(x).is_ok());
        let queries = without.unwrap_or_else(|| x.silenced(value_dim));
        let out = mechanism.prefill(queries, &mut total.clone()).map_err(|error| error.to_string())?;
        Ok(Mixed { out, before: total.clone(), last: total })
    });
    group.close(CALL, done)
}

/// Gradients of what [`forward_unmasked`] gave of a causal mechanism that adds and neither
/// decays nor divides, given that of its output and the state that all tokens read,
/// [`Mixed::before`]: one more all-gather.
///
/// # Errors
/// As [`forward`], and for what the mechanism refuses.
pub fn backward_unmasked<T, M>(
    group: &Group,
    mechanism: &M,
    x: Qkv<'_, T>,
    d_out: ArrayView4<'_, f32>,
    total: &State,
) -> Result<QkvGradients<f32>>
where
    T: Stored,
    M: for<'a> BackwardState<Qkv<'a, T>>
        + for<'a, 'c> Backward<Qkv<'a, T>, Gradients<f32> = QkvGradients<f32>, Carried<'c> = Carried<'c>>,
{
    const CALL: &str = "LASP-2 unmasked backward";
    let carry = Single { mechanism, transition: Transition::Additive };
    let (zero, agreed) = agree(group, CALL, (&carry, x), Borders::None)?;
    let nothing: Parts = vec![zero.view().to_owned()];
    // Queries and the state that they have read.
    let carried = Carried { state: Some(total), d_state: None };
    let read = mechanism.backward(x.silenced(x.v.dim().3), d_out, carried).map_err(|error| error.to_string());
    let own = read.as_ref().map_or_else(|_| nothing.clone(), |read| vec![read.state.clone()]);
    let said = read.as_ref().map(|_| ()).map_err(Clone::clone).and_then(|()| finite(&own));
    let own = if said.is_ok() { own } else { nothing.clone() };
    let mut fold =
        Fold { carry: &carry, borders: Borders::None, agreed, fresh: nothing, segments: Vec::new() };
    fold.exchange::<Qkv<'_, T>>(group, (own, Vec::new()), 0);
    let done = said.and(read).and_then(|read| {
        // What all queries have read is what keys and values have written.
        let d_total = fold.upto::<Qkv<'_, T>>(group.size()).remove(0);
        let none = Array4::zeros(d_out.dim());
        let carried = Carried { state: None, d_state: Some(d_total.view()) };
        let mut written = mechanism.backward(x, none.view(), carried).map_err(|error| error.to_string())?;
        written.q = read.q;
        Ok(written)
    });
    group.close(CALL, done)
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
    let single = Single { mechanism, transition };
    let (zero, agreed) = agree(group, CALL, (&single, x), borders)?;
    let (me, last) = (group.rank(), group.size() - 1);
    let nothing: Parts = vec![zero.view().to_owned()];
    // The first rank has nobody before it, nor has a sequence that begins here.
    let alone = me == 0 || matches!(borders, Borders::Packed { continues: false });
    let own = match alone {
        true => Ok(nothing.clone()),
        false => mechanism.backward_state(x, d_out, None).map(|d_state| vec![d_state]),
    };
    let own = own.map_err(|error| error.to_string());
    let needed = me > 0 && me < last && agreed.ranks[me].0 && own.is_ok();
    let left = single.left(x, &zero, needed);
    let said = own.as_ref().map(|_| ()).and(left.as_ref().map(|_| ())).map_err(Clone::clone);
    let own = own.unwrap_or_else(|_| nothing.clone());
    let left = left.or_else(|_| single.left(x, &zero, false)).unwrap_or_default();
    let mut d_after = borders.of(nothing.clone(), true).remove(0);
    let mut fold = Fold { carry: &single, borders, agreed, fresh: Parts::new(), segments: Vec::new() };
    fold.exchange_back::<X>(group, (own, left));
    for segment in fold.segments.iter().skip(me + 1).rev() {
        let own = &segment.own[0];
        d_after = match segment.passes {
            true => carry(segment.left.first(), &d_after, transition, true) + own,
            false => own.clone(),
        };
    }
    let d_after = borders.put(&vec![d_after], nothing, true).remove(0);
    let done = said.and_then(|()| {
        let carried = Carried { state: Some(before), d_state: Some(d_after.view()) };
        mechanism.backward(x, d_out, carried).map_err(|error| error.to_string())
    });
    group.close(CALL, done)
}
