//! Causal attention over grouped heads, and how to check it.

use attention_kernels::{Attention, Qkv, dense::Dense};
use ndarray::Array4;

fn main() -> attention_kernels::Result<()> {
    // [batch, heads, len, dim]: 8 query heads share 2 key/value heads.
    let q = Array4::from_shape_fn((1, 8, 100, 64), |(_, h, i, c)| ((h + i * c) as f32).sin());
    let k = Array4::from_shape_fn((1, 2, 100, 64), |(_, h, j, c)| ((h + j + c) as f32).cos());
    let v = Array4::from_shape_fn((1, 2, 100, 64), |(_, _, j, c)| (j * c) as f32 / 6400.0);
    let x = Qkv::new(q.view(), k.view(), v.view());

    let attention = Dense::builder().causal().build()?;
    let out = attention.forward(x)?; // the kernel
    let exact = attention.reference(x)?; // the definition, in f64
    let off = out.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    println!("{:?}, off by {off:.1e}", out.dim());
    Ok(())
}
