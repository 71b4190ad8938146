//! LongHeads: each head reads few chunks, as far apart as they were in training.

use std::iter::once;
use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array4, ArrayView4, Axis, Slice, arr0, s};

use crate::attention::Margins;
use crate::card::{Extras, carded, exhibit};
use crate::definition;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, Lengths, Qkv, Sequence, Site};
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
use crate::stages::attend::{Config, Options};
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::lay::Lay;
use crate::stages::listed::Order;
use crate::stages::means::Means;
use crate::stages::pass::{self, Out, Pass, Scratch};
use crate::stages::planned::check_count;
use crate::stages::scale;
use crate::stages::selecting::difference;
use crate::stages::states::{self, Into};
use crate::stages::turn::Turning;
use crate::stages::virtuals::Merging;

mod cached;
mod define;

pub use cached::LongCache;

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
mod tests;
