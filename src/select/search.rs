//! Search: the keys whose products with a query are highest, by an index of those
//! between the first and the last ones that is built once.

use std::ops::Range;

use super::cluster::{Clusters, KMeans, Seeding};
use super::graph::{self, Graph};
use super::pick::{index_of, key, order};
use super::score::{self, Candidates, Scores};
use super::{Source, rows_of};
use crate::cache::{Cache, Cached};
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Qkv, Sequence};
use crate::keys::source::At;
use crate::simd::Isa;
use crate::simd::mem::{Arena, Parts, bytes_for, claim_words};

/// How keys are searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Search {
    /// All are scored: exact.
    Flat,
    /// Those of the clusters whose centers score highest are scored ("inverted
    /// file"). Exact where all are probed.
    Ivf {
        /// Clusters of each head, by k-means from rows drawn at random.
        lists: usize,
        /// Clusters that are scored.
        probes: usize,
    },
    /// A walk from key to key along a graph, to those whose product is higher, as
    /// in "RoarGraph" (arXiv 2408.08933): keys that are nearest to the same one of
    /// the queries that the index was built with are neighbours. Exact where the
    /// pool holds all.
    Graph {
        /// Keys nearest to a query, between which there are edges.
        nearest: usize,
        /// Edges of a key; as many as twice that come to it so that all are found.
        degree: usize,
        /// The pool of a search while the graph is built.
        build_pool: usize,
        /// The pool of a search; at least as many keys as are looked for are held.
        pool: usize,
    },
}

/// An index of the keys of sequences, by head.
#[derive(Clone, Debug, PartialEq)]
pub struct Neighbours {
    search: Search,
    sinks: usize,
    local: usize,
    heads: usize,
    head_dim: usize,
    /// The keys of each sequence that it has.
    spans: Vec<Range<usize>>,
    of: Vec<Found>,
}

/// The index of a head; keys are counted from the first that it has.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Found {
    Flat,
    Clusters(Clusters),
    Graph(Graph),
}

impl Search {
    fn check(&self) -> Result<()> {
        let numbers: &[(&'static str, usize)] = match self {
            Self::Flat => &[],
            Self::Ivf { lists, probes } => &[("lists", *lists), ("probes", *probes)],
            Self::Graph { nearest, degree, build_pool, pool } => {
                &[("nearest", *nearest), ("degree", *degree), ("build_pool", *build_pool), ("pool", *pool)]
            }
        };
        match numbers.iter().find(|(_, n)| *n == 0) {
            Some((name, _)) => Err(Error::value(name, "at least 1", 0)),
            None => Ok(()),
        }
    }
}

impl Neighbours {
    /// Of the keys of `x` but the first `sinks` and the last `local`, which are
    /// always attended to, built with its queries: those of the prompt.
    ///
    /// # Errors
    /// [`Error::Value`] for numbers of 0, arrays that do not fit, and
    /// [`Error::TooLarge`] where there is no memory.
    pub fn of<Q: Element, K: Element, O: Element>(
        x: Qkv<'_, Q, K, O>,
        search: Search,
        sinks: usize,
        local: usize,
    ) -> Result<Self> {
        Self::build(&Source::new(Isa::choose(None)?, x.reborrow(), None)?, search, sinks, local)
    }

    /// The same of a cache.
    ///
    /// # Errors
    /// Likewise.
    pub fn of_cache<Q: Element, C: Cache + ?Sized, O: Element>(
        x: Cached<'_, Q, C, O>,
        search: Search,
        sinks: usize,
        local: usize,
    ) -> Result<Self> {
        let x = x.reborrow();
        let lengths = crate::input::Lengths::Full;
        Self::build(&Source::cached(Isa::choose(None)?, x, lengths, None)?, search, sinks, local)
    }

