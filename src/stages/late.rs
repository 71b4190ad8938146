//! Masks over caches whose heads hold different tokens.

use std::ops::Range;

use crate::input::Site;
use crate::keys::source::Slots;
use crate::mask::{Block, Coverage, Mask, range_bits};
use crate::simd::Isa;

/// What a mask leaves of the tokens that a head holds: the last ones of its
/// sequence.
pub(crate) struct Late<'a> {
    pub(crate) mask: &'a dyn Mask,
    /// How many of the first tokens a head lacks, `[sequences, kv_heads]` of the
    /// cache; none do if there is nothing.
    pub(crate) missing: Option<&'a [usize]>,
    pub(crate) slots: Slots<'a>,
    pub(crate) kv_heads: usize,
    /// Query heads of a key/value head.
    pub(crate) group: usize,
}

impl Late<'_> {
    /// The first key that a head holds.
    #[inline(always)]
    fn first(&self, site: &Site) -> usize {
        self.missing.map_or(0, |missing| {
            missing[self.slots.slot(site.batch) * self.kv_heads + site.head / self.group]
        })
    }
}

impl Mask for Late<'_> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        key >= self.first(site) && self.mask.visible(site, query, key)
    }

    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        let hull = self.mask.hull(site, queries);
        // Of what ends before the first key nothing is left.
        hull.start.max(self.first(site)).min(hull.end)..hull.end
    }

    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let first = self.first(site);
        if keys.end <= first {
            return Coverage::Empty;
        }
        match self.mask.coverage(site, queries, keys.clone()) {
            Coverage::Full if keys.start < first => Coverage::Partial,
            coverage => coverage,
        }
    }

    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let held = range_bits(self.first(site) as isize..site.kv_len as isize, first);
        self.mask.bits_among(site, query, first, held)
    }

    fn fill_bits(&self, isa: Isa, block: &Block<'_>, words: &mut [u64], stride: usize) {
        let first = self.first(block.site);
        // What is held begins within the block.
        let keys = block.keys.start.max(first).min(block.keys.end)..block.keys.end;
        if keys.start == block.keys.start {
            return self.mask.fill_bits(isa, block, words, stride);
        }
        for (query, row) in block.queries.clone().zip(words.chunks_mut(stride)) {
            for (at, word) in block.keys.clone().step_by(64).zip(row) {
                let held = range_bits(keys.start as isize..keys.end as isize, at);
                *word = if held == 0 { 0 } else { self.mask.bits_among(block.site, query, at, held) };
            }
        }
    }

    fn is_opaque(&self) -> bool {
        self.mask.is_opaque()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::{Unmasked, Window};

    #[test]
    fn the_first_tokens_are_hidden() {
        let missing = [0, 70, 5, 64, 300, 1];
        let (masks, slots): ([&dyn Mask; 2], _) = ([&Unmasked, &Window::new(Some(90), Some(3))], [2, 0]);
        let slots = Slots { slots: Some(&slots), offsets: None, lengths: &[200, 9, 300] };
        for mask in masks {
            let late = Late { mask, missing: Some(&missing), slots, kv_heads: 2, group: 3 };
            for (batch, head) in [(0, 0), (0, 5), (1, 1), (1, 3)] {
                let kv_len = slots.len(batch);
                let (site, first) =
                    (Site { batch, head, q_len: 7, kv_len }, missing[[4, 0][batch] + head / 3]);
                for query in 0..7 {
                    let sees = |key: usize| key >= first && mask.visible(&site, query, key);
                    let hull = late.hull(&site, query..query + 1);
                    for key in 0..kv_len {
                        assert_eq!(late.visible(&site, query, key), sees(key));
                        assert!(!sees(key) || hull.contains(&key));
                        let bits = late.bits(&site, query, key / 9 * 9);
                        assert_eq!(bits >> (key % 9) & 1 == 1, sees(key), "{query} {key}");
                        let keys = key..(key + 70).min(kv_len);
                        let seen = keys.clone().filter(|&key| sees(key)).count();
                        match late.coverage(&site, query..query + 1, keys.clone()) {
                            Coverage::Empty => assert_eq!(seen, 0),
                            Coverage::Full => assert_eq!(seen, keys.len()),
                            Coverage::Partial => {}
                        }
                    }
                    let block = Block { site: &site, queries: query..query + 1, keys: 3..kv_len };
                    let mut words = [u64::MAX; 5];
                    late.fill_bits(Isa::Scalar, &block, &mut words, 5);
                    for key in 3..kv_len {
                        assert_eq!(words[(key - 3) / 64] >> ((key - 3) % 64) & 1 == 1, sees(key));
                    }
                }
            }
        }
    }
}
