//! Titans' neural memory: weights that are trained while tokens go by, with momentum and
//! forgetting, on the values that belong to keys.

use ndarray::{Array2, Array3};

use crate::card::{Extras, carded, exhibit};
use crate::element::Element;
use crate::engine::online::{Loss, Memory, Online, Retention};
use crate::error::Result;
use crate::input::declare::input;
use crate::input::tokens::Tokens;
use crate::stages::online::{Learning, Learns, RATE, extras, learning, learning_options, rate};
use crate::stages::options::{check, options};

input! {
    /// Queries, keys and values with steps of descent, momentum and forgetting: what
    /// [`Titans`] takes.
    TitansQkv(qkv) {
        /// How far each token goes down its gradient, `theta`: at least 0.
        step: f32 [batch, heads/, len],
        /// What each token leaves of the momentum, `eta`: from 0 to 1.
        momentum: f32 [batch, heads/, len],
        /// What each token takes of the memory, `alpha`: from 0 to 1.
        forget: f32 [batch, heads/, len],
    }
}

/// Titans' neural memory: weights that are trained while tokens go by, with momentum and
/// forgetting, on the values that belong to keys.
///
/// ```text
/// S_t = eta_t S_{t-1} - theta_t grad |M_r(k_t) - v_t|^2
/// M_t = (1 - alpha_t) M_{t-1} + S_t
/// y_t = M_t(q_t)
/// ```
///
/// "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663). `r` is the last token
/// before the [`chunk`](TitansBuilder::chunk) of `t`: gradients of a chunk are of the same
/// weights, which makes them matrix products, and the size of chunks is part of the
/// definition. With chunks of 1 it is plain gradient descent; without momentum and
/// forgetting that is the [delta rule](crate::linear::DeltaNet) with `beta = 2 theta`. The
/// memory is a matrix, `M(k) = k^T W`, or a perceptron with one hidden layer
/// ([`mlp`](TitansBuilder::mlp)), `gelu(k^T W_1) W_2`, and with
/// [`gamma`](TitansBuilder::gamma) `k + gamma LN` of that.
///
/// The paper's layers combine it with softmax attention ([`Dense`](crate::dense::Dense)):
///
/// - MAC, memory as context: what a segment's queries read of the memory before it (a call
///   with steps and forgetting of 0, on a copy of the state) stands with persistent tokens
///   before the segment's keys and values in attention, whose outputs the memory then
///   learns; outputs are attention times the sigmoid of what is read.
/// - MAG, memory as a gate: attention in a window, times the sigmoid of what the memory
///   reads of the same tokens.
/// - MAL, memory as a layer: attention in a window over the outputs of the memory.
///
/// Where steps are so large that a chunk overshoots (a sum over a chunk of `2 theta |k|^2`
/// above 2, of keys that are alike) the memory diverges, which shows as infinities. A
/// perceptron with a norm is chaotic long before (steps of 0.001 on keys of unit length and
/// values of a language model): then no two orders of its sums agree. The published error
/// bound is that of likely errors, as long as the memory does neither.
///
/// Cost: `10 W + 128 (head_dim + value_dim)` flops a token and head for `W` weights.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Recurrent, dense::Dense, mask::Window};
/// use attention_kernels::{linear::{Titans, TitansQkv}, math::gates::sigmoid};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let rate = |rate| Array3::from_elem((1, 2, 100), rate);
/// let (step, momentum, forget) = (rate(0.01), rate(0.9), rate(0.02));
///
/// let titans = Titans::builder().normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let input = TitansQkv::new(qkv.reborrow(), step.view(), momentum.view(), forget.view());
/// let mut state = titans.initial_state(input)?;
/// let read = titans.prefill(input, &mut state)?;
///
/// // MAG: attention in a window, gated by what the memory reads.
/// let near = Dense::builder().mask(Window::new(Some(16), Some(0))).build()?.forward(qkv)?;
/// let out = near * read.mapv(sigmoid);
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// The [`State`](crate::linear::State) is `[sequences, heads, 3, weights and more]`: a row
/// of weights, one of those at the start of the chunk, one of momentum. Layers follow each
/// other, row by row; behind the weights are the tokens of the chunk so far.
#[derive(Clone, Debug)]
pub struct Titans {
    learning: Learning,
}

