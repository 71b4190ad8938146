//! Attention between channels: a Gram matrix over tokens, a row function of it,
//! and what it makes of the channels of each token.

use ndarray::{Array2, ArrayView4, ArrayViewMut4, ShapeBuilder};

use crate::definition::number::{Real, softmax};
use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::simd::any::{AnyArray, AnyOut, AnyRows};
use crate::simd::exp::exp;
use crate::simd::mem::{Heads, OutRows, Parts, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::{Product, Update};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Tokens that are multiplied at once.
const TOKENS: usize = 128;
/// Tokens of a sum of its own. Fixed, because sums are cut here.
const CHUNK: usize = 1024;
/// Rows of outputs that are multiplied at once, and those of a task.
const ROWS: usize = 48;
const TASK_ROWS: usize = 4 * ROWS;

/// What rows of the Gram matrix become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowOf {
    Softmax,
    /// What is below 0 becomes 0.
    Relu,
}

/// `y[n, c] = sum_c' A[c, c'] v[n, c']` with `A = f(scale_h sum_n a[n, c] b[n,
/// c'])`, where channels of `a` and `b` may have unit length over all tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Channels {
    pub(crate) isa: Isa,
    pub(crate) row: RowOf,
    pub(crate) unit: bool,
}

/// The least length that channels are divided by.
const LEAST: f32 = 1e-12;

/// The sizes of a call.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    len: usize,
    /// Channels of `a` and of the output, and those of `b` and `v`.
    rows: usize,
    cols: usize,
    /// From one row of the Gram matrix to the next.
    stride: usize,
    panel: usize,
}

impl Sizes {
    fn chunks(&self) -> usize {
        self.len.div_ceil(CHUNK).max(1)
    }

    /// Numbers of a sum: the matrix, and the squares of both sides' channels.
    fn sum(&self) -> usize {
        (self.rows + 1) * self.stride + self.rows.next_multiple_of(MAX_LANES)
    }

    /// Numbers of the sums of a head, of which the first becomes that of all.
    fn all(&self) -> usize {
        self.chunks() * self.sum()
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(self.panel)
    }

    /// Numbers of a map, `[panels of rows][cols][panel]`.
    fn map(&self) -> usize {
        self.blocks() * self.cols * self.panel
    }
}

/// Neighbouring heads share what an array has less of.
fn head_of(x: &AnyArray<'_>, heads: usize, head: usize) -> usize {
    head / (heads / x.heads().max(1)).max(1)
}

impl Channels {
    /// `a` is `[batch, heads, len, rows]`, `b` and `v` are `[batch, heads, len,
    /// cols]`; each may have fewer heads. `scale` is asked for each head.
    pub(crate) fn run<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        [a, b, v]: [ArrayView4<'_, T>; 3],
        heads: usize,
        scale: impl Fn(usize) -> f32 + Sync + Send,
        out: Option<ArrayViewMut4<'_, T>>,
    ) -> Result<()> {
        let grams = self.similarities(pass, [a, b], heads, scale)?;
        let (sizes, units, isa) = (grams.sizes, grams.units, self.isa);
        let (workers, v) = (parallel::threads(), T::any(Heads::new(v)));
        let Sizes { len, rows, cols, .. } = sizes;
        let maps = pass.take(units * sizes.map())?;
        let claims = bytes_for::<u64>(claim_words(units));
        pass.stage(
            || 0,
            2 * claims,
            |mut arena| {
                let sums = Parts::new(grams.numbers, sizes.all(), arena.take(claim_words(units)));
                let maps = Parts::new(&mut *maps, sizes.map(), arena.take(claim_words(units)));
                let start = |_| ();
                parallel::for_each(workers, units, start, |(), unit| {
                    let (gram, map) = (sums.take(unit), maps.take(unit));
                    isa.dispatch(Map { of: self, sizes, gram, map });
                });
            },
        );

        let groups = len.div_ceil(TASK_ROWS);
        let claims = claim_words(units * len * sizes.blocks().max(1));
        let room = ROWS * (cols + sizes.panel);
        let bytes = bytes_for::<u64>(claims) + bytes_for_shares(workers, bytes_for::<f32>(room));
        let flops = || (2 * units * len * rows * cols) as u64;
        pass.stage(flops, bytes, |mut arena| {
            let Some(out) = out else { return };
            let out = &T::any_out(OutRows::in_blocks(out, sizes.panel, arena.take(claims)));
            let shares = arena.shares(workers, bytes_for::<f32>(room));
            let start = |worker| shares.take(worker).take::<f32>(room);
            parallel::for_each(workers, units * groups, start, |room, task| {
                let (unit, first) = (task / groups, task % groups * TASK_ROWS);
                let (entry, head) = (unit / heads, unit % heads);
                let tokens = first..(first + TASK_ROWS).min(len);
                let v = v.rows(entry, head_of(&v, heads, head), &tokens);
                let map = &maps[unit * sizes.map()..][..sizes.map()];
                isa.dispatch(Apply { sizes, v, map, room, entry, head, first, out });
            });
        });
        Ok(())
    }

