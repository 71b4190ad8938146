use ndarray::{Array4, Axis as Along, Dimension, IxDyn, s};

use super::*;
use crate::attention::{Attention, Backward, Bounded, Mergeable, Weights};
use crate::dense::Dense;
use crate::input::Site;
use crate::mask::grid::Local;
use crate::mask::{Mask, Window};
use crate::merge::merge;

pub(super) fn noise(dim: (usize, usize, usize, usize), seed: usize) -> Array4<f32> {
    let number = |(b, h, i, c): (usize, usize, usize, usize)| {
        let n = ((b * 31 + h) * 1009 + i) * 257 + c + 7919 * seed;
        ((n.wrapping_mul(2_654_435_761) >> 7) % 2001) as f32 / 1000.0 - 1.0
    };
    Array4::from_shape_fn(dim, number)
}

pub(super) struct Case(pub(super) Array4<f32>, pub(super) Array4<f32>, pub(super) Array4<f32>);

impl Case {
    pub(super) fn new(len: usize, heads: (usize, usize), dims: (usize, usize)) -> Self {
        let rows = |heads, dim, seed| noise((2, heads, len, dim), seed);
        Self(3.0 * rows(heads.0, dims.0, 1), rows(heads.1, dims.0, 2), rows(heads.1, dims.1, 3))
    }

    pub(super) fn x(&self) -> Qkv<'_, f32> {
        Qkv::new(self.0.view(), self.1.view(), self.2.view())
    }
}

pub(super) fn near(what: &str, a: &Array4<f32>, b: &Array4<f32>) {
    assert_eq!(a.dim(), b.dim(), "{what}");
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-6, "{what}: {worst}");
}

/// Kernel, LSE and weights against the definition.
pub(super) fn holds(what: &str, attention: &Neighborhood, x: Qkv<'_, f32>) {
    let exact = attention.define(x).unwrap();
    let (out, lse) = attention.forward_with_lse(x).unwrap();
    let bound = attention.error_bound(x).unwrap();
    for ((b, h, i, c), out) in out.indexed_iter() {
        let off = (f64::from(*out) - exact.out[[b, h, i, c]]).abs();
        assert!(off <= bound[[b, h, i]], "{what}: {off} at {:?} over {}", (b, h, i, c), bound[[b, h, i]]);
    }
    // Rows that see nothing have -inf.
    let same = |a: f64, b: f64| a == b || (a - b).abs() < 1e-5;
    assert!(lse.iter().zip(&exact.lse).all(|(a, b)| same(f64::from(*a), *b)), "{what}: LSE");
    let weights = attention.weights(x).unwrap();
    let off = weights.iter().zip(&exact.weights).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(off < 1e-5, "{what}: weights off by {off}");
    assert_eq!(weights.mapv(|w| w > 0.0), exact.weights.mapv(|w| w > 0.0), "{what}");
}

fn axes_of(size: usize) -> impl Iterator<Item = Axis> {
    let windows = (1..=size).flat_map(move |w| (1..=size / w).map(move |d| (w, d)));
    let strides = windows.flat_map(|(w, d)| (1..=w).map(move |s| (w, d, s)));
    strides.flat_map(|(window, dilation, stride)| {
        [false, true].map(|causal| Axis { window, dilation, stride, causal })
    })
}

#[test]
fn what_is_reached_is_what_the_rule_says() {
    for size in 1..=11 {
        for axis in axes_of(size) {
            for query in 0..size {
                let group = query % axis.dilation;
                let reach = axis.reach(query / axis.dilation, (size - group).div_ceil(axis.dilation));
                assert!(axis.causal || reach.len() == axis.window, "full size at borders");
                for key in 0..size {
                    let inside = key % axis.dilation == group && reach.contains(&(key / axis.dilation));
                    assert_eq!(inside, axis.sees(size, query, key), "{axis:?} of {size}: {query}, {key}");
                }
                assert!(axis.sees(size, query, query), "{axis:?}: itself");
            }
        }
    }
}

