use super::*;
use crate::dense::Dense;
use crate::testing::qkv::{Qkvs, close, error, held, refused};
use crate::{Attention, Bounded, Isa};
use ndarray::Array4;

pub(super) fn numbers(shape: (usize, usize, usize)) -> Array3<f32> {
    Array3::from_shape_fn(shape, |(h, d, c)| ((h * 31 + d * 7 + c * 3) as f32).sin())
}

#[test]
fn kernels_keep_to_the_definition() {
    let mut worst = 0f64;
    for ([q_len, kv_len], reach) in
        [([5, 5], 3), ([1, 300], 90), ([270, 310], 17), ([270, 310], 400), ([300, 280], 290), ([40, 3], 1)]
    {
        let x = Qkvs::new([2, 4, 2, q_len, kv_len, 20, 24], 2);
        let music = RelativePositions::builder(numbers((1, reach, 20)).view()).build().unwrap();
        let bias = numbers((1, 4, 20)).remove_axis(ndarray::Axis(0));
        let xl = RelativePositions::builder(numbers((4, reach, 20)).view())
            .content_bias(bias.view())
            .position_bias((&bias * 0.5).view())
            .build()
            .unwrap();
        worst = worst.max(held(&music, x.qkv())).max(held(&xl, x.qkv()));
        let shaw = RelativePositions::between(numbers((1, 2 * reach + 1, 20)).view());
        let causal = shaw.clone().causal().values(numbers((4, 2 * reach + 1, 24)).view());
        let both = shaw.clone().values(numbers((1, 2 * reach + 1, 24)).view());
        for shaw in [shaw, causal, both] {
            worst = worst.max(held(&shaw.build().unwrap(), x.qkv()));
        }
    }
    let x = Qkvs::new([1, 2, 1, 300, 300, 16, 8], 3);
    let offsets = [0, 70, 70, 75, 300];
    let music = RelativePositions::builder(numbers((2, 33, 16)).view());
    let shaw = RelativePositions::between(numbers((2, 33, 16)).view()).values(numbers((1, 33, 8)).view());
    for packed in [music, shaw] {
        held(&packed.build().unwrap(), x.qkv().packed(&offsets, &offsets));
    }
    println!("relative positions: {worst:.3} of the bound");
}

#[test]
fn tables_of_zeros_are_dense_attention_and_far_keys_share_the_furthest() {
    let x = Qkvs::new([1, 2, 2, 60, 60, 8, 6], 5);
    let of = |builder: RelativePositionsBuilder| builder.build().unwrap().reference(x.qkv()).unwrap();
    let dense = Dense::builder().causal().build().unwrap().reference(x.qkv()).unwrap();
    close(&of(RelativePositions::builder(Array3::zeros((1, 9, 8)).view())), &dense, 1e-12);
    let dense = Dense::builder().build().unwrap().reference(x.qkv()).unwrap();
    close(&of(RelativePositions::between(Array3::zeros((1, 9, 8)).view())), &dense, 1e-12);
    // Embeddings of values that are the same are one more vector.
    let same =
        RelativePositions::between(Array3::zeros((1, 9, 8)).view()).values(Array3::ones((1, 9, 6)).view());
    close(&of(same), &(dense + 1.0), 1e-12);
    // A table of which all before the last 9 are the same is that of these.
    let short = numbers((2, 9, 8));
    let long = Array3::from_shape_fn((2, 60, 8), |(h, d, c)| short[[h, d.saturating_sub(51), c]]);
    let long = RelativePositions::builder(long.view());
    close(&of(RelativePositions::builder(short.view())), &of(long.clone()), 0.0);
    // Those of both directions that hide later keys are those of earlier ones.
    let both = numbers((2, 17, 8));
    let earlier = RelativePositions::builder(both.slice(s![.., ..9, ..]));
    close(&of(RelativePositions::between(both.view()).causal()), &of(earlier), 0.0);
    // Earlier keys are a memory: queries of the second half see the first.
    let half = x.slice(30..60, 0..60);
    let out = long.clone().build().unwrap().reference(half.qkv()).unwrap();
    close(&out, &of(long).slice(s![.., .., 30.., ..]).to_owned(), 0.0);
}

