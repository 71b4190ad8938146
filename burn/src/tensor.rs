//! Attention on burn's tensors.

use attention_kernels::Result;
use attention_kernels::dense::Dense;
use attention_kernels::mask::Mask;
use attention_kernels::score::Smooth;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend, BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    Flex,
};
use burn::tensor::{Bool, Tensor};

use crate::arrays::unfit;
use crate::backend::AttentionBackend;
use crate::mechanism::AttentionOptions;

/// Softmax attention with the arguments of [`burn::tensor::module::attention`], in its place.
///
/// Queries `[batch, q_heads, q_len, head_dim]`, keys `[batch, kv_heads, kv_len, head_dim]` and
/// values `[batch, kv_heads, kv_len, value_dim]` of one type, [`f32`], [`f16`](half::f16) or
/// [`bf16`](half::bf16), and of any strides: nothing is copied. Query heads share key/value
/// heads, so that nothing needs to be repeated. Gives `[batch, q_heads, q_len, value_dim]`,
/// which lies in memory as `[batch, q_len, q_heads, value_dim]`: `out.swap_dims(1,
/// 2).reshape([batch, len, heads * dim])` copies nothing.
///
/// Where `mask` is true, a key is hidden from a query; `bias`, of any of the types, is added to
/// the scores. Both are `[batch, q_heads, q_len, kv_len]`, and each axis may be 1 instead: keys
/// `[batch, kv_len]` of which some are padding are `[batch, 1, 1, kv_len]`. A query that sees
/// nothing gives 0.
///
/// On an autodiff device there are gradients for queries, keys, values and bias. Those of
/// [`f32`] take the output and the LSE of the forward pass; those of half types make it again,
/// since their output is rounded, and are rounded once themselves.
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair, about three times as many more for
/// gradients; memory linear in the lengths. The gradient of a bias takes twice the memory of
/// all scores, as does the bias itself at its largest.
///
/// ```
/// use attention_kernels_burn::attention;
/// use burn::tensor::{Bool, Device, Distribution, Tensor, ops::AttentionModuleOptions};
///
/// let device = Device::flex().autodiff();
/// let x = Tensor::<4>::random([2, 8, 5, 64], Distribution::Default, &device).require_grad();
/// let bias = Tensor::<4>::zeros([1, 8, 5, 5], &device).require_grad();
/// // The last key of the second sequence is padding.
/// let padding = Tensor::<2, Bool>::from_data([[false; 5], [false, false, false, false, true]], &device);
/// let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
/// let mask = padding.reshape([2, 1, 1, 5]);
/// let out = attention(x.clone(), x.clone(), x.clone(), Some(mask), Some(bias.clone()), options)?;
/// let gradients = out.sum().backward();
/// assert_eq!(bias.grad(&gradients).unwrap().dims(), [1, 8, 5, 5]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// For tensors on another backend than [`Flex`], of other types or of shapes that do not fit, a
/// scale that is not finite, a softcap that is not finite and above 0, a window of no keys, and
/// sinks that are NaN or infinite or not one a query head.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    mask: Option<Tensor<4, Bool>>,
    bias: Option<Tensor<4>>,
    options: impl Into<AttentionOptions>,
) -> Result<Tensor<4>> {
    let (q, k, v) = (Held::of("q", q)?, Held::of("k", k)?, Held::of("v", v)?);
    let bias = bias.map(|bias| Held::of("bias", bias)).transpose()?;
    let mask = mask.map(hidden).transpose()?;
    let inputs = [Some(&q), Some(&k), Some(&v), bias.as_ref()];
    match context(inputs.into_iter().flatten())? {
        None => {
            let bias = bias.map(Held::primitive);
            Flex::attention(q.primitive(), k.primitive(), v.primitive(), mask, bias, options.into())
                .map(plain)
        }
        Some(context) => {
            let bias = bias.map(Held::lifted);
            let out =
                <Autodiff<Flex>>::attention(q.lifted(), k.lifted(), v.lifted(), mask, bias, options.into());
            Ok(tracked(out?, context))
        }
    }
}

