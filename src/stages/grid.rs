//! Calls of the attention engine over tokens on a grid: a mask and a score in
//! an order of rows in which windows are few long runs of keys.

use std::sync::Arc;

use ndarray::{Array2, Array4, ArrayView4, Axis, concatenate, s};

use crate::attention::Cost;
use crate::definition::softmax::{Definition, Normalisation, Reference};
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Call, Norm, Regional, RowOrder, Virtual};
use crate::error::{Error, Result};
use crate::input::global::GlobalQkv;
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::grid::{AXES, Grid, Order};
use crate::keys::regions::{Reach, Regions};
use crate::mask::grid::Local;
use crate::mask::{Mask, mask_fn};
use crate::score::grid::{Offsets, OffsetsBeside, RegionOffsets};
use crate::score::smooth::{AnySmooth, Smooth};
use crate::score::{AnyScore, Plain, Score};
use crate::simd::Isa;
use crate::stages::attend::{Config, Options};
use crate::stages::attend_backward::SavedForward;
use crate::stages::beside::Beside;
use crate::stages::pass::{Out, Pass};

/// Widths of the columns of queries: two groups of rows of the register tile,
/// and a tile of queries is then about as high as it is wide.
const QUERIES: usize = 12;
/// Widths of the columns of keys: a vector and its neighbours are two rows of
/// a column.
const KEYS: usize = 8;
/// Widths of the columns of volumes, on the last two axes.
const VOLUME: usize = 4;
/// Sides of regions of an image and of a volume: about as many queries as a tile
/// has rows, and rows of an image that are whole groups of the register tile's.
const REGION: [usize; AXES] = [12, 1, 12];
const VOLUME_REGION: [usize; AXES] = [8, 6, 6];

/// The orders of queries and keys for windows on a grid: residue classes of
/// `dilation`, columns of few tokens.
pub(crate) fn orders(grid: Grid, dilation: [usize; AXES]) -> [Arc<Order>; 2] {
    let whole = grid.sizes()[2].max(1);
    let tiles = match grid.axes() {
        1 => [[1, whole]; 2],
        2 => [[1, QUERIES], [1, KEYS]],
        _ => [[VOLUME; 2]; 2],
    };
    tiles.map(|tile| Arc::new(Order::new(grid, dilation, tile, [0; AXES])))
}

/// The sides of regions of queries whose windows overlap, in residue classes of
/// `step`: even parts of each axis. None on a line, where a window is a run of
/// keys as it is.
pub(crate) fn region(grid: Grid, step: [usize; AXES]) -> Option<[usize; AXES]> {
    let most = match grid.axes() {
        1 => return None,
        2 => REGION,
        _ => VOLUME_REGION,
    };
    Some(std::array::from_fn(|axis| {
        let size = grid.sizes()[axis].div_ceil(step[axis].max(1));
        size.div_ceil(size.div_ceil(most[axis]).max(1)).max(1)
    }))
}

/// The sizes of queries and of keys and values that are the pixels of images of
/// these shapes, row by row.
pub(crate) fn image<Q: Element, K: Element, O>(
    x: &Qkv<'_, Q, K, O>,
    shapes: [[usize; 2]; 2],
) -> Result<Dims> {
    let dims = x.dims()?;
    if dims.packed {
        return Err(Error::packed("a spatial shape"));
    }
    whole(&x.lengths)?;
    for ((argument, len), shape) in [("q", dims.q_len), ("k", dims.kv_len)].into_iter().zip(shapes) {
        let tokens = shape[0].saturating_mul(shape[1]);
        if len != tokens {
            let expected = format!("one row for each of the {tokens} tokens of the shape");
            return Err(Error::value(argument, expected, len));
        }
    }
    Ok(dims)
}

/// Refuses key lengths.
fn whole(lengths: &Lengths<'_>) -> Result<()> {
    match lengths {
        Lengths::Keys(_) => Err(Error::Conflict {
            option: "key lengths",
            with: "a spatial shape",
            reason: "every token of the shape has a key",
        }),
        _ => Ok(()),
    }
}

/// Regions, and a bias in them.
type InRegions = (Arc<Regions>, Option<Arc<RegionOffsets>>);

/// A mask and a score in orders of rows.
#[derive(Clone, Debug)]
pub(crate) struct OnGrid<F, M = Local> {
    config: Config<M, F>,
    /// Rows of queries and of keys, unless both are as they lie.
    rows: Option<[Arc<[u32]>; 2]>,
    /// Outputs are found in these, with this change of scores.
    regions: Option<InRegions>,
}

