//! Rotary position embedding (RoPE), with the ways in use to stretch it.
//!
//! ```text
//! (a, b) -> (a cos(p f_i) - b sin(p f_i), a sin(p f_i) + b cos(p f_i))    pair i of dim / 2, position p
//! f_i = theta^(-2 i / dim)
//! ```
//!
//! "RoFormer" (arXiv 2104.09864). The dot product of two rotated rows depends
//! on the difference of their positions alone. What scales the frequencies:
//!
//! | | `f_i` becomes | source |
//! |---|---|---|
//! | [`Scaling::Linear`] | `f_i / factor` | arXiv 2306.15595 |
//! | [`Scaling::Ntk`] | that of `theta factor^(dim / (dim - 2))` | "NTK-aware scaled RoPE" |
//! | [`Scaling::Yarn`] | between `f_i` and `f_i / factor`, by how often it turns in the original length | arXiv 2309.00071 |
//! | [`Scaling::Llama3`] | as YaRN, with a ramp over the number of turns | arXiv 2407.21783 |
//! | [`Scaling::PerFrequency`] | `f_i / factors_i` (LongRoPE, `rope_freqs` of GGUF files) | arXiv 2402.13753 |
//!
//! Cost: `3 dim` flops a row, and a sine and a cosine a position and
//! frequency, taken in `f64`.

use std::f64::consts::TAU;

use ndarray::{Array4, ArrayView4, ArrayViewMut4, Axis, s};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::simd::storage::Storage;
use crate::simd::{Isa, Kernel, Simd};

/// Which elements of a row are a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pairs {
    /// `i` and `i + dim / 2`: GPT-NeoX, Llama in Hugging Face's layout.
    #[default]
    Halves,
    /// `2 i` and `2 i + 1`: the paper, Llama as released, DeepSeek.
    Neighbours,
}

/// How frequencies are stretched for longer texts than were trained on.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Scaling {
    /// Not at all.
    #[default]
    None,
    /// Positions are divided by a factor.
    Linear(f64),
    /// The base grows, so that the slowest frequency is divided by the factor
    /// and the fastest stays.
    Ntk(f64),
    /// Frequencies that turn more than `fast` times in `original` tokens stay,
    /// those that turn less than `slow` times are divided by `factor`. Models
    /// also lengthen queries and keys: [`yarn_magnitude`], or a scale of the
    /// score.
    Yarn {
        /// How many times longer the text is.
        factor: f64,
        /// Tokens that the model was trained on.
        original: f64,
        /// `beta_fast`, 32 in most models.
        fast: f64,
        /// `beta_slow`, 1 in most models.
        slow: f64,
    },
    /// As Llama 3.1 has it: with a ramp from `low` to `high` turns.
    Llama3 {
        /// How many times longer the text is.
        factor: f64,
        /// Tokens that the model was trained on.
        original: f64,
        /// `low_freq_factor`, 1.
        low: f64,
        /// `high_freq_factor`, 4.
        high: f64,
    },
    /// What each frequency is divided by.
    PerFrequency(Vec<f64>),
}

/// What YaRN multiplies rotated queries and keys with: `0.1 ln(factor) + 1`.
pub fn yarn_magnitude(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// A rotation of rows by their positions.
///
/// ```
/// use attention_kernels::math::rope::{Pairs, Rope};
/// use ndarray::Array4;
///
/// let rope = Rope::builder(64).theta(500_000.0).pairs(Pairs::Neighbours).build()?;
/// let mut k = Array4::<f32>::ones((1, 8, 3, 128)); // the first 64 elements of each row turn
/// rope.rotate(k.view_mut(), &[100, 101, 102])?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    frequencies: Vec<f64>,
    magnitude: f64,
    pairs: Pairs,
    last: bool,
    isa: Isa,
}

/// Builds a [`Rope`].
#[derive(Clone, Debug)]
pub struct RopeBuilder {
    dim: usize,
    theta: f64,
    pairs: Pairs,
    scaling: Scaling,
    magnitude: f64,
    last: bool,
    isa: Option<Isa>,
}

