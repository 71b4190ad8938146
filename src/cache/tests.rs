//! Caches against plain vectors, one a sequence.

use std::ops::Range;

use half::{bf16, f16};
use ndarray::{Array3, Array4, Axis, s};
use proptest::prelude::*;

use super::rows::Placed;
use super::*;
use crate::input::Sequence;
use crate::keys::source::At;
use crate::math::random::Normal;
use crate::simd::any::AnyRows;
use crate::simd::{Isa, Kernel, Simd};

/// Rows as `f32`, one after the other.
fn widened(rows: AnyRows<'_>, n: usize, cols: usize) -> Vec<f32> {
    struct Copy<'a>(AnyRows<'a>, Vec<f32>, usize);
    impl Kernel for Copy<'_> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd>(mut self, s: S) -> Vec<f32> {
            self.0.pack_rows(s, &mut self.1, self.2);
            self.1
        }
    }
    assert_eq!(rows.len(), n);
    Isa::Scalar.dispatch(Copy(rows, vec![0.0; n * cols], cols))
}

/// Keys and values as an engine gets them, in a room that is no larger than
/// promised and full of NaN.
pub(super) fn read(
    cache: &dyn Cache,
    isa: Isa,
    sequence: usize,
    kv_head: usize,
    keys: Range<usize>,
) -> [Vec<f32>; 2] {
    let KvShape { head_dim, value_dim, .. } = cache.shape();
    let len = cache.lengths()[sequence];
    let there = Sequence { index: 0, batch: 0, slot: sequence, queries: 0..1, keys: 0..len };
    let at = At { sequence: &there, kv_head, keys: keys.clone() };
    let n = keys.len();
    let (mut k, mut v) = (vec![f32::NAN; n * head_dim], vec![f32::NAN; n * value_dim]);
    [
        widened(cache.keys(isa, &at, &mut k), n, head_dim),
        widened(cache.values(isa, &at, &mut v), n, value_dim),
    ]
}

/// What a format makes of a row, element by element.
pub(super) type Stored = fn(&[f32]) -> Vec<f32>;

fn int8(row: &[f32]) -> Vec<f32> {
    if row.iter().any(|x| !x.is_finite()) {
        return vec![f32::NAN; row.len()];
    }
    let max = row.iter().fold(0f32, |max, x| max.max(x.abs()));
    let scale = (max / 127.0).max(f32::MIN_POSITIVE);
    row.iter().map(|x| (x / scale).round_ties_even().clamp(-127.0, 127.0) * scale).collect()
}

pub(super) fn int4(row: &[f32]) -> Vec<f32> {
    if row.iter().any(|x| !x.is_finite()) {
        return vec![f32::NAN; row.len()];
    }
    let min = row.iter().copied().fold(f32::INFINITY, f32::min);
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let step = (((f64::from(max) - f64::from(min)) / 15.0) as f32).max(f32::MIN_POSITIVE);
    let code = |x: f32| ((0.5f32.mul_add(x, -0.5 * min)) / (0.5 * step)).round_ties_even().clamp(0.0, 15.0);
    row.iter().map(|&x| code(x) * step + min).collect()
}

pub(super) fn q8_0(row: &[f32]) -> Vec<f32> {
    let group = |x: &[f32]| {
        let d = x.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
        let inverse = if (1.0 / d).is_infinite() { 0.0 } else { 1.0 / d };
        let stored = f16::from_f32(d).to_f32();
        x.iter().map(|x| (x * inverse).round_ties_even() * stored).collect::<Vec<_>>()
    };
    row.chunks(32).flat_map(group).collect()
}

pub(super) fn q4_0(row: &[f32]) -> Vec<f32> {
    let group = |x: &[f32]| {
        // The first of the largest magnitude, with its sign.
        let largest = x.iter().fold(0f32, |most, &x| if x.abs() > most.abs() { x } else { most });
        let d = largest / -8.0;
        let inverse = if (1.0 / d).is_infinite() { 0.0 } else { 1.0 / d };
        let stored = f16::from_f32(d).to_f32();
        let code = |x: &f32| (x * inverse + 8.5).floor().min(15.0);
        x.iter().map(|x| (code(x) - 8.0) * stored).collect::<Vec<_>>()
    };
    row.chunks(32).flat_map(group).collect()
}

