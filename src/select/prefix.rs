//! Clusters of the keys of a fixed prefix, and what queries are estimated to weigh
//! them.

use std::ops::Range;

use ndarray::{Array4, ArrayView4, Axis};

use super::cluster::{Clusters, KMeans};
use super::lists::Block;
use super::score::{self, Candidates, FEW, ROWS, Scores};
use super::{Source, rows_of};
use crate::cache::{Cache, Cached};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Lengths, Qkv};
use crate::simd::exp::exp2_flush;
use crate::simd::mem::{Arena, bytes_for};
use crate::simd::{Isa, Kernel, Simd};

/// The keys of each head, but the last ones, in clusters of like directions: k-means
/// of normalised keys. A cluster's center is the mean of its keys as they are.
#[derive(Clone, Debug, PartialEq)]
pub struct Prefix {
    heads: usize,
    head_dim: usize,
    /// Keys of each sequence that are in clusters.
    keys: Vec<usize>,
    of: Vec<Head>,
}

/// Those of a head.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Head {
    pub(crate) clusters: Clusters,
    /// The means of the keys.
    pub(crate) centers: Vec<f32>,
    /// How many keys each has.
    counts: Vec<f32>,
}

impl Prefix {
    /// Of the keys of `x` but the last `window`, which the paper observes queries in:
    /// 100.
    ///
    /// # Errors
    /// [`Error::Value`] for numbers of clusters or rounds of 0, arrays that do not
    /// fit, and [`Error::TooLarge`] where there is no memory.
    pub fn of<Q: Element, K: Element, O: Element>(
        x: Qkv<'_, Q, K, O>,
        how: &KMeans,
        window: usize,
    ) -> Result<Self> {
        Self::build(&Source::new(Isa::choose(None)?, x.reborrow(), None)?, how, window)
    }

    /// The same of a cache.
    ///
    /// # Errors
    /// Likewise.
    pub fn of_cache<Q: Element, C: Cache + ?Sized, O: Element>(
        x: Cached<'_, Q, C, O>,
        how: &KMeans,
        window: usize,
    ) -> Result<Self> {
        Self::build(&Source::cached(Isa::choose(None)?, x.reborrow(), Lengths::Full, None)?, how, window)
    }

    fn build(source: &Source<'_>, how: &KMeans, window: usize) -> Result<Self> {
        how.check()?;
        let (dims, isa, mut workspace) = (source.dims, source.isa, Workspace::new());
        let keys: Vec<_> =
            (0..dims.batch).map(|i| source.sequence(i).keys.len().saturating_sub(window)).collect();
        let mut of = Vec::new();
        for (i, &n) in keys.iter().enumerate() {
            for kv_head in 0..dims.kv_heads {
                let rows = source.keys(&source.sequence(i), kv_head, &(0..n))?;
                let mut directions = rows.clone();
                isa.dispatch(Normalise { rows: &mut directions, dim: dims.head_dim });
                let clusters = how.run(isa, rows_of(&directions, n, dims.head_dim), &mut workspace)?;
                let mut centers = vec![0.0; clusters.len() * dims.head_dim];
                clusters.means(isa, rows_of(&rows, n, dims.head_dim), &mut centers);
                let counts = (0..clusters.len()).map(|c| clusters.rows(c).len() as f32).collect();
                of.push(Head { clusters, centers, counts });
            }
        }
        Ok(Self { heads: dims.kv_heads, head_dim: dims.head_dim, keys, of })
    }

    /// Keys of each sequence that are in clusters.
    pub fn keys(&self) -> &[usize] {
        &self.keys
    }

