//! Reuse: selections that serve later steps of a layer, or later layers of a step.
//!
//! A caller keeps a [`Reused`] and hands it to every call: one a layer where a
//! selection serves later steps, one for all layers where it serves later layers.
//! A [`Reuse`] says of each call, by its number and its queries, whether it selects.

use std::ops::Range;

use super::summary::Extend;
use super::{Source, Summary};
use crate::error::{Error, Result};
use crate::input::{Dims, Sequence};
use crate::keys::{Layout, Run, TokenLists};

/// Which calls select. Calls are counted from 0.
#[derive(Clone, Debug, PartialEq)]
pub enum Policy {
    /// Calls are the layers of a step, one after the other, step by step: of
    /// `layers`, those of `selecting`, ascending, select, and the ones before the
    /// first of these attend to all keys.
    PerLayerPlan {
        /// Layers of a step.
        layers: usize,
        /// The layers that select; there is one.
        selecting: Vec<usize>,
    },
    /// Calls are the steps of a layer, of which every so many-th selects.
    EveryN(usize),
    /// The same, but a step selects where its queries have turned away from those
    /// of the last selection, sequence by sequence.
    CosineAtLeast {
        /// The least cosine of the angle between them.
        cosine: f32,
        /// Looks every so many steps.
        every: usize,
        /// Whether it is the mean of the cosines of the heads, rather than the
        /// cosine of all heads as one vector.
        per_head: bool,
    },
}

/// What a call that does not select attends to besides what was selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Nothing.
    Nothing,
    /// All keys that have come since.
    Since,
    /// The last `local` keys in place of those that were the last: these are of
    /// the selection only if it has them besides. Up to `all` keys nothing is
    /// selected, and all of them are seen.
    Local {
        /// Keys that are always seen.
        local: usize,
        /// Most keys that need no selection.
        all: usize,
    },
}

/// How a mechanism reuses what it selects.
#[derive(Clone, Debug, PartialEq)]
pub struct Reuse {
    /// Which calls select.
    pub policy: Policy,
    /// Whether a call that selects attends to all keys itself.
    pub dense: bool,
    /// What others attend to besides.
    pub tail: Tail,
}

/// What a caller keeps between calls: see [`Reuses`](crate::Reuses).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reused {
    calls: usize,
    /// Batch, query heads, key/value heads and elements of a head of all calls.
    sizes: [usize; 4],
    /// Keys of each sequence in the last call.
    keys: Vec<usize>,
    of: Vec<Selection>,
}

/// The last selection of a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Selection {
    /// Keys that there were, of which these runs are some, by head of the layout.
    pub(crate) keys: usize,
    pub(crate) lists: Vec<Vec<Run>>,
    /// The means of its queries, `[q_heads, head_dim]`; none before the first.
    pub(crate) queries: Vec<f32>,
    /// The number of its call.
    pub(crate) call: usize,
}

/// What a sequence does in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    All,
    Select,
    Reuse,
}

impl Policy {
    /// Checks the numbers.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |name, expected: &str, got: String| Err(Error::value(name, expected, got));
        match self {
            Self::PerLayerPlan { layers, selecting } => {
                let ascending = selecting.windows(2).all(|pair| pair[0] < pair[1]);
                if selecting.is_empty() || !ascending || selecting.last() >= Some(layers) {
                    let expected = format!("some of the layers 0..{layers}, ascending");
                    return wrong("selecting", &expected, format!("{selecting:?}"));
                }
            }
            Self::EveryN(every) | Self::CosineAtLeast { every, .. } if *every == 0 => {
                return wrong("every", "at least 1 step", every.to_string());
            }
            Self::CosineAtLeast { cosine, .. } if cosine.is_nan() => {
                return wrong("cosine", "a number", cosine.to_string());
            }
            _ => {}
        }
        Ok(())
    }

    /// What each sequence of call `calls` does, where `turned(sequence)` is the
    /// cosine that is asked for.
    pub(crate) fn turns(&self, reused: &Reused, batch: usize, cosine: impl Fn(usize) -> f64) -> Vec<Turn> {
        let calls = reused.calls;
        let turn = |i: usize| match self {
            Self::PerLayerPlan { layers, selecting } => match calls % layers {
                layer if layer < selecting[0] => Turn::All,
                layer if selecting.contains(&layer) => Turn::Select,
                _ => Turn::Reuse,
            },
            Self::EveryN(every) if calls.is_multiple_of(*every) => Turn::Select,
            Self::EveryN(_) => Turn::Reuse,
            Self::CosineAtLeast { cosine: least, every, .. } => match reused.selection(i) {
                Some(last) if !(calls - last.call).is_multiple_of(*every) => Turn::Reuse,
                Some(_) if cosine(i) >= f64::from(*least) => Turn::Reuse,
                _ => Turn::Select,
            },
        };
        (0..batch).map(turn).collect()
    }
}

