//! Landmark attention: a token after each block gates the block.

use std::ops::Range;

use ndarray::{Array4, ArrayView4, s};

use crate::attention::{Cost, Margins};
use crate::cache::{Cache, Cached};
use crate::card::{carded, exhibit};
use crate::definition::select::chosen;
use crate::definition::softmax::Reference;
use crate::element::Element;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::every::Every;
use crate::keys::source::{Kv, KvSource, Slots};
use crate::keys::{ATOM, Keys, Layout, Per, Run, TokenLists};
use crate::score::Plain;
use crate::select::{self, Forced, Pick, Reduce, Rule, Scheme, Source, Summary};
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::Heads;
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::nested::{self, Groups, Logits, Nested};
use crate::stages::selecting::{Selecting, Spans, dot, price_cached, selecting};

/// Landmark attention: a token after each block gates the block.
///
/// ```text
/// a = softmax over the tokens of the query's own block up to it, and the landmarks before
/// w_j = a_j                                              for a token of the own block
/// w_j = a_b exp(s_j) / sum_{l in block b} exp(s_l)       for a token of an earlier block b
/// ```
///
/// A landmark's score decides what its block as a whole gets, and the tokens of
/// the block share that; its own value counts for nothing. Every `block` tokens
/// are followed by a landmark. In inference only the blocks are read whose
/// landmarks score highest ([`k`](LandmarkBuilder::k)). From "Landmark
/// Attention: Random-Access Infinite Context Length for Transformers" (arXiv
/// 2305.16300). Positions are the caller's: the released inference numbers
/// retrieved blocks anew.
///
/// Runs over arrays and, in prefill and in decoding, over caches, each of whose
/// sequences has its landmarks from its start on: append a landmark as any other token.
/// A block may be longer than a sequence, which then has no landmark yet.
///
/// Cost: `2 head_dim` flops a visible pair twice and `2 value_dim` once; 8 bytes
/// are held for each block that a query sees.
///
/// ```
/// use attention_kernels::{Attention, Qkv, Selects, sparse::Landmark};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 510, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let train = Landmark::builder(50).build()?.forward(x)?;
/// // The 3 blocks of 50 tokens that score highest, and the query's own.
/// let index = Landmark::builder(50).k(3).build()?.select(x)?;
/// assert_eq!(index.keys(0, 0, 500), 3 * 50 + 42);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Landmark {
    config: Config<Order, Plain>,
    block: usize,
    k: Option<usize>,
}

/// Builds a [`Landmark`].
#[derive(Clone, Debug)]
pub struct LandmarkBuilder {
    block: usize,
    k: Option<usize>,
    scale: Option<f32>,
    isa: Option<Isa>,
}

impl Landmark {
    /// A landmark after every `block` tokens.
    pub fn builder(block: usize) -> LandmarkBuilder {
        LandmarkBuilder { block, k: None, scale: None, isa: None }
    }

    /// Tokens of a block and its landmark.
    fn unit(&self) -> usize {
        self.block + 1
    }

    fn groups(&self) -> Groups {
        Groups { unit: self.unit(), own: true }
    }

    fn dims<Q: Element, K: Element, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<Dims> {
        let dims = x.dims()?;
        if x.lengths != Lengths::Full {
            let reason = "landmarks are counted from the start of the arrays";
            return Err(Error::Conflict { option: "sequences of other lengths", with: "landmarks", reason });
        }
        Ok(dims)
    }

    /// The landmarks.
    fn landmarks<'a, K>(&self, k: &'a ArrayView4<'_, K>) -> ArrayView4<'a, K> {
        let first = self.block.min(k.dim().2);
        k.slice(s![.., .., first..; self.unit(), ..])
    }

    /// The keys from the first landmark on without the last key: of that many
    /// tokens fewer, a query sees the landmarks before its own block.
    fn ahead<'a, K>(&self, k: &'a ArrayView4<'_, K>) -> ArrayView4<'a, K> {
        let len = k.dim().2;
        k.slice(s![.., .., if len < self.unit() { len..len } else { self.block..len - 1 }, ..])
    }

