//! What is scored, where that is not the candidates themselves: whole ones
//! alone, or pools of keys that are finer than candidates and may overlap.

use super::Scheme;
use crate::simd::exp::{exp, exp2_flush};
use crate::simd::{Kernel, Simd};

/// What is scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scored {
    /// Candidates, each from when a query sees its first key.
    #[default]
    Begun,
    /// Candidates that a query sees whole. The one of which it sees a part
    /// comes on top of what is picked.
    Whole,
    /// Pools of keys, those that a query sees whole. A candidate, from when a
    /// query sees its first key, has the scores of the pools with which it
    /// shares keys; 0 if there is none.
    Pools(Pools),
}

/// Pools `w` of the keys `w * stride..w * stride + width`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pools {
    /// Keys of a pool: a multiple of `stride`.
    pub width: usize,
    /// Keys from one to the next; the unit of a candidate is a multiple.
    pub stride: usize,
    /// How the scores of pools become that of a candidate.
    pub fold: Fold,
    /// Width and stride, multiples of `stride`, of the coarser pools of means
    /// over which shares are normalised instead: what they sum to is then an
    /// estimate. A query that sees no such pool whole has shares of 0.
    pub coarse: Option<[usize; 2]>,
    /// A query that sees fewer keys than these reads all candidates.
    pub dense: usize,
}

/// How the scores of pools become that of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fold {
    /// The largest; NaN if one is NaN.
    Max,
    /// Their sum, each as often as it shares a stride of keys with the
    /// candidate.
    Sum,
}

/// Windows of `width` every `stride` that end within `seen`.
pub(crate) fn complete(seen: usize, width: usize, stride: usize) -> usize {
    seen.checked_sub(width).map_or(0, |last| last / stride + 1)
}

impl Scheme {
    /// Keys that query `row` of a sequence sees: the first so many.
    pub(crate) fn seen(&self, row: usize, queries: usize, keys: usize) -> usize {
        // Its position is `row + keys - queries`.
        if self.causal { (row + keys + 1).saturating_sub(queries).min(keys) } else { keys }
    }

    /// Candidates between which the pick of a query that sees so many keys
    /// decides: the first so many.
    pub(crate) fn ranked(&self, seen: usize) -> usize {
        match self.scored {
            Scored::Whole => seen / self.unit,
            Scored::Begun | Scored::Pools(_) => seen.div_ceil(self.unit),
        }
    }

    /// Keys from one scored row to the next.
    pub(crate) fn cell(&self) -> usize {
        match self.scored {
            Scored::Pools(pools) => pools.stride,
            _ => self.unit,
        }
    }

    /// Whether a query that sees so many keys reads all of them.
    pub(super) fn is_dense(&self, seen: usize) -> bool {
        matches!(self.scored, Scored::Pools(pools) if seen < pools.dense)
    }

    /// Scores of a query that sees so many keys.
    pub(crate) fn scores(&self, seen: usize) -> usize {
        match self.scored {
            Scored::Pools(Pools { width, stride, .. }) => complete(seen, width, stride),
            _ => self.ranked(seen),
        }
    }

    /// Rows that they are products with: of pools that are not `given` their
    /// strides.
    pub(crate) fn rows(&self, seen: usize, given: bool) -> usize {
        match (self.scores(seen), self.scored) {
            (0, _) => 0,
            (n, Scored::Pools(pools)) if !given => n + pools.width / pools.stride - 1,
            (n, _) => n,
        }
    }
}

impl Pools {
    /// The scores of `n` pools, or their shares with `scale`, in place of those
    /// of their strides (of the pools, where these are `given`). `room` has a
    /// place for each.
    pub(super) fn of_cells(
        &self,
        isa: crate::simd::Isa,
        (cells, n): (&mut [f32], usize),
        given: bool,
        shares: Option<f32>,
        room: &mut [f32],
    ) {
        let each = if given { 1 } else { self.width / self.stride };
        let lse = self.coarse.zip(shares).map(|([width, stride], scale)| {
            let coarse = complete((n + each - 1) * self.stride, width, stride);
            let (width, stride) = (width / self.stride, stride / self.stride);
            for (u, mean) in room[..coarse].iter_mut().enumerate() {
                *mean = cells[u * stride..][..width].iter().sum::<f32>() / width as f32;
            }
            (coarse > 0).then(|| (scale, isa.dispatch(LogSum { row: &room[..coarse], scale })))
        });
        if each > 1 {
            let share = 1.0 / each as f32;
            for w in 0..n {
                cells[w] = cells[w..][..each].iter().sum::<f32>() * share;
            }
        }
        match lse {
            Some(Some((scale, lse))) => isa.dispatch(Against { row: &mut cells[..n], scale, lse }),
            // There is nothing to compare with.
            Some(None) => cells[..n].fill(0.0),
            None => {}
        }
    }

    /// The scores of candidates of `unit` keys from those of pools.
    pub(super) fn fold(&self, unit: usize, pools: &[f32], candidates: &mut [f32]) {
        let (each, reach) = (unit / self.stride, self.width / self.stride);
        for (b, to) in candidates.iter_mut().enumerate() {
            let (start, end) = (b * each, (b + 1) * each);
            let first = (start + 1).saturating_sub(reach).min(pools.len());
            let own = &pools[first..end.min(pools.len()).max(first)];
            *to = match self.fold {
                Fold::Max => {
                    let most = |a: f32, &b: &f32| if b > a || b.is_nan() { b } else { a };
                    own.split_first().map_or(0.0, |(&head, rest)| rest.iter().fold(head, most))
                }
                Fold::Sum => own.iter().zip(first..).fold(0.0, |sum, (x, w)| {
                    let shared = (w + reach).min(end) - w.max(start);
                    sum + x * shared as f32
                }),
            };
        }
    }
}

/// `ln sum_j exp(scale x_j)`; NaN where one is, and where all are -inf.
struct LogSum<'a> {
    row: &'a [f32],
    scale: f32,
}

impl Kernel for LogSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Self { row, scale } = self;
        let most = row.iter().fold(f32::NEG_INFINITY, |most, x| most.max(scale * x));
        if most == f32::NEG_INFINITY {
            return f32::NAN;
        }
        let (base, log2_e) = (s.splat(most), s.splat(std::f32::consts::LOG2_E));
        let mut sum = s.splat(0.0);
        for part in row.chunks(S::LANES) {
            let valid = s.mask(u64::MAX >> (64 - part.len()));
            let x = s.sub(s.mul(s.load_tail(part), s.splat(scale)), base);
            sum = s.add(sum, s.select(valid, exp2_flush(s, s.mul(x, log2_e)), s.splat(0.0)));
        }
        most + s.reduce_add(sum).ln()
    }
}

/// `exp(scale x_i - lse)`, in place.
struct Against<'a> {
    row: &'a mut [f32],
    scale: f32,
    lse: f32,
}

impl Kernel for Against<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, scale, lse } = self;
        for part in row.chunks_mut(S::LANES) {
            let x = s.sub(s.mul(s.load_tail(part), s.splat(scale)), s.splat(lse));
            s.store_tail(part, exp(s, x));
        }
    }
}
