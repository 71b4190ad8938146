//! States in slots of a pool are states of their own.

use ndarray::{Array3, Array4, ArrayViewMut4, Axis, s};

use crate::attention::{Input, Pooled};
use crate::engine::parallel::on_threads;
use crate::engine::workspace::Workspace;
use crate::input::Qkv;
use crate::input::state::{State, StatePool};
use crate::linear::{Aaren, AarenInput, ChannelGated, DeltaNet, DeltaQkv, Gla, Lightning, S6, S6Input};
use crate::math::random::Normal;

const SLOTS: [usize; 3] = [4, 0, 2];

fn noise(dim: (usize, usize, usize, usize), seed: u64) -> Array4<f32> {
    let mut normal = Normal::new(seed);
    Array4::from_shape_simple_fn(dim, || 0.3 * normal.next().unwrap_or(0.0) as f32)
}

/// Two calls in a row; the second starts where the first has ended.
fn held<X: Input<Out = f32>>(what: &str, mechanism: &impl Pooled<X, State = State>, x: X) {
    let mut own = mechanism.initial_state(x).unwrap();
    let (_, heads, rows, cols) = own.view().dim();
    let mut pool = Array4::from_elem((6, heads, rows, cols), 7.0);
    for slot in SLOTS {
        pool.slice_mut(s![slot, .., .., ..]).fill(0.0);
    }
    let mut workspace = Workspace::new();
    let mut out = Array4::zeros(x.out_dim().unwrap());
    for _ in 0..2 {
        let want = mechanism.prefill(x, &mut own).unwrap();
        let lent = StatePool::new(pool.view_mut(), &SLOTS);
        mechanism.prefill_pooled_into(x, lent, out.view_mut(), &mut workspace).unwrap();
        assert_eq!(out, want, "{what}");
        for (i, slot) in SLOTS.into_iter().enumerate() {
            assert_eq!(pool.slice(s![slot, .., .., ..]), own.view().slice(s![i, .., .., ..]), "{what}");
        }
        for other in [1, 3, 5] {
            assert!(pool.slice(s![other, .., .., ..]).iter().all(|&x| x == 7.0), "{what}: slot {other}");
        }
    }
    let before = pool.clone();
    let mut refused = |slots: &[usize]| {
        let lent = StatePool::new(pool.view_mut(), slots);
        mechanism.prefill_pooled_into(x, lent, out.view_mut(), &mut workspace).unwrap_err().to_string()
    };
    let different = "slots: expected different slots below 6, got";
    assert_eq!(refused(&[4, 0, 4]), format!("{different} 4 for sequence 2"), "{what}");
    assert_eq!(refused(&[4, 6, 0]), format!("{different} 6 for sequence 1"), "{what}");
    assert_eq!(refused(&[4]), "slots: expected one slot for each of the 3 sequences, got 1 slots", "{what}");
    assert_eq!(pool, before, "{what}");
    let mut refused = |pool: ArrayViewMut4<'_, f32>| {
        let lent = StatePool::new(pool, &SLOTS);
        mechanism.prefill_pooled_into(x, lent, out.view_mut(), &mut workspace).unwrap_err().to_string()
    };
    let mut wide = Array4::zeros((6, heads, rows, cols + 1));
    assert!(refused(wide.view_mut()).starts_with("pool: expected shape [slots, heads, state_dim, columns]"));
    let part = refused(wide.slice_mut(s![.., .., .., ..cols]));
    assert!(part.starts_with("pool: expected states that lie one after the other"), "{what}: {part}");
}

#[test]
fn slots_are_states_of_their_own() {
    for (len, threads) in [(1, 1), (3, 2), (100, 1), (100, 3), (400, 8)] {
        let [q, k, v] = [1, 2, 3].map(|seed| noise((3, 2, len, 16), seed));
        let decay = noise((3, 2, len, 16), 4).mapv(|x| -x.abs());
        let beta = Array3::from_elem((3, 2, len), 0.5);
        let x = Qkv::new(q.view(), k.view(), v.view());
        on_threads(threads, || {
            held(&format!("Lightning, {len}"), &Lightning::builder(2).build().unwrap(), x);
            let gated = ChannelGated { qkv: x, log_decay: decay.view() };
            held(&format!("GLA, {len}"), &Gla::builder().build().unwrap(), gated);
            let delta = DeltaQkv { qkv: x, beta: beta.view() };
            held(&format!("DeltaNet, {len}"), &DeltaNet::builder().build().unwrap(), delta);
            let rates = noise((1, 2, 16, 16), 5).index_axis_move(Axis(0), 0).mapv(|x| -x.abs());
            let scan = S6::builder(rates);
            let steps = decay.mapv(f32::abs);
            let channels = S6Input::new(v.view(), steps.view(), k.view(), q.view());
            held(&format!("S6, {len}"), &scan.build().unwrap(), channels);
            let query = q.slice(s![.., .., 0, ..]);
            let prefixes = AarenInput::new(query, k.view(), v.view());
            held(&format!("Aaren, {len}"), &Aaren::builder().build().unwrap(), prefixes);
        });
    }
}
