//! Maps of rows: each row of the output is made of the same row alone.

use ndarray::{Array1, Array2, ArrayView1, ArrayView4, ArrayViewMut4, Ix1};

use crate::definition::number::{Real, softmax};
use crate::element::Element;
use crate::engine::parallel;
use crate::input::laid::Laid;
use crate::simd::any::{AnyRows, AnyRowsMut};
use crate::simd::exp::{exp, tanh};
use crate::simd::mem::{Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::Pass;

/// Rows of a task.
const TASK: usize = 32;

/// What becomes of a row.
pub(crate) trait RowMap: Sync {
    /// Carries `#[inline(always)]`.
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]);

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R>;
}

/// Adds to a row.
#[inline(always)]
pub(super) fn add<S: Simd>(s: S, row: &mut [f32], by: &[f32]) {
    for (x, by) in row.chunks_mut(S::LANES).zip(by.chunks(S::LANES)) {
        let y = s.add(s.load_tail(x), s.load_tail(by));
        s.store_tail(x, y);
    }
}

/// A function of each element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// The hyperbolic tangent.
    #[default]
    Tanh,
    /// Nothing below 0.
    Relu,
}

impl RowMap for Activation {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        for x in row.chunks_mut(S::LANES) {
            let y = match self {
                Self::Tanh => tanh(s, s.load_tail(x)),
                // In this order a NaN stays.
                Self::Relu => s.max(s.splat(0.0), s.load_tail(x)),
            };
            s.store_tail(x, y);
        }
    }

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R> {
        let of = |x: &R| match self {
            Self::Tanh => x.tanh(),
            Self::Relu => x.max(R::of(0.0)),
        };
        x.iter().map(|x| of(x).stored()).collect()
    }
}

/// Shares that sum to 1: what is added, and a softmax.
#[derive(Clone, Debug)]
pub(crate) struct Shares {
    pub(crate) bias: Laid<Ix1>,
}

impl RowMap for Shares {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: &mut [f32]) {
        add(s, row, self.bias.numbers());
        let most = s.splat(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let mut sum = s.splat(0.0);
        for x in row.chunks_mut(S::LANES) {
            let weight = exp(s, s.sub(s.load_tail(x), most));
            s.store_tail(x, weight);
            sum = s.add(sum, s.load_tail(x));
        }
        let sum = s.splat(s.reduce_add(sum));
        for x in row.chunks_mut(S::LANES) {
            let weight = s.div(s.load_tail(x), sum);
            s.store_tail(x, weight);
        }
    }

    fn define<R: Real>(&self, x: ArrayView1<'_, R>) -> Vec<R> {
        let biased = x.iter().zip(self.bias.numbers()).map(|(&x, &bias)| x + R::of(f64::from(bias)));
        softmax(&biased.collect::<Vec<_>>())
    }
}

/// The definition: what becomes of the rows of `x`.
pub(crate) fn define<R: Real>(map: &impl RowMap, x: &Array2<R>) -> Array2<R> {
    let made: Vec<Vec<R>> = x.rows().into_iter().map(|row| map.define(row)).collect();
    // A map may change how wide rows are, also where there are none.
    let none = || map.define(Array1::from_elem(x.ncols(), R::of(0.0)).view()).len();
    let cols = made.first().map_or_else(none, Vec::len);
    Array2::from_shape_fn((made.len(), cols), |(t, c)| made[t][c])
}

/// Writes what becomes of the rows of `x`.
pub(crate) fn run<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    x: ArrayView4<'_, T>,
    map: &impl RowMap,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let (batch, heads, len, dim) = x.dim();
    let (rows, pieces, stride) = (batch * heads * len, len.div_ceil(TASK), dim.next_multiple_of(MAX_LANES));
    let (workers, room) = (parallel::threads(), TASK * stride);
    let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for_shares(workers, bytes_for::<f32>(room));
    pass.stage(
        || 0,
        bytes,
        |mut arena| {
            let Some(out) = out else { return };
            let out = T::any_out(OutRows::new(out, arena.take(claim_words(rows))));
            let x = T::any(Heads::new(x));
            let shares = arena.shares(workers, bytes_for::<f32>(room));
            let start = |worker| shares.take(worker).take::<f32>(room);
            parallel::for_each(workers, batch * heads * pieces, start, |copy, task| {
                let (unit, at) = (task / pieces, task % pieces * TASK);
                let (b, h, rows) = (unit / heads, unit % heads, at..(at + TASK).min(len));
                isa.dispatch(Rows { x: x.rows(b, h, &rows), map, copy, stride, out: out.take(b, h, rows) });
            });
        },
    );
}

struct Rows<'a, 'b, M> {
    x: AnyRows<'a>,
    map: &'a M,
    copy: &'a mut [f32],
    stride: usize,
    out: AnyRowsMut<'b>,
}

impl<M: RowMap> Kernel for Rows<'_, '_, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, map, copy, stride, mut out } = self;
        x.pack_rows(s, copy, stride);
        for t in 0..x.len() {
            let row = &mut copy[t * stride..][..stride];
            map.apply(s, &mut row[..x.cols()]);
            out.write(s, t, row, 1.0);
        }
    }
}
