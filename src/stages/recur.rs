//! Calls of the recurrence engine: options, checks, and the traits of the
//! mechanisms that are such a call.

use ndarray::{ArrayView, ArrayViewMut4};

use crate::attention::{Cost, Input};
use crate::definition::recurrence::{Reference, Token, define};
use crate::element::Element;
use crate::engine::recur::{self, Form, Place, Source, Spec, any_above_zero};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::state::State;
use crate::simd::Isa;
use crate::simd::mem::bytes_for;

/// Options that every linear mechanism has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    pub(crate) scale: Option<f32>,
    pub(crate) form: Form,
    pub(crate) isa: Option<Isa>,
    pub(crate) growth: bool,
}

/// [`Options`] that have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) scale: Option<f32>,
    pub(crate) form: Form,
    pub(crate) isa: Isa,
    pub(crate) growth: bool,
}

impl Options {
    pub(crate) fn build(self) -> Result<Config> {
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::value("scale", "a finite number", scale));
        }
        let Self { scale, form, isa, growth } = self;
        Ok(Config { scale, form, isa: Isa::choose(isa)?, growth })
    }
}

impl Config {
    /// The factor of the outputs: what was asked for, or `1 / sqrt(head_dim)`.
    pub(crate) fn scale_or_sqrt(&self, dims: &Dims) -> f64 {
        self.scale.map_or(1.0 / (dims.head_dim.max(1) as f64).sqrt(), f64::from)
    }

    /// The factor of the outputs: what was asked for, or 1.
    pub(crate) fn scale_or_one(&self) -> f64 {
        self.scale.map_or(1.0, f64::from)
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

/// The builder methods that every linear mechanism has.
macro_rules! linear_options {
    ($builder:ident) => {
        impl $builder {
            /// Forces a form. Default: [`Form::Auto`](crate::linear::Form::Auto).
            pub fn form(mut self, form: crate::engine::recur::Form) -> Self {
                self.options.form = form;
                self
            }

            /// Forces an instruction set. Default: the best one of the CPU,
            /// or what [`ISA_VARIABLE`](crate::simd::ISA_VARIABLE) says.
            pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
                self.options.isa = Some(isa);
                self
            }
        }
    };
    ($builder:ident, scale $default:literal) => {
        crate::stages::recur::linear_options!($builder);
        impl $builder {
            #[doc = concat!("The factor of the outputs. Default: `", $default, "`.")]
            pub fn scale(mut self, scale: f32) -> Self {
                self.options.scale = Some(scale);
                self
            }
        }
    };
    ($builder:ident, scale $default:literal, growth) => {
        crate::stages::recur::linear_options!($builder, scale $default);
        impl $builder {
            /// Permits log decays above 0, which let the state grow without
            /// bounds.
            pub fn allow_growth(mut self) -> Self {
                self.options.growth = true;
                self
            }
        }
    };
}
pub(crate) use linear_options;

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

/// The recurrence for an input, of which the arrays agree.
pub(crate) fn spec_of<'a, T: Element, M: Recurrence>(
    mechanism: &'a M,
    x: &'a M::Operands<'_, T>,
) -> Result<Spec<'a>> {
    x.dims()?;
    mechanism.spec::<T>(x)?.checked()
}

/// Runs the kernel, from and to `state` if there is one.
fn run<T: Element, M: Recurrence>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    spec: &Spec<'_>,
    state: Option<&mut [f32]>,
    out: ArrayViewMut4<'_, T>,
    workspace: &mut Workspace,
) -> Result<()> {
    let scratch = mechanism.scratch::<T>(x);
    let mut arena = workspace.arena(bytes_for::<f32>(scratch) + recur::workspace_bytes(spec))?;
    let scratch = arena.take(scratch);
    mechanism.with_scratch::<T, _>(x, scratch, |source| recur::run_in(spec, source, state, out, arena));
    Ok(())
}

pub(crate) fn reference<T: Element, M: Recurrence>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    state: Option<&State>,
) -> Result<Reference> {
    let spec = spec_of::<T, M>(mechanism, x)?;
    let state =
        state.map(|state| state.check(spec.state_shape()).map(|()| state.view().to_owned())).transpose()?;
    let token = |at: &Place| mechanism.token::<T>(x, at);
    let mut reference = define(&spec, state.as_ref(), token)?;
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
    let spec = spec_of::<T, M>(mechanism, x)?;
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
    let spec = spec_of::<T, M>(mechanism, x)?;
    check_out(x, &out)?;
    if let Some(state) = &state {
        state.check(spec.state_shape())?;
    }
    run::<T, _>(mechanism, x, &spec, state.map(State::as_mut_slice), out, workspace)
}

/// [`Attention::cost`](crate::Attention::cost)
pub(crate) fn cost<T: Element, M: Recurrence>(mechanism: &M, x: &M::Operands<'_, T>) -> Result<Cost> {
    let spec = spec_of::<T, M>(mechanism, x)?;
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
                crate::stages::recur::workspace_bytes::<T, Self>(self, &x)
            }

            fn forward_into(
                &self,
                x: $input<'_, T>,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::recur::forward_into::<T, Self>(self, &x, None, out, workspace)
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
                let spec = crate::stages::recur::spec_of::<T, Self>(self, &x)?;
                crate::input::state::State::zeros(spec.state_shape())
            }

            fn prefill_into(
                &self,
                x: $input<'_, T>,
                state: &mut Self::State,
                out: ndarray::ArrayViewMut4<'_, T>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::recur::forward_into::<T, Self>(self, &x, Some(state), out, workspace)
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
    };
}
pub(crate) use recurrent;
