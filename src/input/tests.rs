use ndarray::{Array4, ArrayView4};

use super::*;
use crate::attention::Attention;
use crate::dense::Dense;
use crate::engine::workspace::Workspace;
use crate::mask::{Causal, Mask, Window};
use crate::raw::{View, ViewMut};

fn noise(shape: [usize; 4], seed: usize) -> Array4<f32> {
    Array4::from_shape_fn(shape, |(b, h, i, c)| {
        ((seed + 3 * b + 5 * h + 7 * i + 11 * c * (i + 1)) as f32).sin()
    })
}

#[test]
fn rows_are_heads_in_another_order() {
    let (q, k, v) = (noise([2, 9, 4, 16], 1), noise([2, 13, 2, 16], 2), noise([2, 13, 2, 8], 3));
    fn heads(x: &Array4<f32>) -> ArrayView4<'_, f32> {
        x.view().permuted_axes([0, 2, 1, 3])
    }
    let dense = Dense::builder().causal().build().unwrap();
    let want = dense.forward(Qkv::new(heads(&q), heads(&k), heads(&v))).unwrap();
    assert_eq!(dense.forward(Qkv::from_rows(&q, &k, v.view())).unwrap(), want);
    let copies = [&q, &k, &v].map(|x| heads(x).as_standard_layout().into_owned());
    let [cq, ck, cv] = &copies;
    assert_eq!(dense.forward(Qkv::new(cq, ck, cv)).unwrap(), want);

    // The same of slices.
    let [q, k, v] = [q, k, v].map(|x| x.into_raw_vec_and_offset().0);
    let x = Qkv::of_raw(
        View::rows(&q, [2, 9, 4, 16]).unwrap(),
        View::rows(&k, [2, 13, 2, 16]).unwrap(),
        View::rows(&v, [2, 13, 2, 8]).unwrap(),
    );
    let mut out = vec![0.0; 2 * 9 * 4 * 8];
    let to = ViewMut::rows(&mut out, [2, 9, 4, 8]).unwrap();
    dense.forward_raw_into(x, to, &mut Workspace::new()).unwrap();
    let out = ArrayView4::from_shape((2, 9, 4, 8), &out).unwrap();
    assert_eq!(out.permuted_axes([0, 2, 1, 3]), want);
    assert!(View::rows(&q, [2, 9, 4, 15]).unwrap_err().to_string().starts_with("data: "));
}

#[test]
fn sizes_stand_for_an_input() {
    let dims = Dims {
        batch: 2,
        q_heads: 6,
        kv_heads: 2,
        q_len: 70,
        kv_len: 301,
        head_dim: 24,
        value_dim: 40,
        packed: false,
    };
    let (q, k, v) = (noise([2, 6, 70, 24], 1), noise([2, 2, 301, 24], 2), noise([2, 2, 301, 40], 3));
    let (real, sizes) = (Qkv::new(&q, &k, &v), Qkv::<f32>::of_dims(&dims).unwrap());
    assert_eq!(sizes.dims().unwrap(), dims);
    let dense = Dense::builder().mask(Window::new(Some(40), Some(0))).build().unwrap();
    assert_eq!(dense.workspace_bytes(sizes).unwrap(), dense.workspace_bytes(real).unwrap());
    assert_eq!(dense.cost(sizes).unwrap().flops, dense.cost(real).unwrap().flops);
    for len in [0, 1] {
        let dims = Dims { q_len: len, ..dims };
        assert_eq!(Qkv::<half::f16>::of_dims(&dims).unwrap().dims().unwrap(), dims);
    }
    let packed = Dims { packed: true, q_len: 371, kv_len: 371, ..dims };
    let offsets = [0, 70, 371];
    let sizes = Qkv::<f32>::of_dims(&packed).unwrap().packed(&offsets, &offsets);
    assert_eq!(sizes.dims().unwrap(), packed);
    assert!(matches!(Qkv::<f32>::of_dims(&Dims { kv_len: usize::MAX, ..dims }), Err(Error::TooLarge { .. })));
}

#[test]
fn causal_and_another_mask() {
    let x = noise([1, 2, 30, 16], 1);
    let x = Qkv::new(&x, &x, &x);
    let window = Window::new(Some(3), Some(3));
    let (a, b) = (Dense::builder().causal().mask(window), Dense::builder().mask(Causal::new().and(window)));
    assert_eq!(a.build().unwrap().forward(x).unwrap(), b.build().unwrap().forward(x).unwrap());
}

#[test]
fn sequences_of_other_lengths_than_the_arrays() {
    assert!(Lengths::Full.check_full("cores", "there is one for all").is_ok());
    for lengths in [Lengths::Keys(&[3]), Lengths::Tokens(&[3]), Lengths::Packed { queries: &[0], keys: &[0] }]
    {
        let refusal = lengths.check_full("cores", "there is one for all").unwrap_err().to_string();
        assert_eq!(refusal, "sequences of other lengths cannot be combined with cores: there is one for all");
    }
}
