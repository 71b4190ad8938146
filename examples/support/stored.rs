//! Attention over key/value caches of every format, and over latents.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use attention_kernels::attention::{Attention, Cost};
use attention_kernels::cache::{
    Append, Cached, Contiguous, Format, Int4, Int8, Kivi, KvShape, Paged, Pages, Q4_0, Q8_0, Rotated,
};
use attention_kernels::dense::Dense;
use attention_kernels::element::DType;
use attention_kernels::error::Result;
use attention_kernels::input::Qkv;
use attention_kernels::latent::{Form, Latents, Mla};
use attention_kernels::simd::Isa;
use half::{bf16, f16};
use ndarray::{Array3, Array4, Axis, s};

use super::noise::noise;
use super::{Forward, PREFILL, Shape, Variant, against, shape};

type Made<'a> = Result<(Forward<'a, f32>, Cost)>;

/// The decode step that the others are compared with.
const DECODE: &str = "decode-gqa-16k-d128-f32";

/// Tokens of a page.
const PAGE: usize = 16;

/// What decodes has two sequences and takes them in turns, so that no cache of
/// the processor can serve it.
#[rustfmt::skip]
pub const STORED: &[Shape] = {
    use DType::F32;
    use Variant::Stored;
    const STEP: [usize; 6] = [1, 32, 8, 1, 16384, 128];
    const PROMPT: [usize; 6] = [1, 8, 8, 4096, 4096, 128];
    &[
        against(DECODE, shape("cache-f32-16k",          Stored(contiguous::<f32>),        F32, STEP)),
        against(DECODE, shape("cache-f16-16k",          Stored(contiguous::<f16>),        F32, STEP)),
        against(DECODE, shape("cache-int8-16k",         Stored(contiguous::<Int8>),       F32, STEP)),
        against(DECODE, shape("cache-q8_0-16k",         Stored(contiguous::<Q8_0>),       F32, STEP)),
        against(DECODE, shape("cache-int4-16k",         Stored(contiguous::<Int4>),       F32, STEP)),
        against(DECODE, shape("cache-q4_0-16k",         Stored(contiguous::<Q4_0>),       F32, STEP)),
        against(DECODE, shape("cache-rotated-3-16k",    Stored(contiguous::<Rotated<3>>), F32, STEP)),
        against(DECODE, shape("cache-KIVI-16k",         Stored(kivi),                     F32, STEP)),
        against("cache-f32-16k",  shape("cache-paged-f32-16k",  Stored(paged::<f32>),     F32, STEP)),
        against("cache-int8-16k", shape("cache-paged-int8-16k", Stored(paged::<Int8>),    F32, STEP)),
        shape("cache-paged-ragged-256", Stored(ragged), F32, [256, 4, 1, 1, 16384, 128]),
        against(PREFILL, shape("prefill-int8-4k",       Stored(contiguous::<Int8>),       F32, PROMPT)),
        against(PREFILL, shape("prefill-int4-4k",       Stored(contiguous::<Int4>),       F32, PROMPT)),
        shape("MLA-absorbed-128h-8k",   Stored(latent), F32, [1, 128, 1, 1, 8192, 128]),
        shape("MLA-absorbed-16h-8k",    Stored(latent), F32, [1,  16, 1, 1, 8192, 128]),
    ]
};

fn sizes(shape: &Shape) -> KvShape {
    KvShape { kv_heads: shape.kv_heads, head_dim: shape.head_dim, value_dim: shape.head_dim }
}

fn contiguous<'a, F: Format>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    filled(Contiguous::<F>::new(sizes(shape), 2, shape.kv_len)?, isa, x)
}

fn kivi<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    filled(Kivi::<2>::new(sizes(shape), 2, shape.kv_len, 128)?, isa, x)
}

/// Pages of both sequences in turn: no two of one follow each other.
fn paged<'a, F: Format>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let pages = Pages { count: 2 * shape.kv_len.div_ceil(PAGE), len: PAGE };
    filled(Paged::<F>::new(sizes(shape), 2, pages)?, isa, x)
}

/// Two sequences of the same tokens.
fn filled<'a>(mut cache: impl Append + 'a, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let [k, v] = [&x.k, &x.v].map(|x| x.index_axis(Axis(0), 0));
    for first in (0..k.dim().1).step_by(PAGE) {
        let page = s![.., first..(first + PAGE).min(k.dim().1), ..];
        for sequence in 0..2 {
            cache.append(sequence, k.slice(page), v.slice(page))?;
        }
    }
    let dense = Dense::builder().isa(isa).build()?;
    let cost = dense.cost(Cached::new(x.q.reborrow(), &cache).sequences(&[0]))?;
    let turn = AtomicUsize::new(0);
    let forward: Forward<'_, f32> = Box::new(move |x, out, workspace| {
        let sequence = [turn.fetch_add(1, Relaxed) % 2];
        dense.forward_into(Cached::new(x.q, &cache).sequences(&sequence), out, workspace)
    });
    Ok((forward, cost))
}

/// Sequences of 1 to `kv_len` tokens, of every length as many.
fn ragged<'a>(shape: &Shape, isa: Isa, x: Qkv<'a, f32>) -> Made<'a> {
    let lengths = (0..shape.batch).map(|i| 1 + i * (shape.kv_len - 1) / (shape.batch - 1));
    let count = lengths.clone().map(|len| len.div_ceil(PAGE)).sum();
    let mut cache = Paged::<f16>::new(sizes(shape), shape.batch, Pages { count, len: PAGE })?;
    let tokens = Array3::from_shape_simple_fn((shape.kv_heads, shape.kv_len, shape.head_dim), noise(3));
    for (sequence, len) in lengths.enumerate() {
        let part = tokens.slice(s![.., ..len, ..]);
        cache.append(sequence, part, part)?;
    }
    let dense = Dense::builder().isa(isa).build()?;
    let cost = dense.cost(Cached::new(x.q, &cache))?;
    let forward: Forward<'_, f32> =
        Box::new(move |x, out, workspace| dense.forward_into(Cached::new(x.q, &cache), out, workspace));
    Ok((forward, cost))
}

/// Latents of 512 elements and 64 that turn, in bf16, absorbed.
fn latent<'a>(shape: &Shape, isa: Isa, _: Qkv<'a, f32>) -> Made<'a> {
    let (heads, [r, turning, own]) = (shape.q_heads, [512, 64, 128]);
    let mut random = noise(4);
    let mut small = move |scale: f32| bf16::from_f32(scale * random());
    let q = Array4::from_shape_simple_fn((1, heads, 1, own + turning), || small(1.0));
    let latents = Array3::from_shape_simple_fn((1, shape.kv_len, r + turning), || small(1.0));
    let [w_uk, w_uv] = [(); 2].map(|()| Array3::from_shape_simple_fn((heads, own, r), || small(0.05)));
    let mla = Mla::builder().form(Form::Absorbed).isa(isa).build()?;
    let cost = mla.cost(Latents::new(q.view(), latents.view(), w_uk.view(), w_uv.view()).widened())?;
    let forward: Forward<'_, f32> = Box::new(move |_, out, workspace| {
        let x = Latents::new(q.view(), latents.view(), w_uk.view(), w_uv.view());
        mla.forward_into(x.widened(), out, workspace)
    });
    Ok((forward, cost))
}
