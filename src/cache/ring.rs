//! The first tokens and the last ones, in bounded memory.
//!
//! "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM,
//! arXiv 2309.17453): a sequence keeps its first `sinks` tokens and its last
//! `recent` ones; a token in between is forgotten when the ring comes round to
//! its row. Nothing is moved, and no sequence is ever full. What attention sees
//! are the kept tokens in order, `0..len` with `len <= sinks + recent`.
//!
//! Positions are those in the cache. Distances between recent tokens are what
//! they were, so keys that were rotated by their true positions serve a window
//! without sinks as they are. Sinks come nearer: give the cache keys that are
//! not rotated and a [`Rope`] ([`Ring::with_rope`]), which turns each key to its
//! place in the cache as it is read; the query of the newest token is rotated to
//! `len - 1`. Places never exceed `sinks + recent`.
//!
//! With `sinks = 0` and a chunk of `n` queries after its tokens are appended,
//! the first of them sees `recent - n + 1` tokens: take `recent` so much larger
//! than the window and a [`Window`](crate::mask::Window) as the mask.
//!
//! [Compensated](Ring::compensated) (RazorAttention, arXiv 2407.15891, for heads
//! that do not retrieve), a ring also keeps the mean key and the mean value of
//! the tokens that it dropped, which dense attention reads as one more token of
//! weight `N`, the number of them:
//!
//! ```text
//! o = (N exp(scale q . k') v' + sum_j exp(s_j) v_j) / (N exp(scale q . k') + sum_j exp(s_j))
//! k' <- k' + (k - k') / (N + 1) for each token that is dropped; v' likewise
//! ```
//!
//! Layout: `[sequences, kv_heads, sinks + recent, dim]`, keys and values apart.
//! A turned key costs `3 head_dim` flops a read, and the table `head_dim`
//! numbers a place.

use ndarray::{Array3, Array4, ArrayView4, Axis, s};

use super::format::Format;
use super::rows::{self, Placed, Planes};
use super::{Append, Cache, KvShape, check_sequence, check_truncation};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Sequence, filled};
use crate::keys::source::{At, KvSource};
use crate::math::rope::{Rope, Turns};
use crate::simd::any::AnyRows;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

/// A cache of the first and the last tokens.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, KvShape, Ring};
/// use ndarray::Array3;
///
/// let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64 };
/// let mut cache = Ring::<f32>::new(shape, 1, 4, 100)?;
/// let k = Array3::<f32>::ones((2, 1000, 64));
/// cache.append(0, k.view(), k.view())?;
/// assert_eq!((cache.lengths(), cache.seen(0)?), (&[104][..], 1000));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Ring<K: Format = f32, V: Format = K> {
    shape: KvShape,
    sinks: usize,
    recent: usize,
    /// Tokens that were appended, and those of them that are kept.
    seen: Vec<usize>,
    lengths: Vec<usize>,
    planes: Planes<K::Keys, V::Values>,
    turns: Option<Turns>,
    means: Option<Means>,
    isa: Isa,
}

/// Means of the keys and values of dropped tokens.
#[derive(Clone, Debug)]
pub struct Means {
    /// `[sequences, kv_heads, 1, dim]`
    pub(crate) k: Array4<f32>,
    pub(crate) v: Array4<f32>,
    /// Logarithms of how many they are, `[sequences, kv_heads, 1]`.
    pub(crate) log_weights: Array3<f32>,
    /// What a token is read into.
    room: [Vec<f32>; 2],
}

impl Means {
    /// Of no tokens.
    pub(super) fn none(shape: KvShape, sequences: usize) -> Result<Self> {
        let KvShape { kv_heads: heads, head_dim, value_dim } = shape;
        Ok(Self {
            k: filled("head_dim", (sequences, heads, 1, head_dim), 0.0)?,
            v: filled("value_dim", (sequences, heads, 1, value_dim), 0.0)?,
            log_weights: filled("sequences", (sequences, heads, 1), f32::NEG_INFINITY)?,
            room: [vec![0.0; head_dim], vec![0.0; value_dim]],
        })
    }
}

impl<K: Format, V: Format> Ring<K, V> {
    /// An empty cache of so many sequences, each of which keeps its first
    /// `sinks` and its last `recent` tokens.
    ///
    /// # Errors
    /// [`Error::Value`] for no recent token and where there is no memory,
    /// [`Error::Isa`] where [`ISA_VARIABLE`](crate::ISA_VARIABLE) names an
    /// instruction set that the CPU lacks.
    pub fn new(shape: KvShape, sequences: usize, sinks: usize, recent: usize) -> Result<Self> {
        if recent == 0 {
            return Err(Error::value("recent", "at least 1 token", 0));
        }
        let rows = sinks.checked_add(recent).and_then(|rows| rows.checked_mul(shape.kv_heads));
        let rows = rows.and_then(|rows| rows.checked_mul(sequences));
        let planes = Planes::zeroed("recent", rows, [shape.head_dim, shape.value_dim])?;
        let empty = super::empty("sequences", sequences, 0)?;
        let isa = Isa::choose(None)?;
        Ok(Self {
            shape,
            sinks,
            recent,
            seen: empty.clone(),
            lengths: empty,
            planes,
            turns: None,
            means: None,
            isa,
        })
    }

