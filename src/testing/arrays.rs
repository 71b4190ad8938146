//! For mechanisms with inputs of their own: arrays of any shape.

use crate::stages::reading::Linear;
use crate::testing::noise;
use ndarray::{Array, Array3, Array4, ArrayView4, Dimension, ShapeBuilder};

/// An array of [`noise`].
pub(crate) fn array<D: Dimension, Sh: ShapeBuilder<Dim = D>>(seed: u64, shape: Sh) -> Array<f32, D> {
    Array::from_shape_simple_fn(shape, noise(seed))
}

/// A layer of [`noise`], `[out, of]`, and what it adds.
pub(crate) fn linear(seed: u64, [out, of]: [usize; 2]) -> Linear {
    (array(seed, (out, of)), Some(array(seed + 50, out)))
}

/// The largest ratio of error to bound; panics above 1 and where one of the
/// two is NaN and the other is not.
pub(crate) fn within(what: &str, got: ArrayView4<'_, f32>, want: &Array4<f64>, bound: &Array3<f64>) -> f64 {
    assert_eq!(got.dim(), want.dim(), "{what}");
    let mut worst = 0f64;
    for ((b, h, t, c), &x) in got.indexed_iter() {
        let (want, bound) = (want[[b, h, t, c]], bound[[b, h, t]]);
        let off = (f64::from(x) - want).abs();
        assert!(
            off <= bound || (x.is_nan() && want.is_nan()),
            "{what}: [{b}, {h}, {t}, {c}] is {x:e}, not {want:e}: off by {off:e}, bound {bound:e}"
        );
        if bound > 0.0 && off > 0.0 {
            worst = worst.max(off / bound);
        }
    }
    worst
}
