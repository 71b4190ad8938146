//! Formats of few bits, and the caches that forget or quantise what is old.

use half::f16;
use ndarray::{Array3, Array4, Axis, s};
use proptest::prelude::*;

use super::tests::{Stored, int4, q4_0, q8_0, read, rotated, rounded};
use super::*;
use crate::attention::Attention;
use crate::dense::Dense;
use crate::mask::Window;
use crate::math::random::Normal;
use crate::math::rope::{Pairs, Rope};
use crate::simd::Isa;
use crate::testing::qkv::held;

fn noise(seed: u64, dim: (usize, usize, usize)) -> Array3<f32> {
    let mut normal = Normal::new(seed);
    Array3::from_shape_simple_fn(dim, || normal.next().unwrap() as f32)
}

/// Everything a cache has of a sequence, as bits.
fn bits(cache: &dyn Cache, sequence: usize) -> Vec<u32> {
    let heads = 0..cache.shape().kv_heads;
    let len = cache.lengths()[sequence];
    // Some codes know no -0.
    heads
        .flat_map(|head| read(cache, Isa::Scalar, sequence, head, 0..len))
        .flatten()
        .map(|x| (x + 0.0).to_bits())
        .collect()
}

/// Rows of many sizes and values as plain Rust stores them, on every
/// instruction set, as keys and as values and as the first columns of a latent.
fn stores<F: Format>(stored: [Stored; 2]) {
    for cols in [0, 1, 2, 5, 31, 32, 33, 48, 64, 80, 96, 100, 128, 130, 256] {
        let mut x = noise(cols as u64, (1, 12, cols));
        for (i, size) in [0.0, 1e-42, 1e-20, 1.0, 1e4].into_iter().enumerate() {
            x.slice_mut(s![0, i, ..]).mapv_inplace(|x| x * size);
        }
        if cols > 2 {
            x.slice_mut(s![0, 5, ..]).fill(3.25);
            x[[0, 6, cols / 2]] = 400.0;
            x[[0, 7, 1]] = f32::NAN;
            x[[0, 8, cols - 1]] = f32::NEG_INFINITY;
            (x[[0, 9, 0]], x[[0, 9, 2]]) = (7.0, -7.0);
            (x[[0, 10, 0]], x[[0, 10, 2]]) = (-7.0, 7.0);
        }
        let shape = KvShape { kv_heads: 1, head_dim: cols, value_dim: cols };
        let mut cache = Contiguous::<F>::new(shape, 1, 12).unwrap();
        cache.append(0, x.view(), x.view()).unwrap();
        let same = |got: &[f32], want: &[f32], what: &str| {
            for (c, (got, want)) in got.iter().zip(want).enumerate() {
                let same = (got + 0.0).to_bits() == (want + 0.0).to_bits() || got.is_nan() && want.is_nan();
                assert!(same, "{what}, {cols} columns: element {c} is {got:e}, not {want:e}");
            }
        };
        for isa in Isa::available() {
            let got = read(&cache, isa, 0, 0, 0..12);
            for (side, got) in got.iter().enumerate() {
                for t in 0..12 {
                    let want = stored[side](&x.slice(s![0, t, ..]).to_vec());
                    same(&got[t * cols..(t + 1) * cols], &want, &format!("{isa}, side {side}, row {t}"));
                }
            }
        }
        let rope = cols / 3;
        let mut latent = Latent::contiguous::<F>(cols - rope, rope, 1, 12).unwrap();
        latent.append(0, x.index_axis(Axis(0), 0)).unwrap();
        for isa in Isa::available() {
            let [k, v] = read(&latent, isa, 0, 0, 0..12);
            for t in 0..12 {
                same(&v[t * (cols - rope)..(t + 1) * (cols - rope)], &k[t * cols..], "latent");
            }
        }
    }
}

