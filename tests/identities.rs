//! The algebra that ties mechanisms, options and inputs together. Bit for
//! bit where both sides are the same arithmetic, within the published bound
//! where they are not.

mod shared;

use attention_kernels::dense::{Dense, Tempered};
use attention_kernels::input::Qkv;
use attention_kernels::mask::{
    Boolean, Causal, Documents, Mask, Prefix, Tree, Unmasked, Window, mask_fn, mask_fn_per_head,
};
use attention_kernels::merge::{self, State};
use attention_kernels::score::{Alibi, Forget, RelativeTable, Score, Softcap};
use attention_kernels::simd::Isa;
use attention_kernels::{Attention, Bounded, Mechanism, Mergeable, Weights, Workspace};
use half::{bf16, f16};
use ndarray::{Array2, Array3, Array4, ArrayViewMut4, Axis, Slice, concatenate, s};

use shared::{
    AnyMask, AnyScore, Case, Shape, isas, masked, normal, same_bits, scored, selective, shape, sigmoid,
    uniform, wide, within,
};

/// Few queries over several chunks of keys; small heads; several tiles of
/// queries and of keys; more queries than keys.
const SHAPES: [Shape; 4] = [
    shape([2, 4, 2, 3, 1100, 20, 12]),
    shape([2, 4, 2, 40, 70, 24, 20]),
    shape([1, 2, 1, 200, 530, 16, 33]),
    shape([1, 2, 2, 45, 17, 9, 8]),
];

fn each(mut check: impl FnMut(Isa, Shape, &Case, &str)) {
    for isa in isas() {
        for (i, n) in SHAPES.into_iter().enumerate() {
            check(isa, n, &Case::new(n, 40 + i as u64), &format!("{isa}, {n:?}"));
        }
    }
}

/// Twice as far apart as both may be off the same definition.
fn near<F: Score + 'static>(what: &str, dense: &Dense<AnyMask, F>, x: Qkv<'_, f32>, got: &Array4<f32>) {
    let reference = dense.reference(x).unwrap();
    within(what, got, reference.view(), &dense.error_bound(x).unwrap());
}

/// How far an LSE may be off: the bound of an output of ones, and the
/// rounding of the LSE itself.
fn lse_near<F: Score + 'static>(what: &str, dense: &Dense<AnyMask, F>, x: Qkv<'_, f32>, got: &Array3<f32>) {
    let ones = Array4::ones((x.v.dim().0, x.v.dim().1, x.v.dim().2, 1));
    let bound = dense.error_bound(Qkv { v: ones.view(), ..x }).unwrap();
    let want = dense.reference_lse(x).unwrap();
    for ((i, &x), &want) in got.indexed_iter().zip(&want) {
        let (x, bound) = (f64::from(x), bound[i] + want.abs() * 2f64.powi(-23));
        assert!(x == want || (x - want).abs() <= bound, "{what}: lse {x} at {i:?}, not {want}");
    }
}

fn keys<T>(x: &Array4<T>, range: std::ops::Range<usize>) -> ndarray::ArrayView4<'_, T> {
    x.slice_axis(Axis(2), Slice::from(range))
}

// ---- heads ----

fn repeated(x: &Array4<f32>, group: usize) -> Array4<f32> {
    let (b, h, n, d) = x.dim();
    Array4::from_shape_fn((b, h * group, n, d), |(b, h, i, c)| x[[b, h / group, i, c]])
}

#[test]
fn grouped_heads_are_repeated_heads() {
    for isa in isas() {
        for (n, same_engine) in [
            (SHAPES[0], true),
            (SHAPES[1], true),
            (SHAPES[2], true),
            // All query heads share one key/value head.
            (shape([1, 6, 1, 2, 300, 16, 16]), true),
            (shape([1, 6, 1, 50, 70, 16, 16]), true),
            // 16 rows together are many, 2 rows alone are few.
            (shape([1, 8, 1, 2, 300, 16, 16]), false),
        ] {
            let case = Case::new(n, 1);
            let group = n.q_heads / n.kv_heads;
            let repeated =
                Case { q: case.q.clone(), k: repeated(&case.k, group), v: repeated(&case.v, group) };
            let dense = masked(isa, Causal::new()).build().unwrap();
            let (grouped, grouped_lse) = dense.forward_with_lse(case.x()).unwrap();
            let (out, lse) = dense.forward_with_lse(repeated.x()).unwrap();
            let what = format!("{isa}, {n:?}");
            if same_engine {
                same_bits(&what, &out, &grouped);
                same_bits(&what, &lse, &grouped_lse);
            }
            near(&what, &dense, case.x(), &out);
            near(&what, &dense, repeated.x(), &grouped);
            // Broadcast instead of copied.
            if n.kv_heads == 1 {
                let x = Qkv::new(
                    case.q.view(),
                    case.k.broadcast(repeated.k.dim()).unwrap(),
                    case.v.broadcast(repeated.v.dim()).unwrap(),
                );
                same_bits(&what, &dense.forward(x).unwrap(), &out);
            }
        }
    }
}

// ---- masks ----

/// Masks that say the same in other words, and what they say.
#[test]
fn masks_that_are_equal() {
    each(|isa, n, case, what| {
        let pairs: Vec<(&str, AnyMask, AnyMask)> = vec![
            ("no window", Box::new(Window::new(None, None)), Box::new(Unmasked)),
            (
                "wide window",
                Box::new(Window::new(Some(n.q_len.max(n.kv_len)), Some(n.q_len.max(n.kv_len)))),
                Box::new(Unmasked),
            ),
            ("widest window", Box::new(Window::new(Some(usize::MAX), Some(usize::MAX))), Box::new(Unmasked)),
            ("long prefix", Box::new(Prefix::new(usize::MAX)), Box::new(Unmasked)),
            ("late", Box::new(Causal::at(n.kv_len as isize)), Box::new(Unmasked)),
            ("causal window", Box::new(Window::new(None, Some(0))), Box::new(Causal::new())),
            ("no prefix", Box::new(Prefix::new(0)), Box::new(Causal::new())),
            (
                "aligned by hand",
                Box::new(Causal::at(n.kv_len as isize - n.q_len as isize)),
                Box::new(Causal::new()),
            ),
            (
                "closure",
                Box::new(mask_fn(|site, i, j| j as isize <= i as isize + site.q_start())),
                Box::new(Causal::new()),
            ),
            (
                "closure per head",
                Box::new(mask_fn_per_head(|site, i, j| j as isize <= i as isize + site.q_start())),
                Box::new(Causal::new()),
            ),
            (
                "a window is a causal mask without an older one",
                Box::new(Causal::new().and(Causal::at(n.kv_len as isize - n.q_len as isize - 31).not())),
                Box::new(Window::new(Some(30), Some(0))),
            ),
            (
                "one document",
                Box::new(Documents::of(&vec![3; n.q_len], &vec![3; n.kv_len]).and(Causal::new())),
                Box::new(Causal::new()),
            ),
            (
                "De Morgan",
                Box::new(Causal::new().not().and(Window::new(Some(3), None).not()).not()),
                Box::new(Causal::new().or(Window::new(Some(3), None))),
            ),
            ("nothing", Box::new(Unmasked.not()), Box::new(Causal::at(-(n.q_len as isize)))),
        ];
        let run = |mask: AnyMask| masked(isa, mask).build().unwrap().forward_with_lse(case.x()).unwrap();
        for (name, a, b) in pairs {
            let ((a, a_lse), (b, b_lse)) = (run(a), run(b));
            same_bits(&format!("{what}: {name}"), &a, &b);
            same_bits(&format!("{what}: {name}, lse"), &a_lse, &b_lse);
        }
        if n.q_len <= n.kv_len {
            let chain: Vec<_> = (0..n.q_len).map(|i| i.checked_sub(1)).collect();
            let (tree, tree_lse) = run(Box::new(Tree::new(&chain).unwrap()));
            let (causal, causal_lse) = run(Box::new(Causal::new()));
            same_bits(&format!("{what}: chain"), &tree, &causal);
            same_bits(&format!("{what}: chain"), &tree_lse, &causal_lse);
        }
    });
}

