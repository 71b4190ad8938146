//! A prompt in chunks, then one token at a time, over a cache of keys and values.
//!
//! ```text
//! cargo run --release --example decode
//! ```
//!
//! What a model does with attention while it generates: each chunk of the prompt, and
//! each token after it, appends its keys and values and then attends to all that the
//! cache has. The cache is a parameter: here `f16`, and codes of 8 and of 4 bits. Each
//! is held against one call over all tokens at once.

use std::time::Instant;

use attention_kernels::cache::{Append, Cached, Contiguous, Int4, Int8, KvShape};
use attention_kernels::{Attention, Qkv, Result, Workspace, dense::Dense};
use half::f16;
use ndarray::{Array4, Axis, s};

#[path = "support/noise.rs"]
mod noise;

const Q_HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const PROMPT: usize = 2048;
const CHUNK: usize = 512;
const NEW: usize = 64;
const TOKENS: usize = PROMPT + NEW;

/// Queries, keys and values as a model's projections would give them, `[1, heads,
/// tokens, dim]`.
struct Model {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
}

fn main() -> Result<()> {
    let mut noise = noise::noise(5);
    let mut normal = |heads| Array4::from_shape_simple_fn((1, heads, TOKENS, DIM), &mut noise);
    let model = Model { q: normal(Q_HEADS), k: normal(KV_HEADS), v: normal(KV_HEADS) };
    let whole = Qkv::new(model.q.view(), model.k.view(), model.v.view());
    let once = Dense::builder().causal().build()?.forward(whole)?;

    let shape = KvShape { kv_heads: KV_HEADS, head_dim: DIM, value_dim: DIM };
    println!(
        "{Q_HEADS}/{KV_HEADS} heads of {DIM}, a prompt of {PROMPT} in chunks of {CHUNK}, {NEW} tokens after it\n"
    );
    println!("cache   KiB a token   prompt tokens/s   new tokens/s   off one call (RMS)");
    println!("----------------------------------------------------------------------------");
    generate("f16", Contiguous::<f16>::new(shape, 1, TOKENS)?, &model, &once)?;
    generate("int8", Contiguous::<Int8>::new(shape, 1, TOKENS)?, &model, &once)?;
    generate("int4", Contiguous::<Int4>::new(shape, 1, TOKENS)?, &model, &once)
}

/// Works the sequence off over an empty cache.
fn generate(name: &str, mut cache: impl Append, model: &Model, once: &Array4<f32>) -> Result<()> {
    let dense = Dense::builder().causal().build()?;
    let mut out = Array4::zeros(once.dim());
    let mut workspace = Workspace::new(); // grows once, then calls allocate nothing
    let mut seconds = [0.0; 2];
    let chunks = (0..PROMPT).step_by(CHUNK).map(|start| start..start + CHUNK);
    for tokens in chunks.chain((PROMPT..TOKENS).map(|token| token..token + 1)) {
        let start = Instant::now();
        let new = s![.., tokens.clone(), ..];
        cache.append(
            0,
            model.k.index_axis(Axis(0), 0).slice(new),
            model.v.index_axis(Axis(0), 0).slice(new),
        )?;
        // The last query sits at the last key of the cache.
        let new = s![.., .., tokens.clone(), ..];
        let x = Cached::new(model.q.slice(new), &cache);
        dense.forward_into(x, out.slice_mut(new), &mut workspace)?;
        seconds[usize::from(tokens.start >= PROMPT)] += start.elapsed().as_secs_f64();
    }
    let rms = |x: Array4<f32>| (x.mapv(|x| x * x).mean().unwrap_or(0.0)).sqrt();
    let off = rms(&out - once) / rms(once.clone());
    println!(
        "{name:6} {:>12.2} {:>17.0} {:>14.0}   {:>8.3} %",
        cache.token_bytes() as f64 / 1024.0,
        PROMPT as f64 / seconds[0],
        NEW as f64 / seconds[1],
        100.0 * off,
    );
    Ok(())
}
