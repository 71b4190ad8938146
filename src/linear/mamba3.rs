//! Mamba-3: a state that turns, and inputs that are integrated by a trapezoid
//! of this token and the one before.

use ndarray::{Array2, Array4, ArrayView2, Axis};

use crate::card::{Extras, carded, exhibit};
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::Result;
use crate::input::declare::input;
use crate::input::tokens::Tokens;
use crate::input::{Input, Qkv};
use crate::linear::mamba3_mimo::{Mamba3Mimo, Mamba3MimoInput};
use crate::stages::options::{FINITE, options};
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::check_channels;
pub use crate::stages::trapezoid::Mamba3State;

input! {
    /// What a Mamba-3 layer computes of its tokens: queries `C`, keys `B`, values,
    /// and numbers of each token and head.
    Mamba3Qkv(qkv) {
        /// Natural logarithms of what a token leaves of the state: at most 0.
        log_decay: f32 [batch, heads/, len],
        /// Steps, after their softplus: at least 0.
        step: f32 [batch, heads/, len],
        /// Logits of how much of a step its own token has, and not the one before.
        trap: f32 [batch, heads/, len],
        /// Angles a step before their tanh, of 1, of as many pairs of channels.
        angle: f32 [batch, heads/, len, pairs],
    }
}

/// Mamba-3: a state that turns, and inputs that are integrated by a trapezoid
/// of this token and the one before.
///
/// ```text
/// a_t = a_{t-1} + pi tanh(angle_t) step_t          pairs of channels of B and C turn by a_t
/// l_t = sigmoid(trap_t)
/// S_t = exp(g_t) S_{t-1} + (1 - l_t) step_t exp(g_t) B_{t-1} x_{t-1}^T + l_t step_t B_t x_t^T
/// y_t = scale * C_t^T S_t + D x_t
/// ```
///
/// "Mamba-3: Improved Sequence Modeling using State Space Principles" (arXiv
/// 2603.15569), with one input and one output (SISO). `C` are queries, `B` keys,
/// both after their norm, and `x` values; `g` is the log decay `A step`. Biases of
/// `B` and `C` are added before they turn; channels `2i` and `2i + 1` are a pair,
/// and those beyond the angles do not turn. The norm before and the gate after are the caller's.
///
/// The kernel has one key a token, `B_t` times what it and the next token make
/// of it, of which its own query sees `l_t step_t`. The last token of a call
/// leaves its key and value to the next call.
///
/// Cost: as [`Mamba2`](super::Mamba2), and about 100 flops an angle.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{Mamba3, Mamba3Qkv}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let step = Array3::from_elem((1, 2, 100), 0.1);
/// let (decay, trap) = (step.mapv(|step| -0.5 * step), Array3::zeros((1, 2, 100)));
/// let angle = Array4::from_elem((1, 2, 100, 8), 0.3); // half of the channels turn
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let input = Mamba3Qkv::new(qkv, decay.view(), step.view(), trap.view(), angle.view());
/// let out = Mamba3::builder().build()?.forward(input)?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mamba3 {
    /// With one rank.
    form: Mamba3Mimo,
}

impl Mamba3 {
    /// Without biases and skip connection.
    pub fn builder() -> Mamba3Builder {
        Mamba3Builder::with()
    }
}

options! {
    /// Builds a [`Mamba3`].
    Mamba3Builder of Mamba3, form growth scale "1";
    own {
        c_bias: Option<Array2<f32>> = None, in FINITE;
        b_bias: Option<Array2<f32>> = None, in FINITE;
        skip: Option<Vec<f32>> = None, in FINITE;
    }
    build(this, config) {
        let skip = this.skip.unwrap_or_default();
        Ok(Mamba3 { form: Mamba3Mimo::of_one_rank(config, [this.c_bias, this.b_bias], skip) })
    }
}

