//! Images of their own shapes in one batch, and keys that are no tokens.

use ndarray::{Array4, Axis as Along, Dimension, IxDyn};

use super::tests::{Case, holds, near, noise};
use super::*;
use crate::attention::{Attention, Backward, Mergeable, Weights};
use crate::dense::{Dense, Gated, WithGate};
use crate::mask::Boolean;

/// What windows are, and a bias or none.
type Rule<'a> = (&'a [usize], &'a [usize], &'a [usize], &'a [bool], bool);

fn build(
    builder: NeighborhoodBuilder,
    (window, dilation, stride, causal, bias): Rule<'_>,
) -> NeighborhoodBuilder {
    let builder = builder.dilation(dilation).stride(stride).causal(causal);
    if !bias {
        return builder;
    }
    let shape: Vec<_> = [4].into_iter().chain(window.iter().map(|w| 2 * w - 1)).collect();
    let entry = |at: IxDyn| (at.slice().iter().fold(3, |n, i| (n * 31 + i) % 997) as f32 / 300.0).sin();
    builder.bias(ArrayD::from_shape_fn(IxDyn(&shape), entry))
}

/// Rows of one batch entry.
fn part(x: &Array4<f32>, entry: usize, rows: &[usize]) -> Array4<f32> {
    x.select(Along(0), &[entry]).select(Along(2), rows)
}

/// An image of a batch: its entry, its rows, and the attention that it has alone.
type Image = (usize, Vec<usize>, Neighborhood);

/// All of the batch is what its images have alone, and what is in none is 0.
fn are_alone(what: &str, attention: &Neighborhood, case: &Case, images: &[Image]) {
    let x = case.x();
    holds(what, attention, x);
    let d_out = noise(attention.forward(x).unwrap().dim(), 7);
    let (out, lse) = attention.forward_with_lse(x).unwrap();
    let weights = attention.weights(x).unwrap();
    let sums = attention.key_weights(x).unwrap();
    let top = attention.top_weights(x, 3).unwrap();
    let mut gradients = attention.zero_gradients(x).unwrap();
    for gradients in [&mut gradients.q, &mut gradients.k, &mut gradients.v] {
        gradients.fill(f32::NAN);
    }
    let workspace = &mut crate::Workspace::new();
    attention.backward_into(x, d_out.view(), SavedForward::default(), &mut gradients, workspace).unwrap();
    let saved = SavedForward { softmax: Some((out.view(), lse.view())) };
    let resumed = attention.backward(x, d_out.view(), saved).unwrap();
    near(what, &gradients.q, &resumed.q);
    let exact = attention.reference_backward(x, d_out.view(), SavedForward::default()).unwrap();
    for (got, exact) in [(&gradients.q, &exact.q), (&gradients.k, &exact.k), (&gradients.v, &exact.v)] {
        let off = got.iter().zip(exact).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-4, "{what}: a gradient is off by {off}");
    }
    let (mut rest, mut table) = (out.mapv(|_| true), gradients.table.as_ref().map(|x| x.mapv(|_| 0.0)));
    for (entry, rows, alone) in images {
        let own = [&case.0, &case.1, &case.2].map(|x| part(x, *entry, rows));
        let x = Qkv::new(&own[0], &own[1], &own[2]);
        let (want, want_lse) = alone.forward_with_lse(x).unwrap();
        near(what, &part(&out, *entry, rows), &want);
        let lse = part(&lse.clone().insert_axis(Along(3)), *entry, rows);
        near(what, &lse, &want_lse.insert_axis(Along(3)));
        near(what, &part(&weights, *entry, rows).select(Along(3), rows), &alone.weights(x).unwrap());
        let sums = part(&sums.clone().insert_axis(Along(3)), *entry, rows);
        near(what, &sums, &alone.key_weights(x).unwrap().insert_axis(Along(3)));
        let want_top = alone.top_weights(x, 3).unwrap();
        near(what, &part(&top.weights, *entry, rows), &want_top.weights);
        let named = top.keys.select(Along(0), &[*entry]).select(Along(2), rows);
        for ((own, &key), weight) in want_top.keys.iter().zip(&named).zip(&want_top.weights) {
            assert!(*weight == 0.0 || rows.contains(&key), "{what}: {own} is not {key}");
        }
        let want = alone.backward(x, part(&d_out, *entry, rows).view(), SavedForward::default()).unwrap();
        for (got, want) in [(&gradients.q, &want.q), (&gradients.k, &want.k), (&gradients.v, &want.v)] {
            near(what, &part(got, *entry, rows), want);
        }
        if let (Some(table), Some(want)) = (&mut table, want.table) {
            *table += &want;
        }
        for &row in rows {
            rest.index_axis_mut(Along(0), *entry).index_axis_mut(Along(1), row).fill(false);
        }
    }
    assert!(out.iter().zip(&rest).all(|(x, &rest)| !rest || *x == 0.0), "{what}: padding");
    let pad = rest.index_axis(Along(3), 0);
    assert!(
        lse.iter().zip(&pad).all(|(x, &rest)| !rest || *x == f32::NEG_INFINITY),
        "{what}: LSE of padding"
    );
    for ((b, h, i), _) in pad.indexed_iter().filter(|(_, rest)| **rest) {
        assert!(gradients.q.slice(ndarray::s![b, h, i, ..]).iter().all(|x| *x == 0.0));
        assert!(gradients.k.slice(ndarray::s![b, h / 2, i, ..]).iter().all(|x| *x == 0.0));
    }
    if let (Some(table), Some(got)) = (table, gradients.table) {
        assert!(table.iter().zip(&got).all(|(a, b)| (a - b).abs() < 1e-4), "{what}: table");
    }
}

