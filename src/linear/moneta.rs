//! Moneta: a memory whose loss is a power of its errors, and whose weights are normalised
//! by a norm of what they have accumulated.

use ndarray::{Array3, Axis};

use crate::card::{Extras, carded, exhibit, share};
use crate::element::Element;
use crate::engine::online::{Loss, Memory, Online, Retention};
use crate::error::{Error, Result};
use crate::input::retained::MirasQkv;
use crate::stages::online::{Learning, Learns, learning, learning_options};
use crate::stages::options::{FINITE, options};

/// Moneta: a memory whose loss is a power of its errors, and whose weights are normalised
/// by a norm of what they have accumulated.
///
/// ```text
/// e   = M_r(k_t) - v_t
/// A_t = keep_t A_{t-1} - step_t k_t (p tanh(a e) (e^2 + 1e-6)^((p-1)/2))^T
/// W   = A / |A|_q^(q-2)                                    at the ends of chunks
/// y_t = q_t^T A_t / |A|_q^(q-2)
/// ```
///
/// "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias,
/// Retention, and Online Optimization" (Miras, arXiv 2504.13173), with `p = 3`, `q = 4`.
/// `r` is the last token before the [`chunk`](MonetaBuilder::chunk) of `t`, and the size of
/// chunks is part of the definition: gradients and the norm are those of the chunk's start,
/// and the norm that of its end for its last token. With chunks of 1 both are new at every
/// token. While nothing has been accumulated nothing is divided; little of it makes large
/// weights, so that [`weights`](MonetaBuilder::weights) to start with are advisable.
///
/// With [`mirror_map`](MonetaBuilder::mirror_map) weights are `A (|A| / |A|_q)^(q-2)`,
/// element by element: the mirror map of half the squared norm. What is not linear cannot
/// be read by tokens of the chunk; these read `W` then, the last one that of the end.
///
/// The published error bound is that of likely errors, as long as steps are not so large
/// that the memory diverges.
///
/// Cost: `6 head_dim value_dim + 128 (head_dim + value_dim)` flops a token and head.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{MirasQkv, Moneta}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let (keep, step) = (Array3::from_elem((1, 2, 100), 0.98), Array3::from_elem((1, 2, 100), 0.01));
///
/// let moneta = Moneta::builder().normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = moneta.forward(MirasQkv::new(qkv, keep.view(), step.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// The [`State`](crate::linear::State) is `[sequences, heads, 2, weights and more]`: a row
/// of `A` and one of `W`, row by row; behind `A` are the tokens of the chunk so far and what
/// queries divide by.
#[derive(Clone, Debug)]
pub struct Moneta {
    learning: Learning,
}

impl Moneta {
    /// With `p = 3`, `q = 4` and smooth signs of `a = 10`.
    pub fn builder() -> MonetaBuilder {
        MonetaBuilder::with()
    }
}

options! {
    /// Builds a [`Moneta`].
    MonetaBuilder of Moneta, form;
    own {
        chunk: usize = 64;
        powers: [u32; 2] = [3, 4];
        weights: Option<Array3<f32>> = None;
    }
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
        /// `p sign(e) |e|^(p-1)` instead of its smooth form.
        exact_sign;
        /// Weights by the mirror map, element by element.
        mirror_map;
    }
    numbers {
        /// How sharp smooth signs are, `a`. Default: 10.
        sharpness: f32 = 10.0, in FINITE;
    }
    build(this, config) {
        let [p, q] = this.powers;
        if !(2..=8).contains(&p) {
            return Err(Error::value("p", "from 2 to 8", p));
        }
        if !(2..=8).contains(&q) {
            return Err(Error::value("q", "from 2 to 8", q));
        }
        let loss = Loss::Power { p, sharpness: (!this.exact_sign).then_some(this.sharpness) };
        let rules = (loss, Retention::Norm { q, mirror: this.mirror_map });
        let memory = Memory { weights: this.weights.into_iter().collect(), gamma: None };
        Ok(Moneta { learning: Learning::new(config, rules, this.chunk, this.normalize_qk, memory)? })
    }
}

learning_options!(MonetaBuilder { chunk });

impl MonetaBuilder {
    /// The power of errors. Default: 3.
    pub fn p(mut self, p: u32) -> Self {
        self.powers[0] = p;
        self
    }

    /// Which norm weights have: 2 leaves them as they are. Default: 4.
    pub fn q(mut self, q: u32) -> Self {
        self.powers[1] = q;
        self
    }

    /// What has been accumulated at the start, `[heads, head_dim, value_dim]`. Default: 0.
    pub fn weights(mut self, weights: Array3<f32>) -> Self {
        self.weights = Some(weights);
        self
    }
}

impl<T: Element> Learns<MirasQkv<'_, T>> for Moneta {
    fn learning(&self) -> &Learning {
        &self.learning
    }

    fn online<'a>(&'a self, x: &'a MirasQkv<'_, T>) -> Result<Online<'a>> {
        self.learning.retained(x)
    }
}
learning!(Moneta, MirasQkv);

