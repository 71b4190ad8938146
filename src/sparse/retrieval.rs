//! RetrievalAttention: decoding on the keys that a search by highest product finds.

use std::sync::Arc;

use ndarray::ArrayView2;

use crate::card::{carded, exhibit};
use crate::definition::search::{Walk, best, walk};
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Qkv, Sequence};
use crate::keys::TokenLists;
use crate::score::Plain;
use crate::select::lists::{join, lists};
use crate::select::search::{Found, Sizes};
use crate::select::{Neighbours, Search, Source};
use crate::simd::mem::{bytes_for, bytes_for_shares};
use crate::stages::attend::{Config, Options};
use crate::stages::listed::Order;
use crate::stages::searching::{Defined, Searching, searching};
use crate::stages::selecting::{selecting, sparse_options};

/// RetrievalAttention: decoding on the keys that a search by highest product finds.
///
/// ```text
/// S_h = the first keys, the last ones, and of those between the k that the index
///       finds for q_h
/// o_h = softmax attention of q_h on S_h
/// ```
///
/// One softmax over `S_h` is what the paper merges from two. From "RetrievalAttention:
/// Accelerating Long-Context LLM Inference via Vector Retrieval" (arXiv 2409.10516);
/// the index is flat, by clusters, or a graph that is built from the prompt's queries,
/// which lie elsewhere than keys: see [`Search`](crate::select::Search). Keys that have
/// left the last ones since the index was built are all scored. An index is built
/// once, of a prompt. For queries that come after it: of those that are between the
/// first keys and the last ones all are seen.
///
/// Cost of a query and head: `2 head_dim` flops a key that is scored (flat: all; by
/// clusters: the centers, and the keys of those that are probed; graph: those met on
/// the way), and `2 (head_dim + value_dim)` a key of `S_h`.
///
/// ```
/// use attention_kernels::select::{Neighbours, Search};
/// use attention_kernels::sparse::RetrievalAttention;
/// use attention_kernels::{Attention, Qkv};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let prompt = x.slice(s![.., .., ..400, ..]);
/// let search = Search::Ivf { lists: 20, probes: 4 };
/// let index = Neighbours::of(Qkv::new(prompt, prompt, prompt), search, 4, 32)?;
/// let retrieval = RetrievalAttention::builder(50, index.into()).build()?;
/// for n in 401..410 {
///     let keys = x.slice(s![.., .., ..n, ..]);
///     let out = retrieval.forward(Qkv::new(x.slice(s![.., .., n - 1..n, ..]), keys, keys))?;
/// }
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RetrievalAttention {
    config: Config<Order, Plain>,
    k: usize,
    of: Arc<Neighbours>,
}

/// Builds a [`RetrievalAttention`].
#[derive(Clone, Debug)]
pub struct RetrievalBuilder {
    options: Options<Order, Plain>,
    k: usize,
    of: Arc<Neighbours>,
}

impl RetrievalAttention {
    /// `k` keys besides the first and the last ones, by an index.
    pub fn builder(k: usize, index: Arc<Neighbours>) -> RetrievalBuilder {
        RetrievalBuilder { options: Options::default(), k, of: index }
    }
}

sparse_options!(RetrievalBuilder);

impl RetrievalBuilder {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for `k` of 0 or a scale that is not finite, [`Error::Isa`] for
    /// an instruction set that the CPU lacks.
    pub fn build(self) -> Result<RetrievalAttention> {
        if self.k == 0 {
            return Err(Error::value("k", "at least 1 key", 0));
        }
        Ok(RetrievalAttention { config: self.options.build()?, k: self.k, of: self.of })
    }
}

impl RetrievalAttention {
    /// Where the keys that are searched end, and the last ones begin.
    fn middle(&self, sequence: &Sequence) -> usize {
        let end = self.of.spans()[sequence.index].end;
        sequence.keys.len().saturating_sub(self.of.local()).max(end)
    }
}

