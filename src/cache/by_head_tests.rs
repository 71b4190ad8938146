//! Heads of their own caches against those caches alone.

use half::f16;
use ndarray::{Array3, Array4, Axis, s};

use super::tests::read;
use super::*;
use crate::attention::{Attention, Bounded, Mergeable, Weights};
use crate::dense::Dense;
use crate::simd::Isa;
use crate::sparse::TopK;
use crate::testing::array;
use crate::testing::arrays::within;

fn of(kv_heads: usize) -> KvShape {
    KvShape { kv_heads, head_dim: 20, value_dim: 9 }
}

/// Two heads that keep all, two that keep 3 sinks and 17 tokens, and one that keeps
/// 70, in pages.
fn caches(sequences: usize) -> (Contiguous<f32>, Ring<f16>, Paged<f32>) {
    (
        Contiguous::new(of(2), sequences, 300).unwrap(),
        Ring::new(of(2), sequences, 3, 17).unwrap(),
        Paged::new(of(1), sequences, Pages { count: 5 * sequences, len: 16 }).unwrap(),
    )
}

const HEADS: [&[usize]; 3] = [&[1, 4], &[0, 3], &[2]];

fn by_head(sequences: usize) -> ByHead {
    let (all, last, paged) = caches(sequences);
    ByHead::builder().heads(HEADS[0], all).heads(HEADS[1], last).heads(HEADS[2], paged).build().unwrap()
}

fn tokens(sequences: usize, n: usize, seed: u64) -> [Array4<f32>; 2] {
    [array([sequences, 5, n, 20], seed), array([sequences, 5, n, 9], seed + 1)]
}

/// Every head sees what it sees of its own cache, whatever the queries are.
#[test]
fn heads_see_their_own_caches() {
    let (mut all, mut last, mut few) = caches(2);
    let mut cache = by_head(2);
    for (sequence, n, seed) in [(0, 75, 1), (1, 9, 3), (1, 1, 5)] {
        let [k, v] = tokens(1, n, seed);
        cache.append_each(&[sequence], k.view(), v.view()).unwrap();
        let part = |heads: &[usize]| [k.select(Axis(1), heads), v.select(Axis(1), heads)];
        let [[k0, v0], [k1, v1], [k2, v2]] = HEADS.map(part);
        all.append_each(&[sequence], k0.view(), v0.view()).unwrap();
        last.append_each(&[sequence], k1.view(), v1.view()).unwrap();
        few.append_each(&[sequence], k2.view(), v2.view()).unwrap();
    }
    assert_eq!(
        (cache.lengths(), cache.held(0, 3).unwrap(), cache.held(1, 3).unwrap()),
        (&[75, 10][..], 20, 10)
    );
    assert_eq!(cache.bytes(), all.bytes() + last.bytes() + few.bytes());
    // Alone, each cache has queries that sit at its last tokens, too.
    for (q_len, isa) in [1, 3, 40].into_iter().flat_map(|n| Isa::available().map(move |isa| (n, isa))) {
        let (q, dense) = (array([2, 10, q_len, 20], 7), Dense::builder().causal().isa(isa).build().unwrap());
        let x = Cached::new(q.view(), &cache);
        let (want, bound) = (dense.reference(x).unwrap(), dense.error_bound(x).unwrap());
        let (out, lse) = dense.forward_with_lse(x).unwrap();
        within("by head", out.view(), &want, &bound);
        let weights = dense.weights(x).unwrap();
        let parts: [&dyn Cache; 3] = [&all, &last, &few];
        for (heads, part) in HEADS.into_iter().zip(parts) {
            let own: Vec<usize> = heads.iter().flat_map(|head| [2 * head, 2 * head + 1]).collect();
            let q = q.select(Axis(1), &own);
            let alone = dense.reference(Cached::new(q.view(), part)).unwrap();
            let got = want.select(Axis(1), &own);
            assert!(got.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-12), "{heads:?}, {q_len}");
            let (_, of_part) = dense.forward_with_lse(Cached::new(q.view(), part)).unwrap();
            let lse = lse.select(Axis(1), &own);
            assert!(lse.iter().zip(&of_part).all(|(a, b)| a == b || (a - b).abs() < 1e-4), "{heads:?}");
        }
        // Nothing is seen of what a head lacks.
        assert!(weights.slice(s![0, 0, .., ..55]).iter().all(|&x| x == 0.0));
        let (flops, whole) =
            (dense.cost(x).unwrap(), dense.cost(Cached::new(q.view(), &by_head_of_all())).unwrap());
        assert!(flops.flops < whole.flops && flops.bytes < whole.bytes);
    }
}

