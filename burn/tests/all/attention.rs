use attention_kernels_burn::{AttentionOptions, attention};
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, DType, Device, Tensor, TensorData, module};

use crate::support::{
    SIZES, agree, close, gradients, hidden, noise, numbers, repeat_kv, same, unfused, var, vars,
};

fn causal() -> AttentionOptions {
    AttentionOptions { is_causal: true, ..Default::default() }
}

#[test]
fn is_matmul_softmax_matmul() {
    for sizes in SIZES {
        let ([q, k, v], [_, h, _, n, m, ..]) = (vars(sizes), sizes);
        let far = |distance: isize, most: isize| distance.abs() >= most;
        let cases = [
            ("full", AttentionOptions::default(), None),
            ("causal", AttentionOptions { scale: Some(0.7), ..causal() }, Some(hidden(n, m, |j| j > 0))),
            (
                "window",
                AttentionOptions { window: Some(10), softcap: Some(0.8), ..causal() },
                Some(hidden(n, m, |j| j > 0 || far(j, 10))),
            ),
            (
                "both sides",
                AttentionOptions { window: Some(5), ..Default::default() },
                Some(hidden(n, m, |j| far(j, 5))),
            ),
            (
                "sinks",
                AttentionOptions { sinks: Some((0..h).map(|h| h as f32 - 1.0).collect()), ..causal() },
                Some(hidden(n, m, |j| j > 0)),
            ),
        ];
        for (what, options, hidden) in cases {
            let got = attention(q.clone(), k.clone(), v.clone(), None, None, options.clone()).unwrap();
            let want = unfused([&q, &k, &v], hidden, None, &options);
            agree(&format!("{what} {sizes:?}"), &got, &want, &[&q, &k, &v], 3e-6);
        }
    }
}

/// burn's own operator, forward as `Flex` has it and backward as burn derives it.
#[test]
fn stands_in_for_burns() {
    let [q, k, v] = vars([2, 6, 2, 37, 53, 24, 40]);
    let (wk, wv) = (repeat_kv(&k, 6), repeat_kv(&v, 6));
    let options = AttentionModuleOptions { scale: Some(0.3), softcap: Some(2.0), is_causal: true };
    let mask = hidden(37, 53, |j| j % 7 == 0).expand([2, 6, 37, 53]);
    let bias = var([2, 6, 37, 53], 4);
    let (m, b) = (Some(mask), Some(bias.clone()));
    let got = attention(q.clone(), k.clone(), v.clone(), m.clone(), b.clone(), options).unwrap();
    let want = module::attention(q.clone(), wk, wv, m, b, options);
    agree("autodiff", &got, &want, &[&q, &k, &v, &bias], 3e-6);
    // Without a graph.
    let inner = |x: &Tensor<4>| x.clone().inner();
    let got = attention(inner(&q), inner(&k), inner(&v), None, None, options).unwrap();
    let want = module::attention(inner(&q), inner(&k), inner(&v), None, None, options);
    assert_eq!(got.device(), Device::flex());
    close("inference", &got, &want, 3e-6);
}

#[test]
fn biases_have_gradients_of_their_shape() {
    let [q, k, v] = vars([2, 6, 2, 37, 53, 24, 40]);
    let options = AttentionOptions { softcap: Some(0.5), ..causal() };
    for (i, dims) in
        [[2, 6, 37, 53], [1, 6, 37, 53], [2, 1, 1, 53], [1, 6, 37, 1], [1, 1, 1, 1]].into_iter().enumerate()
    {
        let bias = var(dims, 10 + i);
        let got =
            attention(q.clone(), k.clone(), v.clone(), None, Some(bias.clone()), options.clone()).unwrap();
        let want = unfused([&q, &k, &v], Some(hidden(37, 53, |j| j > 0)), Some(bias.clone()), &options);
        agree(&format!("bias {dims:?}"), &got, &want, &[&q, &k, &v, &bias], 1e-5);
    }
    // A bias alone can be trained, and one that lies across.
    let fixed = noise([2, 6, 37, 24], 5, &Device::flex());
    let bias = var([37, 37, 1, 2], 6);
    let across = || Some(bias.clone().permute([3, 2, 1, 0]));
    let got = attention(fixed.clone(), fixed.clone(), fixed.clone(), None, across(), causal()).unwrap();
    let lifted = Tensor::from_inner(fixed);
    let want = unfused([&lifted, &lifted, &lifted], Some(hidden(37, 37, |j| j > 0)), across(), &causal());
    agree("bias alone", &got, &want, &[&bias], 1e-5);
}

