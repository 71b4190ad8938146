use super::*;
use crate::Attention;
use crate::dense::Dense;
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, error, held, refused};

fn booth(frames: usize) -> VideoBooth {
    VideoBooth::builder(frames).build().unwrap()
}

#[test]
fn kernels_keep_to_the_definition() {
    let mut worst = 0f64;
    for (frames, n, len) in [(1, 1, 1), (4, 30, 20), (3, 70, 0), (2, 0, 5), (5, 1, 100)] {
        let x = Qkvs::new([2, 4, 2, frames * n, frames * n, 12, 17], 1);
        let (k, v) = (array(2, (2, 2, len, 12)), array(3, (2, 2, len, 17)));
        let x = WithExemplar { qkv: x.qkv(), exemplar_k: k.view(), exemplar_v: v.view() };
        worst = worst.max(held(&booth(frames), x));
    }
    println!("VideoBooth: {worst:.3} of the bound");
}

/// The first frame twice is the first frame once; without an exemplar its values
/// are what it sees of itself.
#[test]
fn frames_are_dense_attention() {
    let x = Qkvs::new([1, 2, 2, 60, 60, 8, 8], 4);
    let none = x.k.slice(s![.., .., ..0, ..]);
    let input = WithExemplar { qkv: x.qkv(), exemplar_k: none, exemplar_v: none };
    let out = booth(3).reference(input).unwrap();
    let dense = Dense::builder().build().unwrap();
    let frame = |f: usize| x.slice(20 * f..20 * f + 20, 20 * f..20 * f + 20);
    let anchor = dense.reference(frame(0).qkv()).unwrap().mapv(|x| x as f32);
    for f in [0, 1] {
        let x = Qkvs { q: frame(f).q, k: frame(0).k, v: anchor.clone() };
        let want = dense.reference(x.qkv()).unwrap();
        close(&out.slice(s![.., .., 20 * f..20 * f + 20, ..]).to_owned(), &want, 1e-6);
    }
    let both = |a: &Array4<f32>, b: &Array4<f32>| ndarray::concatenate![ndarray::Axis(2), *a, *b];
    let x = Qkvs { q: frame(2).q, k: both(&frame(0).k, &frame(1).k), v: both(&anchor, &frame(1).v) };
    let want = dense.reference(x.qkv()).unwrap();
    close(&out.slice(s![.., .., 40.., ..]).to_owned(), &want, 1e-6);
}

#[test]
fn refusals() {
    let x = Qkvs::new([1, 2, 2, 10, 10, 8, 8], 5);
    let none = x.k.slice(s![.., .., ..0, ..]);
    let input = WithExemplar { qkv: x.qkv(), exemplar_k: none, exemplar_v: none };
    assert_eq!(refused(&booth(3), input), "q: expected tokens of 3 frames, got 10");
    let other = WithExemplar { exemplar_v: x.k.view(), ..input };
    let want =
        "exemplar_v: expected shape [batch, kv_heads, exemplar_len, dim] = [1, 2, 0, 8], got [1, 2, 10, 8]";
    assert_eq!(refused(&booth(2), other), want);
    let lengths = [7];
    let short = WithExemplar { qkv: x.qkv().key_lengths(&lengths), ..input };
    assert!(refused(&booth(2), short).contains("every token of a frame has a key"));
    // Frames of no tokens are not counted to the end.
    let empty = Qkvs::new([1, 2, 2, 0, 0, 8, 8], 5);
    let input = WithExemplar { qkv: empty.qkv(), exemplar_k: none, exemplar_v: none };
    assert_eq!(booth(1).forward(input).unwrap().dim(), (1, 2, 0, 8));
    assert_eq!(booth(usize::MAX).forward(input).unwrap().dim(), (1, 2, 0, 8));
    assert_eq!(booth(usize::MAX).reference(input).unwrap().dim(), (1, 2, 0, 8));
    assert_eq!(error(VideoBooth::builder(0).build()), "frames: expected at least 1, got 0");
}