    fn scheme(&self, count: usize) -> Scheme {
        Scheme {
            unit: self.unit(),
            summary: Summary::First,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(count), forced: Forced::default() },
            causal: true,
            scored: crate::select::Scored::Begun,
        }
    }

    /// The position of a query of a sequence of so many queries and keys.
    fn position([queries, keys]: [usize; 2], query: usize) -> Option<usize> {
        (query + keys).checked_sub(queries)
    }

    /// Calls `run` with what the landmarks of a cache are chosen from: of keys that are
    /// one for each token from the first landmark on but the last, as
    /// [`ahead`](Self::ahead) has them, the landmarks alone are ever read.
    fn with_marks<Q: Element, C: Cache + ?Sized, O: Element, R>(
        &self,
        x: Cached<'_, Q, C, O>,
        run: impl FnOnce(&Source<'_>) -> Result<R>,
    ) -> Result<R> {
        let (dims, slots) = (x.dims()?, x.slots());
        x.check_alike()?;
        let shorter: Vec<usize> = slots.lengths.iter().map(|n| n.saturating_sub(self.unit())).collect();
        let slots = Slots { lengths: &shorter, ..slots };
        let spans = Spans::new(&dims, &slots);
        let marks = self.marks(x.cache.source(), &dims);
        let q = Q::any(Heads::new(x.q.reborrow()));
        let of = (q, Kv::CacheKeys(&marks));
        let source = Source::any(self.config.isa(), dims, of, (spans.lengths(&slots), Some(slots)));
        run(&source.given(Kv::CacheKeys(&marks)))
    }

    /// The landmarks of a cache.
    fn marks<'a>(&self, source: &'a dyn KvSource, dims: &Dims) -> Every<'a> {
        Every { source, first: self.block, step: self.unit(), head_dim: dims.head_dim }
    }

    /// The blocks that each query chooses by definition, and what is in doubt.
    fn define_blocks(
        &self,
        (dims, lengths): (&Dims, &Lengths<'_>),
        (q, k): (&Array4<f64>, &Array4<f64>),
        count: usize,
    ) -> Result<(TokenLists, Margins)> {
        let layout = Layout::of(Per::Head, 1, dims, lengths);
        let (mut ends, mut blocks, mut margins) = (vec![0], Vec::<u32>::new(), Margins::default());
        layout.lists()?;
        let pick = Pick { rule: Rule::TopK(count), forced: Forced::default() };
        for of in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
            for (h, i) in (0..dims.q_heads).flat_map(|h| (0..layout.queries).map(move |i| (h, i))) {
                let own = (i < of.queries.len())
                    .then(|| Self::position([of.queries.len(), of.keys.len()], i))
                    .flatten()
                    .map_or(0, |t| t / self.unit());
                let score = |block: usize| {
                    let mark = of.keys.start + block * self.unit() + self.block;
                    let key = k.slice(s![of.batch, h / (dims.q_heads / dims.kv_heads), mark..mark + 1, ..]);
                    dot(q.slice(s![of.batch, h, of.queries.start + i, ..]), &key)
                };
                let (ids, doubtful) = chosen(&pick, &(0..own).map(score).collect::<Vec<f64>>());
                blocks.extend(ids.into_iter().map(|block| block as u32));
                ends.push(blocks.len());
                let tokens = |block: usize| block * self.unit()..block * self.unit() + self.block;
                margins.doubtful.push(doubtful.into_iter().map(tokens).collect());
            }
        }
        Ok((self.lists(dims, lengths, Some((&ends, &blocks)))?, margins))
    }

    /// Without a choice, no list is in doubt.
    fn define_all(&self, dims: &Dims, lengths: &Lengths<'_>) -> Result<(TokenLists, Margins)> {
        let lists = self.lists(dims, lengths, None)?;
        let margins = Margins { doubtful: vec![Vec::new(); lists.layout().lists()?] };
        Ok((lists, margins))
    }

    /// What it costs to choose.
    fn price_blocks(&self, dims: &Dims, lengths: &Lengths<'_>) -> Cost {
        let sequences = (0..dims.batch).map(|i| lengths.sequence(dims, i));
        let pairs = |[queries, keys]: [usize; 2]| {
            let seen = |i: usize| Self::position([queries, keys], i).map_or(0, |t| t / self.unit());
            (0..queries).map(seen).sum::<usize>()
        };
        let pairs: usize = sequences.map(|of| pairs([of.queries.len(), of.keys.len()])).sum();
        let flops = if self.k.is_some() { 2 * pairs * dims.q_heads * dims.head_dim } else { 0 };
        Cost { flops: flops as u64, bytes: 0 }
    }

    fn nested<'a>(
        &self,
        (dims, lengths, slots): (Dims, Lengths<'a>, Option<Slots<'a>>),
        (q, k, landmarks): (AnyArray<'a>, Kv<'a>, Kv<'a>),
        index: &'a TokenLists,
    ) -> Nested<'a> {
        let scale = self.config.scale(&dims) as f32;
        let logits = Logits { q, k: landmarks, heads: dims.kv_heads, scale };
        Nested {
            isa: self.config.isa(),
            dims,
            lengths,
            slots,
            q,
            k,
            scale,
            groups: self.groups(),
            logits,
            index,
        }
    }

    /// Runs of the tokens of some blocks and of those of the one of a position.
    fn runs(
        &self,
        blocks: impl Iterator<Item = usize>,
        position: Option<usize>,
    ) -> impl Iterator<Item = Run> {
        let (unit, block) = (self.unit(), self.block);
        let run = |start: usize, len: usize| Run { start: start as u32, len: len as u32 };
        let own = position.map(|t| run(t / unit * unit, (t % unit + 1).min(block)));
        blocks.map(move |b| run(b * unit, block)).chain(own)
    }

    /// The lists of all queries: of the blocks that they have chosen, or of all
    /// blocks.
    fn lists(
        &self,
        dims: &Dims,
        lengths: &Lengths<'_>,
        chosen: Option<(&[usize], &[u32])>,
    ) -> Result<TokenLists> {
        let layout = match chosen {
            Some(_) => Layout::of(Per::Head, 1, dims, lengths),
            None => Layout::of(Per::Sequence, ATOM, dims, lengths),
        };
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        let lists = layout.heads() * layout.blocks();
        for list in 0..layout.lists()? {
            let of = lengths.sequence(dims, list / lists);
            let (block, sizes) = (list % layout.blocks(), [of.queries.len(), of.keys.len()]);
            let last = ((block + 1) * layout.q_block).min(sizes[0]);
            // Of a sequence with fewer queries than others.
            let rows: Range<usize> = block * layout.q_block..last;
            let position = if rows.is_empty() { None } else { Self::position(sizes, last - 1) };
            match chosen {
                Some((ends, blocks)) => {
                    let blocks = &blocks[ends[list]..ends[list + 1]];
                    runs.extend(self.runs(blocks.iter().map(|&b| b as usize), position));
                }
                None => runs.extend(self.runs(0..position.unwrap_or(0) / self.unit(), position)),
            }
            offsets.push(runs.len());
        }
        TokenLists::new(layout, offsets, runs)
    }
}

