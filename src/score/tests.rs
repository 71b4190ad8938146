use ndarray::{Array3, Array4, s};

use super::*;
use crate::simd::{Isa, Kernel};

struct Apply<'a, F> {
    score: &'a F,
    site: Site,
    query: usize,
    first: usize,
    scores: &'a mut [f32],
}

impl<F: Score> Kernel for Apply<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.score.apply(s, &self.site, self.query, self.first, self.scores);
    }
}

/// Numbers in [-1, 1).
fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Scores of every kind among random ones.
fn scores(len: usize, seed: u64) -> Vec<f32> {
    let mut random = random(seed);
    let special =
        [f32::NEG_INFINITY, f32::NAN, f32::INFINITY, 0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE];
    (0..len).map(|i| if i % 5 == 3 { special[i / 5 % 8] } else { 60.0 * random() }).collect()
}

fn dims(q_len: usize, kv_len: usize) -> Dims {
    Dims { batch: 2, q_heads: 3, kv_heads: 3, q_len, kv_len, head_dim: 8, value_dim: 8, packed: false }
}

fn refusal<F: Score>(score: &F, dims: &Dims) -> String {
    score.check(dims).expect_err("a refusal").to_string()
}

/// Holds `apply` against `define` on every instruction set. The error may be
/// `tolerance` times the size of what goes in and comes out.
fn agrees<F: Score>(score: &F, q_len: usize, kv_len: usize, tolerance: f64) {
    for isa in Isa::available() {
        for (batch, head, query) in [(0, 0, 0), (1, 2, q_len / 2), (0, 1, q_len.saturating_sub(1))] {
            if query >= q_len {
                continue;
            }
            let site = Site { batch, head, q_len, kv_len };
            for first in (0..=kv_len).filter(|first| kv_len < 20 || first % 17 == 0) {
                let before = scores(kv_len - first, (first + query) as u64);
                let mut after = before.clone();
                isa.dispatch(Apply { score, site, query, first, scores: &mut after });
                for (t, (&x, &y)) in before.iter().zip(&after).enumerate() {
                    let want = score.define(&site, query, first + t, f64::from(x));
                    let what =
                        format!("{isa} {site:?} query {query} key {} score {x}: {y}, not {want}", first + t);
                    assert!(x > f32::NEG_INFINITY || x.is_nan() || y == f32::NEG_INFINITY, "{what}");
                    if want.is_nan() {
                        assert!(y.is_nan(), "{what}");
                    } else if (want as f32).is_infinite() {
                        assert_eq!(y, want as f32, "{what}");
                    } else {
                        let scale = f64::from(x.abs()).min(1e3).max(want.abs());
                        assert!((f64::from(y) - want).abs() <= tolerance * scale + 2e-38, "{what}");
                    }
                }
            }
        }
    }
}

const LENGTHS: [(usize, usize); 7] = [(0, 3), (3, 0), (1, 1), (3, 5), (7, 4), (2, 64), (5, 203)];

#[test]
fn plain() {
    agrees(&Plain, 3, 70, 0.0);
    const { assert!(Plain::IDENTITY && <(Plain, Plain)>::IDENTITY && <&Plain>::IDENTITY) };
    const { assert!(!Alibi::IDENTITY && !<(Plain, Alibi)>::IDENTITY) };
}

