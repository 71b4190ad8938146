//! Numbers that definitions are written over: exact ones, ones that carry a
//! running error bound, and plain `f32`.

use std::fmt::Debug;
use std::ops::{Add, Div, Mul, Neg, Sub};

use crate::math::gates::exact;

/// A real number of a definition.
///
/// With `f64` a definition is the reference, with [`Running`] it gives the
/// published error bound of a kernel, with `f32` the error of an evaluation in
/// the order of its formulas.
pub(crate) trait Real:
    Copy
    + Debug
    + PartialEq
    + 'static
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// A number that kernels have exactly, such as an element of an input.
    fn of(x: f64) -> Self;

    /// The result of something that kernels compute with so many roundings.
    fn rounded(x: f64, _roundings: f64) -> Self {
        Self::of(x)
    }

    /// The number.
    fn value(self) -> f64;

    /// How far a kernel may be off it: 0 but for [`Running`].
    fn off(self) -> f64 {
        0.0
    }

    fn exp(self) -> Self;
    /// The square root of a number that is not negative.
    fn sqrt(self) -> Self;
    /// The larger; a NaN stays.
    fn max(self, other: Self) -> Self;

    /// `self + a b` as a part of a sum, whose own roundings are counted at its
    /// end, by [`summed`](Self::summed).
    fn term(self, a: Self, b: Self) -> Self {
        self + a * b
    }

    /// A sum that has had so many roundings.
    fn summed(self, _roundings: usize) -> Self {
        self
    }

    /// The dot product of two rows, one term after the other.
    fn dot(pairs: impl IntoIterator<Item = (Self, Self)>) -> Self {
        let (sum, terms) = fold(pairs);
        sum.summed(terms)
    }

    /// The dot product of two columns, over tokens: engines sum at most 128 of
    /// them one after the other, and then sums of at least 32.
    fn total(pairs: impl IntoIterator<Item = (Self, Self)>) -> Self {
        let (sum, terms) = fold(pairs);
        sum.summed(tokens(terms))
    }

    /// The sum of a column.
    fn sum(terms: impl IntoIterator<Item = Self>) -> Self {
        Self::total(terms.into_iter().map(|x| (x, Self::of(1.0))))
    }

    /// The smaller; a NaN stays.
    fn min(self, other: Self) -> Self {
        -(-self).max(-other)
    }

    /// `1 / (1 + e^-x)`
    fn sigmoid(self) -> Self {
        Self::of(1.0) / (Self::of(1.0) + (-self).exp())
    }

    /// The hyperbolic tangent, off by what its argument is off times its slope.
    fn tanh(self) -> Self {
        let at = self.value().tanh();
        // Of what is infinite nothing is left over.
        let off = if self.value().is_infinite() { Self::of(0.0) } else { self - Self::of(self.value()) };
        Self::rounded(at, 4.0) + Self::of(1.0 - at * at) * off
    }

    /// [`exact::gelu`]
    fn gelu(self) -> Self {
        let x = self.value();
        // As kernels have it: what is beyond, whose roundings are of no account above
        // 0; past 22 nothing of it is left in f32.
        let beyond = Self::rounded(exact::normal(-x.abs()), 12.0 + (x * x).min(500.0));
        let share = if x < 0.0 { beyond } else { Self::of(1.0) - beyond };
        // What the share is off by if `x` is: of what is infinite nothing.
        let off = if x.is_infinite() { Self::of(0.0) } else { self - Self::of(x) };
        let density = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
        self * (share + Self::of(density) * off)
    }

    /// A function that never falls, which kernels compute with so many roundings.
    fn rising(self, f: impl Fn(f64) -> f64, _roundings: f64) -> Self {
        Self::of(f(self.value()))
    }

    /// A function that is nowhere steeper than `slope`, which kernels compute within so
    /// many roundings of 1.
    fn at_most(self, f: impl Fn(f64) -> f64, _slope: f64, _roundings: f64) -> Self {
        Self::of(f(self.value()))
    }

    /// The number as a kernel has stored it: what it rounds from now on are shares
    /// of the number itself, whatever cancelled on the way to it.
    fn stored(self) -> Self {
        self
    }
}

