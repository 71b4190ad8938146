//! Kimi Delta Attention: the delta rule on a state whose channels forget at
//! rates of their own.

use ndarray::{Array2, ArrayView2};

use crate::card::{Extras, carded, exhibit, share};
use crate::definition::recurrence::{Token, row};
use crate::definition::recurrence_backward::Found;
use crate::element::Element;
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Arrays, Back, Gate, Keys, Made, Place, Source, Undone};
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::input::declare::input;
use crate::input::tokens::all_heads;
use crate::simd::Isa;
use crate::stages::bounded_gate::BoundedGate;
use crate::stages::delta_rule::DeltaRule;
use crate::stages::differentiate::{Differentiable, KdaGradients, backward_pass};
use crate::stages::options::{FINITE, Range, options};
use crate::stages::recur::{Config, Recurrence, recurrent};

input! {
    /// Queries, keys and values with log decays of channels and the weight of the
    /// correction: what [`Kda`] takes.
    KdaQkv(qkv) {
        /// Natural logarithms of what a token leaves of each channel of the
        /// state: at most 0, `-inf` to forget everything.
        log_decay: f32 [batch, heads/, len, head_dim],
        /// How much of what is stored under its key a token replaces: from 0
        /// to 1, or to 2 where models let it turn around what is stored.
        beta: f32 [batch, heads/, len],
    }
}

/// Kimi Delta Attention: the delta rule on a state whose channels forget at
/// rates of their own.
///
/// ```text
/// S'_t = diag(exp g_t) S_{t-1}
/// S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T
/// o_t  = scale * q_t^T S_t
/// ```
///
/// "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv
/// 2510.26692). `g_t` is one log decay a token and channel of the keys, of at
/// most 0: models compute it as
/// [`log_decay`](crate::math::delta_gates::log_decay) or
/// [`bounded_log_decay`](crate::math::delta_gates::bounded_log_decay). Where
/// all channels have the same it is
/// [`GatedDeltaNet`](crate::linear::GatedDeltaNet), which is faster.
///
/// With [`bounded_gate`](KdaBuilder::bounded_gate) the kernel computes the
/// latter, `g_t = bound sigmoid(exp(a_log) (raw_t + bias))`, of raw numbers
/// in the place of the log decays. `g_t` is then never below the bound, for which
/// the kernel has a fast path. Gradients are then those of raw numbers, of `a_log` and
/// of the bias.
///
/// Cost: as [`DeltaNet`](crate::linear::DeltaNet) by multiply-adds, and for the
/// decays as [`Gla`](crate::linear::Gla).
///
/// ```
/// use attention_kernels::math::delta_gates::bounded_log_decay;
/// use attention_kernels::{Attention, Qkv, linear::{Kda, KdaQkv}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let log_decay = x.mapv(|raw| bounded_log_decay(raw, 0.0, 0.0, -5.0));
/// let beta = Array3::from_elem((1, 2, 100), 0.5);
///
/// let kda = Kda::builder().normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = kda.forward(KdaQkv { qkv, log_decay: log_decay.view(), beta: beta.view() })?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Kda {
    rule: DeltaRule,
    gate: Option<BoundedGate>,
}

impl Kda {
    /// Queries and keys as they are.
    pub fn builder() -> KdaBuilder {
        KdaBuilder::with()
    }
}

const BOUND: Range = Range::new(["a finite number of at most 0"; 2], |x| x.is_finite() && x <= 0.0);
const RATES: Range = Range::new(["numbers from -80 to 40"; 2], |x| (-80.0..=40.0).contains(&x));

options! {
    /// Builds a [`Kda`].
    KdaBuilder of Kda, form growth scale "1 / sqrt(head_dim)";
    own {
        bound: Option<f32> = None, in BOUND;
        a_log: Option<Vec<f32>> = None, in RATES;
        bias: Option<Array2<f32>> = None, in FINITE;
    }
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
    }
    build(this, config) {
        let Self { bound, a_log, bias, .. } = this;
        if bound.is_none() && (a_log.is_some() || bias.is_some()) {
            let option = if a_log.is_some() { "a_log" } else { "dt_bias" };
            let reason = "they come as they are unless bounded_gate() is asked for";
            return Err(Error::Conflict { option, with: "log decays", reason });
        }
        let gate = bound.map(|bound| BoundedGate { bound, a_log, bias });
        Ok(Kda { rule: DeltaRule { config, normalize: this.normalize_qk }, gate })
    }
}

