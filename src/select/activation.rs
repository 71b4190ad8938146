//! Probes and budgets of ActQKV, experimental: a query that stands for a window of
//! them, and how a budget of blocks is shared out to layers.
//!
//! ```text
//! z_d = mean_i q_id,  sigma_d = sqrt(mean_i (q_id - z_d)^2)
//! a_i = sum_d ((q_id - z_d) / (sigma_d + epsilon))^2
//! q*  = sum_i a_i q_i / sum_i a_i
//!
//! p = softmax(r / sqrt(head_dim)) over the scores r of a layer's blocks
//! rho = exp(-sum_b p_b ln p_b) / blocks,  budget_l ~ total rho_l / sum_m rho_m
//! ```
//!
//! After "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context
//! LLMs Inference" (arXiv 2502.13542), whose formulas have been read in summaries
//! alone: these are one reading of it, and there is no mechanism of its name here. A
//! probe is a query for whichever mechanism selects blocks.
//!
//! Cost: three reads of the window.

use ndarray::{Array4, ArrayView4};

use crate::element::Element;
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::input::filled;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Heads, Parts, claim_words};
use crate::simd::{Isa, Kernel, Simd};

/// What is added to a deviation that is divided by.
const EPSILON: f32 = 1e-6;

/// The probe of each head's queries `[batch, heads, len, head_dim]`: `[batch, heads, 1,
/// head_dim]`. Queries that are all the same are their own; of none it is 0.
///
/// ```
/// use attention_kernels::select::activation_probe;
/// use ndarray::Array4;
///
/// let q = Array4::from_shape_fn((1, 2, 64, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
/// assert_eq!(activation_probe(q.view())?.dim(), (1, 2, 1, 16));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// [`Error::TooLarge`] where there is no memory for it, [`Error::Isa`] for an instruction
/// set that the environment names and the CPU lacks.
pub fn activation_probe<T: Element>(q: ArrayView4<'_, T>) -> Result<Array4<f32>> {
    let ((batch, heads, len, dim), isa) = (q.dim(), Isa::choose(None)?);
    let mut probes = filled("probe", (batch, heads, 1, dim), 0f32)?;
    let lists = if len == 0 || dim == 0 { 0 } else { batch * heads };
    let (from, mut claims) = (T::any(Heads::new(q)), vec![0; claim_words(batch * heads)]);
    let parts = Parts::new(probes.as_slice_mut().unwrap_or_default(), dim, &mut claims);
    let start = |_| [(); 3].map(|()| vec![0f32; dim]);
    parallel::for_each(parallel::threads(), lists, start, |[row, mean, share], list| {
        let rows = from.rows(list / heads, list % heads, &(0..len));
        isa.dispatch(Probe { rows, row, mean, share, to: parts.take(list) });
    });
    Ok(probes)
}

struct Probe<'a> {
    rows: AnyRows<'a>,
    row: &'a mut [f32],
    mean: &'a mut [f32],
    /// One over the deviation of a channel.
    share: &'a mut [f32],
    to: &'a mut [f32],
}

impl Kernel for Probe<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, row, mean, share, to } = self;
        let (n, width) = (rows.len(), row.len());
        let each = 1.0 / n as f32;
        mean.fill(0.0);
        for i in 0..n {
            rows.part(i..i + 1).pack_rows(s, row, width);
            mean.iter_mut().zip(&*row).for_each(|(sum, &x)| *sum += x);
        }
        mean.iter_mut().for_each(|sum| *sum *= each);
        share.fill(0.0);
        for i in 0..n {
            rows.part(i..i + 1).pack_rows(s, row, width);
            let off = row.iter().zip(&*mean).map(|(x, mean)| x - mean);
            share.iter_mut().zip(off).for_each(|(sum, off)| *sum += off * off);
        }
        share.iter_mut().for_each(|sum| *sum = 1.0 / ((*sum * each).sqrt() + EPSILON));
        to.fill(0.0);
        let mut total = 0.0;
        for i in 0..n {
            rows.part(i..i + 1).pack_rows(s, row, width);
            let mut bias = s.splat(0.0);
            for ((x, mean), share) in
                row.chunks(S::LANES).zip(mean.chunks(S::LANES)).zip(share.chunks(S::LANES))
            {
                let off = s.mul(s.sub(s.load_tail(x), s.load_tail(mean)), s.load_tail(share));
                bias = s.mul_add(off, off, bias);
            }
            let bias = s.reduce_add(bias);
            total += bias;
            to.iter_mut().zip(&*row).for_each(|(sum, &x)| *sum += bias * x);
        }
        if total == 0.0 {
            to.copy_from_slice(mean);
        } else {
            to.iter_mut().for_each(|sum| *sum /= total);
        }
    }
}