#[test]
fn masks_in_orders_are_the_rule() {
    for shape in [&[9][..], &[4, 13], &[3, 2, 5]] {
        let grid = Grid::new(shape).unwrap();
        let n = grid.len();
        let sizes = grid.sizes();
        let pick = |size: usize, i: usize| axes_of(size).nth(i * 7 % axes_of(size).count()).unwrap();
        for i in 0..40 {
            let axes: [Axis; AXES] = std::array::from_fn(|axis| pick(sizes[axis], i + axis * i));
            let [queries, keys] = orders(grid, axes.map(|axis| axis.dilation));
            let mask = Local::new(queries.clone(), keys.clone(), |axis, at, size| axes[axis].reach(at, size));
            let site = Site { batch: 0, head: 0, q_len: n, kv_len: n };
            for (query, key) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let [a, b] = [(&queries, query), (&keys, key)]
                    .map(|(order, token)| grid.place(order.rows()[token] as usize));
                let sees = (0..AXES).all(|axis| axes[axis].sees(sizes[axis], a[axis], b[axis]));
                assert_eq!(mask.visible(&site, query, key), sees, "{axes:?}");
            }
        }
    }
}

#[test]
fn kernels_follow_the_definition() {
    let bias = |heads: usize, window: &[usize]| {
        let shape: Vec<_> = [heads].into_iter().chain(window.iter().map(|w| 2 * w - 1)).collect();
        ArrayD::from_shape_fn(IxDyn(&shape), |at| {
            (at.slice().iter().fold(3, |n, i| (n * 31 + i) % 997) as f32 / 300.0).sin()
        })
    };
    type Rule<'a> = (&'a [usize], &'a [usize], &'a [usize], &'a [usize], &'a [bool]);
    let cases: [Rule<'_>; 7] = [
        (&[100], &[7], &[3], &[2], &[true]),
        (&[17, 23], &[5, 6], &[1, 1], &[1, 1], &[false, false]),
        (&[17, 23], &[5, 3], &[2, 3], &[1, 2], &[false, true]),
        (&[31, 9], &[13, 9], &[1, 1], &[3, 1], &[true, false]),
        (&[5, 7, 10], &[3, 2, 5], &[1, 2, 1], &[1, 1, 2], &[false, true, false]),
        (&[3, 3], &[3, 3], &[1, 1], &[1, 1], &[false, false]),
        (&[0, 4], &[3, 3], &[1, 1], &[1, 1], &[false, false]),
    ];
    for (shape, window, dilation, stride, causal) in cases {
        let case = Case::new(shape.iter().product(), (4, 2), (20, 12));
        let build = || Neighborhood::builder(shape, window).dilation(dilation).stride(stride).causal(causal);
        for isa in crate::simd::Isa::available() {
            holds(&format!("{isa}, {shape:?}"), &build().isa(isa).build().unwrap(), case.x());
        }
        for heads in [1, 4] {
            let biased = build().bias(bias(heads, window)).build().unwrap();
            holds(&format!("{shape:?} with a bias"), &biased, case.x());
        }
    }
}

#[test]
fn the_whole_extent_is_dense() {
    let case = Case::new(9 * 14, (4, 2), (24, 16));
    let dense = Dense::builder().build().unwrap().forward(case.x()).unwrap();
    for shape in [&[9 * 14][..], &[9, 14], &[3, 3, 14]] {
        let whole = Neighborhood::builder(shape, shape).build().unwrap();
        near("whole", &whole.forward(case.x()).unwrap(), &dense);
    }
}

