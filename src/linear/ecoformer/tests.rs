//! Tests of [`EcoFormer`].

use super::*;
use crate::math::random::Normal;
use crate::simd::Isa;
use crate::testing::qkv::{Qkvs, close, error, held, refused};
use crate::{Attention, Bounded, Recurrent};
use ndarray::{Array1, Array4};

const BITS: usize = 16;
const ANCHORS: usize = 25;
pub(super) const VARIANTS: [EcoFormerVariant; 2] = [EcoFormerVariant::Paper, EcoFormerVariant::Released];

fn builder(variant: EcoFormerVariant, heads: usize, dim: usize) -> EcoFormerBuilder {
    let mut normal = Normal::new(11);
    let mut next = || normal.next().unwrap() as f32;
    let anchors = Array3::from_shape_simple_fn((heads, ANCHORS, dim), || next() / (dim as f32).sqrt());
    let weights = Array3::from_shape_simple_fn((heads, BITS, ANCHORS), &mut next);
    let mean = Array2::from_shape_simple_fn((heads, ANCHORS), || 0.6 + 0.02 * next());
    EcoFormer::builder(anchors, weights, mean).variant(variant)
}

#[test]
fn kernels_keep_to_the_definition() {
    for variant in VARIANTS {
        let mut worst = 0f64;
        // Sums in the first and in the last column of a panel, and alone in one.
        for (len, value_dim) in [(0, 3), (1, 15), (9, 16), (70, 31), (65, 32), (197, 63), (197, 64), (197, 0)]
        {
            let x = Qkvs::new([2, 4, 2, len, len, 16, value_dim], 1);
            for isa in Isa::available() {
                let make = || builder(variant, 4, 16).isa(isa);
                worst = worst.max(held(&make().build().unwrap(), x.qkv()));
                worst = worst.max(held(&make().causal().variance(1.9).build().unwrap(), x.qkv()));
            }
        }
        // Sequences each with their own variance and number of keys.
        let x = Qkvs::new([1, 2, 1, 300, 300, 33, 8], 2);
        let offsets = [0, 0, 5, 130, 300];
        let of = |builder: EcoFormerBuilder| builder.build().unwrap();
        worst = worst.max(held(&of(builder(variant, 2, 33)), x.qkv().packed(&offsets, &offsets)));
        println!("{variant:?}: {worst:.3} of the bound");
    }
    let paper = builder(EcoFormerVariant::Paper, 2, 33).build().unwrap();
    for (keys, ends) in [(200, [0, 5, 5, 200]), (450, [0, 350, 350, 450])] {
        let x = Qkvs::new([1, 2, 1, 300, keys, 33, 8], 2);
        held(&paper, x.qkv().packed(&[0, 0, 100, 300], &ends));
    }
    held(&paper, Qkvs::new([2, 2, 2, 7, 90, 33, 8], 2).qkv().key_lengths(&[40, 90]));
}

#[test]
fn weights_count_equal_bits() {
    let x = Qkvs::new([1, 2, 2, 30, 30, 8, 5], 3);
    for (causal, variant) in [false, true].into_iter().flat_map(|c| VARIANTS.map(|v| (c, v))) {
        let make = || builder(variant, 2, 8);
        let EcoFormerBuilder { anchors, weights, mean, .. } = make();
        let ecoformer = if causal { make().causal().variance(1.7) } else { make() };
        let out = ecoformer.build().unwrap().reference(x.qkv()).unwrap();
        let mut want = Array4::<f64>::zeros(out.dim());
        for h in 0..2 {
            // All distances, one by one.
            let distances = |x: &Array4<f32>| {
                Array2::from_shape_fn((30, ANCHORS), |(t, r)| {
                    let row: Array1<f64> = x.slice(s![0, h, t, ..]).mapv(f64::from);
                    let norm = row.dot(&row).sqrt();
                    (0..8).map(|c| (row[c] / norm - f64::from(anchors[[h, r, c]])).powi(2)).sum::<f64>()
                })
            };
            let variance = if causal { f64::from(1.7f32) } else { distances(&x.k).mean().unwrap() };
            let codes = |x: &Array4<f32>| -> Vec<u32> {
                let kappa = distances(x).mapv(|d| (-d / (2.0 * variance)).exp());
                let bit = |t: usize, b: usize| {
                    let off = |r| kappa[[t, r]] - f64::from(mean[[h, r]]);
                    let sum: f64 = (0..ANCHORS).map(|r| f64::from(weights[[h, b, r]]) * off(r)).sum();
                    u32::from(sum > 0.0) << b
                };
                (0..30).map(|t| (0..BITS).map(|b| bit(t, b)).sum()).collect()
            };
            let (q, k) = (codes(&x.q), codes(&x.k));
            for (i, c) in (0..30).flat_map(|i| (0..5).map(move |c| (i, c))) {
                let keys = if causal { i + 1 } else { 30 };
                let weight = |j: usize| f64::from(2 * BITS as u32 + 1 - 2 * (q[i] ^ k[j]).count_ones());
                // The released code gives what every key has to the query's own.
                let of_value = |j: usize| match variant {
                    EcoFormerVariant::Released if j != i => weight(j) - (BITS as f64 + 1.0),
                    _ => weight(j),
                };
                let sum: f64 = (0..keys).map(|j| of_value(j) * f64::from(x.v[[0, h, j, c]])).sum();
                want[[0, h, i, c]] = sum / (0..keys).map(weight).sum::<f64>();
            }
        }
        close(&out, &want, 1e-12);
    }
}

