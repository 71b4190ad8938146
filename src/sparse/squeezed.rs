//! Squeezed attention: of a prefix that was clustered before, the clusters whose keys
//! are estimated to weigh enough.

use std::sync::Arc;

use ndarray::ArrayView2;

use crate::card::{carded, exhibit};
use crate::definition::select::chosen;
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Qkv, Sequence};
use crate::keys::TokenLists;
use crate::score::Plain;
use crate::select::lists::{join, lists};
use crate::select::prefix::{Room, each_run, mark};
use crate::select::{Forced, KMeans, Pick, Prefix, Rule, Seeding, Source};
use crate::simd::mem::{bytes_for, bytes_for_shares};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::searching::{Defined, Searching, searching};
use crate::stages::selecting::{selecting, sparse_options};

/// Squeezed attention: of a prefix that was clustered before, the clusters whose keys
/// are estimated to weigh enough.
///
/// ```text
/// c_i = mean of the n_i keys of cluster i
/// S_i = exp(scale q . c_i) / sum_j n_j exp(scale q . c_j), its mean over a block of queries
/// o   = softmax attention on the keys of clusters with S_i > threshold, and on all keys
///       after the clustered ones
/// ```
///
/// `sum_i n_i S_i = 1`: `S_i` is what each key of a cluster is estimated to weigh. From
/// "Squeezed Attention: Accelerating Long Context Length LLM Inference" (arXiv
/// 2411.09688), with one level of clusters; clusters, and the threshold that leaves out
/// a share of the keys, come from a [`Prefix`](crate::select::Prefix). For queries that
/// come after it. Each query head chooses for itself.
///
/// Cost of a query and head: `2 head_dim` flops a cluster, and `2 (head_dim +
/// value_dim)` a key that is seen. Keys and values that are
/// [arranged](crate::select::Prefix::arranged) are read in runs.
///
/// ```
/// use attention_kernels::select::{KMeans, Prefix, Seeding};
/// use attention_kernels::sparse::SqueezedAttention;
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let (head, window) = (x.slice(s![.., .., ..400, ..]), x.slice(s![.., .., 300..400, ..]));
/// let how = KMeans { clusters: 20, rounds: 300, seeding: Seeding::PlusPlus, seed: 0 };
/// let prefix = Prefix::of(Qkv::new(head, head, head), &how, 100)?;
/// let threshold = prefix.threshold(Qkv::new(window, head, head), 0.25, 0.9)?; // a tenth of the keys
/// let squeezed = SqueezedAttention::builder(threshold, prefix.into()).causal().build()?;
/// let out = squeezed.forward(Qkv::new(x.slice(s![.., .., 400.., ..]), x.view(), x.view()))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SqueezedAttention {
    config: Config<Order, Plain>,
    threshold: f32,
    block: usize,
    prefix: Arc<Prefix>,
}

/// Builds a [`SqueezedAttention`].
#[derive(Clone, Debug)]
pub struct SqueezedBuilder {
    options: Options<Order, Plain>,
    threshold: f32,
    block: usize,
    prefix: Arc<Prefix>,
}

impl SqueezedAttention {
    /// Clusters of a prefix whose keys are estimated to weigh more than a threshold.
    pub fn builder(threshold: f32, prefix: Arc<Prefix>) -> SqueezedBuilder {
        SqueezedBuilder { options: Options::default(), threshold, block: 64, prefix }
    }
}

sparse_options!(SqueezedBuilder);

impl SqueezedBuilder {
    /// Queries that choose together, by their mean. Default: 64.
    pub fn block(self, queries: usize) -> Self {
        Self { block: queries, ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a threshold that is NaN, blocks of 0 queries or a scale that
    /// is not finite, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<SqueezedAttention> {
        let Self { options, threshold, block, prefix } = self;
        if threshold.is_nan() {
            return Err(Error::value("threshold", "a number", threshold));
        }
        if block == 0 {
            return Err(Error::value("block", "at least 1 query", 0));
        }
        Ok(SqueezedAttention { config: options.build()?, threshold, block, prefix })
    }
}

impl Searching for SqueezedAttention {
    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn q_block(&self) -> usize {
        self.block
    }

