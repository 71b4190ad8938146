//! A cache that is spread over ranks: queries travel to it, output and LSE come back.
//!
//! ```text
//! o, lse = merge over ranks r, in their order, of softmax attention over the keys of rank r
//! ```
//!
//! DistAttention of "Infinite-LLM" (arXiv 2401.02669), and the attention workers of Lamina
//! (arXiv 2405.01814). For each query and head `head_dim` elements go out and `value_dim + 1`
//! numbers of `f32` come back, however many keys there are; moving the cache would be `len
//! (head_dim + value_dim)`. [`debit_and_credit`](crate::plan::debit_and_credit) plans who
//! holds how much of it.

use attention_kernels::dense::Dense;
use attention_kernels::{Mergeable, Qkv};
use ndarray::{Array4, ArrayView4};

use crate::error::{Error, Result};
use crate::ring::{Attended, same};
use crate::stored::{Stored, pack, unpack};
use crate::wire::Group;

/// Attention of the queries of rank `home` over the keys of all ranks, all of them visible.
///
/// `q`, `[batch, q_heads, q_len, head_dim]`, is given by `home` alone, which alone gets the
/// result. Keys and values, `[batch, kv_heads, held, dim]`, are as many on each rank as it
/// has, none too, and where `lengths` are given only the first of each batch entry.
///
/// # Errors
/// The same on all ranks: the lowest one whose arrays do not fit.
pub fn attend<T: Stored>(
    group: &Group,
    home: usize,
    q: Option<ArrayView4<'_, T>>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    lengths: Option<&[usize]>,
) -> Result<Option<Attended>> {
    const CALL: &str = "spread attend";
    let (me, ranks) = (group.rank(), group.size());
    let all = group.agree(CALL, check(group, home, &q, &k, &v, lengths))?;
    same(&all, &["home", "k: batch", "k: heads", "k: head_dim", "v: value_dim", "k: type"])?;
    let at = |i: usize| all[home].get(i).map_or(0, |&x| x as usize);
    let dim = (k.dim().0, at(6), at(7), k.dim().3);

    let mut mine = Vec::new();
    if let Some(q) = &q {
        pack(q.view(), &mut mine);
    }
    let mut sizes = vec![0; ranks];
    sizes[home] = dim.0 * dim.1 * dim.2 * dim.3 * size_of::<T>();
    let arrived = group.gather(&mine, &sizes);
    let queries = unpack::<T, _>(&mut &arrived[home][..], dim);

    let out_dim = (dim.0, dim.1, dim.2, v.dim().3);
    let done = partial(&queries.view(), &k, &v, lengths);
    let (part, mut said) = match done {
        Ok(part) => (part, Ok(())),
        Err(message) => (Attended::empty(out_dim), Err(message)),
    };
    let mut bytes = Vec::new();
    pack(part.out.view(), &mut bytes);
    pack(part.lse.view(), &mut bytes);
    let out: Vec<&[u8]> = (0..ranks).map(|rank| if rank == home { &bytes[..] } else { &[] }).collect();
    let arrived = group.exchange(&out, &vec![if me == home { bytes.len() } else { 0 }; ranks]);

    let mut merged = Attended::empty(out_dim);
    if me == home {
        for bytes in &arrived {
            let mut bytes = &bytes[..];
            let out = unpack(&mut bytes, out_dim);
            let lse = unpack(&mut bytes, (dim.0, dim.1, dim.2));
            said = said.and(merged.merge(&Attended { out, lse }));
        }
    }
    group.close(CALL, said.map(|()| (me == home).then_some(merged)))
}

