//! Summaries of blocks of rows, as a stage of a pipeline.

use ndarray::ArrayView4;

use crate::element::Element;
use crate::engine::parallel;
use crate::error::Result;
use crate::select::Summary;
use crate::select::summary::Extend;
use crate::simd::Isa;
use crate::simd::mem::{Heads, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::stages::pass::{Pass, Scratch};

/// A summary of each block of `unit` rows, at least 1, `[batch, heads, blocks,
/// dim]`: one that is as wide as a row.
pub(crate) fn summarise<'p, T: Element>(
    pass: &mut Pass<'p>,
    isa: Isa,
    x: ArrayView4<'_, T>,
    unit: usize,
    summary: Summary,
) -> Result<Scratch<'p>> {
    let (batch, heads, len, dim) = x.dim();
    let blocks = len.div_ceil(unit);
    let mut rows = pass.rows((batch, heads, blocks, dim))?;
    let (stride, tasks, workers) = (rows.stride(), batch * heads * blocks, parallel::threads());
    let sizes = [dim, Summary::room(dim)];
    let share = sizes.map(bytes_for::<f32>).iter().sum();
    let bytes = bytes_for::<u64>(claim_words(tasks)) + bytes_for_shares(workers, share);
    pass.stage(
        || (batch * heads * len * dim) as u64,
        bytes,
        |mut arena| {
            let rows = Parts::new(rows.numbers_mut(), stride, arena.take(claim_words(tasks)));
            let x = T::any(Heads::new(x));
            let shares = arena.shares(workers, share);
            let start = |worker: usize| {
                let mut arena = shares.take(worker);
                sizes.map(|n| arena.take::<f32>(n))
            };
            let tasks = if dim == 0 { 0 } else { tasks };
            parallel::for_each(workers, tasks, start, |[sums, room], task| {
                let (head, block) = (task / blocks, task % blocks);
                let of = block * unit..((block + 1) * unit).min(len);
                let keys = x.rows(head / heads, head % heads, &of);
                let row = rows.take(task);
                row[dim..].fill(0.0);
                let row = &mut row[..dim];
                summary.extend(isa, keys, Extend { from: 0, unit, head_dim: dim, rows: row, sums, room });
            });
        },
    );
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;

    #[test]
    fn blocks_of_all_heads_are_summarised() {
        for (len, unit, dim) in [(0, 3, 4), (1, 5, 1), (70, 16, 12), (64, 64, 16), (130, 1, 33)] {
            let x = array(len as u64, (2, 3, len, dim));
            for (isa, summary) in Isa::available().flat_map(|isa| [(isa, Summary::Max), (isa, Summary::Mean)])
            {
                let got = alone(|pass| Ok(summarise(pass, isa, x.view(), unit, summary)?.view().to_owned()));
                assert_eq!(got.dim(), (2, 3, len.div_ceil(unit), dim));
                for ((b, h, s, c), &got) in got.indexed_iter() {
                    let block = (s * unit..((s + 1) * unit).min(len)).map(|i| f64::from(x[[b, h, i, c]]));
                    let count = block.clone().count() as f64;
                    let want = match summary {
                        Summary::Max => block.fold(f64::MIN, f64::max),
                        _ => block.sum::<f64>() / count,
                    };
                    assert!((f64::from(got) - want).abs() < 1e-6, "{isa} {summary:?}: {got}, {want}");
                }
            }
        }
    }
}
