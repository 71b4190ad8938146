//! The selective scan and its gradients by definition, in `f64`: token by token, and for
//! gradients from the last to the first.

use ndarray::{Array2, Array3, Array4, ArrayView3, ArrayView4, s};

use crate::definition::recurrence::{ERROR_CONSTANT, Reference};
use crate::element::Element;
use crate::error::Result;
use crate::input::{Dims, Lengths, filled};
use crate::math::gates::exact::{sigmoid, softplus};
use crate::simd::tile::NEGLIGIBLE;

/// What log decays count in the error bound.
const STRETCH: f64 = 12.0;

/// The operands of a scan, whose sizes agree.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a, T> {
    /// Sizes: `head_dim` is that of a state, `value_dim` the channels.
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    /// `[batch, heads, len, channels]`
    pub(crate) u: ArrayView4<'a, T>,
    /// As `u`.
    pub(crate) delta: ArrayView4<'a, f32>,
    /// `[batch, heads or a divisor, len, n]`
    pub(crate) b: ArrayView4<'a, T>,
    /// As `b`.
    pub(crate) c: ArrayView4<'a, T>,
    /// As `u`: outputs are multiplied by `z sigmoid(z)`.
    pub(crate) z: Option<ArrayView4<'a, T>>,
}

/// What a scan has learned.
#[derive(Clone, Copy)]
pub(crate) struct Learned<'a> {
    /// `[heads, channels, n]`
    pub(crate) a: ArrayView3<'a, f32>,
    /// `[heads, channels]`
    pub(crate) skip: Option<&'a [f32]>,
    /// Added to step sizes, as `skip`.
    pub(crate) bias: Option<&'a [f32]>,
    /// Whether step sizes are then what the softplus makes of them.
    pub(crate) softplus: bool,
}

impl Learned<'_> {
    /// The number of a channel, 0 where none were given.
    fn of(&self, x: Option<&[f32]>, [head, channel]: [usize; 2]) -> f64 {
        x.map_or(0.0, |x| f64::from(x[head * self.a.dim().1 + channel]))
    }

    /// The step of a channel before its softplus, with the bias.
    fn raw(&self, delta: f32, at: [usize; 2]) -> f64 {
        f64::from(delta) + self.of(self.bias, at)
    }

    fn step(&self, raw: f64) -> f64 {
        if self.softplus { softplus(raw) } else { raw }
    }
}

