//! Every mechanism of the crate, one entry each.
//!
//! Tests, benches and examples walk [`ENTRIES`]: a mechanism that is listed
//! gets every general test for free. An entry makes a [`Trial`] of its
//! mechanism from queries, keys and values; what else the mechanism needs
//! (temperatures, tables, documents) is made from a seed.

use half::{bf16, f16};
use ndarray::{Array3, Array4, ArrayViewMut4};

use crate::attention::{Attention, Bounded, Cost, Input, Selects, Weights};
use crate::card::{Card, Exhibit, Extras, Field};
use crate::dense::{
    differential::DifferentialExhibit, gated::GatedExhibit, selective::SelectiveExhibit,
    sigmoid::SigmoidExhibit, softmax::DenseExhibit,
};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::latent::{mla::MlaExhibit, probing::ProbingExhibit};
use crate::linear::exhibits::*;
use crate::neighborhood::exhibits::*;
use crate::simd::Isa;
use crate::sparse::exhibits::*;

mod dense;
mod random_features;
#[cfg(test)]
mod recurrent;

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

    /// A mechanism that shows its weights.
    const fn weighing<E: Exhibit>() -> Self
    where
        E::Mechanism: for<'a> Shows<E::Input<'a, f32>>
            + for<'a> Shows<E::Input<'a, f16>>
            + for<'a> Shows<E::Input<'a, bf16>>,
    {
        Self {
            card: E::CARD,
            tokens: E::TOKENS,
            selects: false,
            weighs: true,
            make_f32: weighing::<f32, E>,
            make_f16: weighing::<f16, E>,
            make_bf16: weighing::<bf16, E>,
        }
    }

    /// A mechanism that is linear in the values, so that values which are unit
    /// vectors show its weights.
    const fn linear<E: Exhibit>() -> Self
    where
        E::Mechanism: for<'a> Bounded<E::Input<'a, f32>>
            + for<'a> Bounded<E::Input<'a, f16>>
            + for<'a> Bounded<E::Input<'a, bf16>>,
    {
        Self {
            card: E::CARD,
            tokens: E::TOKENS,
            selects: false,
            weighs: true,
            make_f32: linear::<f32, E>,
            make_f16: linear::<f16, E>,
            make_bf16: linear::<bf16, E>,
        }
    }

    /// A mechanism that has no weights of tokens for tokens.
    const fn mapping<E: Exhibit>() -> Self
    where
        E::Mechanism: for<'a> Bounded<E::Input<'a, f32>>
            + for<'a> Bounded<E::Input<'a, f16>>
            + for<'a> Bounded<E::Input<'a, bf16>>,
    {
        Self {
            card: E::CARD,
            tokens: E::TOKENS,
            selects: false,
            weighs: false,
            make_f32: mapping::<f32, E>,
            make_f16: mapping::<f16, E>,
            make_bf16: mapping::<bf16, E>,
        }
    }

    /// A mechanism that selects keys.
    const fn selecting<E: Exhibit>() -> Self
    where
        E::Mechanism: for<'a> Chooses<E::Input<'a, f32>>
            + for<'a> Chooses<E::Input<'a, f16>>
            + for<'a> Chooses<E::Input<'a, bf16>>,
    {
        Self {
            card: E::CARD,
            tokens: E::TOKENS,
            selects: true,
            weighs: true,
            make_f32: selecting::<f32, E>,
            make_f16: selecting::<f16, E>,
            make_bf16: selecting::<bf16, E>,
        }
    }
}

impl Entry {
    /// A mechanism that selects keys which are its values, so that it has no
    /// weights of tokens for tokens.
    const fn picking<E: Exhibit>() -> Self
    where
        E::Mechanism: for<'a> Selects<E::Input<'a, f32>>
            + for<'a> Selects<E::Input<'a, f16>>
            + for<'a> Selects<E::Input<'a, bf16>>,
    {
        Self {
            card: E::CARD,
            tokens: E::TOKENS,
            selects: true,
            weighs: false,
            make_f32: picking::<f32, E>,
            make_f16: picking::<f16, E>,
            make_bf16: picking::<bf16, E>,
        }
    }

