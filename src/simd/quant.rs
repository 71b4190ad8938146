//! Rows of a cache: written in their storage type, quantised to `int8` with
//! one scale a row or to fewer bits in groups, and unpacked.

use half::f16;

use super::mem::Rows;
use super::pack::load;
use super::storage::Storage;
use super::{Kernel, MAX_LANES, Simd};

/// `to`, `[rows, cols]` without gaps, are the rows of `from`, rounded to the
/// type `U`.
pub(crate) struct StoreRows<'a, T, U> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) to: &'a mut [U],
}

impl<T: Storage, U: Storage> Kernel for StoreRows<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.from.cols();
        if cols == 0 {
            return;
        }
        for (i, to) in self.to.chunks_exact_mut(cols).enumerate() {
            for (v, to) in to.chunks_mut(S::LANES).enumerate() {
                U::store_tail(s, to, load(s, &self.from, i, v * S::LANES));
            }
        }
    }
}

/// The smallest scale of a row: what is smaller than half of it is 0, and no
/// product of a code with a scale is subnormal.
pub(crate) const SMALLEST_SCALE: f32 = f32::MIN_POSITIVE;
/// The largest scale whose product with the largest code is finite.
pub(crate) const LARGEST_SCALE: f32 = f32::from_bits(0x7c01_0203);

/// The largest code.
pub(crate) const LARGEST_CODE: f32 = 127.0;

/// Each row of `from` as `codes`, `[rows, cols]` without gaps, and one scale:
/// `scale = max|x| / 127`, at least [`SMALLEST_SCALE`]; `code = round(x /
/// scale)`, ties to even. The scale of a row with a NaN or an infinity is NaN.
///
/// Every operation is exact or correctly rounded, so that all instruction sets
/// give the same codes.
pub(crate) struct Quantize<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) codes: &'a mut [i8],
    pub(crate) scales: &'a mut [f32],
}

impl<T: Storage> Kernel for Quantize<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.from.cols();
        assert_eq!(self.codes.len(), self.scales.len() * cols);
        for (i, scale) in self.scales.iter_mut().enumerate() {
            let (mut max, mut zero) = (s.splat(0.0), s.splat(0.0));
            for col in (0..cols).step_by(S::LANES) {
                let x = load(s, &self.from, i, col);
                max = s.max(s.abs(x), max);
                // NaN and infinity times 0 are NaN, and stay.
                zero = s.mul_add(x, s.splat(0.0), zero);
            }
            *scale = if s.reduce_add(zero) == 0.0 {
                // Of the largest numbers the scale is rounded up, and its
                // product with the largest code would be infinite.
                (s.reduce_max(max) / LARGEST_CODE).clamp(SMALLEST_SCALE, LARGEST_SCALE)
            } else {
                f32::NAN
            };
            for (v, to) in self.codes[i * cols..][..cols].chunks_mut(S::LANES).enumerate() {
                let x = s.div(load(s, &self.from, i, v * S::LANES), s.splat(*scale));
                // The bounds take NaN for a number.
                let x = s.max(s.min(x, s.splat(LARGEST_CODE)), s.splat(-LARGEST_CODE));
                s.store_i8_tail(to, x);
            }
        }
    }
}

/// `to[i * stride + c] = codes[i][c] * scales[i]` for every row.
pub(crate) struct Dequantize<'a> {
    pub(crate) codes: Rows<'a, i8>,
    pub(crate) scales: &'a [f32],
    pub(crate) to: &'a mut [f32],
    pub(crate) stride: usize,
}

impl Kernel for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.codes.cols();
        if cols == 0 {
            return;
        }
        for (i, &scale) in self.scales[..self.codes.len()].iter().enumerate() {
            let scale = s.splat(scale);
            let row = self.codes.row(i).expect("codes of a row are neighbours");
            let to = &mut self.to[i * self.stride..][..cols];
            let whole = cols / S::LANES * S::LANES;
            for (to, x) in to.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
                s.store(to, s.mul(s.load_i8(x), scale));
            }
            if whole < cols {
                s.store_tail(&mut to[whole..], s.mul(s.load_i8_tail(&row[whole..]), scale));
            }
        }
    }
}

