//! Random numbers that are the same on every machine: what random features
//! are drawn from.

/// Normal random numbers from a seed: SplitMix64 and the Box-Muller
/// transform, in `f64`.
///
/// ```
/// use attention_kernels::math::random::Normal;
///
/// let draw = |seed| Normal::new(seed).take(1000).collect::<Vec<f64>>();
/// assert_eq!(draw(1), draw(1));
/// assert!(draw(2).iter().sum::<f64>().abs() < 120.0);
/// ```
#[derive(Clone, Debug)]
pub struct Normal {
    state: u64,
    /// The second number of a pair.
    spare: Option<f64>,
}

impl Normal {
    /// The numbers that belong to a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, spare: None }
    }

    /// SplitMix64: the next word.
    fn word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.word() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }
}

impl Iterator for Normal {
    type Item = f64;

    /// Never ends.
    fn next(&mut self) -> Option<f64> {
        if let Some(spare) = self.spare.take() {
            return Some(spare);
        }
        let radius = (-2.0 * self.unit().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.unit()).sin_cos();
        self.spare = Some(radius * sin);
        Some(radius * cos)
    }
}

/// Signs of a fixed random rotation.
pub(crate) fn signs(n: usize) -> Vec<f32> {
    let mut words = Normal::new(0x5eed);
    (0..n).map(|_| if words.word() >> 63 == 0 { 1.0 } else { -1.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::Normal;

    #[test]
    fn moments_are_those_of_a_normal_distribution() {
        let x: Vec<f64> = Normal::new(3).take(200_000).collect();
        let moment = |power: i32| x.iter().map(|x| x.powi(power)).sum::<f64>() / x.len() as f64;
        // Standard errors: sqrt(1), sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
        for (power, want, spread) in [(1, 0.0, 1.0), (2, 1.0, 1.42), (3, 0.0, 3.9), (4, 3.0, 9.8)] {
            let off = (moment(power) - want).abs();
            assert!(off < 4.0 * spread / (x.len() as f64).sqrt(), "moment {power} is off by {off}");
        }
    }
}
