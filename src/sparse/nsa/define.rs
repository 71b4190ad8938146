//! NSA by definition.

use ndarray::{Array1, Array2, Array3, Array4, Axis, s};

use super::Nsa;
use crate::attention::{ERROR_CONSTANT, Margins};
use crate::definition::select;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::source::Kv;
use crate::keys::{BlockLists, Keys};
use crate::select::Selected;
use crate::stages::branches::{Branched, Mixed};
use crate::stages::means::Side;

impl Nsa {
    /// Pools of a head by definition: given ones or means.
    fn define_pools(&self, x: &Branched<'_>, of: (&Sequence, usize)) -> [Array2<f64>; 2] {
        let ([width, stride], n) = (self.builder.pool, of.0.keys.len());
        [Side::Keys, Side::Values].map(|side| {
            if let Some((kv, _)) = &x.compressed {
                return x.rows(kv, side, of, self.means().count(n));
            }
            let rows = x.rows(&x.own, side, of, n);
            let mut pools = Array2::zeros((self.means().count(n), rows.ncols()));
            for (w, mut pool) in pools.outer_iter_mut().enumerate() {
                let of_pool = rows.slice(s![w * stride..w * stride + width, ..]);
                pool.assign(&(of_pool.sum_axis(Axis(0)) / width as f64));
            }
            pools
        })
    }

    /// The definition on an index: the output, and how far the kernel may be off.
    pub(super) fn define(&self, x: &Branched<'_>, index: &BlockLists) -> Result<(Array4<f64>, Array3<f64>)> {
        let dims = x.dims;
        Keys::Blocks(index).check(&dims, &x.lengths)?;
        let (scale, [width, stride]) = (self.config.scale(&dims), self.builder.pool);
        let mut out = Array4::zeros((x.entries, dims.q_heads, dims.q_len, dims.value_dim));
        let mut bound = Array3::zeros((x.entries, dims.q_heads, dims.q_len));
        for (sequence, h) in (0..dims.batch).flat_map(|b| (0..dims.q_heads).map(move |h| (x.sequence(b), h)))
        {
            let (n, rows, b) = (sequence.keys.len(), sequence.queries.len(), sequence.batch);
            let at = (&sequence, h / (dims.q_heads / dims.kv_heads));
            let of = |kv: &Kv<'_>| [Side::Keys, Side::Values].map(|side| x.rows(kv, side, at, n));
            let (own, of_pools) = (of(&x.own), self.define_pools(x, at));
            let of_window = x.window.as_ref().map_or_else(|| own.clone(), of);
            let site = sequence.site(h);
            for (i, row) in (0..rows).zip(sequence.queries.clone()) {
                let q = x.q.rows(b, h, &(row..row + 1));
                let q: Array1<f64> = (0..dims.head_dim).map(|c| f64::from(q.at(0, c))).collect();
                let seen = (i + n + 1).saturating_sub(rows).min(n);
                let pools = (0..of_pools[0].nrows()).filter(|w| w * stride + width <= seen).collect();
                let chosen = (0..seen).filter(|&j| index.visible(&site, i, j)).collect();
                let near = (0..seen).filter(|&j| j + self.builder.window >= seen).collect();
                let branches: [(&[Array2<f64>; 2], Vec<usize>); 3] =
                    [(&of_pools, pools), (&own, chosen), (&of_window, near)];
                for (part, ([k, v], keys)) in branches.into_iter().enumerate() {
                    let gate = f64::from(x.gates[[b, h, row, part]]);
                    let score = |&j: &usize| scale * q.dot(&k.row(j));
                    // A score of -inf hides its key.
                    let keys: Vec<_> = keys.into_iter().filter(|j| score(j) != f64::NEG_INFINITY).collect();
                    let most = keys.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = keys.iter().map(|j| (score(j) - most).exp()).sum();
                    let (mut size, mut largest) = (0f64, 0f64);
                    for j in &keys {
                        let mut row = out.slice_mut(s![b, h, row, ..]);
                        row.scaled_add(gate * (score(j) - most).exp() / sum, &v.row(*j));
                        if most - score(j) < 25.0 {
                            let products = q.iter().zip(k.row(*j)).map(|(q, k)| (q * k).abs()).sum::<f64>();
                            size = size.max(scale.abs() * products + score(j).abs());
                        }
                        largest = v.row(*j).iter().fold(largest, |most, v| most.max(v.abs()));
                    }
                    // Sums of a pool are rounded too, and so are those of branches.
                    let terms = (dims.head_dim + keys.len() + 4 + if part == 0 { width } else { 0 }) as f64;
                    let own = ERROR_CONSTANT * 2f64.powi(-24) * (terms + size) * largest;
                    bound[[b, h, row]] += gate.abs() * own;
                }
            }
        }
        Ok((out, bound))
    }

    pub(super) fn define_choice(&self, x: &Branched<'_>) -> Result<(BlockLists, Margins)> {
        let (dims, scheme, lengths) = (x.dims, self.scheme(&x.dims), &x.lengths);
        let layout = scheme.layout(&dims, lengths);
        layout.lists()?;
        let group = dims.q_heads / dims.kv_heads.max(1);
        let heads = if dims.q_heads > 0 { dims.kv_heads } else { 0 };
        let pools: Vec<Vec<Array2<f64>>> = (0..dims.batch)
            .map(|i| (0..heads).map(|g| self.define_pools(x, (&x.sequence(i), g))[0].clone()).collect())
            .collect();
        let score = |of: &Sequence, [b, h, i]: [usize; 3], w: usize| {
            let (q, pool) = (x.q.rows(b, h, &(i..i + 1)), pools[of.index][h / group].row(w));
            pool.iter().enumerate().map(|(c, k)| f64::from(q.at(0, c)) * k).sum()
        };
        let (lists, margins) = select::select_numbered(&scheme, &dims, lengths, &layout, score);
        Ok((Selected::of(&scheme, &dims, lengths, &lists).blocks()?, margins))
    }
}
