//! Mechanisms that select keys and attend to these: what their traits have in
//! common.

use std::ops::Range;

use ndarray::{Array1, ArrayView1, ArrayView2, ArrayViewMut3, ArrayViewMut4, s};

use crate::attention::{Cost, Input, Margins};
use crate::cache::{Cache, Cached};
use crate::definition;
use crate::definition::softmax::{Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::{Dims, Lengths, Qkv, Sequence};
use crate::keys::source::Slots;
use crate::keys::{ATOM, BlockLists, Keys, Layout, Per, TokenLists};
use crate::mask::Mask;
use crate::score::{AnyScore, Plain};
use crate::select::{
    IndexBranch, Indexed, Reduce, Scheme, Selected, Source, Summaries, Summarised, SummarisedCache, select,
    workspace_bytes,
};
use crate::simd::Isa;
use crate::stages::attend::{Attending, Config, forward_into};
use crate::stages::listed::Order;

/// A plan as an index.
pub(crate) trait Listing: Clone + std::fmt::Debug + PartialEq + Send + Sync {
    fn plan(&self) -> Keys<'_>;
    fn layout(&self) -> &Layout;
    /// The keys of a list.
    fn list(&self, sequence: usize, head: usize, block: usize) -> Vec<Range<usize>>;
}

/// A plan that lists of candidates are.
pub(crate) trait Written: Listing {
    fn of(selected: &Selected) -> Result<Self>;
}

impl Written for TokenLists {
    fn of(selected: &Selected) -> Result<Self> {
        selected.tokens()
    }
}

impl Written for BlockLists {
    fn of(selected: &Selected) -> Result<Self> {
        selected.blocks()
    }
}

impl Listing for TokenLists {
    fn plan(&self) -> Keys<'_> {
        Keys::Tokens(self)
    }
    fn layout(&self) -> &Layout {
        self.layout()
    }
    fn list(&self, sequence: usize, head: usize, block: usize) -> Vec<Range<usize>> {
        self.runs(sequence, head, block).iter().map(|run| run.range()).collect()
    }
}

impl Listing for BlockLists {
    fn plan(&self) -> Keys<'_> {
        Keys::Blocks(self)
    }
    fn layout(&self) -> &Layout {
        self.layout()
    }
    fn list(&self, sequence: usize, head: usize, block: usize) -> Vec<Range<usize>> {
        let keys = self.layout().keys;
        let range = |&atom: &u32| atom as usize * ATOM..((atom as usize + 1) * ATOM).min(keys);
        self.atoms(sequence, head, block).iter().map(range).collect()
    }
}

/// The first place where two indices differ in a key that is not in doubt.
pub(crate) fn difference<I: Listing>(a: &I, b: &I, margins: &Margins) -> Option<String> {
    let layout = a.layout();
    if layout != b.layout() {
        return Some(format!("{layout:?} and {:?}", b.layout()));
    }
    let mut list = 0;
    for sequence in 0..layout.sequences {
        for list_head in 0..layout.heads() {
            let head = list_head * (layout.q_heads / layout.heads());
            for block in 0..layout.blocks() {
                let keys = |ranges: &[Range<usize>]| {
                    let mut keys = vec![false; layout.keys];
                    ranges.iter().cloned().for_each(|range| keys[range].fill(true));
                    keys
                };
                let doubtful = margins.doubtful.get(list).map_or(&[][..], |x| x);
                list += 1;
                let [x, y] = [a, b].map(|index| keys(&index.list(sequence, head, block)));
                let doubtful = keys(doubtful);
                if let Some(key) = (0..layout.keys).find(|&j| x[j] != y[j] && !doubtful[j]) {
                    let place = format!("sequence {sequence}, head {head}, block {block} of queries");
                    return Some(format!("{place}: key {key} is in one of both, and not in doubt"));
                }
            }
        }
    }
    None
}

/// A mechanism that selects by products with summaries of keys.
pub(crate) trait Schemed: Sized {
    /// The kind of its plan.
    type Index: Written;

    fn config(&self) -> &Config<Order, Plain>;

    /// How it selects for inputs of these sizes.
    fn scheme(&self, dims: &Dims) -> Scheme;

    /// The score of a query with the keys of a candidate, as the paper has it.
    fn score(&self, query: ArrayView1<'_, f64>, keys: ArrayView2<'_, f64>) -> f64;
}

/// A mechanism on an index: a call of the attention engine.
pub(crate) struct On<'a, M, I> {
    pub(crate) mechanism: &'a M,
    pub(crate) index: &'a I,
}

