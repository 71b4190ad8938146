//! Searches: the blocks of a head's keys with the highest scores, found without
//! scoring all.

use super::pick::{self, Forced, Pick, Rule};
use super::{Source, finding};
use crate::engine::workspace::room;
use crate::input::Sequence;
use crate::keys::source::At;
use crate::simd::any::AnyRows;
use crate::simd::mem::Rows;
use crate::simd::table::{RowsAhead, TABLE_ROWS, Table};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

room! {
    /// What [`BestScores`] works in.
    Best<'a>(head_dim: usize, rows: usize) {
        held: f32 = TABLE_ROWS.saturating_mul(head_dim),
        keys: f32 = TABLE_ROWS.saturating_mul(head_dim.saturating_add(MAX_LANES)),
        products: f32 = rows.saturating_add(1).saturating_mul(TABLE_ROWS)
    }
}

/// For each of some blocks of keys the largest product of its keys with some
/// queries; NaN where one is.
pub(crate) struct BestScores<'a, 'b> {
    pub(crate) source: &'a Source<'a>,
    pub(crate) of: &'a Sequence,
    pub(crate) kv_head: usize,
    /// `[rows, head_dim]`, each filled up to whole vectors with zeros.
    pub(crate) queries: &'a [f32],
    pub(crate) rows: usize,
    /// First keys of blocks, of up to `unit` keys before `end`; at most 64.
    pub(crate) firsts: &'a [u32],
    pub(crate) unit: usize,
    pub(crate) end: usize,
    pub(crate) room: &'a mut Best<'b>,
    pub(crate) scores: &'a mut [f32],
}

impl Kernel for BestScores<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { source, of, kv_head, queries, rows, firsts, unit, end, room, scores } = self;
        let (d, apart) = (source.dims.head_dim, source.dims.head_dim.next_multiple_of(S::LANES));
        let range = |first: u32| first as usize..(first as usize + unit).min(end);
        let each = TABLE_ROWS / unit;
        for (firsts, scores) in firsts.chunks(each).zip(scores.chunks_mut(each)) {
            let mut n = 0;
            for &first in firsts {
                let at = At { sequence: of, kv_head, keys: range(first) };
                let keys = source.kv.keys(S::ISA, &at, room.held);
                keys.pack_rows(s, &mut room.keys[n * apart..], apart.max(1));
                n += at.keys.len();
            }
            let mut best = [f32::NEG_INFINITY; TABLE_ROWS];
            if d == 0 {
                best = [0.0; TABLE_ROWS];
            } else {
                let mut table = Table::new();
                table.push(AnyRows::F32(Rows::of_slice(room.keys, n, d, apart)));
                let out = &mut *room.products;
                table.typed().dots(s, (rows, queries), &RowsAhead::nothing(), out, TABLE_ROWS);
                for row in out.chunks(TABLE_ROWS).take(rows) {
                    for (best, &x) in best.iter_mut().zip(row) {
                        *best = if x > *best || x.is_nan() { x } else { *best };
                    }
                }
            }
            let mut from = 0;
            for (score, &first) in scores.iter_mut().zip(firsts) {
                let keys = from..from + range(first).len();
                from = keys.end;
                let most = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
                *score = best[keys].iter().copied().fold(f32::NEG_INFINITY, most);
            }
        }
    }
}

room! {
    /// What [`descend`] works in.
    Tree<'a>(most: usize) {
        starts: u32 = most.saturating_mul(2),
        sizes: u32 = most.saturating_mul(2),
        children: u32 = most.saturating_mul(2),
        child_sizes: u32 = most.saturating_mul(2),
        asked: u32 = most.saturating_mul(2),
        scores: f32 = most.saturating_mul(2),
        bits: u64 = most.div_ceil(32);
        pick: pick::Room<'a> = (most.saturating_mul(2))
    }
}

/// Which block of a range stands for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Representative {
    /// The first one.
    First,
    /// The one in the middle.
    Center,
}

impl Representative {
    /// Of a range of so many blocks.
    pub(crate) fn of(self, start: usize, size: usize) -> usize {
        match self {
            Self::First => start,
            Self::Center => start + size / 2,
        }
    }
}

/// `most` of more blocks, or fewer where scores are NaN: cuts all into as many ranges, and halves these until
/// they are single blocks; of the halves those with the highest scores of their
/// representatives stay. `score` is given blocks. `log2(blocks / most)` times
/// `2 most` scores.
pub(crate) fn descend<'r>(
    isa: Isa,
    (blocks, most): (usize, usize),
    representative: Representative,
    room: &'r mut Tree<'_>,
    mut score: impl FnMut(&[u32], &mut [f32]),
) -> &'r [u32] {
    let cut = |i: usize| (blocks as u128 * i as u128 / most.max(1) as u128) as u32;
    for i in 0..most {
        (room.starts[i], room.sizes[i]) = (cut(i), cut(i + 1) - cut(i));
    }
    let mut size = blocks as f64 / most.max(1) as f64;
    let mut len = most;
    while size > 1.0 {
        let mut n = 0;
        for i in 0..len {
            let (start, all) = (room.starts[i], room.sizes[i]);
            let half = all / 2;
            for (start, size) in [(start, half), (start + half, all - half)] {
                if size > 0 {
                    (room.children[n], room.child_sizes[n]) = (start, size);
                    room.asked[n] = representative.of(start as usize, size as usize) as u32;
                    n += 1;
                }
            }
        }
        let scores = &mut room.scores[..n];
        score(&room.asked[..n], scores);
        let bits = &mut room.bits[..n.div_ceil(64)];
        let pick = Pick { rule: Rule::TopK(most), forced: Forced::default() };
        pick::choose(isa, &pick, scores, &mut room.pick, bits);
        len = 0;
        for i in finding::ones(bits) {
            (room.starts[len], room.sizes[len]) = (room.children[i], room.child_sizes[i]);
            len += 1;
        }
        size /= 2.0;
    }
    &room.starts[..len]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::workspace::Workspace;

    /// Ranges end as single blocks, as many as are wanted; where scores rise with
    /// the position they are the last ones.
    #[test]
    fn rising_scores_give_the_last_blocks() {
        let isa = Isa::choose(None).unwrap();
        for most in [1usize, 2, 3, 7, 16, 40] {
            for blocks in most + 1..most * 9 + 5 {
                let mut workspace = Workspace::new();
                let mut room = Tree::take(&mut workspace.arena(Tree::bytes(most)).unwrap(), most);
                for representative in [Representative::First, Representative::Center] {
                    let rising = |blocks: &[u32], scores: &mut [f32]| {
                        scores.iter_mut().zip(blocks).for_each(|(score, &block)| *score = block as f32);
                    };
                    let found = descend(isa, (blocks, most), representative, &mut room, rising);
                    let want: Vec<u32> = (blocks - most..blocks).map(|i| i as u32).collect();
                    assert_eq!(found, want, "{blocks} {most} {representative:?}");
                    let other = |blocks: &[u32], scores: &mut [f32]| {
                        scores.iter_mut().zip(blocks).for_each(|(score, &i)| *score = ((i * 37) % 23) as f32);
                    };
                    let found = descend(isa, (blocks, most), representative, &mut room, other);
                    assert!(found.len() == most && found.windows(2).all(|pair| pair[0] < pair[1]));
                    assert!(found.iter().all(|&i| (i as usize) < blocks));
                }
            }
        }
    }
}
