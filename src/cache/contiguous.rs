//! One region of fixed size for each sequence.
//!
//! Layout: `[sequences, kv_heads, capacity, dim]`, keys and values apart. The
//! tokens of a head lie one after the other, so that attention reads them
//! where they lie and the memory streams. All memory is taken when the cache
//! is made; appending writes the rows of the new tokens and moves nothing.
//!
//! Cost of a token: `kv_heads * (head_dim + value_dim)` elements. A fork
//! copies the sequence: where many sequences share a prefix or their lengths
//! differ much, [`Paged`](super::Paged) takes less memory.

use super::format::Format;
use super::rows::{self, Placed};
use super::{Append, Cache, KvShape, check_sequence, check_truncation};
use crate::error::{Error, Result};
use crate::keys::source::KvSource;
use crate::simd::Isa;

/// A cache with one region for each sequence.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, Contiguous, KvShape};
/// use half::f16;
/// use ndarray::Array3;
///
/// let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 32 };
/// let mut cache = Contiguous::<f16>::new(shape, 4, 8)?; // four sequences of at most 8 tokens
/// let (k, v) = (Array3::<f32>::ones((2, 5, 64)), Array3::<f32>::ones((2, 5, 32)));
/// cache.append(3, k.view(), v.view())?;
/// assert!(cache.append(3, k.view(), v.view()).is_err()); // full, and nothing is lost
/// cache.fork(3, 0)?;
/// cache.truncate(3, 1)?;
/// assert_eq!(cache.lengths(), [5, 0, 0, 1]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Contiguous<F: Format = f32> {
    shape: KvShape,
    capacity: usize,
    lengths: Vec<usize>,
    planes: [F::Rows; 2],
    isa: Isa,
}

impl<F: Format> Contiguous<F> {
    /// An empty cache of so many sequences, each of at most `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Value`] where there is no memory for it, [`Error::Isa`] where
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) names an instruction set
    /// that the CPU lacks.
    pub fn new(shape: KvShape, sequences: usize, capacity: usize) -> Result<Self> {
        Self::with_value_columns(shape, shape.value_dim, sequences, capacity)
    }

    /// The same with rows of values that have so many columns.
    pub(super) fn with_value_columns(
        shape: KvShape,
        value_columns: usize,
        sequences: usize,
        capacity: usize,
    ) -> Result<Self> {
        let rows = sequences.checked_mul(shape.kv_heads).and_then(|heads| heads.checked_mul(capacity));
        let planes = rows::planes("capacity", rows, [shape.head_dim, value_columns])?;
        let isa = Isa::choose(None)?;
        Ok(Self { shape, capacity, lengths: super::empty("sequences", sequences, 0)?, planes, isa })
    }

    /// The row of the first token of a head.
    fn first(&self, sequence: usize, head: usize) -> usize {
        (sequence * self.shape.kv_heads + head) * self.capacity
    }
}

impl<F: Format> Placed for Contiguous<F> {
    type Rows = F::Rows;

    fn kv_shape(&self) -> KvShape {
        self.shape
    }
    fn tokens(&self) -> &[usize] {
        &self.lengths
    }
    fn isa(&self) -> Isa {
        self.isa
    }
    fn planes(&self) -> &[F::Rows; 2] {
        &self.planes
    }
    fn planes_mut(&mut self) -> &mut [F::Rows; 2] {
        &mut self.planes
    }

    fn run(&self, sequence: usize, head: usize, token: usize, _: usize) -> (usize, usize) {
        (self.first(sequence, head) + token, self.lengths[sequence].saturating_sub(token))
    }

    fn grow(&mut self, sequences: &[usize], n: usize) -> Result<()> {
        for &sequence in sequences {
            let free = self.capacity - self.lengths[sequence];
            if n > free {
                let expected = format!("at most the {free} tokens that sequence {sequence} has room for");
                return Err(Error::value("k", expected, format_args!("{n} tokens")));
            }
        }
        for &sequence in sequences {
            self.lengths[sequence] += n;
        }
        Ok(())
    }
}

impl<F: Format> Cache for Contiguous<F> {
    fn source(&self) -> &dyn KvSource {
        self
    }
    fn shape(&self) -> KvShape {
        self.shape
    }
    fn lengths(&self) -> &[usize] {
        &self.lengths
    }
    fn capacity(&self) -> usize {
        self.capacity
    }
    fn bytes(&self) -> usize {
        rows::bytes(self)
    }
    fn token_bytes(&self) -> usize {
        rows::token_bytes(self)
    }

    fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        check_truncation(sequence, len, &self.lengths)?;
        self.lengths[sequence] = len;
        Ok(())
    }

    /// Copies the tokens.
    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        check_sequence("from", from, &self.lengths)?;
        check_sequence("to", to, &self.lengths)?;
        for head in 0..self.shape.kv_heads {
            let (source, target) = (self.first(from, head), self.first(to, head));
            for plane in &mut self.planes {
                rows::RowStore::copy(plane, source, target, self.lengths[from]);
            }
        }
        self.lengths[to] = self.lengths[from];
        Ok(())
    }
}

impl<F: Format> Append for Contiguous<F> {}
