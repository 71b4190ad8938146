//! S6 against its definition and against what it is a case of.

use ndarray::{Array2, Array3, Array4, Axis, s};

use super::{S6, S6Gradients, S6Input};
use crate::attention::{Attention, Backward, Bounded, Recurrent};
use crate::definition::recurrence::ERROR_CONSTANT;
use crate::engine::parallel::on_threads;
use crate::engine::workspace::Workspace;
use crate::input::Qkv;
use crate::linear::{Carried, ChannelGated, Gla, SimpleGla, State, TokenGated};
use crate::simd::Isa;
use crate::testing::arrays::{array, within};

/// Arrays of a call; `b` and `c` have `shared` heads.
struct Case {
    u: Array4<f32>,
    delta: Array4<f32>,
    b: Array4<f32>,
    c: Array4<f32>,
    z: Array4<f32>,
}

impl Case {
    fn new([batch, heads, shared, len, channels, n]: [usize; 6]) -> Self {
        let (wide, narrow) = ((batch, heads, len, channels), (batch, shared, len, n));
        Self {
            u: array(1, wide),
            delta: array(2, wide).mapv(|x| x.abs()),
            b: array(3, narrow),
            c: array(4, narrow),
            z: array(5, wide).mapv(|x| 3.0 * x),
        }
    }

    fn x(&self) -> S6Input<'_, f32> {
        S6Input::new(self.u.view(), self.delta.view(), self.b.view(), self.c.view())
    }
}

/// Rates of one head after the other: 1, 2, .. as Mamba starts with, times a factor.
fn rates(heads: usize, channels: usize, n: usize, factor: f32) -> Array3<f32> {
    let noise = array(6, (heads, channels, n));
    Array3::from_shape_fn((heads, channels, n), |at| -factor * (at.2 as f32 + 1.0) * (1.0 + 0.5 * noise[at]))
}

const SIZES: [[usize; 6]; 9] = [
    [1, 1, 1, 1, 1, 1],
    [2, 2, 1, 7, 5, 3],
    [1, 1, 1, 31, 16, 16],
    [1, 2, 2, 32, 70, 16],
    [1, 4, 2, 33, 9, 4],
    [2, 1, 1, 101, 64, 8],
    [1, 1, 1, 0, 16, 16],
    [1, 1, 1, 5, 0, 4],
    [1, 1, 1, 9, 20, 0],
];

/// The bound is the one that the docs give: what the family's constant says where nothing
/// decays, and what is left of a state below `2^-100`.
#[test]
fn the_bound_is_the_published_one() {
    let case = Case::new([1, 2, 1, 6, 3, 5]);
    let s6 = S6::builder(Array3::zeros((2, 3, 5))).build().unwrap();
    let bound = s6.error_bound(case.x()).unwrap();
    for ((_, h, t), &got) in bound.indexed_iter() {
        let total = |channel: usize| -> f64 {
            let written = |s: usize, j: usize| {
                let at = [0, h, j, channel];
                (f64::from(case.delta[at]) * f64::from(case.b[[0, 0, j, s]]) * f64::from(case.u[at])).abs()
            };
            let read = |s: usize| f64::from(case.c[[0, 0, t, s]]).abs();
            (0..5).map(|s| read(s) * (0..=t).map(|j| written(s, j)).sum::<f64>()).sum()
        };
        let tokens = (t + 1) as f64;
        let reads: f64 = (0..5).map(|s| f64::from(case.c[[0, 0, t, s]]).abs()).sum();
        let unit = ERROR_CONSTANT * 2f64.powi(-24) * (5.0 + tokens + 64.0);
        let want = unit * (0..3).map(total).fold(0.0, f64::max) + 2f64.powi(-100) * tokens * reads;
        assert!((got - want).abs() <= 1e-9 * want, "{h} {t}: {got:e}, not {want:e}");
    }
}

