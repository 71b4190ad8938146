//! The selective state space model S6, the scan of Mamba.

use ndarray::{Array2, Array3, Array4, ArrayView4, ArrayViewMut4};

use crate::attention::{Backward, BackwardState};
use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::Reference;
use crate::definition::selective_scan::{Operands, define};
use crate::element::Element;
use crate::engine::selective_scan::{self, backward};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::declare::input;
use crate::input::{Dim4, Input, filled};
use crate::stages::differentiate::{Carried, check as check_array, check_all};
use crate::stages::options::{FINITE, options};
use crate::stages::recur::{Carrying, Config, Memory, check_call, recurrent};
use crate::stages::selective_scan::{Parameters, state_shape};

pub use crate::stages::selective_scan::S6Gradients;

input! {
    /// What goes into an [`S6`]. Heads are groups of channels that share `b`
    /// and `c`; Mamba has one.
    ///
    /// Views of any strides are taken, and time may be the axis whose elements
    /// are neighbours: arrays `[batch, channels, len]` and `[batch, n, len]` as
    /// Mamba keeps them come in as
    /// `x.view().insert_axis(Axis(1)).permuted_axes([0, 1, 3, 2])`.
    S6Input {
        /// The inputs of the channels.
        u: T [batch, heads, len, channels],
        /// Their step sizes, raw where the mechanism applies a softplus.
        delta: f32 [batch, heads, len, channels],
        /// How inputs enter the state.
        b: T [batch, heads/, len, n],
        /// How the state is read.
        c: T [batch, heads/, len, n];
        /// Gates of the outputs.
        gated by z: T [batch, heads, len, channels]
    }
    head_dim n, value_dim channels;
}

/// The selective state space model S6, the scan of Mamba.
///
/// ```text
/// delta_t  = softplus(raw_t + bias)                      (or raw_t + bias as it is)
/// h_t[c,s] = exp(delta_t[c] A[c,s]) h_{t-1}[c,s] + delta_t[c] B_t[s] u_t[c]
/// y_t[c]   = sum_s C_t[s] h_t[c,s] + D[c] u_t[c]         (times z sigmoid(z), z = z_t[c])
/// ```
///
/// From "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
/// (arXiv 2312.00752). As linear attention it has a head for each channel:
/// `C` are queries, `B` keys, `delta u` values of one element, and `delta A`
/// log decays of the channels of the key; "Understanding the differences in
/// Foundation Models" (arXiv 2405.15731) works out what that makes of
/// attention, linear attention and state space models.
///
/// Cost: an exponential and 6 flops a token, channel and element of the state,
/// and so many exponentials are what it takes its time for. Where all channels
/// of a head decay alike it is a linear attention with one decay a token (SSD,
/// Mamba-2), whose chunks are matrix products: use that then.
///
/// ```
/// use attention_kernels::{Attention, Recurrent, linear::{S6, S6Input}};
/// use ndarray::{Array3, Array4};
///
/// // 16 elements of state for each of 32 channels, which decay at rates 1 to 16.
/// let a = Array3::from_shape_fn((1, 32, 16), |(_, _, s)| -(s as f32 + 1.0));
/// let s6 = S6::builder(a).softplus().build()?;
///
/// let u = Array4::<f32>::ones((2, 1, 100, 32)); // batch, heads, len, channels
/// let b = Array4::<f32>::ones((2, 1, 100, 16)); // batch, heads, len, n
/// let x = S6Input::new(u.view(), u.view(), b.view(), b.view());
/// let mut state = s6.initial_state(x)?;
/// let out = s6.prefill(x, &mut state)?;
/// assert_eq!(out.dim(), (2, 1, 100, 32));
/// assert_eq!(state.view().dim(), (2, 1, 16, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// The [`State`](crate::linear::State) is `[sequences, heads, n, channels]`.
///
/// # Error bound
///
/// As the [family's](crate::linear#error-bound), where `size` is `sum_s |C_s|
/// H_s + |D u|` and `H` the state of the magnitudes `|delta B u|`, and `stretch`
/// counts 12 times: step sizes, rates, their product and its exponential are
/// all rounded; times the magnitude of the gate. What is left of a state below
/// `2^-100` may be taken for 0, which adds `2^-100 tokens sum_s |C_s|`.
///
/// # Gradients
///
/// [`Backward`] gives those of all arrays and of `A`, `D` and the bias. It costs
/// two exponentials and some 18 flops a token, channel and element of the state.
#[derive(Clone, Debug)]
pub struct S6 {
    parameters: Parameters,
}

