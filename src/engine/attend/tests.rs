//! Every plan, source of keys and instruction set against the definition under
//! the published bound.

use std::ops::Range;

use ndarray::{Array3, Array4, ArrayView4, Axis, concatenate, s};

use crate::attention::ERROR_CONSTANT;
use crate::definition::softmax::{Definition, Normalisation, Reference};
use crate::element::{DType, Element};
use crate::engine::call::{Arrays, Call, Norm, RowOrder, Sight, Virtual};
#[cfg(not(feature = "rayon"))]
use crate::engine::parallel::on_threads;
use crate::engine::workspace::Workspace;
use crate::engine::{self, weights};
use crate::input::{Dims, Qkv};
use crate::keys::plan::{ATOM, BlockLists, Keys, Layout, Per, TokenLists};
use crate::keys::source::{At, Kv, KvSource};
use crate::mask::{Boolean, Causal, Mask, Unmasked, Window, mask_fn, mask_fn_per_head};
use crate::score::{AnyScore, Plain, Score, score_fn};
use crate::simd::Isa;
use crate::simd::any::{AnyRows, IntoAny};
use crate::simd::mem::{Heads, Rows};

/// Numbers from a seed (SplitMix64).
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    }

    fn array<T: Element>(&mut self, dim: (usize, usize, usize, usize)) -> Array4<T> {
        Array4::from_shape_simple_fn(dim, || T::from_f32(self.number()))
    }
}

/// Batch, key/value heads, heads of a group, queries, keys, head_dim,
/// value_dim.
type Sizes = [usize; 7];

struct Case<T> {
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    dims: Dims,
}

impl<T: Element> Case<T> {
    fn new(n: Sizes, seed: u64) -> Self {
        let [batch, kv_heads, group, q_len, kv_len, head_dim, value_dim] = n;
        let mut random = Random(seed);
        let q_heads = kv_heads * group;
        Self {
            q: random.array((batch, q_heads, q_len, head_dim)),
            k: random.array((batch, kv_heads, kv_len, head_dim)),
            v: random.array((batch, kv_heads, kv_len, value_dim)),
            dims: Dims { batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed: false },
        }
    }

    fn x(&self) -> Qkv<'_, T> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    fn call<'a>(&'a self, isa: Isa, mask: &'a dyn Mask, keys: Keys<'a>) -> Call<'a> {
        keys.check(&self.dims, &crate::input::Lengths::Full).unwrap();
        Call {
            x: self.x().into(),
            dims: self.dims,
            mask,
            keys,
            order: None,
            regions: None,
            extra: None,
            score: &Plain,
            norm: Norm::Softmax { sinks: None },
            scale: 0.3,
            gains: None,
            gate: None,
            head_gains: None,
            plus: None,
            dots: None,
            isa,
        }
    }

    fn reference(&self, seen: &Array4<bool>, score: &impl Score) -> Reference {
        let mask = Boolean::new(seen.view());
        let normalisation = Normalisation::Softmax { sinks: None };
        let (x, dims, scale) = (self.x(), self.dims, f64::from(0.3f32));
        Definition { x, dims, mask: &mask, score, scale, normalisation, gains: None, extra: None }
            .compute()
            .unwrap()
    }
}

/// Runs on so many threads, which stay.
#[cfg(feature = "rayon")]
fn pooled<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    static POOLS: [std::sync::OnceLock<rayon::ThreadPool>; 3] = [const { std::sync::OnceLock::new() }; 3];
    let make = || rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    POOLS[threads].get_or_init(make).install(work)
}

#[cfg(not(feature = "rayon"))]
fn pooled<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    on_threads(threads, work)
}

