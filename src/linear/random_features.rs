//! Random-feature attention: a layer whose weights of queries and keys are
//! random and stay as they are, and whose values are all that is trained.
//!
//! ```text
//! o_i = 1 / kv_len sum_j sum_r relu(x_i^T W_r y_j) V_r^T y_j      x_i = [q_i; 1], y_j = [k_j; 1]
//! ```
//!
//! "What can a Single Attention Layer Learn? A Study Through the Random
//! Features Lens" (arXiv 2307.11353): `W_r` are `features` random matrices of
//! independent normal elements, `V_r` is `[head_dim + 1, value_dim]`, and the
//! paper's scalar function has a `value_dim` of 1. It calls features heads.
//! Here a head is a layer of its own, with its own `V_r`; the random matrices
//! are those of all heads. Weights are divided by the number of keys and not by
//! their sum, so they do not add up to 1.
//!
//! The layer is linear in what is trained, so that `V` is found by least
//! squares, and it does not depend on the order of the keys. In the biased
//! variant of the paper the mean of `W_r` is `diag(1, .., 1, 0)`, which favours
//! keys like the query: such functions are then learnt from fewer examples.
//!
//! Cost: `features (2 (head_dim + 1)^2 + 4 kv_len (head_dim + 1) + 2 (head_dim +
//! 1) value_dim)` flops a query and head: it is not linear in the length, and
//! takes `features` times as long as [`Dense`](crate::dense::Dense). It is a
//! model to study attention with. To approximate a softmax at low cost use
//! [`Performer`](super::Performer).

use ndarray::{Array2, Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut4, Axis, ShapeBuilder, s};

use crate::attention::{Attention, Bounded, Cost, Input, Mechanism};
use crate::card::Card;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::product;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, filled};
use crate::math::random::Normal;
use crate::simd::any::{AnyArray, AnyRows, AnyRowsMut};
use crate::simd::mem::{
    Ahead, Arena, Heads, OutRows, Rows, STREAMS, Stream, bytes_for, bytes_for_shares, claim_words,
};
use crate::simd::pack::PackColumns;
use crate::simd::tile::{TILE_ROWS, Update};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::recur::check_out;

/// What [`RandomFeatureAttention`] takes.
#[derive(Clone, Copy, Debug)]
pub struct RandomFeatureInput<'a, T> {
    /// Queries `[batch, heads, q_len, head_dim]`.
    pub q: ArrayView4<'a, T>,
    /// Keys `[batch, kv_heads, kv_len, head_dim]`. Heads may be fewer.
    pub k: ArrayView4<'a, T>,
    /// What is trained, `V`: `[heads, features, head_dim + 1, value_dim]`.
    pub values: ArrayView4<'a, f32>,
}

impl<'a, T> RandomFeatureInput<'a, T> {
    /// Reborrows.
    pub fn reborrow<'b>(self) -> RandomFeatureInput<'b, T>
    where
        'a: 'b,
    {
        RandomFeatureInput { q: self.q.reborrow(), k: self.k.reborrow(), values: self.values.reborrow() }
    }
}

impl<T: Element> Input for RandomFeatureInput<'_, T> {
    type Out = T;

    fn lengths(&self) -> Lengths<'_> {
        Lengths::Full
    }

    fn dims(&self) -> Result<Dims> {
        let (batch, q_heads, q_len, head_dim) = self.q.dim();
        let (k_batch, kv_heads, kv_len, k_dim) = self.k.dim();
        if (k_batch, k_dim) != (batch, head_dim) {
            let expected =
                format!("[batch, kv_heads, kv_len, head_dim] = [{batch}, _, _, {head_dim}] as q has it");
            return Err(Error::shape("k", expected, self.k.shape()));
        }
        if (kv_heads == 0 && q_heads > 0) || (kv_heads > 0 && !q_heads.is_multiple_of(kv_heads)) {
            return Err(Error::Heads { q_heads, kv_heads });
        }
        let (heads, _, rows, value_dim) = self.values.dim();
        if (heads, rows) != (q_heads, head_dim + 1) {
            let expected = format!(
                "[heads, features, head_dim + 1, value_dim] = [{q_heads}, _, {}, _] as q has it",
                head_dim + 1
            );
            return Err(Error::shape("values", expected, self.values.shape()));
        }
        Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed: false }.checked()
    }

    fn out_dim(&self) -> Result<(usize, usize, usize, usize)> {
        let dims = self.dims()?;
        Ok((dims.batch, dims.q_heads, dims.q_len, dims.value_dim))
    }
}