#[test]
fn biases_of_any_shape_and_stride() {
    for (q_len, kv_len) in LENGTHS {
        for sizes in 0..16 {
            let axis = |i: usize, len: usize| if sizes >> i & 1 == 1 { len } else { 1 };
            let shape = [axis(0, 2), axis(1, 3), axis(2, q_len), axis(3, kv_len)];
            let numbers = scores(shape.iter().product(), sizes);
            let bias = Array4::from_shape_vec(shape, numbers).expect("as many as the shape has");
            let wide = bias.broadcast((2, 3, q_len, kv_len)).expect("sizes that fit");
            for view in [
                bias.view(),
                wide,
                bias.slice(s![.., ..;-1, .., ..;-1]),
                bias.slice(s![..;-1, .., ..;-1, ..]),
            ] {
                let score = Bias::new(view);
                assert_eq!(score.check(&dims(q_len, kv_len)), Ok(()));
                agrees(&score, q_len, kv_len, 2e-7);
                for (query, key) in (0..q_len).flat_map(|i| (0..kv_len).map(move |j| (i, j))) {
                    let site = Site { batch: 1, head: 2, q_len, kv_len };
                    let by =
                        view.broadcast((2, 3, q_len, kv_len)).expect("sizes that fit")[[1, 2, query, key]];
                    let defined = score.define(&site, query, key, 1.5);
                    let want = 1.5 + f64::from(by);
                    assert!(defined == want || (defined.is_nan() && want.is_nan()));
                }
            }
        }
        let columns =
            Array4::from_shape_fn((2, 3, kv_len, q_len), |(b, h, j, i)| (b + 2 * h + 3 * j + 5 * i) as f32);
        agrees(&Bias::new(columns.view().permuted_axes([0, 1, 3, 2])), q_len, kv_len, 2e-7);
    }
}

/// What a bias of a half type adds is what the same numbers in `f32` add, bit by bit.
#[test]
fn biases_of_half_types() {
    fn check<T: Element>() {
        for (q_len, kv_len) in LENGTHS {
            let numbers = scores(6 * q_len * kv_len, 1);
            let bias = Array4::from_shape_vec((2, 3, q_len, kv_len), numbers).expect("as many");
            let bias = bias.mapv(T::from_f32);
            let wide = bias.mapv(Element::to_f32);
            let across = [0, 1, 3, 2];
            let columns = bias.view().permuted_axes(across).as_standard_layout().into_owned();
            for view in [bias.view(), bias.slice(s![.., .., ..;-1, ..]), columns.view().permuted_axes(across)]
            {
                agrees(&Bias::new(view), q_len, kv_len, 2e-7);
            }
            let site = Site { batch: 1, head: 2, q_len, kv_len };
            for (isa, query) in Isa::available().flat_map(|isa| (0..q_len).map(move |query| (isa, query))) {
                let mut scores = [(); 2].map(|()| scores(kv_len, query as u64));
                let [half, full] = &mut scores;
                isa.dispatch(Apply { score: &Bias::new(bias.view()), site, query, first: 0, scores: half });
                isa.dispatch(Apply { score: &Bias::new(wide.view()), site, query, first: 0, scores: full });
                assert!(half.iter().zip(&*full).all(|(a, b)| a == b || (a.is_nan() && b.is_nan())));
            }
        }
    }
    check::<half::f16>();
    check::<half::bf16>();
}

#[test]
fn a_bias_of_minus_infinity_hides_nan() {
    let infinities = [f32::NEG_INFINITY, f32::NAN, f32::INFINITY];
    let bias = Array4::from_shape_fn((1, 1, 1, 90), |(.., j)| infinities[j % 3]);
    let strided = bias.slice(s![.., .., .., ..;3]);
    let site = Site { batch: 0, head: 0, q_len: 1, kv_len: 90 };
    for isa in Isa::available() {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0] {
            let mut scores = vec![x; 90];
            isa.dispatch(Apply {
                score: &Bias::new(bias.view()),
                site,
                query: 0,
                first: 0,
                scores: &mut scores,
            });
            for scores in scores.chunks_exact(3) {
                assert_eq!(scores[0], f32::NEG_INFINITY);
                assert!(scores[1].is_nan() || x == f32::NEG_INFINITY);
                assert!(scores[2].is_nan() == x.is_nan());
            }
            let mut scores = vec![x; 30];
            isa.dispatch(Apply { score: &Bias::new(strided), site, query: 0, first: 0, scores: &mut scores });
            assert!(scores.iter().all(|&y| y == f32::NEG_INFINITY));
        }
    }
}

