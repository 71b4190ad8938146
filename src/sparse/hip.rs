//! HiP: blocks of keys found by halving ranges of them.

use ndarray::ArrayView2;

use crate::attention::Margins;
use crate::card::{carded, exhibit};
use crate::definition::select::chosen;
use crate::engine::workspace::{Workspace, room};
use crate::error::{Error, Result};
use crate::input::{Qkv, Sequence};
use crate::keys::{ATOM, Per, TokenLists};
use crate::score::Plain;
use crate::select::descent::{self, BestScores, descend};
use crate::select::finding::Search;
use crate::select::{Forced, Pick, Representative, Rule, Source, Unpack};
use crate::simd::MAX_LANES;
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::planned::{Exact, Planned, check_count, planned, sparse};

sparse! {
    /// HiP: blocks of keys found by halving ranges of them.
    ///
    /// ```text
    /// for a block of queries and the keys before its window, in blocks of b:
    ///   cut them into m ranges
    ///   until ranges are single blocks:
    ///     halve each range, and keep the m halves with the largest
    ///     max over every second query and the b keys of the representative of q . k
    /// the queries see these m blocks, the sinks before, and the window
    /// ```
    ///
    /// From "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention
    /// Pruning" (arXiv 2406.09827), in the form 1.1 of its code. Needs no training, and
    /// finds what neighbours resemble: a single key among others is missed as long as
    /// it stands for none of the ranges. Sinks are no candidates.
    ///
    /// Cost: for a block of queries `2 head_dim m b log2(kv_len / (m b))` flops for
    /// each of its sampled queries, twice; `2 (head_dim + value_dim)` a pair that is
    /// seen, whose number does not depend on the length.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, sparse::Hip};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let out = Hip::builder(128).window(64).build()?.forward(Qkv::new(x.view(), x.view(), x.view()))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    Hip;
    /// Builds a [`Hip`].
    HipBuilder, always causal;
    given {
        budget: usize;
    }
    own {
        /// Keys of a block, up to 64. Default: 2.
        block: usize = 2;
        /// Queries that see the same. Default: 64.
        q_block: usize = 64;
        /// Of the queries of a block one in so many is asked, from the second on.
        /// Default: 2.
        q_stride: usize = 2;
        /// Keys up to a block's last query that are seen in any case, at least as
        /// many as its queries. Default: 256.
        window: usize = 256;
        /// First keys that are. Default: 16.
        sink: usize = 16;
        /// Which block stands for a range. Default: the one in the middle.
        representative: Representative = Representative::Center;
    }
    check(this) {
        for (name, count) in [("budget", this.budget), ("q_block", this.q_block), ("q_stride", this.q_stride)] {
            check_count(name, count)?;
        }
        if !(1..=ATOM).contains(&this.block) {
            return Err(Error::value("block", format!("1 to {ATOM} keys"), this.block));
        }
        if this.window < this.q_block {
            return Err(Error::value("window", format!("at least {} keys", this.q_block), this.window));
        }
        Ok(())
    }
}

room! {
    /// What a thread works in.
    Scratch<'a>(d: usize, rows: usize, most: usize) {
        queries: f32 = rows.saturating_mul(d.saturating_add(MAX_LANES));
        best: descent::Best<'a> = (d, rows),
        tree: descent::Tree<'a> = (most)
    }
}

impl Hip {
    /// `budget` keys besides sinks and window.
    pub fn builder(budget: usize) -> HipBuilder {
        HipBuilder::with(budget)
    }

    /// Blocks that are found.
    fn most(&self) -> usize {
        self.budget.div_ceil(self.block)
    }

    /// The queries of a block that are asked.
    fn asked(&self, n: usize) -> impl Iterator<Item = usize> + use<> {
        (1.min(n.saturating_sub(1))..n).step_by(self.q_stride)
    }

    /// Where sinks end, candidates end and keys end, for queries up to one.
    fn ends(&self, of: &Sequence, end: usize) -> [usize; 3] {
        let end = (end + of.keys.len()).saturating_sub(of.queries.len());
        let candidates = end.saturating_sub(self.window);
        [self.sink.min(candidates), candidates, end]
    }

    /// Elements of a key, queries that are asked, and blocks that are found, of
    /// candidates as many as there can be.
    fn sizes(&self, source: &Source<'_>) -> [usize; 3] {
        let layout = source.layout_per(Per::Head, self.q_block);
        let rows = self.asked(self.q_block.min(layout.queries.max(1))).count();
        let fits = self.ends(&Sequence { queries: 0..0, keys: 0..layout.keys, ..SEQUENCE }, 0);
        let most = if fits[1] - fits[0] > self.budget { self.most() } else { 0 };
        [source.dims.head_dim, rows, most]
    }

    fn search<'a>(&self, source: &'a Source<'a>) -> Search<'a> {
        let [d, rows, most] = self.sizes(source);
        let layout = source.layout_per(Per::Head, self.q_block);
        Search { source, layout, unit: 1, share: Scratch::bytes(d, rows, most) }
    }