/// How a budget of `total` blocks is shared out to layers whose blocks have these
/// scores: the more even they are, the more blocks, but at least `least` and no more
/// than there are. What a layer has no blocks for goes to the others.
///
/// ```
/// use attention_kernels::select::density_budgets;
///
/// // Of the first layer all blocks look alike, of the second one stands out.
/// assert_eq!(density_budgets(&[&[0.0; 8], &[99.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], 1, 9, 1)?, [8, 1]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// [`Error::Value`] for a `head_dim` of 0 and scores that are NaN.
pub fn density_budgets(scores: &[&[f32]], head_dim: usize, total: usize, least: usize) -> Result<Vec<usize>> {
    if head_dim == 0 {
        return Err(Error::value("head_dim", "at least 1", 0));
    }
    if let Some(layer) = scores.iter().position(|scores| scores.iter().any(|x| x.is_nan())) {
        return Err(Error::value("scores", "numbers", format_args!("NaN in layer {layer}")));
    }
    let density = |scores: &&[f32]| {
        let scaled = || scores.iter().map(|&x| f64::from(x) / (head_dim as f64).sqrt());
        let most = scaled().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scaled().map(|x| (x - most).exp()).sum();
        let surprise = |x: f64| if x > 0.0 { -x * x.ln() } else { 0.0 };
        let entropy: f64 = scaled().map(|x| surprise((x - most).exp() / sum)).sum();
        if scores.is_empty() { 0.0 } else { entropy.exp() / scores.len() as f64 }
    };
    let densities: Vec<f64> = scores.iter().map(density).collect();
    let mut full = vec![false; scores.len()];
    loop {
        let layers = 0..scores.len();
        let open = || layers.clone().filter(|&i| !full[i]);
        let spent: usize = layers.clone().filter(|&i| full[i]).map(|i| scores[i].len()).sum();
        let (left, sum) = (total.saturating_sub(spent) as f64, open().map(|i| densities[i]).sum::<f64>());
        let budget = |i: usize| if sum > 0.0 { left * densities[i] / sum } else { 0.0 };
        let filled: Vec<usize> = open().filter(|&i| budget(i) >= scores[i].len() as f64).collect();
        if filled.is_empty() {
            let of_layer = |i: usize| if full[i] { scores[i].len() } else { budget(i).round() as usize };
            return Ok(layers.map(|i| of_layer(i).max(least).min(scores[i].len())).collect());
        }
        filled.into_iter().for_each(|i| full[i] = true);
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Axis, s};

    use super::*;
    use crate::math::random::Normal;

    fn queries(shape: [usize; 4]) -> Array4<f32> {
        let mut random = Normal::new(7);
        Array4::from_shape_simple_fn(shape, || random.next().unwrap() as f32)
    }

    #[test]
    fn a_probe_is_its_definition() {
        for shape in [[2, 3, 50, 24], [1, 1, 1, 5], [1, 2, 33, 7], [0, 2, 3, 4], [1, 2, 0, 4], [1, 2, 3, 0]] {
            let q = queries(shape);
            let got = activation_probe(q.view()).unwrap();
            assert_eq!(got.dim(), (shape[0], shape[1], 1, shape[3]));
            for ((b, h, _, c), got) in got.indexed_iter() {
                let of = q.slice(s![b, h, .., ..]).mapv(f64::from);
                let n = of.nrows() as f64;
                let mean = |d: usize| of.column(d).sum() / n;
                let deviation =
                    |d: usize| (of.column(d).iter().map(|x| (x - mean(d)).powi(2)).sum::<f64>() / n).sqrt();
                let off = |x: f64, d: usize| ((x - mean(d)) / (deviation(d) + f64::from(EPSILON))).powi(2);
                let bias = |i: usize| of.row(i).iter().enumerate().map(|(d, &x)| off(x, d)).sum::<f64>();
                let (sum, all) = (0..of.nrows())
                    .fold((0.0, 0.0), |(sum, all), i| (sum + bias(i) * of[[i, c]], all + bias(i)));
                let want = if n == 0.0 {
                    0.0
                } else if all == 0.0 {
                    mean(c)
                } else {
                    sum / all
                };
                assert!((f64::from(*got) - want).abs() < 1e-5, "{shape:?}: {got} and {want}");
            }
        }
    }

    #[test]
    fn one_query_is_its_own_and_equal_ones_too() {
        let q = queries([1, 2, 1, 12]);
        assert_eq!(activation_probe(q.view()).unwrap(), q);
        let equal = q.broadcast((1, 2, 8, 12)).unwrap();
        let same = activation_probe(equal).unwrap();
        assert!(same.iter().zip(&q).all(|(a, b)| (a - b).abs() < 1e-5));
        // As far from their mean: the mean.
        let pair = ndarray::concatenate(Axis(2), &[q.view(), (&q + 2.0).view()]).unwrap();
        let mean = activation_probe(pair.view()).unwrap();
        assert!(mean.iter().zip(&q).all(|(a, b)| (a - b - 1.0).abs() < 1e-5));
    }

    #[test]
    fn budgets_go_where_scores_are_even() {
        let even = [1.0f32; 30];
        assert_eq!(density_budgets(&[&even, &even, &even], 64, 30, 1).unwrap(), [10, 10, 10]);
        let peaked: Vec<f32> = (0..30).map(|i| if i == 3 { 80.0 } else { i as f32 }).collect();
        let budgets = density_budgets(&[&peaked, &even], 64, 30, 2).unwrap();
        assert!(budgets[0] < budgets[1] && budgets[0] >= 2, "{budgets:?}");
        assert!(budgets.iter().sum::<usize>().abs_diff(30) <= 1);
        assert_eq!(density_budgets(&[&peaked, &even], 64, 60, 2).unwrap(), [30, 30], "all there are");
        assert_eq!(density_budgets(&[&[], &even], 64, 4, 2).unwrap(), [0, 4]);
        assert_eq!(density_budgets(&[], 64, 4, 2).unwrap(), [0; 0]);
        assert!(
            density_budgets(&[&[f32::NAN]], 64, 4, 2).is_err() && density_budgets(&[&even], 0, 4, 2).is_err()
        );
    }
}
