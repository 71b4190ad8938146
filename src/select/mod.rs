//! Which keys each query sees: scored, reduced, picked, written down as a plan.
//!
//! A [`Scheme`] says how: keys come in candidates of [`unit`](Scheme::unit)
//! neighbours, for each of which a [`Summary`] stands; queries are multiplied
//! with the summaries; the scores of queries and heads that share a list are
//! [reduced](Reduce) to one row; of that row a [`Pick`] chooses. Lists become
//! [plans](crate::keys) that the engines read. What is [`Scored`] may be finer
//! than candidates, and may be rows of its own: the keys of an [`IndexBranch`].
//!
//! Scores are exact `f32` products on the register tile of the engines (for few
//! queries, of the candidates where they lie). Work is shared out by sequence,
//! key/value head and tile of queries, and the lists are the same on any number
//! of threads.

use std::ops::Range;
use std::sync::Mutex;

use ndarray::{ArrayView4, Axis};

use crate::cache::{Cache, Cached};
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Sequence};
use crate::keys::source::{At, Kv, Slots};
use crate::keys::{ATOM, BlockLists, Layout, Per, TokenLists};
use crate::simd::Isa;
use crate::simd::any::{AnyArray, AnyRows, IntoAny};
use crate::simd::dots::Vnni;
use crate::simd::mem::{Arena, Heads, Parts, Rows, bytes_for, bytes_for_shares, claim_words};

pub(crate) mod activation;
pub(crate) mod cluster;
mod coded;
pub(crate) mod cover;
pub(crate) mod descent;
pub(crate) mod estimate;
pub(crate) mod finding;
mod fused;
pub(crate) mod gate;
pub(crate) mod graph;
pub(crate) mod hash;
mod heads;
pub(crate) mod indexed;
mod keep;
pub(crate) mod lists;
pub(crate) mod pick;
pub(crate) mod pooling;
pub(crate) mod prefix;
pub(crate) mod probe;
pub(crate) mod quantise;
pub(crate) mod reduce;
pub(crate) mod regions;
pub(crate) mod reuse;
pub(crate) mod score;
pub(crate) mod scored;
pub(crate) mod search;
pub(crate) mod stream;
pub(crate) mod summaries;
pub(crate) mod summary;

pub use activation::{activation_probe, density_budgets};
pub use cluster::{Clusters, KMeans, Seeding};
pub use descent::Representative;
pub use heads::{RetrievalScores, heterogeneous_heads, key_importance, needle_span, sink_share};
pub use indexed::{IndexBranch, Indexed};
pub use keep::{HeavyHitters, Smoothing, SnapKv};
pub use pick::{Forced, Pick, Rule};
pub use pooling::{Pooled, Pooling};
pub use prefix::Prefix;
pub use reduce::Reduce;
pub use reuse::Reused;
pub(crate) use reuse::{Policy, Reuse, Tail};
pub use scored::{Fold, Pools, Scored};
pub use search::{Neighbours, Search};
pub use stream::Ties;
pub(crate) use summaries::kept_summaries;
pub use summaries::{Summaries, Summarised, SummarisedCache};
pub use summary::Summary;

use finding::collect;
use lists::join;
use pick::Room;
use reduce::{Combine, Shares};
use score::{Candidates, FEW, ROWS, Scores};

/// How keys are selected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scheme {
    /// Keys of a candidate, from the start of the sequence on; the last one may
    /// be shorter. At least 1.
    pub unit: usize,
    /// What stands for a candidate.
    pub summary: Summary,
    /// Which heads share a list.
    pub per: Per,
    /// Neighbouring queries that share a list. At least 1.
    pub q_block: usize,
    /// Whether scores become shares of each query's own softmax over
    /// candidates before they are reduced, and with which scale.
    pub shares: Option<f32>,
    /// How the scores of rows that share a list become one.
    pub reduce: Reduce,
    /// What is chosen.
    pub pick: Pick,
    /// Whether a query sees no candidate that starts after its position, where
    /// the last query sits at the last key. The last candidate that it sees may
    /// reach further: it should be forced, so that nothing depends on later
    /// keys.
    pub causal: bool,
    /// What is scored: by default candidates themselves.
    pub scored: Scored,
}