/// As many tokens, of which every head holds each.
fn by_head_of_all() -> ByHead {
    let cache = Contiguous::<f32>::new(of(5), 2, 300).unwrap();
    let mut cache = ByHead::builder().heads(&[4, 3, 2, 1, 0], cache).build().unwrap();
    for (sequence, n) in [(0, 75), (1, 10)] {
        let [k, v] = tokens(1, n, 1);
        cache.append_each(&[sequence], k.view(), v.view()).unwrap();
    }
    cache
}

/// One token at a time or many at once, from arrays of any type: the same rows.
#[test]
fn rows_are_those_of_the_caches() {
    let ([k, v], mut once, mut each) = (tokens(1, 70, 11), by_head(1), by_head(1));
    once.append_each(&[0], k.view(), v.view()).unwrap();
    for t in 0..70 {
        let [k, v] = [&k, &v].map(|x| x.slice(s![.., .., t..t + 1, ..]));
        each.append_each(&[0], k, v).unwrap();
    }
    for (head, keys) in (0..5).flat_map(|head| [0..70, 3..41, 49..53, 60..70].map(|keys| (head, keys))) {
        let missing = 70 - once.held(0, head).unwrap();
        let got = read(&once, Isa::Scalar, 0, head, keys.clone());
        assert_eq!(got, read(&each, Isa::Scalar, 0, head, keys.clone()));
        for (side, x) in [&k, &v].into_iter().enumerate() {
            let cols = x.dim().3;
            for (i, row) in got[side].chunks(cols).enumerate() {
                let token = keys.start + i;
                // Of the rings' tokens the first three are sinks.
                let from =
                    if token < missing + 3 && missing > 0 { token - missing.min(token) } else { token };
                let stored = x
                    .slice(s![0, head, from, ..])
                    .mapv(|x| if head % 3 == 0 { f16::from_f32(x).to_f32() } else { x });
                let want = if token < missing { vec![0.0; cols] } else { stored.to_vec() };
                assert_eq!(row, want, "head {head}, token {token}");
            }
        }
    }
    let half = k.mapv(f16::from_f32);
    let mut of_half = by_head(1);
    of_half.append_each(&[0], half.view(), v.mapv(f16::from_f32).view()).unwrap();
    assert_eq!(read(&of_half, Isa::Scalar, 0, 3, 50..70)[0], read(&once, Isa::Scalar, 0, 3, 50..70)[0]);
}

/// Heads that drop tokens may leave their mean, and a group may itself be of groups.
#[test]
fn means_and_groups_of_groups() {
    let ring = || Ring::<f32>::new(of(2), 1, 2, 10).unwrap().compensated().unwrap();
    let all = |heads| Contiguous::<f32>::new(of(heads), 1, 64).unwrap();
    let inner = ByHead::builder().heads(&[1], all(1)).heads(&[0, 2], ring()).build().unwrap();
    let mut cache = ByHead::builder().heads(&[4, 0, 3], inner).heads(&[1, 2], all(2)).build().unwrap();
    let mut alone = ring();
    let [k, v] = tokens(1, 50, 21);
    cache.append_each(&[0], k.view(), v.view()).unwrap();
    let [own_k, own_v] = [&k, &v].map(|x| x.select(Axis(1), &[4, 3]));
    alone.append_each(&[0], own_k.view(), own_v.view()).unwrap();
    assert_eq!([0, 1, 3, 4].map(|head| cache.held(0, head).unwrap()), [50, 50, 12, 12]);
    let (q, dense) = (array([1, 5, 3, 20], 23), Dense::builder().build().unwrap());
    let x = Cached::new(q.view(), &cache);
    let want = dense.reference(x).unwrap();
    within("means", dense.forward(x).unwrap().view(), &want, &dense.error_bound(x).unwrap());
    let q = q.select(Axis(1), &[4, 3]);
    let of_ring = dense.reference(Cached::new(q.view(), &alone)).unwrap();
    let got = want.select(Axis(1), &[4, 3]);
    assert!(got.iter().zip(&of_ring).all(|(a, b)| (a - b).abs() < 1e-12));
}

