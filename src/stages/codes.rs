//! Queries and keys as 8-bit codes, keys less their mean, for scores that are
//! products of codes.
//!
//! ```text
//! mean = sum_j k_j / n                     of the keys of a sequence and a head
//! s    = max_c |x_c| / 127                 x = q_i or k_j - mean
//! code = round(x / s)                      ties to even
//! ```
//!
//! Whatever is taken off all keys changes no softmax. All is done in `f32`, in
//! one order: a key is divided by `n` before it is added, what is not finite
//! counts as 0 in the mean, and sums are cut every [`BLOCK`] keys. Each
//! operation is rounded correctly, so that all instruction sets have the same
//! codes. A row with a NaN or an infinity stands for NaN.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView4, ArrayViewMut4, Axis};

use crate::definition::number::Real;
use crate::element::Element;
use crate::engine;
use crate::engine::call::{Arrays, Call, Norm};
use crate::engine::parallel;
use crate::error::Result;
use crate::input::{Dims, Lengths, Qkv};
use crate::mask::Mask;
use crate::score::Plain;
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::dots::{BESIDE, LONGEST, Vnni, words};
use crate::simd::mem::{
    Arena, Heads, OutRows, Parts, RowsMut, bytes_for, bytes_for_shares, cast_mut, claim_words,
};
use crate::simd::quant::{LARGEST_CODE, LARGEST_SCALE, SMALLEST_SCALE};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::attend::Config;
use crate::stages::pass::{Pass, Scratch};

/// Keys after which a sum is cut; rows of a task.
const BLOCK: usize = 1024;
/// Rows that are read at once.
const ROWS: usize = 16;

/// How rows are coded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Codes<'a> {
    pub(crate) isa: Isa,
    pub(crate) dims: &'a Dims,
    pub(crate) lengths: Lengths<'a>,
}

/// Coded queries and keys.
pub(crate) struct Coded<'a> {
    rows: [Scratch<'a>; 2],
    dots: Option<Vnni>,
}

/// Some rows of a range.
fn block(of: &Range<usize>, block: usize) -> Range<usize> {
    let first = (of.start + block * BLOCK).min(of.end);
    first..(first + BLOCK).min(of.end)
}

