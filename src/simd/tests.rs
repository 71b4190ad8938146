//! One runner for every instruction set: each operation runs on all that the
//! CPU has and is compared with plain Rust, lane by lane.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ndarray::{Array2, Array4, ArrayView2, s};

use super::amx::{Amx, Operands, Order, TileOp};
use super::mem::{Buffer, OutRows, Parts, Rows, bytes_for, claim_words};
use super::pack::{PackKeyPairs, PackLeft, PackValuePairs, SLICE, add_lost};
use super::quant::{Dequantize, Quantize, StoreRows};
use super::tile::{Product, Update};
use super::*;
use crate::element::Element;
use crate::math::gates::exact;

// ---- what the tests share

/// Values at which floating point goes wrong.
const EDGES: [f32; 28] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -0.5,
    1.5,
    -1.5,
    2.5,
    -2.5,
    0.499_999_97,
    0.75,
    3.7,
    -3.7,
    8_388_607.5,
    -8_388_609.0,
    1e10,
    -1e10,
    f32::EPSILON,
    -1e-10,
    f32::MIN_POSITIVE,
    f32::from_bits(1),
    -f32::from_bits(0x007f_ffff),
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

/// SplitMix64.
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 32) as u32
    }

    /// From -1 to 1.
    fn unit(&mut self) -> f32 {
        self.bits() as i32 as f32 / 2_147_483_648.0
    }

    fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

/// Every triple of edges, then random values of everyday size and random bit
/// patterns; a multiple of every vector length.
fn triples() -> [Vec<f32>; 3] {
    let mut of = [const { Vec::new() }; 3];
    for a in EDGES {
        for b in EDGES {
            for c in EDGES {
                of[0].push(a);
                of[1].push(b);
                of[2].push(c);
            }
        }
    }
    let mut noise = Noise(1);
    for x in &mut of {
        x.extend(noise.units(4096));
        x.extend((0..4096).map(|_| f32::from_bits(noise.bits())));
        assert!(x.len().is_multiple_of(MAX_LANES));
    }
    of
}

/// The same bits, or both NaN.
fn same(x: f32, y: f32) -> bool {
    x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan()
}

fn panics<R>(f: impl FnOnce() -> R) -> bool {
    catch_unwind(AssertUnwindSafe(f)).is_err()
}

/// Each operation as a function on slices of whole vectors.
macro_rules! lanewise {
    ($($name:ident($s:ident, $a:ident, $b:ident, $c:ident) $body:expr;)*) => {$(
        fn $name(isa: Isa, a: &[f32], b: &[f32], c: &[f32]) -> Vec<f32> {
            struct Op<'a>(&'a [f32], &'a [f32], &'a [f32]);
            impl Kernel for Op<'_> {
                type Output = Vec<f32>;
                #[inline(always)]
                fn run<S: Simd>(self, $s: S) -> Vec<f32> {
                    let mut out = vec![0.0; self.0.len()];
                    for i in (0..out.len()).step_by(S::LANES) {
                        let [$a, $b, $c] = [self.0, self.1, self.2].map(|x| $s.load(&x[i..]));
                        $s.store(&mut out[i..], $body);
                    }
                    out
                }
            }
            isa.dispatch(Op(a, b, c))
        }
    )*};
}

lanewise! {
    add(s, a, b, _c) s.add(a, b);
    sub(s, a, b, _c) s.sub(a, b);
    mul(s, a, b, _c) s.mul(a, b);
    div(s, a, b, _c) s.div(a, b);
    mul_add(s, a, b, c) s.mul_add(a, b, c);
    mul_sub(s, a, b, c) s.mul_sub(a, b, c);
    max(s, a, b, _c) s.max(a, b);
    min(s, a, b, _c) s.min(a, b);
    abs(s, a, _b, _c) s.abs(a);
    round(s, a, _b, _c) s.round(a);
    fract(s, a, _b, _c) s.fract(a);
    select_lt(s, a, b, c) s.select(s.lt(a, b), b, c);
    ldexp(s, a, n, _c) s.ldexp(a, n);
    ldexp_flush(s, a, n, _c) s.ldexp_flush(a, n, -126.0);
    exp2_flush(s, x, _b, _c) exp::exp2_flush(s, x);
    exp2_product(s, x, y, _c) exp::exp2_product(s, x, y);
    exp(s, x, _b, _c) exp::exp(s, x);
    softplus(s, x, _b, _c) exp::softplus(s, x);
    sigmoid(s, x, _b, _c) exp::sigmoid(s, x);
    tanh(s, x, _b, _c) exp::tanh(s, x);
    normal(s, x, _b, _c) exp::normal(s, x);
    gelu(s, x, _b, _c) exp::gelu(s, x);
}

type Lanewise = fn(Isa, &[f32], &[f32], &[f32]) -> Vec<f32>;

/// Runs `op` on every instruction set and asks `right(isa, [a, b, c], got)`
/// about each lane.
fn judge(op: Lanewise, [a, b, c]: &[Vec<f32>; 3], right: impl Fn(Isa, [f32; 3], f32) -> bool) {
    for isa in Isa::available() {
        for (i, got) in op(isa, a, b, c).into_iter().enumerate() {
            let of = [a[i], b[i], c[i]];
            assert!(right(isa, of, got), "{isa}: {got:e} ({:#x}) of {of:?}", got.to_bits());
        }
    }
}

// ---- the choice of an instruction set

#[test]
fn dispatch_runs_on_what_was_asked_for() {
    struct Which;
    impl Kernel for Which {
        type Output = (Isa, usize, usize);
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> Self::Output {
            (S::ISA, S::LANES, S::TILE_VECTORS)
        }
    }
    for isa in Isa::ALL {
        let (ran, lanes, vectors) = isa.dispatch(Which);
        // AMX multiplies alone: vectors are those of AVX-512.
        let vectors_of = if isa == Isa::Amx { Isa::Avx512 } else { isa };
        assert!(ran == if vectors_of.is_available() { vectors_of } else { Isa::Scalar });
        assert_eq!((isa.lanes(), isa.panel()), (lanes, lanes * vectors));
        assert!(lanes <= MAX_LANES && MAX_LANES.is_multiple_of(lanes) && vectors <= 4);
    }
    assert_eq!(Isa::available().next(), Some(Isa::Scalar));
}

#[test]
fn every_isa_of_the_cpu_can_be_chosen() {
    for isa in Isa::available() {
        assert_eq!(Isa::choose(Some(isa)), Ok(isa));
        assert_eq!(Isa::named(isa.name()), Ok(isa));
    }
}

#[test]
fn an_isa_that_the_cpu_lacks_is_refused() {
    let lacking: Vec<_> = Isa::ALL.into_iter().filter(|isa| !isa.is_available()).collect();
    assert!(!lacking.is_empty(), "no CPU has both AVX and NEON");
    let available: Vec<_> = Isa::available().map(Isa::name).collect();
    let has = format!("is not available on this CPU, which has {}", available.join(", "));
    for isa in lacking {
        let refused = Isa::choose(Some(isa)).unwrap_err().to_string();
        assert_eq!(refused, format!("isa: instruction set `{isa}` {has}"));
        let refused = Isa::named(isa.name()).unwrap_err().to_string();
        assert_eq!(refused, format!("ATTENTION_KERNELS_ISA: instruction set `{isa}` {has}"));
    }
    let refused = Isa::named("AVX").unwrap_err().to_string();
    assert_eq!(refused, format!("ATTENTION_KERNELS_ISA: instruction set `AVX` {has}"));
}

// ---- products with tiles of bf16

/// A matrix of small numbers.
fn numbers<T: Element>(noise: &mut Noise, rows: usize, cols: usize) -> Array2<T> {
    Array2::from_shape_simple_fn((rows, cols), || T::from_f32(noise.unit()))
}

/// Packs on this instruction set.
fn pack<K: Kernel>(amx: Amx, kernel: K) {
    amx.vectorize(kernel);
}

/// The sums that `operands` give, on top of those in `c` with `ADD`, a few at
/// a time.
// Elsewhere there is no `Amx`, and the compiler knows.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables, unreachable_code))]
fn multiply<const ADD: bool>(amx: Amx, operands: Operands<'_>, c: &mut [f32]) {
    let tiles = amx.tiles();
    let mut product = amx::Product::<ADD>::new(operands);
    for count in (1..=4).cycle() {
        if product.left() == 0 {
            break;
        }
        product.advance(&tiles, count, c);
    }
}

