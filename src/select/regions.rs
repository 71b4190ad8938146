//! Regions: parts of the tokens, lying anywhere, of which each chooses the ones
//! whose mean keys score highest with its mean query. All heads choose
//! together.

use std::sync::Mutex;

use ndarray::ArrayView4;

use super::pick::{self, Forced, Pick, Room, Rule};
use super::reserve;
use super::score::{self, Candidates, ROWS, Scores};
use crate::attention::Margins;
use crate::definition;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Dims;
use crate::keys::{Layout, Per, Run, TokenLists};
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::mem::{Parts, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, Simd};

/// Tokens in an order of regions, all of them.
#[derive(Clone, Debug)]
pub(crate) struct Regions {
    /// The row of the arrays of each token of the order.
    rows: Vec<u32>,
    /// Where regions start, and the end of the last.
    starts: Vec<usize>,
    /// The largest number that divides all their sizes: queries of a list.
    q_block: usize,
}

impl Regions {
    /// Of an order of rows, with where each region starts.
    pub(crate) fn new(rows: Vec<u32>, mut starts: Vec<usize>) -> Self {
        starts.push(rows.len());
        let divisor = |mut a: usize, mut b: usize| {
            while b > 0 {
                (a, b) = (b, a % b);
            }
            a
        };
        let q_block = starts.windows(2).fold(0, |most, x| divisor(most, x[1] - x[0])).max(1);
        Self { rows, starts, q_block }
    }

    pub(crate) fn rows(&self) -> &[u32] {
        &self.rows
    }

    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    pub(crate) fn tokens(&self, region: usize) -> std::ops::Range<usize> {
        self.starts[region]..self.starts[region + 1]
    }

    fn layout(&self, dims: &Dims) -> Layout {
        Layout::new(Per::Sequence, self.q_block, dims)
    }

    /// The lists of tokens of the order, where each region of each sequence has
    /// chosen some, ascending.
    fn lists<'a>(&self, dims: &Dims, chosen: impl Iterator<Item = &'a [u32]>) -> Result<TokenLists> {
        let layout = self.layout(dims);
        let (mut offsets, mut runs) = (Vec::new(), Vec::<Run>::new());
        reserve(&mut offsets, layout.lists()? + 1)?;
        offsets.push(0);
        for (i, chosen) in chosen.enumerate() {
            for _ in 0..self.tokens(i % self.len()).len() / self.q_block {
                let first = runs.len();
                for tokens in chosen.iter().map(|&region| self.tokens(region as usize)) {
                    let joined = runs[first..].last().is_some_and(|run| run.range().end == tokens.start);
                    match runs.last_mut().filter(|_| joined) {
                        Some(run) => run.len += tokens.len() as u32,
                        None => runs.push(Run { start: tokens.start as u32, len: tokens.len() as u32 }),
                    }
                }
                offsets.push(runs.len());
            }
        }
        TokenLists::new(layout, offsets, runs)
    }
}

/// What regions choose from, and how many each.
pub(crate) struct Routing<'a> {
    pub(crate) isa: Isa,
    pub(crate) dims: Dims,
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: AnyArray<'a>,
    pub(crate) regions: &'a Regions,
    pub(crate) count: usize,
}

