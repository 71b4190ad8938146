//! Rows of heads in another order: lists of them gathered, and brought back.

use ndarray::ArrayView4;

use crate::element::Element;
use crate::engine::parallel;
use crate::error::{Error, Result};
use crate::keys::TokenLists;
use crate::select::reserve;
use crate::simd::any::{AnyOut, AnyRows};
use crate::simd::mem::{Heads, OutRows, Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::stages::pass::{Out, Pass, Scratch};

/// Rows of a task.
const TASK: usize = 64;

/// No row: of zeros, and nowhere.
pub(crate) const NONE: u32 = u32::MAX;

/// The rows of lists, each filled up to the longest with [none](NONE), and how many that
/// are.
pub(crate) fn padded(lists: &TokenLists) -> Result<(Vec<u32>, usize)> {
    let of = lists.layout();
    let units = of.sequences * of.heads() * of.blocks();
    let place =
        |unit: usize| (unit / of.blocks() / of.heads(), unit / of.blocks() % of.heads(), unit % of.blocks());
    let len = |unit: usize| {
        let (b, h, block) = place(unit);
        lists.keys(b, h, block)
    };
    let (most, mut rows) = ((0..units).map(len).max().unwrap_or(0), Vec::new());
    reserve(&mut rows, units.saturating_mul(most))?;
    for unit in 0..units {
        let (b, h, block) = place(unit);
        rows.extend(lists.runs(b, h, block).iter().flat_map(|run| run.range()).map(|row| row as u32));
        rows.resize((unit + 1) * most, NONE);
    }
    Ok((rows, most))
}

/// Lists of rows, `[batch, units, len]`; neighbouring units are of the same head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Picked<'a> {
    pub(crate) rows: &'a [u32],
    pub(crate) units: usize,
    pub(crate) len: usize,
}

impl Picked<'_> {
    /// The rows as an array `[batch, units, len, dim]`.
    pub(crate) fn gather<'p, T: Element>(
        &self,
        pass: &mut Pass<'p>,
        isa: Isa,
        x: ArrayView4<'_, T>,
    ) -> Result<Scratch<'p>> {
        let &Self { rows, units, len } = self;
        let (batch, heads, n, dim) = x.dim();
        let mut gathered = pass.rows((batch, units, len, dim))?;
        let (stride, pieces, claims) = (gathered.stride(), len.div_ceil(TASK), claim_words(rows.len()));
        pass.stage(
            || 0,
            bytes_for::<u64>(claims),
            |mut arena| {
                let to = Parts::new(gathered.numbers_mut(), stride, arena.take(claims));
                let x = T::any(Heads::new(x));
                let tasks = if dim == 0 { 0 } else { batch * units * pieces };
                parallel::for_each(
                    parallel::threads(),
                    tasks,
                    |_| (),
                    |(), task| {
                        let (unit, at) = (task / pieces, task % pieces * TASK);
                        let part = unit * len + at..unit * len + (at + TASK).min(len);
                        let head = unit % units / (units / heads.max(1)).max(1);
                        let x = x.rows(unit / units, head, &(0..n));
                        let (rows, to) = (&rows[part.clone()], to.take_run(part));
                        isa.dispatch(Gather { x, rows, to, stride });
                    },
                );
            },
        );
        Ok(gathered)
    }
}

struct Gather<'a> {
    x: AnyRows<'a>,
    rows: &'a [u32],
    to: &'a mut [f32],
    stride: usize,
}

impl Kernel for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, rows, to, stride } = self;
        to.fill(0.0);
        for (&row, to) in rows.iter().zip(to.chunks_exact_mut(stride)) {
            if row != NONE {
                x.part(row as usize..row as usize + 1).pack_rows(s, to, stride);
            }
        }
    }
}

/// Where each row of heads is among lists: places, counted over the lists of its
/// head, ascending.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Places {
    offsets: Vec<usize>,
    places: Vec<u32>,
    /// Batch, heads and rows.
    sizes: [usize; 3],
}

impl Places {
    /// Of `n` rows of each of `heads` heads of each of `batch` entries.
    pub(crate) fn of(picked: Picked<'_>, [batch, heads, n]: [usize; 3]) -> Result<Self> {
        let too_large = || Error::too_large("index", format_args!("{heads} x {n} rows"));
        let all = batch.checked_mul(heads).and_then(|x| x.checked_mul(n)).ok_or_else(too_large)?;
        let (mut offsets, mut places) = (Vec::new(), Vec::new());
        offsets.try_reserve_exact(all.saturating_add(1)).map_err(|_| too_large())?;
        places.try_reserve_exact(picked.rows.len()).map_err(|_| too_large())?;
        offsets.resize(all + 1, 0usize);
        places.resize(picked.rows.len(), 0u32);
        let of_head = (picked.units / heads.max(1)).max(1) * picked.len;
        let named = |head: usize| {
            let rows = picked.rows[head * of_head..].iter().take(of_head).zip(0u32..);
            rows.filter(|(row, _)| **row != NONE).map(move |(&row, at)| (head * n + row as usize, at))
        };
        for head in 0..batch * heads {
            named(head).for_each(|(row, _)| offsets[row + 1] += 1);
        }
        for i in 0..all {
            offsets[i + 1] += offsets[i];
        }
        for head in 0..batch * heads {
            // What is written moves each start on to the next one: back again.
            for (row, at) in named(head) {
                places[offsets[row]] = at;
                offsets[row] += 1;
            }
        }
        offsets.rotate_right(1);
        offsets[0] = 0;
        Ok(Self { offsets, places, sizes: [batch, heads, n] })
    }

