//! Who holds which tokens, and which blocks of a cache: plain data, the same on every rank.

use std::ops::Range;

/// Which tokens of a sequence each rank holds: runs, in the order of the rows of its arrays.
///
/// ```
/// use attention_kernels_mpi::plan::Cut;
///
/// let cut = Cut::zigzag(10, 2); // causal work is the same for every rank
/// assert_eq!(cut.runs(0), [0..2, 7..10]);
/// assert_eq!(cut.runs(1), [2..5, 5..7]);
/// assert_eq!(Cut::even(10, 3).runs(1), [3..6]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    runs: Vec<Vec<Range<usize>>>,
    len: usize,
}

impl Cut {
    /// One run a rank, of nearly the same length.
    pub fn even(len: usize, ranks: usize) -> Self {
        let runs = (0..ranks).map(|rank| std::iter::once(part(len, ranks, rank)).collect()).collect();
        Self { runs, len }
    }

    /// Twice as many runs as ranks, of which rank `r` has number `r` and that many from the
    /// end: causal attention is then the same work for each.
    pub fn zigzag(len: usize, ranks: usize) -> Self {
        let run = |i| part(len, 2 * ranks, i);
        Self { runs: (0..ranks).map(|rank| vec![run(rank), run(2 * ranks - 1 - rank)]).collect(), len }
    }

    /// Any runs, a list for each rank.
    ///
    /// # Errors
    /// Says which token no rank has, or more than one.
    pub fn of(runs: Vec<Vec<Range<usize>>>) -> Result<Self, String> {
        let mut all: Vec<_> = runs.iter().flatten().filter(|run| !run.is_empty()).cloned().collect();
        all.sort_by_key(|run| run.start);
        let mut len = 0;
        for run in all {
            if run.start != len {
                return Err(format!(
                    "runs: expected token {} with one rank, got {run:?} after {len}",
                    len.min(run.start)
                ));
            }
            len = run.end;
        }
        Ok(Self { runs, len })
    }

    /// Tokens of the sequence.
    pub fn tokens(&self) -> usize {
        self.len
    }

    /// Ranks that it is cut for.
    pub fn ranks(&self) -> usize {
        self.runs.len()
    }

    /// The runs of a rank.
    pub fn runs(&self, rank: usize) -> &[Range<usize>] {
        &self.runs[rank]
    }

    /// How many tokens a rank has.
    pub fn held(&self, rank: usize) -> usize {
        self.runs[rank].iter().map(Range::len).sum()
    }

    /// For each row of a rank's arrays, in order, which token it is.
    pub fn positions(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        self.runs[rank].iter().cloned().flatten()
    }

    /// The part of packed sequences that a rank has, for calls that carry states from rank to
    /// rank: offsets among its own tokens, and whether its first sequence has begun before.
    /// A rank without tokens has one sequence of none, which goes on. `offsets` are those of
    /// all tokens.
    ///
    /// ```
    /// use attention_kernels_mpi::plan::Cut;
    ///
    /// let cut = Cut::even(12, 3);
    /// assert_eq!(cut.sequences(1, &[0, 3, 6, 12])?, (vec![0, 2, 4], true));
    /// assert_eq!(cut.sequences(2, &[0, 3, 8, 12])?, (vec![0, 4], false));
    /// # Ok::<(), String>(())
    /// ```
    ///
    /// # Errors
    /// Where a rank has tokens that do not follow each other, and offsets decrease.
    pub fn sequences(&self, rank: usize, offsets: &[usize]) -> Result<(Vec<usize>, bool), String> {
        let sorted = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        let Some(&end) = offsets.last().filter(|_| sorted && offsets[0] == 0) else {
            return Err(format!("offsets: expected non-decreasing numbers from 0, got {offsets:?}"));
        };
        let mut runs = self.runs[rank].iter().filter(|run| !run.is_empty());
        let run = match (runs.next(), runs.next()) {
            (Some(run), None) => run.start.min(end)..run.end.min(end),
            (None, _) => 0..0,
            _ => {
                return Err(format!(
                    "cut: expected one run a rank, got {:?} of rank {rank}",
                    self.runs[rank]
                ));
            }
        };
        let inner = offsets.iter().filter(|&&at| run.start < at && at < run.end);
        let mut own = vec![0];
        own.extend(inner.map(|at| at - run.start));
        own.dedup();
        own.push(run.len());
        let continues = run.is_empty() || !offsets.contains(&run.start);
        Ok((own, continues))
    }

    /// A number that two cuts have in common only if they are the same, nearly always.
    pub(crate) fn fingerprint(&self) -> u64 {
        let ends = self.runs.iter().flat_map(|runs| {
            std::iter::once(u64::MAX).chain(runs.iter().flat_map(|run| [run.start as u64, run.end as u64]))
        });
        fingerprint(ends)
    }
}

pub(crate) fn fingerprint(numbers: impl IntoIterator<Item = u64>) -> u64 {
    numbers
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, x| (hash ^ x).wrapping_mul(0x0100_0000_01b3).rotate_left(29))
}

/// Part `index` of `len` things in `parts` of nearly the same size.
pub(crate) fn part(len: usize, parts: usize, index: usize) -> Range<usize> {
    len * index / parts..len * (index + 1) / parts
}

/// Blocks that move from one rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loan {
    /// Who has too many.
    pub debtor: usize,
    /// Who has room.
    pub creditor: usize,
    /// How many.
    pub blocks: usize,
}

