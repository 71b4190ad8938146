//! The selective state space model S6, the scan of Mamba.
//!
//! ```text
//! delta_t  = softplus(raw_t + bias)                      (or raw_t + bias as it is)
//! h_t[c,s] = exp(delta_t[c] A[c,s]) h_{t-1}[c,s] + delta_t[c] B_t[s] u_t[c]
//! y_t[c]   = sum_s C_t[s] h_t[c,s] + D[c] u_t[c]         (times z sigmoid(z), z = z_t[c])
//! ```
//!
//! From "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
//! (arXiv 2312.00752). As linear attention it has a head for each channel:
//! `C` are queries, `B` keys, `delta u` values of one element, and `delta A`
//! log decays of the channels of the key; "Understanding the differences in
//! Foundation Models" (arXiv 2405.15731) works out what that makes of
//! attention, linear attention and state space models.
//!
//! Cost: an exponential and 6 flops a token, channel and element of the state,
//! and so many exponentials are what it takes its time for. Where all channels
//! of a head decay alike it is a linear attention with one decay a token (SSD,
//! Mamba-2), whose chunks are matrix products: use that then.

use ndarray::{Array2, Array3, Array4, ArrayView4, ArrayViewMut4, Axis};

use crate::attention::{Attention, Bounded, Cost, ERROR_CONSTANT, Input, Recurrent};
use crate::card::{Extras, carded, exhibit, share};
use crate::element::Element;
use crate::engine::selective_scan::{self, Scan};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::tokens::check_channels;
use crate::input::{Dims, Lengths, filled};
use crate::linear::State;
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::simd::tile::NEGLIGIBLE;

/// What goes into an [`S6`]. Heads are groups of channels that share `b` and
/// `c`; Mamba has one.
///
/// Views of any strides are taken, and time may be the axis whose elements
/// are neighbours: arrays `[batch, channels, len]` and `[batch, n, len]` as
/// Mamba keeps them come in as `x.view().insert_axis(Axis(1)).permuted_axes([0,
/// 1, 3, 2])`.
#[derive(Clone, Copy, Debug)]
pub struct S6Input<'a, T> {
    /// The inputs of the channels, `[batch, heads, len, channels]`.
    pub u: ArrayView4<'a, T>,
    /// Their step sizes, raw where the mechanism applies a softplus,
    /// `[batch, heads, len, channels]`.
    pub delta: ArrayView4<'a, f32>,
    /// How inputs enter the state, `[batch, heads or a divisor, len, n]`.
    pub b: ArrayView4<'a, T>,
    /// How the state is read, `[batch, heads or a divisor, len, n]`.
    pub c: ArrayView4<'a, T>,
    /// Gates of the outputs, `[batch, heads, len, channels]`.
    pub z: Option<ArrayView4<'a, T>>,
    /// Where sequences start and end in a packed batch, whose batch axis is
    /// 1: `sequences + 1` offsets along `len` (`cu_seqlens`).
    pub offsets: Option<&'a [usize]>,
}

impl<'a, T> S6Input<'a, T> {
    /// Whole sequences without gates.
    pub fn new(
        u: ArrayView4<'a, T>,
        delta: ArrayView4<'a, f32>,
        b: ArrayView4<'a, T>,
        c: ArrayView4<'a, T>,
    ) -> Self {
        Self { u, delta, b, c, z: None, offsets: None }
    }

    /// With gates of the outputs.
    pub fn gated(self, z: ArrayView4<'a, T>) -> Self {
        Self { z: Some(z), ..self }
    }

    /// As a packed batch.
    pub fn packed(self, offsets: &'a [usize]) -> Self {
        Self { offsets: Some(offsets), ..self }
    }

    /// The same for a shorter while.
    pub fn reborrow<'b>(self) -> S6Input<'b, T>
    where
        'a: 'b,
    {
        S6Input {
            u: self.u.reborrow(),
            delta: self.delta.reborrow(),
            b: self.b.reborrow(),
            c: self.c.reborrow(),
            z: self.z.map(ArrayView4::reborrow),
            offsets: self.offsets,
        }
    }

