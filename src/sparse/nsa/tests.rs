use ndarray::{Axis, s};

use super::*;
use crate::attention::{Attention, Selects};
use crate::cache::{Append, Cached, Contiguous, Int8, KvShape, Paged, Pages, Ring};
use crate::dense::Dense;
use crate::input::Qkv;
use crate::sparse::testing::{Arrays, compressed_is_its_definition, near};
use crate::stages::selecting::difference;

fn gates(x: &Arrays, of: [f32; 3]) -> Array4<f32> {
    let (batch, heads, len, _) = x.q.dim();
    Array4::from_shape_fn((batch, heads, len, 3), |(.., part)| of[part])
}

/// Each branch alone is dense attention if it sees all.
#[test]
fn branches_that_see_all_are_dense() {
    for sizes in [[2, 4, 2, 200, 200, 24, 12], [1, 4, 2, 3, 300, 24, 12]] {
        let x = Arrays::normal(sizes, 1);
        let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        let alone = [
            (Nsa::builder(1).pool(1, 1), [1.0, 0.0, 0.0]),
            (Nsa::builder(100), [0.0, 1.0, 0.0]),
            (Nsa::builder(1).window(1000), [0.0, 0.0, 1.0]),
        ];
        for (builder, of) in alone {
            let gates = gates(&x, of);
            let out = builder.build().unwrap().forward(Branches::new(x.qkv(), gates.view())).unwrap();
            near("alone", &out, &want);
        }
    }
}

/// Given pools and windows are used: those of other arrays, and means as
/// the mechanism makes them.
#[test]
fn given_arrays_are_those_that_are_read() {
    let (x, y) =
        (Arrays::integers([2, 4, 2, 150, 200, 24, 12], 1), Arrays::integers([2, 4, 2, 1, 200, 24, 12], 9));
    let nsa = Nsa::builder(3).pool(16, 8).local(1).window(24).build().unwrap();
    let means = |x: &Array4<f32>| {
        let (b, h, n, d) = x.dim();
        let mut out = Array4::zeros((b, h, nsa.means().count(n), d));
        let mut workspace = Workspace::new();
        nsa.means().run(
            x.view(),
            out.view_mut(),
            workspace.arena(nsa.means().bytes(x.dim(), false)).unwrap(),
        );
        out
    };
    let (k, v, gates) = (means(&x.k), means(&x.v), gates(&x, [0.5, 1.0, 0.25]));
    let own = Branches::new(x.qkv(), gates.view());
    let given = own.compressed(k.view(), v.view());
    assert_eq!(nsa.select(own).unwrap(), nsa.select(given).unwrap());
    near("given", &nsa.forward(given).unwrap(), &nsa.forward(own).unwrap());
    let (k, v) = (means(&y.k), means(&y.v));
    let other = own.compressed(k.view(), v.view()).window(y.k.view(), y.v.view());
    let index = nsa.select(other).unwrap();
    assert_ne!(index, nsa.select(own).unwrap());
    assert_eq!(index, nsa.reference_select(other).unwrap().0);
    let want = nsa.reference_on(other, &index).unwrap().mapv(|x| x as f32);
    near("other", &nsa.forward(other).unwrap(), &want);
}

#[test]
fn later_tokens_and_other_queries_change_nothing() {
    let mut x = Arrays::integers([2, 4, 2, 200, 200, 24, 12], 4);
    let nsa = Nsa::builder(2).local(1).window(20).build().unwrap();
    let gates = gates(&x, [0.5, 1.0, 0.25]);
    let whole = nsa.forward(Branches::new(x.qkv(), gates.view())).unwrap();
    let cut = |n: usize, rows: std::ops::Range<usize>| {
        let (k, v) = (x.k.slice(s![.., .., ..n, ..]), x.v.slice(s![.., .., ..n, ..]));
        let qkv = Qkv::new(x.q.slice(s![.., .., rows.clone(), ..]), k, v);
        nsa.forward(Branches::new(qkv, gates.slice(s![.., .., rows, ..]))).unwrap()
    };
    for (n, rows) in [(200, 199..200), (150, 0..150), (200, 77..200), (20, 13..20)] {
        near("part", &cut(n, rows.clone()), &whole.slice(s![.., .., rows, ..]).to_owned());
    }
    let lengths = [150, 31];
    let first = x.q.slice(s![.., .., ..30, ..]);
    let qkv = Qkv::new(first, x.k.view(), x.v.view()).key_lengths(&lengths);
    let out = nsa.forward(Branches::new(qkv, gates.slice(s![.., .., ..30, ..]))).unwrap();
    x.k.slice_mut(s![0, .., 150.., ..]).fill(f32::NAN);
    x.k.slice_mut(s![1, .., 31.., ..]).fill(f32::NAN);
    let first = x.q.slice(s![.., .., ..30, ..]);
    let qkv = Qkv::new(first, x.k.view(), x.v.view()).key_lengths(&lengths);
    let branches = Branches::new(qkv, gates.slice(s![.., .., ..30, ..]));
    assert_eq!(nsa.forward(branches).unwrap(), out);
    near("lengths", &out, &nsa.reference(branches).unwrap().mapv(|x| x as f32));
}

