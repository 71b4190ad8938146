//! Entries of dense attention.

use ndarray::{Array2, Array3, Array4, ArrayViewMut4};

use super::{Recipe, Trial};
use crate::attention::{Attention, Cost, Weights};
use crate::dense::{Dense, DenseBuilder, Selective, Sigmoid, Tempered, token_temperature};
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Qkv;
use crate::mask::{Causal, Documents, Mask, Prefix, Tree, Window, mask_fn};
use crate::score::{Alibi, RelativeTable, Score, Softcap, score_fn};
use crate::simd::Isa;

/// A mechanism over queries, keys and values alone.
struct OnQkv<'a, T, A> {
    mechanism: A,
    x: Qkv<'a, T>,
}

impl<T: Element, A> Trial<T> for OnQkv<'_, T, A>
where
    A: for<'b> Attention<T, Input<'b> = Qkv<'b, T>> + Weights<T> + 'static,
{
    fn forward_into(&self, out: ArrayViewMut4<'_, T>, workspace: &mut Workspace) -> Result<()> {
        self.mechanism.forward_into(self.x.reborrow(), out, workspace)
    }
    fn workspace_bytes(&self) -> Result<usize> {
        self.mechanism.workspace_bytes(self.x.reborrow())
    }
    fn reference(&self) -> Result<Array4<f64>> {
        self.mechanism.reference(self.x.reborrow())
    }
    fn error_bound(&self) -> Result<Array3<f64>> {
        self.mechanism.error_bound(self.x.reborrow())
    }
    fn weights(&self) -> Result<Array4<f32>> {
        self.mechanism.weights(self.x.reborrow())
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.mechanism.reference_weights(self.x.reborrow())
    }
    fn cost(&self) -> Result<Cost> {
        self.mechanism.cost(self.x.reborrow())
    }
}

fn dense<'a, T, M, F>(
    x: Qkv<'a, T>,
    isa: Option<Isa>,
    builder: DenseBuilder<M, F>,
) -> Result<Box<dyn Trial<T> + 'a>>
where
    T: Element,
    M: Mask + 'static,
    F: Score + 'static,
{
    let builder = match isa {
        Some(isa) => builder.isa(isa),
        None => builder,
    };
    Ok(Box::new(OnQkv { mechanism: builder.build()?, x }))
}

/// Numbers in -1..1 from a seed (SplitMix64).
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

pub(super) struct Full;
impl Recipe for Full {
    const NAME: &'static str = "dense";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 1706.03762, 2305.13245";
    const SUMMARY: &'static str = "scaled dot-product attention: multi-head, grouped, multi-query";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        dense(x, isa, Dense::builder())
    }
}

pub(super) struct CausalEntry;
impl Recipe for CausalEntry {
    const NAME: &'static str = "causal";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 1706.03762";
    const SUMMARY: &'static str = "keys at the query's position and before";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        dense(x, isa, Dense::builder().causal())
    }
}

pub(super) struct SlidingWindow;
impl Recipe for SlidingWindow {
    const NAME: &'static str = "sliding window";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2004.05150, 2310.06825";
    const SUMMARY: &'static str = "the last 48 keys before the query";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        dense(x, isa, Dense::builder().mask(Window::new(Some(48), Some(0))))
    }
}

pub(super) struct PrefixLm;
impl Recipe for PrefixLm {
    const NAME: &'static str = "prefix LM";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 1910.10683";
    const SUMMARY: &'static str = "a prefix in both directions, causal after it";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let prefix = x.k.dim().2 / 4;
        dense(x, isa, Dense::builder().mask(Prefix::new(prefix)))
    }
}

pub(super) struct DocumentMask;
impl Recipe for DocumentMask {
    const NAME: &'static str = "documents";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2107.02027";
    const SUMMARY: &'static str = "causal within each of several documents in one sequence";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let (queries, keys) = (x.q.dim().2, x.k.dim().2);
        let mut noise = noise(seed);
        let mut id = 0;
        let mut ids: Vec<u32> = Vec::with_capacity(keys);
        for _ in 0..keys {
            id += u32::from(noise() > 0.97);
            ids.push(id);
        }
        // The last query sits at the last key.
        let of_query = |i: usize| (i + keys).checked_sub(queries).map_or(0, |at| ids[at]);
        let query_ids: Vec<u32> = (0..queries).map(of_query).collect();
        dense(x, isa, Dense::builder().mask(Documents::of(&query_ids, &ids).and(Causal::new())))
    }
}

pub(super) struct TreeMask;
impl Recipe for TreeMask {
    const NAME: &'static str = "tree";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2305.09781, 2401.10774";
    const SUMMARY: &'static str = "a draft tree for speculative decoding: a context and the node's ancestors";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let mut noise = noise(seed);
        let parent =
            |i: usize| i.checked_sub(1).map(|last| last - (last.min(3) as f32 * noise().abs()) as usize);
        let parents: Vec<_> = (0..x.q.dim().2).map(parent).collect();
        dense(x, isa, Dense::builder().mask(Tree::new(&parents)?))
    }
}

