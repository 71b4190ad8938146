//! Rows of features: what a feature map makes of the rows of an array.

use std::ops::Range;

use ndarray::ArrayView4;

use crate::element::Element;
use crate::engine::parallel;
use crate::engine::recur::copy_rows;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Sequence};
use crate::math::features::{FeatureMap, FeatureRows};
use crate::simd::Isa;
use crate::simd::any::AnyRows;
use crate::simd::mem::{Heads, Parts, bytes_for, claim_words};
use crate::stages::pass::{Pass, Scratch};

/// Elements of rows that are copied at once.
const BLOCK: usize = 4096;
/// Rows of a task.
const TASK: usize = 64;

/// The features of all rows of an array, for `heads` heads of which
/// neighbours share its rows. `of` calls back with the map of a head of an
/// entry of the batch, for some rows.
pub(crate) fn map<'a, T: Element>(
    pass: &mut Pass<'a>,
    isa: Isa,
    (x, heads, dim): (ArrayView4<'_, T>, usize, usize),
    of: impl Fn(usize, usize, Range<usize>, &mut dyn FnMut(&dyn FeatureMap, Range<usize>)) + Sync + Send,
) -> Result<Scratch<'a>> {
    let (batch, own, len, head_dim) = x.dim();
    if head_dim > BLOCK {
        return Err(Error::value("q", format!("a head_dim of at most {BLOCK}"), head_dim));
    }
    let mut features = pass.rows((batch, heads, len, dim))?;
    let (stride, pieces) = (features.stride(), len.div_ceil(TASK));
    let tasks = batch * heads * pieces;
    let claims = claim_words(batch * heads * len);
    pass.stage(
        || 0,
        bytes_for::<u64>(claims),
        |mut arena| {
            let to = Parts::new(features.numbers_mut(), stride, arena.take(claims));
            let x = T::any(Heads::new(x));
            let step = (BLOCK / head_dim.max(1)).min(TASK);
            parallel::for_each(
                parallel::threads(),
                tasks,
                |_| [0f32; BLOCK],
                |block, task| {
                    let (b, h, first) = (task / pieces / heads, task / pieces % heads, task % pieces * TASK);
                    let own = h / (heads / own.max(1)).max(1);
                    of(b, h, first..(first + TASK).min(len), &mut |map, rows| {
                        for at in rows.clone().step_by(step) {
                            let end = (at + step).min(rows.end);
                            let x = as_lie(isa, x.rows(b, own, &(at..end)), block);
                            let first = (b * heads + h) * len;
                            let features = to.take_run(first + at..first + end);
                            // What the map does not write.
                            features.chunks_exact_mut(stride.max(1)).for_each(|row| row[dim..].fill(0.0));
                            map.apply(
                                isa,
                                h,
                                FeatureRows { rows: end - at, dim: head_dim, x, features, stride },
                            );
                        }
                    });
                },
            );
        },
    );
    Ok(features)
}

/// Rows one after the other: where they lie, or copied.
pub(crate) fn as_lie<'a>(isa: Isa, rows: AnyRows<'a>, block: &'a mut [f32]) -> &'a [f32] {
    if let Some(x) = rows.as_slice() {
        return x;
    }
    let (len, dim) = (rows.len(), rows.cols());
    copy_rows(isa, rows, block, dim);
    &block[..len * dim]
}

/// A number for each of some units, each worked out by one thread.
pub(crate) fn numbers<'a>(
    pass: &mut Pass<'a>,
    units: usize,
    of: impl Fn(usize) -> f32 + Sync + Send,
) -> Result<&'a [f32]> {
    let (numbers, claims) = (pass.take(units)?, claim_words(units));
    pass.stage(
        || 0,
        bytes_for::<u64>(claims),
        |mut arena| {
            let to = Parts::new(&mut *numbers, 1, arena.take(claims));
            parallel::for_each(parallel::threads(), units, |_| (), |(), unit| to.take(unit).fill(of(unit)));
        },
    );
    Ok(numbers)
}

/// The sequences that rows of an entry of the batch belong to, and which of the
/// rows each has.
pub(crate) fn sequences(
    (dims, lengths): (Dims, Lengths<'_>),
    batch: usize,
    rows: Range<usize>,
    of: impl Fn(Sequence) -> Range<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let own = if dims.packed { 0..dims.batch } else { batch..batch + 1 };
    own.map(move |i| {
        let all = of(lengths.sequence(&dims, i));
        // What is beyond the length of keys belongs to nobody.
        (i, rows.start.clamp(all.start, all.end)..rows.end.clamp(all.start, all.end))
    })
    .filter(|(_, rows)| !rows.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::heads::of_heads;
    use crate::definition::number::{Real, Running};
    use crate::math::features::{EluPlusOne, Sigmoid};
    use crate::stages::pass::alone;
    use crate::testing::arrays::array;
    use ndarray::Array2;

    #[test]
    fn features_are_those_of_the_definition() {
        let maps: [&dyn FeatureMap; 2] = [&EluPlusOne, &Sigmoid];
        for (which, isa) in (0..6).flat_map(|which| Isa::available().map(move |isa| (which, isa))) {
            let (len, dim) = [(1, 5), (64, 16), (130, 9), (3, 100), (0, 4), (70, 0)][which];
            let x = array(which as u64, (2, 2, len, dim));
            // A map of its own for each half of a sequence and head.
            let of = |b: usize, h: usize, t: usize| maps[(b + h + usize::from(t >= len / 2)) % 2];
            let got = alone(|pass| {
                let call = (x.view(), 4, dim);
                let features = map(pass, isa, call, |b, h, rows, run| {
                    let middle = (len / 2).clamp(rows.start, rows.end);
                    [rows.start..middle, middle..rows.end].into_iter().for_each(|rows| {
                        run(of(b, h, rows.start), rows);
                    });
                })?;
                Ok(features.view().to_owned())
            });
            let dims = Dims {
                batch: 2,
                q_heads: 4,
                kv_heads: 2,
                q_len: len,
                kv_len: len,
                head_dim: dim,
                value_dim: 0,
                packed: false,
            };
            of_heads::<Running>(&dims, &Lengths::Full, |head| {
                for t in 0..len {
                    let map = of(head.batch, head.head, t);
                    let want = head.features::<Running, f32>(map, &x.view(), &(t..t + 1));
                    for (c, want) in want.iter().enumerate() {
                        let got = f64::from(got[[head.batch, head.head, t, c]]);
                        assert!(
                            (got - want.value()).abs() <= want.off(),
                            "{isa} {which}: {got}, not {want:?}"
                        );
                    }
                }
                Array2::from_elem((len, 0), Running::of(0.0))
            });
        }
    }
}