#[test]
fn every_instruction_set_keeps_to_the_definition() {
    let mut worst = 0f64;
    for sizes in SIZES {
        let [_, heads, _, _, channels, n] = sizes;
        let case = Case::new(sizes);
        // From memory of many tokens to none.
        for factor in [1e-3, 0.1, 3.0, 200.0] {
            for isa in Isa::available() {
                let plain = S6::builder(rates(heads, channels, n, factor)).isa(isa);
                let whole = plain
                    .clone()
                    .softplus()
                    .skip(array(7, (heads, channels)))
                    .delta_bias(array(8, (heads, channels)).mapv(|x| 4.0 * x - 2.0));
                let gated = case.x().gated(case.z.view());
                for (s6, x) in [(plain.build().unwrap(), case.x()), (whole.build().unwrap(), gated)] {
                    let what = format!("{sizes:?} {factor} {isa}");
                    let got = s6.forward(x).unwrap();
                    let (want, bound) = (s6.reference(x).unwrap(), s6.error_bound(x).unwrap());
                    worst = worst.max(within(&what, got.view(), &want, &bound));
                }
            }
        }
    }
    println!("{worst:.3}");
}

#[test]
fn many_slowly_decaying_tokens_stay_within_the_bound() {
    // All inputs of one sign and decays that are all the same: errors of the
    // decays add up.
    let len = 3000;
    let ones = Array4::<f32>::ones((1, 1, len, 16));
    for step in [1e-5f32, 1e-3, 0.03, 0.2] {
        let delta = Array4::from_elem((1, 1, len, 16), step);
        let x = S6Input::new(ones.view(), delta.view(), ones.view(), ones.view());
        for isa in Isa::available() {
            let s6 = S6::builder(rates(1, 16, 16, 0.3)).isa(isa).build().unwrap();
            let (want, bound) = (s6.reference(x).unwrap(), s6.error_bound(x).unwrap());
            let ratio = within("slow", s6.forward(x).unwrap().view(), &want, &bound);
            println!("{step} {isa}: {ratio:.3}");
        }
    }
}

#[test]
fn threads_layouts_and_packing_change_no_bit() {
    let case = Case::new([2, 2, 1, 77, 70, 16]);
    let x = case.x().gated(case.z.view());
    let s6 = S6::builder(rates(2, 70, 16, 0.2)).softplus().build().unwrap();
    let once = s6.forward(x).unwrap();
    for threads in [1, 3] {
        assert_eq!(on_threads(threads, || s6.forward(x).unwrap()), once);
    }
    // Time along the axis whose elements are neighbours, as Mamba has it.
    let turned = |x: &Array4<f32>| {
        x.view().permuted_axes([0, 1, 3, 2]).as_standard_layout().into_owned().permuted_axes([0, 1, 3, 2])
    };
    let (u, delta, b, c, z) =
        (turned(&case.u), turned(&case.delta), turned(&case.b), turned(&case.c), turned(&case.z));
    assert_eq!(u.strides()[2], 1);
    let mamba = S6Input::new(u.view(), delta.view(), b.view(), c.view()).gated(z.view());
    let mut out = Array4::from_elem((2, 2, 70, 77), f32::NAN);
    s6.forward_into(mamba, out.view_mut().permuted_axes([0, 1, 3, 2]), &mut Workspace::new()).unwrap();
    assert_eq!(out.permuted_axes([0, 1, 3, 2]), once);
}

fn close(a: &Array4<f32>, b: &Array4<f32>) {
    assert_eq!(a.dim(), b.dim());
    for (at, x) in a.indexed_iter() {
        let y = b[at];
        assert!((x - y).abs() <= 2e-5 * (1.0 + y.abs()), "{at:?}: {x} and {y}");
    }
}

#[test]
fn tied_rates_and_steps_are_state_space_duality() {
    // Per head one rate and per token one step: one decay a token (SSD).
    let case = Case::new([2, 4, 2, 150, 24, 16]);
    let rate = [-0.05f32, -0.3, -1.0, 0.0];
    let a = Array3::from_shape_fn((4, 24, 16), |(h, ..)| rate[h]);
    let steps = case.delta.slice(s![.., .., .., 0]).to_owned();
    let delta = steps.view().insert_axis(Axis(3));
    let delta = delta.broadcast((2, 4, 150, 24)).unwrap();
    let s6 = S6::builder(a).build().unwrap();
    let got = s6.forward(S6Input { delta, ..case.x() }).unwrap();
    let decay = Array3::from_shape_fn(steps.dim(), |at| steps[at] * rate[at.1]);
    let v = &case.u * &delta;
    let x = TokenGated::new(Qkv::new(case.c.view(), case.b.view(), v.view()), decay.view());
    close(&got, &SimpleGla::builder().scale(1.0).build().unwrap().forward(x).unwrap());
}

