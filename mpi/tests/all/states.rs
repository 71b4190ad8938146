//! Recurrences, whose states travel.

use attention_kernels::linear::{
    Carried, ChannelGated, DeltaNet, DeltaQkv, Gla, Lightning, SimpleGla, State, TokenGated,
};
use attention_kernels::{Attention, Backward, Qkv, Recurrent};
use attention_kernels_mpi::lasp::{self, Mixed, Silenced, Transition};
use attention_kernels_mpi::plan::Cut;
use attention_kernels_mpi::{Group, Result};
use ndarray::{Array3, Array4, Axis, s};

use super::data::{cuts, held, numbers, worst};

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

/// Cuts into runs in the order of ranks.
fn chains(len: usize, ranks: usize) -> Vec<Cut> {
    let mut first = vec![vec![]; ranks];
    first[ranks / 2].push(0..len);
    vec![Cut::even(len, ranks), Cut::of(first).unwrap()]
}

fn compare<X>(
    group: &Group,
    name: &str,
    cut: &Cut,
    got: Result<Mixed<f32>>,
    mechanism: &impl Recurrent<X, State = State>,
    x: X,
) where
    X: Silenced<Out = f32>,
{
    let got = got.unwrap();
    let zero = mechanism.initial_state(x).unwrap();
    let (want, last) = mechanism.reference_from(x, &zero).unwrap();
    let off = worst(&got.out, &held(want.view(), cut, group.rank()), |_, _, _| 2e-5);
    assert!(off <= 1.0, "{name}: off by {off} times 2e-5, {cut:?}");
    let off = got.last.view().iter().zip(last.view()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 2e-5, "{name}: last state off by {off}, {cut:?}");
}

pub fn states_of_recurrences(group: &Group) {
    for len in [0, 2, 75] {
        let whole = Whole::new(len);
        for cut in chains(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let plain = Lightning::from_slopes(&[0.0; HEADS]).build().unwrap();
            let got = lasp::forward(group, &plain, mine.qkv(), Transition::Additive);
            compare(group, "no decay", &cut, got, &plain, whole.qkv());

            let lightning = Lightning::from_slopes(&[0.0, 0.3, f32::INFINITY]).build().unwrap();
            let got = lasp::forward(group, &lightning, mine.qkv(), Transition::Rows);
            compare(group, "lightning", &cut, got, &lightning, whole.qkv());

            let gla = SimpleGla::builder().build().unwrap();
            let (a, b) = (mine.decay.index_axis(Axis(3), 0), whole.decay.index_axis(Axis(3), 0));
            let got = lasp::forward(group, &gla, TokenGated::new(mine.qkv(), a), Transition::Rows);
            compare(group, "simple GLA", &cut, got, &gla, TokenGated::new(whole.qkv(), b));

            let gla = Gla::builder().build().unwrap();
            let (a, b) = (mine.decay.view(), whole.decay.view());
            let got = lasp::forward(group, &gla, ChannelGated::new(mine.qkv(), a), Transition::Rows);
            compare(group, "GLA", &cut, got, &gla, ChannelGated::new(whole.qkv(), b));

            let delta = DeltaNet::builder().normalize_qk().build().unwrap();
            let (a, b) = (mine.beta.index_axis(Axis(3), 0), whole.beta.index_axis(Axis(3), 0));
            let got = lasp::forward(group, &delta, DeltaQkv::new(mine.qkv(), a), Transition::Matrix);
            compare(group, "DeltaNet", &cut, got, &delta, DeltaQkv::new(whole.qkv(), b));
        }
    }
}

pub fn unmasked_states(group: &Group) {
    let whole = Whole::new(41);
    let plain = Lightning::from_slopes(&[0.0; HEADS]).build().unwrap();
    for cut in cuts(41, group.size()) {
        let mine = whole.held(&cut, group.rank());
        let got = lasp::forward_unmasked(group, &plain, mine.qkv()).unwrap();
        let mut want = Array4::<f64>::zeros(got.dim());
        for ((b, h, i, c), x) in want.indexed_iter_mut() {
            for j in 0..41 {
                let score: f64 =
                    (0..8).map(|d| f64::from(mine.q[[b, h, i, d]]) * f64::from(whole.k[[b, h, j, d]])).sum();
                *x += score * f64::from(whole.v[[b, h, j, c]]);
            }
        }
        let off = worst(&got, &want, |_, _, _| 2e-5);
        assert!(off <= 1.0, "off by {off} times 2e-5, {cut:?}");
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
                    let off = worst(got, &held(want.view(), &cut, group.rank()), |_, _, _| 5e-5);
                    assert!(off <= 1.0, "{name}: off by {off} times 5e-5, {cut:?}");
                }
            };
            let lightning = Lightning::from_slopes(&[0.0, 0.3, 0.05]).build().unwrap();
            let before = lasp::forward(group, &lightning, mine.qkv(), Transition::Rows).unwrap().before;
            let got = lasp::backward(
                group,
                &lightning,
                mine.qkv(),
                Transition::Rows,
                d_mine.view(),
                &before,
                |g| g.state.clone(),
            )
            .unwrap();
            let want = lightning.reference_backward(whole.qkv(), d_out.view(), Carried::default()).unwrap();
            check("lightning", [&got.q, &got.k, &got.v], [&want.q, &want.k, &want.v]);

            let delta = DeltaNet::builder().normalize_qk().build().unwrap();
            let beta = |x: &Whole| -> Array3<f32> { x.beta.index_axis(Axis(3), 0).to_owned() };
            let (a, b) = (beta(&mine), beta(&whole));
            let x = DeltaQkv::new(mine.qkv(), a.view());
            let before = lasp::forward(group, &delta, x, Transition::Matrix).unwrap().before;
            let got = lasp::backward(group, &delta, x, Transition::Matrix, d_mine.view(), &before, |g| {
                g.state.clone()
            })
            .unwrap();
            let x = DeltaQkv::new(whole.qkv(), b.view());
            let want = delta.reference_backward(x, d_out.view(), Carried::default()).unwrap();
            check("DeltaNet", [&got.q, &got.k, &got.v], [&want.q, &want.k, &want.v]);
        }
    }
}

pub fn bytes_do_not_grow_with_length(group: &Group) {
    let lightning = Lightning::builder(HEADS).build().unwrap();
    let sent = [7, 70, 700].map(|len| {
        let cut = Cut::even(len, group.size());
        let mine = Whole::new(len).held(&cut, group.rank());
        group.take_traffic();
        lasp::forward(group, &lightning, mine.qkv(), Transition::Rows).unwrap();
        group.take_traffic().bytes
    });
    assert!(sent.iter().all(|&bytes| bytes == sent[0]), "{sent:?}");
    // One all-gather of states and factors; the last rank tells the last state as well.
    let state = (2 * HEADS * 8) as u64;
    let others = group.size() as u64 - 1;
    let last = if group.rank() + 1 == group.size() { 4 * others * state * 5 } else { 0 };
    assert_eq!(sent[0], 4 * others * state * (5 + 1) + last);
    let x = Whole::new(5);
    assert_eq!(lightning.forward(x.qkv()).unwrap().dim(), (2, HEADS, 5, 5));
}
