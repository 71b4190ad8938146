//! Merging two partial results, against whole-array arithmetic.

use std::hint::black_box;

use attention_kernels::merge::merge_into;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ndarray::{Array3, Array4, Axis};

#[path = "../examples/support/noise.rs"]
mod noise;

fn merge(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("merge");
    for (name, heads, rows, dim) in
        [("decode-32x16-d128", 32, 16, 128), ("prefill-8x1024-d128", 8, 1024, 128)]
    {
        let mut noise = noise::noise(5);
        let mut out = Array4::from_shape_simple_fn((1, heads, rows, dim), &mut noise);
        let mut lse = Array3::from_shape_simple_fn((1, heads, rows), &mut noise);
        let other_out = Array4::from_shape_simple_fn(out.dim(), &mut noise);
        let other_lse = Array3::from_shape_simple_fn(lse.dim(), &mut noise);

        group.throughput(Throughput::Elements(out.len() as u64));
        group.bench_function(format!("{name}/kernel"), |bencher| {
            bencher.iter(|| {
                merge_into(out.view_mut(), lse.view_mut(), black_box(other_out.view()), other_lse.view())
            });
        });
        group.bench_function(format!("{name}/naive"), |bencher| {
            bencher.iter(|| {
                let keep: Array3<f32> = (&lse - black_box(&other_lse)).mapv(|x| 1.0 / (1.0 + (-x).exp()));
                let keep = keep.insert_axis(Axis(3));
                let lse = ndarray::Zip::from(&lse).and(&other_lse).map_collect(|a, b| {
                    let top = a.max(*b);
                    top + ((a - top).exp() + (b - top).exp()).ln()
                });
                (&out * &keep + &other_out * &(1.0 - &keep), lse)
            });
        });
    }
}

criterion_group!(benches, merge);
criterion_main!(benches);