impl S6 {
    /// With these rates `[heads, channels, n]`, which are negative: Mamba
    /// keeps `ln(-A)` as a parameter.
    pub fn builder(a: Array3<f32>) -> S6Builder {
        S6Builder::with(a)
    }
}

options! {
    /// Builds an [`S6`].
    S6Builder of S6, isa;
    given { a: Array3<f32>, in FINITE; }
    own {
        skip: Option<Array2<f32>> = None;
        delta_bias: Option<Array2<f32>> = None;
    }
    flags {
        /// Makes step sizes of raw `delta` with `ln(1 + e^x)`.
        softplus;
        /// Permits positive rates and negative step sizes, which let the state
        /// grow without bounds. Logarithms of growth beyond 2^21 in one token
        /// are not supported.
        allow_growth;
    }
    build(this, config) {
        let Self { a, skip, delta_bias, softplus, allow_growth, .. } = this;
        let config = Config { growth: allow_growth, ..config };
        Ok(S6 { parameters: Parameters::new(config, a, [skip, delta_bias], softplus)? })
    }
}

impl S6Builder {
    /// `D`, `[heads, channels]`: how much of its input a channel adds to its
    /// output.
    pub fn skip(mut self, d: Array2<f32>) -> Self {
        self.skip = Some(d);
        self
    }

    /// What is added to `delta`, `[heads, channels]`.
    pub fn delta_bias(mut self, bias: Array2<f32>) -> Self {
        self.delta_bias = Some(bias);
        self
    }
}

fn operands<'a, T: Element>(x: &'a S6Input<'_, T>) -> Result<Operands<'a, T>> {
    let dims = x.dims()?;
    let S6Input { u, delta, b, c, z, lengths } = x.reborrow();
    Ok(Operands { dims, lengths, u, delta, b, c, z })
}

impl Carrying for S6 {
    type Input<'a, T: Element> = S6Input<'a, T>;

    fn state_shape<T: Element>(&self, x: &S6Input<'_, T>) -> Result<Dim4> {
        Ok(state_shape(&self.parameters.scan(&operands(x)?)?.dims))
    }

    fn workspace_bytes<T: Element>(&self, x: &S6Input<'_, T>) -> Result<usize> {
        Ok(selective_scan::workspace_bytes(&self.parameters.scan(&operands(x)?)?))
    }

    fn run<T: Element>(
        &self,
        x: &S6Input<'_, T>,
        state: Option<Memory<'_>>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let scan = self.parameters.scan(&operands(x)?)?;
        check_call(x, state_shape(&scan.dims), state.as_ref(), &out)?;
        selective_scan::run(&scan, state.map(Memory::view), out, workspace)
    }

    fn define<T: Element>(&self, x: &S6Input<'_, T>, from: Option<&Array4<f32>>) -> Result<Reference> {
        let state = match from {
            Some(from) => from.mapv(f64::from),
            None => filled("state", self.state_shape::<T>(x)?, 0f64)?,
        };
        define(&operands(x)?, &self.parameters.learned(), state)
    }

    /// Exponentials are not counted.
    fn flops<T: Element>(&self, x: &S6Input<'_, T>) -> Result<usize> {
        Ok(x.u.len() * (6 * self.parameters.scan(&operands(x)?)?.dims.head_dim + 4))
    }
}
recurrent!(S6, S6Input);

