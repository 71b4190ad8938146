//! Aaren: softmax attention of a fixed query over every prefix, with a state
//! of fixed size.

use ndarray::{Array4, ArrayViewMut4, Axis};

use crate::attention::ERROR_CONSTANT;
use crate::card::{Extras, carded, exhibit};
use crate::definition::recurrence::Reference;
use crate::element::Element;
use crate::engine::softmax_scan::{self, Prefix};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::declare::input;
use crate::input::{Dim4, Input, filled};
use crate::simd::mem::Heads;
use crate::stages::options::options;
use crate::stages::recur::{Carrying, Config, Memory, check_call, recurrent};

input! {
    /// What goes into an [`Aaren`]. Several queries of a head are several
    /// heads that share keys and values.
    AarenInput {
        /// One query a head; one that is the same for the whole batch is
        /// broadcast.
        q: T [batch, heads, head_dim],
        /// Keys.
        k: T [batch, heads/, len, head_dim],
        /// Values.
        v: T [batch, heads/, len, value_dim];
        /// Added to the scores. -inf hides a token, whatever its key and value
        /// are.
        biased by bias: f32 [batch, heads/, len]
    }
    head_dim head_dim, value_dim value_dim;
}

/// Aaren: softmax attention of a fixed query over every prefix, with a state
/// of fixed size.
///
/// ```text
/// s_t = scale * q . k_t + bias_t
/// o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)
/// ```
///
/// From "Attention as an RNN" (arXiv 2405.13956). The query is a parameter of
/// the layer and the same for every token, so that what is known of a prefix
/// is one softmax state: the largest score, the sum of weights and the
/// weighted sum of values, relative to it. They are scanned by the operator
/// that merges partial attention (see [`merge`](crate::merge)).
///
/// Cost: `2 (head_dim + value_dim)` flops and some exponentials a token and
/// head, however long the sequence is. It is no replacement of attention whose
/// queries are made of the tokens: those need all keys.
///
/// Attention of a fixed query over every prefix.
///
/// ```
/// use attention_kernels::{Attention, Recurrent, linear::{Aaren, AarenInput}};
/// use ndarray::{Array3, Array4};
///
/// let q = Array3::<f32>::ones((1, 4, 32)); // batch, heads, head_dim
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, dim
/// let aaren = Aaren::builder().build()?;
/// let input = AarenInput::new(q.view(), x.view(), x.view());
/// let mut state = aaren.initial_state(input)?;
/// let out = aaren.prefill(input, &mut state)?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// assert_eq!(state.view().dim(), (1, 4, 1, 34));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// A token that is hidden leaves the state as it is; before the first visible
/// one outputs are 0. The [`State`](crate::linear::State) is `[sequences, heads, 1, value_dim + 2]`:
/// the sum of weighted values, the sum of weights (0 where there is no token
/// yet) and the largest score, to which both are relative.
///
/// Errors are within
/// [`ERROR_CONSTANT`](crate::attention::ERROR_CONSTANT), as those of
/// attention over the keys of each prefix.
#[derive(Clone, Debug)]
pub struct Aaren {
    config: Config,
}

impl Aaren {
    /// With the scale of attention.
    pub fn builder() -> AarenBuilder {
        AarenBuilder::with()
    }
}

options! {
    /// Builds an [`Aaren`].
    AarenBuilder of Aaren, scale "1 / sqrt(head_dim)";
    build(this, config) {
        Ok(Aaren { config })
    }
}

impl Aaren {
    fn call<'a, T: Element>(&self, x: &'a AarenInput<'_, T>) -> Result<Prefix<'a>> {
        let dims = x.dims()?;
        Ok(Prefix {
            dims,
            lengths: x.lengths,
            q: T::any(Heads::new(x.q.reborrow().insert_axis(Axis(2)))),
            k: T::any(Heads::new(x.k.reborrow())),
            v: T::any(Heads::new(x.v.reborrow())),
            bias: x.bias.map(|bias| bias.reborrow()),
            scale: self.config.scale(&dims) as f32,
            isa: self.config.isa,
        })
    }
}

impl Carrying for Aaren {
    type Input<'a, T: Element> = AarenInput<'a, T>;

    fn state_shape<T: Element>(&self, x: &AarenInput<'_, T>) -> Result<Dim4> {
        let dims = x.dims()?;
        Ok((dims.batch, dims.q_heads, 1, dims.value_dim + 2))
    }

    fn workspace_bytes<T: Element>(&self, x: &AarenInput<'_, T>) -> Result<usize> {
        Ok(softmax_scan::workspace_bytes(&self.call(x)?))
    }

    fn run<T: Element>(
        &self,
        x: &AarenInput<'_, T>,
        state: Option<Memory<'_>>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        check_call(x, self.state_shape::<T>(x)?, state.as_ref(), &out)?;
        softmax_scan::run(&self.call(x)?, state.map(Memory::kept), out, workspace)
    }