    fn lengths(&self) -> Lengths<'a> {
        self.offsets.map_or(Lengths::Full, |offsets| Lengths::Packed { queries: offsets, keys: offsets })
    }
}

impl<T: Element> Input for S6Input<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        Self::lengths(self)
    }

    fn dims(&self) -> Result<Dims> {
        let (batch, heads, len, channels) = self.u.dim();
        let (kv_heads, n) = (self.b.dim().1, self.b.dim().3);
        let mut dims = Dims {
            batch,
            q_heads: heads,
            kv_heads,
            q_len: len,
            kv_len: len,
            head_dim: n,
            value_dim: channels,
            packed: false,
        };
        let whole = [("delta", Some(self.delta.shape())), ("z", self.z.as_ref().map(|z| z.shape()))];
        for (argument, shape) in whole.into_iter().filter_map(|(name, shape)| shape.map(|x| (name, x))) {
            if shape != self.u.shape() {
                let expected = format!("[batch, heads, len, channels] = {:?} as u has it", self.u.shape());
                return Err(Error::shape(argument, expected, shape));
            }
        }
        check_channels("b", &self.b, batch, &dims, n)?;
        check_channels("c", &self.c, batch, &dims, n)?;
        if let Some(offsets) = self.offsets {
            if batch != 1 {
                let expected = "[1, heads, total_len, channels] in a packed batch";
                return Err(Error::shape("u", expected, self.u.shape()));
            }
            crate::input::check_offsets("offsets", offsets, len)?;
            (dims.batch, dims.packed) = (offsets.len() - 1, true);
        }
        dims.checked()
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        self.dims().map(|_| self.u.dim())
    }
}

/// The selective state space model S6.
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
/// all rounded; times the magnitude of the gate. What is left of a state below `2^-100` may be taken
/// for 0, which adds `2^-100 tokens sum_s |C_s|`.
#[derive(Clone, Debug)]
pub struct S6 {
    /// `[heads, channels, n]`, as it came.
    a: Array3<f32>,
    /// `a log2 e`, `[heads, n, channels]`.
    rates: Vec<f32>,
    skip: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    softplus: bool,
    growth: bool,
    isa: Isa,
}

/// Builds an [`S6`].
#[derive(Clone, Debug)]
pub struct S6Builder {
    a: Array3<f32>,
    skip: Option<Array2<f32>>,
    bias: Option<Array2<f32>>,
    softplus: bool,
    growth: bool,
    isa: Option<Isa>,
}

impl S6 {
    /// With these rates `[heads, channels, n]`, which are negative: Mamba
    /// keeps `ln(-A)` as a parameter.
    pub fn builder(a: Array3<f32>) -> S6Builder {
        S6Builder { a, skip: None, bias: None, softplus: false, growth: false, isa: None }
    }
}

impl S6Builder {
    /// `D`, `[heads, channels]`: how much of its input a channel adds to its
    /// output.
    pub fn skip(self, d: Array2<f32>) -> Self {
        Self { skip: Some(d), ..self }
    }

    /// What is added to `delta`, `[heads, channels]`.
    pub fn delta_bias(self, bias: Array2<f32>) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// Makes step sizes of raw `delta` with `ln(1 + e^x)`.
    pub fn softplus(self) -> Self {
        Self { softplus: true, ..self }
    }

