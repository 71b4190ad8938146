//! One query for each of many keys, against the naive composition. Keys and
//! values are there twice and taken in turns, so that no cache serves them.

use std::hint::black_box;
use std::time::Duration;

use attention_kernels::dense::Dense;
use attention_kernels::element::{DType, Element};
use attention_kernels::{Attention, Qkv, Result, Workspace};
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
use shapes::{SHAPES, Shape};

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for shape in SHAPES.iter().filter(|shape| shape.is_decode()) {
        group.throughput(Throughput::Bytes(shape.kv_bytes() as u64));
        let done = match shape.dtype {
            DType::F32 => kernel::<f32>(&mut group, shape).map(|()| against(&mut group, shape)),
            DType::F16 => kernel::<f16>(&mut group, shape),
            DType::Bf16 => kernel::<bf16>(&mut group, shape),
        };
        done.expect("a standard shape is valid");
    }
}

fn kernel<T: Element>(group: &mut BenchmarkGroup<'_, WallTime>, shape: &Shape) -> Result<()> {
    let copies = vec![shape.qkv::<T>(); 2];
    let dense = Dense::builder().build()?;
    let mut out = Array4::from_elem(shape.q_dim(), T::default());
    let mut workspace = Workspace::new();
    let mut turns = copies.iter().cycle();
    group.bench_function(format!("{}/kernel", shape.name), |bencher| {
        bencher.iter(|| {
            let [q, k, v] = turns.next().unwrap_or(&copies[0]);
            let x = Qkv::new(q.view(), k.view(), v.view());
            dense.forward_into(black_box(x), out.view_mut(), &mut workspace)
        });
    });
    Ok(())
}

fn against(group: &mut BenchmarkGroup<'_, WallTime>, shape: &Shape) {
    let copies = vec![shape.qkv::<f32>(); 2];
    let mut turns = copies.iter().cycle();
    group.bench_function(format!("{}/naive", shape.name), |bencher| {
        bencher.iter(|| {
            let [q, k, v] = turns.next().unwrap_or(&copies[0]);
            naive::attention(black_box(q.view()), k.view(), v.view(), false)
        });
    });
}

criterion_group!(benches, decode);
criterion_main!(benches);
