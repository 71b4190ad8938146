//! Summaries of all keys of a call: made for it, or kept and extended while
//! decoding.

use std::ops::Range;

use super::score::Candidates;
use super::summary::{CHUNK, Extend};
use super::{Scheme, Source, Summary, coded, rows_of};
use crate::attention::{Dim4, Input};
use crate::cache::{Cache, Cached};
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::workspace::room;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Sequence};
use crate::keys::source::At;
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Arena, Parts, Rows, bytes_for, bytes_for_shares, claim_words};

/// Summaries of the keys of a cache, kept while it grows: appending keys
/// changes the last block alone, and the bits are those of summaries made at
/// once.
///
/// Memory: `width / unit` numbers of `f32` for each key, and a key a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Summaries {
    summary: Summary,
    unit: usize,
    heads: usize,
    head_dim: usize,
    /// Keys of each sequence so far.
    keys: Vec<usize>,
    /// Rows by sequence and head.
    rows: Vec<Vec<f32>>,
    /// Sums of the last block, for a mean.
    sums: Vec<Vec<f32>>,
}

impl Summaries {
    /// Of no keys yet: for `sequences` of `heads` key/value heads of `head_dim`.
    pub(crate) fn new(
        summary: Summary,
        unit: usize,
        sequences: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<Self> {
        let lists = sequences.saturating_mul(heads);
        let mut summaries = Self {
            summary,
            unit,
            heads,
            head_dim,
            keys: filled(sequences, || Ok(0))?,
            rows: filled(lists, || Ok(Vec::new()))?,
            sums: Vec::new(),
        };
        if summary == Summary::Mean {
            summaries.sums = filled(lists, || filled(head_dim, || Ok(0.0)))?;
        }
        Ok(summaries)
    }

    /// Keys of each sequence that it knows.
    pub fn keys(&self) -> &[usize] {
        &self.keys
    }

    /// The summary of a block: channels as [`Summary`] says.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn row(&self, sequence: usize, kv_head: usize, block: usize) -> &[f32] {
        let width = self.summary.width(self.head_dim);
        &self.rows[sequence * self.heads + kv_head][block * width..][..width]
    }

    /// Takes in the keys of a call after those that it knows. Reads no others.
    pub(crate) fn extend(&mut self, source: &Source<'_>) -> Result<()> {
        let dims = &source.dims;
        let fits = [self.keys.len(), self.heads, self.head_dim] == [dims.batch, dims.kv_heads, dims.head_dim];
        if !fits || (0..dims.batch).any(|i| source.sequence(i).keys.len() < self.keys[i]) {
            let expected = format!(
                "{} sequences of {} heads of {} channels, with at least {:?} keys",
                self.keys.len(),
                self.heads,
                self.head_dim,
                self.keys
            );
            return Err(Error::shape(
                "k",
                expected,
                &[dims.batch, dims.kv_heads, dims.kv_len, dims.head_dim],
            ));
        }
        let (unit, head_dim) = (self.unit, self.head_dim);
        let width = self.summary.width(head_dim);
        let mut rooms = [(); 2].map(|()| filled(Summary::room(head_dim), || Ok(0.0)));
        let [Ok(held), Ok(room)] = &mut rooms else {
            return Err(Error::too_large("summaries", format_args!("{head_dim} channels")));
        };
        for i in 0..dims.batch {
            let sequence = &source.sequence(i);
            let end = sequence.keys.len();
            for kv_head in 0..self.heads {
                let list = i * self.heads + kv_head;
                let rows = &mut self.rows[list];
                let size = end.div_ceil(unit).saturating_mul(width);
                let refusal = |_| Error::too_large("summaries", format_args!("{size} numbers a head"));
                rows.try_reserve(size.saturating_sub(rows.len())).map_err(refusal)?;
                rows.resize(size, 0.0);
                let sums = self.sums.get_mut(list).map_or(&mut [][..], |sums| sums);
                for from in (self.keys[i]..end).step_by(CHUNK) {
                    let at = At { sequence, kv_head, keys: from..(from + CHUNK).min(end) };
                    let keys = source.kv.keys(source.isa, &at, held);
                    self.summary.extend(source.isa, keys, Extend { from, unit, head_dim, rows, sums, room });
                }
            }
            self.keys[i] = end;
        }
        Ok(())
    }

