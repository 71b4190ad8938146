//! Whole rows of scores: attention whose weights are any function of the
//! scores of a query with all keys, which no running sum can have.
//!
//! A thread holds the scores of [`ROWS`] queries with all keys of a sequence.
//! Keys are packed for these rows, a block at a time; scores and outputs are
//! register tiles.

use std::ops::Range;

use ndarray::{ArrayView3, ArrayViewMut4, Axis};

use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::product;
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Sequence, Site, countable};
use crate::simd::any::{AnyArray, AnyRows, AnyRowsMut};
use crate::simd::exp::exp2_flush;
use crate::simd::mem::{Ahead, Arena, Heads, OutRows, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::{TILE_ROWS, Update};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::Pass;

/// Queries of a task.
const ROWS: usize = 8 * TILE_ROWS;
/// Keys of a block.
const KEYS: usize = 64;

/// What a hidden key weighs: its value takes no part, NaN or not, while that of
/// a key that weighs 0 does.
pub(crate) const HIDDEN: f32 = -0.0;

/// What weights are made of.
pub(crate) trait RowFn: Sync {
    /// Whether scores are no dot products, but sums of [`pair`](Self::pair) over
    /// the elements of query and key.
    const PAIRS: bool = false;

    /// What an element of a query of a head makes with the same one of some keys.
    /// Carries `#[inline(always)]`.
    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, _head: usize, _element: usize, q: S::F, k: S::F) -> S::F {
        s.mul(q, k)
    }

    /// Makes weights of the scaled scores of a query with all keys of its
    /// sequence, [`HIDDEN`] ones included, and those of `more` values, which are
    /// 0 yet. Carries `#[inline(always)]`.
    fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, row: &mut [f32], more: &mut [f32]);

    /// Whether [`spread`](Self::spread) is given the products of features and values
    /// instead of the squares of how far they are apart.
    const PRODUCTS: bool = false;

    /// Features of queries, `[batch, q_heads, q_len, value_dim]`, where weights depend
    /// on how far they are from values, or on their products.
    fn features(&self) -> Option<AnyArray<'_>> {
        None
    }

    /// Changes the weights of a query by the squared distances of its features from
    /// values. Carries `#[inline(always)]`.
    #[inline(always)]
    fn spread<S: Simd>(&self, _: S, _: &Site, _query: usize, _row: &mut [f32], _squares: &[f32]) {}
}

/// The same sizes, unless rows are longer than threads have room for.
pub(crate) fn checked(dims: Dims) -> Result<Dims> {
    const THREADS: usize = 1 << 12;
    if countable(&[THREADS, ROWS, dims.kv_len.saturating_add(KEYS), size_of::<f32>()]) {
        return Ok(dims);
    }
    Err(Error::too_large("k", format_args!("{} keys", dims.kv_len)))
}

/// A vector of a row; `rest` past its end.
#[inline(always)]
pub(crate) fn load_or<S: Simd>(s: S, x: &[f32], rest: f32) -> S::F {
    if x.len() >= S::LANES {
        return s.load(x);
    }
    let mut padded = [rest; MAX_LANES];
    padded[..x.len()].copy_from_slice(x);
    s.load(&padded)
}

/// The sum of what `f` makes of a row, whose rest counts as `rest`: at most 64
/// vectors are summed one after the other, and then their sums.
#[inline(always)]
pub(crate) fn sum<S: Simd>(s: S, row: &[f32], rest: f32, f: impl Fn(S::F) -> S::F) -> f32 {
    let mut total = s.splat(0.0);
    for block in row.chunks(64 * S::LANES) {
        let mut sum = s.splat(0.0);
        for x in block.chunks(S::LANES) {
            sum = s.add(sum, f(load_or(s, x, rest)));
        }
        total = s.add(total, sum);
    }
    s.reduce_add(total)
}

/// What of a range lies between marks, which rise.
pub(crate) fn between(range: Range<usize>, marks: &[usize]) -> impl Iterator<Item = Range<usize>> {
    let starts = std::iter::once(range.start).chain(marks.iter().map(|&mark| mark + 1));
    starts.zip(marks.iter().copied().chain(std::iter::once(range.end))).map(|(start, end)| start..end)
}

