use ndarray::{Array1, Array4, s};

use super::*;
use crate::dense::{Additive, Dense};
use crate::score::Bias;
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, error, held, refused};
use crate::{Attention, ScoreGradients};

fn adversarial(epsilon: f32) -> Adversarial {
    Adversarial::builder().epsilon(epsilon).build().unwrap()
}

#[test]
fn kernels_keep_to_the_definition() {
    let mut worst = 0f64;
    for (q_len, kv_len, dim, value_dim) in [(1, 1, 5, 3), (50, 130, 12, 17), (3, 0, 4, 2), (2, 9, 0, 0)] {
        let x = Qkvs::new([2, 4, 2, q_len, kv_len, dim, value_dim], 1);
        let d_out = array(2, (2, 4, q_len, value_dim));
        let weights = array(3, (4, dim));
        let input = WithGradient { qkv: x.qkv(), d_out: d_out.view() };
        for epsilon in [0.0, 0.3, 5.0] {
            worst = worst.max(held(&adversarial(epsilon), input));
            let additive = Adversarial::builder().epsilon(epsilon).additive(weights.view()).build().unwrap();
            worst = worst.max(held(&additive, input));
        }
        let lengths = [kv_len / 2, kv_len];
        held(&adversarial(2.0), WithGradient { qkv: x.qkv().key_lengths(&lengths), d_out: d_out.view() });
    }
    println!("adversarial: {worst:.3} of the bound");
}

/// Two passes: gradients of scores, and a bias in their direction.
#[test]
fn it_is_dense_attention_with_a_bias_along_its_gradients() {
    let x = Qkvs::new([2, 4, 2, 20, 30, 12, 7], 3);
    let d_out = array(4, (2, 4, 20, 7));
    let input = WithGradient { qkv: x.qkv(), d_out: d_out.view() };
    let dense = Dense::builder().build().unwrap();
    let gradients = dense.reference_score_gradients(x.qkv(), d_out.view()).unwrap();
    let step = adversarial_scores(gradients.mapv(|x| x as f32).view(), 0.7);
    let lengths = step.map_axis(Axis(3), |row| row.iter().map(|x| x * x).sum::<f32>().sqrt());
    assert!(lengths.iter().all(|length| (length - 0.7).abs() < 1e-6));
    let biased = Dense::builder().score(Bias::new(step.view())).build().unwrap();
    let want = biased.reference(x.qkv()).unwrap();
    close(&adversarial(0.7).reference(input).unwrap(), &want, 1e-6);
    // Whatever the size of the gradient, and none at all.
    let large = d_out.mapv(|x| x * 1e20);
    let other = WithGradient { qkv: x.qkv(), d_out: large.view() };
    close(&adversarial(0.7).reference(other).unwrap(), &want, 1e-6);
    close(&adversarial(0.7).forward(other).unwrap().mapv(f64::from), &want, 1e-4);
    let plain = dense.reference(x.qkv()).unwrap();
    close(&adversarial(0.0).reference(input).unwrap(), &plain, 1e-12);
    let none = Array4::zeros(d_out.dim());
    let none = WithGradient { qkv: x.qkv(), d_out: none.view() };
    close(&adversarial(3.0).reference(none).unwrap(), &plain, 1e-12);
    close(&adversarial(3.0).forward(none).unwrap().mapv(f64::from), &plain, 1e-5);
    assert!(adversarial_scores(Array4::zeros((1, 1, 2, 3)).view(), 1.0).iter().all(|&x| x == 0.0));
    let additive = array(5, (1, 12));
    let want = Additive::builder(additive.view()).build().unwrap().reference(x.qkv()).unwrap();
    let still = Adversarial::builder().epsilon(0.0).additive(additive.view()).build().unwrap();
    close(&still.reference(input).unwrap(), &want, 1e-12);
}

