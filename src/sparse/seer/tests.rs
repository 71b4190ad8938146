use ndarray::Array4;

use super::*;
use crate::attention::{Attention, Selects};
use crate::dense::Dense;
use crate::sparse::testing::{Arrays, near};

fn weights(heads: usize, d: usize) -> Array3<f32> {
    Array3::from_shape_fn((heads, 3 * d, d), |(h, i, j)| {
        f32::from(i == 2 * d + j) + ((h * 7 + i * 3 + j * 5) % 11) as f32 / 100.0
    })
}

fn gated(x: &Arrays) -> Gated<'_, f32> {
    Gated { qkv: x.qkv(), q: x.q.view(), k: x.k.view() }
}

#[test]
fn a_threshold_below_0_is_dense() {
    let x = Arrays::normal([2, 4, 2, 136, 200, 24, 12], 1);
    let seer = SeerAttention::builder(weights(4, 24), -1.0).rope(Some(1e4)).last(0).build().unwrap();
    let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
    near("dense", &seer.forward(gated(&x)).unwrap(), &want);
}

#[test]
fn selections_are_the_definition_s_and_shrink_with_the_threshold() {
    for (sizes, rope) in [([2, 4, 2, 500, 500, 24, 12], true), ([1, 4, 2, 330, 458, 24, 12], false)] {
        let x = Arrays::normal(sizes, 2);
        let mut last = usize::MAX;
        for threshold in [0.0, 0.1, 0.15, 0.2, 0.5, 1.0] {
            let builder = SeerAttention::builder(weights(4, 24), threshold).last(1);
            let seer = if rope { builder.rope(Some(1e4)) } else { builder }.build().unwrap();
            let got = seer.select(gated(&x)).unwrap();
            let (want, margins) = seer.reference_select(gated(&x)).unwrap();
            let difference = <SeerAttention as Selects<Gated<'_, f32>>>::difference(&got, &want, &margins);
            assert_eq!(difference, None, "{threshold}");
            assert!(got.len() <= last);
            last = got.len();
            let (b, h) = (0, 3);
            let blocks = got.layout().blocks();
            let before = (sizes[4] - sizes[3]) / 64;
            assert!((0..blocks).all(|i| got.atoms(b, h, i).contains(&((before + i) as u32))), "diagonal");
            assert_eq!(got.atoms(b, h, blocks - 1).len(), before + blocks, "the last sees all");
        }
    }
}

/// Without rotation a gate does not know the order of tokens in a block.
#[test]
fn tokens_of_a_block_permute() {
    let x = Arrays::integers([1, 2, 1, 256, 256, 16, 8], 3);
    let order: Vec<usize> = (0..256).map(|i| i / 64 * 64 + (i % 64 * 5) % 64).collect();
    let pick = |x: &Array4<f32>| x.select(Axis(2), &order);
    let y = Arrays { q: pick(&x.q), k: pick(&x.k), v: pick(&x.v) };
    let seer = SeerAttention::builder(weights(2, 16), 0.2).last(0).build().unwrap();
    assert_eq!(seer.select(gated(&x)).unwrap(), seer.select(gated(&y)).unwrap());
}

#[test]
fn gated_caches_are_arrays() {
    let seer = SeerAttention::builder(weights(4, 24), 0.2).rope(Some(1e4)).last(0).build().unwrap();
    crate::sparse::testing::gated_caches_are_arrays(&seer, 64);
}

#[test]
fn refusals() {
    let refusal = |builder: SeerBuilder| builder.build().unwrap_err().to_string();
    assert!(refusal(SeerAttention::builder(weights(2, 16), 0.1).block(32)).starts_with("block: "));
    assert!(refusal(SeerAttention::builder(weights(2, 16), f32::NAN)).starts_with("threshold: "));
    assert!(refusal(SeerAttention::builder(weights(2, 16), 0.1).rope(Some(-1.0))).starts_with("rope: "));
    assert!(refusal(SeerAttention::builder(weights(2, 5), 0.1).rope(Some(1e4))).starts_with("weights: "));
    let seer = SeerAttention::builder(weights(2, 16), 0.1).build().unwrap();
    let refusal = |x: Gated<'_, f32>| seer.forward(x).unwrap_err().to_string();
    let x = Arrays::normal([1, 2, 1, 100, 190, 16, 8], 3);
    assert!(refusal(gated(&x)).starts_with("q: "));
    let x = Arrays::normal([1, 4, 1, 100, 100, 16, 8], 3);
    assert!(refusal(gated(&x)).starts_with("weights: "));
    let (x, y) = (Arrays::normal([1, 2, 1, 99, 99, 16, 8], 3), Arrays::normal([1, 2, 1, 98, 98, 16, 8], 3));
    assert!(refusal(Gated { k: y.k.view(), ..gated(&x) }).starts_with("gate k: "));
}
