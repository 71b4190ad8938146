//! The selective state space model S6, the scan of Mamba.

use ndarray::{Array2, Array3, Array4, ArrayView4, ArrayViewMut4};

use crate::attention::{Backward, BackwardState, ERROR_CONSTANT};
use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::Reference;
use crate::definition::selective_scan::{Scanned, differentiate};
use crate::element::Element;
use crate::engine::selective_scan::{self, Scan, backward};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::state::State;
use crate::input::{Dim4, Dims, Input, filled};
use crate::math::gates::exact::{sigmoid, softplus};
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::simd::tile::NEGLIGIBLE;
use crate::stages::differentiate::{Carried, any, check as check_array, check_all};
use crate::stages::options::{FINITE, check, options};
use crate::stages::recur::{Carrying, Config, Memory, check_call, recurrent};

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
/// The [`State`] is `[sequences, heads, n, channels]`.
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
    config: Config,
    /// `[heads, channels, n]`, as it came.
    a: Array3<f32>,
    /// `a log2 e`, `[heads, n, channels]`.
    rates: Vec<f32>,
    skip: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    softplus: bool,
}

impl S6 {
    /// With these rates `[heads, channels, n]`, which are negative: Mamba
    /// keeps `ln(-A)` as a parameter.
    pub fn builder(a: Array3<f32>) -> S6Builder {
        S6Builder::with(a)
    }
}

/// What log decays count in the error bound.
const STRETCH: f64 = 12.0;

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
        if let Some(rate) = a.iter().find(|rate| **rate > 0.0 && !allow_growth) {
            return Err(Error::value("a", "rates of at most 0; allow_growth() permits others", rate));
        }
        let rates = a.view().permuted_axes([0, 2, 1]);
        let rates = rates.iter().map(|&a| (f64::from(a) * std::f64::consts::LOG2_E) as f32).collect();
        Ok(S6 { config: Config { growth: allow_growth, ..config }, rates, skip, bias, softplus, a })
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

impl S6 {
    fn state_of(dims: &Dims) -> Dim4 {
        (dims.batch, dims.q_heads, dims.head_dim, dims.value_dim)
    }

    fn scan<'a, T: Element>(&'a self, x: &'a S6Input<'_, T>) -> Result<Scan<'a>> {
        let dims = x.dims()?;
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
            let smallest = selective_scan::smallest_step(&x.delta, self.bias.as_deref());
            if smallest < 0.0 {
                let expected =
                    "step sizes of at least 0; softplus() makes them, allow_growth() permits others";
                return Err(Error::value("delta", expected, smallest));
            }
        }
        Ok(Scan {
            dims,
            lengths: x.lengths,
            u: T::any(Heads::new(x.u.reborrow())),
            delta: AnyArray::F32(Heads::new(x.delta.reborrow())),
            b: T::any(Heads::new(x.b.reborrow())),
            c: T::any(Heads::new(x.c.reborrow())),
            z: x.z.map(|z| T::any(Heads::new(z.reborrow()))),
            rates: &self.rates,
            skip: self.skip.as_deref(),
            bias: self.bias.as_deref(),
            softplus: self.softplus,
            isa: self.config.isa,
        })
    }
}

impl Carrying for S6 {
    type Input<'a, T: Element> = S6Input<'a, T>;

    fn state_shape<T: Element>(&self, x: &S6Input<'_, T>) -> Result<Dim4> {
        Ok(Self::state_of(&self.scan(x)?.dims))
    }

    fn workspace_bytes<T: Element>(&self, x: &S6Input<'_, T>) -> Result<usize> {
        Ok(selective_scan::workspace_bytes(&self.scan(x)?))
    }

    fn run<T: Element>(
        &self,
        x: &S6Input<'_, T>,
        state: Option<Memory<'_>>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let scan = self.scan(x)?;
        check_call(x, Self::state_of(&scan.dims), state.as_ref(), &out)?;
        selective_scan::run(&scan, state.map(Memory::view), out, workspace)
    }

