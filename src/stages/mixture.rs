//! Mixtures of softmaxes: a row of weights is a sum of softmaxes, each over a set of
//! columns of its own.

use crate::definition::number::{Real, softmax};
use crate::keys::Run;
use crate::simd::exp::exp;
use crate::simd::{Kernel, Simd};

/// `weights_j = sum_r shares_r softmax(scores of set r)_j`, of the sets that have `j`.
/// Scores that no set has may be anything. All are spoilt.
pub(crate) struct Mixture<'a, F> {
    pub(crate) scores: &'a mut [f32],
    pub(crate) weights: &'a mut [f32],
    /// The columns of a set.
    pub(crate) set: F,
    pub(crate) shares: &'a [f32],
}

/// Columns whose bits are held at once.
const HELD: usize = 1024;

/// Sets the bits of the columns `first..` that runs name.
#[inline(always)]
fn mark(runs: &[Run], first: usize, words: &mut [u64]) {
    let end = first + 64 * words.len();
    let from = runs.partition_point(|run| run.range().end <= first);
    for run in runs[from..].iter().take_while(|run| (run.start as usize) < end) {
        let (start, end) = ((run.start as usize).max(first) - first, run.range().end.min(end) - first);
        let (head, last) = (start / 64, (end - 1) / 64);
        let (low, high) = (u64::MAX << (start % 64), u64::MAX >> (63 - (end - 1) % 64));
        if head == last {
            words[head] |= low & high;
        } else {
            words[head] |= low;
            words[head + 1..last].fill(u64::MAX);
            words[last] |= high;
        }
    }
}

impl<'b, F: Fn(usize) -> &'b [Run]> Kernel for Mixture<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, weights, set, shares } = self;
        let (n, mut words) = (scores.len(), [0u64; HELD / 64]);
        let (none, zero) = (s.splat(f32::NEG_INFINITY), s.splat(0.0));
        let valid = |words: &[u64], at: usize| s.mask(words[at / 64] >> (at % 64));
        // What no set has must not matter.
        let mut most = none;
        for first in (0..n).step_by(HELD) {
            words.fill(0);
            (0..shares.len()).for_each(|of| mark(set(of), first, &mut words));
            let end = n.min(first + HELD);
            for (v, x) in scores[first..end].chunks_mut(S::LANES).enumerate() {
                let x_ = s.select(valid(&words, v * S::LANES), s.load_tail(x), none);
                // NaN is not the larger: it comes through in the sum.
                most = s.max(x_, most);
                s.store_tail(x, x_);
            }
        }
        let base = s.splat(s.reduce_max(most));
        for x in scores.chunks_mut(S::LANES) {
            let weight = exp(s, s.sub(s.load_tail(x), base));
            s.store_tail(x, weight);
        }
        weights.fill(0.0);
        for (of, &share) in shares.iter().enumerate() {
            let mut sum = zero;
            for first in (0..n).step_by(HELD) {
                words.fill(0);
                mark(set(of), first, &mut words);
                let end = n.min(first + HELD);
                for (v, x) in scores[first..end].chunks(S::LANES).enumerate() {
                    sum = s.add(sum, s.select(valid(&words, v * S::LANES), s.load_tail(x), zero));
                }
            }
            let factor = s.splat(share / s.reduce_add(sum));
            for first in (0..n).step_by(HELD) {
                if n > HELD {
                    words.fill(0);
                    mark(set(of), first, &mut words);
                }
                let end = n.min(first + HELD);
                let rows = weights[first..end].chunks_mut(S::LANES).zip(scores[first..end].chunks(S::LANES));
                for (v, (to, x)) in rows.enumerate() {
                    let before = s.load_tail(to);
                    let x = s.mul_add(factor, s.load_tail(x), before);
                    s.store_tail(to, s.select(valid(&words, v * S::LANES), x, before));
                }
            }
        }
    }
}

/// The definition: the columns of each set with what that adds to their weights.
pub(crate) fn define<'a, R: Real>(
    scores: &[R],
    sets: impl Iterator<Item = &'a [Run]>,
    shares: &[f32],
) -> Vec<(usize, R)> {
    let of = |(set, &share): (&[Run], &f32)| {
        let columns: Vec<usize> = set.iter().flat_map(|run| run.range()).collect();
        let weights = softmax(&columns.iter().map(|&j| scores[j]).collect::<Vec<R>>());
        let weights = weights.into_iter().map(move |weight| R::of(f64::from(share)) * weight);
        columns.into_iter().zip(weights).collect::<Vec<_>>()
    };
    sets.zip(shares).flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[test]
    fn a_mixture_is_its_definition_and_what_no_set_has_is_nothing() {
        for n in [1usize, 7, 64, 130, 2500] {
            let scores: Vec<f32> = (0..n).map(|j| ((j * 37 % 101) as f32 - 50.0) / 9.0).collect();
            let run = |start: usize, end: usize| Run {
                start: start.min(n - 1) as u32,
                len: end.min(n).saturating_sub(start.min(n - 1)).max(1) as u32,
            };
            let sets = [vec![run(0, 3), run(60, 70)], vec![run(1, 2000)], vec![run(n - 1, n)]];
            let shares = [0.5, -0.25, 2.0];
            let mut want = vec![None; n];
            for (j, weight) in define::<f64>(
                &scores.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
                sets.iter().map(|set| &set[..]),
                &shares,
            ) {
                want[j] = Some(want[j].unwrap_or(0.0) + weight);
            }
            for isa in Isa::available() {
                let (mut scores, mut weights) = (scores.clone(), vec![f32::NAN; n]);
                scores
                    .iter_mut()
                    .zip(&want)
                    .filter(|(_, want)| want.is_none())
                    .for_each(|(x, _)| *x = f32::NAN);
                let set = |of: usize| &sets[of][..];
                isa.dispatch(Mixture { scores: &mut scores, weights: &mut weights, set, shares: &shares });
                for (j, (got, want)) in weights.iter().zip(&want).enumerate() {
                    let want = want.unwrap_or(0.0);
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{n}, {j}: {got}, not {want}");
                }
            }
        }
    }
}