/// Random-feature attention; see [`RandomFeatureInput`] for what it takes.
/// Not causal.
///
/// ```
/// use attention_kernels::{Attention, linear::{RandomFeatureAttention, RandomFeatureInput}};
/// use ndarray::{Array4, s};
///
/// let x = Array4::from_shape_fn((1, 2, 50, 16), |(_, h, t, c)| ((h + t * c) as f32).sin());
/// let values = Array4::from_shape_fn((2, 40, 17, 1), |(h, r, c, _)| ((h + r * c) as f32).cos());
/// let layer = RandomFeatureAttention::builder(16, 40).biased().seed(7).build()?;
/// let all = RandomFeatureInput { q: x.view(), k: x.view(), values: values.view() };
/// let out = layer.forward(all)?;
/// assert_eq!(out.dim(), (1, 2, 50, 1));
///
/// // The order of the keys is nothing to it.
/// let reversed = RandomFeatureInput { k: x.slice(s![.., .., ..;-1, ..]), ..all };
/// let same = layer.forward(reversed)?;
/// assert!(out.iter().zip(&same).all(|(a, b)| (a - b).abs() < 1e-3));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Semantics
/// - With no key the output is 0.
/// - A NaN in a key shows in all outputs of its head, one in a query in all
///   of its row.
///
/// # Error bound
///
/// With `u = 2^-24`, `D = head_dim + 1` and `B = ceil(kv_len / 64)`, each
/// element of a row is off by at most
///
/// ```text
/// n u / (1 - n u) * max_c 1 / kv_len sum_j sum_r (|x|^T |W_r| |y_j|) (|V_r|^T |y_j|)_c
/// n = 3 (D + 1) + min(kv_len, 64) + 1 + B + features + 2
/// ```
///
/// which counts the roundings on the way of a term: two dot products of `D`
/// elements for a score, which `relu` brings no further off; a sum over the
/// keys, 64 by 64; a dot product of `D` elements with `V`, the sum over
/// features, and a multiplication by a rounded `1 / kv_len`.
#[derive(Clone, Debug)]
pub struct RandomFeatureAttention {
    isa: Isa,
    head_dim: usize,
    features: usize,
    /// `[features, head_dim + 1, stride]`, 0 past `head_dim + 1`.
    weights: Vec<f32>,
}

/// Builds a [`RandomFeatureAttention`].
#[derive(Clone, Debug)]
pub struct RandomFeatureAttentionBuilder {
    head_dim: usize,
    features: usize,
    seed: u64,
    mean: f32,
    variance: f32,
    isa: Option<Isa>,
}

impl RandomFeatureAttention {
    /// Queries and keys of `head_dim` elements, `features` random matrices of
    /// mean 0 and variance 1/4 from seed 0.
    pub fn builder(head_dim: usize, features: usize) -> RandomFeatureAttentionBuilder {
        RandomFeatureAttentionBuilder { head_dim, features, seed: 0, mean: 0.0, variance: 0.25, isa: None }
    }

    /// The random matrices, `[features, head_dim + 1, head_dim + 1]`: rows
    /// for elements of a query, columns for those of a key.
    pub fn weights(&self) -> ArrayView3<'_, f32> {
        let (dim, stride) = (self.dim(), self.stride());
        let shape = (self.features, dim, dim).strides((dim * stride, stride, 1));
        ArrayView3::from_shape(shape, &self.weights).expect("weights have been made of this shape")
    }
}

impl RandomFeatureAttentionBuilder {
    /// What the matrices are drawn from. Default: 0.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The mean of the first `head_dim` elements of the diagonal; that of all
    /// others is 0. Default: 0.
    pub fn mean(mut self, mean: f32) -> Self {
        self.mean = mean;
        self
    }

    /// The biased variant: a [`mean`](Self::mean) of 1.
    pub fn biased(self) -> Self {
        self.mean(1.0)
    }

    /// The variance of each element. Default: 1/4.
    pub fn variance(mut self, variance: f32) -> Self {
        self.variance = variance;
        self
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = Some(isa);
        self
    }

