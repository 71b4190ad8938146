//! Heads that remember differently: a cache for each group of them.
//!
//! DuoAttention (arXiv 2410.10819) keeps every token for the heads that look far
//! back, and first and last ones for the others; Task-KV (arXiv 2501.15113) chooses
//! the former anew for each prompt; RazorAttention (arXiv 2407.15891) gives the
//! others the mean of what they drop. Each is a [`ByHead`] of the caches of this
//! module: which heads are of which kind is the caller's.
//!
//! A sequence has as many tokens as the head that holds most of them. Attention sees
//! the tokens of any other head as the last ones of the sequence, and none before: a
//! causal mask, which puts the last query at the last key, means for each head what
//! it means for its cache alone. All heads are read in one call.
//!
//! Where caches forget, a chunk of queries after its tokens were appended sees what is
//! left of them: see [`Ring`](super::Ring).

use ndarray::{Array4, ArrayView4, Axis, s};

use super::ring::Means;
use super::{Append, Cache, KvShape, check_sequence, check_truncation, rows};
use crate::element::Element;
use crate::engine::recur::copy_rows;
use crate::error::{Error, Result};
use crate::input::filled;
use crate::keys::source::{At, KvSource};
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::Rows;

/// A cache that some heads have to themselves, whatever it is.
trait Own: Cache {
    fn room_for(&self, sequences: &[usize], tokens: usize) -> Result<()>;

    /// Every format rounds what was widened as what was not.
    fn append_wide(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, f32>,
        v: ArrayView4<'_, f32>,
    ) -> Result<()>;
}

impl<C: Append> Own for C {
    fn room_for(&self, sequences: &[usize], tokens: usize) -> Result<()> {
        self.check_room(sequences, tokens)
    }

    fn append_wide(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, f32>,
        v: ArrayView4<'_, f32>,
    ) -> Result<()> {
        self.append_each(sequences, k, v)
    }
}

/// Some heads and their cache.
#[derive(Debug)]
struct Part {
    heads: Vec<usize>,
    cache: Box<dyn Own>,
}

/// A cache that consists of others, one for each group of heads.
///
/// ```
/// use attention_kernels::cache::{Append, ByHead, Cache, Cached, Contiguous, KvShape, Ring};
/// use attention_kernels::{Attention, dense::Dense};
/// use ndarray::Array4;
///
/// // Heads 0 and 2 remember everything, the others 4 sinks and the last 60 tokens.
/// let of = |kv_heads| KvShape { kv_heads, head_dim: 64, value_dim: 64 };
/// let mut cache = ByHead::builder()
///     .heads(&[0, 2], Contiguous::<f32>::new(of(2), 1, 4096)?)
///     .heads(&[1, 3, 4], Ring::<f32>::new(of(3), 1, 4, 60)?)
///     .build()?;
/// let k = Array4::<f32>::ones((1, 5, 1000, 64));
/// cache.append_each(&[0], k.view(), k.view())?;
/// assert_eq!((cache.lengths(), cache.held(0, 1)?), (&[1000][..], 64));
///
/// let q = Array4::<f32>::ones((1, 15, 1, 64));
/// let out = Dense::builder().causal().build()?.forward(Cached::new(q.view(), &cache))?;
/// assert_eq!(out.dim(), (1, 15, 1, 64));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Debug)]
pub struct ByHead {
    shape: KvShape,
    parts: Vec<Part>,
    /// For each head its part, and which of that part's heads it is.
    places: Vec<(usize, usize)>,
    lengths: Vec<usize>,
    /// How many of the first tokens a head lacks, `[sequences, kv_heads]`.
    missing: Vec<usize>,
    /// Of the heads whose caches have one.
    means: Option<Means>,
    isa: Isa,
}

/// Builds a [`ByHead`].
#[derive(Debug, Default)]
pub struct ByHeadBuilder {
    parts: Vec<Part>,
}

