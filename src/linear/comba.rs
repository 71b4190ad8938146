//! Comba: a delta rule that is corrected by what another key finds in the
//! state before this decays (closed-loop control).

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::{Token, Update, number, row};
use crate::element::Element;
use crate::engine::recur::{Arrays, Gate, Keys, Made, Place, Source, copy_tokens};
use crate::error::Result;
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::tokens::all_heads;
use crate::simd::Isa;
use crate::simd::mem::Heads;
use crate::stages::delta_rule::{DeltaRule, normalize, unit};
use crate::stages::options::{FINITE, options};
use crate::stages::recur::{Config, Recurrence, check_heads, recurrent};
use crate::stages::removal;

input! {
    /// Queries, keys and values with keys that predict, log decays and weights
    /// of corrections: what [`Comba`] takes.
    CombaQkv(qkv) {
        /// Keys that predict what a value is to be.
        p: T [batch, heads/, len, head_dim],
        /// Natural logarithms of what a token leaves of the state: at most 0,
        /// `-inf` to forget everything.
        log_decay: f32 [batch, heads/, len],
        /// How much of the difference between its value and the prediction a
        /// token writes: from 0 to 1.
        beta: f32 [batch, heads/, len],
    }
}

/// Comba: a delta rule that is corrected by what another key finds in the
/// state before this decays (closed-loop control).
///
/// ```text
/// S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T
/// o_t = scale * (q_t - d p_t)^T S_t
/// ```
///
/// "Comba: Improving Bilinear RNNs with Closed-loop Control" (arXiv
/// 2506.02475). `p_t` is the key that predicts: the paper's layer takes
/// `sigmoid(b) k_t` with a learned `b` for each head. `d` is a learned number
/// for each head, the [`correction`](CombaBuilder::correction) of outputs. `g_t`
/// and `beta_t` are one number a token and head, computed as those of
/// [`GatedDeltaNet`](crate::linear::GatedDeltaNet), which it is for `p_t =
/// exp(g_t) k_t`: the prediction is from the state before its decay. (One of the
/// listings of flash-linear-attention, the naive recurrence, decays first; its
/// kernels do not.) Values may have more heads than queries and keys.
///
/// [`normalize_qk`](CombaBuilder::normalize_qk) divides queries, corrected
/// ones, and keys by their norms. Keys that predict stay as they are: give
/// `sigmoid(b)` times keys of unit length. The kernels of
/// flash-linear-attention divide these too, whereby `sigmoid(b)` vanishes:
/// [`normalize_p`](CombaBuilder::normalize_p) does so.
///
/// Cost: `32 (5 head_dim + 4 value_dim) + 8 head_dim value_dim` flops a token
/// and head.
///
/// ```
/// use attention_kernels::math::delta_gates::{beta, log_decay};
/// use attention_kernels::{Attention, Qkv, linear::{Comba, CombaQkv}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let p = x.mapv(|x| 0.5 * x / 32f32.sqrt());
/// let raw = Array3::<f32>::zeros((1, 2, 100)); // what a projection gives
/// let (log_decay, beta) = (raw.mapv(|x| log_decay(x, -3.0, 0.0)), raw.mapv(|x| beta(x, false)));
///
/// let comba = Comba::builder().normalize_qk().correction(&[1.0, 0.02]).build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = comba.forward(CombaQkv::new(qkv, p.view(), log_decay.view(), beta.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Comba {
    rule: DeltaRule,
    normalize_p: bool,
    /// One a head, or none.
    correction: Vec<f32>,
}

impl Comba {
    /// Queries and keys as they are.
    pub fn builder() -> CombaBuilder {
        CombaBuilder::with()
    }
}

options! {
    /// Builds a [`Comba`].
    CombaBuilder of Comba, form growth scale "1 / sqrt(head_dim)";
    own { correction: Vec<f32> = Vec::new(), in FINITE; }
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
        /// Divides each key that predicts by its norm, after outputs have been
        /// corrected by it.
        normalize_p;
    }
    build(this, config) {
        let rule = DeltaRule { config, normalize: this.normalize_qk };
        Ok(Comba { rule, normalize_p: this.normalize_p, correction: this.correction })
    }
}

impl CombaBuilder {
    /// `d`, one a head: how much of the key that predicts is taken from each
    /// query, before its norm. Default: nothing.
    pub fn correction(mut self, d: &[f32]) -> Self {
        self.correction = d.to_vec();
        self
    }
}

impl Recurrence for Comba {
    type Operands<'a, T: Element> = CombaQkv<'a, T>;

