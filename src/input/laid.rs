//! Learned arrays that kernels read row by row.

use std::ops::Deref;

use ndarray::{Array, Dimension, Ix2};

/// A learned array whose rows lie one after the other, however it came: kernels read
/// slices, which an array of other strides does not have, and what is not there would
/// be left out without a word.
#[derive(Clone, Debug)]
pub(crate) struct Laid<D: Dimension>(Array<f32, D>);

impl<D: Dimension> From<Array<f32, D>> for Laid<D> {
    fn from(x: Array<f32, D>) -> Self {
        if x.is_standard_layout() { Self(x) } else { Self(x.as_standard_layout().into_owned()) }
    }
}

impl<D: Dimension> Deref for Laid<D> {
    type Target = Array<f32, D>;

    fn deref(&self) -> &Array<f32, D> {
        &self.0
    }
}

impl<D: Dimension> Laid<D> {
    /// The numbers, in the order of the axes.
    #[inline(always)]
    pub(crate) fn numbers(&self) -> &[f32] {
        // Always of standard layout.
        self.0.as_slice().unwrap_or_default()
    }
}

impl Laid<Ix2> {
    /// The numbers of a row.
    #[inline(always)]
    pub(crate) fn of_row(&self, row: usize) -> &[f32] {
        let columns = self.0.ncols();
        &self.numbers()[row * columns..][..columns]
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2, s};

    use super::*;

    #[test]
    fn rows_are_there_whatever_the_strides() {
        let x = Array2::from_shape_fn((3, 5), |(i, j)| (5 * i + j) as f32);
        let turned = x.t().as_standard_layout().into_owned().reversed_axes();
        let backwards = Array2::from_shape_fn((3, 5), |(i, j)| (5 * i + 4 - j) as f32);
        let backwards = backwards.slice_move(s![.., ..;-1]);
        assert!(!turned.is_standard_layout() && !backwards.is_standard_layout());
        for given in [x.clone(), turned, backwards] {
            let laid = Laid::from(given);
            assert_eq!((&*laid, laid.of_row(2)), (&x, &[10.0, 11.0, 12.0, 13.0, 14.0][..]));
        }
        let every_other = Laid::from(Array1::from_iter((0..6).map(|i| i as f32)).slice_move(s![..;-2]));
        assert_eq!(every_other.numbers(), [5.0, 3.0, 1.0]);
        assert!(Laid::from(Array2::<f32>::zeros((2, 0))).of_row(1).is_empty());
    }
}
