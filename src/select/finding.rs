//! Lists that tasks find by themselves, put one after the other.

use std::ops::Range;
use std::sync::Mutex;

use super::{Selected, Source, reserve};
use crate::engine::parallel;
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::Layout;
use crate::simd::mem::{Arena, bytes_for_shares};

/// Lists under way.
#[derive(Debug)]
pub(crate) struct Lists<T = u32> {
    ends: Vec<usize>,
    entries: Vec<T>,
}

impl<T> Default for Lists<T> {
    fn default() -> Self {
        Self { ends: Vec::new(), entries: Vec::new() }
    }
}

impl<T> Lists<T> {
    /// Appends to the list under way.
    pub(crate) fn extend(&mut self, entries: impl IntoIterator<Item = T>) {
        self.entries.extend(entries);
    }

    /// Ends it.
    pub(crate) fn end(&mut self) {
        self.ends.push(self.entries.len());
    }
}

/// The numbers of the bits that are set.
pub(crate) fn ones(bits: &[u64]) -> impl Iterator<Item = usize> {
    bits.iter().enumerate().flat_map(|(w, &word)| {
        let rest = |&word: &u64| Some(word & (word - 1)).filter(|&word| word != 0);
        let words = std::iter::successors(Some(word).filter(|&word| word != 0), rest);
        words.map(move |word| 64 * w + word.trailing_zeros() as usize)
    })
}

/// Runs `tasks` tasks on `workers` threads, each of which finds some lists;
/// returns the offsets and the entries of all, in the order of tasks.
pub(super) fn collect<W, T: Copy + Send>(
    workers: usize,
    tasks: usize,
    start: impl Fn(usize) -> W + Sync + Send,
    find: impl Fn(&mut W, usize, &mut Lists<T>) + Sync + Send,
) -> Result<(Vec<usize>, Vec<T>)> {
    let mut found = Vec::<Mutex<Lists<T>>>::new();
    reserve(&mut found, tasks)?;
    found.resize_with(tasks, Mutex::default);
    parallel::for_each(workers, tasks, start, |state, i| {
        if let Ok(mut lists) = found[i].lock() {
            find(state, i, &mut lists);
        }
    });
    let found: Vec<Lists<T>> = found.into_iter().filter_map(|lists| lists.into_inner().ok()).collect();
    let (mut offsets, mut entries) = (Vec::new(), Vec::new());
    reserve(&mut offsets, found.iter().map(|lists| lists.ends.len()).sum::<usize>() + 1)?;
    reserve(&mut entries, found.iter().map(|lists| lists.entries.len()).sum())?;
    offsets.push(0);
    for lists in &found {
        let before = entries.len();
        entries.extend_from_slice(&lists.entries);
        offsets.extend(lists.ends.iter().map(|end| before + end));
    }
    Ok((offsets, entries))
}

/// A search for the lists of a layout, whose entries are candidates of `unit`
/// keys.
pub(crate) struct Search<'a> {
    pub(crate) source: &'a Source<'a>,
    pub(crate) layout: Layout,
    pub(crate) unit: usize,
    /// Bytes that a thread works in.
    pub(crate) share: usize,
}

/// Which lists a task finds.
pub(crate) struct Place<'a> {
    pub(crate) of: &'a Sequence,
    /// The first query head that they are for.
    pub(crate) head: usize,
    pub(crate) kv_head: usize,
}

