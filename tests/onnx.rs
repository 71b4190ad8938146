//! ONNX's LinearAttention (opset 27): each update rule of the operator, as its reference
//! states it, and the mechanism that the docs of `linear` name for it.

use attention_kernels::linear::{
    ChannelGated, DeltaNet, DeltaQkv, GatedDelta2Qkv, GatedDeltaNet, GatedDeltaNet2, GatedDeltaQkv, Gla, Kda,
    KdaQkv, Lightning, SimpleGla, State, TokenGated,
};
use attention_kernels::{Qkv, Recurrent};
use ndarray::{Array3, Array4, ArrayView3, ArrayView4, s};

const BATCH: usize = 2;
const LEN: usize = 75;
const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const KEY: usize = 6;
const VALUE: usize = 5;

/// What the operator has besides query, key and value, `[batch, len, heads * dim]`; what a
/// rule does not take is left out.
#[derive(Default)]
struct Operator {
    decay: Option<Array3<f32>>,
    beta: Option<Array3<f32>>,
    erase_gate: Option<Array3<f32>>,
    /// 0 for the default.
    scale: f32,
}

fn wave(seed: usize, width: usize, f: impl Fn(f64) -> f64) -> Array3<f32> {
    Array3::from_shape_fn((BATCH, LEN, width), |(b, t, c)| {
        f((((b * 31 + t) * 17 + c * (seed + 3)) as f64 * 0.37 + seed as f64).sin()) as f32
    })
}

/// `[batch, len, heads * dim]` as `[batch, heads, len, dim]`.
fn heads(x: &Array3<f32>, heads: usize) -> ArrayView4<'_, f32> {
    let (batch, len, width) = x.dim();
    let x = x.view().into_shape_with_order((batch, len, heads, width / heads)).unwrap();
    x.permuted_axes([0, 2, 1, 3])
}

/// `[batch, len, heads]` as `[batch, heads, len]`.
fn numbers(x: &Array3<f32>) -> ArrayView3<'_, f32> {
    x.view().permuted_axes([0, 2, 1])
}

/// The operator: the state decays, a delta rule takes off what it finds, what is left is
/// written under the key, and the queries of a group read.
fn reference(x: &Operator, [q, k, v]: [&Array3<f32>; 3], past: &Array4<f32>) -> (Array4<f64>, Array4<f64>) {
    let mut states = past.mapv(f64::from);
    let mut out = Array4::zeros((BATCH, Q_HEADS, LEN, VALUE));
    let scale = if x.scale == 0.0 { 1.0 / (KEY as f64).sqrt() } else { f64::from(x.scale) };
    for (b, h, t) in ndarray::indices((BATCH, KV_HEADS, LEN)) {
        let at = |x: &Array3<f32>, c: usize| f64::from(x[[b, t, c]]);
        let mut state = states.slice_mut(s![b, h, .., ..]);
        if let Some(decay) = &x.decay {
            for (d, mut row) in state.outer_iter_mut().enumerate() {
                let channel = if decay.dim().2 == KV_HEADS { h } else { h * KEY + d };
                row.mapv_inplace(|s| s * at(decay, channel).exp());
            }
        }
        let key = |d| at(k, h * KEY + d);
        for c in 0..VALUE {
            let mut value = at(v, h * VALUE + c);
            if let Some(beta) = &x.beta {
                let erased = |d| x.erase_gate.as_ref().map_or(1.0, |gate| at(gate, h * KEY + d));
                let found: f64 = (0..KEY).map(|d| state[[d, c]] * erased(d) * key(d)).sum();
                value = at(beta, h % beta.dim().2) * (value - found);
            }
            (0..KEY).for_each(|d| state[[d, c]] += key(d) * value);
        }
        for g in h * Q_HEADS / KV_HEADS..(h + 1) * Q_HEADS / KV_HEADS {
            for c in 0..VALUE {
                out[[b, g, t, c]] = scale * (0..KEY).map(|d| at(q, g * KEY + d) * state[[d, c]]).sum::<f64>();
            }
        }
    }
    (out, states)
}