impl Scheme {
    /// For each head and query the `k` rows with the largest products, each a candidate
    /// that stands for itself, wherever it lies.
    pub(crate) fn top_rows(k: usize) -> Self {
        Self {
            unit: 1,
            summary: Summary::First,
            per: Per::Head,
            q_block: 1,
            shares: None,
            reduce: Reduce::Max,
            pick: Pick { rule: Rule::TopK(k), forced: Forced::default() },
            causal: false,
            scored: Scored::Begun,
        }
    }

    /// Among which of so many candidates a row's shares are.
    pub(crate) fn sharing(&self, candidates: usize) -> Range<usize> {
        if self.reduce == Reduce::Votes { self.pick.forced.between(candidates) } else { 0..candidates }
    }

    /// The lists for inputs of these sizes.
    pub(crate) fn layout(&self, dims: &Dims, lengths: &Lengths<'_>) -> Layout {
        Layout::of(self.per, self.q_block, dims, lengths)
    }
}

/// What is selected from.
pub(crate) struct Source<'a> {
    pub(crate) isa: Isa,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    pub(crate) q: AnyArray<'a>,
    pub(crate) kv: Kv<'a>,
    /// The sequences of a cache, which say more than `lengths`.
    slots: Option<Slots<'a>>,
    /// Summaries of all keys, if they are kept.
    pub(crate) summaries: Option<&'a Summaries>,
    /// Rows that are scored in place of summaries, of one head.
    given: Option<Kv<'a>>,
    /// Factors of rectified scores, `[batch, q_heads, q_len]`.
    weights: Option<AnyArray<'a>>,
}

impl<'a> Source<'a> {
    pub(crate) fn new<Q: Element, K: Element, O>(
        isa: Isa,
        x: Qkv<'a, Q, K, O>,
        summaries: Option<&'a Summaries>,
    ) -> Result<Self> {
        let any = |view| K::any(Heads::new(view));
        let (q, kv) = (Q::any(Heads::new(x.q)), Kv::Arrays { k: any(x.k), v: any(x.v) });
        let (dims, lengths) = (x.dims()?, x.lengths);
        Ok(Self { isa, dims, lengths, q, kv, slots: None, summaries, given: None, weights: None })
    }

    /// From a cache; `lengths` are those of its sequences.
    pub(crate) fn cached<Q: Element, C: Cache + ?Sized, O>(
        isa: Isa,
        x: Cached<'a, Q, C, O>,
        lengths: Lengths<'a>,
        summaries: Option<&'a Summaries>,
    ) -> Result<Self> {
        let (dims, slots) = (x.dims()?, Some(x.slots()));
        x.check_alike()?;
        let (q, kv) = (Q::any(Heads::new(x.q)), Kv::Cache(x.cache.source()));
        Ok(Self { isa, dims, lengths, q, kv, slots, summaries, given: None, weights: None })
    }

    /// From queries and keys of any type and place, whose sizes have been checked.
    pub(crate) fn any(
        isa: Isa,
        dims: Dims,
        (q, kv): (AnyArray<'a>, Kv<'a>),
        (lengths, slots): (Lengths<'a>, Option<Slots<'a>>),
    ) -> Self {
        Self { isa, dims, lengths, q, kv, slots, summaries: None, given: None, weights: None }
    }

    /// From queries each head of which has rows of its own that are scored,
    /// `[sequences, q_heads, candidates, head_dim]`. Of keys their number matters alone.
    pub(crate) fn each_head(
        isa: Isa,
        dims: &Dims,
        (q, rows): (AnyArray<'a>, ArrayView4<'a, f32>),
        places: (Lengths<'a>, Option<Slots<'a>>),
    ) -> Self {
        let rows = f32::any(Heads::new(rows));
        let kv = Kv::Arrays { k: rows, v: rows.without_columns() };
        Self::any(isa, Dims { kv_heads: dims.q_heads, ..*dims }, (q, kv), places).over(rows)
    }

    /// The same with other rows that are scored.
    pub(crate) fn given(self, given: Kv<'a>) -> Self {
        Self { given: Some(given.without_values()), ..self }
    }

    /// The same with pools of keys, `[batch, kv_heads, pools, head_dim]`.
    pub(crate) fn over(self, pools: AnyArray<'a>) -> Self {
        Self { given: Some(Kv::Arrays { k: pools, v: pools.without_columns() }), ..self }
    }

