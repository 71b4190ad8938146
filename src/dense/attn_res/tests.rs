use super::*;
use crate::Attention;
use crate::testing::arrays::array;
use crate::testing::qkv::{close, error, held, refused};
use ndarray::{Array5, s};

#[test]
fn kernels_keep_to_the_definition() {
    let mut worst = 0f64;
    for (count, heads, len, dim) in
        [(1, 1, 1, 5), (9, 2, 40, 70), (150, 1, 3, 16), (0, 1, 2, 4), (3, 1, 2, 0)]
    {
        let (states, query) = (array(1, (count, 2, heads, len, dim)) * 3.0, array(2, (heads, dim)));
        let (gain, builder) = (array(3, dim), AttnRes::builder(query.view()));
        let all = builder.clone().gain(gain.view()).norm(gain.view()).scale(4.0).epsilon(1e-3);
        for of in [builder, all] {
            worst = worst.max(held(&of.build().unwrap(), States::of_heads(states.view())));
        }
    }
    println!("AttnRes: {worst:.3} of the bound");
}

#[test]
fn queries_of_0_are_the_mean_and_one_state_stays() {
    let states = array(1, (6, 1, 10, 8));
    let of = |states: &Array4<f32>, w: &Array2<f32>| {
        AttnRes::builder(w.view()).build().unwrap().reference(States::new(states.view())).unwrap()
    };
    let mean = states.mapv(f64::from).mean_axis(Axis(0)).unwrap().insert_axis(Axis(1));
    close(&of(&states, &Array2::zeros((1, 8))), &mean, 1e-12);
    let (w, one) = (array(2, (1, 8)), states.slice(s![..1, .., .., ..]).to_owned());
    close(&of(&one, &w), &one.mapv(f64::from).slice_move(s![0, .., .., ..]).insert_axis(Axis(1)), 1e-12);
    let turned = states.select(Axis(0), &[3, 5, 0, 1, 4, 2]);
    close(&of(&turned, &w), &of(&states, &w), 1e-12);
}

/// A state's size is no matter of its weight, but of what it adds.
#[test]
fn larger_states_weigh_the_same() {
    let (mut states, w) = (array(1, (2, 1, 4, 8)), array(2, (1, 8)));
    let least = AttnRes::builder(w.view()).epsilon(1e-30).build().unwrap();
    let of = |states: &Array4<f32>| least.reference(States::new(states.view())).unwrap();
    let was = of(&states);
    let rest = |states: &Array4<f32>| {
        let mut rest = states.clone();
        rest.slice_mut(s![0, .., .., ..]).fill(0.0);
        rest
    };
    // o = p r_0 + (1 - p) r_1, where the first is 4 times as large: 3 p r_0 more.
    states.slice_mut(s![0, .., .., ..]).mapv_inplace(|x| 4.0 * x);
    let more = of(&states) - was;
    let first = states.mapv(f64::from).slice_move(s![0, 0, .., ..]) * 0.75;
    for t in 0..4 {
        let p: Vec<f64> = (0..8).map(|c| more[[0, 0, t, c]] / first[[t, c]]).collect();
        assert!(p.iter().all(|x| (x - p[0]).abs() < 1e-9 && *x > 0.0 && *x < 1.0), "{p:?}");
    }
    // A state of zeros has a score of 0.
    assert!(of(&rest(&states)).iter().all(|x| x.is_finite()));
}

#[test]
fn refusals() {
    let (w, states) = (array(1, (1, 8)), Array5::<f32>::zeros((2, 1, 3, 4, 8)));
    let x = States::of_heads(states.view());
    let of = |w: &Array2<f32>| AttnRes::builder(w.view());
    let short = refused(&of(&array(1, (2, 8))).build().unwrap(), x);
    assert_eq!(short, "query: expected shape [heads | 1, dim] = [3 | 1, 8], got [2, 8]");
    let gain = error(of(&w).gain(array(1, 7).view()).build());
    assert_eq!(gain, "gain: expected shape [dim] = [8], got [7]");
    let epsilon = error(of(&w).epsilon(0.0).build());
    assert_eq!(epsilon, "epsilon: expected a finite number above 0, got 0");
}
