//! Neighborhood attention (NATTEN): a window of nearest keys.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array4, ArrayD, ArrayView4};

use crate::attention::Cost;
use crate::card::{Extras, carded, exhibit};
use crate::definition::softmax::Reference;
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::input::global::GlobalQkv;
use crate::keys::grid::{AXES, Grid, Order};
use crate::score::grid::Offsets;
use crate::score::smooth::AnySmooth;
use crate::stages::attend::{Attending, attending, mergeable};
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, smooth};
use crate::stages::beside::Beside;
use crate::stages::grid::{Biased, orders, region};
use crate::stages::options::{FINITE, options};

/// What a window is on one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    window: usize,
    dilation: usize,
    stride: usize,
    causal: bool,
}

impl Axis {
    /// An axis that a grid does not have.
    const NONE: Self = Self { window: 1, dilation: 1, stride: 1, causal: false };

    /// What a place of a residue class of `size` sees.
    fn reach(self, at: usize, size: usize) -> Range<usize> {
        let Self { window, stride, causal, .. } = self;
        if causal {
            let leader = (at / stride * stride + stride - 1).min(size - 1);
            return (leader + 1).saturating_sub(window)..at + 1;
        }
        let leader = (at / stride * stride + stride / 2).min(size - 1);
        let start = leader.saturating_sub(window / 2).min(size.saturating_sub(window));
        start..(start + window).min(size)
    }

    /// The rule as NATTEN's kernels have it, for places of an axis of `size`.
    fn sees(self, size: usize, query: usize, key: usize) -> bool {
        let (group, d, s) = (query % self.dilation, self.dilation as isize, self.stride as isize);
        let (x, y) = ((query / self.dilation) as isize, (key / self.dilation) as isize);
        let length = (size as isize - group as isize + d - 1) / d;
        let (left, right) = ((self.window / 2) as isize, ((self.window - 1) / 2) as isize);
        let (start, end);
        if self.causal {
            let leader = (x / s * s + s - 1).min(length - 1);
            start = (leader - left - right).max(0);
            end = (x + 1).min(length);
        } else {
            let leader = (x / s * s + s / 2).min(length - 1);
            let past = if leader + right >= length { length - right - leader - 1 } else { 0 };
            start = (leader - left).max(0) + past;
            end = start + self.window as isize;
        }
        key % self.dilation == group && start <= y && y < end
    }
}

/// Neighborhood attention (NATTEN): a window of nearest keys.
///
/// ```text
/// o_i = sum_j softmax_j(scale * q_i . k_j + bias[h, j - i]) v_j     for neighbors j of i
/// ```
///
/// On each axis of `L` places a query at `x` meets keys of its own residue `g`
/// modulo the dilation `d`; with `x' = (x - g) / d` of `L' = ceil((L - g) / d)`
/// places, a window of `w` and a stride of `s` it sees `start <= y' < end`:
///
/// ```text
/// leader = min(floor(x' / s) s + floor(s / 2), L' - 1)
/// start  = clamp(leader - floor(w / 2), 0, L' - w)         end = start + w
/// causal:
/// leader = min(floor(x' / s) s + s - 1, L' - 1)
/// start  = max(leader - w + 1, 0)                          end = min(x' + 1, L')
/// ```
///
/// At a border the window is moved inside, and keeps its size; a causal one is
/// cut. "Neighborhood Attention Transformer" (arXiv 2204.07143), dilation from
/// arXiv 2209.15001, causal axes from arXiv 2403.04690, strides from arXiv
/// 2504.16922; rule and bias as in the NATTEN library.
///
/// Cost: `2 (head_dim + value_dim) prod(w)` flops a query.
///
/// Neighborhood attention on a sequence, an image or a volume; see the
/// [source](https://github.com/SHI-Labs/NATTEN) of its rules.
///
/// Arrays are `[batch, heads, len, dim]`, where `len` counts the tokens of the
/// shape, the last axis innermost. NATTEN's `[batch, height, width, heads,
/// dim]` is such an array without a copy: merge height and width, then permute
/// the axes of the view.
///
/// ```
/// use attention_kernels::{Attention, Qkv, neighborhood::Neighborhood};
/// use ndarray::Array;
///
/// let image = Array::<f32, _>::ones((1, 14, 14, 2, 16)); // batch, height, width, heads, dim
/// let x = image.view().into_shape_with_order((1, 14 * 14, 2, 16))?.permuted_axes([0, 2, 1, 3]);
/// let attention = Neighborhood::builder(&[14, 14], &[7, 7]).dilation(&[2, 1]).build()?;
/// let out = attention.forward(Qkv::new(x, x, x))?;
/// assert_eq!(out.dim(), (1, 2, 196, 16));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`Backward`](crate::Backward) gives the gradients of queries, keys, values and
/// of the bias, but not over a [`GlobalQkv`].
#[derive(Clone, Debug)]
pub struct Neighborhood {
    on_grid: Biased,
    grid: Grid,
    axes: [Axis; AXES],
    global: Beside,
}

