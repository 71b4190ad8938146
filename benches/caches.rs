//! One query over a long cache of every layout and format, against the same
//! over arrays. Two sequences are taken in turns, so that no cache of the
//! processor serves them.

use std::hint::black_box;
use std::time::Duration;

use attention_kernels::cache::{
    Append, Cache, Cached, Contiguous, Format, Int4, Int8, Kivi, KvShape, Paged, Pages, Q4_0, Q8_0, Rotated,
};
use attention_kernels::dense::Dense;
use attention_kernels::{Attention, Qkv, Result, Workspace};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main};
use half::{bf16, f16};
use ndarray::{Array3, Array4, Axis, s};

#[path = "../examples/support/noise.rs"]
mod noise;

const KEYS: usize = 16_384;
const SHAPE: KvShape = KvShape { kv_heads: 8, head_dim: 128, value_dim: 128 };
const PAGE: usize = 16;

/// Keys and values of a sequence.
type Tokens = [Array3<f32>; 2];

fn contiguous<F: Format>(tokens: &Tokens) -> Result<Contiguous<F>> {
    let mut cache = Contiguous::new(SHAPE, 2, KEYS)?;
    for sequence in 0..2 {
        cache.append(sequence, tokens[0].view(), tokens[1].view())?;
    }
    Ok(cache)
}

/// Pages of both sequences in turn: no two of one follow each other.
fn paged<F: Format>(tokens: &Tokens) -> Result<Paged<F>> {
    let mut cache = Paged::new(SHAPE, 2, Pages { count: 2 * KEYS / PAGE, len: PAGE })?;
    for first in (0..KEYS).step_by(PAGE) {
        let [k, v] = tokens.each_ref().map(|x| x.slice(s![.., first..first + PAGE, ..]));
        for sequence in 0..2 {
            cache.append(sequence, k, v)?;
        }
    }
    Ok(cache)
}

fn decode(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    q: &Array4<f32>,
    cache: &dyn Cache,
) -> Result<()> {
    let dense = Dense::builder().build()?;
    let mut out = Array4::zeros((1, 32, 1, SHAPE.value_dim));
    let mut workspace = Workspace::new();
    let mut turn = 0;
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            turn = 1 - turn;
            let sequence = [turn];
            let x = Cached::new(q.view(), cache).sequences(&sequence);
            dense.forward_into(black_box(x), out.view_mut(), &mut workspace)
        });
    });
    Ok(())
}

fn all(group: &mut BenchmarkGroup<'_, WallTime>) -> Result<()> {
    let dim = (SHAPE.kv_heads, KEYS, SHAPE.head_dim);
    let tokens = [1, 2].map(|seed| Array3::from_shape_simple_fn(dim, noise::noise(seed)));
    let q = Array4::from_shape_simple_fn((1, 32, 1, SHAPE.head_dim), noise::noise(3));
    let arrays = vec![tokens.clone().map(|x| x.insert_axis(Axis(0))); 2];
    let dense = Dense::builder().build()?;
    let mut out = Array4::zeros((1, 32, 1, SHAPE.value_dim));
    let mut workspace = Workspace::new();
    let mut turns = arrays.iter().cycle();
    group.bench_function("arrays/f32", |bencher| {
        bencher.iter(|| {
            let [k, v] = turns.next().unwrap_or(&arrays[0]);
            let x = Qkv::new(q.view(), k.view(), v.view());
            dense.forward_into(black_box(x), out.view_mut(), &mut workspace)
        });
    });
    decode(group, "contiguous/f32", &q, &contiguous::<f32>(&tokens)?)?;
    decode(group, "contiguous/f16", &q, &contiguous::<f16>(&tokens)?)?;
    decode(group, "contiguous/bf16", &q, &contiguous::<bf16>(&tokens)?)?;
    decode(group, "contiguous/int8", &q, &contiguous::<Int8>(&tokens)?)?;
    decode(group, "contiguous/int4", &q, &contiguous::<Int4>(&tokens)?)?;
    decode(group, "contiguous/q8_0", &q, &contiguous::<Q8_0>(&tokens)?)?;
    decode(group, "contiguous/q4_0", &q, &contiguous::<Q4_0>(&tokens)?)?;
    decode(group, "contiguous/rotated 4", &q, &contiguous::<Rotated<4>>(&tokens)?)?;
    decode(group, "contiguous/rotated 3", &q, &contiguous::<Rotated<3>>(&tokens)?)?;
    let mut kivi = Kivi::<2>::new(SHAPE, 2, KEYS, 128)?;
    for sequence in 0..2 {
        kivi.append(sequence, tokens[0].view(), tokens[1].view())?;
    }
    decode(group, "KIVI", &q, &kivi)?;
    decode(group, "paged/f32", &q, &paged::<f32>(&tokens)?)?;
    decode(group, "paged/bf16", &q, &paged::<bf16>(&tokens)?)?;
    decode(group, "paged/int8", &q, &paged::<Int8>(&tokens)?)
}

fn caches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("caches");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    all(&mut group).expect("standard sizes are valid");
}

criterion_group!(benches, caches);
criterion_main!(benches);
