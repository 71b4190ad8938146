//! The recurrent engine: chunked, token by token, and one token alone,
//! against the definition's plain loops.

use std::hint::black_box;

use attention_kernels::linear::{Carried, Form, GatedDeltaNet, GatedDeltaQkv, Lightning};
use attention_kernels::{Attention, Backward, Qkv, Recurrent, Workspace};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ndarray::linalg::general_mat_vec_mul;
use ndarray::{Array2, Array3, Array4, s};

#[path = "../examples/support/noise.rs"]
mod noise;
use noise::noise;

const HEADS: usize = 16;
const DIM: usize = 128;

struct Case {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    log_decay: Array3<f32>,
    beta: Array3<f32>,
}

impl Case {
    fn new(tokens: usize) -> Self {
        let mut noise = noise(3);
        let mut array = || Array4::from_shape_simple_fn((1, HEADS, tokens, DIM), &mut noise);
        let (q, k, v) = (array(), array(), array());
        let log_decay = Array3::from_shape_simple_fn((1, HEADS, tokens), || -0.1 * noise().abs());
        let beta = Array3::from_elem((1, HEADS, tokens), 0.5);
        Self { q, k, v, log_decay, beta }
    }

    fn qkv(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    fn gated(&self) -> GatedDeltaQkv<'_, f32> {
        GatedDeltaQkv { qkv: self.qkv(), log_decay: self.log_decay.view(), beta: self.beta.view() }
    }
}

/// Lightning Attention as one would write it with whole-array arithmetic.
fn naive(case: &Case, slope: f32) -> Array4<f32> {
    let mut out = Array4::zeros(case.v.dim());
    for head in 0..HEADS {
        let mut state = Array2::<f32>::zeros((DIM, DIM));
        for t in 0..case.q.dim().2 {
            let [q, k, v] = [&case.q, &case.k, &case.v].map(|x| x.slice(s![0, head, t, ..]));
            state *= (-slope).exp();
            for (mut row, &k) in state.rows_mut().into_iter().zip(k) {
                row.scaled_add(k, &v);
            }
            general_mat_vec_mul(1.0, &state.t(), &q, 0.0, &mut out.slice_mut(s![0, head, t, ..]));
        }
    }
    out
}

fn prefill(criterion: &mut Criterion) {
    let tokens = 2048;
    let case = Case::new(tokens);
    let mut out = Array4::zeros(case.v.dim());
    let mut workspace = Workspace::new();
    let mut group = criterion.benchmark_group("recur");
    group.throughput(Throughput::Elements(tokens as u64)).sample_size(10);
    for (name, form) in [("chunked", Form::Chunked), ("recurrent", Form::Recurrent)] {
        let lightning = Lightning::builder(HEADS).form(form).build().expect("valid options");
        group.bench_function(format!("lightning/{name}"), |bencher| {
            bencher.iter(|| lightning.forward_into(black_box(case.qkv()), out.view_mut(), &mut workspace));
        });
        let gated = GatedDeltaNet::builder().normalize_qk().form(form).build().expect("valid options");
        group.bench_function(format!("gated-deltanet/{name}"), |bencher| {
            bencher.iter(|| gated.forward_into(black_box(case.gated()), out.view_mut(), &mut workspace));
        });
    }
    group.bench_function("lightning/naive", |bencher| bencher.iter(|| naive(black_box(&case), 0.1)));
}

fn step(criterion: &mut Criterion) {
    let case = Case::new(1);
    let mut out = Array4::zeros(case.v.dim());
    let mut workspace = Workspace::new();
    let mut group = criterion.benchmark_group("step");
    let lightning = Lightning::builder(HEADS).build().expect("valid options");
    let mut state = lightning.initial_state(case.qkv()).expect("a valid input");
    group.bench_function("lightning", |bencher| {
        bencher.iter(|| lightning.step_into(case.qkv(), &mut state, out.view_mut(), &mut workspace));
    });
    let gated = GatedDeltaNet::builder().normalize_qk().build().expect("valid options");
    let mut state = gated.initial_state(case.gated()).expect("a valid input");
    group.bench_function("gated-deltanet", |bencher| {
        bencher.iter(|| gated.step_into(case.gated(), &mut state, out.view_mut(), &mut workspace));
    });
}

fn backward(criterion: &mut Criterion) {
    let case = Case::new(1024);
    let mut group = criterion.benchmark_group("backward");
    group.sample_size(10);
    let lightning = Lightning::builder(HEADS).build().expect("valid options");
    group.bench_function("lightning", |bencher| {
        bencher.iter(|| lightning.backward(black_box(case.qkv()), case.v.view(), Carried::default()));
    });
    let gated = GatedDeltaNet::builder().normalize_qk().build().expect("valid options");
    group.bench_function("gated-deltanet", |bencher| {
        bencher.iter(|| gated.backward(black_box(case.gated()), case.v.view(), Carried::default()));
    });
}

criterion_group!(benches, prefill, step, backward);
criterion_main!(benches);
