//! LongHeads by definition.

use ndarray::{Array1, Array2, Array4, ArrayView1, ArrayView4, Axis, s};

use super::{LongHeads, LongInput};
use crate::attention::Margins;
use crate::definition::heads::{Head, of_heads};
use crate::definition::number::Real;
use crate::definition::select;
use crate::element::Element;
use crate::error::Result;
use crate::input::{Dims, Lengths, Sequence};
use crate::keys::{Layout, TokenLists};
use crate::select::Selected;
use crate::stages::attend;
use crate::stages::chunks::Chunks;

impl LongHeads {
    /// A row turned to a position, by definition.
    fn define_turn<R: Real>(&self, row: ArrayView1<'_, R>, position: usize) -> Array1<R> {
        let mut turned = row.to_owned();
        for (i, (sin, cos)) in self.builder.rope.angles(position as f64).enumerate() {
            let ((a, b), [sin, cos]) =
                (self.builder.rope.pair(i, row.len()), [sin, cos].map(|x| R::rounded(x, 1.0)));
            turned[a] = row[a] * cos - row[b] * sin;
            turned[b] = row[a] * sin + row[b] * cos;
        }
        turned
    }

    /// Rows at their places, by definition.
    fn define_placed<R: Real>(&self, x: &Array2<R>) -> Array2<R> {
        let mut placed = x.clone();
        for (j, mut row) in placed.outer_iter_mut().enumerate() {
            row.assign(&self.define_turn(x.row(j), j % self.lists.len));
        }
        placed
    }

    /// What stands for chunks, by definition, of a head.
    pub(super) fn define_chunks<T: Element>(&self, x: &LongInput<'_, T>, head: &Head) -> Array2<f64> {
        if let Some(chunks) = &x.chunks {
            return head.rows(chunks, &(0..chunks.dim().2));
        }
        let (l, qkv) = (self.lists.len, &x.qkv);
        let [q, k, v] = [&qkv.q, &qkv.k, &qkv.v].map(|x| head.rows::<f64, T>(x, &head.keys));
        let (q, k) = (self.define_placed(&q), if self.builder.turned { k } else { self.define_placed(&k) });
        let (n, scale) = (k.nrows() / l, self.config.scale_of(k.ncols()));
        let mut chunks = Array2::zeros((n, k.ncols()));
        for (c, mut chunk) in chunks.outer_iter_mut().enumerate() {
            let [q, k, v] = [&q, &k, &v].map(|x| x.slice(s![c * l..(c + 1) * l, ..]).to_owned());
            let own = attend::define([&q, &k, &v], scale, |_, _| Some(0.0));
            let mean = own.sum_axis(Axis(0)).insert_axis(Axis(0)) / l as f64;
            chunk.assign(&attend::define([&mean, &k, &k], scale, |_, _| Some(0.0)).row(0));
        }
        chunks
    }

    /// The chunks with the largest products of each query with what stands for them,
    /// `[sequences, q_heads, chunks, head_dim]`, by definition, and what is in doubt.
    pub(super) fn define_chosen<T: Element>(
        &self,
        dims: &Dims,
        (lengths, layout): (&Lengths<'_>, Layout),
        q: &ArrayView4<'_, T>,
        chunks: &Array4<f64>,
    ) -> Result<(TokenLists, Margins)> {
        let scheme = self.scheme();
        layout.lists()?;
        let score = |of: &Sequence, [b, h, i]: [usize; 3], c: usize| {
            let chunk = chunks.slice(s![of.index, h, c, ..]);
            q.slice(s![b, h, i, ..]).iter().zip(chunk).map(|(q, &k)| q.to_f64() * k).sum()
        };
        let (lists, margins) = select::select_numbered(&scheme, dims, lengths, &layout, score);
        Ok((Selected::of(&scheme, dims, lengths, &lists).relaid(layout).tokens()?, margins))
    }

    /// Outputs on an index by definition.
    pub(super) fn define_rows<R: Real, T: Element, K: Element>(
        &self,
        dims: &Dims,
        lengths: &Lengths<'_>,
        q: &ArrayView4<'_, T>,
        [k, v]: [&ArrayView4<'_, K>; 2],
        index: &TokenLists,
    ) -> Array4<R> {
        let l = self.lists.len;
        of_heads(dims, lengths, |head| {
            let q = head.rows::<R, T>(q, &head.queries);
            let [k, v] = [k, v].map(|x| head.rows::<R, K>(x, &head.keys));
            let sizes = [head.queries.len(), head.keys.len()];
            let mut out = Array2::from_elem((sizes[0], dims.value_dim), R::of(0.0));
            for (i, mut out) in out.outer_iter_mut().enumerate() {
                let chunks: Vec<usize> = self.lists.of(index, (head.sequence, head.head, i)).collect();
                let seen = Chunks::seen(sizes, i);
                let keys: Vec<[usize; 2]> = chunks
                    .iter()
                    .enumerate()
                    .flat_map(|(slot, c)| (c * l..(c + 1) * l).map(move |j| [slot, j]))
                    .filter(|[_, j]| *j < seen)
                    .collect();
                if keys.is_empty() {
                    continue;
                }
                let position = (chunks.len() - 1) * l + (seen - 1) % l;
                let query = self.define_turn(q.row(i), position).insert_axis(Axis(0));
                let mut near = Array2::from_elem((keys.len(), dims.head_dim), R::of(0.0));
                for ([slot, j], mut near) in keys.iter().zip(near.outer_iter_mut()) {
                    let at = slot * l + if self.builder.turned { 0 } else { j % l };
                    near.assign(&self.define_turn(k.row(*j), at));
                }
                let rows: Vec<usize> = keys.iter().map(|[_, j]| *j).collect();
                let values = v.select(Axis(0), &rows);
                let scale = self.config.scale(dims);
                out.assign(&attend::define([&query, &near, &values], scale, |_, _| Some(0.0)).row(0));
            }
            out
        })
    }
}
