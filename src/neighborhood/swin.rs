//! Window attention and shifted windows (Swin).

use std::sync::Arc;

use ndarray::{Array2, ArrayView4};

use crate::attention::Cost;
use crate::card::{carded, exhibit};
use crate::definition::softmax::Reference;
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::keys::grid::{AXES, Grid, Order};
use crate::keys::images::{Each, Images};
use crate::score::smooth::AnySmooth;
use crate::simd::Isa;
use crate::stages::attend::{Attending, attending, mergeable};
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, shapes, smooth};
use crate::stages::grid::{Biased, Parts, window_bias};

/// What becomes of an image that windows do not divide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Padding {
    /// It is refused. Released models pad the map before they project it, so
    /// that padding has keys and values as well: so does the caller then.
    #[default]
    Refused,
    /// The image is padded to whole windows, right and below, and what is
    /// added is hidden.
    Hidden,
}

/// Window attention and shifted windows (Swin).
///
/// ```text
/// o_i = sum_j softmax_j(scale * q_i . k_j + table[t(i, j), h]) v_j     for j in the window of i
/// t(i, j) = (y_i - y_j + M_0 - 1) (2 M_1 - 1) + x_i - x_j + M_1 - 1
/// ```
///
/// Windows of `M_0 x M_1` pixels tile the image, which is rolled up and left by
/// `shift` before. In the last windows of a rolled image pixels from its two
/// ends meet; those do not see each other. "Swin Transformer: Hierarchical
/// Vision Transformer using Shifted Windows" (arXiv 2103.14030); index and
/// regions as in the released code, which adds -100 to the scores of pairs of
/// different regions: here they are hidden.
///
/// Nothing is copied into windows: rolling and cutting are an order of rows.
///
/// Cost: `2 (head_dim + value_dim) M_0 M_1` flops a query.
///
/// [`Backward`](crate::Backward) gives the gradients of queries, keys, values and,
/// heads first, of the table.
///
/// Attention inside windows of an image, shifted or not, with a relative
/// position bias.
///
/// Arrays are `[batch, heads, height * width, dim]`, row by row.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::Swin};
/// use ndarray::{Array2, Array4};
///
/// let x = Array4::<f32>::ones((1, 3, 14 * 14, 32));
/// let table = Array2::zeros((13 * 13, 3));
/// let swin = Swin::builder([14, 14], [7, 7]).shift([3, 3]).bias(table).build()?;
/// let out = swin.forward(Qkv::new(x.view(), x.view(), x.view()))?;
/// assert_eq!(out.dim(), (1, 3, 196, 32));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Swin {
    on_grid: Biased,
    grid: Grid,
    window: [usize; 2],
    shift: [usize; 2],
}

/// Builds a [`Swin`].
#[derive(Clone, Debug)]
pub struct SwinBuilder {
    shape: [usize; 2],
    window: [usize; 2],
    shift: [usize; 2],
    padding: Padding,
    bias: Option<Array2<f32>>,
    scale: Option<f32>,
    isa: Option<Isa>,
}

impl Swin {
    /// Windows of `window` pixels, height and width, of an image of `shape`.
    pub fn builder(shape: [usize; 2], window: [usize; 2]) -> SwinBuilder {
        let padding = Padding::default();
        SwinBuilder { shape, window, shift: [0; 2], padding, bias: None, scale: None, isa: None }
    }

    /// The window and the region of a pixel on an axis, as the paper makes
    /// them: the axis is padded, rolled and cut.
    fn place(&self, axis: usize, size: usize, pixel: usize) -> (usize, usize) {
        let (window, shift) = (self.window[axis], self.shift[axis]);
        let padded = size.next_multiple_of(window);
        let rolled = (pixel + padded - shift) % padded;
        let region = usize::from(rolled + window >= padded) + usize::from(rolled + shift >= padded);
        (rolled / window, if shift == 0 { 0 } else { region })
    }

    fn sees(&self, query: usize, key: usize) -> bool {
        let [height, _, width] = self.grid.sizes();
        let [[a, _, b], [c, _, d]] = [query, key].map(|row| self.grid.place(row));
        self.place(0, height, a) == self.place(0, height, c)
            && self.place(1, width, b) == self.place(1, width, d)
    }
}

impl SwinBuilder {
    /// How far the image is rolled up and left; models take half a window in
    /// every other layer. Default: not at all.
    pub fn shift(self, shift: [usize; 2]) -> Self {
        Self { shift, ..self }
    }

