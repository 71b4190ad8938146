//! Attention on pools of tokens and a window of the last ones, in one softmax
//! with a sink, whose keys are their values.
//!
//! Rows of pools and tokens are the keys of one head, the pools first; a plan
//! names those that a query sees. Values are rotated keys, so each output is
//! rotated back by its query's position.

use std::ops::Range;

use ndarray::{Array1, Array2, Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut4, Axis, s};

use crate::attention::{Cost, Dim4, ERROR_CONSTANT, Input};
use crate::cache::{Cache, Cached};
use crate::card::Extras;
use crate::element::Element;
use crate::engine::call::{Arrays, Call, Norm};
use crate::engine::workspace::{Workspace, take_array};
use crate::engine::{self, parallel};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Sequence, Site};
use crate::keys::arrays::Laid;
use crate::keys::joined::{Joined, Shared};
use crate::keys::source::{At, Kv, KvSource, Slots};
use crate::keys::{Keys, Layout, Per, Run, TokenLists};
use crate::math::rope::Rope;
use crate::score::Plain;
use crate::simd::any::{AnyArray, AnyOut, IntoAny};
use crate::simd::mem::{Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::selecting::Spans;

/// Queries of many heads, and rows of one head that are keys and values: the
/// last tokens, and pools of all of them.
#[derive(Clone, Copy, Debug)]
pub struct Compressed<'a, T> {
    /// `[batch, heads, q_len, dim]`
    pub q: ArrayView4<'a, T>,
    /// The last tokens, `[batch, held, dim]`.
    pub kv: ArrayView3<'a, T>,
    /// Pools from the first token on, `[batch, 1, pools, dim]`.
    pub pools: ArrayView4<'a, f32>,
    /// Tokens of each sequence; the last query sits at the last one.
    pub tokens: usize,
}

impl<'a, T> Compressed<'a, T> {
    /// Of sequences all of whose tokens are held.
    pub fn new(q: ArrayView4<'a, T>, kv: ArrayView3<'a, T>, pools: ArrayView4<'a, f32>) -> Self {
        Self { tokens: kv.dim().1, q, kv, pools }
    }

    /// Of sequences of so many tokens, of which the last are held.
    pub fn tokens(self, tokens: usize) -> Self {
        Self { tokens, ..self }
    }
}

impl<T: Element> Input for Compressed<'_, T> {
    type Out = T;

    /// Keys are tokens.
    fn dims(&self) -> Result<Dims> {
        let (batch, q_heads, q_len, dim) = self.q.dim();
        if (self.kv.dim().0, self.kv.dim().2) != (batch, dim) {
            let expected = format!("[batch, held, dim] = [{batch}, _, {dim}] as q has it");
            return Err(Error::shape("kv", expected, self.kv.shape()));
        }
        if (self.pools.dim().0, self.pools.dim().1, self.pools.dim().3) != (batch, 1, dim) {
            let expected = format!("[batch, 1, pools, dim] = [{batch}, 1, _, {dim}] as q has it");
            return Err(Error::shape("pools", expected, self.pools.shape()));
        }
        if self.kv.dim().1 > self.tokens {
            return Err(Error::value(
                "tokens",
                format!("{} or more, as kv holds", self.kv.dim().1),
                self.tokens,
            ));
        }
        let (kv_heads, kv_len) = (q_heads.min(1), self.tokens);
        let dims =
            Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim: dim, value_dim: dim, packed: false };
        dims.checked()
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Ok(self.q.dim())
    }
}

/// Queries of many heads over a cache of one head, whose keys are their values, and pools of
/// all tokens: [`Compressed`] whose tokens lie in a cache.
///
/// A [`Latent`](crate::cache::Latent) cache without a rotary part holds each row once; of
/// another one the keys are read.
#[derive(Debug)]
pub struct CompressedCache<'a, Q, C: ?Sized, O = Q> {
    /// Queries, and the last tokens of each sequence.
    pub cached: Cached<'a, Q, C, O>,
    /// Pools from the first token on, `[sequences, 1, pools, dim]`: entry `b` is of sequence
    /// `b` of the call. A shorter sequence reads its first ones.
    pub pools: ArrayView4<'a, f32>,
    /// Tokens of each sequence of the cache, where it holds but the last ones.
    pub tokens: Option<&'a [usize]>,
}

