//! Masks and scores of one's own, cross-attention over padded keys, and attention maps.
//!
//! ```text
//! cargo run --release --example custom
//! ```
//!
//! A mask or a change of scores is a closure, compiled into the kernel. Each part
//! prints the weights that come of it, darker where there is more of them, on random
//! queries and keys.

use attention_kernels::mask::{Causal, Mask, Window, mask_fn};
use attention_kernels::score::score_fn;
use attention_kernels::{Qkv, Result, Weights, dense::Dense};
use ndarray::{Array4, ArrayView2, s};

#[path = "support/noise.rs"]
mod noise;

const LEN: usize = 36;
const DIM: usize = 32;

fn main() -> Result<()> {
    let mut noise = noise::noise(11);
    let mut normal = |heads, len| Array4::from_shape_simple_fn((1, heads, len, DIM), &mut noise);
    let (q, k, v) = (normal(2, LEN), normal(1, LEN), normal(1, LEN));
    let x = Qkv::new(q.view(), k.view(), v.view());

    // Built-in masks combine. What they hide as a whole is skipped unseen.
    let windows = Causal::new().and(Window::new(Some(8), Some(0)));
    show("a window of 8 tokens before", x, &Dense::builder().mask(windows).build()?)?;

    // A mask of one's own: sentences of 12 tokens, and the first token of each for all
    // that come later.
    let sentences = mask_fn(|extent, query, key| {
        let query = query as isize + extent.q_start();
        let same = query / 12 == key as isize / 12;
        key as isize <= query && (same || key % 12 == 0)
    });
    show(
        "sentences, and their first tokens for all later ones",
        x,
        &Dense::builder().mask(sentences).build()?,
    )?;

    // A change of scores of one's own: the second head looks for tokens a period away.
    let rhythm = score_fn(|score, site, query, key| {
        let distance = query as f32 - key as f32;
        if site.head == 1 { score + 4.0 * (distance * std::f32::consts::TAU / 9.0).cos() } else { score }
    });
    show("a head that likes distances of 9, 18, 27", x, &Dense::builder().causal().score(rhythm).build()?)?;

    // Cross-attention: two texts of 20 and 33 tokens, padded to 36, for 8 queries each.
    let mut text = || Array4::from_shape_simple_fn((2, 1, LEN, DIM), &mut noise);
    let (keys, values) = (text(), text());
    let mut latents = || Array4::from_shape_simple_fn((2, 1, 8, DIM), &mut noise);
    let latents = latents();
    let padded = Qkv::new(latents.view(), keys.view(), values.view()).key_lengths(&[20, 33]);
    let maps = Dense::builder().build()?.weights(padded)?;
    println!("eight queries over texts of 20 and of 33 tokens, padded to {LEN}");
    draw(&[maps.slice(s![0, 0, .., ..]), maps.slice(s![1, 0, .., ..])]);
    Ok(())
}

/// The weights of two heads under a mechanism.
fn show(what: &str, x: Qkv<'_, f32>, mechanism: &impl for<'a> Weights<Qkv<'a, f32>>) -> Result<()> {
    let weights = mechanism.weights(x)?;
    println!("{what}");
    draw(&[weights.slice(s![0, 0, .., ..]), weights.slice(s![0, 1, .., ..])]);
    Ok(())
}

/// Maps side by side, two queries a line.
fn draw(maps: &[ArrayView2<'_, f32>; 2]) {
    const SHADES: [char; 5] = [' ', '.', ':', 'o', '#'];
    let shade = |weight: f32| match weight {
        0.0 => SHADES[0],
        _ => SHADES[((8.0 * weight).sqrt() * 4.0).clamp(1.0, 4.0) as usize],
    };
    for i in (0..maps[0].nrows()).step_by(2) {
        let line =
            |map: &ArrayView2<'_, f32>| map.row(i).iter().map(|&weight| shade(weight)).collect::<String>();
        println!("  |{}|  |{}|", line(&maps[0]), line(&maps[1]));
    }
    println!();
}
