//! What the docs of a mechanism's type say of it, read from the sources.

use std::path::Path;

use super::program::Failure;

/// The parts of a type's docs.
#[derive(Default)]
pub struct Docs {
    /// Where the type lives.
    pub module: String,
    /// What it computes.
    pub formula: String,
    /// How it is built; empty where the example does not begin with that.
    pub builder: String,
}

/// The docs of a type such as `Dense<Causal>`, and the module that it lives in: that
/// of its family, or another one that the family borrows it from.
///
/// # Errors
/// Where the sources cannot be read or have no such type.
pub fn of(family: &str, mechanism: &str) -> Result<Docs, Failure> {
    let name = plain(mechanism);
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for module in [family, "dense", "linear", "sparse", "neighborhood", "latent"] {
        for file in std::fs::read_dir(sources.join(module))? {
            let path = file?.path();
            if path.is_file()
                && let Some(docs) = in_source(&std::fs::read_to_string(path)?, name)
            {
                return Ok(Docs { module: module.to_owned(), ..docs });
            }
        }
    }
    Err(format!("{}: no type {name}", sources.display()).into())
}

/// A type without its parameters.
fn plain(mechanism: &str) -> &str {
    mechanism.split('<').next().unwrap_or_default().trim()
}

fn in_source(source: &str, name: &str) -> Option<Docs> {
    let lines: Vec<_> = source.lines().map(str::trim_start).collect();
    // As Rust has it, or to a macro of the crate.
    let declares = |line: &&str| match line.strip_prefix("pub struct ") {
        Some(rest) => rest.strip_prefix(name).is_some_and(|rest| !rest.starts_with(is_name)),
        None => line.strip_suffix(';') == Some(name),
    };
    let at = lines.iter().position(declares)?;
    let above = lines[..at].iter().rev().take_while(|line| line.starts_with("///") || line.starts_with('#'));
    let docs: Vec<_> = above.filter_map(|line| line.strip_prefix("///")).collect();
    let mut found = Docs::default();
    let (mut fence, mut formulas) = (None, 0);
    for line in docs.into_iter().rev() {
        let line = line.strip_prefix(' ').unwrap_or(line);
        match (line.strip_prefix("```"), fence) {
            (Some(language), None) => fence = Some(language),
            (Some(_), Some(_)) => {
                formulas += usize::from(fence == Some("text"));
                fence = None;
            }
            (None, Some("text")) if formulas == 0 => {
                found.formula += line;
                found.formula += "\n";
            }
            (None, Some("")) if !line.starts_with("# ") => {
                found.builder += line.trim_start();
                found.builder += "\n";
            }
            _ => {}
        }
    }
    found.builder = built(&found.builder, name).unwrap_or_default();
    found.formula.truncate(found.formula.trim_end().len());
    Some(found)
}

/// The first expression of an example that builds a `name`.
fn built(example: &str, name: &str) -> Option<String> {
    let begins = |start: &str| {
        example.match_indices(start).map(|(at, _)| at).find(|&at| !example[..at].ends_with(is_name))
    };
    let from = [format!("{name}::"), format!("{name}(")].iter().filter_map(|start| begins(start)).min()?;
    // Up to where it is built, or the statement ends: outside of brackets.
    let (mut depth, rest) = (0, &example[from..]);
    let end = rest.char_indices().find(|&(at, c)| {
        depth += i32::from("([{".contains(c)) - i32::from(")]}".contains(c));
        depth < 0 || depth == 0 && (c == ';' || rest[at..].starts_with(".build()?"))
    });
    Some(rest[..end.map_or(rest.len(), |(at, _)| at)].replace('\n', ""))
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == ':'
}

/// How the catalogue builds an entry that is no type of its own; nothing of others.
///
/// # Errors
/// Where the source cannot be read.
pub fn entry(name: &str) -> Result<Option<String>, Failure> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/catalog/dense.rs");
    let source = std::fs::read_to_string(path)?;
    let block = source.split_once(&format!("\"{name}\"")).and_then(|(_, rest)| rest.split_once("    build("));
    let Some((_, block)) = block else { return Ok(None) };
    let block = block.split_once('{').map_or("", |(_, block)| block);
    // To the brace that closes it, on its line or on one of its own; of several
    // statements the last.
    let (line, rest) = block.split_once('\n').unwrap_or((block, ""));
    let expression = match line.strip_suffix('}') {
        Some(line) => line,
        None => rest.split("\n    }").next().and_then(|lines| lines.lines().last()).unwrap_or_default(),
    };
    Ok(Some(expression.trim().to_owned()))
}