/// Plain Rust for [`Rotated`]: blocks, signs, transform, levels, norm.
pub(super) fn rotated<const BITS: u32, const UNBIASED: bool>(row: &[f32]) -> Vec<f32> {
    let signs = crate::math::random::signs(row.len());
    let table = crate::simd::rotate::levels(BITS);
    let levels = &table[..1 << BITS];
    let hadamard = |x: &mut [f32]| {
        let mut distance = 1;
        while distance < x.len() {
            for i in (0..x.len()).filter(|i| i & distance == 0) {
                (x[i], x[i + distance]) = (x[i] + x[i + distance], x[i] - x[i + distance]);
            }
            distance *= 2;
        }
    };
    let dot = |a: &[f32], b: &[f32]| {
        let mut lanes = [0f32; 16];
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            lanes[i % 16] += a * b;
        }
        lanes.iter().copied().map(f64::from).sum::<f64>()
    };
    let (mut out, mut first) = (Vec::new(), 0);
    while first < row.len() {
        let n = 1 << (row.len() - first).min(1024).ilog2();
        let (x, signs) = (&row[first..first + n], &signs[first..first + n]);
        first += n;
        if x.iter().any(|x| !x.is_finite()) {
            out.extend(vec![f32::NAN; n]);
            continue;
        }
        let largest = x.iter().fold(0f32, |max, x| max.max(x.abs()));
        if largest == 0.0 {
            out.extend(vec![0.0; n]);
            continue;
        }
        let x: Vec<f32> = x.iter().map(|x| x / largest).collect();
        let mut y: Vec<f32> = x.iter().zip(signs).map(|(x, sign)| x * sign).collect();
        let length = dot(&x, &x).sqrt();
        hadamard(&mut y);
        y.iter_mut().for_each(|y| *y /= length as f32);
        let above = |y: f32| levels.windows(2).filter(|pair| 0.5 * (pair[0] + pair[1]) < y).count();
        let mut z: Vec<f32> = y.iter().map(|&y| levels[above(y)]).collect();
        let length = f64::from(largest) * length;
        let norm = if UNBIASED { (length * n as f64 / dot(&y, &z)) as f32 } else { length as f32 };
        hadamard(&mut z);
        out.extend(z.iter().zip(signs).map(|(z, sign)| z * (sign * (norm / n as f32))));
    }
    out
}

pub(super) fn rounded<T: Element>(row: &[f32]) -> Vec<f32> {
    row.iter().map(|&x| T::from_f32(x).to_f32()).collect()
}

/// One step of a random history. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    Append { sequence: usize, n: usize },
    AppendEach { first: usize, count: usize, n: usize },
    Fork { from: usize, to: usize },
    Truncate { sequence: usize, len: usize },
    Share { from: usize, to: usize, len: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..4usize, 0..20usize).prop_map(|(sequence, n)| Step::Append { sequence, n }),
        1 => (0..4usize, 0..5usize, 0..9usize)
            .prop_map(|(first, count, n)| Step::AppendEach { first, count, n }),
        2 => (0..4usize, 0..4usize).prop_map(|(from, to)| Step::Fork { from, to }),
        2 => (0..4usize, 0..60usize).prop_map(|(sequence, len)| Step::Truncate { sequence, len }),
        1 => (0..4usize, 0..4usize, 0..60usize).prop_map(|(from, to, len)| Step::Share { from, to, len }),
    ];
    prop::collection::vec(step, 1..40)
}

/// A token: its key and its value in each head.
type Token = Vec<[Vec<f32>; 2]>;

/// What a cache of any kind must do.
struct Model {
    tokens: Vec<Vec<Token>>,
    stored: [Stored; 2],
    shape: KvShape,
}

impl Model {
    fn new(sequences: usize, shape: KvShape, stored: [Stored; 2]) -> Self {
        Self { tokens: vec![Vec::new(); sequences], stored, shape }
    }

