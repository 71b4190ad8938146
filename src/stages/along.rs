//! Weights of scores that are moved along their gradient, each row by a step of a given
//! length; what each key says of the loss is its value times the gradient of the output.

use ndarray::Array2;

use crate::definition::number::Real;
use crate::input::Site;
use crate::simd::Simd;
use crate::simd::any::AnyArray;
use crate::simd::exp::{exp, tanh};
use crate::stages::whole::{self, RowFn};

/// The weights of a call, of scores that are dot products or `ADDITIVE`.
pub(crate) struct Step<'a, const ADDITIVE: bool> {
    pub(crate) epsilon: f32,
    /// What hyperbolic tangents weigh, `[heads | 1, head_dim]`.
    pub(crate) additive: Option<&'a Array2<f32>>,
    /// `[batch, q_heads, q_len, value_dim]`
    pub(crate) d_out: AnyArray<'a>,
}

/// What an element weighs in the scores of a head.
#[inline(always)]
pub(crate) fn weight(weights: Option<&Array2<f32>>, head: usize, element: usize) -> f32 {
    weights.map_or(0.0, |w| w[[if w.dim().0 == 1 { 0 } else { head }, element]])
}

/// The sum of what `f` makes of the weights of a row and of what each says, which are
/// as many; see [`whole::sum`].
#[inline(always)]
fn total<S: Simd>(s: S, row: &[f32], says: &[f32], f: impl Fn(S::F, S::F) -> S::F) -> f32 {
    let block = 64 * S::LANES;
    let mut total = s.splat(0.0);
    for (row, says) in row.chunks(block).zip(says.chunks(block)) {
        let mut sum = s.splat(0.0);
        for (weight, says) in row.chunks(S::LANES).zip(says.chunks(S::LANES)) {
            sum = s.add(sum, f(s.load_tail(weight), s.load_tail(says)));
        }
        total = s.add(total, sum);
    }
    s.reduce_add(total)
}

impl<const ADDITIVE: bool> RowFn for Step<'_, ADDITIVE> {
    const PAIRS: bool = ADDITIVE;
    const PRODUCTS: bool = true;

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, head: usize, element: usize, q: S::F, k: S::F) -> S::F {
        s.mul(s.splat(weight(self.additive, head, element)), tanh(s, s.add(q, k)))
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, _: &Site, _: usize, row: &mut [f32], _: &mut [f32]) {
        whole::softmax(s, row);
    }

    fn features(&self) -> Option<AnyArray<'_>> {
        Some(self.d_out)
    }

    #[inline(always)]
    fn spread<S: Simd>(&self, s: S, _: &Site, _: usize, row: &mut [f32], products: &[f32]) {
        // Without columns an output has no gradient.
        if products.is_empty() || self.epsilon == 0.0 {
            return;
        }
        // Of what is hidden nothing shows.
        let shown = |weight: S::F| s.lt(s.splat(0.0), s.div(s.splat(1.0), weight));
        let open = |weight: S::F, x: S::F| s.select(shown(weight), x, s.splat(0.0));
        let product = |weight: S::F, says: S::F| open(weight, s.mul(weight, says));
        let sum = total(s, row, products, product);
        let mean = s.splat(sum);
        let pull = |weight: S::F, says: S::F| open(weight, s.mul(weight, s.sub(says, mean)));
        let mut most = s.splat(0.0);
        for (weight, says) in row.chunks(S::LANES).zip(products.chunks(S::LANES)) {
            most = s.max(most, s.abs(pull(s.load_tail(weight), s.load_tail(says))));
        }
        let most = s.reduce_max(most);
        // The largest of numbers may leave NaN out; their sum does not.
        if most == 0.0 && !sum.is_nan() {
            return;
        }
        // Squares of what is small would be 0.
        let share = s.splat(1.0 / most.max(1e-37));
        let square = |weight: S::F, says: S::F| {
            let pull = s.mul(share, pull(weight, says));
            s.mul(pull, pull)
        };
        let step = s.splat(self.epsilon / total(s, row, products, square).sqrt());
        for (row, says) in row.chunks_mut(S::LANES).zip(products.chunks(S::LANES)) {
            let weight = s.load_tail(row);
            let by = s.mul(step, s.mul(share, pull(weight, s.load_tail(says))));
            s.store_tail(row, s.select(shown(weight), s.mul(weight, exp(s, by)), weight));
        }
        let all = whole::sum(s, row, 0.0, |x| x);
        for x in row.chunks_mut(S::LANES) {
            let weight = s.mul(s.load_tail(x), s.splat(1.0 / all));
            s.store_tail(x, weight);
        }
    }
}

/// What a softmax of moved scores makes of weights and what each says of the loss, by
/// definition.
pub(crate) fn moved<R: Real>(weights: &[(usize, R)], says: &[R], epsilon: f64) -> Vec<(usize, R)> {
    let mean = R::total(weights.iter().zip(says).map(|(&(_, weight), &d)| (weight, d)));
    let pull: Vec<R> = weights.iter().zip(says).map(|(&(_, weight), &d)| weight * (d - mean)).collect();
    let length = R::total(pull.iter().map(|&g| (g, g))).sqrt();
    let grown = weights.iter().zip(&pull).map(|(&(j, weight), &g)| {
        let flat = length.value() == 0.0;
        let step = R::of(epsilon) * g / if flat { R::of(1.0) } else { length };
        // Whatever the direction, no score is moved farther.
        let known = step.off() <= 2.0 * epsilon && !(flat && length.off() > 0.0);
        let step = if known || step.value().is_nan() {
            step
        } else {
            R::of(step.value()).at_most(|x| x, 0.0, 2.0 * epsilon * f64::from(1 << 24))
        };
        (j, weight * step.exp())
    });
    let grown: Vec<(usize, R)> = grown.collect();
    let all = R::sum(grown.iter().map(|x| x.1));
    grown.into_iter().map(|(j, weight)| (j, weight / all)).collect()
}
