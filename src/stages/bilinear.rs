//! Rectified bilinear scores of many matrices: what keys add up to, weighed by
//! each, goes through a matrix of its own.
//!
//! ```text
//! o_i = 1 / kv_len sum_r (sum_j relu(x_i^T W_r y_j) y_j)^T V_r      x_i = [q_i; 1], y_j = [k_j; 1]
//! ```
//!
//! Keys are packed once for a block of queries and several matrices; scores and
//! sums are register tiles.

use ndarray::{Array2, ArrayView3, ArrayView4, ArrayViewMut4, ShapeBuilder};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::product;
use crate::math::random::Normal;
use crate::simd::any::{AnyArray, AnyRows, AnyRowsMut};
use crate::simd::mem::{
    Ahead, Arena, Heads, OutRows, Rows, STREAMS, Stream, bytes_for, bytes_for_shares, claim_words,
};
use crate::simd::pack::PackColumns;
use crate::simd::tile::{TILE_ROWS, Update};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::Pass;

/// The matrices `W_r`.
#[derive(Clone, Debug)]
pub(crate) struct Bilinear {
    pub(crate) features: usize,
    /// Elements of a row with the 1 at its end.
    dim: usize,
    /// `[features, dim, stride]`, 0 past `dim`.
    weights: Vec<f32>,
}

impl Bilinear {
    /// Matrices of `head_dim + 1` rows, whose elements `draw` gives for each
    /// row and column; none where there are no features, or more than memory has
    /// room for.
    fn new(head_dim: usize, features: usize, mut draw: impl FnMut(usize, usize) -> f32) -> Option<Self> {
        let dim = head_dim.checked_add(1).filter(|_| features > 0)?;
        let stride = dim.checked_next_multiple_of(MAX_LANES)?;
        let len = dim.checked_mul(stride)?.checked_mul(features)?;
        let mut weights = Vec::new();
        weights.try_reserve_exact(len).ok()?;
        weights.resize(len, 0.0);
        for (i, row) in weights.chunks_exact_mut(stride).enumerate() {
            row[..dim].iter_mut().enumerate().for_each(|(j, w)| *w = draw(i % dim, j));
        }
        Some(Self { features, dim, weights })
    }

    /// Matrices of normal numbers from a seed: `mean` is that of the first
    /// `head_dim` elements of the diagonal, of all others it is 0.
    pub(crate) fn normal(
        head_dim: usize,
        features: usize,
        seed: u64,
        (mean, variance): (f32, f32),
    ) -> Option<Self> {
        let (mut normal, spread) = (Normal::new(seed), f64::from(variance).sqrt());
        Self::new(head_dim, features, |i, j| {
            let mean = if i == j && j < head_dim { f64::from(mean) } else { 0.0 };
            (mean + spread * normal.next().unwrap_or_default()) as f32
        })
    }

    fn stride(&self) -> usize {
        self.dim.next_multiple_of(MAX_LANES)
    }

