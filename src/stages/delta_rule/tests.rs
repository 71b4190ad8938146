//! The mechanisms of the delta rule against their definitions, against all
//! pairs of tokens written out, and against each other.

use std::ops::Range;

use ndarray::{Array2, Array3, Array4, ArrayView3, ArrayView4, s};

use crate::attention::{Attention, Bounded, Input, Recurrent};
use crate::element::Element;
use crate::error::Error;
use crate::input::Qkv;
use crate::linear::{
    ChannelGated, DeltaNet, DeltaQkv, Form, GatedDeltaNet, GatedDeltaQkv, Gla, Kda, KdaQkv, Rwkv7,
    Rwkv7Input, State,
};
use crate::testing::{noise, unit};

/// How strong decays are.
#[derive(Clone, Copy, Debug)]
enum Gates {
    None,
    Mild,
    Strong,
    /// Now and then everything is forgotten.
    Cut,
}

/// Operands of all mechanisms.
struct Case<T = f32> {
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    kappa: Array4<T>,
    tokens: Array3<f32>,
    channels: Array4<f32>,
    beta: Array3<f32>,
    rate: Array4<f32>,
}

/// Heads, heads of queries and keys, tokens, head_dim, value_dim.
type Sizes = [usize; 5];

impl Case {
    fn new([heads, shared, len, dim, value_dim]: Sizes, gates: Gates) -> Self {
        let mut next = noise(11);
        let mut array = |heads, dim| Array4::from_shape_simple_fn((1, heads, len, dim), &mut next);
        let (q, k, v) = (unit(array(shared, dim)), unit(array(shared, dim)), array(heads, value_dim));
        let (kappa, rate) = (unit(array(heads, dim)), array(heads, dim).mapv(f32::abs));
        let mut next = noise(12);
        let mut gate = || {
            let x = next().abs();
            match gates {
                Gates::None => 0.0,
                Gates::Mild => -0.1 * x,
                Gates::Strong => -12.0 * x * x,
                Gates::Cut if x > 0.95 => f32::NEG_INFINITY,
                Gates::Cut if x > 0.9 => -1e4,
                Gates::Cut => -0.5 * x,
            }
        };
        let tokens = Array3::from_shape_simple_fn((1, heads, len), &mut gate);
        let channels = Array4::from_shape_simple_fn((1, heads, len, dim), &mut gate);
        let beta = Array3::from_shape_simple_fn((1, heads, len), || next().abs());
        Self { q, k, v, kappa, tokens, channels, beta, rate }
    }
}

