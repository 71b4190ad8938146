//! Distributed multi-head attention: keys and values of all ranks are gathered at once, and
//! each rank attends with its own queries.
//!
//! ```text
//! gather       (K_r, V_r)
//! every rank   o_i, lse_i = softmax attention of its queries over what they see of all keys
//! ```
//!
//! The exact attention over spread sequences of "A Unified View of Long-Sequence Models"
//! (arXiv 2302.06218), which the other forms are compared with, and the softmax layers of
//! LASP-2H (arXiv 2502.07563), between [`lasp`](crate::lasp) layers of the same cut. A rank
//! sends `(ranks - 1) held kv_heads (head_dim + value_dim)` elements as
//! [`ring`](crate::ring) does, in one step where that takes `ranks - 1`; but it holds the
//! keys and values of all. Backwards `d_k` and `d_v` of each rank's keys come back in one
//! exchange, and are added up in the order of ranks.
//!
//! Cut and options are those of a [`Ring`], and outputs have its bits: parts are the same,
//! and are merged in the order in which that meets them.

use attention_kernels::dense::SoftmaxGradients;
use ndarray::{Array4, ArrayView4};

use crate::error::Result;
use crate::ring::{Attended, Ring, comes_by, width};
use crate::stored::{Stored, pack, unpack};
use crate::wire::Group;

/// Output and LSE of the queries of this rank, as [`Ring::forward`] has them.
///
/// # Errors
/// The same on all ranks: the lowest one whose arrays, cut or options do not fit.
pub fn forward<T: Stored>(
    group: &Group,
    options: &Ring,
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
) -> Result<Attended> {
    const CALL: &str = "gathered forward";
    options.agree(group, CALL, &q, &k, &v, None)?;
    let mut all = Attended::empty((q.dim().0, q.dim().1, q.dim().2, v.dim().3));
    let (gathered, mut said) = (keys_of_all(group, options, &k, &v), Ok(()));
    for owner in (0..group.size()).map(|step| comes_by(group.rank(), group.size(), step)) {
        if said.is_ok() {
            let (keys, values) = options.open::<T>(&gathered[owner], owner, &k, &v);
            said = options.meet(group.rank(), owner, (&q, &keys, &values), &mut all);
        }
    }
    group.close(CALL, said.map(|()| all))
}

/// Gradients of this rank's queries, keys and values, as [`Ring::backward`] has them.
///
/// # Errors
/// As [`forward`], and for gradients or results of other shapes.
pub fn backward<T: Stored>(
    group: &Group,
    options: &Ring,
    (q, k, v): (ArrayView4<'_, T>, ArrayView4<'_, T>, ArrayView4<'_, T>),
    d_out: ArrayView4<'_, f32>,
    saved: &Attended,
) -> Result<SoftmaxGradients> {
    const CALL: &str = "gathered backward";
    options.agree(group, CALL, &q, &k, &v, Some((&d_out, saved)))?;
    let (me, ranks) = (group.rank(), group.size());
    let mut d_q = Array4::<f32>::zeros(q.dim());
    let mut said = Ok(());
    let mut back = Vec::with_capacity(ranks);
    for (owner, bytes) in keys_of_all(group, options, &k, &v).iter().enumerate() {
        let (keys, values) = options.open::<T>(bytes, owner, &k, &v);
        let (mut d_k, mut d_v) = (Array4::zeros(keys.dim()), Array4::zeros(values.dim()));
        for block in options.blocks(me, owner) {
            if said.is_ok() {
                let to = (&mut d_q, &mut d_k, &mut d_v);
                said = options.back(&block, (&q, &keys, &values), &d_out, saved, to);
            }
        }
        let mut bytes = Vec::new();
        pack(d_k.view(), &mut bytes);
        pack(d_v.view(), &mut bytes);
        back.push(bytes);
    }
    let lengths = vec![4 * (k.len() + v.len()); ranks];
    let (mut d_k, mut d_v) = (Array4::<f32>::zeros(k.dim()), Array4::<f32>::zeros(v.dim()));
    for bytes in group.exchange(&back.iter().map(Vec::as_slice).collect::<Vec<_>>(), &lengths) {
        let mut bytes = &bytes[..];
        d_k += &unpack::<f32, _>(&mut bytes, k.dim());
        d_v += &unpack::<f32, _>(&mut bytes, v.dim());
    }
    group.close(CALL, said.map(|()| SoftmaxGradients::new(d_q, d_k, d_v)))
}

/// Keys and values of each rank.
fn keys_of_all<T: Stored>(
    group: &Group,
    options: &Ring,
    k: &ArrayView4<'_, T>,
    v: &ArrayView4<'_, T>,
) -> Vec<Vec<u8>> {
    let mut mine = Vec::new();
    pack(k.view(), &mut mine);
    pack(v.view(), &mut mine);
    let token = size_of::<T>() * width(k, v);
    let lengths: Vec<_> = (0..group.size()).map(|rank| options.cut().held(rank) * token).collect();
    group.gather(&mine, &lengths)
}
