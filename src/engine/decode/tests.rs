use std::ops::Range;

use ndarray::{Array3, Array4, ArrayView4, Axis, s};

use super::*;
use crate::engine::call::Norm;
use crate::engine::parallel::on_threads;
use crate::engine::workspace::Workspace;
use crate::engine::{run, workspace_bytes};
use crate::input::Qkv;
use crate::keys::{BlockLists, Layout, TokenLists};
use crate::mask::{Causal, Mask, Unmasked, Window};
use crate::math::random::Normal;
use crate::score::{Alibi, AnyScore, Plain};
use crate::simd::Isa;
use crate::simd::mem::Rows;

static CAUSAL: Causal = Causal::new();

/// Batch, query heads, key/value heads, queries, keys, head_dim, value_dim.
type Sizes = [usize; 7];

fn arrays([batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim]: Sizes) -> [Array4<f32>; 3] {
    let mut noise = Normal::new(5);
    let mut array = |dim| Array4::from_shape_simple_fn(dim, || noise.next().unwrap() as f32);
    [
        array((batch, q_heads, q_len, head_dim)),
        array((batch, kv_heads, kv_len, head_dim)),
        array((batch, kv_heads, kv_len, value_dim)),
    ]
}

fn qkv([q, k, v]: &[Array4<f32>; 3]) -> Qkv<'_, f32> {
    Qkv::new(q.view(), k.view(), v.view())
}

fn call<'a>(x: Qkv<'a, f32>, mask: &'a dyn Mask, score: &'a dyn AnyScore, isa: Isa) -> Call<'a> {
    let dims = x.dims().unwrap();
    let scale = 1.0 / (dims.head_dim as f32).sqrt();
    let norm = Norm::Softmax { sinks: None };
    let (order, extra) = (None, None);
    Call {
        x: x.into(),
        dims,
        mask,
        keys: Keys::Mask,
        score,
        norm,
        scale,
        gains: None,
        gate: None,
        head_gains: None,
        plus: None,
        dots: None,
        order,
        regions: None,
        extra,
        isa,
    }
}

/// Output and LSE.
fn forward(call: &Call<'_>) -> (Array4<f32>, Array3<f32>) {
    let (batch, heads, rows) = (call.x.batch, call.dims.q_heads, call.dims.q_len);
    let mut out = Array4::from_elem((batch, heads, rows, call.dims.value_dim), f32::NAN);
    let mut lse = Array4::from_elem((batch, heads, rows, 1), f32::NAN);
    run(call, out.view_mut(), Some(lse.view_mut()), &mut Workspace::new()).unwrap();
    (out, lse.index_axis_move(Axis(3), 0))
}

fn bits((out, lse): &(Array4<f32>, Array3<f32>)) -> Vec<u32> {
    out.iter().chain(lse).map(|x| x.to_bits()).collect()
}

/// The definition, of what mask and plan leave.
fn define(call: &Call<'_>, [q, k, v]: &[Array4<f32>; 3]) -> (Array4<f64>, Array3<f64>) {
    let d = &call.dims;
    let mut out = Array4::zeros((d.batch, d.q_heads, d.q_len, d.value_dim));
    let mut lse = Array3::from_elem((d.batch, d.q_heads, d.q_len), f64::NEG_INFINITY);
    for ((batch, head, query), lse) in lse.indexed_iter_mut() {
        let site = call.sequence(batch).site(head);
        let kv_head = head / call.group();
        let seen =
            |&key: &usize| call.mask.visible(&site, query, key) && call.keys.visible(&site, query, key);
        let dot = |key: usize| {
            let (q, k) = (q.slice(s![batch, head, query, ..]), k.slice(s![batch, kv_head, key, ..]));
            let dot: f64 = q.iter().zip(k).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
            let mut score = [(dot * f64::from(call.scale)) as f32];
            call.score.apply_row(Isa::Scalar, &site, query, key, &mut score, None);
            f64::from(score[0])
        };
        let scores: Vec<_> = (0..d.kv_len).filter(seen).map(|key| (key, dot(key))).collect();
        let sum: f64 = scores.iter().map(|&(_, score)| score.exp()).sum();
        for (key, score) in scores {
            *lse = sum.ln();
            let weight = score.exp() / sum;
            let row = v.slice(s![batch, kv_head, key, ..]);
            out.slice_mut(s![batch, head, query, ..])
                .zip_mut_with(&row, |out, &v| *out += weight * f64::from(v));
        }
    }
    (out, lse)
}