/// Of masks that know nothing beforehand most blocks of keys turn out to be
/// hidden, before others or after them: with small tiles of queries and, where
/// there are many heads, with large ones.
#[test]
fn blocks_of_keys_that_nobody_sees() {
    fn check<T: attention_kernels::Element>(isa: Isa, case: &Case<T>, what: &str) {
        let run = |mask: AnyMask| masked(isa, mask).build().unwrap().forward_with_lse(case.x()).unwrap();
        let pairs: Vec<(&str, AnyMask, AnyMask)> = vec![
            ("earlier keys", Box::new(mask_fn(|_, i, j| j <= i)), Box::new(Causal::new())),
            ("later keys", Box::new(mask_fn(|_, i, j| j > i)), Box::new(Causal::new().not())),
            (
                "near keys",
                Box::new(mask_fn(|_, i, j| i.abs_diff(j) < 9)),
                Box::new(Window::new(Some(8), Some(8))),
            ),
        ];
        for (name, closure, known) in pairs {
            let ((a, a_lse), (b, b_lse)) = (run(closure), run(known));
            let (a, b) = (a.map(|x| x.to_f32()), b.map(|x| x.to_f32()));
            same_bits(&format!("{what}: {name}"), &a, &b);
            same_bits(&format!("{what}: {name}, lse"), &a_lse, &b_lse);
        }
    }
    for isa in isas() {
        for heads in [1, 8] {
            let case = Case::new(shape([1, heads, heads, 900, 900, 16, 16]), 3);
            let what = format!("{isa}, {heads} heads");
            check(isa, &case, &what);
            check(isa, &case.map(bf16::from_f32), &format!("{what}, bf16"));
            check(isa, &case.map(f16::from_f32), &format!("{what}, f16"));
        }
    }
}

/// Both alignments are one where there are as many queries as keys.
#[test]
fn alignments_of_a_square() {
    for (isa, len) in isas().into_iter().flat_map(|isa| [(isa, 5), (isa, 130)]) {
        let case = Case::new(shape([1, 2, 1, len, len, 16, 8]), 2);
        let run = |mask: Causal| masked(isa, mask).build().unwrap().forward(case.x()).unwrap();
        same_bits(&format!("{isa}, {len}"), &run(Causal::at(0)), &run(Causal::new()));
    }
}

/// A random mask, not contiguous, with an empty and a full row.
fn holes(n: Shape, seed: u64) -> Array4<bool> {
    let mut uniform = uniform(seed);
    let mut holes = Array4::from_shape_simple_fn((n.batch, n.q_heads, n.q_len, n.kv_len), || uniform() < 0.4);
    holes.slice_mut(s![.., .., 0, ..]).fill(false);
    holes.slice_mut(s![.., .., 1, ..]).fill(true);
    holes
}

#[test]
fn boolean_masks() {
    each(|isa, n, case, what| {
        let holes = holes(n, 3);
        let leaked = &*Box::leak(Box::new(holes.clone()));
        let boolean = masked(isa, Boolean::new(leaked.view())).build().unwrap();
        let (out, lse) = boolean.forward_with_lse(case.x()).unwrap();
        assert!(out.slice(s![.., .., 0, ..]).iter().all(|&x| x == 0.0), "{what}");
        assert!(lse.slice(s![.., .., 0]).iter().all(|&x| x == f32::NEG_INFINITY), "{what}");

        // Looked up by a closure.
        let closure = mask_fn_per_head(|site, i, j| leaked[[site.batch, site.head, i, j]]);
        let (same, same_lse) = masked(isa, closure).build().unwrap().forward_with_lse(case.x()).unwrap();
        same_bits(what, &same, &out);
        same_bits(what, &same_lse, &lse);

        // A bias of 0 and -inf.
        let bias = holes.mapv(|x| if x { 0.0 } else { f32::NEG_INFINITY });
        let bias = scored(isa, Unmasked, AnyScore::bias(bias)).build().unwrap();
        let (biased, biased_lse) = bias.forward_with_lse(case.x()).unwrap();
        near(what, &boolean, case.x(), &biased);
        near(what, &bias, case.x(), &out);
        lse_near(what, &boolean, case.x(), &biased_lse);
        lse_near(what, &bias, case.x(), &lse);

        // The same mask for all sequences and heads, and one row for all queries.
        let matrix = &*Box::leak(Box::new(leaked.slice(s![..1, ..1, .., ..]).to_owned()));
        let shared = masked(isa, Boolean::new(matrix.view())).build().unwrap();
        let copied = Box::leak(Box::new(matrix.broadcast(holes.dim()).unwrap().to_owned()));
        let copied = masked(isa, Boolean::new(copied.view())).build().unwrap();
        same_bits(what, &shared.forward(case.x()).unwrap(), &copied.forward(case.x()).unwrap());
        // With the keys from right to left in memory.
        let mut mirrored = matrix.slice(s![.., .., .., ..;-1]).to_owned();
        mirrored.invert_axis(Axis(3));
        let mirrored = Box::leak(Box::new(mirrored));
        let mirrored = masked(isa, Boolean::new(mirrored.view())).build().unwrap();
        same_bits(what, &mirrored.forward(case.x()).unwrap(), &shared.forward(case.x()).unwrap());
    });
}

// ---- scores ----

#[test]
fn scores_that_change_nothing() {
    each(|isa, n, case, what| {
        let plain = masked(isa, Causal::new()).build().unwrap();
        let same = scored(isa, Causal::new(), AnyScore::Same).build().unwrap();
        let (want, want_lse) = same.forward_with_lse(case.x()).unwrap();
        near(what, &plain, case.x(), &want);
        for (name, score) in [
            ("slopes of 0", AnyScore::Alibi(Alibi::from_slopes(&vec![0.0; n.q_heads]).unwrap())),
            ("a table of 0", AnyScore::Table(RelativeTable::new(Array2::zeros((1, 5))).unwrap())),
            ("a bias of 0", AnyScore::bias(Array4::zeros((1, 1, 1, n.kv_len)))),
        ] {
            let (out, lse) =
                scored(isa, Causal::new(), score).build().unwrap().forward_with_lse(case.x()).unwrap();
            same_bits(&format!("{what}: {name}"), &out, &want);
            same_bits(&format!("{what}: {name}"), &lse, &want_lse);
        }
        let cap = scored(isa, Causal::new(), AnyScore::Softcap(Softcap::new(1e6).unwrap())).build().unwrap();
        near(&format!("{what}: far cap"), &plain, case.x(), &cap.forward(case.x()).unwrap());
    });
}

#[test]
fn alibi_by_hand() {
    each(|isa, n, case, what| {
        let alibi = Alibi::new(n.q_heads);
        let slopes = alibi.slopes().to_vec();
        let run = |mask: AnyMask, score| {
            scored(isa, mask, score).build().unwrap().forward_with_lse(case.x()).unwrap()
        };
        for causal in [true, false] {
            let mask = || -> AnyMask { if causal { Box::new(Causal::new()) } else { Box::new(Unmasked) } };
            let (built_in, lse) = run(mask(), AnyScore::Alibi(alibi.clone()));
            let (by_hand, hand_lse) = run(mask(), AnyScore::HandmadeAlibi(slopes.clone()));
            same_bits(what, &by_hand, &built_in);
            same_bits(what, &hand_lse, &lse);
        }
        // As a bias, where a slope times a distance is exact.
        let q_start = n.kv_len as isize - n.q_len as isize;
        let halves: Vec<f32> = (0..n.q_heads).map(|h| 0.5 / (h + 1).next_power_of_two() as f32).collect();
        let bias = Array4::from_shape_fn((1, n.q_heads, n.q_len, n.kv_len), |(_, h, i, j)| {
            -halves[h] * (i as isize + q_start - j as isize).abs() as f32
        });
        let (biased, biased_lse) = run(Box::new(Causal::new()), AnyScore::bias(bias));
        let (alibi, lse) =
            run(Box::new(Causal::new()), AnyScore::Alibi(Alibi::from_slopes(&halves).unwrap()));
        same_bits(what, &biased, &alibi);
        same_bits(what, &biased_lse, &lse);
        // And as a table that reaches far enough.
        let reach = n.kv_len + n.q_len;
        let table =
            Array2::from_shape_fn((n.q_heads, 2 * reach + 1), |(h, c)| -halves[h] * c.abs_diff(reach) as f32);
        let (table, table_lse) =
            run(Box::new(Causal::new()), AnyScore::Table(RelativeTable::new(table).unwrap()));
        same_bits(what, &table, &alibi);
        same_bits(what, &table_lse, &lse);
    });
}

#[test]
fn a_constant_bias_shifts_the_lse() {
    each(|isa, n, case, what| {
        let plain = masked(isa, Causal::new()).build().unwrap();
        let mut normal = normal(5);
        let bias = Array4::from_shape_simple_fn((n.batch, n.q_heads, n.q_len, 1), || 5.0 * normal());
        let biased = scored(isa, Causal::new(), AnyScore::bias(bias.clone())).build().unwrap();
        let (out, lse) = biased.forward_with_lse(case.x()).unwrap();
        // The bound knows of the larger scores.
        let bound = biased.error_bound(case.x()).unwrap();
        within(what, &out, plain.reference(case.x()).unwrap().view(), &bound);
        lse_near(what, &biased, case.x(), &lse);
        let want = plain.reference_lse(case.x()).unwrap();
        for ((b, h, i), &x) in lse.indexed_iter() {
            let want = want[[b, h, i]] + f64::from(bias[[b, h, i, 0]]);
            assert!(f64::from(x) == want || (f64::from(x) - want).abs() < 3e-5, "{what}: {x}, not {want}");
        }
    });
}

