//! Gradients of mechanisms that are one call of the attention engine.

use ndarray::{
    Array, Array1, Array2, Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut4, Axis, Dimension, s,
};

use crate::attention::{Dim4, Input};
use crate::definition::softmax::Normalisation;
use crate::definition::softmax_backward;
use crate::element::Element;
use crate::engine::attend_backward::{self, Back, Gradients, Saved};
use crate::engine::call::{Call, Norm};
use crate::engine::weights;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::Qkv;
use crate::mask::Mask;
use crate::score;
use crate::score::smooth::AnySmooth;
use crate::simd::any::AnyArray;
use crate::simd::mem::{Heads, bytes_for};
use crate::stages::attend::Config;

/// Gradients of softmax attention, each of the shape of its array.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SoftmaxGradients<A = f32> {
    /// Of the queries.
    pub q: Array4<A>,
    /// Of the keys.
    pub k: Array4<A>,
    /// Of the values.
    pub v: Array4<A>,
    /// Of the sink logits, one a query head, where there are any.
    pub sinks: Option<Array1<A>>,
    /// Of the table that scores have entries of, `[heads, entries]`, where there
    /// is one: of a [`RelativeTable`](crate::score::RelativeTable), of the bias of
    /// windows, row by row.
    pub table: Option<Array2<A>>,
    /// Of the log gates of a [`Forget`](crate::score::Forget), `[batch, q_heads,
    /// kv_len]`, where the score has them; of a gate of 0 (-inf) it is 0.
    pub log_gates: Option<Array3<A>>,
    /// Of the logits of [gates](crate::dense::Gated) of the output, of their shape,
    /// where there are any.
    pub gate: Option<Array4<A>>,
}

impl<A> SoftmaxGradients<A> {
    /// Those of queries, keys and values, of a mechanism that has nothing else.
    pub fn new(q: Array4<A>, k: Array4<A>, v: Array4<A>) -> Self {
        Self { q, k, v, sinks: None, table: None, log_gates: None, gate: None }
    }
}

/// What is known of the forward pass when its gradients are asked for. With
/// nothing known, it is made once more.
///
/// Output and LSE may be those of more keys than the call has: the gradients
/// are then those of a part of the keys in attention over all of them, which is
/// what rings and chunked training add up.
#[derive(Clone, Copy, Debug, Default)]
pub struct SavedForward<'a> {
    /// The output, `[batch, q_heads, q_len, value_dim]`, before its gates where it
    /// has any, and the LSE, `[batch, q_heads, q_len]`, without sinks. The sigmoid
    /// needs neither, unless it is gated.
    pub softmax: Option<(ArrayView4<'a, f32>, ArrayView3<'a, f32>)>,
}

/// A mechanism that the engine has the gradients of.
pub(crate) trait Smooth<X: Input> {
    /// Hands `run` the call, and its change of scores with a derivative.
    fn with_smooth<R>(&self, x: X, run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R) -> Result<R>;

    /// The definition of the gradients.
    fn define_back(
        &self,
        x: X,
        d_out: ArrayView4<'_, f32>,
        saved: SavedForward<'_>,
    ) -> Result<softmax_backward::Gradients>;

    /// The shapes of queries, keys and values, how many sinks there are, and what the
    /// score has.
    fn shapes(&self, x: X) -> Result<Shapes>;

    /// The shape of the gates' logits, where there are any.
    fn gate(&self, _: X) -> Option<Dim4> {
        None
    }

    /// Brings the entries of a head in the order in which the mechanism was given them.
    fn arrange<A>(&self, _: &mut [A]) {}
}