/// With pools that are blocks, the importance of all blocks is the number of
/// heads, and the one with the most weight is read.
#[test]
fn before_the_first_pool_there_is_none() {
    let x = Arrays::normal([1, 4, 2, 100, 100, 24, 12], 4);
    let gates = gates(&x, [1.0, 0.0, 0.0]);
    let out = Nsa::builder(2).build().unwrap().forward(Branches::new(x.qkv(), gates.view())).unwrap();
    assert!(out.slice(s![.., .., ..31, ..]).iter().all(|&x| x == 0.0));
    assert!(out.slice(s![.., .., 31, ..]).iter().all(|&x| x != 0.0));
}

#[test]
fn refusals() {
    let refusal = |builder: NsaBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(refusal(Nsa::builder(0)), "k: expected at least 1, got 0");
    assert_eq!(refusal(Nsa::builder(2).window(0)), "window: expected at least 1, got 0");
    assert!(refusal(Nsa::builder(2).pool(30, 16)).starts_with("pool: "));
    assert!(refusal(Nsa::builder(2).block(96)).starts_with("block: "));
    let x = Arrays::normal([1, 4, 2, 100, 100, 24, 12], 4);
    let nsa = Nsa::builder(2).build().unwrap();
    let refusal = |x: Branches<'_, f32>| nsa.forward(x).unwrap_err().to_string();
    let gates = gates(&x, [1.0; 3]);
    assert!(refusal(Branches::new(x.qkv(), gates.slice(s![.., .., .., ..2]))).starts_with("gates: "));
    let own = Branches::new(x.qkv(), gates.view());
    let few = own.compressed(x.k.slice(s![.., .., ..4, ..]), x.v.slice(s![.., .., ..4, ..]));
    assert_eq!(refusal(few), "compressed k: expected 5 pools or more, got 4");
    assert!(refusal(own.compressed(x.k.view(), x.k.view())).starts_with("compressed v: "));
    assert!(refusal(own.window(x.v.view(), x.v.view())).starts_with("window k: "));
}

/// What a cache holds of the first tokens of each sequence.
fn fill<C: Append>(mut cache: C, [k, v]: [&Array4<f32>; 2], lengths: &[usize]) -> C {
    for (b, &n) in lengths.iter().enumerate() {
        cache.append(b, k.slice(s![b, .., ..n, ..]), v.slice(s![b, .., ..n, ..])).unwrap();
    }
    cache
}

const SHAPE: KvShape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 };
const PAGES: Pages = Pages { count: 40, len: 16 };

/// Over caches of the same rows, of sequences of any lengths, in prefill and in decoding, it
/// selects the same blocks and gives the same outputs; each branch may have its own cache.
#[test]
fn caches_are_arrays() {
    let nsa = Nsa::builder(3).pool(16, 8).local(1).window(24).build().unwrap();
    for (q_len, lengths) in [(150, [200, 170]), (1, [200, 13]), (5, [3, 200])] {
        let x = Arrays::integers([2, 4, 2, q_len, 200, 24, 12], 1);
        let pools = Arrays::integers([2, 4, 2, 1, 24, 24, 12], 2);
        let near_rows = Arrays::integers([2, 4, 2, 1, 200, 24, 12], 3);
        let gates = gates(&x, [0.5, 1.0, 0.25]);
        let own = [&x.k, &x.v];
        let flat = fill(Contiguous::<f32>::new(SHAPE, 2, 256).unwrap(), own, &lengths);
        let paged = fill(Paged::<f32>::new(SHAPE, 2, PAGES).unwrap(), own, &lengths);
        let whole = lengths.map(|n| nsa.means().count(n));
        let compressed = fill(Paged::<f32>::new(SHAPE, 2, PAGES).unwrap(), [&pools.k, &pools.v], &whole);
        let window =
            fill(Paged::<f32>::new(SHAPE, 2, PAGES).unwrap(), [&near_rows.k, &near_rows.v], &lengths);
        let arrays = Branches::new(x.qkv().key_lengths(&lengths), gates.view());
        let given =
            arrays.compressed(pools.k.view(), pools.v.view()).window(near_rows.k.view(), near_rows.v.view());
        let caches: [&dyn Cache; 2] = [&flat, &paged];
        for cache in caches {
            let cached = CachedBranches::new(Cached::new(x.q.view(), cache), gates.view());
            let all = cached.compressed(&compressed).window(&window);
            for (arrays, cached) in [(arrays, cached), (given, all)] {
                let index = nsa.select(cached).unwrap();
                assert_eq!(index, nsa.select(arrays).unwrap(), "{q_len}");
                assert_eq!(index, nsa.reference_select(cached).unwrap().0, "{q_len}");
                near("cache", &nsa.forward(cached).unwrap(), &nsa.forward(arrays).unwrap());
                compressed_is_its_definition(&nsa, cached, nsa.bound_on(cached, &index).unwrap());
                assert_eq!(nsa.cost(cached).unwrap().flops, nsa.cost(arrays).unwrap().flops);
            }
        }
        // Of 8 bits it is its definition, on what is read back.
        let small = fill(Contiguous::<Int8>::new(SHAPE, 2, 256).unwrap(), own, &lengths);
        let cached = CachedBranches::new(Cached::new(x.q.view(), &small), gates.view());
        let index = nsa.select(cached).unwrap();
        let (want, margins) = nsa.reference_select(cached).unwrap();
        assert_eq!(difference(&index, &want, &margins), None);
        let want = nsa.reference_on(cached, &index).unwrap().mapv(|x| x as f32);
        near("8 bits", &nsa.forward(cached).unwrap(), &want);
    }
}

