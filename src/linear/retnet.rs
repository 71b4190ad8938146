//! Retention: linear attention whose heads forget at fixed rates, from short
//! memories to long ones.
//!
//! ```text
//! gamma_h = 1 - 2^(-5 - h)
//! S_t = gamma_h S_{t-1} + k_t v_t^T
//! o_t = scale * q_t^T S_t = scale * sum_{j <= t} gamma_h^(t - j) (q_t . k_j) v_j
//! ```
//!
//! "Retentive Network" (arXiv 2307.08621). Rotations of queries and keys
//! (xPos), the norm of each head's output and the gate after it are the
//! caller's. The paper's parallel form also divides each row of scores by
//! numbers of its own, so that they keep in range before the norm, which undoes
//! it: a recurrence does not need that and does not do it.
//!
//! Cost: `64 (head_dim + value_dim) + 4 head_dim value_dim` flops a token and
//! head. Rates do not depend on the tokens: where they should,
//! [`SimpleGla`](super::SimpleGla) costs the same.

use crate::element::Element;
use crate::engine::recur::backward::{Dim, Gradients};
use crate::engine::recur::{Arrays, Decay, Gate, Place, Read, Rule, Source, Spec};
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::linear::backward::{Differentiable, QkvGradients, qkv_dims};
use crate::linear::config::{Config, Options, linear_options, token_dims};
use crate::linear::gated::bytes;
use crate::linear::recurrence::Recurrence;
use crate::linear::reference::{Token, Update, row};

/// Retention.
///
/// ```
/// use attention_kernels::{Attention, Qkv, linear::RetNet};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 4, 100, 32)); // batch, heads, tokens, head_dim
/// let retention = RetNet::builder(4).build()?;
/// let out = retention.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 4, 100, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RetNet {
    config: Config,
    gammas: Vec<f64>,
    /// Their logarithms.
    decays: Vec<f32>,
}

/// Builds a [`RetNet`].
#[derive(Clone, Debug)]
pub struct RetNetBuilder {
    options: Options,
    gammas: Vec<f64>,
}

impl RetNet {
    /// The paper's rates for that many heads: head `h` keeps `1 - 2^(-5 - h)`
    /// of its state.
    pub fn builder(heads: usize) -> RetNetBuilder {
        let gammas: Vec<f64> = (0..heads).map(|head| 1.0 - (-5.0 - head as f64).exp2()).collect();
        Self::from_gammas(&gammas)
    }

    /// Rates of your own, one a head: how much of its state it keeps from one
    /// token to the next, from 0 to 1. 1 is linear attention without decay.
    pub fn from_gammas(gammas: &[f64]) -> RetNetBuilder {
        RetNetBuilder { options: Options::default(), gammas: gammas.to_vec() }
    }
}

linear_options!(RetNetBuilder, scale "1 / sqrt(head_dim)");

impl RetNetBuilder {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a rate that is not from 0 to 1 and for a scale
    /// that is not finite, [`Error::Isa`] for an instruction set that the CPU
    /// lacks.
    pub fn build(self) -> Result<RetNet> {
        if let Some(gamma) = self.gammas.iter().find(|gamma| !(0.0..=1.0).contains(*gamma)) {
            return Err(Error::value("gammas", "numbers from 0 to 1", gamma));
        }
        let decays = self.gammas.iter().map(|gamma| (gamma - 1.0).ln_1p() as f32).collect();
        Ok(RetNet { config: self.options.build()?, gammas: self.gammas, decays })
    }
}

impl Recurrence for RetNet {
    type Operands<'a, T: Element> = Qkv<'a, T>;

    const NAME: &'static str = "retnet";

    fn spec<'a, T: Element>(&'a self, x: &'a Qkv<'_, T>) -> Result<Spec<'a>> {
        let dims = token_dims(x)?;
        if self.gammas.len() != dims.q_heads {
            let expected = format!("one for each of the {} heads", dims.q_heads);
            return Err(Error::value("gammas", expected, self.gammas.len()));
        }
        Ok(Spec {
            dims,
            lengths: x.lengths,
            state_dim: dims.head_dim,
            decay: Decay::Scalar,
            rule: Rule::Add,
            read: Read::After,
            scale: self.config.scale_or_sqrt(&dims),
            normaliser: None,
            form: self.config.form,
            isa: self.config.isa,
        })
    }

    fn with_source<T: Element, R>(&self, x: &Qkv<'_, T>, run: impl FnOnce(&dyn Source) -> R) -> R {
        run(&Arrays { decay: Gate::Constant(&self.decays), ..Arrays::new(x, self.decays.len()) })
    }

    fn token<T: Element>(&self, x: &Qkv<'_, T>, at: &Place) -> Token {
        let heads = self.gammas.len();
        let q = row(&x.q, at, heads);
        Token {
            k: row(&x.k, at, heads),
            v: row(&x.v, at, heads),
            decay: vec![self.gammas[at.head]; q.len()],
            update: Update::Add,
            bonus: Vec::new(),
            q,
        }
    }

    fn bytes<T: Element>(&self, x: &Qkv<'_, T>) -> usize {
        bytes(x)
    }
}

impl Differentiable for RetNet {
    type Gradients<A> = QkvGradients<A>;

