//! Gradients of the mechanisms of this family.

use ndarray::{Array3, Array4, ArrayView4, ArrayViewMut4, Axis};

use crate::attention::Input;
use crate::definition::recurrence_backward::differentiate;
use crate::element::Element;
use crate::engine::recur::backward::{self, Call, Dim, Gradients};
use crate::engine::recur::{Gate, Spec};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::filled;
use crate::input::state::State;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::recur::{Recurrence, spec_of};

/// A mechanism whose recurrence the engine has the gradients of. Every such
/// mechanism has [`Backward`](crate::Backward), by [`backward_pass!`].
pub(crate) trait Differentiable: Recurrence {
    /// One array for each of the input's.
    type Gradients<A>: GradientArrays<A>;

    /// Refuses where the engine's gradients are not those of what comes in.
    fn has_gradients(&self) -> Result<()> {
        Ok(())
    }

    /// Gradients of what [`token`](Recurrence::token) gives, in place of which
    /// come those of the arrays that it is made of.
    fn definition_back<T: Element>(
        &self,
        _x: &Self::Operands<'_, T>,
        _gradients: &mut Gradients<Array4<f64>>,
    ) {
    }
}

/// Gradients as their owner has them.
pub trait GradientArrays<A>: Sized {
    /// The arrays, those of one number a token with a last axis of 1. Refuses
    /// if one is missing.
    #[doc(hidden)]
    fn of(arrays: Gradients<Array4<A>>) -> Result<Self>;

    /// The same arrays to write.
    #[doc(hidden)]
    fn views(&mut self) -> Gradients<ArrayViewMut4<'_, A>>;
}

/// The recurrence of an input, if the engine has its gradients.
fn spec<'a, T: Element, M: Differentiable>(mechanism: &'a M, x: &'a M::Operands<'_, T>) -> Result<Spec<'a>> {
    let spec = spec_of::<T, M>(mechanism, x)?;
    mechanism.has_gradients()?;
    if spec.normaliser.is_some() {
        let reason = "the engine has those of plain sums alone";
        return Err(Error::Conflict { option: "gradients", with: "a division by sums of weights", reason });
    }
    Ok(spec)
}

/// An array of gradients besides those that every mechanism has.
trait Part<A>: Sized {
    fn of(argument: &'static str, array: Option<Array4<A>>) -> Result<Self>;
    fn view(&mut self) -> ArrayViewMut4<'_, A>;
}

impl<A> Part<A> for Array4<A> {
    fn of(argument: &'static str, array: Option<Array4<A>>) -> Result<Self> {
        array.ok_or_else(|| Error::value(argument, "a size from the mechanism", "none"))
    }

    fn view(&mut self) -> ArrayViewMut4<'_, A> {
        self.view_mut()
    }
}

/// One number a token: `[batch, heads, len, 1]` in the engine.
impl<A> Part<A> for Array3<A> {
    fn of(argument: &'static str, array: Option<Array4<A>>) -> Result<Self> {
        Ok(<Array4<A> as Part<A>>::of(argument, array)?.remove_axis(Axis(3)))
    }

    fn view(&mut self) -> ArrayViewMut4<'_, A> {
        self.view_mut().insert_axis(Axis(3))
    }
}

