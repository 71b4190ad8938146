use attention_kernels::cache::{Append, Cache, Contiguous, Int8, KvShape, Paged, Pages};
use attention_kernels::dense::Dense;
use attention_kernels_candle::{append, attend, attend_cached};
use candle_core::{DType, Tensor};

use crate::support::{close, noise, var};

const SHAPE: KvShape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 40 };

/// A prompt and some tokens into two sequences, attended to as they come.
fn grows<C: Append>(mut cache: C, tolerance: f32) {
    let tokens = |heads, dim, seed| noise((2, 50, heads, dim), seed).transpose(1, 2).unwrap();
    let (q, k, v) = (tokens(6, 24, 1), tokens(2, 24, 2), tokens(2, 40, 3));
    let dense = Dense::builder().causal().build().unwrap();
    let whole = attend(&q, &k, &v, &dense).unwrap();
    for (first, len) in [(0, 30), (30, 1), (31, 1), (32, 18)] {
        let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(2, first, len).unwrap());
        append(&mut cache, &[1, 0], &k, &v).unwrap();
        let sequences = Some(&[1, 0][..]);
        let out = attend_cached(&q, &cache, sequences, &dense).unwrap();
        assert!(out.transpose(1, 2).unwrap().is_contiguous());
        close("cached", &out, &whole.narrow(2, first, len).unwrap(), tolerance);
    }
    // All sequences, in the order of the cache.
    let turned = Tensor::cat(&[whole.narrow(0, 1, 1).unwrap(), whole.narrow(0, 0, 1).unwrap()], 0).unwrap();
    let q = Tensor::cat(&[q.narrow(0, 1, 1).unwrap(), q.narrow(0, 0, 1).unwrap()], 0).unwrap();
    let out = attend_cached(&q.narrow(2, 49, 1).unwrap(), &cache, None, &dense).unwrap();
    close("all", &out, &turned.narrow(2, 49, 1).unwrap(), tolerance);
    // There is no room for more, and nothing has changed.
    let more = append(&mut cache, &[0, 1], &noise((2, 2, 99, 24), 1), &noise((2, 2, 99, 40), 1));
    assert!(more.is_err() && cache.lengths() == [50, 50]);
}

#[test]
fn caches_hold_what_tensors_held() {
    grows(Contiguous::<f32>::new(SHAPE, 2, 64).unwrap(), 1e-6);
    grows(Paged::<f32>::new(SHAPE, 2, Pages { count: 8, len: 16 }).unwrap(), 1e-6);
    grows(Contiguous::<half::bf16>::new(SHAPE, 2, 64).unwrap(), 2e-2);
    grows(Contiguous::<Int8>::new(SHAPE, 2, 64).unwrap(), 2e-2);
    grows(Paged::<Int8>::new(SHAPE, 2, Pages { count: 8, len: 16 }).unwrap(), 2e-2);
}

#[test]
fn types_mix_and_what_does_not_fit_is_refused() {
    let mut cache = Contiguous::<f32>::new(SHAPE, 1, 64).unwrap();
    let dense = Dense::builder().build().unwrap();
    let (k, v, q) = (noise((1, 2, 9, 24), 1), noise((1, 2, 9, 40), 2), noise((1, 6, 3, 24), 3));
    let [hk, hv, hq] = [&k, &v, &q].map(|x| x.to_dtype(DType::F16).unwrap());
    append(&mut cache, &[0], &hk, &hv).unwrap();
    let [k, v] = [&hk, &hv].map(|x| x.to_dtype(DType::F32).unwrap());
    let out = attend_cached(&hq, &cache, None, &dense).unwrap();
    assert_eq!(out.dtype(), DType::F16);
    let wide = hq.to_dtype(DType::F32).unwrap();
    close("f16 queries", &out, &attend(&wide, &k, &v, &dense).unwrap(), 1.0 / 2048.0);

    for (k, v) in [(&k, &hv), (&q, &v), (&v, &k)] {
        assert!(append(&mut cache, &[0], k, v).is_err());
    }
    assert!(append(&mut cache, &[1], &k, &v).is_err());
    assert!(append(&mut cache, &[0], &k.to_dtype(DType::F64).unwrap(), &v).is_err());
    assert_eq!(cache.lengths(), [9]);
    assert!(attend_cached(&v, &cache, None, &dense).is_err());
    assert!(attend_cached(&q, &cache, Some(&[1]), &dense).is_err());
    // Gradients stop here, and say so.
    let q = var((1, 6, 3, 24), 3);
    let loss = attend_cached(&q, &cache, None, &dense).unwrap().sum_all().unwrap();
    assert!(loss.backward().unwrap_err().to_string().contains("attention over a cache"));
}