impl<T: Element> Case<T> {
    fn qkv(&self, at: &Range<usize>) -> Qkv<'_, T> {
        Qkv::new(part(&self.q, at), part(&self.k, at), part(&self.v, at))
    }

    fn delta(&self, at: Range<usize>) -> DeltaQkv<'_, T> {
        DeltaQkv { qkv: self.qkv(&at), beta: tokens(&self.beta, &at) }
    }

    fn gated(&self, at: Range<usize>) -> GatedDeltaQkv<'_, T> {
        let (log_decay, beta) = (tokens(&self.tokens, &at), tokens(&self.beta, &at));
        GatedDeltaQkv { qkv: self.qkv(&at), log_decay, beta }
    }

    fn kda(&self, at: Range<usize>) -> KdaQkv<'_, T> {
        let (log_decay, beta) = (part(&self.channels, &at), tokens(&self.beta, &at));
        KdaQkv { qkv: self.qkv(&at), log_decay, beta }
    }

    fn rwkv7(&self, at: Range<usize>) -> Rwkv7Input<'_, T> {
        Rwkv7Input {
            rkv: self.qkv(&at),
            log_decay: part(&self.channels, &at),
            kappa: part(&self.kappa, &at),
            rate: part(&self.rate, &at),
        }
    }

    fn heads(&self) -> usize {
        self.v.dim().1
    }

    fn each(&self, x: &Array4<T>, head: usize, t: usize) -> Vec<f64> {
        let head = head / (self.heads() / x.dim().1);
        x.slice(s![0, head, t, ..]).iter().map(|x| x.to_f64()).collect()
    }

    /// A token as the delta rule has it, for a decay of each channel.
    fn delta_token(&self, head: usize, t: usize, decay: Vec<f64>) -> Affine {
        let k = self.each(&self.k, head, t);
        let beta = f64::from(self.beta[[0, head, t]]);
        Affine {
            q: self.each(&self.q, head, t),
            a: k.iter().zip(&decay).map(|(k, d)| -d * k).collect(),
            b: k.iter().map(|k| beta * k).collect(),
            k: k.iter().map(|k| beta * k).collect(),
            v: self.each(&self.v, head, t),
            decay,
        }
    }

    fn channel_decay(&self, head: usize, t: usize) -> Vec<f64> {
        self.channels.slice(s![0, head, t, ..]).iter().map(|&g| f64::from(g).exp()).collect()
    }

    fn delta_affine(&self, head: usize, t: usize) -> Affine {
        self.delta_token(head, t, vec![1.0; self.k.dim().3])
    }

    fn gated_affine(&self, head: usize, t: usize) -> Affine {
        let left = f64::from(self.tokens[[0, head, t]]).exp();
        self.delta_token(head, t, vec![left; self.k.dim().3])
    }

    fn kda_affine(&self, head: usize, t: usize) -> Affine {
        self.delta_token(head, t, self.channel_decay(head, t))
    }

    fn rwkv7_affine(&self, head: usize, t: usize) -> Affine {
        let kappa = self.each(&self.kappa, head, t);
        let rate = self.rate.slice(s![0, head, t, ..]);
        Affine {
            q: self.each(&self.q, head, t),
            k: self.each(&self.k, head, t),
            v: self.each(&self.v, head, t),
            decay: self.channel_decay(head, t),
            b: kappa.iter().zip(rate).map(|(kappa, &rate)| kappa * f64::from(rate)).collect(),
            a: kappa.into_iter().map(|kappa| -kappa).collect(),
        }
    }
}

fn part<'a, T>(x: &'a Array4<T>, at: &Range<usize>) -> ArrayView4<'a, T> {
    x.slice(s![.., .., at.clone(), ..])
}

fn tokens<'a>(x: &'a Array3<f32>, at: &Range<usize>) -> ArrayView3<'a, f32> {
    x.slice(s![.., .., at.clone()])
}