/// Scores that are -inf by themselves hide their keys as a mask does.
#[test]
fn scores_of_minus_infinity() {
    each(|isa, _, case, what| {
        let mut case = case.clone();
        case.q.slice_mut(s![.., .., .., 0]).fill(f32::NEG_INFINITY);
        case.k.slice_mut(s![.., .., .., 0]).fill(1.0);
        case.v.fill(f32::NAN);
        let all = masked(isa, Unmasked).build().unwrap();
        assert!(all.reference(case.x()).unwrap().iter().all(|&x| x == 0.0));
        let (out, lse) = all.forward_with_lse(case.x()).unwrap();
        assert!(lse.iter().all(|&x| x == f32::NEG_INFINITY), "{what}");
        assert!(out.iter().all(|&x| x == 0.0), "{what}");
    });
}

// ---- sinks ----

#[test]
fn sinks() {
    each(|isa, n, case, what| {
        let without = masked(isa, Causal::new()).build().unwrap();
        let (out, lse) = without.forward_with_lse(case.x()).unwrap();
        let none = masked(isa, Causal::new()).sinks(vec![f32::NEG_INFINITY; n.q_heads]).build().unwrap();
        let (same, same_lse) = none.forward_with_lse(case.x()).unwrap();
        same_bits(what, &same, &out);
        same_bits(what, &same_lse, &lse);

        // Of no account, some, much, all.
        for at in [-90.0, 0.0, 9.0, 300.0] {
            let sinks: Vec<f32> = (0..n.q_heads).map(|h| at + 0.75 * h as f32).collect();
            let with = masked(isa, Causal::new()).sinks(sinks.clone()).build().unwrap();
            let (sunk, sunk_lse) = with.forward_with_lse(case.x()).unwrap();
            same_bits(what, &sunk_lse, &lse);
            let reference = without.reference(case.x()).unwrap();
            let reference_lse = without.reference_lse(case.x()).unwrap();
            let formula = Array4::from_shape_fn(reference.dim(), |(b, h, i, c)| {
                reference[[b, h, i, c]] / (1.0 + (f64::from(sinks[h]) - reference_lse[[b, h, i]]).exp())
            });
            // What sinks leave of the bound is as small as what they leave of
            // the output, but not smaller than what f32 holds.
            let bound = with.error_bound(case.x()).unwrap().mapv(|x| x.max(1e-37));
            within(&format!("{what}, sinks at {at}"), &sunk, formula.view(), &bound);
            let mut applied = out.clone();
            merge::apply_sinks(applied.view_mut(), lse.view(), &sinks).unwrap();
            // The LSE was rounded before the sinks came.
            let bound = Array3::from_shape_fn(bound.dim(), |i| {
                let far = reference_lse[i].abs().max(at.abs().into());
                let largest = formula.slice(s![i.0, i.1, i.2, ..]).iter().fold(0f64, |a, x| a.max(x.abs()));
                // A row that sees nothing has an LSE of -inf.
                if largest == 0.0 { bound[i] } else { bound[i] + far * 2f64.powi(-23) * largest }
            });
            within(&format!("{what}, sinks applied at {at}"), &applied, formula.view(), &bound);
        }
    });
}

// ---- lengths ----

#[test]
fn packed_is_one_by_one() {
    for isa in isas() {
        // All of them few, all of them many, and next to one another.
        for (queries, keys) in [
            ([0, 1, 61, 64, 264, 304], [0, 400, 500, 1700, 1900, 3100]),
            ([0, 3, 3, 8, 9, 9], [0, 1100, 1150, 1150, 1200, 1260]),
            ([0, 20, 220, 220, 250, 270], [0, 300, 900, 950, 950, 957]),
        ] {
            // Rows after the last offset are never read.
            let mut case = Case::new(shape([1, 4, 2, queries[5] + 9, keys[5] + 70, 20, 12]), 6);
            case.q.slice_mut(s![.., .., queries[5].., ..]).fill(f32::NAN);
            case.k.slice_mut(s![.., .., keys[5].., ..]).fill(f32::NAN);
            case.v.slice_mut(s![.., .., keys[5].., ..]).fill(f32::NAN);
            let alibi = || AnyScore::Alibi(Alibi::new(4));
            let dense = masked(isa, Causal::new()).build().unwrap();
            let biased = scored(isa, Window::new(Some(100), Some(3)), alibi()).build().unwrap();
            let logistic = sigmoid(isa, Causal::new()).build().unwrap();
            let x = case.x().packed(&queries, &keys);
            let (out, lse) = dense.forward_with_lse(x).unwrap();
            let (biased_out, sigmoid_out) = (biased.forward(x).unwrap(), logistic.forward(x).unwrap());
            let (weights, top) = (dense.weights(x).unwrap(), dense.top_weights(x, 3).unwrap());
            let received = dense.key_weights(x).unwrap();
            near("packed", &dense, x, &out);
            lse_near("packed", &dense, x, &lse);
            let rest = s![.., .., queries[5].., ..];
            for out in [&out, &biased_out, &sigmoid_out, &weights, &top.weights] {
                assert!(out.slice(rest).iter().all(|&x| x == 0.0), "{isa}: rows of no sequence");
            }
            assert!(lse.slice(s![.., .., queries[5]..]).iter().all(|&x| x == f32::NEG_INFINITY), "{isa}");
            assert!(received.slice(s![.., .., keys[5]..]).iter().all(|&x| x == 0.0), "{isa}");
            for i in 0..5 {
                let (rows, columns) = (queries[i]..queries[i + 1], keys[i]..keys[i + 1]);
                let part = s![.., .., rows.clone(), ..];
                let one = Qkv::new(
                    case.q.slice(part),
                    case.k.slice(s![.., .., columns.clone(), ..]),
                    case.v.slice(s![.., .., columns.clone(), ..]),
                );
                let what = format!("{isa}, sequence {i}");
                let (alone, alone_lse) = dense.forward_with_lse(one).unwrap();
                same_bits(&what, &out.slice(part).to_owned(), &alone);
                same_bits(&what, &lse.slice(s![.., .., rows.clone()]).to_owned(), &alone_lse);
                same_bits(&what, &biased_out.slice(part).to_owned(), &biased.forward(one).unwrap());
                same_bits(&what, &sigmoid_out.slice(part).to_owned(), &logistic.forward(one).unwrap());
                let block = s![.., .., rows.clone(), columns.clone()];
                same_bits(&what, &weights.slice(block).to_owned(), &dense.weights(one).unwrap());
                let total: f32 = weights.slice(s![.., .., rows.clone(), ..]).iter().sum();
                let inside: f32 = weights.slice(block).iter().sum();
                assert_eq!(total, inside, "{what}: weights outside the sequence");
                let alone = dense.top_weights(one, 3).unwrap();
                assert_eq!(top.keys.slice(part), alone.keys, "{what}");
                assert_eq!(top.weights.slice(part), alone.weights, "{what}");
                let received = received.slice(s![.., .., columns]).to_owned();
                same_bits(&what, &received, &dense.key_weights(one).unwrap());
            }
        }
    }
}

#[test]
fn documents_are_a_packed_batch() {
    for isa in isas() {
        let ends = [0, 30, 31, 90, 300];
        let case = Case::new(shape([1, 2, 1, 300, 300, 16, 8]), 8);
        let ids: Vec<u32> = (0..300).map(|i| ends.iter().filter(|&&end| end <= i).count() as u32).collect();
        let documents = masked(isa, Documents::new(&ids).and(Causal::new())).build().unwrap();
        let packed = masked(isa, Causal::new()).build().unwrap();
        let x = case.x().packed(&ends, &ends);
        near("documents as packed", &packed, x, &documents.forward(case.x()).unwrap());
        near("packed as documents", &documents, case.x(), &packed.forward(x).unwrap());
        // A tree of several roots behind no context is the same again.
        let parents: Vec<_> = (0..300).map(|i| if ends.contains(&i) { None } else { Some(i - 1) }).collect();
        let tree = masked(isa, Tree::new(&parents).unwrap()).build().unwrap();
        same_bits("tree", &tree.forward(case.x()).unwrap(), &documents.forward(case.x()).unwrap());
    }
}

