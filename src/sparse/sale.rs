//! SALE: tiles of keys are read whose weights, estimated with 4 bits, may count
//! beside the first keys and the neighbours.

use ndarray::{Array1, ArrayView2, Axis};

use crate::attention::{Margins, SELECTION_MARGIN};
use crate::card::{carded, exhibit};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Sequence};
use crate::keys::{Per, TokenLists};
use crate::score::Plain;
use crate::select::Source;
use crate::select::estimate::{Estimate, Part, Room};
use crate::select::finding::{Place, Search, ones};
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::planned::{Exact, Planned, planned, sparse};

/// Queries and keys of a tile.
const QUERIES: usize = 64;
const KEYS: usize = 32;
/// Tiles of a segment, which the last keys are at least.
const SEGMENT: usize = 4;
/// Thresholds below it stand for heads that see all.
const LEAST: f32 = 1e-5;

sparse! {
    /// SALE: tiles of keys are read whose weights, estimated with 4 bits, may count
    /// beside the first keys and the neighbours.
    ///
    /// ```text
    /// k'_j = k_j - mean k            q'_i = q_i - mean q             of all keys, all queries
    /// x4   = round(x' / s),  s = max |x'| / 7                        of each token
    /// e_ij = c (sq_i sk_j q4_i . k4_j + mean q . k'_j)               for c q_i . k'_j
    /// L_i  = ln sum exp(c q_i . k'_j)  over the first 32 keys and the last 128 or more
    /// 64 queries see these, and tiles of 32 keys in which some  e_ij > L_i + ln threshold
    /// ```
    ///
    /// From "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM
    /// Prefilling" (arXiv 2505.24179), with a scale for each token, as its paper has it.
    /// The last keys are extended so that whole segments of 128 lie before them. Numbers
    /// of 4 bits are multiplied exactly, in `f32`: an estimate costs as much as a score.
    /// Means are over the whole call: what a query sees depends on tokens after it.
    ///
    /// Cost: `2 head_dim` flops a visible pair for the estimate, twice that for the
    /// neighbours; `2 (head_dim + value_dim)` a selected pair.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, sparse::Sale};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::from_shape_fn((1, 2, 700, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let sale = Sale::builder(vec![0.004; 2]).short(256).build()?;
    /// let out = sale.forward(Qkv::new(x.view(), x.view(), x.view()))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    Sale;
    /// Builds a [`Sale`].
    SaleBuilder, always causal;
    given {
        thresholds: Vec<f32>;
    }
    own {
        /// Sequences of up to so many keys see all. Default: 1024.
        short: usize = 1024;
    }
    check(this) {
        match this.thresholds.iter().find(|x| !x.is_finite() || **x < 0.0) {
            Some(x) => Err(Error::value("thresholds", "finite numbers of at least 0", x)),
            None => Ok(()),
        }
    }
}

impl Sale {
    /// With a threshold for each query head: 0.001 to 0.008, as it is calibrated.
    pub fn builder(thresholds: Vec<f32>) -> SaleBuilder {
        SaleBuilder::with(thresholds)
    }

    /// Tiles of keys up to the last of some queries, and those that are estimated.
    fn tiles(&self, dims: &Dims, of: &Sequence, head: usize, end: usize) -> [usize; 2] {
        let tiles = (end + of.keys.len()).saturating_sub(of.queries.len()).div_ceil(KEYS);
        let all = of.keys.len() <= self.short || self.thresholds[head] < LEAST || dims.head_dim == 0;
        [tiles, if all { 0 } else { tiles.saturating_sub(1 + SEGMENT) / SEGMENT * SEGMENT }]
    }

    fn check(&self, heads: usize) -> Result<()> {
        if self.thresholds.len() == heads {
            return Ok(());
        }
        let got = format!("{} numbers", self.thresholds.len());
        Err(Error::value("thresholds", format!("one for each of {heads} query heads"), got))
    }

