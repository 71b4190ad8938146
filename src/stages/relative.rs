//! Relative terms that depend on the query: its dot products with an embedding
//! of each distance, on each axis of an image.

use ndarray::{Array2, Array4, ArrayView2, ArrayView4, Axis};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::simd::Isa;
use crate::stages::outer::Outer;
use crate::stages::pass::{Pass, Scratch};
use crate::stages::project::Project;

/// Embeddings of distances, `2 reach - 1` on each axis.
#[derive(Clone, Debug)]
pub(crate) struct Relative {
    /// `[head_dim, distances of rows and then those of columns]`
    matrix: Array2<f32>,
    reach: [usize; 2],
}

impl Relative {
    /// Embeddings `[2 reach - 1, head_dim]` of rows and of columns.
    pub(crate) fn new([rows, cols]: [&Array2<f32>; 2], reach: [usize; 2]) -> Result<Self> {
        let dim = rows.dim().1;
        for ((argument, x), reach) in [("rows", rows), ("columns", cols)].into_iter().zip(reach) {
            if x.dim() != (2 * reach - 1, dim) {
                let expected = format!("[2 reach - 1, head_dim] = [{}, {dim}]", 2 * reach - 1);
                return Err(Error::shape(argument, expected, x.shape()));
            }
        }
        let matrix = ndarray::concatenate![Axis(0), *rows, *cols].t().as_standard_layout().into_owned();
        Ok(Self { matrix, reach })
    }

    /// Refuses queries of another size.
    pub(crate) fn check(&self, head_dim: usize) -> Result<()> {
        let (dim, [rows, _]) = (self.matrix.dim().0, self.reach);
        if dim == head_dim {
            return Ok(());
        }
        let expected = format!("[2 reach - 1, head_dim] with a head_dim of {head_dim}");
        Err(Error::shape("rows", expected, &[2 * rows - 1, dim]))
    }

    /// `[distances of rows and then those of columns, head_dim]`
    pub(crate) fn table(&self) -> ArrayView2<'_, f32> {
        self.matrix.t()
    }

    /// How many distances of rows there are, and of columns.
    pub(crate) fn extents(&self) -> [usize; 2] {
        self.reach.map(|reach| 2 * reach - 1)
    }

    /// The terms of each query, `[batch, heads, len, distances]`.
    pub(crate) fn run<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        isa: Isa,
        q: ArrayView4<'_, T>,
    ) -> Result<Scratch<'a>> {
        let (batch, heads, len, inner) = q.dim();
        let width = self.matrix.dim().1;
        let mut terms = pass.rows((batch, heads, len, width))?;
        let project = Project { isa, batch, heads, len, inner, width };
        let flops = || (2 * batch * heads * len * inner * width) as u64;
        pass.stage(flops, project.bytes(), |arena| {
            let matrix = self.matrix.broadcast((heads, inner, width));
            if let (Some(to), Some(matrix)) = (terms.view_mut(), matrix) {
                project.run(q, matrix, to, arena);
            }
        });
        Ok(terms)
    }

    /// Adds to gradients of queries what they have by their terms, and writes that of the
    /// embeddings, of rows and of columns, given that of the terms.
    pub(crate) fn backward<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        q: ArrayView4<'_, T>,
        of_terms: ArrayView4<'_, f32>,
        to: Option<(&mut Array4<f32>, [&mut Array2<f32>; 2])>,
    ) -> Result<()> {
        let ((batch, heads, len, dim), width) = (q.dim(), self.matrix.dim().1);
        let mut of_queries = pass.rows(q.dim())?;
        let project = Project { isa, batch, heads, len, inner: width, width: dim };
        pass.stage(
            || 0,
            project.bytes(),
            |arena| {
                let matrix = self.matrix.broadcast((heads, dim, width));
                if let (Some(to), Some(matrix)) = (of_queries.view_mut(), matrix) {
                    project.run(of_terms, matrix.permuted_axes([0, 2, 1]), to, arena);
                }
            },
        );
        let outer = Outer { isa, batch, heads, len, rows: width, cols: dim };
        let sums = pass.take(outer.numbers())?;
        sums.fill(0.0);
        pass.stage(|| 0, outer.bytes(), |arena| outer.add(of_terms, q, sums, arena));
        if let Some((of_q, [rows, columns])) = to {
            *of_q += &of_queries.view();
            outer.write(sums, 0, rows.view_mut().insert_axis(Axis(0)));
            outer.write(sums, self.extents()[0], columns.view_mut().insert_axis(Axis(0)));
        }
        Ok(())
    }

    /// The embeddings of a distance of rows, and of one of columns, of a key
    /// behind a query.
    pub(crate) fn of(&self, dy: isize, dx: isize) -> [ndarray::ArrayView1<'_, f32>; 2] {
        let [rows, _] = self.extents();
        let at = |d: isize, reach: usize| (d + reach as isize - 1) as usize;
        [self.matrix.column(at(dy, self.reach[0])), self.matrix.column(rows + at(dx, self.reach[1]))]
    }
}
