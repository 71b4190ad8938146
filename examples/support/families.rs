//! Sparse and neighborhood attention at the lengths that they are for.

use attention_kernels::attention::{Attention, Cost, Selects};
use attention_kernels::cache::{Int8, Latent};
use attention_kernels::element::{DType, Element};
use attention_kernels::error::Result;
use attention_kernels::input::Qkv;
use attention_kernels::keys::{Layout, Per};
use attention_kernels::neighborhood::{Neighborhood, Swin};
use attention_kernels::select::{IndexBranch, Indexed, Summarised};
use attention_kernels::simd::Isa;
use attention_kernels::sparse::{
    BlockSparse, Branches, Dsa, FlexPrefill, Gated, Moba, Msa, Nsa, Quest, Routing, S2Attention,
    SeerAttention, TopK, block_map,
};
use half::f16;
use ndarray::{Array2, Array3, Array4, Axis};

use super::noise::noise;
use super::{CAUSAL, Forward, PREFILL, Shape, Variant, against, shape};

type Made<'a> = Result<(Forward<'a, f32>, Cost)>;

/// Builds the mechanism of a shape.
pub type Make = for<'a> fn(&Shape, Isa, Qkv<'a, f32>) -> Made<'a>;

const DECODE_LONG: &str = "decode-gqa-128k-d128-f32";
const CAUSAL_LONG: &str = "causal-32k-d128-f32";

/// Keys of a token list.
pub const LISTED: usize = 2048;

/// The shapes. Arrays beside queries, keys and values are made once: a decoder
/// would have them.
#[rustfmt::skip]
pub const FAMILIES: &[Shape] = {
    use DType::{Bf16, F16, F32};
    use Variant::{Causal, Family, Full, Listed, Near};
    &[
        shape(CAUSAL_LONG, Causal, F32, [1,  4, 1, 32768,  32768, 128]),
        shape(DECODE_LONG, Full,   F32, [1, 32, 8,     1, 131072, 128]),
        against(PREFILL, shape("block-sparse-10%-16k", Family(|shape, isa, x| block_sparse(0.1, shape, isa, x)),
            F32, [1, 8, 8, 16384, 16384, 128])),
        against(PREFILL, shape("block-sparse-2%-16k", Family(|shape, isa, x| block_sparse(0.02, shape, isa, x)),
            F32, [1, 8, 8, 16384, 16384, 128])),
        against(CAUSAL,      shape("S2-attention-128k",   Family(s2),   F32, [1, 4, 4, 131072, 131072, 128])),
        shape("S2-attention-8k", Family(s2), F32, [1, 4, 4, 8192, 8192, 128]),
        against(CAUSAL_LONG, shape("FlexPrefill-10%-32k", Family(flex), F32, [1, 4, 1, 32768, 32768, 128])),
        against(CAUSAL_LONG, shape("Seer-10%-32k",        Family(seer), F32, [1, 4, 1, 32768, 32768, 128])),
        shape("Routing-4k",  Family(routing), F32, [1, 4, 4,  4096,  4096, 64]),
        shape("Routing-16k", Family(routing), F32, [1, 4, 4, 16384, 16384, 64]),
        shape("Routing-64k", Family(routing), F32, [1, 4, 4, 65536, 65536, 64]),
        against(CAUSAL_LONG, shape("MoBA-32k",            Family(moba), F32, [1, 4, 1, 32768, 32768, 128])),
        against(CAUSAL_LONG, shape("DSA-32k",             Family(dsa),  F32, [1, 4, 1, 32768, 32768, 128])),
        against(CAUSAL_LONG, shape("DSA-int8-32k",        Family(dsa_int8), F32, [1, 4, 1, 32768, 32768, 128])),
        against(CAUSAL_LONG, shape("MSA-32k",             Family(msa),  F32, [1, 4, 1, 32768, 32768, 128])),
        against(CAUSAL_LONG, shape("NSA-32k",             Family(nsa),  F32, [1, 4, 1, 32768, 32768, 128])),
        against(DECODE_LONG, shape("token-lists-128k",  Listed,         F32, [1, 32, 8, 1, 131072, 128])),
        against(DECODE_LONG, shape("Quest-decode-128k", Family(quest),  F32, [1, 32, 8, 1, 131072, 128])),
        against(DECODE_LONG, shape("DSA-decode-128k",   Family(dsa),    F32, [1, 32, 8, 1, 131072, 128])),
        against(DECODE_LONG, shape("DSA-int8-decode-128k", Family(dsa_int8), F32, [1, 32, 8, 1, 131072, 128])),
        against(DECODE_LONG, shape("MSA-decode-128k",   Family(msa),    F32, [1, 32, 8, 1, 131072, 128])),
        against(DECODE_LONG, shape("NSA-decode-128k",   Family(pooled), F32, [1, 32, 8, 1, 131072, 128])),
        shape("neighborhood-64k-w257",        Near(&[65536], &[257]), F32, [1, 4, 4, 65536, 65536, 64]),
        shape("neighborhood-64k-w257-causal", Family(line), F32, [1, 4, 4, 65536, 65536, 64]),
        shape("neighborhood-56x56-w13x13", Near(&[56, 56], &[13, 13]), F32, [8, 12, 12, 3136, 3136, 64]),
        against("neighborhood-56x56-w13x13",
            shape("neighborhood-56x56-w13x13-f16", Near(&[56, 56], &[13, 13]), F16, [8, 12, 12, 3136, 3136, 64])),
        against("neighborhood-56x56-w13x13",
            shape("neighborhood-56x56-w13x13-bf16", Near(&[56, 56], &[13, 13]), Bf16, [8, 12, 12, 3136, 3136, 64])),
        shape("neighborhood-56x56-w13x13-dilated", Family(dilated), F32, [8, 12, 12, 3136, 3136, 64]),
        shape("neighborhood-56x56-w7x7", Near(&[56, 56], &[7, 7]), F32, [8, 12, 12, 3136, 3136, 64]),
        shape("neighborhood-448x448-w13x13", Near(&[448, 448], &[13, 13]), F32, [1, 3, 3, 200_704, 200_704, 64]),
        shape("neighborhood-16x28x28-w7x7x7", Near(&[16, 28, 28], &[7, 7, 7]), F32, [1, 8, 8, 12544, 12544, 64]),
        shape("shifted-windows-56x56-w7x7", Family(shifted), F32, [32, 3, 3, 3136, 3136, 32]),
    ]
};