impl RopeBuilder {
    /// The base of the frequencies. Default: 10,000.
    pub fn theta(self, theta: f64) -> Self {
        Self { theta, ..self }
    }

    /// Which elements are a pair. Default: [`Pairs::Halves`].
    pub fn pairs(self, pairs: Pairs) -> Self {
        Self { pairs, ..self }
    }

    /// How frequencies are stretched. Default: not at all.
    pub fn scaling(self, scaling: Scaling) -> Self {
        Self { scaling, ..self }
    }

    /// A factor of the rotated elements. Default: 1.
    pub fn magnitude(self, magnitude: f64) -> Self {
        Self { magnitude, ..self }
    }

    /// Rotates the last `dim` elements of each row (DeepSeek's latent layers),
    /// not the first.
    pub fn last(self) -> Self {
        Self { last: true, ..self }
    }

    /// Forces an instruction set.
    pub fn isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for an odd `dim`, a base or a factor that is not finite
    /// and above 0, as many factors as there are no frequencies, a ramp that
    /// does not rise, [`Error::Isa`] for an instruction set that the CPU lacks.
    pub fn build(self) -> Result<Rope> {
        let Self { dim, theta, pairs, scaling, magnitude, last, isa } = self;
        if !dim.is_multiple_of(2) {
            return Err(Error::value("dim", "an even number of elements", dim));
        }
        let positive = |argument, x: f64| match x.is_finite() && x > 0.0 {
            true => Ok(x),
            false => Err(Error::value(argument, "a finite number above 0", x)),
        };
        positive("theta", theta)?;
        positive("magnitude", magnitude)?;
        let half = dim / 2;
        let of = |theta: f64, i: usize| theta.powf(-2.0 * i as f64 / dim as f64);
        let frequencies: Vec<f64> = match scaling {
            Scaling::None => (0..half).map(|i| of(theta, i)).collect(),
            Scaling::Linear(factor) => {
                positive("factor", factor)?;
                (0..half).map(|i| of(theta, i) / factor).collect()
            }
            Scaling::Ntk(factor) => {
                positive("factor", factor)?;
                // A single frequency of 1 has no slowest one.
                let power = if dim > 2 { dim as f64 / (dim - 2) as f64 } else { 0.0 };
                (0..half).map(|i| of(theta * factor.powf(power), i)).collect()
            }
            Scaling::Yarn { factor, original, fast, slow } => {
                for (argument, x) in
                    [("factor", factor), ("original", original), ("fast", fast), ("slow", slow)]
                {
                    positive(argument, x)?;
                }
                if fast <= slow {
                    return Err(Error::value("fast", format!("more turns than slow, {slow}"), fast));
                }
                // The index of the frequency that turns so often.
                let turning = |turns: f64| dim as f64 * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
                let low = turning(fast).floor().max(0.0);
                let high = turning(slow).ceil().min(dim.saturating_sub(1) as f64);
                let span = if high > low { high - low } else { 0.001 };
                let kept = |i: usize| 1.0 - ((i as f64 - low) / span).clamp(0.0, 1.0);
                (0..half).map(|i| of(theta, i) * (kept(i) + (1.0 - kept(i)) / factor)).collect()
            }
            Scaling::Llama3 { factor, original, low, high } => {
                for (argument, x) in
                    [("factor", factor), ("original", original), ("low", low), ("high", high)]
                {
                    positive(argument, x)?;
                }
                if high <= low {
                    return Err(Error::value("high", format!("more turns than low, {low}"), high));
                }
                let kept = |f: f64| ((original * f / TAU - low) / (high - low)).clamp(0.0, 1.0);
                let scaled = |f: f64| f * (kept(f) + (1.0 - kept(f)) / factor);
                (0..half).map(|i| scaled(of(theta, i))).collect()
            }
            Scaling::PerFrequency(factors) => {
                if factors.len() != half {
                    let expected = format!("one for each of the {half} frequencies");
                    return Err(Error::value("factors", expected, factors.len()));
                }
                factors.iter().try_for_each(|&x| positive("factors", x).map(drop))?;
                factors.iter().enumerate().map(|(i, factor)| of(theta, i) / factor).collect()
            }
        };
        Ok(Rope { frequencies, magnitude, pairs, last, isa: Isa::choose(isa)? })
    }
}

