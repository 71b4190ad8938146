//! What sparse mechanisms keep of dense attention on the queries, keys and
//! values of a real model.

#[path = "../examples/support/fixture.rs"]
mod fixture;
#[path = "../examples/support/kept.rs"]
mod kept;

use attention_kernels::Qkv;
use attention_kernels::catalog::ENTRIES;
use half::f16;

/// Shares of the weights that each budget keeps at least, in the layer that
/// keeps least: a little below what was measured.
const FLOORS: [(&str, [f64; 3]); 14] = [
    ("top-k", [0.89, 0.965, 0.995]),
    ("Recycled Attention", [0.86, 0.955, 0.995]),
    ("TidalDecode", [0.89, 0.965, 0.995]),
    ("TokenSelect", [0.84, 0.95, 0.995]),
    ("Quest", [0.57, 0.77, 0.93]),
    ("HiP", [0.68, 0.84, 0.965]),
    ("InfLLM-V2", [0.33, 0.6, 0.885]),
    ("FlexPrefill", [0.66, 0.78, 0.91]),
    ("DSA", [0.83, 0.93, 0.95]),
    ("QSA", [0.6, 0.755, 0.9]),
    ("MSA", [0.33, 0.66, 0.89]),
    ("MoBA", [0.33, 0.62, 0.87]),
    ("S2-Attention", [0.56, 0.715, 0.86]),
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
                println!("{name}, layer {layer}, {budget}: {kept:.4?}");
                assert!(kept.mass >= floor, "{name}, layer {layer}: {kept:?}");
                assert!(kept.of_bound <= 1.0, "{name}, layer {layer}: {kept:?}");
            }
            assert!(curve.windows(2).all(|pair| pair[0].mass <= pair[1].mass), "{name}: {curve:?}");
            assert!(curve.windows(2).all(|pair| pair[0].error >= pair[1].error), "{name}: {curve:?}");
        }
    }
}

/// All of the catalogue but what the bound is not for, which is told with a reason.
#[test]
fn no_entry_is_forgotten() {
    let (q, k, v) = fixture::layer(14);
    let [q, k, v] = [q, k, v].map(|x| x.mapv(f16::to_f32));
    let x = Qkv::new(q.view(), k.view(), v.view());
    let (dense, mut lossy) = (kept::dense(x).unwrap(), 0);
    for entry in kept::subjects() {
        let kept = kept::of_entry(entry, x, &dense).unwrap();
        println!("{}: {kept:.4?}", entry.card.name);
        assert!(kept.of_bound <= 1.0 && kept.mass <= 1.0 + 1e-5, "{}: {kept:?}", entry.card.name);
        lossy += usize::from(kept.mass < 0.99 && kept.error > 1e-3);
    }
    assert!(lossy > 20, "{lossy} entries leave something out");
    for (name, why) in kept::APART {
        let entry = ENTRIES.iter().find(|entry| entry.card.name == name);
        assert!(entry.is_some_and(|entry| entry.card.family == "sparse") && !why.is_empty(), "{name}");
    }
}
