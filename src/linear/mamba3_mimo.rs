//! Mamba-3 with several inputs and outputs: each token writes several keys at once, and
//! reads with as many queries.

use ndarray::{Array2, Array4, ArrayView2, ArrayView3, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate, Spec};
use crate::error::{Error, Result};
use crate::input::declare::input;
use crate::input::tokens::Tokens;
use crate::input::{Dims, Qkv};
use crate::math::rope::Pairs;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::{Config, check_heads};
use crate::stages::substeps::check_steps;
use crate::stages::trapezoid::{Defining, Mamba3State, Ranks, Steps, Trapezoid, check};

/// Ranks that the kernel takes at most.
const MOST: usize = 32;

input! {
    /// What [`Mamba3Mimo`] takes: the queries and keys of token `t` are `r t` to `r t + r -
    /// 1` for `r` ranks, so that `[batch, len, ranks, heads, head_dim]` is a view of them.
    Mamba3MimoInput {
        /// Queries `C` of all ranks.
        q: T [batch, heads/, rows, head_dim],
        /// Keys `B` of all ranks.
        k: T [batch, heads/, rows, head_dim],
        /// Values, one a token.
        v: T [batch, heads/, len, value_dim],
        /// Natural logarithms of what a token leaves of the state: at most 0.
        log_decay: f32 [batch, heads/, len],
        /// Steps, after their softplus: at least 0.
        step: f32 [batch, heads/, len],
        /// Logits of how much of a step its own token has, and not the one before.
        trap: f32 [batch, heads/, len],
        /// Angles a step before their tanh, of 1, of as many pairs of channels.
        angle: f32 [batch, heads/, len, pairs];
        /// What passes of outputs, before its SiLU.
        gated by gate: T [batch, heads/, len, value_dim]
    }
    head_dim head_dim, value_dim value_dim;
}

/// Mamba-3 of rank `R`: each token writes `R` keys at once, and reads with as many queries.
///
/// ```text
/// a_t = a_{t-1} + pi tanh(angle_t) step_t              pairs of channels of B and C turn by a_t
/// l_t = sigmoid(trap_t),   x_{t,r} = x_t * m_r         columns by columns
/// S_t = exp(g_t) S_{t-1} + sum_r [(1 - l_t) step_t exp(g_t) B_{t-1,r} x_{t-1,r}^T + l_t step_t B_{t,r} x_{t,r}^T]
/// y_t = sum_r o_r * (scale * C_{t,r}^T S_t + D x_{t,r}) * silu(z_t * n_r)
/// ```
///
/// "Mamba-3: Improved Sequence Modeling using State Space Principles" (arXiv
/// 2603.15569), with several inputs and outputs (MIMO). All is as [`Mamba3`](super::Mamba3)
/// has it, which it is with one rank and weights of 1; biases are of each rank and are
/// added before channels turn. Weights `m` and `o` are `1 / R` unless others are given;
/// the gate `z` may be left out. Channels `i` and `i + head_dim / 2` are a pair, as the
/// released kernels of this form have it; [`pairs`](Mamba3MimoBuilder::pairs) makes it
/// neighbours, as the form of one rank has it.
///
/// The kernel has `R` steps a token, of which all queries see all keys of their own token.
/// The last token of a call leaves its keys, turned, and its value to the next call.
///
/// Cost: `R` times that of [`Mamba3`](super::Mamba3), of which the state is read and
/// written once for all ranks of a token.
///
/// ```
/// use attention_kernels::{Attention, linear::{Mamba3Mimo, Mamba3MimoInput}};
/// use ndarray::{Array3, Array4};
///
/// let bc = Array4::from_shape_fn((1, 2, 4 * 50, 16), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let x = Array4::from_shape_fn((1, 2, 50, 32), |(_, h, t, c)| ((h + t * c) as f32).cos());
/// let step = Array3::from_elem((1, 2, 50), 0.1);
/// let (decay, trap) = (step.mapv(|step| -0.5 * step), Array3::zeros((1, 2, 50)));
/// let angle = Array4::from_elem((1, 2, 50, 4), 0.3); // half of the channels turn
/// let (bc, x) = (bc.view(), x.view());
/// let input = Mamba3MimoInput::new(bc, bc, x, decay.view(), step.view(), trap.view(), angle.view());
/// let out = Mamba3Mimo::builder(4).build()?.forward(input)?;
/// assert_eq!(out.dim(), (1, 2, 50, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mamba3Mimo {
    config: Config,
    ranks: usize,
    pairs: Pairs,
    /// Of queries and of keys, `[heads, ranks * head_dim]`.
    biases: [Option<Array2<f32>>; 2],
    /// `[heads, ranks * value_dim]`, of values, outputs and gates.
    weights: [Option<Array2<f32>>; 3],
    skip: Vec<f32>,
}

