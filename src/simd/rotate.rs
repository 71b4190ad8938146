//! Rows whose blocks are rotated at random and coded number by number.

use super::mem::Rows;
use super::pack::load;
use super::quant::{extent, pack_digits, unpack_digits};
use super::storage::Storage;
use super::{Kernel, MAX_LANES, Simd};

/// The largest block.
const LARGEST: usize = 1024;

/// The sizes of the blocks of a row: powers of two, largest first.
pub(crate) fn blocks(cols: usize) -> impl Iterator<Item = usize> {
    let rest = (0..LARGEST.ilog2()).rev().map(|bit| 1 << bit).filter(move |n| cols & n != 0);
    std::iter::repeat_n(LARGEST, cols / LARGEST).chain(rest)
}

/// The Walsh-Hadamard transform of a power of two of numbers, in place, without
/// a factor. Sums are those of pairs at a distance of 1, then 2, and so on,
/// whatever the vectors are.
#[inline(always)]
pub(crate) fn hadamard<S: Simd>(s: S, x: &mut [f32]) {
    let n = x.len();
    for x in x.chunks_mut(S::LANES) {
        let mut a = [s.load_tail(x)];
        lanes(s, &mut a, n);
        s.store_tail(x, a[0]);
    }
    let mut distance = S::LANES;
    while distance < n {
        for pair in x.chunks_exact_mut(2 * distance) {
            let (a, b) = pair.split_at_mut(distance);
            for (a, b) in a.chunks_exact_mut(S::LANES).zip(b.chunks_exact_mut(S::LANES)) {
                let (x, y) = (s.load(a), s.load(b));
                s.store(a, s.add(x, y));
                s.store(b, s.sub(x, y));
            }
        }
        distance *= 2;
    }
}

/// The sum of products, in an order that does not depend on the vectors.
#[inline(always)]
fn dot<S: Simd>(s: S, n: usize, at: impl Fn(usize) -> [S::F; 2]) -> f64 {
    let mut sums = [s.splat(0.0); MAX_LANES];
    for first in (0..n).step_by(MAX_LANES) {
        for (v, sum) in sums[..MAX_LANES / S::LANES].iter_mut().enumerate() {
            if first + v * S::LANES < n {
                let [a, b] = at(first + v * S::LANES);
                *sum = s.add(s.mul(a, b), *sum);
            }
        }
    }
    let mut lanes = [0.0; MAX_LANES];
    for (lanes, sum) in lanes.chunks_exact_mut(S::LANES).zip(sums) {
        s.store(lanes, sum);
    }
    lanes.iter().copied().map(f64::from).sum()
}

/// Levels of the codes of 2, 3 and 4 bits that a normal number is nearest to
/// on average: the positive ones, by Lloyd and Max.
const LEVELS: [&[f32]; 3] = [
    &[0.452_78, 1.510_42],
    &[0.245_09, 0.756_01, 1.343_91, 2.151_95],
    &[0.128_40, 0.388_05, 0.656_76, 0.942_34, 1.256_23, 1.618_05, 2.069_02, 2.732_59],
];

/// All levels of codes of so many bits, rising.
pub(crate) fn levels(bits: u32) -> [f32; 16] {
    let (positive, mut levels) = (LEVELS[bits as usize - 2], [0.0; 16]);
    for (i, &level) in positive.iter().enumerate() {
        levels[positive.len() + i] = level;
        levels[positive.len() - 1 - i] = -level;
    }
    levels
}

/// The bits of a code that are stored together, and what they count.
pub(crate) const fn planes(bits: u32) -> &'static [(u32, f32)] {
    match bits {
        3 => &[(1, 4.0), (2, 1.0)],
        2 => &[(2, 1.0)],
        _ => &[(4, 1.0)],
    }
}

/// Bytes of the codes of a block.
fn block_bytes(bits: u32, n: usize) -> usize {
    planes(bits).iter().map(|(bits, _)| n.div_ceil(8 / *bits as usize)).sum()
}

/// Bytes of the codes of a row.
pub(crate) fn code_bytes(bits: u32, cols: usize) -> usize {
    blocks(cols).map(|n| block_bytes(bits, n)).sum()
}

/// Each block of a row of `from`, rotated, as codes and a norm. With
/// `unbiased` the norm is such that the dot product of a row with what it
/// became is its own square; else it is the row's. That of a block with a NaN
/// or an infinity is NaN.
pub(crate) struct PackRotated<'a, T> {
    pub(crate) from: Rows<'a, T>,
    pub(crate) bits: u32,
    pub(crate) unbiased: bool,
    pub(crate) signs: &'a [f32],
    pub(crate) codes: &'a mut [i8],
    pub(crate) norms: &'a mut [f32],
    /// Room for two rows.
    pub(crate) room: &'a mut [f32],
}

