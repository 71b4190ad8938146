//! The selective scan: what it has learned, checked in one place, and the gradients of its
//! arrays and of what it has learned.

use ndarray::{Array2, Array3, Array4, ArrayView4};

use crate::definition::selective_scan::{Learned, Operands, differentiate};
use crate::element::Element;
use crate::engine::selective_scan::{Scan, backward, smallest_step};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::state::State;
use crate::input::{Dim4, Dims, filled};
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::differentiate::{Carried, any, check as check_array};
use crate::stages::options::{FINITE, check};
use crate::stages::recur::Config;

/// What a scan has learned, of sizes that agree.
#[derive(Clone, Debug)]
pub(crate) struct Parameters {
    config: Config,
    /// `[heads, channels, n]`, as it came.
    a: Array3<f32>,
    /// `a log2 e`, `[heads, n, channels]`.
    rates: Vec<f32>,
    skip: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    softplus: bool,
}

/// `[sequences, heads, n, channels]`
pub(crate) fn state_shape(dims: &Dims) -> Dim4 {
    (dims.batch, dims.q_heads, dims.head_dim, dims.value_dim)
}

impl Parameters {
    /// Of finite rates `[heads, channels, n]`, with `skip` and `delta_bias` of a number a channel.
    ///
    /// # Errors
    /// [`Error::Shape`] for arrays of other channels, [`Error::Value`] for numbers that are not
    /// finite and for rates above 0, unless growth was asked for.
    pub(crate) fn new(
        config: Config,
        a: Array3<f32>,
        [skip, delta_bias]: [Option<Array2<f32>>; 2],
        softplus: bool,
    ) -> Result<Self> {
        let (heads, channels, _) = a.dim();
        let flat = |argument, x: Option<Array2<f32>>| -> Result<Option<Vec<f32>>> {
            let Some(x) = x else { return Ok(None) };
            if x.dim() != (heads, channels) {
                let expected = format!("[heads, channels] = [{heads}, {channels}] as a has it");
                return Err(Error::shape(argument, expected, x.shape()));
            }
            check(argument, &x, &FINITE)?;
            Ok(Some(x.iter().copied().collect()))
        };
        let (skip, bias) = (flat("skip", skip)?, flat("delta_bias", delta_bias)?);
        if let Some(rate) = a.iter().find(|rate| **rate > 0.0 && !config.growth) {
            return Err(Error::value("a", "rates of at most 0; allow_growth() permits others", rate));
        }
        let rates = a.view().permuted_axes([0, 2, 1]);
        let rates = rates.iter().map(|&a| (f64::from(a) * std::f64::consts::LOG2_E) as f32).collect();
        Ok(Self { config, a, rates, skip, bias, softplus })
    }

