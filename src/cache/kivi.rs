//! KIVI: two bits an element, keys by channel and values by token, with the
//! newest tokens in full precision.
//!
//! ```text
//! keys     groups of 32 tokens: of each channel the least element and the step
//! values   groups of 32 channels of a token, likewise
//! code = round((x - min) / step), step = (max - min) / 3, x ~ code * step + min
//! ```
//!
//! "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv
//! 2402.02750). Channels of keys have outliers, which a group of one channel
//! keeps to itself. Keys stay in full precision until `residual` of them can be
//! quantised together; so of `n` tokens the last `n mod residual`. Values of the
//! last `residual` tokens do, and the oldest of these is quantised whenever
//! another comes. Nothing depends on later tokens, nor on how many are appended
//! at once.
//!
//! Bytes of a token far back: `(head_dim + value_dim) (BITS / 8 + 4 / 32)`, for
//! two bits 3/16 of `f16`. Steps and least elements are `f16`: what is beyond
//! 65,504 in magnitude is clipped. A group with a NaN or an infinity reads as
//! NaN; one of equal elements as their `f16`.

use std::ops::Range;

use half::f16;
use ndarray::{ArrayView4, Axis, s};

use super::format::Format;
use super::grouped::{Grouped, above, of_steps, steps};
use super::rows::{Elements, Planes, RowStore, check_append, check_room};
use super::{Append, Cache, KvShape, check_sequence, check_truncation};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::keys::source::{At, KvSource};
use crate::simd::Isa;
use crate::simd::Simd;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Aligned, Rows};
use crate::simd::quant::{ChannelGroup, Group, Uniform, UnpackChannels};

/// Tokens, or channels, of a group.
const GROUP: usize = 32;

/// The values of a token, quantised.
#[derive(Clone, Copy, Debug)]
pub struct ByToken<const BITS: u32>;

impl<const B: u32> Uniform for ByToken<B> {
    const BITS: u32 = B;
    const GROUP: Option<usize> = Some(GROUP);
    const PARAMS: usize = 2;
    type Param = f16;