    /// Permits positive rates and negative step sizes, which let the state
    /// grow without bounds. Logarithms of growth beyond 2^21 in one token are
    /// not supported.
    pub fn allow_growth(self) -> Self {
        Self { growth: true, ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::simd::ISA_VARIABLE) says.
    pub fn isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a parameter that is not finite and a positive rate
    /// without [`allow_growth`](Self::allow_growth), [`Error::Shape`] for one
    /// that does not fit the rates, [`Error::Isa`] for an instruction set that
    /// the CPU lacks.
    pub fn build(self) -> Result<S6> {
        let Self { a, skip, bias, softplus, growth, isa } = self;
        let (heads, channels, _) = a.dim();
        check_finite("a", a.iter())?;
        for (argument, x) in [("skip", &skip), ("delta_bias", &bias)] {
            let Some(x) = x else { continue };
            if x.dim() != (heads, channels) {
                let expected = format!("[heads, channels] = [{heads}, {channels}] as a has it");
                return Err(Error::shape(argument, expected, x.shape()));
            }
            check_finite(argument, x.iter())?;
        }
        if let Some(rate) = a.iter().find(|rate| **rate > 0.0 && !growth) {
            return Err(Error::value("a", "rates of at most 0; allow_growth() permits others", rate));
        }
        let rates = a.view().permuted_axes([0, 2, 1]);
        let rates = rates.iter().map(|&a| (f64::from(a) * std::f64::consts::LOG2_E) as f32).collect();
        let flat = |x: Array2<f32>| x.iter().copied().collect();
        Ok(S6 {
            rates,
            skip: skip.map(flat),
            bias: bias.map(flat),
            softplus,
            growth,
            isa: Isa::choose(isa)?,
            a,
        })
    }
}

fn check_finite<'a>(argument: &'static str, mut x: impl Iterator<Item = &'a f32>) -> Result<()> {
    match x.find(|x| !x.is_finite()) {
        Some(x) => Err(Error::value(argument, "finite numbers", x)),
        None => Ok(()),
    }
}

impl S6 {
    fn dims<T: Element>(&self, x: &S6Input<'_, T>) -> Result<Dims> {
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
        if !self.softplus && !self.growth {
            let smallest = self.smallest_step(&x.delta);
            if smallest < 0.0 {
                let expected =
                    "step sizes of at least 0; softplus() makes them, allow_growth() permits others";
                return Err(Error::value("delta", expected, smallest));
            }
        }
        Ok(dims)
    }

    /// The smallest of `delta + bias`, NaN aside.
    fn smallest_step(&self, delta: &ArrayView4<'_, f32>) -> f32 {
        // Folded without an exit, which the compiler turns into vectors.
        let smaller = |least: f32, x: f32| if x < least { x } else { least };
        let Some(bias) = &self.bias else {
            return delta.fold(f32::INFINITY, |least, &x| smaller(least, x));
        };
        let channels = delta.dim().3;
        delta.axis_iter(Axis(1)).zip(bias.chunks(channels.max(1))).fold(
            f32::INFINITY,
            |least, (head, bias)| {
                head.rows().into_iter().fold(least, |least, row| {
                    row.iter().zip(bias).fold(least, |least, (x, bias)| smaller(least, x + bias))
                })
            },
        )
    }

    fn scan<'a, T: Element>(&'a self, x: &S6Input<'a, T>) -> Result<Scan<'a>> {
        let any = |view: &ArrayView4<'a, T>| T::any(Heads::new(*view));
        Ok(Scan {
            dims: self.dims(x)?,
            lengths: x.lengths(),
            u: any(&x.u),
            delta: AnyArray::F32(Heads::new(x.delta)),
            b: any(&x.b),
            c: any(&x.c),
            z: x.z.as_ref().map(any),
            rates: &self.rates,
            skip: self.skip.as_deref(),
            bias: self.bias.as_deref(),
            softplus: self.softplus,
            isa: self.isa,
        })
    }

    fn state_shape(dims: &Dims) -> (usize, usize, usize, usize) {
        (dims.batch, dims.q_heads, dims.head_dim, dims.value_dim)
    }

