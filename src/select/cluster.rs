//! Clusters: rows that lie near each other, by k-means.
//!
//! A round puts each row into the cluster of the nearest center, in squared
//! distance, the lower one of equals, and makes each center the mean of its rows.
//! A cluster that nothing is nearest to stays where it is. Distances are `f32`
//! products on the register tile, means sums in `f64` in the order of the rows:
//! the same bits on any number of threads.
//!
//! Cost of a round: `2 n clusters dim` flops; of seeding by [`Seeding::PlusPlus`]
//! the same once, and a read of all rows for each cluster.

use ndarray::ArrayView2;

use crate::element::Element;
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::math::random::Normal;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Arena, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

use super::score::{self, Candidates, ROWS, Scores};
use super::{reserve, rows_of};

/// Where the centers of [`KMeans`] lie at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Seeding {
    /// On rows drawn without replacement.
    Random,
    /// On rows drawn one after the other, each with a probability that grows
    /// with the squared distance from those before: "k-means++: The Advantages
    /// of Careful Seeding" (2007).
    PlusPlus,
}

/// How rows are clustered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KMeans {
    /// At most so many clusters: there are no more than rows.
    pub clusters: usize,
    /// At most so many rounds, at least 1; fewer where nothing changes any more.
    pub rounds: usize,
    /// Where centers lie at first.
    pub seeding: Seeding,
    /// What is drawn.
    pub seed: u64,
}

/// Clusters of rows, which are numbered in the order in which they came.
#[derive(Clone, Debug, PartialEq)]
pub struct Clusters {
    dim: usize,
    centers: Vec<f32>,
    labels: Vec<u32>,
    offsets: Vec<usize>,
    rows: Vec<u32>,
}

impl Clusters {
    /// How many there are, empty ones among them.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The centers, `dim` numbers each, one after the other.
    pub fn centers(&self) -> &[f32] {
        &self.centers
    }

    /// The cluster of each row.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// The rows of a cluster, ascending.
    ///
    /// # Panics
    /// If there is no such cluster.
    pub fn rows(&self, cluster: usize) -> &[u32] {
        &self.rows[self.offsets[cluster]..self.offsets[cluster + 1]]
    }

    /// All rows, cluster by cluster.
    pub fn order(&self) -> &[u32] {
        &self.rows
    }

    /// Where each cluster starts in [`order`](Self::order), and where the last
    /// one ends.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// Numbers the rows by their place in [`order`](Self::order).
    pub(super) fn renumber(&mut self) {
        self.labels.sort_unstable();
        self.rows.iter_mut().enumerate().for_each(|(i, row)| *row = i as u32);
    }

    /// Rows by label.
    fn sort(&mut self) {
        self.offsets.fill(0);
        for &label in &self.labels {
            self.offsets[label as usize + 1] += 1;
        }
        for i in 1..self.offsets.len() {
            self.offsets[i] += self.offsets[i - 1];
        }
        // What is written moves each start on to the next one: back again.
        for (row, &label) in self.labels.iter().enumerate() {
            let at = &mut self.offsets[label as usize];
            self.rows[*at] = row as u32;
            *at += 1;
        }
        self.offsets.rotate_right(1);
        self.offsets[0] = 0;
    }

    /// For each cluster the mean of its rows of `x`, which may be others than
    /// those that were clustered; `to` stays as it is where there are none.
    pub(crate) fn means(&self, isa: Isa, x: AnyRows<'_>, to: &mut [f32]) {
        let dim = x.cols();
        let clusters = if dim == 0 { 0 } else { self.len() };
        let mut claims = vec![0; claim_words(clusters)];
        let parts = Parts::new(to, dim, &mut claims);
        let start = |_| (vec![0f32; dim], vec![0f64; dim]);
        parallel::for_each(parallel::threads(), clusters, start, |(row, sums), cluster| {
            let (rows, to) = (self.rows(cluster), parts.take(cluster));
            isa.dispatch(Mean { x, rows, row, sums, to });
        });
    }
}

/// The mean of some rows.
struct Mean<'a> {
    x: AnyRows<'a>,
    rows: &'a [u32],
    row: &'a mut [f32],
    sums: &'a mut [f64],
    to: &'a mut [f32],
}

impl Kernel for Mean<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, rows, row, sums, to } = self;
        if rows.is_empty() {
            return;
        }
        sums.fill(0.0);
        for &i in rows {
            x.part(i as usize..i as usize + 1).pack_rows(s, row, row.len());
            for (sum, &x) in sums.iter_mut().zip(&*row) {
                *sum += f64::from(x);
            }
        }
        let share = 1.0 / rows.len() as f64;
        for (to, sum) in to.iter_mut().zip(&*sums) {
            *to = (sum * share) as f32;
        }
    }
}