impl<T: Element> Backward<S6Input<'_, T>> for S6 {
    type Gradients<A> = S6Gradients<A>;
    type Carried<'a> = Carried<'a>;

    fn zero_gradients(&self, x: S6Input<'_, T>) -> Result<S6Gradients> {
        let x = operands(&x)?;
        self.parameters.scan(&x)?;
        self.parameters.zero_gradients(&x)
    }

    fn backward_workspace_bytes(&self, x: S6Input<'_, T>) -> Result<usize> {
        Ok(backward::workspace_bytes(&self.parameters.scan(&operands(&x)?)?, [x.b.dim(), x.c.dim()]))
    }

    fn backward_into(
        &self,
        x: S6Input<'_, T>,
        d_out: ArrayView4<'_, f32>,
        carried: Carried<'_>,
        gradients: &mut S6Gradients,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let operands = operands(&x)?;
        let scan = self.parameters.scan(&operands)?;
        check_all(&x, state_shape(&scan.dims), carried.state, &d_out, carried.d_state.as_ref())?;
        self.parameters.backward(&operands, &scan, d_out, carried, gradients, workspace)
    }

    fn reference_backward(
        &self,
        x: S6Input<'_, T>,
        d_out: ArrayView4<'_, f32>,
        carried: Carried<'_>,
    ) -> Result<S6Gradients<f64>> {
        let operands = operands(&x)?;
        let shape = state_shape(&self.parameters.scan(&operands)?.dims);
        check_all(&x, shape, carried.state, &d_out, carried.d_state.as_ref())?;
        self.parameters.reference_backward(&operands, d_out, carried)
    }
}

impl<T: Element> BackwardState<S6Input<'_, T>> for S6 {
    /// With all other gradients, which are thrown away.
    fn backward_state_into(
        &self,
        x: S6Input<'_, T>,
        d_out: ArrayView4<'_, f32>,
        d_state: Option<ArrayView4<'_, f32>>,
        mut to: ArrayViewMut4<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let shape = Carrying::state_shape::<T>(self, &x)?;
        check_array("to", "[sequences, heads, n, channels]", shape, &to.view())?;
        let mut gradients: S6Gradients = self.zero_gradients(x)?;
        self.backward_into(x, d_out, Carried { state: None, d_state }, &mut gradients, workspace)?;
        to.assign(&gradients.state);
        Ok(())
    }
}

exhibit! {
    S6Exhibit of S6, "linear", "S6", "arXiv 2312.00752, 2405.15731";
    "a selective state space: every element of the state by itself";
    not "where the channels of a head may decay alike: Mamba-2 is made of matrix products";
    tokens true, variants 3;
    build(x, field) {
        let (heads, n, channels) = (x.q.dim().1, x.q.dim().3, x.v.dim().3);
        let rate = |(h, _, s): (usize, usize, usize)| -share(field.at(2, h, 0, s));
        let builder = S6::builder(Array3::from_shape_fn((heads, channels, n), rate));
        let each = |which| Array2::from_shape_fn((heads, channels), |(h, c)| field.at(which, h, 0, c));
        match field.variant {
            0 => builder,
            1 => builder.softplus().skip(each(7)).delta_bias(each(8)),
            // From memory of many tokens to none.
            _ => S6::builder(Array3::from_shape_fn((heads, channels, n), |at| {
                rate(at) * [1e-3, 0.1, 3.0, 200.0][at.1 % 4]
            })),
        }
    }
    extras(x, field) {
        // As many heads as there are queries.
        let (batch, heads, len, _) = x.q.dim();
        let group = heads / x.v.dim().1.max(1);
        let dim = (batch, heads, len, x.v.dim().3);
        Extras {
            channels: Array4::from_shape_fn(dim, |(_, h, t, _)| 0.4 * share(field.at(1, h, t, 0))),
            // Of arrays that do not fit what there is.
            keys: Array4::from_shape_fn(dim, |(b, h, t, c)| {
                x.v.get([b, h / group.max(1), t, c]).copied().unwrap_or_default()
            }),
            ..Extras::default()
        }
    }
    input<'a, T>(x, extras) -> S6Input<'a, T> {
        S6Input { lengths: x.lengths, ..S6Input::new(extras.keys.view(), extras.channels.view(), x.k, x.q) }
    }
}
carded!(S6, S6Exhibit);

#[cfg(test)]
mod tests;
