//! Performer: softmax attention estimated by positive random features.

use ndarray::Array2;

use crate::card::{carded, exhibit};
use crate::engine::recur::Normaliser;
use crate::error::Error;
use crate::input::{Qkv, filled};
use crate::math::features::{Favor, RowNorms};
use crate::stages::mapped::{Mapped, mapped};
use crate::stages::options::{EPSILON, FINITE, check, options};
use crate::stages::recur::Config;

/// Performer: softmax attention estimated by positive random features.
///
/// ```text
/// phi_r(x) = features^(-1/2) (exp(w_r . z - |z|^2 / 2 - c) + epsilon)        z = x / head_dim^(1/4)
/// o_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + normaliser)
/// ```
///
/// "Rethinking Attention with Performers" (arXiv 2009.14794), FAVOR+: rows
/// `w_r` are random and orthogonal within blocks of `head_dim`; see
/// [`Favor`], which has the features.
///
/// Stabilisers `c` keep exponentials in range. A query's is its own largest
/// `w_r . z`. All keys share one, or their weights would change against each
/// other: here a fixed number, 0 by default, so that a token's output depends
/// on it and on earlier tokens alone and is the same however a sequence is cut
/// into calls. The released code takes the largest `w_r . z` of all keys of
/// the call, later ones included: that is
/// [`stabiliser`](PerformerBuilder::stabiliser) with this number. With
/// `epsilon` 0 and `normaliser` 0 every choice gives the same.
///
/// Cost: as [`LinearAttention`](super::LinearAttention) with as many features,
/// and `2 head_dim features` flops a query and a key. The estimate is good
/// where scores are small; its variance grows exponentially with `|q + k|^2 /
/// sqrt(head_dim)`, and sharp attention is out of reach.
///
/// FAVOR+ attention.
///
/// ```
/// use attention_kernels::{Attention, Qkv, dense::Dense, linear::Performer};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, t, c)| 0.5 * ((h + t * c) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let performer = Performer::builder(16).features(256).seed(7).causal().build()?;
/// let out = performer.forward(x)?;
/// let softmax = Dense::builder().causal().build()?.forward(x)?;
/// assert!(out.iter().zip(&softmax).all(|(a, b)| (a - b).abs() < 0.1));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Performer {
    config: Config,
    query: Favor,
    key: Favor,
    causal: bool,
    normaliser: f32,
}

/// Where the random rows come from.
#[derive(Clone, Debug)]
enum Projection {
    Seed { head_dim: usize, features: Option<usize>, seed: u64, norms: RowNorms },
    Rows(Array2<f32>),
}

impl Performer {
    /// Queries and keys of `head_dim` elements, `head_dim ln head_dim`
    /// features from seed 0, everything visible.
    pub fn builder(head_dim: usize) -> PerformerBuilder {
        PerformerBuilder::with(Projection::Seed {
            head_dim,
            features: None,
            seed: 0,
            norms: RowNorms::Random,
        })
    }

    /// Random rows of your own, `[features, head_dim]`, as a trained model
    /// has them.
    pub fn from_projection(projection: Array2<f32>) -> PerformerBuilder {
        PerformerBuilder::with(Projection::Rows(projection))
    }
}

options! {
    /// Builds a [`Performer`].
    PerformerBuilder of Performer, form;
    given { projection: Projection; }
    own { epsilon: Option<f32> = None, in EPSILON; }
    flags {
        /// Queries see the keys at their own position and before; queries and
        /// keys are of the same tokens.
        causal;
        /// The generalised variant with features `max(w_r . z, 0) + epsilon`.
        relu;
    }
    numbers {
        /// What is added to the sum of the weights before it divides. Default:
        /// 1e-6. A sum of exactly 0 gives 0.
        normaliser: f32 = 1e-6, in EPSILON;
        /// What is subtracted from the exponents of all keys. Default: 0. Needed
        /// where `head_dim` is far above 128, for exponents reach `head_dim / 2`.
        stabiliser: f32 = 0.0, in FINITE;
    }
    build(this, config) {
        let key = match this.projection {
            Projection::Seed { head_dim, features, seed, norms } => {
                let d = head_dim as f64;
                let features = features.unwrap_or(((d * d.ln()) as usize).max(1));
                // Room for them, before they are drawn.
                filled("features", (features, head_dim), 0f64)?;
                Favor::with_norms(head_dim, features, seed, norms)
            }
            Projection::Rows(rows) => {
                check("projection", &rows, &FINITE)?;
                Favor::of_projection(rows)
            }
        };
        if key.projection().is_empty() {
            return Err(Error::value("features", "at least one, of at least one element", 0));
        }
        let key = if this.relu { key.relu() } else { key.stabiliser(this.stabiliser) };
        let key = match this.epsilon {
            Some(epsilon) => key.epsilon(epsilon),
            None => key,
        };
        let query = key.clone().for_queries();
        Ok(Performer { config, query, key, causal: this.causal, normaliser: this.normaliser })
    }
}