/// Rows of rank `from`, `[batch, heads, len, dim]`, for rank `to`: how keys and values of new
/// tokens get to the rank that has the block that they belong to. `rows` are given by `from`
/// alone, and `to` alone gets them.
///
/// # Errors
/// The same on all ranks: the lowest one whose arguments do not fit.
pub fn hand<T: Stored>(
    group: &Group,
    from: usize,
    to: usize,
    rows: Option<ArrayView4<'_, T>>,
) -> Result<Option<Array4<T>>> {
    let (me, ranks) = (group.rank(), group.size());
    let mine = if from >= ranks || to >= ranks {
        Err(format!("from: expected two of {ranks} ranks, got {from} and {to}"))
    } else if rows.is_some() != (me == from) {
        let got = if rows.is_some() { "some" } else { "none" };
        Err(format!("rows: expected rows from rank {from} alone, got {got}"))
    } else {
        let (a, b, c, d) = rows.as_ref().map_or((0, 0, 0, 0), |rows| rows.dim());
        let sizes = [from, to, a, b, c, d].map(|x| x as u64);
        Ok([T::ROUNDING.to_bits()].into_iter().chain(sizes).collect())
    };
    let all = group.agree("spread hand", mine)?;
    same(&all, &["rows: type", "from", "to"])?;
    let at = |i: usize| all[from].get(i).map_or(0, |&x| x as usize);
    let dim = (at(3), at(4), at(5), at(6));
    let mut bytes = Vec::new();
    if let Some(rows) = rows {
        pack(rows, &mut bytes);
    }
    let out: Vec<&[u8]> = (0..ranks).map(|rank| if rank == to { &bytes[..] } else { &[] }).collect();
    let mut lengths = vec![0; ranks];
    if me == to {
        lengths[from] = dim.0 * dim.1 * dim.2 * dim.3 * size_of::<T>();
    }
    let arrived = group.exchange(&out, &lengths);
    Ok((me == to).then(|| unpack(&mut &arrived[from][..], dim)))
}

/// What a rank knows of the queries by its own keys.
fn partial<T: Stored>(
    q: &ArrayView4<'_, T>,
    k: &ArrayView4<'_, T>,
    v: &ArrayView4<'_, T>,
    lengths: Option<&[usize]>,
) -> Result<Attended, String> {
    let dense = Dense::builder().build().map_err(|error| error.to_string())?;
    let x = Qkv::new(q.view(), k.view(), v.view());
    let x = match lengths {
        Some(lengths) => x.key_lengths(lengths),
        None => x,
    };
    let (out, lse) = dense.forward_with_lse(x.widened()).map_err(|error| error.to_string())?;
    Ok(Attended { out, lse })
}

fn check<T: Stored>(
    group: &Group,
    home: usize,
    q: &Option<ArrayView4<'_, T>>,
    k: &ArrayView4<'_, T>,
    v: &ArrayView4<'_, T>,
    lengths: Option<&[usize]>,
) -> Result<Vec<u64>, String> {
    if home >= group.size() {
        return Err(format!("home: expected one of {} ranks, got {home}", group.size()));
    }
    if q.is_some() != (group.rank() == home) {
        let got = if q.is_some() { "queries" } else { "none" };
        return Err(format!("q: expected queries from rank {home} alone, got {got}"));
    }
    // Queries that fit stand for those that are to come.
    let like = q.as_ref().map_or(k.view(), |q| q.view());
    let x = Qkv::new(like, k.view(), v.view());
    let x = match lengths {
        Some(lengths) => x.key_lengths(lengths),
        None => x,
    };
    x.dims().map_err(|error| error.to_string())?;
    let (heads, len) = q.as_ref().map_or((0, 0), |q| (q.dim().1, q.dim().2));
    let sizes = [home, k.dim().0, k.dim().1, k.dim().3, v.dim().3].map(|x| x as u64);
    Ok(sizes.into_iter().chain([T::ROUNDING.to_bits(), heads as u64, len as u64]).collect())
}

/// Refuses blocks of a cache that two ranks, or none, have: `owned[r]` are those of rank `r`,
/// of `blocks` together.
///
/// # Errors
/// Names the block.
pub fn check_owners(owned: &[Vec<usize>], blocks: usize) -> Result<()> {
    let mut owner = vec![None; blocks];
    for (rank, list) in owned.iter().enumerate() {
        for &block in list {
            let message = match owner.get_mut(block) {
                None => format!("owned: expected blocks below {blocks}, got {block}"),
                Some(Some(other)) => {
                    format!("owned: expected block {block} with one rank, got also rank {other}")
                }
                Some(free) => {
                    *free = Some(rank);
                    continue;
                }
            };
            return Err(Error::Argument { rank, message });
        }
    }
    match owner.iter().position(Option::is_none) {
        None => Ok(()),
        Some(block) => Err(Error::Argument {
            rank: 0,
            message: format!("owned: expected block {block} with a rank, got none"),
        }),
    }
}