#[test]
fn each_channel_is_a_head_with_decays_of_channels() {
    let case = Case::new([2, 1, 1, 150, 12, 16]);
    let a = rates(1, 12, 16, 0.1);
    let got = S6::builder(a.clone()).build().unwrap().forward(case.x()).unwrap();
    let decay =
        Array4::from_shape_fn((2, 12, 150, 16), |(b, c, t, s)| case.delta[[b, 0, t, c]] * a[[0, c, s]]);
    let v = (&case.u * &case.delta).permuted_axes([0, 3, 2, 1]);
    let x = ChannelGated::new(Qkv::new(case.c.view(), case.b.view(), v.view()), decay.view());
    let want = Gla::builder().scale(1.0).build().unwrap().forward(x).unwrap();
    close(&got, &want.permuted_axes([0, 3, 2, 1]));
}

/// `sum_{j <= i} (q_i . k_j) v_j / eta_i`
fn normalised_attention(q: &Array4<f32>, k: &Array4<f32>, v: &Array4<f32>, eta: &[f64]) -> Array4<f32> {
    Array4::from_shape_fn(v.dim(), |(b, h, i, c)| {
        let term = |j: usize| {
            let score: f64 =
                (0..q.dim().3).map(|s| f64::from(q[[b, 0, i, s]]) * f64::from(k[[b, 0, j, s]])).sum();
            score * f64::from(v[[b, h, j, c]])
        };
        ((0..=i).map(term).sum::<f64>() / eta[i]) as f32
    })
}

/// S6 with one rate of -1 whose decays are `eta_{t-1} / eta_t`, and whose
/// inputs come with `1 / eta_t`.
fn by_normaliser(case: &Case, eta: &[f64]) -> Array4<f32> {
    let step = |t: usize| if t == 0 { 1.0 } else { (eta[t] / eta[t - 1]).ln() };
    let delta = Array4::from_shape_fn(case.u.dim(), |(_, _, t, _)| step(t) as f32);
    let b =
        Array4::from_shape_fn(case.b.dim(), |at| (f64::from(case.b[at]) / (eta[at.2] * step(at.2))) as f32);
    let a = Array3::from_elem((1, case.u.dim().3, b.dim().3), -1.0);
    let x = S6Input { delta: delta.view(), b: b.view(), ..case.x() };
    S6::builder(a).build().unwrap().forward(x).unwrap()
}

#[test]
fn normalised_and_linear_attention_are_scans() {
    // "Understanding the differences in Foundation Models": attention whose
    // normaliser is a number of each token.
    let mut case = Case::new([1, 1, 1, 90, 8, 6]);
    let mut eta = 1.0;
    let growing: Vec<f64> = (0..90)
        .map(|t| {
            eta += f64::from(case.z[[0, 0, t, 0]].abs()) + 0.05;
            eta
        })
        .collect();
    close(&by_normaliser(&case, &growing), &normalised_attention(&case.c, &case.b, &case.u, &growing));

    // Linear attention divides by the sum of its weights. That is a number of
    // the token alone where all queries are the same.
    case.b.mapv_inplace(|x| x.abs() + 0.1);
    let query: Vec<f32> = case.c.slice(s![0, 0, 0, ..]).iter().map(|x| x.abs() + 0.1).collect();
    case.c = Array4::from_shape_fn(case.c.dim(), |at| query[at.3]);
    let mut sum = 0.0;
    let sums: Vec<f64> = (0..90)
        .map(|t| {
            sum += (0..6).map(|s| f64::from(query[s]) * f64::from(case.b[[0, 0, t, s]])).sum::<f64>();
            sum
        })
        .collect();
    let got = by_normaliser(&case, &sums);
    close(&got, &normalised_attention(&case.c, &case.b, &case.u, &sums));
    // Weights that sum to 1 make no more of values than the largest.
    assert!(got.iter().all(|x| x.abs() <= 1.0));
}