    /// Draws the matrices and checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for no features or more than memory has room for, a
    /// mean that is not finite, and a variance that is negative or not finite;
    /// [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<RandomFeatureAttention> {
        let Self { head_dim, features, seed, mean, variance, isa } = self;
        if features == 0 {
            return Err(Error::value("features", "at least one", features));
        }
        if !mean.is_finite() {
            return Err(Error::value("mean", "a finite number", mean));
        }
        if !(variance.is_finite() && variance >= 0.0) {
            return Err(Error::value("variance", "a finite number of at least 0", variance));
        }
        let mut layer =
            RandomFeatureAttention { isa: Isa::choose(isa)?, head_dim, features, weights: Vec::new() };
        let len = head_dim
            .checked_add(1 + MAX_LANES)
            .and_then(|_| layer.dim().checked_mul(layer.stride()))
            .and_then(|matrix| matrix.checked_mul(features));
        let len = len.filter(|&len| layer.weights.try_reserve_exact(len).is_ok()).ok_or_else(|| {
            let got = format_args!("{features} of {head_dim} elements").to_string();
            Error::value("features", "a number that memory has room for", got)
        })?;
        layer.weights.resize(len, 0.0);
        let (mut normal, spread) = (Normal::new(seed), f64::from(variance).sqrt());
        let (dim, stride) = (layer.dim(), layer.stride());
        for (i, row) in layer.weights.chunks_exact_mut(stride).enumerate() {
            for ((j, w), x) in row[..dim].iter_mut().enumerate().zip(&mut normal) {
                let mean = if i % dim == j && j < head_dim { f64::from(mean) } else { 0.0 };
                *w = (mean + spread * x) as f32;
            }
        }
        Ok(layer)
    }
}

/// Queries that a thread works on at a time.
const ROWS: usize = 4 * TILE_ROWS;
/// Keys of a block.
const KEYS: usize = 64;
/// Features between two passes over the keys.
const FEATURES: usize = 16;

/// Sizes of what one thread works in.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    /// Elements of a query or key with the 1 at its end.
    dim: usize,
    /// The same, rounded up to vectors: from one row to the next.
    stride: usize,
    /// Columns of values, rounded up to vectors.
    width: usize,
}

/// What one thread works in.
struct Room<'a> {
    /// Queries, `[ROWS, stride]`.
    q: &'a mut [f32],
    /// `W^T x` for each feature and query, `[FEATURES][ROWS, stride]`.
    y: &'a mut [f32],
    /// `sum_j relu(..) y_j`, `[FEATURES][ROWS, stride]`.
    sums: &'a mut [f32],
    /// Keys as rows `[KEYS, stride]` and as columns `[dim, KEYS]`.
    keys: &'a mut [f32],
    columns: &'a mut [f32],
    /// `[ROWS, KEYS]`
    scores: &'a mut [f32],
    /// Values of one feature, `[dim, width]`.
    values: &'a mut [f32],
    /// `[ROWS, width]`
    out: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn sizes(g: Geometry) -> [usize; 8] {
        let rows = ROWS * g.stride;
        let each = FEATURES * rows;
        let keys = KEYS * g.stride;
        [rows, each, each, keys, g.dim * KEYS, ROWS * KEYS, g.dim * g.width, ROWS * g.width]
    }

    fn bytes(g: Geometry) -> usize {
        Self::sizes(g).iter().map(|&n| bytes_for::<f32>(n)).sum()
    }

    fn take(mut arena: Arena<'a>, g: Geometry) -> Self {
        let [q, y, sums, keys, columns, scores, values, out] = Self::sizes(g);
        Self {
            q: arena.take(q),
            y: arena.take(y),
            sums: arena.take(sums),
            keys: arena.take(keys),
            columns: arena.take(columns),
            scores: arena.take(scores),
            values: arena.take(values),
            out: arena.take(out),
        }
    }
}

/// Some queries of one head, over all keys.
struct Block<'a, 'b, 'c> {
    g: Geometry,
    q: AnyRows<'a>,
    k: AnyRows<'a>,
    /// `[features, dim, stride]`
    weights: &'a [f32],
    values: &'a AnyArray<'a>,
    head: usize,
    room: &'a mut Room<'b>,
    out: AnyRowsMut<'c>,
}

/// Rows with a 1 after the last element.
#[inline(always)]
fn extended<S: Simd>(s: S, from: AnyRows<'_>, to: &mut [f32], g: Geometry) {
    from.pack_rows(s, to, g.stride);
    for row in to.chunks_exact_mut(g.stride).take(from.len()) {
        row[g.dim - 1] = 1.0;
    }
}

