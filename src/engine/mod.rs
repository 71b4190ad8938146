//! Few loop nests, written once and generic over instruction set, mask and
//! score. Mechanisms are configurations of them.

pub(crate) mod attend;
pub(crate) mod attend_backward;
pub(crate) mod call;
pub(crate) mod decode;
pub mod merge;
pub(crate) mod parallel;
pub(crate) mod recur;
pub(crate) mod row;
pub(crate) mod scores;
pub(crate) mod selective_scan;
pub(crate) mod softmax_scan;
pub(crate) mod weights;
pub(crate) mod workspace;

use ndarray::ArrayViewMut4;

use crate::element::Element;
use crate::error::Result;
use crate::input::{Lengths, Sequence};
use crate::keys::{Keys, Per};
use crate::simd::any::AnyOut;
use crate::simd::mem::{Arena, OutRows, bytes_for, claim_words};
use call::Call;
use workspace::Workspace;

/// Whether a sequence goes to [`decode`] rather than to [`attend`]: where few
/// rows share a key/value head, reading the keys as they lie beats packing
/// them first, and the longer the keys the more rows are few. Depends on the
/// sizes of the sequence alone, whatever else is in the batch. Where few rows
/// share a list of keys, no others can be found for it either.
fn is_decode(call: &Call<'_>, sequence: &Sequence) -> bool {
    const FEW: usize = 12;
    if call.order.is_some() || call.extra.is_some() {
        return false;
    }
    let rows = call.group() * sequence.queries.len();
    let layout = match call.keys {
        Keys::Mask => None,
        Keys::Blocks(lists) => Some(lists.layout()),
        Keys::Tokens(lists) => Some(lists.layout()),
    };
    let listed = layout.is_some_and(|layout| {
        let heads = if layout.per == Per::Head { 1 } else { call.group() };
        heads.saturating_mul(layout.q_block) <= FEW
    });
    rows <= FEW || listed || (rows <= 64 && 16 * rows <= sequence.keys.len())
}

/// Whether any sequence goes to [`decode`], and whether any to [`attend`].
fn engines(call: &Call<'_>) -> (bool, bool) {
    let few = |i| is_decode(call, &call.sequence(i));
    match call.x.lengths {
        Lengths::Full if call.dims.batch > 0 => (few(0), !few(0)),
        _ => ((0..call.dims.batch).any(few), !(0..call.dims.batch).all(few)),
    }
}

/// Where an engine writes: the output and, if asked for, what each row's
/// exponentials add up to (see [`row::SoftmaxSum::write`]).
pub(crate) struct Output<'a> {
    out: AnyOut<'a>,
    figures: Option<OutRows<'a, f32>>,
}

/// How the engines cut up a call.
struct Plans {
    few: Option<decode::Plan>,
    many: bool,
}

impl Plans {
    fn new(call: &Call<'_>) -> Self {
        let (few, many) = engines(call);
        Self { few: few.then(|| decode::Plan::new(call)), many }
    }

    fn bytes(&self, call: &Call<'_>) -> usize {
        let decode = self.few.as_ref().map_or(0, decode::Plan::bytes);
        let attend = if self.many { attend::workspace_bytes(call) } else { 0 };
        2 * bytes_for::<u64>(claim_words(call.out_rows())) + decode.max(attend)
    }

    /// Threads that the call is worth.
    fn workers(&self, call: &Call<'_>) -> usize {
        let decode = self.few.as_ref().map_or(1, decode::Plan::workers);
        if self.many { decode.max(attend::workers(call)) } else { decode }
    }
}

/// Bytes of scratch that [`run`] needs.
pub(crate) fn workspace_bytes(call: &Call<'_>) -> usize {
    Plans::new(call).bytes(call)
}

/// Output and figures of a call, each sequence on the engine that is faster for it.
///
/// # Errors
/// If there is no memory to work in.
pub(crate) fn run<T: Element>(
    call: &Call<'_>,
    out: ArrayViewMut4<'_, T>,
    figures: Option<ArrayViewMut4<'_, f32>>,
    workspace: &mut Workspace,
) -> Result<()> {
    run_in(call, out, figures, workspace.arena(workspace_bytes(call))?);
    Ok(())
}

/// [`run`] in scratch of at least [`workspace_bytes`].
pub(crate) fn run_in<T: Element>(
    call: &Call<'_>,
    out: ArrayViewMut4<'_, T>,
    figures: Option<ArrayViewMut4<'_, f32>>,
    mut arena: Arena<'_>,
) {
    let plans = Plans::new(call);
    let out = T::any_out(OutRows::new(out, arena.take(claim_words(call.out_rows()))));
    let claims = arena.take(claim_words(call.out_rows()));
    let figures = figures.map(|figures| OutRows::new(figures, claims));
    let output = Output { out, figures };
    parallel::enter(plans.workers(call), || {
        if let Some(plan) = plans.few {
            decode::decode(call, plan, &output, arena.reborrow());
        }
        if plans.many {
            attend::attend(call, &output, arena);
        }
    });
}