impl LandmarkBuilder {
    /// Each head of each query reads so many of the earlier blocks, those whose
    /// landmarks score highest. Default: all.
    pub fn k(self, k: usize) -> Self {
        Self { k: Some(k), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a block of 0 tokens, `k` of 0 or a scale that is not
    /// finite, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Landmark> {
        let Self { block, k, scale, isa } = self;
        if block == 0 || u32::try_from(block).is_err() {
            return Err(Error::value("block", "from 1 to 2^32 - 1 tokens", block));
        }
        if k == Some(0) {
            return Err(Error::value("k", "at least 1 block", 0));
        }
        let options = Options { mask: Order { causal: true }, score: Plain, scale, isa };
        Ok(Landmark { config: options.build()?, block, k })
    }
}

impl<Q: Element, K: Element, O: Element> Selecting<Qkv<'_, Q, K, O>> for Landmark {
    type Index = TokenLists;

    fn select_bytes(&self, x: Qkv<'_, Q, K, O>) -> Result<usize> {
        self.dims(&x)?;
        let Some(count) = self.k else { return Ok(0) };
        let k = self.ahead(&x.k);
        let source = Source::new(self.config.isa(), Qkv::<Q, K>::new(x.q.reborrow(), k, k), None)?;
        select::workspace_bytes(&source, &self.scheme(count))
    }

