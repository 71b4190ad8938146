//! A graph of keys between which a search for the highest products walks: built
//! from queries, since these lie elsewhere than keys.
//!
//! From "RoarGraph: A Projected Bipartite Graph for Efficient Cross-Modal
//! Approximate Nearest Neighbor Search" (arXiv 2408.08933). Near is a high product,
//! everywhere. Of the keys nearest to a query, the nearest becomes the neighbour of
//! others; each key is then searched for in this graph, and becomes the neighbour of
//! what was met on the way; what still cannot be reached is tied to what is nearest
//! to it.

use ndarray::ArrayView4;

use super::pick::{index_of, key, order};
use super::score::{self, Candidates, Scores};
use super::search::Best;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::source::{At, Kv};
use crate::simd::Isa;
use crate::simd::any::AnyArray;
use crate::simd::mem::{Arena, Heads, bytes_for};

/// Edges by key, and where walks start.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Graph {
    offsets: Vec<usize>,
    edges: Vec<u32>,
    entry: usize,
}

/// Keys whose scores are asked for at once.
const CHUNK: usize = 64;

/// What a walk works in.
pub(crate) struct Room<'a> {
    /// The best so far, sorted, and which of them have been expanded.
    pool: &'a mut [u64],
    done: &'a mut [u32],
    /// A bit for each key that has been scored.
    seen: &'a mut [u32],
}

impl<'a> Room<'a> {
    /// For so many keys and a pool of so many.
    pub(crate) fn sizes(keys: usize, pool: usize) -> [usize; 2] {
        [pool, keys.div_ceil(32)]
    }

    pub(crate) fn bytes([pool, seen]: [usize; 2]) -> usize {
        bytes_for::<u64>(pool).saturating_add(bytes_for::<u32>(pool)).saturating_add(bytes_for::<u32>(seen))
    }

    pub(crate) fn take(arena: &mut Arena<'a>, [pool, seen]: [usize; 2]) -> Self {
        Self { pool: arena.take(pool), done: arena.take(pool), seen: arena.take(seen) }
    }

    /// Whether a key is met for the first time.
    #[inline(always)]
    fn meet(&mut self, id: usize) -> bool {
        let (word, bit) = (&mut self.seen[id / 32], 1 << (id % 32));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

/// Walks from `entry` to the keys with the highest scores: always on from the best
/// one that has not been expanded, until none of the pool is left. The pool, best
/// first; keys without a score are last.
pub(crate) fn walk<'r, 'e>(
    entry: usize,
    edges: impl Fn(usize) -> &'e [u32],
    room: &'r mut Room<'_>,
    mut score: impl FnMut(&[u32], &mut [f32]),
) -> &'r [u64] {
    room.seen.fill(0);
    if room.pool.is_empty() {
        return &[];
    }
    let (mut len, mut next) = (0, 0);
    let (mut ids, mut scores) = ([0u32; CHUNK], [0f32; 2 * CHUNK]);
    let mut waiting: &[u32] = &[entry as u32];
    loop {
        while !waiting.is_empty() {
            let mut count = 0;
            while let Some((&id, rest)) = waiting.split_first().filter(|_| count < CHUNK) {
                if room.meet(id as usize) {
                    ids[count] = id;
                    count += 1;
                }
                waiting = rest;
            }
            if count > 0 {
                score(&ids[..count], &mut scores);
            }
            for (&id, &score) in ids[..count].iter().zip(&scores) {
                let key = key(order(score), id as usize);
                let at = room.pool[..len].partition_point(|&other| other > key);
                if at == room.pool.len() {
                    continue;
                }
                len = (len + 1).min(room.pool.len());
                room.pool.copy_within(at..len - 1, at + 1);
                room.done.copy_within(at..len - 1, at + 1);
                (room.pool[at], room.done[at]) = (key, 0);
                next = next.min(at);
            }
        }
        while next < len && room.done[next] == 1 {
            next += 1;
        }
        if next == len {
            return &room.pool[..len];
        }
        room.done[next] = 1;
        waiting = edges(index_of(room.pool[next]));
    }
}

impl Graph {
    /// [`walk`]
    pub(crate) fn walk<'r>(
        &self,
        room: &'r mut Room<'_>,
        score: impl FnMut(&[u32], &mut [f32]),
    ) -> &'r [u64] {
        walk(self.entry, |id| self.edges(id), room, score)
    }

    /// The neighbours of a key.
    pub(crate) fn edges(&self, id: usize) -> &[u32] {
        &self.edges[self.offsets[id]..self.offsets[id + 1]]
    }

    pub(crate) fn entry(&self) -> usize {
        self.entry
    }
}