impl Rope {
    /// Rotates `dim` elements of each row, the first ones by default.
    pub fn builder(dim: usize) -> RopeBuilder {
        RopeBuilder {
            dim,
            theta: 10_000.0,
            pairs: Pairs::default(),
            scaling: Scaling::None,
            magnitude: 1.0,
            last: false,
            isa: None,
        }
    }

    /// Of these frequencies, in radians a position, one for each pair: what a
    /// conversion keeps.
    ///
    /// # Errors
    /// [`Error::Value`] for one that is not finite.
    pub fn of(frequencies: Vec<f64>, pairs: Pairs) -> Result<Self> {
        match frequencies.iter().find(|f| !f.is_finite()) {
            Some(f) => Err(Error::value("frequencies", "finite numbers", f)),
            None => Ok(Self { frequencies, magnitude: 1.0, pairs, last: false, isa: Isa::choose(None)? }),
        }
    }

    /// Elements of a row that turn.
    pub fn dim(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Radians a position, one for each pair.
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// Rotates rows, `[batch, heads, len, head_dim]`, in place: row `t` of every
    /// sequence is at `positions[t]`, or with `batch * len` positions each
    /// sequence has its own. Arithmetic is `f32`, rounded once. The other
    /// elements stay.
    ///
    /// # Errors
    /// [`Error::Shape`] for rows of fewer than `dim` elements, [`Error::Value`]
    /// for another number of positions.
    pub fn rotate<T: Element>(&self, x: ArrayViewMut4<'_, T>, positions: &[isize]) -> Result<()> {
        self.check(x.dim(), positions)?;
        let turns = Turns::new(self, positions);
        let start = self.start(x.dim().3);
        let x = x.slice_move(s![.., .., .., start..start + self.dim()]);
        let mut row = vec![T::default(); if x.strides()[3] == 1 { 0 } else { self.dim() }];
        self.isa.dispatch(TurnAll { x, turns: &turns, row: &mut row });
        Ok(())
    }

    /// The definition of [`rotate`](Self::rotate), in `f64`.
    ///
    /// # Errors
    /// As there.
    pub fn reference<T: Element>(&self, x: ArrayView4<'_, T>, positions: &[isize]) -> Result<Array4<f64>> {
        self.check(x.dim(), positions)?;
        let mut out = x.mapv(Element::to_f64);
        let len = x.dim().2;
        for ((b, _, t), mut row) in
            ndarray::indices((x.dim().0, x.dim().1, len)).into_iter().zip(out.lanes_mut(Axis(3)))
        {
            let at = if positions.len() == len { t } else { b * len + t };
            let mut turned = row.to_vec();
            self.define(positions[at] as f64, &mut turned);
            row.iter_mut().zip(turned).for_each(|(to, x)| *to = x);
        }
        Ok(out)
    }

    /// Sines and cosines of the pairs at a position.
    pub(crate) fn angles(&self, position: f64) -> impl Iterator<Item = (f64, f64)> {
        let of = |(sin, cos)| (self.magnitude * sin, self.magnitude * cos);
        self.frequencies.iter().map(move |f| of((position * f).sin_cos()))
    }

    /// The first element that turns in a row of `cols`.
    pub(crate) fn start(&self, cols: usize) -> usize {
        if self.last { cols - self.dim() } else { 0 }
    }

    /// The two elements of pair `i` in a row of `cols`.
    #[inline(always)]
    pub(crate) fn pair(&self, i: usize, cols: usize) -> (usize, usize) {
        let start = self.start(cols);
        match self.pairs {
            Pairs::Halves => (start + i, start + i + self.frequencies.len()),
            Pairs::Neighbours => (start + 2 * i, start + 2 * i + 1),
        }
    }

    /// Turns one row by angles of which sine and cosine follow each other.
    #[inline(always)]
    pub(crate) fn turn(&self, angles: &[f32], row: &mut [f32]) {
        for (i, angle) in angles.chunks_exact(2).enumerate() {
            let ((sin, cos), (a, b)) = ((angle[0], angle[1]), self.pair(i, row.len()));
            let (x, y) = (row[a], row[b]);
            (row[a], row[b]) = (x * cos - y * sin, x * sin + y * cos);
        }
    }

    /// Turns one row to a position, by definition.
    pub(crate) fn define(&self, position: f64, row: &mut [f64]) {
        for (i, (sin, cos)) in self.angles(position).enumerate() {
            let (a, b) = self.pair(i, row.len());
            let (x, y) = (row[a], row[b]);
            (row[a], row[b]) = (x * cos - y * sin, x * sin + y * cos);
        }
    }

    /// Refuses rows of fewer elements.
    pub(crate) fn fits(&self, cols: usize) -> Result<()> {
        match self.dim() <= cols {
            true => Ok(()),
            false => {
                Err(Error::value("rope", format!("at most {cols} elements, those of a row"), self.dim()))
            }
        }
    }

    fn check(&self, dim: (usize, usize, usize, usize), positions: &[isize]) -> Result<()> {
        let (batch, heads, len, cols) = dim;
        if cols < self.dim() {
            let expected = format!("[batch, heads, len, dim] with a dim of at least {}", self.dim());
            return Err(Error::shape("x", expected, &[batch, heads, len, cols]));
        }
        if positions.len() != len && Some(positions.len()) != batch.checked_mul(len) {
            let expected =
                format!("one for each of the {len} rows, or for each of the rows of every sequence");
            return Err(Error::value("positions", expected, positions.len()));
        }
        Ok(())
    }
}

/// Cosines and sines of positions, as vectors of elements meet them.
#[doc(hidden)]
#[derive(Clone, Debug)]
pub struct Turns {
    pairs: Pairs,
    /// Numbers a position: those of the halves, or of all elements, where the
    /// sine of the first of two neighbours is negative.
    width: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Turns {
    pub(crate) fn new(rope: &Rope, positions: &[isize]) -> Self {
        let copies = if rope.pairs == Pairs::Halves { 1 } else { 2 };
        let width = copies * rope.frequencies.len();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for &position in positions {
            for (s, c) in rope.angles(position as f64) {
                let (s, c) = (s as f32, c as f32);
                cos.extend(std::iter::repeat_n(c, copies));
                sin.extend_from_slice(&[-s, s][2 - copies..]);
            }
        }
        Self { pairs: rope.pairs, width, cos, sin }
    }

    /// Bytes of the table.
    pub(crate) fn bytes(&self) -> usize {
        (self.cos.len() + self.sin.len()) * size_of::<f32>()
    }

    /// Turns a row to the position of some index.
    #[inline(always)]
    pub(crate) fn turn<S: Simd, T: Storage>(&self, s: S, row: &mut [T], at: usize) {
        let span = at * self.width..(at + 1) * self.width;
        let (cos, sin) = (&self.cos[span.clone()], &self.sin[span]);
        match self.pairs {
            Pairs::Halves => {
                let (a, b) = row[..2 * self.width].split_at_mut(self.width);
                let vectors = a.chunks_mut(S::LANES).zip(b.chunks_mut(S::LANES));
                for ((a, b), (cos, sin)) in vectors.zip(cos.chunks(S::LANES).zip(sin.chunks(S::LANES))) {
                    let (x, y) = (T::load_tail(s, a), T::load_tail(s, b));
                    let (cos, sin) = (s.load_tail(cos), s.load_tail(sin));
                    T::store_tail(s, a, s.mul_sub(x, cos, s.mul(y, sin)));
                    T::store_tail(s, b, s.mul_add(x, sin, s.mul(y, cos)));
                }
            }
            Pairs::Neighbours => {
                let tables = cos.chunks(S::LANES).zip(sin.chunks(S::LANES));
                for (a, (cos, sin)) in row[..self.width].chunks_mut(S::LANES).zip(tables) {
                    let x = T::load_tail(s, a);
                    let turned = s.mul(s.swap(x, 1), s.load_tail(sin));
                    T::store_tail(s, a, s.mul_add(x, s.load_tail(cos), turned));
                }
            }
        }
    }
}

/// Turns every row of an array.
struct TurnAll<'a, T> {
    x: ArrayViewMut4<'a, T>,
    turns: &'a Turns,
    /// A row whose elements are neighbours, for those whose are not.
    row: &'a mut [T],
}

impl<T: Storage> Kernel for TurnAll<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let len = self.x.dim().2;
        let positions = self.turns.cos.len().checked_div(self.turns.width).unwrap_or(0);
        for (b, mut heads) in self.x.axis_iter_mut(Axis(0)).enumerate() {
            for (i, mut row) in heads.rows_mut().into_iter().enumerate() {
                let t = i % len;
                let at = if positions == len { t } else { b * len + t };
                if self.row.is_empty() {
                    self.turns.turn(s, row.as_slice_mut().unwrap_or_default(), at);
                    continue;
                }
                self.row.iter_mut().zip(&row).for_each(|(to, x)| *to = *x);
                self.turns.turn(s, self.row, at);
                row.iter_mut().zip(&*self.row).for_each(|(to, x)| *to = *x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use ndarray::Array4;

    use super::*;
    use crate::testing::noise;

    fn scalings(half: usize) -> Vec<Scaling> {
        vec![
            Scaling::None,
            Scaling::Linear(4.0),
            Scaling::Ntk(8.0),
            Scaling::Yarn { factor: 16.0, original: 64.0, fast: 32.0, slow: 1.0 },
            Scaling::Llama3 { factor: 8.0, original: 128.0, low: 1.0, high: 4.0 },
            Scaling::PerFrequency((0..half).map(|i| 1.0 + i as f64).collect()),
        ]
    }

    #[test]
    fn kernel_keeps_to_the_definition() {
        for (dim, cols) in [(0, 3), (2, 2), (6, 9), (32, 32), (70, 80), (128, 128)] {
            for (scaling, pairs) in scalings(dim / 2)
                .into_iter()
                .flat_map(|s| [(s.clone(), Pairs::Halves), (s, Pairs::Neighbours)])
            {
                for isa in Isa::available() {
                    let builder = Rope::builder(dim).pairs(pairs).scaling(scaling.clone()).magnitude(1.25);
                    let rope = builder.isa(isa).build().unwrap();
                    let x = Array4::from_shape_simple_fn((2, 3, 5, cols), noise(1));
                    let positions = [0, 1, 7, -3, 100_000];
                    let (mut got, want) = (x.clone(), rope.reference(x.view(), &positions).unwrap());
                    rope.rotate(got.view_mut(), &positions).unwrap();
                    for (got, want) in got.iter().zip(&want) {
                        assert!((f64::from(*got) - want).abs() < 5e-7, "{isa} {pairs:?}: {got} for {want}");
                    }
                    // Elements that lie anyhow, each sequence at its own positions.
                    let mut wide = Array4::<f32>::zeros((2, 3, cols, 5));
                    let mut turned = wide.view_mut().permuted_axes([0, 1, 3, 2]);
                    turned.assign(&x);
                    let own = [positions, positions].concat();
                    rope.rotate(turned.view_mut(), &own).unwrap();
                    assert_eq!(turned, got);
                    let mut half = x.mapv(bf16::from_f32);
                    let want = rope.reference(half.view(), &positions).unwrap();
                    rope.rotate(half.view_mut(), &positions).unwrap();
                    for (got, want) in half.iter().zip(&want) {
                        assert!((got.to_f64() - want).abs() < 0.005 * want.abs() + 5e-7);
                    }
                }
            }
        }
    }

    /// Scores depend on the distance of positions, and layouts are the same
    /// rows in another order.
    #[test]
    fn scores_depend_on_distance() {
        let x = Array4::from_shape_simple_fn((1, 1, 2, 16), noise(2));
        for scaling in scalings(8) {
            let rope = |pairs| Rope::builder(16).pairs(pairs).scaling(scaling.clone()).build().unwrap();
            let score = |rope: &Rope, x: &Array4<f32>, at: [isize; 2]| {
                let x = rope.reference(x.view(), &at).unwrap();
                (0..16).map(|c| x[[0, 0, 0, c]] * x[[0, 0, 1, c]]).sum::<f64>()
            };
            let halves = rope(Pairs::Halves);
            let near = score(&halves, &x, [5, 3]);
            assert!((near - score(&halves, &x, [105, 103])).abs() < 1e-12);
            assert!((near - score(&halves, &x, [5, 4])).abs() > 1e-3);
            let order: Vec<usize> = (0..16).map(|c| c / 2 + c % 2 * 8).collect();
            let paired = x.select(Axis(3), &order);
            assert!((near - score(&rope(Pairs::Neighbours), &paired, [5, 3])).abs() < 1e-12);
        }
    }

    #[test]
    fn last_elements_turn_as_the_first_do() {
        let x = Array4::from_shape_simple_fn((1, 2, 3, 10), noise(3));
        for pairs in [Pairs::Halves, Pairs::Neighbours] {
            let rope = Rope::builder(6).pairs(pairs).magnitude(2.0);
            let (first, last) = (rope.clone().build().unwrap(), rope.last().build().unwrap());
            let (mut got, mut want) = (x.clone(), x.clone());
            last.rotate(got.view_mut(), &[4, 5, 6]).unwrap();
            first.rotate(want.slice_mut(s![.., .., .., 4..]), &[4, 5, 6]).unwrap();
            assert_eq!(got, want);
            let exact = last.reference(x.view(), &[4, 5, 6]).unwrap();
            assert!(got.iter().zip(&exact).all(|(got, want)| (f64::from(*got) - want).abs() < 1e-6));
        }
    }

    #[test]
    fn scalings_are_what_they_say() {
        let frequencies = |scaling| Rope::builder(64).scaling(scaling).build().unwrap().frequencies;
        let plain = frequencies(Scaling::None);
        assert_eq!((plain[0], plain[16]), (1.0, 0.01));
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-12, "{a} for {b}");
        let ntk = frequencies(Scaling::Ntk(8.0));
        near(ntk[0], 1.0);
        near(ntk[31], plain[31] / 8.0);
        // 4,096 tokens turn 1.02 times at index 23 of DeepSeek's 64 elements,
        // and 32 times between 10 and 11.
        let yarn = frequencies(Scaling::Yarn { factor: 40.0, original: 4096.0, fast: 32.0, slow: 1.0 });
        for i in 0..32 {
            let kept = (1.0 - (i as f64 - 10.0) / 13.0).clamp(0.0, 1.0);
            near(yarn[i], plain[i] * (kept + (1.0 - kept) / 40.0));
        }
        let llama = frequencies(Scaling::Llama3 { factor: 8.0, original: 8192.0, low: 1.0, high: 4.0 });
        near(llama[0], plain[0]);
        near(llama[31], plain[31] / 8.0);
        near(yarn_magnitude(40.0), 1.368_887_945_411_393_7);
        assert_eq!(yarn_magnitude(0.5), 1.0);
    }

    #[test]
    fn refusals() {
        let refusal = |builder: RopeBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(Rope::builder(7)), "dim: expected an even number of elements, got 7");
        assert_eq!(refusal(Rope::builder(8).theta(0.0)), "theta: expected a finite number above 0, got 0");
        let few = Scaling::PerFrequency(vec![1.0; 3]);
        let message = refusal(Rope::builder(8).scaling(few));
        assert_eq!(message, "factors: expected one for each of the 4 frequencies, got 3");
        let flat = Scaling::Yarn { factor: 2.0, original: 64.0, fast: 1.0, slow: 1.0 };
        assert!(refusal(Rope::builder(8).scaling(flat)).starts_with("fast: expected more turns"));
        let rope = Rope::builder(8).build().unwrap();
        let mut x = Array4::<f32>::zeros((2, 1, 3, 7));
        assert!(rope.rotate(x.view_mut(), &[0; 3]).unwrap_err().to_string().starts_with("x: expected shape"));
        let mut x = Array4::<f32>::zeros((2, 1, 3, 8));
        assert!(rope.rotate(x.view_mut(), &[0; 4]).unwrap_err().to_string().starts_with("positions: "));
    }
}
