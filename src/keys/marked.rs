//! Blocks of tokens, each followed by one that stands for it.

use ndarray::{ArrayView4, s};

use crate::error::Result;
use crate::input::{Dims, Lengths, Sequence};
use crate::keys::every::Every;
use crate::keys::source::KvSource;
use crate::keys::{ATOM, Layout, Per, Run, TokenLists};

/// Blocks of `block` tokens from the start of a sequence on, each with its mark after it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Marks {
    pub(crate) block: usize,
}

impl Marks {
    /// Tokens of a block and its mark.
    pub(crate) fn unit(&self) -> usize {
        self.block + 1
    }

    /// The marks among the keys of arrays.
    pub(crate) fn rows<'a, K>(&self, k: &'a ArrayView4<'_, K>) -> ArrayView4<'a, K> {
        let first = self.block.min(k.dim().2);
        k.slice(s![.., .., first..; self.unit(), ..])
    }

    /// The keys from the first mark on without the last key: of that many
    /// tokens fewer, a query sees the marks before its own block.
    pub(crate) fn ahead<'a, K>(&self, k: &'a ArrayView4<'_, K>) -> ArrayView4<'a, K> {
        let len = k.dim().2;
        k.slice(s![.., .., if len < self.unit() { len..len } else { self.block..len - 1 }, ..])
    }

    /// The marks of a cache, as keys one after the other.
    pub(crate) fn of_cache<'a>(&self, source: &'a dyn KvSource, dims: &Dims) -> Every<'a> {
        Every { source, first: self.block, step: self.unit(), head_dim: dims.head_dim }
    }

    /// The number of whole blocks before that of a query of a sequence.
    pub(crate) fn before(&self, of: &Sequence, query: usize) -> usize {
        position(of, query).map_or(0, |t| t / self.unit())
    }

    /// Pairs of a query and a mark before its own block, of a head.
    pub(crate) fn pairs(&self, dims: &Dims, lengths: &Lengths<'_>) -> usize {
        let of = |of: Sequence| (0..of.queries.len()).map(|i| self.before(&of, i)).sum::<usize>();
        (0..dims.batch).map(|i| of(lengths.sequence(dims, i))).sum()
    }

    /// Runs of the tokens of some blocks and of those of the one of a position.
    fn runs(
        &self,
        blocks: impl Iterator<Item = usize>,
        position: Option<usize>,
    ) -> impl Iterator<Item = Run> {
        let (unit, block) = (self.unit(), self.block);
        let run = |start: usize, len: usize| Run { start: start as u32, len: len as u32 };
        let own = position.map(|t| run(t / unit * unit, (t % unit + 1).min(block)));
        blocks.map(move |b| run(b * unit, block)).chain(own)
    }

    /// The lists of all queries, their own blocks among them: of the blocks that they have
    /// chosen, `chosen.1[chosen.0[l]..chosen.0[l + 1]]` for list `l`, or of all blocks.
    pub(crate) fn lists(
        &self,
        dims: &Dims,
        lengths: &Lengths<'_>,
        chosen: Option<(&[usize], &[u32])>,
    ) -> Result<TokenLists> {
        let layout = match chosen {
            Some(_) => Layout::of(Per::Head, 1, dims, lengths),
            None => Layout::of(Per::Sequence, ATOM, dims, lengths),
        };
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        let lists = layout.heads() * layout.blocks();
        for list in 0..layout.lists()? {
            let (of, block) = (lengths.sequence(dims, list / lists), list % layout.blocks());
            let last = ((block + 1) * layout.q_block).min(of.queries.len());
            // Of a sequence with fewer queries than others.
            let position = if block * layout.q_block < last { position(&of, last - 1) } else { None };
            match chosen {
                Some((ends, blocks)) => {
                    let blocks = &blocks[ends[list]..ends[list + 1]];
                    runs.extend(self.runs(blocks.iter().map(|&b| b as usize), position));
                }
                None => runs.extend(self.runs(0..position.unwrap_or(0) / self.unit(), position)),
            }
            offsets.push(runs.len());
        }
        TokenLists::new(layout, offsets, runs)
    }
}

/// The position of a query of a sequence.
fn position(of: &Sequence, query: usize) -> Option<usize> {
    (query + of.keys.len()).checked_sub(of.queries.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(batch: usize, q_len: usize, kv_len: usize) -> Dims {
        Dims { batch, q_heads: 1, kv_heads: 1, q_len, kv_len, head_dim: 1, value_dim: 1, packed: false }
    }

    #[test]
    fn lists_leave_marks_out() {
        let marks = Marks { block: 3 };
        let keys = |lists: &TokenLists, row: usize| -> Vec<usize> {
            lists.runs(0, 0, row).iter().flat_map(|run| run.range()).collect()
        };
        let all = marks.lists(&dims(1, 2, 10), &Lengths::Full, None).unwrap();
        assert_eq!(keys(&all, 0), [0, 1, 2, 4, 5, 6, 8, 9]);
        // Of the queries at 7, a mark itself, and at 8 the first and the second block.
        let sizes = (dims(1, 2, 9), [0, 1, 2], [0, 1]);
        let chosen = marks.lists(&sizes.0, &Lengths::Full, Some((&sizes.1, &sizes.2))).unwrap();
        assert_eq!([keys(&chosen, 0), keys(&chosen, 1)], [vec![0, 1, 2, 4, 5, 6], vec![4, 5, 6, 8]]);
        assert_eq!(marks.pairs(&dims(2, 2, 9), &Lengths::Full), 2 * (1 + 2));
        // Queries before all keys, and no sequences.
        assert!(marks.lists(&dims(1, 2, 1), &Lengths::Full, Some((&[0, 0, 0], &[]))).is_ok());
        assert!(marks.lists(&dims(0, 2, 9), &Lengths::Full, None).unwrap().is_empty());
    }

    #[test]
    fn rows_of_arrays_are_every_so_many_th() {
        let k = ndarray::Array4::from_shape_fn((1, 1, 10, 1), |(.., j, _)| j);
        let (k, marks) = (k.view(), Marks { block: 3 });
        assert_eq!(marks.rows(&k).iter().copied().collect::<Vec<_>>(), [3, 7]);
        assert_eq!(marks.ahead(&k).iter().copied().collect::<Vec<_>>(), (3..9).collect::<Vec<_>>());
        assert_eq!([Marks { block: 20 }.rows(&k).len(), Marks { block: 20 }.ahead(&k).len()], [0, 0]);
    }
}