impl PerformerBuilder {
    /// How many random features. Default: `head_dim ln head_dim`, rounded
    /// down, and at least 1. Without effect on rows of your own.
    pub fn features(mut self, count: usize) -> Self {
        if let Projection::Seed { features, .. } = &mut self.projection {
            *features = Some(count);
        }
        self
    }

    /// What the features are drawn from. Default: 0. Without effect on rows of
    /// your own.
    pub fn seed(mut self, number: u64) -> Self {
        if let Projection::Seed { seed, .. } = &mut self.projection {
            *seed = number;
        }
        self
    }

    /// How long random rows are. Default: [`RowNorms::Random`]. Without effect
    /// on rows of your own.
    pub fn row_norms(mut self, choice: RowNorms) -> Self {
        if let Projection::Seed { norms, .. } = &mut self.projection {
            *norms = choice;
        }
        self
    }

    /// What is added to every feature before it is scaled. Default: 1e-4, and
    /// 1e-3 for [`relu`](Self::relu).
    pub fn epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = Some(epsilon);
        self
    }
}

impl Performer {
    /// The features of keys. Those of queries are
    /// [`for_queries`](Favor::for_queries) of the same.
    pub fn features(&self) -> &Favor {
        &self.key
    }

    fn mapped(&self) -> Mapped<'_> {
        Mapped {
            config: &self.config,
            query: &self.query,
            key: &self.key,
            causal: self.causal,
            normaliser: Some(Normaliser::Sum { epsilon: self.normaliser }),
        }
    }
}

mapped!(Performer);

