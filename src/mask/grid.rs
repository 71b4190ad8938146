//! Masks of tokens on a grid: what a query sees is a range on each axis.

use std::ops::Range;
use std::sync::Arc;

use super::interval::coverage_of;
use super::{Block, Coverage, Mask, range_bits};
use crate::error::Result;
use crate::input::{Dims, Site};
use crate::keys::grid::{AXES, Column, Cuboid, Order};
use crate::keys::images::check_tokens;
use crate::simd::Isa;

/// A query sees the keys of its own residue class whose place is, on every
/// axis, inside a range that only depends on the query's place on that axis.
/// Both ends of the range never fall when the place rises.
///
/// Queries and keys are counted in the orders that it is made with.
#[derive(Clone, Debug)]
pub(crate) struct Local {
    queries: Arc<Order>,
    keys: Arc<Order>,
    /// Of each axis, for each place of the queries' grid, places of the keys'
    /// class.
    reach: Arc<[Vec<Range<u32>>; AXES]>,
    /// Whether tokens are the places of one axis, in their order: what a query sees
    /// is an interval then.
    line: bool,
}

impl Local {
    /// `reach(axis, place, size)` is what a query at a place sees of a class of
    /// so many keys. Both orders have the same classes.
    pub(crate) fn new(
        queries: Arc<Order>,
        keys: Arc<Order>,
        reach: impl Fn(usize, usize, usize) -> Range<usize>,
    ) -> Self {
        let reach = Arc::new(std::array::from_fn(|axis| {
            let (size, step) = (keys.grid().sizes()[axis], keys.step()[axis]);
            let of_place = |place: usize| {
                let range = reach(axis, place / step, (size - place % step).div_ceil(step));
                range.start as u32..range.end as u32
            };
            (0..queries.grid().sizes()[axis]).map(of_place).collect::<Vec<_>>()
        }));
        let whole = |axis: usize| matches!(reach[axis][..], [Range { start: 0, end: 1 }]);
        let plain = |order: &Order| order.grid().axes() == 1 && order.step() == [1; AXES];
        let line = plain(&queries) && plain(&keys) && whole(0) && whole(1);
        Self { queries, keys, reach, line }
    }

    /// What a query sees on a line.
    #[inline(always)]
    fn interval(&self, query: usize) -> Range<usize> {
        let Range { start, end } = self.reach[2][query];
        start as usize..end as usize
    }

    /// What the first and the last of some queries see on a line.
    #[inline(always)]
    fn intervals(&self, queries: &Range<usize>) -> [Range<usize>; 2] {
        [self.interval(queries.start), self.interval(queries.end - 1)]
    }

    #[inline(always)]
    fn reach(&self, class: usize, axis: usize, at: usize) -> Range<usize> {
        let place = at * self.keys.step()[axis] + self.keys.class(class).offset[axis];
        let Range { start, end } = self.reach[axis][place];
        start as usize..end as usize
    }

    /// What the places of a cuboid see: all of them together, and each.
    #[inline(always)]
    fn reaches(&self, cuboid: &Cuboid) -> [[Range<usize>; AXES]; 2] {
        let ends: [_; AXES] = std::array::from_fn(|axis| {
            let Range { start, end } = cuboid.axes[axis];
            (self.reach(cuboid.class, axis, start), self.reach(cuboid.class, axis, end - 1))
        });
        [ends.each_ref().map(|(a, b)| a.start..b.end), ends.map(|(a, b)| b.start..a.end)]
    }

    /// Sets the bits of the keys of a range that a query sees; bit 0 is the
    /// first of them.
    #[inline(always)]
    fn fill(&self, query: usize, keys: &Range<usize>, words: &mut [u64]) {
        words.fill(0);
        if self.line {
            let Range { start, end } = self.interval(query);
            let seen = start.max(keys.start)..end.min(keys.end);
            each_word(seen, keys.start, words, |word, _, inside| *word |= inside);
            return;
        }
        let (class, at) = self.queries.spot(query);
        let [rows, high, wide] = std::array::from_fn(|axis| self.reach(class, axis, at[axis]));
        for column in self.keys.columns(class, [high.clone(), wide.clone()]) {
            let period = column.period();
            let start = (column.start + rows.start * period).max(keys.start);
            let end = (column.start + rows.end * period).min(keys.end);
            if start < end {
                let seen = [&high, &wide];
                let axes = std::array::from_fn(|i| {
                    let (axis, seen) = (&column.axes[i], seen[i]);
                    seen.start.max(axis.start) - axis.start..seen.end.min(axis.end) - axis.start
                });
                fill_column(&column, &axes, start..end, keys.start, words);
            }
        }
    }
}