/// A mechanism that selects. With [`selecting!`] it has
/// [`Attention`](crate::Attention), [`Selects`](crate::Selects),
/// [`Mergeable`](crate::Mergeable) and [`Weights`](crate::Weights).
pub(crate) trait Selecting<X: Input>: Sized {
    type Index: Listing;

    fn select_bytes(&self, x: X) -> Result<usize>;
    fn select_in(&self, x: X, workspace: &mut Workspace) -> Result<Self::Index>;
    fn define_select(&self, x: X) -> Result<(Self::Index, Margins)>;
    /// What the selection of these lists costs.
    fn price_select(&self, x: X) -> Result<Cost>;
    fn with_call<R>(&self, x: X, index: &Self::Index, run: impl FnOnce(&Call<'_>) -> R) -> Result<R>;
    fn define(&self, x: X, index: &Self::Index) -> Result<Reference>;
    fn price(&self, x: X, index: &Self::Index) -> Result<Cost>;
}

impl<X: Input, M: Selecting<X, Index = I>, I: Listing> Attending<X> for On<'_, M, I> {
    fn with_call<R>(&self, x: X, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        self.mechanism.with_call(x, self.index, run)
    }
    fn define(&self, x: X) -> Result<Reference> {
        self.mechanism.define(x, self.index)
    }
    fn price(&self, x: X) -> Result<Cost> {
        let (select, attend) = (self.mechanism.price_select(x)?, self.mechanism.price(x, self.index)?);
        Ok(Cost { flops: select.flops + attend.flops, bytes: attend.bytes })
    }
}

/// Selects, then attends in the same workspace.
pub(crate) fn select_and_attend<X: Input, M: Selecting<X>>(
    mechanism: &M,
    x: X,
    out: ArrayViewMut4<'_, X::Out>,
    lse: Option<ArrayViewMut3<'_, f32>>,
    workspace: &mut Workspace,
) -> Result<()> {
    let index = &mechanism.select_in(x, workspace)?;
    forward_into(&On { mechanism, index }, x, out, lse, workspace)
}

/// The call of an engine on a plan.
pub(crate) fn with_call<Q: Element, K: Element, O: Element, R>(
    config: &Config<Order, Plain>,
    x: Qkv<'_, Q, K, O>,
    keys: Keys<'_>,
    run: impl FnOnce(&Call<'_>) -> R,
) -> Result<R> {
    with_scored_call(config, &Plain, x, keys, run)
}

/// The same with a change of scores.
pub(crate) fn with_scored_call<Q: Element, K: Element, O: Element, R>(
    config: &Config<Order, Plain>,
    score: &dyn AnyScore,
    x: Qkv<'_, Q, K, O>,
    keys: Keys<'_>,
    run: impl FnOnce(&Call<'_>) -> R,
) -> Result<R> {
    keys.check(&x.dims()?, &x.lengths)?;
    let call = config.call(x.reborrow(), Norm::Softmax { sinks: None }, None)?;
    Ok(run(&Call { keys, score, ..call }))
}

/// Its definition.
pub(crate) fn define<M: Mask + Clone, Q: Element, K: Element, O: Element>(
    config: &Config<M, Plain>,
    x: Qkv<'_, Q, K, O>,
    keys: Keys<'_>,
) -> Result<Reference> {
    keys.check(&x.dims()?, &x.lengths)?;
    let listed = config.listed(keys);
    listed.definition(x.reborrow(), Normalisation::Softmax { sinks: None }, None)?.compute()
}

/// What it costs.
pub(crate) fn price<Q, K, O>(
    config: &Config<Order, Plain>,
    x: &Qkv<'_, Q, K, O>,
    keys: Keys<'_>,
) -> Result<Cost> {
    keys.check(&x.dims()?, &x.lengths)?;
    config.listed(keys).cost(x)
}

/// The lists of a schemed mechanism by definition.
fn define_select<M: Schemed, Q: Element, K: Element, O>(
    mechanism: &M,
    x: Qkv<'_, Q, K, O>,
) -> Result<(M::Index, Margins)> {
    let dims = x.dims()?;
    let scheme = mechanism.scheme(&dims);
    let layout = scheme.layout(&dims, &x.lengths);
    layout.lists()?;
    let group = dims.q_heads / dims.kv_heads.max(1);
    let (q, k) = (x.q.mapv(Element::to_f64), x.k.mapv(Element::to_f64));
    let score = |b: usize, h: usize, i: usize, keys: Range<usize>| {
        let keys: ArrayView2<'_, f64> = k.slice(s![b, h / group, keys, ..]);
        mechanism.score(q.slice(s![b, h, i, ..]), keys)
    };
    let (lists, margins) = definition::select::select(&scheme, &dims, &x.lengths, &layout, score);
    Ok((M::Index::of(&Selected::of(&scheme, &dims, &x.lengths, &lists))?, margins))
}

/// Multiply-adds of the scores.
fn price_select(scheme: &Scheme, dims: &Dims, lengths: &Lengths<'_>) -> Cost {
    let mut pairs = 0;
    for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
        let (queries, keys) = (sequence.queries.len(), sequence.keys.len());
        let of = |i: usize| scheme.rows(scheme.seen(i, queries, keys), false) as u64;
        // Votes are of one query a block.
        let votes = scheme.reduce == Reduce::Votes;
        let asked = |i: &usize| !votes || (i + 1).is_multiple_of(scheme.q_block) || i + 1 == queries;
        pairs += (0..queries).filter(asked).map(of).sum::<u64>();
    }
    let width = scheme.summary.width(dims.head_dim) as u64;
    Cost { flops: 2 * pairs * dims.q_heads as u64 * width, bytes: 0 }
}

macro_rules! schemed {
    ($input:ident, $x:ident => $qkv:expr, $summaries:expr) => {
        impl<M: Schemed, Q: Element, K: Element, O: Element> Selecting<$input<'_, Q, K, O>> for M {
            type Index = M::Index;

            fn select_bytes(&self, $x: $input<'_, Q, K, O>) -> Result<usize> {
                let x: Qkv<'_, Q, K, O> = $qkv;
                let summaries: Option<&Summaries> = $summaries;
                let scheme = self.scheme(&x.dims()?);
                workspace_bytes(&Source::new(self.config().isa(), x.reborrow(), summaries)?, &scheme)
            }

            fn select_in(&self, $x: $input<'_, Q, K, O>, workspace: &mut Workspace) -> Result<Self::Index> {
                let x: Qkv<'_, Q, K, O> = $qkv;
                let summaries: Option<&Summaries> = $summaries;
                let scheme = self.scheme(&x.dims()?);
                let source = Source::new(self.config().isa(), x.reborrow(), summaries)?;
                M::Index::of(&select(&source, &scheme, workspace)?)
            }

            fn define_select(&self, $x: $input<'_, Q, K, O>) -> Result<(Self::Index, Margins)> {
                define_select(self, $qkv)
            }

            fn price_select(&self, $x: $input<'_, Q, K, O>) -> Result<Cost> {
                let x: Qkv<'_, Q, K, O> = $qkv;
                let dims = x.dims()?;
                Ok(price_select(&self.scheme(&dims), &dims, &x.lengths))
            }

            fn with_call<R>(
                &self,
                $x: $input<'_, Q, K, O>,
                index: &Self::Index,
                run: impl FnOnce(&Call<'_>) -> R,
            ) -> Result<R> {
                with_call(self.config(), $qkv, index.plan(), run)
            }

            fn define(&self, $x: $input<'_, Q, K, O>, index: &Self::Index) -> Result<Reference> {
                define(self.config(), $qkv, index.plan())
            }

            fn price(&self, $x: $input<'_, Q, K, O>, index: &Self::Index) -> Result<Cost> {
                price(self.config(), &$qkv, index.plan())
            }
        }
    };
}
/// How long the sequences of a call over a cache are.
pub(crate) struct Spans {
    keys: Vec<usize>,
    offsets: Vec<usize>,
}

impl Spans {
    pub(crate) fn new(dims: &Dims, slots: &Slots<'_>) -> Self {
        let keys: Vec<usize> = (0..dims.batch).map(|i| slots.len(i)).collect();
        let mut offsets = vec![0];
        offsets.extend(keys.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        }));
        Self { keys, offsets }
    }