#[test]
fn padding_is_hidden() {
    let [q, k, v] = vars([2, 6, 2, 37, 53, 24, 40]);
    // The first sequence has 20 keys, the second none.
    let padding: Vec<bool> = (0..2 * 53).map(|i| i >= 20).collect();
    let mask = Tensor::<4, Bool>::from_data(TensorData::new(padding, [2, 1, 1, 53]), &q.device());
    let got = attention(q.clone(), k.clone(), v.clone(), Some(mask.clone()), None, causal()).unwrap();
    let part = |x: &Tensor<4>, at: usize, len: usize| x.clone().narrow(0, at, 1).narrow(2, 0, len);
    let first = [&part(&q, 0, 37), &part(&k, 0, 20), &part(&v, 0, 20)];
    let by_position = hidden(37, 53, |j| j > 0).narrow(3, 0, 20);
    let want = unfused(first, Some(by_position), None, &Default::default());
    close("seen", &got.clone().narrow(0, 0, 1), &want, 3e-6);
    assert_eq!(numbers(&got.clone().narrow(0, 1, 1)), vec![0.0; 6 * 37 * 40]);
    // What is hidden cannot matter, NaN included.
    let nan = Tensor::full([2, 2, 33, 24], f32::NAN, &Device::flex());
    let spoilt = k.clone().inner().slice_assign([0..2, 0..2, 20..53, 0..24], nan);
    let spoilt = Tensor::from_inner(spoilt).require_grad();
    let again = attention(q.clone(), spoilt.clone(), v.clone(), Some(mask), None, causal()).unwrap();
    same("spoilt", &again, &got);
    let (again, got) = (gradients(&again), gradients(&got));
    same("gradient of q", &q.grad(&again).unwrap(), &q.grad(&got).unwrap());
    same("gradient of k", &spoilt.grad(&again).unwrap(), &k.grad(&got).unwrap());
}

/// Tensors are read where they lie.
#[test]
fn strides_do_not_matter() {
    // Queries, keys and values side by side, with others before.
    let mixed = var([2, 41, 3 * 4, 24], 1);
    let part =
        |first: usize, heads: usize| mixed.clone().narrow(1, 3, 31).narrow(2, first, heads).swap_dims(1, 2);
    let parts = || [part(0, 6), part(6, 3), part(9, 3)];
    let [q, k, v] = parts();
    let got = attention(q, k, v, None, None, causal()).unwrap();
    let want = unfused(parts().each_ref(), Some(hidden(31, 31, |j| j > 0)), None, &causal());
    agree("strided", &got, &want, &[&mixed], 3e-6);

    // One sequence and one head for all by strides of 0, columns that lie across, and rows
    // that run backwards in memory.
    let (one, q) = (var([1, 1, 31, 24], 2), var([24, 31, 4, 2], 3));
    let shared = || one.clone().flip([2, 3]).expand([2, 4, 31, 24]);
    let turned = || q.clone().permute([3, 2, 1, 0]);
    let (q_view, kv) = (turned(), shared());
    let got = attention(q_view, kv.clone(), kv, None, None, causal()).unwrap();
    let (q_view, kv) = (turned(), shared());
    let want = unfused([&q_view, &kv, &kv], Some(hidden(31, 31, |j| j > 0)), None, &causal());
    agree("expanded", &got, &want, &[&one, &q], 1e-5);
}

#[test]
fn one_tensor_may_be_all_three_and_calls_may_follow_each_other() {
    let x = var([1, 2, 40, 16], 1);
    let twice = |f: &dyn Fn(&Tensor<4>) -> Tensor<4>| f(&f(&x));
    let got = twice(&|x| attention(x.clone(), x.clone(), x.clone(), None, None, causal()).unwrap());
    let want = twice(&|x| unfused([x, x, x], Some(hidden(40, 40, |j| j > 0)), None, &causal()));
    agree("twice", &got, &want, &[&x], 1e-5);
}