impl Neighborhood {
    /// Windows of `window` places on the axes of `shape`, without dilation,
    /// with a window for each query, in both directions.
    pub fn builder(shape: &[usize], window: &[usize]) -> NeighborhoodBuilder {
        NeighborhoodBuilder::with(shape.to_vec(), window.to_vec())
    }
}

options! {
    /// Builds a [`Neighborhood`].
    NeighborhoodBuilder of Neighborhood, isa;
    given { shape: Vec<usize>; window: Vec<usize>; }
    own {
        dilation: Option<Vec<usize>> = None;
        stride: Option<Vec<usize>> = None;
        causal: Option<Vec<bool>> = None;
        bias: Option<ArrayD<f32>> = None;
        global: usize = 0;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let NeighborhoodBuilder { shape, window, dilation, stride, causal, bias, global, scale, .. } = builder;
        let grid = Grid::new(&shape)?;
        let n = grid.axes();
        let [dilation, stride] = [dilation, stride].map(|of_axes| of_axes.unwrap_or_else(|| vec![1; n]));
        let causal = causal.unwrap_or_else(|| vec![false; n]);
        let counts = [("window", window.len()), ("dilation", dilation.len()), ("stride", stride.len())];
        for (argument, count) in counts.into_iter().chain([("causal", causal.len())]) {
            if count != n {
                return Err(Error::value(argument, format!("one for each of the {n} axes"), count));
            }
        }
        for axis in 0..n {
            let (w, d, s, size) = (window[axis], dilation[axis], stride[axis], shape[axis]);
            let fits = grid.is_empty() || w.checked_mul(d).is_some_and(|span| span <= size);
            if d == 0 {
                return Err(Error::value("dilation", "at least 1", format_args!("0 on axis {axis}")));
            }
            if w == 0 || !fits {
                let expected = format!("from 1 to {size} places on axis {axis} at a dilation of {d}");
                return Err(Error::value("window", expected, w));
            }
            if s == 0 || s > w {
                let expected = format!("from 1 to the window, {w}, on axis {axis}");
                return Err(Error::value("stride", expected, s));
            }
        }
        let of_axes: Vec<_> = (0..n)
            .map(|i| Axis { window: window[i], dilation: dilation[i], stride: stride[i], causal: causal[i] })
            .collect();
        let axes = Grid::spread(&of_axes, Axis::NONE);
        let step = axes.map(|axis| axis.dilation);
        let orders = orders(grid, step);
        let reach = |axis: usize, at, size| axes[axis].reach(at, size);
        let plain = Arc::new(Order::plain(grid, [0; AXES]));
        let offsets = |bias: ArrayD<f32>| {
            Offsets::new(bias.view(), axes.map(|axis| axis.window), step, plain.clone(), plain.clone())
        };
        let global = Beside::new(global, grid);
        let bias = bias.map(offsets).transpose()?;
        let on_grid = Biased::new(orders, &reach, region(grid, step), bias, scale, Some(config.isa))?;
        Ok(Neighborhood { on_grid, grid, axes, global })
    }
}

impl NeighborhoodBuilder {
    /// How far apart the keys of a window are on each axis. Default: 1.
    pub fn dilation(self, dilation: &[usize]) -> Self {
        Self { dilation: Some(dilation.to_vec()), ..self }
    }

    /// How many neighboring queries share a window on each axis. Default: 1.
    pub fn stride(self, stride: &[usize]) -> Self {
        Self { stride: Some(stride.to_vec()), ..self }
    }

    /// On which axes a query sees no key after it. Default: none.
    pub fn causal(self, causal: &[bool]) -> Self {
        Self { causal: Some(causal.to_vec()), ..self }
    }