/// How a graph is built.
#[derive(Clone, Copy)]
pub(crate) struct Build {
    pub(crate) isa: Isa,
    pub(crate) dim: usize,
    pub(crate) nearest: usize,
    pub(crate) degree: usize,
    pub(crate) pool: usize,
}

/// Rows that are scored, and what that works in.
struct Keys<'a> {
    isa: Isa,
    dim: usize,
    rows: &'a [f32],
    kv: Kv<'a>,
    sequence: Sequence,
    query: Vec<f32>,
    room: Vec<f32>,
    scores: Vec<f32>,
}

impl Keys<'_> {
    fn ask(&mut self, query: &[f32]) {
        self.query[..self.dim].copy_from_slice(query);
    }

    fn ask_key(&mut self, id: usize) {
        let row = &self.rows[id * self.dim..][..self.dim];
        self.query[..self.dim].copy_from_slice(row);
    }

    /// Scores of some keys with the query that was asked last.
    fn score(&mut self, ids: &[u32], out: &mut [f32]) {
        let Self { isa, dim: width, kv, sequence, query, room, .. } = self;
        let at = At { sequence, kv_head: 0, keys: 0..0 };
        let (candidates, stride) = (Candidates::Listed { kv, at, ids }, out.len() / 2);
        isa.dispatch(Scores {
            queries: query,
            rows: 1,
            width: *width,
            candidates,
            few: true,
            room,
            out,
            stride,
        });
    }

    /// The same, of any number.
    fn each(&mut self, ids: &[u32], mut then: impl FnMut(u32, f32)) {
        let mut scores = std::mem::take(&mut self.scores);
        for ids in ids.chunks(CHUNK) {
            self.score(ids, &mut scores);
            ids.iter().zip(&scores).for_each(|(&id, &score)| then(id, score));
        }
        self.scores = scores;
    }

    /// At most `most` neighbours for a key, the nearest first, none of which is
    /// nearer to one before it than to the key; then those that were passed over.
    fn prune(&mut self, id: usize, candidates: &[u32], most: usize) -> Vec<u32> {
        let mut sorted = Vec::with_capacity(candidates.len());
        self.ask_key(id);
        self.each(candidates, |other, score| sorted.push((key(order(score), other as usize), score)));
        sorted.sort_unstable_by_key(|&(key, _)| std::cmp::Reverse(key));
        sorted.dedup_by_key(|&mut (key, _)| key);
        let (mut taken, mut passed) = (Vec::new(), Vec::new());
        for (key, score) in sorted.into_iter().filter(|&(key, _)| index_of(key) != id) {
            let other = index_of(key);
            if taken.len() == most {
                break;
            }
            self.ask_key(other);
            let mut hidden = false;
            self.each(&taken, |_, between| hidden |= between > score);
            if hidden { &mut passed } else { &mut taken }.push(other as u32);
        }
        let left = most - taken.len();
        taken.extend(passed.into_iter().take(left));
        taken
    }

    /// Edges from a key and back, where each keeps the best of those it has.
    fn link(&mut self, edges: &mut [Vec<u32>], id: usize, candidates: &[u32], most: usize) {
        for other in self.prune(id, candidates, most) {
            for (from, to) in [(id, other), (other as usize, id as u32)] {
                if !edges[from].contains(&to) {
                    edges[from].push(to);
                }
                if edges[from].len() > most {
                    edges[from] = self.prune(from, &std::mem::take(&mut edges[from]), most);
                }
            }
        }
    }
}