    /// Whether they are those of a call.
    pub(super) fn check(&self, scheme: &Scheme, dims: &Dims, lengths: &Lengths<'_>) -> Result<()> {
        let keys = (0..dims.batch).map(|i| lengths.sequence(dims, i).keys.len());
        let same = (self.summary, self.unit) == (scheme.summary, scheme.cell())
            && (self.heads, self.head_dim) == (dims.kv_heads, dims.head_dim)
            && self.keys.iter().copied().eq(keys);
        if same {
            return Ok(());
        }
        let got = format!("{:?} of {} keys, for {:?} keys", self.summary, self.unit, self.keys);
        let expected = format!("{:?} of {} keys, for the keys of the call", scheme.summary, scheme.cell());
        Err(Error::value("summaries", expected, got))
    }
}

/// So many elements, if there is memory for them.
pub(crate) fn filled<T>(n: usize, element: impl Fn() -> Result<T>) -> Result<Vec<T>> {
    let mut elements = Vec::new();
    let refusal = |_| Error::too_large("summaries", format_args!("{n} elements"));
    elements.try_reserve_exact(n).map_err(refusal)?;
    for _ in 0..n {
        elements.push(element()?);
    }
    Ok(elements)
}

/// Methods of a mechanism with which summaries of `unit` keys are kept.
macro_rules! kept_summaries {
    ($mechanism:ty, $summary:expr, |$this:pat_param| $unit:expr) => {
        impl $mechanism {
            /// Summaries of all keys of `x`, to be kept.
            ///
            /// # Errors
            /// Arrays that do not fit.
            pub fn summaries<Q: crate::Element, K: crate::Element, O: crate::Element>(
                &self,
                x: crate::Qkv<'_, Q, K, O>,
            ) -> crate::Result<crate::select::Summaries> {
                let mut summaries = self.no_summaries(&x.dims()?)?;
                self.extend(&mut summaries, x)?;
                Ok(summaries)
            }

            /// The same of a cache.
            ///
            /// # Errors
            /// Queries that do not fit the cache.
            pub fn summaries_of<Q: crate::Element, C: crate::cache::Cache + ?Sized, O: crate::Element>(
                &self,
                x: crate::cache::Cached<'_, Q, C, O>,
            ) -> crate::Result<crate::select::Summaries> {
                let mut summaries = self.no_summaries(&x.dims()?)?;
                self.extend_from(&mut summaries, x)?;
                Ok(summaries)
            }

            /// Takes in the keys of `x` that follow those known.
            ///
            /// # Errors
            /// Arrays that do not fit, or have fewer keys.
            pub fn extend<Q: crate::Element, K: crate::Element, O: crate::Element>(
                &self,
                summaries: &mut crate::select::Summaries,
                x: crate::Qkv<'_, Q, K, O>,
            ) -> crate::Result<()> {
                summaries.extend(&crate::select::Source::new(self.config.isa(), x.reborrow(), None)?)
            }

            /// The same of a cache.
            ///
            /// # Errors
            /// Another cache, or one with fewer keys.
            pub fn extend_from<Q: crate::Element, C: crate::cache::Cache + ?Sized, O: crate::Element>(
                &self,
                summaries: &mut crate::select::Summaries,
                x: crate::cache::Cached<'_, Q, C, O>,
            ) -> crate::Result<()> {
                let isa = self.config.isa();
                crate::stages::selecting::with_source(isa, x, |source| summaries.extend(source))
            }

            /// Of no keys.
            fn no_summaries(&self, dims: &crate::input::Dims) -> crate::Result<crate::select::Summaries> {
                let $this = self;
                let (batch, heads, dim) = (dims.batch, dims.kv_heads, dims.head_dim);
                crate::select::Summaries::new($summary, $unit, batch, heads, dim)
            }
        }
    };
}
pub(crate) use kept_summaries;

