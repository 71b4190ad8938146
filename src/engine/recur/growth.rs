//! Whether log decays let a state grow.

use ndarray::{ArrayView, Axis};

use crate::engine::parallel;
use crate::simd::mem::CONCURRENT_STREAMS;
use crate::simd::{Isa, Kernel, Simd};

/// Elements that a thread looks at by itself.
const PIECE: usize = 1 << 17;

/// Whether any element is above 0; NaN is not.
pub(crate) fn any_above_zero<D: ndarray::Dimension>(isa: Isa, x: ArrayView<'_, f32, D>) -> bool {
    match (0..x.ndim()).map(Axis).find(|&axis| x.len_of(axis) > 1) {
        Some(axis) if x.len() > PIECE => {
            let middle = x.len_of(axis) / 2;
            let (a, b) = x.split_at(axis, middle);
            let (a, b) = parallel::both(|| any_above_zero(isa, a), || any_above_zero(isa, b));
            a || b
        }
        _ => match x.as_slice_memory_order() {
            Some(x) => isa.dispatch(AnyAboveZero(x)),
            // Folded without an exit and into an integer, which the compiler
            // turns into vectors.
            None => x.fold(0u32, |any, &x| any | u32::from(x > 0.0)) != 0,
        },
    }
}

/// Whether any element is above 0, read as [`CONCURRENT_STREAMS`] concurrent prefetch
/// streams.
struct AnyAboveZero<'a>(&'a [f32]);

impl Kernel for AnyAboveZero<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let part = self.0.len() / CONCURRENT_STREAMS / S::LANES * S::LANES;
        let mut most = [s.splat(0.0); CONCURRENT_STREAMS];
        for at in (0..part).step_by(S::LANES) {
            for place in 0..CONCURRENT_STREAMS {
                // A NaN leaves what was there.
                most[place] = s.max(s.load(&self.0[place * part + at..]), most[place]);
            }
        }
        let rest = &self.0[CONCURRENT_STREAMS * part..];
        most.iter().any(|&most| s.reduce_max(most) > 0.0) || rest.iter().any(|&x| x > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, s};

    #[test]
    fn growth_is_found_wherever_it_is() {
        for isa in Isa::available() {
            for len in [1, 7, 16, 127, 128, 129, 300] {
                let mut x = Array1::from_shape_fn(len, |i| [f32::NAN, f32::NEG_INFINITY, -0.0, -1.0][i % 4]);
                assert!(!any_above_zero(isa, x.view()), "{isa} {len}");
                for at in 0..len {
                    let before = std::mem::replace(&mut x[at], 1e-30);
                    assert!(any_above_zero(isa, x.view()), "{isa} {len} {at}");
                    assert_eq!(any_above_zero(isa, x.slice(s![..;2])), at % 2 == 0, "{isa} {len} {at}");
                    x[at] = before;
                }
            }
        }
    }
}
