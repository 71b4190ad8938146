//! LongHeads: each head reads few chunks, as far apart as they were in training.

use std::iter::once;
use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array1, Array2, Array4, ArrayView1, ArrayView4, Axis, Slice, arr0, s};

use crate::attention::{Dim4, Margins};
use crate::cache::{Cache, Cached};
use crate::card::{Extras, carded, exhibit};
use crate::definition;
use crate::definition::heads::{Head, of_heads};
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::tokens::{self, Tokens};
use crate::input::views::views;
use crate::input::{Dims, Input, Lengths, Qkv, Sequence, Site};
use crate::keys::placed::Placed;
use crate::keys::source::{Kv, KvSource};
use crate::keys::{Keys, Layout, Per, Run, TokenLists};
use crate::mask::Mask;
use crate::mask::interval::Interval;
use crate::math::rope::{Rope, Turns};
use crate::score::Plain;
use crate::select::{
    self, Fold, Forced, Pick, Pools, Reduce, Rule, Scheme, Scored, Selected, Source, Summary,
};
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::arrange::{NONE, Picked, Places};
use crate::stages::attend::{self, Config, Options};
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::lay::Lay;
use crate::stages::listed::Order;
use crate::stages::means::Means;
use crate::stages::pass::{self, Out, Pass, Scratch};
use crate::stages::planned::check_count;
use crate::stages::scale;
use crate::stages::selecting::{Spans, difference};
use crate::stages::states::{self, Into};
use crate::stages::turn::Turning;
use crate::stages::virtuals::Merging;

views! {
    /// What goes into [`LongHeads`].
    LongInput<'a, T> {
        /// Queries and keys before they are rotated, and values.
        qkv: array Qkv<'a, T>,
        /// What stands for chunks, `[batch, q_heads, kv_len / chunk, head_dim]`, as
        /// [`chunk_keys`](LongHeads::chunk_keys) makes it; made where it is not given,
        /// of as many queries as keys.
        chunks: maybe Option<ArrayView4<'a, f32>>,
    }
    lengths(x) x.qkv.lengths;
    dims(x) {
        let dims = x.qkv.dims()?;
        if x.qkv.lengths != Lengths::Full {
            let reason = "chunks are of the tokens of whole arrays";
            return Err(Error::Conflict { option: "sequences of other lengths", with: "chunks", reason });
        }
        let Dims { batch, q_heads, q_len, kv_len, head_dim, value_dim, .. } = dims;
        match x.chunks {
            Some(chunks) => {
                let n = chunks.dim().2;
                if chunks.dim() != (batch, q_heads, n, head_dim) {
                    let expected =
                        format!("[batch, q_heads, chunks, head_dim] = [{batch}, {q_heads}, _, {head_dim}]");
                    return Err(Error::shape("chunks", expected, chunks.shape()));
                }
            }
            None if q_len != kv_len => {
                return Err(Error::value("chunks", "them, where queries are not all tokens", "none"));
            }
            None if value_dim != head_dim => {
                let expected = format!("a value_dim of {head_dim} as keys have, or chunks");
                return Err(Error::value("v", expected, value_dim));
            }
            None => {}
        }
        Ok(dims)
    }
}

impl<'a, T> From<Qkv<'a, T>> for LongInput<'a, T> {
    fn from(qkv: Qkv<'a, T>) -> Self {
        Self { qkv, chunks: None }
    }
}

/// Queries over a cache, before they are rotated, and what stands for its chunks. The
/// cache's keys are not rotated, or [turned](LongHeadsBuilder::turned) to their places.
#[derive(Debug)]
pub struct LongCache<'a, Q, C: ?Sized, O = Q> {
    /// Queries, and the keys and values of their sequences.
    pub cached: Cached<'a, Q, C, O>,
    /// What stands for chunks, `[sequences, q_heads, chunks, head_dim]`, entry `b` of
    /// sequence `b` of the call, as [`chunk_keys`](LongHeads::chunk_keys) makes it. A
    /// shorter sequence reads its first ones.
    pub chunks: ArrayView4<'a, f32>,
}

impl<Q, C: ?Sized, O> Clone for LongCache<'_, Q, C, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, C: ?Sized, O> Copy for LongCache<'_, Q, C, O> {}

impl<Q: Element, C: Cache + ?Sized, O: Element> Input for LongCache<'_, Q, C, O> {
    type Out = O;

    fn dims(&self) -> Result<Dims> {
        let dims = self.cached.dims()?;
        self.cached.check_alike()?;
        let (Dims { batch, q_heads, head_dim, .. }, n) = (dims, self.chunks.dim().2);
        if self.chunks.dim() != (batch, q_heads, n, head_dim) {
            let expected =
                format!("[sequences, q_heads, chunks, head_dim] = [{batch}, {q_heads}, _, {head_dim}]");
            return Err(Error::shape("chunks", expected, self.chunks.shape()));
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.cached)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Tokens for LongCache<'_, Q, C, O> {
    fn bytes(&self) -> usize {
        let tokens: usize = self.cached.cache.lengths().iter().sum();
        tokens::size(&self.cached.q) + tokens::size(&self.chunks) + tokens * self.cached.cache.token_bytes()
    }
}

