use ndarray::Array4;

use super::*;
use crate::attention::{Attention, Selects, Weights};
use crate::cache::{Append, Cache, Cached, Contiguous, Int8, KvShape, Paged, Pages};
use crate::dense::Dense;
use crate::mask::{Causal, Mask, mask_fn};
use crate::sparse::testing::{self, Arrays};

fn landmark(block: usize, k: Option<usize>) -> Landmark {
    let builder = Landmark::builder(block);
    k.map_or(builder.clone(), |k| builder.k(k)).build().unwrap()
}

/// The grouped softmax, as the paper has it.
#[test]
fn weights_are_those_of_two_softmaxes_and_sum_to_one() {
    for (block, n) in [(5, 60), (1, 20), (50, 130), (100, 40)] {
        let x = Arrays::normal([1, 2, 1, n, n, 16, 8], n as u64);
        let weights = landmark(block, None).weights(x.qkv()).unwrap();
        let is_landmark = |j: usize| j % (block + 1) == block;
        for (h, t) in (0..2).flat_map(|h| (0..n).map(move |t| (h, t))) {
            let score = |j: usize| {
                (0..16).map(|c| f64::from(x.q[[0, h, t, c]]) * f64::from(x.k[[0, 0, j, c]])).sum::<f64>()
                    / 4.0
            };
            let own = t / (block + 1);
            let outer =
                (0..=t).filter(|&j| if j / (block + 1) == own { !is_landmark(j) } else { is_landmark(j) });
            let total: f64 = outer.map(|j| score(j).exp()).sum();
            let mut sum = 0.0;
            for j in 0..n {
                let b = j / (block + 1);
                let inner =
                    || (b * (block + 1)..b * (block + 1) + block).map(|l| score(l).exp()).sum::<f64>();
                let want = if j > t || is_landmark(j) {
                    0.0
                } else if b == own {
                    score(j).exp() / total
                } else {
                    score(b * (block + 1) + block).exp() / total * score(j).exp() / inner()
                };
                let got = f64::from(weights[[0, h, t, j]]);
                assert!((got - want).abs() < 1e-5, "{block}: {t}, {j}: {got}, {want}");
                sum += want;
            }
            assert!((sum - 1.0).abs() < 1e-9);
        }
    }
}

/// Where a landmark scores as all of its block together, blocks are no
/// matter: here its key is that of the block's only token.
#[test]
fn landmarks_of_single_tokens_that_score_alike_are_dense() {
    let mut x = Arrays::normal([2, 4, 2, 90, 90, 16, 8], 3);
    for j in (1..90).step_by(2) {
        let before = x.k.slice(s![.., .., j - 1, ..]).to_owned();
        x.k.slice_mut(s![.., .., j, ..]).assign(&before);
    }
    let tokens = mask_fn(|_, _, j| j % 2 == 0).and(Causal::new());
    let want = Dense::builder().mask(tokens).build().unwrap().forward(x.qkv()).unwrap();
    testing::near("blocks of 1", &landmark(1, None).forward(x.qkv()).unwrap(), &want);
}

#[test]
fn all_blocks_are_the_train_form_and_later_tokens_change_nothing() {
    let x = Arrays::integers([2, 4, 2, 130, 150, 24, 12], 4);
    let [train, all] = [None, Some(100)].map(|k| landmark(9, k).forward(x.qkv()).unwrap());
    testing::near("all blocks", &all, &train);
    let few = landmark(9, Some(2));
    assert_eq!(few.select(x.qkv()).unwrap(), few.reference_select(x.qkv()).unwrap().0);
    let mut y = Arrays { q: x.q.clone(), k: x.k.clone(), v: x.v.clone() };
    y.k.slice_mut(s![.., .., 101.., ..]).fill(f32::NAN);
    y.v.slice_mut(s![.., .., 101.., ..]).fill(f32::NAN);
    let first = |x: &Array4<f32>| x.slice(s![.., .., ..81, ..]).to_owned();
    for k in [None, Some(2)] {
        let (before, after) =
            (landmark(9, k).forward(x.qkv()).unwrap(), landmark(9, k).forward(y.qkv()).unwrap());
        testing::near("before", &first(&after), &first(&before));
    }
    // A step is the last row.
    let step = Qkv::new(x.q.slice(s![.., .., 129.., ..]), x.k.view(), x.v.view());
    let want = few.forward(x.qkv()).unwrap().slice(s![.., .., 129.., ..]).to_owned();
    testing::near("step", &few.forward(step).unwrap(), &want);
}