/// Sums of as many products as there are columns, off by no more than `most`
/// times the sum of their magnitudes.
fn queries_times_keys<T: Element>(most: f64) {
    let Some(amx) = Amx::detect() else { return };
    let mut noise = Noise(5);
    for (rows, keys, cols) in [(32, 32, 32), (32, 70, 128), (17, 19, 70), (16, 5, 1), (1, 64, 33)] {
        let (q, k) = (numbers::<T>(&mut noise, rows, cols), numbers::<T>(&mut noise, keys, cols));
        let steps = cols.div_ceil(amx::DEPTH);
        let tile = steps * T::PARTS * amx::TILE_LEN;
        let blocks = keys.div_ceil(amx::BLOCK);
        let mut left = vec![f32::NAN; 2 * tile];
        let mut right = vec![f32::NAN; blocks * 2 * tile];
        let mut huge = [vec![9; rows], vec![9; keys]];
        let [of_rows, of_keys] = &mut huge;
        pack(amx, PackLeft { from: q.view().into(), first: 0, step: 1, to: &mut left, huge: of_rows });
        pack(amx, PackKeyPairs { from: k.view().into(), to: &mut right, huge: of_keys });
        assert!(huge.iter().flatten().all(|&huge| huge == 0));
        let order = Order::of_scores(T::PARTS);
        let mut room = vec![TileOp::default(); order.count(steps)];
        let operands = Operands {
            a: &left,
            row: amx::PAIRS,
            lower: tile,
            b: &right,
            next_block: 2 * tile,
            moves: order.moves(steps, amx::TILE_LEN, &mut room),
            rows,
            blocks,
            ldc: blocks * amx::BLOCK,
        };
        let mut c = vec![f32::NAN; amx::BLOCK * operands.ldc];
        for times in [1.0, 2.0] {
            if times > 1.0 {
                multiply::<true>(amx, operands, &mut c);
            } else {
                multiply::<false>(amx, operands, &mut c);
            }
            for (i, j) in (0..rows).flat_map(|i| (0..keys).map(move |j| (i, j))) {
                let product = |x: usize| f64::from(q[[i, x]].to_f32()) * f64::from(k[[j, x]].to_f32());
                let want: f64 = (0..cols).map(product).sum();
                let size: f64 = (0..cols).map(|x| product(x).abs()).sum();
                let error = (f64::from(c[i * operands.ldc + j]) - times * want).abs();
                assert!(
                    error <= most * times * size,
                    "{:?}, {rows} x {keys} x {cols}, [{i}, {j}]: off by {error:e} of {size:e}",
                    T::DTYPE
                );
            }
        }
    }
}

#[test]
fn amx_queries_times_keys() {
    queries_times_keys::<f32>(3e-7);
    queries_times_keys::<f16>(5e-7);
    queries_times_keys::<bf16>(5e-7);
}

#[test]
fn amx_finds_huge_rows() {
    let Some(amx) = Amx::detect() else { return };
    let cols = 45;
    for (value, expected) in
        [(0.0, 0), (1e15, 0), (1e-45, 0), (1e16, 1), (-f32::MAX, 1), (f32::NEG_INFINITY, 1), (f32::NAN, 1)]
    {
        for col in [0, 17, 31, 32, 44] {
            let mut x = Array2::<f32>::ones((20, cols));
            x[[18, col]] = value;
            let mut to = vec![f32::NAN; 2 * 2 * 3 * amx::TILE_LEN];
            let mut huge = [[9; 20]; 2];
            pack(amx, PackLeft { from: x.view().into(), first: 0, step: 1, to: &mut to, huge: &mut huge[0] });
            pack(amx, PackKeyPairs { from: x.view().into(), to: &mut to, huge: &mut huge[1] });
            for huge in huge {
                assert_eq!(huge[18], expected, "{value} in column {col}");
                assert_eq!(huge.iter().sum::<u8>(), expected, "{value} in column {col}");
            }
        }
    }
}

/// Sums of products with weights in parts, off by no more than `most` times
/// the sum of their magnitudes.
fn weights_times_values<T: Element>(values: usize, cols: usize, parts: usize, most: f64) {
    let Some(amx) = Amx::detect() else { return };
    let mut noise = Noise(6);
    let v = numbers::<T>(&mut noise, values, cols);
    let weights: Vec<f32> = (0..amx::BLOCK * values).map(|_| noise.unit().abs()).collect();
    let steps = values.div_ceil(amx::DEPTH);
    let (blocks, next_block) = (cols.div_ceil(amx::BLOCK), SLICE / amx::DEPTH * T::PARTS * 2 * amx::TILE_LEN);
    let mut right = vec![f32::NAN; blocks * next_block];
    let mut kept = [9];
    pack(amx, PackValuePairs { from: v.view().into(), to: &mut right, kept: &mut kept });
    assert_eq!(kept, [1]);
    struct Split<'a>(&'a [f32], &'a mut [f32], usize);
    impl Kernel for Split<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for (step, weights) in self.0.chunks(amx::DEPTH).enumerate() {
                let mut padded = [0.0; amx::DEPTH];
                padded[..weights.len()].copy_from_slice(weights);
                let [mut low, mut high] = [s.load(&padded), s.load(&padded[amx::TILE..])];
                for part in 0..self.2 {
                    let (pairs, rest) = if self.2 == 3 { s.cut_pairs(low, high) } else { s.pairs(low, high) };
                    s.store(&mut self.1[(step * self.2 + part) * amx::PAIRS..], pairs);
                    [low, high] = rest;
                }
            }
        }
    }
    let row = steps * parts * amx::PAIRS;
    let mut left = vec![f32::NAN; amx::BLOCK * row];
    for (weights, to) in weights.chunks(values).zip(left.chunks_mut(row)) {
        pack(amx, Split(weights, to, parts));
    }
    let order = Order::of_values(parts, T::PARTS);
    let mut room = vec![TileOp::default(); order.count(steps)];
    let operands = Operands {
        a: &left,
        row,
        lower: amx::TILE * row,
        b: &right,
        next_block,
        moves: order.moves(steps, amx::PAIRS, &mut room),
        rows: amx::BLOCK,
        blocks,
        ldc: blocks * amx::BLOCK,
    };
    let mut c = vec![0.0; amx::BLOCK * operands.ldc];
    multiply::<true>(amx, operands, &mut c);
    for (i, j) in (0..amx::BLOCK).flat_map(|i| (0..cols).map(move |j| (i, j))) {
        let product = |t: usize| f64::from(weights[i * values + t]) * f64::from(v[[t, j]].to_f32());
        let want: f64 = (0..values).map(product).sum();
        let size: f64 = (0..values).map(|t| product(t).abs()).sum();
        let error = (f64::from(c[i * operands.ldc + j]) - want).abs();
        assert!(
            error <= most * size,
            "{:?}, {parts} parts, [{i}, {j}]: off by {error:e} of {size:e}",
            T::DTYPE
        );
    }
}

/// Not even of the smallest weights.
#[test]
fn no_part_of_a_weight_is_subnormal() {
    struct Split<'a>(&'a [f32], &'a mut Vec<f32>);
    impl Kernel for Split<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for x in self.0.chunks_exact(2 * S::LANES) {
                for cut in [false, true] {
                    let mut rest = [s.load(x), s.load(&x[S::LANES..])];
                    for _ in 1..amx::MAX_PARTS {
                        let [low, high] = rest;
                        (_, rest) = if cut { s.cut_pairs(low, high) } else { s.pairs(low, high) };
                        let mut lanes = [0.0; MAX_LANES];
                        for rest in rest {
                            s.store(&mut lanes, rest);
                            self.1.extend(&lanes[..S::LANES]);
                        }
                    }
                }
            }
        }
    }
    let least = exp2_flush(Isa::Scalar, &[-102.0; MAX_LANES], &[0.0; MAX_LANES], &[0.0; MAX_LANES])[0];
    assert!(least > 0.0);
    let weights: Vec<f32> = (0..1 << 12).map(|i| f32::from_bits(least.to_bits() + 2047 * i)).collect();
    for isa in Isa::available() {
        let mut parts = vec![];
        isa.dispatch(Split(&weights, &mut parts));
        assert!(parts.iter().any(|&x| x != 0.0));
        assert!(parts.iter().all(|x| !x.is_subnormal()), "{isa}");
    }
}

