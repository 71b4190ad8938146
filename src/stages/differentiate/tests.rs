//! Gradients of every mechanism that has them.

use half::{bf16, f16};
use ndarray::{Array3, Array4, s};

use super::{Carried, GradientArrays};
use crate::attention::{Attention, Backward, Input, Recurrent};
use crate::element::Element;
use crate::engine::recur::backward::Gradients;
use crate::engine::workspace::Workspace;
use crate::input::Qkv;
use crate::linear::{
    ChannelGated, DeltaNet, DeltaQkv, GatedDeltaNet, GatedDeltaQkv, Gla, Kda, KdaQkv, Lightning, RetNet,
    SimpleGla, State, TokenGated,
};
use crate::testing::{Gates, LENGTHS, array, unit};

/// Operands of all mechanisms: four heads, of which two share queries, keys
/// and gates.
struct Case<T = f32> {
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    tokens: Array3<f32>,
    channels: Array4<f32>,
    beta: Array3<f32>,
    /// Queries of four heads and values of two: plain [`Qkv`] has as many heads
    /// of keys as of values.
    all_q: Array4<T>,
    shared_v: Array4<T>,
}

impl Case {
    fn new(len: usize, gates: Gates) -> Self {
        Self {
            q: array([1, 2, len, 20], 1),
            k: unit(array([1, 2, len, 20], 2)),
            v: array([1, 4, len, 36], 3),
            tokens: gates.tokens([1, 2, len], 4),
            channels: gates.channels([1, 2, len, 20], 5),
            beta: array([1, 1, 2, len], 6).mapv(f32::abs).remove_axis(ndarray::Axis(0)),
            all_q: array([1, 4, len, 20], 10),
            shared_v: array([1, 2, len, 36], 11),
        }
    }

    fn to<T: Element>(&self) -> Case<T> {
        Case {
            q: self.q.mapv(T::from_f32),
            k: self.k.mapv(T::from_f32),
            v: self.v.mapv(T::from_f32),
            tokens: self.tokens.clone(),
            channels: self.channels.clone(),
            beta: self.beta.clone(),
            all_q: self.all_q.mapv(T::from_f32),
            shared_v: self.shared_v.mapv(T::from_f32),
        }
    }
}

impl<T> Case<T> {
    fn qkv(&self) -> Qkv<'_, T> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    fn plain(&self) -> Qkv<'_, T> {
        Qkv::new(self.all_q.view(), self.k.view(), self.shared_v.view())
    }
}

fn list<X>(x: Gradients<X>) -> Vec<(&'static str, X)> {
    let mut list = vec![("q", x.q), ("k", x.k), ("v", x.v), ("state", x.state)];
    list.extend(x.decay.map(|x| ("decay", x)));
    list.extend(x.beta.map(|x| ("beta", x)));
    list
}

/// The root mean square of errors as a share of that of the gradients, for the
/// worst of the arrays; the state at the start and the gradient of that at the
/// end are noise if there are `states`.
fn off<X, M, A, B>(mechanism: &M, x: X, states: bool) -> f64
where
    X: Input,
    M: Recurrent<X, State = State>
        + for<'a> Backward<X, Gradients<f32> = A, Gradients<f64> = B, Carried<'a> = Carried<'a>>,
    A: GradientArrays<f32>,
    B: GradientArrays<f64>,
{
    let (b, h, n, d) = x.out_dim().unwrap();
    let d_out = array([b, h, n, d], 7);
    let shape = mechanism.initial_state(x).unwrap().view().dim();
    let noise = |seed| array([shape.0, shape.1, shape.2, shape.3], seed);
    let (state, d_state) = (State::new(noise(8)).unwrap(), noise(9));
    let (state, d_state) = (states.then_some(&state), states.then_some(d_state.view()));
    let carried = Carried { state, d_state };
    let mut want = mechanism.reference_backward(x, d_out.view(), carried).unwrap();
    let mut got = mechanism.backward(x, d_out.view(), carried).unwrap();
    let mut worst = 0f64;
    for ((name, want), (_, got)) in list(want.views()).into_iter().zip(list(got.views())) {
        assert_eq!(want.dim(), got.dim(), "{name}");
        let size = want.iter().map(|x| x * x).sum::<f64>().sqrt();
        let off = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
        assert!(off.is_finite() && (off == 0.0 || size > 0.0), "{name}: {off:e} of {size:e}");
        if size > 0.0 {
            worst = worst.max(off / size);
        }
    }
    worst
}

