//! LongHeads over caches.

use ndarray::{Array4, ArrayView4};

use super::LongHeads;
use crate::attention::{Dim4, Margins};
use crate::cache::{Cache, Cached};
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::tokens::{self, Tokens};
use crate::input::{Dims, Input, Sequence};
use crate::keys::{Layout, Per, TokenLists};
use crate::simd::mem::Heads;
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::pass::{Out, Pass};
use crate::stages::selecting::{Spans, difference};

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

impl LongHeads {
    /// The sizes of a call over a cache that fits.
    fn cached_dims<Q: Element, C: Cache + ?Sized, O: Element>(
        &self,
        x: &LongCache<'_, Q, C, O>,
    ) -> Result<Dims> {
        let (dims, slots) = (Input::dims(x)?, x.cached.slots());
        self.builder.rope.fits(dims.head_dim)?;
        let most = (0..dims.batch).map(|i| slots.len(i) / self.lists.len).max().unwrap_or(0);
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
        let want = Layout::of(Per::Head, 1, &dims, &Spans::new(&dims, &slots).lengths(&slots));
        self.lists.check(index, want, &sequences)?;
        run(&dims, &sequences)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Choosing<LongCache<'_, Q, C, O>> for LongHeads {
    type Index = TokenLists;

    fn choose(&self, x: LongCache<'_, Q, C, O>, _: &mut Workspace) -> Result<TokenLists> {
        let (dims, cached) = (self.cached_dims(&x)?, x.cached.reborrow());
        let slots = cached.slots();
        let spans = Spans::new(&dims, &slots);
        let (of, lengths) = ((Q::any(Heads::new(cached.q)), x.chunks), spans.lengths(&slots));
        let layout = Layout::of(Per::Head, 1, &dims, &lengths);
        self.chosen((&dims, layout), of, (lengths, Some(slots)))
    }

    fn define_choice(&self, x: LongCache<'_, Q, C, O>) -> Result<(TokenLists, Margins)> {
        let (dims, slots) = (self.cached_dims(&x)?, x.cached.slots());
        let spans = Spans::new(&dims, &slots);
        let chunks = x.chunks.mapv(f64::from);
        let lengths = spans.lengths(&slots);
        let places = (&lengths, Layout::of(Per::Head, 1, &dims, &lengths));
        self.define_chosen(&dims, places, &x.cached.q, &chunks)
    }

    fn choice_flops(&self, x: LongCache<'_, Q, C, O>) -> Result<u64> {
        let (dims, slots) = (self.cached_dims(&x)?, x.cached.slots());
        let pairs = |i: usize| slots.sequence(&dims, i).queries.len() * (slots.len(i) / self.lists.len);
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
            let (queries, source) = ((x.cached.q, sequences), x.cached.cache.source());
            self.on_chunks(dims.head_dim).attend_cached(pass, queries, source, index, dims, out)
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
