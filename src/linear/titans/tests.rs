use super::*;
use crate::engine::online::NORM_EPSILON;
use crate::input::Qkv;
use crate::linear::{DeltaNet, DeltaQkv, SimpleGla, State, TokenGated};
use crate::math::gates::exact::gelu;
use crate::testing::{agree, array, unit, within};
use crate::{Attention, Bounded, Recurrent};
use ndarray::{Array4, Axis, s};

fn rates(len: usize, seed: u64, most: f32) -> Array3<f32> {
    array([1, 1, 2, len], seed).mapv(|x| most * x.abs()).into_shape_with_order((1, 2, len)).unwrap()
}

#[test]
fn one_number_by_hand() {
    // Of chunks of 2: both gradients at W = 1 are 2 k (k - v), -6 and 2.
    let row = |x: [f32; 3]| Array4::from_shape_fn((1, 1, 3, 1), |at| x[at.2]);
    let all = |x: f32| Array3::from_elem((1, 1, 3), x);
    let (k, v, q) = (row([1.0, 1.0, 1.0]), row([4.0, 0.0, 2.0]), row([1.0, 1.0, 2.0]));
    let (step, momentum, forget) = (all(0.5), all(0.5), all(0.25));
    let titans = Titans::builder().chunk(2).weights(Array3::ones((1, 1, 1))).build().unwrap();
    let x =
        TitansQkv::new(Qkv::new(q.view(), k.view(), v.view()), step.view(), momentum.view(), forget.view());
    // S 3, W 3.75; S 0.5, W 3.3125; then a chunk at that: S -1.0625, W 1.421875.
    let want = [3.75, 3.3125, 2.84375];
    let out = titans.reference(x).unwrap();
    assert!(out.iter().zip(want).all(|(x, want)| (x - want).abs() < 1e-9), "{out}");
    let mut state = titans.initial_state(x).unwrap();
    titans.prefill(x, &mut state).unwrap();
    let rows = [1.421875, 1.0, 1.0, 3.3125, 0.0, 0.0, -1.0625, 0.0, 0.0];
    assert!(state.view().iter().zip(rows).all(|(x, want)| (x - want).abs() < 1e-6), "{:?}", state.view());
}

#[test]
fn chunks_of_one_are_the_delta_rule() {
    let (q, k, v) = (array([1, 2, 70, 16], 1), unit(array([1, 2, 70, 16], 2)), array([1, 2, 70, 24], 3));
    let (beta, none) = (rates(70, 4, 0.9), Array3::zeros((1, 1, 70)));
    let half = beta.mapv(|x| 0.5 * x);
    let qkv = Qkv::new(q.view(), k.view(), v.view());
    let x = TitansQkv::new(qkv.reborrow(), half.view(), none.view(), none.view());
    let titans = Titans::builder().chunk(1).build().unwrap();
    let x_delta = DeltaQkv::new(qkv, beta.view());
    let want = DeltaNet::builder().scale(1.0).build().unwrap().reference(x_delta).unwrap();
    agree(&titans.reference(x).unwrap(), &want);
    within("delta", &titans.forward(x).unwrap(), &want, &titans.error_bound(x).unwrap());
}

#[test]
fn one_chunk_from_nothing_is_gated_linear_attention() {
    let (q, k, v) = (array([1, 2, 150, 16], 1), array([1, 2, 150, 16], 2), array([1, 2, 150, 8], 3));
    let (step, forget) = (rates(150, 4, 0.9), rates(150, 5, 0.2));
    let none = Array3::zeros((1, 1, 150));
    let x = TitansQkv::new(Qkv::new(q.view(), k.view(), v.view()), step.view(), none.view(), forget.view());
    let titans = Titans::builder().chunk(200).build().unwrap();
    let values = Array4::from_shape_fn(v.dim(), |at| 2.0 * step[[0, at.1, at.2]] * v[at]);
    let log_decay = forget.mapv(|x| (-x).ln_1p());
    let gla = SimpleGla::builder().scale(1.0).build().unwrap();
    let qkv = Qkv::new(q.view(), k.view(), values.view());
    let want = gla.reference(TokenGated { qkv, log_decay: log_decay.view() }).unwrap();
    let near = (&want).into_iter().zip(&titans.reference(x).unwrap()).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(near, "logarithms and products of f32");
    within(
        "chunk",
        &titans.forward(x).unwrap(),
        &titans.reference(x).unwrap(),
        &titans.error_bound(x).unwrap(),
    );
}

