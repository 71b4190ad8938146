//! Gradients of the mechanisms of this family.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView4, ArrayViewMut4, Axis};

use crate::attention::Input;
use crate::definition::recurrence_backward::{Found, differentiate};
use crate::element::Element;
use crate::engine::recur::backward::{self, Call, Dim, Gradients};
use crate::engine::recur::{Gate, Place, Source, Spec};
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

    /// The sizes of the gradients that it has, of those for the arrays of its
    /// operands and parameters, with what besides these it has gradients of.
    fn sizes(&self, of_arrays: Gradients<Dim>) -> Gradients<Dim> {
        of_arrays
    }

    /// Gradients of what [`token`](Recurrence::token) gives, in place of which
    /// come those of the arrays that it is made of.
    fn token_back<T: Element>(&self, _x: &Self::Operands<'_, T>, _at: &Place, _found: &mut Found) {}
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

    /// What they are called.
    #[doc(hidden)]
    fn names() -> Gradients<&'static str>;
}

/// The recurrence of an input, if the engine has its gradients.
fn spec<'a, T: Element, M: Differentiable>(mechanism: &'a M, x: &'a M::Operands<'_, T>) -> Result<Spec<'a>> {
    let spec = spec_of::<T, M>(mechanism, x)?;
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

/// Numbers of heads: `[1, heads, 1, dim]` in the engine.
impl<A> Part<A> for Array2<A> {
    fn of(argument: &'static str, array: Option<Array4<A>>) -> Result<Self> {
        Ok(<Array4<A> as Part<A>>::of(argument, array)?.remove_axis(Axis(2)).remove_axis(Axis(0)))
    }

    fn view(&mut self) -> ArrayViewMut4<'_, A> {
        self.view_mut().insert_axis(Axis(1)).insert_axis(Axis(0))
    }
}

/// One number a head: `[1, heads, 1, 1]` in the engine.
impl<A> Part<A> for Array1<A> {
    fn of(argument: &'static str, array: Option<Array4<A>>) -> Result<Self> {
        Ok(<Array2<A> as Part<A>>::of(argument, array)?.remove_axis(Axis(1)))
    }

    fn view(&mut self) -> ArrayViewMut4<'_, A> {
        self.view_mut().insert_axis(Axis(1)).insert_axis(Axis(1)).insert_axis(Axis(0))
    }
}

