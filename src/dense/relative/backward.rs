//! Gradients of relative positions.

use ndarray::{Array2, Array3, Array4, ArrayView4};

use super::RelativePositions;
use crate::attention::{Backward, Input};
use crate::definition::heads::Head;
use crate::definition::related_backward::{Related, RelatedGradients, exact};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::stages::attend_backward::check_part;
use crate::stages::distances::DistanceGradients;
use crate::stages::pass::{counted, of_no_memory, run_in};

/// Gradients of [`RelativePositions`], each of the shape of its array.
#[derive(Clone, Debug, PartialEq)]
pub struct RelativeGradients<A = f32> {
    /// Of the queries.
    pub q: Array4<A>,
    /// Of the keys.
    pub k: Array4<A>,
    /// Of the values.
    pub v: Array4<A>,
    /// Of the embeddings, `[q_heads | 1, reach, head_dim]`.
    pub table: Array3<A>,
    /// Of `u`, `[q_heads, head_dim]`, where there is one.
    pub content_bias: Option<Array2<A>>,
    /// Of `w`, likewise.
    pub position_bias: Option<Array2<A>>,
    /// Of the embeddings of values, `[q_heads | 1, reach, value_dim]`, where there are
    /// any.
    pub values: Option<Array3<A>>,
}

impl<T: Element> Backward<Qkv<'_, T>> for RelativePositions {
    type Gradients<A> = RelativeGradients<A>;
    type Carried<'a> = ();

    fn zero_gradients(&self, x: Qkv<'_, T>) -> Result<RelativeGradients> {
        self.checked(&x)?;
        let [content_bias, position_bias] =
            self.biases.each_ref().map(|bias| bias.as_ref().map(|bias| Array2::zeros(bias.dim())));
        Ok(RelativeGradients {
            q: Array4::zeros(x.q.dim()),
            k: Array4::zeros(x.k.dim()),
            v: Array4::zeros(x.v.dim()),
            table: Array3::zeros(self.distances.table().dim()),
            content_bias,
            position_bias,
            values: self.values.as_ref().map(|values| Array3::zeros(values.dim())),
        })
    }

    fn backward_workspace_bytes(&self, x: Qkv<'_, T>) -> Result<usize> {
        self.checked(&x)?;
        let d_out = of_no_memory(x.out_dim()?)?;
        counted(|pass| self.distances.backward(pass, &self.over(), x, d_out, None))
    }

    fn backward_into(
        &self,
        x: Qkv<'_, T>,
        d_out: ArrayView4<'_, f32>,
        _: (),
        gradients: &mut RelativeGradients,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let bytes = self.backward_workspace_bytes(x)?;
        let (b, h, n, d) = x.out_dim()?;
        let RelativeGradients { q, k, v, table, content_bias, position_bias, values } = gradients;
        check_part("d_out", Some(&[b, h, n, d]), Some(d_out.shape()))?;
        check_part("gradients.q", Some(x.q.shape()), Some(q.shape()))?;
        check_part("gradients.k", Some(x.k.shape()), Some(k.shape()))?;
        check_part("gradients.v", Some(x.v.shape()), Some(v.shape()))?;
        check_part("gradients.table", Some(self.distances.table().shape()), Some(table.shape()))?;
        let biases = [
            ("gradients.content_bias", &self.biases[0], &*content_bias),
            ("gradients.position_bias", &self.biases[1], &*position_bias),
        ];
        for (argument, want, got) in biases {
            check_part(argument, want.as_ref().map(|x| x.shape()), got.as_ref().map(|x| x.shape()))?;
        }
        let (want, got) = (self.values.as_ref().map(|x| x.shape()), values.as_ref().map(|x| x.shape()));
        check_part("gradients.values", want, got)?;
        run_in(workspace, bytes, |pass| {
            let biases = [content_bias.as_mut(), position_bias.as_mut()];
            let to = DistanceGradients { q, k, v, table, biases, values: values.as_mut() };
            self.distances.backward(pass, &self.over(), x, d_out, Some(to))
        })
    }

    fn reference_backward(
        &self,
        x: Qkv<'_, T>,
        d_out: ArrayView4<'_, f32>,
        _: (),
    ) -> Result<RelativeGradients<f64>> {
        let (dims, (b, h, n, d)) = (self.checked(&x)?, x.out_dim()?);
        check_part("d_out", Some(&[b, h, n, d]), Some(d_out.shape()))?;
        let scale = self.attend.scale(&dims);
        let relations = |head: &Head, i: usize, j: usize| {
            let behind = (head.keys.len() + i) as isize - (head.queries.len() + j) as isize;
            (!self.causal || behind >= 0).then(|| vec![self.distances.column(behind)])
        };
        let related = Related {
            scale,
            factor: scale,
            biases: self.views(),
            table: self.distances.table(),
            values: self.values.as_ref().map(|values| values.view()),
            relations: &relations,
        };
        let arrays = [exact(&x.q), exact(&x.k), exact(&x.v)];
        let arrays = arrays.each_ref().map(|x| x.view());
        let found = related.gradients(&dims, &x.lengths, arrays, exact(&d_out).view());
        let RelatedGradients { q, k, v, biases: [content_bias, position_bias], table, values } = found;
        Ok(RelativeGradients { q, k, v, table, content_bias, position_bias, values })
    }
}
