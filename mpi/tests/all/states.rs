//! Recurrences, whose states travel.

use attention_kernels::linear::{
    Carried, ChannelGated, Comba, CombaQkv, DeltaNet, DeltaProduct, DeltaProductInput, DeltaQkv,
    ERROR_CONSTANT, GatedDelta2Qkv, GatedDeltaNet, GatedDeltaNet2, GatedDeltaQkv, Gla, Hgrn2, Hgrn2Input,
    Kda, KdaQkv, Lightning, LinearAttention, Mamba2, Mamba2Input, RetNet, Rwkv6, Rwkv7, Rwkv7Input, S6,
    S6Input, SimpleGla, State, TokenGated,
};
use attention_kernels::{Attention, Backward, Bounded, Qkv, Recurrent};
use attention_kernels_mpi::lasp::Transition::{Additive, Elements, Matrix, Rows};
use attention_kernels_mpi::lasp::{self, Mixed, Silenced};
use attention_kernels_mpi::plan::Cut;
use attention_kernels_mpi::{Group, Result};
use ndarray::{Array2, Array3, Array4, Axis, s};

use super::data::{bound, chains, cuts, held, numbers, worst};

const HEADS: usize = 3;

struct Whole {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    /// Log decays a channel, and of a token the first of them; one token forgets all.
    decay: Array4<f32>,
    beta: Array4<f32>,
}

impl Whole {
    fn new(len: usize) -> Self {
        let of = |seed, dim| numbers(seed, (2, HEADS, len, dim));
        let mut decay = of(4, 8).mapv(|x| -0.1 * (x + 1.0));
        if len > 30 {
            decay.slice_mut(s![.., 1, 17, ..]).fill(f32::NEG_INFINITY);
        }
        Self { q: of(1, 8), k: of(2, 8), v: of(3, 5), decay, beta: of(5, 1).mapv(|x| 0.5 * (x + 1.0)) }
    }

    fn held(&self, cut: &Cut, rank: usize) -> Self {
        let of = |x: &Array4<f32>| held(x.view(), cut, rank);
        Self { q: of(&self.q), k: of(&self.k), v: of(&self.v), decay: of(&self.decay), beta: of(&self.beta) }
    }

    fn qkv(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }
}

fn compare<X>(
    group: &Group,
    name: &str,
    cut: &Cut,
    got: Result<Mixed<f32>>,
    mechanism: &(impl Recurrent<X, State = State> + Bounded<X>),
    x: X,
) where
    X: Silenced<Out = f32>,
{
    let got = got.unwrap();
    let zero = mechanism.initial_state(x).unwrap();
    let (want, last) = mechanism.reference_from(x, &zero).unwrap();
    let allowed = bound(&mechanism.error_bound(x).unwrap(), cut, group.rank());
    let want = held(want.view(), cut, group.rank());
    let off = worst(&got.out, &want, |b, h, i| allowed[[b, h, i]] + f64::MIN_POSITIVE);
    assert!(off <= 1.0, "{name}: {off} of the bound, {cut:?}");
    // As the crate's own tests have it.
    let size = last.view().iter().fold(1f32, |most, x| most.max(x.abs()));
    let off = got.last.view().iter().zip(last.view()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off <= 2e-5 * size, "{name}: last state off by {off} of {size}, {cut:?}");
}

