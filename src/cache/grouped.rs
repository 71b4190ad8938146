//! Four and eight bits an element in groups that have their own scale.
//!
//! | format | a group is | a group stores | an element `x` becomes | bytes of 128 elements |
//! |---|---|---|---|---|
//! | [`Int4`] | a token in a head | least element `m` and step `s = (max - m) / 15`, `f32` | `s round((x - m) / s) + m` | 72 |
//! | [`Q4_0`] | 32 elements | `d = M / -8`, `f16`, where `M` is the element of largest magnitude, with its sign | `d (min(15, floor(x / d + 8.5)) - 8)` | 72 |
//! | [`Q8_0`] | 32 elements | `d = max|x| / 127`, `f16` | `d round(x / d)` | 136 |
//!
//! `Q4_0` and `Q8_0` are the numbers of GGML's formats of these names: codes
//! are made with `d` in `f32` and read with `d` in `f16`. Ties are rounded to
//! even, as GGML's vector code does. The last group of a row may be shorter.
//!
//! Layout: within a group of `n` elements byte `j` holds elements `j` and `j + n
//! / 2`; parameters lie beside the codes. Attention unpacks 64 rows at a time,
//! in decoding into the first-level cache, in prefill while packing.

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;

use super::format::Format;
use super::rows::RowStore;
use crate::element::Element;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Aligned, Rows};
use crate::simd::quant::{
    Group, LARGEST_CODE, PackGroups, SMALLEST_SCALE, Uniform, UnpackGroups, code_bytes, groups,
};
use crate::simd::{Isa, Simd};

/// Four bits an element, with the least element and the step of each token and
/// head: an element is off by at most half a step, `(max - min) / 30`.
///
/// A token with a NaN or an infinity reads as NaN in all elements of that head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Int4;

/// GGML's `q4_0`: four bits an element, 32 elements a group. An element is off
/// by at most half a step of an eighth of the group's largest magnitude, at the
/// end opposite to it by a whole one.
///
/// A group with a NaN or an infinity reads as NaN. What is beyond 524,032 in
/// magnitude is clipped, since steps end at 65,504.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub struct Q4_0;

/// GGML's `q8_0`: eight bits an element, 32 elements a group. An element is off
/// by at most 1/254 of the group's largest magnitude, and `f16`'s rounding of
/// the step.
///
/// A group with a NaN or an infinity reads as NaN. What is beyond 8,319,008 in
/// magnitude is clipped, since steps end at 65,504.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub struct Q8_0;

macro_rules! formats {
    ($($format:ident),*) => {$(
        impl Format for $format {
            type Keys = Grouped<Self>;
            type Values = Grouped<Self>;
        }
    )*};
}
formats!(Int4, Q4_0, Q8_0);

/// Least element and step of a range that is cut into so many steps, so that
/// neither overflows and a step is no subnormal number.
pub(super) fn steps(min: f32, max: f32, steps: f64) -> [f32; 2] {
    let step = ((f64::from(max) - f64::from(min)) / steps) as f32;
    // NaN stays.
    [min, if step < SMALLEST_SCALE { SMALLEST_SCALE } else { step }]
}

/// How far above the least element, in steps. Halves do not overflow.
#[inline(always)]
pub(super) fn above<S: Simd>(s: S, x: S::F, group: &Group<S>) -> S::F {
    s.round(s.div(s.mul_sub(x, s.splat(0.5), group.least), group.factor))
}

/// What [`above`] takes.
#[inline(always)]
pub(super) fn of_steps<S: Simd>(s: S, min: f32, step: f32) -> Group<S> {
    Group { factor: s.splat(0.5 * step), least: s.splat(0.5 * min) }
}

impl Uniform for Int4 {
    const BITS: u32 = 4;
    const GROUP: Option<usize> = None;
    const PARAMS: usize = 2;
    type Param = f32;

    fn params(min: f32, max: f32, _: impl FnOnce() -> bool) -> [f32; 2] {
        steps(min, max, 15.0)
    }
    #[inline(always)]
    fn affine(params: &[f32]) -> [f32; 2] {
        [params[1], params[0]]
    }
    #[inline(always)]
    fn code<S: Simd>(s: S, x: S::F, group: &Group<S>) -> S::F {
        above(s, x, group)
    }
    #[inline(always)]
    fn group<S: Simd>(s: S, _: f32, _: f32, params: &[f32; 2]) -> Group<S> {
        of_steps(s, params[0], params[1])
    }
}

/// The largest step of `f16`.
const MOST: f32 = 65_504.0;

impl Uniform for Q8_0 {
    const BITS: u32 = 8;
    const GROUP: Option<usize> = Some(32);
    const PARAMS: usize = 1;
    type Param = f16;

    fn params(min: f32, max: f32, _: impl FnOnce() -> bool) -> [f16; 2] {
        [f16::from_f32(step_of_8(min, max)); 2]
    }
    #[inline(always)]
    fn affine(params: &[f32]) -> [f32; 2] {
        [params[0], -128.0 * params[0]]
    }
    #[inline(always)]
    fn code<S: Simd>(s: S, x: S::F, group: &Group<S>) -> S::F {
        let code = s.round(s.mul(x, group.factor));
        s.add(s.max(s.min(code, s.splat(LARGEST_CODE)), s.splat(-LARGEST_CODE)), s.splat(128.0))
    }
    #[inline(always)]
    fn group<S: Simd>(s: S, min: f32, max: f32, _: &[f16; 2]) -> Group<S> {
        Group { factor: s.splat(inverse(step_of_8(min, max))), least: s.splat(0.0) }
    }
}

