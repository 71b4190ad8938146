//! The definition of memories that learn while they read, token by token.

use ndarray::{Array2, Array4, ArrayView3, s};

use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::engine::online::{LEAST_LOG, Loss, NORM_EPSILON, Online, POWER_EPSILON, Retention};
use crate::error::Result;
use crate::math::gates::exact::normal;
use crate::simd::any::AnyArray;

/// `gelu'(h) = P(h) + h p(h)`
fn slope(h: f64) -> f64 {
    let density = (-0.5 * h * h).exp() / std::f64::consts::TAU.sqrt();
    normal(h) + if density == 0.0 { 0.0 } else { h * density }
}

/// `x^T W`
fn through<R: Real>(x: &[R], w: &Array2<R>) -> Vec<R> {
    w.columns().into_iter().map(|column| R::dot(x.iter().copied().zip(column.iter().copied()))).collect()
}

/// `(x - mean x) / sqrt(var x + 1e-5)`, and the divisor.
fn standard<R: Real>(x: &[R]) -> (Vec<R>, R) {
    let n = R::of(x.len().max(1) as f64);
    let mean = R::sum(x.iter().copied()) / n;
    let less: Vec<R> = x.iter().map(|&x| x - mean).collect();
    let deviation = (R::dot(less.iter().map(|&x| (x, x))) / n + R::of(NORM_EPSILON)).sqrt();
    (less.into_iter().map(|x| x / deviation).collect(), deviation)
}

/// `-dl(e)` for the errors of one token.
fn descent<R: Real>(loss: Loss, e: &[R], threshold: f64) -> Vec<R> {
    match loss {
        Loss::Squared { factor, mean } => {
            let factor = R::rounded(f64::from(Loss::factor(factor, mean, e.len())), 1.0);
            e.iter().map(|&e| -(factor * e)).collect()
        }
        Loss::Power { p, sharpness } => {
            let p = f64::from(p);
            let of = |e: f64| match sharpness {
                // Of 0 there is no sign.
                None => p * if e == 0.0 { 0.0 } else { e.signum() } * e.abs().powf(p - 1.0),
                Some(a) => p * (f64::from(a) * e).tanh() * (e * e + POWER_EPSILON).powf(0.5 * (p - 1.0)),
            };
            e.iter().map(|e| -e.rising(of, 8.0 + 2.0 * p)).collect()
        }
        Loss::Huber { signs } => {
            let norm = R::dot(e.iter().map(|&x| (x, x))).sqrt();
            let within = norm.value() <= threshold;
            // Where rounding may decide, the descent jumps for signs alone.
            let near = (norm.value() - threshold).abs() <= norm.off() && norm.off() > 0.0;
            let unsure = R::rounded(1.0, if signs && near { f64::INFINITY } else { 0.0 });
            let sign = |e: f64| if e == 0.0 || e.is_nan() { e } else { e.signum() };
            let factor = if within && !near { R::of(1.0) } else { (R::of(threshold) / norm).min(R::of(1.0)) };
            let of = |&e: &R| match signs && !within {
                true => R::of(threshold) * e.rising(sign, 0.0),
                false if signs => e,
                false => factor * e,
            };
            e.iter().map(|e| -(of(e) * unsure)).collect()
        }
    }
}

/// What a head's memory has at a token.
struct Learner<R> {
    weights: Vec<Array2<R>>,
    reference: Vec<Array2<R>>,
    momentum: Vec<Array2<R>>,
    past: usize,
    whole: Vec<R>,
}

impl<R: Real> Learner<R> {
    fn of(x: &Online<'_>, unit: &[f32]) -> Self {
        let g = x.geometry();
        let rows: Vec<Vec<Array2<R>>> = (0..g.parts)
            .map(|part| {
                let layer = |layer: usize| {
                    let from = &unit[part * g.row() + g.first(layer)..];
                    let at = |(i, j)| R::of(f64::from(from[i * g.m[layer] + j]));
                    Array2::from_shape_fn((g.n[layer], g.m[layer]), at)
                };
                (0..g.layers).map(layer).collect()
            })
            .collect();
        let mut rows = rows.into_iter();
        let rest = &unit[g.weights..g.row()];
        Self {
            weights: rows.next().unwrap_or_default(),
            reference: rows.next().unwrap_or_default(),
            momentum: rows.next().unwrap_or_default(),
            past: rest[0] as usize,
            whole: rest[1..].iter().map(|&x| R::of(f64::from(x))).collect(),
        }
    }

