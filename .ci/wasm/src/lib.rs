//! Kernels held against their definitions in WebAssembly: a host calls each
//! export, which says how far the kernel is off.

use attention_kernels::dense::Dense;
use attention_kernels::linear::Lightning;
use attention_kernels::neighborhood::Neighborhood;
use attention_kernels::sparse::TopK;
use attention_kernels::{Attention, Qkv, Result};
use ndarray::Array4;

/// The largest distance of a mechanism's kernel from its definition, as a share of the
/// largest output; infinite where one of them refuses.
fn off<A: for<'a> Attention<Qkv<'a, f32>>>(attention: Result<A>) -> f64 {
    let [q, k, v] = [1, 2, 3].map(|seed: usize| {
        let at =
            move |(_, h, t, c): (_, usize, usize, usize)| ((seed * 31 + h * 7 + t * 5 + c * 3) as f32).sin();
        Array4::from_shape_fn((1, 2, 100, 40), at)
    });
    let distance = |attention: A| {
        let x = Qkv::new(&q, &k, &v);
        let (out, exact) = (attention.forward(x.reborrow())?, attention.reference(x)?);
        let off = out.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        Result::Ok(off / exact.iter().fold(0.0, |most: f64, x| most.max(x.abs())))
    };
    attention.and_then(distance).unwrap_or(f64::INFINITY)
}

#[unsafe(no_mangle)]
extern "C" fn dense() -> f64 {
    off(Dense::builder().causal().build())
}

#[unsafe(no_mangle)]
extern "C" fn top_k() -> f64 {
    off(TopK::builder(8).build())
}

#[unsafe(no_mangle)]
extern "C" fn lightning() -> f64 {
    off(Lightning::builder(2).build())
}

#[unsafe(no_mangle)]
extern "C" fn neighborhood() -> f64 {
    off(Neighborhood::builder(&[10, 10], &[5, 5]).build())
}