impl<F: Score> OnGrid<F> {
    /// `reach` as [`Local::new`] has it.
    pub(crate) fn new(
        [queries, keys]: [Arc<Order>; 2],
        reach: Reach<'_>,
        score: F,
        scale: Option<f32>,
        isa: Option<Isa>,
    ) -> Result<Self> {
        let mask = Local::new(queries.clone(), keys.clone(), reach);
        let rows = [&queries, &keys].map(|order| order.rows().into());
        Self::masked(rows, Options { mask, score, scale, isa })
    }

    /// The same, region by region, if there are some.
    fn in_regions(self, regions: Option<InRegions>) -> Self {
        Self { regions, ..self }
    }
}

impl OnGrid<Plain> {
    /// The same in regions of `sides` queries, where those are few enough.
    pub(crate) fn regional(
        self,
        [queries, keys]: [&Order; 2],
        reach: Reach<'_>,
        sides: Option<[usize; AXES]>,
    ) -> Self {
        let regions = sides.and_then(|sides| Regions::new(queries, keys, reach, sides));
        self.in_regions(regions.map(|regions| (Arc::new(regions), None)))
    }
}

impl<M: Mask + Clone> OnGrid<Plain, M> {
    /// The same with a change of scores. Allocates nothing.
    pub(crate) fn with_score<F: Score>(&self, score: F) -> OnGrid<F, M> {
        let config = self.config.with_score(score);
        OnGrid { config, rows: self.rows.clone(), regions: None }
    }
}

impl<F: Score, M: Mask> OnGrid<F, M> {
    /// Of rows in these orders, as the mask counts them.
    pub(crate) fn masked(rows: [Arc<[u32]>; 2], options: Options<M, F>) -> Result<Self> {
        let as_they_lie = rows.iter().all(|rows| rows.iter().copied().eq(0..rows.len() as u32));
        Ok(Self { config: options.build()?, rows: Some(rows).filter(|_| !as_they_lie), regions: None })
    }

    pub(crate) fn isa(&self) -> Isa {
        self.config.isa()
    }

    pub(crate) fn scale(&self, dims: &Dims) -> f64 {
        self.config.scale(dims)
    }

    /// The call of the engine, its arrays checked.
    pub(crate) fn call<'a, Q: Element, K: Element, O>(&'a self, x: Qkv<'a, Q, K, O>) -> Result<Call<'a>> {
        whole(&x.lengths)?;
        let call = self.config.call(x, Norm::Softmax { sinks: None }, None)?;
        let order = self.rows.as_ref().map(|[queries, keys]| RowOrder { queries, keys, cuts: None });
        let regions = self.regions.as_ref().map(|(regions, score)| {
            let cuts = Some([&regions.query_cuts[..], &regions.key_cuts]);
            let order = RowOrder { queries: &regions.queries, keys: &regions.keys, cuts };
            let score: &dyn AnyScore = match score {
                Some(score) => &**score,
                None => &Plain,
            };
            Regional { order, mask: &**regions, score }
        });
        Ok(Call { order, regions, ..call })
    }

    /// The call as a stage of a pipeline, with keys that stand beside the
    /// others.
    pub(crate) fn attend<'a, Q: Element, K: Element, O: Element>(
        &'a self,
        pass: &mut Pass<'_>,
        x: Qkv<'a, Q, K, O>,
        extra: Option<Virtual<'a>>,
        out: Out<'_, O>,
    ) -> Result<()> {
        let call = Call { extra, ..self.call(x)? };
        let flops = || {
            let beside = extra.map_or(0, |extra| extra.len());
            let pairs = call.dims.batch * call.dims.q_heads * call.dims.q_len * beside;
            let beside = (2 * pairs * (call.dims.head_dim + call.dims.value_dim)) as u64;
            self.config.cost(&x).map_or(0, |cost| cost.flops) + beside
        };
        pass.stage(flops, engine::workspace_bytes(&call), |arena| {
            if let Some(out) = out {
                engine::run_in(&call, out, None, arena);
            }
        });
        Ok(())
    }
}