    /// The same sequences, with the queries and the rows of a branch of their
    /// own, whose sizes have been checked.
    pub(crate) fn branch<I: Element>(self, branch: &IndexBranch<'a, I>) -> Self {
        let q = I::any(Heads::new(branch.q));
        let (_, q_heads, _, head_dim) = q.dim();
        let dims = Dims { q_heads, kv_heads: q_heads.min(1), head_dim, ..self.dims };
        let weights = branch.weights.map(|weights| f32::any(Heads::new(weights.insert_axis(Axis(3)))));
        Self { dims, q, given: Some(branch.source()), weights, ..self }
    }

    /// The first `n` keys of a head.
    pub(crate) fn candidates<'r>(&'r self, of: &'r Sequence, kv_head: usize, n: usize) -> Candidates<'r> {
        self.candidates_in(of, kv_head, 0..n)
    }

    /// Some keys of a head.
    pub(crate) fn candidates_in<'r>(
        &'r self,
        sequence: &'r Sequence,
        kv_head: usize,
        keys: Range<usize>,
    ) -> Candidates<'r> {
        match self.kv.arrays() {
            Some([k, _]) => {
                let keys = sequence.keys.start + keys.start..sequence.keys.start + keys.end;
                Candidates::Rows(k.rows(sequence.batch, kv_head, &keys))
            }
            None => Candidates::Cache(&self.kv, At { sequence, kv_head, keys }),
        }
    }

    /// The queries of a head.
    pub(crate) fn queries(&self, sequence: &Sequence, head: usize) -> AnyRows<'a> {
        self.q.rows(sequence.batch, head, &sequence.queries)
    }

    /// The keys of a head that lie in arrays; none of a cache.
    pub(crate) fn rows_of_keys(&self, sequence: &Sequence, kv_head: usize) -> AnyRows<'a> {
        match self.kv.arrays() {
            Some([k, _]) => k.rows(sequence.batch, kv_head, &sequence.keys),
            None => rows_of(&[], 0, 0),
        }
    }

    /// Query heads that share a key/value head.
    pub(crate) fn group(&self) -> usize {
        self.dims.q_heads / self.dims.kv_heads.max(1)
    }

    /// The lists for this.
    pub(crate) fn layout_per(&self, per: Per, q_block: usize) -> Layout {
        Layout::of(per, q_block, &self.dims, &self.lengths)
    }

    pub(crate) fn sequence(&self, index: usize) -> Sequence {
        match &self.slots {
            Some(slots) => slots.sequence(&self.dims, index),
            None => self.lengths.sequence(&self.dims, index),
        }
    }
}

/// Lists of candidates, in the order of a [`Layout`].
#[derive(Debug)]
pub(crate) struct Selected {
    pub(crate) layout: Layout,
    pub(crate) offsets: Vec<usize>,
    pub(crate) candidates: Vec<u32>,
    unit: usize,
    /// Keys of each sequence.
    keys: Vec<usize>,
}

impl Selected {
    /// Lists of candidates of `unit` keys, of sequences of so many keys.
    pub(crate) fn new(
        layout: Layout,
        (offsets, candidates): (Vec<usize>, Vec<u32>),
        unit: usize,
        keys: Vec<usize>,
    ) -> Self {
        Self { layout, offsets, candidates, unit, keys }
    }

    /// The same lists for other heads, of which as many share one.
    pub(crate) fn relaid(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }

    /// Lists of candidates by a definition.
    pub(crate) fn of(scheme: &Scheme, dims: &Dims, lengths: &Lengths<'_>, lists: &[Vec<usize>]) -> Self {
        let mut offsets = vec![0];
        offsets.extend(lists.iter().scan(0, |end, list| {
            *end += list.len();
            Some(*end)
        }));
        let candidates = lists.iter().flatten().map(|&c| c as u32).collect();
        let keys = (0..dims.batch).map(|i| lengths.sequence(dims, i).keys.len()).collect();
        Self { layout: scheme.layout(dims, lengths), offsets, candidates, unit: scheme.unit, keys }
    }

    /// The atoms of the lists, where candidates are whole ones.
    pub(crate) fn blocks(&self) -> Result<BlockLists> {
        let lists = self.layout.heads() * self.layout.blocks();
        let each = self.unit / ATOM;
        let (mut offsets, mut atoms) = (vec![0], Vec::new());
        for (list, range) in self.offsets.windows(2).enumerate() {
            let end = self.keys[list / lists].div_ceil(ATOM);
            for &c in &self.candidates[range[0]..range[1]] {
                let first = c as usize * each;
                atoms.extend((first..(first + each).min(end)).map(|atom| atom as u32));
            }
            offsets.push(atoms.len());
        }
        BlockLists::new(self.layout, offsets, atoms)
    }

