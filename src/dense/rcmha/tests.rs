use super::*;
use crate::Attention;
use crate::dense::{Dense, RelativePositions};
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, error, held, refused};
use ndarray::s;

/// Convolutions of 3 taps of these dims.
fn convolutions(dims: [usize; 3]) -> [(Array2<f32>, Array1<f32>); 3] {
    let mut seed = 0;
    dims.map(|dim| {
        seed += 1;
        (array(seed, (dim, 3)), array(seed + 9, dim))
    })
}

#[test]
fn kernels_keep_to_the_definition() {
    let mut worst = 0f64;
    for (q_len, kv_len) in [(1, 60), (270, 300), (20, 3), (2, 0)] {
        let (x, reach) = (Qkvs::new([2, 4, 2, q_len, kv_len, 20, 24], 2), 300);
        let (table, b, u) = (array(3, (4, 2 * reach, 20)), array(4, (4, 2 * reach)), array(5, (4, 20)));
        let plain = Rcmha::builder(table.view()).causal();
        let whole = Rcmha::builder(table.slice(s![..1, .., ..])).offsets(b.view()).content_bias(u.view());
        let whole = whole.convolutions(convolutions([20, 20, 24]));
        for rcmha in [plain, whole.clone(), whole.causal()] {
            worst = worst.max(held(&rcmha.build().unwrap(), x.qkv()));
        }
    }
    let (x, offsets) = (Qkvs::new([1, 2, 1, 130, 130, 16, 8], 3), [0, 50, 50, 51, 130]);
    let packed = Rcmha::builder(array(3, (2, 160, 16)).view()).offsets(array(4, (2, 160)).view());
    let packed = packed.convolutions(convolutions([16, 16, 8])).build().unwrap();
    held(&packed, x.qkv().packed(&offsets, &offsets));
    println!("RCMHA: {worst:.3} of the bound");
}

#[test]
fn taps_of_one_token_are_relative_positions() {
    let x = Qkvs::new([1, 2, 2, 30, 40, 8, 6], 5);
    let of = |builder: RcmhaBuilder| builder.build().unwrap().reference(x.qkv()).unwrap();
    let itself = |dim| {
        let taps = Array2::from_shape_fn((dim, 3), |(_, tap)| f32::from(tap == 2));
        (taps, Array1::zeros(dim))
    };
    let none = Rcmha::builder(Array3::zeros((1, 80, 8)).view()).convolutions([8, 8, 6].map(itself));
    close(&of(none.clone()), &Dense::builder().build().unwrap().reference(x.qkv()).unwrap(), 1e-12);
    // A bias of a head that is the same for all distances is none.
    close(&of(none.clone().offsets(Array2::ones((2, 80)).view())), &of(none), 1e-12);
    let (table, u) = (array(3, (2, 80, 8)), array(4, (2, 8)));
    let rcmha = Rcmha::builder(table.view()).content_bias(u.view()).convolutions([8, 8, 6].map(itself));
    // Of both directions, without that of the furthest.
    let both = RelativePositions::between(table.slice(s![.., 1.., ..])).content_bias(u.view());
    close(&of(rcmha), &both.build().unwrap().reference(x.qkv()).unwrap(), 1e-12);
}

/// What a token becomes depends on two before it, and keys may be a memory.
#[test]
fn causal_rows_depend_on_what_is_before_them() {
    let x = Qkvs::new([1, 2, 1, 40, 40, 8, 6], 6);
    let rcmha = Rcmha::builder(array(3, (2, 80, 8)).view()).convolutions(convolutions([8, 8, 6])).causal();
    let rcmha = rcmha.build().unwrap();
    let mut later = x.clone();
    for x in [&mut later.q, &mut later.k, &mut later.v] {
        x.slice_mut(s![.., .., 25.., ..]).fill(f32::NAN);
    }
    let first = |x: &Qkvs| rcmha.forward(x.qkv()).unwrap().slice_move(s![.., .., ..25, ..]);
    assert_eq!(first(&later), first(&x));
    // Queries of the second half are convolved without those of the first.
    let half = x.slice(20..40, 0..40);
    let (out, all) = (rcmha.reference(half.qkv()).unwrap(), rcmha.reference(x.qkv()).unwrap());
    close(&out.slice_move(s![.., .., 2.., ..]), &all.slice_move(s![.., .., 22.., ..]), 0.0);
}

#[test]
fn refusals() {
    let (x, long) = (Qkvs::new([1, 2, 1, 3, 5, 8, 6], 8), Qkvs::new([1, 2, 1, 3, 9, 8, 6], 8));
    let of = |shape| Rcmha::builder(array(1, shape).view());
    let odd = error(of((1, 7, 8)).build());
    assert_eq!(odd, "table: expected shape [q_heads | 1, 2 P, head_dim], got [1, 7, 8]");
    let far = "table: expected embeddings of distances, 2 P of them with a P of at least 8, got 8";
    assert_eq!(refused(&of((1, 8, 8)).build().unwrap(), long.qkv()), far);
    let offsets = of((1, 8, 8)).offsets(array(1, (2, 7)).view()).build().unwrap();
    assert_eq!(refused(&offsets, x.qkv()), "offsets: expected shape [2, 8], got [2, 7]");
    let convolved = of((1, 8, 8)).convolutions(convolutions([8, 8, 7])).build().unwrap();
    let want =
        "convolutions: expected shape taps [dim, _] of queries, keys and values with dims [8, 8, 6], got [7]";
    assert_eq!(refused(&convolved, x.qkv()), want);
}
