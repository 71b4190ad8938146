//! What every engine is given: arrays, mask, score, normalisation.
//!
//! Nothing here is generic, and so the engines are compiled once, in this
//! crate, for each instruction set. What a mask or a score does is inlined
//! into loops of its own, which an engine calls once a tile or once a row.

use std::ops::Range;

use ndarray::{ArrayView3, ArrayView4, ArrayViewMut4, s};

use crate::element::Element;
use crate::input::{Dims, Lengths, Qkv, Sequence};
use crate::keys::plan::{Keys, Per};
use crate::keys::source::{Kv, KvSource, Slots};
use crate::mask::Mask;
use crate::score::{AnyScore, Plain};
use crate::simd::Isa;
use crate::simd::amx::Amx;
use crate::simd::any::{AnyArray, AnyOut, AnyRows};
use crate::simd::dots::Vnni;
use crate::simd::mem::{Heads, OutRows};

/// How the weights of a row come from its scores.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Norm<'a> {
    /// They are exponentials and sum to 1, a sink logit per head included.
    Softmax {
        /// One logit a query head, without a value.
        sinks: Option<&'a [f32]>,
    },
    /// Each is the logistic function of its score plus a bias.
    Sigmoid {
        /// Added to every score; `None` is `-ln kv_len`.
        bias: Option<f32>,
    },
}

/// Factors of query rows, `[batch, q_heads, q_len]`, and of value rows,
/// `[batch, kv_heads, kv_len]`. They are finite.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gains<'a> {
    pub(crate) query: ArrayView3<'a, f32>,
    pub(crate) value: ArrayView3<'a, f32>,
}

/// Rows in another order than the one in which they lie: of every batch entry,
/// query `i` of the call is row `queries[i]`, key `j` row `keys[j]`. Masks,
/// scores and plans know the order of the call alone. For batches whose
/// sequences use all rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowOrder<'a> {
    pub(crate) queries: &'a [u32],
    pub(crate) keys: &'a [u32],
    /// Where the lists are cut into sequences: offsets into both, one more than
    /// there are. Without it they are one.
    pub(crate) cuts: Option<[&'a [usize]; 2]>,
    /// The batch entry of each sequence, in order, where entries have lists of
    /// their own. Without it every entry has all sequences.
    pub(crate) entries: Option<&'a [u32]>,
    /// Batch entry and row of what is in no list: outputs there are 0.
    pub(crate) rest: &'a [(u32, u32)],
}

impl<'a> RowOrder<'a> {
    /// Sequences of a batch of so many entries.
    pub(crate) fn sequences(&self, batch: usize) -> usize {
        match self.entries {
            Some(entries) => entries.len(),
            None => batch * self.run(),
        }
    }

    /// Sequences that the lists are cut into.
    fn run(&self) -> usize {
        self.cuts.map_or(1, |[queries, _]| queries.len().saturating_sub(1))
    }

    /// Sequence `index`, if the lists are cut.
    pub(crate) fn sequence(&self, index: usize) -> Option<Sequence> {
        let cuts = self.cuts?;
        let (batch, at) = match self.entries {
            Some(entries) => (entries[index] as usize, index),
            None => (index / self.run(), index % self.run()),
        };
        let [queries, keys] = cuts.map(|cuts| cuts[at]..cuts[at + 1]);
        Some(Sequence { index, batch, slot: batch, queries, keys })
    }

    /// The parts of both lists that are a batch entry's.
    fn of_entry(&self, entry: usize) -> [Range<usize>; 2] {
        let (Some(entries), Some(cuts)) = (self.entries, self.cuts) else {
            return [0..self.queries.len(), 0..self.keys.len()];
        };
        let [first, end] = [0, 1].map(|more| entries.partition_point(|&x| (x as usize) < entry + more));
        cuts.map(|cuts| cuts[first]..cuts[end])
    }

    /// Where a batch entry starts in both lists.
    pub(crate) fn starts(&self, entry: usize) -> [usize; 2] {
        self.of_entry(entry).map(|range| range.start)
    }

    /// The rows of a batch entry's queries, in the order of the call.
    pub(crate) fn queries_of(&self, entry: usize) -> &'a [u32] {
        &self.queries[self.of_entry(entry)[0].clone()]
    }

    /// The same of its keys.
    pub(crate) fn keys_of(&self, entry: usize) -> &'a [u32] {
        &self.keys[self.of_entry(entry)[1].clone()]
    }
}

/// The most rows of a key/value head that [meet](Call::meets).
pub(crate) const MOST_MEETING: usize = 1 << 28;

