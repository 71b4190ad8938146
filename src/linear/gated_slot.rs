//! Gated slot attention: tokens are written into a few slots, whose keys and
//! values forget at rates of their own, and queries attend to the slots.

use ndarray::Array2;

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::heads::of_heads;
use crate::definition::number::{Real, softmax};
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate, Keys, Made, Place, Spec};
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::state::State;
use crate::input::tokens::Tokens;
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::options::options;
use crate::stages::pass::{Defined, Out, Pass, Pipeline, composite};
use crate::stages::recur::Config;
use crate::stages::{linear, slots};

input! {
    /// Queries, keys and values with weights and log decays of slots: what
    /// [`GatedSlotAttention`] takes.
    SlotQkv(qkv) {
        /// How much of a token is written into each slot.
        write: f32 [batch, heads/, len, slots],
        /// Natural logarithms of what a token leaves of each slot: at most 0,
        /// `-inf` to forget everything.
        log_decay: f32 [batch, heads/, len, slots],
    }
}

/// What [`GatedSlotAttention`] carries from token to token.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotState {
    pub(crate) keys: State,
    pub(crate) values: State,
}

impl SlotState {
    /// A state of these parts, for instance one that was saved: keys
    /// `[sequences, heads, head_dim, slots]` and values `[sequences, heads,
    /// slots, value_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for values of other sequences, heads or slots.
    pub fn new(keys: State, values: State) -> Result<Self> {
        let ((sequences, heads, _, slots), (a, b, c, _)) = (keys.view().dim(), values.view().dim());
        if (sequences, heads, slots) != (a, b, c) {
            let expected = format!("[sequences, heads, slots, _] = [{sequences}, {heads}, {slots}, _]");
            return Err(Error::shape("values", expected, values.view().shape()));
        }
        Ok(Self { keys, values })
    }

    /// Keys of the slots, `[sequences, heads, head_dim, slots]`.
    pub fn keys(&self) -> &State {
        &self.keys
    }

    /// Values of the slots, `[sequences, heads, slots, value_dim]`.
    pub fn values(&self) -> &State {
        &self.values
    }
}

/// Gated slot attention: tokens are written into a few slots, whose keys and
/// values forget at rates of their own, and queries attend to the slots.
///
/// ```text
/// K_t[m] = exp(g_t[m]) K_{t-1}[m] + w_t[m] k_t          of each slot m
/// V_t[m] = exp(g_t[m]) V_{t-1}[m] + w_t[m] v_t
/// o_t    = sum_m softmax_m(scale * q_t . K_t[m]) V_t[m]
/// ```
///
/// "Gated Slot Attention for Efficient Linear-Time Sequence Modeling" (arXiv
/// 2409.07146). The paper's layer writes what a slot forgets, `w = 1 - exp(g)`,
/// with `g = log_sigmoid(raw) / 8`
/// ([`log_sigmoid_decays`](crate::math::gates::log_sigmoid_decays)). Where each
/// token has a slot of its own it is softmax attention.
///
/// Cost: about `4 slots (head_dim + value_dim) + 32 (slots + value_dim)` flops
/// a token and head. The keys of a head's slots are one thread's work.
///
/// ```
/// use attention_kernels::math::gates::log_sigmoid_decays;
/// use attention_kernels::{Attention, Qkv, linear::{GatedSlotAttention, SlotQkv}};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let log_decay = log_sigmoid_decays(Array4::zeros((1, 2, 100, 16)).view(), 8.0)?; // 16 slots
/// let write = log_decay.mapv(|g| -g.exp_m1());
///
/// let attention = GatedSlotAttention::builder().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = attention.forward(SlotQkv::new(qkv, write.view(), log_decay.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GatedSlotAttention {
    config: Config,
}

impl GatedSlotAttention {
    /// As the paper has it.
    pub fn builder() -> GatedSlotAttentionBuilder {
        GatedSlotAttentionBuilder::with()
    }
}