impl Build {
    /// The graph of `rows`, from `queries`.
    pub(crate) fn run(&self, rows: &[f32], keys: usize, queries: &[f32]) -> Result<Graph> {
        let &Self { isa, dim, nearest, degree, pool } = self;
        if keys == 0 {
            return Ok(Graph { offsets: vec![0], edges: Vec::new(), entry: 0 });
        }
        let view = ArrayView4::from_shape((1, 1, keys, dim), rows).expect("as many elements");
        let array = AnyArray::F32(Heads::new(view));
        let mut of = Keys {
            isa,
            dim,
            rows,
            kv: Kv::Arrays { k: array, v: array },
            sequence: Sequence { index: 0, batch: 0, slot: 0, queries: 0..0, keys: 0..keys },
            query: vec![0.0; dim.next_multiple_of(isa.lanes())],
            room: vec![0.0; score::room(dim)],
            scores: vec![0.0; 2 * CHUNK],
        };
        let mut edges: Vec<Vec<u32>> = vec![Vec::new(); keys];
        let all: Vec<u32> = (0..keys as u32).collect();
        let mut best = vec![0; Best::room(nearest.min(keys))];
        for query in queries.chunks(dim.max(1)) {
            of.ask(query);
            let mut highest = Best::new(&mut best, nearest.min(keys));
            of.each(&all, |id, score| highest.push(score, id as usize));
            let ids: Vec<u32> = highest.sorted().iter().map(|&key| index_of(key) as u32).collect();
            if let Some((&pivot, others)) = ids.split_first() {
                of.link(&mut edges, pivot as usize, others, degree);
            }
        }
        let entry = entry(rows, keys, dim);
        let sizes = Room::sizes(keys, pool.min(keys));
        let (mut held, mut done, mut seen) = (vec![0; sizes[0]], vec![0; sizes[0]], vec![0; sizes[1]]);
        let mut room = Room { pool: &mut held, done: &mut done, seen: &mut seen };
        let mut more: Vec<Vec<u32>> = vec![Vec::new(); keys];
        let mut meet = |of: &mut Keys<'_>, edges: &[Vec<u32>], id: usize| -> Vec<u32> {
            of.ask_key(id);
            let met = walk(entry, |id| &edges[id], &mut room, |ids, out| of.score(ids, out));
            met.iter().map(|&key| index_of(key) as u32).collect()
        };
        for id in 0..keys {
            let met = meet(&mut of, &edges, id);
            of.link(&mut more, id, &met, degree.saturating_mul(2));
        }
        for (edges, more) in edges.iter_mut().zip(more) {
            edges.extend(more);
            edges.sort_unstable();
            edges.dedup();
        }
        let (mut reached, mut waiting) = (vec![false; keys], vec![entry]);
        for id in (0..keys).map(Some).chain([None]) {
            while let Some(from) = waiting.pop() {
                if !std::mem::replace(&mut reached[from], true) {
                    waiting.extend(edges[from].iter().map(|&to| to as usize));
                }
            }
            if let Some(id) = id.filter(|&id| !reached[id]) {
                let near = meet(&mut of, &edges, id)[0] as usize;
                edges[near].push(id as u32);
                edges[id].push(near as u32);
                waiting.push(id);
            }
        }
        let mut offsets = vec![0];
        offsets.extend(edges.iter().scan(0, |end, edges| {
            *end += edges.len();
            Some(*end)
        }));
        Ok(Graph { offsets, edges: edges.concat(), entry })
    }
}

/// The row that is nearest to the mean of all.
fn entry(rows: &[f32], keys: usize, dim: usize) -> usize {
    let mut mean = vec![0f64; dim];
    for row in rows.chunks_exact(dim.max(1)) {
        mean.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) / keys as f64);
    }
    let far = |row: &[f32]| row.iter().zip(&mean).map(|(&x, m)| (f64::from(x) - m).powi(2)).sum::<f64>();
    let mut least = (f64::INFINITY, 0);
    for (id, row) in rows.chunks_exact(dim.max(1)).enumerate() {
        let far = far(row);
        if far < least.0 {
            least = (far, id);
        }
    }
    least.1
}
