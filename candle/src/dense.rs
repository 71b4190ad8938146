//! Softmax attention over tensors.

use std::sync::OnceLock;

use attention_kernels::dense::{Dense, SavedForward, SoftmaxGradients};
use attention_kernels::mask::Mask;
use attention_kernels::score::{Score, Smooth};
use attention_kernels::{Attention, Backward, Input, Mergeable, Qkv, Recurrent, Workspace, merge};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Tensor, WithDType};
use ndarray::{Array3, Ix4};

use crate::arrays::{
    Made, Stored, by_type, constant, elements, numbers, output, read, refusal, tensor, unfit, view, zeros,
};
use crate::graph;
use crate::recurrent::run;

/// Any mechanism of `attention-kernels` over arrays that are [read](crate::read) from
/// tensors: `[batch, heads, len, value_dim]`.
///
/// candle does not know what the output was made of: no gradient goes through it.
/// Memory and time are those of the mechanism; nothing is copied.
///
/// # Errors
/// What the mechanism refuses.
pub fn forward<X: Input<Out: Stored>>(mechanism: &impl Attention<X>, x: X) -> Result<Tensor> {
    let dim = x.out_dim().map_err(refusal)?;
    let made = output(dim, |out| mechanism.forward_into(x, out, &mut Workspace::new()))?;
    constant(made).transpose(1, 2)
}

/// Any recurrence of `attention-kernels` over arrays that are [read](crate::read) from
/// tensors, on tokens that follow those of `state`, which then has these too:
/// `[batch, heads, len, value_dim]`. Where there is no state yet it is made.
///
/// No gradient goes through it: [`mix`](crate::mix) has gradients for many.
///
/// # Errors
/// What the mechanism refuses; the state is then as it was.
pub fn prefill<X: Input<Out: Stored>, M: Recurrent<X>>(
    mechanism: &M,
    x: X,
    state: &mut Option<M::State>,
) -> Result<Tensor> {
    constant(run(mechanism, x, state)?).transpose(1, 2)
}

/// Softmax attention with gradients: masks, windows, changes of scores, sinks and the
/// scale are those of `dense`.
///
/// Queries `[batch, q_heads, q_len, head_dim]`, keys `[batch, kv_heads, kv_len,
/// head_dim]` and values `[batch, kv_heads, kv_len, value_dim]` of one type, [`f32`],
/// [`f16`](half::f16) or [`bf16`](half::bf16), and of any strides: transposed, narrowed
/// and broadcast tensors are read where they lie. Query heads share key/value heads, so
/// that nothing needs to be repeated. Gives `[batch, q_heads, q_len, value_dim]`, which
/// lies in memory as `[batch, q_len, q_heads, value_dim]`:
/// `out.transpose(1, 2)?.reshape((batch, len, heads * dim))` copies nothing.
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair, about three times as many
/// more for gradients; memory linear in the lengths. With gradients in view the LSE is
/// kept; the forward pass of half types is made again in the backward pass, since their
/// output is rounded. Gradients are rounded once, to the type of their tensor. Sinks are
/// constants here; [`attend_with_sinks`] has their gradients.
///
/// ```
/// use attention_kernels::{dense::Dense, mask::Window, score::Softcap};
/// use attention_kernels_candle::attend;
/// use candle_core::{Device, Tensor, Var};
///
/// let q = Var::rand(-1f32, 1., (1, 8, 100, 64), &Device::Cpu)?;
/// let kv = Tensor::rand(-1f32, 1., (1, 2, 100, 64), &Device::Cpu)?;
/// let dense = Dense::builder().mask(Window::new(Some(31), Some(0))).score(Softcap::new(30.0)?).build()?;
/// let out = attend(&q, &kv, &kv, &dense)?;
/// let gradients = out.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&q).unwrap().dims(), q.dims());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// For tensors on another device, of other types or of shapes that do not fit: the
/// message names the argument, what was expected and what came.
pub fn attend<M, F>(q: &Tensor, k: &Tensor, v: &Tensor, dense: &Dense<M, F>) -> Result<Tensor>
where
    M: Mask + Clone + 'static,
    F: Smooth + Clone + 'static,
{
    for (name, x) in [("q", q), ("k", k), ("v", v)] {
        read(name, x)?;
    }
    let lse = [q, k, v].iter().any(|x| x.track_op()).then(OnceLock::new);
    q.apply_op3(k, v, Attend { dense: dense.clone(), lse })?.transpose(1, 2)
}

