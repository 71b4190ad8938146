//! Definitions of one head at a time.

use std::ops::Range;

use ndarray::{Array2, Array4, ArrayView4, s};

use crate::definition::number::Real;
use crate::element::Element;
use crate::input::{Dims, Lengths};
use crate::math::features::FeatureMap;

/// A head of a sequence.
pub(crate) struct Head {
    /// Its sequence, and the place of that on the batch axis.
    pub(crate) sequence: usize,
    pub(crate) batch: usize,
    pub(crate) head: usize,
    heads: usize,
    /// The tokens of its sequence.
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
}

impl Head {
    /// This head's place in an array of `heads` heads, which neighbours share.
    pub(crate) fn of(&self, heads: usize) -> usize {
        self.head / (self.heads / heads.max(1)).max(1)
    }

    /// Its rows of some tokens.
    pub(crate) fn rows<R: Real, T: Element>(
        &self,
        x: &ArrayView4<'_, T>,
        tokens: &Range<usize>,
    ) -> Array2<R> {
        let x = x.slice(s![self.batch, self.of(x.dim().1), tokens.clone(), ..]);
        x.map(|x| R::of(x.to_f64()))
    }

    /// The features of its rows of some tokens: kernels have some roundings more
    /// than their exponents say.
    pub(crate) fn features<R: Real, T: Element>(
        &self,
        map: &dyn FeatureMap,
        x: &ArrayView4<'_, T>,
        tokens: &Range<usize>,
    ) -> Array2<R> {
        let x = self.rows::<f64, T>(x, tokens);
        let mut features = Array2::from_elem((x.dim().0, map.dim(x.dim().1)), R::of(0.0));
        for (x, mut to) in x.outer_iter().zip(features.outer_iter_mut()) {
            let roundings = 8.0 + map.roundings(self.head, &x.to_vec());
            let row = map.define(self.head, &x.to_vec());
            to.iter_mut().zip(row).for_each(|(to, x)| *to = R::rounded(x, roundings));
        }
        features
    }
}

/// Each head of each sequence.
pub(crate) fn heads(dims: &Dims, lengths: &Lengths<'_>) -> impl Iterator<Item = Head> {
    let heads = dims.q_heads;
    (0..dims.batch).flat_map(move |i| (0..heads).map(move |h| (i, h))).map(move |(sequence, head)| {
        let of = lengths.sequence(dims, sequence);
        Head { sequence, batch: of.batch, head, heads, queries: of.queries, keys: of.keys }
    })
}

/// Outputs `[batch, heads, q_len, value_dim]` of the rows that `define` gives
/// for each head of each sequence.
pub(crate) fn of_heads<R: Real>(
    dims: &Dims,
    lengths: &Lengths<'_>,
    mut define: impl FnMut(&Head) -> Array2<R>,
) -> Array4<R> {
    let (batch, heads) = (if dims.packed { 1 } else { dims.batch }, dims.q_heads);
    let mut out = Array4::from_elem((batch, heads, dims.q_len, dims.value_dim), R::of(0.0));
    for head in self::heads(dims, lengths) {
        out.slice_mut(s![head.batch, head.head, head.queries.clone(), ..]).assign(&define(&head));
    }
    out
}
