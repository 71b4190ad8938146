//! Calls of the attention engine over tokens on a grid: a mask and a score in
//! an order of rows in which windows are few long runs of keys.

use std::sync::Arc;

use ndarray::{Array2, Array4, ArrayView4, Axis, concatenate, s};

use crate::attention::Cost;
use crate::definition::softmax::{Definition, Normalisation, Reference};
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine;
use crate::engine::attend_backward::Gradients;
use crate::engine::call::{Call, Norm, Regional, RowOrder, Virtual};
use crate::error::{Error, Result};
use crate::input::global::GlobalQkv;
use crate::input::{Dims, Lengths, Qkv};
use crate::keys::grid::{AXES, Grid, Order};
use crate::keys::images::{Each, Images};
use crate::keys::regions::{Reach, Regions};
use crate::mask::grid::Local;
use crate::mask::images::{OfImages, Shown, Tokens};
use crate::mask::{Mask, mask_fn_per_head};
use crate::score::grid::{Offsets, OffsetsBeside, RegionOffsets};
use crate::score::smooth::{AnySmooth, Smooth};
use crate::score::{AnyScore, Plain, Score};
use crate::simd::Isa;
use crate::stages::attend::{self, Config, Options};
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
type InRegions = (Shown<Arc<Regions>>, Option<Arc<RegionOffsets>>);

/// Rows of queries and of keys in the order of a call.
#[derive(Clone, Debug)]
struct Lists {
    rows: [Arc<[u32]>; 2],
    /// As [`RowOrder`] has them.
    cuts: Option<[Arc<[usize]>; 2]>,
    entries: Option<Arc<[u32]>>,
    rest: Arc<[(u32, u32)]>,
}

impl Lists {
    /// Of several images, one after the other.
    fn of_images(images: &Images, orders: &Each<[Arc<Order>; 2]>) -> Self {
        let (mut rows, mut cuts) = ([Vec::new(), Vec::new()], [vec![0], vec![0]]);
        for image in 0..images.grids().len() {
            for (i, order) in orders.at(image).iter().enumerate() {
                rows[i].extend(order.rows().iter().map(|&row| images.row(image, row as usize) as u32));
                cuts[i].push(rows[i].len());
            }
        }
        let cuts = Some(cuts.map(Into::into)).filter(|_| !images.is_one());
        Self {
            rows: rows.map(Into::into),
            cuts,
            entries: images.entries().map(Into::into),
            rest: images.rest().into(),
        }
    }

    fn is_as_they_lie(&self) -> bool {
        let same = |rows: &Arc<[u32]>| rows.iter().copied().eq(0..rows.len() as u32);
        self.cuts.is_none() && self.rows.iter().all(same)
    }

    fn order(&self) -> RowOrder<'_> {
        let [queries, keys] = &self.rows;
        let cuts = self.cuts.as_ref().map(|cuts| cuts.each_ref().map(|cuts| &**cuts));
        RowOrder { queries, keys, cuts, entries: self.entries.as_deref(), rest: &self.rest }
    }

    /// Which of the keys are tokens.
    fn tokens(&self, tokens: &Array2<bool>) -> Tokens {
        let whole = [0, self.rows[1].len()];
        let cuts = self.cuts.as_ref().map_or(&whole[..], |[_, cuts]| cuts);
        Tokens::new(tokens, &self.rows[1], cuts, self.entries.as_deref())
    }
}

/// A mask and a score in orders of rows.
#[derive(Clone, Debug)]
pub(crate) struct OnGrid<F, M = Local> {
    config: Config<M, F>,
    /// Unless rows are as they lie.
    rows: Option<Lists>,
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
}

