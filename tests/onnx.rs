//! ONNX's operators as their reference states them, in `f64`: Attention (opsets 23 to 25),
//! LinearAttention (opset 27), and the mechanism that the docs of `linear` name for each of
//! its update rules.

use attention_kernels::linear::{
    ChannelGated, DeltaNet, DeltaQkv, GatedDelta2Qkv, GatedDeltaNet, GatedDeltaNet2, GatedDeltaQkv, Gla, Kda,
    KdaQkv, Lightning, SimpleGla, State, TokenGated,
};
use attention_kernels::onnx::{
    Attention, AttentionInputs, AttentionMask, AttentionOutputs, LinearAttention, LinearAttentionInputs,
    UpdateRule,
};
use attention_kernels::{Element, Qkv, Recurrent};
use half::{bf16, f16};
use ndarray::{Array1, Array3, Array4, ArrayD, ArrayView3, ArrayView4, IxDyn, s};

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

/// The operator itself, of each rule and type, with a state and without.
#[test]
fn linear_attention_is_the_operator() {
    fn run<T: Element>(rule: UpdateRule, x: &Operator, far: f64) {
        let unit = |x: f64| x / (KEY as f64).sqrt();
        let [q, k, v] =
            [wave(1, Q_HEADS * KEY, |x| x), wave(2, KV_HEADS * KEY, unit), wave(5, KV_HEADS * VALUE, |x| x)]
                .map(|x| x.mapv(T::from_f32));
        let [decay, beta] = [&x.decay, &x.beta].map(|x| x.as_ref().map(|x| x.mapv(T::from_f32)));
        let wide = |x: &Array3<T>| x.mapv(T::to_f32);
        let exact = Operator {
            decay: decay.as_ref().map(wide),
            beta: beta.as_ref().map(wide),
            erase_gate: None,
            scale: x.scale,
        };
        let past = Array4::from_shape_fn((BATCH, KV_HEADS, KEY, VALUE), |(b, h, d, c)| {
            ((b + 2 * h + 3 * d + 5 * c) as f32).sin()
        });
        for past in [Some(&past), None] {
            let zero = Array4::zeros((BATCH, KV_HEADS, KEY, VALUE));
            let (want, present) = reference(&exact, [&wide(&q), &wide(&k), &wide(&v)], past.unwrap_or(&zero));
            let operator = LinearAttention {
                update_rule: rule,
                scale: x.scale,
                ..LinearAttention::new(Q_HEADS, KV_HEADS)
            };
            let (y, state) = operator
                .forward(LinearAttentionInputs {
                    past_state: past.map(|past| past.view()),
                    decay: decay.as_ref().map(|x| x.view()),
                    beta: beta.as_ref().map(|x| x.view()),
                    ..LinearAttentionInputs::<T, f32>::new(q.view(), k.view(), v.view())
                })
                .unwrap();
            let near = |got: f64, want: f64, far: f64| {
                assert!((got - want).abs() < far * want.abs().max(1.0), "{rule:?}: {got}, not {want}");
            };
            for ((b, h, t, c), &want) in want.indexed_iter() {
                near(y[[b, t, h * VALUE + c]].to_f64(), want, far);
            }
            state.iter().zip(&present).for_each(|(&got, &want)| near(f64::from(got), want, 1e-5));
        }
    }
    let decays = |width| Some(wave(7, width, |x| -0.3 * (0.9 + x)));
    let betas = |width| Some(wave(8, width, |x| 0.5 + 0.5 * x));
    let plain = Operator::default;
    for (rule, x) in [
        (UpdateRule::Linear, Operator { scale: 0.3, ..plain() }),
        (UpdateRule::Gated, Operator { decay: decays(KV_HEADS), ..plain() }),
        (UpdateRule::Gated, Operator { decay: decays(KV_HEADS * KEY), scale: 0.7, ..plain() }),
        (UpdateRule::Delta, Operator { beta: betas(1), ..plain() }),
        (UpdateRule::Delta, Operator { beta: betas(KV_HEADS), ..plain() }),
        (UpdateRule::GatedDelta, Operator { decay: decays(KV_HEADS), beta: betas(1), ..plain() }),
        (
            UpdateRule::GatedDelta,
            Operator { decay: decays(KV_HEADS * KEY), beta: betas(KV_HEADS), ..plain() },
        ),
    ] {
        run::<f32>(rule, &x, 1e-5);
        run::<f16>(rule, &x, 1e-3);
        run::<bf16>(rule, &x, 8e-3);
    }
}