#[test]
fn formats_are_what_plain_rust_says() {
    // GGML's groups pass NaN on by themselves; plain Rust above does not.
    fn with_nan(plain: fn(&[f32]) -> Vec<f32>, row: &[f32]) -> Vec<f32> {
        let group = |x: &[f32]| {
            if x.iter().all(|x| x.is_finite()) { plain(x) } else { vec![f32::NAN; x.len()] }
        };
        row.chunks(32).flat_map(group).collect()
    }
    stores::<Int4>([int4; 2]);
    stores::<Q4_0>([|row| with_nan(q4_0, row); 2]);
    stores::<Q8_0>([|row| with_nan(q8_0, row); 2]);
    stores::<Rotated<2>>([rotated::<2, true>, rotated::<2, false>]);
    stores::<Rotated<3>>([rotated::<3, true>, rotated::<3, false>]);
    stores::<Rotated<4>>([rotated::<4, true>, rotated::<4, false>]);
    stores::<f16>([rounded::<f16>; 2]);
}

/// Root mean squared errors on normal numbers, as they are known of each code,
/// and less on rows with an outlier where rows are rotated.
#[test]
fn errors_are_those_of_the_codes() {
    fn error<F: Format>(x: &Array3<f32>) -> f64 {
        let shape = KvShape { kv_heads: 1, head_dim: 128, value_dim: 128 };
        let mut cache = Contiguous::<F>::new(shape, 1, 400).unwrap();
        cache.append(0, x.view(), x.view()).unwrap();
        let [_, got] = read(&cache, Isa::available().last().unwrap(), 0, 0, 0..400);
        let off = got.iter().zip(x).map(|(got, x)| f64::from(got - x).powi(2)).sum::<f64>();
        (off / x.len() as f64).sqrt()
    }
    let x = noise(1, (1, 400, 128));
    let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.03, "{got} for {want}");
    near(error::<Q8_0>(&x), 0.0053);
    near(error::<Q4_0>(&x), 0.086);
    near(error::<Rotated<2>>(&x), 0.117_5f64.sqrt());
    near(error::<Rotated<3>>(&x), 0.034_55f64.sqrt());
    near(error::<Rotated<4>>(&x), 0.009_50f64.sqrt());
    let mut outliers = x.clone();
    outliers.slice_mut(s![.., .., 7]).mapv_inplace(|x| 10.0 * x);
    assert!(error::<Rotated<4>>(&outliers) < 0.6 * error::<Int4>(&outliers));
}

/// The dot product of a key with what it became is its own square.
#[test]
fn rotated_keys_are_unbiased() {
    let (x, shape) = (noise(2, (1, 20, 96)), KvShape { kv_heads: 1, head_dim: 96, value_dim: 96 });
    let mut cache = Contiguous::<Rotated<2>>::new(shape, 1, 20).unwrap();
    cache.append(0, x.view(), x.view()).unwrap();
    let [k, v] = read(&cache, Isa::Scalar, 0, 0, 0..20);
    for (t, x) in x.index_axis(Axis(0), 0).outer_iter().enumerate() {
        let dot = |row: &[f32]| x.iter().zip(row).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let square = x.iter().map(|x| f64::from(x * x)).sum::<f64>();
        assert!((dot(&k[96 * t..96 * (t + 1)]) / square - 1.0).abs() < 1e-5);
        assert!(dot(&v[96 * t..96 * (t + 1)]) < 0.97 * square);
    }
}

/// Prefill and decode of dense attention over a cache keep to the definition
/// over what the cache holds.
fn attends<C: Cache>(cache: &C, what: &str) {
    let KvShape { kv_heads, head_dim, .. } = cache.shape();
    let sequences = cache.lengths().len();
    for (queries, group) in [(1, 1), (1, 4), (30, 2)] {
        let mut normal = Normal::new(9);
        let mut next = || normal.next().unwrap() as f32;
        let q = Array4::from_shape_simple_fn((sequences, group * kv_heads, queries, head_dim), &mut next);
        for isa in Isa::available() {
            let dense = Dense::builder().mask(Window::new(Some(90), Some(0))).isa(isa).build().unwrap();
            let worst = held(&dense, Cached::new(q.view(), cache));
            assert!(worst <= 1.0, "{what} {isa}");
        }
    }
}

