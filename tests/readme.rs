//! The README shows what the sources have. That its code runs is tested with
//! the docs.

const README: &str = include_str!("../README.md");

#[test]
fn the_quickstart_is_the_example() {
    let quickstart = concat!("```rust\n", include_str!("../examples/quickstart.rs"), "```\n");
    assert!(README.contains(quickstart));
}

#[test]
fn every_paper_of_the_catalogue_is_in_the_table() {
    // The text: to name the entries would be to compile every kernel.
    let catalogue =
        [include_str!("../src/catalog/dense.rs"), include_str!("../src/catalog/linear.rs")].concat();
    let sources: Vec<_> =
        catalogue.lines().filter(|line| line.contains("const SOURCE: &'static str = \"")).collect();
    assert!(sources.len() > 10);
    for source in sources {
        for paper in source.split([' ', ',', '"']).filter(|word| word.contains('.')) {
            assert!(
                README.contains(&format!("| [{paper}]")) || README.contains(&format!(", [{paper}]")),
                "{source}"
            );
        }
    }
}