/// Holds a mechanism against the operator: `run` has queries, keys, values and the scale, and
/// goes on from a state.
fn check(what: &str, x: &Operator, run: impl Fn(Qkv<'_, f32>, f32, &mut State) -> Array4<f32>) {
    let unit = |x: f64| x / (KEY as f64).sqrt();
    let (q, k) = (wave(1, Q_HEADS * KEY, |x| x), wave(2, KV_HEADS * KEY, unit));
    let v = wave(5, KV_HEADS * VALUE, |x| x);
    let past = Array4::from_shape_fn((BATCH, KV_HEADS, KEY, VALUE), |(b, h, d, c)| {
        ((b + 2 * h + 3 * d + 5 * c) as f32).sin()
    });
    let (want, present) = reference(x, [&q, &k, &v], &past);
    // Heads of queries have a state each: that of the key's head.
    let of = |head: usize| head * KV_HEADS / Q_HEADS;
    let shape = (BATCH, Q_HEADS, KEY, VALUE);
    let own = Array4::from_shape_fn(shape, |(b, h, d, c)| past[[b, of(h), d, c]]);
    let mut state = State::new(own).unwrap();
    let qkv = Qkv::new(heads(&q, Q_HEADS), heads(&k, KV_HEADS), heads(&v, KV_HEADS));
    let scale = if x.scale == 0.0 { 1.0 / (KEY as f32).sqrt() } else { x.scale };
    let out = run(qkv, scale, &mut state);
    for (&got, want) in out.iter().zip(&want) {
        assert!((f64::from(got) - want).abs() < 1e-5 * want.abs().max(1.0), "{what}: {got}, not {want}");
    }
    for ((b, h, d, c), &got) in state.view().indexed_iter() {
        let want = present[[b, of(h), d, c]];
        assert!(
            (f64::from(got) - want).abs() < 1e-5 * want.abs().max(1.0),
            "{what}: state {got}, not {want}"
        );
    }
}

#[test]
fn every_update_rule_is_a_mechanism() {
    let plain = Operator::default();
    check("linear", &plain, |x, scale, state| {
        Lightning::from_slopes(&[0.0; Q_HEADS]).scale(scale).build().unwrap().prefill(x, state).unwrap()
    });
    let decays = |width| Some(wave(7, width, |x| -0.3 * (1.0 + x)));
    let betas = |width| Some(wave(8, width, |x| 0.5 + 0.5 * x));
    for scale in [0.0, 0.7] {
        let gated = Operator { decay: decays(KV_HEADS), scale, ..Operator::default() };
        check("gated", &gated, |x, scale, state| {
            let x = TokenGated::new(x.reborrow(), numbers(gated.decay.as_ref().unwrap()));
            SimpleGla::builder().scale(scale).build().unwrap().prefill(x, state).unwrap()
        });
        let gated = Operator { decay: decays(KV_HEADS * KEY), scale, ..Operator::default() };
        check("gated channels", &gated, |x, scale, state| {
            let x = ChannelGated::new(x.reborrow(), heads(gated.decay.as_ref().unwrap(), KV_HEADS));
            Gla::builder().scale(scale).build().unwrap().prefill(x, state).unwrap()
        });
    }
    // One for all heads, or one each.
    for width in [1, KV_HEADS] {
        let delta = Operator { beta: betas(width), ..Operator::default() };
        check("delta", &delta, |x, scale, state| {
            let x = DeltaQkv::new(x.reborrow(), numbers(delta.beta.as_ref().unwrap()));
            DeltaNet::builder().scale(scale).build().unwrap().prefill(x, state).unwrap()
        });
        let delta = Operator { decay: decays(KV_HEADS), beta: betas(width), ..Operator::default() };
        check("gated delta", &delta, |x, scale, state| {
            let [decay, beta] = [&delta.decay, &delta.beta].map(|x| numbers(x.as_ref().unwrap()));
            let x = GatedDeltaQkv::new(x.reborrow(), decay, beta);
            GatedDeltaNet::builder().scale(scale).build().unwrap().prefill(x, state).unwrap()
        });
    }
    let delta = Operator { decay: decays(KV_HEADS * KEY), beta: betas(KV_HEADS), ..Operator::default() };
    check("gated delta channels", &delta, |x, scale, state| {
        let decay = heads(delta.decay.as_ref().unwrap(), KV_HEADS);
        let x = KdaQkv::new(x.reborrow(), decay, numbers(delta.beta.as_ref().unwrap()));
        Kda::builder().scale(scale).build().unwrap().prefill(x, state).unwrap()
    });
}

/// Of a later draft: what is erased is found under another key than the value is written.
#[test]
fn an_erase_gate_is_gated_delta_net_2() {
    let beta = wave(8, KV_HEADS, |x| 0.5 + 0.5 * x);
    let gate = wave(9, KV_HEADS * KEY, |x| 0.5 + 0.5 * x);
    let decay = wave(7, KV_HEADS * KEY, |x| -0.3 * (1.0 + x));
    let erase = Array3::from_shape_fn(gate.dim(), |(b, t, c)| beta[[b, t, c / KEY]] * gate[[b, t, c]]);
    let write = Array3::from_shape_fn((BATCH, LEN, KV_HEADS * VALUE), |(b, t, c)| beta[[b, t, c / VALUE]]);
    let x = Operator { decay: Some(decay.clone()), beta: Some(beta), erase_gate: Some(gate), scale: 0.0 };
    check("erase gate", &x, |x, scale, state| {
        let [decay, erase, write] = [&decay, &erase, &write].map(|x| heads(x, KV_HEADS));
        let x = GatedDelta2Qkv::new(x.reborrow(), decay, erase, write);
        GatedDeltaNet2::builder().scale(scale).build().unwrap().prefill(x, state).unwrap()
    });
}

/// Positive decays, which the operator takes, are growth.
#[test]
fn growth_has_to_be_asked_for() {
    let x = Operator { decay: Some(wave(7, KV_HEADS, |x| 0.05 * x)), ..Operator::default() };
    check("growth", &x, |qkv, scale, state| {
        let x = TokenGated::new(qkv.reborrow(), numbers(x.decay.as_ref().unwrap()));
        assert!(SimpleGla::builder().build().unwrap().prefill(x, state).is_err());
        SimpleGla::builder().scale(scale).allow_growth().build().unwrap().prefill(x, state).unwrap()
    });
}