impl Searching for RetrievalAttention {
    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn check(&self, source: &Source<'_>) -> Result<()> {
        self.of.check(source)?;
        let most = (0..source.dims.batch)
            .map(|i| source.sequence(i))
            .map(|x| (x.queries.len(), x.keys.len() - self.middle(&x)));
        match most.into_iter().find(|&(queries, last)| self.config.mask().causal && queries > last) {
            Some((queries, last)) => {
                let expected = format!("at most as many causal queries as there are last keys, {last}");
                Err(Error::value("q", expected, queries))
            }
            None => Ok(()),
        }
    }

    fn find_bytes(&self, source: &Source<'_>) -> usize {
        let query = bytes_for::<f32>(source.dims.head_dim.next_multiple_of(source.isa.lanes()));
        bytes_for_shares(
            parallel::threads(),
            query.saturating_add(Sizes::new(&self.of, self.k, source).bytes()),
        )
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<TokenLists> {
        let sizes = Sizes::new(&self.of, self.k, source);
        let width = source.dims.head_dim.next_multiple_of(source.isa.lanes());
        let shares = workspace
            .arena(self.find_bytes(source))?
            .shares(parallel::threads(), bytes_for::<f32>(width) + sizes.bytes());
        let start = |worker: usize| {
            let mut arena = shares.take(worker);
            (arena.take::<f32>(width), sizes.take(&mut arena), Vec::new())
        };
        lists(source, source.layout(1), start, |(query, room, found), block, runs| {
            let span = &self.of.spans()[block.sequence.index];
            source.query(block.sequence, block.head, block.rows.start, query);
            found.clear();
            self.of.find(source, (block.sequence, block.kv_head), query, self.k, room, found);
            join(runs, 0..span.start);
            found.iter().for_each(|&key| join(runs, key as usize..key as usize + 1));
            join(runs, self.middle(block.sequence)..block.sequence.keys.len());
        })
    }

    fn define_list(
        &self,
        (sequence, kv_head): (&Sequence, usize),
        queries: ArrayView2<'_, f64>,
        keys: ArrayView2<'_, f64>,
    ) -> Defined {
        let (span, middle, n) = (&self.of.spans()[sequence.index], self.middle(sequence), keys.nrows());
        let query = queries.row(0);
        let score = |j: usize| query.iter().zip(keys.row(j)).map(|(q, k)| q * k).sum::<f64>();
        let (mut among, mut sure) = (Vec::new(), true);
        match (self.of.head(sequence.index, kv_head), self.of.search()) {
            (Found::Clusters(clusters), Search::Ivf { probes, .. }) => {
                let centers = clusters.centers().chunks(keys.ncols().max(1));
                let scores =
                    centers.map(|c| query.iter().zip(c).map(|(q, &c)| q * f64::from(c)).sum::<f64>());
                let scores: Vec<f64> =
                    if keys.ncols() == 0 { vec![0.0; clusters.len()] } else { scores.collect() };
                let (lists, doubtful) = best(&scores, probes);
                sure = doubtful.len() < 2;
                among.extend(
                    lists.iter().flat_map(|&list| clusters.rows(list)).map(|&j| span.start + j as usize),
                );
            }
            (Found::Graph(graph), Search::Graph { pool, .. }) => {
                let edges = |j: usize| graph.edges(j).iter().map(|&j| j as usize).collect();
                let how = Walk { entry: graph.entry(), pool: pool.max(self.k), keys: span.len() };
                let (met, certain) = walk(&how, edges, |j| score(span.start + j));
                sure = certain;
                among.extend(met.into_iter().take(self.k).map(|j| span.start + j));
            }
            _ => among.extend(span.clone()),
        }
        among.extend(span.end..middle);
        among.retain(|&j| !score(j).is_nan());
        among.sort_unstable();
        let scores: Vec<f64> = among.iter().map(|&j| score(j)).collect();
        let (chosen, doubtful) = best(&scores, self.k);
        let seen = (0..span.start).chain(chosen.into_iter().map(|i| among[i])).chain(middle..n).collect();
        let mut doubtful: Vec<_> = doubtful.into_iter().map(|i| among[i]..among[i] + 1).collect();
        if !sure {
            doubtful.push(span.start..middle);
        }
        (seen, doubtful)
    }

    fn search_flops(&self, source: &Source<'_>, sequence: &Sequence) -> u64 {
        let span = &self.of.spans()[sequence.index];
        let scored = match self.of.search() {
            Search::Flat => span.len(),
            // About: clusters have as many keys as others, and a walk meets all
            // neighbours of its pool.
            Search::Ivf { lists, probes } => lists.min(span.len()) + span.len() * probes.min(lists) / lists,
            Search::Graph { degree, pool, .. } => (degree * pool.max(self.k)).min(span.len()),
        };
        2 * ((scored + self.middle(sequence) - span.end) * source.dims.head_dim) as u64
    }
}

searching!(RetrievalAttention);
selecting!(RetrievalAttention, TokenLists, [Q, K, O] Qkv);
selecting!(RetrievalAttention, TokenLists, caches);

exhibit! {
    RetrievalExhibit of RetrievalAttention, "sparse", "RetrievalAttention", "arXiv 2409.10516";
    "4 first keys, the last 16, and of those between 32 that an index of 9 clusters finds in 3 of them";
    not "for short prompts: the index costs more than it saves, and a flat search reads all keys";
    tokens false;
    build(x, _) {
        let index = Neighbours::of(x.reborrow(), Search::Ivf { lists: 9, probes: 3 }, 4, 16)?;
        RetrievalAttention::builder(32, index.into())
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(RetrievalAttention, RetrievalExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Array4, Axis, s};

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays};

    const SEARCHES: [Search; 4] = [
        Search::Flat,
        Search::Ivf { lists: 9, probes: 3 },
        Search::Ivf { lists: 9, probes: 9 },
        Search::Graph { nearest: 10, degree: 6, build_pool: 12, pool: 24 },
    ];

    fn over(x: &Arrays, search: Search, k: usize) -> RetrievalAttention {
        let index = Neighbours::of(x.qkv(), search, 5, 20).unwrap();
        RetrievalAttention::builder(k, index.into()).build().unwrap()
    }

    #[test]
    fn searches_are_their_definitions() {
        for (i, search) in SEARCHES.into_iter().enumerate() {
            for sizes in [
                [2, 4, 2, 30, 200, 24, 12],
                [1, 2, 1, 5, 70, 9, 4],
                [1, 1, 1, 3, 22, 8, 4],
                [1, 2, 1, 3, 4, 8, 4],
            ] {
                let x = Arrays::integers(sizes, i as u64);
                let retrieval = over(&x, search, 20);
                let (want, _) = retrieval.reference_select(x.qkv()).unwrap();
                let got = retrieval.select(x.qkv()).unwrap();
                assert_eq!(got, want, "{search:?}, {sizes:?}");
                let (out, want) =
                    (retrieval.forward(x.qkv()).unwrap(), retrieval.reference(x.qkv()).unwrap());
                testing::near("definition", &out, &want.mapv(|x| x as f32));
            }
        }
        for search in [SEARCHES[0], SEARCHES[2]] {
            let x = Arrays::integers([2, 4, 2, 30, 200, 24, 12], 9);
            assert_eq!(
                over(&x, search, 20).select(x.qkv()).unwrap(),
                over(&x, Search::Flat, 20).select(x.qkv()).unwrap()
            );
        }
    }

    #[test]
    fn all_keys_are_dense_and_a_whole_pool_is_exact() {
        let x = Arrays::normal([2, 4, 2, 3, 200, 24, 12], 1);
        let want = Dense::builder().build().unwrap().forward(x.qkv()).unwrap();
        let whole = Search::Graph { nearest: 10, degree: 6, build_pool: 12, pool: 200 };
        for search in [Search::Flat, Search::Ivf { lists: 9, probes: 9 }, whole] {
            testing::near("all", &over(&x, search, 1000).forward(x.qkv()).unwrap(), &want);
        }
        let exact = over(&x, Search::Flat, 20).select(x.qkv()).unwrap();
        assert_eq!(over(&x, whole, 20).select(x.qkv()).unwrap(), exact, "every key can be reached");
        testing::kept_mass_bounds_the_error_of(&over(&x, Search::Flat, 5), &x, false);
    }

    /// Queries as far from all keys as in models: a graph that was built from such
    /// ones finds more than one that was built from the keys, for as many looks.
    #[test]
    fn a_graph_of_queries_finds_more_for_queries() {
        let mut x = Arrays::normal([1, 2, 2, 400, 1500, 16, 4], 2);
        let shift = Array4::from_shape_fn((1, 2, 1, 16), |(_, h, _, c)| ((3 * h + 5 * c) as f32).sin() * 3.0);
        x.q = &x.q * 0.5 + &shift;
        let (built, asked) = (x.q.slice(s![.., .., ..350, ..]), x.q.slice(s![.., .., 350.., ..]));
        let search = Search::Graph { nearest: 30, degree: 8, build_pool: 20, pool: 40 };
        let found = |built| {
            let index = Neighbours::of(Qkv::new(built, x.k.view(), x.v.view()), search, 0, 0).unwrap();
            let exact = Neighbours::of(Qkv::new(built, x.k.view(), x.v.view()), Search::Flat, 0, 0).unwrap();
            let [index, exact] = [index, exact].map(|of| {
                let of = RetrievalAttention::builder(20, of.into()).build().unwrap();
                of.select(Qkv::new(asked, x.k.view(), x.v.view())).unwrap()
            });
            let keys = |of: &TokenLists, h: usize, i: usize| -> Vec<usize> {
                of.runs(0, h, i).iter().flat_map(|run| run.range()).collect()
            };
            let rows = (0..2).flat_map(|h| (0..50).map(move |i| (h, i)));
            rows.map(|(h, i)| keys(&index, h, i).iter().filter(|j| keys(&exact, h, i).contains(j)).count())
                .sum::<usize>()
        };
        let (of_queries, of_keys) = (found(built), found(x.k.slice(s![.., .., ..350, ..])));
        assert!(of_queries > of_keys && of_queries > 1600, "{of_queries} and {of_keys} of 2000");
    }

    /// An index of 150 keys, over caches that have grown since.
    #[test]
    fn keys_that_come_later_are_searched_and_caches_are_arrays() {
        for search in SEARCHES {
            let x = Arrays::integers([2, 4, 2, 3, 200, 24, 12], 3);
            let part = |x: &Array4<f32>, n: usize| x.slice(s![.., .., ..n, ..]).to_owned();
            let prompt = Arrays { q: x.q.clone(), k: part(&x.k, 150), v: part(&x.v, 150) };
            let retrieval = over(&prompt, search, 20);
            testing::indices_of_caches_are_those_of_arrays(&retrieval, &x);
            let index = retrieval.select(x.qkv()).unwrap();
            assert_eq!(index, retrieval.reference_select(x.qkv()).unwrap().0);
            let last = index.runs(1, 2, 2).last().unwrap().range();
            assert!(last.start <= 180 && last.end == 200);
        }
    }

    #[test]
    fn refusals() {
        let x = Arrays::normal([1, 2, 1, 30, 100, 8, 4], 4);
        let refusal = |search| Neighbours::of(x.qkv(), search, 5, 20).unwrap_err().to_string();
        assert_eq!(refusal(Search::Ivf { lists: 3, probes: 0 }), "probes: expected at least 1, got 0");
        assert_eq!(refusal(Search::Ivf { lists: 0, probes: 1 }), "lists: expected at least 1, got 0");
        let index = Arc::new(Neighbours::of(x.qkv(), Search::Flat, 5, 20).unwrap());
        assert_eq!(
            RetrievalAttention::builder(0, index.clone()).build().unwrap_err().to_string(),
            "k: expected at least 1 key, got 0"
        );
        let causal = RetrievalAttention::builder(9, index.clone()).causal().build().unwrap();
        let refusal = causal.forward(x.qkv()).unwrap_err().to_string();
        assert_eq!(refusal, "q: expected at most as many causal queries as there are last keys, 20, got 30");
        let fewer =
            Arrays { k: x.k.select(Axis(2), &[0, 1, 2]), v: x.v.select(Axis(2), &[0, 1, 2]), q: x.q.clone() };
        let refusal = causal.forward(fewer.qkv()).unwrap_err().to_string();
        assert!(
            refusal
                .starts_with("neighbours: expected 1 key/value heads of 8 channels, with at least [80] keys"),
            "{refusal}"
        );
    }
}
