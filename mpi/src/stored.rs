//! Arrays as bytes.

use attention_kernels::Element;
use attention_kernels::half::{bf16, f16};
use ndarray::{Array, ArrayView, Dimension, IntoDimension};

/// Numbers that travel in their own type: `f32`, `f16`, `bf16`.
pub trait Stored: Element {
    /// A zero that lives as long as is asked.
    #[doc(hidden)]
    fn zero() -> &'static [Self];
    #[doc(hidden)]
    fn put(numbers: &[Self], to: &mut Vec<u8>);
    #[doc(hidden)]
    fn get(bytes: &[u8]) -> Vec<Self>;
}

macro_rules! stored {
    ($($t:ty: $zero:expr),+) => {$(
        impl Stored for $t {
            fn zero() -> &'static [Self] {
                const { &[$zero] }
            }

            // Both are compiled to copies of memory.
            fn put(numbers: &[Self], to: &mut Vec<u8>) {
                to.extend(numbers.iter().flat_map(|x| x.to_ne_bytes()));
            }

            fn get(bytes: &[u8]) -> Vec<Self> {
                let number = |bytes: &[u8]| Self::from_ne_bytes(std::array::from_fn(|i| bytes[i]));
                bytes.chunks_exact(size_of::<Self>()).map(number).collect()
            }
        }
    )+};
}
stored!(f32: 0.0, f16: f16::ZERO, bf16: bf16::ZERO);

/// Appends the numbers in the order of the axes: the whole array, or each of its rows, by one
/// copy where its numbers are neighbours.
pub(crate) fn pack<T: Stored, D: Dimension>(x: ArrayView<'_, T, D>, to: &mut Vec<u8>) {
    to.reserve(x.len() * size_of::<T>());
    if let Some(all) = x.as_slice() {
        return T::put(all, to);
    }
    for row in x.rows() {
        match row.as_slice() {
            Some(row) => T::put(row, to),
            None => row.iter().for_each(|&x| T::put(&[x], to)),
        }
    }
}

/// Takes numbers off the front of `from`. Sizes were agreed on before: what is missing
/// would be 0.
pub(crate) fn unpack<T: Stored, S: IntoDimension>(from: &mut &[u8], shape: S) -> Array<T, S::Dim> {
    let dim = shape.into_dimension();
    let bytes = (dim.size() * size_of::<T>()).min(from.len());
    let (mine, rest) = from.split_at(bytes);
    *from = rest;
    let mut numbers = T::get(mine);
    numbers.resize(dim.size(), T::default());
    Array::from_shape_vec(dim.clone(), numbers).unwrap_or_else(|_| Array::from_elem(dim, T::default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array3, s};

    #[test]
    fn arrays_come_back_however_they_lie() {
        let x = Array3::from_shape_fn((3, 4, 5), |(a, b, c)| (a * 100 + b * 10 + c) as f32 - 0.5);
        let half = x.mapv(bf16::from_f32);
        let reversed = x.slice(s![.., ..;-1, ..;2]);
        let (mut bytes, mut lent) = (Vec::new(), x.view());
        lent.swap_axes(0, 2);
        for view in [x.view(), x.slice(s![1.., 1..3, ..]), x.slice(s![.., .., 1..2]), lent, reversed] {
            pack(view, &mut bytes);
        }
        pack(half.slice(s![.., 1.., ..]), &mut bytes);
        let mut from = &bytes[..];
        for view in [x.view(), x.slice(s![1.., 1..3, ..]), x.slice(s![.., .., 1..2]), lent, reversed] {
            assert_eq!(unpack::<f32, _>(&mut from, view.dim()), view);
        }
        assert_eq!(unpack::<bf16, _>(&mut from, (3, 3, 5)), half.slice(s![.., 1.., ..]));
        assert!(from.is_empty());
        // What is missing.
        assert_eq!(unpack::<f32, _>(&mut &bytes[..4], 2).to_vec(), [-0.5, 0.0]);
    }
}
