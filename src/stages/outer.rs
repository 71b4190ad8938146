//! Sums of outer products of rows: what a matrix has for its gradient that every row
//! was multiplied by.

use ndarray::{ArrayView3, ArrayView4, ArrayViewMut3, ShapeBuilder};

use crate::element::Element;
use crate::engine::attend_backward::pack_columns;
use crate::engine::parallel;
use crate::simd::any::{AnyArray, AnyRows};
use crate::simd::mem::{Arena, Heads, Parts, Rows, bytes_for, bytes_for_shares, claim_words};
use crate::simd::tile::{Product, Update};
use crate::simd::{Isa, Kernel, Simd};

/// Tokens that are multiplied at once.
const TOKENS: usize = 64;
const ROWS: usize = Outer::ROWS;

/// `sums[h] += sum_(b, i) a[b, h, i, ..]^T x[b, h, i, ..]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outer {
    pub(crate) isa: Isa,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) len: usize,
    /// Columns of `a`, which are rows of a sum, and of `x`.
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Outer {
    /// Rows of a sum of a task.
    pub(crate) const ROWS: usize = 48;

    /// From one row of a sum to the next.
    fn stride(&self) -> usize {
        self.cols.next_multiple_of(self.isa.panel())
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Numbers that the sums take.
    pub(crate) fn numbers(&self) -> usize {
        self.heads.saturating_mul(self.blocks() * ROWS).saturating_mul(self.stride())
    }

    fn share_bytes(&self) -> usize {
        bytes_for::<f32>(ROWS * TOKENS) + bytes_for::<f32>(TOKENS * self.stride())
    }

    /// Bytes of scratch.
    pub(crate) fn bytes(&self) -> usize {
        bytes_for::<u64>(claim_words(self.heads * self.blocks()))
            + bytes_for_shares(parallel::threads(), self.share_bytes())
    }

    /// Adds the products of all tokens. What is not finite in `x` counts as 0: it shows
    /// in `a` where it matters.
    pub(crate) fn add<X: Element>(
        &self,
        a: ArrayView4<'_, f32>,
        x: ArrayView4<'_, X>,
        sums: &mut [f32],
        arena: Arena<'_>,
    ) {
        assert!(a.dim().3 == self.rows);
        self.add_from(0, a, x, sums, arena);
    }

    /// The same of an `a` that has some of the columns alone, from one on that is the first of
    /// a task.
    pub(crate) fn add_from<X: Element>(
        &self,
        first: usize,
        a: ArrayView4<'_, f32>,
        x: ArrayView4<'_, X>,
        sums: &mut [f32],
        mut arena: Arena<'_>,
    ) {
        let (&Self { isa, batch, heads, len, cols, .. }, rows) = (self, a.dim().3);
        assert!(a.dim() == (batch, heads, len, rows) && x.dim() == (batch, heads, len, cols));
        assert!(first.is_multiple_of(ROWS) && first + rows <= self.rows);
        if cols == 0 {
            return;
        }
        let (tasks, blocks) = (heads * self.blocks(), rows.div_ceil(ROWS));
        let sums = Parts::new(sums, ROWS * self.stride(), arena.take(claim_words(tasks)));
        let (a, x) = (AnyArray::F32(Heads::new(a)), X::any(Heads::new(x)));
        let shares = arena.shares(parallel::threads(), self.share_bytes());
        let start = |worker: usize| {
            let mut share = shares.take(worker);
            [share.take(ROWS * TOKENS), share.take(TOKENS * self.stride())]
        };
        parallel::for_each(parallel::threads(), heads * blocks, start, |room, task| {
            let (head, block) = (task / blocks, task % blocks);
            let sum = sums.take(head * self.blocks() + first / ROWS + block);
            let columns = block * ROWS..((block + 1) * ROWS).min(rows);
            for (b, i) in (0..batch).flat_map(|b| (0..len).step_by(TOKENS).map(move |i| (b, i))) {
                let tokens = i..(i + TOKENS).min(len);
                let a = a.rows(b, head, &tokens).columns(columns.clone());
                let x = x.rows(b, head, &tokens);
                isa.dispatch(Add { a, x, room: &mut *room, sum: &mut *sum, stride: self.stride() });
            }
        });
    }

    /// Rows of the sums from `first` on, `[heads, rows, cols]`, or those of all heads
    /// together.
    pub(crate) fn write(&self, sums: &[f32], first: usize, mut to: ArrayViewMut3<'_, f32>) {
        let (stride, rows) = (self.stride(), self.blocks() * ROWS);
        let shape = (self.heads, self.rows, self.cols).strides((rows * stride, stride, 1));
        let Ok(sums) = ArrayView3::from_shape(shape, sums) else { return to.fill(0.0) };
        let shared = to.dim().0 == 1;
        for ((h, r, c), to) in to.indexed_iter_mut() {
            let of = if shared { 0..self.heads } else { h..h + 1 };
            *to = of.map(|h| f64::from(sums[[h, first + r, c]])).sum::<f64>() as f32;
        }
    }
}

/// Some tokens of a block of rows.
struct Add<'a, 'b, 'c> {
    a: AnyRows<'a>,
    x: AnyRows<'a>,
    room: &'b mut [&'c mut [f32]; 2],
    sum: &'b mut [f32],
    stride: usize,
}

