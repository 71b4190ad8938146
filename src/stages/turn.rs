//! Rows on their way into scratch, each turned to a position.

use ndarray::ArrayView4;

use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::math::rope::Turns;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Rows of a task.
const TASK: usize = 64;

/// Positions, as a table has them, and the first element of a row that turns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turning<'a> {
    pub(crate) turns: &'a Turns,
    pub(crate) start: usize,
}

impl Turning<'_> {
    /// Rows `[batch, units, len, dim]` of `x`, whose heads have as many units each: `of`
    /// gives for a unit, counted over the batch, and a place the row and its position;
    /// zeros where there is none.
    pub(crate) fn run<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        isa: Isa,
        x: ArrayView4<'_, T>,
        (units, len): (usize, usize),
        of: impl Fn(usize, usize) -> Option<[usize; 2]> + Sync + Send,
    ) -> Result<Scratch<'p>> {
        let (batch, heads, n, dim) = x.dim();
        let mut turned = pass.rows((batch, units, len, dim))?;
        let (stride, pieces, claims) =
            (turned.stride(), len.div_ceil(TASK), claim_words(batch * units * len));
        pass.stage(
            || 3 * (batch * units * len * dim) as u64,
            bytes_for::<u64>(claims),
            |mut arena| {
                let to = Parts::new(turned.numbers_mut(), stride, arena.take(claims));
                let x = T::any(Heads::new(x));
                let (tasks, start) = (if dim == 0 { 0 } else { batch * units * pieces }, |_| ());
                parallel::for_each(parallel::threads(), tasks, start, |(), task| {
                    let (unit, at) = (task / pieces, task % pieces * TASK);
                    let head = unit % units / (units / heads.max(1)).max(1);
                    let x = x.rows(unit / units, head, &(0..n));
                    let to = to.take_run(unit * len + at..unit * len + (at + TASK).min(len));
                    let of = |place: usize| of(unit, at + place);
                    isa.dispatch(Rows { turning: *self, x, of, to, stride });
                });
            },
        );
        Ok(turned)
    }
}

struct Rows<'a, F> {
    turning: Turning<'a>,
    x: AnyRows<'a>,
    of: F,
    to: &'a mut [f32],
    stride: usize,
}

impl<F: Fn(usize) -> Option<[usize; 2]>> Kernel for Rows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { turning: Turning { turns, start }, x, of, to, stride } = self;
        to.fill(0.0);
        for (place, to) in to.chunks_exact_mut(stride).enumerate() {
            if let Some([row, position]) = of(place) {
                x.part(row..row + 1).pack_rows(s, to, stride);
                turns.turn(s, &mut to[start..], position);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::rope::{Pairs, Rope};
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;

    #[test]
    fn rows_are_turned_to_their_positions() {
        let x = array(1, (2, 2, 70, 10));
        let ways =
            Isa::available().flat_map(|isa| [Pairs::Halves, Pairs::Neighbours].map(|pairs| (pairs, isa)));
        for (pairs, isa) in ways {
            let rope = Rope::builder(6).theta(50.0).pairs(pairs).last().build().unwrap();
            let turns = Turns::new(&rope, &(0..20).collect::<Vec<_>>());
            let of = |unit: usize, place: usize| {
                (!place.is_multiple_of(3)).then_some([69 - place, (unit + place) % 20])
            };
            let got = alone(|pass| {
                let turning = Turning { turns: &turns, start: rope.start(10) };
                Ok(turning.run(pass, isa, x.view(), (4, 66), of)?.view().to_owned())
            });
            for (unit, place) in (0..8).flat_map(|unit| (0..66).map(move |place| (unit, place))) {
                let mut want = vec![0.0; 10];
                if let Some([row, position]) = of(unit, place) {
                    want = (0..10).map(|c| f64::from(x[[unit / 4, unit % 4 / 2, row, c]])).collect();
                    rope.define(position as f64, &mut want);
                }
                for (c, want) in want.into_iter().enumerate().filter(|_| !got.is_empty()) {
                    assert!((f64::from(got[[unit / 4, unit % 4, place, c]]) - want).abs() < 1e-5, "{isa}");
                }
            }
        }
    }
}
