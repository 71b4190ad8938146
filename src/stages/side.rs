//! Rows of tokens in scratch: what heads have of a token, side by side.

use ndarray::{Array2, ArrayView3, ArrayView4, ArrayViewMut3, s};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::copy_rows;
use crate::error::Result;
use crate::simd::Isa;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::stages::pass::{Pass, Scratch};

/// Rows of a task.
const TASK: usize = 64;

/// The rows `[batch, 1, len, heads * dim]` of an array `[batch, heads, len, dim]`.
pub(crate) fn run<'a, T: Element>(
    pass: &mut Pass<'a>,
    isa: Isa,
    x: ArrayView4<'_, T>,
) -> Result<Scratch<'a>> {
    let (batch, heads, len, dim) = x.dim();
    let mut rows = pass.rows((batch, 1, len, heads * dim))?;
    let (stride, pieces) = (rows.stride(), len.div_ceil(TASK));
    let claims = claim_words(batch * len);
    pass.stage(
        || 0,
        bytes_for::<u64>(claims),
        |mut arena| {
            let to = Parts::new(rows.numbers_mut(), stride, arena.take(claims));
            let (x, start) = (T::any(Heads::new(x)), |_| ());
            let tasks = if heads * dim == 0 { 0 } else { batch * pieces };
            parallel::for_each(parallel::threads(), tasks, start, |(), task| {
                let (b, at) = (task / pieces, task % pieces * TASK);
                let end = (at + TASK).min(len);
                let to = to.take_run(b * len + at..b * len + end);
                to.fill(0.0);
                for h in 0..heads {
                    copy_rows(isa, x.rows(b, h, &(at..end)), &mut to[h * dim..], stride);
                }
            });
        },
    );
    Ok(rows)
}

/// The definition, of one batch entry.
pub(crate) fn define<R: Real, T: Element>(x: ArrayView3<'_, T>) -> Array2<R> {
    let (heads, len, dim) = x.dim();
    Array2::from_shape_fn((len, heads * dim), |(t, c)| R::of(x[[c / dim, t, c % dim]].to_f64()))
}

/// Gives heads their part of such rows.
pub(crate) fn spread<R: Real>(rows: &Array2<R>, to: &mut ArrayViewMut3<'_, R>) {
    let dim = to.dim().2;
    for (h, mut to) in to.outer_iter_mut().enumerate() {
        to.assign(&rows.slice(s![.., h * dim..(h + 1) * dim]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;

    #[test]
    fn heads_are_side_by_side() {
        for (heads, len, dim) in [(3, 130, 5), (1, 2, 17), (2, 0, 3), (0, 3, 4), (2, 3, 0)] {
            let x = array(1, (2, heads, len, dim));
            for isa in Isa::available() {
                let got = alone(|pass| Ok(run(pass, isa, x.view())?.of_heads(heads, dim).to_owned()));
                assert!(got == x, "{heads} {len} {dim}");
            }
        }
    }
}