    /// What the function of rows is applied to: the Gram matrix, of unit length
    /// or not, times the scale.
    pub(crate) fn similarities<'a, T: Element>(
        &self,
        pass: &mut Pass<'a>,
        [a, b]: [ArrayView4<'_, T>; 2],
        heads: usize,
        scale: impl Fn(usize) -> f32 + Sync + Send,
    ) -> Result<Similarities<'a>> {
        let ((batch, _, len, rows), cols, isa) = (a.dim(), b.dim().3, self.isa);
        let stride = cols.next_multiple_of(MAX_LANES);
        let sizes = Sizes { len, rows, cols, stride, panel: isa.panel() };
        let (units, chunks, workers) = (batch * heads, sizes.chunks(), parallel::threads());
        let [a, b] = [a, b].map(|x| T::any(Heads::new(x)));

        let sums = pass.take(units * sizes.all())?;
        let room = rows * TOKENS + TOKENS * stride;
        let claims = bytes_for::<u64>(claim_words(units * chunks));
        let flops = || (2 * units * len * rows * cols) as u64;
        pass.stage(flops, claims + bytes_for_shares(workers, bytes_for::<f32>(room)), |mut arena| {
            let sums = Parts::new(&mut *sums, sizes.sum(), arena.take(claim_words(units * chunks)));
            let shares = arena.shares(workers, bytes_for::<f32>(room));
            let start = |worker| shares.take(worker).take::<f32>(room);
            parallel::for_each(workers, units * chunks, start, |room, task| {
                let (unit, first) = (task / chunks, task % chunks * CHUNK);
                let (entry, head) = (unit / heads, unit % heads);
                let tokens = first..(first + CHUNK).min(len);
                let [a, b] = [&a, &b].map(|x| x.rows(entry, head_of(x, heads, head), &tokens));
                isa.dispatch(Gram { of: self, sizes, a, b, room, sum: sums.take(task) });
            });
        });