#[test]
fn amx_weights_in_parts_times_values() {
    for (values, cols) in [(32, 32), (96, 70), (70, 64), (1, 1)] {
        weights_times_values::<bf16>(values, cols, 2, 8e-6);
        weights_times_values::<bf16>(values, cols, 3, 4e-7);
        weights_times_values::<f16>(values, cols, 2, 8e-6);
        weights_times_values::<f16>(values, cols, 3, 6e-7);
        weights_times_values::<f32>(values, cols, 3, 6e-7);
    }
}

/// What tiles cannot take of values is left out of them and added: nothing of
/// it is lost, and what is not visible does not show.
#[test]
fn values_that_tiles_cannot_take() {
    let Some(amx) = Amx::detect() else { return };
    for (value, lost) in [
        (0.0, false),
        (1e-27, false),
        (1e30, false),
        (7e-28, true),
        (1e-45, true),
        (1.3e30, true),
        (f32::MIN, true),
        (f32::INFINITY, true),
        (f32::NAN, true),
    ] {
        let mut x = Array2::<f32>::ones((140, 40));
        x[[130, 37]] = value;
        let mut to = vec![f32::NAN; 2 * 2 * SLICE / amx::DEPTH * 3 * 2 * amx::TILE_LEN];
        let mut kept = [9; 2];
        pack(amx, PackValuePairs { from: x.view().into(), to: &mut to, kept: &mut kept });
        assert_eq!(kept, [1, u8::from(!lost)], "{value}");
        struct Lost<'a>(Rows<'a, f32>, &'a mut [f32]);
        impl Kernel for Lost<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                add_lost(s, &self.0, 130, 0.5, self.1);
            }
        }
        let mut out = [0.25; 64];
        pack(amx, Lost(x.view().into(), &mut out));
        for (col, &got) in out.iter().enumerate() {
            let want = if lost && col == 37 { 0.25 + 0.5 * value } else { 0.25 };
            assert_eq!(got.to_bits(), want.to_bits(), "{value}, column {col}");
        }
    }
}

#[test]
fn pairs_of_bf16_and_what_rounding_left() {
    struct Pairs;
    impl Kernel for Pairs {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let mut noise = Noise(7);
            for _ in 0..200 {
                let mut numbers = || -> [f32; MAX_LANES] { std::array::from_fn(|_| noise.unit()) };
                let given = [numbers(), numbers()];
                let mut to = [0.0; MAX_LANES];
                let [a, b] = [s.load(&given[0]), s.load(&given[1])];
                for (cut, most) in [(false, 1.0 / 256.0), (true, 1.0 / 128.0)] {
                    let (pairs, rest) = if cut { s.cut_pairs(a, b) } else { s.pairs(a, b) };
                    s.store(&mut to, pairs);
                    let mut left = [[0.0; MAX_LANES]; 2];
                    s.store(&mut left[0], rest[0]);
                    s.store(&mut left[1], rest[1]);
                    for lane in 0..S::LANES {
                        let halves = [to[lane].to_bits() << 16, to[lane].to_bits() & 0xffff_0000];
                        for ((half, left), given) in halves.into_iter().zip(left).zip(given) {
                            let half = f32::from_bits(half);
                            assert_eq!(half + left[lane], given[lane]);
                            assert!(left[lane].abs() <= half.abs() * most, "{}: {half}", given[lane]);
                        }
                    }
                }
            }
        }
    }
    for isa in Isa::available() {
        isa.dispatch(Pairs);
    }
}

// ---- operations on lanes

#[test]
fn arithmetic() {
    let of = triples();
    judge(add, &of, |_, [a, b, _], got| same(got, a + b));
    judge(sub, &of, |_, [a, b, _], got| same(got, a - b));
    judge(mul, &of, |_, [a, b, _], got| same(got, a * b));
    judge(div, &of, |_, [a, b, _], got| same(got, a / b));
    judge(abs, &of, |_, [a, ..], got| same(got, a.abs()));
}

#[test]
fn multiply_add_is_fused_where_the_cpu_can() {
    let of = triples();
    judge(mul_add, &of, |isa, [a, b, c], got| match isa {
        Isa::Scalar => same(got, a * b + c),
        _ => same(got, a.mul_add(b, c)),
    });
    judge(mul_sub, &of, |isa, [a, b, c], got| match isa {
        Isa::Scalar => same(got, a * b - c),
        _ => same(got, a.mul_add(b, -c)),
    });
}

#[test]
fn max_and_min_give_the_second_where_either_is_nan() {
    let of = triples();
    judge(max, &of, |_, [a, b, _], got| same(got, if a > b { a } else { b }));
    judge(min, &of, |_, [a, b, _], got| same(got, if a < b { a } else { b }));
}

#[test]
fn rounding() {
    let of = triples();
    judge(round, &of, |_, [a, ..], got| same(got, a.round_ties_even()));
    judge(fract, &of, |_, [a, ..], got| {
        if !a.is_finite() {
            return got.is_nan() || a.is_infinite() && got == 0.0;
        }
        let (a, floor) = (f64::from(a), f64::from(a.floor()));
        let nearest = (a - floor) as f32;
        // AVX-512 rounds down what is not exact.
        got == nearest || f64::from(nearest) + floor != a && got == nearest.next_down()
    });
}

#[test]
fn comparison_and_choice() {
    judge(select_lt, &triples(), |_, [a, b, c], got| same(got, if a < b { b } else { c }));
}

#[test]
fn masks_are_bits() {
    struct Masks;
    impl Kernel for Masks {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let index: [f32; MAX_LANES] = std::array::from_fn(|i| i as f32);
            let (index, minus) = (s.load(&index), s.splat(-1.0));
            for bits in 0..1u64 << S::LANES {
                // Bits beyond the lanes are ignored.
                let m = s.mask(bits | u64::MAX << S::LANES);
                assert_eq!(s.bits(m), bits);
                let mut got = [0.0; MAX_LANES];
                s.store(&mut got, s.select(m, index, minus));
                for (i, &got) in got[..S::LANES].iter().enumerate() {
                    assert_eq!(got, if bits >> i & 1 == 1 { i as f32 } else { -1.0 });
                }
                assert_eq!(s.bits(s.lt(s.splat(-0.5), s.select(m, index, minus))), bits);
            }
        }
    }
    Isa::available().for_each(|isa| isa.dispatch(Masks));
}

/// `f` times each power of two, and what lies about them.
fn scalings(factors: &[f32]) -> [Vec<f32>; 3] {
    let powers = (-400..=400).map(|n| n as f32).flat_map(|n| [n, n + 0.5, n.next_down()]);
    let ends = [f32::NEG_INFINITY, -1e30, -0.0, 1e-40, 1e30, f32::INFINITY];
    let mut of = [const { Vec::new() }; 3];
    for n in powers.chain(ends) {
        of[0].extend_from_slice(factors);
        of[1].extend(factors.iter().map(|_| n));
    }
    while !of[0].len().is_multiple_of(MAX_LANES) {
        of[0].push(1.0);
        of[1].push(0.0);
    }
    of[2] = of[1].clone();
    of
}

/// `a * 2^floor(n)`, rounded once.
fn scaled(a: f32, n: f32) -> f32 {
    (f64::from(a) * f64::from(n.floor().clamp(-800.0, 800.0)).exp2()) as f32
}

#[test]
fn ldexp_rounds_once_over_the_whole_range() {
    let least = f32::MIN_POSITIVE;
    let most = f32::from_bits((100 + 127) << 23);
    let mut factors = vec![1.0, -1.0, -1.999_999_9, least, most, f32::NAN];
    // Random significands, at the sizes where a first step could round too.
    let mut noise = Noise(7);
    for e in [-125, -115, -105, -60, -1, 0, 60] {
        factors.extend((0..8).map(|_| scaled(1.5 + 0.5 * noise.unit(), e as f32)));
    }
    let of = scalings(&factors);
    judge(ldexp, &of, |_, [a, n, _], got| same(got, scaled(a, n)) || a.is_nan() && n.is_infinite());
    // Zero and infinity stay what they are wherever the power is a number.
    let mut of = scalings(&[0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY]);
    of[1].iter_mut().for_each(|n| *n = n.clamp(-1e30, 1e30));
    judge(ldexp, &of, |_, [a, ..], got| same(got, a));
    let nan = [vec![1.0; MAX_LANES], vec![f32::NAN; MAX_LANES], vec![0.0; MAX_LANES]];
    judge(ldexp, &nan, |_, _, got| got.is_nan());
}