fn close(what: &str, got: &(Array4<f32>, Array3<f32>), want: &(Array4<f64>, Array3<f64>)) {
    let pairs = got.0.iter().zip(&want.0).chain(got.1.iter().zip(&want.1));
    for (i, (&got, &want)) in pairs.enumerate() {
        let same = f64::from(got) == want || (f64::from(got) - want).abs() <= 2e-5 * (1.0 + want.abs());
        assert!(same, "{what}, number {i}: {got}, not {want}");
    }
}

/// A mask that must not be asked about what lies outside of its hull.
struct Inside(Window);

impl Inside {
    fn check(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) {
        let hull = self.0.hull(site, queries);
        let (start, end) = (hull.start / BLOCK * BLOCK, hull.end.next_multiple_of(BLOCK));
        assert!(start <= keys.start && keys.end <= end, "{keys:?} of {hull:?}");
    }
}

impl Mask for Inside {
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.check(site, query..query + 1, key..key + 1);
        self.0.visible(site, query, key)
    }
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        self.0.hull(site, queries)
    }
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        self.check(site, queries.clone(), keys.clone());
        self.0.coverage(site, queries, keys)
    }
}

#[test]
fn only_the_hull_is_visited() {
    for window in [0, 1, 63, 64, 200, 1024, 2000] {
        for end in [-3, 70, 1023, 1024, 2500, 2999] {
            let x = arrays([1, 4, 2, 1, 3000, 12, 20]);
            let window = Window::new(Some(window), Some(0)).at(end);
            let mask = Inside(window);
            let asked = call(qkv(&x), &mask, &Plain, Isa::Scalar);
            let free = call(qkv(&x), &window, &Plain, Isa::Scalar);
            let out = forward(&asked);
            close(&format!("{window:?}"), &out, &define(&free, &x));
            assert_eq!(bits(&out), bits(&forward(&free)));
        }
    }
}

/// Head `h` sees the keys of range `h`.
struct ByHead(Vec<Range<usize>>);

impl Mask for ByHead {
    fn visible(&self, site: &Site, _: usize, key: usize) -> bool {
        self.0[site.head].contains(&key)
    }
    fn hull(&self, site: &Site, _: Range<usize>) -> Range<usize> {
        self.0[site.head].clone()
    }
    fn coverage(&self, _: &Site, _: Range<usize>, _: Range<usize>) -> Coverage {
        Coverage::Partial
    }
    fn is_shared(&self) -> bool {
        false
    }
}

/// What the heads of a group see, which reads keys once, is what some of them see.
#[test]
fn heads_of_a_group_see_keys_of_their_own() {
    let x = arrays([2, 4, 2, 1, 3000, 12, 20]);
    let (near, far, none, one) = (2100..2900, 5..70, 0..0, 1024..1025);
    for order in [[&near, &far, &none, &one], [&far, &near, &one, &none], [&none, &none, &near, &far]] {
        let mask = ByHead(order.map(Clone::clone).to_vec());
        each_isa(|isa| {
            let asked = call(qkv(&x), &mask, &Plain, isa);
            close(&format!("{isa} {order:?}"), &forward(&asked), &define(&asked, &x));
        });
    }
}

/// What lies outside of a window costs nothing.
#[test]
fn scratch_of_a_window() {
    let window = Window::new(Some(255), Some(0));
    let bytes = |kv_len: usize| {
        let (q, k) = (Array4::<f32>::zeros((1, 32, 1, 128)), Array4::<f32>::zeros((1, 1, 1, 128)));
        let k = k.broadcast((1, 8, kv_len, 128)).unwrap();
        workspace_bytes(&call(Qkv::new(q.view(), k, k), &window, &Plain, Isa::Scalar))
    };
    assert_eq!(bytes(131_072), bytes(1024));
}

