//! Summaries of blocks of keys: a few rows that stand for many.

use crate::simd::any::AnyRows;
use crate::simd::{Isa, Kernel, Simd};

/// What a query is scored with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Summary {
    /// The first key of each block; with blocks of one key, the keys.
    First,
    /// The mean of the keys.
    Mean,
    /// The largest of each channel.
    Max,
    /// The largest and the smallest of each channel, one after the other. With
    /// a query's positive part and its negative part, one after the other, the
    /// product is the bound of Quest: no key of the block scores higher.
    MinMax,
}

/// Keys that are read at once.
pub(super) const CHUNK: usize = 64;

impl Summary {
    /// Elements of a row for keys of `head_dim`.
    pub fn width(self, head_dim: usize) -> usize {
        match self {
            Self::MinMax => head_dim.saturating_mul(2),
            _ => head_dim,
        }
    }

    /// `f32` that [`extend`](Self::extend) works in.
    pub(crate) fn room(head_dim: usize) -> usize {
        head_dim.saturating_mul(CHUNK)
    }

    /// A query as it is multiplied with a summary.
    pub(crate) fn query(self, query: &[f32], to: &mut [f32]) {
        match self {
            Self::MinMax => {
                let (positive, negative) = to.split_at_mut(query.len());
                for ((p, n), &x) in positive.iter_mut().zip(negative).zip(query) {
                    // NaN stays NaN in both.
                    (*p, *n) = if x < 0.0 {
                        (0.0, x)
                    } else if x > 0.0 {
                        (x, 0.0)
                    } else {
                        (x, x)
                    };
                }
            }
            _ => to[..query.len()].copy_from_slice(query),
        }
    }

    /// The rows of blocks of `unit` keys, given the keys from `from` on, whose
    /// block may have been begun: its row and, for a mean, its `sums` are those
    /// of the keys before. The same bits in any number of pieces.
    pub(crate) fn extend(self, isa: Isa, keys: AnyRows<'_>, call: Extend<'_>) {
        isa.dispatch(Extending { summary: self, keys, call });
    }
}

/// What [`Summary::extend`] is given besides the keys.
#[derive(Debug)]
pub(crate) struct Extend<'a> {
    /// The number of the first key.
    pub(crate) from: usize,
    pub(crate) unit: usize,
    pub(crate) head_dim: usize,
    /// All rows of the head, one after the other.
    pub(crate) rows: &'a mut [f32],
    /// For a mean, `head_dim` sums of the keys of the last block.
    pub(crate) sums: &'a mut [f32],
    pub(crate) room: &'a mut [f32],
}

struct Extending<'a> {
    summary: Summary,
    keys: AnyRows<'a>,
    call: Extend<'a>,
}

/// The larger (with `SIGN` -1 the smaller), NaN where either is NaN.
#[inline(always)]
fn extreme<const LARGEST: bool>(a: f32, b: f32) -> f32 {
    let further = if LARGEST { b > a } else { b < a };
    if further || b.is_nan() { b } else { a }
}

