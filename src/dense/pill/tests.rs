use super::*;
use crate::Attention;
use crate::dense::Dense;
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, held, refused};
use ndarray::Array3;

fn images(batch: usize, len: usize) -> Array2<bool> {
    Array2::from_shape_fn((batch, len), |(b, j)| (b + j) % 3 != 1)
}

fn with<'a>(x: &'a Qkvs, tokens: &'a Array3<f32>, images: &'a Array2<bool>) -> WithImages<'a, f32> {
    WithImages { qkv: x.qkv(), tokens: tokens.view(), images: images.view() }
}

#[test]
fn kernels_keep_to_the_definition() {
    let pill = Pill::builder(array(1, (2, 20)).view()).build().unwrap();
    for (q_len, kv_len) in [(1, 300), (90, 130), (20, 3), (2, 0)] {
        let x = Qkvs::new([2, 4, 2, q_len, kv_len, 12, 17], 1);
        held(&pill, with(&x, &array(2, (2, kv_len, 20)), &images(2, kv_len)));
    }
    let (x, offsets) = (Qkvs::new([1, 4, 2, 90, 90, 12, 17], 2), [0, 30, 30, 90]);
    let (tokens, images) = (array(3, (1, 90, 20)), images(1, 90));
    let packed = WithImages { qkv: x.qkv().packed(&offsets, &offsets), ..with(&x, &tokens, &images) };
    held(&pill, packed);
}

/// Gates of 0 are values of 0, which take weight; without images there are no gates.
#[test]
fn closed_gates_take_weight() {
    let (x, tokens) = (Qkvs::new([2, 2, 2, 30, 30, 12, 8], 4), array(5, (2, 30, 20)));
    let dense = Dense::builder().causal().build().unwrap();
    let closed = Pill::builder(Array2::zeros((2, 20)).view()).build().unwrap();
    let images = images(2, 30);
    let mut without = x.clone();
    for ((b, j), _) in images.indexed_iter().filter(|x| *x.1) {
        without.v.slice_mut(s![b, .., j, ..]).fill(0.0);
    }
    let want = dense.reference(without.qkv()).unwrap();
    close(&closed.reference(with(&x, &tokens, &images)).unwrap(), &want, 1e-12);
    let none = Array2::from_elem((2, 30), false);
    close(&closed.reference(with(&x, &tokens, &none)).unwrap(), &dense.reference(x.qkv()).unwrap(), 1e-12);
    // What is behind a query may be NaN, token or gate.
    let open = Pill::builder(array(6, (2, 20)).view()).build().unwrap();
    let mut spoilt = tokens.clone();
    spoilt.slice_mut(s![.., 20.., ..]).fill(f32::NAN);
    let first = |tokens| open.forward(with(&x, tokens, &images)).unwrap().slice_move(s![.., .., ..20, ..]);
    assert_eq!(first(&spoilt), first(&tokens));
}

#[test]
fn refusals() {
    let (x, images) = (Qkvs::new([1, 4, 2, 3, 3, 8, 8], 8), images(1, 3));
    let pill = Pill::builder(array(1, (4, 20)).view()).build().unwrap();
    let want = "gates: expected shape [kv_heads, C] = [2, 20], got [4, 20]";
    assert_eq!(refused(&pill, with(&x, &array(2, (1, 3, 20)), &images)), want);
    let want = "tokens: expected shape [batch, kv_len, C] = [1, 3, _], got [1, 4, 20]";
    assert_eq!(refused(&pill, with(&x, &array(2, (1, 4, 20)), &images)), want);
}