exhibit! {
    MonetaExhibit of Moneta, "linear", "Moneta", "arXiv 2504.13173";
    "a memory trained on a power of its errors, with weights of a bounded norm";
    not "where values have no outliers: Titans' squares are cheaper and have momentum";
    tokens true, forms form, variants 4;
    build(x, field) {
        // Far from 0, where weights are without bounds.
        let dim = (x.q.dim().1, x.q.dim().3, x.v.dim().3);
        let weights = Array3::from_shape_fn(dim, |(h, i, j)| 2.0 + field.at(8, h, i, j));
        let moneta = Moneta::builder().normalize_qk().weights(weights);
        match field.variant {
            0 => moneta.chunk(16),
            1 => moneta.chunk(70).p(2).q(3).exact_sign(),
            // The token that tests spoil ends a chunk.
            2 => moneta.chunk(71).mirror_map(),
            _ => moneta.chunk(1).p(4).q(5),
        }
    }
    extras(x, field) {
        let keep = field.tokens(1, x, |x| 1.0 - 0.002 * share(x)).insert_axis(Axis(3));
        Extras { rates: keep, betas: field.tokens(2, x, |x| 0.002 * share(x)), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> MirasQkv<'a, T> {
        MirasQkv::new(x, extras.rates.index_axis(Axis(3), 0), extras.betas.view())
    }
}
carded!(Moneta, MonetaExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{DeltaNet, DeltaQkv};
    use crate::testing::{agree, array, unit, within};
    use crate::{Attention, Bounded, Recurrent};
    use ndarray::s;

    #[test]
    fn squares_without_norms_are_the_delta_rule() {
        let (q, k, v) = (array([1, 2, 70, 16], 1), unit(array([1, 2, 70, 16], 2)), array([1, 2, 70, 24], 3));
        let beta = Array3::from_shape_fn((1, 2, 70), |(_, h, t)| ((3 * h + t) % 7) as f32 / 8.0);
        let (half, one) = (beta.mapv(|x| 0.5 * x), Array3::ones((1, 1, 70)));
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let delta = DeltaNet::builder().scale(1.0).build().unwrap();
        let want = delta.reference(DeltaQkv::new(qkv.reborrow(), beta.view())).unwrap();
        let x = MirasQkv::new(qkv, one.view(), half.view());
        for mirror in [false, true] {
            let moneta = Moneta::builder().chunk(1).exact_sign().p(2).q(2);
            let moneta = if mirror { moneta.mirror_map() } else { moneta }.build().unwrap();
            agree(&moneta.reference(x).unwrap(), &want);
            within("delta", &moneta.forward(x).unwrap(), &want, &moneta.error_bound(x).unwrap());
        }
    }

    #[test]
    fn weights_are_what_was_accumulated_over_its_norm() {
        let (q, k, v) = (array([1, 1, 40, 8], 1), array([1, 1, 40, 8], 2), array([1, 1, 40, 6], 3));
        let (keep, step) = (Array3::from_elem((1, 1, 40), 0.9), Array3::from_elem((1, 1, 40), 0.01));
        let x = MirasQkv::new(Qkv::new(q.view(), k.view(), v.view()), keep.view(), step.view());
        for mirror in [false, true] {
            let moneta = Moneta::builder().normalize_qk().chunk(20);
            let moneta = if mirror { moneta.mirror_map() } else { moneta }.build().unwrap();
            let mut state = moneta.initial_state(x).unwrap();
            moneta.prefill(x, &mut state).unwrap();
            let of = |row: usize| state.view().slice(s![0, 0, row, ..48]).mapv(f64::from);
            let (a, w) = (of(0), of(1));
            let norm = a.iter().map(|x| x.powi(4)).sum::<f64>().powf(0.25);
            for (a, w) in a.iter().zip(&w) {
                let want = if mirror { a * a * a / (norm * norm) } else { a / (norm * norm) };
                assert!((w - want).abs() < 1e-5 * want.abs().max(1.0), "{w}, not {want}");
            }
            let divisor = f64::from(state.view()[[0, 0, 0, 49]]);
            let want = if mirror { 1.0 } else { norm * norm };
            assert!((divisor - want).abs() < 1e-6 * want, "{divisor}, not {want}");
        }
    }

    #[test]
    fn nothing_accumulated_is_read_as_nothing() {
        let (x, none) = (array([1, 1, 5, 4], 1), array([1, 1, 5, 4], 2).mapv(|_| 0.0));
        let one = Array3::ones((1, 1, 5));
        let moneta = Moneta::builder().chunk(2).build().unwrap();
        let x = MirasQkv::new(Qkv::new(x.view(), x.view(), none.view()), one.view(), one.view());
        assert!(moneta.forward(x).unwrap().iter().all(|&x| x == 0.0));
        assert!(moneta.reference(x).unwrap().iter().all(|&x| x == 0.0));
    }

    #[test]
    fn refusals() {
        let error = |builder: MonetaBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(error(Moneta::builder().p(1)), "p: expected from 2 to 8, got 1");
        assert_eq!(error(Moneta::builder().q(9)), "q: expected from 2 to 8, got 9");
        assert_eq!(
            error(Moneta::builder().sharpness(f32::NAN)),
            "sharpness: expected a finite number, got NaN"
        );
    }
}
