//! Attention on the primitives of burn's backends.

use std::fmt;
use std::sync::Arc;

use attention_kernels::dense::{Dense, SavedForward, SoftmaxGradients};
use attention_kernels::mask::Mask;
use attention_kernels::score::Smooth;
use attention_kernels::{
    Attention as _, Backward as _, Input, Mergeable, Qkv, Result, ScoreGradients, Workspace,
};
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Autodiff, Backend, DType, Flex};
use ndarray::{Array3, Array4, ArrayView4, ArrayViewMut4, Axis};

use crate::arrays::{Stored, by_type, misfit, rounded, tensor, view, wide, zeros};
use crate::mechanism::{Ask, AttentionOptions, Mechanism, Optional};

/// Backends that have the attention of `attention-kernels`: [`Flex`], and [`Autodiff`] around
/// it, which records one operator. [`attend`](crate::attend) and
/// [`attention`](crate::attention) are the same on burn's tensors.
pub trait AttentionBackend: Backend {
    /// See [`attend`](crate::attend), whose shapes and cost are these.
    ///
    /// # Errors
    /// For types other than `f32`, `f16` and `bf16`, and shapes that do not fit.
    fn attend<M, F>(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        dense: &Dense<M, F>,
    ) -> Result<FloatTensor<Self>>
    where
        M: Mask + Clone + 'static,
        F: Smooth + Clone + 'static;

    /// See [`attention`](crate::attention), whose shapes and cost are these.
    ///
    /// # Errors
    /// For types other than `f32`, `f16` and `bf16`, shapes that do not fit, and options out
    /// of range.
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: Option<BoolTensor<Self>>,
        bias: Option<FloatTensor<Self>>,
        options: AttentionOptions,
    ) -> Result<FloatTensor<Self>>;
}

impl AttentionBackend for Flex {
    fn attend<M, F>(q: FlexTensor, k: FlexTensor, v: FlexTensor, dense: &Dense<M, F>) -> Result<FlexTensor>
    where
        M: Mask + Clone + 'static,
        F: Smooth + Clone + 'static,
    {
        Ok(forward(&[q, k, v], dense, false)?.0)
    }

    fn attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        mask: Option<FlexTensor>,
        bias: Option<FlexTensor>,
        options: AttentionOptions,
    ) -> Result<FlexTensor> {
        Ok(forward(&[q, k, v], &Optional { options, mask, bias }, false)?.0)
    }
}

impl<C: CheckpointStrategy> AttentionBackend for Autodiff<Flex, C> {
    fn attend<M, F>(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        dense: &Dense<M, F>,
    ) -> Result<FloatTensor<Self>>
    where
        M: Mask + Clone + 'static,
        F: Smooth + Clone + 'static,
    {
        let ((q, a), (k, b), (v, c)) = (q.into_parts(), k.into_parts(), v.into_parts());
        recorded::<_, C, 3>([a, b, c], [q, k, v], dense.clone())
    }

    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: Option<FlexTensor>,
        bias: Option<FloatTensor<Self>>,
        options: AttentionOptions,
    ) -> Result<FloatTensor<Self>> {
        let ((q, a), (k, b), (v, c)) = (q.into_parts(), k.into_parts(), v.into_parts());
        let (bias, d) = bias.map(|bias| bias.into_parts()).unzip();
        let mechanism = Optional { options, mask, bias };
        match d {
            Some(d) => recorded::<_, C, 4>([a, b, c, d], [q, k, v], mechanism),
            None => recorded::<_, C, 3>([a, b, c], [q, k, v], mechanism),
        }
    }
}

/// The output, and its LSE if asked for.
fn forward(
    arrays: &[FlexTensor; 3],
    mechanism: &impl Mechanism,
    lse: bool,
) -> Result<(FlexTensor, Option<Array3<f32>>)> {
    by_type!("q", arrays[0].dtype(), T => mechanism.ask(Forward::<T> { x: read(arrays)?, lse }))
}

/// Queries, keys and values, where they lie.
fn read<T: Stored>([q, k, v]: &[FlexTensor; 3]) -> Result<Qkv<'_, T>> {
    Ok(Qkv::new(view::<T>("q", q)?, view::<T>("k", k)?, view::<T>("v", v)?))
}

struct Forward<'a, T> {
    x: Qkv<'a, T>,
    lse: bool,
}

impl<T: Stored> Ask for Forward<'_, T> {
    type Answer = (FlexTensor, Option<Array3<f32>>);

    fn of<M: Mask, F: Smooth>(self, dense: &Dense<M, F>) -> Result<Self::Answer> {
        let Self { x, lse } = self;
        let (batch, heads, len, dim) = x.out_dim()?;
        let workspace = &mut Workspace::new();
        let mut out = zeros::<T>("out", &[batch, len, heads, dim])?;
        let to =
            ArrayViewMut4::from_shape((batch, len, heads, dim), &mut out).map_err(|e| misfit("out", e))?;
        let to = to.permuted_axes([0, 2, 1, 3]);
        let lse = if lse {
            let rows = zeros::<f32>("lse", &[batch, heads, len])?;
            let mut lse = Array3::from_shape_vec((batch, heads, len), rows).map_err(|e| misfit("lse", e))?;
            dense.forward_with_lse_into(x, to, lse.view_mut(), workspace)?;
            Some(lse)
        } else {
            dense.forward_into(x, to, workspace)?;
            None
        };
        let out = tensor([batch, len, heads, dim], out);
        let layout = out.layout().transpose(1, 2);
        Ok((out.with_layout(layout), lse))
    }
}

