//! Calls of the recurrence engine: options, checks, and the traits of the
//! mechanisms that are such a call.

use ndarray::{Array4, ArrayView, ArrayViewMut4};

use crate::attention::{Cost, Input};
use crate::definition::recurrence::{Reference, Token, define};
use crate::element::Element;
use crate::engine::kept::{Kept, Slots};
use crate::engine::recur::{self, Arrays, Form, Place, Read, Rule, Source, Spec, any_above_zero};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::state::{State, StatePool};
use crate::input::tokens::Tokens;
use crate::input::{Dim4, Dims, Lengths, filled};
use crate::simd::Isa;
use crate::simd::mem::bytes_for;
use crate::stages::options::{FINITE, check};

/// Options of recurrences.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    pub(crate) scale: Option<f32>,
    /// Whether the scale is `1 / sqrt(head_dim)` unless another was asked
    /// for, not 1.
    pub(crate) root: bool,
    pub(crate) form: Form,
    pub(crate) isa: Option<Isa>,
    pub(crate) growth: bool,
}

/// [`Options`] that have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) scale: Option<f32>,
    pub(crate) root: bool,
    pub(crate) form: Form,
    pub(crate) isa: Isa,
    pub(crate) growth: bool,
}

impl Options {
    pub(crate) fn build(self) -> Result<Config> {
        check("scale", &self.scale, &FINITE)?;
        let Self { scale, root, form, isa, growth } = self;
        Ok(Config { scale, root, form, isa: Isa::choose(isa)?, growth })
    }
}

impl Config {
    /// The factor of the outputs.
    pub(crate) fn scale(&self, dims: &Dims) -> f64 {
        if self.root { self.scale_or_sqrt(dims) } else { self.scale_or_one() }
    }

    /// The factor of the outputs: what was asked for, or `1 / sqrt(head_dim)`.
    pub(crate) fn scale_or_sqrt(&self, dims: &Dims) -> f64 {
        self.scale.map_or(1.0 / (dims.head_dim.max(1) as f64).sqrt(), f64::from)
    }

    /// The factor of the outputs: what was asked for, or 1.
    pub(crate) fn scale_or_one(&self) -> f64 {
        self.scale.map_or(1.0, f64::from)
    }

    /// The recurrence over these operands: decays and the rule are those
    /// whose arrays there are, and queries read before the update where they
    /// have a bonus.
    pub(crate) fn spec<'a>(&self, dims: Dims, lengths: Lengths<'a>, arrays: &Arrays<'_>) -> Spec<'a> {
        Spec {
            dims,
            lengths,
            steps: 1,
            joined: false,
            silent: false,
            state_dim: dims.head_dim,
            decay: arrays.decay.decay(),
            rule: match (&arrays.beta, &arrays.low_rank) {
                (Some(_), _) => Rule::Delta,
                (None, Some(_)) => Rule::LowRank,
                (None, None) => Rule::Add,
            },
            read: if arrays.bonus.is_some() { Read::Before } else { Read::After },
            scale: self.scale(&dims),
            normaliser: None,
            form: self.form,
            isa: self.isa,
        }
    }

    /// Refuses log decays above 0, unless growth was asked for.
    pub(crate) fn check_decays<D: ndarray::Dimension>(
        &self,
        argument: &'static str,
        decays: ArrayView<'_, f32, D>,
    ) -> Result<()> {
        if self.growth {
            return Ok(());
        }
        if any_above_zero(self.isa, decays.view()) {
            let largest = decays.fold(0f32, |most, &x| if x > most { x } else { most });
            let expected = "log decays of at most 0; allow_growth() permits others";
            return Err(Error::value(argument, expected, largest));
        }
        Ok(())
    }
}

/// Refuses parameters of another number of heads than the input has.
pub(crate) fn check_heads(argument: &'static str, have: usize, dims: &Dims) -> Result<()> {
    if have == dims.q_heads {
        return Ok(());
    }
    Err(Error::value(argument, format!("one for each of the {} heads", dims.q_heads), have))
}

/// Refuses parameters `[heads, head_dim]` of other sizes than the input's.
pub(crate) fn check_channels(argument: &'static str, have: (usize, usize), dims: &Dims) -> Result<()> {
    if have == (dims.q_heads, dims.head_dim) {
        return Ok(());
    }
    let expected = format!("[heads, head_dim] = [{}, {}]", dims.q_heads, dims.head_dim);
    Err(Error::shape(argument, expected, &[have.0, have.1]))
}

