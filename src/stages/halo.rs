//! Blocks of queries over windows of keys that overlap: keys and values have
//! zeros around them, which take part.

use std::sync::Arc;

use ndarray::{Array4, ArrayView4, ArrayViewMut4};

use crate::element::Element;
use crate::engine::attend_backward::Gradients;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv};
use crate::keys::grid::{AXES, Grid, Order};
use crate::score::grid::Terms;
use crate::score::{Plain, Score, Smooth};
use crate::simd::Isa;
use crate::stages::border::Border;
use crate::stages::grid::{OnGrid, image};
use crate::stages::pass::{Out, Pass, Scratch};

/// Sums of gradients: of queries, keys and values.
type Sums<'a> = [&'a mut Array4<f32>; 3];

/// Blocks that tile an image of queries, each over a block of keys and so much
/// around it.
#[derive(Clone, Debug)]
pub(crate) struct Halo {
    on_grid: OnGrid<Plain>,
    border: Border,
    queries: Arc<Order>,
    keys: Arc<Order>,
    /// Of keys.
    block: [usize; 2],
    halo: [usize; 2],
    stride: usize,
    /// Where queries lie among the keys: [`Terms::places`].
    places: [Vec<u32>; 2],
}

impl Halo {
    /// An image of `shape`, of whose pixels every `stride`-th on each axis has
    /// a query.
    pub(crate) fn new(
        shape: [usize; 2],
        block: [usize; 2],
        halo: [usize; 2],
        stride: usize,
        scale: Option<f32>,
        isa: Option<Isa>,
    ) -> Result<Self> {
        for axis in 0..2 {
            let (size, block) = (shape[axis], block[axis]);
            if block == 0 || !size.is_multiple_of(block) {
                return Err(Error::value(
                    "block",
                    format!("a divisor of {size} pixels on axis {axis}"),
                    block,
                ));
            }
            if stride == 0 || !block.is_multiple_of(stride) {
                let expected = format!("a divisor of the block, {block}, on axis {axis}");
                return Err(Error::value("stride", expected, stride));
            }
        }
        let around: [usize; 2] = std::array::from_fn(|i| halo[i].saturating_mul(2).saturating_add(shape[i]));
        let (of_queries, of_keys) = (Grid::new(&shape.map(|size| size / stride))?, Grid::new(&around)?);
        let order = |grid, width: usize| Arc::new(Order::new(grid, [1; AXES], [1, width], [0; AXES]));
        let (queries, keys) = (order(of_queries, block[1] / stride), order(of_keys, block[1]));
        let [blocks, halos] = [Grid::spread(&block, 1), Grid::spread(&halo, 0)];
        let reach = |axis: usize, at: usize, _| {
            let (block, own) = (blocks[axis], (blocks[axis] / stride).max(1));
            at / own * block..at / own * block + block + 2 * halos[axis]
        };
        // The axis that an image does not have.
        let reach = |axis, at, size| if axis == 1 { 0..1 } else { reach(axis, at, size) };
        let on_grid = OnGrid::new([queries.clone(), keys.clone()], &reach, Plain, scale, isa)?;
        let places = std::array::from_fn(|axis| {
            let own = block[axis] / stride;
            (0..shape[axis] / stride).map(|at| (at / own * block[axis] + at % own) as u32).collect()
        });
        let border = Border { image: shape, before: halo, padded: around };
        Ok(Self { on_grid, border, queries, keys, block, halo, stride, places })
    }

    pub(crate) fn isa(&self) -> Isa {
        self.on_grid.isa()
    }

    pub(crate) fn scale(&self, dims: &Dims) -> f64 {
        self.on_grid.scale(dims)
    }

    pub(crate) fn border(&self) -> &Border {
        &self.border
    }

    pub(crate) fn orders(&self) -> [Arc<Order>; 2] {
        [self.queries.clone(), self.keys.clone()]
    }

    /// Sides of the windows of keys.
    pub(crate) fn window(&self) -> [usize; 2] {
        std::array::from_fn(|i| self.block[i] + 2 * self.halo[i])
    }

    pub(crate) fn check<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        image(x, [self.border.image.map(|size| size / self.stride), self.border.image])
    }

    /// The change of scores by terms of each query.
    pub(crate) fn terms<'a>(
        &'a self,
        dims: &Dims,
        terms: &'a Scratch<'_>,
        extents: [usize; 2],
        factor: f32,
    ) -> Terms<'a> {
        let (queries, keys, places) = (&*self.queries, &*self.keys, &self.places);
        let (stride, heads) = (terms.stride(), dims.q_heads);
        Terms { terms: terms.numbers(), stride, heads, extents, factor, queries, keys, places }
    }

    pub(crate) fn attend<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: Qkv<'_, T>,
        score: Option<impl Score>,
        out: Out<'_, T>,
    ) -> Result<()> {
        let k = self.border.run(pass, self.isa(), x.k)?;
        let v = self.border.run(pass, self.isa(), x.v)?;
        let x = Qkv::<T, f32>::new(x.q.reborrow(), k.view(), v.view());
        match score {
            None => self.on_grid.attend(pass, x, None, out),
            Some(score) => self.on_grid.with_score(score).attend(pass, x, None, out),
        }
    }

    /// Gradients, given that of the output: of queries as far as they meet keys, of
    /// keys and of values, which are added, and of the terms of each query.
    pub(crate) fn backward<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        x: Qkv<'_, T>,
        score: Option<impl Smooth>,
        d_out: ArrayView4<'_, f32>,
        to: Option<(Sums<'_>, Option<ArrayViewMut4<'_, f32>>)>,
    ) -> Result<()> {
        let k = self.border.run(pass, self.isa(), x.k)?;
        let v = self.border.run(pass, self.isa(), x.v)?;
        let [mut dk, mut dv] = [pass.rows(k.dim())?, pass.rows(v.dim())?];
        let x = Qkv::<T, f32>::new(x.q.reborrow(), k.view(), v.view());
        let (arrays, of_queries) = to.map_or((None, None), |(arrays, terms)| (Some(arrays), terms));
        let Some([dq, to_k, to_v]) = arrays else {
            return match score {
                None => self.on_grid.backward(pass, x, d_out, None),
                Some(score) => self.on_grid.with_score(score).backward(pass, x, d_out, None),
            };
        };
        if let (Some(k), Some(v)) = (dk.view_mut(), dv.view_mut()) {
            let (sinks, table, of_keys, gate) = (None, None, None, None);
            let to = Gradients { q: dq.view_mut(), k, v, sinks, table, of_queries, of_keys, gate };
            match score {
                None => self.on_grid.backward(pass, x, d_out, Some(to))?,
                Some(score) => self.on_grid.with_score(score).backward(pass, x, d_out, Some(to))?,
            }
        }
        self.border.add_inside(dk.view(), to_k);
        self.border.add_inside(dv.view(), to_v);
        Ok(())
    }

    /// Where a query lies in its block and a key in the window of that, if it
    /// is there: for definitions.
    pub(crate) fn inside(&self, query: usize, key: usize) -> Option<[[usize; 2]; 2]> {
        let [wide, around] = [self.border.image[1] / self.stride, self.border.padded[1]];
        let (i, j) = ([query / wide, query % wide], [key / around, key % around]);
        let mut at = [[0; 2]; 2];
        for axis in 0..2 {
            let own = self.block[axis] / self.stride;
            let place = j[axis].checked_sub(i[axis] / own * self.block[axis])?;
            if place >= self.window()[axis] {
                return None;
            }
            (at[0][axis], at[1][axis]) = (i[axis] % own, place);
        }
        Some(at)
    }
}