/// Multiplies a row.
#[inline(always)]
pub(crate) fn scale<S: Simd>(s: S, row: &mut [f32], factor: f32) {
    for x in row.chunks_mut(S::LANES) {
        let scaled = s.mul(s.load_tail(x), s.splat(factor));
        s.store_tail(x, scaled);
    }
}

/// Makes weights that sum to 1 of scores. A score of -inf hides its key.
#[inline(always)]
pub(crate) fn softmax<S: Simd>(s: S, row: &mut [f32]) {
    let mut most = s.splat(f32::NEG_INFINITY);
    for x in row.chunks(S::LANES) {
        // In this order a NaN is left out.
        most = s.max(load_or(s, x, f32::NEG_INFINITY), most);
    }
    let most = s.reduce_max(most);
    let base = s.splat(if most == f32::NEG_INFINITY { 0.0 } else { most });
    let exponential = |x: S::F| {
        let weight = exp2_flush(s, s.mul(s.sub(x, base), s.splat(std::f32::consts::LOG2_E)));
        s.select(s.lt(x, s.splat(f32::MIN)), s.splat(HIDDEN), weight)
    };
    for x in row.chunks_mut(S::LANES) {
        let weight = exponential(load_or(s, x, f32::NEG_INFINITY));
        s.store_tail(x, weight);
    }
    let sum = sum(s, row, 0.0, |x| x);
    let share = s.splat(if sum == 0.0 { 0.0 } else { 1.0 / sum });
    for x in row.chunks_mut(S::LANES) {
        let weight = s.mul(load_or(s, x, 0.0), share);
        s.store_tail(x, weight);
    }
}

/// What is infinite though it was made of `finite` numbers becomes the largest that
/// is not: what is visible must not look like what an infinite factor hides.
pub(crate) fn saturate(row: &mut [f32], finite: impl FnOnce() -> bool) {
    let some = row.iter().fold(false, |some, x| some | (x.abs() == f32::INFINITY));
    if some && finite() {
        for x in row.iter_mut().filter(|x| x.is_infinite()) {
            *x = f32::MAX.copysign(*x);
        }
    }
}

/// Sizes of what one thread works in.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    head_dim: usize,
    /// Scores of a row, rounded up to blocks.
    keys: usize,
    /// Weights of more values.
    more: usize,
    /// `value_dim`, rounded up to vectors.
    width: usize,
    /// Features of a query, which may be none.
    features: usize,
}

/// What one thread works in.
struct Room<'a> {
    /// `[ROWS, head_dim]`
    q: &'a mut [f32],
    /// `[head_dim, KEYS]`
    k: &'a mut [f32],
    /// `[KEYS, width]`
    v: &'a mut [f32],
    /// `[ROWS, keys]`
    scores: &'a mut [f32],
    /// `[ROWS, more]`
    more: &'a mut [f32],
    /// `[ROWS, width]`
    out: &'a mut [f32],
    /// `[ROWS, features]`, `[features, KEYS]` and `[ROWS, keys]` if there are some.
    apart: [&'a mut [f32]; 3],
}

impl<'a> Room<'a> {
    fn sizes(g: Geometry) -> [usize; 9] {
        let Geometry { head_dim, keys, more, width, features } = g;
        let squares = if features > 0 { ROWS * keys } else { 0 };
        let own = [ROWS * head_dim, head_dim * KEYS, KEYS * width, ROWS * keys, ROWS * more, ROWS * width];
        let [a, b, c, d, e, f] = own;
        [a, b, c, d, e, f, ROWS * features, features * KEYS, squares]
    }

    fn bytes(g: Geometry) -> usize {
        Self::sizes(g).iter().map(|&n| bytes_for::<f32>(n)).sum()
    }

    fn take(mut arena: Arena<'a>, g: Geometry) -> Self {
        let [q, k, v, scores, more, out, x, columns, squares] = Self::sizes(g).map(|n| arena.take(n));
        Self { q, k, v, scores, more, out, apart: [x, columns, squares] }
    }
}

