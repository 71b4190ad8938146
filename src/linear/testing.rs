//! What the tests of the linear mechanisms share.

use ndarray::Array4;

/// Numbers from -1 to 1, the same ones for the same seed.
pub(crate) fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Rows of unit length.
pub(crate) fn unit(mut x: Array4<f32>) -> Array4<f32> {
    for mut row in x.rows_mut() {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
        row.mapv_inplace(|x| x / norm);
    }
    x
}

/// Pieces of `len` tokens, of uneven sizes: empty ones, single tokens, and
/// more than a chunk.
pub(crate) fn cuts(len: usize) -> Vec<std::ops::Range<usize>> {
    let mut ends: Vec<usize> = [0, 1, 2, 2, 35, 36, 104].into_iter().filter(|&end| end < len).collect();
    ends.push(len);
    ends.windows(2).map(|pair| pair[0]..pair[1]).chain((len == 0).then_some(0..0)).collect()
}
