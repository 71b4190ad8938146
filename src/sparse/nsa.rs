//! NSA: native sparse attention, a gated sum of three branches.

use ndarray::{Array2, Array4, ArrayView4, ArrayViewMut4, arr0};

use crate::attention::{Cost, Dim4, Input};
use crate::cache::{Cache, CachedBranches};
use crate::card::{Extras, carded, exhibit};
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Arrays, Call, Norm};
use crate::engine::workspace::{Workspace, take_array};
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Sequence};
use crate::keys::arrays::Laid;
use crate::keys::source::{At, Kv, Slots};
use crate::keys::{ATOM, BlockLists, Keys, Per};
use crate::mask::{Mask, WholePools, Window};
use crate::score::Plain;
use crate::select::{
    Fold, Forced, Pick, Pools, Reduce, Rule, Scheme, Scored, Source, Summary, select, workspace_bytes,
};
use crate::simd::Isa;
use crate::simd::any::{AnyArray, IntoAny};
use crate::simd::mem::{Heads, bytes_for};
use crate::stages::attend::{Config, Options};
use crate::stages::gated_sum::GatedSum;
use crate::stages::listed::Order;
use crate::stages::means::{Means, Side};
use crate::stages::opened::opened;
use crate::stages::selecting::{Spans, sparse_options};

mod define;

/// Queries, keys and values, the gates of the branches, and what branches have
/// of their own.
#[derive(Clone, Copy, Debug)]
pub struct Branches<'a, T> {
    /// What the selected blocks are of.
    pub qkv: Qkv<'a, T>,
    /// `[batch, q_heads, q_len, 3]`: of pools, blocks and window.
    pub gates: ArrayView4<'a, f32>,
    /// Compressed keys and values, `[batch, kv_heads, pools, dim]`, one for each
    /// pool that is whole.
    pub compressed: Option<[ArrayView4<'a, T>; 2]>,
    /// Keys and values of the window, of the shapes of the others.
    pub window: Option<[ArrayView4<'a, T>; 2]>,
}

impl<'a, T> Branches<'a, T> {
    /// With means as pools, and the same keys and values for all.
    pub fn new(qkv: Qkv<'a, T>, gates: ArrayView4<'a, f32>) -> Self {
        Self { qkv, gates, compressed: None, window: None }
    }

    /// With compressed keys and values.
    pub fn compressed(self, k: ArrayView4<'a, T>, v: ArrayView4<'a, T>) -> Self {
        Self { compressed: Some([k, v]), ..self }
    }

    /// With keys and values of the window.
    pub fn window(self, k: ArrayView4<'a, T>, v: ArrayView4<'a, T>) -> Self {
        Self { window: Some([k, v]), ..self }
    }
}

impl<T: Element> Input for Branches<'_, T> {
    type Out = T;

    fn dims(&self) -> Result<Dims> {
        let dims = self.qkv.dims()?;
        let Dims { batch, q_heads, kv_heads, q_len, head_dim, value_dim, .. } = dims;
        if dims.packed {
            return Err(Error::packed("NSA"));
        }
        if self.gates.dim() != (batch, q_heads, q_len, 3) {
            let expected = format!("[batch, q_heads, q_len, 3] = [{batch}, {q_heads}, {q_len}, 3]");
            return Err(Error::shape("gates", expected, self.gates.shape()));
        }
        if let Some([k, v]) = &self.compressed {
            let n = k.dim().2;
            for (name, x, dim) in [("compressed k", k, head_dim), ("compressed v", v, value_dim)] {
                if x.dim() != (batch, kv_heads, n, dim) {
                    let expected =
                        format!("[batch, kv_heads, pools, dim] = [{batch}, {kv_heads}, {n}, {dim}]");
                    return Err(Error::shape(name, expected, x.shape()));
                }
            }
        }
        if let Some([k, v]) = &self.window {
            for (name, x, want) in [("window k", k, &self.qkv.k), ("window v", v, &self.qkv.v)] {
                if x.dim() != want.dim() {
                    let expected = format!("that of the other branches, {:?}", want.shape());
                    return Err(Error::shape(name, expected, x.shape()));
                }
            }
        }
        Ok(dims)
    }

    fn out_dim(&self) -> Result<Dim4> {
        self.dims()?;
        Input::out_dim(&self.qkv)
    }
}

