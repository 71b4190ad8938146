use super::*;
use crate::cache::{Append, Cached, Contiguous, KvShape};
use crate::dense::Dense;
use crate::merge::merge;
use crate::testing::qkv::{Qkvs, error, held, refused};
use crate::{Attention, Mergeable};
use half::f16;
use ndarray::{Array2, Array4, Axis, array, s};

fn vhr(gains: &[f32]) -> Vhr {
    Vhr::builder(gains.to_vec()).build().unwrap()
}

const GAINS: [f32; 4] = [2.5, 1.0, -0.3, 0.0];

/// Few queries and many, each on its engine, over arrays and a cache.
#[test]
fn kernels_keep_to_the_definition() {
    for (q_len, kv_len) in [(1, 300), (1, 3000), (40, 5000), (60, 130), (70, 3)] {
        let x = Qkvs::new([2, 4, 2, q_len, kv_len, 12, 17], 1);
        let shape = KvShape { kv_heads: 2, head_dim: 12, value_dim: 17 };
        let mut cache = Contiguous::<f32>::new(shape, 2, kv_len).unwrap();
        cache.append_each(&[0, 1], x.k.view(), x.v.view()).unwrap();
        for gains in [GAINS, [1e30, 1e-30, 1.0, 3.0]] {
            held(&vhr(&gains), x.qkv());
            held(&vhr(&gains), Cached::new(x.q.view(), &cache));
        }
    }
}

#[test]
fn gains_are_factors_of_heads() {
    for (q_len, kv_len) in [(1, 300), (60, 130)] {
        let x = Qkvs::new([2, 4, 2, q_len, kv_len, 12, 17], 2);
        let plain = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        assert_eq!(vhr(&[1.0; 4]).forward(x.qkv()).unwrap(), plain);
        let want = Array4::from_shape_fn(plain.dim(), |(b, h, i, c)| GAINS[h] * plain[[b, h, i, c]]);
        assert_eq!(vhr(&GAINS).forward(x.qkv()).unwrap(), want);
        // Half outputs are rounded once.
        let [q, k, v] = [&x.q, &x.k, &x.v].map(|x| x.mapv(f16::from_f32));
        let x = || Qkv::new(q.view(), k.view(), v.view());
        let wide = vhr(&GAINS).forward(x().widened()).unwrap();
        assert_eq!(vhr(&GAINS).forward(x()).unwrap(), wide.mapv(f16::from_f32));
    }
}

/// Parts of keys that all queries see.
#[test]
fn parts_merge() {
    let x = Qkvs::new([1, 4, 2, 1, 300, 12, 17], 3);
    let part = |keys: std::ops::Range<usize>| {
        let part = x.slice(0..1, keys);
        vhr(&GAINS).forward_with_lse(part.qkv()).unwrap()
    };
    let ((a, a_lse), (b, b_lse)) = (part(0..100), part(100..300));
    let (merged, _) = merge((a.view(), a_lse.view()), (b.view(), b_lse.view())).unwrap();
    let whole = vhr(&GAINS).forward(x.qkv()).unwrap();
    assert!(merged.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn outliers_and_medians() {
    // Distances 1, 2, 3, 4, 20, of which the last is beyond 6 + 7.1; so is what its
    // output is without the image, or that of another head.
    let of = |loud: usize| {
        let without = Array2::from_shape_fn((5, 2), |(h, _)| if h == loud { 10.0f32 } else { 1.0 });
        let with = &without + &array![[1.0], [2.0], [3.0], [4.0], [20.0]] * &array![[1.0, 0.0]];
        vhd(with.view(), without.view()).unwrap()
    };
    assert_eq!(of(4), [1.0, 2.0, 3.0, 4.0, 0.0]);
    assert_eq!(of(1), [1.0, 2.0, 3.0, 4.0, 20.0]);
    assert_eq!(vision_aware_heads(&of(4)), [2, 3]);
    assert_eq!(vhr_gains(&of(1), 2.0), [1.0, 1.0, 1.0, 2.0, 2.0]);
    // The mean of the two in the middle is 1.5.
    assert_eq!(vision_aware_heads(&[1.5, 1.0, 2.0, 1.0, 1.5, 3.0][..4]), [0, 2]);
    assert_eq!(vision_aware_heads(&[1.0, 1.0]), [0usize; 0]);
    assert_eq!(vision_aware_heads(&[f32::NAN, 1.0, 0.0]), [0usize; 0]);
    assert!(vhr_gains(&[], 2.0).is_empty() && t_vhd(&[], 3) == 0.0);
    let layers = [of(4), of(1), vec![]];
    assert_eq!(t_vhd(&layers, 2), 4.0 + 3.0 + 20.0 + 4.0);
    assert_eq!(t_vhd(&layers, 100), 40.0);
}

#[test]
fn refusals() {
    let x = Qkvs::new([1, 2, 1, 3, 3, 8, 8], 8);
    let few = refused(&vhr(&GAINS), x.qkv());
    assert_eq!(few, "gains: expected one for each of the 2 query heads, got 4");
    let gains = error(Vhr::builder(vec![1.0, f32::INFINITY]).build());
    assert_eq!(gains, "gains: expected finite numbers, got inf");
    let heads = x.q.index_axis(Axis(0), 0);
    let with = heads.slice(s![.., 0, ..]);
    let refusal = error(vhd(with, with.slice(s![..1, ..])));
    assert_eq!(refusal, "without: expected shape [heads, value_dim] = [2, 8], got [1, 8]");
}