impl ByHeadBuilder {
    /// Gives these heads a cache, which is empty and has as many, in this order.
    pub fn heads<C: Append + 'static>(mut self, heads: &[usize], cache: C) -> Self {
        self.parts.push(Part { heads: heads.to_vec(), cache: Box::new(cache) });
        self
    }

    /// Puts the heads together.
    ///
    /// # Errors
    /// [`Error::Value`] where heads are not `0..kv_heads`, each of them once, for
    /// caches of other numbers of heads, elements or sequences and for ones that are
    /// not empty, [`Error::Isa`] where [`ISA_VARIABLE`](crate::ISA_VARIABLE) names an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<ByHead> {
        // A group of no heads has nothing to say.
        let parts: Vec<Part> = self.parts.into_iter().filter(|part| !part.heads.is_empty()).collect();
        let kv_heads = parts.iter().map(|part| part.heads.len()).sum();
        let Some(first) = parts.first() else {
            return Err(Error::value("heads", "at least one head", 0));
        };
        let (shape, sequences) = (KvShape { kv_heads, ..first.cache.shape() }, first.cache.lengths().len());
        let mut places = vec![None; kv_heads];
        for (i, part) in parts.iter().enumerate() {
            let own = KvShape { kv_heads: part.heads.len(), ..shape };
            if part.cache.shape() != own || part.cache.lengths() != vec![0; sequences] {
                let expected = format!("an empty cache of {sequences} sequences and {own:?}");
                let (shape, lengths) = (part.cache.shape(), part.cache.lengths());
                return Err(Error::value(
                    "cache",
                    expected,
                    format_args!("{shape:?} of lengths {lengths:?}"),
                ));
            }
            for (own, &head) in part.heads.iter().enumerate() {
                match places.get_mut(head) {
                    Some(place @ None) => *place = Some((i, own)),
                    _ => {
                        let expected = format!("each head below {kv_heads} once");
                        return Err(Error::value("heads", expected, head));
                    }
                }
            }
        }
        let means = if parts.iter().any(|part| part.cache.summary().is_some()) {
            Some(Means::none(shape, sequences)?)
        } else {
            None
        };
        let missing = filled("heads", sequences * kv_heads, 0)?.into_raw_vec_and_offset().0;
        let lengths = super::empty("sequences", sequences, 0)?;
        let places = places.into_iter().flatten().collect();
        Ok(ByHead { shape, parts, places, lengths, missing, means, isa: Isa::choose(None)? })
    }
}

impl ByHead {
    /// Of no heads yet.
    pub fn builder() -> ByHeadBuilder {
        ByHeadBuilder::default()
    }

    /// Tokens that a head holds of a sequence.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence or a head that the cache does not have.
    pub fn held(&self, sequence: usize, head: usize) -> Result<usize> {
        check_sequence("sequence", sequence, &self.lengths)?;
        if head >= self.shape.kv_heads {
            let expected = format!("one of the {} heads of the cache", self.shape.kv_heads);
            return Err(Error::value("head", expected, head));
        }
        Ok(self.lengths[sequence] - self.missing[sequence * self.shape.kv_heads + head])
    }

    /// Takes over what the caches have of a sequence now.
    fn refresh(&mut self, sequence: usize) {
        let kv_heads = self.shape.kv_heads;
        let len = self.parts.iter().map(|part| part.cache.lengths()[sequence]).max().unwrap_or(0);
        self.lengths[sequence] = len;
        for (head, &(part, own)) in self.places.iter().enumerate() {
            let Part { heads, cache } = &self.parts[part];
            let inside = cache.missing().map_or(0, |missing| missing[sequence * heads.len() + own]);
            self.missing[sequence * kv_heads + head] = len - cache.lengths()[sequence] + inside;
            if let (Some(to), Some(from)) = (&mut self.means, cache.summary()) {
                to.k.slice_mut(s![sequence, head, .., ..]).assign(&from.k.slice(s![sequence, own, .., ..]));
                to.v.slice_mut(s![sequence, head, .., ..]).assign(&from.v.slice(s![sequence, own, .., ..]));
                to.log_weights[[sequence, head, 0]] = from.log_weights[[sequence, own, 0]];
            }
        }
    }

    /// The cache of a head, its place there, and the tokens that it lacks.
    fn of(&self, at: &At<'_>) -> (&dyn Own, usize, usize) {
        let (part, own) = self.places[at.kv_head];
        let missing = self.missing[at.sequence.slot * self.shape.kv_heads + at.kv_head];
        // A cache inside that has heads of its own counts tokens as the longest does.
        let cache = &*self.parts[part].cache;
        let inside = cache
            .missing()
            .map_or(0, |missing| missing[at.sequence.slot * self.parts[part].heads.len() + own]);
        (cache, own, missing - inside)
    }

    /// Rows of one side: where they lie if all are there, else behind zeros.
    fn read<'r>(&'r self, isa: Isa, at: &At<'_>, side: Side, room: &'r mut [f32]) -> AnyRows<'r> {
        let ((cache, kv_head, missing), keys) = (self.of(at), at.keys.clone());
        let own = |from: usize, to: usize| At { sequence: at.sequence, kv_head, keys: from..to };
        if keys.start >= missing || keys.is_empty() {
            let first = keys.start.saturating_sub(missing);
            return side.read(cache, isa, &own(first, first + keys.len()), room);
        }
        let cols = side.cols(self.shape);
        let hidden = missing.min(keys.end) - keys.start;
        let (zeros, rest) = room[..keys.len() * cols].split_at_mut(hidden * cols);
        for (i, row) in rest.chunks_exact_mut(cols.max(1)).enumerate() {
            // The last row of zeros is room for what must be unpacked.
            let (_, unpacked) = zeros.split_at_mut((hidden - 1) * cols);
            copy_rows(isa, side.read(cache, isa, &own(i, i + 1), unpacked), row, cols);
        }
        zeros.fill(0.0);
        AnyRows::F32(Rows::of_slice(room, keys.len(), cols, cols))
    }
}

/// Keys or values.
#[derive(Clone, Copy)]
enum Side {
    Keys,
    Values,
}

