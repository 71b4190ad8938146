//! Attention blended with a mean of values: of all up to a query, or of all by how much
//! an estimate gives each.

use std::ops::Range;

use ndarray::ArrayView4;

use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::select::Unpack;
use crate::select::reduce::Shares;
use crate::simd::any::{AnyArray, AnyOut, AnyRows, IntoAny};
use crate::simd::exp::sigmoid;
use crate::simd::mem::{Heads, OutRows, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Out, Pass, Scratch};

/// Rows of a task, and values that are summed before they are added to all before.
const TASK: usize = 64;

/// For each head the means of the rows of `x` up to the positions of the last `q_len`.
pub(crate) fn running_means<'p, T: Element>(
    pass: &mut Pass<'p>,
    isa: Isa,
    x: ArrayView4<'_, T>,
    q_len: usize,
) -> Result<Scratch<'p>> {
    let (batch, heads, n, dim) = x.dim();
    let mut means = pass.rows((batch, heads, q_len, dim))?;
    let (stride, claims) = (means.stride(), claim_words(batch * heads));
    let share = 3 * bytes_for::<f32>(stride.max(MAX_LANES));
    let bytes = bytes_for::<u64>(claims) + bytes_for_shares(parallel::threads(), share);
    pass.stage(
        || (batch * heads * n * dim) as u64,
        bytes,
        |mut arena| {
            let to = Parts::new(means.numbers_mut(), q_len * stride, arena.take(claims));
            let x = T::any(Heads::new(x));
            let shares = arena.shares(parallel::threads(), share);
            let start = |worker: usize| {
                let mut arena = shares.take(worker);
                [(); 3].map(|()| arena.take::<f32>(stride.max(MAX_LANES)))
            };
            let tasks = if dim == 0 || q_len == 0 { 0 } else { batch * heads };
            parallel::for_each(parallel::threads(), tasks, start, |[row, part, total], unit| {
                let (x, to) = (x.rows(unit / heads, unit % heads, &(0..n)), to.take(unit));
                isa.dispatch(Running { x, q_len, row, part, total, to, stride });
            });
        },
    );
    Ok(means)
}

struct Running<'a> {
    x: AnyRows<'a>,
    q_len: usize,
    row: &'a mut [f32],
    part: &'a mut [f32],
    total: &'a mut [f32],
    to: &'a mut [f32],
    stride: usize,
}

impl Kernel for Running<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, q_len, row, part, total, to, stride } = self;
        let n = x.len();
        [&mut *row, &mut *part, &mut *total].into_iter().for_each(|x| x.fill(0.0));
        // Queries before the first key have no mean.
        to[..q_len.saturating_sub(n) * stride].fill(0.0);
        for j in 0..n {
            x.part(j..j + 1).pack_rows(s, row, row.len());
            let (whole, share) = (j % TASK == TASK - 1, s.splat(1.0 / (j + 1) as f32));
            let mut to = (j + q_len).checked_sub(n).map(|i| &mut to[i * stride..][..stride]);
            for c in (0..stride).step_by(S::LANES) {
                let sum = s.add(s.load(&part[c..]), s.load(&row[c..]));
                let all = s.add(s.load(&total[c..]), sum);
                s.store(&mut part[c..], if whole { s.splat(0.0) } else { sum });
                if whole {
                    s.store(&mut total[c..], all);
                }
                if let Some(to) = &mut to {
                    s.store(&mut to[c..], s.mul(all, share));
                }
            }
        }
    }
}