    fn config(&self) -> &Config {
        &self.rule.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a CombaQkv<'_, T>) -> Arrays<'a> {
        let arrays = Arrays::new(&x.qkv.reborrow(), all_heads(x));
        let low_rank = Some((T::any(Heads::new(x.p.reborrow())), arrays.k.without_columns()));
        Arrays { decay: Gate::Token(x.log_decay.reborrow()), low_rank, ..arrays }
    }

    fn check<T: Element>(&self, x: &CombaQkv<'_, T>, dims: &Dims) -> Result<()> {
        if !self.correction.is_empty() {
            check_heads("correction", self.correction.len(), dims)?;
        }
        self.rule.config.check_decays("log_decay", x.log_decay)
    }

    fn with_source<T: Element, R>(&self, x: &CombaQkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let (arrays, dim) = (self.arrays(x), x.qkv.q.dim().3);
        let p = T::any(Heads::new(x.p.reborrow()));
        let queries = |isa: Isa, at: &Place, to: &mut [f32], stride| {
            if let Some(&d) = self.correction.get(at.head) {
                removal::less(isa, to, stride, arrays.rows(p, at), d);
            }
            self.rule.loaded(isa, to, at.tokens.len(), dim, stride);
        };
        let keys = |isa: Isa, at: &Place, to: Keys<'_>| {
            let len = at.tokens.len();
            self.rule.loaded(isa, to.k, len, dim, to.stride);
            if self.normalize_p {
                normalize(isa, to.a, len, dim, to.stride);
            }
            copy_tokens(&x.beta, arrays.heads, at, to.beta);
            removal::predict(isa, to, len);
        };
        run(&Made { arrays, queries, keys })
    }

    fn token<T: Element>(&self, x: &CombaQkv<'_, T>, at: &Place) -> Token {
        let arrays = self.arrays(x);
        let (mut token, mut p) = (Token::of(&arrays, at), row(&x.p, at, arrays.heads));
        if let Some(&d) = self.correction.get(at.head) {
            token.q.iter_mut().zip(&p).for_each(|(q, p)| *q -= f64::from(d) * p);
        }
        if self.rule.normalize {
            [&mut token.q, &mut token.k].into_iter().for_each(|x| unit(x));
        }
        if self.normalize_p {
            unit(&mut p);
        }
        let beta = number(&x.beta, at, arrays.heads);
        token.v.iter_mut().for_each(|v| *v *= beta);
        let a = p.into_iter().map(|p| -beta * p).collect();
        Token { update: Update::LowRank { a, b: token.k.clone() }, ..token }
    }
}
recurrent!(Comba, CombaQkv);