    /// All scores of a prefix, then its weights.
    fn define<T: Element>(&self, x: &AarenInput<'_, T>, from: Option<&Array4<f32>>) -> Result<Reference> {
        let dims = x.dims()?;
        let value_dim = dims.value_dim;
        let scale = self.config.scale(&dims);
        let mut out = filled("out", x.out_dim()?, 0f64)?;
        let mut bound = filled("out", (x.q.dim().0, dims.q_heads, dims.q_len), 0f64)?;
        let mut state = match from {
            Some(from) => from.mapv(f64::from),
            None => filled("state", self.state_shape::<T>(x)?, 0f64)?,
        };
        for sequence in (0..dims.batch).map(|i| x.lengths.sequence(&dims, i)) {
            let b = sequence.batch;
            for h in 0..dims.q_heads {
                let of = |heads: usize| h / (dims.q_heads / heads);
                let mut state = state.slice_mut(ndarray::s![sequence.index, h, 0, ..]);
                // Scores, their weights and values: what came before is one
                // of each.
                let mut seen: Vec<(f64, f64, Vec<f64>)> = Vec::new();
                let mut sizes = Vec::new();
                if state[value_dim] != 0.0 {
                    let values = (0..value_dim).map(|c| state[c] / state[value_dim]).collect();
                    seen.push((state[value_dim + 1], state[value_dim], values));
                    sizes.push(0.0);
                }
                for t in sequence.keys.clone() {
                    let (mut score, mut size) = (0.0, 0.0);
                    for c in 0..dims.head_dim {
                        let term = x.q[[b, h, c]].to_f64() * x.k[[b, of(x.k.dim().1), t, c]].to_f64();
                        score += scale * term;
                        size += (scale * term).abs();
                    }
                    let bias = x.bias.as_ref().map_or(0.0, |bias| f64::from(bias[[b, of(bias.dim().1), t]]));
                    score = if bias == f64::NEG_INFINITY { bias } else { score + bias };
                    if score != f64::NEG_INFINITY {
                        let v = of(x.v.dim().1);
                        let value = (0..value_dim).map(|c| x.v[[b, v, t, c]].to_f64()).collect();
                        seen.push((score, 1.0, value));
                        sizes.push(size + bias.abs() + score.abs());
                    }
                    if seen.is_empty() {
                        continue;
                    }
                    let max = seen.iter().fold(f64::NEG_INFINITY, |max, seen| max.max(seen.0));
                    let sum: f64 = seen.iter().map(|(score, weight, _)| weight * (score - max).exp()).sum();
                    let mut largest = 0f64;
                    for c in 0..value_dim {
                        for (score, weight, value) in &seen {
                            out[[b, h, t, c]] += weight * (score - max).exp() / sum * value[c];
                            largest = largest.max(value[c].abs());
                        }
                        state[c] = out[[b, h, t, c]] * sum;
                    }
                    (state[value_dim], state[value_dim + 1]) = (sum, max);
                    let near = seen.iter().zip(&sizes).filter(|(seen, _)| max - seen.0 < 25.0);
                    let size = near.map(|(_, &size)| size).fold(0.0, f64::max);
                    let terms = (dims.head_dim + seen.len()) as f64 + size;
                    bound[[b, h, t]] = ERROR_CONSTANT * 2f64.powi(-24) * terms * largest;
                }
            }
        }
        Ok(Reference { out, state, bound })
    }

    fn flops<T: Element>(&self, x: &AarenInput<'_, T>) -> Result<usize> {
        let (batch, heads, len, value_dim) = x.out_dim()?;
        Ok(2 * batch * heads * len * (x.q.dim().2 + value_dim))
    }
}
recurrent!(Aaren, AarenInput);

exhibit! {
    AarenExhibit of Aaren, "linear", "Aaren", "arXiv 2405.13956";
    "softmax attention of one query a head over every prefix, as a scan";
    not "where each token has a query of its own: use dense causal attention";
    tokens true, variants 2;
    build(_, field) {
        let builder = Aaren::builder();
        // Sharp.
        if field.variant == 0 { builder } else { builder.scale(20.0) }
    }
    extras(x, field) {
        // The same query for every sequence and prefix.
        let (batch, heads, _, dim) = x.q.dim();
        let query =
            |(_, h, _, c): (usize, usize, usize, usize)| T::from_f32((field.round)(field.at(1, h, 0, c)));
        Extras { keys: Array4::from_shape_fn((batch, heads, 1, dim), query), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> AarenInput<'a, T> {
        let q = extras.keys.index_axis(Axis(2), 0);
        AarenInput { lengths: x.lengths, ..AarenInput::new(q, x.k, x.v) }
    }
}
carded!(Aaren, AarenExhibit);

#[cfg(test)]
mod tests;