    fn append(&mut self, sequence: usize, k: ArrayView3<'_, f32>, v: ArrayView3<'_, f32>) {
        for t in 0..k.dim().1 {
            let row = |i: usize, x: &ArrayView3<'_, f32>, head: usize| {
                (self.stored[i])(&x.slice(s![head, t, ..]).to_vec())
            };
            let token = (0..self.shape.kv_heads).map(|head| [row(0, &k, head), row(1, &v, head)]).collect();
            self.tokens[sequence].push(token);
        }
    }

    /// Whether the cache reads as the model does, on every instruction set, as
    /// a whole and in blocks that start anywhere.
    fn check(&self, cache: &dyn Cache) {
        let lengths: Vec<usize> = self.tokens.iter().map(Vec::len).collect();
        assert_eq!(cache.lengths(), lengths);
        // Codes of 8 bits know no -0: adding 0 takes its sign.
        let bits = |x: &[f32]| {
            x.iter().map(|x| if x.is_nan() { 1 } else { (x + 0.0).to_bits() }).collect::<Vec<_>>()
        };
        for (sequence, tokens) in self.tokens.iter().enumerate() {
            let len = tokens.len();
            for keys in [0..len, len / 3..len, len / 2..len - len / 4, len..len] {
                for (head, isa) in
                    (0..self.shape.kv_heads).flat_map(|h| Isa::available().map(move |isa| (h, isa)))
                {
                    let [k, v] = read(cache, isa, sequence, head, keys.clone());
                    let want = |i: usize| {
                        tokens[keys.clone()].iter().flat_map(|t| t[head][i].clone()).collect::<Vec<_>>()
                    };
                    assert_eq!(bits(&k), bits(&want(0)), "keys {keys:?} of sequence {sequence}, {isa}");
                    assert_eq!(bits(&v), bits(&want(1)), "values {keys:?} of sequence {sequence}, {isa}");
                }
            }
        }
    }
}

/// What a random history needs of a cache beside the traits.
trait Kind: Append + Clone {
    /// Whether so many more tokens of each of these sequences fit, by counting.
    fn fits(&self, sequences: &[usize], n: usize) -> bool;
    fn share(&mut self, from: usize, to: usize, len: usize) -> bool;
    fn check(&self) {}
}

impl<K: Format, V: Format> Kind for Contiguous<K, V> {
    fn fits(&self, sequences: &[usize], n: usize) -> bool {
        sequences.iter().all(|&i| self.lengths()[i] + n <= self.capacity())
    }
    fn share(&mut self, _: usize, _: usize, _: usize) -> bool {
        false
    }
}

impl<K: Format, V: Format> Kind for Paged<K, V> {
    fn fits(&self, sequences: &[usize], n: usize) -> bool {
        // One sequence after the other, on a copy.
        let mut copy = self.clone();
        sequences.iter().all(|&i| copy.grow(&[i], n).is_ok())
    }
    fn share(&mut self, from: usize, to: usize, len: usize) -> bool {
        let table = self.table(from).unwrap()[..len.div_ceil(self.pages().len)].to_vec();
        Self::share(self, to, &table, len).unwrap();
        true
    }
    fn check(&self) {
        let held: std::collections::BTreeSet<usize> =
            (0..self.lengths().len()).flat_map(|i| self.table(i).unwrap().to_vec()).collect();
        assert_eq!(self.free_pages(), self.pages().count - held.len());
        for i in 0..self.lengths().len() {
            assert_eq!(self.table(i).unwrap().len(), self.lengths()[i].div_ceil(self.pages().len));
        }
    }
}

fn noise(seed: u64, dim: (usize, usize, usize, usize)) -> Array4<f32> {
    let mut normal = Normal::new(seed);
    Array4::from_shape_simple_fn(dim, || normal.next().unwrap() as f32)
}

fn run<C: Kind>(cache: C, stored: Stored, steps: &[Step]) {
    run_mixed(cache, [stored; 2], steps);
}