    fn define<T: Element>(&self, x: &S6Input<'_, T>, from: Option<&Array4<f32>>) -> Result<Reference> {
        let dims = x.dims()?;
        let mut state = match from {
            Some(from) => from.mapv(f64::from),
            None => filled("state", self.state_shape::<T>(x)?, 0f64)?,
        };
        let mut out = filled("out", x.u.dim(), 0f64)?;
        let mut bound = filled("out", (x.u.dim().0, dims.q_heads, dims.q_len), 0f64)?;
        let (n, channels) = (dims.head_dim, dims.value_dim);
        let of = |x: &Option<Vec<f32>>, h: usize, c: usize| {
            x.as_ref().map_or(0.0, |x| f64::from(x[h * channels + c]))
        };
        for sequence in (0..dims.batch).map(|i| x.lengths.sequence(&dims, i)) {
            let batch = sequence.batch;
            for h in 0..dims.q_heads {
                let shared = |heads: usize| h / (dims.q_heads / heads);
                for c in 0..channels {
                    let mut state = state.slice_mut(ndarray::s![sequence.index, h, .., c]);
                    // The state if nothing cancelled.
                    let mut size: Vec<f64> = state.iter().map(|x| x.abs()).collect();
                    let mut stretch = vec![0.0; n];
                    for (read, t) in sequence.queries.clone().enumerate() {
                        let u = x.u[[batch, h, t, c]].to_f64();
                        let raw = f64::from(x.delta[[batch, h, t, c]]) + of(&self.bias, h, c);
                        let delta = if self.softplus { softplus(raw) } else { raw };
                        let (mut y, mut total, mut stretched, mut weights) = (0.0, 0.0, 0.0, 0.0);
                        for s in 0..n {
                            let b = x.b[[batch, shared(x.b.dim().1), t, s]].to_f64();
                            let read = x.c[[batch, shared(x.c.dim().1), t, s]].to_f64();
                            let log = delta * f64::from(self.a[[h, c, s]]);
                            let decay = log.exp();
                            let met = if decay == 0.0 || log == 0.0 { 0.0 } else { log.abs() + 1.0 };
                            stretch[s] = decay * (stretch[s] + met * size[s]);
                            state[s] = decay * state[s] + delta * b * u;
                            size[s] = decay * size[s] + (delta * b * u).abs();
                            y += read * state[s];
                            total += read.abs() * size[s];
                            stretched += read.abs() * stretch[s];
                            weights += read.abs();
                        }
                        y += of(&self.skip, h, c) * u;
                        total += (of(&self.skip, h, c) * u).abs();
                        let gate = x.z.map_or(1.0, |z| {
                            let z = z[[batch, h, t, c]].to_f64();
                            z * sigmoid(z)
                        });
                        out[[batch, h, t, c]] = y * gate;
                        let tokens = (read + 1) as f64;
                        let unit = ERROR_CONSTANT * 2f64.powi(-24) * (n as f64 + tokens + 64.0);
                        let rest = tokens * f64::from(NEGLIGIBLE) * weights;
                        let off = unit * total + STRETCH * 2f64.powi(-24) * stretched + rest;
                        let row: &mut f64 = &mut bound[[batch, h, t]];
                        *row = row.max(off * gate.abs());
                    }
                }
            }
        }
        Ok(Reference { out, state, bound })
    }

    /// Exponentials are not counted.
    fn flops<T: Element>(&self, x: &S6Input<'_, T>) -> Result<usize> {
        Ok(x.u.len() * (6 * self.scan(x)?.dims.head_dim + 4))
    }
}
recurrent!(S6, S6Input);

/// What an [`S6Input`] gets, each of the shape of its array, and the parameters.
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

impl S6 {
    /// All 0, for an input that has been checked.
    fn zeros<A: Clone + Default>(&self, x: &S6Input<'_, impl Element>) -> Result<S6Gradients<A>> {
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
            state: filled("gradients", Self::state_of(&x.dims()?), zero())?,
        })
    }
}

