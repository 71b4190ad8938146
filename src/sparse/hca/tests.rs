use ndarray::{Array2, Axis, s};

use super::*;
use crate::attention::{Attention, Selects};
use crate::cache::{Append, Cached, Contiguous, Int8, KvShape, Ring};
use crate::dense::Dense;
use crate::input::Qkv;
use crate::math::rope::Pairs;
use crate::select::{Pooled, Pooling};
use crate::sparse::testing::{Arrays, compressed_is_its_definition, latents, near};

fn pools(x: &Arrays, stride: usize) -> Pooled {
    let kv = x.k.index_axis(Axis(1), 0);
    let pooling = Pooling::gated(Array2::zeros((stride, kv.dim().2))).unwrap();
    let mut pools = pooling.start(kv.dim().0, kv.dim().2).unwrap();
    pooling.extend(&mut pools, kv, Some(kv)).unwrap();
    pools
}

#[test]
fn kernels_are_the_definition() {
    for (sizes, stride, window) in [
        ([2, 4, 1, 70, 150, 24, 24], 16, 20),
        ([1, 20, 1, 1, 600, 16, 16], 8, 33),
        ([1, 20, 1, 10, 90, 16, 16], 8, 20),
        ([2, 3, 1, 9, 9, 8, 8], 4, 100),
        ([1, 2, 1, 5, 3, 8, 8], 2, 2),
    ] {
        let x = Arrays::normal(sizes, 1);
        let pools = pools(&x, stride);
        let kv = x.k.index_axis(Axis(1), 0);
        let rope = Rope::builder(6).theta(50.0).last().pairs(Pairs::Neighbours).build().unwrap();
        let builder = Hca::builder().stride(stride).window(window).rope(rope).sinks(vec![0.5; sizes[1]]);
        for isa in crate::Isa::available() {
            let hca = builder.clone().isa(isa).build().unwrap();
            let input = Compressed::new(x.q.view(), kv, pools.view());
            compressed_is_its_definition(&hca, input, hca.error_bound(input).unwrap());
        }
        // Of half types, whose rows are unpacked beside the pools.
        let half = |x: &Array4<f32>| x.mapv(half::f16::from_f32);
        let (q, k) = (half(&x.q), half(&x.k));
        let input = Compressed::new(q.view(), k.index_axis(Axis(1), 0), pools.view());
        let hca = builder.build().unwrap();
        compressed_is_its_definition(&hca, input, hca.error_bound(input).unwrap());
    }
}

/// A window of all tokens without pools is dense attention with a sink.
#[test]
fn a_window_of_all_tokens_is_dense() {
    let x = Arrays::normal([2, 4, 1, 30, 90, 16, 16], 2);
    let kv = x.k.index_axis(Axis(1), 0);
    let none = Array4::zeros((2, 1, 0, 16));
    let hca = Hca::builder().window(90).sinks(vec![0.3; 4]).build().unwrap();
    let got = hca.forward(Compressed::new(x.q.view(), kv, none.view())).unwrap();
    let dense = Dense::builder().causal().sinks(vec![0.3; 4]).build().unwrap();
    near("dense", &got, &dense.forward(Qkv::new(x.q.view(), x.k.view(), x.k.view())).unwrap());
}

/// With pools of one token each key is there twice.
#[test]
fn pools_of_one_token_count_twice() {
    let x = Arrays::normal([1, 2, 1, 30, 90, 16, 16], 3);
    let kv = x.k.index_axis(Axis(1), 0);
    let hca = Hca::builder().window(90).stride(1).build().unwrap();
    let got = hca.forward(Compressed::new(x.q.view(), kv, x.k.view())).unwrap();
    let dense = Dense::builder().causal().build().unwrap();
    near("twice", &got, &dense.forward(Qkv::new(x.q.view(), x.k.view(), x.k.view())).unwrap());
}

/// A step over the last tokens alone is a row of the whole, and later tokens
/// change no earlier row. A shift of all positions changes nothing.
#[test]
fn steps_are_rows_of_the_whole() {
    let x = Arrays::normal([2, 3, 1, 100, 100, 16, 16], 4);
    let (kv, all) = (x.k.index_axis(Axis(1), 0), pools(&x, 8));
    let hca = Hca::builder()
        .stride(8)
        .window(20)
        .rope(Rope::builder(6).theta(50.0).build().unwrap())
        .build()
        .unwrap();
    let whole = hca.forward(Compressed::new(x.q.view(), kv, all.view())).unwrap();
    for n in [1, 7, 8, 9, 25, 64, 100] {
        let held = n.min(20);
        let q = x.q.slice(s![.., .., n - 1..n, ..]);
        let pools = all.view();
        let step =
            Compressed::new(q, kv.slice(s![.., n - held..n, ..]), pools.slice_move(s![.., .., ..n / 8, ..]));
        let got = hca.forward(step.tokens(n)).unwrap();
        near("step", &got, &whole.slice(s![.., .., n - 1..n, ..]).to_owned());
    }
}