/// For each query head `sum_p a_p sum of rows x of pixel p`, one row, where `a` is the mean
/// over queries of the softmax of `estimate`, `[batch, q_heads, q_len, pixels]`, and
/// `rows_of` says which rows a pixel has.
pub(crate) fn pixel_means<'p, T: Element>(
    pass: &mut Pass<'p>,
    isa: Isa,
    x: ArrayView4<'_, T>,
    estimate: ArrayView4<'_, f32>,
    rows_of: impl Fn(usize) -> Range<usize> + Sync + Send,
) -> Result<Scratch<'p>> {
    let ((_, kv_heads, n, dim), (batch, heads, q_len, pixels)) = (x.dim(), estimate.dim());
    let mut means = pass.rows((batch, heads, 1, dim))?;
    let (stride, claims) = (means.stride(), claim_words(batch * heads));
    let room = pixels.max(stride).max(MAX_LANES);
    let share = 3 * bytes_for::<f32>(room);
    let bytes = bytes_for::<u64>(claims) + bytes_for_shares(parallel::threads(), share);
    pass.stage(
        || (batch * heads * (n * dim + 4 * q_len * pixels)) as u64,
        bytes,
        |mut arena| {
            let to = Parts::new(means.numbers_mut(), stride, arena.take(claims));
            let (x, estimate) = (T::any(Heads::new(x)), f32::any(Heads::new(estimate)));
            let shares = arena.shares(parallel::threads(), share);
            let start = |worker: usize| {
                let mut arena = shares.take(worker);
                [(); 3].map(|()| arena.take::<f32>(room))
            };
            let tasks = if dim == 0 { 0 } else { batch * heads };
            parallel::for_each(parallel::threads(), tasks, start, |[row, part, total], unit| {
                let (b, h, to) = (unit / heads, unit % heads, to.take(unit));
                received(
                    isa,
                    estimate,
                    (b, h),
                    [&mut row[..pixels], &mut part[..pixels], &mut total[..pixels]],
                );
                to.fill(0.0);
                let x = x.rows(b, h / (heads / kv_heads.max(1)).max(1), &(0..n));
                for (pixel, share) in total[..pixels].iter().enumerate() {
                    let rows = x.part(rows_of(pixel));
                    isa.dispatch(AddRows { x: rows, share: *share, row, part, to: &mut *to });
                }
            });
        },
    );
    Ok(means)
}

/// Means over queries of the softmax of a head's estimate, in `total`.
fn received(isa: Isa, estimate: AnyArray<'_>, (b, h): (usize, usize), [row, part, total]: [&mut [f32]; 3]) {
    struct Add<'a>(&'a mut [f32], &'a [f32], f32);
    impl Kernel for Add<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for (to, x) in self.0.chunks_mut(S::LANES).zip(self.1.chunks(S::LANES)) {
                s.store_tail(to, s.mul_add(s.load_tail(x), s.splat(self.2), s.load_tail(to)));
            }
        }
    }
    let q_len = estimate.dim().2;
    total.fill(0.0);
    for first in (0..q_len).step_by(TASK) {
        part.fill(0.0);
        for query in first..(first + TASK).min(q_len) {
            isa.dispatch(Unpack { from: estimate.rows(b, h, &(query..query + 1)), to: &mut *row });
            isa.dispatch(Shares { row: &mut *row, scale: 1.0 });
            isa.dispatch(Add(part, row, 1.0));
        }
        isa.dispatch(Add(total, part, 1.0 / q_len as f32));
    }
}

/// `to += share sum of the rows of x`.
struct AddRows<'a, 'b> {
    x: AnyRows<'a>,
    share: f32,
    row: &'b mut [f32],
    part: &'b mut [f32],
    to: &'b mut [f32],
}

impl Kernel for AddRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, share, row, part, to } = self;
        let cols = to.len();
        for first in (0..x.len()).step_by(TASK) {
            part[..cols].fill(0.0);
            for j in first..(first + TASK).min(x.len()) {
                x.part(j..j + 1).pack_rows(s, row, cols);
                for (part, x) in part[..cols].chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
                    s.store(part, s.add(s.load(part), s.load(x)));
                }
            }
            for (to, x) in to.chunks_exact_mut(S::LANES).zip(part.chunks_exact(S::LANES)) {
                s.store(to, s.mul_add(s.load(x), s.splat(share), s.load(to)));
            }
        }
    }
}