/// How the elements of a group become codes of a few bits, and these numbers:
/// `x ~ code * scale + offset`.
pub trait Uniform: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// Bits of a code: 2, 4 or 8.
    const BITS: u32;
    /// Elements of a group, a multiple of 32; the last one of a row may have
    /// fewer. `None` is the row.
    const GROUP: Option<usize>;
    /// Numbers that a group stores.
    const PARAMS: usize;
    /// What they are stored as.
    type Param: Storage;

    /// The parameters of a group, from its least and its largest element, as
    /// they are stored. `first` says which of two elements of equal magnitude
    /// comes first, the positive one or not.
    fn params(min: f32, max: f32, first: impl FnOnce() -> bool) -> [Self::Param; 2];

    /// Scale and offset from what is stored.
    fn affine(params: &[f32]) -> [f32; 2];

    /// Codes of elements, not yet rounded down, from 0 to the largest.
    fn code<S: Simd>(s: S, x: S::F, group: &Group<S>) -> S::F;

    /// What codes are made with.
    fn group<S: Simd>(s: S, min: f32, max: f32, params: &[Self::Param; 2]) -> Group<S>;
}

/// What the codes of a group are made with.
pub struct Group<S: Simd> {
    pub(crate) factor: S::F,
    pub(crate) least: S::F,
}

/// Bytes of the codes of a row.
pub(crate) const fn code_bytes<U: Uniform>(cols: usize) -> usize {
    let group = match U::GROUP {
        Some(group) => group,
        None => cols,
    };
    if cols == 0 {
        return 0;
    }
    let per_byte = 8 / U::BITS as usize;
    cols / group * group.div_ceil(per_byte) + (cols % group).div_ceil(per_byte)
}

/// Groups of a row.
pub(crate) const fn groups<U: Uniform>(cols: usize) -> usize {
    match U::GROUP {
        Some(group) => cols.div_ceil(group),
        None => 1,
    }
}

/// Least and largest of some elements of a row, NaN where one is not finite.
#[inline(always)]
pub(crate) fn extent<S: Simd, T: Storage>(s: S, x: &Rows<'_, T>, row: usize) -> [f32; 2] {
    let cols = x.cols();
    let (mut low, mut high, mut zero) =
        (s.splat(f32::NEG_INFINITY), s.splat(f32::NEG_INFINITY), s.splat(0.0));
    for col in (0..cols).step_by(S::LANES) {
        let x = load(s, x, row, col);
        let here = s.mask(u64::MAX >> (64 - (cols - col).min(S::LANES)));
        let or_nothing = |x| s.select(here, x, s.splat(f32::NEG_INFINITY));
        high = s.max(or_nothing(x), high);
        low = s.max(or_nothing(s.sub(s.splat(0.0), x)), low);
        // NaN and infinity times 0 are NaN, and stay.
        zero = s.mul_add(x, s.splat(0.0), zero);
    }
    if s.reduce_add(zero) == 0.0 { [-s.reduce_max(low), s.reduce_max(high)] } else { [f32::NAN; 2] }
}

/// Rows of `from` as codes and parameters of their groups. The parameters of a
/// group with a NaN or an infinity are NaN.
///
/// Every operation is exact or correctly rounded, so that all instruction sets
/// give the same codes.
pub(crate) struct PackGroups<'a, T, U: Uniform> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) codes: &'a mut [i8],
    pub(crate) params: &'a mut [U::Param],
}

impl<T: Storage, U: Uniform> Kernel for PackGroups<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.from.cols();
        if cols == 0 {
            return;
        }
        let (bytes, of_row) = (code_bytes::<U>(cols), groups::<U>(cols) * U::PARAMS);
        let rows = self.codes.chunks_exact_mut(bytes).zip(self.params.chunks_exact_mut(of_row));
        for (i, (mut codes, params)) in rows.enumerate() {
            for (g, to) in params.chunks_exact_mut(U::PARAMS).enumerate() {
                let group = U::GROUP.unwrap_or(cols);
                let part = self.from.part(i..i + 1, g * group..((g + 1) * group).min(cols));
                let [min, max] = extent(s, &part, 0);
                let first = || part.elements(0, 0..part.cols()).map(T::widen).find(|x| x.abs() == max);
                let stored = U::params(min, max, || first().is_some_and(|x| x > 0.0));
                to.copy_from_slice(&stored[..U::PARAMS]);
                let group = U::group(s, min, max, &stored);
                let code = |col: usize| {
                    if col >= part.cols() {
                        return s.splat(0.0);
                    }
                    let code = U::code(s, load(s, &part, 0, col), &group);
                    let most = s.splat(((1u32 << U::BITS) - 1) as f32);
                    // The bounds take NaN for a number.
                    let code = s.max(s.min(code, most), s.splat(0.0));
                    s.sub(code, s.fract(code))
                };
                let (own, rest) =
                    std::mem::take(&mut codes).split_at_mut(part.cols().div_ceil(8 / U::BITS as usize));
                pack_digits(s, U::BITS, own, code);
                codes = rest;
            }
        }
    }
}