#[test]
fn attention_reads_every_cache() {
    let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 32 };
    let (k, v) = (noise(3, (2, 200, 64)), noise(4, (2, 200, 32)));
    fn filled<C: Append>(mut cache: C, k: &Array3<f32>, v: &Array3<f32>) -> C {
        cache.append(0, k.view(), v.view()).unwrap();
        cache.append(1, k.slice(s![.., ..37, ..]), v.slice(s![.., ..37, ..])).unwrap();
        cache
    }
    let paged = Pages { count: 40, len: 16 };
    attends(&filled(Contiguous::<Int4>::new(shape, 2, 200).unwrap(), &k, &v), "int4");
    attends(&filled(Paged::<Q8_0, Q4_0>::new(shape, 2, paged).unwrap(), &k, &v), "paged, mixed");
    attends(&filled(Contiguous::<f16, Rotated<2>>::new(shape, 2, 200).unwrap(), &k, &v), "f16, rotated");
    attends(&filled(Paged::<Rotated<3>>::new(shape, 2, paged).unwrap(), &k, &v), "paged, rotated");
    attends(&filled(Ring::<f32>::new(shape, 2, 4, 70).unwrap(), &k, &v), "ring");
    attends(&filled(Ring::<f16, Int8>::new(shape, 2, 0, 100).unwrap(), &k, &v), "ring, mixed");
    let rope = Rope::builder(32).pairs(Pairs::Neighbours).build().unwrap();
    attends(&filled(Ring::<f16>::new(shape, 2, 4, 70).unwrap().with_rope(&rope).unwrap(), &k, &v), "turned");
    let ring = Ring::<f32>::new(shape, 2, 4, 70).unwrap().compensated().unwrap();
    attends(&filled(ring, &k, &v), "compensated");
    attends(&filled(Kivi::<2>::new(shape, 2, 200, 32).unwrap(), &k, &v), "KIVI");
    attends(&filled(Kivi::<4, f32>::new(shape, 2, 200, 64).unwrap(), &k, &v), "KIVI, 4 bits");
    let mut kept = filled(Compacted::<f32>::new(shape, 2, 200).unwrap(), &k, &v);
    let lists = ndarray::Array2::from_shape_fn((2, 60), |(head, i)| 3 * i + head);
    kept.keep(0, lists.view()).unwrap();
    attends(&kept, "compacted");
}

/// Pieces of a history of 150 tokens.
fn pieces() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0..60usize, 0..12)
}

