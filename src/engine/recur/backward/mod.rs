//! Gradients of a recurrence, chunk by chunk from the last to the first.
//!
//! Within a chunk `c_i` sums the log decays up to and with token `i`, `S` is
//! the state at its start and `c` the sum over all its tokens. What is written
//! under key `j` is `e_j`, the value or its correction:
//!
//! ```text
//! o_i   = sum_{j <= i} P_ij e_j + scale (q_i exp(c_i))^T S     P_ij = scale sum_c q_i k_j exp(c_i - c_j)
//! S_out = exp(c) S + sum_j (k_j exp(c - c_j)) e_j^T
//! e_j   = beta_j r_j    r_i = v_i - (k_i exp(c_i))^T S - sum_{j < i} G_ij e_j
//!                                                             G_ij = sum_c k_i k_j exp(c_i - c_j)
//! ```
//!
//! With `do` the gradient of the outputs and `D` that of `S_out`:
//!
//! ```text
//! de_j = sum_{i >= j} P_ij do_i + D^T (k_j exp(c - c_j)) - sum_{i > j} G_ij dr_i
//! dr_i = beta_i de_i    dbeta_i = de_i . r_i    dv = dr; without corrections dv = de
//! dP_ij = do_i . e_j    dG_ij = -dr_i . e_j
//! dq_i = scale sum_{j <= i} dP_ij exp(c_i - c_j) k_j + scale exp(c_i) S do_i
//! dk_j = scale sum_{i >= j} dP_ij exp(c_i - c_j) q_i + exp(c - c_j) D e_j
//!      + sum_{i > j} dG_ij exp(c_i - c_j) k_i + sum_{i < j} dG_ji exp(c_j - c_i) k_i - exp(c_j) S dr_j
//! dS   = exp(c) D + sum_i scale (q_i exp(c_i)) do_i^T - sum_i (k_i exp(c_i)) dr_i^T
//! ```
//!
//! `de` solves the transpose of the triangular system that `r` solves, and
//! nothing is divided by `beta` or by a decay. A log decay `g_t` scales
//! whatever goes from tokens before `t` to `t` and later ones, so that its
//! gradient is the sum of what these pairs add to the loss: pairs of tokens of
//! the chunk (`dP P` and `dG G`, rows less columns from `t` on: what is inside
//! cancels; a token with itself never counts), the state with tokens from `t`
//! on, tokens before `t` with the state at the end, and the one state with the
//! other. Where decays are of channels, so are the sums. The gradient of a log
//! decay that leaves nothing is 0.
//!
//! The states at the starts of chunks come from a run over the values
//! beforehand, which stores [`SEGMENT`] of them as checkpoints; of longer
//! sequences every so many, and the rest are recomputed.
//!
//! A NaN or infinity in a sequence shows in the gradients of the tokens before
//! it that it depends on, and may show in others of the sequence.

use ndarray::ArrayViewMut4;

use crate::engine::parallel;
use crate::engine::recur::{Source, Spec};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::simd::any::AnyArray;

mod back;
mod forth;
mod pairs;
mod plan;
mod rows;
mod run;
mod scratch;
mod sink;
#[cfg(test)]
mod tests;

use back::*;
use forth::*;
use pairs::*;
pub(crate) use plan::workspace_bytes;
use plan::*;
use rows::*;
use run::*;
use scratch::*;
use sink::*;

/// What gradients there are, one for each array of the input: `[batch, heads,
/// len, dim]`, where `dim` is 1 for one number a token, and the state's.
#[derive(Clone, Copy, Debug)]
pub struct Gradients<X> {
    pub(crate) q: X,
    pub(crate) k: X,
    pub(crate) v: X,
    pub(crate) decay: Option<X>,
    pub(crate) beta: Option<X>,
    /// `[sequences, heads, state_dim, columns]`
    pub(crate) state: X,
}

impl<X> Gradients<X> {
    pub(crate) fn map<Y>(self, mut f: impl FnMut(X) -> Y) -> Gradients<Y> {
        Gradients {
            q: f(self.q),
            k: f(self.k),
            v: f(self.v),
            decay: self.decay.map(&mut f),
            beta: self.beta.map(&mut f),
            state: f(self.state),
        }
    }

    fn each_mut(&mut self) -> Gradients<&mut X> {
        Gradients {
            q: &mut self.q,
            k: &mut self.k,
            v: &mut self.v,
            decay: self.decay.as_mut(),
            beta: self.beta.as_mut(),
            state: &mut self.state,
        }
    }
}

/// `[batch, heads, len, dim]`
pub(crate) type Dim = (usize, usize, usize, usize);

/// What gradients are computed from.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) spec: &'a Spec<'a>,
    pub(crate) source: &'a dyn Source,
    /// The state at the start; 0 if there is none.
    pub(crate) state: Option<AnyArray<'a>>,
    /// Of the outputs.
    pub(crate) d_out: AnyArray<'a>,
    /// Of the state at the end; 0 if there is none.
    pub(crate) d_state: Option<AnyArray<'a>>,
}

/// Writes the gradients. For [`Rule::Add`] and [`Rule::Delta`] that read after
/// the update, without a normaliser.
pub(crate) fn run(
    call: &Call<'_>,
    mut to: Gradients<ArrayViewMut4<'_, f32>>,
    workspace: &mut Workspace,
) -> Result<()> {
    let plan = Plan::new(call.spec);
    if plan.g.rows == 0 || plan.g.cols == 0 {
        // Nothing depends on anything.
        to.map(|mut to| to.fill(0.0));
        return Ok(());
    }
    let dims = to.each_mut().map(|to| to.dim());
    let mut arena = workspace.arena(plan.bytes(call.spec.dims.q_heads, &dims))?;
    let heads = call.spec.dims.q_heads;
    let mut sinks = to.map(|to| Sink::new(to, heads, &mut arena));
    {
        let out = sinks.each_mut().map(|sink| sink.rows());
        let run = Run { call, plan: &plan, out: &out };
        let shares = arena.shares(plan.workers, plan.share());
        let start = |worker| Share::take(shares.take(worker), &plan);
        parallel::for_each(plan.workers, plan.units, start, |share, unit| run.unit(share, unit));
    }
    sinks.map(|sink| sink.sum(plan.workers));
    Ok(())
}
