use ndarray::{Array3, Array4};

use super::*;
use crate::Attention;
use crate::dense::Dense;
use crate::stages::edit::basis;
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, error, held, refused};

/// A symmetric matrix with positive products, and concepts.
fn given(width: usize, sides: [usize; 2], n: usize) -> (Array2<f64>, Vec<Concept>) {
    let x = array(1, (3 * width + 1, width));
    let row = |seed: u64, len: usize| array(seed, len);
    let concept = |c: usize| {
        let seed = 10 + 3 * c as u64;
        Concept { input: row(seed, width), key: row(seed + 1, sides[0]), value: row(seed + 2, sides[1]) }
    };
    (inverse_moments(x.view()).unwrap(), (0..n).map(concept).collect())
}

/// Two heads of 4 and 3 elements.
fn lock(width: usize, n: usize) -> (KeyLockBuilder, [Array2<f32>; 2]) {
    let weights = [array(5, (8, width)), array(6, (6, width))];
    let (metric, concepts) = given(width, [8, 6], n);
    let builder = KeyLock::builder(weights[0].view(), weights[1].view(), 2);
    (builder.concepts(metric.view(), &concepts), weights)
}

fn prompted<'a>(q: &'a Array4<f32>, text: &'a Array3<f32>) -> Prompted<'a, f32> {
    Prompted { q: q.view(), text: text.view(), lengths: Lengths::Full, value_dim: 3 }
}

/// What dense attention makes of keys and values.
fn dense(q: &Array4<f32>, k: Array4<f32>, v: Array4<f32>) -> Array4<f64> {
    Dense::builder().build().unwrap().reference(Qkvs { q: q.clone(), k, v }.qkv()).unwrap()
}

/// Rows `[batch, len, C]` times a matrix, in heads.
fn projected(text: &Array3<f32>, weights: &Array2<f32>, dim: usize) -> Array4<f32> {
    let (batch, len, _) = text.dim();
    Array4::from_shape_fn((batch, weights.dim().0 / dim, len, dim), |(b, h, t, c)| {
        let row = text.index_axis(Axis(0), b);
        row.row(t).mapv(f64::from).dot(&weights.row(h * dim + c).mapv(f64::from)) as f32
    })
}

#[test]
fn kernels_keep_to_the_definition() {
    let mut worst = 0f64;
    for (q_len, len, width, n) in [(1, 1, 3, 1), (50, 77, 40, 3), (200, 10, 9, 0), (3, 0, 9, 2)] {
        let lock = lock(width, n).0.build().unwrap();
        let (q, text) = (array(2, (2, 4, q_len, 4)), array(3, (2, len, width)));
        worst = worst.max(held(&lock, prompted(&q, &text)));
        let lengths = [len / 2, len];
        held(&lock, Prompted { lengths: Lengths::Keys(&lengths), ..prompted(&q, &text) });
    }
    println!("key lock: {worst:.3} of the bound");
}

/// Without concepts the projections are those of the model; a token that has nothing of a
/// concept is as it was where gates are shut.
#[test]
fn what_no_concept_is_in_stays() {
    let (q, mut text) = (array(2, (1, 2, 20, 4)), array(3, (1, 7, 12)));
    let (builder, weights) = lock(12, 0);
    let of = |text: &Array3<f32>| dense(&q, projected(text, &weights[0], 4), projected(text, &weights[1], 3));
    let x = prompted(&q, &text);
    close(&builder.build().unwrap().reference(x).unwrap(), &of(&text), 1e-5);
    // All tokens at right angles to both concepts.
    let (metric, concepts) = given(12, [8, 6], 2);
    let inputs = Array2::from_shape_fn((2, 12), |(c, d)| f64::from(concepts[c].input[d]));
    let basis = basis(&inputs, &metric).unwrap();
    for mut e in text.rows_mut() {
        for u in basis.rows() {
            let by = e.mapv(f64::from).dot(&metric.dot(&u));
            e.iter_mut().zip(u).for_each(|(x, u)| *x -= (by * u) as f32);
        }
    }
    let shut = lock(12, 2).0.bias(10.0).build().unwrap();
    close(&shut.reference(prompted(&q, &text)).unwrap(), &of(&text), 1e-4);
}