impl Kernel for Block<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { g, q, k, weights, values, head, room, mut out } = self;
        let Geometry { dim, stride, width } = g;
        let (rows, kv_len, matrix) = (q.len(), k.len(), dim * stride);
        let features = if kv_len == 0 { 0 } else { weights.len() / matrix };
        let mut ahead = Ahead::new([Stream::NONE; STREAMS]);
        let ahead = &mut ahead;
        room.out.fill(0.0);
        extended(s, q, room.q, g);
        for first in (0..features).step_by(FEATURES) {
            let count = (features - first).min(FEATURES);
            for i in 0..count {
                let a = Rows::of_slice(room.q, rows, dim, stride);
                let b = (&weights[(first + i) * matrix..][..matrix], stride);
                let c = (&mut room.y[i * ROWS * stride..], stride);
                product(s, a, b, stride, c, Update::Set, ahead);
            }
            room.sums.fill(0.0);
            for key in (0..kv_len).step_by(KEYS) {
                let keys = (kv_len - key).min(KEYS);
                extended(s, k.part(key..key + keys), room.keys, g);
                let from = Rows::of_slice(room.keys, keys, dim, stride);
                s.vectorize(PackColumns { from, to: room.columns, stride: KEYS });
                for i in 0..count {
                    let a = Rows::of_slice(&room.y[i * ROWS * stride..], rows, dim, stride);
                    let b = (&*room.columns, KEYS);
                    let columns = keys.next_multiple_of(S::LANES);
                    product(s, a, b, columns, (&mut *room.scores, KEYS), Update::Set, ahead);
                    for x in room.scores[..rows * KEYS].chunks_exact_mut(S::LANES) {
                        // In this order NaN stays.
                        s.store(x, s.max(s.splat(0.0), s.load(x)));
                    }
                    let a = Rows::of_slice(room.scores, rows, keys, KEYS);
                    let c = (&mut room.sums[i * ROWS * stride..], stride);
                    product(s, a, (&*room.keys, stride), stride, c, Update::Add, ahead);
                }
            }
            for i in 0..count {
                values.rows(head, first + i, &(0..dim)).pack_rows(s, room.values, width);
                let a = Rows::of_slice(&room.sums[i * ROWS * stride..], rows, dim, stride);
                let (b, c) = ((&*room.values, width), (&mut *room.out, width));
                product(s, a, b, width, c, Update::Add, ahead);
            }
        }
        let share = 1.0 / kv_len.max(1) as f32;
        for (i, row) in room.out.chunks_exact(width).take(rows).enumerate() {
            out.write(s, i, row, share);
        }
    }
}

/// What rounding to `f32` is off by at most, of a number.
const U: f64 = 1.0 / 16_777_216.0;

impl RandomFeatureAttention {
    fn dim(&self) -> usize {
        self.head_dim + 1
    }

    fn stride(&self) -> usize {
        self.dim().next_multiple_of(MAX_LANES)
    }

    fn check<T: Element>(&self, x: &RandomFeatureInput<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        if dims.head_dim != self.head_dim {
            let expected =
                format!("[batch, heads, q_len, head_dim] = [_, _, _, {}] as the layer has it", self.head_dim);
            return Err(Error::shape("q", expected, x.q.shape()));
        }
        if x.values.dim().1 != self.features {
            let expected = format!(
                "[heads, features, head_dim + 1, value_dim] = [_, {}, _, _] as the layer has it",
                self.features
            );
            return Err(Error::shape("values", expected, x.values.shape()));
        }
        Ok(dims)
    }

    fn geometry(&self, dims: &Dims) -> Geometry {
        let width = dims.value_dim.next_multiple_of(MAX_LANES);
        Geometry { dim: self.dim(), stride: self.stride(), width }
    }

    fn bytes(&self, dims: &Dims) -> usize {
        bytes_for::<u64>(claim_words(dims.batch * dims.q_heads * dims.q_len))
            + bytes_for_shares(parallel::threads(), Room::bytes(self.geometry(dims)))
    }

