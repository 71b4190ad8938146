//! Solutions of the systems of a memory of keys, one for each query, by conjugate
//! gradients.
//!
//! ```text
//! H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T
//! x_t = (H_t + diag(ridge))^-1 q_t
//! ```
//!
//! A token's steps read its matrix from the cache, `2 dim^2` flops each: in chunks,
//! where tokens have no matrix of their own, a step would be scores and products of
//! rows besides, for all tokens of a chunk until its last one ends.

use ndarray::{Array2, ArrayView3};

use crate::engine::parallel;
use crate::engine::recur::{Place, copy_rows, copy_tokens, decay_of};
use crate::input::{Dims, Lengths};
use crate::math::algebra::solve;
use crate::simd::any::AnyArray;
use crate::simd::mem::{Arena, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd, tile};
use crate::stages::delta_rule::normalize;
use crate::stages::pass::{Pass, Scratch};

/// Tokens that are loaded at once.
const CHUNK: usize = 32;

/// Steps end at residuals of this share of the query's norm.
const ENOUGH: f64 = 1e-7;

/// Queries, and the keys that their systems are of.
#[derive(Clone, Copy)]
pub(crate) struct Systems<'a> {
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: AnyArray<'a>,
    /// Log decays and weights of keys, `[batch, heads, len]`.
    pub(crate) decay: ArrayView3<'a, f32>,
    pub(crate) beta: ArrayView3<'a, f32>,
    /// What is added to diagonals, `[heads, head_dim]`.
    pub(crate) ridge: &'a [f32],
    /// Whether queries and keys are divided by their norms.
    pub(crate) normalize: bool,
    /// The most steps of a solution.
    pub(crate) steps: usize,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
}

/// What one thread works in: rows of a chunk, the matrix, and rows of a solution.
struct Room<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    decay: &'a mut [f32],
    beta: &'a mut [f32],
    state: &'a mut [f32],
    ridge: &'a mut [f32],
    /// What is left of the query, the direction of a step, and the matrix times it.
    rest: &'a mut [f32],
    way: &'a mut [f32],
    image: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn sizes(dim: usize) -> [usize; 9] {
        let stride = dim.next_multiple_of(MAX_LANES);
        [CHUNK * stride, CHUNK * stride, CHUNK, CHUNK, dim * stride, stride, stride, stride, stride]
    }

    fn take(mut arena: Arena<'a>, dim: usize) -> Self {
        let [q, k, decay, beta, state, ridge, rest, way, image] = Self::sizes(dim).map(|n| {
            let x = arena.take::<f32>(n);
            // What fills rows up stays 0.
            x.fill(0.0);
            x
        });
        Self { q, k, decay, beta, state, ridge, rest, way, image }
    }
}

/// Solutions, and keys times their weights, as rows `[batch, heads, len,
/// head_dim]`, from and to `kept` (`[sequences, heads, head_dim, head_dim]`) or from
/// zero. The tokens of a head are one thread's work.
pub(crate) fn solutions(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: &Systems<'_>,
    kept: Option<&mut [f32]>,
    [to, keys]: [&mut Scratch<'_>; 2],
) {
    let Dims { batch, q_heads: heads, q_len: len, head_dim: dim, packed, .. } = x.dims;
    let (rows, units, stride) = (if packed { 1 } else { batch } * heads, batch * heads, to.stride());
    let workers = parallel::threads();
    let room = Room::sizes(dim).iter().map(|&n| bytes_for::<f32>(n)).sum();
    let words = [rows, rows, units].map(claim_words);
    let bytes = words.iter().map(|&n| bytes_for::<u64>(n)).sum::<usize>() + bytes_for_shares(workers, room);
    let flops =
        || (rows * len).saturating_mul(x.steps.saturating_add(2).saturating_mul(2 * dim * dim)) as u64;
    pass.stage(flops, bytes, |mut arena| {
        if dim == 0 {
            return;
        }
        let [a, b, c] = words.map(|n| arena.take::<u64>(n));
        let to = Parts::new(to.numbers_mut(), len * stride, a);
        let keys = Parts::new(keys.numbers_mut(), len * stride, b);
        let kept = kept.map(|kept| Parts::new(kept, dim * dim, c));
        let shares = arena.shares(workers, room);
        let start = |worker| Room::take(shares.take(worker), dim);
        parallel::for_each(workers, rows, start, |room, row| {
            let (to, keys, head) = (to.take(row), keys.take(row), row % heads);
            room.ridge[..dim].copy_from_slice(&x.ridge[head * dim..][..dim]);
            let own = if packed { 0..batch } else { row / heads..row / heads + 1 };
            for sequence in own.map(|i| x.lengths.sequence(&x.dims, i)) {
                let kept = kept.as_ref().map(|kept| kept.take(sequence.index * heads + head));
                room.state.fill(0.0);
                for (state, kept) in room
                    .state
                    .chunks_exact_mut(stride)
                    .zip(kept.iter().flat_map(|kept| kept.chunks_exact(dim)))
                {
                    state[..dim].copy_from_slice(kept);
                }
                for first in sequence.queries.clone().step_by(CHUNK) {
                    let tokens = first..(first + CHUNK).min(sequence.queries.end);
                    let range = first * stride..tokens.end * stride;
                    let at = Place::new(&sequence, head, tokens);
                    for (from, to) in [(x.q, &mut *room.q), (x.k, &mut *room.k)] {
                        let rows = from.rows(at.batch, at.head_of(from.heads(), heads), &at.tokens);
                        copy_rows(isa, rows, to, stride);
                        if x.normalize {
                            normalize(isa, to, at.tokens.len(), dim, stride);
                        }
                    }
                    copy_tokens(&x.decay, heads, &at, room.decay);
                    copy_tokens(&x.beta, heads, &at, room.beta);
                    let (to, keys) = (&mut to[range.clone()], &mut keys[range]);
                    isa.dispatch(Solve { room, to, keys, dim, stride, steps: x.steps });
                }
                for (state, kept) in room
                    .state
                    .chunks_exact(stride)
                    .zip(kept.into_iter().flat_map(|kept| kept.chunks_exact_mut(dim)))
                {
                    kept.copy_from_slice(&state[..dim]);
                }
            }
        });
    });
}

/// Some tokens, loaded, one after the other.
struct Solve<'a, 'b> {
    room: &'a mut Room<'b>,
    /// `[tokens, stride]`
    to: &'a mut [f32],
    keys: &'a mut [f32],
    dim: usize,
    stride: usize,
    steps: usize,
}

impl Kernel for Solve<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for t in 0..self.to.len() / self.stride {
            self.add(s, t);
            self.solve(s, t);
        }
    }
}

