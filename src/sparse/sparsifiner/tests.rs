use super::*;
use crate::attention::{Attention, Selects};
use crate::dense::Dense;
use crate::sparse::testing::{Arrays, near};

fn array(rows: usize, cols: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, cols), |(i, j)| ((i * 7 + j * 13) % 17) as f32 / 8.0 - 1.0)
}

fn sparsifiner() -> SparsifinerBuilder {
    Sparsifiner::builder([array(25, 12), array(25, 12)], [array(100, 12), array(100, 12)])
}

fn agrees(sparsifiner: &Sparsifiner, x: &Arrays) -> TokenLists {
    let got = sparsifiner.select(x.qkv()).unwrap();
    let (want, margins) = sparsifiner.reference_select(x.qkv()).unwrap();
    assert_eq!(<Sparsifiner as Selects<Qkv<'_, f32>>>::difference(&got, &want, &margins), None);
    got
}

#[test]
fn all_keys_are_dense_and_fewer_are_the_definition_s() {
    let x = Arrays::normal([2, 4, 2, 100, 100, 24, 12], 1);
    let want = Dense::builder().build().unwrap().forward(x.qkv()).unwrap();
    near("dense", &sparsifiner().rate(1.0).build().unwrap().forward(x.qkv()).unwrap(), &want);
    for (rate, directions, least) in [(0.1, 8, 0.0), (0.25, 3, 0.5), (0.5, 12, 0.9)] {
        let some = sparsifiner().rate(rate).directions(directions).least(least).build().unwrap();
        let index = agrees(&some, &x);
        assert_eq!(index.keys(1, 2, 0), 100, "the class token");
        assert!((1..100).all(|i| index.keys(1, 2, i) == (100.0 * rate).ceil() as usize));
    }
    let none = sparsifiner().least(9.0).build().unwrap();
    assert_eq!(none.select(x.qkv()).unwrap().runs(0, 0, 7)[0].range(), 0..25, "equal entries");
}

/// With the identity for bases it is the exact choice of a cheap attention.
#[test]
fn identity_bases_give_the_top_of_the_cheap_attention() {
    let x = Arrays::integers([1, 2, 1, 40, 40, 8, 8], 2);
    let weights = Array2::from_shape_fn((9, 8), |(i, j)| f32::from(i == j));
    let builder = Sparsifiner::builder([weights.clone(), weights], [Array2::eye(40), Array2::eye(40)]);
    let index = agrees(&builder.directions(40).class(0).build().unwrap(), &x);
    for i in 0..40 {
        let dot = |j: usize| (0..8).map(|c| x.q[[0, 1, i, c]] * x.k[[0, 0, j, c]]).sum::<f32>();
        let mut keys: Vec<usize> = (0..40).collect();
        keys.sort_by(|&a, &b| dot(b).total_cmp(&dot(a)).then(a.cmp(&b)));
        let mut want = keys[..10].to_vec();
        want.sort_unstable();
        let got: Vec<usize> = index.runs(0, 1, i).iter().flat_map(|run| run.range()).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn refusals() {
    let refusal = |builder: SparsifinerBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(refusal(sparsifiner().rate(1.5)), "rate: expected a share from 0 to 1, got 1.5");
    let bases = [array(100, 12), array(100, 3)];
    assert!(refusal(Sparsifiner::builder([array(25, 12), array(25, 12)], bases)).starts_with("bases: "));
    let sparsifiner = sparsifiner().build().unwrap();
    let refusal = |sizes| sparsifiner.forward(Arrays::normal(sizes, 3).qkv()).unwrap_err().to_string();
    assert!(refusal([1, 2, 1, 99, 100, 24, 8]).starts_with("q: "));
    assert!(refusal([1, 2, 1, 100, 100, 16, 8]).starts_with("weights: "));
}
