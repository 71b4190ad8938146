//! The standard shapes: what speed is measured on, by the roofline and by the
//! benches.

use std::sync::{Mutex, PoisonError};

use attention_kernels::Workspace;
use attention_kernels::attention::{Attention, Backward, Cost, Mergeable};
use attention_kernels::catalog::{ENTRIES, Entry};
use attention_kernels::dense::{Dense, DenseBuilder, SavedForward};
use attention_kernels::element::{DType, Element};
use attention_kernels::error::Result;
use attention_kernels::input::Qkv;
use attention_kernels::mask::Mask;
use attention_kernels::score::Score;
use attention_kernels::simd::Isa;
use ndarray::{Array4, ArrayViewMut4};

#[path = "families.rs"]
#[allow(dead_code)]
pub mod families;
#[path = "noise.rs"]
mod noise;
#[path = "stored.rs"]
#[allow(dead_code)]
pub mod stored;
use families::{FAMILIES, LISTED};
use noise::noise;
use stored::STORED;

/// What a shape does beyond its sizes.
#[derive(Clone, Copy, Debug)]
pub enum Variant {
    /// Every key.
    Full,
    /// Keys at the query's position and before.
    Causal,
    /// The same, said by a closure of the caller's.
    CausalClosure,
    /// Causal, and only this many keys before the query.
    Window(usize),
    /// Causal with ALiBi, whose penalty runs up to this.
    Alibi(f32),
    /// Every key, with a bias that runs from 0 down to minus this.
    Bias(f32),
    /// The gradients of causal attention, output and LSE being known.
    CausalBackward,
    /// One token of Lightning Attention, for states that are in no cache.
    LightningStep,
    /// One token of Gated DeltaNet, likewise.
    GatedDeltaStep,
    /// Neighborhood attention, not causal: extents and window.
    Near(&'static [usize], &'static [usize]),
    /// Another sparse or neighborhood mechanism.
    Family(families::Make),
    /// Over a cache, or over latents: the shape's keys and values fill it, or are
    /// not read.
    Stored(families::Make),
    /// A list of [`LISTED`](families::LISTED) keys for each key/value head.
    Listed,
    /// This entry of the catalogue.
    Entry(usize),
}

/// A shape.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub name: &'static str,
    pub variant: Variant,
    pub dtype: DType,
    pub batch: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    /// Of keys and of values.
    pub head_dim: usize,
    /// The shape whose time for each useful flop this one should match.
    pub against: Option<&'static str>,
}

/// The sizes in order: batch, query heads, key/value heads, queries, keys,
/// head dimension.
const fn shape(name: &'static str, variant: Variant, dtype: DType, sizes: [usize; 6]) -> Shape {
    let [batch, q_heads, kv_heads, q_len, kv_len, head_dim] = sizes;
    Shape { name, variant, dtype, batch, q_heads, kv_heads, q_len, kv_len, head_dim, against: None }
}

const fn against(of: &'static str, shape: Shape) -> Shape {
    Shape { against: Some(of), ..shape }
}

const PREFILL: &str = "prefill-4k-d128-f32";
const CAUSAL: &str = "causal-4k-d128-f32";
const BACKWARD: &str = "backward-causal-4k-d128-f32";

/// The standard shapes.
#[rustfmt::skip]
pub const SHAPES: &[Shape] = {
    use DType::{Bf16, F16, F32};
    use Variant::{Alibi, Bias, Causal, CausalBackward, CausalClosure, Full, GatedDeltaStep, LightningStep, Window};
    &[
        shape("prefill-2k-d64-f32",       Full,   F32,  [1,  8,  8, 2048,  2048,  64]),
        shape(PREFILL,                    Full,   F32,  [1,  8,  8, 4096,  4096, 128]),
        shape(CAUSAL,                     Causal, F32,  [1,  8,  8, 4096,  4096, 128]),
        shape("causal-4k-d64-f32",        Causal, F32,  [1,  8,  8, 4096,  4096,  64]),
        shape("gqa-causal-2k-d128-f32",   Causal, F32,  [1, 32,  8, 2048,  2048, 128]),
        shape("vit-196-d64-f32",          Full,   F32,  [8, 12, 12,  196,   196,  64]),
        shape("short-128-d64-f32",        Full,   F32,  [8, 12, 12,  128,   128,  64]),
        shape("causal-4k-d128-bf16",      Causal, Bf16, [1,  8,  8, 4096,  4096, 128]),
        shape("causal-4k-d128-f16",       Causal, F16,  [1,  8,  8, 4096,  4096, 128]),
        shape("decode-gqa-16k-d128-f32",  Full,   F32,  [1, 32,  8,    1, 16384, 128]),
        shape("decode-gqa-16k-d128-bf16", Full,   Bf16, [1, 32,  8,    1, 16384, 128]),
        shape("decode-gqa-16k-d128-f16",  Full,   F16,  [1, 32,  8,    1, 16384, 128]),
        shape("decode-mha-8x4k-d64-f32",  Full,   F32,  [8, 16, 16,    1,  4096,  64]),
        shape(BACKWARD, CausalBackward, F32, [1, 8, 8, 4096, 4096, 128]),
        against(BACKWARD, shape("backward-causal-4k-d128-f16", CausalBackward, F16, [1, 8, 8, 4096, 4096, 128])),
        against(BACKWARD, shape("backward-causal-4k-d128-bf16", CausalBackward, Bf16, [1, 8, 8, 4096, 4096, 128])),
        against(PREFILL, shape("window-512-16k-d128-f32", Window(512),   F32, [1, 8, 8, 16384, 16384, 128])),
        against(CAUSAL,  shape("closure-4k-d128-f32",     CausalClosure, F32, [1, 8, 8,  4096,  4096, 128])),
        against(CAUSAL,  shape("alibi-400-4k-d128-f32",   Alibi(400.0),  F32, [1, 8, 8,  4096,  4096, 128])),
        against(PREFILL, shape("bias-400-4k-d128-f32",    Bias(400.0),   F32, [1, 8, 8,  4096,  4096, 128])),
        shape("lightning-step-d128-f32",   LightningStep,  F32, [768, 16, 16, 1, 1, 128]),
        shape("gated-delta-step-d128-f32", GatedDeltaStep, F32, [768, 16, 16, 1, 1, 128]),
    ]
};

