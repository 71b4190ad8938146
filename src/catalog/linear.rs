//! Entries of linear attention.

use std::marker::PhantomData;

use ndarray::{Array2, Array3, Array4, ArrayViewMut4, Axis, s};

use super::{Recipe, Trial};
use crate::attention::{Attention, Cost};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::linear::{
    Aaren, AarenInput, Agent, AgentInput, Based, BasedInput, ChannelGated, DeltaNet, DeltaQkv, EcoFormer,
    Flowformer, GatedDeltaNet, GatedDeltaQkv, Gla, Hgrn2, Hgrn2Input, Kda, KdaQkv, Lightning,
    LinearAttention, Mamba2, Mamba2Input, Performer, RandomFeatureAttention, RandomFeatureInput, RetNet,
    Rwkv6, Rwkv7, Rwkv7Input, S6, S6Input, SimpleGla, TokenGated,
};
use crate::simd::Isa;

/// A mechanism, what it takes besides queries, keys and values, and how that
/// becomes its input.
trait Case<T: Element> {
    type Mechanism: Attention<T>;

    /// The mechanism for inputs of these sizes.
    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, field: &Field) -> Result<Self::Mechanism>;

    /// What else it takes.
    fn extras(_x: &Qkv<'_, T>, _field: &Field) -> Extras<T> {
        Extras::default()
    }

    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Self::Mechanism as Attention<T>>::Input<'a>;
}

/// Arrays besides queries, keys and values; those that a mechanism does not
/// take are empty.
struct Extras<T> {
    /// `[batch, heads, len]`
    decays: Array3<f32>,
    betas: Array3<f32>,
    /// `[batch, heads, len, dim]`
    channels: Array4<f32>,
    rates: Array4<f32>,
    keys: Array4<T>,
}

impl<T: Element> Default for Extras<T> {
    fn default() -> Self {
        Self {
            decays: Array3::default((0, 0, 0)),
            betas: Array3::default((0, 0, 0)),
            channels: Array4::default((0, 0, 0, 0)),
            rates: Array4::default((0, 0, 0, 0)),
            keys: Array4::from_elem((0, 0, 0, 0), T::default()),
        }
    }
}

/// Numbers that depend on a seed and on a head, a token and a channel alone:
/// the same for every sequence.
struct Field {
    seed: u64,
    /// Rounds to the storage type of the trial.
    round: fn(f32) -> f32,
}

impl Field {
    fn of<T: Element>(seed: u64) -> Self {
        Self { seed, round: |x| T::from_f32(x).to_f32() }
    }

    /// From -1 to 1.
    fn at(&self, which: u64, head: usize, token: usize, channel: usize) -> f32 {
        let mut z = self.seed;
        for part in [which, head as u64, token as u64, channel as u64] {
            z = z.wrapping_add(part).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
        }
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `[batch, heads, len]`
    fn tokens<T>(&self, which: u64, x: &Qkv<'_, T>, f: impl Fn(f32) -> f32) -> Array3<f32> {
        let (batch, heads, len, _) = x.q.dim();
        Array3::from_shape_fn((batch, heads, len), |(_, h, t)| f(self.at(which, h, t, 0)))
    }

    /// `[batch, heads, len, dim]`
    fn channels<T>(&self, which: u64, x: &Qkv<'_, T>, f: impl Fn(f32) -> f32) -> Array4<f32> {
        Array4::from_shape_fn(x.q.dim(), |(_, h, t, c)| f(self.at(which, h, t, c)))
    }

    /// `[heads, dim]`
    fn heads<T>(&self, which: u64, x: &Qkv<'_, T>) -> Array2<f32> {
        Array2::from_shape_fn((x.q.dim().1, x.q.dim().3), |(h, c)| self.at(which, h, 0, c))
    }
}

/// A log decay from a number from -1 to 1: half of what there was is gone
/// after some tokens.
fn mild(x: f32) -> f32 {
    -0.15 * (1.0 + x)
}

/// From 0 to 1.
fn share(x: f32) -> f32 {
    0.5 + 0.5 * x
}

/// A mechanism on an input.
struct OnTokens<'a, T: Element, C: Case<T>> {
    mechanism: C::Mechanism,
    extras: Extras<T>,
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    seed: u64,
    case: PhantomData<fn() -> C>,
}