/// NSA: native sparse attention, a gated sum of three branches.
///
/// ```text
/// p_c  = softmax_c (scale q . k~_c)       pools c of 32 keys, every 16, seen whole
/// I_b  = sum over the heads of a group and the pools c of p_c times the strides
///        that pool c and block b of 64 keys share
/// S    = the first block, the query's own and the one before it, and those with
///        the largest I_b, 16 together
/// o    = g_1 sum_c p_c v~_c + g_2 attention on S + g_3 attention on a window
/// ```
///
/// each a softmax of its own, of keys up to the query's position. From "Native
/// Sparse Attention" (arXiv 2502.11089). Gates are the model's; so are compressed
/// keys and values where it has learned to make them
/// ([`compressed`](Branches::compressed)), which otherwise are means, and the
/// keys and values of the window if it has its own.
///
/// Runs over arrays ([`Branches`]) and, in prefill and in decoding, over caches
/// ([`CachedBranches`], packed queries included).
///
/// Cost: `2 head_dim / stride` flops a visible pair for the selection and `2
/// (head_dim + value_dim) / stride` for the pools; `2 (head_dim + value_dim)` a
/// pair of a selected block or of the window.
///
/// ```
/// use attention_kernels::sparse::{Branches, Nsa};
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let gates = Array4::from_elem((1, 2, 700, 3), 0.5);
/// let nsa = Nsa::builder(4).window(100).build()?;
/// let out = nsa.forward(Branches::new(Qkv::new(x.view(), x.view(), x.view()), gates.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Nsa {
    config: Config<Order, Plain>,
    builder: NsaBuilder,
}

/// Builds an [`Nsa`].
#[derive(Clone, Debug)]
pub struct NsaBuilder {
    options: Options<Order, Plain>,
    k: usize,
    pool: [usize; 2],
    block: usize,
    first: usize,
    local: usize,
    window: usize,
}

impl Nsa {
    /// `k` blocks a query, those that are always read among them (16 in the
    /// paper); causal.
    pub fn builder(k: usize) -> NsaBuilder {
        let options = Options::default();
        NsaBuilder { options, k, pool: [32, 16], block: 64, first: 1, local: 2, window: 512 }.causal()
    }
}

sparse_options!(NsaBuilder);

impl NsaBuilder {
    /// Keys of a pool and from one to the next, of which the former are a
    /// multiple. Default: 32 and 16.
    pub fn pool(self, width: usize, stride: usize) -> Self {
        Self { pool: [width, stride], ..self }
    }

    /// Keys of a block: a multiple of 64, and of those from one pool to the
    /// next. Default: 64.
    pub fn block(self, block: usize) -> Self {
        Self { block, ..self }
    }

    /// The first so many blocks are always read. Default: 1.
    pub fn first(self, first: usize) -> Self {
        Self { first, ..self }
    }

    /// So are the query's own and those before it, so many together. Default: 2.
    pub fn local(self, local: usize) -> Self {
        Self { local, ..self }
    }

