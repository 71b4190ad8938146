//! The register tile: the one matrix product under every engine.

use super::mem::{Ahead, Rows, prefetch_l2, spans};
use super::{Kernel, Simd};

/// Steps of a tile between two tests of its loop.
const UNROLL: usize = 4;

/// Rows of the register tile.
pub(crate) const TILE_ROWS: usize = 6;

/// What a product does with what was in its output. Products are summed by
/// themselves first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Update<'a> {
    /// `C = A B`
    Set,
    /// `C += A B`
    Add,
    /// `C = diag(factors) C + A B`, where what a factor below 1 made smaller
    /// than it was and than [`NEGLIGIBLE`] becomes 0: a state that decays must
    /// not end in subnormal numbers, which cost hundreds of cycles each.
    Decay(&'a [f32]),
    /// The same whatever the factor: `A B` makes a state smaller too.
    Correct(&'a [f32]),
}

/// What decays below it counts as 0.
pub(crate) const NEGLIGIBLE: f32 = 1.0 / (1u128 << 100) as f32;

/// `x`, or 0 if it is [`NEGLIGIBLE`].
#[inline(always)]
pub(crate) fn flush<S: Simd>(s: S, x: S::F) -> S::F {
    s.select(s.lt(s.abs(x), s.splat(NEGLIGIBLE)), s.splat(0.0), x)
}

/// Below which a state is dropped that a factor has made smaller: 0 where the
/// factor lets it be, unless something else `corrects` it.
#[inline(always)]
pub(crate) fn negligible(factor: f32, corrects: bool) -> f32 {
    if factor < 1.0 || corrects { NEGLIGIBLE } else { 0.0 }
}

/// `now`, or 0 if it is smaller than `before` and than `limit`: small numbers
/// stay, small rests of larger ones do not.
#[inline(always)]
pub(crate) fn drop_rest<S: Simd>(s: S, now: S::F, before: S::F, limit: S::F) -> S::F {
    s.select(s.lt(s.abs(now), s.min(s.abs(before), limit)), s.splat(0.0), now)
}

/// Products with factors, of which those below 1 leave 0 rather than less
/// than [`NEGLIGIBLE`].
#[inline(always)]
pub(crate) fn decay<S: Simd>(s: S, x: S::F, factors: S::F) -> S::F {
    let limit = s.select(s.lt(factors, s.splat(1.0)), s.splat(NEGLIGIBLE), s.splat(0.0));
    let now = s.mul(x, factors);
    s.select(s.lt(s.abs(now), limit), s.splat(0.0), now)
}

/// `C (+)= A B` for up to a panel of columns: `A` is `[m, k]` with
/// neighbouring columns, `B` is `[k, n]` with neighbouring columns and `n` a
/// multiple of the lanes, `C` is `[m, n]` with rows `ldc` apart.
#[derive(Debug)]
pub(crate) struct Product<'a> {
    pub(crate) a: Rows<'a, f32>,
    pub(crate) b: Rows<'a, f32>,
    pub(crate) c: &'a mut [f32],
    pub(crate) ldc: usize,
    pub(crate) update: Update<'a>,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.compute::<S, false>(s, |_| std::ptr::null());
    }
}

/// A [`Product`] during which the cache lines of `ahead` are prefetched.
#[derive(Debug)]
pub(crate) struct ProductAhead<'a> {
    pub(crate) product: Product<'a>,
    pub(crate) ahead: &'a mut Ahead,
}

impl Kernel for ProductAhead<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { product, ahead } = self;
        product.compute::<S, true>(s, |lines| ahead.take(lines));
    }
}

/// Rows of the next tile, where so many are left.
#[inline(always)]
pub(super) fn tile_height(left: usize) -> usize {
    // A flat tile would wait for its sums: two of half the rows instead.
    let split = left > TILE_ROWS && left < 2 * TILE_ROWS;
    if split { left.div_ceil(2) } else { left.min(TILE_ROWS) }
}

impl Product<'_> {
    /// With `AHEAD`, `lines` gives the address of as many cache lines to
    /// prefetch during one tile, or null.
    #[inline(always)]
    fn compute<S: Simd, const AHEAD: bool>(self, s: S, mut lines: impl FnMut(usize) -> *const u8) {
        let (m, k, n) = (self.a.len(), self.a.cols(), self.b.cols());
        if m == 0 || n == 0 {
            return;
        }
        assert!(self.a.is_unit() && self.b.is_unit() && self.b.len() == k);
        assert!(n.is_multiple_of(S::LANES) && n <= S::LANES * S::TILE_VECTORS);
        assert!(n <= self.ldc && spans(m, self.ldc, n) <= self.c.len());
        if let Update::Decay(factors) | Update::Correct(factors) = self.update {
            assert!(factors.len() >= m);
        }
        let mut i = 0;
        while i < m {
            let rows = tile_height(m - i);
            // SAFETY: the assertions above.
            unsafe {
                let operands = Operands {
                    a: self.a.as_ptr().offset(i as isize * self.a.row_stride()),
                    lda: self.a.row_stride(),
                    b: self.b.as_ptr(),
                    ldb: self.b.row_stride(),
                    k,
                    ahead: if AHEAD { lines(k / UNROLL) } else { std::ptr::null() },
                    c: self.c.as_mut_ptr().add(i * self.ldc),
                    ldc: self.ldc,
                    keep: match self.update {
                        Update::Set => Keep::Nothing,
                        Update::Add => Keep::All,
                        Update::Decay(factors) => Keep::Shares(factors.as_ptr().add(i), false),
                        Update::Correct(factors) => Keep::Shares(factors.as_ptr().add(i), true),
                    },
                };
                by_width::<S, AHEAD>(s, rows, n / S::LANES, operands);
            }
            i += rows;
        }
    }
}

