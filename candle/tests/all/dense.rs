use attention_kernels::dense::{Dense, Sigmoid};
use attention_kernels::mask::{Causal, Window};
use attention_kernels::score::Softcap;
use attention_kernels::{Qkv, Recurrent, linear::Lightning};
use attention_kernels_candle::{
    attend, attend_with_lse, attend_with_sinks, forward, merge_parts, mix_from, prefill, read,
};
use candle_core::{D, DType, Device, Tensor, Var};
use half::bf16;

use crate::support::{Unfused, agree, close, gradients, noise, numbers, same, var, window_mask};

/// Batch, heads, key/value heads, queries, keys, elements of a key and of a value.
const SIZES: [[usize; 7]; 5] = [
    [1, 1, 1, 1, 1, 1, 1],
    [2, 6, 2, 37, 53, 24, 40],
    [1, 4, 1, 130, 130, 64, 64],
    [3, 3, 3, 1, 300, 33, 7],
    [1, 2, 1, 65, 70, 128, 128],
];

fn vars([b, h, g, n, m, d, e]: [usize; 7]) -> [Var; 3] {
    [var((b, h, n, d), 1), var((b, g, m, d), 2), var((b, g, m, e), 3)]
}

#[test]
fn is_matmul_softmax_matmul() {
    for sizes in SIZES {
        let ([q, k, v], [_, _, _, n, m, ..]) = (vars(sizes), sizes);
        let check = |what: &str, got, unfused: Unfused| {
            let want = unfused.run(&q, &k, &v).unwrap();
            agree(&format!("{what} {sizes:?}"), &got, &want, &[&q, &k, &v], 3e-6);
        };
        let dense = Dense::builder().build().unwrap();
        check("full", attend(&q, &k, &v, &dense).unwrap(), Unfused::new());
        let dense = Dense::builder().causal().scale(0.7).build().unwrap();
        let unfused = Unfused { scale: Some(0.7), ..Unfused::causal(&q, &k) };
        check("causal", attend(&q, &k, &v, &dense).unwrap(), unfused);
        let dense = Dense::builder().mask(Window::new(Some(9), Some(0)));
        let dense = dense.score(Softcap::new(0.8).unwrap()).build().unwrap();
        let mask = Some(window_mask(n, m, Some(10)));
        let unfused = Unfused { mask, softcap: Some(0.8), ..Unfused::new() };
        check("window", attend(&q, &k, &v, &dense).unwrap(), unfused);
    }
}

#[test]
fn sinks_have_gradients() {
    let [q, k, v] = vars([2, 6, 2, 37, 53, 24, 40]);
    let sinks = var(6, 4);
    let want = Unfused { sinks: Some(sinks.as_tensor().clone()), ..Unfused::causal(&q, &k) };
    let want = want.run(&q, &k, &v).unwrap();
    let build = |sinks: Vec<f32>| Dense::builder().causal().sinks(sinks).build();
    let got = attend_with_sinks(&q, &k, &v, &sinks, build).unwrap();
    agree("tracked", &got, &want, &[&q, &k, &v, &sinks], 3e-6);
    // As constants, and with the output kept for the backward pass.
    let got = attend(&q, &k, &v, &build(numbers(&sinks)).unwrap()).unwrap();
    agree("constant", &got, &want, &[&q, &k, &v], 3e-6);
    // Sinks alone can be trained.
    let fixed = q.as_detached_tensor();
    let got = attend_with_sinks(&fixed, &fixed, &fixed, &sinks, build).unwrap();
    assert!(gradients(&got).unwrap().get(&sinks).is_some());
}

