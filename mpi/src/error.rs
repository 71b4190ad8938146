//! What can go wrong among ranks.

use std::time::Duration;

/// The result of a collective call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a collective call was given up: the same on every rank that answers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What one rank brought does not fit.
    #[error("rank {rank}: {message}")]
    Argument {
        /// The lowest rank that is wrong.
        rank: usize,
        /// The argument, what was expected and what came.
        message: String,
    },
    /// A rank did not come to the call in time. The group is of no use afterwards.
    #[error("rank {rank}: expected at {call} within {patience:?}, did not answer")]
    Silent {
        /// The rank.
        rank: usize,
        /// The call.
        call: &'static str,
        /// How long it was waited for.
        patience: Duration,
    },
    /// The group had lost a rank before.
    #[error("rank {rank}: lost in an earlier call, expected a new group")]
    Lost {
        /// The rank.
        rank: usize,
    },
}