    /// What becomes of an image that windows do not divide. Default: it is
    /// refused.
    pub fn padding(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    /// The relative position bias as models store it, `[(2 height - 1) (2 width
    /// - 1), heads]` of the window.
    pub fn bias(self, table: Array2<f32>) -> Self {
        Self { bias: Some(table), ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Shape`] for an image of too many pixels or a table that does
    /// not fit, [`Error::Value`] for a window below 1 or larger than the image,
    /// or one that does not divide it where that is refused, a shift that is
    /// not below the window, a scale that is not finite, [`Error::Isa`] for an
    /// instruction set that the CPU lacks.
    pub fn build(self) -> Result<Swin> {
        let Self { shape, window, shift, padding, bias, scale, isa } = self;
        let grid = Grid::new(&shape)?;
        for (axis, (&size, (&window, &shift))) in shape.iter().zip(window.iter().zip(&shift)).enumerate() {
            let whole = padding == Padding::Hidden || (window > 0 && size % window == 0);
            if !grid.is_empty() && (window > size || !whole) || window == 0 {
                let what = if padding == Padding::Hidden { "from 1 to" } else { "a divisor of" };
                return Err(Error::value("window", format!("{what} {size} pixels on axis {axis}"), window));
            }
            if shift >= window {
                let expected = format!("less than the window, {window}, on axis {axis}");
                return Err(Error::value("shift", expected, shift));
            }
        }
        let roll = Grid::spread(&shift, 0);
        let windows = Grid::spread(&window, 1);
        // Rolled places whose pixels come from the other end are a region of
        // their own, and with padding may be the rest of an earlier window.
        let reach = |axis: usize, at: usize, size: usize| {
            let turn = size.saturating_sub(roll[axis]);
            if at >= turn {
                return turn..size;
            }
            let start = at / windows[axis] * windows[axis];
            start..(start + windows[axis]).min(turn)
        };
        let order = Arc::new(Order::new(grid, [1; AXES], [1, window[1]], roll));
        let plain = Arc::new(Order::plain(grid, roll));
        let offsets = |table: Array2<f32>| window_bias(&table, window, plain.clone(), plain.clone());
        let bias = bias.map(offsets).transpose()?;
        let (images, orders) = (Images::one(grid), Each::one([order.clone(), order]));
        let parts = Parts { images, orders, reach: &reach, bias, tokens: None, scale, isa };
        let on_grid = Biased::new(parts, |_| Some(windows))?;
        Ok(Swin { on_grid, grid, window, shift })
    }
}

impl<Q: Element, K: Element, O: Element> Attending<Qkv<'_, Q, K, O>> for Swin {
    fn with_call<R>(&self, x: Qkv<'_, Q, K, O>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        self.on_grid.with_call(x.reborrow(), None, run)
    }

    fn define(&self, x: Qkv<'_, Q, K, O>) -> Result<Reference> {
        self.on_grid.define(x, |_, query, key| self.sees(query, key))
    }

    fn price(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        self.on_grid.cost(&x)
    }
}

attending!(Swin, [Q, K, O] Qkv);
mergeable!(Swin, [Q, K, O] Qkv);

impl<Q: Element, K: Element, O: Element> Smooth<Qkv<'_, Q, K, O>> for Swin {
    fn with_smooth<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        self.on_grid.with_smooth(x.reborrow(), run)
    }

    fn define_back(
        &self,
        x: Qkv<'_, Q, K, O>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        self.on_grid.define_back(x, |_, query, key| self.sees(query, key), d_out, saved)
    }

    fn shapes(&self, x: Qkv<'_, Q, K, O>) -> Result<Shapes> {
        Ok(Shapes { table: self.on_grid.table(), ..shapes(&x) })
    }

    /// Models count from queries to keys.
    fn arrange<N>(&self, entries: &mut [N]) {
        entries.reverse();
    }
}

smooth!(Swin, [Q, K, O] Qkv);

exhibit! {
    SwinExhibit of Swin, "neighborhood", "Swin", "arXiv 2103.14030";
    "shifted windows of 7 x 7 pixels with a relative position bias";
    not "where what is near must be seen at the border of a window: neighborhood attention";
    tokens true;
    build(x, field) {
        let shape = Grid::squarest(x.q.dim().2);
        let window = shape.map(|size| size.clamp(1, 7));
        let entries = (2 * window[0] - 1) * (2 * window[1] - 1);
        let bias = |(t, h): (usize, usize)| 2.0 * field.at(1, h, t, 0);
        Swin::builder(shape, window)
            .shift(window.map(|window| window / 2))
            .padding(Padding::Hidden)
            .bias(Array2::from_shape_fn((entries, x.q.dim().1.max(1)), bias))
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Swin, SwinExhibit);

#[cfg(test)]
mod tests;