    /// Batch, heads and rows.
    pub(crate) fn sizes(&self) -> [usize; 3] {
        self.sizes
    }

    /// The places of a row.
    pub(crate) fn list(&self, batch: usize, head: usize, row: usize) -> &[u32] {
        let [_, heads, n] = self.sizes;
        let at = (batch * heads + head) * n + row;
        &self.places[self.offsets[at]..self.offsets[at + 1]]
    }

    /// Each row the mean of those at its places, in their order; 0 where it has none.
    pub(crate) fn means<O: Element>(
        &self,
        pass: &mut Pass<'_>,
        isa: Isa,
        from: &Scratch<'_>,
        out: Out<'_, O>,
    ) {
        let (batch, units, len, _) = from.dim();
        let (stride, [_, heads, n]) = (from.stride(), self.sizes);
        let (claims, pieces) = (claim_words(batch * heads * n), n.div_ceil(TASK));
        let share = bytes_for::<f32>(stride.max(MAX_LANES));
        let bytes = bytes_for::<u64>(claims) + bytes_for_shares(parallel::threads(), share);
        let flops = || self.places.len() as u64 * from.dim().3 as u64;
        pass.stage(flops, bytes, |mut arena| {
            let Some(out) = out else { return };
            let to = O::any_out(OutRows::new(out, arena.take(claims)));
            let shares = arena.shares(parallel::threads(), share);
            let start = |worker: usize| shares.take(worker).take::<f32>(stride.max(MAX_LANES));
            parallel::for_each(parallel::threads(), batch * heads * pieces, start, |sum, task| {
                let (unit, at) = (task / pieces, task % pieces * TASK);
                let of_head = units / heads * len * stride;
                let from = from.numbers().get(unit * of_head..(unit + 1) * of_head).unwrap_or_default();
                let (batch, head, rows) = (unit / heads, unit % heads, at..(at + TASK).min(n));
                isa.dispatch(Means { places: self, batch, head, rows, from, stride, sum, to: &to });
            });
        });
    }
}

struct Means<'a, 'b> {
    places: &'a Places,
    batch: usize,
    head: usize,
    rows: std::ops::Range<usize>,
    from: &'a [f32],
    stride: usize,
    sum: &'a mut [f32],
    to: &'a AnyOut<'b>,
}

impl Kernel for Means<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { places, batch, head, rows, from, stride, sum, to } = self;
        let mut to = to.take(batch, head, rows.clone());
        for (i, row) in rows.enumerate() {
            let list = places.list(batch, head, row);
            sum.fill(0.0);
            for &place in list {
                let from = &from[place as usize * stride..][..stride];
                for (sum, x) in sum.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
                    s.store(sum, s.add(s.load(sum), s.load(x)));
                }
            }
            to.write(s, i, sum, 1.0 / list.len().max(1) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::keys::{Layout, Per, Run};
    use crate::stages::pass::alone;

    #[test]
    fn lists_are_filled_up() {
        let layout =
            Layout { per: Per::Head, sequences: 1, q_heads: 2, kv_heads: 1, queries: 2, q_block: 1, keys: 9 };
        let run = |start, len| Run { start, len };
        let runs = vec![run(1, 2), run(5, 1), run(0, 2), run(8, 1)];
        let lists = TokenLists::new(layout, vec![0, 2, 2, 3, 4], runs).unwrap();
        let want = [[1, 2, 5], [NONE; 3], [0, 1, NONE], [8, NONE, NONE]].concat();
        assert_eq!(padded(&lists).unwrap(), (want, 3));
        let none = TokenLists::new(Layout { sequences: 0, ..layout }, vec![0], vec![]).unwrap();
        assert_eq!(padded(&none).unwrap(), (vec![], 0));
    }

    #[test]
    fn rows_come_back_as_means_of_their_places() {
        let (batch, heads, n, dim) = (2, 3, 70, 5);
        let x = Array4::from_shape_fn((batch, heads, n, dim), |(b, h, i, c)| {
            (b * 1000 + h * 100 + i) as f32 + c as f32 / 8.0
        });
        // Two lists a head: all rows backwards, and every third of them.
        let rows: Vec<u32> = (0..2 * batch * heads)
            .flat_map(|unit| (0..n).map(move |i| if unit % 2 == 0 { n - 1 - i } else { 3 * i }))
            .map(|row| if row < n { row as u32 } else { NONE })
            .collect();
        let picked = Picked { rows: &rows, units: 2 * heads, len: n };
        let places = Places::of(picked, [batch, heads, n]).unwrap();
        assert_eq!(places.list(1, 2, 6), [63, 72]);
        for isa in Isa::available() {
            let out = alone(|pass| {
                let gathered = picked.gather(pass, isa, x.view())?;
                let mut out = Array4::<f32>::from_elem(x.dim(), f32::NAN);
                if !gathered.numbers().is_empty() {
                    assert_eq!(gathered.view()[[1, 5, 2, 3]], x[[1, 2, 6, 3]]);
                    assert_eq!(gathered.view()[[1, 5, 69, 3]], 0.0);
                }
                places.means(
                    pass,
                    isa,
                    &gathered,
                    Some(out.view_mut()).filter(|_| !gathered.numbers().is_empty()),
                );
                Ok(out)
            });
            assert_eq!(out, x, "{isa}");
        }
    }
}