exhibit! {
    CombaExhibit of Comba, "linear", "Comba", "arXiv 2506.02475";
    "the delta rule with a prediction by a key of its own, and outputs corrected by it";
    not "where a key may predict its own value: use Gated DeltaNet";
    tokens true, forms form, variants 3;
    build(x, field) {
        let heads = x.q.dim().1;
        let each: Vec<f32> = (0..heads).map(|h| [1.0, 0.02, -0.5][h % 3]).collect();
        match field.variant {
            0 => Comba::builder().normalize_qk().normalize_p().correction(&each),
            1 => Comba::builder().normalize_qk().normalize_p().scale(0.3),
            _ => Comba::builder().normalize_qk().correction(&each),
        }
    }
    extras(x, field) {
        let dim = x.q.dim().3 as f32;
        Extras {
            // Near the keys, and shorter than these will be.
            keys: ndarray::Array4::from_shape_fn(x.q.dim(), |(_, h, t, c)| {
                T::from_f32(0.5 / dim.sqrt() * field.at(3, h, t, c))
            }),
            decays: field.token_decays(x),
            betas: field.tokens(2, x, share),
            ..Extras::default()
        }
    }
    input<'a, T>(x, extras) -> CombaQkv<'a, T> {
        CombaQkv::new(x, extras.keys.view(), extras.decays.view(), extras.betas.view())
    }
}
carded!(Comba, CombaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{DeltaNet, DeltaQkv, Form, GatedDeltaNet, GatedDeltaQkv, SimpleGla, TokenGated};
    use crate::testing::{Gates, array, unit, within};
    use crate::{Attention, Bounded};
    use ndarray::{Array3, Array4};

    #[test]
    fn is_the_delta_rules_that_it_contains() {
        let (q, k, v) = (array([1, 2, 90, 16], 1), unit(array([1, 2, 90, 16], 2)), array([1, 2, 90, 24], 3));
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let beta = array([1, 1, 2, 90], 4).mapv(share).into_shape_with_order((1, 2, 90)).unwrap();
        // Powers of two, of which keys keep their digits.
        let halved = |t: usize| (t * 7 % 3) as i32;
        let g = Array3::from_shape_fn((1, 2, 90), |(_, _, t)| -std::f32::consts::LN_2 * halved(t) as f32);
        let less = Array4::from_shape_fn(k.dim(), |at| k[at] * 0.5f32.powi(halved(at.2)));
        let (none, zero) = (Array3::zeros((1, 1, 90)), Array4::zeros((1, 1, 90, 16)));
        for form in [Form::Chunked, Form::Recurrent] {
            let comba = Comba::builder().form(form).build().unwrap();
            let of = |p: &Array4<f32>, g: &Array3<f32>| {
                comba.forward(CombaQkv::new(qkv.reborrow(), p.view(), g.view(), beta.view())).unwrap()
            };
            let x = DeltaQkv::new(qkv.reborrow(), beta.view());
            let delta = DeltaNet::builder().build().unwrap();
            within("delta", &of(&k, &none), &delta.reference(x).unwrap(), &delta.error_bound(x).unwrap());
            let x = GatedDeltaQkv::new(qkv.reborrow(), g.view(), beta.view());
            let gated = GatedDeltaNet::builder().build().unwrap();
            within("gated", &of(&less, &g), &gated.reference(x).unwrap(), &gated.error_bound(x).unwrap());
            // Without predictions values are weighed alone.
            let ones = Array3::ones((1, 1, 90));
            let x = TokenGated { qkv: qkv.reborrow(), log_decay: g.view() };
            let plain = SimpleGla::builder().build().unwrap();
            let out =
                comba.forward(CombaQkv::new(qkv.reborrow(), zero.view(), g.view(), ones.view())).unwrap();
            within("plain", &out, &plain.reference(x).unwrap(), &plain.error_bound(x).unwrap());
        }
    }

    #[test]
    fn predictions_are_from_the_state_before_its_decay() {
        // One channel: S_0 = v_0, and S_1 = e^g S_0 + (v_1 - p S_0).
        let one = |x: [f32; 2]| Array4::from_shape_fn((1, 1, 2, 1), |at| x[at.2]);
        let (k, v, p) = (one([1.0; 2]), one([8.0, 3.0]), one([0.0, 0.25]));
        let (g, beta) = (Array3::from_elem((1, 1, 2), -std::f32::consts::LN_2), Array3::ones((1, 1, 2)));
        let x = CombaQkv::new(Qkv::new(k.view(), k.view(), v.view()), p.view(), g.view(), beta.view());
        let out = |builder: CombaBuilder| builder.build().unwrap().reference(x).unwrap()[[0, 0, 1, 0]];
        assert!((out(Comba::builder()) - 5.0).abs() < 1e-6);
        // The query is 1 - 2 * 0.25.
        assert!((out(Comba::builder().correction(&[2.0])) - 2.5).abs() < 1e-6);
    }

    #[test]
    fn norms_of_predicting_keys_count_unless_they_are_divided_by() {
        let (x, g) = (array([1, 2, 70, 16], 1), Gates::Mild.channels([1, 1, 2, 70], 2));
        let (g, beta) = (g.into_shape_with_order((1, 2, 70)).unwrap(), Array3::from_elem((1, 1, 70), 0.5));
        let out = |builder: CombaBuilder, factor: f32| {
            let p = x.mapv(|x| factor * x);
            let qkv = Qkv::new(x.view(), x.view(), x.view());
            let comba = builder.normalize_qk().build().unwrap();
            comba.forward(CombaQkv::new(qkv.reborrow(), p.view(), g.view(), beta.view())).unwrap()
        };
        let near = |a: &Array4<f32>, b: &Array4<f32>| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        let normed = |factor| out(Comba::builder().normalize_p(), factor);
        assert!(near(&normed(1.0), &normed(0.5)));
        assert!(!near(&out(Comba::builder(), 0.2), &out(Comba::builder(), 0.1)));
    }

    #[test]
    fn refusals() {
        let (x, g) = (array([1, 2, 6, 8], 1), Array3::zeros((1, 2, 6)));
        let narrow = array([1, 2, 6, 7], 1);
        let qkv = Qkv::new(x.view(), x.view(), x.view());
        let error = |builder: CombaBuilder, x| builder.build().unwrap().forward(x).unwrap_err().to_string();
        let fine = CombaQkv::new(qkv.reborrow(), x.view(), g.view(), g.view());
        assert_eq!(
            error(Comba::builder().correction(&[0.5; 3]), fine),
            "correction: expected one for each of the 2 heads, got 3"
        );
        assert_eq!(
            error(Comba::builder(), CombaQkv { p: narrow.view(), ..fine }),
            "p: expected shape [batch, heads, len, head_dim] = [1, 2 or a divisor, 6, 8], got [1, 2, 6, 7]"
        );
        let error = Comba::builder().correction(&[f32::NAN]).build().unwrap_err();
        assert_eq!(error.to_string(), "correction: expected finite numbers, got NaN");
    }
}
