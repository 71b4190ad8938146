//! Aaren: softmax attention of a fixed query over every prefix, with a state
//! of fixed size.
//!
//! ```text
//! s_t = scale * q . k_t + bias_t
//! o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)
//! ```
//!
//! From "Attention as an RNN" (arXiv 2405.13956). The query is a parameter of
//! the layer and the same for every token, so that what is known of a prefix
//! is one softmax state: the largest score, the sum of weights and the
//! weighted sum of values, relative to it. They are scanned by the operator
//! that merges partial attention (see [`merge`](crate::merge)).
//!
//! Cost: `2 (head_dim + value_dim)` flops and some exponentials a token and
//! head, however long the sequence is. It is no replacement of attention whose
//! queries are made of the tokens: those need all keys.

use ndarray::{Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut4, Axis};

use crate::attention::{Attention, Bounded, Cost, ERROR_CONSTANT, Input, Recurrent};
use crate::card::{Extras, carded, exhibit};
use crate::element::Element;
use crate::engine::softmax_scan::{self, Prefix};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::tokens::{check_channels, check_tokens};
use crate::input::{Dims, Lengths, filled};
use crate::linear::State;
use crate::simd::Isa;
use crate::simd::mem::Heads;

/// What goes into an [`Aaren`]. Several queries of a head are several heads
/// that share keys and values.
#[derive(Clone, Copy, Debug)]
pub struct AarenInput<'a, T> {
    /// One query a head, `[batch, heads, head_dim]`; one that is the same for
    /// the whole batch is broadcast.
    pub q: ArrayView3<'a, T>,
    /// Keys, `[batch, heads or a divisor, len, head_dim]`.
    pub k: ArrayView4<'a, T>,
    /// Values, `[batch, heads or a divisor, len, value_dim]`.
    pub v: ArrayView4<'a, T>,
    /// Added to the scores, `[batch, heads or a divisor, len]`. -inf hides a
    /// token, whatever its key and value are.
    pub bias: Option<ArrayView3<'a, f32>>,
    /// Where sequences start and end in a packed batch, whose batch axis is
    /// 1: `sequences + 1` offsets along `len` (`cu_seqlens`).
    pub offsets: Option<&'a [usize]>,
}

impl<'a, T> AarenInput<'a, T> {
    /// Whole sequences, every token visible.
    pub fn new(q: ArrayView3<'a, T>, k: ArrayView4<'a, T>, v: ArrayView4<'a, T>) -> Self {
        Self { q, k, v, bias: None, offsets: None }
    }

    /// With a bias of the scores.
    pub fn biased(self, bias: ArrayView3<'a, f32>) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// As a packed batch.
    pub fn packed(self, offsets: &'a [usize]) -> Self {
        Self { offsets: Some(offsets), ..self }
    }

    /// The same for a shorter while.
    pub fn reborrow<'b>(self) -> AarenInput<'b, T>
    where
        'a: 'b,
    {
        AarenInput {
            q: self.q.reborrow(),
            k: self.k.reborrow(),
            v: self.v.reborrow(),
            bias: self.bias.map(ArrayView3::reborrow),
            offsets: self.offsets,
        }
    }

    fn lengths(&self) -> Lengths<'a> {
        self.offsets.map_or(Lengths::Full, |offsets| Lengths::Packed { queries: offsets, keys: offsets })
    }
}

impl<T: Element> Input for AarenInput<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        Self::lengths(self)
    }

    fn dims(&self) -> Result<Dims> {
        let (batch, heads, head_dim) = self.q.dim();
        let (_, kv_heads, len, value_dim) = self.v.dim();
        let mut dims = Dims {
            batch,
            q_heads: heads,
            kv_heads,
            q_len: len,
            kv_len: len,
            head_dim,
            value_dim,
            packed: false,
        };
        check_channels("k", &self.k, batch, &dims, head_dim)?;
        check_channels("v", &self.v, batch, &dims, value_dim)?;
        if let Some(bias) = &self.bias {
            check_tokens("bias", bias, batch, &dims)?;
        }
        if let Some(offsets) = self.offsets {
            if batch != 1 {
                return Err(Error::shape("q", "[1, heads, head_dim] in a packed batch", self.q.shape()));
            }
            crate::input::check_offsets("offsets", offsets, len)?;
            (dims.batch, dims.packed) = (offsets.len() - 1, true);
        }
        dims.checked()
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        let dims = self.dims()?;
        Ok((self.q.dim().0, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

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
/// one outputs are 0. The [`State`] is `[sequences, heads, 1, value_dim + 2]`:
/// the sum of weighted values, the sum of weights (0 where there is no token
/// yet) and the largest score, to which both are relative.
///
/// Errors are within
/// [`ERROR_CONSTANT`](crate::attention::ERROR_CONSTANT), as those of
/// attention over the keys of each prefix.
#[derive(Clone, Debug)]
pub struct Aaren {
    scale: Option<f32>,
    isa: Isa,
}

/// Builds an [`Aaren`].
#[derive(Clone, Debug, Default)]
pub struct AarenBuilder {
    scale: Option<f32>,
    isa: Option<Isa>,
}

impl Aaren {
    /// With the scale of attention.
    pub fn builder() -> AarenBuilder {
        AarenBuilder::default()
    }
}

impl AarenBuilder {
    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::simd::ISA_VARIABLE) says.
    pub fn isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is not finite, [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<Aaren> {
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::value("scale", "a finite number", scale));
        }
        Ok(Aaren { scale: self.scale, isa: Isa::choose(self.isa)? })
    }
}

/// What the definition gives.
struct Definition {
    out: Array4<f64>,
    bound: Array3<f64>,
    state: Array4<f64>,
}

impl Aaren {
    fn scale(&self, dims: &Dims) -> f64 {
        self.scale.map_or(1.0 / (dims.head_dim.max(1) as f64).sqrt(), f64::from)
    }

    fn call<'a, T: Element>(&self, x: &AarenInput<'a, T>) -> Result<Prefix<'a>> {
        let dims = x.dims()?;
        Ok(Prefix {
            dims,
            lengths: x.lengths(),
            q: T::any(Heads::new(x.q.insert_axis(Axis(2)))),
            k: T::any(Heads::new(x.k)),
            v: T::any(Heads::new(x.v)),
            bias: x.bias,
            scale: self.scale(&dims) as f32,
            isa: self.isa,
        })
    }

    fn state_shape(dims: &Dims) -> (usize, usize, usize, usize) {
        (dims.batch, dims.q_heads, 1, dims.value_dim + 2)
    }

    /// The definition, from a state or from nothing: all scores of a prefix,
    /// then its weights.
    fn define<T: Element>(&self, x: &AarenInput<'_, T>, from: Option<&State>) -> Result<Definition> {
        let dims = x.dims()?;
        let (value_dim, scale) = (dims.value_dim, self.scale(&dims));
        let mut out = filled("out", x.out_dim()?, 0f64)?;
        let mut bound = filled("out", (x.q.dim().0, dims.q_heads, dims.q_len), 0f64)?;
        let mut state = filled("state", Self::state_shape(&dims), 0f64)?;
        if let Some(from) = from {
            from.check(Self::state_shape(&dims))?;
            state.assign(&from.view().mapv(f64::from));
        }
        for sequence in (0..dims.batch).map(|i| x.lengths().sequence(&dims, i)) {
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
        Ok(Definition { out, bound, state })
    }
}