/// What the engine gives, the same on one thread and on two.
fn run<T: Element>(call: &Call<'_>, what: &str) -> (Array4<T>, Array3<f32>) {
    let Dims { batch, q_heads, q_len, value_dim, .. } = call.dims;
    let once = |threads: usize| {
        pooled(threads, || {
            let mut out = Array4::from_elem((batch, q_heads, q_len, value_dim), T::from_f32(f32::NAN));
            let mut lse = Array4::from_elem((batch, q_heads, q_len, 1), f32::NAN);
            let mut workspace = Workspace::new();
            engine::run(call, out.view_mut(), Some(lse.view_mut()), &mut workspace).unwrap();
            (out, lse.remove_axis(Axis(3)))
        })
    };
    let (one, two) = (once(1), once(2));
    let bits = |x: &Array4<T>| x.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
    assert!(bits(&one.0) == bits(&two.0), "{what}: one and two threads");
    assert!(one.1.iter().zip(&two.1).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}: lse");
    one
}

fn compare<T: Element>(got: &(Array4<T>, Array3<f32>), want: &Reference, dims: &Dims, what: &str) {
    for ((b, h, i, c), x) in got.0.indexed_iter() {
        let (x, want, bound) = (x.to_f64(), want.out[[b, h, i, c]], want.bound[[b, h, i]]);
        let rounding = if T::DTYPE == DType::F32 { 0.0 } else { T::ROUNDING * want.abs() + 1e-7 };
        let error = (x - want).abs();
        let allowed = bound * (1.0 + T::ROUNDING) + rounding;
        assert!(error <= allowed, "{what}: [{b}, {h}, {i}, {c}]: {x} for {want}, {allowed:e} is allowed");
    }
    for ((b, h, i), &x) in got.1.indexed_iter() {
        let want = want.lse[[b, h, i]];
        if want == f64::NEG_INFINITY {
            assert_eq!(x, f32::NEG_INFINITY, "{what}: lse [{b}, {h}, {i}]");
        } else {
            let terms = (dims.head_dim + dims.kv_len) as f64 + 4.0 * dims.head_dim as f64 + 4.0 * want.abs();
            let allowed = ERROR_CONSTANT * 2f64.powi(-24) * terms;
            assert!((f64::from(x) - want).abs() <= allowed, "{what}: lse [{b}, {h}, {i}]: {x} for {want}");
        }
    }
}

fn masks() -> Vec<(&'static str, Box<dyn Mask>)> {
    vec![
        ("all", Box::new(Unmasked)),
        ("causal", Box::new(Causal::new())),
        ("window", Box::new(Window::new(Some(70), Some(3)))),
        ("closure", Box::new(mask_fn(|_, i, j| (i * 7 + j * 3) % 5 < 2))),
        ("closure per head", Box::new(mask_fn_per_head(|site, i, j| (i + j + site.head) % 3 == 0))),
    ]
}

fn seen(mask: &dyn Mask, keys: Keys<'_>, dims: &Dims) -> Array4<bool> {
    let mut seen = mask.materialize(dims);
    seen.zip_mut_with(&keys.materialize(dims), |a, &b| *a &= b);
    seen
}

/// Random lists, some of them empty.
fn blocks(layout: Layout, one_in: usize, seed: u64) -> BlockLists {
    let mut random = Random(seed);
    let dim = (layout.sequences, layout.heads(), layout.blocks(), layout.atoms());
    let map = Array4::from_shape_fn(dim, |(_, _, i, _)| i % 4 != 3 && random.below(one_in) == 0);
    BlockLists::from_map(layout, ATOM, map.view()).unwrap()
}

fn tokens(layout: Layout, one_in: usize, seed: u64) -> TokenLists {
    let mut random = Random(seed);
    let (mut offsets, mut keys) = (vec![0], Vec::new());
    for list in 0..layout.lists().unwrap() {
        let mut open = false;
        for key in 0..layout.keys {
            open = if random.below(4) == 0 { random.below(one_in) == 0 } else { open };
            if open && list % 5 != 4 {
                keys.push(key as u32);
            }
        }
        offsets.push(keys.len());
    }
    TokenLists::from_keys(layout, &offsets, &keys).unwrap()
}