/// What MAC's segments read before they write.
#[test]
fn without_steps_a_memory_stays_or_fades() {
    let (q, w) = (array([1, 2, 30, 8], 1), array([1, 2, 8, 5], 2));
    let v = array([1, 2, 30, 5], 3);
    let (none, forget) = (Array3::zeros((1, 1, 30)), Array3::from_elem((1, 1, 30), 0.5));
    let weights = w.index_axis(Axis(0), 0).to_owned();
    let titans = Titans::builder().chunk(7).weights(weights.clone()).build().unwrap();
    let qkv = || Qkv::new(q.view(), q.view(), v.view());
    for (forget, left) in [(&none, 1.0f64), (&forget, 0.5)] {
        let x = TitansQkv::new(qkv(), none.view(), none.view(), forget.view());
        let mut state = titans.initial_state(x).unwrap();
        let out = titans.prefill(x, &mut state).unwrap();
        let want = Array4::from_shape_fn((1, 2, 30, 5), |(_, h, t, c)| {
            let sum = |i: usize| f64::from(q[[0, h, t, i]]) * f64::from(weights[[h, i, c]]);
            left.powi(t as i32 + 1) * (0..8).map(sum).sum::<f64>()
        });
        within("at rest", &out, &want, &titans.error_bound(x).unwrap());
        let kept = state.view().slice(s![0, .., 0, ..40]).to_owned();
        let fades = |(x, w): (&f32, &f32)| (x - w * left.powi(30) as f32).abs() < 1e-6;
        assert!(kept.iter().zip(&weights).all(fades), "weights");
    }
}

/// `|M(k) - v|^2`
fn loss(weights: &[f64], gamma: Option<&Array2<f32>>, k: &[f64], v: &[f64]) -> f64 {
    let (d, hidden) = (k.len(), weights.len() / (k.len() + v.len()));
    let inner = |j| gelu((0..d).map(|i| k[i] * weights[i * hidden + j]).sum());
    let active: Vec<f64> = (0..hidden).map(inner).collect();
    let outer = |c| (0..hidden).map(|j| active[j] * weights[d * hidden + j * v.len() + c]).sum();
    let y: Vec<f64> = (0..v.len()).map(outer).collect();
    let n = v.len() as f64;
    let mean = y.iter().sum::<f64>() / n;
    let deviation = (y.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + NORM_EPSILON).sqrt();
    let found = |c: usize| match gamma {
        Some(gamma) => k[c] + f64::from(gamma[[0, c]]) * (y[c] - mean) / deviation,
        None => y[c],
    };
    (0..v.len()).map(|c| (found(c) - v[c]).powi(2)).sum()
}

#[test]
fn gradients_of_perceptrons_are_differences() {
    let (k, v) = (array([1, 1, 1, 6], 1), array([1, 1, 1, 6], 2));
    let layer = |shape, seed| array(shape, seed).index_axis_move(Axis(0), 0);
    let (inner, outer) = (layer([1, 1, 6, 9], 3), layer([1, 1, 9, 6], 4));
    let (one, none) = (Array3::ones((1, 1, 1)), Array3::zeros((1, 1, 1)));
    let gamma = array([1, 1, 1, 6], 5).into_shape_with_order((1, 6)).unwrap();
    let x = TitansQkv::new(Qkv::new(k.view(), k.view(), v.view()), one.view(), none.view(), none.view());
    let exact = |x: &Array4<f32>| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let weights: Vec<f64> = inner.iter().chain(&outer).map(|&x| f64::from(x)).collect();
    for gamma in [None, Some(gamma)] {
        let mut builder = Titans::builder().chunk(1).mlp(inner.clone(), outer.clone());
        if let Some(gamma) = gamma.clone() {
            builder = builder.gamma(gamma);
        }
        let titans = builder.build().unwrap();
        let start = titans.initial_state(x).unwrap();
        let (_, next) = titans.reference_from(x, &start).unwrap();
        let mut moved = start.clone();
        titans.prefill(x, &mut moved).unwrap();
        for (i, &w) in weights.iter().enumerate() {
            let at = |x: f64| {
                let mut weights = weights.clone();
                weights[i] = x;
                loss(&weights, gamma.as_ref(), &exact(&k), &exact(&v))
            };
            let slope = |by: f64| (at(w + by) - at(w - by)) / (2.0 * by);
            let want = (4.0 * slope(1e-3) - slope(2e-3)) / 3.0;
            for state in [&next, &moved] {
                let got = w - f64::from(state.view()[[0, 0, 0, i]]);
                assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{i}: {got}, not {want}");
            }
        }
    }
}