    /// A mechanism that selects keys and is linear in the values, so that values
    /// which are unit vectors show its weights.
    const fn summing<E: Exhibit>() -> Self
    where
        E::Mechanism: for<'a> Selects<E::Input<'a, f32>>
            + for<'a> Selects<E::Input<'a, f16>>
            + for<'a> Selects<E::Input<'a, bf16>>,
    {
        Self {
            card: E::CARD,
            tokens: E::TOKENS,
            selects: true,
            weighs: true,
            make_f32: summing::<f32, E>,
            make_f16: summing::<f16, E>,
            make_bf16: summing::<bf16, E>,
        }
    }
}

/// What a trial of a mechanism that selects needs.
pub(crate) trait Chooses<X: Input>: Selects<X> + Weights<X> {}
impl<X: Input, M: Selects<X> + Weights<X>> Chooses<X> for M {}

/// What a trial of a mechanism with weights needs.
pub(crate) trait Shows<X: Input>: Bounded<X> + Weights<X> {}
impl<X: Input, M: Bounded<X> + Weights<X>> Shows<X> for M {}

/// Arrays of an exhibit.
struct Stand<'a, T> {
    x: Qkv<'a, T>,
    extras: Extras<T>,
}

fn weighing<'a, T: Element, E: Exhibit>(
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    seed: u64,
) -> Result<Box<dyn Trial<T> + 'a>>
where
    E::Mechanism: for<'b> Shows<E::Input<'b, T>>,
{
    let field = Field::of::<T>(seed);
    let mechanism = E::build(&x, isa, &field)?;
    let stand = Stand { extras: E::extras(&x, &field), x };
    Ok(Box::new(Weighing::<T, E> { mechanism, stand }))
}

struct Weighing<'a, T: Element, E: Exhibit> {
    mechanism: E::Mechanism,
    stand: Stand<'a, T>,
}

fn linear<'a, T: Element, E: Exhibit>(
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    seed: u64,
) -> Result<Box<dyn Trial<T> + 'a>>
where
    E::Mechanism: for<'b> Bounded<E::Input<'b, T>> + for<'b> Bounded<E::Input<'b, f32>>,
{
    let field = Field::of::<T>(seed);
    let mechanism = E::build(&x, isa, &field)?;
    let stand = Stand { extras: E::extras(&x, &field), x };
    Ok(Box::new(Linear::<T, E> { mechanism, stand, isa, seed }))
}

struct Linear<'a, T: Element, E: Exhibit> {
    mechanism: E::Mechanism,
    stand: Stand<'a, T>,
    isa: Option<Isa>,
    seed: u64,
}

/// Calls `run` with a mechanism and an input whose values are a unit vector for
/// each key, in `f32`: its outputs are weights.
fn on_unit_values<T: Element, E: Exhibit, R>(
    (x, isa, seed): (&Qkv<'_, T>, Option<Isa>, u64),
    run: impl FnOnce(&E::Mechanism, E::Input<'_, f32>) -> Result<R>,
) -> Result<R> {
    let (q, k) = (x.q.mapv(Element::to_f32), x.k.mapv(Element::to_f32));
    let (batch, heads, len, _) = x.v.dim();
    let v = Array4::from_shape_fn((batch, heads, len, len), |(_, _, j, c)| f32::from(j == c));
    let x = Qkv::new(q.view(), k.view(), v.view());
    let field = Field::of::<T>(seed);
    let mechanism = E::build(&x, isa, &field)?;
    let extras = E::extras(&x, &field);
    run(&mechanism, E::input(x, &extras))
}

fn summing<'a, T: Element, E: Exhibit>(
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    seed: u64,
) -> Result<Box<dyn Trial<T> + 'a>>
where
    E::Mechanism: for<'b> Selects<E::Input<'b, T>> + for<'b> Selects<E::Input<'b, f32>>,
{
    let field = Field::of::<T>(seed);
    let mechanism = E::build(&x, isa, &field)?;
    let stand = Stand { extras: E::extras(&x, &field), x };
    Ok(Box::new(Summing::<T, E> { mechanism, stand, isa, seed }))
}

struct Summing<'a, T: Element, E: Exhibit> {
    mechanism: E::Mechanism,
    stand: Stand<'a, T>,
    isa: Option<Isa>,
    seed: u64,
}