/// Neighborhood attention of any storage type.
pub fn near<'a, T: Element>(
    [extents, window]: [&[usize]; 2],
    isa: Isa,
    x: Qkv<'a, T>,
) -> Result<(Forward<'a, T>, Cost)> {
    let near = Neighborhood::builder(extents, window).isa(isa).build()?;
    let cost = near.cost(x)?;
    let forward: Forward<'_, T> =
        Box::new(move |x, out, workspace| near.forward_into(x.reborrow(), out, workspace));
    Ok((forward, cost))
}

fn line<'a>(_: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    built(Neighborhood::builder(&[65536], &[257]).causal(&[true]).isa(isa).build()?, x)
}

fn dilated<'a>(_: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    built(Neighborhood::builder(&[56, 56], &[13, 13]).dilation(&[4, 4]).isa(isa).build()?, x)
}

fn shifted<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let table = Array2::from_shape_simple_fn((13 * 13, shape.q_heads), noise(4));
    built(Swin::builder([56, 56], [7, 7]).shift([3, 3]).bias(table).isa(isa).build()?, x)
}

fn s2<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let s2 = S2Attention::builder(shape.q_heads, shape.kv_heads).block(64).local(16).stride(16);
    built(s2.isa(isa).build()?, x)
}

/// Noise has no pattern to find: the budget says how much is kept, half of it columns and
/// half of it diagonals.
fn flex<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let most = shape.kv_len / 20;
    built(FlexPrefill::builder().tau(0.0).least(most).most(most).isa(isa).build()?, x)
}

