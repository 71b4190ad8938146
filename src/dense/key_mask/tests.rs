use super::*;
use crate::Attention;
use crate::cache::{Append, Cached, Contiguous, KvShape};
use crate::dense::Dense;
use crate::mask::mask_fn;
use crate::testing::qkv::{Qkvs, close, held, refused};
use ndarray::{Array4, array, s};

/// The masks of two sequences: numbers, and blocks of keys.
fn masks(len: usize) -> [Array2<f32>; 2] {
    let some = |(b, j): (usize, usize)| (((b + 3 * j) % 5) as f32 / 2.0 - 0.5).clamp(0.0, 1.0);
    let block = |(b, j): (usize, usize)| f32::from((64 * b..64 * b + 70).contains(&j));
    [Array2::from_shape_fn((2, len), some), Array2::from_shape_fn((2, len), block)]
}

fn both() -> [KeyMask; 2] {
    [KeyMask::builder(), KeyMask::builder().exclude()].map(|builder| builder.build().unwrap())
}

#[test]
fn kernels_keep_to_the_definition() {
    for (q_len, kv_len) in [(1, 300), (60, 130), (70, 3)] {
        let x = Qkvs::new([2, 4, 2, q_len, kv_len, 12, 17], 1);
        let shape = KvShape { kv_heads: 2, head_dim: 12, value_dim: 17 };
        let mut cache = Contiguous::<f32>::new(shape, 2, kv_len).unwrap();
        cache.append_each(&[0, 1], x.k.view(), x.v.view()).unwrap();
        for (mask, masked) in masks(kv_len).iter().flat_map(|mask| both().map(|masked| (mask, masked))) {
            held(&masked, WithKeyMask { x: x.qkv(), mask: mask.view() });
            held(&masked, WithKeyMask { x: Cached::new(x.q.view(), &cache), mask: mask.view() });
            let lengths = [kv_len.min(2), kv_len];
            held(&masked, WithKeyMask { x: x.qkv().key_lengths(&lengths), mask: mask.view() });
            let turned = mask.t().as_standard_layout().into_owned();
            held(&masked, WithKeyMask { x: x.qkv(), mask: turned.t() });
        }
    }
}

#[test]
fn keys_are_scaled_or_hidden() {
    let x = Qkvs::new([2, 2, 1, 20, 130, 12, 17], 2);
    let dense = Dense::builder().build().unwrap();
    for mask in masks(130) {
        let [zero, exclude] =
            both().map(|masked| masked.reference(WithKeyMask { x: x.qkv(), mask: mask.view() }).unwrap());
        // Exact factors, so that keys are not rounded.
        let mut scaled = x.clone();
        for ((b, _, j, _), k) in scaled.k.indexed_iter_mut() {
            *k *= 1.0 - mask[[b, j]];
        }
        close(&zero, &dense.reference(scaled.qkv()).unwrap(), 1e-12);
        for b in 0..2 {
            let of = |x: &Array4<f32>| x.slice(s![b..=b, .., .., ..]).to_owned();
            let (q, k, v) = (of(&x.q), of(&x.k), of(&x.v));
            let seen = mask_fn(|_, _, j| mask[[b, j]] == 0.0);
            let want = Dense::builder().mask(seen).build().unwrap();
            let want = want.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
            close(&exclude.slice(s![b..=b, .., .., ..]).to_owned(), &want, 1e-12);
        }
    }
}

#[test]
fn nothing_and_everything_removed() {
    let x = Qkvs::new([1, 2, 2, 20, 70, 12, 17], 3);
    let of = |masked: &KeyMask, m: f32| {
        let mask = Array2::from_elem((1, 70), m);
        masked.forward(WithKeyMask { x: x.qkv(), mask: mask.view() }).unwrap().mapv(f64::from)
    };
    let [zero, exclude] = both();
    let plain = Dense::builder().build().unwrap().forward(x.qkv()).unwrap().mapv(f64::from);
    assert_eq!(of(&exclude, 0.0), plain);
    close(&of(&zero, 0.0), &plain, 1e-6);
    assert_eq!(of(&exclude, 1.0), &plain * 0.0);
    let mean = x.v.mapv(f64::from).mean_axis(ndarray::Axis(2)).unwrap().insert_axis(ndarray::Axis(2));
    close(&of(&zero, 1.0), &mean.broadcast(plain.dim()).unwrap().to_owned(), 1e-6);
}

#[test]
fn masks_of_other_sizes() {
    let mask = array![[[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]];
    let same: Vec<f32> = mask.iter().copied().collect();
    assert_eq!(resized_mask(mask.view(), [2, 3]).unwrap().into_raw_vec_and_offset().0, same);
    // Half as wide: between the first two pixels at 1 / 4, and the last two at 3 / 4.
    assert_eq!(resized_mask(mask.view(), [1, 2]).unwrap(), array![[0.5, 0.5]]);
    assert_eq!(resized_mask(mask.view(), [2, 2]).unwrap(), array![[0.25, 0.625, 0.75, 0.375]]);
    assert_eq!(resized_mask(mask.slice(s![.., ..0, ..]), [1, 2]).unwrap(), array![[0.0, 0.0]]);
    assert_eq!(resized_mask(mask.view(), [0, 2]).unwrap().dim(), (1, 0));
}

#[test]
fn refusals() {
    let x = Qkvs::new([1, 2, 1, 3, 3, 8, 8], 8);
    let [zero, _] = both();
    for (mask, got) in [(f32::NAN, "NaN"), (-0.5, "-0.5"), (1.5, "1.5")] {
        let mask = array![[0.0, mask, 1.0]];
        let message = refused(&zero, WithKeyMask { x: x.qkv(), mask: mask.view() });
        assert_eq!(message, format!("mask: expected a number from 0 to 1, got {got}"));
    }
    let short = refused(&zero, WithKeyMask { x: x.qkv(), mask: array![[0.0]].view() });
    assert_eq!(short, "mask: expected shape [batch, kv_len] = [1, 3], got [1, 1]");
}