    /// The keys that some queries see by definition, and what is in doubt.
    fn define_block(
        &self,
        q: ArrayView2<'_, f64>,
        k: ArrayView2<'_, f64>,
        [sink, end, seen]: [usize; 3],
    ) -> [Vec<usize>; 2] {
        if end - sink <= self.budget {
            return [(0..seen).collect(), Vec::new()];
        }
        let (blocks, m) = ((end - sink).div_ceil(self.block), self.most());
        let keys = |block: usize| sink + block * self.block..(sink + (block + 1) * self.block).min(end);
        let mut ranges: Vec<_> = (0..m).map(|i| blocks * i / m..blocks * (i + 1) / m).collect();
        let (mut unsure, mut size) = (false, blocks as f64 / m as f64);
        while size > 1.0 {
            let halves = ranges.iter().flat_map(|range| {
                let middle = range.start + range.len() / 2;
                [range.start..middle, middle..range.end]
            });
            let halves: Vec<_> = halves.filter(|half| !half.is_empty()).collect();
            let score = |half: &std::ops::Range<usize>| {
                let block = self.representative.of(half.start, half.len());
                let most = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
                let products = self.asked(q.nrows()).flat_map(|i| keys(block).map(move |j| (i, j)));
                products.map(|(i, j)| q.row(i).dot(&k.row(j))).fold(f64::NEG_INFINITY, most)
            };
            let scores: Vec<f64> = halves.iter().map(score).collect();
            let pick = Pick { rule: Rule::TopK(m), forced: Forced::default() };
            let (ids, doubt) = chosen(&pick, &scores);
            // What one step gets wrong the next ones build on.
            let kept = doubt.iter().filter(|i| ids.contains(i)).count();
            unsure |= 0 < kept && kept < doubt.len();
            ranges = ids.into_iter().map(|i| halves[i].clone()).collect();
            size /= 2.0;
        }
        let found = ranges.into_iter().flat_map(|range| keys(range.start));
        let list = (0..sink).chain(found).chain(end..seen).collect();
        [list, if unsure { (sink..end).collect() } else { Vec::new() }]
    }
}

const SEQUENCE: Sequence = Sequence { index: 0, batch: 0, slot: 0, queries: 0..0, keys: 0..0 };

impl Planned for Hip {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn find_bytes(&self, source: &Source<'_>) -> Result<usize> {
        self.search(source).bytes()
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<TokenLists> {
        let ([d, rows, most], isa) = (self.sizes(source), source.isa);
        let apart = d.next_multiple_of(isa.lanes());
        let take = |arena: &mut _| Scratch::take(arena, d, rows, most);
        let found = self.search(source).by_block(workspace, take, |room, place, queries, lists| {
            let of = place.of;
            let [sink, end, seen] = self.ends(of, queries.end);
            if end - sink <= self.budget {
                return lists.extend(0..seen as u32);
            }
            let asked = self.asked(queries.len());
            let from = source.queries(of, place.head).part(queries);
            let mut rows = 0;
            for i in asked {
                let to = &mut room.queries[rows * apart..][..apart];
                to.fill(0.0);
                isa.dispatch(Unpack { from: from.part(i..i + 1), to });
                rows += 1;
            }
            let first = |block: u32| (sink + block as usize * self.block) as u32;
            let blocks = (end - sink).div_ceil(self.block);
            let (queries, best) = (&*room.queries, &mut room.best);
            let found =
                descend(isa, (blocks, most), self.representative, &mut room.tree, |blocks, scores| {
                    let mut firsts = [0; ATOM];
                    for (blocks, scores) in blocks.chunks(ATOM).zip(scores.chunks_mut(ATOM)) {
                        let firsts = &mut firsts[..blocks.len()];
                        firsts.iter_mut().zip(blocks).for_each(|(to, &block)| *to = first(block));
                        let (kv_head, unit) = (place.kv_head, self.block);
                        isa.dispatch(BestScores {
                            source,
                            of,
                            kv_head,
                            queries,
                            rows,
                            firsts,
                            unit,
                            end,
                            room: &mut *best,
                            scores,
                        });
                    }
                });
            lists.extend(0..sink as u32);
            for &block in found {
                lists.extend(first(block)..(first(block) + self.block as u32).min(end as u32));
            }
            lists.extend(end as u32..seen as u32);
        })?;
        found.tokens()
    }

    fn define_plan(&self, x: &Exact) -> Result<(TokenLists, Margins)> {
        x.plan((Per::Head, self.q_block), 1, |of, head| {
            let (q, k) = (x.q(of, head), x.k(of, head));
            let block = |first: usize| {
                let queries = first..(first + self.q_block).min(q.nrows());
                let ends = self.ends(of, queries.end);
                self.define_block(q.slice(ndarray::s![queries, ..]), k, ends)
            };
            (0..q.nrows()).step_by(self.q_block).map(block).collect()
        })
    }

    fn find_flops(&self, source: &Source<'_>) -> u64 {
        let ([d, rows, most], layout) = (self.sizes(source), source.layout_per(Per::Head, self.q_block));
        let levels = (layout.keys / (most * self.block).max(1)).max(1).ilog2() as u64 + 1;
        let lists = (layout.sequences * layout.q_heads * layout.blocks()) as u64;
        lists * levels * 4 * (most * self.block) as u64 * (rows * d) as u64
    }
}

planned!(Hip, TokenLists);
planned!(Hip, TokenLists, caches);

exhibit! {
    HipExhibit of Hip, "sparse", "HiP", "arXiv 2406.09827";
    "24 keys in pairs, found by halving ranges that their middles stand for, 4 sinks and a window of 32";
    not "where single keys matter that their neighbours do not announce";
    tokens false;
    build(_, _) { Hip::builder(24).q_block(16).window(32).sink(4) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Hip, HipExhibit);

#[cfg(test)]
mod tests;
