//! What makes a mechanism of this family: a recurrence over its inputs.

use ndarray::ArrayViewMut4;

use crate::attention::{Cost, Input};
use crate::element::Element;
use crate::engine::recur::{self, Place, Source, Spec};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::linear::State;
use crate::linear::reference::{Reference, Token, define};
use crate::simd::mem::bytes_for;

/// A mechanism that is a configuration of the recurrence: it says which one,
/// where the operands come from, and what its paper makes of a token. Every
/// such mechanism has [`Attention`](crate::Attention) and
/// [`Recurrent`](crate::Recurrent), by [`recurrent!`].
pub trait Recurrence: Send + Sync {
    /// What it takes.
    type Operands<'a, T: Element>: Input<Out = T>;

    /// The recurrence for an input, which has been checked then.
    #[doc(hidden)]
    fn spec<'a, T: Element>(&'a self, x: &'a Self::Operands<'_, T>) -> Result<Spec<'a>>;

    /// Calls `run` with where the operands come from.
    #[doc(hidden)]
    fn with_source<T: Element, R>(&self, x: &Self::Operands<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R;

    /// As [`Source::skip`] has it.
    #[doc(hidden)]
    fn skip(&self, _head: usize) -> &[f32] {
        &[]
    }

    /// Numbers that the mechanism works out before the recurrence.
    #[doc(hidden)]
    fn scratch<T: Element>(&self, _x: &Self::Operands<'_, T>) -> usize {
        0
    }

    /// [`with_source`](Self::with_source) for a mechanism that needs
    /// [`scratch`](Self::scratch), which it is given.
    #[doc(hidden)]
    fn with_scratch<T: Element, R>(
        &self,
        x: &Self::Operands<'_, T>,
        _scratch: &mut [f32],
        run: impl FnOnce(&dyn Source) -> R,
    ) -> R {
        self.with_source(x, run)
    }

    /// One token of one head, by the paper.
    #[doc(hidden)]
    fn token<T: Element>(&self, x: &Self::Operands<'_, T>, at: &Place) -> Token;

    /// Roundings that the operands of any token have had before the
    /// recurrence takes them, beyond a few: the error bound counts them.
    #[doc(hidden)]
    fn roundings<T: Element>(&self, _x: &Self::Operands<'_, T>) -> f64 {
        0.0
    }

    /// Bytes of the inputs.
    #[doc(hidden)]
    fn bytes<T: Element>(&self, x: &Self::Operands<'_, T>) -> usize;
}

/// Runs the kernel, from and to `state` if there is one.
fn run<T: Element, M: Recurrence>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    spec: &Spec<'_>,
    state: Option<&mut [f32]>,
    out: ArrayViewMut4<'_, T>,
    workspace: &mut Workspace,
) {
    let scratch = mechanism.scratch::<T>(x);
    let mut arena = workspace.arena(bytes_for::<f32>(scratch) + recur::workspace_bytes(spec));
    let scratch = arena.take(scratch);
    mechanism.with_scratch::<T, _>(x, scratch, |source| recur::run_in(spec, source, state, out, arena));
}

pub(crate) fn reference<T: Element, M: Recurrence>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    state: Option<&State>,
) -> Result<Reference> {
    let spec = mechanism.spec::<T>(x)?;
    let state =
        state.map(|state| state.check(spec.state_shape()).map(|()| state.view().to_owned())).transpose()?;
    let token = |at: &Place| mechanism.token::<T>(x, at);
    let mut reference = define(&spec, state.as_ref(), token);
    reference.add_skipped(|head| mechanism.skip(head), token);
    let more = mechanism.roundings::<T>(x) / (spec.state_dim + 64) as f64;
    reference.bound.mapv_inplace(|bound| bound * (1.0 + more));
    Ok(reference)
}

/// Refuses an output that does not fit.
pub(crate) fn check_out<T>(x: &impl Input, out: &ArrayViewMut4<'_, T>) -> Result<()> {
    let (batch, heads, len, dim) = x.out_dim()?;
    if out.dim() == (batch, heads, len, dim) {
        return Ok(());
    }
    let expected = format!("[batch, heads, len, value_dim] = [{batch}, {heads}, {len}, {dim}]");
    Err(Error::shape("out", expected, out.shape()))
}