#[test]
fn key_lengths_are_slices() {
    for isa in isas() {
        for n in [shape([4, 4, 2, 3, 1100, 20, 12]), shape([4, 2, 1, 50, 330, 16, 33])] {
            let mut case = Case::new(n, 9);
            let lengths = [n.kv_len, 0, n.kv_len / 2 + 3, 2];
            let dense = masked(isa, Causal::new()).build().unwrap();
            let prefix = scored(isa, Prefix::new(5), AnyScore::Alibi(Alibi::new(n.q_heads))).build().unwrap();
            let logistic = sigmoid(isa, Unmasked).build().unwrap();
            // What lies behind the lengths is never read.
            for (b, &len) in lengths.iter().enumerate() {
                case.k.slice_mut(s![b, .., len.., ..]).fill(f32::NAN);
                case.v.slice_mut(s![b, .., len.., ..]).fill(f32::INFINITY);
            }
            let x = case.x().key_lengths(&lengths);
            let (out, lse) = dense.forward_with_lse(x).unwrap();
            let (with_prefix, by_sigmoid) = (prefix.forward(x).unwrap(), logistic.forward(x).unwrap());
            near("key lengths", &dense, x, &out);
            for (b, &len) in lengths.iter().enumerate() {
                let one = s![b..b + 1, .., .., ..];
                let cut = s![b..b + 1, .., ..len, ..];
                let sliced = Qkv::new(case.q.slice(one), case.k.slice(cut), case.v.slice(cut));
                let (alone, alone_lse) = dense.forward_with_lse(sliced).unwrap();
                let what = format!("{isa}, {len} of {} keys", n.kv_len);
                same_bits(&what, &out.slice(one).to_owned(), &alone);
                same_bits(&what, &lse.slice(s![b..b + 1, .., ..]).to_owned(), &alone_lse);
                same_bits(&what, &with_prefix.slice(one).to_owned(), &prefix.forward(sliced).unwrap());
                same_bits(&what, &by_sigmoid.slice(one).to_owned(), &logistic.forward(sliced).unwrap());
            }
        }
    }
}

/// A prompt in pieces, each against all keys up to its own.
#[test]
fn chunked_prefill() {
    for isa in isas() {
        for (len, past, cuts) in [(11, 700, vec![0, 1, 4, 11]), (230, 60, vec![0, 20, 208, 230])] {
            let case = Case::new(shape([1, 2, 2, len, past + len, 16, 12]), 10);
            let dense = masked(isa, Causal::new()).build().unwrap();
            let (whole, whole_lse) = dense.forward_with_lse(case.x()).unwrap();
            for pair in cuts.windows(2) {
                let rows = s![.., .., pair[0]..pair[1], ..];
                let end = past + pair[1];
                // With the keys that there are, aligned by default.
                let x = Qkv::new(case.q.slice(rows), keys(&case.k, 0..end), keys(&case.v, 0..end));
                let (out, lse) = dense.forward_with_lse(x).unwrap();
                let what = format!("{isa}, queries {pair:?} of {len}");
                same_bits(&what, &out, &whole.slice(rows).to_owned());
                same_bits(&what, &lse, &whole_lse.slice(s![.., .., pair[0]..pair[1]]).to_owned());
                // With all keys, those to come included.
                let at = masked(isa, Causal::at((past + pair[0]) as isize)).build().unwrap();
                let x = Qkv::new(case.q.slice(rows), case.k.view(), case.v.view());
                same_bits(&what, &at.forward(x).unwrap(), &out);
            }
        }
    }
}

// ---- merging ----

type Part = (Array4<f32>, Array3<f32>);

fn merged(a: &Part, b: &Part) -> Part {
    merge::merge((a.0.view(), a.1.view()), (b.0.view(), b.1.view())).unwrap()
}

#[test]
fn parts_merge_into_the_whole() {
    each(|isa, n, case, what| {
        let q_start = n.kv_len as isize - n.q_len as isize;
        let whole = masked(isa, Causal::new()).build().unwrap();
        let mut uniform = uniform(11);
        for parts in [1, 2, 5] {
            let mut cuts: Vec<usize> =
                (1..parts).map(|_| (uniform() * n.kv_len as f64) as usize).chain([0, n.kv_len]).collect();
            // A part without keys, too.
            cuts.push(cuts[0]);
            cuts.sort_unstable();
            let mut parts: Vec<Part> = cuts
                .windows(2)
                .map(|pair| {
                    let range = pair[0]..pair[1];
                    let x = Qkv::new(case.q.view(), keys(&case.k, range.clone()), keys(&case.v, range));
                    let mask = Causal::at(q_start - pair[0] as isize);
                    masked(isa, mask).build().unwrap().forward_with_lse(x).unwrap()
                })
                .collect();
            // A part of which nothing is visible, whatever is in it.
            let nothing = masked(isa, Unmasked.not()).build().unwrap().forward_with_lse(case.x()).unwrap();
            assert!(nothing.0.iter().all(|&x| x == 0.0));
            assert!(nothing.1.iter().all(|&x| x == f32::NEG_INFINITY));
            parts.insert(1, nothing.clone());

            let fold = |parts: &[Part]| parts.iter().skip(1).fold(parts[0].clone(), |a, b| merged(&a, b));
            let forwards = fold(&parts);
            let backwards = fold(&parts.iter().rev().cloned().collect::<Vec<_>>());
            let (left, right) = parts.split_at(parts.len() / 2);
            let halves = merged(&fold(left), &fold(right));
            for (order, (out, lse)) in
                [("forwards", &forwards), ("backwards", &backwards), ("halves", &halves)]
            {
                let what = format!("{what}, {} parts {order}", parts.len());
                near(&what, &whole, case.x(), out);
                lse_near(&what, &whole, case.x(), lse);
            }
            // What sees nothing changes nothing, on either side.
            for (a, b) in [(&forwards, &nothing), (&nothing, &forwards)] {
                let (out, lse) = merged(a, b);
                same_bits(what, &out, &forwards.0);
                same_bits(what, &lse, &forwards.1);
            }
            // Order does not matter to two.
            let (ab, ba) = (merged(&parts[0], &parts[2]), merged(&parts[2], &parts[0]));
            same_bits(what, &ab.0, &ba.0);
            same_bits(what, &ab.1, &ba.1);
        }
    });
}

/// The keys of a hole-ridden mask and those it hides are all keys.
#[test]
fn complements_merge_into_the_whole() {
    each(|isa, n, case, what| {
        let holes = &*Box::leak(Box::new(holes(n, 12)));
        let part = |mask: AnyMask| masked(isa, mask).build().unwrap().forward_with_lse(case.x()).unwrap();
        let seen = part(Box::new(Boolean::new(holes.view())));
        let hidden = part(Box::new(Boolean::new(holes.view()).not()));
        let (out, lse) = merged(&seen, &hidden);
        let whole = masked(isa, Unmasked).build().unwrap();
        near(what, &whole, case.x(), &out);
        lse_near(what, &whole, case.x(), &lse);
    });
}

#[test]
fn merging_half_types() {
    let case = Case::new(shape([1, 2, 1, 20, 300, 16, 12]), 13);
    fn check<T: attention_kernels::Element>(case: &Case<T>) {
        let dense = masked(Isa::choose(None).unwrap(), Unmasked).build().unwrap();
        let part = |range: std::ops::Range<usize>| {
            let x = Qkv::new(case.q.view(), keys(&case.k, range.clone()), keys(&case.v, range));
            dense.forward_with_lse(x).unwrap()
        };
        let ((a, a_lse), (b, b_lse)) = (part(0..170), part(170..300));
        let (out, _) = merge::merge((a.view(), a_lse.view()), (b.view(), b_lse.view())).unwrap();
        let (want, bound) = (dense.reference(case.x()).unwrap(), dense.error_bound(case.x()).unwrap());
        for ((b, h, i, c), x) in out.indexed_iter() {
            let want = want[[b, h, i, c]];
            let off = (x.to_f64() - want).abs();
            // Rounded as a part, and once more merged. Parts may be larger than the whole.
            let largest = case.v.iter().map(|x| x.to_f64().abs()).fold(0.0, f64::max);
            assert!(off <= bound[[b, h, i]] + 2.0 * T::ROUNDING * largest, "{x:?}, not {want}");
        }
    }
    check(&case.map(f16::from_f32));
    check(&case.map(bf16::from_f32));
}

/// A prefix that all sequences share, attended to once for all, and what
/// each has of its own.
#[test]
fn cascade() {
    for isa in isas() {
        for (q_len, prefix, suffix) in [(1, 1500, 40), (3, 70, 20), (40, 300, 60)] {
            let batch = 3;
            let shared = Case::new(shape([1, 4, 2, 1, prefix, 16, 12]), 14);
            let own = Case::new(shape([batch, 4, 2, q_len, suffix, 16, 12]), 15);
            let causal = masked(isa, Causal::new()).build().unwrap();
            // The queries of all sequences side by side, as one sequence.
            let q = own
                .q
                .view()
                .permuted_axes([1, 0, 2, 3])
                .to_shape((1, 4, batch * q_len, 16))
                .unwrap()
                .to_owned();
            let all = masked(isa, Unmasked).build().unwrap();
            let (out, lse) =
                all.forward_with_lse(Qkv::new(q.view(), shared.k.view(), shared.v.view())).unwrap();
            let out = out.to_shape((4, batch, q_len, 12)).unwrap().permuted_axes([1, 0, 2, 3]).to_owned();
            let lse = lse.to_shape((4, batch, q_len)).unwrap().permuted_axes([1, 0, 2]).to_owned();
            let suffixes = causal.forward_with_lse(own.x()).unwrap();
            let (out, lse) = merged(&(out, lse), &suffixes);
            let k = shared.k.broadcast((batch, 2, prefix, 16)).unwrap();
            let v = shared.v.broadcast((batch, 2, prefix, 12)).unwrap();
            let k = concatenate(Axis(2), &[k, own.k.view()]).unwrap();
            let v = concatenate(Axis(2), &[v, own.v.view()]).unwrap();
            let whole = Qkv::new(own.q.view(), k.view(), v.view());
            near("cascade", &causal, whole, &out);
            lse_near("cascade", &causal, whole, &lse);
        }
    }
}

