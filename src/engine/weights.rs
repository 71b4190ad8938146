//! Scores and weights themselves, tile by tile: for reading, for what each key
//! receives, for the largest of each query.
//!
//! Scores take one pass. For weights a first pass of the attention finds each
//! row's normaliser; the second pass here recomputes scores and knows every
//! weight at once.

use std::ops::Range;

use ndarray::{Array, Array3, Array4, ArrayView4, Axis, RemoveAxis};

use crate::engine;
use crate::engine::call::{Call, Norm};

use crate::engine::attend::{Own, Room, Rooms, pack_now};
use crate::engine::parallel;
use crate::engine::row::{Exponent, SoftmaxSum};
use crate::engine::scores::{Geometry, KEY_TILE, QUERY_TILE, ScoreTile, Scratch, Stored};
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dim4, Sequence, Site, filled};
use crate::simd::any::AnyArray;
use crate::simd::exp::sigmoid;
use crate::simd::mem::{OutRows, Parts, RowsMut, bytes_for_shares, claim_words};
use crate::simd::{Kernel, Simd};

/// The largest weights of each query.
#[derive(Clone, Debug, PartialEq)]
pub struct TopWeights {
    /// Keys, `[batch, q_heads, q_len, count]`, counted from the start of the
    /// sequence; `usize::MAX` where fewer have a weight above 0.
    pub keys: Array4<usize>,
    /// Their weights, largest first; 0 where fewer are above 0.
    pub weights: Array4<f32>,
}

/// What of each pair is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// The score as it is before the normaliser, -inf where hidden.
    Scores,
    /// The weight, 0 where hidden.
    Weights,
}

/// All weights, `[batch, q_heads, q_len, kv_len]`.
pub(crate) fn materialize(call: &Call<'_>) -> Result<Array4<f32>> {
    matrices(call, Wanted::Weights, filled("weights", matrices_dim(call), 0f32)?)
}

/// All scores, `[batch, q_heads, q_len, kv_len]`.
pub(crate) fn scores(call: &Call<'_>) -> Result<Array4<f32>> {
    matrices(call, Wanted::Scores, filled("scores", matrices_dim(call), f32::NEG_INFINITY)?)
}

/// The gradients of all scores, `[batch, q_heads, q_len, kv_len]`, given that of
/// the output.
pub(crate) fn score_gradients(call: &Call<'_>, d_out: AnyArray<'_>) -> Result<Array4<f32>> {
    let Some(products) = call.products(d_out) else {
        return Err(Error::value("x", "keys and values in arrays", "a cache"));
    };
    // Of what is hidden the product is -inf, and the weight 0.
    let (mut weights, products) = (materialize(call)?, scores(&products)?);
    let softmax = matches!(call.norm, Norm::Softmax { .. });
    let len = call.dims.kv_len;
    let rows = weights.len().checked_div(len).unwrap_or(0);
    let mut claims = vec![0; claim_words(rows)];
    if let (Some(to), Some(products)) = (weights.as_slice_mut(), products.as_slice()) {
        let to = Parts::new(to, len, &mut claims);
        parallel::for_each(
            parallel::threads(),
            rows,
            |_| (),
            |(), i| {
                let products = &products[i * len..][..len];
                call.isa.dispatch(Pull { weights: to.take(i), products, softmax });
            },
        );
    }
    Ok(weights)
}

/// Makes the gradients of a row of scores of its weights.
struct Pull<'a> {
    weights: &'a mut [f32],
    /// Products of the output's gradient with values.
    products: &'a [f32],
    softmax: bool,
}

