//! States of several parts, and others that are neither one matrix with a decay nor a delta
//! rule.

use attention_kernels::linear::{
    Aaren, AarenInput, Based, BasedInput, EcoFormer, EcoFormerVariant, Flowformer, GatedSlotAttention,
    LevelQkv, LinearAttention, LogLinear, Mamba3, Mamba3Mimo, Mamba3MimoInput, Mamba3Qkv, MesaNet, MesaQkv,
    Performer, SlotQkv,
};
use attention_kernels::math::features::Taylor;
use attention_kernels::{Attention, Bounded, Qkv, Recurrent};
use attention_kernels_mpi::lasp::Transition::Additive;
use attention_kernels_mpi::lasp::{self, Mixed, Parts, Travels};
use attention_kernels_mpi::plan::Cut;
use attention_kernels_mpi::{Error, Group, Result};
use ndarray::{Array2, Array3, Array4, Axis, s};

use super::data::{bound, chains, cuts, held, numbers, worst};

const HEADS: usize = 3;
/// Keys of BASED's window before a query's own.
const LEFT: usize = 5;

/// What all of them are made of.
struct Whole {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    /// Log decays of slots, and of a token the first of them; one token forgets all.
    decay: Array4<f32>,
    share: Array4<f32>,
    angle: Array4<f32>,
    levels: Array4<f32>,
    /// Two keys and queries a token.
    many: Array4<f32>,
}

impl Whole {
    fn new(batch: usize, len: usize) -> Self {
        let of = |seed, n| numbers(seed, (batch, HEADS, len, n));
        let mut decay = of(4, 6).mapv(|x| -0.1 * (x + 1.0));
        if len > 30 {
            decay.slice_mut(s![.., 1, 17, ..]).fill(f32::NEG_INFINITY);
        }
        let (share, angle) = (of(5, 6).mapv(|x| 0.5 * (x + 1.0)), of(6, 3).mapv(|x| 2.0 * x));
        let (levels, many) = (of(7, 9), numbers(9, (batch, HEADS, 2 * len, 8)));
        Self { q: of(1, 8), k: of(2, 8), v: of(3, 5), decay, share, angle, levels, many }
    }

    fn held(&self, cut: &Cut, rank: usize) -> Self {
        let of = |x: &Array4<f32>| held(x.view(), cut, rank);
        let twice: Vec<_> = cut.positions(rank).flat_map(|t| [2 * t, 2 * t + 1]).collect();
        Self {
            q: of(&self.q),
            k: of(&self.k),
            v: of(&self.v),
            decay: of(&self.decay),
            share: of(&self.share),
            angle: of(&self.angle),
            levels: of(&self.levels),
            many: self.many.select(Axis(2), &twice),
        }
    }

    /// Some tokens of one sequence.
    fn of(&self, sequence: usize, tokens: &[usize]) -> Self {
        let of = |x: &Array4<f32>| x.select(Axis(0), &[sequence]).select(Axis(2), tokens);
        let twice: Vec<_> = tokens.iter().flat_map(|t| [2 * t, 2 * t + 1]).collect();
        Self {
            q: of(&self.q),
            k: of(&self.k),
            v: of(&self.v),
            decay: of(&self.decay),
            share: of(&self.share),
            angle: of(&self.angle),
            levels: of(&self.levels),
            many: self.many.select(Axis(0), &[sequence]).select(Axis(2), &twice),
        }
    }

    fn qkv(&self) -> Qkv<'_, f32> {
        Qkv::new(self.q.view(), self.k.view(), self.v.view())
    }

    fn token(x: &Array4<f32>) -> ndarray::ArrayView3<'_, f32> {
        x.index_axis(Axis(3), 0)
    }

    fn mesa(&self) -> MesaQkv<'_, f32> {
        MesaQkv::new(self.qkv(), Self::token(&self.decay), Self::token(&self.share))
    }

    fn slots(&self) -> SlotQkv<'_, f32> {
        SlotQkv::new(self.qkv(), self.share.view(), self.decay.view())
    }

    fn levels(&self) -> LevelQkv<'_, f32> {
        LevelQkv::new(self.qkv(), Self::token(&self.decay), self.levels.view())
    }

    fn based(&self) -> BasedInput<'_, f32> {
        let small = Qkv { q: self.angle.view(), k: self.angle.view(), ..self.qkv() };
        BasedInput { global: small, window: self.qkv() }
    }

    fn mamba(&self) -> Mamba3Qkv<'_, f32> {
        let (decay, step) = (Self::token(&self.decay), Self::token(&self.share));
        Mamba3Qkv::new(self.qkv(), decay, step, Self::token(&self.q), self.angle.view())
    }

    fn mimo(&self) -> Mamba3MimoInput<'_, f32> {
        let (decay, step) = (Self::token(&self.decay), Self::token(&self.share));
        let (many, trap) = (self.many.view(), Self::token(&self.q));
        Mamba3MimoInput::new(many, many, self.v.view(), decay, step, trap, self.angle.view())
    }

    /// Of one query a head.
    fn aaren<'a>(&'a self, query: &'a Array3<f32>) -> AarenInput<'a, f32> {
        AarenInput::new(query.view(), self.k.view(), self.v.view())
    }
}

