//! Calls of attention: each sequence on the engine that is faster for it.

use ndarray::{ArrayViewMut4, Axis};

use crate::element::Element;
use crate::engine::call::{Call, Output};
use crate::engine::workspace::Workspace;
use crate::engine::{attend, decode, parallel};
use crate::error::Result;
use crate::input::Lengths;
use crate::simd::mem::{Arena, OutRows, bytes_for, claim_words};

/// Whether any sequence goes to [`decode`](crate::engine::decode), and whether any to [`attend`](crate::engine::attend).
fn engines(call: &Call<'_>) -> (bool, bool) {
    let few = |i| call.is_decode(&call.sequence(i));
    match call.x.lengths {
        Lengths::Full if call.dims.batch > 0 => (few(0), !few(0)),
        _ => ((0..call.dims.batch).any(few), !(0..call.dims.batch).all(few)),
    }
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
    let call = &call.in_regions();
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
    mut out: ArrayViewMut4<'_, T>,
    mut figures: Option<ArrayViewMut4<'_, f32>>,
    mut arena: Arena<'_>,
) {
    call.fill_rest(&mut out, false, T::default());
    if let Some(figures) = &mut figures {
        // The LSE, or the largest score and the sum.
        for (mut figures, of_nothing) in
            figures.axis_chunks_iter_mut(Axis(3), 1).zip([f32::NEG_INFINITY, 0.0])
        {
            call.fill_rest(&mut figures, false, of_nothing);
        }
    }
    let call = &call.in_regions();
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
