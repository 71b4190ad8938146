//! Attentions of the same queries over several kinds of keys, whose outputs gates mix: over
//! pools of keys, over blocks of them and over a window, of arrays or of caches.

use ndarray::{Array2, ArrayView4, ArrayViewMut4, arr0};

use crate::attention::{Cost, Dim4, Input};
use crate::cache::{Cache, CachedBranches};
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Arrays, Call};
use crate::engine::workspace::{Workspace, take_array};
use crate::error::{Error, Result};
use crate::input::branched::Branches;
use crate::input::{Dims, Lengths, Sequence};
use crate::keys::BlockLists;
use crate::keys::arrays::Laid;
use crate::keys::source::{At, Kv, Slots};
use crate::mask::Mask;
use crate::score::Plain;
use crate::select::Source;
use crate::simd::Isa;
use crate::simd::any::{AnyArray, IntoAny};
use crate::simd::mem::{Heads, bytes_for};
use crate::stages::attend::Config;
use crate::stages::gated_sum::GatedSum;
use crate::stages::means::{Means, Side};
use crate::stages::selecting::Spans;

/// A call of any element type, over arrays or caches.
pub(crate) struct Branched<'a> {
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    slots: Option<Slots<'a>>,
    /// Size of the batch axis.
    pub(crate) entries: usize,
    pub(crate) q: AnyArray<'a>,
    pub(crate) gates: ArrayView4<'a, f32>,
    pub(crate) own: Kv<'a>,
    /// Of the compressed rows, and how many arrays have.
    pub(crate) compressed: Option<(Kv<'a>, usize)>,
    pub(crate) window: Option<Kv<'a>>,
}

impl<'a> Branched<'a> {
    pub(crate) fn sequence(&self, index: usize) -> Sequence {
        match &self.slots {
            Some(slots) => slots.sequence(&self.dims, index),
            None => self.lengths.sequence(&self.dims, index),
        }
    }

    /// Keys of each sequence.
    pub(crate) fn tokens(&self) -> Vec<usize> {
        (0..self.dims.batch).map(|i| self.sequence(i).keys.len()).collect()
    }

    /// Rows of a head as definitions read them.
    pub(crate) fn rows(
        &self,
        kv: &Kv<'_>,
        side: Side,
        (of, kv_head): (&Sequence, usize),
        n: usize,
    ) -> Array2<f64> {
        let dim = if side == Side::Keys { self.dims.head_dim } else { self.dims.value_dim };
        let (mut rows, mut room) = (Array2::zeros((n, dim)), vec![0.0; dim]);
        for (j, mut to) in rows.outer_iter_mut().enumerate() {
            let at = At { sequence: of, kv_head, keys: j..j + 1 };
            let row = match side {
                Side::Keys => kv.keys(Isa::Scalar, &at, &mut room),
                Side::Values => kv.values(Isa::Scalar, &at, &mut room),
            };
            to.iter_mut().enumerate().for_each(|(c, x)| *x = f64::from(row.at(0, c)));
        }
        rows
    }