/// Whether outputs are within the bound, and the last state is that of a single process.
fn check<X, M>(name: &str, mechanism: &M, group: &Group, cut: &Cut, got: Result<Mixed<f32, M::State>>, y: X)
where
    X: attention_kernels::Input<Out = f32>,
    M: Travels<X, Mechanism = M> + Recurrent<X> + Bounded<X>,
{
    let got = got.unwrap();
    let (want, last) = mechanism.reference_from(y, &mechanism.initial_state(y).unwrap()).unwrap();
    outputs(name, mechanism, group, cut, &got.out, (want, y));
    let sequences = mechanism.parts(&last)[0].dim().0;
    let (got, want) =
        (comparable(name, mechanism.parts(&got.last)), comparable(name, mechanism.parts(&last)));
    for (part, (got, want)) in got.iter().zip(&want).enumerate() {
        // Of packed sequences it is that of the last one.
        let want = want.slice(s![sequences - got.dim().0.., .., .., ..]);
        assert_eq!(got.dim(), want.dim(), "{name}: part {part}, {cut:?}");
        let size = want.iter().fold(1f32, |most, x| most.max(x.abs()));
        let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= 2e-5 * size, "{name}: part {part} of the state off by {off} of {size}, {cut:?}");
    }
}

fn outputs<X>(
    name: &str,
    mechanism: &impl Bounded<X>,
    group: &Group,
    cut: &Cut,
    got: &Array4<f32>,
    (want, y): (Array4<f64>, X),
) where
    X: attention_kernels::Input<Out = f32>,
{
    let allowed = bound(&mechanism.error_bound(y).unwrap(), cut, group.rank());
    let want = held(want.view(), cut, group.rank());
    let off = worst(got, &want, |b, h, i| allowed[[b, h, i]] + f64::MIN_POSITIVE);
    assert!(off <= 1.0, "{name}: {off} of the bound, {cut:?}");
}

/// Angles as what they turn by.
fn comparable(name: &str, mut parts: Parts) -> Parts {
    if name.starts_with("Mamba") {
        let (high, low) = parts[1].view().split_at(Axis(2), 1);
        let angles = high.mapv(f64::from) + low.mapv(f64::from);
        parts[1] =
            ndarray::concatenate![Axis(2), angles.mapv(|x| x.cos() as f32), angles.mapv(|x| x.sin() as f32)];
    }
    parts
}

struct Mechanisms {
    mesa: MesaNet,
    slots: GatedSlotAttention,
    levels: LogLinear,
    based: Based,
    mamba: Mamba3,
    mimo: Mamba3Mimo,
    weighted: Mamba3Mimo,
    aaren: Aaren,
    flow: Flowformer,
    query: Array3<f32>,
}

fn mechanisms(batch: usize) -> Mechanisms {
    let rows = |seed, ranks, dim| numbers(seed, (1, HEADS, ranks, dim)).index_axis_move(Axis(0), 0);
    let biases = [11, 12].map(|seed| rows(seed, 1, 8).index_axis_move(Axis(1), 0));
    let (values, outs) = (rows(13, 2, 5), rows(14, 2, 5));
    Mechanisms {
        mesa: MesaNet::builder(Array2::from_elem((HEADS, 8), 0.5).view()).normalize_qk().build().unwrap(),
        slots: GatedSlotAttention::builder().build().unwrap(),
        levels: LogLinear::builder().build().unwrap(),
        based: Based::builder(LEFT).build().unwrap(),
        mamba: Mamba3::builder()
            .biases(biases[0].view(), biases[1].view())
            .skip(&[0.5, 0.0, 2.0])
            .build()
            .unwrap(),
        mimo: Mamba3Mimo::builder(2).build().unwrap(),
        weighted: Mamba3Mimo::builder(2)
            .weights(values.view(), outs.view())
            .pairs(attention_kernels::math::rope::Pairs::Neighbours)
            .build()
            .unwrap(),
        aaren: Aaren::builder().scale(3.0).build().unwrap(),
        flow: Flowformer::builder().causal().build().unwrap(),
        query: numbers(15, (batch, HEADS, 1, 8)).index_axis_move(Axis(2), 0),
    }
}