fn fold<R: Real>(pairs: impl IntoIterator<Item = (R, R)>) -> (R, usize) {
    let nothing = (R::of(0.0), 0);
    pairs.into_iter().fold(nothing, |(sum, terms), (a, b)| (sum.term(a, b), terms + 1))
}

/// Roundings of a sum over so many tokens.
pub(crate) fn tokens(terms: usize) -> usize {
    terms.min(128) + terms.div_ceil(32)
}

/// The weights of some scores: exponentials that sum to 1.
pub(crate) fn softmax<R: Real>(scores: &[R]) -> Vec<R> {
    // Whatever is subtracted cancels: it has no error of its own.
    let most = R::of(scores.iter().fold(f64::NEG_INFINITY, |most, x| most.max(x.value())));
    let weights: Vec<R> = scores.iter().map(|&x| (x - most).exp()).collect();
    let sum = R::sum(weights.iter().copied());
    weights.into_iter().map(|x| x / sum).collect()
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
    fn value(self) -> f64 {
        self
    }
    fn exp(self) -> Self {
        self.exp()
    }
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    fn max(self, other: Self) -> Self {
        if self > other || self.is_nan() { self } else { other }
    }
}

/// What rounding to `f32` is off by at most, of a number.
const U: f64 = 1.0 / 16_777_216.0;
/// What rounding may take of a number below the normal ones.
const LEAST: f64 = 1.0 / (1u128 << 127) as f64 / (1 << 23) as f64;
/// What a kernel may take for 0.
const TINY: f64 = 1.0 / (1u128 << 100) as f64;

/// A number with a bound on how far off a kernel in `f32` may be, whatever the
/// order in which it sums.
///
/// Every operation adds its rounding to the errors of its operands ("running
/// error analysis": N. Higham, Accuracy and Stability of Numerical Algorithms,
/// section 3.3). The classical analysis holds for the order of one evaluation;
/// to hold for the tiles, chunks and threads of a kernel, roundings are shares
/// of [`size`](Self::size) instead of the value: of what the number would be if
/// nothing had cancelled, which bounds every partial sum of every order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Running {
    value: f64,
    size: f64,
    off: f64,
}

impl Running {
    /// The result of a function of numbers that were rounded before.
    fn fresh(value: f64, off: f64) -> Self {
        Self { value, size: value.abs(), off }
    }
}

/// How far a function that never falls may be off for a number that is.
fn apart(f: impl Fn(f64) -> f64, x: f64, off: f64) -> f64 {
    let apart = (f(x + off) - f(x)).max(f(x) - f(x - off));
    // Of what has no end, or of a logarithm of nothing.
    if apart.is_nan() && !x.is_nan() { f64::INFINITY } else { apart }
}

impl Add for Running {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let size = self.size + other.size;
        Self { value: self.value + other.value, size, off: self.off + other.off + U * size }
    }
}

impl Neg for Running {
    type Output = Self;
    fn neg(self) -> Self {
        Self { value: -self.value, ..self }
    }
}

impl Sub for Running {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Mul for Running {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let size = self.size * other.size;
        let off = self.size * other.off + other.size * self.off + self.off * other.off;
        // Nothing is known of a product with what nothing is known of, nor of one that
        // may overflow: not NaN.
        let unknown = self.off.max(other.off) == f64::INFINITY || size > f64::from(f32::MAX);
        let off = if unknown { f64::INFINITY } else { off };
        let value = self.value * other.value;
        // Nor of one of 0 with what has no end.
        let endless = size.is_nan() && !value.is_nan();
        let (size, off) = if endless { (f64::INFINITY, f64::INFINITY) } else { (size, off) };
        Self { value, size, off: off + U * size + LEAST }
    }
}