pub fn states_of_decays(group: &Group) {
    for len in [0, 2, 75] {
        let whole = Whole::new(len);
        for cut in chains(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let (a, b) = (mine.qkv(), whole.qkv());
            let plain = Lightning::from_slopes(&[0.0; HEADS]).build().unwrap();
            compare(group, "no decay", &cut, lasp::forward(group, &plain, a, Additive), &plain, b);
            let sums = LinearAttention::builder().causal().build().unwrap();
            compare(group, "sums", &cut, lasp::forward(group, &sums, a, Additive), &sums, b);
            let lightning = Lightning::from_slopes(&[0.0, 0.3, f32::INFINITY]).build().unwrap();
            compare(group, "lightning", &cut, lasp::forward(group, &lightning, a, Rows), &lightning, b);
            let retnet = RetNet::builder(HEADS).build().unwrap();
            compare(group, "RetNet", &cut, lasp::forward(group, &retnet, a, Rows), &retnet, b);

            let gla = SimpleGla::builder().build().unwrap();
            let of = |x: &Whole| x.decay.index_axis(Axis(3), 0).to_owned();
            let (g, h) = (of(&mine), of(&whole));
            let (x, y) = (TokenGated::new(a, g.view()), TokenGated::new(b, h.view()));
            compare(group, "simple GLA", &cut, lasp::forward(group, &gla, x, Rows), &gla, y);

            let gla = Gla::builder().build().unwrap();
            let (x, y) = (ChannelGated::new(a, mine.decay.view()), ChannelGated::new(b, whole.decay.view()));
            compare(group, "GLA", &cut, lasp::forward(group, &gla, x, Rows), &gla, y);
            let bonus = Array2::from_elem((HEADS, 8), 0.5);
            let rwkv = Rwkv6::builder(bonus.view()).build().unwrap();
            compare(group, "RWKV-6", &cut, lasp::forward(group, &rwkv, x, Rows), &rwkv, y);

            let hgrn = Hgrn2::builder().lower_bound(0.5).build().unwrap();
            let of = |x: &'_ Whole| (x.q.clone(), x.k.clone(), x.v.clone());
            let ((q, k, v), (r, l, w)) = (of(&mine), of(&whole));
            let (x, y) = (
                Hgrn2Input::new(q.view(), k.view(), v.view()),
                Hgrn2Input::new(r.view(), l.view(), w.view()),
            );
            compare(group, "HGRN2", &cut, lasp::forward(group, &hgrn, x, Rows), &hgrn, y);

            // A factor for each column, so that one column cannot stand for all.
            let skip = Array2::from_shape_fn((HEADS, 5), |(h, c)| (h + c) as f32);
            let mamba = Mamba2::builder(&[0.0, 0.5, 1.0]).channel_skip(skip.view()).build().unwrap();
            let of = |x: &Whole| x.beta.index_axis(Axis(3), 0).to_owned();
            let (s, t) = (of(&mine), of(&whole));
            let (x, y) = (
                Mamba2Input::new(v.view(), s.view(), k.view(), q.view()),
                Mamba2Input::new(w.view(), t.view(), l.view(), r.view()),
            );
            compare(group, "Mamba-2", &cut, lasp::forward(group, &mamba, x, Rows), &mamba, y);

            let rates = Array3::from_shape_fn((HEADS, 5, 8), |(h, c, s)| -0.1 * (1 + h + c + s) as f32);
            let scan = S6::builder(rates).softplus().build().unwrap();
            let (x, y) = (
                S6Input::new(v.view(), v.view(), k.view(), q.view()),
                S6Input::new(w.view(), w.view(), l.view(), r.view()),
            );
            compare(group, "S6", &cut, lasp::forward(group, &scan, x, Elements), &scan, y);
        }
    }
}

