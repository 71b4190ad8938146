//! Mechanisms that select in some calls and reuse the selection in others: what
//! their trait has in common.

use ndarray::{Array4, ArrayViewMut4, s};

use crate::engine;
use crate::engine::call::Call;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::{Keys, Layout, TokenLists};
use crate::select::Source;
use crate::select::reuse::{Policy, Reuse, Reused, Tail, Turn, cosine, mean_queries, plan};
use crate::simd::Isa;
use crate::stages::attend::check_out;
use crate::stages::selecting::{Schemed, Selecting};
use crate::stages::sourced::Sourced;

/// A mechanism that selects keys one by one and reuses them. With [`reusing!`] it
/// has [`Reuses`](crate::Reuses).
pub(crate) trait Reusing: Schemed<Index = TokenLists> {
    fn reuse(&self) -> &Reuse;
}

/// A call on its plan, and what is kept after it.
struct Step {
    plan: TokenLists,
    /// Whether all sequences attend to all keys.
    dense: bool,
    next: Reused,
}

/// The sequences of a source, and the layout of lists for them.
fn sequences<M: Schemed>(mechanism: &M, source: &Source<'_>) -> Result<(Vec<Sequence>, Layout)> {
    let layout = mechanism.scheme(&source.dims).layout(&source.dims, &source.lengths);
    layout.lists()?;
    Ok(((0..source.dims.batch).map(|i| source.sequence(i)).collect(), layout))
}

/// Those that have no need to select, or nothing to select with.
fn amend(turns: &mut [Turn], tail: Tail, sequences: &[Sequence]) {
    for (turn, sequence) in turns.iter_mut().zip(sequences) {
        let few = matches!(tail, Tail::Local { all, .. } if sequence.keys.len() <= all);
        if few || (*turn == Turn::Select && sequence.queries.is_empty()) {
            *turn = Turn::All;
        }
    }
}

fn step<X: Sourced, M: Reusing + Selecting<X, Index = TokenLists>>(
    mechanism: &M,
    x: X,
    reused: &Reused,
    workspace: &mut Workspace,
) -> Result<Step> {
    let (reuse, isa) = (mechanism.reuse(), mechanism.config().isa());
    let head_dim = x.dims()?.head_dim;
    let (layout, sequences, turns, queries) = x.with_source(isa, |source| {
        let (sequences, layout) = sequences(mechanism, source)?;
        reused.check(&reuse.policy, &source.dims, sequences.iter())?;
        let queries: Vec<_> = sequences.iter().map(|sequence| mean_queries(source, sequence)).collect();
        let per_head = matches!(reuse.policy, Policy::CosineAtLeast { per_head: true, .. });
        let of = |i: usize| reused.selection(i).map_or(&[][..], |last| &last.queries);
        let turned = |i: usize| cosine(&queries[i], of(i), head_dim, per_head);
        let mut turns = reuse.policy.turns(reused, sequences.len(), turned);
        amend(&mut turns, reuse.tail, &sequences);
        Ok((layout, sequences, turns, queries))
    })?;
    let new = match turns.contains(&Turn::Select) {
        true => Some(mechanism.select_in(x, workspace)?),
        false => None,
    };
    let lists = plan(reuse, reused, layout, &sequences, &turns, new.as_ref())?;
    let selected = |((sequence, turn), queries): ((&Sequence, &Turn), Vec<f32>)| {
        let lists = new.as_ref().filter(|_| *turn == Turn::Select);
        lists.map(|lists| reused.selection_of(lists, sequence, queries))
    };
    let of = sequences.iter().zip(&turns).zip(queries).map(selected).collect();
    let all = |turn: &Turn| *turn == Turn::All || (*turn == Turn::Select && reuse.dense);
    // Which sequences attend to what must not change how each of them does.
    let dense = reuse.is_uniform() && turns.iter().all(all);
    let keys = sequences.iter().map(|sequence| sequence.keys.len()).collect();
    Ok(Step { plan: lists, dense, next: reused.next(&x.dims()?, keys, of) })
}

/// [`Reuses::step_into`](crate::Reuses::step_into)
pub(crate) fn step_into<X: Sourced, M: Reusing + Selecting<X, Index = TokenLists>>(
    mechanism: &M,
    x: X,
    reused: &mut Reused,
    out: ArrayViewMut4<'_, X::Out>,
    workspace: &mut Workspace,
) -> Result<()> {
    check_out(&x, &out)?;
    let Step { plan, dense, next } = step(mechanism, x, reused, workspace)?;
    mechanism.with_call(x, &plan, |call| {
        let keys = if dense { Keys::Mask } else { call.keys };
        engine::run(&Call { keys, ..*call }, out, None, workspace)
    })??;
    *reused = next;
    Ok(())
}