#[test]
fn steps_of_nothing_leave_the_state() {
    let case = Case::new([1, 2, 1, 40, 10, 4]);
    let before = State::new(array(11, (1, 2, 4, 10))).unwrap();
    let skip: Array2<f32> = array(7, (2, 10));
    let want = Array4::from_shape_fn(case.u.dim(), |(b, h, t, c)| {
        let read: f32 = (0..4).map(|s| case.c[[b, 0, t, s]] * before.view()[[0, h, s, c]]).sum();
        read + skip[[h, c]] * case.u[[b, h, t, c]]
    });
    for (raw, softplus) in [(0.0, false), (-1e4, true), (f32::NEG_INFINITY, true)] {
        let delta = Array4::from_elem(case.u.dim(), raw);
        let s6 = S6::builder(rates(2, 10, 4, 1.0)).skip(skip.clone());
        let s6 = if softplus { s6.softplus() } else { s6 }.build().unwrap();
        let mut state = before.clone();
        let out = s6.prefill(S6Input { delta: delta.view(), ..case.x() }, &mut state).unwrap();
        close(&out, &want);
        assert_eq!(state, before);
    }
}

#[test]
fn gates_and_skips_come_after() {
    let case = Case::new([1, 1, 1, 20, 6, 4]);
    let (a, d) = (rates(1, 6, 4, 0.3), array(7, (1, 6)));
    let plain = S6::builder(a.clone()).build().unwrap().forward(case.x()).unwrap();
    let whole =
        S6::builder(a).skip(d.clone()).build().unwrap().forward(case.x().gated(case.z.view())).unwrap();
    let want = Array4::from_shape_fn(plain.dim(), |at| {
        let z = case.z[at];
        (plain[at] + d[[0, at.3]] * case.u[at]) * z / (1.0 + (-z).exp())
    });
    close(&whole, &want);
}

#[test]
fn what_decays_vanishes_and_does_not_become_subnormal() {
    let case = Case::new([1, 1, 1, 400, 16, 4]);
    let mut u = case.u.clone();
    u.slice_mut(s![.., .., 1.., ..]).fill(0.0);
    let x = S6Input { u: u.view(), ..case.x() };
    let s6 = S6::builder(Array3::from_elem((1, 16, 4), -2.0)).build().unwrap();
    let mut state = s6.initial_state(x).unwrap();
    let out = s6.prefill(x, &mut state).unwrap();
    assert!(out.iter().chain(state.view()).all(|x| *x == 0.0 || x.is_normal()));
    assert!(state.view().iter().all(|x| *x == 0.0));
    // Token by token too.
    let mut state = s6.initial_state(x).unwrap();
    for t in 0..400 {
        let part = |x: &Array4<f32>| x.slice(s![.., .., t..t + 1, ..]).to_owned();
        let (u, delta, b, c) = (part(&u), part(&case.delta), part(&case.b), part(&case.c));
        s6.step(S6Input::new(u.view(), delta.view(), b.view(), c.view()), &mut state).unwrap();
        assert!(state.view().iter().all(|x| *x == 0.0 || x.is_normal()));
    }
}

