//! One matrix a head: rows of every sequence times a matrix that all of them
//! share.

use std::ops::Range;

use ndarray::{ArrayView3, ArrayView4, ArrayViewMut4, Axis};

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyArray, AnyOut};
use crate::simd::mem::{Arena, Heads, OutRows, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::{Product, Update};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::{Pass, Scratch};

/// Rows that are multiplied at once, of any sequences.
const ROWS: usize = 48;
/// Rows of a task: a matrix is packed once for them.
const TASK_ROWS: usize = 4 * ROWS;

/// The sizes of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Project {
    pub(crate) isa: Isa,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    /// Rows of each sequence and head.
    pub(crate) len: usize,
    /// Columns of `a`, which are rows of a matrix.
    pub(crate) inner: usize,
    /// Columns of a matrix and of the output.
    pub(crate) width: usize,
}

impl Project {
    fn blocks(&self) -> usize {
        self.width.div_ceil(self.isa.panel())
    }

    fn claims(&self) -> usize {
        claim_words(self.batch * self.heads * self.len * self.blocks().max(1))
    }

    fn share_bytes(&self) -> usize {
        let (inner, panel) = (self.inner, self.isa.panel());
        bytes_for::<f32>(inner * panel) + bytes_for::<f32>(ROWS * inner) + bytes_for::<f32>(ROWS * panel)
    }

    /// Bytes of scratch.
    pub(crate) fn bytes(&self) -> usize {
        bytes_for::<u64>(self.claims()) + bytes_for_shares(parallel::threads(), self.share_bytes())
    }

    /// The product as a stage of a pipeline, in scratch.
    pub(crate) fn stage<A: Element, B: Element>(
        &self,
        pass: &mut Pass<'_>,
        a: ArrayView4<'_, A>,
        m: ArrayView3<'_, B>,
        to: &mut Scratch<'_>,
    ) {
        let &Self { batch, heads, len, inner, width, .. } = self;
        let flops = || (2 * batch * heads * len * inner) as u64 * width as u64;
        pass.stage(flops, self.bytes(), |arena| {
            if let Some(to) = to.view_mut() {
                self.run(a, m, to, arena);
            }
        });
    }

    /// `out[b, h, i, ..] = a[b, h, i, ..] m[h]`: `a` is `[batch, heads, len,
    /// inner]`, `m` `[heads, inner, width]`.
    pub(crate) fn run<A: Element, B: Element, O: Element>(
        &self,
        a: ArrayView4<'_, A>,
        m: ArrayView3<'_, B>,
        out: ArrayViewMut4<'_, O>,
        arena: Arena<'_>,
    ) {
        self.run_on(a, m, None, out, arena);
    }

    /// The same plus `bias`, `[width]` or `[heads, width]`, in every row.
    pub(crate) fn run_on<A: Element, B: Element, O: Element>(
        &self,
        a: ArrayView4<'_, A>,
        m: ArrayView3<'_, B>,
        bias: Option<&[f32]>,
        out: ArrayViewMut4<'_, O>,
        mut arena: Arena<'_>,
    ) {
        let &Self { isa, batch, heads, len, inner, width } = self;
        assert!(a.dim() == (batch, heads, len, inner) && m.dim() == (heads, inner, width));
        let (workers, panel) = (parallel::threads(), isa.panel());
        let out = &O::any_out(OutRows::in_blocks(out, panel, arena.take(self.claims())));
        let a = A::any(Heads::new(a));
        let m = B::any(Heads::new(m.insert_axis(Axis(0))));
        let shares = arena.shares(workers, self.share_bytes());
        let start = |worker: usize| {
            let mut share = shares.take(worker);
            [share.take(inner * panel), share.take(ROWS * inner), share.take(ROWS * panel)]
        };
        let rows = batch * len;
        let groups = rows.div_ceil(TASK_ROWS);
        parallel::for_each(workers, heads * self.blocks() * groups, start, |room, task| {
            let (group, place) = (task % groups, task / groups);
            let rows = group * TASK_ROWS..((group + 1) * TASK_ROWS).min(rows);
            let (head, block) = (place / self.blocks(), place % self.blocks());
            isa.dispatch(Block { sizes: self, a, m, bias, head, block, rows, room, out });
        });
    }
}

/// A block of columns of some rows of one head.
struct Block<'a, 'b, 'c> {
    sizes: &'a Project,
    a: AnyArray<'c>,
    m: AnyArray<'c>,
    bias: Option<&'a [f32]>,
    head: usize,
    block: usize,
    /// Counted over all sequences.
    rows: Range<usize>,
    room: &'a mut [&'b mut [f32]; 3],
    out: &'a AnyOut<'c>,
}

