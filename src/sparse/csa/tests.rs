use super::*;
use crate::attention::{Attention, Selects};
use crate::cache::Cached;
use crate::sparse::Hca;
use crate::sparse::testing::{Arrays, compressed_is_its_definition, latents, near};

/// Rows of the keys as pools, and as those of the index.
fn input(x: &Arrays) -> Indexed<'_, Compressed<'_, f32>, f32> {
    let compressed = Compressed::new(x.q.view(), x.k.index_axis(Axis(1), 0), x.k.view());
    Indexed::new(compressed, IndexBranch::new(x.q.view(), x.k.view()))
}

#[test]
fn kernels_are_the_definition() {
    for (sizes, stride) in [
        ([2, 4, 1, 70, 150, 24, 24], 4),
        ([1, 20, 1, 1, 600, 16, 16], 4),
        ([1, 20, 1, 10, 90, 16, 16], 4),
        ([2, 3, 1, 9, 9, 8, 8], 2),
    ] {
        let x = Arrays::integers(sizes, 1);
        let weights =
            Array3::from_shape_fn((sizes[0], sizes[1], sizes[3]), |(_, h, i)| ((h + i) % 5) as f32 - 1.0);
        let branch = input(&x).branch.weighted(weights.view());
        let x = Indexed::new(input(&x).x, branch);
        for isa in crate::Isa::available() {
            let builder = Csa::builder(7).stride(stride).window(11).sinks(vec![0.5; sizes[1]]).isa(isa);
            let csa = builder.rope(Rope::builder(6).theta(50.0).last().build().unwrap()).build().unwrap();
            let index = csa.select(x).unwrap();
            assert_eq!(index, csa.reference_select(x).unwrap().0, "{sizes:?}");
            assert_eq!(csa.forward_on(x, &index).unwrap(), csa.forward(x).unwrap());
            compressed_is_its_definition(&csa, x, csa.bound_on(x, &index).unwrap());
        }
    }
}

/// With a budget of all pools it is HCA with pools of as many tokens.
#[test]
fn all_pools_are_hca() {
    let x = Arrays::normal([2, 4, 1, 40, 100, 16, 16], 2);
    let csa = Csa::builder(100).window(20).build().unwrap();
    let hca = Hca::builder().stride(4).window(20).build().unwrap();
    near("all", &csa.forward(input(&x)).unwrap(), &hca.forward(input(&x).x).unwrap());
}

/// Pools count from when their last token is seen, one list serves all heads.
#[test]
fn later_tokens_change_nothing() {
    let mut x = Arrays::normal([1, 4, 1, 100, 100, 16, 16], 3);
    let csa = Csa::builder(5).window(9).build().unwrap();
    let before = csa.forward(input(&x)).unwrap();
    let index = csa.select(input(&x)).unwrap();
    assert_eq!(index.keys(0, 3, 99), 5 + 9);
    assert_eq!(index.keys(0, 3, 2), 3);
    // Rows of pools are those of keys, of which the 15th pool ends with 59.
    x.k.slice_mut(s![.., .., 60.., ..]).fill(f32::NAN);
    let after = csa.forward(input(&x)).unwrap();
    near(
        "before",
        &after.slice(s![.., .., ..60, ..]).to_owned(),
        &before.slice(s![.., .., ..60, ..]).to_owned(),
    );
    let one = x.q.slice(s![.., .., 50..51, ..]);
    let step =
        Compressed::new(one, x.k.slice(s![0..1, 0, 42..51, ..]), x.k.slice(s![.., .., ..12, ..])).tokens(51);
    let step =
        csa.forward(Indexed::new(step, IndexBranch::new(one, x.k.slice(s![.., .., ..12, ..])))).unwrap();
    near("step", &step, &before.slice(s![.., .., 50..51, ..]).to_owned());
}

