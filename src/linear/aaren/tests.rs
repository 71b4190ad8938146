//! Aaren against its definition and against attention over each prefix.

use ndarray::{Array3, Array4, ArrayView4, Axis, s};

use super::{Aaren, AarenInput};
use crate::attention::{Attention, Bounded, Recurrent};
use crate::dense::Dense;
use crate::engine::parallel::on_threads;
use crate::input::Qkv;
use crate::merge;
use crate::simd::Isa;
use crate::testing::arrays::{array, within};

struct Case {
    q: Array3<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    bias: Array3<f32>,
}

impl Case {
    /// Every fifth token hidden, the first three too.
    fn new([batch, heads, shared, len, dim, value_dim]: [usize; 6], scale: f32) -> Self {
        let mut bias = array(4, (batch, shared, len));
        for ((_, _, t), x) in bias.indexed_iter_mut() {
            if t < 3 || t % 5 == 4 {
                *x = f32::NEG_INFINITY;
            }
        }
        Self {
            q: array(1, (batch, heads, dim)).mapv(|x| scale * x),
            k: array(2, (batch, shared, len, dim)),
            v: array(3, (batch, shared, len, value_dim)),
            bias,
        }
    }

    fn x(&self) -> AarenInput<'_, f32> {
        AarenInput::new(self.q.view(), self.k.view(), self.v.view())
    }

    fn tokens(&self, range: std::ops::Range<usize>) -> AarenInput<'_, f32> {
        let part = |x| ArrayView4::slice_move(x, s![.., .., range.clone(), ..]);
        AarenInput::new(self.q.view(), part(self.k.view()), part(self.v.view())).biased(self.bias.slice(s![
            ..,
            ..,
            range
        ]))
    }
}

#[test]
fn every_instruction_set_keeps_to_the_definition() {
    let sizes = [
        [1, 1, 1, 1, 1, 1],
        [2, 2, 1, 31, 5, 3],
        [1, 4, 2, 255, 16, 16],
        [1, 1, 1, 256, 16, 70],
        [1, 1, 1, 257, 33, 8],
        [1, 2, 2, 700, 8, 8],
        [2, 1, 1, 0, 16, 16],
        [1, 1, 1, 40, 0, 4],
        [1, 1, 1, 40, 4, 0],
    ];
    let mut worst = 0f64;
    for sizes in sizes {
        for scale in [0.5, 4.0, 60.0] {
            let case = Case::new(sizes, scale);
            for isa in Isa::available() {
                let aaren = Aaren::builder().isa(isa).build().unwrap();
                for x in [case.x(), case.x().biased(case.bias.view())] {
                    let (want, bound) = (aaren.reference(x).unwrap(), aaren.error_bound(x).unwrap());
                    let once = aaren.forward(x).unwrap();
                    let what = format!("{sizes:?} {scale} {isa}");
                    worst = worst.max(within(&what, once.view(), &want, &bound));
                    for threads in [1, 3] {
                        assert_eq!(on_threads(threads, || aaren.forward(x).unwrap()), once, "{what}");
                    }
                }
            }
        }
    }
    println!("{worst:.3}");
}

#[test]
fn each_prefix_is_attended_to_as_dense_attention_does() {
    let case = Case::new([2, 4, 2, 300, 16, 8], 3.0);
    let aaren = Aaren::builder().build().unwrap();
    let got = aaren.forward(case.x()).unwrap();
    // The query at every position, causally.
    let q = case.q.view().insert_axis(Axis(2));
    let q = q.broadcast((2, 4, 300, 16)).unwrap();
    let dense = Dense::builder().causal().build().unwrap();
    let want = dense.forward(Qkv::new(q, case.k.view(), case.v.view())).unwrap();
    assert!(got.iter().zip(&want).all(|(x, y)| (x - y).abs() < 1e-5));

    // The last prefix, and the states of two halves put together.
    let halves = [0..130, 130..300].map(|range| {
        let mut state = merge::State::empty(8);
        for t in range {
            let score: f32 = (0..16).map(|c| case.q[[1, 3, c]] * case.k[[1, 1, t, c]]).sum::<f32>() * 0.25;
            let value: Vec<f64> = case.v.slice(s![1, 1, t, ..]).iter().map(|&x| x.into()).collect();
            state.push(score.into(), &value);
        }
        state
    });
    let [mut first, second] = halves;
    first.merge(&second);
    let (last, _) = first.finish();
    assert!(got.slice(s![1, 3, 299, ..]).iter().zip(&last).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-5));
}

