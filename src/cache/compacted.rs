//! Some tokens of each head, by lists of what is kept.
//!
//! What a policy decides (heavy hitters, an observation window, retrieval
//! heads): every head keeps tokens of its own, the others' rows are overwritten,
//! and attention sees the kept ones in order. Their positions are remembered;
//! keys keep the rotation of theirs. All heads of a sequence keep equally many.
//!
//! Layout and cost are those of [`Contiguous`]; keeping `n` of a sequence's
//! tokens moves at most `n` rows a head.

use ndarray::{ArrayView2, ArrayView4, Axis};

use super::contiguous::Contiguous;
use super::format::Format;
use super::rows::{Placed, Planes};
use super::{Append, Cache, KvShape, check_sequence, check_truncation};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::keys::source::KvSource;
use crate::simd::Isa;

/// A cache of the tokens that a policy keeps.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, Compacted, KvShape};
/// use ndarray::{Array3, array};
///
/// let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64 };
/// let mut cache = Compacted::<f32>::new(shape, 1, 100)?;
/// let k = Array3::<f32>::ones((2, 50, 64));
/// cache.append(0, k.view(), k.view())?;
/// cache.keep(0, array![[0, 10, 49], [7, 48, 49]].view())?;
/// assert_eq!((cache.lengths(), cache.positions(0, 1)?), (&[3][..], &[7, 48, 49][..]));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Compacted<K: Format = f32, V: Format = K> {
    cache: Contiguous<K, V>,
    /// Those of the kept tokens, for each sequence and head.
    positions: Vec<Vec<usize>>,
    /// Tokens that were appended to each sequence.
    seen: Vec<usize>,
}

impl<K: Format, V: Format> Compacted<K, V> {
    /// An empty cache of so many sequences, each of at most `capacity` tokens at
    /// a time.
    ///
    /// # Errors
    /// As [`Contiguous::new`].
    pub fn new(shape: KvShape, sequences: usize, capacity: usize) -> Result<Self> {
        let cache = Contiguous::new(shape, sequences, capacity)?;
        let lists = sequences.saturating_mul(shape.kv_heads);
        let positions = super::empty("sequences", lists, Vec::new())?;
        Ok(Self { cache, positions, seen: super::empty("sequences", sequences, 0)? })
    }

    /// The positions of the kept tokens of a head, ascending.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence or a head that the cache does not have.
    pub fn positions(&self, sequence: usize, head: usize) -> Result<&[usize]> {
        check_sequence("sequence", sequence, self.lengths())?;
        let heads = self.shape().kv_heads;
        if head >= heads {
            return Err(Error::value("head", format!("one of the {heads} heads of the cache"), head));
        }
        Ok(&self.positions[sequence * heads + head])
    }

    /// Keeps these tokens of a sequence, `[kv_heads, n]`, and forgets the
    /// others. Tokens are counted among those that are there now, `0..len`, and
    /// named in ascending order.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have and for
    /// lists that do not ascend or name a token that is not there,
    /// [`Error::Shape`] for another number of heads. Nothing has changed then.
    pub fn keep(&mut self, sequence: usize, kept: ArrayView2<'_, usize>) -> Result<()> {
        check_sequence("sequence", sequence, self.lengths())?;
        let (heads, len) = (self.shape().kv_heads, self.lengths()[sequence]);
        if kept.nrows() != heads {
            return Err(Error::shape("kept", format!("[kv_heads, n] = [{heads}, _]"), kept.shape()));
        }
        for list in kept.rows() {
            if let Some(token) = list.iter().find(|&&token| token >= len) {
                return Err(Error::value("kept", format!("tokens below {len}"), token));
            }
            let pairs = list.iter().zip(list.iter().skip(1));
            if let Some((a, b)) = pairs.into_iter().find(|(a, b)| a >= b) {
                return Err(Error::value("kept", "ascending tokens", format_args!("{b} after {a}")));
            }
        }
        for (head, list) in kept.axis_iter(Axis(0)).enumerate() {
            for (to, &from) in list.iter().enumerate().filter(|&(to, &from)| to != from) {
                let [(from, _), (to, _)] = [from, to].map(|token| self.cache.run(sequence, head, token, 1));
                self.cache.planes_mut().copy(from, to, 1);
            }
            let positions = &mut self.positions[sequence * heads + head];
            *positions = list.iter().map(|&token| positions[token]).collect();
        }
        self.cache.truncate(sequence, kept.ncols())
    }
}

impl<K: Format, V: Format> Placed for Compacted<K, V> {
    type Keys = K::Keys;
    type Values = V::Values;

    fn kv_shape(&self) -> KvShape {
        self.cache.kv_shape()
    }
    fn tokens(&self) -> &[usize] {
        self.cache.tokens()
    }
    fn isa(&self) -> Isa {
        self.cache.isa()
    }
    fn planes(&self) -> &Planes<K::Keys, V::Values> {
        self.cache.planes()
    }
    fn planes_mut(&mut self) -> &mut Planes<K::Keys, V::Values> {
        self.cache.planes_mut()
    }
    fn run(&self, sequence: usize, head: usize, token: usize, enough: usize) -> (usize, usize) {
        self.cache.run(sequence, head, token, enough)
    }
    fn fits(&self, sequences: &[usize], n: usize) -> Result<()> {
        self.cache.fits(sequences, n)
    }
    fn grow(&mut self, sequences: &[usize], n: usize) -> Result<()> {
        self.cache.grow(sequences, n)
    }
}

impl<K: Format, V: Format> Cache for Compacted<K, V> {
    fn source(&self) -> &dyn KvSource {
        self
    }
    fn shape(&self) -> KvShape {
        self.cache.shape()
    }
    fn lengths(&self) -> &[usize] {
        self.cache.lengths()
    }
    fn capacity(&self) -> usize {
        self.cache.capacity()
    }
    fn bytes(&self) -> usize {
        self.cache.bytes()
    }
    fn token_bytes(&self) -> usize {
        self.cache.token_bytes()
    }

    /// Forgets kept tokens from the `len`-th on; new ones go on from the last
    /// position of the first that is forgotten.
    fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        check_truncation(sequence, len, self.lengths())?;
        self.cache.truncate(sequence, len)?;
        let heads = self.shape().kv_heads;
        let lists = &mut self.positions[sequence * heads..(sequence + 1) * heads];
        let next = lists.iter().filter_map(|list| list.get(len)).max();
        self.seen[sequence] = next.copied().unwrap_or(self.seen[sequence]);
        if len == 0 {
            self.seen[sequence] = 0;
        }
        lists.iter_mut().for_each(|list| list.truncate(len));
        Ok(())
    }

    /// Copies the tokens.
    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.cache.fork(from, to)?;
        let heads = self.shape().kv_heads;
        for head in 0..heads {
            self.positions[to * heads + head] = self.positions[from * heads + head].clone();
        }
        self.seen[to] = self.seen[from];
        Ok(())
    }
}

impl<K: Format, V: Format> Append for Compacted<K, V> {
    fn append_each<T: Element>(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
    ) -> Result<()> {
        let (n, heads) = (k.dim().2, self.shape().kv_heads);
        self.cache.append_each(sequences, k, v)?;
        for &sequence in sequences {
            let seen = self.seen[sequence];
            for positions in &mut self.positions[sequence * heads..(sequence + 1) * heads] {
                positions.extend(seen..seen + n);
            }
            self.seen[sequence] += n;
        }
        Ok(())
    }

    fn check_room(&self, sequences: &[usize], tokens: usize) -> Result<()> {
        self.cache.check_room(sequences, tokens)
    }
}
