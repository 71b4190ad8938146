use ndarray::{Array4, ArrayView1, s};

use super::*;
use crate::attention::{Attention, Selects};
use crate::dense::Dense;
use crate::score::Bias;
use crate::sparse::testing::{self, Arrays};
use crate::stages::selecting::Listing;

/// For the sizes of the tests' inputs.
fn dma(slope: f32) -> DynamicMaskBuilder {
    let weights = Array2::from_shape_fn((24, 2), |(i, h)| ((i * 7 + h * 3) % 11) as f32 / 8.0 - 0.5);
    DynamicMask::builder(Array1::from_elem(2, slope), weights)
}

#[test]
fn identities() {
    let some = dma(0.5).keep(20).build().unwrap();
    testing::chunks_are_the_whole(&some);
    testing::last_row_is_decoding(&some);
    testing::never_ahead(&some);
    testing::heads_permute(&dma(0.0).keep(20).build().unwrap());
}

/// With all keys it is dense attention with a bias a key.
#[test]
fn all_keys_are_dense_with_a_bias() {
    let x = Arrays::normal([2, 4, 2, 150, 200, 24, 12], 1);
    for exponential in [false, true] {
        let dma = dma(-0.5).keep(200).exponential(exponential).build().unwrap();
        let index = dma.select(x.qkv()).unwrap();
        let (want, _) = dma.reference_select(x.qkv()).unwrap();
        let mut bias = Array4::zeros((2, 4, 1, 200));
        for (b, h) in (0..2).flat_map(|b| (0..4).map(move |h| (b, h))) {
            let (got, want) = (index.bias(b, h / 2), want.bias(b, h / 2));
            assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + b.abs())));
            bias.slice_mut(s![b, h, 0, ..]).assign(&ArrayView1::from(got));
        }
        let dense = Dense::builder().causal().score(Bias::new(bias.view())).build().unwrap();
        testing::near("bias", &dma.forward(x.qkv()).unwrap(), &dense.forward(x.qkv()).unwrap());
    }
}

fn agrees(dma: &DynamicMask, x: &Arrays) -> DynamicKeys {
    let got = dma.select(x.qkv()).unwrap();
    let (want, margins) = dma.reference_select(x.qkv()).unwrap();
    assert_eq!(<DynamicMask as Selects<Qkv<'_, f32>>>::difference(&got, &want, &margins), None);
    got
}

#[test]
fn what_is_seen_changes_by_a_key_a_query() {
    let x = Arrays::normal([1, 4, 2, 200, 200, 24, 12], 2);
    let each = agrees(&dma(0.5).keep(30).build().unwrap(), &x);
    let keys = |index: &DynamicKeys, t: usize| -> Vec<usize> {
        index.list(0, 3, t).into_iter().map(|range| range.start).collect()
    };
    for t in 0..199 {
        let (before, after) = (keys(&each, t), keys(&each, t + 1));
        assert_eq!(after.len(), (t + 2).min(30));
        assert!(after.iter().all(|j| before.contains(j) || *j == t + 1));
    }
    let shared = agrees(&dma(0.5).keep(30).shared(true).build().unwrap(), &x);
    assert_eq!(keys(&shared, 199), keys(&each, 199));
    assert!(keys(&shared, 100).len() < 30);
    // Biases of 0: the oldest, or the newest.
    let ties = |ties| agrees(&dma(0.0).keep(30).ties(ties).build().unwrap(), &x);
    assert_eq!(keys(&ties(Ties::Oldest), 150), (0..30).collect::<Vec<_>>());
    assert_eq!(keys(&ties(Ties::Newest), 150), (121..151).collect::<Vec<_>>());
    assert_eq!(keys(&agrees(&dma(1.0).positive(true).build().unwrap(), &x), 150).len(), 151);
    let none = dma(-1.0).positive(true).build().unwrap();
    assert!(none.forward(x.qkv()).unwrap().iter().all(|&x| x == 0.0));
}

#[test]
fn refusals() {
    let refusal = |builder: DynamicMaskBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(refusal(dma(1.0).keep(0)), "keep: expected at least 1, got 0");
    assert!(refusal(dma(1.0).offsets(Some(Array1::ones(3)))).starts_with("offsets: "));
    assert!(refusal(DynamicMask::builder(Array1::ones(3), Array2::ones((24, 2)))).starts_with("weights: "));
    let x = Arrays::normal([1, 4, 2, 20, 20, 24, 8], 3);
    assert!(dma(1.0).build().unwrap().forward(x.qkv()).unwrap_err().to_string().starts_with("weights: "));
}