impl Mamba3Mimo {
    /// Of so many ranks, at most 32, without biases and skip connection.
    pub fn builder(ranks: usize) -> Mamba3MimoBuilder {
        Mamba3MimoBuilder::with(ranks)
    }

    /// Which channels are a pair.
    pub fn pairs(&self) -> Pairs {
        self.pairs
    }

    /// By which the value of a token is multiplied for each rank, `[heads, ranks *
    /// value_dim]`; where no weights are given, it is `1 / ranks`.
    pub fn value_weights(&self) -> Option<ArrayView2<'_, f32>> {
        self.weights[0].as_ref().map(|weights| weights.view())
    }

    /// Of one rank, as [`Mamba3`](super::Mamba3) has it: biases are `[heads, head_dim]`,
    /// and neighbours a pair.
    pub(super) fn of_one_rank(config: Config, biases: [Option<Array2<f32>>; 2], skip: Vec<f32>) -> Self {
        Self { config, ranks: 1, pairs: Pairs::Neighbours, biases, weights: [None, None, None], skip }
    }

    pub(super) fn biases(&self) -> [Option<&Array2<f32>>; 2] {
        self.biases.each_ref().map(Option::as_ref)
    }
}

options! {
    /// Builds a [`Mamba3Mimo`].
    Mamba3MimoBuilder of Mamba3Mimo, form growth scale "1";
    given { ranks: usize; }
    own {
        c_bias: Option<Array2<f32>> = None, in FINITE;
        b_bias: Option<Array2<f32>> = None, in FINITE;
        value_weights: Option<Array2<f32>> = None, in FINITE;
        out_weights: Option<Array2<f32>> = None, in FINITE;
        gate_weights: Option<Array2<f32>> = None, in FINITE;
        skip: Option<Vec<f32>> = None, in FINITE;
    }
    set {
        /// Which channels are a pair. Default: [`Pairs::Halves`].
        pairs: Pairs = Pairs::Halves;
    }
    build(this, config) {
        if !(1..=MOST).contains(&this.ranks) {
            return Err(Error::value("ranks", format!("from 1 to {MOST}"), this.ranks));
        }
        Ok(Mamba3Mimo {
            config,
            ranks: this.ranks,
            pairs: this.pairs,
            biases: [this.c_bias, this.b_bias],
            weights: [this.value_weights, this.out_weights, this.gate_weights],
            skip: this.skip.unwrap_or_default(),
        })
    }
}

/// Parameters `[heads, ranks, dim]`, a row a head.
fn rows(x: ArrayView3<'_, f32>) -> Option<Array2<f32>> {
    let (heads, ranks, dim) = x.dim();
    x.as_standard_layout().into_owned().into_shape_with_order((heads, ranks * dim)).ok()
}

impl Mamba3MimoBuilder {
    /// Added to queries and to keys, `[heads, ranks, head_dim]` each.
    pub fn biases(self, c: ArrayView3<'_, f32>, b: ArrayView3<'_, f32>) -> Self {
        Self { c_bias: rows(c), b_bias: rows(b), ..self }
    }

    /// By which values are multiplied for each rank (`m`), and outputs before they add up
    /// (`o`), `[heads, ranks, value_dim]` each.
    pub fn weights(self, values: ArrayView3<'_, f32>, outs: ArrayView3<'_, f32>) -> Self {
        Self { value_weights: rows(values), out_weights: rows(outs), ..self }
    }

