//! Means of windows of rows: keys and values that stand for several.

use ndarray::{ArrayView4, ArrayViewMut4};

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyArray, AnyOut, IntoAny};
use crate::simd::mem::{Arena, Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

/// Windows of `width` rows, every `stride`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Means {
    pub(crate) isa: Isa,
    pub(crate) width: usize,
    pub(crate) stride: usize,
}

/// Means of a task.
const TASK: usize = 16;

impl Means {
    /// Windows that `len` rows hold whole.
    pub(crate) fn count(&self, len: usize) -> usize {
        len.checked_sub(self.width).map_or(0, |last| last / self.stride + 1)
    }

    fn share_bytes(&self, dim: usize) -> usize {
        let row = dim.next_multiple_of(MAX_LANES);
        bytes_for::<f32>(row) + bytes_for::<f32>(self.width.saturating_mul(row))
    }

    /// Bytes of scratch for `[batch, heads, len, dim]`.
    pub(crate) fn bytes(&self, (batch, heads, len, dim): (usize, usize, usize, usize)) -> usize {
        bytes_for::<u64>(claim_words(batch * heads * self.count(len)))
            + bytes_for_shares(parallel::threads(), self.share_bytes(dim))
    }

    /// `out[b, h, w, ..]` = mean of `x[b, h, stride w..stride w + width, ..]`.
    pub(crate) fn run<T: Element>(
        &self,
        x: ArrayView4<'_, T>,
        out: ArrayViewMut4<'_, f32>,
        mut arena: Arena<'_>,
    ) {
        let (batch, heads, n, dim) = out.dim();
        let out = f32::any_out(OutRows::new(out, arena.take(claim_words(batch * heads * n))));
        let x = T::any(Heads::new(x));
        let row = dim.next_multiple_of(MAX_LANES);
        let shares = arena.shares(parallel::threads(), self.share_bytes(dim));
        let start = |worker: usize| {
            let mut arena = shares.take(worker);
            (arena.take::<f32>(row), arena.take::<f32>(self.width * row))
        };
        let tiles = n.div_ceil(TASK);
        parallel::for_each(parallel::threads(), batch * heads * tiles, start, |(sum, room), task| {
            let at = (task / tiles / heads, task / tiles % heads);
            let pools = task % tiles * TASK..((task % tiles + 1) * TASK).min(n);
            self.isa.dispatch(Mean { of: *self, x: &x, out: &out, sum, room, row, at, pools });
        });
    }
}

struct Mean<'a, 'b> {
    of: Means,
    x: &'a AnyArray<'b>,
    out: &'a AnyOut<'b>,
    sum: &'a mut [f32],
    room: &'a mut [f32],
    row: usize,
    at: (usize, usize),
    pools: std::ops::Range<usize>,
}

impl Kernel for Mean<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of: Means { width, stride, .. }, x, out, sum, room, row, at: (b, h), pools } = self;
        let mut to = out.take(b, h, pools.clone());
        // What fills rows up is never written to.
        room.fill(0.0);
        for (i, pool) in pools.enumerate() {
            x.rows(b, h, &(pool * stride..pool * stride + width)).pack_rows(s, room, row);
            sum.fill(0.0);
            for x in room.chunks_exact(row.max(1)) {
                for (sum, x) in sum.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
                    let x = s.add(s.load(sum), s.load(x));
                    s.store(sum, x);
                }
            }
            to.write(s, i, sum, 1.0 / width as f32);
        }
    }
}