/// [`Smooth::with_smooth`] of softmax attention that is configured, and no more.
pub(crate) fn with_smooth<Q: Element, K: Element, O, M: Mask, F: score::Smooth, R>(
    config: &Config<M, F>,
    x: Qkv<'_, Q, K, O>,
    run: impl FnOnce(&Call<'_>, &dyn AnySmooth) -> R,
) -> Result<R> {
    let call = config.call(x.reborrow(), Norm::Softmax { sinks: None }, None)?;
    Ok(run(&call, config.smooth()))
}

/// [`Smooth::define_back`] of the same.
pub(crate) fn define_back<Q: Element, K: Element, O, M: Mask, F: score::Smooth>(
    config: &Config<M, F>,
    x: Qkv<'_, Q, K, O>,
    d_out: ArrayView4<'_, f32>,
    saved: SavedForward<'_>,
) -> Result<softmax_backward::Gradients> {
    let definition = config.definition(x.reborrow(), Normalisation::Softmax { sinks: None }, None)?;
    softmax_backward::gradients(&definition, config.smooth(), d_out, saved.softmax)
}

/// [`Smooth::shapes`] of the same, without what a score has.
pub(crate) fn shapes<Q, K, O>(x: &Qkv<'_, Q, K, O>) -> Shapes {
    Shapes { arrays: [x.q.dim(), x.k.dim(), x.v.dim()], sinks: None, table: [0, 0], log_gates: false }
}

/// See [`Smooth::shapes`].
pub(crate) struct Shapes {
    pub(crate) arrays: [Dim4; 3],
    pub(crate) sinks: Option<usize>,
    /// Heads and entries.
    pub(crate) table: [usize; 2],
    pub(crate) log_gates: bool,
}

impl Shapes {
    /// With what a score has.
    pub(crate) fn of_score(self, score: &dyn AnySmooth) -> Self {
        Self { table: score.table_of(), log_gates: score.of_each_key(), ..self }
    }

    /// Of the log gates, where there are any.
    fn gates(&self) -> Option<(usize, usize, usize)> {
        let [q, k, _] = self.arrays;
        self.log_gates.then_some((q.0, q.1, k.2))
    }
}

/// Gradients to write into, all 0.
pub(crate) fn zero_gradients<X: Input>(mechanism: &impl Smooth<X>, x: X) -> Result<SoftmaxGradients> {
    x.dims()?;
    let shapes = mechanism.shapes(x)?;
    let log_gates = shapes.gates().map(Array3::zeros);
    let Shapes { arrays: [q, k, v], sinks, table, .. } = shapes;
    Ok(SoftmaxGradients {
        q: Array4::zeros(q),
        k: Array4::zeros(k),
        v: Array4::zeros(v),
        sinks: sinks.map(Array1::zeros),
        table: (table[1] > 0).then(|| Array2::zeros(table)),
        log_gates,
        gate: mechanism.gate(x).map(Array4::zeros),
    })
}

pub(crate) fn workspace_bytes<X: Input>(mechanism: &impl Smooth<X>, x: X) -> Result<usize> {
    mechanism.with_smooth(x, |call, score| {
        let [queries, keys] = summed(call, score).map(|(b, h, n, _)| bytes_for::<f32>(b * h * n));
        attend_backward::workspace_bytes(call, score, false) + queries + keys
    })
}

/// What gradients of log gates are summed up to first, for each query and each key.
fn summed(call: &Call<'_>, score: &dyn AnySmooth) -> [Dim4; 2] {
    let (heads, one) = (call.dims.q_heads, usize::from(score.of_each_key()));
    [call.dims.q_len, call.dims.kv_len].map(|len| (call.x.batch, heads, len, one))
}

/// Gradients of log gates from sums for each query and each key.
fn gate_gradients(
    call: &Call<'_>,
    score: &dyn AnySmooth,
    [queries, keys]: [&[f32]; 2],
    to: &mut Array3<f32>,
) {
    let dims = &call.dims;
    for sequence in (0..dims.batch).map(|i| call.sequence(i)) {
        for head in 0..dims.q_heads {
            let row = sequence.batch * dims.q_heads + head;
            let queries = &queries[row * dims.q_len..][sequence.queries.clone()];
            let keys = &keys[row * dims.kv_len..][..dims.kv_len];
            if let Some(to) = to.slice_mut(s![sequence.batch, head, ..]).as_slice_mut() {
                score.gate_gradients(&sequence.site(head), queries, keys, to);
            }
        }
    }
}

/// Refuses an array of another shape.
fn check(argument: &'static str, want: &[usize], got: &[usize]) -> Result<()> {
    if want == got {
        return Ok(());
    }
    Err(Error::shape(argument, format!("{want:?}"), got))
}

/// Refuses an array of gradients of another shape than what it is of, or one of
/// nothing, or none.
pub(crate) fn check_part(
    argument: &'static str,
    want: Option<&[usize]>,
    got: Option<&[usize]>,
) -> Result<()> {
    if let (Some(want), Some(got)) = (want, got) {
        return check(argument, want, got);
    }
    if want.is_none() && got.is_none() {
        return Ok(());
    }
    let words = |shape: Option<&[usize]>| shape.map_or("none".to_owned(), |x| format!("{x:?}"));
    Err(Error::value(argument, words(want), words(got)))
}

/// The numbers of an array, one after the other.
fn numbers<'a, D: Dimension>(
    argument: &'static str,
    x: &'a mut Option<Array<f32, D>>,
) -> Result<Option<&'a mut [f32]>> {
    let refusal = || Error::value(argument, "an array of standard layout", "another");
    x.as_mut().map(|x| x.as_slice_mut().ok_or_else(refusal)).transpose()
}

