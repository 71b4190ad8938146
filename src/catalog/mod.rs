//! Every mechanism of the crate, one entry each.
//!
//! Tests, benches and examples walk [`ENTRIES`]: a mechanism that is listed
//! gets every general test for free. An entry makes a [`Trial`] of its
//! mechanism from queries, keys and values; what else the mechanism needs
//! (temperatures, tables, documents) is made from a seed.

use half::{bf16, f16};
use ndarray::{Array3, Array4, ArrayViewMut4, s};

use crate::attention::{Attention, Bounded, Cost, Input, Selects, Weights};
use crate::card::{Card, Exhibit, Extras, Field};
use crate::dense::{
    act::ActExhibit,
    additive::AdditiveExhibit,
    adversarial::AdversarialExhibit,
    attn_res::AttnResExhibit,
    augmented::AugmentedExhibit,
    dare::DareExhibit,
    differential::DifferentialExhibit,
    gated::GatedExhibit,
    guidance::GuidanceExhibit,
    key_lock::KeyLockExhibit,
    key_mask::KeyMaskExhibit,
    moh::{BamExhibit, MohExhibit},
    p_adapter::PAdapterExhibit,
    paint::PaintExhibit,
    path::PathExhibit,
    pill::PillExhibit,
    rcmha::RcmhaExhibit,
    relative::{MusicExhibit, ShawExhibit, TransformerXlExhibit},
    sage::SageExhibit,
    selective::SelectiveExhibit,
    sigmoid::SigmoidExhibit,
    softmax::DenseExhibit,
    token_former::TokenFormerExhibit,
    var::VarExhibit,
    vhr::VhrExhibit,
    video_booth::VideoBoothExhibit,
    zero_tuning::ZeroTuningExhibit,
};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::latent::{
    ab_milp::AbMilpExhibit, mla::MlaExhibit, multi_layer::MultiLayerExhibit, nv_embed::NvEmbedExhibit,
    perceiver::PerceiverExhibit, probing::ProbingExhibit, sim_pool::SimPoolExhibit,
};
use crate::linear::exhibits::*;
use crate::math::random::Normal;
use crate::neighborhood::exhibits::*;
use crate::simd::Isa;
use crate::sparse::exhibits::*;

mod dense;
mod random_features;

/// A mechanism on an input, ready to run.
pub trait Trial<T>: Send + Sync {
    /// The kernel.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn forward_into(&self, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()>;

    /// Bytes of workspace that the kernel needs.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn workspace_bytes(&self) -> Result<usize>;

    /// The definition.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn reference(&self) -> Result<Array4<f64>>;

    /// How far the kernel may be off, `[batch, q_heads, q_len]`.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn error_bound(&self) -> Result<Array3<f64>>;

    /// The weights by the kernel, `[batch, q_heads, q_len, kv_len]`.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn weights(&self) -> Result<Array4<f32>>;

    /// The weights by definition.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn reference_weights(&self) -> Result<Array4<f64>>;

    /// What a call costs.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn cost(&self) -> Result<Cost>;

    /// Where the keys that the kernel selects are others than by definition,
    /// and rounding is no excuse. Of a mechanism that selects, definition, bound
    /// and weights above are those on the kernel's selection.
    ///
    /// # Errors
    /// What the mechanism refuses.
    fn selection_error(&self) -> Result<Option<String>> {
        Ok(None)
    }
}

type Make<T> = for<'a> fn(Qkv<'a, T>, Option<Isa>, u64) -> Result<Box<dyn Trial<T> + 'a>>;

/// A mechanism.
#[derive(Clone, Copy)]
pub struct Entry {
    /// What there is to say of it.
    pub card: &'static Card,
    /// Whether queries and keys are the same tokens, so that there are as many
    /// of the ones as of the others.
    pub tokens: bool,
    /// Whether it selects keys: where scores are nearly equal, instruction sets
    /// may select others, and a call allocates what it selects.
    pub selects: bool,
    /// Whether it has weights of tokens for tokens.
    pub weighs: bool,
    make_f32: Make<f32>,
    make_f16: Make<f16>,
    make_bf16: Make<bf16>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("card", self.card).finish_non_exhaustive()
    }
}