impl Mamba3Builder {
    /// Added to queries and to keys, `[heads, head_dim]` each.
    pub fn biases(self, c: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Self {
        let [c, b] = [c, b].map(|bias| Some(bias.as_standard_layout().into_owned()));
        Self { c_bias: c, b_bias: b, ..self }
    }

    /// `D`, one a head: how much of its own value an output has besides what
    /// it reads. It is not scaled. Default: 0.
    pub fn skip(mut self, skip: &[f32]) -> Self {
        self.skip = Some(skip.to_vec());
        self
    }
}

impl Mamba3 {
    /// What the form of several ranks takes, of one.
    fn of_one_rank<'a, T: Element>(&self, x: Mamba3Qkv<'a, T>) -> Result<Mamba3MimoInput<'a, T>> {
        x.dims()?;
        let dims = x.token_dims()?;
        for (argument, bias) in ["c_bias", "b_bias"].into_iter().zip(self.form.biases()) {
            bias.map_or(Ok(()), |bias| check_channels(argument, bias.dim(), &dims))?;
        }
        let Mamba3Qkv { qkv: Qkv { q, k, v, lengths, .. }, log_decay, step, trap, angle } = x;
        Ok(Mamba3MimoInput { lengths, ..Mamba3MimoInput::new(q, k, v, log_decay, step, trap, angle) })
    }

    fn empty<T: Element>(&self, x: &Mamba3Qkv<'_, T>) -> Result<Mamba3State> {
        self.form.empty(&self.of_one_rank(*x)?)
    }
}

impl<T: Element> Pipeline<Mamba3Qkv<'_, T>> for Mamba3 {
    type State = Mamba3State;

    fn flow(
        &self,
        x: Mamba3Qkv<'_, T>,
        state: Option<&mut Mamba3State>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        self.form.flow(self.of_one_rank(x)?, state, pass, out)
    }

    fn define<R: Real>(
        &self,
        x: Mamba3Qkv<'_, T>,
        state: Option<&Mamba3State>,
    ) -> Result<Defined<R, Mamba3State>> {
        self.form.define(self.of_one_rank(x)?, state)
    }

    fn parameters(&self) -> usize {
        Pipeline::<Mamba3MimoInput<'_, T>>::parameters(&self.form)
    }
}

composite!(Mamba3, Mamba3Qkv, state Mamba3State);

exhibit! {
    Mamba3Exhibit of Mamba3, "linear", "Mamba-3", "arXiv 2603.15569";
    "channels turn by what tokens say, and each token is written with the next one, too";
    not "where nothing turns and steps are short: Mamba-2 makes less of its tokens";
    tokens true, forms form, variants 3;
    build(x, field) {
        let heads = x.q.dim().1.max(x.v.dim().1);
        let bias = |which| Array2::from_shape_fn((heads, x.q.dim().3), |(h, c)| 0.5 * field.at(which, h, 0, c));
        let skip: Vec<f32> = (0..heads).map(|h| [1.0, -0.5, 0.0, 3.0][h % 4]).collect();
        match field.variant {
            0 => Mamba3::builder().biases(bias(5).view(), bias(6).view()).skip(&skip),
            1 => Mamba3::builder(),
            _ => Mamba3::builder().scale(0.3).biases(bias(7).view(), bias(8).view()),
        }
    }
    extras(x, field) {
        let (batch, heads, len, dim) = x.q.dim();
        // Of variants: half of the channels turn, one pair, or all.
        let pairs = [dim / 4, 1.min(dim / 2), dim / 2][field.variant];
        Extras {
            decays: field.token_decays(x),
            betas: field.tokens(2, x, |x| 0.3 * (1.0 + x)),
            rates: Array4::from_shape_fn((batch, heads, len, 1), |(_, h, t, _)| 4.0 * field.at(3, h, t, 0)),
            channels: Array4::from_shape_fn((batch, heads, len, pairs), |(_, h, t, c)| 2.0 * field.at(4, h, t, c)),
            ..Extras::default()
        }
    }
    input<'a, T>(x, extras) -> Mamba3Qkv<'a, T> {
        let trap = extras.rates.index_axis(Axis(3), 0);
        Mamba3Qkv::new(x, extras.decays.view(), extras.betas.view(), trap, extras.channels.view())
    }
}
carded!(Mamba3, Mamba3Exhibit);

#[cfg(test)]
mod tests;
