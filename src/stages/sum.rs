//! The sum of two results in scratch, rounded once.

use ndarray::ArrayViewMut4;

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::AnyRowsMut;
use crate::simd::mem::{OutRows, Parts, bytes_for, claim_words};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Writes `a + b`. Nothing is left of `a`.
pub(crate) fn run<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    mut a: Scratch<'_>,
    b: &Scratch<'_>,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let ((batch, heads, len, _), stride) = (a.dim(), a.stride());
    let rows = batch * heads * len;
    let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for::<u64>(claim_words(batch * heads));
    pass.stage(
        || 0,
        bytes,
        |mut arena| {
            let Some(out) = out else { return };
            let out = T::any_out(OutRows::new(out, arena.take(claim_words(rows))));
            let a = Parts::new(a.numbers_mut(), len * stride, arena.take(claim_words(batch * heads)));
            parallel::for_each(
                parallel::threads(),
                batch * heads,
                |_| (),
                |(), unit| {
                    let (a, first) = (a.take(unit), unit * len * stride);
                    let b = &b.numbers()[first..first + a.len()];
                    let out = out.take(unit / heads, unit % heads, 0..len);
                    isa.dispatch(Rows { a, b, stride, out });
                },
            );
        },
    );
}

struct Rows<'a, 'b> {
    a: &'a mut [f32],
    b: &'a [f32],
    stride: usize,
    out: AnyRowsMut<'b>,
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
            self.out.write(s, t, a, 1.0);
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
    fn it_is_the_sum() {
        let (a, b) = (array(1, (2, 3, 7, 19)), array(2, (2, 3, 7, 19)));
        for isa in Isa::available() {
            let mut out = Array4::from_elem(a.dim(), f16::NAN);
            let to = std::cell::RefCell::new(&mut out);
            alone(|pass| {
                let (a, b) = (join(pass, isa, 3, None, a.view())?, join(pass, isa, 3, None, b.view())?);
                run(pass, isa, a, &b, Some(to.borrow_mut().view_mut()));
                Ok(())
            });
            assert!(out.iter().zip(&(&a + &b)).all(|(got, &want)| *got == f16::from_f32(want)));
        }
    }
}
