//! Attention over caches: the definition, the same over arrays, and what
//! quantisation costs.

mod common;

use attention_kernels::cache::{
    Append, Cache, Cached, Contiguous, Format, Int8, KvShape, Latent, Paged, Pages,
};
use attention_kernels::dense::Dense;
use attention_kernels::mask::{Causal, Tree, Trees, Window};
use attention_kernels::simd::Isa;
use attention_kernels::{Attention, Bounded, Element, Mergeable, Qkv, Workspace};
use common::Random;
use half::{bf16, f16};
use ndarray::{Array4, ArrayView4, Axis, concatenate, s};

const SHAPE: KvShape = KvShape { kv_heads: 2, head_dim: 40, value_dim: 24 };

/// Lengths of the sequences of a cache: none, less than a page or a block,
/// more than a chunk of the decode engine.
const LENGTHS: [usize; 5] = [130, 0, 7, 1100, 64];

/// Tokens of every sequence, `[1, kv_heads, len, dim]`.
fn tokens(shape: KvShape) -> Vec<[Array4<f32>; 2]> {
    let mut random = Random::new(5);
    let of = |random: &mut Random, len, dim| random.array((1, shape.kv_heads, len, dim));
    LENGTHS
        .iter()
        .map(|&len| [of(&mut random, len, shape.head_dim), of(&mut random, len, shape.value_dim)])
        .collect()
}

/// Fills a cache a little of each sequence at a time, so that its pages lie in
/// disorder.
fn fill<C: Append>(mut cache: C, tokens: &[[Array4<f32>; 2]]) -> C {
    for step in 0..LENGTHS.iter().max().unwrap().div_ceil(13) {
        for (sequence, kv) in tokens.iter().enumerate() {
            let len = kv[0].dim().2;
            let range = (step * 13).min(len)..(step * 13 + 13).min(len);
            let [k, v] = kv.each_ref().map(|x| x.slice(s![0, .., range.clone(), ..]));
            cache.append(sequence, k, v).unwrap();
        }
    }
    cache
}

fn contiguous<F: Format>(tokens: &[[Array4<f32>; 2]]) -> Contiguous<F> {
    fill(Contiguous::new(SHAPE, LENGTHS.len(), 1200).unwrap(), tokens)
}

fn paged<F: Format>(len: usize, tokens: &[[Array4<f32>; 2]]) -> Paged<F> {
    let count = LENGTHS.iter().map(|n| n.div_ceil(len)).sum();
    fill(Paged::new(SHAPE, LENGTHS.len(), Pages { count, len }).unwrap(), tokens)
}

/// Holds a call to its definition, output and LSE, on every instruction set.
fn judge<C: Cache + ?Sized, Q: Element>(x: Cached<'_, Q, C, f32>) {
    for isa in Isa::available() {
        let dense = Dense::builder().causal().isa(isa).build().unwrap();
        let (out, lse) = dense.forward_with_lse(x).unwrap();
        let (reference, bound) = (dense.reference(x).unwrap(), dense.error_bound(x).unwrap());
        for (at, want) in reference.indexed_iter() {
            let (got, bound) = (f64::from(out[at]), bound[[at.0, at.1, at.2]]);
            assert!((got - want).abs() <= bound, "{isa} {at:?}: {got} for {want}, bound {bound:e}");
        }
        for (out, lse) in out.lanes(Axis(3)).into_iter().zip(&lse) {
            assert!(lse.is_finite() || (*lse == f32::NEG_INFINITY && out.iter().all(|&x| x == 0.0)));
        }
    }
}

#[test]
fn every_cache_and_format_is_held_to_the_definition() {
    let tokens = tokens(SHAPE);
    for q_len in [1, 3, 30] {
        let q = Random::new(6).array::<f32>((LENGTHS.len(), 6, q_len, SHAPE.head_dim));
        let caches: [Box<dyn Cache>; 7] = [
            Box::new(contiguous::<f32>(&tokens)),
            Box::new(contiguous::<f16>(&tokens)),
            Box::new(contiguous::<Int8>(&tokens)),
            Box::new(paged::<f32>(1, &tokens)),
            Box::new(paged::<bf16>(16, &tokens)),
            Box::new(paged::<Int8>(24, &tokens)),
            Box::new(paged::<f16>(64, &tokens)),
        ];
        for cache in &caches {
            judge(Cached::new(q.view(), &**cache));
        }
        let half = q.mapv(f16::from_f32);
        judge(Cached::new(half.view(), &*caches[2]).widened());
    }
}