#[test]
fn biases_refuse() {
    let bias = Array4::<f32>::zeros((2, 3, 4, 6));
    assert_eq!(
        refusal(&Bias::new(bias.view()), &dims(4, 5)),
        "bias: expected shape [batch, q_heads, q_len, kv_len] = [2, 3, 4, 5] or 1 in place of any of them, got [2, 3, 4, 6]"
    );
    assert_eq!(
        refusal(&Bias::new(bias.view()), &Dims { packed: true, ..dims(4, 6) }),
        "a bias with a length axis cannot be combined with a packed batch: positions count from the start of each \
         sequence, and the lengths of the sequences differ"
    );
    let heads = Array4::<f32>::zeros((1, 3, 1, 1));
    assert_eq!(Bias::new(heads.view()).check(&Dims { packed: true, ..dims(4, 6) }), Ok(()));
}

#[test]
fn alibi() {
    for (q_len, kv_len) in LENGTHS {
        agrees(&Alibi::new(3), q_len, kv_len, 4e-7);
        for q_start in [-1_000_000_000, -3, 0, 2, 300, 1 << 24, 1_000_000_000] {
            agrees(&Alibi::new(3).at(q_start), q_len, kv_len, 4e-7);
        }
    }
    // Distances are exact: so are scores whose slope is a power of two.
    let (score, site) = (Alibi::new(8), Site { batch: 0, head: 0, q_len: 1, kv_len: 1 << 23 });
    for isa in Isa::available() {
        let mut scores = [0f32; 100];
        isa.dispatch(Apply { score: &score, site, query: 0, first: 1001, scores: &mut scores });
        for (t, &x) in scores.iter().enumerate() {
            assert_eq!(x, -0.5 * ((1 << 23) - 1 - 1001 - t as i32) as f32);
        }
    }
}

#[test]
fn published_slopes() {
    assert!(Alibi::new(0).slopes().is_empty());
    assert_eq!(Alibi::new(1).slopes(), [1.0 / 256.0]);
    let powers = |exponents: &[i32]| exponents.iter().map(|&e| 2f32.powi(-e)).collect::<Vec<_>>();
    assert_eq!(Alibi::new(8).slopes(), powers(&[1, 2, 3, 4, 5, 6, 7, 8]));
    let twelve = Alibi::new(12);
    assert_eq!(twelve.slopes()[..8], powers(&[1, 2, 3, 4, 5, 6, 7, 8]));
    for (slope, half) in twelve.slopes()[8..].iter().zip([1, 3, 5, 7]) {
        assert!((slope - 2f32.powf(-0.5 * half as f32)).abs() < 1e-7);
    }
    for heads in 1..100 {
        assert_eq!(Alibi::new(heads).slopes().len(), heads);
    }
}

#[test]
fn alibi_refuses() {
    assert_eq!(
        refusal(&Alibi::new(4), &dims(1, 1)),
        "slopes: expected one slope for each query head, q_heads = 3, got 4 slopes"
    );
    for (slope, name) in
        [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-1e30, "-1000000000000000000000000000000")]
    {
        let error = Alibi::from_slopes(&[1.0, slope]).expect_err("a refusal");
        let expected = format!("slopes: expected finite slopes, 1e28 at most, got {name} for head 1");
        assert_eq!(error.to_string(), expected);
    }
    let slopes = [0.0, -0.5, 1e28];
    let score = Alibi::from_slopes(&slopes).expect("slopes");
    assert_eq!(score.slopes(), slopes);
    agrees(&score, 5, 40, 4e-7);
}