impl Kernel for Pull<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, products, softmax } = self;
        let (zero, one) = (s.splat(0.0), s.splat(1.0));
        let pair = |weights: &[f32], j: usize| {
            let weight = s.load_tail(&weights[j..]);
            (weight, s.select(s.lt(zero, s.abs(weight)), s.load_tail(&products[j..]), zero))
        };
        let steps = || (0..products.len()).step_by(S::LANES);
        let total = steps().fold(zero, |total, j| {
            let (weight, product) = pair(weights, j);
            s.mul_add(weight, product, total)
        });
        let mean = s.splat(s.reduce_add(total));
        for j in steps() {
            let (weight, product) = pair(weights, j);
            let pull = if softmax { s.sub(product, mean) } else { s.mul(s.sub(one, weight), product) };
            s.store_tail(&mut weights[j..], s.select(s.lt(zero, s.abs(weight)), s.mul(weight, pull), zero));
        }
    }
}

fn matrices_dim(call: &Call<'_>) -> Dim4 {
    (call.x.batch, call.dims.q_heads, call.dims.q_len, call.dims.kv_len)
}

fn matrices(call: &Call<'_>, wanted: Wanted, mut to: Array4<f32>) -> Result<Array4<f32>> {
    let mut claims = vec![0; claim_words(call.out_rows())];
    let out = OutRows::new(to.view_mut(), &mut claims);
    each_tile(call, wanted, Walk::Queries, |tile, head| {
        let sequence = call.sequence(tile.sequence);
        let [queries, keys] = starts(call, &sequence);
        Consumer::Copy(out.take(sequence.batch, head, at(queries, &tile.queries)), keys)
    })?;
    let nothing = if wanted == Wanted::Scores { f32::NEG_INFINITY } else { 0.0 };
    Ok(match call.order {
        None => to,
        Some(order) => {
            let to = in_rows(&to, 2, |entry| order.queries_of(entry), nothing);
            in_rows(&to, 3, |entry| order.keys_of(entry), nothing)
        }
    })
}

/// Where queries and keys of a sequence start, among those of its batch entry.
fn starts(call: &Call<'_>, sequence: &Sequence) -> [usize; 2] {
    let [queries, keys] = call.order.map_or([0, 0], |order| order.starts(sequence.batch));
    [sequence.queries.start - queries, sequence.keys.start - keys]
}

/// An array whose index `i` along an axis becomes `rows[i]` of its batch entry; where
/// none does it is `nothing`.
fn in_rows<'a, T: Copy, D: RemoveAxis<Smaller: RemoveAxis>>(
    from: &Array<T, D>,
    axis: usize,
    rows: impl Fn(usize) -> &'a [u32],
    nothing: T,
) -> Array<T, D> {
    let mut to = Array::from_elem(from.raw_dim(), nothing);
    for (entry, (from, mut to)) in from.outer_iter().zip(to.outer_iter_mut()).enumerate() {
        for (from, &row) in from.axis_iter(Axis(axis - 1)).zip(rows(entry)) {
            to.index_axis_mut(Axis(axis - 1), row as usize).assign(&from);
        }
    }
    to
}

/// What each key receives from all queries, `[batch, q_heads, kv_len]`.
pub(crate) fn sum_over_queries(call: &Call<'_>) -> Result<Array3<f32>> {
    let (batch, heads, kv_len) = (call.x.batch, call.dims.q_heads, call.dims.kv_len);
    let mut sums = filled("weights", (batch, heads, kv_len), 0f32)?;
    let mut claims = vec![0; claim_words(sums.len())];
    let out = OutRows::new(sums.view_mut().insert_axis(Axis(3)), &mut claims);
    each_tile(call, Wanted::Weights, Walk::Keys, |tile, head| {
        let sequence = call.sequence(tile.sequence);
        let [_, keys] = starts(call, &sequence);
        Consumer::Sum(out.take(sequence.batch, head, at(keys, &tile.keys)), vec![0.0; KEY_TILE])
    })?;
    Ok(match call.order {
        None => sums,
        Some(order) => in_rows(&sums, 2, |entry| order.keys_of(entry), 0.0),
    })
}

