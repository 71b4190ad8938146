//! The definition of softmax attention over rows of a head, on any numbers.

use ndarray::Array2;

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
        let dot = |j| R::dot(q.row(i).iter().copied().zip(k.row(j).iter().copied()));
        let seen = (0..k.dim().0).filter(|&j| sees(i, j));
        let scored = seen.map(|j| (j, score(i, j, dot(j) * R::rounded(scale, 1.0))));
        // A score of -inf hides its key.
        let visible = scored.filter(|(_, score)| score.value() != f64::NEG_INFINITY);
        let (keys, scores): (Vec<usize>, Vec<R>) = visible.unzip();
        let weights = softmax(&scores);
        for (c, out) in out.iter_mut().enumerate() {
            *out = R::total(weights.iter().zip(&keys).map(|(&weight, &j)| (weight, v[[j, c]])));
        }
    }
    out
}