#[test]
fn softcap() {
    for (q_len, kv_len) in LENGTHS {
        for cap in [0.01, 1.0, 30.0, 50.0, 1e6, f32::MIN_POSITIVE, f32::MAX] {
            agrees(&Softcap::new(cap).expect("a cap"), q_len, kv_len, 2e-6);
        }
    }
    for (cap, name) in [(0.0, "0"), (-1.0, "-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let error = Softcap::new(cap).expect_err("a refusal");
        assert_eq!(error.to_string(), format!("softcap: expected a cap above 0 and finite, got {name}"));
    }
}

#[test]
fn relative_tables() {
    for (q_len, kv_len) in LENGTHS {
        for (heads, max_distance) in [(1, 0), (3, 0), (1, 1), (3, 4), (1, 100), (3, 300)] {
            let numbers = scores(heads * (2 * max_distance + 1), max_distance as u64);
            let table =
                Array2::from_shape_vec((heads, 2 * max_distance + 1), numbers).expect("sizes that fit");
            let score = RelativeTable::new(table.clone()).expect("a table");
            assert_eq!(score.max_distance(), max_distance);
            assert_eq!(score.check(&dims(q_len, kv_len)), Ok(()));
            agrees(&score, q_len, kv_len, 2e-7);
            for q_start in [isize::MIN, -200, -1, 0, 3, 100, 400, isize::MAX - 400] {
                agrees(&score.clone().at(q_start), q_len, kv_len, 2e-7);
            }
            let site = Site { batch: 0, head: heads - 1, q_len, kv_len };
            for (i, j) in (0..q_len).flat_map(|i| (0..kv_len).map(move |j| (i, j))) {
                let w = max_distance as isize;
                let distance = j as isize - (i as isize + kv_len as isize - q_len as isize);
                let by = table[[heads - 1, (distance.clamp(-w, w) + w) as usize]];
                let (got, want) = (score.define(&site, i, j, 2.0), 2.0 + f64::from(by));
                assert!(got == want || (got.is_nan() && want.is_nan()));
            }
        }
    }
    let backwards = Array2::from_shape_fn((3, 5), |(h, r)| (10 * h + r) as f32);
    let backwards = backwards.slice(s![.., ..;-1]).to_owned();
    agrees(&RelativeTable::new(backwards).expect("a table"), 3, 9, 2e-7);
}

#[test]
fn relative_tables_refuse() {
    let message = |shape| RelativeTable::new(Array2::zeros(shape)).expect_err("a refusal").to_string();
    let expected = "table: expected shape [heads | 1, 2 * max_distance + 1], got";
    assert_eq!(message((0, 3)), format!("{expected} [0, 3]"));
    assert_eq!(message((2, 4)), format!("{expected} [2, 4]"));
    assert_eq!(message((2, 0)), format!("{expected} [2, 0]"));
    assert_eq!(
        refusal(&RelativeTable::new(Array2::zeros((2, 5))).expect("a table"), &dims(1, 1)),
        "table: expected shape [q_heads | 1, 2 * max_distance + 1] with q_heads = 3, got [2, 5]"
    );
}

#[test]
fn closures() {
    let slope = 0.25;
    for (q_len, kv_len) in LENGTHS {
        agrees(&score_fn(|s, _, q, k| s - slope * (k as f32 - q as f32).abs()), q_len, kv_len, 4e-7);
    }
    // Every score once, with its own key, on both sides of 2^31.
    let site = Site { batch: 0, head: 0, q_len: 1, kv_len: usize::MAX };
    for first in [0, 7, (1 << 31) - 200, (1 << 31) - 100, 1 << 33] {
        let score = score_fn(|s, _, query, key| s + (key - first + query) as f32);
        for isa in Isa::available() {
            let mut scores = [0.5; 200];
            isa.dispatch(Apply { score: &score, site, query: 3, first, scores: &mut scores });
            assert!(scores.iter().enumerate().all(|(t, &s)| s == t as f32 + 3.5), "{isa} {first}");
        }
    }
}

#[test]
fn compositions() {
    let bias =
        Array4::from_shape_fn((1, 1, 1, 70), |(.., j)| if j % 4 == 1 { f32::NEG_INFINITY } else { j as f32 });
    let softcap = Softcap::new(20.0).expect("a cap");
    let score = softcap.then(Alibi::new(3)).then(Bias::new(bias.view()));
    agrees(&score, 5, 70, 4e-6);
    // What a bias has hidden stays hidden.
    agrees(&(Bias::new(bias.view()), softcap), 5, 70, 4e-6);
    agrees(&&score, 5, 70, 4e-6);
    let site = Site { batch: 0, head: 1, q_len: 5, kv_len: 70 };
    assert_eq!((Bias::new(bias.view()), softcap).define(&site, 0, 1, f64::NAN), f64::NEG_INFINITY);
    assert_eq!(
        refusal(&score, &Dims { q_heads: 4, ..dims(5, 70) }),
        refusal(&Alibi::new(3), &Dims { q_heads: 4, ..dims(5, 70) })
    );
    assert!(refusal(&&score, &dims(5, 71)).starts_with("bias: "));
}

/// Runs of visible scores are what the bits say, wherever they start.
#[test]
fn runs_of_seen_scores() {
    let words = [0x8000_0000_0000_0ff1u64, 0, u64::MAX, 0x5555_0000_ffff_0001];
    for first in [0, 1, 5, 63, 64, 100, 128, 191] {
        let seen = Seen { words: &words, first };
        let len = 256 - first;
        let (mut at, mut found) = (0, vec![false; len]);
        while at < len {
            let run = seen.run(at, len);
            assert!(run.start >= at && run.end <= len && run.start <= run.end, "{run:?}");
            // The next one does not continue this one.
            assert!(run.end == len || words[(first + run.end) / 64] >> ((first + run.end) % 64) & 1 == 0);
            found[run.clone()].fill(true);
            at = run.end;
        }
        let want: Vec<bool> = (first..256).map(|bit| words[bit / 64] >> (bit % 64) & 1 == 1).collect();
        assert_eq!(found, want, "{first}");
    }
}

/// Whatever is seen, in long runs or in short ones: each seen score is changed once, and no
/// other is asked about or changed.
#[test]
fn closures_are_asked_about_seen_scores() {
    struct Over<'a, F>(&'a F, usize, &'a mut [f32], Seen<'a>);
    impl<F: Score> Kernel for Over<'_, F> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let site = Site { batch: 0, head: 0, q_len: 4, kv_len: 400 };
            self.0.apply_seen(s, &site, 3, self.1, self.2, self.3);
        }
    }
    let words = [0x8000_0000_0000_0ff1u64, 0, u64::MAX, 0x5555_0000_ffff_0001, 0x2492_4924_9249_2492, 0b1011];
    for isa in Isa::available() {
        for (first, len) in [(0, 384), (1, 200), (63, 65), (100, 0), (129, 255), (191, 1), (200, 100)] {
            let seen = |bit: usize| words[bit / 64] >> (bit % 64) & 1 == 1;
            let before = scores(len, first as u64);
            for keys in [0, 7] {
                let mut after = before.clone();
                let score = score_fn(|score, _: &Site, query, key| {
                    assert!(query == 3 && seen(first + key - keys), "{isa}: a hidden key, {key}");
                    score * 2.0 + key as f32
                });
                isa.dispatch(Over(&(score, Plain), keys, &mut after, Seen { words: &words, first }));
                for (t, (&x, &y)) in before.iter().zip(&after).enumerate() {
                    let want = if seen(first + t) { x * 2.0 + (keys + t) as f32 } else { x };
                    assert!(
                        y.to_bits() == want.to_bits() || y.is_nan() && want.is_nan(),
                        "{isa} {first} {t}"
                    );
                }
            }
        }
    }
}