/// A cache gives what the arrays of each of its sequences give alone, in prefill and
/// in steps; on 8 bits it is its definition. Blocks longer than a sequence are its own.
#[test]
fn caches_are_arrays() {
    let shape = KvShape { kv_heads: 2, head_dim: 24, value_dim: 12 };
    let lengths = [70, 3, 0, 200];
    let x = Arrays::integers([4, 4, 2, 200, 200, 24, 12], 7);
    let mut flat = Contiguous::<f32>::new(shape, 4, 256).unwrap();
    let mut paged = Paged::<f32>::new(shape, 4, Pages { count: 40, len: 16 }).unwrap();
    let mut int8 = Paged::<Int8>::new(shape, 4, Pages { count: 40, len: 16 }).unwrap();
    for (b, &n) in lengths.iter().enumerate() {
        let (k, v) = (x.k.slice(s![b, .., ..n, ..]), x.v.slice(s![b, .., ..n, ..]));
        flat.append(b, k, v).unwrap();
        paged.append(b, k, v).unwrap();
        int8.append(b, k, v).unwrap();
    }
    let caches: [&dyn Cache; 3] = [&flat, &paged, &int8];
    for (m, queries) in [(9, None), (9, Some(2)), (1, Some(5)), (100, Some(1)), (300, Some(1))]
        .into_iter()
        .flat_map(|(block, k)| [1, 3, 130].map(|queries| (landmark(block, k), queries)))
    {
        let last = |b: usize| {
            let from = lengths[b].min(queries);
            let q = x.q.slice(s![b..b + 1, .., lengths[b] - from..lengths[b], ..]);
            let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![b..b + 1, .., ..lengths[b], ..]));
            (q, m.forward(Qkv::new(q, k, v)).unwrap())
        };
        // The queries of each sequence, and of the shorter ones some that sit nowhere.
        let mut q = Array4::zeros((4, 4, queries, 24));
        for b in 0..4 {
            let (of, _) = last(b);
            q.slice_mut(s![b..b + 1, .., queries - of.dim().2.., ..]).assign(&of);
        }
        for (i, cache) in caches.into_iter().enumerate() {
            let cached = Cached::new(q.view(), cache);
            let index = m.select(cached).unwrap();
            let (want, margins) = m.reference_select(cached).unwrap();
            let off = <Landmark as Selects<Cached<'_, f32, dyn Cache>>>::difference(&index, &want, &margins);
            assert_eq!(off, None);
            let out = m.forward(cached).unwrap();
            let want = m.reference_on(cached, &index).unwrap().mapv(|x| x as f32);
            testing::near("definition", &out, &want);
            for b in (0..4).filter(|_| i < 2) {
                let (of, want) = last(b);
                let rows = s![b..b + 1, .., queries - of.dim().2.., ..];
                testing::near("arrays", &out.slice(rows).to_owned(), &want);
            }
        }
        // Some of the sequences, in another order, packed.
        let packed = ndarray::concatenate(ndarray::Axis(2), &[last(3).0, last(0).0]).unwrap();
        let ends = [0, queries, queries + queries.min(70)];
        let cached = Cached::new(packed.view(), &paged).sequences(&[3, 0]).packed(&ends);
        let out = m.forward(cached).unwrap();
        testing::near("packed", &out.slice(s![.., .., ..queries, ..]).to_owned(), &last(3).1);
        testing::near("packed", &out.slice(s![.., .., queries.., ..]).to_owned(), &last(0).1);
        let want = m.reference(cached).unwrap().mapv(|x| x as f32);
        testing::near("packed by definition", &out, &want);
    }
}

#[test]
fn refusals() {
    let refusal = |builder: LandmarkBuilder| builder.build().unwrap_err().to_string();
    assert!(refusal(Landmark::builder(0)).starts_with("block: "));
    assert_eq!(refusal(Landmark::builder(4).k(0)), "k: expected at least 1 block, got 0");
    let x = Arrays::normal([1, 1, 1, 10, 10, 4, 4], 1);
    assert!(landmark(4, None).forward(x.qkv().key_lengths(&[7])).is_err());
}