    fn build(source: &Source<'_>, search: Search, sinks: usize, local: usize) -> Result<Self> {
        search.check()?;
        let (dims, isa) = (source.dims, source.isa);
        let span = |i: usize| {
            let n = source.sequence(i).keys.len();
            sinks.min(n)..n.saturating_sub(local).max(sinks.min(n))
        };
        let spans: Vec<_> = (0..dims.batch).map(span).collect();
        let lists = dims.batch * dims.kv_heads;
        let place = |list: usize| (source.sequence(list / dims.kv_heads), list % dims.kv_heads);
        let of = match search {
            Search::Flat => vec![Found::Flat; lists],
            Search::Ivf { lists: clusters, .. } => {
                let how = KMeans { clusters, rounds: 20, seeding: Seeding::Random, seed: 0 };
                let mut workspace = Workspace::new();
                let of = |list: usize| {
                    let (sequence, head) = place(list);
                    let rows = source.keys(&sequence, head, &spans[sequence.index])?;
                    let rows = rows_of(&rows, spans[sequence.index].len(), dims.head_dim);
                    Ok(Found::Clusters(how.run(isa, rows, &mut workspace)?))
                };
                (0..lists).map(of).collect::<Result<_>>()?
            }
            Search::Graph { nearest, degree, build_pool, .. } => {
                let (mut found, mut claims) = (vec![Ok(Found::Flat); lists], vec![0; claim_words(lists)]);
                let parts = Parts::new(&mut found, 1, &mut claims);
                parallel::for_each(
                    parallel::threads(),
                    lists,
                    |_| (),
                    |(), list| {
                        let (sequence, head) = place(list);
                        let keys = spans[sequence.index].len();
                        let how = graph::Build { isa, dim: dims.head_dim, nearest, degree, pool: build_pool };
                        let rows = source.keys(&sequence, head, &spans[sequence.index]);
                        let queries = queries(source, &sequence, head);
                        parts.take(list)[0] =
                            rows.and_then(|rows| Ok(Found::Graph(how.run(&rows, keys, &queries)?)));
                    },
                );
                found.into_iter().collect::<Result<_>>()?
            }
        };
        Ok(Self { search, sinks, local, heads: dims.kv_heads, head_dim: dims.head_dim, spans, of })
    }

    /// How it is searched.
    pub fn search(&self) -> Search {
        self.search
    }

    /// The first keys, which are not in it.
    pub fn sinks(&self) -> usize {
        self.sinks
    }

    /// The last keys, which are not in it.
    pub fn local(&self) -> usize {
        self.local
    }

    /// The keys of each sequence that it has.
    pub fn spans(&self) -> &[Range<usize>] {
        &self.spans
    }

    /// That of a head.
    pub(crate) fn head(&self, sequence: usize, kv_head: usize) -> &Found {
        &self.of[sequence * self.heads + kv_head]
    }

    /// Refuses a call over other sequences, or with fewer keys.
    pub(crate) fn check(&self, source: &Source<'_>) -> Result<()> {
        let dims = &source.dims;
        let same =
            [self.spans.len(), self.heads, self.head_dim] == [dims.batch, dims.kv_heads, dims.head_dim];
        let lengths: Vec<_> = (0..dims.batch).map(|i| source.sequence(i).keys.len()).collect();
        if same && self.spans.iter().zip(&lengths).all(|(span, &n)| span.end <= n) {
            return Ok(());
        }
        let (ends, d) = (self.spans.iter().map(|span| span.end).collect::<Vec<_>>(), self.head_dim);
        let expected = format!("{} key/value heads of {d} channels, with at least {ends:?} keys", self.heads);
        let got = format!("{} of {} with {lengths:?}", dims.kv_heads, dims.head_dim);
        Err(Error::value("neighbours", expected, got))
    }