/// Another way to the same outputs: the pairs that the mask leaves lie in
/// regions, each a sequence of its own. Mask and score count in these.
#[derive(Clone, Copy)]
pub(crate) struct Regional<'a> {
    pub(crate) order: RowOrder<'a>,
    pub(crate) mask: &'a dyn Mask,
    pub(crate) score: &'a dyn AnyScore,
}

/// Runs of rows that follow each other, of a range counted from `first`: where
/// each starts, counted from the first of the range, and the rows. Without a
/// list rows are as they lie.
#[inline(always)]
fn runs(
    list: Option<&[u32]>,
    first: usize,
    range: Range<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> + use<'_> {
    let (start, len) = (first + range.start, range.len());
    let rows = list.map(|list| &list[start..start + len]);
    let mut next = 0;
    std::iter::from_fn(move || {
        let at = next;
        if at == len {
            return None;
        }
        let Some(rows) = rows else {
            next = len;
            return Some((0, start..start + len));
        };
        let row = rows[at] as usize;
        let follows = |&(i, &next): &(usize, &u32)| next as usize == row + i;
        next += rows[at..].iter().enumerate().take_while(follows).count();
        Some((at, row..row + next - at))
    })
}

/// Keys and values that stand for others (pooled, sampled, learned), `[batch,
/// kv_heads, n, dim]` or those of every sequence of a cache, in the same softmax. The score of one is `scale * q . k
/// + log_weight`, whatever mask, plan and score say of others.
#[derive(Clone, Copy)]
pub(crate) struct Virtual<'a> {
    pub(crate) k: AnyArray<'a>,
    pub(crate) v: AnyArray<'a>,
    /// Natural logarithms of weights, `[batch, kv_heads, n]`; -inf hides.
    pub(crate) log_weights: ArrayView3<'a, f32>,
    /// Which positions see each. Query `i` is at `i + q_start`, by default with
    /// the last query at the last key.
    pub(crate) seen: Sight<'a>,
    pub(crate) q_start: Option<isize>,
}

impl Virtual<'_> {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.k.dim().2
    }
}

/// Which positions see virtual keys.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sight<'a> {
    /// Each from its own position on.
    From(&'a [isize]),
    /// Number `j` from position `first + j * step` on.
    Every { first: isize, step: usize },
    /// Number `j` all positions but `j * step` to `(j + 1) * step`.
    Others { step: usize },
    /// Number `j` all positions but those of block `blocks[j]`, of `step` each.
    Outside { blocks: &'a [u32], step: usize },
}

impl Sight<'_> {
    /// Sets bit `t`, of zeros, for each of `len` numbers `first + t` that a
    /// position sees.
    pub(crate) fn fill(&self, position: isize, first: usize, len: usize, words: &mut [u64]) {
        match *self {
            Self::From(from) => {
                for (t, &from) in from[first..first + len].iter().enumerate() {
                    words[t / 64] |= u64::from(from <= position) << (t % 64);
                }
            }
            Self::Every { first: start, step } => {
                let past = usize::try_from(position.saturating_sub(start));
                let count = past.map_or(0, |past| past.checked_div(step).map_or(usize::MAX, |n| n + 1));
                set_ones(words, 0..count.saturating_sub(first).min(len));
            }
            Self::Others { step } => {
                set_ones(words, 0..len);
                let own = usize::try_from(position).ok().and_then(|position| position.checked_div(step));
                if let Some(t) = own.and_then(|own| own.checked_sub(first)).filter(|&t| t < len) {
                    words[t / 64] &= !(1 << (t % 64));
                }
            }
            Self::Outside { blocks, step } => {
                let own = usize::try_from(position).ok().and_then(|position| position.checked_div(step));
                for (t, &block) in blocks[first..first + len].iter().enumerate() {
                    words[t / 64] |= u64::from(own != Some(block as usize)) << (t % 64);
                }
            }
        }
    }
}

/// Sets the bits of some columns.
pub(crate) fn set_ones(words: &mut [u64], columns: Range<usize>) {
    for (w, word) in words.iter_mut().enumerate() {
        let start = columns.start.clamp(64 * w, 64 * w + 64) - 64 * w;
        let end = columns.end.clamp(64 * w, 64 * w + 64) - 64 * w;
        if start < end {
            *word |= (u64::MAX >> (64 - (end - start))) << start;
        }
    }
}

/// The arrays of a call.
#[derive(Clone, Copy)]
pub(crate) struct Arrays<'a> {
    q: AnyArray<'a>,
    pub(crate) kv: Kv<'a>,
    /// Size of the batch axis.
    pub(crate) batch: usize,
    pub(crate) lengths: Lengths<'a>,
    /// The sequences of a call over a cache, which say more than `lengths`.
    slots: Option<Slots<'a>>,
}

