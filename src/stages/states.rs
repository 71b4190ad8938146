//! States of softmax attention over some keys: rows of an output, and then the
//! largest score and the sum of exponentials relative to it. States of disjoint
//! keys merge into that of all of them.

use crate::engine::parallel;
use crate::engine::row::SoftmaxSum;
use crate::error::Result;
use crate::input::Dim4;
use crate::simd::mem::{Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::arrange::Places;
use crate::stages::pass::{Pass, Scratch};

/// Rows of a task.
const TASK: usize = 64;

/// Numbers of a state besides its output.
const FIGURES: usize = 2;

/// States of outputs of this size, of any value yet.
pub(crate) fn rows<'p>(pass: &mut Pass<'p>, (batch, heads, len, dim): Dim4) -> Result<Scratch<'p>> {
    pass.rows((batch, heads, len, dim.saturating_add(FIGURES)))
}

/// Where states go.
pub(crate) struct Into<'a, 'p> {
    pub(crate) states: &'a mut Scratch<'p>,
    /// The sequence, head and row that the first of those named comes to.
    pub(crate) at: [usize; 3],
    /// Whether these are all that there are, rather than more.
    pub(crate) fresh: bool,
}

/// Merges the states at the places of each row into one.
pub(crate) fn merge(pass: &mut Pass<'_>, isa: Isa, from: &Scratch<'_>, places: &Places, into: Into<'_, '_>) {
    let Into { states, at: [b0, h0, r0], fresh } = into;
    let ([batch, heads, n], (_, units, len, width)) = (places.sizes(), from.dim());
    let ((all, of_all, rows, _), stride) = (states.dim(), states.stride());
    let (pieces, claims) = (n.div_ceil(TASK), claim_words(all * of_all * rows));
    pass.stage(
        || (batch * units * len * width) as u64,
        bytes_for::<u64>(claims),
        |mut arena| {
            let to = Parts::new(states.numbers_mut(), stride, arena.take(claims));
            let each = units / heads.max(1) * len * stride;
            let start = |_| ();
            parallel::for_each(parallel::threads(), batch * heads * pieces, start, |(), task| {
                let (unit, first) = (task / pieces, task % pieces * TASK);
                let (b, h, end) = (unit / heads, unit % heads, (first + TASK).min(n));
                let row = ((b0 + b) * of_all + h0 + h) * rows + r0;
                let to = to.take_run(row + first..row + end);
                let from = from.numbers().get(unit * each..(unit + 1) * each).unwrap_or_default();
                isa.dispatch(Merge {
                    from,
                    places,
                    at: [b, h, first],
                    to,
                    stride,
                    dim: width - FIGURES,
                    fresh,
                });
            });
        },
    );
}

