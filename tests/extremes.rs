//! What is empty, huge or tiny: every output comes from its own input, and
//! small and large numbers count for what they are.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use attention_kernels::catalog::ENTRIES;
use attention_kernels::dense::{Dense, Selective, Sigmoid, Tempered};
use attention_kernels::input::Qkv;
use attention_kernels::linear::{
    Aaren, AarenInput, Carried, ChannelGated, DeltaNet, DeltaQkv, Flowformer, Form, Gla, Lightning,
    LinearAttention, RetNet, S6, S6Input, SimpleGla, State, TokenGated,
};
use attention_kernels::mask::{Causal, Mask, mask_fn, mask_fn_per_head};
use attention_kernels::score::{Bias, Score, Softcap, score_fn};
use attention_kernels::simd::Isa;
use attention_kernels::{
    Attention, Backward, Bounded, Error, Input, Mergeable, Recurrent, Weights, Workspace,
};
use common::Random;
use ndarray::{Array3, Array4, ArrayView4};

fn text<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Where scores are NaN a selection is its definition, and leaves them out: keys here and
/// there, most of them, all of them, a query, all values; for prompts and for steps.
#[test]
fn scores_that_are_nan_are_chosen_by_the_definition() {
    let mut faults = Vec::new();
    for entry in ENTRIES.iter().filter(|entry| entry.selects) {
        for (n, m) in [(70, 70), (130, 130), (1, 150), (20, 200)] {
            if entry.tokens && n != m {
                continue;
            }
            type Spoil = fn(&mut [Array4<f32>; 3]);
            let cases: [(&str, Spoil); 5] = [
                ("each third key", |x| {
                    x[1].slice_mut(ndarray::s![.., .., ..;3, ..]).fill(f32::NAN);
                }),
                ("all keys but the last 6", |x| {
                    x[1].slice_mut(ndarray::s![.., .., ..-6, ..]).fill(f32::NAN);
                }),
                ("all keys", |x| x[1].fill(f32::NAN)),
                ("the last query", |x| {
                    x[0].slice_mut(ndarray::s![.., .., -1, ..]).fill(f32::NAN);
                }),
                ("each third value", |x| {
                    x[2].slice_mut(ndarray::s![.., .., ..;3, ..]).fill(f32::NAN);
                }),
            ];
            for (what, spoil) in cases {
                let mut random = Random::new((n + m) as u64);
                let mut arrays =
                    [random.array((1, 4, n, 16)), random.array((1, 2, m, 16)), random.array((1, 2, m, 12))];
                spoil(&mut arrays);
                let [q, k, v] = &arrays;
                let x = Qkv::new(q.view(), k.view(), v.view());
                let Ok(trial) = entry.trial::<f32>(x, None, 1) else { continue };
                let what = format!("{}, {n} queries of {m} keys, {what} NaN", entry.card.name);
                let mut out = Array4::from_elem((1, 4, n, 12), -123.25);
                let found = catch_unwind(AssertUnwindSafe(|| {
                    if trial.forward_into(out.view_mut(), &mut Workspace::new()).is_err() {
                        return None;
                    }
                    if let Some(error) = trial.selection_error().unwrap() {
                        return Some(error);
                    }
                    let (want, bound) = (trial.reference().unwrap(), trial.error_bound().unwrap());
                    out.indexed_iter().zip(&want).find_map(|((at, &got), &want)| {
                        let bound = bound[[at.0, at.1, at.2]] + want.abs() * 2f64.powi(-24) + 1e-30;
                        let off = (f64::from(got) - want).abs();
                        let near = off <= bound || bound.is_nan() && !want.is_nan() && off < 1e-4;
                        let same = if want.is_nan() { got.is_nan() } else { near };
                        (!same).then(|| format!("{at:?}: {got} for {want} within {bound}"))
                    })
                }));
                match found {
                    Ok(None) => {}
                    Ok(Some(fault)) => faults.push(format!("{what}: {fault}")),
                    Err(fault) => {
                        let text = fault.downcast_ref::<String>().cloned();
                        faults.push(format!("{what}: panics, {}", text.unwrap_or_default()));
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
}

/// Which sizes are 0: batch, query heads, key/value heads, queries, keys,
/// head_dim, value_dim. With a NaN among the values and without.
#[test]
fn empty_axes_over_a_used_workspace() {
    let mut faults = Vec::new();
    for entry in ENTRIES {
        for empty in 0..1 << 7 {
            let size = |axis: usize, n: usize| if empty >> axis & 1 == 1 { 0 } else { n };
            for (len, heads) in [(3, 2), (20, 2), (70, 4)] {
                let (b, qh, kh) = (size(0, 1), size(1, heads), size(2, 2));
                let (n, m, d, dv) = (size(3, len), size(4, len), size(5, 3), size(6, 5));
                if (entry.tokens && n != m) || (kh == 0 && qh > 0) {
                    continue;
                }
                for spoilt in [false, true] {
                    let mut random = Random::new(empty as u64);
                    let (q, k) = (random.array::<f32>((b, qh, n, d)), random.array((b, kh, m, d)));
                    let mut v = random.array::<f32>((b, kh, m, dv));
                    if let Some(x) = v.iter_mut().last().filter(|_| spoilt) {
                        *x = f32::NAN;
                    }
                    let x = Qkv::new(q.view(), k.view(), v.view());
                    let what = format!(
                        "{} {:?} {:?} {:?} {spoilt}",
                        entry.card.name,
                        q.shape(),
                        k.shape(),
                        v.shape()
                    );
                    let run = || {
                        let trial = match entry.trial::<f32>(x, None, 1) {
                            Ok(trial) => trial,
                            Err(_) => return,
                        };
                        let dim = (b, qh, n, dv);
                        let mut out = Array4::from_elem(dim, -123.25);
                        let bytes = match trial.workspace_bytes() {
                            Ok(bytes) => bytes,
                            Err(error) => {
                                let error = error.to_string();
                                assert_eq!(
                                    text(trial.forward_into(out.view_mut(), &mut Workspace::new())),
                                    error
                                );
                                assert_eq!(text(trial.reference()), error);
                                assert_eq!(text(trial.error_bound()), error);
                                assert_eq!(text(trial.cost()), error);
                                return;
                            }
                        };
                        let mut workspace = Workspace::with_capacity(bytes);
                        workspace.poison();
                        trial.forward_into(out.view_mut(), &mut workspace).unwrap();
                        trial.cost().unwrap();
                        let (want, bound) = (trial.reference().unwrap(), trial.error_bound().unwrap());
                        for ((at, &got), &want) in out.indexed_iter().zip(&want) {
                            let bound = bound[[at.0, at.1, at.2]];
                            let near = (f64::from(got) - want).abs()
                                <= bound + want.abs() * 2f64.powi(-24) + 1e-30
                                || bound.is_nan();
                            assert!(
                                if want.is_nan() { got.is_nan() } else { near || (want == f64::from(got)) },
                                "{at:?}: {got} for {want}"
                            );
                        }
                    };
                    if let Err(fault) = catch_unwind(AssertUnwindSafe(run)) {
                        let fault = fault
                            .downcast_ref::<String>()
                            .cloned()
                            .or_else(|| fault.downcast_ref::<&str>().map(|x| x.to_string()));
                        faults.push(format!("{what}: {}", fault.unwrap_or_default()));
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
}

/// What does not fit is refused by every method in the same words, and nothing
/// is written.
#[test]
fn wrong_shapes_are_refused_alike() {
    let (mut refused, mut faults) = (0, Vec::new());
    // Batch, heads, length and dim of queries, keys and values.
    let right = [[2, 4, 10, 8], [2, 2, 10, 8], [2, 2, 10, 6]];
    for entry in ENTRIES {
        for array in 0..3 {
            for (axis, size) in
                [(0, 1), (0, 3), (1, 0), (1, 1), (1, 3), (1, 4), (1, 8), (2, 9), (2, 0), (3, 7)]
            {
                let mut dims = right;
                dims[array][axis] = size;
                let [q, k, v] = dims.map(|[b, h, n, d]| Array4::<f32>::from_elem((b, h, n, d), 0.5));
                let x = Qkv::new(q.view(), k.view(), v.view());
                let what = format!("{} {dims:?}", entry.card.name);
                let run = || {
                    let Ok(trial) = entry.trial::<f32>(x, None, 1) else { return };
                    let mut out =
                        Array4::from_elem((dims[0][0], dims[0][1], dims[0][2], dims[2][3]), -123.25);
                    let mut workspace = Workspace::new();
                    let forward = text(trial.forward_into(out.view_mut(), &mut workspace));
                    let others = [
                        text(trial.workspace_bytes()),
                        text(trial.reference()),
                        text(trial.error_bound()),
                        text(trial.cost()),
                    ];
                    // An output of another shape is wrong by itself.
                    if forward.starts_with("out:") {
                        return;
                    }
                    assert!(others.iter().all(|other| *other == forward), "{forward}: {others:#?}");
                    if forward != "accepted" {
                        assert!(out.iter().all(|&x| x == -123.25), "written to");
                        assert_eq!(workspace.capacity(), 0);
                        refused_one();
                    }
                };
                REFUSED.with(|count| count.set(0));
                let result = catch_unwind(AssertUnwindSafe(run));
                refused += REFUSED.with(|count| count.get());
                if let Err(fault) = result {
                    let fault = fault.downcast_ref::<String>().cloned().unwrap_or_default();
                    faults.push(format!("{what}: {fault}"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
    assert!(refused > 100, "{refused}");
}

thread_local!(static REFUSED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) });

fn refused_one() {
    REFUSED.with(|count| count.set(count.get() + 1));
}

/// More value heads than key heads, where queries, keys and values alone are
/// the input: every method has the same opinion.
#[test]
fn heads_of_values_that_are_not_those_of_keys() {
    let [q, k, v] = [4, 2, 4].map(|heads| Array4::<f32>::zeros((1, heads, 20, 8)));
    let x = Qkv::new(q.view(), k.view(), v.view());
    fn all<M>(mechanism: &M, x: Qkv<'_, f32>) -> Vec<String>
    where
        M: for<'a> Recurrent<Qkv<'a, f32>, State = State> + for<'a> Bounded<Qkv<'a, f32>>,
    {
        let mut out = Array4::from_elem((1, 4, 20, 8), 0f32);
        let mut state = State::new(Array4::zeros((1, 4, 8, 8))).unwrap();
        vec![
            text(mechanism.forward(x)),
            text(mechanism.forward_into(x, out.view_mut(), &mut Workspace::new())),
            text(mechanism.workspace_bytes(x)),
            text(mechanism.reference(x)),
            text(mechanism.error_bound(x)),
            text(mechanism.cost(x)),
            text(mechanism.initial_state(x)),
            text(mechanism.prefill(x, &mut state)),
            text(mechanism.reference_from(x, &state)),
        ]
    }
    let lightning = Lightning::builder(4).build().unwrap();
    let retnet = RetNet::builder(4).build().unwrap();
    let mut answers = vec![all(&lightning, x), all(&retnet, x)];
    answers.push(all(&LinearAttention::builder().causal().build().unwrap(), x));
    answers[0].extend([
        text(lightning.zero_gradients(x)),
        text(lightning.backward_workspace_bytes(x)),
        text(lightning.backward(x, v.view(), Carried::default())),
        text(lightning.reference_backward(x, v.view(), Carried::default())),
    ]);
    for answers in answers {
        assert!(answers[0].starts_with("k: expected shape"), "{}", answers[0]);
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:#?}");
    }
}

/// A step is a token of each sequence, not as many tokens as sequences.
#[test]
fn steps_of_packed_sequences() {
    let x = Array4::<f32>::ones((1, 1, 2, 4));
    let log_decay = Array3::zeros((1, 1, 2));
    let gla = SimpleGla::builder().build().unwrap();
    for (offsets, fits) in [([0, 1, 2], true), ([0, 2, 2], false), ([0, 0, 2], false)] {
        let qkv = Qkv::new(x.view(), x.view(), x.view()).packed(&offsets, &offsets);
        let x = TokenGated { qkv, log_decay: log_decay.view() };
        let mut state = gla.initial_state(x).unwrap();
        let before = state.clone();
        let answer = text(gla.step(x, &mut state));
        assert_eq!(answer == "accepted", fits, "{offsets:?}: {answer}");
        assert_eq!(state == before, !fits, "{offsets:?}");
    }
    let (u, b) = (Array4::<f32>::ones((1, 1, 2, 3)), Array4::<f32>::ones((1, 1, 2, 4)));
    let s6 = S6::builder(Array3::from_elem((1, 3, 4), -1.0)).build().unwrap();
    let x = S6Input::new(u.view(), u.view(), b.view(), b.view()).packed(&[0, 2, 2]);
    let mut state = s6.initial_state(x).unwrap();
    assert_ne!(text(s6.step(x, &mut state)), "accepted");
}

fn isas() -> Vec<Isa> {
    Isa::available().collect()
}

/// Where nothing decays, nothing is too small to count.
#[test]
fn small_states_stay() {
    for isa in isas() {
        for len in [1, 4, 20, 100] {
            for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
                let q = Array4::<f32>::zeros((1, 1, len, 8));
                let k = Array4::from_elem((1, 1, len, 8), -80f32);
                let v = Array4::ones((1, 1, len, 5));
                let x = Qkv::new(q.view(), k.view(), v.view());
                let builder = || LinearAttention::builder().epsilon(0.0).form(form).isa(isa);
                for linear in [builder().build().unwrap(), builder().causal().build().unwrap()] {
                    let out = linear.forward(x).unwrap();
                    assert!(out.iter().all(|&x| (x - 1.0).abs() < 1e-5), "{isa} {len} {form:?}: {out}");
                }
                // Log decays of 0 leave everything too, whoever could decay.
                let small = Array4::from_elem((1, 1, len, 8), 1e-20f32);
                let one = Array4::ones((1, 1, len, 8));
                let (zeros, all_zeros) = (Array3::zeros((1, 1, len)), Array4::zeros((1, 1, len, 8)));
                let qkv = Qkv::new(one.view(), small.view(), small.view());
                let simple = SimpleGla::builder().scale(1e20).form(form).isa(isa).build().unwrap();
                let out = simple.forward(TokenGated { qkv, log_decay: zeros.view() }).unwrap();
                let gla = Gla::builder().scale(1e20).form(form).isa(isa).build().unwrap();
                let channels = gla.forward(ChannelGated { qkv, log_decay: all_zeros.view() }).unwrap();
                for ((_, _, t, _), &x) in out.indexed_iter().chain(channels.indexed_iter()) {
                    let want = 8e-20 * (t + 1) as f32;
                    assert!((x - want).abs() < 1e-3 * want, "{isa} {len} {form:?} {t}: {x} for {want}");
                }
            }
        }
    }
}

/// What many log decays cost is in the bound: of a value that only the first
/// token has, and that each token makes 20 times smaller.
#[test]
fn bounds_count_decays() {
    let len = 60;
    let mut random = Random::new(3);
    for isa in isas() {
        for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
            let (q, k) = (random.array::<f32>((1, 1, len, 8)), random.array((1, 1, len, 8)));
            let mut v = Array4::<f32>::zeros((1, 1, len, 8));
            v.slice_mut(ndarray::s![.., .., 0, ..]).fill(1e10);
            let log_decay = Array3::from_shape_fn((1, 1, len), |(_, _, t)| -3.0 - 0.37 * (t as f32).sin());
            let rows =
                Array4::from_shape_fn((1, 1, len, 8), |(_, _, t, c)| -3.0 - 0.4 * ((t + 3 * c) as f32).sin());
            let qkv = Qkv::new(q.view(), k.view(), v.view());
            let simple = SimpleGla::builder().form(form).isa(isa).build().unwrap();
            let x = TokenGated { qkv, log_decay: log_decay.view() };
            within("simple gla", simple.forward(x), simple.reference(x), simple.error_bound(x));
            let gla = Gla::builder().form(form).isa(isa).build().unwrap();
            let x = ChannelGated { qkv, log_decay: rows.view() };
            within("gla", gla.forward(x), gla.reference(x), gla.error_bound(x));
        }
    }
}

#[track_caller]
fn within(
    what: &str,
    out: Result<Array4<f32>, Error>,
    want: Result<Array4<f64>, Error>,
    bound: Result<Array3<f64>, Error>,
) {
    let (out, want, bound) = (out.unwrap(), want.unwrap(), bound.unwrap());
    for ((at, &got), &want) in out.indexed_iter().zip(&want) {
        let (off, bound) = ((f64::from(got) - want).abs(), bound[[at.0, at.1, at.2]]);
        // What rounding to the output's type may cost.
        let rounding = want.abs() * 2f64.powi(-24) + 2f64.powi(-149);
        assert!(off <= bound + rounding, "{what} {at:?}: {got} for {want}, off {off:e}, bound {bound:e}");
    }
}

/// The factor of the definition is `1 / sqrt(head_dim)`, not its rounding.
#[test]
fn definitions_do_not_round_their_scale() {
    let x = Array4::<f32>::ones((1, 1, 1, 3));
    let one: ArrayView4<'_, f32> = x.view();
    let gate = Array3::zeros((1, 1, 1));
    let x = TokenGated { qkv: Qkv::new(one, one, one), log_decay: gate.view() };
    let out = SimpleGla::builder().build().unwrap().reference(x).unwrap();
    assert!((out[[0, 0, 0, 0]] - 3f64.sqrt()).abs() < 1e-15, "{out}");
}

/// One sequence and head, `q_len` zeros as queries and as keys; value `j` is
/// `j + 1` in each of 3 columns.
struct Even {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
}

impl Even {
    fn new(q_len: usize, kv_len: usize) -> Self {
        Self {
            q: Array4::zeros((1, 1, q_len, 4)),
            k: Array4::zeros((1, 1, kv_len, 4)),
            v: Array4::from_shape_fn((1, 1, kv_len, 3), |(_, _, j, _)| (j + 1) as f32),
        }
    }

    fn x(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }
}

/// Few queries and many, few keys and many: every engine.
const ENGINES: [(usize, usize); 6] = [(1, 3), (1, 3000), (40, 3), (70, 300), (200, 1000), (300, 257)];

/// A score that is finite counts, however low: what models pad with.
#[test]
fn the_lowest_scores_are_visible() {
    for isa in isas() {
        for (q_len, kv_len) in ENGINES {
            let x = Even::new(q_len, kv_len);
            let mean = (kv_len + 1) as f32 / 2.0;
            for low in [f32::MIN, -3e38, -2.4e38, -1e30, -1e9, -1.7e7, 1e9, 3e38, f32::MAX] {
                let bias = Array4::from_elem((1, 1, 1, 1), low);
                let twice = low < -2e38;
                let what = format!("{isa} {q_len} x {kv_len} {low:e}");
                let dense = Dense::builder().isa(isa).score(Bias::new(bias.view())).build().unwrap();
                let (out, lse) = dense.forward_with_lse(x.x()).unwrap();
                assert!(out.iter().all(|x| (x - mean).abs() < 1e-3 * mean), "{what}: {}", out[[0, 0, 0, 0]]);
                let want = dense.reference_lse(x.x()).unwrap();
                for (lse, want) in lse.iter().zip(&want) {
                    assert!((f64::from(*lse) - want).abs() <= want.abs() * 1e-6, "{what}: {lse} for {want}");
                }
                let weights = dense.weights(x.x()).unwrap();
                let share = 1.0 / kv_len as f32;
                assert!(
                    weights.iter().all(|w| (w - share).abs() < 1e-3 * share),
                    "{what}: {}",
                    weights[[0, 0, 0, 0]]
                );
                let sums = dense.key_weights(x.x()).unwrap();
                assert!(
                    sums.iter().all(|w| (w - share * q_len as f32).abs() < 1e-2 * share * q_len as f32),
                    "{what}"
                );
                let top = dense.top_weights(x.x(), 2).unwrap();
                assert!(top.weights.iter().all(|w| (w - share).abs() < 1e-3 * share), "{what}");
                if twice {
                    // Two of them, as a causal mask and a mask of padding give.
                    let both = Bias::new(bias.view()).then(Bias::new(bias.view()));
                    let dense = Dense::builder().isa(isa).score(both).build().unwrap();
                    let (out, lse) = dense.forward_with_lse(x.x()).unwrap();
                    assert!(out.iter().all(|x| (x - mean).abs() < 1e-3 * mean), "{what} twice: {out}");
                    assert!(lse.iter().all(|&lse| lse == f32::MIN), "{what} twice");
                }
            }
            // Half of them lowest, half hidden.
            let bias =
                Array4::from_shape_fn(
                    (1, 1, 1, kv_len),
                    |(.., j)| if j == 1 { f32::MIN } else { f32::NEG_INFINITY },
                );
            let dense = Dense::builder().isa(isa).score(Bias::new(bias.view())).build().unwrap();
            assert!(dense.forward(x.x()).unwrap().iter().all(|&x| x == 2.0));
            // And next to an ordinary score the lowest count for nothing.
            let bias =
                Array4::from_shape_fn((1, 1, 1, kv_len), |(.., j)| if j == 2 { 1.0 } else { f32::MIN });
            let dense = Dense::builder().isa(isa).score(Bias::new(bias.view())).build().unwrap();
            assert!(dense.forward(x.x()).unwrap().iter().all(|&x| x == 3.0));
        }
    }
}

/// The same for the lowest score of the dot product itself, for a large scale,
/// and for the biases of a running softmax.
#[test]
fn the_lowest_scores_of_other_kinds() {
    for isa in isas() {
        let mut x = Even::new(20, 600);
        let dense = Dense::builder().isa(isa).scale(f32::MAX).build().unwrap();
        assert!(dense.forward(x.x()).unwrap().iter().all(|&x| (x - 300.5).abs() < 1e-2));
        x.q.fill(-1.0);
        x.k.slice_mut(ndarray::s![.., .., .., 0]).fill(3.2e38);
        let dense = Dense::builder().isa(isa).scale(1.0).build().unwrap();
        let (out, lse) = dense.forward_with_lse(x.x()).unwrap();
        assert!(out.iter().all(|&x| (x - 300.5).abs() < 1e-2), "{isa}: {}", out[[0, 0, 0, 0]]);
        assert!(lse.iter().all(|&lse| lse == -3.2e38), "{isa}: {lse}");
        let (k, v) = (Array4::<f32>::zeros((1, 1, 600, 4)), x.v.clone());
        let query = Array3::zeros((1, 1, 4));
        let bias = Array3::from_elem((1, 1, 600), f32::MIN);
        let input = AarenInput::new(query.view(), k.view(), v.view()).biased(bias.view());
        let out = Aaren::builder().isa(isa).build().unwrap().forward(input).unwrap();
        for ((_, _, t, _), &x) in out.indexed_iter() {
            let want = (t + 2) as f32 / 2.0;
            assert!((x - want).abs() < 1e-4 * want, "{isa} {t}: {x}");
        }
    }
}

/// Sinks above the scores take nearly everything: what is left is right down to
/// where `f32` ends.
#[test]
fn sinks_far_above_the_scores() {
    for isa in isas() {
        for (q_len, kv_len) in ENGINES {
            let mut x = Even::new(q_len, kv_len);
            x.v.fill(1e30);
            for sink in
                [-100f32, 0.0, 50.0, 87.0, 90.0, 100.0, 104.0, 120.0, 150.0, 170.0, 200.0, 1e30, f32::MAX]
            {
                let dense = Dense::builder().isa(isa).sinks([sink]).build().unwrap();
                within("sinks", dense.forward(x.x()), dense.reference(x.x()), dense.error_bound(x.x()));
                let (weights, want) =
                    (dense.weights(x.x()).unwrap(), dense.reference_weights(x.x()).unwrap());
                for (got, want) in weights.iter().zip(&want) {
                    let off = (f64::from(*got) - want).abs();
                    assert!(off <= 1e-4 * want + 2f64.powi(-149), "{isa} {sink}: {got:e} for {want:e}");
                }
            }
        }
    }
    let mut x = Even::new(1, 4);
    x.v.fill(1e30);
    let out = Dense::builder().sinks([100.0]).build().unwrap().forward(x.x()).unwrap();
    assert!((f64::from(out[[0, 0, 0, 0]]) / 1.488030e-13 - 1.0).abs() < 1e-6, "{out}");
}

/// A change of scores is asked about visible pairs alone.
#[test]
fn closures_are_asked_about_visible_pairs() {
    for isa in isas() {
        for (q_len, kv_len) in [(1, 2), (1, 70), (9, 30), (40, 33), (200, 700)] {
            let x = Even::new(q_len, kv_len);
            let seen = move |query: usize, key: usize| (query + key).is_multiple_of(3) || key == 0;
            let dense = Dense::builder()
                .isa(isa)
                .mask(mask_fn(move |_, query, key| seen(query, key)))
                .score(Softcap::new(30.0).unwrap().then(score_fn(move |score, _, query, key| {
                    assert!(seen(query, key), "{query} and {key} do not see each other");
                    score + (key % 5) as f32
                })))
                .build()
                .unwrap();
            within("closure", dense.forward(x.x()), dense.reference(x.x()), dense.error_bound(x.x()));
            dense.weights(x.x()).unwrap();
            dense.key_weights(x.x()).unwrap();
            dense.top_weights(x.x(), 2).unwrap();
            let sigmoid = Sigmoid::builder()
                .isa(isa)
                .causal()
                .score(score_fn(|score, site, query, key| {
                    assert!(key as isize <= query as isize + site.q_start());
                    score
                }))
                .build()
                .unwrap();
            within("sigmoid", sigmoid.forward(x.x()), sigmoid.reference(x.x()), sigmoid.error_bound(x.x()));
            // A mask that another one precedes may rely on it.
            let later = mask_fn(move |extent, query, key| {
                let distance = usize::try_from(query as isize + extent.q_start() - key as isize).unwrap();
                distance.is_multiple_of(2)
            });
            let first = mask_fn(move |_, query, key| query >= key);
            let second = mask_fn(|_, query, key| {
                assert!(key > query);
                key - query > 5
            });
            let dense = Dense::builder()
                .isa(isa)
                .mask(Causal::new().and(later).or(first.or(second)))
                .build()
                .unwrap();
            within("masks", dense.forward(x.x()), dense.reference(x.x()), dense.error_bound(x.x()));
        }
    }
    // A table that only the visible key is in.
    let table = [0.0f32];
    let x = Even::new(1, 2);
    let dense = Dense::builder()
        .mask(mask_fn(|_, _, key| key == 0))
        .score(score_fn(|score, _, _, key| score + table[key]))
        .build()
        .unwrap();
    assert!(dense.forward(x.x()).unwrap().iter().all(|&x| x == 1.0));
}

/// A mask that looks at the head says so by its name, and is asked for each.
#[test]
fn masks_of_heads() {
    for isa in isas() {
        let q = Array4::<f32>::zeros((1, 2, 64, 4));
        let k = Array4::zeros((1, 2, 512, 4));
        let v = Array4::from_shape_fn((1, 2, 512, 1), |(_, _, j, _)| j as f32);
        let mask = mask_fn_per_head(|site, _, key| (key < 256) == (site.head == 0));
        let out = Dense::builder().isa(isa).mask(mask).build().unwrap().forward(Qkv::new(
            q.view(),
            k.view(),
            v.view(),
        ));
        for ((_, head, _, _), x) in out.unwrap().indexed_iter() {
            assert_eq!(*x, [127.5, 383.5][head]);
        }
    }
}

/// Arrays of one number, repeated along axes of stride 0.
struct Huge {
    one: Array4<f32>,
    tokens: Array3<f32>,
}

impl Huge {
    fn new() -> Self {
        Self { one: Array4::from_elem((1, 1, 1, 1), 0.5), tokens: Array3::from_elem((1, 1, 1), -0.5) }
    }

    fn array(&self, [b, h, n, d]: [usize; 4]) -> Option<ArrayView4<'_, f32>> {
        self.one.broadcast((b, h, n, d))
    }
}

/// What every method says; all that matters is that each comes back, and none
/// with an answer that no memory can hold.
fn hopeless<X: Input<Out = f32>, A: Bounded<X>>(what: &str, mechanism: &A, x: X) {
    let mut out = Array4::from_elem((1, 1, 1, 1), -123.25f32);
    let answers = [
        ("forward_into", text(mechanism.forward_into(x, out.view_mut(), &mut Workspace::new()))),
        ("forward", text(mechanism.forward(x))),
        ("workspace_bytes", text(mechanism.workspace_bytes(x))),
        ("reference", text(mechanism.reference(x))),
        ("error_bound", text(mechanism.error_bound(x))),
        ("cost", text(mechanism.cost(x))),
    ];
    for (method, answer) in answers {
        assert!(answer.contains("memory has room for"), "{what}, {method}: {answer}");
    }
    assert!(out.iter().all(|&x| x == -123.25), "{what}");
}

/// The same, and that no state is made.
fn hopeless_recurrence<X: Input<Out = f32>, A: Recurrent<X> + Bounded<X>>(what: &str, mechanism: &A, x: X) {
    hopeless(what, mechanism, x);
    assert!(text(mechanism.initial_state(x)).contains("memory has room for"), "{what}");
}

/// Sizes that multiply up beyond what can be counted, which views of stride 0
/// have for nothing: an error, and no byte is touched.
#[test]
fn sizes_that_no_memory_can_serve() {
    let huge = Huge::new();
    // Batch, heads, queries, keys, head_dim, value_dim.
    for [b, h, n, m, d, dv] in [
        [1, 1, 1, 1, 1 << 62, 1],
        [1, 1, 1, 1, (1 << 61) + 1, 1],
        [1, 1, 40, 40, 1 << 56, 1],
        [1, 1, 1, 1, 1, 1 << 62],
        [1, 1, 40, 40, 1, 1 << 56],
        [1 << 40, 1, 1, 1, 1 << 20, 1],
        [1 << 62, 1, 1, 1, 1, 1],
        [1, 1 << 62, 1, 1, 1, 1],
        [1 << 31, 1 << 31, 1, 1, 1, 1],
        [1 << 20, 1 << 20, 1 << 20, 1 << 20, 1, 1],
        [1, 1, 1 << 62, 1 << 62, 1, 1],
        [1, 1, 1 << 48, 1 << 48, 1, 0],
        [1, 1, 1 << 48, 1 << 48, 0, 1],
        [1, 1, 1 << 62, 1, 0, 1],
        [1, 1, 1, 1 << 62, 1, 1],
        [1, 1, isize::MAX as usize, 1, 1, 1],
    ] {
        let what = format!("{:?}", [b, h, n, m, d, dv]);
        let arrays = [huge.array([b, h, n, d]), huge.array([b, h, m, d]), huge.array([b, h, m, dv])];
        let [Some(q), Some(k), Some(v)] = arrays else { continue };
        let x = Qkv::new(q, k, v);
        for isa in isas() {
            let dense = Dense::builder().isa(isa).causal().build().unwrap();
            hopeless(&what, &dense, x);
            assert_ne!(text(dense.weights(x)), "accepted");
            assert_ne!(text(dense.key_weights(x)), "accepted");
            assert_ne!(text(dense.top_weights(x, 1)), "accepted");
            assert_ne!(text(dense.forward_with_lse(x)), "accepted");
        }
        hopeless(&what, &Sigmoid::builder().build().unwrap(), x);
        hopeless(&what, &LinearAttention::builder().build().unwrap(), x);
        hopeless(&what, &Flowformer::builder().build().unwrap(), x);
        let (Some(query), Some(value)) = (huge.tokens.broadcast((b, h, n)), huge.tokens.broadcast((b, h, m)))
        else {
            continue;
        };
        hopeless(&what, &Selective::builder().build().unwrap(), Tempered { qkv: x, query, value });
        if n != m {
            continue;
        }
        if h == 1 {
            hopeless_recurrence(&what, &Lightning::builder(1).build().unwrap(), x);
            hopeless_recurrence(&what, &RetNet::builder(1).build().unwrap(), x);
        }
        hopeless_recurrence(&what, &LinearAttention::builder().causal().build().unwrap(), x);
        hopeless_recurrence(&what, &Flowformer::builder().causal().build().unwrap(), x);
        let gated = TokenGated { qkv: x, log_decay: query };
        hopeless_recurrence(&what, &SimpleGla::builder().build().unwrap(), gated);
        let gated = ChannelGated { qkv: x, log_decay: q };
        hopeless_recurrence(&what, &Gla::builder().allow_growth().build().unwrap(), gated);
        let delta = DeltaQkv { qkv: x, beta: query };
        hopeless_recurrence(&what, &DeltaNet::builder().build().unwrap(), delta);
    }
    assert_eq!(Workspace::with_capacity(usize::MAX).capacity(), 0);
    assert_eq!(Workspace::with_capacity(1 << 62).capacity(), 0);
    // What can be counted, but no machine has.
    let v = huge.array([1, 1, 1 << 24, 1 << 26]).unwrap();
    let q = huge.array([1, 1, 1 << 24, 1]).unwrap();
    let dense = Dense::builder().causal().build().unwrap();
    assert!(text(dense.forward(Qkv::new(q, q, v))).contains("memory has room for"));
}

/// Many packed sequences are not as many of the length of all.
#[test]
fn many_packed_sequences_are_not_too_large() {
    let huge = Huge::new();
    let offsets: Vec<usize> = (0..=1 << 16).map(|i| 64 * i).collect();
    let tokens = 64 << 16;
    let x = huge.array([1, 32, tokens, 128]).unwrap();
    let x = Qkv::new(x, x, x).packed(&offsets, &offsets);
    assert_eq!(x.dims().unwrap().batch, 1 << 16);
}

/// A score beyond `f32` is no reason to hide a key: its value shows.
#[test]
fn overflowing_scores_hide_nothing() {
    for isa in isas() {
        for (q_len, kv_len) in ENGINES {
            let mut x = Even::new(q_len, kv_len);
            x.q.fill(1e30);
            x.k.slice_mut(ndarray::s![.., .., 1, ..]).fill(-1e30);
            for value in [f32::NAN, f32::INFINITY] {
                x.v[[0, 0, 1, 0]] = value;
                for scale in [1.0, 1e5, 1e-3] {
                    let dense = Dense::builder().isa(isa).scale(scale).build().unwrap();
                    let (out, want) = (dense.forward(x.x()).unwrap(), dense.reference(x.x()).unwrap());
                    for ((at, got), want) in out.indexed_iter().zip(&want) {
                        assert_eq!(
                            got.is_finite(),
                            want.is_finite(),
                            "{isa} {q_len} x {kv_len} {at:?}: {got} for {want}"
                        );
                    }
                }
            }
        }
    }
}