    fn dims<T: Element>(&self, x: &Qkv<'_, T>) -> Gradients<Dim> {
        qkv_dims(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::testing::{LENGTHS, agree, array, carries, keeps, pairs, spoils_from};
    use crate::linear::{Form, Lightning};
    use crate::{Attention, Recurrent};
    use ndarray::{Array4, s};

    const GAMMAS: [f64; 4] = [0.0, 0.9, 31.0 / 32.0, 1.0];

    #[test]
    fn keeps_to_the_definition() {
        let mut worst = 0f64;
        for len in LENGTHS {
            for form in [Form::Auto, Form::Chunked, Form::Recurrent] {
                // Keys and values of half as many heads.
                let (q, k) = (array([2, 4, len, 20], 1), array([2, 2, len, 20], 2));
                let v = array([2, 2, len, 70], 3);
                let retnet = RetNet::from_gammas(&GAMMAS).form(form).build().unwrap();
                let x = Qkv::new(q.view(), k.view(), v.view());
                worst = worst.max(keeps::<f32, _>(&format!("{len} {form:?}"), &retnet, x));
                // One head, which threads share.
                let one = RetNet::builder(1).form(form).build().unwrap();
                let part = |x: &Array4<f32>| x.slice(s![..1, ..1, .., ..]).to_owned();
                let (q, k, v) = (part(&q), part(&k), part(&v));
                let x = Qkv::new(q.view(), k.view(), v.view());
                worst = worst.max(keeps::<f32, _>(&format!("{len} {form:?}, one head"), &one, x));
            }
        }
        println!("retnet: {worst:.3} of the bound");
        // The bound is for the worst of rounding; noise is far from it.
        assert!(worst < 0.4, "{worst}");
    }

    #[test]
    fn is_its_parallel_form() {
        let (q, k, v) = (array([1, 4, 70, 8], 1), array([1, 4, 70, 8], 2), array([1, 4, 70, 5], 3));
        let retnet = RetNet::from_gammas(&GAMMAS).build().unwrap();
        let got = retnet.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
        let scale = f64::from((1.0 / 8f64.sqrt()) as f32);
        let want = pairs(&v, |b, h, i, j| {
            let dot: f64 = (0..8).map(|c| f64::from(q[[b, h, i, c]]) * f64::from(k[[b, h, j, c]])).sum();
            scale * dot * GAMMAS[h].powi((i - j) as i32)
        });
        agree(&got, &want);
    }

    #[test]
    fn rates_of_the_paper() {
        let retnet = RetNet::builder(3).build().unwrap();
        assert_eq!(retnet.gammas, [31.0 / 32.0, 63.0 / 64.0, 127.0 / 128.0]);
        assert!((f64::from(retnet.decays[2]) - (127f64 / 128.0).ln()).abs() < 1e-9);
    }

    #[test]
    fn without_decay_it_is_linear_attention() {
        let x = array([1, 2, 100, 16], 1);
        let x = Qkv::new(x.view(), x.view(), x.view());
        let retnet = RetNet::from_gammas(&[1.0; 2]).scale(0.5).build().unwrap();
        let plain = Lightning::from_slopes(&[0.0; 2]).scale(0.5).build().unwrap();
        assert_eq!(retnet.forward(x).unwrap(), plain.forward(x).unwrap());
    }

    #[test]
    fn carries_its_state() {
        let (q, k, v) = (array([2, 4, 150, 16], 1), array([2, 4, 150, 16], 2), array([2, 4, 150, 24], 3));
        let retnet = RetNet::from_gammas(&GAMMAS).build().unwrap();
        let part = |range: std::ops::Range<usize>| {
            let tokens = s![.., .., range, ..];
            Qkv::new(q.slice(tokens), k.slice(tokens), v.slice(tokens))
        };
        carries(&retnet, part(0..150), part);
        // A step takes one token.
        let mut state = retnet.initial_state(part(0..1)).unwrap();
        assert!(retnet.step(part(0..2), &mut state).is_err());
    }

    #[test]
    fn a_nan_shows_from_its_token_on() {
        let (q, k) = (array([1, 2, 100, 16], 1), array([1, 2, 100, 16], 2));
        let mut v = array([1, 2, 100, 8], 3);
        v.slice_mut(s![.., .., 70, ..]).fill(f32::NAN);
        let retnet = RetNet::builder(2).build().unwrap();
        spoils_from(&retnet, 70, Qkv::new(q.view(), k.view(), v.view()));
    }

    #[test]
    fn empty_dimensions() {
        for (dim, value_dim) in [(0, 3), (3, 0), (0, 0)] {
            let (q, v) = (array([1, 2, 70, dim], 1), array([1, 2, 70, value_dim], 2));
            let retnet = RetNet::builder(2).build().unwrap();
            let out = retnet.forward(Qkv::new(q.view(), q.view(), v.view())).unwrap();
            assert!(out.iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn refusals() {
        for gamma in [-0.1, 1.0 + 1e-9, f64::NAN] {
            let error = RetNet::from_gammas(&[0.5, gamma]).build().unwrap_err();
            assert_eq!(error.to_string(), format!("gammas: expected numbers from 0 to 1, got {gamma}"));
        }
        let x = array([1, 2, 4, 8], 1);
        let retnet = RetNet::builder(3).build().unwrap();
        let error = retnet.forward(Qkv::new(x.view(), x.view(), x.view())).unwrap_err();
        assert_eq!(error.to_string(), "gammas: expected one for each of the 2 heads, got 3");
    }
}