fn run_mixed<C: Kind>(mut cache: C, stored: [Stored; 2], steps: &[Step]) {
    let shape = cache.shape();
    let sequences = cache.lengths().len();
    let mut model = Model::new(sequences, shape, stored);
    for (seed, step) in steps.iter().enumerate() {
        let tokens = |count: usize, n: usize| {
            let k = noise(seed as u64, (count, shape.kv_heads, n, shape.head_dim));
            let v = noise(1000 + seed as u64, (count, shape.kv_heads, n, shape.value_dim));
            (k, v)
        };
        match *step {
            Step::Append { sequence, n } => {
                let (k, v) = tokens(1, n);
                let (k, v) = (k.index_axis(Axis(0), 0), v.index_axis(Axis(0), 0));
                let fits = cache.fits(&[sequence], n);
                assert_eq!(cache.append(sequence, k, v).is_ok(), fits);
                if fits {
                    model.append(sequence, k, v);
                }
            }
            Step::AppendEach { first, count, n } => {
                let named: Vec<usize> = (0..count.min(sequences)).map(|i| (first + i) % sequences).collect();
                let (k, v) = tokens(named.len(), n);
                let fits = cache.fits(&named, n);
                assert_eq!(cache.append_each(&named, k.view(), v.view()).is_ok(), fits);
                for (i, &sequence) in named.iter().enumerate().filter(|_| fits) {
                    model.append(sequence, k.index_axis(Axis(0), i), v.index_axis(Axis(0), i));
                }
            }
            Step::Fork { from, to } => {
                cache.fork(from, to).unwrap();
                model.tokens[to] = model.tokens[from].clone();
            }
            Step::Truncate { sequence, len } => {
                let fits = len <= cache.lengths()[sequence];
                assert_eq!(cache.truncate(sequence, len).is_ok(), fits);
                model.tokens[sequence].truncate(len);
            }
            Step::Share { from, to, len } => {
                let len = len.min(cache.lengths()[from]);
                if cache.share(from, to, len) {
                    model.tokens[to] = model.tokens[from][..len].to_vec();
                }
            }
        }
        cache.check();
        model.check(&cache);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn histories_of_contiguous_caches(steps in steps(), capacity in 0..50usize) {
        let shape = KvShape { kv_heads: 2, head_dim: 5, value_dim: 18 };
        run(Contiguous::<f32>::new(shape, 4, capacity).unwrap(), <[f32]>::to_vec, &steps);
        run(Contiguous::<bf16>::new(shape, 4, capacity).unwrap(), rounded::<bf16>, &steps);
        run(Contiguous::<Int8>::new(shape, 4, capacity).unwrap(), int8, &steps);
        let mixed = Contiguous::<Rotated<3>, Q4_0>::new(shape, 4, capacity).unwrap();
        run_mixed(mixed, [rotated::<3, true>, q4_0], &steps);
    }

    #[test]
    fn histories_of_paged_caches(steps in steps(), len in 1..20usize, count in 0..20usize) {
        let shape = KvShape { kv_heads: 2, head_dim: 17, value_dim: 3 };
        let pages = Pages { count, len };
        run(Paged::<f32>::new(shape, 4, pages).unwrap(), <[f32]>::to_vec, &steps);
        run(Paged::<f16>::new(shape, 4, pages).unwrap(), rounded::<f16>, &steps);
        run(Paged::<Int8>::new(shape, 4, pages).unwrap(), int8, &steps);
        run_mixed(Paged::<f16, Int4>::new(shape, 4, pages).unwrap(), [rounded::<f16>, int4], &steps);
    }
}

#[test]
fn one_token_at_a_time_or_many_at_once() {
    let shape = KvShape { kv_heads: 3, head_dim: 33, value_dim: 16 };
    let mut k = noise(1, (1, 3, 40, 33)).index_axis_move(Axis(0), 0);
    let v = noise(2, (1, 3, 40, 16)).index_axis_move(Axis(0), 0);
    // A later token of a larger size leaves the earlier ones as they are.
    k.slice_mut(s![.., 39, ..]).mapv_inplace(|x| x * 1e6);
    let read_all = |cache: &dyn Cache| {
        (0..3)
            .flat_map(|head| read(cache, Isa::Scalar, 0, head, 0..40))
            .flatten()
            .map(f32::to_bits)
            .collect::<Vec<_>>()
    };
    fn both<C: Append>(mut once: C, mut steps: C, k: &Array3<f32>, v: &Array3<f32>) -> [C; 2] {
        once.append(0, k.view(), v.view()).unwrap();
        for t in 0..40 {
            let of = |x: &Array3<f32>| x.slice(s![.., t..t + 1, ..]).to_owned();
            steps.append(0, of(k).view(), of(v).view()).unwrap();
        }
        [once, steps]
    }
    let contiguous = || Contiguous::<Int8>::new(shape, 1, 40).unwrap();
    let paged = || Paged::<Int8>::new(shape, 1, Pages { count: 6, len: 7 }).unwrap();
    let [a, b] = both(contiguous(), contiguous(), &k, &v);
    let [c, d] = both(paged(), paged(), &k, &v);
    assert_eq!(read_all(&a), read_all(&b));
    assert_eq!(read_all(&a), read_all(&c));
    assert_eq!(read_all(&a), read_all(&d));
}

#[test]
fn appended_arrays_may_lie_anyhow() {
    let shape = KvShape { kv_heads: 2, head_dim: 9, value_dim: 20 };
    // [tokens, heads, dim] with the last axis reversed.
    let k = noise(1, (1, 6, 2, 9)).index_axis_move(Axis(0), 0);
    let v = noise(2, (1, 6, 2, 20)).index_axis_move(Axis(0), 0);
    let (k, v) = (k.slice(s![.., .., ..;-1]), v.slice(s![.., .., ..;-1]));
    let (k, v) = (k.permuted_axes([1, 0, 2]), v.permuted_axes([1, 0, 2]));
    let mut model = Model::new(1, shape, [int8; 2]);
    model.append(0, k, v);
    let mut cache = Paged::<Int8>::new(shape, 1, Pages { count: 3, len: 2 }).unwrap();
    cache.append(0, k, v).unwrap();
    model.check(&cache);
}

#[test]
fn formats_round_as_arrays_do() {
    let shape = KvShape { kv_heads: 1, head_dim: 4, value_dim: 4 };
    let x = Array3::from_shape_vec((1, 1, 4), vec![1.0f32 / 3.0, -70_000.0, f32::NAN, 1e-30]).unwrap();
    let half = x.mapv(f16::from_f32);
    let mut cache = Contiguous::<f16>::new(shape, 1, 2).unwrap();
    cache.append(0, x.view(), x.view()).unwrap();
    cache.append(0, half.view(), half.view()).unwrap();
    let [k, _] = read(&cache, Isa::Scalar, 0, 0, 0..2);
    for (got, want) in k.iter().zip(half.iter().chain(&half)) {
        assert!(got.to_bits() == want.to_f32().to_bits() || got.is_nan() && want.is_nan());
    }
}

#[test]
fn int8_is_off_by_what_it_says() {
    for (dim, size) in [(1, 1.0), (7, 3e-38), (64, 1e-42), (128, 1.0), (100, 1e30), (33, f32::MAX / 4.0)] {
        let shape = KvShape { kv_heads: 1, head_dim: dim, value_dim: 0 };
        let mut cache = Contiguous::<Int8>::new(shape, 1, 200).unwrap();
        let k = noise(dim as u64, (1, 1, 200, dim))
            .index_axis_move(Axis(0), 0)
            .mapv(|x| x.clamp(-4.0, 4.0) * size);
        cache.append(0, k.view(), k.slice(s![.., .., ..0])).unwrap();
        let [got, _] = read(&cache, Isa::available().last().unwrap(), 0, 0, 0..200);
        for (row, got) in k.index_axis(Axis(0), 0).rows().into_iter().zip(got.chunks_exact(dim)) {
            let max = row.iter().fold(0f64, |max, &x| max.max(f64::from(x).abs()));
            let bound = (max / 253.9).max(2f64.powi(-127));
            for (x, got) in row.iter().zip(got) {
                let error = (f64::from(*x) - f64::from(*got)).abs();
                assert!(error <= bound, "{got:e} for {x:e}, {error:e} of {bound:e}");
            }
        }
    }
}

#[test]
fn int8_shows_what_it_cannot_hold() {
    let shape = KvShape { kv_heads: 2, head_dim: 20, value_dim: 1 };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut cache = Contiguous::<Int8>::new(shape, 1, 3).unwrap();
        let mut k = noise(1, (1, 2, 3, 20)).index_axis_move(Axis(0), 0);
        let v = Array3::<f32>::zeros((2, 3, 1));
        k[[1, 1, 18]] = bad;
        cache.append(0, k.view(), v.view()).unwrap();
        for head in 0..2 {
            let [k, v] = read(&cache, Isa::available().last().unwrap(), 0, head, 0..3);
            for (token, row) in k.chunks_exact(20).enumerate() {
                let lost = row.iter().all(|x| x.is_nan());
                assert!(if (head, token) == (1, 1) { lost } else { row.iter().all(|x| x.is_finite()) });
            }
            assert_eq!(v, [0.0; 3]);
        }
    }
}