/// Queries, keys and values with [`Summaries`] of the keys that were kept, so
/// that a selection reads these and not the keys.
#[derive(Debug)]
pub struct Summarised<'a, Q, K = Q, O = Q> {
    /// The arrays.
    pub qkv: Qkv<'a, Q, K, O>,
    /// Of all keys.
    pub summaries: &'a Summaries,
}

impl<'a, Q, K, O> Summarised<'a, Q, K, O> {
    /// Both together.
    pub fn new<'b: 'a>(qkv: Qkv<'b, Q, K, O>, summaries: &'a Summaries) -> Self {
        Self { qkv: qkv.reborrow(), summaries }
    }
}

impl<Q, K, O> Clone for Summarised<'_, Q, K, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, K, O> Copy for Summarised<'_, Q, K, O> {}

impl<Q: Element, K: Element, O: Element> Input for Summarised<'_, Q, K, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        self.qkv.dims()
    }

    fn out_dim(&self) -> Result<Dim4> {
        Input::out_dim(&self.qkv)
    }
}

/// Queries over a cache with [`Summaries`] of its keys, likewise: of those of the
/// call's sequences, in its order.
#[derive(Debug)]
pub struct SummarisedCache<'a, T, C: ?Sized, O = T> {
    /// The queries and the cache.
    pub cached: Cached<'a, T, C, O>,
    /// Of all keys.
    pub summaries: &'a Summaries,
}

impl<'a, T, C: Cache + ?Sized, O> SummarisedCache<'a, T, C, O> {
    /// Both together.
    pub fn new<'b: 'a>(cached: Cached<'b, T, C, O>, summaries: &'a Summaries) -> Self {
        Self { cached: cached.reborrow(), summaries }
    }
}

impl<T, C: ?Sized, O> Clone for SummarisedCache<'_, T, C, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, C: ?Sized, O> Copy for SummarisedCache<'_, T, C, O> {}

impl<T: Element, C: Cache + ?Sized, O: Element> Input for SummarisedCache<'_, T, C, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        self.cached.dims()
    }

    fn out_dim(&self) -> Result<Dim4> {
        Input::out_dim(&self.cached)
    }
}

/// Where the rows of candidates come from.
pub(super) enum Made<'a> {
    /// Keys themselves.
    Keys,
    Kept(&'a Summaries),
    /// By sequence and head, `stride` elements apart.
    Now {
        rows: &'a [f32],
        stride: usize,
        width: usize,
    },
    /// Codes by sequence, room for `stride` rows of each.
    Coded {
        codes: &'a [i8],
        scales: &'a [f32],
        stride: usize,
        width: usize,
    },
}

impl Made<'_> {
    /// Some rows of a head.
    pub(super) fn rows<'r>(
        &'r self,
        source: &'r Source<'_>,
        sequence: &'r Sequence,
        kv_head: usize,
        part: Range<usize>,
    ) -> Candidates<'r> {
        let list = sequence.index * source.dims.kv_heads + kv_head;
        let whole = |rows: &'r [f32], width: usize| rows_of(rows, part.end, width).part(part.clone());
        Candidates::Rows(match *self {
            Self::Keys => {
                let kv = source.given.as_ref().unwrap_or(&source.kv);
                let Some([k, _]) = kv.arrays() else {
                    return Candidates::Cache(kv, At { sequence, kv_head, keys: part });
                };
                // Rows of their own beside a cache lie by sequence.
                let (batch, start) = match source.slots {
                    Some(_) => (sequence.index, 0),
                    None => (sequence.batch, sequence.keys.start),
                };
                k.rows(batch, kv_head, &(start + part.start..start + part.end))
            }
            Self::Kept(kept) => whole(&kept.rows[list], kept.summary.width(kept.head_dim)),
            Self::Coded { codes, scales, stride, width } => {
                let first = sequence.index * stride;
                let codes = Rows::of_slice(&codes[first * width..], part.end, width, width);
                let scales = &scales[first..][part.clone()];
                return Candidates::Codes { codes: codes.part(part, 0..width), scales };
            }
            Self::Now { rows, stride, width } => whole(&rows[list * stride..][..stride], width),
        })
    }
}