/// The `count` largest weights of each query.
pub(crate) fn top(call: &Call<'_>, count: usize) -> Result<TopWeights> {
    let (batch, heads, rows) = (call.x.batch, call.dims.q_heads, call.dims.q_len);
    let dim = (batch, heads, rows, count);
    let too_many = |_| Error::value("count", "few enough weights to be held in memory", count);
    let mut weights = filled("weights", dim, 0f32).map_err(too_many)?;
    let mut keys = filled("keys", dim, usize::MAX).map_err(too_many)?;
    let mut claims = [vec![0; claim_words(call.out_rows())], vec![0; claim_words(call.out_rows())]];
    let [first, second] = &mut claims;
    let (weights_out, keys_out) =
        (OutRows::new(weights.view_mut(), first), OutRows::new(keys.view_mut(), second));
    each_tile(call, Wanted::Weights, Walk::Queries, |tile, head| {
        let sequence = call.sequence(tile.sequence);
        let [queries, keys] = starts(call, &sequence);
        let queries = at(queries, &tile.queries);
        Consumer::Top {
            best: vec![Vec::new(); queries.len()],
            count,
            start: if call.order.is_some() { keys } else { 0 },
            weights: weights_out.take(sequence.batch, head, queries.clone()),
            keys: keys_out.take(sequence.batch, head, queries),
        }
    })?;
    if let Some(order) = call.order {
        for (entry, mut keys) in keys.outer_iter_mut().enumerate() {
            let own = order.keys_of(entry);
            keys.iter_mut().filter(|key| **key != usize::MAX).for_each(|key| *key = own[*key] as usize);
        }
        weights = in_rows(&weights, 2, |entry| order.queries_of(entry), 0.0);
        keys = in_rows(&keys, 2, |entry| order.queries_of(entry), usize::MAX);
    }
    Ok(TopWeights { keys, weights })
}

/// The `count` largest of weights that are there, `[batch, q_heads, q_len,
/// kv_len]`.
pub(crate) fn top_of(all: &Array4<f32>, count: usize) -> Result<TopWeights> {
    let (batch, heads, rows, _) = all.dim();
    let dim = (batch, heads, rows, count);
    let too_many = |_| Error::value("count", "few enough weights to be held in memory", count);
    let mut weights = filled("weights", dim, 0f32).map_err(too_many)?;
    let mut keys = filled("keys", dim, usize::MAX).map_err(too_many)?;
    let places = weights.rows_mut().into_iter().zip(keys.rows_mut());
    for ((mut weights, mut keys), row) in places.zip(all.rows()) {
        let mut order: Vec<usize> = (0..row.len()).filter(|&j| row[j] > 0.0).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        for ((weight, key), j) in weights.iter_mut().zip(&mut keys).zip(order) {
            (*weight, *key) = (row[j], j);
        }
    }
    Ok(TopWeights { keys, weights })
}

fn at(start: usize, range: &Range<usize>) -> Range<usize> {
    start + range.start..start + range.end
}

/// Whether a task is a tile of queries with all keys, or a tile of keys with
/// all queries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk {
    Queries,
    Keys,
}