/// [`off`] for every mechanism, and whether it corrects its state.
fn each<T: Element>(case: &Case<T>, pack: Option<&[usize]>, states: bool) -> Vec<(&'static str, bool, f64)> {
    let (qkv, plain) = match pack {
        Some(offsets) => (case.qkv().packed(offsets, offsets), case.plain().packed(offsets, offsets)),
        None => (case.qkv(), case.plain()),
    };
    let (tokens, channels, beta) = (case.tokens.view(), case.channels.view(), case.beta.view());
    let slopes = [0.0, 0.01, 0.3, f32::INFINITY];
    let lightning = Lightning::from_slopes(&slopes).build().unwrap();
    let retnet = RetNet::builder(4).build().unwrap();
    let simple = SimpleGla::builder().build().unwrap();
    let gla = Gla::builder().build().unwrap();
    let delta = DeltaNet::builder().build().unwrap();
    let gated = GatedDeltaNet::builder().build().unwrap();
    let kda = Kda::builder().build().unwrap();
    let normed = GatedDeltaNet::builder().normalize_qk().build().unwrap();
    let gated_qkv = GatedDeltaQkv { qkv, log_decay: tokens, beta };
    vec![
        ("lightning", false, off(&lightning, plain, states)),
        ("retnet", false, off(&retnet, plain, states)),
        ("simple gla", false, off(&simple, TokenGated { qkv, log_decay: tokens }, states)),
        ("gla", false, off(&gla, ChannelGated { qkv, log_decay: channels }, states)),
        ("deltanet", true, off(&delta, DeltaQkv { qkv, beta }, states)),
        ("gated_deltanet", true, off(&gated, gated_qkv, states)),
        ("gated_deltanet, norms", true, off(&normed, gated_qkv, states)),
        ("kda", true, off(&kda, KdaQkv { qkv, log_decay: channels, beta }, states)),
    ]
}