/// Scratch follows the lengths that there are, not the longest one.
#[test]
fn scratch_of_a_ragged_batch() {
    let q = Array4::<f32>::zeros((1, 32, 64, 128));
    let one = Array4::<f32>::zeros((1, 1, 1, 128));
    let mut keys = vec![0, 65_536];
    keys.extend((1..64).map(|i| 65_536 + 16 * i));
    let queries: Vec<_> = (0..=64).collect();
    let k = one.broadcast((1, 8, keys[64], 128)).unwrap();
    let bytes = |sequences: usize| {
        let (q, k) = (q.slice(s![.., .., ..sequences, ..]), k.slice(s![.., .., ..keys[sequences], ..]));
        let x = Qkv::new(q, k, k.reborrow()).packed(&queries[..=sequences], &keys[..=sequences]);
        workspace_bytes(&call(x, &Unmasked, &Plain, Isa::Scalar))
    };
    // A state of 4 rows for each of the 64 chunks of 8 heads.
    let states = 64 * 8 * 4 * (128 + 2) * size_of::<f32>();
    assert!(bytes(64) < states + (1 << 20), "{}", bytes(64));
    assert!(bytes(64) - bytes(1) < 64 << 10, "{} {}", bytes(64), bytes(1));
}

fn each_isa(check: impl FnMut(Isa)) {
    Isa::available().for_each(check);
}

/// Random lists of atoms and of keys, several ways shared.
#[test]
fn lists() {
    let sizes = [2, 4, 2, 3, 2300, 12, 20];
    let x = arrays(sizes);
    let dims = qkv(&x).dims().unwrap();
    let slopes = Alibi::new(4);
    let scores: [(&str, &dyn AnyScore); 2] = [("plain", &Plain), ("alibi", &slopes)];
    let mut noise = Normal::new(11);
    let mut draw = |at_most: usize| (noise.next().unwrap().abs() * 1e6) as usize % at_most;
    for per in [Per::Head, Per::Group, Per::Sequence] {
        for q_block in [1, 2, 5] {
            let layout = Layout::new(per, q_block, &dims);
            let lists = layout.lists().unwrap();
            let (mut offsets, mut atoms) = (vec![0], Vec::new());
            let (mut key_offsets, mut keys) = (vec![0], Vec::new());
            for list in 0..lists {
                // Nothing, few, about half, all.
                let one_in = [usize::MAX, 20, 2, 1][list % 4];
                atoms.extend((0..layout.atoms() as u32).filter(|_| draw(one_in) == 0 && one_in < 100));
                offsets.push(atoms.len());
                keys.extend((0..layout.keys as u32).filter(|_| draw(one_in) == 0 && one_in < 100));
                key_offsets.push(keys.len());
            }
            let blocks = BlockLists::new(layout, offsets, atoms).unwrap();
            let tokens = TokenLists::from_keys(layout, &key_offsets, &keys).unwrap();
            let masks: [&dyn Mask; 3] =
                [&Unmasked, &Causal::new(), &Window::new(Some(900), Some(0)).at(1800)];
            for (plan, name) in [(Keys::Blocks(&blocks), "atoms"), (Keys::Tokens(&tokens), "keys")] {
                for (m, mask) in masks.into_iter().enumerate() {
                    let (score_name, score) = scores[m % 2];
                    let call = |isa| Call { keys: plan, ..call(qkv(&x), mask, score, isa) };
                    let want = define(&call(Isa::Scalar), &x);
                    each_isa(|isa| {
                        let what = format!("{name} {per:?} {q_block} mask {m} {score_name} {isa}");
                        let got = on_threads(1, || forward(&call(isa)));
                        close(&what, &got, &want);
                        assert_eq!(bits(&got), bits(&on_threads(3, || forward(&call(isa)))), "{what}");
                    });
                }
            }
        }
    }
}

/// A list of everything gives the bits that none gives.
#[test]
fn complete_lists() {
    let x = arrays([1, 4, 2, 2, 2300, 12, 20]);
    let dims = qkv(&x).dims().unwrap();
    let layout = Layout::new(Per::Group, 2, &dims);
    let blocks = BlockLists::from_mask(layout, &Unmasked).unwrap();
    let tokens = TokenLists::from_mask(layout, &Unmasked).unwrap();
    each_isa(|isa| {
        let free = call(qkv(&x), &CAUSAL, &Plain, isa);
        for keys in [Keys::Blocks(&blocks), Keys::Tokens(&tokens)] {
            assert_eq!(bits(&forward(&Call { keys, ..free })), bits(&forward(&free)), "{isa}");
        }
    });
}

