//! Neighborhood attention (NATTEN): a window of nearest keys.

use std::sync::Arc;

use ndarray::{Array2, ArrayD, ArrayView4};

use crate::attention::Cost;
use crate::card::carded;
use crate::definition::softmax::Reference;
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::call::Call;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::input::global::GlobalQkv;
use crate::keys::grid::{AXES, Grid};
use crate::keys::images::{Each, Images};
use crate::keys::window::Axis;
use crate::score::grid::Offsets;
use crate::score::smooth::AnySmooth;
use crate::stages::attend::{Attending, attending, mergeable};
use crate::stages::attend_backward::{SavedForward, Shapes, Smooth, shapes, smooth};
use crate::stages::beside::Beside;
use crate::stages::grid::{Biased, Parts, orders, region};
use crate::stages::options::{FINITE, options};
use exhibits::NeighborhoodExhibit;

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
/// cut. Borders are those of the query's own image: where images are
/// [`packed`](Self::packed) one after the other, or fill a part of the shape
/// ([`extents`](NeighborhoodBuilder::extents)), `L` is the size of that image, and
/// places and residues count from its first token:
///
/// ```text
/// packed:  token t of image m is row  sum_{l < m} |image l| + t
/// padded:  token (y, x) of entry b is row  y W + x,  y < h_b, x < w_b
/// i sees j  iff  both are tokens of one image, start <= y' < end on every axis,
///                and j is none of the keys that `tokens` hides
/// ```
///
/// "Neighborhood Attention Transformer" (arXiv 2204.07143), dilation from
/// arXiv 2209.15001, causal axes from arXiv 2403.04690, strides from arXiv
/// 2504.16922; rule and bias as in the NATTEN library.
///
/// Cost: `2 (head_dim + value_dim) prod(w)` flops a query; padding costs nothing.
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
/// of the bias. Over a [`GlobalQkv`] they are those of its parts, each given the output
/// and the LSE of the whole: of the windows by a `Neighborhood` without
/// [`global`](NeighborhoodBuilder::global) keys, of these by [`Dense`](crate::dense::Dense).
#[derive(Clone, Debug)]
pub struct Neighborhood {
    on_grid: Biased,
    images: Images,
    axes: [Axis; AXES],
    tokens: Option<Arc<Array2<bool>>>,
    global: Beside,
}

impl Neighborhood {
    /// Windows of `window` places on the axes of `shape`, without dilation,
    /// with a window for each query, in both directions.
    pub fn builder(shape: &[usize], window: &[usize]) -> NeighborhoodBuilder {
        NeighborhoodBuilder::with(vec![shape.to_vec()], false, window.to_vec())
    }

    /// The same for several images, each of a shape of its own, whose tokens lie one
    /// image after the other on the axis of tokens: arrays are `[batch, heads, total,
    /// dim]`, without padding. No window leaves its image.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, neighborhood::Neighborhood};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::<f32>::ones((1, 2, 14 * 14 + 7 * 21, 16));
    /// let attention = Neighborhood::packed(&[[14, 14], [7, 21]], &[7, 7]).build()?;
    /// let out = attention.forward(Qkv::new(&x, &x, &x))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    #[doc(alias = "varlen")]
    pub fn packed<S: AsRef<[usize]>>(shapes: &[S], window: &[usize]) -> NeighborhoodBuilder {
        NeighborhoodBuilder::with(vecs(shapes), true, window.to_vec())
    }
}

fn vecs<S: AsRef<[usize]>>(shapes: &[S]) -> Vec<Vec<usize>> {
    shapes.iter().map(|shape| shape.as_ref().to_vec()).collect()
}

options! {
    /// Builds a [`Neighborhood`].
    NeighborhoodBuilder of Neighborhood, isa;
    given { shapes: Vec<Vec<usize>>; packed: bool; window: Vec<usize>; }
    own {
        extents: Option<Vec<Vec<usize>>> = None;
        tokens: Option<Array2<bool>> = None;
        dilation: Option<Vec<usize>> = None;
        stride: Option<Vec<usize>> = None;
        causal: Option<Vec<bool>> = None;
        bias: Option<ArrayD<f32>> = None;
        global: usize = 0;
        scale: Option<f32> = None, in FINITE;
    }
    build(builder, config) {
        let NeighborhoodBuilder { mut shapes, packed, window, extents, tokens, .. } = builder;
        let NeighborhoodBuilder { dilation, stride, causal, bias, global, scale, .. } = builder;
        let mut what = packed.then_some("image");
        let images = match extents {
            Some(_) if packed => {
                let reason = "each image has the shape that it is given, and no padding";
                return Err(Error::Conflict { option: "extents", with: "packed images", reason });
            }
            Some(extents) => {
                let images = Images::padded(&shapes[0], &extents)?;
                (shapes, what) = (extents, Some("batch entry"));
                images
            }
            None if packed => Images::packed(&shapes, window.len())?,
            None => Images::one(Grid::new(&shapes[0])?),
        };
        let of_axes = Axis::all(images.axes(), &window, dilation, stride, causal)?;
        let name = |image: usize| what.map_or(String::new(), |what| format!(" of {what} {image}"));
        Axis::check_all(&of_axes, &shapes, name)?;
        let axes = Grid::spread(&of_axes, Axis::NONE);
        let step = axes.map(|axis| axis.dilation);
        let reach = |axis: usize, at, size| axes[axis].reach(at, size);
        let plain = Arc::new(images.plain());
        let offsets = |bias: ArrayD<f32>| {
            Offsets::new(bias.view(), axes.map(|axis| axis.window), step, plain.clone(), plain.clone())
        };
        let parts = Parts {
            images: images.clone(),
            orders: Each::of_images(&images, |grid| orders(grid, step)),
            reach: &reach,
            bias: bias.map(offsets).transpose()?,
            tokens: tokens.as_ref(),
            scale,
            isa: Some(config.isa),
        };
        let on_grid = Biased::new(parts, |grid| region(grid, step))?;
        Ok(Neighborhood { on_grid, images, axes, tokens: tokens.map(Arc::new), global: Beside::new(global, plain) })
    }
}