#[test]
fn ldexp_flush_is_zero_where_the_power_is_subnormal() {
    let of = scalings(&[1.0, 1.3, 1.999_999_9, 2.0, f32::NAN]);
    judge(ldexp_flush, &of, |_, [a, n, _], got| {
        same(got, if n < -126.0 { 0.0 } else { scaled(a, n) }) || a.is_nan() && n == f32::INFINITY
    });
}

// ---- exponentials

/// Every `step`th bit pattern of the magnitudes from `low` to `high`, with
/// both signs, and fewer of all the others.
fn patterns(low: f32, high: f32, step: usize) -> Vec<f32> {
    let near = (low.to_bits()..high.to_bits()).step_by(step);
    let far = (0..f32::INFINITY.to_bits()).step_by(20_011);
    near.chain(far).map(f32::from_bits).flat_map(|x| [x, -x]).collect()
}

/// `n` neighbours on either side.
fn around(x: f32, n: u32) -> impl Iterator<Item = f32> {
    (x.to_bits() - n..=x.to_bits() + n).map(f32::from_bits)
}

/// How far `got` is from `want` in units of the last place that an `f32` of
/// that size has. Beyond the range everything is `2^128`, as infinity is.
fn ulps(got: f32, want: f64) -> f64 {
    let bounded = |x: f64| x.clamp(-128f64.exp2(), 128f64.exp2());
    let exponent = (want.abs().to_bits() >> 52) as i32 - 1023;
    (bounded(got.into()) - bounded(want)).abs() / f64::from(exponent.clamp(-126, 127) - 23).exp2()
}

/// Runs `op` on every instruction set and asks `right(x, got, want)` about
/// each result.
fn judge_function(
    op: Lanewise,
    mut x: Vec<f32>,
    want: fn(f64) -> f64,
    right: impl Fn(f32, f32, f64) -> bool,
) {
    x.resize(x.len().next_multiple_of(MAX_LANES), 1.0);
    let want: Vec<f64> = x.iter().map(|&x| want(x.into())).collect();
    for isa in Isa::available() {
        for ((&x, got), &want) in x.iter().zip(op(isa, &x, &x, &x)).zip(&want) {
            assert!(right(x, got, want), "{isa}: {got:e} at {x:e} ({:#x}), not {want:e}", x.to_bits());
        }
    }
}

/// What `op` makes of one value, on every instruction set.
fn everywhere(op: Lanewise, x: f32, right: impl Fn(f32) -> bool) {
    for isa in Isa::available() {
        let x = [x; MAX_LANES];
        let got = op(isa, &x, &x, &x)[0];
        assert!(right(got), "{isa}: {got:e} at {:e}", x[0]);
    }
}

#[test]
fn exp2_flush_is_close_and_never_subnormal() {
    let mut x = patterns(1e-8, 126.0, 97);
    x.extend(around(-102.0, 1000));
    x.retain(|&x| x < 128.0);
    judge_function(exp2_flush, x, f64::exp2, |x, got, want| {
        if x < -102.0 { got.to_bits() == 0 } else { (f64::from(got) / want - 1.0).abs() <= 2e-7 }
    });
    for n in -102..128 {
        everywhere(exp2_flush, n as f32, |got| f64::from(got) == f64::from(n).exp2());
    }
    everywhere(exp2_flush, -0.0, |got| got == 1.0);
    everywhere(exp2_flush, f32::NEG_INFINITY, |got| got.to_bits() == 0);
    everywhere(exp2_flush, f32::NAN, f32::is_nan);
}

#[test]
fn exp_is_as_close_as_it_says() {
    let mut x = patterns(1e-8, 105.0, 97);
    // Where results turn subnormal, vanish, overflow.
    x.extend(around(-87.336_54, 2000).chain(around(-103.972_08, 2000)).chain(around(88.722_84, 2000)));
    judge_function(exp, x, f64::exp, |_, got, want| ulps(got, want) <= 1.1);
    for zero in [0.0, -0.0] {
        everywhere(exp, zero, |got| got == 1.0);
    }
    everywhere(exp, f32::INFINITY, |got| got == f32::INFINITY);
    everywhere(exp, f32::NEG_INFINITY, |got| got.to_bits() == 0);
    everywhere(exp, f32::NAN, f32::is_nan);
}

#[test]
fn decays_are_off_by_a_share_of_their_exponent() {
    let mut x = patterns(1e-8, 126.0, 97);
    x.extend(around(-126.0, 1000).chain(around(-0.5, 1000)));
    x.resize(x.len().next_multiple_of(MAX_LANES), 1.0);
    // 1 - 2^-12 has bits that a rounded product would lose.
    let y = vec![1.0 - 1.0 / 4096.0; x.len()];
    judge(exp2_product, &[x.clone(), y, x], |isa, [x, y, _], got| {
        let exponent = f64::from(x) * f64::from(y);
        let off = (f64::from(got) / exponent.exp2() - 1.0).abs();
        // Without a fused multiply-add the product is rounded, and others.
        let rounded = if isa == Isa::Scalar { 3.0 * exponent.abs() * 2f64.powi(-24) } else { 0.0 };
        let polynomial = 5e-7 * exponent.abs().min(0.5);
        let near = exponent.abs() < 127.0 && exponent > -126.0;
        if near { off <= 2f64.powi(-24) + polynomial + rounded } else { exponent > -127.0 || got == 0.0 }
    });
    let product = |x: f32, right: fn(f32) -> bool| {
        everywhere(exp2_product, x, right);
    };
    // x squared.
    product(0.0, |got| got == 1.0);
    product(f32::NAN, f32::is_nan);
    for isa in Isa::available() {
        for x in [-127.0f32, -1e4, -1e7, -1e20, f32::MIN, f32::NEG_INFINITY] {
            let got = exp2_product(isa, &[x; MAX_LANES], &[1.0; MAX_LANES], &[0.0; MAX_LANES])[0];
            assert!(got.to_bits() == 0, "{isa}: {got:e} at {x:e}");
        }
    }
}

#[test]
fn softplus_is_as_close_as_it_says() {
    let mut x = patterns(1e-8, 105.0, 97);
    x.extend(around(-87.0, 100).chain(around(20.0, 100)));
    judge_function(
        softplus,
        x,
        |x| if x > 40.0 { x } else { x.exp().ln_1p() },
        |x, got, want| {
            if x < -87.0 { got.to_bits() == 0 } else { ulps(got, want) <= 3.5 }
        },
    );
    everywhere(softplus, f32::INFINITY, |got| got == f32::INFINITY);
    everywhere(softplus, f32::NEG_INFINITY, |got| got.to_bits() == 0);
    everywhere(softplus, f32::NAN, f32::is_nan);
}

#[test]
fn sigmoid_is_as_close_as_it_says() {
    let mut x = patterns(1e-8, 105.0, 97);
    x.extend(around(-87.336_54, 2000).chain(around(-103.972_08, 2000)));
    judge_function(sigmoid, x, |x| 1.0 / (1.0 + (-x).exp()), |_, got, want| ulps(got, want) <= 2.5);
    everywhere(sigmoid, 0.0, |got| got == 0.5);
    everywhere(sigmoid, f32::INFINITY, |got| got == 1.0);
    everywhere(sigmoid, f32::NEG_INFINITY, |got| got.to_bits() == 0);
    everywhere(sigmoid, f32::NAN, f32::is_nan);
}

#[test]
fn tanh_is_as_close_as_it_says() {
    let mut x = patterns(1e-5, 10.0, 97);
    x.extend(around(0.625, 2000));
    judge_function(tanh, x, f64::tanh, |x, got, want| {
        ulps(got, want) <= 1.6 && got.abs() <= 1.0 && x * got >= 0.0
    });
    everywhere(tanh, 0.0, |got| got == 0.0);
    everywhere(tanh, f32::INFINITY, |got| got == 1.0);
    everywhere(tanh, f32::NEG_INFINITY, |got| got == -1.0);
    everywhere(tanh, f32::NAN, f32::is_nan);
}

/// Whether a number is off by so many roundings, or by so many of the least
/// subnormal numbers.
fn off_by(roundings: f64, least: f64, got: f32, want: f64) -> bool {
    (f64::from(got) - want).abs() <= roundings * 2f64.powi(-24) * want.abs() + least * 2f64.powi(-149)
}