    /// A relative position bias `[heads | 1, 2 window - 1, ..]`, as NATTEN's
    /// `rpb`: entry `window - 1` of an axis is for the query's own place, those
    /// before it for keys before the query.
    pub fn bias(self, bias: ArrayD<f32>) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// So many keys and values beside the grid that every query sees, in the same
    /// softmax: the input is a [`GlobalQkv`] then. Default: none.
    pub fn global(self, global: usize) -> Self {
        Self { global, ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }
}

impl Neighborhood {
    fn sees(&self, query: usize, key: usize) -> bool {
        let (sizes, [query, key]) = (self.grid.sizes(), [query, key].map(|row| self.grid.place(row)));
        (0..AXES).all(|axis| self.axes[axis].sees(sizes[axis], query[axis], key[axis]))
    }
}

impl<Q: Element, K: Element, O: Element> Attending<Qkv<'_, Q, K, O>> for Neighborhood {
    fn with_call<R>(&self, x: Qkv<'_, Q, K, O>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        self.global.none()?;
        self.on_grid.with_call(x.reborrow(), None, run)
    }

    fn define(&self, x: Qkv<'_, Q, K, O>) -> Result<Reference> {
        self.global.none()?;
        self.on_grid.define(x, |query, key| self.sees(query, key))
    }

    fn price(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        self.on_grid.cost(&x)
    }
}

attending!(Neighborhood, [Q, K, O] Qkv);
mergeable!(Neighborhood, [Q, K, O] Qkv);

impl<Q: Element, K: Element, O: Element> Smooth<Qkv<'_, Q, K, O>> for Neighborhood {
    fn with_smooth<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        self.global.none()?;
        self.on_grid.with_smooth(x.reborrow(), run)
    }

    fn define_back(
        &self,
        x: Qkv<'_, Q, K, O>,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        self.global.none()?;
        self.on_grid.define_back(x, |query, key| self.sees(query, key), d_out, saved)
    }

    fn shapes(&self, x: Qkv<'_, Q, K, O>) -> Result<Shapes> {
        let arrays = [x.q.dim(), x.k.dim(), x.v.dim()];
        Ok(Shapes { arrays, sinks: None, table: self.on_grid.table() })
    }
}

smooth!(Neighborhood, [Q, K, O] Qkv);

impl<T: Element> Attending<GlobalQkv<'_, T>> for Neighborhood {
    fn with_call<R>(&self, x: GlobalQkv<'_, T>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        let extra = self.global.keys(&x.reborrow())?;
        self.on_grid.with_call(x.qkv.reborrow(), Some(extra), run)
    }

    fn define(&self, x: GlobalQkv<'_, T>) -> Result<Reference> {
        self.global.keys(&x.reborrow())?;
        self.on_grid.define_beside(x, &self.global, |query, key| self.sees(query, key))
    }

    fn price(&self, x: GlobalQkv<'_, T>) -> Result<Cost> {
        self.global.keys(&x.reborrow())?;
        Ok(self.global.cost(self.on_grid.cost(&x.qkv)?, &x))
    }
}

attending!(Neighborhood, [T] GlobalQkv);
mergeable!(Neighborhood, [T] GlobalQkv);

exhibit! {
    NeighborhoodExhibit of Neighborhood, "neighborhood", "neighborhood",
        "arXiv 2204.07143, 2209.15001, 2403.04690, 2504.16922";
    "the 7 x 7 nearest keys of an image, at a dilation of 2 across";
    not "where tokens must reach across the image in one layer";
    tokens true;
    build(x, _) {
        let shape = Grid::squarest(x.q.dim().2);
        let window = [shape[0].clamp(1, 7), (shape[1] / 2).clamp(1, 7)];
        let dilation = [1, if shape[1] < 2 { 1 } else { 2 }];
        Neighborhood::builder(&shape, &window).dilation(&dilation)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Neighborhood, NeighborhoodExhibit);

exhibit! {
    AdditionalExhibit of Neighborhood, "neighborhood", "neighborhood with additional keys", "arXiv 2504.16922";
    "the 5 x 5 nearest keys of an image and 7 keys beside it, in one softmax";
    not "where what stands beside the image must see it, too: one dense attention over both";
    tokens true;
    build(x, _) {
        let shape = Grid::squarest(x.q.dim().2);
        Neighborhood::builder(&shape, &shape.map(|size| size.clamp(1, 5))).global(7)
    }
    extras(x, field) {
        let (batch, heads, _, dim) = x.k.dim();
        let at = |which: u64, (h, t, c): (usize, usize, usize)| T::from_f32(field.at(which, h, t, c));
        let of = |which: u64, dim| Array4::from_shape_fn((batch, heads, 7, dim), |(_, h, t, c)| at(which, (h, t, c)));
        Extras { keys: of(1, dim), values: of(2, x.v.dim().3), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> GlobalQkv<'a, T> { GlobalQkv::new(x, extras.keys.view(), extras.values.view()) }
}

#[cfg(test)]
mod tests;