    /// The definition, from a state or from zero.
    fn define<T: Element>(&self, x: &S6Input<'_, T>, from: Option<&State>) -> Result<Definition> {
        let dims = self.dims(x)?;
        let mut state = filled("state", Self::state_shape(&dims), 0f64)?;
        if let Some(from) = from {
            from.check(Self::state_shape(&dims))?;
            state.assign(&from.view().mapv(f64::from));
        }
        let mut out = filled("out", x.u.dim(), 0f64)?;
        let mut bound = filled("out", (x.u.dim().0, dims.q_heads, dims.q_len), 0f64)?;
        let (n, channels) = (dims.head_dim, dims.value_dim);
        let of = |x: &Option<Vec<f32>>, h: usize, c: usize| {
            x.as_ref().map_or(0.0, |x| f64::from(x[h * channels + c]))
        };
        for sequence in (0..dims.batch).map(|i| x.lengths().sequence(&dims, i)) {
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
                        let gate = x.z.as_ref().map_or(1.0, |z| silu(z[[batch, h, t, c]].to_f64()));
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
        Ok(Definition { out, bound, state })
    }
}

/// What the definition gives.
struct Definition {
    out: Array4<f64>,
    bound: Array3<f64>,
    state: Array4<f64>,
}

/// What log decays count in the error bound.
const STRETCH: f64 = 12.0;

fn softplus(x: f64) -> f64 {
    // `max` would drop a NaN.
    let most = if x < 0.0 { 0.0 } else { x };
    most + (-x.abs()).exp().ln_1p()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn check_out<T, U>(x: &S6Input<'_, U>, out: &ArrayViewMut4<'_, T>) -> Result<()> {
    if out.dim() == x.u.dim() {
        return Ok(());
    }
    let expected = format!("[batch, heads, len, channels] = {:?}", x.u.shape());
    Err(Error::shape("out", expected, out.shape()))
}

impl<T: Element> Attention<S6Input<'_, T>> for S6 {
    fn workspace_bytes(&self, x: S6Input<'_, T>) -> Result<usize> {
        Ok(selective_scan::workspace_bytes(&self.scan(&x.reborrow())?))
    }

    fn forward_into(
        &self,
        x: S6Input<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let x = x.reborrow();
        let scan = self.scan(&x)?;
        check_out(&x, &out)?;
        selective_scan::run(&scan, None, out, workspace)
    }

    fn reference(&self, x: S6Input<'_, T>) -> Result<Array4<f64>> {
        Ok(self.define(&x, None)?.out)
    }

    /// Exponentials are not counted.
    fn cost(&self, x: S6Input<'_, T>) -> Result<Cost> {
        let dims = self.dims(&x)?;
        let elements = 2 * x.u.len() + x.b.len() + x.c.len() + x.z.as_ref().map_or(0, |z| z.len());
        Ok(Cost {
            flops: (x.u.len() * (6 * dims.head_dim + 4)) as u64,
            bytes: (elements * size_of::<T>() + x.delta.len() * size_of::<f32>()) as u64,
        })
    }
}

impl<T: Element> Bounded<S6Input<'_, T>> for S6 {
    fn error_bound(&self, x: S6Input<'_, T>) -> Result<Array3<f64>> {
        Ok(self.define(&x, None)?.bound)
    }
}

impl<T: Element> Recurrent<S6Input<'_, T>> for S6 {
    type State = State;

    fn initial_state(&self, x: S6Input<'_, T>) -> Result<State> {
        State::zeros(Self::state_shape(&self.dims(&x)?))
    }

    fn prefill_into(
        &self,
        x: S6Input<'_, T>,
        state: &mut State,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let x = x.reborrow();
        let scan = self.scan(&x)?;
        check_out(&x, &out)?;
        state.check(Self::state_shape(&scan.dims))?;
        selective_scan::run(&scan, Some(state.view_mut()), out, workspace)
    }

    fn reference_from(&self, x: S6Input<'_, T>, state: &State) -> Result<(Array4<f64>, State)> {
        let Definition { out, state, .. } = self.define(&x, Some(state))?;
        Ok((out, State::from_f64(&state)))
    }
}

exhibit! {
    S6Exhibit of S6, "linear", "S6", "arXiv 2312.00752, 2405.15731";
    "a selective state space: every element of the state by itself";
    not "where the channels of a head may decay alike: Mamba-2 is made of matrix products";
    tokens true;
    build(x, field) {
        {
                let (heads, n, channels) = (x.q.dim().1, x.q.dim().3, x.v.dim().3);
                S6::builder(Array3::from_shape_fn((heads, channels, n), |(h, _, s)| {
                    -share(field.at(2, h, 0, s))
                }))
            }
    }
    extras(x, field) {
        {
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
    }
    input<'a, T>(x, extras) -> S6Input<'a, T> {
        S6Input::new(extras.keys.view(), extras.channels.view(), x.k, x.q)
    }
}
carded!(S6, S6Exhibit);

#[cfg(test)]
mod tests;
