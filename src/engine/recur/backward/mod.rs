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
//! The low-rank rule has two things written under two keys, the values `v` under
//! `k` and `e_j = a_j^T S_{j-1}` under `b`. What corrections look up, `a`, takes
//! the place that `-k` has above, before its own token's decay: where `e_j`
//! stands there is a sum over both, `e` itself is `r` without a beta, and `dv_j
//! = sum_{i >= j} P_ij do_i + D^T (k_j exp(c - c_j)) + sum_{i > j} G_ij de_i`.
//! Queries that read before the update do so too, and have `scale q_i u k_i`
//! of their own value besides, with the bonus `u`.
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
use crate::simd::mem::{OutRows, claim_words};

mod back;
mod forth;
mod pairs;
mod plan;
mod rows;
mod run;
mod scratch;
mod sink;
mod state;
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
pub(crate) use sink::Sink;
use sink::WriteRows;
pub(crate) use state::run_state;
use state::state_back;

/// What gradients there are, one for each array of the input: `[batch, heads,
/// len, dim]`, where `dim` is 1 for one number a token, and the state's.
#[derive(Clone, Copy, Debug)]
pub struct Gradients<X> {
    pub(crate) q: X,
    /// None where keys are made of other arrays.
    pub(crate) k: Option<X>,
    pub(crate) v: X,
    pub(crate) decay: Option<X>,
    pub(crate) beta: Option<X>,
    /// Of the low-rank rule.
    pub(crate) a: Option<X>,
    pub(crate) b: Option<X>,
    /// Of parameters, `[1, heads, 1, dim]`: two numbers that a [`Source`] has
    /// its own use for, the bonus, and the skip connection.
    pub(crate) rate: Option<X>,
    pub(crate) bias: Option<X>,
    pub(crate) bonus: Option<X>,
    pub(crate) skip: Option<X>,
    /// `[sequences, heads, state_dim, columns]`
    pub(crate) state: X,
}

impl<X> Gradients<X> {
    /// Those that every recurrence has.
    pub(crate) fn of_all(q: X, v: X, state: X) -> Self {
        let (decay, beta, bonus, skip) = (None, None, None, None);
        Self { q, k: None, v, decay, beta, a: None, b: None, rate: None, bias: None, bonus, skip, state }
    }

    pub(crate) fn map<Y>(self, mut f: impl FnMut(X) -> Y) -> Gradients<Y> {
        Gradients {
            q: f(self.q),
            k: self.k.map(&mut f),
            v: f(self.v),
            decay: self.decay.map(&mut f),
            beta: self.beta.map(&mut f),
            a: self.a.map(&mut f),
            b: self.b.map(&mut f),
            rate: self.rate.map(&mut f),
            bias: self.bias.map(&mut f),
            bonus: self.bonus.map(&mut f),
            skip: self.skip.map(&mut f),
            state: f(self.state),
        }
    }

    pub(crate) fn each_mut(&mut self) -> Gradients<&mut X> {
        Gradients {
            q: &mut self.q,
            k: self.k.as_mut(),
            v: &mut self.v,
            decay: self.decay.as_mut(),
            beta: self.beta.as_mut(),
            a: self.a.as_mut(),
            b: self.b.as_mut(),
            rate: self.rate.as_mut(),
            bias: self.bias.as_mut(),
            bonus: self.bonus.as_mut(),
            skip: self.skip.as_mut(),
            state: &mut self.state,
        }
    }

    /// Takes those of parameters out.
    fn take_parameters(&mut self) -> [Option<X>; 4] {
        [self.rate.take(), self.bias.take(), self.bonus.take(), self.skip.take()]
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

/// Writes the gradients. Without a normaliser; queries that read before the
/// update and a skip connection are for [`Rule::Add`](crate::engine::recur::Rule::Add).
pub(crate) fn run(
    call: &Call<'_>,
    mut to: Gradients<ArrayViewMut4<'_, f32>>,
    workspace: &mut Workspace,
) -> Result<()> {
    let dims = to.each_mut().map(|to| to.dim());
    let plan = Plan::new(call.spec, &dims);
    if plan.g.cols == 0 {
        // Nothing depends on anything.
        to.map(|mut to| to.fill(0.0));
        return Ok(());
    }
    let mut arena = workspace.arena(plan.bytes(call.spec.dims.q_heads, &dims))?;
    let heads = call.spec.dims.q_heads;
    let parameters = to.take_parameters();
    let mut sinks = to.map(|to| Sink::new(to, heads, &mut arena));
    let sums = arena.take::<f64>(plan.units * plan.parameters());
    {
        let claims = arena.take(claim_words(plan.units));
        let sums = OutRows::of_slice(&mut *sums, (plan.units, 1, 1, plan.parameters()), claims);
        let out = sinks.each_mut().map(|sink| sink.rows(&call.spec.lengths));
        let run = Run { call, plan: &plan, out: &out, parameters: &sums };
        let shares = arena.shares(plan.workers, plan.share());
        let start = |worker| Share::take(shares.take(worker), &plan);
        parallel::for_each(plan.workers, plan.units, start, |share, unit| run.unit(share, unit));
    }
    sinks.map(|sink| sink.sum(plan.workers));
    let mut first = 0;
    for (to, n) in parameters.into_iter().zip(plan.parameters) {
        let Some(mut to) = to else { continue };
        for ((_, head, _, c), to) in to.indexed_iter_mut() {
            let of_units = sums.iter().skip(first + c).step_by(plan.parameters());
            let of_head = of_units.skip(head).step_by(heads);
            *to = of_head.sum::<f64>() as f32;
        }
        first += n;
    }
    Ok(())
}
