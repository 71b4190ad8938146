//! HGRN2: gated linear attention whose key is what the gate forgets.

use ndarray::{Array2, ArrayView2};

use crate::card::{Extras, carded, exhibit};
use crate::definition::recurrence::{Token, row};
use crate::definition::recurrence_backward::Found;
use crate::element::Element;
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{
    Arrays, Back, Forget, ForgetBack, Gate, Keys, Made, Place, Source, Undone, as_loaded,
};
use crate::error::Result;
use crate::input::declare::input;
use crate::input::{Dims, Qkv};
use crate::math::gates::exact;
use crate::simd::Isa;
use crate::stages::differentiate::{Differentiable, Hgrn2Gradients, backward_pass};
use crate::stages::options::{Range, check, options};
use crate::stages::recur::{Config, Recurrence, check_channels, recurrent};

input! {
    /// Queries, logits of gates, and values.
    ///
    /// The number of heads is the largest of the three; the others' numbers
    /// divide it, and neighbouring heads share what there is less of.
    Hgrn2Input {
        /// Queries.
        q: T [batch, heads/, len, head_dim],
        /// What sigmoids make forget gates of: inf keeps everything, `-inf` as
        /// little as the lower bound permits.
        forget: f32 [batch, heads/, len, head_dim],
        /// Values.
        v: T [batch, heads/, len, value_dim]
    }
    head_dim head_dim, value_dim value_dim;
}

/// HGRN2: gated linear attention whose key is what the gate forgets.
///
/// ```text
/// f_t = bound + (1 - bound) sigmoid(x_t)
/// S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T
/// o_t = scale * q_t^T S_t
/// ```
///
/// "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904). A
/// channel writes as much as it forgets, so that a state is an average of
/// values and needs no normaliser. Lower bounds of later layers are larger, so
/// that they forget less. Activations of queries, the norm of each head's
/// output and the gate after it are the caller's.
///
/// Gates and keys are computed chunk by chunk in the kernel, as `(1 - bound)
/// sigmoid(-x)`, which keeps its precision where a channel forgets little. In the
/// gradient of a logit that of its key and that of its log decay meet; lower
/// bounds have none.
///
/// Cost: as [`Gla`](super::Gla), with one exponential and one logarithm a
/// channel more and one array less to read. Not for keys of their own: that is
/// [`Gla`](super::Gla).
///
/// ```
/// use attention_kernels::{Attention, linear::{Hgrn2, Hgrn2Input}};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, head_dim
/// let hgrn = Hgrn2::builder().lower_bound(0.5).build()?;
/// let out = hgrn.forward(Hgrn2Input::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Hgrn2 {
    config: Config,
    bounds: Bounds,
}

/// How little a channel may keep.
#[derive(Clone, Debug)]
enum Bounds {
    All(f32),
    /// `[heads, head_dim]`
    Each(Array2<f32>),
}

impl Hgrn2 {
    /// A lower bound of 0, as the first layer has it.
    pub fn builder() -> Hgrn2Builder {
        Hgrn2Builder::with()
    }
}

const BOUND: Range = Range::new(["a number of at least 0 and below 1"; 2], |x| (0.0..1.0).contains(&x));

options! {
    /// Builds a [`Hgrn2`].
    Hgrn2Builder of Hgrn2, form scale "1 / sqrt(head_dim)";
    own { bounds: Bounds = Bounds::All(0.0); }
    build(this, config) {
        match &this.bounds {
            Bounds::All(bound) => check("lower bound", bound, &BOUND)?,
            Bounds::Each(bounds) => check("lower bound", bounds, &BOUND)?,
        }
        Ok(Hgrn2 { config, bounds: this.bounds })
    }
}

impl Hgrn2Builder {
    /// How much of the state every channel keeps at least, from 0 and below 1.
    pub fn lower_bound(mut self, bound: f32) -> Self {
        self.bounds = Bounds::All(bound);
        self
    }

    /// How much of the state each channel keeps at least, `[heads, head_dim]`,
    /// from 0 and below 1.
    pub fn lower_bounds(mut self, bounds: ArrayView2<'_, f32>) -> Self {
        self.bounds = Bounds::Each(bounds.as_standard_layout().into_owned());
        self
    }
}

impl Bounds {
    /// Those of a head: one for each channel, or one for all.
    fn of(&self, head: usize) -> &[f32] {
        match self {
            Self::All(bound) => std::slice::from_ref(bound),
            Self::Each(bounds) => {
                let dim = bounds.dim().1;
                &bounds.as_slice().unwrap_or_default()[head * dim..][..dim]
            }
        }
    }
}

impl Recurrence for Hgrn2 {
    type Operands<'a, T: Element> = Hgrn2Input<'a, T>;