        let claims = bytes_for::<u64>(claim_words(units));
        pass.stage(
            || 0,
            claims,
            |mut arena| {
                let sums = Parts::new(&mut *sums, sizes.all(), arena.take(claim_words(units)));
                let start = |_| ();
                parallel::for_each(workers, units, start, |(), unit| {
                    isa.dispatch(Join { of: self, sizes, scale: scale(unit % heads), sums: sums.take(unit) });
                });
            },
        );
        Ok(Similarities { sizes, units, heads, numbers: sums })
    }

    /// The definition of [`similarities`](Self::similarities), of one head.
    pub(crate) fn define_similarities<R: Real>(&self, [a, b]: [&Array2<R>; 2], scale: f64) -> Array2<R> {
        let unit = |x: &Array2<R>| {
            let mut x = x.clone();
            for mut channel in x.columns_mut().into_iter().filter(|_| self.unit) {
                let length = R::total(channel.iter().map(|&x| (x, x))).sqrt().max(R::of(f64::from(LEAST)));
                channel.mapv_inplace(|x| x / length);
            }
            x
        };
        let (a, b) = (unit(a), unit(b));
        Array2::from_shape_fn((a.dim().1, b.dim().1), |(i, j)| {
            let pairs = a.column(i).into_iter().copied().zip(b.column(j).into_iter().copied());
            R::total(pairs) * R::rounded(scale, 1.0)
        })
    }

    /// The definition, of one head.
    pub(crate) fn define<R: Real>(&self, [a, b, v]: [&Array2<R>; 3], scale: f64) -> Array2<R> {
        let scores = self.define_similarities([a, b], scale);
        let mut out = Array2::from_elem((v.dim().0, a.dim().1), R::of(0.0));
        for (scores, mut out) in scores.rows().into_iter().zip(out.columns_mut()) {
            let weights = match self.row {
                RowOf::Softmax => softmax(&scores.to_vec()),
                RowOf::Relu => scores.iter().map(|x| x.max(R::of(0.0))).collect(),
            };
            for (v, out) in v.rows().into_iter().zip(&mut out) {
                *out = R::dot(weights.iter().copied().zip(v.iter().copied()));
            }
        }
        out
    }
}

/// The Gram matrix of some tokens.
struct Gram<'a> {
    of: &'a Channels,
    sizes: Sizes,
    a: AnyRows<'a>,
    b: AnyRows<'a>,
    room: &'a mut [f32],
    sum: &'a mut [f32],
}

impl Kernel for Gram<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, sizes: Sizes { rows, stride, panel, .. }, a, b, room, sum } = self;
        let (left, right) = room.split_at_mut(rows * TOKENS);
        let (gram, squares) = sum.split_at_mut(rows * stride);
        gram.fill(0.0);
        squares.fill(0.0);
        // What fills the rows up is multiplied, too.
        right.fill(0.0);
        for first in (0..a.len()).step_by(TOKENS) {
            let tokens = first..(first + TOKENS).min(a.len());
            let n = tokens.len();
            let (a, b) = (a.part(tokens.clone()), b.part(tokens));
            match a.turned() {
                Some(a) => a.pack_rows(s, left, TOKENS),
                None => a.pack_columns(s, left, TOKENS),
            }
            match b.turned() {
                Some(b) => b.pack_columns(s, right, stride),
                None => b.pack_rows(s, right, stride),
            }
            for col in (0..stride).step_by(panel) {
                s.vectorize(Product {
                    a: Rows::of_slice(left, rows, n, TOKENS),
                    b: Rows::of_slice(&right[col..], n, (stride - col).min(panel), stride),
                    c: gram.get_mut(col..).unwrap_or_default(),
                    ldc: stride,
                    update: Update::Add,
                });
            }
            if of.unit {
                let (of_b, of_a) = squares.split_at_mut(stride);
                for row in right.chunks_exact(stride.max(1)).take(n) {
                    for (x, to) in row.chunks_exact(S::LANES).zip(of_b.chunks_exact_mut(S::LANES)) {
                        let x = s.load(x);
                        s.store(to, s.mul_add(x, x, s.load(to)));
                    }
                }
                for (row, to) in left.chunks_exact(TOKENS).zip(of_a) {
                    let mut sum = s.splat(0.0);
                    for x in row[..n].chunks(S::LANES) {
                        let x = s.load_tail(x);
                        sum = s.mul_add(x, x, sum);
                    }
                    *to += s.reduce_add(sum);
                }
            }
        }
    }
}

/// Similarities of channels in scratch, `[batch, heads, rows, cols]`.
pub(crate) struct Similarities<'a> {
    sizes: Sizes,
    units: usize,
    heads: usize,
    numbers: &'a mut [f32],
}