    /// The clusters of a head.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn clusters(&self, sequence: usize, kv_head: usize) -> &Clusters {
        &self.head(sequence, kv_head).clusters
    }

    pub(crate) fn head(&self, sequence: usize, kv_head: usize) -> &Head {
        &self.of[sequence * self.heads + kv_head]
    }

    /// Keys or values `[batch, kv_heads, len, dim]` with those of each cluster next to
    /// each other: what is read of a cluster is a run then. For
    /// [`sorted`](Self::sorted).
    ///
    /// # Errors
    /// [`Error::Shape`] for other heads or fewer keys.
    pub fn arranged<T: Element>(&self, x: ArrayView4<'_, T>) -> Result<Array4<T>> {
        let (batch, heads, len, _) = x.dim();
        let longest = self.keys.iter().copied().max().unwrap_or(0);
        if (batch, heads) != (self.keys.len(), self.heads) || len < longest {
            let (batch, heads) = (self.keys.len(), self.heads);
            let expected = format!("[{batch}, {heads}, at least {longest}, _]");
            return Err(Error::shape("x", expected, x.shape()));
        }
        let mut out = x.to_owned();
        for (i, mut out) in out.outer_iter_mut().enumerate() {
            for (head, mut out) in out.outer_iter_mut().enumerate() {
                let from = x.index_axis(Axis(0), i).index_axis_move(Axis(0), head);
                for (mut to, &row) in out.rows_mut().into_iter().zip(self.clusters(i, head).order()) {
                    to.assign(&from.row(row as usize));
                }
            }
        }
        Ok(out)
    }

    /// The same clusters of keys that are [`arranged`](Self::arranged).
    pub fn sorted(&self) -> Self {
        let mut sorted = self.clone();
        sorted.of.iter_mut().for_each(|head| head.clusters.renumber());
        sorted
    }

    /// The threshold at which a share of the keys is left out, by what the queries
    /// of `x`, on average, are estimated to weigh them: those of the window. `scale`
    /// is that of the attention.
    ///
    /// # Errors
    /// [`Error::Value`] for a share that is not from 0 to 1 and for arrays of other
    /// heads.
    pub fn threshold<Q: Element, K: Element, O: Element>(
        &self,
        x: Qkv<'_, Q, K, O>,
        scale: f32,
        share: f64,
    ) -> Result<f32> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::value("share", "from 0 to 1", share));
        }
        let source = Source::new(Isa::choose(None)?, x.reborrow(), None)?;
        self.check(&source)?;
        let sizes = self.sizes(&source);
        let mut workspace = Workspace::new();
        let mut weights = Vec::new();
        for i in 0..source.dims.batch {
            let sequence = &source.sequence(i);
            let rows = 0..sequence.queries.len();
            for head in 0..if rows.is_empty() { 0 } else { source.dims.q_heads } {
                let kv_head = head / (source.dims.q_heads / self.heads);
                let mut room = Room::take(&mut workspace.arena(Room::bytes(&sizes))?, &sizes);
                let block = Block { sequence, head, kv_head, rows: rows.clone() };
                let of = self.head(i, kv_head);
                // What no query knows is never seen, at any threshold.
                let of_clusters = self.estimate(&source, &block, scale, &mut room).iter().map(|x| x.max(0.0));
                weights.extend(of_clusters.zip(&of.counts));
            }
        }
        weights.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let all: f64 = weights.iter().map(|&(_, &n)| f64::from(n)).sum();
        let mut below = 0.0;
        for (weight, &n) in weights {
            below += f64::from(n);
            if below >= share * all {
                return Ok(if share > 0.0 { weight } else { -1.0 });
            }
        }
        Ok(-1.0)
    }

    /// Refuses a call over other sequences, or with fewer keys.
    pub(crate) fn check(&self, source: &Source<'_>) -> Result<()> {
        let dims = &source.dims;
        let same = [self.keys.len(), self.heads, self.head_dim] == [dims.batch, dims.kv_heads, dims.head_dim];
        let lengths: Vec<_> = (0..dims.batch).map(|i| source.sequence(i).keys.len()).collect();
        if same && self.keys.iter().zip(&lengths).all(|(&known, &n)| known <= n) {
            return Ok(());
        }
        let (keys, d) = (&self.keys, self.head_dim);
        let expected = format!("{} key/value heads of {d} channels, with at least {keys:?} keys", self.heads);
        let got = format!("{} of {} with {lengths:?}", dims.kv_heads, dims.head_dim);
        Err(Error::value("prefix", expected, got))
    }

    /// Sizes of a [`Room`].
    pub(crate) fn sizes(&self, source: &Source<'_>) -> Sizes {
        let centers = self.of.iter().map(|head| head.clusters.len()).max().unwrap_or(0);
        let apart = self.head_dim.next_multiple_of(source.isa.lanes());
        let stride = centers.next_multiple_of(64).max(64);
        Sizes([ROWS * apart, score::room(self.head_dim), (ROWS + 1) * stride, stride])
    }

    /// What each key of a cluster is estimated to weigh, on average over the queries of
    /// a block:
    ///
    /// ```text
    /// S_i = exp(scale q . c_i) / sum_j n_j exp(scale q . c_j)
    /// ```
    ///
    /// A query whose score is NaN has no say, and a cluster of which no score is a number
    /// has NaN.
    pub(crate) fn estimate<'r>(
        &self,
        source: &Source<'_>,
        block: &Block<'_>,
        scale: f32,
        room: &'r mut Room<'_>,
    ) -> &'r [f32] {
        let Room { queries, room, scores, sums } = room;
        let of = self.head(block.sequence.index, block.kv_head);
        let (n, width, stride) = (of.clusters.len(), self.head_dim, sums.len());
        let apart = width.next_multiple_of(source.isa.lanes());
        sums.fill(f32::NAN);
        for first in block.rows.clone().step_by(ROWS) {
            let rows = first..(first + ROWS).min(block.rows.end);
            for (i, row) in rows.clone().enumerate() {
                source.query(block.sequence, block.head, row, &mut queries[i * apart..][..apart]);
            }
            let candidates = Candidates::Rows(rows_of(&of.centers, n, width));
            let (few, rows) = (rows.len() <= FEW, rows.len());
            source.isa.dispatch(Scores { queries, rows, width, candidates, few, room, out: scores, stride });
            for row in scores.chunks_mut(stride).take(rows) {
                source.isa.dispatch(Estimate { row: &mut row[..n], counts: &of.counts, scale, sums });
            }
        }
        let share = 1.0 / block.rows.len() as f32;
        sums[..n].iter_mut().for_each(|sum| *sum *= share);
        &sums[..n]
    }
}

