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

use ndarray::{ArrayViewMut3, ArrayViewMut4};

use crate::element::Element;
use crate::mask::Mask;
use crate::score::Score;
use call::Call;
use workspace::Workspace;

/// Whether a call goes to [`decode`] rather than to [`attend`]: where few
/// rows share a key/value head, reading the keys as they lie beats packing
/// them first, and the longer the keys the more rows are few. Depends on the
/// sizes alone.
fn is_decode<T: Element, M, F>(call: &Call<'_, T, M, F>) -> bool {
    let (q_len, kv_len) = call.longest();
    let rows = call.group() * q_len;
    rows <= 12 || (rows <= 64 && 16 * rows <= kv_len)
}

/// Bytes of scratch that [`run`] needs.
pub(crate) fn workspace_bytes<T: Element, M: Mask, F>(call: &Call<'_, T, M, F>) -> usize {
    if is_decode(call) { decode::workspace_bytes(call) } else { attend::workspace_bytes(call) }
}

/// Output and LSE of a call, on the engine that is faster for it.
pub(crate) fn run<T: Element, M: Mask, F: Score>(
    call: &Call<'_, T, M, F>,
    out: ArrayViewMut4<'_, T>,
    lse: Option<ArrayViewMut3<'_, f32>>,
    workspace: &mut Workspace,
) {
    if is_decode(call) {
        decode::decode(call, out, lse, workspace);
    } else {
        attend::attend(call, out, lse, workspace);
    }
}