/// Numbers of `f32` that a thread of [`nearest`] works in: rows, room, scores.
fn sizes(isa: Isa, dim: usize, centers: usize) -> [usize; 3] {
    let apart = dim.next_multiple_of(isa.lanes());
    let stride = centers.next_multiple_of(64);
    [ROWS.saturating_mul(apart), score::room(dim), (ROWS + 1).saturating_mul(stride)]
}

/// Bytes of scratch that [`nearest`] works in.
pub(crate) fn nearest_bytes(isa: Isa, dim: usize, centers: usize, rows: usize) -> usize {
    let share =
        sizes(isa, dim, centers).into_iter().map(bytes_for::<f32>).fold(0usize, usize::saturating_add);
    bytes_for::<f32>(centers)
        .saturating_add(bytes_for::<u64>(claim_words(rows.div_ceil(ROWS))))
        .saturating_add(bytes_for_shares(parallel::threads(), share))
}

/// The nearest of `centers`, each of as many numbers as `x` has columns, to each
/// row of `x`: the lower one of equals. A row of which no distance is known (NaN)
/// gets the first.
pub(crate) fn nearest(isa: Isa, x: AnyRows<'_>, centers: &[f32], labels: &mut [u32], arena: &mut Arena<'_>) {
    let (n, dim) = (x.len(), x.cols());
    labels.fill(0);
    if dim == 0 || centers.len() <= dim {
        return;
    }
    let sizes = sizes(isa, dim, centers.len() / dim);
    // |x - c|^2 is least where x . c - |c|^2 / 2 is largest.
    let halves = arena.take::<f32>(centers.len() / dim);
    for (half, center) in halves.iter_mut().zip(centers.chunks_exact(dim)) {
        *half = (0.5 * center.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()) as f32;
    }
    let halves = &*halves;
    let tiles = n.div_ceil(ROWS);
    let claims = arena.take(claim_words(tiles));
    let share = sizes.into_iter().map(bytes_for::<f32>).sum();
    let workers = parallel::threads();
    let shares = arena.shares(workers, share);
    let parts = Parts::new(labels, ROWS, claims);
    let start = |worker: usize| {
        let mut arena = shares.take(worker);
        sizes.map(|n| arena.take::<f32>(n))
    };
    parallel::for_each(workers, tiles, start, |[rows, room, scores], tile| {
        let x = x.part(tile * ROWS..((tile + 1) * ROWS).min(n));
        let labels = parts.take(tile);
        isa.dispatch(Nearest { x, centers, halves, rows, room, scores, labels });
    });
}

/// A tile of [`nearest`].
struct Nearest<'a> {
    x: AnyRows<'a>,
    centers: &'a [f32],
    halves: &'a [f32],
    rows: &'a mut [f32],
    room: &'a mut [f32],
    scores: &'a mut [f32],
    labels: &'a mut [u32],
}

impl Kernel for Nearest<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, centers, halves, rows, room, scores, labels } = self;
        let (width, stride) = (x.cols(), halves.len().next_multiple_of(64));
        rows.fill(0.0);
        x.pack_rows(s, rows, width.next_multiple_of(S::LANES));
        s.vectorize(Scores {
            queries: rows,
            rows: x.len(),
            width,
            candidates: Candidates::Rows(rows_of(centers, halves.len(), width)),
            few: false,
            room,
            out: scores,
            stride,
        });
        for (label, scores) in labels.iter_mut().zip(scores.chunks(stride)) {
            *label = largest(s, &scores[..halves.len()], halves);
        }
    }
}

/// Where `x - y` is largest: the first such place.
#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32], y: &[f32]) -> u32 {
    let none = s.splat(f32::NEG_INFINITY);
    let mut lanes = [0.0; MAX_LANES];
    lanes.iter_mut().enumerate().for_each(|(i, lane)| *lane = i as f32);
    // Numbers of clusters are exact in f32.
    let (mut here, step) = (s.load(&lanes), s.splat(S::LANES as f32));
    let (mut top, mut at) = (none, here);
    for (x, y) in x.chunks(S::LANES).zip(y.chunks(S::LANES)) {
        let valid = s.mask(u64::MAX >> (64 - x.len()));
        let x = s.select(valid, s.sub(s.load_tail(x), s.load_tail(y)), none);
        let more = s.lt(top, x);
        (top, at) = (s.select(more, x, top), s.select(more, here, at));
        here = s.add(here, step);
    }
    let mut tops = [0.0; MAX_LANES];
    s.store(&mut tops, top);
    s.store(&mut lanes, at);
    let most = tops[..S::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let found =
        tops.iter().zip(lanes).take(S::LANES).filter(|(top, _)| **top == most).map(|(_, at)| at as u32);
    if most == f32::NEG_INFINITY { 0 } else { found.min().unwrap_or(0) }
}

