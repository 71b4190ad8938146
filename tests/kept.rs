//! What sparse mechanisms keep of dense attention on the queries, keys and
//! values of a real model.

#[path = "../examples/support/fixture.rs"]
mod fixture;
#[path = "../examples/support/kept.rs"]
mod kept;

use attention_kernels::Qkv;
use half::f16;

/// Shares of the weights that each budget keeps at least, in the layer that
/// keeps least: a little below what was measured.
const FLOORS: [(&str, [f64; 3]); 4] = [
    ("top-k", [0.89, 0.965, 0.995]),
    ("Quest", [0.57, 0.77, 0.93]),
    ("MoBA", [0.33, 0.62, 0.87]),
    ("MoA", [0.65, 0.79, 0.92]),
];

#[test]
fn kept_weights_bound_the_error() {
    for (mechanism, (name, floors)) in kept::MECHANISMS.into_iter().zip(FLOORS) {
        assert_eq!(mechanism.0, name);
        for layer in fixture::LAYERS {
            let (q, k, v) = fixture::layer(layer);
            let [q, k, v] = [q, k, v].map(|x| x.mapv(f16::to_f32));
            let curve = kept::curve(mechanism, Qkv::new(q.view(), k.view(), v.view())).unwrap();
            for ((kept, budget), floor) in curve.iter().zip(kept::BUDGETS).zip(floors) {
                assert_eq!(kept.budget, budget);
                println!("{name}, layer {layer}: {kept:.4?}");
                assert!(kept.mass >= floor, "{name}, layer {layer}: {kept:?}");
                assert!(kept.of_bound <= 1.0, "{name}, layer {layer}: {kept:?}");
            }
            assert!(curve.windows(2).all(|pair| pair[0].mass <= pair[1].mass), "{name}: {curve:?}");
            assert!(curve.windows(2).all(|pair| pair[0].error >= pair[1].error), "{name}: {curve:?}");
        }
    }
}