fn keep(what: &str, found: Vec<(&'static str, bool, f64)>) {
    for (name, corrects, off) in found {
        let bound = if corrects { 5e-6 } else { 2e-6 };
        println!("{name} {what}: {:.3} of the bound", off / bound);
        assert!(off <= bound, "{name} {what}: {off:e}");
    }
}

#[test]
fn gradients_keep_to_their_definition() {
    for len in LENGTHS {
        for gates in [Gates::Zero, Gates::Mild, Gates::Strong, Gates::Cut] {
            let case = Case::new(len, gates);
            keep(&format!("{len} {gates:?}"), each(&case, None, true));
        }
    }
    keep("from nothing", each(&Case::new(130, Gates::Mild), None, false));
    keep("packed", each(&Case::new(130, Gates::Cut), Some(&[0, 0, 5, 69, 130]), true));
}

#[test]
fn gradients_for_half_types_are_those_of_their_numbers() {
    let case = Case::new(70, Gates::Mild);
    keep("f16", each(&case.to::<f16>(), None, true));
    keep("bf16", each(&case.to::<bf16>(), None, true));
}

/// The definition with norms, which the recurrence knows nothing of, against
/// differences of outputs.
#[test]
fn norms_have_gradients() {
    let mut case = Case::new(5, Gates::Mild);
    // Multiples of a power of two, to which another can be added exactly.
    case.q.mapv_inplace(|x| (x * 1024.0).round() / 1024.0);
    case.k.mapv_inplace(|x| (x * 1024.0).round() / 1024.0);
    let d_out = array([1, 4, 5, 36], 7);
    let delta = DeltaNet::builder().normalize_qk().build().unwrap();
    let x = DeltaQkv { qkv: case.qkv(), beta: case.beta.view() };
    let found = delta.reference_backward(x, d_out.view(), Carried::default()).unwrap();
    let step = 1.0 / 256.0;
    for (keys, found) in [(false, &found.q), (true, &found.k)] {
        for at in [(0, 0, 0, 0), (0, 1, 2, 7), (0, 0, 4, 19)] {
            let loss = |by: f32| {
                let (mut q, mut k) = (case.q.clone(), case.k.clone());
                (if keys { &mut k } else { &mut q })[at] += by;
                let qkv = Qkv::new(q.view(), k.view(), case.v.view());
                let out = delta.reference(DeltaQkv { qkv, beta: case.beta.view() }).unwrap();
                out.iter().zip(&d_out).map(|(x, d)| x * f64::from(*d)).sum::<f64>()
            };
            // Differences of two steps cancel the third derivative.
            let slope = |by: f32| (loss(by) - loss(-by)) / f64::from(2.0 * by);
            let want = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;
            assert!((found[at] - want).abs() < 1e-6, "{keys} {at:?}: {:e}, not {want:e}", found[at]);
        }
    }
}

#[test]
fn what_is_forgotten_has_no_gradient() {
    let mut case = Case::new(100, Gates::Mild);
    for (t, gate) in [(3, f32::NEG_INFINITY), (64, -1e4), (77, f32::NEG_INFINITY)] {
        case.tokens.slice_mut(s![.., .., t]).fill(gate);
        case.channels.slice_mut(s![.., .., t, ..]).fill(gate);
    }
    let d_out = array([1, 4, 100, 36], 7);
    let state = State::new(array([1, 4, 20, 36], 8)).unwrap();
    let x = GatedDeltaQkv { qkv: case.qkv(), log_decay: case.tokens.view(), beta: case.beta.view() };
    let gated = GatedDeltaNet::builder().build().unwrap();
    let found = gated.backward(x, d_out.view(), Carried { state: Some(&state), d_state: None }).unwrap();
    let x = ChannelGated { qkv: case.qkv(), log_decay: case.channels.view() };
    let gla = Gla::builder()
        .build()
        .unwrap()
        .backward(x, d_out.view(), Carried { state: Some(&state), d_state: None })
        .unwrap();
    for t in [3, 64, 77] {
        assert!(found.log_decay.slice(s![.., .., t]).iter().all(|&x| x == 0.0), "{t}");
        assert!(gla.log_decay.slice(s![.., .., t, ..]).iter().all(|&x| x == 0.0), "{t}");
    }
    assert!(found.log_decay.slice(s![.., .., 4..64]).iter().all(|&x| x != 0.0));
    // Nothing of the state is left.
    assert!(found.state.iter().chain(&gla.state).any(|&x| x != 0.0));
    let from_cut = array([1, 4, 100, 36], 7);
    let mut late = from_cut.clone();
    late.slice_mut(s![.., .., ..4, ..]).fill(0.0);
    let x = ChannelGated { qkv: case.qkv(), log_decay: case.channels.view() };
    let gla = Gla::builder()
        .build()
        .unwrap()
        .backward(x, late.view(), Carried { state: Some(&state), d_state: None })
        .unwrap();
    assert!(gla.state.iter().all(|&x| x == 0.0));
}

#[test]
fn pieces_are_differentiated_from_the_last() {
    let case = Case::new(197, Gates::Mild);
    let d_out = array([1, 4, 197, 36], 7);
    let part = |range: std::ops::Range<usize>| {
        let rows = s![.., .., range.clone(), ..];
        GatedDeltaQkv {
            qkv: Qkv::new(case.q.slice(rows), case.k.slice(rows), case.v.slice(rows)),
            log_decay: case.tokens.slice(s![.., .., range.clone()]),
            beta: case.beta.slice(s![.., .., range]),
        }
    };
    let gated = GatedDeltaNet::builder().build().unwrap();
    let whole = gated.backward(part(0..197), d_out.view(), Carried::default()).unwrap();
    let cuts = [0, 70, 71, 71, 150, 197];
    let mut state = gated.initial_state(part(0..197)).unwrap();
    let mut states = Vec::new();
    for cut in cuts.windows(2) {
        states.push(state.clone());
        gated.prefill(part(cut[0]..cut[1]), &mut state).unwrap();
    }
    let mut d_state: Option<Array4<f32>> = None;
    for (cut, state) in cuts.windows(2).zip(&states).rev() {
        let (range, d_out) = (cut[0]..cut[1], d_out.slice(s![.., .., cut[0]..cut[1], ..]));
        let d_last = d_state.as_ref().map(|x| x.view());
        let found = gated
            .backward(part(range.clone()), d_out, Carried { state: Some(state), d_state: d_last })
            .unwrap();
        let close = |a: &f32, b: &f32| (a - b).abs() <= 1e-4 * b.abs().max(1.0);
        let rows = s![.., .., range.clone(), ..];
        assert!(found.k.iter().zip(&whole.k.slice(rows)).all(|(a, b)| close(a, b)), "{range:?}");
        let numbers = s![.., .., range.clone()];
        assert!(found.log_decay.iter().zip(&whole.log_decay.slice(numbers)).all(|(a, b)| close(a, b)));
        assert!(found.beta.iter().zip(&whole.beta.slice(numbers)).all(|(a, b)| close(a, b)));
        d_state = Some(found.state);
    }
}

#[test]
fn a_nan_shows_in_what_depends_on_it() {
    let mut case = Case::new(100, Gates::Mild);
    case.all_q.slice_mut(s![.., .., 70, 3]).fill(f32::NAN);
    let d_out = array([1, 4, 100, 36], 7);
    let retnet = RetNet::builder(4).build().unwrap();
    let found = retnet.backward(case.plain(), d_out.view(), Carried::default()).unwrap();
    assert!(found.v.slice(s![.., .., ..71, ..]).iter().all(|x| x.is_nan()));
    assert!(found.k.slice(s![.., .., ..71, 3]).iter().all(|x| x.is_nan()));
}

#[test]
fn strides_and_workspaces_change_nothing() {
    let case = Case::new(70, Gates::Mild);
    let x = GatedDeltaQkv { qkv: case.qkv(), log_decay: case.tokens.view(), beta: case.beta.view() };
    let gated = GatedDeltaNet::builder().build().unwrap();
    let d_out = array([1, 4, 70, 36], 7);
    let want = gated.backward(x, d_out.view(), Carried::default()).unwrap();
    // The last axis first in memory.
    let turned = d_out.view().permuted_axes([3, 2, 1, 0]).as_standard_layout().into_owned();
    let turned = turned.view().permuted_axes([3, 2, 1, 0]);
    let mut got = gated.zero_gradients(x).unwrap();
    got.q = Array4::from_elem((20, 70, 2, 1), f32::NAN).permuted_axes([3, 2, 1, 0]);
    got.v = Array4::from_elem((36, 70, 4, 1), f32::NAN).permuted_axes([3, 2, 1, 0]);
    got.beta.fill(f32::NAN);
    let bytes = gated.backward_workspace_bytes(x).unwrap();
    let mut workspace = Workspace::with_capacity(bytes);
    let capacity = workspace.capacity();
    gated.backward_into(x, turned, Carried::default(), &mut got, &mut workspace).unwrap();
    assert_eq!(workspace.capacity(), capacity);
    assert_eq!(got, want);
}

#[test]
fn refusals() {
    let case = Case::new(4, Gates::Mild);
    let retnet = RetNet::builder(4).build().unwrap();
    let d_out = array([1, 4, 4, 36], 7);
    let says = |found: crate::Result<crate::linear::QkvGradients>| found.unwrap_err().to_string();
    let short = d_out.slice(s![.., .., 1.., ..]);
    assert_eq!(
        says(retnet.backward(case.plain(), short, Carried::default())),
        "d_out: expected shape [batch, heads, len, value_dim] = [1, 4, 4, 36], got [1, 4, 3, 36]"
    );
    assert_eq!(
        says(retnet.backward(
            case.plain(),
            d_out.view(),
            Carried { state: None, d_state: Some(d_out.view()) }
        )),
        "d_state: expected shape [sequences, heads, state_dim, columns] = [1, 4, 20, 36], got [1, 4, 4, 36]"
    );
    let state = State::new(array([1, 2, 20, 36], 1)).unwrap();
    assert_eq!(
        says(retnet.backward(case.plain(), d_out.view(), Carried { state: Some(&state), d_state: None })),
        "state: expected shape [sequences, heads, state_dim, columns] = [1, 4, 20, 36], got [1, 2, 20, 36]"
    );
    let mut gradients = retnet.zero_gradients(case.plain()).unwrap();
    gradients.k = gradients.v.clone();
    gradients.q.fill(5.0);
    let error = retnet
        .backward_into(case.plain(), d_out.view(), Carried::default(), &mut gradients, &mut Workspace::new())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "gradients.k: expected shape [batch, heads, len, dim] = [1, 2, 4, 20], got [1, 2, 4, 36]"
    );
    assert!(gradients.q.iter().all(|&x| x == 5.0), "something was written");
}