#[test]
fn scores_may_rise_by_any_amount_and_shift() {
    // Relative to one maximum for all, the first weights would vanish.
    let scores = [0f32, 200.0, 400.0, 400.0, 100.0];
    let (q, k) = (Array3::ones((1, 1, 1)), Array4::zeros((1, 1, 5, 1)));
    let v = Array4::from_shape_fn((1, 1, 5, 1), |at| at.2 as f32 + 1.0);
    let aaren = Aaren::builder().build().unwrap();
    for shift in [0.0, -1e3, 1e4] {
        let bias = Array3::from_shape_fn((1, 1, 5), |at| scores[at.2] + shift);
        let x = AarenInput::new(q.view(), k.view(), v.view()).biased(bias.view());
        let got = aaren.forward(x).unwrap();
        assert_eq!(got.iter().copied().collect::<Vec<f32>>(), [1.0, 2.0, 3.0, 3.5, 3.5]);
    }
}

#[test]
fn hidden_tokens_leave_everything_and_visible_nan_shows() {
    let case = Case::new([1, 2, 1, 300, 8, 4], 2.0);
    let aaren = Aaren::builder().build().unwrap();
    let x = case.tokens(0..300);
    let clean = aaren.forward(x).unwrap();
    assert!(clean.slice(s![.., .., ..3, ..]).iter().all(|x| *x == 0.0));
    assert!(
        clean
            .slice(s![.., .., 3, ..])
            .iter()
            .zip(case.v.slice(s![0, 0, 3, ..]).iter().cycle())
            .all(|(x, v)| x == v)
    );
    let (mut k, mut v) = (case.k.clone(), case.v.clone());
    k.slice_mut(s![.., .., 4..;5, ..]).fill(f32::NAN);
    v.slice_mut(s![.., .., 4..;5, ..]).fill(f32::INFINITY);
    assert_eq!(aaren.forward(AarenInput { k: k.view(), v: v.view(), ..x }).unwrap(), clean);
    for in_key in [false, true] {
        let (mut k, mut v) = (case.k.clone(), case.v.clone());
        if in_key {
            k[[0, 0, 155, 2]] = f32::NAN
        } else {
            v[[0, 0, 155, 2]] = f32::NAN
        }
        let got = aaren.forward(AarenInput { k: k.view(), v: v.view(), ..x }).unwrap();
        for ((_, h, t, c), x) in got.indexed_iter() {
            let hit = t >= 155 && (in_key || c == 2);
            assert!(if hit { x.is_nan() } else { *x == clean[[0, h, t, c]] }, "{t} {c}: {x}");
        }
    }
    let hidden = Array3::from_elem((1, 1, 300), f32::NEG_INFINITY);
    let mut state = aaren.initial_state(x).unwrap();
    let out = aaren.prefill(x.biased(hidden.view()), &mut state).unwrap();
    assert!(out.iter().all(|x| *x == 0.0));
    assert_eq!(state, aaren.initial_state(x).unwrap());
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = Aaren::builder().scale(f32::NAN).build().unwrap_err().to_string();
    assert_eq!(refused, "scale: expected a finite number, got NaN");
    let case = Case::new([1, 4, 2, 5, 3, 4], 1.0);
    let aaren = Aaren::builder().build().unwrap();
    let refused = |x: AarenInput<'_, f32>| aaren.forward(x).unwrap_err().to_string();
    assert_eq!(
        refused(AarenInput { k: case.v.view(), ..case.x() }),
        "k: expected shape [batch, heads, len, head_dim] = [1, 4 or a divisor, 5, 3], got [1, 2, 5, 4]"
    );
    assert_eq!(
        refused(case.x().biased(case.bias.slice(s![.., .., ..4]))),
        "bias: expected shape [batch, heads, len] = [1, 4 or a divisor, 5], got [1, 2, 4]"
    );
    assert_eq!(
        refused(case.x().packed(&[1, 5])),
        "offsets: expected non-decreasing offsets from 0 to at most 5, one more than there are sequences, \
         got 2 offsets from Some(1) to Some(5)"
    );
}