#[test]
fn linear_attention_refuses_what_the_operator_does() {
    let (q, kv, numbers) =
        (Array3::<f32>::zeros((1, 3, 12)), Array3::zeros((1, 3, 6)), Array3::zeros((1, 3, 2)));
    let input = || LinearAttentionInputs::<f32>::new(q.view(), kv.view(), kv.view());
    let error = |operator: LinearAttention, x| operator.forward(x).unwrap_err().to_string();
    let of = |update_rule| LinearAttention { update_rule, ..LinearAttention::new(4, 2) };
    let gated = || LinearAttentionInputs { decay: Some(numbers.view()), ..input() };
    assert_eq!(error(of(UpdateRule::Gated), input()), "decay: expected an array for Gated, got none");
    assert_eq!(error(of(UpdateRule::Delta), input()), "beta: expected an array for Delta, got none");
    assert_eq!(
        error(of(UpdateRule::Linear), gated()),
        "decay: expected none for Linear, got an array [1, 3, 2]"
    );
    let x = LinearAttentionInputs { decay: Some(kv.slice(s![.., .., ..3])), ..input() };
    assert_eq!(
        error(of(UpdateRule::Gated), x),
        "decay: expected shape [batch, len, 2 or 6] with [1, 3], got [1, 3, 3]"
    );
    assert_eq!(
        error(LinearAttention::new(3, 2), input()),
        "q_num_heads: expected a multiple of the 2 key/value heads, and at least 1 of both, got 3"
    );
    let state = Array4::zeros((1, 4, 3, 3));
    let x = LinearAttentionInputs { past_state: Some(state.view()), ..input() };
    assert_eq!(
        error(of(UpdateRule::Linear), x),
        "past_state: expected shape [batch, kv_num_heads, dk, dv] = [1, 2, 3, 3], got [1, 4, 3, 3]"
    );
    assert_eq!(
        UpdateRule::named("other").unwrap_err().to_string(),
        "update_rule: expected linear, gated, delta or gated_delta, got other"
    );
    assert_eq!(UpdateRule::named("gated_delta").unwrap(), UpdateRule::default());
}

/// A call of Attention.
#[derive(Clone)]
struct Call<T> {
    /// `[batch, heads, len, dim]`
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    past: Option<[Array4<T>; 2]>,
    visible: Option<ArrayD<bool>>,
    bias: Option<ArrayD<T>>,
    lengths: Option<Array1<i64>>,
    attributes: Attention,
}

fn noise<T: Element>(seed: usize, shape: &[usize]) -> ArrayD<T> {
    let mut n = seed * 1009;
    ArrayD::from_shape_simple_fn(shape, || {
        n += 1;
        T::from_f32((((n * 7919) % 10_007) as f64 * 0.731).sin() as f32)
    })
}

fn rows<T: Element>(seed: usize, shape: [usize; 4]) -> Array4<T> {
    noise(seed, &shape).into_dimensionality().unwrap()
}

impl<T: Element> Call<T> {
    fn new(q_len: usize, kv_len: usize, attributes: Attention) -> Self {
        let [q, k, v] = [[2, 4, q_len, 6], [2, 2, kv_len, 6], [2, 2, kv_len, 5]];
        let (q, k, v) = (rows(1, q).mapv(|x: T| T::from_f32(3.0 * x.to_f32())), rows(2, k), rows(3, v));
        Self { q, k, v, past: None, visible: None, bias: None, lengths: None, attributes }
    }

    fn with_past(self, len: usize) -> Self {
        Self { past: Some([rows(4, [2, 2, len, 6]), rows(5, [2, 2, len, 5])]), ..self }
    }