impl<F: Score> OnGrid<F> {
    /// What is to be computed, with the rule and the score for rows as they lie.
    fn definition<'a, Q: Element, K: Element, O, R: Mask, S: Score>(
        &self,
        x: Qkv<'a, Q, K, O>,
        mask: &'a R,
        score: &'a S,
    ) -> Result<Definition<'a, Q, K, O, R, S>> {
        whole(&x.lengths)?;
        let normalisation = Normalisation::Softmax { sinks: None };
        let Definition { dims, scale, .. } = self.config.definition(x.reborrow(), normalisation, None)?;
        Ok(Definition { x, dims, mask, score, scale, normalisation, gains: None, extra: None })
    }

    /// The definition, with the rule and the score for rows as they lie.
    pub(crate) fn define<Q: Element, K: Element, O>(
        &self,
        x: Qkv<'_, Q, K, O>,
        mask: &impl Mask,
        score: &impl Score,
    ) -> Result<Reference> {
        self.definition(x.reborrow(), mask, score)?.compute()
    }

    /// Multiply-adds of the pairs that the mask leaves, and every array once.
    pub(crate) fn cost<Q: Element, K: Element, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<Cost> {
        whole(&x.lengths)?;
        self.config.cost(x)
    }
}

/// A bias `[(2 height - 1) (2 width - 1), heads]` of windows, by the distance of
/// a query from a key.
pub(crate) fn window_bias(
    table: &Array2<f32>,
    window: [usize; 2],
    queries: Arc<Order>,
    keys: Arc<Order>,
) -> Result<Offsets> {
    let [high, wide] = window.map(|window| (2 * window).saturating_sub(1));
    let heads = table.dim().1;
    let fits = high.checked_mul(wide) == Some(table.dim().0);
    // Keys minus queries, heads first.
    let by_head = table.t().as_standard_layout().into_owned();
    let by_head = by_head.into_shape_with_order((heads, high, wide)).ok().filter(|_| fits);
    let Some(by_head) = by_head else {
        let expected = format!("[(2 height - 1) (2 width - 1), heads] of windows of {window:?}");
        return Err(Error::shape("bias", expected, table.shape()));
    };
    let turned = by_head.slice_move(s![.., ..;-1, ..;-1]).into_dyn();
    Offsets::new(turned.view(), Grid::spread(&window, 1), [1; AXES], queries, keys)
}

/// Windows that tile an image, which they divide.
pub(crate) fn windows(
    shape: [usize; 2],
    window: [usize; 2],
    scale: Option<f32>,
    isa: Isa,
) -> Result<OnGrid<Plain>> {
    let order = Arc::new(Order::new(Grid::new(&shape)?, [1; AXES], [1, window[1]], [0; AXES]));
    let sides = Grid::spread(&window, 1);
    let reach: Reach<'_> =
        &|axis, at, _| at / sides[axis] * sides[axis]..(at / sides[axis] + 1) * sides[axis];
    let on_grid = OnGrid::new([order.clone(), order.clone()], reach, Plain, scale, Some(isa))?;
    Ok(on_grid.regional([&order, &order], reach, Some(sides)))
}

/// The same with a bias for each offset, or without: different calls.
#[derive(Clone, Debug)]
pub(crate) enum Biased {
    No(OnGrid<Plain>),
    /// And the bias for rows as they lie.
    Yes(OnGrid<Offsets>, Offsets),
}

impl Biased {
    /// `bias` is for rows as they lie. Outputs are found in regions of `sides`
    /// queries, where those are few enough.
    pub(crate) fn new(
        orders: [Arc<Order>; 2],
        reach: Reach<'_>,
        sides: Option<[usize; AXES]>,
        bias: Option<Offsets>,
        scale: Option<f32>,
        isa: Option<Isa>,
    ) -> Result<Self> {
        let [queries, keys] = orders.clone();
        Ok(match bias {
            None => {
                let on_grid = OnGrid::new(orders, reach, Plain, scale, isa)?;
                Self::No(on_grid.regional([&queries, &keys], reach, sides))
            }
            Some(bias) => {
                let regions =
                    sides.and_then(|sides| Regions::new(&queries, &keys, reach, sides)).map(Arc::new);
                let score = regions.clone().and_then(|regions| RegionOffsets::new(&bias, regions));
                let regions = regions.zip(score.map(|score| Some(Arc::new(score))));
                let ordered = bias.in_orders(queries, keys);
                Self::Yes(OnGrid::new(orders, reach, ordered, scale, isa)?.in_regions(regions), bias)
            }
        })
    }