/// The same tokens at once and in pieces.
fn in_pieces<C: Append + Clone>(empty: &C, pieces: &[usize]) -> [C; 2] {
    let KvShape { kv_heads, head_dim, value_dim } = empty.shape();
    let n: usize = pieces.iter().sum();
    let (k, v) = (noise(5, (kv_heads, n, head_dim)), noise(6, (kv_heads, n, value_dim)));
    let (mut once, mut parts) = (empty.clone(), empty.clone());
    once.append(1, k.view(), v.view()).unwrap();
    let mut done = 0;
    for piece in pieces {
        let at = done..done + piece;
        parts.append(1, k.slice(s![.., at.clone(), ..]), v.slice(s![.., at.clone(), ..])).unwrap();
        done = at.end;
    }
    [once, parts]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn pieces_give_the_same_bits(pieces in pieces(), sinks in 0..6usize, recent in 1..80usize) {
        let shape = KvShape { kv_heads: 2, head_dim: 10, value_dim: 32 };
        let [a, b] = in_pieces(&Kivi::<2>::new(shape, 2, 720, 32).unwrap(), &pieces);
        prop_assert_eq!(bits(&a, 1), bits(&b, 1));
        let [a, b] = in_pieces(&Contiguous::<Int4, Rotated<2>>::new(shape, 2, 720).unwrap(), &pieces);
        prop_assert_eq!(bits(&a, 1), bits(&b, 1));
        let [a, b] = in_pieces(&Ring::<f16>::new(shape, 2, sinks, recent).unwrap(), &pieces);
        prop_assert_eq!(bits(&a, 1), bits(&b, 1));
        // A ring is the first and the last of a cache of everything.
        let [all, _] = in_pieces(&Contiguous::<f16>::new(shape, 2, 720).unwrap(), &pieces);
        let n = all.lengths()[1];
        let kept: Vec<usize> = (0..n).filter(|&t| t < sinks || t + recent >= n).collect();
        prop_assert_eq!(a.lengths()[1], kept.len());
        prop_assert_eq!(a.seen(1).unwrap(), n);
        for head in 0..2 {
            let want: Vec<[Vec<f32>; 2]> =
                kept.iter().map(|&t| read(&all, Isa::Scalar, 1, head, t..t + 1)).collect();
            for (isa, from) in Isa::available().flat_map(|isa| [(isa, 0), (isa, kept.len() / 3)]) {
                let [k, v] = read(&a, isa, 1, head, from..kept.len());
                prop_assert_eq!(k, want[from..].iter().flat_map(|x| x[0].clone()).collect::<Vec<_>>());
                prop_assert_eq!(v, want[from..].iter().flat_map(|x| x[1].clone()).collect::<Vec<_>>());
            }
        }
    }
}

/// StreamingLLM: rows that were not rotated, turned to their places in the
/// cache, are those that a rotation of the kept ones gives.
#[test]
fn a_ring_turns_keys_to_their_places() {
    let shape = KvShape { kv_heads: 2, head_dim: 12, value_dim: 3 };
    let (k, v) = (noise(7, (2, 40, 12)), noise(8, (2, 40, 3)));
    for pairs in [Pairs::Halves, Pairs::Neighbours] {
        let rope = |isa| Rope::builder(8).pairs(pairs).theta(100.0).isa(isa).build().unwrap();
        let ring = Ring::<f32>::new(shape, 1, 3, 10).unwrap();
        let mut cache = ring.with_rope(&rope(Isa::Scalar)).unwrap();
        cache.append(0, k.view(), v.view()).unwrap();
        let kept: Vec<usize> = (0..3).chain(30..40).collect();
        for (isa, head) in Isa::available().flat_map(|isa| [(isa, 0), (isa, 1)]) {
            let mut want = k.select(Axis(1), &kept).insert_axis(Axis(0));
            rope(isa).rotate(want.view_mut(), &(0..13).collect::<Vec<_>>()).unwrap();
            let [k, _] = read(&cache, isa, 0, head, 2..12);
            assert_eq!(k, want.slice(s![0, head, 2..12, ..]).iter().copied().collect::<Vec<_>>());
        }
    }
    let wide = Rope::builder(14).build().unwrap();
    let refused = Ring::<f32>::new(shape, 1, 3, 10).unwrap().with_rope(&wide).unwrap_err().to_string();
    assert_eq!(refused, "rope: expected a rotation of at most the 12 elements of a key, got 14");
}