/// Runs the scan from `state`, `[sequences, heads, n, channels]`.
pub(crate) fn define<T: Element>(
    x: &Operands<'_, T>,
    learned: &Learned<'_>,
    mut state: Array4<f64>,
) -> Result<Reference> {
    let dims = x.dims;
    let mut out = filled("out", x.u.dim(), 0f64)?;
    let mut bound = filled("out", (x.u.dim().0, dims.q_heads, dims.q_len), 0f64)?;
    let (n, channels) = (dims.head_dim, dims.value_dim);
    for sequence in (0..dims.batch).map(|i| x.lengths.sequence(&dims, i)) {
        let batch = sequence.batch;
        for h in 0..dims.q_heads {
            let shared = |heads: usize| h / (dims.q_heads / heads);
            for c in 0..channels {
                let mut state = state.slice_mut(s![sequence.index, h, .., c]);
                // The state if nothing cancelled.
                let mut size: Vec<f64> = state.iter().map(|x| x.abs()).collect();
                let mut stretch = vec![0.0; n];
                let skip = learned.of(learned.skip, [h, c]);
                for (read, t) in sequence.queries.clone().enumerate() {
                    let u = x.u[[batch, h, t, c]].to_f64();
                    let delta = learned.step(learned.raw(x.delta[[batch, h, t, c]], [h, c]));
                    let (mut y, mut total, mut stretched, mut weights) = (0.0, 0.0, 0.0, 0.0);
                    for s in 0..n {
                        let b = x.b[[batch, shared(x.b.dim().1), t, s]].to_f64();
                        let read = x.c[[batch, shared(x.c.dim().1), t, s]].to_f64();
                        let log = delta * f64::from(learned.a[[h, c, s]]);
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
                    y += skip * u;
                    total += (skip * u).abs();
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

/// The gradients of each array, of its shape.
pub(crate) struct Found {
    pub(crate) u: Array4<f64>,
    pub(crate) delta: Array4<f64>,
    pub(crate) b: Array4<f64>,
    pub(crate) c: Array4<f64>,
    pub(crate) z: Array4<f64>,
    pub(crate) a: Array3<f64>,
    pub(crate) skip: Array2<f64>,
    pub(crate) bias: Array2<f64>,
    /// `[sequences, heads, n, channels]`
    pub(crate) state: Array4<f64>,
}

/// The gradients of `sum out * d_out + sum state * d_state`.
pub(crate) fn differentiate<T: Element>(
    x: &Operands<'_, T>,
    learned: &Learned<'_>,
    state: Option<ArrayView4<'_, f32>>,
    d_out: ArrayView4<'_, f32>,
    d_state: Option<ArrayView4<'_, f32>>,
) -> Found {
    let d = x.dims;
    let mut to = Found {
        u: Array4::zeros(x.u.dim()),
        delta: Array4::zeros(x.delta.dim()),
        b: Array4::zeros(x.b.dim()),
        c: Array4::zeros(x.c.dim()),
        z: Array4::zeros(x.z.map_or((0, 0, 0, 0), |z| z.dim())),
        a: Array3::zeros(learned.a.dim()),
        skip: Array2::zeros((d.q_heads, d.value_dim)),
        bias: Array2::zeros((d.q_heads, d.value_dim)),
        state: Array4::zeros((d.batch, d.q_heads, d.head_dim, d.value_dim)),
    };
    for sequence in (0..d.batch).map(|i| x.lengths.sequence(&d, i)) {
        let batch = sequence.batch;
        for (h, ch) in (0..d.q_heads).flat_map(|h| (0..d.value_dim).map(move |ch| (h, ch))) {
            let (own_b, own_c) = (h * x.b.dim().1 / d.q_heads, h * x.c.dim().1 / d.q_heads);
            let rates = learned.a.slice(s![h, ch, ..]).mapv(f64::from);
            let skip = learned.of(learned.skip, [h, ch]);
            let column = |x: &Option<ArrayView4<'_, f32>>| match x {
                Some(x) => x.slice(s![sequence.index, h, .., ch]).iter().map(|&x| f64::from(x)).collect(),
                None => vec![0.0; d.head_dim],
            };
            let raw = |t: usize| learned.raw(x.delta[[batch, h, t, ch]], [h, ch]);
            let step = |t: usize| learned.step(raw(t));
            let input = |t: usize| x.u[[batch, h, t, ch]].to_f64();
            let (b, c) = (
                |t: usize, s: usize| x.b[[batch, own_b, t, s]].to_f64(),
                |t: usize, s: usize| x.c[[batch, own_c, t, s]].to_f64(),
            );
            // The states before each token, and after the last.
            let mut states: Vec<Vec<f64>> = vec![column(&state)];
            for t in sequence.queries.clone() {
                let (step, input) = (step(t), input(t));
                let last = &states[states.len() - 1];
                let next = |s: usize| (step * rates[s]).exp() * last[s] + step * b(t, s) * input;
                states.push((0..d.head_dim).map(next).collect());
            }
            let mut d_h: Vec<f64> = column(&d_state);
            for (n, t) in sequence.queries.clone().enumerate().rev() {
                let (step, input) = (step(t), input(t));
                let mut d_y = f64::from(d_out[[batch, h, t, ch]]);
                if let Some(z) = &x.z {
                    let (z, own) = (z[[batch, h, t, ch]].to_f64(), skip * input);
                    let read = |s: usize| c(t, s) * states[n + 1][s];
                    let y = (0..d.head_dim).map(read).sum::<f64>() + own;
                    let open = sigmoid(z);
                    to.z[[batch, h, t, ch]] = d_y * y * (open + z * open * (1.0 - open));
                    d_y *= z * open;
                }
                let mut d_step = 0.0;
                to.skip[[h, ch]] += d_y * input;
                to.u[[batch, h, t, ch]] = d_y * skip;
                for s in 0..d.head_dim {
                    let b = b(t, s);
                    to.c[[batch, own_c, t, s]] += d_y * states[n + 1][s];
                    d_h[s] += d_y * c(t, s);
                    // h = exp(step a) h_before + step b u
                    to.b[[batch, own_b, t, s]] += d_h[s] * step * input;
                    to.u[[batch, h, t, ch]] += d_h[s] * step * b;
                    let decay = (step * rates[s]).exp();
                    let met = d_h[s] * decay * states[n][s];
                    d_step += d_h[s] * b * input + met * rates[s];
                    to.a[[h, ch, s]] += met * step;
                    d_h[s] *= decay;
                }
                let d_raw = if learned.softplus { d_step * sigmoid(raw(t)) } else { d_step };
                to.delta[[batch, h, t, ch]] = d_raw;
                to.bias[[h, ch]] += d_raw;
            }
            to.state.slice_mut(s![sequence.index, h, .., ch]).iter_mut().zip(d_h).for_each(|(to, x)| *to = x);
        }
    }
    to
}
