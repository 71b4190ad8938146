//! Angular hashes: on which side of some planes rows lie, and rows sorted by it.

use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::simd::any::AnyArray;
use crate::simd::mem::{Parts, bytes_for, bytes_for_shares, claim_words};
use crate::simd::{Isa, Kernel, Simd};

use super::probe::{self, Probe};
use super::reserve;
use super::rows_of;
use super::score::Candidates;

/// Most planes: as many bits are sorted by counting.
pub(crate) const MOST: usize = 16;

/// Rows of a task.
const TILE: usize = 2048;

/// For each row of each head a number whose bit `i` says whether its product with
/// row `i` of `planes` is above 0.
pub(crate) fn sides(isa: Isa, x: AnyArray<'_>, planes: &[f32]) -> Result<Vec<u32>> {
    let (batch, heads, n, dim) = x.dim();
    let mut codes = Vec::new();
    reserve(&mut codes, (batch * heads).saturating_mul(n))?;
    codes.resize(batch * heads * n, 0u32);
    if dim == 0 || codes.is_empty() || planes.is_empty() {
        return Ok(codes);
    }
    let (tiles, share, workers) = (n.div_ceil(TILE), probe::Room::bytes(dim, TILE), parallel::threads());
    let claims = claim_words(batch * heads * n);
    let mut workspace = Workspace::new();
    let mut arena = workspace.arena(bytes_for::<u64>(claims) + bytes_for_shares(workers, share))?;
    let parts = Parts::new(&mut codes, 1, arena.take(claims));
    let shares = arena.shares(workers, share);
    let start = |worker: usize| probe::Room::take(&mut shares.take(worker), dim, TILE);
    parallel::for_each(workers, batch * heads * tiles, start, |room, task| {
        let (unit, at) = (task / tiles, task % tiles * TILE);
        let rows = at..(at + TILE).min(n);
        let to = parts.take_run(unit * n + rows.start..unit * n + rows.end);
        let probe = Probe { isa, queries: rows_of(planes, planes.len() / dim, dim), scale: 1.0 };
        let keys = |m| Candidates::Rows(x.rows(unit / heads, unit % heads, &(at..at + m)));
        probe.products(
            |_| rows.len(),
            keys,
            room,
            |bit, row| {
                isa.dispatch(Mark { row, bit: bit as u32, to: &mut *to });
            },
        );
    });
    Ok(codes)
}

/// Sets a bit where a number is above 0.
struct Mark<'a> {
    row: &'a [f32],
    bit: u32,
    to: &'a mut [u32],
}

impl Kernel for Mark<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (to, &x) in self.to.iter_mut().zip(self.row) {
            *to |= u32::from(x > 0.0) << self.bit;
        }
    }
}

/// The place of a number in the reflected Gray code: that of neighbours differs by 1.
pub(crate) fn gray_rank(code: u32) -> u32 {
    [16, 8, 4, 2, 1].iter().fold(code, |x, shift| x ^ (x >> shift))
}

/// The numbers of the rows of each list of `n` buckets, of `1 << bits`, in the order of
/// these and, in one, as they come.
pub(crate) fn sorted(buckets: &[u32], n: usize, bits: usize) -> Result<Vec<u32>> {
    let mut order = Vec::new();
    reserve(&mut order, buckets.len())?;
    order.resize(buckets.len(), 0u32);
    let lists = buckets.len().checked_div(n).unwrap_or(0);
    let mut claims = vec![0; claim_words(lists)];
    let parts = Parts::new(&mut order, n, &mut claims);
    let start = |_| vec![0usize; (1 << bits) + 1];
    parallel::for_each(parallel::threads(), lists, start, |starts, list| {
        let (buckets, order) = (&buckets[list * n..][..n], parts.take(list));
        starts.fill(0);
        buckets.iter().for_each(|&bucket| starts[bucket as usize + 1] += 1);
        (0..1 << bits).for_each(|i| starts[i + 1] += starts[i]);
        for (row, &bucket) in buckets.iter().enumerate() {
            order[starts[bucket as usize]] = row as u32;
            starts[bucket as usize] += 1;
        }
    });
    Ok(order)
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::simd::any::IntoAny;
    use crate::simd::mem::Heads;

    #[test]
    fn sides_ranks_and_orders() {
        let x = Array4::from_shape_fn((2, 2, 150, 5), |(b, h, i, c)| {
            ((b * 7 + h * 5 + i * (c + 3)) % 11) as f32 - 5.0
        });
        let planes: Vec<f32> = (0..15).map(|i| ((i * 4) % 7) as f32 - 3.0).collect();
        let side = |at: usize, plane: usize| {
            let (unit, i) = (at / 150, at % 150);
            let dot: f32 = (0..5).map(|c| x[[unit / 2, unit % 2, i, c]] * planes[plane * 5 + c]).sum();
            u32::from(dot > 0.0) << plane
        };
        for isa in Isa::available() {
            let codes = sides(isa, f32::any(Heads::new(x.view())), &planes).unwrap();
            assert!(
                codes.iter().enumerate().all(|(at, &code)| code == (0..3).map(|i| side(at, i)).sum::<u32>())
            );
            let order = sorted(&codes, 150, 3).unwrap();
            for (order, codes) in order.chunks(150).zip(codes.chunks(150)) {
                let keys: Vec<(u32, u32)> = order.iter().map(|&i| (codes[i as usize], i)).collect();
                assert!(keys.is_sorted() && keys.len() == 150);
            }
        }
        for rank in 0..128u32 {
            assert_eq!(gray_rank(rank ^ (rank >> 1)), rank);
        }
    }
}