/// Declares what an input gets: gradients of what it has for queries and for
/// values, of the state, and of whatever else it has.
macro_rules! gradients {
    ($($gradients:ident of $input:literal in $path:literal, $q:ident, $v:ident { $($(#[$doc:meta])* $field:ident: $array:ident as $part:ident,)* })+) => {$(
        #[doc = concat!("What [`", $input, "`](crate::", $path, $input, ") gets, each of the shape of its array.")]
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub struct $gradients<A = f32> {
            /// Of the queries.
            pub $q: Array4<A>,
            /// Of the values.
            pub $v: Array4<A>,
            $($(#[$doc])* pub $field: $array<A>,)*
            /// Of the state at the start, `[sequences, heads, state_dim, columns]`.
            pub state: Array4<A>,
        }

        impl<A> GradientArrays<A> for $gradients<A> {
            fn of(arrays: Gradients<Array4<A>>) -> Result<Self> {
                $(let $field = Part::of(stringify!($field), arrays.$part)?;)*
                Ok(Self { $q: arrays.q, $v: arrays.v, $($field,)* state: arrays.state })
            }

            fn views(&mut self) -> Gradients<ArrayViewMut4<'_, A>> {
                let (q, v) = (self.$q.view_mut(), self.$v.view_mut());
                let mut views = Gradients::of_all(q, v, self.state.view_mut());
                $(views.$part = Some(Part::view(&mut self.$field));)*
                views
            }

            fn names() -> Gradients<&'static str> {
                let (q, v) = (concat!("gradients.", stringify!($q)), concat!("gradients.", stringify!($v)));
                let mut names = Gradients::of_all(q, v, "gradients.state");
                $(names.$part = Some(concat!("gradients.", stringify!($field)));)*
                names
            }
        }
    )+};
}

gradients! {
    QkvGradients of "Qkv" in "", q, v {
        /// Of the keys.
        k: Array4 as k,
    }
    TokenGatedGradients of "TokenGated" in "linear::", q, v {
        /// Of the keys.
        k: Array4 as k,
        /// Of the log decays, `[batch, heads, len]`.
        log_decay: Array3 as decay,
    }
    ChannelGatedGradients of "ChannelGated" in "linear::", q, v {
        /// Of the keys.
        k: Array4 as k,
        /// Of the log decays, `[batch, heads, len, head_dim]`.
        log_decay: Array4 as decay,
    }
    DeltaGradients of "DeltaQkv" in "linear::", q, v {
        /// Of the keys.
        k: Array4 as k,
        /// Of beta, `[batch, heads, len]`.
        beta: Array3 as beta,
    }
    GatedDeltaGradients of "GatedDeltaQkv" in "linear::", q, v {
        /// Of the keys.
        k: Array4 as k,
        /// Of the log decays, `[batch, heads, len]`.
        log_decay: Array3 as decay,
        /// Of beta, `[batch, heads, len]`.
        beta: Array3 as beta,
    }
    Hgrn2Gradients of "Hgrn2Input" in "linear::", q, v {
        /// Of the logits of gates, `[batch, heads, len, head_dim]`.
        forget: Array4 as decay,
    }
    Mamba2Gradients of "Mamba2Input" in "linear::", c, x {
        /// Of the keys.
        b: Array4 as k,
        /// Of the steps before their bias and softplus, `[batch, heads, len]`.
        dt: Array3 as decay,
        /// Of `A_log`, one a head.
        a_log: Array1 as rate,
        /// Of the bias of steps, one a head.
        dt_bias: Array1 as bias,
        /// Of `D`, `[heads, 1]`, `[heads, value_dim]` where each channel has one,
        /// or `[heads, 0]`.
        skip: Array2 as skip,
    }
    Rwkv6Gradients of "ChannelGated" in "linear::", q, v {
        /// Of the keys.
        k: Array4 as k,
        /// Of the log decays, `[batch, heads, len, head_dim]`.
        log_decay: Array4 as decay,
        /// Of the bonus, `[heads, head_dim]`.
        bonus: Array2 as bonus,
    }
    Rwkv7Gradients of "Rwkv7Input" in "linear::", q, v {
        /// Of the replacement keys.
        k: Array4 as k,
        /// Of the log decays, `[batch, heads, len, head_dim]`.
        log_decay: Array4 as decay,
        /// Of the removal keys.
        kappa: Array4 as a,
        /// Of the learning rates, `[batch, heads, len, head_dim]`.
        rate: Array4 as b,
    }
    KdaGradients of "KdaQkv" in "linear::", q, v {
        /// Of the keys.
        k: Array4 as k,
        /// Of the log decays, or of the raw numbers of a bounded gate, `[batch,
        /// heads, len, head_dim]`.
        log_decay: Array4 as decay,
        /// Of beta, `[batch, heads, len]`.
        beta: Array3 as beta,
        /// Of `a_log`, `[heads, 1]`, or `[heads, 0]` where there is none.
        a_log: Array2 as rate,
        /// Of the bias of raw numbers, `[heads, head_dim]`, or `[heads, 0]`.
        dt_bias: Array2 as bias,
    }
}

/// The sizes of all gradients of an input that `spec` has accepted.
fn dims<T: Element, M: Differentiable>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    state: (usize, usize, usize, usize),
) -> Gradients<Dim> {
    let arrays = mechanism.arrays::<T>(x);
    let of_heads = |x: &[f32]| (1, arrays.heads, 1, x.len() / arrays.heads.max(1));
    mechanism.sizes(Gradients {
        k: Some(arrays.k.dim()),
        decay: match &arrays.decay {
            Gate::None | Gate::Constant(_) => None,
            Gate::Token(g) => Some(g.view().insert_axis(Axis(3)).dim()),
            Gate::Channel(g) => Some(g.dim()),
        },
        beta: arrays.beta.map(|beta| beta.insert_axis(Axis(3)).dim()),
        a: arrays.low_rank.map(|(a, _)| a.dim()),
        b: arrays.low_rank.map(|(_, b)| b.dim()),
        bonus: arrays.bonus.map(of_heads),
        skip: (!arrays.skip.is_empty()).then(|| of_heads(arrays.skip)),
        ..Gradients::of_all(arrays.q.dim(), arrays.v.dim(), state)
    })
}

/// Refuses an array of another shape.
pub(crate) fn check<A>(argument: &'static str, axes: &str, want: Dim, got: &ArrayView4<'_, A>) -> Result<()> {
    if got.dim() == want {
        return Ok(());
    }
    let (a, b, c, d) = want;
    Err(Error::shape(argument, format!("{axes} = [{a}, {b}, {c}, {d}]"), got.shape()))
}

/// Refuses gradients that do not fit the input, and a state that does not.
pub(crate) fn check_all(
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

pub(crate) fn any(x: ArrayView4<'_, f32>) -> AnyArray<'_> {
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
    let (to, names) = (gradients.views(), M::Gradients::<f32>::names());
    let (rows, of_heads) = ("[batch, heads, len, dim]", "[1, heads, 1, dim]");
    check(names.q, rows, want.q, &to.q.view())?;
    check(names.v, rows, want.v, &to.v.view())?;
    check(names.state, "[sequences, heads, state_dim, columns]", want.state, &to.state.view())?;
    for (argument, axes, want, got) in [
        (names.k, rows, want.k, &to.k),
        (names.decay, rows, want.decay, &to.decay),
        (names.beta, rows, want.beta, &to.beta),
        (names.a, rows, want.a, &to.a),
        (names.b, rows, want.b, &to.b),
        (names.rate, of_heads, want.rate, &to.rate),
        (names.bias, of_heads, want.bias, &to.bias),
        (names.bonus, of_heads, want.bonus, &to.bonus),
        (names.skip, of_heads, want.skip, &to.skip),
    ] {
        if let (Some(argument), Some(want), Some(got)) = (argument, want, got) {
            check(argument, axes, want, &got.view())?;
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

/// [`BackwardState::backward_state_into`](crate::BackwardState::backward_state_into)
pub(crate) fn backward_state_into<T: Element, M: Differentiable>(
    mechanism: &M,
    x: &M::Operands<'_, T>,
    d_out: ArrayView4<'_, f32>,
    d_state: Option<ArrayView4<'_, f32>>,
    to: ArrayViewMut4<'_, f32>,
    workspace: &mut Workspace,
) -> Result<()> {
    let spec = spec::<T, M>(mechanism, x)?;
    check_all(x, spec.state_shape(), None, &d_out, d_state.as_ref())?;
    check("to", "[sequences, heads, state_dim, columns]", spec.state_shape(), &to.view())?;
    mechanism.with_source::<T, _>(x, |source| {
        let call = Call { spec: &spec, source, state: None, d_out: any(d_out), d_state: d_state.map(any) };
        backward::run_state(&call, to, workspace)
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
    let arrays = mechanism.arrays::<T>(x);
    let token = |at: &Place| mechanism.token::<T>(x, at);
    M::Gradients::of(differentiate(&spec, &dims, state, d_out, d_state, token, |at, token, d_o, found| {
        found.add_skipped(arrays.skip(at.head), &token.v, d_o);
        mechanism.token_back::<T>(x, at, found);
    }))
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

        impl<T: crate::element::Element $($(, $param: $bound)+)?> crate::attention::BackwardState<$input<'_, T>>
            for $mechanism
        {
            fn backward_state_into(
                &self,
                x: $input<'_, T>,
                d_out: ndarray::ArrayView4<'_, f32>,
                d_state: Option<ndarray::ArrayView4<'_, f32>>,
                to: ndarray::ArrayViewMut4<'_, f32>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::differentiate::backward_state_into::<T, Self>(
                    self, &x, d_out, d_state, to, workspace,
                )
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