    /// The keys of the lists.
    pub(crate) fn tokens(&self) -> Result<TokenLists> {
        /// Lists of a task.
        const TASK: usize = 128;
        let lists = self.layout.heads() * self.layout.blocks();
        let (n, start) = (self.offsets.len() - 1, |_| Vec::new());
        let tasks = n.div_ceil(TASK);
        let (offsets, runs) = collect(parallel::threads(), tasks, start, |runs, task, found| {
            for list in task * TASK..((task + 1) * TASK).min(n) {
                let keys = self.keys[list / lists];
                for &c in &self.candidates[self.offsets[list]..self.offsets[list + 1]] {
                    let start = c as usize * self.unit;
                    join(runs, start..start + self.unit.min(keys - start));
                }
                found.extend(runs.drain(..));
                found.end();
            }
        })?;
        TokenLists::new(self.layout, offsets, runs)
    }
}

/// Sizes that follow from scheme and source.
struct Plan {
    layout: Layout,
    /// Elements of a summary.
    width: usize,
    /// The same, filled up to whole vectors.
    apart: usize,
    /// Scores of a row, rounded up.
    stride: usize,
    /// Candidates, likewise.
    candidates: usize,
    /// Queries of a task.
    tile: usize,
    /// Rows that are scored at once.
    rows: usize,
    /// What multiplies codes.
    dots: Option<Vnni>,
    /// Whether rows are reduced while they are near.
    fused: bool,
    /// Lists of a tile then.
    lists: usize,
    /// Stretches of keys that are scored by tasks of their own, and candidates
    /// of each: none where there are enough tasks without.
    stretches: usize,
    stretch: usize,
    workers: usize,
    /// Bytes of a worker.
    share: usize,
}

/// What one thread works in.
struct Scratch<'a> {
    query: &'a mut [f32],
    queries: &'a mut [f32],
    room: &'a mut [f32],
    scores: &'a mut [f32],
    reduced: &'a mut [f32],
    folded: &'a mut [f32],
    weights: &'a mut [f32],
    bits: &'a mut [u64],
    pick: Room<'a>,
}

impl Plan {
    fn new(source: &Source<'_>, scheme: &Scheme) -> Result<Self> {
        let layout = scheme.layout(&source.dims, &source.lengths);
        layout.lists()?;
        let width = scheme.summary.width(source.dims.head_dim);
        let apart = width.checked_next_multiple_of(source.isa.lanes()).unwrap_or(usize::MAX);
        let candidates = layout.keys.div_ceil(scheme.unit).next_multiple_of(64).max(64);
        let group = source.dims.q_heads / source.dims.kv_heads.max(1);
        let heads = if scheme.per == Per::Head { 1 } else { group };
        let fused = scheme.is_fused(&layout, heads);
        // Scores stay in the second-level cache where they can.
        const HELD: usize = 1 << 18;
        let dots = if fused { scheme.dots(source.isa, width) } else { None };
        let (stride, rows) = if fused {
            let most = (fused::HELD / candidates * group).clamp(fused::least(dots), fused::ROWS);
            (fused::BLOCK, group.max(most / group.max(1) * group).max(1))
        } else {
            let stride = scheme.rows(layout.keys, source.given.is_some()).next_multiple_of(64).max(64);
            (stride, (HELD / stride).clamp(FEW, ROWS))
        };
        let tile = match scheme.per {
            Per::Sequence if !fused => scheme.q_block,
            _ => (rows / group.max(1)).max(1).next_multiple_of(scheme.q_block),
        };
        let workers = parallel::threads();
        let mut plan = Self {
            layout,
            width,
            apart,
            stride,
            candidates,
            tile,
            rows,
            dots,
            fused,
            lists: if fused { tile * (group / heads.max(1)).max(1) } else { 1 },
            stretches: 1,
            stretch: candidates,
            workers,
            share: 0,
        };
        // What does not fit into memory must not wrap.
        let widest = (stride as u128 + candidates as u128 + 64 * apart as u128) * (rows as u128 + 8) * 8;
        if widest > isize::MAX as u128 {
            let expected = "head_dim and kv_len whose scores can be held in memory";
            return Err(Error::value("k", expected, format_args!("{width} x {candidates}")));
        }
        let tasks = plan.tasks(&source.dims, scheme);
        if fused && tasks < 2 * workers && workers > 1 {
            // Stretches end with candidates, and cost something to begin.
            let least = (4096 / (scheme.unit / scheme.cell())).max(1);
            let wanted = candidates.div_ceil((4 * workers).div_ceil(tasks.max(1)));
            plan.stretch = wanted.max(least).next_multiple_of(64);
            plan.stretches = candidates.div_ceil(plan.stretch).max(1);
        }
        plan.share = plan.sizes().iter().map(|&n| bytes_for::<f32>(n)).sum::<usize>()
            + bytes_for::<u64>(candidates / 64)
            + Room::bytes(candidates);
        Ok(plan)
    }

