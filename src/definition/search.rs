//! The definition of searches in `f64`.

use std::collections::HashSet;

use crate::attention::SELECTION_MARGIN;
use crate::select::{Forced, Pick, Rule};

use super::select::chosen;

/// The places of the `k` highest numbers, ascending, and those in doubt.
pub(crate) fn best(scores: &[f64], k: usize) -> (Vec<usize>, Vec<usize>) {
    chosen(&Pick { rule: Rule::TopK(k), forced: Forced::default() }, scores)
}

/// A walk along a graph of so many keys.
pub(crate) struct Walk {
    pub(crate) entry: usize,
    pub(crate) pool: usize,
    pub(crate) keys: usize,
}

/// From the entry always on to the neighbours of the best of the pool that has not
/// been left yet: the pool, best first, and whether no two scores that were compared
/// are nearly equal. What has no score is last.
pub(crate) fn walk(
    how: &Walk,
    edges: impl Fn(usize) -> Vec<usize>,
    score: impl Fn(usize) -> f64,
) -> (Vec<usize>, bool) {
    if how.keys == 0 {
        return (Vec::new(), true);
    }
    let score = |j: usize| Some(score(j) + 0.0).filter(|x| !x.is_nan()).unwrap_or(f64::NEG_INFINITY);
    let (mut pool, mut left, mut met) = (vec![how.entry], HashSet::new(), HashSet::from([how.entry]));
    while let Some(&at) = pool.iter().find(|&j| !left.contains(j)) {
        left.insert(at);
        pool.extend(edges(at).into_iter().filter(|&j| met.insert(j)));
        pool.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
        pool.truncate(how.pool);
    }
    let mut scores: Vec<f64> = met.into_iter().map(score).collect();
    scores.sort_by(f64::total_cmp);
    let finite = scores.iter().filter(|x| x.is_finite());
    let tolerance = SELECTION_MARGIN * finite.fold(0f64, |most, x| most.max(x.abs()));
    let sure = scores.windows(2).all(|pair| pair[0] == pair[1] || pair[1] - pair[0] > tolerance);
    (pool, sure)
}