    fn params(min: f32, max: f32, _: impl FnOnce() -> bool) -> [f16; 2] {
        let most = f16::MAX.to_f32();
        let [min, step] = steps(min.clamp(-most, most), max.clamp(-most, most), f64::from((1u32 << B) - 1));
        [f16::from_f32(min), f16::from_f32(step)]
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
    fn group<S: Simd>(s: S, _: f32, _: f32, params: &[f16; 2]) -> Group<S> {
        let [min, step] = params.map(f16::to_f32);
        // Of elements that f16 does not tell apart.
        of_steps(s, min, if step == 0.0 { f32::INFINITY } else { step })
    }
}

/// A cache of `BITS` bits, 2, 4 or 8, whose newest tokens are `F`.
///
/// Two bits on queries, keys and values of a real model (SmolLM2-135M, 512 tokens, 64
/// dimensions, 128 of them as they are; the last 64 queries of layers 2, 14 and 27):
/// outputs are 22, 38 and 38 % off those over the keys and values themselves, in root
/// mean square, and 52, 75 and 79 % of rows keep the key of their largest weight.
///
/// ```
/// use attention_kernels::cache::{Append, Cache, Kivi, KvShape};
/// use ndarray::Array3;
///
/// let shape = KvShape { kv_heads: 8, head_dim: 128, value_dim: 128 };
/// let mut cache = Kivi::<2>::new(shape, 1, 4096, 128)?;
/// let k = Array3::<f32>::ones((8, 1000, 128));
/// cache.append(0, k.view(), k.view())?;
/// assert_eq!(cache.quantised(0)?, [896, 872]); // keys and values
/// assert_eq!(cache.token_bytes(), 8 * 2 * 48); // f16: 8 * 2 * 256
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Kivi<const BITS: u32 = 2, F: Format + Element = f16> {
    shape: KvShape,
    capacity: usize,
    residual: usize,
    lengths: Vec<usize>,
    /// Codes of keys, a row a token, and least elements and steps, two rows a
    /// group.
    codes: Aligned<i8>,
    params: Aligned<f16>,
    values: Grouped<ByToken<BITS>>,
    /// The newest tokens: token `t` in row `t mod residual`.
    newest: Planes<Elements<F>, Elements<F>>,
    /// A block of tokens to be quantised.
    room: Vec<f32>,
    isa: Isa,
}

impl<const BITS: u32, F: Format + Element> Kivi<BITS, F> {
    /// An empty cache of so many sequences, each of at most `capacity` tokens,
    /// of which about the last `residual` stay as they are: a multiple of 32,
    /// 128 in the paper.
    ///
    /// # Errors
    /// [`Error::Value`] for a `residual` that is none, dims of values that are
    /// no multiple of 32, other bits, and where there is no memory,
    /// [`Error::Isa`] where [`ISA_VARIABLE`](crate::ISA_VARIABLE) names an
    /// instruction set that the CPU lacks.
    pub fn new(shape: KvShape, sequences: usize, capacity: usize, residual: usize) -> Result<Self> {
        if ![2, 4, 8].contains(&BITS) {
            return Err(Error::value("BITS", "2, 4 or 8", BITS));
        }
        if residual == 0 || !residual.is_multiple_of(GROUP) {
            return Err(Error::value("residual", format!("a multiple of {GROUP} tokens"), residual));
        }
        if !shape.value_dim.is_multiple_of(GROUP) {
            let expected = format!("a multiple of the {GROUP} elements of a group");
            return Err(Error::value("value_dim", expected, shape.value_dim));
        }
        let heads = sequences.checked_mul(shape.kv_heads);
        let rows = |n: usize| heads.and_then(|heads| heads.checked_mul(n));
        let many = |count: Option<usize>, each: usize| count.and_then(|count| count.checked_mul(each));
        let groups = rows(capacity.div_ceil(GROUP));
        let made = || {
            let codes = Aligned::zeroed(many(rows(capacity), Self::bytes_of(shape.head_dim))?)?;
            let params = Aligned::zeroed(many(many(groups, 2), shape.head_dim)?)?;
            Some((codes, params, Grouped::zeroed(rows(capacity)?, shape.value_dim)?))
        };
        let Some((codes, params, values)) = made() else {
            return Err(Error::value("capacity", "a number for which there is memory", "too much"));
        };
        let newest = Planes::zeroed("residual", rows(residual), [shape.head_dim, shape.value_dim])?;
        let room = super::empty("head_dim", many(Some(GROUP), shape.head_dim).unwrap_or(usize::MAX), 0.0)?;
        let lengths = super::empty("sequences", sequences, 0)?;
        let isa = Isa::choose(None)?;
        Ok(Self { shape, capacity, residual, lengths, codes, params, values, newest, room, isa })
    }

    /// How many of the first keys and of the first values of a sequence are
    /// quantised.
    ///
    /// # Errors
    /// [`Error::Value`] for a sequence that the cache does not have.
    pub fn quantised(&self, sequence: usize) -> Result<[usize; 2]> {
        check_sequence("sequence", sequence, &self.lengths)?;
        Ok(self.packed(self.lengths[sequence]))
    }

    fn packed(&self, len: usize) -> [usize; 2] {
        [len - len % self.residual, len.saturating_sub(self.residual)]
    }

    /// Bytes of the codes of a key.
    const fn bytes_of(head_dim: usize) -> usize {
        head_dim.div_ceil(8 / BITS as usize)
    }

    /// The row of a token, and of the newest ones.
    fn rows(&self, sequence: usize, head: usize, token: usize) -> [usize; 2] {
        let head = sequence * self.shape.kv_heads + head;
        [head * self.capacity + token, head * self.residual + token % self.residual]
    }

    /// Where the parameters of the group of a key start.
    fn group(&self, sequence: usize, head: usize, token: usize) -> usize {
        let head = sequence * self.shape.kv_heads + head;
        (head * self.capacity.div_ceil(GROUP) + token / GROUP) * 2 * self.shape.head_dim
    }