impl<T: Storage> Kernel for PackRotated<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (cols, bits) = (self.from.cols(), self.bits);
        if cols == 0 {
            return;
        }
        let (of_row, levels) = (blocks(cols).count(), levels(bits));
        let count = 1usize << bits;
        let (y, codes) = self.room.split_at_mut(cols);
        let rows =
            self.codes.chunks_exact_mut(code_bytes(bits, cols)).zip(self.norms.chunks_exact_mut(of_row));
        for (i, (mut bytes, norms)) in rows.enumerate() {
            let mut first = 0;
            for (n, norm) in blocks(cols).zip(norms) {
                let part = self.from.part(i..i + 1, first..first + n);
                let (y, codes, signs) = (&mut y[..n], &mut codes[..n], &self.signs[first..first + n]);
                first += n;
                let [min, max] = extent(s, &part, 0);
                let largest = s.reduce_max(s.max(s.splat(-min), s.splat(max)));
                let unit = if largest > 0.0 { largest } else { 1.0 };
                let x = |col| s.div(load(s, &part, 0, col), s.splat(unit));
                for (v, to) in y.chunks_mut(S::LANES).enumerate() {
                    let sign = s.load_tail(&signs[v * S::LANES..]);
                    s.store_tail(to, s.mul(x(v * S::LANES), sign));
                }
                let length = dot(s, n, |col| [x(col), x(col)]).sqrt();
                hadamard(s, y);
                for (y, codes) in y.chunks_mut(S::LANES).zip(codes.chunks_mut(S::LANES)) {
                    let z = s.div(s.load_tail(y), s.splat(length as f32));
                    s.store_tail(y, z);
                    let mut code = s.splat(0.0);
                    for pair in levels[..count].windows(2) {
                        let above = s.lt(s.splat(0.5 * (pair[0] + pair[1])), z);
                        code = s.add(code, s.select(above, s.splat(1.0), s.splat(0.0)));
                    }
                    s.store_tail(codes, code);
                }
                let level = |col: usize| s.lookup(&levels, s.load_tail(&codes[col..]));
                let shared = dot(s, n, |col| {
                    // Lanes beyond the end have a level, but no number.
                    [s.load_tail(&y[col..]), level(col)]
                });
                let length = f64::from(unit) * length;
                *norm = if max.is_nan() || largest.is_nan() {
                    f32::NAN
                } else if largest == 0.0 {
                    0.0
                } else if self.unbiased {
                    (length * n as f64 / shared) as f32
                } else {
                    length as f32
                };
                for &(width, power) in planes(bits) {
                    let (own, rest) = std::mem::take(&mut bytes).split_at_mut(n.div_ceil(8 / width as usize));
                    pack_digits(s, width, own, |col| {
                        if col >= n {
                            return s.splat(0.0);
                        }
                        // The digits from this one up, then without those above.
                        let x = s.mul(s.load_tail(&codes[col..]), s.splat(1.0 / power));
                        let x = s.sub(x, s.fract(x));
                        let base = (1u32 << width) as f32;
                        s.mul(s.fract(s.mul(x, s.splat(1.0 / base))), s.splat(base))
                    });
                    bytes = rest;
                }
            }
        }
    }
}

/// The first `cols` columns of rows that were packed, rotated back, without
/// gaps.
pub(crate) struct UnpackRotated<'a> {
    pub(crate) codes: &'a [i8],
    pub(crate) norms: &'a [f32],
    pub(crate) bits: u32,
    pub(crate) signs: &'a [f32],
    pub(crate) cols: usize,
    pub(crate) to: &'a mut [f32],
}

