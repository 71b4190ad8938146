//! The gradients of the selective scan by definition, in `f64`, token by token
//! from the last to the first.

use ndarray::{Array2, Array3, Array4, ArrayView4, s};

use crate::input::{Dims, Lengths};
use crate::math::gates::exact::{sigmoid, softplus};

/// The operands of a scan, each as its array has it.
pub(crate) struct Scanned<'a> {
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    pub(crate) u: Array4<f64>,
    pub(crate) delta: Array4<f64>,
    /// Of as many heads as there are, or a divisor.
    pub(crate) b: Array4<f64>,
    pub(crate) c: Array4<f64>,
    pub(crate) z: Option<Array4<f64>>,
    /// `[heads, channels, n]`
    pub(crate) a: Array3<f64>,
    /// `[heads, channels]`
    pub(crate) skip: Array2<f64>,
    pub(crate) bias: Array2<f64>,
    pub(crate) softplus: bool,
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
pub(crate) fn differentiate(
    x: &Scanned<'_>,
    state: Option<ArrayView4<'_, f32>>,
    d_out: ArrayView4<'_, f32>,
    d_state: Option<ArrayView4<'_, f32>>,
) -> Found {
    let d = x.dims;
    let zeros = |x: &Array4<f64>| Array4::<f64>::zeros(x.dim());
    let mut to = Found {
        u: zeros(&x.u),
        delta: zeros(&x.delta),
        b: zeros(&x.b),
        c: zeros(&x.c),
        z: x.z.as_ref().map_or_else(|| Array4::zeros((0, 0, 0, 0)), zeros),
        a: Array3::zeros(x.a.dim()),
        skip: Array2::zeros(x.skip.dim()),
        bias: Array2::zeros(x.bias.dim()),
        state: Array4::zeros((d.batch, d.q_heads, d.head_dim, d.value_dim)),
    };
    for sequence in (0..d.batch).map(|i| x.lengths.sequence(&d, i)) {
        let batch = sequence.batch;
        for (h, ch) in (0..d.q_heads).flat_map(|h| (0..d.value_dim).map(move |ch| (h, ch))) {
            let (own_b, own_c) = (h * x.b.dim().1 / d.q_heads, h * x.c.dim().1 / d.q_heads);
            let rates: Vec<f64> = x.a.slice(s![h, ch, ..]).to_vec();
            let column = |x: &Option<ArrayView4<'_, f32>>| match x {
                Some(x) => x.slice(s![sequence.index, h, .., ch]).iter().map(|&x| f64::from(x)).collect(),
                None => vec![0.0; d.head_dim],
            };
            let raw = |t: usize| x.delta[[batch, h, t, ch]] + x.bias[[h, ch]];
            let step = |t: usize| if x.softplus { softplus(raw(t)) } else { raw(t) };
            // The states before each token, and after the last.
            let mut states: Vec<Vec<f64>> = vec![column(&state)];
            for t in sequence.queries.clone() {
                let (step, input) = (step(t), x.u[[batch, h, t, ch]]);
                let last = &states[states.len() - 1];
                let next =
                    |s: usize| (step * rates[s]).exp() * last[s] + step * x.b[[batch, own_b, t, s]] * input;
                states.push((0..d.head_dim).map(next).collect());
            }
            let mut d_h: Vec<f64> = column(&d_state);
            for (n, t) in sequence.queries.clone().enumerate().rev() {
                let (step, input) = (step(t), x.u[[batch, h, t, ch]]);
                let mut d_y = f64::from(d_out[[batch, h, t, ch]]);
                if let Some(z) = &x.z {
                    let (z, own) = (z[[batch, h, t, ch]], x.skip[[h, ch]] * input);
                    let read = |s: usize| x.c[[batch, own_c, t, s]] * states[n + 1][s];
                    let y = (0..d.head_dim).map(read).sum::<f64>() + own;
                    let open = sigmoid(z);
                    to.z[[batch, h, t, ch]] = d_y * y * (open + z * open * (1.0 - open));
                    d_y *= z * open;
                }
                let mut d_step = 0.0;
                to.skip[[h, ch]] += d_y * input;
                to.u[[batch, h, t, ch]] = d_y * x.skip[[h, ch]];
                for s in 0..d.head_dim {
                    let b = x.b[[batch, own_b, t, s]];
                    to.c[[batch, own_c, t, s]] += d_y * states[n + 1][s];
                    d_h[s] += d_y * x.c[[batch, own_c, t, s]];
                    // h = exp(step a) h_before + step b u
                    to.b[[batch, own_b, t, s]] += d_h[s] * step * input;
                    to.u[[batch, h, t, ch]] += d_h[s] * step * b;
                    let decay = (step * rates[s]).exp();
                    let met = d_h[s] * decay * states[n][s];
                    d_step += d_h[s] * b * input + met * rates[s];
                    to.a[[h, ch, s]] += met * step;
                    d_h[s] *= decay;
                }
                let d_raw = if x.softplus { d_step * sigmoid(raw(t)) } else { d_step };
                to.delta[[batch, h, t, ch]] = d_raw;
                to.bias[[h, ch]] += d_raw;
            }
            to.state.slice_mut(s![sequence.index, h, .., ch]).iter_mut().zip(d_h).for_each(|(to, x)| *to = x);
        }
    }
    to
}
