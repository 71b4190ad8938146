//! The definition of softmax attention over rows of a head, on any numbers.

use ndarray::{Array2, ArrayView1};

use crate::definition::number::{Real, softmax};

/// `score` makes of the scaled dot product of a query and a key what the
/// exponential sees, and is asked where the query `sees` the key alone.
pub(crate) fn attend<R: Real>(
    [q, k, v]: [&Array2<R>; 3],
    scale: f64,
    sees: impl Fn(usize, usize) -> bool,
    score: impl Fn(usize, usize, R) -> R,
) -> Array2<R> {
    let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
    for (i, mut out) in out.outer_iter_mut().enumerate() {
        let weights = weights(q.row(i), k, scale, |j| sees(i, j), |j, x| score(i, j, x));
        for (c, out) in out.iter_mut().enumerate() {
            *out = R::total(weights.iter().map(|&(j, weight)| (weight, v[[j, c]])));
        }
    }
    out
}

/// The keys of which one query sees something, and their weights.
pub(crate) fn weights<R: Real>(
    q: ArrayView1<'_, R>,
    k: &Array2<R>,
    scale: f64,
    sees: impl Fn(usize) -> bool,
    score: impl Fn(usize, R) -> R,
) -> Vec<(usize, R)> {
    let dot = |j| R::dot(q.iter().copied().zip(k.row(j).iter().copied()));
    let seen = (0..k.dim().0).filter(|&j| sees(j));
    weighed(seen.map(|j| (j, score(j, dot(j) * R::rounded(scale, 1.0)))))
}

/// The same of keys with their scores.
pub(crate) fn weighed<R: Real>(scored: impl Iterator<Item = (usize, R)>) -> Vec<(usize, R)> {
    // A score of -inf hides its key.
    let visible = scored.filter(|(_, score)| score.value() != f64::NEG_INFINITY);
    let (keys, scores): (Vec<usize>, Vec<R>) = visible.unzip();
    keys.into_iter().zip(softmax(&scores)).collect()
}

/// `score + by` as scores are shifted: -inf where either is, and otherwise no
/// less than the least number that kernels have.
pub(crate) fn shifted<R: Real>(score: R, by: R) -> R {
    const LEAST: f64 = f32::MIN as f64;
    if score.value() == f64::NEG_INFINITY || by.value() == f64::NEG_INFINITY {
        return R::of(f64::NEG_INFINITY);
    }
    let sum = score + by;
    if sum.value() < LEAST { R::of(LEAST) } else { sum }
}
