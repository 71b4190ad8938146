//! Gates: blocks of queries or keys pooled, projected and rotated, to be scored
//! with each other.

use ndarray::{Array4, ArrayView3, ArrayView4, Axis};

use super::score::{self, Candidates, ROWS, Scores};
use super::summary::{Extend, Summary};
use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Heads, Parts, Rows, claim_words};
use crate::simd::{Isa, Kernel, Simd};

/// What becomes of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind<'a> {
    /// Its mean.
    Mean,
    /// The maxima, minima and means of its channels, one after the other, times
    /// weights `[heads, 3 head_dim, head_dim]`.
    MaxMinMean(ArrayView3<'a, f32>),
}

/// How blocks are pooled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate<'a> {
    pub(crate) isa: Isa,
    pub(crate) block: usize,
    /// Rotates a block to its first position, with this base. Blocks end with
    /// the sequence: the first one of queries may be a later block.
    pub(crate) theta: Option<f64>,
    pub(crate) before: usize,
    pub(crate) kind: Kind<'a>,
}

/// Pools `x` for each of `heads`, which reads head `of(head)`: `[batch, heads,
/// blocks, head_dim]`.
pub(crate) fn gate<T: Element>(
    gate: &Gate<'_>,
    x: ArrayView4<'_, T>,
    heads: usize,
    of: impl Fn(usize) -> usize + Sync + Send,
) -> Array4<f32> {
    let (batch, _, len, d) = x.dim();
    let blocks = len.div_ceil(gate.block);
    let mut out = Array4::zeros((batch, heads, blocks, d));
    let lists = batch * heads;
    let (source, mut claims) = (T::any(Heads::new(x)), vec![0; claim_words(lists)]);
    let size = blocks * d;
    let parts = Parts::new(out.as_slice_mut().unwrap_or_default(), size, &mut claims);
    parallel::for_each(
        parallel::threads(),
        if size == 0 { 0 } else { lists },
        |_| (),
        |(), list| {
            let (b, head) = (list / heads, list % heads);
            let rows = source.rows(b, of(head), &(0..len));
            let out = parts.take(list);
            let pooled = |summary: Summary| {
                let mut pooled = vec![0.0; blocks * summary.width(d)];
                let (mut sums, mut room) = (vec![0.0; d], vec![0.0; Summary::room(d)]);
                let (sums, room) = (&mut sums[..], &mut room[..]);
                let call = Extend { from: 0, unit: gate.block, head_dim: d, rows: &mut pooled, sums, room };
                summary.extend(gate.isa, rows, call);
                pooled
            };
            match gate.kind {
                Kind::Mean => out.copy_from_slice(&pooled(Summary::Mean)),
                Kind::MaxMinMean(weights) => {
                    let (extremes, means) = (pooled(Summary::MinMax), pooled(Summary::Mean));
                    let weights = weights.index_axis_move(Axis(0), head).reversed_axes();
                    gate.isa.dispatch(Project {
                        extremes: &extremes,
                        means: &means,
                        weights: weights.into(),
                        out,
                    });
                }
            }
            let Some(theta) = gate.theta else { return };
            let half = d / 2;
            for (block, row) in out.chunks_mut(d).enumerate() {
                let position = ((gate.before + block) * gate.block) as f64;
                for c in 0..half {
                    let (sin, cos) = (position * theta.powf(-2.0 * c as f64 / d as f64)).sin_cos();
                    let (sin, cos) = (sin as f32, cos as f32);
                    let (a, b) = (row[c], row[c + half]);
                    row[c] = a * cos - b * sin;
                    row[c + half] = b * cos + a * sin;
                }
            }
        },
    );
    out
}

/// `[extremes, means] W`, where `weights` is the transpose of `W`.
struct Project<'a> {
    extremes: &'a [f32],
    means: &'a [f32],
    weights: Rows<'a, f32>,
    out: &'a mut [f32],
}

impl Kernel for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { extremes, means, weights, out } = self;
        let (d, width) = (weights.len(), weights.cols());
        let (apart, stride) = (width.next_multiple_of(S::LANES), d.next_multiple_of(64));
        let mut rows = vec![0.0; ROWS * apart];
        let (mut room, mut products) = (vec![0.0; score::room(width)], vec![0.0; (ROWS + 1) * stride]);
        for (i, out) in out.chunks_mut(ROWS * d).enumerate() {
            let n = out.len() / d;
            for (r, row) in rows.chunks_mut(apart).take(n).enumerate() {
                let block = i * ROWS + r;
                row[..2 * d].copy_from_slice(&extremes[block * 2 * d..][..2 * d]);
                row[2 * d..width].copy_from_slice(&means[block * d..][..d]);
            }
            s.vectorize(Scores {
                queries: &rows,
                rows: n,
                width,
                candidates: Candidates::Rows(AnyRows::F32(weights)),
                few: false,
                room: &mut room,
                out: &mut products,
                stride,
            });
            for (row, products) in out.chunks_mut(d).zip(products.chunks(stride)) {
                row.copy_from_slice(&products[..d]);
            }
        }
    }
}