/// A token that is the concept, its gate open, is what the concept says.
#[test]
fn a_concept_becomes_its_output() {
    let (builder, _) = lock(12, 1);
    let concept = given(12, [8, 6], 1).1.remove(0);
    let q = array(2, (1, 2, 20, 4));
    let text = concept.input.clone().insert_axis(Axis(0)).insert_axis(Axis(0));
    let out = builder.temperature(0.01).build().unwrap().reference(prompted(&q, &text)).unwrap();
    let want = Array4::from_shape_fn(out.dim(), |(_, h, _, c)| f64::from(concept.value[3 * h + c]));
    close(&out, &want, 1e-6);
    // And as much as the gate lets in.
    let half = lock(12, 1).0.bias(1.0).build().unwrap().reference(prompted(&q, &text)).unwrap();
    close(&half, &(want / 2.0), 1e-6);
}

/// Of concepts at right angles each is taken off by itself.
#[test]
fn concepts_at_right_angles_do_not_meet() {
    let unit = |c: usize, side: usize| {
        let at = |len| Array1::from_shape_fn(len, |d| f32::from(d == c));
        Concept { input: at(side), key: at(8), value: at(6) }
    };
    let (weights, q, text) =
        ([array(5, (8, 9)), array(6, (6, 9))], array(2, (1, 2, 5, 4)), array(3, (1, 7, 9)));
    let of = |concepts: &[Concept]| {
        let builder = KeyLock::builder(weights[0].view(), weights[1].view(), 2);
        builder.concepts(Array2::eye(9).view(), concepts).build().unwrap()
    };
    let gate =
        |share: f32| 1.0 / (1.0 + (-(f64::from(share) - f64::from(0.7f32)) / f64::from(0.15f32)).exp());
    // `W e - sum_c e_c W_c + sum_c g_c o_c` by hand.
    let edited = |weights: &Array2<f32>, dim: usize| {
        let mut rest = text.clone();
        rest.slice_mut(ndarray::s![.., .., ..2]).fill(0.0);
        let mut rows = projected(&rest, weights, dim);
        for c in 0..2 {
            for t in 0..7 {
                rows[[0, c / dim, t, c % dim]] += gate(text[[0, t, c]]) as f32;
            }
        }
        rows
    };
    let want = dense(&q, edited(&weights[0], 4), edited(&weights[1], 3));
    let out = of(&[unit(0, 9), unit(1, 9)]).reference(prompted(&q, &text)).unwrap();
    close(&out, &want, 1e-5);
}

#[test]
fn moments_are_inverted() {
    let x = array(7, (50, 6));
    let wide = x.mapv(f64::from);
    let product = inverse_moments(x.view()).unwrap().dot(&(wide.t().dot(&wide) / 50.0));
    assert!((product - Array2::<f64>::eye(6)).iter().all(|x| x.abs() < 1e-10));
    let want = "encodings: expected finite ones that span all of 6 dimensions, got 3 of them";
    assert_eq!(error(inverse_moments(array(7, (3, 6)).view())), want);
}

#[test]
fn refusals() {
    let (q, text) = (array(2, (1, 2, 5, 4)), array(3, (1, 7, 8)));
    let other = lock(9, 1).0.build().unwrap();
    let want = "text: expected shape [batch, len, C] with C 9, got [1, 7, 8]";
    assert_eq!(refused(&other, prompted(&q, &text)), want);
    let short = Prompted { value_dim: 5, ..prompted(&q, &text) };
    assert_eq!(refused(&lock(8, 1).0.build().unwrap(), short), "value_dim: expected rows of 3, got 5");
    let (metric, mut concepts) = given(8, [8, 6], 2);
    concepts[1].input = &concepts[0].input * 2.0;
    let built = lock(8, 0).0.concepts(metric.view(), &concepts).build();
    assert_eq!(error(built), "concepts: expected concepts none of which is made of others, got 2");
    concepts.truncate(1);
    let built = lock(8, 0).0.concepts((-metric.clone()).view(), &concepts).build();
    assert!(
        error(built).starts_with("metric: expected a positive product of each concept with itself, got -")
    );
    let mut askew = metric.clone();
    askew[[2, 1]] += 1.0;
    let built = lock(8, 0).0.concepts(askew.view(), &concepts).build();
    assert!(error(built).starts_with("metric: expected a symmetric matrix, got ["));
    concepts[0].value = Array1::zeros(5);
    let built = lock(8, 0).0.concepts(metric.view(), &concepts).build();
    let want = "concepts: expected shape input, key and value of 8, 8 and 6, got [8, 8, 5]";
    assert_eq!(error(built), want);
}