const RULES: [Rule<'static>; 4] = [
    (&[3, 5], &[1, 1], &[1, 1], &[false, false], false),
    (&[3, 3], &[2, 1], &[1, 2], &[false, true], true),
    (&[1, 4], &[4, 1], &[1, 3], &[true, false], false),
    (&[2, 4], &[1, 1], &[2, 1], &[false, false], true),
];

#[test]
fn packed_images_are_the_images_one_by_one() {
    let check = |shapes: &[Vec<usize>], rule: Rule<'_>| {
        let total = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
        let case = Case::new(total, (4, 2), (20, 12));
        let packed = build(Neighborhood::packed(shapes, rule.0), rule).build().unwrap();
        let mut images = Vec::new();
        for entry in 0..2 {
            let mut first = 0;
            for shape in shapes {
                let len = shape.iter().product::<usize>();
                let alone = build(Neighborhood::builder(shape, rule.0), rule).build().unwrap();
                images.push((entry, (first..first + len).collect(), alone));
                first += len;
            }
        }
        are_alone(&format!("{shapes:?}, {rule:?}"), &packed, &case, &images);
    };
    for rule in RULES {
        check(&[vec![6, 5], vec![17, 23], vec![0, 9], vec![6, 5], vec![13, 8]], rule);
    }
    check(&[vec![9, 0], vec![14, 14]], RULES[0]);
    check(&[vec![60], vec![9], vec![0], vec![150]], (&[4], &[2], &[2], &[true], true));
    check(&[vec![9], vec![300]], (&[7], &[1], &[1], &[false], false));
    check(
        &[vec![3, 4, 5], vec![9, 7, 8], vec![3, 2, 9]],
        (&[3, 2, 3], &[1, 1, 1], &[1, 2, 1], &[false; 3], true),
    );
    check(&[], RULES[1]);
}

#[test]
fn padded_images_are_the_cropped_ones() {
    let check = |shape: &[usize], extents: [Vec<usize>; 2], rule: Rule<'_>| {
        let grid = Grid::new(shape).unwrap();
        let case = Case::new(grid.len(), (4, 2), (20, 12));
        let padded = build(Neighborhood::builder(shape, rule.0).extents(&extents), rule).build().unwrap();
        let images = [0, 1].map(|entry| {
            let own = Grid::spread(&extents[entry], 1);
            let inside = |row: &usize| grid.place(*row).iter().zip(own).all(|(at, size)| *at < size);
            let alone = build(Neighborhood::builder(&extents[entry], rule.0), rule).build().unwrap();
            (entry, (0..grid.len()).filter(inside).collect(), alone)
        });
        are_alone(&format!("{extents:?}, {rule:?}"), &padded, &case, &images);
    };
    for rule in RULES {
        check(&[17, 23], [vec![17, 11], vec![6, 23]], rule);
        check(&[9, 11], [vec![9, 11], vec![0, 4]], rule);
    }
    check(&[70], [vec![70], vec![33]], (&[5], &[3], &[2], &[true], true));
    check(&[4, 7, 9], [vec![4, 5, 6], vec![3, 7, 9]], (&[3, 2, 3], &[1, 1, 2], &[1; 3], &[false; 3], true));
}

/// Tokens of some pattern.
fn pattern(batch: usize, len: usize) -> Array2<bool> {
    Array2::from_shape_fn((batch, len), |(b, i)| (i * 7 + b * 3) % 5 != 0 && !(20..75).contains(&i))
}

