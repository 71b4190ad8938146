//! The README shows what the sources have. That its code runs is tested with
//! the docs.

use attention_kernels::catalog::ENTRIES;

const README: &str = include_str!("../README.md");

#[test]
fn the_quickstart_is_the_example() {
    let quickstart = concat!("```rust\n", include_str!("../examples/quickstart.rs"), "```\n");
    assert!(README.contains(quickstart));
}

#[test]
fn every_paper_of_the_catalogue_is_in_the_table() {
    for entry in ENTRIES {
        for paper in entry.card.source.split([' ', ',']).filter(|word| word.contains('.')) {
            let link = format!("[{paper}]");
            assert!(README.contains(&link), "{}: {paper}", entry.card.name);
        }
    }
}