    /// By which the gate is multiplied for each rank (`n`), `[heads, ranks, value_dim]`.
    /// Default: 1.
    pub fn gate_weights(self, gate: ArrayView3<'_, f32>) -> Self {
        Self { gate_weights: rows(gate), ..self }
    }

    /// `D`, one a head: how much of its own values an output has besides what
    /// it reads. It is not scaled. Default: 0.
    pub fn skip(mut self, skip: &[f32]) -> Self {
        self.skip = Some(skip.to_vec());
        self
    }
}

impl Mamba3Mimo {
    fn dims<T: Element>(&self, x: &Mamba3MimoInput<'_, T>, state: Option<&Mamba3State>) -> Result<Dims> {
        let (dims, ranks) = (x.token_dims()?, self.ranks);
        check_steps("keys", ranks, &dims, x.k.dim().2)?;
        self.config.check_decays("log_decay", x.log_decay)?;
        check(&dims, x.angle.dim().3, ranks, x.step, state)?;
        let fits =
            |name: &'static str, have: &Option<Array2<f32>>, dim: usize| match have.as_ref().map(Array2::dim)
            {
                Some(have) if have != (dims.q_heads, ranks * dim) => {
                    let expected = format!("[heads, ranks * dim] = [{}, {ranks} * {dim}]", dims.q_heads);
                    Err(Error::shape(name, expected, &[have.0, have.1]))
                }
                _ => Ok(()),
            };
        for (name, bias) in ["c_bias", "b_bias"].into_iter().zip(&self.biases) {
            fits(name, bias, dims.head_dim)?;
        }
        for (name, weights) in ["value_weights", "out_weights", "gate_weights"].into_iter().zip(&self.weights)
        {
            fits(name, weights, dims.value_dim)?;
        }
        if !self.skip.is_empty() {
            check_heads("skip", self.skip.len(), &dims)?;
        }
        Ok(dims)
    }

    pub(super) fn empty<T: Element>(&self, x: &Mamba3MimoInput<'_, T>) -> Result<Mamba3State> {
        Mamba3State::zeros(&self.dims(x, None)?, x.angle.dim().3, self.ranks)
    }

    /// Weights of values, of outputs and of gates where they are given.
    fn weights(&self) -> [Option<&Array2<f32>>; 3] {
        self.weights.each_ref().map(Option::as_ref)
    }

    /// What those of values and of outputs are otherwise.
    fn even(&self) -> f32 {
        1.0 / self.ranks as f32
    }
}

impl<T: Element> Pipeline<Mamba3MimoInput<'_, T>> for Mamba3Mimo {
    type State = Mamba3State;

    fn flow(
        &self,
        x: Mamba3MimoInput<'_, T>,
        state: Option<&mut Mamba3State>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.dims(&x, state.as_deref())?;
        let arrays = Arrays {
            decay: Gate::Token(x.log_decay.reborrow()),
            skip: &self.skip,
            ..Arrays::new(&Qkv::new(x.q, x.k, x.v), dims.q_heads)
        };
        let of_steps = Dims { kv_len: dims.q_len * self.ranks, ..dims };
        let spec = self.config.spec(of_steps, x.lengths, &arrays);
        let joined = self.ranks > 1 || self.weights[1].is_some() || x.gate.is_some();
        let spec = Spec { steps: self.ranks, joined, ..spec }.checked()?;
        let steps = Steps {
            step: x.step,
            trap: x.trap,
            rates: AnyArray::F32(Heads::new(x.angle)),
            layout: self.pairs,
            dims,
            lengths: x.lengths,
        };
        let [values, outs, gates] = self.weights();
        let ranks = Ranks {
            count: self.ranks,
            values,
            outs,
            even: self.even(),
            gate: x.gate.map(|gate| (T::any(Heads::new(gate)), gates)),
        };
        Trapezoid { steps, arrays, biases: self.biases(), ranks }.run(
            pass,
            self.config.isa,
            &spec,
            state,
            out,
        )
    }

    fn define<R: Real>(
        &self,
        x: Mamba3MimoInput<'_, T>,
        state: Option<&Mamba3State>,
    ) -> Result<Defined<R, Mamba3State>> {
        let dims = self.dims(&x, state)?;
        let state = state.map_or_else(|| self.empty(&x), |state| Ok(state.clone()))?;
        let [values, outs, gates] = self.weights();
        let defining = Defining {
            rows: [x.q, x.k],
            v: x.v,
            numbers: [x.log_decay, x.step, x.trap],
            angle: x.angle,
            dims,
            lengths: x.lengths,
            layout: self.pairs,
            ranks: self.ranks,
            scale: self.config.scale(&dims),
            skip: &self.skip,
            biases: self.biases(),
            values,
            outs,
            even: self.even(),
            gate: x.gate.map(|gate| (gate, gates)),
        };
        Ok(defining.run(state))
    }

    fn parameters(&self) -> usize {
        let given = self.biases.iter().chain(&self.weights).flatten();
        size_of::<f32>() * (self.skip.len() + given.map(|x| x.len()).sum::<usize>())
    }
}