impl<'a, Q: Element, K: Element, O> From<Qkv<'a, Q, K, O>> for Arrays<'a> {
    fn from(x: Qkv<'a, Q, K, O>) -> Self {
        let any = |view| K::any(Heads::new(view));
        let kv = Kv::Arrays { k: any(x.k), v: any(x.v) };
        Self { batch: x.q.dim().0, q: Q::any(Heads::new(x.q)), kv, lengths: x.lengths, slots: None }
    }
}

impl<'a> Arrays<'a> {
    /// Queries and keys with other values, of any type.
    pub(crate) fn with_values<Q: Element, K: Element, O>(x: Qkv<'a, Q, K, O>, v: AnyArray<'a>) -> Self {
        let k = K::any(Heads::new(x.k.reborrow()));
        Self { kv: Kv::Arrays { k, v }, ..x.into() }
    }

    /// Queries over keys and values of any type and place.
    pub(crate) fn any(
        batch: usize,
        q: AnyArray<'a>,
        kv: Kv<'a>,
        (lengths, slots): (Lengths<'a>, Option<Slots<'a>>),
    ) -> Self {
        Self { batch, q, kv, lengths, slots }
    }

    /// Queries over rows that all sequences have as many of, wherever they lie.
    pub(crate) fn sourced<Q: Element>(q: ArrayView4<'a, Q>, source: &'a dyn KvSource) -> Self {
        let (batch, kv) = (q.dim().0, Kv::Cache(source));
        Self { batch, q: Q::any(Heads::new(q)), kv, lengths: Lengths::Full, slots: None }
    }

    /// Queries over a cache.
    pub(crate) fn cached<Q: Element>(
        q: ArrayView4<'a, Q>,
        cache: &'a dyn KvSource,
        slots: Slots<'a>,
    ) -> Self {
        let (batch, kv, lengths) = (q.dim().0, Kv::Cache(cache), Lengths::Keys(slots.lengths));
        Self { batch, q: Q::any(Heads::new(q)), kv, lengths, slots: Some(slots) }
    }
}

/// Where an engine writes: the output and, if asked for, what each row's
/// exponentials add up to (see [`SoftmaxSum::write`](crate::engine::row::SoftmaxSum::write)).
pub(crate) struct Output<'a> {
    pub(crate) out: AnyOut<'a>,
    pub(crate) figures: Option<OutRows<'a, f32>>,
}

/// One call of an engine. Shapes have been checked.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) x: Arrays<'a>,
    pub(crate) dims: Dims,
    pub(crate) mask: &'a dyn Mask,
    /// Which keys are visited of those that the mask leaves.
    pub(crate) keys: Keys<'a>,
    pub(crate) order: Option<RowOrder<'a>>,
    /// For outputs; weights and gradients are found without.
    pub(crate) regions: Option<Regional<'a>>,
    pub(crate) extra: Option<Virtual<'a>>,
    pub(crate) score: &'a dyn AnyScore,
    pub(crate) norm: Norm<'a>,
    pub(crate) scale: f32,
    pub(crate) gains: Option<Gains<'a>>,
    /// Logits of what the output is multiplied by, through a logistic function,
    /// before it is rounded: `[batch, q_heads, q_len, value_dim | 1]`.
    pub(crate) gate: Option<AnyArray<'a>>,
    /// One factor of the output for each query head, at its end. They are finite.
    pub(crate) head_gains: Option<&'a [f32]>,
    /// Rows that are added to those of the output before these are rounded, `[batch, q_heads,
    /// q_len, value_dim]`.
    pub(crate) plus: Option<AnyArray<'a>>,
    /// Where queries and keys are rows of [codes](crate::simd::dots), what multiplies them.
    pub(crate) dots: Option<Vnni>,
    pub(crate) isa: Isa,
}

impl<'a> Call<'a> {
    /// Whether a sequence goes to the decode engine rather than to the attend engine: where few
    /// rows share a key/value head, reading the keys as they lie beats packing
    /// them first, and the longer the keys the more rows are few. Depends on the
    /// sizes of the sequence alone, whatever else is in the batch. Where few rows
    /// share a list of keys, no others can be found for it either.
    pub(crate) fn is_decode(&self, sequence: &Sequence) -> bool {
        const FEW: usize = 12;
        if self.order.is_some() || self.extra.is_some() || self.dots.is_some() {
            return false;
        }
        let rows = self.group() * sequence.queries.len();
        let listed = self.few_share_lists() && !self.meets(sequence);
        rows <= FEW || listed || (rows <= 64 && 16 * rows <= sequence.keys.len())
    }