/// Whether summaries have to be made: elements of those of a head, and how many
/// heads there are.
fn sizes(source: &Source<'_>, scheme: &Scheme) -> Option<[usize; 2]> {
    let keys = scheme.cell() == 1 && scheme.summary != Summary::MinMax;
    if source.summaries.is_some() || source.given.is_some() || keys {
        return None;
    }
    let layout = scheme.layout(&source.dims, &source.lengths);
    let width = scheme.summary.width(source.dims.head_dim);
    let rows = layout.keys.div_ceil(scheme.cell()).saturating_mul(width);
    Some([rows, source.dims.batch.saturating_mul(source.dims.kv_heads)])
}

room! {
    /// What [`summarise`] works in.
    Room<'a>(head_dim: usize) {
        held: f32 = Summary::room(head_dim),
        room: f32 = Summary::room(head_dim),
        sums: f32 = head_dim
    }
}

impl Room<'_> {
    /// Summaries of rows that lie in an array.
    pub(crate) fn rows(
        &mut self,
        isa: Isa,
        (summary, unit): (Summary, usize),
        from: AnyRows<'_>,
        rows: &mut [f32],
    ) {
        let head_dim = from.cols();
        let call = Extend { from: 0, unit, head_dim, rows, sums: self.sums, room: self.room };
        summary.extend(isa, from, call);
    }
}

/// Summaries of the keys of a head, in blocks of `unit`.
pub(crate) fn summarise(
    source: &Source<'_>,
    (sequence, kv_head): (&Sequence, usize),
    (summary, unit): (Summary, usize),
    rows: &mut [f32],
    Room { held, room, sums }: &mut Room<'_>,
) {
    let (n, head_dim) = (sequence.keys.len(), source.dims.head_dim);
    for from in (0..n).step_by(CHUNK) {
        let at = At { sequence, kv_head, keys: from..(from + CHUNK).min(n) };
        let keys = source.kv.keys(source.isa, &at, held);
        summary.extend(source.isa, keys, Extend { from, unit, head_dim, rows, sums, room });
    }
}

/// Bytes that [`make`] works in.
pub(super) fn workspace_bytes(source: &Source<'_>, scheme: &Scheme) -> usize {
    let Some([rows, lists]) = sizes(source, scheme) else { return coded::workspace_bytes(source, scheme) };
    let d = source.dims.head_dim;
    let share = Room::bytes(d);
    bytes_for::<f32>(rows.saturating_mul(lists))
        .saturating_add(bytes_for::<u64>(claim_words(lists)))
        .saturating_add(bytes_for_shares(parallel::threads(), share))
}

/// Makes summaries, unless they are kept or the keys themselves.
pub(super) fn make<'w>(source: &'w Source<'_>, scheme: &Scheme, arena: &mut Arena<'w>) -> Made<'w> {
    if let Some(kept) = source.summaries {
        return Made::Kept(kept);
    }
    let Some([stride, lists]) = sizes(source, scheme) else {
        return coded::make(source, scheme, arena).unwrap_or(Made::Keys);
    };
    let d = source.dims.head_dim;
    let rows = arena.take::<f32>(stride * lists);
    let claims = arena.take::<u64>(claim_words(lists));
    let workers = parallel::threads();
    let shares = arena.shares(workers, Room::bytes(d));
    let parts = Parts::new(&mut *rows, stride, claims);
    let start = |worker: usize| Room::take(&mut shares.take(worker), d);
    parallel::for_each(workers, lists, start, |room, list| {
        let (index, kv_head) = (list / source.dims.kv_heads, list % source.dims.kv_heads);
        let sequence = &source.sequence(index);
        summarise(source, (sequence, kv_head), (scheme.summary, scheme.cell()), parts.take(list), room);
    });
    Made::Now { rows, stride, width: scheme.summary.width(d) }
}
