//! Lists by a search of one's own: of each query head and block of queries.

use std::ops::Range;
use std::sync::Mutex;

use ndarray::ArrayView4;

use super::{Pick, Source, Unpack, pick, reserve};
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::source::At;
use crate::keys::{Layout, Per, Run, TokenLists};
use crate::simd::Isa;
use crate::simd::any::IntoAny;
use crate::simd::mem::{Heads, bytes_for, bytes_for_shares};

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

/// The lists of a layout for single queries of each head, those of all heads of a query
/// found at once: `work` adds the runs of sequence, query and head `h` to `runs[h]`.
pub(crate) fn lists_of_queries<W>(
    layout: Layout,
    start: impl Fn(usize) -> W + Sync + Send,
    work: impl Fn(&mut W, usize, usize, &mut [Vec<Run>]) + Sync + Send,
) -> Result<TokenLists> {
    /// Queries of a task.
    const TILE: usize = 32;
    /// Where lists end, query by query and head by head, and their runs.
    type Found = (Vec<usize>, Vec<Run>);
    let (n, heads, queries) = (layout.lists()?, layout.heads(), layout.queries);
    let tiles = queries.div_ceil(TILE);
    let mut found = Vec::<Mutex<Found>>::new();
    reserve(&mut found, layout.sequences * tiles)?;
    found.resize_with(layout.sequences * tiles, Mutex::default);
    let start = |worker: usize| (start(worker), vec![Vec::new(); heads]);
    parallel::for_each(parallel::threads(), found.len(), start, |(scratch, runs), task| {
        let (sequence, first) = (task / tiles, task % tiles * TILE);
        let (mut ends, mut all) = (Vec::with_capacity(TILE * heads), Vec::new());
        for query in first..(first + TILE).min(queries) {
            work(scratch, sequence, query, runs);
            for runs in &mut *runs {
                all.append(runs);
                ends.push(all.len());
            }
        }
        if let Ok(mut found) = found[task].lock() {
            *found = (ends, all);
        }
    });
    let found: Vec<Found> = found.into_iter().filter_map(|found| found.into_inner().ok()).collect();
    let (mut offsets, mut runs) = (Vec::new(), Vec::new());
    reserve(&mut offsets, n + 1)?;
    reserve(&mut runs, found.iter().map(|(_, runs)| runs.len()).sum())?;
    offsets.push(0);
    for (of, head) in found.chunks(tiles.max(1)).flat_map(|of| (0..heads).map(move |head| (of, head))) {
        for query in 0..queries {
            let ((ends, all), list) = (&of[query / TILE], query % TILE * heads + head);
            runs.extend_from_slice(&all[if list == 0 { 0 } else { ends[list - 1] }..ends[list]]);
            offsets.push(runs.len());
        }
    }
    TokenLists::new(layout, offsets, runs)
}

/// What picks choose of rows of scores, `[batch, heads, rows, keys]`: `pick` gives the row
/// of a query, and what is chosen of it.
pub(crate) fn lists_of_rows(
    isa: Isa,
    layout: Layout,
    rows: ArrayView4<'_, f32>,
    pick: impl Fn(usize) -> (usize, Pick) + Sync + Send,
) -> Result<TokenLists> {
    let (n, workers) = (layout.keys, parallel::threads());
    let share = bytes_for::<f32>(n) + bytes_for::<u64>(n.div_ceil(64)) + pick::Room::bytes(n);
    let mut workspace = Workspace::new();
    let shares = workspace.arena(bytes_for_shares(workers, share))?.shares(workers, share);
    let start = |worker: usize| {
        let mut arena = shares.take(worker);
        (arena.take::<f32>(n), arena.take::<u64>(n.div_ceil(64)), pick::Room::take(&mut arena, n))
    };
    let rows = f32::any(Heads::new(rows));
    lists_of_queries(layout, start, |(row, bits, room), b, query, runs| {
        let (i, pick) = pick(query);
        for (h, runs) in runs.iter_mut().enumerate() {
            isa.dispatch(Unpack { from: rows.rows(b, h, &(i..i + 1)), to: row });
            pick::choose(isa, &pick, row, room, bits);
            join_ones(runs, bits);
        }
    })
}

/// Adds the runs of the bits that are set.
pub(crate) fn join_ones(runs: &mut Vec<Run>, bits: &[u64]) {
    for (w, &word) in bits.iter().enumerate() {
        let (mut word, mut at) = (word, 64 * w);
        while word != 0 {
            let zeros = word.trailing_zeros();
            (word, at) = (word >> zeros, at + zeros as usize);
            let ones = word.trailing_ones();
            join(runs, at..at + ones as usize);
            (word, at) = (word.checked_shr(ones).unwrap_or(0), at + ones as usize);
        }
    }
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

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::select::finding::ones;
    use crate::select::{Forced, Rule};

    #[test]
    fn lists_of_queries_are_in_order() {
        let layout = Layout {
            per: Per::Head,
            sequences: 2,
            q_heads: 3,
            kv_heads: 1,
            queries: 70,
            q_block: 1,
            keys: 200,
        };
        // The bits of a word and those around it, and none of some.
        let bits = |sequence: usize, head: usize, query: usize| {
            let word = (query as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> head;
            if query % 7 == 3 { [0; 3] } else { [word, if sequence == 1 { u64::MAX } else { !word }, word] }
        };
        let lists = lists_of_queries(
            layout,
            |_| (),
            |(), sequence, query, runs| {
                runs.iter_mut().enumerate().for_each(|(h, runs)| join_ones(runs, &bits(sequence, h, query)));
            },
        );
        let lists = lists.unwrap();
        for (sequence, head, query) in
            (0..2).flat_map(|b| (0..3).flat_map(move |h| (0..70).map(move |i| (b, h, i))))
        {
            let got = lists.runs(sequence, head, query);
            let keys: Vec<usize> = got.iter().flat_map(|run| run.range()).collect();
            assert_eq!(keys, ones(&bits(sequence, head, query)).collect::<Vec<_>>());
            assert!(got.windows(2).all(|pair| pair[0].range().end < pair[1].range().start));
        }
    }

    #[test]
    fn lists_of_rows_are_their_definition() {
        let at =
            |(b, h, i, j): (usize, usize, usize, usize)| ((b * 7 + h * 31 + i * 13 + j * 37) % 11) as f32;
        let scores = Array4::from_shape_fn((2, 3, 5, 90), at);
        let layout = Layout {
            per: Per::Head,
            sequences: 2,
            q_heads: 3,
            kv_heads: 3,
            queries: 10,
            q_block: 1,
            keys: 90,
        };
        let pick = |query: usize| {
            let rule = Rule::TopK(if query < 5 { 3 } else { 70 });
            (query % 5, Pick { rule, forced: Forced::default() })
        };
        let (want, margins) =
            crate::definition::select::lists_of_rows(layout, &scores.mapv(f64::from), pick).unwrap();
        assert_eq!(margins.doubtful.len(), layout.lists().unwrap());
        for isa in Isa::available() {
            assert_eq!(lists_of_rows(isa, layout, scores.view(), pick).unwrap(), want);
        }
    }
}