/// [`Reuses::reference_step`](crate::Reuses::reference_step): the turns, the
/// selection and the keys that are seen, one key after the other.
pub(crate) fn define_step<X: Sourced, M: Reusing + Selecting<X, Index = TokenLists>>(
    mechanism: &M,
    x: X,
    reused: &Reused,
) -> Result<(Array4<f64>, Reused)> {
    let (reuse, dims, [q, _]) = (mechanism.reuse(), x.dims()?, x.exact()?);
    let (sequences, layout) = x.with_source(Isa::Scalar, |source| {
        let found = sequences(mechanism, source)?;
        reused.check(&reuse.policy, &dims, found.0.iter())?;
        Ok(found)
    })?;
    let mean = |sequence: &Sequence| -> Vec<f64> {
        let rows = |h: usize| q.slice(s![sequence.batch, h, sequence.queries.clone(), ..]);
        let n = sequence.queries.len() as f64;
        let of = |h| rows(h).columns().into_iter().map(|x| if n > 0.0 { x.sum() / n } else { 0.0 }).collect();
        (0..dims.q_heads).flat_map(|h| -> Vec<f64> { of(h) }).collect()
    };
    let cosine = |i: usize| {
        let (a, b) = (mean(&sequences[i]), &reused.selection(i).map_or(&[][..], |last| &last.queries));
        let norm = |x: f64| x.sqrt();
        let of = |channels: std::ops::Range<usize>| {
            let (mut dot, mut aa, mut bb) = (0.0, 0.0, 0.0);
            for c in channels {
                let (a, b) = (a[c], f64::from(b[c]));
                (dot, aa, bb) = (dot + a * b, aa + a * a, bb + b * b);
            }
            if aa == 0.0 || bb == 0.0 { 0.0 } else { dot / (norm(aa) * norm(bb)) }
        };
        let d = dims.head_dim;
        match reuse.policy {
            Policy::CosineAtLeast { per_head: true, .. } => {
                (0..dims.q_heads).map(|h| of(h * d..(h + 1) * d)).sum::<f64>() / dims.q_heads.max(1) as f64
            }
            _ => of(0..dims.q_heads * d),
        }
    };
    let mut turns = reuse.policy.turns(reused, sequences.len(), cosine);
    amend(&mut turns, reuse.tail, &sequences);
    let (new, _) = mechanism.define_select(x)?;
    let heads = layout.heads();
    let (mut offsets, mut named, mut of) = (vec![0], Vec::new(), Vec::new());
    for (sequence, turn) in sequences.iter().zip(&turns) {
        let (i, n) = (sequence.index, sequence.keys.len());
        for (head, block) in (0..heads).flat_map(|head| (0..layout.blocks()).map(move |block| (head, block)))
        {
            let selects =
                |lists: &[crate::keys::Run], j: usize| lists.iter().any(|run| run.range().contains(&j));
            let sees = |j: usize| match (turn, reused.selection(i)) {
                (Turn::Select, _) if !reuse.dense => {
                    selects(new.runs(i, head * (layout.q_heads / heads), block), j)
                }
                (Turn::Reuse, Some(last)) => match reuse.tail {
                    Tail::Nothing => selects(&last.lists[head], j),
                    Tail::Since => j >= last.keys || selects(&last.lists[head], j),
                    Tail::Local { local, .. } => {
                        j + local >= n || (j + local < last.keys && selects(&last.lists[head], j))
                    }
                },
                _ => true,
            };
            named.extend((0..n).filter(|&j| sees(j)).map(|j| j as u32));
            offsets.push(named.len());
        }
        let queries = || mean(sequence).into_iter().map(|x| x as f32).collect();
        of.push((*turn == Turn::Select).then(|| reused.selection_of(&new, sequence, queries())));
    }
    let lists = TokenLists::from_keys(layout, &offsets, &named)?;
    let keys = sequences.iter().map(|sequence| sequence.keys.len()).collect();
    Ok((mechanism.define(x, &lists)?.out, reused.next(&dims, keys, of)))
}

/// [`Reuses`](crate::Reuses) of arrays and caches for a mechanism that is
/// [`Reusing`].
macro_rules! reusing {
    ($mechanism:ty) => {
        $crate::stages::reusing::reusing!(
            @impl [Q: crate::element::Element, K: crate::element::Element, O: crate::element::Element]
            crate::input::Qkv<'_, Q, K, O>, $mechanism
        );
        $crate::stages::reusing::reusing!(
            @impl [Q: crate::element::Element, C: crate::cache::Cache + ?Sized, O: crate::element::Element]
            crate::cache::Cached<'_, Q, C, O>, $mechanism
        );
    };
    (@impl [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        impl<$($generics)*> crate::attention::Reuses<$input> for $mechanism {
            type State = crate::select::Reused;

            fn step_into(
                &self,
                x: $input,
                reused: &mut crate::select::Reused,
                out: ndarray::ArrayViewMut4<'_, <$input as crate::attention::Input>::Out>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::reusing::step_into(self, x, reused, out, workspace)
            }

            fn reference_step(
                &self,
                x: $input,
                reused: &crate::select::Reused,
            ) -> crate::error::Result<(ndarray::Array4<f64>, crate::select::Reused)> {
                crate::stages::reusing::define_step(self, x, reused)
            }
        }
    };
}
pub(crate) use reusing;
