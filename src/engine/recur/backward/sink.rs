//! Where gradients are written: an array of its own heads, or rows of all
//! heads that are summed up afterwards.

use ndarray::ArrayViewMut4;

use crate::engine::parallel;
use crate::engine::recur::backward::*;
use crate::input::Lengths;
use crate::simd::mem::{Arena, OutRows, RowsMut, bytes_for, claim_words};
use crate::simd::pack::WriteRow;
use crate::simd::{Kernel, Simd};

/// An array of gradients on its way: rows of heads, or where heads share the
/// array rows of all heads, which are added up in the end.
pub(crate) struct Sink<'a> {
    pub(super) to: ArrayViewMut4<'a, f32>,
    pub(super) parts: Option<&'a mut [f32]>,
    pub(super) claims: &'a mut [u64],
    pub(super) heads: usize,
}

impl<'a> Sink<'a> {
    pub(crate) fn bytes(heads: usize, (batch, own, len, dim): Dim) -> usize {
        let parts = if own == heads { 0 } else { batch * heads * len * dim };
        bytes_for::<u64>(claim_words(batch * heads.max(own) * len)) + bytes_for::<f32>(parts)
    }

    pub(crate) fn new(to: ArrayViewMut4<'a, f32>, heads: usize, arena: &mut Arena<'a>) -> Self {
        let (batch, own, len, dim) = to.dim();
        let claims = arena.take(claim_words(batch * heads.max(own) * len));
        let parts = (own != heads).then(|| arena.take(batch * heads * len * dim));
        Self { to, parts, claims, heads }
    }

    /// Where rows go: those of no sequence are 0 already.
    pub(crate) fn rows(&mut self, lengths: &Lengths<'_>) -> OutRows<'_, f32> {
        let (batch, _, len, dim) = self.to.dim();
        let all = (batch, self.heads, len, dim);
        let parts = self.parts.as_deref_mut().and_then(|parts| ArrayViewMut4::from_shape(all, parts).ok());
        lengths.fill_rest(&mut parts.unwrap_or(self.to.view_mut()), false, 0.0);
        match &mut self.parts {
            None => OutRows::new(self.to.view_mut(), self.claims),
            Some(parts) => OutRows::of_slice(parts, all, self.claims),
        }
    }

    /// Adds up what shares a head, in order.
    pub(crate) fn sum(self, workers: usize) {
        let Some(parts) = self.parts else { return };
        let (_, own, len, dim) = self.to.dim();
        let group = self.heads / own.max(1);
        let tasks = self.to.dim().0 * own;
        let to = OutRows::new(self.to, self.claims);
        parallel::for_each(
            workers,
            tasks,
            |_| (),
            |(), task| {
                let mut to = to.take(task / own, task % own, 0..len);
                let parts = &parts[task * group * len * dim..][..group * len * dim];
                let part = (len * dim).max(1);
                for t in 0..len {
                    let mut heads = parts.chunks_exact(part).map(|head| &head[t * dim..][..dim]);
                    match (to.row(t), heads.next()) {
                        (Some(row), Some(first)) => {
                            row.copy_from_slice(first);
                            for head in heads {
                                row.iter_mut().zip(head).for_each(|(sum, x)| *sum += x);
                            }
                        }
                        _ => {
                            for c in 0..dim {
                                let sum =
                                    parts.chunks_exact(part).fold(0.0, |sum, head| sum + head[t * dim + c]);
                                to.set(t, c, sum);
                            }
                        }
                    }
                }
            },
        );
    }
}

/// Writes as many rows as there are.
pub(super) struct WriteRows<'a, 'b> {
    pub(super) from: &'a [f32],
    pub(super) stride: usize,
    pub(super) to: &'a mut RowsMut<'b, f32>,
}

impl Kernel for WriteRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for i in 0..self.to.len() {
            let row = &self.from[i * self.stride..][..self.stride];
            s.vectorize(WriteRow { row, factor: 1.0, to: self.to, i });
        }
    }
}
