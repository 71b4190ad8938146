//! Numbers, comparisons, and attention of burn's operators.

use attention_kernels_burn::AttentionOptions;
use burn::tensor::{Bool, DType, Device, Gradients, Shape, Tensor, TensorData, activation};

/// Batch, heads, key/value heads, queries, keys, elements of a key and of a value.
pub type Sizes = [usize; 7];

pub const SIZES: [Sizes; 5] = [
    [1, 1, 1, 1, 1, 1, 1],
    [2, 6, 2, 37, 53, 24, 40],
    [1, 4, 1, 130, 130, 64, 64],
    [3, 3, 3, 1, 300, 33, 7],
    [1, 2, 1, 65, 70, 128, 128],
];

/// Numbers between -1 and 1 that look like noise.
pub fn noise<const D: usize>(dims: [usize; D], seed: usize, device: &Device) -> Tensor<D> {
    let number = |i: usize| {
        let x = ((i + 1) as f64 * 12.9898 + seed as f64 * 78.233).sin() * 43758.5453;
        (2.0 * (x - x.floor()) - 1.0) as f32
    };
    let all: Vec<f32> = (0..dims.iter().product()).map(number).collect();
    Tensor::from_data(TensorData::new(all, Shape::from(dims)), device)
}

/// Numbers whose gradients are asked for.
pub fn var<const D: usize>(dims: [usize; D], seed: usize) -> Tensor<D> {
    noise(dims, seed, &Device::flex().autodiff()).require_grad()
}

pub fn vars([b, h, g, n, m, d, e]: Sizes) -> [Tensor<4>; 3] {
    [var([b, h, n, d], 1), var([b, g, m, d], 2), var([b, g, m, e], 3)]
}

pub fn numbers<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
    x.clone().cast(DType::F32).into_data().try_to_vec().unwrap()
}

/// Whether all numbers are within `tolerance` of each other.
#[track_caller]
pub fn close<const D: usize>(what: &str, got: &Tensor<D>, want: &Tensor<D>, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    for (i, (a, b)) in numbers(got).iter().zip(numbers(want)).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}, element {i}: {a}, not {b}");
    }
}

#[track_caller]
pub fn same<const D: usize>(what: &str, got: &Tensor<D>, want: &Tensor<D>) {
    close(what, got, want, 0.0);
}

/// Gradients of a loss in which every element has a weight of its own.
pub fn gradients<const D: usize>(out: &Tensor<D>) -> Gradients {
    let weights = noise(out.dims(), 99, &out.device()).cast(out.dtype());
    (out.clone() * weights).sum().backward()
}

/// Compares an output and the gradients of all of these.
#[track_caller]
pub fn agree<const D: usize>(
    what: &str,
    got: &Tensor<D>,
    want: &Tensor<D>,
    vars: &[&Tensor<4>],
    tolerance: f32,
) {
    close(what, got, want, tolerance);
    let (got, want) = (gradients(got), gradients(want));
    for (i, var) in vars.iter().enumerate() {
        let (got, want) = (var.grad(&got).expect("a gradient"), var.grad(&want).expect("a gradient"));
        assert_eq!(got.dtype(), var.dtype());
        close(&format!("{what}, gradient {i}"), &got, &want, 10.0 * tolerance);
    }
}

pub fn repeat_kv(x: &Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, kv_heads, len, dim] = x.dims();
    let group = heads / kv_heads;
    x.clone()
        .unsqueeze_dim::<5>(2)
        .expand([batch, kv_heads, group, len, dim])
        .reshape([batch, heads, len, dim])
}

/// `true` where a key is hidden, by distance from the query's position.
pub fn hidden(n: usize, m: usize, hides: impl Fn(isize) -> bool) -> Tensor<4, Bool> {
    let at = |i: usize| hides((i % m) as isize - (i / m + m - n) as isize);
    let all: Vec<bool> = (0..n * m).map(at).collect();
    Tensor::from_data(TensorData::new(all, [1, 1, n, m]), &Device::flex().autodiff())
}

/// Attention of burn's operators, one by one, as burn derives its gradient.
pub fn unfused(
    [q, k, v]: [&Tensor<4>; 3],
    hidden: Option<Tensor<4, Bool>>,
    bias: Option<Tensor<4>>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let [batch, heads, n, d] = q.dims();
    let (k, v) = (repeat_kv(k, heads), repeat_kv(v, heads));
    let m = k.dims()[2];
    let scale = options.scale.unwrap_or(1.0 / (d as f64).sqrt());
    let mut scores = q.clone().matmul(k.transpose()).mul_scalar(scale);
    if let Some(cap) = options.softcap {
        scores = scores.div_scalar(cap).tanh().mul_scalar(cap);
    }
    if let Some(bias) = bias {
        scores = scores + bias.expand([batch, heads, n, m]);
    }
    if let Some(hidden) = hidden {
        scores = scores.mask_fill(hidden.expand([batch, heads, n, m]), -1e30);
    }
    if let Some(sinks) = &options.sinks {
        let sinks = Tensor::<1>::from_floats(&sinks[..], &scores.device()).reshape([1, heads, 1, 1]);
        scores = Tensor::cat(vec![scores, sinks.expand([batch, heads, n, 1])], 3);
    }
    activation::softmax(scores, 3).narrow(3, 0, m).matmul(v)
}