/// Tensors are read where they lie.
#[test]
fn strides_do_not_matter() {
    let dense = Dense::builder().causal().build().unwrap();
    let mixed = var((2, 41, 3 * 4, 24), 1); // queries, keys and values side by side, with others before
    let part = |first: usize, heads: usize| {
        mixed.narrow(1, 3, 31).unwrap().narrow(2, first, heads).unwrap().transpose(1, 2).unwrap()
    };
    let (q, k, v) = (part(0, 6), part(6, 3), part(9, 3));
    assert!(!q.is_contiguous());
    let got = attend(&q, &k, &v, &dense).unwrap();
    let [cq, ck, cv] = [&q, &k, &v].map(|x| x.contiguous().unwrap());
    same("strided", &got, &attend(&cq, &ck, &cv, &dense).unwrap());
    let want = Unfused::causal(&q, &k).run(&q, &k, &v).unwrap();
    agree("strided", &got, &want, &[&mixed], 3e-6);

    // One sequence and one head for all, by strides of 0, and columns that run backwards in memory.
    let (one, q) = (var((1, 1, 31, 24), 2), var((24, 31, 4, 2), 3));
    let shared = one.broadcast_as((2, 4, 31, 24)).unwrap();
    let turned = q.permute((3, 2, 1, 0)).unwrap();
    let got = attend(&turned, &shared, &shared, &dense).unwrap();
    let want = Unfused::causal(&turned, &shared).run(&turned, &shared, &shared).unwrap();
    agree("broadcast", &got, &want, &[&one, &q], 1e-5);
}

#[test]
fn outputs_lie_as_projections_read_them() {
    let [q, k, v] = vars([2, 6, 2, 37, 53, 24, 40]);
    let out = attend(&q, &k, &v, &Dense::builder().build().unwrap()).unwrap();
    assert_eq!(out.dims(), [2, 6, 37, 40]);
    assert!(out.transpose(1, 2).unwrap().is_contiguous());
}

#[test]
fn one_tensor_may_be_all_three_and_calls_may_follow_each_other() {
    let x = var((1, 2, 40, 16), 1);
    let dense = Dense::builder().causal().build().unwrap();
    let twice = |f: &dyn Fn(&Tensor) -> Tensor| f(&f(&x));
    let got = twice(&|x| attend(x, x, x, &dense).unwrap());
    let want = twice(&|x| Unfused::causal(x, x).run(x, x, x).unwrap());
    agree("twice", &got, &want, &[&x], 1e-5);
    // A graph may be asked again.
    let (first, second) = (gradients(&got).unwrap(), gradients(&got).unwrap());
    same("again", first.get(&x).unwrap(), second.get(&x).unwrap());
}

#[test]
fn half_types_keep_to_their_rounding() {
    let sizes = [2, 6, 2, 37, 53, 24, 40];
    let dense = Dense::builder().causal().build().unwrap();
    for (dtype, rounding) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
        let halves = vars(sizes).map(|x| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap());
        let wide = halves.each_ref().map(|x| Var::from_tensor(&x.to_dtype(DType::F32).unwrap()).unwrap());
        let ([q, k, v], [wq, wk, wv]) = (&halves, &wide);
        let (got, want) = (attend(q, k, v, &dense).unwrap(), attend(wq, wk, wv, &dense).unwrap());
        assert_eq!(got.dtype(), dtype);
        close("rounded", &got, &want, rounding);
        // The loss weighs by numbers of the type.
        let weights = noise(got.shape(), 99).to_dtype(dtype).unwrap();
        let loss = |x: &Tensor, w: &Tensor| (x * w).unwrap().sum_all().unwrap();
        let got = loss(&got, &weights).backward().unwrap();
        let want = loss(&want, &weights.to_dtype(DType::F32).unwrap()).backward().unwrap();
        for (half, wide) in halves.iter().zip(&wide) {
            let got = got.get(half).unwrap();
            assert_eq!(got.dtype(), dtype);
            close("gradient", got, want.get(wide).unwrap(), rounding);
        }
    }
}

#[test]
fn parts_merge() {
    let [q, k, v] = vars([2, 6, 2, 37, 53, 24, 40]).map(|x| x.as_detached_tensor());
    let dense = Dense::builder().build().unwrap();
    let (out, lse) = attend_with_lse(&q, &k, &v, &dense).unwrap();
    same("out", &out, &attend(&q, &k, &v, &dense).unwrap());
    let scores = Unfused::new().scores(&q, &k).unwrap();
    close("lse", &lse, &scores.log_sum_exp(D::Minus1).unwrap(), 1e-6);

    let part = |first: usize, len: usize| {
        let (k, v) = (k.narrow(2, first, len).unwrap(), v.narrow(2, first, len).unwrap());
        attend_with_lse(&q, &k, &v, &dense).unwrap()
    };
    // No keys change nothing.
    let parts = [part(0, 20), part(20, 0), part(20, 1), part(21, 32)];
    let (merged, merged_lse) = merge_parts(&parts).unwrap();
    close("merged", &merged, &out, 1e-6);
    close("merged lse", &merged_lse, &lse, 1e-6);
    assert!(merged.transpose(1, 2).unwrap().is_contiguous());
    assert!(merge_parts(&[]).is_err());
    assert!(merge_parts(&[(merged.clone(), lse.narrow(2, 0, 5).unwrap())]).is_err());
    assert!(merge_parts(&[part(0, 20), (merged, lse.narrow(2, 0, 5).unwrap())]).is_err());

    let halves = [&q, &k, &v].map(|x| x.to_dtype(DType::BF16).unwrap());
    let (out, lse) = attend_with_lse(&halves[0], &halves[1], &halves[2], &dense).unwrap();
    assert_eq!((out.dtype(), lse.dtype()), (DType::F32, DType::F32));
}