/// RazorAttention: dropped tokens count as many times their mean; equal ones are
/// all that they were, and none drop nothing.
#[test]
fn a_compensated_ring_stands_for_what_it_dropped() {
    let shape = KvShape { kv_heads: 2, head_dim: 12, value_dim: 5 };
    let (mut k, mut v) = (noise(7, (2, 60, 12)), noise(8, (2, 60, 5)));
    let ring = || Ring::<f32>::new(shape, 2, 3, 20).unwrap().compensated().unwrap();
    let q = noise(9, (4, 1, 12)).insert_axis(Axis(0));
    let dense = Dense::builder().build().unwrap();
    // Against plain sums.
    let mut cache = ring();
    cache.append(1, k.view(), v.view()).unwrap();
    let out = dense.forward(Cached::new(q.view(), &cache).sequences(&[1])).unwrap();
    for ((_, h, _, c), got) in out.indexed_iter() {
        let dot = |key: &dyn Fn(usize) -> f64| {
            (0..12).map(|c| f64::from(q[[0, h, 0, c]]) * key(c)).sum::<f64>() / 12f64.sqrt()
        };
        let mean =
            |x: &Array3<f32>, c: usize| (3..40).map(|t| f64::from(x[[h / 2, t, c]])).sum::<f64>() / 37.0;
        let summary = 37.0 * dot(&|c| mean(&k, c)).exp();
        let (mut sum, mut value) = (summary, summary * mean(&v, c));
        for t in (0..3).chain(40..60) {
            let weight = dot(&|c| f64::from(k[[h / 2, t, c]])).exp();
            (sum, value) = (sum + weight, value + weight * f64::from(v[[h / 2, t, c]]));
        }
        assert!((f64::from(*got) - value / sum).abs() < 1e-5, "{got} for {}", value / sum);
    }
    // In pieces, and forked.
    let mut parts = ring();
    for at in [0..1, 1..2, 2..30, 30..60] {
        parts.append(0, k.slice(s![.., at.clone(), ..]), v.slice(s![.., at, ..])).unwrap();
    }
    parts.fork(0, 1).unwrap();
    assert_eq!(dense.forward(Cached::new(q.view(), &parts).sequences(&[1])).unwrap(), out);
    // Equal tokens.
    for x in [&mut k, &mut v] {
        let one = x.slice(s![.., 5..6, ..]).to_owned();
        x.slice_mut(s![.., 3..40, ..]).assign(&one);
    }
    let mut cache = ring();
    cache.append(0, k.view(), v.view()).unwrap();
    let mut all = Contiguous::<f32>::new(shape, 1, 60).unwrap();
    all.append(0, k.view(), v.view()).unwrap();
    let got = dense.forward(Cached::new(q.view(), &cache).sequences(&[0])).unwrap();
    let want = dense.forward(Cached::new(q.view(), &all)).unwrap();
    assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-5));
    // What forgets all forgets the means; where none drop, there are none.
    cache.truncate(0, 0).unwrap();
    cache.append(0, k.slice(s![.., ..23, ..]), v.slice(s![.., ..23, ..])).unwrap();
    let mut few = Contiguous::<f32>::new(shape, 1, 60).unwrap();
    few.append(0, k.slice(s![.., ..23, ..]), v.slice(s![.., ..23, ..])).unwrap();
    let got = dense.forward(Cached::new(q.view(), &cache).sequences(&[0])).unwrap();
    let want = dense.forward(Cached::new(q.view(), &few)).unwrap();
    assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-6));
    // A selection has no place for it.
    let top = crate::sparse::TopK::builder(4).build().unwrap();
    let text = top.forward(Cached::new(q.view(), &cache).sequences(&[0])).unwrap_err().to_string();
    assert!(text.starts_with("a compensated cache cannot be combined"), "{text}");
    let rope = Rope::builder(4).build().unwrap();
    assert!(ring().with_rope(&rope).is_err());
}