    /// As lengths of arrays.
    pub(crate) fn lengths<'a>(&'a self, slots: &Slots<'a>) -> Lengths<'a> {
        match slots.offsets {
            Some(queries) => Lengths::Packed { queries, keys: &self.offsets },
            None => Lengths::Keys(&self.keys),
        }
    }
}

/// Calls `run` with what is selected from, of a cache.
pub(crate) fn with_source<Q: Element, C: Cache + ?Sized, O: Element, R>(
    isa: Isa,
    x: Cached<'_, Q, C, O>,
    run: impl FnOnce(&Source<'_>) -> Result<R>,
) -> Result<R> {
    let x = x.reborrow();
    let spans = Spans::new(&x.dims()?, &x.slots());
    run(&Source::cached(isa, x.reborrow(), spans.lengths(&x.slots()), None)?)
}

/// The call of an engine on a plan, over a cache.
pub(crate) fn with_call_cached<M: Mask + Clone, Q: Element, C: Cache + ?Sized, O: Element, R>(
    config: &Config<M, Plain>,
    score: &dyn AnyScore,
    x: Cached<'_, Q, C, O>,
    keys: Keys<'_>,
    run: impl FnOnce(&Call<'_>) -> R,
) -> Result<R> {
    let dims = x.dims()?;
    let spans = Spans::new(&dims, &x.slots());
    keys.check(&dims, &spans.lengths(&x.slots()))?;
    let call = config.call_cached(x.reborrow(), Norm::Softmax { sinks: None })?;
    Ok(run(&Call { keys, score, ..call }))
}

/// Its definition.
pub(crate) fn define_cached<M: Mask + Clone, Q: Element, C: Cache + ?Sized, O: Element>(
    config: &Config<M, Plain>,
    x: Cached<'_, Q, C, O>,
    keys: Keys<'_>,
) -> Result<Reference> {
    let held = x.held(&x.dims()?);
    let lengths = held.lengths(&x);
    define(config, Qkv { q: x.q.reborrow(), k: held.k.view(), v: held.v.view(), lengths, out: x.out }, keys)
}

/// What it costs.
pub(crate) fn price_cached<M: Mask + Clone, Q: Element, C: Cache + ?Sized, O: Element>(
    config: &Config<M, Plain>,
    x: Cached<'_, Q, C, O>,
    keys: Keys<'_>,
) -> Result<Cost> {
    let dims = x.dims()?;
    let slots = x.slots();
    keys.check(&dims, &Spans::new(&dims, &slots).lengths(&slots))?;
    config.listed(keys).cost_cached(&x)
}

macro_rules! schemed_cached {
    ($input:ident, $x:ident => $cached:expr, $summaries:expr) => {
        impl<M: Schemed, Q: Element, C: Cache + ?Sized, O: Element> Selecting<$input<'_, Q, C, O>> for M {
            type Index = M::Index;

            fn select_bytes(&self, $x: $input<'_, Q, C, O>) -> Result<usize> {
                let x: Cached<'_, Q, C, O> = $cached.reborrow();
                let dims = x.dims()?;
                let spans = Spans::new(&dims, &x.slots());
                let source =
                    Source::cached(self.config().isa(), x.reborrow(), spans.lengths(&x.slots()), $summaries)?;
                workspace_bytes(&source, &self.scheme(&dims))
            }

            fn select_in(&self, $x: $input<'_, Q, C, O>, workspace: &mut Workspace) -> Result<Self::Index> {
                let x: Cached<'_, Q, C, O> = $cached.reborrow();
                let dims = x.dims()?;
                let spans = Spans::new(&dims, &x.slots());
                let source =
                    Source::cached(self.config().isa(), x.reborrow(), spans.lengths(&x.slots()), $summaries)?;
                M::Index::of(&select(&source, &self.scheme(&dims), workspace)?)
            }

            fn define_select(&self, $x: $input<'_, Q, C, O>) -> Result<(Self::Index, Margins)> {
                let x: Cached<'_, Q, C, O> = $cached.reborrow();
                let held = x.held(&x.dims()?);
                let lengths = held.lengths(&x);
                define_select(
                    self,
                    Qkv { q: x.q.reborrow(), k: held.k.view(), v: held.v.view(), lengths, out: x.out },
                )
            }

            fn price_select(&self, $x: $input<'_, Q, C, O>) -> Result<Cost> {
                let x: Cached<'_, Q, C, O> = $cached.reborrow();
                let dims = x.dims()?;
                let slots = x.slots();
                let spans = Spans::new(&dims, &slots);
                Ok(price_select(&self.scheme(&dims), &dims, &spans.lengths(&slots)))
            }

            fn with_call<R>(
                &self,
                $x: $input<'_, Q, C, O>,
                index: &Self::Index,
                run: impl FnOnce(&Call<'_>) -> R,
            ) -> Result<R> {
                with_call_cached(self.config(), &Plain, $cached.reborrow(), index.plan(), run)
            }

            fn define(&self, $x: $input<'_, Q, C, O>, index: &Self::Index) -> Result<Reference> {
                define_cached(self.config(), $cached.reborrow(), index.plan())
            }

            fn price(&self, $x: $input<'_, Q, C, O>, index: &Self::Index) -> Result<Cost> {
                price_cached(self.config(), $cached.reborrow(), index.plan())
            }
        }
    };
}
schemed_cached!(Cached, x => x, None);
schemed_cached!(SummarisedCache, x => x.cached, Some(x.summaries));

schemed!(Qkv, x => x, None);
schemed!(Summarised, x => x.qkv, Some(x.summaries));

/// What exact attention runs on: arrays or a cache.
pub(crate) trait Attended: Input {
    /// Calls `run` with its sizes and lengths.
    fn measured<R>(&self, run: impl FnOnce(&Dims, &Lengths<'_>) -> Result<R>) -> Result<R>;

    /// Calls `run` with what a branch of its own selects from.
    fn with_branch<I: Element, R>(
        &self,
        isa: Isa,
        branch: &IndexBranch<'_, I>,
        run: impl FnOnce(&Source<'_>) -> Result<R>,
    ) -> Result<R>;

    /// Whether keys lie in a cache, by sequence.
    const CACHE: bool;

    /// The number in a cache of sequence `index` of the call.
    fn slot(&self, index: usize) -> usize;

    /// The call of an engine on a plan.
    fn with_call<R>(
        self,
        config: &Config<Order, Plain>,
        keys: Keys<'_>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R>;

    /// Its definition.
    fn define(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Reference>;

    /// What it costs.
    fn price(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Cost>;
}

impl<Q: Element, K: Element, O: Element> Attended for Qkv<'_, Q, K, O> {
    const CACHE: bool = false;

    fn measured<R>(&self, run: impl FnOnce(&Dims, &Lengths<'_>) -> Result<R>) -> Result<R> {
        run(&self.dims()?, &self.lengths)
    }

    fn with_branch<I: Element, R>(
        &self,
        isa: Isa,
        branch: &IndexBranch<'_, I>,
        run: impl FnOnce(&Source<'_>) -> Result<R>,
    ) -> Result<R> {
        run(&Source::new(isa, self.reborrow(), None)?.branch(&branch.reborrow()))
    }

    fn slot(&self, index: usize) -> usize {
        index
    }

    fn with_call<R>(
        self,
        config: &Config<Order, Plain>,
        keys: Keys<'_>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        with_call(config, self, keys, run)
    }

    fn define(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Reference> {
        define(config, self, keys)
    }

    fn price(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Cost> {
        price(config, &self, keys)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Attended for Cached<'_, Q, C, O> {
    const CACHE: bool = true;

    fn measured<R>(&self, run: impl FnOnce(&Dims, &Lengths<'_>) -> Result<R>) -> Result<R> {
        let (dims, slots) = (self.dims()?, self.slots());
        run(&dims, &Spans::new(&dims, &slots).lengths(&slots))
    }

    fn with_branch<I: Element, R>(
        &self,
        isa: Isa,
        branch: &IndexBranch<'_, I>,
        run: impl FnOnce(&Source<'_>) -> Result<R>,
    ) -> Result<R> {
        let x = self.reborrow();
        let spans = Spans::new(&x.dims()?, &x.slots());
        let source = Source::cached(isa, x.reborrow(), spans.lengths(&x.slots()), None)?;
        run(&source.branch(&branch.reborrow()))
    }

    fn slot(&self, index: usize) -> usize {
        self.slots().slots.map_or(index, |slots| slots[index])
    }

    fn with_call<R>(
        self,
        config: &Config<Order, Plain>,
        keys: Keys<'_>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        with_call_cached(config, &Plain, self, keys, run)
    }

    fn define(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Reference> {
        self.check_alike()?;
        define_cached(config, self, keys)
    }

    fn price(self, config: &Config<Order, Plain>, keys: Keys<'_>) -> Result<Cost> {
        self.check_alike()?;
        price_cached(config, self, keys)
    }
}

/// A mechanism that selects by an index branch.
pub(crate) trait Branched: Sized {
    /// The kind of its plan.
    type Index: Written;

    fn config(&self) -> &Config<Order, Plain>;

    /// How it selects, among the heads of the branch.
    fn scheme(&self) -> Scheme;

    /// Which heads of the call share a list: as many lists as the heads of the
    /// branch have.
    fn per(&self) -> Per;

    /// Refuses sizes that do not fit: of the call, and heads of the branch.
    fn check(&self, _: &Dims, _: usize) -> Result<()> {
        Ok(())
    }

    /// The score of an index query, with its weight, with an index key as the
    /// paper has it.
    fn score(&self, query: ArrayView1<'_, f64>, weight: f64, key: ArrayView1<'_, f64>) -> f64;

    /// The lists of the call.
    fn layout(&self, dims: &Dims, lengths: &Lengths<'_>) -> Layout {
        Scheme { per: self.per(), ..self.scheme() }.layout(dims, lengths)
    }

    /// The sizes of a call that fits.
    fn dims<X: Attended, I: Element>(&self, x: &Indexed<'_, X, I>) -> Result<Dims> {
        let dims = x.dims()?;
        self.check(&dims, x.branch.q.dim().1)?;
        let slot = |i: usize| x.x.slot(i);
        let slots: Option<&dyn Fn(usize) -> usize> = if X::CACHE { Some(&slot) } else { None };
        x.x.measured(|dims, lengths| x.branch.check_keys(&self.scheme(), dims, lengths, slots))?;
        Ok(dims)
    }
}

impl<X: Attended, I: Element, M: Branched> Selecting<Indexed<'_, X, I>> for M {
    type Index = M::Index;

    fn select_bytes(&self, x: Indexed<'_, X, I>) -> Result<usize> {
        Branched::dims(self, &x)?;
        x.x.with_branch(self.config().isa(), &x.branch, |source| workspace_bytes(source, &self.scheme()))
    }

    fn select_in(&self, x: Indexed<'_, X, I>, workspace: &mut Workspace) -> Result<M::Index> {
        Branched::dims(self, &x)?;
        let isa = self.config().isa();
        let found = x.x.with_branch(isa, &x.branch, |source| select(source, &self.scheme(), workspace))?;
        let layout = x.x.measured(|dims, lengths| Ok(self.layout(dims, lengths)))?;
        M::Index::of(&found.relaid(layout))
    }

    fn define_select(&self, x: Indexed<'_, X, I>) -> Result<(M::Index, Margins)> {
        Branched::dims(self, &x)?;
        let scheme = self.scheme();
        x.x.measured(|dims, lengths| {
            let q = x.branch.q.mapv(Element::to_f64);
            let small = Dims { q_heads: q.dim().1, kv_heads: q.dim().1.min(1), ..*dims };
            let layout = scheme.layout(&small, lengths);
            layout.lists()?;
            // Rows of packed sequences lie one after the other.
            let starts: Vec<_> = (0..dims.batch).map(|i| lengths.sequence(dims, i)).collect();
            let score = |b: usize, h: usize, i: usize, keys: Range<usize>| {
                let of = |s: &&Sequence| s.batch == b && s.queries.contains(&i);
                let sequence = starts.iter().find(of).map_or(0, |s| s.index);
                let start = starts[sequence].keys.start;
                let (row, at) = if X::CACHE {
                    ((keys.start - start) / scheme.cell(), sequence)
                } else {
                    (start + (keys.start - start) / scheme.cell(), b)
                };
                let key = Array1::from(x.branch.row(at, x.x.slot(sequence), row));
                let weight = x.branch.weights.map_or(1.0, |weights| f64::from(weights[[b, h, i]]));
                self.score(q.slice(s![b, h, i, ..]), weight, key.view())
            };
            let (lists, margins) = definition::select::select(&scheme, &small, lengths, &layout, score);
            let found = Selected::of(&scheme, &small, lengths, &lists);
            Ok((M::Index::of(&found.relaid(self.layout(dims, lengths)))?, margins))
        })
    }

    /// Multiply-adds of index queries and what they see.
    fn price_select(&self, x: Indexed<'_, X, I>) -> Result<Cost> {
        Branched::dims(self, &x)?;
        let (scheme, (_, heads, _, dim)) = (self.scheme(), x.branch.q.dim());
        x.x.measured(|dims, lengths| {
            let mut pairs = 0;
            for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
                let (queries, keys) = (sequence.queries.len(), sequence.keys.len());
                let of = |i: usize| scheme.scores(scheme.seen(i, queries, keys)) as u64;
                pairs += (0..queries).map(of).sum::<u64>();
            }
            Ok(Cost { flops: 2 * pairs * (heads * dim) as u64, bytes: 0 })
        })
    }

    fn with_call<R>(
        &self,
        x: Indexed<'_, X, I>,
        index: &M::Index,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        Branched::dims(self, &x)?;
        x.x.with_call(self.config(), index.plan(), run)
    }

    fn define(&self, x: Indexed<'_, X, I>, index: &M::Index) -> Result<Reference> {
        Branched::dims(self, &x)?;
        x.x.define(self.config(), index.plan())
    }

    fn price(&self, x: Indexed<'_, X, I>, index: &M::Index) -> Result<Cost> {
        Branched::dims(self, &x)?;
        x.x.price(self.config(), index.plan())
    }
}

/// The dot product of a query with one key.
pub(crate) fn dot(query: ArrayView1<'_, f64>, keys: &ArrayView2<'_, f64>) -> f64 {
    keys.row(0).iter().zip(query).map(|(k, q)| k * q).sum()
}

/// The traits of a mechanism that is [`Selecting`] from inputs of a type.
macro_rules! selecting {
    ($mechanism:ty, $index:ty, summarised caches) => {
        $crate::stages::selecting::selecting!(
            @kernel [Q: crate::element::Element, C: crate::cache::Cache + ?Sized, O: crate::element::Element]
            crate::select::SummarisedCache<'_, Q, C, O>, $mechanism, $index
        );
    };
    ($mechanism:ty, $index:ty, branches) => {
        $crate::stages::selecting::selecting!(
            @kernel [
                Q: crate::element::Element, K: crate::element::Element, O: crate::element::Element,
                I: crate::element::Element
            ]
            crate::select::Indexed<'_, crate::input::Qkv<'_, Q, K, O>, I>, $mechanism, $index
        );
        $crate::stages::selecting::selecting!(
            @weights [
                Q: crate::element::Element, K: crate::element::Element, O: crate::element::Element,
                I: crate::element::Element
            ]
            crate::select::Indexed<'_, crate::input::Qkv<'_, Q, K, O>, I>, $mechanism
        );
        $crate::stages::selecting::selecting!(
            @kernel [
                Q: crate::element::Element, C: crate::cache::Cache + ?Sized, O: crate::element::Element,
                I: crate::element::Element
            ]
            crate::select::Indexed<'_, crate::cache::Cached<'_, Q, C, O>, I>, $mechanism, $index
        );
    };
    ($mechanism:ty, $index:ty, caches) => {
        $crate::stages::selecting::selecting!(
            @kernel [Q: crate::element::Element, C: crate::cache::Cache + ?Sized, O: crate::element::Element]
            crate::cache::Cached<'_, Q, C, O>, $mechanism, $index
        );
    };
    ($mechanism:ty, $index:ty, [$($element:ident),+] $input:ident) => {
        $crate::stages::selecting::selecting!(
            @kernel [$($element: crate::element::Element),+] $input<'_, $($element),+>, $mechanism, $index
        );
        $crate::stages::selecting::selecting!(
            @weights [$($element: crate::element::Element),+] $input<'_, $($element),+>, $mechanism
        );
    };
    (@kernel [$($generics:tt)*] $input:ty, $mechanism:ty, $index:ty) => {
        impl<$($generics)*>
            crate::attention::Attention<$input> for $mechanism
        {
            /// Selects first: scratch of the attention depends on what is
            /// selected.
            fn workspace_bytes(&self, x: $input) -> crate::error::Result<usize> {
                use crate::attention::Selects;
                use crate::stages::selecting::Selecting;
                let index = self.select(x)?;
                Ok(self.select_bytes(x)?.max(self.workspace_bytes_on(x, &index)?))
            }

            fn forward_into(
                &self,
                x: $input,
                out: ndarray::ArrayViewMut4<
                    '_,
                    <$input as crate::attention::Input>::Out,
                >,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::selecting::select_and_attend(self, x, out, None, workspace)
            }

            fn reference(&self, x: $input) -> crate::error::Result<ndarray::Array4<f64>> {
                use crate::attention::Selects;
                let (index, _) = self.reference_select(x)?;
                self.reference_on(x, &index)
            }

            fn cost(
                &self,
                x: $input,
            ) -> crate::error::Result<crate::attention::Cost> {
                use crate::attention::Selects;
                use crate::stages::attend::Attending;
                let index = &self.select(x)?;
                crate::stages::selecting::On { mechanism: self, index }.price(x)
            }
        }

        impl<$($generics)*>
            crate::attention::Selects<$input> for $mechanism
        {
            type Index = $index;

            fn select(&self, x: $input) -> crate::error::Result<$index> {
                use crate::stages::selecting::Selecting;
                self.select_in(x, &mut crate::engine::workspace::Workspace::new())
            }

            fn workspace_bytes_on(
                &self,
                x: $input,
                index: &$index,
            ) -> crate::error::Result<usize> {
                use crate::stages::selecting::Selecting;
                self.with_call(x, index, crate::engine::workspace_bytes)
            }

            fn forward_on_into(
                &self,
                x: $input,
                index: &$index,
                out: ndarray::ArrayViewMut4<
                    '_,
                    <$input as crate::attention::Input>::Out,
                >,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                let on = crate::stages::selecting::On { mechanism: self, index };
                crate::stages::attend::forward_into(&on, x, out, None, workspace)
            }

            fn reference_select(
                &self,
                x: $input,
            ) -> crate::error::Result<($index, crate::attention::Margins)> {
                use crate::stages::selecting::Selecting;
                self.define_select(x)
            }

            fn reference_on(
                &self,
                x: $input,
                index: &$index,
            ) -> crate::error::Result<ndarray::Array4<f64>> {
                use crate::stages::selecting::Selecting;
                Ok(self.define(x, index)?.out)
            }

            fn bound_on(
                &self,
                x: $input,
                index: &$index,
            ) -> crate::error::Result<ndarray::Array3<f64>> {
                use crate::stages::selecting::Selecting;
                Ok(self.define(x, index)?.bound)
            }

            fn difference(a: &$index, b: &$index, margins: &crate::attention::Margins) -> Option<String> {
                crate::stages::selecting::difference(a, b, margins)
            }
        }

        impl<$($generics)*>
            crate::attention::Mergeable<$input> for $mechanism
        {
            fn forward_with_lse_into(
                &self,
                x: $input,
                out: ndarray::ArrayViewMut4<
                    '_,
                    <$input as crate::attention::Input>::Out,
                >,
                lse: ndarray::ArrayViewMut3<'_, f32>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::selecting::select_and_attend(self, x, out, Some(lse), workspace)
            }
        }
    };
    (@weights [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        impl<$($generics)*>
            crate::attention::Weights<$input> for $mechanism
        {
            fn scores(&self, x: $input) -> crate::error::Result<ndarray::Array4<f32>> {
                use crate::attention::Selects;
                use crate::stages::selecting::Selecting;
                self.with_call(x, &self.select(x)?, crate::engine::weights::scores)?
            }

            fn weights(&self, x: $input) -> crate::error::Result<ndarray::Array4<f32>> {
                use crate::attention::Selects;
                use crate::stages::selecting::Selecting;
                self.with_call(x, &self.select(x)?, crate::engine::weights::materialize)?
            }

            fn key_weights(
                &self,
                x: $input,
            ) -> crate::error::Result<ndarray::Array3<f32>> {
                use crate::attention::Selects;
                use crate::stages::selecting::Selecting;
                self.with_call(x, &self.select(x)?, crate::engine::weights::sum_over_queries)?
            }

            fn top_weights(
                &self,
                x: $input,
                count: usize,
            ) -> crate::error::Result<crate::attention::TopWeights> {
                use crate::attention::Selects;
                use crate::stages::selecting::Selecting;
                self.with_call(x, &self.select(x)?, |call| crate::engine::weights::top(call, count))?
            }

            fn reference_scores(
                &self,
                x: $input,
            ) -> crate::error::Result<ndarray::Array4<f64>> {
                use crate::attention::Selects;
                use crate::stages::selecting::Selecting;
                let (index, _) = self.reference_select(x)?;
                Ok(self.define(x, &index)?.scores)
            }

            fn reference_weights(
                &self,
                x: $input,
            ) -> crate::error::Result<ndarray::Array4<f64>> {
                use crate::attention::Selects;
                use crate::stages::selecting::Selecting;
                let (index, _) = self.reference_select(x)?;
                Ok(self.define(x, &index)?.weights)
            }
        }
    };
}
pub(crate) use selecting;

/// The builder methods that every sparse mechanism has; one that is always causal has no
/// method for that.
macro_rules! sparse_options {
    ($builder:ident) => {
        impl $builder {
            /// A query sees no key after its position, where the last query
            /// sits at the last key. Default: every key may be selected.
            pub fn causal(mut self) -> Self {
                self.options.mask.causal = true;
                self
            }
        }
        crate::stages::selecting::sparse_options!($builder, always causal);
    };
    ($builder:ident, always causal) => {
        impl $builder {
            /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
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
        }
    };
}
pub(crate) use sparse_options;