/// A token: `S = (diag(decay) + b a^T) S + k v^T`, which is what all rules of
/// this family come to.
struct Affine {
    q: Vec<f64>,
    decay: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The outputs of one head as sums over pairs, without any state: what is left
/// of a query when it comes to an earlier token weighs its value.
fn pairs(tokens: &[Affine], scale: f64) -> Vec<Vec<f64>> {
    let of = |i: usize| {
        let mut x: Vec<f64> = tokens[i].q.iter().map(|q| scale * q).collect();
        let mut out = vec![0.0; tokens[i].v.len()];
        for token in tokens[..=i].iter().rev() {
            let weight = dot(&x, &token.k);
            for (out, v) in out.iter_mut().zip(&token.v) {
                *out += weight * v;
            }
            let corrected = dot(&x, &token.b);
            for ((x, decay), a) in x.iter_mut().zip(&token.decay).zip(&token.a) {
                *x = *x * decay + corrected * a;
            }
        }
        out
    };
    (0..tokens.len()).map(of).collect()
}

/// What some tokens do to any state: `S -> P S + M`.
fn segment(tokens: &[Affine]) -> (Array2<f64>, Array2<f64>) {
    let (dim, width) = (tokens[0].k.len(), tokens[0].v.len());
    let (mut p, mut m) = (Array2::eye(dim), Array2::<f64>::zeros((dim, width)));
    for x in tokens {
        let step = Array2::from_shape_fn((dim, dim), |(r, c)| {
            x.b[r] * x.a[c] + if r == c { x.decay[r] } else { 0.0 }
        });
        p = step.dot(&p);
        m = step.dot(&m) + Array2::from_shape_fn((dim, width), |(r, c)| x.k[r] * x.v[c]);
    }
    (p, m)
}

/// The largest `off / bound` over the outputs.
fn worst<X: Input>(mechanism: &impl Bounded<X>, x: X, got: &Array4<X::Out>, what: &str) -> f64 {
    let (want, bound) = (mechanism.reference(x).unwrap(), mechanism.error_bound(x).unwrap());
    let mut worst = 0f64;
    for ((b, h, t, c), got) in got.indexed_iter() {
        let (want, bound) = (want[[b, h, t, c]], bound[[b, h, t]]);
        let rounding = X::Out::ROUNDING * (want.abs() + bound) + 2f64.powi(-25);
        let bound = bound + if size_of::<X::Out>() == 2 { rounding } else { 0.0 };
        let off = (got.to_f64() - want).abs();
        assert!(off <= bound, "{what}: [{b}, {h}, {t}, {c}] is {got:?}, not {want:e}; bound {bound:e}");
        worst = worst.max(if bound > 0.0 { off / bound } else { 0.0 });
    }
    worst
}

/// The definition against all pairs.
fn check(reference: &Array4<f64>, scale: f64, affine: impl Fn(usize, usize) -> Affine, what: &str) {
    let (_, heads, len, _) = reference.dim();
    for head in 0..heads {
        let all: Vec<Affine> = (0..len).map(|t| affine(head, t)).collect();
        for (t, row) in pairs(&all, scale).iter().enumerate() {
            for (c, want) in row.iter().enumerate() {
                let got = reference[[0, head, t, c]];
                assert!((got - want).abs() <= 1e-12 * (1.0 + want.abs()), "{what}: {got} for {want}");
            }
        }
    }
}

#[test]
fn definitions_are_sums_over_pairs() {
    for gates in [Gates::None, Gates::Mild, Gates::Strong, Gates::Cut] {
        for [heads, shared, len, dim, value_dim] in [[4, 2, 32, 7, 5], [1, 1, 101, 20, 16]] {
            let case = Case::new([heads, shared, len, dim, value_dim], gates);
            let scale = 1.0 / (dim as f64).sqrt();
            let delta = DeltaNet::builder().build().unwrap().reference(case.delta(0..len)).unwrap();
            check(&delta, scale, |head, t| case.delta_affine(head, t), "deltanet");
            let gated = GatedDeltaNet::builder().build().unwrap().reference(case.gated(0..len)).unwrap();
            check(&gated, scale, |head, t| case.gated_affine(head, t), "gated");
            let kda = Kda::builder().build().unwrap();
            check(
                &kda.reference(case.kda(0..len)).unwrap(),
                scale,
                |head, t| case.kda_affine(head, t),
                "kda",
            );
            let rwkv7 = Rwkv7::builder().build().unwrap();
            let out = rwkv7.reference(case.rwkv7(0..len)).unwrap();
            check(&out, 1.0, |head, t| case.rwkv7_affine(head, t), "rwkv7");
            // Keys of unit length, without norms in the kernel.
            let what = format!("{gates:?}, {len} tokens");
            worst(&kda, case.kda(0..len), &kda.forward(case.kda(0..len)).unwrap(), &what);
            worst(&rwkv7, case.rwkv7(0..len), &rwkv7.forward(case.rwkv7(0..len)).unwrap(), &what);
        }
    }
}

#[test]
fn segments_compose() {
    let case = Case::new([1, 1, 90, 16, 12], Gates::Mild);
    let state = Array4::from_shape_simple_fn((1, 1, 16, 12), noise(5));
    let start = state.slice(s![0, 0, .., ..]).mapv(f64::from);
    let go = |affine: &dyn Fn(usize) -> Affine| {
        let all: Vec<Affine> = (0..90).map(affine).collect();
        let ((p1, m1), (p2, m2)) = (segment(&all[..37]), segment(&all[37..]));
        let (p, m) = (p2.dot(&p1), p2.dot(&m1) + m2);
        p.dot(&start) + m
    };
    let state = State::new(state).unwrap();
    let hold = |want: Array2<f64>, got: [State; 2], what: &str| {
        for got in got {
            for (got, want) in got.view().iter().zip(&want) {
                assert!(
                    (f64::from(*got) - want).abs() <= 2e-6 * (1.0 + want.abs()),
                    "{what}: {got} for {want}"
                );
            }
        }
    };
    let both = |mechanism: &Kda| {
        let (x, mut carried) = (case.kda(0..90), state.clone());
        mechanism.prefill(x, &mut carried).unwrap();
        [mechanism.reference_from(x, &state).unwrap().1, carried]
    };
    hold(go(&|t| case.kda_affine(0, t)), both(&Kda::builder().build().unwrap()), "kda");
    let mechanism = Rwkv7::builder().build().unwrap();
    let (x, mut carried) = (case.rwkv7(0..90), state.clone());
    mechanism.prefill(x, &mut carried).unwrap();
    let both = [mechanism.reference_from(x, &state).unwrap().1, carried];
    hold(go(&|t| case.rwkv7_affine(0, t)), both, "rwkv7");
}

fn close(a: &Array4<f32>, b: &Array4<f32>, within: f32, what: &str) {
    assert_eq!(a.dim(), b.dim());
    for (at, a) in a.indexed_iter() {
        let b = b[at];
        assert!((a - b).abs() <= within * (1.0 + b.abs()), "{what}: {a} and {b} at {at:?}");
    }
}

#[test]
fn special_cases_are_each_other() {
    let still = Case::new([2, 2, 130, 20, 24], Gates::None);
    let mut case = Case::new([2, 2, 130, 20, 24], Gates::Mild);
    let whole = 0..130;
    let gated = GatedDeltaNet::builder().build().unwrap();
    let delta = DeltaNet::builder().build().unwrap();
    // Gates of 0.
    let (a, b) = (gated.forward(still.gated(whole.clone())), delta.forward(still.delta(whole.clone())));
    close(&a.unwrap(), &b.unwrap(), 1e-6, "gated without gates is deltanet");
    // The same gate for all channels.
    let channels = Array4::from_shape_fn(case.channels.dim(), |(b, h, t, _)| case.tokens[[b, h, t]]);
    let x = case.gated(whole.clone());
    let same = KdaQkv { qkv: x.qkv, log_decay: channels.view(), beta: x.beta };
    let a = Kda::builder().build().unwrap().forward(same).unwrap();
    close(&a, &gated.forward(x).unwrap(), 1e-6, "kda with one gate is gated deltanet");
    // The low-rank rule: kappa = e^g k, rate = beta e^-g, k -> beta k.
    let beta = case.beta.view().insert_axis(ndarray::Axis(3));
    let kappa = &case.k * &case.channels.mapv(f32::exp);
    let rate = &case.channels.mapv(|g| (-g).exp()) * &beta;
    let key = &case.k * &beta;
    let x = Rwkv7Input {
        rkv: Qkv::new(case.q.view(), key.view(), case.v.view()),
        log_decay: case.channels.view(),
        kappa: kappa.view(),
        rate: rate.view(),
    };
    let a = Rwkv7::builder().scale(1.0 / 20f32.sqrt()).build().unwrap().forward(x).unwrap();
    let b = Kda::builder().build().unwrap().forward(case.kda(whole.clone())).unwrap();
    close(&a, &b, 1e-5, "the low-rank rule is the delta rule");
    // Without rates: linear attention with decays of channels.
    case.rate.fill(0.0);
    let a = Rwkv7::builder().build().unwrap().forward(case.rwkv7(whole.clone())).unwrap();
    let x = ChannelGated::new(case.qkv(&whole), case.channels.view());
    let b = Gla::builder().scale(1.0).build().unwrap().forward(x).unwrap();
    close(&a, &b, 1e-5, "rwkv7 without rates is gated linear attention");
}

#[test]
fn a_state_is_a_memory() {
    // 64 keys along the axes, twice; the second values are what is read.
    let keys = Array4::from_shape_fn((1, 1, 128, 64), |(_, _, t, c)| f32::from(t % 64 == c));
    let v = Array4::from_shape_simple_fn((1, 1, 128, 16), noise(3));
    let beta = Array3::ones((1, 1, 128));
    let delta = DeltaNet::builder().scale(1.0).build().unwrap();
    let x = DeltaQkv { qkv: Qkv::new(keys.view(), keys.view(), v.view()), beta: beta.view() };
    // Each token reads its own key back.
    close(&delta.forward(x).unwrap(), &v, 1e-6, "what is under the key");
    let mut state = delta.initial_state(x).unwrap();
    delta.prefill(x, &mut state).unwrap();
    for (got, want) in state.view().iter().zip(v.slice(s![.., .., 64.., ..])) {
        assert!((got - want).abs() <= 1e-6, "{got} for {want}");
    }
    // Weights of 0 leave the state alone, to the bit.
    let none = Array3::zeros((1, 1, 128));
    let kept = state.clone();
    delta.prefill(DeltaQkv { beta: none.view(), ..x }, &mut state).unwrap();
    assert_eq!(state, kept);
    for t in 0..3 {
        let at = t..t + 1;
        let qkv = Qkv::new(part(&keys, &at), part(&keys, &at), part(&v, &at));
        delta.step(DeltaQkv { qkv, beta: tokens(&none, &at) }, &mut state).unwrap();
    }
    assert_eq!(state, kept);
}

#[test]
fn normalised_while_loading() {
    for (dim, size) in [(16, 1.0), (33, 1e-3), (20, 1e30), (16, 0.0)] {
        let mut case = Case::new([4, 2, 70, dim, 8], Gates::Mild);
        let mut next = noise(8);
        case.q.mapv_inplace(|x| 3.0 * size * x * next());
        case.k.mapv_inplace(|x| size * x);
        let what = format!("{dim} {size:e}");
        for form in [Form::Chunked, Form::Recurrent] {
            let kda = Kda::builder().form(form).normalize_qk().build().unwrap();
            worst(&kda, case.kda(0..70), &kda.forward(case.kda(0..70)).unwrap(), &what);
            let gated = GatedDeltaNet::builder().form(form).normalize_qk().build().unwrap();
            worst(&gated, case.gated(0..70), &gated.forward(case.gated(0..70)).unwrap(), &what);
        }
        // The caller's norms, by the formula.
        let norm = |x: &Array4<f32>| {
            let mut x = x.mapv(f64::from);
            for mut row in x.rows_mut() {
                let norm = (row.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                row.mapv_inplace(|x| x / norm);
            }
            x.mapv(|x| x as f32)
        };
        let (q, k) = (norm(&case.q), norm(&case.k));
        let x = case.delta(0..70);
        let by_hand = DeltaQkv { qkv: Qkv::new(q.view(), k.view(), case.v.view()), ..x };
        let a = DeltaNet::builder().normalize_qk().build().unwrap().forward(x).unwrap();
        let b = DeltaNet::builder().build().unwrap().forward(by_hand).unwrap();
        close(&a, &b, 2e-6, &what);
    }
}

#[test]
fn grouped_heads_are_repeated_ones() {
    let case = Case::new([4, 2, 70, 16, 12], Gates::Mild);
    let repeat = |x: &Array4<f32>| {
        let (_, _, len, dim) = x.dim();
        Array4::from_shape_fn((1, 4, len, dim), |(_, h, t, c)| x[[0, h / 2, t, c]])
    };
    let (q, k) = (repeat(&case.q), repeat(&case.k));
    let gated = GatedDeltaNet::builder().build().unwrap();
    let x = case.gated(0..70);
    let whole = GatedDeltaQkv { qkv: Qkv::new(q.view(), k.view(), case.v.view()), ..x };
    assert_eq!(gated.forward(x).unwrap(), gated.forward(whole).unwrap());
    // Gates of fewer heads too.
    let (log_decay, beta) = (case.tokens.slice(s![.., ..1, ..]), case.beta.slice(s![.., ..2, ..]));
    let few = GatedDeltaQkv { log_decay, beta, ..x };
    let log_decay = Array3::from_shape_fn((1, 4, 70), |(_, _, t)| log_decay[[0, 0, t]]);
    let beta = Array3::from_shape_fn((1, 4, 70), |(_, h, t)| beta[[0, h / 2, t]]);
    let all = GatedDeltaQkv { log_decay: log_decay.view(), beta: beta.view(), ..x };
    assert_eq!(gated.forward(few).unwrap(), gated.forward(all).unwrap());
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>, message: &str) {
    assert_eq!(result.unwrap_err().to_string(), message);
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new([4, 2, 20, 16, 8], Gates::Mild);
    let (short, three) = (Array3::<f32>::zeros((1, 4, 19)), Array3::<f32>::zeros((1, 3, 20)));
    let delta = DeltaNet::builder().build().unwrap();
    let x = case.delta(0..20);
    refusal(
        delta.forward(DeltaQkv { beta: short.view(), ..x }),
        "beta: expected shape [batch, heads, len] = [1, 4 or a divisor, 20], got [1, 4, 19]",
    );
    let gated = GatedDeltaNet::builder().build().unwrap();
    let x = case.gated(0..20);
    refusal(
        gated.forward(GatedDeltaQkv { log_decay: three.view(), ..x }),
        "log_decay: expected shape [batch, heads, len] = [1, 4 or a divisor, 20], got [1, 3, 20]",
    );
    let mut up = case.tokens.clone();
    up[[0, 1, 7]] = 0.25;
    let growing = GatedDeltaQkv { log_decay: up.view(), ..x };
    let message = "log_decay: expected log decays of at most 0; allow_growth() permits others, got 0.25";
    refusal(gated.forward(growing), message);
    let allowed = GatedDeltaNet::builder().allow_growth().build().unwrap();
    worst(&allowed, growing, &allowed.forward(growing).unwrap(), "growth");
    let kda = Kda::builder().build().unwrap();
    let x = case.kda(0..20);
    let narrow = case.channels.slice(s![.., .., .., ..15]);
    refusal(
        kda.forward(KdaQkv { log_decay: narrow, ..x }),
        "log_decay: expected shape [batch, heads, len, head_dim] = [1, 4 or a divisor, 20, 16], got [1, 4, 20, 15]",
    );
    let rwkv7 = Rwkv7::builder().build().unwrap();
    let x = case.rwkv7(0..20);
    refusal(
        rwkv7.forward(Rwkv7Input { kappa: narrow, ..x }),
        "kappa: expected shape [batch, heads, len, head_dim] = [1, 4 or a divisor, 20, 16], got [1, 4, 20, 15]",
    );
    refusal(
        rwkv7.forward(Rwkv7Input { rate: narrow, ..x }),
        "rate: expected shape [batch, heads, len, head_dim] = [1, 4 or a divisor, 20, 16], got [1, 4, 20, 15]",
    );
    refusal(
        delta.forward(DeltaQkv { qkv: case.qkv(&(0..20)).key_lengths(&[3]), ..case.delta(0..20) }),
        "key_lengths cannot be combined with a recurrence: queries and keys are the same tokens, which padded shortens",
    );
    refusal(DeltaNet::builder().scale(f32::NAN).build(), "scale: expected a finite number, got NaN");
    assert_eq!(case.delta(0..20).dims().unwrap().q_heads, 4);
}