impl Titans {
    /// A matrix that starts at 0.
    pub fn builder() -> TitansBuilder {
        TitansBuilder::with()
    }
}

options! {
    /// Builds a [`Titans`].
    TitansBuilder of Titans, form;
    own {
        chunk: usize = 64;
        memory: Memory = Memory::default();
    }
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
        /// Takes the mean over channels for the loss, not the sum.
        mean_loss;
    }
    build(this, config) {
        let loss = Loss::Squared { factor: 2.0, mean: this.mean_loss };
        let rules = (loss, Retention::Linear);
        let learning = Learning::new(config, rules, this.chunk, this.normalize_qk, this.memory)?;
        Ok(Titans { learning })
    }
}

learning_options!(TitansBuilder { chunk, memory });

impl<T: Element> Learns<TitansQkv<'_, T>> for Titans {
    fn learning(&self) -> &Learning {
        &self.learning
    }

    fn online<'a>(&'a self, x: &'a TitansQkv<'_, T>) -> Result<Online<'a>> {
        let online = self.learning.online(x.token_dims()?, &x.qkv, x.step.view(), x.forget.view())?;
        check("momentum", &x.momentum, &RATE)?;
        check("forget", &x.forget, &RATE)?;
        Ok(Online { forgets: true, momentum: Some(x.momentum.view()), ..online })
    }
}
learning!(Titans, TitansQkv);

exhibit! {
    TitansExhibit of Titans, "linear", "Titans", "arXiv 2501.00663";
    "a memory that is trained while it reads, with momentum and forgetting";
    not "where one step a token without momentum is enough: the delta rule is exact in chunks";
    tokens true, forms form, variants 3;
    build(x, field) {
        let titans = Titans::builder().normalize_qk();
        let weights = (x.q.dim().1, x.q.dim().3, x.v.dim().3);
        match field.variant {
            0 => titans.chunk(16),
            1 => titans.chunk(70).mean_loss(),
            _ => titans.chunk(1).weights(Array3::from_shape_fn(weights, |(h, i, j)| field.at(8, h, i, j))),
        }
    }
    extras(x, field) {
        let forget = field.token_decays(x).mapv(|g| -g.exp_m1());
        Extras { decays: forget, ..extras(x, field, 0.02) }
    }
    input<'a, T>(x, extras) -> TitansQkv<'a, T> {
        TitansQkv::new(x, extras.betas.view(), rate(extras, 2), extras.decays.view())
    }
}
carded!(Titans, TitansExhibit);

exhibit! {
    TitansMlpExhibit of Titans, "linear", "Titans MLP", "arXiv 2501.00663";
    "the same with a hidden layer in the memory";
    not "where a matrix remembers enough, at a fraction of the cost";
    tokens true, forms form, variants 2;
    build(x, field) {
        let ((_, heads, _, d), w) = (x.q.dim(), x.v.dim().3);
        let weights = |which, n, m| {
            let size = 1.0 / (n as f32).sqrt().max(1.0);
            Array3::from_shape_fn((heads, n, m), |(h, i, j)| size * field.at(which, h, i, j))
        };
        let titans = Titans::builder().normalize_qk().chunk([8, 70][field.variant]);
        let titans = titans.mlp(weights(8, d, 17), weights(9, 17, w));
        // Keys that are added are as long as values.
        if d == w && field.variant == 0 {
            titans.gamma(Array2::from_shape_fn((heads, w), |(h, c)| field.at(10, h, 0, c)))
        } else {
            titans
        }
    }
    // Behind a norm small steps already make chaos of real data.
    extras(x, field) { extras(x, field, 2e-4) }
    input<'a, T>(x, extras) -> TitansQkv<'a, T> {
        TitansQkv::new(x, extras.betas.view(), rate(extras, 2), rate(extras, 0))
    }
}

#[cfg(test)]
mod tests;