impl<T: Element, E: Exhibit> Summing<'_, T, E> {
    fn input(&self) -> E::Input<'_, T> {
        E::input(self.stand.x.reborrow(), &self.stand.extras)
    }
}

fn mapping<'a, T: Element, E: Exhibit>(
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    seed: u64,
) -> Result<Box<dyn Trial<T> + 'a>>
where
    E::Mechanism: for<'b> Bounded<E::Input<'b, T>>,
{
    let field = Field::of::<T>(seed);
    let mechanism = E::build(&x, isa, &field)?;
    let stand = Stand { extras: E::extras(&x, &field), x };
    Ok(Box::new(Mapping::<T, E> { mechanism, stand }))
}

struct Mapping<'a, T: Element, E: Exhibit> {
    mechanism: E::Mechanism,
    stand: Stand<'a, T>,
}

fn picking<'a, T: Element, E: Exhibit>(
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    seed: u64,
) -> Result<Box<dyn Trial<T> + 'a>>
where
    E::Mechanism: for<'b> Selects<E::Input<'b, T>>,
{
    let field = Field::of::<T>(seed);
    let mechanism = E::build(&x, isa, &field)?;
    let stand = Stand { extras: E::extras(&x, &field), x };
    Ok(Box::new(Picking::<T, E> { mechanism, stand }))
}

struct Picking<'a, T: Element, E: Exhibit> {
    mechanism: E::Mechanism,
    stand: Stand<'a, T>,
}

impl<T: Element, E: Exhibit> Picking<'_, T, E> {
    fn input(&self) -> E::Input<'_, T> {
        E::input(self.stand.x.reborrow(), &self.stand.extras)
    }
}

#[cold]
fn weightless<E: Exhibit>() -> Error {
    Error::value("weights", "a mechanism that has weights of tokens for tokens", E::CARD.name)
}

fn selecting<'a, T: Element, E: Exhibit>(
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    seed: u64,
) -> Result<Box<dyn Trial<T> + 'a>>
where
    E::Mechanism: for<'b> Chooses<E::Input<'b, T>>,
{
    let field = Field::of::<T>(seed);
    let mechanism = E::build(&x, isa, &field)?;
    let stand = Stand { extras: E::extras(&x, &field), x };
    Ok(Box::new(Selecting::<T, E> { mechanism, stand }))
}

struct Selecting<'a, T: Element, E: Exhibit> {
    mechanism: E::Mechanism,
    stand: Stand<'a, T>,
}

impl<T: Element, E: Exhibit> Selecting<'_, T, E> {
    fn input(&self) -> E::Input<'_, T> {
        E::input(self.stand.x.reborrow(), &self.stand.extras)
    }
}