/// Bytes of digits: byte `j` of `n` holds digit `j` in its lowest bits, then
/// digit `j + n`, and so on; what is stored is less by 128.
#[inline(always)]
pub(crate) fn pack_digits<S: Simd>(s: S, bits: u32, bytes: &mut [i8], digit: impl Fn(usize) -> S::F) {
    let n = bytes.len();
    for (v, to) in bytes.chunks_mut(S::LANES).enumerate() {
        let mut sum = s.splat(-128.0);
        for place in 0..(8 / bits) as usize {
            let power = s.splat((1u32 << (bits as usize * place)) as f32);
            sum = s.mul_add(digit(v * S::LANES + place * n), power, sum);
        }
        s.store_i8_tail(to, sum);
    }
}

/// Hands the digits of bytes on, by vectors: where the first of them is, and
/// how many there are in the vector.
#[inline(always)]
pub(crate) fn unpack_digits<S: Simd>(
    s: S,
    bits: u32,
    bytes: &[i8],
    mut then: impl FnMut(usize, usize, S::F),
) {
    let (n, places) = (bytes.len(), 8 / bits);
    for (v, from) in bytes.chunks(S::LANES).enumerate() {
        let mut padded = [0; MAX_LANES];
        let whole = from.len() == S::LANES;
        if !whole {
            padded[..from.len()].copy_from_slice(from);
        }
        let bytes = if whole { from } else { &padded };
        for place in 0..places {
            then(v * S::LANES + place as usize * n, from.len(), s.load_digits(bytes, bits, place));
        }
    }
}

/// The numbers that digits of bytes stand for, of whole vectors.
#[inline(always)]
pub(crate) fn unpack_whole<S: Simd, const BITS: u32>(
    s: S,
    bytes: &[i8],
    to: &mut [f32],
    number: impl Fn(S::F) -> S::F,
) {
    let n = bytes.len();
    assert!(n.is_multiple_of(S::LANES) && to.len() == n * (8 / BITS) as usize);
    for first in (0..n).step_by(S::LANES) {
        for place in 0..8 / BITS {
            let digit = s.load_digits(&bytes[first..], BITS, place);
            let col = first + place as usize * n;
            s.store(&mut to[col..], number(digit));
        }
    }
}

/// Parameters that are widened at a time: an even number.
const WIDE: usize = 256;

/// The first `cols` columns of rows that were packed, without gaps.
pub(crate) struct UnpackGroups<'a, U: Uniform> {
    pub(crate) codes: &'a [i8],
    pub(crate) params: &'a [U::Param],
    /// Columns of a row.
    pub(crate) all: usize,
    pub(crate) cols: usize,
    pub(crate) to: &'a mut [f32],
}