pub(crate) struct Sizes([usize; 4]);

/// What [`Prefix::estimate`] works in.
pub(crate) struct Room<'a> {
    queries: &'a mut [f32],
    room: &'a mut [f32],
    scores: &'a mut [f32],
    sums: &'a mut [f32],
}

impl<'a> Room<'a> {
    pub(crate) fn bytes(sizes: &Sizes) -> usize {
        sizes.0.iter().fold(0, |sum, &n| sum.saturating_add(bytes_for::<f32>(n)))
    }

    pub(crate) fn take(arena: &mut Arena<'a>, sizes: &Sizes) -> Self {
        let [queries, room, scores, sums] = sizes.0.map(|n| arena.take(n));
        Self { queries, room, scores, sums }
    }
}

/// Divides rows by their lengths; rows of 0 stay.
struct Normalise<'a> {
    rows: &'a mut [f32],
    dim: usize,
}

impl Kernel for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows.chunks_exact_mut(self.dim.max(1)) {
            let mut sum = s.splat(0.0);
            for x in row.chunks(S::LANES) {
                let x = s.load_tail(x);
                sum = s.mul_add(x, x, sum);
            }
            let length = s.reduce_add(sum).sqrt();
            let share = if length > 0.0 { 1.0 / length } else { 1.0 };
            row.iter_mut().for_each(|x| *x *= share);
        }
    }
}

/// Adds the weights of a query to `sums`, whose NaN are those of nothing yet. Clusters
/// without keys, or whose score is NaN, have none.
struct Estimate<'a> {
    row: &'a mut [f32],
    counts: &'a [f32],
    scale: f32,
    sums: &'a mut [f32],
}

impl Kernel for Estimate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, counts, scale, sums } = self;
        let (zero, none, factor) = (s.splat(0.0), s.splat(f32::NEG_INFINITY), s.splat(scale));
        let mut most = none;
        for (row, counts) in row.chunks_mut(S::LANES).zip(counts.chunks(S::LANES)) {
            let x = s.mul(s.load_tail(row), factor);
            let x = s.select(s.lt(zero, s.load_tail(counts)), x, none);
            // NaN is not the larger, and stays.
            most = s.select(s.lt(most, x), x, most);
            s.store_tail(row, x);
        }
        let most = s.splat(s.reduce_max(most));
        let (mut total, log2_e) = (zero, s.splat(std::f32::consts::LOG2_E));
        for (row, counts) in row.chunks_mut(S::LANES).zip(counts.chunks(S::LANES)) {
            let x = s.load_tail(row);
            let weight = exp2_flush(s, s.mul(s.sub(x, most), log2_e));
            let counted = s.lt(none, x);
            total = s.mul_add(s.select(counted, weight, zero), s.load_tail(counts), total);
            // -inf weighs nothing; of NaN nothing is known.
            s.store_tail(row, s.select(counted, weight, s.select(s.lt(x, zero), zero, x)));
        }
        // Where nothing counts, nothing is known.
        let share = s.splat(1.0 / s.reduce_add(total));
        let known = |x| s.lt(s.splat(-1.0), x);
        for (row, sums) in row.chunks(S::LANES).zip(sums.chunks_mut(S::LANES)) {
            let (sum, weight) = (s.load_tail(&sums[..row.len()]), s.mul(s.load_tail(row), share));
            let both = s.select(known(sum), s.add(sum, weight), weight);
            s.store_tail(&mut sums[..row.len()], s.select(known(weight), both, sum));
        }
    }
}

/// Sets the bits of rows.
pub(crate) fn mark(bits: &mut [u64], rows: &[u32]) {
    for &row in rows {
        bits[row as usize / 64] |= 1 << (row % 64);
    }
}

/// The runs of bits that are set, in order.
pub(crate) fn each_run(bits: &[u64], mut then: impl FnMut(Range<usize>)) {
    for (w, &word) in bits.iter().enumerate() {
        let (mut word, mut at) = (word, 64 * w);
        while word != 0 {
            let skip = word.trailing_zeros();
            let len = (!(word >> skip)).trailing_zeros().min(64 - skip);
            at += skip as usize;
            then(at..at + len as usize);
            at += len as usize;
            word = word.checked_shr(skip + len).unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        let bits = [0b1001_1100, u64::MAX, 1 << 63, 1];
        let mut found = Vec::new();
        each_run(&bits, |range| found.push(range));
        assert_eq!(found, [2..5, 7..8, 64..128, 191..192, 192..193]);
        let mut again = [0; 4];
        for range in found {
            mark(&mut again, &range.map(|i| i as u32).collect::<Vec<_>>());
        }
        assert_eq!(again, bits);
    }
}