#[test]
fn half_types_keep_to_their_rounding() {
    for (dtype, rounding) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
        let of = |x: Tensor<4>| x.inner().cast(dtype);
        let halves = vars([2, 6, 2, 37, 53, 24, 40]).map(of);
        let bias = noise([1, 6, 37, 53], 8, &Device::flex()).cast(dtype);
        let run = |dtype: DType| {
            let of = |x: &Tensor<4>| Tensor::from_inner(x.clone().cast(dtype)).require_grad();
            let ([q, k, v], bias) = (halves.each_ref().map(of), of(&bias));
            let out = attention(q.clone(), k.clone(), v.clone(), None, Some(bias.clone()), causal()).unwrap();
            assert_eq!(out.dtype(), dtype);
            // The loss weighs by numbers of the half type.
            let weights = noise(out.dims(), 99, &out.device()).cast(halves[0].dtype()).cast(dtype);
            let gradients = (out.clone() * weights).sum().backward();
            (out, [q, k, v, bias].map(|x| x.grad(&gradients).unwrap()))
        };
        let ((got, got_gradients), (want, want_gradients)) = (run(dtype), run(DType::F32));
        close("rounded", &got, &want, rounding);
        for (got, want) in got_gradients.iter().zip(&want_gradients) {
            assert_eq!(got.dtype(), dtype);
            close("gradient", got, want, rounding);
        }
    }
}

#[test]
fn nothing_is_something() {
    for sizes in [
        [0, 2, 1, 3, 4, 8, 8],
        [1, 0, 0, 3, 4, 8, 8],
        [1, 2, 1, 0, 4, 8, 8],
        [1, 2, 1, 3, 0, 8, 8],
        [1, 2, 1, 3, 4, 8, 0],
    ] {
        let [q, k, v] = vars(sizes);
        let out = attention(q.clone(), k.clone(), v.clone(), None, None, causal()).unwrap();
        assert_eq!(out.dims(), [sizes[0], sizes[1], sizes[3], sizes[6]]);
        assert!(numbers(&out).iter().all(|&x| x == 0.0));
        let gradients = gradients(&out);
        for x in [&q, &k, &v] {
            let gradient = x.grad(&gradients).unwrap();
            assert_eq!(gradient.dims(), x.dims());
            assert!(numbers(&gradient).iter().all(|&x| x == 0.0));
        }
    }
    // Without elements of a key all scores are 0.
    let [q, k, v] = vars([1, 2, 1, 3, 3, 0, 8]);
    let out =
        attention(q, k, v.clone(), None, None, AttentionOptions { scale: Some(1.0), ..Default::default() });
    let mean = v.mean_dim(2).expand([1, 2, 3, 8]);
    close("means", &out.unwrap(), &mean, 1e-6);
}

/// What is not asked for is not computed, and what has no graph is a constant.
#[test]
fn constants_have_no_gradients() {
    let [q, k, v] = vars([1, 2, 1, 5, 7, 8, 8]);
    let (k, v) = (k.inner(), v.set_require_grad(false));
    let out = attention(q.clone(), k.clone(), v.clone(), None, None, causal()).unwrap();
    let gradients = gradients(&out);
    assert!(q.grad(&gradients).is_some() && v.grad(&gradients).is_none());
    let out = attention(q.set_require_grad(false), k, v, None, None, causal()).unwrap();
    assert!(!out.is_require_grad());
}

#[test]
fn gradient_checkpointing_changes_nothing() {
    let run = |device: Device| {
        let x = noise([2, 41, 2, 24], 1, &device).require_grad();
        let y = x.clone().tanh().swap_dims(1, 2);
        let out = attention(y.clone(), y.clone(), y, None, None, causal()).unwrap().exp();
        (x.grad(&gradients(&out)).unwrap(), out.inner())
    };
    let (a, b) = (run(Device::flex().autodiff()), run(Device::flex().autodiff().gradient_checkpointing()));
    same("gradient", &a.0, &b.0);
    same("output", &a.1, &b.1);
}
