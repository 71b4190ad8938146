//! The general tests of mechanisms that carry a state: every one of
//! [`SUBJECTS`] in all its variants, with mild, strong and cutting decays.

use std::any::Any;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::Range;

use half::f16;
use ndarray::{Array3, Array4, ArrayView, ArrayView4, Axis, Dimension, Slice, concatenate, s};

use crate::attention::{Attention, Bounded, Recurrent};
use crate::card::{Exhibit, Extras, Field};
use crate::element::Element;
use crate::engine::recur::Form;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::state::State;
use crate::input::{Dim4, Qkv};
use crate::linear::exhibits::*;
use crate::linear::{BasedState, FlowformerState, LevelState, Mamba3State, MesaState, SlotState};
use crate::stages::differentiate::{
    Carried, Differentiable, GradientArrays, backward_into, backward_state_into, reference_backward,
    zero_gradients,
};
use crate::stages::recur::Recurrence;
use crate::testing::{LENGTHS, array, cuts, within};

/// Sizes and kind of a trial.
#[derive(Clone, Copy, Debug)]
struct Setup {
    variant: usize,
    form: Form,
    decay: fn(f32) -> f32,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    len: usize,
    dim: usize,
    value_dim: usize,
    /// Of two, so that numbers of a power of two can be added exactly.
    grid: Option<f32>,
}

const SETUP: Setup = Setup {
    variant: 0,
    form: Form::Auto,
    decay: mild,
    batch: 1,
    heads: 4,
    kv_heads: 2,
    len: 101,
    dim: 20,
    value_dim: 40,
    grid: None,
};

fn mild(x: f32) -> f32 {
    -0.1 * x.abs()
}

/// Nothing decays; strongly; now and then everything is forgotten.
const DECAYS: [fn(f32) -> f32; 4] = [
    mild,
    |_| 0.0,
    |x| -12.0 * x * x,
    |x| match x {
        0.95.. => f32::NEG_INFINITY,
        0.9..0.95 => -1e4,
        _ => -0.5 * x.abs(),
    },
];

/// Some tokens, perhaps as a packed batch, or with padding.
struct Span<'a> {
    tokens: Range<usize>,
    offsets: Option<&'a [usize]>,
    padded: Option<&'a [usize]>,
}

impl From<Range<usize>> for Span<'_> {
    fn from(tokens: Range<usize>) -> Self {
        Self { tokens, offsets: None, padded: None }
    }
}

/// What a mechanism carries from token to token.
trait Parts: Clone + PartialEq + Debug + Send + Sync + 'static {
    /// The state of the recurrence.
    fn state(&self) -> &State;
    /// The same with another one.
    fn with(&self, state: State) -> Self;
    /// All numbers, those of one size together.
    fn groups(&self) -> Vec<Vec<f64>>;
}

fn numbers<'a>(x: impl IntoIterator<Item = &'a f32>) -> Vec<f64> {
    x.into_iter().map(|&x| f64::from(x)).collect()
}

impl Parts for State {
    fn state(&self) -> &State {
        self
    }
    fn with(&self, state: State) -> Self {
        state
    }
    fn groups(&self) -> Vec<Vec<f64>> {
        vec![numbers(self.view())]
    }
}

impl Parts for FlowformerState {
    fn state(&self) -> &State {
        self.state()
    }
    fn with(&self, state: State) -> Self {
        Self { state, ..self.clone() }
    }
    fn groups(&self) -> Vec<Vec<f64>> {
        let sums = self.sums().axis_iter(Axis(2)).map(|sum| numbers(sum.iter())).collect::<Vec<_>>();
        let tallies = self.tallies().iter().copied().collect();
        [vec![numbers(self.state().view()), tallies], sums].concat()
    }
}

impl Parts for SlotState {
    fn state(&self) -> &State {
        self.values()
    }
    fn with(&self, values: State) -> Self {
        Self { values, ..self.clone() }
    }
    fn groups(&self) -> Vec<Vec<f64>> {
        vec![numbers(self.keys().view()), numbers(self.values().view())]
    }
}

impl Parts for MesaState {
    fn state(&self) -> &State {
        self.values()
    }
    fn with(&self, values: State) -> Self {
        Self { values, ..self.clone() }
    }
    fn groups(&self) -> Vec<Vec<f64>> {
        vec![numbers(self.keys().view()), numbers(self.values().view())]
    }
}

impl Parts for LevelState {
    fn state(&self) -> &State {
        self.states()
    }
    fn with(&self, states: State) -> Self {
        Self { states, ..self.clone() }
    }
    fn groups(&self) -> Vec<Vec<f64>> {
        vec![numbers(self.states().view()), self.tokens().iter().map(|&n| n as f64).collect()]
    }
}

impl Parts for Mamba3State {
    fn state(&self) -> &State {
        self.state()
    }
    fn with(&self, state: State) -> Self {
        Self { state, ..self.clone() }
    }
    fn groups(&self) -> Vec<Vec<f64>> {
        // Angles are the same a turn apart.
        let [angles, key, value] = self.rest();
        let (angles, rest) = (angles.view().sum_axis(Axis(2)), [key, value].map(|x| numbers(x.view())));
        let turns = [f32::cos, f32::sin].map(|of| numbers(&angles.mapv(of)));
        [vec![numbers(self.state().view())], turns.to_vec(), rest.to_vec()].concat()
    }
}

