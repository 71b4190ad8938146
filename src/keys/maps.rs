//! Plans of maps, which say of each block of queries and block of keys whether it is seen.

use ndarray::ArrayView4;

use crate::error::{Error, Result};
use crate::keys::{ATOM, BlockLists, Keys, Layout, Run, TokenLists};

/// Which blocks, or runs of keys, each block of queries sees.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum BlockPlan {
    /// Blocks of 64 keys.
    Blocks(BlockLists),
    /// Runs of keys, for smaller blocks.
    Tokens(TokenLists),
}

impl From<BlockLists> for BlockPlan {
    fn from(lists: BlockLists) -> Self {
        Self::Blocks(lists)
    }
}

impl From<TokenLists> for BlockPlan {
    fn from(lists: TokenLists) -> Self {
        Self::Tokens(lists)
    }
}

impl BlockPlan {
    /// The lists, as engines take them.
    pub(crate) fn keys(&self) -> Keys<'_> {
        match self {
            Self::Blocks(lists) => Keys::Blocks(lists),
            Self::Tokens(lists) => Keys::Tokens(lists),
        }
    }

    /// The same plan for sequences of so many keys: what it names past the end of one is
    /// left out. For caches and batches whose sequences are shorter than the layout's
    /// longest.
    ///
    /// # Errors
    /// [`Error::Value`] for other than one length a sequence.
    pub fn within(&self, lengths: &[usize]) -> Result<Self> {
        let layout = match self {
            Self::Blocks(lists) => *lists.layout(),
            Self::Tokens(lists) => *lists.layout(),
        };
        if lengths.len() != layout.sequences {
            let expected = format!("one for each of {} sequences", layout.sequences);
            return Err(Error::value("lengths", expected, format_args!("{} lengths", lengths.len())));
        }
        let (heads, blocks) = (layout.heads(), layout.blocks());
        let (mut offsets, mut atoms, mut runs) = (vec![0], Vec::new(), Vec::new());
        for list in 0..layout.lists()? {
            let (sequence, head) = (list / blocks / heads, list / blocks % heads * (layout.q_heads / heads));
            let (block, end) = (list % blocks, lengths[sequence]);
            match self {
                Self::Blocks(lists) => {
                    let named = lists.atoms(sequence, head, block).iter().copied();
                    atoms.extend(named.take_while(|&atom| atom as usize * ATOM < end));
                }
                Self::Tokens(lists) => {
                    let named = lists.runs(sequence, head, block).iter().map(|run| run.range());
                    let named = named.take_while(|range| range.start < end);
                    runs.extend(named.map(|range| Run {
                        start: range.start as u32,
                        len: (range.end.min(end) - range.start) as u32,
                    }));
                }
            }
            offsets.push(atoms.len() + runs.len());
        }
        Ok(match self {
            Self::Blocks(_) => BlockLists::new(layout, offsets, atoms)?.into(),
            Self::Tokens(_) => TokenLists::new(layout, offsets, runs)?.into(),
        })
    }
}

/// The plan of `map[sequence, list of the sequence, block of queries, block of
/// keys]`, where a block of keys is `k_block` of them: a multiple of 64, or a
/// divisor. Of queries it is the layout's `q_block`, any number.
///
/// # Errors
/// [`Error::Value`] for another `k_block`, [`Error::Shape`] for a map that does
/// not fit the layout, and what [`Layout::lists`] refuses.
pub fn block_map(layout: Layout, k_block: usize, map: ArrayView4<'_, bool>) -> Result<BlockPlan> {
    if k_block > 0 && k_block.is_multiple_of(ATOM) {
        return Ok(BlockLists::from_map(layout, k_block, map)?.into());
    }
    if k_block == 0 || !ATOM.is_multiple_of(k_block) {
        return Err(Error::value("k_block", format!("a multiple or a divisor of {ATOM} keys"), k_block));
    }
    layout.lists()?;
    let want = [layout.sequences, layout.heads(), layout.blocks(), layout.keys.div_ceil(k_block)];
    if map.shape() != want {
        let expected = format!("[sequences, lists, query blocks, key blocks] = {want:?}");
        return Err(Error::shape("map", expected, map.shape()));
    }
    let (mut offsets, mut runs) = (vec![0], Vec::<Run>::new());
    for row in map.rows() {
        let mut open = false;
        for (block, &named) in row.iter().enumerate() {
            let start = block * k_block;
            let len = k_block.min(layout.keys - start) as u32;
            match runs.last_mut().filter(|_| open && named) {
                Some(run) => run.len += len,
                None if named => runs.push(Run { start: start as u32, len }),
                None => {}
            }
            open = named;
        }
        offsets.push(runs.len());
    }
    Ok(TokenLists::new(layout, offsets, runs)?.into())
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;
    use crate::input::{Dims, Lengths};
    use crate::keys::Per;

    fn dims(batch: usize) -> Dims {
        Dims {
            batch,
            q_heads: 4,
            kv_heads: 2,
            q_len: 150,
            kv_len: 260,
            head_dim: 20,
            value_dim: 12,
            packed: false,
        }
    }

    /// A plan names what its map does, and within lengths no more than these; of no sequences
    /// too.
    #[test]
    fn plans_are_their_maps() {
        for batch in [2, 0] {
            for (per, q_block, k_block) in
                [(Per::Head, 64, 64), (Per::Group, 1, 16), (Per::Sequence, 50, 128), (Per::Head, 7, 8)]
            {
                let layout = Layout::new(per, q_block, &dims(batch));
                let sizes = (batch, layout.heads(), layout.blocks(), 260usize.div_ceil(k_block));
                let map = Array4::from_shape_fn(sizes, |(b, h, i, j)| (b + 3 * h + 5 * i * (j + 2)) % 3 == 0);
                let plan = block_map(layout, k_block, map.view()).unwrap();
                let lengths = [131, 7];
                let within = plan.within(&lengths[..batch]).unwrap();
                assert!(within.keys().check(&dims(batch), &Lengths::Keys(&lengths[..batch])).is_ok());
                let [seen, cut] = [&plan, &within].map(|plan| plan.keys().materialize(&dims(batch)));
                for ((b, h, i, j), &seen) in seen.indexed_iter() {
                    let want = map[[b, h / (4 / layout.heads()), i / q_block, j / k_block]];
                    assert_eq!(seen, want, "{per:?} {q_block} {k_block}: {b} {h} {i} {j}");
                    let end = lengths[b];
                    // What is whole atoms may end later than a sequence.
                    assert!(j >= end || cut[[b, h, i, j]] == seen);
                    assert!(j < end.next_multiple_of(64) || !cut[[b, h, i, j]]);
                }
            }
        }
    }

    #[test]
    fn refusals() {
        let layout = Layout::new(Per::Head, 64, &dims(2));
        let map = Array4::from_elem((2, 4, 3, 5), true);
        for (k_block, starts) in [(0, "k_block: "), (48, "k_block: "), (128, "map: "), (32, "map: ")] {
            let refusal = block_map(layout, k_block, map.view()).unwrap_err();
            assert!(refusal.to_string().starts_with(starts), "{refusal}");
        }
        let plan = block_map(layout, 64, map.view()).unwrap();
        let refusal = plan.within(&[260]).unwrap_err().to_string();
        assert_eq!(refusal, "lengths: expected one for each of 2 sequences, got 1 lengths");
    }
}
