//! SeerAttention-R: while decoding, a learned gate says which blocks of keys are
//! read.

use ndarray::{Array1, Array3, Axis};

use crate::attention::Margins;
use crate::card::{carded, exhibit};
use crate::definition::select::{chosen, pooled, rotated, weights};
use crate::engine::workspace::{Workspace, room};
use crate::error::{Error, Result};
use crate::input::gate::Gated;
use crate::input::{Dims, Sequence};
use crate::keys::{BlockLists, Per};
use crate::score::Plain;
use crate::select::finding::{Search, ones};
use crate::select::gate::{self, Gate};
use crate::select::probe::{self, Probe};
use crate::select::reduce::Shares;
use crate::select::score::ROWS;
use crate::select::{Forced, Pick, Rule, Source, Unpack, pick, rows_of};
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::planned::{Exact, Planned, check_block, check_theta, planned, sparse};

sparse! {
    /// SeerAttention-R: while decoding, a learned gate says which blocks of keys are
    /// read.
    ///
    /// ```text
    /// gq_t = rope_t(norm(sum over the heads g of a group of q_tg Wq_g))
    /// gk_j = rope_{jS}(norm([max, min, mean of the gate's keys of block j] Wk))
    /// P_t  = softmax_j(gq_t . gk_j / sqrt(gate_dim))   for blocks up to the query's own
    /// a group of heads sees its own block, and those j with   P_tj > threshold,
    /// or of the largest P_tj as many as a budget has
    /// ```
    ///
    /// The query's own block has a product of 0 until it is complete. From
    /// "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning" (arXiv
    /// 2506.08889), types `Qproj` and `Kmaxminavg` of its code, which rotates a block
    /// that is completed while decoding to its last token instead of its first. The
    /// query's own block comes on top of the budget unless it is among the largest.
    /// Works in prefill too, where the released code is dense, and over caches
    /// ([`GatedCache`](crate::cache::GatedCache)).
    ///
    /// Cost: a pass over the gate's keys, `6 head_dim gate_dim` flops a block of them,
    /// `2 head_dim gate_dim` a query and `2 gate_dim` a query and block of a group.
    ///
    /// ```
    /// use attention_kernels::sparse::{Gated, SeerAttentionR};
    /// use attention_kernels::{Attention, Qkv};
    /// use ndarray::{Array3, Array4, s};
    ///
    /// let x = Array4::from_shape_fn((1, 2, 500, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let queries = Array3::from_shape_fn((2, 16, 8), |(_, i, j)| f32::from(i % 8 == j));
    /// let keys = Array3::from_shape_fn((2, 48, 8), |(_, i, j)| f32::from(i % 8 == j));
    /// let seer = SeerAttentionR::builder(queries, keys).budget(128).rope(Some(1e4)).build()?;
    /// let last = x.slice(s![.., .., 499.., ..]);
    /// let out = seer.forward(Gated { qkv: Qkv::new(last, x.view(), x.view()), q: last, k: x.view() })?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    SeerAttentionR;
    /// Builds a [`SeerAttentionR`].
    SeerAttentionRBuilder, always causal;
    given {
        of_queries: Array3<f32>;
        of_keys: Array3<f32>;
    }
    own {
        /// Keys of a block: a multiple of 64, by default 64.
        block: usize = 64;
        /// Keys of the blocks that are chosen. Default: 4096.
        budget: usize = 4096;
        /// Chooses all blocks with a larger share than this instead.
        threshold: Option<f32> = None;
        /// Weights of the norms of queries and of keys, `[gate_dim]` each. Default:
        /// they are not normalised.
        norms: Option<[Array1<f32>; 2]> = None;
        /// Rotates with frequencies `rope^(-2 c / gate_dim)`, halves of the
        /// channels together. Default: does not.
        rope: Option<f64> = None;
    }
    check(this) {
        check_block("block", this.block)?;
        if this.budget < this.block {
            return Err(Error::value("budget", "the keys of at least one block", this.budget));
        }
        if this.threshold.is_some_and(f32::is_nan) {
            return Err(Error::value("threshold", "a number", f32::NAN));
        }
        let ((heads, _, columns), (kv_heads, _, gate_dim)) = (this.of_queries.dim(), this.of_keys.dim());
        if (heads, columns) != (kv_heads, gate_dim) {
            let expected = format!("[{heads}, 3 head_dim, {columns}], as those of queries have it");
            return Err(Error::shape("of_keys", expected, this.of_keys.shape()));
        }
        if let Some(norm) = this.norms.iter().flatten().find(|norm| norm.len() != columns) {
            return Err(Error::shape("norms", format!("[gate_dim] = [{columns}]"), norm.shape()));
        }
        check_theta(this.rope, columns, "of_queries", this.of_queries.shape())
    }
}