/// What a task is about.
struct Task {
    sequence: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

/// What happens to the weights of a task.
enum Consumer<'a> {
    /// They are written, keys from this column on.
    Copy(RowsMut<'a, f32>, usize),
    /// They are summed over queries.
    Sum(RowsMut<'a, f32>, Vec<f32>),
    /// The largest of each row are kept, best first, keys counted from `start` on.
    Top {
        best: Vec<Vec<(f32, usize)>>,
        count: usize,
        start: usize,
        weights: RowsMut<'a, f32>,
        keys: RowsMut<'a, usize>,
    },
}

impl Consumer<'_> {
    /// Weights, or scores, of row `i` of the task with the keys from `first` of its
    /// sequence on.
    #[inline(always)]
    fn row(&mut self, i: usize, first: usize, row: &[f32]) {
        match self {
            Self::Copy(out, start) => {
                for (j, &x) in row.iter().enumerate() {
                    out.set(i, *start + first + j, x);
                }
            }
            Self::Sum(_, sums) => {
                for (sum, x) in sums[first % KEY_TILE..].iter_mut().zip(row) {
                    *sum += x;
                }
            }
            Self::Top { best, count, .. } => {
                let best = &mut best[i];
                for (j, &x) in row.iter().enumerate() {
                    // Strictly larger: equal weights stay with the lower key. NaN is not larger.
                    let least =
                        if best.len() < *count { 0.0 } else { best.last().map_or(f32::INFINITY, |b| b.0) };
                    if x > least {
                        let place = best.partition_point(|b| b.0 >= x);
                        best.insert(place, (x, first + j));
                        best.truncate(*count);
                    }
                }
            }
        }
    }

    fn finish(self) {
        match self {
            Self::Copy(..) => {}
            Self::Sum(mut out, sums) => {
                for (i, &x) in sums[..out.len()].iter().enumerate() {
                    out.set(i, 0, x);
                }
            }
            Self::Top { best, start, mut weights, mut keys, .. } => {
                for (i, row) in best.iter().enumerate() {
                    for (j, &(weight, key)) in row.iter().enumerate() {
                        weights.set(i, j, weight);
                        keys.set(i, j, start + key);
                    }
                }
            }
        }
    }
}

/// Runs a consumer over every tile of every head.
fn each_tile<'o>(
    call: &Call<'_>,
    wanted: Wanted,
    walk: Walk,
    consumer: impl Fn(&Task, usize) -> Consumer<'o> + Sync + Send,
) -> Result<()> {
    let (q_len, kv_len) = call.longest(|_| true);
    let figures = match wanted {
        Wanted::Scores => None,
        Wanted::Weights => Some(normalisers(call)?),
    };
    let g = Geometry::new(call.isa, call.dims.head_dim, 0, kv_len);
    let (step, len) = if walk == Walk::Queries { (QUERY_TILE, q_len) } else { (KEY_TILE, kv_len) };
    let (tiles, workers) = (len.div_ceil(step), parallel::threads());
    let call = &call.without_values();
    let share = Scratch::bytes(&g) + Room::bytes(&g, 1) + Rooms::bytes(call);
    let mut workspace = Workspace::new();
    let shares = workspace.arena(bytes_for_shares(workers, share))?.shares(workers, share);
    let start = |worker: usize| {
        let mut arena = shares.take(worker);
        (Scratch::take(&mut arena, &g), Room::take(&mut arena, &g, 1), Rooms::take(&mut arena, call))
    };
    parallel::for_each(
        workers,
        call.dims.batch * call.dims.q_heads * tiles,
        start,
        |(scratch, room, rooms), i| {
            let (index, head, tile) =
                (i / tiles / call.dims.q_heads, i / tiles % call.dims.q_heads, i % tiles);
            let sequence = call.sequence(index);
            let (queries, keys) = (sequence.queries.len(), sequence.keys.len());
            let range = |n: usize| (tile * step).min(n)..((tile + 1) * step).min(n);
            let task = match walk {
                Walk::Queries => Task { sequence: index, queries: range(queries), keys: 0..keys },
                Walk::Keys => Task { sequence: index, queries: 0..queries, keys: range(keys) },
            };
            if task.queries.is_empty() || task.keys.is_empty() {
                return;
            }
            let mut consumer = consumer(&task, head);
            for first in task.queries.clone().step_by(QUERY_TILE) {
                let rows = first..(first + QUERY_TILE).min(task.queries.end);
                let offset = first - task.queries.start;
                let sequence = sequence.clone();
                let keys = task.keys.start / KEY_TILE..task.keys.end.div_ceil(KEY_TILE);
                let tile = ScoreTile::new(call, g, sequence, head..head + 1, rows, &mut *scratch);
                call.isa.dispatch(WeightTile {
                    tile,
                    own: Own { room: &mut *room, rooms: &mut *rooms },
                    keys,
                    figures: figures.as_ref().map(|figures| figures.view()),
                    offset,
                    consumer: &mut consumer,
                });
            }
            consumer.finish();
        },
    );
    Ok(())
}

