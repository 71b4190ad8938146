//! The sum of several attentions of the same queries, each row times its gate.

use std::ops::Range;

use ndarray::{ArrayView4, ArrayViewMut4};

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyArray, AnyOut, IntoAny};
use crate::simd::mem::{Arena, Heads, OutRows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

/// Rows of a task.
const ROWS: usize = 64;

/// The sizes of such a sum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatedSum {
    pub(crate) isa: Isa,
    /// `[batch, heads, len, value_dim]`
    pub(crate) dim: (usize, usize, usize, usize),
}

impl GatedSum {
    /// Elements of a row, filled up.
    fn row(&self) -> usize {
        self.dim.3.next_multiple_of(MAX_LANES)
    }

    /// Bytes of scratch.
    pub(crate) fn bytes(&self) -> usize {
        let (batch, heads, len, _) = self.dim;
        bytes_for::<u64>(claim_words(batch * heads * len))
            + bytes_for_shares(parallel::threads(), bytes_for::<f32>(self.row()))
    }

    /// `out[b, h, i, ..] = sum_p gates[b, h, i, p] parts[p][b, h, i, ..]`.
    pub(crate) fn run<O: Element>(
        &self,
        parts: &[ArrayView4<'_, f32>],
        gates: ArrayView4<'_, f32>,
        out: ArrayViewMut4<'_, O>,
        mut arena: Arena<'_>,
    ) {
        let (batch, heads, len, _) = self.dim;
        let out = O::any_out(OutRows::new(out, arena.take(claim_words(batch * heads * len))));
        let parts: Vec<AnyArray<'_>> = parts.iter().map(|part| f32::any(Heads::new(*part))).collect();
        let gates = f32::any(Heads::new(gates));
        let shares = arena.shares(parallel::threads(), bytes_for::<f32>(self.row()));
        let tiles = len.div_ceil(ROWS);
        let start = |worker: usize| shares.take(worker).take::<f32>(self.row());
        parallel::for_each(parallel::threads(), batch * heads * tiles, start, |sum, task| {
            let (b, h, tile) = (task / tiles / heads, task / tiles % heads, task % tiles);
            let rows = tile * ROWS..((tile + 1) * ROWS).min(len);
            self.isa.dispatch(Sum { parts: &parts, gates: &gates, out: &out, sum, at: (b, h), rows });
        });
    }
}

struct Sum<'a, 'b> {
    parts: &'a [AnyArray<'b>],
    gates: &'a AnyArray<'b>,
    out: &'a AnyOut<'b>,
    sum: &'a mut [f32],
    at: (usize, usize),
    rows: Range<usize>,
}

impl Kernel for Sum<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { parts, gates, out, sum, at: (b, h), rows } = self;
        let gates = gates.rows(b, h, &rows);
        let mut to = out.take(b, h, rows.clone());
        for i in 0..rows.len() {
            sum.fill(0.0);
            for (p, part) in parts.iter().enumerate() {
                let gate = s.splat(gates.at(i, p));
                let row = part.rows(b, h, &(rows.start + i..rows.start + i + 1));
                let crate::simd::any::AnyRows::F32(row) = row else { continue };
                let Some(row) = row.row(0) else { continue };
                for (sum, x) in sum.chunks_mut(S::LANES).zip(row.chunks(S::LANES)) {
                    let x = s.mul_add(gate, s.load_tail(x), s.load(sum));
                    s.store(sum, x);
                }
            }
            to.write(s, i, sum, 1.0);
        }
    }
}