pub fn states_of_delta_rules(group: &Group) {
    for len in [0, 2, 75] {
        let whole = Whole::new(len);
        for cut in chains(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let (a, b) = (mine.qkv(), whole.qkv());
            let tokens = |x: &Array4<f32>| x.index_axis(Axis(3), 0).to_owned();
            let (beta, beta_of_all) = (tokens(&mine.beta), tokens(&whole.beta));
            let (gate, gate_of_all) = (tokens(&mine.decay), tokens(&whole.decay));

            let delta = DeltaNet::builder().normalize_qk().build().unwrap();
            let (x, y) = (DeltaQkv::new(a, beta.view()), DeltaQkv::new(b, beta_of_all.view()));
            compare(group, "DeltaNet", &cut, lasp::forward(group, &delta, x, Matrix), &delta, y);

            let gated = GatedDeltaNet::builder().normalize_qk().build().unwrap();
            let (x, y) = (
                GatedDeltaQkv::new(a, gate.view(), beta.view()),
                GatedDeltaQkv::new(b, gate_of_all.view(), beta_of_all.view()),
            );
            compare(group, "Gated DeltaNet", &cut, lasp::forward(group, &gated, x, Matrix), &gated, y);

            let kda = Kda::builder().normalize_qk().build().unwrap();
            let (x, y) = (
                KdaQkv::new(a, mine.decay.view(), beta.view()),
                KdaQkv::new(b, whole.decay.view(), beta_of_all.view()),
            );
            compare(group, "KDA", &cut, lasp::forward(group, &kda, x, Matrix), &kda, y);

            let gates = |x: &Array4<f32>| x.mapv(|x| 0.5 * (x + 1.0));
            let (erase, erase_of_all) = (gates(&mine.q), gates(&whole.q));
            let (write, write_of_all) = (gates(&mine.v), gates(&whole.v));
            let gated = GatedDeltaNet2::builder().normalize_qk().build().unwrap();
            let (x, y) = (
                GatedDelta2Qkv::new(a, mine.decay.view(), erase.view(), write.view()),
                GatedDelta2Qkv::new(b, whole.decay.view(), erase_of_all.view(), write_of_all.view()),
            );
            compare(group, "Gated DeltaNet-2", &cut, lasp::forward(group, &gated, x, Matrix), &gated, y);

            let (other, other_of_all) = (mine.k.mapv(|x| 0.2 * x), whole.k.mapv(|x| 0.2 * x));
            let comba = Comba::builder().normalize_qk().build().unwrap();
            let (x, y) = (
                CombaQkv::new(a, other.view(), gate.view(), beta.view()),
                CombaQkv::new(b, other_of_all.view(), gate_of_all.view(), beta_of_all.view()),
            );
            compare(group, "Comba", &cut, lasp::forward(group, &comba, x, Matrix), &comba, y);

            let unit = |x: &Array4<f32>| {
                let norms = x.mapv(|x| x * x).sum_axis(Axis(3)).mapv(|x| x.sqrt().max(1e-6));
                x / &norms.insert_axis(Axis(3))
            };
            let (kappa, kappa_of_all) = (unit(&mine.k), unit(&whole.k));
            let rwkv = Rwkv7::builder().build().unwrap();
            let (x, y) = (
                Rwkv7Input::new(a, mine.decay.view(), kappa.view(), erase.view()),
                Rwkv7Input::new(b, whole.decay.view(), kappa_of_all.view(), erase_of_all.view()),
            );
            compare(group, "RWKV-7", &cut, lasp::forward(group, &rwkv, x, Matrix), &rwkv, y);

            // Two keys a token.
            let twice = |x: &Array4<f32>| {
                let rows: Vec<_> = (0..2 * x.dim().2).map(|step| step / 2).collect();
                let mut twice = x.select(Axis(2), &rows);
                for (step, mut row) in twice.axis_iter_mut(Axis(2)).enumerate() {
                    row *= if step % 2 == 0 { 1.0 } else { -0.5 };
                }
                twice
            };
            let of = |x: &Whole| (twice(&x.k), twice(&x.v), tokens(&twice(&x.beta)).mapv(f32::abs));
            let ((k, v, beta), (l, w, beta_of_all)) = (of(&mine), of(&whole));
            let product = DeltaProduct::builder(2).normalize_qk().build().unwrap();
            let (x, y) = (
                DeltaProductInput::new(mine.q.view(), k.view(), v.view(), beta.view()),
                DeltaProductInput::new(whole.q.view(), l.view(), w.view(), beta_of_all.view()),
            );
            compare(group, "DeltaProduct", &cut, lasp::forward(group, &product, x, Matrix), &product, y);
        }
    }
}