impl Kernel for Extending<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { summary, keys, call } = self;
        let Extend { from, unit, head_dim: d, rows, sums, room } = call;
        let width = summary.width(d);
        for first in (0..keys.len()).step_by(CHUNK) {
            let part = keys.part(first..(first + CHUNK).min(keys.len()));
            part.pack_rows(s, room, d);
            for t in 0..part.len() {
                let at = from + first + t;
                let (block, start) = (at / unit, at.is_multiple_of(unit));
                let key = &room[t * d..][..d];
                let row = &mut rows[block * width..][..width];
                match summary {
                    Summary::First => {
                        if start {
                            row.copy_from_slice(key);
                        }
                    }
                    Summary::Mean => {
                        if start {
                            sums[..d].fill(0.0);
                        }
                        let share = 1.0 / (at % unit + 1) as f32;
                        // Whoever reads a block sees it whole: its row is
                        // written when it ends, or when the keys do.
                        let last = (at + 1).is_multiple_of(unit) || first + t + 1 == keys.len();
                        for (sum, &x) in sums.iter_mut().zip(key) {
                            *sum += x;
                        }
                        if last {
                            for (mean, sum) in row.iter_mut().zip(&*sums) {
                                *mean = sum * share;
                            }
                        }
                    }
                    Summary::Max if start => row.copy_from_slice(key),
                    Summary::Max => {
                        for (most, &x) in row.iter_mut().zip(key) {
                            *most = extreme::<true>(*most, x);
                        }
                    }
                    Summary::MinMax => {
                        let (largest, smallest) = row.split_at_mut(d);
                        if start {
                            largest.copy_from_slice(key);
                            smallest.copy_from_slice(key);
                            continue;
                        }
                        for ((most, least), &x) in largest.iter_mut().zip(smallest).zip(key) {
                            *most = extreme::<true>(*most, x);
                            *least = extreme::<false>(*least, x);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::mem::Rows;

    fn keys(n: usize, d: usize) -> Vec<f32> {
        let mut keys: Vec<f32> = (0..n * d).map(|i| ((i * 7919 + 13) % 8191) as f32 / 128.0 - 32.0).collect();
        if n > 40 {
            keys[37 * d + 1] = f32::NAN;
            keys[20 * d] = f32::INFINITY;
        }
        keys
    }

    fn rows(isa: Isa, summary: Summary, x: &[f32], d: usize, unit: usize, cuts: &[usize]) -> Vec<f32> {
        let n = x.len() / d;
        let mut rows = vec![f32::NAN; n.div_ceil(unit) * summary.width(d)];
        let (mut sums, mut room) = (vec![f32::NAN; d], vec![f32::NAN; Summary::room(d)]);
        let mut from = 0;
        for &end in cuts.iter().chain(&[n]) {
            let part = AnyRows::F32(Rows::of_slice(&x[from * d..], end - from, d, d));
            let call = Extend { from, unit, head_dim: d, rows: &mut rows, sums: &mut sums, room: &mut room };
            summary.extend(isa, part, call);
            from = end;
        }
        rows
    }

    #[test]
    fn rows_are_what_they_stand_for_however_the_keys_come() {
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        for summary in [Summary::First, Summary::Mean, Summary::Max, Summary::MinMax] {
            for (n, d, unit) in [(0, 3, 4), (1, 5, 16), (100, 3, 16), (130, 20, 64), (67, 16, 1), (70, 2, 7)]
            {
                let x = keys(n, d);
                for isa in Isa::available() {
                    let whole = rows(isa, summary, &x, d, unit, &[]);
                    let cuts: Vec<usize> = (0..n).collect();
                    let pieces = rows(isa, summary, &x, d, unit, &cuts);
                    assert!(whole.iter().zip(&pieces).all(|(a, b)| same(*a, *b)), "{summary:?} {n} {unit}");
                    let coarse = rows(isa, summary, &x, d, unit, &[n / 3, n / 2]);
                    assert!(whole.iter().zip(&coarse).all(|(a, b)| same(*a, *b)), "{summary:?} {n} {unit}");
                    for block in 0..n.div_ceil(unit) {
                        let of = block * unit..((block + 1) * unit).min(n);
                        let row = &whole[block * summary.width(d)..][..summary.width(d)];
                        for c in 0..d {
                            let channel = || of.clone().map(|j| f64::from(x[j * d + c]));
                            let nan = channel().any(f64::is_nan);
                            let most = channel().fold(f64::NEG_INFINITY, f64::max);
                            let least = channel().fold(f64::INFINITY, f64::min);
                            let want = match summary {
                                Summary::First => f64::from(x[of.start * d + c]),
                                _ if nan => f64::NAN,
                                // Sums of multiples of 2^-7 are exact.
                                Summary::Mean => channel().sum::<f64>() / of.len() as f64,
                                _ => most,
                            };
                            let near = |got: f32, want: f64| {
                                same(got, want as f32) || (f64::from(got) - want).abs() <= 2e-7 * want.abs()
                            };
                            assert!(near(row[c], want), "{summary:?} {}: {want}", row[c]);
                            if summary == Summary::MinMax {
                                assert!(near(row[d + c], if nan { f64::NAN } else { least }));
                            }
                        }
                    }
                }
            }
        }
    }
}
