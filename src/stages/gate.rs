//! Gates: rows of an array times rows of factors.

use ndarray::{ArrayView4, ArrayViewMut4};

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyRows, AnyRowsMut, IntoAny};
use crate::simd::mem::{Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::Pass;

/// Rows of a task.
const TASK: usize = 32;

/// Factors `[batch, heads, rows, dim]`, and which of the rows a token has.
pub(crate) type Factors<'a> = (ArrayView4<'a, f32>, &'a (dyn Fn(usize) -> usize + Sync));

/// Writes the rows of `x` times those of both factors, and times `factor(row)`,
/// rows counted over batch, heads and tokens.
pub(crate) fn run<T: Element, O: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: ArrayView4<'_, T>,
    factors: &[Factors<'_>],
    factor: impl Fn(usize) -> f32 + Sync + Send,
    out: Option<ArrayViewMut4<'_, O>>,
) {
    let (batch, heads, len, dim) = x.dim();
    let (rows, pieces, stride) = (batch * heads * len, len.div_ceil(TASK), dim.next_multiple_of(MAX_LANES));
    let workers = parallel::threads();
    let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for_shares(workers, bytes_for::<f32>(stride));
    let flops = || (rows * (factors.len() + 1)) as u64 * dim as u64;
    pass.stage(flops, bytes, |mut arena| {
        let Some(out) = out else { return };
        let out = O::any_out(OutRows::new(out, arena.take(claim_words(rows))));
        let x = T::any(Heads::new(x));
        let shares = arena.shares(workers, bytes_for::<f32>(stride));
        let start = |worker| shares.take(worker).take::<f32>(stride);
        parallel::for_each(workers, batch * heads * pieces, start, |row, task| {
            let (unit, at) = (task / pieces, task % pieces * TASK);
            let (b, h, rows) = (unit / heads, unit % heads, at..(at + TASK).min(len));
            isa.dispatch(Rows {
                x: x.rows(b, h, &rows),
                factors,
                at: [b, h, at],
                factor: |token: usize| factor(unit * len + at + token),
                row,
                out: out.take(b, h, rows),
            });
        });
    });
}

struct Rows<'a, 'b, 'c, F> {
    x: AnyRows<'a>,
    factors: &'a [Factors<'c>],
    /// Entry of the batch, head, first token.
    at: [usize; 3],
    factor: F,
    row: &'a mut [f32],
    out: AnyRowsMut<'b>,
}

impl<F: Fn(usize) -> f32> Kernel for Rows<'_, '_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, factors, at: [batch, head, first], factor, row, mut out } = self;
        let vectors = x.cols().div_ceil(S::LANES);
        for t in 0..x.len() {
            let by = s.splat(factor(t));
            for (v, to) in row.chunks_exact_mut(S::LANES).take(vectors).enumerate() {
                s.store(to, s.mul(x.load(s, t, v * S::LANES), by));
            }
            for (factors, which) in factors {
                let at = which(first + t);
                let by = f32::any(Heads::new(factors.reborrow())).rows(batch, head, &(at..at + 1));
                for (v, to) in row.chunks_exact_mut(S::LANES).take(vectors).enumerate() {
                    s.store(to, s.mul(s.load(to), by.load(s, 0, v * S::LANES)));
                }
            }
            out.write(s, t, row, 1.0);
        }
    }
}