impl<T: Element> Backward<S6Input<'_, T>> for S6 {
    type Gradients<A> = S6Gradients<A>;
    type Carried<'a> = Carried<'a>;

    fn zero_gradients(&self, x: S6Input<'_, T>) -> Result<S6Gradients> {
        self.scan(&x)?;
        self.zeros(&x)
    }

    fn backward_workspace_bytes(&self, x: S6Input<'_, T>) -> Result<usize> {
        Ok(backward::workspace_bytes(&self.scan(&x)?, [x.b.dim(), x.c.dim()]))
    }

    fn backward_into(
        &self,
        x: S6Input<'_, T>,
        d_out: ArrayView4<'_, f32>,
        Carried { state, d_state }: Carried<'_>,
        gradients: &mut S6Gradients,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let scan = self.scan(&x)?;
        let shape = Self::state_of(&scan.dims);
        check_all(&x, shape, state, &d_out, d_state.as_ref())?;
        let (wide, narrow) = ("[batch, heads, len, channels]", "[batch, heads, len, n]");
        let of_z = x.z.map_or((0, 0, 0, 0), |z| z.dim());
        for (argument, axes, want, got) in [
            ("gradients.u", wide, x.u.dim(), &gradients.u),
            ("gradients.delta", wide, x.delta.dim(), &gradients.delta),
            ("gradients.b", narrow, x.b.dim(), &gradients.b),
            ("gradients.c", narrow, x.c.dim(), &gradients.c),
            ("gradients.z", wide, of_z, &gradients.z),
            ("gradients.state", "[sequences, heads, n, channels]", shape, &gradients.state),
        ] {
            check_array(argument, axes, want, &got.view())?;
        }
        let (heads, channels, n) = self.a.dim();
        if gradients.a.dim() != self.a.dim() {
            let expected = format!("[heads, channels, n] = [{heads}, {channels}, {n}]");
            return Err(Error::shape("gradients.a", expected, gradients.a.shape()));
        }
        for (argument, got) in
            [("gradients.skip", &gradients.skip), ("gradients.delta_bias", &gradients.delta_bias)]
        {
            if got.dim() != (heads, channels) {
                let expected = format!("[heads, channels] = [{heads}, {channels}]");
                return Err(Error::shape(argument, expected, got.shape()));
            }
        }
        let state = state.map(|state| any(state.view()));
        let call = backward::Call { scan: &scan, state, d_out: any(d_out), d_state: d_state.map(any) };
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

    fn reference_backward(
        &self,
        x: S6Input<'_, T>,
        d_out: ArrayView4<'_, f32>,
        Carried { state, d_state }: Carried<'_>,
    ) -> Result<S6Gradients<f64>> {
        let dims = self.scan(&x)?.dims;
        check_all(&x, Self::state_of(&dims), state, &d_out, d_state.as_ref())?;
        // Room for them, before they are worked out.
        self.zeros::<f64>(&x)?;
        let wide = |x: &ArrayView4<'_, T>| x.mapv(T::to_f64);
        let (heads, channels, _) = self.a.dim();
        let of_heads = |x: &Option<Vec<f32>>| match x {
            Some(x) => Array2::from_shape_fn((heads, channels), |(h, c)| f64::from(x[h * channels + c])),
            None => Array2::zeros((heads, channels)),
        };
        let scanned = Scanned {
            dims,
            lengths: x.lengths,
            u: wide(&x.u),
            delta: x.delta.mapv(f64::from),
            b: wide(&x.b),
            c: wide(&x.c),
            z: x.z.map(|z| wide(&z)),
            a: self.a.mapv(f64::from),
            skip: of_heads(&self.skip),
            bias: of_heads(&self.bias),
            softplus: self.softplus,
        };
        let found = differentiate(&scanned, state.map(State::view), d_out, d_state);
        let (a, skip, delta_bias) = (found.a, found.skip, found.bias);
        let (u, delta, b, c, z, state) = (found.u, found.delta, found.b, found.c, found.z, found.state);
        Ok(S6Gradients { u, delta, b, c, z, a, skip, delta_bias, state })
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
        let shape = Self::state_of(&self.scan(&x)?.dims);
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