impl Reuse {
    /// Whether all sequences of a call do the same.
    pub(crate) fn is_uniform(&self) -> bool {
        !matches!(self.policy, Policy::CosineAtLeast { .. }) && !matches!(self.tail, Tail::Local { .. })
    }
}

impl Reused {
    /// Before the first call.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many calls there were.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// In how many keys the last selection of a sequence was made, if there was
    /// one.
    pub fn selected_at(&self, sequence: usize) -> Option<usize> {
        self.selection(sequence).map(|last| last.keys)
    }

    /// The last selection of a sequence.
    pub(crate) fn selection(&self, sequence: usize) -> Option<&Selection> {
        self.of.get(sequence).filter(|last| !last.lists.is_empty())
    }

    /// Refuses a call out of turn: one of other sizes, one that does not follow
    /// the last one, or a layer of a step with other keys than the first.
    pub(crate) fn check<'s>(
        &self,
        policy: &Policy,
        dims: &Dims,
        sequences: impl Iterator<Item = &'s Sequence> + Clone,
    ) -> Result<()> {
        if self.calls == 0 {
            return Ok(());
        }
        let sizes = Self::sizes(dims);
        if sizes != self.sizes {
            let expected = format!("[batch, q_heads, kv_heads, head_dim] = {:?} as before", self.sizes);
            return Err(Error::shape("reused", expected, &sizes));
        }
        let same =
            matches!(policy, Policy::PerLayerPlan { layers, .. } if !self.calls.is_multiple_of(*layers));
        let want = sequences
            .clone()
            .zip(&self.keys)
            .map(|(x, &keys)| if same { keys } else { keys.saturating_add(x.queries.len()) });
        if want.clone().eq(sequences.clone().map(|x| x.keys.len())) {
            return Ok(());
        }
        let expected = format!(
            "{:?} keys, {}",
            want.collect::<Vec<_>>(),
            if same {
                format!("those of the first layer of this step, in call {}", self.calls)
            } else {
                format!("those of call {} and the queries of this one", self.calls - 1)
            }
        );
        Err(Error::value(
            "reused",
            expected,
            format_args!("{:?}", sequences.map(|x| x.keys.len()).collect::<Vec<_>>()),
        ))
    }

    fn sizes(dims: &Dims) -> [usize; 4] {
        [dims.batch, dims.q_heads, dims.kv_heads, dims.head_dim]
    }

    /// After a call, in which these sequences have selected.
    pub(crate) fn next(&self, dims: &Dims, keys: Vec<usize>, of: Vec<Option<Selection>>) -> Self {
        let before = |i: usize| self.of.get(i).cloned().unwrap_or_default();
        let of = of.into_iter().enumerate().map(|(i, new)| new.unwrap_or_else(|| before(i))).collect();
        Self { calls: self.calls + 1, sizes: Self::sizes(dims), keys, of }
    }

    /// What has been selected by `lists` in this call, for a sequence with
    /// queries: the lists of the last of these.
    pub(crate) fn selection_of(
        &self,
        lists: &TokenLists,
        sequence: &Sequence,
        queries: Vec<f32>,
    ) -> Selection {
        let layout = lists.layout();
        let block = (sequence.queries.len() - 1) / layout.q_block;
        let heads = layout.heads();
        let list = |head| lists.runs(sequence.index, head * (layout.q_heads / heads), block).to_vec();
        Selection {
            keys: sequence.keys.len(),
            lists: (0..heads).map(list).collect(),
            queries,
            call: self.calls,
        }
    }
}

