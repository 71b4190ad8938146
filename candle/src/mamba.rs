//! The mixing of a Mamba-2 layer, of what its convolution gives.

use attention_kernels::Backward;
use attention_kernels::linear::{Carried, Mamba2, Mamba2Input, State};
use candle_core::{Result, Tensor};
use ndarray::{Array4, Axis, Ix1, s};

use crate::arrays::{Reading, Stored, by_type, read, refusal, unfit};
use crate::graph;
use crate::recurrent::run;

/// The tensors of [`mamba2`].
#[derive(Clone, Debug)]
pub struct Mamba2Tensors {
    /// What the convolution and its SiLU give, `[batch, len, heads * value_dim + 2 * groups *
    /// state_dim]`: values, then `B`, then `C`, in [`f32`], [`f16`](half::f16) or
    /// [`bf16`](half::bf16).
    pub xbc: Tensor,
    /// Steps before their bias and softplus, `[batch, len, heads]` in [`f32`].
    pub dt: Tensor,
    /// Logarithms of rates, `[heads]` in [`f32`].
    pub a_log: Tensor,
    /// What is added to steps, `[heads]` in [`f32`].
    pub dt_bias: Tensor,
    /// How much of its own value an output has, `[heads]` in [`f32`].
    pub d: Tensor,
    /// Groups of heads that share `B` and `C`.
    pub groups: usize,
    /// Elements of a row of `B` and of `C`.
    pub state_dim: usize,
}

/// Sizes of a call.
#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    groups: usize,
    state_dim: usize,
    value_dim: usize,
}

/// What is read.
struct Held<'a> {
    xbc: Reading<'a>,
    dt: Reading<'a>,
    sizes: Sizes,
    mamba: Mamba2,
}

impl Mamba2Tensors {
    fn inputs(&self) -> [&Tensor; 5] {
        [&self.xbc, &self.dt, &self.a_log, &self.dt_bias, &self.d]
    }

    fn held(&self) -> Result<Held<'_>> {
        let (xbc, dt) = (read("xbc", &self.xbc)?, read("dt", &self.dt)?);
        let ([_, _, columns], [_, _, heads]) = (xbc.dims3()?, dt.dims3()?);
        let &Self { groups, state_dim, .. } = self;
        let shared = groups.checked_mul(state_dim).and_then(|n| n.checked_mul(2));
        let values = shared.and_then(|shared| columns.checked_sub(shared));
        let fits = |values: usize| if heads == 0 { values == 0 } else { values.is_multiple_of(heads) };
        let Some(values) = values.filter(|&values| fits(values)) else {
            let expected = format!(
                "[batch, len, heads * value_dim + 2 * groups * state_dim] with {heads} heads as dt has them, {groups} groups and state_dim {state_dim}"
            );
            return Err(unfit("xbc", expected, format_args!("shape {:?}", self.xbc.dims())));
        };
        let numbers = |name, x| -> Result<Vec<f32>> { Ok(read(name, x)?.array::<f32, Ix1>()?.to_vec()) };
        let a_log = numbers("a_log", &self.a_log)?;
        let (dt_bias, skip) = (numbers("dt_bias", &self.dt_bias)?, numbers("d", &self.d)?);
        let mamba = Mamba2::builder(&a_log).dt_bias(&dt_bias).skip(&skip).build().map_err(refusal)?;
        let value_dim = values.checked_div(heads).unwrap_or(0);
        Ok(Held { xbc, dt, sizes: Sizes { heads, groups, state_dim, value_dim }, mamba })
    }
}

impl Held<'_> {
    fn input<T: Stored>(&self) -> Result<Mamba2Input<'_, T>> {
        let Sizes { heads, groups, state_dim, value_dim } = self.sizes;
        let (b, c) = (heads * value_dim, heads * value_dim + groups * state_dim);
        let x = self.xbc.heads(0, heads, value_dim)?;
        let (b, c) = (self.xbc.heads(b, groups, state_dim)?, self.xbc.heads(c, groups, state_dim)?);
        Ok(Mamba2Input::new(x, self.dt.array3()?.permuted_axes([0, 2, 1]), b, c))
    }
}