impl Div for Running {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let value = self.value / other.value;
        let least = other.value.abs() - other.off;
        // Kernels multiply by a rounded reciprocal.
        let off = if least > 0.0 { (self.off + value.abs() * other.off) / least } else { f64::INFINITY };
        // By a divisor that is infinite in f32 the quotient is 0.
        let none = if other.value.abs() + other.off > f64::from(f32::MAX) { 1.0 } else { 2.0 * U };
        Self::fresh(value, off + none * value.abs() + LEAST)
    }
}

impl Real for Running {
    fn of(x: f64) -> Self {
        Self { value: x, size: x.abs(), off: 0.0 }
    }
    fn rounded(x: f64, roundings: f64) -> Self {
        Self::fresh(x, roundings * U * x.abs())
    }
    fn value(self) -> f64 {
        self.value
    }
    fn off(self) -> f64 {
        self.off
    }
    fn exp(self) -> Self {
        // Exponents are multiples of log2 e, rounded, and the polynomial is
        // within 4 roundings.
        let value = self.value.exp();
        let exponent = self.off + 2.0 * U * self.size;
        let grown = value * exponent.exp_m1();
        // Of 0 times infinity, what it may have grown to is left.
        let grown = if grown.is_nan() { (self.value + exponent).exp() } else { grown };
        let off = grown + 4.0 * U * value + TINY;
        // A value of 0 may be anything if its exponent may.
        Self::fresh(value, if exponent == f64::INFINITY { f64::INFINITY } else { off })
    }
    fn sqrt(self) -> Self {
        let value = self.value.max(0.0).sqrt();
        // The largest of what is off on both sides, one of which may be cut at 0.
        let least = (self.value - self.off).max(0.0).sqrt();
        Self::fresh(value, (value - least).max((self.value + self.off).max(0.0).sqrt() - value) + U * value)
    }
    fn max(self, other: Self) -> Self {
        let larger = if self.value > other.value || self.value.is_nan() { self } else { other };
        Self { value: larger.value, size: self.size.max(other.size), off: self.off.max(other.off) }
    }
    fn term(self, a: Self, b: Self) -> Self {
        let product = a * b;
        Self {
            value: self.value + product.value,
            size: self.size + product.size,
            off: self.off + product.off,
        }
    }
    fn summed(self, roundings: usize) -> Self {
        Self { off: self.off + roundings as f64 * U * self.size, ..self }
    }
    fn rising(self, f: impl Fn(f64) -> f64, roundings: f64) -> Self {
        let value = f(self.value);
        Self::fresh(value, apart(f, self.value, self.off) + roundings * U * value.abs() + LEAST)
    }
    fn at_most(self, f: impl Fn(f64) -> f64, slope: f64, roundings: f64) -> Self {
        let value = f(self.value);
        Self::fresh(value, slope * self.off + roundings * U)
    }
    fn stored(self) -> Self {
        Self::fresh(self.value, self.off)
    }
}

/// How many times what is likely a [`Likely`] number allows.
const TIMES: f64 = 16.0;

/// A number with how far off a kernel is likely to be at most.
///
/// Errors of different operations are taken for independent: they add up like sides
/// at right angles, and sums of `n` terms have `sqrt(n)` roundings (N. Higham, T. Mary,
/// "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41,
/// 2019). What is published is 16 times that, where the analysis gives odds of less than
/// `2 e^-128` for each sum. It is for layers behind layers, each of which multiplies the
/// worst case that [`Running`] counts by the square root of its width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Likely {
    value: f64,
    /// The terms of a sum at right angles; else the value.
    size: f64,
    off: f64,
}

/// The length of sides at right angles: of what has no end, or is 0 times that, no end.
fn length<const N: usize>(sides: [f64; N]) -> f64 {
    let length = sides.iter().map(|x| x * x).sum::<f64>().sqrt();
    if length.is_nan() { f64::INFINITY } else { length }
}

impl Likely {
    fn new(value: f64, off: f64) -> Self {
        // Beyond what f32 has nothing is known.
        let off = if value.abs() > f64::from(f32::MAX) { f64::INFINITY } else { off };
        Self { value, size: value.abs(), off }
    }
}