exhibit! {
    PerformerExhibit of Performer, "linear", "Performer", "arXiv 2009.14794";
    "softmax weights estimated by random features";
    not "where exact weights matter: the estimate is noisy for sharp softmax";
    tokens false;
    build(x, _) {
        Performer::builder(x.q.dim().3)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}
carded!(Performer, PerformerExhibit);

exhibit! {
    CausalPerformerExhibit of Performer, "linear", "causal Performer", "arXiv 2009.14794";
    "the same over the keys so far";
    not "where exact weights matter: the estimate is noisy for sharp softmax";
    tokens true, forms form, variants 2;
    build(x, field) {
        let builder = Performer::builder(x.q.dim().3).causal();
        if field.variant == 0 { builder } else { builder.features(41).seed(3).relu() }
    }
    input<'a, T>(x, _) -> Qkv<'a, T> {
        x
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, Array4};

    use super::*;
    use crate::dense::Dense;
    use crate::testing::qkv::{self, Qkvs, close, held};
    use crate::{Attention, Recurrent};

    #[test]
    fn sharp_queries_keep_to_the_definition() {
        let x = Qkvs::new([1, 2, 1, 101, 101, 24, 20], 1);
        // Without epsilon, features of sharper queries would underflow.
        for (sharpness, epsilon) in [(6.0, 1e-4), (2.0, 0.0)] {
            let sharp = Qkvs { q: &x.q * sharpness, k: x.k.clone(), v: x.v.clone() };
            let builder = Performer::builder(24).epsilon(epsilon).stabiliser(2.0).causal();
            held(&builder.build().unwrap(), sharp.qkv());
        }
        held(&Performer::builder(24).relu().build().unwrap(), x.qkv());
    }

    #[test]
    fn definition_is_the_sum_over_all_pairs() {
        let x = Qkvs::new([1, 1, 1, 40, 40, 8, 5], 3);
        let performer = Performer::builder(8).features(20).seed(1).causal().normaliser(0.25).build().unwrap();
        let w = performer.features().projection().mapv(f64::from);
        let phi = |x: &[f64], is_query: bool| {
            let z: Vec<f64> = x.iter().map(|x| x * 8f64.powf(-0.25)).collect();
            let y = w.dot(&ndarray::Array1::from(z.clone()));
            let c = if is_query { y.iter().copied().fold(f64::MIN, f64::max) } else { 0.0 };
            let half = z.iter().map(|z| z * z / 2.0).sum::<f64>();
            y.mapv(|y| ((y - half - c).exp() + f64::from(1e-4f32)) / 20f64.sqrt())
        };
        let pairs = qkv::quadratic(&x, true, Some(0.25), |q, k| phi(q, true).dot(&phi(k, false)));
        close(&performer.reference(x.qkv()).unwrap(), &pairs, 1e-11);
    }

    #[test]
    fn stabilisers_cancel_without_epsilon() {
        let x = Qkvs::new([1, 1, 1, 50, 50, 8, 5], 4);
        let out = |stabiliser| {
            let builder = Performer::builder(8).epsilon(0.0).normaliser(0.0).stabiliser(stabiliser);
            builder.causal().build().unwrap().reference(x.qkv()).unwrap()
        };
        close(&out(3.5), &out(0.0), 1e-10);
    }

    #[test]
    fn rows_are_orthogonal_within_blocks() {
        for norms in [RowNorms::Random, RowNorms::Equal] {
            let w = Favor::with_norms(16, 40, 5, norms).projection().mapv(f64::from);
            let gram: Array2<f64> = w.dot(&w.t());
            for ((i, j), x) in gram.indexed_iter() {
                if i == j && norms == RowNorms::Equal {
                    assert!((x - 16.0).abs() < 1e-4, "norm of row {i}: {x}");
                } else if i != j && i / 16 == j / 16 {
                    assert!(x.abs() < 1e-4, "rows {i} and {j}: {x}");
                }
            }
        }
    }

    /// The mean over seeds tends to softmax attention as the number of
    /// features grows, about as its inverse square root.
    #[test]
    fn features_estimate_the_softmax() {
        let x = Qkvs::new([1, 1, 1, 1, 12, 8, 4], 6);
        let x = Qkvs { q: &x.q * 0.35, k: &x.k * 0.35, v: x.v };
        let softmax: Array4<f64> = Dense::builder().build().unwrap().reference(x.qkv()).unwrap();
        let error = |features: usize| {
            let off = (0..40).map(|seed| {
                let builder =
                    Performer::builder(8).features(features).seed(seed).epsilon(0.0).normaliser(0.0);
                let out = builder.build().unwrap().reference(x.qkv()).unwrap();
                (&out - &softmax).mapv(|x| x * x).sum()
            });
            (off.sum::<f64>() / 40.0).sqrt()
        };
        let (few, many) = (error(64), error(4096));
        println!("performer: error of 64 features {few:.4}, of 4096 {many:.4}");
        assert!(few / many > 6.0 && few / many < 11.0, "{few} and {many}");
        assert!(many < 0.05, "{many}");
    }

    #[test]
    fn keys_come_before_queries() {
        let x = Qkvs::new([1, 2, 1, 150, 150, 16, 16], 7);
        let performer = Performer::builder(16).build().unwrap();
        let mut state = performer.initial_state(x.qkv()).unwrap();
        performer.prefill(x.slice(0..0, 0..150).qkv(), &mut state).unwrap();
        let late = performer.prefill(x.slice(0..150, 0..0).qkv(), &mut state).unwrap();
        let once = performer.forward(x.qkv()).unwrap();
        assert!(late.iter().zip(&once).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn refusals() {
        let error = |builder: PerformerBuilder| builder.build().unwrap_err().to_string();
        let builder = || Performer::builder(8);
        assert_eq!(error(builder().epsilon(-1.0)), "epsilon: expected a finite number of at least 0, got -1");
        assert_eq!(
            error(builder().normaliser(f32::INFINITY)),
            "normaliser: expected a finite number of at least 0, got inf"
        );
        assert_eq!(error(builder().stabiliser(f32::NAN)), "stabiliser: expected a finite number, got NaN");
        assert_eq!(
            error(builder().features(0)),
            "features: expected at least one, of at least one element, got 0"
        );
        assert_eq!(
            error(Performer::from_projection(Array2::from_elem((2, 2), f32::NAN))),
            "projection: expected finite numbers, got NaN"
        );
        let x = Qkvs::new([1, 1, 1, 3, 3, 16, 8], 7);
        let error = builder().features(4).build().unwrap().forward(x.qkv()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "projection: expected shape [features, head_dim] = [_, 16], got [4, 8]"
        );
    }
}
