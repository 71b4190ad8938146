//! Gradients of relative positions.

use half::{bf16, f16};
use ndarray::{Array4, ArrayViewD, s};

use super::backward::RelativeGradients;
use super::tests::numbers;
use super::*;
use crate::attention::{Attention, Backward};
use crate::dense::{Dense, SavedForward};
use crate::engine::workspace::Workspace;
use crate::simd::Isa;
use crate::testing::arrays::array;
use crate::testing::gradients::{Arrays, differences, held};
use crate::testing::qkv::Qkvs;

impl<A> Arrays<A> for RelativeGradients<A> {
    fn arrays(&self) -> Vec<(&'static str, ArrayViewD<'_, A>)> {
        let Self { q, k, v, table, content_bias, position_bias, values } = self;
        let mut all =
            vec![("q", q.view().into_dyn()), ("k", k.view().into_dyn()), ("v", v.view().into_dyn())];
        all.push(("table", table.view().into_dyn()));
        all.extend(content_bias.iter().map(|x| ("content_bias", x.view().into_dyn())));
        all.extend(position_bias.iter().map(|x| ("position_bias", x.view().into_dyn())));
        all.extend(values.iter().map(|x| ("values", x.view().into_dyn())));
        all
    }
}

fn bias(heads: usize, dim: usize) -> Array2<f32> {
    numbers((1, heads, dim)).remove_axis(ndarray::Axis(0))
}

/// Music Transformer, Transformer-XL, and Shaw's without and with embeddings of values.
fn builders(heads: usize, reach: usize, dim: usize, value_dim: usize) -> [RelativePositionsBuilder; 5] {
    let u = bias(heads, dim);
    let both = |heads| numbers((heads, 2 * reach + 1, dim));
    let values = |heads| numbers((heads, 2 * reach + 1, value_dim));
    let shaw = RelativePositions::between(both(1).view());
    [
        RelativePositions::builder(numbers((1, reach, dim)).view()),
        RelativePositions::builder(numbers((heads, reach, dim)).view())
            .content_bias(u.view())
            .position_bias((&u * 0.5).view()),
        shaw.clone(),
        shaw.clone().values(values(1).view()),
        RelativePositions::between(both(heads).view())
            .causal()
            .scale(0.3)
            .values(values(heads).view())
            .content_bias(u.view())
            .position_bias((&u * 0.5).view()),
    ]
}

#[test]
fn kernels_keep_to_the_definition() {
    for isa in Isa::available() {
        for (heads, [q_len, kv_len], reach) in [
            ([2, 4, 2], [5, 5], 3),
            ([1, 2, 1], [1, 300], 90),
            ([1, 1, 1], [270, 310], 17),
            ([1, 1, 1], [270, 310], 400),
            ([1, 1, 1], [300, 280], 290),
            ([1, 3, 1], [40, 3], 1),
            ([1, 2, 2], [0, 4], 2),
            ([1, 2, 2], [4, 0], 2),
        ] {
            let [b, h, g] = heads;
            let x = Qkvs::new([b, h, g, q_len, kv_len, 20, 24], 2);
            let d_out = array(9, (b, h, q_len, 24));
            for (i, builder) in builders(h, reach, 20, 24).into_iter().enumerate() {
                let what = format!("{isa}, {i} of {q_len} queries and {kv_len} keys");
                held(&what, &builder.isa(isa).build().unwrap(), x.qkv(), &d_out);
            }
        }
    }
}