#[test]
fn codes_depend_on_directions_alone() {
    let x = Qkvs::new([1, 2, 2, 40, 40, 8, 5], 4);
    let longer = Qkvs { q: &x.q * 8.0, k: &x.k * 0.25, v: x.v.clone() };
    let [paper, released] = VARIANTS.map(|variant| builder(variant, 2, 8).build().unwrap());
    assert_eq!(paper.forward(x.qkv()).unwrap(), paper.forward(longer.qkv()).unwrap());
    // Tokens that are all the same get the mean of the values, and zeros
    // are as good as others; as released, of all equal bits, and their own.
    for fill in [0.0, 1.5] {
        let same = Qkvs { q: &x.q * 0.0 + fill, k: &x.k * 0.0 + fill, v: x.v.clone() };
        let outs = [&paper, &released].map(|of| of.forward(same.qkv()).unwrap());
        for ((_, h, t, c), v) in x.v.indexed_iter() {
            let (mean, bits) = (x.v.slice(s![0, h, .., c]).mean().unwrap(), BITS as f32);
            assert!((outs[0][[0, h, t, c]] - mean).abs() < 1e-6);
            let want = (bits * mean + (bits + 1.0) * v / 40.0) / (2.0 * bits + 1.0);
            assert!((outs[1][[0, h, t, c]] - want).abs() < 1e-6);
        }
    }
    // A NaN in one of the elements is in no direction.
    let mut x = Qkvs::new([1, 1, 1, 70, 70, 8, 5], 5);
    x.k[[0, 0, 66, 2]] = f32::NAN;
    for variant in VARIANTS {
        let causal = builder(variant, 1, 8).causal().variance(1.9).build().unwrap();
        for ((_, _, t, _), x) in causal.forward(x.qkv()).unwrap().indexed_iter() {
            assert_eq!(x.is_nan(), t >= 66, "token {t}");
        }
    }
}

#[test]
fn released_counts_the_keys_of_earlier_calls() {
    let x = Qkvs::new([1, 2, 1, 150, 150, 16, 8], 10);
    let ecoformer = builder(EcoFormerVariant::Released, 2, 16).variance(1.9).build().unwrap();
    let mut state = ecoformer.initial_state(x.qkv()).unwrap();
    ecoformer.prefill(x.slice(0..70, 0..70).qkv(), &mut state).unwrap();
    // A state can be saved. Later queries see all keys, as in one call.
    let mut state = State::new(state.into_inner()).unwrap();
    let out = ecoformer.prefill(x.slice(70..150, 70..150).qkv(), &mut state).unwrap();
    let (want, bound) = (ecoformer.reference(x.qkv()).unwrap(), ecoformer.error_bound(x.qkv()).unwrap());
    for ((b, h, t, c), &got) in out.indexed_iter() {
        assert!((f64::from(got) - want[[b, h, 70 + t, c]]).abs() <= bound[[b, h, 70 + t]], "token {t}");
    }
    assert_eq!(state.view()[[0, 1, BITS, 8]], 150.0);
}

#[test]
fn refusals() {
    let [paper, released] = VARIANTS.map(|variant| move |heads| builder(variant, heads, 8));
    assert_eq!(
        error(paper(1).causal().build()),
        "causal cannot be combined with a variance from the keys: the variance of later keys would change the codes of earlier ones"
    );
    let expected = "variance: expected a finite number of at least 0, got -1";
    assert_eq!(error(paper(1).variance(-1.0).build()), expected);
    let odd = EcoFormerBuilder { mean: Array2::zeros((2, 24)), ..paper(2) };
    assert_eq!(error(odd.build()), "mean: expected shape [heads, anchors] = [2, 25], got [2, 24]");
    let x = Qkvs::new([1, 1, 1, 3, 3, 8, 5], 7);
    let expected = "anchors: expected shape [heads, anchors, head_dim] = [1, _, 8], got [2, 25, 8]";
    assert_eq!(refused(&paper(2).build().unwrap(), x.qkv()), expected);
    // Queries without values of their own.
    let (released, fewer) = (released(1).build().unwrap(), Qkvs::new([1, 1, 1, 2, 3, 8, 5], 7));
    for (x, expected) in [
        (
            fewer.qkv(),
            "k: expected shape [batch, heads, len, head_dim] = [1, 1 or a divisor, 2, 8], got [1, 1, 3, 8]",
        ),
        (
            x.qkv().key_lengths(&[2]),
            "key_lengths cannot be combined with a recurrence: queries and keys are the same tokens, which padded shortens",
        ),
        (
            x.qkv().packed(&[0, 1, 3], &[0, 2, 3]),
            "keys: expected the offsets of the queries, which are the same tokens, got [0, 2, 3]",
        ),
    ] {
        assert_eq!(refused(&released, x), expected);
    }
}
