//! One query for each of many keys, against the naive composition. Keys and
//! values are there twice and taken in turns, so that no cache serves them.

use std::hint::black_box;
use std::time::Duration;

use attention_kernels::dense::Dense;
use attention_kernels::element::{DType, Element};
use attention_kernels::mask::Window;
use attention_kernels::{Attention, Qkv, Result, Workspace};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use half::{bf16, f16};
use ndarray::{Array4, s};

#[path = "support/naive.rs"]
mod naive;
#[path = "../examples/support/shapes.rs"]
#[allow(dead_code)]
mod shapes;
use shapes::{SHAPES, Shape, Variant};

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

/// Keys and values, and their memory as `[batch, heads, dim, len]`.
fn with_columns(x: &Array4<f32>) -> Array4<f32> {
    x.view().permuted_axes([0, 1, 3, 2]).as_standard_layout().to_owned().permuted_axes([0, 1, 3, 2])
}

/// Calls that should cost what their neighbours do: windows over short and long
/// caches, arrays that lie otherwise, calls that are hardly worth a thread,
/// batches of short sequences and loops over them.
fn cliffs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cliffs");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    let sizes = |batch, q_heads, kv_heads, q_len, kv_len| Shape {
        name: "",
        variant: Variant::Full,
        dtype: DType::F32,
        batch,
        q_heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim: 128,
        against: None,
    };
    let dense = Dense::builder().build().expect("valid options");
    let window = Dense::builder().mask(Window::new(Some(255), Some(0))).build().expect("valid options");
    for kv_len in [1024, 131_072] {
        let [q, k, v] = sizes(1, 32, 8, 1, kv_len).qkv::<f32>();
        let mut workspace = Workspace::new();
        let mut out = q.clone();
        group.bench_function(format!("window of 256 keys/{kv_len}"), |bencher| {
            bencher.iter(|| {
                let x = Qkv::new(q.view(), k.view(), v.view());
                window.forward_into(black_box(x), out.view_mut(), &mut workspace)
            });
        });
    }
    let [q, k, v] = sizes(1, 32, 8, 1, 16_384).qkv::<f32>();
    let (k_columns, v_columns) = (with_columns(&k), with_columns(&v));
    let layouts = [
        ("rows", &k, &v),
        ("columns of keys", &k_columns, &v),
        ("columns of values", &k, &v_columns),
        ("columns of both", &k_columns, &v_columns),
    ];
    for (name, k, v) in layouts {
        let mut workspace = Workspace::new();
        let mut out = q.clone();
        group.bench_function(format!("layout/{name}"), |bencher| {
            bencher.iter(|| {
                let x = Qkv::new(q.view(), k.view(), v.view());
                dense.forward_into(black_box(x), out.view_mut(), &mut workspace)
            });
        });
    }
    for (batch, q_len) in [(1, 1), (256, 1), (256, 16)] {
        let [q, k, v] = sizes(batch, 8, 8, q_len, 16).qkv::<f32>();
        let mut workspace = Workspace::new();
        let mut out = q.clone();
        group.bench_function(format!("16 keys/{batch} x {q_len} queries"), |bencher| {
            bencher.iter(|| {
                let x = Qkv::new(q.view(), k.view(), v.view());
                dense.forward_into(black_box(x), out.view_mut(), &mut workspace)
            });
        });
        group.bench_function(format!("16 keys/{batch} x {q_len} queries, one by one"), |bencher| {
            bencher.iter(|| {
                for b in 0..batch {
                    let [q, k, v] = [&q, &k, &v].map(|x| x.slice(s![b..b + 1, .., .., ..]));
                    let out = out.slice_mut(s![b..b + 1, .., .., ..]);
                    dense.forward_into(black_box(Qkv::new(q, k, v)), out, &mut workspace)?;
                }
                Result::<()>::Ok(())
            });
        });
    }
}

criterion_group!(benches, decode, cliffs);
criterion_main!(benches);