// ---- the state of one row ----

#[track_caller]
fn equal_states(a: State, b: State) {
    let ((a, a_lse), (b, b_lse)) = (a.finish(), b.finish());
    assert!(a_lse == b_lse || (a_lse - b_lse).abs() < 1e-12, "{a_lse} is not {b_lse}");
    for (x, y) in a.iter().zip(&b) {
        assert!((x - y).abs() < 1e-12, "{a:?} is not {b:?}");
    }
}

fn state(keys: &[(f64, [f64; 2])]) -> State {
    let mut state = State::empty(2);
    for (score, value) in keys {
        state.push(*score, value);
    }
    state
}

fn both(a: &State, b: &State) -> State {
    let mut a = a.clone();
    a.merge(b);
    a
}

#[test]
fn the_algebra_of_states() {
    let mut uniform = uniform(16);
    for spread in [1.0, 30.0, 2000.0] {
        let keys: Vec<_> = (0..12).map(|_| (spread * (uniform() - 0.5), [uniform(), -uniform()])).collect();
        let all = state(&keys);
        // Any split, in any order.
        for cut in 0..=12 {
            let (a, b) = (state(&keys[..cut]), state(&keys[cut..]));
            equal_states(both(&a, &b), all.clone());
            equal_states(both(&b, &a), all.clone());
        }
        let (a, b, c) = (state(&keys[..3]), state(&keys[3..7]), state(&keys[7..]));
        equal_states(both(&both(&a, &b), &c), both(&a, &both(&b, &c)));
        // No keys are the identity.
        let none = State::empty(2);
        assert_eq!(both(&all, &none), all);
        equal_states(both(&none, &all), all.clone());
        // A state is its output and LSE.
        let (out, lse) = all.clone().finish();
        equal_states(State::of(&out, lse), all.clone());
        equal_states(
            both(&State::of(&out, lse), &state(&[(1.0, [2.0, 3.0])])),
            both(&all, &state(&[(1.0, [2.0, 3.0])])),
        );
        // Against the definition.
        let top = keys.iter().map(|x| x.0).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = keys.iter().map(|x| (x.0 - top).exp()).sum();
        let mean: f64 = keys.iter().map(|x| (x.0 - top).exp() * x.1[0]).sum::<f64>() / sum;
        assert!((lse - (top + sum.ln())).abs() < 1e-12 && (out[0] - mean).abs() < 1e-12);
    }
}

#[test]
fn states_of_nothing_and_of_infinities() {
    let none = State::empty(2);
    assert_eq!(none.clone().finish(), (vec![0.0, 0.0], f64::NEG_INFINITY));
    assert_eq!(both(&none, &none), none);
    assert_eq!(State::of(&[0.0, 0.0], f64::NEG_INFINITY), none);
    // A score of -inf adds nothing, whatever the value.
    let one = state(&[(0.5, [1.0, 2.0])]);
    for value in [f64::NAN, f64::INFINITY] {
        let mut with = one.clone();
        with.push(f64::NEG_INFINITY, &[value, value]);
        assert_eq!(with, one);
        // Nor does an LSE of -inf, whatever the output.
        let nothing = State::of(&[value, value], f64::NEG_INFINITY);
        assert_eq!(both(&one, &nothing), one);
        equal_states(both(&nothing, &one), one.clone());
        equal_states(nothing, none.clone());
    }
    // A score of +inf takes everything; two share.
    let all = state(&[(0.5, [1.0, 2.0]), (f64::INFINITY, [3.0, 5.0]), (700.0, [9.0, 9.0])]);
    assert_eq!(all.finish(), (vec![3.0, 5.0], f64::INFINITY));
    let two = both(&state(&[(f64::INFINITY, [3.0, 5.0])]), &state(&[(f64::INFINITY, [1.0, 1.0])]));
    assert_eq!(two.finish(), (vec![2.0, 3.0], f64::INFINITY));
    // NaN shows, and stays.
    let mut nan = state(&[(0.5, [1.0, 2.0])]);
    nan.push(f64::NAN, &[1.0, 1.0]);
    nan.push(2.0, &[1.0, 1.0]);
    assert!(nan.clone().finish().0[0].is_nan() && nan.finish().1.is_nan());
    let mut nan = State::empty(2);
    nan.push(f64::NAN, &[1.0, 1.0]);
    assert!(both(&one, &nan).finish().1.is_nan() && both(&nan, &one).finish().1.is_nan());
    // Values that are too long or too short.
    let mut odd = State::empty(2);
    odd.push(0.0, &[1.0]);
    odd.push(0.0, &[3.0, 4.0, 5.0]);
    assert_eq!(odd.finish().0, [2.0, 2.0]);
}

#[test]
fn merging_infinities() {
    let lse = |x: f32| Array3::from_elem((1, 1, 1), x);
    let out = |x: f32| Array4::from_elem((1, 1, 1, 1), x);
    let run = |a: (f32, f32), b: (f32, f32)| {
        let (out, lse) = merged(&(out(a.0), lse(a.1)), &(out(b.0), lse(b.1)));
        (out[[0, 0, 0, 0]], lse[[0, 0, 0]])
    };
    let nothing = f32::NEG_INFINITY;
    assert_eq!(run((0.0, nothing), (0.0, nothing)), (0.0, nothing));
    assert_eq!(run((f32::NAN, nothing), (2.0, 1.0)), (2.0, 1.0));
    assert_eq!(run((2.0, 1.0), (f32::NAN, nothing)), (2.0, 1.0));
    assert_eq!(run((2.0, f32::INFINITY), (4.0, 1.0)), (2.0, f32::INFINITY));
    assert_eq!(run((2.0, f32::INFINITY), (4.0, f32::INFINITY)), (3.0, f32::INFINITY));
    assert_eq!(run((2.0, 5.0), (4.0, 5.0)), (3.0, 5.0 + std::f32::consts::LN_2));
    for (a, b) in [((1.0, f32::NAN), (1.0, 2.0)), ((1.0, 2.0), (1.0, f32::NAN))] {
        let (out, lse) = run(a, b);
        assert!(out.is_nan() && lse.is_nan());
    }
    let (sum, _) = run((f32::INFINITY, 0.0), (1.0, 0.0));
    assert_eq!(sum, f32::INFINITY);
}

// ---- sigmoid ----

#[test]
fn sigmoid_parts_add_up() {
    each(|isa, n, case, what| {
        for bias in [0.0, -3.5] {
            let logistic = sigmoid(isa, Unmasked).bias(bias).build().unwrap();
            let cuts = [0, n.kv_len / 3, n.kv_len / 3, n.kv_len];
            let mut sum = Array4::<f64>::zeros((n.batch, n.q_heads, n.q_len, n.value_dim));
            for pair in cuts.windows(2) {
                let range = pair[0]..pair[1];
                let x = Qkv::new(case.q.view(), keys(&case.k, range.clone()), keys(&case.v, range));
                sum += &wide(&logistic.forward(x).unwrap());
            }
            let bound = logistic.error_bound(case.x()).unwrap();
            within(what, &sum.mapv(|x| x as f32), logistic.reference(case.x()).unwrap().view(), &bound);
        }
    });
}

#[test]
fn sigmoid_limits() {
    each(|isa, n, case, what| {
        // All scores 0: every weight is 1 / (n + 1), their sum n / (n + 1).
        let mut zero = case.clone();
        zero.q.fill(0.0);
        zero.v.fill(1.0);
        let logistic = sigmoid(isa, Unmasked).build().unwrap();
        let want = n.kv_len as f32 / (n.kv_len as f32 + 1.0);
        assert!(logistic.forward(zero.x()).unwrap().iter().all(|x| (x - want).abs() < 1e-6), "{what}");
        let weights = logistic.weights(zero.x()).unwrap();
        let want = 1.0 / (n.kv_len as f32 + 1.0);
        assert!(weights.iter().all(|x| (x / want - 1.0).abs() < 1e-6), "{what}");

        // One key without bias and score: half its value, exactly.
        let (k, v) = (keys(&zero.k, 0..1), keys(&case.v, 0..1));
        let half = sigmoid(isa, Unmasked).bias(0.0).build().unwrap();
        let out = half.forward(Qkv::new(zero.q.view(), k, v)).unwrap();
        let group = n.q_heads / n.kv_heads;
        for ((b, h, _, c), &x) in out.indexed_iter() {
            assert_eq!(x, 0.5 * v[[b, h / group, 0, c]], "{what}");
        }

        // Far below 0 it is an exponential without normalisation.
        let far = sigmoid(isa, Unmasked).bias(-40.0).build().unwrap();
        let softmax = masked(isa, Unmasked).build().unwrap();
        let (out, lse) = (softmax.reference(case.x()).unwrap(), softmax.reference_lse(case.x()).unwrap());
        let bound = far.error_bound(case.x()).unwrap().mapv(|x| x * (1.0 + 1e-6));
        let want = Array4::from_shape_fn(out.dim(), |(b, h, i, c)| {
            out[[b, h, i, c]] * (lse[[b, h, i]] - 40.0).exp()
        });
        within(what, &far.forward(case.x()).unwrap(), want.view(), &bound);

        // What is masked has a weight of exactly 0, NaN or not.
        let mut poisoned = case.clone();
        poisoned.v.slice_mut(s![.., .., 1.., ..]).fill(f32::NAN);
        poisoned.k.slice_mut(s![.., .., 1.., ..]).fill(f32::NAN);
        let first = sigmoid(isa, mask_fn(|_, _, j| j == 0)).bias(0.0).build().unwrap();
        let want = first.forward(case.x()).unwrap();
        same_bits(what, &first.forward(poisoned.x()).unwrap(), &want);
        let weights = first.weights(poisoned.x()).unwrap();
        assert!(weights.slice(s![.., .., .., 1..]).iter().all(|&x| x == 0.0), "{what}");
    });
}

