//! Attention on lists of chunks of keys that are put one after the other: a query is as far
//! from a key as it is in its list, whatever lies between in the sequence.
//!
//! A key's turn by its place in its chunk is the same in all lists, so that queries are turned
//! by what is left. Rows (query, chunk) are attended to chunk by chunk, which costs what dense
//! tiles cost; the softmax states of a query's chunks merge.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{ArrayView4, s};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Sequence, Site};
use crate::keys::placed::Placed;
use crate::keys::source::KvSource;
use crate::keys::{Keys, Layout, Run, TokenLists};
use crate::mask::Mask;
use crate::mask::interval::Interval;
use crate::math::rope::Turns;
use crate::score::Plain;
use crate::stages::arrange::{NONE, Picked, Places};
use crate::stages::attend::Config;
use crate::stages::lay::Lay;
use crate::stages::listed::Order;
use crate::stages::pass::{Out, Pass, Scratch};
use crate::stages::scale;
use crate::stages::states::{self, Into};
use crate::stages::turn::Turning;

/// Rows that are attended to at once, about.
const ROWS: usize = 1 << 16;

/// Lists of whole chunks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunks {
    /// Tokens of a chunk; the last one of a sequence may have fewer.
    pub(crate) len: usize,
    /// Chunks of a list, at most.
    pub(crate) most: usize,
}

impl Chunks {
    /// Keys that a query of a sequence of so many queries and keys sees.
    pub(crate) fn seen([queries, keys]: [usize; 2], query: usize) -> usize {
        (query + keys + 1).saturating_sub(queries).min(keys)
    }

    /// The chunks of the list of a sequence, head and query.
    pub(crate) fn of<'a>(
        &self,
        index: &'a TokenLists,
        (b, h, i): (usize, usize, usize),
    ) -> impl Iterator<Item = usize> + use<'a> {
        let l = self.len;
        index.runs(b, h, i).iter().flat_map(move |run| run.start as usize / l..run.range().end.div_ceil(l))
    }

    /// Where a query that sees so many keys is, counted from the start of a chunk of its list.
    fn position(&self, chunks_after: usize, seen: usize) -> usize {
        chunks_after * self.len + (seen - 1) % self.len
    }

    /// Refuses an index that has not lists of whole chunks for these sequences.
    pub(crate) fn check(&self, index: &TokenLists, want: Layout, sequences: &[Sequence]) -> Result<()> {
        let (of, &Self { len: l, most }) = (index.layout(), self);
        if *of != want {
            return Err(Error::value("index", format!("{want:?}"), format_args!("{of:?}")));
        }
        for (b, sequence) in sequences.iter().enumerate() {
            let [queries, keys] = sizes(sequence);
            for (h, i) in (0..want.q_heads).flat_map(|h| (0..queries).map(move |i| (h, i))) {
                let whole = |run: &Run| {
                    let end = run.range().end;
                    let ends = end == keys || end < keys && end.is_multiple_of(l);
                    (run.start as usize).is_multiple_of(l) && ends
                };
                let runs = index.runs(b, h, i);
                if !runs.iter().all(whole) || self.of(index, (b, h, i)).count() > most {
                    let expected = format!("at most {most} whole chunks of {l} keys a list");
                    return Err(Error::value("index", expected, format_args!("{runs:?}")));
                }
            }
        }
        Ok(())
    }

    /// The rows of some queries.
    fn rows(
        &self,
        sizes: [usize; 2],
        index: &TokenLists,
        (b, heads): (usize, Range<usize>),
        of: &Range<usize>,
    ) -> Rows {
        let mut rows: Vec<Vec<[u32; 3]>> = Vec::new();
        let mut starts = vec![0; sizes[1].div_ceil(self.len) + 1];
        for h in heads {
            starts.fill(0);
            let mut found = Vec::new();
            for i in of.clone() {
                let (count, seen) = (self.of(index, (b, h, i)).count(), Self::seen(sizes, i));
                for (slot, chunk) in self.of(index, (b, h, i)).enumerate().filter(|_| seen > 0) {
                    let turn = self.position(count - 1 - slot, seen);
                    found.push([(i - of.start) as u32, chunk as u32, turn as u32]);
                    starts[chunk + 1] += 1;
                }
            }
            (1..starts.len()).for_each(|chunk| starts[chunk] += starts[chunk - 1]);
            let mut sorted = vec![[0; 3]; found.len()];
            for row in found {
                let at = &mut starts[row[1] as usize];
                sorted[*at] = row;
                *at += 1;
            }
            rows.push(sorted);
        }
        let len = rows.iter().map(Vec::len).max().unwrap_or(0);
        rows.iter_mut().for_each(|rows| rows.resize(len, [NONE; 3]));
        let column = |c: usize| rows.iter().flatten().map(|row| row[c]).collect();
        Rows { len, queries: column(0), chunks: column(1), turns: column(2) }
    }
}

