//! SeerAttention: a learned gate over pooled queries and keys says which blocks
//! are read.

use ndarray::{Array1, Array3, ArrayView2, Axis};

use crate::attention::Margins;
use crate::card::{carded, exhibit};
use crate::definition::select::{chosen, means, pooled, rotated, weights};
use crate::engine::workspace::{Workspace, room};
use crate::error::{Error, Result};
use crate::input::gate::Gated;
use crate::input::{Dims, Sequence};
use crate::keys::{BlockLists, Per};
use crate::score::Plain;
use crate::select::finding::{Place, Search, ones};
use crate::select::gate::{self, Gate, rotate};
use crate::select::probe::{self, Probe};
use crate::select::{Forced, Pick, Rule, Source, Summary, pick, rows_of, summaries};
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::planned::{Exact, Planned, check_block, check_theta, planned, sparse};

sparse! {
    /// SeerAttention: a learned gate over pooled queries and keys says which blocks
    /// are read.
    ///
    /// ```text
    /// gq_i = mean of the gate's queries of block i
    /// gk_j = [max, min, mean of the gate's keys of block j] W_h
    /// P_i  = softmax_{j <= i} (rope(gq_i) . rope(gk_j) / sqrt(gate_dim))
    /// block i sees block j <= i with   P_ij > threshold   or   j = i
    /// ```
    ///
    /// and, but for what comes after a query, all keys of it. The gate's queries and
    /// keys are those before the rotation by position; pooled ones are rotated to
    /// the first position of their block. The last two blocks of queries see all. From
    /// "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (arXiv
    /// 2410.13276), type `Qavg_Kmaxminavg` of its code, which does not force the
    /// diagonal: see [`diagonal`](SeerBuilder::diagonal).
    ///
    /// Cost: a pass over the gate's arrays, `6 head_dim gate_dim` flops a block of keys
    /// and `2 gate_dim` a pair of blocks; `2 (head_dim + value_dim)` a selected pair.
    ///
    /// ```
    /// use attention_kernels::sparse::{Gated, SeerAttention};
    /// use attention_kernels::{Attention, Qkv};
    /// use ndarray::{Array3, Array4};
    ///
    /// let x = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let weights = Array3::from_shape_fn((2, 48, 16), |(_, i, j)| f32::from(i % 16 == j));
    /// let seer = SeerAttention::builder(weights, 0.1).build()?;
    /// let qkv = Qkv::new(x.view(), x.view(), x.view());
    /// let out = seer.forward(Gated { qkv, q: x.view(), k: x.view() })?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    SeerAttention;
    /// Builds a [`SeerAttention`].
    SeerBuilder, always causal;
    given {
        weights: Array3<f32>;
        threshold: f32;
    }
    own {
        /// Queries and keys of a block: a multiple of 64, by default 64.
        block: usize = 64;
        /// Rotates pooled queries and keys with frequencies `rope^(-2 c /
        /// head_dim)`, halves of the channels together. Default: does not.
        rope: Option<f64> = None;
        /// Whether a block of queries always sees its own keys. Default: it does;
        /// the released code does not force it.
        diagonal: bool = true;
        /// The last so many blocks of queries see all. Default: 2.
        last: usize = 2;
    }
    check(this) {
        check_block("block", this.block)?;
        if this.threshold.is_nan() {
            return Err(Error::value("threshold", "a number", this.threshold));
        }
        check_theta(this.rope, this.weights.dim().2, "weights", this.weights.shape())
    }
}

room! {
    /// What a thread works in.
    Scratch<'a>(d: usize, blocks: usize) {
        queries: f32 = blocks.saturating_mul(d),
        bits: u64 = blocks.div_ceil(64);
        pooled: gate::Pooled<'a> = (d, d, blocks),
        means: summaries::Room<'a> = (d),
        probe: probe::Room<'a> = (d, blocks),
        pick: pick::Room<'a> = (blocks)
    }
}

impl SeerAttention {
    /// With the gate's weights `[q_heads, 3 head_dim, head_dim]` and the share
    /// that a block must have more of.
    pub fn builder(weights: Array3<f32>, threshold: f32) -> SeerBuilder {
        SeerBuilder::with(weights, threshold)
    }

    /// Refuses a call that does not fit.
    fn check(&self, dims: &Dims, mut sequences: impl Iterator<Item = Sequence>) -> Result<()> {
        let (heads, rows, cols) = self.weights.dim();
        let d = dims.head_dim;
        if heads != dims.q_heads || cols != d || d.checked_mul(3) != Some(rows) {
            let expected = format!("[q_heads, 3 head_dim, head_dim] of {} heads of {d}", dims.q_heads);
            return Err(Error::shape("weights", expected, self.weights.shape()));
        }
        let Some(of) = sequences.find(|of| self.before(of).is_none()) else { return Ok(()) };
        let expected =
            format!("queries that start at the first key or a multiple of {} after it", self.block);
        Err(Error::value("q", expected, format_args!("{} of {}", of.queries.len(), of.keys.len())))
    }

    /// Blocks of keys before the queries.
    fn before(&self, of: &Sequence) -> Option<usize> {
        let before = of.keys.len().checked_sub(of.queries.len())?;
        before.is_multiple_of(self.block).then_some(before / self.block)
    }

    fn pick(&self) -> Pick {
        let forced = Forced { first: 0, last: usize::from(self.diagonal), inside: false };
        Pick { rule: Rule::Threshold(self.threshold), forced }
    }

