//! What every engine is given: arrays, mask, score, normalisation.

use std::ops::Range;

use ndarray::{ArrayView3, s};

use crate::element::Element;
use crate::input::{Dims, Qkv, Sequence};
use crate::simd::Isa;
use crate::simd::mem::Rows;

/// How the weights of a row come from its scores.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Norm<'a> {
    /// They are exponentials and sum to 1, a sink logit per head included.
    Softmax {
        /// One logit a query head, without a value.
        sinks: Option<&'a [f32]>,
    },
    /// Each is the logistic function of its score plus a bias.
    Sigmoid {
        /// Added to every score; `None` is `-ln kv_len`.
        bias: Option<f32>,
    },
}

/// One call of an engine. Shapes have been checked.
#[derive(Debug)]
pub(crate) struct Call<'a, T, M, F> {
    pub(crate) x: Qkv<'a, T>,
    pub(crate) dims: Dims,
    pub(crate) mask: &'a M,
    pub(crate) score: &'a F,
    pub(crate) norm: Norm<'a>,
    pub(crate) scale: f32,
    pub(crate) gains: Option<Gains<'a>>,
    pub(crate) isa: Isa,
}

/// Factors of query rows, `[batch, q_heads, q_len]`, and of value rows,
/// `[batch, kv_heads, kv_len]`. They are finite.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gains<'a> {
    pub(crate) query: ArrayView3<'a, f32>,
    pub(crate) value: ArrayView3<'a, f32>,
}

impl<'a, T: Element, M, F> Call<'a, T, M, F> {
    pub(crate) fn sequence(&self, index: usize) -> Sequence {
        self.x.lengths.sequence(&self.dims, index)
    }

    /// Queries and keys of the longest sequence.
    pub(crate) fn longest(&self) -> (usize, usize) {
        (0..self.dims.batch)
            .map(|i| self.sequence(i))
            .fold((0, 0), |(q, k), sequence| (q.max(sequence.queries.len()), k.max(sequence.keys.len())))
    }

    /// The same call for the normalisers alone: with values of no elements.
    pub(crate) fn without_values(&self) -> Call<'_, T, M, F> {
        let v = self.x.v.slice(s![.., .., .., 0..0]);
        Call {
            x: Qkv { v, ..self.x.reborrow() },
            dims: Dims { value_dim: 0, ..self.dims },
            mask: self.mask,
            score: self.score,
            norm: self.norm,
            scale: self.scale,
            gains: self
                .gains
                .map(|gains| Gains { query: gains.query.reborrow(), value: gains.value.reborrow() }),
            isa: self.isa,
        }
    }

    /// Rows of the output.
    pub(crate) fn out_rows(&self) -> usize {
        self.x.q.dim().0 * self.dims.q_heads * self.dims.q_len
    }

    /// Query heads that share a key/value head.
    pub(crate) fn group(&self) -> usize {
        self.dims.q_heads / self.dims.kv_heads.max(1)
    }

    pub(crate) fn queries(&self, sequence: &Sequence, head: usize) -> Rows<'a, T> {
        rows(self.x.q, sequence.batch, head, &sequence.queries)
    }

    pub(crate) fn keys(&self, sequence: &Sequence, kv_head: usize) -> Rows<'a, T> {
        rows(self.x.k, sequence.batch, kv_head, &sequence.keys)
    }

    pub(crate) fn values(&self, sequence: &Sequence, kv_head: usize) -> Rows<'a, T> {
        rows(self.x.v, sequence.batch, kv_head, &sequence.keys)
    }
}

fn rows<'a, T: Element>(
    x: ndarray::ArrayView4<'a, T>,
    batch: usize,
    head: usize,
    range: &Range<usize>,
) -> Rows<'a, T> {
    use ndarray::Axis;
    let all: Rows<'a, T> = x.index_axis_move(Axis(0), batch).index_axis_move(Axis(0), head).into();
    all.part(range.clone(), 0..all.cols())
}
