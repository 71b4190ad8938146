//! Outputs of which some channels are in scratch, and the others are those of
//! an array as they are.

use ndarray::{ArrayView4, ArrayViewMut4};

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyRows, AnyRowsMut};
use crate::simd::mem::{Heads, OutRows, Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Rows of a task.
const TASK: usize = 64;

/// Writes the first columns of `sums`, and the others of `x`, whose heads
/// neighbours share; with `relu` nothing below 0. Nothing is left of `sums`.
pub(crate) fn run<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: ArrayView4<'_, T>,
    (first, relu): (usize, bool),
    mut sums: Scratch<'_>,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let ((batch, heads, len, _), stride) = (sums.dim(), sums.stride());
    let (rows, pieces) = (batch * heads * len, len.div_ceil(TASK));
    let bytes = 2 * bytes_for::<u64>(claim_words(rows));
    pass.stage(
        || 0,
        bytes,
        |mut arena| {
            let Some(out) = out else { return };
            let out = T::any_out(OutRows::new(out, arena.take(claim_words(rows))));
            let sums = Parts::new(sums.numbers_mut(), stride, arena.take(claim_words(rows)));
            let group = heads.checked_div(x.dim().1).unwrap_or(1);
            let x = T::any(Heads::new(x));
            let start = |_| ();
            parallel::for_each(parallel::threads(), batch * heads * pieces, start, |(), task| {
                let (unit, at) = (task / pieces, task % pieces * TASK);
                let (b, h, rows) = (unit / heads, unit % heads, at..(at + TASK).min(len));
                isa.dispatch(Rows {
                    x: x.rows(b, h / group, &rows),
                    sums: sums.take_run(unit * len + rows.start..unit * len + rows.end),
                    stride,
                    first,
                    relu,
                    out: out.take(b, h, rows),
                });
            });
        },
    );
}

struct Rows<'a, 'b> {
    x: AnyRows<'a>,
    sums: &'a mut [f32],
    stride: usize,
    first: usize,
    relu: bool,
    out: AnyRowsMut<'b>,
}

impl Kernel for Rows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, sums, stride, first, relu, mut out } = self;
        let (cols, zero) = (x.cols(), s.splat(0.0));
        for (t, row) in sums.chunks_exact_mut(stride.max(1)).enumerate() {
            for c in (first..cols).step_by(S::LANES) {
                let end = (c + S::LANES).min(cols);
                s.store_tail(&mut row[c..end], x.load(s, t, c));
            }
            if relu {
                for x in row[..cols].chunks_mut(S::LANES) {
                    let positive = s.max(zero, s.load_tail(x));
                    s.store_tail(x, positive);
                }
            }
            out.write(s, t, row, 1.0);
        }
    }
}
