//! Numbers of few bits, and what is estimated with them.

use crate::simd::exp::exp2_flush;
use crate::simd::{Kernel, Simd};

/// Takes the mean off a row and rounds it to whole numbers from -7 to 7, ties to
/// even: returns what they are multiples of, 1 for a row of zeros.
pub(crate) struct Quantise<'a> {
    pub(crate) row: &'a mut [f32],
    pub(crate) mean: &'a [f32],
}

impl Kernel for Quantise<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Self { row, mean } = self;
        let mut most = s.splat(0.0);
        for (x, mean) in row.chunks_mut(S::LANES).zip(mean.chunks(S::LANES)) {
            let centred = s.sub(s.load_tail(x), s.load_tail(mean));
            most = s.max(s.abs(centred), most);
            s.store_tail(x, centred);
        }
        let most = s.reduce_max(most);
        let scale = if most == 0.0 { 1.0 } else { most / 7.0 };
        for x in row.chunks_mut(S::LANES) {
            let whole = s.round(s.div(s.load_tail(x), s.splat(scale)));
            s.store_tail(x, whole);
        }
        scale
    }
}

/// `ln sum exp(scale x)`; NaN where one is.
pub(crate) struct LogSum<'a> {
    pub(crate) row: &'a [f32],
    pub(crate) scale: f32,
}

impl Kernel for LogSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let lowest = s.splat(f32::NEG_INFINITY);
        let part = |part: &[f32]| {
            let valid = s.mask(u64::MAX >> (64 - part.len()));
            s.select(valid, s.mul(s.load_tail(part), s.splat(self.scale)), lowest)
        };
        let parts = self.row.chunks(S::LANES);
        let most = s.reduce_max(parts.clone().fold(lowest, |most, x| s.max(part(x), most)));
        let log2_e = s.splat(std::f32::consts::LOG2_E);
        let weight = |x| exp2_flush(s, s.mul(s.sub(part(x), s.splat(most)), log2_e));
        most + s.reduce_add(parts.fold(s.splat(0.0), |sum, x| s.add(sum, weight(x)))).ln()
    }
}

/// Sets the bits of tiles in which some `factor * scale_j * x_j + offset_j` is above
/// a limit.
pub(crate) struct Exceeding<'a> {
    pub(crate) row: &'a [f32],
    pub(crate) scales: &'a [f32],
    pub(crate) offsets: &'a [f32],
    pub(crate) factor: f32,
    pub(crate) limit: f32,
    /// A multiple of the lanes, which the row is of.
    pub(crate) tile: usize,
    pub(crate) bits: &'a mut [u64],
}

impl Kernel for Exceeding<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, scales, offsets, factor, limit, tile, bits } = self;
        let (factor, limit) = (s.splat(factor), s.splat(limit));
        let parts = row.chunks_exact(tile).zip(scales.chunks_exact(tile)).zip(offsets.chunks_exact(tile));
        for (v, ((row, scales), offsets)) in parts.enumerate() {
            let mut above = 0;
            for at in (0..tile).step_by(S::LANES) {
                let x = s.mul(s.mul(s.load(&row[at..]), s.load(&scales[at..])), factor);
                above |= s.bits(s.lt(limit, s.add(x, s.load(&offsets[at..]))));
            }
            bits[v / 64] |= u64::from(above != 0) << (v % 64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[test]
    fn rows_of_few_bits_and_their_sums() {
        for isa in Isa::available() {
            let mut row: Vec<f32> = (0..37).map(|i| ((i * 29) % 15) as f32 - 7.0 + 2.0).collect();
            let want: Vec<f32> = row.iter().map(|x| x - 2.0).collect();
            assert_eq!(isa.dispatch(Quantise { row: &mut row, mean: &[2.0; 37] }), 1.0);
            assert_eq!(row, want, "{isa}");
            assert_eq!(isa.dispatch(Quantise { row: &mut [3.0; 5], mean: &[3.0; 5] }), 1.0);
            let sum: f64 = want.iter().map(|&x| (0.25 * f64::from(x)).exp()).sum();
            let got = isa.dispatch(LogSum { row: &want, scale: 0.25 });
            assert!((f64::from(got) - sum.ln()).abs() < 1e-6, "{isa}: {got}");
            let (mut row, mut bits) = (vec![1.0; 96], [0]);
            row[40] = 3.5;
            let (scales, offsets) = (&[2.0; 96], &[1.0; 96]);
            let call =
                Exceeding { row: &row, scales, offsets, factor: 1.0, limit: 7.5, tile: 32, bits: &mut bits };
            isa.dispatch(call);
            assert_eq!(bits, [0b10], "{isa}");
        }
    }
}
