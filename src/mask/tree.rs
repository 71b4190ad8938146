//! Trees of draft tokens.

use std::ops::Range;

use super::{Coverage, Mask, cut, range_bits};
use crate::error::{Error, Result};
use crate::input::{Dims, Site};

/// Draft tokens that form a tree behind a context: speculative decoding
/// (SpecInfer, arXiv 2305.09781).
///
/// The queries are the `n` nodes of the tree. The last `n` keys are the same
/// nodes, in the same order; the keys before them are the context. A node
/// sees the context, its ancestors and itself.
///
/// ```text
/// parents [None, Some(0), Some(0), Some(1)], kv_len 6
///
///     0             x x  x . . .
///    / \            x x  x x . .
///   1   2           x x  x . x .
///   |               x x  x x . x
///   3
/// ```
///
/// A tree that is a chain is [`Causal`](super::Causal).
///
/// # Errors
/// A call is refused unless it has as many queries as the tree has nodes and
/// at least as many keys, and if its batch is packed: see [`Trees`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: usize,
    /// For each node, a bit for each node that it sees.
    seen: Vec<u64>,
}

impl Tree {
    /// A tree in which `parents[i]` is the parent of node `i`; a node without
    /// one sees only the context and itself. There may be several of those.
    ///
    /// # Errors
    /// A parent that does not come before its child.
    pub fn new(parents: &[Option<usize>]) -> Result<Self> {
        let nodes = parents.len();
        let words = nodes.div_ceil(64);
        let mut seen = vec![0; nodes * words];
        for (i, &parent) in parents.iter().enumerate() {
            let (before, row) = seen.split_at_mut(i * words);
            if let Some(parent) = parent {
                if parent >= i {
                    let expected = "a parent that comes before its child";
                    return Err(Error::value(
                        "parents",
                        expected,
                        format_args!("parent {parent} of node {i}"),
                    ));
                }
                row[..words].copy_from_slice(&before[parent * words..][..words]);
            }
            row[i / 64] |= 1 << (i % 64);
        }
        Ok(Self { nodes, seen })
    }

    /// The number of nodes.
    pub fn len(&self) -> usize {
        self.nodes
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.nodes == 0
    }

    /// The key that is node 0: the length of the context. Negative where a
    /// sequence has fewer keys than there are nodes.
    #[inline(always)]
    fn context(&self, site: &Site) -> isize {
        site.kv_len as isize - self.nodes as isize
    }

    /// 64 bits of what a node sees of the nodes from `first` on.
    #[inline(always)]
    fn nodes_seen(&self, node: usize, first: isize) -> u64 {
        let words = self.nodes.div_ceil(64);
        let row = self.seen.get(node * words..(node + 1) * words).unwrap_or(&[]);
        let word = |i: isize| usize::try_from(i).ok().and_then(|i| row.get(i)).copied().unwrap_or(0);
        let (i, shift) = (first.div_euclid(64), first.rem_euclid(64));
        // Shifting in two steps stays below 64 where `shift` is 0.
        word(i) >> shift | word(i + 1) << 1 << (63 - shift)
    }
}

impl Mask for Tree {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        let node = key as isize - self.context(site);
        node < 0 || self.nodes_seen(query, node) & 1 == 1
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        cut(0..self.context(site).saturating_add(queries.end as isize), site.kv_len)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        let context = self.context(site);
        if keys.end as isize <= context {
            Coverage::Full
        } else if keys.start as isize >= context.saturating_add(queries.end as isize) {
            Coverage::Empty
        } else {
            Coverage::Partial
        }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let context = self.context(site);
        range_bits(0..context, first) | self.nodes_seen(query, first as isize - context)
    }
    fn is_shared(&self) -> bool {
        true
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        let nodes = self.nodes;
        if dims.packed {
            return Err(Error::packed("a tree of draft tokens"));
        }
        if dims.q_len != nodes {
            let expected = format!("one node for each query, q_len = {}", dims.q_len);
            return Err(Error::value("parents", expected, format_args!("{nodes} nodes")));
        }
        if dims.kv_len < nodes {
            let expected = format!("at most as many nodes as keys, kv_len = {}", dims.kv_len);
            return Err(Error::value("parents", expected, format_args!("{nodes} nodes")));
        }
        Ok(())
    }
}

/// A [`Tree`] for each sequence of a batch: requests whose drafts differ, padded,
/// packed or over a cache.
///
/// ```
/// use attention_kernels::cache::{Append, Cached, KvShape, Paged, Pages};
/// use attention_kernels::mask::{Tree, Trees};
/// use attention_kernels::{Attention, dense::Dense};
/// use ndarray::{Array3, Array4};
///
/// let shape = KvShape { kv_heads: 1, head_dim: 16, value_dim: 16 };
/// let mut cache = Paged::<f32>::new(shape, 2, Pages { count: 8, len: 16 })?;
/// for (request, len) in [40, 25].into_iter().enumerate() {
///     let tokens = Array3::<f32>::ones((1, len, 16)); // contexts of 37 and 23, then the drafts
///     cache.append(request, tokens.view(), tokens.view())?;
/// }
/// let fork = Tree::new(&[None, Some(0), Some(0)])?;
/// let chain = Tree::new(&[None, Some(0)])?;
/// let dense = Dense::builder().mask(Trees::new(vec![fork, chain])).build()?;
/// let q = Array4::<f32>::ones((1, 2, 5, 16)); // three nodes, then two
/// let out = dense.forward(Cached::new(q.view(), &cache).packed(&[0, 3, 5]))?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// # Errors
/// A call is refused unless it has as many sequences as there are trees, and each as
/// many queries as its tree has nodes and at least as many keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trees(Vec<Tree>);

impl Trees {
    /// One for each sequence, in order.
    pub fn new(trees: Vec<Tree>) -> Self {
        Self(trees)
    }

    /// The tree of a sequence. One that has none sees all: [`check`](Mask::check)
    /// refuses it.
    #[inline(always)]
    fn of(&self, site: &Site) -> &Tree {
        const NONE: &Tree = &Tree { nodes: 0, seen: Vec::new() };
        self.0.get(site.batch).unwrap_or(NONE)
    }
}

impl Mask for Trees {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        self.of(site).visible(site, query, key)
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        self.of(site).hull(site, queries)
    }
    #[inline(always)]
    fn coverage(&self, site: &Site, queries: Range<usize>, keys: Range<usize>) -> Coverage {
        self.of(site).coverage(site, queries, keys)
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        self.of(site).bits(site, query, first)
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        if self.0.len() != dims.batch {
            let expected = format!("one for each of {} sequences", dims.batch);
            return Err(Error::value("trees", expected, format_args!("{} trees", self.0.len())));
        }
        Ok(())
    }
    fn check_sequence(&self, site: &Site) -> Result<()> {
        let (nodes, Site { batch, q_len, kv_len, .. }) = (self.of(site).nodes, *site);
        let expected = if q_len != nodes {
            format!("one node for each of the {q_len} queries of sequence {batch}")
        } else if kv_len < nodes {
            format!("at most as many nodes as the {kv_len} keys of sequence {batch}")
        } else {
            return Ok(());
        };
        Err(Error::value("trees", expected, format_args!("{nodes} nodes")))
    }
}
