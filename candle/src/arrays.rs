//! Tensors as arrays, and arrays as tensors.

use attention_kernels::Element;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Error, Layout, Result, Shape, Storage, Tensor, WithDType};
use half::{bf16, f16};
use ndarray::{
    Array, ArrayView, ArrayView3, ArrayView4, ArrayViewMut4, Dimension, Ix3, Ix4, IxDyn, ShapeBuilder,
};

/// Types that both crates know: [`f32`], [`half::f16`] and [`half::bf16`].
pub trait Stored: Element + WithDType {}

impl Stored for f32 {}
impl Stored for f16 {}
impl Stored for bf16 {}

/// Storage and shape of a tensor.
pub(crate) type Made = (CpuStorage, Shape);

/// A refusal of the kernels, as candle reports errors.
pub(crate) fn refusal(error: attention_kernels::Error) -> Error {
    Error::wrap(error).bt()
}

/// "argument: expected .., got .."
pub(crate) fn unfit(argument: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Error {
    Error::Msg(format!("{argument}: expected {expected}, got {got}")).bt()
}

/// What candle calls a type.
fn name(dtype: DType) -> &'static str {
    dtype.as_str()
}

/// Runs an expression for the type of this name.
macro_rules! by_type {
    ($argument:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err($crate::arrays::unfit($argument, "f32, f16 or bf16", other.as_str())),
        }
    };
}
pub(crate) use by_type;

/// A tensor whose storage is held for reading.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::Sigmoid};
/// use attention_kernels_candle::{forward, read};
/// use candle_core::{Device, Tensor};
///
/// // Any mechanism of attention-kernels over tensors.
/// let x = Tensor::rand(0f32, 1., (1, 5, 2, 16), &Device::Cpu)?.transpose(1, 2)?;
/// let held = read("x", &x)?;
/// let x = held.array4::<f32>()?;
/// let out = forward(&Sigmoid::builder().build()?, Qkv::new(x, x, x))?;
/// assert_eq!(out.dims(), [1, 2, 5, 16]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Reading<'a> {
    argument: &'static str,
    storage: candle_core::StorageRef<'a>,
    layout: &'a Layout,
}

/// A tensor to be read as an array; `argument` is its name in errors.
///
/// # Errors
/// For a tensor on another device than the CPU.
pub fn read<'a>(argument: &'static str, tensor: &'a Tensor) -> Result<Reading<'a>> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(_) => Ok(Reading { argument, storage, layout }),
        other => Err(unfit(
            argument,
            "a tensor on the CPU",
            format_args!("one on {:?}", other.device().location()),
        )),
    }
}

impl Reading<'_> {
    /// The tensor as an array of four axes, where it lies: strides are those of the
    /// tensor, 0 where it is broadcast. Nothing is copied.
    ///
    /// # Errors
    /// For another type than `T`, and another number of axes.
    pub fn array4<T: Stored>(&self) -> Result<ArrayView4<'_, T>> {
        self.array::<T, Ix4>()
    }

    /// The same of three axes.
    ///
    /// # Errors
    /// As [`array4`](Self::array4).
    pub fn array3<T: Stored>(&self) -> Result<ArrayView3<'_, T>> {
        self.array::<T, Ix3>()
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    pub(crate) fn array<T: Stored, D: Dimension>(&self) -> Result<ArrayView<'_, T, D>> {
        let slice = elements(self.argument, self.cpu()?)?;
        view(self.argument, slice, self.layout)
    }

    /// Columns `first..first + heads * dim` of `[batch, len, columns]` as `[batch,
    /// heads, len, dim]`. The caller has checked that they are there.
    pub(crate) fn heads<T: Stored>(
        &self,
        first: usize,
        heads: usize,
        dim: usize,
    ) -> Result<ArrayView4<'_, T>> {
        let slice = elements(self.argument, self.cpu()?)?;
        let ([batch, len, _], &[outer, row, column]) = (self.dims3()?, self.layout.stride()) else {
            return Err(unfit(self.argument, "3 axes", format_args!("{:?}", self.layout.dims())));
        };
        let layout = Layout::new(
            Shape::from((batch, heads, len, dim)),
            vec![outer, dim * column, row, column],
            self.layout.start_offset() + first * column,
        );
        view(self.argument, slice, &layout)
    }

    pub(crate) fn dims3(&self) -> Result<[usize; 3]> {
        let dims = self.layout.dims();
        dims.try_into().map_err(|_| unfit(self.argument, "3 axes", format_args!("shape {dims:?}")))
    }

    fn cpu(&self) -> Result<&CpuStorage> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => Err(unfit(self.argument, "a tensor on the CPU", "another")),
        }
    }
}