impl Routing<'_> {
    /// Elements of the means of a region, and the same in whole vectors.
    fn width(&self) -> (usize, usize) {
        let width = self.dims.kv_heads * self.dims.head_dim;
        (width, width.next_multiple_of(self.isa.lanes()))
    }

    /// Regions of all sequences that have heads.
    fn all(&self) -> usize {
        if self.dims.q_heads == 0 { 0 } else { self.dims.batch * self.regions.len() }
    }

    fn stride(&self) -> usize {
        self.regions.len().next_multiple_of(64).max(64)
    }

    fn share(&self) -> usize {
        let (stride, (width, _)) = (self.stride(), self.width());
        bytes_for::<f32>(score::room(width.max(self.dims.head_dim)))
            + bytes_for::<f32>((ROWS + 1) * stride)
            + bytes_for::<u64>(stride / 64)
            + Room::bytes(stride)
    }

    /// Multiply-adds of the scores.
    pub(crate) fn flops(&self) -> u64 {
        2 * (self.all() * self.regions.len() * self.width().0) as u64
    }

    pub(crate) fn workspace_bytes(&self) -> usize {
        let (all, (_, apart)) = (self.all(), self.width());
        2 * (bytes_for::<f32>(all * apart) + bytes_for::<u64>(claim_words(all)))
            + bytes_for_shares(parallel::threads(), self.share())
    }

    /// Chooses.
    pub(crate) fn select(&self, workspace: &mut Workspace) -> Result<TokenLists> {
        let (n, all, workers) = (self.regions.len(), self.all(), parallel::threads());
        let (isa, dims, stride, (width, apart)) = (self.isa, &self.dims, self.stride(), self.width());
        self.regions.layout(dims).lists()?;
        let mut arena = workspace.arena(self.workspace_bytes())?;
        let [means_of_q, means_of_k] = [(); 2].map(|()| arena.take::<f32>(all * apart));
        let claims = [(); 2].map(|()| arena.take::<u64>(claim_words(all)));
        {
            let [of_q, of_k] = claims;
            let parts = [Parts::new(means_of_q, apart, of_q), Parts::new(means_of_k, apart, of_k)];
            let mut arena = arena.reborrow();
            let shares = arena.shares(workers, self.share());
            let start = |worker: usize| shares.take(worker).take::<f32>(score::room(dims.head_dim));
            let tasks = if apart == 0 { 0 } else { 2 * all };
            parallel::for_each(workers, tasks, start, |room, task| {
                let (which, i) = (task % 2, task / 2);
                let tokens = self.regions.tokens(i % n);
                isa.dispatch(Means {
                    array: [&self.q, &self.k][which],
                    batch: i / n,
                    group: if which == 0 { dims.q_heads / dims.kv_heads.max(1) } else { 1 },
                    rows: &self.regions.rows[tokens],
                    to: parts[which].take(i),
                    head_dim: dims.head_dim,
                    room,
                });
            });
        }
        let (means_of_q, means_of_k) = (&*means_of_q, &*means_of_k);
        let tiles = n.div_ceil(ROWS);
        let tasks = if all == 0 { 0 } else { dims.batch * tiles };
        let mut found = Vec::<Mutex<(Vec<usize>, Vec<u32>)>>::new();
        reserve(&mut found, tasks)?;
        found.resize_with(tasks, Mutex::default);
        let shares = arena.shares(workers, self.share());
        let start = |worker: usize| {
            let mut arena = shares.take(worker);
            let (room, scores) = (arena.take(score::room(width)), arena.take::<f32>((ROWS + 1) * stride));
            (room, scores, arena.take::<u64>(stride / 64), Room::take(&mut arena, stride))
        };
        parallel::for_each(workers, tasks, start, |(room, scores, bits, pick_room), task| {
            let (batch, first) = (task / tiles, task % tiles * ROWS);
            let rows = ROWS.min(n - first);
            isa.dispatch(Scores {
                queries: &means_of_q[(batch * n + first) * apart..][..rows * apart],
                rows,
                width,
                candidates: Candidates::Rows(AnyRows::F32(Rows::of_slice(
                    &means_of_k[batch * n * apart..][..n * apart],
                    n,
                    width,
                    apart,
                ))),
                few: false,
                room,
                out: scores,
                stride,
            });
            let pick = Pick { rule: Rule::TopK(self.count), forced: Forced::default() };
            let (mut ends, mut ids) = (Vec::new(), Vec::new());
            for row in scores.chunks(stride).take(rows) {
                let bits = &mut bits[..n.div_ceil(64)];
                pick::choose(isa, &pick, &row[..n], pick_room, bits);
                let chosen = |&i: &usize| bits[i / 64] >> (i % 64) & 1 == 1;
                ids.extend((0..n).filter(chosen).map(|i| i as u32));
                ends.push(ids.len());
            }
            if let Ok(mut found) = found[task].lock() {
                *found = (ends, ids);
            }
        });
        let found: Vec<_> = found.into_iter().filter_map(|x| x.into_inner().ok()).collect();
        let lists = found.iter().flat_map(|(ends, ids)| {
            ends.iter().enumerate().map(|(i, &end)| &ids[if i == 0 { 0 } else { ends[i - 1] }..end])
        });
        self.regions.lists(dims, lists)
    }
}

