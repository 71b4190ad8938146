//! Several documents in one sequence.

use std::collections::HashMap;
use std::ops::Range;

use super::{Coverage, Mask, pack, range_bits};
use crate::error::{Error, Result};
use crate::input::{Dims, Site};

/// A query sees the keys of its own document.
///
/// Each token has the number of its document; a query sees the keys with its
/// own number, in every sequence and head the same. Documents are mostly
/// runs of neighbours, and then whole blocks are skipped or taken without a
/// test; documents in pieces are right too.
///
/// ```text
/// Documents::new(&[7, 7, 4, 4, 4])      Documents::of(&[4, 9], &[7, 4, 4, 7, 4])
/// x x . . .                             . x x . x
/// x x . . .                             . . . . .
/// . . x x x
/// . . x x x
/// . . x x x
/// ```
///
/// Sequences that are packed along the length axis need no mask:
/// [`Qkv::packed`](crate::input::Qkv::packed) keeps them apart.
///
/// # Errors
/// A call is refused unless there is a number for each of its queries and
/// keys, and if its batch is packed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    keys: Vec<u32>,
    queries: Vec<Document>,
}

/// What is known of a query's document.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Document {
    id: u32,
    /// From its first to its last key.
    span: Range<usize>,
    /// Whether all keys of the span are its own.
    whole: bool,
}

impl Documents {
    /// Query `i` and key `i` belong to document `ids[i]`.
    pub fn new(ids: &[u32]) -> Self {
        Self::of(ids, ids)
    }

    /// Query `i` belongs to document `queries[i]` and key `j` to `keys[j]`.
    pub fn of(queries: &[u32], keys: &[u32]) -> Self {
        // First key, one past the last key, number of keys.
        let mut spans: HashMap<u32, (usize, usize, usize)> = HashMap::new();
        for (j, &id) in keys.iter().enumerate() {
            let (_, end, count) = spans.entry(id).or_insert((j, j, 0));
            *end = j + 1;
            *count += 1;
        }
        let document = |&id: &u32| {
            let (start, end, count) = spans.get(&id).copied().unwrap_or((0, 0, 0));
            Document { id, span: start..end, whole: count == end - start }
        };
        Self { keys: keys.to_vec(), queries: queries.iter().map(document).collect() }
    }

    /// The documents of a block of queries.
    #[inline(always)]
    fn documents(&self, queries: Range<usize>) -> &[Document] {
        let end = queries.end.min(self.queries.len());
        &self.queries[queries.start.min(end)..end]
    }
}

impl Mask for Documents {
    #[inline(always)]
    fn visible(&self, _: &Site, query: usize, key: usize) -> bool {
        match (self.queries.get(query), self.keys.get(key)) {
            (Some(document), Some(&id)) => document.id == id,
            _ => false,
        }
    }
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let spans =
            self.documents(queries).iter().map(|document| &document.span).filter(|span| !span.is_empty());
        let (start, end) =
            spans.fold((usize::MAX, 0), |(start, end), span| (start.min(span.start), end.max(span.end)));
        let end = end.min(site.kv_len);
        start.min(end)..end
    }
    fn coverage(&self, _: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let (mut empty, mut full) = (true, true);
        for Document { span, whole, .. } in self.documents(queries) {
            empty &= span.end <= keys.start || span.start >= keys.end;
            full &= *whole && span.start <= keys.start && keys.end <= span.end;
        }
        match (empty, full) {
            (true, _) => Coverage::Empty,
            (_, true) => Coverage::Full,
            _ => Coverage::Partial,
        }
    }
    #[inline(always)]
    fn bits(&self, _: &Site, query: usize, first: usize) -> u64 {
        let Some(Document { id, span, whole }) = self.queries.get(query) else { return 0 };
        if *whole {
            return range_bits(span.start as isize..span.end as isize, first);
        }
        let keys = self.keys.get(first..).unwrap_or(&[]);
        match keys.first_chunk::<64>() {
            Some(keys) => pack(64, |t| keys[t] == *id),
            None => pack(keys.len(), |t| keys[t] == *id),
        }
    }
    fn is_shared(&self) -> bool {
        true
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        if dims.packed {
            return Err(Error::packed("a mask of documents"));
        }
        let (queries, keys) = (self.queries.len(), self.keys.len());
        let lengths = [
            ("query documents", queries, "q_len", dims.q_len),
            ("key documents", keys, "kv_len", dims.kv_len),
        ];
        for (argument, got, name, expected) in lengths {
            if got != expected {
                let expected = format!("one document number for each token, {name} = {expected}");
                return Err(Error::value(argument, expected, format_args!("{got} numbers")));
            }
        }
        Ok(())
    }
}