impl Similarities<'_> {
    /// In a dry run, sizes alone.
    pub(crate) fn view(&self) -> ArrayView4<'_, f32> {
        let Sizes { rows, cols, stride, .. } = self.sizes;
        let (heads, all) = (self.heads, self.sizes.all());
        let dim = (self.units.checked_div(heads).unwrap_or(0), heads, rows, cols);
        let strides = (heads * all, all, stride, 1);
        let none = self.numbers.is_empty() || dim.0 * rows * cols == 0;
        let (strides, numbers) = if none { ((0, 0, 0, 0), &[0.0][..]) } else { (strides, &*self.numbers) };
        ArrayView4::from_shape(dim.strides(strides), numbers).expect("rows of this stride")
    }

    /// Calls `of` with each row, counted over batch, heads and rows, which may
    /// be spoilt, and the row of `to` that is made of it.
    pub(crate) fn map(
        self,
        pass: &mut Pass<'_>,
        to: &mut Scratch<'_>,
        of: impl Fn(usize, &mut [f32], &mut [f32]) + Sync + Send,
    ) {
        let Self { sizes: Sizes { rows, cols, stride, .. }, units, numbers, .. } = self;
        let (all, wide, claims) = (self.sizes.all(), to.stride(), claim_words(units));
        pass.stage(
            || 0,
            2 * bytes_for::<u64>(claims),
            |mut arena| {
                let from = Parts::new(numbers, all, arena.take(claims));
                let to = Parts::new(to.numbers_mut(), rows * wide, arena.take(claims));
                let start = |_| ();
                parallel::for_each(parallel::threads(), units, start, |(), unit| {
                    let from = from.take(unit).chunks_exact_mut(stride.max(1));
                    let to = to.take(unit).chunks_exact_mut(wide.max(1));
                    for (row, (from, to)) in from.zip(to).take(rows).enumerate() {
                        of(unit * rows + row, &mut from[..cols], &mut to[..cols]);
                    }
                });
            },
        );
    }
}

/// Sums of a head added, divided by lengths and scaled.
struct Join<'a> {
    of: &'a Channels,
    sizes: Sizes,
    scale: f32,
    sums: &'a mut [f32],
}

impl Kernel for Join<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, sizes, scale, sums } = self;
        let Sizes { rows, cols, stride, .. } = sizes;
        let (sum, others) = sums.split_at_mut(sizes.sum());
        for other in others.chunks_exact(sizes.sum().max(1)) {
            for (to, x) in sum.chunks_mut(S::LANES).zip(other.chunks(S::LANES)) {
                let total = s.add(s.load_tail(to), s.load_tail(x));
                s.store_tail(to, total);
            }
        }
        let (gram, squares) = sum.split_at_mut(rows * stride);
        let (of_b, of_a) = squares.split_at_mut(stride);
        let length = |square: &mut f32| {
            let root = square.sqrt();
            *square = if root < LEAST { LEAST } else { root };
        };
        if of.unit {
            of_b.iter_mut().chain(of_a.iter_mut()).for_each(length);
        }
        for (row, length) in gram.chunks_exact_mut(stride.max(1)).zip(&*of_a) {
            let row = &mut row[..cols];
            if of.unit {
                let a = s.splat(*length);
                for (x, b) in row.chunks_mut(S::LANES).zip(of_b.chunks(S::LANES)) {
                    let share = s.div(s.div(s.load_tail(x), a), s.load_tail(b));
                    s.store_tail(x, share);
                }
            }
            each(s, row, |x| s.mul(x, s.splat(scale)));
        }
    }
}

/// What becomes of the similarities of a head.
struct Map<'a> {
    of: &'a Channels,
    sizes: Sizes,
    gram: &'a mut [f32],
    map: &'a mut [f32],
}

impl Kernel for Map<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of, sizes: Sizes { rows, cols, stride, panel, .. }, gram, map } = self;
        map.fill(0.0);
        for (c, row) in gram.chunks_exact_mut(stride.max(1)).take(rows).enumerate() {
            let row = &mut row[..cols];
            match of.row {
                RowOf::Relu => each(s, row, |x| s.max(s.splat(0.0), x)),
                RowOf::Softmax => {
                    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    each(s, row, |x| exp(s, s.sub(x, s.splat(most))));
                    let mut sum = s.splat(0.0);
                    for x in row.chunks(S::LANES) {
                        sum = s.add(sum, s.load_tail(x));
                    }
                    let sum = s.splat(s.reduce_add(sum));
                    each(s, row, |x| s.div(x, sum));
                }
            }
            for (col, &x) in row.iter().enumerate() {
                map[(c / panel * cols + col) * panel + c % panel] = x;
            }
        }
    }
}