#[test]
fn nothing_is_something() {
    let dense = Dense::builder().mask(Causal::new()).build().unwrap();
    for sizes in [[0, 2, 1, 3, 4, 8, 8], [1, 0, 0, 3, 4, 8, 8], [1, 2, 1, 0, 4, 8, 8], [1, 2, 1, 3, 4, 8, 0]]
    {
        let [q, k, v] = vars(sizes);
        let out = attend(&q, &k, &v, &dense).unwrap();
        assert_eq!(out.dims(), [sizes[0], sizes[1], sizes[3], sizes[6]]);
        let gradients = out.sum_all().unwrap().backward().unwrap();
        for x in [&q, &k, &v] {
            assert!(numbers(gradients.get(x).unwrap()).iter().all(|&x| x == 0.0 || sizes[3] > 0));
            assert_eq!(gradients.get(x).unwrap().dims(), x.dims());
        }
    }
    // Without keys and without elements of a key.
    let [q, k, v] = vars([1, 2, 1, 3, 0, 8, 8]);
    let out = attend(&q, &k, &v, &dense).unwrap();
    assert_eq!(numbers(&out), vec![0.0; 48]);
    assert_eq!(numbers(gradients(&out).unwrap().get(&q).unwrap()), vec![0.0; 48]);
    let [q, k, v] = vars([1, 2, 1, 3, 3, 0, 8]);
    let unfused = Unfused { scale: Some(1.0), ..Unfused::causal(&q, &k) };
    let zeros = Tensor::zeros((1, 2, 3, 1), DType::F32, &Device::Cpu).unwrap();
    let want = unfused.run(&zeros, &zeros.narrow(1, 0, 1).unwrap(), &v).unwrap();
    close("means", &attend(&q, &k, &v, &dense).unwrap(), &want, 1e-6);
}

#[test]
fn any_mechanism_reads_tensors() {
    let x = noise((2, 30, 3, 16), 1).transpose(1, 2).unwrap();
    let held = read("x", &x).unwrap();
    let array = held.array4::<f32>().unwrap();
    let got = forward(&Sigmoid::builder().bias(0.0).build().unwrap(), Qkv::new(array, array, array)).unwrap();
    let scores = Unfused::new().scores(&x, &x).unwrap();
    let weights = candle_nn::ops::sigmoid(&scores).unwrap();
    close("sigmoid", &got, &weights.matmul(&x.contiguous().unwrap()).unwrap(), 3e-6);

    let lightning = Lightning::builder(3).build().unwrap();
    let (mut ours, mut theirs) = (None, None);
    for _ in 0..2 {
        let got = prefill(&lightning, Qkv::new(array, array, array), &mut ours).unwrap();
        same("prefill", &got, &mix_from(&lightning, [&x, &x, &x], &mut theirs).unwrap());
    }
    assert_eq!(ours, theirs);
    assert_ne!(ours.unwrap(), lightning.initial_state(Qkv::new(array, array, array)).unwrap());
    assert!(held.array4::<bf16>().is_err() && held.array3::<f32>().is_err());
}

#[test]
fn threads_of_candle_give_the_same() {
    let [q, k, v] = vars([2, 6, 2, 37, 53, 24, 40]);
    let dense = Dense::builder().causal().build().unwrap();
    let out = || attend(&q, &k, &v, &dense).unwrap();
    same("pool", &Device::Cpu.with_context(out), &out());
}
