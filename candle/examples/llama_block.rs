//! The attention of a block of Llama, fused, beside candle's `repeat_kv`, `matmul`, mask,
//! `softmax`, `matmul`: 32 query heads over 8 key/value heads, causal, `f32`.
//!
//! ```text
//! cargo run --release -p attention-kernels-candle --example llama_block -- [len] [rounds]
//! ```

use std::hint::black_box;
use std::time::Instant;

use attention_kernels_candle::{BlockAttention, BlockOptions};
use candle_core::{Device, Result, Tensor};

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 64;

/// As `candle_transformers::models::llama` has it.
fn unfused(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let repeat = |x: &Tensor| -> Result<Tensor> {
        let (batch, heads, len, dim) = x.dims4()?;
        Tensor::cat(&vec![x; HEADS / heads], 2)?.reshape((batch, HEADS, len, dim))
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    let scores = (q.contiguous()?.matmul(&k.t()?)? / (DIM as f64).sqrt())?;
    let lowest = Tensor::new(f32::NEG_INFINITY, &Device::Cpu)?.broadcast_as(scores.shape())?;
    let scores = mask.broadcast_as(scores.shape())?.where_cond(&lowest, &scores)?;
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v.contiguous()?)
}

fn timed(f: impl FnOnce() -> Result<Tensor>) -> Result<(Tensor, f64)> {
    let started = Instant::now();
    let out = black_box(f()?);
    Ok((out, started.elapsed().as_secs_f64() * 1e3))
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() -> Result<()> {
    let argument = |at: usize, default: usize| {
        std::env::args().nth(at).and_then(|x| x.parse().ok()).unwrap_or(default).max(1)
    };
    let (len, rounds) = (argument(1, 1024), argument(2, 9));
    let project = |heads: usize| Tensor::randn(0f32, 1., (1, len, heads, DIM), &Device::Cpu)?.transpose(1, 2);
    let (q, k, v) = (project(HEADS)?, project(KV_HEADS)?, project(KV_HEADS)?);
    let mask: Vec<u8> = (0..len * len).map(|i| u8::from(i % len > i / len)).collect();
    let mask = Tensor::from_vec(mask, (len, len), &Device::Cpu)?;
    let block = BlockAttention::new(BlockOptions::default())?;

    // In turns, so that what disturbs one disturbs the other.
    let (mut ours, mut theirs, mut off) = (Vec::new(), Vec::new(), 0f32);
    for round in 0..=rounds {
        let (got, time) = timed(|| block.forward(&q, &k, &v))?;
        let (want, their_time) = timed(|| unfused(&q, &k, &v, &mask))?;
        off = off.max((got - want)?.abs()?.max_all()?.to_scalar()?);
        // The first round warms up.
        if round > 0 {
            ours.push(time);
            theirs.push(their_time);
        }
    }
    let (ours, theirs) = (median(&mut ours), median(&mut theirs));
    println!("(1, {HEADS}/{KV_HEADS}, {len}, {len}, {DIM}) causal f32, medians of {rounds} rounds");
    println!("candle, unfused           {theirs:8.2} ms");
    println!("attention-kernels-candle  {ours:8.2} ms, off by {off:.1e} at most");
    println!("ratio                     {:8.2}", theirs / ours);
    Ok(())
}