/// Writes the values, and `more` values `[heads | 1, count, value_dim]`, each
/// times its weight. Scores are multiplied by `scale`. Sizes have been
/// [`checked`].
pub(crate) fn run<Q: Element, K: Element, O: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    (x, dims): (Qkv<'_, Q, K, O>, &Dims),
    scale: f32,
    f: &impl RowFn,
    more: Option<ArrayView3<'_, f32>>,
    out: Option<ArrayViewMut4<'_, O>>,
) {
    let (batch, heads, len, head_dim) = x.q.dim();
    let sequence = |i| x.lengths.sequence(dims, i);
    let longest = |of: fn(&Sequence) -> usize| (0..dims.batch).map(|i| of(&sequence(i))).max().unwrap_or(0);
    let (queries, keys) = (longest(|x| x.queries.len()), longest(|x| x.keys.len()));
    let g = Geometry {
        head_dim,
        keys: keys.next_multiple_of(KEYS),
        more: more.map_or(0, |more| more.dim().1),
        width: dims.value_dim.next_multiple_of(MAX_LANES),
        features: if f.features().is_some() { dims.value_dim } else { 0 },
    };
    let (workers, rows) = (parallel::threads(), batch * heads * len);
    let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for_shares(workers, Room::bytes(g));
    let pairs = || (0..dims.batch).map(|i| sequence(i).queries.len() * (sequence(i).keys.len() + g.more));
    let columns = head_dim.saturating_add(dims.value_dim).saturating_add(g.features);
    let flops = || (2 * heads).saturating_mul(columns) as u64 * pairs().sum::<usize>() as u64;
    pass.stage(flops, bytes, |mut arena| {
        let Some(out) = out.filter(|out| !out.is_empty()) else { return };
        let out = O::any_out(OutRows::new(out, arena.take(claim_words(rows))));
        let any = |x| K::any(Heads::new(x));
        let (q, k, v) = (Q::any(Heads::new(x.q)), any(x.k), any(x.v));
        let more = more.map(|more| AnyArray::F32(Heads::new(more.insert_axis(Axis(0)))));
        let shares = arena.shares(workers, Room::bytes(g));
        let start = |worker| Room::take(shares.take(worker), g);
        let (blocks, group) = (queries.div_ceil(ROWS), dims.q_heads / dims.kv_heads.max(1));
        parallel::for_each(workers, dims.batch * heads * blocks, start, |room, task| {
            let (index, head, first) = (task / blocks / heads, task / blocks % heads, task % blocks * ROWS);
            let of = sequence(index);
            let rows = first..(first + ROWS).min(of.queries.len());
            if rows.is_empty() {
                return;
            }
            let at = of.queries.start + rows.start..of.queries.start + rows.end;
            isa.dispatch(Block {
                g,
                q: q.rows(of.batch, head, &at),
                k: k.rows(of.batch, head / group, &of.keys),
                v: v.rows(of.batch, head / group, &of.keys),
                features: f.features().map(|x| x.rows(of.batch, head, &at)),
                more: more.map(|more| more.rows(0, head.min(more.heads() - 1), &(0..g.more))),
                scale,
                f,
                site: of.site(head),
                first,
                room,
                out: out.take(of.batch, head, at),
            });
        });
    });
}

/// Some queries of one head.
struct Block<'a, 'b, 'c, F> {
    g: Geometry,
    q: AnyRows<'a>,
    k: AnyRows<'a>,
    v: AnyRows<'a>,
    features: Option<AnyRows<'a>>,
    more: Option<AnyRows<'a>>,
    scale: f32,
    f: &'a F,
    site: Site,
    /// The first query.
    first: usize,
    room: &'a mut Room<'b>,
    out: AnyRowsMut<'c>,
}