fn trial<'a, T: Element, C>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>>
where
    C: Case<T> + Case<f32> + 'a,
    <C as Case<T>>::Mechanism: 'a,
{
    let field = Field::of::<T>(seed);
    Ok(Box::new(OnTokens::<T, C> {
        mechanism: <C as Case<T>>::mechanism(&x, isa, &field)?,
        extras: <C as Case<T>>::extras(&x, &field),
        x,
        isa,
        seed,
        case: PhantomData,
    }))
}

impl<T: Element, C: Case<T> + Case<f32>> OnTokens<'_, T, C> {
    /// Calls `run` with the mechanism and an input whose values are a unit
    /// vector for each key, in `f32`: its outputs are weights, for what all
    /// these mechanisms make of values is linear.
    fn on_unit_values<R>(
        &self,
        run: impl FnOnce(
            &<C as Case<f32>>::Mechanism,
            <<C as Case<f32>>::Mechanism as Attention<f32>>::Input<'_>,
        ) -> Result<R>,
    ) -> Result<R> {
        let (q, k) = (self.x.q.mapv(Element::to_f32), self.x.k.mapv(Element::to_f32));
        let (batch, heads, len, _) = self.x.v.dim();
        let v = Array4::from_shape_fn((batch, heads, len, len), |(_, _, j, c)| f32::from(j == c));
        let x = Qkv::new(q.view(), k.view(), v.view());
        let field = Field::of::<T>(self.seed);
        let mechanism = <C as Case<f32>>::mechanism(&x, self.isa, &field)?;
        let extras = <C as Case<f32>>::extras(&x, &field);
        run(&mechanism, <C as Case<f32>>::input(x, &extras))
    }

    fn input(&self) -> <<C as Case<T>>::Mechanism as Attention<T>>::Input<'_> {
        <C as Case<T>>::input(self.x.reborrow(), &self.extras)
    }
}

impl<T: Element, C: Case<T> + Case<f32>> Trial<T> for OnTokens<'_, T, C> {
    fn forward_into(&self, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()> {
        self.mechanism.forward_into(self.input(), out, workspace)
    }
    fn workspace_bytes(&self) -> Result<usize> {
        self.mechanism.workspace_bytes(self.input())
    }
    fn reference(&self) -> Result<Array4<f64>> {
        self.mechanism.reference(self.input())
    }
    fn error_bound(&self) -> Result<Array3<f64>> {
        self.mechanism.error_bound(self.input())
    }
    fn weights(&self) -> Result<Array4<f32>> {
        self.on_unit_values(|mechanism, x| mechanism.forward(x))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.on_unit_values(|mechanism, x| mechanism.reference(x))
    }
    fn cost(&self) -> Result<Cost> {
        self.mechanism.cost(self.input())
    }
}

/// A builder with the instruction set that a trial asks for.
fn on<B>(builder: B, isa: Option<Isa>, set: impl FnOnce(B, Isa) -> B) -> B {
    match isa {
        Some(isa) => set(builder, isa),
        None => builder,
    }
}