    /// Tiles of queries of all heads.
    fn tasks(&self, dims: &Dims, scheme: &Scheme) -> usize {
        dims.batch * self.heads(scheme) * self.layout.queries.div_ceil(self.tile)
    }

    /// Elements from the scores of a list to those of the next one, where they are
    /// fused: rows that are a power of two apart would share few lines of a cache.
    fn row(&self) -> usize {
        self.candidates + 80
    }

    /// Key/value heads that are tasks of their own.
    fn heads(&self, scheme: &Scheme) -> usize {
        let kv_heads = self.layout.kv_heads;
        let heads = if scheme.per == Per::Sequence { kv_heads.min(1) } else { kv_heads };
        heads.min(self.layout.heads())
    }

    fn sizes(&self) -> [usize; 7] {
        let folded = self.lists * if self.fused { self.row() } else { self.stride.max(self.candidates) };
        [
            self.width,
            self.rows * self.apart,
            score::room(self.width),
            (self.rows + 1) * self.stride,
            if self.fused { 0 } else { self.stride },
            folded,
            self.rows,
        ]
    }

    fn scratch<'a>(&self, arena: &mut Arena<'a>) -> Scratch<'a> {
        let [query, queries, room, scores, reduced, folded, weights] = self.sizes();
        Scratch {
            query: arena.take(query),
            queries: arena.take(queries),
            room: arena.take(room),
            scores: arena.take(scores),
            reduced: arena.take(reduced),
            folded: arena.take(folded),
            weights: arena.take(weights),
            bits: arena.take(self.candidates / 64),
            pick: Room::take(arena, self.candidates),
        }
    }

    /// Candidates of all lists that are scored before any is picked.
    fn held(&self, tasks: usize) -> usize {
        if self.stretches > 1 { tasks * self.lists * self.stretches * self.stretch } else { 0 }
    }

    fn bytes(&self, tasks: usize) -> usize {
        let held = self.held(tasks);
        bytes_for_shares(self.workers, self.share)
            + bytes_for::<f32>(held)
            + bytes_for::<u64>(claim_words(held / self.stretch))
    }
}

/// Bytes of scratch that [`select`] works in, summaries that are not kept
/// included.
pub(crate) fn workspace_bytes(source: &Source<'_>, scheme: &Scheme) -> Result<usize> {
    let plan = Plan::new(source, scheme)?;
    Ok(plan.bytes(plan.tasks(&source.dims, scheme)) + summaries::workspace_bytes(source, scheme))
}