room! {
    /// What a thread works in.
    Scratch<'a>(d: usize, wide: usize, columns: usize, blocks: usize) {
        queries: f32 = ROWS.saturating_mul(columns),
        bits: u64 = blocks.div_ceil(64);
        pooled: gate::Pooled<'a> = (d, columns, blocks),
        gate: gate::Room<'a> = (wide, columns),
        probe: probe::Room<'a> = (columns, blocks),
        pick: pick::Room<'a> = (blocks)
    }
}

impl SeerAttentionR {
    /// With the gate's weights for queries, `[kv_heads, group head_dim, gate_dim]`
    /// with the heads of a group one after the other, and for keys, `[kv_heads, 3
    /// head_dim, gate_dim]`.
    pub fn builder(queries: Array3<f32>, keys: Array3<f32>) -> SeerAttentionRBuilder {
        SeerAttentionRBuilder::with(queries, keys)
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        let d = dims.head_dim;
        let group = dims.q_heads / dims.kv_heads.max(1);
        for (name, array, rows) in [
            ("of_queries", &self.of_queries, group.checked_mul(d)),
            ("of_keys", &self.of_keys, d.checked_mul(3)),
        ] {
            let (heads, have, _) = array.dim();
            if heads != dims.kv_heads || Some(have) != rows {
                let expected =
                    format!("those of {} key/value heads, {group} heads each, of {d}", dims.kv_heads);
                return Err(Error::shape(name, expected, array.shape()));
            }
        }
        Ok(())
    }

    /// What is chosen of the shares of a query's blocks, besides its own.
    fn pick(&self) -> Pick {
        let rule = self.threshold.map_or(Rule::TopK(self.budget / self.block), Rule::Threshold);
        Pick { rule, forced: Forced::default() }
    }

    fn gate(&self, source: &Source<'_>, kv_head: usize) -> [Gate<'_>; 2] {
        [(&self.of_queries, 0), (&self.of_keys, 1)].map(|(weights, side)| Gate {
            isa: source.isa,
            weights: weights.index_axis(Axis(0), kv_head),
            norm: self.norms.as_ref().map(|norms| norms[side].view()),
            theta: self.rope,
        })
    }

    fn search<'a>(&self, source: &'a Source<'a>) -> Result<(Search<'a>, [usize; 4])> {
        self.check(&source.dims)?;
        let layout = source.layout_per(Per::Group, 1);
        let (_, wide, columns) = self.of_queries.dim();
        let (d, blocks) = (source.dims.head_dim, layout.keys.div_ceil(self.block));
        let share = Scratch::bytes(d, wide, columns, blocks);
        Ok((Search { source, layout, unit: self.block, share }, [d, wide, columns, blocks]))
    }
}

/// Keys up to a query's position.
fn seen(of: &Sequence, query: usize) -> usize {
    (query + 1 + of.keys.len()).saturating_sub(of.queries.len())
}

