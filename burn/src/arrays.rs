//! Tensors as arrays, and arrays as tensors.

use attention_kernels::{Element, Error, Result};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{DType, Shape};
use burn::tensor::Bytes;
use bytemuck::checked::try_cast_slice;
use half::{bf16, f16};
use ndarray::{Array4, ArrayView4, Axis, CowArray, Ix4, ShapeBuilder, ShapeError};

/// Types that both crates know: [`f32`], [`half::f16`] and [`half::bf16`].
pub(crate) trait Stored: Element + burn::backend::Element + bytemuck::Pod {}

impl Stored for f32 {}
impl Stored for f16 {}
impl Stored for bf16 {}

/// Runs an expression for the type of this name.
macro_rules! by_type {
    ($argument:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            burn::backend::DType::F32 => {
                type $T = f32;
                $body
            }
            burn::backend::DType::F16 => {
                type $T = half::f16;
                $body
            }
            burn::backend::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err($crate::arrays::unfit($argument, "f32, f16 or bf16", $crate::arrays::name(other))),
        }
    };
}
pub(crate) use by_type;

pub(crate) fn unfit(argument: &'static str, expected: impl Into<String>, got: impl Into<String>) -> Error {
    Error::Value { argument, expected: expected.into(), got: got.into() }
}

/// A refusal of ndarray's.
pub(crate) fn misfit(argument: &'static str, error: ShapeError) -> Error {
    unfit(argument, "elements within the storage, one for each place", error.to_string())
}

/// What burn calls a type.
pub(crate) fn name(dtype: DType) -> String {
    format!("{dtype:?}").to_lowercase()
}

/// A tensor as an array, where it lies: strides are those of the tensor, 0 where it is
/// expanded and below 0 where it is flipped. Nothing is copied.
pub(crate) fn view<'a, T: Stored>(
    argument: &'static str,
    tensor: &'a FlexTensor,
) -> Result<ArrayView4<'a, T>> {
    if tensor.dtype() != T::dtype() {
        return Err(unfit(argument, name(T::dtype()), name(tensor.dtype())));
    }
    place(argument, tensor)
}

/// A tensor of any of the types in [`f32`]: where it lies if it is of that type.
pub(crate) fn wide<'a>(argument: &'static str, tensor: &'a FlexTensor) -> Result<CowArray<'a, f32, Ix4>> {
    if tensor.dtype() == DType::F32 {
        return Ok(view::<f32>(argument, tensor)?.into());
    }
    by_type!(argument, tensor.dtype(), T => Ok(view::<T>(argument, tensor)?.mapv(Element::to_f32).into()))
}

/// A tensor of [`bool`], where it lies.
pub(crate) fn bools<'a>(argument: &'static str, tensor: &'a FlexTensor) -> Result<ArrayView4<'a, bool>> {
    if !tensor.dtype().is_bool() {
        return Err(unfit(argument, "bool", name(tensor.dtype())));
    }
    place(argument, tensor)
}

fn place<'a, T: bytemuck::CheckedBitPattern>(
    argument: &'static str,
    tensor: &'a FlexTensor,
) -> Result<ArrayView4<'a, T>> {
    let layout = tensor.layout();
    let dims: Vec<usize> = layout.shape().iter().copied().collect();
    let (Ok(shape), Ok(strides)) =
        (<[usize; 4]>::try_from(&dims[..]), <[isize; 4]>::try_from(layout.strides()))
    else {
        return Err(unfit(argument, "4 axes", format!("shape {dims:?}")));
    };
    if shape.contains(&0) {
        // Strides of nothing may lead anywhere.
        return ArrayView4::from_shape(shape, &[]).map_err(|error| misfit(argument, error));
    }
    let elements: &[T] = try_cast_slice(tensor.bytes())
        .map_err(|error| unfit(argument, "elements of the tensor's type", error.to_string()))?;
    // From the element that lies first.
    let back = |axis: usize| strides[axis].min(0).unsigned_abs() * (shape[axis] - 1);
    let first = layout.start_offset().checked_sub((0..4).map(back).sum());
    let elements = first.and_then(|first| elements.get(first..)).unwrap_or_default();
    let with = shape.strides(strides.map(isize::unsigned_abs));
    let mut array = ArrayView4::from_shape(with, elements).map_err(|error| misfit(argument, error))?;
    for axis in (0..4).filter(|&axis| strides[axis] < 0) {
        array.invert_axis(Axis(axis));
    }
    Ok(array)
}

/// So many zeros, if memory has room for them.
pub(crate) fn zeros<T: Stored>(argument: &'static str, dims: &[usize]) -> Result<Vec<T>> {
    let count = dims.iter().try_fold(1usize, |n, &len| n.checked_mul(len));
    let room = |n: usize| {
        n.checked_mul(size_of::<T>()).is_some_and(|n| Vec::<u8>::new().try_reserve_exact(n).is_ok())
    };
    match count.filter(|&n| room(n)) {
        Some(n) => Ok(vec![T::default(); n]),
        None => Err(Error::TooLarge { argument, got: format!("{dims:?}") }),
    }
}

/// Elements in the order of the axes as a tensor.
pub(crate) fn tensor<T: Stored>(dims: [usize; 4], elements: Vec<T>) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(elements), Layout::contiguous(Shape::from(dims)), T::dtype())
}

/// An array as a tensor of a type: rounded once, and without a copy where it is [`f32`].
pub(crate) fn rounded(array: Array4<f32>, dtype: DType) -> Result<FlexTensor> {
    let dims = array.dim().into();
    if dtype == DType::F32 && array.is_standard_layout() {
        let (elements, first) = array.into_raw_vec_and_offset();
        debug_assert_eq!(first.unwrap_or(0), 0);
        return Ok(tensor(dims, elements));
    }
    by_type!("q", dtype, T => {
        Ok(tensor(dims, array.iter().map(|&x| <T as Element>::from_f32(x)).collect()))
    })
}
