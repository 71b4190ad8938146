use super::*;
use crate::attention::Selects;
use crate::sparse::testing::{self, Arrays};

fn hip(budget: usize) -> HipBuilder {
    Hip::builder(budget).q_block(16).window(32).sink(4)
}

#[test]
fn identities() {
    testing::all_keys_are_dense(&hip(300).build().unwrap(), true);
    testing::kept_mass_bounds_the_error(&hip(16).build().unwrap(), true);
    let one = hip(16).q_block(1).build().unwrap();
    testing::chunks_are_the_whole(&one);
    testing::last_row_is_decoding(&one);
    testing::never_ahead(&one);
    for representative in [Representative::First, Representative::Center] {
        let blocks = hip(16).representative(representative).build().unwrap();
        testing::exact_scores_give_equal_lists(&blocks);
        // Blocks of queries begin with the call.
        testing::caches_are_arrays(&hip(16).representative(representative).q_block(1).build().unwrap());
        testing::heads_permute(&blocks);
    }
}

/// Where products rise with the position the last blocks are the best.
#[test]
fn rising_products_give_the_exact_choice() {
    let mut x = Arrays::integers([1, 1, 1, 500, 500, 8, 8], 1);
    x.q.fill(1.0);
    x.k.indexed_iter_mut().for_each(|((_, _, j, _), k)| *k = j as f32);
    let index = hip(32).build().unwrap().select(x.qkv()).unwrap();
    let keys: Vec<usize> = index.runs(0, 0, 31).iter().flat_map(|run| run.range()).collect();
    assert_eq!(keys, (0..4).chain(436..500).collect::<Vec<_>>());
}

#[test]
fn every_list_has_its_budget_and_queries_may_be_scaled() {
    let mut x = Arrays::integers([1, 2, 1, 600, 600, 16, 8], 2);
    let hip = hip(40).build().unwrap();
    let index = hip.select(x.qkv()).unwrap();
    for (block, queries) in (0..600).step_by(16).enumerate() {
        let end = (queries + 16).min(600);
        assert_eq!(index.keys(0, 1, block), if end <= 4 + 40 + 32 { end } else { 4 + 40 + 32 });
    }
    x.q *= 4.0;
    assert_eq!(hip.select(x.qkv()).unwrap(), index);
}

#[test]
fn refusals() {
    let refusal = |builder: HipBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(refusal(Hip::builder(0)), "budget: expected at least 1, got 0");
    assert_eq!(refusal(Hip::builder(8).block(65)), "block: expected 1 to 64 keys, got 65");
    assert_eq!(refusal(Hip::builder(8).window(63)), "window: expected at least 64 keys, got 63");
}