/// LongHeads: each head reads few chunks, as far apart as they were in training.
///
/// ```text
/// k'_j  = rope(k_j, j mod l), q'_j alike                in chunks of l tokens
/// u_c   = mean over a chunk c of softmax attention of its q' on its k', v
/// kap_c = softmax attention of u_c on the k' of the chunk, which are the values too
/// S_t   = chunk 0, the query's own and the one before it, and those before with the
///         largest q_t . kap_c, m together; all while t is below a limit
/// o_t   = softmax attention of q_t on the keys of S_t up to t, whose chunks are put one
///         after the other: key j of the s-th one is at s l + j mod l, the query at
///         (m - 1) l + t mod l
/// ```
///
/// From "LongHeads: Multi-Head Attention is Secretly a Long Context Processor" (arXiv
/// 2402.10685), without training. Its code leaves a query's own key out in prefill but
/// not in decoding; here it is in. Causal; queries and keys come before rotation.
///
/// A turn of a key by its place in its chunk is the same in all lists: queries are
/// turned by what is left, and rows (query, chunk) are attended to chunk by chunk, which
/// costs what dense tiles cost; the softmax states of a query's chunks merge.
///
/// Runs over arrays ([`LongInput`]) and, in chunks of a prompt and in decoding, over caches
/// ([`LongCache`]), whose chunks are made beside them.
///
/// Cost: `2 (head_dim + value_dim)` flops for each of `m l` keys of a query and for the
/// `l` of its chunk; `2 head_dim / l` a pair.
///
/// ```
/// use attention_kernels::math::rope::Rope;
/// use attention_kernels::sparse::{LongHeads, LongInput};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let long = LongHeads::builder(Rope::builder(16).build()?, 4).chunk(64).begin(256).build()?;
/// let out = long.forward(LongInput::from(Qkv::new(x.view(), x.view(), x.view())))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LongHeads {
    config: Config<Order, Plain>,
    rope: Rope,
    chunks: usize,
    chunk: usize,
    begin: usize,
    turned: bool,
    turns: Turns,
}

/// Builds [`LongHeads`].
#[derive(Clone, Debug)]
pub struct LongHeadsBuilder {
    options: Options<Order, Plain>,
    rope: Rope,
    chunks: usize,
    chunk: usize,
    begin: usize,
    turned: bool,
}

impl LongHeadsBuilder {
    /// Tokens of a chunk. Default: 256.
    pub fn chunk(self, chunk: usize) -> Self {
        Self { chunk, ..self }
    }

    /// Queries at positions below this one read all keys. Default: 4096.
    pub fn begin(self, begin: usize) -> Self {
        Self { begin, ..self }
    }

    /// Keys come turned to their places in their chunks, as a cache may keep them.
    pub fn turned(self) -> Self {
        Self { turned: true, ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Forces an instruction set. Default: the best one of the CPU, or
    /// what [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
        self.options.isa = Some(isa);
        self
    }

    /// Checks the options, and makes a table of all turns.
    ///
    /// # Errors
    /// [`Error::Value`] for fewer than 3 chunks, chunks of no tokens, more turns than
    /// 2^24 or a scale that is not finite; [`Error::Isa`] for an instruction set that the
    /// CPU lacks.
    pub fn build(self) -> Result<LongHeads> {
        check_count("chunk", self.chunk)?;
        if self.chunks < 3 {
            return Err(Error::value("chunks", "at least 3", self.chunks));
        }
        let most = self.chunks.max(self.begin.div_ceil(self.chunk)).checked_mul(self.chunk);
        let Some(most) = most.filter(|&most| most <= 1 << 24) else {
            return Err(Error::value("chunks", "at most 2^24 keys of a query", self.chunks));
        };
        let Self { options, rope, chunks, chunk, begin, turned } = self;
        let turns = Turns::new(&rope, &(0..most as isize).collect::<Vec<_>>());
        Ok(LongHeads { config: options.build()?, rope, chunks, chunk, begin, turned, turns })
    }
}

/// Rows that are attended to at once, about.
const ROWS: usize = 1 << 16;

/// Keys at their places and values, which the rows of a head attend to.
trait Near {
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

/// Those of arrays.
struct OfArrays<'a, K>([ArrayView4<'a, K>; 2]);

impl<K: Element> Near for OfArrays<'_, K> {
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
struct OfCache<'a> {
    source: &'a dyn KvSource,
    turns: Option<(&'a Turns, usize)>,
    chunk: usize,
    dims: Dims,
}

impl Near for OfCache<'_> {
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
        let placed = Placed { source, sequence, kv_head, turns, chunk, head_dim: dims.head_dim };
        let (_, q_heads, q_len, _) = q.dim();
        let kv_len = sequence.keys.len();
        let dims = Dims { batch: 1, q_heads, kv_heads: 1, q_len, kv_len, packed: false, ..dims };
        config.attend_source(pass, (q, &placed), dims, keys, states)
    }
}

/// Rows (query, chunk) of the heads of a key/value head for some queries, by chunk.
struct Round {
    len: usize,
    /// Of each row its query, its chunk and its position; [`NONE`] past the last.
    queries: Vec<u32>,
    chunks: Vec<u32>,
    turns: Vec<u32>,
}

impl LongHeads {
    /// `chunks` chunks a query.
    pub fn builder(rope: Rope, chunks: usize) -> LongHeadsBuilder {
        let options = Options { mask: Order { causal: true }, ..Options::default() };
        LongHeadsBuilder { options, rope, chunks, chunk: 256, begin: 4096, turned: false }
    }

    fn dims<T: Element>(&self, x: &LongInput<'_, T>) -> Result<Dims> {
        let dims = Input::dims(x)?;
        self.rope.fits(dims.head_dim)?;
        match x.chunks.map(|chunks| chunks.dim().2) {
            Some(n) if n < dims.kv_len / self.chunk => {
                let expected = format!("{} or more chunks", dims.kv_len / self.chunk);
                Err(Error::value("chunks", expected, n))
            }
            _ => Ok(dims),
        }
    }