#[test]
fn packed_padded_and_halves() {
    let mut x = Qkvs::new([1, 2, 1, 120, 150, 16, 8], 3);
    let mut d_out = array(9, (1, 2, 120, 8));
    let of = |x: &Qkvs| -> [Array4<f32>; 3] { [x.q.clone(), x.k.clone(), x.v.clone()] };
    for builder in builders(2, 16, 16, 8) {
        let relative = builder.build().unwrap();
        held("packed", &relative, x.qkv().packed(&[0, 30, 30, 120], &[0, 50, 60, 150]), &d_out);
    }
    // What lies after the last offset is never read.
    for (array, end) in [(&mut x.q, 93), (&mut x.k, 131), (&mut x.v, 131), (&mut d_out, 93)] {
        array.slice_mut(s![.., .., end.., ..]).fill(f32::NAN);
    }
    for builder in builders(2, 16, 16, 8) {
        let relative = builder.build().unwrap();
        held("rows of no sequence", &relative, x.qkv().packed(&[0, 30, 30, 93], &[0, 50, 60, 131]), &d_out);
    }
    let (x, d_out) = (Qkvs::new([3, 2, 1, 10, 140, 16, 8], 3), array(9, (3, 2, 10, 8)));
    for builder in builders(2, 16, 16, 8) {
        held("padded", &builder.build().unwrap(), x.qkv().key_lengths(&[140, 0, 77]), &d_out);
    }
    fn halves<T: Element>([q, k, v]: [Array4<f32>; 3], d_out: &Array4<f32>) {
        let [q, k, v] = [q, k, v].map(|x| x.mapv(T::from_f32));
        for builder in builders(2, 16, 16, 8) {
            held(T::DTYPE.name(), &builder.build().unwrap(), Qkv::new(q.view(), k.view(), v.view()), d_out);
        }
    }
    halves::<f16>(of(&x), &d_out);
    halves::<bf16>(of(&x), &d_out);
}

/// Every array of the definition, and every parameter.
#[test]
fn definitions_are_what_differences_give() {
    let x = Qkvs::new([2, 2, 1, 6, 7, 4, 3], 4);
    let d_out = array::<ndarray::Ix4, _>(9, (2, 2, 6, 3));
    let exact = d_out.mapv(f64::from);
    let loss = |builder: &RelativePositionsBuilder, x: &Qkvs| {
        (builder.clone().build().unwrap().reference(x.qkv()).unwrap() * &exact).sum()
    };
    for builder in builders(2, 2, 4, 3) {
        let relative = builder.clone().build().unwrap();
        let want = relative.reference_backward(x.qkv(), d_out.view(), ()).unwrap();
        for (name, want) in want.arrays() {
            differences(name, want, |i, by| {
                let (mut x, mut builder) = (x.clone(), builder.clone());
                let at = match name {
                    "q" => x.q.iter_mut().nth(i),
                    "k" => x.k.iter_mut().nth(i),
                    "v" => x.v.iter_mut().nth(i),
                    "table" => builder.table.iter_mut().nth(i),
                    "content_bias" => builder.content.iter_mut().flatten().nth(i),
                    "position_bias" => builder.position.iter_mut().flatten().nth(i),
                    _ => builder.values.iter_mut().flatten().nth(i),
                };
                let at = at.unwrap();
                *at += by;
                let value = f64::from(*at);
                [value, loss(&builder, &x)]
            });
        }
    }
}

/// With tables of zeros, over more than one block of queries.
#[test]
fn tables_of_zeros_leave_the_gradients_of_dense_attention() {
    let (x, d_out) = (Qkvs::new([1, 4, 2, 600, 640, 16, 8], 5), array(9, (1, 4, 600, 8)));
    let zeros = RelativePositions::builder(Array3::zeros((1, 9, 16)).view()).build().unwrap();
    let got = zeros.backward(x.qkv(), d_out.view(), ()).unwrap();
    let dense = Dense::builder().causal().build().unwrap();
    let want = dense.backward(x.qkv(), d_out.view(), SavedForward::default()).unwrap();
    for (got, want) in [(&got.q, &want.q), (&got.k, &want.k), (&got.v, &want.v)] {
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5));
    }
    // A row of terms has no sum: every distance the same is no distance.
    let same = RelativePositions::between(Array3::ones((1, 5, 16)).view()).build().unwrap();
    let same = same.backward(x.qkv(), d_out.view(), ()).unwrap();
    let rows = same.table.sum_axis(ndarray::Axis(1));
    assert!(rows.iter().all(|x| x.abs() < 1e-3) && same.table.iter().any(|x| x.abs() > 0.1));
}

