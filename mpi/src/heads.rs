//! Heads over machines: tokens are exchanged for heads, each rank works on whole sequences
//! of some heads, and outputs go back.
//!
//! "DeepSpeed Ulysses" (arXiv 2309.14509). Rank `r` has query heads `q_heads r / ranks` to
//! `q_heads (r + 1) / ranks`, and the key/value heads that these read: where there are fewer
//! of those than ranks, they go to several. Two all-to-alls; a rank sends `held` rows of
//! each head that another one has, and as many back.
//!
//! Any mechanism whose heads know nothing of each other will do, with any mask: it is called
//! with one key/value head at a time.

use std::ops::Range;

use attention_kernels::{Attention, Qkv};
use ndarray::{Array4, ArrayView4, Axis, concatenate, s};

use crate::error::Result;
use crate::plan::{Cut, part};
use crate::ring::same;
use crate::stored::{Stored, pack, unpack};
use crate::wire::Group;

/// The query heads of a rank, and the key/value heads that they read.
///
/// ```
/// use attention_kernels_mpi::heads::share;
///
/// assert_eq!(share(8, 2, 4, 1), (2..4, 0..1));
/// assert_eq!(share(6, 2, 4, 2), (3..4, 1..2));
/// ```
pub fn share(q_heads: usize, kv_heads: usize, ranks: usize, rank: usize) -> (Range<usize>, Range<usize>) {
    let (q, group) = (part(q_heads, ranks, rank), (q_heads / kv_heads.max(1)).max(1));
    let kv = if q.is_empty() { 0..0 } else { q.start / group..(q.end - 1) / group + 1 };
    (q, kv)
}