/// [`attend`] as candle's operator. The output is `[batch, q_len, q_heads, value_dim]`.
struct Attend<M, F> {
    dense: Dense<M, F>,
    /// Kept if gradients may be asked for.
    lse: Option<OnceLock<Array3<f32>>>,
}

impl<M: Mask, F: Smooth> Attend<M, F> {
    fn run<T: Stored>(&self, arrays: [(&CpuStorage, &Layout); 3]) -> Result<Made> {
        let [(q, q_layout), (k, k_layout), (v, v_layout)] = arrays;
        let q = view::<T, Ix4>("q", elements("q", q)?, q_layout)?;
        let k = view::<T, Ix4>("k", elements("k", k)?, k_layout)?;
        let v = view::<T, Ix4>("v", elements("v", v)?, v_layout)?;
        let x = Qkv::new(q, k, v);
        let dim = x.out_dim().map_err(refusal)?;
        let workspace = &mut Workspace::new();
        // What is rounded is of no use to gradients.
        let Some(kept) = self.lse.as_ref().filter(|_| <T as WithDType>::DTYPE == DType::F32) else {
            return output(dim, |out| self.dense.forward_into(x, out, workspace));
        };
        let mut lse = rows_of("lse", dim)?;
        let made = output(dim, |out| self.dense.forward_with_lse_into(x, out, lse.view_mut(), workspace))?;
        // The operator runs once.
        let _ = kept.set(lse);
        Ok(made)
    }
}

impl<M: Mask, F: Smooth> CustomOp3 for Attend<M, F> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<Made> {
        let arrays = [(q, q_layout), (k, k_layout), (v, v_layout)];
        by_type!("q", candle_core::backend::BackendStorage::dtype(q), T => self.run::<T>(arrays))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let saved = self.lse.as_ref().and_then(OnceLock::get).map(|lse| (out, lse));
        let all = by_type!("q", q.dtype(), T => gradients::<T, M, F>(&self.dense, [q, k, v], saved, d_out))?;
        let of = |array, like: &Tensor| {
            like.track_op().then(|| constant(tensor(array)).to_dtype(like.dtype())).transpose()
        };
        Ok((of(all.q, q)?, of(all.k, k)?, of(all.v, v)?))
    }
}

/// Gradients, given that of the output, `[batch, q_len, q_heads, value_dim]`, and
/// perhaps the output, of the same axes, and its LSE.
fn gradients<T: Stored, M: Mask, F: Smooth>(
    dense: &Dense<M, F>,
    [q, k, v]: [&Tensor; 3],
    saved: Option<(&Tensor, &Array3<f32>)>,
    d_out: &Tensor,
) -> Result<SoftmaxGradients> {
    let (q, k, v) = (read("q", q)?, read("k", k)?, read("v", v)?);
    let x = Qkv::new(q.array4::<T>()?, k.array4::<T>()?, v.array4::<T>()?);
    let d_out = d_out.to_dtype(DType::F32)?;
    let d_out = read("d_out", &d_out)?;
    let d_out = d_out.array4::<f32>()?.permuted_axes([0, 2, 1, 3]);
    let out = saved.map(|(out, _)| read("out", out)).transpose()?;
    let out = out.as_ref().map(|out| out.array4::<f32>()).transpose()?;
    let softmax = out.zip(saved).map(|(out, (_, lse))| (out.permuted_axes([0, 2, 1, 3]), lse.view()));
    dense.backward(x, d_out, SavedForward { softmax }).map_err(refusal)
}

