use super::*;
use crate::attention::Attention;
use crate::testing::arrays::array;
use crate::testing::qkv::{close, error, held, refused};

fn linear(seed: u64, [out, of]: [usize; 2]) -> Linear {
    (array(seed, (out, of)), Some(array(seed + 50, out)))
}

fn norm(dim: usize) -> LayerNorm {
    LayerNorm { gain: array(7, dim) + 1.5, shift: array(8, dim) }
}

fn sim_pool(dim: usize) -> SimPool {
    SimPool::builder(norm(dim), linear(1, [12, dim]), linear(2, [12, dim])).build().unwrap()
}

#[test]
fn kernels_keep_to_the_definition() {
    let mut worst = 0f64;
    for (batch, heads, len, dim, n) in [(2, 2, 130, 9, 3), (3, 1, 1, 20, 1), (2, 1, 0, 5, 2), (0, 1, 4, 5, 1)]
    {
        let c = heads * dim;
        let lengths: Vec<usize> = (0..batch).map(|b| len / (b + 1)).collect();
        let (tokens, q, wide) =
            (array(1, (batch, heads, len, dim)), array(2, (batch, n, 16)), array(3, (batch, n, c)));
        let x = Pooling::new(tokens.view());
        for layers in [vec![linear(4, [16, c])], vec![linear(4, [30, c]), linear(5, [16, 30])]] {
            for activation in [Activation::Tanh, Activation::Relu] {
                let abmilp = AbMilp::builder(layers.clone()).activation(activation).build().unwrap();
                worst = worst.max(held(&abmilp, x.queries(q.view()).lengths(&lengths)));
            }
        }
        let none = AbMilp::builder(vec![]).build().unwrap();
        worst = worst.max(held(&none, x.queries(wide.view())));
        for x in [x, x.lengths(&lengths), x.queries(wide.view())] {
            worst = worst.max(held(&sim_pool(c), x));
        }
    }
    println!("pooling: {worst:.3} of the bound");
}

/// Scorers of 0 pool the mean; a bias of what makes keys changes nothing.
#[test]
fn no_scores_are_a_mean() {
    let tokens = array(1, (2, 1, 30, 8));
    let x = Pooling::new(tokens.view());
    let mean = tokens.mapv(f64::from).mean_axis(Axis(2)).unwrap().insert_axis(Axis(2));
    let zeros = Array3::zeros((2, 1, 16));
    let abmilp = AbMilp::builder(vec![linear(4, [16, 8])]).build().unwrap();
    close(&abmilp.reference(x.queries(zeros.view())).unwrap(), &mean, 1e-12);
    let plain = LayerNorm { gain: Array1::zeros(8), shift: array(9, 8) };
    let constant = SimPool::builder(plain, linear(1, [12, 8]), linear(2, [12, 8])).build().unwrap();
    let shift: Array1<f64> = array(9, 8).mapv(f64::from);
    let out = constant.reference(x).unwrap();
    assert!(out.rows().into_iter().all(|row| row.iter().zip(&shift).all(|(a, b)| (a - b).abs() < 1e-12)));
    let (weights, _) = linear(2, [12, 8]);
    let without = SimPool::builder(norm(8), linear(1, [12, 8]), (weights, None)).build().unwrap();
    close(&without.reference(x).unwrap(), &sim_pool(8).reference(x).unwrap(), 1e-12);
    // The mean as a query that is given.
    let q = tokens.mean_axis(Axis(2)).unwrap();
    close(&sim_pool(8).reference(x.queries(q.view())).unwrap(), &sim_pool(8).reference(x).unwrap(), 1e-6);
}

/// Padding, NaN or not, is not pooled; what is not there at all is 0.
#[test]
fn padding_is_not_pooled() {
    let (mut tokens, q) = (array(1, (2, 1, 30, 8)), array(2, (2, 3, 16)));
    tokens.slice_mut(s![.., .., 20.., ..]).fill(f32::NAN);
    let abmilp = AbMilp::builder(vec![linear(4, [16, 8])]).build().unwrap();
    let part = tokens.slice(s![.., .., ..20, ..]);
    let (padded, part) = (Pooling::new(tokens.view()).lengths(&[20, 0]), Pooling::new(part));
    let [got, want] = [padded, part].map(|x| abmilp.forward(x.queries(q.view())).unwrap());
    assert!(
        got.slice(s![0, .., .., ..])
            .iter()
            .zip(want.slice(s![0, .., .., ..]))
            .all(|(a, b)| (a - b).abs() < 1e-6)
    );
    assert!(got.slice(s![1, .., .., ..]).iter().all(|&x| x == 0.0));
    let got = sim_pool(8).forward(padded).unwrap();
    assert!(got.iter().all(|x| x.is_finite()) && got.slice(s![1, .., .., ..]).iter().all(|&x| x == 0.0));
}

#[test]
fn refusals() {
    let (tokens, q) = (array(1, (2, 2, 30, 8)), array(2, (2, 3, 16)));
    let x = Pooling::new(tokens.view());
    let abmilp = |layers| AbMilp::builder(layers);
    let of = abmilp(vec![linear(4, [16, 15])]).build().unwrap();
    let want = "tokens: expected shape heads and dim of 15 elements together, got [2, 2, 30, 8]";
    assert_eq!(refused(&of, x.queries(q.view())), want);
    let of = abmilp(vec![linear(4, [15, 16])]).build().unwrap();
    let want = "queries: expected shape [batch, n, 15], got [2, 3, 16]";
    assert_eq!(refused(&of, x.queries(q.view())), want);
    assert_eq!(refused(&of, x), "queries: expected rows of the last layer, got none");
    let want = "lengths: expected 2 lengths of at most 30, got [31, 0]";
    assert_eq!(refused(&sim_pool(16), x.lengths(&[31, 0])), want);
    let layers = error(abmilp(vec![linear(4, [15, 16]), linear(4, [3, 14])]).build());
    assert_eq!(layers, "layers: expected shape [_, 15], got [3, 14]");
    let key = error(SimPool::builder(norm(8), linear(1, [12, 8]), linear(2, [11, 8])).build());
    assert_eq!(key, "key: expected shape [12, dim] as query has it, got [11, 8]");
}