/// Storage types that entries can be run with: all of them.
pub trait Catalogued: Element {
    #[doc(hidden)]
    fn make(entry: &Entry) -> Make<Self>;
}

impl Catalogued for f32 {
    fn make(entry: &Entry) -> Make<Self> {
        entry.make_f32
    }
}

impl Catalogued for f16 {
    fn make(entry: &Entry) -> Make<Self> {
        entry.make_f16
    }
}

impl Catalogued for bf16 {
    fn make(entry: &Entry) -> Make<Self> {
        entry.make_bf16
    }
}

impl Entry {
    /// The mechanism on an input, on `isa` or the best one, with whatever
    /// else it needs made from `seed`.
    ///
    /// # Errors
    /// What building the mechanism refuses.
    pub fn trial<'a, T: Catalogued>(
        &self,
        x: Qkv<'a, T>,
        isa: Option<Isa>,
        seed: u64,
    ) -> Result<Box<dyn Trial<T> + 'a>> {
        T::make(self)(x, isa, seed)
    }
}

/// Which pairs of queries and keys there may be, in the words of CAB (arXiv 2210.07661).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patterns {
    /// Whether no output depends on tokens after its own.
    pub causal: bool,
    /// Whether it is run with queries that are other tokens than keys, and other ones in
    /// number.
    pub cross: bool,
}

/// `NS`, not causal, self; `NC`, not causal, cross; `CS` and `CC`, causal.
impl std::fmt::Display for Patterns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let order = if self.causal { 'C' } else { 'N' };
        if self.cross { write!(f, "{order}S {order}C") } else { write!(f, "{order}S") }
    }
}

impl Entry {
    /// The patterns that it has, of which the order is found by changing late tokens.
    ///
    /// # Errors
    /// What the mechanism refuses.
    pub fn patterns(&self) -> Result<Patterns> {
        const LEN: usize = 96;
        const DIM: usize = 16;
        let mut noise = Normal::new(3);
        let mut array = |heads: usize| {
            Array4::from_shape_simple_fn((1, heads, LEN, DIM), || noise.next().unwrap_or_default() as f32)
        };
        let arrays = [array(4), array(2), array(2)];
        let run = |[q, k, v]: &[Array4<f32>; 3]| -> Result<Array4<f32>> {
            let mut out = Array4::zeros((1, 4, LEN, DIM));
            let trial = self.trial(Qkv::new(q.view(), k.view(), v.view()), None, 1)?;
            trial.forward_into(out.view_mut(), &mut Workspace::new())?;
            Ok(out)
        };
        let whole = run(&arrays)?;
        let mut causal = true;
        for cut in [5, 30, 61] {
            let mut changed = arrays.clone();
            for x in &mut changed {
                x.slice_mut(s![.., .., cut.., ..]).mapv_inplace(|x| 0.5 - 1.5 * x);
            }
            let out = run(&changed)?;
            let early = [&whole, &out].map(|x| x.slice(s![.., .., ..cut, ..]));
            causal &= early[0].iter().zip(early[1]).all(|(a, b)| (a - b).abs() < 1e-4);
        }
        Ok(Patterns { causal, cross: !self.tokens })
    }
}

/// What a trial of a mechanism that selects needs.
pub(crate) trait Chooses<X: Input>: Selects<X> + Weights<X> {}
impl<X: Input, M: Selects<X> + Weights<X>> Chooses<X> for M {}

/// What a trial of a mechanism with weights needs.
pub(crate) trait Shows<X: Input>: Bounded<X> + Weights<X> {}
impl<X: Input, M: Bounded<X> + Weights<X>> Shows<X> for M {}