    fn turning(&self, dim: usize) -> Turning<'_> {
        Turning { turns: &self.turns, start: self.rope.start(dim) }
    }

    /// Rows of whole chunks turned to their places in these.
    fn placed<'p, T: Element>(&self, pass: &mut Pass<'p>, x: ArrayView4<'_, T>) -> Result<Scratch<'p>> {
        let (_, heads, n, dim) = x.dim();
        self.turning(dim).run(pass, self.config.isa(), x, (heads, n), |_, j| Some([j, j % self.chunk]))
    }

    /// What stands for the chunks that are whole, `[batch, q_heads, chunks, head_dim]`, of
    /// as many queries as keys.
    ///
    /// # Errors
    /// What the mechanism refuses.
    pub fn chunk_keys<T: Element>(&self, x: Qkv<'_, T>) -> Result<Array4<f32>> {
        self.dims(&x.reborrow().into())?;
        pass::once(|pass| {
            let isa = self.config.isa();
            let ((batch, heads, n, dim), l) = (x.q.dim(), self.chunk);
            let whole = Slice::from(..n / l * l);
            let [q, k, v] = [x.q, x.k, x.v].map(|x| x.slice_axis_move(Axis(2), whole));
            let (q, k) = (self.placed(pass, q)?, self.keys(pass, k)?);
            let v = self.laid(pass, v)?;
            let own = self.config.masked(Interval(|_: &Site, i: usize| i / l * l..i / l * l + l));
            let mut attended = pass.rows((batch, heads, n / l * l, dim))?;
            let [q, k, v] = [&q, &k, &v].map(Scratch::view);
            let of_chunks = Qkv { q, k, v, lengths: Lengths::Full, out: PhantomData::<f32> };
            own.attend(pass, of_chunks, attended.view_mut())?;
            let (means, mut mean) =
                (Means { isa, width: l, stride: l }, pass.rows((batch, heads, n / l, dim))?);
            pass.stage(
                || 0,
                means.bytes(attended.dim(), false),
                |arena| {
                    if let Some(mean) = mean.view_mut() {
                        means.run(attended.view(), mean, arena);
                    }
                },
            );
            let merging = Merging::new(l, Some(self.config.scale_of(dim) as f32), isa)?;
            Ok(merging.run(pass, mean.view(), k, k)?.view().to_owned())
        })
    }

    /// Keys at their places, in `f32`.
    fn keys<'p, T: Element>(&self, pass: &mut Pass<'p>, k: ArrayView4<'_, T>) -> Result<Scratch<'p>> {
        if self.turned { self.laid(pass, k) } else { self.placed(pass, k) }
    }

    fn laid<'p, T: Element>(&self, pass: &mut Pass<'p>, x: ArrayView4<'_, T>) -> Result<Scratch<'p>> {
        let mut rows = pass.rows(x.dim())?;
        Lay::default().run(pass, self.config.isa(), x, (&mut rows, 0), |_, _| 1.0)?;
        Ok(rows)
    }

    fn scheme(&self) -> Scheme {
        let l = self.chunk;
        let pools =
            Pools { width: l, stride: l, fold: Fold::Max, coarse: None, dense: self.begin.saturating_add(1) };
        Scheme {
            unit: l,
            summary: Summary::Mean,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(self.chunks), forced: Forced { first: 1, last: 2, inside: true } },
            causal: true,
            scored: Scored::Pools(pools),
        }
    }

    /// Keys that a query of a sequence sees.
    fn seen([queries, keys]: [usize; 2], query: usize) -> usize {
        (query + keys + 1).saturating_sub(queries).min(keys)
    }

    /// The chunks of a list, which are whole.
    fn named<'a>(
        &self,
        index: &'a TokenLists,
        (b, h, i): (usize, usize, usize),
    ) -> impl Iterator<Item = usize> + use<'a> {
        let l = self.chunk;
        index.runs(b, h, i).iter().flat_map(move |run| run.start as usize / l..run.range().end.div_ceil(l))
    }

    /// Refuses an index for sequences of so many queries and keys.
    fn check_index(&self, index: &TokenLists, want: Layout, sizes: &[[usize; 2]]) -> Result<()> {
        let (of, l) = (index.layout(), self.chunk);
        if *of != want {
            return Err(Error::value("index", format!("{want:?}"), format_args!("{of:?}")));
        }
        let most = self.chunks.max(self.begin.div_ceil(l));
        for (b, &[queries, keys]) in sizes.iter().enumerate() {
            for (h, i) in (0..want.q_heads).flat_map(|h| (0..queries).map(move |i| (h, i))) {
                let whole = |run: &Run| {
                    let end = run.range().end;
                    let ends = end == keys || end < keys && end.is_multiple_of(l);
                    (run.start as usize).is_multiple_of(l) && ends
                };
                let runs = index.runs(b, h, i);
                if !runs.iter().all(whole) || self.named(index, (b, h, i)).count() > most {
                    let expected = format!("at most {most} whole chunks of {l} keys a list");
                    return Err(Error::value("index", expected, format_args!("{runs:?}")));
                }
            }
        }
        Ok(())
    }

    /// Checks an index, and gives the sizes.
    fn fitting<T: Element>(&self, x: &LongInput<'_, T>, index: &TokenLists) -> Result<Dims> {
        let dims = self.dims(x)?;
        self.check_index(
            index,
            Layout::new(Per::Head, 1, &dims),
            &vec![[dims.q_len, dims.kv_len]; dims.batch],
        )?;
        Ok(dims)
    }

    /// The rows of some queries.
    fn round(
        &self,
        sizes: [usize; 2],
        index: &TokenLists,
        (b, heads): (usize, Range<usize>),
        of: &Range<usize>,
    ) -> Round {
        let mut rows: Vec<Vec<[u32; 3]>> = Vec::new();
        let mut starts = vec![0; sizes[1].div_ceil(self.chunk) + 1];
        for h in heads {
            starts.fill(0);
            let mut found = Vec::new();
            for i in of.clone() {
                let (count, seen) = (self.named(index, (b, h, i)).count(), Self::seen(sizes, i));
                for (slot, chunk) in self.named(index, (b, h, i)).enumerate().filter(|_| seen > 0) {
                    let turn = (count - 1 - slot) * self.chunk + (seen - 1) % self.chunk;
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
        Round { len, queries: column(0), chunks: column(1), turns: column(2) }
    }

    /// Attention of all queries on keys at their places.
    fn rounds<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        (q, sequences): (ArrayView4<'_, T>, &[Sequence]),
        from: &impl Near,
        index: &TokenLists,
        dims: &Dims,
        all: &mut Scratch<'_>,
    ) -> Result<()> {
        let (isa, l, group) = (self.config.isa(), self.chunk, dims.q_heads / dims.kv_heads.max(1));
        for (sequence, g) in sequences.iter().flat_map(|of| (0..dims.kv_heads).map(move |g| (of, g))) {
            let (b, entry, sizes) =
                (sequence.index, sequence.batch, [sequence.queries.len(), sequence.keys.len()]);
            let most = self.chunks.max(self.begin.div_ceil(l)).min(sizes[1].div_ceil(l));
            let step = (ROWS / (group * most).max(1)).max(1);
            for first in (0..sizes[0]).step_by(step) {
                let of = first..(first + step).min(sizes[0]);
                let heads = g * group..(g + 1) * group;
                let Round { len, queries, chunks, turns } =
                    &self.round(sizes, index, (b, heads.clone()), &of);
                let len = *len;
                let picked = Picked { rows: queries, units: group, len };
                let places = Places::of(picked, [1, group, of.len()])?;
                let keys_of = |row: usize| match queries[row] {
                    NONE => sizes[1]..sizes[1],
                    query => {
                        let start = chunks[row] as usize * l;
                        start..(start + l).min(Self::seen(sizes, of.start + query as usize)).max(start)
                    }
                };
                // Few rows read what they see alone, rather than all that lies between.
                let few = (group * len <= 64).then(|| -> Result<TokenLists> {
                    let layout = Layout {
                        queries: len,
                        sequences: 1,
                        q_heads: group,
                        kv_heads: 1,
                        keys: sizes[1],
                        ..*index.layout()
                    };
                    let (mut offsets, mut runs) = (vec![0], Vec::new());
                    for range in (0..group * len).map(keys_of) {
                        let run = Run { start: range.start as u32, len: range.len() as u32 };
                        runs.extend((run.len > 0).then_some(run));
                        offsets.push(runs.len());
                    }
                    TokenLists::new(layout, offsets, runs)
                });
                let few = few.transpose()?;
                let near =
                    self.config.masked(Interval(|site: &Site, row: usize| keys_of(site.head * len + row)));
                let rows = sequence.queries.start + of.start..sequence.queries.start + of.end;
                pass.within(|pass| {
                    let q = q.slice(s![entry..entry + 1, heads.clone(), rows.clone(), ..]);
                    let row = |unit: usize, row: usize| {
                        let at = unit * len + row;
                        (queries[at] != NONE).then(|| [queries[at] as usize, turns[at] as usize])
                    };
                    let q = self.turning(dims.head_dim).run(pass, isa, q, (group, len), row)?;
                    let mut states = states::rows(pass, (1, group, len, dims.value_dim))?;
                    let keys = few.as_ref().map_or(Keys::Mask, Keys::Tokens);
                    from.attend(pass, &near, q.view(), (sequence, g), keys, &mut states)?;
                    let at = [entry, heads.start, rows.start];
                    states::merge(pass, isa, &states, &places, Into { states: &mut *all, at, fresh: true });
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    /// A row turned to a position, by definition.
    fn define_turn<R: Real>(&self, row: ArrayView1<'_, R>, position: usize) -> Array1<R> {
        let mut turned = row.to_owned();
        for (i, (sin, cos)) in self.rope.angles(position as f64).enumerate() {
            let ((a, b), [sin, cos]) = (self.rope.pair(i, row.len()), [sin, cos].map(|x| R::rounded(x, 1.0)));
            turned[a] = row[a] * cos - row[b] * sin;
            turned[b] = row[a] * sin + row[b] * cos;
        }
        turned
    }

    /// Rows at their places, by definition.
    fn define_placed<R: Real>(&self, x: &Array2<R>) -> Array2<R> {
        let mut placed = x.clone();
        for (j, mut row) in placed.outer_iter_mut().enumerate() {
            row.assign(&self.define_turn(x.row(j), j % self.chunk));
        }
        placed
    }

    /// What stands for chunks, by definition, of a head.
    fn define_chunks<T: Element>(&self, x: &LongInput<'_, T>, head: &Head) -> Array2<f64> {
        if let Some(chunks) = &x.chunks {
            return head.rows(chunks, &(0..chunks.dim().2));
        }
        let (l, qkv) = (self.chunk, &x.qkv);
        let [q, k, v] = [&qkv.q, &qkv.k, &qkv.v].map(|x| head.rows::<f64, T>(x, &head.keys));
        let (q, k) = (self.define_placed(&q), if self.turned { k } else { self.define_placed(&k) });
        let (n, scale) = (k.nrows() / l, self.config.scale_of(k.ncols()));
        let mut chunks = Array2::zeros((n, k.ncols()));
        for (c, mut chunk) in chunks.outer_iter_mut().enumerate() {
            let [q, k, v] = [&q, &k, &v].map(|x| x.slice(s![c * l..(c + 1) * l, ..]).to_owned());
            let own = attend::define([&q, &k, &v], scale, |_, _| Some(0.0));
            let mean = own.sum_axis(Axis(0)).insert_axis(Axis(0)) / l as f64;
            chunk.assign(&attend::define([&mean, &k, &k], scale, |_, _| Some(0.0)).row(0));
        }
        chunks
    }
}

impl<T: Element> Choosing<LongInput<'_, T>> for LongHeads {
    type Index = TokenLists;

    fn choose(&self, x: LongInput<'_, T>, _: &mut Workspace) -> Result<TokenLists> {
        let dims = self.dims(&x)?;
        let made = if x.chunks.is_none() { Some(self.chunk_keys(x.qkv.reborrow())?) } else { None };
        let chunks = made.as_ref().map(|made| made.view()).or(x.chunks);
        let Some(chunks) = chunks else { return Err(Error::value("chunks", "them", "none")) };
        // Each query head has its own; of the keys themselves sizes matter alone.
        let (zero, shape) = (arr0(0f32), (dims.batch, dims.q_heads, dims.kv_len, dims.head_dim));
        let none = zero.broadcast(shape).ok_or_else(|| Error::too_large("k", format_args!("{shape:?}")))?;
        let k = none.reborrow();
        let outer = Qkv { q: x.qkv.q, k: none, v: k, lengths: Lengths::Full, out: PhantomData::<f32> };
        let source = Source::new(self.config.isa(), outer, None)?.over(f32::any(Heads::new(chunks)));
        let lists = select::select(&source, &self.scheme(), &mut Workspace::new())?;
        lists.relaid(Layout::new(Per::Head, 1, &dims)).tokens()
    }

    fn define_choice(&self, x: LongInput<'_, T>) -> Result<(TokenLists, Margins)> {
        let (dims, scheme) = (self.dims(&x)?, self.scheme());
        let layout = Layout::new(Per::Head, 1, &dims);
        layout.lists()?;
        let n = x.chunks.map_or(dims.kv_len / self.chunk, |chunks| chunks.dim().2);
        let of_chunks = Dims { q_len: n, value_dim: dims.head_dim, ..dims };
        let chunks = of_heads(&of_chunks, &x.qkv.lengths, |head| self.define_chunks(&x, head));
        let score = |b: usize, h: usize, i: usize, of: Range<usize>| {
            let pairs = x.qkv.q.slice(s![b, h, i, ..]).into_iter().zip(chunks.slice(s![
                b,
                h,
                of.start / self.chunk,
                ..
            ]));
            pairs.map(|(q, &k)| q.to_f64() * k).sum()
        };
        let (lists, mut margins) = definition::select::select(&scheme, &dims, &x.qkv.lengths, &layout, score);
        // Of what overflows in `f32` the kernel knows less.
        let arrays = [&x.qkv.q, &x.qkv.k, &x.qkv.v];
        if arrays.iter().any(|x| x.iter().any(|x| (1e15..f64::INFINITY).contains(&x.to_f64().abs()))) {
            margins.doubtful.iter_mut().for_each(|list| *list = once(0..dims.kv_len).collect());
        }
        Ok((Selected::of(&scheme, &dims, &x.qkv.lengths, &lists).relaid(layout).tokens()?, margins))
    }

    fn choice_flops(&self, x: LongInput<'_, T>) -> Result<u64> {
        let Dims { batch, q_heads, q_len, kv_len, head_dim, .. } = self.dims(&x)?;
        let (l, rows) = (self.chunk, (batch * q_heads * q_len) as u64);
        let own = if x.chunks.is_some() { 0 } else { 4 * l + 4 };
        Ok(rows * head_dim as u64 * (own + 2 * (kv_len / l)) as u64)
    }

    fn differ(a: &TokenLists, b: &TokenLists, margins: &Margins) -> Option<String> {
        difference(a, b, margins)
    }

    fn flow_on(
        &self,
        x: LongInput<'_, T>,
        index: &TokenLists,
        pass: &mut Pass<'_>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let dims = self.fitting(&x, index)?;
        let mut all = states::rows(pass, (dims.batch, dims.q_heads, dims.q_len, dims.value_dim))?;
        let of: Vec<Sequence> = (0..dims.batch).map(|i| Lengths::Full.sequence(&dims, i)).collect();
        if self.turned {
            self.rounds(pass, (x.qkv.q, &of), &OfArrays([x.qkv.k, x.qkv.v]), index, &dims, &mut all)?;
        } else {
            let (k, v) = (self.placed(pass, x.qkv.k)?, self.laid(pass, x.qkv.v)?);
            self.rounds(pass, (x.qkv.q, &of), &OfArrays([k.view(), v.view()]), index, &dims, &mut all)?;
        }
        scale::run(pass, self.config.isa(), &all, |_| 1.0, out);
        Ok(())
    }

    fn define_on<R: Real>(&self, x: LongInput<'_, T>, index: &TokenLists) -> Result<Array4<R>> {
        let (dims, qkv) = (self.fitting(&x, index)?, &x.qkv);
        Ok(self.define_rows(&dims, &qkv.lengths, &qkv.q, [&qkv.k, &qkv.v], index))
    }
}
choosing!(LongHeads, TokenLists, LongInput);

impl LongHeads {
    /// The sizes of a call over a cache that fits.
    fn cached_dims<Q: Element, C: Cache + ?Sized, O: Element>(
        &self,
        x: &LongCache<'_, Q, C, O>,
    ) -> Result<Dims> {
        let (dims, slots) = (Input::dims(x)?, x.cached.slots());
        self.rope.fits(dims.head_dim)?;
        let most = (0..dims.batch).map(|i| slots.len(i) / self.chunk).max().unwrap_or(0);
        if x.chunks.dim().2 < most {
            return Err(Error::value("chunks", format!("{most} or more chunks"), x.chunks.dim().2));
        }
        Ok(dims)
    }

    /// Calls `run` with the sizes and sequences of a call over a cache, whose index is checked.
    fn with_index<Q: Element, C: Cache + ?Sized, O: Element, R>(
        &self,
        x: &LongCache<'_, Q, C, O>,
        index: &TokenLists,
        run: impl FnOnce(&Dims, &[Sequence]) -> Result<R>,
    ) -> Result<R> {
        let (dims, slots) = (self.cached_dims(x)?, x.cached.slots());
        let sequences: Vec<Sequence> = (0..dims.batch).map(|i| slots.sequence(&dims, i)).collect();
        let sizes: Vec<[usize; 2]> = sequences.iter().map(|of| [of.queries.len(), of.keys.len()]).collect();
        let want = Layout::of(Per::Head, 1, &dims, &Spans::new(&dims, &slots).lengths(&slots));
        self.check_index(index, want, &sizes)?;
        run(&dims, &sequences)
    }

    /// Outputs on an index by definition.
    fn define_rows<R: Real, T: Element, K: Element>(
        &self,
        dims: &Dims,
        lengths: &Lengths<'_>,
        q: &ArrayView4<'_, T>,
        [k, v]: [&ArrayView4<'_, K>; 2],
        index: &TokenLists,
    ) -> Array4<R> {
        let l = self.chunk;
        of_heads(dims, lengths, |head| {
            let q = head.rows::<R, T>(q, &head.queries);
            let [k, v] = [k, v].map(|x| head.rows::<R, K>(x, &head.keys));
            let sizes = [head.queries.len(), head.keys.len()];
            let mut out = Array2::from_elem((sizes[0], dims.value_dim), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let chunks: Vec<usize> = self.named(index, (head.sequence, head.head, i)).collect();
                let seen = Self::seen(sizes, i);
                let keys: Vec<[usize; 2]> = chunks
                    .iter()
                    .enumerate()
                    .flat_map(|(slot, c)| (c * l..(c + 1) * l).map(move |j| [slot, j]))
                    .filter(|[_, j]| *j < seen)
                    .collect();
                if keys.is_empty() {
                    continue;
                }
                let position = (chunks.len() - 1) * l + (seen - 1) % l;
                let query = self.define_turn(q.row(i), position).insert_axis(Axis(0));
                let mut near = Array2::from_elem((keys.len(), dims.head_dim), R::of(0.0));
                for ([slot, j], mut near) in keys.iter().zip(near.outer_iter_mut()) {
                    let at = slot * l + if self.turned { 0 } else { j % l };
                    near.assign(&self.define_turn(k.row(*j), at));
                }
                let rows: Vec<usize> = keys.iter().map(|[_, j]| *j).collect();
                let values = v.select(Axis(0), &rows);
                let scale = self.config.scale(dims);
                out.assign(&attend::define([&query, &near, &values], scale, |_, _| Some(0.0)).row(0));
            }
            out
        })
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Choosing<LongCache<'_, Q, C, O>> for LongHeads {
    type Index = TokenLists;

    fn choose(&self, x: LongCache<'_, Q, C, O>, _: &mut Workspace) -> Result<TokenLists> {
        let (dims, cached) = (self.cached_dims(&x)?, x.cached.reborrow());
        let slots = cached.slots();
        let spans = Spans::new(&dims, &slots);
        let places = (spans.lengths(&slots), Some(slots));
        // Each query head has its own chunks.
        let outer = Dims { kv_heads: dims.q_heads, ..dims };
        let rows = (Q::any(Heads::new(cached.q)), Kv::CacheKeys(cached.cache.source()));
        let source = Source::any(self.config.isa(), outer, rows, places).over(f32::any(Heads::new(x.chunks)));
        let lists = select::select(&source, &self.scheme(), &mut Workspace::new())?;
        lists.relaid(Layout::of(Per::Head, 1, &dims, &spans.lengths(&slots))).tokens()
    }

    fn define_choice(&self, x: LongCache<'_, Q, C, O>) -> Result<(TokenLists, Margins)> {
        let (dims, cached, scheme) = (self.cached_dims(&x)?, x.cached.reborrow(), self.scheme());
        let slots = cached.slots();
        let spans = Spans::new(&dims, &slots);
        let lengths = spans.lengths(&slots);
        let layout = Layout::of(Per::Head, 1, &dims, &lengths);
        layout.lists()?;
        // Keys of packed sequences count one after the other.
        let places: Vec<Sequence> = (0..dims.batch).map(|i| lengths.sequence(&dims, i)).collect();
        let score = |b: usize, h: usize, i: usize, keys: Range<usize>| {
            let of = |s: &&Sequence| s.batch == b && s.queries.contains(&i);
            let Some(of) = places.iter().find(of) else { return f64::NAN };
            let chunk = x.chunks.slice(s![of.index, h, (keys.start - of.keys.start) / self.chunk, ..]);
            cached.q.slice(s![b, h, i, ..]).iter().zip(chunk).map(|(q, &k)| q.to_f64() * f64::from(k)).sum()
        };
        let (lists, margins) = definition::select::select(&scheme, &dims, &lengths, &layout, score);
        Ok((Selected::of(&scheme, &dims, &lengths, &lists).relaid(layout).tokens()?, margins))
    }

    fn choice_flops(&self, x: LongCache<'_, Q, C, O>) -> Result<u64> {
        let (dims, slots) = (self.cached_dims(&x)?, x.cached.slots());
        let pairs = |i: usize| slots.sequence(&dims, i).queries.len() * (slots.len(i) / self.chunk);
        let pairs: usize = (0..dims.batch).map(pairs).sum();
        Ok(2 * (pairs * dims.q_heads * dims.head_dim) as u64)
    }

    fn differ(a: &TokenLists, b: &TokenLists, margins: &Margins) -> Option<String> {
        difference(a, b, margins)
    }

    fn flow_on(
        &self,
        x: LongCache<'_, Q, C, O>,
        index: &TokenLists,
        pass: &mut Pass<'_>,
        out: Out<'_, O>,
    ) -> Result<()> {
        self.with_index(&x, index, |dims, sequences| {
            let entries = x.cached.q.dim().0;
            let mut all = states::rows(pass, (entries, dims.q_heads, dims.q_len, dims.value_dim))?;
            // Rows of no sequence.
            all.numbers_mut().fill(0.0);
            let turns = (!self.turned).then(|| (&self.turns, self.rope.start(dims.head_dim)));
            let from = OfCache { source: x.cached.cache.source(), turns, chunk: self.chunk, dims: *dims };
            self.rounds(pass, (x.cached.q, sequences), &from, index, dims, &mut all)?;
            scale::run(pass, self.config.isa(), &all, |_| 1.0, out);
            Ok(())
        })
    }

    fn define_on<R: Real>(&self, x: LongCache<'_, Q, C, O>, index: &TokenLists) -> Result<Array4<R>> {
        self.with_index(&x, index, |dims, _| {
            let cached = x.cached.reborrow();
            let held = cached.held(dims);
            let lengths = held.lengths(&cached);
            Ok(self.define_rows(dims, &lengths, &cached.q, [&held.k.view(), &held.v.view()], index))
        })
    }
}
choosing!(
    LongHeads, TokenLists,
    [Q: crate::element::Element, C: crate::cache::Cache + ?Sized, O: crate::element::Element]
    LongCache<'_, Q, C, O>
);

exhibit! {
    LongHeadsExhibit of LongHeads, "sparse", "LongHeads", "arXiv 2402.10685";
    "of chunks of 16 keys the first, the last two and one whose attended key it scores highest, put together";
    not "within the length that a model was trained for";
    tokens true;
    build(x, _) { LongHeads::builder(Rope::builder(x.q.dim().3 / 2 * 2).build()?, 4).chunk(16).begin(64) }
    extras(x, field) {
        let ((batch, heads, len, dim), own) = (x.q.dim(), x.v.dim().3);
        let n = if own == dim { 0 } else { len / 16 };
        let channels = Array4::from_shape_fn((batch, heads, n, dim), |(_, h, c, i)| field.at(3, h, c, i));
        Extras { channels, ..Extras::default() }
    }
    input<'a, T>(x, extras) -> LongInput<'a, T> {
        let given = x.v.dim().3 != x.q.dim().3;
        LongInput { qkv: x, chunks: given.then(|| extras.channels.view()) }
    }
}
carded!(LongHeads, LongHeadsExhibit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::cache::{Append, Contiguous, KvShape, Paged, Pages};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays};

    fn rope() -> Rope {
        Rope::builder(16).theta(100.0).build().unwrap()
    }

    fn long(chunks: usize, begin: usize) -> LongHeadsBuilder {
        LongHeads::builder(rope(), chunks).chunk(16).begin(begin)
    }

    /// Where no chunk is left out positions are those of the sequence.
    #[test]
    fn all_chunks_are_dense() {
        let x = Arrays::normal([2, 4, 2, 150, 150, 16, 16], 1);
        let [mut q, mut k] = [x.q.clone(), x.k.clone()];
        let positions: Vec<isize> = (0..150).collect();
        [&mut q, &mut k].into_iter().for_each(|x| rope().rotate(x.view_mut(), &positions).unwrap());
        let turned = Qkv::new(q.view(), k.view(), x.v.view());
        let want = Dense::builder().causal().build().unwrap().forward(turned).unwrap();
        for builder in [long(10, 0), long(3, 150)] {
            testing::near("all", &builder.build().unwrap().forward(LongInput::from(x.qkv())).unwrap(), &want);
        }
    }

    /// A step over keys at their places and chunks that were kept is the last row, and
    /// later tokens are nothing to it.
    #[test]
    fn last_row_is_decoding() {
        for (heads, groups) in [(4, 2), (2, 2)] {
            let x = Arrays::normal([1, heads, groups, 150, 150, 16, 16], 2);
            let all = long(4, 64).build().unwrap();
            let (whole, chunks) =
                (all.forward(LongInput::from(x.qkv())).unwrap(), all.chunk_keys(x.qkv()).unwrap());
            let mut k = x.k.clone();
            let places: Vec<isize> = (0..150).map(|j| j % 16).collect();
            rope().rotate(k.view_mut(), &places).unwrap();
            for row in [149, 143, 100] {
                let of = |x: &Array4<f32>, n: usize| x.slice(s![.., .., ..n, ..]).to_owned();
                let (q, k, v) = (x.q.slice(s![.., .., row..row + 1, ..]), of(&k, row + 1), of(&x.v, row + 1));
                let qkv = Qkv::new(q, k.view(), v.view());
                let step = LongInput { qkv, chunks: Some(chunks.view()) };
                let got = long(4, 64).turned().build().unwrap().forward(step).unwrap();
                testing::near("step", &got, &whole.slice(s![.., .., row..row + 1, ..]).to_owned());
            }
            let index = all.select(LongInput::from(x.qkv())).unwrap();
            let chunks: Vec<usize> = all.named(&index, (0, 1, 149)).collect();
            assert!(chunks.len() == 4 && chunks[0] == 0 && chunks[2..] == [8, 9], "{chunks:?}");
            let mut later = Arrays { q: x.q.clone(), k: x.k.clone(), v: x.v.clone() };
            for x in [&mut later.q, &mut later.k, &mut later.v] {
                x.slice_mut(s![.., .., 120.., ..]).fill(f32::NAN);
            }
            let before = all.forward(LongInput::from(later.qkv())).unwrap();
            testing::near(
                "before",
                &before.slice(s![.., .., ..120, ..]).to_owned(),
                &whole.slice(s![.., .., ..120, ..]).to_owned(),
            );
        }
    }

    /// Over caches that hold the rows, turned or not, of sequences of any lengths, in chunks
    /// of a prompt and in decoding, it selects and gives what it does over arrays.
    #[test]
    fn caches_are_arrays() {
        let x = Arrays::normal([2, 4, 2, 150, 150, 16, 16], 5);
        let chunks = long(4, 64).build().unwrap().chunk_keys(x.qkv()).unwrap();
        let mut placed = x.k.clone();
        let places: Vec<isize> = (0..150).map(|j| j % 16).collect();
        rope().rotate(placed.view_mut(), &places).unwrap();
        let shape = KvShape { kv_heads: 2, head_dim: 16, value_dim: 16 };
        for (q_len, lengths) in [(1, [150, 90]), (20, [100, 150]), (5, [3, 149])] {
            let first = |b: usize| lengths[b] as isize - q_len as isize;
            // The queries of the last tokens; those of none see nothing.
            let mut q = Array4::from_elem((2, 4, q_len, 16), 0.5);
            for (b, i) in (0..2).flat_map(|b| (0..q_len).map(move |i| (b, i))) {
                if let Ok(row) = usize::try_from(first(b) + i as isize) {
                    q.slice_mut(s![b, .., i, ..]).assign(&x.q.slice(s![b, .., row, ..]));
                }
            }
            for turned in [false, true] {
                let builder = if turned { long(4, 64).turned() } else { long(4, 64) };
                let (long, k) = (builder.build().unwrap(), if turned { &placed } else { &x.k });
                let mut flat = Contiguous::<f32>::new(shape, 2, 150).unwrap();
                let mut paged = Paged::<f32>::new(shape, 2, Pages { count: 60, len: 8 }).unwrap();
                let mut half = Paged::<half::f16>::new(shape, 2, Pages { count: 60, len: 8 }).unwrap();
                for (b, &n) in lengths.iter().enumerate() {
                    let (k, v) = (k.slice(s![b, .., ..n, ..]), x.v.slice(s![b, .., ..n, ..]));
                    flat.append(b, k, v).unwrap();
                    paged.append(b, k, v).unwrap();
                    half.append(b, k, v).unwrap();
                }
                let caches: [&dyn Cache; 3] = [&flat, &paged, &half];
                for (which, cache) in caches.into_iter().enumerate() {
                    let cached = LongCache { cached: Cached::new(q.view(), cache), chunks: chunks.view() };
                    let (index, out) = (long.select(cached).unwrap(), long.forward(cached).unwrap());
                    let (want, margins) = long.reference_select(cached).unwrap();
                    let apart =
                        <LongHeads as Selects<LongInput<'_, f32>>>::difference(&index, &want, &margins);
                    assert_eq!(apart, None);
                    let want = long.reference_on(cached, &index).unwrap().mapv(|x| x as f32);
                    testing::near("definition", &out, &want);
                    let bytes = long.workspace_bytes(cached).unwrap();
                    let mut workspace = Workspace::with_capacity(bytes);
                    let before = workspace.capacity();
                    let mut again = Array4::zeros(out.dim());
                    long.forward_into(cached, again.view_mut(), &mut workspace).unwrap();
                    assert_eq!((workspace.capacity(), again), (before, out.clone()));
                    for (b, &n) in lengths.iter().enumerate().filter(|_| which < 2) {
                        let of = |x: &Array4<f32>| x.slice(s![b..b + 1, .., ..n, ..]).to_owned();
                        let (k, v) = (of(k), of(&x.v));
                        let qkv = Qkv::new(q.slice(s![b..b + 1, .., .., ..]), k.view(), v.view());
                        let given = Some(chunks.slice(s![b..b + 1, .., .., ..]));
                        let alone = long.forward(LongInput { qkv, chunks: given }).unwrap();
                        testing::near("cache", &out.slice(s![b..b + 1, .., .., ..]).to_owned(), &alone);
                    }
                }
                // Both sequences packed, in the other order, and a row of none.
                let parts = [q.slice(s![1..2, .., q_len - 1.., ..]), q.slice(s![0..1, .., .., ..])];
                let rest = Array4::from_elem((1, 4, 1, 16), f32::NAN);
                let all = ndarray::concatenate![Axis(2), parts[0], parts[1], rest];
                let (offsets, swapped) = ([0, 1, 1 + q_len], chunks.select(Axis(0), &[1, 0]));
                let packed = Cached::new(all.view(), &paged).sequences(&[1, 0]).packed(&offsets);
                let packed = LongCache { cached: packed, chunks: swapped.view() };
                let (got, want) = (
                    long.forward(packed).unwrap(),
                    long.forward(LongCache { cached: Cached::new(q.view(), &paged), chunks: chunks.view() })
                        .unwrap(),
                );
                let first = got.slice(s![.., .., ..1, ..]).to_owned();
                testing::near("first", &first, &want.slice(s![1..2, .., q_len - 1.., ..]).to_owned());
                let second = got.slice(s![.., .., 1..1 + q_len, ..]).to_owned();
                testing::near("second", &second, &want.slice(s![0..1, .., .., ..]).to_owned());
                assert!(got.slice(s![.., .., 1 + q_len.., ..]).iter().all(|&x| x == 0.0));
            }
        }
    }

    #[test]
    fn caches_that_do_not_fit_are_refused() {
        let x = Arrays::normal([2, 4, 2, 3, 90, 16, 16], 6);
        let shape = KvShape { kv_heads: 2, head_dim: 16, value_dim: 16 };
        let mut cache = Paged::<f32>::new(shape, 2, Pages { count: 60, len: 8 }).unwrap();
        for (b, n) in [(0, 90), (1, 40)] {
            cache.append(b, x.k.slice(s![b, .., ..n, ..]), x.v.slice(s![b, .., ..n, ..])).unwrap();
        }
        let long = long(3, 0).build().unwrap();
        let zero = Array4::zeros((2, 4, 5, 16));
        let refusal = |chunks: ArrayView4<'_, f32>| {
            let x = LongCache { cached: Cached::new(x.q.view(), &cache), chunks };
            let mut out = Array4::from_elem((2, 4, 3, 16), f32::NAN);
            let refused = long.forward_into(x, out.view_mut(), &mut Workspace::new()).unwrap_err();
            assert!(out.iter().all(|x| x.is_nan()), "something was written");
            refused.to_string()
        };
        assert_eq!(refusal(zero.slice(s![.., .., ..4, ..])), "chunks: expected 5 or more chunks, got 4");
        assert!(refusal(zero.slice(s![..1, .., .., ..])).starts_with("chunks: expected shape"));
        assert!(refusal(zero.slice(s![.., ..2, .., ..])).starts_with("chunks: expected shape"));
        let own = LongCache { cached: Cached::new(x.q.view(), &cache), chunks: zero.view() };
        let index = long.select(own).unwrap();
        // Keys that a shorter sequence has not, and a part of a chunk.
        for key in [48, 3] {
            let lists = 2 * 4 * 3;
            let offsets: Vec<usize> = (0..=lists).map(|list| usize::from(list == lists)).collect();
            let other = TokenLists::from_keys(*index.layout(), &offsets, &[key]).unwrap();
            assert!(long.forward_on(own, &other).unwrap_err().to_string().starts_with("index: "), "{key}");
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: LongHeadsBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(long(2, 0)), "chunks: expected at least 3, got 2");
        assert_eq!(refusal(long(3, 0).chunk(0)), "chunk: expected at least 1, got 0");
        let (x, long) = (Arrays::normal([1, 2, 1, 90, 90, 16, 16], 1), long(4, 0).build().unwrap());
        let short = Qkv { q: x.q.slice(s![.., .., 80.., ..]), ..x.qkv() };
        assert!(long.forward(LongInput::from(short)).unwrap_err().to_string().starts_with("chunks: "));
        let zero = Array4::zeros((1, 2, 4, 16));
        let few = LongInput { qkv: x.qkv(), chunks: Some(zero.view()) };
        assert!(long.forward(few).unwrap_err().to_string().starts_with("chunks: "));
        let layout = Layout { queries: 90, ..*long.select(LongInput::from(x.qkv())).unwrap().layout() };
        let keys: Vec<u32> = (0..180).map(|_| 3).collect();
        let other = TokenLists::from_keys(layout, &(0..=180).collect::<Vec<_>>(), &keys).unwrap();
        assert!(
            long.forward_on(LongInput::from(x.qkv()), &other).unwrap_err().to_string().starts_with("index: ")
        );
    }
}