impl KdaBuilder {
    /// Makes log decays of what comes in their place: `bound sigmoid(exp(a_log)
    /// (raw + bias))`, from the bound, which is at most 0 (-5 in the published
    /// code), to 0.
    pub fn bounded_gate(mut self, bound: f32) -> Self {
        self.bound = Some(bound);
        self
    }

    /// `a_log` of the bounded gate, one a head, from -80 to 40. Default: 0.
    pub fn a_log(mut self, a_log: &[f32]) -> Self {
        self.a_log = Some(a_log.to_vec());
        self
    }

    /// What is added to raw numbers of the bounded gate, `[heads, head_dim]`.
    /// Default: 0.
    pub fn dt_bias(mut self, bias: ArrayView2<'_, f32>) -> Self {
        self.bias = Some(bias.as_standard_layout().into_owned());
        self
    }
}

impl Recurrence for Kda {
    type Operands<'a, T: Element> = KdaQkv<'a, T>;

    fn config(&self) -> &Config {
        &self.rule.config
    }

    fn arrays<'a, T: Element>(&'a self, x: &'a KdaQkv<'_, T>) -> Arrays<'a> {
        Arrays {
            decay: Gate::Channel(x.log_decay.reborrow()),
            beta: Some(x.beta.reborrow()),
            ..Arrays::new(&x.qkv.reborrow(), all_heads(x))
        }
    }

    fn check<T: Element>(&self, x: &KdaQkv<'_, T>, dims: &Dims) -> Result<()> {
        match &self.gate {
            Some(gate) => gate.check(dims),
            None => self.rule.config.check_decays("log_decay", x.log_decay),
        }
    }

    fn with_source<T: Element, R>(&self, x: &KdaQkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let (arrays, dim) = (self.arrays(x), x.qkv.q.dim().3);
        let Some(gate) = &self.gate else { return self.rule.with_source(arrays, run) };
        let queries = |isa: Isa, at: &Place, to: &mut [f32], stride| {
            self.rule.loaded(isa, to, at.tokens.len(), dim, stride);
        };
        let keys = |isa: Isa, at: &Place, to: Keys<'_>| {
            self.rule.loaded(isa, to.k, at.tokens.len(), dim, to.stride);
            gate.loaded(isa, at, to, dim);
        };
        let back = |isa: Isa, at: &Place, mut of: Back<'_>| {
            self.rule.loaded_back(isa, &arrays, at, &mut of);
            arrays.gates(isa, at, of.scratch, of.stride);
            gate.loaded_back(isa, at, of, dim);
        };
        run(&Undone { made: Made { arrays, queries, keys }, back })
    }

    fn token<T: Element>(&self, x: &KdaQkv<'_, T>, at: &Place) -> Token {
        let arrays = self.arrays(x);
        let mut token = self.rule.token(&arrays, at);
        if let Some(gate) = &self.gate {
            token.decay = gate.decays(at.head, row(&x.log_decay, at, arrays.heads));
        }
        token
    }
}
recurrent!(Kda, KdaQkv);

impl Differentiable for Kda {
    type Gradients<A> = KdaGradients<A>;

    fn sizes(&self, of_arrays: Gradients<Dim>) -> Gradients<Dim> {
        let (heads, dim) = (of_arrays.state.1, of_arrays.q.3);
        let [rates, biases] = self.gate.as_ref().map_or([0; 2], |gate| gate.parameters(dim));
        Gradients { rate: Some((1, heads, 1, rates)), bias: Some((1, heads, 1, biases)), ..of_arrays }
    }

