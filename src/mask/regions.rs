//! The mask of regions: looked up by their kind.

use std::ops::Range;

use super::{Block, Coverage, Mask};
use crate::input::Site;
use crate::keys::regions::Regions;
use crate::simd::Isa;

impl Mask for Regions {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.kind(site.batch).1.row(query)[key / 64] >> (key % 64) & 1 == 1
    }

    fn coverage(&self, site: &Site, _: Range<usize>, _: Range<usize>) -> Coverage {
        if self.kind(site.batch).1.whole { Coverage::Full } else { Coverage::Partial }
    }

    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let row = self.kind(site.batch).1.row(query);
        let word = |i: usize| row.get(i).copied().unwrap_or(0);
        let (i, by) = (first / 64, first % 64);
        let rest = if by == 0 { 0 } else { word(i + 1) << (64 - by) };
        word(i) >> by | rest
    }

    fn fill_bits(&self, isa: Isa, block: &Block<'_>, words: &mut [u64], stride: usize) {
        let Block { site, queries, keys } = block;
        let whole_words = keys.start % 64 == 0 && (keys.end == site.kv_len || keys.end % 64 == 0);
        if !whole_words {
            return isa.dispatch(super::FillBits { mask: self, block, words, stride });
        }
        let kind = self.kind(site.batch).1;
        let range = keys.start / 64..keys.end.div_ceil(64);
        for (query, to) in queries.clone().zip(words.chunks_mut(stride)) {
            to[..range.len()].copy_from_slice(&kind.row(query)[range.clone()]);
        }
    }
}