    /// `[features, head_dim + 1, head_dim + 1]`
    pub(crate) fn matrices(&self) -> ArrayView3<'_, f32> {
        let (dim, stride) = (self.dim, self.stride());
        let shape = (self.features, dim, dim).strides((dim * stride, stride, 1));
        ArrayView3::from_shape(shape, &self.weights).expect("weights have been made of this shape")
    }

    /// The stage. Heads of `k` are shared by neighbours; `values` are `[heads,
    /// features, head_dim + 1, value_dim]`.
    pub(crate) fn run<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        [q, k]: [ArrayView4<'_, T>; 2],
        values: ArrayView4<'_, f32>,
        out: Option<ArrayViewMut4<'_, T>>,
    ) {
        let ((batch, heads, q_len, _), (_, kv_heads, kv_len, _), value_dim) =
            (q.dim(), k.dim(), values.dim().3);
        let (dim, rows, workers) = (self.dim, batch * heads * q_len, parallel::threads());
        let g = Geometry { dim, stride: self.stride(), width: value_dim.next_multiple_of(MAX_LANES) };
        let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for_shares(workers, Room::bytes(g));
        let flops =
            || (rows * self.features * (2 * dim * dim + 4 * kv_len * dim + 2 * dim * value_dim)) as u64;
        pass.stage(flops, bytes, |mut arena| {
            let Some(out) = out.filter(|out| !out.is_empty()) else { return };
            let blocks = q_len.div_ceil(ROWS);
            let out = T::any_out(OutRows::new(out, arena.take(claim_words(rows))));
            let (queries, keys) = (T::any(Heads::new(q)), T::any(Heads::new(k)));
            let values = AnyArray::F32(Heads::new(values));
            let shares = arena.shares(workers, Room::bytes(g));
            let start = |worker| Room::take(shares.take(worker), g);
            parallel::for_each(workers, batch * heads * blocks, start, |room, task| {
                let (b, h, first) = (task / blocks / heads, task / blocks % heads, task % blocks * ROWS);
                let rows = first..(first + ROWS).min(q_len);
                isa.dispatch(Block {
                    g,
                    q: queries.rows(b, h, &rows),
                    k: keys.rows(b, h / (heads / kv_heads), &(0..kv_len)),
                    weights: &self.weights,
                    values: &values,
                    head: h,
                    room,
                    out: out.take(b, h, rows),
                });
            });
        });
    }

    /// The definition, of one head; rows of `q` and `k` end with a 1.
    pub(crate) fn define<R: Real>(&self, [q, k]: [&Array2<R>; 2], values: ArrayView3<'_, f32>) -> Array2<R> {
        let (w, features, dim) = (self.matrices(), 0..self.features, self.dim);
        let mut out = Array2::from_elem((q.dim().0, values.dim().2), R::of(0.0));
        for (q, mut out) in q.outer_iter().zip(out.outer_iter_mut()).filter(|_| k.dim().0 > 0) {
            let of = |x: f32| R::of(f64::from(x));
            let means: Array2<R> = Array2::from_shape_vec(
                (self.features, dim),
                features
                    .clone()
                    .flat_map(|r| {
                        let column = |c| R::dot((0..dim).map(|a| (q[a], of(w[[r, a, c]]))));
                        let y: Vec<R> = (0..dim).map(column).collect();
                        let weight =
                            |k: ndarray::ArrayView1<'_, R>| R::dot(y.iter().copied().zip(k.iter().copied()));
                        let weights: Vec<R> = k.outer_iter().map(|k| weight(k).max(R::of(0.0))).collect();
                        let total =
                            move |c| R::total(weights.iter().copied().zip(k.column(c).iter().copied()));
                        (0..dim).map(total).collect::<Vec<_>>()
                    })
                    .collect(),
            )
            .expect("a row a feature");
            for (v, out) in out.iter_mut().enumerate() {
                let of_feature = |r| R::dot((0..dim).map(|c| (means[[r, c]], of(values[[r, c, v]]))));
                *out = R::sum(features.clone().map(of_feature)) / R::of(k.dim().0 as f64);
            }
        }
        out
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::number::Running;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::{Array4, s};

    #[test]
    fn kernels_keep_to_the_definition() {
        let mut worst = 0f64;
        for [q_len, kv_len, features, dim, value_dim] in [
            [0, 5, 1, 4, 3],
            [1, 1, 16, 12, 20],
            [23, 63, 17, 0, 1],
            [25, 65, 33, 12, 20],
            [50, 197, 3, 70, 17],
            [26, 70, 3, 15, 70],
            [3, 0, 2, 5, 4],
            [9, 9, 2, 5, 0],
        ] {
            let draws = array(5, features * (dim + 1) * (dim + 1));
            let mut draws = draws.iter();
            let stage = Bilinear::new(dim, features, |_, _| *draws.next().unwrap()).unwrap();
            let (q, k) = (array(1, (1, 2, q_len, dim)), array(2, (1, 1, kv_len, dim)));
            let values = array(3, (2, features, dim + 1, value_dim));
            let extended = |x: &Array4<f32>, h| {
                let x: ndarray::ArrayView2<'_, f32> = x.slice(s![0, h, .., ..]);
                Array2::from_shape_fn((x.dim().0, dim + 1), |at| {
                    Running::of(x.get(at).map_or(1.0, |&x| f64::from(x)))
                })
            };
            for isa in Isa::available() {
                let mut out = Array4::<f32>::from_elem((1, 2, q_len, value_dim), f32::NAN);
                let to = std::cell::RefCell::new(&mut out);
                alone(|pass| {
                    stage.run(
                        pass,
                        isa,
                        [q.view(), k.view()],
                        values.view(),
                        Some(to.borrow_mut().view_mut()),
                    );
                    Ok(())
                });
                for h in 0..2 {
                    let rows = [&extended(&q, h), &extended(&k, 0)];
                    let want = stage.define(rows, values.slice(s![h, .., .., ..]));
                    for (got, want) in out.slice(s![0, h, .., ..]).iter().zip(&want) {
                        let off = (f64::from(*got) - want.value()).abs();
                        assert!(off <= want.off(), "{isa} {features} of {dim}: {got}, not {want:?}");
                        worst = worst.max(off / want.off().max(1e-300));
                    }
                }
            }
        }
        println!("bilinear: {worst:.4} of the bound");
        assert!(worst > 0.002, "a bound that nothing comes near to");
    }

    #[test]
    fn matrices_have_their_mean_and_variance() {
        let (d, n) = (15, 400);
        for (mean, variance) in [(0.0, 0.25), (1.0, 0.25), (-2.0, 9.0)] {
            let stage = Bilinear::normal(d, n, 5, (mean, variance)).unwrap();
            let w = stage.matrices();
            assert_eq!(w.dim(), (n, d + 1, d + 1));
            let (mut sums, mut squares) = ([0.0; 2], 0.0);
            for ((_, a, b), &w) in w.indexed_iter() {
                let biased = a == b && a < d;
                let off = f64::from(w) - if biased { f64::from(mean) } else { 0.0 };
                sums[usize::from(biased)] += off;
                squares += off * off;
            }
            let spread = f64::from(variance).sqrt();
            for (sum, count) in sums.into_iter().zip([w.len() - n * d, n * d]) {
                assert!((sum / count as f64).abs() < 4.0 * spread / (count as f64).sqrt());
            }
            let relative = squares / w.len() as f64 / f64::from(variance) - 1.0;
            assert!(relative.abs() < 4.0 * (2.0 / w.len() as f64).sqrt(), "{relative}");
        }
    }
}