    fn config(&self) -> &Config {
        &self.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a Hgrn2Input<'_, T>) -> Arrays<'a> {
        // Keys are yet to be made of the logits, which are the decays here.
        let qkv = Qkv::new(x.q.reborrow(), x.q.reborrow(), x.v.reborrow());
        let heads = x.q.dim().1.max(x.forget.dim().1).max(x.v.dim().1);
        let arrays = Arrays::new(&qkv, heads);
        Arrays { k: arrays.k.without_columns(), decay: Gate::Channel(x.forget.reborrow()), ..arrays }
    }

    fn check<T: Element>(&self, _: &Hgrn2Input<'_, T>, dims: &Dims) -> Result<()> {
        match &self.bounds {
            Bounds::All(_) => Ok(()),
            Bounds::Each(bounds) => check_channels("lower bounds", bounds.dim(), dims),
        }
    }

    fn with_source<T: Element, R>(&self, x: &Hgrn2Input<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let (dim, arrays) = (x.q.dim().3, self.arrays(x));
        let keys = |isa: Isa, at: &Place, Keys { k, decay, stride, .. }: Keys<'_>| {
            let (len, bound) = (at.tokens.len(), self.bounds.of(at.head));
            isa.dispatch(Forget { k, decay, stride, len, dim, bound });
        };
        let back = |isa: Isa, at: &Place, of: Back<'_>| {
            let Back { k, d_k, d_decay, scratch, stride, .. } = of;
            arrays.gates(isa, at, scratch, stride);
            let (len, bound) = (at.tokens.len(), self.bounds.of(at.head));
            isa.dispatch(ForgetBack { logits: scratch, k, d_k, d_decay, stride, len, dim, bound });
        };
        run(&Undone { made: Made { arrays, queries: as_loaded, keys }, back })
    }

    fn token<T: Element>(&self, x: &Hgrn2Input<'_, T>, at: &Place) -> Token {
        let arrays = self.arrays(x);
        let bounds = self.bounds.of(at.head);
        let gates = row(&x.forget, at, arrays.heads).into_iter().enumerate();
        let gates = gates.map(|(c, logit)| (f64::from(bounds[c % bounds.len()]), logit));
        Token {
            // 1 - f
            k: gates.clone().map(|(bound, logit)| (1.0 - bound) * exact::sigmoid(-logit)).collect(),
            decay: gates.map(|(bound, logit)| bound + (1.0 - bound) * exact::sigmoid(logit)).collect(),
            ..Token::of(&arrays, at)
        }
    }
}
recurrent!(Hgrn2, Hgrn2Input);

impl Differentiable for Hgrn2 {
    type Gradients<A> = Hgrn2Gradients<A>;

    fn sizes(&self, of_arrays: Gradients<Dim>) -> Gradients<Dim> {
        Gradients { k: None, ..of_arrays }
    }

    fn token_back<T: Element>(&self, x: &Hgrn2Input<'_, T>, at: &Place, found: &mut Found) {
        let bounds = self.bounds.of(at.head);
        let logits = row(&x.forget, at, self.arrays(x).heads);
        for (c, (d, logit)) in found.decay.iter_mut().zip(logits).enumerate() {
            let bound = f64::from(bounds[c % bounds.len()]);
            let (share, rest) = (exact::sigmoid(logit), exact::sigmoid(-logit));
            // Of f by x; where nothing is left its logarithm has no gradient.
            let slope = (1.0 - bound) * share * rest;
            let kept = bound + (1.0 - bound) * share;
            *d = if kept > 0.0 { slope / kept * *d } else { 0.0 } - slope * found.k[c];
        }
    }
}
backward_pass!(Hgrn2, Hgrn2Input, Hgrn2Gradients);

/// Logits of everyday size, and some where sigmoids end.
fn logit(x: f32) -> f32 {
    match x {
        0.98.. => f32::INFINITY,
        0.96.. => 100.0,
        ..-0.98 => f32::NEG_INFINITY,
        ..-0.96 => -95.0,
        _ => 3.0 * x,
    }
}

