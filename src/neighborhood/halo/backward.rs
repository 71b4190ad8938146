//! Gradients of HaloNet.

use std::ops::Range;

use ndarray::{Array2, Array4, ArrayView4, Axis, s};

use super::HaloNet;
use crate::attention::{Backward, Input};
use crate::definition::heads::Head;
use crate::definition::related_backward::{Related, RelatedGradients, exact};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::{Dims, Qkv};
use crate::score::grid::Terms;
use crate::stages::attend_backward::check_part;
use crate::stages::pass::{Pass, counted, of_no_memory, run_in};

/// Gradients of [`HaloNet`], each of the shape of its array.
#[derive(Clone, Debug, PartialEq)]
pub struct HaloGradients<A = f32> {
    /// Of the queries.
    pub q: Array4<A>,
    /// Of the keys.
    pub k: Array4<A>,
    /// Of the values.
    pub v: Array4<A>,
    /// Of the embeddings of distances of rows and of columns, `[2 r - 1, head_dim]`, where
    /// there are any.
    pub relative: Option<[Array2<A>; 2]>,
}

impl HaloNet {
    /// Writes gradients, or counts.
    fn back<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: Qkv<'_, T>,
        d_out: ArrayView4<'_, f32>,
        to: Option<&mut HaloGradients>,
    ) -> Result<()> {
        let (dims, isa) = (self.check(&x)?, self.halo.isa());
        let (arrays, tables) = match to {
            Some(HaloGradients { q, k, v, relative }) => (Some([q, k, v]), relative.as_mut()),
            None => (None, None),
        };
        let arrays = arrays.map(|arrays| {
            arrays.map(|to| {
                to.fill(0.0);
                to
            })
        });
        let Some(relative) = &self.relative else {
            let to = arrays.map(|arrays| (arrays, None));
            return self.halo.backward(pass, x, None::<Terms<'_>>, d_out, to);
        };
        let [rows, columns] = relative.extents();
        let (batch, heads, len, _) = x.q.dim();
        let mut of_terms = pass.rows((batch, heads, len, rows + columns))?;
        let terms = relative.run(pass, isa, x.q.reborrow())?;
        let terms = self.halo.terms(&dims, &terms, relative.extents(), self.factor(&dims) as f32);
        let Some([q, k, v]) = arrays else {
            pass.within(|pass| self.halo.backward(pass, x.reborrow(), Some(terms), d_out, None))?;
            return relative.backward(pass, isa, x.q.reborrow(), of_terms.view(), None);
        };
        // Without keys nothing is written.
        of_terms.numbers_mut().fill(0.0);
        pass.within(|pass| {
            let to = ([&mut *q, k, v], of_terms.view_mut());
            self.halo.backward(pass, x.reborrow(), Some(terms), d_out, Some(to))
        })?;
        let to = tables.map(|tables| (q, tables.each_mut()));
        relative.backward(pass, isa, x.q.reborrow(), of_terms.view(), to)
    }
}

impl<T: Element> Backward<Qkv<'_, T>> for HaloNet {
    type Gradients<A> = HaloGradients<A>;
    type Carried<'a> = ();

    fn zero_gradients(&self, x: Qkv<'_, T>) -> Result<HaloGradients> {
        let dims = self.check(&x)?;
        let table = |extent| Array2::zeros((extent, dims.head_dim));
        let relative = self.relative.as_ref().map(|relative| relative.extents().map(table));
        let (q, k, v) = (Array4::zeros(x.q.dim()), Array4::zeros(x.k.dim()), Array4::zeros(x.v.dim()));
        Ok(HaloGradients { q, k, v, relative })
    }

    fn backward_workspace_bytes(&self, x: Qkv<'_, T>) -> Result<usize> {
        self.check(&x)?;
        let d_out = of_no_memory(x.out_dim()?)?;
        counted(|pass| self.back(pass, x, d_out, None))
    }

    fn backward_into(
        &self,
        x: Qkv<'_, T>,
        d_out: ArrayView4<'_, f32>,
        _: (),
        gradients: &mut HaloGradients,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let bytes = self.backward_workspace_bytes(x)?;
        let (b, h, n, d) = x.out_dim()?;
        check_part("d_out", Some(&[b, h, n, d]), Some(d_out.shape()))?;
        check_part("gradients.q", Some(x.q.shape()), Some(gradients.q.shape()))?;
        check_part("gradients.k", Some(x.k.shape()), Some(gradients.k.shape()))?;
        check_part("gradients.v", Some(x.v.shape()), Some(gradients.v.shape()))?;
        let extents = self.relative.as_ref().map(|relative| relative.extents());
        for axis in 0..2 {
            let want = extents.map(|extents| [extents[axis], x.q.dim().3]);
            let got = gradients.relative.as_ref().map(|tables| tables[axis].shape());
            check_part("gradients.relative", want.as_ref().map(|x| &x[..]), got)?;
        }
        run_in(workspace, bytes, |pass| self.back(pass, x, d_out, Some(gradients)))
    }

    fn reference_backward(
        &self,
        x: Qkv<'_, T>,
        d_out: ArrayView4<'_, f32>,
        _: (),
    ) -> Result<HaloGradients<f64>> {
        let (dims, (b, h, n, d)) = (self.check(&x)?, x.out_dim()?);
        check_part("d_out", Some(&[b, h, n, d]), Some(d_out.shape()))?;
        let border = self.halo.border();
        let padded = |x: &ArrayView4<'_, T>| {
            let (batch, heads, _, dim) = x.dim();
            let all = border.padded[0] * border.padded[1];
            let mut to = Array4::zeros((batch, heads, all, dim));
            for (mut to, x) in to.outer_iter_mut().zip(x.outer_iter()) {
                for (mut to, x) in to.outer_iter_mut().zip(x.outer_iter()) {
                    to.assign(&border.define(&x.map(|x| x.to_f64())));
                }
            }
            to
        };
        let [rows, _] = self.relative.as_ref().map_or([0; 2], |relative| relative.extents());
        let window = self.halo.window();
        let relations = |_: &Head, i: usize, j: usize| {
            let [query, key] = self.halo.inside(i, j)?;
            let of = |axis: usize| key[axis] + window[axis] - 1 - query[axis];
            Some(if self.relative.is_some() { vec![of(0), rows + of(1)] } else { vec![] })
        };
        let none = Array2::zeros((0, dims.head_dim));
        let table = self.relative.as_ref().map_or(none.view(), |relative| relative.table());
        let related = Related {
            scale: self.halo.scale(&dims),
            factor: self.factor(&dims),
            biases: [None, None],
            table: table.insert_axis(Axis(0)),
            values: None,
            relations: &relations,
        };
        let (q, k, v) = (exact(&x.q), padded(&x.k), padded(&x.v));
        let of_padded = Dims { kv_len: k.dim().2, ..dims };
        let arrays = [q.view(), k.view(), v.view()];
        let found = related.gradients(&of_padded, &x.lengths, arrays, exact(&d_out).view());
        let RelatedGradients { q, k, v, table, .. } = found;
        let table = table.index_axis_move(Axis(0), 0);
        let part = |rows: Range<usize>| table.slice(s![rows, ..]).to_owned();
        let relative = self.relative.as_ref().map(|_| [part(0..rows), part(rows..table.nrows())]);
        Ok(HaloGradients { q, k: border.define_inside(&k), v: border.define_inside(&v), relative })
    }
}