/// A token that is not finite spoils none before it, though all of a chunk are taken
/// together.
#[test]
fn later_tokens_of_a_chunk_are_not_seen() {
    let (q, k, mut v) = (array([1, 2, 64, 16], 1), array([1, 2, 64, 16], 2), array([1, 2, 64, 8], 3));
    let rate = rates(64, 4, 0.02);
    let titans = Titans::builder().normalize_qk().build().unwrap();
    let mut outs = Vec::new();
    for spoilt in [false, true] {
        if spoilt {
            v.slice_mut(s![.., .., 40, ..]).fill(f32::INFINITY);
        }
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        outs.push(titans.forward(TitansQkv::new(qkv, rate.view(), rate.view(), rate.view())).unwrap());
    }
    let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
    let rows = s![.., .., ..40, ..];
    assert!(outs[0].slice(rows).iter().zip(outs[1].slice(rows)).all(near));
    assert!(outs[1].slice(s![.., .., 40.., ..]).iter().all(|x| !x.is_finite()));
}

#[test]
fn refusals() {
    let (x, rate) = (array([1, 2, 6, 8], 1), Array3::from_elem((1, 2, 6), 0.5));
    let qkv = || Qkv::new(x.view(), x.view(), x.view());
    let fine = TitansQkv::new(qkv(), rate.view(), rate.view(), rate.view());
    let titans = Titans::builder().chunk(4).build().unwrap();
    let error = |titans: &Titans, x| titans.forward(x).unwrap_err().to_string();
    let (more, less) = (rate.mapv(|x| 3.0 * x), rate.mapv(|x| -x));
    assert_eq!(
        error(&titans, TitansQkv { momentum: more.view(), ..fine }),
        "momentum: expected a number from 0 to 1, got 1.5"
    );
    assert_eq!(
        error(&titans, TitansQkv { forget: less.view(), ..fine }),
        "forget: expected a number from 0 to 1, got -0.5"
    );
    assert_eq!(
        error(&titans, TitansQkv { step: less.view(), ..fine }),
        "step: expected a finite number of at least 0, got -0.5"
    );
    let (a, b) = (Array3::zeros((2, 8, 5)), Array3::zeros((2, 5, 7)));
    let wrong = Titans::builder().mlp(a.clone(), b.clone()).build().unwrap();
    assert_eq!(error(&wrong, fine), "weights: expected shape [heads, _, _] = [2, 5, 8], got [2, 5, 7]");
    let wrong = Titans::builder().gamma(Array2::ones((2, 7))).build().unwrap();
    assert_eq!(
        error(&wrong, fine),
        "gamma: expected shape [heads, value_dim] = [2, 8] and as long keys, of 8, got [2, 7]"
    );
    let error = |builder: TitansBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(
        error(Titans::builder().mlp(b, a.clone())),
        "outer: expected shape [heads, hidden, value_dim] = [_, 7, _], got [2, 8, 5]"
    );
    assert_eq!(error(Titans::builder().chunk(0)), "chunk: expected from 1 to 2^20 tokens, got 0");
    assert_eq!(
        error(Titans::builder().weights(a.mapv(|_: f32| f32::NAN))),
        "weights: expected finite numbers, got NaN"
    );
    let mut state = titans.initial_state(fine).unwrap().into_inner();
    state[[0, 1, 0, 64]] = 4.0;
    let mut state = State::new(state).unwrap();
    let error = titans.prefill(fine, &mut state).unwrap_err().to_string();
    assert_eq!(error, "state: expected tokens of a chunk of 4, got 4");
}