impl Parts for BasedState {
    fn state(&self) -> &State {
        self.global()
    }
    fn with(&self, global: State) -> Self {
        Self { global, ..self.clone() }
    }
    fn groups(&self) -> Vec<Vec<f64>> {
        vec![numbers(self.global().view()), numbers(self.keys()), numbers(self.values())]
    }
}

/// A state, whatever the mechanism is.
#[derive(Debug)]
struct Kept(Box<dyn AnyState>);

trait AnyState: Any + Debug {
    fn view(&self) -> ArrayView4<'_, f32>;
    fn with(&self, state: State) -> Kept;
    fn groups(&self) -> Vec<Vec<f64>>;
    fn copy(&self) -> Kept;
    fn equals(&self, other: &dyn Any) -> bool;
    fn any(&self) -> &dyn Any;
    fn any_mut(&mut self) -> &mut dyn Any;
}

impl<S: Parts> AnyState for S {
    fn view(&self) -> ArrayView4<'_, f32> {
        self.state().view()
    }
    fn with(&self, state: State) -> Kept {
        Kept(Box::new(Parts::with(self, state)))
    }
    fn groups(&self) -> Vec<Vec<f64>> {
        Parts::groups(self)
    }
    fn copy(&self) -> Kept {
        Kept(Box::new(self.clone()))
    }
    fn equals(&self, other: &dyn Any) -> bool {
        other.downcast_ref() == Some(self)
    }
    fn any(&self) -> &dyn Any {
        self
    }
    fn any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Clone for Kept {
    fn clone(&self) -> Self {
        self.0.copy()
    }
}

impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        self.0.equals(other.0.any())
    }
}

impl Kept {
    fn new(state: impl Parts) -> Self {
        Self(Box::new(state))
    }

    fn view(&self) -> ArrayView4<'_, f32> {
        self.0.view()
    }

    /// With a state of the recurrence of this size, full of one number.
    fn filled(&self, dim: Dim4, x: f32) -> Self {
        self.0.with(State::new(Array4::from_elem(dim, x)).unwrap())
    }

    fn of<S: 'static>(&self) -> &S {
        self.0.any().downcast_ref().unwrap()
    }

    fn of_mut<S: 'static>(&mut self) -> &mut S {
        self.0.any_mut().downcast_mut().unwrap()
    }
}

/// A mechanism on arrays.
struct Stand<T, E: Exhibit, S = State> {
    mechanism: E::Mechanism,
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    extras: Extras<T>,
    len: usize,
    state: PhantomData<fn() -> S>,
}