/// Groups of keys and of values in `f64`, from the paper.
#[test]
fn kivi_is_what_the_paper_says() {
    let shape = KvShape { kv_heads: 2, head_dim: 20, value_dim: 64 };
    let mut k = noise(1, (2, 150, 20));
    let v = noise(2, (2, 150, 64));
    k.slice_mut(s![.., .., 3]).mapv_inplace(|x| 50.0 + 9.0 * x);
    k.slice_mut(s![.., 32..64, 5]).fill(0.3);
    k[[1, 40, 2]] = f32::NAN;
    let mut cache = Kivi::<2, f32>::new(shape, 2, 150, 32).unwrap();
    cache.append(1, k.view(), v.view()).unwrap();
    assert_eq!(cache.quantised(1).unwrap(), [128, 118]);
    let coded = |x: &[f32], at: usize| {
        if x.iter().any(|x| x.is_nan()) {
            return (f64::NAN, 0.0);
        }
        let (min, max) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
        let [min, step] = [min, (max - min) / 3.0].map(|x| f16::from_f32(x).to_f64());
        let code = ((f64::from(x[at]) - min) / step).round_ties_even().clamp(0.0, 3.0);
        // Halfway between two codes the other one is as good.
        let doubt = ((f64::from(x[at]) - min) / step).fract() - 0.5;
        (if step == 0.0 { min } else { code * step + min }, if doubt.abs() < 1e-4 { step } else { 0.0 })
    };
    for (isa, head) in Isa::available().flat_map(|isa| [(isa, 0), (isa, 1)]) {
        let [got_k, got_v] = read(&cache, isa, 1, head, 0..150);
        for t in 0..150 {
            for c in 0..20 {
                let (got, x) = (f64::from(got_k[20 * t + c]), k[[head, t, c]]);
                let group = k.slice(s![head, t / 32 * 32..(t / 32 * 32 + 32).min(150), c]).to_vec();
                let (want, doubt) = if t < 128 { coded(&group, t % 32) } else { (f64::from(x), 0.0) };
                let near = (got - want).abs() <= doubt + 1e-5 * want.abs().max(1.0);
                assert!(near || got.is_nan() && want.is_nan(), "key {t} {c}: {got} for {want}");
            }
            for c in 0..64 {
                let got = f64::from(got_v[64 * t + c]);
                let group = v.slice(s![head, t, c / 32 * 32..c / 32 * 32 + 32]).to_vec();
                let (want, doubt) =
                    if t < 118 { coded(&group, c % 32) } else { (f64::from(v[[head, t, c]]), 0.0) };
                assert!((got - want).abs() <= doubt + 1e-5, "value {t} {c}: {got} for {want}");
            }
        }
    }
    cache.fork(1, 0).unwrap();
    assert_eq!(bits(&cache, 0).len(), bits(&cache, 1).len());
    let (a, b) = (read(&cache, Isa::Scalar, 0, 0, 0..150), read(&cache, Isa::Scalar, 1, 0, 0..150));
    assert_eq!(a, b);
}

#[test]
fn a_kivi_cache_takes_a_fifth_of_f16() {
    let shape = KvShape { kv_heads: 8, head_dim: 128, value_dim: 128 };
    let (kivi, plain) = (Kivi::<2>::new(shape, 1, 16_384, 128), Contiguous::<f16>::new(shape, 1, 16_384));
    assert!(5 * kivi.unwrap().bytes() <= plain.unwrap().bytes());
}