impl Selection {
    /// Which of the keys that it names are seen later, and which ones besides,
    /// where there are `keys` then.
    fn later(&self, tail: Tail, keys: usize) -> (usize, Range<usize>) {
        match tail {
            Tail::Nothing => (keys, keys..keys),
            Tail::Since => (self.keys, self.keys..keys),
            Tail::Local { local, .. } => (self.keys.saturating_sub(local), keys.saturating_sub(local)..keys),
        }
    }

    /// The runs of a list then.
    pub(crate) fn runs(&self, head: usize, tail: Tail, keys: usize, to: &mut Vec<Run>) {
        let (end, more) = self.later(tail, keys);
        let first = to.len();
        let kept = self.lists[head].iter().map(|run| run.range().start..run.range().end.min(end));
        for range in kept.chain([more]) {
            let range = match to[first..].last() {
                Some(last) => range.start.max(last.range().end)..range.end,
                None => range,
            };
            match to[first..].last_mut() {
                _ if range.is_empty() => {}
                Some(last) if last.range().end == range.start => last.len += range.len() as u32,
                _ => to.push(Run { start: range.start as u32, len: range.len() as u32 }),
            }
        }
    }
}

/// The plan of a call: of each sequence all keys, what has just been selected, or
/// what was selected before.
pub(crate) fn plan(
    reuse: &Reuse,
    reused: &Reused,
    layout: Layout,
    sequences: &[Sequence],
    turns: &[Turn],
    new: Option<&TokenLists>,
) -> Result<TokenLists> {
    let (mut offsets, mut runs) = (vec![0], Vec::new());
    for (sequence, turn) in sequences.iter().zip(turns) {
        let keys = sequence.keys.len();
        for head in 0..layout.heads() {
            for block in 0..layout.blocks() {
                let (new, old) = (new.filter(|_| *turn == Turn::Select), reused.selection(sequence.index));
                match (new, old) {
                    (Some(new), _) if !reuse.dense => {
                        let first = head * (layout.q_heads / layout.heads());
                        runs.extend_from_slice(new.runs(sequence.index, first, block));
                    }
                    (_, Some(old)) if *turn == Turn::Reuse => old.runs(head, reuse.tail, keys, &mut runs),
                    _ if keys > 0 => runs.push(Run { start: 0, len: keys as u32 }),
                    _ => {}
                }
                offsets.push(runs.len());
            }
        }
    }
    TokenLists::new(layout, offsets, runs)
}

/// The means of the queries of a sequence, `[q_heads, head_dim]`.
pub(crate) fn mean_queries(source: &Source<'_>, sequence: &Sequence) -> Vec<f32> {
    let (n, d) = (sequence.queries.len(), source.dims.head_dim);
    let mut means = vec![0.0; source.dims.q_heads * d];
    let (mut sums, mut room) = (vec![0.0; d], vec![0.0; Summary::room(d)]);
    for (head, rows) in means.chunks_mut(d.max(1)).enumerate() {
        let (sums, room) = (&mut sums[..], &mut room[..]);
        let call = Extend { from: 0, unit: n.max(1), head_dim: d, rows, sums, room };
        Summary::Mean.extend(source.isa, source.q.rows(sequence.batch, head, &sequence.queries), call);
    }
    means
}