/// Two finite numbers never hide a key.
#[test]
fn sums_of_finite_scores_are_finite() {
    for (a, b) in [(f32::MIN, f32::MIN), (f32::MIN, -1e32), (-3e38, -1e38)] {
        assert_eq!(shift(a, b), f32::MIN);
        assert_eq!(define_shift(f64::from(a), f64::from(b)), f64::from(f32::MIN));
    }
    assert_eq!(shift(f32::NEG_INFINITY, 1.0), f32::NEG_INFINITY);
    assert_eq!(shift(f32::NAN, f32::NEG_INFINITY), f32::NEG_INFINITY);
    assert!(shift(f32::NAN, f32::MIN).is_nan());
}

fn log_gates(len: usize, seed: u64) -> Array3<f32> {
    let mut random = random(seed);
    Array3::from_shape_simple_fn((2, 3, len), || match random() {
        all if all > 0.95 => f32::NEG_INFINITY,
        some => -some.abs(),
    })
}

#[test]
fn forget_is_its_definition() {
    for (q_len, kv_len) in [(1, 1), (5, 9), (70, 200), (9, 5)] {
        agrees(&Forget::new(log_gates(kv_len, 3).view()).unwrap(), q_len, kv_len, 1e-6);
        agrees(&Forget::new(log_gates(kv_len, 3).view()).unwrap().at(-2), q_len, kv_len, 1e-6);
    }
}