impl NeighborhoodBuilder {
    /// Images that do not fill the shape: batch entry `b` has tokens in the first
    /// `extents[b]` places of each axis alone, and its windows stay inside those. What
    /// lies beyond is padding, which is never read: outputs there are 0, with an LSE of
    /// -inf, and gradients too. Default: every entry fills the shape.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, neighborhood::Neighborhood};
    /// use ndarray::Array4;
    ///
    /// let x = Array4::<f32>::ones((2, 2, 14 * 14, 16));
    /// let builder = Neighborhood::builder(&[14, 14], &[7, 7]);
    /// let attention = builder.extents(&[[14, 10], [7, 14]]).build()?;
    /// let out = attention.forward(Qkv::new(&x, &x, &x))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    #[doc(alias = "padding")]
    pub fn extents<S: AsRef<[usize]>>(self, extents: &[S]) -> Self {
        Self { extents: Some(vecs(extents)), ..self }
    }

    /// Which keys are tokens, `[batch | 1, len]`: others are padding, which no query
    /// sees. Windows are where they were, and a query whose window has no token gives
    /// 0, with an LSE of -inf. Where padding is what follows an image,
    /// [`extents`](Self::extents) costs less, and moves windows inside the image.
    /// Default: all.
    #[doc(alias = "key_padding_mask")]
    pub fn tokens(self, tokens: Array2<bool>) -> Self {
        Self { tokens: Some(tokens), ..self }
    }

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
    /// Whether a row of a batch entry sees another, or a key beside the images.
    fn sees(&self, entry: usize, query: usize, key: usize) -> bool {
        let Some(own) = self.images.spot(entry, query) else { return false };
        if key >= self.images.len() {
            return true;
        }
        let is_token = |x: &Arc<Array2<bool>>| x[[if x.nrows() == 1 { 0 } else { entry }, key]];
        self.images.spot(entry, key).is_some_and(|other| {
            let inside =
                |axis: usize| self.axes[axis].sees(own.sizes[axis], own.place[axis], other.place[axis]);
            own.image == other.image && (0..AXES).all(inside)
        }) && self.tokens.as_ref().is_none_or(is_token)
    }
}

impl<Q: Element, K: Element, O: Element> Attending<Qkv<'_, Q, K, O>> for Neighborhood {
    fn with_call<R>(&self, x: Qkv<'_, Q, K, O>, run: impl FnOnce(&Call<'_>) -> R) -> Result<R> {
        self.global.none()?;
        self.on_grid.with_call(x.reborrow(), None, run)
    }

    fn define(&self, x: Qkv<'_, Q, K, O>) -> Result<Reference> {
        self.global.none()?;
        self.on_grid.define(x, |entry, query, key| self.sees(entry, query, key))
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
        self.on_grid.define_back(x, |entry, query, key| self.sees(entry, query, key), d_out, saved)
    }

    fn shapes(&self, x: Qkv<'_, Q, K, O>) -> Result<Shapes> {
        Ok(Shapes { table: self.on_grid.table(), ..shapes(&x) })
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
        self.on_grid.define_beside(x, &self.global, |entry, query, key| self.sees(entry, query, key))
    }

    fn price(&self, x: GlobalQkv<'_, T>) -> Result<Cost> {
        self.global.keys(&x.reborrow())?;
        let queries = self.images.tokens(x.qkv.q.dim().0);
        Ok(self.global.cost(self.on_grid.cost(&x.qkv)?, &x, queries))
    }
}

attending!(Neighborhood, [T] GlobalQkv);
mergeable!(Neighborhood, [T] GlobalQkv);

carded!(Neighborhood, NeighborhoodExhibit);

pub(crate) mod exhibits;

#[cfg(test)]
mod image_tests;
#[cfg(test)]
mod tests;