#[test]
fn nan_shows_in_its_channel_from_its_token_on() {
    let case = Case::new([1, 1, 1, 70, 20, 4]);
    let s6 = S6::builder(rates(1, 20, 4, 0.1)).build().unwrap();
    let clean = s6.forward(case.x()).unwrap();
    for in_step in [false, true] {
        let (mut u, mut delta) = (case.u.clone(), case.delta.clone());
        let spoilt = if in_step { &mut delta } else { &mut u };
        spoilt[[0, 0, 37, 3]] = f32::NAN;
        let got = s6.forward(S6Input { u: u.view(), delta: delta.view(), ..case.x() }).unwrap();
        for ((_, _, t, c), x) in got.indexed_iter() {
            let hit = c == 3 && t >= 37;
            assert!(if hit { x.is_nan() } else { *x == clean[[0, 0, t, c]] }, "{t} {c}: {x}");
        }
    }
    // A token's B reaches all channels.
    let mut b = case.b.clone();
    b[[0, 0, 37, 0]] = f32::NAN;
    let got = s6.forward(S6Input { b: b.view(), ..case.x() }).unwrap();
    assert!(got.indexed_iter().all(|((_, _, t, _), x)| x.is_nan() == (t >= 37)));
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |result: crate::Result<S6>| result.unwrap_err().to_string();
    let a = || Array3::from_elem((2, 3, 4), -1.0);
    let mut wrong = a();
    wrong[[1, 2, 3]] = 0.5;
    assert_eq!(
        refused(S6::builder(wrong.clone()).build()),
        "a: expected rates of at most 0; allow_growth() permits others, got 0.5"
    );
    assert!(S6::builder(wrong.clone()).allow_growth().build().is_ok());
    wrong[[1, 2, 3]] = f32::NEG_INFINITY;
    assert_eq!(refused(S6::builder(wrong).build()), "a: expected finite numbers, got -inf");
    assert_eq!(
        refused(S6::builder(a()).skip(Array2::zeros((1, 3))).build()),
        "skip: expected shape [heads, channels] = [2, 3] as a has it, got [1, 3]"
    );
    assert_eq!(
        refused(S6::builder(a()).delta_bias(Array2::from_elem((2, 3), f32::NAN)).build()),
        "delta_bias: expected finite numbers, got NaN"
    );

    let case = Case::new([1, 2, 1, 5, 3, 4]);
    let s6 = S6::builder(a()).build().unwrap();
    let refused = |x: S6Input<'_, f32>| s6.forward(x).unwrap_err().to_string();
    let short = case.delta.slice(s![.., .., ..4, ..]);
    assert_eq!(
        refused(S6Input { delta: short, ..case.x() }),
        "delta: expected shape [batch, heads, len, channels] = [1, 2, 5, 3], got [1, 2, 4, 3]"
    );
    assert_eq!(
        refused(case.x().gated(short)),
        "z: expected shape [batch, heads, len, channels] = [1, 2, 5, 3], got [1, 2, 4, 3]"
    );
    let narrow = case.b.slice(s![.., .., .., ..3]);
    assert_eq!(
        refused(S6Input { c: narrow, ..case.x() }),
        "c: expected shape [batch, heads, len, n] = [1, 2 or a divisor, 5, 4], got [1, 1, 5, 3]"
    );
    assert_eq!(
        refused(S6Input { b: narrow, c: narrow, ..case.x() }),
        "b: expected shape [batch, heads, len, n] = [_, _, _, 4] as a has it, got [1, 1, 5, 3]"
    );
    let other = Case::new([1, 1, 1, 5, 3, 4]);
    assert_eq!(
        refused(other.x()),
        "u: expected shape [batch, heads, len, channels] = [_, 2, _, 3] as a has it, got [1, 1, 5, 3]"
    );
    assert_eq!(
        refused(case.x().packed(&[0, 6])),
        "offsets: expected non-decreasing offsets from 0 to at most 5, one more than there are sequences, \
         got 2 offsets from Some(0) to Some(6)"
    );
    let mut delta = case.delta.clone();
    delta[[0, 1, 2, 1]] = -0.25;
    let negative = S6Input { delta: delta.view(), ..case.x() };
    let says =
        "delta: expected step sizes of at least 0; softplus() makes them, allow_growth() permits others";
    assert_eq!(refused(negative), format!("{says}, got -0.25"));
    let bias = |x| S6::builder(a()).delta_bias(Array2::from_elem((2, 3), x)).build().unwrap();
    assert!(bias(0.25).forward(negative).is_ok());
    assert!(bias(-2.0).forward(case.x()).unwrap_err().to_string().starts_with(says));
    assert!(S6::builder(a()).softplus().build().unwrap().forward(negative).is_ok());
}