    /// The same for keys that are not rotated yet: each is turned to its place
    /// in the cache as it is read.
    ///
    /// # Errors
    /// [`Error::Value`] for a rotation of more elements than a key has,
    /// [`Error::Conflict`] for a compensated ring.
    pub fn with_rope(self, rope: &Rope) -> Result<Self> {
        if self.means.is_some() {
            return Err(Error::Conflict { option: "with_rope", with: "compensated", reason: TURNED });
        }
        if rope.dim() > self.shape.head_dim {
            let expected = format!("a rotation of at most the {} elements of a key", self.shape.head_dim);
            return Err(Error::value("rope", expected, rope.dim()));
        }
        let positions: Vec<isize> = (0..self.capacity() as isize).collect();
        Ok(Self { turns: Some(Turns::new(rope, &positions)), ..self })
    }

    /// The same with the mean of dropped tokens as one more token of as much
    /// weight. Few queries over it are packed as many are, which reads the ring
    /// twice.
    ///
    /// # Errors
    /// [`Error::Conflict`] for a ring that turns keys, and
    /// [`Error::TooLarge`](crate::Error::TooLarge) where there is no memory.
    pub fn compensated(self) -> Result<Self> {
        if self.turns.is_some() {
            return Err(Error::Conflict { option: "compensated", with: "with_rope", reason: TURNED });
        }
        let means = Means::none(self.shape, self.lengths.len())?;
        Ok(Self { means: Some(means), ..self })
    }

    /// Takes up in the means the `n` oldest tokens that are no sinks.
    fn drop_oldest(&mut self, sequence: usize, n: usize) {
        let Some(mut means) = self.means.take() else { return };
        let before = self.seen[sequence] - self.lengths[sequence];
        let there = Sequence { index: 0, batch: 0, slot: sequence, queries: 0..0, keys: 0..0 };
        for i in 0..n {
            let token = self.sinks + i;
            let count = (before + i + 1) as f32;
            for head in 0..self.shape.kv_heads {
                let at = At { sequence: &there, kv_head: head, keys: token..token + 1 };
                let [k, v] = &mut means.room;
                let rows = [self.keys(self.isa, &at, k), self.values(self.isa, &at, v)];
                for (rows, mean) in rows.into_iter().zip([&mut means.k, &mut means.v]) {
                    let mut mean = mean.slice_mut(s![sequence, head, 0, ..]);
                    // A row of an array that was just made.
                    let mean = mean.as_slice_mut().unwrap_or_default();
                    self.isa.dispatch(Approach { mean, row: rows, count });
                }
                means.log_weights[[sequence, head, 0]] = count.ln();
            }
        }
        self.means = Some(means);
    }

    /// Means of no tokens.
    fn no_means(&mut self, sequence: usize) {
        if let Some(means) = &mut self.means {
            means.k.index_axis_mut(Axis(0), sequence).fill(0.0);
            means.v.index_axis_mut(Axis(0), sequence).fill(0.0);
            means.log_weights.index_axis_mut(Axis(0), sequence).fill(f32::NEG_INFINITY);
        }
    }

    /// Tokens that were appended to a sequence since it was empty.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have.
    pub fn seen(&self, sequence: usize) -> Result<usize> {
        check_sequence("sequence", sequence, &self.lengths)?;
        Ok(self.seen[sequence])
    }

    /// The row of the first token of a head.
    fn first(&self, sequence: usize, head: usize) -> usize {
        (sequence * self.shape.kv_heads + head) * (self.sinks + self.recent)
    }
}

const TURNED: &str = "the tokens that a mean stands for have no one position";

/// `mean += (row - mean) / count`
struct Approach<'a, 'b> {
    mean: &'a mut [f32],
    row: AnyRows<'b>,
    count: f32,
}

impl Kernel for Approach<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.mean.len();
        for (v, mean) in self.mean.chunks_mut(S::LANES).enumerate() {
            let first = v * S::LANES;
            let mut row = [0.0; MAX_LANES];
            let part = self.row.columns(first..(first + S::LANES).min(cols));
            part.pack_rows(s, &mut row[..mean.len()], mean.len());
            let old = s.load_tail(mean);
            let step = s.div(s.sub(s.load(&row), old), s.splat(self.count));
            s.store_tail(mean, s.add(old, step));
        }
    }
}