/// Pages of a few tokens each, in any order.
struct Pages {
    rows: [Array4<f32>; 2],
    page: usize,
    table: Vec<usize>,
}

impl Pages {
    fn new([_, k, v]: &[Array4<f32>; 3], page: usize) -> Self {
        let pages = k.dim().2.div_ceil(page);
        // 7 and the number of pages have no common divisor.
        assert!(!pages.is_multiple_of(7));
        let table: Vec<_> = (0..pages).map(|i| i * 7 % pages).collect();
        let place = |x: &Array4<f32>| {
            let (batch, heads, len, cols) = x.dim();
            let mut rows = Array4::from_elem((batch, heads, pages * page, cols), f32::NAN);
            for i in 0..len {
                rows.slice_mut(s![.., .., table[i / page] * page + i % page, ..]).assign(&x.slice(s![
                    ..,
                    ..,
                    i,
                    ..
                ]));
            }
            rows
        };
        Self { rows: [place(k), place(v)], page, table: table.clone() }
    }

    fn place(&self, key: usize) -> usize {
        self.table[key / self.page] * self.page + key % self.page
    }

    fn rows<'r>(&'r self, side: usize, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let rows = self.rows[side].slice(s![at.sequence.batch, at.kv_head, .., ..]);
        let first = self.place(at.keys.start);
        if at.keys.len() <= self.page - at.keys.start % self.page {
            let whole: Rows<'r, f32> = rows.into();
            return AnyRows::F32(whole.part(first..first + at.keys.len(), 0..whole.cols()));
        }
        let cols = rows.ncols();
        for (i, key) in at.keys.clone().enumerate() {
            room[i * cols..][..cols].copy_from_slice(rows.row(self.place(key)).as_slice().unwrap());
        }
        AnyRows::F32(Rows::of_slice(room, at.keys.len(), cols, cols))
    }
}

impl KvSource for Pages {
    fn keys<'r>(&'r self, _: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(0, at, room)
    }
    fn values<'r>(&'r self, _: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(1, at, room)
    }
    fn stretch(&self, at: &At<'_>) -> usize {
        self.page - at.keys.start % self.page
    }
    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        [0, 1].map(|side| {
            let rows = self.rows[side].slice(s![at.sequence.batch, at.kv_head, .., ..]);
            Rows::from(rows).address(self.place(at.keys.start))
        })
    }
    fn row_bytes(&self) -> [usize; 2] {
        [0, 1].map(|side| self.rows[side].dim().3 * size_of::<f32>())
    }
}

/// Numbers of 8 bits, in units of 1/16.
struct Bytes([Array4<i8>; 2]);

impl Bytes {
    fn rows<'r>(&self, side: usize, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        let rows = self.0[side].slice(s![at.sequence.batch, at.kv_head, at.keys.clone(), ..]);
        for (to, &x) in room.iter_mut().zip(rows) {
            *to = f32::from(x) / 16.0;
        }
        AnyRows::F32(Rows::of_slice(room, rows.nrows(), rows.ncols(), rows.ncols()))
    }
}

impl KvSource for Bytes {
    fn keys<'r>(&'r self, _: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(0, at, room)
    }
    fn values<'r>(&'r self, _: Isa, at: &At<'_>, room: &'r mut [f32]) -> AnyRows<'r> {
        self.rows(1, at, room)
    }
    fn ahead(&self, at: &At<'_>) -> [(*const u8, isize); 2] {
        [0, 1].map(|side| {
            let row = self.0[side].slice(s![at.sequence.batch, at.kv_head, at.keys.start, ..]);
            (row.as_ptr().cast(), row.len() as isize)
        })
    }
    fn row_bytes(&self) -> [usize; 2] {
        [0, 1].map(|side| self.0[side].dim().3)
    }
}