/// [`attend`] with sinks whose gradient can be had: one logit a query head, `[q_heads]`
/// in [`f32`]. `build` makes the mechanism of them.
///
/// ```
/// use attention_kernels::dense::Dense;
/// use attention_kernels_candle::attend_with_sinks;
/// use candle_core::{Device, Tensor, Var};
///
/// let x = Tensor::rand(-1f32, 1., (1, 2, 50, 16), &Device::Cpu)?;
/// let sinks = Var::zeros(2, candle_core::DType::F32, &Device::Cpu)?;
/// let out = attend_with_sinks(&x, &x, &x, &sinks, |sinks| Dense::builder().causal().sinks(sinks).build())?;
/// let gradients = out.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&sinks).unwrap().dims(), [2]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`attend`], what `build` refuses, and a mechanism without sinks.
pub fn attend_with_sinks<M, F>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sinks: &Tensor,
    build: impl FnOnce(Vec<f32>) -> attention_kernels::Result<Dense<M, F>>,
) -> Result<Tensor>
where
    M: Mask + Clone + 'static,
    F: Smooth + Clone + 'static,
{
    let logits = read("sinks", sinks)?.array::<f32, ndarray::Ix1>()?.to_vec();
    let dense = build(logits.clone()).map_err(refusal)?;
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    if dense.sinks().map(bits) != Some(bits(&logits)) {
        return Err(unfit("build", "a mechanism with the sinks that it is given", "others, or none"));
    }
    let made = by_type!("q", q.dtype(), T => {
        let (q, k, v) = (read("q", q)?, read("k", k)?, read("v", v)?);
        let x = Qkv::new(q.array4::<T>()?, k.array4::<T>()?, v.array4::<T>()?);
        output(x.out_dim().map_err(refusal)?, |out| dense.forward_into(x, out, &mut Workspace::new()))
    })?;
    let held = [q.clone(), k.clone(), v.clone()];
    let pull: graph::Pull = Box::new(move |d_out| {
        let [q, k, v] = &held;
        let all = by_type!("q", q.dtype(), T => gradients::<T, M, F>(&dense, [q, k, v], None, d_out))?;
        let sinks = all.sinks.ok_or_else(|| unfit("build", "a mechanism with these sinks", "none"))?;
        Ok(vec![numbers(all.q), numbers(all.k), numbers(all.v), sinks.to_vec()])
    });
    graph::output("attention with sinks", &[q, k, v, sinks], made, || Some(pull))?.transpose(1, 2)
}

/// Attention over some of the keys, to be [merged](merge_parts) with that over others: the
/// output `[batch, q_heads, q_len, value_dim]` and the LSE `[batch, q_heads, q_len]`,
/// natural logarithms without sinks, both in [`f32`] whatever the type of the tensors. A
/// query without a visible key has 0 and -inf.
///
/// Shapes and cost are those of [`attend`]; any change of scores will do. There are no
/// gradients: asking for them is an error.
///
/// # Errors
/// As [`attend`].
pub fn attend_with_lse<M: Mask, F: Score>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    dense: &Dense<M, F>,
) -> Result<(Tensor, Tensor)> {
    let (out, lse) = by_type!("q", q.dtype(), T => {
        let (q, k, v) = (read("q", q)?, read("k", k)?, read("v", v)?);
        let x = Qkv::new(q.array4::<T>()?, k.array4::<T>()?, v.array4::<T>()?).widened();
        with_lse(dense, x)
    })?;
    let inputs = [q, k, v];
    let out = graph::output("attention with lse", &inputs, out, || None)?;
    Ok((out.transpose(1, 2)?, graph::output("lse of attention", &inputs, lse, || None)?))
}

