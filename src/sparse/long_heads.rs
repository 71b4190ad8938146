//! LongHeads: each head reads few chunks, as far apart as they were in training.

use std::iter::once;
use std::marker::PhantomData;

use ndarray::{Array4, ArrayView4, Axis, Slice};

use crate::attention::Margins;
use crate::card::{Extras, carded, exhibit};
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::views::views;
use crate::input::{Dims, Input, Lengths, Qkv, Sequence, Site};
use crate::keys::source::Slots;
use crate::keys::{Layout, Per, TokenLists};
use crate::mask::interval::Interval;
use crate::math::rope::{Rope, Turns};
use crate::score::Plain;
use crate::select::{self, Fold, Forced, Pick, Pools, Reduce, Rule, Scheme, Scored, Source, Summary};
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::attend::{Config, Options};
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::chunks::{Chunks, OnChunks};
use crate::stages::lay::Lay;
use crate::stages::listed::Order;
use crate::stages::means::Means;
use crate::stages::pass::{self, Out, Pass, Scratch};
use crate::stages::planned::check_count;
use crate::stages::selecting::{difference, sparse_options};
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
    builder: LongHeadsBuilder,
    lists: Chunks,
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

sparse_options!(LongHeadsBuilder, always causal);

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
        let lists = Chunks { len: self.chunk, most: self.chunks.max(self.begin.div_ceil(self.chunk)) };
        let Some(most) = lists.most.checked_mul(lists.len).filter(|&most| most <= 1 << 24) else {
            return Err(Error::value("chunks", "at most 2^24 keys of a query", self.chunks));
        };
        let turns = Turns::new(&self.rope, &(0..most as isize).collect::<Vec<_>>());
        Ok(LongHeads { config: self.options.clone().build()?, builder: self, lists, turns })
    }
}

impl LongHeads {
    /// `chunks` chunks a query.
    pub fn builder(rope: Rope, chunks: usize) -> LongHeadsBuilder {
        let options = Options { mask: Order { causal: true }, ..Options::default() };
        LongHeadsBuilder { options, rope, chunks, chunk: 256, begin: 4096, turned: false }
    }

    fn dims<T: Element>(&self, x: &LongInput<'_, T>) -> Result<Dims> {
        let dims = Input::dims(x)?;
        self.builder.rope.fits(dims.head_dim)?;
        match x.chunks.map(|chunks| chunks.dim().2) {
            Some(n) if n < dims.kv_len / self.lists.len => {
                let expected = format!("{} or more chunks", dims.kv_len / self.lists.len);
                Err(Error::value("chunks", expected, n))
            }
            _ => Ok(dims),
        }
    }

    /// What stands for the chunks that are whole, `[batch, q_heads, chunks, head_dim]`, of
    /// as many queries as keys.
    ///
    /// # Errors
    /// What the mechanism refuses.
    pub fn chunk_keys<T: Element>(&self, x: Qkv<'_, T>) -> Result<Array4<f32>> {
        self.dims(&x.reborrow().into())?;
        pass::once(|pass| {
            let (isa, (batch, heads, n, dim), l) = (self.config.isa(), x.q.dim(), self.lists.len);
            let whole = Slice::from(..n / l * l);
            let [q, k, v] = [x.q, x.k, x.v].map(|x| x.slice_axis_move(Axis(2), whole));
            let on = self.on_chunks(dim);
            let (q, k) = (on.placed(pass, q)?, on.keys(pass, k)?);
            let v = Lay::default().copy(pass, isa, v)?;
            let own = self.config.masked(Interval(|_: &Site, i: usize| i / l * l..i / l * l + l));
            let mut attended = pass.rows((batch, heads, n / l * l, dim))?;
            let [q, k, v] = [&q, &k, &v].map(Scratch::view);
            let of_chunks = Qkv { q, k, v, lengths: Lengths::Full, out: PhantomData::<f32> };
            own.attend(pass, of_chunks, attended.view_mut())?;
            let mean = Means { isa, width: l, stride: l }.of(pass, &attended)?;
            let merging = Merging::new(l, Some(self.config.scale_of(dim) as f32), isa)?;
            Ok(merging.run(pass, mean.view(), k, k)?.view().to_owned())
        })
    }

