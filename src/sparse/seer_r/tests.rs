use ndarray::s;

use super::*;
use crate::attention::{Attention, Selects};
use crate::dense::Dense;
use crate::sparse::testing::{Arrays, near};

fn seer(group: usize, d: usize) -> SeerAttentionRBuilder {
    let weights = |rows: usize| {
        Array3::from_shape_fn((2, rows, d), |(h, i, j)| {
            f32::from(i % d == j) + ((h * 7 + i * 3 + j * 5) % 11) as f32 / 100.0
        })
    };
    SeerAttentionR::builder(weights(group * d), weights(3 * d))
}

fn gated(x: &Arrays) -> Gated<'_, f32> {
    Gated { qkv: x.qkv(), q: x.q.view(), k: x.k.view() }
}

#[test]
fn all_blocks_are_dense() {
    for sizes in [[2, 4, 2, 136, 200, 24, 12], [1, 4, 2, 70, 40, 24, 12]] {
        let x = Arrays::normal(sizes, 1);
        let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        for seer in [seer(2, 24).threshold(Some(-1.0)), seer(2, 24).budget(256).rope(Some(1e4))] {
            near("dense", &seer.build().unwrap().forward(gated(&x)).unwrap(), &want);
        }
    }
}

#[test]
fn selections_are_the_definition_s_and_decoding_is_the_last_row() {
    let x = Arrays::normal([2, 4, 2, 320, 320, 24, 12], 2);
    let norms = || Some([0.5, 1.5].map(|x| Array1::from_elem(24, x)));
    let mut smaller = usize::MAX;
    for threshold in [Some(0.05), Some(0.2), Some(0.4), None] {
        let seer = seer(2, 24).threshold(threshold).budget(128).rope(Some(1e4)).norms(norms());
        let seer = seer.build().unwrap();
        let got = seer.select(gated(&x)).unwrap();
        let (want, margins) = seer.reference_select(gated(&x)).unwrap();
        let difference = <SeerAttentionR as Selects<Gated<'_, f32>>>::difference(&got, &want, &margins);
        assert_eq!(difference, None, "{threshold:?}");
        if threshold.is_some() {
            assert!(got.len() < smaller, "monotone");
            smaller = got.len();
        }
        let last = |n: usize| {
            let (q, k) = (x.q.slice(s![.., .., n - 1..n, ..]), x.k.slice(s![.., .., ..n, ..]));
            let qkv = crate::input::Qkv::new(q, k, x.v.slice(s![.., .., ..n, ..]));
            seer.select(Gated { qkv, q, k }).unwrap()
        };
        for n in [1, 64, 65, 300, 320] {
            assert_eq!(last(n).atoms(1, 3, 0), got.atoms(1, 3, n - 1), "{n}");
        }
    }
}

/// Weights of norms count whatever their strides.
#[test]
fn norms_of_any_strides() {
    let x = Arrays::normal([1, 4, 2, 320, 320, 24, 12], 3);
    let select = |turned: bool| {
        let norm = |by: f32| {
            let weights = Array1::from_shape_fn(24, |c| by * (c as f32 - 7.0));
            match turned {
                true => Array1::from(weights.slice(s![..;-1]).to_vec()).slice_move(s![..;-1]),
                false => weights,
            }
        };
        let seer = seer(2, 24).budget(128).norms(Some([0.5, 1.5].map(norm))).build().unwrap();
        seer.select(gated(&x)).unwrap()
    };
    assert!(select(true) == select(false));
    assert!(select(true) != seer(2, 24).budget(128).build().unwrap().select(gated(&x)).unwrap());
}

#[test]
fn gated_caches_are_arrays() {
    for threshold in [Some(0.3), None] {
        let seer = seer(2, 24).threshold(threshold).budget(64).rope(Some(1e4));
        crate::sparse::testing::gated_caches_are_arrays(&seer.build().unwrap(), 1);
    }
}

#[test]
fn refusals() {
    let refusal = |builder: SeerAttentionRBuilder| builder.build().unwrap_err().to_string();
    assert!(refusal(seer(2, 16).block(32)).starts_with("block: "));
    assert!(refusal(seer(2, 16).budget(63)).starts_with("budget: "));
    assert!(refusal(seer(2, 16).threshold(Some(f32::NAN))).starts_with("threshold: "));
    assert!(refusal(seer(2, 15).rope(Some(1e4))).starts_with("of_queries: "));
    assert!(refusal(seer(2, 16).norms(Some([Array1::ones(16), Array1::ones(3)]))).starts_with("norms: "));
    let x = Arrays::normal([1, 2, 1, 100, 190, 16, 8], 3);
    let seer = seer(2, 16).build().unwrap();
    assert!(seer.forward(gated(&x)).unwrap_err().to_string().starts_with("of_queries: "));
}
