//! Attention of one query over the rows that a token has in several arrays, each
//! scored by its own norm: a row is read once.

use ndarray::{Array2, ArrayView5, ArrayViewMut4, Axis};

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyRows, AnyRowsMut};
use crate::simd::exp::exp2_flush;
use crate::simd::mem::{Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::difference::RmsNorm;
use crate::stages::pass::Pass;

/// Tokens of a task.
const TASK: usize = 16;

/// How rows are scored: `scale` times their products with `weights`, divided by
/// their root mean square.
#[derive(Clone, Debug)]
pub(crate) struct Depth {
    pub(crate) isa: Isa,
    /// `[heads | 1, dim]`
    pub(crate) weights: Array2<f32>,
    pub(crate) scale: f32,
    /// What is added to a mean square.
    pub(crate) epsilon: f32,
    /// Of what comes out.
    pub(crate) norm: Option<RmsNorm>,
}

impl Depth {
    /// Writes the means of the rows of all `sources`, `[sources, batch, heads, len,
    /// dim]`, by the softmax of their scores.
    pub(crate) fn run<T: Element>(
        &self,
        pass: &mut Pass<'_>,
        sources: ArrayView5<'_, T>,
        out: Option<ArrayViewMut4<'_, T>>,
    ) {
        let [count, batch, heads, len, dim] = std::array::from_fn(|axis| sources.len_of(Axis(axis)));
        let (rows, pieces, stride) =
            (batch * heads * len, len.div_ceil(TASK), dim.next_multiple_of(MAX_LANES));
        let (workers, room) = (parallel::threads(), 2 * bytes_for::<f32>(stride));
        let bytes = bytes_for::<u64>(claim_words(rows)) + bytes_for_shares(workers, room);
        let flops = || (6 * rows as u64).saturating_mul((count * dim) as u64);
        pass.stage(flops, bytes, |mut arena| {
            let Some(out) = out else { return };
            let out = T::any_out(OutRows::new(out, arena.take(claim_words(rows))));
            let shares = arena.shares(workers, room);
            let start = |worker| {
                let mut share = shares.take(worker);
                [(); 2].map(|()| share.take::<f32>(stride))
            };
            parallel::for_each(workers, batch * heads * pieces, start, |[row, mean], task| {
                let (unit, at) = (task / pieces, task % pieces * TASK);
                let (b, h, tokens) = (unit / heads, unit % heads, at..(at + TASK).min(len));
                // The rows of a token as those of a sequence.
                let own = sources.index_axis(Axis(1), b).permuted_axes([1, 2, 0, 3]);
                let own = T::any(Heads::new(own));
                let head = if self.weights.dim().0 == 1 { 0 } else { h };
                let mut to = out.take(b, h, tokens.clone());
                for (i, t) in tokens.enumerate() {
                    let x = own.rows(h, t, &(0..count));
                    let weights = self.weights.row(head);
                    let weights = weights.to_slice().unwrap_or_default();
                    self.isa.dispatch(Token { of: self, x, weights, row, mean, to: (&mut to, i) });
                }
            });
        });
    }
}

/// One token.
struct Token<'a, 'b> {
    of: &'a Depth,
    /// Its rows.
    x: AnyRows<'a>,
    weights: &'a [f32],
    row: &'a mut [f32],
    mean: &'a mut [f32],
    to: (&'a mut AnyRowsMut<'b>, usize),
}

impl Kernel for Token<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { of: Depth { scale, epsilon, norm, .. }, x, weights, row, mean, to: (to, i) } = self;
        let (stride, dim) = (row.len(), x.cols().max(1) as f32);
        // Columns past the last are not packed.
        row.fill(0.0);
        mean.fill(0.0);
        let exponential = |x: f32| {
            let weight = exp2_flush(s, s.mul(s.splat(x), s.splat(std::f32::consts::LOG2_E)));
            let mut lanes = [0.0; MAX_LANES];
            s.store(&mut lanes, weight);
            lanes[0]
        };
        let (mut most, mut total) = (f32::NEG_INFINITY, 0f32);
        for l in 0..x.len() {
            x.part(l..l + 1).pack_rows(s, row, stride);
            let [mut squares, mut products] = [s.splat(0.0); 2];
            for (x, w) in row.chunks_exact(S::LANES).zip(weights.chunks(S::LANES)) {
                let x = s.load(x);
                squares = s.mul_add(x, x, squares);
                products = s.mul_add(x, s.load_tail(w), products);
            }
            let length = (s.reduce_add(squares) / dim + epsilon).sqrt();
            let score = s.reduce_add(products) * (scale / length);
            // The mean of what there was and of this row: never beyond the largest of them.
            let top = most.max(score);
            let [old, new] = [total * exponential(most - top), exponential(score - top)];
            (most, total) = (top, old + new);
            let [kept, share] = [old / total, new / total].map(|x| s.splat(x));
            for (mean, x) in mean.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
                let sum = s.mul_add(share, s.load(x), s.mul(kept, s.load(mean)));
                s.store(mean, sum);
            }
        }
        let mut factor = 1.0;
        if let Some(RmsNorm { weight, epsilon }) = norm {
            let mut squares = s.splat(0.0);
            for (mean, w) in mean.chunks_exact_mut(S::LANES).zip(weight.chunks(S::LANES)) {
                let x = s.load(mean);
                squares = s.mul_add(x, x, squares);
                s.store(mean, s.mul(x, s.load_tail(w)));
            }
            factor = 1.0 / (s.reduce_add(squares) / dim + epsilon).sqrt();
        }
        to.write(s, i, mean, factor);
    }
}
