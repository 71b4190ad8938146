//! Yaad: a memory that outliers cannot drag away, for its loss grows linearly beyond a
//! threshold.

use crate::card::{carded, exhibit};
use crate::element::Element;
use crate::engine::online::{Loss, Memory, Online, Retention};
use crate::error::Result;
use crate::input::declare::input;
use crate::input::tokens::Tokens;
use crate::stages::online::{Learning, Learns, RATE, THRESHOLD, extras, learning, learning_options, rate};
use crate::stages::options::{check, options};

input! {
    /// Queries, keys and values with what tokens leave of a memory, their steps of descent
    /// and thresholds: what [`Yaad`] takes.
    YaadQkv(qkv) {
        /// What each token leaves of the memory: from 0 to 1.
        keep: f32 [batch, heads/, len],
        /// How far each token goes down its gradient: at least 0.
        step: f32 [batch, heads/, len],
        /// The norm of an error beyond which it counts no more: at least 0, perhaps infinite.
        threshold: f32 [batch, heads/, len],
    }
}

/// Yaad: a memory that outliers cannot drag away, for its loss grows linearly beyond a
/// threshold.
///
/// ```text
/// e   = M_r(k_t) - v_t
/// W_t = keep_t W_{t-1} - step_t k_t (min(1, threshold_t / |e|) e)^T
/// y_t = M_t(q_t)
/// ```
///
/// "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias,
/// Retention, and Online Optimization" (Miras, arXiv 2504.13173). `r` is the last token
/// before the [`chunk`](YaadBuilder::chunk) of `t`: gradients of a chunk are of the same
/// weights, and the size of chunks is part of the definition. Beyond the threshold the
/// gradient is that of the norm of the error, or of its elements
/// ([`by_element`](YaadBuilder::by_element): `threshold sign(e)`, which jumps there). The
/// memory is a matrix, or a perceptron with one hidden layer as in
/// [`Titans`](crate::linear::Titans).
///
/// The published error bound is that of likely errors, as long as steps are not so large
/// that the memory diverges; where signs jump it is infinite.
///
/// Cost: `6 W + 128 (head_dim + value_dim)` flops a token and head for `W` weights.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::{Yaad, YaadQkv}};
/// use ndarray::{Array3, Array4};
///
/// let x = Array4::from_shape_fn((1, 2, 100, 32), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let all = |x| Array3::from_elem((1, 2, 100), x);
/// let (keep, step, threshold) = (all(0.98), all(0.02), all(1.0));
///
/// let yaad = Yaad::builder().normalize_qk().build()?;
/// let qkv = Qkv::new(x.view(), x.view(), x.view());
/// let out = yaad.forward(YaadQkv::new(qkv, keep.view(), step.view(), threshold.view()))?;
/// assert_eq!(out.dim(), (1, 2, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// The [`State`](crate::linear::State) is `[sequences, heads, 2, weights and more]`: a row
/// of weights and one of those at the start of the chunk, layer by layer and row by row;
/// behind the weights are the tokens of the chunk so far.
#[derive(Clone, Debug)]
pub struct Yaad {
    learning: Learning,
}

impl Yaad {
    /// A matrix that starts at 0.
    pub fn builder() -> YaadBuilder {
        YaadBuilder::with()
    }
}

options! {
    /// Builds a [`Yaad`].
    YaadBuilder of Yaad, form;
    own {
        chunk: usize = 64;
        memory: Memory = Memory::default();
    }
    flags {
        /// Divides each query and key by its norm: `x / sqrt(sum x^2 + 1e-6)`.
        normalize_qk;
        /// Takes signs of errors beyond the threshold, not their direction.
        by_element;
    }
    build(this, config) {
        let rules = (Loss::Huber { signs: this.by_element }, Retention::Linear);
        Ok(Yaad { learning: Learning::new(config, rules, this.chunk, this.normalize_qk, this.memory)? })
    }
}

learning_options!(YaadBuilder { chunk, memory });

impl<T: Element> Learns<YaadQkv<'_, T>> for Yaad {
    fn learning(&self) -> &Learning {
        &self.learning
    }

    fn online<'a>(&'a self, x: &'a YaadQkv<'_, T>) -> Result<Online<'a>> {
        let online = self.learning.online(x.token_dims()?, &x.qkv, x.step.view(), x.keep.view())?;
        check("keep", &x.keep, &RATE)?;
        check("threshold", &x.threshold, &THRESHOLD)?;
        Ok(Online { threshold: Some(x.threshold.view()), ..online })
    }
}
learning!(Yaad, YaadQkv);