impl Kernel for Add<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { a, x, room: [left, right], sum, stride } = self;
        let (rows, cols, tokens) = (a.cols(), x.cols(), x.len());
        let panel = S::LANES * S::TILE_VECTORS;
        a.pack_columns(s, left, TOKENS);
        pack_columns(s, x, right, TOKENS);
        for col in (0..cols).step_by(panel) {
            let width = (cols - col).min(panel).next_multiple_of(S::LANES);
            s.vectorize(Product {
                a: Rows::of_slice(left, rows, tokens, TOKENS),
                b: Rows::of_slice(&right[col * TOKENS..], tokens, width, panel),
                c: &mut sum[col..],
                ldc: stride,
                update: Update::Add,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use ndarray::{Array3, s};

    use super::*;
    use crate::engine::parallel::on_threads;
    use crate::engine::workspace::Workspace;
    use crate::testing::arrays::array;

    #[test]
    fn tokens_add_up() {
        for (batch, heads, len, rows, cols) in [
            (1, 1, 1, 1, 1),
            (2, 3, 70, 5, 40),
            (1, 2, 200, 130, 70),
            (2, 2, 0, 3, 4),
            (1, 2, 9, 7, 0),
            (0, 1, 3, 4, 5),
        ] {
            let a = array(1, (batch, heads, len, rows));
            let x = array(2, (batch, heads, len, cols)).mapv(bf16::from_f32);
            for isa in Isa::available() {
                let outer = Outer { isa, batch, heads, len, rows, cols };
                let run = |threads, of: usize| {
                    on_threads(threads, || {
                        let mut sums = vec![0.0; outer.numbers()];
                        let mut workspace = Workspace::new();
                        for _ in 0..2 {
                            let arena = workspace.arena(outer.bytes()).unwrap();
                            outer.add(a.view(), x.view(), &mut sums, arena);
                        }
                        let mut to = Array3::from_elem((of, rows, cols), f32::NAN);
                        outer.write(&sums, 0, to.view_mut());
                        to
                    })
                };
                let (each, all) = (run(1, heads), run(1, 1));
                assert_eq!((&each, &all), (&run(3, heads), &run(3, 1)));
                for ((h, r, c), got) in each.indexed_iter() {
                    let of = |h: usize| {
                        let (a, x) = (a.slice(s![.., h, .., r]), x.slice(s![.., h, .., c]));
                        2.0 * a.iter().zip(x).map(|(a, x)| f64::from(*a) * x.to_f64()).sum::<f64>()
                    };
                    assert!((f64::from(*got) - of(h)).abs() < 1e-4);
                    let want: f64 = (0..heads).map(of).sum();
                    assert!((f64::from(all[[0, r, c]]) - want).abs() < 1e-4);
                }
            }
        }
        // What is not finite shows through the other factor, or not at all.
        let mut a = array(1, (1, 1, 3, 2));
        let mut x = array(2, (1, 1, 3, 2));
        x.slice_mut(s![.., .., 1, ..]).fill(f32::NAN);
        a.slice_mut(s![.., .., 1, ..]).fill(0.0);
        a[[0, 0, 2, 1]] = f32::NAN;
        let outer = Outer { isa: Isa::choose(None).unwrap(), batch: 1, heads: 1, len: 3, rows: 2, cols: 2 };
        let (mut sums, mut to) = (vec![0.0; outer.numbers()], Array3::zeros((1, 2, 2)));
        outer.add(a.view(), x.view(), &mut sums, Workspace::new().arena(outer.bytes()).unwrap());
        outer.write(&sums, 0, to.view_mut());
        assert!((0..2).all(|c| to[[0, 0, c]].is_finite() && to[[0, 1, c]].is_nan()));
    }
}
