//! Gradients of every mechanism that has them.

use ndarray::{Array3, Array4, s};

use super::Carried;
use crate::attention::{Backward, Recurrent};
use crate::engine::workspace::Workspace;
use crate::input::Qkv;
use crate::linear::{ChannelGated, GatedDeltaNet, GatedDeltaQkv, Gla, RetNet, State};
use crate::testing::{Gates, array, unit};

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
}

impl<T> Case<T> {
    fn qkv(&self) -> Qkv<'_, T> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    fn plain(&self) -> Qkv<'_, T> {
        Qkv::new(self.all_q.view(), self.k.view(), self.shared_v.view())
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