/// Selects.
pub(crate) fn select(source: &Source<'_>, scheme: &Scheme, workspace: &mut Workspace) -> Result<Selected> {
    let plan = Plan::new(source, scheme)?;
    if let Some(kept) = source.summaries {
        kept.check(scheme, &source.dims, &source.lengths)?;
    }
    let bytes = workspace_bytes(source, scheme)?;
    let mut arena = workspace.arena(bytes)?;
    let made = summaries::make(source, scheme, &mut arena);
    let layout = plan.layout;
    let heads = plan.heads(scheme);
    let tiles = layout.queries.div_ceil(plan.tile);
    // There are no more tasks than lists, and these can be counted.
    let tasks = plan.tasks(&source.dims, scheme);
    let held = arena.take::<f32>(plan.held(tasks));
    let claims = arena.take::<u64>(claim_words(held.len() / plan.stretch));
    let mut found = Vec::<Mutex<Found>>::new();
    reserve(&mut found, tasks)?;
    found.resize_with(tasks, Mutex::default);
    let per_sequence = scheme.per == Per::Sequence;
    let of_task = |i: usize| {
        let (index, head, tile) = (i / tiles / heads, i / tiles % heads, i % tiles);
        let kv_heads = if per_sequence { 0..layout.kv_heads } else { head..head + 1 };
        (source.sequence(index), kv_heads, tile * plan.tile..(tile + 1) * plan.tile)
    };
    let stretches = plan.stretches;
    if stretches > 1 {
        let parts = Parts::new(held, plan.stretch, claims);
        let shares = arena.reborrow().shares(plan.workers, plan.share);
        let start = |worker: usize| plan.scratch(&mut shares.take(worker));
        parallel::for_each(plan.workers, tasks * stretches, start, |scratch, piece| {
            let (i, stretch) = (piece / stretches, piece % stretches);
            let (sequence, kv_heads, queries) = of_task(i);
            let found = Found::default();
            let mut task = Task { source, scheme, plan: &plan, made: &made, sequence, scratch, found };
            let lists = task.gather(kv_heads, queries);
            let candidates = stretch * plan.stretch..(stretch + 1) * plan.stretch;
            task.score(&lists, candidates);
            for list in 0..lists.len() {
                let piece = parts.take((i * plan.lists + list) * stretches + stretch);
                piece.copy_from_slice(&task.scratch.folded[list * plan.row()..][..plan.stretch]);
            }
        });
    }
    let held = &*held;
    let shares = arena.shares(plan.workers, plan.share);
    let start = |worker: usize| plan.scratch(&mut shares.take(worker));
    parallel::for_each(plan.workers, tasks, start, |scratch, i| {
        let (sequence, kv_heads, queries) = of_task(i);
        let found_here = Found::default();
        let mut task =
            Task { source, scheme, plan: &plan, made: &made, sequence, scratch, found: found_here };
        if stretches > 1 {
            let lists = task.gather(kv_heads, queries);
            let width = stretches * plan.stretch;
            task.choose_each(&lists, Some((&held[i * plan.lists * width..], width)));
        } else if plan.fused {
            let lists = task.gather(kv_heads, queries);
            task.score(&lists, 0..plan.candidates);
            task.choose_each(&lists, None);
        } else {
            task.run(kv_heads, queries);
        }
        if let Ok(mut found) = found[i].lock() {
            *found = task.found;
        }
    });

    // Tasks in the order of lists: all tiles of a list's heads, then the next.
    let found: Vec<Found> = found.into_iter().filter_map(|x| x.into_inner().ok()).collect();
    let blocks = plan.tile / scheme.q_block;
    let list_heads = layout.heads().checked_div(heads).unwrap_or(0);
    let (mut offsets, mut candidates) = (Vec::new(), Vec::new());
    reserve(&mut offsets, layout.lists()? + 1)?;
    reserve(&mut candidates, found.iter().map(|found| found.candidates.len()).sum())?;
    offsets.push(0);
    for of_head in found.chunks(tiles.max(1)) {
        for list_head in 0..list_heads {
            for (tile, found) in of_head.iter().enumerate() {
                let wanted = blocks.min(layout.blocks() - tile * blocks);
                for block in 0..wanted {
                    candidates.extend_from_slice(found.list(list_head * blocks + block));
                    offsets.push(candidates.len());
                }
            }
        }
    }
    let keys = (0..source.dims.batch).map(|i| source.sequence(i).keys.len()).collect();
    Ok(Selected { layout, offsets, candidates, unit: scheme.unit, keys })
}

/// Makes room for so many elements, if there is memory for it.
pub(crate) fn reserve<T>(to: &mut Vec<T>, n: usize) -> Result<()> {
    let refusal = |_| Error::too_large("index", format_args!("{n} entries"));
    to.try_reserve_exact(n).map_err(refusal)
}

/// What a task has found: lists by head and block.
#[derive(Default)]
struct Found {
    ends: Vec<usize>,
    candidates: Vec<u32>,
}

impl Found {
    fn list(&self, i: usize) -> &[u32] {
        // A group of no heads has had no list made.
        let Some(&end) = self.ends.get(i) else { return &[] };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.candidates[start..end]
    }
}

/// A row that waits to be scored.
#[derive(Clone, Copy, Default)]
struct Row {
    /// Keys that it sees.
    seen: usize,
    /// Whether it is the first and the last of its list.
    first: bool,
    last: bool,
    /// Rows of its list.
    of_list: usize,
}