fn check_all<X: Input>(x: X, d_out: &ArrayView4<'_, f32>, saved: &SavedForward<'_>) -> Result<()> {
    let (b, h, n, d) = x.out_dim()?;
    check("d_out", &[b, h, n, d], d_out.shape())?;
    if let Some((out, lse)) = &saved.softmax {
        check("saved output", &[b, h, n, d], out.shape())?;
        check("saved lse", &[b, h, n], lse.shape())?;
    }
    Ok(())
}

pub(crate) fn backward_into<X: Input>(
    mechanism: &impl Smooth<X>,
    x: X,
    d_out: ArrayView4<'_, f32>,
    saved: SavedForward<'_>,
    gradients: &mut SoftmaxGradients,
    workspace: &mut Workspace,
) -> Result<()> {
    check_all(x, &d_out, &saved)?;
    let shapes = mechanism.shapes(x)?;
    let log_gates = shapes.gates();
    let Shapes { arrays: [q, k, v], sinks, table, .. } = shapes;
    for (argument, want, got) in
        [("gradients.q", q, &gradients.q), ("gradients.k", k, &gradients.k), ("gradients.v", v, &gradients.v)]
    {
        check(argument, &[want.0, want.1, want.2, want.3], got.shape())?;
    }
    if gradients.sinks.as_ref().map(Array1::len) != sinks {
        let expected = sinks.map_or("none".to_owned(), |n| format!("one for each of the {n} query heads"));
        let got = gradients.sinks.as_ref().map_or("none".to_owned(), |x| x.len().to_string());
        return Err(Error::value("gradients.sinks", expected, got));
    }
    let (want, got) = ((table[1] > 0).then_some(table), gradients.table.as_ref().map(|x| x.dim().into()));
    if want != got {
        let words = |table: Option<[usize; 2]>| table.map_or("none".to_owned(), |x| format!("{x:?}"));
        return Err(Error::value("gradients.table", words(want), words(got)));
    }
    let got = gradients.log_gates.as_ref().map(|x| x.dim());
    if log_gates != got {
        let words =
            |gates: Option<(usize, usize, usize)>| gates.map_or("none".to_owned(), |x| format!("{x:?}"));
        return Err(Error::value("gradients.log_gates", words(log_gates), words(got)));
    }
    let (want, got) = (mechanism.gate(x), gradients.gate.as_ref().map(|gate| gate.dim()));
    if want != got {
        let words = |gate: Option<Dim4>| gate.map_or("none".to_owned(), |x| format!("{x:?}"));
        return Err(Error::value("gradients.gate", words(want), words(got)));
    }
    let d_out = Heads::new(d_out);
    let saved = saved.softmax.map(|(out, lse)| (Heads::new(out), Heads::new(lse.insert_axis(Axis(3)))));
    mechanism.with_smooth(x, |call, score| {
        let saved = saved.map(|(out, lse)| Saved { out, lse });
        let back = Back { call, score, d_out, saved, whole: None };
        let SoftmaxGradients { q, k, v, sinks, table, log_gates, gate } = gradients;
        let (sinks, mut table) = (numbers("gradients.sinks", sinks)?, numbers("gradients.table", table)?);
        let of_entries = table.as_deref_mut();
        let gate = numbers("gradients.gate", gate)?;
        // Before anything is written.
        numbers("gradients.log_gates", log_gates)?;
        let shapes = summed(call, score);
        let sums = shapes.map(|(b, h, n, one)| b * h * n * one);
        let bytes = attend_backward::workspace_bytes(call, score, saved.is_some());
        let mut arena = workspace.arena(bytes + sums.map(bytes_for::<f32>).iter().sum::<usize>())?;
        let [queries, keys] = sums.map(|n| arena.take::<f32>(n));
        let each = |to, shape| ArrayViewMut4::from_shape(shape, to).ok().filter(|_| score.of_each_key());
        let to = Gradients {
            q: q.view_mut(),
            k: k.view_mut(),
            v: v.view_mut(),
            sinks,
            table: of_entries,
            of_queries: each(&mut *queries, shapes[0]),
            of_keys: each(&mut *keys, shapes[1]),
            gate,
        };
        attend_backward::run_in(&back, to, arena);
        if let Some(to) = log_gates {
            gate_gradients(call, score, [queries, keys], to);
        }
        let [_, entries] = score.table_of();
        table.into_iter().flat_map(|x| x.chunks_exact_mut(entries.max(1))).for_each(|x| mechanism.arrange(x));
        Ok(())
    })?
}