options! {
    /// Builds a [`GatedSlotAttention`].
    GatedSlotAttentionBuilder of GatedSlotAttention, form growth scale "1 / sqrt(head_dim)";
    build(this, config) {
        Ok(GatedSlotAttention { config })
    }
}

impl GatedSlotAttention {
    /// Sizes, and how many slots there are.
    fn dims<T: Element>(&self, x: &SlotQkv<'_, T>, state: Option<&SlotState>) -> Result<(Dims, usize)> {
        let (dims, slots) = (x.token_dims()?, x.write.dim().3);
        self.config.check_decays("log_decay", x.log_decay)?;
        if let Some(state) = state {
            state.keys.check((dims.batch, dims.q_heads, dims.head_dim, slots))?;
            state.values.check((dims.batch, dims.q_heads, slots, dims.value_dim))?;
        }
        Ok((dims, slots))
    }

    fn empty<T: Element>(&self, x: &SlotQkv<'_, T>) -> Result<SlotState> {
        let (Dims { batch, q_heads, head_dim, value_dim, .. }, slots) = self.dims(x, None)?;
        let keys = State::zeros((batch, q_heads, head_dim, slots))?;
        Ok(SlotState { keys, values: State::zeros((batch, q_heads, slots, value_dim))? })
    }
}

impl<T: Element> Pipeline<SlotQkv<'_, T>> for GatedSlotAttention {
    type State = SlotState;

    fn flow(
        &self,
        x: SlotQkv<'_, T>,
        mut state: Option<&mut SlotState>,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let (dims, slots) = self.dims(&x, state.as_deref())?;
        let (isa, scale) = (self.config.isa, self.config.scale(&dims) as f32);
        let batch = if dims.packed { 1 } else { dims.batch };
        let (write, log_decay) = (AnyArray::F32(Heads::new(x.write)), AnyArray::F32(Heads::new(x.log_decay)));
        let arrays = Arrays::new(&x.qkv, dims.q_heads);
        // The second recurrence is checked before anything is written.
        let arrays = Arrays { k: write, decay: Gate::Channel(x.log_decay), ..arrays };
        let of = Dims { head_dim: slots, ..dims };
        let spec = Spec { scale: 1.0, ..self.config.spec(of, x.qkv.lengths, &arrays) }.checked()?;
        let mut scores = pass.rows((batch, dims.q_heads, dims.q_len, slots))?;
        let k = T::any(Heads::new(x.qkv.k));
        let first = slots::Slots { q: arrays.q, k, write, log_decay, dims, lengths: x.qkv.lengths, scale };
        let kept = state.as_deref_mut().map(|state| state.keys.as_mut_slice());
        slots::read(pass, isa, &first, kept, &mut scores);
        let arrays = Arrays { q: AnyArray::F32(Heads::new(scores.view())), ..arrays };
        let queries = |isa: Isa, at: &Place, to: &mut [f32], stride| {
            slots::weigh(isa, to, at.tokens.len(), slots, stride);
        };
        let source = Made { arrays, queries, keys: |_, _: &Place, _: Keys<'_>| {} };
        linear::run(pass, &spec, &source, state.map(|state| state.values.as_mut_slice()), out);
        Ok(())
    }

    fn define<R: Real>(&self, x: SlotQkv<'_, T>, state: Option<&SlotState>) -> Result<Defined<R, SlotState>> {
        let (dims, slots) = self.dims(&x, state)?;
        let mut state = state.map_or_else(|| self.empty(&x), |state| Ok(state.clone()))?;
        let scale = R::of(self.config.scale(&dims));
        let out = of_heads(&dims, &x.qkv.lengths, |head| {
            let at = ndarray::s![head.sequence, head.head, .., ..];
            let load = |state: &State| state.view().slice(at).map(|&x| R::of(f64::from(x)));
            let (mut keys, mut values) = (load(&state.keys), load(&state.values));
            let rows = |x| head.rows::<R, T>(x, &head.keys);
            let (q, k, v) = (rows(&x.qkv.q), rows(&x.qkv.k), rows(&x.qkv.v));
            let write: Array2<R> = head.rows(&x.write, &head.keys);
            let decay: Array2<R> = head.rows(&x.log_decay, &head.keys);
            let mut out = Array2::from_elem((q.dim().0, v.dim().1), R::of(0.0));
            slots::define(&mut keys, [&k, &write, &decay], |t, keys| {
                for ((m, c), x) in values.indexed_iter_mut() {
                    *x = (*x * slots::left(decay[[t, m]])).term(write[[t, m]], v[[t, c]]).summed(1);
                }
                let read = |m| R::dot(q.row(t).iter().copied().zip(keys.column(m).iter().copied()));
                let weights = softmax(&(0..slots).map(|m| scale * read(m)).collect::<Vec<_>>());
                for (c, out) in out.row_mut(t).iter_mut().enumerate() {
                    *out = R::dot(weights.iter().copied().zip(values.column(c).iter().copied()));
                }
            });
            let store = |state: &mut State, x: &Array2<R>| {
                state.view_mut().slice_mut(at).assign(&x.map(|x| x.value() as f32));
            };
            store(&mut state.keys, &keys);
            store(&mut state.values, &values);
            out
        });
        Ok((out, state))
    }
}