/// Which cache holds the keys does not show in the bits.
#[test]
fn caches() {
    for sizes in [[2, 4, 2, 1, 2300, 12, 20], [1, 6, 1, 2, 130, 5, 1], [1, 2, 2, 1, 64, 64, 64]] {
        let mut x = arrays(sizes);
        let (q_len, kv_len) = (sizes[3], sizes[4]);
        for array in &mut x {
            array.mapv_inplace(|x| (x * 16.0).round() / 16.0);
        }
        let [_, k, v] = &x;
        let to_bytes = |x: &Array4<f32>| x.mapv(|x| (x * 16.0) as i8);
        let bytes = Bytes([to_bytes(k), to_bytes(v)]);
        let pages = [1, 16, 24, 64, 100].map(|page| Pages::new(&x, page));
        let mut caches: Vec<&dyn KvSource> = pages.iter().map(|pages| pages as _).collect();
        caches.push(&bytes);
        let layout = Layout::new(Per::Group, q_len, &qkv(&x).dims().unwrap());
        let odd: Vec<u32> = (0..kv_len as u32).filter(|key| key % 3 > 0).collect();
        let lists = layout.lists().unwrap();
        let offsets: Vec<_> = (0..=lists).map(|i| i * odd.len()).collect();
        let tokens = TokenLists::from_keys(layout, &offsets, &odd.repeat(lists)).unwrap();
        each_isa(|isa| {
            for keys in [Keys::Mask, Keys::Tokens(&tokens)] {
                let want = Call { keys, ..call(qkv(&x), &CAUSAL, &Plain, isa) };
                for (i, &cache) in caches.iter().enumerate() {
                    let mut x = want.x;
                    x.kv = Kv::Cache(cache);
                    let got = forward(&Call { x, ..want });
                    assert_eq!(bits(&got), bits(&forward(&want)), "{sizes:?} cache {i} {isa}");
                    // Without values: the LSE alone.
                    let (_, lse) = forward(&Call { x, ..want }.without_values());
                    assert_eq!(lse, got.1, "{sizes:?} cache {i} {isa}");
                }
            }
        });
    }
}

/// Queries go through keys that no second-level cache holds region by region: to the
/// same outputs, whatever queries are beside them, and to NaN where they see it.
#[test]
fn queries_go_through_regions_together() {
    const KEYS: usize = 1200;
    let mut x = arrays([1, 4, 1, 70, KEYS, 256, 256]);
    x[2][[0, 0, 3, 5]] = f32::NAN;
    // Some 300 keys up to each query; every third one sees the NaN.
    let list = |query: usize| {
        let sees = move |&key: &usize| {
            if key == 3 { query.is_multiple_of(3) } else { (5 * key + 7 * query).is_multiple_of(4) }
        };
        (0..=KEYS - 70 + query).filter(sees)
    };
    let lists = |queries: Range<usize>, x: Qkv<'_, f32>| {
        let (mut offsets, mut keys) = (vec![0], Vec::new());
        for query in queries {
            keys.extend(list(query).map(|key| key as u32));
            offsets.push(keys.len());
        }
        let layout = Layout::new(crate::keys::Per::Sequence, 1, &x.dims().unwrap());
        TokenLists::from_keys(layout, &offsets, &keys).unwrap()
    };
    let (all, last) = (qkv(&x), Qkv::new(x[0].slice(s![.., .., 60.., ..]), x[1].view(), x[2].view()));
    let (of_all, of_last) = (lists(0..70, all), lists(60..70, last));
    let pages = Pages::new(&x, 16);
    let same = |a: f64, b: f64| a.is_nan() && b.is_nan() || (a - b).abs() <= 2e-5 * (1.0 + b.abs());
    each_isa(|isa| {
        let whole = Call { keys: Keys::Tokens(&of_all), ..call(all, &CAUSAL, &Plain, isa) };
        assert!(in_regions(&whole, &whole.sequence(0)));
        let (got, want) = (forward(&whole), define(&whole, &x));
        for (i, (&got, &want)) in got.0.iter().zip(&want.0).chain(got.1.iter().zip(&want.1)).enumerate() {
            assert!(same(f64::from(got), want), "{isa}, number {i}: {got}, not {want}");
        }
        assert!(got.0.iter().any(|x| x.is_nan()) && got.0.iter().any(|x| !x.is_nan()));
        // Of fewer queries, each by itself.
        let few = Call { keys: Keys::Tokens(&of_last), ..call(last, &CAUSAL, &Plain, isa) };
        assert!(!in_regions(&few, &few.sequence(0)));
        for (&few, &of_all) in forward(&few).0.iter().zip(got.0.slice(s![.., .., 60.., ..])) {
            assert!(same(f64::from(few), f64::from(of_all)), "{isa}: {few} and {of_all}");
        }
        // On any number of threads, and in any pages, to the same bits.
        let mut x = whole.x;
        x.kv = Kv::Cache(&pages);
        let paged = Call { x, ..whole };
        let of_threads = |n, call: &Call<'_>| on_threads(n, || bits(&forward(call)));
        assert_eq!(of_threads(1, &whole), of_threads(3, &whole), "{isa}");
        assert_eq!(of_threads(1, &paged), of_threads(3, &paged), "{isa}");
        assert_eq!(of_threads(1, &paged), of_threads(1, &whole), "{isa}");
    });
}