#[test]
fn dilation_interleaves_problems() {
    let (h, w) = (13, 15);
    let case = Case::new(h * w, (2, 2), (16, 16));
    let dilated = Neighborhood::builder(&[h, w], &[3, 4]).dilation(&[2, 3]).build().unwrap();
    let out = dilated.forward(case.x()).unwrap().into_shape_with_order((2, 2, h, w, 16)).unwrap();
    for (i, j) in (0..2).flat_map(|i| (0..3).map(move |j| (i, j))) {
        let part = |x: &Array4<f32>| {
            let x = x.view().into_shape_with_order((2, 2, h, w, 16)).unwrap();
            let part = x.slice(s![.., .., i..; 2, j..; 3, ..]).to_owned();
            let (rows, cols) = (part.len_of(Along(2)), part.len_of(Along(3)));
            (part.into_shape_with_order((2, 2, rows * cols, 16)).unwrap(), rows, cols)
        };
        let ((q, rows, cols), (k, ..), (v, ..)) = (part(&case.0), part(&case.1), part(&case.2));
        let plain = Neighborhood::builder(&[rows, cols], &[3, 4]).build().unwrap();
        let alone = plain.forward(Qkv::new(q.view(), k.view(), v.view())).unwrap();
        let of_all = out.slice(s![.., .., i..; 2, j..; 3, ..]).to_owned();
        near("interleaved", &of_all.into_shape_with_order(alone.dim()).unwrap(), &alone);
    }
}

#[test]
fn causal_in_one_dimension_is_a_sliding_window() {
    let case = Case::new(300, (2, 1), (32, 16));
    let causal = Neighborhood::builder(&[300], &[40]).causal(&[true]).build().unwrap();
    let sliding = Dense::builder().mask(Window::new(Some(39), Some(0))).build().unwrap();
    near("causal", &causal.forward(case.x()).unwrap(), &sliding.forward(case.x()).unwrap());
}

#[test]
fn a_window_of_one_is_the_value() {
    let case = Case::new(6 * 35, (2, 2), (8, 12));
    let single = Neighborhood::builder(&[6, 35], &[1, 1]).dilation(&[2, 1]).build().unwrap();
    near("single", &single.forward(case.x()).unwrap(), &case.2);
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let builder = |window: &[usize]| Neighborhood::builder(&[6, 9], window);
    let refusal = |builder: NeighborhoodBuilder| builder.build().unwrap_err().to_string();
    let window = "window: expected from 1 to 6 places on axis 0 at a dilation of";
    assert_eq!(refusal(builder(&[3])), "window: expected one for each of the 2 axes, got 1");
    assert_eq!(refusal(builder(&[7, 3])), format!("{window} 1, got 7"));
    assert_eq!(refusal(builder(&[0, 3])), format!("{window} 1, got 0"));
    assert_eq!(refusal(builder(&[4, 3]).dilation(&[2, 1])), format!("{window} 2, got 4"));
    assert_eq!(
        refusal(builder(&[usize::MAX, 3]).dilation(&[3, 1])),
        format!("{window} 3, got {}", usize::MAX)
    );
    let dilation = "dilation: expected at least 1, got 0 on axis 1";
    assert_eq!(refusal(builder(&[3, 3]).dilation(&[1, 0])), dilation);
    let stride = "stride: expected from 1 to the window, 3, on axis 1, got 4";
    assert_eq!(refusal(builder(&[3, 3]).stride(&[1, 4])), stride);
    assert_eq!(
        refusal(builder(&[3, 3]).causal(&[true])),
        "causal: expected one for each of the 2 axes, got 1"
    );
    let bias = builder(&[3, 3]).bias(ArrayD::zeros(IxDyn(&[2, 5, 4])));
    let shape = "bias: expected shape [heads | 1, 2 window - 1, ..] of 2 axes of windows, got [2, 5, 4]";
    assert_eq!(refusal(bias), shape);
    let case = Case::new(54, (2, 1), (4, 4));
    let build = |builder: NeighborhoodBuilder| builder.build().unwrap();
    let heads = build(builder(&[3, 3]).bias(ArrayD::zeros(IxDyn(&[3, 5, 5])))).forward(case.x());
    assert!(heads.unwrap_err().to_string().starts_with("bias: expected shape [q_heads | 1"));
    let lengths = build(builder(&[3, 3])).forward(case.x().key_lengths(&[5, 6]));
    assert!(
        lengths.unwrap_err().to_string().starts_with("key lengths cannot be combined with a spatial shape")
    );
    let tokens = build(Neighborhood::builder(&[6, 8], &[3, 3])).reference(case.x());
    let expected = "q: expected one row for each of the 48 tokens of the shape, got 54";
    assert_eq!(tokens.unwrap_err().to_string(), expected);
}