/// The elements of a storage.
pub(crate) fn elements<'a, T: Stored>(argument: &str, storage: &'a CpuStorage) -> Result<&'a [T]> {
    let got = candle_core::backend::BackendStorage::dtype(storage);
    storage.as_slice::<T>().map_err(|_| unfit(argument, name(<T as WithDType>::DTYPE), name(got)))
}

/// Elements as an array, where they lie.
pub(crate) fn view<'a, T, D: Dimension>(
    argument: &str,
    elements: &'a [T],
    layout: &Layout,
) -> Result<ArrayView<'a, T, D>> {
    let (dims, strides) = (layout.dims(), layout.stride());
    let axes = D::NDIM.unwrap_or(dims.len());
    if dims.len() != axes {
        return Err(unfit(argument, format_args!("{axes} axes"), format_args!("shape {dims:?}")));
    }
    let elements = elements.get(layout.start_offset()..).unwrap_or_default();
    let outside = |error| unfit(argument, "strides that stay within the storage", error);
    let array = if dims.contains(&0) {
        // Strides of nothing may lead anywhere.
        ArrayView::from_shape(IxDyn(dims), &elements[..0])
    } else {
        ArrayView::from_shape(IxDyn(dims).strides(IxDyn(strides)), elements)
    };
    let array = array.map_err(outside)?;
    array.into_dimensionality().map_err(outside)
}

/// So many zeros, if memory has room for them. Pages that nobody writes cost nothing
/// where the type is [`f32`].
pub(crate) fn zeros<T: Stored>(argument: &str, dims: &[usize]) -> Result<Vec<T>> {
    let count = dims.iter().try_fold(1usize, |n, &len| n.checked_mul(len));
    let room = |n: usize| {
        n.checked_mul(size_of::<T>()).is_some_and(|n| Vec::<u8>::new().try_reserve_exact(n).is_ok())
    };
    match count.filter(|&n| room(n)) {
        Some(n) => Ok(vec![T::default(); n]),
        None => Err(unfit(argument, "sizes that memory has room for", format_args!("{dims:?}"))),
    }
}

/// Where outputs lie in memory: `[batch, len, heads, dim]`, as the projection after
/// attention reads them.
pub(crate) fn output<T: Stored>(
    (batch, heads, len, dim): (usize, usize, usize, usize),
    write: impl FnOnce(ArrayViewMut4<'_, T>) -> attention_kernels::Result<()>,
) -> Result<Made> {
    let mut out = zeros::<T>("out", &[batch, len, heads, dim])?;
    let to = ArrayViewMut4::from_shape((batch, len, heads, dim), &mut out);
    let to = to.map_err(|error| unfit("out", "as many elements as its shape has", error))?;
    write(to.permuted_axes([0, 2, 1, 3])).map_err(refusal)?;
    Ok((T::to_cpu_storage_owned(out), Shape::from((batch, len, heads, dim))))
}

/// A tensor that no gradient goes through.
pub(crate) fn constant((storage, shape): Made) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), false)
}

/// An array as a tensor, without a copy where it is of standard layout.
pub(crate) fn tensor<T: Stored, D: Dimension>(array: Array<T, D>) -> Made {
    let shape = Shape::from(array.shape());
    (T::to_cpu_storage_owned(numbers(array)), shape)
}

/// The elements of an array in the order of its axes.
pub(crate) fn numbers<T: Copy, D: Dimension>(array: Array<T, D>) -> Vec<T> {
    if array.is_standard_layout() {
        let (elements, offset) = array.into_raw_vec_and_offset();
        if offset.unwrap_or(0) == 0 {
            return elements;
        }
        return elements[offset.unwrap_or(0)..].to_vec();
    }
    array.iter().copied().collect()
}