exhibit! {
    YaadExhibit of Yaad, "linear", "Yaad", "arXiv 2504.13173";
    "a memory whose loss grows linearly for outliers";
    not "where values have no outliers: Titans has momentum besides";
    tokens true, forms form, variants 2;
    build(_, field) {
        let yaad = Yaad::builder().normalize_qk();
        if field.variant == 0 { yaad.chunk(16) } else { yaad.chunk(70) }
    }
    extras(x, field) { extras(x, field, 0.04) }
    input<'a, T>(x, extras) -> YaadQkv<'a, T> {
        YaadQkv::new(x, rate(extras, 1), extras.betas.view(), rate(extras, 3))
    }
}
carded!(Yaad, YaadExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Qkv;
    use crate::linear::{Comba, CombaQkv, Titans, TitansQkv};
    use crate::testing::{agree, array, unit, within};
    use crate::{Attention, Bounded};
    use ndarray::{Array2, Array3, Array4, Axis};

    #[test]
    fn without_a_threshold_it_is_the_delta_rule_with_decays_outside_the_prediction() {
        let (q, k, v) = (array([1, 2, 70, 16], 1), unit(array([1, 2, 70, 16], 2)), array([1, 2, 70, 24], 3));
        // Powers of two, of which logarithms are exact.
        let g = Array3::from_shape_fn((1, 2, 70), |(_, _, t)| -((t * 7 % 3) as f32));
        let (keep, log_decay) = (g.mapv(f32::exp2), g.mapv(|g| g * std::f32::consts::LN_2));
        let step = Array3::from_shape_fn((1, 2, 70), |(_, h, t)| ((3 * h + t) % 7) as f32 / 8.0);
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let x = CombaQkv::new(qkv.reborrow(), k.view(), log_decay.view(), step.view());
        let want = Comba::builder().scale(1.0).build().unwrap().reference(x).unwrap();
        let endless = Array3::from_elem((1, 2, 70), f32::INFINITY);
        let x = YaadQkv::new(qkv, keep.view(), step.view(), endless.view());
        let yaad = Yaad::builder().chunk(1).build().unwrap();
        let bound = yaad.error_bound(x).unwrap();
        within("delta", &yaad.forward(x).unwrap(), &want, &bound.mapv(|bound| bound + 1e-6));
    }

    #[test]
    fn perceptrons_are_those_of_titans() {
        let (q, k, v) = (array([1, 2, 70, 8], 1), unit(array([1, 2, 70, 8], 2)), array([1, 2, 70, 8], 3));
        let layer = |shape, seed| array(shape, seed).index_axis_move(Axis(0), 0);
        let (inner, outer) = (layer([1, 2, 8, 11], 4), layer([1, 2, 11, 8], 5));
        let all = |x| Array3::from_elem((1, 2, 70), x);
        let (step, half, keep, forget) = (all(0.02f32), all(0.01f32), all(0.75), all(0.25));
        let (endless, none) = (all(f32::INFINITY), all(0.0));
        let gamma = Array2::from_elem((2, 8), 0.5);
        let yaad = Yaad::builder().chunk(9).mlp(inner.clone(), outer.clone()).gamma(gamma.clone());
        let titans = Titans::builder().chunk(9).mlp(inner, outer).gamma(gamma).build().unwrap();
        let qkv = Qkv::new(q.view(), k.view(), v.view());
        let x = TitansQkv::new(qkv.reborrow(), half.view(), none.view(), forget.view());
        let want = titans.reference(x).unwrap();
        let (yaad, x) = (yaad.build().unwrap(), YaadQkv::new(qkv, keep.view(), step.view(), endless.view()));
        agree(&yaad.reference(x).unwrap(), &want);
        within("perceptron", &yaad.forward(x).unwrap(), &want, &yaad.error_bound(x).unwrap());
    }

    #[test]
    fn beyond_its_threshold_an_error_counts_for_its_direction() {
        // Of one token, whose error is -v, of norm 5.
        let (k, v) =
            (Array4::ones((1, 1, 1, 1)), Array4::from_shape_fn((1, 1, 1, 2), |at| [3.0, -4.0][at.3]));
        let one = Array3::ones((1, 1, 1));
        let out = |threshold: f32, signs: bool| {
            let threshold = Array3::from_elem((1, 1, 1), threshold);
            let builder = Yaad::builder();
            let yaad = if signs { builder.by_element() } else { builder }.build().unwrap();
            let qkv = Qkv::new(k.view(), k.view(), v.view());
            let x = YaadQkv::new(qkv, one.view(), one.view(), threshold.view());
            let (got, want) = (yaad.forward(x).unwrap(), yaad.reference(x).unwrap());
            assert!(got.iter().zip(&want).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6));
            [want[[0, 0, 0, 0]], want[[0, 0, 0, 1]]]
        };
        let near = |a: [f64; 2], b: [f64; 2]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(near(out(6.0, false), [3.0, -4.0]) && near(out(6.0, true), [3.0, -4.0]));
        assert!(near(out(1.0, false), [0.6, -0.8]) && near(out(1.0, true), [1.0, -1.0]));
        // Without a jump.
        assert!(near(out(5.0 + 1e-6, false), out(5.0 - 1e-6, false)));
        assert!(near(out(0.0, false), [0.0; 2]));
    }

    #[test]
    fn refusals() {
        let (x, rate) = (array([1, 2, 6, 8], 1), Array3::from_elem((1, 2, 6), 0.5));
        let less = rate.mapv(|x| -x);
        let qkv = Qkv::new(x.view(), x.view(), x.view());
        let x = YaadQkv::new(qkv, rate.view(), rate.view(), less.view());
        let error = Yaad::builder().build().unwrap().forward(x).unwrap_err().to_string();
        assert_eq!(error, "threshold: expected a number of at least 0, got -0.5");
    }
}