const SIZES: [Sizes; 5] = [
    [1, 1, 1, 70, 300, 64, 64],
    [2, 2, 2, 13, 259, 5, 3],
    [1, 1, 5, 130, 130, 80, 20],
    [1, 2, 1, 200, 700, 16, 33],
    [1, 1, 3, 40, 1, 8, 8],
];

fn each_plan<T: Element>() {
    for n in SIZES {
        let case = Case::<T>::new(n, 7);
        for (per, q_block) in [(Per::Head, 64), (Per::Group, 7), (Per::Sequence, 1), (Per::Group, 500)] {
            let layout = Layout::new(per, q_block, &case.dims);
            let (blocks, tokens) = (blocks(layout, 2, 3), tokens(layout, 3, 4));
            for (name, mask) in masks() {
                for keys in [Keys::Blocks(&blocks), Keys::Tokens(&tokens)] {
                    let kind = if let Keys::Blocks(_) = keys { "blocks" } else { "tokens" };
                    let want = case.reference(&seen(&*mask, keys, &case.dims), &Plain);
                    for isa in Isa::available() {
                        let what =
                            format!("{isa}, {} {n:?}, {per:?} {q_block}, {name}, {kind}", T::DTYPE.name());
                        let got = run::<T>(&case.call(isa, &*mask, keys), &what);
                        compare(&got, &want, &case.dims, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn plans_f32() {
    each_plan::<f32>();
}

#[test]
fn plans_f16() {
    each_plan::<half::f16>();
}

#[test]
fn plans_bf16() {
    each_plan::<half::bf16>();
}

/// Scores that depend on the key: pieces must know which keys they are.
#[test]
fn scores_and_plans() {
    let score = score_fn(|score, site, i, j| score + ((i * 3 + j * 5 + site.head) % 11) as f32 * 0.25);
    let case = Case::<f32>::new([1, 2, 2, 50, 330, 24, 24], 5);
    let layout = Layout::new(Per::Group, 16, &case.dims);
    let (blocks, tokens) = (blocks(layout, 2, 3), tokens(layout, 3, 4));
    for keys in [Keys::Mask, Keys::Blocks(&blocks), Keys::Tokens(&tokens)] {
        for (name, mask) in masks() {
            let want = case.reference(&seen(&*mask, keys, &case.dims), &score);
            for isa in Isa::available() {
                let what = format!("{isa}, {name}");
                let call = Call { score: &score as &dyn AnyScore, ..case.call(isa, &*mask, keys) };
                compare(&run::<f32>(&call, &what), &want, &case.dims, &what);
            }
        }
    }
}

#[test]
fn masked_values_do_not_matter() {
    for isa in Isa::available() {
        let mut case = Case::<f32>::new([1, 1, 2, 70, 330, 24, 24], 5);
        let layout = Layout::new(Per::Group, 64, &case.dims);
        let (blocks, tokens) = (blocks(layout, 2, 3), tokens(layout, 3, 4));
        for keys in [Keys::Blocks(&blocks), Keys::Tokens(&tokens)] {
            let mask = mask_fn(|_, i, j| (i + j) % 4 != 0 && j % 9 != 5);
            let want = case.reference(&seen(&mask, keys, &case.dims), &Plain);
            for j in (5..330).step_by(9) {
                case.v.slice_mut(s![.., .., j, ..]).fill(f32::NAN);
                case.k.slice_mut(s![.., .., j, ..]).fill(f32::INFINITY);
            }
            compare(&run::<f32>(&case.call(isa, &mask, keys), "NaN"), &want, &case.dims, "NaN");
            case = Case::new([1, 1, 2, 70, 330, 24, 24], 5);
        }
    }
}

/// Few rows against many keys: tasks are chunks of keys.
#[test]
fn chunks_of_keys() {
    fn check<T: Element>(n: Sizes) {
        let case = Case::<T>::new(n, 3);
        for (name, mask) in masks() {
            let want = case.reference(&seen(&*mask, Keys::Mask, &case.dims), &Plain);
            for isa in Isa::available() {
                let what = format!("{isa}, {n:?}, {name}");
                compare(&run::<T>(&case.call(isa, &*mask, Keys::Mask), &what), &want, &case.dims, &what);
            }
        }
    }
    check::<f32>([1, 1, 13, 5, 4500, 12, 40]);
    check::<half::bf16>([2, 1, 1, 90, 4096, 24, 8]);
}

/// A cache that unpacks what it holds, or gives rows as they lie.
struct Cache<'a, T> {
    k: ArrayView4<'a, T>,
    v: ArrayView4<'a, T>,
    in_place: bool,
}

impl<T: Element> Cache<'_, T> {
    fn rows<'r>(&'r self, x: &'r ArrayView4<'_, T>, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let keys = at.sequence.keys.start + at.keys.start..at.sequence.keys.start + at.keys.end;
        if self.in_place {
            return T::any(Heads::new(x.reborrow())).rows(at.sequence.batch, at.kv_head, &keys);
        }
        let dim = x.dim().3;
        let rows = x.slice(s![at.sequence.batch, at.kv_head, keys.clone(), ..]);
        room[..keys.len() * dim].iter_mut().zip(rows).for_each(|(to, from)| *to = from.to_f32());
        AnyRows::F32(Rows::of_slice(room, keys.len(), dim, dim))
    }
}

impl<T: Element> KvSource for Cache<'_, T> {
    fn keys<'r>(&'r self, _: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(&self.k, at, room)
    }
    fn values<'r>(&'r self, _: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(&self.v, at, room)
    }
    fn ahead(&self, _: &At<'_>) -> [(*const u8, isize); 2] {
        [(std::ptr::null(), 0); 2]
    }
    fn row_bytes(&self) -> [usize; 2] {
        [self.k.dim().3 * size_of::<T>(), self.v.dim().3 * size_of::<T>()]
    }
}

#[test]
fn caches() {
    for isa in Isa::available() {
        for n in [[1, 2, 2, 70, 300, 24, 40], [1, 1, 1, 100, 4300, 16, 8]] {
            // Queries in f32, keys in half types.
            let mut stored = Case::<half::f16>::new(n, 9);
            // What AMX tiles cannot take.
            stored.k[[0, 0, 5, 3]] = half::f16::from_f32(60000.0);
            stored.v[[0, 0, 17, 3]] = half::f16::from_f32(6e-8);
            let mut case = Case::<f32>::new(n, 9);
            case.k = stored.k.mapv(half::f16::to_f32);
            case.v = stored.v.mapv(half::f16::to_f32);
            let layout = Layout::new(Per::Head, 64, &case.dims);
            let (blocks, tokens) = (blocks(layout, 2, 3), tokens(layout, 9, 4));
            for keys in [Keys::Mask, Keys::Blocks(&blocks), Keys::Tokens(&tokens)] {
                for (name, mask) in masks() {
                    let plain = run::<f32>(&case.call(isa, &*mask, keys), name);
                    for in_place in [false, true] {
                        let what = format!("{isa}, {n:?}, {name}, in place: {in_place}");
                        let cache = Cache { k: stored.k.view(), v: stored.v.view(), in_place };
                        let mut call = case.call(isa, &*mask, keys);
                        let mut x: Arrays<'_> = case.x().into();
                        x.kv = Kv::Cache(&cache);
                        call.x = x;
                        let got = run::<f32>(&call, &what);
                        if isa == Isa::Amx {
                            let want = case.reference(&seen(&*mask, keys, &case.dims), &Plain);
                            compare(&got, &want, &case.dims, &what);
                        } else {
                            assert!(got == plain, "{what}: not the bits of arrays");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn orders_of_rows() {
    for isa in Isa::available() {
        let n = [2, 2, 2, 130, 300, 24, 20];
        let case = Case::<f32>::new(n, 2);
        let mut random = Random(8);
        let mut shuffled = |n: usize| {
            let mut order: Vec<u32> = (0..n as u32).collect();
            (1..n).rev().for_each(|i| order.swap(i, random.below(i + 1)));
            order
        };
        let (queries, keys_order) = (shuffled(130), shuffled(300));
        let take = |x: &Array4<f32>, order: &[u32]| {
            x.select(Axis(2), &order.iter().map(|&i| i as usize).collect::<Vec<_>>())
        };
        // The same rows in the order of the call.
        let mut ordered = Case::<f32>::new(n, 2);
        ordered.q = take(&case.q, &queries);
        ordered.k = take(&case.k, &keys_order);
        ordered.v = take(&case.v, &keys_order);
        let layout = Layout::new(Per::Group, 64, &case.dims);
        let (blocks, tokens) = (blocks(layout, 2, 3), tokens(layout, 3, 4));
        for keys in [Keys::Mask, Keys::Blocks(&blocks), Keys::Tokens(&tokens)] {
            for (name, mask) in masks() {
                let what = format!("{isa}, {name}");
                let order = Some(RowOrder {
                    queries: &queries,
                    keys: &keys_order,
                    cuts: None,
                    entries: None,
                    rest: &[],
                });
                let got = run::<f32>(&Call { order, ..case.call(isa, &*mask, keys) }, &what);
                let rows: Vec<usize> = queries.iter().map(|&i| i as usize).collect();
                let got = (got.0.select(Axis(2), &rows), got.1.select(Axis(2), &rows));
                let want = ordered.reference(&seen(&*mask, keys, &case.dims), &Plain);
                compare(&got, &want, &case.dims, &what);
            }
        }
    }
}

#[test]
fn virtual_keys() {
    let mut turn = 0;
    for isa in Isa::available() {
        for (n, extra) in [
            ([2, 2, 2, 70, 300, 24, 20], 300),
            ([1, 1, 1, 200, 0, 16, 8], 5),
            ([1, 1, 2, 60, 4200, 16, 8], 40),
            ([1, 2, 1, 90, 100, 64, 64], 0),
        ] {
            let [batch, kv_heads, _, q_len, kv_len, head_dim, value_dim] = n;
            let case = Case::<f32>::new(n, 2);
            let mut random = Random(5);
            let k: Array4<f32> = random.array((batch, kv_heads, extra, head_dim));
            let v: Array4<f32> = random.array((batch, kv_heads, extra, value_dim));
            let logs = Array3::from_shape_simple_fn((batch, kv_heads, extra), || random.number());
            let from: Vec<isize> = (0..extra).map(|_| random.below(kv_len + 40) as isize - 20).collect();
            let blocks_of: Vec<u32> = (0..extra).map(|_| random.below(12) as u32).collect();
            // All of them as keys.
            let mut all = Case::<f32>::new(n, 2);
            all.k = concatenate(Axis(2), &[case.k.view(), k.view()]).unwrap();
            all.v = concatenate(Axis(2), &[case.v.view(), v.view()]).unwrap();
            all.dims.kv_len += extra;
            let group = case.dims.q_heads / kv_heads;
            let score = score_fn(|score, site: &crate::input::Site, _, j| {
                if j < kv_len { score } else { score + logs[[site.batch, site.head / group, j - kv_len]] }
            });
            let layout = Layout::new(Per::Group, 64, &case.dims);
            let (blocks, tokens) = (blocks(layout, 2, 3), tokens(layout, 3, 4));
            for keys in [Keys::Mask, Keys::Blocks(&blocks), Keys::Tokens(&tokens)] {
                for (name, mask) in masks().into_iter().filter(|(name, _)| kv_len < 1000 || *name == "window")
                {
                    let what = format!("{isa}, {n:?}, {name}");
                    let (k, v) = (f32::any(Heads::new(k.view())), f32::any(Heads::new(v.view())));
                    let real = seen(&*mask, keys, &case.dims);
                    let dim = (batch, case.dims.q_heads, q_len, all.dims.kv_len);
                    // Another rule for each mask and plan.
                    turn += 1;
                    let seen = [
                        Sight::From(&from),
                        Sight::Every { first: 20, step: 1 },
                        Sight::Every { first: 3, step: 7 },
                        Sight::Every { first: 30, step: 0 },
                        Sight::Others { step: 5 },
                        Sight::Outside { blocks: &blocks_of, step: 30 },
                    ][turn % 6];
                    let sees = |position: isize, j: usize| match seen {
                        Sight::From(from) => from[j] <= position,
                        Sight::Every { first, step } => first + (j * step) as isize <= position,
                        Sight::Others { step } => position.div_euclid(step as isize) != j as isize,
                        Sight::Outside { blocks, step } => {
                            position.div_euclid(step as isize) != blocks[j] as isize
                        }
                    };
                    let extra = Some(Virtual { k, v, log_weights: logs.view(), seen, q_start: None });
                    let got = run::<f32>(&Call { extra, ..case.call(isa, &*mask, keys) }, &what);
                    let seen = Array4::from_shape_fn(dim, |(b, h, i, j)| {
                        let position = i as isize + kv_len as isize - q_len as isize;
                        if j < kv_len { real[[b, h, i, j]] } else { sees(position, j - kv_len) }
                    });
                    compare(&got, &all.reference(&seen, &score), &all.dims, &what);
                }
            }
        }
    }
}

/// The weights themselves, under every plan.
#[test]
fn weights_under_plans() {
    for isa in Isa::available() {
        let case = Case::<f32>::new([1, 2, 2, 210, 530, 24, 20], 2);
        let layout = Layout::new(Per::Head, 48, &case.dims);
        let (blocks, tokens) = (blocks(layout, 2, 3), tokens(layout, 3, 4));
        for keys in [Keys::Blocks(&blocks), Keys::Tokens(&tokens)] {
            for (name, mask) in masks() {
                let call = case.call(isa, &*mask, keys);
                let want = case.reference(&seen(&*mask, keys, &case.dims), &Plain).weights;
                let got = weights::materialize(&call).unwrap();
                let near = |got: f32, want: f64| (f64::from(got) - want).abs() < 1e-4 * (want + 1e-3);
                assert!(got.iter().zip(&want).all(|(&got, &want)| near(got, want)), "{isa}, {name}");
                let sums = weights::sum_over_queries(&call).unwrap();
                let want = want.sum_axis(Axis(2));
                assert!(sums.iter().zip(&want).all(|(&got, &want)| near(got, want)), "{isa}, {name}");
            }
        }
    }
}

/// A row's bits do not depend on what shares its tile.
#[test]
fn rows_stand_alone() {
    for isa in Isa::available() {
        let case = Case::<f32>::new([1, 1, 4, 64, 300, 24, 20], 2);
        let one = Case::<f32> {
            q: case.q.slice(s![.., 1..2, .., ..]).to_owned(),
            k: case.k.clone(),
            v: case.v.clone(),
            dims: Dims { q_heads: 1, ..case.dims },
        };
        for (name, mask) in masks().into_iter().filter(|(name, _)| !name.contains("head")) {
            let together = run::<f32>(&case.call(isa, &*mask, Keys::Mask), name);
            let alone = run::<f32>(&one.call(isa, &*mask, Keys::Mask), name);
            assert_eq!(together.0.slice(s![.., 1..2, .., ..]), alone.0, "{isa}, {name}");
            let range: Range<usize> = 1..2;
            assert_eq!(together.1.slice(s![.., range, ..]), alone.1, "{isa}, {name}");
        }
    }
}