    /// Stores a token that has its place, and quantises what is due then.
    fn push<T: Element>(
        &mut self,
        sequence: usize,
        head: usize,
        token: usize,
        k: Rows<'_, T>,
        v: Rows<'_, T>,
    ) {
        let ([row, newest], isa) = (self.rows(sequence, head, token), self.isa);
        if token >= self.residual {
            // The oldest of the newest values lies where this one will.
            let oldest = self.newest.values.rows().part(newest..newest + 1, 0..self.shape.value_dim);
            self.values.write(isa, row - self.residual, oldest);
        }
        self.newest.keys.write(isa, newest, k);
        self.newest.values.write(isa, newest, v);
        if !(token + 1).is_multiple_of(self.residual) {
            return;
        }
        let (cols, bytes) = (self.shape.head_dim, Self::bytes_of(self.shape.head_dim));
        for first in (token + 1 - self.residual..=token).step_by(GROUP) {
            let [row, newest] = self.rows(sequence, head, first);
            self.newest.keys.collect_wide(isa, newest..newest + GROUP, &mut self.room);
            let at = self.group(sequence, head, first);
            let params = &mut self.params.as_mut_slice()[at..at + 2 * cols];
            let codes = &mut self.codes.as_mut_slice()[row * bytes..(row + GROUP) * bytes];
            isa.dispatch(ChannelGroup { bits: BITS, rows: &self.room, codes, params });
        }
    }

    /// Rows of newest tokens as `f32`, which may come round.
    fn newest(
        &self,
        plane: &Elements<F>,
        isa: Isa,
        at: &At<'_>,
        keys: Range<usize>,
        to: &mut [f32],
        cols: usize,
    ) {
        let mut token = keys.start;
        while token < keys.end {
            let [_, row] = self.rows(at.sequence.slot, at.kv_head, token);
            let n = (self.residual - token % self.residual).min(keys.end - token);
            plane.collect_wide(isa, row..row + n, &mut to[(token - keys.start) * cols..][..n * cols]);
            token += n;
        }
    }
}

impl<const BITS: u32, F: Format + Element> KvSource for Kivi<BITS, F> {
    fn keys<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let (cols, bytes) = (self.shape.head_dim, Self::bytes_of(self.shape.head_dim));
        let packed = self.packed(self.lengths[at.sequence.slot])[0].clamp(at.keys.start, at.keys.end);
        let mut token = at.keys.start;
        while token < packed {
            let end = (token / GROUP + 1) * GROUP;
            let n = end.min(packed) - token;
            let [row, _] = self.rows(at.sequence.slot, at.kv_head, token);
            let params = self.group(at.sequence.slot, at.kv_head, token);
            let params = &self.params.as_slice()[params..params + 2 * cols];
            let codes = &self.codes.as_slice()[row * bytes..(row + n) * bytes];
            let to = &mut room[(token - at.keys.start) * cols..][..n * cols];
            isa.dispatch(UnpackChannels { bits: BITS, codes, params, to });
            token += n;
        }
        let to = &mut room[(packed - at.keys.start) * cols..];
        self.newest(&self.newest.keys, isa, at, packed..at.keys.end, to, cols);
        AnyRows::F32(Rows::of_slice(room, at.keys.len(), cols, cols))
    }

    fn values<'r>(&'r self, isa: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let cols = self.shape.value_dim;
        let packed = self.packed(self.lengths[at.sequence.slot])[1].clamp(at.keys.start, at.keys.end);
        let [row, _] = self.rows(at.sequence.slot, at.kv_head, at.keys.start);
        let n = packed - at.keys.start;
        self.values.collect(isa, row..row + n, cols, room, 0);
        self.newest(&self.newest.values, isa, at, packed..at.keys.end, &mut room[n * cols..], cols);
        AnyRows::F32(Rows::of_slice(room, at.keys.len(), cols, cols))
    }

    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        let len = self.lengths[at.sequence.slot];
        if at.keys.start >= len {
            return [(std::ptr::null(), 0); 2];
        }
        let [packed_keys, packed_values] = self.packed(len);
        let [row, newest] = self.rows(at.sequence.slot, at.kv_head, at.keys.start);
        let bytes = Self::bytes_of(self.shape.head_dim);
        let codes = self.codes.as_slice();
        let codes = Rows::of_slice(codes, codes.len().checked_div(bytes).unwrap_or(0), bytes, bytes);
        let old = [at.keys.start < packed_keys, at.keys.start < packed_values];
        [
            if old[0] { codes.address(row) } else { self.newest.keys.address(newest) },
            if old[1] { self.values.address(row) } else { self.newest.values.address(newest) },
        ]
    }

    fn row_bytes(&self) -> [usize; 2] {
        [Self::bytes_of(self.shape.head_dim), self.values.row_bytes()]
    }
}