    /// The definition, and how far each row may be off.
    fn define<T: Element>(&self, x: &RandomFeatureInput<'_, T>) -> Result<(Array4<f64>, Array3<f64>)> {
        let dims = self.check(x)?;
        let Dims { batch, q_heads, kv_heads, q_len, kv_len, value_dim, .. } = dims;
        let (dim, n) = (self.dim(), kv_len as f64);
        let w = self.weights();
        let roundings = 3 * (dim + 1) + kv_len.min(KEYS) + 1 + kv_len.div_ceil(KEYS) + self.features + 2;
        let unit = roundings as f64 * U / (1.0 - roundings as f64 * U);
        let mut out = filled("out", (batch, q_heads, q_len, value_dim), 0f64)?;
        let mut bound = filled("out", (batch, q_heads, q_len), 0f64)?;
        for (b, h) in (0..batch).flat_map(|b| (0..q_heads).map(move |h| (b, h))) {
            let with_one = |x: &ArrayView4<'_, T>, head: usize| {
                let x = x.slice(s![b, head, .., ..]);
                Array2::from_shape_fn((x.dim().0, dim), |(t, c)| x.get((t, c)).map_or(1.0, |x| x.to_f64()))
            };
            let (q, k) = (with_one(&x.q, h), with_one(&x.k, h / (q_heads / kv_heads)));
            for i in 0..q_len {
                let mut sizes = vec![0.0; value_dim];
                for r in 0..self.features {
                    // x^T W_r, and the same of magnitudes.
                    let (mut y, mut y_size) = (vec![0.0; dim], vec![0.0; dim]);
                    for (&x, row) in q.row(i).iter().zip(w.index_axis(Axis(0), r).rows()) {
                        for ((y, size), &w) in y.iter_mut().zip(&mut y_size).zip(row) {
                            let term = x * f64::from(w);
                            *y += term;
                            *size += term.abs();
                        }
                    }
                    let (mut sum, mut size) = (vec![0.0; dim], vec![0.0; dim]);
                    for key in k.rows() {
                        let score: f64 = y.iter().zip(key).map(|(y, k)| y * k).sum();
                        let score_size: f64 = y_size.iter().zip(key).map(|(y, k)| y * k.abs()).sum();
                        let relu = if score < 0.0 { 0.0 } else { score };
                        for ((sum, size), &k) in sum.iter_mut().zip(&mut size).zip(key) {
                            *sum += relu / n * k;
                            *size += score_size / n * k.abs();
                        }
                    }
                    if kv_len > 0 {
                        for (c, v) in (0..dim).flat_map(|c| (0..value_dim).map(move |v| (c, v))) {
                            let value = f64::from(x.values[[h, r, c, v]]);
                            out[[b, h, i, v]] += sum[c] * value;
                            sizes[v] += size[c] * value.abs();
                        }
                    }
                }
                bound[[b, h, i]] = unit * sizes.into_iter().fold(0.0, f64::max);
            }
        }
        Ok((out, bound))
    }
}

impl<T: Element> Attention<RandomFeatureInput<'_, T>> for RandomFeatureAttention {
    fn workspace_bytes(&self, x: RandomFeatureInput<'_, T>) -> Result<usize> {
        Ok(self.bytes(&self.check(&x)?))
    }

    fn forward_into(
        &self,
        x: RandomFeatureInput<'_, T>,
        out: ArrayViewMut4<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let dims = self.check(&x)?;
        check_out(&x, &out)?;
        if out.is_empty() {
            return Ok(());
        }
        let Dims { batch, q_heads, kv_heads, q_len, kv_len, .. } = dims;
        let (g, blocks) = (self.geometry(&dims), q_len.div_ceil(ROWS));
        let mut arena = workspace.arena(self.bytes(&dims))?;
        let out = T::any_out(OutRows::new(out, arena.take(claim_words(batch * q_heads * q_len))));
        let (queries, keys) = (T::any(Heads::new(x.q.reborrow())), T::any(Heads::new(x.k.reborrow())));
        let values = AnyArray::F32(Heads::new(x.values.reborrow()));
        let workers = parallel::threads();
        let shares = arena.shares(workers, Room::bytes(g));
        let start = |worker| Room::take(shares.take(worker), g);
        parallel::for_each(workers, batch * q_heads * blocks, start, |room, task| {
            let (b, h, first) = (task / blocks / q_heads, task / blocks % q_heads, task % blocks * ROWS);
            let rows = first..(first + ROWS).min(q_len);
            self.isa.dispatch(Block {
                g,
                q: queries.rows(b, h, &rows),
                k: keys.rows(b, h / (q_heads / kv_heads), &(0..kv_len)),
                weights: &self.weights,
                values: &values,
                head: h,
                room,
                out: out.take(b, h, rows),
            });
        });
        Ok(())
    }

    fn reference(&self, x: RandomFeatureInput<'_, T>) -> Result<Array4<f64>> {
        Ok(self.define(&x)?.0)
    }

    /// All pairs are visible. The random matrices and the values are read
    /// besides the input.
    fn cost(&self, x: RandomFeatureInput<'_, T>) -> Result<Cost> {
        let Dims { batch, q_heads, q_len, kv_len, value_dim, .. } = self.check(&x)?;
        let (dim, rows) = (self.dim(), batch * q_heads * q_len);
        let flops = rows * self.features * (2 * dim * dim + 4 * kv_len * dim + 2 * dim * value_dim);
        let elements = x.q.len() + x.k.len() + rows * value_dim;
        let parameters = self.features * dim * dim + x.values.len();
        let bytes = elements * size_of::<T>() + parameters * size_of::<f32>();
        Ok(Cost { flops: flops as u64, bytes: bytes as u64 })
    }
}