    fn scheme(&self) -> Scheme {
        let &LongHeadsBuilder { chunks, chunk: l, begin, .. } = &self.builder;
        let dense = begin.saturating_add(1);
        let pools = Pools { width: l, stride: l, fold: Fold::Max, coarse: None, dense };
        Scheme {
            unit: l,
            summary: Summary::Mean,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(chunks), forced: Forced { first: 1, last: 2, inside: true } },
            causal: true,
            scored: Scored::Pools(pools),
        }
    }

    /// Attention on lists of chunks, of keys of so many channels.
    fn on_chunks(&self, dim: usize) -> OnChunks<'_> {
        let turning = Turning { turns: &self.turns, start: self.builder.rope.start(dim) };
        OnChunks { config: &self.config, turning, chunks: self.lists, turned: self.builder.turned }
    }

    /// The chunks with the largest products.
    fn chosen(
        &self,
        (dims, layout): (&Dims, Layout),
        of: (AnyArray<'_>, ArrayView4<'_, f32>),
        places: (Lengths<'_>, Option<Slots<'_>>),
    ) -> Result<TokenLists> {
        let source = Source::each_head(self.config.isa(), dims, of, places);
        let lists = select::select(&source, &self.scheme(), &mut Workspace::new())?;
        lists.relaid(layout).tokens()
    }

    /// Checks an input and an index, and gives the sizes and sequences.
    fn fitting<T: Element>(&self, x: &LongInput<'_, T>, index: &TokenLists) -> Result<(Dims, Vec<Sequence>)> {
        let dims = self.dims(x)?;
        let sequences: Vec<_> = (0..dims.batch).map(|i| Lengths::Full.sequence(&dims, i)).collect();
        self.lists.check(index, Layout::new(Per::Head, 1, &dims), &sequences)?;
        Ok((dims, sequences))
    }
}

impl<T: Element> Choosing<LongInput<'_, T>> for LongHeads {
    type Index = TokenLists;

    fn choose(&self, x: LongInput<'_, T>, _: &mut Workspace) -> Result<TokenLists> {
        let dims = self.dims(&x)?;
        let made = if x.chunks.is_none() { Some(self.chunk_keys(x.qkv.reborrow())?) } else { None };
        let chunks = made.as_ref().map(|made| made.view()).or(x.chunks);
        let Some(chunks) = chunks else { return Err(Error::value("chunks", "them", "none")) };
        let (q, layout) = (T::any(Heads::new(x.qkv.q)), Layout::new(Per::Head, 1, &dims));
        self.chosen((&dims, layout), (q, chunks), (Lengths::Full, None))
    }

    fn define_choice(&self, x: LongInput<'_, T>) -> Result<(TokenLists, Margins)> {
        let dims = self.dims(&x)?;
        let n = x.chunks.map_or(dims.kv_len / self.lists.len, |chunks| chunks.dim().2);
        let of_chunks = Dims { q_len: n, value_dim: dims.head_dim, ..dims };
        let chunks = of_heads(&of_chunks, &x.qkv.lengths, |head| self.define_chunks(&x, head));
        let layout = Layout::new(Per::Head, 1, &dims);
        let places = (&x.qkv.lengths, layout);
        let (lists, mut margins) = self.define_chosen(&dims, places, &x.qkv.q, &chunks)?;
        // Of what overflows in `f32` the kernel knows less.
        let arrays = [&x.qkv.q, &x.qkv.k, &x.qkv.v];
        if arrays.iter().any(|x| x.iter().any(|x| (1e15..f64::INFINITY).contains(&x.to_f64().abs()))) {
            margins.doubtful.iter_mut().for_each(|list| *list = once(0..dims.kv_len).collect());
        }
        Ok((lists, margins))
    }

    fn choice_flops(&self, x: LongInput<'_, T>) -> Result<u64> {
        let Dims { batch, q_heads, q_len, kv_len, head_dim, .. } = self.dims(&x)?;
        let (l, rows) = (self.lists.len, (batch * q_heads * q_len) as u64);
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
        let (dims, of) = self.fitting(&x, index)?;
        let Qkv { q, k, v, .. } = x.qkv;
        self.on_chunks(dims.head_dim).attend(pass, (q, &of), [k, v], index, &dims, out)
    }

    fn define_on<R: Real>(&self, x: LongInput<'_, T>, index: &TokenLists) -> Result<Array4<R>> {
        let ((dims, _), qkv) = (self.fitting(&x, index)?, &x.qkv);
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