    fn select_in(&self, x: Qkv<'_, Q, K, O>, workspace: &mut Workspace) -> Result<TokenLists> {
        let dims = self.dims(&x)?;
        let Some(count) = self.k else { return self.lists(&dims, &x.lengths, None) };
        let k = self.ahead(&x.k);
        let source = Source::new(self.config.isa(), Qkv::<Q, K>::new(x.q.reborrow(), k, k), None)?;
        let selected = select::select(&source, &self.scheme(count), workspace)?;
        self.lists(&dims, &x.lengths, Some((&selected.offsets, &selected.candidates)))
    }

    fn define_select(&self, x: Qkv<'_, Q, K, O>) -> Result<(TokenLists, Margins)> {
        let dims = self.dims(&x)?;
        let Some(count) = self.k else { return self.define_all(&dims, &x.lengths) };
        let (q, k) = (x.q.mapv(Element::to_f64), x.k.mapv(Element::to_f64));
        self.define_blocks((&dims, &x.lengths), (&q, &k), count)
    }

    fn price_select(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        Ok(self.price_blocks(&self.dims(&x)?, &x.lengths))
    }

    fn with_call<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let dims = self.dims(&x)?;
        Keys::Tokens(index).check(&dims, &x.lengths)?;
        let (q, k) = (Q::any(Heads::new(x.q.reborrow())), K::any(Heads::new(x.k.reborrow())));
        let landmarks = K::any(Heads::new(self.landmarks(&x.k)));
        let [k, landmarks] = [k, landmarks].map(|k| Kv::Arrays { k, v: k });
        let nested = self.nested((dims, x.lengths, None), (q, k, landmarks), index);
        nested::with_call(&self.config, x.reborrow(), &nested, run)
    }

    fn define(&self, x: Qkv<'_, Q, K, O>, index: &TokenLists) -> Result<Reference> {
        let logits = (&x.q.reborrow(), &self.landmarks(&x.k), self.config.scale(&self.dims(&x)?));
        nested::define_on(&self.config, x.reborrow(), index, &self.groups(), logits)
    }

    fn price(&self, x: Qkv<'_, Q, K, O>, index: &TokenLists) -> Result<Cost> {
        Keys::Tokens(index).check(&self.dims(&x)?, &x.lengths)?;
        self.config.listed(Keys::Tokens(index)).cost(&x)
    }
}
selecting!(Landmark, TokenLists, [Q, K, O] Qkv);