/// A kind of entry: its constructor, and the trial that it makes.
macro_rules! kind {
    (
        $(#[$meta:meta])*
        $kind:ident, $trial:ident of $capability:ident; selects $selects:literal, weighs $weighs:literal
    ) => {
        impl Entry {
            $(#[$meta])*
            const fn $kind<E: Exhibit>() -> Self
            where
                E::Mechanism: for<'a> $capability<E::Input<'a, f32>>
                    + for<'a> $capability<E::Input<'a, f16>>
                    + for<'a> $capability<E::Input<'a, bf16>>,
            {
                Self {
                    card: E::CARD,
                    tokens: E::TOKENS,
                    selects: $selects,
                    weighs: $weighs,
                    make_f32: $kind::<f32, E>,
                    make_f16: $kind::<f16, E>,
                    make_bf16: $kind::<bf16, E>,
                }
            }
        }

        struct $trial<'a, T: Element, E: Exhibit>(Stand<'a, T, E>);

        fn $kind<'a, T: Element, E: Exhibit>(
            x: Qkv<'a, T>,
            isa: Option<Isa>,
            seed: u64,
        ) -> Result<Box<dyn Trial<T> + 'a>>
        where
            E::Mechanism: for<'b> $capability<E::Input<'b, T>> + for<'b> $capability<E::Input<'b, f32>>,
        {
            Ok(Box::new($trial::<T, E>(Stand::new(x, isa, seed)?)))
        }
    };
}

kind! {
    /// A mechanism that shows its weights.
    weighing, Weighing of Shows; selects false, weighs true
}
kind! {
    /// A mechanism that is linear in the values, so that values which are unit
    /// vectors show its weights.
    linear, Linear of Bounded; selects false, weighs true
}
kind! {
    /// A mechanism that has no weights of tokens for tokens.
    mapping, Mapping of Bounded; selects false, weighs false
}
kind! {
    /// A mechanism that selects keys.
    selecting, Selecting of Chooses; selects true, weighs true
}
kind! {
    /// A mechanism that selects keys and is linear in the values, so that values
    /// which are unit vectors show its weights.
    summing, Summing of Selects; selects true, weighs true
}
kind! {
    /// A mechanism that selects keys which are its values, so that it has no
    /// weights of tokens for tokens.
    picking, Picking of Selects; selects true, weighs false
}

/// A mechanism as its exhibit builds it, and the arrays of a call.
struct Stand<'a, T, E: Exhibit> {
    mechanism: E::Mechanism,
    x: Qkv<'a, T>,
    extras: Extras<T>,
    isa: Option<Isa>,
    seed: u64,
}

impl<'a, T: Element, E: Exhibit> Stand<'a, T, E> {
    fn new(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Self> {
        let field = Field::of::<T>(seed);
        let mechanism = E::build(&x, isa, &field)?;
        Ok(Self { mechanism, extras: E::extras(&x, &field), x, isa, seed })
    }

    fn input(&self) -> E::Input<'_, T> {
        E::input(self.x.reborrow(), &self.extras)
    }