/// Queries and keys of a sequence.
fn sizes(of: &Sequence) -> [usize; 2] {
    [of.queries.len(), of.keys.len()]
}

/// Rows (query, chunk) of the heads of a key/value head for some queries, by chunk.
struct Rows {
    len: usize,
    /// Of each row its query, its chunk and its position; [`NONE`] past the last.
    queries: Vec<u32>,
    chunks: Vec<u32>,
    turns: Vec<u32>,
}

/// Keys at their places in their chunks, and values, which the rows of a head attend to.
trait Placing {
    fn attend<M: Mask>(
        &self,
        pass: &mut Pass<'_>,
        config: &Config<M, Plain>,
        q: ArrayView4<'_, f32>,
        at: (&Sequence, usize),
        keys: Keys<'_>,
        states: &mut Scratch<'_>,
    ) -> Result<()>;
}

/// Those of arrays, turned.
struct InArrays<'a, K>([ArrayView4<'a, K>; 2]);

impl<K: Element> Placing for InArrays<'_, K> {
    fn attend<M: Mask>(
        &self,
        pass: &mut Pass<'_>,
        config: &Config<M, Plain>,
        q: ArrayView4<'_, f32>,
        (of, g): (&Sequence, usize),
        keys: Keys<'_>,
        states: &mut Scratch<'_>,
    ) -> Result<()> {
        let [k, v] = &self.0;
        let [k, v] = [k, v].map(|x| x.slice(s![of.batch..of.batch + 1, g..g + 1, .., ..]));
        let x = Qkv { q: q.reborrow(), k, v, lengths: Lengths::Full, out: PhantomData };
        config.attend_states(pass, x, keys, None, states)
    }
}

/// Those of a cache, turned on the way with a table if they are not yet.
struct InCache<'a> {
    source: &'a dyn KvSource,
    turns: Option<(&'a Turns, usize)>,
    chunk: usize,
    dims: Dims,
}

impl Placing for InCache<'_> {
    fn attend<M: Mask>(
        &self,
        pass: &mut Pass<'_>,
        config: &Config<M, Plain>,
        q: ArrayView4<'_, f32>,
        (sequence, kv_head): (&Sequence, usize),
        keys: Keys<'_>,
        states: &mut Scratch<'_>,
    ) -> Result<()> {
        let &Self { source, turns, chunk, dims } = self;
        let placed = Placed { source, sequence, kv_head, first: 0, turns, chunk, head_dim: dims.head_dim };
        let (_, q_heads, q_len, _) = q.dim();
        let kv_len = sequence.keys.len();
        let dims = Dims { batch: 1, q_heads, kv_heads: 1, q_len, kv_len, packed: false, ..dims };
        config.attend_source(pass, (q, &placed), dims, keys, states)
    }
}

/// Softmax attention on such lists.
pub(crate) struct OnChunks<'a> {
    pub(crate) config: &'a Config<Order, Plain>,
    pub(crate) turning: Turning<'a>,
    pub(crate) chunks: Chunks,
    /// Whether keys come turned to their places.
    pub(crate) turned: bool,
}

