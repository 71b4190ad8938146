use super::*;
use crate::attention::{Attention, Selects};
use crate::dense::Dense;
use crate::sparse::testing::{self, Arrays};

fn sale(threshold: f32) -> Sale {
    Sale::builder(vec![threshold; 4]).short(0).build().unwrap()
}

#[test]
fn no_threshold_is_dense() {
    for sizes in [[2, 4, 2, 400, 400, 24, 12], [1, 4, 2, 3, 300, 24, 12], [1, 4, 1, 70, 40, 24, 12]] {
        let x = Arrays::normal(sizes, 1);
        let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        testing::near("dense", &sale(0.0).forward(x.qkv()).unwrap(), &want);
    }
}

#[test]
fn higher_thresholds_take_tiles_away_down_to_first_and_last() {
    let x = Arrays::normal([2, 4, 2, 500, 500, 24, 12], 2);
    let found = [0.0, 2e-5, 0.02, 0.05, 0.1, 0.2, 1e9].map(|at| sale(at).select(x.qkv()).unwrap().len());
    assert!(found.is_sorted_by(|a, b| a >= b), "{found:?}");
    assert_eq!(found[0], found[1], "no weight is as small");
    assert!(found[0] > found[4] && found[4] > found[6], "{found:?}");
    // Tiles of 32 keys: of 14 for the queries to 448 the first, and 4 + 1 last ones.
    let index = sale(1e9).select(x.qkv()).unwrap();
    let runs: Vec<_> = index.runs(0, 0, 6).iter().map(|run| run.range()).collect();
    assert_eq!(runs, [0..32, 288..448]);
}

#[test]
fn refusals_and_short_sequences() {
    let refusal = Sale::builder(vec![f32::NAN]).build().unwrap_err().to_string();
    assert!(refusal.starts_with("thresholds: "));
    let x = Arrays::normal([1, 2, 2, 100, 100, 8, 8], 3);
    let refusal = sale(0.1).select(x.qkv()).unwrap_err().to_string();
    assert_eq!(refusal, "thresholds: expected one for each of 2 query heads, got 4 numbers");
    let x = Arrays::normal([1, 4, 2, 1024, 1024, 8, 8], 4);
    let short = Sale::builder(vec![1e9; 4]).build().unwrap();
    assert_eq!(short.select(x.qkv()).unwrap().keys(0, 0, 15), 1024);
}