impl<F: RowFn> Kernel for Block<'_, '_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { g, q, k, v, features, more, scale, f, site, first, room, mut out } = self;
        let Geometry { head_dim, width, .. } = g;
        let (rows, keys, stride) = (q.len(), k.len(), g.keys);
        let mut nothing = Ahead::nothing();
        let ahead = &mut nothing;
        q.pack_rows(s, room.q, head_dim);
        // Columns past the last are not packed.
        room.v.fill(0.0);
        for at in (0..keys).step_by(KEYS) {
            let part = k.part(at..(at + KEYS).min(keys));
            part.pack_columns(s, room.k, KEYS);
            let a = Rows::of_slice(room.q, rows, head_dim, head_dim);
            let columns = part.len().next_multiple_of(S::LANES);
            let to = &mut room.scores[at..];
            if !F::PAIRS {
                product(s, a, (&*room.k, KEYS), columns, (to, stride), Update::Set, ahead);
                continue;
            }
            for i in 0..rows {
                for col in (0..columns).step_by(S::LANES) {
                    let mut sum = s.splat(0.0);
                    for d in 0..head_dim {
                        let (q, k) = (s.splat(room.q[i * head_dim + d]), s.load(&room.k[d * KEYS + col..]));
                        sum = s.add(sum, f.pair(s, site.head, d, q, k));
                    }
                    s.store(&mut to[i * stride + col..], sum);
                }
            }
        }
        // Rows without keys have weights of more values too: 0.
        for i in 0..rows {
            let row = &mut room.scores[i * stride..][..keys];
            for x in row.chunks_mut(S::LANES) {
                let scaled = s.mul(s.load_tail(x), s.splat(scale));
                s.store_tail(x, scaled);
            }
            let finite = |x: &AnyRows<'_>, i: usize| (0..head_dim).all(|c| x.at(i, c).is_finite());
            if row.iter().fold(false, |some, x| some | (x.abs() == f32::INFINITY)) && finite(&q, i) {
                for (j, x) in row.iter_mut().enumerate() {
                    saturate(std::slice::from_mut(x), || finite(&k, j));
                }
            }
            let more = &mut room.more[i * g.more..][..g.more];
            more.fill(0.0);
            f.apply(s, &site, first + i, row, more);
        }
        if let Some(features) = features {
            compare(s, g, &mut room.apart, features, v, F::PRODUCTS);
            for i in 0..rows {
                let (row, squares) = (&mut room.scores[i * stride..], &room.apart[2][i * stride..]);
                // Without columns all are 0 apart, and there is nothing to write.
                f.spread(s, &site, first + i, &mut row[..keys], squares.get(..keys).unwrap_or_default());
            }
        }
        room.out.fill(0.0);
        for at in (0..keys).step_by(KEYS) {
            let part = v.part(at..(at + KEYS).min(keys));
            part.pack_rows(s, room.v, width);
            if (0..part.len()).all(|j| is_finite(s, &room.v[j * width..][..width])) {
                let a = Rows::of_slice(&room.scores[at..], rows, part.len(), stride);
                product(s, a, (&*room.v, width), width, (&mut *room.out, width), Update::Add, ahead);
                continue;
            }
            for (i, out) in room.out.chunks_exact_mut(width).take(rows).enumerate() {
                for (j, v) in room.v.chunks_exact(width).take(part.len()).enumerate() {
                    let weight = room.scores[i * stride + at + j];
                    if weight.to_bits() != HIDDEN.to_bits() {
                        add(s, out, weight, v);
                    }
                }
            }
        }
        for at in (0..g.more).step_by(KEYS) {
            let Some(part) = more.map(|more| more.part(at..(at + KEYS).min(g.more))) else { break };
            part.pack_rows(s, room.v, width);
            let a = Rows::of_slice(&room.more[at..], rows, part.len(), g.more);
            product(s, a, (&*room.v, width), width, (&mut *room.out, width), Update::Add, ahead);
        }
        for (i, row) in room.out.chunks_exact(width.max(1)).take(rows).enumerate() {
            out.write(s, i, row, 1.0);
        }
    }
}

/// Squared distances of rows from values, or their `products`. Differences come first: of
/// what is nearly the same, products would leave nothing.
#[inline(always)]
fn compare<S: Simd>(
    s: S,
    g: Geometry,
    room: &mut [&mut [f32]; 3],
    features: AnyRows<'_>,
    v: AnyRows<'_>,
    products: bool,
) {
    let [x, columns, squares] = room;
    let (rows, n) = (features.len(), g.features);
    if n == 0 {
        return;
    }
    features.pack_rows(s, x, n);
    for at in (0..v.len()).step_by(KEYS) {
        let part = v.part(at..(at + KEYS).min(v.len()));
        part.pack_columns(s, columns, KEYS);
        for i in 0..rows {
            for col in (0..part.len()).step_by(S::LANES) {
                let mut sum = s.splat(0.0);
                for (c, &x) in x[i * n..][..n].iter().enumerate() {
                    let (x, y) = (s.splat(x), s.load(&columns[c * KEYS + col..]));
                    let apart = s.sub(x, y);
                    sum = if products { s.mul_add(x, y, sum) } else { s.mul_add(apart, apart, sum) };
                }
                s.store(&mut squares[i * g.keys + at + col..], sum);
            }
        }
    }
}