/// For each row the maximum and the sum that a first pass finds, `[batch,
/// q_heads, q_len, 2]`. Nothing for the sigmoid.
fn normalisers(call: &Call<'_>) -> Result<Array4<f32>> {
    let (batch, heads, rows) = (call.x.batch, call.dims.q_heads, call.dims.q_len);
    let mut figures = filled("weights", (batch, heads, rows, 2), 0f32)?;
    if let Norm::Softmax { .. } = call.norm {
        // Without values the output is empty.
        let mut out = Array4::from_elem((batch, heads, rows, 0), 0f32);
        let workspace = &mut Workspace::new();
        engine::run(&call.without_values(), out.view_mut(), Some(figures.view_mut()), workspace)?;
    }
    Ok(figures)
}

struct WeightTile<'a, 'b, 'c, 'o> {
    tile: ScoreTile<'a, 'b, 'c>,
    own: Own<'a, 'b>,
    /// Key tiles.
    keys: Range<usize>,
    /// Of weights, [`normalisers`].
    figures: Option<ArrayView4<'a, f32>>,
    /// Rows of the task before those of the tile.
    offset: usize,
    consumer: &'a mut Consumer<'o>,
}

impl Kernel for WeightTile<'_, '_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.tile.load(s);
        let seen = self.tile.key_tiles();
        for index in self.keys.start.max(seen.start)..self.keys.end.min(seen.end) {
            self.tile.set_tile(index);
            if !self.tile.plan() {
                continue;
            }
            let keys = self.tile.tile_keys(index);
            pack_now(s, &self.tile, self.own.room, self.own.rooms);
            for block in self.tile.blocks() {
                self.tile.score(s, self.own.room.keys, Stored::Tile(0), block.clone());
                for i in block.clone() {
                    let at = (i - block.start) * KEY_TILE;
                    let Some((factor, whole)) = self.tile.finish_row(s, &(0..KEY_TILE), i, at) else {
                        continue;
                    };
                    let (head, query) = self.tile.place(i);
                    let row = &mut self.tile.scratch.scores[at..][whole.clone()];
                    let (call, sequence) = (self.tile.call, &self.tile.sequence);
                    match &self.figures {
                        None => scale(row, factor),
                        Some(figures) => {
                            let line = call.query_row(sequence, query);
                            let at = |j| figures[[sequence.batch, head, line, j]];
                            let figures = SoftmaxSum { max: at(0), sum: at(1) };
                            weigh(s, call.norm, row, factor, figures, &sequence.site(head));
                        }
                    }
                    let row = &row[..(whole.end.min(keys.len()) - whole.start)];
                    self.consumer.row(self.offset + i, keys.start + whole.start, row);
                }
            }
        }
    }
}

/// Scores times the factor that is left. A finite one stays finite.
#[inline(always)]
fn scale(row: &mut [f32], factor: f32) {
    for x in row {
        let scaled = *x * factor;
        *x = if x.is_finite() { scaled.clamp(f32::MIN, f32::MAX) } else { scaled };
    }
}

/// Final scores become weights: those that the attention itself has.
#[inline(always)]
pub(crate) fn weigh<S: Simd>(
    s: S,
    norm: Norm<'_>,
    row: &mut [f32],
    factor: f32,
    figures: SoftmaxSum,
    site: &Site,
) {
    match norm {
        Norm::Softmax { .. } => {
            let exponent = Exponent::relative_to(s, row, factor, figures);
            for x in row.chunks_exact_mut(S::LANES) {
                s.store(x, exponent.weight(s, s.load(x)));
            }
            let share = s.splat(norm.factor(figures, site.head).start(s, row));
            for x in row.chunks_exact_mut(S::LANES) {
                s.store(x, s.mul(s.load(x), share));
            }
        }
        Norm::Sigmoid { bias } => {
            let bias = bias.unwrap_or(-(site.kv_len as f32).ln());
            for x in row.chunks_exact_mut(S::LANES) {
                s.store(x, sigmoid(s, s.mul_add(s.load(x), s.splat(factor), s.splat(bias))));
            }
        }
    }
}
