//! Several steps of the delta rule a token: keys and values of all steps one after the other,
//! queries and decays one a token. The state decays before a token's first step, and is read
//! after its last.

use ndarray::ArrayView3;

use crate::engine::recur::{Arrays, Decay, Keys, Place, Source, Spec, copy_rows};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths};
use crate::simd::Isa;
use crate::simd::mem::Stream;
use crate::stages::delta_rule::DeltaRule;

/// Refuses keys of another number than so many for each token. `what` says what they are.
pub(crate) fn check_steps(what: &str, steps: usize, dims: &Dims, have: usize) -> Result<()> {
    if dims.q_len.checked_mul(steps) == Some(have) {
        return Ok(());
    }
    Err(Error::value("k", format!("{steps} {what} for each of {} tokens", dims.q_len), have))
}

/// Arrays of steps: keys, values and weights of each, queries and log decays of tokens.
pub(crate) struct Substeps<'a> {
    pub(crate) rule: DeltaRule,
    /// Of a token.
    pub(crate) steps: usize,
    pub(crate) arrays: Arrays<'a>,
    pub(crate) log_decay: Option<ArrayView3<'a, f32>>,
}

impl Substeps<'_> {
    /// The recurrence of `dims.q_len` tokens.
    ///
    /// # Errors
    /// [`Error::Value`] for other numbers of keys, and for log decays above 0 unless growth was
    /// asked for.
    pub(crate) fn spec<'s>(&self, dims: Dims, lengths: Lengths<'s>) -> Result<Spec<'s>> {
        let (steps, have, config) = (self.steps, self.arrays.k.dim().2, &self.rule.config);
        check_steps("steps", steps, &dims, have)?;
        let mut decay = Decay::None;
        if let Some(log_decay) = self.log_decay {
            config.check_decays("log_decay", log_decay)?;
            decay = Decay::Scalar;
        }
        let dims = Dims { kv_len: have, ..dims };
        Ok(Spec { steps, decay, ..config.spec(dims, lengths, &self.arrays) })
    }

    /// Where the tokens are that end among these steps.
    fn ends(&self, at: &Place) -> Place {
        Place { tokens: at.tokens.start / self.steps..at.tokens.end / self.steps, ..at.clone() }
    }
}

impl Source for Substeps<'_> {
    /// Rows of 0 but for the last step of each token.
    fn queries(&self, isa: Isa, at: &Place, to: &mut [f32], stride: usize) {
        let (steps, ends) = (self.steps, self.ends(at));
        to[..at.tokens.len() * stride].fill(0.0);
        let (len, first) = (ends.tokens.len(), (ends.tokens.start + 1) * steps - 1 - at.tokens.start);
        if len > 0 {
            let to = &mut to[first * stride..];
            copy_rows(isa, self.arrays.rows(self.arrays.q, &ends), to, steps * stride);
            self.rule.loaded(isa, to, len, self.arrays.q.dim().3, steps * stride);
        }
    }

    fn keys(&self, isa: Isa, at: &Place, mut to: Keys<'_>) {
        self.arrays.keys(isa, at, to.reborrow());
        self.rule.loaded(isa, to.k, at.tokens.len(), self.arrays.k.dim().3, to.stride);
        if let Some(g) = &self.log_decay {
            let head = at.head_of(g.dim().1, self.arrays.heads);
            for (to, t) in to.decay.iter_mut().zip(at.tokens.clone()) {
                let first = t.is_multiple_of(self.steps);
                *to = if first { g[[at.batch, head, t / self.steps]] } else { 0.0 };
            }
        }
    }

    fn streams(&self, at: &Place) -> [Stream; 6] {
        let [k, v, ..] = self.arrays.streams(at);
        let q = self.arrays.rows(self.arrays.q, &self.ends(at)).stream();
        [k, v, q, Stream::NONE, Stream::NONE, Stream::NONE]
    }
}