/// Sets the bits of some tokens of a column whose places on the second and
/// third axis are inside `axes`; bit 0 is token `first`.
#[inline(always)]
fn fill_column(
    column: &Column,
    axes: &[Range<usize>; 2],
    tokens: Range<usize>,
    first: usize,
    words: &mut [u64],
) {
    let (period, width) = (column.period(), column.axes[1].len());
    let whole = axes[0].len() * axes[1].len() == period;
    if !whole && period > 64 {
        let rows = (tokens.start - column.start) / period..(tokens.end - column.start).div_ceil(period);
        for row in rows.flat_map(|a| axes[0].clone().map(move |b| a * period + b * width)) {
            let start = (column.start + row + axes[1].start).max(tokens.start);
            let end = (column.start + row + axes[1].end).min(tokens.end);
            each_word(start..end, first, words, |word, _, inside| *word |= inside);
        }
        return;
    }
    // What is seen of the tokens of one place on the first axis, and of those
    // after it as far as a word goes.
    let (mut pattern, mut repeated) = (0, 0);
    if !whole && !axes[1].is_empty() {
        let row = (u64::MAX >> (64 - axes[1].len())) << axes[1].start;
        pattern = axes[0].clone().fold(0, |bits, b| bits | row << (b * width));
        repeated = pattern;
        let mut known = period;
        while known < 64 {
            repeated |= repeated << known;
            known *= 2;
        }
    }
    each_word(tokens, first, words, |word, at, inside| {
        if whole {
            *word |= inside;
            return;
        }
        // Bit 0 of the word is this token of the pattern.
        let phase = if at >= column.start {
            (at - column.start) % period
        } else {
            (period - (column.start - at) % period) % period
        };
        let rest = repeated.checked_shl((period - phase) as u32).unwrap_or(0);
        *word |= (pattern >> phase | rest) & inside;
    });
}

/// Calls `then` for each word that has some of these bits, with the token of
/// its bit 0 and its bits.
#[inline(always)]
pub(super) fn each_word(
    tokens: Range<usize>,
    first: usize,
    words: &mut [u64],
    mut then: impl FnMut(&mut u64, usize, u64),
) {
    if tokens.is_empty() {
        return;
    }
    let range = (tokens.start - first) / 64..(tokens.end - first).div_ceil(64);
    for (i, word) in range.clone().zip(&mut words[range]) {
        let at = first + 64 * i;
        then(word, at, range_bits(tokens.start as isize..tokens.end as isize, at));
    }
}

impl Mask for Local {
    #[inline(always)]
    fn visible(&self, _: &Site, query: usize, key: usize) -> bool {
        let (class, at) = self.queries.spot(query);
        let (other, place) = self.keys.spot(key);
        class == other && (0..AXES).all(|axis| self.reach(class, axis, at[axis]).contains(&place[axis]))
    }

    fn hull(&self, _: &Site, queries: Range<usize>) -> Range<usize> {
        if self.line && !queries.is_empty() {
            let [first, last] = self.intervals(&queries);
            return first.start.min(last.end)..last.end;
        }
        let (mut start, mut end) = (usize::MAX, 0);
        for cuboid in self.queries.cuboids(queries) {
            let [any, _] = self.reaches(&cuboid);
            if any.iter().all(|range| !range.is_empty()) {
                let first = self.keys.token(cuboid.class, any.each_ref().map(|range| range.start));
                let last = self.keys.token(cuboid.class, any.map(|range| range.end - 1));
                (start, end) = (start.min(first), end.max(last + 1));
            }
        }
        start.min(end)..end
    }

    fn coverage(&self, _: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        if self.line && !queries.is_empty() {
            return coverage_of(&self.intervals(&queries), &keys);
        }
        let (mut some, mut all) = (false, true);
        for cuboid in self.queries.cuboids(queries) {
            let [any, each] = self.reaches(&cuboid);
            for there in self.keys.cuboids(keys.clone()) {
                let axes = || there.axes.iter().zip(any.iter().zip(&each));
                let same = there.class == cuboid.class;
                some |= same && axes().all(|(axis, (any, _))| axis.start < any.end && any.start < axis.end);
                all &=
                    same && axes().all(|(axis, (_, each))| each.start <= axis.start && axis.end <= each.end);
                if some && !all {
                    return Coverage::Partial;
                }
            }
        }
        if some { Coverage::Full } else { Coverage::Empty }
    }

    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let mut word = [0];
        self.fill(query, &(first..site.kv_len.min(first + 64)), &mut word);
        word[0]
    }

    fn fill_bits(&self, _: Isa, block: &Block<'_>, words: &mut [u64], stride: usize) {
        let len = block.keys.len().div_ceil(64);
        for (query, row) in block.queries.clone().zip(words.chunks_mut(stride)) {
            self.fill(query, &block.keys, &mut row[..len]);
        }
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn check(&self, dims: &Dims) -> Result<()> {
        check_tokens([self.queries.grid().len(), self.keys.grid().len()], dims)
    }
}