    fn to(&self, x: &Online<'_>, unit: &mut [f32]) {
        let g = x.geometry();
        for (part, layers) in [&self.weights, &self.reference, &self.momentum].into_iter().enumerate() {
            for (layer, from) in layers.iter().enumerate() {
                let to = &mut unit[part * g.row() + g.first(layer)..];
                to.iter_mut().zip(from).for_each(|(to, x)| *to = x.value() as f32);
            }
        }
        let rest = &mut unit[g.weights..g.row()];
        rest[0] = self.past as f32;
        rest[1..].iter_mut().zip(&self.whole).for_each(|(to, x)| *to = x.value() as f32);
    }

    /// What the gradient is made of, `-descent key^T` of each layer: `(key, descent)`.
    fn learn(&self, x: &Online<'_>, gamma: Option<&[R]>, k: &[R], v: &[R], at: f64) -> Vec<(Vec<R>, Vec<R>)> {
        let loss = |found: &[R]| {
            let errors: Vec<R> = found.iter().zip(v).map(|(&found, &v)| found - v).collect();
            descent(x.rules.loss, &errors, at)
        };
        let w = &self.reference;
        let hidden = (w.len() == 2).then(|| through(k, &w[0]));
        let active: Vec<R> = hidden.iter().flatten().map(|h| h.gelu()).collect();
        let found = if hidden.is_some() { through(&active, &w[1]) } else { through(k, &w[0]) };
        let descent = match gamma {
            None => loss(&found),
            Some(gamma) => {
                let (normed, deviation) = standard(&found);
                let sum = |(&k, (&x, &gamma)): (&R, (&R, &R))| k + gamma * x;
                let found: Vec<R> = k.iter().zip(normed.iter().zip(gamma)).map(sum).collect();
                let u: Vec<R> = loss(&found).into_iter().zip(gamma).map(|(g, &gamma)| g * gamma).collect();
                let n = R::of(u.len().max(1) as f64);
                let mean = R::sum(u.iter().copied()) / n;
                let along = R::dot(u.iter().copied().zip(normed.iter().copied())) / n;
                u.iter().zip(&normed).map(|(&u, &x)| (u - mean - x * along) / deviation).collect()
            }
        };
        match hidden {
            None => vec![(k.to_vec(), descent)],
            Some(hidden) => {
                let back = through(&descent, &w[1].t().to_owned());
                let inner = back.iter().zip(&hidden).map(|(&g, h)| g * h.at_most(slope, 0.8, 16.0));
                vec![(k.to_vec(), inner.collect()), (active, descent)]
            }
        }
    }

    /// Weights after the first and after the last token of a chunk.
    fn retain(&mut self, x: &Online<'_>, ends: bool) {
        match x.rules.retention {
            Retention::Linear if ends => self.reference = self.weights.clone(),
            Retention::Norm { q, mirror } if ends => {
                let (w, power) = (&self.weights[0], f64::from(q));
                let most = w.iter().fold(0.0, |most: f64, x| most.max(x.value().abs()));
                let share = |x: R| x / R::of(if most == 0.0 { 1.0 } else { most });
                let raise = |x: R| (0..q).fold(R::of(1.0), |product, _| product * x.max(-x));
                let sum = R::sum(w.iter().map(|&x| raise(share(x))));
                let root = R::of(most) * sum.rising(|x| x.max(0.0).powf(1.0 / power), 4.0);
                let norm = if sum.value() == 0.0 { R::of(1.0) } else { root };
                let whole = norm.rising(|x| x.max(0.0).powf(power - 2.0), 4.0);
                let raised = |x: R| x * (x.max(-x) / norm).rising(|x| x.max(0.0).powf(power - 2.0), power);
                self.reference[0] = w.map(|&x| if mirror { raised(x) } else { x / whole });
                self.whole[0] = if mirror { R::of(1.0) } else { whole };
            }
            Retention::Softmax if ends || self.past == 1 => {
                for mut column in self.weights[0].columns_mut() {
                    let most = R::of(column.iter().fold(f64::NEG_INFINITY, |most, x| most.max(x.value())));
                    let sum = R::sum(column.iter().map(|&x| (x - most).exp()));
                    let log = sum.rising(f64::ln, 2.0);
                    column.mapv_inplace(|x| (x - most - log).max(R::of(f64::from(LEAST_LOG))));
                }
                self.reference[0] = self.weights[0].map(|x| x.exp());
            }
            _ => {}
        }
    }