/// Declares what an input gets: gradients of queries, keys, values and state,
/// and of whatever else it has.
macro_rules! gradients {
    ($($gradients:ident of $input:literal in $path:literal { $($(#[$doc:meta])* $field:ident: $array:ident as $part:ident,)* })+) => {$(
        #[doc = concat!("What [`", $input, "`](crate::", $path, $input, ") gets, each of the shape of its array.")]
        #[derive(Clone, Debug, PartialEq)]
        pub struct $gradients<A = f32> {
            /// Of the queries.
            pub q: Array4<A>,
            /// Of the keys.
            pub k: Array4<A>,
            /// Of the values.
            pub v: Array4<A>,
            $($(#[$doc])* pub $field: $array<A>,)*
            /// Of the state at the start, `[sequences, heads, state_dim, columns]`.
            pub state: Array4<A>,
        }

        impl<A> GradientArrays<A> for $gradients<A> {
            fn of(arrays: Gradients<Array4<A>>) -> Result<Self> {
                let Gradients { q, k, v, state, .. } = arrays;
                $(let $field = Part::of(stringify!($field), arrays.$part)?;)*
                Ok(Self { q, k, v, $($field,)* state })
            }

            #[allow(unused_mut, reason = "some have no more")]
            fn views(&mut self) -> Gradients<ArrayViewMut4<'_, A>> {
                let (q, k, v, state) =
                    (self.q.view_mut(), self.k.view_mut(), self.v.view_mut(), self.state.view_mut());
                let mut views = Gradients { q, k, v, decay: None, beta: None, state };
                $(views.$part = Some(Part::view(&mut self.$field));)*
                views
            }
        }
    )+};
}

gradients! {
    QkvGradients of "Qkv" in "" {}
    TokenGatedGradients of "TokenGated" in "linear::" {
        /// Of the log decays, `[batch, heads, len]`.
        log_decay: Array3 as decay,
    }
    ChannelGatedGradients of "ChannelGated" in "linear::" {
        /// Of the log decays, `[batch, heads, len, head_dim]`.
        log_decay: Array4 as decay,
    }
    DeltaGradients of "DeltaQkv" in "linear::" {
        /// Of beta, `[batch, heads, len]`.
        beta: Array3 as beta,
    }
    GatedDeltaGradients of "GatedDeltaQkv" in "linear::" {
        /// Of the log decays, `[batch, heads, len]`.
        log_decay: Array3 as decay,
        /// Of beta, `[batch, heads, len]`.
        beta: Array3 as beta,
    }
    KdaGradients of "KdaQkv" in "linear::" {
        /// Of the log decays, `[batch, heads, len, head_dim]`.
        log_decay: Array4 as decay,
        /// Of beta, `[batch, heads, len]`.
        beta: Array3 as beta,
    }
}

/// The sizes of all gradients of an input that `spec` has accepted.
fn dims<T: Element, M: Differentiable>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    state: (usize, usize, usize, usize),
) -> Gradients<Dim> {
    let arrays = mechanism.arrays::<T>(x);
    Gradients {
        q: arrays.q.dim(),
        k: arrays.k.dim(),
        v: arrays.v.dim(),
        decay: match &arrays.decay {
            Gate::None | Gate::Constant(_) => None,
            Gate::Token(g) => Some(g.view().insert_axis(Axis(3)).dim()),
            Gate::Channel(g) => Some(g.dim()),
        },
        beta: arrays.beta.map(|beta| beta.insert_axis(Axis(3)).dim()),
        state,
    }
}

/// Refuses an array of another shape.
fn check<A>(argument: &'static str, axes: &str, want: Dim, got: &ArrayView4<'_, A>) -> Result<()> {
    if got.dim() == want {
        return Ok(());
    }
    let (a, b, c, d) = want;
    Err(Error::shape(argument, format!("{axes} = [{a}, {b}, {c}, {d}]"), got.shape()))
}

/// Refuses gradients that do not fit the input, and a state that does not.
fn check_all(
    x: &impl Input,
    state_shape: Dim,
    state: Option<&State>,
    d_out: &ArrayView4<'_, f32>,
    d_state: Option<&ArrayView4<'_, f32>>,
) -> Result<()> {
    if let Some(state) = state {
        state.check(state_shape)?;
    }
    check("d_out", "[batch, heads, len, value_dim]", x.out_dim()?, d_out)?;
    match d_state {
        Some(d_state) => check("d_state", "[sequences, heads, state_dim, columns]", state_shape, d_state),
        None => Ok(()),
    }
}

fn any(x: ArrayView4<'_, f32>) -> AnyArray<'_> {
    AnyArray::F32(Heads::new(x))
}

/// What goes with the gradients of a recurrence besides its input.
#[derive(Clone, Copy, Debug, Default)]
pub struct Carried<'a> {
    /// The state at the start, zero if there is none.
    pub state: Option<&'a State>,
    /// The gradient of the state after the last token, of the state's shape,
    /// zero if there is none.
    pub d_state: Option<ArrayView4<'a, f32>>,
}

/// Arrays of these sizes, if memory has room for them.
fn zeros<A: Clone + Default>(dims: Gradients<Dim>) -> Result<Gradients<Array4<A>>> {
    let mut room = Ok(());
    let gradients = dims.map(|dim| {
        filled("gradients", dim, A::default()).unwrap_or_else(|refusal| {
            room = Err(refusal);
            Array4::default((0, 0, 0, 0))
        })
    });
    room.map(|()| gradients)
}

/// [`Backward::zero_gradients`](crate::Backward::zero_gradients)
pub(crate) fn zero_gradients<T: Element, M: Differentiable>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
) -> Result<M::Gradients<f32>> {
    let state = spec::<T, M>(mechanism, x)?.state_shape();
    M::Gradients::of(zeros(dims::<T, M>(mechanism, x, state))?)
}

/// [`Backward::backward_workspace_bytes`](crate::Backward::backward_workspace_bytes)
pub(crate) fn workspace_bytes<T: Element, M: Differentiable>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
) -> Result<usize> {
    let spec = spec::<T, M>(mechanism, x)?;
    Ok(backward::workspace_bytes(&spec, &dims::<T, M>(mechanism, x, spec.state_shape())))
}

/// [`Backward::backward_into`](crate::Backward::backward_into)
pub(crate) fn backward_into<T: Element, M: Differentiable>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    d_out: ArrayView4<'_, f32>,
    Carried { state, d_state }: Carried<'_>,
    gradients: &mut M::Gradients<f32>,
    workspace: &mut Workspace,
) -> Result<()> {
    let spec = spec::<T, M>(mechanism, x)?;
    check_all(x, spec.state_shape(), state, &d_out, d_state.as_ref())?;
    let want = dims::<T, M>(mechanism, x, spec.state_shape());
    let to = gradients.views();
    let rows = "[batch, heads, len, dim]";
    check("gradients.q", rows, want.q, &to.q.view())?;
    check("gradients.k", rows, want.k, &to.k.view())?;
    check("gradients.v", rows, want.v, &to.v.view())?;
    check("gradients.state", "[sequences, heads, state_dim, columns]", want.state, &to.state.view())?;
    for (argument, want, got) in
        [("gradients.log_decay", want.decay, &to.decay), ("gradients.beta", want.beta, &to.beta)]
    {
        if let (Some(want), Some(got)) = (want, got) {
            check(argument, rows, want, &got.view())?;
        }
    }
    mechanism.with_source::<T, _>(x, |source| {
        let call = Call {
            spec: &spec,
            source,
            state: state.map(|state| any(state.view())),
            d_out: any(d_out),
            d_state: d_state.map(any),
        };
        backward::run(&call, to, workspace)
    })
}

