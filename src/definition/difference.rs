//! The difference of two outputs by definition, row by row.

use ndarray::{ArrayView3, Zip, s};

use crate::definition::softmax::Reference;

/// `y[b, h, i, ..] = a[b, h, i, ..] - lambda[b, h, i] b[b, h / r, i, ..]`, where `b` has one head
/// for `r` of `a`, and how far a kernel may be off it. With `logits` lambda goes through a
/// logistic function; with a norm, its weights and epsilon, rows are divided by their root mean
/// square then.
pub(crate) fn difference(
    mut a: Reference,
    b: &Reference,
    lambda: ArrayView3<'_, f32>,
    logits: bool,
    norm: Option<(&[f32], f32)>,
) -> Reference {
    const ROUNDING: f64 = 16.0 / (1u64 << 24) as f64;
    let (_, heads, _, dim) = a.out.dim();
    let group = heads / b.out.dim().1.max(1);
    for ((n, h, i), &lambda) in lambda.indexed_iter() {
        let lambda = f64::from(lambda);
        let lambda = if logits { 1.0 / (1.0 + (-lambda).exp()) } else { lambda };
        let mut y = a.out.slice_mut(s![n, h, i, ..]);
        let other = b.out.slice(s![n, h / group, i, ..]);
        let size = y.iter().zip(&other).map(|(y, o)| y.abs() + (lambda * o).abs()).fold(0.0, f64::max);
        Zip::from(&mut y).and(&other).for_each(|y, o| *y -= lambda * o);
        let mut off = a.bound[[n, h, i]] + lambda.abs() * b.bound[[n, h / group, i]] + ROUNDING * size;
        if let Some((weight, epsilon)) = norm {
            let mean = y.iter().map(|y| y * y).sum::<f64>() / dim as f64;
            let root = (mean + f64::from(epsilon)).sqrt();
            let most = y.iter().fold(0.0, |most: f64, y| most.max(y.abs())) / root;
            // To first order an error goes through as `e / root (1 + most)`, and a
            // row of this norm has no element beyond `sqrt(dim)`.
            let through = 2.0 * off / root * (1.0 + most) + ROUNDING * dim as f64 * most;
            off = through.min(2.0 * (dim as f64).sqrt());
            off *= weight.iter().fold(0.0, |most: f64, w| most.max(f64::from(w.abs())));
            Zip::from(&mut y).and(weight).for_each(|y, w| *y *= f64::from(*w) / root);
        }
        a.bound[[n, h, i]] = off;
    }
    a
}