#[test]
fn hidden_keys_are_as_in_a_dense_mask() {
    for (shape, window, bias) in [
        (&[14, 11][..], &[5, 4][..], false),
        (&[150], &[9], false),
        (&[13, 12], &[7, 7], true),
        (&[4, 6, 7], &[3, 3, 2], false),
    ] {
        let n: usize = shape.iter().product();
        let case = Case::new(n, (4, 2), (20, 12));
        for batch in [1, 2] {
            let tokens = pattern(batch, n);
            let (ones, causal) = (vec![1; shape.len()], vec![false; shape.len()]);
            let rule = (window, &ones[..], &ones[..], &causal[..], bias);
            let builder = || build(Neighborhood::builder(shape, window), rule);
            let masked = builder().tokens(tokens.clone()).build().unwrap();
            holds(&format!("{shape:?}"), &masked, case.x());
            let d_out = noise((2, 4, n, 12), 9);
            let nothing = SavedForward::default();
            let (got, exact) = (
                masked.backward(case.x(), d_out.view(), nothing).unwrap(),
                masked.reference_backward(case.x(), d_out.view(), nothing).unwrap(),
            );
            for (got, exact) in [(&got.q, &exact.q), (&got.k, &exact.k), (&got.v, &exact.v)] {
                assert!(got.iter().zip(exact).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-4));
            }
            if bias {
                continue;
            }
            let seen = builder().build().unwrap().reference_weights(case.x()).unwrap();
            let visible = Array4::from_shape_fn((2, 1, n, n), |(b, _, i, j)| {
                seen[[0, 0, i, j]] > 0.0 && tokens[[b.min(batch - 1), j]]
            });
            let dense = Dense::builder().mask(Boolean::new(visible.view())).build().unwrap();
            let ((out, lse), (want, want_lse)) =
                (masked.forward_with_lse(case.x()).unwrap(), dense.forward_with_lse(case.x()).unwrap());
            near("dense", &out, &want);
            assert!(lse.iter().zip(&want_lse).all(|(a, b)| a == b || (a - b).abs() < 1e-5));
            // What is hidden fills a window of lines and images, of the volume none.
            let blind = lse.iter().any(|x| *x == f32::NEG_INFINITY);
            assert_eq!(blind, shape.len() < 3, "{shape:?}: some see nothing");
        }
    }
}

/// Everything at once, and what is hidden is NaN.
#[test]
fn padding_never_leaks() {
    let extents = [[9, 7], [6, 12]];
    let (shape, n) = ([10, 12], 120);
    let grid = Grid::new(&shape).unwrap();
    let inside = |b: usize, i: usize| {
        let [y, _, x] = grid.place(i);
        y < extents[b][0] && x < extents[b][1]
    };
    let tokens = pattern(2, n);
    let is_key = |b: usize, i: usize| inside(b, i) && tokens[[b, i]];
    let builder = || Neighborhood::builder(&shape, &[3, 5]).extents(&extents).tokens(tokens.clone());
    let clean = Case::new(n, (4, 2), (16, 8));
    let spoil = |x: &Array4<f32>, keep: &dyn Fn(usize, usize) -> bool| {
        Array4::from_shape_fn(x.dim(), |at| if keep(at.0, at.2) { x[at] } else { f32::NAN })
    };
    let dirty = Case(spoil(&clean.0, &inside), spoil(&clean.1, &is_key), spoil(&clean.2, &is_key));
    let attention = builder().build().unwrap();
    near("NaN", &attention.forward(dirty.x()).unwrap(), &attention.forward(clean.x()).unwrap());
    let d_out = noise((2, 4, n, 8), 5);
    let d_dirty = spoil(&d_out, &inside);
    let back = |case: &Case, d_out: &Array4<f32>| {
        attention.backward(case.x(), d_out.view(), SavedForward::default()).unwrap()
    };
    let (got, want) = (back(&dirty, &d_dirty), back(&clean, &d_out));
    for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
        near("NaN", got, want);
    }
    let gate = noise((2, 4, n, 8), 6);
    let gates = |case: &Case, d_out: &Array4<f32>, gate: &Array4<f32>| {
        let x = WithGate { x: case.x(), gate: gate.view() };
        Gated(builder().build().unwrap()).backward(x, d_out.view(), SavedForward::default()).unwrap()
    };
    let (got, want) = (gates(&dirty, &d_dirty, &spoil(&gate, &inside)), gates(&clean, &d_out, &gate));
    near("gates", &got.gate.unwrap(), &want.gate.unwrap());
    near("gated", &got.q, &want.q);
    // Keys beside the grid are seen by what is no padding.
    let beside = Case::new(3, (4, 2), (16, 8));
    let global = builder().global(3).build().unwrap();
    let x = GlobalQkv::new(dirty.x(), beside.1.view(), beside.2.view());
    let exact = global.define(GlobalQkv::new(clean.x(), beside.1.view(), beside.2.view())).unwrap();
    let (out, lse) = global.forward_with_lse(x).unwrap();
    for ((b, h, i, c), out) in out.indexed_iter() {
        assert!((f64::from(*out) - exact.out[[b, h, i, c]]).abs() < 1e-5, "{:?}", (b, h, i, c));
        assert_eq!(lse[[b, h, i]] == f32::NEG_INFINITY, !inside(b, i));
    }
    assert!(lse.iter().zip(&exact.lse).all(|(a, b)| f64::from(*a) == *b || (f64::from(*a) - b).abs() < 1e-5));
}