impl Add for Likely {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let value = self.value + other.value;
        Self::new(value, length([self.off, other.off, U * value]))
    }
}

impl Neg for Likely {
    type Output = Self;
    fn neg(self) -> Self {
        Self { value: -self.value, ..self }
    }
}

impl Sub for Likely {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Mul for Likely {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let (value, unknown) = (self.value * other.value, self.off.max(other.off) == f64::INFINITY);
        let sides = [self.value * other.off, other.value * self.off, self.off * other.off, U * value];
        Self::new(value, if unknown { f64::INFINITY } else { length(sides) + LEAST })
    }
}

impl Div for Likely {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let value = self.value / other.value;
        let least = other.value.abs() - TIMES * other.off;
        let off = if least > 0.0 { length([self.off, value * other.off]) / least } else { f64::INFINITY };
        // By a divisor that is infinite in f32 the quotient is 0.
        let none = if other.value.abs() > f64::from(f32::MAX) { 1.0 } else { 2.0 * U };
        Self::new(value, length([off, none * value]) + LEAST)
    }
}

impl Real for Likely {
    fn of(x: f64) -> Self {
        Self { value: x, size: x.abs(), off: 0.0 }
    }
    fn rounded(x: f64, roundings: f64) -> Self {
        Self::new(x, roundings * U * x.abs())
    }
    fn value(self) -> f64 {
        self.value
    }
    fn off(self) -> f64 {
        TIMES * self.off
    }
    fn exp(self) -> Self {
        let (value, exponent) = (self.value.exp(), TIMES * self.off);
        let grown = if value == 0.0 { (self.value + exponent).exp() } else { value * exponent.exp_m1() };
        Self::new(value, length([grown / TIMES, (4.0 + 2.0 * self.value.abs()) * U * value]) + TINY)
    }
    fn sqrt(self) -> Self {
        let (value, off) = (self.value.max(0.0).sqrt(), TIMES * self.off);
        let least = (self.value - off).max(0.0).sqrt();
        let apart = (value - least).max((self.value + off).max(0.0).sqrt() - value);
        Self::new(value, length([apart / TIMES, U * value]))
    }
    fn max(self, other: Self) -> Self {
        let larger = if self.value > other.value || self.value.is_nan() { self } else { other };
        Self { off: self.off.max(other.off), ..larger }
    }
    fn term(self, a: Self, b: Self) -> Self {
        let product = a * b;
        let (size, off) = (length([self.size, product.value]), length([self.off, product.off]));
        Self { value: self.value + product.value, size, off }
    }
    fn summed(self, roundings: usize) -> Self {
        let size = self.size + self.value.abs();
        let off = length([self.off, (roundings as f64).sqrt() * U * size]);
        // Nor is anything of a sum whose parts are beyond it.
        Self::new(self.value, if size > f64::from(f32::MAX) { f64::INFINITY } else { off })
    }
    fn rising(self, f: impl Fn(f64) -> f64, roundings: f64) -> Self {
        let value = f(self.value);
        let apart = apart(f, self.value, TIMES * self.off) / TIMES;
        Self::new(value, length([apart, roundings * U * value]) + LEAST)
    }
    fn at_most(self, f: impl Fn(f64) -> f64, slope: f64, roundings: f64) -> Self {
        let value = f(self.value);
        Self::new(value, length([slope * self.off, roundings * U]))
    }
}

