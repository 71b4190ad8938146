//! FlexPrefill: each head takes the sparse pattern that its last queries show.

use ndarray::{ArrayView2, s};

use crate::attention::{Margins, SELECTION_MARGIN};
use crate::card::{carded, exhibit};
use crate::definition::select::{highest, means, weights, within};
use crate::engine::workspace::{Workspace, room};
use crate::error::{Error, Result};
use crate::input::{Qkv, Sequence};
use crate::keys::{BlockLists, Per};
use crate::score::Plain;
use crate::select::finding::{Lists, Place, Search};
use crate::select::probe::{self, Probe};
use crate::select::score::Candidates;
use crate::select::{Forced, Pick, Rule, Source, Summary, cover, pick, rows_of, summaries};
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::planned::{Exact, Planned, check_block, planned, sparse};

sparse! {
    /// FlexPrefill: each head takes the sparse pattern that its last queries show.
    ///
    /// ```text
    /// P   = softmax(c R K^T), causal, of the last block of queries R
    /// v_j = mean_r P_rj        s_d = mean_r P_{r, position of r - d}
    /// a   = softmax_b(c mean(R) . mean of the keys of block b)
    /// a head is query-aware if  sqrt(JS(a, v summed over blocks)) < tau
    ///
    /// else:  block i sees block j if j is in V or i - j in D: the blocks with the
    ///        largest sums of v, and of s, block 0 and distance 0 among them, one
    ///        more than the tokens that cover the share gamma would fill
    /// aware: the same with the smallest budget, and of
    ///        M_ij = softmax_{j <= i}(c mean(q of block i) . mean(k of block j))
    ///        the largest, of all rows together, that sum to at most gamma rows
    /// ```
    ///
    /// From "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient
    /// Long-Sequence Inference" (arXiv 2502.20766), as its code has it. Blocks of
    /// distances end at the last key. The first query sits at a whole number of
    /// blocks; a sequence of which that is not true, of fewer queries than a block, or
    /// too short sees all: decoding is dense. Which keys a query sees depends on
    /// queries and keys after it.
    ///
    /// Cost: `2 block head_dim kv_len` flops a head for the probe, `2 head_dim` a
    /// pair of blocks, `2 (head_dim + value_dim)` a selected pair.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, sparse::FlexPrefill};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let flex = FlexPrefill::builder().gamma(0.9).least(256).build()?;
    /// let out = flex.forward(Qkv::new(x.view(), x.view(), x.view()))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    FlexPrefill;
    /// Builds a [`FlexPrefill`].
    FlexPrefillBuilder, always causal;
    given {}
    own {
        /// The share of the weights that is to be covered. Default: 0.9.
        gamma: f64 = 0.9;
        /// How far the means of a query-aware head may be off, at most 0.8326;
        /// 0 for none. Default: 0.1.
        tau: f64 = 0.1;
        /// Queries and keys of a block: a multiple of 64, by default 128.
        block: usize = 128;
        /// Tokens that a budget has at least. Default: 1024.
        least: usize = 1024;
        /// Tokens that it has at most. Default: all.
        most: usize = usize::MAX;
    }
    check(this) {
        if this.gamma.is_nan() || this.gamma <= 0.0 {
            return Err(Error::value("gamma", "a share above 0", this.gamma));
        }
        if this.tau.is_nan() || this.tau < 0.0 {
            return Err(Error::value("tau", "at least 0", this.tau));
        }
        check_block("block", this.block)
    }
}

const FIRST: Forced = Forced { first: 1, last: 0, inside: true };
const LAST: Forced = Forced { first: 0, last: 1, inside: true };

/// The Jensen-Shannon divergence of two distributions.
fn divergence(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    let term = |x: f64, y: f64| if x == 0.0 { 0.0 } else { 0.5 * x * (2.0 * x / (x + y)).ln() };
    let sum: f64 = pairs.map(|(a, b)| term(a, b) + term(b, a)).sum();
    if sum < 0.0 { 0.0 } else { sum }
}

room! {
    /// What a thread works in: `pairs` of blocks are looked at.
    Scratch<'a>(d: usize, keys: usize, blocks: usize, pairs: usize) {
        keys: f32 = blocks.saturating_mul(d),
        rows: f32 = blocks.saturating_mul(d),
        last: f32 = d,
        columns: f32 = keys,
        diagonals: f32 = keys,
        vertical: f32 = blocks,
        slash: f32 = blocks,
        map: f32 = pairs,
        cover: u32 = keys.max(pairs),
        seen: u64 = blocks.div_ceil(64),
        near: u64 = blocks.div_ceil(64),
        mapped: u64 = pairs.div_ceil(64);
        probe: probe::Room<'a> = (d, keys),
        means: summaries::Room<'a> = (d),
        pick: pick::Room<'a> = (keys.max(pairs))
    }
}

impl FlexPrefill {
    /// The defaults of its examples.
    pub fn builder() -> FlexPrefillBuilder {
        FlexPrefillBuilder::with()
    }