#[test]
fn latents_are_keys_and_values() {
    let x = noise(1, (1, 2, 30, 21)).index_axis_move(Axis(0), 0);
    fn check<C: Cache + Placed>(mut cache: Latent<C>, stored: Stored, x: &Array3<f32>) {
        assert_eq!(cache.shape(), KvShape { kv_heads: 1, head_dim: 21, value_dim: 16 });
        cache.append_each(&[1, 0], x.view()).unwrap();
        cache.append(0, x.slice(s![0, ..7, ..])).unwrap();
        cache.truncate(1, 25).unwrap();
        assert_eq!(cache.lengths(), [37, 25]);
        for isa in Isa::available() {
            let [k, v] = read(&cache, isa, 0, 0, 3..35);
            for (t, (k, v)) in (3..35).zip(k.chunks_exact(21).zip(v.chunks_exact(16))) {
                let row = if t < 30 { x.slice(s![1, t, ..]) } else { x.slice(s![0, t - 30, ..]) };
                assert_eq!(k, stored(&row.to_vec()));
                assert_eq!(v, &k[..16]);
            }
        }
    }
    check(Latent::contiguous::<f32>(16, 5, 2, 40).unwrap(), <[f32]>::to_vec, &x);
    check(Latent::paged::<bf16>(16, 5, 2, Pages { count: 12, len: 6 }).unwrap(), rounded::<bf16>, &x);
    check(Latent::paged::<Int8>(16, 5, 2, Pages { count: 2, len: 64 }).unwrap(), int8, &x);
}