// ---- selective ----

fn temperatures(n: Shape, query: f32, value: f32) -> (Array3<f32>, Array3<f32>) {
    (
        Array3::from_elem((n.batch, n.q_heads, n.q_len), query),
        Array3::from_elem((n.batch, n.kv_heads, n.kv_len), value),
    )
}

#[test]
fn temperatures_of_queries_and_values() {
    each(|isa, n, case, what| {
        let tempered = selective(isa, Causal::new()).build().unwrap();
        // AMX tiles do not serve temperatures: those run as on AVX-512.
        let isa = if isa == Isa::Amx { Isa::Avx512 } else { isa };
        let dense = masked(isa, Causal::new()).build().unwrap();
        let run = |query: &Array3<f32>, value: &Array3<f32>| {
            let x = Tempered { qkv: case.x(), query: query.view(), value: value.view() };
            tempered.forward_with_lse(x).unwrap()
        };
        // Temperatures of 1 are none.
        let (ones, one_values) = temperatures(n, 1.0, 1.0);
        let (out, lse) = run(&ones, &one_values);
        let (want, want_lse) = dense.forward_with_lse(case.x()).unwrap();
        same_bits(what, &out, &want);
        same_bits(what, &lse, &want_lse);

        // A query temperature is a factor of the scale, ...
        let (twos, _) = temperatures(n, 2.0, 1.0);
        let scale = 2.0 / (n.head_dim as f32).sqrt();
        let (want, want_lse) =
            masked(isa, Causal::new()).scale(scale).build().unwrap().forward_with_lse(case.x()).unwrap();
        let (out, lse) = run(&twos, &one_values);
        let close = Array3::from_elem(lse.dim(), 4e-5);
        within(what, &out, wide(&want).view(), &close);
        for (&a, &b) in lse.iter().zip(&want_lse) {
            assert!(a == b || (a - b).abs() < 4e-5, "{what}: {a}, not {b}");
        }
        // ... or of the query: exactly, where it is a power of two.
        let doubled = case.q.mapv(|x| 2.0 * x);
        let x = Qkv::new(doubled.view(), case.k.view(), case.v.view());
        same_bits(what, &out, &dense.forward(x).unwrap());

        // Of 0: the mean of what is visible.
        let (zeros, _) = temperatures(n, 0.0, 1.0);
        let (out, lse) = run(&zeros, &one_values);
        let mut still = case.clone();
        still.q.fill(0.0);
        near(what, &dense, still.x(), &out);
        lse_near(what, &dense, still.x(), &lse);

        // Below 0 it turns preferences round.
        let (minus, _) = temperatures(n, -1.0, 1.0);
        let turned = case.q.mapv(|x| -x);
        let x = Qkv::new(turned.view(), case.k.view(), case.v.view());
        near(what, &dense, x, &run(&minus, &one_values).0);

        // Values scale: by a constant the output, each by its own each value.
        let (_, halves) = temperatures(n, 1.0, -0.5);
        let (halved, halved_lse) = run(&ones, &halves);
        let (want, want_lse) = run(&ones, &one_values);
        same_bits(what, &halved, &want.mapv(|x| 0.0 - 0.5 * x));
        same_bits(what, &halved_lse, &want_lse);
        let mut normal = normal(17);
        let own = Array3::from_shape_simple_fn((n.batch, n.kv_heads, n.kv_len), || 1.0 + normal());
        let scaled = &case.v * &own.view().insert_axis(Axis(3));
        let x = Qkv::new(case.q.view(), case.k.view(), scaled.view());
        near(what, &dense, x, &run(&ones, &own).0);
    });
}

// ---- faces and layouts ----

#[test]
fn trait_objects() {
    type AnyAttention = dyn for<'a> Attention<Qkv<'a, f32>>;
    let mechanisms: Vec<Box<AnyAttention>> = vec![
        Box::new(masked(Isa::Scalar, Causal::new()).build().unwrap()),
        Box::new(sigmoid(Isa::Scalar, Unmasked).build().unwrap()),
    ];
    let dense = masked(Isa::Scalar, Causal::new()).build().unwrap();
    let logistic = sigmoid(Isa::Scalar, Unmasked).build().unwrap();
    assert_eq!(mechanisms[0].name(), dense.name());
    for n in [SHAPES[0], SHAPES[1]] {
        let case = Case::new(n, 18);
        let x = case.x();
        same_bits("dense", &mechanisms[0].forward(x).unwrap(), &dense.forward(x).unwrap());
        same_bits("sigmoid", &mechanisms[1].forward(x).unwrap(), &logistic.forward(x).unwrap());
        let mut out = Array4::zeros((n.batch, n.q_heads, n.q_len, n.value_dim));
        mechanisms[0].forward_into(x, out.view_mut(), &mut Workspace::new()).unwrap();
        same_bits("into", &out, &dense.forward(x).unwrap());
        assert_eq!(mechanisms[0].reference(x).unwrap(), dense.reference(x).unwrap());
        assert_eq!(mechanisms[0].cost(x).unwrap(), dense.cost(x).unwrap());
        assert_eq!(mechanisms[0].workspace_bytes(x).unwrap(), dense.workspace_bytes(x).unwrap());
    }
}

/// The same numbers in another order in memory.
fn layouts(x: &Array4<f32>) -> Vec<(&'static str, Array4<f32>)> {
    let permuted = |order: [usize; 4]| {
        let mut back = [0; 4];
        for (i, &axis) in order.iter().enumerate() {
            back[axis] = i;
        }
        x.view().permuted_axes(order).as_standard_layout().to_owned().permuted_axes(back)
    };
    let (b, h, n, d) = x.dim();
    // Each element with others between, and back to front.
    let mut sparse = Array4::from_elem((b, h, 2 * n, 3 * d), f32::NAN);
    sparse.slice_mut(s![.., .., ..;2, ..;3]).assign(x);
    let mut reversed = x.slice(s![.., ..;-1, ..;-1, ..;-1]).as_standard_layout().to_owned();
    for axis in 1..4 {
        reversed.invert_axis(Axis(axis));
    }
    vec![
        ("[batch, len, heads, dim]", permuted([0, 2, 1, 3])),
        ("[len, batch, heads, dim]", permuted([2, 0, 1, 3])),
        ("[batch, heads, dim, len]", permuted([0, 1, 3, 2])),
        ("[dim, len, heads, batch]", permuted([3, 2, 1, 0])),
        ("sparse", sparse.slice_move(s![.., .., ..;2, ..;3])),
        ("reversed", reversed),
    ]
}

#[test]
fn layouts_of_inputs() {
    each(|isa, _, case, what| {
        let dense = masked(isa, Causal::new()).build().unwrap();
        let (want, want_lse) = dense.forward_with_lse(case.x()).unwrap();
        let (q, k, v) = (layouts(&case.q), layouts(&case.k), layouts(&case.v));
        for i in 0..q.len() {
            // Each by itself, and all of them.
            for (a, b, c) in [
                (&q[i].1, &case.k, &case.v),
                (&case.q, &k[i].1, &case.v),
                (&case.q, &case.k, &v[i].1),
                (&q[i].1, &k[i].1, &v[i].1),
            ] {
                let (out, lse) = dense.forward_with_lse(Qkv::new(a.view(), b.view(), c.view())).unwrap();
                same_bits(&format!("{what}: {}", q[i].0), &out, &want);
                same_bits(&format!("{what}: {}", q[i].0), &lse, &want_lse);
            }
        }
    });
}

