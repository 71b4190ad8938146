//! Rows on their way into scratch: as they are, or of unit length, shifted and
//! scaled.

use ndarray::{Array1, ArrayView1, ArrayView4, Ix2};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::input::laid::Laid;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Rows of a task.
const TASK: usize = 64;

/// The least length that a row is divided by.
pub(crate) const LEAST: f32 = 1e-12;

/// What becomes of rows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lay<'a> {
    /// They are divided by their length.
    pub(crate) unit: bool,
    /// This is added then, `[heads, dim]`.
    pub(crate) add: Option<&'a Laid<Ix2>>,
}

impl Lay<'_> {
    /// The rows of `x`, in scratch of their own.
    pub(crate) fn copy<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        isa: Isa,
        x: ArrayView4<'_, T>,
    ) -> Result<Scratch<'p>> {
        let mut rows = pass.rows(x.dim())?;
        self.run(pass, isa, x, (&mut rows, 0), |_, _| 1.0)?;
        Ok(rows)
    }

    /// Writes the rows of `x`, times `factor(head, row)` in the end, as rows
    /// from `first` on; heads of `x` are shared by neighbours.
    pub(crate) fn run<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        x: ArrayView4<'_, T>,
        (to, first): (&mut Scratch<'_>, usize),
        factor: impl Fn(usize, usize) -> f32 + Sync + Send,
    ) -> Result<()> {
        let ((batch, own, len, _), (_, heads, rows, _), stride) = (x.dim(), to.dim(), to.stride());
        let (units, pieces) = (batch * heads, len.div_ceil(TASK));
        let claims = claim_words(units * rows);
        pass.stage(
            || 0,
            bytes_for::<u64>(claims),
            |mut arena| {
                let to = Parts::new(to.numbers_mut(), stride, arena.take(claims));
                let (x, start) = (T::any(Heads::new(x)), |_| ());
                parallel::for_each(parallel::threads(), units * pieces, start, |(), task| {
                    let (unit, at) = (task / pieces, task % pieces * TASK);
                    let (head, end) = (unit % heads, (at + TASK).min(len));
                    let x = x.rows(unit / heads, head / (heads / own.max(1)).max(1), &(at..end));
                    let to = to.take_run(unit * rows + first + at..unit * rows + first + end);
                    let (of, factor) = (*self, |row: usize| factor(head, at + row));
                    isa.dispatch(Rows { of, head, x, to, stride, factor });
                });
            },
        );
        Ok(())
    }

    /// The definition, of a row of a head.
    pub(crate) fn define<R: Real>(&self, x: ArrayView1<'_, R>, head: usize, factor: R) -> Array1<R> {
        let length = R::dot(x.iter().map(|&x| (x, x))).sqrt().max(R::of(f64::from(LEAST)));
        let row = x.iter().enumerate().map(|(c, &x)| {
            let x = if self.unit { x / length } else { x };
            self.add.map_or(x, |add| x + R::of(f64::from(add[[head, c]]))) * factor
        });
        row.collect()
    }
}

struct Rows<'a, F> {
    of: Lay<'a>,
    head: usize,
    x: AnyRows<'a>,
    to: &'a mut [f32],
    stride: usize,
    factor: F,
}

impl<F: Fn(usize) -> f32> Kernel for Rows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, head, x, to, stride, factor } = self;
        let add = of.add.map(|add| add.of_row(head));
        for (t, to) in to.chunks_exact_mut(stride.max(1)).enumerate() {
            to.fill(0.0);
            let mut squares = s.splat(0.0);
            for c in (0..x.cols()).step_by(S::LANES) {
                let x = x.load(s, t, c);
                squares = s.mul_add(x, x, squares);
                s.store(&mut to[c..], x);
            }
            let length = if of.unit { s.reduce_add(squares).sqrt() } else { 1.0 };
            let length = s.splat(if length < LEAST { LEAST } else { length });
            let factor = s.splat(factor(t));
            for c in (0..x.cols()).step_by(S::LANES) {
                let x = s.div(s.load(&to[c..]), length);
                let x = add.map_or(x, |add| s.add(x, s.load_tail(&add[c..])));
                s.store(&mut to[c..], s.mul(x, factor));
            }
        }
    }
}