    /// The operator of `[batch, heads, len, dim]`: `Y`, and all of `qk_matmul_output`.
    fn reference(&self) -> (Array4<f64>, [Array4<f64>; 4]) {
        let a = &self.attributes;
        let (q, join) = (self.q.mapv(T::to_f64), |x: &Array4<T>, past: usize| match &self.past {
            Some(of) => ndarray::concatenate(ndarray::Axis(2), &[of[past].view(), x.view()]).unwrap(),
            None => x.clone(),
        });
        let (k, v) = (join(&self.k, 0).mapv(T::to_f64), join(&self.v, 1).mapv(T::to_f64));
        let ((batch, heads, q_len, dim), (_, groups, total, _)) = (q.dim(), k.dim());
        let scale = a.scale.map_or(1.0 / (dim as f64).sqrt(), f64::from);
        let past = self.past.as_ref().map_or(0, |past| past[0].dim().2) as i64;
        let shape = (batch, heads, q_len, total);
        let mut stages: [Array4<f64>; 4] = std::array::from_fn(|_| Array4::zeros(shape));
        let mut y = Array4::zeros((batch, heads, q_len, v.dim().3));
        // From the right; a last axis that is too short hides what is beyond it.
        fn entry<A: Copy>(mask: &ArrayD<A>, at: [usize; 4], opset: usize, beyond: A) -> A {
            let first = 4 - mask.ndim();
            let mut index = Vec::new();
            for (axis, &size) in mask.shape().iter().enumerate() {
                let (at, last) = (at[first + axis], first + axis == 3);
                if size == 1 && !(last && opset >= 24) {
                    index.push(0);
                } else if at >= size {
                    return beyond;
                } else {
                    index.push(at);
                }
            }
            mask[IxDyn(&index)]
        }
        for (b, h, i) in ndarray::indices((batch, heads, q_len)) {
            let group = h * groups / heads;
            let length = self.lengths.as_ref().map_or(total as i64, |lengths| lengths[b]);
            let offset = if self.lengths.is_some() { length - q_len as i64 } else { past };
            let at = i as i64 + offset;
            for j in 0..total {
                let dot: f64 = (0..dim).map(|c| q[[b, h, i, c]] * k[[b, group, j, c]]).sum();
                let raw = scale * dot;
                let cap = f64::from(a.softcap);
                let capped = if cap > 0.0 { cap * (raw / cap).tanh() } else { raw };
                let key = j as i64;
                let hidden = a.is_causal && key > at
                    || a.left_window_size >= 0 && key < at - a.left_window_size
                    || a.right_window_size >= 0 && key > at + a.right_window_size
                    || key >= length
                    || self.visible.as_ref().is_some_and(|mask| !entry(mask, [b, h, i, j], a.opset, false));
                let bias = self.bias.as_ref().map_or(0.0, |bias| {
                    entry(bias, [b, h, i, j], a.opset, T::from_f32(f32::NEG_INFINITY)).to_f64()
                });
                let score =
                    if hidden || bias == f64::NEG_INFINITY { f64::NEG_INFINITY } else { capped + bias };
                let out = [raw, capped, score];
                stages.iter_mut().zip(out).for_each(|(to, x)| to[[b, h, i, j]] = x);
            }
            let scores = stages[2].slice(s![b, h, i, ..]).to_owned();
            let most = scores.fold(f64::NEG_INFINITY, |m, &x| m.max(x));
            if most == f64::NEG_INFINITY {
                continue;
            }
            let weights = scores.mapv(|x| (x - most).exp());
            let weights = &weights / weights.sum();
            for c in 0..v.dim().3 {
                y[[b, h, i, c]] = (0..total).map(|j| weights[j] * v[[b, group, j, c]]).sum();
            }
            stages[3].slice_mut(s![b, h, i, ..]).assign(&weights);
        }
        (y, stages)
    }

    fn run(&self, packed: bool, mode: i64) -> attention_kernels::Result<AttentionOutputs<T>> {
        let arrays = [&self.q, &self.k, &self.v].map(|x| {
            let (batch, heads, len, dim) = x.dim();
            if !packed {
                return x.clone().into_dyn();
            }
            let by_token = x.view().permuted_axes([0, 2, 1, 3]);
            by_token
                .as_standard_layout()
                .into_owned()
                .into_shape_with_order((batch, len, heads * dim))
                .unwrap()
                .into_dyn()
        });
        let mut attributes = Attention { qk_matmul_output_mode: mode, ..self.attributes.clone() };
        if packed {
            (attributes.q_num_heads, attributes.kv_num_heads) = (Some(self.q.dim().1), Some(self.k.dim().1));
        }
        let [q, k, v] = arrays.each_ref().map(|x| x.view());
        let visible = self.visible.as_ref().map(|mask| AttentionMask::Bool(mask.view()));
        let bias = self.bias.as_ref().map(|mask| AttentionMask::Float(mask.view()));
        attributes.forward_with_qk(AttentionInputs {
            attn_mask: visible.or(bias),
            past_key: self.past.as_ref().map(|past| past[0].view()),
            past_value: self.past.as_ref().map(|past| past[1].view()),
            nonpad_kv_seqlen: self.lengths.as_ref().map(|lengths| lengths.view()),
            ..AttentionInputs::new(q, k, v)
        })
    }

