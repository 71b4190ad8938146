//! Few loop nests, written once and generic over instruction set, mask and
//! score. Mechanisms are configurations of them.

pub(crate) mod attend;
pub(crate) mod call;
pub(crate) mod decode;
pub mod merge;
pub(crate) mod parallel;
pub(crate) mod row;
pub(crate) mod scores;
pub(crate) mod weights;
pub(crate) mod workspace;

use ndarray::{ArrayViewMut3, ArrayViewMut4, Axis};

use crate::element::Element;
use crate::simd::any::AnyOut;
use crate::simd::mem::{OutRows, bytes_for, claim_words};
use call::Call;
use workspace::Workspace;

/// Whether a call goes to [`decode`] rather than to [`attend`]: where few
/// rows share a key/value head, reading the keys as they lie beats packing
/// them first, and the longer the keys the more rows are few. Depends on the
/// sizes alone.
fn is_decode(call: &Call<'_>) -> bool {
    let (q_len, kv_len) = call.longest();
    let rows = call.group() * q_len;
    rows <= 12 || (rows <= 64 && 16 * rows <= kv_len)
}

/// Where an engine writes: the output, and the natural logarithm of each
/// row's sum of exponentials `[batch, q_heads, q_len]` if asked for.
pub(crate) struct Output<'a> {
    out: AnyOut<'a>,
    lse: Option<OutRows<'a, f32>>,
}

/// Bytes of scratch that [`run`] needs.
pub(crate) fn workspace_bytes(call: &Call<'_>) -> usize {
    let engine = if is_decode(call) { decode::workspace_bytes(call) } else { attend::workspace_bytes(call) };
    2 * bytes_for::<u64>(claim_words(call.out_rows())) + engine
}

/// Output and LSE of a call, on the engine that is faster for it.
pub(crate) fn run<T: Element>(
    call: &Call<'_>,
    out: ArrayViewMut4<'_, T>,
    lse: Option<ArrayViewMut3<'_, f32>>,
    workspace: &mut Workspace,
) {
    let mut arena = workspace.arena(workspace_bytes(call));
    let out = T::any_out(OutRows::new(out, arena.take(claim_words(call.out_rows()))));
    let claims = arena.take(claim_words(call.out_rows()));
    let lse = lse.map(|lse| OutRows::new(lse.insert_axis(Axis(3)), claims));
    let output = Output { out, lse };
    if is_decode(call) {
        decode::decode(call, &output, arena);
    } else {
        attend::attend(call, &output, arena);
    }
}
