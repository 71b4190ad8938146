use ndarray::{Array3, Array4, Axis, concatenate, s};

use super::*;
use crate::Attention;
use crate::dense::Dense;
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, held, refused};

/// Queries with own keys, of which the first are a reference's.
fn parts(x: &Qkvs, n: usize) -> (Qkvs, Array4<f32>, Array4<f32>) {
    let own = x.slice(0..x.q.dim().2, n..x.k.dim().2);
    let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., .., ..n, ..]).to_owned());
    (own, k, v)
}

fn augmented() -> Augmented {
    Augmented::builder().build().unwrap()
}

#[test]
fn kernels_keep_to_the_definition() {
    let mut worst = 0f64;
    for (q_len, own, n) in [(1, 1, 1), (1, 700, 300), (50, 70, 90), (130, 0, 64), (3, 40, 0), (2, 0, 0)] {
        let x = Qkvs::new([2, 4, 2, q_len, own + n, 12, 17], 1);
        let (x, k, v) = parts(&x, n);
        let visible = Array3::from_shape_fn((2, q_len, n), |(b, i, j)| (b + i + j) % 3 != 1 && b + i != 2);
        let keys = [own, own / 2];
        for (batch, heads) in [(1, 1), (2, 4)] {
            let mut tile = array(2, (batch, heads, q_len, n));
            tile.iter_mut().step_by(7).for_each(|x| *x = f32::NEG_INFINITY);
            let input = WithReference::new(x.qkv(), k.view(), v.view());
            for input in [input, input.visible(visible.view()), input.corrected(tile.view())] {
                worst = worst.max(held(&augmented(), input));
                let short = WithReference { qkv: input.qkv.key_lengths(&keys), ..input };
                worst = worst.max(held(&augmented(), short));
            }
        }
    }
    println!("augmented: {worst:.3} of the bound");
}

/// Both parts as one array, with a bias for the first.
#[test]
fn it_is_dense_attention_over_both() {
    let all = Qkvs::new([2, 4, 2, 20, 60, 12, 7], 3);
    let (x, k, v) = parts(&all, 25);
    let input = WithReference::new(x.qkv(), k.view(), v.view());
    let dense = Dense::builder().build().unwrap();
    close(&augmented().reference(input).unwrap(), &dense.reference(all.qkv()).unwrap(), 1e-12);
    let tile = array(4, (1, 4, 20, 25));
    let most = tile.iter().copied().fold(f32::MIN, f32::max);
    let bias =
        concatenate(Axis(3), &[tile.mapv(|x| x - most / 4.0).view(), Array4::zeros((1, 4, 20, 35)).view()]);
    let bias = bias.unwrap();
    let dense = Dense::builder().score(crate::score::Bias::new(bias.view())).build().unwrap();
    let corrected = augmented().reference(input.corrected(tile.view())).unwrap();
    close(&corrected, &dense.reference(all.qkv()).unwrap(), 1e-6);
    // What is taken off is no more than a number.
    let level = Augmented::builder().level(most / 4.0).build().unwrap();
    close(&level.reference(input.corrected(tile.view())).unwrap(), &corrected, 1e-12);
}

#[test]
fn a_reference_of_own_keys_or_of_none_changes_nothing() {
    let x = Qkvs::new([2, 2, 2, 30, 40, 8, 9], 5);
    let want = Dense::builder().build().unwrap().reference(x.qkv()).unwrap();
    let twice = augmented().reference(WithReference::new(x.qkv(), x.k.view(), x.v.view())).unwrap();
    close(&twice, &want, 1e-12);
    let [k, v] = [&x.k, &x.v].map(|x| x.slice(s![.., .., ..0, ..]));
    close(&augmented().reference(WithReference::new(x.qkv(), k, v)).unwrap(), &want, 1e-12);
    // What is hidden may be anything.
    let (nan, hidden) = (x.k.mapv(|_| f32::NAN), Array3::from_elem((1, 30, 40), false));
    let input = WithReference::new(x.qkv(), nan.view(), nan.slice(s![.., .., .., ..1]));
    let values = Array4::from_elem((2, 2, 40, 9), f32::NAN);
    let input = WithReference { ref_v: values.view(), ..input }.visible(hidden.view());
    close(&augmented().forward(input).unwrap().mapv(f64::from), &want, 1e-5);
}

#[test]
fn refusals() {
    let x = Qkvs::new([2, 4, 2, 3, 4, 5, 6], 5);
    let (k, v) = (Array4::zeros((2, 2, 7, 5)), Array4::zeros((2, 2, 7, 6)));
    let input = WithReference::new(x.qkv(), k.view(), v.view());
    let few = WithReference { ref_v: v.slice(s![.., .., ..6, ..]), ..input };
    let want = "ref_v: expected shape [batch, kv_heads, ref_len, dim] = [2, 2, 7, 6], got [2, 2, 6, 6]";
    assert_eq!(refused(&augmented(), few), want);
    let tile = Array4::zeros((2, 2, 3, 7));
    let want = "correction: expected shape [batch | 1, q_heads | 1, q_len, ref_len] = [2 | 1, 4 | 1, 3, 7], \
                got [2, 2, 3, 7]";
    assert_eq!(refused(&augmented(), input.corrected(tile.view())), want);
    let visible = Array3::from_elem((2, 3, 4), true);
    let want = "visible: expected shape [batch | 1, q_len, ref_len] = [2 | 1, 3, 7], got [2, 3, 4]";
    assert_eq!(refused(&augmented(), input.visible(visible.view())), want);
    let offsets = [0, 2];
    let one = Qkvs::new([1, 4, 2, 3, 3, 5, 6], 5);
    let packed = WithReference::new(
        one.qkv().packed(&offsets, &offsets),
        k.slice(s![..1, .., .., ..]),
        v.slice(s![..1, .., .., ..]),
    );
    assert!(refused(&augmented(), packed).contains("packed batch"));
}