/// The keys and values of some sequences as padded arrays and their lengths.
fn padded(tokens: &[[Array4<f32>; 2]], sequences: &[usize]) -> ([Array4<f32>; 2], Vec<usize>) {
    let lengths: Vec<usize> = sequences.iter().map(|&i| LENGTHS[i]).collect();
    let longest = lengths.iter().copied().max().unwrap();
    let pad = |side: usize| {
        let dim = tokens[0][side].dim().3;
        let mut all = Array4::from_elem((sequences.len(), SHAPE.kv_heads, longest, dim), f32::NAN);
        for (b, &i) in sequences.iter().enumerate() {
            all.slice_mut(s![b..b + 1, .., ..LENGTHS[i], ..]).assign(&tokens[i][side]);
        }
        all
    };
    ([pad(0), pad(1)], lengths)
}

#[test]
fn caches_give_the_bits_of_arrays() {
    let tokens = tokens(SHAPE);
    let sequences = [3, 0, 1, 3];
    let ([k, v], lengths) = padded(&tokens, &sequences);
    for q_len in [1, 5, 70] {
        let q = Random::new(7).array::<f32>((4, 4, q_len, SHAPE.head_dim));
        let dense = Dense::builder().mask(Window::new(Some(90), Some(0))).build().unwrap();
        let want = dense.forward(Qkv::new(q.view(), k.view(), v.view()).key_lengths(&lengths)).unwrap();
        let caches: [Box<dyn Cache>; 3] = [
            Box::new(contiguous::<f32>(&tokens)),
            Box::new(paged::<f32>(16, &tokens)),
            Box::new(paged::<f32>(5, &tokens)),
        ];
        for cache in &caches {
            let got = dense.forward(Cached::new(q.view(), &**cache).sequences(&sequences)).unwrap();
            assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "q_len {q_len}");
        }
    }
}

#[test]
fn packed_queries_give_the_bits_of_one_call_each() {
    let tokens = tokens(SHAPE);
    let cache = paged::<bf16>(16, &tokens);
    let (sequences, offsets) = ([2, 3, 1, 0, 4], [0, 5, 6, 6, 46, 47]);
    let q = Random::new(8).array::<f32>((1, 4, 47, SHAPE.head_dim));
    let dense = Dense::builder().causal().build().unwrap();
    let x = Cached::new(q.view(), &cache).sequences(&sequences).packed(&offsets);
    judge(x);
    let all = dense.forward(x).unwrap();
    // Rows after the last offset belong to none: they are written all the same.
    let longer = concatenate![Axis(2), q, q.slice(s![.., .., ..3, ..])];
    let x = Cached::new(longer.view(), &cache).sequences(&sequences).packed(&offsets);
    let mut out = Array4::from_elem((1, 4, 50, SHAPE.value_dim), f32::NAN);
    dense.forward_into(x, out.view_mut(), &mut Workspace::new()).unwrap();
    assert_eq!(out.slice(s![.., .., ..47, ..]), all);
    assert!(out.slice(s![.., .., 47.., ..]).iter().all(|&x| x == 0.0));
    let (_, lse) = dense.forward_with_lse(x).unwrap();
    assert!(lse.slice(s![.., .., 47..]).iter().all(|&x| x == f32::NEG_INFINITY));
    for (i, &sequence) in sequences.iter().enumerate() {
        let part = s![.., .., offsets[i]..offsets[i + 1], ..];
        let q = q.slice(part);
        let one = dense.forward(Cached::new(q, &cache).sequences(&[sequence])).unwrap();
        assert_eq!(one, all.slice(part), "sequence {sequence}");
    }
}