impl<T: Element> Bounded<RandomFeatureInput<'_, T>> for RandomFeatureAttention {
    fn error_bound(&self, x: RandomFeatureInput<'_, T>) -> Result<Array3<f64>> {
        Ok(self.define(&x)?.1)
    }
}

/// The card.
pub(crate) const RANDOM_FEATURES: &Card = &Card {
    name: "random-feature attention",
    family: "linear",
    source: "arXiv 2307.11353",
    summary: "random matrices weigh keys for values that are parameters",
    when_not: "where values must come from the tokens: here they are trained once for all",
};

impl Mechanism for RandomFeatureAttention {
    fn card(&self) -> &'static Card {
        RANDOM_FEATURES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::arrays::array;
    use crate::testing::qkv::{Qkvs, close, held};
    use half::{bf16, f16};

    /// An input that owns its arrays.
    #[derive(Clone)]
    struct Case {
        q: Array4<f32>,
        k: Array4<f32>,
        values: Array4<f32>,
    }

    impl Case {
        /// Sizes are batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim.
        fn new(sizes: [usize; 7], features: usize, seed: u64) -> Self {
            let Qkvs { q, k, .. } = Qkvs::new(sizes, seed);
            Self { q, k, values: array(seed + 1, (sizes[1], features, sizes[5] + 1, sizes[6])) }
        }

