//! What queries read of slots whose keys are sums over the tokens so far, each
//! slot with decays and weights of its own: the columns of the state decay, not
//! its rows.
//!
//! ```text
//! K_t[d, m] = exp(g_t[m]) K_{t-1}[d, m] + k_t[d] w_t[m]
//! y_t[m]    = scale * sum_d q_t[d] K_t[d, m]
//! ```

use ndarray::Array2;

use crate::definition::number::Real;
use crate::engine::parallel;
use crate::engine::recur::{Place, copy_rows, decay_of};
use crate::input::{Dims, Lengths};
use crate::simd::any::AnyArray;
use crate::simd::exp::exp;
use crate::simd::mem::{Arena, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd, tile};
use crate::stages::pass::{Pass, Scratch};

/// Tokens that are loaded at once.
const CHUNK: usize = 32;

/// Queries and keys, weights and log decays of slots.
#[derive(Clone, Copy)]
pub(crate) struct Slots<'a> {
    pub(crate) q: AnyArray<'a>,
    pub(crate) k: AnyArray<'a>,
    pub(crate) write: AnyArray<'a>,
    pub(crate) log_decay: AnyArray<'a>,
    pub(crate) dims: Dims,
    pub(crate) lengths: Lengths<'a>,
    pub(crate) scale: f32,
}

/// What one thread works in: rows of a chunk, and the keys of the slots.
struct Room<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    write: &'a mut [f32],
    decay: &'a mut [f32],
    state: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn sizes([dim, slots]: [usize; 2]) -> [usize; 5] {
        let strides = [dim, slots].map(|n| n.next_multiple_of(MAX_LANES));
        let [rows, slots] = strides.map(|stride| CHUNK * stride);
        [rows, rows, slots, slots, dim * strides[1]]
    }

    fn take(mut arena: Arena<'a>, sizes: [usize; 2]) -> Self {
        let [q, k, write, decay, state] = Self::sizes(sizes).map(|n| {
            let x = arena.take::<f32>(n);
            // What fills rows up stays 0.
            x.fill(0.0);
            x
        });
        Self { q, k, write, decay, state }
    }
}

/// What queries read, into rows of slots, from and to `kept` (`[sequences,
/// heads, head_dim, slots]`) or from zero. A head is read by one thread.
pub(crate) fn read(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: &Slots<'_>,
    kept: Option<&mut [f32]>,
    to: &mut Scratch<'_>,
) {
    let (Dims { batch, q_heads: heads, q_len: len, head_dim: dim, packed, .. }, stride) =
        (x.dims, to.stride());
    let slots = to.dim().3;
    let (rows, units) = (if packed { 1 } else { batch } * heads, batch * heads);
    let workers = parallel::threads();
    let room = Room::sizes([dim, slots]).iter().map(|&n| bytes_for::<f32>(n)).sum();
    let words = [rows, units].map(claim_words);
    let bytes = words.iter().map(|&n| bytes_for::<u64>(n)).sum::<usize>() + bytes_for_shares(workers, room);
    let flops = || (rows * len).saturating_mul(4 * dim * slots) as u64;
    pass.stage(flops, bytes, |mut arena| {
        if slots == 0 {
            return;
        }
        let [a, b] = words.map(|n| arena.take::<u64>(n));
        let to = Parts::new(to.numbers_mut(), len * stride, a);
        let kept = kept.map(|kept| Parts::new(kept, dim * slots, b));
        let shares = arena.shares(workers, room);
        let start = |worker| Room::take(shares.take(worker), [dim, slots]);
        parallel::for_each(workers, rows, start, |room, row| {
            let to = to.take(row);
            let own = if packed { 0..batch } else { row / heads..row / heads + 1 };
            for sequence in own.map(|i| x.lengths.sequence(&x.dims, i)) {
                let head = row % heads;
                let kept = match &kept {
                    Some(kept) if dim > 0 => kept.take(sequence.index * heads + head),
                    _ => &mut [],
                };
                room.state.fill(0.0);
                for (state, kept) in room.state.chunks_exact_mut(stride).zip(kept.chunks_exact(slots)) {
                    state[..slots].copy_from_slice(kept);
                }
                for first in sequence.queries.clone().step_by(CHUNK) {
                    let tokens = first..(first + CHUNK).min(sequence.queries.end);
                    let to = &mut to[first * stride..tokens.end * stride];
                    let at = Place::new(&sequence, head, tokens);
                    let rows = |of: AnyArray<'_>, to: &mut [f32], stride| {
                        let rows = of.rows(at.batch, at.head_of(of.heads(), heads), &at.tokens);
                        copy_rows(isa, rows, to, stride);
                    };
                    let row_stride = dim.next_multiple_of(MAX_LANES);
                    rows(x.q, room.q, row_stride);
                    rows(x.k, room.k, row_stride);
                    rows(x.write, room.write, stride);
                    rows(x.log_decay, room.decay, stride);
                    isa.dispatch(Scan { room, to, dim, row_stride, stride, scale: x.scale });
                }
                for (state, kept) in room.state.chunks_exact(stride).zip(kept.chunks_exact_mut(slots)) {
                    kept.copy_from_slice(&state[..slots]);
                }
            }
        });
    });
}

