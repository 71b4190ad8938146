//! Log decays of raw numbers, none of which is below a bound.
//!
//! ```text
//! g = bound sigmoid(exp(a_log) (raw + bias))
//! ```

use ndarray::Array2;

use crate::definition::recurrence_backward::Found;
use crate::engine::recur::{Back, Bound, BoundBack, Keys, Place};
use crate::error::Result;
use crate::input::Dims;
use crate::math::gates::exact;
use crate::simd::Isa;
use crate::stages::recur::{check_channels, check_heads};

/// How log decays are made of what comes in their place.
#[derive(Clone, Debug)]
pub(crate) struct BoundedGate {
    /// At most 0.
    pub(crate) bound: f32,
    /// One a head, or 0 for all.
    pub(crate) a_log: Option<Vec<f32>>,
    /// `[heads, head_dim]` in standard layout, or 0.
    pub(crate) bias: Option<Array2<f32>>,
}

impl BoundedGate {
    /// Refuses an input of other heads or channels.
    pub(crate) fn check(&self, dims: &Dims) -> Result<()> {
        if let Some(a_log) = &self.a_log {
            check_heads("a_log", a_log.len(), dims)?;
        }
        self.bias.as_ref().map_or(Ok(()), |bias| check_channels("dt_bias", bias.dim(), dims))
    }

    fn a_log(&self, head: usize) -> f32 {
        self.a_log.as_ref().map_or(0.0, |a_log| a_log[head])
    }

    /// Those of a head, or none.
    fn bias(&self, head: usize) -> &[f32] {
        let Some(bias) = &self.bias else { return &[] };
        let dim = bias.dim().1;
        &bias.as_slice().unwrap_or_default()[head * dim..][..dim]
    }

    /// Makes log decays of `dim` raw numbers a token where these have been loaded.
    pub(crate) fn loaded(&self, isa: Isa, at: &Place, Keys { decay, stride, .. }: Keys<'_>, dim: usize) {
        let (len, rate, bias) = (at.tokens.len(), self.a_log(at.head).exp(), self.bias(at.head));
        isa.dispatch(Bound { decay, stride, len, dim, bound: self.bound, rate, bias });
    }

    /// Gradients of what [`loaded`](Self::loaded) makes: those of raw numbers, which are in
    /// scratch, come in place of those of log decays.
    pub(crate) fn loaded_back(&self, isa: Isa, at: &Place, of: Back<'_>, dim: usize) {
        let (of_rate, of_bias) = of.parameters.split_at_mut(usize::from(self.a_log.is_some()));
        let (len, rate, bias) = (at.tokens.len(), self.a_log(at.head).exp(), self.bias(at.head));
        let Back { scratch: raw, d_decay, stride, .. } = of;
        let bound = self.bound;
        isa.dispatch(BoundBack { raw, d_decay, stride, len, dim, bound, rate, bias, of_rate, of_bias });
    }

    /// What of each channel `sigmoid` is taken, by definition.
    fn logits(&self, head: usize, raw: Vec<f64>) -> impl Iterator<Item = f64> {
        let (bias, rate) = (self.bias(head), f64::from(self.a_log(head)).exp());
        let biased = move |(c, raw)| raw + bias.get(c).map_or(0.0, |&x| f64::from(x));
        raw.into_iter().enumerate().map(move |x| rate * biased(x))
    }

    /// What a token with these raw numbers leaves of each channel, by definition.
    pub(crate) fn decays(&self, head: usize, raw: Vec<f64>) -> Vec<f64> {
        let bound = f64::from(self.bound);
        self.logits(head, raw).map(|x| (bound * exact::sigmoid(x)).exp()).collect()
    }

    /// Numbers of a head that [`Found::rate`] and [`Found::bias`] have.
    pub(crate) fn parameters(&self, dim: usize) -> [usize; 2] {
        [usize::from(self.a_log.is_some()), if self.bias.is_some() { dim } else { 0 }]
    }

    /// Gradients of [`decays`](Self::decays): those of raw numbers come in place of those of log
    /// decays, with those of `a_log` and of biases.
    pub(crate) fn token_back(&self, head: usize, raw: Vec<f64>, found: &mut Found) {
        let rate = f64::from(self.a_log(head)).exp();
        for (d, x) in found.decay.iter_mut().zip(self.logits(head, raw)) {
            let slope = f64::from(self.bound) * exact::sigmoid(x) * exact::sigmoid(-x);
            // At either end nothing moves, however far it is.
            let d_x = if slope == 0.0 { 0.0 } else { slope * *d };
            found.rate += if slope == 0.0 { 0.0 } else { d_x * x };
            *d = d_x * rate;
        }
        found.bias.clone_from(&found.decay);
    }
}