    /// Blocks of keys before the first query, unless all is seen.
    fn before(&self, of: &Sequence) -> Option<usize> {
        let (queries, keys) = (of.queries.len(), of.keys.len());
        let short = keys.div_ceil(self.block) <= self.least.div_ceil(self.block).max(2);
        let before = keys.checked_sub(queries).filter(|_| queries >= self.block && !short)?;
        before.is_multiple_of(self.block).then_some(before / self.block)
    }

    /// Blocks of a budget that `covered` tokens make, of `blocks`.
    fn budget(&self, covered: usize, blocks: usize) -> usize {
        let most = self.most.div_ceil(self.block).min(blocks);
        ((covered + 1) / self.block + 1).max(self.least.div_ceil(self.block)).min(most)
    }

    /// Blocks of keys up to the last query of block `i`, where all is seen.
    fn all(&self, of: &Sequence, i: usize) -> usize {
        let queries = of.queries.len();
        let end = ((i + 1) * self.block).min(queries) + of.keys.len();
        end.saturating_sub(queries).div_ceil(self.block)
    }

    /// Elements of a key, and the most keys, blocks of them and pairs of blocks.
    fn sizes(&self, source: &Source<'_>) -> [usize; 4] {
        let keys = source.layout_per(Per::Head, self.block).keys;
        let blocks = keys.div_ceil(self.block);
        [source.dims.head_dim, keys, blocks, if self.tau > 0.0 { blocks.saturating_mul(blocks) } else { 0 }]
    }

    fn search<'a>(&self, source: &'a Source<'a>) -> Search<'a> {
        let ([d, keys, blocks, pairs], layout) =
            (self.sizes(source), source.layout_per(Per::Head, self.block));
        Search { source, layout, unit: self.block, share: Scratch::bytes(d, keys, blocks, pairs) }
    }

    /// The lists of a head, of which `before` blocks come before the queries.
    fn head(
        &self,
        source: &Source<'_>,
        place: &Place<'_>,
        before: usize,
        room: &mut Scratch<'_>,
        to: &mut Lists,
    ) {
        let &Place { of, head, kv_head } = place;
        let (isa, d, n, size) = (source.isa, source.dims.head_dim, of.keys.len(), self.block);
        let (blocks, q_blocks) = (n.div_ceil(size), of.queries.len().div_ceil(size));
        let (scale, queries) = (self.config.scale(&source.dims) as f32, source.queries(of, head));
        let last = queries.part(queries.len() - size..queries.len());
        let probe = |queries| Probe { isa, queries, scale };
        let (columns, diagonals) = (&mut room.columns[..n], &mut room.diagonals[..n]);
        probe(last).sums(|n| source.candidates(of, kv_head, n), &mut room.probe, columns, diagonals);
        let mean = (Summary::Mean, size);
        summaries::summarise(source, (of, kv_head), mean, room.keys, &mut room.means);
        room.means.rows(isa, mean, last, room.last);

        for (sums, of) in [(&mut *room.vertical, &*columns), (&mut *room.slash, &*diagonals)] {
            for (sum, part) in sums.iter_mut().zip(of.chunks(size)) {
                *sum = part.iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
            }
        }
        let (vertical, slash) = (&room.vertical[..blocks], &room.slash[..blocks]);
        let of_means = |n| Candidates::Rows(rows_of(room.keys, n, d));
        let mut aware = false;
        if self.tau > 0.0 {
            probe(rows_of(room.last, 1, d)).run(
                |_| blocks,
                of_means,
                &mut room.probe,
                |_, row| {
                    let pairs = row.iter().zip(vertical).map(|(&a, &b)| (f64::from(a), f64::from(b)));
                    aware = divergence(pairs).sqrt() < self.tau;
                },
            );
        }
        let words = blocks.div_ceil(64);
        let (seen, near) = (&mut room.seen[..words], &mut room.near[..words]);
        for (sums, tokens, forced, bits) in
            [(vertical, &*columns, FIRST, &mut *seen), (slash, &*diagonals, LAST, &mut *near)]
        {
            let covered = if aware { 0 } else { cover::within(tokens, self.gamma, room.cover) };
            let rule = Rule::TopK(self.budget(covered, blocks));
            pick::choose(isa, &Pick { rule, forced }, sums, &mut room.pick, bits);
        }
        if aware {
            let map = &mut room.map[..q_blocks * blocks];
            map.fill(f32::NEG_INFINITY);
            room.means.rows(isa, mean, queries, room.rows);
            probe(rows_of(room.rows, q_blocks, d)).run(
                |i| before + i + 1,
                of_means,
                &mut room.probe,
                |i, row| {
                    map[i * blocks..][..row.len()].copy_from_slice(row);
                },
            );
            let rule = Rule::TopK(cover::within(map, self.gamma * q_blocks as f64, room.cover));
            let pick = Pick { rule, forced: Forced::default() };
            pick::choose(isa, &pick, map, &mut room.pick, &mut room.mapped[..map.len().div_ceil(64)]);
        }
        let bit = |bits: &[u64], i: usize| bits[i / 64] >> (i % 64) & 1 == 1;
        for i in 0..q_blocks {
            let row = before + i;
            let sees = |&j: &usize| {
                let mapped = || aware && bit(room.mapped, i * blocks + j);
                bit(seen, j) || bit(near, blocks - 1 - (row - j)) || mapped()
            };
            to.extend((0..=row).filter(sees).map(|j| j as u32));
            to.end();
        }
    }