impl Search<'_> {
    /// Bytes of scratch, if the lists can be counted.
    pub(crate) fn bytes(&self) -> Result<usize> {
        self.layout.lists()?;
        Ok(bytes_for_shares(parallel::threads(), self.share))
    }

    /// Finds all lists of a sequence and a head at once: those of its blocks of
    /// queries. Of blocks that it does not have lists are empty.
    pub(crate) fn by_head<'w, W>(
        &self,
        workspace: &'w mut Workspace,
        take: impl Fn(&mut Arena<'w>) -> W + Sync + Send,
        find: impl Fn(&mut W, &Place<'_>, &mut Lists) + Sync + Send,
    ) -> Result<Selected> {
        self.run(workspace, (1, 1), take, |state, place, _, lists| {
            find(state, place, lists);
            for _ in lists.ends.len()..self.layout.blocks() {
                lists.end();
            }
        })
    }

    /// The same for the heads that share a key/value head one after the other:
    /// `prepare` does what they have in common.
    pub(crate) fn by_group<'w, W>(
        &self,
        workspace: &'w mut Workspace,
        take: impl Fn(&mut Arena<'w>) -> W + Sync + Send,
        prepare: impl Fn(&mut W, &Place<'_>) + Sync + Send,
        find: impl Fn(&mut W, &Place<'_>, &mut Lists) + Sync + Send,
    ) -> Result<Selected> {
        let group = self.source.group();
        self.run(workspace, (group, 1), take, |state, place, _, lists| {
            prepare(state, place);
            for i in 0..group {
                find(state, &Place { head: place.head + i, ..*place }, lists);
                for _ in lists.ends.len()..(i + 1) * self.layout.blocks() {
                    lists.end();
                }
            }
        })
    }

    /// Finds the list of each sequence, head and block of queries, which is not
    /// empty, by itself.
    pub(crate) fn by_block<'w, W>(
        &self,
        workspace: &'w mut Workspace,
        take: impl Fn(&mut Arena<'w>) -> W + Sync + Send,
        find: impl Fn(&mut W, &Place<'_>, Range<usize>, &mut Lists) + Sync + Send,
    ) -> Result<Selected> {
        self.run(workspace, (1, self.layout.blocks()), take, |state, place, block, lists| {
            let (size, n) = (self.layout.q_block, place.of.queries.len());
            let queries = (block * size).min(n)..((block + 1) * size).min(n);
            if !queries.is_empty() {
                find(state, place, queries, lists);
            }
            lists.end();
        })
    }

    /// Tasks are for so many heads of lists, and one of so many parts of these.
    fn run<'w, W>(
        &self,
        workspace: &'w mut Workspace,
        (together, parts): (usize, usize),
        take: impl Fn(&mut Arena<'w>) -> W + Sync + Send,
        find: impl Fn(&mut W, &Place<'_>, usize, &mut Lists) + Sync + Send,
    ) -> Result<Selected> {
        let Self { source, layout, unit, share } = self;
        let workers = parallel::threads();
        let shares = workspace.arena(self.bytes()?)?.shares(workers, *share);
        let heads = layout.heads() / together.max(1);
        let group = layout.q_heads / heads.max(1);
        let keys = (0..layout.sequences).map(|i| source.sequence(i).keys.len()).collect();
        if group == 0 {
            // Groups of no heads see nothing.
            let mut offsets = Vec::new();
            reserve(&mut offsets, layout.lists()?.saturating_add(1))?;
            offsets.resize(layout.lists()? + 1, 0);
            return Ok(Selected::new(*layout, (offsets, Vec::new()), *unit, keys));
        }
        // There are no more tasks than lists, and these can be counted.
        let tasks = if layout.lists()? == 0 { 0 } else { layout.sequences * heads * parts };
        let start = |worker: usize| take(&mut shares.take(worker));
        let found = collect(workers, tasks, start, |state, task, lists| {
            let (place, part) = (task / parts, task % parts);
            let (of, head) = (&source.sequence(place / heads), place % heads * group);
            find(state, &Place { of, head, kv_head: head / source.group() }, part, lists);
        })?;
        Ok(Selected::new(*layout, found, *unit, keys))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_come_in_the_order_of_tasks() {
        let find = |_: &mut (), task: usize, lists: &mut Lists<u32>| {
            for list in 0..task % 3 {
                lists.extend((0..list).map(|i| (10 * task + i) as u32));
                lists.end();
            }
        };
        let (offsets, entries) = collect(2, 9, |_| (), find).unwrap();
        assert_eq!(offsets, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]);
        assert_eq!(entries, [20, 50, 80]);
        assert_eq!(ones(&[0b1010, 0, 1 << 63 | 1]).collect::<Vec<_>>(), [1, 3, 128, 191]);
    }
}
