use super::*;
use crate::cache::{Append, Cached, Contiguous, KvShape};
use crate::dense::Dense;
use crate::testing::qkv::{Qkvs, close, error, held, refused};
use crate::{Attention, Weights};
use ndarray::{Array2, array, s};

fn tags(batch: usize, len: usize) -> Array2<u8> {
    Array2::from_shape_fn((batch, len), |(b, j)| ((b + j) % 5 % 3) as u8)
}

#[test]
fn kernels_keep_to_the_definition() {
    for (q_len, kv_len) in [(1, 300), (60, 130), (70, 3)] {
        let (mut x, tags) = (Qkvs::new([2, 4, 2, q_len, kv_len, 12, 17], 1), tags(2, kv_len));
        let builder = || Paint::builder().alpha(vec![0.7, -3.0, 0.0, 8.0]);
        let paint = builder().build().unwrap();
        held(&paint, WithTags { x: x.qkv(), tags: tags.view() });
        let lengths = [kv_len.min(2), kv_len];
        held(&paint, WithTags { x: x.qkv().key_lengths(&lengths), tags: tags.view() });
        let turned = tags.t().as_standard_layout().into_owned();
        held(&paint, WithTags { x: x.qkv(), tags: turned.t() });
        let shape = KvShape { kv_heads: 2, head_dim: 12, value_dim: 17 };
        let mut cache = Contiguous::<f32>::new(shape, 2, kv_len).unwrap();
        cache.append_each(&[0, 1], x.k.view(), x.v.view()).unwrap();
        held(&paint, WithTags { x: Cached::new(x.q.view(), &cache), tags: tags.view() });
        // What is louder than numbers can be.
        x.q.mapv_inplace(|x| 3e18 * x);
        x.k.mapv_inplace(|x| 3e18 * x);
        held(&builder().scale(1.0).build().unwrap(), WithTags { x: x.qkv(), tags: tags.view() });
    }
}

#[test]
fn scores_of_the_last_query_alone_are_raised() {
    let (x, tags) = (Qkvs::new([1, 2, 1, 40, 40, 12, 17], 2), tags(1, 40));
    let dense = Dense::builder().causal().build().unwrap();
    let of = |paint: PaintBuilder| {
        paint.build().unwrap().reference_scores(WithTags { x: x.qkv(), tags: tags.view() }).unwrap()
    };
    let plain = dense.reference_scores(x.qkv()).unwrap();
    assert_eq!(of(Paint::builder().alpha(vec![0.0]).beta(vec![0.0; 2])), plain);
    let painted = of(Paint::builder().alpha(vec![0.5, 2.0]).beta(vec![0.25]));
    assert_eq!(painted.slice(s![.., .., ..39, ..]), plain.slice(s![.., .., ..39, ..]));
    let mut want = plain;
    for ((h, j), s) in want.slice_mut(s![0, .., 39, ..]).indexed_iter_mut() {
        *s += [0.0, [0.5, 2.0][h], 0.25][usize::from(tags[[0, j]])] * s.abs();
    }
    assert!(tags.iter().any(|&tag| tag == 1) && tags.iter().any(|&tag| tag == 2));
    let last = s![.., .., 39.., ..];
    close(&painted.slice(last).to_owned(), &want.slice(last).to_owned(), 1e-12);
}

/// What is hidden stays so: a tagged key after a row, and padding.
#[test]
fn masked_keys_stay_hidden() {
    let (mut x, tags) = (Qkvs::new([1, 2, 2, 5, 30, 12, 17], 3), Array2::from_elem((1, 30), 1));
    let paint = Paint::builder().build().unwrap();
    let of = |x: &Qkvs| paint.forward(WithTags { x: x.qkv().key_lengths(&[20]), tags: tags.view() }).unwrap();
    let before = of(&x);
    x.k.slice_mut(s![.., .., 20.., ..]).fill(f32::INFINITY);
    x.v.slice_mut(s![.., .., 20.., ..]).fill(f32::NAN);
    assert_eq!(of(&x), before);
}

#[test]
fn tags_of_layers() {
    // A quarter of 9 are 2; the last of equal ones comes too late, and one is both.
    let first =
        array![[0.1, 0.2, 0.0, 0.2, 0.0, 0.0, 0.1, 0.0, 0.0], [0.1, 0.0, 0.0, 0.2, 0.0, 0.0, 0.1, 0.0, 0.0]];
    let mut last = Array2::from_elem((2, 9), 0.1);
    assert_eq!(paint_tags(first.view(), last.view()).unwrap(), [1, 0, 0, 1, 0, 0, 0, 0, 0]);
    last[[1, 3]] = 0.2;
    last[[0, 8]] = 5.0;
    assert_eq!(paint_tags(first.view(), last.view()).unwrap(), [1, 0, 0, 2, 0, 0, 0, 0, 2]);
    last[[0, 8]] = f32::NAN;
    assert_eq!(paint_tags(first.view(), last.view()).unwrap()[8], 0);
    let none = Array2::zeros((3, 0));
    assert!(paint_tags(none.view(), none.view()).unwrap().is_empty());
    let refusal = error(paint_tags(first.view(), last.slice(s![.., ..8])));
    assert_eq!(refusal, "last_but_one: expected shape [heads, tokens] = [_, 9], got [2, 8]");
}

#[test]
fn refusals() {
    let (x, offsets) = (Qkvs::new([1, 2, 1, 3, 3, 8, 8], 8), [0, 1, 3]);
    let refused = |paint: PaintBuilder, x, tags: &Array2<u8>| {
        refused(&paint.build().unwrap(), WithTags { x, tags: tags.view() })
    };
    let tags = tags(1, 3);
    let few = refused(Paint::builder().beta(vec![]), x.qkv(), &tags);
    assert_eq!(few, "beta: expected one, or one for each of the 2 query heads, got 0");
    let short = refused(Paint::builder(), x.qkv(), &Array2::zeros((1, 2)));
    assert_eq!(short, "tags: expected shape [batch, kv_len] = [1, 3], got [1, 2]");
    let other = refused(Paint::builder(), x.qkv(), &array![[0, 3, 1]]);
    assert_eq!(other, "tags: expected 0, 1 or 2, got 3");
    let packed = refused(Paint::builder(), x.qkv().packed(&offsets, &offsets), &tags);
    assert!(packed.starts_with("tags cannot be combined with a packed batch"), "{packed}");
    let alpha = error(Paint::builder().alpha(vec![f32::NAN]).build());
    assert_eq!(alpha, "alpha: expected finite numbers, got NaN");
}