/// The cosine of two sets of queries of so many elements a head: 0 where one is 0.
pub(crate) fn cosine(a: &[f32], b: &[f32], head: usize, per_head: bool) -> f64 {
    let of = |(a, b): (&[f32], &[f32])| {
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let norms = (dot(a, a) * dot(b, b)).sqrt();
        if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
    };
    let head = if per_head { head } else { a.len() }.max(1);
    let heads = a.chunks(head).zip(b.chunks(head));
    heads.map(of).sum::<f64>() / a.len().div_ceil(head).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(keys: usize, runs: &[(u32, u32)]) -> Selection {
        let lists = vec![runs.iter().map(|&(start, len)| Run { start, len }).collect()];
        Selection { keys, lists, ..Selection::default() }
    }

    #[test]
    fn tails_are_joined_to_what_was_selected() {
        let runs = |selection: &Selection, tail, keys| {
            let mut runs = vec![Run { start: 0, len: 1 }];
            selection.runs(0, tail, keys, &mut runs);
            runs[1..].iter().map(|run| (run.start, run.len)).collect::<Vec<_>>()
        };
        let last = selection(20, &[(1, 3), (9, 2), (15, 5)]);
        assert_eq!(runs(&last, Tail::Nothing, 20), [(1, 3), (9, 2), (15, 5)]);
        assert_eq!(runs(&last, Tail::Since, 20), [(1, 3), (9, 2), (15, 5)]);
        assert_eq!(runs(&last, Tail::Since, 23), [(1, 3), (9, 2), (15, 8)]);
        let local = |local| Tail::Local { local, all: 0 };
        assert_eq!(runs(&last, local(5), 23), [(1, 3), (9, 2), (18, 5)]);
        assert_eq!(runs(&last, local(4), 20), [(1, 3), (9, 2), (15, 5)], "15 was selected");
        assert_eq!(runs(&last, local(12), 21), [(1, 3), (9, 12)]);
        assert_eq!(runs(&last, local(30), 21), [(0, 21)]);
    }

    #[test]
    fn cosines() {
        let (a, b) = ([3.0, 4.0, 1.0, 0.0], [4.0, 3.0, 0.0, 2.0]);
        assert_eq!(cosine(&a, &a, 2, false), 1.0);
        assert!((cosine(&a, &b, 2, true) - 0.48).abs() < 1e-12);
        assert!((cosine(&a, &b, 2, false) - 24.0 / (26f64 * 29.0).sqrt()).abs() < 1e-12);
        assert_eq!(cosine(&a, &[0.0; 4], 2, false), 0.0);
        assert_eq!(cosine(&[], &[], 2, true), 0.0);
    }

    #[test]
    fn turns_by_the_number_of_the_call() {
        let at = |policy: &Policy, calls| policy.turns(&Reused { calls, ..Reused::new() }, 1, |_| 0.5)[0];
        let plan = Policy::PerLayerPlan { layers: 5, selecting: vec![1, 3] };
        let want = [Turn::All, Turn::Select, Turn::Reuse, Turn::Select, Turn::Reuse];
        assert!((0..15).all(|calls| at(&plan, calls) == want[calls % 5]));
        assert!((0..9).all(|calls| (at(&Policy::EveryN(3), calls) == Turn::Select) == (calls % 3 == 0)));
        let policy = |cosine, every| Policy::CosineAtLeast { cosine, every, per_head: false };
        let mut reused = Reused { calls: 7, of: vec![selection(9, &[(0, 1)])], ..Reused::new() };
        assert_eq!(at(&policy(-1.0, 1), 0), Turn::Select, "there is nothing yet");
        reused.of[0].call = 3;
        let turn = |cosine, every| policy(cosine, every).turns(&reused, 1, |_| 0.5)[0];
        assert_eq!(
            [turn(0.5, 1), turn(0.6, 1), turn(0.6, 2), turn(0.6, 3)].map(|x| x == Turn::Select),
            [false, true, true, false]
        );
    }

    #[test]
    fn refusals() {
        let refusal = |policy: Policy| policy.check().unwrap_err().to_string();
        let plan = |selecting| Policy::PerLayerPlan { layers: 3, selecting };
        assert_eq!(refusal(plan(vec![])), "selecting: expected some of the layers 0..3, ascending, got []");
        assert!(refusal(plan(vec![1, 1])).starts_with("selecting: ") && plan(vec![3]).check().is_err());
        assert_eq!(refusal(Policy::EveryN(0)), "every: expected at least 1 step, got 0");
        let policy = Policy::CosineAtLeast { cosine: f32::NAN, every: 1, per_head: false };
        assert!(refusal(policy).starts_with("cosine: "));
    }
}