composite!(Mamba3Mimo, Mamba3MimoInput, state Mamba3State);

exhibit! {
    Mamba3MimoExhibit of Mamba3Mimo, "linear", "Mamba-3 MIMO", "arXiv 2603.15569";
    "each token of Mamba-3 writes several keys at once and reads with as many queries";
    not "where a state is read from the cache anyhow: one rank costs less";
    tokens true, forms form, variants 3;
    build(x, field) {
        let (heads, ranks) = (x.q.dim().1.max(x.v.dim().1), [4, 1, 3][field.variant]);
        let rows = |which, dim| ndarray::Array3::from_shape_fn((heads, ranks, dim), |(h, r, c)| field.at(which, h, r, c));
        let bias = |which| rows(which, x.q.dim().3).mapv(|x| 0.5 * x);
        let weights = |which| rows(which, x.v.dim().3);
        let skip: Vec<f32> = (0..heads).map(|h| [1.0, -0.5, 0.0, 3.0][h % 4]).collect();
        let builder = Mamba3Mimo::builder(ranks);
        match field.variant {
            0 => builder.biases(bias(5).view(), bias(6).view()).skip(&skip),
            1 => builder.pairs(Pairs::Neighbours),
            _ => builder.scale(0.3).weights(weights(7).view(), weights(8).view()).gate_weights(weights(9).view()),
        }
    }
    extras(x, field) {
        let (batch, heads, len, dim) = x.q.dim();
        let (ranks, pairs) = ([4, 1, 3][field.variant], [dim / 4, 1.min(dim / 2), dim / 2][field.variant]);
        // The last rank has the token's own rows.
        let of = |x: &ndarray::ArrayView4<'_, T>, which: u64| {
            let (batch, heads, len, dim) = x.dim();
            Array4::from_shape_fn((batch, heads, len * ranks, dim), |(b, h, t, c)| match ranks - 1 - t % ranks {
                0 => x[[b, h, t / ranks, c]],
                rank => T::from_f32((field.round)(field.at(which + rank as u64, h, t / ranks, c))),
            })
        };
        Extras {
            decays: field.token_decays(x),
            betas: field.tokens(2, x, |x| 0.3 * (1.0 + x)),
            rates: Array4::from_shape_fn((batch, heads, len, 1), |(_, h, t, _)| 4.0 * field.at(3, h, t, 0)),
            channels: Array4::from_shape_fn((batch, heads, len, pairs), |(_, h, t, c)| 2.0 * field.at(4, h, t, c)),
            keys: of(&x.k, 10),
            values: of(&x.q, 20),
            ..Extras::default()
        }
    }
    input<'a, T>(x, extras) -> Mamba3MimoInput<'a, T> {
        let trap = extras.rates.index_axis(Axis(3), 0);
        let (q, k) = (extras.values.view(), extras.keys.view());
        let (decay, step, angle) = (extras.decays.view(), extras.betas.view(), extras.channels.view());
        let input = Mamba3MimoInput { lengths: x.lengths, ..Mamba3MimoInput::new(q, k, x.v, decay, step, trap, angle) };
        // A gate where there are three ranks: the values themselves.
        if k.dim().2 == 3 * x.v.dim().2 && x.v.dim().2 > 0 { input.gated(x.v) } else { input }
    }
}
carded!(Mamba3Mimo, Mamba3MimoExhibit);

#[cfg(test)]
mod tests;