/// The definition is the sum of the gates between, however it is kept.
#[test]
fn forget_adds_the_gates_between() {
    let gates = log_gates(60, 4);
    let forget = Forget::new(gates.view()).unwrap();
    for (query, key) in (0..60).flat_map(|i| (0..60).map(move |j| (i, j))) {
        let site = Site { batch: 1, head: 2, q_len: 60, kv_len: 60 };
        let between = || gates.slice(s![1, 2, key + 1..=query]).iter().map(|&x| f64::from(x)).sum::<f64>();
        let want = if key > query { f64::NEG_INFINITY } else { 2.0 + between() };
        let got = forget.define(&site, query, key, 2.0);
        assert!(got == want || (got - want).abs() < 1e-12, "{query} {key}: {got}, not {want}");
    }
}

/// A hundred thousand tokens on, the bias of the last ones is as right as at
/// the start.
#[test]
fn forget_loses_nothing_over_many_tokens() {
    let forget = Forget::new(Array3::from_elem((1, 1, 100_000), -0.7f32).view()).unwrap();
    let site = Site { batch: 0, head: 0, q_len: 1, kv_len: 100_000 };
    for isa in Isa::available() {
        let mut scores = [0.0; 8];
        isa.dispatch(Apply { score: &forget, site, query: 0, first: 99_992, scores: &mut scores });
        for (t, got) in scores.iter().enumerate() {
            let want = -0.7f32 as f64 * (7 - t) as f64;
            assert!((f64::from(*got) - want).abs() <= 1e-6, "{isa}: {got}, not {want}");
        }
    }
}

#[test]
fn forget_grows_token_by_token() {
    let gates = log_gates(40, 5);
    let mut grown = Forget::new(gates.slice(s![.., .., ..7])).unwrap();
    for t in 7..40 {
        grown.extend(gates.slice(s![.., .., t..t + 1])).unwrap();
    }
    assert_eq!(grown, Forget::new(gates.view()).unwrap());
}

#[test]
fn forget_refuses() {
    let refused = |gate: f32| Forget::new(Array3::from_elem((1, 1, 2), gate).view()).unwrap_err().to_string();
    for gate in [0.1, f32::NAN, -1e30, f32::INFINITY] {
        assert!(refused(gate).starts_with("log gates: expected 0 at most"), "{gate}");
    }
    let mut forget = Forget::new(log_gates(9, 1).view()).unwrap();
    let before = forget.clone();
    let other = forget.extend(Array3::zeros((2, 2, 1)).view()).unwrap_err().to_string();
    assert_eq!(other, "log gates: expected shape [batch, q_heads, tokens] = [2, 3, any], got [2, 2, 1]");
    assert_eq!(forget, before);
    assert_eq!(
        refusal(&forget, &dims(3, 8)),
        "log gates: expected shape [batch, q_heads, kv_len] = [2, 3, 8], got [2, 3, 9]"
    );
    assert!(refusal(&forget, &Dims { packed: true, ..dims(3, 9) }).contains("packed"));
    for (bound, tolerance) in [(-1.0, 0.1), (f32::NAN, 0.1), (1.0, 0.0), (1.0, 1.0), (1.0, f32::NAN)] {
        assert!(forget.remembered(bound, tolerance).is_err(), "{bound} {tolerance}");
    }
}