/// Keys beside the grid are keys of the same softmax.
#[test]
fn keys_beside_the_grid() {
    for (shape, window, bias) in
        [(&[9, 8][..], &[3, 5][..], false), (&[40], &[7], true), (&[3, 4, 5], &[3, 2, 5], false)]
    {
        let n = shape.iter().product();
        let (case, beside) = (Case::new(n, (4, 2), (20, 12)), Case::new(70, (4, 2), (20, 12)));
        let of = |global| {
            let builder = Neighborhood::builder(shape, window).global(global);
            let table = || ArrayD::from_shape_fn(IxDyn(&[4, 13]), |at| at[1] as f32 * 0.1);
            if bias { builder.bias(table()) } else { builder }.build().unwrap()
        };
        let attention = of(70);
        let x = GlobalQkv::new(case.x(), beside.1.view(), beside.2.view());
        let exact = attention.define(x).unwrap();
        let (out, lse) = attention.forward_with_lse(x).unwrap();
        let bound = attention.error_bound(x).unwrap();
        for ((b, h, i, c), out) in out.indexed_iter() {
            assert!((f64::from(*out) - exact.out[[b, h, i, c]]).abs() <= bound[[b, h, i]], "{shape:?}");
        }
        assert!(lse.iter().zip(&exact.lse).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));
        // Windows and the keys beside the grid, each by itself, merge to the same.
        let dense = Dense::builder().build().unwrap();
        let windows = of(0).forward_with_lse(case.x()).unwrap();
        let others = dense.forward_with_lse(Qkv::new(&case.0, &beside.1, &beside.2)).unwrap();
        let [windows, others] = [&windows, &others].map(|(out, lse)| (out.view(), lse.view()));
        near("merged", &merge(windows, others).unwrap().0, &out);
        // Without them it is another call, and with none the same.
        let refusal = attention.forward(case.x()).unwrap_err().to_string();
        assert_eq!(refusal, "global_k: expected 70 keys beside the grid, got none");
    }
    // A window of everything: dense attention over all keys.
    let (case, beside) = (Case::new(30, (2, 2), (16, 8)), Case::new(5, (2, 2), (16, 8)));
    let x = GlobalQkv::new(case.x(), beside.1.view(), beside.2.view());
    let [k, v] = [(&case.1, &beside.1), (&case.2, &beside.2)]
        .map(|(a, b)| ndarray::concatenate(Along(2), &[a.view(), b.view()]).unwrap());
    let dense = Dense::builder().build().unwrap();
    let want = dense.forward(Qkv::new(case.0.view(), k.view(), v.view())).unwrap();
    let all = Neighborhood::builder(&[5, 6], &[5, 6]).global(5).build().unwrap();
    near("dense", &all.forward(x).unwrap(), &want);
    // Gradients are those of the parts, given the whole.
    let d_out = noise(want.dim(), 4);
    let (out, lse) = all.forward_with_lse(x).unwrap();
    let saved = SavedForward { softmax: Some((out.view(), lse.view())) };
    let windows = Neighborhood::builder(&[5, 6], &[5, 6]).build().unwrap();
    let windows = windows.backward(case.x(), d_out.view(), saved).unwrap();
    let others = Qkv::new(&case.0, &beside.1, &beside.2);
    let others = dense.backward(others, d_out.view(), saved).unwrap();
    let whole = Qkv::new(case.0.view(), k.view(), v.view());
    let whole = dense.backward(whole, d_out.view(), SavedForward::default()).unwrap();
    let joined =
        |a: &Array4<f32>, b: &Array4<f32>| ndarray::concatenate(Along(2), &[a.view(), b.view()]).unwrap();
    near("queries", &(&windows.q + &others.q), &whole.q);
    near("keys", &joined(&windows.k, &others.k), &whole.k);
    near("values", &joined(&windows.v, &others.v), &whole.v);
}