/// Keys and values that are one row again and again, of stride 0.
#[test]
fn broadcast_inputs() {
    each(|isa, _, case, what| {
        let dense = masked(isa, Causal::new()).build().unwrap();
        let row = |x: &Array4<f32>| x.slice(s![.., .., 0..1, ..]).to_owned();
        let (k, v) = (row(&case.k), row(&case.v));
        let (k, v) = (k.broadcast(case.k.dim()).unwrap(), v.broadcast(case.v.dim()).unwrap());
        let out = dense.forward(Qkv::new(case.q.view(), k, v)).unwrap();
        let (k, v) = (k.to_owned(), v.to_owned());
        same_bits(what, &out, &dense.forward(Qkv::new(case.q.view(), k.view(), v.view())).unwrap());
    });
}

#[test]
fn layouts_of_outputs() {
    fn check<T: attention_kernels::Element>(isa: Isa, case: &Case<T>, what: &str) {
        let dense = masked(isa, Causal::new()).build().unwrap();
        let (want, want_lse) = dense.forward_with_lse(case.x()).unwrap();
        let (b, h, n, d) = want.dim();
        let check = |name: &str, mut out: ArrayViewMut4<'_, T>, mut lse: ndarray::ArrayViewMut3<'_, f32>| {
            let mut workspace = Workspace::new();
            dense.forward_with_lse_into(case.x(), out.view_mut(), lse.view_mut(), &mut workspace).unwrap();
            same_bits(&format!("{what}: {name}"), &out.mapv(|x| x.to_f32()), &want.mapv(|x| x.to_f32()));
            same_bits(&format!("{what}: {name}, lse"), &lse.to_owned(), &want_lse);
        };
        let nan = T::from_f32(f32::NAN);
        let (mut out, mut lse) =
            (Array4::from_elem((b, n, h, d), nan), Array3::from_elem((n, h, b), f32::NAN));
        check(
            "[batch, len, heads, dim]",
            out.view_mut().permuted_axes([0, 2, 1, 3]),
            lse.view_mut().permuted_axes([2, 1, 0]),
        );
        let mut out = Array4::from_elem((d, n, b, h), nan);
        check(
            "[dim, len, batch, heads]",
            out.view_mut().permuted_axes([2, 3, 1, 0]),
            lse.view_mut().permuted_axes([2, 1, 0]),
        );
        let mark = T::from_f32(-7.0);
        let mut out = Array4::from_elem((b, h, 3 * n, 2 * d + 1), mark);
        let mut lse = Array3::from_elem((b, h, 2 * n), -7f32);
        check(
            "sparse and reversed",
            out.slice_mut(s![.., ..;-1, 1..;3, 1..;-2]),
            lse.slice_mut(s![..;-1, .., ..;-2]),
        );
        // Nothing in between was written to.
        let between = out.iter().filter(|x| x.to_f32() == -7.0).count();
        assert_eq!(between, out.len() - want.len(), "{what}");
        assert_eq!(lse.iter().filter(|&&x| x == -7.0).count(), lse.len() - want_lse.len(), "{what}");
    }
    each(|isa, _, case, what| {
        check(isa, case, what);
        check(isa, &case.map(f16::from_f32), what);
        check(isa, &case.map(bf16::from_f32), what);
    });
}

// ---- forgetting ----

fn gates(n: Shape, gate: impl Fn(usize) -> f32) -> Array3<f32> {
    Array3::from_shape_fn((n.batch, n.q_heads, n.kv_len), |(_, h, j)| gate(h * 31 + j))
}

#[test]
fn forgetting_nothing_is_causal_attention() {
    each(|isa, n, case, what| {
        let causal = masked(isa, Causal::new()).build().unwrap();
        let forget = Forget::new(gates(n, |_| 0.0).view()).unwrap();
        let kept = masked(isa, Causal::new()).score(forget).build().unwrap();
        near(what, &causal, case.x(), &kept.forward(case.x()).unwrap());
    });
}

#[test]
fn forgetting_at_a_fixed_rate_is_alibi() {
    each(|isa, n, case, what| {
        let slopes: Vec<f32> = (0..n.q_heads).map(|h| 0.25 / (1 + h) as f32).collect();
        let gates = Array3::from_shape_fn((n.batch, n.q_heads, n.kv_len), |(_, h, _)| -slopes[h]);
        let alibi = masked(isa, Causal::new()).score(Alibi::from_slopes(&slopes).unwrap()).build().unwrap();
        let forget = Forget::new(gates.view()).unwrap();
        let fading = masked(isa, Causal::new()).score(forget).build().unwrap();
        near(what, &alibi, case.x(), &fading.forward(case.x()).unwrap());
    });
}

/// A gate of 0 is the border of a document.
#[test]
fn forgetting_everything_starts_a_document() {
    each(|isa, n, case, what| {
        let (border, start) = (n.kv_len * 2 / 3, n.kv_len as isize - n.q_len as isize);
        let mut gates = gates(n, |_| 0.0);
        gates.slice_mut(s![.., .., border]).fill(f32::NEG_INFINITY);
        let after = mask_fn(move |_, i, j| j >= border || i as isize + start < border as isize);
        let documents = masked(isa, Causal::new().and(after)).build().unwrap();
        let forget = Forget::new(gates.view()).unwrap();
        let fading = masked(isa, Causal::new()).score(forget).build().unwrap();
        near(what, &documents, case.x(), &fading.forward(case.x()).unwrap());
    });
}

/// What is skipped because it is forgotten weighs no more than was agreed.
#[test]
fn what_is_forgotten_can_be_skipped() {
    each(|isa, n, case, what| {
        let size = |x: &Array4<f32>, axis| x.map_axis(Axis(axis), |row| row.dot(&row).sqrt());
        let most = |x: &Array4<f32>| size(x, 3).iter().fold(0f32, |a, &b| a.max(b));
        let bound = most(&case.q) * most(&case.k) / (n.head_dim as f32).sqrt();
        let forget = Forget::new(gates(n, |j| -4.0 * ((j * 7919) % 10) as f32 / 10.0).view()).unwrap();
        let full = masked(isa, Causal::new()).score(forget.clone()).build().unwrap();
        for tolerance in [0.5, 1e-3, 1e-6] {
            let mask = forget.remembered(bound, tolerance).unwrap();
            let part = masked(isa, mask.clone()).score(forget.clone()).build().unwrap();
            let own = full.weights(case.x()).unwrap();
            let kept = part.weights(case.x()).unwrap();
            let mut skipped = 0;
            for (own, kept) in own.rows().into_iter().zip(kept.rows()) {
                let lost: f32 =
                    own.iter().zip(&kept).filter(|(_, kept)| **kept == 0.0).map(|(own, _)| own).sum();
                assert!(lost <= tolerance * 1.001 || own.sum() == 0.0, "{what}: {lost} of {tolerance} lost");
                skipped += own.iter().zip(&kept).filter(|(own, kept)| **own > 0.0 && **kept == 0.0).count();
            }
            near(what, &part, case.x(), &part.forward(case.x()).unwrap());
            assert!(n.kv_len < 1000 || tolerance < 1e-3 || skipped > 0, "{what}: nothing is skipped");
        }
    });
}

// ---- weights ----

#[test]
fn weights_make_the_output() {
    each(|isa, n, case, what| {
        let sinks = vec![0.5; n.q_heads];
        let dense = masked(isa, Causal::new()).sinks(sinks).build().unwrap();
        let logistic = sigmoid(isa, Causal::new()).build().unwrap();
        let group = n.q_heads / n.kv_heads;
        for (name, weights, reference, bound, own) in [
            (
                "dense",
                dense.weights(case.x()).unwrap(),
                dense.reference(case.x()).unwrap(),
                dense.error_bound(case.x()).unwrap(),
                dense.reference_weights(case.x()).unwrap(),
            ),
            (
                "sigmoid",
                logistic.weights(case.x()).unwrap(),
                logistic.reference(case.x()).unwrap(),
                logistic.error_bound(case.x()).unwrap(),
                logistic.reference_weights(case.x()).unwrap(),
            ),
        ] {
            let mut out = Array4::<f64>::zeros(reference.dim());
            for ((b, h, i, c), x) in out.indexed_iter_mut() {
                *x = (0..n.kv_len)
                    .map(|j| f64::from(weights[[b, h, i, j]]) * f64::from(case.v[[b, h / group, j, c]]))
                    .sum();
            }
            within(&format!("{what}: {name}"), &out.mapv(|x| x as f32), reference.view(), &bound);
            for (&a, &b) in weights.iter().zip(&own) {
                assert!(
                    (f64::from(a) - b).abs() <= 2e-5 * b.max(1e-30),
                    "{what}: {name}: weight {a}, not {b}"
                );
            }
        }
    });
}