/// Queries of sequences in another order, of different numbers, in one call.
#[test]
fn packed_queries_over_a_cache_are_those_of_each_sequence() {
    let x = Arrays::integers([2, 4, 2, 60, 200, 24, 12], 5);
    let nsa = Nsa::builder(3).pool(16, 8).local(1).window(24).build().unwrap();
    let cache = fill(Paged::<f32>::new(SHAPE, 2, PAGES).unwrap(), [&x.k, &x.v], &[200, 170]);
    let q =
        ndarray::concatenate(Axis(2), &[x.q.slice(s![1..2, .., 59.., ..]), x.q.slice(s![0..1, .., .., ..])])
            .unwrap();
    let gates = Array4::from_shape_fn((1, 4, 61, 3), |(_, h, i, part)| ((h + i + part) % 3) as f32 * 0.5);
    let cached = Cached::new(q.view(), &cache).sequences(&[1, 0]).packed(&[0, 1, 61]);
    let packed = CachedBranches::new(cached, gates.view());
    assert_eq!(nsa.select(packed).unwrap(), nsa.reference_select(packed).unwrap().0);
    let got = nsa.forward(packed).unwrap();
    for (sequence, n, rows) in [(1, 170, 0..1), (0, 200, 1..61)] {
        let of = |x: &Array4<f32>| x.slice(s![sequence..sequence + 1, .., ..n, ..]).to_owned();
        let (q, k, v) = (q.slice(s![.., .., rows.clone(), ..]), of(&x.k), of(&x.v));
        let alone = Branches::new(Qkv::new(q, k.view(), v.view()), gates.slice(s![.., .., rows.clone(), ..]));
        near("packed", &got.slice(s![.., .., rows, ..]).to_owned(), &nsa.forward(alone).unwrap());
    }
}

#[test]
fn caches_that_do_not_fit_are_refused() {
    let x = Arrays::normal([2, 4, 2, 3, 100, 24, 12], 4);
    let nsa = Nsa::builder(2).build().unwrap();
    let gates = gates(&x, [1.0; 3]);
    let new = || Paged::<f32>::new(SHAPE, 2, PAGES).unwrap();
    let cache = fill(new(), [&x.k, &x.v], &[100, 90]);
    let own = CachedBranches::new(Cached::new(x.q.view(), &cache), gates.view());
    let refusal = |x: CachedBranches<'_, f32, Paged<f32>>| {
        let mut out = Array4::from_elem((2, 4, 3, 12), f32::NAN);
        let refused = nsa.forward_into(x, out.view_mut(), &mut Workspace::new()).unwrap_err();
        assert!(out.iter().all(|x| x.is_nan()), "something was written");
        assert_eq!(nsa.select(x).unwrap_err(), refused);
        refused.to_string()
    };
    let narrow = gates.slice(s![.., .., .., ..2]);
    assert!(refusal(CachedBranches { gates: narrow, ..own }).starts_with("gates: "));
    let few = fill(new(), [&x.k, &x.v], &[5, 3]);
    assert_eq!(
        refusal(own.compressed(&few)),
        "compressed: expected 4 rows or more of sequence 1, as the cache asks for, got 3"
    );
    let short = fill(new(), [&x.k, &x.v], &[99, 90]);
    assert_eq!(
        refusal(own.window(&short)),
        "window: expected 100 rows of sequence 0, as the cache asks for, got 99"
    );
    let other = Contiguous::<f32>::new(KvShape { kv_heads: 1, ..SHAPE }, 2, 8).unwrap();
    assert_eq!(
        refusal(own.window(&other)),
        "window: expected 2 heads of 24 and 12, as the cache has them, got 1 of 24 and 12"
    );
    assert!(refusal(own.compressed(&other)).starts_with("compressed: expected 2 heads"));
    let ring =
        fill(Ring::<f32>::new(SHAPE, 2, 0, 20).unwrap().compensated().unwrap(), [&x.k, &x.v], &[100, 90]);
    let cached = CachedBranches::new(Cached::new(x.q.view(), &ring), gates.view());
    assert!(nsa.forward(cached).unwrap_err().to_string().starts_with("a compensated cache cannot"));
    // A cache shorter than the queries: the first ones see nothing.
    let few = fill(new(), [&x.k, &x.v], &[1, 0]);
    let cached = CachedBranches::new(Cached::new(x.q.view(), &few), gates.view());
    let out = nsa.forward(cached).unwrap();
    assert!(out.slice(s![0, .., ..2, ..]).iter().chain(&out.slice(s![1, .., .., ..])).all(|&x| x == 0.0));
}