#[inline(always)]
fn each<S: Simd>(s: S, row: &mut [f32], f: impl Fn(S::F) -> S::F) {
    for x in row.chunks_mut(S::LANES) {
        let y = f(s.load_tail(x));
        s.store_tail(x, y);
    }
}

/// Some tokens of a head through its map.
struct Apply<'a, 'b, 'c> {
    sizes: Sizes,
    v: AnyRows<'a>,
    map: &'a [f32],
    room: &'a mut &'b mut [f32],
    entry: usize,
    head: usize,
    first: usize,
    out: &'a AnyOut<'c>,
}

impl Kernel for Apply<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { sizes: Sizes { rows, cols, panel, .. }, v, map, room, entry, head, first, out } = self;
        let (left, tile) = room.split_at_mut(ROWS * cols);
        for at in (0..v.len()).step_by(ROWS) {
            let tokens = at..(at + ROWS).min(v.len());
            let n = tokens.len();
            v.part(tokens.clone()).pack_rows(s, left, cols);
            for block in 0..rows.div_ceil(panel) {
                let width = (rows - block * panel).min(panel).next_multiple_of(S::LANES);
                s.vectorize(Product {
                    a: Rows::of_slice(left, n, cols, cols),
                    b: Rows::of_slice(&map[block * cols * panel..], cols, width, panel),
                    c: tile,
                    ldc: panel,
                    update: Update::Set,
                });
                let mut to = out.take_block(entry, head, first + tokens.start..first + tokens.end, block);
                for i in 0..n {
                    to.write(s, i, &tile[i * panel..][..width], 1.0);
                }
            }
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
        for (len, rows, cols) in [
            (1, 1, 1),
            (49, 16, 16),
            (200, 5, 70),
            (2100, 33, 20),
            (130, 80, 3),
            (0, 4, 5),
            (7, 0, 3),
            (7, 3, 0),
        ] {
            for (row, unit, isa) in [(RowOf::Softmax, false), (RowOf::Softmax, true), (RowOf::Relu, true)]
                .into_iter()
                .flat_map(|(row, unit)| Isa::available().map(move |isa| (row, unit, isa)))
            {
                let (a, b, v) =
                    (array(1, (2, 4, len, rows)), array(2, (2, 2, len, cols)), array(3, (2, 4, len, cols)));
                let channels = Channels { isa, row, unit };
                let mut out = Array4::from_elem((2, 4, len, rows), f32::NAN);
                let to = std::cell::RefCell::new(&mut out);
                alone(|pass| {
                    let mut to = to.borrow_mut();
                    channels.run(
                        pass,
                        [a.view(), b.view(), v.view()],
                        4,
                        |h| 0.3 + h as f32,
                        Some(to.view_mut()),
                    )
                });
                for (entry, h) in [(0, 0), (1, 3)] {
                    let head = |x: &Array4<f32>, h: usize| {
                        x.slice(s![entry, h, .., ..]).map(|&x| Running::of(f64::from(x)))
                    };
                    let want = channels
                        .define([&head(&a, h), &head(&b, h / 2), &head(&v, h)], f64::from(0.3f32 + h as f32));
                    for (got, want) in out.slice(s![entry, h, .., ..]).iter().zip(&want) {
                        let share = (f64::from(*got) - want.value()).abs() / want.off().max(1e-300);
                        assert!(
                            share <= 1.0,
                            "{isa} {len} {rows} {cols} {row:?} {unit}: {got}, not {want:?}"
                        );
                        worst = worst.max(share);
                    }
                }
            }
        }
        println!("channels: {worst:.3} of the bound");
    }
}