type Found = Vec<(&'static str, Vec<f64>)>;

fn list<A: Copy + Into<f64>>(x: S6Gradients<A>) -> Found {
    let wide = [("u", x.u), ("delta", x.delta), ("b", x.b), ("c", x.c), ("z", x.z), ("state", x.state)];
    let narrow = [("skip", x.skip), ("delta_bias", x.delta_bias)];
    let numbers = |x: &mut dyn Iterator<Item = A>| x.map(A::into).collect::<Vec<f64>>();
    let mut list: Found = wide.into_iter().map(|(name, x)| (name, numbers(&mut x.into_iter()))).collect();
    list.extend(narrow.into_iter().map(|(name, x)| (name, numbers(&mut x.into_iter()))));
    list.push(("a", numbers(&mut x.a.into_iter())));
    list
}

/// A scan with whatever it may have, or as little.
fn both(heads: usize, channels: usize, n: usize, factor: f32, isa: Isa) -> [S6; 2] {
    let plain = S6::builder(rates(heads, channels, n, factor)).isa(isa);
    let bias = array(8, (heads, channels)).mapv(|x| 4.0 * x - 2.0);
    let whole = plain.clone().softplus().skip(array(7, (heads, channels))).delta_bias(bias);
    [plain.build().unwrap(), whole.build().unwrap()]
}

/// Root mean squares of errors as shares of those of the gradients.
#[test]
fn gradients_keep_to_their_definition() {
    for (sizes, factor) in SIZES.into_iter().flat_map(|sizes| [(sizes, 0.1), (sizes, 20.0)]) {
        let [batch, heads, _, len, channels, n] = sizes;
        let case = Case::new(sizes);
        let d_out = array(9, (batch, heads, len, channels));
        let (state, d_state) =
            (array(10, (batch, heads, n, channels)), array(11, (batch, heads, n, channels)));
        let state = State::new(state).unwrap();
        for isa in Isa::available() {
            for (which, s6) in both(heads, channels, n, factor, isa).into_iter().enumerate() {
                let x = if which == 0 { case.x() } else { case.x().gated(case.z.view()) };
                let all = Carried { state: Some(&state), d_state: Some(d_state.view()) };
                let carried = if which == 0 { Carried::default() } else { all };
                let run = |threads| {
                    on_threads(threads, || {
                        let bytes = s6.backward_workspace_bytes(x).unwrap();
                        let mut workspace = Workspace::with_capacity(bytes);
                        let words = workspace.capacity() / 4;
                        workspace.arena(0).unwrap().take::<f32>(words).fill(f32::NAN);
                        let mut got = s6.zero_gradients(x).unwrap();
                        got.b.fill(f32::NAN);
                        got.u.fill(f32::NAN);
                        s6.backward_into(x, d_out.view(), carried, &mut got, &mut workspace).unwrap();
                        got
                    })
                };
                let (once, more) = (run(1), run(3));
                let want = list(s6.reference_backward(x, d_out.view(), carried).unwrap());
                for (((name, got), (_, more)), (_, want)) in list(once).iter().zip(list(more)).zip(want) {
                    let what = format!("{name}: {sizes:?} {factor} {which} {isa}");
                    assert!(
                        got.iter().zip(&more).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{what}: threads"
                    );
                    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                    let size = norm(&mut want.iter().copied());
                    let off = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b));
                    assert!(off <= 2e-6 * size, "{what}: off by {off:e}, of {size:e}");
                }
            }
        }
    }
}

#[test]
fn gradients_of_packed_sequences_are_those_of_each() {
    let case = Case::new([1, 2, 1, 80, 20, 5]);
    let d_out = array(9, (1, 2, 80, 20));
    let offsets = [0, 33, 33, 80];
    let [_, s6] = both(2, 20, 5, 0.3, Isa::choose(None).unwrap());
    let none = Carried::default();
    let whole = s6.backward(case.x().gated(case.z.view()).packed(&offsets), d_out.view(), none).unwrap();
    let mut a = Array3::<f64>::zeros((2, 20, 5));
    for (index, at) in offsets.windows(2).enumerate() {
        let of = s![.., .., at[0]..at[1], ..];
        let x = S6Input::new(case.u.slice(of), case.delta.slice(of), case.b.slice(of), case.c.slice(of));
        let part = s6.backward(x.gated(case.z.slice(of)), d_out.slice(of), none).unwrap();
        assert_eq!(whole.u.slice(of), part.u);
        assert_eq!(whole.b.slice(of), part.b);
        assert_eq!(whole.state.index_axis(Axis(0), index), part.state.index_axis(Axis(0), 0));
        a += &part.a.mapv(f64::from);
    }
    assert!(a.iter().zip(&whole.a).all(|(a, b)| (a - f64::from(*b)).abs() < 1e-5));
}

