//! Attention forward, and forward and backward, beside burn's own operator: 32 query heads over
//! 8 key/value heads, causal, `f32`.
//!
//! ```text
//! cargo run --release -p attention-kernels-burn --example training_step -- [len] [rounds]
//! ```

use std::hint::black_box;
use std::time::Instant;

use attention_kernels_burn::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Distribution, Tensor, module};

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 64;
const CAUSAL: AttentionModuleOptions = AttentionModuleOptions { scale: None, softcap: None, is_causal: true };

fn ours(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    attention(q, k, v, None, None, CAUSAL).expect("shapes that fit")
}

/// burn's operator. Outside of a graph it shares key/value heads out by itself.
fn theirs(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let repeat = |x: Tensor<4>| {
        let [batch, heads, len, dim] = x.dims();
        let x = x.unsqueeze_dim::<5>(2).expand([batch, heads, HEADS / heads, len, dim]);
        x.reshape([batch, HEADS, len, dim])
    };
    let (k, v) = if q.device().is_autodiff() { (repeat(k), repeat(v)) } else { (k, v) };
    module::attention(q, k, v, None, None, CAUSAL)
}

type Attend = fn(Tensor<4>, Tensor<4>, Tensor<4>) -> Tensor<4>;

/// The output, or the gradients of all three, one after the other.
fn run(attend: Attend, [q, k, v]: &[Tensor<4>; 3], backward: bool) -> Vec<Tensor<4>> {
    let out = attend(q.clone().swap_dims(1, 2), k.clone().swap_dims(1, 2), v.clone().swap_dims(1, 2));
    if !backward {
        return vec![out];
    }
    // A loss in which every element has another weight.
    let gradients = (out.clone() * out).sum().backward();
    [q, k, v].map(|x| x.grad(&gradients).expect("a gradient")).into()
}

fn timed<T>(f: impl FnOnce() -> T) -> (T, f64) {
    let started = Instant::now();
    let out = black_box(f());
    (out, started.elapsed().as_secs_f64() * 1e3)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let argument = |at: usize, default: usize| {
        std::env::args().nth(at).and_then(|x| x.parse().ok()).unwrap_or(default).max(1)
    };
    let (len, rounds) = (argument(1, 1024), argument(2, 9));
    println!("(1, {HEADS}/{KV_HEADS}, {len}, {len}, {DIM}) causal f32, medians of {rounds} rounds");
    for (what, device) in [("forward", Device::flex()), ("forward and backward", Device::flex().autodiff())] {
        let backward = device.is_autodiff();
        let project = |heads: usize| {
            let x = Tensor::random([1, len, heads, DIM], Distribution::Normal(0.0, 1.0), &device);
            if backward { x.require_grad() } else { x }
        };
        let arrays = [project(HEADS), project(KV_HEADS), project(KV_HEADS)];
        // In turns, so that what disturbs one disturbs the other.
        let (mut our_times, mut their_times, mut off) = (Vec::new(), Vec::new(), 0f32);
        for round in 0..=rounds {
            let (got, time) = timed(|| run(ours, &arrays, backward));
            let (want, their_time) = timed(|| run(theirs, &arrays, backward));
            for (got, want) in got.into_iter().zip(want) {
                off = off.max((got - want).abs().max().into_scalar());
            }
            // The first round warms up.
            if round > 0 {
                our_times.push(time);
                their_times.push(their_time);
            }
        }
        let (ours, theirs) = (median(&mut our_times), median(&mut their_times));
        println!("{what}");
        println!("  burn                    {theirs:9.2} ms");
        println!("  attention-kernels-burn  {ours:9.2} ms, off by {off:.1e} at most");
        println!("  ratio                   {:9.2}", theirs / ours);
    }
}
