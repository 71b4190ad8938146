//! Attention over disjoint sets of keys, merged.
//!
//! Softmax attention over some keys is a state: how much weight they have
//! (the logarithm of the sum of their exponentials, the LSE) and their
//! weighted mean. States of disjoint keys merge into the state of all of them,
//! in any order and grouping, and the state of no keys changes nothing. With
//! that, a prefix that many sequences share is attended to once (cascade), a
//! prompt is worked off in chunks, and devices pass keys around a ring.
//!
//! [`merge`] and [`merge_into`] work on whole outputs; [`State`] on one row.
//! Logarithms are natural. The formulas are those of "Online normalizer
//! calculation for softmax" (arXiv 1805.02867).

use ndarray::{Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut3, ArrayViewMut4, Zip};

use crate::element::Element;
use crate::error::{Error, Result};

/// The softmax state of one query: `sum exp(s_j)` and `sum exp(s_j) v_j`, kept
/// relative to the largest score so that nothing overflows.
///
/// ```
/// use attention_kernels::merge::State;
///
/// let mut all = State::empty(2);
/// all.push(1.0, &[1.0, 0.0]);
/// all.push(3.0, &[0.0, 1.0]);
///
/// let mut other = State::empty(2);
/// other.push(2.0, &[5.0, 5.0]);
/// all.merge(&other);
///
/// let (out, lse) = all.finish();
/// let sum = 1f64.exp() + 2f64.exp() + 3f64.exp();
/// assert!((lse - sum.ln()).abs() < 1e-12);
/// assert!((out[0] - (1f64.exp() + 5.0 * 2f64.exp()) / sum).abs() < 1e-12);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    max: f64,
    sum: f64,
    out: Vec<f64>,
}

impl State {
    /// The state of no keys: the identity of [`merge`](Self::merge).
    pub fn empty(value_dim: usize) -> Self {
        Self { max: f64::NEG_INFINITY, sum: 0.0, out: vec![0.0; value_dim] }
    }

    /// The state of keys with this output and LSE.
    pub fn of(out: &[f64], lse: f64) -> Self {
        if lse == f64::NEG_INFINITY {
            return Self::empty(out.len());
        }
        Self { max: lse, sum: 1.0, out: out.to_vec() }
    }

    /// Adds one key. A score of -inf adds nothing, whatever the value. Values
    /// beyond the state's length are ignored, missing ones count as 0.
    pub fn push(&mut self, score: f64, value: &[f64]) {
        if score != f64::NEG_INFINITY {
            self.add(score, 1.0, value);
        }
    }

    /// Adds the keys of another state.
    pub fn merge(&mut self, other: &Self) {
        if other.sum != 0.0 {
            self.add(other.max, other.sum, &other.out);
        }
    }

    fn add(&mut self, max: f64, sum: f64, out: &[f64]) {
        let top = self.max.max(max);
        // Equal maxima first: of two infinite ones the difference is NaN.
        let share = |max: f64| if max == top { 1.0 } else { (max - top).exp() };
        let (keep, take) = (share(self.max), share(max));
        self.sum = self.sum * keep + sum * take;
        for (x, y) in self.out.iter_mut().zip(out) {
            *x = *x * keep + y * take;
        }
        self.max = if max.is_nan() { max } else { top };
    }

    /// The output and the LSE: 0 and -inf for no keys.
    pub fn finish(self) -> (Vec<f64>, f64) {
        if self.sum == 0.0 {
            return (self.out, f64::NEG_INFINITY);
        }
        let lse = self.max + self.sum.ln();
        (self.out.into_iter().map(|x| x / self.sum).collect(), lse)
    }
}

/// Merges the output and LSE of one set of keys into those of another:
/// `[batch, q_heads, q_len, value_dim]` and `[batch, q_heads, q_len]`.
///
/// An LSE of -inf on either side leaves the other side as it is, NaN and
/// infinity of its output included.
///
/// # Errors
/// [`Error::Shape`] where shapes differ, before anything is written.
pub fn merge_into<T: Element>(
    mut out: ArrayViewMut4<'_, T>,
    mut lse: ArrayViewMut3<'_, f32>,
    other_out: ArrayView4<'_, T>,
    other_lse: ArrayView3<'_, f32>,
) -> Result<()> {
    let (batch, heads, rows, _) = out.dim();
    let rows_only = |argument, got: &[usize]| {
        let expected = format!("[batch, q_heads, q_len] = [{batch}, {heads}, {rows}] as out has it");
        Error::shape(argument, expected, got)
    };
    if lse.dim() != (batch, heads, rows) {
        return Err(rows_only("lse", lse.shape()));
    }
    if other_out.dim() != out.dim() {
        return Err(Error::shape("other_out", format!("{:?} as out has it", out.shape()), other_out.shape()));
    }
    if other_lse.dim() != lse.dim() {
        return Err(rows_only("other_lse", other_lse.shape()));
    }
    Zip::from(out.rows_mut()).and(&mut lse).and(other_out.rows()).and(other_lse).for_each(
        |mut out, lse, other, &other_lse| {
            let (a, b) = (f64::from(*lse), f64::from(other_lse));
            if b == f64::NEG_INFINITY {
                return;
            }
            if a == f64::NEG_INFINITY {
                out.assign(&other);
                *lse = other_lse;
                return;
            }
            let top = if a > b { a } else { b };
            let share = |x: f64| if x == top { 1.0 } else { (x - top).exp() };
            let (keep, take) = (share(a), share(b));
            let sum = keep + take;
            for (x, y) in out.iter_mut().zip(other) {
                *x = T::from_f32(((keep * x.to_f64() + take * y.to_f64()) / sum) as f32);
            }
            *lse = (top + sum.ln()) as f32;
        },
    );
    Ok(())
}

/// [`merge_into`] new arrays.
///
/// # Errors
/// [`Error::Shape`] where shapes differ.
pub fn merge<T: Element>(
    (out, lse): (ArrayView4<'_, T>, ArrayView3<'_, f32>),
    (other_out, other_lse): (ArrayView4<'_, T>, ArrayView3<'_, f32>),
) -> Result<(Array4<T>, Array3<f32>)> {
    let (mut out, mut lse) = (out.to_owned(), lse.to_owned());
    merge_into(out.view_mut(), lse.view_mut(), other_out, other_lse)?;
    Ok((out, lse))
}

/// Applies sink logits, one a query head, to an output computed without:
/// `out / (1 + exp(sink - lse))`. The LSE stays as it is.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Value`] where sizes differ, before anything
/// is written.
pub fn apply_sinks<T: Element>(
    mut out: ArrayViewMut4<'_, T>,
    lse: ArrayView3<'_, f32>,
    sinks: &[f32],
) -> Result<()> {
    let (batch, heads, rows, _) = out.dim();
    if lse.dim() != (batch, heads, rows) {
        let expected = format!("[batch, q_heads, q_len] = [{batch}, {heads}, {rows}] as out has it");
        return Err(Error::shape("lse", expected, lse.shape()));
    }
    if sinks.len() != heads {
        return Err(Error::value("sinks", format!("one for each of the {heads} query heads"), sinks.len()));
    }
    Zip::indexed(out.rows_mut()).and(lse).for_each(|(_, head, _), mut out, &lse| {
        if lse != f32::NEG_INFINITY && sinks[head] != f32::NEG_INFINITY {
            let keep = 1.0 / (1.0 + (f64::from(sinks[head]) - f64::from(lse)).exp());
            out.mapv_inplace(|x| T::from_f32((x.to_f64() * keep) as f32));
        }
    });
    Ok(())
}