impl Solve<'_, '_> {
    /// Adds a token to the matrix.
    #[inline(always)]
    fn add<S: Simd>(&mut self, s: S, t: usize) {
        let Room { k, decay, beta, state, .. } = &mut *self.room;
        let row = t * self.stride..(t + 1) * self.stride;
        let (k, keys) = (&k[row.clone()], &mut self.keys[row]);
        let (left, beta) = (decay_of(s, s.splat(decay[t])), s.splat(beta[t]));
        for (to, k) in keys.chunks_exact_mut(S::LANES).zip(k.chunks_exact(S::LANES)) {
            s.store(to, s.mul(beta, s.load(k)));
        }
        for (line, &k) in state.chunks_exact_mut(self.stride).zip(k) {
            let k = s.splat(k);
            for (line, key) in line.chunks_exact_mut(S::LANES).zip(keys.chunks_exact(S::LANES)) {
                s.store(line, s.mul_add(k, s.load(key), tile::decay(s, s.load(line), left)));
            }
        }
    }

    /// The solution of a token's query.
    #[inline(always)]
    fn solve<S: Simd>(&mut self, s: S, t: usize) {
        let row = t * self.stride..(t + 1) * self.stride;
        let mut most = s.splat(0.0);
        for q in self.room.q[row.clone()].chunks_exact(S::LANES) {
            most = s.max(s.abs(s.load(q)), most);
        }
        // A query of numbers of about 1, whose square nothing is too large or small for.
        let size = s.reduce_max(most).max(1e-30);
        let (shrink, mut sum) = (s.splat(1.0 / size), s.splat(0.0));
        for col in (0..self.stride).step_by(S::LANES) {
            let Room { q, rest, way, .. } = &mut *self.room;
            let x = s.mul(s.load(&q[row.start + col..]), shrink);
            s.store(&mut rest[col..], x);
            s.store(&mut way[col..], x);
            s.store(&mut self.to[row.start + col..], s.splat(0.0));
            sum = s.mul_add(x, x, sum);
        }
        let mut left = s.reduce_add(sum);
        let enough = (ENOUGH * ENOUGH) as f32 * left;
        for _ in 0..self.steps {
            let along = self.image(s);
            let share = s.splat(if left == 0.0 { 0.0 } else { left / along });
            let mut sum = s.splat(0.0);
            let Room { rest, way, image, .. } = &mut *self.room;
            for (col, to) in self.to[row.clone()].chunks_exact_mut(S::LANES).enumerate() {
                let col = col * S::LANES;
                s.store(to, s.mul_add(share, s.load(&way[col..]), s.load(to)));
                let part = s.mul(share, s.load(&image[col..]));
                let x = s.sub(s.load(&rest[col..]), part);
                s.store(&mut rest[col..], x);
                sum = s.mul_add(x, x, sum);
            }
            let next = s.reduce_add(sum);
            // A NaN goes on.
            if next <= enough {
                break;
            }
            let turn = s.splat(next / left);
            left = next;
            for (way, rest) in way.chunks_exact_mut(S::LANES).zip(rest.chunks_exact(S::LANES)) {
                s.store(way, s.mul_add(turn, s.load(way), s.load(rest)));
            }
        }
        // What is left is no number where the matrix has one that is not finite.
        let rest = &self.room.rest[..];
        for (to, rest) in self.to[row].chunks_exact_mut(S::LANES).zip(rest.chunks_exact(S::LANES)) {
            s.store(to, s.mul(s.mul_add(s.splat(0.0), s.load(rest), s.load(to)), s.splat(size)));
        }
    }