    /// As the definition takes it.
    pub(crate) fn learned(&self) -> Learned<'_> {
        let Self { a, skip, bias, softplus, .. } = self;
        Learned { a: a.view(), skip: skip.as_deref(), bias: bias.as_deref(), softplus: *softplus }
    }

    /// The scan over these operands.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands of other heads, channels or states, [`Error::Value`] for
    /// step sizes below 0, unless growth was asked for.
    pub(crate) fn scan<'a, T: Element>(&'a self, x: &Operands<'a, T>) -> Result<Scan<'a>> {
        let dims = x.dims;
        let (heads, channels, n) = self.a.dim();
        if (heads, channels) != (dims.q_heads, dims.value_dim) {
            let expected = format!("[batch, heads, len, channels] = [_, {heads}, _, {channels}] as a has it");
            return Err(Error::shape("u", expected, x.u.shape()));
        }
        if n != dims.head_dim {
            let expected = format!("[batch, heads, len, n] = [_, _, _, {n}] as a has it");
            return Err(Error::shape("b", expected, x.b.shape()));
        }
        if !self.softplus && !self.config.growth {
            let smallest = smallest_step(&x.delta, self.bias.as_deref());
            if smallest < 0.0 {
                let expected =
                    "step sizes of at least 0; softplus() makes them, allow_growth() permits others";
                return Err(Error::value("delta", expected, smallest));
            }
        }
        let any = |x: ArrayView4<'a, T>| T::any(Heads::new(x));
        Ok(Scan {
            dims,
            lengths: x.lengths,
            u: any(x.u),
            delta: AnyArray::F32(Heads::new(x.delta)),
            b: any(x.b),
            c: any(x.c),
            z: x.z.map(any),
            rates: &self.rates,
            skip: self.skip.as_deref(),
            bias: self.bias.as_deref(),
            softplus: self.softplus,
            isa: self.config.isa,
        })
    }

    /// Gradients of 0, for operands that have been checked.
    ///
    /// # Errors
    /// [`Error::TooLarge`]
    pub(crate) fn zero_gradients<A: Clone + Default>(
        &self,
        x: &Operands<'_, impl Element>,
    ) -> Result<S6Gradients<A>> {
        let ((heads, channels, n), zero) = (self.a.dim(), A::default);
        let of_heads = || filled("gradients", (heads, channels), zero());
        Ok(S6Gradients {
            u: filled("gradients", x.u.dim(), zero())?,
            delta: filled("gradients", x.delta.dim(), zero())?,
            b: filled("gradients", x.b.dim(), zero())?,
            c: filled("gradients", x.c.dim(), zero())?,
            z: filled("gradients", x.z.map_or((0, 0, 0, 0), |z| z.dim()), zero())?,
            a: filled("gradients", (heads, channels, n), zero())?,
            skip: of_heads()?,
            delta_bias: of_heads()?,
            state: filled("gradients", state_shape(&x.dims), zero())?,
        })
    }

    /// Writes the gradients of a scan over `x`.
    ///
    /// # Errors
    /// [`Error::Shape`] for gradients that do not fit, and what a workspace refuses.
    pub(crate) fn backward<T: Element>(
        &self,
        x: &Operands<'_, T>,
        scan: &Scan<'_>,
        d_out: ArrayView4<'_, f32>,
        Carried { state, d_state }: Carried<'_>,
        gradients: &mut S6Gradients,
        workspace: &mut Workspace,
    ) -> Result<()> {
        gradients.check(x, &self.a)?;
        let state = state.map(|state| any(state.view()));
        let call = backward::Call { scan, state, d_out: any(d_out), d_state: d_state.map(any) };
        let S6Gradients { u, delta, b, c, z, a, skip, delta_bias, state } = gradients;
        let to = backward::Gradients {
            u: u.view_mut(),
            delta: delta.view_mut(),
            z: x.z.map(|_| z.view_mut()),
            b: b.view_mut(),
            c: c.view_mut(),
            state: state.view_mut(),
            a: a.view_mut(),
            skip: skip.view_mut(),
            bias: delta_bias.view_mut(),
        };
        backward::run(&call, to, workspace)
    }

    /// The gradients by definition.
    ///
    /// # Errors
    /// [`Error::TooLarge`]
    pub(crate) fn reference_backward<T: Element>(
        &self,
        x: &Operands<'_, T>,
        d_out: ArrayView4<'_, f32>,
        Carried { state, d_state }: Carried<'_>,
    ) -> Result<S6Gradients<f64>> {
        // Room for them, before they are worked out.
        self.zero_gradients::<f64>(x)?;
        let found = differentiate(x, &self.learned(), state.map(State::view), d_out, d_state);
        let (a, skip, delta_bias) = (found.a, found.skip, found.bias);
        let (u, delta, b, c, z, state) = (found.u, found.delta, found.b, found.c, found.z, found.state);
        Ok(S6Gradients { u, delta, b, c, z, a, skip, delta_bias, state })
    }
}

/// What an [`S6Input`](crate::linear::S6Input) gets, each of the shape of its array, and the parameters.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct S6Gradients<A = f32> {
    /// Of the inputs.
    pub u: Array4<A>,
    /// Of the step sizes, as they came.
    pub delta: Array4<A>,
    /// Of how inputs enter the state.
    pub b: Array4<A>,
    /// Of how the state is read.
    pub c: Array4<A>,
    /// Of the gates; empty if there are none.
    pub z: Array4<A>,
    /// Of the rates, `[heads, channels, n]`.
    pub a: Array3<A>,
    /// Of `D`, `[heads, channels]`, which is 0 unless it was given.
    pub skip: Array2<A>,
    /// Of what is added to `delta`, `[heads, channels]`, likewise.
    pub delta_bias: Array2<A>,
    /// Of the state at the start, `[sequences, heads, n, channels]`.
    pub state: Array4<A>,
}

impl S6Gradients {
    /// Refuses arrays of other shapes than the gradients of `x` and of rates `of` have.
    fn check(&self, x: &Operands<'_, impl Element>, of: &Array3<f32>) -> Result<()> {
        let (wide, narrow) = ("[batch, heads, len, channels]", "[batch, heads, len, n]");
        let of_z = x.z.map_or((0, 0, 0, 0), |z| z.dim());
        for (argument, axes, want, got) in [
            ("gradients.u", wide, x.u.dim(), &self.u),
            ("gradients.delta", wide, x.delta.dim(), &self.delta),
            ("gradients.b", narrow, x.b.dim(), &self.b),
            ("gradients.c", narrow, x.c.dim(), &self.c),
            ("gradients.z", wide, of_z, &self.z),
            ("gradients.state", "[sequences, heads, n, channels]", state_shape(&x.dims), &self.state),
        ] {
            check_array(argument, axes, want, &got.view())?;
        }
        let (heads, channels, n) = of.dim();
        if self.a.dim() != of.dim() {
            let expected = format!("[heads, channels, n] = [{heads}, {channels}, {n}]");
            return Err(Error::shape("gradients.a", expected, self.a.shape()));
        }
        for (argument, got) in [("gradients.skip", &self.skip), ("gradients.delta_bias", &self.delta_bias)] {
            if got.dim() != (heads, channels) {
                let expected = format!("[heads, channels] = [{heads}, {channels}]");
                return Err(Error::shape(argument, expected, got.shape()));
            }
        }
        Ok(())
    }
}
