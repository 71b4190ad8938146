//! Sums of results in scratch, rounded once.

use std::ops::Range;

use ndarray::{ArrayView4, ArrayViewMut4};

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyRows, AnyRowsMut, IntoAny};
use crate::simd::mem::{Heads, OutRows, Parts, RowsMut, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Writes `a + b`. Nothing is left of `a`.
pub(crate) fn run<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    mut a: Scratch<'_>,
    b: &Scratch<'_>,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    add(pass, isa, &mut a, b, 1.0, out);
}

/// Adds `b` to `a`, and writes that times a factor where there is a place for it.
pub(crate) fn add<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    a: &mut Scratch<'_>,
    b: &Scratch<'_>,
    factor: f32,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let ((batch, heads, len, _), stride) = (a.dim(), a.stride());
    let rows = batch * heads * len;
    let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for::<u64>(claim_words(batch * heads));
    pass.stage(
        || 0,
        bytes,
        |mut arena| {
            let out = out.map(|out| T::any_out(OutRows::new(out, arena.take(claim_words(rows)))));
            let a = Parts::new(a.numbers_mut(), len * stride, arena.take(claim_words(batch * heads)));
            parallel::for_each(
                parallel::threads(),
                batch * heads,
                |_| (),
                |(), unit| {
                    let (a, first) = (a.take(unit), unit * len * stride);
                    let b = &b.numbers()[first..first + a.len()];
                    let out = out.as_ref().map(|out| out.take(unit / heads, unit % heads, 0..len));
                    isa.dispatch(Rows { a, b, stride, factor, out });
                },
            );
        },
    );
}

/// Adds `x` to an array of its shape.
pub(crate) fn onto(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: ArrayView4<'_, f32>,
    to: Option<ArrayViewMut4<'_, f32>>,
) {
    let (batch, heads, len, _) = x.dim();
    let claims = claim_words(batch * heads * len);
    pass.stage(
        || 0,
        bytes_for::<u64>(claims),
        |mut arena| {
            let Some(to) = to else { return };
            let (to, x) = (OutRows::new(to, arena.take(claims)), f32::any(Heads::new(x)));
            parallel::for_each(
                parallel::threads(),
                batch * heads,
                |_| (),
                |(), unit| {
                    let (b, h) = (unit / heads, unit % heads);
                    isa.dispatch(Onto { x: x.rows(b, h, &(0..len)), to: to.take(b, h, 0..len) });
                },
            );
        },
    );
}

struct Onto<'a> {
    x: AnyRows<'a>,
    to: RowsMut<'a, f32>,
}

impl Kernel for Onto<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, mut to } = self;
        for i in 0..x.len() {
            let Some(row) = to.row(i) else {
                (0..x.cols()).for_each(|j| to.set(i, j, to.at(i, j) + x.at(i, j)));
                continue;
            };
            for (v, row) in row.chunks_mut(S::LANES).enumerate() {
                s.store_tail(row, s.add(s.load_tail(row), x.load(s, i, v * S::LANES)));
            }
        }
    }
}

/// Rows of a task of [`of`].
const TASK: usize = 32;

/// Writes the sums of arrays of one shape, added up in their order.
pub(crate) fn of<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    parts: &[ArrayView4<'_, f32>],
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let (batch, heads, len, dim) = parts.first().map_or((0, 0, 0, 0), |x| x.dim());
    let (rows, pieces, stride) = (batch * heads * len, len.div_ceil(TASK), dim.next_multiple_of(MAX_LANES));
    let workers = parallel::threads();
    let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for_shares(workers, bytes_for::<f32>(stride));
    pass.stage(
        || 0,
        bytes,
        |mut arena| {
            let Some(out) = out else { return };
            let out = T::any_out(OutRows::new(out, arena.take(claim_words(rows))));
            let shares = arena.shares(workers, bytes_for::<f32>(stride));
            let start = |worker| shares.take(worker).take::<f32>(stride);
            parallel::for_each(workers, batch * heads * pieces, start, |row, task| {
                let (unit, at) = (task / pieces, task % pieces * TASK);
                let rows = at..(at + TASK).min(len);
                let out = out.take(unit / heads, unit % heads, rows.clone());
                isa.dispatch(Sums { parts, at: (unit / heads, unit % heads), rows, row, out });
            });
        },
    );
}