fn check_out<T, U: Element>(x: &AarenInput<'_, U>, out: &ArrayViewMut4<'_, T>) -> Result<()> {
    let (batch, heads, len, dim) = x.out_dim()?;
    if out.dim() == (batch, heads, len, dim) {
        return Ok(());
    }
    let expected = format!("[batch, heads, len, value_dim] = [{batch}, {heads}, {len}, {dim}]");
    Err(Error::shape("out", expected, out.shape()))
}

impl<T: Element> Attention<AarenInput<'_, T>> for Aaren {
    fn workspace_bytes(&self, x: AarenInput<'_, T>) -> Result<usize> {
        Ok(softmax_scan::workspace_bytes(&self.call(&x.reborrow())?))
    }

    fn forward_into(
        &self,
        x: AarenInput<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let x = x.reborrow();
        let call = self.call(&x)?;
        check_out(&x, &out)?;
        softmax_scan::run(&call, None, out, workspace)
    }

    fn reference(&self, x: AarenInput<'_, T>) -> Result<Array4<f64>> {
        Ok(self.define(&x, None)?.out)
    }

    fn cost(&self, x: AarenInput<'_, T>) -> Result<Cost> {
        let dims = x.dims()?;
        let (batch, heads, len, dim) = x.out_dim()?;
        let elements = x.q.len() + x.k.len() + x.v.len() + batch * heads * len * dim;
        let bias = x.bias.as_ref().map_or(0, |bias| bias.len() * size_of::<f32>());
        Ok(Cost {
            flops: (2 * batch * heads * len * (dims.head_dim + dim)) as u64,
            bytes: (elements * size_of::<T>() + bias) as u64,
        })
    }
}

impl<T: Element> Bounded<AarenInput<'_, T>> for Aaren {
    fn error_bound(&self, x: AarenInput<'_, T>) -> Result<Array3<f64>> {
        Ok(self.define(&x, None)?.bound)
    }
}

impl<T: Element> Recurrent<AarenInput<'_, T>> for Aaren {
    type State = State;

    fn initial_state(&self, x: AarenInput<'_, T>) -> Result<State> {
        State::zeros(Self::state_shape(&x.dims()?))
    }

    fn prefill_into(
        &self,
        x: AarenInput<'_, T>,
        state: &mut State,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let x = x.reborrow();
        let call = self.call(&x)?;
        check_out(&x, &out)?;
        state.check(Self::state_shape(&call.dims))?;
        softmax_scan::run(&call, Some(state.as_mut_slice()), out, workspace)
    }

    fn reference_from(&self, x: AarenInput<'_, T>, state: &State) -> Result<(Array4<f64>, State)> {
        let Definition { out, state, .. } = self.define(&x, Some(state))?;
        Ok((out, State::from_f64(&state)))
    }
}

exhibit! {
    AarenExhibit of Aaren, "linear", "Aaren", "arXiv 2405.13956";
    "softmax attention of one query a head over every prefix, as a scan";
    not "where each token has a query of its own: use dense causal attention";
    tokens true;
    build(_, _) {
        Aaren::builder()
    }
    extras(x, field) {
        // The same query for every sequence and prefix.
        let (batch, heads, _, dim) = x.q.dim();
        let query =
            |(_, h, _, c): (usize, usize, usize, usize)| T::from_f32((field.round)(field.at(1, h, 0, c)));
        Extras { keys: Array4::from_shape_fn((batch, heads, 1, dim), query), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> AarenInput<'a, T> {
        AarenInput::new(extras.keys.index_axis(Axis(2), 0), x.k, x.v)
    }
}
carded!(Aaren, AarenExhibit);

#[cfg(test)]
mod tests;