impl<const BITS: u32, F: Format + Element> Cache for Kivi<BITS, F> {
    fn source(&self) -> &dyn KvSource {
        self
    }
    fn shape(&self) -> KvShape {
        self.shape
    }
    fn lengths(&self) -> &[usize] {
        &self.lengths
    }
    fn capacity(&self) -> usize {
        self.capacity
    }
    fn bytes(&self) -> usize {
        self.codes.bytes() + self.params.bytes() + self.values.bytes() + self.newest.bytes()
    }
    /// Of a token far back.
    fn token_bytes(&self) -> usize {
        let params = (2 * self.shape.head_dim * size_of::<f16>()).div_ceil(GROUP);
        self.shape.kv_heads * (self.row_bytes().iter().sum::<usize>() + params)
    }

    /// Refuses to forget tokens once others have been quantised, unless it is
    /// all of them: the newest ones that are left would not be what they were.
    fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        self.check_truncate(sequence, len)?;
        self.lengths[sequence] = len;
        Ok(())
    }

    fn check_truncate(&self, sequence: usize, len: usize) -> Result<()> {
        check_truncation(sequence, len, &self.lengths)?;
        let now = self.lengths[sequence];
        if len != 0 && len != now && self.packed(now) != [0, 0] {
            let expected = format!("0 or {now}: tokens of the sequence have been quantised");
            return Err(Error::value("len", expected, len));
        }
        Ok(())
    }

    /// Copies the tokens.
    fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        check_sequence("from", from, &self.lengths)?;
        check_sequence("to", to, &self.lengths)?;
        let (len, bytes) = (self.lengths[from], Self::bytes_of(self.shape.head_dim));
        for head in 0..self.shape.kv_heads {
            let [[source, newest], [target, room]] = [from, to].map(|sequence| self.rows(sequence, head, 0));
            self.codes.as_mut_slice().copy_within(source * bytes..(source + len) * bytes, target * bytes);
            self.values.copy(source, target, len);
            self.newest.copy(newest, room, len.min(self.residual));
            let [source, target] = [from, to].map(|sequence| self.group(sequence, head, 0));
            let params = len / GROUP * 2 * self.shape.head_dim;
            self.params.as_mut_slice().copy_within(source..source + params, target);
        }
        self.lengths[to] = len;
        Ok(())
    }
}

impl<const BITS: u32, F: Format + Element> Append for Kivi<BITS, F> {
    fn append_each<T: Element>(
        &mut self,
        sequences: &[usize],
        k: ArrayView4<'_, T>,
        v: ArrayView4<'_, T>,
    ) -> Result<()> {
        check_append(self.shape, &self.lengths, sequences, &k, &v)?;
        let n = k.dim().2;
        self.check_room(sequences, n)?;
        for (i, &sequence) in sequences.iter().enumerate() {
            for (head, t) in (0..self.shape.kv_heads).flat_map(|head| (0..n).map(move |t| (head, t))) {
                let [k, v] = [&k, &v].map(|x| {
                    x.index_axis(Axis(0), i).index_axis_move(Axis(0), head).slice_move(s![t..t + 1, ..])
                });
                let token = self.lengths[sequence] + t;
                self.push::<T>(sequence, head, token, k.reborrow().into(), v.reborrow().into());
            }
            self.lengths[sequence] += n;
        }
        Ok(())
    }

    fn check_room(&self, sequences: &[usize], tokens: usize) -> Result<()> {
        sequences.iter().try_for_each(|&sequence| {
            check_sequence("sequences", sequence, &self.lengths)?;
            check_room(sequence, tokens, self.capacity - self.lengths[sequence])
        })
    }
}
