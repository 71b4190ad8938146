use attention_kernels::Error;
use attention_kernels::dense::Dense;
use attention_kernels::linear::{Lightning, Mamba2, Rwkv7, State};
use attention_kernels_candle::{
    attend, attend_with_lse, attend_with_sinks, mix, mix_from, state_from_tensor,
};
use candle_core::{DType, Tensor};
use ndarray::Array4;

use crate::support::{noise, var};

fn words<T>(result: candle_core::Result<T>) -> String {
    result.err().expect("a refusal").to_string()
}

#[test]
fn errors_name_what_does_not_fit() {
    let dense = Dense::builder().build().unwrap();
    let (q, k) = (noise((1, 6, 5, 16), 1), noise((1, 2, 7, 16), 2));
    let attend = |q: &Tensor, k: &Tensor, v: &Tensor| words(attend(q, k, v, &dense));
    for dtype in [DType::F64, DType::U32, DType::I64] {
        let error = attend(&q.to_dtype(dtype).unwrap(), &k, &k);
        assert!(error.contains(&format!("q: expected f32, f16 or bf16, got {}", dtype.as_str())), "{error}");
    }
    let error = attend(&q, &k.to_dtype(DType::F16).unwrap(), &k);
    assert!(error.contains("k: expected f32, got f16"), "{error}");
    let error = attend(&q, &k, &k.to_dtype(DType::F64).unwrap());
    assert!(error.contains("v: expected f32, got f64"), "{error}");
    let error = attend(&q.squeeze(0).unwrap(), &k, &k);
    assert!(error.contains("q: expected 4 axes, got shape [6, 5, 16]"), "{error}");
    let error = attend(&q, &k, &k.narrow(2, 0, 6).unwrap());
    assert!(error.contains("k: expected shape"), "{error}");
    let error = attend(&q.narrow(1, 0, 5).unwrap(), &k, &k);
    assert!(error.contains("q: expected a number of heads that is a multiple of the 2"), "{error}");
    let short = |sinks: Vec<f32>| Dense::builder().sinks(sinks).build();
    assert!(words(attend_with_sinks(&q, &k, &k, &noise(5, 1), short)).contains("sinks"));
    assert!(
        words(attend_with_sinks(&q, &k, &k, &noise((6, 1), 1), short)).contains("sinks: expected 1 axes")
    );
    let without = |_: Vec<f32>| Dense::builder().build();
    assert!(words(attend_with_sinks(&q, &k, &k, &noise(6, 1), without)).contains("build: expected"));
    let others = |_: Vec<f32>| Dense::builder().sinks(vec![0.5; 6]).build();
    assert!(words(attend_with_sinks(&q, &k, &k, &noise(6, 1), others)).contains("build: expected"));
}

#[test]
fn sizes_without_memory_are_refused() {
    let dense = Dense::builder().build().unwrap();
    let one = noise((1, 1, 1, 1), 1);
    let q = one.broadcast_as((1, 1, 1, 16)).unwrap();
    let k = q.clone();
    let huge = one.broadcast_as((1, 1, 1, 1 << 60)).unwrap();
    assert!(attend(&q, &k, &huge, &dense).is_err());
    let long = one.broadcast_as((1, 1, 1 << 58, 16)).unwrap();
    assert!(attend(&long, &k, &k, &dense).is_err());
    // So is what one number a row would take.
    let long = one.broadcast_as((1, 1, 1 << 45, 16)).unwrap();
    assert!(attend_with_lse(&long, &k, &k, &dense).is_err());
}

#[test]
fn recurrences_refuse_what_does_not_fit() {
    let (x, lightning) = (noise((1, 2, 9, 16), 1), Lightning::builder(2).build().unwrap());
    let half = x.to_dtype(DType::F16).unwrap();
    assert!(words(mix(&lightning, [&x, &half, &x])).contains("k: expected f32, got f16"));
    assert!(words(mix(&lightning, [&x.narrow(2, 0, 8).unwrap(), &x, &x])).contains("expected shape"));
    let mamba = Mamba2::builder(&[0.0, 0.0]).build().unwrap();
    let dt = noise((1, 2, 9), 2);
    let error = words(mix(&mamba, [&half, &dt.to_dtype(DType::F16).unwrap(), &half, &half]));
    assert!(error.contains("dt: expected f32, got f16"), "{error}");
    // Decays above 0 would let the state grow.
    let rwkv = Rwkv7::builder().build().unwrap();
    assert!(words(mix(&rwkv, [&x, &x, &x, &x, &x, &x])).contains("log_decay"));

    // A state of other sizes stays as it was.
    let state = State::new(Array4::zeros((1, 2, 8, 16))).unwrap();
    let mut held = Some(state.clone());
    assert!(words(mix_from(&lightning, [&x, &x, &x], &mut held)).contains("state"));
    assert_eq!(held, Some(state));
    let mut none = None;
    assert!(mix_from(&lightning, [&x, &half, &x], &mut none).is_err());
    assert_eq!(none, None);
    assert!(state_from_tensor(&dt).is_err());
    let infinite = (noise((1, 2, 16, 16), 1) * f64::INFINITY).unwrap();
    assert!(words(state_from_tensor(&infinite)).contains("state"));
}

#[test]
fn gradients_that_are_not_to_be_had_are_refused() {
    let (x, dense) = (var((1, 2, 9, 16), 1), Dense::builder().build().unwrap());
    let (out, lse) = attend_with_lse(&x, &x, &x, &dense).unwrap();
    assert!(words(out.sum_all().unwrap().backward()).contains("attention with lse"));
    assert!(words(lse.sum_all().unwrap().backward()).contains("lse of attention"));
    let lightning = Lightning::builder(2).build().unwrap();
    let out = mix_from(&lightning, [&x, &x, &x], &mut None).unwrap();
    assert!(words(out.sum_all().unwrap().backward()).contains("recurrence from a state"));
}

/// Whoever wants to know more than words gets the kernels' own error.
#[test]
fn errors_of_the_kernels_come_through() {
    let error = Error::Heads { q_heads: 5, kv_heads: 2 };
    let (q, k) = (noise((1, 5, 5, 16), 1), noise((1, 2, 7, 16), 2));
    assert!(words(attend(&q, &k, &k, &Dense::builder().build().unwrap())).contains(&error.to_string()));
}