impl Codes<'_> {
    /// What multiplies codes; without it rows have the numbers that codes stand for.
    fn dots(&self) -> Option<Vnni> {
        let fits = matches!(self.isa, Isa::Avx512 | Isa::Amx) && self.dims.head_dim <= LONGEST;
        if fits { Vnni::detect() } else { None }
    }

    /// Blocks of the queries of the longest sequence, and of its keys.
    fn blocks(&self) -> [usize; 2] {
        let each = (0..self.dims.batch).map(|i| self.lengths.sequence(self.dims, i));
        let longest = each.fold([0, 0], |[q, k], of| [q.max(of.queries.len()), k.max(of.keys.len())]);
        longest.map(|len| len.div_ceil(BLOCK))
    }

    /// Elements of a row of scratch.
    fn row(&self) -> usize {
        self.dims.head_dim.next_multiple_of(MAX_LANES)
    }

    /// Bytes of the rows that a thread holds.
    fn room(&self) -> usize {
        bytes_for::<f32>(ROWS.saturating_mul(self.row()))
    }

    fn bytes(&self, rows: [usize; 2]) -> usize {
        let heads = self.dims.batch * self.dims.kv_heads;
        let sums = heads.saturating_mul(self.blocks()[1]);
        let claims = [rows[0], rows[1], sums].map(|n| bytes_for::<u64>(claim_words(n)));
        let numbers = [sums, heads].map(|n| bytes_for::<f32>(n.saturating_mul(self.row())));
        let shares = bytes_for_shares(parallel::threads(), self.room());
        claims.iter().chain(&numbers).fold(shares, |all, &n| all.saturating_add(n))
    }

    /// Codes queries and keys.
    pub(crate) fn run<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        arrays: [ArrayView4<'_, T>; 2],
    ) -> Result<Coded<'p>> {
        let (dots, dim) = (self.dots(), self.dims.head_dim);
        let width = if dots.is_some() { words(dim) + BESIDE } else { dim };
        let [q, k] =
            arrays.each_ref().map(|x| x.dim()).map(|(batch, heads, len, _)| (batch, heads, len, width));
        let mut rows = [pass.rows(q)?, pass.rows(k)?];
        let counts = [q, k].map(|(batch, heads, len, _)| batch * heads * len);
        // Means, magnitudes, quotients.
        let flops = || 5 * arrays.iter().map(|x| x.len() as u64).sum::<u64>();
        pass.stage(flops, self.bytes(counts), |mut arena| {
            let [to_q, to_k] = &mut rows;
            let (Some(to_q), Some(to_k)) = (to_q.view_mut(), to_k.view_mut()) else { return };
            let [of_q, of_k] = counts.map(|rows| arena.take(claim_words(rows)));
            let to = [OutRows::new(to_q, of_q), OutRows::new(to_k, of_k)];
            self.code(arrays.map(|x| T::any(Heads::new(x))), &to, dots.is_some(), arena);
        });
        Ok(Coded { rows, dots })
    }

    fn code(
        &self,
        [q, k]: [AnyArray<'_>; 2],
        [to_q, to_k]: &[OutRows<'_, f32>; 2],
        dots: bool,
        mut arena: Arena<'_>,
    ) {
        let (d, row, [of_queries, blocks]) = (self.dims, self.row(), self.blocks());
        let (heads, workers) = (d.batch * d.kv_heads, parallel::threads());
        let (sums, means) = (arena.take::<f32>(heads * blocks * row), arena.take::<f32>(heads * row));
        let of_sums = arena.take(claim_words(heads * blocks));
        // A pair of sequence and head, and a block of its rows.
        let keys_of = |task: usize| {
            let of = self.lengths.sequence(d, task / blocks / d.kv_heads);
            (of.batch, task / blocks % d.kv_heads, of.keys.len(), block(&of.keys, task % blocks))
        };
        {
            let shares = arena.reborrow().shares(workers, self.room());
            let start = |worker| shares.take(worker).take::<f32>(ROWS * row);
            let parts = Parts::new(&mut *sums, row, of_sums);
            parallel::for_each(workers, heads * blocks, start, |room, task| {
                let (batch, head, len, keys) = keys_of(task);
                let (from, share) = (k.rows(batch, head, &keys), 1.0 / len as f32);
                self.isa.dispatch(Sum { from, share, room, row, to: parts.take(task) });
            });
        }
        for (i, to) in means.chunks_exact_mut(row.max(1)).enumerate() {
            self.isa.dispatch(Total { from: &sums[i * blocks * row..][..blocks * row], to });
        }
        let means = &*means;
        let shares = arena.shares(workers, self.room());
        let start = |worker| shares.take(worker).take::<f32>(ROWS * row);
        let tasks = d.batch * d.q_heads * of_queries;
        parallel::for_each(workers, heads * blocks + tasks, start, |room, task| {
            let (from, to, mean) = if let Some(task) = task.checked_sub(heads * blocks) {
                let of = self.lengths.sequence(d, task / of_queries / d.q_heads);
                let (head, rows) = (task / of_queries % d.q_heads, block(&of.queries, task % of_queries));
                (q.rows(of.batch, head, &rows), to_q.take(of.batch, head, rows), None)
            } else {
                let (batch, head, _, keys) = keys_of(task);
                let mean = &means[task / blocks * row..][..row];
                (k.rows(batch, head, &keys), to_k.take(batch, head, keys), Some(mean))
            };
            self.isa.dispatch(Encode { from, to, mean, room, row, cols: d.head_dim, dots });
        });
    }
}

/// Softmax attention whose scores are those of coded queries and keys.
pub(crate) fn attend<T: Element, M: Mask>(
    pass: &mut Pass<'_>,
    config: &Config<M, Plain>,
    x: Qkv<'_, T>,
    coded: &Coded<'_>,
    out: Option<ArrayViewMut4<'_, T>>,
) -> Result<()> {
    let dims = config.checked(x.dims()?)?;
    let flops = || config.cost(&x).map_or(0, |cost| cost.flops);
    let [q, k] = coded.rows.each_ref().map(|rows| rows.view());
    let head_dim = q.dim().3;
    let codes: Qkv<'_, f32> = Qkv { lengths: x.lengths, ..Qkv::new(q, k, k) };
    let arrays = Arrays::with_values(codes, T::any(Heads::new(x.v.reborrow())));
    let norm = Norm::Softmax { sinks: None };
    let call = config.over(arrays, Dims { head_dim, ..dims }, norm, None);
    let call = Call { dots: coded.dots, scale: config.scale(&dims) as f32, ..call };
    pass.stage(flops, engine::workspace_bytes(&call), |arena| {
        if let Some(out) = out {
            engine::run_in(&call, out, None, arena);
        }
    });
    Ok(())
}

/// Hands on rows, a few at a time, as they are packed.
#[inline(always)]
fn each<S: Simd>(
    s: S,
    from: &AnyRows<'_>,
    (room, row): (&mut [f32], usize),
    mut then: impl FnMut(usize, &mut [f32]),
) {
    for first in (0..from.len()).step_by(ROWS) {
        let part = from.part(first..(first + ROWS).min(from.len()));
        let rows = part.len();
        part.pack_rows(s, room, row);
        for (i, x) in room.chunks_exact_mut(row.max(1)).take(rows).enumerate() {
            then(first + i, x);
        }
    }
}

/// The sum of rows times `share`, without what is not finite.
struct Sum<'a> {
    from: AnyRows<'a>,
    share: f32,
    room: &'a mut [f32],
    row: usize,
    to: &'a mut [f32],
}