impl Kernel for Block<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { sizes, a, m, bias, head, block, rows, room: [matrix, left, tile], out } = self;
        let (inner, panel, len) = (sizes.inner, sizes.isa.panel(), sizes.len);
        let cols = block * panel..((block + 1) * panel).min(sizes.width);
        let padded = cols.len().next_multiple_of(S::LANES);
        // Columns that are not there are multiplied too.
        matrix.fill(0.0);
        m.rows(0, head, &(0..inner)).columns(cols.clone()).pack_panel(s, matrix);
        let own = |bias: &[f32]| if bias.len() == sizes.width { 0 } else { head * sizes.width };
        let bias = bias.map(|bias| &bias[own(bias)..][cols]);
        let update = if bias.is_some() { Update::Add } else { Update::Set };
        for first in rows.clone().step_by(ROWS) {
            let end = (first + ROWS).min(rows.end);
            for (at, b, part) in segments(first..end, len) {
                a.rows(b, head, &part).pack_rows(s, &mut left[at * inner..], inner);
            }
            for row in tile.chunks_exact_mut(panel).take(end - first) {
                if let Some(bias) = bias {
                    row[..bias.len()].copy_from_slice(bias);
                }
            }
            s.vectorize(Product {
                a: Rows::of_slice(left, end - first, inner, inner),
                b: Rows::of_slice(matrix, inner, padded, panel),
                c: tile,
                ldc: panel,
                update,
            });
            for (at, b, part) in segments(first..end, len) {
                let mut to = out.take_block(b, head, part.clone(), block);
                for i in 0..part.len() {
                    to.write(s, i, &tile[(at + i) * panel..][..padded], 1.0);
                }
            }
        }
    }
}

/// Rows counted over all sequences as rows of each: how many come before, the
/// sequence, and its rows.
#[inline(always)]
fn segments(rows: Range<usize>, len: usize) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
    let start = rows.start;
    let mut at = start;
    std::iter::from_fn(move || {
        if at == rows.end {
            return None;
        }
        let (batch, first) = (at / len, at % len);
        let n = (len - first).min(rows.end - at);
        at += n;
        Some((at - n - start, batch, first..first + n))
    })
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, Array4, s};

    use super::*;
    use crate::engine::parallel::on_threads;
    use crate::engine::workspace::Workspace;
    use crate::math::random::Normal;

    #[test]
    fn every_head_has_its_matrix() {
        let sizes = [
            (1, 1, 1, 1, 1),
            (3, 2, 5, 7, 70),
            (50, 3, 1, 33, 130),
            (2, 2, 230, 16, 64),
            (2, 1, 3, 0, 5),
            (0, 2, 3, 4, 5),
            (2, 2, 4, 3, 0),
        ];
        for (batch, heads, len, inner, width) in sizes {
            let mut normal = Normal::new(1);
            let mut next = || normal.next().unwrap() as f32;
            let a = Array4::from_shape_simple_fn((batch, heads, len, inner), &mut next);
            let b = Array3::from_shape_simple_fn((heads, width, inner), &mut next);
            for isa in Isa::available() {
                let sizes = Project { isa, batch, heads, len, inner, width };
                let mut out = Array4::from_elem((batch, heads, len, width), f32::NAN);
                on_threads(3, || {
                    let mut workspace = Workspace::new();
                    let m = b.view().permuted_axes([0, 2, 1]);
                    sizes.run(a.view(), m, out.view_mut(), workspace.arena(sizes.bytes()).unwrap());
                });
                let bias: Vec<f32> = (0..width).map(|c| c as f32).collect();
                let mut on_bias = out.clone();
                on_threads(3, || {
                    let mut workspace = Workspace::new();
                    let (m, arena) = (b.view().permuted_axes([0, 2, 1]), workspace.arena(sizes.bytes()));
                    sizes.run_on(a.view(), m, Some(&bias), on_bias.view_mut(), arena.unwrap());
                });
                for ((i, h, t, c), got) in out.indexed_iter() {
                    let (row, column) = (a.slice(s![i, h, t, ..]), b.slice(s![h, c, ..]));
                    let want: f64 = row.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{isa} {got} for {want}");
                    let on_bias = f64::from(on_bias[[i, h, t, c]]) - c as f64;
                    assert!((on_bias - want).abs() < 1e-4, "{isa} {on_bias} for {want}");
                }
            }
        }
    }
}