/// A tile of queries of the heads of some key/value heads.
struct Task<'a, 'b> {
    source: &'a Source<'a>,
    scheme: &'a Scheme,
    plan: &'a Plan,
    made: &'a summaries::Made<'a>,
    sequence: Sequence,
    scratch: &'a mut Scratch<'b>,
    found: Found,
}

impl Task<'_, '_> {
    /// Lists by head, as the layout shares them, and by block of queries.
    fn run(&mut self, kv_heads: Range<usize>, queries: Range<usize>) {
        let layout = self.plan.layout;
        let group = layout.q_heads / layout.kv_heads.max(1);
        let heads = kv_heads.start * group..kv_heads.end * group;
        let shared = match layout.per {
            Per::Head => 1,
            Per::Group | Per::Sequence => heads.len(),
        };
        let (rows, keys) = (self.sequence.queries.len(), self.sequence.keys.len());
        let few = group * rows <= FEW;
        let mut waiting = [Row::default(); ROWS];
        let (mut held, mut held_head, mut filled) = (0, 0, 0);
        for list in heads.step_by(shared.max(1)) {
            for block in queries.clone().step_by(layout.q_block) {
                let of_list = block.min(rows)..(block + layout.q_block).min(rows);
                if of_list.is_empty() {
                    self.flush(held_head, &waiting[..held], few, &mut filled);
                    held = 0;
                    self.found.ends.push(self.found.candidates.len());
                    continue;
                }
                for head in list..list + shared {
                    if held > 0 && held_head != head / group {
                        self.flush(held_head, &waiting[..held], few, &mut filled);
                        held = 0;
                    }
                    held_head = head / group;
                    // Votes are those of the mean query, at the place of the last.
                    let votes = self.scheme.reduce == Reduce::Votes;
                    let scored = if votes { of_list.end - 1..of_list.end } else { of_list.clone() };
                    for row in scored.clone() {
                        self.load(head, if votes { of_list.clone() } else { row..row + 1 }, held);
                        waiting[held] = Row {
                            seen: self.scheme.seen(row, rows, keys),
                            first: head == list && row == scored.start,
                            last: head + 1 == list + shared && row + 1 == of_list.end,
                            of_list: shared * of_list.len(),
                        };
                        held += 1;
                        if held == self.plan.rows {
                            self.flush(held_head, &waiting[..held], few, &mut filled);
                            held = 0;
                        }
                    }
                }
            }
        }
        self.flush(held_head, &waiting[..held], few, &mut filled);
    }

    /// Takes a query, or the mean of several, into the rows to be scored.
    fn load(&mut self, head: usize, rows: Range<usize>, at: usize) {
        let (source, scratch) = (self.source, &mut *self.scratch);
        let d = source.dims.head_dim;
        let first = self.sequence.queries.start;
        let from = source.q.rows(self.sequence.batch, head, &(first + rows.start..first + rows.end));
        let query = &mut scratch.query[..d];
        source.isa.dispatch(MeanRow { from, room: &mut scratch.room[..d], to: query });
        let apart = self.plan.apart;
        let to = &mut scratch.queries[at * apart..][..apart];
        to[self.plan.width..].fill(0.0);
        self.scheme.summary.query(query, &mut to[..self.plan.width]);
        if self.scheme.is_coded() && self.plan.dots.is_none() {
            coded::round(source.isa, &mut to[..self.plan.width], scratch.room);
        }
    }