    /// The longest span.
    fn longest(&self) -> usize {
        self.spans.iter().map(|span| span.len()).max().unwrap_or(0)
    }
}

/// The queries of all heads over a key/value head, in `f32`.
fn queries(source: &Source<'_>, sequence: &Sequence, kv_head: usize) -> Vec<f32> {
    let (d, n) = (source.dims.head_dim, sequence.queries.len());
    let group = source.dims.q_heads / source.dims.kv_heads.max(1);
    let mut rows = vec![0.0; group * n * d];
    for (h, to) in rows.chunks_mut((n * d).max(1)).enumerate() {
        let from = source.q.rows(sequence.batch, kv_head * group + h, &sequence.queries);
        source.isa.dispatch(super::Unpack { from, to });
    }
    rows
}

/// Keys that are scored at once.
const CHUNK: usize = 1024;

/// The highest keys of many, by score and then by place.
pub(crate) struct Best<'a> {
    keys: &'a mut [u64],
    len: usize,
    most: usize,
    /// The least one that counts.
    least: u64,
}

impl<'a> Best<'a> {
    /// Numbers that it holds for the `most` highest.
    pub(crate) fn room(most: usize) -> usize {
        most.saturating_add(most.max(CHUNK))
    }

    pub(crate) fn new(keys: &'a mut [u64], most: usize) -> Self {
        Self { keys, len: 0, most, least: 0 }
    }

    #[inline(always)]
    pub(crate) fn push(&mut self, score: f32, id: usize) {
        self.push_key(key(order(score), id));
    }

    #[inline(always)]
    fn push_key(&mut self, key: u64) {
        let most = self.most;
        // NaN has the order 0.
        if key >> 32 == 0 || key <= self.least || most == 0 {
            return;
        }
        if self.len == self.keys.len() {
            self.keys.select_nth_unstable_by(most - 1, |a, b| b.cmp(a));
            (self.len, self.least) = (most, self.keys[most - 1]);
            if key <= self.least {
                return;
            }
        }
        self.keys[self.len] = key;
        self.len += 1;
    }

    /// They, the highest first.
    pub(crate) fn sorted(self) -> &'a [u64] {
        let keys = &mut self.keys[..self.len];
        keys.sort_unstable_by(|a, b| b.cmp(a));
        &keys[..self.len.min(self.most)]
    }
}

/// What one thread works in.
pub(crate) struct Room<'a> {
    room: &'a mut [f32],
    scores: &'a mut [f32],
    best: &'a mut [u64],
    /// Clusters, or keys that wait to be scored.
    ids: &'a mut [u32],
    walk: graph::Room<'a>,
}

/// Sizes of a [`Room`].
pub(crate) struct Sizes {
    room: usize,
    scores: usize,
    best: usize,
    ids: usize,
    walk: [usize; 2],
}

impl Sizes {
    pub(crate) fn new(of: &Neighbours, k: usize, source: &Source<'_>) -> Self {
        let keys = (0..source.dims.batch).map(|i| source.sequence(i).keys.len()).max().unwrap_or(0);
        let (longest, k) = (of.longest(), k.min(keys));
        let mut sizes = Self {
            room: score::room(of.head_dim),
            scores: 2 * CHUNK,
            best: Best::room(k),
            ids: 0,
            walk: [0; 2],
        };
        match of.search {
            Search::Flat => {}
            Search::Ivf { lists, probes } => {
                sizes.scores = 2 * lists.min(longest).next_multiple_of(64).max(CHUNK);
                sizes.ids = probes.min(lists).min(longest);
                sizes.best = sizes.best.max(Best::room(sizes.ids));
            }
            Search::Graph { pool, .. } => sizes.walk = graph::Room::sizes(longest, pool.max(k).min(longest)),
        }
        sizes
    }

    pub(crate) fn bytes(&self) -> usize {
        [
            bytes_for::<f32>(self.room),
            bytes_for::<f32>(self.scores),
            bytes_for::<u64>(self.best),
            bytes_for::<u32>(self.ids),
        ]
        .into_iter()
        .fold(graph::Room::bytes(self.walk), usize::saturating_add)
    }