/// Lowers `least` to the squared distances of the rows of `x` from `center`.
struct Lower<'a> {
    x: AnyRows<'a>,
    center: &'a [f32],
    row: &'a mut [f32],
    least: &'a mut [f32],
}

impl Kernel for Lower<'_> {
    /// Their sum.
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let Self { x, center, row, least } = self;
        let mut total = 0.0;
        for (i, least) in least.iter_mut().enumerate() {
            x.part(i..i + 1).pack_rows(s, row, row.len());
            let mut sum = s.splat(0.0);
            for (x, c) in row.chunks(S::LANES).zip(center.chunks(S::LANES)) {
                let off = s.sub(s.load_tail(x), s.load_tail(c));
                sum = s.mul_add(off, off, sum);
            }
            // A NaN is never near and never drawn.
            let distance = s.reduce_add(sum);
            *least = if distance < *least { distance } else { *least };
            total += if least.is_finite() { f64::from(*least) } else { 0.0 };
        }
        total
    }
}

impl KMeans {
    /// Most clusters: whole numbers up to it are exact in `f32`.
    const MOST: usize = 1 << 24;

    /// Checks the numbers.
    pub(crate) fn check(&self) -> Result<()> {
        for (name, n, most) in [("clusters", self.clusters, Self::MOST), ("rounds", self.rounds, usize::MAX)]
        {
            if n == 0 || n > most {
                return Err(Error::value(name, format!("from 1 to {most}"), n));
            }
        }
        Ok(())
    }

    /// Clusters the rows of a matrix of any strides.
    ///
    /// ```
    /// use attention_kernels::select::{KMeans, Seeding};
    /// use ndarray::Array2;
    ///
    /// let keys = Array2::from_shape_fn((100, 8), |(i, c)| (i % 4 * (c + 1)) as f32);
    /// let how = KMeans { clusters: 4, rounds: 10, seeding: Seeding::PlusPlus, seed: 0 };
    /// let clusters = how.cluster(keys.view())?;
    /// assert_eq!(clusters.labels()[1], clusters.labels()[5]);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Value`] for numbers of clusters or rounds that are out of range,
    /// [`Error::TooLarge`] where there is no memory.
    pub fn cluster<T: Element>(&self, rows: ArrayView2<'_, T>) -> Result<Clusters> {
        self.run(Isa::choose(None)?, T::any_rows(rows.into()), &mut Workspace::new())
    }

    /// The same on an instruction set, in a workspace.
    ///
    /// # Errors
    /// [`Error::Value`] for numbers of clusters or rounds that are out of range,
    /// [`Error::TooLarge`] where there is no memory.
    pub(crate) fn run(&self, isa: Isa, x: AnyRows<'_>, workspace: &mut Workspace) -> Result<Clusters> {
        self.check()?;
        let (n, dim) = (x.len(), x.cols());
        let k = self.clusters.min(n);
        let mut clusters = Clusters {
            dim,
            centers: filled(k.saturating_mul(dim), 0.0)?,
            labels: filled(n, 0)?,
            offsets: filled(k + 1, 0)?,
            rows: filled(n, 0)?,
        };
        self.seed(isa, x, &mut clusters)?;
        let mut labels = filled(n, u32::MAX)?;
        for _ in 0..self.rounds {
            let mut arena = workspace.arena(nearest_bytes(isa, dim, k, n))?;
            nearest(isa, x, &clusters.centers, &mut labels, &mut arena);
            std::mem::swap(&mut labels, &mut clusters.labels);
            clusters.sort();
            let mut centers = std::mem::take(&mut clusters.centers);
            clusters.means(isa, x, &mut centers);
            clusters.centers = centers;
            if labels == clusters.labels {
                break;
            }
        }
        Ok(clusters)
    }