/// Over caches that hold the rows, of sequences of any lengths, in prefill and in
/// decoding; of half types and of 8 bits it is its definition.
#[test]
fn caches_are_arrays() {
    let rope = || Rope::builder(6).theta(50.0).last().build().unwrap();
    let hca = Hca::builder().stride(8).window(20).sinks(vec![0.5; 4]).rope(rope()).build().unwrap();
    for (q_len, lengths) in [(70, [150, 90]), (1, [150, 33]), (9, [4, 150])] {
        let x = Arrays::normal([2, 4, 1, q_len, 150, 16, 16], 6);
        let (kv, all) = (x.k.index_axis(Axis(1), 0), pools(&x, 8));
        let (paged, half) = (latents::<f32>(&x.k, &lengths), latents::<half::f16>(&x.k, &lengths));
        let small = latents::<Int8>(&x.k, &lengths);
        let shape = KvShape { kv_heads: 1, head_dim: 16, value_dim: 3 };
        let mut plain = Contiguous::<f32>::new(shape, 2, 150).unwrap();
        for (b, &n) in lengths.iter().enumerate() {
            let k = x.k.slice(s![b, .., ..n, ..]);
            plain.append(b, k, k.slice(s![.., .., ..3])).unwrap();
        }
        let caches: [&dyn Cache; 4] = [&paged, &plain, &half, &small];
        for (which, cache) in caches.into_iter().enumerate() {
            let cached = CompressedCache::new(Cached::new(x.q.view(), cache), all.view());
            assert_eq!(hca.select(cached).unwrap(), hca.reference_select(cached).unwrap().0);
            compressed_is_its_definition(&hca, cached, hca.error_bound(cached).unwrap());
            let out = hca.forward(cached).unwrap();
            for (b, &n) in lengths.iter().enumerate().filter(|_| which < 2) {
                let (q, pools) = (x.q.slice(s![b..b + 1, .., .., ..]), all.view());
                let pools = pools.slice_move(s![b..b + 1, .., .., ..]);
                let alone = Compressed::new(q, kv.slice(s![b..b + 1, ..n, ..]), pools);
                let want = hca.forward(alone).unwrap();
                near("cache", &out.slice(s![b..b + 1, .., .., ..]).to_owned(), &want);
            }
        }
        // A ring that holds the windows of the queries.
        let mut ring = Ring::<f32>::new(KvShape { value_dim: 16, ..shape }, 2, 0, 19 + q_len).unwrap();
        for (b, &n) in lengths.iter().enumerate() {
            let k = x.k.slice(s![b, .., ..n, ..]);
            ring.append(b, k, k).unwrap();
        }
        let cached = CompressedCache::new(Cached::new(x.q.view(), &ring), all.view()).tokens(&lengths);
        let whole = CompressedCache::new(Cached::new(x.q.view(), &paged), all.view());
        near("ring", &hca.forward(cached).unwrap(), &hca.forward(whole).unwrap());
        compressed_is_its_definition(&hca, cached, hca.error_bound(cached).unwrap());
        // Both sequences packed, in the other order.
        let q = ndarray::concatenate![
            Axis(2),
            x.q.slice(s![1..2, .., q_len - 1.., ..]),
            x.q.slice(s![0..1, .., .., ..])
        ];
        let (offsets, turned) = ([0, 1, 1 + q_len], all.view().select(Axis(0), &[1, 0]));
        let packed = Cached::new(q.view(), &paged).sequences(&[1, 0]).packed(&offsets);
        let packed = CompressedCache::new(packed, turned.view());
        compressed_is_its_definition(&hca, packed, hca.error_bound(packed).unwrap());
        let (got, want) = (hca.forward(packed).unwrap(), hca.forward(whole).unwrap());
        let first = got.slice(s![.., .., ..1, ..]).to_owned();
        near("first", &first, &want.slice(s![1..2, .., q_len - 1.., ..]).to_owned());
        let second = got.slice(s![.., .., 1.., ..]).to_owned();
        near("second", &second, &want.slice(s![0..1, .., .., ..]).to_owned());
    }
}