/// Who lends room to whom, so that each rank holds at most its capacity: debit and credit
/// of "Infinite-LLM" (arXiv 2401.02669). The largest debt is served first, by whom has the
/// most room, so that few pairs of ranks exchange anything; equals in the order of ranks.
///
/// ```
/// use attention_kernels_mpi::plan::{Loan, debit_and_credit};
///
/// let loans = debit_and_credit(&[12, 3, 8], &[8, 8, 8])?;
/// assert_eq!(loans, [Loan { debtor: 0, creditor: 1, blocks: 4 }]);
/// # Ok::<(), String>(())
/// ```
///
/// # Errors
/// Where lists differ in length, or all ranks together have no room.
pub fn debit_and_credit(held: &[usize], capacity: &[usize]) -> Result<Vec<Loan>, String> {
    if held.len() != capacity.len() {
        return Err(format!(
            "capacity: expected one for each of {} ranks, got {}",
            held.len(),
            capacity.len()
        ));
    }
    let over = |(have, room): (&usize, &usize)| have.saturating_sub(*room);
    let mut debts: Vec<usize> = held.iter().zip(capacity).map(over).collect();
    let mut rooms: Vec<usize> = capacity.iter().zip(held).map(over).collect();
    let (debt, room) = (debts.iter().sum::<usize>(), rooms.iter().sum::<usize>());
    if debt > room {
        return Err(format!("capacity: expected room for {debt} blocks, got {room}"));
    }
    let mut loans = Vec::new();
    while let Some(debtor) = largest(&debts) {
        let Some(creditor) = largest(&rooms) else { break };
        let blocks = debts[debtor].min(rooms[creditor]);
        debts[debtor] -= blocks;
        rooms[creditor] -= blocks;
        loans.push(Loan { debtor, creditor, blocks });
    }
    Ok(loans)
}

/// The first of the largest numbers, if it is not 0.
fn largest(of: &[usize]) -> Option<usize> {
    (0..of.len()).filter(|&i| of[i] > 0).min_by_key(|&i| (std::cmp::Reverse(of[i]), i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_have_each_token_once_and_zigzag_is_balanced() {
        for (len, ranks) in [(0, 1), (1, 4), (10, 3), (64, 4), (101, 7)] {
            for cut in [Cut::even(len, ranks), Cut::zigzag(len, ranks)] {
                let mut all: Vec<_> = (0..ranks).flat_map(|rank| cut.positions(rank)).collect();
                all.sort();
                assert_eq!(all, (0..len).collect::<Vec<_>>());
                assert_eq!(
                    Cut::of((0..ranks).map(|r| cut.runs(r).to_vec()).collect()).map(|c| c.len),
                    Ok(len)
                );
            }
            let work = |rank| Cut::zigzag(len, ranks).positions(rank).map(|i| i + 1).sum::<usize>();
            let (least, most) = (0..ranks).map(work).fold((usize::MAX, 0), |(a, b), w| (a.min(w), b.max(w)));
            assert!(most - least <= 4 * len, "{len} over {ranks}: {least} to {most}");
        }
        assert!(Cut::of(vec![vec![0..3], vec![2..4]]).is_err());
        assert!(Cut::of(vec![vec![0..3], vec![4..5]]).is_err());
    }

    #[test]
    fn packed_sequences_are_cut_where_ranks_are() {
        for offsets in [vec![0, 20], vec![0, 3, 3, 11, 12, 20], vec![0, 5, 16], vec![0, 10, 20], vec![0]] {
            for cut in [Cut::even(20, 1), Cut::even(20, 4), Cut::even(20, 7), Cut::even(20, 30)] {
                // Numbers of sequences, from what ranks have.
                let (mut got, mut number) = (Vec::new(), 0);
                for rank in 0..cut.ranks() {
                    let (own, continues) = cut.sequences(rank, &offsets).unwrap();
                    number += usize::from(!continues);
                    for pair in own.windows(2) {
                        got.extend(vec![number; pair[1] - pair[0]]);
                        number += 1;
                    }
                    number -= 1;
                }
                // The same from the offsets, those of no tokens left out.
                let mut ends = offsets.clone();
                ends.dedup();
                let of = |token: usize| ends[1..].iter().filter(|&&end| end <= token).count();
                let want: Vec<_> = (0..*ends.last().unwrap()).map(of).collect();
                let first = got.first().copied().unwrap_or_default();
                assert_eq!(got.iter().map(|x| x - first).collect::<Vec<_>>(), want, "{offsets:?}, {cut:?}");
            }
        }
        assert!(Cut::zigzag(20, 2).sequences(0, &[0, 20]).is_err());
        assert!(Cut::even(20, 2).sequences(0, &[0, 20, 10]).is_err());
        assert!(Cut::even(20, 2).sequences(0, &[]).is_err());
    }

    #[test]
    fn loans_keep_blocks_and_capacities() {
        let (held, capacity) = ([40, 0, 3, 17, 9], [10, 20, 5, 17, 30]);
        let (mut after, loans) = (held, debit_and_credit(&held, &capacity).unwrap());
        for loan in &loans {
            after[loan.debtor] -= loan.blocks;
            after[loan.creditor] += loan.blocks;
        }
        assert!(after.iter().zip(&capacity).all(|(have, room)| have <= room), "{after:?}");
        assert_eq!(after.iter().sum::<usize>(), held.iter().sum::<usize>());
        assert_eq!(loans.len(), 2);
        assert_eq!(debit_and_credit(&[3, 3], &[3, 3]), Ok(vec![]));
        assert!(debit_and_credit(&[4, 3], &[3, 3]).unwrap_err().contains("room for 1 blocks, got 0"));
        assert!(debit_and_credit(&[4], &[3, 3]).is_err());
    }
}