struct Sums<'a, 'b> {
    parts: &'a [ArrayView4<'b, f32>],
    at: (usize, usize),
    rows: Range<usize>,
    row: &'a mut [f32],
    out: AnyRowsMut<'a>,
}

impl Kernel for Sums<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { parts, at: (b, h), rows, row, mut out } = self;
        for (i, t) in rows.enumerate() {
            row.fill(0.0);
            for part in parts {
                let x = f32::any(Heads::new(part.reborrow())).rows(b, h, &(t..t + 1));
                for c in (0..x.cols()).step_by(S::LANES) {
                    let sum = s.add(s.load(&row[c..]), x.load(s, 0, c));
                    s.store(&mut row[c..], sum);
                }
            }
            out.write(s, i, row, 1.0);
        }
    }
}

struct Rows<'a, 'b> {
    a: &'a mut [f32],
    b: &'a [f32],
    stride: usize,
    factor: f32,
    out: Option<AnyRowsMut<'b>>,
}

impl Kernel for Rows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let stride = self.stride.max(1);
        for (t, (a, b)) in self.a.chunks_exact_mut(stride).zip(self.b.chunks_exact(stride)).enumerate() {
            for (a, b) in a.chunks_exact_mut(S::LANES).zip(b.chunks_exact(S::LANES)) {
                s.store(a, s.add(s.load(a), s.load(b)));
            }
            if let Some(out) = &mut self.out {
                out.write(s, t, a, self.factor);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::pass::alone;
    use crate::stages::window::join;
    use crate::testing::arrays::array;
    use half::f16;
    use ndarray::Array4;

    #[test]
    fn what_is_added_to_lies_anyhow() {
        let (x, start) = (array(1, (2, 3, 7, 19)), array(2, (2, 3, 7, 19)));
        for isa in Isa::available() {
            for turned in [false, true] {
                let mut to = if turned {
                    let turned = start.view().reversed_axes().as_standard_layout().into_owned();
                    turned.reversed_axes()
                } else {
                    start.clone()
                };
                let cell = std::cell::RefCell::new(&mut to);
                alone(|pass| {
                    onto(pass, isa, x.view(), Some(cell.borrow_mut().view_mut()));
                    Ok(())
                });
                assert_eq!(to, &start + &x);
            }
        }
    }

    #[test]
    fn it_is_the_sum() {
        let (a, b) = (array(1, (2, 3, 7, 19)), array(2, (2, 3, 7, 19)));
        for isa in Isa::available() {
            let mut out = Array4::from_elem(a.dim(), f16::NAN);
            let to = std::cell::RefCell::new(&mut out);
            alone(|pass| {
                let (a, b) = (join(pass, isa, 3, None, a.view())?, join(pass, isa, 3, None, b.view())?);
                let parts = [a.view(), b.view()];
                let mut both = pass.rows(a.dim())?;
                of(pass, isa, &parts, both.view_mut());
                if both.view_mut().is_some() {
                    let apart = both.view().to_owned() - a.view() - b.view();
                    assert!(apart.iter().all(|x| x.abs() < 1e-6));
                }
                run(pass, isa, a, &b, Some(to.borrow_mut().view_mut()));
                Ok(())
            });
            assert!(out.iter().zip(&(&a + &b)).all(|(got, &want)| *got == f16::from_f32(want)));
            let to = std::cell::RefCell::new(&mut out);
            alone(|pass| {
                let (mut a, b) = (join(pass, isa, 3, None, a.view())?, join(pass, isa, 3, None, b.view())?);
                add::<f16>(pass, isa, &mut a, &b, 1.0, None);
                add(pass, isa, &mut a, &b, 0.5, Some(to.borrow_mut().view_mut()));
                Ok(())
            });
            let twice = (&a + &b + &b) * 0.5;
            assert!(out.iter().zip(&twice).all(|(got, &want)| *got == f16::from_f32(want)));
        }
    }
}
