//! Changes of scores of images of their own shapes.

use super::smooth::Sums;
use super::{Score, Smooth};
use crate::error::Result;
use crate::input::{Dims, Site};
use crate::keys::images::Each;
use crate::simd::Simd;

/// That of the image whose sequence it is. All are of the same heads and tables.
impl<F: Score> Score for Each<F> {
    const IDENTITY: bool = F::IDENTITY;
    const ANY_PAIR: bool = F::ANY_PAIR;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        self.at(site.batch).define(site, query, key, score)
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        self.at(site.batch).apply(s, site, query, first, scores);
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        self.all().iter().try_for_each(|score| score.check(dims))
    }
}

impl<F: Smooth> Smooth for Each<F> {
    fn table(&self) -> [usize; 2] {
        self.all().first().map_or([0, 0], F::table)
    }

    fn define_entry(&self, site: &Site, query: usize, key: usize, score: f64) -> Option<(usize, f64)> {
        self.at(site.batch).define_entry(site, query, key, score)
    }

    #[inline(always)]
    fn pull<S: Simd>(
        &self,
        s: S,
        site: &Site,
        query: usize,
        first: usize,
        before: &mut [f32],
        gradients: &mut [f32],
        to: Sums<'_>,
    ) {
        self.at(site.batch).pull(s, site, query, first, before, gradients, to);
    }
}