impl<U: Uniform> Kernel for UnpackGroups<'_, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { codes, params, all, cols, to } = self;
        if cols == 0 {
            return;
        }
        let group = U::GROUP.unwrap_or(all);
        let own = group.div_ceil(8 / U::BITS as usize);
        let whole = cols == all && all.is_multiple_of(group) && group == own * (8 / U::BITS) as usize;
        if whole && own.is_multiple_of(S::LANES) {
            // Groups follow each other across rows.
            return each::<S, U>(s, [own, group, 1], codes, params, to, |params, codes, to| {
                let [scale, offset] = U::affine(params).map(|x| s.splat(x));
                let number = |code| affine(s, code, scale, offset);
                match U::BITS {
                    2 => unpack_whole::<S, 2>(s, codes, to, number),
                    4 => unpack_whole::<S, 4>(s, codes, to, number),
                    _ => unpack_whole::<S, 8>(s, codes, to, number),
                }
            });
        }
        if whole && U::BITS == 2 && 2 * own == S::LANES && all.is_multiple_of(2 * group) {
            // A vector has the bytes of two groups.
            let first = s.mask(u64::MAX >> (64 - own));
            return each::<S, U>(s, [own, group, 2], codes, params, to, |params, codes, to| {
                let [a, b] = [&params[..U::PARAMS], &params[U::PARAMS..]].map(U::affine);
                let [scale, offset] = [0, 1].map(|i| s.select(first, s.splat(a[i]), s.splat(b[i])));
                let (a, b) = to.split_at_mut(group);
                let mut halves = [0.0; MAX_LANES];
                for (place, (a, b)) in a.chunks_exact_mut(own).zip(b.chunks_exact_mut(own)).enumerate() {
                    s.store(&mut halves, affine(s, s.load_digits(codes, 2, place as u32), scale, offset));
                    a.copy_from_slice(&halves[..own]);
                    b.copy_from_slice(&halves[own..2 * own]);
                }
            });
        }
        let (bytes, of_row) = (code_bytes::<U>(all), groups::<U>(all) * U::PARAMS);
        let rows = codes.chunks_exact(bytes).zip(params.chunks_exact(of_row));
        for ((mut codes, params), to) in rows.zip(to.chunks_exact_mut(cols)) {
            let params = params.chunks_exact(U::PARAMS);
            for ((g, to), params) in to.chunks_mut(group).enumerate().zip(params) {
                let mut wide = [0.0; MAX_LANES];
                s.store(&mut wide, U::Param::load_tail(s, params));
                let [scale, offset] = U::affine(&wide[..U::PARAMS]).map(|x| s.splat(x));
                let there = group.min(all - g * group);
                let (own, rest) = codes.split_at(there.div_ceil(8 / U::BITS as usize));
                codes = rest;
                unpack_digits(s, U::BITS, own, |col, n, code| {
                    if let Some(to) = to.get_mut(col..) {
                        let n = n.min(to.len());
                        s.store_tail(&mut to[..n], affine(s, code, scale, offset));
                    }
                });
            }
        }
    }
}

/// Two roundings on every instruction set: fused would be one.
#[inline(always)]
fn affine<S: Simd>(s: S, code: S::F, scale: S::F, offset: S::F) -> S::F {
    s.add(s.mul(code, scale), offset)
}

/// Hands on the parameters, the codes and the elements of some groups at a time, of
/// which none is shorter: sizes are bytes and elements of one, and how many.
#[inline(always)]
fn each<S: Simd, U: Uniform>(
    s: S,
    [bytes, elements, groups]: [usize; 3],
    codes: &[i8],
    params: &[U::Param],
    to: &mut [f32],
    mut then: impl FnMut(&[f32], &[i8], &mut [f32]),
) {
    let mut wide = [0.0; WIDE];
    let held = WIDE / U::PARAMS;
    let parts = codes.chunks(held * bytes).zip(params.chunks(WIDE)).zip(to.chunks_mut(held * elements));
    for ((codes, params), to) in parts {
        for (to, from) in wide.chunks_mut(S::LANES).zip(params.chunks(S::LANES)) {
            s.store(to, U::Param::load_tail(s, from));
        }
        let codes = codes.chunks_exact(groups * bytes);
        let of = wide.chunks_exact(groups * U::PARAMS).zip(codes);
        for ((params, codes), to) in of.zip(to.chunks_exact_mut(groups * elements)) {
            then(params, codes, to);
        }
    }
}

/// Rows of as many tokens as a group has, `[tokens, cols]`, as codes, with the
/// least element and the step of each channel over all of them: the first and
/// the second half of `params`. Those of a channel with a NaN or an infinity
/// are NaN.
pub(crate) struct ChannelGroup<'a> {
    pub(crate) bits: u32,
    pub(crate) rows: &'a [f32],
    pub(crate) codes: &'a mut [i8],
    pub(crate) params: &'a mut [f16],
}