/// Outputs `[batch, q_heads, held, value_dim]` of this rank's tokens, before they are
/// rounded to the type of the input.
///
/// # Errors
/// The same on all ranks: the lowest one whose arrays do not fit, or whose mechanism refuses.
pub fn forward<T, M>(
    group: &Group,
    mechanism: &M,
    cut: &Cut,
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
) -> Result<Array4<f32>>
where
    T: Stored,
    M: for<'a> Attention<Qkv<'a, T, T, f32>>,
{
    const CALL: &str = "heads forward";
    let (me, ranks) = (group.rank(), group.size());
    let mine = check(group, cut, &q, &k, &v).map(|()| {
        let sizes = [q.dim().0, q.dim().1, k.dim().1, k.dim().3, v.dim().3];
        let rest = [T::ROUNDING.to_bits(), cut.fingerprint()];
        sizes.map(|x| x as u64).into_iter().chain(rest).collect()
    });
    const NAMES: [&str; 7] =
        ["q: batch", "q: heads", "k: heads", "k: head_dim", "v: value_dim", "q: type", "cut: fingerprint"];
    same(&group.agree(CALL, mine)?, &NAMES)?;

    let (batch, q_heads, held, dim) = q.dim();
    let (kv_heads, value_dim) = (k.dim().1, v.dim().3);
    let packed: Vec<Vec<u8>> = (0..ranks)
        .map(|rank| {
            let (of_q, of_kv) = share(q_heads, kv_heads, ranks, rank);
            let mut bytes = Vec::new();
            pack(q.slice(s![.., of_q, .., ..]), &mut bytes);
            pack(k.slice(s![.., of_kv.clone(), .., ..]), &mut bytes);
            pack(v.slice(s![.., of_kv, .., ..]), &mut bytes);
            bytes
        })
        .collect();
    let (of_q, of_kv) = share(q_heads, kv_heads, ranks, me);
    let token = batch * (of_q.len() * dim + of_kv.len() * (dim + value_dim)) * size_of::<T>();
    let lengths: Vec<_> = (0..ranks).map(|rank| cut.held(rank) * token).collect();
    let arrived = group.exchange(&slices(&packed), &lengths);

    // Rows in the order of the sequence.
    let whole = |heads: usize, dim: usize| Array4::from_elem((batch, heads, cut.tokens(), dim), T::default());
    let (mut all_q, mut all_k, mut all_v) =
        (whole(of_q.len(), dim), whole(of_kv.len(), dim), whole(of_kv.len(), value_dim));
    for (rank, bytes) in arrived.iter().enumerate() {
        let mut bytes = &bytes[..];
        for all in [&mut all_q, &mut all_k, &mut all_v] {
            let (_, heads, _, dim) = all.dim();
            let part: Array4<T> = unpack(&mut bytes, (batch, heads, cut.held(rank), dim));
            for (row, position) in cut.positions(rank).enumerate() {
                all.index_axis_mut(Axis(2), position).assign(&part.index_axis(Axis(2), row));
            }
        }
    }
    let mut said = Ok(());
    let mut out = Array4::<f32>::zeros((batch, of_q.len(), cut.tokens(), value_dim));
    let per = (q_heads / kv_heads.max(1)).max(1);
    for kv in of_kv.clone() {
        let of = (kv * per).max(of_q.start) - of_q.start..((kv + 1) * per).min(of_q.end) - of_q.start;
        let at = kv - of_kv.start;
        let x = Qkv::new(
            all_q.slice(s![.., of.clone(), .., ..]),
            all_k.slice(s![.., at..at + 1, .., ..]),
            all_v.slice(s![.., at..at + 1, .., ..]),
        );
        match mechanism.forward(x.widened()) {
            Ok(part) => out.slice_mut(s![.., of, .., ..]).assign(&part),
            Err(error) => said = Err(error.to_string()),
        }
    }

    let packed: Vec<Vec<u8>> = (0..ranks)
        .map(|rank| {
            let mut bytes = Vec::new();
            for run in cut.runs(rank) {
                pack(out.slice(s![.., .., run.clone(), ..]), &mut bytes);
            }
            bytes
        })
        .collect();
    let heads_of = |rank| share(q_heads, kv_heads, ranks, rank).0.len();
    let lengths: Vec<_> = (0..ranks).map(|rank| 4 * batch * heads_of(rank) * held * value_dim).collect();
    let arrived = group.exchange(&slices(&packed), &lengths);
    let parts: Vec<Array4<f32>> = arrived
        .iter()
        .enumerate()
        .map(|(rank, bytes)| {
            let mut bytes = &bytes[..];
            let runs: Vec<Array4<f32>> = cut
                .runs(me)
                .iter()
                .map(|run| unpack(&mut bytes, (batch, heads_of(rank), run.len(), value_dim)))
                .collect();
            joined(&runs, 2, (batch, heads_of(rank), held, value_dim))
        })
        .collect();
    group.close(CALL, said.map(|()| joined(&parts, 1, (batch, q_heads, held, value_dim))))
}

fn joined(parts: &[Array4<f32>], axis: usize, dim: (usize, usize, usize, usize)) -> Array4<f32> {
    let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
    concatenate(Axis(axis), &views).unwrap_or_else(|_| Array4::zeros(dim))
}

fn slices(packed: &[Vec<u8>]) -> Vec<&[u8]> {
    packed.iter().map(Vec::as_slice).collect()
}

fn check<T: Stored>(
    group: &Group,
    cut: &Cut,
    q: &ArrayView4<'_, T>,
    k: &ArrayView4<'_, T>,
    v: &ArrayView4<'_, T>,
) -> Result<(), String> {
    if cut.ranks() != group.size() {
        return Err(format!("cut: expected one for {} ranks, got {}", group.size(), cut.ranks()));
    }
    let held = cut.held(group.rank());
    for (name, x) in [("q", q), ("k", k), ("v", v)] {
        if x.dim().2 != held {
            return Err(format!("{name}: expected len {held} as the cut has it, got {:?}", x.shape()));
        }
    }
    Qkv::new(q.view(), k.view(), v.view()).dims().map(|_| ()).map_err(|error| error.to_string())
}