/// Some tokens, loaded, one after the other.
struct Scan<'a, 'b> {
    room: &'a mut Room<'b>,
    /// `[tokens, stride]`
    to: &'a mut [f32],
    dim: usize,
    row_stride: usize,
    stride: usize,
    scale: f32,
}

impl Kernel for Scan<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for t in 0..self.to.len() / self.stride {
            // Rows are whole vectors.
            let mut col = 0;
            while col < self.stride {
                col += match (self.stride - col) / S::LANES {
                    0..4 => self.columns::<S, 1>(s, t, col),
                    _ => self.columns::<S, 4>(s, t, col),
                };
            }
        }
    }
}

impl Scan<'_, '_> {
    /// `NV` vectors of slots from `col` on, of one token; returns how many
    /// slots these are.
    #[inline(always)]
    fn columns<S: Simd, const NV: usize>(&mut self, s: S, t: usize, col: usize) -> usize {
        let Room { q, k, write, decay, state } = &mut *self.room;
        let at = t * self.stride + col;
        let (mut left, mut written) = ([s.splat(0.0); NV], [s.splat(0.0); NV]);
        let mut sums = [s.splat(0.0); NV];
        for v in 0..NV {
            left[v] = decay_of(s, s.load(&decay[at + v * S::LANES..]));
            written[v] = s.load(&write[at + v * S::LANES..]);
        }
        let row = t * self.row_stride..t * self.row_stride + self.dim;
        let (q, k) = (&q[row.clone()], &k[row]);
        for (d, line) in state.chunks_exact_mut(self.stride).enumerate() {
            let (q, k) = (s.splat(q[d]), s.splat(k[d]));
            for v in 0..NV {
                let line = &mut line[col + v * S::LANES..];
                let sum = s.mul_add(k, written[v], tile::decay(s, s.load(line), left[v]));
                s.store(line, sum);
                sums[v] = s.mul_add(q, sum, sums[v]);
            }
        }
        for v in 0..NV {
            s.store(&mut self.to[at + v * S::LANES..], s.mul(sums[v], s.splat(self.scale)));
        }
        NV * S::LANES
    }
}

/// Weights of slots in the place of what was read of each.
pub(crate) fn weigh(isa: Isa, rows: &mut [f32], len: usize, slots: usize, stride: usize) {
    if slots > 0 {
        isa.dispatch(Weigh { rows, len, slots, stride });
    }
}

struct Weigh<'a> {
    rows: &'a mut [f32],
    len: usize,
    slots: usize,
    stride: usize,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows.chunks_exact_mut(self.stride).take(self.len) {
            let row = &mut row[..self.slots];
            let (whole, tail) = row.split_at(row.len() / S::LANES * S::LANES);
            let mut most = s.splat(f32::NEG_INFINITY);
            for x in whole.chunks_exact(S::LANES) {
                most = s.max(s.load(x), most);
            }
            let most = tail.iter().fold(s.reduce_max(most), |most, &x| most.max(x));
            let mut sum = s.splat(0.0);
            for x in row.chunks_mut(S::LANES) {
                let weight = exp(s, s.sub(s.load_tail(x), s.splat(most)));
                s.store_tail(x, weight);
                // Lanes past the row are 0 again.
                sum = s.add(sum, s.load_tail(x));
            }
            let share = s.splat(1.0 / s.reduce_add(sum));
            for x in row.chunks_mut(S::LANES) {
                s.store_tail(x, s.mul(s.load_tail(x), share));
            }
        }
    }
}

/// What a log decay leaves, by definition.
pub(crate) fn left<R: Real>(log_decay: R) -> R {
    // Of nothing there is no error.
    if log_decay.value() == f64::NEG_INFINITY { R::of(0.0) } else { log_decay.exp() }
}

/// The definition of one head: `K` of a token, then whatever `each` makes of
/// it, token by token.
pub(crate) fn define<R: Real>(
    keys: &mut Array2<R>,
    [k, write, log_decay]: [&Array2<R>; 3],
    mut each: impl FnMut(usize, &Array2<R>),
) {
    for t in 0..k.dim().0 {
        for ((d, m), x) in keys.indexed_iter_mut() {
            *x = (*x * left(log_decay[[t, m]])).term(k[[t, d]], write[[t, m]]).summed(1);
        }
        each(t, keys);
    }
}