/// Sequences that end within a rank's tokens, go on over several ranks, or are of no tokens.
pub fn packed_states(group: &Group) {
    let whole = Whole::new(101);
    let single = |x: &Array4<f32>| x.slice(s![..1, .., .., ..]).to_owned();
    let whole = Whole {
        q: single(&whole.q),
        k: single(&whole.k),
        v: single(&whole.v),
        decay: single(&whole.decay),
        beta: single(&whole.beta),
    };
    let d_out = numbers(8, (1, HEADS, 101, 5));
    let lightning = Lightning::from_slopes(&[0.0, 0.3, 0.05]).build().unwrap();
    let delta = DeltaNet::builder().normalize_qk().build().unwrap();
    let beta = |x: &Whole| x.beta.index_axis(Axis(3), 0).to_owned();
    for offsets in [vec![0, 101], vec![0, 3, 3, 40, 41, 97], vec![0, 50, 101], vec![0, 90]] {
        for cut in chains(101, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let d_mine = held(d_out.view(), &cut, group.rank());
            let (own, continues) = cut.sequences(group.rank(), &offsets).unwrap();
            let (a, b) = (mine.qkv().packed(&own, &own), whole.qkv().packed(&offsets, &offsets));
            let what = format!("{offsets:?}, {cut:?}");
            let check = |out: &Array4<f32>, want: Array4<f64>, allowed: Array3<f64>| {
                let allowed = bound(&allowed, &cut, group.rank());
                let want = held(want.view(), &cut, group.rank());
                let off = worst(out, &want, |b, h, i| allowed[[b, h, i]] + f64::MIN_POSITIVE);
                assert!(off <= 1.0, "{off} of the bound, {what}");
            };
            let close = |got: [&Array4<f32>; 3], want: [&Array4<f64>; 3]| {
                for (got, want) in got.into_iter().zip(want) {
                    gradients_are_close(&what, got, want, &cut, group.rank(), 5e-6);
                }
            };
            let got = lasp::forward_packed(group, &lightning, a, Rows, continues).unwrap();
            check(&got.out, lightning.reference(b).unwrap(), lightning.error_bound(b).unwrap());
            let before = &got.before;
            let got = lasp::backward_packed(group, &lightning, a, Rows, continues, d_mine.view(), before);
            let got = got.unwrap();
            let want = lightning.reference_backward(b, d_out.view(), Carried::default()).unwrap();
            close([&got.q, &got.k, &got.v], [&want.q, &want.k, &want.v]);

            let (of_mine, of_all) = (beta(&mine), beta(&whole));
            let (x, y) = (DeltaQkv::new(a, of_mine.view()), DeltaQkv::new(b, of_all.view()));
            let got = lasp::forward_packed(group, &delta, x, Matrix, continues).unwrap();
            check(&got.out, delta.reference(y).unwrap(), delta.error_bound(y).unwrap());
            let before = &got.before;
            let got = lasp::backward_packed(group, &delta, x, Matrix, continues, d_mine.view(), before);
            let got = got.unwrap();
            let want = delta.reference_backward(y, d_out.view(), Carried::default()).unwrap();
            close([&got.q, &got.k, &got.v], [&want.q, &want.k, &want.v]);
        }
    }
}

/// Errors of gradients as the crate's own tests measure them: their size as a share of that
/// of the gradients, of all ranks.
fn gradients_are_close(
    what: &str,
    got: &Array4<f32>,
    want: &Array4<f64>,
    cut: &Cut,
    rank: usize,
    share: f64,
) {
    let size = want.iter().map(|x| x * x).sum::<f64>().sqrt();
    let want = held(want.view(), cut, rank);
    let off = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
    assert!(off <= share * size, "{what}: off by {off:e} of {size:e}");
}