/// `out = b a x + (1 - b) mean` with the logistic functions `a` and `b` of the two
/// `gates`, `[batch, heads, len, 2]`, of a row; heads share means, and rows a single one.
pub(crate) fn blend<O: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    [x, means]: [&Scratch<'_>; 2],
    gates: ArrayView4<'_, f32>,
    out: Out<'_, O>,
) {
    let ((batch, heads, len, dim), (_, of, all, _)) = (x.dim(), means.dim());
    let width = dim.next_multiple_of(MAX_LANES).max(MAX_LANES);
    let claims = claim_words(batch * heads * len);
    let bytes = bytes_for::<u64>(claims) + bytes_for_shares(parallel::threads(), bytes_for::<f32>(width));
    pass.stage(
        || 3 * (batch * heads * len * dim) as u64,
        bytes,
        |mut arena| {
            let Some(out) = out else { return };
            let to = O::any_out(OutRows::new(out, arena.take(claims)));
            let [x, means, gates] =
                [x.view(), means.view(), gates.reborrow()].map(|x| f32::any(Heads::new(x)));
            let shares = arena.shares(parallel::threads(), bytes_for::<f32>(width));
            let start = |worker: usize| shares.take(worker).take::<f32>(width);
            let tiles = len.div_ceil(TASK);
            parallel::for_each(parallel::threads(), batch * heads * tiles, start, |row, task| {
                let (unit, at) = (task / tiles, task % tiles * TASK);
                let (b, h, rows) = (unit / heads, unit % heads, at..(at + TASK).min(len));
                let one = if all == 1 { 0..1 } else { rows.clone() };
                let mean = means.rows(b, h / (heads / of.max(1)).max(1), &one);
                let call = Blend {
                    x: x.rows(b, h, &rows),
                    mean,
                    gates: gates.rows(b, h, &rows),
                    to: &to,
                    at: (b, h, at),
                    row,
                };
                isa.dispatch(call);
            });
        },
    );
}

struct Blend<'a, 'b> {
    x: AnyRows<'a>,
    mean: AnyRows<'a>,
    gates: AnyRows<'a>,
    to: &'a AnyOut<'b>,
    at: (usize, usize, usize),
    row: &'a mut [f32],
}

impl Kernel for Blend<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, mean, gates, to, at: (b, h, first), row } = self;
        let mut to = to.take(b, h, first..first + x.len());
        for i in 0..x.len() {
            let [a, b] = [0, 1].map(|p| sigmoid(s, s.splat(gates.at(i, p))));
            let rest = s.sub(s.splat(1.0), b);
            let a = s.mul(a, b);
            for c in (0..x.cols()).step_by(S::LANES) {
                let mean = s.mul(rest, mean.load(s, if mean.len() == 1 { 0 } else { i }, c));
                s.store(&mut row[c..], s.mul_add(a, x.load(s, i, c), mean));
            }
            to.write(s, i, row, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::stages::pass::alone;

    #[test]
    fn means_run_and_gates_blend() {
        for (n, q_len) in [(150, 150), (150, 3), (3, 7), (0, 2)] {
            let x =
                Array4::from_shape_fn((2, 2, n, 5), |(b, h, i, c)| ((b + 2 * h + i * (c + 3)) % 7) as f32);
            let gates = Array4::from_shape_fn((2, 4, q_len, 2), |(b, h, i, p)| (b + h + i + p) as f32 - 3.0);
            let mean = |b: usize, h: usize, i: usize, c: usize| {
                let seen = (i + n + 1).saturating_sub(q_len);
                (0..seen).map(|j| f64::from(x[[b, h, j, c]])).sum::<f64>() / seen.max(1) as f64
            };
            let logistic = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
            for isa in Isa::available() {
                let out = alone(|pass| {
                    let means = running_means(pass, isa, x.view(), q_len)?;
                    let mut ones = pass.rows((2, 4, q_len, 5))?;
                    if let Some(mut ones) = ones.view_mut() {
                        ones.fill(1.0);
                    }
                    let mut out = Array4::<f32>::zeros((2, 4, q_len, 5));
                    blend(pass, isa, [&ones, &means], gates.view(), Some(out.view_mut()));
                    Ok(out)
                });
                for ((b, h, i, c), &got) in out.indexed_iter() {
                    let [u, w] = [0, 1].map(|p| logistic(gates[[b, h, i, p]]));
                    let want = u * w + (1.0 - w) * mean(b, h / 2, i, c);
                    assert!((f64::from(got) - want).abs() < 1e-5, "{isa}, {n}, {q_len}: {got}, {want}");
                }
            }
        }
    }
}