/// A naive evaluation, for comparison.
#[cfg(test)]
impl Real for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
    fn value(self) -> f64 {
        f64::from(self)
    }
    fn exp(self) -> Self {
        self.exp()
    }
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    fn max(self, other: Self) -> Self {
        if self > other || self.is_nan() { self } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::random::Normal;

    /// A formula with every operation in it.
    fn formula<R: Real>(x: &[f64]) -> R {
        let x: Vec<R> = x.iter().map(|&x| R::of(f64::from(x as f32))).collect();
        let (a, b) = x.split_at(x.len() / 2);
        let pairs = || a.iter().copied().zip(b.iter().copied());
        let weights = softmax(&pairs().map(|(a, b)| a * b - a.max(-a)).collect::<Vec<_>>());
        let mean = R::total(weights.into_iter().zip(a.iter().copied()));
        let dot = R::dot(pairs()).stored().gelu();
        mean.min(dot).sigmoid().sqrt() / (R::of(1.5) + R::sum(b.iter().map(|&b| b.max(mean) * b)))
    }

    #[test]
    fn what_runs_along_bounds_a_naive_evaluation() {
        let (mut most, mut shares) = (0f64, Vec::new());
        for seed in 0..2000 {
            let len = 2 * (1 + seed as usize % 60);
            let x: Vec<f64> = Normal::new(seed).take(len).map(|x| 2.0 * x).collect();
            let (want, bound, naive) = (formula::<f64>(&x), formula::<Running>(&x), formula::<f32>(&x));
            assert!((bound.value() - want).abs() <= 1e-12 * want.abs());
            let share = (naive.value() - want).abs() / bound.off();
            assert!(share <= 1.0, "seed {seed}: {naive} for {want}, {bound:?}");
            let likely = formula::<Likely>(&x);
            assert!((likely.value() - want).abs() <= 1e-12 * want.abs());
            assert!((naive.value() - want).abs() <= likely.off(), "seed {seed}: {likely:?}");
            shares.push(share);
            most = most.max(share);
        }
        shares.sort_by(f64::total_cmp);
        println!("a naive evaluation: {:.4} of its bound, at most {most:.3}", shares[shares.len() / 2]);
        assert!(most > 0.02, "a bound that nothing comes near to");
    }

    #[test]
    fn sums_are_bounded_in_any_order() {
        // Large numbers that cancel at the end or at once.
        let x: Vec<f64> = (0..64).map(|i| if i % 2 == 0 { 1e4 + f64::from(i) } else { -1e4 }).collect();
        let (mut other, sum) = (x.clone(), |x: &[f64]| Running::sum(x.iter().map(|&x| Running::of(x))));
        other.sort_by(f64::total_cmp);
        let naive: f32 = other.iter().map(|&x| x as f32).sum();
        let (bound, want) = (sum(&x), x.iter().sum::<f64>());
        assert!((f64::from(naive) - want).abs() <= bound.off());
        assert!((sum(&other).off() / bound.off() - 1.0).abs() < 1e-9);
    }

    /// Behind layers of 64 what is likely stays, and the worst case grows eightfold with
    /// each.
    #[test]
    fn layers_behind_layers() {
        fn layers<R: Real>() -> R {
            let mut rows: Vec<R> = Normal::new(1).take(64).map(|x| R::of(f64::from(x as f32))).collect();
            for layer in 0..6 {
                let weights: Vec<f64> = Normal::new(2 + layer).take(64 * 64).collect();
                let row = |w: &[f64]| {
                    let w = w.iter().map(|&w| R::of(f64::from((w / 8.0) as f32)));
                    R::dot(w.zip(rows.iter().copied())).stored()
                };
                rows = weights.chunks(64).map(row).collect();
            }
            rows[0]
        }
        let (naive, want, likely, worst) =
            (layers::<f32>(), layers::<f64>(), layers::<Likely>(), layers::<Running>());
        let off = (naive.value() - want).abs();
        assert!(
            off <= likely.off() && likely.off() < 2e-4 && worst.off() > 0.1,
            "{off} {likely:?} {worst:?}"
        );
    }

    #[test]
    fn nothing_is_known_beyond_a_divisor_of_0() {
        let small = Running::of(1.0) - Running::of(1.0);
        assert_eq!((Running::of(1.0) / small).off(), f64::INFINITY);
        assert_eq!(Running::of(3.0).off(), 0.0);
        assert!(Running::of(f64::NAN).max(Running::of(1.0)).value().is_nan());
        assert!(Running::of(1.0).min(Running::of(f64::NAN)).value().is_nan());
    }
}