pub fn unmasked_states(group: &Group) {
    let whole = Whole::new(41);
    let plain = Lightning::from_slopes(&[0.0; HEADS]).build().unwrap();
    for cut in cuts(41, group.size()) {
        let mine = whole.held(&cut, group.rank());
        let got = lasp::forward_unmasked(group, &plain, mine.qkv()).unwrap();
        let (total_state, got) = (got.before, got.out);
        let (mut want, mut total) = (Array4::<f64>::zeros(got.dim()), Array4::<f64>::zeros(got.dim()));
        for ((b, h, i, c), x) in want.indexed_iter_mut() {
            for j in 0..41 {
                let terms =
                    (0..8).map(|d| f64::from(mine.q[[b, h, i, d]]) * f64::from(whole.k[[b, h, j, d]]));
                let value = f64::from(whole.v[[b, h, j, c]]);
                *x += terms.clone().sum::<f64>() * value;
                total[[b, h, i, c]] += terms.map(f64::abs).sum::<f64>() * value.abs();
            }
        }
        // The bound of recurrences, for a query that sees all.
        let unit = ERROR_CONSTANT * 2f64.powi(-24) * (8 + 41 + 64) as f64;
        let most = |b, h, i| total.slice(s![b, h, i, ..]).iter().fold(0f64, |most, x| most.max(*x));
        let off = worst(&got, &want, |b, h, i| unit * most(b, h, i) + f64::MIN_POSITIVE);
        assert!(off <= 1.0, "{off} of the bound, {cut:?}");

        // d_total = sum q d_o^T, of all ranks.
        let d_out = numbers(8, (2, HEADS, 41, 5));
        let d_mine = held(d_out.view(), &cut, group.rank());
        let got = lasp::backward_unmasked(group, &plain, mine.qkv(), d_mine.view(), &total_state).unwrap();
        let sum = |a: &Array4<f32>, b: &Array4<f32>| {
            let mut sum = Array4::<f64>::zeros((2, HEADS, a.dim().3, b.dim().3));
            for ((b_, h, d, c), x) in sum.indexed_iter_mut() {
                let of = |x: &Array4<f32>, c| x.slice(s![b_, h, .., c]).mapv(f64::from);
                *x = (of(a, d) * of(b, c)).sum();
            }
            sum
        };
        let (total, d_total) = (sum(&whole.k, &whole.v), sum(&whole.q, &d_out));
        let times = |x: &Array4<f32>, of: &Array4<f64>, transposed: bool| {
            let n = if transposed { of.dim().2 } else { of.dim().3 };
            Array4::from_shape_fn((2, HEADS, 41, n), |(b, h, i, c)| {
                let at = |d| if transposed { of[[b, h, c, d]] } else { of[[b, h, d, c]] };
                (0..x.dim().3).map(|d| f64::from(x[[b, h, i, d]]) * at(d)).sum()
            })
        };
        let d_q = times(&d_out, &total, true);
        let (d_k, d_v) = (times(&whole.v, &d_total, true), times(&whole.k, &d_total, false));
        for (got, want) in [(&got.q, &d_q), (&got.k, &d_k), (&got.v, &d_v)] {
            gradients_are_close("unmasked", got, want, &cut, group.rank(), 5e-6);
        }
    }
}