    /// Outputs keep to the operator, in every mode, whatever the axes of the inputs.
    fn check(&self, what: &str) {
        let (want, stages) = self.reference();
        let far = T::ROUNDING.max(f64::from(f32::EPSILON) * 32.0) * 2.0;
        let near = |got: T, want: f64, which: &str| {
            let got = got.to_f64();
            let fits = got == want || (got - want).abs() <= far * want.abs().max(1.0);
            assert!(fits, "{what}, {which}: {got}, not {want}");
        };
        for (packed, mode) in
            [false, true].into_iter().flat_map(|packed| (0..4).map(move |mode| (packed, mode)))
        {
            let out = self.run(packed, mode).unwrap();
            for ((b, h, i, c), &want) in want.indexed_iter() {
                let at = if packed { vec![b, i, h * 5 + c] } else { vec![b, h, i, c] };
                near(out.y[IxDyn(&at)], want, "Y");
            }
            let qk = out.qk_matmul_output.unwrap();
            assert_eq!(qk.dim(), stages[0].dim(), "{what}");
            let which = format!("mode {mode}");
            qk.iter().zip(&stages[mode as usize]).for_each(|(&got, &want)| near(got, want, &which));
            let past = self.past.as_ref().map_or(0, |past| past[0].dim().2);
            assert_eq!(out.present_key.is_some(), self.past.is_some());
            if let (Some(key), Some(value), Some(of)) = (out.present_key, out.present_value, &self.past) {
                let parts = |x: &Array4<T>| {
                    [x.slice(s![.., .., ..past, ..]), x.slice(s![.., .., past.., ..])]
                        .map(|x| x.mapv(T::to_f32))
                };
                assert_eq!(parts(&key), [&of[0], &self.k].map(|x| x.mapv(T::to_f32)));
                assert_eq!(parts(&value), [&of[1], &self.v].map(|x| x.mapv(T::to_f32)));
            }
        }
    }
}

/// Masks of every rank and kind: what a call becomes with them.
fn masked<T: Element>(call: &Call<T>, opset: usize) -> Vec<(String, Call<T>)> {
    let (q_len, total) =
        (call.q.dim().2, call.k.dim().2 + call.past.as_ref().map_or(0, |past| past[0].dim().2));
    let mut shapes = vec![
        vec![],
        vec![q_len, total],
        vec![1, total],
        vec![4, q_len, total],
        vec![1, q_len, total],
        vec![2, 1, q_len, total],
        vec![2, 4, q_len, total],
        vec![1, 4, 1, total],
        vec![q_len, 1],
        vec![total],
    ];
    if opset >= 24 {
        shapes.extend([vec![q_len, total - 2], vec![2, 4, q_len, total - 1]]);
    }
    let with = |shape: Vec<usize>| {
        let what = format!("mask {shape:?}");
        if shape.is_empty() {
            return vec![("no mask".to_owned(), call.clone())];
        }
        let numbers = noise::<T>(9, &shape);
        let visible = numbers.mapv(|x| x.to_f32() > -0.4);
        let bias = numbers.mapv(|x| if x.to_f32() < -0.7 { T::from_f32(f32::NEG_INFINITY) } else { x });
        let mut all: Vec<_> = vec![
            (format!("bool {what}"), Call { visible: Some(visible), ..call.clone() }),
            (format!("float {what}"), Call { bias: Some(bias), ..call.clone() }),
        ];
        if shape.len() == 2 && shape[0] == q_len {
            // The first query sees nothing.
            let mut none = all[0].1.clone();
            none.visible.as_mut().unwrap().index_axis_mut(ndarray::Axis(0), 0).fill(false);
            all.push((format!("a row without keys, {what}"), none));
        }
        all
    };
    shapes.into_iter().flat_map(with).collect()
}