/// [`Attention::workspace_bytes`](crate::Attention::workspace_bytes)
pub(crate) fn workspace_bytes<T: Element, M: Recurrence>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
) -> Result<usize> {
    let spec = mechanism.spec::<T>(x)?;
    Ok(bytes_for::<f32>(mechanism.scratch::<T>(x)) + recur::workspace_bytes(&spec))
}

/// [`Attention::forward_into`](crate::Attention::forward_into), or [`Recurrent::prefill_into`](crate::Recurrent::prefill_into) where there is a
/// state.
pub(crate) fn forward_into<T: Element, M: Recurrence>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    state: Option<&mut State>,
    out: ArrayViewMut4<'_, T>,
    workspace: &mut Workspace,
) -> Result<()> {
    let spec = mechanism.spec::<T>(x)?;
    check_out(x, &out)?;
    if let Some(state) = &state {
        state.check(spec.state_shape())?;
    }
    run::<T, _>(mechanism, x, &spec, state.map(State::as_mut_slice), out, workspace);
    Ok(())
}

/// [`Attention::cost`](crate::Attention::cost)
pub(crate) fn cost<T: Element, M: Recurrence>(mechanism: &M, x: &M::Operands<'_, T>) -> Result<Cost> {
    let spec = mechanism.spec::<T>(x)?;
    let (batch, heads, len, dim) = x.out_dim()?;
    let tokens = batch * heads * len.max(spec.dims.kv_len);
    let out = batch * heads * len * dim * size_of::<T>();
    Ok(Cost { flops: (tokens * spec.flops()) as u64, bytes: (mechanism.bytes::<T>(x) + out) as u64 })
}

/// [`Attention`], [`Bounded`](crate::Bounded) and [`Recurrent`](crate::Recurrent)
/// for a [`Recurrence`]: real impls, so that each stands on its mechanism's page
/// of the docs.
macro_rules! recurrent {
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, $input:ident) => {
        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::Attention<$input<'_, T>>
            for $mechanism
        {
            fn workspace_bytes(&self, x: $input<'_, T>) -> crate::error::Result<usize> {
                crate::linear::recurrence::workspace_bytes::<T, Self>(self, &x)
            }

            fn forward_into(
                &self,
                x: $input<'_, T>,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::linear::recurrence::forward_into::<T, Self>(self, &x, None, out, workspace)
            }

            fn reference(&self, x: $input<'_, T>) -> crate::error::Result<ndarray::Array4<f64>> {
                Ok(crate::linear::recurrence::reference::<T, Self>(self, &x, None)?.out)
            }

            fn cost(&self, x: $input<'_, T>) -> crate::error::Result<crate::attention::Cost> {
                crate::linear::recurrence::cost::<T, Self>(self, &x)
            }
        }

        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::Bounded<$input<'_, T>>
            for $mechanism
        {
            fn error_bound(&self, x: $input<'_, T>) -> crate::error::Result<ndarray::Array3<f64>> {
                Ok(crate::linear::recurrence::reference::<T, Self>(self, &x, None)?.bound)
            }
        }

        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::Recurrent<$input<'_, T>>
            for $mechanism
        {
            type State = crate::linear::State;

            fn initial_state(&self, x: $input<'_, T>) -> crate::error::Result<Self::State> {
                let spec = crate::linear::recurrence::Recurrence::spec::<T>(self, &x)?;
                Ok(crate::linear::State::zeros(spec.state_shape()))
            }

            fn prefill_into(
                &self,
                x: $input<'_, T>,
                state: &mut Self::State,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::linear::recurrence::forward_into::<T, Self>(self, &x, Some(state), out, workspace)
            }

            fn reference_from(
                &self,
                x: $input<'_, T>,
                state: &Self::State,
            ) -> crate::error::Result<(ndarray::Array4<f64>, Self::State)> {
                let reference = crate::linear::recurrence::reference::<T, Self>(self, &x, Some(state))?;
                Ok((reference.out, crate::linear::State::from_f64(&reference.state)))
            }
        }
    };
}
pub(crate) use recurrent;
