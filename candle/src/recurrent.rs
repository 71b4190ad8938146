//! Recurrences over tensors, with gradients.

use attention_kernels::linear::{
    Carried, ChannelGated, DeltaNet, DeltaQkv, GatedDeltaNet, GatedDeltaQkv, Gla, Kda, KdaQkv, Lightning,
    Mamba2, Mamba2Input, RetNet, Rwkv7, Rwkv7Input, SimpleGla, State, TokenGated,
};
use attention_kernels::{Backward, Input, Qkv, Recurrent, Workspace};
use candle_core::{DType, Result, Tensor};
use ndarray::{Array4, ArrayView4, Ix3, Ix4};

use crate::arrays::{Made, Reading, Stored, by_type, constant, numbers, output, read, refusal, tensor};
use crate::graph;

/// A recurrence whose inputs are tensors:
///
/// | mechanism | inputs |
/// |---|---|
/// | [`Lightning`], [`RetNet`] | `[q, k, v]` |
/// | [`SimpleGla`] | `[q, k, v, log_decay]`, one decay a token |
/// | [`Gla`] | `[q, k, v, log_decay]`, one a channel |
/// | [`DeltaNet`] | `[q, k, v, beta]` |
/// | [`GatedDeltaNet`] | `[q, k, v, log_decay, beta]`, one decay a token |
/// | [`Kda`] | `[q, k, v, log_decay, beta]`, one a channel |
/// | [`Mamba2`] | `[x, dt, b, c]`; [`mamba2`](crate::mamba2) takes its parameters as tensors |
/// | [`Rwkv7`] | `[q, k, v, log_decay, kappa, rate]`, of which `q` are the receptances |
///
/// Axes are those of the mechanism's own input: `[batch, heads, len, dim]`, and `[batch,
/// heads, len]` of what has one number a token, of any strides; neighbouring heads share
/// what there is less of. Queries, keys and values are of one type, [`f32`],
/// [`f16`](half::f16) or [`bf16`](half::bf16), and so are `kappa`, `x`, `b` and `c`; decays,
/// `beta`, `rate` and `dt` are [`f32`].
pub trait Mixes: Clone + Send + Sync + 'static {
    /// So many tensors.
    type Inputs<'a>: AsRef<[&'a Tensor]>;

    /// What errors call them.
    const NAMES: &'static [&'static str];

    /// The output on tokens that follow those of `state`.
    #[doc(hidden)]
    fn run(&self, x: &[Reading<'_>], state: &mut Option<State>) -> Result<Made>;

    /// The gradients of all inputs.
    #[doc(hidden)]
    fn pull(&self, x: &[Reading<'_>], d_out: ArrayView4<'_, f32>) -> Result<Vec<Vec<f32>>>;
}

/// Runs a recurrence whose input has been put together. What is refused leaves the state as
/// it was.
pub(crate) fn run<X: Input<Out: Stored>, M: Recurrent<X>>(
    mechanism: &M,
    x: X,
    state: &mut Option<M::State>,
) -> Result<Made> {
    let dim = x.out_dim().map_err(refusal)?;
    let workspace = &mut Workspace::new();
    if let Some(state) = state {
        return output(dim, |out| mechanism.prefill_into(x, state, out, workspace));
    }
    let mut first = mechanism.initial_state(x).map_err(refusal)?;
    let made = output(dim, |out| mechanism.prefill_into(x, &mut first, out, workspace))?;
    *state = Some(first);
    Ok(made)
}

macro_rules! mixes {
    (@array $x:ident $at:literal T) => { $x[$at].array::<T, Ix4>()? };
    (@array $x:ident $at:literal f32 3) => { $x[$at].array::<f32, Ix3>()? };
    (@array $x:ident $at:literal f32 4) => { $x[$at].array::<f32, Ix4>()? };
    ($(
        $mechanism:ident { $($name:ident $at:literal: [$($type:tt)+]),+ } $count:literal =>
        $input:expr
    );+ $(;)?) => {$(
        impl Mixes for $mechanism {
            type Inputs<'a> = [&'a Tensor; $count];

            const NAMES: &'static [&'static str] = &[$(stringify!($name)),+];

            fn run(&self, x: &[Reading<'_>], state: &mut Option<State>) -> Result<Made> {
                by_type!(Self::NAMES[0], x[0].dtype(), T => {
                    $(let $name = mixes!(@array x $at $($type)+);)+
                    run(self, $input, state)
                })
            }

            fn pull(&self, x: &[Reading<'_>], d_out: ArrayView4<'_, f32>) -> Result<Vec<Vec<f32>>> {
                by_type!(Self::NAMES[0], x[0].dtype(), T => {
                    $(let $name = mixes!(@array x $at $($type)+);)+
                    let all = self.backward($input, d_out, Carried::default()).map_err(refusal)?;
                    Ok(vec![$(numbers(all.$name)),+])
                })
            }
        }
    )+};
}

mixes! {
    Lightning { q 0: [T], k 1: [T], v 2: [T] } 3 => Qkv::new(q, k, v);
    RetNet { q 0: [T], k 1: [T], v 2: [T] } 3 => Qkv::new(q, k, v);
    SimpleGla { q 0: [T], k 1: [T], v 2: [T], log_decay 3: [f32 3] } 4 =>
        TokenGated::new(Qkv::new(q, k, v), log_decay);
    Gla { q 0: [T], k 1: [T], v 2: [T], log_decay 3: [f32 4] } 4 =>
        ChannelGated::new(Qkv::new(q, k, v), log_decay);
    DeltaNet { q 0: [T], k 1: [T], v 2: [T], beta 3: [f32 3] } 4 => DeltaQkv::new(Qkv::new(q, k, v), beta);
    GatedDeltaNet { q 0: [T], k 1: [T], v 2: [T], log_decay 3: [f32 3], beta 4: [f32 3] } 5 =>
        GatedDeltaQkv::new(Qkv::new(q, k, v), log_decay, beta);
    Kda { q 0: [T], k 1: [T], v 2: [T], log_decay 3: [f32 4], beta 4: [f32 3] } 5 =>
        KdaQkv::new(Qkv::new(q, k, v), log_decay, beta);
    Mamba2 { x 0: [T], dt 1: [f32 3], b 2: [T], c 3: [T] } 4 => Mamba2Input::new(x, dt, b, c);
    Rwkv7 { q 0: [T], k 1: [T], v 2: [T], log_decay 3: [f32 4], kappa 4: [T], rate 5: [f32 4] } 6 =>
        Rwkv7Input::new(Qkv::new(q, k, v), log_decay, kappa, rate);
}

fn readings<'a, M: Mixes>(inputs: &[&'a Tensor]) -> Result<Vec<Reading<'a>>> {
    M::NAMES.iter().zip(inputs).map(|(name, input)| read(name, input)).collect()
}

