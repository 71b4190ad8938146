use ndarray::{Array2, Array4, Axis};

use super::*;
use crate::attention::{Attention, Bounded, Mergeable, Weights};
use crate::dense::Dense;
use crate::mask::mask_fn;
use crate::score::score_fn;

fn noise(heads: usize, len: usize, dim: usize, seed: usize) -> Array4<f32> {
    Array4::from_shape_fn((2, heads, len, dim), |(b, h, i, c)| {
        let n: usize = ((b * 31 + h) * 1009 + i) * 257 + c + 7919 * seed;
        ((n.wrapping_mul(2_654_435_761) >> 7) % 2001) as f32 / 1000.0 - 1.0
    })
}

fn table(window: [usize; 2], heads: usize) -> Array2<f32> {
    let entries = (2 * window[0] - 1) * (2 * window[1] - 1);
    Array2::from_shape_fn((entries, heads), |(t, h)| (t as f32 * 0.7 + h as f32).sin())
}

fn near(what: &str, a: &Array4<f32>, b: &Array4<f32>) {
    assert_eq!(a.dim(), b.dim(), "{what}");
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-6, "{what}: {worst}");
}

#[test]
fn kernels_follow_the_definition() {
    let cases = [
        ([14, 21], [7, 7], [3, 3]),
        ([12, 10], [4, 5], [1, 0]),
        ([11, 9], [4, 4], [2, 2]),
        ([9, 30], [8, 7], [7, 3]),
        ([5, 5], [5, 5], [2, 4]),
        ([0, 7], [2, 7], [1, 0]),
    ];
    for (shape, window, shift) in cases {
        let len = shape[0] * shape[1];
        let (q, k, v) = (noise(4, len, 20, 1), noise(2, len, 20, 2), noise(2, len, 12, 3));
        let x = Qkv::new(q.view(), k.view(), v.view());
        let swin = Swin::builder(shape, window).shift(shift).padding(Padding::Hidden);
        for swin in [swin.clone(), swin.clone().bias(table(window, 4)), swin.bias(table(window, 1))] {
            let swin = swin.build().unwrap();
            let exact = swin.define(x).unwrap();
            let bound = swin.error_bound(x).unwrap();
            let (out, lse) = swin.forward_with_lse(x).unwrap();
            for ((b, h, i, c), out) in out.indexed_iter() {
                let off = (f64::from(*out) - exact.out[[b, h, i, c]]).abs();
                assert!(off <= bound[[b, h, i]], "{shape:?}: {off} at {i} over {}", bound[[b, h, i]]);
            }
            assert!(lse.iter().zip(&exact.lse).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));
            let weights = swin.weights(x).unwrap();
            assert_eq!(weights.mapv(|w| w > 0.0), exact.weights.mapv(|w| w > 0.0), "{shape:?}");
        }
    }
}

#[test]
fn one_window_is_dense_with_a_bias() {
    let (h, w) = (6, 11);
    let (q, k, v) = (noise(2, h * w, 16, 1), noise(2, h * w, 16, 2), noise(2, h * w, 16, 3));
    let x = Qkv::new(q.view(), k.view(), v.view());
    let table = table([h, w], 2);
    let bias = score_fn(|s, site, i, j| {
        let index = (i / w + h - 1 - j / w) * (2 * w - 1) + i % w + w - 1 - j % w;
        s + table[[index, site.head]]
    });
    let dense = Dense::builder().score(bias).build().unwrap().forward(x).unwrap();
    let swin = Swin::builder([h, w], [h, w]).bias(table.clone()).build().unwrap();
    near("one window", &swin.forward(x).unwrap(), &dense);
}

/// Rolled by hand, cut into windows, with the released mask of regions.
#[test]
fn a_shift_rolls_the_image() {
    let (h, w, m, shift) = (12, 8, 4, 1);
    let (q, k, v) = (noise(2, h * w, 16, 1), noise(2, h * w, 16, 2), noise(2, h * w, 16, 3));
    let rolled: Vec<usize> = (0..h * w).map(|i| (i / w + shift) % h * w + (i % w + shift) % w).collect();
    let [a, b, c] = [&q, &k, &v].map(|x| x.select(Axis(2), &rolled));
    let region = |at: usize, size: usize| {
        if at < size - m {
            0
        } else if at < size - shift {
            1
        } else {
            2
        }
    };
    let id = |i: usize| (i / w / m, i % w / m, region(i / w, h), region(i % w, w));
    let dense = Dense::builder().mask(mask_fn(|_, i, j| id(i) == id(j))).build().unwrap();
    let by_hand = dense.forward(Qkv::new(a.view(), b.view(), c.view())).unwrap();
    let swin = Swin::builder([h, w], [m, m]).shift([shift, shift]).build().unwrap();
    let out = swin.forward(Qkv::new(q.view(), k.view(), v.view())).unwrap();
    near("rolled", &out.select(Axis(2), &rolled), &by_hand);
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let refusal = |builder: SwinBuilder| builder.build().unwrap_err().to_string();
    let window = "window: expected a divisor of 14 pixels on axis 1, got 4";
    assert_eq!(refusal(Swin::builder([8, 14], [4, 4])), window);
    let large = Swin::builder([8, 14], [9, 7]).padding(Padding::Hidden);
    assert_eq!(refusal(large), "window: expected from 1 to 8 pixels on axis 0, got 9");
    assert!(refusal(Swin::builder([8, 14], [0, 7])).starts_with("window: expected a divisor of 8"));
    let shift = Swin::builder([8, 14], [4, 7]).shift([4, 0]);
    assert_eq!(refusal(shift), "shift: expected less than the window, 4, on axis 0, got 4");
    let bias = Swin::builder([8, 14], [4, 7]).bias(Array2::zeros((90, 2)));
    let shape =
        "bias: expected shape [(2 height - 1) (2 width - 1), heads] of windows of [4, 7], got [90, 2]";
    assert_eq!(refusal(bias), shape);
}