/// A shape for each entry of the catalogue: that of the long prefills; with 16
/// heads for linear attention.
#[allow(dead_code)]
pub fn entries() -> impl Iterator<Item = Shape> {
    let of_entry = |(i, entry): (usize, &Entry)| {
        let heads = if entry.card.family == "linear" { 16 } else { 8 };
        shape(entry.card.name, Variant::Entry(i), DType::F32, [1, heads, heads, 4096, 4096, 128])
    };
    ENTRIES.iter().enumerate().map(of_entry)
}

/// The shape of that name.
#[allow(dead_code)]
pub fn named(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().chain(FAMILIES).chain(STORED).find(|shape| shape.name == name)
}

/// A kernel, built.
pub type Forward<'a, T> = Box<dyn Fn(Qkv<'_, T>, ArrayViewMut4<'_, T>, &mut Workspace) -> Result<()> + 'a>;

impl Shape {
    /// Whether it has every key or the causal ones, and scores as they are.
    #[allow(dead_code)]
    pub fn is_plain(&self) -> bool {
        matches!(self.variant, Variant::Full | Variant::Causal)
    }

    /// Whether a state is read and written, so that memory is what limits.
    pub fn is_step(&self) -> bool {
        matches!(self.variant, Variant::LightningStep | Variant::GatedDeltaStep)
    }

    /// Whether few queries read many keys, so that memory is what limits.
    pub fn is_decode(&self) -> bool {
        // What chooses keys reads few of them.
        let chooses = matches!(self.variant, Variant::Family(_) | Variant::Near(..));
        !self.is_step() && !chooses && self.q_len * (self.q_heads / self.kv_heads) <= 16
    }

    /// Bytes of the keys and values; of the state, read and written, of a step.
    #[allow(dead_code)]
    pub fn kv_bytes(&self) -> usize {
        let size = if self.dtype == DType::F32 { 4 } else { 2 };
        if self.is_step() {
            return 2 * size * self.batch * self.q_heads * self.head_dim * self.head_dim;
        }
        let keys = if matches!(self.variant, Variant::Listed) { LISTED } else { self.kv_len };
        2 * size * self.batch * self.kv_heads * keys * self.head_dim
    }

    /// The shape of the queries and of the output.
    pub fn q_dim(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.q_heads, self.q_len, self.head_dim)
    }

    /// The shape of the keys and of the values.
    pub fn kv_dim(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.kv_heads, self.kv_len, self.head_dim)
    }

    /// Normal queries, keys and values.
    pub fn qkv<T: Element>(&self) -> [Array4<T>; 3] {
        let mut noise = noise(1);
        [self.q_dim(), self.kv_dim(), self.kv_dim()]
            .map(|dim| Array4::from_shape_simple_fn(dim, || T::from_f32(noise())))
    }
}

/// The kernel of a shape that [is plain](Shape::is_plain), and what a call
/// costs.
#[allow(dead_code)]
pub fn plain<'a, T: Element>(shape: &Shape, isa: Isa, x: Qkv<'_, T>) -> Result<(Forward<'a, T>, Cost)> {
    let dense = Dense::builder().isa(isa);
    if matches!(shape.variant, Variant::Causal) { built(dense.causal(), x) } else { built(dense, x) }
}

/// The gradients of causal attention, which are kept: the output is not written.
#[allow(dead_code)]
pub fn backward<'a, T: Element>(isa: Isa, x: Qkv<'_, T>) -> Result<(Forward<'a, T>, Cost)> {
    let dense = Dense::builder().isa(isa).causal().build()?;
    let Cost { flops, bytes } = dense.cost(x.reborrow())?;
    // Five products of a pair of tokens, two of them in the forward pass.
    let cost = Cost { flops: flops / 2 * 5, bytes: 2 * bytes };
    let (out, lse) = dense.forward_with_lse(x.reborrow().widened())?;
    let gradients = Mutex::new(dense.zero_gradients(x.reborrow())?);
    let forward = move |x: Qkv<'_, T>, _: ArrayViewMut4<'_, T>, workspace: &mut Workspace| {
        let saved = SavedForward { softmax: Some((out.view(), lse.view())) };
        let mut gradients = gradients.lock().unwrap_or_else(PoisonError::into_inner);
        dense.backward_into(x.reborrow(), out.view(), saved, &mut gradients, workspace)
    };
    Ok((Box::new(forward), cost))
}

/// The kernel of a builder, and what a call costs.
pub fn built<'a, T: Element, M: Mask + 'a, F: Score + 'a>(
    builder: DenseBuilder<M, F>,
    x: Qkv<'_, T>,
) -> Result<(Forward<'a, T>, Cost)> {
    let dense = builder.build()?;
    let cost = dense.cost(x.reborrow())?;
    Ok((Box::new(move |x, out, workspace| dense.forward_into(x.reborrow(), out, workspace)), cost))
}