    fn read(&self, x: &Online<'_>, gamma: Option<&[R]>, q: &[R]) -> Vec<R> {
        match x.rules.retention {
            Retention::Norm { mirror: false, .. } => {
                through(q, &self.weights[0]).into_iter().map(|y| y / self.whole[0]).collect()
            }
            Retention::Norm { .. } | Retention::Softmax => through(q, &self.reference[0]),
            Retention::Linear => {
                let inner = through(q, &self.weights[0]);
                let y = match self.weights.get(1) {
                    Some(second) => through(&inner.iter().map(|h| h.gelu()).collect::<Vec<_>>(), second),
                    None => inner,
                };
                let Some(gamma) = gamma else { return y };
                let normed = standard(&y).0;
                let sum = |(&q, (&x, &gamma)): (&R, (&R, &R))| q + gamma * x;
                q.iter().zip(normed.iter().zip(gamma)).map(sum).collect()
            }
        }
    }
}

/// Outputs from a state, or from the start, and the state after them. With `unit` queries
/// and keys are divided by `sqrt(|x|^2 + 1e-6)`.
pub(crate) fn define<R: Real>(
    x: &Online<'_>,
    unit: bool,
    state: Option<&Array4<f32>>,
) -> Result<(Array4<R>, Array4<f32>)> {
    let mut next = state.map_or_else(|| x.started(), |state| Ok(state.clone()))?;
    let out = of_heads(&x.dims, &x.lengths, |head| {
        let number = |x: &ArrayView3<'_, f32>, t| R::of(f64::from(x[[head.batch, head.of(x.dim().1), t]]));
        let row = |x: &AnyArray<'_>, t: usize| -> Vec<R> {
            let rows = x.rows(head.batch, head.of(x.heads()), &(t..t + 1));
            rows.exact(0).into_iter().map(R::of).collect()
        };
        let length = |x: Vec<R>| -> Vec<R> {
            let norm = (R::dot(x.iter().map(|&x| (x, x))) + R::of(1e-6)).sqrt();
            if unit { x.into_iter().map(|x| x / norm).collect() } else { x }
        };
        let at = s![head.sequence, head.head, .., ..];
        let mut learner = Learner::<R>::of(x, &next.slice(at).iter().copied().collect::<Vec<_>>());
        let gamma = x
            .memory
            .gamma
            .as_ref()
            .map(|rows| -> Vec<R> { rows.row(head.head).iter().map(|&x| R::of(f64::from(x))).collect() });
        let gamma = gamma.as_deref();
        let mut out = Array2::from_elem((head.queries.len(), x.dims.value_dim), R::of(0.0));
        for (t, mut out) in head.queries.clone().zip(out.outer_iter_mut()) {
            let threshold = x.threshold.map_or(0.0, |x| number(&x, t).value());
            let (q, k) = (length(row(&x.q, t)), length(row(&x.k, t)));
            let written = learner.learn(x, gamma, &k, &row(&x.v, t), threshold);
            let keep = number(&x.keep, t);
            let keep = if x.forgets { R::of(1.0) - keep } else { keep };
            let step = number(&x.step, t);
            for (layer, (key, descent)) in written.iter().enumerate() {
                for ((i, j), w) in learner.weights[layer].indexed_iter_mut() {
                    let change = step * descent[j];
                    *w = match &x.momentum {
                        None => (*w * keep).term(key[i], change).summed(1),
                        Some(momentum) => {
                            let m = &mut learner.momentum[layer][[i, j]];
                            *m = (*m * number(momentum, t)).term(key[i], change).summed(1);
                            *w * keep + *m
                        }
                    };
                }
            }
            learner.past += 1;
            let ends = learner.past == x.rules.chunk;
            learner.retain(x, ends);
            for (out, y) in out.iter_mut().zip(learner.read(x, gamma, &q)) {
                *out = y;
            }
            learner.past = if ends { 0 } else { learner.past };
        }
        let mut unit = vec![0.0; x.geometry().parts * x.geometry().row()];
        learner.to(x, &mut unit);
        next.slice_mut(at).iter_mut().zip(unit).for_each(|(to, x)| *to = x);
        out
    });
    Ok((out, next))
}