#[test]
fn attention_is_the_operator() {
    fn all<T: Element>(opsets: &[usize]) {
        for &opset in opsets {
            let plain = Attention { opset, ..Attention::default() };
            let mut attributes = vec![
                plain.clone(),
                Attention { is_causal: true, ..plain.clone() },
                Attention { softcap: 1.5, scale: Some(0.8), ..plain.clone() },
                Attention { is_causal: true, softcap: 0.7, softmax_precision: Some(1), ..plain.clone() },
            ];
            if opset == 25 {
                let window = |left, right, is_causal| Attention {
                    left_window_size: left,
                    right_window_size: right,
                    is_causal,
                    ..plain.clone()
                };
                attributes.extend([
                    window(2, 0, false),
                    window(1, 2, false),
                    window(-1, 1, false),
                    window(2, 2, true),
                ]);
            }
            for attributes in attributes {
                let call = |q_len, kv_len| Call::<T>::new(q_len, kv_len, attributes.clone());
                let mut calls = vec![("no cache", call(5, 9)), ("more queries", call(7, 4))];
                calls.extend([
                    ("a past", call(3, 4).with_past(6)),
                    ("an empty past", call(4, 4).with_past(0)),
                ]);
                calls.push(("one token", call(1, 1).with_past(70)));
                if opset >= 24 {
                    // One entry has fewer keys than there are queries.
                    let lengths = |of: [i64; 2]| Some(Array1::from_vec(of.to_vec()));
                    calls.push(("padding", Call { lengths: lengths([7, 5]), ..call(4, 9) }));
                    calls.push(("little padding", Call { lengths: lengths([2, 0]), ..call(3, 9) }));
                }
                for (what, call) in calls {
                    for (mask, call) in masked(&call, opset) {
                        let reach = |x: &[usize]| *x.last().unwrap() as i64;
                        let keys = call.visible.as_ref().map(|x| reach(x.shape()));
                        let keys = keys.or(call.bias.as_ref().map(|x| reach(x.shape())));
                        let longest = call.lengths.iter().flatten().copied().max();
                        if keys.zip(longest).is_some_and(|(keys, longest)| opset >= 24 && keys < longest) {
                            continue;
                        }
                        call.check(&format!("opset {opset}, {what}, {mask}, {attributes:?}"));
                    }
                }
            }
        }
    }
    all::<f32>(&[23, 24, 25]);
    all::<f16>(&[25]);
    all::<bf16>(&[25]);
}

