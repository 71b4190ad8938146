//! Lists by a search of one's own: of each query head and block of queries.

use std::ops::Range;
use std::sync::Mutex;

use super::{Source, Unpack, reserve};
use crate::engine::parallel;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::source::At;
use crate::keys::{Layout, Per, Run, TokenLists};

impl Source<'_> {
    /// Lists of each query head for blocks of queries.
    pub(crate) fn layout(&self, q_block: usize) -> Layout {
        let (mut queries, mut keys) = (0, 0);
        for sequence in (0..self.dims.batch).map(|i| self.sequence(i)) {
            (queries, keys) = (queries.max(sequence.queries.len()), keys.max(sequence.keys.len()));
        }
        let (q_heads, kv_heads, sequences) = (self.dims.q_heads, self.dims.kv_heads, self.dims.batch);
        Layout { per: Per::Head, sequences, q_heads, kv_heads, queries, q_block, keys }
    }

    /// Some keys of a head in `f32`, one after the other.
    pub(crate) fn keys(&self, sequence: &Sequence, kv_head: usize, span: &Range<usize>) -> Result<Vec<f32>> {
        const CHUNK: usize = 64;
        let d = self.dims.head_dim;
        let mut rows = Vec::new();
        reserve(&mut rows, span.len().saturating_mul(d))?;
        rows.resize(span.len() * d, 0.0);
        let mut room = vec![0.0; CHUNK * d];
        for (i, to) in rows.chunks_mut((CHUNK * d).max(1)).enumerate() {
            let first = span.start + i * CHUNK;
            let at = At { sequence, kv_head, keys: first..(first + CHUNK).min(span.end) };
            self.isa.dispatch(Unpack { from: self.kv.keys(self.isa, &at, &mut room), to });
        }
        Ok(rows)
    }

    /// Takes a query into a row that is filled up with zeros.
    pub(crate) fn query(&self, sequence: &Sequence, head: usize, row: usize, to: &mut [f32]) {
        let row = sequence.queries.start + row;
        to.fill(0.0);
        self.isa.dispatch(Unpack { from: self.q.rows(sequence.batch, head, &(row..row + 1)), to });
    }
}

/// A block of queries of a head.
pub(crate) struct Block<'a> {
    pub(crate) sequence: &'a Sequence,
    pub(crate) head: usize,
    pub(crate) kv_head: usize,
    /// Queries of the sequence, at least one.
    pub(crate) rows: Range<usize>,
}

/// The lists of a [layout](Source::layout), whose runs `work` adds for each block.
pub(crate) fn lists<W>(
    source: &Source<'_>,
    layout: Layout,
    start: impl Fn(usize) -> W + Sync + Send,
    work: impl Fn(&mut W, &Block<'_>, &mut Vec<Run>) + Sync + Send,
) -> Result<TokenLists> {
    let (n, blocks, group) = (layout.lists()?, layout.blocks(), layout.q_heads / layout.kv_heads.max(1));
    let mut found = Vec::<Mutex<Vec<Run>>>::new();
    reserve(&mut found, n)?;
    found.resize_with(n, Mutex::default);
    parallel::for_each(parallel::threads(), n, start, |scratch, list| {
        let (index, head, block) =
            (list / blocks / layout.q_heads, list / blocks % layout.q_heads, list % blocks);
        let sequence = &source.sequence(index);
        let end = sequence.queries.len().min((block + 1) * layout.q_block);
        if let (Ok(mut runs), true) = (found[list].lock(), block * layout.q_block < end) {
            let rows = block * layout.q_block..end;
            work(scratch, &Block { sequence, head, kv_head: head / group, rows }, &mut runs);
        }
    });
    let (mut offsets, mut runs) = (Vec::new(), Vec::new());
    reserve(&mut offsets, n + 1)?;
    offsets.push(0);
    for list in found.into_iter().filter_map(|list| list.into_inner().ok()) {
        runs.extend(list);
        offsets.push(runs.len());
    }
    TokenLists::new(layout, offsets, runs)
}

/// Adds a range that lies after all that is there, joined to the last where it
/// follows it.
pub(crate) fn join(runs: &mut Vec<Run>, range: Range<usize>) {
    match runs.last_mut() {
        _ if range.is_empty() => {}
        Some(last) if last.range().end == range.start => last.len += range.len() as u32,
        _ => runs.push(Run { start: range.start as u32, len: range.len() as u32 }),
    }
}
