//! The fixture is what its README says.

#[path = "../examples/support/fixture.rs"]
mod fixture;

use half::f16;
use ndarray::Array4;

fn largest(x: &Array4<f16>) -> f32 {
    x.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max)
}

#[test]
fn the_fixture_has_three_layers_with_outliers() {
    for (layer, outlier) in fixture::LAYERS.into_iter().zip([10.125, 12.234_375, 18.046_875]) {
        let (q, k, v) = fixture::layer(layer);
        assert_eq!(q.dim(), (1, 3, 512, 64), "layer {layer}");
        assert_eq!(k.dim(), (1, 1, 512, 64), "layer {layer}");
        assert_eq!(v.dim(), (1, 1, 512, 64), "layer {layer}");
        assert!(q.iter().chain(&k).chain(&v).all(|x| x.is_finite()), "layer {layer}");
        assert_eq!(largest(&k), outlier, "largest key of layer {layer}");
    }
}

#[test]
fn the_first_token_is_a_sink() {
    let (q, k, _) = fixture::layer(27);
    // The share of the first token in the weights of the last, head 0.
    let score = |j: usize| {
        let dot: f64 = (0..64).map(|c| f64::from(q[[0, 0, 511, c]]) * f64::from(k[[0, 0, j, c]])).sum();
        (dot / 8.0).exp()
    };
    let share = score(0) / (0..512).map(score).sum::<f64>();
    assert!(share > 0.2, "{share}");
}
