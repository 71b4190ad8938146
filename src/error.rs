//! What can be wrong with a call, said before anything is written.

/// The result of everything that can be refused.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A refusal. It names the argument, what was expected and what came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An array has the wrong shape.
    #[error("{argument}: expected shape {expected}, got {got:?}")]
    Shape {
        /// The array.
        argument: &'static str,
        /// The shape in words, with the names of its axes.
        expected: String,
        /// The shape that came.
        got: Vec<usize>,
    },
    /// Query heads cannot be shared out over key/value heads.
    #[error(
        "q: expected a number of heads that is a multiple of the {kv_heads} key/value heads, got {q_heads}"
    )]
    Heads {
        /// Heads of the queries.
        q_heads: usize,
        /// Heads of the keys and values.
        kv_heads: usize,
    },
    /// A number or a list of numbers is outside its range.
    #[error("{argument}: expected {expected}, got {got}")]
    Value {
        /// The argument.
        argument: &'static str,
        /// What it must be.
        expected: String,
        /// What came.
        got: String,
    },
    /// Sizes that no memory can serve.
    #[error("{argument}: expected sizes that memory has room for, got {got}")]
    TooLarge {
        /// The array, or the workspace.
        argument: &'static str,
        /// The sizes that came, or the bytes that they ask for.
        got: String,
    },
    /// Two options exclude each other.
    #[error("{option} cannot be combined with {with}: {reason}")]
    Conflict {
        /// One option.
        option: &'static str,
        /// The other.
        with: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// An instruction set that this CPU lacks, or that does not exist.
    #[error("{by}: instruction set `{asked}` is not available on this CPU, which has {available}")]
    Isa {
        /// The builder method or environment variable that asked.
        by: &'static str,
        /// The name asked for.
        asked: String,
        /// The names of those that can be had.
        available: String,
    },
}

impl Error {
    /// An [`Error::Value`].
    pub(crate) fn value(
        argument: &'static str,
        expected: impl Into<String>,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Value { argument, expected: expected.into(), got: got.to_string() }
    }

    /// An [`Error::TooLarge`].
    pub(crate) fn too_large(argument: &'static str, got: impl std::fmt::Display) -> Self {
        Self::TooLarge { argument, got: got.to_string() }
    }

    /// An [`Error::Conflict`] of something that has one entry a position with
    /// a packed batch.
    pub(crate) fn packed(option: &'static str) -> Self {
        let reason =
            "positions count from the start of each sequence, and the lengths of the sequences differ";
        Self::Conflict { option, with: "a packed batch", reason }
    }

    /// An [`Error::Shape`].
    pub(crate) fn shape(argument: &'static str, expected: impl Into<String>, got: &[usize]) -> Self {
        Self::Shape { argument, expected: expected.into(), got: got.to_vec() }
    }
}