/// Music Transformer's skewing of all queries times all distances.
#[test]
fn is_what_skewing_gives() {
    let x = Qkvs::new([1, 1, 1, 12, 12, 8, 6], 6);
    let table = numbers((1, 12, 8));
    let music = RelativePositions::builder(table.view()).build().unwrap();
    let rows = |x: &Array4<f32>| -> Array2<f64> { x.slice(s![0, 0, .., ..]).mapv(f64::from) };
    let (q, k, v) = (rows(&x.q), rows(&x.k), rows(&x.v));
    let table: Array2<f64> = table.slice(s![0, .., ..]).mapv(f64::from);
    let terms: Array2<f64> = q.dot(&table.t());
    // A column of zeros, rows as one, cut anew after the first 12.
    let mut padded = Array2::zeros((12, 13));
    padded.slice_mut(s![.., 1..]).assign(&terms);
    let skewed = padded.into_shape_with_order((13, 12)).unwrap().slice_move(s![1.., ..]);
    let scores: Array2<f64> = (q.dot(&k.t()) + skewed) / 8f64.sqrt();
    let out = music.reference(x.qkv()).unwrap();
    for i in 0..12 {
        let weights: Vec<f64> = (0..=i).map(|j| scores[[i, j]].exp()).collect();
        let total: f64 = weights.iter().sum();
        for c in 0..6 {
            let want = (0..=i).map(|j| weights[j] / total * v[[j, c]]).sum::<f64>();
            assert!((out[[0, 0, i, c]] - want).abs() < 1e-12);
        }
    }
    assert!(music.error_bound(x.qkv()).unwrap().iter().all(|x| x.is_finite()));
}

#[test]
fn refusals() {
    let x = Qkvs::new([1, 2, 1, 3, 3, 8, 8], 8);
    let of = |shape| RelativePositions::builder(numbers(shape).view());
    assert_eq!(
        error(of((1, 0, 8)).build()),
        "table: expected shape [q_heads | 1, reach, head_dim] with a reach of at least 1, got [1, 0, 8]"
    );
    assert_eq!(
        error(RelativePositions::between(numbers((1, 4, 8)).view()).build()),
        "table: expected shape [q_heads | 1, 2 reach + 1, head_dim], got [1, 4, 8]"
    );
    let refused = |builder: RelativePositionsBuilder| refused(&builder.build().unwrap(), x.qkv());
    assert_eq!(
        refused(of((3, 4, 8))),
        "table: expected shape [q_heads | 1, reach, head_dim] = [2 | 1, _, 8], got [3, 4, 8]"
    );
    assert_eq!(
        refused(of((1, 4, 8)).content_bias(Array2::zeros((1, 8)).view())),
        "content_bias: expected shape [q_heads, head_dim] = [2, 8], got [1, 8]"
    );
    assert_eq!(
        refused(of((1, 4, 8)).values(numbers((1, 5, 8)).view())),
        "values: expected shape [q_heads | 1, reach, value_dim] = [2 | 1, 4, 8], got [1, 5, 8]"
    );
}

/// Scores beyond the range of f32 hide no key: neither products with keys nor terms.
#[test]
fn what_overflows_stays_visible() {
    let far = |x: f32| Array3::from_elem((1, 9, 4), x);
    for (key, term) in [(-2.0, 0.1), (0.1, -2.0)] {
        let mut x = Qkvs::new([1, 1, 1, 6, 6, 4, 3], 7);
        x.q.slice_mut(s![.., .., 2, ..]).fill(3e38);
        x.k.fill(0.1);
        x.k.slice_mut(s![.., .., 1, ..]).fill(key);
        x.v[[0, 0, 1, 1]] = f32::NAN;
        let table = far(term);
        let shaw = RelativePositions::between(table.view());
        let values = shaw.clone().values(numbers((1, 9, 3)).view());
        for builder in [RelativePositions::builder(table.view()), shaw, values] {
            for isa in Isa::available() {
                let relative = builder.clone().isa(isa).build().unwrap();
                let (out, want) = (relative.forward(x.qkv()).unwrap(), relative.reference(x.qkv()).unwrap());
                assert!(want[[0, 0, 2, 1]].is_nan());
                let same = out.iter().zip(&want).all(|(out, want)| out.is_nan() == want.is_nan());
                assert!(same, "{isa}, keys of {key}, terms of {term}: {out} for {want}");
            }
        }
    }
}