/// At the threshold that leaves a tenth of the causal blocks.
fn seer<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let mut random = noise(8);
    let weights =
        Array3::from_shape_simple_fn((shape.q_heads, 3 * shape.head_dim, shape.head_dim), || 0.2 * random());
    let blocks = shape.kv_len / 64;
    let tenth = shape.q_heads * blocks * (blocks + 1) / 20;
    let gated = |x: Qkv<'a, f32>| Gated { qkv: x, q: x.q, k: x.k };
    let [mut low, mut high] = [0.0, 1.0];
    for _ in 0..16 {
        let threshold = f32::midpoint(low, high);
        let found = SeerAttention::builder(weights.clone(), threshold).isa(isa).build()?.select(gated(x))?;
        *(if found.len() > tenth { &mut low } else { &mut high }) = threshold;
    }
    let seer = SeerAttention::builder(weights, high).isa(isa).build()?;
    let cost = seer.cost(gated(x))?;
    let forward: Forward<'_, f32> = Box::new(move |x, out, workspace| {
        seer.forward_into(Gated { qkv: x.reborrow(), q: x.q, k: x.k }, out, workspace)
    });
    Ok((forward, cost))
}

/// As many clusters as the root of the length, of as many tokens.
fn routing<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let root = shape.q_len.isqrt();
    let centroids = Array3::from_shape_simple_fn((shape.q_heads, root, shape.head_dim), noise(9));
    built(Routing::builder(centroids, root).causal().isa(isa).build()?, x)
}

fn moba<'a>(_: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    built(Moba::builder(12).block(256).isa(isa).build()?, x)
}

fn quest<'a>(_: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let quest = Quest::builder(2048).isa(isa).build()?;
    let (pages, cost) = (quest.summaries(x)?, quest.cost(x)?);
    let forward: Forward<'_, f32> =
        Box::new(move |x, out, workspace| quest.forward_into(Summarised::new(x, &pages), out, workspace));
    Ok((forward, cost))
}

fn msa<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let [queries, keys] = index_arrays(shape, shape.kv_heads);
    let msa = Msa::builder(16).isa(isa).build()?;
    let cost = msa.cost(Indexed::new(x.reborrow(), IndexBranch::new(queries.view(), keys.view())))?;
    let forward: Forward<'_, f32> = Box::new(move |x, out, workspace| {
        let branch = IndexBranch::new(queries.view(), keys.view());
        msa.forward_into(Indexed::new(x.reborrow(), branch), out, workspace)
    });
    Ok((forward, cost))
}

fn nsa<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    nsa_over(None, shape, isa, x)
}

/// With pools that are kept: one of 32 keys for every 16.
fn pooled<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let dim = (shape.batch, shape.kv_heads, (shape.kv_len - 32) / 16 + 1, shape.head_dim);
    nsa_over(Some([1, 2].map(|seed| Array4::from_shape_simple_fn(dim, noise(seed)))), shape, isa, x)
}

fn nsa_over<'a>(pools: Option<[Array4<f32>; 2]>, shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let gates = Array4::from_elem((shape.batch, shape.q_heads, shape.q_len, 3), 0.5);
    let nsa = Nsa::builder(16).isa(isa).build()?;
    fn branches<'b>(
        x: Qkv<'b, f32>,
        gates: &'b Array4<f32>,
        pools: &'b Option<[Array4<f32>; 2]>,
    ) -> Branches<'b, f32> {
        let x = Branches::new(x, gates.view());
        match pools {
            Some([k, v]) => x.compressed(k.view(), v.view()),
            None => x,
        }
    }
    let cost = nsa.cost(branches(x.reborrow(), &gates, &pools))?;
    let forward: Forward<'_, f32> = Box::new(move |x, out, workspace| {
        nsa.forward_into(branches(x.reborrow(), &gates, &pools), out, workspace)
    });
    Ok((forward, cost))
}