exhibit! {
    Hgrn2Exhibit of Hgrn2, "linear", "HGRN2", "arXiv 2404.07904";
    "what is not forgotten of a channel is not written to either";
    not "where writing must not be tied to forgetting";
    tokens true, forms form, variants 3;
    build(x, field) {
        match field.variant {
            0 => Hgrn2::builder().lower_bound(0.5),
            1 => Hgrn2::builder(),
            _ => Hgrn2::builder().lower_bounds(field.heads(2, x).mapv(|x| 0.99 * x.abs()).view()),
        }
    }
    extras(x, field) {
        Extras { channels: field.channels(1, x, logit), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> Hgrn2Input<'a, T> {
        Hgrn2Input { lengths: x.lengths, ..Hgrn2Input::new(x.q, extras.channels.view(), x.v) }
    }
}
carded!(Hgrn2, Hgrn2Exhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::{ChannelGated, Gla};
    use crate::testing::{agree, array, pairs, within};
    use crate::{Attention, Bounded, Recurrent};
    use ndarray::Array4;

    fn bounds(heads: usize, dim: usize) -> Array2<f32> {
        let mut bounds = array([1, 1, heads, dim], 6).into_shape_with_order((heads, dim)).unwrap();
        bounds.mapv_inplace(|x| 0.999 * x.abs());
        bounds[[0, 0]] = 0.0;
        bounds
    }

    fn kinds(heads: usize, dim: usize) -> [Hgrn2Builder; 3] {
        let each = bounds(heads, dim);
        [Hgrn2::builder(), Hgrn2::builder().lower_bound(0.9), Hgrn2::builder().lower_bounds(each.view())]
    }

    /// `ln f`, as released code has it.
    fn log_gate(x: f32, bound: f32) -> f64 {
        let (x, bound) = (f64::from(x), f64::from(bound));
        exact::log_add_exp(bound.ln(), (1.0 - bound).ln() + exact::log_sigmoid(x))
    }

    #[test]
    fn is_its_form_with_all_pairs() {
        let (q, v) = (array([1, 2, 70, 8], 1), array([1, 2, 70, 5], 3));
        let (x, lower) = (array([1, 2, 70, 8], 2).mapv(|x| 6.0 * x), bounds(2, 8));
        let hgrn = Hgrn2::builder().lower_bounds(lower.view()).scale(0.5).build().unwrap();
        let got = hgrn.reference(Hgrn2Input::new(q.view(), x.view(), v.view())).unwrap();
        let g = Array4::from_shape_fn(x.dim(), |at| log_gate(x[at], lower[[at.1, at.3]]));
        let want = pairs(&v, |b, h, i, j| {
            let channel = |c: usize| {
                let sum: f64 = (j + 1..=i).map(|t| g[[b, h, t, c]]).sum();
                f64::from(q[[b, h, i, c]]) * -g[[b, h, j, c]].exp_m1() * sum.exp()
            };
            0.5 * (0..8).map(channel).sum::<f64>()
        });
        agree(&got, &want);
    }

    #[test]
    fn is_gated_linear_attention_with_such_keys() {
        let (q, v) = (array([1, 2, 150, 16], 1), array([1, 2, 150, 24], 3));
        let x = array([1, 2, 150, 16], 2).mapv(|x| 6.0 * x);
        for bound in [0.0, 0.5] {
            let g = x.mapv(|x| log_gate(x, bound) as f32);
            let k = x.mapv(|x| -log_gate(x, bound).exp_m1() as f32);
            let qkv = Qkv::new(q.view(), k.view(), v.view());
            let gla = Gla::builder().build().unwrap();
            let same = ChannelGated { qkv, log_decay: g.view() };
            let hgrn = Hgrn2::builder().lower_bound(bound).build().unwrap();
            let out = hgrn.forward(Hgrn2Input::new(q.view(), x.view(), v.view())).unwrap();
            within("gla", &out, &gla.reference(same).unwrap(), &gla.error_bound(same).unwrap());
        }
    }

    #[test]
    fn open_gates_freeze_the_state() {
        let x = array([1, 2, 100, 16], 1);
        let input = |forget| Hgrn2Input::new(x.view(), forget, x.view());
        let open = Array4::from_elem((1, 2, 100, 16), f32::INFINITY);
        for hgrn in kinds(2, 16) {
            let hgrn = hgrn.build().unwrap();
            let mut state = hgrn.initial_state(input(x.view())).unwrap();
            hgrn.prefill(input(x.view()), &mut state).unwrap();
            let before = state.clone();
            hgrn.prefill(input(open.view()), &mut state).unwrap();
            assert_eq!(state, before);
        }
    }

    #[test]
    fn refusals() {
        for bound in [-0.1, 1.0, f32::NAN] {
            let error = Hgrn2::builder().lower_bound(bound).build().unwrap_err();
            let want = format!("lower bound: expected a number of at least 0 and below 1, got {bound}");
            assert_eq!(error.to_string(), want);
        }
        let x = array([1, 2, 6, 8], 1);
        let hgrn = Hgrn2::builder().lower_bounds(bounds(3, 8).view()).build().unwrap();
        let error = hgrn.forward(Hgrn2Input::new(x.view(), x.view(), x.view())).unwrap_err();
        assert_eq!(error.to_string(), "lower bounds: expected shape [heads, head_dim] = [2, 8], got [3, 8]");
        let forget = array([1, 2, 6, 7], 1);
        let hgrn = Hgrn2::builder().build().unwrap();
        let error = hgrn.forward(Hgrn2Input::new(x.view(), forget.view(), x.view())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "forget: expected shape [batch, heads, len, head_dim] = [1, 2 or a divisor, 6, 8], got [1, 2, 6, 7]"
        );
    }
}