#[test]
fn cost_is_that_of_the_images() {
    let case = Case::new(6 * 5 + 7 * 9, (4, 2), (20, 12));
    let flops = |attention: Neighborhood, len: usize| {
        let x = case.x();
        let [q, k, v] = [x.q, x.k, x.v].map(|x| x.slice_move(ndarray::s![.., .., ..len, ..]));
        attention.cost(Qkv::<f32>::new(q, k, v)).unwrap().flops
    };
    let alone = |shape: [usize; 2]| {
        flops(Neighborhood::builder(&shape, &[3, 5]).build().unwrap(), shape[0] * shape[1])
    };
    let all = flops(Neighborhood::packed(&[[6, 5], [7, 9]], &[3, 5]).build().unwrap(), 93);
    assert_eq!(all, alone([6, 5]) + alone([7, 9]));
    let padded = Neighborhood::builder(&[7, 9], &[3, 5]).extents(&[[6, 5], [7, 9]]).build().unwrap();
    assert_eq!(2 * flops(padded, 63), all);
}

#[test]
fn images_that_do_not_fit_are_refused() {
    let refusal = |builder: NeighborhoodBuilder| builder.build().unwrap_err().to_string();
    let packed = |shapes: &[&[usize]]| Neighborhood::packed(shapes, &[3, 3]);
    let window = "window: expected from 1 to 5 places on axis 0 of image 1 at a dilation of 2, got 3";
    assert_eq!(refusal(packed(&[&[6, 6], &[5, 9]]).dilation(&[2, 1])), window);
    assert_eq!(
        refusal(packed(&[&[6, 6], &[7]])),
        "shapes: expected 2 axes as image 0 has them, got 1 of image 1"
    );
    assert_eq!(
        refusal(packed(&[&[1 << 16, 1 << 15][..]; 2])),
        "shapes: expected fewer than 2^32 tokens, got 4294967296"
    );
    assert_eq!(
        refusal(Neighborhood::packed::<[usize; 2]>(&[], &[0, 3])),
        "window: expected from 1 to 0 places on axis 0 at a dilation of 1, got 0"
    );
    let extents = packed(&[&[6, 6]]).extents(&[[3, 3]]);
    assert!(refusal(extents).starts_with("extents cannot be combined with packed images"));
    let padded = |extents: &[&[usize]]| Neighborhood::builder(&[6, 9], &[3, 3]).extents(extents);
    let expected = "extents: expected at most [6, 9], got [7, 3] for batch entry 1";
    assert_eq!(refusal(padded(&[&[6, 9], &[7, 3]])), expected);
    assert_eq!(refusal(padded(&[&[6]])), "extents: expected at most [6, 9], got [6] for batch entry 0");
    let window = "window: expected from 1 to 2 places on axis 1 of batch entry 1 at a dilation of 1, got 3";
    assert_eq!(refusal(padded(&[&[6, 9], &[6, 2]])), window);
    let case = Case::new(54, (2, 1), (4, 4));
    let other = padded(&[&[6, 9], &[6, 3], &[3, 3]]).build().unwrap();
    let expected = "q: expected a batch of 3, one entry for each of the extents, got 2";
    assert_eq!(other.forward(case.x()).unwrap_err().to_string(), expected);
    assert_eq!(other.reference(case.x()).unwrap_err().to_string(), expected);
    let tokens = |dim| Neighborhood::builder(&[6, 9], &[3, 3]).tokens(Array2::from_elem(dim, true));
    let expected = "tokens: expected shape [batch | 1, len] with len = 54 as the shape has it, got [2, 50]";
    assert_eq!(refusal(tokens((2, 50))), expected);
    let expected = "tokens: expected shape [batch | 1, len] with batch = 2 as q has it, got [3, 54]";
    assert_eq!(tokens((3, 54)).build().unwrap().cost(case.x()).unwrap_err().to_string(), expected);
    assert!(refusal(tokens((0, 54)).extents(&[[6, 9]; 2])).starts_with("tokens: expected shape"));
    let few = packed(&[&[6, 6], &[3, 3]]).build().unwrap().forward(case.x()).unwrap_err().to_string();
    assert_eq!(few, "q: expected one row for each of the 45 tokens of the shape, got 54");
}