/// Over latent caches that hold the rows, of sequences of any lengths, in prefill and in
/// decoding, with index keys in an array or a cache.
#[test]
fn caches_are_arrays() {
    let csa = Csa::builder(7).window(11).sinks(vec![0.5; 4]).build().unwrap();
    for (q_len, lengths) in [(70, [150, 90]), (1, [150, 33]), (9, [4, 150])] {
        let x = Arrays::integers([2, 4, 1, q_len, 150, 16, 16], 6);
        let pools = Arrays::integers([2, 1, 1, 1, 37, 16, 16], 7).k;
        let (cache, keys) = (latents::<f32>(&x.k, &lengths), latents::<f32>(&pools, &lengths.map(|n| n / 4)));
        let cached = CompressedCache::new(Cached::new(x.q.view(), &cache), pools.view());
        let branches = [IndexBranch::new(x.q.view(), pools.view()), IndexBranch::cached(x.q.view(), &keys)];
        for branch in branches {
            let cached = Indexed::new(cached, branch);
            let index = csa.select(cached).unwrap();
            assert_eq!(index, csa.reference_select(cached).unwrap().0, "{q_len}");
            compressed_is_its_definition(&csa, cached, csa.bound_on(cached, &index).unwrap());
            let out = csa.forward(cached).unwrap();
            for (b, &n) in lengths.iter().enumerate() {
                let (q, kv) = (x.q.slice(s![b..b + 1, .., .., ..]), x.k.slice(s![b..b + 1, 0, ..n, ..]));
                let pools = pools.slice(s![b..b + 1, .., .., ..]);
                let alone = Indexed::new(Compressed::new(q, kv, pools), IndexBranch::new(q, pools));
                let want = csa.forward(alone).unwrap();
                near("cache", &out.slice(s![b..b + 1, .., .., ..]).to_owned(), &want);
            }
        }
        // Both sequences packed, in the other order.
        let q = ndarray::concatenate![
            Axis(2),
            x.q.slice(s![1..2, .., q_len - 1.., ..]),
            x.q.slice(s![0..1, .., .., ..])
        ];
        let (offsets, turned) = ([0, 1, 1 + q_len], pools.select(Axis(0), &[1, 0]));
        let packed = Cached::new(q.view(), &cache).sequences(&[1, 0]).packed(&offsets);
        let packed = CompressedCache::new(packed, turned.view());
        let want = csa.forward(Indexed::new(cached, branches[0])).unwrap();
        for branch in [IndexBranch::new(q.view(), turned.view()), IndexBranch::cached(q.view(), &keys)] {
            let packed = Indexed::new(packed, branch);
            let index = csa.select(packed).unwrap();
            assert_eq!(index, csa.reference_select(packed).unwrap().0, "{q_len}");
            compressed_is_its_definition(&csa, packed, csa.bound_on(packed, &index).unwrap());
            let got = csa.forward(packed).unwrap();
            let first = got.slice(s![.., .., ..1, ..]).to_owned();
            near("first", &first, &want.slice(s![1..2, .., q_len - 1.., ..]).to_owned());
            let second = got.slice(s![.., .., 1.., ..]).to_owned();
            near("second", &second, &want.slice(s![0..1, .., .., ..]).to_owned());
        }
    }
}

#[test]
fn caches_that_do_not_fit_are_refused() {
    let x = Arrays::normal([2, 2, 1, 5, 40, 8, 8], 5);
    let (pools, cache) = (x.k.slice(s![.., .., ..10, ..]), latents::<f32>(&x.k, &[40, 30]));
    let csa = Csa::builder(2).window(20).build().unwrap();
    let own = CompressedCache::new(Cached::new(x.q.view(), &cache), pools);
    let few = latents::<f32>(&x.k, &[10, 6]);
    let refused = csa.forward(Indexed::new(own, IndexBranch::cached(x.q.view(), &few))).unwrap_err();
    assert_eq!(refused.to_string(), "index k: expected 7 index keys or more for sequence 1, got 6");
    let branch = IndexBranch::new(x.q.view(), pools.slice(s![.., .., ..9, ..]));
    let refused = csa.forward(Indexed::new(own, branch)).unwrap_err().to_string();
    assert!(refused.starts_with("index k: expected 10 index keys"), "{refused}");
    let whole = Indexed::new(own, IndexBranch::new(x.q.view(), pools));
    let index = csa.select(whole).unwrap();
    let lists = TokenLists::from_keys(*index.layout(), &[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], &[9]).unwrap();
    assert!(csa.forward_on(whole, &lists).unwrap_err().to_string().starts_with("index: "));
}

#[test]
fn refusals() {
    assert_eq!(Csa::builder(0).build().unwrap_err().to_string(), "k: expected at least 1 pool, got 0");
    let x = Arrays::normal([1, 2, 1, 5, 40, 8, 8], 5);
    let csa = Csa::builder(2).build().unwrap();
    let few = IndexBranch::new(x.q.view(), x.k.slice(s![.., .., ..9, ..]));
    let refused = csa.forward(Indexed::new(input(&x).x, few)).unwrap_err().to_string();
    assert!(refused.starts_with("index k: expected 10 index keys"), "{refused}");
    let y = Arrays::normal([1, 2, 1, 5, 44, 8, 8], 5);
    let index = csa.select(input(&y)).unwrap();
    assert!(csa.forward_on(input(&x), &index).unwrap_err().to_string().starts_with("index: "));
}