    pub(crate) fn take<'a>(&self, arena: &mut Arena<'a>) -> Room<'a> {
        Room {
            room: arena.take(self.room),
            scores: arena.take(self.scores),
            best: arena.take(self.best),
            ids: arena.take(self.ids),
            walk: graph::Room::take(arena, self.walk),
        }
    }
}

/// A query.
struct Asked<'a> {
    isa: Isa,
    query: &'a [f32],
    width: usize,
}

impl Asked<'_> {
    /// Its products with some keys; `out` is twice as long as these, at least.
    fn score(&self, candidates: Candidates<'_>, room: &mut [f32], out: &mut [f32]) {
        let (&Self { isa, query: queries, width }, stride) = (self, out.len() / 2);
        isa.dispatch(Scores { queries, rows: 1, width, candidates, few: true, room, out, stride });
    }
}

impl Neighbours {
    /// The `k` keys with the highest products with a query that it finds, and of
    /// those that came after it was built, but the last: into the front of `found`,
    /// ascending. `query` is filled up to whole vectors with zeros.
    pub(crate) fn find(
        &self,
        source: &Source<'_>,
        (sequence, kv_head): (&Sequence, usize),
        query: &[f32],
        k: usize,
        room: &mut Room<'_>,
        found: &mut Vec<u32>,
    ) {
        let Room { room, scores, best, ids, walk } = room;
        let (span, k) = (&self.spans[sequence.index], k.min(sequence.keys.len()));
        let (d, isa) = (self.head_dim, source.isa);
        let one = Asked { isa, query, width: d };
        let at = |keys: Range<usize>| At { sequence, kv_head, keys };
        let mut probed: &[u32] = &[];
        if let (Found::Clusters(clusters), Search::Ivf { probes, .. }) =
            (self.head(sequence.index, kv_head), self.search)
        {
            one.score(Candidates::Rows(rows_of(clusters.centers(), clusters.len(), d)), room, scores);
            let mut highest = Best::new(best, probes.min(clusters.len()));
            scores[..clusters.len()].iter().enumerate().for_each(|(i, &score)| highest.push(score, i));
            let highest = highest.sorted();
            for (to, &key) in ids.iter_mut().zip(highest) {
                *to = index_of(key) as u32;
            }
            probed = &ids[..highest.len()];
        }
        let walked = match self.head(sequence.index, kv_head) {
            Found::Graph(graph) if !span.is_empty() => graph.walk(walk, |ids, out| {
                one.score(
                    Candidates::Listed { kv: &source.kv, at: at(span.start..span.start), ids },
                    room,
                    out,
                );
            }),
            _ => &[][..],
        };
        let mut highest = Best::new(best, k);
        for &found in walked.iter().take(k) {
            highest.push_key(key((found >> 32) as u32, span.start + index_of(found)));
        }
        let mut ranges = [span.end..sequence.keys.len().saturating_sub(self.local).max(span.end), 0..0];
        match self.head(sequence.index, kv_head) {
            Found::Flat => ranges[1] = span.clone(),
            Found::Clusters(clusters) => {
                for ids in probed.iter().flat_map(|&list| clusters.rows(list as usize).chunks(CHUNK)) {
                    one.score(
                        Candidates::Listed { kv: &source.kv, at: at(span.start..span.start), ids },
                        room,
                        &mut scores[..2 * CHUNK],
                    );
                    ids.iter()
                        .zip(&**scores)
                        .for_each(|(&id, &score)| highest.push(score, span.start + id as usize));
                }
            }
            Found::Graph(_) => {}
        }
        for range in ranges {
            for first in range.clone().step_by(CHUNK) {
                let keys = first..(first + CHUNK).min(range.end);
                one.score(Candidates::Cache(&source.kv, at(keys.clone())), room, &mut scores[..2 * CHUNK]);
                keys.zip(&**scores).for_each(|(id, &score)| highest.push(score, id));
            }
        }
        let first = found.len();
        found.extend(highest.sorted().iter().map(|&key| index_of(key) as u32));
        found[first..].sort_unstable();
    }
}
