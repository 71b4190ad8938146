//! Sparse mechanisms whose pattern is a closed form: a mask, and the ranges of
//! keys outside which it leaves nothing.

use std::ops::Range;

use crate::attention::{Cost, Margins};
use crate::cache::{Cache, Cached};
use crate::definition::softmax::{Normalisation, Reference};
use crate::element::Element;
use crate::engine::call::{Call, Norm};
use crate::error::Result;
use crate::input::{Dims, Lengths, Qkv, Site};
use crate::keys::{ATOM, BlockLists, Keys, Layout, Per};
use crate::mask::Mask;
use crate::score::Plain;
use crate::stages::attend::Config;
use crate::stages::selecting::Spans;

/// Queries that share a list.
const Q_BLOCK: usize = ATOM;

/// A mask that knows where it leaves something.
pub(crate) trait Pattern: Mask + Clone {
    /// Which heads see the same.
    fn per(&self) -> Per;

    /// Calls `visit` with ranges of keys, in any order, that hold all keys that
    /// some query of a block sees: as few others as the form gives.
    fn ranges(&self, site: &Site, queries: Range<usize>, visit: &mut dyn FnMut(Range<usize>));
}

/// Writes the atoms of each list down: `find` is given a site, its queries and
/// a bit for each atom.
fn lists(
    pattern: &impl Pattern,
    dims: &Dims,
    lengths: &Lengths<'_>,
    find: impl Fn(&Site, Range<usize>, &mut [bool]),
) -> Result<BlockLists> {
    pattern.check(dims)?;
    let layout = Layout::of(pattern.per(), Q_BLOCK, dims, lengths);
    layout.lists()?;
    let (mut offsets, mut atoms) = (vec![0], Vec::new());
    let mut named = vec![false; layout.atoms()];
    for sequence in (0..dims.batch).map(|i| lengths.sequence(dims, i)) {
        for list in 0..layout.heads() {
            let site = sequence.site(list * (layout.q_heads / layout.heads()));
            for block in 0..layout.blocks() {
                let end = |n: usize| n.min(site.q_len);
                let queries = end(block * Q_BLOCK)..end((block + 1) * Q_BLOCK);
                named.fill(false);
                if !queries.is_empty() && site.kv_len > 0 {
                    find(&site, queries, &mut named);
                }
                atoms.extend(named.iter().enumerate().filter(|(_, named)| **named).map(|(i, _)| i as u32));
                offsets.push(atoms.len());
            }
        }
    }
    BlockLists::new(layout, offsets, atoms)
}

/// The plan of a pattern.
pub(crate) fn plan(pattern: &impl Pattern, dims: &Dims, lengths: &Lengths<'_>) -> Result<BlockLists> {
    lists(pattern, dims, lengths, |site, queries, named| {
        pattern.ranges(site, queries, &mut |keys| {
            if !keys.is_empty() {
                named[keys.start / ATOM..keys.end.min(site.kv_len).div_ceil(ATOM)].fill(true);
            }
        });
    })
}

/// The plan by definition: atoms of which some query of a block sees a key.
pub(crate) fn define_plan(
    pattern: &impl Pattern,
    dims: &Dims,
    lengths: &Lengths<'_>,
) -> Result<(BlockLists, Margins)> {
    let plan = lists(pattern, dims, lengths, |site, queries, named| {
        for (atom, named) in named.iter_mut().enumerate() {
            let keys = (atom * ATOM).min(site.kv_len)..((atom + 1) * ATOM).min(site.kv_len);
            *named = queries.clone().any(|i| keys.clone().any(|j| pattern.visible(site, i, j)));
        }
    })?;
    let margins = Margins { doubtful: vec![Vec::new(); plan.layout().lists()?] };
    Ok((plan, margins))
}