#[derive(Clone, Copy)]
struct Operands {
    a: *const f32,
    lda: isize,
    b: *const f32,
    ldb: isize,
    k: usize,
    /// Lines to prefetch.
    ahead: *const u8,
    c: *mut f32,
    ldc: usize,
    keep: Keep,
}

/// [`Update`] from some row on.
#[derive(Clone, Copy)]
enum Keep {
    Nothing,
    All,
    /// One factor a row, and whether the product corrects.
    Shares(*const f32, bool),
}

#[inline(always)]
unsafe fn by_width<S: Simd, const AHEAD: bool>(s: S, rows: usize, vectors: usize, x: Operands) {
    // SAFETY: the caller's. Widths beyond TILE_VECTORS are not compiled in.
    unsafe {
        match vectors {
            4 if S::TILE_VECTORS >= 4 => by_height::<S, 4, AHEAD>(s, rows, x),
            3 if S::TILE_VECTORS >= 3 => by_height::<S, 3, AHEAD>(s, rows, x),
            2 if S::TILE_VECTORS >= 2 => by_height::<S, 2, AHEAD>(s, rows, x),
            _ => by_height::<S, 1, AHEAD>(s, rows, x),
        }
    }
}

#[inline(always)]
unsafe fn by_height<S: Simd, const NV: usize, const AHEAD: bool>(s: S, rows: usize, x: Operands) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            6 => tile::<S, 6, NV, AHEAD>(s, x),
            5 => tile::<S, 5, NV, AHEAD>(s, x),
            4 => tile::<S, 4, NV, AHEAD>(s, x),
            3 => tile::<S, 3, NV, AHEAD>(s, x),
            2 => tile::<S, 2, NV, AHEAD>(s, x),
            _ => tile::<S, 1, NV, AHEAD>(s, x),
        }
    }
}

/// `MR` rows by `NV` vectors of accumulators. Each element is one chain of
/// multiply-adds over `k`, so its value does not depend on the tile's shape.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const AHEAD: bool>(s: S, x: Operands) {
    let mut acc = [[s.splat(0.0); NV]; MR];
    let (mut a, mut b, mut k) = (x.a, x.b, x.k);
    let mut ahead = x.ahead;
    // SAFETY: the caller's: A has MR rows of k, B has k rows of NV vectors, C
    // has MR rows of NV vectors.
    unsafe {
        while k >= UNROLL {
            for u in 0..UNROLL {
                step(s, &mut acc, a.add(u), x.lda, b.offset(u as isize * x.ldb));
            }
            if AHEAD && !x.ahead.is_null() {
                prefetch_l2(ahead);
                ahead = ahead.wrapping_add(64);
            }
            a = a.add(UNROLL);
            b = b.offset(UNROLL as isize * x.ldb);
            k -= UNROLL;
        }
        while k > 0 {
            step(s, &mut acc, a, x.lda, b);
            a = a.add(1);
            b = b.offset(x.ldb);
            k -= 1;
        }
        for r in 0..MR {
            for v in 0..NV {
                let c = x.c.add(r * x.ldc + v * S::LANES);
                let sum = match x.keep {
                    Keep::Nothing => acc[r][v],
                    Keep::All => s.add(s.load_ptr(c), acc[r][v]),
                    Keep::Shares(factors, corrects) => {
                        let (before, factor) = (s.load_ptr(c), *factors.add(r));
                        let now = s.mul_add(before, s.splat(factor), acc[r][v]);
                        drop_rest(s, now, before, s.splat(negligible(factor, corrects)))
                    }
                };
                s.store_ptr(c, sum);
            }
        }
    }
}

/// One column of A times one row of B.
#[inline(always)]
unsafe fn step<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    acc: &mut [[S::F; NV]; MR],
    a: *const f32,
    lda: isize,
    b: *const f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut row = [s.splat(0.0); NV];
        for v in 0..NV {
            row[v] = s.load_ptr(b.add(v * S::LANES));
        }
        for r in 0..MR {
            let x = s.splat(*a.offset(r as isize * lda));
            for v in 0..NV {
                acc[r][v] = s.mul_add(x, row[v], acc[r][v]);
            }
        }
    }
}