    /// Keys of the window, the query's own among them. Default: 512.
    pub fn window(self, window: usize) -> Self {
        Self { window, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` or a window of 0, pools and blocks that are no
    /// multiples as they should be, and a scale that is not finite;
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Nsa> {
        let [width, stride] = self.pool;
        for (name, n) in [("k", self.k), ("window", self.window)] {
            if n == 0 {
                return Err(Error::value(name, "at least 1", 0));
            }
        }
        if stride == 0 || width == 0 || !width.is_multiple_of(stride) {
            let expected = "a multiple of the keys from one to the next, at least 1";
            return Err(Error::value("pool", expected, format_args!("{width} every {stride}")));
        }
        if self.block == 0 || !self.block.is_multiple_of(ATOM) || !self.block.is_multiple_of(stride) {
            return Err(Error::value(
                "block",
                format!("a multiple of {ATOM} and of {stride} keys"),
                self.block,
            ));
        }
        Ok(Nsa { config: self.options.clone().build()?, builder: self })
    }
}

/// A call of any element type, over arrays or caches.
struct Parts<'a> {
    dims: Dims,
    lengths: Lengths<'a>,
    slots: Option<Slots<'a>>,
    /// Size of the batch axis.
    entries: usize,
    q: AnyArray<'a>,
    gates: ArrayView4<'a, f32>,
    own: Kv<'a>,
    /// Of the compressed rows, and how many arrays have.
    compressed: Option<(Kv<'a>, usize)>,
    window: Option<Kv<'a>>,
}

impl Parts<'_> {
    fn sequence(&self, index: usize) -> Sequence {
        match &self.slots {
            Some(slots) => slots.sequence(&self.dims, index),
            None => self.lengths.sequence(&self.dims, index),
        }
    }

    /// Keys of each sequence.
    fn tokens(&self) -> Vec<usize> {
        (0..self.dims.batch).map(|i| self.sequence(i).keys.len()).collect()
    }

    /// Rows of a head as definitions read them.
    fn rows(&self, kv: &Kv<'_>, side: Side, (of, kv_head): (&Sequence, usize), n: usize) -> Array2<f64> {
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
}

/// Keys and values of arrays.
fn kv<T: Element>([k, v]: [ArrayView4<'_, T>; 2]) -> Kv<'_> {
    Kv::Arrays { k: T::any(Heads::new(k)), v: T::any(Heads::new(v)) }
}

/// What branches are of.
trait Branching: Input {
    /// Calls `run` with it, checked.
    fn with_parts<R>(&self, means: &Means, run: impl FnOnce(&Parts<'_>) -> Result<R>) -> Result<R>;

    /// What attention on the keys of the blocks that a mask leaves costs.
    fn price<M: Mask>(&self, config: &Config<M, Plain>) -> Result<Cost>;
}

impl<T: Element> Branching for Branches<'_, T> {
    fn with_parts<R>(&self, means: &Means, run: impl FnOnce(&Parts<'_>) -> Result<R>) -> Result<R> {
        let (dims, x) = (Input::dims(self)?, self.qkv.reborrow());
        let parts = Parts {
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
        let want = parts.tokens().into_iter().map(|n| means.count(n)).max().unwrap_or(0);
        match parts.compressed {
            Some((_, n)) if n < want => Err(Error::value("compressed k", format!("{want} pools or more"), n)),
            _ => run(&parts),
        }
    }

    fn price<M: Mask>(&self, config: &Config<M, Plain>) -> Result<Cost> {
        config.cost(&self.qkv)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Branching for CachedBranches<'_, Q, C, O> {
    fn with_parts<R>(&self, means: &Means, run: impl FnOnce(&Parts<'_>) -> Result<R>) -> Result<R> {
        let (dims, x) = (Input::dims(self)?, self.cached.reborrow());
        if let Some(compressed) = self.compressed {
            self.check_other("compressed", compressed, false, |n| means.count(n))?;
        }
        let (slots, own) = (x.slots(), Kv::Cache(x.cache.source()));
        let spans = Spans::new(&dims, &slots);
        let most = (0..dims.batch).map(|i| means.count(slots.len(i))).max().unwrap_or(0);
        run(&Parts {
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

impl Nsa {
    fn scheme(&self, dims: &Dims) -> Scheme {
        let NsaBuilder { k, pool: [width, stride], block, first, local, .. } = self.builder;
        Scheme {
            unit: block,
            summary: Summary::Mean,
            per: Per::Group,
            q_block: 1,
            shares: Some(self.config.scale(dims) as f32),
            reduce: Reduce::Sum,
            pick: Pick { rule: Rule::TopK(k), forced: Forced { first, last: local, inside: true } },
            causal: true,
            scored: Scored::Pools(Pools { width, stride, fold: Fold::Sum, coarse: None, dense: 0 }),
        }
    }

    fn means(&self) -> Means {
        let [width, stride] = self.builder.pool;
        Means { isa: self.config.isa(), width, stride }
    }

    fn with_source<R>(
        &self,
        x: &Parts<'_>,
        run: impl FnOnce(&Source<'_>, &Scheme) -> Result<R>,
    ) -> Result<R> {
        let source = Source::any(self.config.isa(), x.dims, (x.q, x.own), (x.lengths, x.slots));
        match x.compressed {
            Some((kv, _)) => run(&source.given(kv), &self.scheme(&x.dims)),
            None => run(&source, &self.scheme(&x.dims)),
        }
    }

    fn open<R>(&self, x: &impl Branching, run: impl FnOnce(&Parts<'_>) -> Result<R>) -> Result<R> {
        x.with_parts(&self.means(), run)
    }

    fn choose(&self, x: &Parts<'_>, workspace: &mut Workspace) -> Result<BlockLists> {
        self.with_source(x, |source, scheme| select(source, scheme, workspace)?.blocks())
    }

    fn choice_bytes(&self, x: &Parts<'_>) -> Result<usize> {
        self.with_source(x, workspace_bytes)
    }

    /// Calls `run` with the calls of the branches; `made` are the pools that are not given.
    fn with_calls<R>(
        &self,
        x: &Parts<'_>,
        index: &BlockLists,
        made: [ArrayView4<'_, f32>; 2],
        run: impl FnOnce([Call<'_>; 3]) -> R,
    ) -> Result<R> {
        const NORM: Norm<'static> = Norm::Softmax { sinks: None };
        let (dims, tokens, [width, stride]) = (x.dims, x.tokens(), self.builder.pool);
        let plan = Keys::Blocks(index);
        plan.check(&dims, &x.lengths)?;
        let count = |n: &usize| self.means().count(*n);
        // Of a cache those of all its sequences.
        let counts: Vec<usize> =
            x.slots.as_ref().map_or(&tokens[..], |slots| slots.lengths).iter().map(count).collect();
        let pools = self.config.masked(WholePools { width, stride, tokens });
        let window = self.config.masked(Window::new(Some(self.builder.window - 1), Some(0)));
        let (made, kv_len) = ([made[0], made[1]].map(|x| f32::any(Heads::new(x))), made[0].dim().2);
        let [k, v] = made;
        let laid = Laid { k, v };
        let (kv, kv_len) = match (x.compressed, &x.slots) {
            (Some(given), _) => given,
            (None, Some(_)) => (Kv::Cache(&laid), kv_len),
            (None, None) => (Kv::Arrays { k, v }, kv_len),
        };
        let slots = x.slots.as_ref().map(|slots| Slots { lengths: &counts, ..*slots });
        let places = match x.lengths {
            lengths if x.slots.is_some() => (lengths, slots),
            Lengths::Full if x.compressed.is_none() => (Lengths::Full, slots),
            _ => (Lengths::Keys(&counts), slots),
        };
        let own = (x.lengths, x.slots);
        let arrays = |kv, places| Arrays::any(x.entries, x.q, kv, places);
        let of_pools = pools.checked(Dims { kv_len, ..dims }.checked()?)?;
        let first = pools.over(arrays(kv, places), of_pools, NORM, None);
        let second = self.config.over(arrays(x.own, own), dims, NORM, None);
        let third = window.over(arrays(x.window.unwrap_or(x.own), own), dims, NORM, None);
        Ok(run([first, Call { keys: plan, ..second }, third]))
    }

    /// The shapes of pools that are made, and of a branch's output.
    fn shapes(&self, x: &Parts<'_>) -> [Dim4; 3] {
        let dims = &x.dims;
        let most = x.tokens().into_iter().max().unwrap_or(0);
        // Of arrays all rows, whatever of them belongs to a sequence.
        let most = if x.slots.is_some() { most } else { dims.kv_len };
        let pools = if x.compressed.is_some() { 0 } else { self.means().count(most) };
        let made = |dim| (dims.batch, dims.kv_heads, pools, dim);
        [made(dims.head_dim), made(dims.value_dim), (x.entries, dims.q_heads, dims.q_len, dims.value_dim)]
    }

    fn bytes(&self, x: &Parts<'_>, index: &BlockLists) -> Result<usize> {
        let (dims, shapes) = (x.dims, self.shapes(x));
        let zero = arr0(0f32);
        let views = [shapes[0], shapes[1]].map(|shape| zero.broadcast(shape));
        let [Some(k), Some(v)] = views else {
            return Err(Error::too_large("k", format_args!("{:?}", shapes[0])));
        };
        let engines = |calls: [Call<'_>; 3]| calls.iter().map(engine::workspace_bytes).max().unwrap_or(0);
        let engines = self.with_calls(x, index, [k, v], engines)?;
        let held = |(b, h, n, d): Dim4| bytes_for::<f32>(b * h * n * d);
        let rows = |dim| (dims.batch, dims.kv_heads, dims.kv_len, dim);
        let means = [dims.head_dim, dims.value_dim].map(|dim| self.means().bytes(rows(dim), x.own.unpacks()));
        let sum = GatedSum { isa: self.config.isa(), dim: shapes[2] }.bytes();
        let scratch = engines.max(means[0]).max(means[1]).max(sum);
        Ok(held(shapes[0]) + held(shapes[1]) + 3 * held(shapes[2]) + scratch)
    }

    fn run<O: Element>(
        &self,
        x: &Parts<'_>,
        index: &BlockLists,
        out: ArrayViewMut4<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let shapes = self.shapes(x);
        let mut arena = workspace.arena(self.bytes(x, index)?)?;
        let [mut k, mut v] = [shapes[0], shapes[1]].map(|shape| take_array(&mut arena, shape));
        let mut parts = [shapes[2]; 3].map(|shape| take_array(&mut arena, shape));
        if x.compressed.is_none() {
            let whole = |i: usize| match x.slots {
                Some(_) => x.sequence(i),
                None => Lengths::Full.sequence(&x.dims, i),
            };
            self.means().run_of(&x.own, Side::Keys, whole, k.view_mut(), arena.reborrow());
            self.means().run_of(&x.own, Side::Values, whole, v.view_mut(), arena.reborrow());
        }
        self.with_calls(x, index, [k.view(), v.view()], |calls| {
            for (call, part) in calls.iter().zip(&mut parts) {
                engine::run_in(call, part.view_mut(), None, arena.reborrow());
            }
        })?;
        let sum = GatedSum { isa: self.config.isa(), dim: shapes[2] };
        sum.run(&parts.each_ref().map(|part| part.view()), x.gates, out, arena);
        Ok(())
    }

    fn price(&self, x: &impl Branching, index: &BlockLists) -> Result<Cost> {
        let blocks = x.price(&self.config.listed(Keys::Blocks(index)))?;
        let window = x.price(&self.config.masked(Window::new(Some(self.builder.window - 1), Some(0))))?;
        let pools = x.with_parts(&self.means(), |x| {
            let of = |sequence: Sequence| {
                let (queries, keys) = (sequence.queries.len(), sequence.keys.len());
                let seen = |i: usize| self.means().count((i + keys + 1).saturating_sub(queries));
                (0..queries).map(seen).sum::<usize>()
            };
            let pairs: usize = (0..x.dims.batch).map(|i| of(x.sequence(i))).sum();
            Ok(2 * pairs * x.dims.q_heads * (2 * x.dims.head_dim + x.dims.value_dim))
        })?;
        Ok(Cost { flops: blocks.flops + window.flops + pools as u64, ..blocks })
    }
}

opened!(Nsa, BlockLists, [T: Element] Branches<'_, T>);
opened!(Nsa, BlockLists, [Q: Element, C: Cache + ?Sized, O: Element] CachedBranches<'_, Q, C, O>);

exhibit! {
    NsaExhibit of Nsa, "sparse", "NSA", "arXiv 2502.11089";
    "means of 16 keys, 3 blocks of 64 keys by the weights of those, and a window of 24 keys, gated";
    not "where the model was not trained with it, and below some thousand keys";
    tokens false;
    build(_, _) { Nsa::builder(3).pool(16, 8).local(1).window(24) }
    extras(x, field) {
        let (batch, heads, len, _) = x.q.dim();
        let gate = |(_, h, i, part)| 0.5 + 0.4 * field.at(1, h, i, part);
        Extras { rates: Array4::from_shape_fn((batch, heads, len, 3), gate), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> Branches<'a, T> { Branches::new(x, extras.rates.view()) }
}
carded!(Nsa, NsaExhibit);

#[cfg(test)]
mod tests;