pub(super) struct AlibiEntry;
impl Recipe for AlibiEntry {
    const NAME: &'static str = "ALiBi";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2108.12409";
    const SUMMARY: &'static str = "causal, with a penalty that grows with distance at a slope per head";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let heads = x.q.dim().1;
        dense(x, isa, Dense::builder().causal().score(Alibi::new(heads)))
    }
}

pub(super) struct SoftcapEntry;
impl Recipe for SoftcapEntry {
    const NAME: &'static str = "softcap";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2408.00118";
    const SUMMARY: &'static str = "causal, with scores squashed to -5..5 by a tanh";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        dense(x, isa, Dense::builder().causal().score(Softcap::new(5.0)?))
    }
}

pub(super) struct Sinks;
impl Recipe for Sinks {
    const NAME: &'static str = "sinks";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2309.17453, 2508.10925";
    const SUMMARY: &'static str = "causal, with a logit per head that takes weight and has no value";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let mut noise = noise(seed);
        let sinks: Vec<f32> = (0..x.q.dim().1).map(|_| 4.0 * noise()).collect();
        dense(x, isa, Dense::builder().causal().sinks(sinks))
    }
}

pub(super) struct RelativePositions;
impl Recipe for RelativePositions {
    const NAME: &'static str = "relative positions";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 1910.10683, 2103.14030";
    const SUMMARY: &'static str = "a learned bias for each head and distance, clipped at 24";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let mut noise = noise(seed);
        // A table has a row even where there are no heads.
        let table = Array2::from_shape_simple_fn((x.q.dim().1.max(1), 49), || 3.0 * noise());
        dense(x, isa, Dense::builder().score(RelativeTable::new(table)?))
    }
}

pub(super) struct Closures;
impl Recipe for Closures {
    const NAME: &'static str = "closures";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2412.05496";
    const SUMMARY: &'static str = "a mask and a change of scores of the caller's own";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        // Every third key, and a reward for keys at even distances.
        let mask = mask_fn(|_, query, key| (query + key) % 3 != 1);
        let score = score_fn(|score, _, query, key| score + ((query ^ key) & 1) as f32 * -0.5);
        dense(x, isa, Dense::builder().mask(mask).score(score))
    }
}

pub(super) struct SigmoidEntry;
impl Recipe for SigmoidEntry {
    const NAME: &'static str = "sigmoid";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2409.04431";
    const SUMMARY: &'static str = "causal, each weight by itself through a logistic function";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, _: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let builder = Sigmoid::builder().causal();
        let builder = match isa {
            Some(isa) => builder.isa(isa),
            None => builder,
        };
        Ok(Box::new(OnQkv { mechanism: builder.build()?, x }))
    }
}

pub(super) struct SelectiveEntry;
impl Recipe for SelectiveEntry {
    const NAME: &'static str = "selective";
    const FAMILY: &'static str = "dense";
    const SOURCE: &'static str = "arXiv 2411.12892";
    const SUMMARY: &'static str = "causal, with a temperature for each query and each value";

    fn trial<'a, T: Element>(x: Qkv<'a, T>, isa: Option<Isa>, seed: u64) -> Result<Box<dyn Trial<T> + 'a>> {
        let mut noise = noise(seed);
        let builder = Selective::builder().causal();
        let builder = match isa {
            Some(isa) => builder.isa(isa),
            None => builder,
        };
        let (batch, q_heads, q_len, _) = x.q.dim();
        let (_, kv_heads, kv_len, _) = x.v.dim();
        let mut temperatures = |heads, len: usize| {
            Array3::from_shape_fn((batch, heads, len), |(_, _, i)| token_temperature(noise(), -2.0, i + 1))
        };
        let (query, value) = (temperatures(q_heads, q_len), temperatures(kv_heads, kv_len));
        Ok(Box::new(OnTempered { mechanism: builder.build()?, x, query, value }))
    }
}

/// [`Selective`] with temperatures of its own.
struct OnTempered<'a, T> {
    mechanism: Selective<Causal>,
    x: Qkv<'a, T>,
    query: Array3<f32>,
    value: Array3<f32>,
}

impl<T: Copy> OnTempered<'_, T> {
    fn input(&self) -> Tempered<'_, T> {
        Tempered { qkv: self.x.reborrow(), query: self.query.view(), value: self.value.view() }
    }
}

impl<T: Element> Trial<T> for OnTempered<'_, T> {
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
        self.mechanism.weights(self.input())
    }
    fn reference_weights(&self) -> Result<Array4<f64>> {
        self.mechanism.reference_weights(self.input())
    }
    fn cost(&self) -> Result<Cost> {
        self.mechanism.cost(self.input())
    }
}
