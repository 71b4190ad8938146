//! The steps of a state space model: of one number a token and head come what is left of the
//! state and what a token weighs that is added to it.
//!
//! ```text
//! step  = softplus(raw + bias), and within limits
//! A-bar = exp(-exp(a_log) step)
//! B-bar = step B
//! ```

use ndarray::ArrayView3;

use crate::definition::recurrence::{Token, number};
use crate::definition::recurrence_backward::Found;
use crate::engine::recur::{
    Arrays, Back, COLUMNS, Discretise, DiscretiseBack, Keys, Made, Place, Source, Undone, as_loaded,
};
use crate::error::{Error, Result};
use crate::input::Dims;
use crate::math::gates::exact;
use crate::simd::Isa;
use crate::stages::options::{Range, check};
use crate::stages::recur::check_heads;

const A_LOG: Range = Range::new(["numbers with a finite exponential"; 2], |x| x.exp() <= f64::from(f32::MAX));

/// How steps are made of what comes in the place of log decays, and what of them.
#[derive(Clone, Debug)]
pub(crate) struct Steps {
    /// One a head.
    a_log: Vec<f32>,
    /// As many.
    bias: Vec<f32>,
    limits: (f32, f32),
}

impl Steps {
    /// Of finite numbers; biases are 0 unless there are some.
    ///
    /// # Errors
    /// [`Error::Value`] for biases of other heads, rates that overflow and limits that are none.
    pub(crate) fn new(a_log: Vec<f32>, bias: Option<Vec<f32>>, limits: (f32, f32)) -> Result<Self> {
        let heads = a_log.len();
        let bias = bias.unwrap_or_else(|| vec![0.0; heads]);
        if bias.len() != heads {
            return Err(Error::value("dt_bias", format!("one for each of the {heads} heads"), bias.len()));
        }
        check("a_log", &a_log, &A_LOG)?;
        let (least, most) = limits;
        if !(0.0 <= least && least <= most) {
            let expected = "limits of at least 0, the smaller one first";
            return Err(Error::value("dt_limits", expected, format_args!("{least}, {most}")));
        }
        Ok(Self { a_log, bias, limits })
    }

    pub(crate) fn heads(&self) -> usize {
        self.a_log.len()
    }

    /// Refuses an input of other heads.
    pub(crate) fn check(&self, dims: &Dims) -> Result<()> {
        check_heads("a_log", self.heads(), dims)
    }

    /// What a step of 1 adds to the logarithm of the state.
    fn rate(&self, head: usize) -> f32 {
        -self.a_log[head].exp()
    }

    /// Calls `run` with these operands, whose decays are raw numbers: keys are weighed and
    /// decays made while they are loaded.
    pub(crate) fn with_source<R>(&self, arrays: Arrays<'_>, run: impl FnOnce(&dyn Source) -> R) -> R {
        let (dim, limits) = (arrays.k.dim().3, self.limits);
        let keys = |isa: Isa, at: &Place, Keys { k, decay, stride, .. }: Keys<'_>| {
            let decay = &mut decay[..at.tokens.len()];
            let (bias, rate) = (self.bias[at.head], self.rate(at.head));
            isa.dispatch(Discretise { k, decay, stride, bias, limits, rate });
        };
        let back = |isa: Isa, at: &Place, of: Back<'_>| {
            let (mut raw, len) = ([0f32; COLUMNS], at.tokens.len());
            arrays.gates(isa, at, &mut raw[..len], 0);
            arrays.key_rows(isa, at, of.scratch, of.stride);
            isa.dispatch(DiscretiseBack {
                k: of.scratch,
                d_k: of.d_k,
                dim,
                stride: of.stride,
                decay: of.decay,
                d_decay: of.d_decay,
                raw: &raw[..len],
                bias: self.bias[at.head],
                limits,
                rate: self.rate(at.head),
                parameters: of.parameters,
            });
        };
        run(&Undone { made: Made { arrays, queries: as_loaded, keys }, back })
    }

    /// The number that a step is made of, and the step, by definition.
    fn step(&self, raw: &ArrayView3<'_, f32>, at: &Place) -> [f64; 2] {
        let (least, most) = self.limits;
        let raw = number(raw, at, self.heads()) + f64::from(self.bias[at.head]);
        [raw, exact::softplus(raw).clamp(least.into(), most.into())]
    }

    /// A token of these operands, by definition.
    pub(crate) fn token(&self, arrays: &Arrays<'_>, raw: &ArrayView3<'_, f32>, at: &Place) -> Token {
        let (mut token, [_, step]) = (Token::of(arrays, at), self.step(raw, at));
        token.k.iter_mut().for_each(|b| *b *= step);
        Token { decay: vec![(-f64::from(self.a_log[at.head]).exp() * step).exp(); token.q.len()], ..token }
    }

    /// Gradients of what [`token`](Self::token) makes of a key and a raw number, in place of
    /// which come those of these, of `a_log` and of the bias.
    pub(crate) fn token_back(&self, b: &[f64], raw: &ArrayView3<'_, f32>, at: &Place, found: &mut Found) {
        let [raw, step] = self.step(raw, at);
        let (rate, d_log) = (-f64::from(self.a_log[at.head]).exp(), found.decay.iter().sum::<f64>());
        let d_step = rate * d_log + found.k.iter().zip(b).map(|(d, b)| d * b).sum::<f64>();
        // A step at a limit stays there.
        let d_raw = if exact::softplus(raw) == step { d_step * exact::sigmoid(raw) } else { 0.0 };
        found.k.iter_mut().for_each(|d| *d *= step);
        (found.decay, found.bias) = (vec![d_raw], vec![d_raw]);
        found.rate = if d_log == 0.0 { 0.0 } else { rate * step * d_log };
    }
}

#[cfg(test)]
mod tests {
    use super::Steps;

    #[test]
    fn refusals() {
        let error = |a_log: &[f32], bias: Option<&[f32]>, limits| {
            Steps::new(a_log.to_vec(), bias.map(<[f32]>::to_vec), limits).unwrap_err().to_string()
        };
        let any = (0.0, f32::INFINITY);
        let want = "dt_bias: expected one for each of the 4 heads, got 1";
        assert_eq!(error(&[0.0; 4], Some(&[0.0]), any), want);
        assert_eq!(error(&[90.0], None, any), "a_log: expected numbers with a finite exponential, got 90");
        for (least, most) in [(-1.0, 1.0), (1.0, 0.5), (f32::NAN, 1.0), (0.0, f32::NAN)] {
            let want = format!(
                "dt_limits: expected limits of at least 0, the smaller one first, got {least}, {most}"
            );
            assert_eq!(error(&[0.0; 4], None, (least, most)), want);
        }
    }
}
