//! The README shows what the sources have. That its code runs is tested with
//! the docs.

use std::collections::BTreeSet;
use std::fmt::Write;

use attention_kernels::catalog::ENTRIES;

const README: &str = include_str!("../README.md");

#[test]
fn the_quickstart_is_the_example() {
    let quickstart = concat!("```rust\n", include_str!("../examples/quickstart.rs"), "```\n");
    assert!(README.contains(quickstart));
}

/// The papers of a source by their numbers, and what else it says.
fn papers(source: &str) -> (Vec<&str>, Vec<&str>) {
    source.split(", ").map(|part| part.trim_start_matches("arXiv ")).partition(|part| {
        part.split_once('.').is_some_and(|(a, b)| a.len() == 4 && b.bytes().all(|c| c.is_ascii_digit()))
    })
}

/// The table of mechanisms, from their cards.
fn table() -> String {
    let mut table = String::from("| mechanism | what it does | pairs | source |\n|---|---|---|---|\n");
    let mut family = "";
    for entry in ENTRIES {
        let card = entry.card;
        if card.family != family {
            family = card.family;
            writeln!(table, "| **{family}** | | | |").unwrap();
        }
        let (numbers, others) = papers(card.source);
        let links = numbers.iter().map(|number| format!("[{number}]"));
        let sources: Vec<_> = links.chain(others.iter().map(ToString::to_string)).collect();
        let pairs = entry.patterns().unwrap();
        writeln!(table, "| {} | {} | {pairs} | {} |", card.name, card.summary, sources.join(", ")).unwrap();
    }
    table
}

/// What the links of the table lead to.
fn links() -> String {
    let numbers: BTreeSet<_> = ENTRIES.iter().flat_map(|entry| papers(entry.card.source).0).collect();
    numbers.iter().map(|number| format!("[{number}]: https://arxiv.org/abs/{number}\n")).collect()
}

/// Formula and cost of a mechanism are docs of a type: those of its module, which is
/// private, reach nobody.
#[test]
fn docs_of_mechanisms_are_docs_of_types() {
    for family in ["dense", "sparse", "linear", "neighborhood", "latent"] {
        let folder = format!("{}/src/{family}", env!("CARGO_MANIFEST_DIR"));
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let source = if path.is_file() { std::fs::read_to_string(&path).unwrap() } else { continue };
            if !["\ncarded!(", "Card = &Card {"].iter().any(|mark| source.contains(mark)) {
                continue;
            }
            let docs: Vec<_> = source.lines().map(str::trim_start).filter(|x| x.starts_with("///")).collect();
            for part in ["/// ```text", "Cost"] {
                assert!(docs.iter().any(|line| line.contains(part)), "{}: no {part:?}", path.display());
            }
        }
    }
}

/// `UPDATE_README=1 cargo test --test readme` writes what this demands.
#[test]
fn the_table_is_that_of_the_cards() {
    let mut readme = README.to_owned();
    for (name, want) in [("mechanisms", table()), ("papers", links())] {
        let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
        let start = readme.find(&begin).expect("a mark where the block begins") + begin.len();
        let stop = readme.find(&end).expect("a mark where the block ends");
        readme.replace_range(start..stop, &format!("\n{want}\n"));
    }
    if std::env::var_os("UPDATE_README").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"), &readme).unwrap();
    } else {
        assert!(readme == README, "the README's table differs: UPDATE_README=1 cargo test --test readme");
    }
}
