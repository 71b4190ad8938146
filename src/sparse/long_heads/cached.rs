//! LongHeads over caches.

use std::ops::Range;

use ndarray::{Array4, ArrayView4, s};

use super::{LongHeads, Near};
use crate::attention::{Dim4, Margins};
use crate::cache::{Cache, Cached};
use crate::definition;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::tokens::{self, Tokens};
use crate::input::{Dims, Input, Sequence};
use crate::keys::placed::Placed;
use crate::keys::source::{Kv, KvSource};
use crate::keys::{Keys, Layout, Per, TokenLists};
use crate::mask::Mask;
use crate::math::rope::Turns;
use crate::score::Plain;
use crate::select::{self, Selected, Source};
use crate::simd::any::IntoAny;
use crate::simd::mem::Heads;
use crate::stages::attend::Config;
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::pass::{Out, Pass, Scratch};
use crate::stages::scale;
use crate::stages::selecting::{Spans, difference};
use crate::stages::states;

/// Queries over a cache, before they are rotated, and what stands for its chunks. The
/// cache's keys are not rotated, or [turned](crate::sparse::LongHeadsBuilder::turned) to their places.
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

/// Keys and values of a cache, turned on the way with a table if they are not yet.
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
        let placed = Placed { source, sequence, kv_head, first: 0, turns, chunk, head_dim: dims.head_dim };
        let (_, q_heads, q_len, _) = q.dim();
        let kv_len = sequence.keys.len();
        let dims = Dims { batch: 1, q_heads, kv_heads: 1, q_len, kv_len, packed: false, ..dims };
        config.attend_source(pass, (q, &placed), dims, keys, states)
    }
}

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
