//! One layer of a memory over a piece of tokens: what is read of it, and what is written.

use crate::engine::recur::product;
use crate::simd::Simd;
use crate::simd::mem::{Ahead, Rows};
use crate::simd::pack::PackColumns;
use crate::simd::tile::{NEGLIGIBLE, TILE_ROWS, Update, drop_rest};

/// Rows whose scores stop at the same column.
const BLOCK: usize = 2 * TILE_ROWS;

/// `C (+)= A B` for rows of `A` that are `stride` apart and have as many elements as `B`
/// has rows; as many columns as both have. Meanwhile what comes next is prefetched.
#[inline(always)]
pub(super) fn times<S: Simd>(
    s: S,
    (a, rows, stride): (&[f32], usize, usize),
    (b, n, ldb): (&[f32], usize, usize),
    (c, ldc): (&mut [f32], usize),
    update: Update<'_>,
    ahead: &mut Ahead,
) {
    if rows == 0 {
        return;
    }
    let a = Rows::of_slice(a, rows, n, stride);
    product(s, a, (b, ldb), ldb.min(ldc), (c, ldc), update, ahead);
}

/// Rows of a piece as columns, `columns` apart.
#[inline(always)]
pub(super) fn turned<S: Simd>(
    s: S,
    (rows, len, stride): (&[f32], usize, usize),
    n: usize,
    columns: usize,
    to: &mut [f32],
) {
    s.vectorize(PackColumns { from: Rows::of_slice(rows, len, n, stride), to, stride: columns });
}

/// What the tokens of a piece leave of what was there, and how much of what each writes
/// the later ones find.
pub(super) struct Shares<'a> {
    pub(super) len: usize,
    /// From a row of shares to the next.
    pub(super) columns: usize,
    /// Of weights, and of momentum as part of the weights.
    pub(super) left: &'a [f32],
    pub(super) moved: &'a [f32],
    /// `[piece, columns]`
    pub(super) shares: &'a [f32],
    /// Of the momentum at the end: what is left, and each token's share.
    pub(super) carried: f32,
    pub(super) pushed: &'a [f32],
}

/// A layer: `n` rows of weights, `apart` from each other; rows of its outputs are `stride`
/// apart.
pub(super) struct Layer<'a> {
    pub(super) n: usize,
    pub(super) apart: usize,
    pub(super) stride: usize,
    pub(super) weights: &'a mut [f32],
    pub(super) momentum: Option<&'a mut [f32]>,
}

/// Rows that are multiplied by a number each.
#[inline(always)]
fn scaled<S: Simd>(s: S, from: &[f32], factors: &[f32], stride: usize, to: &mut [f32]) {
    for (t, &factor) in factors.iter().enumerate() {
        let at = t * stride..(t + 1) * stride;
        for (to, x) in to[at.clone()].chunks_exact_mut(S::LANES).zip(from[at].chunks_exact(S::LANES)) {
            s.store(to, s.mul(s.load(x), s.splat(factor)));
        }
    }
}

/// What a layer works in.
pub(super) struct Room<'a> {
    /// Queries, times what is left, and scores.
    pub(super) scaled: &'a mut [f32],
    pub(super) scores: &'a mut [f32],
    /// Keys as columns, and what is written under them.
    pub(super) columns: &'a mut [f32],
    pub(super) written: &'a mut [f32],
    pub(super) factors: &'a mut [f32],
    /// What comes next.
    pub(super) ahead: &'a mut Ahead,
}