    fn token_back<T: Element>(&self, x: &KdaQkv<'_, T>, at: &Place, found: &mut Found) {
        self.rule.token_back(&x.qkv, at, all_heads(x), found);
        if let Some(gate) = &self.gate {
            gate.token_back(at.head, row(&x.log_decay, at, all_heads(x)), found);
        }
    }
}
backward_pass!(Kda, KdaQkv, KdaGradients);

exhibit! {
    KdaExhibit of Kda, "linear", "KDA", "arXiv 2510.26692";
    "the same, channel by channel";
    not "where one rate a token will do: Gated DeltaNet is faster";
    tokens true, forms form, variants 3;
    build(x, field) {
        let heads = x.q.dim().1.max(x.v.dim().1);
        let a_log: Vec<f32> = (0..heads).map(|h| [0.0, 1.0, -0.5][h % 3]).collect();
        let bias = Array2::from_shape_fn((heads, x.q.dim().3), |(h, c)| field.at(3, h, 0, c));
        let builder = Kda::builder().normalize_qk();
        // Keys of other lengths could let the state grow.
        match field.variant {
            0 => builder,
            1 => builder.scale(0.3),
            _ => builder.bounded_gate(-5.0).a_log(&a_log).dt_bias(bias.view()),
        }
    }
    extras(x, field) {
        Extras { channels: field.channel_decays(x), betas: field.tokens(2, x, share), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> KdaQkv<'a, T> {
        KdaQkv { qkv: x, log_decay: extras.channels.view(), beta: extras.betas.view() }
    }
}
carded!(Kda, KdaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{Carried, Form};
    use crate::math::delta_gates::bounded_log_decay;
    use crate::math::gates::exact;
    use crate::testing::{array, unit, within};
    use crate::{Attention, Backward, Bounded, Workspace};
    use ndarray::{Array3, Array4};

    #[test]
    fn a_bounded_gate_is_kda_with_its_log_decays() {
        let (k, v) = (unit(array([1, 2, 90, 16], 1)), array([1, 2, 90, 24], 2));
        let mut raw = array([1, 2, 90, 16], 3).mapv(|x| 8.0 * x);
        // Nothing decays, and as much as may.
        raw.slice_mut(ndarray::s![.., .., 40..50, ..]).fill(f32::NEG_INFINITY);
        raw.slice_mut(ndarray::s![.., .., 60..75, 3]).fill(f32::INFINITY);
        let (bias, a_log) = (array([1, 1, 2, 16], 4).into_shape_with_order((2, 16)).unwrap(), [0.5f32, -1.0]);
        let beta = Array3::from_elem((1, 2, 90), 0.7);
        let decay = Array4::from_shape_fn(raw.dim(), |at| {
            bounded_log_decay(raw[at], a_log[at.1], bias[[at.1, at.3]], -5.0)
        });
        assert!(decay.iter().all(|&g| (-5.0..=0.0).contains(&g)));
        assert!(decay[[0, 0, 45, 2]] == 0.0 && decay[[0, 1, 70, 3]] == -5.0);
        let of = |g| KdaQkv::new(Qkv::new(k.view(), k.view(), v.view()), g, beta.view());
        let kda = Kda::builder().build().unwrap();
        let (want, bound) =
            (kda.reference(of(decay.view())).unwrap(), 2.0 * kda.error_bound(of(decay.view())).unwrap());
        for form in [Form::Chunked, Form::Recurrent] {
            let gate = Kda::builder().form(form).bounded_gate(-5.0).a_log(&a_log).dt_bias(bias.view());
            within("gate", &gate.build().unwrap().forward(of(raw.view())).unwrap(), &want, &bound);
        }
    }

    #[test]
    fn gradients_of_a_gate_are_those_of_its_log_decays() {
        let (k, v) = (unit(array([1, 2, 70, 16], 1)), array([1, 2, 70, 24], 2));
        let mut raw = array([1, 2, 70, 16], 3).mapv(|x| 3.0 * x);
        raw.slice_mut(ndarray::s![.., .., 20..30, 5]).fill(f32::NEG_INFINITY);
        raw.slice_mut(ndarray::s![.., .., 40..45, 7]).fill(f32::INFINITY);
        let (bias, a_log) = (array([1, 1, 2, 16], 4).into_shape_with_order((2, 16)).unwrap(), [0.5f32, -1.0]);
        let (beta, d_out) = (Array3::from_elem((1, 2, 70), 0.7), array([1, 2, 70, 24], 5));
        let x_of = |at: (usize, usize, usize, usize)| {
            f64::from(a_log[at.1]).exp() * (f64::from(raw[at]) + f64::from(bias[[at.1, at.3]]))
        };
        let decay = Array4::from_shape_fn(raw.dim(), |at| (-5.0 * exact::sigmoid(x_of(at))) as f32);
        let of = |g| KdaQkv::new(Qkv::new(k.view(), k.view(), v.view()), g, beta.view());
        let gate = Kda::builder().bounded_gate(-5.0).a_log(&a_log).dt_bias(bias.view()).build().unwrap();
        let whole = Carried::default();
        let got = gate.reference_backward(of(raw.view()), d_out.view(), whole).unwrap();
        let plain = Kda::builder().build().unwrap();
        let along = plain.reference_backward(of(decay.view()), d_out.view(), whole).unwrap();
        assert!(along.a_log.dim() == (2, 0) && along.dt_bias.dim() == (2, 0));
        // dg = g (1 - g / bound) dx
        let d_x = Array4::from_shape_fn(raw.dim(), |at| {
            let share = exact::sigmoid(x_of(at));
            -5.0 * share * (1.0 - share) * along.log_decay[at]
        });
        for head in 0..2 {
            let rate = f64::from(a_log[head]).exp();
            let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-4, "{got}, not {want}");
            let mut sum = 0.0;
            for c in 0..16 {
                let channel = || (0..70).map(|t| (0, head, t, c));
                channel().for_each(|at| near(got.log_decay[at], rate * d_x[at]));
                near(got.dt_bias[[head, c]], channel().map(|at| rate * d_x[at]).sum());
                sum += channel().filter(|&at| d_x[at] != 0.0).map(|at| d_x[at] * x_of(at)).sum::<f64>();
            }
            near(got.a_log[[head, 0]], sum);
        }
        let mut kernel = gate.zero_gradients(of(raw.view())).unwrap();
        gate.backward_into(of(raw.view()), d_out.view(), whole, &mut kernel, &mut Workspace::new()).unwrap();
        let pairs = [(&kernel.a_log, &got.a_log), (&kernel.dt_bias, &got.dt_bias)];
        for (got, want) in pairs.into_iter().flat_map(|(got, want)| got.iter().zip(want)) {
            assert!((f64::from(*got) - want).abs() < 1e-4 * (1.0 + want.abs()), "{got}, not {want}");
        }
    }

    #[test]
    fn refusals() {
        let (x, beta) = (array([1, 2, 6, 8], 1), Array3::ones((1, 2, 6)));
        let x = KdaQkv::new(Qkv::new(x.view(), x.view(), x.view()), x.view(), beta.view());
        let error = |builder: KdaBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(
            error(Kda::builder().bounded_gate(0.5)),
            "bound: expected a finite number of at most 0, got 0.5"
        );
        assert_eq!(
            error(Kda::builder().a_log(&[0.0])),
            "a_log cannot be combined with log decays: they come as they are unless bounded_gate() is asked for"
        );
        let gate = |a_log: &[f32]| Kda::builder().bounded_gate(-5.0).a_log(a_log).build().unwrap();
        let got = gate(&[0.0; 3]).forward(x).unwrap_err().to_string();
        assert_eq!(got, "a_log: expected one for each of the 2 heads, got 3");
        assert!(gate(&[]).forward(x).is_err());
        assert_eq!(
            error(Kda::builder().bounded_gate(-5.0).a_log(&[0.0, -200.0])),
            "a_log: expected numbers from -80 to 40, got -200"
        );
    }
}