    /// For each block of queries what it sees by definition, and what of it is in
    /// doubt.
    fn define_head(
        &self,
        q: ArrayView2<'_, f64>,
        k: ArrayView2<'_, f64>,
        scale: f64,
    ) -> Vec<[Vec<usize>; 2]> {
        let (n, size) = (k.nrows(), self.block);
        let (blocks, before) = (n.div_ceil(size), (n - q.nrows()) / size);
        let last = q.slice(s![q.nrows() - size.., ..]);
        let (mut vertical, mut slash) = (vec![0.0; n], vec![0.0; n]);
        for (r, row) in last.rows().into_iter().enumerate() {
            let position = n - size + r;
            let scores = (0..=position).map(|j| scale * row.dot(&k.row(j))).collect();
            for (j, weight) in weights(scores).into_iter().enumerate() {
                vertical[j] += weight / size as f64;
                slash[n - 1 - (position - j)] += weight / size as f64;
            }
        }
        let sums = |x: &[f64]| x.chunks(size).map(|x| x.iter().sum()).collect::<Vec<f64>>();
        let (of_keys, of_queries, of_last) = (means(k, size), means(q, size), &means(last, size)[0]);
        let a = weights(of_keys.iter().map(|k| scale * of_last.dot(k)).collect());
        let js = divergence(a.into_iter().zip(sums(&vertical)));
        let aware = js.sqrt() < self.tau;
        let unsure = self.tau > 0.0 && (js - self.tau * self.tau).abs() <= SELECTION_MARGIN;

        let band = |x: &[f64], forced| {
            let tokens = |margin| if aware { 0 } else { within(x, self.gamma + margin) };
            highest(&sums(x), forced, |margin| self.budget(tokens(margin), blocks))
        };
        let (columns, distances) = (band(&vertical, FIRST), band(&slash, LAST));
        let mut map = vec![f64::NEG_INFINITY; of_queries.len() * blocks];
        for (i, q) in of_queries.iter().enumerate() {
            let scores = of_keys[..=before + i].iter().map(|k| scale * q.dot(k)).collect();
            map[i * blocks..][..=before + i].copy_from_slice(&weights(scores));
        }
        let rows = of_queries.len() as f64;
        let map = highest(&map, Forced::default(), |margin| within(&map, rows * (self.gamma + margin)));
        let row = |i: usize| {
            [0, 1].map(|which| {
                let sees = |&j: &usize| {
                    let mapped = aware && map[which][i * blocks + j];
                    let band = columns[which][j] || distances[which][blocks - 1 - (before + i - j)];
                    mapped || band || (which == 1 && unsure)
                };
                (0..=before + i).filter(sees).collect()
            })
        };
        (0..of_queries.len()).map(row).collect()
    }
}

impl Planned for FlexPrefill {
    type Index = BlockLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn find_bytes(&self, source: &Source<'_>) -> Result<usize> {
        self.search(source).bytes()
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<BlockLists> {
        let [d, keys, blocks, pairs] = self.sizes(source);
        let take = |arena: &mut _| Scratch::take(arena, d, keys, blocks, pairs);
        let found = self.search(source).by_head(workspace, take, |room, place, lists| {
            if let Some(before) = self.before(place.of) {
                return self.head(source, place, before, room, lists);
            }
            for i in 0..place.of.queries.len().div_ceil(self.block) {
                lists.extend(0..self.all(place.of, i) as u32);
                lists.end();
            }
        })?;
        found.blocks()
    }

    fn define_plan(&self, x: &Exact) -> Result<(BlockLists, Margins)> {
        let scale = self.config.scale(&x.dims);
        x.plan((Per::Head, self.block), self.block, |of, head| match self.before(of) {
            Some(_) => self.define_head(x.q(of, head), x.k(of, head), scale),
            None => {
                let blocks = of.queries.len().div_ceil(self.block);
                (0..blocks).map(|i| [(0..self.all(of, i)).collect(), Vec::new()]).collect()
            }
        })
    }

    fn find_flops(&self, source: &Source<'_>) -> u64 {
        let [d, keys, _, pairs] = self.sizes(source).map(|n| n as u64);
        2 * (source.dims.batch * source.dims.q_heads) as u64 * d * (self.block as u64 * keys + pairs)
    }
}

planned!(FlexPrefill, BlockLists);
planned!(FlexPrefill, BlockLists, caches);

exhibit! {
    FlexPrefillExhibit of FlexPrefill, "sparse", "FlexPrefill", "arXiv 2502.20766";
    "blocks of 64 keys: columns and diagonals that hold the last queries' weights, or those of a query-aware map";
    not "for decoding, which it leaves dense";
    tokens true;
    build(_, _) { FlexPrefill::builder().block(64).gamma(0.4).least(64).tau(0.05) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(FlexPrefill, FlexPrefillExhibit);

#[cfg(test)]
mod tests;