/// Drafts of several requests are verified in one call.
#[test]
fn trees_of_requests_give_the_bits_of_one_call_each() {
    let cache = paged::<f16>(16, &tokens(SHAPE));
    let sequences = [2, 3, 1, 0];
    let bushy =
        (0..40usize).map(|i| i.checked_sub(1).map(|i| i * 5 % 7).filter(|&parent| parent < i)).collect();
    let trees = [vec![None, Some(0), Some(0)], vec![None, None, Some(1), Some(1), Some(3)], vec![], bushy]
        .map(|parents: Vec<_>| Tree::new(&parents).unwrap());
    let mut offsets = vec![0];
    trees.iter().for_each(|tree| offsets.push(offsets.last().unwrap() + tree.len()));
    let q = Random::new(8).array::<f32>((1, 4, 48, SHAPE.head_dim));
    let dense = Dense::builder().mask(Trees::new(trees.to_vec())).build().unwrap();
    let x = Cached::new(q.view(), &cache).sequences(&sequences).packed(&offsets);
    let (all, exact, bound) =
        (dense.forward(x).unwrap(), dense.reference(x).unwrap(), dense.error_bound(x).unwrap());
    for (at, want) in exact.indexed_iter() {
        assert!((f64::from(all[at]) - want).abs() <= bound[[at.0, at.1, at.2]], "{at:?}");
    }
    for (i, (tree, sequence)) in trees.into_iter().zip(sequences).enumerate() {
        let part = s![.., .., offsets[i]..offsets[i + 1], ..];
        let one = Dense::builder().mask(tree).build().unwrap();
        let one = one.forward(Cached::new(q.slice(part), &cache).sequences(&[sequence])).unwrap();
        assert_eq!(one, all.slice(part), "sequence {sequence}");
    }
    // A node less for the first request, one more for the second.
    let text = dense.forward(x.packed(&[0, 2, 8, 8, 48])).unwrap_err().to_string();
    assert_eq!(text, "trees: expected one node for each of the 2 queries of sequence 0, got 3 nodes");
}

#[test]
fn a_prompt_in_chunks_is_the_prompt() {
    let tokens = tokens(SHAPE);
    let [k, v] = &tokens[0];
    let q = Random::new(9).array::<f32>((1, 2, 130, SHAPE.head_dim));
    let dense = Dense::builder().causal().build().unwrap();
    let want = dense.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
    let mut cache = Paged::<f32>::new(SHAPE, 1, Pages { count: 9, len: 16 }).unwrap();
    let mut parts = Vec::new();
    for (start, end) in [(0, 1), (1, 50), (50, 51), (51, 130)] {
        let [k, v] = [k, v].map(|x| x.slice(s![.., .., start..end, ..]));
        cache.append_each(&[0], k, v).unwrap();
        let q = q.slice(s![.., .., start..end, ..]);
        let last = dense.forward(Cached::new(q, &cache)).unwrap();
        // The same where the position is said.
        let at = Dense::builder().mask(Causal::at(start as isize)).build().unwrap();
        assert_eq!(at.forward(Cached::new(q, &cache)).unwrap(), last);
        parts.push(last);
    }
    let parts: Vec<ArrayView4<'_, f32>> = parts.iter().map(|x| x.view()).collect();
    let got = concatenate(Axis(2), &parts).unwrap();
    assert!(got.iter().zip(&want).all(|(got, want)| (f64::from(*got) - want).abs() < 1e-5));
}

#[test]
fn forks_go_their_own_way() {
    let tokens = tokens(SHAPE);
    let mut cache = paged::<f32>(16, &tokens);
    cache.truncate(3, 0).unwrap();
    cache.fork(0, 1).unwrap();
    let q = Random::new(10).array::<f32>((1, 2, 1, SHAPE.head_dim));
    let dense = Dense::builder().build().unwrap();
    let ask =
        |cache: &Paged, sequence| dense.forward(Cached::new(q.view(), cache).sequences(&[sequence])).unwrap();
    let before = ask(&cache, 0);
    assert_eq!(ask(&cache, 1), before);
    let [k, v] = tokens[2].each_ref().map(|x| x.index_axis(Axis(0), 0));
    cache.append(1, k, v).unwrap();
    assert_eq!(ask(&cache, 0), before);
    assert_ne!(ask(&cache, 1), before);
}

