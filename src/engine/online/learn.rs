//! Gradients of losses, and what weights become at the ends of chunks.

use super::{LEAST_LOG, Loss, NORM_EPSILON, POWER_EPSILON};
use crate::simd::exp::{exp, normal, tanh};
use crate::simd::{MAX_LANES, Simd};

/// `x^n`
#[inline(always)]
fn power<S: Simd>(s: S, x: S::F, n: u32) -> S::F {
    let mut product = s.splat(1.0);
    for _ in 0..n {
        product = s.mul(product, x);
    }
    product
}

#[inline(always)]
fn root<S: Simd>(s: S, x: S::F) -> S::F {
    let mut lanes = [0.0; MAX_LANES];
    s.store(&mut lanes, x);
    for x in &mut lanes {
        *x = x.sqrt();
    }
    s.load(&lanes)
}

/// What is less than 0 as -1, what is more as 1.
#[inline(always)]
fn sign<S: Simd>(s: S, x: S::F) -> S::F {
    let (one, zero) = (s.splat(1.0), s.splat(0.0));
    let below = s.select(s.lt(x, zero), s.splat(-1.0), s.mul(x, zero));
    s.select(s.lt(zero, x), one, below)
}

/// The sum of products of two rows of whole vectors.
#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for (a, b) in a.chunks_exact(S::LANES).zip(b.chunks_exact(S::LANES)) {
        sum = s.mul_add(s.load(a), s.load(b), sum);
    }
    s.reduce_add(sum)
}

/// Descent in place of what was found, `-dl(found - value)`, of one token.
#[inline(always)]
pub(super) fn descend<S: Simd>(
    s: S,
    loss: Loss,
    channels: usize,
    found: &mut [f32],
    value: &[f32],
    threshold: f32,
) {
    // Values less what was found: the descent of half the square.
    for (x, value) in found.chunks_exact_mut(S::LANES).zip(value.chunks_exact(S::LANES)) {
        s.store(x, s.sub(s.load(value), s.load(x)));
    }
    match loss {
        Loss::Squared { factor, mean } => {
            let factor = s.splat(Loss::factor(factor, mean, channels));
            for x in found.chunks_exact_mut(S::LANES) {
                s.store(x, s.mul(s.load(x), factor));
            }
        }
        Loss::Power { p, sharpness: None } => {
            for x in found.chunks_exact_mut(S::LANES) {
                let e = s.load(x);
                let steep = s.mul(s.splat(p as f32), sign(s, e));
                s.store(x, s.mul(steep, power(s, s.abs(e), p - 1)));
            }
        }
        Loss::Power { p, sharpness: Some(sharpness) } => {
            for x in found.chunks_exact_mut(S::LANES) {
                let e = s.load(x);
                let square = s.mul_add(e, e, s.splat(POWER_EPSILON as f32));
                let mut steep = s.mul(s.splat(p as f32), tanh(s, s.mul(e, s.splat(sharpness))));
                if p.is_multiple_of(2) {
                    steep = s.mul(steep, root(s, square));
                }
                s.store(x, s.mul(steep, power(s, square, (p - 1) / 2)));
            }
        }
        Loss::Huber { signs } => {
            let norm = dot(s, found, found).sqrt();
            // A NaN among them shows.
            if norm <= threshold {
                return;
            }
            let factor = s.splat(if signs { threshold } else { threshold / norm });
            for x in found.chunks_exact_mut(S::LANES) {
                let e = s.load(x);
                s.store(x, s.mul(factor, if signs { sign(s, e) } else { e }));
            }
        }
    }
}

/// `gelu'(h) = P(h) + h p(h)` in place of `h`, and `gelu(h) = h P(h)`.
#[inline(always)]
pub(super) fn activate<S: Simd>(s: S, h: &mut [f32], active: &mut [f32]) {
    let density = s.splat(0.398_942_3);
    for (h, active) in h.chunks_exact_mut(S::LANES).zip(active.chunks_exact_mut(S::LANES)) {
        let x = s.load(h);
        let share = normal(s, x);
        s.store(active, s.mul(x, share));
        let bell = s.mul(density, exp(s, s.mul(s.mul(x, x), s.splat(-0.5))));
        s.store(h, s.mul_add(x, bell, share));
    }
}

/// `gelu(h)` in place of `h`.
#[inline(always)]
pub(super) fn gelu<S: Simd>(s: S, h: &mut [f32]) {
    for h in h.chunks_exact_mut(S::LANES) {
        s.store(h, crate::simd::exp::gelu(s, s.load(h)));
    }
}

/// Rows times others, element by element.
#[inline(always)]
pub(super) fn multiply<S: Simd>(s: S, x: &mut [f32], by: &[f32]) {
    for (x, by) in x.chunks_exact_mut(S::LANES).zip(by.chunks_exact(S::LANES)) {
        s.store(x, s.mul(s.load(x), s.load(by)));
    }
}

/// Rows over a number.
#[inline(always)]
pub(super) fn divide<S: Simd>(s: S, x: &mut [f32], by: f32) {
    let factor = s.splat(1.0 / by);
    for x in x.chunks_exact_mut(S::LANES) {
        s.store(x, s.mul(s.load(x), factor));
    }
}

/// Products of rows, `stride` apart and as long as `x`, with it.
#[inline(always)]
pub(super) fn dots<S: Simd>(s: S, (rows, stride): (&[f32], usize), x: &[f32], to: &mut [f32]) {
    if x.is_empty() {
        to.fill(0.0);
    }
    for (row, to) in rows.chunks_exact(stride.max(1)).zip(to) {
        *to = dot(s, row, x);
    }
}

