use attention_kernels::{Error, Result};
use attention_kernels_burn::{AttentionBackend, AttentionOptions, attention};
use burn::backend::Flex;
use burn::tensor::{Bool, DType, Device, Tensor};

use crate::support::noise;

fn words<T>(result: Result<T>) -> String {
    result.err().expect("a refusal").to_string()
}

fn x(dims: [usize; 4]) -> Tensor<4> {
    noise(dims, 1, &Device::flex())
}

#[test]
fn errors_name_what_does_not_fit() {
    let (q, k) = (x([1, 6, 5, 16]), x([1, 2, 7, 16]));
    let options = AttentionOptions::default;
    let attend = |q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>| {
        words(attention(q.clone(), k.clone(), v.clone(), None, None, options()))
    };
    let error = attend(&q.clone().cast(DType::F64), &k, &k);
    assert!(error.contains("q: expected f32, f16 or bf16, got f64"), "{error}");
    let error = attend(&q, &k.clone().cast(DType::F16), &k);
    assert!(error.contains("k: expected f32, got f16"), "{error}");
    let error = attend(&q, &k, &k.clone().cast(DType::F64));
    assert!(error.contains("v: expected f32, got f64"), "{error}");
    let error = attend(&q, &k, &k.clone().narrow(2, 0, 6));
    assert!(error.contains("k: expected shape"), "{error}");
    let error = attend(&q.clone().narrow(1, 0, 5), &k, &k);
    assert_eq!(error, Error::Heads { q_heads: 5, kv_heads: 2 }.to_string());

    let with = |mask: Option<[usize; 4]>, bias: Option<Tensor<4>>, options: AttentionOptions| {
        let mask = mask.map(|dims| Tensor::<4, Bool>::full(dims, false, &Device::flex()));
        words(attention(q.clone(), k.clone(), k.clone(), mask, bias, options))
    };
    assert!(with(Some([1, 6, 5, 6]), None, options()).starts_with("mask: expected shape"));
    assert!(with(None, Some(x([2, 1, 1, 1])), options()).starts_with("bias: expected shape"));
    let error = with(None, Some(x([1, 1, 1, 1]).cast(DType::F64)), options());
    assert!(error.contains("bias: expected f32, f16 or bf16, got f64"), "{error}");
    for (start, options) in [
        ("scale: ", AttentionOptions { scale: Some(f64::NAN), ..options() }),
        ("softcap: ", AttentionOptions { softcap: Some(0.0), ..options() }),
        ("window: ", AttentionOptions { window: Some(0), ..options() }),
        ("sinks: ", AttentionOptions { sinks: Some(vec![0.0; 5]), ..options() }),
        ("sinks: ", AttentionOptions { sinks: Some(vec![f32::NAN; 6]), ..options() }),
    ] {
        let error = with(None, None, options);
        assert!(error.starts_with(start), "{error}");
    }
}

/// On primitives the number of axes is not known before.
#[test]
fn axes_are_counted() {
    let x = noise([6, 5, 16], 1, &Device::flex()).try_into_primitive::<Flex>().unwrap();
    let error = words(Flex::attention(x.clone(), x.clone(), x, None, None, Default::default()));
    assert!(error.contains("q: expected 4 axes, got shape [6, 5, 16]"), "{error}");
}

#[test]
fn graphs_with_and_without_checkpointing_do_not_mix() {
    let (a, b) = (Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing());
    let (a, b) = (noise([1, 1, 3, 4], 1, &a), noise([1, 1, 3, 4], 1, &b));
    let error = words(attention(a.clone(), b, a, None, None, AttentionOptions::default()));
    assert!(error.contains("checkpointing"), "{error}");
}

#[test]
fn sizes_without_memory_are_refused() {
    let one = x([1, 1, 1, 1]);
    let q = one.clone().expand([1, 1, 1, 16]);
    let huge = one.clone().expand([1, 1, 1, 1i64 << 60]);
    let run = |q: &Tensor<4>, v: &Tensor<4>| {
        attention(q.clone(), q.clone().narrow(2, 0, 1), v.clone(), None, None, AttentionOptions::default())
    };
    assert!(run(&q, &huge).is_err());
    let long = one.expand([1, 1, 1i64 << 58, 16]);
    assert!(run(&long, &q).is_err());
}