#[test]
fn pages_in_a_row_are_read_where_they_lie() {
    let shape = KvShape { kv_heads: 2, head_dim: 8, value_dim: 8 };
    let mut cache = Paged::<f32>::new(shape, 2, Pages { count: 8, len: 4 }).unwrap();
    let x = noise(1, (1, 2, 16, 8)).index_axis_move(Axis(0), 0);
    cache.append(0, x.view(), x.view()).unwrap();
    let there = Sequence { index: 0, batch: 0, slot: 0, queries: 0..1, keys: 0..16 };
    let at = At { sequence: &there, kv_head: 1, keys: 1..15 };
    // A room of nothing: nothing is copied.
    let rows = cache.keys(Isa::Scalar, &at, &mut []);
    let [(key, stride), _] = cache.ahead(&at);
    assert_eq!(rows.address(0), (key, stride));
    assert_eq!(stride, 32);
    assert_eq!(cache.ahead(&At { sequence: &there, kv_head: 1, keys: 16..80 })[0].0, std::ptr::null());
}

#[test]
fn the_last_holder_of_a_page_keeps_it() {
    let shape = KvShape { kv_heads: 1, head_dim: 1, value_dim: 1 };
    let mut cache = Paged::<f32>::new(shape, 2, Pages { count: 2, len: 4 }).unwrap();
    let x = Array4::<f32>::ones((2, 1, 1, 1));
    let one = x.index_axis(Axis(0), 0);
    cache.append(0, one, one).unwrap();
    cache.fork(0, 1).unwrap();
    // Two append to one shared page: one copy does.
    cache.append_each(&[0, 1], x.view(), x.view()).unwrap();
    assert_eq!((cache.free_pages(), cache.lengths()), (0, &[2, 2][..]));
    assert_ne!(cache.table(0).unwrap(), cache.table(1).unwrap());
}