    /// Calls `run` with a mechanism and an input whose values are a unit vector
    /// for each key, in `f32`: its outputs are weights.
    fn on_unit_values<R>(
        &self,
        run: impl FnOnce(&E::Mechanism, E::Input<'_, f32>) -> Result<R>,
    ) -> Result<R> {
        let (q, k) = (self.x.q.mapv(Element::to_f32), self.x.k.mapv(Element::to_f32));
        let (batch, heads, len, _) = self.x.v.dim();
        let v = Array4::from_shape_fn((batch, heads, len, len), |(_, _, j, c)| f32::from(j == c));
        let x = Qkv::new(q.view(), k.view(), v.view());
        let field = Field::of::<T>(self.seed);
        let mechanism = E::build(&x, self.isa, &field)?;
        let extras = E::extras(&x, &field);
        run(&mechanism, E::input(x, &extras))
    }
}

#[cold]
fn weightless<E: Exhibit>() -> Error {
    Error::value("weights", "a mechanism that has weights of tokens for tokens", E::CARD.name)
}

/// [`Trial`]'s methods that every mechanism has, on the mechanism and
/// the input that expressions give.
macro_rules! common {
    ($self:ident, $mechanism:expr, $input:expr) => {
        fn forward_into(&$self, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()> {
            $mechanism.forward_into($input, out, workspace)
        }
        fn workspace_bytes(&$self) -> Result<usize> {
            $mechanism.workspace_bytes($input)
        }
        fn reference(&$self) -> Result<Array4<f64>> {
            $mechanism.reference($input)
        }
        fn error_bound(&$self) -> Result<Array3<f64>> {
            $mechanism.error_bound($input)
        }
        fn cost(&$self) -> Result<Cost> {
            $mechanism.cost($input)
        }
    };
}
pub(crate) use common;

impl<T: Element, E: Exhibit> Trial<T> for Weighing<'_, T, E>
where
    E::Mechanism: for<'b> Shows<E::Input<'b, T>>,
{
    common!(self, self.0.mechanism, self.0.input());

    fn weights(&self) -> Result<Array4<f32>> {
        self.0.mechanism.weights(self.0.input())
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.0.mechanism.reference_weights(self.0.input())
    }
}

impl<T: Element, E: Exhibit> Trial<T> for Linear<'_, T, E>
where
    E::Mechanism: for<'b> Bounded<E::Input<'b, T>> + for<'b> Bounded<E::Input<'b, f32>>,
{
    common!(self, self.0.mechanism, self.0.input());

    fn weights(&self) -> Result<Array4<f32>> {
        self.0.on_unit_values(|mechanism, x| mechanism.forward(x))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.0.on_unit_values(|mechanism, x| mechanism.reference(x))
    }
}

impl<T: Element, E: Exhibit> Trial<T> for Mapping<'_, T, E>
where
    E::Mechanism: for<'b> Bounded<E::Input<'b, T>>,
{
    common!(self, self.0.mechanism, self.0.input());

    fn weights(&self) -> Result<Array4<f32>> {
        Err(weightless::<E>())
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        Err(weightless::<E>())
    }
}

/// [`Trial`]'s methods that every mechanism that selects has.
macro_rules! on_own_selection {
    ($self:ident) => {
    fn forward_into(&$self, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()> {
        $self.0.mechanism.forward_into($self.0.input(), out, workspace)
    }
    fn workspace_bytes(&$self) -> Result<usize> {
        $self.0.mechanism.workspace_bytes($self.0.input())
    }
    fn reference(&$self) -> Result<Array4<f64>> {
        $self.0.mechanism.reference_on($self.0.input(), &$self.0.mechanism.select($self.0.input())?)
    }
    fn error_bound(&$self) -> Result<Array3<f64>> {
        $self.0.mechanism.bound_on($self.0.input(), &$self.0.mechanism.select($self.0.input())?)
    }
    fn cost(&$self) -> Result<Cost> {
        $self.0.mechanism.cost($self.0.input())
    }
    fn selection_error(&$self) -> Result<Option<String>> {
        let (want, margins) = $self.0.mechanism.reference_select($self.0.input())?;
        let got = $self.0.mechanism.select($self.0.input())?;
        Ok(<E::Mechanism as Selects<E::Input<'_, T>>>::difference(&got, &want, &margins))
    }
    };
}

impl<T: Element, E: Exhibit> Trial<T> for Picking<'_, T, E>
where
    E::Mechanism: for<'b> Selects<E::Input<'b, T>>,
{
    on_own_selection!(self);

    fn weights(&self) -> Result<Array4<f32>> {
        Err(weightless::<E>())
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        Err(weightless::<E>())
    }
}

impl<T: Element, E: Exhibit> Trial<T> for Selecting<'_, T, E>
where
    E::Mechanism: for<'b> Chooses<E::Input<'b, T>>,
{
    on_own_selection!(self);

    fn weights(&self) -> Result<Array4<f32>> {
        self.0.mechanism.weights(self.0.input())
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        // Values that are a unit vector for each key: outputs are weights.
        let (batch, heads, len, _) = self.0.x.v.dim();
        let one = |(_, _, j, c): (usize, usize, usize, usize)| T::from_f32(f32::from(j == c));
        let v = Array4::from_shape_fn((batch, heads, len, len), one);
        let x = E::input(Qkv { v: v.view(), ..self.0.x.reborrow() }, &self.0.extras);
        // Chosen by the values that there are, if by any.
        self.0.mechanism.reference_on(x, &self.0.mechanism.select(self.0.input())?)
    }
}

impl<T: Element, E: Exhibit> Trial<T> for Summing<'_, T, E>
where
    E::Mechanism: for<'b> Selects<E::Input<'b, T>> + for<'b> Selects<E::Input<'b, f32>>,
{
    on_own_selection!(self);

    fn weights(&self) -> Result<Array4<f32>> {
        self.0.on_unit_values(|mechanism, x| mechanism.forward(x))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        let on_own =
            |mechanism: &E::Mechanism, x: E::Input<'_, f32>| mechanism.reference_on(x, &mechanism.select(x)?);
        self.0.on_unit_values(on_own)
    }
}

/// The mechanisms, family by family.
pub static ENTRIES: &[Entry] = &[
    Entry::weighing::<DenseExhibit>(),
    Entry::weighing::<dense::CausalExhibit>(),
    Entry::weighing::<dense::WindowExhibit>(),
    Entry::weighing::<dense::PrefixExhibit>(),
    Entry::weighing::<dense::DocumentsExhibit>(),
    Entry::weighing::<dense::TreeExhibit>(),
    Entry::weighing::<dense::AlibiExhibit>(),
    Entry::weighing::<dense::ForgettingExhibit>(),
    Entry::weighing::<dense::SoftcapExhibit>(),
    Entry::weighing::<dense::SinksExhibit>(),
    Entry::weighing::<dense::RelativeExhibit>(),
    dense::CLOSURES,
    Entry::weighing::<SigmoidExhibit>(),
    Entry::weighing::<SelectiveExhibit>(),
    Entry::linear::<SageExhibit>(),
    Entry::weighing::<GatedExhibit>(),
    Entry::linear::<DifferentialExhibit>(),
    Entry::mapping::<ShawExhibit>(),
    Entry::linear::<MusicExhibit>(),
    Entry::linear::<TransformerXlExhibit>(),
    Entry::linear::<MohExhibit>(),
    Entry::linear::<BamExhibit>(),
    Entry::linear::<PathExhibit>(),
    Entry::linear::<TokenFormerExhibit>(),
    Entry::mapping::<PAdapterExhibit>(),
    Entry::linear::<ActExhibit>(),
    Entry::linear::<VarExhibit>(),
    Entry::linear::<AdditiveExhibit>(),
    Entry::mapping::<AttnResExhibit>(),
    Entry::selecting::<DareExhibit>(),
    Entry::linear::<PillExhibit>(),
    Entry::mapping::<RcmhaExhibit>(),
    Entry::weighing::<ZeroTuningExhibit>(),
    Entry::weighing::<PaintExhibit>(),
    Entry::weighing::<VhrExhibit>(),
    Entry::weighing::<KeyMaskExhibit>(),
    Entry::linear::<GuidanceExhibit>(),
    Entry::mapping::<AugmentedExhibit>(),
    Entry::mapping::<VideoBoothExhibit>(),
    Entry::mapping::<KeyLockExhibit>(),
    Entry::mapping::<AdversarialExhibit>(),
    Entry::weighing::<BlockSparseExhibit>(),
    Entry::selecting::<TopKExhibit>(),
    Entry::selecting::<QuestExhibit>(),
    Entry::selecting::<MobaExhibit>(),
    Entry::selecting::<RecycledExhibit>(),
    Entry::selecting::<RetrievalExhibit>(),
    Entry::selecting::<SqueezedExhibit>(),
    Entry::selecting::<TidalExhibit>(),
    Entry::selecting::<TksaExhibit>(),
    Entry::selecting::<TokenSelectExhibit>(),
    Entry::selecting::<S2Exhibit>(),
    Entry::selecting::<MoAExhibit>(),
    Entry::selecting::<LongLoraExhibit>(),
    Entry::selecting::<SlidingTileExhibit>(),
    Entry::selecting::<RadialExhibit>(),
    Entry::selecting::<BiFormerExhibit>(),
    Entry::selecting::<LandmarkExhibit>(),
    Entry::selecting::<HcamExhibit>(),
    Entry::selecting::<BottleneckExhibit>(),
    Entry::linear::<CcaExhibit>(),
    Entry::linear::<CombinerExhibit>(),
    Entry::selecting::<SeerExhibit>(),
    Entry::selecting::<SeerRExhibit>(),
    Entry::selecting::<FlexPrefillExhibit>(),
    Entry::selecting::<DynamicMaskExhibit>(),
    Entry::selecting::<HipExhibit>(),
    Entry::selecting::<SparsifinerExhibit>(),
    Entry::selecting::<DsaExhibit>(),
    Entry::selecting::<MsaExhibit>(),
    Entry::selecting::<InfLlmExhibit>(),
    Entry::summing::<NsaExhibit>(),
    Entry::selecting::<QsaExhibit>(),
    Entry::selecting::<SaleExhibit>(),
    Entry::summing::<HyperExhibit>(),
    Entry::summing::<CausalHyperExhibit>(),
    Entry::summing::<RoutingExhibit>(),
    Entry::summing::<SeaExhibit>(),
    Entry::summing::<CausalSeaExhibit>(),
    Entry::summing::<LongHeadsExhibit>(),
    Entry::picking::<CsaExhibit>(),
    Entry::picking::<HcaExhibit>(),
    Entry::weighing::<NeighborhoodExhibit>(),
    Entry::weighing::<AdditionalExhibit>(),
    Entry::weighing::<PackedExhibit>(),
    Entry::weighing::<PaddedExhibit>(),
    Entry::weighing::<SwinExhibit>(),
    Entry::linear::<HaloNetExhibit>(),
    Entry::linear::<OverlappingExhibit>(),
    Entry::linear::<ClearExhibit>(),
    Entry::linear::<HiLoExhibit>(),
    Entry::mapping::<CompressedExhibit>(),
    Entry::linear::<ShVitExhibit>(),
    Entry::weighing::<FitExhibit>(),
    Entry::linear::<ReversedExhibit>(),
    Entry::mapping::<CascadedExhibit>(),
    Entry::mapping::<GaamExhibit>(),
    Entry::mapping::<ElaExhibit>(),
    Entry::mapping::<UlsamExhibit>(),
    Entry::mapping::<SentenceExhibit>(),
    Entry::mapping::<DavitExhibit>(),
    Entry::mapping::<ChannelAttentionExhibit>(),
    Entry::linear::<MhdlsaExhibit>(),
    Entry::mapping::<MetaMixerExhibit>(),
    Entry::linear::<TransNextExhibit>(),
    Entry::linear::<VsaExhibit>(),
    Entry::weighing::<MlaExhibit>(),
    Entry::weighing::<ProbingExhibit>(),
    Entry::mapping::<AbMilpExhibit>(),
    Entry::mapping::<SimPoolExhibit>(),
    Entry::mapping::<PerceiverExhibit>(),
    Entry::mapping::<MultiLayerExhibit>(),
    Entry::mapping::<NvEmbedExhibit>(),
    Entry::linear::<LightningExhibit>(),
    Entry::linear::<LinearExhibit>(),
    Entry::linear::<CausalLinearExhibit>(),
    Entry::linear::<RetNetExhibit>(),
    Entry::linear::<SimpleGlaExhibit>(),
    Entry::linear::<GlaExhibit>(),
    Entry::linear::<Mamba2Exhibit>(),
    Entry::linear::<Mamba3Exhibit>(),
    Entry::linear::<Mamba3MimoExhibit>(),
    Entry::linear::<Hgrn2Exhibit>(),
    Entry::linear::<Rwkv6Exhibit>(),
    Entry::linear::<DeltaNetExhibit>(),
    Entry::linear::<GatedDeltaNetExhibit>(),
    Entry::linear::<KdaExhibit>(),
    Entry::linear::<GatedDeltaNet2Exhibit>(),
    Entry::linear::<DeltaProductExhibit>(),
    Entry::linear::<GatedSlotExhibit>(),
    Entry::linear::<LogLinearExhibit>(),
    Entry::linear::<MesaNetExhibit>(),
    Entry::linear::<CombaExhibit>(),
    Entry::linear::<Rwkv7Exhibit>(),
    Entry::linear::<S6Exhibit>(),
    Entry::linear::<TitansExhibit>(),
    Entry::mapping::<TitansMlpExhibit>(),
    Entry::mapping::<MonetaExhibit>(),
    Entry::mapping::<YaadExhibit>(),
    Entry::mapping::<MemoraExhibit>(),
    Entry::linear::<PerformerExhibit>(),
    Entry::linear::<CausalPerformerExhibit>(),
    Entry::linear::<BasedExhibit>(),
    Entry::linear::<AgentExhibit>(),
    Entry::linear::<EcoFormerExhibit>(),
    Entry::linear::<FlowformerExhibit>(),
    Entry::linear::<CausalFlowformerExhibit>(),
    Entry::linear::<AarenExhibit>(),
    random_features::ENTRY,
];