#[test]
fn what_is_full_or_forgotten_is_refused_and_changes_nothing() {
    let shape = KvShape { kv_heads: 1, head_dim: 4, value_dim: 32 };
    let (k, v) = (noise(1, (1, 70, 4)), noise(2, (1, 70, 32)));
    let mut kivi = Kivi::<2>::new(shape, 2, 100, 32).unwrap();
    kivi.append(0, k.view(), v.view()).unwrap();
    let before = format!("{kivi:?}");
    let text = kivi.append(0, k.view(), v.view()).unwrap_err().to_string();
    assert_eq!(text, "k: expected at most the 30 tokens that sequence 0 has room for, got 70 tokens");
    let text = kivi.truncate(0, 69).unwrap_err().to_string();
    assert_eq!(text, "len: expected 0 or 70: tokens of the sequence have been quantised, got 69");
    assert!(
        kivi.fork(2, 0).is_err() && kivi.quantised(2).is_err() && kivi.append(0, v.view(), k.view()).is_err()
    );
    assert_eq!(format!("{kivi:?}"), before);
    kivi.truncate(0, 0).unwrap();
    kivi.append(0, k.slice(s![.., ..20, ..]), v.slice(s![.., ..20, ..])).unwrap();
    kivi.truncate(0, 11).unwrap();
    assert_eq!(kivi.lengths(), [11, 0]);
    let refusal = |result: Result<Kivi<2>>| result.unwrap_err().to_string();
    assert!(refusal(Kivi::new(shape, 1, 9, 48)).starts_with("residual: expected a multiple of 32 tokens"));
    assert!(refusal(Kivi::new(KvShape { value_dim: 20, ..shape }, 1, 9, 32)).starts_with("value_dim: "));
    assert!(refusal(Kivi::new(shape, 1, usize::MAX / 2, 32)).starts_with("capacity: "));
    assert!(Kivi::<3>::new(shape, 1, 9, 32).unwrap_err().to_string().starts_with("BITS: expected 2, 4 or 8"));

    let mut ring = Ring::<f32>::new(shape, 2, 2, 10).unwrap();
    ring.append(0, k.view(), v.view()).unwrap();
    let before = format!("{ring:?}");
    let text = ring.truncate(0, 11).unwrap_err().to_string();
    assert_eq!(text, "len: expected 0 or 12: tokens of the sequence have been forgotten, got 11");
    assert!(
        ring.append_each(
            &[0, 0],
            Array4::<f32>::zeros((2, 1, 1, 4)).view(),
            Array4::zeros((2, 1, 1, 32)).view()
        )
        .is_err()
    );
    assert_eq!(format!("{ring:?}"), before);
    ring.fork(0, 1).unwrap();
    assert_eq!(bits(&ring, 0), bits(&ring, 1));
    ring.truncate(0, 0).unwrap();
    ring.append(0, k.slice(s![.., ..9, ..]), v.slice(s![.., ..9, ..])).unwrap();
    ring.truncate(0, 5).unwrap();
    assert_eq!((ring.lengths(), ring.seen(0).unwrap()), (&[5, 12][..], 5));
    assert!(Ring::<f32>::new(shape, 1, 2, 0).is_err() && Ring::<f32>::new(shape, 1, usize::MAX, 3).is_err());

    let mut kept = Compacted::<f32>::new(shape, 2, 70).unwrap();
    kept.append(0, k.view(), v.view()).unwrap();
    let before = format!("{kept:?}");
    let refusal = |kept: &mut Compacted, list: &[usize]| {
        let list = ndarray::Array2::from_shape_vec((1, list.len()), list.to_vec()).unwrap();
        kept.keep(0, list.view()).unwrap_err().to_string()
    };
    assert_eq!(refusal(&mut kept, &[3, 3]), "kept: expected ascending tokens, got 3 after 3");
    assert_eq!(refusal(&mut kept, &[3, 70]), "kept: expected tokens below 70, got 70");
    assert!(kept.keep(0, ndarray::Array2::zeros((2, 1)).view()).is_err());
    assert!(kept.append(0, k.view(), v.view()).is_err() && kept.positions(0, 1).is_err());
    assert_eq!(format!("{kept:?}"), before);
    kept.keep(0, ndarray::array![[1, 5, 69]].view()).unwrap();
    let [got, _] = read(&kept, Isa::Scalar, 0, 0, 0..3);
    let want: Vec<f32> = [1, 5, 69].into_iter().flat_map(|t| k.slice(s![0, t, ..]).to_vec()).collect();
    assert_eq!(got, want);
    kept.fork(0, 1).unwrap();
    kept.append(0, k.slice(s![.., ..2, ..]), v.slice(s![.., ..2, ..])).unwrap();
    assert_eq!(kept.positions(0, 0).unwrap(), [1, 5, 69, 70, 71]);
    kept.truncate(0, 4).unwrap();
    kept.append(0, k.slice(s![.., ..1, ..]), v.slice(s![.., ..1, ..])).unwrap();
    assert_eq!(
        (kept.positions(0, 0).unwrap(), kept.positions(1, 0).unwrap()),
        (&[1, 5, 69, 70, 71][..], &[1, 5, 69][..])
    );
}
