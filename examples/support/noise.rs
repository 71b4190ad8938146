//! Numbers to fill arrays with.

/// Numbers that are normal, nearly, from a seed: SplitMix64, the sum of four
/// uniform 16-bit parts.
pub fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let z = z ^ (z >> 31);
        let sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
        // Mean 2 * 65535, variance 65536^2 / 3.
        (sum as f32 - 131_070.0) * (3f32.sqrt() / 65_536.0)
    }
}
