use super::*;
use crate::input::Qkv;
use crate::linear::{SimpleGla, TokenGated};
use crate::math::gates::exact;
use crate::testing::{agree, array, pairs, within};
use crate::{Attention, Bounded};
use ndarray::{Array3, s};

fn tokens(seed: u64, f: impl Fn(f32) -> f32) -> Array3<f32> {
    array([1, 2, 90, 1], seed).index_axis_move(Axis(3), 0).mapv(f)
}

/// The paper's form with all pairs: what a token and the next one make of a
/// key, rotated by the difference of angles.
#[test]
fn is_its_form_with_all_pairs() {
    let (c, b, v) = (array([1, 2, 90, 6], 1), array([1, 2, 90, 6], 2), array([1, 2, 90, 5], 3));
    let (step, trap) = (tokens(4, |x| 0.3 * (1.0 + x)), tokens(5, |x| 3.0 * x));
    let decay = tokens(6, |x| -0.1 * (1.0 + x));
    let angle = array([1, 2, 90, 2], 7);
    let input = |angle| {
        let qkv = Qkv::new(c.view(), b.view(), v.view());
        Mamba3Qkv::new(qkv, decay.view(), step.view(), trap.view(), angle)
    };
    let mamba = Mamba3::builder().build().unwrap();
    let share = |h, t: usize, by: f64| {
        f64::from(*step.get([0, h, t]).unwrap_or(&0.0))
            * exact::sigmoid(by * f64::from(*trap.get([0, h, t]).unwrap_or(&0.0)))
    };
    let want = pairs(&v, |_, h, i, j| {
        let sum = |x: &Array3<f32>| (j + 1..=i).map(|t| f64::from(x[[0, h, t]])).sum::<f64>();
        let turn = |p| {
            let each =
                |t| std::f64::consts::PI * f64::from(angle[[0, h, t, p]]).tanh() * f64::from(step[[0, h, t]]);
            (j + 1..=i).map(each).sum::<f64>()
        };
        let at = |x: &Array4<f32>, t, d| f64::from(x[[0, h, t, d]]);
        let dot: f64 = (0..3)
            .map(|p| {
                let (sin, cos) = if p < 2 { turn(p).sin_cos() } else { (0.0, 1.0) };
                let ([q0, q1], [k0, k1]) =
                    ([0, 1].map(|d| at(&c, i, 2 * p + d)), [0, 1].map(|d| at(&b, j, 2 * p + d)));
                cos * (q0 * k0 + q1 * k1) - sin * (q1 * k0 - q0 * k1)
            })
            .sum();
        let next = if i == j { 0.0 } else { share(h, j + 1, -1.0) };
        dot * sum(&decay).exp() * (share(h, j, 1.0) + next)
    });
    agree(&mamba.reference(input(angle.view())).unwrap(), &want);
    // Without turns and with steps that have all of their own token it is
    // simple GLA on keys times steps.
    let (none, all) = (Array4::zeros((1, 2, 90, 0)), Array3::from_elem((1, 2, 90), 200.0));
    let keys = Array4::from_shape_fn(b.dim(), |(n, h, t, d)| b[[n, h, t, d]] * step[[n, h, t]]);
    let gla = SimpleGla::builder().scale(1.0).build().unwrap();
    let same = TokenGated { qkv: Qkv::new(c.view(), keys.view(), v.view()), log_decay: decay.view() };
    let out = mamba.forward(Mamba3Qkv { trap: all.view(), ..input(none.view()) }).unwrap();
    within("gla", &out, &gla.reference(same).unwrap(), &(2.0 * gla.error_bound(same).unwrap()));
}

#[test]
fn refusals() {
    let (x, one) = (array([1, 2, 6, 8], 1), Array3::zeros((1, 2, 6)));
    let angle = array([1, 2, 6, 5], 1);
    let qkv = Qkv::new(x.view(), x.view(), x.view());
    let input = |angle| Mamba3Qkv::new(qkv, one.view(), one.view(), one.view(), angle);
    let error = |mamba: Mamba3Builder, x| mamba.build().unwrap().forward(x).unwrap_err().to_string();
    let want = "angle: expected at most 4 pairs of 8 channels, got 5";
    assert_eq!(error(Mamba3::builder(), input(angle.view())), want);
    let minus = Array3::from_elem((1, 2, 6), -0.5);
    let want = "step: expected steps of at least 0, got -0.5";
    assert_eq!(
        error(Mamba3::builder(), Mamba3Qkv { step: minus.view(), ..input(angle.slice(s![.., .., .., ..4])) }),
        want
    );
    let few = angle.slice(s![.., .., .., ..4]);
    let want = "skip: expected one for each of the 2 heads, got 3";
    assert_eq!(error(Mamba3::builder().skip(&[0.0; 3]), input(few)), want);
    let bias = Array2::zeros((2, 7));
    let want = "c_bias: expected shape [heads, head_dim] = [2, 8], got [2, 7]";
    assert_eq!(error(Mamba3::builder().biases(bias.view(), bias.view()), input(few)), want);
}
