//! What the tests of the linear mechanisms share.

pub(crate) mod arrays;
pub(crate) mod gradients;
pub(crate) mod qkv;

use std::ops::Range;

use ndarray::{Array3, Array4};

use crate::attention::{Bounded, Input};
use crate::element::{DType, Element};

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

/// What a place sees of an axis: of the axis, the place and the size.
type Reach = fn(usize, usize, usize) -> Range<usize>;
/// Ranges on each axis whose ends do not fall: everything, single places, windows,
/// empty ones.
pub(crate) const REACHES: [Reach; 5] = [
    |_, _, size| 0..size,
    |_, at, _| at..at + 1,
    |axis, at, size| at.saturating_sub(1 + axis)..(at + 2).min(size),
    |axis, at, size| (at / (axis + 2) * 2).min(size)..size.min(at / 2 * 2 + 2),
    |axis, at, _| if axis == 2 { 0..0 } else { 0..at },
];

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
pub(crate) fn cuts(len: usize) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = [0, 1, 2, 2, 35, 36, 104].into_iter().filter(|&end| end < len).collect();
    ends.push(len);
    ends.windows(2).map(|pair| pair[0]..pair[1]).chain((len == 0).then_some(0..0)).collect()
}

/// Numbers from -1 to 1.
pub(crate) fn array(shape: [usize; 4], seed: u64) -> Array4<f32> {
    Array4::from_shape_simple_fn(shape, noise(seed))
}

/// How strong decays are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gates {
    Zero,
    Mild,
    Strong,
    /// Now and then everything is forgotten.
    Cut,
}

pub(crate) const GATES: [Gates; 4] = [Gates::Zero, Gates::Mild, Gates::Strong, Gates::Cut];

impl Gates {
    fn log_decay(self, x: f32) -> f32 {
        match self {
            Self::Zero => 0.0,
            Self::Mild => -0.1 * x.abs(),
            Self::Strong => -12.0 * x * x,
            Self::Cut if x > 0.95 => f32::NEG_INFINITY,
            Self::Cut if x > 0.9 => -1e4,
            Self::Cut => -0.5 * x.abs(),
        }
    }

    /// Log decays for each channel.
    pub(crate) fn channels(self, shape: [usize; 4], seed: u64) -> Array4<f32> {
        array(shape, seed).mapv(|x| self.log_decay(x))
    }

    /// Log decays for each token.
    pub(crate) fn tokens(self, shape: [usize; 3], seed: u64) -> Array3<f32> {
        Array3::from_shape_simple_fn(shape, noise(seed)).mapv(|x| self.log_decay(x))
    }
}

/// Sequence lengths around those of chunks, whichever way they are gone
/// through.
pub(crate) const LENGTHS: [usize; 10] = [0, 1, 31, 32, 33, 101, 63, 64, 65, 197];

/// Holds outputs against a definition; returns the largest share of the bound.
pub(crate) fn within<T: Element>(
    what: &str,
    got: &Array4<T>,
    want: &Array4<f64>,
    bound: &Array3<f64>,
) -> f64 {
    assert_eq!(got.dim(), want.dim(), "{what}");
    let mut worst = 0f64;
    for ((b, h, t, c), x) in got.indexed_iter() {
        let (want, bound) = (want[[b, h, t, c]], bound[[b, h, t]]);
        let rounding = match T::DTYPE {
            DType::F32 => 0.0,
            _ => T::ROUNDING * want.abs() + 3e-8,
        };
        let (off, bound) = ((x.to_f64() - want).abs(), bound + rounding);
        let x = x.to_f64();
        assert!(off <= bound, "{what}: [{b}, {h}, {t}, {c}] is {x:e}, not {want:e}: {off:e} off, {bound:e}");
        if bound > 0.0 {
            worst = worst.max(off / bound);
        }
    }
    worst
}

/// The kernel keeps to the definition; returns the largest share of the bound.
pub(crate) fn keeps<X: Input, M: Bounded<X>>(what: &str, mechanism: &M, x: X) -> f64 {
    let (want, bound) = (mechanism.reference(x).unwrap(), mechanism.error_bound(x).unwrap());
    within(what, &mechanism.forward(x).unwrap(), &want, &bound)
}

/// `sum_{j <= i} weight(batch, head, i, j) v_j`: the form with all pairs.
pub(crate) fn pairs(v: &Array4<f32>, weight: impl Fn(usize, usize, usize, usize) -> f64) -> Array4<f64> {
    Array4::from_shape_fn(v.dim(), |(b, h, i, c)| {
        (0..=i).map(|j| weight(b, h, i, j) * f64::from(v[[b, h, j, c]])).sum()
    })
}

/// Two results in `f64` that differ by rounding alone.
pub(crate) fn agree(a: &Array4<f64>, b: &Array4<f64>) {
    assert_eq!(a.dim(), b.dim());
    let size = b.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= 1e-11 * size, "{a:e} and {b:e}");
    }
}
