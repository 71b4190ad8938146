//! Cascade attention: a prefix that many sequences share is attended to once.
//!
//! Sixteen continuations of one prompt are being decoded. Each of them sees
//! the prompt's keys and its own. Attention over disjoint sets of keys merges,
//! so the prompt needs to be read only once: the sixteen queries become
//! sixteen rows of one sequence.

use std::time::Instant;

use attention_kernels::merge::merge_into;
use attention_kernels::{Attention, Mergeable, Qkv, Result, Workspace, dense::Dense};
use ndarray::{Array3, Array4, Axis, concatenate};

#[path = "support/noise.rs"]
mod noise;

const SEQUENCES: usize = 16;
const HEADS: usize = 8;
const PREFIX: usize = 8192;
const OWN: usize = 128;
const DIM: usize = 128;

fn main() -> Result<()> {
    let mut noise = noise::noise(3);
    let mut normal = |b, n| Array4::from_shape_simple_fn((b, HEADS, n, DIM), &mut noise);
    let q = normal(SEQUENCES, 1);
    let (prefix_k, prefix_v) = (normal(1, PREFIX), normal(1, PREFIX));
    let (own_k, own_v) = (normal(SEQUENCES, OWN), normal(SEQUENCES, OWN));

    // Without sharing, each sequence has the prefix and its own keys in a row.
    let whole = |prefix: &Array4<f32>, own: &Array4<f32>| {
        let prefix = prefix.broadcast((SEQUENCES, HEADS, PREFIX, DIM)).expect("a batch axis of 1");
        concatenate(Axis(2), &[prefix, own.view()]).expect("the same shape but for the length")
    };
    let (k, v) = (whole(&prefix_k, &own_k), whole(&prefix_v, &own_v));

    let dense = Dense::builder().build()?;
    let mut workspace = Workspace::new();
    let dim = (SEQUENCES, HEADS, 1, DIM);

    let mut out = Array4::zeros(dim);
    let alone =
        best(|| dense.forward_into(Qkv::new(q.view(), k.view(), v.view()), out.view_mut(), &mut workspace))?;

    // The sequences' queries as rows of one sequence: [1, heads, sequences, dim].
    let rows = q.view().permuted_axes([2, 1, 0, 3]);
    let (mut merged, mut lse) = (Array4::zeros(dim), Array3::zeros((SEQUENCES, HEADS, 1)));
    let (mut own, mut own_lse) = (Array4::zeros(dim), Array3::zeros((SEQUENCES, HEADS, 1)));
    let shared = best(|| {
        dense.forward_with_lse_into(
            Qkv::new(rows, prefix_k.view(), prefix_v.view()),
            merged.view_mut().permuted_axes([2, 1, 0, 3]),
            lse.view_mut().permuted_axes([2, 1, 0]),
            &mut workspace,
        )?;
        dense.forward_with_lse_into(
            Qkv::new(q.view(), own_k.view(), own_v.view()),
            own.view_mut(),
            own_lse.view_mut(),
            &mut workspace,
        )?;
        merge_into(merged.view_mut(), lse.view_mut(), own.view(), own_lse.view())
    })?;

    let off = out.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{SEQUENCES} sequences, a prefix of {PREFIX} keys, {OWN} keys of their own each");
    println!("each by itself   {alone:8.3} ms");
    println!("prefix shared    {shared:8.3} ms   {:.1} times as fast", alone / shared);
    println!("largest difference between the two: {off:.1e}");
    Ok(())
}

/// Milliseconds of the fastest of several runs.
fn best(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let start = Instant::now();
        run()?;
        best = best.min(1e3 * start.elapsed().as_secs_f64());
    }
    Ok(best)
}