    fn search<'a>(&self, source: &'a Source<'a>) -> Result<(Search<'a>, [usize; 2])> {
        self.check(&source.dims, (0..source.dims.batch).map(|i| source.sequence(i)))?;
        let layout = source.layout_per(Per::Head, self.block);
        let (d, blocks) = (source.dims.head_dim, layout.keys.div_ceil(self.block));
        Ok((Search { source, layout, unit: self.block, share: Scratch::bytes(d, blocks) }, [d, blocks]))
    }

    /// What each block of queries sees by definition, and what of it is in doubt.
    fn define_head(
        &self,
        q: ArrayView2<'_, f64>,
        k: ArrayView2<'_, f64>,
        head: usize,
    ) -> Vec<[Vec<usize>; 2]> {
        let s = self.block;
        let before = (k.nrows() - q.nrows()) / s;
        let turned = |(x, block): (Array1<f64>, usize)| match self.rope {
            Some(theta) => rotated(x, block * s, theta),
            None => x,
        };
        let pooled = pooled(k, s, self.weights.index_axis(Axis(0), head));
        let keys: Vec<_> = pooled.into_iter().zip(0..).map(turned).collect();
        let queries: Vec<_> = means(q, s).into_iter().zip(before..).map(turned).collect();
        let scale = 1.0 / (q.ncols().max(1) as f64).sqrt();
        let row = |(i, query): (usize, &Array1<f64>)| {
            let seen = before + i + 1;
            if i + self.last >= queries.len() {
                return [(0..seen).collect(), Vec::new()];
            }
            let shares = weights(keys[..seen].iter().map(|key| scale * query.dot(key)).collect());
            chosen(&self.pick(), &shares).into()
        };
        queries.iter().enumerate().map(row).collect()
    }
}

impl Planned for SeerAttention {
    type Index = BlockLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn find_bytes(&self, source: &Source<'_>) -> Result<usize> {
        self.search(source)?.0.bytes()
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<BlockLists> {
        let (search, [d, blocks]) = self.search(source)?;
        let (isa, size, scale) = (source.isa, self.block, 1.0 / (d.max(1) as f32).sqrt());
        let take = |arena: &mut _| Scratch::take(arena, d, blocks);
        let prepare = |room: &mut Scratch<'_>, place: &Place<'_>| room.pooled.pool(source, place, size);
        let found = search.by_group(workspace, take, prepare, |room, place, lists| {
            let before = self.before(place.of).unwrap_or(0);
            let q_len = place.of.queries.len().div_ceil(size);
            let weights = self.weights.index_axis(Axis(0), place.head);
            let gate = Gate { isa, weights, norm: None, theta: self.rope };
            room.pooled.project(&gate, place.of.keys.len().div_ceil(size), size);
            let Scratch { pooled, queries, bits, .. } = room;
            room.means.rows(isa, (Summary::Mean, size), source.queries(place.of, place.head), queries);
            if let Some(theta) = self.rope {
                for (i, row) in queries.chunks_mut(d.max(1)).take(q_len).enumerate() {
                    rotate(row, (before + i) * size, theta);
                }
            }
            let probe = Probe { isa, queries: rows_of(queries, q_len, d), scale };
            let candidates = |n| pooled.rows(n, d);
            probe.run(
                |i| before + i + 1,
                candidates,
                &mut room.probe,
                |i, row| {
                    if i + self.last >= q_len {
                        lists.extend(0..row.len() as u32);
                    } else {
                        let bits = &mut bits[..row.len().div_ceil(64)];
                        pick::choose(isa, &self.pick(), row, &mut room.pick, bits);
                        lists.extend(ones(bits).map(|j| j as u32));
                    }
                    lists.end();
                },
            );
        })?;
        found.blocks()
    }

    fn define_plan(&self, x: &Exact) -> Result<(BlockLists, Margins)> {
        self.check(&x.dims, x.sequences.iter().cloned())?;
        x.plan((Per::Head, self.block), self.block, |of, head| {
            self.define_head(x.q(of, head), x.k(of, head), head)
        })
    }

    fn find_flops(&self, source: &Source<'_>) -> u64 {
        let layout = source.layout_per(Per::Head, self.block);
        let [q, k] = [layout.queries, layout.keys].map(|n| n.div_ceil(self.block) as u64);
        let d = source.dims.head_dim as u64;
        (layout.sequences * layout.q_heads) as u64 * (6 * k * d * d + 2 * q * k * d)
    }
}

planned!(SeerAttention, BlockLists, gated);
planned!(SeerAttention, BlockLists, gated caches);

exhibit! {
    SeerExhibit of SeerAttention, "sparse", "SeerAttention", "arXiv 2410.13276";
    "the blocks of 64 keys to which a gate over pooled queries and keys gives more than 0.2, causal";
    not "without its trained gate";
    tokens true;
    build(x, field) {
        let (_, heads, _, d) = x.q.dim();
        // Mostly the mean, and a little of everything.
        let weight = |(h, i, j): (usize, usize, usize)| {
            f32::from(i == 2 * d + j) + 0.05 * field.at(1, h, i, j)
        };
        let builder = SeerAttention::builder(Array3::from_shape_fn((heads, 3 * d, d), weight), 0.2).last(1);
        builder.rope((d % 2 == 0).then_some(1e4))
    }
    input<'a, T>(x, _) -> Gated<'a, T> { Gated { q: x.q, k: x.k, qkv: x } }
}
carded!(SeerAttention, SeerExhibit);

#[cfg(test)]
mod tests;