    /// Scores the rows that wait, and picks where a list is complete. `filled`
    /// candidates of the list under way have been seen.
    fn flush(&mut self, kv_head: usize, rows: &[Row], few: bool, filled: &mut usize) {
        let given = self.source.given.is_some();
        let most = rows.iter().map(|row| self.scheme.rows(row.seen, given)).max().unwrap_or(0);
        if rows.is_empty() {
            return;
        }
        let (isa, stride, scratch) = (self.source.isa, self.plan.stride, &mut *self.scratch);
        if most > 0 {
            isa.dispatch(Scores {
                queries: scratch.queries,
                rows: rows.len(),
                width: self.plan.width,
                candidates: self.made.rows(self.source, &self.sequence, kv_head, 0..most),
                few,
                room: scratch.room,
                out: scratch.scores,
                stride,
            });
        }
        for (i, row) in rows.iter().enumerate() {
            let n = self.scheme.scores(row.seen);
            let scores = &mut scratch.scores[i * stride..][..self.scheme.rows(row.seen, given)];
            let coarse = match self.scheme.scored {
                Scored::Pools(pools) => {
                    pools.of_cells(isa, (scores, n), given, self.scheme.shares, scratch.folded);
                    pools.coarse.is_some()
                }
                _ => false,
            };
            let scores = &mut scores[..n];
            let among = self.scheme.sharing(n);
            if let Some(scale) = self.scheme.shares.filter(|_| !among.is_empty() && !coarse) {
                isa.dispatch(Shares { row: &mut scores[among], scale });
            }
            if row.first {
                *filled = 0;
            }
            if !(row.first && row.last) {
                let reduce = self.scheme.reduce;
                isa.dispatch(Combine { reduce, row: scores, filled: *filled, into: scratch.reduced });
            }
            *filled = (*filled).max(n);
            if !row.last {
                continue;
            }
            let n = *filled;
            let scores =
                if row.first { &mut scratch.scores[i * stride..][..n] } else { &mut scratch.reduced[..n] };
            if self.scheme.reduce == Reduce::Mean {
                scores.iter_mut().for_each(|x| *x /= row.of_list as f32);
            }
            let ranked = self.scheme.ranked(row.seen);
            let scores = match self.scheme.scored {
                Scored::Pools(pools) => {
                    pools.fold(self.scheme.unit, scores, &mut scratch.folded[..ranked]);
                    &scratch.folded[..ranked]
                }
                _ => scores,
            };
            choose(self.scheme, isa, (scores, row.seen), scratch.bits, &mut scratch.pick, &mut self.found);
        }
    }
}

/// Ends a list with what is picked by the scores of candidates, of which the
/// last query sees so many keys.
fn choose(
    scheme: &Scheme,
    isa: Isa,
    (scores, seen): (&[f32], usize),
    bits: &mut [u64],
    room: &mut Room<'_>,
    found: &mut Found,
) {
    let bits = &mut bits[..scores.len().div_ceil(64)];
    let all = Forced { first: scores.len(), last: 0, inside: false };
    let pick = if scheme.is_dense(seen) { Pick { rule: Rule::TopK(0), forced: all } } else { scheme.pick };
    pick::choose(isa, &pick, scores, room, bits);
    for (w, &word) in bits.iter().enumerate() {
        let mut word = word;
        while word != 0 {
            found.candidates.push((64 * w) as u32 + word.trailing_zeros());
            word &= word - 1;
        }
    }
    if scheme.scored == Scored::Whole && !seen.is_multiple_of(scheme.unit) {
        found.candidates.push((seen / scheme.unit) as u32);
    }
    found.ends.push(found.candidates.len());
}

/// Copies rows as `f32`, one after the other.
pub(crate) struct Unpack<'a> {
    pub(crate) from: AnyRows<'a>,
    pub(crate) to: &'a mut [f32],
}

impl crate::simd::Kernel for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: crate::simd::Simd>(self, s: S) {
        self.from.pack_rows(s, self.to, self.from.cols());
    }
}

/// Copies rows as `f32`, so far apart.
pub(crate) struct UnpackRows<'a> {
    pub(crate) from: AnyRows<'a>,
    pub(crate) to: &'a mut [f32],
    pub(crate) apart: usize,
}

impl crate::simd::Kernel for UnpackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: crate::simd::Simd>(self, s: S) {
        self.from.pack_rows(s, self.to, self.apart.max(1));
    }
}

/// The mean of some rows.
struct MeanRow<'a> {
    from: AnyRows<'a>,
    room: &'a mut [f32],
    to: &'a mut [f32],
}

impl crate::simd::Kernel for MeanRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: crate::simd::Simd>(self, s: S) {
        let Self { from, room, to } = self;
        from.part(0..1).pack_rows(s, to, to.len());
        if from.len() == 1 {
            return;
        }
        for i in 1..from.len() {
            from.part(i..i + 1).pack_rows(s, room, to.len());
            for (sum, &x) in to.iter_mut().zip(&*room) {
                *sum += x;
            }
        }
        let share = 1.0 / from.len() as f32;
        to.iter_mut().for_each(|x| *x *= share);
    }
}

/// Rows of `f32` that lie one after the other.
pub(crate) fn rows_of(x: &[f32], rows: usize, width: usize) -> AnyRows<'_> {
    AnyRows::F32(Rows::of_slice(x, rows, width, width))
}

#[cfg(test)]
mod tests;
