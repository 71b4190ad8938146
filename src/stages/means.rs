//! Means of windows of rows: keys and values that stand for several.

use ndarray::{ArrayView4, ArrayViewMut4};

use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::source::{At, Kv};
use crate::simd::any::{AnyRows, AnyRowsMut, IntoAny};
use crate::simd::mem::{Arena, Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

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

    fn share_bytes(&self, dim: usize, unpacks: bool) -> usize {
        let row = dim.next_multiple_of(MAX_LANES);
        let held = if unpacks { self.width.saturating_mul(dim) } else { 0 };
        bytes_for::<f32>(row) + bytes_for::<f32>(self.width.saturating_mul(row)) + bytes_for::<f32>(held)
    }

    /// Bytes of scratch for `[batch, heads, len, dim]`, of arrays or of what may be
    /// unpacked first.
    pub(crate) fn bytes(
        &self,
        (batch, heads, len, dim): (usize, usize, usize, usize),
        unpacks: bool,
    ) -> usize {
        bytes_for::<u64>(claim_words(batch * heads * self.count(len)))
            + bytes_for_shares(parallel::threads(), self.share_bytes(dim, unpacks))
    }

    /// `out[b, h, w, ..]` = mean of `x[b, h, stride w..stride w + width, ..]`.
    pub(crate) fn run<T: Element>(
        &self,
        x: ArrayView4<'_, T>,
        out: ArrayViewMut4<'_, f32>,
        arena: Arena<'_>,
    ) {
        let (len, x) = (x.dim().2, T::any(Heads::new(x)));
        let of = |index| Sequence { index, batch: index, slot: index, queries: 0..0, keys: 0..len };
        self.run_of(&Kv::Arrays { k: x, v: x.without_columns() }, Side::Keys, of, out, arena);
    }

    /// The same in a pass.
    pub(crate) fn of<'p>(&self, pass: &mut Pass<'p>, x: &Scratch<'_>) -> Result<Scratch<'p>> {
        let (batch, heads, len, dim) = x.dim();
        let mut means = pass.rows((batch, heads, self.count(len), dim))?;
        pass.stage(
            || 0,
            self.bytes(x.dim(), false),
            |arena| {
                if let Some(means) = means.view_mut() {
                    self.run(x.view(), means, arena);
                }
            },
        );
        Ok(means)
    }

    /// The same of the keys or the values of sequences, entry `i` of `out` of number `i`;
    /// of a shorter one the rows past its last mean stay as they are.
    pub(crate) fn run_of(
        &self,
        from: &Kv<'_>,
        side: Side,
        sequence: impl Fn(usize) -> Sequence + Sync,
        out: ArrayViewMut4<'_, f32>,
        mut arena: Arena<'_>,
    ) {
        let (batch, heads, n, dim) = out.dim();
        let out = f32::any_out(OutRows::new(out, arena.take(claim_words(batch * heads * n))));
        let row = dim.next_multiple_of(MAX_LANES);
        let held = if from.unpacks() { self.width * dim } else { 0 };
        let shares = arena.shares(parallel::threads(), self.share_bytes(dim, from.unpacks()));
        let start = |worker: usize| {
            let mut arena = shares.take(worker);
            (arena.take::<f32>(row), arena.take::<f32>(self.width * row), arena.take::<f32>(held))
        };
        let tiles = n.div_ceil(TASK);
        parallel::for_each(parallel::threads(), batch * heads * tiles, start, |(sum, room, held), task| {
            let (index, head) = (task / tiles / heads, task / tiles % heads);
            let sequence = sequence(index);
            let last = n.min(self.count(sequence.keys.len()));
            let pools = (task % tiles * TASK).min(last)..((task % tiles + 1) * TASK).min(last);
            // What fills rows up is never written to.
            room.fill(0.0);
            for pool in pools {
                let first = pool * self.stride;
                let at = At { sequence: &sequence, kv_head: head, keys: first..first + self.width };
                let rows = match side {
                    Side::Keys => from.keys(self.isa, &at, held),
                    Side::Values => from.values(self.isa, &at, held),
                };
                let to = out.take(index, head, pool..pool + 1);
                self.isa.dispatch(Mean { rows, to, sum, room, row, width: self.width });
            }
        });
    }
}

/// What means are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Keys,
    Values,
}

struct Mean<'a, 'b> {
    rows: AnyRows<'a>,
    to: AnyRowsMut<'b>,
    sum: &'a mut [f32],
    room: &'a mut [f32],
    row: usize,
    width: usize,
}

impl Kernel for Mean<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, mut to, sum, room, row, width } = self;
        rows.pack_rows(s, room, row);
        sum.fill(0.0);
        for x in room.chunks_exact(row.max(1)) {
            for (sum, x) in sum.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
                let x = s.add(s.load(sum), s.load(x));
                s.store(sum, x);
            }
        }
        to.write(s, 0, sum, 1.0 / width as f32);
    }
}