#[test]
fn the_normal_distribution_is_as_close_as_it_says() {
    let mut x = patterns(1e-5, 14.0, 97);
    x.extend(around(-0.5, 1000).chain(around(-3.5, 1000)));
    let square = |x: f32| f64::from(x) * f64::from(x);
    judge_function(normal, x.clone(), exact::normal, |x, got, want| off_by(12.0 + square(x), 1.0, got, want));
    judge_function(gelu, x, exact::gelu, |x, got, want| {
        off_by(13.0 + square(x), 1.0 + f64::from(x.abs()), got, want)
    });
    for (infinite, share) in [(f32::INFINITY, 1.0), (f32::NEG_INFINITY, 0.0), (f32::MIN, 0.0)] {
        everywhere(normal, infinite, |got| got == share);
    }
    everywhere(gelu, f32::INFINITY, |got| got == f32::INFINITY);
    everywhere(gelu, f32::MIN, |got| got == 0.0);
    everywhere(gelu, f32::NEG_INFINITY, f32::is_nan);
    everywhere(normal, f32::NAN, f32::is_nan);
    everywhere(gelu, f32::NAN, f32::is_nan);
}

// ---- operations across lanes

#[test]
fn reductions() {
    struct Reduce;
    impl Kernel for Reduce {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let mut noise = Noise(2);
            for round in 0..200 {
                // Integers add up exactly, fractions within a rounding a step.
                let x: [f32; MAX_LANES * MAX_LANES] = std::array::from_fn(|_| {
                    if round < 100 { (noise.unit() * 1e5).trunc() } else { noise.unit() }
                });
                let slack = if round < 100 { 0.0 } else { f64::from(f32::EPSILON) };
                let rows: Vec<&[f32]> = x.chunks(S::LANES).collect();
                let block: [S::F; MAX_LANES] = std::array::from_fn(|i| s.load(rows[i]));
                let mut each = [0.0; MAX_LANES];
                s.store(&mut each, s.reduce_add_each(&block));
                for i in 0..S::LANES {
                    let sum: f64 = rows[i].iter().copied().map(f64::from).sum();
                    let size: f64 = rows[i].iter().map(|x| f64::from(x.abs())).sum();
                    assert!(
                        (f64::from(s.reduce_add(block[i])) - sum).abs() <= 2.0 * slack * size,
                        "{}",
                        S::ISA
                    );
                    assert!((f64::from(each[i]) - sum).abs() <= 2.0 * slack * size, "{} {i}", S::ISA);
                    let largest = rows[i].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert_eq!(s.reduce_max(block[i]), largest, "{}", S::ISA);
                }
            }
            assert_eq!(s.reduce_max(s.splat(f32::NEG_INFINITY)), f32::NEG_INFINITY);
            assert!(s.reduce_add(s.splat(f32::NAN)).is_nan());
        }
    }
    Isa::available().for_each(|isa| isa.dispatch(Reduce));
}

#[test]
fn transposition() {
    struct Transpose;
    impl Kernel for Transpose {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let row = |i: usize| -> [f32; MAX_LANES] { std::array::from_fn(|j| (i * MAX_LANES + j) as f32) };
            let mut block: [S::F; MAX_LANES] = std::array::from_fn(|i| s.load(&row(i)));
            s.transpose(&mut block);
            for (j, &column) in block[..S::LANES].iter().enumerate() {
                let mut got = [0.0; MAX_LANES];
                s.store(&mut got, column);
                for (i, &got) in got[..S::LANES].iter().enumerate() {
                    assert_eq!(got, row(i)[j], "{}", S::ISA);
                }
            }
        }
    }
    Isa::available().for_each(|isa| isa.dispatch(Transpose));
}

#[test]
fn lanes_change_places_and_look_up() {
    struct Places;
    impl Kernel for Places {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let read = |x: S::F| {
                let mut lanes = [0.0; MAX_LANES];
                s.store(&mut lanes, x);
                lanes
            };
            let x: [f32; MAX_LANES] = std::array::from_fn(|i| i as f32 * 1.5);
            for distance in [1, 2, 4, 8].into_iter().filter(|&distance| distance < S::LANES) {
                let got = read(s.swap(s.load(&x), distance));
                assert!((0..S::LANES).all(|i| got[i] == x[i ^ distance]), "{} {distance}", S::ISA);
            }
            let table: [f32; 16] = std::array::from_fn(|i| (i * i) as f32 - 0.5);
            for first in 0..16 {
                let at: [f32; MAX_LANES] = std::array::from_fn(|i| ((first + 5 * i) % 16) as f32);
                let got = read(s.lookup(&table, s.load(&at)));
                assert!((0..S::LANES).all(|i| got[i] == table[at[i] as usize]), "{} {first}", S::ISA);
            }
        }
    }
    Isa::available().for_each(|isa| isa.dispatch(Places));
}

// ---- loads and stores

/// A storage type and its conversions, as the `half` crate does them without
/// the CPU's help.
struct Format<T> {
    of_bits: fn(u16) -> T,
    bits: fn(T) -> u16,
    widen: fn(u16) -> f32,
    narrow: fn(f32) -> u16,
    quiet: u16,
}

const F16: Format<f16> = Format {
    of_bits: f16::from_bits,
    bits: f16::to_bits,
    widen: |bits| f16::from_bits(bits).to_f32_const(),
    narrow: |x| f16::from_f32_const(x).to_bits(),
    quiet: 0x0200,
};

const BF16: Format<bf16> = Format {
    of_bits: bf16::from_bits,
    bits: bf16::to_bits,
    widen: |bits| f32::from_bits(u32::from(bits) << 16),
    narrow: |x| bf16::from_f32_const(x).to_bits(),
    quiet: 0x0040,
};

/// Widens vector by vector, by whole vectors or as a tail.
fn widened<T: Element>(isa: Isa, x: &[T], tail: bool) -> Vec<f32> {
    struct Widen<'a, T>(&'a [T], bool);
    impl<T: Element> Kernel for Widen<'_, T> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<f32> {
            let mut out = vec![0.0; self.0.len()];
            for (x, out) in self.0.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
                s.store(out, if self.1 { T::load_tail(s, x) } else { T::load(s, x) });
            }
            out
        }
    }
    isa.dispatch(Widen(x, tail))
}

/// Narrows vector by vector, by whole vectors or as a tail.
fn narrowed<T: Element>(isa: Isa, x: &[f32], tail: bool) -> Vec<T> {
    struct Narrow<'a, T>(&'a [f32], bool, std::marker::PhantomData<T>);
    impl<T: Element> Kernel for Narrow<'_, T> {
        type Output = Vec<T>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<T> {
            let mut out = vec![T::default(); self.0.len()];
            for (x, out) in self.0.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
                if self.1 {
                    T::store_tail(s, out, s.load(x));
                } else {
                    T::store(s, out, s.load(x));
                }
            }
            out
        }
    }
    isa.dispatch(Narrow(x, tail, std::marker::PhantomData))
}

fn every_value_widens_exactly<T: Element>(format: &Format<T>) {
    let all: Vec<T> = (0..=u16::MAX).map(format.of_bits).collect();
    for isa in Isa::available() {
        for tail in [false, true] {
            for (bits, got) in (0..=u16::MAX).zip(widened(isa, &all, tail)) {
                assert!(same(got, (format.widen)(bits)), "{isa}: {got:e} of {bits:#x}");
            }
        }
    }
}

fn stores_round_to_nearest_even<T: Element>(format: &Format<T>) {
    let mut noise = Noise(3);
    let mut x: Vec<f32> = (0..1 << 17).map(|_| f32::from_bits(noise.bits())).collect();
    for bits in 0..=u16::MAX {
        // Each value, the tie with its neighbour away from 0, and what lies
        // beside the tie.
        let [here, before] = [bits, bits.wrapping_sub(1)].map(format.widen);
        let tie = here + 0.5 * (here - before);
        x.extend([here, tie, tie.next_up(), tie.next_down()]);
    }
    // Around the powers of two the spacing below is not the spacing above.
    x.extend((-160..=128).flat_map(|n| [1.0, 1.001, 257.0 / 256.0, 1.5].map(|a| scaled(a, n as f32))));
    // The largest values, and the ties at which infinity begins.
    x.extend([65_504.0, 65_520.0, 65_519.996, -65_520.0, f32::MAX, f32::from_bits(0x7f7f_7fff)]);
    x.extend([f32::from_bits(0x7f7f_8000), f32::from_bits(0xff7f_8000)]);
    // NaNs, signalling and quiet, whose payload is all below the cut or all ones.
    x.extend([0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff, 0x7fc0_0000].map(f32::from_bits));
    x.resize(x.len().next_multiple_of(MAX_LANES), 0.0);
    for isa in Isa::available() {
        for tail in [false, true] {
            for (&x, got) in x.iter().zip(narrowed::<T>(isa, &x, tail)) {
                let got = (format.bits)(got);
                if x.is_nan() {
                    assert!(
                        (format.widen)(got).is_nan() && got & format.quiet != 0,
                        "{isa}: {got:#x} of NaN"
                    );
                } else {
                    assert_eq!(got, (format.narrow)(x), "{isa}: {x:e} ({:#x})", x.to_bits());
                }
            }
        }
    }
}