    /// Whether lists are of so few rows that these make no tile.
    fn few_share_lists(&self) -> bool {
        const FEW: usize = 12;
        let layout = match self.keys {
            Keys::Mask => return false,
            Keys::Blocks(lists) => lists.layout(),
            Keys::Tokens(lists) => lists.layout(),
        };
        let heads = if layout.per == Per::Head { 1 } else { self.group() };
        heads.saturating_mul(layout.q_block) <= FEW
    }

    /// Whether a sequence has so many queries, with lists of blocks that few of them
    /// share, that those which visit a block make a tile.
    pub(crate) fn meets(&self, sequence: &Sequence) -> bool {
        const MANY: usize = 128;
        let alone = self.order.is_none() && self.extra.is_none() && self.dots.is_none();
        let lists = matches!(self.keys, Keys::Blocks(_)) && self.few_share_lists();
        let (queries, group) = (sequence.queries.len(), self.group());
        alone && lists && queries >= MANY && queries.saturating_mul(group) <= MOST_MEETING
    }

    /// The same whose output is gated.
    pub(crate) fn gated<'b>(&'b self, gate: AnyArray<'b>) -> Call<'b> {
        Call { gate: Some(gate), ..self.reborrow() }
    }

    /// The same without gates.
    pub(crate) fn ungated(&self) -> Call<'_> {
        Call { gate: None, ..self.reborrow() }
    }

    /// The same whose heads have gains.
    pub(crate) fn gained<'b>(&'b self, gains: &'b [f32]) -> Call<'b> {
        Call { head_gains: Some(gains), ..self.reborrow() }
    }

    /// The same with another mask.
    pub(crate) fn masked<'b>(&'b self, mask: &'b dyn Mask) -> Call<'b> {
        Call { mask, regions: None, ..self.reborrow() }
    }

    /// The same region by region, where there are some.
    pub(crate) fn in_regions(&self) -> Call<'_> {
        let call = self.reborrow();
        let Some(Regional { order, mask, score }) = call.regions else { return call };
        let dims = Dims { batch: order.sequences(call.x.batch), ..call.dims };
        Call { dims, order: Some(order), mask, score, regions: None, ..call }
    }

    fn reborrow<'b>(&'b self) -> Call<'b> {
        // Array views do not shorten their lifetimes by themselves.
        let gains = self
            .gains
            .as_ref()
            .map(|gains| Gains { query: gains.query.reborrow(), value: gains.value.reborrow() });
        let extra =
            self.extra.as_ref().map(|extra| Virtual { log_weights: extra.log_weights.reborrow(), ..*extra });
        Call { gains, extra, ..*self }
    }

    /// Sequences that the lists of an order are cut into, at least 1.
    pub(crate) fn regions_of_a_list(&self) -> usize {
        self.order.map_or(1, |order| order.run()).max(1)
    }

    pub(crate) fn sequence(&self, index: usize) -> Sequence {
        if let Some(sequence) = self.order.and_then(|order| order.sequence(index)) {
            return sequence;
        }
        match &self.x.slots {
            Some(slots) => slots.sequence(&self.dims, index),
            None => self.x.lengths.sequence(&self.dims, index),
        }
    }

    /// Sets the rows, `[batch, heads, len, dim]`, that belong to no sequence; `keys`
    /// says whether they are keys.
    pub(crate) fn fill_rest<T: Copy>(&self, rows: &mut ArrayViewMut4<'_, T>, keys: bool, with: T) {
        for &(entry, row) in self.order.map_or(&[][..], |order| order.rest) {
            rows.slice_mut(s![entry as usize, .., row as usize, ..]).fill(with);
        }
        match self.x.slots.and_then(|slots| slots.offsets) {
            Some(offsets) if !keys => {
                let end = offsets.last().copied().unwrap_or(0);
                rows.slice_mut(s![.., .., end.., ..]).fill(with);
            }
            _ => self.x.lengths.fill_rest(rows, keys, with),
        }
    }

    /// The most queries and the most keys of the sequences that count.
    pub(crate) fn longest(&self, counts: impl Fn(&Sequence) -> bool) -> (usize, usize) {
        (0..self.dims.batch)
            .map(|i| self.sequence(i))
            .filter(counts)
            .fold((0, 0), |(q, k), sequence| (q.max(sequence.queries.len()), k.max(sequence.keys.len())))
    }

    /// The same call for the normalisers alone: with values of no elements.
    pub(crate) fn without_values(&self) -> Self {
        let x = Arrays { kv: self.x.kv.without_values(), ..self.x };
        let extra = self.extra.map(|extra| Virtual { v: extra.v.without_columns(), ..extra });
        let dims = Dims { value_dim: 0, ..self.dims };
        Self { x, extra, gate: None, head_gains: None, plus: None, dims, ..*self }
    }

    /// The call whose scores are the products of these rows with the values, of
    /// the pairs that this call sees. Nothing for the keys of a cache.
    pub(crate) fn products<'b>(&'b self, rows: AnyArray<'b>) -> Option<Call<'b>> {
        let [_, values] = self.x.kv.arrays()?;
        let kv = Kv::Arrays { k: values, v: values.without_columns() };
        let (x, dims) = (Arrays { q: rows, kv, ..self.x }, &self.dims);
        let dims = Dims { head_dim: dims.value_dim, value_dim: 0, ..*dims };
        let call = self.reborrow();
        let (gains, gate, head_gains, plus, extra) = (None, None, None, None, None);
        Some(Call { x, dims, score: &Plain, scale: 1.0, gains, gate, head_gains, plus, extra, ..call })
    }

    /// AMX, where this call can use it: for softmax attention over arrays of
    /// one type, as they lie. Weights of a sigmoid or with gains may be so small that tiles,
    /// which know no subnormal numbers, lose them; a scale may be so large that
    /// what they lose of a score matters.
    pub(crate) fn amx(&self) -> Option<Amx> {
        const LARGEST_SCALE: f32 = 1e12;
        let same = self.x.kv.parts().iter().all(|&parts| parts == self.x.q.parts());
        let same = same && self.order.is_none() && self.extra.is_none() && self.dots.is_none();
        let same = same && !matches!(self.keys, Keys::Tokens(_));
        let softmax = matches!(self.norm, Norm::Softmax { .. }) && self.gains.is_none();
        let fits = self.isa == Isa::Amx && same && softmax && self.scale.abs() <= LARGEST_SCALE;
        if fits { Amx::detect() } else { None }
    }

    /// Numbers of `bf16` that add up to an element of the arrays.
    pub(crate) fn parts(&self) -> usize {
        self.x.q.parts()
    }

    /// Rows of the output.
    pub(crate) fn out_rows(&self) -> usize {
        self.x.batch * self.dims.q_heads * self.dims.q_len
    }

    /// Query heads that share a key/value head.
    pub(crate) fn group(&self) -> usize {
        self.dims.q_heads / self.dims.kv_heads.max(1)
    }

    pub(crate) fn queries(&self, sequence: &Sequence, head: usize) -> AnyRows<'a> {
        self.x.q.rows(sequence.batch, head, &sequence.queries)
    }

    /// Rows of the array of queries of a sequence's batch entry.
    #[inline(always)]
    pub(crate) fn query_rows_of(&self, sequence: &Sequence, head: usize, rows: &Range<usize>) -> AnyRows<'a> {
        self.x.q.rows(sequence.batch, head, rows)
    }

    /// One query, as the call counts them.
    #[inline(always)]
    pub(crate) fn query(&self, sequence: &Sequence, head: usize, query: usize) -> AnyRows<'a> {
        let row = self.query_row(sequence, query);
        self.x.q.rows(sequence.batch, head, &(row..row + 1))
    }

    /// The row of the arrays in which a query of a sequence lies.
    #[inline(always)]
    pub(crate) fn query_row(&self, sequence: &Sequence, query: usize) -> usize {
        let query = sequence.queries.start + query;
        self.order.map_or(query, |order| order.queries[query] as usize)
    }

    /// The row of the arrays in which a key of a sequence lies.
    #[inline(always)]
    pub(crate) fn key_row(&self, sequence: &Sequence, key: usize) -> usize {
        let key = sequence.keys.start + key;
        self.order.map_or(key, |order| order.keys[key] as usize)
    }

    /// Runs of rows of the arrays in which some queries of a sequence lie: where
    /// each starts, counted from the first of them, and the rows.
    #[inline(always)]
    pub(crate) fn query_runs(
        &self,
        sequence: &Sequence,
        queries: Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<'a> {
        runs(self.order.map(|order| order.queries), sequence.queries.start, queries)
    }

    /// The same of keys.
    #[inline(always)]
    pub(crate) fn key_runs(
        &self,
        sequence: &Sequence,
        keys: Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<'a> {
        runs(self.order.map(|order| order.keys), sequence.keys.start, keys)
    }
}
