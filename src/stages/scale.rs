//! Rows of scratch, each times a factor.

use ndarray::ArrayViewMut4;

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::AnyRowsMut;
use crate::simd::mem::{OutRows, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Rows of a task.
const TASK: usize = 64;

/// Writes the rows, counted over batch, heads and tokens, times their factors.
pub(crate) fn run<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: &Scratch<'_>,
    factor: impl Fn(usize) -> f32 + Sync + Send,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let ((batch, heads, len, _), stride) = (x.dim(), x.stride());
    let (rows, pieces) = (batch * heads * len, len.div_ceil(TASK));
    let bytes = bytes_for::<u64>(claim_words(rows));
    pass.stage(
        || 0,
        bytes,
        |mut arena| {
            let Some(out) = out else { return };
            let out = T::any_out(OutRows::new(out, arena.take(claim_words(rows))));
            let start = |_| ();
            parallel::for_each(parallel::threads(), batch * heads * pieces, start, |(), task| {
                let (unit, at) = (task / pieces, task % pieces * TASK);
                let (end, first) = ((at + TASK).min(len), unit * len + at);
                let out = out.take(unit / heads, unit % heads, at..end);
                let x = x.numbers().get(first * stride..(unit * len + end) * stride).unwrap_or(&[]);
                isa.dispatch(Rows { x, stride, factor: |row: usize| factor(first + row), out });
            });
        },
    );
}

struct Rows<'a, 'b, F> {
    x: &'a [f32],
    stride: usize,
    factor: F,
    out: AnyRowsMut<'b>,
}

impl<F: Fn(usize) -> f32> Kernel for Rows<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (t, x) in self.x.chunks_exact(self.stride.max(1)).enumerate() {
            self.out.write(s, t, x, (self.factor)(t));
        }
    }
}