/// Documents what int8 costs on normal keys and values: 8 bits of the largest
/// of 64 numbers.
#[test]
fn int8_is_off_the_original_arrays_by_less_than_two_percent() {
    let shape = KvShape { kv_heads: 2, head_dim: 64, value_dim: 64 };
    let mut random = Random::new(11);
    let (k, v) = (random.array::<f32>((1, 2, 512, 64)), random.array::<f32>((1, 2, 512, 64)));
    let q = random.array::<f32>((1, 4, 32, 64)) * 2.0; // sharp enough that few keys count
    let mut cache = Contiguous::<Int8>::new(shape, 1, 512).unwrap();
    cache.append_each(&[0], k.view(), v.view()).unwrap();
    let dense = Dense::builder().causal().build().unwrap();
    let want = dense.reference(Qkv::new(q.view(), k.view(), v.view())).unwrap();
    let got = dense.forward(Cached::new(q.view(), &cache)).unwrap();
    let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt();
    let off = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt() / norm;
    assert!(off < 0.02, "{off}");
    assert!(off > 1e-4, "{off}: not quantised?");
    assert_eq!(cache.token_bytes() * 512, 512 * 2 * (64 + 4 + 64 + 4));
}

#[test]
fn masked_tokens_cannot_matter_and_visible_ones_show() {
    let mut tokens = tokens(SHAPE);
    tokens[0][1][[0, 0, 129, 3]] = f32::NAN;
    tokens[0][0][[0, 0, 128, 5]] = f32::NAN;
    let q = Random::new(12).array::<f32>((1, 2, 130, SHAPE.head_dim));
    let caches: [Box<dyn Cache>; 3] = [
        Box::new(contiguous::<Int8>(&tokens)),
        Box::new(paged::<f16>(16, &tokens)),
        Box::new(paged::<Int8>(7, &tokens)),
    ];
    for cache in &caches {
        for rows in [100..128, 125..128, 0..130] {
            let q = q.slice(s![.., .., rows.clone(), ..]);
            let at = Dense::builder().mask(Causal::at(rows.start as isize)).build().unwrap();
            let out = at.forward(Cached::new(q, &**cache).sequences(&[0])).unwrap();
            for (i, row) in rows.enumerate() {
                let hidden = out.slice(s![0, 0, i, ..]).iter().all(|x| x.is_finite());
                assert_eq!(hidden, row < 128, "row {row}");
                assert!(out.slice(s![0, 1, i, ..]).iter().all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let tokens = tokens(SHAPE);
    let cache = paged::<f32>(16, &tokens);
    let dense = Dense::builder().build().unwrap();
    let q = Array4::<f32>::zeros((5, 4, 2, 40));
    let refused = |x: Cached<'_, f32, Paged>| {
        let message = dense.forward(x).unwrap_err().to_string();
        assert_eq!(dense.reference(x).unwrap_err().to_string(), message);
        assert_eq!(dense.workspace_bytes(x).unwrap_err().to_string(), message);
        assert_eq!(dense.cost(x).unwrap_err().to_string(), message);
        message
    };
    assert_eq!(
        refused(Cached::new(q.view(), &cache).sequences(&[0, 1])),
        "q: expected shape [sequences, q_heads, q_len, head_dim] = [2, _, _, 40] as the cache has it, \
         got [5, 4, 2, 40]"
    );
    assert_eq!(
        refused(Cached::new(q.view(), &cache).sequences(&[0, 1, 2, 3, 5])),
        "sequences: expected one of the 5 sequences of the cache, got 5"
    );
    assert!(refused(Cached::new(q.slice(s![.., .., .., ..39]), &cache)).starts_with("q: expected shape"));
    assert!(
        refused(Cached::new(q.view(), &cache).packed(&[0, 2])).contains("[1, q_heads, total_q, head_dim]")
    );
    let one = q.slice(s![..1, .., .., ..]);
    assert!(
        refused(Cached::new(one, &cache).packed(&[0, 2])).starts_with("offsets: expected one offset more")
    );
    assert!(refused(Cached::new(one, &cache).sequences(&[0]).packed(&[0, 41])).starts_with("offsets: "));
    assert!(refused(Cached::new(one, &cache).sequences(&[]).packed(&[])).starts_with("offsets: "));
    assert!(
        refused(Cached::new(q.slice(s![.., ..3, .., ..]), &cache))
            .starts_with("q: expected a number of heads")
    );
    let latent = Latent::contiguous::<f32>(32, 8, 5, 4).unwrap();
    assert!(dense.forward(Cached::new(q.view(), &latent)).is_ok());
    // The output is checked before anything is written.
    let mut out = Array4::from_elem((5, 4, 1, 24), 7.0);
    let x = Cached::new(q.view(), &cache);
    assert!(dense.forward_into(x, out.view_mut(), &mut Workspace::new()).is_err());
    assert!(out.iter().all(|&x| x == 7.0));
}
