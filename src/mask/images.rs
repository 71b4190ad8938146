//! Masks of images of their own shapes, and of keys of which some are no tokens.

use std::ops::Range;
use std::sync::Arc;

use ndarray::Array2;

use super::grid::Local;
use super::{Block, Coverage, Mask, range_bits};
use crate::error::{Error, Result};
use crate::input::{Dims, Site};
use crate::keys::images::{Each, Images};
use crate::simd::Isa;

/// The mask of each image, whose sequence it is.
#[derive(Clone, Debug)]
pub(crate) struct OfImages {
    pub(crate) images: Images,
    pub(crate) each: Each<Local>,
}

impl Mask for OfImages {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.each.at(site.batch).visible(site, query, key)
    }

    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        self.each.at(site.batch).hull(site, queries)
    }

    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        self.each.at(site.batch).coverage(site, queries, keys)
    }

    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        self.each.at(site.batch).bits(site, query, first)
    }

    fn fill_bits(&self, isa: Isa, block: &Block<'_>, words: &mut [u64], stride: usize) {
        self.each.at(block.site.batch).fill_bits(isa, block, words, stride);
    }

    fn is_shared(&self) -> bool {
        self.each.is_shared()
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        self.images.check(dims)
    }
}

/// Which keys of each sequence are tokens, in the order of a call.
#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    words: Vec<u64>,
    /// Where the words of each sequence start.
    starts: Vec<usize>,
    /// Batch entries that have their own, 1 for all.
    batch: usize,
}

impl Tokens {
    /// `tokens` is `[batch | 1, len]`; the keys of a sequence are the rows `keys` of a
    /// part between two cuts, of a batch entry of its own or of every one.
    pub(crate) fn new(tokens: &Array2<bool>, keys: &[u32], cuts: &[usize], entries: Option<&[u32]>) -> Self {
        let parts: Vec<_> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
        let (mut words, mut starts, batch) = (Vec::new(), Vec::new(), tokens.nrows());
        let repeats = if entries.is_some() { 1 } else { batch };
        for sequence in 0..repeats * parts.len() {
            let part = sequence % parts.len();
            let entry = entries.map_or(sequence / parts.len(), |entries| entries[part] as usize);
            let entry = if batch == 1 { 0 } else { entry };
            starts.push(words.len());
            for rows in keys[parts[part].clone()].chunks(64) {
                let bit = |(t, &row): (usize, &u32)| u64::from(tokens[[entry, row as usize]]) << t;
                words.push(rows.iter().enumerate().map(bit).sum());
            }
        }
        Self { words, starts, batch }
    }

    /// The bits of 64 keys of a sequence from one on; those beyond the last may be
    /// anything.
    #[inline(always)]
    fn bits(&self, sequence: usize, first: usize) -> u64 {
        let at = self.starts[sequence % self.starts.len()] + first / 64;
        let word = |i: usize| self.words.get(i).copied().unwrap_or(0);
        let rest = if first.is_multiple_of(64) { 0 } else { word(at + 1) << (64 - first % 64) };
        word(at) >> (first % 64) | rest
    }
}

/// What a mask lets a query see of the keys that are tokens.
#[derive(Clone, Debug)]
pub(crate) struct Shown<M> {
    pub(crate) mask: M,
    /// All of them, if there is nothing here.
    pub(crate) tokens: Option<Arc<Tokens>>,
}

impl<M: Mask> Mask for Shown<M> {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        let is_token = |tokens: &Arc<Tokens>| tokens.bits(site.batch, key) & 1 == 1;
        self.tokens.as_ref().is_none_or(is_token) && self.mask.visible(site, query, key)
    }

    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        self.mask.hull(site, queries)
    }

    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let mask = self.mask.coverage(site, queries, keys.clone());
        let Some(tokens) = &self.tokens else { return mask };
        let (mut some, mut all) = (false, true);
        for first in keys.clone().step_by(64) {
            let valid = range_bits(first as isize..keys.end as isize, first);
            let bits = tokens.bits(site.batch, first) & valid;
            some |= bits != 0;
            all &= bits == valid;
        }
        match mask {
            _ if !some => Coverage::Empty,
            Coverage::Full if !all => Coverage::Partial,
            mask => mask,
        }
    }

    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let tokens = self.tokens.as_ref().map_or(u64::MAX, |tokens| tokens.bits(site.batch, first));
        self.mask.bits(site, query, first) & tokens
    }

    fn fill_bits(&self, isa: Isa, block: &Block<'_>, words: &mut [u64], stride: usize) {
        self.mask.fill_bits(isa, block, words, stride);
        let Some(tokens) = &self.tokens else { return };
        let len = block.keys.len().div_ceil(64);
        for (_, row) in block.queries.clone().zip(words.chunks_mut(stride)) {
            for (i, word) in row[..len].iter_mut().enumerate() {
                *word &= tokens.bits(block.site.batch, block.keys.start + 64 * i);
            }
        }
    }

    fn is_shared(&self) -> bool {
        self.tokens.is_none() && self.mask.is_shared()
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        self.mask.check(dims)?;
        match &self.tokens {
            Some(tokens) if tokens.batch != 1 && tokens.batch != dims.batch => {
                let expected = format!("[batch | 1, len] with batch = {} as q has it", dims.batch);
                Err(Error::shape("tokens", expected, &[tokens.batch, dims.kv_len]))
            }
            _ => Ok(()),
        }
    }
}