impl OnChunks<'_> {
    /// Rows of whole chunks turned to their places in these.
    pub(crate) fn placed<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        x: ArrayView4<'_, T>,
    ) -> Result<Scratch<'p>> {
        let (_, heads, n, _) = x.dim();
        let l = self.chunks.len;
        self.turning.run(pass, self.config.isa(), x, (heads, n), |_, j| Some([j, j % l]))
    }

    /// Keys of whole chunks at their places, in `f32`.
    pub(crate) fn keys<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        k: ArrayView4<'_, T>,
    ) -> Result<Scratch<'p>> {
        if self.turned {
            return Lay::default().copy(pass, self.config.isa(), k);
        }
        self.placed(pass, k)
    }

    /// Attention of the queries of sequences on keys and values of arrays.
    pub(crate) fn attend<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        queries: (ArrayView4<'_, T>, &[Sequence]),
        [k, v]: [ArrayView4<'_, T>; 2],
        index: &TokenLists,
        dims: &Dims,
        out: Out<'_, T>,
    ) -> Result<()> {
        if self.turned {
            return self.attend_placed(pass, queries, &InArrays([k, v]), index, dims, out);
        }
        let (k, v) = (self.placed(pass, k)?, Lay::default().copy(pass, self.config.isa(), v)?);
        self.attend_placed(pass, queries, &InArrays([k.view(), v.view()]), index, dims, out)
    }

    /// The same over a cache.
    pub(crate) fn attend_cached<T: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        queries: (ArrayView4<'_, T>, &[Sequence]),
        source: &dyn KvSource,
        index: &TokenLists,
        dims: &Dims,
        out: Out<'_, O>,
    ) -> Result<()> {
        let turns = (!self.turned).then_some((self.turning.turns, self.turning.start));
        let from = InCache { source, turns, chunk: self.chunks.len, dims: *dims };
        self.attend_placed(pass, queries, &from, index, dims, out)
    }

    /// Rows of no sequence are 0.
    fn attend_placed<T: Element, O: Element>(
        &self,
        pass: &mut Pass<'_>,
        (q, sequences): (ArrayView4<'_, T>, &[Sequence]),
        from: &impl Placing,
        index: &TokenLists,
        dims: &Dims,
        out: Out<'_, O>,
    ) -> Result<()> {
        let entries = q.dim().0;
        let mut all = states::rows(pass, (entries, dims.q_heads, dims.q_len, dims.value_dim))?;
        if sequences.iter().map(|of| of.queries.len()).sum::<usize>() < entries * dims.q_len {
            all.numbers_mut().fill(0.0);
        }
        for of in sequences {
            self.of_sequence(pass, (q, of), from, index, dims, &mut all)?;
        }
        scale::run(pass, self.config.isa(), &all, |_| 1.0, out);
        Ok(())
    }

    fn of_sequence<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        (q, sequence): (ArrayView4<'_, T>, &Sequence),
        from: &impl Placing,
        index: &TokenLists,
        dims: &Dims,
        all: &mut Scratch<'_>,
    ) -> Result<()> {
        let &Self { config, turning, chunks: Chunks { len: l, most }, .. } = self;
        let (isa, group, sizes) = (config.isa(), dims.q_heads / dims.kv_heads.max(1), sizes(sequence));
        let most = most.min(sizes[1].div_ceil(l));
        let step = (ROWS / (group * most).max(1)).max(1);
        for (g, first) in (0..dims.kv_heads).flat_map(|g| (0..sizes[0]).step_by(step).map(move |i| (g, i))) {
            let of = first..(first + step).min(sizes[0]);
            let heads = g * group..(g + 1) * group;
            let rows = self.chunks.rows(sizes, index, (sequence.index, heads.clone()), &of);
            let &Rows { len, ref queries, ref chunks, ref turns } = &rows;
            let places = Places::of(Picked { rows: queries, units: group, len }, [1, group, of.len()])?;
            let keys_of = |row: usize| match queries[row] {
                NONE => sizes[1]..sizes[1],
                query => {
                    let start = chunks[row] as usize * l;
                    start..(start + l).min(Chunks::seen(sizes, of.start + query as usize)).max(start)
                }
            };
            // Few rows read what they see alone, rather than all that lies between.
            let few = (group * len <= 64).then(|| {
                let alone = Layout { sequences: 1, q_heads: group, kv_heads: 1, ..*index.layout() };
                let layout = Layout { queries: len, keys: sizes[1], ..alone };
                alone_lists(layout, (0..group * len).map(keys_of))
            });
            let few = few.transpose()?;
            let near = config.masked(Interval(|site: &Site, row: usize| keys_of(site.head * len + row)));
            let of_queries = sequence.queries.start + of.start..sequence.queries.start + of.end;
            pass.within(|pass| {
                let q =
                    q.slice(s![sequence.batch..sequence.batch + 1, heads.clone(), of_queries.clone(), ..]);
                let row = |unit: usize, row: usize| {
                    let at = unit * len + row;
                    (queries[at] != NONE).then(|| [queries[at] as usize, turns[at] as usize])
                };
                let q = turning.run(pass, isa, q, (group, len), row)?;
                let mut states = states::rows(pass, (1, group, len, dims.value_dim))?;
                let keys = few.as_ref().map_or(Keys::Mask, Keys::Tokens);
                from.attend(pass, &near, q.view(), (sequence, g), keys, &mut states)?;
                let at = [sequence.batch, heads.start, of_queries.start];
                states::merge(pass, isa, &states, &places, Into { states: &mut *all, at, fresh: true });
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Lists of one run each, or of none.
fn alone_lists(layout: Layout, keys: impl Iterator<Item = Range<usize>>) -> Result<TokenLists> {
    let (mut offsets, mut runs) = (vec![0], Vec::new());
    for range in keys {
        let run = Run { start: range.start as u32, len: range.len() as u32 };
        runs.extend((run.len > 0).then_some(run));
        offsets.push(runs.len());
    }
    TokenLists::new(layout, offsets, runs)
}

#[cfg(test)]
mod tests {
    use ndarray::{Array4, Axis};

    use super::*;
    use crate::keys::Per;
    use crate::math::rope::Rope;
    use crate::simd::Isa;
    use crate::stages::attend::{Options, define};
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;

    const CHUNKS: Chunks = Chunks { len: 8, most: 3 };

    /// Every query has the first chunk, one that its number says, and its own.
    fn lists(layout: Layout) -> TokenLists {
        let (mut offsets, mut keys) = (vec![0], Vec::new());
        for list in 0..layout.lists().unwrap() {
            let own = (Chunks::seen([layout.queries, layout.keys], list % layout.queries) - 1) / 8;
            let mut chunks = vec![0, list % (own + 1), own];
            chunks.dedup();
            keys.extend(chunks.iter().flat_map(|c| c * 8..(c * 8 + 8).min(layout.keys)).map(|j| j as u32));
            offsets.push(keys.len());
        }
        TokenLists::from_keys(layout, &offsets, &keys).unwrap()
    }

    /// Few rows, which read lists, and many, which read stretches; no sequences, and rows of none.
    #[test]
    fn chunks_of_a_list_are_neighbours() {
        let rope = Rope::builder(6).theta(50.0).build().unwrap();
        let turns = Turns::new(&rope, &(0..24).collect::<Vec<_>>());
        for (batch, q_len) in [(2, 3), (1, 40), (0, 5)] {
            let (q, k) = (array(1, (batch, 4, q_len, 10)), array(2, (batch, 2, 50, 10)));
            let v = array(3, (batch, 2, 50, 5));
            let dims = Qkv::<f32>::new(q.view(), k.view(), v.view()).dims().unwrap();
            let index = lists(Layout::new(Per::Head, 1, &dims));
            for isa in Isa::available() {
                let options = Options { isa: Some(isa), score: Plain, scale: None, mask: Order::default() };
                let config = options.build().unwrap();
                let on = OnChunks {
                    config: &config,
                    turning: Turning { turns: &turns, start: rope.start(10) },
                    chunks: CHUNKS,
                    turned: false,
                };
                let all: Vec<Sequence> = (0..batch).map(|i| Lengths::Full.sequence(&dims, i)).collect();
                on.chunks.check(&index, *index.layout(), &all).unwrap();
                for of in [&all[..], &all[..all.len().min(1)]] {
                    let got = alone(|pass| {
                        let mut out = Array4::from_elem((batch, 4, q_len, 5), f32::NAN);
                        let wet = batch > 0 && !pass.rows((1, 1, 1, 1))?.numbers().is_empty();
                        let to = Some(out.view_mut()).filter(|_| wet);
                        on.attend(pass, (q.view(), of), [k.view(), v.view()], &index, &dims, to)?;
                        Ok(out)
                    });
                    for ((b, h, i, c), got) in got.indexed_iter() {
                        let want =
                            if b < of.len() { row(&rope, [&q, &k, &v], &index, [b, h, i])[c] } else { 0.0 };
                        assert!((f64::from(*got) - want).abs() < 1e-5, "{isa}: {got} {want}");
                    }
                }
            }
        }
    }

    fn row(rope: &Rope, [q, k, v]: [&Array4<f32>; 3], index: &TokenLists, [b, h, i]: [usize; 3]) -> Vec<f64> {
        let turned = |x: &Array4<f32>, [b, h, j]: [usize; 3], position: usize| {
            let mut row: Vec<f64> = x.slice(s![b, h, j, ..]).iter().map(|&x| x.into()).collect();
            rope.define(position as f64, &mut row);
            ndarray::Array1::from(row).insert_axis(Axis(0))
        };
        let (chunks, seen) = (Vec::from_iter(CHUNKS.of(index, (b, h, i))), Chunks::seen([q.dim().2, 50], i));
        let q = turned(q, [b, h, i], (chunks.len() - 1) * 8 + (seen - 1) % 8);
        let keys =
            chunks.iter().enumerate().flat_map(|(slot, c)| (0..8).map(move |j| (slot * 8 + j, c * 8 + j)));
        let (mut near, mut rows) = (Vec::new(), Vec::new());
        for (at, j) in keys.filter(|(_, j)| *j < seen) {
            near.push(turned(k, [b, h / 2, j], at));
            rows.push(j);
        }
        let near = ndarray::concatenate(Axis(0), &Vec::from_iter(near.iter().map(|x| x.view()))).unwrap();
        let v = v.slice(s![b, h / 2, .., ..]).select(Axis(0), &rows).mapv(f64::from);
        define([&q, &near, &v], 1.0 / 10f64.sqrt(), |_, _| Some(0.0)).into_raw_vec_and_offset().0
    }
}
