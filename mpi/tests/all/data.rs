//! Numbers that every rank can make, and what it holds of them.

use attention_kernels_mpi::plan::Cut;
use ndarray::{Array3, Array4, ArrayView4, Axis};

/// Numbers of about the size of 1, of which no two rows are alike.
pub fn numbers(seed: usize, dim: (usize, usize, usize, usize)) -> Array4<f32> {
    Array4::from_shape_fn(dim, |(b, h, i, c)| {
        let x = ((b * 31 + h * 17 + i) * 131 + c * 7 + seed * 1009) as u64;
        let x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// The rows of a rank.
pub fn held<T: Clone>(x: ArrayView4<'_, T>, cut: &Cut, rank: usize) -> Array4<T> {
    x.select(Axis(2), &cut.positions(rank).collect::<Vec<_>>())
}

/// What may be off of a rank's rows.
pub fn bound(x: &Array3<f64>, cut: &Cut, rank: usize) -> Array3<f64> {
    x.select(Axis(2), &cut.positions(rank).collect::<Vec<_>>())
}

/// Cuts of all kinds, with empty shards and shards of very different lengths among them.
pub fn cuts(len: usize, ranks: usize) -> Vec<Cut> {
    let mut uneven = vec![vec![]; ranks];
    uneven[ranks - 1].push(0..len / 3);
    uneven[0].push(len / 3..len);
    vec![Cut::even(len, ranks), Cut::zigzag(len, ranks), Cut::of(uneven).unwrap()]
}

/// Cuts into runs in the order of ranks.
pub fn chains(len: usize, ranks: usize) -> Vec<Cut> {
    let mut first = vec![vec![]; ranks];
    first[ranks / 2].push(0..len);
    vec![Cut::even(len, ranks), Cut::of(first).unwrap()]
}

/// The largest difference, as a share of what is allowed for its row.
pub fn worst(got: &Array4<f32>, want: &Array4<f64>, allowed: impl Fn(usize, usize, usize) -> f64) -> f64 {
    assert_eq!(got.dim(), want.dim());
    got.indexed_iter()
        .map(|((b, h, i, c), &x)| {
            let off = (f64::from(x) - want[[b, h, i, c]]).abs() / allowed(b, h, i);
            if off.is_nan() { f64::INFINITY } else { off }
        })
        .fold(0.0, f64::max)
}