#[test]
fn forks_go_their_own_way_and_tokens_are_forgotten() {
    let mut cache = by_head(3);
    let [k, v] = tokens(1, 12, 31);
    cache.append_each(&[0], k.view(), v.view()).unwrap();
    cache.fork(0, 2).unwrap();
    cache.truncate(0, 5).unwrap();
    assert_eq!((cache.lengths(), cache.held(2, 0).unwrap()), (&[5, 0, 12][..], 12));
    let [k, v] = tokens(1, 30, 33);
    cache.append_each(&[2], k.view(), v.view()).unwrap();
    let refusal = cache.truncate(2, 20).unwrap_err().to_string();
    assert_eq!(refusal, "len: expected 0 or 42: some heads have forgotten tokens of the sequence, got 20");
    cache.truncate(2, 0).unwrap();
    assert_eq!((cache.lengths(), cache.held(2, 0).unwrap()), (&[5, 0, 0][..], 0));
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let mut cache = by_head(2);
    let [k, v] = tokens(2, 78, 41);
    cache.append_each(&[0, 1], k.view(), v.view()).unwrap();
    let before: Vec<_> = (0..5).map(|head| read(&cache, Isa::Scalar, 1, head, 0..78)).collect();
    // One head has pages for 160 tokens of both.
    let refusal = cache.append_each(&[1, 0], k.view(), v.view()).unwrap_err().to_string();
    assert!(refusal.starts_with("k: expected tokens for which the 0 free pages"), "{refusal}");
    assert_eq!(
        cache.check_room(&[1], 3).unwrap_err().to_string(),
        cache.append(1, k.slice(s![0, .., ..3, ..]), v.slice(s![0, .., ..3, ..])).unwrap_err().to_string()
    );
    cache.check_room(&[0, 1], 2).unwrap();
    let after: Vec<_> = (0..5).map(|head| read(&cache, Isa::Scalar, 1, head, 0..78)).collect();
    assert!(before == after && cache.lengths() == [78, 78]);
    let few = cache.append(0, Array3::<f32>::zeros((4, 1, 20)).view(), Array3::zeros((4, 1, 9)).view());
    assert!(few.unwrap_err().to_string().starts_with("k: expected shape [sequences, kv_heads, tokens, dim]"));
    assert_eq!(
        cache.held(0, 5).unwrap_err().to_string(),
        "head: expected one of the 5 heads of the cache, got 5"
    );

    let all = |heads, sequences| Contiguous::<f32>::new(of(heads), sequences, 8).unwrap();
    let refused = |builder: ByHeadBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(refused(ByHead::builder().heads(&[], all(0, 1))), "heads: expected at least one head, got 0");
    let twice = ByHead::builder().heads(&[0, 1], all(2, 1)).heads(&[1], all(1, 1));
    assert_eq!(refused(twice), "heads: expected each head below 3 once, got 1");
    let gap = ByHead::builder().heads(&[0, 2], all(2, 1));
    assert_eq!(refused(gap), "heads: expected each head below 2 once, got 2");
    let other = ByHead::builder().heads(&[0], all(1, 1)).heads(&[1], all(1, 2));
    assert!(refused(other).starts_with("cache: expected an empty cache of 1 sequences"));
    let mut filled = all(1, 1);
    filled.append(0, Array3::<f32>::zeros((1, 1, 20)).view(), Array3::zeros((1, 1, 9)).view()).unwrap();
    assert!(refused(ByHead::builder().heads(&[0], filled)).starts_with("cache: expected an empty cache"));

    // What chooses among tokens needs the same ones for all heads.
    let q = array([2, 5, 1, 20], 43);
    let x = Cached::new(q.view(), &cache);
    let refusal = TopK::builder(4).build().unwrap().forward(x).unwrap_err().to_string();
    assert!(
        refusal.starts_with("a cache of caches cannot be combined with a selection of keys"),
        "{refusal}"
    );
}