impl Kernel for ChannelGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.params.len() / 2;
        if cols == 0 {
            return;
        }
        let (mins, steps) = self.params.split_at_mut(cols);
        let most = s.splat(((1u32 << self.bits) - 1) as f32);
        let (half, largest) = (s.splat(0.5), s.splat(f16::MAX.to_f32()));
        let least = s.sub(s.splat(0.0), largest);
        for col in (0..cols).step_by(S::LANES) {
            let (mut min, mut max, mut zero) =
                (s.splat(f32::INFINITY), s.splat(f32::NEG_INFINITY), s.splat(0.0));
            let there = (cols - col).min(S::LANES);
            for row in self.rows.chunks_exact(cols) {
                let x = s.load_tail(&row[col..col + there]);
                (min, max) = (s.min(x, min), s.max(x, max));
                zero = s.mul_add(x, s.splat(0.0), zero);
            }
            let [min, max] = [min, max].map(|x| s.max(s.min(x, largest), least));
            let step = s.div(s.mul_sub(max, half, s.mul(min, half)), s.mul(most, half));
            s.store_f16_tail(&mut mins[col..col + there], s.add(min, zero));
            s.store_f16_tail(&mut steps[col..col + there], s.add(step, zero));
        }
        let bytes = cols.div_ceil(8 / self.bits as usize);
        for (row, codes) in self.rows.chunks_exact(cols).zip(self.codes.chunks_exact_mut(bytes)) {
            pack_digits(s, self.bits, codes, |col| {
                if col >= cols {
                    return s.splat(0.0);
                }
                let (x, min) = (s.load_tail(&row[col..]), s.load_f16_tail(&mins[col..]));
                let step = s.load_f16_tail(&steps[col..]);
                // Elements that f16 does not tell apart are the least one.
                let step = s.select(s.lt(s.splat(0.0), step), step, s.splat(f32::INFINITY));
                let code = s.round(s.div(s.mul_sub(x, half, s.mul(min, half)), s.mul(step, half)));
                s.max(s.min(code, most), s.splat(0.0))
            });
        }
    }
}

/// Rows of one [`ChannelGroup`].
pub(crate) struct UnpackChannels<'a> {
    pub(crate) bits: u32,
    pub(crate) codes: &'a [i8],
    pub(crate) params: &'a [f16],
    pub(crate) to: &'a mut [f32],
}

impl Kernel for UnpackChannels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.params.len() / 2;
        if cols == 0 {
            return;
        }
        let (mins, steps) = self.params.split_at(cols);
        let bytes = cols.div_ceil(8 / self.bits as usize);
        if cols == bytes * (8 / self.bits) as usize && bytes.is_multiple_of(S::LANES) {
            match self.bits {
                2 => channels::<S, 2, 4>(s, self.codes, [mins, steps], self.to),
                4 => channels::<S, 4, 2>(s, self.codes, [mins, steps], self.to),
                _ => channels::<S, 8, 1>(s, self.codes, [mins, steps], self.to),
            }
            return;
        }
        for (codes, to) in self.codes.chunks_exact(bytes).zip(self.to.chunks_exact_mut(cols)) {
            unpack_digits(s, self.bits, codes, |col, n, code| {
                let n = n.min(cols.saturating_sub(col));
                if n == 0 {
                    return;
                }
                let (min, step) = (s.load_f16_tail(&mins[col..]), s.load_f16_tail(&steps[col..]));
                s.store_tail(&mut to[col..col + n], s.mul_add(code, step, min));
            });
        }
    }
}

/// Rows of whole vectors: those of a few columns, of all tokens, one after the
/// other, so that their parameters stay in registers.
#[inline(always)]
fn channels<S: Simd, const BITS: u32, const PLACES: usize>(
    s: S,
    codes: &[i8],
    [mins, steps]: [&[f16]; 2],
    to: &mut [f32],
) {
    let (cols, n) = (mins.len(), mins.len() / PLACES);
    for first in (0..n).step_by(S::LANES) {
        let of = |x: &[f16], place| s.load_f16(&x[first + place * n..]);
        let affine: [[S::F; 2]; PLACES] = std::array::from_fn(|place| [of(mins, place), of(steps, place)]);
        for (codes, to) in codes.chunks_exact(n).zip(to.chunks_exact_mut(cols)) {
            for (place, [min, step]) in affine.into_iter().enumerate() {
                let code = s.load_digits(&codes[first..], BITS, place as u32);
                s.store(&mut to[first + place * n..], s.mul_add(code, step, min));
            }
        }
    }
}