impl Planned for SeerAttentionR {
    type Index = BlockLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn find_bytes(&self, source: &Source<'_>) -> Result<usize> {
        self.search(source)?.0.bytes()
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<BlockLists> {
        let (search, [d, wide, columns, blocks]) = self.search(source)?;
        let (isa, size, scale) = (source.isa, self.block, 1.0 / (columns.max(1) as f32).sqrt());
        let take = |arena: &mut _| Scratch::take(arena, d, wide, columns, blocks);
        let found = search.by_head(workspace, take, |room, place, lists| {
            let (of, [of_queries, of_keys]) = (place.of, self.gate(source, place.kv_head));
            room.pooled.pool(source, place, size);
            room.pooled.project(&of_keys, of.keys.len().div_ceil(size), size);
            let Scratch { pooled, queries, bits, .. } = room;
            for first in (0..of.queries.len()).step_by(ROWS) {
                let n = ROWS.min(of.queries.len() - first);
                let fill = |i: usize, row: &mut [f32]| {
                    for (g, to) in row.chunks_mut(d.max(1)).enumerate() {
                        let from = source.queries(of, place.head + g).part(first + i..first + i + 1);
                        isa.dispatch(Unpack { from, to });
                    }
                };
                let position = |i| seen(of, first + i).saturating_sub(1);
                of_queries.rows(n, fill, position, &mut room.gate, queries);
                let probe = Probe { isa, queries: rows_of(queries, n, columns), scale };
                let candidates = |n| pooled.rows(n, columns);
                let seen = |i| seen(of, first + i);
                probe.products(
                    |i| seen(i).div_ceil(size),
                    candidates,
                    &mut room.probe,
                    |i, row| {
                        let bits = &mut bits[..row.len().div_ceil(64)];
                        if let Some(own) = row.len().checked_sub(1) {
                            if !seen(i).is_multiple_of(size) {
                                row[own] = 0.0;
                            }
                            isa.dispatch(Shares { row: &mut *row, scale });
                            pick::choose(isa, &self.pick(), row, &mut room.pick, bits);
                            bits[own / 64] |= 1 << (own % 64);
                        }
                        lists.extend(ones(bits).map(|j| j as u32));
                        lists.end();
                    },
                );
            }
        })?;
        found.blocks()
    }

    fn define_plan(&self, x: &Exact) -> Result<(BlockLists, Margins)> {
        self.check(&x.dims)?;
        let s = self.block;
        x.plan((Per::Group, 1), s, |of, head| {
            let group = (x.dims.q_heads / x.dims.kv_heads.max(1)).max(1);
            let [wq, wk] = [&self.of_queries, &self.of_keys].map(|w| w.index_axis(Axis(0), head / group));
            let wq = wq.t().mapv(f64::from);
            let turned = |x: Array1<f64>, side: usize, position: usize| {
                let x = match &self.norms {
                    Some(norms) => {
                        let square = x.mapv(|x| x * x).sum() / x.len() as f64;
                        x / (square + f64::from(gate::EPSILON)).sqrt() * norms[side].mapv(f64::from)
                    }
                    None => x,
                };
                match self.rope {
                    Some(theta) => rotated(x, position, theta),
                    None => x,
                }
            };
            let pooled = pooled(x.k(of, head), s, wk).into_iter().enumerate();
            let keys: Vec<_> = pooled.map(|(j, key)| turned(key, 1, j * s)).collect();
            let row = |t: usize| {
                let n = seen(of, t);
                let Some(own) = n.div_ceil(s).checked_sub(1) else { return Default::default() };
                let heads: Vec<_> = (head..head + group).map(|h| x.q(of, h).row(t).to_owned()).collect();
                let views: Vec<_> = heads.iter().map(|head| head.view()).collect();
                let all = ndarray::concatenate(Axis(0), &views).unwrap_or_default();
                let query = turned(wq.dot(&all), 0, n - 1);
                let product = |j: usize| {
                    let open = j == own && !n.is_multiple_of(s);
                    if open { 0.0 } else { query.dot(&keys[j]) / (query.len().max(1) as f64).sqrt() }
                };
                let shares = weights((0..=own).map(product).collect());
                let (mut ids, doubt) = chosen(&self.pick(), &shares);
                ids.retain(|&j| j < own);
                ids.push(own);
                [ids, doubt.into_iter().filter(|&j| j < own).collect()]
            };
            (0..of.queries.len()).map(row).collect()
        })
    }

    fn find_flops(&self, source: &Source<'_>) -> u64 {
        let layout = source.layout_per(Per::Group, 1);
        let (queries, blocks) = (layout.queries as u64, layout.keys.div_ceil(self.block) as u64);
        let (_, wide, columns) = self.of_queries.dim();
        let each = 6 * blocks * source.dims.head_dim as u64 + 2 * queries * (wide as u64 + blocks);
        (layout.sequences * layout.kv_heads) as u64 * columns as u64 * each
    }
}

planned!(SeerAttentionR, BlockLists, gated);
planned!(SeerAttentionR, BlockLists, gated caches);

exhibit! {
    SeerRExhibit of SeerAttentionR, "sparse", "SeerAttention-R", "arXiv 2506.08889";
    "the query's own block of 64 keys and the one that a gate over pooled keys prefers, for a group of heads";
    not "without its trained gate";
    tokens false;
    build(x, field) {
        let ((_, heads, _, d), (_, kv_heads, _, _)) = (x.q.dim(), x.k.dim());
        let weights = |which, rows: usize| Array3::from_shape_fn((kv_heads, rows, d), |(h, i, j)| {
            f32::from(i % d.max(1) == j) + 0.05 * field.at(which, h, i, j)
        });
        let rows = heads / kv_heads.max(1) * d;
        let builder = SeerAttentionR::builder(weights(1, rows), weights(2, 3 * d)).budget(64);
        builder.rope((d % 2 == 0).then_some(1e4)).norms(Some([Array1::ones(d), Array1::ones(d)]))
    }
    input<'a, T>(x, _) -> Gated<'a, T> { Gated { q: x.q, k: x.k, qkv: x } }
}
carded!(SeerAttentionR, SeerRExhibit);

#[cfg(test)]
mod tests;