/// The output as an operator of `N` inputs: queries, keys, values, and the mechanism's bias.
fn recorded<A: Mechanism, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    arrays: [FlexTensor; 3],
    mechanism: A,
) -> Result<FloatTensor<Autodiff<Flex, C>>> {
    let op = Attention(std::marker::PhantomData::<fn() -> A>);
    // Heavy enough that nothing is gained by making the output again.
    match Backward::<Flex, N>::prepare::<C>(op, nodes).compute_bound().stateful() {
        OpsKind::UnTracked(prep) => Ok(prep.finish(forward(&arrays, &mechanism, false)?.0)),
        OpsKind::Tracked(prep) => {
            // What is rounded is of no use to gradients.
            let exact = arrays[0].dtype() == DType::F32;
            let (out, lse) = forward(&arrays, &mechanism, exact)?;
            let saved = lse.map(|lse| (out.clone(), Arc::new(lse)));
            Ok(prep.finish(Kept { arrays, saved, mechanism }, out))
        }
    }
}

/// The operator, and what its backward pass needs.
struct Attention<A>(std::marker::PhantomData<fn() -> A>);

#[derive(Clone)]
struct Kept<A> {
    arrays: [FlexTensor; 3],
    saved: Option<(FlexTensor, Arc<Array3<f32>>)>,
    mechanism: A,
}

impl<A> fmt::Debug for Attention<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Attention")
    }
}

impl<A> fmt::Debug for Kept<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

impl<A: Mechanism, const N: usize> Backward<Flex, N> for Attention<A> {
    type State = Kept<A>;

    fn backward(self, ops: Ops<Kept<A>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_out = grads.consume::<Flex>(&ops.node);
        let wanted = [0, 1, 2, 3].map(|i| ops.parents.get(i).is_some_and(Option::is_some));
        // burn's backward pass has no errors, and the forward pass has refused what does not fit.
        let all = ops.state.gradients(&d_out, wanted).expect("gradients of what the forward pass accepted");
        for (parent, gradient) in ops.parents.into_iter().zip(all) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

impl<A: Mechanism> Kept<A> {
    /// Gradients of queries, keys, values and bias, as far as they are wanted.
    fn gradients(&self, d_out: &FlexTensor, wanted: [bool; 4]) -> Result<[Option<FlexTensor>; 4]> {
        by_type!("q", self.arrays[0].dtype(), T => self.gradients_of::<T>(d_out, wanted))
    }

    fn gradients_of<T: Stored>(
        &self,
        d_out: &FlexTensor,
        [q, k, v, bias]: [bool; 4],
    ) -> Result<[Option<FlexTensor>; 4]> {
        let (x, d_out) = (read::<T>(&self.arrays)?, wide("d_out", d_out)?);
        let d_out = d_out.view();
        let mut all = [None, None, None, None];
        if q || k || v {
            let out = self.saved.as_ref().map(|(out, _)| view::<f32>("out", out)).transpose()?;
            let softmax = out.zip(self.saved.as_ref()).map(|(out, (_, lse))| (out, lse.view()));
            let saved = SavedForward { softmax };
            let pulled = self.mechanism.ask(Pull { x, d_out, saved })?;
            for (to, (array, wanted)) in all.iter_mut().zip([(pulled.q, q), (pulled.k, k), (pulled.v, v)]) {
                *to = wanted.then(|| rounded(array, T::dtype())).transpose()?;
            }
        }
        if let Some(like) = self.mechanism.bias().filter(|_| bias) {
            let scores = self.mechanism.ask(PullScores { x, d_out })?;
            all[3] = Some(bias_gradient(scores, like)?);
        }
        Ok(all)
    }
}

struct Pull<'a, T> {
    x: Qkv<'a, T>,
    d_out: ArrayView4<'a, f32>,
    saved: SavedForward<'a>,
}

impl<T: Stored> Ask for Pull<'_, T> {
    type Answer = SoftmaxGradients;

    fn of<M: Mask, F: Smooth>(self, dense: &Dense<M, F>) -> Result<SoftmaxGradients> {
        dense.backward(self.x, self.d_out, self.saved)
    }
}

/// A bias is added last: its gradient is that of the scores.
struct PullScores<'a, T> {
    x: Qkv<'a, T>,
    d_out: ArrayView4<'a, f32>,
}

impl<T: Stored> Ask for PullScores<'_, T> {
    type Answer = Array4<f32>;

    fn of<M: Mask, F: Smooth>(self, dense: &Dense<M, F>) -> Result<Array4<f32>> {
        dense.score_gradients(self.x, self.d_out)
    }
}

/// Sums over the axes of which the bias has one for all.
fn bias_gradient(mut scores: Array4<f32>, bias: &FlexTensor) -> Result<FlexTensor> {
    for axis in 0..4 {
        if bias.layout().shape()[axis] == 1 && scores.shape()[axis] != 1 {
            scores = scores.sum_axis(Axis(axis)).insert_axis(Axis(axis));
        }
    }
    rounded(scores, bias.dtype())
}
