//! Mechanisms that select by an index of the keys which was built before: what their
//! traits have in common.

use ndarray::{ArrayView2, s};

use crate::attention::{Cost, Margins};
use crate::engine::workspace::Workspace;
use crate::error::Result;
use crate::input::Sequence;
use crate::keys::TokenLists;
use crate::score::Plain;
use crate::select::Source;
use crate::stages::attend::Config;
use crate::stages::listed::Order;
use crate::stages::sourced::Sourced;

/// What is seen of a list, by definition, and what is in doubt.
pub(crate) type Defined = (Vec<usize>, Vec<std::ops::Range<usize>>);

/// A mechanism that finds the keys of each query head by itself. With
/// [`searching!`] it is [`Selecting`](crate::stages::selecting::Selecting) from arrays
/// and caches.
pub(crate) trait Searching: Sized {
    fn config(&self) -> &Config<Order, Plain>;

    /// Queries that share a list.
    fn q_block(&self) -> usize {
        1
    }

    /// Refuses what the index is not of.
    fn check(&self, source: &Source<'_>) -> Result<()>;

    /// Bytes that [`find`](Self::find) works in.
    fn find_bytes(&self, source: &Source<'_>) -> usize;

    /// The keys of each list.
    fn find(&self, source: &Source<'_>, workspace: &mut Workspace) -> Result<TokenLists>;

    /// The same by definition of one list: given the queries of a block of a head,
    /// and all keys of the sequence.
    fn define_list(
        &self,
        at: (&Sequence, usize),
        queries: ArrayView2<'_, f64>,
        keys: ArrayView2<'_, f64>,
    ) -> Defined;

    /// Multiply-adds of a query.
    fn search_flops(&self, source: &Source<'_>, sequence: &Sequence) -> u64;
}

pub(crate) fn select_bytes<X: Sourced>(mechanism: &impl Searching, x: X) -> Result<usize> {
    x.with_source(mechanism.config().isa(), |source| {
        mechanism.check(source)?;
        Ok(mechanism.find_bytes(source))
    })
}

pub(crate) fn select_in<X: Sourced>(
    mechanism: &impl Searching,
    x: X,
    workspace: &mut Workspace,
) -> Result<TokenLists> {
    x.with_source(mechanism.config().isa(), |source| {
        mechanism.check(source)?;
        mechanism.find(source, workspace)
    })
}

pub(crate) fn define_select<X: Sourced>(mechanism: &impl Searching, x: X) -> Result<(TokenLists, Margins)> {
    let [q, k] = x.exact()?;
    x.with_source(mechanism.config().isa(), |source| {
        mechanism.check(source)?;
        let layout = source.layout(mechanism.q_block());
        let (mut offsets, mut keys, mut margins) = (vec![0], Vec::new(), Margins::default());
        let blocks = layout.blocks();
        for list in 0..layout.lists()? {
            let (i, head) = (list / blocks / layout.q_heads, list / blocks % layout.q_heads);
            // Along the rows of the arrays, where those of a cache are copies.
            let sequence = source.lengths.sequence(&source.dims, i);
            let (start, len) = (list % blocks * layout.q_block, sequence.queries.len());
            let rows = sequence.queries.start + start.min(len)
                ..sequence.queries.start + (start + layout.q_block).min(len);
            let mut doubtful = Vec::new();
            if !rows.is_empty() {
                let kv_head = head / (layout.q_heads / layout.kv_heads);
                let queries = q.slice(s![sequence.batch, head, rows, ..]);
                let of = k.slice(s![sequence.batch, kv_head, sequence.keys.clone(), ..]);
                let found = mechanism.define_list((&sequence, kv_head), queries, of);
                keys.extend(found.0.into_iter().map(|key| key as u32));
                doubtful = found.1;
            }
            offsets.push(keys.len());
            margins.doubtful.push(doubtful);
        }
        Ok((TokenLists::from_keys(layout, &offsets, &keys)?, margins))
    })
}

pub(crate) fn price_select<X: Sourced>(mechanism: &impl Searching, x: X) -> Result<Cost> {
    x.with_source(mechanism.config().isa(), |source| {
        let flops = (0..source.dims.batch).map(|i| {
            let sequence = source.sequence(i);
            (source.dims.q_heads * sequence.queries.len()) as u64 * mechanism.search_flops(source, &sequence)
        });
        Ok(Cost { flops: flops.sum(), bytes: 0 })
    })
}

/// [`Selecting`](crate::stages::selecting::Selecting) for a [`Searching`] mechanism.
macro_rules! searching {
    ($mechanism:ty) => {
        $crate::stages::searching::searching!(
            @impl [Q: crate::element::Element, K: crate::element::Element, O: crate::element::Element]
            crate::input::Qkv<'_, Q, K, O>, $mechanism
        );
        $crate::stages::searching::searching!(
            @impl [Q: crate::element::Element, C: crate::cache::Cache + ?Sized, O: crate::element::Element]
            crate::cache::Cached<'_, Q, C, O>, $mechanism
        );
    };
    (@impl [$($generics:tt)*] $input:ty, $mechanism:ty) => {
        impl<$($generics)*> $crate::stages::selecting::Selecting<$input> for $mechanism {
            type Index = crate::keys::TokenLists;

            fn select_bytes(&self, x: $input) -> crate::error::Result<usize> {
                $crate::stages::searching::select_bytes(self, x)
            }
            fn select_in(
                &self,
                x: $input,
                workspace: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<crate::keys::TokenLists> {
                $crate::stages::searching::select_in(self, x, workspace)
            }
            fn define_select(
                &self,
                x: $input,
            ) -> crate::error::Result<(crate::keys::TokenLists, crate::attention::Margins)> {
                $crate::stages::searching::define_select(self, x)
            }
            fn price_select(&self, x: $input) -> crate::error::Result<crate::attention::Cost> {
                $crate::stages::searching::price_select(self, x)
            }
            fn with_call<R>(
                &self,
                x: $input,
                index: &crate::keys::TokenLists,
                run: impl FnOnce(&crate::engine::call::Call<'_>) -> R,
            ) -> crate::error::Result<R> {
                use $crate::stages::selecting::Attended;
                x.with_call(&self.config, crate::keys::Keys::Tokens(index), run)
            }
            fn define(
                &self,
                x: $input,
                index: &crate::keys::TokenLists,
            ) -> crate::error::Result<crate::definition::softmax::Reference> {
                use $crate::stages::selecting::Attended;
                x.define(&self.config, crate::keys::Keys::Tokens(index))
            }
            fn price(
                &self,
                x: $input,
                index: &crate::keys::TokenLists,
            ) -> crate::error::Result<crate::attention::Cost> {
                use $crate::stages::selecting::Attended;
                x.price(&self.config, crate::keys::Keys::Tokens(index))
            }
        }
    };
}
pub(crate) use searching;