#[test]
fn f16_converts_right() {
    every_value_widens_exactly(&F16);
    stores_round_to_nearest_even(&F16);
}

#[test]
fn bf16_converts_right() {
    every_value_widens_exactly(&BF16);
    stores_round_to_nearest_even(&BF16);
}

#[test]
fn f32_loads_and_stores_keep_every_bit() {
    let mut noise = Noise(4);
    let x: Vec<f32> = (0..1 << 12).map(|_| f32::from_bits(noise.bits())).collect();
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for isa in Isa::available() {
        for tail in [false, true] {
            assert_eq!(bits(&widened(isa, &x, tail)), bits(&x));
            assert_eq!(bits(&narrowed::<f32>(isa, &x, tail)), bits(&x));
        }
    }
}

/// Tails of every length read and write what is there and nothing else.
struct Tails<T>(std::marker::PhantomData<T>);

impl<T: Element> Kernel for Tails<T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // One more than the lanes: what is too much is left alone.
        for len in 0..=S::LANES + 1 {
            // Exactly as long as it claims, for tools that watch the heap.
            let x: Box<[T]> = (1..=len).map(|i| T::from_f32(i as f32)).collect();
            let mut got = [f32::NAN; MAX_LANES];
            s.store(&mut got, T::load_tail(s, &x));
            for (i, &got) in got[..S::LANES].iter().enumerate() {
                assert_eq!(got, if i < len { (i + 1) as f32 } else { 0.0 }, "{} {len}", S::ISA);
            }
            let mut out: Vec<T> = vec![T::from_f32(-7.0); len + 2];
            T::store_tail(s, &mut out[1..len + 1], s.splat(3.0));
            for (i, out) in out.into_iter().enumerate() {
                let written = i >= 1 && i <= len.min(S::LANES);
                assert_eq!(out.to_f32(), if written { 3.0 } else { -7.0 }, "{} {len} {i}", S::ISA);
            }
        }
    }
}

#[test]
fn tails_of_every_length() {
    for isa in Isa::available() {
        isa.dispatch(Tails::<f32>(std::marker::PhantomData));
        isa.dispatch(Tails::<f16>(std::marker::PhantomData));
        isa.dispatch(Tails::<bf16>(std::marker::PhantomData));
    }
}

#[test]
fn a_slice_too_short_for_a_vector_panics() {
    struct Load<'a, T>(&'a [T]);
    impl<T: Element> Kernel for Load<'_, T> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            s.reduce_add(T::load(s, self.0))
        }
    }
    struct Store<'a, T>(&'a mut [T]);
    impl<T: Element> Kernel for Store<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            T::store(s, self.0, s.splat(1.0));
        }
    }
    fn check<T: Element>(isa: Isa) {
        let mut x = vec![T::default(); isa.lanes()];
        assert_eq!(isa.dispatch(Load(&x)), 0.0);
        assert!(panics(|| isa.dispatch(Load(&x[1..]))), "{isa}");
        assert!(panics(|| isa.dispatch(Store(&mut x[1..]))), "{isa}");
        assert!(x.iter().all(|x| x.to_f32() == 0.0));
    }
    for isa in Isa::available() {
        check::<f32>(isa);
        check::<f16>(isa);
        check::<bf16>(isa);
    }
}

// ---- the register tile

/// A value that no product makes.
const GUARD: f32 = f32::from_bits(0x7fc0_beef);

/// `C (+)= A B` into rows `n + gap` apart, between guards. Returns the rows
/// of C without what lies around them, which must be untouched.
fn product(isa: Isa, a: Rows<f32>, b: Rows<f32>, c: &[f32], gap: usize, update: Update) -> Vec<f32> {
    let (m, n) = (a.len(), b.cols());
    let ldc = n + gap;
    let mut room = vec![GUARD; 3 + m * ldc];
    for (row, c) in room[3..].chunks_mut(ldc).zip(c.chunks(n)) {
        row[..n].copy_from_slice(c);
    }
    isa.dispatch(Product { a, b, c: &mut room[3..], ldc, update });
    let (before, rows) = room.split_at(3);
    let untouched = |x: &[f32]| x.iter().all(|x| x.to_bits() == GUARD.to_bits());
    assert!(untouched(before) && rows.chunks(ldc).all(|row| untouched(&row[n..])), "{isa}");
    rows.chunks(ldc).flat_map(|row| &row[..n]).copied().collect()
}