/// The message of a refusal that left the cache as it was.
fn refused<C: Cache + Clone>(cache: &mut C, act: impl FnOnce(&mut C) -> Result<()>) -> String {
    let before = format!("{cache:?}");
    let message = act(cache).unwrap_err().to_string();
    assert_eq!(format!("{cache:?}"), before, "{message}");
    message
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let shape = KvShape { kv_heads: 2, head_dim: 3, value_dim: 4 };
    let x = noise(1, (2, 2, 5, 3));
    let y = noise(2, (2, 2, 5, 4));
    let (k, v) = (x.index_axis(Axis(0), 0), y.index_axis(Axis(0), 0));

    let mut cache = Contiguous::<f32>::new(shape, 2, 7).unwrap();
    cache.append(1, k, v).unwrap();
    let c = &mut cache;
    assert_eq!(
        refused(c, |c| c.append(1, k, v)),
        "k: expected at most the 2 tokens that sequence 1 has room for, got 5 tokens"
    );
    assert!(refused(c, |c| c.append_each(&[0, 1], x.view(), y.view())).contains("sequence 1 has room for"));
    assert_eq!(
        refused(c, |c| c.append(2, k, v)),
        "sequences: expected one of the 2 sequences of the cache, got 2"
    );
    assert_eq!(
        refused(c, |c| c.append_each(&[0, 0], x.view(), y.view())),
        "sequences: expected each sequence once, got 0 twice"
    );
    assert!(
        refused(c, |c| c.append(0, v, v))
            .starts_with("k: expected shape [sequences, kv_heads, tokens, dim] = (1, 2, 5, 3)")
    );
    assert!(refused(c, |c| c.append(0, k, v.slice(s![.., ..4, ..]))).starts_with("v: expected shape"));
    assert!(refused(c, |c| c.append(0, k.slice(s![..1, .., ..]), v)).starts_with("k: expected shape"));
    assert_eq!(refused(c, |c| c.truncate(1, 6)), "len: expected at most the 5 tokens of the sequence, got 6");
    assert!(refused(c, |c| c.truncate(9, 0)).starts_with("sequence: "));
    assert!(refused(c, |c| c.fork(2, 0)).starts_with("from: "));
    assert!(refused(c, |c| c.fork(0, 2)).starts_with("to: "));

    let mut cache = Paged::<Int8>::new(shape, 3, Pages { count: 4, len: 3 }).unwrap();
    cache.append(0, k, v).unwrap();
    cache.fork(0, 1).unwrap();
    let c = &mut cache;
    assert_eq!(
        refused(c, |c| c.append_each(&[0, 1], x.view(), y.view())),
        "k: expected tokens for which the 2 free pages of 3 tokens do, got 5 tokens, which need 5 pages"
    );
    assert!(refused(c, |c| c.append(7, k, v)).starts_with("sequences: "));
    assert!(refused(c, |c| c.share(2, &[0], 4)).contains("2 pages, which 4 tokens need in pages of 3"));
    assert!(refused(c, |c| c.share(2, &[0, 4], 4)).contains("pages below 4"));
    assert!(refused(c, |c| c.share(2, &[0, 3], 4)).contains("free page 3"));
    assert!(refused(c, |c| c.share(2, &[0, 0], 4)).contains("page 0 twice"));
    assert!(
        refused(c, |c| c.share(2, &[0, 1], 6)).contains("a page with 3 tokens at index 1, got page 1 with 2")
    );
    assert!(refused(c, |c| c.share(3, &[], 0)).starts_with("sequence: "));
    assert!(c.table(3).is_err());
    assert!(Paged::<f32>::new(shape, 1, Pages { count: 1, len: 0 }).is_err());
}

#[test]
fn sizes_that_no_memory_holds_are_refused() {
    let huge = usize::MAX / 2;
    let shape = |kv_heads, head_dim| KvShape { kv_heads, head_dim, value_dim: 1 };
    assert!(Contiguous::<f32>::new(shape(2, 64), 3, huge).is_err());
    assert!(Contiguous::<Int8>::new(shape(2, huge), 3, 2).is_err());
    assert!(Contiguous::<f16>::new(shape(huge, 1), huge, 1).is_err());
    assert!(Contiguous::<f16>::new(shape(0, 1), huge, 1).is_err());
    assert!(Paged::<f32>::new(shape(2, 64), 3, Pages { count: huge, len: 3 }).is_err());
    assert!(Paged::<f32>::new(shape(0, 64), 3, Pages { count: huge, len: 1 }).is_err());
    assert!(Latent::contiguous::<bf16>(usize::MAX, 1, 1, 1).is_err());
    // A cache of nothing is one.
    let mut empty = Contiguous::<f32>::new(shape(0, 0), 1, huge).unwrap();
    let none = Array3::<f32>::zeros((0, 5, 0));
    empty.append(0, none.view(), Array3::<f32>::zeros((0, 5, 1)).view()).unwrap();
    assert_eq!((empty.lengths(), empty.bytes()), (&[5][..], 0));
}