    /// Puts the centers on rows.
    fn seed(&self, isa: Isa, x: AnyRows<'_>, clusters: &mut Clusters) -> Result<()> {
        let (n, dim, mut random) = (x.len(), x.cols(), Normal::new(self.seed));
        if dim == 0 || n == 0 {
            return Ok(());
        }
        let mut centers = clusters.centers.chunks_exact_mut(dim);
        let left = centers.len();
        if self.seeding == Seeding::Random {
            // Each row with the share of those wanted among those left.
            let mut wanted = left;
            for i in 0..n {
                if ((n - i) as f64 * random.unit()) < wanted as f64 {
                    wanted -= 1;
                    if let Some(center) = centers.next() {
                        isa.dispatch(super::Unpack { from: x.part(i..i + 1), to: center });
                    }
                }
            }
            return Ok(());
        }
        // Fixed blocks, so that sums do not depend on threads.
        const BLOCK: usize = 1024;
        let (mut least, blocks) = (filled(n, f32::INFINITY)?, n.div_ceil(BLOCK));
        let mut sums = filled(blocks, 0u64)?;
        let mut next = (n as f64 * random.unit()) as usize;
        for (i, center) in centers.enumerate() {
            isa.dispatch(super::Unpack { from: x.part(next..next + 1), to: center });
            if i + 1 == left {
                break;
            }
            let mut claims = [vec![0; claim_words(blocks)], vec![0; claim_words(blocks)]];
            let [a, b] = &mut claims;
            let (parts, totals) = (Parts::new(&mut least, BLOCK, a), Parts::new(&mut sums, 1, b));
            let (workers, center) = (parallel::threads_for(n.saturating_mul(dim) / 8), &*center);
            parallel::for_each(
                workers,
                blocks,
                |_| vec![0f32; dim],
                |row, block| {
                    let (x, least) = (x.part(block * BLOCK..((block + 1) * BLOCK).min(n)), parts.take(block));
                    totals.take(block)[0] = isa.dispatch(Lower { x, center, row, least }).to_bits();
                },
            );
            let sums = sums.iter().map(|&bits| f64::from_bits(bits));
            let mut rest = sums.clone().sum::<f64>() * random.unit();
            // Where all rows are centers, the last one again.
            next = n - 1;
            for (block, sum) in sums.enumerate() {
                if rest >= sum {
                    rest -= sum;
                    continue;
                }
                for (j, &distance) in least[block * BLOCK..].iter().take(BLOCK).enumerate() {
                    if distance > 0.0 && distance.is_finite() {
                        next = block * BLOCK + j;
                        rest -= f64::from(distance);
                        if rest < 0.0 {
                            break;
                        }
                    }
                }
                break;
            }
        }
        Ok(())
    }
}

