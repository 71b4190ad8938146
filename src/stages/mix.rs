//! Rows that are mixed by weights: sums of the rows of an array, of which a
//! weight of 0 hides one.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayView4, ArrayViewMut4, Axis};

use crate::element::Element;
use crate::engine::parallel;
use crate::simd::any::{AnyArray, AnyOut};
use crate::simd::mem::{Heads, OutRows, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::{Product, Update};
use crate::simd::{Isa, Kernel, Simd};
use crate::stages::pass::Pass;

/// Rows that are multiplied at once.
const ROWS: usize = 48;

/// Writes `out[b, h, i, ..] = sum_j weights[b, h, i, j] x[b, h, j, ..]`, where
/// heads of `x` are shared by neighbours.
pub(crate) fn run<T: Element>(
    pass: &mut Pass<'_>,
    isa: Isa,
    weights: ArrayView4<'_, f32>,
    x: ArrayView4<'_, T>,
    out: Option<ArrayViewMut4<'_, T>>,
) {
    let ((batch, heads, rows, inner), width) = (weights.dim(), x.dim().3);
    let (panel, workers, units) = (isa.panel(), parallel::threads(), batch * heads);
    let blocks = width.div_ceil(panel);
    let claims = claim_words(units * rows * blocks.max(1));
    let room = (inner + ROWS) * panel;
    let bytes = bytes_for::<u64>(claims) + bytes_for_shares(workers, bytes_for::<f32>(room));
    let flops = || (2 * units * rows * inner) as u64 * width as u64;
    pass.stage(flops, bytes, |mut arena| {
        let Some(out) = out else { return };
        let out = &T::any_out(OutRows::in_blocks(out, panel, arena.take(claims)));
        let group = (heads / x.dim().1.max(1)).max(1);
        let x = &T::any(Heads::new(x));
        let shares = arena.shares(workers, bytes_for::<f32>(room));
        let start = |worker| shares.take(worker).take::<f32>(room);
        parallel::for_each(workers, units * blocks, start, |room, task| {
            let (unit, block) = (task / blocks, task % blocks);
            let at = [unit / heads, unit % heads];
            let weights = weights.index_axis(Axis(0), at[0]).index_axis_move(Axis(0), at[1]);
            let cols = block * panel..((block + 1) * panel).min(width);
            isa.dispatch(Block { weights, x, group, at, block, cols, room, out });
        });
    });
}

/// A block of columns of all rows of a head.
struct Block<'a, 'b, 'c> {
    weights: ArrayView2<'a, f32>,
    x: &'a AnyArray<'c>,
    group: usize,
    at: [usize; 2],
    block: usize,
    cols: Range<usize>,
    room: &'a mut &'b mut [f32],
    out: &'a AnyOut<'c>,
}

impl Kernel for Block<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, x, group, at: [entry, head], block, cols, room, out } = self;
        let ((rows, inner), panel) = (weights.dim(), S::LANES * S::TILE_VECTORS);
        let width = cols.len().next_multiple_of(S::LANES);
        let (packed, tile) = room.split_at_mut(inner * panel);
        // Columns that are not there are multiplied too.
        packed.fill(0.0);
        x.rows(entry, head / group, &(0..inner)).columns(cols).pack_panel(s, packed);
        let zero = s.splat(0.0);
        let mut products = zero;
        for x in packed.chunks_exact(S::LANES) {
            products = s.mul_add(s.load(x), zero, products);
        }
        let finite = s.reduce_add(products) == 0.0;
        for first in (0..rows).step_by(ROWS) {
            let end = (first + ROWS).min(rows);
            let mut to = out.take_block(entry, head, first..end, block);
            if finite {
                s.vectorize(Product {
                    a: Rows::from(weights.slice(ndarray::s![first..end, ..])),
                    b: Rows::of_slice(packed, inner, width, panel),
                    c: tile,
                    ldc: panel,
                    update: Update::Set,
                });
            } else {
                // What is hidden does not matter, whatever it is.
                for (row, to) in
                    weights.outer_iter().skip(first).zip(tile.chunks_exact_mut(panel)).take(end - first)
                {
                    to.fill(0.0);
                    for (&weight, x) in row.iter().zip(packed.chunks_exact(panel)).filter(|(w, _)| **w != 0.0)
                    {
                        let weight = s.splat(weight);
                        for (to, x) in to.chunks_exact_mut(S::LANES).zip(x.chunks_exact(S::LANES)) {
                            s.store(to, s.mul_add(weight, s.load(x), s.load(to)));
                        }
                    }
                }
            }
            for i in 0..end - first {
                to.write(s, i, &tile[i * panel..][..width], 1.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::Array4;

    #[test]
    fn it_is_a_product_of_which_0_hides() {
        for (rows, inner, width) in
            [(5, 7, 100), (1, 1, 1), (50, 3, 16), (0, 2, 5), (4, 0, 9), (3, 4, 0), (100, 33, 37)]
        {
            let mut weights: Array4<f32> = array(1, (2, 4, rows, inner));
            let mut x: Array4<f32> = array(2, (2, 2, inner, width));
            if inner > 2 {
                weights.index_axis_mut(Axis(3), 1).fill(0.0);
            }
            let want = Array4::from_shape_fn((2, 4, rows, width), |(b, h, i, c)| -> f64 {
                (0..inner).map(|j| f64::from(weights[[b, h, i, j]]) * f64::from(x[[b, h / 2, j, c]])).sum()
            });
            let mut bits = None;
            for (spoilt, turned, isa) in [(false, false), (true, false), (true, true)]
                .into_iter()
                .flat_map(|(a, b)| Isa::available().map(move |isa| (a, b, isa)))
            {
                if spoilt && inner > 2 {
                    x.index_axis_mut(Axis(2), 1).fill(f32::NAN);
                }
                let other = x.clone().permuted_axes([0, 1, 3, 2]).as_standard_layout().into_owned();
                let x = if turned { other.view().permuted_axes([0, 1, 3, 2]) } else { x.view() };
                let mut out = Array4::from_elem(want.dim(), f32::NAN);
                let to = std::cell::RefCell::new(&mut out);
                alone(|pass| {
                    run(pass, isa, weights.view(), x, Some(to.borrow_mut().view_mut()));
                    Ok(())
                });
                for (got, want) in out.iter().zip(&want) {
                    assert!(
                        (f64::from(*got) - want).abs() < 2e-5,
                        "{isa} {rows} {inner} {width}: {got} for {want}"
                    );
                }
                // As if the row that is hidden were finite.
                if isa == Isa::choose(None).unwrap() {
                    assert_eq!(*bits.get_or_insert_with(|| out.clone()), out);
                }
            }
        }
    }
}