composite!(GatedSlotAttention, SlotQkv, state SlotState);

exhibit! {
    GatedSlotExhibit of GatedSlotAttention, "linear", "GSA", "arXiv 2409.07146";
    "softmax attention to a few slots, which tokens are written into and which forget";
    not "where sharp weights of slots are not needed: gated linear attention makes one pass";
    tokens true, forms form, variants 2;
    build(_, field) {
        let builder = GatedSlotAttention::builder();
        if field.variant == 0 { builder } else { builder.scale(1.5) }
    }
    extras(x, field) {
        Extras { channels: field.channel_decays(x), rates: field.channels(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> SlotQkv<'a, T> {
        SlotQkv::new(x, extras.rates.view(), extras.channels.view())
    }
}
carded!(GatedSlotAttention, GatedSlotExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::Dense;
    use crate::input::Qkv;
    use crate::linear::Form;
    use crate::testing::{GATES, array, within};
    use crate::{Attention, Bounded, Recurrent};
    use ndarray::{Array4, s};

    #[test]
    fn definition_is_the_sums_over_all_tokens_and_kernels_keep_to_it() {
        let (q, k, v) = (array([1, 4, 70, 8], 1), array([1, 2, 70, 8], 2), array([1, 2, 70, 5], 3));
        for (gates, slots) in GATES.into_iter().zip([19, 3, 64, 1]) {
            let (w, g) = (array([1, 4, 70, slots], 4), gates.channels([1, 4, 70, slots], 5));
            let x = SlotQkv::new(Qkv::new(q.view(), k.view(), v.view()), w.view(), g.view());
            let attention = GatedSlotAttention::builder().scale(0.7).build().unwrap();
            let got = attention.reference(x).unwrap();
            let weight = |h: usize, i: usize, j: usize, m: usize| {
                let sum: f64 = (j + 1..=i).map(|t| f64::from(g[[0, h, t, m]])).sum();
                sum.exp() * f64::from(w[[0, h, j, m]])
            };
            for (h, i) in [(0, 0), (1, 7), (3, 42), (2, 69)] {
                let dot = |j: usize| -> f64 {
                    (0..8).map(|c| f64::from(q[[0, h, i, c]]) * f64::from(k[[0, h / 2, j, c]])).sum()
                };
                let read: Vec<f64> = (0..slots)
                    .map(|m| {
                        (0.7f32 as f64 * (0..=i).map(|j| weight(h, i, j, m) * dot(j)).sum::<f64>()).exp()
                    })
                    .collect();
                let total: f64 = read.iter().sum();
                for c in 0..5 {
                    let value = |m: usize| -> f64 {
                        (0..=i).map(|j| weight(h, i, j, m) * f64::from(v[[0, h / 2, j, c]])).sum()
                    };
                    let want = (0..slots).map(|m| read[m] / total * value(m)).sum::<f64>();
                    let got = got[[0, h, i, c]];
                    assert!(
                        (got - want).abs() < 1e-9 * want.abs().max(1.0),
                        "{gates:?} {i}: {got}, not {want}"
                    );
                }
            }
            for form in [Form::Chunked, Form::Recurrent] {
                let kernel = GatedSlotAttention::builder().scale(0.7).form(form).build().unwrap();
                within("gsa", &kernel.forward(x).unwrap(), &got, &kernel.error_bound(x).unwrap());
            }
        }
    }

    #[test]
    fn a_slot_for_each_token_is_softmax_attention() {
        let (q, k, v) = (array([1, 2, 40, 16], 1), array([1, 2, 40, 16], 2), array([1, 2, 40, 8], 3));
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let write = Array4::from_shape_fn((1, 1, 40, 40), |(_, _, t, m)| if t == m { 1.0 } else { 0.0 });
        let none = Array4::zeros((1, 1, 40, 40));
        let attention = GatedSlotAttention::builder().build().unwrap();
        let out = attention.forward(SlotQkv::new(qkv.reborrow(), write.view(), none.view())).unwrap();
        // The last token sees all slots full.
        let dense = Dense::builder().build().unwrap().reference(qkv.reborrow()).unwrap();
        for h in 0..2 {
            for c in 0..8 {
                let (got, want) = (f64::from(out[[0, h, 39, c]]), dense[[0, h, 39, c]]);
                assert!((got - want).abs() < 1e-6, "{got}, not {want}");
            }
        }
    }

    #[test]
    fn refusals_and_nothing() {
        let x = array([1, 2, 6, 8], 1);
        let (gates, short, growth) =
            (Array4::zeros((1, 2, 6, 3)), Array4::zeros((1, 2, 6, 4)), Array4::from_elem((1, 1, 6, 3), 0.25));
        let qkv = || Qkv::new(x.view(), x.view(), x.view());
        let attention = GatedSlotAttention::builder().build().unwrap();
        let error = |x| attention.forward(x).unwrap_err().to_string();
        assert_eq!(
            error(SlotQkv::new(qkv(), gates.view(), short.view())),
            "log_decay: expected shape [batch, heads, len, slots] = [1, 2 or a divisor, 6, 3], got [1, 2, 6, 4]"
        );
        assert_eq!(
            error(SlotQkv::new(qkv(), gates.view(), growth.view())),
            "log_decay: expected log decays of at most 0; allow_growth() permits others, got 0.25"
        );
        let fine = SlotQkv::new(qkv(), gates.view(), gates.view());
        let zeros = |slots, dim| State::new(Array4::zeros((1, 2, slots, dim))).unwrap();
        let error = SlotState::new(zeros(8, 3), zeros(4, 8)).unwrap_err().to_string();
        assert_eq!(
            error,
            "values: expected shape [sequences, heads, slots, _] = [1, 2, 3, _], got [1, 2, 4, 8]"
        );
        let mut state = SlotState::new(zeros(7, 3), zeros(3, 8)).unwrap();
        let error = attention.prefill(fine, &mut state).unwrap_err().to_string();
        assert_eq!(
            error,
            "state: expected shape [sequences, heads, state_dim, columns] = [1, 2, 8, 3], got [1, 2, 7, 3]"
        );
        // Without slots there is nothing to read.
        let none = gates.slice(s![.., .., .., ..0]);
        let out = attention.forward(SlotQkv::new(qkv(), none, none)).unwrap();
        assert!(out.iter().all(|&x| x == 0.0));
    }
}