/// A mechanism that is a configuration of the recurrence: it says where the
/// operands come from and, where that is not what arrays have, what its paper
/// makes of a token. Every such mechanism has [`Attention`](crate::Attention)
/// and [`Recurrent`](crate::Recurrent), by [`recurrent!`].
pub(crate) trait Recurrence: Send + Sync {
    /// What it takes.
    type Operands<'a, T: Element>: Tokens + Input<Out = T>;

    fn config(&self) -> &Config;

    /// The arrays of the operands, heads and gates included.
    fn arrays<'a, T: Element>(&'a self, x: &'a Self::Operands<'_, T>) -> Arrays<'a>;

    /// Refuses what does not fit besides the shapes.
    fn check<T: Element>(&self, _x: &Self::Operands<'_, T>, _dims: &Dims) -> Result<()> {
        Ok(())
    }

    /// The recurrence for an input, which has been checked then.
    fn spec<'a, T: Element>(&'a self, x: &'a Self::Operands<'_, T>) -> Result<Spec<'a>> {
        let dims = x.token_dims()?;
        self.check::<T>(x, &dims)?;
        Ok(self.config().spec(dims, x.lengths(), &self.arrays::<T>(x)))
    }

    /// Calls `run` with where the operands come from.
    fn with_source<T: Element, R>(&self, x: &Self::Operands<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        run(&self.arrays::<T>(x))
    }

    /// Numbers that the mechanism works out before the recurrence.
    fn scratch<T: Element>(&self, _x: &Self::Operands<'_, T>) -> usize {
        0
    }

    /// [`with_source`](Self::with_source) for a mechanism that needs
    /// [`scratch`](Self::scratch), which it is given.
    fn with_scratch<T: Element, R>(
        &self,
        x: &Self::Operands<'_, T>,
        _scratch: &mut [f32],
        run: impl FnOnce(&dyn Source) -> R,
    ) -> R {
        self.with_source(x, run)
    }

    /// One token of one head, by the paper.
    fn token<T: Element>(&self, x: &Self::Operands<'_, T>, at: &Place) -> Token {
        Token::of(&self.arrays::<T>(x), at)
    }

    /// Roundings that the operands of any token have had before the
    /// recurrence takes them, beyond a few: the error bound counts them.
    fn roundings<T: Element>(&self, _x: &Self::Operands<'_, T>) -> f64 {
        0.0
    }

    /// Bytes of the inputs.
    fn bytes<T: Element>(&self, x: &Self::Operands<'_, T>) -> usize {
        x.bytes()
    }
}

/// The recurrence for an input, of which the arrays agree.
pub(crate) fn spec_of<'a, T: Element, M: Recurrence>(
    mechanism: &'a M,
    x: &'a M::Operands<'_, T>,
) -> Result<Spec<'a>> {
    x.dims()?;
    mechanism.spec::<T>(x)?.checked()
}

/// What carries a [`State`] from token to token: [`Recurrence`]s, and scans
/// that have an engine of their own. By [`recurrent!`] it has the traits.
pub(crate) trait Carrying: Send + Sync {
    type Input<'a, T: Element>: Tokens + Input<Out = T>;

