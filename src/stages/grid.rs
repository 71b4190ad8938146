//! Calls of the attention engine over tokens on a grid: a mask and a score in
//! an order of rows in which windows are few long runs of keys.

use std::ops::Range;
use std::sync::Arc;

use crate::attention::Cost;
use crate::definition::softmax::{Definition, Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::{Call, Norm, RowOrder};
use crate::error::{Error, Result};
use crate::input::{Lengths, Qkv};
use crate::keys::grid::{AXES, Grid, Order};
use crate::mask::grid::Local;
use crate::mask::{Mask, mask_fn};
use crate::score::grid::Offsets;
use crate::score::{Plain, Score};
use crate::simd::Isa;
use crate::stages::attend::{Config, Options};

/// Widths of the columns of queries: two groups of rows of the register tile,
/// and a tile of queries is then about as high as it is wide.
const QUERIES: usize = 12;
/// Widths of the columns of keys: a vector and its neighbours are two rows of
/// a column.
const KEYS: usize = 8;
/// Widths of the columns of volumes, on the last two axes.
const VOLUME: usize = 4;

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

/// A mask of ranges on each axis and a score, in orders of rows.
#[derive(Clone, Debug)]
pub(crate) struct OnGrid<F> {
    config: Config<Local, F>,
    queries: Arc<Order>,
    keys: Arc<Order>,
}

impl<F: Score> OnGrid<F> {
    /// `reach` as [`Local::new`] has it.
    pub(crate) fn new(
        [queries, keys]: [Arc<Order>; 2],
        reach: impl Fn(usize, usize, usize) -> Range<usize>,
        score: F,
        scale: Option<f32>,
        isa: Option<Isa>,
    ) -> Result<Self> {
        let mask = Local::new(queries.clone(), keys.clone(), reach);
        let config = Options { mask, score, scale, isa }.build()?;
        Ok(Self { config, queries, keys })
    }

    fn check<Q: Element, K: Element, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<()> {
        match x.lengths {
            Lengths::Keys(_) => Err(Error::Conflict {
                option: "key lengths",
                with: "a spatial shape",
                reason: "every token of the shape has a key",
            }),
            _ => Ok(()),
        }
    }

    /// The call of the engine, its arrays checked.
    pub(crate) fn call<'a, Q: Element, K: Element, O>(&'a self, x: Qkv<'a, Q, K, O>) -> Result<Call<'a>> {
        self.check(&x)?;
        let call = self.config.call(x, Norm::Softmax { sinks: None }, None)?;
        Ok(Call { order: Some(RowOrder { queries: self.queries.rows(), keys: self.keys.rows() }), ..call })
    }

    /// The definition, with the rule and the score for rows as they lie.
    pub(crate) fn define<Q: Element, K: Element, O>(
        &self,
        x: Qkv<'_, Q, K, O>,
        mask: &impl Mask,
        score: &impl Score,
    ) -> Result<Reference> {
        self.check(&x)?;
        let normalisation = Normalisation::Softmax { sinks: None };
        let x = x.reborrow();
        let Definition { dims, scale, .. } = self.config.definition(x, normalisation, None)?;
        Definition { x, dims, mask, score, scale, normalisation, gains: None, extra: None }.compute()
    }

    /// Multiply-adds of the pairs that the mask leaves, and every array once.
    pub(crate) fn cost<Q: Element, K: Element, O>(&self, x: &Qkv<'_, Q, K, O>) -> Result<Cost> {
        self.check(x)?;
        self.config.cost(x)
    }
}

/// The same with a bias for each offset, or without: different calls.
#[derive(Clone, Debug)]
pub(crate) enum Biased {
    No(OnGrid<Plain>),
    /// And the bias for rows as they lie.
    Yes(OnGrid<Offsets>, Offsets),
}

impl Biased {
    /// `bias` is for rows as they lie.
    pub(crate) fn new(
        orders: [Arc<Order>; 2],
        reach: impl Fn(usize, usize, usize) -> Range<usize>,
        bias: Option<Offsets>,
        scale: Option<f32>,
        isa: Option<Isa>,
    ) -> Result<Self> {
        Ok(match bias {
            None => Self::No(OnGrid::new(orders, reach, Plain, scale, isa)?),
            Some(bias) => {
                let [queries, keys] = orders.clone();
                Self::Yes(OnGrid::new(orders, reach, bias.in_orders(queries, keys), scale, isa)?, bias)
            }
        })
    }

    /// Hands `run` the call of the engine, its arrays checked.
    pub(crate) fn with_call<Q: Element, K: Element, O, R>(
        &self,
        x: Qkv<'_, Q, K, O>,
        run: impl FnOnce(&Call<'_>) -> R,
    ) -> Result<R> {
        match self {
            Self::No(on_grid) => Ok(run(&on_grid.call(x.reborrow())?)),
            Self::Yes(on_grid, _) => Ok(run(&on_grid.call(x.reborrow())?)),
        }
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