impl Kernel for UnpackRotated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (all, bits, cols) = (self.signs.len(), self.bits, self.cols);
        if cols == 0 {
            return;
        }
        let (of_row, levels) = (blocks(all).count(), levels(bits));
        let rows = self.codes.chunks_exact(code_bytes(bits, all)).zip(self.norms.chunks_exact(of_row));
        let mut room = [0.0; LARGEST];
        for ((mut bytes, norms), to) in rows.zip(self.to.chunks_exact_mut(cols)) {
            let mut first = 0;
            for (n, norm) in blocks(all).zip(norms) {
                let span = first..first + n;
                first += n;
                // A block that is not wanted as a whole is unpacked elsewhere.
                let kept = cols.saturating_sub(span.start).min(n);
                let whole = kept == n;
                if kept == 0 {
                    break;
                }
                let block = if whole { &mut to[span.clone()] } else { &mut room[..n] };
                let signs = &self.signs[span.clone()];
                let of_block = block_bytes(bits, n);
                if let Some(levels) = whole.then_some(&levels) {
                    let (own, signs) = (&bytes[..of_block], signs);
                    let done = match n / S::LANES {
                        8 => unpack_block::<S, 8>(s, bits, own, levels, *norm, signs, block),
                        16 => unpack_block::<S, 16>(s, bits, own, levels, *norm, signs, block),
                        _ => false,
                    };
                    if done {
                        bytes = &bytes[of_block..];
                        continue;
                    }
                }
                for (place, &(width, power)) in planes(bits).iter().enumerate() {
                    let (own, rest) = bytes.split_at(n.div_ceil(8 / width as usize));
                    bytes = rest;
                    unpack_digits(s, width, own, |col, there, digit| {
                        let Some(to) = block.get_mut(col..) else { return };
                        let there = there.min(to.len());
                        let to = &mut to[..there];
                        let digit = s.mul(digit, s.splat(power));
                        let code = if place == 0 { digit } else { s.add(digit, s.load_tail(to)) };
                        let last = place + 1 == planes(bits).len();
                        s.store_tail(to, if last { s.lookup(&levels, code) } else { code });
                    });
                }
                hadamard(s, block);
                let norm = s.splat(*norm / n as f32);
                for (x, sign) in block.chunks_mut(S::LANES).zip(signs.chunks(S::LANES)) {
                    let x_ = s.mul(s.load_tail(x), s.mul(s.load_tail(sign), norm));
                    s.store_tail(x, x_);
                }
                if !whole {
                    to[span.start..].copy_from_slice(&room[..kept]);
                }
            }
        }
    }
}

/// A block of `V` vectors in registers, in the order of [`hadamard`]. Whether it was
/// done: the first digits must be those of whole vectors.
#[inline(always)]
fn unpack_block<S: Simd, const V: usize>(
    s: S,
    bits: u32,
    bytes: &[i8],
    levels: &[f32; 16],
    norm: f32,
    signs: &[f32],
    to: &mut [f32],
) -> bool {
    let n = V * S::LANES;
    let mut x = [s.splat(0.0); V];
    let level = |code| s.lookup(levels, code);
    match bits {
        2 => digits::<S, V, 2>(s, bytes, &mut x, |_, digit| level(digit)),
        3 => {
            let (high, low) = bytes.split_at(n / 8);
            digits::<S, V, 1>(s, high, &mut x, |_, digit| digit);
            digits::<S, V, 2>(s, low, &mut x, |high, digit| level(s.mul_add(high, s.splat(4.0), digit)));
        }
        4 => digits::<S, V, 4>(s, bytes, &mut x, |_, digit| level(digit)),
        _ => return false,
    }
    lanes(s, &mut x, n);
    for stage in 0..V.ilog2() {
        let distance = 1 << stage;
        for i in (0..V).filter(|i| i & distance == 0) {
            (x[i], x[i + distance]) = (s.add(x[i], x[i + distance]), s.sub(x[i], x[i + distance]));
        }
    }
    let norm = s.splat(norm / n as f32);
    for (v, x) in x.into_iter().enumerate() {
        let sign = s.load(&signs[v * S::LANES..]);
        s.store(&mut to[v * S::LANES..], s.mul(x, s.mul(sign, norm)));
    }
    true
}

/// The sums and differences within vectors, of `n` numbers.
#[inline(always)]
fn lanes<S: Simd, const V: usize>(s: S, x: &mut [S::F; V], n: usize) {
    let n = n.min(S::LANES);
    // Distances that are known to the compiler, and which lanes are the first of a pair.
    if n > 1 {
        within(s, x, 1, 0x5555);
    }
    if n > 2 {
        within(s, x, 2, 0x3333);
    }
    if n > 4 {
        within(s, x, 4, 0x0f0f);
    }
    if n > 8 {
        within(s, x, 8, 0x00ff);
    }
}

/// Sums and differences of lanes at a distance, of which `first` are the first.
#[inline(always)]
fn within<S: Simd, const V: usize>(s: S, x: &mut [S::F; V], distance: usize, first: u64) {
    let sign = s.select(s.mask(first), s.splat(1.0), s.splat(-1.0));
    for x in x {
        *x = s.mul_add(*x, sign, s.swap(*x, distance));
    }
}

/// Digits of a block of `V` vectors, each with what its vector had before.
#[inline(always)]
fn digits<S: Simd, const V: usize, const BITS: u32>(
    s: S,
    bytes: &[i8],
    x: &mut [S::F; V],
    number: impl Fn(S::F, S::F) -> S::F,
) {
    let each = V * BITS as usize / 8;
    for v in 0..each {
        for place in 0..8 / BITS as usize {
            let digit = s.load_digits(&bytes[v * S::LANES..], BITS, place as u32);
            x[v + place * each] = number(x[v + place * each], digit);
        }
    }
}