/// What tests do with it, whatever the mechanism is.
trait Subject<T> {
    fn len(&self) -> usize;
    /// Whether it has log decays of its tokens.
    fn decays(&self) -> bool;
    /// Changes all channels of a token in one of the arrays, if it has it.
    fn change(&mut self, which: usize, token: usize, change: &dyn Fn(f32) -> f32) -> bool;
    /// Adds to one element of an array.
    fn nudge(&mut self, which: usize, at: [usize; 4], by: f32);
    fn forward(&self, at: Span<'_>) -> Result<Array4<T>>;
    fn reference(&self, at: Span<'_>) -> (Array4<f64>, Array3<f64>);
    fn initial(&self, at: Span<'_>) -> Kept;
    fn prefill_into(&self, at: Span<'_>, state: &mut Kept, out: &mut Array4<T>) -> Result<()>;
    fn prefill(&self, at: Span<'_>, state: &mut Kept) -> Array4<T>;
    fn advance(&self, at: Span<'_>, state: &mut Kept);
    fn step(&self, at: Span<'_>, state: &mut Kept) -> Result<Array4<T>>;
    fn reference_from(&self, at: Span<'_>, state: &Kept) -> (Array4<f64>, Kept);
}

/// The arrays that [`Subject::change`] knows.
const ARRAYS: [&str; 10] =
    ["q", "k", "v", "decays", "betas", "channels", "rates", "writes", "values", "keys"];

/// How many of `n` there are for each of `len` tokens, 0 if it is something else.
fn steps(n: usize, len: usize) -> usize {
    if len > 0 && n.is_multiple_of(len) { n / len } else { 0 }
}

impl<T: Element, E: Exhibit, S> Stand<T, E, S> {
    fn new(setup: &Setup) -> Self {
        let &Setup { batch, heads, kv_heads, len, dim, value_dim, .. } = setup;
        let round = |x: f32| setup.grid.map_or(x, |grid| (x * grid).round() / grid);
        let noise = |shape, seed| array(shape, seed).mapv(|x| T::from_f32(round(x)));
        let q = noise([batch, heads, len, dim], 1);
        let k = noise([batch, kv_heads, len, dim], 2);
        let v = noise([batch, kv_heads, len, value_dim], 3);
        let mut field = Field::of::<T>(4);
        (field.variant, field.form, field.decay) = (setup.variant, setup.form, setup.decay);
        let x = Qkv::new(q.view(), k.view(), v.view());
        let mechanism = E::build(&x, None, &field).unwrap();
        let mut extras = E::extras(&x, &field);
        for x in [&mut extras.channels, &mut extras.rates, &mut extras.writes] {
            x.mapv_inplace(round);
        }
        for x in [&mut extras.decays, &mut extras.betas] {
            x.mapv_inplace(round);
        }
        for x in [&mut extras.keys, &mut extras.values] {
            x.mapv_inplace(|x| T::from_f32(round(x.to_f32())));
        }
        Self { mechanism, q, k, v, extras, len, state: PhantomData }
    }

    fn with<R>(&self, at: Span<'_>, run: impl FnOnce(&E::Mechanism, E::Input<'_, T>) -> R) -> R {
        let (len, tokens) = (self.len, &at.tokens);
        let extras = cut_extras(&self.extras, len, tokens);
        let (q, k, v) = (cut(&self.q, len, tokens), cut(&self.k, len, tokens), cut(&self.v, len, tokens));
        let x = Qkv::new(q, k, v);
        let x = match (at.offsets, at.padded) {
            (Some(offsets), _) => x.packed(offsets, offsets),
            (None, Some(lengths)) => x.padded(lengths),
            (None, None) => x,
        };
        run(&self.mechanism, E::input(x, &extras))
    }
}

/// Tokens of an array that has some number of steps for each.
fn cut<'a, A, D: Dimension>(
    x: &'a ndarray::Array<A, D>,
    len: usize,
    at: &Range<usize>,
) -> ArrayView<'a, A, D> {
    let mut view = x.view();
    let steps = if view.ndim() > 2 { steps(view.len_of(Axis(2)), len) } else { 0 };
    if steps > 0 {
        view.slice_axis_inplace(Axis(2), Slice::from(at.start * steps..at.end * steps));
    }
    view
}

/// Tokens of everything beside queries, keys and values. Inlined into every
/// method of every subject it would be a tenth of the code of all tests.
#[inline(never)]
fn cut_extras<T: Element>(extras: &Extras<T>, len: usize, tokens: &Range<usize>) -> Extras<T> {
    Extras {
        decays: cut(&extras.decays, len, tokens).to_owned(),
        betas: cut(&extras.betas, len, tokens).to_owned(),
        channels: cut(&extras.channels, len, tokens).to_owned(),
        rates: cut(&extras.rates, len, tokens).to_owned(),
        keys: cut(&extras.keys, len, tokens).to_owned(),
        values: cut(&extras.values, len, tokens).to_owned(),
        writes: cut(&extras.writes, len, tokens).to_owned(),
        ..Extras::default()
    }
}

impl<T: Element, E: Exhibit, S: Parts> Subject<T> for Stand<T, E, S>
where
    E::Mechanism: for<'a> Bounded<E::Input<'a, T>> + for<'a> Recurrent<E::Input<'a, T>, State = S>,
{
    fn len(&self) -> usize {
        self.len
    }

    fn decays(&self) -> bool {
        !self.extras.decays.is_empty() || !self.extras.channels.is_empty()
    }

    fn change(&mut self, which: usize, token: usize, change: &dyn Fn(f32) -> f32) -> bool {
        fn rows<A: Clone, D: Dimension>(
            x: &mut ndarray::Array<A, D>,
            len: usize,
            token: usize,
            change: impl FnMut(A) -> A,
        ) -> bool {
            let steps = if x.ndim() > 2 { steps(x.len_of(Axis(2)), len) } else { 0 };
            if steps > 0 {
                let all = Slice::from(token * steps..(token + 1) * steps);
                x.slice_axis_mut(Axis(2), all).mapv_inplace(change);
            }
            steps > 0
        }
        let each = |x: T| T::from_f32(change(x.to_f32()));
        let (len, extras) = (self.len, &mut self.extras);
        match which {
            0 => rows(&mut self.q, len, token, each),
            1 => rows(&mut self.k, len, token, each),
            2 => rows(&mut self.v, len, token, each),
            3 => rows(&mut extras.decays, len, token, change),
            4 => rows(&mut extras.betas, len, token, change),
            5 => rows(&mut extras.channels, len, token, change),
            6 => rows(&mut extras.rates, len, token, change),
            7 => rows(&mut extras.writes, len, token, change),
            8 => rows(&mut extras.values, len, token, each),
            _ => rows(&mut extras.keys, len, token, each),
        }
    }

    fn nudge(&mut self, which: usize, at: [usize; 4], by: f32) {
        let [b, h, t, c] = at;
        let add = |x: &mut T| *x = T::from_f32(x.to_f32() + by);
        match which {
            0 => add(&mut self.q[at]),
            1 => add(&mut self.k[at]),
            2 => add(&mut self.v[at]),
            3 if !self.extras.channels.is_empty() => self.extras.channels[[b, h, t, c]] += by,
            3 => self.extras.decays[[b, h, t]] += by,
            5 => add(&mut self.extras.keys[at]),
            6 => self.extras.rates[at] += by,
            _ => self.extras.betas[[b, h, t]] += by,
        }
    }

    fn forward(&self, at: Span<'_>) -> Result<Array4<T>> {
        self.with(at, |mechanism, x| mechanism.forward(x))
    }

    fn reference(&self, at: Span<'_>) -> (Array4<f64>, Array3<f64>) {
        self.with(at, |mechanism, x| (mechanism.reference(x).unwrap(), mechanism.error_bound(x).unwrap()))
    }

    fn initial(&self, at: Span<'_>) -> Kept {
        self.with(at, |mechanism, x| Kept::new(mechanism.initial_state(x).unwrap()))
    }

    fn prefill_into(&self, at: Span<'_>, state: &mut Kept, out: &mut Array4<T>) -> Result<()> {
        let (state, mut workspace) = (state.of_mut(), Workspace::new());
        self.with(at, |mechanism, x| mechanism.prefill_into(x, state, out.view_mut(), &mut workspace))
    }

    fn prefill(&self, at: Span<'_>, state: &mut Kept) -> Array4<T> {
        self.with(at, |mechanism, x| mechanism.prefill(x, state.of_mut()).unwrap())
    }

    fn advance(&self, at: Span<'_>, state: &mut Kept) {
        self.with(at, |mechanism, x| mechanism.advance(x, state.of_mut()).unwrap())
    }

    fn step(&self, at: Span<'_>, state: &mut Kept) -> Result<Array4<T>> {
        self.with(at, |mechanism, x| mechanism.step(x, state.of_mut()))
    }

    fn reference_from(&self, at: Span<'_>, state: &Kept) -> (Array4<f64>, Kept) {
        let (out, next) = self.with(at, |mechanism, x| mechanism.reference_from(x, state.of()).unwrap());
        (out, Kept::new(next))
    }
}

type Make<T> = fn(&Setup) -> Box<dyn Subject<T>>;

struct Entry {
    name: &'static str,
    variants: usize,
    make: Make<f32>,
    make_f16: Make<f16>,
}

impl Entry {
    /// Whether it carries the states of packed sequences: not windows of
    /// different lengths.
    fn packs(&self) -> bool {
        self.name != "BASED"
    }

    /// Whether an array is of queries alone.
    fn reads(&self, which: usize) -> bool {
        let read = [("Log-linear attention", "channels"), ("Mamba-3 MIMO", "values")];
        which == 0 || read.contains(&(self.name, ARRAYS[which]))
    }

    /// Whether queries go into the state too.
    fn keeps_queries(&self) -> bool {
        self.name == "causal Flowformer"
    }
}

fn make<T: Element, E: Exhibit, S: Parts>(setup: &Setup) -> Box<dyn Subject<T>>
where
    E::Mechanism: for<'a> Bounded<E::Input<'a, T>> + for<'a> Recurrent<E::Input<'a, T>, State = S>,
{
    Box::new(Stand::<T, E, S>::new(setup))
}

const fn entry<E: Exhibit, S: Parts>() -> Entry
where
    E::Mechanism: for<'a> Bounded<E::Input<'a, f32>>
        + for<'a> Recurrent<E::Input<'a, f32>, State = S>
        + for<'a> Bounded<E::Input<'a, f16>>
        + for<'a> Recurrent<E::Input<'a, f16>, State = S>,
{
    Entry { name: E::CARD.name, variants: E::VARIANTS, make: make::<f32, E, S>, make_f16: make::<f16, E, S> }
}

static SUBJECTS: &[Entry] = &[
    entry::<LightningExhibit, State>(),
    entry::<CausalLinearExhibit, State>(),
    entry::<RetNetExhibit, State>(),
    entry::<SimpleGlaExhibit, State>(),
    entry::<GlaExhibit, State>(),
    entry::<Mamba2Exhibit, State>(),
    entry::<Mamba3Exhibit, Mamba3State>(),
    entry::<Mamba3MimoExhibit, Mamba3State>(),
    entry::<Hgrn2Exhibit, State>(),
    entry::<Rwkv6Exhibit, State>(),
    entry::<DeltaNetExhibit, State>(),
    entry::<GatedDeltaNetExhibit, State>(),
    entry::<KdaExhibit, State>(),
    entry::<GatedDeltaNet2Exhibit, State>(),
    entry::<DeltaProductExhibit, State>(),
    entry::<GatedSlotExhibit, SlotState>(),
    entry::<LogLinearExhibit, LevelState>(),
    entry::<MesaNetExhibit, MesaState>(),
    entry::<CombaExhibit, State>(),
    entry::<Rwkv7Exhibit, State>(),
    entry::<S6Exhibit, State>(),
    entry::<TitansExhibit, State>(),
    entry::<TitansMlpExhibit, State>(),
    entry::<MonetaExhibit, State>(),
    entry::<YaadExhibit, State>(),
    entry::<MemoraExhibit, State>(),
    entry::<CausalPerformerExhibit, State>(),
    entry::<AarenExhibit, State>(),
    entry::<BasedExhibit, BasedState>(),
    entry::<CausalEcoFormerExhibit, State>(),
    entry::<CausalFlowformerExhibit, FlowformerState>(),
];

/// Every variant of every subject, with every kind of decay if it has any.
fn each(setup: Setup, mut check: impl FnMut(&Entry, Setup, &str)) {
    for entry in SUBJECTS {
        for variant in 0..entry.variants {
            for (kind, decay) in DECAYS.into_iter().enumerate() {
                let setup = Setup { variant, decay, ..setup };
                if kind > 0 && !(entry.make)(&Setup { len: 2, ..setup }).decays() {
                    break;
                }
                check(entry, setup, &format!("{} {variant}, decay {kind}", entry.name));
            }
        }
    }
}

/// A state is that of the definition, up to rounding.
fn same_state(what: &str, got: &Kept, want: &Kept) {
    for (got, want) in got.0.groups().iter().zip(want.0.groups()) {
        assert_eq!(got.len(), want.len(), "{what}: numbers of a state");
        let size = want.iter().fold(1f64, |most, x| most.max(x.abs()));
        for (x, want) in got.iter().zip(want) {
            assert!((x - want).abs() <= 2e-5 * size, "{what}: state {x:e}, not {want:e}");
        }
    }
}

#[test]
fn every_form_keeps_to_the_definition() {
    for len in LENGTHS {
        each(Setup { len, ..SETUP }, |entry, setup, what| {
            let (want, bound) = (entry.make)(&setup).reference((0..len).into());
            for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
                let got = (entry.make)(&Setup { form, ..setup }).forward((0..len).into()).unwrap();
                within(&format!("{what}, {len} tokens, {form:?}"), &got, &want, &bound);
            }
        });
    }
}

#[test]
fn noise_is_far_from_the_bound() {
    // The bound is for the worst of rounding.
    each(SETUP, |entry, setup, what| {
        let subject = (entry.make)(&setup);
        let (want, bound) = subject.reference((0..SETUP.len).into());
        let share = within(what, &subject.forward((0..SETUP.len).into()).unwrap(), &want, &bound);
        println!("{what}: {share:.3} of the bound");
        assert!(share < 0.8, "{what}: {share}");
    });
}

#[test]
fn sizes_that_are_odd_or_empty() {
    for [heads, kv_heads, len, dim, value_dim] in [
        [1, 1, 1, 1, 1],
        [2, 1, 33, 7, 5],
        [1, 1, 65, 33, 70],
        [2, 2, 70, 64, 1],
        [2, 2, 70, 0, 3],
        [2, 2, 70, 3, 0],
        [2, 2, 9, 0, 0],
        [0, 0, 20, 4, 4],
        [2, 1, 0, 4, 4],
    ] {
        let setup = Setup { heads, kv_heads, len, dim, value_dim, ..SETUP };
        for batch in [0, 1, 3] {
            for entry in SUBJECTS.iter().filter(|entry| dim > 0 || !entry.name.contains("Performer")) {
                let what = format!("{} {batch} {heads}/{kv_heads} {len} {dim} {value_dim}", entry.name);
                let subject = (entry.make)(&Setup { batch, ..setup });
                let (want, bound) = subject.reference((0..len).into());
                assert_eq!(want.dim(), (batch, heads, len, value_dim), "{what}");
                // Whatever was in the workspace.
                let mut out = Array4::from_elem(want.dim(), f32::NAN);
                subject
                    .prefill_into((0..len).into(), &mut subject.initial((0..len).into()), &mut out)
                    .unwrap();
                within(&what, &out, &want, &bound);
            }
        }
    }
}

#[test]
fn pieces_and_steps_carry_the_state() {
    each(
        Setup { batch: 2, heads: 2, kv_heads: 1, len: 150, dim: 16, value_dim: 24, ..SETUP },
        |entry, setup, what| {
            let (subject, len) = ((entry.make)(&setup), setup.len);
            let zero = subject.initial((0..len).into());
            let (want, last) = subject.reference_from((0..len).into(), &zero);
            let (whole, bound) = subject.reference((0..len).into());
            assert_eq!(want, whole, "{what}: from a state of zeros");
            let mut once = zero.clone();
            let out = subject.prefill((0..len).into(), &mut once);
            assert_eq!(out, subject.forward((0..len).into()).unwrap(), "{what}: with a state or without");
            same_state(what, &once, &last);
            let mut silent = zero.clone();
            subject.advance((0..len).into(), &mut silent);
            assert_eq!(silent.view(), once.view(), "{what}: without outputs");
            let (mut state, mut parts) = (zero.clone(), Vec::new());
            let mut silent = zero.clone();
            for range in cuts(len) {
                parts.push(subject.prefill(range.clone().into(), &mut state));
                subject.advance(range.into(), &mut silent);
            }
            same_state(&format!("{what}, without outputs"), &silent, &last);
            let join = |parts: &[Array4<f32>]| {
                let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
                concatenate(Axis(2), &views).unwrap()
            };
            within(&format!("{what}, pieces"), &join(&parts), &want, &bound);
            same_state(what, &state, &last);
            let (mut state, mut parts) = (zero.clone(), Vec::new());
            for t in 0..len {
                parts.push(subject.step((t..t + 1).into(), &mut state).unwrap());
            }
            within(&format!("{what}, steps"), &join(&parts), &want, &bound);
            same_state(what, &state, &last);
            // The definition in pieces, its states rounded between them.
            let mut state = zero;
            for range in cuts(len) {
                let (out, next) = subject.reference_from(range.clone().into(), &state);
                state = next;
                let rows = s![.., .., range.clone(), ..];
                within(
                    &format!("{what}, definition"),
                    &out.mapv(|x| x as f32),
                    &want.slice(rows).to_owned(),
                    &(&bound.slice(s![.., .., range]) + 1e-6),
                );
            }
            same_state(what, &state, &last);
        },
    );
}

#[test]
fn packed_sequences_are_apart() {
    let offsets = [0, 0, 3, 71, 72, 100];
    // Rows after the last offset are no sequence's.
    let len = 107;
    each(Setup { len, dim: 16, value_dim: 12, ..SETUP }, |entry, setup, what| {
        let subject = (entry.make)(&setup);
        let packed = || Span { tokens: 0..len, offsets: Some(&offsets), padded: None };
        if !entry.packs() {
            let (out, (want, bound)) = (subject.forward(packed()).unwrap(), subject.reference(packed()));
            within(what, &out, &want, &bound);
            for range in offsets.windows(2).map(|pair| pair[0]..pair[1]) {
                let own = subject.reference(range.clone().into()).0;
                assert_eq!(want.slice(s![.., .., range, ..]), own, "{what}: definition");
            }
            return;
        }
        let mut states = subject.initial(packed());
        assert_eq!(states.view().dim().0, 5, "{what}");
        let mut silent = states.clone();
        subject.advance(packed(), &mut silent);
        let out = subject.prefill(packed(), &mut states);
        assert_eq!(silent.view(), states.view(), "{what}: without outputs");
        let (want, _) = subject.reference(packed());
        for (i, range) in offsets.windows(2).map(|pair| pair[0]..pair[1]).enumerate() {
            let mut own = subject.initial(range.clone().into());
            let alone = subject.prefill(range.clone().into(), &mut own);
            let rows = s![.., .., range.clone(), ..];
            assert_eq!(out.slice(rows), alone, "{what}: sequence {i}");
            assert_eq!(states.view().slice(s![i..i + 1, .., .., ..]), own.view(), "{what}: state {i}");
            assert_eq!(want.slice(rows), subject.reference(range.into()).0, "{what}: definition {i}");
        }
        assert!(out.slice(s![.., .., 100.., ..]).iter().all(|&x| x == 0.0), "{what}: rows of no sequence");
        assert!(want.slice(s![.., .., 100.., ..]).iter().all(|&x| x == 0.0), "{what}: definition");
    });
}

/// Every batch entry is its first tokens, and nothing reads what lies after them.
#[test]
fn padding_is_never_read() {
    let (len, lengths) = (100, [72]);
    each(Setup { len, dim: 16, value_dim: 12, ..SETUP }, |entry, setup, what| {
        let mut subject = (entry.make)(&setup);
        let mut own = subject.initial((0..lengths[0]).into());
        let alone = subject.prefill((0..lengths[0]).into(), &mut own);
        for which in 0..ARRAYS.len() {
            subject.change(which, 80, &|_| f32::NAN);
        }
        let padded = || Span { tokens: 0..len, offsets: None, padded: Some(&lengths) };
        if !entry.packs() {
            let error = subject.forward(padded()).unwrap_err().to_string();
            assert!(error.starts_with("padded cannot be combined with"), "{what}: {error}");
            return;
        }
        let mut state = subject.initial(padded());
        let out = subject.prefill(padded(), &mut state);
        let (want, _) = subject.reference(padded());
        assert_eq!(out.slice(s![.., .., ..lengths[0], ..]), alone, "{what}");
        assert_eq!(state.view(), own.view(), "{what}: state");
        let (own, _) = subject.reference((0..lengths[0]).into());
        assert_eq!(want.slice(s![.., .., ..lengths[0], ..]), own, "{what}: definition");
        let rest = s![.., .., lengths[0].., ..];
        assert!(out.slice(rest).iter().all(|&x| x == 0.0), "{what}: outputs of padding");
        assert!(want.slice(rest).iter().all(|&x| x == 0.0), "{what}: definition");
        let more = Span { tokens: 0..len, offsets: None, padded: Some(&[101]) };
        let error = subject.forward(more).unwrap_err().to_string();
        assert!(error.starts_with("padded: expected at most len = 100, got 101"), "{what}: {error}");
    });
}

#[test]
fn a_nan_token_shows_from_there_on() {
    let t = 70;
    for entry in SUBJECTS {
        for variant in 0..entry.variants {
            let setup = Setup { variant, heads: 2, kv_heads: 2, len: 100, dim: 16, value_dim: 8, ..SETUP };
            let clean = (entry.make)(&setup);
            let (want, bound) = clean.reference((0..100).into());
            // What a mechanism takes shows where weights are not sharp.
            let mild = Setup { variant: 0, ..setup };
            let once = (entry.make)(&mild).forward((0..100).into()).unwrap();
            let mut seen = 0;
            for (which, array) in ARRAYS.into_iter().enumerate() {
                let what = format!("{} {variant}, {array}", entry.name);
                let mut other = (entry.make)(&mild);
                // Codes are of directions, and decays stay below 0.
                let factor = if which < 3 { -0.5 } else { 0.5 };
                if !other.change(which, t, &|x| factor * x) {
                    continue;
                }
                // Some take queries for keys, or values from elsewhere.
                if other.forward((0..100).into()).unwrap() == once {
                    continue;
                }
                seen += 1;
                let mut spoilt = (entry.make)(&setup);
                if !spoilt.change(which, t, &|_| f32::NAN) {
                    // A variant without it.
                    continue;
                }
                let out = spoilt.forward((0..100).into()).unwrap();
                let before = s![.., .., ..t, ..];
                within(
                    &what,
                    &out.slice(before).to_owned(),
                    &want.slice(before).to_owned(),
                    &bound.slice(s![.., .., ..t]).to_owned(),
                );
                let shows = |range: Range<usize>| out.slice(s![.., .., range, ..]).iter().all(|x| x.is_nan());
                let state = !entry.reads(which) || entry.keeps_queries();
                if !state {
                    // A query is its own row's.
                    assert!(shows(t..t + 1), "{what}: hidden");
                    let after = s![.., .., t + 1.., ..];
                    within(
                        &what,
                        &out.slice(after).to_owned(),
                        &want.slice(after).to_owned(),
                        &bound.slice(s![.., .., t + 1..]).to_owned(),
                    );
                }
                // A decay may come after its own token's query has read.
                assert!(!state || shows(t + 1..100), "{what}: hidden");
                assert!(!state || which == 3 || which == 5 || shows(t..t + 1), "{what}: hidden in its token");
            }
            assert!(seen >= 2, "{}: {seen} arrays", entry.name);
        }
    }
}

#[test]
fn half_types_are_rounded_once() {
    each(Setup { len: 70, dim: 16, value_dim: 12, ..SETUP }, |entry, setup, what| {
        let subject = (entry.make_f16)(&setup);
        let (want, bound) = subject.reference((0..70).into());
        within(what, &subject.forward((0..70).into()).unwrap(), &want, &bound);
        let mut state = subject.initial((0..70).into());
        subject.prefill((0..33).into(), &mut state);
        let rest = subject.prefill((33..70).into(), &mut state);
        let (rows, bounds) =
            (want.slice(s![.., .., 33.., ..]).to_owned(), bound.slice(s![.., .., 33..]).to_owned());
        within(&format!("{what}, rest"), &rest, &rows, &bounds);
    });
}

#[test]
fn refusals_leave_outputs_and_states_untouched() {
    for entry in SUBJECTS {
        let setup = Setup { len: 6, dim: 8, value_dim: 5, ..SETUP };
        let (subject, name) = ((entry.make)(&setup), entry.name);
        let fresh = subject.initial((0..6).into());
        let dim = fresh.view().dim();
        let mut out = Array4::from_elem((1, 4, 6, 5), 7.0);
        for wrong in [
            (dim.0 + 1, dim.1, dim.2, dim.3),
            (dim.0, dim.1 + 1, dim.2, dim.3),
            (dim.0, dim.1, dim.2 + 1, dim.3),
            (dim.0, dim.1, dim.2, dim.3 + 1),
        ] {
            let mut state = fresh.filled(wrong, 0.5);
            let error = subject.prefill_into((0..6).into(), &mut state, &mut out).unwrap_err().to_string();
            let want = format!(
                "state: expected shape [sequences, heads, state_dim, columns] = [{}, {}, {}, {}], got [{}, {}, {}, {}]",
                dim.0, dim.1, dim.2, dim.3, wrong.0, wrong.1, wrong.2, wrong.3
            );
            assert_eq!(error, want, "{name}");
            assert!(state.view().iter().all(|&x| x == 0.5) && out.iter().all(|&x| x == 7.0), "{name}");
        }
        let mut state = fresh.clone();
        let mut narrow = Array4::from_elem((1, 4, 6, 4), 7.0);
        let error = subject.prefill_into((0..6).into(), &mut state, &mut narrow).unwrap_err().to_string();
        assert_eq!(
            error, "out: expected shape [batch, heads, len, value_dim] = [1, 4, 6, 5], got [1, 4, 6, 4]",
            "{name}"
        );
        assert!(state == fresh && narrow.iter().all(|&x| x == 7.0), "{name}");
        // A step takes one token of each sequence.
        assert!(subject.step((0..2).into(), &mut state).is_err(), "{name}");
        if entry.packs() {
            let two = || Span { tokens: 0..2, offsets: Some(&[0, 2, 2]), padded: None };
            let mut states = subject.initial(two());
            let refused = subject.step(two(), &mut states).is_err();
            assert!(refused, "{name}: two tokens of one sequence and none of another");
        }
        let offsets = Span { tokens: 0..6, offsets: Some(&[0, 7]), padded: None };
        let error = subject.forward(offsets).unwrap_err().to_string();
        assert!(error.contains("non-decreasing offsets from 0 to at most 6"), "{name}: {error}");
        assert!(state == fresh, "{name}");
    }
}

/// Arrays of gradients by name, by the kernel and by the definition.
type Found = Vec<(&'static str, Array4<f32>, Array4<f64>)>;

/// What the tests of gradients need.
trait Graded<T>: Subject<T> {
    fn gradients(&self, at: Span<'_>, d_out: &Array4<f32>, carried: Carried<'_>) -> Found;
}

impl<T: Element, E: Exhibit> Graded<T> for Stand<T, E>
where
    E::Mechanism: for<'a> Bounded<E::Input<'a, T>>
        + for<'a> Recurrent<E::Input<'a, T>, State = State>
        + Differentiable
        + for<'a> Recurrence<Operands<'a, T> = E::Input<'a, T>>,
{
    fn gradients(&self, at: Span<'_>, d_out: &Array4<f32>, carried: Carried<'_>) -> Found {
        self.with(at, |mechanism, x| {
            let mut got = zero_gradients::<T, _>(mechanism, &x).unwrap();
            backward_into::<T, _>(mechanism, &x, d_out.view(), carried, &mut got, &mut Workspace::new())
                .unwrap();
            let mut want = reference_backward::<T, _>(mechanism, &x, d_out.view(), carried).unwrap();
            let mut alone = mechanism.initial_state(x).unwrap().into_inner();
            backward_state_into::<T, _>(
                mechanism,
                &x,
                d_out.view(),
                carried.d_state,
                alone.view_mut(),
                &mut Workspace::new(),
            )
            .unwrap();
            let (got, want) = (got.views(), want.views());
            let pair = |name, got: ndarray::ArrayViewMut4<'_, f32>, want: ndarray::ArrayViewMut4<'_, f64>| {
                (name, got.to_owned(), want.to_owned())
            };
            let mut found = vec![
                pair("q", got.q, want.q),
                pair("v", got.v, want.v),
                pair("state alone", alone.view_mut(), want.state.to_owned().view_mut()),
                pair("state", got.state, want.state),
            ];
            for (name, got, want) in [
                ("k", got.k, want.k),
                ("decay", got.decay, want.decay),
                ("beta", got.beta, want.beta),
                ("a", got.a, want.a),
                ("b", got.b, want.b),
                ("rate", got.rate, want.rate),
                ("bias", got.bias, want.bias),
                ("bonus", got.bonus, want.bonus),
                ("skip", got.skip, want.skip),
            ] {
                found.extend(got.zip(want).map(|(got, want)| pair(name, got, want)));
            }
            found
        })
    }
}

struct GradedEntry {
    name: &'static str,
    variants: usize,
    /// Whether it corrects its state, which makes more of rounding.
    corrects: bool,
    make: fn(&Setup) -> Box<dyn Graded<f32>>,
    make_f16: fn(&Setup) -> Box<dyn Graded<f16>>,
}

macro_rules! graded {
    ($($exhibit:ident, $variants:literal, $corrects:literal;)+) => {
        &[$(GradedEntry {
            name: <$exhibit as Exhibit>::CARD.name,
            variants: $variants,
            corrects: $corrects,
            make: |setup| Box::new(Stand::<f32, $exhibit>::new(setup)),
            make_f16: |setup| Box::new(Stand::<f16, $exhibit>::new(setup)),
        },)+]
    };
}

static GRADED: &[GradedEntry] = graded![
    LightningExhibit, 2, false;
    RetNetExhibit, 1, false;
    SimpleGlaExhibit, 1, false;
    GlaExhibit, 1, false;
    DeltaNetExhibit, 2, true;
    GatedDeltaNetExhibit, 2, true;
    KdaExhibit, 2, true;
    Hgrn2Exhibit, 3, false;
    Mamba2Exhibit, 3, false;
    Rwkv6Exhibit, 2, false;
    Rwkv7Exhibit, 1, true;
];

/// The largest root mean square of errors as a share of that of the gradients.
fn off(what: &str, found: Found) -> f64 {
    let mut worst = 0f64;
    for (name, got, want) in found {
        assert_eq!(got.dim(), want.dim(), "{what}: {name}");
        let size = want.iter().map(|x| x * x).sum::<f64>().sqrt();
        let off = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
        assert!(off.is_finite() && (off == 0.0 || size > 0.0), "{what}: {name}: {off:e} of {size:e}");
        worst = worst.max(if size > 0.0 { off / size } else { 0.0 });
    }
    worst
}

fn check_gradients<T>(
    what: &str,
    entry: &GradedEntry,
    subject: &dyn Graded<T>,
    offsets: Option<&[usize]>,
    states: bool,
) {
    let len = subject.len();
    let span = || Span { tokens: 0..len, offsets, padded: None };
    let dim = subject.initial(span()).view().dim();
    let noise = |seed| array([dim.0, dim.1, dim.2, dim.3], seed);
    let (state, d_state) = (State::new(noise(8)).unwrap(), noise(9));
    let d_out = array([1, 4, len, 36], 7);
    let (state, d_state) = (states.then_some(&state), states.then_some(d_state.view()));
    let off = off(what, subject.gradients(span(), &d_out, Carried { state, d_state }));
    let bound = if entry.corrects { 5e-6 } else { 2e-6 };
    println!("{what}: {:.3} of the bound", off / bound);
    assert!(off <= bound, "{what}: {off:e}");
}

#[test]
fn gradients_keep_to_their_definition() {
    for entry in GRADED {
        let subject = SUBJECTS.iter().find(|subject| subject.name == entry.name).expect("a subject");
        for variant in 0..entry.variants {
            for (kind, decay) in DECAYS.into_iter().enumerate() {
                // Not what decays make no difference to once more.
                let out =
                    |decay| (subject.make)(&Setup { variant, decay, len: 9, ..SETUP }).forward((0..9).into());
                if kind > 0 && out(decay) == out(DECAYS[0]) {
                    continue;
                }
                let setup = |len| Setup { variant, decay, len, value_dim: 36, ..SETUP };
                let what = |len: usize| format!("{} {variant}, decay {kind}, {len} tokens", entry.name);
                for len in LENGTHS {
                    check_gradients(&what(len), entry, &*(entry.make)(&setup(len)), None, true);
                }
                let subject = (entry.make)(&setup(130));
                check_gradients(&what(130), entry, &*subject, None, false);
                check_gradients(&what(130), entry, &*subject, Some(&[0, 0, 5, 69, 121]), true);
                check_gradients(&what(70), entry, &*(entry.make_f16)(&setup(70)), None, true);
            }
        }
    }
}

/// The analytic gradients of the definition against differences of its
/// outputs, norms of queries and keys included.
#[test]
fn gradients_are_differences() {
    let step = 1.0 / 256.0;
    for entry in GRADED {
        for variant in 0..entry.variants {
            // Not so near 0 that a step makes it grow.
            let decay = |x: f32| -0.1 - 0.3 * x.abs();
            let setup = Setup { variant, decay, len: 5, dim: 6, value_dim: 4, grid: Some(1024.0), ..SETUP };
            let d_out = array([1, 4, 5, 4], 7);
            let subject = (entry.make)(&setup);
            let found = subject.gradients((0..5).into(), &d_out, Carried::default());
            for (name, _, found) in found {
                let which = match name {
                    "q" => 0,
                    "k" => 1,
                    "v" => 2,
                    "decay" => 3,
                    "beta" => 4,
                    "a" => 5,
                    "b" => 6,
                    _ => continue,
                };
                for (n, (at, got)) in found.indexed_iter().enumerate() {
                    if n % 7 != 3 {
                        continue;
                    }
                    let loss = |by: f32| {
                        let mut moved = (entry.make)(&setup);
                        moved.nudge(which, at.into(), by);
                        let (out, _) = moved.reference((0..5).into());
                        out.iter().zip(&d_out).map(|(x, d)| x * f64::from(*d)).sum::<f64>()
                    };
                    // Differences of two steps cancel the third derivative.
                    let slope = |by: f32| (loss(by) - loss(-by)) / f64::from(2.0 * by);
                    let want = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;
                    let what = format!("{} {variant}: {name} {at:?}", entry.name);
                    assert!((got - want).abs() < 2e-6, "{what} is {got:e}, not {want:e}");
                }
            }
        }
    }
}
