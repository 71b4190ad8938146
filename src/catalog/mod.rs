//! Every mechanism of the crate, one entry each.
//!
//! Tests, benches and examples walk [`ENTRIES`]: a mechanism that is listed
//! gets every general test for free. An entry makes a [`Trial`] of its
//! mechanism from queries, keys and values; what else the mechanism needs
//! (temperatures, tables, documents) is made from a seed.

use half::{bf16, f16};
use ndarray::{Array3, Array4, ArrayViewMut4};

use crate::attention::Cost;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::simd::Isa;

mod dense;
mod linear;

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
}

type Make<T> = for<'a> fn(Qkv<'a, T>, Option<Isa>, u64) -> Result<Box<dyn Trial<T> + 'a>>;

/// A mechanism.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Its name.
    pub name: &'static str,
    /// The module that it lives in.
    pub family: &'static str,
    /// Where it was published.
    pub source: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Whether queries and keys are the same tokens, so that there are as many
    /// of the ones as of the others.
    pub tokens: bool,
    make_f32: Make<f32>,
    make_f16: Make<f16>,
    make_bf16: Make<bf16>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("name", &self.name).finish_non_exhaustive()
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

    const fn of<R: Recipe>() -> Self {
        Self {
            name: R::NAME,
            family: R::FAMILY,
            source: R::SOURCE,
            summary: R::SUMMARY,
            tokens: false,
            make_f32: R::trial::<f32>,
            make_f16: R::trial::<f16>,
            make_bf16: R::trial::<bf16>,
        }
    }

    /// A mechanism over tokens.
    const fn of_tokens<R: Recipe>() -> Self {
        Self { tokens: true, ..Self::of::<R>() }
    }
}

/// The mechanisms, family by family.
pub static ENTRIES: &[Entry] = &[
    Entry::of::<dense::Full>(),
    Entry::of::<dense::CausalEntry>(),
    Entry::of::<dense::SlidingWindow>(),
    Entry::of::<dense::PrefixLm>(),
    Entry::of::<dense::DocumentMask>(),
    Entry::of::<dense::TreeMask>(),
    Entry::of::<dense::AlibiEntry>(),
    Entry::of::<dense::SoftcapEntry>(),
    Entry::of::<dense::Sinks>(),
    Entry::of::<dense::RelativePositions>(),
    Entry::of::<dense::Closures>(),
    Entry::of::<dense::SigmoidEntry>(),
    Entry::of::<dense::SelectiveEntry>(),
    Entry::of_tokens::<linear::LightningEntry>(),
    Entry::of::<linear::LinearEntry>(),
    Entry::of_tokens::<linear::CausalLinearEntry>(),
    Entry::of_tokens::<linear::RetNetEntry>(),
    Entry::of_tokens::<linear::SimpleGlaEntry>(),
    Entry::of_tokens::<linear::GlaEntry>(),
    Entry::of_tokens::<linear::Mamba2Entry>(),
    Entry::of_tokens::<linear::Hgrn2Entry>(),
    Entry::of_tokens::<linear::Rwkv6Entry>(),
    Entry::of_tokens::<linear::DeltaNetEntry>(),
    Entry::of_tokens::<linear::GatedDeltaNetEntry>(),
    Entry::of_tokens::<linear::KdaEntry>(),
    Entry::of_tokens::<linear::Rwkv7Entry>(),
    Entry::of_tokens::<linear::S6Entry>(),
    Entry::of::<linear::PerformerEntry>(),
    Entry::of_tokens::<linear::CausalPerformerEntry>(),
    Entry::of_tokens::<linear::BasedEntry>(),
    Entry::of::<linear::AgentEntry>(),
    Entry::of::<linear::EcoFormerEntry>(),
    Entry::of::<linear::FlowformerEntry>(),
    Entry::of_tokens::<linear::CausalFlowformerEntry>(),
    Entry::of_tokens::<linear::AarenEntry>(),
    Entry::of::<linear::RandomFeatureEntry>(),
];

/// What an [`Entry`] is made from.
trait Recipe {
    const NAME: &'static str;
    const FAMILY: &'static str;
    const SOURCE: &'static str;
    const SUMMARY: &'static str;

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>>;
}