pub(super) struct LightningEntry;
impl Recipe for LightningEntry {
    const NAME: &'static str = "lightning";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2401.04658, 2405.17381";
    const SUMMARY: &'static str = "every head forgets at a fixed rate";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for LightningEntry {
    type Mechanism = Lightning;

    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Lightning> {
        let (_, heads, _, dim) = x.q.dim();
        // So that outputs are in the range of half precision.
        let builder = Lightning::builder(heads).scale(1.0 / dim.max(1) as f32);
        on(builder, isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <Lightning as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct LinearEntry;
impl Recipe for LinearEntry {
    const NAME: &'static str = "linear";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2006.16236";
    const SUMMARY: &'static str = "every query reads the sum over all keys, through elu(x) + 1";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for LinearEntry {
    type Mechanism = LinearAttention;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<LinearAttention> {
        on(LinearAttention::builder(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <LinearAttention as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct CausalLinearEntry;
impl Recipe for CausalLinearEntry {
    const NAME: &'static str = "causal linear";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2006.16236";
    const SUMMARY: &'static str = "the sum over the keys so far, through elu(x) + 1";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for CausalLinearEntry {
    type Mechanism = LinearAttention;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<LinearAttention> {
        on(LinearAttention::builder().causal(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <LinearAttention as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct RetNetEntry;
impl Recipe for RetNetEntry {
    const NAME: &'static str = "RetNet";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2307.08621";
    const SUMMARY: &'static str = "every head forgets at a fixed rate, slower the later the head";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for RetNetEntry {
    type Mechanism = RetNet;

    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<RetNet> {
        on(RetNet::builder(x.q.dim().1), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <RetNet as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct SimpleGlaEntry;
impl Recipe for SimpleGlaEntry {
    const NAME: &'static str = "simple GLA";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2312.06635";
    const SUMMARY: &'static str = "every token says how much is forgotten";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for SimpleGlaEntry {
    type Mechanism = SimpleGla;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<SimpleGla> {
        on(SimpleGla::builder(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        Extras { decays: field.tokens(1, x, mild), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <SimpleGla as Attention<T>>::Input<'a> {
        TokenGated { qkv: x, log_decay: extras.decays.view() }
    }
}

pub(super) struct GlaEntry;
impl Recipe for GlaEntry {
    const NAME: &'static str = "GLA";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2312.06635";
    const SUMMARY: &'static str = "every token says how much of each channel is forgotten";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for GlaEntry {
    type Mechanism = Gla;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Gla> {
        on(Gla::builder(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        Extras { channels: field.channels(1, x, mild), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Gla as Attention<T>>::Input<'a> {
        ChannelGated { qkv: x, log_decay: extras.channels.view() }
    }
}

pub(super) struct Mamba2Entry;
impl Recipe for Mamba2Entry {
    const NAME: &'static str = "Mamba-2";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2405.21060";
    const SUMMARY: &'static str = "every token says how long a step it is";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for Mamba2Entry {
    type Mechanism = Mamba2;

    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Mamba2> {
        on(
            Mamba2::builder(&vec![0.0; x.q.dim().1.max(x.v.dim().1)])
                .skip(&vec![0.5; x.q.dim().1.max(x.v.dim().1)]),
            isa,
            |builder, isa| builder.isa(isa),
        )
        .build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        Extras { decays: field.tokens(1, x, |x| 2.0 * x - 2.0), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Mamba2 as Attention<T>>::Input<'a> {
        Mamba2Input::new(x.v, extras.decays.view(), x.k, x.q)
    }
}

pub(super) struct Hgrn2Entry;
impl Recipe for Hgrn2Entry {
    const NAME: &'static str = "HGRN2";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2404.07904";
    const SUMMARY: &'static str = "what is not forgotten of a channel is not written to either";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for Hgrn2Entry {
    type Mechanism = Hgrn2;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Hgrn2> {
        on(Hgrn2::builder().lower_bound(0.5), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        Extras { channels: field.channels(1, x, |x| 3.0 * x), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Hgrn2 as Attention<T>>::Input<'a> {
        Hgrn2Input::new(x.q, extras.channels.view(), x.v)
    }
}

pub(super) struct Rwkv6Entry;
impl Recipe for Rwkv6Entry {
    const NAME: &'static str = "RWKV-6";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2404.05892";
    const SUMMARY: &'static str = "channels forget, and a token sees itself through a bonus";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for Rwkv6Entry {
    type Mechanism = Rwkv6;

    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, field: &Field) -> Result<Rwkv6> {
        on(Rwkv6::builder(field.heads(2, x).view()), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        Extras { channels: field.channels(1, x, mild), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Rwkv6 as Attention<T>>::Input<'a> {
        ChannelGated { qkv: x, log_decay: extras.channels.view() }
    }
}

pub(super) struct DeltaNetEntry;
impl Recipe for DeltaNetEntry {
    const NAME: &'static str = "DeltaNet";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2406.06484";
    const SUMMARY: &'static str = "a value replaces what was under its key";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for DeltaNetEntry {
    type Mechanism = DeltaNet;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<DeltaNet> {
        on(DeltaNet::builder().normalize_qk(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        Extras { betas: field.tokens(2, x, share), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <DeltaNet as Attention<T>>::Input<'a> {
        DeltaQkv { qkv: x, beta: extras.betas.view() }
    }
}

pub(super) struct GatedDeltaNetEntry;
impl Recipe for GatedDeltaNetEntry {
    const NAME: &'static str = "Gated DeltaNet";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2412.06464";
    const SUMMARY: &'static str =
        "a value replaces what was under its key, and every token says how much is forgotten";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for GatedDeltaNetEntry {
    type Mechanism = GatedDeltaNet;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<GatedDeltaNet> {
        on(GatedDeltaNet::builder().normalize_qk(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        Extras { decays: field.tokens(1, x, mild), betas: field.tokens(2, x, share), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <GatedDeltaNet as Attention<T>>::Input<'a> {
        GatedDeltaQkv { qkv: x, log_decay: extras.decays.view(), beta: extras.betas.view() }
    }
}

pub(super) struct KdaEntry;
impl Recipe for KdaEntry {
    const NAME: &'static str = "KDA";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2510.26692";
    const SUMMARY: &'static str = "the same, channel by channel";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for KdaEntry {
    type Mechanism = Kda;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Kda> {
        on(Kda::builder().normalize_qk(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        Extras { channels: field.channels(1, x, mild), betas: field.tokens(2, x, share), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Kda as Attention<T>>::Input<'a> {
        KdaQkv { qkv: x, log_decay: extras.channels.view(), beta: extras.betas.view() }
    }
}

pub(super) struct Rwkv7Entry;
impl Recipe for Rwkv7Entry {
    const NAME: &'static str = "RWKV-7";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2503.14456";
    const SUMMARY: &'static str = "channels forget, and what is under a removal key is replaced";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for Rwkv7Entry {
    type Mechanism = Rwkv7;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Rwkv7> {
        on(Rwkv7::builder(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        {
            let (_, heads, len, dim) = x.q.dim();
            let norm = Array2::from_shape_fn((heads, len), |(h, t)| {
                (0..dim).map(|c| field.at(3, h, t, c).powi(2)).sum::<f32>().sqrt().max(1e-3)
            });
            let kappa = |(_, h, t, c): (usize, usize, usize, usize)| {
                T::from_f32((field.round)(field.at(3, h, t, c) / norm[[h, t]]))
            };
            Extras {
                channels: field.channels(1, x, |x| 2.0 * mild(x)),
                rates: field.channels(2, x, share),
                keys: Array4::from_shape_fn(x.q.dim(), kappa),
                ..Extras::default()
            }
        }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Rwkv7 as Attention<T>>::Input<'a> {
        Rwkv7Input {
            rkv: x,
            log_decay: extras.channels.view(),
            kappa: extras.keys.view(),
            rate: extras.rates.view(),
        }
    }
}

pub(super) struct S6Entry;
impl Recipe for S6Entry {
    const NAME: &'static str = "S6";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2312.00752, 2405.15731";
    const SUMMARY: &'static str = "a selective state space: every element of the state by itself";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for S6Entry {
    type Mechanism = S6;

    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, field: &Field) -> Result<S6> {
        on(
            {
                let (heads, n, channels) = (x.q.dim().1, x.q.dim().3, x.v.dim().3);
                S6::builder(Array3::from_shape_fn((heads, channels, n), |(h, _, s)| {
                    -share(field.at(2, h, 0, s))
                }))
            },
            isa,
            |builder, isa| builder.isa(isa),
        )
        .build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        {
            // As many heads as there are queries.
            let (batch, heads, len, _) = x.q.dim();
            let group = heads / x.v.dim().1.max(1);
            let dim = (batch, heads, len, x.v.dim().3);
            Extras {
                channels: Array4::from_shape_fn(dim, |(_, h, t, _)| 0.4 * share(field.at(1, h, t, 0))),
                keys: Array4::from_shape_fn(dim, |(b, h, t, c)| x.v[[b, h / group.max(1), t, c]]),
                ..Extras::default()
            }
        }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <S6 as Attention<T>>::Input<'a> {
        S6Input::new(extras.keys.view(), extras.channels.view(), x.k, x.q)
    }
}

pub(super) struct PerformerEntry;
impl Recipe for PerformerEntry {
    const NAME: &'static str = "Performer";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2009.14794";
    const SUMMARY: &'static str = "softmax weights estimated by random features";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for PerformerEntry {
    type Mechanism = Performer;

    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Performer> {
        on(Performer::builder(x.q.dim().3), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <Performer as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct CausalPerformerEntry;
impl Recipe for CausalPerformerEntry {
    const NAME: &'static str = "causal Performer";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2009.14794";
    const SUMMARY: &'static str = "the same over the keys so far";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for CausalPerformerEntry {
    type Mechanism = Performer;

    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Performer> {
        on(Performer::builder(x.q.dim().3).causal(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <Performer as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct BasedEntry;
impl Recipe for BasedEntry {
    const NAME: &'static str = "BASED";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2402.18668";
    const SUMMARY: &'static str =
        "the exponential's Taylor series for all keys, and exact softmax for the last 16";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for BasedEntry {
    type Mechanism = Based;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Based> {
        on(Based::builder(16), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <Based as Attention<T>>::Input<'a> {
        {
            // Features are as many as pairs of channels: of a few.
            let few = x.q.dim().3.min(8);
            let global = Qkv {
                q: x.q.reborrow().slice_move(s![.., .., .., ..few]),
                k: x.k.reborrow().slice_move(s![.., .., .., ..few]),
                ..x.reborrow()
            };
            BasedInput { global, window: x }
        }
    }
}

pub(super) struct AgentEntry;
impl Recipe for AgentEntry {
    const NAME: &'static str = "Agent Attention";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2312.08874";
    const SUMMARY: &'static str = "two softmax attentions through 9 agent tokens";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for AgentEntry {
    type Mechanism = Agent;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Agent> {
        on(Agent::builder(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        let (batch, heads, _, dim) = x.q.dim();
        let agent = |(_, h, a, c)| T::from_f32((field.round)(field.at(1, h, a, c)));
        Extras { keys: Array4::from_shape_fn((batch, heads, 9, dim), agent), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Agent as Attention<T>>::Input<'a> {
        AgentInput::new(x, extras.keys.view())
    }
}

pub(super) struct EcoFormerEntry;
impl Recipe for EcoFormerEntry {
    const NAME: &'static str = "EcoFormer";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2209.09004";
    const SUMMARY: &'static str = "weights count equal bits of hash codes";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for EcoFormerEntry {
    type Mechanism = EcoFormer;

    fn mechanism(x: &Qkv<'_, T>, isa: Option<Isa>, field: &Field) -> Result<EcoFormer> {
        on(
            {
                let (_, heads, _, dim) = x.q.dim();
                let anchors = Array3::from_shape_fn((heads, 5, dim), |(h, r, c)| field.at(1, h, r, c));
                let weights = Array3::from_shape_fn((heads, 8, 5), |(h, b, r)| field.at(2, h, b, r));
                EcoFormer::builder(anchors, weights, Array2::from_elem((heads, 5), 0.5)).variance(1.0)
            },
            isa,
            |builder, isa| builder.isa(isa),
        )
        .build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <EcoFormer as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct FlowformerEntry;
impl Recipe for FlowformerEntry {
    const NAME: &'static str = "Flowformer";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2202.06258";
    const SUMMARY: &'static str = "keys compete for queries, queries are allotted what flows";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for FlowformerEntry {
    type Mechanism = Flowformer;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Flowformer> {
        on(Flowformer::builder(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <Flowformer as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct CausalFlowformerEntry;
impl Recipe for CausalFlowformerEntry {
    const NAME: &'static str = "causal Flowformer";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2202.06258";
    const SUMMARY: &'static str = "the same over the keys so far";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for CausalFlowformerEntry {
    type Mechanism = Flowformer;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Flowformer> {
        on(Flowformer::builder().causal(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn input<'a>(x: Qkv<'a, T>, _: &'a Extras<T>) -> <Flowformer as Attention<T>>::Input<'a> {
        x
    }
}

pub(super) struct AarenEntry;
impl Recipe for AarenEntry {
    const NAME: &'static str = "Aaren";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2405.13956";
    const SUMMARY: &'static str = "softmax attention of one query a head over every prefix, as a scan";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        trial::<T, Self>(x, isa, seed)
    }
}
impl<T: Element> Case<T> for AarenEntry {
    type Mechanism = Aaren;

    fn mechanism(_: &Qkv<'_, T>, isa: Option<Isa>, _: &Field) -> Result<Aaren> {
        on(Aaren::builder(), isa, |builder, isa| builder.isa(isa)).build()
    }
    fn extras(x: &Qkv<'_, T>, field: &Field) -> Extras<T> {
        // The same query for every sequence and prefix.
        let (batch, heads, _, dim) = x.q.dim();
        let query =
            |(_, h, _, c): (usize, usize, usize, usize)| T::from_f32((field.round)(field.at(1, h, 0, c)));
        Extras { keys: Array4::from_shape_fn((batch, heads, 1, dim), query), ..Extras::default() }
    }
    fn input<'a>(x: Qkv<'a, T>, extras: &'a Extras<T>) -> <Aaren as Attention<T>>::Input<'a> {
        AarenInput::new(extras.keys.index_axis(Axis(2), 0), x.k, x.v)
    }
}

pub(super) struct RandomFeatureEntry;
impl Recipe for RandomFeatureEntry {
    const NAME: &'static str = "random-feature attention";
    const FAMILY: &'static str = "linear";
    const SOURCE: &'static str = "arXiv 2307.11353";
    const SUMMARY: &'static str = "random matrices weigh keys for values that are parameters";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let (field, features) = (Field::of::<T>(seed), 2);
        let ((_, heads, _, dim), value_dim) = (x.q.dim(), x.v.dim().3);
        let builder = RandomFeatureAttention::builder(dim, features).biased().seed(seed);
        let mechanism = on(builder, isa, |builder, isa| builder.isa(isa)).build()?;
        // A 1 takes what weights are read with, so that the bound holds for
        // these too.
        let value = |(h, r, c, v)| if c == dim { 1.0 } else { field.at(1 + r as u64, h, c, v) };
        let values = Array4::from_shape_fn((heads, features, dim + 1, value_dim), value);
        Ok(Box::new(OnRandomFeatures { mechanism, values, x }))
    }
}

/// Random-feature attention on queries and keys. Its values are parameters:
/// of the values of the input it takes nothing but their dimension.
struct OnRandomFeatures<'a, T> {
    mechanism: RandomFeatureAttention,
    values: Array4<f32>,
    x: Qkv<'a, T>,
}

impl<T: Element> OnRandomFeatures<'_, T> {
    fn input(&self) -> RandomFeatureInput<'_, T> {
        RandomFeatureInput { q: self.x.q.reborrow(), k: self.x.k.reborrow(), values: self.values.view() }
    }

    /// What keys weigh for all features together: what each gives by itself,
    /// in `f32`, where the value of the 1 that is appended to it is its share.
    fn key_by_key<W: Clone + Default>(
        &self,
        run: impl Fn(RandomFeatureInput<'_, f32>) -> Result<Array4<W>>,
    ) -> Result<Array4<W>> {
        let (q, k) = (self.x.q.mapv(Element::to_f32), self.x.k.mapv(Element::to_f32));
        let ((batch, heads, q_len, dim), kv_len) = (q.dim(), k.dim().2);
        let mut values = Array4::zeros((heads, self.values.dim().1, dim + 1, 1));
        values.slice_mut(s![.., .., dim, ..]).fill(1.0 / kv_len.max(1) as f32);
        let mut weights = Array4::default((batch, heads, q_len, kv_len));
        for (j, mut to) in weights.axis_iter_mut(Axis(3)).enumerate() {
            let k = k.slice(s![.., .., j..j + 1, ..]);
            let of_key = run(RandomFeatureInput { q: q.view(), k, values: values.view() })?;
            to.assign(&of_key.index_axis(Axis(3), 0));
        }
        Ok(weights)
    }
}

impl<T: Element> Trial<T> for OnRandomFeatures<'_, T> {
    fn forward_into(&self, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()> {
        self.mechanism.forward_into(self.input(), out, workspace)
    }
    fn workspace_bytes(&self) -> Result<usize> {
        self.mechanism.workspace_bytes(self.input())
    }
    fn reference(&self) -> Result<Array4<f64>> {
        self.mechanism.reference(self.input())
    }
    fn error_bound(&self) -> Result<Array3<f64>> {
        self.mechanism.error_bound(self.input())
    }
    fn weights(&self) -> Result<Array4<f32>> {
        self.key_by_key(|x| self.mechanism.forward(x))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.key_by_key(|x| self.mechanism.reference(x))
    }
    fn cost(&self) -> Result<Cost> {
        self.mechanism.cost(self.input())
    }
}