#[inline(always)]
fn is_finite<S: Simd>(s: S, row: &[f32]) -> bool {
    let mut zero = s.splat(0.0);
    for x in row.chunks_exact(S::LANES) {
        zero = s.mul_add(s.load(x), s.splat(0.0), zero);
    }
    s.reduce_add(zero) == 0.0
}

#[inline(always)]
fn add<S: Simd>(s: S, out: &mut [f32], weight: f32, row: &[f32]) {
    for (out, x) in out.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
        let sum = s.mul_add(s.splat(weight), s.load(x), s.load(out));
        s.store(out, sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::attend::attend;
    use crate::definition::heads::of_heads;
    use crate::definition::number::{Real, Running};
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use crate::testing::qkv::Qkvs;
    use ndarray::Array4;

    /// Softmax over the keys before the query's place and at it; the second of
    /// three more values counts as often as the query has keys.
    struct Causal;

    impl RowFn for Causal {
        #[inline(always)]
        fn apply<S: Simd>(&self, s: S, site: &Site, query: usize, row: &mut [f32], more: &mut [f32]) {
            let seen = (site.q_start() + query as isize + 1).max(0) as usize;
            let (row, later) = row.split_at_mut(seen);
            later.fill(HIDDEN);
            softmax(s, row);
            more[1] = seen as f32;
        }
    }

    #[test]
    fn rows_become_weights() {
        for (q_len, kv_len, dim, value_dim) in
            [(1, 1, 3, 5), (49, 130, 17, 16), (5, 3, 8, 1), (2, 64, 0, 33), (3, 4, 2, 0)]
        {
            let mut x = Qkvs::new([2, 4, 2, q_len, kv_len, dim, value_dim], 3);
            // Hidden from all but the last query.
            x.k.slice_mut(ndarray::s![.., .., kv_len - 1, ..]).fill(f32::NAN);
            x.v.slice_mut(ndarray::s![.., .., kv_len - 1, ..]).fill(f32::NAN);
            let more = array(5, (1, 3, value_dim));
            let dims = x.qkv().dims().unwrap();
            let want = of_heads::<Running>(&dims, &x.qkv().lengths, |head| {
                let (q, k, v) = (
                    head.rows(&x.q.view(), &head.queries),
                    head.rows(&x.k.view(), &head.keys),
                    head.rows(&x.v.view(), &head.keys),
                );
                let behind = |i: usize| kv_len as isize - q_len as isize + i as isize;
                let mut out = attend([&q, &k, &v], 0.3, |i, j| j as isize <= behind(i), |_, _, x| x);
                for ((i, c), out) in out.indexed_iter_mut() {
                    let seen = (behind(i) + 1).max(0) as f64;
                    *out = *out + Running::of(seen) * Running::of(f64::from(more[[0, 1, c]]));
                }
                out
            });
            for isa in Isa::available() {
                let mut out = Array4::<f32>::from_elem(want.dim(), 7.0);
                let to = std::cell::RefCell::new(&mut out);
                alone(|pass| {
                    let (out, more) = (to.borrow_mut(), Some(more.view()));
                    let mut out = out;
                    run(pass, isa, (x.qkv(), &dims), 0.3, &Causal, more, Some(out.view_mut()));
                    Ok(())
                });
                for ((at, got), want) in out.indexed_iter().zip(&want) {
                    let off = (f64::from(*got) - want.value()).abs();
                    let nan = got.is_nan() && want.value().is_nan();
                    assert!(off <= want.off() || nan, "{isa} {at:?}: {got}, not {want:?}");
                }
            }
        }
    }
}