/// By definition: all means, all scores, sorted.
pub(crate) fn define<Q: Element, K: Element>(
    regions: &Regions,
    dims: &Dims,
    (q, k): (&ArrayView4<'_, Q>, &ArrayView4<'_, K>),
    count: usize,
) -> Result<(TokenLists, Margins)> {
    let n = regions.len();
    let group = dims.q_heads / dims.kv_heads.max(1);
    let mean = |of: &dyn Fn(usize) -> f64, region: usize| {
        let rows = &regions.rows[regions.tokens(region)];
        rows.iter().map(|&row| of(row as usize)).sum::<f64>() / rows.len() as f64
    };
    let pick = Pick { rule: Rule::TopK(count), forced: Forced::default() };
    let (mut chosen, mut margins) = (Vec::<Vec<u32>>::new(), Margins::default());
    for b in 0..if dims.q_heads == 0 { 0 } else { dims.batch } {
        let (mut queries, mut keys) = (vec![Vec::new(); n], vec![Vec::new(); n]);
        for (h, c) in (0..dims.q_heads).flat_map(|h| (0..dims.head_dim).map(move |c| (h, c))) {
            for region in 0..n {
                queries[region].push(mean(&|row| q[[b, h, row, c]].to_f64(), region));
                keys[region].push(mean(&|row| k[[b, h / group, row, c]].to_f64(), region));
            }
        }
        for (region, query) in queries.iter().enumerate() {
            let score = |key: &Vec<f64>| query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
            let scores: Vec<f64> = keys.iter().map(score).collect();
            let (ids, doubtful) = definition::select::chosen(&pick, &scores);
            chosen.push(ids.iter().map(|&id| id as u32).collect());
            let doubtful: Vec<_> = doubtful.into_iter().map(|id| regions.tokens(id)).collect();
            let lists = regions.tokens(region).len() / regions.q_block;
            margins.doubtful.extend(std::iter::repeat_n(doubtful, lists));
        }
    }
    Ok((regions.lists(dims, chosen.iter().map(|x| &x[..]))?, margins))
}

/// For each key/value head the mean of the rows of a region, summed over the
/// `group` heads that share it.
struct Means<'a> {
    array: &'a AnyArray<'a>,
    batch: usize,
    group: usize,
    rows: &'a [u32],
    /// Of each head `head_dim`, and zeros up to a whole vector.
    to: &'a mut [f32],
    head_dim: usize,
    room: &'a mut [f32],
}

impl Kernel for Means<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { array, batch, group, rows, to, head_dim: d, room } = self;
        /// Rows that are loaded at once.
        const CHUNK: usize = 64;
        to.fill(0.0);
        let share = 1.0 / rows.len() as f32;
        for head in 0..array.heads() {
            let sums = &mut to[head / group * d..][..d];
            let mut at = 0;
            while at < rows.len() {
                let first = rows[at] as usize;
                let follows = |&(i, &row): &(usize, &u32)| row as usize == first + i;
                let run = rows[at..].iter().enumerate().take(CHUNK).take_while(follows).count();
                array.rows(batch, head, &(first..first + run)).pack_rows(s, room, d);
                for row in room[..run * d].chunks(d) {
                    for (sum, &x) in sums.iter_mut().zip(row) {
                        *sum += x;
                    }
                }
                at += run;
            }
        }
        to.iter_mut().for_each(|x| *x *= share);
    }
}