/// A row less its mean, over its deviation, in its place; returns the inverse of that.
#[inline(always)]
fn standardise<S: Simd>(s: S, row: &mut [f32], channels: usize) -> f32 {
    let of = 1.0 / channels.max(1) as f32;
    let (whole, rest) = row.split_at_mut(channels);
    let mut sum = s.splat(0.0);
    for x in whole.chunks(S::LANES) {
        sum = s.add(sum, s.load_tail(x));
    }
    let mean = s.splat(s.reduce_add(sum) * of);
    let mut square = s.splat(0.0);
    for x in whole.chunks_mut(S::LANES) {
        s.store_tail(x, s.sub(s.load_tail(x), mean));
        let x = s.load_tail(x);
        square = s.mul_add(x, x, square);
    }
    let inverse = 1.0 / (s.reduce_add(square) * of + NORM_EPSILON as f32).sqrt();
    for x in whole.chunks_mut(S::LANES) {
        s.store_tail(x, s.mul(s.load_tail(x), s.splat(inverse)));
    }
    rest.fill(0.0);
    inverse
}

/// `key + gamma LN(row)`, where `normed` becomes `LN(row)`; returns the inverse deviation.
#[inline(always)]
pub(super) fn residual<S: Simd>(
    s: S,
    row: &mut [f32],
    normed: &mut [f32],
    [key, gamma]: [&[f32]; 2],
    channels: usize,
) -> f32 {
    normed.copy_from_slice(row);
    let inverse = standardise(s, normed, channels);
    for (c, row) in row.chunks_exact_mut(S::LANES).enumerate() {
        let at = c * S::LANES;
        s.store(row, s.mul_add(s.load(&gamma[at..]), s.load(&normed[at..]), s.load(&key[at..])));
    }
    inverse
}

/// What the descent of a row that was normalised is of the row itself:
/// `(u - mean u - x mean(x u)) / deviation` with `u = gamma g`.
#[inline(always)]
pub(super) fn residual_back<S: Simd>(
    s: S,
    g: &mut [f32],
    [normed, gamma]: [&[f32]; 2],
    channels: usize,
    inverse: f32,
) {
    multiply(s, g, gamma);
    let of = 1.0 / channels.max(1) as f32;
    let mut sum = s.splat(0.0);
    for g in g.chunks_exact(S::LANES) {
        sum = s.add(sum, s.load(g));
    }
    let (mean, along) = (s.reduce_add(sum) * of, dot(s, g, normed) * of);
    for (g, x) in g.chunks_exact_mut(S::LANES).zip(normed.chunks_exact(S::LANES)) {
        let less = s.mul_add(s.load(x), s.splat(along), s.splat(mean));
        s.store(g, s.mul(s.sub(s.load(g), less), s.splat(inverse)));
    }
    g[channels..].fill(0.0);
}

/// Weights of what was accumulated, over its norm; returns what queries that read of
/// that itself divide by.
#[inline(always)]
pub(super) fn normalise<S: Simd>(s: S, from: &[f32], q: u32, mirror: bool, to: &mut [f32]) -> f32 {
    let mut most = s.splat(0.0);
    for x in from.chunks_exact(S::LANES) {
        most = s.max(s.abs(s.load(x)), most);
    }
    let most = s.reduce_max(most);
    let share = s.splat(if most == 0.0 { 1.0 } else { 1.0 / most });
    let mut sum = 0.0;
    // Sums of few, and these in f64.
    for part in from.chunks(16 * S::LANES) {
        let mut acc = s.splat(0.0);
        for x in part.chunks_exact(S::LANES) {
            acc = s.add(acc, power(s, s.mul(s.abs(s.load(x)), share), q));
        }
        sum += f64::from(s.reduce_add(acc));
    }
    let norm = if sum == 0.0 { 1.0 } else { f64::from(most) * sum.powf(1.0 / f64::from(q)) };
    let whole = norm.powf(f64::from(q) - 2.0);
    let factor = s.splat(if mirror { (1.0 / norm) as f32 } else { (1.0 / whole) as f32 });
    for (to, x) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
        let x = s.load(x);
        let by = if mirror { power(s, s.mul(s.abs(x), factor), q - 2) } else { factor };
        s.store(to, s.mul(x, by));
    }
    if mirror { 1.0 } else { whole as f32 }
}

/// `log softmax` of each column in its place, not below [`LEAST_LOG`], and the softmax.
#[inline(always)]
pub(super) fn soften<S: Simd>(s: S, logs: &mut [f32], to: &mut [f32], stride: usize) {
    for col in (0..stride).step_by(S::LANES) {
        let mut most = s.splat(f32::NEG_INFINITY);
        for row in logs.chunks_exact(stride) {
            most = s.max(s.load(&row[col..]), most);
        }
        let mut sum = s.splat(0.0);
        for row in logs.chunks_exact(stride) {
            sum = s.add(sum, exp(s, s.sub(s.load(&row[col..]), most)));
        }
        let mut lanes = [0.0; MAX_LANES];
        s.store(&mut lanes, sum);
        for x in &mut lanes[..S::LANES] {
            *x = x.ln();
        }
        let sum = s.load(&lanes);
        for (row, to) in logs.chunks_exact_mut(stride).zip(to.chunks_exact_mut(stride)) {
            // The order keeps NaN.
            let x = s.max(s.splat(LEAST_LOG), s.sub(s.sub(s.load(&row[col..]), most), sum));
            s.store(&mut row[col..], x);
            s.store(&mut to[col..], exp(s, x));
        }
    }
}
