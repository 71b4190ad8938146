//! The linear recurrence: a state of fixed size that each token decays,
//! corrects and adds to, and that queries read.
//!
//! ```text
//! S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        S: [state_dim, value_dim]
//! o_t = scale * q_t^T S_t
//! ```
//!
//! Tokens are taken in chunks of [`Spec::chunk`]. What a chunk does to a state
//! and what its queries read of one are a few matrix products ([`chunk`]):
//!
//! - *prepare*, without the state: the scores of queries with the keys of
//!   their own chunk, decayed; for the delta rule the triangular system of the
//!   values that are really written;
//! - *advance*: those values, given the state at the chunk's start, and the
//!   state at its end;
//! - *read*: the outputs.
//!
//! Where there are as many heads as threads, a thread takes a head and does
//! the three in turn. Where there are fewer, all chunks of a stretch are
//! prepared at once, advanced one after the other (panels of value columns at
//! once), and read at once. Each number is computed by the same operations
//! either way, so bits do not depend on threads.
//!
//! No exponent is a difference of sums of `f32`, and without growth none is
//! positive: decays multiply, or add up from the side that they decay from.
//! Keys are divided by products of decays of a few tokens, of channels of which
//! these leave enough; such quotients are as exact as the products.
//! Short sequences, chunks with a NaN or infinity in them (which must not
//! reach earlier tokens), and whoever asks for it go token by token
//! ([`token`]).
//!
//! Gradients go chunk by chunk backwards ([`backward`]).

pub(crate) mod backward;
mod chunk;
mod growth;
mod made;
mod plan;
mod source;
mod token;

pub(crate) use chunk::{COLUMNS, decay_of, product};
pub(crate) use growth::any_above_zero;
pub(crate) use made::{
    Bound, BoundBack, Discretise, DiscretiseBack, Forget, ForgetBack, Made, Remove, RemoveBack, Undone,
    as_loaded,
};
pub(crate) use plan::{run_in, workspace_bytes};
pub(crate) use source::{Arrays, Back, Gate, Keys, Place, Source, copy_rows, copy_tokens};

use crate::error::Result;
use crate::input::state::State;
use crate::input::{Dims, Lengths, Sequence};
use crate::simd::Isa;

/// In which form a recurrence is computed. Results differ by rounding alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// Token by token for a few tokens, in chunks otherwise.
    #[default]
    Auto,
    /// In chunks, as matrix products.
    Chunked,
    /// Token by token: what decoding does, and the definition of the
    /// recurrence. For long inputs several times slower.
    Recurrent,
}

/// How the state decays at each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// All of it.
    None,
    /// The same share of every channel.
    Scalar,
    /// A share for each channel (row of the state).
    Channel,
}

/// What each token does to the state besides decaying it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// `k v^T`
    Add,
    /// `beta k (v - S^T k)^T`, where `S` has been decayed.
    Delta,
    /// `k v^T + b (a^T S)`, where `S` has not been decayed.
    LowRank,
}

/// When a token's query reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// The state that has the token.
    After,
    /// The state before it, plus `sum_c q_c bonus_c k_c` times its own value.
    Before,
    /// The state that has all tokens: not causal. For [`Rule::Add`] without decay.
    Total,
}

/// What outputs are divided by. The sum of the weights is one more column of
/// the values and of the state. Where keys are counted, the last element of each
/// key is 1 and that of each query 0: the count, as far as it has not decayed,
/// is then the last number of the state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normaliser {
    /// The sum of the weights plus `epsilon`.
    Sum { epsilon: f32 },
    /// The sum of the weights plus `share` for each key; the output has its own
    /// token's value `share` times more. Without decay, with a scale of 1.
    Shares { share: f32 },
    /// The larger of the sum's magnitude and the square root of the count.
    /// Without decay or with the [same](Source::keep) for all tokens.
    Bounded,
}

/// A recurrence and its sizes, checked.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    /// Sizes of the arrays; `q_heads` is the number of heads with a state.
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    /// Steps of a token: keys that it has, after the last of which its query
    /// reads. Keys are counted in steps then, `kv_len` of them, and so are the
    /// tokens of a [`Place`]; lengths are those of queries.
    pub(crate) steps: usize,
    /// Whether each step has a query, which reads the state that has all steps of
    /// its token; [`Source::join`] makes one output of theirs. For [`Rule::Add`]
    /// and [`Read::After`] without channels' own decays, where each token decays at its
    /// first step.
    pub(crate) joined: bool,
    /// Rows of a state: `head_dim` or what a feature map makes of it.
    pub(crate) state_dim: usize,
    pub(crate) decay: Decay,
    pub(crate) rule: Rule,
    pub(crate) read: Read,
    /// Whether only the state after the tokens is asked for: nothing is read then,
    /// and there are no outputs. Forwards.
    pub(crate) silent: bool,
    pub(crate) scale: f64,
    pub(crate) normaliser: Option<Normaliser>,
    pub(crate) form: Form,
    pub(crate) isa: Isa,
}

impl Spec<'_> {
    /// The same, unless states are larger than can be counted in bytes.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge)
    pub(crate) fn checked(self) -> Result<Self> {
        State::countable(self.state_shape())?;
        Ok(self)
    }

    /// A sequence, in steps.
    pub(crate) fn sequence(&self, index: usize) -> Sequence {
        let of = self.lengths.sequence(&self.dims, index);
        if self.steps == 1 {
            return of;
        }
        let steps = of.queries.start * self.steps..of.queries.end * self.steps;
        Sequence { queries: steps.clone(), keys: steps, ..of }
    }

    /// How many steps the query of a step sees, both counted from the first of a token.
    pub(crate) fn seen(&self, step: usize) -> usize {
        if self.joined { (step / self.steps + 1) * self.steps } else { step + 1 }
    }

    /// Columns of a state.
    pub(crate) fn state_cols(&self) -> usize {
        self.dims.value_dim + usize::from(self.normaliser.is_some())
    }

    /// `[sequences, heads, state_dim, columns]`
    pub(crate) fn state_shape(&self) -> (usize, usize, usize, usize) {
        (self.dims.batch, self.dims.q_heads, self.state_dim, self.state_cols())
    }

    /// Flops of a token of a head, of the chunked form as it is usually counted:
    /// `2` a multiply-add, of scores those of earlier keys alone. That of the
    /// delta rule solves its system for the keys too, which is not done here.
    pub(crate) fn flops(&self) -> usize {
        let (c, d, dv) = (chunk::CHUNK, self.state_dim, self.state_cols());
        let added = c * (d + dv) + 4 * d * dv;
        match (self.read, self.rule) {
            (Read::Total, _) => 4 * d * dv,
            (_, Rule::Add) => added,
            (_, Rule::Delta) => added + c * (2 * d + dv) + 2 * d * dv,
            // Two left and two right sides of scores, and corrections besides values.
            (_, Rule::LowRank) => added + c * (4 * d + 3 * dv) + 4 * d * dv,
        }
    }
}

#[cfg(test)]
mod tests;
