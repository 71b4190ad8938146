//! Relative terms that depend on the query: its dot products with an embedding
//! of each distance, on each axis of an image.

use ndarray::{Array2, ArrayView4};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::simd::Isa;
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
        let matrix =
            ndarray::concatenate![ndarray::Axis(0), *rows, *cols].t().as_standard_layout().into_owned();
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

    /// The embeddings of a distance of rows, and of one of columns, of a key
    /// behind a query.
    pub(crate) fn of(&self, dy: isize, dx: isize) -> [ndarray::ArrayView1<'_, f32>; 2] {
        let [rows, _] = self.extents();
        let at = |d: isize, reach: usize| (d + reach as isize - 1) as usize;
        [self.matrix.column(at(dy, self.reach[0])), self.matrix.column(rows + at(dx, self.reach[1]))]
    }
}
