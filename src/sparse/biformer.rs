//! BiFormer's bi-level routing attention over images.

use std::sync::Arc;

use crate::attention::{Cost, Margins};
use crate::card::{carded, exhibit};
use crate::definition::softmax::{Definition, Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::{Call, Norm, RowOrder};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::grid::{Grid, Order};
use crate::keys::{Keys, TokenLists};
use crate::mask::{Unmasked, mask_fn_per_head};
use crate::score::Plain;
use crate::select::regions::{self, Regions, Routing};
use crate::simd::Isa;
use crate::simd::mem::Heads;
use crate::stages::attend::{Config, Options};
use crate::stages::selecting::{Selecting, selecting};

/// BiFormer's bi-level routing attention over images.
///
/// ```text
/// A[r, s] = sum_h mean_{i in r} q_i^h . mean_{j in s} k_j^h     for regions r and s
/// R(r)    = the k regions with the largest A[r, s], the lower one of equals
/// o_i     = softmax attention of q_i on the keys of the regions R(region of i)
/// ```
///
/// The image is cut into a grid of regions; what is left at its right and lower
/// edge is smaller regions (released models pad the image instead, and let
/// padding take part). All heads choose the same regions, and a region need not
/// choose itself. From "BiFormer: Vision Transformer with Bi-Level Routing
/// Attention" (arXiv 2303.08810). Its models scale by the width of all heads
/// together, `1 / sqrt(heads head_dim)`, and add a depthwise convolution of the
/// values to the output.
///
/// Regions are of a whole image: a cache, which grows token by token, has none, so it
/// runs over arrays.
///
/// Cost: `2 heads head_dim` flops a pair of regions, `2 (head_dim + value_dim)`
/// a selected pair of tokens. Fastest where regions divide the image.
///
/// Arrays are `[batch, heads, height * width, dim]`, row by row. An index counts
/// tokens region by region ([`order`](Self::order)).
///
/// ```
/// use attention_kernels::{Attention, Qkv, Selects, sparse::BiFormer};
/// use ndarray::Array4;
///
/// let x = Array4::from_shape_fn((1, 2, 28 * 28, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let biformer = BiFormer::builder([28, 28], 4).regions([7, 7]).build()?;
/// let index = biformer.select(x)?;
/// assert_eq!(index.keys(0, 0, 5), 4 * 16, "keys of the sixth region");
/// let out = biformer.forward_on(x, &index)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct BiFormer {
    config: Config<Unmasked, Plain>,
    shape: [usize; 2],
    regions: Arc<Regions>,
    k: usize,
}

/// Builds a [`BiFormer`].
#[derive(Clone, Debug)]
pub struct BiFormerBuilder {
    options: Options,
    shape: [usize; 2],
    regions: [usize; 2],
    k: usize,
}

impl BiFormer {
    /// An image of `shape`, whose regions choose `k` each.
    pub fn builder(shape: [usize; 2], k: usize) -> BiFormerBuilder {
        BiFormerBuilder { options: Options::default(), shape, regions: [7, 7], k }
    }

    /// The row of the arrays of each token, in the order of regions.
    pub fn order(&self) -> &[u32] {
        self.regions.rows()
    }

    fn checked<Q: Element, K: Element, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<Dims> {
        let dims = x.dims()?;
        if x.lengths != Lengths::Full {
            let reason = "every token of the image has a query and a key";
            return Err(Error::Conflict { option: "sequences of other lengths", with: "an image", reason });
        }
        if [dims.q_len, dims.kv_len] != [self.order().len(); 2] {
            let expected =
                format!("the {} tokens of {:?}, as queries and as keys", self.order().len(), self.shape);
            return Err(Error::value("q", expected, format_args!("{} and {}", dims.q_len, dims.kv_len)));
        }
        Ok(dims)
    }

    fn routing<'a, Q: Element, K: Element, O>(&'a self, x: Qkv<'a, Q, K, O>) -> Result<Routing<'a>> {
        let dims = self.checked(&x)?;
        let (q, k) = (Q::any(Heads::new(x.q)), K::any(Heads::new(x.k)));
        Ok(Routing { isa: self.config.isa(), dims, q, k, regions: &self.regions, count: self.k })
    }
}