impl<Q, C: ?Sized, O> Clone for CompressedCache<'_, Q, C, O> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<Q, C: ?Sized, O> Copy for CompressedCache<'_, Q, C, O> {}

impl<'a, Q, C: Cache + ?Sized, O> CompressedCache<'a, Q, C, O> {
    /// Of sequences all of whose tokens the cache holds.
    pub fn new(cached: Cached<'a, Q, C, O>, pools: ArrayView4<'a, f32>) -> Self {
        Self { cached, pools, tokens: None }
    }

    /// Of sequences of the cache that have so many tokens, of which it holds the last, as a
    /// [`Ring`](crate::cache::Ring) without sinks does.
    pub fn tokens(self, tokens: &'a [usize]) -> Self {
        Self { tokens: Some(tokens), ..self }
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Input for CompressedCache<'_, Q, C, O> {
    type Out = O;

    /// Keys are tokens.
    fn dims(&self) -> Result<Dims> {
        let dims = self.cached.dims()?;
        self.cached.check_alike()?;
        let (shape, slots) = (self.cached.cache.shape(), self.cached.slots());
        if shape.kv_heads != 1 {
            return Err(Error::value("kv", "a cache of one head", shape.kv_heads));
        }
        let dim = dims.head_dim;
        if (self.pools.dim().0, self.pools.dim().1, self.pools.dim().3) != (dims.batch, 1, dim) {
            let expected = format!("[sequences, 1, pools, dim] = [{}, 1, _, {dim}]", dims.batch);
            return Err(Error::shape("pools", expected, self.pools.shape()));
        }
        let tokens = self.tokens.unwrap_or(slots.lengths);
        if tokens.len() != slots.lengths.len() {
            let expected =
                format!("one number for each of the {} sequences of the cache", slots.lengths.len());
            return Err(Error::value("tokens", expected, format_args!("{} numbers", tokens.len())));
        }
        if let Some((n, held)) = tokens.iter().zip(slots.lengths).find(|(n, held)| n < held) {
            return Err(Error::value("tokens", format!("{held} or more, as the cache holds"), n));
        }
        let all = (0..dims.batch).map(|i| tokens[slots.slot(i)]);
        let kv_len = if dims.packed { all.fold(0, usize::saturating_add) } else { all.max().unwrap_or(0) };
        Dims { kv_heads: dims.q_heads.min(1), kv_len, value_dim: dim, ..dims }.checked()
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Ok(self.cached.q.dim())
    }
}

/// A call of any element type, whose tokens lie in an array or a cache.
pub(crate) struct Pooling<'a> {
    pub(crate) dims: Dims,
    /// Size of the batch axis.
    entries: usize,
    q: AnyArray<'a>,
    pools: ArrayView4<'a, f32>,
    kv: &'a dyn KvSource,
    /// The sequences, with the tokens that each has.
    pub(crate) tokens: Slots<'a>,
    /// Tokens of each that are held.
    held: &'a [usize],
    /// Bytes of queries, outputs and the tokens that are held.
    bytes: usize,
}