pub(crate) fn reference_backward<X: Input>(
    mechanism: &impl Smooth<X>,
    x: X,
    d_out: ArrayView4<'_, f32>,
    saved: SavedForward<'_>,
) -> Result<SoftmaxGradients<f64>> {
    check_all(x, &d_out, &saved)?;
    let found = mechanism.define_back(x, d_out, saved)?;
    let softmax_backward::Gradients { q, k, v, sinks, mut table, log_gates, gate, .. } = found;
    let rows = table.iter_mut().flat_map(|table| table.rows_mut());
    rows.filter_map(|row| row.into_slice()).for_each(|row| mechanism.arrange(row));
    Ok(SoftmaxGradients { q, k, v, sinks, table, log_gates, gate })
}

/// The gradients of scores, given that of the output.
pub(crate) fn score_gradients<X: Input>(
    mechanism: &impl Smooth<X>,
    x: X,
    d_out: ArrayView4<'_, f32>,
) -> Result<Array4<f32>> {
    check_all(x, &d_out, &SavedForward::default())?;
    mechanism.with_smooth(x, |call, _| weights::score_gradients(call, AnyArray::F32(Heads::new(d_out))))?
}

pub(crate) fn reference_score_gradients<X: Input>(
    mechanism: &impl Smooth<X>,
    x: X,
    d_out: ArrayView4<'_, f32>,
) -> Result<Array4<f64>> {
    check_all(x, &d_out, &SavedForward::default())?;
    Ok(mechanism.define_back(x, d_out, SavedForward::default())?.scores)
}

/// [`Backward`](crate::Backward) and, of what shows its weights,
/// [`ScoreGradients`](crate::ScoreGradients) for a mechanism that is [`Smooth`].
macro_rules! smooth {
    (@backward [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        impl<$($generics)*> crate::attention::Backward<$input> for $mechanism {
            type Gradients<Number> = crate::stages::attend_backward::SoftmaxGradients<Number>;
            type Carried<'saved> = crate::stages::attend_backward::SavedForward<'saved>;

            fn zero_gradients(&self, x: $input) -> crate::error::Result<Self::Gradients<f32>> {
                crate::stages::attend_backward::zero_gradients(self, x)
            }

            fn backward_workspace_bytes(&self, x: $input) -> crate::error::Result<usize> {
                crate::stages::attend_backward::workspace_bytes(self, x)
            }

            fn backward_into(
                &self,
                x: $input,
                d_out: ndarray::ArrayView4<'_, f32>,
                carried: Self::Carried<'_>,
                gradients: &mut Self::Gradients<f32>,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<()> {
                crate::stages::attend_backward::backward_into(self, x, d_out, carried, gradients, workspace)
            }

            fn reference_backward(
                &self,
                x: $input,
                d_out: ndarray::ArrayView4<'_, f32>,
                carried: Self::Carried<'_>,
            ) -> crate::error::Result<Self::Gradients<f64>> {
                crate::stages::attend_backward::reference_backward(self, x, d_out, carried)
            }
        }
    };
    (@scores [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        impl<$($generics)*> crate::attention::ScoreGradients<$input> for $mechanism {
            fn score_gradients(
                &self,
                x: $input,
                d_out: ndarray::ArrayView4<'_, f32>,
            ) -> crate::error::Result<ndarray::Array4<f32>> {
                crate::stages::attend_backward::score_gradients(self, x, d_out)
            }

            fn reference_score_gradients(
                &self,
                x: $input,
                d_out: ndarray::ArrayView4<'_, f32>,
            ) -> crate::error::Result<ndarray::Array4<f64>> {
                crate::stages::attend_backward::reference_score_gradients(self, x, d_out)
            }
        }
    };
    ($mechanism:ty $(where [$($param:ident: $bound:path),+])?, [$($element:ident),+] $input:ident) => {
        $crate::stages::attend_backward::smooth!(
            @backward [$($element: crate::element::Element),+ $($(, $param: $bound)+)?]
            $input<'_, $($element),+>, $mechanism
        );
        $crate::stages::attend_backward::smooth!(
            @scores [$($element: crate::element::Element),+ $($(, $param: $bound)+)?]
            $input<'_, $($element),+>, $mechanism
        );
    };
}
pub(crate) use smooth;

#[cfg(test)]
mod tests;