/// So many elements, if there is memory for them.
fn filled<T: Clone>(n: usize, x: T) -> Result<Vec<T>> {
    let mut elements = Vec::new();
    reserve(&mut elements, n)?;
    elements.resize(n, x);
    Ok(elements)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::parallel::on_threads;

    /// `n` rows around as many corners of a cube, far from each other; all sums
    /// are exact.
    fn blobs(n: usize, dim: usize, corners: usize) -> Vec<f32> {
        let corner = |i: usize, c: usize| if (i * 5 % corners) >> c & 1 == 1 { 64.0 } else { -64.0 };
        let off = |i: usize, c: usize| ((i * 7 + c * 13) % 9) as f32 / 8.0;
        (0..n * dim).map(|at| corner(at / dim, at % dim) + off(at / dim, at % dim)).collect()
    }

    fn run(isa: Isa, how: &KMeans, x: &[f32], dim: usize) -> Clusters {
        how.run(isa, rows_of(x, x.len() / dim, dim), &mut Workspace::new()).unwrap()
    }

    #[test]
    fn far_blobs_are_found() {
        let (n, dim, corners) = (3000, 19, 8);
        let x = blobs(n, dim, corners);
        let how = KMeans { clusters: corners, rounds: 20, seeding: Seeding::PlusPlus, seed: 3 };
        for isa in Isa::available() {
            let found = run(isa, &how, &x, dim);
            assert_eq!(found.len(), corners);
            for i in 0..n {
                assert_eq!(
                    found.labels()[i],
                    found.labels()[(i + corners) % n / corners * corners + i % corners]
                );
            }
            let mut sizes: Vec<usize> = (0..corners).map(|c| found.rows(c).len()).collect();
            assert_eq!(sizes.iter().sum::<usize>(), n);
            sizes.sort_unstable();
            assert_eq!(sizes, [n / corners; 8]);
            for c in 0..corners {
                let rows = found.rows(c);
                assert!(rows.is_sorted());
                for at in 0..dim {
                    let sum: f64 = rows.iter().map(|&i| f64::from(x[i as usize * dim + at])).sum();
                    assert_eq!(found.centers()[c * dim + at], (sum / rows.len() as f64) as f32);
                }
            }
        }
    }

    /// Against all distances in `f64`; small integers, of which many are as far.
    #[test]
    fn the_nearest_center_is_the_first_of_the_nearest() {
        for (n, dim, k) in [(1, 1, 1), (100, 3, 7), (97, 20, 70), (49, 16, 64), (5, 33, 200)] {
            let number = |i: usize, step: usize| ((i * step) % 5) as f32 - 2.0;
            let x: Vec<f32> = (0..n * dim).map(|i| number(i, 7)).collect();
            let centers: Vec<f32> = (0..k * dim).map(|i| number(i + i / 11, 3)).collect();
            for isa in Isa::available() {
                let mut labels = vec![u32::MAX; n];
                let mut workspace = Workspace::with_capacity(nearest_bytes(isa, dim, k, n));
                let mut arena = workspace.arena(nearest_bytes(isa, dim, k, n)).unwrap();
                nearest(isa, rows_of(&x, n, dim), &centers, &mut labels, &mut arena);
                for (i, &label) in labels.iter().enumerate() {
                    let distance = |c: usize| {
                        let pairs = x[i * dim..][..dim].iter().zip(&centers[c * dim..]);
                        pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
                    };
                    let least = (0..k).map(distance).fold(f64::INFINITY, f64::min);
                    let want = (0..k).find(|&c| distance(c) == least).unwrap();
                    assert_eq!(label as usize, want, "{isa}, {n} {dim} {k}, row {i}");
                }
            }
        }
    }

    #[test]
    fn threads_change_nothing_and_rounds_bring_rows_nearer() {
        let (n, dim) = (2500, 24);
        let x: Vec<f32> = Normal::new(5).take(n * dim).map(|x| x as f32).collect();
        let isa = Isa::choose(None).unwrap();
        for seeding in [Seeding::Random, Seeding::PlusPlus] {
            let how = |rounds| KMeans { clusters: 40, rounds, seeding, seed: 1 };
            let one = on_threads(1, || run(isa, &how(4), &x, dim));
            assert_eq!(one, on_threads(3, || run(isa, &how(4), &x, dim)));
            let mut last = f64::INFINITY;
            for rounds in [1, 2, 8, 300] {
                let found = run(isa, &how(rounds), &x, dim);
                let far = |(i, &label): (usize, &u32)| {
                    let pairs = x[i * dim..][..dim].iter().zip(&found.centers()[label as usize * dim..]);
                    pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
                };
                let total: f64 = found.labels().iter().enumerate().map(far).sum();
                assert!(total < last, "{seeding:?}, {rounds} rounds: {total} after {last}");
                last = total;
            }
            assert_ne!(one, run(isa, &KMeans { seed: 2, ..how(4) }, &x, dim), "the seed has no say");
        }
    }

    #[test]
    fn fewer_rows_than_clusters_equal_rows_and_none() {
        let isa = Isa::choose(None).unwrap();
        for seeding in [Seeding::Random, Seeding::PlusPlus] {
            let how = KMeans { clusters: 9, rounds: 3, seeding, seed: 1 };
            let found = run(isa, &how, &blobs(4, 5, 4), 5);
            assert_eq!((found.len(), found.order().len()), (4, 4));
            let found = run(isa, &how, &[1.5; 60], 3);
            assert!(found.labels().iter().all(|&label| label == 0), "equal rows: the first of equals");
            assert_eq!(
                (found.rows(0).len(), found.rows(8).len(), &found.centers()[..3]),
                (20, 0, &[1.5; 3][..])
            );
            let none = how.run(isa, rows_of(&[], 0, 3), &mut Workspace::new()).unwrap();
            assert!(none.is_empty() && none.order().is_empty());
            let mut x = blobs(100, 5, 4);
            x[7] = f32::NAN;
            assert_eq!(run(isa, &how, &x, 5).order().len(), 100);
        }
        let none = KMeans { clusters: 0, rounds: 3, seeding: Seeding::Random, seed: 1 };
        let refusal = none.check().unwrap_err().to_string();
        assert!(refusal.starts_with("clusters: expected from 1 to "), "{refusal}");
        assert!(KMeans { clusters: 3, rounds: 0, ..none }.check().is_err());
    }
}