/// Softmax attention with any mask and any smooth change of scores: masks, windows, changes of
/// scores, sinks and the scale are those of `dense`.
///
/// Shapes, types, gradients and cost are those of [`attention`]. Tables of scores and sinks
/// are constants.
///
/// ```
/// use attention_kernels::{dense::Dense, mask::Window, score::Alibi};
/// use attention_kernels_burn::attend;
/// use burn::tensor::{Device, Distribution, Tensor};
///
/// let x = Tensor::<4>::random([1, 8, 100, 64], Distribution::Default, &Device::flex());
/// let dense = Dense::builder().mask(Window::new(Some(31), Some(0))).score(Alibi::new(8)).build()?;
/// let out = attend(x.clone(), x.clone(), x, &dense)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// For tensors on another backend than [`Flex`], of other types or of shapes that do not fit.
pub fn attend<M, F>(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, dense: &Dense<M, F>) -> Result<Tensor<4>>
where
    M: Mask + Clone + 'static,
    F: Smooth + Clone + 'static,
{
    let (q, k, v) = (Held::of("q", q)?, Held::of("k", k)?, Held::of("v", v)?);
    match context([&q, &k, &v])? {
        None => Flex::attend(q.primitive(), k.primitive(), v.primitive(), dense).map(plain),
        Some(context) => {
            let out = <Autodiff<Flex>>::attend(q.lifted(), k.lifted(), v.lifted(), dense)?;
            Ok(tracked(out, context))
        }
    }
}

/// What a tensor holds.
enum Held {
    Plain(FlexTensor),
    /// In a graph, with the context that its backend goes on with.
    Graph(FloatTensor<Autodiff<Flex>>, DispatchAutodiffContext),
}

impl Held {
    fn of(argument: &'static str, tensor: Tensor<4>) -> Result<Self> {
        let DispatchTensor { kind, autodiff } = tensor.into_dispatch();
        match concrete(argument, kind)? {
            BackendTensor::Float(tensor) => Ok(Self::Plain(tensor)),
            BackendTensor::Autodiff(tensor) => Ok(Self::Graph(tensor, autodiff)),
            other => Err(unfit(argument, "f32, f16 or bf16", other.name().to_lowercase())),
        }
    }

    fn primitive(self) -> FlexTensor {
        match self {
            Self::Plain(tensor) => tensor,
            Self::Graph(tensor, _) => tensor.into_primitive(),
        }
    }

    /// In a graph: what was in none is a constant there.
    fn lifted(self) -> FloatTensor<Autodiff<Flex>> {
        match self {
            Self::Plain(tensor) => <Autodiff<Flex> as AutodiffBackend>::from_inner(tensor),
            Self::Graph(tensor, _) => tensor,
        }
    }
}

/// The context of those in a graph, if any is.
fn context<'a>(all: impl IntoIterator<Item = &'a Held>) -> Result<Option<DispatchAutodiffContext>> {
    let mut found = None;
    for held in all {
        let Held::Graph(_, context) = held else { continue };
        match found {
            Some(found) if found != *context => {
                let words = |context| format!("gradient checkpointing {context:?}");
                return Err(unfit("tensors", words(found), words(*context)));
            }
            _ => found = Some(*context),
        }
    }
    Ok(found)
}

fn concrete(argument: &'static str, kind: DispatchTensorKind) -> Result<BackendTensor<Flex>> {
    match kind {
        DispatchTensorKind::Flex(tensor) => Ok(tensor),
        DispatchTensorKind::Autodiff(inner) => concrete(argument, *inner),
        #[allow(unreachable_patterns, reason = "features of burn decide which there are")]
        _ => Err(unfit(argument, "a tensor on the backend Flex", "one on another")),
    }
}

fn hidden(mask: Tensor<4, Bool>) -> Result<FlexTensor> {
    match concrete("mask", mask.into_dispatch().kind)? {
        BackendTensor::Bool(tensor) => Ok(tensor),
        other => Err(unfit("mask", "bool", other.name().to_lowercase())),
    }
}

fn plain(tensor: FlexTensor) -> Tensor<4> {
    let kind = DispatchTensorKind::Flex(BackendTensor::Float(tensor));
    Tensor::from_dispatch(DispatchTensor { kind, autodiff: DispatchAutodiffContext::Disabled })
}

fn tracked(tensor: FloatTensor<Autodiff<Flex>>, autodiff: DispatchAutodiffContext) -> Tensor<4> {
    let kind = DispatchTensorKind::Flex(BackendTensor::Autodiff(tensor));
    Tensor::from_dispatch(DispatchTensor { kind: DispatchTensorKind::Autodiff(Box::new(kind)), autodiff })
}