#[test]
fn caches_that_do_not_fit_are_refused() {
    let x = Arrays::normal([2, 2, 1, 5, 40, 8, 8], 5);
    let (all, cache) = (pools(&x, 4), latents::<f32>(&x.k, &[40, 30]));
    let hca = Hca::builder().stride(4).window(20).build().unwrap();
    let own = CompressedCache::new(Cached::new(x.q.view(), &cache), all.view());
    let refusal = |x: CompressedCache<'_, f32, _>| {
        let mut out = Array4::from_elem((2, 2, 5, 8), f32::NAN);
        let refused = hca.forward_into(x, out.view_mut(), &mut Workspace::new()).unwrap_err();
        assert!(out.iter().all(|x| x.is_nan()), "something was written");
        refused.to_string()
    };
    let few = all.view().slice_move(s![.., .., ..9, ..]);
    assert_eq!(
        refusal(CompressedCache { pools: few, ..own }),
        "pools: expected 10 or more, one for each 4 tokens, got 9"
    );
    let one = all.view().slice_move(s![..1, .., .., ..]);
    assert!(refusal(CompressedCache { pools: one, ..own }).starts_with("pools: expected shape"));
    assert!(refusal(own.tokens(&[40])).starts_with("tokens: expected one number for each"));
    assert!(refusal(own.tokens(&[40, 29])).starts_with("tokens: expected 30 or more"));
    // The last 24 tokens are in the windows of 5 queries.
    assert!(hca.select(own.tokens(&[40, 31])).is_ok());
    let ring = latents::<f32>(&x.k, &[40, 10]);
    let short = CompressedCache::new(Cached::new(x.q.view(), &ring), all.view()).tokens(&[40, 30]);
    assert!(refusal(short).starts_with("kv: expected the last 24 tokens"));
    let heads = Contiguous::<f32>::new(KvShape { kv_heads: 2, head_dim: 8, value_dim: 8 }, 2, 9).unwrap();
    let two = CompressedCache::new(Cached::new(x.q.view(), &heads), all.view());
    assert_eq!(hca.forward(two).unwrap_err().to_string(), "kv: expected a cache of one head, got 2");
    // Lists that look ahead, of pools or of tokens.
    let index = hca.select(own).unwrap();
    let layout = *index.layout();
    for ahead in [9, 10 + 36] {
        let lists = TokenLists::from_keys(layout, &[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], &[ahead]).unwrap();
        assert!(hca.forward_on(own, &lists).unwrap_err().to_string().starts_with("index: "), "{ahead}");
        assert!(hca.reference_on(own, &lists).unwrap_err().to_string().starts_with("index: "));
    }
}

#[test]
fn refusals() {
    let refusal = |builder: HcaBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(refusal(Hca::builder().stride(0)), "stride: expected at least 1 token, got 0");
    assert_eq!(refusal(Hca::builder().window(0)), "window: expected at least 1 token, got 0");
    assert!(refusal(Hca::builder().sinks(vec![f32::NAN])).starts_with("sinks: "));
    let x = Arrays::normal([1, 2, 1, 5, 40, 8, 8], 5);
    let (kv, pools) = (x.k.index_axis(Axis(1), 0), pools(&x, 4));
    let refusal = |builder: HcaBuilder, x: Compressed<'_, f32>| {
        builder.stride(4).build().unwrap().forward(x).unwrap_err().to_string()
    };
    let whole = Compressed::new(x.q.view(), kv, pools.view());
    assert!(refusal(Hca::builder().sinks(vec![0.0]), whole).starts_with("sinks: "));
    assert!(
        refusal(Hca::builder().rope(Rope::builder(10).theta(9.0).build().unwrap()), whole)
            .starts_with("rope: ")
    );
    assert!(refusal(Hca::builder(), whole.tokens(44)).starts_with("kv: "));
    assert!(refusal(Hca::builder().window(2), whole.tokens(44)).starts_with("pools: expected 11 or more"));
    assert!(refusal(Hca::builder(), whole.tokens(30)).starts_with("tokens: "));
    let narrow = Compressed { kv: kv.slice(s![.., .., ..7]), ..whole };
    assert!(refusal(Hca::builder(), narrow).starts_with("kv: "));
}