/// [`Backward::reference_backward`](crate::Backward::reference_backward)
pub(crate) fn reference_backward<T: Element, M: Differentiable>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    d_out: ArrayView4<'_, f32>,
    Carried { state, d_state }: Carried<'_>,
) -> Result<M::Gradients<f64>> {
    let spec = spec::<T, M>(mechanism, x)?;
    check_all(x, spec.state_shape(), state, &d_out, d_state.as_ref())?;
    let state = state.map(State::view);
    let dims = dims::<T, M>(mechanism, x, spec.state_shape());
    // Room for them, before they are worked out.
    zeros::<f64>(dims)?;
    let mut gradients = differentiate(&spec, &dims, state, d_out, d_state, |at| mechanism.token::<T>(x, at));
    mechanism.definition_back::<T>(x, &mut gradients);
    M::Gradients::of(gradients)
}

/// [`Backward`](crate::Backward) for a [`Differentiable`] mechanism.
macro_rules! backward_pass {
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, $input:ident, $gradients:ident) => {
        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::Backward<$input<'_, T>>
            for $mechanism
        {
            type Gradients<A> = $gradients<A>;
            type Carried<'a> = crate::stages::differentiate::Carried<'a>;

            fn zero_gradients(&self, x: $input<'_, T>) -> crate::error::Result<$gradients<f32>> {
                crate::stages::differentiate::zero_gradients::<T, Self>(self, &x)
            }

            fn backward_workspace_bytes(&self, x: $input<'_, T>) -> crate::error::Result<usize> {
                crate::stages::differentiate::workspace_bytes::<T, Self>(self, &x)
            }

            fn backward_into(
                &self,
                x: $input<'_, T>,
                d_out: ndarray::ArrayView4<'_, f32>,
                carried: crate::stages::differentiate::Carried<'_>,
                gradients: &mut $gradients<f32>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::differentiate::backward_into::<T, Self>(
                    self, &x, d_out, carried, gradients, workspace,
                )
            }

            fn reference_backward(
                &self,
                x: $input<'_, T>,
                d_out: ndarray::ArrayView4<'_, f32>,
                carried: crate::stages::differentiate::Carried<'_>,
            ) -> crate::error::Result<$gradients<f64>> {
                crate::stages::differentiate::reference_backward::<T, Self>(self, &x, d_out, carried)
            }
        }
    };
}
pub(crate) use backward_pass;

/// A mechanism whose operands are the arrays that it is given is
/// [`Differentiable`].
macro_rules! differentiable {
    ($mechanism:ty, $input:ident, $gradients:ident) => {
        impl $crate::stages::differentiate::Differentiable for $mechanism {
            type Gradients<A> = $gradients<A>;
        }
        $crate::stages::differentiate::backward_pass!($mechanism, $input, $gradients);
    };
}
pub(crate) use differentiable;

#[cfg(test)]
mod tests;
