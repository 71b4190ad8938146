//! The fixture is what its README says.

#[path = "../examples/support/fixture.rs"]
mod fixture;

use attention_kernels::cache::{Append, Cached, Contiguous, Int4, Kivi, KvShape, Rotated};
use attention_kernels::dense::{Dense, Sage};
use attention_kernels::{Attention, Qkv, Weights};
use half::f16;
use ndarray::{Array4, Axis, s};

fn largest(x: &Array4<f16>) -> f32 {
    x.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max)
}

#[test]
fn the_fixture_has_three_layers_with_outliers() {
    for (layer, outlier) in fixture::LAYERS.into_iter().zip([10.125, 12.234_375, 18.046_875]) {
        let (q, k, v) = fixture::layer(layer);
        assert_eq!(q.dim(), (1, 3, 512, 64), "layer {layer}");
        assert_eq!(k.dim(), (1, 1, 512, 64), "layer {layer}");
        assert_eq!(v.dim(), (1, 1, 512, 64), "layer {layer}");
        assert!(q.iter().chain(&k).chain(&v).all(|x| x.is_finite()), "layer {layer}");
        assert_eq!(largest(&k), outlier, "largest key of layer {layer}");
    }
}

/// In a layer so early, values of a word are nearer to those of the same word elsewhere than to
/// others: a list that is off by one token is seen.
#[test]
fn words_are_those_of_the_tokens() {
    let words = fixture::words();
    assert_eq!(words.len(), 512);
    let text = words.concat();
    assert!(text.starts_with("\nGenesis 1\n\n1 In the beginning"), "{:?}", &text[..40]);
    assert!(text.contains("Let there be light: and there was light."));
    let (_, _, v) = fixture::layer(2);
    let distance = |i: usize, j: usize| {
        let off = |c: usize| (v[[0, 0, i, c]].to_f64() - v[[0, 0, j, c]].to_f64()).powi(2);
        (0..64).map(off).sum::<f64>()
    };
    let of = |word: &str| (0..512).filter(|&i| words[i] == word).collect::<Vec<_>>();
    let mean = |a: &[usize], b: &[usize]| {
        let pairs = a.iter().flat_map(|&i| b.iter().filter(move |&&j| j != i).map(move |&j| (i, j)));
        let (sum, count) = pairs.fold((0.0, 0), |(sum, n), (i, j)| (sum + distance(i, j), n + 1));
        sum / f64::from(count)
    };
    let all: Vec<usize> = (0..512).collect();
    for word in [" light", " God", " waters"] {
        let places = of(word);
        assert!(places.len() >= 5, "{word}: {places:?}");
        assert!(mean(&places, &places) < 0.2 * mean(&places, &all), "{word}");
    }
}

#[test]
fn the_first_token_is_a_sink() {
    let (q, k, _) = fixture::layer(27);
    // The share of the first token in the weights of the last, head 0.
    let score = |j: usize| {
        let dot: f64 = (0..64).map(|c| f64::from(q[[0, 0, 511, c]]) * f64::from(k[[0, 0, j, c]])).sum();
        (dot / 8.0).exp()
    };
    let share = score(0) / (0..512).map(score).sum::<f64>();
    assert!(share > 0.2, "{share}");
}

/// How far scores of 8-bit codes take attention from what it is, as the docs of
/// [`Sage`] say.
#[test]
fn codes_are_as_far_from_dense_attention_as_they_say() {
    for (layer, said) in fixture::LAYERS.into_iter().zip([0.0055, 0.0164, 0.0276]) {
        let (q, k, v) = fixture::layer(layer);
        let q = q.slice(s![.., .., 448.., ..]);
        let x = Qkv::new(q, k.view(), v.view());
        let dense = Dense::builder().causal().build().unwrap().reference(x).unwrap();
        let sage = Sage::builder().causal().build().unwrap();
        let [q, k, v] = [q, k.view(), v.view()].map(|x| x.mapv(f16::to_f32));
        let out = sage.forward(Qkv::new(q.view(), k.view(), v.view())).unwrap();
        let square = |x: f64| x * x;
        let off: f64 = out.iter().zip(&dense).map(|(a, b)| square(f64::from(*a) - b)).sum();
        let off = (off / dense.iter().map(|&x| square(x)).sum::<f64>()).sqrt();
        assert!(off < said + 5e-4 && off > said - 5e-4, "layer {layer}: {off}, not {said}");
    }
}

/// How far a cache takes the last 64 queries of a layer from attention on its keys and
/// values themselves, and for how many of these the largest weight stays with its key.
fn cost_of<C: Append>(mut cache: C, layer: usize) -> [f64; 2] {
    let (q, k, v) = fixture::layer(layer);
    let [k, v] = [k, v].map(|x| x.mapv(f16::to_f32));
    let [tokens, values] = [&k, &v].map(|x| x.index_axis(Axis(0), 0));
    cache.append(0, tokens, values).unwrap();
    let q = q.slice(s![.., .., 448.., ..]).mapv(f16::to_f32);
    let dense = Dense::builder().causal().build().unwrap();
    let (exact, over) = (Qkv::new(&q, &k, &v), Cached::new(q.view(), &cache));
    let (want, out) = (dense.reference(exact).unwrap(), dense.forward(over).unwrap());
    let off: f64 = out.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let tops = [dense.top_weights(exact, 1), dense.top_weights(over, 1)].map(|top| top.unwrap().keys);
    let kept = tops[0].iter().zip(&tops[1]).filter(|(a, b)| a == b).count();
    [(off / want.iter().map(|x| x.powi(2)).sum::<f64>()).sqrt(), kept as f64 / tops[0].len() as f64]
}

const SHAPE: KvShape = KvShape { kv_heads: 1, head_dim: 64, value_dim: 64 };

/// As the docs of [`Kivi`], [`Rotated`] and [`Int4`] say: distance and share of rows that
/// keep their first key, for each layer. Keys alone have few bits where values are `f16`.
#[test]
fn caches_of_few_bits_cost_what_they_say() {
    let contiguous = |layer| {
        [
            cost_of(Contiguous::<Rotated<3>, f16>::new(SHAPE, 1, 512).unwrap(), layer),
            cost_of(Contiguous::<Rotated<4>, f16>::new(SHAPE, 1, 512).unwrap(), layer),
            cost_of(Contiguous::<Int4, f16>::new(SHAPE, 1, 512).unwrap(), layer),
        ]
    };
    for (layer, said) in fixture::LAYERS.into_iter().zip(COSTS) {
        let kivi = cost_of(Kivi::<2>::new(SHAPE, 1, 512, 128).unwrap(), layer);
        let got = [[kivi].as_slice(), &contiguous(layer)].concat();
        // Of 192 rows one may go either way.
        let near = |(got, said): (&[f64; 2], &[f64; 2])| {
            (got[0] - said[0]).abs() < 2e-3 && (got[1] - said[1]).abs() < 6e-3
        };
        assert!(got.iter().zip(&said).all(near), "layer {layer}: {got:.3?}, not {said:.3?}");
    }
}

/// KIVI, rotated keys of three and of four bits, plain keys of four.
const COSTS: [[[f64; 2]; 4]; 3] = [
    [[0.217, 0.516], [0.109, 0.661], [0.060, 0.760], [0.078, 0.583]],
    [[0.379, 0.750], [0.246, 0.786], [0.130, 0.906], [0.171, 0.823]],
    [[0.375, 0.792], [0.282, 0.833], [0.184, 0.891], [0.247, 0.849]],
];