#[test]
fn products_of_every_tile_shape() {
    let mut noise = Noise(5);
    for isa in Isa::available() {
        let lanes = isa.lanes();
        for k in [0, 1, 3, 4, 5, 63, 64, 129] {
            for n in (lanes..=isa.panel()).step_by(lanes) {
                for (gap, rows_of_b) in [(0, k), (5, k + 2)] {
                    let (lda, ldb) = (k + gap, n + gap);
                    let (a, b) = (noise.units(13 * lda), noise.units(rows_of_b * ldb));
                    let c = noise.units(13 * n);
                    let b = Rows::of_slice(&b, rows_of_b, n, ldb).part(0..k, 0..n);
                    for update in [Update::Set, Update::Add] {
                        // Each row by itself, one vector at a time: a tile
                        // of any other shape must give the same bits.
                        let single = |i: usize, j: usize| {
                            let (row, columns) =
                                (Rows::of_slice(&a[i * lda..], 1, k, lda), b.part(0..k, j..j + lanes));
                            product(isa, row, columns, &c[i * n + j..][..lanes], 0, update)
                        };
                        let apart: Vec<f32> = (0..13)
                            .flat_map(|i| (0..n).step_by(lanes).flat_map(move |j| single(i, j)))
                            .collect();
                        for (at, &got) in apart.iter().enumerate() {
                            let (i, j) = (at / n, at % n);
                            let terms = || (0..k).map(|p| f64::from(a[i * lda + p]) * f64::from(b.at(p, j)));
                            let old = if update == Update::Add { f64::from(c[at]) } else { 0.0 };
                            let want = terms().sum::<f64>() + old;
                            // Half an ulp for each step of the chain, and for the last addition.
                            let steps = if isa == Isa::Scalar { 2 * k } else { k };
                            let size: f64 = terms().map(f64::abs).sum();
                            let half = 0.5 * f64::from(f32::EPSILON);
                            let slack = half * (steps as f64 * size * 1.001 + want.abs());
                            assert!(
                                (f64::from(got) - want).abs() <= slack,
                                "{isa} k {k} n {n}: {got} {want}"
                            );
                        }
                        for m in 0..=13 {
                            let rows = Rows::of_slice(&a, m, k, lda);
                            let got = product(isa, rows, b, &c[..m * n], gap, update);
                            assert!(
                                got.len() == m * n && got.iter().zip(&apart).all(|(x, y)| same(*x, *y)),
                                "{isa} m {m} k {k} n {n} gap {gap} {update:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn products_of_reversed_and_repeated_rows() {
    let mut noise = Noise(6);
    let a = Array2::from_shape_vec((13, 7), noise.units(13 * 7)).unwrap();
    for isa in Isa::available() {
        let n = isa.lanes();
        let b = Array2::from_shape_vec((7, n), noise.units(7 * n)).unwrap();
        let (back, bottom_up) = (a.slice(s![..;-1, ..]), b.slice(s![..;-1, ..]));
        let repeated = a.row(4);
        let repeated = repeated.broadcast((13, 7)).unwrap();
        for (a, b) in [(back, b.view()), (a.view(), bottom_up), (repeated, b.view())] {
            let (a_packed, b_packed) = (a.as_standard_layout(), b.as_standard_layout());
            let want = product(isa, a_packed.view().into(), b_packed.view().into(), &[], 0, Update::Set);
            assert_eq!(product(isa, a.into(), b.into(), &[], 0, Update::Set), want, "{isa}");
            assert!(want.iter().any(|&x| x != 0.0));
        }
    }
}

#[test]
fn operands_that_do_not_fit_panic() {
    let x = [1.0; 1024];
    for isa in Isa::available() {
        let (lanes, panel) = (isa.lanes(), isa.panel());
        let run = |k_of_b: usize, n: usize, ldc: usize, room: usize| {
            let (a, b) = (Rows::of_slice(&x, 2, 3, 3), Rows::of_slice(&x, k_of_b, n, n));
            let mut c = vec![0.0; room];
            panics(|| isa.dispatch(Product { a, b, c: &mut c, ldc, update: Update::Set }))
        };
        assert!(!run(3, lanes, lanes, 2 * lanes), "{isa}");
        assert!(run(2, lanes, lanes, 2 * lanes), "{isa}: B too short");
        assert!(run(3, lanes - 1, lanes, 2 * lanes), "{isa}: half a vector");
        assert!(run(3, panel + lanes, panel + lanes, 2 * (panel + lanes)), "{isa}: wider than the tile");
        assert!(run(3, lanes, lanes - 1, 2 * lanes), "{isa}: rows of C overlap");
        assert!(run(3, lanes, lanes, 2 * lanes - 1), "{isa}: C too short");
    }
}

// ---- memory

#[test]
fn rows_read_through_any_strides() {
    let x = Array2::from_shape_fn((5, 7), |(i, j)| (10 * i + j) as f32);
    let column = x.column(2);
    let views: [(ArrayView2<f32>, bool); 6] = [
        (x.view(), true),
        (x.slice(s![..;-1, ..]), true),
        (x.slice(s![1..;2, 2..5]), true),
        (x.slice(s![.., ..;-1]), false),
        (x.t(), false),
        (column.broadcast((3, 5)).unwrap(), false),
    ];
    for (view, unit) in views {
        let rows = Rows::from(view);
        assert_eq!((rows.len(), rows.cols()), view.dim());
        assert_eq!(rows.is_unit(), unit);
        let (half, third) = (rows.len() / 2, rows.cols() / 3);
        let part = rows.part(half..rows.len(), third..rows.cols());
        assert_eq!((part.len(), part.cols()), (rows.len() - half, rows.cols() - third));
        for ((i, j), &want) in view.indexed_iter() {
            assert_eq!(rows.at(i, j), want);
            assert_eq!(rows.row(i).map(|row| row[j]), unit.then_some(want));
            if i >= half && j >= third {
                assert_eq!(part.at(i - half, j - third), want);
                assert_eq!(part.row(i - half).map(|row| row[j - third]), unit.then_some(want));
            }
        }
    }
    // One column is a row of neighbours whatever its stride.
    let rows = Rows::from(x.slice(s![.., 3..4]));
    assert_eq!(rows.row(2), Some(&[23.0][..]));
    // One row again and again.
    let second = x.row(1);
    let repeated = Rows::from(second.broadcast((4, 7)).unwrap()).part(2..4, 0..7);
    assert_eq!(repeated.row_stride(), 0);
    assert_eq!(repeated.row(1), second.to_slice());
}

#[test]
fn rows_that_are_not_there_panic() {
    let x: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let rows = Rows::of_slice(&x, 3, 4, 4);
    assert_eq!((rows.at(2, 3), rows.row(2)), (11.0, Some(&x[8..])));
    assert_eq!((rows.part(3..3, 0..4).len(), rows.part(0..3, 4..4).cols()), (0, 0));
    assert!(panics(|| rows.at(3, 0)));
    assert!(panics(|| rows.at(0, 4)));
    assert!(panics(|| rows.row(3)));
    assert!(panics(|| rows.part(0..4, 0..4)));
    assert!(panics(|| rows.part(0..3, 2..5)));
    assert!(panics(|| Rows::of_slice(&x, 3, 4, 5)));
    assert!(panics(|| Rows::of_slice(&x, 3, 6, 4)));
    // The last row need not be followed by its gap.
    assert_eq!(Rows::of_slice(&x, 3, 2, 5).at(2, 1), 11.0);
}

#[test]
fn parts_are_disjoint_and_cover_the_buffer() {
    for (len, piece) in [(0, 4), (1, 4), (12, 4), (13, 4), (200, 1), (5, 0), (3, 9)] {
        let mut x = vec![0u32; len];
        let pieces = len.div_ceil(piece.max(1));
        // Stale claims are forgotten.
        let mut claims = vec![u64::MAX; claim_words(pieces)];
        let parts = Parts::new(&mut x, piece, &mut claims);
        std::thread::scope(|scope| {
            for first in 0..2 {
                let parts = &parts;
                scope.spawn(move || {
                    for i in (first..pieces).step_by(2) {
                        parts.take(i).iter_mut().for_each(|x| *x += 1 + i as u32);
                    }
                });
            }
        });
        assert!(parts.take(pieces).is_empty());
        for (at, x) in x.into_iter().enumerate() {
            assert_eq!(x as usize, 1 + at / piece.max(1));
        }
    }
}

#[test]
#[should_panic(expected = "claimed twice")]
fn a_part_can_be_taken_once() {
    let (mut x, mut claims) = ([0u8; 130], [0; 3]);
    let parts = Parts::new(&mut x, 1, &mut claims);
    parts.take(129);
    parts.take(65);
    parts.take(129);
}

#[test]
fn output_rows_are_written_through_any_strides() {
    // Logical axes are batch 2, heads 3, len 70, dim 4.
    let standard = || Array4::from_elem((2, 3, 70, 4), -1.0f32);
    let by_len = || Array4::from_elem((2, 70, 3, 4), -1.0f32);
    let by_dim = || Array4::from_elem((2, 3, 4, 70), -1.0f32);
    let (mut plain, mut reversed, mut swapped, mut columns) = (standard(), standard(), by_len(), by_dim());
    let views = [
        (plain.view_mut(), true),
        (reversed.slice_mut(s![..;-1, .., ..;-1, ..]), true),
        (swapped.view_mut().permuted_axes([0, 2, 1, 3]), true),
        (columns.view_mut().permuted_axes([0, 1, 3, 2]), false),
    ];
    let value = |b: usize, h: usize, i: usize, j: usize| (((b * 10 + h) * 100 + i) * 10 + j) as f32;
    for (mut view, unit) in views {
        let mut claims = vec![u64::MAX; claim_words(2 * 3 * 70)];
        let out = OutRows::new(view.view_mut(), &mut claims);
        for (b, h) in (0..2).flat_map(|b| (0..3).map(move |h| (b, h))) {
            for rows in [64..70, 0..0, 0..63, 63..64] {
                let mut taken = out.take(b, h, rows.clone());
                for i in rows.clone() {
                    let local = i - rows.start;
                    assert_eq!(taken.row(local).is_some(), unit);
                    // Whole rows where that is possible, elements elsewhere.
                    match taken.row(local).filter(|_| i % 2 == 0) {
                        Some(row) => row.iter_mut().enumerate().for_each(|(j, x)| *x = value(b, h, i, j)),
                        None => (0..4).for_each(|j| taken.set(local, j, value(b, h, i, j))),
                    }
                }
            }
        }
        for ((b, h, i, j), &got) in view.indexed_iter() {
            assert_eq!(got, value(b, h, i, j));
        }
    }
}

#[test]
#[should_panic(expected = "claimed twice")]
fn an_output_row_can_be_taken_once() {
    let (mut x, mut claims) = (Array4::<f32>::zeros((1, 2, 100, 3)), [0; 4]);
    let out = OutRows::new(x.view_mut(), &mut claims);
    out.take(0, 1, 0..64);
    out.take(0, 0, 0..100);
    out.take(0, 1, 63..70);
}

#[test]
fn output_rows_that_are_not_there_panic() {
    let (mut x, mut claims) = (Array4::<f32>::zeros((1, 2, 5, 3)), [0; 1]);
    let out = OutRows::new(x.view_mut(), &mut claims);
    for (batch, head, rows) in [(1, 0, 0..1), (0, 2, 0..1), (0, 0, 0..6)] {
        assert!(panics(|| out.take(batch, head, rows)));
    }
    let mut rows = out.take(0, 1, 2..4);
    for (i, j) in [(2, 0), (0, 3)] {
        assert!(panics(|| rows.set(i, j, 1.0)));
    }
    assert!(panics(|| rows.row(2).is_some()));
    rows.set(1, 2, 1.0);
    assert_eq!(x[[0, 1, 3, 2]], 1.0);
}

#[test]
fn arenas_cut_aligned_disjoint_pieces() {
    let bytes = bytes_for::<f32>(17) + bytes_for::<u8>(1) + bytes_for::<u64>(9);
    assert_eq!(bytes, 128 + 64 + 128);
    let mut buffer = Buffer::default();
    for round in 0..2 {
        buffer.grow(bytes);
        assert_eq!(buffer.len(), bytes);
        let mut arena = buffer.arena();
        let (x, y, z) = (arena.take::<f32>(17), arena.take::<u8>(1), arena.take::<u64>(9));
        for address in [x.as_ptr() as usize, y.as_ptr() as usize, z.as_ptr() as usize] {
            assert!(address.is_multiple_of(64));
        }
        assert_eq!((x.len(), y.len(), z.len()), (17, 1, 9));
        if round == 0 {
            assert!(x.iter().all(|&x| x == 0.0) && y[0] == 0 && z.iter().all(|&x| x == 0));
        }
        x.fill(1.0);
        y.fill(2);
        z.fill(3);
        assert!(x.iter().all(|&x| x == 1.0) && y[0] == 2 && z.iter().all(|&x| x == 3));
        assert!(arena.take::<f32>(0).is_empty());
        assert!(panics(|| arena.take::<u8>(1).len()));
    }
    // What is large enough stays.
    buffer.grow(1);
    assert_eq!(buffer.len(), bytes);
    buffer.grow(bytes + 1);
    assert_eq!(buffer.len(), bytes + 64);
}

// ---- int8

/// Codes through vectors: every byte widened, and integers stored.
struct Int8<'a>(&'a [i8], bool);

impl Kernel for Int8<'_> {
    type Output = (Vec<f32>, Vec<i8>);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let (mut wide, mut back) = (vec![0.0; self.0.len()], vec![0; self.0.len()]);
        for ((x, wide), back) in
            self.0.chunks(S::LANES).zip(wide.chunks_mut(S::LANES)).zip(back.chunks_mut(S::LANES))
        {
            let v = if self.1 { s.load_i8_tail(x) } else { s.load_i8(x) };
            s.store(wide, v);
            // Less than half away, on either side.
            let v = s.add(v, s.splat(if self.1 { 0.25 } else { -0.25 }));
            if self.1 { s.store_i8_tail(back, v) } else { s.store_i8(back, v) }
        }
        (wide, back)
    }
}

#[test]
fn every_byte_widens_and_comes_back() {
    let all: Vec<i8> = (i8::MIN..=i8::MAX).collect();
    for isa in Isa::available() {
        for tail in [false, true] {
            let (wide, back) = isa.dispatch(Int8(&all, tail));
            assert!(wide.iter().zip(&all).all(|(&wide, &x)| wide == f32::from(x)), "{isa}");
            assert_eq!(back, all, "{isa}");
        }
    }
}

/// Digits of all bytes, of every width and place.
#[test]
fn digits_are_those_of_the_byte() {
    struct Digits<'a>(&'a [i8], u32, u32);
    impl Kernel for Digits<'_> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<f32> {
            let mut out = vec![0.0; self.0.len()];
            for (from, to) in self.0.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
                s.store(to, s.load_digits(from, self.1, self.2));
            }
            out
        }
    }
    let all: Vec<i8> = (i8::MIN..=i8::MAX).collect();
    for (bits, place) in
        [1, 2, 4, 8].into_iter().flat_map(|bits| (0..8 / bits).map(move |place| (bits, place)))
    {
        let digit = |&x: &i8| (((i32::from(x) + 128) >> (bits * place)) & ((1 << bits) - 1)) as f32;
        let want: Vec<f32> = all.iter().map(digit).collect();
        for isa in Isa::available() {
            assert_eq!(isa.dispatch(Digits(&all, bits, place)), want, "{isa}, {bits} bits, {place}");
        }
    }
}

