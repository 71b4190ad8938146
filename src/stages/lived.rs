//! Keys that queries see until a position, each with a bias of its own.

use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::{ATOM, Keys, Layout, Per, TokenLists};
use crate::score::Score;
use crate::score::lived::Lived;
use crate::select::Source;
use crate::select::finding::Search;
use crate::stages::planned::Exact;
use crate::stages::selecting::Listing;

/// What [`DynamicMask`](crate::sparse::DynamicMask) has chosen: the bias of each key, and to
/// which position it is seen.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicKeys {
    tiles: TokenLists,
    /// Lists of single queries.
    layout: Layout,
    /// Positions of the first queries.
    starts: Vec<isize>,
    /// `[sequences, kv_heads, keys]`, as the longest sequence has them.
    bias: Vec<f32>,
    until: Vec<u32>,
}

impl DynamicKeys {
    /// The biases of the keys of a head.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn bias(&self, sequence: usize, kv_head: usize) -> &[f32] {
        let list = sequence * self.layout.kv_heads + kv_head;
        &self.bias[list * self.layout.keys..][..self.layout.keys]
    }

    /// Of keys whose biases and ends are known, with lists of what neighbouring queries see.
    pub(crate) fn find(
        source: &Source<'_>,
        workspace: &mut Workspace,
        bias: Vec<f32>,
        until: Vec<u32>,
    ) -> Result<Self> {
        let (layout, heads) = (source.layout_per(Per::Group, ATOM), source.dims.kv_heads);
        let search = Search { source, layout, unit: 1, share: 0 };
        let found = search.by_block(
            workspace,
            |_| (),
            |(), place, queries, lists| {
                let (of, list) = (place.of, place.of.index * heads + place.kv_head);
                let (q_len, kv_len) = (of.queries.len(), of.keys.len());
                let seen = (queries.end + kv_len).saturating_sub(q_len);
                let first = (queries.start + kv_len).saturating_sub(q_len);
                let until = &until[list * layout.keys..][..seen];
                // The first query that might see a key is the one at it.
                lists.extend((0..seen).filter(|&j| until[j] as usize > first.max(j)).map(|j| j as u32));
            },
        )?;
        let starts = (0..source.dims.batch).map(|i| start(&source.sequence(i))).collect();
        Ok(Self { tiles: found.tokens()?, layout: source.layout_per(Per::Group, 1), starts, bias, until })
    }

    /// Of the lists of single queries that a definition has, and the biases of a sequence and
    /// a key/value head.
    pub(crate) fn define(
        x: &Exact,
        lists: TokenLists,
        biases: impl Fn(&Sequence, usize) -> Vec<f64>,
    ) -> Self {
        let (layout, heads) = (*lists.layout(), x.dims.kv_heads);
        let n = layout.sequences * heads * layout.keys;
        let (mut starts, mut bias, mut until) = (Vec::new(), vec![0.0; n], vec![0; n]);
        for of in &x.sequences {
            starts.push(start(of));
            for head in 0..heads {
                let at = (of.index * heads + head) * layout.keys;
                for (j, of_key) in biases(of, head).into_iter().enumerate() {
                    bias[at + j] = of_key as f32;
                    // After the last query that sees it.
                    let site = of.site(head * (x.dims.q_heads / heads.max(1)).max(1));
                    let last = (0..of.queries.len()).rev().find(|&i| lists.visible(&site, i, j));
                    until[at + j] = last.map_or(0, |i| (i as isize + start(of) + 1) as u32);
                }
            }
        }
        Self { tiles: lists, layout, starts, bias, until }
    }

    /// Scores with the biases, and without what is seen no more.
    pub(crate) fn score(&self) -> impl Score + '_ {
        let (heads, group) = (self.layout.q_heads, self.layout.q_heads / self.layout.kv_heads.max(1));
        Lived { bias: &self.bias, until: &self.until, keys: self.layout.keys, heads, group: group.max(1) }
    }
}

/// The position of the first query of a sequence.
fn start(of: &Sequence) -> isize {
    of.keys.len() as isize - of.queries.len() as isize
}

impl Listing for DynamicKeys {
    fn plan(&self) -> Keys<'_> {
        Keys::Tokens(&self.tiles)
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn list(&self, sequence: usize, head: usize, query: usize) -> Vec<std::ops::Range<usize>> {
        let list =
            sequence * self.layout.kv_heads + head / (self.layout.q_heads / self.layout.kv_heads).max(1);
        let (position, keys) = (self.starts[sequence] + query as isize, self.layout.keys);
        let until = &self.until[list * keys..][..keys];
        let seen = |&j: &usize| j as isize <= position && position < until[j] as isize;
        (0..keys).filter(seen).map(|j| j..j + 1).collect()
    }
}