    /// What is selected from: by the compressed rows where there are some.
    pub(crate) fn source(&self, isa: Isa) -> Source<'a> {
        let source = Source::any(isa, self.dims, (self.q, self.own), (self.lengths, self.slots));
        match self.compressed {
            Some((kv, _)) => source.given(kv),
            None => source,
        }
    }

    /// The queries with the keys and values of all tokens.
    pub(crate) fn on_tokens(&self, kv: Kv<'a>) -> Arrays<'a> {
        Arrays::any(self.entries, self.q, kv, (self.lengths, self.slots))
    }

    /// Calls `run` with the queries and the pools, those that are given or `made`, and with
    /// the sizes of these.
    pub(crate) fn with_pools<R>(
        &self,
        means: &Means,
        made: [ArrayView4<'_, f32>; 2],
        run: impl FnOnce(Arrays<'_>, Dims) -> Result<R>,
    ) -> Result<R> {
        let (tokens, count) = (self.tokens(), |n: &usize| means.count(*n));
        // Of a cache those of all its sequences.
        let counts: Vec<usize> =
            self.slots.as_ref().map_or(&tokens[..], |slots| slots.lengths).iter().map(count).collect();
        let ([k, v], kv_len) = (made.map(|x| f32::any(Heads::new(x))), made[0].dim().2);
        let laid = Laid { k, v };
        let (kv, kv_len) = match (self.compressed, &self.slots) {
            (Some(given), _) => given,
            (None, Some(_)) => (Kv::Cache(&laid), kv_len),
            (None, None) => (Kv::Arrays { k, v }, kv_len),
        };
        let slots = self.slots.as_ref().map(|slots| Slots { lengths: &counts, ..*slots });
        let places = match self.lengths {
            lengths if self.slots.is_some() => (lengths, slots),
            Lengths::Full if self.compressed.is_none() => (Lengths::Full, slots),
            _ => (Lengths::Keys(&counts), slots),
        };
        run(Arrays::any(self.entries, self.q, kv, places), Dims { kv_len, ..self.dims })
    }

    /// Pairs of a query and a pool that it sees whole, of a head.
    pub(crate) fn pairs_with_pools(&self, means: &Means) -> usize {
        let of = |sequence: Sequence| {
            let (queries, keys) = (sequence.queries.len(), sequence.keys.len());
            let seen = |i: usize| means.count((i + keys + 1).saturating_sub(queries));
            (0..queries).map(seen).sum::<usize>()
        };
        (0..self.dims.batch).map(|i| of(self.sequence(i))).sum()
    }

    /// The shapes of pools that are made, and of a branch's output.
    fn shapes(&self, means: &Means) -> [Dim4; 3] {
        let dims = &self.dims;
        let most = self.tokens().into_iter().max().unwrap_or(0);
        // Of arrays all rows, whatever of them belongs to a sequence.
        let most = if self.slots.is_some() { most } else { dims.kv_len };
        let pools = if self.compressed.is_some() { 0 } else { means.count(most) };
        let made = |dim| (dims.batch, dims.kv_heads, pools, dim);
        let out = (self.entries, dims.q_heads, dims.q_len, dims.value_dim);
        [made(dims.head_dim), made(dims.value_dim), out]
    }
}

/// Keys and values of arrays.
fn kv<T: Element>([k, v]: [ArrayView4<'_, T>; 2]) -> Kv<'_> {
    Kv::Arrays { k: T::any(Heads::new(k)), v: T::any(Heads::new(v)) }
}

/// What branches are of.
pub(crate) trait Branching: Input {
    /// Calls `run` with it, checked.
    fn with_branches<R>(&self, means: &Means, run: impl FnOnce(&Branched<'_>) -> Result<R>) -> Result<R>;

    /// What attention on the tokens that a mask leaves costs.
    fn price<M: Mask>(&self, config: &Config<M, Plain>) -> Result<Cost>;
}

impl<T: Element> Branching for Branches<'_, T> {
    fn with_branches<R>(&self, means: &Means, run: impl FnOnce(&Branched<'_>) -> Result<R>) -> Result<R> {
        let (dims, x) = (Input::dims(self)?, self.qkv.reborrow());
        let branched = Branched {
            dims,
            lengths: x.lengths,
            slots: None,
            entries: dims.batch,
            q: T::any(Heads::new(x.q)),
            gates: self.gates,
            own: kv([x.k, x.v]),
            compressed: self.compressed.map(|[k, v]| (kv([k, v]), k.dim().2)),
            window: self.window.map(kv),
        };
        let want = branched.tokens().into_iter().map(|n| means.count(n)).max().unwrap_or(0);
        match branched.compressed {
            Some((_, n)) if n < want => Err(Error::value("compressed k", format!("{want} pools or more"), n)),
            _ => run(&branched),
        }
    }

    fn price<M: Mask>(&self, config: &Config<M, Plain>) -> Result<Cost> {
        config.cost(&self.qkv)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Branching for CachedBranches<'_, Q, C, O> {
    fn with_branches<R>(&self, means: &Means, run: impl FnOnce(&Branched<'_>) -> Result<R>) -> Result<R> {
        let (dims, x) = (Input::dims(self)?, self.cached.reborrow());
        if let Some(compressed) = self.compressed {
            self.check_other("compressed", compressed, false, |n| means.count(n))?;
        }
        let (slots, own) = (x.slots(), Kv::Cache(x.cache.source()));
        let spans = Spans::new(&dims, &slots);
        let most = (0..dims.batch).map(|i| means.count(slots.len(i))).max().unwrap_or(0);
        run(&Branched {
            dims,
            lengths: spans.lengths(&slots),
            slots: Some(slots),
            entries: x.q.dim().0,
            q: Q::any(Heads::new(x.q)),
            gates: self.gates,
            own,
            compressed: self.compressed.map(|cache| (Kv::Cache(cache.source()), most)),
            window: self.window.map(|cache| Kv::Cache(cache.source())),
        })
    }

    fn price<M: Mask>(&self, config: &Config<M, Plain>) -> Result<Cost> {
        config.cost_cached(&self.cached)
    }
}

/// A mechanism of three attentions, on means of keys among others, on an index.
pub(crate) trait Mixed {
    /// How pools are made that are not given.
    fn means(&self) -> Means;

    /// Calls `run` with the calls of the branches, in the order of the gates; `made` are the
    /// pools that are not given.
    fn with_calls<R>(
        &self,
        x: &Branched<'_>,
        index: &BlockLists,
        made: [ArrayView4<'_, f32>; 2],
        run: impl FnOnce([Call<'_>; 3]) -> R,
    ) -> Result<R>;

    /// Scratch of a run.
    fn mix_bytes(&self, x: &Branched<'_>, index: &BlockLists) -> Result<usize> {
        let (dims, means) = (x.dims, self.means());
        let shapes = x.shapes(&means);
        let zero = arr0(0f32);
        let views = [shapes[0], shapes[1]].map(|shape| zero.broadcast(shape));
        let [Some(k), Some(v)] = views else {
            return Err(Error::too_large("k", format_args!("{:?}", shapes[0])));
        };
        let engines = |calls: [Call<'_>; 3]| calls.iter().map(engine::workspace_bytes).max().unwrap_or(0);
        let engines = self.with_calls(x, index, [k, v], engines)?;
        let held = |(b, h, n, d): Dim4| bytes_for::<f32>(b * h * n * d);
        let rows = |dim| (dims.batch, dims.kv_heads, dims.kv_len, dim);
        let pooling = [dims.head_dim, dims.value_dim].map(|dim| means.bytes(rows(dim), x.own.unpacks()));
        let sum = GatedSum { isa: means.isa, dim: shapes[2] }.bytes();
        let scratch = engines.max(pooling[0]).max(pooling[1]).max(sum);
        Ok(held(shapes[0]) + held(shapes[1]) + 3 * held(shapes[2]) + scratch)
    }

    /// Makes the pools, attends to each branch and mixes the outputs.
    fn mix<O: Element>(
        &self,
        x: &Branched<'_>,
        index: &BlockLists,
        out: ArrayViewMut4<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let means = self.means();
        let shapes = x.shapes(&means);
        let mut arena = workspace.arena(self.mix_bytes(x, index)?)?;
        let [mut k, mut v] = [shapes[0], shapes[1]].map(|shape| take_array(&mut arena, shape));
        let mut parts = [shapes[2]; 3].map(|shape| take_array(&mut arena, shape));
        if x.compressed.is_none() {
            let whole = |i: usize| match x.slots {
                Some(_) => x.sequence(i),
                None => Lengths::Full.sequence(&x.dims, i),
            };
            means.run_of(&x.own, Side::Keys, whole, k.view_mut(), arena.reborrow());
            means.run_of(&x.own, Side::Values, whole, v.view_mut(), arena.reborrow());
        }
        self.with_calls(x, index, [k.view(), v.view()], |calls| {
            for (call, part) in calls.iter().zip(&mut parts) {
                engine::run_in(call, part.view_mut(), None, arena.reborrow());
            }
        })?;
        let sum = GatedSum { isa: means.isa, dim: shapes[2] };
        sum.run(&parts.each_ref().map(|part| part.view()), x.gates, out, arena);
        Ok(())
    }
}
