//! Flows, each of which is made with the sums of those before: one all-gather each.

use attention_kernels::Qkv;
use attention_kernels::linear::{Flowformer, FlowformerState};
use ndarray::{Array3, Array4, s};

use super::parts::{halves, joined};
use super::single::only;
use super::{Parts, Segment, Travels};
use crate::stored::Stored;

/// Which all-gather has a part: `sum phi(k)` and `sum phi(q)` with how many tokens there are,
/// what is made with these, what is made with that, and at last the matrix.
const ROUNDS: [usize; 5] = [0, 0, 1, 2, 3];

impl<T: Stored> Travels<Qkv<'_, T>> for Flowformer {
    type Mechanism = Self;

    fn mechanism(&self) -> &Self {
        self
    }

    fn sizes(&self, zero: &FlowformerState) -> Vec<(&'static str, usize)> {
        let (_, heads, dim, value_dim) = zero.state().view().dim();
        vec![("heads", heads), ("k: head_dim", dim), ("v: value_dim", value_dim)]
    }

    fn parts(&self, state: &FlowformerState) -> Parts {
        let (sums, tallies) = (state.sums(), state.tallies());
        let (sequences, heads, _) = tallies.dim();
        let tally = |which: usize| {
            Array4::from_shape_fn((sequences, heads, 1, 2), |(i, h, _, half)| {
                halves(tallies[[i, h, which]])[half]
            })
        };
        let of = |rows: std::ops::Range<usize>| sums.slice(s![.., .., rows, ..]).to_owned();
        vec![of(0..2), tally(1), of(2..4), tally(0), state.state().view().to_owned()]
    }

    fn state(&self, mut parts: Parts) -> Result<FlowformerState, String> {
        let state = only(parts.split_off(4))?;
        let (sequences, heads, dim, _) = state.view().dim();
        let mut sums = Array4::zeros((sequences, heads, 4, dim));
        for (part, rows) in [(0, 0..2), (2, 2..4)] {
            sums.slice_mut(s![.., .., rows, ..]).assign(&parts[part]);
        }
        let tally = |(i, h, which): (usize, usize, usize)| {
            let of = &parts[if which == 0 { 3 } else { 1 }];
            joined([of[[i, h, 0, 0]], of[[i, h, 0, 1]]])
        };
        let tallies = Array3::from_shape_fn((sequences, heads, 2), tally);
        FlowformerState::new(state, sums, tallies).map_err(|error| error.to_string())
    }

    fn left(&self, _: Qkv<'_, T>, _: &FlowformerState, _: bool) -> Result<Parts, String> {
        Ok(Parts::new())
    }

    fn follow(&self, before: &Parts, tokens: &Segment) -> Parts {
        let add = |part: usize| match part {
            1 | 3 => {
                let mut sum = before[part].clone();
                for (mut sum, own) in sum.rows_mut().into_iter().zip(tokens.own[part].rows()) {
                    let all = joined([sum[0], sum[1]]) + joined([own[0], own[1]]);
                    sum.iter_mut().zip(halves(all)).for_each(|(sum, half)| *sum = half);
                }
                sum
            }
            _ => &before[part] + &tokens.own[part],
        };
        (0..ROUNDS.len()).map(add).collect()
    }

    /// Sums begin with epsilon, which all ranks together have once.
    fn sent(&self, mut parts: Parts, fresh: &Parts, _: usize) -> Parts {
        [0, 2].into_iter().for_each(|part| parts[part] -= &fresh[part]);
        parts
    }

    fn round(&self, part: usize) -> usize {
        ROUNDS[part]
    }
}