/// The mixing of a Mamba-2 layer, between its convolution and its gated norm: `[batch, len,
/// heads * value_dim]`, of tokens that follow those of `state`, which then has these too.
/// The parts of `xbc` are read where they lie.
///
/// With no `state` the sequences are whole, and all five tensors have gradients. With one,
/// which is made where it is none, asking for gradients is an error. It is `[batch, heads,
/// state_dim, value_dim]`, the transpose of that of `candle-transformers`.
///
/// Cost: see [`Mamba2`]; one token reads and writes the state once.
///
/// ```
/// use attention_kernels_candle::{Mamba2Tensors, mamba2};
/// use candle_core::{DType, Device, Tensor, Var};
///
/// let (heads, value_dim, groups, state_dim) = (4, 16, 1, 32);
/// let a_log = Var::zeros(heads, DType::F32, &Device::Cpu)?;
/// let tensors = Mamba2Tensors {
///     xbc: Tensor::rand(-1f32, 1., (1, 50, heads * value_dim + 2 * groups * state_dim), &Device::Cpu)?,
///     dt: Tensor::rand(-1f32, 1., (1, 50, heads), &Device::Cpu)?,
///     a_log: a_log.as_tensor().clone(),
///     dt_bias: Tensor::zeros(heads, DType::F32, &Device::Cpu)?,
///     d: Tensor::ones(heads, DType::F32, &Device::Cpu)?,
///     groups,
///     state_dim,
/// };
/// let out = mamba2(&tensors, None)?;
/// assert_eq!(out.dims(), [1, 50, heads * value_dim]);
/// let gradients = out.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&a_log).unwrap().dims(), [heads]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// For tensors on another device, of other types or of shapes that do not fit, and for a
/// state of other sizes. The state is then as it was.
pub fn mamba2(tensors: &Mamba2Tensors, state: Option<&mut Option<State>>) -> Result<Tensor> {
    let held = tensors.held()?;
    let mut fresh = None;
    let whole = state.is_none();
    let state = state.unwrap_or(&mut fresh);
    let made = by_type!("xbc", tensors.xbc.dtype(), T => run(&held.mamba, held.input::<T>()?, state));
    let (storage, shape) = made?;
    let (batch, len, heads, dim) = shape.dims4()?;
    let made = (storage, (batch, len, heads * dim).into());
    let owned = tensors.clone();
    let pull: graph::Pull = Box::new(move |d_out| pull(&owned, d_out));
    graph::output("mamba2", &tensors.inputs(), made, || whole.then_some(pull))
}

/// Gradients of all five tensors, given that of the output.
fn pull(tensors: &Mamba2Tensors, d_out: &Tensor) -> Result<Vec<Vec<f32>>> {
    let held = tensors.held()?;
    let Sizes { heads, groups, state_dim, value_dim } = held.sizes;
    let d_out = read("d_out", d_out)?;
    let d_out = d_out.heads::<f32>(0, heads, value_dim)?;
    let all = by_type!("xbc", tensors.xbc.dtype(), T => {
        held.mamba.backward(held.input::<T>()?, d_out, Carried::default()).map_err(refusal)
    })?;
    let [batch, len, columns] = held.xbc.dims3()?;
    let mut xbc = ndarray::Array3::<f32>::zeros((batch, len, columns));
    let mut put = |first: usize, heads: usize, dim: usize, part: &Array4<f32>| {
        for head in 0..heads {
            let at = first + head * dim;
            xbc.slice_mut(s![.., .., at..at + dim]).assign(&part.index_axis(Axis(1), head));
        }
    };
    put(0, heads, value_dim, &all.x);
    put(heads * value_dim, groups, state_dim, &all.b);
    put(heads * value_dim + groups * state_dim, groups, state_dim, &all.c);
    let dt = all.dt.permuted_axes([0, 2, 1]);
    Ok(vec![
        xbc.into_raw_vec_and_offset().0,
        dt.iter().copied().collect(),
        all.a_log.to_vec(),
        all.dt_bias.to_vec(),
        all.skip.iter().copied().collect(),
    ])
}