/// A list of keys for each key/value head, picked before.
pub fn listed<'a>(isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let top = TopK::builder(LISTED).per(Per::Group).isa(isa).build()?;
    let (index, cost) = (top.select(x)?, top.cost(x)?);
    let forward: Forward<'_, f32> =
        Box::new(move |x, out, workspace| top.forward_on_into(x, &index, out, workspace));
    Ok((forward, cost))
}

fn built<'a, A>(mechanism: A, x: Qkv<'a, f32>) -> Made<'a>
where
    A: for<'b> Attention<Qkv<'b, f32>> + 'a,
{
    let cost = mechanism.cost(x)?;
    Ok((Box::new(move |x, out, workspace| mechanism.forward_into(x, out, workspace)), cost))
}

fn block_sparse<'a>(density: f32, shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    const BLOCK: usize = 64;
    let (rows, cols) = (shape.q_len / BLOCK, shape.kv_len / BLOCK);
    // The ranks of normal numbers: each row has as many blocks as all others.
    let mut map = Array4::from_elem((1, shape.q_heads, rows, cols), false);
    let mut random = noise(5);
    for mut row in map.rows_mut() {
        let mut order: Vec<(f32, usize)> = (0..cols).map(|j| (random(), j)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0));
        order.iter().take((density * cols as f32).round() as usize).for_each(|&(_, j)| row[j] = true);
    }
    let plan = block_map(Layout::new(Per::Head, BLOCK, &x.dims()?), BLOCK, map.view())?;
    built(BlockSparse::builder(plan).isa(isa).build()?, x)
}

/// Queries of some index heads, and keys that they share.
fn index_arrays(shape: &Shape, heads: usize) -> [Array4<f16>; 2] {
    let (dims, mut random) = ([(heads, shape.q_len), (1, shape.kv_len)], noise(6));
    dims.map(|(heads, len)| {
        let dim = (shape.batch, heads, len, 128);
        Array4::from_shape_simple_fn(dim, || f16::from_f32(random()))
    })
}

/// With half as many index heads as there are others, as DeepSeek-V3.2 has them.
fn dsa<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let heads = shape.q_heads / 2;
    let [queries, keys] = index_arrays(shape, heads);
    let weights = Array3::from_elem((shape.batch, heads, shape.q_len), 1.0 / heads as f32);
    let dsa = Dsa::builder(2048).isa(isa).build()?;
    let branch = IndexBranch::new(queries.view(), keys.view()).weighted(weights.view());
    let cost = dsa.cost(Indexed::new(x.reborrow(), branch))?;
    let forward: Forward<'_, f32> = Box::new(move |x, out, workspace| {
        let branch = IndexBranch::new(queries.view(), keys.view()).weighted(weights.view());
        dsa.forward_into(Indexed::new(x.reborrow(), branch), out, workspace)
    });
    Ok((forward, cost))
}

/// With 64 index heads where there is one query, as DeepSeek-V3.2 has them, over index
/// keys that a cache holds in 8 bits.
fn dsa_int8<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let heads = if shape.q_len == 1 { 64 } else { shape.q_heads / 2 };
    let [queries, keys] = index_arrays(shape, heads);
    let weights = Array3::from_elem((shape.batch, heads, shape.q_len), 1.0 / heads as f32);
    let mut cache = Latent::contiguous::<Int8>(128, 0, shape.batch, shape.kv_len)?;
    for (b, keys) in keys.outer_iter().enumerate() {
        cache.append(b, keys.index_axis_move(Axis(0), 0))?;
    }
    let dsa = Dsa::builder(2048).int8().isa(isa).build()?;
    let branch = IndexBranch::cached(queries.view(), &cache).weighted(weights.view());
    let cost = dsa.cost(Indexed::new(x.reborrow(), branch))?;
    let forward: Forward<'_, f32> = Box::new(move |x, out, workspace| {
        let branch = IndexBranch::cached(queries.view(), &cache).weighted(weights.view());
        dsa.forward_into(Indexed::new(x.reborrow(), branch), out, workspace)
    });
    Ok((forward, cost))
}