/// A recurrence over whole sequences, with gradients of all inputs: `[batch, heads, len,
/// value_dim]`, which lies in memory as `[batch, len, heads, value_dim]`. [`Mixes`] has
/// inputs and shapes. Tensors are read where they lie, whatever their strides.
///
/// Cost: that of the mechanism, and about three times as much for gradients. Nothing of
/// the forward pass is kept but its inputs. Parameters of the mechanism are constants.
///
/// ```
/// use attention_kernels::linear::GatedDeltaNet;
/// use attention_kernels_candle::mix;
/// use candle_core::{Device, Tensor, Var};
///
/// let q = Tensor::rand(-1f32, 1., (1, 2, 50, 16), &Device::Cpu)?;
/// let beta = Var::rand(0f32, 1., (1, 2, 50), &Device::Cpu)?;
/// let log_decay = Tensor::rand(-0.2f32, 0., (1, 2, 50), &Device::Cpu)?;
/// let mechanism = GatedDeltaNet::builder().normalize_qk().build()?;
/// let out = mix(&mechanism, [&q, &q, &q, &log_decay, &beta])?;
/// let gradients = out.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&beta).unwrap().dims(), beta.dims());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// For tensors on another device, of other types or of shapes that do not fit.
pub fn mix<M: Mixes>(mechanism: &M, inputs: M::Inputs<'_>) -> Result<Tensor> {
    let inputs = inputs.as_ref();
    let made = mechanism.run(&readings::<M>(inputs)?, &mut None)?;
    let (mechanism, held) = (mechanism.clone(), inputs.iter().map(|&x| x.clone()).collect::<Vec<_>>());
    let pull = || -> graph::Pull {
        Box::new(move |d_out| {
            let held: Vec<&Tensor> = held.iter().collect();
            let d_out = read("d_out", d_out)?;
            let d_out = d_out.array4::<f32>()?.permuted_axes([0, 2, 1, 3]);
            mechanism.pull(&readings::<M>(&held)?, d_out)
        })
    };
    graph::output("recurrence", inputs, made, || Some(pull()))?.transpose(1, 2)
}

/// [`mix`] on tokens that follow those of `state`, which then has these too; where there is
/// none it is made, as it is before the first token. A prompt at once and then a token at a
/// time give what whole sequences give.
///
/// Cost: linear in the tokens; one token reads and writes the state once. There are no
/// gradients through states: asking for them is an error.
///
/// ```
/// use attention_kernels::linear::Lightning;
/// use attention_kernels_candle::{mix, mix_from};
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::rand(-1f32, 1., (1, 2, 50, 16), &Device::Cpu)?;
/// let lightning = Lightning::builder(2).build()?;
/// let mut state = None;
/// let mut pieces = Vec::new();
/// for (first, len) in [(0, 48), (48, 1), (49, 1)] {
///     let tokens = x.narrow(2, first, len)?;
///     pieces.push(mix_from(&lightning, [&tokens, &tokens, &tokens], &mut state)?);
/// }
/// let off = (Tensor::cat(&pieces, 2)? - mix(&lightning, [&x, &x, &x])?)?;
/// assert!(off.abs()?.max_all()?.to_scalar::<f32>()? < 1e-4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`mix`], and for a state of other sizes. The state is then as it was.
pub fn mix_from<M: Mixes>(mechanism: &M, inputs: M::Inputs<'_>, state: &mut Option<State>) -> Result<Tensor> {
    let inputs = inputs.as_ref();
    let made = mechanism.run(&readings::<M>(inputs)?, state)?;
    graph::output("recurrence from a state", inputs, made, || None)?.transpose(1, 2)
}

/// The numbers of a state, `[sequences, heads, state_dim, columns]` in [`f32`], to be saved
/// or looked at. Copies them.
///
/// # Errors
/// None that the state could cause.
pub fn state_to_tensor(state: &State) -> Result<Tensor> {
    Ok(constant(tensor(state.view().to_owned())))
}

/// A state with the numbers of a tensor `[sequences, heads, state_dim, columns]` of any type
/// that candle turns into [`f32`]. Copies them.
///
/// # Errors
/// For another number of axes, and numbers that are NaN or infinite.
pub fn state_from_tensor(tensor: &Tensor) -> Result<State> {
    let tensor = tensor.to_dtype(DType::F32)?;
    let array: Array4<f32> = read("state", &tensor)?.array4()?.to_owned();
    State::new(array).map_err(refusal)
}
