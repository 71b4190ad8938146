use super::*;
use crate::linear::{Form, Mamba3, Mamba3Qkv};
use crate::testing::{agree, array, keeps, within};
use crate::{Attention, Bounded, Recurrent};
use ndarray::{Array3, concatenate, s};

fn tokens(seed: u64, len: usize, f: impl Fn(f32) -> f32) -> Array3<f32> {
    array([1, 2, len, 1], seed).index_axis_move(Axis(3), 0).mapv(f)
}

/// Numbers of tokens: log decays, steps, shares, and angles of `pairs` pairs.
struct Told {
    decay: Array3<f32>,
    step: Array3<f32>,
    trap: Array3<f32>,
    angle: Array4<f32>,
}

fn told(len: usize, pairs: usize) -> Told {
    Told {
        decay: tokens(6, len, |x| -0.1 * (1.0 + x)),
        step: tokens(4, len, |x| 0.3 * (1.0 + x)),
        trap: tokens(5, len, |x| 3.0 * x),
        angle: array([1, 2, len, pairs], 7),
    }
}

impl Told {
    fn with<'a>(&'a self, [q, k, v]: [&'a Array4<f32>; 3]) -> Mamba3MimoInput<'a, f32> {
        let (decay, step, trap) = (self.decay.view(), self.step.view(), self.trap.view());
        Mamba3MimoInput::new(q.view(), k.view(), v.view(), decay, step, trap, self.angle.view())
    }

    fn alone<'a>(&'a self, [q, k, v]: [&'a Array4<f32>; 3]) -> Mamba3Qkv<'a, f32> {
        let (decay, step, trap) = (self.decay.view(), self.step.view(), self.trap.view());
        Mamba3Qkv::new(Qkv::new(q.view(), k.view(), v.view()), decay, step, trap, self.angle.view())
    }
}

/// Each row `ranks` times, one after the other.
fn copies(x: &Array4<f32>, ranks: usize) -> Array4<f32> {
    let (batch, heads, len, dim) = x.dim();
    Array4::from_shape_fn((batch, heads, len * ranks, dim), |(b, h, t, c)| x[[b, h, t / ranks, c]])
}

const FORMS: [Form; 3] = [Form::Auto, Form::Chunked, Form::Recurrent];

#[test]
fn of_one_rank_or_of_copies_it_is_mamba_3() {
    let (q, k, v) = (array([1, 2, 90, 6], 1), array([1, 2, 90, 6], 2), array([1, 2, 90, 21], 3));
    let (c, b) = (array([1, 2, 1, 6], 8).remove_axis(Axis(0)), array([1, 2, 1, 6], 9).remove_axis(Axis(0)));
    let numbers = told(90, 2);
    let siso = Mamba3::builder().biases(c.slice(s![.., 0, ..]), b.slice(s![.., 0, ..])).build().unwrap();
    let x = numbers.alone([&q, &k, &v]);
    let (want, bound) = (siso.reference(x).unwrap(), siso.error_bound(x).unwrap());
    for (ranks, form) in [1, 2, 4, 8].into_iter().flat_map(|ranks| FORMS.map(|form| (ranks, form))) {
        let all = |x: &Array3<f32>| Array3::from_shape_fn((2, ranks, 6), |(h, _, c)| x[[h, 0, c]]);
        let mimo = Mamba3Mimo::builder(ranks).pairs(Pairs::Neighbours).form(form);
        let mimo = mimo.biases(all(&c).view(), all(&b).view()).build().unwrap();
        let (q, k) = (copies(&q, ranks), copies(&k, ranks));
        let x = numbers.with([&q, &k, &v]);
        agree(&mimo.reference(x).unwrap(), &want);
        let bound = &bound + &mimo.error_bound(x).unwrap();
        within(&format!("{ranks} ranks, {form:?}"), &mimo.forward(x).unwrap(), &want, &bound);
    }
}

/// The paper's form: all ranks of the keys so far, of this token's too, whatever their
/// order; halves are neighbours of channels in another order.
#[test]
fn ranks_have_no_order_and_channels_are_named_by_pairs() {
    let (q, k, v) = (array([1, 2, 120, 8], 1), array([1, 2, 120, 8], 2), array([1, 2, 40, 5], 3));
    let numbers = told(40, 4);
    let (m, o) = (array([1, 2, 3, 5], 8).remove_axis(Axis(0)), array([1, 2, 3, 5], 9).remove_axis(Axis(0)));
    let mimo = |m: &Array3<f32>, o: &Array3<f32>, pairs| {
        Mamba3Mimo::builder(3).pairs(pairs).weights(m.view(), o.view()).skip(&[0.5, -1.0]).build().unwrap()
    };
    let first = mimo(&m, &o, Pairs::Halves);
    let x = numbers.with([&q, &k, &v]);
    let want = first.reference(x).unwrap();
    keeps("halves", &first, x);
    // Ranks the other way round.
    let turn =
        |x: &Array4<f32>| Array4::from_shape_fn(x.dim(), |(b, h, t, c)| x[[b, h, t / 3 * 3 + 2 - t % 3, c]]);
    let around = |x: &Array3<f32>| x.slice(s![.., ..;-1, ..]).to_owned();
    let (q2, k2) = (turn(&q), turn(&k));
    agree(
        &mimo(&around(&m), &around(&o), Pairs::Halves).reference(numbers.with([&q2, &k2, &v])).unwrap(),
        &want,
    );
    // Channels in the order of neighbours.
    let order =
        |x: &Array4<f32>| Array4::from_shape_fn(x.dim(), |(b, h, t, c)| x[[b, h, t, c / 2 + c % 2 * 4]]);
    let (q3, k3) = (order(&q), order(&k));
    let next = mimo(&m, &o, Pairs::Neighbours);
    let x = numbers.with([&q3, &k3, &v]);
    agree(&next.reference(x).unwrap(), &want);
    keeps("neighbours", &next, x);
}

#[test]
fn a_state_goes_on_where_tokens_were_cut() {
    let (q, k, v) = (array([1, 2, 200, 8], 1), array([1, 2, 200, 8], 2), array([1, 2, 50, 20], 3));
    let numbers = told(50, 3);
    let z = array([1, 2, 50, 20], 10);
    for form in FORMS {
        let mimo = Mamba3Mimo::builder(4).form(form).skip(&[1.0, 0.5]).build().unwrap();
        let whole = numbers.with([&q, &k, &v]).gated(z.view());
        let (want, bound) = (mimo.reference(whole).unwrap(), mimo.error_bound(whole).unwrap());
        let mut state = mimo.initial_state(whole).unwrap();
        let pieces: Vec<_> = [0..1, 1..2, 2..2, 2..37, 37..50]
            .into_iter()
            .map(|t| {
                let rows = s![.., .., 4 * t.start..4 * t.end, ..];
                let (of, all) = (s![.., .., t.clone()], s![.., .., t.clone(), ..]);
                let x = Mamba3MimoInput::new(
                    q.slice(rows),
                    k.slice(rows),
                    v.slice(all),
                    numbers.decay.slice(of),
                    numbers.step.slice(of),
                    numbers.trap.slice(of),
                    numbers.angle.slice(all),
                );
                mimo.prefill(x.gated(z.slice(all)), &mut state).unwrap()
            })
            .collect();
        let out = concatenate(Axis(2), &pieces.iter().map(|x| x.view()).collect::<Vec<_>>()).unwrap();
        within(&format!("{form:?}"), &out, &want, &(2.0 * bound));
        assert_eq!(state.rest()[1].view().dim(), (1, 2, 4, 8));
    }
}

#[test]
fn refusals() {
    let (x, v, numbers) = (array([1, 2, 12, 8], 1), array([1, 2, 6, 8], 2), told(6, 5));
    let error = |mimo: Mamba3MimoBuilder, x| mimo.build().unwrap().forward(x).unwrap_err().to_string();
    let five = numbers.with([&x, &x, &v]);
    let four = Mamba3MimoInput { angle: numbers.angle.slice(s![.., .., .., ..4]), ..five };
    assert_eq!(error(Mamba3Mimo::builder(2), five), "angle: expected at most 4 pairs of 8 channels, got 5");
    assert_eq!(error(Mamba3Mimo::builder(3), four), "k: expected 3 keys for each of 6 tokens, got 12");
    let wrong = Array3::zeros((2, 3, 8));
    assert_eq!(
        error(Mamba3Mimo::builder(2).weights(wrong.view(), wrong.view()), four),
        "value_weights: expected shape [heads, ranks * dim] = [2, 2 * 8], got [2, 24]"
    );
    assert_eq!(
        error(Mamba3Mimo::builder(2).biases(wrong.view(), wrong.view()), four),
        "c_bias: expected shape [heads, ranks * dim] = [2, 2 * 8], got [2, 24]"
    );
    assert_eq!(
        error(Mamba3Mimo::builder(2).skip(&[0.0; 3]), four),
        "skip: expected one for each of the 2 heads, got 3"
    );
    for ranks in [0, 33] {
        let error = Mamba3Mimo::builder(ranks).build().unwrap_err().to_string();
        assert_eq!(error, format!("ranks: expected from 1 to 32, got {ranks}"));
    }
    let mimo = Mamba3Mimo::builder(2).build().unwrap();
    let one = Mamba3Mimo::builder(1).build().unwrap();
    let few = Mamba3MimoInput { q: x.slice(s![.., .., ..6, ..]), k: x.slice(s![.., .., ..6, ..]), ..four };
    let mut state = one.initial_state(few).unwrap();
    let error = mimo.prefill(four, &mut state).unwrap_err().to_string();
    assert_eq!(
        error,
        "state: expected shape [sequences, heads, state_dim, columns] = [1, 2, 2, 8], got [1, 2, 1, 8]"
    );
}