/// How arrays lie does not show in the bits.
#[test]
fn strides() {
    fn transposed(x: &Array4<f32>) -> Array4<f32> {
        x.view().permuted_axes([0, 1, 3, 2]).as_standard_layout().to_owned().permuted_axes([0, 1, 3, 2])
    }
    fn apart(x: &Array4<f32>) -> Array4<f32> {
        let (b, h, n, d) = x.dim();
        let mut room = Array4::from_elem((b, h, n, 3 * d), f32::NAN);
        room.slice_mut(s![.., .., .., ..;3]).assign(x);
        room
    }
    for sizes in [[1, 4, 2, 1, 1100, 40, 24], [2, 3, 1, 2, 77, 5, 3], [1, 1, 1, 1, 64, 16, 16]] {
        let x = arrays(sizes);
        let [q, k, v] = &x;
        let (kt, vt, ka, va) = (transposed(k), transposed(v), apart(k), apart(v));
        let (ka, va) = (ka.slice(s![.., .., .., ..;3]), va.slice(s![.., .., .., ..;3]));
        each_isa(|isa| {
            let bits = |k: ArrayView4<'_, f32>, v: ArrayView4<'_, f32>| {
                bits(&forward(&call(Qkv::new(q.view(), k, v), &CAUSAL, &Plain, isa)))
            };
            let want = bits(k.view(), v.view());
            assert_eq!(bits(kt.view(), v.view()), want, "keys, {sizes:?} {isa}");
            assert_eq!(bits(k.view(), vt.view()), want, "values, {sizes:?} {isa}");
            assert_eq!(bits(kt.view(), vt.view()), want, "both, {sizes:?} {isa}");
            assert_eq!(bits(ka, va), want, "apart, {sizes:?} {isa}");
        });
    }
}

/// Sequences of all lengths in a batch, and many short ones to a task: each has
/// the bits that it has alone.
#[test]
fn ragged() {
    let lengths = [0, 1, 2100, 16, 0, 64, 65, 1024, 1025, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3];
    let queries = [1, 1, 2, 0, 0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
    let offsets = |lengths: &[usize]| {
        let mut at = vec![0];
        at.extend(lengths.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        at
    };
    let (q_at, k_at) = (offsets(&queries), offsets(&lengths));
    let x = arrays([1, 4, 2, q_at[23], k_at[23], 12, 20]);
    let [q, k, v] = &x;
    each_isa(|isa| {
        for threads in [1, 2, 5] {
            let all =
                on_threads(threads, || forward(&call(qkv(&x).packed(&q_at, &k_at), &CAUSAL, &Plain, isa)));
            for i in 0..lengths.len() {
                let (rows, keys) = (q_at[i]..q_at[i + 1], k_at[i]..k_at[i + 1]);
                let part =
                    |x: &'_ Array4<f32>, at: &Range<usize>| x.slice(s![.., .., at.clone(), ..]).to_owned();
                let alone = [part(q, &rows), part(k, &keys), part(v, &keys)];
                let alone = forward(&call(qkv(&alone), &CAUSAL, &Plain, isa));
                let got = (part(&all.0, &rows), all.1.slice(s![.., .., rows]).to_owned());
                assert_eq!(bits(&got), bits(&alone), "sequence {i}, {threads} threads, {isa}");
            }
        }
    });
}