    /// The shape of the state for an input, which has been checked then.
    fn state_shape<T: Element>(&self, x: &Self::Input<'_, T>) -> Result<Dim4>;

    fn workspace_bytes<T: Element>(&self, x: &Self::Input<'_, T>) -> Result<usize>;

    /// The kernel, from and to a state if there is one: checks everything once
    /// ([`check_call`] what is around the input), before anything is written.
    fn run<T: Element>(
        &self,
        x: &Self::Input<'_, T>,
        state: Option<Memory<'_>>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()>;

    /// The state after the tokens, without their outputs.
    fn advance<T: Element>(
        &self,
        x: &Self::Input<'_, T>,
        state: Memory<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let mut out = filled("out", x.out_dim()?, T::default())?;
        self.run::<T>(x, Some(state), out.view_mut(), workspace)
    }

    /// The definition, from a state of the right shape or from zero.
    fn define<T: Element>(&self, x: &Self::Input<'_, T>, state: Option<&Array4<f32>>) -> Result<Reference>;

    fn flops<T: Element>(&self, x: &Self::Input<'_, T>) -> Result<usize>;

    /// Bytes of inputs and parameters.
    fn bytes<T: Element>(&self, x: &Self::Input<'_, T>) -> usize {
        x.bytes()
    }
}

impl<M: Recurrence> Carrying for M {
    type Input<'a, T: Element> = M::Operands<'a, T>;

    fn state_shape<T: Element>(&self, x: &M::Operands<'_, T>) -> Result<Dim4> {
        Ok(spec_of::<T, M>(self, x)?.state_shape())
    }

    fn workspace_bytes<T: Element>(&self, x: &M::Operands<'_, T>) -> Result<usize> {
        Ok(bytes_for::<f32>(self.scratch::<T>(x)) + recur::workspace_bytes(&spec_of::<T, M>(self, x)?))
    }

    fn run<T: Element>(
        &self,
        x: &M::Operands<'_, T>,
        state: Option<Memory<'_>>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (spec, scratch) = (spec_of::<T, M>(self, x)?, self.scratch::<T>(x));
        check_call(x, spec.state_shape(), state.as_ref(), &out)?;
        let state = state.map(Memory::kept);
        let pooled = state.as_ref().map_or(0, |state| state.at.bytes(spec.dims.q_heads));
        let mut arena =
            workspace.arena(bytes_for::<f32>(scratch) + recur::workspace_bytes(&spec) + pooled)?;
        let scratch = arena.take(scratch);
        self.with_scratch::<T, _>(x, scratch, |source| recur::run_in(&spec, source, state, out, arena));
        Ok(())
    }

    fn advance<T: Element>(
        &self,
        x: &M::Operands<'_, T>,
        state: Memory<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (spec, scratch) = (spec_of::<T, M>(self, x)?, self.scratch::<T>(x));
        let spec = Spec { silent: true, ..spec };
        state.check(spec.state_shape())?;
        let state = state.kept();
        let pooled = state.at.bytes(spec.dims.q_heads);
        let mut arena =
            workspace.arena(bytes_for::<f32>(scratch) + recur::workspace_bytes(&spec) + pooled)?;
        let scratch = arena.take(scratch);
        let (batch, heads, ..) = x.out_dim()?;
        let mut nothing = Array4::<T>::default((batch, heads, 0, 0));
        self.with_scratch::<T, _>(x, scratch, |source| {
            recur::run_in(&spec, source, Some(state), nothing.view_mut(), arena);
        });
        Ok(())
    }

    fn define<T: Element>(&self, x: &M::Operands<'_, T>, state: Option<&Array4<f32>>) -> Result<Reference> {
        let spec = spec_of::<T, M>(self, x)?;
        let token = |at: &Place| self.token::<T>(x, at);
        let mut reference = define(&spec, state, token)?;
        let arrays = self.arrays::<T>(x);
        reference.add_skipped(&spec, |head| arrays.skip(head), token);
        let more = self.roundings::<T>(x) / (spec.state_dim + 64) as f64;
        reference.bound.mapv_inplace(|bound| bound * (1.0 + more));
        Ok(reference)
    }

    fn flops<T: Element>(&self, x: &M::Operands<'_, T>) -> Result<usize> {
        let spec = spec_of::<T, M>(self, x)?;
        let (batch, heads, len, _) = x.out_dim()?;
        Ok(batch * heads * len.max(spec.dims.kv_len) * spec.flops())
    }

    fn bytes<T: Element>(&self, x: &M::Operands<'_, T>) -> usize {
        Recurrence::bytes::<T>(self, x)
    }
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

/// Refuses an output and a state that do not fit.
pub(crate) fn check_call<T>(
    x: &impl Input,
    shape: Dim4,
    state: Option<&Memory<'_>>,
    out: &ArrayViewMut4<'_, T>,
) -> Result<()> {
    check_out(x, out)?;
    state.map_or(Ok(()), |state| state.check(shape))
}

/// Where the caller has the states of a call.
pub(crate) enum Memory<'a> {
    /// One a sequence.
    Own(&'a mut State),
    /// In slots of a pool.
    Pool(StatePool<'a>),
}

impl<'a> Memory<'a> {
    /// Refuses states of other sizes.
    fn check(&self, shape: Dim4) -> Result<()> {
        match self {
            Self::Own(state) => state.check(shape),
            Self::Pool(pool) => pool.check(shape),
        }
    }

    /// The states, and which of them sequences have.
    pub(crate) fn view(self) -> (ArrayViewMut4<'a, f32>, Slots<'a>) {
        match self {
            Self::Own(state) => (state.view_mut(), Slots::default()),
            Self::Pool(pool) => {
                let (states, of) = pool.into_parts();
                let count = states.dim().0;
                (states, Slots { of: Some(of), count })
            }
        }
    }

    /// The same, of numbers that lie one after the other.
    pub(crate) fn kept(self) -> Kept<'a> {
        let (states, at) = self.view();
        // Checked, or made so.
        Kept { numbers: states.into_slice().unwrap_or_default(), at }
    }
}

pub(crate) fn reference<T: Element, M: Carrying>(
    mechanism: &M,
    x: &M::Input<'_, T>,
    state: Option<&State>,
) -> Result<Reference> {
    let shape = mechanism.state_shape::<T>(x)?;
    let state = state.map(|state| state.check(shape).map(|()| state.view().to_owned())).transpose()?;
    mechanism.define::<T>(x, state.as_ref())
}

/// [`Attention::cost`](crate::Attention::cost)
pub(crate) fn cost<T: Element, M: Carrying>(mechanism: &M, x: &M::Input<'_, T>) -> Result<Cost> {
    let (flops, (batch, heads, len, dim)) = (mechanism.flops::<T>(x)?, x.out_dim()?);
    let out = batch * heads * len * dim * size_of::<T>();
    Ok(Cost { flops: flops as u64, bytes: (mechanism.bytes::<T>(x) + out) as u64 })
}

/// [`Attention`], [`Bounded`](crate::Bounded), [`Recurrent`](crate::Recurrent) and
/// [`Pooled`](crate::Pooled) for what is [`Carrying`] a state: real impls, so that each stands on its mechanism's page
/// of the docs.
macro_rules! recurrent {
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, $input:ident) => {
        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::Attention<$input<'_, T>>
            for $mechanism
        {
            fn workspace_bytes(&self, x: $input<'_, T>) -> crate::error::Result<usize> {
                crate::stages::recur::Carrying::workspace_bytes::<T>(self, &x)
            }

            fn forward_into(
                &self,
                x: $input<'_, T>,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::recur::Carrying::run::<T>(self, &x, None, out, workspace)
            }

            fn reference(&self, x: $input<'_, T>) -> crate::error::Result<ndarray::Array4<f64>> {
                Ok(crate::stages::recur::reference::<T, Self>(self, &x, None)?.out)
            }

            fn cost(&self, x: $input<'_, T>) -> crate::error::Result<crate::attention::Cost> {
                crate::stages::recur::cost::<T, Self>(self, &x)
            }
        }

        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::Bounded<$input<'_, T>>
            for $mechanism
        {
            fn error_bound(&self, x: $input<'_, T>) -> crate::error::Result<ndarray::Array3<f64>> {
                Ok(crate::stages::recur::reference::<T, Self>(self, &x, None)?.bound)
            }
        }

        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::Recurrent<$input<'_, T>>
            for $mechanism
        {
            type State = crate::input::state::State;

            fn initial_state(&self, x: $input<'_, T>) -> crate::error::Result<Self::State> {
                let shape = crate::stages::recur::Carrying::state_shape::<T>(self, &x)?;
                crate::input::state::State::zeros(shape)
            }

            fn prefill_into(
                &self,
                x: $input<'_, T>,
                state: &mut Self::State,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                let state = crate::stages::recur::Memory::Own(state);
                crate::stages::recur::Carrying::run::<T>(self, &x, Some(state), out, workspace)
            }

            fn advance_into(
                &self,
                x: $input<'_, T>,
                state: &mut Self::State,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                let state = crate::stages::recur::Memory::Own(state);
                crate::stages::recur::Carrying::advance::<T>(self, &x, state, workspace)
            }

            fn reference_from(
                &self,
                x: $input<'_, T>,
                state: &Self::State,
            ) -> crate::error::Result<(ndarray::Array4<f64>, Self::State)> {
                let reference = crate::stages::recur::reference::<T, Self>(self, &x, Some(state))?;
                Ok((reference.out, crate::input::state::State::from_f64(&reference.state)))
            }
        }

        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::Pooled<$input<'_, T>>
            for $mechanism
        {
            fn prefill_pooled_into(
                &self,
                x: $input<'_, T>,
                pool: crate::input::state::StatePool<'_>,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                let pool = crate::stages::recur::Memory::Pool(pool);
                crate::stages::recur::Carrying::run::<T>(self, &x, Some(pool), out, workspace)
            }
        }
    };
}
pub(crate) use recurrent;

#[cfg(test)]
mod tests;