pub fn state_gradients(group: &Group) {
    for len in [1, 60] {
        let (whole, d_out) = (Whole::new(len), numbers(8, (2, HEADS, len, 5)));
        for cut in chains(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let d_mine = held(d_out.view(), &cut, group.rank());
            let check = |name: &str, got: [&Array4<f32>; 3], want: [&Array4<f64>; 3]| {
                for (got, want) in got.into_iter().zip(want) {
                    gradients_are_close(&format!("{name}, {cut:?}"), got, want, &cut, group.rank(), 5e-6);
                }
            };
            let lightning = Lightning::from_slopes(&[0.0, 0.3, 0.05]).build().unwrap();
            let before = lasp::forward(group, &lightning, mine.qkv(), Rows).unwrap().before;
            let got = lasp::backward(group, &lightning, mine.qkv(), Rows, d_mine.view(), &before).unwrap();
            let want = lightning.reference_backward(whole.qkv(), d_out.view(), Carried::default()).unwrap();
            check("lightning", [&got.q, &got.k, &got.v], [&want.q, &want.k, &want.v]);

            let delta = DeltaNet::builder().normalize_qk().build().unwrap();
            let beta = |x: &Whole| -> Array3<f32> { x.beta.index_axis(Axis(3), 0).to_owned() };
            let (a, b) = (beta(&mine), beta(&whole));
            let x = DeltaQkv::new(mine.qkv(), a.view());
            let before = lasp::forward(group, &delta, x, Matrix).unwrap().before;
            let got = lasp::backward(group, &delta, x, Matrix, d_mine.view(), &before).unwrap();
            let x = DeltaQkv::new(whole.qkv(), b.view());
            let want = delta.reference_backward(x, d_out.view(), Carried::default()).unwrap();
            check("DeltaNet", [&got.q, &got.k, &got.v], [&want.q, &want.k, &want.v]);

            macro_rules! compare {
                ($name:literal, $mechanism:expr, $transition:expr, $x:expr, $y:expr, $($field:ident)+) => {
                    let (mechanism, x, y) = ($mechanism, $x, $y);
                    let before = lasp::forward(group, &mechanism, x, $transition).unwrap().before;
                    let got = lasp::backward(group, &mechanism, x, $transition, d_mine.view(), &before);
                    let (got, want) = (got.unwrap(), mechanism.reference_backward(y, d_out.view(), Carried::default()));
                    let want = want.unwrap();
                    $(gradients_are_close($name, &got.$field, &want.$field, &cut, group.rank(), 5e-5);)+
                };
            }
            let gates = |x: &Whole| x.decay.index_axis(Axis(3), 0).to_owned();
            let (g, h) = (gates(&mine), gates(&whole));
            let (x, y) = (TokenGated::new(mine.qkv(), g.view()), TokenGated::new(whole.qkv(), h.view()));
            compare!("simple GLA", SimpleGla::builder().build().unwrap(), Rows, x, y, q k v);
            let x = ChannelGated::new(mine.qkv(), mine.decay.view());
            let y = ChannelGated::new(whole.qkv(), whole.decay.view());
            compare!("GLA", Gla::builder().build().unwrap(), Rows, x, y, q k v log_decay);
            let bonus = Array2::from_elem((HEADS, 8), 0.5);
            compare!("RWKV-6", Rwkv6::builder(bonus.view()).build().unwrap(), Rows, x, y, q k v log_decay);
            let retnet = RetNet::builder(HEADS).build().unwrap();
            compare!("RetNet", retnet, Rows, mine.qkv(), whole.qkv(), q k v);
            let gated = GatedDeltaNet::builder().normalize_qk().build().unwrap();
            let x = GatedDeltaQkv::new(mine.qkv(), g.view(), a.view());
            let y = GatedDeltaQkv::new(whole.qkv(), h.view(), b.view());
            compare!("Gated DeltaNet", gated, Matrix, x, y, q k v);
            let kda = Kda::builder().normalize_qk().build().unwrap();
            let x = KdaQkv::new(mine.qkv(), mine.decay.view(), a.view());
            let y = KdaQkv::new(whole.qkv(), whole.decay.view(), b.view());
            compare!("KDA", kda, Matrix, x, y, q k v);
            let rates = Array3::from_shape_fn((HEADS, 5, 8), |(h, c, s)| -0.1 * (1 + h + c + s) as f32);
            let scan = S6::builder(rates).softplus().build().unwrap();
            let x = S6Input::new(mine.v.view(), mine.v.view(), mine.k.view(), mine.q.view());
            let y = S6Input::new(whole.v.view(), whole.v.view(), whole.k.view(), whole.q.view());
            compare!("S6", scan, Elements, x, y, u delta b c);
        }
    }
}

pub fn bytes_do_not_grow_with_length(group: &Group) {
    let lightning = Lightning::builder(HEADS).build().unwrap();
    let sent = [7, 70, 700].map(|len| {
        let cut = Cut::even(len, group.size());
        let mine = Whole::new(len).held(&cut, group.rank());
        group.take_traffic();
        lasp::forward(group, &lightning, mine.qkv(), Rows).unwrap();
        group.take_traffic().bytes
    });
    assert!(sent.iter().all(|&bytes| bytes == sent[0]), "{sent:?}");
    // One all-gather of states and factors.
    let state = (2 * HEADS * 8) as u64;
    let others = group.size() as u64 - 1;
    assert_eq!(sent[0], 4 * others * state * (5 + 1));
    let x = Whole::new(5);
    assert_eq!(lightning.forward(x.qkv()).unwrap().dim(), (2, HEADS, 5, 5));
}