#[test]
fn attention_refuses_what_the_operator_forbids() {
    let call = Call::<f32>::new(3, 5, Attention::default());
    let error = |call: &Call<f32>, packed| call.run(packed, 0).unwrap_err().to_string();
    let of = |attributes| Call { attributes, ..call.clone() };
    let opset = |opset| Attention { opset, ..Attention::default() };
    let refused = |attributes, want: &str| assert_eq!(error(&of(attributes), false), want);
    refused(opset(22), "opset: expected 23, 24 or 25, got 22");
    refused(
        Attention { left_window_size: 1, ..opset(24) },
        "left_window_size: expected -1 in opset 24, got 1",
    );
    refused(
        Attention { right_window_size: -2, ..opset(25) },
        "right_window_size: expected a number of keys, or -1, got -2",
    );
    refused(
        Attention { q_num_heads: Some(4), ..opset(25) },
        "q_num_heads cannot be combined with inputs of 4 axes: they have an axis of heads",
    );
    refused(Attention { q_num_heads: Some(3), ..opset(24) }, "q_num_heads: expected the 4 heads of Q, got 3");
    refused(
        Attention { softmax_precision: Some(11), ..opset(25) },
        "softmax_precision: expected 1 (f32), 10 (f16) or 16 (bf16), which f32 serves, got 11",
    );
    refused(
        Attention { scale: Some(-1.0), ..opset(25) },
        "scale: expected a finite number of at least 0, got -1",
    );
    assert_eq!(
        call.run(false, 4).unwrap_err().to_string(),
        "qk_matmul_output_mode: expected 0, 1, 2 or 3, got 4"
    );
    let lengths = |of: &[i64]| Some(Array1::from_vec(of.to_vec()));
    let padded = |of: &[i64]| Call { lengths: lengths(of), ..call.clone() };
    assert_eq!(error(&padded(&[5, 6]), false), "nonpad_kv_seqlen: expected 0 to 5 keys, got 6");
    assert_eq!(error(&padded(&[-1, 5]), false), "nonpad_kv_seqlen: expected 0 to 5 keys, got -1");
    assert_eq!(error(&padded(&[5]), false), "nonpad_kv_seqlen: expected shape [batch] = [2], got [1]");
    assert_eq!(
        error(&padded(&[5, 5]).with_past(2), true),
        "nonpad_kv_seqlen cannot be combined with past_key: keys are either joined here or lie in a cache that is padded"
    );
    let early = Call { attributes: opset(23), ..padded(&[5, 5]) };
    assert_eq!(error(&early, false), "nonpad_kv_seqlen: expected none in opset 23, got an array");
    let mask = |shape: &[usize], call: &Call<f32>| Call {
        visible: Some(ArrayD::from_elem(shape, true)),
        ..call.clone()
    };
    assert_eq!(
        error(&mask(&[3, 6], &call), false),
        "attn_mask: expected shape what broadcasts to [2, 4, 3, at most 5], got [3, 6]"
    );
    assert_eq!(
        error(&mask(&[3, 4], &of(opset(23))), false),
        "attn_mask: expected shape what broadcasts to [2, 4, 3, 5], got [3, 4]"
    );
    assert_eq!(
        error(&mask(&[3, 3], &padded(&[2, 4])), false),
        "attn_mask: expected shape a last axis of at least the 4 keys of nonpad_kv_seqlen, got [3]"
    );
    let wrong = Call { past: Some([rows(4, [2, 2, 3, 6]), rows(5, [2, 1, 3, 5])]), ..call.clone() };
    assert_eq!(
        error(&wrong, false),
        "past_value: expected shape [batch, kv_num_heads, any, dim] = [2, 2, any, 5], got [2, 1, 3, 5]"
    );
    let [q, k] = [&call.q, &call.k].map(|x| x.view().into_dyn());
    let x = AttentionInputs::new(q.view(), k.view(), k.view());
    let half = AttentionInputs { past_key: Some(call.k.view()), ..x.clone() };
    let error = |operator: Attention, x| operator.forward(x).unwrap_err().to_string();
    assert_eq!(error(opset(25), half), "past_value: expected an array with past_key, got none");
    let packed = Array3::<f32>::zeros((2, 3, 12));
    let packed = packed.view().into_dyn();
    let three = AttentionInputs::new(packed.view(), packed.view(), packed.view());
    assert_eq!(
        error(opset(25), three.clone()),
        "q_num_heads: expected a number of heads for inputs of 3 axes, got none"
    );
    assert_eq!(
        error(Attention { q_num_heads: Some(5), kv_num_heads: Some(1), ..opset(25) }, three.clone()),
        "Q: expected shape [batch, len, 5 * dim] for 5 heads, got [2, 3, 12]"
    );
    assert_eq!(
        error(opset(25), AttentionInputs { k: packed.view(), ..x }),
        "K: expected shape 4 axes, as Q has, got [2, 3, 12]"
    );
}

/// What is hidden cannot matter, and packed arrays of any strides are as good.
#[test]
fn attention_takes_strides_and_padding_that_is_not_a_number() {
    let mut call = Call::<f32>::new(3, 8, Attention { is_causal: true, ..Attention::default() });
    call.lengths = Some(Array1::from_vec(vec![6, 4]));
    let want = call.run(false, 0).unwrap().y;
    for (b, from) in [(0, 6), (1, 4)] {
        call.k.slice_mut(s![b, .., from.., ..]).fill(f32::NAN);
        call.v.slice_mut(s![b, .., from.., ..]).fill(f32::INFINITY);
    }
    assert_eq!(call.run(false, 0).unwrap().y, want);
    let plain = Call::<f32>::new(3, 8, Attention::default());
    let (want, heads) = (plain.run(true, 0).unwrap().y, (Some(4), Some(2)));
    let by_token = [&plain.q, &plain.k, &plain.v].map(|x| {
        let (batch, heads, len, dim) = x.dim();
        // Every other column.
        ArrayD::from_shape_fn(vec![batch, len, 2 * heads * dim], |at| {
            x[[at[0], at[2] / 2 / dim, at[1], at[2] / 2 % dim]]
        })
    });
    let [q, k, v] =
        by_token.each_ref().map(|x| x.slice_axis(ndarray::Axis(2), ndarray::Slice::new(0, None, 2)));
    let operator = Attention { q_num_heads: heads.0, kv_num_heads: heads.1, ..Attention::default() };
    assert_eq!(operator.forward(AttentionInputs::new(q, k, v)).unwrap().y, want);
}
