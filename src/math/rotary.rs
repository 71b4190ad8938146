//! Rotary position embedding (RoPE).
//!
//! ```text
//! (x_a, x_b) -> (x_a cos pf - x_b sin pf, x_b cos pf + x_a sin pf)
//! ```
//!
//! for each pair of channels with its frequency `f`, at position `p`. From
//! "RoFormer" (arXiv 2104.09864). Products of two rotated rows depend on the
//! difference of their positions alone.

use crate::error::{Error, Result};

/// Which channels are rotated, and how fast.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    frequencies: Vec<f64>,
    neighbours: bool,
    last: bool,
}

impl Rotary {
    /// The first `channels` of a row with frequencies `base^(-2 c / channels)`,
    /// channel `c` of the first half with that of the second.
    ///
    /// # Errors
    /// [`Error::Value`] for an odd number of channels or a base that is not
    /// positive.
    pub fn new(base: f64, channels: usize) -> Result<Self> {
        if !channels.is_multiple_of(2) {
            return Err(Error::value("channels", "an even number", channels));
        }
        if !(base.is_finite() && base > 0.0) {
            return Err(Error::value("base", "a positive number", base));
        }
        let frequency = |c: usize| base.powf(-2.0 * c as f64 / channels as f64);
        Self::of_frequencies((0..channels / 2).map(frequency).collect())
    }

    /// The same with the frequencies of the pairs (of YaRN, say).
    ///
    /// # Errors
    /// [`Error::Value`] for one that is not finite.
    pub fn of_frequencies(frequencies: Vec<f64>) -> Result<Self> {
        if let Some(f) = frequencies.iter().find(|f| !f.is_finite()) {
            return Err(Error::value("frequencies", "finite numbers", f));
        }
        Ok(Self { frequencies, neighbours: false, last: false })
    }

    /// Pairs are neighbouring channels.
    pub fn neighbours(self) -> Self {
        Self { neighbours: true, ..self }
    }

    /// The last channels of a row instead of the first.
    pub fn last(self) -> Self {
        Self { last: true, ..self }
    }

    /// Channels that are rotated.
    pub fn channels(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Sines and cosines at a position.
    pub(crate) fn angles(&self, position: f64) -> impl Iterator<Item = (f64, f64)> {
        self.frequencies.iter().map(move |f| (position * f).sin_cos())
    }

    /// The two channels of pair `c` in a row of `dim`.
    #[inline(always)]
    pub(crate) fn pair(&self, c: usize, dim: usize) -> (usize, usize) {
        let start = if self.last { dim - self.channels() } else { 0 };
        if self.neighbours {
            (start + 2 * c, start + 2 * c + 1)
        } else {
            (start + c, start + c + self.frequencies.len())
        }
    }

    /// Rotates a row by angles of which sine and cosine follow each other.
    #[inline(always)]
    pub(crate) fn turn(&self, angles: &[f32], row: &mut [f32]) {
        for (c, angle) in angles.chunks_exact(2).enumerate() {
            let ((sin, cos), (i, j)) = ((angle[0], angle[1]), self.pair(c, row.len()));
            let (a, b) = (row[i], row[j]);
            (row[i], row[j]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }

    /// Refuses rows of fewer channels.
    pub(crate) fn check(&self, dim: usize) -> Result<()> {
        if self.channels() <= dim {
            return Ok(());
        }
        Err(Error::value("rotary", format!("at most {dim} channels, those of a row"), self.channels()))
    }

    /// Rotates a row, by definition.
    pub(crate) fn define(&self, position: f64, row: &mut [f64]) {
        for (c, (sin, cos)) in self.angles(position).enumerate() {
            let (i, j) = self.pair(c, row.len());
            let (a, b) = (row[i], row[j]);
            (row[i], row[j]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_depend_on_differences_alone() {
        let layouts =
            |rotary: Rotary| [rotary.clone(), rotary.clone().neighbours(), rotary.last().neighbours()];
        for rotary in layouts(Rotary::new(100.0, 6).unwrap()) {
            let rotated = |x: [f64; 8], p: f64| {
                let mut row = x.to_vec();
                rotary.define(p, &mut row);
                row
            };
            let (a, b) = ([1., 2., -3., 4., 5., 6., 7., 8.], [0.5, -1., 2., 1., -2., 3., 1., 4.]);
            let dot =
                |p: f64, q: f64| -> f64 { rotated(a, p).iter().zip(rotated(b, q)).map(|(x, y)| x * y).sum() };
            assert!((dot(3.0, 1.0) - dot(103.0, 101.0)).abs() < 1e-9);
            assert!((dot(3.0, 1.0) - dot(3.0, 2.0)).abs() > 1e-3);
            let angles: Vec<_> = rotary.angles(3.0).flat_map(|(s, c)| [s as f32, c as f32]).collect();
            let mut row = a.map(|x| x as f32);
            rotary.turn(&angles, &mut row);
            assert!(row.iter().zip(rotated(a, 3.0)).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-5));
        }
        let first = Rotary::new(100.0, 6).unwrap();
        let mut row = [1.0; 8];
        first.define(1.0, &mut row);
        assert!(row[..6].iter().all(|&x| x != 1.0) && row[6..] == [1.0; 2]);
        assert!(Rotary::new(1.0, 3).is_err() && Rotary::new(-1.0, 2).is_err() && first.check(5).is_err());
    }
}
