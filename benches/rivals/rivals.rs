//! The standard shapes by this crate, by products of the crate `gemm`, and by
//! candle's flash attention on the CPU, where each supports them.
//!
//! ```text
//! cargo bench -p rivals
//! ```

use std::hint::black_box;
use std::time::Duration;

use attention_kernels::attention::Cost;
use attention_kernels::element::{DType, Element};
use attention_kernels::simd::Isa;
use attention_kernels::{Qkv, Workspace};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use half::{bf16, f16};
use ndarray::Array4;

#[path = "../../examples/support/shapes.rs"]
#[allow(dead_code)]
mod shapes;
use shapes::{SHAPES, Shape, Variant};

type Failure = Box<dyn std::error::Error>;
type Group<'a> = BenchmarkGroup<'a, WallTime>;

fn rivals(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rivals");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for shape in SHAPES.iter().filter(|shape| shape.is_plain()) {
        let done = match shape.dtype {
            DType::F32 => compare(&mut group, shape, Some(composed)),
            DType::F16 => compare::<f16>(&mut group, shape, None),
            DType::Bf16 => compare::<bf16>(&mut group, shape, None),
        };
        if let Err(error) = done {
            panic!("{}: {error}", shape.name);
        }
    }
}

type Arrays<T> = [Array4<T>; 3];

/// Times the composition on these arrays, whose output by this crate is the last.
type Composed<T> = fn(&mut Group<'_>, &Shape, &Arrays<T>, &Array4<T>);

/// Times this crate, `composed` if there is one, and candle if it takes the
/// shape; all three must agree.
fn compare<T>(group: &mut Group<'_>, shape: &Shape, composed: Option<Composed<T>>) -> Result<(), Failure>
where
    T: Element + candle_core::WithDType + num_traits::Float,
{
    let arrays = shape.qkv::<T>();
    let [q, k, v] = &arrays;
    let x = Qkv::new(q.view(), k.view(), v.view());
    let (forward, Cost { flops, .. }) = shapes::plain(shape, Isa::choose(None)?, x)?;
    let mut out = Array4::from_elem(shape.q_dim(), T::default());
    let mut workspace = Workspace::new();
    group.throughput(Throughput::Elements(flops));
    group.bench_function(format!("{}/attention-kernels", shape.name), |bencher| {
        bencher.iter(|| forward(black_box(x), out.view_mut(), &mut workspace));
    });
    forward(x, out.view_mut(), &mut workspace)?;

    if let Some(composed) = composed {
        composed(group, shape, &arrays, &out);
    }

    let causal = matches!(shape.variant, Variant::Causal);
    let tensors = rivals::tensors(&arrays)?;
    match rivals::candle::<T>(&tensors, causal) {
        Ok(theirs) => {
            let theirs = theirs.flatten_all()?.to_vec1::<T>()?;
            agree(shape, "candle", out.iter().zip(theirs.iter().copied()).map(|(&a, b)| (a, b)));
            group.bench_function(format!("{}/candle", shape.name), |bencher| {
                bencher.iter(|| rivals::candle::<T>(black_box(&tensors), causal));
            });
        }
        Err(error) => eprintln!("{}: candle does not take it: {error}", shape.name),
    }
    Ok(())
}

fn composed(group: &mut Group<'_>, shape: &Shape, [q, k, v]: &Arrays<f32>, ours: &Array4<f32>) {
    let causal = matches!(shape.variant, Variant::Causal);
    let mut out = rivals::composed(q.view(), k.view(), v.view(), causal, Array4::zeros(shape.q_dim()));
    agree(shape, "gemm", ours.iter().copied().zip(out.iter().copied()));
    group.bench_function(format!("{}/gemm", shape.name), |bencher| {
        bencher.iter(|| {
            let reused = std::mem::take(&mut out);
            out = rivals::composed(black_box(q.view()), k.view(), v.view(), causal, reused);
        });
    });
}

/// A program that computes something else is no rival.
fn agree<T: Element>(shape: &Shape, rival: &str, pairs: impl Iterator<Item = (T, T)>) {
    let off = pairs.map(|(a, b)| (a.to_f32() - b.to_f32()).abs()).fold(0.0, f32::max);
    assert!(off < 0.02, "{}: {rival} is off by {off}", shape.name);
}

criterion_group!(benches, rivals);
criterion_main!(benches);