impl<K: Format, V: Format> Placed for Ring<K, V> {
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
    fn turns(&self) -> Option<&Turns> {
        self.turns.as_ref()
    }

    fn run(&self, sequence: usize, head: usize, token: usize, _: usize) -> (usize, usize) {
        let (first, left) = (self.first(sequence, head), self.lengths[sequence].saturating_sub(token));
        if token < self.sinks {
            return (first + token, left.min(self.sinks - token));
        }
        // Among all tokens that were seen.
        let at = (token - self.sinks) + (self.seen[sequence] - self.lengths[sequence]);
        let at = at % self.recent;
        (first + self.sinks + at, left.min(self.recent - at))
    }

    fn fits(&self, sequences: &[usize], n: usize) -> Result<()> {
        let longest = sequences.iter().map(|&sequence| self.seen[sequence]).max().unwrap_or(0);
        if longest.checked_add(n).is_none() {
            return Err(Error::value("k", "a number of tokens that can be counted", n));
        }
        Ok(())
    }

    fn grow(&mut self, sequences: &[usize], n: usize) -> Result<()> {
        for &sequence in sequences {
            self.seen[sequence] += n;
            self.lengths[sequence] = self.seen[sequence].min(self.sinks + self.recent);
        }
        Ok(())
    }
}

impl<K: Format, V: Format> Cache for Ring<K, V> {
    fn source(&self) -> &dyn KvSource {
        self
    }
    fn summary(&self) -> Option<&Means> {
        self.means.as_ref()
    }
    fn shape(&self) -> KvShape {
        self.shape
    }
    fn lengths(&self) -> &[usize] {
        &self.lengths
    }
    /// The most that are kept: a sequence may grow without end.
    fn capacity(&self) -> usize {
        self.sinks + self.recent
    }
    fn bytes(&self) -> usize {
        let means =
            self.means.as_ref().map_or(0, |means| means.k.len() + means.v.len() + means.log_weights.len());
        let turns = self.turns.as_ref().map_or(0, Turns::bytes);
        self.planes.bytes() + turns + means * size_of::<f32>()
    }
    fn token_bytes(&self) -> usize {
        rows::token_bytes(self)
    }

    /// Refuses a sequence that has forgotten tokens, unless all of it is to be
    /// forgotten: the ones that were there would not come back.
    fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        self.check_truncate(sequence, len)?;
        if len < self.lengths[sequence] {
            (self.seen[sequence], self.lengths[sequence]) = (len, len);
            self.no_means(sequence);
        }
        Ok(())
    }

    fn check_truncate(&self, sequence: usize, len: usize) -> Result<()> {
        check_truncation(sequence, len, &self.lengths)?;
        let (seen, kept) = (self.seen[sequence], self.lengths[sequence]);
        if seen > kept && len > 0 && len < kept {
            let expected = format!("0 or {kept}: tokens of the sequence have been forgotten");
            return Err(Error::value("len", expected, len));
        }
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
        (self.seen[to], self.lengths[to]) = (self.seen[from], self.lengths[from]);
        if let Some(Means { k, v, log_weights, .. }) = self.means.as_mut().filter(|_| from != to) {
            for x in [k, v] {
                let (source, mut target) = x.multi_slice_mut((s![from, .., .., ..], s![to, .., .., ..]));
                target.assign(&source);
            }
            let (source, mut target) = log_weights.multi_slice_mut((s![from, .., ..], s![to, .., ..]));
            target.assign(&source);
        }
        Ok(())
    }
}

impl<K: Format, V: Format> Append for Ring<K, V> {
    /// Never full.
    fn append_each<T: Element>(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
    ) -> Result<()> {
        rows::check_append(self.shape, &self.lengths, sequences, &k, &v)?;
        let n = k.dim().2;
        self.fits(sequences, n)?;
        // Piece by piece, so that none overwrites its own tokens.
        for (i, &sequence) in sequences.iter().enumerate() {
            let mut done = 0;
            while done < n {
                let to_sinks = self.sinks.saturating_sub(self.seen[sequence]);
                let end = (done + if to_sinks > 0 { to_sinks } else { self.recent }).min(n);
                let full = self.lengths[sequence] + (end - done);
                self.drop_oldest(sequence, full.saturating_sub(self.capacity()));
                let [k, v] = [&k, &v].map(|x| x.slice(s![i..i + 1, .., done..end, ..]));
                rows::append(self, &[sequence], k, v)?;
                done = end;
            }
        }
        Ok(())
    }

    fn check_room(&self, sequences: &[usize], tokens: usize) -> Result<()> {
        rows::check_fits(self, sequences, tokens)
    }
}