    /// The matrix times the direction of a step, and how far that goes along it.
    #[inline(always)]
    fn image<S: Simd>(&mut self, s: S) -> f32 {
        let (mut col, mut along) = (0, s.splat(0.0));
        while col < self.stride {
            let (width, sum) = match (self.stride - col) / S::LANES {
                0..4 => (1, self.columns::<S, 1>(s, col)),
                _ => (4, self.columns::<S, 4>(s, col)),
            };
            along = s.add(along, sum);
            col += width * S::LANES;
        }
        s.reduce_add(along)
    }

    /// `NV` vectors of it. Rows are summed by turns, so that none waits for the one
    /// before.
    #[inline(always)]
    fn columns<S: Simd, const NV: usize>(&mut self, s: S, col: usize) -> S::F {
        let Room { state, ridge, way, image, .. } = &mut *self.room;
        let mut sums = [[s.splat(0.0); NV]; 2];
        let pairs = state.chunks_exact(2 * self.stride);
        let last = pairs.remainder();
        for (lines, x) in pairs.zip(way.chunks_exact(2)) {
            for (turn, line) in lines.chunks_exact(self.stride).enumerate() {
                let x = s.splat(x[turn]);
                for v in 0..NV {
                    sums[turn][v] = s.mul_add(x, s.load(&line[col + v * S::LANES..]), sums[turn][v]);
                }
            }
        }
        if !last.is_empty() {
            let x = s.splat(way[self.dim - 1]);
            for v in 0..NV {
                sums[0][v] = s.mul_add(x, s.load(&last[col + v * S::LANES..]), sums[0][v]);
            }
        }
        let mut along = s.splat(0.0);
        for v in 0..NV {
            let col = col + v * S::LANES;
            let x = s.load(&way[col..]);
            let y = s.mul_add(s.load(&ridge[col..]), x, s.add(sums[0][v], sums[1][v]));
            s.store(&mut image[col..], y);
            along = s.mul_add(x, y, along);
        }
        along
    }
}

/// The definition of one system: its solution, or NaN where a number of it is not
/// finite, and how far the kernel may be off it, by the norm. `sum` is what the
/// diagonal of `H` would be if no rounding cancelled, all of it together, of so many
/// `tokens`.
///
/// The residual of steps in `f32` ends where their matrix is rounded (A. Greenbaum,
/// "Estimating the attainable accuracy of recursively computed residual methods", SIAM
/// J. Matrix Anal. Appl. 18, 1997), and no eigenvalue is below the least ridge. What
/// steps leave is that of as many exact steps, a quarter of which rounding may cost.
pub(crate) fn define(
    h: &Array2<f64>,
    ridge: &[f64],
    q: &[f64],
    [sum, tokens, steps]: [f64; 3],
) -> (Vec<f64>, f64) {
    let dim = q.len();
    if !h.iter().chain(q).all(|x| x.is_finite()) {
        return (vec![f64::NAN; dim], f64::INFINITY);
    }
    let mut a = h.clone();
    a.diag_mut().iter_mut().zip(ridge).for_each(|(a, ridge)| *a += ridge);
    let x = solve(a.clone(), q);
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let least = ridge.iter().copied().fold(f64::INFINITY, f64::min);
    let most = sum + ridge.iter().copied().fold(0.0, f64::max);
    let unit = 2f64.powi(-24) * (8.0 * tokens + dim as f64 + steps + 64.0);
    let dropped = f64::from(tile::NEGLIGIBLE) * (tokens * dim as f64);
    let rounded = ((unit * most + dropped) * norm(&x) + ENOUGH * norm(q)) / least;
    let left = 2.0 * after(&a, q, &x, (0.75 * steps).floor());
    // Squares on the way that f32 does not have.
    let known = most * (most / least) * dim as f64 * 64.0 < f64::from(f32::MAX);
    let off = if known { rounded + left } else { f64::INFINITY };
    (x, off)
}

/// How far exact steps end from the solution.
fn after(a: &Array2<f64>, q: &[f64], x: &[f64], steps: f64) -> f64 {
    let q = ndarray::ArrayView1::from(q);
    let (mut at, mut rest, mut way) = (ndarray::Array1::<f64>::zeros(q.len()), q.to_owned(), q.to_owned());
    let mut left = rest.dot(&rest);
    for _ in 0..steps as usize {
        if left <= 1e-24 * q.dot(&q) {
            break;
        }
        let image = a.dot(&way);
        let share = left / way.dot(&image);
        at.scaled_add(share, &way);
        rest.scaled_add(-share, &image);
        let next = rest.dot(&rest);
        way = &rest + &(way * (next / left));
        left = next;
    }
    at.iter().zip(x).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}