pub fn states_of_parts(group: &Group) {
    let m = mechanisms(2);
    for len in [0, 2, 75] {
        let whole = Whole::new(2, len);
        for cut in chains(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            macro_rules! compare {
                ($name:literal, $mechanism:expr, $x:expr, $y:expr) => {
                    let got = lasp::forward_parts(group, $mechanism, $x);
                    check($name, $mechanism, group, &cut, got, $y);
                };
            }
            compare!("MesaNet", &m.mesa, mine.mesa(), whole.mesa());
            compare!("gated slots", &m.slots, mine.slots(), whole.slots());
            compare!("log-linear", &m.levels, mine.levels(), whole.levels());
            compare!("BASED", &m.based, mine.based(), whole.based());
            compare!("Mamba-3", &m.mamba, mine.mamba(), whole.mamba());
            compare!("Mamba-3 of two keys", &m.mimo, mine.mimo(), whole.mimo());
            compare!("Mamba-3 of weighted keys", &m.weighted, mine.mimo(), whole.mimo());
            compare!("Aaren", &m.aaren, mine.aaren(&m.query), whole.aaren(&m.query));
            compare!("Flowformer", &m.flow, mine.qkv(), whole.qkv());
        }
    }
}

pub fn packed_parts(group: &Group) {
    let (m, whole) = (mechanisms(1), Whole::new(1, 101));
    for offsets in [vec![0, 101], vec![0, 3, 3, 40, 41, 97], vec![0, 50, 101], vec![0, 90]] {
        for cut in chains(101, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let (own, continues) = cut.sequences(group.rank(), &offsets).unwrap();
            macro_rules! compare {
                ($name:literal, $mechanism:expr, $x:expr, $y:expr) => {
                    let got = lasp::forward_parts_packed(group, $mechanism, $x, continues);
                    check($name, $mechanism, group, &cut, got, $y);
                };
            }
            compare!("MesaNet", &m.mesa, mine.mesa().packed(&own), whole.mesa().packed(&offsets));
            compare!("gated slots", &m.slots, mine.slots().packed(&own), whole.slots().packed(&offsets));
            compare!("log-linear", &m.levels, mine.levels().packed(&own), whole.levels().packed(&offsets));
            compare!("Mamba-3", &m.mamba, mine.mamba().packed(&own), whole.mamba().packed(&offsets));
            compare!("Mamba-3 MIMO", &m.mimo, mine.mimo().packed(&own), whole.mimo().packed(&offsets));
            let (x, y) = (mine.aaren(&m.query).packed(&own), whole.aaren(&m.query).packed(&offsets));
            compare!("Aaren", &m.aaren, x, y);
            let (x, y) = (mine.qkv().packed(&own, &own), whole.qkv().packed(&offsets, &offsets));
            compare!("Flowformer", &m.flow, x, y);
            // Windows of packed sequences would differ in length.
            let x = BasedInput { global: mine.based().global.packed(&own, &own), window: x };
            let got = lasp::forward_parts_packed(group, &m.based, x, continues).unwrap_err();
            let Error::Argument { rank: 0, message } = got else { panic!("{got}") };
            assert!(message.starts_with("a packed batch cannot be combined"), "{message}");
        }
    }
}

/// Sequences of which ranks have other numbers of tokens, or none.
pub fn padded_parts(group: &Group) {
    let (m, whole, (me, ranks)) = (mechanisms(2), Whole::new(2, 60), (group.rank(), group.size()));
    let cut = Cut::even(60, ranks);
    let mine = whole.held(&cut, me);
    let lengths = |rank: usize| [cut.held(rank), cut.held(rank) * rank / 7];
    let own = lengths(me);
    macro_rules! compare {
        ($name:literal, $mechanism:expr, $input:ident) => {
            let got = lasp::forward_parts(group, $mechanism, mine.$input().padded(&own)).unwrap();
            for entry in 0..2 {
                let of = |rank: usize| cut.positions(rank).take(lengths(rank)[entry]).collect::<Vec<_>>();
                let all = whole.of(entry, &(0..ranks).flat_map(of).collect::<Vec<_>>());
                let before = (0..me).map(|rank| lengths(rank)[entry]).sum::<usize>();
                let want = $mechanism.reference(all.$input()).unwrap();
                let want = want.slice(s![.., .., before..before + own[entry], ..]).to_owned();
                let allowed = $mechanism.error_bound(all.$input()).unwrap();
                let out = got.out.slice(s![entry..entry + 1, .., ..own[entry], ..]).to_owned();
                let off = worst(&out, &want, |b, h, i| allowed[[b, h, before + i]] + f64::MIN_POSITIVE);
                assert!(off <= 1.0, "{}: {off} of the bound, sequence {entry}", $name);
            }
        };
    }
    compare!("MesaNet", &m.mesa, mesa);
    compare!("gated slots", &m.slots, slots);
    compare!("Mamba-3", &m.mamba, mamba);
    compare!("Mamba-3 of two keys", &m.mimo, mimo);
    compare!("Flowformer", &m.flow, qkv);
    let got = lasp::forward_parts(group, &m.levels, mine.levels().padded(&own)).unwrap_err();
    let Error::Argument { rank: 0, message } = got else { panic!("{got}") };
    assert!(message.starts_with("lengths: expected none"), "{message}");
}