impl Kernel for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, share, room, row, to } = self;
        // What fills rows up is never written to.
        room.fill(0.0);
        to.fill(0.0);
        each(s, &from, (room, row), |_, x| {
            for (to, x) in to.chunks_exact_mut(S::LANES).zip(x.chunks_exact(S::LANES)) {
                let x = s.load(x);
                let finite = s.lt(s.abs(x), s.splat(f32::INFINITY));
                let part = s.select(finite, s.mul(x, s.splat(share)), s.splat(0.0));
                s.store(to, s.add(s.load(to), part));
            }
        });
    }
}

/// The sum of rows of scratch.
struct Total<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
}

impl Kernel for Total<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.to.fill(0.0);
        for x in self.from.chunks_exact(self.to.len().max(1)) {
            for (to, x) in self.to.chunks_exact_mut(S::LANES).zip(x.chunks_exact(S::LANES)) {
                s.store(to, s.add(s.load(to), s.load(x)));
            }
        }
    }
}

/// Rows as codes: of keys with the mean that is taken off them.
struct Encode<'a> {
    from: AnyRows<'a>,
    to: RowsMut<'a, f32>,
    mean: Option<&'a [f32]>,
    room: &'a mut [f32],
    row: usize,
    cols: usize,
    dots: bool,
}

impl Kernel for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { from, mut to, mean, room, row, cols, dots } = self;
        room.fill(0.0);
        if cols == 0 {
            for i in 0..from.len() {
                to.row(i).unwrap_or_default().fill(0.0);
            }
            return;
        }
        each(s, &from, (room, row), |i, x| {
            let (mut most, mut zero) = (s.splat(0.0), s.splat(0.0));
            for (v, x) in x.chunks_exact_mut(S::LANES).enumerate() {
                let mut y = s.load(x);
                if let Some(mean) = mean {
                    y = s.sub(y, s.load(&mean[v * S::LANES..]));
                    s.store(x, y);
                }
                most = s.max(s.abs(y), most);
                // NaN and infinity times 0 are NaN, and stay.
                zero = s.mul_add(y, s.splat(0.0), zero);
            }
            let finite = s.reduce_add(zero) == 0.0;
            let scale = (s.reduce_max(most) / LARGEST_CODE).clamp(SMALLEST_SCALE, LARGEST_SCALE);
            let scale = if finite { scale } else { f32::NAN };
            let to = to.row(i).unwrap_or_default();
            let mut sum = s.splat(0.0);
            if dots {
                // Codes past the last are 0.
                to[words(cols) - 1] = 0.0;
            }
            for (v, x) in x.chunks_exact(S::LANES).enumerate() {
                let code = s.round(s.div(s.load(x), s.splat(scale)));
                // The bounds take NaN for a number.
                let code = s.max(s.min(code, s.splat(LARGEST_CODE)), s.splat(-LARGEST_CODE));
                let columns = v * S::LANES..cols.min((v + 1) * S::LANES);
                if columns.is_empty() {
                    break;
                }
                if dots {
                    sum = s.add(sum, code);
                    s.store_i8_tail(&mut cast_mut::<i8>(to)[columns], code);
                } else {
                    s.store_tail(&mut to[columns], s.mul(code, s.splat(scale)));
                }
            }
            if !dots {
                return;
            }
            let (codes, beside) = to.split_at_mut(words(cols));
            beside[0] = scale;
            beside[1] = f32::from_bits((-128 * s.reduce_add(sum) as i32) as u32);
            if mean.is_none() {
                for word in codes {
                    *word = f32::from_bits(word.to_bits() ^ 0x8080_8080);
                }
            }
        });
    }
}

/// The definition of keys less their mean.
pub(crate) fn define_centred(mut keys: Array2<f32>) -> Array2<f32> {
    let share = 1.0 / keys.dim().0 as f32;
    let mut mean = Array1::<f32>::zeros(keys.dim().1);
    for keys in keys.axis_chunks_iter(Axis(0), BLOCK) {
        for (mean, column) in mean.iter_mut().zip(keys.columns()) {
            *mean += column.iter().filter(|x| x.is_finite()).fold(0f32, |sum, x| sum + x * share);
        }
    }
    keys -= &mean;
    keys
}

/// The definition of the numbers that the codes of rows stand for.
pub(crate) fn define<R: Real>(x: &Array2<f32>) -> Array2<R> {
    let mut coded = Array2::from_elem(x.dim(), R::of(0.0));
    for (x, mut coded) in x.outer_iter().zip(coded.outer_iter_mut()) {
        let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
        let finite = x.iter().all(|x| x.is_finite());
        // Of no magnitude that a scale has: all are 0.
        let scale = if finite { (most / 127.0).max(f32::MIN_POSITIVE) } else { f32::NAN };
        for (x, coded) in x.iter().zip(&mut coded) {
            let code = (x / scale).round_ties_even().clamp(-127.0, 127.0);
            *coded = R::rounded(f64::from(code) * f64::from(scale), 1.0);
        }
    }
    coded
}