    /// Hands `run` the call of the engine, its arrays checked, with keys that
    /// stand beside the grid.
    pub(crate) fn with_call<'a, Q: Element, K: Element, O, R>(
        &'a self,
        x: Qkv<'a, Q, K, O>,
        extra: Option<Virtual<'a>>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        let call = match self {
            Self::No(on_grid) => on_grid.call(x)?,
            Self::Yes(on_grid, _) => on_grid.call(x)?,
        };
        Ok(run(&Call { extra, ..call }))
    }

    /// Hands `run` the call and the derivative of its score.
    pub(crate) fn with_smooth<'a, Q: Element, K: Element, O, R>(
        &'a self,
        x: Qkv<'a, Q, K, O>,
        run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
    ) -> Result<R> {
        Ok(match self {
            Self::No(on_grid) => run(&on_grid.call(x)?, on_grid.config.smooth()),
            Self::Yes(on_grid, _) => run(&on_grid.call(x)?, on_grid.config.smooth()),
        })
    }

    /// The definition of gradients, where a row sees another.
    pub(crate) fn define_back<Q: Element, K: Element, O>(
        &self,
        x: Qkv<'_, Q, K, O>,
        sees: impl Fn(usize, usize) -> bool + Send + Sync,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        let mask = mask_fn(|_, query, key| sees(query, key));
        match self {
            Self::No(on_grid) => {
                let definition = on_grid.definition(x.reborrow(), &mask, &Plain)?;
                softmax_backward::gradients(&definition, &Plain, d_out, saved.softmax)
            }
            Self::Yes(on_grid, bias) => {
                let definition = on_grid.definition(x.reborrow(), &mask, bias)?;
                softmax_backward::gradients(&definition, bias, d_out, saved.softmax)
            }
        }
    }

    /// Heads and entries of the bias.
    pub(crate) fn table(&self) -> [usize; 2] {
        match self {
            Self::No(_) => [0, 0],
            Self::Yes(_, bias) => bias.table(),
        }
    }

    /// The definition with keys beside the grid.
    pub(crate) fn define_beside<T: Element>(
        &self,
        x: GlobalQkv<'_, T>,
        beside: &Beside,
        sees: impl Fn(usize, usize) -> bool + Send + Sync,
    ) -> Result<Reference> {
        whole(&x.qkv.lengths)?;
        let own = match self {
            Self::No(on_grid) => on_grid.config.checked(x.qkv.dims()?)?,
            Self::Yes(on_grid, _) => on_grid.config.checked(x.qkv.dims()?)?,
        };
        let (scale, offsets) = match self {
            Self::No(on_grid) => (on_grid.scale(&own), None),
            Self::Yes(on_grid, bias) => (on_grid.scale(&own), Some(bias.clone())),
        };
        let known = own.kv_len;
        let mask = mask_fn(|_, query, key| key >= known || sees(query, key));
        let (more, queries) = (beside.len(), beside.plain().clone());
        let score = OffsetsBeside { offsets, known, more, table: Arc::new([]), queries };
        let k = concatenate![Axis(2), x.qkv.k, x.global_k];
        let v = concatenate![Axis(2), x.qkv.v, x.global_v];
        let x = Qkv::<T>::new(x.qkv.q.reborrow(), k.view(), v.view());
        let (dims, normalisation) = (x.dims()?, Normalisation::Softmax { sinks: None });
        let reference = Definition {
            x,
            dims,
            mask: &mask,
            score: &score,
            scale,
            normalisation,
            gains: None,
            extra: None,
        }
        .compute()?;
        // Of pairs, those of the grid alone are shown.
        let on_grid = |x: Array4<f64>| x.slice_move(s![.., .., .., ..known]);
        let (scores, weights) = (on_grid(reference.scores), on_grid(reference.weights));
        Ok(Reference { scores, weights, ..reference })
    }

    /// The definition, where a row sees another.
    pub(crate) fn define<Q: Element, K: Element, O>(
        &self,
        x: Qkv<'_, Q, K, O>,
        sees: impl Fn(usize, usize) -> bool + Send + Sync,
    ) -> Result<Reference> {
        let mask = mask_fn(|_, query, key| sees(query, key));
        match self {
            Self::No(on_grid) => on_grid.define(x, &mask, &Plain),
            Self::Yes(on_grid, bias) => on_grid.define(x, &mask, bias),
        }
    }

    /// [`OnGrid::cost`]
    pub(crate) fn cost<Q: Element, K: Element, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<Cost> {
        match self {
            Self::No(on_grid) => on_grid.cost(x),
            Self::Yes(on_grid, _) => on_grid.cost(x),
        }
    }
}