impl Pooling<'_> {
    /// Sequence `index` of the call: where its queries are, and its tokens.
    pub(crate) fn sequence(&self, index: usize) -> Sequence {
        self.tokens.sequence(&self.dims, index)
    }

    /// Tokens that a query of a sequence sees.
    pub(crate) fn seen(&self, sequence: usize, query: usize) -> usize {
        let of = self.sequence(sequence);
        (query + of.keys.len() + 1).saturating_sub(of.queries.len()).min(of.keys.len())
    }

    /// The queries, and the tokens that are held.
    pub(crate) fn rows_of_tokens(&self) -> (AnyArray<'_>, Kv<'_>) {
        (self.q, Kv::CacheKeys(self.kv))
    }

    /// Queries of the longest sequence.
    pub(crate) fn longest(&self) -> usize {
        (0..self.dims.batch).map(|i| self.sequence(i).queries.len()).max().unwrap_or(0)
    }

    /// Of each sequence of the cache pools and tokens that are held.
    fn rows(&self) -> Vec<usize> {
        self.held.iter().map(|held| self.pools.dim().2.saturating_add(*held)).collect()
    }
}

/// What pools and tokens are of.
pub(crate) trait Compressing: Input {
    /// Calls `run` with it.
    fn with<R>(&self, run: impl FnOnce(&Pooling<'_>) -> Result<R>) -> Result<R>;
}

impl<T: Element> Compressing for Compressed<'_, T> {
    fn with<R>(&self, run: impl FnOnce(&Pooling<'_>) -> Result<R>) -> Result<R> {
        let dims = self.dims()?;
        let rows = T::any(Heads::new(self.kv.insert_axis(Axis(1))));
        let (tokens, held) = (vec![self.tokens; dims.batch], vec![self.kv.dim().1; dims.batch]);
        run(&Pooling {
            dims,
            entries: dims.batch,
            q: T::any(Heads::new(self.q)),
            pools: self.pools,
            kv: &Laid { k: rows, v: rows },
            tokens: Slots { slots: None, offsets: None, lengths: &tokens },
            held: &held,
            bytes: (2 * self.q.len() + self.kv.len()) * size_of::<T>(),
        })
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Compressing for CompressedCache<'_, Q, C, O> {
    fn with<R>(&self, run: impl FnOnce(&Pooling<'_>) -> Result<R>) -> Result<R> {
        let (dims, x) = (self.dims()?, self.cached.reborrow());
        let slots = x.slots();
        let held: usize = (0..dims.batch).map(|i| slots.len(i)).sum();
        run(&Pooling {
            dims,
            entries: x.q.dim().0,
            q: Q::any(Heads::new(x.q)),
            pools: self.pools,
            kv: &Shared(x.cache.source()),
            tokens: Slots { lengths: self.tokens.unwrap_or(slots.lengths), ..slots },
            held: slots.lengths,
            bytes: x.q.len() * (size_of::<Q>() + size_of::<O>()) + held * x.cache.token_bytes(),
        })
    }
}

/// Arrays for a catalogue entry: values of the first head as rows, queries cut
/// or lengthened to their size, and means of `stride` rows and of keys.
pub(crate) fn exhibited<T: Element>(x: &Qkv<'_, T>, stride: usize) -> Extras<T> {
    let ((batch, heads, q_len, head_dim), (_, kv_heads, len, dim)) = (x.q.dim(), x.v.dim());
    let query = |(b, h, i, c)| if c < head_dim { x.q[[b, h, i, c]] } else { T::default() };
    let of = |x: &ArrayView4<'_, T>, b, j, c| if kv_heads > 0 { x[[b, 0, j, c]] } else { T::default() };
    let mean = |x: &ArrayView4<'_, T>, b, w: usize, c| {
        (w * stride..(w + 1) * stride).map(|j| of(x, b, j, c).to_f32()).sum::<f32>() / stride as f32
    };
    let pools = len / stride;
    let index = Array3::from_shape_fn((batch, pools, head_dim), |(b, w, c)| T::from_f32(mean(&x.k, b, w, c)));
    Extras {
        keys: Array4::from_shape_fn((batch, heads, q_len, dim), query),
        latents: Array3::from_shape_fn((batch, len, dim), |(b, j, c)| of(&x.v, b, j, c)),
        rates: Array4::from_shape_fn((batch, 1, pools, dim), |(b, _, w, c)| mean(&x.v, b, w, c)),
        matrices: [index, Array3::from_elem((0, 0, 0), T::default())],
        ..Extras::default()
    }
}

/// The builder methods of such mechanisms, and what they are made of.
macro_rules! compression_options {
    ($builder:ident) => {
        impl $builder {
            /// Tokens of a pool, and from one to the next.
            pub fn stride(mut self, stride: usize) -> Self {
                self.stride = stride;
                self
            }

            /// Tokens that are read as they are, the query's own among them.
            /// Default: 128.
            pub fn window(mut self, window: usize) -> Self {
                self.window = window;
                self
            }

            /// A logit without a value for each query head, which is not scaled.
            /// Default: none.
            pub fn sinks(mut self, sinks: Vec<f32>) -> Self {
                self.sinks = Some(sinks);
                self
            }

            /// Rotates outputs back by the positions of their queries, as the
            /// keys were rotated. Default: does not.
            pub fn rope(mut self, rope: crate::math::rope::Rope) -> Self {
                self.rope = Some(rope);
                self
            }

            /// The factor of the dot product. Default: `1 / sqrt(dim)`.
            pub fn scale(mut self, scale: f32) -> Self {
                self.options.scale = Some(scale);
                self
            }

            /// Forces an instruction set. Default: the best one of the CPU,
            /// or what [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
            pub fn isa(mut self, isa: crate::simd::Isa) -> Self {
                self.options.isa = Some(isa);
                self
            }

            fn compression(self) -> crate::error::Result<crate::stages::compressed::Compression> {
                for (name, n) in [("stride", self.stride), ("window", self.window)] {
                    if n == 0 {
                        return Err(crate::error::Error::value(name, "at least 1 token", 0));
                    }
                }
                if let Some(x) = self.sinks.iter().flatten().find(|x| x.is_nan()) {
                    return Err(crate::error::Error::value("sinks", "numbers", x));
                }
                let (stride, window) = (self.stride, self.window);
                let (config, sinks, rope) = (self.options.build()?, self.sinks, self.rope);
                Ok(crate::stages::compressed::Compression { config, stride, window, sinks, rope })
            }
        }
    };
}
pub(crate) use compression_options;

/// What such mechanisms have in common.
#[derive(Clone, Debug)]
pub(crate) struct Compression {
    pub(crate) config: Config<Order, Plain>,
    /// Tokens of a pool and from one to the next.
    pub(crate) stride: usize,
    /// Tokens that are read as they are, the query's own among them.
    pub(crate) window: usize,
    /// A logit for each head, if there are any.
    pub(crate) sinks: Option<Vec<f32>>,
    pub(crate) rope: Option<Rope>,
}

impl Compression {
    /// Refuses a call that does not fit.
    pub(crate) fn check(&self, x: &Pooling<'_>) -> Result<()> {
        let dims = &x.dims;
        if let Some(sinks) = self.sinks.as_ref().filter(|sinks| sinks.len() != dims.q_heads) {
            let expected = format!("one for each of the {} query heads", dims.q_heads);
            return Err(Error::value("sinks", expected, sinks.len()));
        }
        self.rope.as_ref().map_or(Ok(()), |rope| rope.fits(dims.head_dim))?;
        for of in (0..dims.batch).map(|i| x.sequence(i)) {
            let (tokens, held) = (of.keys.len(), x.held[of.slot]);
            let want = tokens.min((self.window - 1).saturating_add(of.queries.len()));
            if held < want {
                let expected = format!("the last {want} tokens, which are in the windows of the queries");
                return Err(Error::value("kv", expected, held));
            }
            if x.pools.dim().2 < tokens / self.stride {
                let expected =
                    format!("{} or more, one for each {} tokens", tokens / self.stride, self.stride);
                return Err(Error::value("pools", expected, x.pools.dim().2));
            }
        }
        Ok(())
    }

    /// The rows that each query sees, of pools and tokens together: of the pools
    /// those that `picked` gives, ascending runs.
    pub(crate) fn plan(
        &self,
        x: &Pooling<'_>,
        mut picked: impl FnMut(usize, usize, &mut Vec<Run>),
    ) -> Result<TokenLists> {
        self.check(x)?;
        let layout = self.layout(x);
        layout.lists()?;
        let (mut offsets, mut runs) = (vec![0], Vec::new());
        let batch = if x.dims.q_heads > 0 { x.dims.batch } else { 0 };
        for (b, i) in (0..batch).flat_map(|b| (0..layout.queries).map(move |i| (b, i))) {
            let of = x.sequence(b);
            if i < of.queries.len() {
                picked(b, i, &mut runs);
                let (seen, before) = (x.seen(b, i), of.keys.len() - x.held[of.slot]);
                let first = seen.saturating_sub(self.window);
                if first < seen {
                    let start = (x.pools.dim().2 + first - before) as u32;
                    runs.push(Run { start, len: (seen - first) as u32 });
                }
            }
            offsets.push(runs.len());
        }
        TokenLists::new(layout, offsets, runs)
    }

    fn layout(&self, x: &Pooling<'_>) -> Layout {
        let held = (0..x.dims.batch).map(|i| x.held[x.tokens.slot(i)]).max().unwrap_or(0);
        let keys = x.pools.dim().2.saturating_add(held);
        Layout { keys, queries: x.longest(), ..Layout::new(Per::Sequence, 1, &x.dims) }
    }

    /// Refuses an index that is not of these rows, or that looks ahead.
    fn check_index(&self, x: &Pooling<'_>, plan: &TokenLists) -> Result<()> {
        let (of, want, pools) = (plan.layout(), self.layout(x), x.pools.dim().2);
        if *of != want {
            return Err(Error::value("index", format!("lists for {want:?}"), format_args!("{of:?}")));
        }
        let batch = if x.dims.q_heads > 0 { x.dims.batch } else { 0 };
        for (b, i) in (0..batch).flat_map(|b| (0..x.sequence(b).queries.len()).map(move |i| (b, i))) {
            let of = x.sequence(b);
            let (seen, before) = (x.seen(b, i), of.keys.len() - x.held[of.slot]);
            for run in plan.runs(b, 0, i) {
                let run = run.range();
                let ahead = run.start < pools && run.end.min(pools) > seen / self.stride;
                if ahead || run.end > pools && run.end - pools + before > seen {
                    let expected = format!("rows of the {seen} tokens up to query {i} of sequence {b}");
                    return Err(Error::value(
                        "index",
                        expected,
                        format_args!("{run:?} of {pools} pools and tokens"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Calls `run` with the call of the engine on a plan.
    fn with_call<R>(
        &self,
        x: &Pooling<'_>,
        plan: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        self.check(x)?;
        self.check_index(x, plan)?;
        let pools = f32::any(Heads::new(x.pools));
        let pools = Laid { k: pools, v: pools };
        let dims = Dims { kv_len: plan.layout().keys, ..x.dims };
        let (split, of_rows) = (x.pools.dim().2, [dims.head_dim; 2]);
        let joined = Joined { parts: [&pools, x.kv], split, dims: of_rows };
        let rows = x.rows();
        let slots = Slots { lengths: &rows, ..x.tokens };
        let spans = Spans::new(&dims, &slots);
        let places = (spans.lengths(&slots), Some(slots));
        let arrays = Arrays::any(x.entries, x.q, Kv::Cache(&joined), places);
        let norm = Norm::Softmax { sinks: self.sinks.as_deref() };
        let call = self.config.over(arrays, dims, norm, None);
        Ok(run(&Call { keys: Keys::Tokens(plan), ..call }))
    }

    /// Rows of the output.
    fn count(x: &Pooling<'_>) -> usize {
        x.entries * x.dims.q_heads * x.dims.q_len
    }

    fn turn_bytes(&self, x: &Pooling<'_>) -> usize {
        bytes_for::<u64>(claim_words(Self::count(x)))
            + bytes_for::<f32>(x.entries * x.dims.q_len)
            + bytes_for_shares(parallel::threads(), bytes_for::<f32>(self.room(&x.dims)))
    }

    /// Numbers that a thread rotates with.
    fn room(&self, dims: &Dims) -> usize {
        dims.head_dim.next_multiple_of(MAX_LANES) + self.rope.as_ref().map_or(0, Rope::dim)
    }

    /// Bytes of scratch.
    pub(crate) fn bytes(&self, x: &Pooling<'_>, plan: &TokenLists) -> Result<usize> {
        let engine = self.with_call(x, plan, engine::workspace_bytes)?;
        let held = Self::count(x) * x.dims.head_dim;
        Ok(bytes_for::<f32>(held) + engine.max(self.turn_bytes(x)))
    }

    /// The kernel; the output has been checked.
    pub(crate) fn run<O: Element>(
        &self,
        x: &Pooling<'_>,
        plan: &TokenLists,
        out: ArrayViewMut4<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let dims = x.dims;
        let mut arena = workspace.arena(self.bytes(x, plan)?)?;
        let mut made = take_array(&mut arena, (x.entries, dims.q_heads, dims.q_len, dims.head_dim));
        self.with_call(x, plan, |call| engine::run_in(call, made.view_mut(), None, arena.reborrow()))?;

        let from = f32::any(Heads::new(made.view()));
        let to = O::any_out(OutRows::new(out, arena.take(claim_words(Self::count(x)))));
        // By row of the queries; those of no sequence are at none.
        let positions = arena.take::<f32>(x.entries * dims.q_len);
        positions.fill(0.0);
        for b in 0..dims.batch {
            let of = x.sequence(b);
            let rows = &mut positions[of.batch * dims.q_len..][of.queries];
            rows.iter_mut().enumerate().for_each(|(i, at)| *at = x.seen(b, i) as f32 - 1.0);
        }
        let (shares, positions) =
            (arena.shares(parallel::threads(), bytes_for::<f32>(self.room(&dims))), &*positions);
        let start = |worker: usize| shares.take(worker).take::<f32>(self.room(&dims));
        // The angles of a query are those of all heads.
        parallel::for_each(parallel::threads(), x.entries * dims.q_len, start, |room, i| {
            let (batch, query) = (i / dims.q_len, i % dims.q_len);
            let heads = 0..dims.q_heads;
            self.config.isa().dispatch(Turn {
                rope: self.rope.as_ref(),
                position: -f64::from(positions[i]),
                from: &from,
                to: &to,
                at: (batch, heads, query),
                room,
                dim: dims.head_dim,
            });
        });
        Ok(())
    }

    /// Multiply-adds of listed pairs, and the rows that lists name.
    pub(crate) fn price(&self, x: &Pooling<'_>, plan: &TokenLists) -> Result<Cost> {
        self.check(x)?;
        let pairs = plan.len() * x.dims.q_heads;
        let bytes = x.bytes + x.pools.len() * size_of::<f32>();
        Ok(Cost { flops: 4 * (pairs * x.dims.head_dim) as u64, bytes: bytes as u64 })
    }

    /// The definition on a plan: the output, and how far the kernel may be off.
    pub(crate) fn define(&self, x: &Pooling<'_>, plan: &TokenLists) -> Result<(Array4<f64>, Array3<f64>)> {
        self.check(x)?;
        self.check_index(x, plan)?;
        let Dims { batch, q_heads, q_len, head_dim, .. } = x.dims;
        let scale = self.config.scale(&x.dims);
        let mut out = Array4::zeros((x.entries, q_heads, q_len, head_dim));
        let mut bound = Array3::zeros((x.entries, q_heads, q_len));
        for (b, of) in (0..batch).map(|b| (b, x.sequence(b))) {
            let (n, mut room) = (x.pools.dim().2, vec![0.0; head_dim]);
            let mut rows = Array2::zeros((n + x.held[of.slot], head_dim));
            for (j, mut to) in rows.outer_iter_mut().enumerate().filter(|_| q_heads > 0) {
                if j < n {
                    to.assign(&x.pools.slice(s![b, 0, j, ..]).mapv(f64::from));
                    continue;
                }
                let at = At { sequence: &of, kv_head: 0, keys: j - n..j - n + 1 };
                let row = x.kv.keys(Isa::Scalar, &at, &mut room);
                to.iter_mut().enumerate().for_each(|(c, to)| *to = f64::from(row.at(0, c)));
            }
            let site = |head| Site { batch: b, head, q_len: of.queries.len(), kv_len: rows.nrows() };
            for (h, (i, at)) in
                (0..q_heads).flat_map(|h| of.queries.clone().enumerate().map(move |at| (h, at)))
            {
                let (site, seen) = (site(h), x.seen(b, i));
                let q = x.q.rows(of.batch, h, &(at..at + 1));
                let q: Array1<f64> = (0..head_dim).map(|c| f64::from(q.at(0, c))).collect();
                let score = |&j: &usize| scale * q.dot(&rows.row(j));
                // A score of -inf hides its key.
                let sees = |j: &usize| plan.visible(&site, i, *j) && score(j) != f64::NEG_INFINITY;
                let keys: Vec<usize> = (0..rows.nrows()).filter(sees).collect();
                let sink = self.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[h]));
                let most = keys.iter().map(score).fold(sink, f64::max);
                let total = keys.iter().map(|j| (score(j) - most).exp()).sum::<f64>() + (sink - most).exp();
                let mut o = vec![0.0; head_dim];
                let (mut size, mut largest) = (0f64, 0f64);
                for j in &keys {
                    let weight = (score(j) - most).exp() / total;
                    o.iter_mut().zip(rows.row(*j)).for_each(|(o, v)| *o += weight * v);
                    let products = q.iter().zip(rows.row(*j)).map(|(q, k)| (q * k).abs()).sum::<f64>();
                    if most - score(j) < 25.0 {
                        size = size.max(scale.abs() * products + score(j).abs());
                    }
                    largest = rows.row(*j).iter().fold(largest, |most, v| most.max(v.abs()));
                }
                if let Some(rope) = &self.rope {
                    rope.define(-(seen as f64 - 1.0), &mut o);
                }
                o.iter().enumerate().for_each(|(c, &o)| out[[of.batch, h, at, c]] = o);
                // A rotation makes sums of two numbers.
                let terms = (head_dim + keys.len() + 4) as f64 + size;
                bound[[of.batch, h, at]] = 2.0 * ERROR_CONSTANT * 2f64.powi(-24) * terms * largest;
            }
        }
        Ok((out, bound))
    }
}

/// Rotates the output rows of a query.
struct Turn<'a, 'b> {
    rope: Option<&'a Rope>,
    position: f64,
    from: &'a AnyArray<'b>,
    to: &'a AnyOut<'b>,
    at: (usize, Range<usize>, usize),
    room: &'a mut [f32],
    dim: usize,
}

impl Kernel for Turn<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rope, position, from, to, at: (batch, heads, query), room, dim } = self;
        // Whole vectors are written.
        let (row, angles) = room.split_at_mut(dim.next_multiple_of(MAX_LANES));
        if let Some(rope) = rope {
            for (to, (sin, cos)) in angles.chunks_exact_mut(2).zip(rope.angles(position)) {
                to.copy_from_slice(&[sin as f32, cos as f32]);
            }
        }
        for head in heads {
            from.rows(batch, head, &(query..query + 1)).pack_rows(s, &mut row[..dim], dim);
            if let Some(rope) = rope {
                rope.turn(angles, &mut row[..dim]);
            }
            to.take(batch, head, query..query + 1).write(s, 0, row, 1.0);
        }
    }
}