        fn input(&self) -> RandomFeatureInput<'_, f32> {
            RandomFeatureInput { q: self.q.view(), k: self.k.view(), values: self.values.view() }
        }
    }

    fn builder(head_dim: usize, features: usize) -> RandomFeatureAttentionBuilder {
        RandomFeatureAttention::builder(head_dim, features).seed(5)
    }

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for (q_len, kv_len) in [(0, 5), (1, 1), (23, 63), (24, 64), (25, 65), (50, 197), (3, 0)] {
            for features in [1, 16, 17, 33] {
                let case = Case::new([1, 2, 1, q_len, kv_len, 12, 20], features, 1);
                for mean in [0.0, 1.0] {
                    let layer = builder(12, features).mean(mean).build().unwrap();
                    worst = worst.max(held(&layer, case.input()));
                }
            }
        }
        for isa in Isa::available() {
            for (head_dim, value_dim) in [(0, 1), (1, 1), (15, 70), (16, 3), (70, 17), (5, 0)] {
                let case = Case::new([1, 2, 1, 26, 70, head_dim, value_dim], 3, 2);
                worst = worst.max(held(&builder(head_dim, 3).isa(isa).build().unwrap(), case.input()));
            }
        }
        println!("random-feature attention: {worst:.3} of the bound");
        assert!(worst > 0.002, "a bound that nothing comes near to");
    }

    #[test]
    fn half_types_are_widened_and_rounded_once() {
        fn check<T: Element>(case: &Case) -> f64 {
            let narrow = |x: &Array4<f32>| x.mapv(T::from_f32);
            let (q, k) = (narrow(&case.q), narrow(&case.k));
            // As models have it: the head axis after the length.
            let k = k.permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
            let k = k.view().permuted_axes([0, 2, 1, 3]);
            let values = case.values.view();
            held(&builder(12, 5).build().unwrap(), RandomFeatureInput { q: q.view(), k, values })
        }
        let case = Case::new([2, 4, 2, 30, 70, 12, 20], 5, 3);
        println!("f16: {:.3}, bf16: {:.3} of the bound", check::<f16>(&case), check::<bf16>(&case));
    }

    #[test]
    fn definition_is_the_sum_over_all_elements() {
        let case = Case::new([2, 2, 1, 3, 7, 4, 3], 6, 4);
        let layer = builder(4, 6).mean(0.5).variance(2.0).build().unwrap();
        let w = layer.weights();
        let at = |x: &Array4<f32>, b, h, t, c| if c == 4 { 1.0 } else { f64::from(x[[b, h, t, c]]) };
        let want = Array4::from_shape_fn((2, 2, 3, 3), |(b, h, i, v)| {
            let mut out = 0.0;
            for (j, r) in (0..7).flat_map(|j| (0..6).map(move |r| (j, r))) {
                let (mut score, mut value) = (0.0, 0.0);
                for c in 0..5 {
                    let y = at(&case.k, b, 0, j, c);
                    score +=
                        (0..5).map(|a| at(&case.q, b, h, i, a) * f64::from(w[[r, a, c]]) * y).sum::<f64>();
                    value += f64::from(case.values[[h, r, c, v]]) * y;
                }
                out += score.max(0.0) * value / 7.0;
            }
            out
        });
        close(&layer.reference(case.input()).unwrap(), &want, 1e-12);
    }

    #[test]
    fn the_order_of_keys_is_nothing_to_it() {
        let case = Case::new([1, 2, 2, 9, 150, 8, 5], 20, 5);
        let layer = builder(8, 20).biased().build().unwrap();
        let mut reversed = case.clone();
        reversed.k.invert_axis(Axis(2));
        let (a, b) = (layer.reference(case.input()).unwrap(), layer.reference(reversed.input()).unwrap());
        close(&a, &b, 1e-12);
        let bound = layer.error_bound(case.input()).unwrap();
        let out = layer.forward(reversed.input()).unwrap();
        for ((b, h, i, c), x) in out.indexed_iter() {
            assert!((f64::from(*x) - a[[b, h, i, c]]).abs() <= bound[[b, h, i]]);
        }
        // Keys twice are no other than keys once.
        let twice = ndarray::concatenate(Axis(2), &[case.k.view(), case.k.view()]).unwrap();
        let twice = Case { k: twice, ..case };
        close(&layer.reference(twice.input()).unwrap(), &a, 1e-12);
    }

    #[test]
    fn it_is_linear_in_the_values() {
        let case = Case::new([1, 2, 1, 9, 40, 8, 5], 20, 6);
        let layer = builder(8, 20).build().unwrap();
        // Of few bits, so that their sums are exact.
        let few = |x: &Array4<f32>| x.mapv(|x| (x * 128.0).round() / 128.0);
        let case = Case { values: few(&case.values), ..case };
        let other = few(&array(60, case.values.dim()));
        let with = |values: Array4<f32>| layer.reference(Case { values, ..case.clone() }.input()).unwrap();
        let sum = with(&case.values * 0.5 + &other * 4.0);
        let parts = with(case.values.clone()) * 0.5 + with(other) * 4.0;
        close(&sum, &parts, 1e-12);
        assert!(parts.iter().any(|x| x.abs() > 0.1));
    }

    #[test]
    fn matrices_have_their_mean_and_variance() {
        let (d, n) = (15, 400);
        for (mean, variance) in [(0.0, 0.25), (1.0, 0.25), (-2.0, 9.0)] {
            let layer = builder(d, n).mean(mean).variance(variance).build().unwrap();
            let w = layer.weights();
            assert_eq!(w.dim(), (n, d + 1, d + 1));
            let (mut sums, mut squares) = ([0.0; 2], 0.0);
            for ((_, a, b), &w) in w.indexed_iter() {
                let biased = a == b && a < d;
                let off = f64::from(w) - if biased { f64::from(mean) } else { 0.0 };
                sums[usize::from(biased)] += off;
                squares += off * off;
            }
            let spread = f64::from(variance).sqrt();
            let counts = [w.len() - n * d, n * d];
            for (sum, count) in sums.into_iter().zip(counts) {
                assert!((sum / count as f64).abs() < 4.0 * spread / (count as f64).sqrt());
            }
            let relative = squares / w.len() as f64 / f64::from(variance) - 1.0;
            assert!(relative.abs() < 4.0 * (2.0 / w.len() as f64).sqrt(), "{relative}");
        }
        let draw = |seed| builder(3, 2).seed(seed).build().unwrap();
        assert_eq!(draw(1).weights(), draw(1).weights());
        assert_ne!(draw(1).weights(), draw(2).weights());
    }

    #[test]
    fn nan_shows_where_it_is_seen() {
        let case = Case::new([1, 2, 2, 30, 70, 8, 5], 3, 7);
        let layer = builder(8, 3).build().unwrap();
        let mut key = case.clone();
        key.k[[0, 1, 66, 2]] = f32::NAN;
        for ((_, h, ..), x) in layer.forward(key.input()).unwrap().indexed_iter() {
            assert_eq!(x.is_nan(), h == 1);
        }
        let mut query = case.clone();
        query.q[[0, 0, 25, 7]] = f32::NAN;
        for ((_, h, i, _), x) in layer.forward(query.input()).unwrap().indexed_iter() {
            assert_eq!(x.is_nan(), h == 0 && i == 25);
        }
        let mut values = case.clone();
        values.values[[1, 2, 8, 3]] = f32::NAN;
        for ((_, h, _, c), x) in layer.forward(values.input()).unwrap().indexed_iter() {
            assert_eq!(x.is_nan(), h == 1 && c == 3);
        }
        // Where there is no key, nothing is seen.
        let none = Case { k: Array4::zeros((1, 2, 0, 8)), ..values };
        let (out, want) = (layer.forward(none.input()).unwrap(), layer.reference(none.input()).unwrap());
        assert!(out.iter().all(|&x| x == 0.0) && want.iter().all(|&x| x == 0.0));
    }

    #[test]
    fn costs_are_those_of_the_docs() {
        let case = Case::new([2, 4, 2, 3, 7, 9, 5], 6, 8);
        let cost = builder(9, 6).build().unwrap().cost(case.input()).unwrap();
        assert_eq!(cost.flops, 2 * 4 * 3 * 6 * (2 * 100 + 4 * 7 * 10 + 2 * 10 * 5));
        let numbers = 2 * 4 * 3 * 9 + 2 * 2 * 7 * 9 + 2 * 4 * 3 * 5 + 6 * 100 + 4 * 6 * 10 * 5;
        assert_eq!(cost.bytes, 4 * numbers);
    }

    #[test]
    fn refusals() {
        let error = |builder: RandomFeatureAttentionBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(error(builder(8, 0)), "features: expected at least one, got 0");
        assert_eq!(error(builder(8, 1).mean(f32::NAN)), "mean: expected a finite number, got NaN");
        assert_eq!(
            error(builder(8, 1).variance(-1.0)),
            "variance: expected a finite number of at least 0, got -1"
        );
        let most = usize::MAX;
        for (head_dim, features) in [(most, 1), (8, most), (1 << 31, 1 << 10)] {
            assert_eq!(
                error(builder(head_dim, features)),
                format!(
                    "features: expected a number that memory has room for, got {features} of {head_dim} elements"
                )
            );
        }

        let case = Case::new([1, 2, 1, 3, 4, 8, 5], 6, 9);
        let forward = |layer: RandomFeatureAttentionBuilder, x: RandomFeatureInput<'_, f32>| {
            let mut out = Array4::from_elem((1, 2, 3, 5), 7.0);
            let error = layer.build().unwrap().forward_into(x, out.view_mut(), &mut Workspace::new());
            assert!(out.iter().all(|&x| x == 7.0));
            error.unwrap_err().to_string()
        };
        assert_eq!(
            forward(builder(9, 6), case.input()),
            "q: expected shape [batch, heads, q_len, head_dim] = [_, _, _, 9] as the layer has it, \
             got [1, 2, 3, 8]"
        );
        assert_eq!(
            forward(builder(8, 7), case.input()),
            "values: expected shape [heads, features, head_dim + 1, value_dim] = [_, 7, _, _] as the layer \
             has it, got [2, 6, 9, 5]"
        );
        let k = Array4::zeros((1, 1, 4, 9));
        assert_eq!(
            forward(builder(8, 6), RandomFeatureInput { k: k.view(), ..case.input() }),
            "k: expected shape [batch, kv_heads, kv_len, head_dim] = [1, _, _, 8] as q has it, \
             got [1, 1, 4, 9]"
        );
        let k = Array4::zeros((1, 3, 4, 8));
        assert_eq!(
            forward(builder(8, 6), RandomFeatureInput { k: k.view(), ..case.input() }),
            "q: expected a number of heads that is a multiple of the 3 key/value heads, got 2"
        );
        let values = Array4::zeros((2, 6, 8, 5));
        assert_eq!(
            forward(builder(8, 6), RandomFeatureInput { values: values.view(), ..case.input() }),
            "values: expected shape [heads, features, head_dim + 1, value_dim] = [2, _, 9, _] as q has it, \
             got [2, 6, 8, 5]"
        );
        let values = Array4::zeros((2, 6, 9, 4));
        assert_eq!(
            forward(builder(8, 6), RandomFeatureInput { values: values.view(), ..case.input() }),
            "out: expected shape [batch, heads, len, value_dim] = [1, 2, 3, 4], got [1, 2, 3, 5]"
        );
    }
}