/// [`Trial`]'s methods that every mechanism has, on the input that an
/// expression gives.
macro_rules! common {
    ($self:ident, $input:expr) => {
        fn forward_into(&$self, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()> {
            $self.mechanism.forward_into($input, out, workspace)
        }
        fn workspace_bytes(&$self) -> Result<usize> {
            $self.mechanism.workspace_bytes($input)
        }
        fn reference(&$self) -> Result<Array4<f64>> {
            $self.mechanism.reference($input)
        }
        fn error_bound(&$self) -> Result<Array3<f64>> {
            $self.mechanism.error_bound($input)
        }
        fn cost(&$self) -> Result<Cost> {
            $self.mechanism.cost($input)
        }
    };
}
pub(crate) use common;

impl<T: Element, E: Exhibit> Trial<T> for Weighing<'_, T, E>
where
    E::Mechanism: for<'b> Shows<E::Input<'b, T>>,
{
    common!(self, E::input(self.stand.x.reborrow(), &self.stand.extras));

    fn weights(&self) -> Result<Array4<f32>> {
        self.mechanism.weights(E::input(self.stand.x.reborrow(), &self.stand.extras))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.mechanism.reference_weights(E::input(self.stand.x.reborrow(), &self.stand.extras))
    }
}

impl<T: Element, E: Exhibit> Trial<T> for Linear<'_, T, E>
where
    E::Mechanism: for<'b> Bounded<E::Input<'b, T>> + for<'b> Bounded<E::Input<'b, f32>>,
{
    common!(self, E::input(self.stand.x.reborrow(), &self.stand.extras));

    fn weights(&self) -> Result<Array4<f32>> {
        on_unit_values::<T, E, _>((&self.stand.x, self.isa, self.seed), |mechanism, x| mechanism.forward(x))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        on_unit_values::<T, E, _>((&self.stand.x, self.isa, self.seed), |mechanism, x| mechanism.reference(x))
    }
}

impl<T: Element, E: Exhibit> Trial<T> for Mapping<'_, T, E>
where
    E::Mechanism: for<'b> Bounded<E::Input<'b, T>>,
{
    common!(self, E::input(self.stand.x.reborrow(), &self.stand.extras));

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
        $self.mechanism.forward_into($self.input(), out, workspace)
    }
    fn workspace_bytes(&$self) -> Result<usize> {
        $self.mechanism.workspace_bytes($self.input())
    }
    fn reference(&$self) -> Result<Array4<f64>> {
        $self.mechanism.reference_on($self.input(), &$self.mechanism.select($self.input())?)
    }
    fn error_bound(&$self) -> Result<Array3<f64>> {
        $self.mechanism.bound_on($self.input(), &$self.mechanism.select($self.input())?)
    }
    fn cost(&$self) -> Result<Cost> {
        $self.mechanism.cost($self.input())
    }
    fn selection_error(&$self) -> Result<Option<String>> {
        let (want, margins) = $self.mechanism.reference_select($self.input())?;
        let got = $self.mechanism.select($self.input())?;
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
        self.mechanism.weights(self.input())
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        // Values that are a unit vector for each key: outputs are weights.
        let (batch, heads, len, _) = self.stand.x.v.dim();
        let one = |(_, _, j, c): (usize, usize, usize, usize)| T::from_f32(f32::from(j == c));
        let v = Array4::from_shape_fn((batch, heads, len, len), one);
        let x = E::input(Qkv { v: v.view(), ..self.stand.x.reborrow() }, &self.stand.extras);
        // Chosen by the values that there are, if by any.
        self.mechanism.reference_on(x, &self.mechanism.select(self.input())?)
    }
}

impl<T: Element, E: Exhibit> Trial<T> for Summing<'_, T, E>
where
    E::Mechanism: for<'b> Selects<E::Input<'b, T>> + for<'b> Selects<E::Input<'b, f32>>,
{
    on_own_selection!(self);

    fn weights(&self) -> Result<Array4<f32>> {
        on_unit_values::<T, E, _>((&self.stand.x, self.isa, self.seed), |mechanism, x| mechanism.forward(x))
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        let on_own =
            |mechanism: &E::Mechanism, x: E::Input<'_, f32>| mechanism.reference_on(x, &mechanism.select(x)?);
        on_unit_values::<T, E, _>((&self.stand.x, self.isa, self.seed), on_own)
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
    Entry::weighing::<GatedExhibit>(),
    Entry::linear::<DifferentialExhibit>(),
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
    Entry::picking::<CsaExhibit>(),
    Entry::picking::<HcaExhibit>(),
    Entry::weighing::<NeighborhoodExhibit>(),
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
    Entry::linear::<TransNextExhibit>(),
    Entry::linear::<VsaExhibit>(),
    Entry::weighing::<MlaExhibit>(),
    Entry::weighing::<ProbingExhibit>(),
    Entry::linear::<LightningExhibit>(),
    Entry::linear::<LinearExhibit>(),
    Entry::linear::<CausalLinearExhibit>(),
    Entry::linear::<RetNetExhibit>(),
    Entry::linear::<SimpleGlaExhibit>(),
    Entry::linear::<GlaExhibit>(),
    Entry::linear::<Mamba2Exhibit>(),
    Entry::linear::<Hgrn2Exhibit>(),
    Entry::linear::<Rwkv6Exhibit>(),
    Entry::linear::<DeltaNetExhibit>(),
    Entry::linear::<GatedDeltaNetExhibit>(),
    Entry::linear::<KdaExhibit>(),
    Entry::linear::<GatedDeltaNet2Exhibit>(),
    Entry::linear::<DeltaProductExhibit>(),
    Entry::linear::<GatedSlotExhibit>(),
    Entry::linear::<CombaExhibit>(),
    Entry::linear::<Rwkv7Exhibit>(),
    Entry::linear::<S6Exhibit>(),
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