/// Zeros, one for each row of an output, if memory has room for them.
fn rows_of(argument: &str, (batch, heads, len, _): (usize, usize, usize, usize)) -> Result<Array3<f32>> {
    let zeros = zeros::<f32>(argument, &[batch, heads, len])?;
    Array3::from_shape_vec((batch, heads, len), zeros)
        .map_err(|error| unfit(argument, "as many elements as its shape has", error))
}

/// An output and its LSE.
fn with_lse<X: Input<Out: Stored>>(mechanism: &impl Mergeable<X>, x: X) -> Result<(Made, Made)> {
    let dim = x.out_dim().map_err(refusal)?;
    let mut lse = rows_of("lse", dim)?;
    let to = lse.view_mut();
    let out = output(dim, |out| mechanism.forward_with_lse_into(x, out, to, &mut Workspace::new()))?;
    Ok((out, tensor(lse)))
}

/// Attention over disjoint sets of keys as attention over all of them: outputs `[batch,
/// q_heads, q_len, value_dim]` of one type with their LSEs, `[batch, q_heads, q_len]` in
/// [`f32`]. Reads each part once. No parts are an error.
///
/// Gradients are not to be had: asking for them is an error.
///
/// ```
/// use attention_kernels::dense::Dense;
/// use attention_kernels_candle::{attend, attend_with_lse, merge_parts};
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::rand(-1f32, 1., (1, 2, 50, 16), &Device::Cpu)?;
/// let dense = Dense::builder().build()?;
/// let part = |first, len| -> candle_core::Result<_> {
///     let keys = x.narrow(2, first, len)?;
///     attend_with_lse(&x, &keys, &keys, &dense)
/// };
/// let (merged, _) = merge_parts(&[part(0, 20)?, part(20, 30)?])?;
/// let off = (merged - attend(&x, &x, &x, &dense)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(off < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// For parts of different shapes or types.
pub fn merge_parts(parts: &[(Tensor, Tensor)]) -> Result<(Tensor, Tensor)> {
    let [(first, _), ..] = parts else {
        return Err(unfit("parts", "at least one", "none"));
    };
    let (out, lse) = by_type!("parts", first.dtype(), T => merged::<T>(parts))?;
    // One that gradients are asked for will do to refuse them.
    let tracked = parts.iter().flat_map(|(out, lse)| [out, lse]).filter(|x| x.track_op());
    let inputs: Vec<&Tensor> = tracked.take(1).collect();
    let out = graph::output("merged attention", &inputs, out, || None)?;
    Ok((out.transpose(1, 2)?, graph::output("merged lse", &inputs, lse, || None)?))
}

fn merged<T: Stored>(parts: &[(Tensor, Tensor)]) -> Result<(Made, Made)> {
    let (first, first_lse) = (read("out", &parts[0].0)?, read("lse", &parts[0].1)?);
    let (first, first_lse) = (first.array4::<T>()?, first_lse.array3::<f32>()?);
    let (batch, heads, len, dim) = first.dim();
    if first_lse.dim() != (batch, heads, len) {
        let expected = format!("[batch, q_heads, q_len] = [{batch}, {heads}, {len}]");
        return Err(unfit("lse", expected, format_args!("{:?}", first_lse.shape())));
    }
    let out = output(first.dim(), |mut out| {
        out.assign(&first);
        Ok(())
    });
    let mut lse = first_lse.to_owned();
    let (storage, shape) = out?;
    let mut all = T::cpu_storage_data(storage)?;
    for (other, other_lse) in &parts[1..] {
        let (other, other_lse) = (read("out", other)?, read("lse", other_lse)?);
        let out = ndarray::ArrayViewMut4::from_shape((batch, len, heads, dim), &mut all);
        let out = out.map_err(|error| unfit("out", "as many elements as its shape has", error))?;
        let out = out.permuted_axes([0, 2, 1, 3]);
        merge::merge_into(out, lse.view_mut(), other.array4::<T>()?, other_lse.array3()?).map_err(refusal)?;
    }
    Ok(((T::to_cpu_storage_owned(all), shape), tensor(lse)))
}