impl BiFormerBuilder {
    /// Regions along the height and the width. Default: 7 x 7.
    pub fn regions(self, regions: [usize; 2]) -> Self {
        Self { regions, ..self }
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.options.isa = Some(isa);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Shape`] for an image of too many tokens, [`Error::Value`] for
    /// `k` or a number of regions of 0 or a scale that is not finite,
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<BiFormer> {
        let Self { options, shape: [height, width], regions, k } = self;
        if k == 0 {
            return Err(Error::value("k", "at least 1 region", 0));
        }
        if regions.contains(&0) {
            return Err(Error::value("regions", "at least 1 along each axis", format_args!("{regions:?}")));
        }
        // Columns of an order run along its first axis: of one place, they are
        // regions.
        let grid = Grid::new(&[1, height, width])?;
        let sizes = [height.div_ceil(regions[0]).max(1), width.div_ceil(regions[1]).max(1)];
        let order = Order::new(grid, [1; 3], sizes, [0; 3]);
        let starts = if grid.is_empty() {
            Vec::new()
        } else {
            order.columns(0, [0..height, 0..width]).map(|region| region.start).collect()
        };
        let regions = Arc::new(Regions::new(order.rows().to_vec(), starts));
        Ok(BiFormer { config: options.build()?, shape: self.shape, regions, k })
    }
}

impl<Q: Element, K: Element, O: Element> Selecting<Qkv<'_, Q, K, O>> for BiFormer {
    type Index = TokenLists;

    fn select_bytes(&self, x: Qkv<'_, Q, K, O>) -> Result<usize> {
        Ok(self.routing(x.reborrow())?.workspace_bytes())
    }

    fn select_in(&self, x: Qkv<'_, Q, K, O>, workspace: &mut Workspace) -> Result<TokenLists> {
        self.routing(x.reborrow())?.select(workspace)
    }

    fn define_select(&self, x: Qkv<'_, Q, K, O>) -> Result<(TokenLists, Margins)> {
        regions::define(&self.regions, &self.checked(&x)?, (&x.q, &x.k), self.k)
    }

    fn price_select(&self, x: Qkv<'_, Q, K, O>) -> Result<Cost> {
        Ok(Cost { flops: self.routing(x.reborrow())?.flops(), bytes: 0 })
    }

    fn with_call<R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        index: &TokenLists,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let keys = Keys::Tokens(index);
        keys.check(&self.checked(&x)?, &x.lengths)?;
        let call = self.config.call(x.reborrow(), Norm::Softmax { sinks: None }, None)?;
        let order = Some(RowOrder {
            queries: self.order(),
            keys: self.order(),
            cuts: None,
            entries: None,
            rest: &[],
        });
        Ok(run(&Call { keys, order, ..call }))
    }

    fn define(&self, x: Qkv<'_, Q, K, O>, index: &TokenLists) -> Result<Reference> {
        Keys::Tokens(index).check(&self.checked(&x)?, &x.lengths)?;
        let mut token = vec![0; self.order().len()];
        self.order().iter().enumerate().for_each(|(i, &row)| token[row as usize] = i);
        let mask = &mask_fn_per_head(|site, query, key| index.visible(site, token[query], token[key]));
        let normalisation = Normalisation::Softmax { sinks: None };
        let x = x.reborrow();
        let Definition { dims, score, scale, .. } = self.config.definition(x, normalisation, None)?;
        Definition { x, dims, mask, score, scale, normalisation, gains: None, extra: None }.compute()
    }

    fn price(&self, x: Qkv<'_, Q, K, O>, index: &TokenLists) -> Result<Cost> {
        Keys::Tokens(index).check(&self.checked(&x)?, &x.lengths)?;
        self.config.listed(Keys::Tokens(index)).cost(&x)
    }
}
selecting!(BiFormer, TokenLists, [Q, K, O] Qkv);

exhibit! {
    BiFormerExhibit of BiFormer, "sparse", "BiFormer", "arXiv 2303.08810";
    "of 4 x 4 regions of an image the 4 whose mean keys a region's mean query scores highest";
    not "where what matters is smaller than a region: means hide it";
    tokens true;
    build(x, _) { BiFormer::builder(Grid::squarest(x.q.dim().2), 4).regions([4, 4]) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(BiFormer, BiFormerExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Array4, Axis};

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::neighborhood::Swin;
    use crate::sparse::testing::{self, Arrays};

    const SHAPES: [([usize; 2], [usize; 2]); 4] =
        [([12, 20], [3, 5]), ([14, 14], [7, 7]), ([13, 9], [4, 2]), ([5, 3], [9, 1])];

    fn arrays([height, width]: [usize; 2]) -> Arrays {
        let n = height * width;
        Arrays::integers([2, 4, 2, n, n, 16, 8], n as u64)
    }

    #[test]
    fn all_regions_are_dense_and_none_but_its_own_is_a_window() {
        for (shape, regions) in SHAPES {
            let mut x = arrays(shape);
            let all = BiFormer::builder(shape, 100).regions(regions).build().unwrap();
            let dense = Dense::builder().build().unwrap().forward(x.qkv()).unwrap();
            testing::near("all regions", &all.forward(x.qkv()).unwrap(), &dense);
            if shape.iter().zip(regions).any(|(size, regions)| size % regions != 0) {
                continue;
            }
            // A channel that says where a token lies: its region scores highest.
            let windows = [shape[0] / regions[0], shape[1] / regions[1]];
            for (row, h) in (0..shape[0] * shape[1]).flat_map(|row| (0..4).map(move |h| (row, h))) {
                let (y, x_) = (row / shape[1] / windows[0], row % shape[1] / windows[1]);
                let angle =
                    (y * regions[1] + x_) as f32 * std::f32::consts::TAU / (regions[0] * regions[1]) as f32;
                for (c, turn) in [angle.cos(), angle.sin()].into_iter().enumerate() {
                    for b in 0..2 {
                        x.q[[b, h, row, c]] = 300.0 * turn;
                        x.k[[b, h / 2, row, c]] = 300.0 * turn;
                    }
                }
            }
            let own = BiFormer::builder(shape, 1).regions(regions).build().unwrap();
            let want = Swin::builder(shape, windows).build().unwrap().forward(x.qkv()).unwrap();
            testing::near("own region", &own.forward(x.qkv()).unwrap(), &want);
        }
    }

    #[test]
    fn exact_scores_give_equal_lists_and_the_order_inside_a_region_does_not_matter() {
        for (shape, regions) in SHAPES {
            let x = arrays(shape);
            let biformer = BiFormer::builder(shape, 2).regions(regions).build().unwrap();
            let (want, _) = biformer.reference_select(x.qkv()).unwrap();
            assert_eq!(biformer.select(x.qkv()).unwrap(), want, "{shape:?}");
            // Tokens of a region change places.
            let mut to: Vec<usize> = (0..biformer.order().len()).collect();
            for region in 0..biformer.regions.len() {
                let rows = &biformer.order()[biformer.regions.tokens(region)];
                rows.iter().zip(rows.iter().rev()).for_each(|(&a, &b)| to[a as usize] = b as usize);
            }
            let turn = |x: &Array4<f32>| x.select(Axis(2), &to);
            let y = Arrays { q: turn(&x.q), k: turn(&x.k), v: turn(&x.v) };
            assert_eq!(biformer.select(y.qkv()).unwrap(), want, "{shape:?}");
            let out = biformer.forward(x.qkv()).unwrap();
            testing::near("turned", &biformer.forward(y.qkv()).unwrap(), &turn(&out));
            let mut order = biformer.order().to_vec();
            order.sort_unstable();
            assert!(order.into_iter().eq(0..(shape[0] * shape[1]) as u32));
        }
    }

    #[test]
    fn refusals() {
        let refusal = |builder: BiFormerBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(BiFormer::builder([4, 4], 0)), "k: expected at least 1 region, got 0");
        assert!(refusal(BiFormer::builder([4, 4], 1).regions([0, 2])).starts_with("regions: "));
        assert!(refusal(BiFormer::builder([1 << 20, 1 << 20], 1)).starts_with("shape: "));
        let x = Arrays::normal([1, 1, 1, 15, 15, 4, 4], 1);
        let biformer = BiFormer::builder([4, 4], 1).build().unwrap();
        assert!(biformer.forward(x.qkv()).unwrap_err().to_string().starts_with("q: "));
        let five = Arrays::normal([5, 1, 1, 16, 16, 4, 4], 1);
        assert!(biformer.forward(five.qkv().key_lengths(&[1, 2, 3, 4, 5])).is_err());
    }
}
