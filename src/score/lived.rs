//! A bias a key, and the position from which on each key is gone.

use super::{Score, define_shift, shift};
use crate::input::{Dims, Site};
use crate::simd::Simd;

/// `s + bias_j` for queries at positions below `until_j`, and -inf for others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lived<'a> {
    /// `[sequences, kv_heads, keys]`
    pub(crate) bias: &'a [f32],
    pub(crate) until: &'a [u32],
    pub(crate) keys: usize,
    /// Query heads, and how many share a key/value head.
    pub(crate) heads: usize,
    pub(crate) group: usize,
}

impl Lived<'_> {
    /// Bias and end of the keys of a head.
    #[inline(always)]
    fn of(&self, site: &Site) -> (&[f32], &[u32]) {
        let list = (site.batch * self.heads + site.head) / self.group;
        let keys = list * self.keys..list * self.keys + site.kv_len;
        (&self.bias[keys.clone()], &self.until[keys])
    }
}

impl Score for Lived<'_> {
    const ANY_PAIR: bool = true;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        let (bias, until) = self.of(site);
        if site.position(None, query) < until[key] as isize {
            define_shift(score, f64::from(bias[key]))
        } else {
            f64::NEG_INFINITY
        }
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        let (bias, until) = self.of(site);
        let position = site.position(None, query).clamp(0, u32::MAX as isize) as u32;
        let from = first.min(bias.len());
        for ((score, &bias), &until) in scores.iter_mut().zip(&bias[from..]).zip(&until[from..]) {
            *score = if position < until { shift(*score, bias) } else { f32::NEG_INFINITY };
        }
    }

    fn check(&self, _: &Dims) -> crate::error::Result<()> {
        Ok(())
    }
}
