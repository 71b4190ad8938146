//! States that are carried from call to call, where the caller has them.

use crate::simd::mem::{bytes_for, claim_words};

/// States `[slots, heads, rows, cols]`, one after the other.
pub(crate) struct Kept<'a> {
    pub(crate) numbers: &'a mut [f32],
    pub(crate) at: Slots<'a>,
}

/// Which of the slots sequences have.
#[derive(Clone, Copy, Default)]
pub(crate) struct Slots<'a> {
    /// Sequence `i` has `of[i]`; without it, slot `i`.
    pub(crate) of: Option<&'a [usize]>,
    /// How many there are, where sequences have some of them.
    pub(crate) count: usize,
}

impl<'a> Kept<'a> {
    /// One a sequence.
    pub(crate) fn own(numbers: &'a mut [f32]) -> Self {
        Self { numbers, at: Slots::default() }
    }
}

impl Slots<'_> {
    pub(crate) fn slot(&self, sequence: usize) -> usize {
        self.of.map_or(sequence, |of| of[sequence])
    }

    /// The number of the state of a unit, a head of a sequence.
    pub(crate) fn state(&self, unit: usize, heads: usize) -> usize {
        match self.of {
            Some(of) => of[unit / heads] * heads + unit % heads,
            None => unit,
        }
    }

    /// States of all slots, where there are `units` units.
    pub(crate) fn states(&self, units: usize, heads: usize) -> usize {
        units.max(self.count * heads)
    }

    /// Bytes that a call works in besides: a bit a row of all states.
    pub(crate) fn bytes(&self, rows: usize) -> usize {
        bytes_for::<u64>(claim_words(self.count * rows))
    }
}
