//! What may happen to a score between the dot product and the weights.
//!
//! A score arrives as `scale * q.k`, in natural units, and leaves as what
//! the exponential sees. A score of -inf makes its key invisible to the
//! query, exactly as a mask does.

use crate::error::Result;
use crate::input::{Dims, Site};
use crate::simd::Simd;

/// A change of scores. Tuples apply their parts in order.
pub trait Score: Send + Sync {
    /// Whether scores stay as they are, so that engines can leave it out.
    const IDENTITY: bool = false;

    /// The definition: what becomes of the score of one pair.
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64;

    /// The same for the scores of one query with the keys from `first` on.
    /// Implementations carry `#[inline(always)]`.
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]);

    /// Whether it fits a call of these sizes.
    ///
    /// # Errors
    /// An error that names the array or parameter that does not.
    fn check(&self, dims: &Dims) -> Result<()> {
        let _ = dims;
        Ok(())
    }
}

/// Scores as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plain;

impl Score for Plain {
    const IDENTITY: bool = true;

    fn define(&self, _: &Site, _: usize, _: usize, score: f64) -> f64 {
        score
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, _: &Site, _: usize, _: usize, _: &mut [f32]) {}
}

/// A change of scores from a closure; see [`score_fn`].
#[derive(Clone, Copy, Debug)]
pub struct ScoreFn<F>(F);

/// A change of scores from a closure of `(score, site, query, key)`. It is
/// inlined into the kernel, where the compiler vectorises what it can.
pub fn score_fn<F: Fn(f32, &Site, usize, usize) -> f32 + Send + Sync>(f: F) -> ScoreFn<F> {
    ScoreFn(f)
}

impl<F: Fn(f32, &Site, usize, usize) -> f32 + Send + Sync> Score for ScoreFn<F> {
    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        f64::from((self.0)(score as f32, site, query, key))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        for (t, score) in scores.iter_mut().enumerate() {
            *score = (self.0)(*score, site, query, first + t);
        }
    }
}

impl<A: Score, B: Score> Score for (A, B) {
    const IDENTITY: bool = A::IDENTITY && B::IDENTITY;

    fn define(&self, site: &Site, query: usize, key: usize, score: f64) -> f64 {
        self.1.define(site, query, key, self.0.define(site, query, key, score))
    }
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, first: usize, scores: &mut [f32]) {
        self.0.apply(s, site, query, first, scores);
        self.1.apply(s, site, query, first, scores);
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        self.0.check(dims)?;
        self.1.check(dims)
    }
}