impl<Q: Element, C: Cache + ?Sized, O: Element> Selecting<Cached<'_, Q, C, O>> for Landmark {
    type Index = TokenLists;

    fn select_bytes(&self, x: Cached<'_, Q, C, O>) -> Result<usize> {
        match self.k {
            Some(count) => self.with_marks(x, |source| select::workspace_bytes(source, &self.scheme(count))),
            None => x.check_alike().and_then(|()| x.dims()).map(|_| 0),
        }
    }

    fn select_in(&self, x: Cached<'_, Q, C, O>, workspace: &mut Workspace) -> Result<TokenLists> {
        let (dims, slots) = (x.dims()?, x.slots());
        x.check_alike()?;
        let spans = Spans::new(&dims, &slots);
        let lengths = spans.lengths(&slots);
        let Some(count) = self.k else { return self.lists(&dims, &lengths, None) };
        let found = self.with_marks(x, |source| select::select(source, &self.scheme(count), workspace))?;
        self.lists(&dims, &lengths, Some((&found.offsets, &found.candidates)))
    }

    fn define_select(&self, x: Cached<'_, Q, C, O>) -> Result<(TokenLists, Margins)> {
        let dims = x.dims()?;
        x.check_alike()?;
        let held = x.held(&dims);
        let lengths = held.lengths(&x);
        let Some(count) = self.k else { return self.define_all(&dims, &lengths) };
        let (q, k) = (x.q.mapv(Element::to_f64), held.k.mapv(f64::from));
        self.define_blocks((&dims, &lengths), (&q, &k), count)
    }

    fn price_select(&self, x: Cached<'_, Q, C, O>) -> Result<Cost> {
        let (dims, slots) = (x.dims()?, x.slots());
        Ok(self.price_blocks(&dims, &Spans::new(&dims, &slots).lengths(&slots)))
    }

    fn with_call<R>(
        &self,
        x: Cached<'_, Q, C, O>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let (dims, slots) = (x.dims()?, x.slots());
        x.check_alike()?;
        let (spans, marks) = (Spans::new(&dims, &slots), self.marks(x.cache.source(), &dims));
        let of = (Q::any(Heads::new(x.q.reborrow())), Kv::Cache(x.cache.source()), Kv::CacheKeys(&marks));
        let nested = self.nested((dims, spans.lengths(&slots), Some(slots)), of, index);
        nested::with_call_cached(&self.config, x.reborrow(), &nested, run)
    }

    fn define(&self, x: Cached<'_, Q, C, O>, index: &TokenLists) -> Result<Reference> {
        let dims = x.dims()?;
        x.check_alike()?;
        let held = x.held(&dims);
        let lengths = held.lengths(&x);
        // Landmarks by sequence.
        let sequences: Vec<_> = (0..dims.batch).map(|i| lengths.sequence(&dims, i)).collect();
        let most = sequences.iter().map(|of| of.keys.len() / self.unit()).max().unwrap_or(0);
        let mut landmarks = Array4::<f32>::zeros((dims.batch, dims.kv_heads, most, dims.head_dim));
        for of in &sequences {
            for mark in 0..of.keys.len() / self.unit() {
                let key = held.k.slice(s![of.batch, .., of.keys.start + mark * self.unit() + self.block, ..]);
                landmarks.slice_mut(s![of.index, .., mark, ..]).assign(&key);
            }
        }
        let q = x.q.mapv(Element::to_f32);
        let x = Qkv { q: q.view(), k: held.k.view(), v: held.v.view(), lengths, out: x.out };
        let logits = (&x.q.reborrow(), &landmarks.view(), self.config.scale(&dims));
        nested::define_on(&self.config, x.reborrow(), index, &self.groups(), logits)
    }

    fn price(&self, x: Cached<'_, Q, C, O>, index: &TokenLists) -> Result<Cost> {
        price_cached(&self.config, x, Keys::Tokens(index))
    }
}
selecting!(Landmark, TokenLists, caches);

exhibit! {
    LandmarkExhibit of Landmark, "sparse", "Landmark", "arXiv 2305.16300";
    "the query's own block of 8 tokens, and the 4 earlier ones whose landmarks it scores highest, gated by these";
    not "where the model was not trained with landmarks";
    tokens false;
    build(_, _) { Landmark::builder(8).k(4) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Landmark, LandmarkExhibit);

#[cfg(test)]
mod tests;