/// The call on a plan.
pub(crate) fn with_call<M: Pattern, Q: Element, K: Element, O: Element, R>(
    config: &Config<M, Plain>,
    x: Qkv<'_, Q, K, O>,
    index: &BlockLists,
    run: impl FnOnce(&Call<'_>) -> R,
) -> Result<R> {
    let keys = Keys::Blocks(index);
    keys.check(&x.dims()?, &x.lengths)?;
    let call = config.call(x.reborrow(), Norm::Softmax { sinks: None }, None)?;
    Ok(run(&Call { keys, ..call }))
}

/// Its definition.
pub(crate) fn define<M: Pattern, Q: Element, K: Element, O: Element>(
    config: &Config<M, Plain>,
    x: Qkv<'_, Q, K, O>,
    index: &BlockLists,
) -> Result<Reference> {
    let keys = Keys::Blocks(index);
    keys.check(&x.dims()?, &x.lengths)?;
    let listed = config.listed(keys);
    listed.definition(x.reborrow(), Normalisation::Softmax { sinks: None }, None)?.compute()
}

/// What it costs.
pub(crate) fn price<M: Pattern, Q, K, O>(
    config: &Config<M, Plain>,
    x: &Qkv<'_, Q, K, O>,
    index: &BlockLists,
) -> Result<Cost> {
    let keys = Keys::Blocks(index);
    keys.check(&x.dims()?, &x.lengths)?;
    config.listed(keys).cost(x)
}

/// The plan over a cache, and that by definition.
pub(crate) fn plan_cached<Q: Element, C: Cache + ?Sized, O: Element, R>(
    x: &Cached<'_, Q, C, O>,
    run: impl FnOnce(&Dims, &Lengths<'_>) -> Result<R>,
) -> Result<R> {
    let (dims, slots) = (x.dims()?, x.slots());
    x.check_alike()?;
    run(&dims, &Spans::new(&dims, &slots).lengths(&slots))
}

/// The traits of a mechanism that is `config`, a
/// [`Config`](crate::stages::attend::Config) whose mask is a [`Pattern`].
macro_rules! patterned {
    ($mechanism:ty, caches) => {
        impl<
            Q: crate::element::Element,
            C: crate::cache::Cache + ?Sized,
            O: crate::element::Element,
        > crate::stages::selecting::Selecting<crate::cache::Cached<'_, Q, C, O>> for $mechanism
        {
            type Index = crate::keys::BlockLists;

            fn select_bytes(&self, x: crate::cache::Cached<'_, Q, C, O>) -> crate::error::Result<usize> {
                x.dims().map(|_| 0)
            }
            fn select_in(
                &self,
                x: crate::cache::Cached<'_, Q, C, O>,
                _: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<Self::Index> {
                let plan = crate::stages::patterned::plan;
                crate::stages::patterned::plan_cached(&x, |dims, lengths| {
                    plan(self.config.mask(), dims, lengths)
                })
            }
            fn define_select(
                &self,
                x: crate::cache::Cached<'_, Q, C, O>,
            ) -> crate::error::Result<(Self::Index, crate::attention::Margins)> {
                let plan = crate::stages::patterned::define_plan;
                crate::stages::patterned::plan_cached(&x, |dims, lengths| {
                    plan(self.config.mask(), dims, lengths)
                })
            }
            fn price_select(
                &self,
                _: crate::cache::Cached<'_, Q, C, O>,
            ) -> crate::error::Result<crate::attention::Cost> {
                Ok(crate::attention::Cost { flops: 0, bytes: 0 })
            }
            fn with_call<R>(
                &self,
                x: crate::cache::Cached<'_, Q, C, O>,
                index: &Self::Index,
                run: impl FnOnce(&crate::engine::call::Call<'_>) -> R,
            ) -> crate::error::Result<R> {
                let (keys, score) = (crate::keys::Keys::Blocks(index), &crate::score::Plain);
                crate::stages::selecting::with_call_cached(&self.config, score, x, keys, run)
            }
            fn define(
                &self,
                x: crate::cache::Cached<'_, Q, C, O>,
                index: &Self::Index,
            ) -> crate::error::Result<crate::definition::softmax::Reference> {
                crate::stages::selecting::define_cached(&self.config, x, crate::keys::Keys::Blocks(index))
            }
            fn price(
                &self,
                x: crate::cache::Cached<'_, Q, C, O>,
                index: &Self::Index,
            ) -> crate::error::Result<crate::attention::Cost> {
                crate::stages::selecting::price_cached(&self.config, x, crate::keys::Keys::Blocks(index))
            }
        }
        crate::stages::selecting::selecting!($mechanism, crate::keys::BlockLists, caches);
    };
    ($mechanism:ty) => {
        impl<Q: crate::element::Element, K: crate::element::Element, O: crate::element::Element>
            crate::stages::selecting::Selecting<crate::input::Qkv<'_, Q, K, O>> for $mechanism
        {
            type Index = crate::keys::BlockLists;

            fn select_bytes(&self, x: crate::input::Qkv<'_, Q, K, O>) -> crate::error::Result<usize> {
                x.dims().map(|_| 0)
            }
            fn select_in(
                &self,
                x: crate::input::Qkv<'_, Q, K, O>,
                _: &mut crate::engine::workspace::Workspace,
            ) -> crate::error::Result<Self::Index> {
                crate::stages::patterned::plan(self.config.mask(), &x.dims()?, &x.lengths)
            }
            fn define_select(
                &self,
                x: crate::input::Qkv<'_, Q, K, O>,
            ) -> crate::error::Result<(Self::Index, crate::attention::Margins)> {
                crate::stages::patterned::define_plan(self.config.mask(), &x.dims()?, &x.lengths)
            }
            fn price_select(
                &self,
                _: crate::input::Qkv<'_, Q, K, O>,
            ) -> crate::error::Result<crate::attention::Cost> {
                Ok(crate::attention::Cost { flops: 0, bytes: 0 })
            }
            fn with_call<R>(
                &self,
                x: crate::input::Qkv<'_, Q, K, O>,
                index: &Self::Index,
                run: impl FnOnce(&crate::engine::call::Call<'_>) -> R,
            ) -> crate::error::Result<R> {
                crate::stages::patterned::with_call(&self.config, x, index, run)
            }
            fn define(
                &self,
                x: crate::input::Qkv<'_, Q, K, O>,
                index: &Self::Index,
            ) -> crate::error::Result<crate::definition::softmax::Reference> {
                crate::stages::patterned::define(&self.config, x, index)
            }
            fn price(
                &self,
                x: crate::input::Qkv<'_, Q, K, O>,
                index: &Self::Index,
            ) -> crate::error::Result<crate::attention::Cost> {
                crate::stages::patterned::price(&self.config, &x, index)
            }
        }
        crate::stages::selecting::selecting!($mechanism, crate::keys::BlockLists, [Q, K, O] Qkv);

        // The mask is the pattern: gradients need no plan.
        impl<Q: crate::element::Element, K: crate::element::Element, O: crate::element::Element>
            crate::stages::attend_backward::Smooth<crate::input::Qkv<'_, Q, K, O>> for $mechanism
        {
            fn with_smooth<R>(
                &self,
                x: crate::input::Qkv<'_, Q, K, O>,
                run: impl FnOnce(
                    &crate::engine::call::Call<'_>,
                    &dyn crate::score::smooth::AnySmooth,
                ) -> R,
            ) -> crate::error::Result<R> {
                crate::stages::attend_backward::with_smooth(&self.config, x, run)
            }
            fn define_back(
                &self,
                x: crate::input::Qkv<'_, Q, K, O>,
                d_out: ndarray::ArrayView4<'_, f32>,
                saved: crate::stages::attend_backward::SavedForward<'_>,
            ) -> crate::error::Result<crate::definition::softmax_backward::Gradients> {
                crate::stages::attend_backward::define_back(&self.config, x, d_out, saved)
            }
            fn shapes(
                &self,
                x: crate::input::Qkv<'_, Q, K, O>,
            ) -> crate::error::Result<crate::stages::attend_backward::Shapes> {
                Ok(crate::stages::attend_backward::shapes(&x))
            }
        }
        crate::stages::attend_backward::smooth!($mechanism, [Q, K, O] Qkv);
    };
}
pub(crate) use patterned;