impl Side {
    fn cols(self, shape: KvShape) -> usize {
        match self {
            Self::Keys => shape.head_dim,
            Self::Values => shape.value_dim,
        }
    }

    fn read<'r>(self, cache: &'r dyn Own, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        match self {
            Self::Keys => cache.keys(isa, at, room),
            Self::Values => cache.values(isa, at, room),
        }
    }
}

impl KvSource for ByHead {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.read(isa, at, Side::Keys, room)
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.read(isa, at, Side::Values, room)
    }

    fn stretch(&self, at: &At<'_>) -> usize {
        let (cache, kv_head, missing) = self.of(at);
        match at.keys.start.checked_sub(missing) {
            // Zeros and what follows them are unpacked alike.
            None => at.keys.len(),
            Some(first) => {
                cache.stretch(&At { sequence: at.sequence, kv_head, keys: first..first + at.keys.len() })
            }
        }
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        let (cache, kv_head, missing) = self.of(at);
        match at.keys.start.checked_sub(missing) {
            None => [(std::ptr::null(), 0); 2],
            Some(first) => {
                cache.ahead(&At { sequence: at.sequence, kv_head, keys: first..first + at.keys.len() })
            }
        }
    }

    /// Of the cache that takes most.
    fn row_bytes(&self) -> [usize; 2] {
        let each = self.parts.iter().map(|part| part.cache.row_bytes());
        each.fold([0; 2], |[k, v], [key, value]| [k.max(key), v.max(value)])
    }
}

impl Cache for ByHead {
    fn source(&self) -> &dyn KvSource {
        self
    }
    fn summary(&self) -> Option<&Means> {
        self.means.as_ref()
    }
    fn missing(&self) -> Option<&[usize]> {
        Some(&self.missing)
    }
    fn shape(&self) -> KvShape {
        self.shape
    }
    fn lengths(&self) -> &[usize] {
        &self.lengths
    }
    /// That of the heads which can hold most.
    fn capacity(&self) -> usize {
        self.parts.iter().map(|part| part.cache.capacity()).max().unwrap_or(0)
    }
    fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.cache.bytes()).sum()
    }
    /// Of a token that every head holds.
    fn token_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.cache.token_bytes()).sum()
    }

    /// Refuses where a head has forgotten tokens, unless all of the sequence is to be
    /// forgotten: they would not come back.
    fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        check_truncation(sequence, len, &self.lengths)?;
        let now = self.lengths[sequence];
        let own = sequence * self.shape.kv_heads..(sequence + 1) * self.shape.kv_heads;
        if len == now {
            return Ok(());
        }
        if len > 0 && self.missing[own].iter().any(|&missing| missing > 0) {
            let expected = format!("0 or {now}: some heads have forgotten tokens of the sequence");
            return Err(Error::value("len", expected, len));
        }
        // A cache may refuse what others did: they are asked first.
        for part in &self.parts {
            part.cache.check_truncate(sequence, len)?;
        }
        for part in &mut self.parts {
            part.cache.truncate(sequence, len)?;
        }
        self.refresh(sequence);
        Ok(())
    }

    fn check_truncate(&self, sequence: usize, len: usize) -> Result<()> {
        check_truncation(sequence, len, &self.lengths)?;
        self.parts.iter().try_for_each(|part| part.cache.check_truncate(sequence, len))
    }

    /// As each of the caches does.
    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        check_sequence("from", from, &self.lengths)?;
        check_sequence("to", to, &self.lengths)?;
        for part in &mut self.parts {
            part.cache.fork(from, to)?;
        }
        self.refresh(to);
        Ok(())
    }
}

impl Append for ByHead {
    fn check_room(&self, sequences: &[usize], tokens: usize) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.cache.room_for(sequences, tokens))
    }

    /// Full as soon as one of the caches is. Copies the heads of each once.
    fn append_each<T: Element>(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
    ) -> Result<()> {
        rows::check_append(self.shape, &self.lengths, sequences, &k, &v)?;
        self.check_room(sequences, k.dim().2)?;
        for part in &mut self.parts {
            let of_heads = |x: &ArrayView4<'_, T>| -> Result<Array4<f32>> {
                let (_, _, n, dim) = x.dim();
                let mut own = filled("k", (sequences.len(), part.heads.len(), n, dim), 0f32)?;
                for (mut own, x) in own.outer_iter_mut().zip(x.outer_iter()) {
                    for (mut own, &head) in own.outer_iter_mut().zip(&part.heads) {
                        let rows = Rows::from(x.index_axis(Axis(0), head));
                        // A row after the other, for it was just made.
                        let to = own.as_slice_mut().unwrap_or_default();
                        copy_rows(self.isa, T::any_rows(rows), to, dim);
                    }
                }
                Ok(own)
            };
            let (k, v) = (of_heads(&k)?, of_heads(&v)?);
            part.cache.append_wide(sequences, k.view(), v.view())?;
        }
        sequences.iter().for_each(|&sequence| self.refresh(sequence));
        Ok(())
    }
}