/// The definition's gradients against differences of its outputs.
#[test]
fn gradients_are_differences() {
    let case = Case::new([1, 2, 1, 5, 3, 2]);
    let d_out = array(9, (1, 2, 5, 3));
    let arrays =
        [&case.u, &case.delta, &case.b, &case.c, &case.z].map(|x| x.mapv(|x| (x * 1024.0).round() / 1024.0));
    let own = rates(2, 3, 2, 0.5).mapv(|x| (x * 1024.0).round() / 1024.0);
    let heads = [7, 8].map(|seed| array(seed, (2, 3)).mapv(|x| (x * 1024.0).round() / 1024.0));
    type Inputs = ([Array4<f32>; 5], Array3<f32>, [Array2<f32>; 2]);
    let inputs: Inputs = (arrays, own, heads);
    fn with<R>((x, a, [skip, bias]): &Inputs, run: impl FnOnce(S6, S6Input<'_, f32>) -> R) -> R {
        let s6 =
            S6::builder(a.clone()).softplus().skip(skip.clone()).delta_bias(bias.clone()).build().unwrap();
        run(s6, S6Input::new(x[0].view(), x[1].view(), x[2].view(), x[3].view()).gated(x[4].view()))
    }
    let loss = |inputs: &Inputs| {
        let out = with(inputs, |s6, x| s6.reference(x).unwrap());
        out.iter().zip(&d_out).map(|(x, d)| x * f64::from(*d)).sum::<f64>()
    };
    let found = with(&inputs, |s6, x| s6.reference_backward(x, d_out.view(), Carried::default()).unwrap());
    for (name, found) in list(found) {
        for (n, got) in found.iter().enumerate().filter(|(n, _)| n % 3 == 1) {
            let moved = |by: f32| {
                let mut moved = inputs.clone();
                let (x, a, [skip, bias]) = &mut moved;
                let [u, delta, b, c, z] = x;
                let to = match name {
                    "u" => u.as_slice_mut(),
                    "delta" => delta.as_slice_mut(),
                    "b" => b.as_slice_mut(),
                    "c" => c.as_slice_mut(),
                    "z" => z.as_slice_mut(),
                    "a" => a.as_slice_mut(),
                    "skip" => skip.as_slice_mut(),
                    "delta_bias" => bias.as_slice_mut(),
                    _ => return None,
                };
                to.unwrap()[n] += by;
                Some(loss(&moved))
            };
            let slope = |by: f32| Some((moved(by)? - moved(-by)?) / f64::from(2.0 * by));
            let (Some(fine), Some(coarse)) = (slope(1.0 / 256.0), slope(1.0 / 128.0)) else { continue };
            let want = (4.0 * fine - coarse) / 3.0;
            assert!((got - want).abs() < 2e-6, "{name} {n} is {got:e}, not {want:e}");
        }
    }
}

#[test]
fn gradients_refuse_what_does_not_fit() {
    let case = Case::new([1, 2, 1, 5, 3, 2]);
    let [s6, _] = both(2, 3, 2, 0.5, Isa::choose(None).unwrap());
    let (x, d_out) = (case.x(), array(9, (1, 2, 5, 3)));
    let mut to = s6.zero_gradients(x).unwrap();
    to.u.fill(7.0);
    to.a = Array3::zeros((2, 2, 3));
    let error = s6.backward_into(x, d_out.view(), Carried::default(), &mut to, &mut Workspace::new());
    assert_eq!(
        error.unwrap_err().to_string(),
        "gradients.a: expected shape [heads, channels, n] = [2, 3, 2], got [2, 2, 3]"
    );
    let short = d_out.slice(s![.., .., 1.., ..]);
    let error = s6.backward(x, short, Carried::default()).unwrap_err().to_string();
    assert_eq!(
        error,
        "d_out: expected shape [batch, heads, len, value_dim] = [1, 2, 5, 3], got [1, 2, 4, 3]"
    );
    assert!(to.u.iter().all(|&x| x == 7.0));
}