impl Layer<'_> {
    /// What queries read into `out`, of weights that are `held` if there are such, and
    /// then what tokens write: the descents `g` under the keys `k`.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a layer, and what it reads and writes")]
    pub(super) fn pass<S: Simd>(
        &mut self,
        s: S,
        of: &Shares<'_>,
        (q, width): (&[f32], usize),
        (k, stride): (&[f32], usize),
        g: &[f32],
        held: Option<&[f32]>,
        room: &mut Room<'_>,
        out: &mut [f32],
    ) {
        if self.n == 0 {
            // Nothing is read of what is not there, whatever the tokens find.
            return out[..of.len * self.stride].fill(0.0);
        }
        turned(s, (k, of.len, stride), self.n, of.columns, room.columns);
        let Room { scaled, scores, columns, written, factors, ahead } = room;
        match held {
            Some(held) => times(
                s,
                (q, of.len, width),
                (held, self.n, self.apart),
                (out, self.stride),
                Update::Set,
                ahead,
            ),
            None => self.read(s, of, (q, width), (columns, g), (scaled, scores), out, ahead),
        }
        self.write(s, of, (columns, g), (written, factors), ahead);
    }

    /// What rows read of the weights after each token: `x` rows `[len, n]`, the gradients
    /// `g` rows of outputs, `z` the columns of what they were found at.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "rows, columns, and what they are worked out in")]
    fn read<S: Simd>(
        &self,
        s: S,
        of: &Shares<'_>,
        (x, width): (&[f32], usize),
        (z, g): (&[f32], &[f32]),
        (room, scores): (&mut [f32], &mut [f32]),
        out: &mut [f32],
        ahead: &mut Ahead,
    ) {
        let (len, cols, stride) = (of.len, of.columns, self.stride);
        scaled(s, x, &of.left[..len], width, room);
        times(s, (room, len, width), (self.weights, self.n, self.apart), (out, stride), Update::Set, ahead);
        if let Some(momentum) = &self.momentum {
            scaled(s, x, &of.moved[..len], width, room);
            times(s, (room, len, width), (momentum, self.n, self.apart), (out, stride), Update::Add, ahead);
        }
        for first in (0..len).step_by(BLOCK) {
            let end = (first + BLOCK).min(len);
            let seen = end.next_multiple_of(S::LANES);
            let a = Rows::of_slice(&x[first * width..], end - first, self.n, width);
            let to = &mut scores[first * cols..];
            product(s, a, (z, cols), seen, (to, cols), Update::Set, ahead);
            for i in first..end {
                let row = &mut scores[i * cols..][..seen];
                let shares = of.shares[i * cols..].chunks_exact(S::LANES);
                for (x, shares) in row.chunks_exact_mut(S::LANES).zip(shares) {
                    s.store(x, s.mul(s.load(x), s.load(shares)));
                }
                // Products with later keys may have no end.
                row[i + 1..].fill(0.0);
            }
            let scores = (&scores[first * cols..], end - first, cols);
            times(s, scores, (g, end, stride), (&mut out[first * stride..], stride), Update::Add, ahead);
        }
    }

    /// Writes what a piece has found.
    #[inline(always)]
    fn write<S: Simd>(
        &mut self,
        s: S,
        of: &Shares<'_>,
        (z, g): (&[f32], &[f32]),
        (room, factors): (&mut [f32], &mut [f32]),
        ahead: &mut Ahead,
    ) {
        let (len, stride, apart) = (of.len, self.stride, self.apart);
        let Some(last) = len.checked_sub(1) else { return };
        let update = match &self.momentum {
            None => {
                factors[..self.n].fill(of.left[last]);
                Update::Correct(factors)
            }
            Some(momentum) => {
                let (left, moved) = (s.splat(of.left[last]), s.splat(of.moved[last]));
                let rows = self.weights.chunks_exact_mut(S::LANES).zip(momentum.chunks_exact(S::LANES));
                for (x, momentum) in rows.take(self.n * apart / S::LANES) {
                    let before = s.load(x);
                    let now = s.mul_add(s.load(momentum), moved, s.mul(before, left));
                    s.store(x, drop_rest(s, now, before, s.splat(NEGLIGIBLE)));
                }
                Update::Add
            }
        };
        scaled(s, g, &of.shares[last * of.columns..][..len], stride, room);
        times(s, (z, self.n, of.columns), (room, len, stride), (self.weights, apart), update, ahead);
        if let Some(momentum) = &mut self.momentum {
            scaled(s, g, &of.pushed[..len], stride, room);
            factors[..self.n].fill(of.carried);
            let update = Update::Correct(factors);
            times(s, (z, self.n, of.columns), (room, len, stride), (momentum, apart), update, ahead);
        }
    }
}