#[test]
fn int8_ties_go_to_even() {
    struct Ties;
    impl Kernel for Ties {
        type Output = Vec<i8>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<i8> {
            let x: Vec<f32> = (0..MAX_LANES).map(|i| i as f32 - 7.5).collect();
            let mut out = vec![0; MAX_LANES];
            for i in (0..MAX_LANES).step_by(S::LANES) {
                s.store_i8(&mut out[i..], s.load(&x[i..]));
            }
            out
        }
    }
    for isa in Isa::available() {
        assert_eq!(isa.dispatch(Ties), [-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8], "{isa}");
    }
}

#[test]
fn int8_tails_read_and_write_what_is_there() {
    struct Tails;
    impl Kernel for Tails {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for len in 0..=S::LANES + 1 {
                let x: Box<[i8]> = (1..=len).map(|i| i as i8).collect();
                let mut got = [f32::NAN; MAX_LANES];
                s.store(&mut got, s.load_i8_tail(&x));
                for (i, &got) in got[..S::LANES].iter().enumerate() {
                    assert_eq!(got, if i < len { (i + 1) as f32 } else { 0.0 }, "{} {len}", S::ISA);
                }
                let mut out = vec![-7i8; len + 2];
                s.store_i8_tail(&mut out[1..len + 1], s.splat(3.0));
                for (i, out) in out.into_iter().enumerate() {
                    let written = i >= 1 && i <= len.min(S::LANES);
                    assert_eq!(out, if written { 3 } else { -7 }, "{} {len} {i}", S::ISA);
                }
            }
        }
    }
    for isa in Isa::available() {
        isa.dispatch(Tails);
        if isa != Isa::Scalar {
            assert!(panics(|| isa.dispatch(Int8(&[0; 3], false))));
        }
    }
}

/// Codes, scales, and what comes out again, row by row with a gap between.
fn quantized<T: Element>(isa: Isa, x: &Array2<T>) -> (Vec<i8>, Vec<f32>, Vec<f32>) {
    let (rows, cols) = x.dim();
    let (mut codes, mut scales) = (vec![99i8; rows * cols], vec![0.0; rows]);
    isa.dispatch(Quantize { from: x.view().into(), codes: &mut codes, scales: &mut scales });
    let stride = cols + 3;
    let mut to = vec![-7.0; rows * stride];
    isa.dispatch(Dequantize {
        codes: Rows::of_slice(&codes, rows, cols, cols),
        scales: &scales,
        to: &mut to,
        stride,
    });
    for gap in to.chunks(stride) {
        assert!(gap[cols..].iter().all(|&x| x == -7.0), "{isa}");
    }
    (codes, scales, to.chunks(stride).flat_map(|row| row[..cols].to_vec()).collect())
}

#[test]
fn quantisation_is_the_same_everywhere_and_by_definition() {
    let mut noise = Noise(12);
    for (rows, cols) in [(1, 1), (3, 5), (4, 64), (2, 100), (3, 0)] {
        for size in [1.0, 1e-42, 3e-38, 1e38] {
            let mut x = Array2::from_shape_simple_fn((rows, cols), || noise.unit() * size);
            if cols > 4 {
                x[[rows - 1, 4]] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0][rows % 4];
            }
            let (codes, scales, out) = quantized(Isa::Scalar, &x);
            for (i, row) in x.rows().into_iter().enumerate() {
                let finite = row.iter().all(|x| x.is_finite());
                let max = row.iter().fold(0f32, |max, x| max.max(x.abs()));
                let scale = if finite { (max / 127.0).max(f32::MIN_POSITIVE) } else { f32::NAN };
                assert!(same(scales[i], scale));
                for (c, &x) in row.iter().enumerate().filter(|_| finite) {
                    let code = (x / scale).round_ties_even();
                    assert_eq!(f32::from(codes[i * cols + c]), code);
                    assert_eq!(out[i * cols + c], code * scale);
                }
                assert!(finite || out[i * cols..][..cols].iter().all(|x| x.is_nan()));
            }
            for isa in Isa::available() {
                let (c, s, o) = quantized(isa, &x);
                assert!(c == codes && s.iter().zip(&scales).all(|(a, b)| same(*a, *b)), "{isa}");
                assert!(o.iter().zip(&out).all(|(a, b)| same(*a, *b)), "{isa}");
            }
        }
    }
}

#[test]
fn rows_are_stored_rounded() {
    let mut noise = Noise(13);
    let x = Array2::from_shape_simple_fn((5, 37), || noise.unit());
    for isa in Isa::available() {
        let mut to = vec![half::bf16::ZERO; 5 * 37];
        isa.dispatch(StoreRows { from: x.t().into(), to: &mut to });
        assert!(to.iter().zip(x.t().iter()).all(|(to, &x)| *to == half::bf16::from_f32(x)), "{isa}");
    }
}