    fn search<'a>(&self, source: &'a Source<'a>) -> Result<(Search<'a>, [usize; 2])> {
        self.check(source.dims.q_heads)?;
        let (layout, d) = (source.layout_per(Per::Head, QUERIES), source.dims.head_dim);
        let share = Room::bytes(d, layout.keys, QUERIES, KEYS);
        Ok((Search { source, layout, unit: KEYS, share }, [d, layout.keys]))
    }

    /// The tiles that each tile of queries sees by definition, and what is in doubt.
    fn define_head(&self, x: &Exact, of: &Sequence, head: usize) -> Vec<[Vec<usize>; 2]> {
        let (q, k, c) = (x.q(of, head), x.k(of, head), self.config.scale(&x.dims));
        let mean = |x: ArrayView2<'_, f64>| x.mean_axis(Axis(0)).unwrap_or_default();
        let (mean_q, mean_k) = (mean(q), mean(k));
        // Whole numbers, their scale, and whether one is nearly halfway.
        let quantise = |x: Array1<f64>| {
            let most = x.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
            let scale = if most == 0.0 { 1.0 } else { most / 7.0 };
            let x = x / scale;
            let halfway = x.iter().any(|x| ((x - x.floor()) - 0.5).abs() < 2.0 * SELECTION_MARGIN);
            (x.mapv(f64::round_ties_even), scale, halfway)
        };
        let keys: Vec<_> = k.rows().into_iter().map(|k| &k - &mean_k).collect();
        let offsets: Vec<f64> = keys.iter().map(|k| c * mean_q.dot(k)).collect();
        let low: Vec<_> = keys.iter().cloned().map(quantise).collect();
        let tile = |first: usize| {
            let rows = first..(first + QUERIES).min(q.nrows());
            let [tiles, middle] = self.tiles(&x.dims, of, head, rows.end);
            // Whether a tile is kept, surely so, and nearly so.
            let (mut states, ln) = (vec![[false; 3]; middle], f64::from(self.thresholds[head]).ln());
            for i in if middle > 0 { rows } else { 0..0 } {
                let local = (1 + middle) * KEYS..i + 1 + k.nrows() - q.nrows();
                let exact: Vec<f64> = (0..KEYS).chain(local).map(|j| c * q.row(i).dot(&keys[j])).collect();
                let most = exact.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let limit = most + exact.iter().map(|x| (x - most).exp()).sum::<f64>().ln() + ln;
                let (few, scale, halfway) = quantise(&q.row(i) - &mean_q);
                for (v, [keep, sure, near]) in states.iter_mut().map(|state| state.each_mut()).enumerate() {
                    for j in (1 + v) * KEYS..(2 + v) * KEYS {
                        let factor = c * scale * low[j].1;
                        let above = factor * few.dot(&low[j].0) + offsets[j] - limit;
                        let step = if halfway || low[j].2 { 14.0 * factor.abs() } else { 0.0 };
                        let error = SELECTION_MARGIN * (limit.abs() + offsets[j].abs() + 10.0) + step;
                        (*keep, *sure, *near) =
                            (*keep || above > 0.0, *sure || above > error, *near || above > -error);
                    }
                }
            }
            let states = states.iter().zip(1..);
            let of = |which: fn(&[bool; 3]) -> bool| {
                states.clone().filter_map(move |(x, v)| which(x).then_some(v))
            };
            let seen = (0..tiles.min(1)).chain(of(|state| state[0])).chain(1 + middle..tiles);
            [seen.collect(), of(|state| state[2] && !state[1]).collect()]
        };
        (0..q.nrows()).step_by(QUERIES).map(tile).collect()
    }
}

impl Planned for Sale {
    type Index = TokenLists;

    fn config(&self) -> &Config<Order, Plain> {
        &self.config
    }

    fn find_bytes(&self, source: &Source<'_>) -> Result<usize> {
        self.search(source)?.0.bytes()
    }

    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<TokenLists> {
        let (search, [d, n]) = self.search(source)?;
        let take = |arena: &mut _| Room::take(arena, d, n, QUERIES, KEYS);
        let scale = self.config.scale(&source.dims) as f32;
        let long = |place: &Place<'_>| d > 0 && place.of.keys.len() > self.short;
        let prepare = |room: &mut Room<'_>, place: &Place<'_>| {
            if long(place) {
                Estimate::at(source, place, scale, KEYS).keys(room);
            }
        };
        let found = search.by_group(workspace, take, prepare, |room, place, lists| {
            let (q_len, head) = (place.of.queries.len(), place.head);
            if long(place) && q_len > 0 {
                Estimate::at(source, place, scale, KEYS).queries(head, room);
            }
            for first in (0..q_len).step_by(QUERIES) {
                let rows = first..(first + QUERIES).min(q_len);
                let [tiles, middle] = self.tiles(&source.dims, place.of, head, rows.end);
                lists.extend(0..tiles.min(1) as u32);
                if middle > 0 {
                    let part = Part { head, rows, middle: 1..1 + middle, above: self.thresholds[head].ln() };
                    lists.extend(
                        ones(Estimate::at(source, place, scale, KEYS).exceeding(&part, room))
                            .map(|v| v as u32 + 1),
                    );
                }
                lists.extend(1 + middle as u32..tiles as u32);
                lists.end();
            }
        })?;
        found.tokens()
    }

    fn define_plan(&self, x: &Exact) -> Result<(TokenLists, Margins)> {
        self.check(x.dims.q_heads)?;
        x.plan((Per::Head, QUERIES), KEYS, |of, head| self.define_head(x, of, head))
    }

    fn find_flops(&self, source: &Source<'_>) -> u64 {
        let dims = &source.dims;
        let pairs = (dims.q_len as u64).saturating_mul(dims.kv_len as u64) / 2;
        2 * (dims.batch * dims.q_heads) as u64 * dims.head_dim as u64 * pairs
    }
}

planned!(Sale, TokenLists);
planned!(Sale, TokenLists, caches);

exhibit! {
    SaleExhibit of Sale, "sparse", "SALE", "arXiv 2505.24179";
    "the first 32 keys, the last 128, and tiles of 32 between whose estimated weights exceed 0.08 of theirs";
    not "for decoding: estimates are for many queries";
    tokens true;
    build(x, _) { Sale::builder(vec![0.08; x.q.dim().1]).short(0) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Sale, SaleExhibit);

#[cfg(test)]
mod tests;