/// What has features or hash codes, causal and not.
pub fn states_of_features(group: &Group) {
    let anchors = Array3::from_shape_fn((HEADS, 5, 8), |(h, r, c)| ((h + 3 * r + c) as f32).cos() * 0.2);
    let weights = Array3::from_shape_fn((HEADS, 6, 5), |(h, b, r)| ((h + 5 * b * r) as f32).sin());
    let eco = EcoFormer::builder(anchors, weights, Array2::from_elem((HEADS, 5), 0.5)).variance(1.0);
    let taylor = LinearAttention::builder().features(Taylor);
    let favor = Performer::builder(8).features(16).seed(3);
    let elu = LinearAttention::builder();
    let released = eco.clone().variant(EcoFormerVariant::Released);
    for len in [0, 2, 75] {
        let whole = Whole::new(2, len);
        for cut in cuts(len, group.size()) {
            let mine = whole.held(&cut, group.rank());
            let (x, y) = (mine.qkv(), whole.qkv());
            macro_rules! compare {
                ($name:literal, causal $builder:expr) => {
                    let mechanism = $builder.clone().causal().build().unwrap();
                    let got = lasp::forward(group, &mechanism, x, Additive).unwrap();
                    let zero = mechanism.initial_state(y).unwrap();
                    let (want, _) = mechanism.reference_from(y, &zero).unwrap();
                    outputs($name, &mechanism, group, &cut, &got.out, (want, y));
                };
                ($name:literal, $builder:expr) => {
                    let mechanism = $builder.clone().build().unwrap();
                    let got = lasp::forward_unmasked(group, &mechanism, x).unwrap();
                    let zero = mechanism.initial_state(y).unwrap();
                    let (want, last) = mechanism.reference_from(y, &zero).unwrap();
                    outputs($name, &mechanism, group, &cut, &got.out, (want, y));
                    let size = last.view().iter().fold(1f32, |most, x| most.max(x.abs()));
                    let off =
                        (&got.last.view() - &last.view()).iter().fold(0f32, |most, x| most.max(x.abs()));
                    assert!(off <= 2e-5 * size, "{}: state off by {off} of {size}", $name);
                };
            }
            compare!("elu", elu);
            compare!("Taylor", taylor);
            compare!("Performer", favor);
            compare!("EcoFormer", eco);
            if chains(len, group.size()).contains(&cut) {
                compare!("causal Taylor", causal taylor);
                compare!("causal Performer", causal favor);
                compare!("causal EcoFormer", causal eco);
                compare!("causal EcoFormer, released", causal released);
            }
        }
    }
}

/// One exchange, of numbers that do not hang on how many tokens there are.
pub fn bytes_of_parts(group: &Group) {
    let m = mechanisms(2);
    let others = 4 * (group.size() as u64 - 1) * 2 * HEADS as u64;
    let sent = |call: &dyn Fn(&Whole)| {
        let each = [41, 140].map(|len| {
            let mine = Whole::new(2, len).held(&Cut::even(len, group.size()), group.rank());
            group.take_traffic();
            call(&mine);
            group.take_traffic().bytes
        });
        assert_eq!(each[0], each[1]);
        each[0]
    };
    let mesa = sent(&|x| drop(lasp::forward_parts(group, &m.mesa, x.mesa()).unwrap()));
    assert_eq!(mesa, others * (8 * 8 + 8 * 5 + 1));
    let slots = sent(&|x| drop(lasp::forward_parts(group, &m.slots, x.slots()).unwrap()));
    assert_eq!(slots, others * (8 * 6 + 6 * 5 + 6));
    let mamba = sent(&|x| drop(lasp::forward_parts(group, &m.mamba, x.mamba()).unwrap()));
    assert_eq!(mamba, others * (8 * 5 + 2 * 3 + 8 + 5 + 3));
    let aaren = sent(&|x| drop(lasp::forward_parts(group, &m.aaren, x.aaren(&m.query)).unwrap()));
    assert_eq!(aaren, others * (5 + 2));
    let flow = sent(&|x| drop(lasp::forward_parts(group, &m.flow, x.qkv()).unwrap()));
    assert_eq!(flow, others * (4 * 8 + 2 * 2 + 8 * 5));
}
