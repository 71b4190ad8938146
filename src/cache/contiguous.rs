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

use ndarray::ArrayView4;

use super::format::Format;
use super::rows::{self, Placed, Planes};
use super::{Append, Cache, KvShape, check_sequence, check_truncation};
use crate::element::Element;
use crate::error::Result;
use crate::keys::source::KvSource;
use crate::simd::Isa;

/// A cache with one region for each sequence, keys in format `K` and values in
/// format `V`.
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
pub struct Contiguous<K: Format = f32, V: Format = K> {
    shape: KvShape,
    capacity: usize,
    lengths: Vec<usize>,
    planes: Planes<K::Keys, V::Values>,
    isa: Isa,
}

impl<K: Format, V: Format> Contiguous<K, V> {
    /// An empty cache of so many sequences, each of at most `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) where there is no memory for it,
    /// [`Error::Isa`](crate::Error::Isa) where [`ISA_VARIABLE`](crate::ISA_VARIABLE)
    /// names an instruction set that the CPU lacks.
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
        let planes = Planes::zeroed("capacity", rows, [shape.head_dim, value_columns])?;
        let isa = Isa::choose(None)?;
        Ok(Self { shape, capacity, lengths: super::empty("sequences", sequences, 0)?, planes, isa })
    }

    /// The row of the first token of a head.
    fn first(&self, sequence: usize, head: usize) -> usize {
        (sequence * self.shape.kv_heads + head) * self.capacity
    }
}

impl<K: Format, V: Format> Placed for Contiguous<K, V> {
    type Keys = K::Keys;
    type Values = V::Values;

    fn kv_shape(&self) -> KvShape {
        self.shape
    }
    fn tokens(&self) -> &[usize] {
        &self.lengths
    }
    fn isa(&self) -> Isa {
        self.isa
    }
    fn planes(&self) -> &Planes<K::Keys, V::Values> {
        &self.planes
    }
    fn planes_mut(&mut self) -> &mut Planes<K::Keys, V::Values> {
        &mut self.planes
    }

    fn run(&self, sequence: usize, head: usize, token: usize, _: usize) -> (usize, usize) {
        (self.first(sequence, head) + token, self.lengths[sequence].saturating_sub(token))
    }

    fn fits(&self, sequences: &[usize], n: usize) -> Result<()> {
        sequences
            .iter()
            .try_for_each(|&sequence| rows::check_room(sequence, n, self.capacity - self.lengths[sequence]))
    }

    fn grow(&mut self, sequences: &[usize], n: usize) -> Result<()> {
        self.fits(sequences, n)?;
        for &sequence in sequences {
            self.lengths[sequence] += n;
        }
        Ok(())
    }
}

impl<K: Format, V: Format> Cache for Contiguous<K, V> {
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
        self.planes.bytes()
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
            self.planes.copy(source, target, self.lengths[from]);
        }
        self.lengths[to] = self.lengths[from];
        Ok(())
    }
}

impl<K: Format, V: Format> Append for Contiguous<K, V> {
    fn append_each<T: Element>(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
    ) -> Result<()> {
        rows::append(self, sequences, k, v)
    }

    fn check_room(&self, sequences: &[usize], tokens: usize) -> Result<()> {
        rows::check_fits(self, sequences, tokens)
    }
}