/// Scores against their definition, each within the rounding of its sum; hidden
/// ones -inf; and their softmax is the weights.
#[test]
fn weights_come_from_scores() {
    fn check(what: &str, dense: &Dense<AnyMask, impl Score + 'static>, case: &Case) {
        let (got, want) = (dense.scores(case.x()).unwrap(), dense.reference_scores(case.x()).unwrap());
        let size = |x: &Array4<f32>| x.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max);
        let most = size(&case.q) * size(&case.k) * case.q.dim().3 as f64;
        let mut seen = 0;
        for ((i, &got), &want) in got.indexed_iter().zip(&want) {
            let off = (f64::from(got) - want).abs();
            let hidden = want == f64::NEG_INFINITY;
            assert_eq!(hidden, got == f32::NEG_INFINITY, "{what}: {got} at {i:?} for {want}");
            assert!(hidden || off <= 1e-6 * (most + want.abs()), "{what}: {got} at {i:?} for {want}");
            seen += usize::from(!hidden);
        }
        assert!(seen > 0, "{what}");
        let (weights, lse) = (dense.weights(case.x()).unwrap(), dense.reference_lse(case.x()).unwrap());
        for ((b, h, i, j), &weight) in weights.indexed_iter() {
            let want = match lse[[b, h, i]] {
                f64::NEG_INFINITY => 0.0,
                lse => (f64::from(got[[b, h, i, j]]) - lse).exp(),
            };
            assert!((f64::from(weight) - want).abs() <= 1e-4 * want + 1e-30, "{what}: {weight}, not {want}");
        }
    }
    each(|isa, n, case, what| {
        let causal = masked(isa, Causal::new()).build().unwrap();
        check(&format!("{what}: causal"), &causal, case);
        check(&format!("{what}: window"), &masked(isa, Window::new(Some(5), Some(1))).build().unwrap(), case);
        let holes = mask_fn(|_, i, j| (i * 7 + j * 3) % 5 != 0);
        check(&format!("{what}: closure"), &masked(isa, holes).build().unwrap(), case);
        check(
            &format!("{what}: alibi"),
            &masked(isa, Unmasked).score(Alibi::new(n.q_heads)).build().unwrap(),
            case,
        );
        check(
            &format!("{what}: softcap"),
            &masked(isa, Causal::new()).score(Softcap::new(2.0).unwrap()).build().unwrap(),
            case,
        );
        // A sink and the bias of a logistic function come after the scores.
        let sunk = masked(isa, Causal::new()).sinks(vec![0.5; n.q_heads]).build().unwrap();
        let logistic = sigmoid(isa, Causal::new()).bias(-1.5).build().unwrap();
        let scores = causal.scores(case.x()).unwrap();
        same_bits(&format!("{what}: sinks"), &sunk.scores(case.x()).unwrap(), &scores);
        same_bits(&format!("{what}: sigmoid"), &logistic.scores(case.x()).unwrap(), &scores);
    });
}

#[test]
fn key_weights_are_sums() {
    each(|isa, n, case, what| {
        let dense = masked(isa, Causal::new()).build().unwrap();
        let logistic = sigmoid(isa, Window::new(Some(40), None)).build().unwrap();
        let (query, value) = temperatures(n, 1.5, 3.0);
        let x = Tempered { qkv: case.x(), query: query.view(), value: value.view() };
        let tempered = selective(isa, Unmasked).build().unwrap();
        for (weights, sums) in [
            (dense.weights(case.x()).unwrap(), dense.key_weights(case.x()).unwrap()),
            (logistic.weights(case.x()).unwrap(), logistic.key_weights(case.x()).unwrap()),
            (tempered.weights(x).unwrap(), tempered.key_weights(x).unwrap()),
        ] {
            let want = wide(&weights).sum_axis(Axis(2));
            assert_eq!(sums.shape(), want.shape());
            for (&a, &b) in sums.iter().zip(&want) {
                let bound = b * n.q_len as f64 * 2f64.powi(-24);
                assert!((f64::from(a) - b).abs() <= bound, "{what}: {a}, not {b}");
            }
        }
    });
}

/// Keys in order of their weight, the lower of equals first; weights of 0 and
/// NaN are not among them.
fn sorted(weights: &[f32]) -> Vec<(usize, f32)> {
    let mut sorted: Vec<_> = weights.iter().copied().enumerate().filter(|x| x.1 > 0.0).collect();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    sorted
}

#[test]
fn top_weights_are_sorted_weights() {
    each(|isa, n, case, what| {
        // Every key several times, so that there are ties within and across tiles.
        let mut case = case.clone();
        for j in 5..n.kv_len {
            let (k, v) = (
                case.k.slice(s![.., .., j % 5, ..]).to_owned(),
                case.v.slice(s![.., .., j % 5, ..]).to_owned(),
            );
            if j % 3 == 0 {
                case.k.slice_mut(s![.., .., j, ..]).assign(&k);
                case.v.slice_mut(s![.., .., j, ..]).assign(&v);
            }
        }
        let causal = masked(isa, Causal::new()).build().unwrap();
        let narrow = masked(isa, Window::new(Some(3), Some(0))).build().unwrap();
        for (name, dense) in [("causal", causal), ("window of 4", narrow)] {
            let weights = dense.weights(case.x()).unwrap();
            for count in [0, 1, 7, 64, n.kv_len + 3] {
                let top = dense.top_weights(case.x(), count).unwrap();
                for b in 0..n.batch {
                    for h in 0..n.q_heads {
                        for i in 0..n.q_len {
                            let row: Vec<f32> = weights.slice(s![b, h, i, ..]).to_vec();
                            let mut want = sorted(&row);
                            want.truncate(count);
                            want.resize(count, (usize::MAX, 0.0));
                            let got = top
                                .keys
                                .slice(s![b, h, i, ..])
                                .iter()
                                .copied()
                                .zip(top.weights.slice(s![b, h, i, ..]).iter().copied())
                                .collect::<Vec<_>>();
                            assert_eq!(got, want, "{what}: {name}, {count} of row {i}");
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn top_weights_of_ties_and_nan() {
    for (isa, q_len) in isas().into_iter().flat_map(|isa| [(isa, 2), (isa, 30)]) {
        // All scores equal: the lowest keys, in order.
        let n = shape([1, 1, 1, q_len, 600, 8, 4]);
        let mut case = Case::new(n, 19);
        case.q.fill(0.0);
        let dense = masked(isa, Unmasked).build().unwrap();
        let top = dense.top_weights(case.x(), 5).unwrap();
        for (j, &key) in top.keys.indexed_iter().map(|(i, key)| (i.3, key)) {
            assert_eq!(key, j, "{isa}");
        }
        // A NaN key makes every weight of a softmax NaN: none is selected.
        let mut nan = Case::new(n, 19);
        nan.k[[0, 0, 300, 2]] = f32::NAN;
        let top = dense.top_weights(nan.x(), 5).unwrap();
        assert!(top.keys.iter().all(|&key| key == usize::MAX), "{isa}");
        assert!(top.weights.iter().all(|&x| x == 0.0), "{isa}");
        // A sigmoid's other weights are what they were.
        let logistic = sigmoid(isa, Unmasked).build().unwrap();
        let weights = logistic.weights(nan.x()).unwrap();
        assert!(weights.slice(s![0, 0, .., 300]).iter().all(|x| x.is_nan()));
        let top = logistic.top_weights(nan.x(), 600).unwrap();
        for i in 0..q_len {
            let want = sorted(&weights.slice(s![0, 0, i, ..]).to_vec());
            assert_eq!(want.len(), 599);
            let got: Vec<usize> = top.keys.slice(s![0, 0, i, ..]).to_vec();
            assert!(want.iter().map(|x| x.0).eq(got[..599].iter().copied()), "{isa}");
            assert_eq!(got[599], usize::MAX);
        }
    }
}

/// Keys whose weight is too small for `f32` are not among them.
#[test]
fn top_weights_that_vanish() {
    for (isa, q_len) in isas().into_iter().flat_map(|isa| [(isa, 2), (isa, 30)]) {
        let n = shape([1, 1, 1, q_len, 20, 8, 4]);
        let mut case = Case::new(n, 20);
        case.q.fill(1.0);
        case.k.fill(0.0);
        case.k.slice_mut(s![.., .., 7, ..]).fill(100.0);
        let top = masked(isa, Unmasked).build().unwrap().top_weights(case.x(), 3).unwrap();
        for i in 0..q_len {
            assert_eq!(top.keys.slice(s![0, 0, i, ..]).to_vec(), [7, usize::MAX, usize::MAX], "{isa}");
            assert_eq!(top.weights.slice(s![0, 0, i, ..]).to_vec(), [1.0, 0.0, 0.0], "{isa}");
        }
    }
}

/// More than there could be is as many as there are.
#[test]
fn all_weights_are_the_top_weights() {
    let case = Case::new(SHAPES[1], 21);
    let dense = masked(Isa::Scalar, Unmasked).build().unwrap();
    let top = dense.top_weights(case.x(), SHAPES[1].kv_len).unwrap();
    let sums = top.weights.sum_axis(Axis(3));
    assert!(sums.iter().all(|x| (x - 1.0).abs() < 1e-5));
    let mut keys: Vec<usize> = top.keys.slice(s![1, 2, 3, ..]).to_vec();
    keys.sort_unstable();
    assert!(keys.into_iter().eq(0..SHAPES[1].kv_len));
}