impl OnGrid<Plain> {
    /// The same in regions of `sides` queries, where their keys are few enough.
    pub(crate) fn regional(
        self,
        [queries, keys]: [&Arc<Order>; 2],
        reach: Reach<'_>,
        sides: [usize; AXES],
    ) -> Self {
        let regions = Regions::new(queries, keys, reach, sides);
        let shown = |regions| (Shown { mask: Arc::new(regions), tokens: None }, None);
        Self { regions: regions.map(shown), ..self }
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
        let lists = Lists { rows, cuts: None, entries: None, rest: [].into() };
        let rows = Some(lists).filter(|lists| !lists.is_as_they_lie());
        Ok(Self { config: options.build()?, rows, regions: None })
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
        let order = self.rows.as_ref().map(Lists::order);
        let regions = self.regions.as_ref().map(|(shown, score)| {
            let regions = &*shown.mask;
            let cuts = Some([&regions.query_cuts[..], &regions.key_cuts]);
            let entries = regions.entries.as_deref();
            let (queries, keys) = (&regions.queries[..], &regions.keys[..]);
            let order = RowOrder { queries, keys, cuts, entries, rest: &[] };
            let score: &dyn AnyScore = match score {
                Some(score) => &**score,
                None => &Plain,
            };
            Regional { order, mask: shown, score }
        });
        let batch = order.map_or(call.dims.batch, |order| order.sequences(call.x.batch));
        Ok(Call { order, regions, dims: Dims { batch, ..call.dims }, ..call })
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
            let pairs = call.x.batch * call.dims.q_heads * call.dims.q_len * beside;
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

impl<F: Smooth, M: Mask> OnGrid<F, M> {
    /// Gradients of the call, given that of the output, as a stage of a pipeline.
    pub(crate) fn backward<'a, Q: Element, K: Element, O>(
        &'a self,
        pass: &mut Pass<'_>,
        x: Qkv<'a, Q, K, O>,
        d_out: ArrayView4<'a, f32>,
        to: Option<Gradients<'_>>,
    ) -> Result<()> {
        attend::backward(pass, &self.call(x)?, self.config.smooth(), (d_out, None), to);
        Ok(())
    }
}

impl<F: Score, M: Mask> OnGrid<F, M> {
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
        match self.rows.as_ref().map(Lists::order).filter(|order| order.cuts.is_some()) {
            Some(order) => {
                let sequence = |i| order.sequence(i).expect("lists that are cut");
                self.config.cost_of(x, order.sequences(x.q.dim().0), sequence)
            }
            None => self.config.cost(x),
        }
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
    Ok(on_grid.regional([&order, &order], reach, sides))
}

/// Images of a batch, or one in every entry, with a bias for each offset or
/// without: different calls.
#[derive(Clone, Debug)]
pub(crate) enum Biased {
    No(OnGrid<Plain, Shown<OfImages>>),
    /// And the bias for rows as they lie.
    Yes(OnGrid<Each<Offsets>, Shown<OfImages>>, Offsets),
}

/// What [`Biased`] is made of.
pub(crate) struct Parts<'a> {
    pub(crate) images: Images,
    /// Orders of queries and keys of each image, as if it were alone.
    pub(crate) orders: Each<[Arc<Order>; 2]>,
    pub(crate) reach: Reach<'a>,
    /// For rows as they lie.
    pub(crate) bias: Option<Offsets>,
    /// Which keys are tokens, `[batch | 1, len]`.
    pub(crate) tokens: Option<&'a Array2<bool>>,
    pub(crate) scale: Option<f32>,
    pub(crate) isa: Option<Isa>,
}

impl Biased {
    /// Outputs are found in regions of `sides` queries, where their keys are few
    /// enough.
    pub(crate) fn new(parts: Parts<'_>, sides: impl Fn(Grid) -> Option<[usize; AXES]>) -> Result<Self> {
        let Parts { images, orders, reach, bias, tokens, scale, isa } = parts;
        if let Some((batch, len)) = tokens.map(Array2::dim) {
            let entries = images.entries().map_or(batch, |entries| entries.len());
            if len != images.len() || (batch != 1 && batch != entries) {
                let expected = format!("[batch | 1, len] with len = {} as the shape has it", images.len());
                return Err(Error::shape("tokens", expected, &[batch, len]));
            }
        }
        let lists = Lists::of_images(&images, &orders);
        let regions = Regions::of_images(&images, &orders, reach, sides).map(Arc::new);
        let regions = regions.and_then(|regions| {
            let score = match &bias {
                Some(bias) => Some(Arc::new(RegionOffsets::new(bias, regions.clone())?)),
                None => None,
            };
            let Regions { keys, key_cuts, entries, .. } = &*regions;
            let tokens = tokens.map(|x| Tokens::new(x, keys, key_cuts, entries.as_deref()));
            Some((Shown { mask: regions, tokens: tokens.map(Arc::new) }, score))
        });
        let tokens = tokens.map(|tokens| Arc::new(lists.tokens(tokens)));
        let local = |[queries, keys]: &[Arc<Order>; 2]| Local::new(queries.clone(), keys.clone(), reach);
        let mask = Shown { mask: OfImages { images, each: orders.map(local) }, tokens };
        let rows = Some(lists).filter(|lists| !lists.is_as_they_lie());
        Ok(match bias {
            None => {
                let config = Options { mask, score: Plain, scale, isa }.build()?;
                Self::No(OnGrid { config, rows, regions })
            }
            Some(bias) => {
                let score = orders.map(|[queries, keys]| bias.in_orders(queries.clone(), keys.clone()));
                let config = Options { mask, score, scale, isa }.build()?;
                Self::Yes(OnGrid { config, rows, regions }, bias)
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

    /// The definition of gradients, where a row of a batch entry sees another.
    pub(crate) fn define_back<Q: Element, K: Element, O>(
        &self,
        x: Qkv<'_, Q, K, O>,
        sees: impl Fn(usize, usize, usize) -> bool + Send + Sync,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients> {
        let mask = mask_fn_per_head(|site, query, key| sees(site.batch, query, key));
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

    /// The definition with keys beside the grid, which follow the others.
    pub(crate) fn define_beside<T: Element>(
        &self,
        x: GlobalQkv<'_, T>,
        beside: &Beside,
        sees: impl Fn(usize, usize, usize) -> bool + Send + Sync,
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
        let mask = mask_fn_per_head(|site, query, key| sees(site.batch, query, key));
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

    /// The definition, where a row of a batch entry sees another.
    pub(crate) fn define<Q: Element, K: Element, O>(
        &self,
        x: Qkv<'_, Q, K, O>,
        sees: impl Fn(usize, usize, usize) -> bool + Send + Sync,
    ) -> Result<Reference> {
        let mask = mask_fn_per_head(|site, query, key| sees(site.batch, query, key));
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