struct Merge<'a> {
    from: &'a [f32],
    places: &'a Places,
    /// Sequence, head and first row.
    at: [usize; 3],
    to: &'a mut [f32],
    stride: usize,
    dim: usize,
    fresh: bool,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, places, at: [b, h, first], to, stride, dim, fresh } = self;
        let figures = |state: &[f32]| SoftmaxSum { max: state[dim], sum: state[dim + 1] };
        for (i, to) in to.chunks_exact_mut(stride).enumerate() {
            let list = places.list(b, h, first + i);
            let state = |place: u32| &from[place as usize * stride..][..stride];
            let before = if fresh { SoftmaxSum::EMPTY } else { figures(to) };
            let higher = |top: SoftmaxSum, x: SoftmaxSum| if x.max > top.max { x } else { top };
            let top = list.iter().map(|&place| figures(state(place))).fold(before, higher);
            // Of no keys an output is no number where it was never written; of far lower
            // scores than others it counts as 0, and NaN in it shows.
            let nothing = |x: SoftmaxSum| x.sum == 0.0;
            let none_before = nothing(before);
            let before = before.relative_to(top);
            let sum = list.iter().fold(before, |sum, &place| sum + figures(state(place)).relative_to(top));
            if none_before {
                to.fill(0.0);
            } else if before != sum {
                let share = s.splat(before / sum);
                for to in to.chunks_exact_mut(S::LANES) {
                    s.store(to, s.mul(s.load(to), share));
                }
            }
            for state in list.iter().map(|&place| state(place)) {
                let own = figures(state);
                if nothing(own) {
                    continue;
                }
                let share = s.splat(own.relative_to(top) / sum);
                for (to, x) in to.chunks_exact_mut(S::LANES).zip(state.chunks_exact(S::LANES)) {
                    s.store(to, s.mul_add(share, s.load(x), s.load(to)));
                }
            }
            (to[dim], to[dim + 1]) = (top.max, sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::marker::PhantomData;

    use super::*;
    use crate::input::{Lengths, Qkv};
    use crate::keys::Keys;
    use crate::mask::Unmasked;
    use crate::score::Plain;
    use crate::stages::arrange::{NONE, Picked};
    use crate::stages::attend::Options;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::s;

    /// Of parts of the keys, some of nothing, in one go and in two.
    #[test]
    fn parts_merge_into_the_whole() {
        let (q, k, v) = (array(1, (2, 3, 70, 9)), array(2, (2, 3, 40, 9)), array(3, (2, 3, 40, 5)));
        for isa in Isa::available() {
            let config =
                Options { mask: Unmasked, score: Plain, scale: None, isa: Some(isa) }.build().unwrap();
            let outs = alone(|pass| {
                // Part `p` of head `h` is unit `3 h + p`.
                let mut parts = rows(pass, (2, 9, 70, 5))?;
                for (p, keys) in [0..13, 13..13, 13..40].into_iter().enumerate() {
                    for h in 0..3 {
                        let mut part = rows(pass, (2, 1, 70, 5))?;
                        let q = q.slice(s![.., h..h + 1, .., ..]);
                        let [k, v] = [&k, &v].map(|x| x.slice(s![.., h..h + 1, keys.clone(), ..]));
                        let x = Qkv { q, k, v, lengths: Lengths::Full, out: PhantomData };
                        config.attend_states(pass, x, Keys::Mask, None, &mut part)?;
                        if let Some(mut parts) = parts.view_mut().filter(|_| !part.numbers().is_empty()) {
                            parts.slice_mut(s![.., 3 * h + p..3 * h + p + 1, .., ..]).assign(&part.view());
                        }
                    }
                }
                let of = |parts: std::ops::Range<usize>| {
                    let row = move |p, i| if parts.contains(&p) { i } else { NONE };
                    let unit = move |unit: usize| (0..70).map(move |i| (unit % 3, i));
                    let rows: Vec<u32> = (0..18).flat_map(unit).map(|(p, i)| row(p, i)).collect();
                    Places::of(Picked { rows: &rows, units: 9, len: 70 }, [2, 3, 70])
                };
                let mut outs = Vec::new();
                for cut in [3, 1] {
                    let mut to = rows(pass, (2, 3, 71, 5))?;
                    for (parts_of, fresh) in [(of(0..cut)?, true), (of(cut..3)?, false)] {
                        merge(pass, isa, &parts, &parts_of, Into { states: &mut to, at: [0, 0, 1], fresh });
                    }
                    outs.push(to.view().slice(s![.., .., 1.., ..]).to_owned());
                }
                Ok(outs)
            });
            let whole = alone(|pass| {
                let mut whole = rows(pass, (2, 3, 70, 5))?;
                let x =
                    Qkv { q: q.view(), k: k.view(), v: v.view(), lengths: Lengths::Full, out: PhantomData };
                config.attend_states(pass, x, Keys::Mask, None, &mut whole)?;
                Ok(whole.view().to_owned())
            });
            for out in outs {
                for ((b, h, i, c), &want) in whole.indexed_iter().filter(|(at, _)| at.3 < 5) {
                    assert!(
                        (out[[b, h, i, c]] - want).abs() < 1e-5,
                        "{isa}: {} and {want}",
                        out[[b, h, i, c]]
                    );
                }
            }
        }
    }
}