fn step_of_8(min: f32, max: f32) -> f32 {
    clip(max.max(-min) / LARGEST_CODE, min)
}

/// A step that `f16` can hold; NaN where the group has no extent.
fn clip(step: f32, min: f32) -> f32 {
    if min.is_nan() { min } else { step.clamp(-MOST, MOST) }
}

/// From the element of largest magnitude.
fn step_of_4(positive: bool, min: f32, max: f32) -> f32 {
    let largest = if positive { max } else { min };
    clip(largest / -8.0, min)
}

fn inverse(step: f32) -> f32 {
    // Of the smallest steps there is none: the elements are too small for f16.
    Some(1.0 / step).filter(|x| !x.is_infinite()).unwrap_or(0.0)
}

impl Uniform for Q4_0 {
    const BITS: u32 = 4;
    const GROUP: Option<usize> = Some(32);
    const PARAMS: usize = 1;
    type Param = f16;

    fn params(min: f32, max: f32, first: impl FnOnce() -> bool) -> [f16; 2] {
        let positive = if max == -min { first() } else { max > -min };
        let step = step_of_4(positive, min, max);
        [f16::from_f32(step), f16::from_f32(step)]
    }
    #[inline(always)]
    fn affine(params: &[f32]) -> [f32; 2] {
        [params[0], -8.0 * params[0]]
    }
    #[inline(always)]
    fn code<S: Simd>(s: S, x: S::F, group: &Group<S>) -> S::F {
        s.add(s.mul(x, group.factor), s.splat(8.5))
    }
    #[inline(always)]
    fn group<S: Simd>(s: S, min: f32, max: f32, params: &[f16; 2]) -> Group<S> {
        // The sign is that of what is stored, which says which end it is.
        let positive = params[0].is_sign_negative();
        let step = step_of_4(positive, min, max);
        Group { factor: s.splat(inverse(step)), least: s.splat(0.0) }
    }
}

/// Codes and parameters.
#[derive(Clone, Debug)]
pub struct Grouped<U: Uniform> {
    codes: Aligned<i8>,
    params: Aligned<U::Param>,
    cols: usize,
    scheme: PhantomData<U>,
}

impl<U: Uniform> Grouped<U> {
    fn row(&self) -> [usize; 2] {
        [code_bytes::<U>(self.cols), groups::<U>(self.cols) * U::PARAMS]
    }
}

impl<U: Uniform> RowStore for Grouped<U> {
    const IN_PLACE: bool = false;

    fn zeroed(rows: usize, cols: usize) -> Option<Self> {
        // Rounding up to whole groups must not overflow.
        let params = cols.checked_add(32).map(|_| groups::<U>(cols) * U::PARAMS)?;
        let codes = Aligned::zeroed(rows.checked_mul(code_bytes::<U>(cols))?)?;
        Some(Self { codes, params: Aligned::zeroed(rows.checked_mul(params)?)?, cols, scheme: PhantomData })
    }

    fn write<T: Element>(&mut self, isa: Isa, first: usize, from: Rows<'_, T>) {
        let ([bytes, params], n) = (self.row(), from.len());
        let codes = &mut self.codes.as_mut_slice()[first * bytes..][..n * bytes];
        let params = &mut self.params.as_mut_slice()[first * params..][..n * params];
        isa.dispatch(PackGroups::<T, U> { from, codes, params });
    }

    fn copy(&mut self, from: usize, to: usize, n: usize) {
        let [bytes, params] = self.row();
        self.codes.as_mut_slice().copy_within(from * bytes..(from + n) * bytes, to * bytes);
        self.params.as_mut_slice().copy_within(from * params..(from + n) * params, to * params);
    }

    fn in_place(&self, _: Range<usize>, _: usize) -> Option<AnyRows<'_>> {
        None
    }

    fn collect(&self, isa: Isa, rows: Range<usize>, cols: usize, room: &mut [f32], before: usize) {
        let to = &mut room[before * cols..][..rows.len() * cols];
        let [bytes, params] = self.row();
        let codes = &self.codes.as_slice()[rows.start * bytes..rows.end * bytes];
        let params = &self.params.as_slice()[rows.start * params..rows.end * params];
        isa.dispatch(UnpackGroups::<U> { codes, params, all: self.cols, cols, to });
    }

    fn collected(room: &mut [f32], rows: usize, cols: usize) -> AnyRows<'_> {
        AnyRows::F32(Rows::of_slice(room, rows, cols, cols))
    }

    fn address(&self, row: usize) -> (*const u8, isize) {
        let [bytes, _] = self.row();
        Rows::of_slice(
            self.codes.as_slice(),
            self.codes.as_slice().len().checked_div(bytes).unwrap_or(0),
            bytes,
            bytes,
        )
        .address(row)
    }

    fn row_bytes(&self) -> usize {
        let [bytes, params] = self.row();
        bytes + params * size_of::<U::Param>()
    }

    fn bytes(&self) -> usize {
        self.codes.bytes() + self.params.bytes()
    }
}