#[test]
fn what_is_hidden_cannot_matter_and_what_is_visible_shows() {
    for builder in builders(2, 5, 8, 6) {
        let relative = builder.causal().build().unwrap();
        // The first 12 queries see nothing.
        let mut x = Qkvs::new([1, 2, 1, 40, 28, 8, 6], 6);
        let mut d_out = array(9, (1, 2, 40, 6));
        let clean = relative.backward(x.qkv(), d_out.view(), ()).unwrap();
        x.q.slice_mut(s![.., .., ..12, ..]).fill(f32::NAN);
        d_out.slice_mut(s![.., .., ..12, ..]).fill(f32::INFINITY);
        assert_eq!(relative.backward(x.qkv(), d_out.view(), ()).unwrap(), clean);
        // Query 39 alone sees key 27.
        x.k.slice_mut(s![.., .., 27, ..]).fill(f32::NAN);
        let got = relative.backward(x.qkv(), d_out.view(), ()).unwrap();
        assert!(got.q.slice(s![.., .., 39, ..]).iter().all(|x| x.is_nan()));
        assert_eq!(got.q.slice(s![.., .., ..39, ..]), clean.q.slice(s![.., .., ..39, ..]));
        assert!(got.table.iter().any(|x| x.is_nan()));
        let mut x = x.clone();
        x.k.slice_mut(s![.., .., 27, ..]).fill(0.5);
        d_out[[0, 1, 20, 3]] = f32::NAN;
        let got = relative.backward(x.qkv(), d_out.view(), ()).unwrap();
        for query in 0..40 {
            let nan = |head: usize| got.q.slice(s![0, head, query, ..]).iter().any(|x| x.is_nan());
            assert!(!nan(0) && nan(1) == (query == 20), "query {query}");
        }
        for key in 0..28 {
            assert_eq!(got.k.slice(s![0, 0, key, ..]).iter().all(|x| x.is_nan()), key <= 8, "key {key}");
        }
        if let Some(values) = &got.values {
            let last = values.slice(s![values.dim().0 - 1, .., 3]);
            assert!(last.iter().any(|x| x.is_nan()));
        }
    }
}

#[test]
fn gradients_that_do_not_fit_are_refused() {
    let (x, d_out) = (Qkvs::new([1, 2, 1, 5, 6, 8, 6], 7), array::<ndarray::Ix4, _>(9, (1, 2, 5, 6)));
    let [music, xl, _, shaw, _] = builders(2, 3, 8, 6).map(|builder| builder.build().unwrap());
    let workspace = &mut Workspace::new();
    let mut to = music.zero_gradients(x.qkv()).unwrap();
    let mut says = |relative: &RelativePositions, to: &mut RelativeGradients, d_out: &Array4<f32>| {
        relative.backward_into(x.qkv(), d_out.view(), (), to, workspace).unwrap_err().to_string()
    };
    let short = Array4::zeros((1, 2, 4, 6));
    assert_eq!(says(&music, &mut to, &short), "d_out: expected shape [1, 2, 5, 6], got [1, 2, 4, 6]");
    let want = "gradients.table: expected shape [2, 3, 8], got [1, 3, 8]";
    assert_eq!(says(&xl, &mut to, &d_out), want);
    let mut to = xl.zero_gradients(x.qkv()).unwrap();
    to.position_bias = None;
    let want = "gradients.position_bias: expected [2, 8], got none";
    assert_eq!(says(&xl, &mut to, &d_out), want);
    let mut to = shaw.zero_gradients(x.qkv()).unwrap();
    to.values = Some(Array3::zeros((1, 7, 5)));
    let want = "gradients.values: expected shape [1, 7, 6], got [1, 7, 5]";
    assert_eq!(says(&shaw, &mut to, &d_out), want);
    assert!(to.q.iter().all(|&x| x == 0.0), "refused, and yet written");
}
