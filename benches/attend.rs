//! The tiled engine on the standard shapes, against the naive composition
//! where that is soon done.

use std::hint::black_box;
use std::time::Duration;

use attention_kernels::element::{DType, Element};
use attention_kernels::simd::Isa;
use attention_kernels::{Qkv, Result, Workspace};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use half::{bf16, f16};
use ndarray::Array4;

#[path = "support/naive.rs"]
mod naive;
#[path = "../examples/support/shapes.rs"]
#[allow(dead_code)]
mod shapes;
use shapes::{SHAPES, Shape, Variant};

/// The naive composition runs where it has no more to do.
const NAIVE_FLOPS: u64 = 10_000_000_000;

fn attend(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attend");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for shape in SHAPES.iter().filter(|shape| shape.is_plain() && !shape.is_decode()) {
        let done = match shape.dtype {
            DType::F32 => kernel::<f32>(&mut group, shape).map(|flops| against(&mut group, shape, flops)),
            DType::F16 => kernel::<f16>(&mut group, shape).map(drop),
            DType::Bf16 => kernel::<bf16>(&mut group, shape).map(drop),
        };
        done.expect("a standard shape is valid");
    }
}

/// The flops of the shape.
fn kernel<T: Element>(group: &mut BenchmarkGroup<'_, WallTime>, shape: &Shape) -> Result<u64> {
    let [q, k, v] = shape.qkv::<T>();
    let x = Qkv::new(q.view(), k.view(), v.view());
    let (forward, cost) = shapes::plain(shape, Isa::choose(None)?, x)?;
    let mut out = Array4::from_elem(shape.q_dim(), T::default());
    let mut workspace = Workspace::new();
    group.throughput(Throughput::Elements(cost.flops));
    group.bench_function(format!("{}/kernel", shape.name), |bencher| {
        bencher.iter(|| forward(black_box(x), out.view_mut(), &mut workspace));
    });
    Ok(cost.flops)
}

fn against(group: &mut BenchmarkGroup<'_, WallTime>, shape: &Shape, flops: u64) {
    let causal = matches!(shape.variant, Variant::Causal);
    if flops > NAIVE_FLOPS {
        return;
    }
    let [q, k, v] = shape.qkv::<f32>();
    group.bench_function(format!("{}/naive", shape.name), |bencher| {
        bencher.iter(|| naive::attention(black_box(q.view()), k.view(), v.view(), causal));
    });
}

criterion_group!(benches, attend);
criterion_main!(benches);
