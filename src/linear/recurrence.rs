//! What makes a mechanism of this family: a recurrence over its inputs.

use ndarray::{Array3, Array4, ArrayViewMut4};

use crate::attention::{Attention, Cost, Input, Recurrent};
use crate::element::Element;
use crate::engine::recur::{self, Place, Source, Spec};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::linear::State;
use crate::linear::reference::{Reference, Token, define};
use crate::simd::mem::bytes_for;

/// A mechanism that is a configuration of the recurrence: it says which one,
/// where the operands come from, and what its paper makes of a token. Every
/// such mechanism has [`Attention`] and [`Recurrent`].
pub trait Recurrence: Send + Sync {
    /// What it takes.
    type Operands<'a, T: Element>: Input + Copy
    where
        Self: 'a;

    #[doc(hidden)]
    const NAME: &'static str;

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

fn reference<T: Element, M: Recurrence>(
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

impl<T: Element, M: Recurrence> Attention<T> for M {
    type Input<'a>
        = M::Operands<'a, T>
    where
        M: 'a;

    fn name(&self) -> &'static str {
        M::NAME
    }

    fn workspace_bytes(&self, x: M::Operands<'_, T>) -> Result<usize> {
        let spec = self.spec::<T>(&x)?;
        Ok(bytes_for::<f32>(self.scratch::<T>(&x)) + recur::workspace_bytes(&spec))
    }

    fn forward_into(
        &self,
        x: M::Operands<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let spec = self.spec::<T>(&x)?;
        check_out(&x, &out)?;
        run::<T, _>(self, &x, &spec, None, out, workspace);
        Ok(())
    }

    fn reference(&self, x: M::Operands<'_, T>) -> Result<Array4<f64>> {
        Ok(reference::<T, _>(self, &x, None)?.out)
    }

    fn error_bound(&self, x: M::Operands<'_, T>) -> Result<Array3<f64>> {
        Ok(reference::<T, _>(self, &x, None)?.bound)
    }

    fn cost(&self, x: M::Operands<'_, T>) -> Result<Cost> {
        let spec = self.spec::<T>(&x)?;
        let (batch, heads, len, dim) = x.out_dim()?;
        let tokens = batch * heads * len.max(spec.dims.kv_len);
        let out = batch * heads * len * dim * size_of::<T>();
        Ok(Cost { flops: (tokens * spec.flops()) as u64, bytes: (self.bytes::<T>(&x) + out) as u64 })
    }
}

impl<T: Element, M: Recurrence> Recurrent<T> for M {
    type State = State;

    fn initial_state(&self, x: M::Operands<'_, T>) -> Result<State> {
        Ok(State::zeros(self.spec::<T>(&x)?.state_shape()))
    }

    fn prefill_into(
        &self,
        x: M::Operands<'_, T>,
        state: &mut State,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let spec = self.spec::<T>(&x)?;
        check_out(&x, &out)?;
        state.check(spec.state_shape())?;
        run::<T, _>(self, &x, &spec, Some(state.as_mut_slice()), out, workspace);
        Ok(())
    }

    fn reference_from(&self, x: M::Operands<'_, T>, state: &State) -> Result<(Array4<f64>, State)> {
        let Reference { out, state, .. } = reference::<T, _>(self, &x, Some(state))?;
        Ok((out, State::from_f64(&state)))
    }
}