    fn check(&self, source: &Source<'_>) -> Result<()> {
        self.prefix.check(source)?;
        let after = (0..source.dims.batch).map(|i| source.sequence(i));
        let mut after = after.map(|x| (x.queries.len(), x.keys.len() - self.prefix.keys()[x.index]));
        match after.find(|&(queries, after)| self.config.mask().causal && queries > after) {
            Some((queries, after)) => {
                let expected =
                    format!("at most as many causal queries as keys that are in no cluster, {after}");
                Err(Error::value("q", expected, queries))
            }
            None => Ok(()),
        }
    }

    fn find_bytes(&self, source: &Source<'_>) -> usize {
        let bits = bytes_for::<u64>(source.layout(1).keys.div_ceil(64));
        bytes_for_shares(parallel::threads(), bits.saturating_add(Room::bytes(&self.prefix.sizes(source))))
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<TokenLists> {
        let (sizes, scale) = (self.prefix.sizes(source), self.config.scale(&source.dims) as f32);
        let words = source.layout(1).keys.div_ceil(64);
        let share = bytes_for::<u64>(words) + Room::bytes(&sizes);
        let shares = workspace.arena(self.find_bytes(source))?.shares(parallel::threads(), share);
        let start = |worker: usize| {
            let mut arena = shares.take(worker);
            (arena.take::<u64>(words), Room::take(&mut arena, &sizes))
        };
        lists(source, source.layout(self.block), start, |(bits, room), block, runs| {
            let clusters = self.prefix.clusters(block.sequence.index, block.kv_head);
            bits.fill(0);
            for (i, &weight) in self.prefix.estimate(source, block, scale, room).iter().enumerate() {
                if weight > self.threshold {
                    mark(bits, clusters.rows(i));
                }
            }
            each_run(bits, |range| join(runs, range));
            join(runs, self.prefix.keys()[block.sequence.index]..block.sequence.keys.len());
        })
    }

    fn define_list(
        &self,
        (sequence, kv_head): (&Sequence, usize),
        queries: ArrayView2<'_, f64>,
        keys: ArrayView2<'_, f64>,
    ) -> Defined {
        let (clusters, d) = (self.prefix.clusters(sequence.index, kv_head), keys.ncols());
        let scale = self.config.scale_of(d);
        let mean = |rows: &[u32], c: usize| {
            rows.iter().map(|&j| keys[[j as usize, c]]).sum::<f64>() / rows.len() as f64
        };
        let rows: Vec<&[u32]> = (0..clusters.len()).map(|i| clusters.rows(i)).collect();
        let centers: Vec<Vec<f64>> =
            rows.iter().map(|rows| (0..d).map(|c| mean(rows, c)).collect()).collect();
        // Of a cluster of which no query has a score nothing is known.
        let mut weights: Vec<Option<f64>> = rows.iter().map(|rows| rows.is_empty().then_some(0.0)).collect();
        for query in queries.rows() {
            let score = |center: &Vec<f64>| scale * query.iter().zip(center).map(|(q, c)| q * c).sum::<f64>();
            let scores: Vec<f64> = centers.iter().map(score).collect();
            let known = |i: &usize| !rows[*i].is_empty() && !scores[*i].is_nan();
            let known: Vec<usize> = (0..rows.len()).filter(known).collect();
            let most = known.iter().map(|&i| scores[i]).fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = known.iter().map(|&i| rows[i].len() as f64 * (scores[i] - most).exp()).sum();
            for i in known {
                let weight = (scores[i] - most).exp() / total / queries.nrows() as f64;
                weights[i] = Some(weights[i].unwrap_or(0.0) + weight).filter(|x| !x.is_nan()).or(weights[i]);
            }
        }
        let weights: Vec<f64> = weights.into_iter().map(|weight| weight.unwrap_or(f64::NAN)).collect();
        let pick = Pick { rule: Rule::Threshold(self.threshold), forced: Forced::default() };
        let (chosen, doubtful) = chosen(&pick, &weights);
        let mut seen: Vec<usize> = chosen.iter().flat_map(|&i| rows[i]).map(|&j| j as usize).collect();
        seen.sort_unstable();
        seen.extend(self.prefix.keys()[sequence.index]..keys.nrows());
        let mut doubtful: Vec<usize> = doubtful.iter().flat_map(|&i| rows[i]).map(|&j| j as usize).collect();
        doubtful.sort_unstable();
        (seen, doubtful.into_iter().map(|j| j..j + 1).collect())
    }

    fn search_flops(&self, source: &Source<'_>, sequence: &Sequence) -> u64 {
        let clusters = (0..source.dims.kv_heads).map(|h| self.prefix.clusters(sequence.index, h).len()).max();
        2 * (clusters.unwrap_or(0) * source.dims.head_dim) as u64
    }
}

searching!(SqueezedAttention);
selecting!(SqueezedAttention, TokenLists, [Q, K, O] Qkv);
selecting!(SqueezedAttention, TokenLists, caches);

exhibit! {
    SqueezedExhibit of SqueezedAttention, "sparse", "Squeezed Attention", "arXiv 2411.09688";
    "the last 16 keys, and of the 12 clusters of those before the ones estimated to weigh more than 0.5 %";
    not "where there is no long prefix that many queries share: clustering it costs more than they save";
    tokens false;
    build(x, _) {
        let how = KMeans { clusters: 12, rounds: 10, seeding: Seeding::PlusPlus, seed: 0 };
        SqueezedAttention::builder(0.005, Prefix::of(x.reborrow(), &how, 16)?.into()).block(1)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(SqueezedAttention, SqueezedExhibit);

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays};

    fn prefix(x: &Arrays, clusters: usize) -> Arc<Prefix> {
        let how = KMeans { clusters, rounds: 30, seeding: Seeding::PlusPlus, seed: 1 };
        Prefix::of(x.qkv(), &how, 20).unwrap().into()
    }

    fn squeezed(threshold: f32, prefix: &Arc<Prefix>) -> SqueezedBuilder {
        SqueezedAttention::builder(threshold, prefix.clone())
    }

    #[test]
    fn blocks_are_their_definition_and_no_threshold_is_dense() {
        for (i, sizes) in [[2, 4, 2, 30, 200, 24, 12], [1, 2, 1, 70, 90, 9, 4], [1, 1, 1, 3, 12, 8, 4]]
            .into_iter()
            .enumerate()
        {
            let x = Arrays::normal(sizes, i as u64);
            let of = prefix(&x, 12);
            for block in [1, 7, 64] {
                let some = squeezed(0.005, &of).block(block).build().unwrap();
                let ((want, margins), got) =
                    (some.reference_select(x.qkv()).unwrap(), some.select(x.qkv()).unwrap());
                assert_eq!(
                    <SqueezedAttention as Selects<Qkv<'_, f32>>>::difference(&got, &want, &margins),
                    None
                );
                let want = some.reference_on(x.qkv(), &got).unwrap().mapv(|x| x as f32);
                testing::near("definition", &some.forward(x.qkv()).unwrap(), &want);
                let all = squeezed(-1.0, &of).block(block).build().unwrap().forward(x.qkv()).unwrap();
                testing::near("all", &all, &Dense::builder().build().unwrap().forward(x.qkv()).unwrap());
            }
        }
        let x = Arrays::normal([2, 4, 2, 200, 200, 24, 12], 5);
        testing::kept_mass_bounds_the_error_of(&squeezed(0.005, &prefix(&x, 12)).build().unwrap(), &x, false);
    }

    /// Where each key is a cluster, an estimate is the weight itself.
    #[test]
    fn clusters_of_one_key_are_exact() {
        let x = Arrays::normal([1, 2, 1, 9, 80, 16, 4], 1);
        let of = prefix(&x, 60);
        let index = squeezed(0.02, &of).block(1).build().unwrap().select(x.qkv()).unwrap();
        for (h, i) in (0..2).flat_map(|h| (0..9).map(move |i| (h, i))) {
            let score = |j: usize| {
                let (q, k) = (x.q.slice(s![0, h, i, ..]), x.k.slice(s![0, 0, j, ..]));
                0.25 * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>()
            };
            let total: f32 = (0..60).map(|j| score(j).exp()).sum();
            let want: Vec<usize> = (0..80).filter(|&j| j >= 60 || score(j).exp() / total > 0.02).collect();
            let got: Vec<usize> = index.runs(0, h, i).iter().flat_map(|run| run.range()).collect();
            assert_eq!(got, want);
        }
    }

    #[test]
    fn higher_thresholds_see_less_and_calibration_leaves_out_a_share() {
        let x = Arrays::normal([1, 2, 1, 20, 220, 16, 4], 2);
        let of = prefix(&x, 40);
        let index = |threshold| squeezed(threshold, &of).block(20).build().unwrap().select(x.qkv()).unwrap();
        let (mut last, mut sizes) = (index(-1.0), Vec::new());
        for share in [0.0, 0.5, 0.7, 0.9, 1.0] {
            let next = index(of.threshold(x.qkv(), 0.25, share).unwrap());
            for h in 0..2 {
                let keys: Vec<usize> = next.runs(0, h, 0).iter().flat_map(|run| run.range()).collect();
                let more: Vec<usize> = last.runs(0, h, 0).iter().flat_map(|run| run.range()).collect();
                assert!(keys.iter().all(|j| more.contains(j)));
            }
            sizes.push(next.keys(0, 0, 0) + next.keys(0, 1, 0) - 40);
            last = next;
        }
        assert_eq!((sizes[0], sizes[4]), (400, 0));
        // A cluster more or less.
        for (size, share) in sizes.into_iter().zip([0.0, 0.5, 0.7, 0.9, 1.0]) {
            assert!((size as f64 - 400.0 * (1.0 - share)).abs() < 40.0, "{size} of 400 at {share}");
        }
        assert!(of.threshold(x.qkv(), 0.25, 1.5).is_err());
    }

    #[test]
    fn arranged_keys_give_the_same_in_runs_and_caches_are_arrays() {
        let x = Arrays::normal([2, 4, 2, 5, 200, 24, 12], 3);
        let of = prefix(&x, 12);
        let some = squeezed(0.005, &of).causal().build().unwrap();
        let y = Arrays {
            k: of.arranged(x.k.view()).unwrap(),
            v: of.arranged(x.v.view()).unwrap(),
            q: x.q.clone(),
        };
        let sorted = squeezed(0.005, &of.sorted().into()).causal().build().unwrap();
        testing::near("arranged", &sorted.forward(y.qkv()).unwrap(), &some.forward(x.qkv()).unwrap());
        assert!(sorted.select(y.qkv()).unwrap().runs(0, 0, 0).len() <= 13);
        testing::indices_of_caches_are_those_of_arrays(&some, &x);
        assert!(of.arranged(x.q.view()).is_err());
    }

    #[test]
    fn refusals() {
        let x = Arrays::normal([1, 2, 1, 30, 100, 8, 4], 4);
        let of = prefix(&x, 5);
        let refusal = |builder: SqueezedBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(squeezed(f32::NAN, &of)), "threshold: expected a number, got NaN");
        assert_eq!(refusal(squeezed(0.1, &of).block(0)), "block: expected at least 1 query, got 0");
        let causal = squeezed(0.1, &of).causal().build().unwrap();
        let refusal = causal.forward(x.qkv()).unwrap_err().to_string();
        assert_eq!(
            refusal,
            "q: expected at most as many causal queries as keys that are in no cluster, 20, got 30"
        );
        let other = Arrays::normal([1, 2, 1, 3, 70, 8, 4], 4);
        let refusal = causal.forward(other.qkv()).unwrap_err().to_string();
        assert!(
            refusal.starts_with("prefix: expected 1 key/value heads of 8 channels, with at least [80]"),
            "{refusal}"
        );
    }
}