/// The paper's interpretable form, in full: `a_tk` for each pair of scores.
#[test]
fn differences_of_scores_make_the_same_step() {
    let (scores, g, epsilon) = (array(6, 9).mapv(f64::from), array(7, 9).mapv(f64::from), 0.4);
    let norm = |x: &Array1<f64>| x.dot(x).sqrt();
    let apart = |t: usize| {
        let n = Array1::from_shape_fn(9, |k| scores[t] - scores[k]);
        let length = norm(&n);
        n / length
    };
    let gradient = Array2::from_shape_fn((9, 9), |(t, k)| g[t] * apart(t)[k]);
    let length = gradient.iter().map(|x| x * x).sum::<f64>().sqrt();
    let row = Array4::from_shape_fn((1, 1, 1, 9), |(_, _, _, t)| g[t] as f32);
    let step = adversarial_scores(row.view(), epsilon as f32);
    for t in 0..9 {
        let a = &gradient.row(t) * (epsilon / length);
        let (moved, want) = (a.dot(&apart(t)), f64::from(step[[0, 0, 0, t]]));
        assert!((moved - want).abs() < 1e-6, "{moved}, not {want}");
    }
}

#[test]
fn the_loss_grows_and_hidden_keys_may_be_anything() {
    let mut x = Qkvs::new([1, 1, 1, 4, 10, 8, 6], 8);
    let d_out = array(9, (1, 1, 4, 6));
    let loss = |epsilon: f32| {
        let input = WithGradient { qkv: x.qkv(), d_out: d_out.view() };
        (adversarial(epsilon).reference(input).unwrap() * d_out.mapv(f64::from)).sum()
    };
    assert!(loss(0.1) > loss(0.0) && loss(0.5) > loss(0.1));
    let lengths = [7];
    let of = |x: &Qkvs| {
        adversarial(1.0)
            .forward(WithGradient { qkv: x.qkv().key_lengths(&lengths), d_out: d_out.view() })
            .unwrap()
    };
    let want = of(&x);
    x.k.slice_mut(s![.., .., 7.., ..]).fill(f32::NAN);
    x.v.slice_mut(s![.., .., 7.., ..]).fill(f32::NAN);
    assert_eq!(of(&x), want);
}

/// Keys of -inf are hidden by their scores, and their weights of 0 say nothing of others.
#[test]
fn a_gradient_that_is_no_number_shows() {
    let mut x = Qkvs::new([1, 1, 1, 1, 32, 1, 6], 8);
    x.q.fill(1.0);
    x.k.slice_mut(s![.., .., 16.., ..]).fill(f32::NEG_INFINITY);
    let d_out = Array4::from_elem((1, 1, 1, 6), f32::NAN);
    let input = WithGradient { qkv: x.qkv(), d_out: d_out.view() };
    assert!(adversarial(1.0).reference(input).unwrap().iter().all(|x| x.is_nan()));
    assert!(adversarial(1.0).forward(input).unwrap().iter().all(|x| x.is_nan()));
}

#[test]
fn refusals() {
    let (x, few) = (Qkvs::new([1, 2, 1, 3, 4, 5, 6], 5), Array4::zeros((1, 2, 3, 5)));
    let input = WithGradient { qkv: x.qkv(), d_out: few.view() };
    let want = "d_out: expected shape [batch, q_heads, q_len, value_dim] = [1, 2, 3, 6], got [1, 2, 3, 5]";
    assert_eq!(refused(&adversarial(1.0), input), want);
    let d_out = Array4::zeros((1, 2, 3, 6));
    let input = WithGradient { qkv: x.qkv(), d_out: d_out.view() };
    let other = Adversarial::builder().additive(array(1, (2, 4)).view()).build().unwrap();
    let want = "additive: expected shape [q_heads | 1, head_dim] = [2 | 1, 5], got [2, 4]";
    assert_eq!(refused(&other, input), want);
    let negative = Adversarial::builder().epsilon(-1.0).build();
    assert_eq!(error(negative), "epsilon: expected a number from 0 to 32, got -1");
    let weights = Array2::ones((1, 5));
    let both = Adversarial::builder().scale(0.3).additive(weights.view()).build();
    assert!(both.unwrap_err().to_string().starts_with("scale cannot be combined with additive scores"));
}
